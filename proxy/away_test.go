package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// mortal is an Ollama server in virtual time that dies and comes back. It takes a second for each request to a model.
type mortal struct {
	mu     sync.Mutex
	death  chan struct{} // closed when it dies; nil: it is dead. Guarded by mu
	open   bool          // when it is dead something accepts connections in its place, and closes them; guarded by mu
	silent bool          // it answers no request to a model; guarded by mu
	serves int           // requests that are begun; guarded by mu
	order  []string      // their bodies, since it came to life; guarded by mu
	body   func(ctx context.Context) io.ReadCloser
}

func (m *mortal) live(on bool) (serves int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	serves = m.serves
	if on {
		m.death, m.order = make(chan struct{}), nil
	} else {
		close(m.death)
		m.death = nil
	}
	return serves
}

func (m *mortal) RoundTrip(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		body, _ = io.ReadAll(r.Body)
		r.Body.Close()
	}
	m.mu.Lock()
	death, open, silent := m.death, m.open, m.silent
	m.mu.Unlock()
	switch {
	case death == nil && open:
		return nil, io.EOF
	case death == nil:
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	text := `{"version":"0.34.1","models":[{"name":"m:latest","digest":"1"}]}`
	answer := io.NopCloser(strings.NewReader(text))
	if r.Method == http.MethodPost && r.URL.Path != "/api/show" && !bytes.Contains(body, []byte(`"keep_alive":0`)) {
		m.mu.Lock()
		m.serves++
		m.order = append(m.order, string(body))
		m.mu.Unlock()
		defer func() { m.mu.Lock(); m.serves--; m.mu.Unlock() }()
		think := time.After(time.Second)
		if silent {
			think = nil
		}
		select {
		case <-think:
		case <-death:
			return nil, io.EOF
		case <-r.Context().Done():
			return nil, context.Cause(r.Context())
		}
		answer = io.NopCloser(strings.NewReader(`{"model":"m","done":true,"prompt_eval_count":9,"eval_count":1}`))
		if m.body != nil {
			answer = m.body(r.Context())
		}
	}
	return &http.Response{StatusCode: 200, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"Content-Type": {"application/json"}}, Body: answer, ContentLength: -1, Request: r}, nil
}

// inTime runs a test with a proxy in front of a mortal server, in virtual time. lanes as schedule.Config.Lanes; -2: no scheduler.
func inTime(t *testing.T, lanes int, try time.Duration, test func(t *testing.T, m *mortal, h *Handler, ask func(path, body string, headers ...string) *asked)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := &mortal{}
		m.live(true)
		h := &Handler{Transport: m, KeepAlive: keep(t, IfAbsent, "24h"), NoTouch: true}
		if lanes != -2 {
			h.Lanes = schedule.NewScheduler(schedule.Config{Lanes: lanes, Limit: 100})
		}
		up := upstream.NewServer("up", &url.URL{Scheme: "http", Host: "ollama:11434"}, m, slog.New(slog.DiscardHandler))
		up.TryDuration = try
		up.Polled = func(st upstream.State) { h.Polled(up, st) }
		h.Upstreams = []*upstream.Server{up}
		h.Ledger = savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 1000, Bytes: 1 << 20}), 100)
		h.Init()
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		up.Poll(ctx)
		wg.Go(func() { up.Run(ctx) })
		test(t, m, h, func(path, body string, headers ...string) *asked {
			a := &asked{ResponseRecorder: httptest.NewRecorder(), began: time.Now(), ended: make(chan struct{})}
			r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
			if body == "" {
				r = httptest.NewRequest(http.MethodGet, path, nil)
			}
			for _, h := range headers {
				k, v, _ := strings.Cut(h, ": ")
				r.Header.Set(k, v)
			}
			r.Host = "localhost"
			// As net/http's server does, so that an answer that breaks off panics.
			r = r.WithContext(context.WithValue(r.Context(), http.ServerContextKey, &http.Server{}))
			wg.Go(func() {
				defer func() {
					a.broke, a.took = recover() != nil, time.Since(a.began)
					close(a.ended)
				}()
				h.ServeHTTP(a, r)
			})
			return a
		})
		stop()
		wg.Wait()
		if h.Waiting() != 0 || h.InFlight() != 0 {
			t.Errorf("at the end %d wait, %d are in flight", h.Waiting(), h.InFlight())
		}
	})
}

