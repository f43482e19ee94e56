package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// pipeListener provides connections without sockets, for which time is virtual.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l pipeListener) Close() error   { close(l.closed); return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

func (l pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	l.conns <- server
	return client
}

// inVirtualTime serves h as the program does, in a synctest bubble.
func inVirtualTime(t *testing.T, h http.Handler, test func(*testing.T, pipeListener)) {
	synctest.Test(t, func(t *testing.T) {
		ln := pipeListener{make(chan net.Conn), make(chan struct{})}
		srv := newServer(t.Context(), h, slog.New(slog.DiscardHandler))
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }() // ends with Close
		defer func() {
			srv.Close()
			if err := <-served; !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
		}()
		test(t, ln)
	})
}

// TestIdleConnections: a connection is closed 120 s after its last answer, or 30 s after it began
// without sending a header.
func TestIdleConnections(t *testing.T) {
	hello := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") })
	inVirtualTime(t, hello, func(t *testing.T, ln pipeListener) {
		for send, want := range map[string]time.Duration{"": headerTimeout, "GET / HT": headerTimeout, "GET / HTTP/1.1\r\nHost: x\r\n\r\n": 120 * time.Second} {
			c := ln.dial()
			io.WriteString(c, send)
			if strings.HasSuffix(send, "\n") {
				res, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil || res.ContentLength != 5 {
					t.Fatal(res, err)
				}
				io.ReadFull(res.Body, make([]byte, 5))
			}
			began := time.Now()
			io.Copy(io.Discard, c) // a 408 answers an incomplete header
			if d := time.Since(began); d != want {
				t.Errorf("after %q the connection is closed in %v, want %v", send, d, want)
			}
		}
	})
}

// TestLongHeader: a header of up to 64 KiB is accepted, a longer one is refused.
func TestLongHeader(t *testing.T) {
	hello := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Connection", "close") })
	inVirtualTime(t, hello, func(t *testing.T, ln pipeListener) {
		const begin, end = "GET / HTTP/1.1\r\nHost: x\r\nA: ", "\r\n\r\n"
		for size, want := range map[int]int{64 << 10: 200, 64<<10 + 1: 431, 1 << 20: 431} {
			c := ln.dial()
			go io.WriteString(c, begin+strings.Repeat("a", size-len(begin+end))+end) // ends with the connection
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || res.StatusCode != want {
				t.Errorf("a header of %d bytes: %v, %v; want %d", size, res, err, want)
			}
			io.Copy(io.Discard, c)
		}
	})
}

// stuckBodies are requests with bodies that stop half way.
func stuckBodies() map[string]string {
	const begin = `{"model":"m","messages":[{"role":"user","content":"`
	bodies := map[string]string{}
	for _, path := range []string{"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages", "/api/show", "/api/blobs/sha256-0", "/_cacheproxy/health"} {
		post := "POST " + path + " HTTP/1.1\r\nHost: localhost\r\n"
		bodies[path+", announced"] = post + "Content-Length: 1000\r\n\r\n" + begin
		bodies[path+", chunked"] = post + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", len(begin), begin)
		bodies[path+", encoded"] = post + "Content-Encoding: x\r\nContent-Length: 1000\r\n\r\n" + begin
	}
	return bodies
}

// TestStuckBodies: a body without progress for --body-timeout ends with 408 and the end of the
// connection. One that makes progress within each such time may take for ever.
func TestStuckBodies(t *testing.T) {
	const limit = time.Minute
	server := func() *proxy.Handler {
		u, err := upstream.ParseAddr("127.0.0.1:1", "")
		if err != nil {
			t.Fatal(err)
		}
		h := &proxy.Handler{Upstreams: []*upstream.Server{upstream.NewServer("u", u, nil, slog.New(slog.DiscardHandler))}, Transport: readsAll{}, BodyTimeout: limit}
		h.Init()
		return h
	}
	for name, request := range stuckBodies() {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, server(), func(t *testing.T, ln pipeListener) {
				c := ln.dial()
				io.WriteString(c, request)
				began := time.Now()
				res, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil {
					t.Fatal(err)
				}
				own := strings.Contains(name, "_cacheproxy") // answered before its body is read
				if d := time.Since(began); !own && (res.StatusCode != http.StatusRequestTimeout || d != limit || !res.Close) {
					t.Errorf("%v after %v, connection closed %v", res.Status, d, res.Close)
				}
				io.Copy(io.Discard, res.Body)
				io.Copy(io.Discard, c)
				if d := time.Since(began); d > 2*limit {
					t.Errorf("the connection is closed after %v", d)
				}
			})
		})
	}
	t.Run("slow but alive", func(t *testing.T) {
		inVirtualTime(t, server(), func(t *testing.T, ln pipeListener) {
			c := ln.dial()
			const body = `{"model":"m","messages":[]}`
			fmt.Fprintf(c, "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n", len(body))
			for i := range len(body) {
				time.Sleep(limit - time.Second)
				io.WriteString(c, body[i:i+1])
			}
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || res.StatusCode != http.StatusOK {
				t.Errorf("%v, %v", res, err)
			}
			c.Close()
		})
	})
}

// readsAll is an upstream that reads the body and answers.
type readsAll struct{}

func (readsAll) RoundTrip(r *http.Request) (*http.Response, error) {
	defer r.Body.Close()
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: 200, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: r, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("{}")), ContentLength: 2}, nil
}

// recorded answers requests without a connection, as stubOllama does.
type recorded struct{}

func (recorded) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	if r.Body == nil {
		r.Body = http.NoBody
	}
	stubOllama(w, r)
	res := w.Result()
	res.Request = r
	return res, nil
}

// TestDrainDelay: for --drain-delay after it was told to stop, the proxy serves requests but is not
// ready, and each connection ends with its next answer. If the listener fails meanwhile, that is the
// end.
func TestDrainDelay(t *testing.T) {
	const delay = 7 * time.Second
	log := slog.New(slog.DiscardHandler)
	u, err := upstream.ParseAddr("127.0.0.1", upstream.DefaultPort)
	if err != nil {
		t.Fatal(err)
	}
	up := upstream.NewServer("u", u, recorded{}, log)
	h := &proxy.Handler{Upstreams: []*upstream.Server{up}, Transport: recorded{}}
	h.Init()
	inVirtualTime(t, h, func(t *testing.T, ln pipeListener) {
		up.Poll(t.Context())
		ask := func(c net.Conn, page string, status int, closes bool) {
			t.Helper()
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", page)
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != status || res.Close != closes {
				t.Errorf("%s: %d %s, closes: %v, %v; want %d, closes: %v", page, res.StatusCode, text, res.Close, err, status, closes)
			}
		}
		kept := ln.dial()
		ask(kept, "/_cacheproxy/ready", 200, false)
		left, served := make(chan error, 1), make(chan error, 1)
		began := time.Now()
		go func() { // ends with the delay
			left <- (&serveCmd{DrainDelay: delay}).leave(h, served, log)
		}()
		synctest.Wait()
		ask(ln.dial(), "/_cacheproxy/ready", 503, true)
		ask(ln.dial(), "/_cacheproxy/health", 200, true)
		ask(kept, "/api/version", 200, true)
		if n, err := kept.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the connection goes on: %d, %v", n, err)
		}
		if err := <-left; err != nil || time.Since(began) != delay {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		served <- io.ErrUnexpectedEOF
		if err := (&serveCmd{DrainDelay: delay}).leave(h, served, log); err != io.ErrUnexpectedEOF {
			t.Errorf("the listener failed: %v", err)
		}
	})
}
