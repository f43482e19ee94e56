package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// library is a proxy that keeps answers, before a simulated server, in virtual time.
type library struct {
	t      *testing.T
	h      *Handler
	up     *upstream.Server
	client *http.Client

	mu    sync.Mutex
	ended []Exchange      // of requests to models; guarded by mu
	asked int             // requests for text that reached the server; guarded by mu
	held  <-chan struct{} // until when the end of an answer is held back; guarded by mu
}

// newLibrary must be called in a bubble. change, if not nil, changes the handler before it starts.
func newLibrary(t *testing.T, change func(*Handler)) *library {
	sim, err := ollamasim.New(ollamasim.Config{Parallel: 4, Models: []ollamasim.Model{
		{Name: "m", LoadTime: time.Second, NumCtx: 16384}, {Name: "n", LoadTime: time.Second},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return newLibraryOf(t, sim, change)
}

// newLibraryOf is newLibrary before another server.
func newLibraryOf(t *testing.T, server http.Handler, change func(*Handler)) *library {
	procs := runtime.GOMAXPROCS(1) // see newOffice
	t.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	lib := &library{t: t}
	listeners := map[string]*ollamasim.Listener{"sim:80": ollamasim.Listen(), "proxy:80": ollamasim.Listen()}
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		return listeners[addr].DialContext(ctx, network, addr)
	}
	transport := NewTransport()
	transport.DialContext = dial
	lib.up = upstream.NewServer("sim", &url.URL{Scheme: "http", Host: "sim"}, transport, slog.New(slog.DiscardHandler))
	lib.h = &Handler{
		Upstreams: []*upstream.Server{lib.up}, Transport: transport, NoTouch: true,
		Lanes:   schedule.NewScheduler(schedule.Config{Lanes: 4}),
		Ledger:  savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 1e6, Bytes: 1 << 28}), 10),
		Guard:   Guard{AllowHosts: []string{"*"}},
		Answers: answers.NewMemory(answers.Limits{Bytes: 64 << 20}), CacheAnswers: CacheAnswers{Default: CacheDeterministic},
		Done: func(ex Exchange) {
			lib.mu.Lock()
			defer lib.mu.Unlock()
			if ex.Model != "" {
				lib.ended = append(lib.ended, ex)
			}
		},
	}
	if change != nil {
		change(lib.h)
	}
	lib.h.Init()
	lib.up.Polled = func(st upstream.State) { lib.h.Polled(lib.up, st) }
	ctx, cancel := context.WithCancelCause(t.Context())
	var wg sync.WaitGroup
	serve := func(name string, handler http.Handler) {
		srv := &http.Server{Handler: handler, BaseContext: func(net.Listener) context.Context { return ctx }}
		wg.Go(func() { srv.Serve(listeners[name]) }) // ends with the test
		context.AfterFunc(ctx, func() { srv.Close() })
	}
	serve("sim:80", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, ok := routes[r.URL.Path]; ok && routes[r.URL.Path].prompt != 0 {
			lib.mu.Lock()
			lib.asked++
			lib.mu.Unlock()
		}
		server.ServeHTTP(w, r)
		lib.mu.Lock()
		held := lib.held
		lib.mu.Unlock()
		if held != nil && r.URL.Path == "/v1/chat/completions" {
			http.NewResponseController(w).Flush()
			<-held
		}
	}))
	serve("proxy:80", lib.h)
	lib.up.Poll(ctx)
	wg.Go(func() { lib.up.Run(ctx) })
	wg.Go(func() { lib.h.Run(ctx) })
	lib.client = &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true}}
	t.Cleanup(func() {
		lib.client.CloseIdleConnections()
		cancel(ErrDrained)
		transport.CloseIdleConnections()
		wg.Wait()
	})
	return lib
}

// got is an answer as a client sees it.
type got struct {
	status int
	header http.Header
	body   string
	err    error // of reading the body
}