// asked is a request, and what became of it, which may be read once it has ended.
type asked struct {
	*httptest.ResponseRecorder
	began time.Time
	took  time.Duration
	broke bool
	ended chan struct{}
}

// count waits until all is quiet and counts statuses: 0 has not ended, -1 broke off.
func count(all []*asked) map[int]int {
	synctest.Wait()
	n := map[int]int{}
	for _, a := range all {
		select {
		case <-a.ended:
			if a.broke {
				n[-1]++
			} else {
				n[a.Code]++
			}
		default:
			n[0]++
		}
	}
	return n
}

// TestRestart: a server that restarts costs the answers that it had begun with, and no other: what waits waits on, and so does what
// comes meanwhile; also where something else accepts connections in its place. What is interactive goes first when it is back.
func TestRestart(t *testing.T) {
	for _, lanes := range []int{-2, schedule.Unlimited, 0, 1, 4} {
		for _, open := range []bool{false, true} {
			t.Run(fmt.Sprint(lanes, open), func(t *testing.T) {
				inTime(t, lanes, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
					m.open = open
					var all []*asked
					for i := range 50 {
						all = append(all, ask("/api/chat", chatWith("s", fmt.Sprint("early", i), ""), headerPriority+": batch"))
					}
					time.Sleep(500 * time.Millisecond)
					begun := m.live(false)
					time.Sleep(time.Second)
					got := count(all)
					if got[502] != begun || got[0] != 50-begun {
						t.Errorf("of 50, %d of them begun, ended meanwhile %v", begun, got)
					}
					if begun == 0 || lanes > 0 && begun != lanes {
						t.Errorf("%d were begun", begun)
					}
					var late []*asked
					for i, path := range []string{"/api/chat", "/v1/chat/completions", "/api/embed", "/api/generate"} {
						late = append(late, ask(path, chatWith("s", fmt.Sprint("late", i), ""), headerPriority+": interactive"))
					}
					lists := []*asked{ask("/api/tags", ""), ask("/api/generate", `{"model":"m","keep_alive":0}`)}
					if got := count(lists); got[502] != 2 {
						t.Errorf("lists and unloads while it is away: %v", got)
					}
					time.Sleep(time.Second)
					if got := count(late); got[0] != 4 {
						t.Errorf("what came while it was away: %v", got)
					}
					if n := h.Waiting(); n != int64(54-begun) {
						t.Errorf("%d wait, of 50 and 4, %d of them begun", n, begun)
					}
					m.live(true)
					time.Sleep(time.Minute)
					if got := count(all); got[200] != 50-begun || got[502] != begun {
						t.Errorf("in the end %v, %d were begun when it died", got, begun)
					}
					if got := count(late); got[200] != 4 {
						t.Errorf("what came while it was away: %v", got)
					}
					m.mu.Lock()
					defer m.mu.Unlock()
					for i, body := range m.order {
						if lanes == 1 && strings.Contains(body, "late") != (i < 4) {
							t.Errorf("request %d after it was back: %s", i, body)
						}
					}
				})
			})
		}
	}
}

