package proxy

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// brittle dials connections; the first breaks at its second request, before a byte of that is
// written.
type brittle struct {
	net.Dialer
	dialed atomic.Int32
}

func (b *brittle) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := b.DialContext(ctx, network, addr)
	if err == nil && b.dialed.Add(1) == 1 {
		return &breaking{Conn: c}, nil
	}
	return c, err
}

type breaking struct {
	net.Conn
	mu     sync.Mutex
	broken bool // guarded by mu
}

func (c *breaking) breakNow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.broken = true
}

func (c *breaking) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		return 0, &net.OpError{Op: "write", Net: "tcp", Err: syscall.EPIPE}
	}
	return c.Conn.Write(p)
}

// TestRetryNothingWritten: a kept connection turns out to be dead before a byte of a request was
// written on it. The request is sent again on a new one, with the same bytes and the edit, and the
// client notices nothing.
func TestRetryNothingWritten(t *testing.T) {
	for _, tt := range []struct{ path, in, want string }{
		{"/api/chat", `{"model":"m","prompt":"x"}`, `{"keep_alive":` + day + `,"model":"m","prompt":"x"}`},
		{"/api/generate", `{"model":"m","keep_alive":null}`, `{"model":"m","keep_alive":` + day + `}`},
		{"/v1/chat/completions", `{"model":"m","x":"` + strings.Repeat("y", 300<<10) + `"}`, ``},
		{"/api/embed", `not JSON`, ``},
	} {
		t.Run(tt.path, func(t *testing.T) {
			f := newFake(t, okAnswer)
			var first *breaking
			b := &brittle{}
			transport := NewTransport()
			transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := b.dial(ctx, network, addr)
				if c, ok := c.(*breaking); ok {
					first = c
				}
				return c, err
			}
			rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), Transport: transport})
			rg.do("GET", "/api/version", "")
			f.next()
			rg.ended()
			first.breakNow()
			if tt.want == "" {
				tt.want = tt.in
			}
			res, _ := rg.post(tt.path, tt.in)
			got := f.next()
			if res.StatusCode != 200 || string(got.body) != tt.want || got.value("Content-Length") != fmt.Sprint(len(tt.want)) {
				t.Errorf("%d: went as %.200s, want %.200s", res.StatusCode, got.body, tt.want)
			}
			f.none()
			if n := b.dialed.Load(); n != 2 {
				t.Errorf("%d connections, want 2", n)
			}
			if ex := rg.ended(); ex.Outcome != OK {
				t.Errorf("told as %+v", ex)
			}
		})
	}
}

// TestNoResend: the upstream has read a POST, or may have, when its connection ends. The request
// must not run twice: the client gets an error, and decides. That also holds for kept connections,
// and whatever headers a client sends.
func TestNoResend(t *testing.T) {
	for _, path := range []string{"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages", "/api/embed", "/api/pull", "/api/blobs/sha256:00"} {
		for _, header := range []string{"X-None: 1", "Idempotency-Key: abc", "X-Idempotency-Key: abc", "X-Stainless-Retry-Count: 1"} {
			for _, kept := range []bool{false, true} {
				for how, end := range map[string]func(*fakeConn){"FIN": func(c *fakeConn) { c.Close() }, "RST": (*fakeConn).reset} {
					t.Run(fmt.Sprint(path, header, kept, how), func(t *testing.T) {
						f := newFake(t, nil)
						rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
						client := rg.dial()
						var up *fakeConn
						if kept {
							client.send("GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
							up = f.accept()
							up.receive()
							up.send(answer(200, "a/b", "{}"))
							client.receive()
							rg.ended()
						}
						client.send(rawPost(path, `{"model":"m"}`, header))
						if up == nil {
							up = f.accept()
						}
						up.receive()
						end(up)
						// Either the client's answer comes, or a second connection with the same
						// request.
						again := make(chan string, 1)
						go func() { // ends with the listener
							conn, err := f.ln.Accept()
							if err != nil {
								return
							}
							defer conn.Close()
							c := &fakeConn{Conn: conn, br: newReader(conn)}
							r, _ := c.head()
							again <- r.line
							fmt.Fprint(conn, answer(200, "a/b", "{}"))
						}()
						got := client.receive()
						select {
						case line := <-again:
							t.Errorf("sent again: %s", line)
						default:
							if !strings.HasPrefix(got.line, "HTTP/1.1 502 ") {
								t.Errorf("the client got %s", got.line)
							}
						}
						f.ln.Close()
					})
				}
			}
		}
	}
}

// TestUpstreamReboots: the upstream goes away and comes back between two requests, at the same
// address.
func TestUpstreamReboots(t *testing.T) {
	f := newFake(t, nil)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	client := rg.dial()
	for i := range 5 {
		body := fmt.Sprintf(`{"model":"m%d"}`, i)
		client.send(rawPost("/api/chat", body))
		up := f.accept()
		if got := up.receive(); string(got.body) != `{"keep_alive":`+day+`,`+body[1:] {
			t.Errorf("went as %s", got.body)
		}
		up.send(answer(200, "a/b", "{}"))
		if got := client.receive(); got.line != "HTTP/1.1 200 OK" {
			t.Errorf("got %s", got.line)
		}
		up.Close()
		rg.h.Transport.(interface{ CloseIdleConnections() }).CloseIdleConnections() // as if it had noticed
	}
}