func (lib *library) send(ctx context.Context, method, path, body string, headers ...string) got {
	r, err := http.NewRequestWithContext(ctx, method, "http://proxy"+path, strings.NewReader(body))
	if err != nil {
		lib.t.Error(err)
		return got{err: err}
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		r.Header.Add(name, value)
	}
	return lib.sent(r)
}

func (lib *library) sent(r *http.Request) got {
	res, err := lib.client.Do(r)
	if err != nil {
		return got{err: err}
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return got{res.StatusCode, res.Header, string(text), err}
}

func (lib *library) ask(path, body string, headers ...string) got {
	lib.t.Helper()
	a := lib.send(lib.t.Context(), http.MethodPost, path, body, headers...)
	if a.err != nil {
		lib.t.Errorf("%s %s: %v", path, body, a.err)
	}
	return a
}

// computed waits until nothing happens any more, and returns how many requests for text have
// reached the server since the last call.
func (lib *library) computed() int {
	time.Sleep(3 * time.Second) // of virtual time: an answer is kept once the models were listed
	synctest.Wait()
	lib.mu.Lock()
	defer lib.mu.Unlock()
	n := lib.asked
	lib.asked = 0
	return n
}

// coldChat is a chat whose answer is determined.
func coldChat(text string, more string) string {
	return fmt.Sprintf(`{"model":"m","messages":[{"role":"user","content":%q}],"options":{"temperature":0,"num_predict":8}%s}`, text, more)
}

// kept reports whether an answer was kept, by its header.
func (a got) hit() bool { return strings.Contains(a.header.Get("Cache-Status"), "hit") }

// TestAnswers asks twice in each dialect, streaming and not: the second answer is the first one, to
// the byte, and the server is asked once.
func TestAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, nil)
		v1 := `{"model":"m","temperature":0,"max_tokens":8,"messages":[{"role":"user","content":"x"}]%s}`
		for _, c := range []struct{ path, body string }{
			{"/api/chat", coldChat("a", "")},
			{"/api/chat", coldChat("b", `,"stream":false`)},
			{"/api/generate", `{"model":"m","prompt":"a","options":{"seed":3}}`},
			{"/api/generate", `{"model":"m","prompt":"b","stream":false,"options":{"seed":3}}`},
			{"/v1/chat/completions", fmt.Sprintf(v1, "")},
			{"/v1/chat/completions", fmt.Sprintf(v1, `,"stream":true`)},
			{"/v1/chat/completions", fmt.Sprintf(v1, `,"stream":true,"stream_options":{"include_usage":true}`)},
		} {
			first := lib.ask(c.path, c.body)
			if n := lib.computed(); n != 1 && c.body != fmt.Sprintf(v1, `,"stream":true`) {
				t.Errorf("%s %s: the server was asked %d times: %v", c.path, c.body, n, first.header)
			}
			second := lib.ask(c.path, c.body)
			if n := lib.computed(); n != 0 || !second.hit() {
				t.Errorf("%s %s: the server was asked %d times more, %v", c.path, c.body, n, second.header)
			}
			if first.status != 200 || second.status != 200 || second.body != first.body || first.body == "" {
				t.Errorf("%s %s: first %d %q, then %d %q", c.path, c.body, first.status, first.body, second.status, second.body)
			}
			for _, name := range []string{"Content-Type", "Content-Length", upstream.SimulatedHeader} {
				if a, b := first.header.Get(name), second.header.Get(name); a != b {
					t.Errorf("%s %s: %s was %q, and is %q", c.path, c.body, name, a, b)
				}
			}
			if second.header.Get("Age") == "" {
				t.Errorf("%s: no Age: %v", c.path, second.header)
			}
		}
	})
}