// TestAwayForLong: who waits for a server is told when it has been away for TryDuration, counted from when it was last seen; who
// comes later at once. And nobody waits for one that was never there.
func TestAwayForLong(t *testing.T) {
	for _, lanes := range []int{-2, schedule.Unlimited, 1} {
		t.Run(fmt.Sprint(lanes), func(t *testing.T) {
			inTime(t, lanes, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
				time.Sleep(time.Minute)
				first := ask("/api/chat", chatWith("s", "one", ""))
				time.Sleep(2 * time.Second)
				seen := h.Upstreams[0].State().Seen
				m.live(false)
				time.Sleep(2 * time.Second)
				waits := []*asked{ask("/api/chat", chatWith("s", "two", "")), ask("/api/embed", `{"model":"m","input":"x"}`)}
				time.Sleep(30 * time.Second)
				waits = append(waits, ask("/v1/chat/completions", chatWith("s", "three", "")))
				time.Sleep(time.Until(seen.Add(time.Minute - time.Millisecond)))
				if got := count(waits); got[0] != 3 || first.Code != 200 {
					t.Errorf("before the time is over: %v, the one before that %d", got, first.Code)
				}
				time.Sleep(2 * time.Millisecond)
				if got := count(waits); got[503] != 3 {
					t.Errorf("when the time is over: %v", got)
				}
				for _, a := range waits {
					if a.Header().Get("Retry-After") == "" || !strings.Contains(a.Body.String(), "--try-duration") {
						t.Errorf("%v %s", a.Header(), a.Body)
					}
				}
				late := []*asked{ask("/api/chat", chatWith("s", "four", "")), ask("/api/embed", `{"model":"m","input":"x"}`)}
				if got := count(late); got[502] != 2 || late[0].took != 0 {
					t.Errorf("later: %v, after %v", got, late[0].took)
				}
				m.live(true)
				back := ask("/api/chat", chatWith("s", "five", ""))
				time.Sleep(5 * time.Second)
				if got := count([]*asked{back}); got[200] != 1 || !h.Upstreams[0].State().Up {
					t.Errorf("back: %v", got)
				}
			})
		})
	}
	t.Run("never there", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &Handler{Transport: &mortal{}, KeepAlive: keep(t, IfAbsent, "24h"), Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1})}
			up := upstream.NewServer("up", &url.URL{Scheme: "http", Host: "ollama:11434"}, h.Transport, slog.New(slog.DiscardHandler))
			up.TryDuration = time.Minute
			h.Upstreams = []*upstream.Server{up}
			h.Ledger = savings.New(contextstore.NewMemory(contextstore.Limits{}), 10)
			h.Init()
			for range 2 { // the first one before it was polled
				began, w := time.Now(), httptest.NewRecorder()
				r := httptest.NewRequest(http.MethodPost, "/api/chat", strings.NewReader(chatWith("s", "one", "")))
				r.Host = "localhost"
				h.ServeHTTP(w, r)
				if w.Code != 502 || time.Since(began) != 0 {
					t.Errorf("%d %s after %v", w.Code, w.Body, time.Since(began))
				}
				up.Poll(t.Context())
			}
		})
	})
}

// TestNoTryDuration: with --try-duration 0 nobody waits for a server.
func TestNoTryDuration(t *testing.T) {
	inTime(t, 1, 0, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		all := []*asked{ask("/api/chat", chatWith("s", "one", "")), ask("/api/chat", chatWith("s", "two", ""))}
		synctest.Wait()
		m.live(false)
		if got := count(all); got[502]+got[503] != 2 {
			t.Error(got)
		}
	})
}

// TestLeavesWhileAway: a client that leaves while it waits for a server is not kept, and a proxy that stops tells who waits.
func TestLeavesWhileAway(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		m.live(false)
		ctx, leave := context.WithCancel(t.Context())
		var gone sync.WaitGroup
		for _, path := range []string{"/api/chat", "/api/embed"} {
			r := httptest.NewRequestWithContext(ctx, http.MethodPost, path, strings.NewReader(chatWith("s", "x", "")))
			r.Host = "localhost"
			gone.Go(func() {
				defer func() { recover() }() // http.ErrAbortHandler
				h.ServeHTTP(httptest.NewRecorder(), r)
			})
		}
		stay := []*asked{ask("/api/chat", chatWith("s", "one", "")), ask("/api/embed", `{"model":"m","input":"x"}`)}
		if got := count(stay); got[0] != 2 || h.Waiting() != 4 {
			t.Errorf("%v, %d wait", got, h.Waiting())
		}
		leave()
		gone.Wait()
		if n := h.Waiting(); n != 2 {
			t.Errorf("%d wait after two have left", n)
		}
		h.Close()
		h.Close()
		if got := count(stay); got[503] != 2 || !strings.Contains(stay[0].Body.String(), "is stopping") || !strings.Contains(stay[1].Body.String(), "is stopping") {
			t.Errorf("stopping: %v", got)
		}
	})
}

