package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// warmRig is a proxy with prewarming, in front of simulated servers and in virtual time.
type warmRig struct {
	t      *testing.T
	h      *Handler
	sims   []*ollamasim.Server
	client *http.Client
	log    *logBuffer

	mu   sync.Mutex
	done []Exchange // guarded by mu
}

const warmLoad = 10 * time.Second // of each model of the simulated servers

// newWarmRig starts everything. Each server has the models a and b, and holds one at a time, in one
// slot.
func newWarmRig(t *testing.T, servers int, lines []string, set func(*Handler)) *warmRig {
	procs := runtime.GOMAXPROCS(1) // see newOffice
	t.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	rg := &warmRig{t: t, log: &logBuffer{}}
	listeners := map[string]*ollamasim.Listener{"proxy:80": ollamasim.Listen()}
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		return listeners[addr].DialContext(ctx, network, addr)
	}
	transport := NewTransport()
	transport.DialContext = dial
	rg.h = &Handler{
		Transport: transport, KeepAlive: keep(t, IfAbsent, "24h"),
		Lanes:  schedule.NewScheduler(schedule.Config{}),
		Ledger: savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 1e5, Bytes: 1 << 26}), 10),
		Log:    slog.New(slog.NewJSONHandler(rg.log, nil)),
		Done: func(ex Exchange) {
			rg.mu.Lock()
			defer rg.mu.Unlock()
			rg.done = append(rg.done, ex)
		},
	}
	if len(lines) > 0 {
		var err error
		if rg.h.Prewarm, err = ParsePrewarm(strings.Join(lines, "\n")); err != nil {
			t.Fatal(err)
		}
	}
	if set != nil {
		set(rg.h)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	serve := func(name string, handler http.Handler) {
		srv, listener := &http.Server{Handler: handler}, listeners[name]
		wg.Go(func() { srv.Serve(listener) }) // ends with the test
		context.AfterFunc(ctx, func() { srv.Close() })
	}
	for i := range servers {
		name := fmt.Sprint("sim", i)
		sim, err := ollamasim.New(ollamasim.Config{MaxLoaded: 1, Models: []ollamasim.Model{
			{Name: "a", LoadTime: warmLoad, PromptRate: 100},
			{Name: "b", LoadTime: warmLoad, PromptRate: 100},
		}})
		if err != nil {
			t.Fatal(err)
		}
		rg.sims = append(rg.sims, sim)
		listeners[name+":80"] = ollamasim.Listen()
		serve(name+":80", sim)
		up := upstream.NewServer(name, &url.URL{Scheme: "http", Host: name}, transport, rg.h.Log)
		rg.h.Upstreams = append(rg.h.Upstreams, up)
	}
	rg.h.Init()
	for _, up := range rg.h.Upstreams {
		up.Polled = func(st upstream.State) { rg.h.Polled(up, st) }
		wg.Go(func() { up.Poll(ctx); up.Run(ctx) })
	}
	wg.Go(func() { rg.h.Run(ctx) })
	serve("proxy:80", rg.h)
	rg.client = &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true}}
	t.Cleanup(func() {
		rg.client.CloseIdleConnections()
		cancel()
		transport.CloseIdleConnections()
		wg.Wait()
	})
	return rg
}

// ask sends a request and returns the end of its answer, and how long it took.
func (rg *warmRig) ask(path, body string, headers ...string) (r reply, took time.Duration) {
	rg.t.Helper()
	began := time.Now()
	req, err := http.NewRequest(http.MethodPost, "http://proxy"+path, strings.NewReader(body))
	if err != nil {
		rg.t.Error(err)
		return r, 0
	}
	req.Host = "localhost"
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	res, err := rg.client.Do(req)
	if err != nil {
		rg.t.Error(err)
		return r, 0
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		rg.t.Errorf("%d %s %v", res.StatusCode, text, err)
	}
	for line := range bytes.Lines(text) {
		if err := json.Unmarshal(line, &r); err != nil {
			rg.t.Errorf("%s: %v", line, err)
		}
	}
	return r, time.Since(began)
}

