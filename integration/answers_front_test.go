package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// textPaths are those of chats and generations.
var textPaths = []string{
	"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses",
	"/v1/messages",
}

// front stands between the proxy and Ollama: it counts what is computed, and holds what a test wants
// to be held.
type front struct {
	*httptest.Server

	mu       sync.Mutex
	asked    []string            // the computations asked for: path and body; guarded by mu
	answered []string            // those that were answered with status 200; guarded by mu
	whole    int                 // how many of them were answered to their end; guarded by mu
	lists    int                 // how many lists of models it has answered; guarded by mu
	answer   reply               // the last one that ended; guarded by mu
	holds    map[string]*holding // by the word in the request; guarded by mu
}

// holding holds requests with a word in them: before they are forwarded, and after the first part
// of their answer.
type holding struct{ before, after chan struct{} }

func newFront(t testing.TB, server *realollama.Server) *front {
	f := &front{holds: map[string]*holding{}}
	target, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	forward := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target) },
		FlushInterval: -1,
		ModifyResponse: func(res *http.Response) error {
			if hold := f.held(res.Request.Context()); hold != nil {
				res.Body = &pausing{res.Body, res.Request.Context(), hold.after, false}
			}
			if asked, ok := res.Request.Context().Value(askedKey{}).(string); ok {
				res.Body = &recording{ReadCloser: res.Body, f: f, header: res.Header.Clone()}
				if res.StatusCode == http.StatusOK {
					f.mu.Lock()
					f.answered = append(f.answered, asked)
					f.mu.Unlock()
				}
			}
			return nil
		},
	}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Without this, answers that come quickly are broken off: see docs/overhead.md.
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		f.serve(w, r, forward)
	}))
	t.Cleanup(f.Close)
	return f
}

type (
	holdKey  struct{}
	askedKey struct{}
)

func (f *front) held(ctx context.Context) *holding {
	hold, _ := ctx.Value(holdKey{}).(*holding)
	return hold
}

func (f *front) serve(w http.ResponseWriter, r *http.Request, forward http.Handler) {
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if r.URL.Path == "/api/tags" {
			f.lists++
		}
	}()
	if !slices.Contains(textPaths, r.URL.Path) {
		forward.ServeHTTP(w, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if promptless(r.URL.Path, body) {
		forward.ServeHTTP(w, r)
		return
	}
	asked := fmt.Sprintf("%s %s", r.URL.Path, body)
	r = r.WithContext(context.WithValue(r.Context(), askedKey{}, asked))
	f.mu.Lock()
	f.asked = append(f.asked, asked)
	var hold *holding
	for word, h := range f.holds {
		if bytes.Contains(body, []byte(word)) {
			hold = h
		}
	}
	f.mu.Unlock()
	if hold != nil {
		select {
		case <-hold.before:
		case <-r.Context().Done():
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), holdKey{}, hold))
	}
	forward.ServeHTTP(w, r) // panics if the answer breaks off
	if r.Context().Err() == nil {
		f.mu.Lock()
		f.whole++
		f.mu.Unlock()
	}
}

// promptless reports whether a request has nothing computed. The proxy sends such requests to keep
// models loaded (touches), at times that no test knows.
func promptless(path string, body []byte) bool {
	var r struct{ Prompt string }
	return path == "/api/generate" && json.Unmarshal(body, &r) == nil && r.Prompt == ""
}

// hold makes requests with a word in them wait until the channels that it returns are closed.
func (f *front) hold(word string) *holding {
	h := &holding{make(chan struct{}), make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holds[word] = h
	return h
}

// computed returns what was asked for since the last call.
func (f *front) computed() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	asked := f.asked
	f.asked, f.answered = nil, nil
	return asked
}

// answers returns what was answered with status 200 since the last call of computed.
func (f *front) answers() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.answered
}

func (f *front) count() (whole, lists int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.whole, f.lists
}

// pausing is an answer that pauses after its first part.
type pausing struct {
	io.ReadCloser
	ctx   context.Context
	until <-chan struct{}
	begun bool
}

func (p *pausing) Read(b []byte) (int, error) {
	if p.begun {
		select {
		case <-p.until:
		case <-p.ctx.Done():
			return 0, p.ctx.Err()
		}
	} else {
		b = b[:min(len(b), 40)] // less than a line
	}
	p.begun = true
	return p.ReadCloser.Read(b)
}

