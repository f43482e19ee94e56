package proxy

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is the timeout of every wait in these tests. Nothing is measured with it: a passing test
// never uses it up.
const patience = 30 * time.Second

var noDeadline time.Time

// received is a request as it came over the wire.
type received struct {
	line    string   // the request line
	headers []string // the header lines, in order, as they came
	body    []byte   // unchunked
	chunked bool
	trailer []string
}

// values returns the values of all header lines of this name; the spelling must match.
func (r received) values(name string) []string {
	var vs []string
	for _, h := range r.headers {
		if k, v, _ := strings.Cut(h, ":"); k == name {
			vs = append(vs, strings.TrimSpace(v))
		}
	}
	return vs
}

func (r received) value(name string) string { return strings.Join(r.values(name), "|") }

// fakeConn is one connection that a test reads and writes by hand: the upstream's end or a
// client's.
type fakeConn struct {
	net.Conn
	t  *testing.T
	br *bufio.Reader
}

func newFakeConn(t *testing.T, c net.Conn) *fakeConn {
	c.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { c.Close() })
	return &fakeConn{Conn: c, t: t, br: newReader(c)}
}

// send writes the bytes in one write.
func (c *fakeConn) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		c.t.Fatalf("writing %.80q: %v", s, err)
	}
}

// chunk writes one chunk.
func (c *fakeConn) chunk(s string) {
	c.t.Helper()
	c.send(fmt.Sprintf("%x\r\n%s\r\n", len(s), s))
}

// head reads a request line, or a status line, and the header lines up to the empty line.
func (c *fakeConn) head() (received, error) {
	var r received
	for {
		line, err := c.br.ReadString('\n')
		if err != nil {
			return r, err
		}
		line = strings.TrimSuffix(line, "\r\n")
		switch {
		case line == "" && r.line != "":
			for _, v := range r.values("Transfer-Encoding") {
				r.chunked = v == "chunked"
			}
			return r, nil
		case r.line == "":
			r.line = line
		default:
			r.headers = append(r.headers, line)
		}
	}
}

// nextChunk reads one chunk as it was framed; "" is the last one.
func (c *fakeConn) nextChunk() (string, error) {
	size, err := c.br.ReadString('\n')
	if err != nil {
		return "", err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(size), 16, 32)
	if err != nil {
		return "", err
	}
	if n == 0 {
		return "", nil
	}
	data := make([]byte, n+2)
	if _, err := io.ReadFull(c.br, data); err != nil {
		return "", err
	}
	return string(data[:n]), nil
}

// rest reads the body that follows a head.
func (c *fakeConn) rest(r *received) error {
	if !r.chunked {
		n, _ := strconv.Atoi(r.value("Content-Length"))
		r.body = make([]byte, n)
		_, err := io.ReadFull(c.br, r.body)
		return err
	}
	for {
		data, err := c.nextChunk()
		if err != nil {
			return err
		}
		if data == "" {
			break
		}
		r.body = append(r.body, data...)
	}
	for {
		line, err := c.br.ReadString('\n')
		if err != nil {
			return err
		}
		if line == "\r\n" {
			return nil
		}
		r.trailer = append(r.trailer, strings.TrimSuffix(line, "\r\n"))
	}
}

// receive reads a whole request, or answer.
func (c *fakeConn) receive() received {
	c.t.Helper()
	r, err := c.head()
	if err == nil {
		err = c.rest(&r)
	}
	if err != nil {
		c.t.Fatalf("reading a message: %v (so far: %q)", err, r.line)
	}
	return r
}

// mustHead is head, but fails the test on an error.
func (c *fakeConn) mustHead() received {
	c.t.Helper()
	r, err := c.head()
	if err != nil {
		c.t.Fatalf("reading a head: %v", err)
	}
	return r
}

// mustChunk is nextChunk, but fails the test on an error.
func (c *fakeConn) mustChunk() string {
	c.t.Helper()
	s, err := c.nextChunk()
	if err != nil {
		c.t.Fatalf("reading a chunk: %v", err)
	}
	return s
}