// TestAnswersForms asks for both forms of an answer, and again at once: whoever asks again gets what
// was computed in that form a moment ago, and nothing that is made of the other form.
func TestAnswersForms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, nil)
		whole, stream := coldChat("a", `,"stream":false`), coldChat("a", "")
		lib.ask("/api/chat", whole, "Cache-Control: no-cache")
		first := lib.ask("/api/chat", stream, "Cache-Control: no-cache")
		if n := lib.computed(); n != 2 {
			t.Fatalf("%d computations", n)
		}
		if again := lib.ask("/api/chat", stream); again.body != first.body || !again.hit() {
			t.Errorf("the stream was %q, and is %q", first.body, again.body)
		}

		whole, stream = coldChat("b", `,"stream":false`), coldChat("b", "")
		lib.ask("/api/chat", whole)
		lib.computed() // it is kept
		first = lib.ask("/api/chat", stream, "Cache-Control: max-age=0")
		if again := lib.ask("/api/chat", stream); again.body != first.body {
			t.Errorf("the stream was %q, and is %q", first.body, again.body)
		}
		if n := lib.computed(); n != 1 {
			t.Errorf("%d computations", n)
		}
	})
}

// TestAnswersTogether has fifty clients ask at once: one computation, and the same answer for all.
// Then they leave one after the other: the computation ends with the last one.
func TestAnswersTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, nil)
		lib.ask("/api/chat", coldChat("load", ""))
		lib.computed()
		var wg sync.WaitGroup
		replies := make([]got, 50)
		for i := range replies {
			wg.Go(func() { replies[i] = lib.ask("/api/chat", coldChat("all", "")) })
		}
		wg.Wait()
		if n := lib.computed(); n != 1 {
			t.Errorf("fifty equal chats were computed %d times", n)
		}
		for i, a := range replies {
			if a.body != replies[0].body || a.status != 200 || a.body == "" {
				t.Errorf("answer %d is %d %q, another is %q", i, a.status, a.body, replies[0].body)
			}
		}

		const clients = 5
		long := strings.Replace(coldChat("long", ""), `"num_predict":8`, `"num_predict":100000`, 1)
		var leave []context.CancelFunc
		for range clients {
			ctx, cancel := context.WithCancel(t.Context())
			leave = append(leave, cancel)
			wg.Go(func() { lib.send(ctx, http.MethodPost, "/api/chat", long) })
		}
		synctest.Wait()
		for i, cancel := range leave {
			if n := lib.up.State(); !n.Up {
				t.Error("the server is away")
			}
			if n := lib.h.backends()[0].inFlight.Load(); n != 1 {
				t.Errorf("%d computations while %d clients listen", n, clients-i)
			}
			cancel()
			synctest.Wait()
		}
		wg.Wait()
		if n := lib.h.backends()[0].inFlight.Load(); n != 0 {
			t.Errorf("%d computations go on after all clients have left", n)
		}
		if n := lib.computed(); n != 1 {
			t.Errorf("%d computations", n)
		}
		if again := lib.ask("/api/chat", coldChat("long", "")); again.hit() {
			t.Error("the answer of another request was given")
		}
	})
}

// TestAnswersLeft: a client leaves when it has read the last event, before the body ends, as those of
// OpenAI do. The answer is kept; and a server that never ends it holds nothing for long.
func TestAnswersLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, nil)
		const body = `{"model":"m","temperature":0,"max_tokens":8,"stream":true,"messages":[{"role":"user","content":"%s"}]}`
		leave := func(text string) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://proxy/v1/chat/completions",
				strings.NewReader(fmt.Sprintf(body, text)))
			if err != nil {
				t.Fatal(err)
			}
			res, err := lib.client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			for lines := bufio.NewScanner(res.Body); lines.Scan() && lines.Text() != "data: [DONE]"; {
			}
		}
		for _, c := range []struct {
			text  string
			ends  bool
			after time.Duration // that the client has left
		}{
			{"soon", true, 0},
			// It is still being kept when the server's time to end it is over.
			{"late", true, endsWithin / 2},
			{"never", false, 0},
		} {
			text, ends := c.text, c.ends
			held := make(chan struct{})
			lib.mu.Lock()
			lib.held = held
			lib.mu.Unlock()
			leave(text)
			synctest.Wait()
			if c.after > 0 {
				time.Sleep(c.after)
				lib.up.Refresh(t.Context()) // so that the models are listed again after listedPause
				time.Sleep(time.Millisecond)
			}
			if ends {
				close(held)
				time.Sleep(2 * listedPause)
			}
			if lib.computed() != 1 {
				t.Errorf("%s: not computed once", text)
			}
			if n := lib.h.InFlight(); n != 0 {
				t.Errorf("%s: %d requests in flight", text, n)
			}
			again := lib.ask("/v1/chat/completions", fmt.Sprintf(body, text), "Cache-Control: only-if-cached")
			if again.hit() != ends {
				t.Errorf("%s: %d %v", text, again.status, again.header)
			}
			if !ends {
				close(held)
			}
		}
	})
}

