package proxy

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// streamed are the dialects that stream, with their content types.
var streamed = []struct{ path, contentType string }{
	{"/api/generate", "application/x-ndjson"},
	{"/api/chat", "application/x-ndjson"},
	{"/api/pull", "application/x-ndjson"},
	{"/v1/chat/completions", "text/event-stream"},
	{"/v1/messages", "text/event-stream"},
	{"/v1/responses", "text/event-stream; charset=utf-8"},
	{"/unknown", "application/octet-stream"},
}

// stream starts a request with a chunked answer, and returns both ends, after the client read the
// headers.
func stream(t *testing.T, rg *rig, f *fake, path, contentType string, headers ...string) (client, up *fakeConn, head received) {
	t.Helper()
	client = rg.dial()
	client.send(rawPost(path, `{"model":"m"}`, headers...))
	up = f.accept()
	up.receive()
	up.send("HTTP/1.1 200 OK\r\nContent-Type: " + contentType + "\r\nTransfer-Encoding: chunked\r\n\r\n")
	return client, up, client.mustHead() // before a byte of the body was written
}

// TestStreamEachWrite: each write of the upstream is passed on unchanged, at once, by itself, and
// the headers before the first. The test makes the next write only when it has read the one before.
func TestStreamEachWrite(t *testing.T) {
	line := func(n int) string { return strings.Repeat("a", n-1) + "\n" }
	writes := []string{
		line(200), line(20 << 10), line(100) + line(101), // a line, the final context array, two lines in one
		`{"response":"th`, `ree`, ` writes"}` + "\n", // a line in three
		"\n", "a", "data: {\"x\":1}\n\n", ": comment\n\n", "\x00\xff\r\n\r\n", "0\r\n\r\n",
		line(4 << 10), line(32<<10 - 1), line(32 << 10),
	}
	for _, s := range streamed {
		for _, accept := range []string{"", "Accept-Encoding: gzip", "Accept-Encoding: gzip, deflate, br, zstd"} {
			t.Run(s.path+" "+accept, func(t *testing.T) {
				f := newFake(t, nil)
				rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
				var headers []string
				if accept != "" {
					headers = []string{accept}
				}
				client, up, head := stream(t, rg, f, s.path, s.contentType, headers...)
				if head.line != "HTTP/1.1 200 OK" || head.value("Content-Type") != s.contentType || !head.chunked || head.values("Content-Length") != nil || head.values("Content-Encoding") != nil {
					t.Errorf("head %+v", head)
				}
				for i, w := range writes {
					up.chunk(w)
					if got := client.mustChunk(); got != w {
						t.Fatalf("write %d of %d bytes came as %d bytes: %.60q", i, len(w), len(got), got)
					}
				}
				up.send("0\r\n\r\n")
				if got := client.mustChunk(); got != "" {
					t.Errorf("the end came as %q", got)
				}
				ex := rg.ended()
				if n := int64(len(strings.Join(writes, ""))); ex.Outcome != OK || ex.BytesOut != n || ex.FirstByte == 0 {
					t.Errorf("told as %+v, want %d bytes", ex, n)
				}
			})
		}
	}
}

// TestStreamCloseDelimited: the same from an HTTP/1.0 upstream, whose answer ends with the
// connection.
func TestStreamCloseDelimited(t *testing.T) {
	for _, head := range []string{"HTTP/1.0 200 OK\r\n", "HTTP/1.1 200 OK\r\nConnection: close\r\n"} {
		f := newFake(t, nil)
		rg := newRig(t, f.URL, &Handler{})
		client := rg.dial()
		client.send(rawPost("/api/chat", `{"model":"m"}`))
		up := f.accept()
		up.receive()
		up.send(head + "Content-Type: application/x-ndjson\r\n\r\n")
		if got := client.mustHead(); !got.chunked || got.values("Connection") != nil {
			t.Errorf("head %+v", got)
		}
		for i := range 5 {
			w := fmt.Sprintf("{\"response\":\"%d\"}\n", i)
			up.send(w)
			if got := client.mustChunk(); got != w {
				t.Errorf("%q came as %q", w, got)
			}
		}
		up.Close()
		if got := client.mustChunk(); got != "" {
			t.Errorf("the end came as %q", got)
		}
		if ex := rg.ended(); ex.Outcome != OK {
			t.Errorf("told as %+v", ex)
		}
	}
}

// TestStreamHTTP10Client: a client of HTTP/1.0 gets no chunks and no 1xx, and each write at once.
func TestStreamHTTP10Client(t *testing.T) {
	f := newFake(t, nil)
	rg := newRig(t, f.URL, &Handler{})
	client := rg.dial()
	client.send("POST /api/chat HTTP/1.0\r\nContent-Length: 13\r\n\r\n{\"model\":\"m\"}")
	up := f.accept()
	if got := up.receive(); string(got.body) != `{"model":"m"}` || !strings.HasSuffix(got.line, " HTTP/1.1") {
		t.Errorf("went as %+v", got)
	}
	up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: application/x-ndjson\r\n\r\n")
	if head := client.mustHead(); head.line != "HTTP/1.0 200 OK" || head.chunked {
		t.Errorf("head %+v", head)
	}
	for _, w := range []string{"{}\n", "{\"done\":true}\n"} {
		up.chunk(w)
		got := make([]byte, len(w))
		if _, err := client.br.Read(got); err != nil || string(got) != w {
			t.Errorf("%q came as %q, %v", w, got, err)
		}
	}
	up.send("0\r\n\r\n")
	if got := client.closed(); got != "" {
		t.Errorf("after the end: %q", got)
	}
}