func newReader(c net.Conn) *bufio.Reader { return bufio.NewReaderSize(c, 256<<10) }

// closed waits until the other side has ended the connection, and returns what it sent meanwhile.
func (c *fakeConn) closed() string {
	c.t.Helper()
	data, err := io.ReadAll(c.br)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatal("the connection is still open")
	}
	return string(data)
}

// reset ends the connection with a TCP RST.
func (c *fakeConn) reset() {
	c.Conn.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// fake is a scripted upstream. Without an answer function the test accepts its connections itself.
type fake struct {
	t    *testing.T
	ln   *net.TCPListener
	URL  *url.URL
	reqs chan received // requests to the answer function
}

// newFake listens. answer gives the bytes of the answer to each request; nil leaves all to the test.
func newFake(t *testing.T, answer func(received) string) *fake {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t, ln: ln.(*net.TCPListener), reqs: make(chan received, 4096)}
	f.URL = &url.URL{Scheme: "http", Host: ln.Addr().String()}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	if answer == nil {
		f.ln.SetDeadline(time.Now().Add(patience))
		return f
	}
	serve := func(conn net.Conn) {
		c := &fakeConn{Conn: conn, br: bufio.NewReaderSize(conn, 64<<10)}
		for {
			r, err := c.head()
			if err == nil {
				err = c.rest(&r)
			}
			if err != nil {
				return
			}
			f.reqs <- r
			text := answer(r)
			if strings.HasPrefix(r.line, "HEAD ") { // a body would be taken for the next answer's beginning
				head, _, _ := strings.Cut(text, "\r\n\r\n")
				text = head + "\r\n\r\n"
			}
			if _, err := io.WriteString(conn, text); err != nil {
				return
			}
		}
	}
	wg.Go(func() { // ends with ln.Close
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			wg.Go(func() { defer conn.Close(); serve(conn) }) // ends with conn.Close
		}
	})
	return f
}

// refusing returns the address of an upstream that refuses connections.
func refusing(t *testing.T) *url.URL {
	t.Helper()
	return &url.URL{Scheme: "http", Host: reserve(t)}
}

// accept waits for the proxy's next connection.
func (f *fake) accept() *fakeConn {
	f.t.Helper()
	c, err := f.ln.Accept()
	if err != nil {
		f.t.Fatalf("the proxy made no connection: %v", err)
	}
	return newFakeConn(f.t, c)
}

// next waits for the next request that was answered.
func (f *fake) next() received {
	f.t.Helper()
	select {
	case r := <-f.reqs:
		return r
	case <-time.After(patience):
		f.t.Fatal("the upstream got no request")
		panic("unreachable")
	}
}

// none fails if the upstream got a request that the test has not taken.
func (f *fake) none() {
	f.t.Helper()
	select {
	case r := <-f.reqs:
		f.t.Fatalf("the upstream got a request too many: %s", r.line)
	default:
	}
}

// answer writes an answer with a Content-Length.
func answer(status int, contentType, body string) string {
	return fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", status, http.StatusText(status), contentType, len(body), body)
}

// okAnswer answers everything like a finished generation.
func okAnswer(r received) string {
	if strings.HasPrefix(r.line, http.MethodHead) { // a body would be read as the next answer
		return answer(200, "application/json; charset=utf-8", "")
	}
	return answer(200, "application/json; charset=utf-8", `{"done":true}`)
}

// rig is a proxy under test, served by a real http.Server.
type rig struct {
	t    *testing.T
	h    *Handler
	srv  *httptest.Server
	URL  string
	http *http.Client
	log  *logBuffer
	done chan Exchange
}

// newRig serves h in front of up.
func newRig(t *testing.T, up *url.URL, h *Handler) *rig {
	t.Helper()
	return newRigOf(t, h, map[string]*url.URL{"up": up})
}