// results are the results of the prewarming requests, with their models.
func (rg *warmRig) results() (list []string) {
	synctest.Wait()
	rg.mu.Lock()
	defer rg.mu.Unlock()
	for _, ex := range rg.done {
		if ex.Prewarm != "" {
			list = append(list, ex.Model+" "+ex.Prewarm)
		}
	}
	return list
}

// want compares them.
func (rg *warmRig) want(what string, want ...string) {
	rg.t.Helper()
	if got := rg.results(); !slices.Equal(got, want) {
		rg.t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func (rg *warmRig) loads(what string, want int) {
	rg.t.Helper()
	n := 0
	for _, sim := range rg.sims {
		n += sim.Stats().Loads
	}
	if n != want {
		rg.t.Errorf("%s: %d loads, want %d", what, n, want)
	}
}

// warmBody is a request with a prefix of 500 tokens (5 s) that depends on model and id only.
func warmBody(model string, id uint64, question, fields string) string {
	return fmt.Sprintf(`{"model":%q%s,"messages":[%s,%s]}`, model, fields,
		turn("system", say(id, 500)), turn("user", question))
}

func short(model string, id uint64) string {
	return warmBody(model, id, "what?", `,"options":{"num_predict":5}`)
}

// warmLine is a line of the file with that prefix.
func warmLine(model string, id uint64) string { return warmBody(model, id, "?", "") }

// TestPrewarmAtStart: the prompts are evaluated in the order of the file, and once. Later clients
// find them warm, and no clients see the requests.
func TestPrewarmAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, err := ParseKeys("ann the-key class=interactive\n")
		if err != nil {
			t.Fatal(err)
		}
		rg := newWarmRig(t, 1, []string{warmLine("a", 1), warmLine("a", 2)}, func(h *Handler) {
			h.Guard.Keys = keys
		})
		time.Sleep(warmLoad + 30*time.Second)
		rg.want("at start", "a evaluated", "a evaluated")
		time.Sleep(10 * time.Hour)
		rg.want("ten hours later", "a evaluated", "a evaluated")
		rg.loads("at start", 1)
		for id := range uint64(2) {
			r, took := rg.ask("/api/chat", short("a", id+1), "Authorization: Bearer the-key")
			if r.Prompt-r.Cached > 20 || took > time.Second {
				t.Errorf("prompt %d: %d of %d tokens were evaluated, in %v",
					id+1, r.Prompt-r.Cached, r.Prompt, took)
			}
		}
		synctest.Wait()
		if lines := rg.log.lines(t, "request"); len(lines) != 4 || lines[0]["prewarm"] != "evaluated" ||
			lines[0]["key_name"] != nil || lines[2]["prewarm"] != nil {
			t.Errorf("logged as %v", lines)
		}
	})
}

// TestPrewarmGivesWay: a client's request interrupts a prompt that is being made warm, and waits no
// longer than without it. When no client asks any more, prewarming continues.
func TestPrewarmGivesWay(t *testing.T) {
	alone := func(model string) (took time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			_, took = newWarmRig(t, 1, nil, nil).ask("/api/chat", short(model, 7))
		})
		return took
	}("a")
	for _, tt := range []struct {
		name  string
		after time.Duration // since the start
		model string
		most  time.Duration // for the client
		loads int
		then  string
	}{
		// A batch of 512 tokens may have to end first.
		{"in the evaluation", warmLoad + 2*time.Second, "a", alone - warmLoad + 6*time.Second, 1, "a warm"},
		{"in the evaluation, another model", warmLoad + 2*time.Second, "b", alone + 6*time.Second, 2, ""},
		{"in the load", warmLoad / 2, "a", alone - warmLoad/2 + 10*time.Millisecond, 1, "a evaluated"},
		{"in the load, another model", warmLoad / 2, "b", alone + 10*time.Millisecond, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rg := newWarmRig(t, 1, []string{warmLine("a", 1)}, nil)
				time.Sleep(tt.after)
				_, took := rg.ask("/api/chat", short(tt.model, 7))
				if took > tt.most {
					t.Errorf("the client waited for %v, want %v at most", took, tt.most)
				}
				rg.want("when a client asks", "a given_up")
				rg.loads("when a client asks", tt.loads)
				time.Sleep(time.Hour)
				if tt.model == "a" { // what was evaluated before the interruption is kept
					rg.want("in an hour", "a given_up", tt.then)
					rg.loads("in an hour", 1)
				}
			})
		})
	}
}