// TestAnswersApart asks for what differs in one thing: no answer is given to another request.
func TestAnswersApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, func(h *Handler) {
			keys, err := ParseKeys("a ka\nb kb")
			if err != nil {
				t.Fatal(err)
			}
			h.Guard.Keys = keys
		})
		a, b := "Authorization: Bearer ka", "Authorization: Bearer kb"
		lib.ask("/api/chat", coldChat("x", ""), a)
		lib.computed()
		for _, c := range []struct{ path, body, key string }{
			{"/api/chat", coldChat("x", ""), b},
			{"/api/chat", strings.Replace(coldChat("x", ""), `"m"`, `"n"`, 1), a},
			{"/api/chat", strings.Replace(coldChat("x", ""), `"m"`, `"m:latest"`, 1), a},
			{"/api/chat", strings.Replace(coldChat("x", ""), `"num_predict":8`, `"num_predict":9`, 1), a},
			{"/api/chat", strings.Replace(coldChat("x", ""), `"temperature":0,`, "", 1), a},
			{"/api/chat", coldChat("y", ""), a},
			{"/api/chat?x", coldChat("x", ""), a},
			{"/api/chat", coldChat("x", `,"keep_alive":0`), a}, // Ollama unloads the model after it
		} {
			if got := lib.ask(c.path, c.body, c.key); got.hit() || got.status != 200 {
				t.Errorf("%s %s: %d %v", c.path, c.body, got.status, got.header)
			}
			if n := lib.computed(); n != 1 {
				t.Errorf("%s %s was computed %d times", c.path, c.body, n)
			}
		}
		if got := lib.ask("/api/chat", coldChat("x", ""), a); !got.hit() {
			t.Errorf("the answer is not kept any more: %v", got.header)
		}
	})
}

// TestAnswersControl has clients say what they accept.
func TestAnswersControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, nil)
		body := coldChat("x", "")
		if got := lib.ask("/api/chat", body, "Cache-Control: only-if-cached"); got.status != http.StatusGatewayTimeout {
			t.Errorf("only-if-cached, not kept: %d %s", got.status, got.body)
		}
		if lib.ask("/api/chat", body, "Cache-Control: no-store"); lib.computed() != 1 {
			t.Error("no-store was not computed")
		}
		if lib.ask("/api/chat", body); lib.computed() != 1 {
			t.Error("an answer was kept in spite of no-store")
		}
		if got := lib.ask("/api/chat", body, "Cache-Control: only-if-cached"); !got.hit() {
			t.Errorf("only-if-cached, kept: %d %v", got.status, got.header)
		}
		if got := lib.ask("/api/chat", body, "Cache-Control: no-cache"); got.hit() || lib.computed() != 1 {
			t.Errorf("no-cache: %v", got.header)
		}
		if got := lib.ask("/api/chat", body); !got.hit() || lib.computed() != 0 {
			t.Errorf("after no-cache: %v", got.header)
		}
	})
}

