package proxy

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestClientGone: the client disconnects at each stage. The upstream's connection ends at once, and
// the outcome is reported as the client's doing.
func TestClientGone(t *testing.T) {
	stages := map[string]func(t *testing.T, client, up *fakeConn){
		"before the headers": func(t *testing.T, client, up *fakeConn) {},
		"after the headers": func(t *testing.T, client, up *fakeConn) {
			up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			client.mustHead()
		},
		"in the stream": func(t *testing.T, client, up *fakeConn) {
			up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			client.mustHead()
			for range 3 {
				up.chunk("{\"response\":\"x\"}\n")
				client.mustChunk()
			}
		},
		"in an answer with a length": func(t *testing.T, client, up *fakeConn) {
			up.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
			client.mustHead()
		},
		"after 103": func(t *testing.T, client, up *fakeConn) {
			up.send("HTTP/1.1 103 Early Hints\r\n\r\n")
			client.mustHead()
		},
	}
	requests := map[string]string{
		"streaming":    rawPost("/api/chat", `{"model":"m"}`),
		"not":          rawPost("/api/generate", `{"model":"m","stream":false}`),
		"openai":       rawPost("/v1/chat/completions", `{"model":"m","stream":true}`),
		"anthropic":    rawPost("/v1/messages", `{"model":"m"}`),
		"embed":        rawPost("/api/embed", `{"model":"m","input":["a"]}`),
		"pull":         rawPost("/api/pull", `{"model":"m"}`),
		"passed along": "GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n",
	}
	for stage, play := range stages {
		for name, request := range requests {
			for how, leave := range map[string]func(*fakeConn){"FIN": func(c *fakeConn) { c.Close() }, "RST": (*fakeConn).reset} {
				t.Run(stage+"/"+name+"/"+how, func(t *testing.T) {
					f := newFake(t, nil)
					rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
					rg.h.lingers = 0
					client := rg.dial()
					client.send(request)
					up := f.accept()
					up.receive()
					play(t, client, up)
					leave(client)
					up.closed()
					if ex := rg.ended(); ex.Outcome != ClientGone {
						t.Errorf("told as %+v", ex)
					}
					if n := rg.h.InFlight(); n != 0 {
						t.Errorf("%d requests in flight", n)
					}
				})
			}
		}
	}
}

// TestClientGoneWhileSending: the client leaves in the middle of its own request. That must never
// look like a fault of the upstream or the operator. A body that is held until it is complete never
// reaches the upstream.
func TestClientGoneWhileSending(t *testing.T) {
	for name, tt := range map[string]struct {
		head, part string
		passes     bool
	}{
		"chat with a length":   {"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", `{"model":"m","pro`, false},
		"chat in chunks":       {"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", "5\r\n{\"mod\r\n", false},
		"chat within a chunk":  {"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", "ff\r\n{\"mod", false},
		"blob with a length":   {"POST /api/blobs/sha256:00 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", "GGUF", true},
		"blob in chunks":       {"POST /api/blobs/sha256:00 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", "4\r\nGGUF\r\n", true},
		"longer than MaxBody":  {"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n", `{"model":"m","x":"` + strings.Repeat("x", 3000), true},
		"compressed and known": {"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: zstd\r\nContent-Length: 1000\r\n\r\n", "\x28\xb5\x2f\xfd", false},
	} {
		for how, leave := range map[string]func(*fakeConn){"FIN": func(c *fakeConn) { c.Close() }, "RST": (*fakeConn).reset} {
			t.Run(name+"/"+how, func(t *testing.T) {
				f := newFake(t, nil)
				rg := newRig(t, f.URL, &Handler{MaxBody: 2000})
				client := rg.dial()
				client.send(tt.head + tt.part)
				if tt.passes {
					up := f.accept()
					up.mustHead()
					if b, err := up.br.ReadByte(); err != nil || b == 0 { // the first bytes are there before the last are sent
						t.Fatal(b, err)
					}
					leave(client)
					up.closed()
				} else {
					leave(client)
				}
				if ex := rg.ended(); ex.Outcome != ClientGone {
					t.Errorf("told as %+v", ex)
				}
			})
		}
	}
}