// TestPrewarmIsPatient: nothing is sent while a client asks, for a second afterwards, and for
// longer if a client came each time.
func TestPrewarmIsPatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rg := newWarmRig(t, 1, nil, func(h *Handler) {
			var err error
			if h.Prewarm, err = ParsePrewarm(warmLine("absent", 1)); err != nil {
				t.Error(err)
			}
		})
		// Each pause is a little longer than a second: in one of one, two, four, … pauses a prompt
		// is begun. (The prompt comes after the first turn: at the start either could be the first to
		// load the model, and all later pauses would depend on that.)
		for i := range 64 {
			rg.ask("/api/chat", warmBody("a", 7, fmt.Sprint("turn ", i), `,"options":{"num_predict":50}`))
			if i == 0 {
				if err := rg.h.Prewarm.Replace(warmLine("a", 1)); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(prewarmRest + 100*time.Millisecond)
		}
		if got := rg.results(); len(got) > 7 || len(got) == 0 {
			t.Errorf("beside a client that pauses for a second each time: %q", got)
		}
		rg.mu.Lock()
		rg.done = nil
		rg.mu.Unlock()
		time.Sleep(prewarmRestMost + time.Minute)
		if got := rg.results(); !slices.Equal(got, []string{"a warm"}) { // in two parts
			t.Errorf("then nobody asks: %q", got)
		}
		long := make(chan struct{})
		go func() { // ends with the answer
			rg.ask("/api/chat", warmBody("a", 8, "?", `,"options":{"num_predict":2000}`))
			close(long)
		}()
		time.Sleep(2 * time.Second)
		if err := rg.h.Prewarm.Replace(warmLine("a", 3)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		rg.want("while an answer is generated", "a warm")
		<-long
		time.Sleep(20 * time.Second)
		rg.want("then", "a warm", "a evaluated")
	})
}

// TestPrewarmAfterLoads: when its model was loaded again, a prompt is made warm again. An unloaded
// model is not loaded for it, unless the server was restarted.
func TestPrewarmAfterLoads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rg := newWarmRig(t, 1, []string{warmLine("a", 1)}, nil)
		time.Sleep(time.Minute)
		seen := []string{"a evaluated"}
		rg.want("at start", seen...)

		rg.ask("/api/generate", `{"model":"a","keep_alive":0}`)
		time.Sleep(time.Hour)
		rg.want("when it was unloaded", seen...)
		rg.ask("/api/chat", short("a", 7))
		time.Sleep(time.Minute)
		seen = append(seen, "a evaluated")
		rg.want("when a client had it loaded", seen...)
		rg.loads("when a client had it loaded", 2)
		if r, _ := rg.ask("/api/chat", short("a", 1)); r.Prompt-r.Cached > 20 {
			t.Errorf("%d of %d tokens were evaluated", r.Prompt-r.Cached, r.Prompt)
		}

		rg.ask("/api/chat", short("b", 7))
		time.Sleep(time.Hour)
		rg.want("when another model took its place", seen...)
		rg.loads("when another model took its place", 3)

		rg.ask("/api/chat", warmBody("a", 7, "?", `,"options":{"num_ctx":2048,"num_predict":5}`))
		time.Sleep(time.Hour)
		rg.want("when it was loaded with other options", seen...)
		rg.ask("/api/chat", short("a", 7))
		time.Sleep(time.Hour)
		seen = append(seen, "a evaluated")
		rg.want("when it was loaded with its own", seen...)
		rg.loads("when it was loaded with its own", 5)

		rg.sims[0].Crash()
		time.Sleep(time.Minute)
		rg.sims[0].Restart()
		time.Sleep(time.Minute)
		seen = append(seen, "a evaluated")
		rg.want("when the server was started anew", seen...)
		rg.loads("when the server was started anew", 6)
	})
}

