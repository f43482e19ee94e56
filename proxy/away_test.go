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

// mortal is an Ollama server in virtual time that dies and comes back. A request to a model takes a
// second.
type mortal struct {
	mu     sync.Mutex
	death  chan struct{} // closed when it dies; nil: it is dead. Guarded by mu
	open   bool          // if dead, its port accepts connections and closes them; guarded by mu
	behind bool          // … or a gateway answers everything with 502; guarded by mu
	silent bool          // it does not answer requests to models; guarded by mu
	closed bool          // requests to models get no connection; guarded by mu
	busy   bool          // its queue is full; guarded by mu
	dials  int           // requests to models that arrived, or would have; guarded by mu
	serves int           // requests that have begun; guarded by mu
	order  []string      // their bodies, since it came to life; guarded by mu
	body   func(ctx context.Context) io.ReadCloser
}

// set changes the state of a running server.
func (m *mortal) set(change func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change()
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

// asked returns how many requests to models arrived, or would have.
func (m *mortal) asked() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dials
}

func (m *mortal) RoundTrip(r *http.Request) (*http.Response, error) {
	read := func() (text []byte, err error) {
		if r.Body != nil {
			text, err = io.ReadAll(r.Body)
		}
		return text, err
	}
	if r.Body != nil {
		defer r.Body.Close()
	}
	m.mu.Lock()
	death, open, behind, silent, closed, busy := m.death, m.open, m.behind, m.silent, m.closed, m.busy
	infers := r.Method == http.MethodPost && r.URL.Path != "/api/show"
	if infers {
		m.dials++
	}
	m.mu.Unlock()
	answered := func(status int, text string) *http.Response {
		return &http.Response{StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(text)), ContentLength: int64(len(text)), Request: r}
	}
	switch {
	case death == nil && behind:
		return answered(502, "<html>Bad Gateway</html>"), nil
	case death == nil && open:
		return nil, io.EOF
	case death == nil, closed && infers:
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	body, err := read()
	if err != nil {
		return nil, err
	}
	if busy && infers {
		return answered(503, `{"error":"`+busyWords+`"}`), nil
	}
	text := `{"version":"0.34.1","models":[{"name":"m:latest","digest":"1"}]}`
	answer := io.NopCloser(strings.NewReader(text))
	if infers && !strings.HasPrefix(r.URL.Path, "/api/blobs/") && !bytes.Contains(body, []byte(`"keep_alive":0`)) {
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
			if behind {
				return answered(502, "<html>Bad Gateway</html>"), nil
			}
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

// mortals sends each request to the server in its URL.
type mortals map[string]*mortal

func (m mortals) RoundTrip(r *http.Request) (*http.Response, error) {
	return m[r.URL.Hostname()].RoundTrip(r)
}

// inTime runs a test with a proxy in front of a mortal server, in virtual time. lanes is
// schedule.Config.Lanes; -2 means no scheduler.
func inTime(t *testing.T, lanes int, try time.Duration, test func(t *testing.T, m *mortal, h *Handler, ask func(path, body string, headers ...string) *asked)) {
	t.Helper()
	inTimes(t, []string{"up"}, lanes, try, func(t *testing.T, m mortals, h *Handler, ask func(path, body string, headers ...string) *asked) {
		test(t, m["up"], h, ask)
	})
}

// inTimes does so with several servers. One whose name ends with an exclamation mark is dead at
// first.
func inTimes(t *testing.T, names []string, lanes int, try time.Duration, test func(t *testing.T, m mortals, h *Handler, ask func(path, body string, headers ...string) *asked)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := mortals{}
		h := &Handler{Transport: m, KeepAlive: keep(t, IfAbsent, "24h"), NoTouch: true}
		if lanes != -2 {
			h.Lanes = schedule.NewScheduler(schedule.Config{Lanes: lanes, Limit: 100})
		}
		for _, name := range names {
			name, dead := strings.CutSuffix(name, "!")
			if m[name] = new(mortal); !dead {
				m[name].live(true)
			}
			up := upstream.NewServer(name, &url.URL{Scheme: "http", Host: name + ":11434"}, m, slog.New(slog.DiscardHandler))
			up.TryDuration = try
			up.Polled = func(st upstream.State) { h.Polled(up, st) }
			h.Upstreams = append(h.Upstreams, up)
		}
		h.Ledger = savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 1000, Bytes: 1 << 20}), 100)
		h.Init()
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, up := range h.Upstreams {
			up.Poll(ctx)
			wg.Go(func() { up.Run(ctx) })
		}
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
			// Like net/http's server, so that an answer that breaks off panics.
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