// TestUpstreamSilence: a server that sends nothing for that long is not waited for: 504, or an answer that breaks off. Its lane is
// free then. A client that reads slowly is not meant.
func TestUpstreamSilence(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		h.UpstreamSilence = 10 * time.Second
		m.silent = true
		silent := ask("/api/chat", chatWith("s", "one", ""))
		synctest.Wait()
		waits := ask("/api/chat", chatWith("s", "two", ""))
		time.Sleep(10*time.Second - 1)
		if got := count([]*asked{silent, waits}); got[0] != 2 {
			t.Errorf("before that: %v", got)
		}
		m.mu.Lock()
		m.silent = false
		m.mu.Unlock()
		time.Sleep(time.Nanosecond)
		if got := count([]*asked{silent, waits}); silent.Code != 504 || got[0] != 1 || !strings.Contains(silent.Body.String(), "--upstream-silence") {
			t.Errorf("after that: %v %s", got, silent.Body)
		}
		time.Sleep(time.Second)
		if got := count([]*asked{waits}); got[200] != 1 {
			t.Errorf("the one that waited for its lane: %v", got)
		}
		m.body = func(ctx context.Context) io.ReadCloser {
			return &halting{ctx: ctx, pauses: []time.Duration{9, 9, 9, 11}}
		}
		halts := ask("/api/chat", chatWith("s", "three", ""))
		time.Sleep(time.Minute)
		if got := count([]*asked{halts}); got[-1] != 1 || halts.took != (1+27+10)*time.Second {
			t.Errorf("one that fell silent: %v after %v", got, halts.took)
		}
		m.body = func(ctx context.Context) io.ReadCloser { return &halting{ctx: ctx, pauses: []time.Duration{9, 9, 9}} }
		w := &slowWriter{httptest.NewRecorder()}
		r := httptest.NewRequest(http.MethodPost, "/api/chat", strings.NewReader(chatWith("s", "four", "")))
		r.Host = "localhost"
		h.ServeHTTP(w, r)
		if w.Code != 200 || w.Body.String() != "xxx" {
			t.Errorf("a slow client got %d %q", w.Code, w.Body)
		}
	})
}

// halting is a body that pauses for so many seconds before each byte.
type halting struct {
	ctx    context.Context
	pauses []time.Duration
}

func (b *halting) Read(p []byte) (int, error) {
	if len(b.pauses) == 0 {
		return 0, io.EOF
	}
	select {
	case <-time.After(b.pauses[0] * time.Second):
	case <-b.ctx.Done():
		return 0, context.Cause(b.ctx)
	}
	b.pauses = b.pauses[1:]
	p[0] = 'x'
	return 1, nil
}

func (b *halting) Close() error { return nil }

type slowWriter struct{ *httptest.ResponseRecorder }

func (w *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(time.Hour)
	return w.ResponseRecorder.Write(p)
}

// TestGatewayBusy: behind a gateway a 503 does not say that the request was not begun: no other server is given it.
func TestGatewayBusy(t *testing.T) {
	for _, slots := range []int{schedule.Unlimited, 1} {
		a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1")
		f := newFleet(t, slots, a, b)
		for _, x := range []*box{a, b} {
			x.set(func() { x.refuse, x.words = 503, "no server is available" })
		}
		a.took()
		b.took()
		if status, _ := f.ask("POST", "/api/chat", chat("m", "s")); status != 503 {
			t.Errorf("%d", status)
		}
		if ex := f.ended(); ex.Retries != nil || len(a.took())+len(b.took()) != 1 {
			t.Errorf("sent more than once: %+v", ex)
		}
	}
}