// TestPrewarmEvictedElsewhere: a model that others have unloaded, bypassing the proxy, is not
// loaded again, even if the proxy does not know yet.
func TestPrewarmEvictedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rg := newWarmRig(t, 1, []string{warmLine("a", 1)}, nil)
		time.Sleep(time.Minute)
		rg.ask("/api/generate", `{"model":"a","keep_alive":0}`)
		answered := make(chan struct{})
		go func() { // ends with the answer
			rg.ask("/api/chat", short("a", 7))
			close(answered)
		}()
		<-answered
		unload := strings.NewReader(`{"model":"a","keep_alive":0}`)
		req, err := http.NewRequest("POST", "http://sim0/api/generate", unload)
		if err != nil {
			t.Fatal(err)
		}
		res, err := rg.h.Transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		time.Sleep(time.Hour)
		rg.want("when others had it unloaded", "a evaluated")
		rg.loads("when others had it unloaded", 2)
	})
}

// TestPrewarmFails: failed requests are retried, less and less often; refused ones are not.
func TestPrewarmFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rg := newWarmRig(t, 1, []string{warmLine("a", 1), warmLine("absent", 1)}, nil)
		fails := true
		rg.sims[0].SetFaults(func(r ollamasim.FaultRequest) *ollamasim.Fault {
			if !fails {
				return nil
			}
			return &ollamasim.Fault{Status: 500, Message: "as asked for"}
		})
		time.Sleep(time.Minute)
		rg.sims[0].SetFaults(nil)
		got := rg.results()
		other := func(s string) bool { return s != "a failed" }
		if len(got) < 3 || len(got) > 8 || slices.ContainsFunc(got, other) {
			t.Errorf("%q", got)
		}
		time.Sleep(5 * time.Minute)
		rg.want("when it works again", append(got, "a evaluated")...)
		if lines := rg.log.lines(t, "a prompt cannot be made warm before its model is there"); len(lines) != 1 {
			t.Errorf("of the model that is not there is logged %v", lines)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		rg := newWarmRig(t, 1, []string{warmLine("a", 1)}, nil)
		rg.sims[0].SetFaults(func(ollamasim.FaultRequest) *ollamasim.Fault {
			return &ollamasim.Fault{Status: 400, Message: "as asked for"}
		})
		time.Sleep(time.Hour)
		rg.want("refused", "a refused")
	})
}

// TestPrewarmReplaced: of a new file only the new requests are sent, and of a wrong file none.
func TestPrewarmReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rg := newWarmRig(t, 1, []string{warmLine("a", 1)}, nil)
		time.Sleep(time.Minute)
		if err := rg.h.Prewarm.Replace(warmLine("a", 1) + "\n{"); err == nil || rg.h.Prewarm.Len() != 1 {
			t.Errorf("%v, %d requests", err, rg.h.Prewarm.Len())
		}
		if err := rg.h.Prewarm.Replace(warmLine("a", 2) + "\n\n" + warmLine("a", 1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		rg.want("with another line", "a evaluated", "a evaluated")
	})
}

// TestPrewarmSeveral: with several servers, one gets the prompt, and the client finds it there; it
// does not matter that another server has a client.
func TestPrewarmSeveral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rg := newWarmRig(t, 2, []string{warmLine("a", 1)}, nil)
		time.Sleep(time.Minute)
		rg.want("at start", "a evaluated")
		if r, _ := rg.ask("/api/chat", short("a", 1)); r.Prompt-r.Cached > 20 {
			t.Errorf("%d of %d tokens were evaluated", r.Prompt-r.Cached, r.Prompt)
		}
		rg.mu.Lock()
		at := rg.done[0].Upstream
		rg.mu.Unlock()
		other := map[string]string{"sim0": "sim1", "sim1": "sim0"}[at]
		rg.ask("/api/generate", `{"model":"a","keep_alive":0}`)
		rg.ask("/api/chat", short("a", 7), headerUpstream+": "+at)
		there := headerUpstream + ": " + other
		rg.ask("/api/chat", warmBody("b", 7, "?", `,"options":{"num_predict":1}`), there)
		go rg.ask("/api/chat", warmBody("b", 7, "?", `,"options":{"num_predict":4000}`), there)
		time.Sleep(time.Minute)
		rg.want("after a load, beside a client of the other server", "a evaluated", "a evaluated")
		synctest.Wait()
		time.Sleep(time.Hour)
	})
}