// last returns the answer of Ollama that was the last one to end.
func (f *front) last() reply {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.answer
}

// recording notes an answer of Ollama when it has ended.
type recording struct {
	io.ReadCloser
	f      *front
	header http.Header
	text   []byte
}

func (r *recording) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	r.text = append(r.text, b[:n]...)
	if err != nil {
		r.f.mu.Lock()
		defer r.f.mu.Unlock()
		r.f.answer = reply{header: r.header, body: string(r.text), err: err}
	}
	return n, err
}

// reply is an answer as it came over the wire.
type reply struct {
	status   int
	header   http.Header
	length   int64
	encoding []string // Transfer-Encoding
	body     string
	err      error // of reading the body
}

func (r reply) hit() bool { return strings.Contains(r.header.Get("Cache-Status"), "; hit") }

// same tells how an answer differs from another in what a client may see, but for the headers that
// tell of the proxy's work.
func (r reply) same(other reply) error {
	plain := func(h http.Header) string {
		var b strings.Builder
		names := []string{}
		for name := range h {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			if !slices.Contains([]string{"Cache-Status", "Age", "Date", "Server-Timing"}, name) &&
				!strings.HasPrefix(name, "X-Cacheproxy-") {
				fmt.Fprintf(&b, "%s: %q\n", name, h[name])
			}
		}
		return b.String()
	}
	a, b := plain(r.header), plain(other.header)
	switch {
	case r.status != other.status:
		return fmt.Errorf("status %d and %d", r.status, other.status)
	case a != b:
		return fmt.Errorf("header\n%sand\n%s", a, b)
	case r.length != other.length || !slices.Equal(r.encoding, other.encoding):
		return fmt.Errorf("framing %d %v and %d %v", r.length, r.encoding, other.length, other.encoding)
	case r.body != other.body:
		return fmt.Errorf("body\n%s\nand\n%s", r.body, other.body)
	}
	return nil
}

// plainClient decodes nothing, and makes a connection for each request.
func plainClient(t testing.TB) *http.Client {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: longest}
}

// request sends a request with headers, each a name and a value, and reads the answer.
func request(ctx context.Context, client *http.Client, method, url, body string, headers ...string) reply {
	res, err := open(ctx, client, method, url, body, headers...)
	if err != nil {
		return reply{err: err}
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, res.ContentLength, res.TransferEncoding, string(text), err}
}

func open(
	ctx context.Context, client *http.Client, method, url, body string, headers ...string,
) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	for pair := range slices.Chunk(headers, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	return client.Do(req)
}

// asks posts to a server, and fails the test without a whole answer of status 200.
func asks(t testing.TB, url, body string, headers ...string) reply {
	t.Helper()
	r := request(t.Context(), plainClient(t), http.MethodPost, url, body, headers...)
	if r.err != nil || r.status != http.StatusOK {
		t.Fatalf("POST %s %s: %d %s %v", url, body, r.status, r.body, r.err)
	}
	return r
}

// kept waits until a request's answer is kept, and returns it.
func kept(t testing.TB, url, body string, headers ...string) (r reply) {
	t.Helper()
	client := plainClient(t)
	settles(t, func() error {
		all := append([]string{"Cache-Control", "only-if-cached"}, headers...)
		r = request(t.Context(), client, http.MethodPost, url, body, all...)
		if r.err != nil || r.status != http.StatusOK {
			return fmt.Errorf("not kept: POST %s %s: %d %s %v", url, body, r.status, r.body, r.err)
		}
		return nil
	})
	if !r.hit() {
		t.Errorf("POST %s %s: %v", url, body, r.header)
	}
	return r
}

// unkept fails if there is a kept answer.
func unkept(t testing.TB, url, body string, headers ...string) {
	t.Helper()
	all := append([]string{"Cache-Control", "only-if-cached"}, headers...)
	r := request(t.Context(), plainClient(t), http.MethodPost, url, body, all...)
	if r.status != http.StatusGatewayTimeout {
		t.Errorf("POST %s %s: want no kept answer: %d %v %s", url, body, r.status, r.header, r.body)
	}
}