// asked is a request and its result, which may be read once the request has ended.
type asked struct {
	*httptest.ResponseRecorder
	began time.Time
	took  time.Duration
	broke bool
	ended chan struct{}

	mu sync.Mutex // held during writes, so that seen can be called before the end
}

func (a *asked) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ResponseRecorder.Write(p)
}

func (a *asked) WriteString(s string) (int, error) { return a.Write([]byte(s)) }

func (a *asked) WriteHeader(status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ResponseRecorder.WriteHeader(status)
}

func (a *asked) Flush() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ResponseRecorder.Flush()
}

// seen waits until all is quiet and returns what the client has received by then.
func (a *asked) seen() string {
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.Flushed {
		return ""
	}
	return a.Body.String()
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

// TestRestart: a server that restarts costs only the answers that it had begun. Waiting requests
// keep waiting, and so do new ones; even if something else accepts connections in its place.
// Interactive requests go first when it is back.
func TestRestart(t *testing.T) {
	for _, lanes := range []int{-2, schedule.Unlimited, 0, 1, 4} {
		for _, open := range []bool{false, true} {
			t.Run(fmt.Sprint(lanes, open), func(t *testing.T) {
				inTime(t, lanes, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
					m.set(func() { m.open = open })
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

// TestAwayForLong: requests that wait for a server get an error when it has been away for
// TryDuration, counted from when it was last seen; later requests get it at once. Nobody waits for
// a server that was never there.
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
				m.live(false)
				time.Sleep(5 * time.Second)
				waits = []*asked{ask("/api/chat", chatWith("s", "six", "")), ask("/api/embed", `{"model":"m","input":"x"}`)}
				time.Sleep(20 * time.Second)
				m.live(true)
				time.Sleep(5 * time.Second)
				if got := count(waits); got[200] != 2 {
					t.Errorf("what waited: %v", got)
				}
				for _, a := range waits {
					told, timing := a.Header().Get(headerWaited), a.Header().Get("Server-Timing")
					if waited := (a.took - time.Second).Seconds(); lanes != 1 && told != fmt.Sprintf("%.3f", waited) || timing == "" || told < "20" {
						t.Errorf("waited %q, %q, and took %v", told, timing, a.took)
					}
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

// TestNoTryDuration: with --try-duration 0 no request waits for a server.
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

// TestLeavesWhileAway: a client that leaves while it waits for a server is forgotten, and a proxy
// that stops answers those that wait.
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

// TestUpstreamSilence: the proxy stops waiting for a server that sends nothing for that long: with
// 504, or an answer that breaks off. The lane is free then. A client that reads slowly is not
// affected.
func TestUpstreamSilence(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		h.UpstreamSilence = 10 * time.Second
		m.set(func() { m.silent = true })
		silent := ask("/api/chat", chatWith("s", "one", ""))
		synctest.Wait()
		waits := ask("/api/chat", chatWith("s", "two", ""))
		time.Sleep(10*time.Second - 1)
		if got := count([]*asked{silent, waits}); got[0] != 2 {
			t.Errorf("before that: %v", got)
		}
		m.set(func() { m.silent = false })
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

// halting is a body that pauses for that many seconds before each byte.
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

// TestGatewayBusy: behind a gateway, a 503 does not mean that the request was not begun, so no
// other server gets it.
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

// TestOthersComeBack: a request that waits for one server is served by another that comes back, or
// appears, meanwhile.
func TestOthersComeBack(t *testing.T) {
	for _, lanes := range []int{-2, schedule.Unlimited, 1} {
		for _, b := range []string{"b", "b!"} {
			t.Run(fmt.Sprint(lanes, b), func(t *testing.T) {
				if lanes == -2 {
					lanes = schedule.Unlimited // several servers need a scheduler
				}
				inTimes(t, []string{"a", b}, lanes, time.Minute, func(t *testing.T, m mortals, h *Handler, ask func(string, string, ...string) *asked) {
					if b == "b" {
						m["b"].live(false)
						time.Sleep(15 * time.Second)
					}
					m["a"].live(false)
					time.Sleep(15 * time.Second)
					var all []*asked
					for i := range 10 {
						all = append(all, ask("/api/chat", chatWith("s", fmt.Sprint(i), "")), ask("/api/embed", `{"model":"m","input":"x"}`))
					}
					time.Sleep(time.Second)
					m["b"].live(true)
					time.Sleep(time.Minute + 10*time.Second)
					if got := count(all); got[200] != 20 {
						t.Errorf("%v", got)
					}
				})
			})
		}
	}
	// Also a request that waits for a lane while the first one is up.
	inTimes(t, []string{"a", "b"}, 1, time.Minute, func(t *testing.T, m mortals, h *Handler, ask func(string, string, ...string) *asked) {
		m["b"].live(false)
		time.Sleep(20 * time.Second)
		var all []*asked
		for i := range 40 {
			all = append(all, ask("/api/chat", chatWith(fmt.Sprint("s", i), "x", "")))
		}
		time.Sleep(3500 * time.Millisecond)
		m["b"].live(true)
		time.Sleep(4 * time.Second)
		if m["b"].asked() == 0 {
			t.Error("the one that came back took over nothing")
		}
		begun := m["a"].live(false)
		time.Sleep(50 * time.Second)
		if got := count(all); got[200] != 40-begun || got[502] != begun {
			t.Errorf("%v, %d were begun where the server died", got, begun)
		}
	})
}

// TestRefusedThoughPolled: a server that answers polls but accepts no connection for requests to
// models is retried with pauses. That costs no request if it does not last; otherwise the requests
// fail.
func TestRefusedThoughPolled(t *testing.T) {
	for _, lasts := range []time.Duration{20 * time.Second, time.Hour} {
		for _, lanes := range []int{-2, schedule.Unlimited, 2} {
			inTime(t, lanes, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
				m.set(func() { m.closed = true })
				var all []*asked
				for i := range 10 {
					all = append(all, ask("/api/chat", chatWith("s", fmt.Sprint(i), "")))
				}
				time.Sleep(lasts)
				dials := m.asked()
				m.set(func() { m.closed = false })
				time.Sleep(time.Minute)
				got := count(all)
				whole := got[200]
				if lasts > time.Minute {
					whole = got[502] + got[503]
				}
				if whole != 10 || dials > 10*(goneMost+1) {
					t.Errorf("for %v, %d lanes: %v, asked %d times", lasts, lanes, got, dials)
				}
			})
		}
	}
}

// TestAllDrain: draining servers get nothing new, whether or not another server is away.
func TestAllDrain(t *testing.T) {
	for _, lanes := range []int{schedule.Unlimited, 1} {
		inTimes(t, []string{"a", "b"}, lanes, time.Minute, func(t *testing.T, m mortals, h *Handler, ask func(string, string, ...string) *asked) {
			time.Sleep(time.Minute)
			h.drain(h.backends()[0], true)
			h.drain(h.backends()[1], true)
			all := []*asked{ask("/api/chat", chatWith("s", "x", "")), ask("/api/embed", `{"model":"m","input":"x"}`)}
			if got := count(all); got[503] != 2 || m["a"].asked()+m["b"].asked() > 0 {
				t.Errorf("both drain: %v", got)
			}
			h.drain(h.backends()[1], false)
			m["b"].live(false)
			time.Sleep(15 * time.Second)
			all = []*asked{ask("/api/chat", chatWith("s", "x", "")), ask("/api/embed", `{"model":"m","input":"x"}`)}
			time.Sleep(time.Second)
			if got := count(all); got[0] != 2 {
				t.Errorf("one drains, one is away: %v", got)
			}
			time.Sleep(time.Minute)
			if got := count(all); got[503] != 2 || m["a"].asked() > 0 {
				t.Errorf("… and stays away: %v, the one that drains was asked %d times", got, m["a"].asked())
			}
		})
	}
}

// TestRestartBehindGateway: a gateway that answers in place of a restarting server costs only the
// requests under way.
func TestRestartBehindGateway(t *testing.T) {
	inTime(t, 2, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		m.set(func() { m.behind = true })
		var all []*asked
		for i := range 50 {
			all = append(all, ask("/api/chat", chatWith("s", fmt.Sprint(i), "")))
		}
		time.Sleep(2500 * time.Millisecond)
		begun := m.live(false)
		time.Sleep(3 * time.Second)
		if got := count(all); got[502] != begun || !h.Upstreams[0].State().Away {
			t.Errorf("%v, %d were begun, away %v", got, begun, h.Upstreams[0].State().Away)
		}
		m.live(true)
		time.Sleep(time.Minute)
		if got := count(all); got[200] != 50-begun {
			t.Errorf("in the end: %v", got)
		}
	})
}

// TestSilenceOfOthers: the pauses of a slow client, and those before retries at a busy server, do
// not count as the upstream's silence.
func TestSilenceOfOthers(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		h.UpstreamSilence = 3 * time.Second
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPost, "/api/blobs/sha256:0", &halting{ctx: t.Context(), pauses: make([]time.Duration, 0)})
		slow := &halting{ctx: t.Context()}
		for range 45 {
			slow.pauses = append(slow.pauses, 1)
		}
		r.Body, r.ContentLength, r.Host = slow, 45, "localhost"
		if h.ServeHTTP(w, r); w.Code != 200 {
			t.Errorf("a slow upload: %d %s", w.Code, w.Body)
		}
		m.set(func() { m.busy = true })
		busy := ask("/api/chat", chatWith("s", "x", ""))
		time.Sleep(2 * time.Minute)
		if got := count([]*asked{busy}); got[503] != 1 || !strings.Contains(busy.Body.String(), busyWords) {
			t.Errorf("a busy server: %v %s", got, busy.Body)
		}
	})
}

// TestWaitingIsBounded: at most --queue requests that need no lane wait for a server that is away.
func TestWaitingIsBounded(t *testing.T) {
	inTime(t, -2, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		h.Queue = 10
		m.live(false)
		var all []*asked
		for range 30 {
			all = append(all, ask("/api/embed", `{"model":"m","input":"x"}`))
		}
		if got := count(all); got[0] != 10 || got[503] != 20 || h.Waiting() != 10 {
			t.Errorf("%v, %d wait", got, h.Waiting())
		}
		m.live(true)
		time.Sleep(5 * time.Second)
		if got := count(all); got[200] != 10 {
			t.Errorf("%v", got)
		}
	})
}

// TestLongBodyAtRestart: a body that passes unread waits for its server, too, even if it was the
// first to find it gone.
func TestLongBodyAtRestart(t *testing.T) {
	for _, lanes := range []int{-2, 1} {
		inTime(t, lanes, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
			h.MaxBody = 1000
			m.live(false)
			all := []*asked{ask("/api/chat", chatWith("s", strings.Repeat("x", 5000), ""))}
			time.Sleep(time.Second)
			all = append(all, ask("/api/chat", chatWith("s", strings.Repeat("y", 5000), "")))
			time.Sleep(time.Second)
			if got := count(all); got[0] != 2 {
				t.Errorf("while it is away: %v", got)
			}
			m.live(true)
			time.Sleep(10 * time.Second)
			if got := count(all); got[200] != 2 || len(m.order) != 2 || len(m.order[0]) < 5000 || len(m.order[1]) < 5000 {
				t.Errorf("%v, %d came: %s %s", got, len(m.order), all[0].Body, all[1].Body)
			}
		})
	}
}

// TestComesLate: when a server appears at last, or returns after long, no request between its first
// answer and the next poll is refused because the server was away for too long.
func TestComesLate(t *testing.T) {
	for _, name := range []string{"up", "up!"} {
		for _, lanes := range []int{-2, schedule.Unlimited, 1} {
			inTimes(t, []string{name}, lanes, time.Minute, func(t *testing.T, m mortals, h *Handler, ask func(string, string, ...string) *asked) {
				if name == "up" {
					m["up"].live(false)
				}
				time.Sleep(5*time.Minute + 700*time.Millisecond)
				m["up"].live(true)
				for i := range 5 {
					w := httptest.NewRecorder()
					r := httptest.NewRequest(http.MethodPost, "/api/chat", strings.NewReader(chatWith("s", fmt.Sprint(i), "")))
					r.Host = "localhost"
					if h.ServeHTTP(w, r); w.Code != 200 {
						t.Errorf("%s, %d lanes, request %d: %d %s", name, lanes, i, w.Code, w.Body)
					}
				}
			})
		}
	}
}
