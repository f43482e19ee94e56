package proxy

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// stubUpstream reads the request's body and answers at once, in one piece or in twenty.
type stubUpstream struct{}

func (s stubUpstream) RoundTrip(r *http.Request) (*http.Response, error) {
	buf := make([]byte, 32<<10) // as the real transport copies
	if _, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{io.LimitReader(r.Body, r.ContentLength)}, buf); err != nil {
		return nil, err
	}
	r.Body.Close()
	return &http.Response{
		StatusCode: 200, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: r, ContentLength: -1,
		Header: http.Header{"Content-Type": {"application/x-ndjson"}}, Body: io.NopCloser(&chunks{left: 20}),
	}, nil
}

// chunks is an answer of 20 reads.
type chunks struct{ left int }

func (c *chunks) Read(p []byte) (int, error) {
	if c.left--; c.left < 0 {
		return 0, io.EOF
	}
	return copy(p, `{"model":"m","message":{"role":"assistant","content":"token"},"done":false}`+"\n"), nil
}

type discardWriter struct{ header http.Header }

func (w *discardWriter) Header() http.Header         { return w.header }
func (w *discardWriter) Write(p []byte) (int, error) { return len(p), nil }
func (w *discardWriter) WriteHeader(int)             {}
func (w *discardWriter) Flush()                      {}

// BenchmarkHandler measures the handler's own cost per request, without sockets, next to a bare
// ReverseProxy.
func BenchmarkHandler(b *testing.B) {
	u, err := url.Parse("http://127.0.0.1:11434")
	if err != nil {
		b.Fatal(err)
	}
	keep, err := ParseKeepAlive(IfAbsent, []string{"24h"})
	if err != nil {
		b.Fatal(err)
	}
	logger := slog.New(slog.NewJSONHandler(io.Discard, nil))
	ours := &Handler{Upstreams: []*upstream.Server{upstream.NewServer("u", u, nil, logger)}, Transport: stubUpstream{}, KeepAlive: keep, Log: logger,
		Ledger: savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 1e6, Bytes: 256 << 20}), 1000)}
	ours.Init()
	bare := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) { pr.SetURL(u) }, Transport: stubUpstream{}, FlushInterval: -1, BufferPool: newBufferPool(),
	}
	line := `Score the candidate from 1 to 10 and explain in one sentence why.\n`
	for _, size := range []int{8 << 10, 1 << 20} {
		body := `{"model":"m","messages":[{"role":"user","content":"` + strings.Repeat(line, size/len(line)) + `"}]}`
		for _, proxy := range []struct {
			name string
			http.Handler
		}{{"bare", bare}, {"ours", ours}} {
			b.Run(fmt.Sprintf("%dKiB/%s", size>>10, proxy.name), func(b *testing.B) {
				b.SetBytes(int64(len(body)))
				b.ReportAllocs()
				for b.Loop() {
					r := httptest.NewRequest("POST", "http://127.0.0.1:11435/api/chat", bytes.NewReader([]byte(nil)))
					r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
					proxy.ServeHTTP(&discardWriter{http.Header{}}, r)
				}
			})
		}
	}
}
