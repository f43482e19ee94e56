//go:build unix

package candidates

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/virtual"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

var (
	total = flag.Int("candidates", 200, "how many candidates are rated")
	only  = flag.Int("mode", -1, "number of the one way to run it, from 0 on; -1: all")
)

const (
	shared       = 2000 // tokens of the prefix of all candidates' prompts
	own          = 50   // tokens after it
	answer       = 10   // tokens
	chatShared   = 500  // tokens of the prefix of all chats among them
	chatTurns    = 10   // of a chat
	chatEvery    = 100  // candidates per chat request
	pause        = 6 * time.Minute
	pauseEvery   = 5000 // candidates between pauses
	fewestRounds = 3    // at least, between pauses
)

// mode is one way to run the workload.
type mode struct {
	name        string
	proxied     bool
	upstreams   int
	clients     int // in closed loops: each sends its next request when the last one is answered
	interactive bool
	full        bool   // a model without a sliding window; otherwise one like gemma3
	version     string // of Ollama; "" means 0.34.1
}

var modes = []mode{
	{name: "direct, 1 client", upstreams: 1, clients: 1},
	{name: "direct, 8 clients", upstreams: 1, clients: 8},
	{name: "proxy, 1 client", proxied: true, upstreams: 1, clients: 1},
	{name: "proxy, 8 clients", proxied: true, upstreams: 1, clients: 8},
	{name: "direct, 8 clients, 8 upstreams", upstreams: 8, clients: 8},
	{name: "proxy, 8 clients, 8 upstreams", proxied: true, upstreams: 8, clients: 8},
	{name: "proxy, 16 clients, 8 upstreams", proxied: true, upstreams: 8, clients: 16},
	{name: "direct, 8 clients, interactive", upstreams: 1, clients: 8, interactive: true},
	{name: "proxy, 8 clients, interactive", proxied: true, upstreams: 1, clients: 8, interactive: true},
	{name: "proxy, 8 clients, interactive, no window", proxied: true, upstreams: 1, clients: 8, interactive: true, full: true},
	{name: "proxy, 16 clients, 8 upstreams, interactive", proxied: true, upstreams: 8, clients: 16, interactive: true},
	{name: "direct, 1 client, Ollama 0.24.0", upstreams: 1, clients: 1, version: "0.24.0"},
	{name: "proxy, 1 client, Ollama 0.24.0", proxied: true, upstreams: 1, clients: 1, version: "0.24.0"},
	{name: "proxy, 1 client, Ollama 0.24.0, no window", proxied: true, upstreams: 1, clients: 1, version: "0.24.0", full: true},
}

func TestCandidates(t *testing.T) {
	for i, m := range modes {
		if *only >= 0 && *only != i {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			before := usage(t)
			synctest.Test(t, func(t *testing.T) { m.run(t, before) })
		})
	}
}

// model returns a model like gemma3:12b.
func (m mode) model() ollamasim.Model {
	model := ollamasim.Gemma3()
	if m.full {
		model.TokenBytes, model.Window, model.WindowTokenBytes = model.TokenBytes+model.WindowTokenBytes, 0, 0
	}
	return model
}

func usage(t *testing.T) syscall.Rusage {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return u
}