// TestSurvives has a client leave in the middle of an answer, and fetch it later.
func TestSurvives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, mode := range []CacheMode{CacheOff, CacheDeterministic} {
			lib := newLibrary(t, func(h *Handler) { h.CacheAnswers.Default = mode })
			body := strings.Replace(coldChat("x", ""), `"num_predict":8`, `"num_predict":200`, 1)
			accepted := lib.ask("/api/chat", body, "Prefer: respond-async")
			where := accepted.header.Get("Location")
			if accepted.status != http.StatusAccepted || where == "" {
				t.Fatalf("%s: %d %v %s", mode, accepted.status, accepted.header, accepted.body)
			}
			if n := lib.computed(); n != 1 {
				t.Errorf("%s: computed %d times", mode, n)
			}
			time.Sleep(time.Minute)
			whole := lib.send(t.Context(), http.MethodGet, where, "")
			lines := strings.SplitAfter(strings.TrimSpace(whole.body), "\n")
			if whole.status != 200 || !strings.Contains(whole.body, `"done":true`) || len(lines) < 10 {
				t.Errorf("%s: fetched %d %q", mode, whole.status, whole.body)
			}
			rest := lib.send(t.Context(), http.MethodGet, where+"?from=5", "")
			if want := strings.Join(lines[5:], ""); strings.TrimSpace(rest.body) != want {
				t.Errorf("%s: from line 5 on: %q, want %q", mode, rest.body, want)
			}

			// With the header the answer is streamed as usual, and goes on.
			ctx, cancel := context.WithCancel(t.Context())
			r, _ := http.NewRequestWithContext(ctx, http.MethodPost, "http://proxy/api/chat",
				strings.NewReader(strings.Replace(body, `"x"`, `"y"`, 1)))
			r.Header.Set(headerSurvive, "true")
			res, err := lib.client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			id := res.Header.Get(headerAnswer)
			cancel()
			res.Body.Close()
			live := lib.send(t.Context(), http.MethodGet, pathAnswers+"/"+id, "")
			if live.status != 200 || !strings.Contains(live.body, `"done":true`) {
				t.Errorf("%s: fetched %d %q", mode, live.status, live.body)
			}
			if n := lib.computed(); n != 1 {
				t.Errorf("%s: computed %d times", mode, n)
			}
			if gone := lib.send(t.Context(), http.MethodDelete, pathAnswers+"/"+id, ""); gone.status != 200 {
				t.Errorf("%s: removing it: %d %s", mode, gone.status, gone.body)
			}
			if none := lib.send(t.Context(), http.MethodGet, pathAnswers+"/"+id, ""); none.status != http.StatusNotFound {
				t.Errorf("%s: after its removal: %d", mode, none.status)
			}
		}
	})
}

// TestAnswersPaced replays a stream at the pace at which it was computed, or at once.
func TestAnswersPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, paced := range []bool{false, true} {
			lib := newLibrary(t, func(h *Handler) { h.ReplayPaced = paced })
			read := func() (times []time.Duration, text string) {
				began := time.Now()
				r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://proxy/api/chat", strings.NewReader(coldChat("x", "")))
				if err != nil {
					t.Fatal(err)
				}
				res, err := lib.client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				for lines := bufio.NewScanner(res.Body); lines.Scan(); text += lines.Text() + "\n" {
					times = append(times, time.Since(began))
				}
				return times, text
			}
			lib.ask("/api/chat", coldChat("load", ""))
			first, text := read()
			lib.computed()
			again, same := read()
			if lib.computed() != 0 || same != text || len(first) < 8 {
				t.Fatalf("paced %v: %q, then %q", paced, text, same)
			}
			for i := range again {
				want := time.Duration(0)
				if paced {
					want = first[i] - first[0] + again[0] // times are kept to the microsecond
				}
				if off := (again[i] - want).Abs(); off > time.Duration(i+1)*time.Microsecond {
					t.Errorf("paced %v: line %d came after %v, want %v; computed after %v", paced, i, again[i], want, first[i])
				}
			}
			if paced && again[len(again)-1] < first[len(first)-1]/2 {
				t.Errorf("paced: %v, computed: %v", again, first)
			}
		}
	})
}