// TestStreamContentLength: the upstream's Content-Length is kept, whatever the size, and none is
// added.
func TestStreamContentLength(t *testing.T) {
	for _, n := range []int{0, 1, 2047, 2048, 2049, 70 << 10, 1 << 20} {
		for _, method := range []string{"GET", "POST", "HEAD"} {
			f := newFake(t, nil)
			rg := newRig(t, f.URL, &Handler{})
			client := rg.dial()
			client.send(method + " /api/tags HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
			up := f.accept()
			up.receive()
			body := strings.Repeat("x", n)
			if method == "HEAD" {
				body = ""
			}
			sent := make(chan struct{})
			go func() { // ends with the write
				defer close(sent)
				up.Write([]byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: %d\r\n\r\n%s", n, body)))
			}()
			head := client.mustHead()
			if head.value("Content-Length") != fmt.Sprint(n) || head.chunked {
				t.Errorf("%s, %d bytes: %+v", method, n, head)
			}
			if method == "HEAD" {
				head.headers = nil
			}
			if err := client.rest(&head); err != nil || string(head.body) != body {
				t.Errorf("%s, %d bytes: got %d, %v", method, n, len(head.body), err)
			}
			<-sent
			if ex := rg.ended(); ex.Outcome != OK || ex.BytesOut != int64(len(body)) {
				t.Errorf("told as %+v", ex)
			}
		}
	}
}

// TestStreamSmallChunked: a short chunked answer stays chunked for the client: no length is
// computed.
func TestStreamSmallChunked(t *testing.T) {
	f := newFake(t, func(received) string {
		return "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
	})
	rg := newRig(t, f.URL, &Handler{})
	client := rg.dial()
	client.send(rawPost("/api/chat", `{"model":"m"}`))
	if got := client.receive(); !got.chunked || got.values("Content-Length") != nil || string(got.body) != "{}" {
		t.Errorf("got %+v", got)
	}
}

// TestStreamCompressed: compressed answers stay as they are, with their header, requested or not.
func TestStreamCompressed(t *testing.T) {
	const packed = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\xae\x05\x00\x43\xbf\xa6\xa3\x02\x00\x00\x00"
	for _, accept := range []string{"gzip", ""} {
		f := newFake(t, func(received) string {
			return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s", len(packed), packed)
		})
		rg := newRig(t, f.URL, &Handler{})
		var headers []string
		if accept != "" {
			headers = append(headers, "Accept-Encoding: "+accept)
		}
		res, got := rg.post("/api/chat", `{"model":"m"}`, headers...)
		if got != packed || res.Header.Get("Content-Encoding") != "gzip" {
			t.Errorf("Accept-Encoding %q: %v %q", accept, res.Header, got)
		}
		if r := f.next(); r.value("Accept-Encoding") != accept {
			t.Errorf("the upstream saw Accept-Encoding %q, want %q", r.value("Accept-Encoding"), accept)
		}
	}
}

// slowUpstream waits before it sends headers.
type slowUpstream struct{ d time.Duration }

func (s slowUpstream) RoundTrip(r *http.Request) (*http.Response, error) {
	if at, ok := r.Context().Deadline(); ok {
		return nil, fmt.Errorf("to be answered by %v", at)
	}
	select {
	case <-time.After(s.d):
		return &http.Response{StatusCode: 200, Request: r, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("{}"))}, nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// TestNoTimeLimit: the proxy waits for a model that loads for hours: it has no time limit and sends
// no 504.
func TestNoTimeLimit(t *testing.T) {
	if tr := NewTransport(); tr.ResponseHeaderTimeout != 0 {
		t.Errorf("the transport waits %v for headers", tr.ResponseHeaderTimeout)
	}
	synctest.Test(t, func(t *testing.T) {
		var told Exchange
		h := &Handler{
			Upstreams: []*upstream.Server{upstream.NewServer("up", &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, nil, nil)},
			Transport: slowUpstream{10 * time.Hour}, KeepAlive: keep(t, "", "24h"), Done: func(ex Exchange) { told = ex },
		}
		h.Init()
		for _, path := range []string{"/api/chat", "/v1/chat/completions", "/api/pull"} {
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, httptest.NewRequest("POST", "http://localhost"+path, strings.NewReader(`{"model":"m"}`)))
			if rec.Code != 200 || rec.Body.String() != "{}" || told.Duration != 10*time.Hour {
				t.Errorf("%s: %d %s after %v", path, rec.Code, rec.Body, told.Duration)
			}
		}
	})
}