// TestHalfClosed: a client that shuts its sending side after the request gets its answer, except
// where Ollama itself takes that for a disconnected client.
func TestHalfClosed(t *testing.T) {
	const name = `{"model":"m"}`
	get := func(target string) string { return target + " HTTP/1.1\r\nHost: localhost\r\n\r\n" }
	for request, answered := range map[string]bool{
		get("GET /api/tags"): true, get("GET /"): true, get("HEAD /"): true, get("GET /v1/models"): true, get("GET /api/ps"): true, get("GET /v1/models/m"): true, get("GET /api/version"): true, get("GET /new"): true,
		get("HEAD /api/blobs/sha256:00"): true, get("POST /api/me"): true, rawPost("/api/show", name): true, rawPost("/api/copy", name): true, "DELETE" + strings.TrimPrefix(rawPost("/api/delete", name), "POST"): true,
		"POST /api/show HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n" + name + "\r\n0\r\n\r\n": true,
		"GET /api/tags HTTP/1.0\r\n\r\n": true,
		rawPost("/api/chat", name):       false, rawPost("/v1/chat/completions", name): false, rawPost("/api/embed", name): false, rawPost("/api/pull", name): false, rawPost("/api/create", name): false, rawPost("/new", name): false,
	} {
		for _, upstreams := range []int{1, 2} {
			seen := make(chan struct{})
			f := newFake(t, func(r received) string {
				<-seen // the answer comes when the client's end has come
				if strings.HasPrefix(r.line, "HEAD") {
					return "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
				}
				return answer(200, "application/json", `{"models":[],"data":[]}`)
			})
			ups := map[string]*url.URL{"up": f.URL}
			if upstreams == 2 {
				ups["up2"] = newFake(t, okAnswer).URL
			}
			rg := newRigOf(t, &Handler{}, ups)
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if answered {
					context.AfterFunc(r.Context(), func() { close(seen) })
				}
				rg.h.ServeHTTP(w, r)
			}))
			rg.srv = srv
			client := rg.dial()
			client.send(request)
			if err := client.Conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			got := client.closed()
			if ok := strings.Contains(got, " 200 OK\r\n"); ok != answered {
				t.Errorf("%.60q of %d: %q", request, upstreams, got)
			}
			want := ClientGone
			if answered {
				want = OK
			}
			if ex := rg.ended(); ex.Outcome != want {
				t.Errorf("%.60q told as %+v", request, ex)
			}
			if !answered {
				close(seen)
			}
			srv.Close()
		}
	}
}

// TestLingers: the proxy waits only a limited time for a client that has left for good.
func TestLingers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, leave := context.WithCancel(t.Context())
		longer, end := outlive(ctx, nil, lingers)
		leave()
		time.Sleep(lingers - 1)
		synctest.Wait()
		if longer.Err() != nil {
			t.Error("it ended too early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if longer.Err() == nil {
			t.Error("it goes on")
		}
		end()
		for cause, want := range map[error]error{ErrDrained: ErrDrained, nil: context.Canceled} {
			ctx, cut := context.WithCancelCause(t.Context())
			longer, end := outlive(ctx, nil, lingers)
			cut(cause)
			synctest.Wait()
			if got := longer.Err() != nil; got != (cause != nil) {
				t.Errorf("%v: ended is %v", cause, got)
			}
			end() // nothing is left of it
			synctest.Wait()
			if got := context.Cause(longer); got != want {
				t.Errorf("%v: it ended by %v", cause, got)
			}
		}
	})
}

// TestCutOff: the server's own context ends, as at the end of a drain. A client that is still
// connected must not take the result for an answer: a 200 without a body would mean success.
func TestCutOff(t *testing.T) {
	for _, stage := range []string{"before the headers", "in the stream"} {
		t.Run(stage, func(t *testing.T) {
			f := newFake(t, nil)
			rg := newRig(t, f.URL, &Handler{})
			base, cut := context.WithCancel(t.Context())
			defer cut()
			srv := httptest.NewUnstartedServer(rg.h)
			srv.Config.BaseContext = func(net.Listener) context.Context { return base }
			srv.Start()
			defer srv.Close()
			rg.srv = srv
			client := rg.dial()
			client.send(rawPost("/api/chat", `{"model":"m"}`))
			up := f.accept()
			up.receive()
			if stage == "in the stream" {
				up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
				client.mustHead()
			}
			cut()
			up.closed()
			rg.ended()
			client.SetDeadline(time.Now().Add(patience))
			srv.CloseClientConnections()
			got := client.closed()
			if strings.HasPrefix(got, "HTTP/1.1 200") || strings.HasSuffix(got, "0\r\n\r\n") {
				t.Errorf("the client was told %q", got)
			}
		})
	}
}

// TestManyClientsLeave: nothing is left behind when many clients leave at once.
func TestManyClientsLeave(t *testing.T) {
	f := newFake(t, nil)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	var ups []*fakeConn
	var clients []*fakeConn
	for range 50 {
		c := rg.dial()
		c.send(rawPost("/v1/chat/completions", `{"model":"m"}`))
		clients = append(clients, c)
		up := f.accept()
		up.receive()
		ups = append(ups, up)
	}
	if n := rg.h.InFlight(); n != 50 {
		t.Errorf("%d in flight, want 50", n)
	}
	var wg sync.WaitGroup
	for _, c := range clients {
		wg.Go(func() { c.Close() })
	}
	for _, up := range ups {
		up.closed()
	}
	wg.Wait()
	for range 50 {
		if ex := rg.ended(); ex.Outcome != ClientGone {
			t.Errorf("told as %+v", ex)
		}
	}
	if n := rg.h.InFlight(); n != 0 {
		t.Errorf("%d in flight at the end", n)
	}
}

// TestPipelinedClient: a client that has already sent its next request is not gone.
func TestPipelinedClient(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{})
	client := rg.dial()
	client.send(rawPost("/api/chat", `{"model":"a"}`) + rawPost("/api/chat", `{"model":"b"}`) + "GET /api/tags HTTP/1.1\r\nHost: x.local\r\n\r\n")
	for range 3 {
		if got := client.receive(); got.line != "HTTP/1.1 200 OK" || string(got.body) != `{"done":true}` {
			t.Errorf("got %+v", got)
		}
		if ex := rg.ended(); ex.Outcome != OK || ex.Status != http.StatusOK {
			t.Errorf("told as %+v", ex)
		}
	}
}