func cpu(u syscall.Rusage) time.Duration {
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func (m mode) run(t *testing.T, before syscall.Rusage) {
	n := virtual.Network{}
	transport := proxy.NewTransport()
	transport.DialContext = n.Dial
	defer transport.CloseIdleConnections()
	var sims []*ollamasim.Server
	var ups []*upstream.Server
	for i := range m.upstreams {
		s, err := ollamasim.New(ollamasim.Config{Models: []ollamasim.Model{m.model()}, Version: m.version})
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("sim%d", i+1)
		defer n.Serve(t, name, s)()
		sims = append(sims, s)
		ups = append(ups, upstream.NewServer(name, &url.URL{Scheme: "http", Host: name}, transport, slog.New(slog.DiscardHandler)))
	}
	if m.proxied {
		defer n.Serve(t, "proxy", virtual.Proxy(t, ups, transport, schedule.Config{}))()
	}

	batch, chat := candidates(t), newChats(t)
	clients := &http.Client{Transport: &http.Transport{DialContext: n.Dial, MaxIdleConnsPerHost: 64, DisableCompression: true}}
	defer clients.CloseIdleConnections()
	ask := func(c int, priority, body string) []byte {
		host := "proxy"
		if !m.proxied {
			host = fmt.Sprintf("sim%d", c%m.upstreams+1)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+host+"/api/chat", strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return nil
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set(virtual.HeaderFrom, "10.0.0.1:1")
		if priority == "interactive" {
			req.Header.Set("X-Cacheproxy-Priority", priority)
			req.Header.Set(virtual.HeaderFrom, "10.0.0.2:1")
		}
		res, err := clients.Do(req)
		if err != nil {
			t.Error(err)
			return nil
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != http.StatusOK {
			t.Errorf("%d %s %v", res.StatusCode, text, err)
		}
		return text
	}

	began := time.Now()
	var waits []time.Duration // of interactive requests, for their answers
	rounds := max(fewestRounds, *total/pauseEvery)
	for round := range rounds {
		if round > 0 {
			time.Sleep(pause) // of virtual time
		}
		var next atomic.Int64
		next.Store(int64(*total * round / rounds))
		end := int64(*total * (round + 1) / rounds)
		wanted := make(chan int, *total)
		var wg, interactive sync.WaitGroup
		for c := range m.clients {
			wg.Go(func() {
				for i := next.Add(1) - 1; i < end && !t.Failed(); i = next.Add(1) - 1 {
					if m.interactive && i%chatEvery == chatEvery/2 {
						wanted <- int(i)
					}
					ask(c, "", batch(int(i)))
				}
			})
		}
		interactive.Go(func() {
			for i := range wanted {
				sent := time.Now()
				chat.answered(t, ask(i, "interactive", chat.next()))
				waits = append(waits, time.Since(sent))
			}
		})
		wg.Wait()
		close(wanted)
		interactive.Wait()
	}
	makespan := time.Since(began) - time.Duration(rounds-1)*pause
	m.report(t, sims, makespan, waits, before)
}

// report prints a row of the table, and checks it.
func (m mode) report(t *testing.T, sims []*ollamasim.Server, makespan time.Duration, waits []time.Duration, before syscall.Rusage) {
	var sum ollamasim.Stats
	for _, s := range sims {
		st := s.Stats()
		sum.Answered += st.Answered
		sum.Evaluated += st.Evaluated
		sum.Loads += st.Loads
		sum.Busy += st.Busy
	}
	least := shared + *total*own
	allowed := 1.005
	if len(waits) > 0 {
		s, chat := alone(t), newChats(t)
		for range waits {
			chat.answered(t, s.ask(t, chat.next()))
		}
		least += int(s.Stats().Evaluated)
		allowed = 1.02
	}
	if sum.Answered != *total+len(waits) {
		t.Errorf("%d requests were answered, want %d", sum.Answered, *total+len(waits))
	}
	even := ollamasim.Gemma3().LoadTime + sum.Busy/time.Duration(m.upstreams)
	after := usage(t)
	row := fmt.Sprintf("%-43s  evaluated %10d (%.4f of least)  loads %3d  makespan %v (%.3f of even)  CPU %.0f s  peak RSS %d MB",
		m.name, sum.Evaluated, float64(sum.Evaluated)/float64(least), sum.Loads, makespan.Round(time.Second), makespan.Seconds()/even.Seconds(),
		(cpu(after) - cpu(before)).Seconds(), after.Maxrss>>10)
	if len(waits) > 0 {
		slices.Sort(waits)
		row += fmt.Sprintf("  %d interactive answered in %v, longest %v", len(waits), waits[len(waits)/2].Round(time.Millisecond), waits[len(waits)-1].Round(time.Millisecond))
	}
	t.Log(row)
	if !m.proxied || m.clients <= m.upstreams && m.upstreams > 1 {
		// With no more concurrent requests than upstreams, one that would have to load may never
		// get any.
		return
	}
	// Each upstream in use has to read the prefix once, and that of a chat which arrives there.
	each := shared
	if m.interactive {
		each += chatShared + chatTurns*(own+2*answer)
	}
	if m.version != "" && !m.full {
		// This engine reuses nothing of a prompt that is longer than the window.
		least = (shared + own) * *total
	} else if m.interactive && !m.full {
		// This engine, once a prompt was evicted, evaluates the prefix's last token with each that
		// follows.
		least += *total
	}
	if limit := allowed * float64(least+(m.upstreams-1)*each); float64(sum.Evaluated) > limit {
		t.Errorf("%d tokens were evaluated, want at most %.0f", sum.Evaluated, limit)
	}
	if sum.Loads != m.upstreams {
		t.Errorf("%d loads, want %d", sum.Loads, m.upstreams)
	}
	// Not all upstreams are needed from the first request on.
	if late := makespan - ollamasim.Gemma3().LoadTime; late.Seconds() > 1.05*even.Seconds() {
		t.Errorf("it took %v, an even split %v", makespan, even)
	}
}

// sizes returns how many words a system message and a user message need for prompts with the given
// number of common tokens, and with own further ones; the template adds some tokens, too.
func sizes(t *testing.T, common int) (system, user int) {
	s := alone(t)
	for i := range 2 {
		s.ask(t, body(message("system", virtual.Words(1, 0, common))+","+message("user", virtual.Words(1, uint64(i)+1, own))))
	}
	e := s.Evaluations(ollamasim.Mark{})[1]
	return 2*common - e.Reused, 2*own - e.Evaluated
}

// server is a simulated server without other users and without a window, so that it evaluates no
// token that it has cached.
type server struct{ *ollamasim.Server }

func alone(t *testing.T) server {
	m := ollamasim.Gemma3()
	m.Window = 0
	s, err := ollamasim.New(ollamasim.Config{Models: []ollamasim.Model{m}})
	if err != nil {
		t.Fatal(err)
	}
	return server{s}
}

func (s server) ask(t *testing.T, body string) []byte {
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/api/chat", strings.NewReader(body)))
	if w.Code != http.StatusOK {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	return w.Body.Bytes()
}

func message(role, text string) string {
	return fmt.Sprintf(`{"role":%q,"content":%q}`, role, text) // the words need no escapes
}

func body(messages string) string {
	return fmt.Sprintf(`{"model":"gemma3:12b","stream":false,"options":{"num_predict":%d,"temperature":0},"messages":[%s]}`, answer, messages)
}

// candidates returns the candidates' requests by number.
func candidates(t *testing.T) func(int) string {
	system, user := sizes(t, shared)
	rubric := message("system", virtual.Words(1, 0, system))
	return func(i int) string { return body(rubric + "," + message("user", virtual.Words(1, uint64(i)+1, user))) }
}

// chats is a person who chats: some turns, then a new conversation.
type chats struct {
	system, user int
	messages     string
	turns        int
}

func newChats(t *testing.T) *chats {
	system, user := sizes(t, chatShared)
	return &chats{system: system, user: user}
}

func (c *chats) next() string {
	if c.turns%chatTurns == 0 {
		c.messages = message("system", virtual.Words(2, 0, c.system))
	}
	c.turns++
	c.messages += "," + message("user", virtual.Words(2, uint64(c.turns), c.user))
	return body(c.messages)
}

func (c *chats) answered(t *testing.T, text []byte) {
	var answer struct{ Message struct{ Content string } }
	if err := json.Unmarshal(text, &answer); err != nil {
		t.Error(err)
	}
	c.messages += "," + message("assistant", answer.Message.Content)
}