// newRigOf serves h in front of several upstreams, in the order of their names.
func newRigOf(t *testing.T, h *Handler, ups map[string]*url.URL) *rig {
	t.Helper()
	rg := &rig{t: t, h: h, log: &logBuffer{}, done: make(chan Exchange, 4096)}
	h.Log = slog.New(slog.NewJSONHandler(rg.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	transport, ok := h.Transport.(*http.Transport)
	if h.Transport == nil {
		transport, ok = NewTransport(), true
		h.Transport = transport
	}
	for _, name := range slices.Sorted(maps.Keys(ups)) {
		server := upstream.NewServer(name, ups[name], h.Transport, h.Log)
		server.Polled = func(st upstream.State) { h.Polled(server, st) }
		h.Upstreams = append(h.Upstreams, server)
	}
	h.Done = func(ex Exchange) { rg.done <- ex }
	h.Ledger = savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 10000, Bytes: 1 << 24}), 100)
	h.Init()
	srv := httptest.NewServer(h)
	rg.srv, rg.URL = srv, srv.URL
	client := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64}
	rg.http = &http.Client{Transport: client, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		srv.CloseClientConnections()
		srv.Close()
		if ok {
			transport.CloseIdleConnections()
		}
	})
	return rg
}

// dial opens a client's connection.
func (rg *rig) dial() *fakeConn {
	rg.t.Helper()
	c, err := net.Dial("tcp", rg.srv.Listener.Addr().String())
	if err != nil {
		rg.t.Fatal(err)
	}
	return newFakeConn(rg.t, c)
}

// do sends a request and reads the whole answer. headers are "Name: value" lines.
func (rg *rig) do(method, path, body string, headers ...string) (*http.Response, string) {
	rg.t.Helper()
	var rd io.Reader
	if body != "" {
		rd = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, rg.URL+path, rd)
	if err != nil {
		rg.t.Fatal(err)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		if k == "Host" {
			req.Host = v
			continue
		}
		req.Header.Add(k, v)
	}
	res, err := rg.http.Do(req)
	if err != nil {
		rg.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		rg.t.Fatalf("%s %s: reading the answer: %v", method, path, err)
	}
	return res, string(got)
}

// post is do for a JSON body.
func (rg *rig) post(path, body string, headers ...string) (*http.Response, string) {
	rg.t.Helper()
	return rg.do("POST", path, body, append([]string{"Content-Type: application/json"}, headers...)...)
}

// ended waits for the next exchange that is over.
func (rg *rig) ended() Exchange {
	rg.t.Helper()
	select {
	case ex := <-rg.done:
		return ex
	case <-time.After(patience):
		rg.t.Fatal("no request ended")
		panic("unreachable")
	}
}

// logBuffer holds what was logged.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// lines returns the JSON log lines with this message.
func (b *logBuffer) lines(t *testing.T, msg string) []map[string]any {
	t.Helper()
	var lines []map[string]any
	for line := range strings.Lines(b.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("log line %q: %v", line, err)
		}
		if m["msg"] == msg {
			lines = append(lines, m)
		}
	}
	return lines
}

// rawPost writes a request with a Content-Length as raw bytes.
func rawPost(path, body string, headers ...string) string {
	return "POST " + path + " HTTP/1.1\r\nHost: localhost\r\n" + lines(headers) + "Content-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body
}

func lines(headers []string) string {
	if len(headers) == 0 {
		return ""
	}
	return strings.Join(headers, "\r\n") + "\r\n"
}

// keep is a KeepAlive with one default.
func keep(t *testing.T, policy KeepAlivePolicy, settings ...string) KeepAlive {
	t.Helper()
	k, err := ParseKeepAlive(policy, settings)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestFakeReadsChunks(t *testing.T) {
	client, server := net.Pipe()
	go func() { // ends with the write
		w := httputil.NewChunkedWriter(server)
		io.WriteString(server, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
		io.WriteString(w, "ab")
		io.WriteString(w, "c")
		w.Close()
		io.WriteString(server, "X-T: 1\r\n\r\n")
		server.Close()
	}()
	got := newFakeConn(t, client).receive()
	if string(got.body) != "abc" || len(got.trailer) != 1 || got.line != "POST / HTTP/1.1" {
		t.Errorf("got %+v", got)
	}
	if textproto.TrimString(got.trailer[0]) != "X-T: 1" {
		t.Errorf("trailer %q", got.trailer)
	}
}
