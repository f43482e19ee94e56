package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
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

// In these tests people send requests through the whole proxy beside a script's backlog, to a
// simulated Ollama in virtual time.

const (
	frontAddress  = "10.9.0.1"
	scriptAddress = "10.9.0.7"
	scriptAgent   = "python-httpx/0.28.1"
)

// office is a proxy with serve's settings, and its simulated server.
type office struct {
	house
	t      *testing.T
	sim    *ollamasim.Server
	client *http.Client

	before int64 // tokens evaluated for loading the models

	mu      sync.Mutex
	longest time.Duration // that a request spent at the server; guarded by mu
}

// who is a sender of requests.
type who struct {
	peer    string   // the address of the connection
	headers []string // name: value
	user    string   // named in bodies; a script has one for each request, beginning with this
	whole   bool     // without streaming, as the script asks
	every   int      // of a script: one in this many requests comes from another program; 0: none
}

// headerPeer is the client's address in these tests, since connections in memory have none.
const headerPeer = "X-Test-Peer"

func newOffice(t *testing.T, house house, trusted ...string) *office {
	// ReverseProxy sets a timer for each answer, which fires at once. In a bubble, two of these
	// must not fire at the same time: Go 1.26's race detector then crashes (in
	// runtime.(*timer).unlockAndRun).
	procs := runtime.GOMAXPROCS(1)
	t.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	cacheMiB, lanes := 8192, 0
	if house.forget {
		cacheMiB = 0
	}
	if house.told {
		lanes = house.slots
	}
	cfg := ollamasim.Config{Parallel: house.slots, CacheRAMMiB: &cacheMiB, Models: []ollamasim.Model{
		{Name: "m", LoadTime: time.Second, NumCtx: 16384},
		{Name: "e", LoadTime: time.Second, Embedding: true},
	}}
	sim, err := ollamasim.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	o := &office{house: house, t: t, sim: sim}
	listeners := map[string]*ollamasim.Listener{
		"sim:80": ollamasim.Listen(), "proxy:80": ollamasim.Listen(),
	}
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		return listeners[addr].DialContext(ctx, network, addr)
	}
	transport := NewTransport()
	transport.DialContext = dial
	at := &url.URL{Scheme: "http", Host: "sim"}
	up := upstream.NewServer("sim", at, transport, slog.New(slog.DiscardHandler))
	keep, err := ParseKeepAlive(IfAbsent, []string{"24h"})
	if err != nil {
		t.Fatal(err)
	}
	h := &Handler{
		Upstreams: []*upstream.Server{up}, Transport: transport, KeepAlive: keep,
		Lanes:  schedule.NewScheduler(schedule.Config{Lanes: lanes}),
		Ledger: savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 1e6, Bytes: 1 << 28}), 10),
		Guard:  Guard{AllowHosts: []string{"*"}}, Trusted: trusting(t, trusted...),
		Done: func(ex Exchange) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.longest = max(o.longest, ex.Duration-ex.Waited)
		},
	}
	h.Init()
	up.Polled = func(st upstream.State) { h.Polled(up, st) }
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	serve := func(name string, handler http.Handler) {
		srv := &http.Server{Handler: handler}
		wg.Go(func() { srv.Serve(listeners[name]) }) // ends with the test
		context.AfterFunc(ctx, func() { srv.Close() })
	}
	serve("sim:80", sim)
	serve("proxy:80", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = r.Header.Get(headerPeer) + ":1"
		h.ServeHTTP(w, r)
	}))
	up.Poll(ctx)
	wg.Go(func() { up.Run(ctx) })
	wg.Go(func() { h.Run(ctx) })
	o.client = &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true}}
	t.Cleanup(func() {
		o.client.CloseIdleConnections()
		cancel()
		transport.CloseIdleConnections()
		wg.Wait()
	})
	somebody := who{peer: "10.9.0.99"}
	o.ask(somebody, "/api/embed", `{"model":"e","input":"x"}`)
	o.ask(somebody, "/api/chat", somebody.chatBody(1, turn("user", "x")))
	synctest.Wait() // until the proxy has recorded both
	o.before, o.longest = sim.Stats().Evaluated, 0
	return o
}

// reply is the end of an answer, and how long its request waited in the proxy.
type reply struct {
	Message struct{ Content string }
	Prompt  int `json:"prompt_eval_count"`
	Cached  int `json:"prompt_eval_cached_count"`
	waited  time.Duration
}

func (o *office) ask(w who, path, body string) reply {
	req, err := http.NewRequest(http.MethodPost, "http://proxy"+path, strings.NewReader(body))
	if err != nil {
		o.t.Error(err)
		return reply{}
	}
	req.Header.Set(headerPeer, w.peer)
	for _, h := range w.headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	res, err := o.client.Do(req)
	if err != nil {
		o.t.Error(err)
		return reply{}
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		o.t.Errorf("%d %s %v", res.StatusCode, text, err)
	}
	waited, err := time.ParseDuration(res.Header.Get(headerWaited) + "s")
	if err != nil {
		o.t.Error(err)
	}
	r, said := reply{waited: waited}, ""
	for line := range bytes.Lines(text) {
		if err := json.Unmarshal(line, &r); err != nil {
			o.t.Errorf("%s: %v", line, err)
		}
		said += r.Message.Content
	}
	r.Message.Content = said
	return r
}

// say returns a text of about n simulated tokens, which begins differently for each id.
func say(id uint64, n int) string {
	rnd := rand.New(rand.NewPCG(1, id))
	var b strings.Builder
	for i := range n {
		x := id
		if i > 0 {
			x = uint64(rnd.Uint32())
		}
		b.WriteByte(' ')
		for range 5 {
			b.WriteByte(byte('a' + x%26))
			x /= 26
		}
	}
	return b.String()
}

func turn(role, text string) string { return fmt.Sprintf(`{"role":%q,"content":%q}`, role, text) }

func (w who) chatBody(answer int, turns ...string) string {
	return fmt.Sprintf(`{"model":"m","user":%q,"stream":%v,"options":{"num_predict":%d},"messages":[%s]}`,
		w.user, !w.whole, answer, strings.Join(turns, ","))
}

const (
	backlog      = 500 // requests
	scriptPrompt = 500 // tokens that they have in common
	scriptOwn    = 50  // … and that differ
	scriptAnswer = 20  // tokens, for each slot: so the script takes about four minutes
)

// scriptTurn is the beginning of all of the script's prompts.
var scriptTurn = turn("system", say(1, scriptPrompt))

// script sends all of its requests at once, and returns when all are answered.
func (o *office) script(w who) {
	w.headers, w.whole = append([]string{"User-Agent: " + scriptAgent}, w.headers...), true
	var wg sync.WaitGroup
	for i := range backlog {
		w := w
		if w.user != "" {
			w.user = fmt.Sprint(w.user, i)
		}
		if w.every > 0 && i%w.every == 0 {
			w.headers = append(slices.Clip(w.headers), fmt.Sprint("X-OpenWebUI-User-Id: ", i))
		}
		wg.Go(func() {
			o.ask(w, "/api/chat", w.chatBody(scriptAnswer*o.slots,
				scriptTurn, turn("user", say(uint64(1000+i), scriptOwn))))
		})
	}
	wg.Wait()
}

// pauses returns times about as long as a person thinks. They vary, so that no person keeps step
// with the script.
func pauses(id uint64, think time.Duration) func() time.Duration {
	rnd := rand.New(rand.NewPCG(2, id))
	return func() time.Duration { return think*9/10 + time.Duration(rnd.Int64N(int64(think/5))) }
}

// chat is a conversation, turn by turn, with a pause after each answer.
func (o *office) chat(w who, id uint64, turns int, think time.Duration, told func(reply)) {
	said := []string{turn("system", say(id, 100))}
	pause := pauses(id, think)
	for i := range turns {
		time.Sleep(pause())
		said = append(said, turn("user", say(id*1000+uint64(i), 40)))
		r := o.ask(w, "/api/chat", w.chatBody(30, said...))
		said = append(said, turn("assistant", r.Message.Content))
		told(r)
	}
}

// openWebUI is a request as sent by Open WebUI if it is configured to name its users
// (ENABLE_FORWARD_USER_INFO_HEADERS).
func openWebUI(peer, user string) who {
	return who{peer: peer, headers: []string{
		"User-Agent: Python/3.11 aiohttp/3.12.15",
		"X-OpenWebUI-User-Name: " + user, "X-OpenWebUI-User-Id: id-" + user,
		"X-OpenWebUI-User-Email: " + user + "@example.com", "X-OpenWebUI-User-Role: user",
		"X-OpenWebUI-Chat-Id: chat-" + user,
	}}
}

// beside is a group of people who ask beside a script.
type beside struct {
	name    string
	script  who
	people  []who
	trusted []string
	alike   bool // their requests look like the script's: only their identity differs
	embeds  bool // they want embeddings
	// The longest wait, in requests, on four slots that were set, if that misses the target;
	// otherwise 0.
	four int
}

// house is the setup of the server.
type house struct {
	slots  int
	told   bool     // the proxy's number of slots is set
	forget bool     // without a host cache, a prompt that loses its slot is evaluated again
	only   []string // which people ask; nil: all
}

func (h house) String() string {
	text := fmt.Sprint(h.slots, " slots")
	if !h.told {
		text += " learned"
	}
	if h.forget {
		text += ", no host cache"
	}
	return text
}

// turns returns how often each of some people asks, and their pause in between.
func (h house) turns(people int) (turns int, think time.Duration) {
	switch {
	case people > 1:
		return 2, 65 * time.Second
	case h.forget:
		return 2, 80 * time.Second // each evicts one prompt of the script, 2 % of its tokens
	}
	return 20, 8 * time.Second
}

// ask lets a person ask now and then while the script has requests left.
func (b beside) ask(o *office, i int, told func(reply)) {
	turns, think := o.turns(len(b.people))
	time.Sleep(time.Duration(i) * think / time.Duration(len(b.people)))
	w := b.people[i]
	if !b.alike && !b.embeds {
		o.chat(w, uint64(100+i), turns, think, told)
		return
	}
	pause := pauses(uint64(i), think)
	for n := range uint64(turns) {
		time.Sleep(pause())
		if b.embeds {
			told(o.ask(w, "/api/embed", fmt.Sprintf(`{"model":"e","input":%q}`, say(n, 100))))
		} else {
			told(o.ask(w, "/api/chat", w.chatBody(30, scriptTurn, turn("user", say(9000+n, 40)))))
		}
	}
}

// run lets the people ask, and checks how long they wait and what it costs the script, which
// evaluates alone tokens without them.
func (b beside) run(t *testing.T, h house, alone int64) {
	o := newOffice(t, h, b.trusted...)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var waits []time.Duration
	var own int64
	began := time.Now()
	var took time.Duration
	wg.Go(func() {
		o.script(b.script)
		took = time.Since(began)
	})
	for i := range b.people {
		wg.Go(func() {
			b.ask(o, i, func(r reply) {
				mu.Lock()
				defer mu.Unlock()
				waits = append(waits, r.waited)
				own += int64(r.Prompt - r.Cached)
			})
		})
	}
	wg.Wait()
	synctest.Wait() // until the proxy has recorded all
	slices.Sort(waits)
	p99 := waits[(len(waits)*99+99)/100-1]
	more := float64(o.sim.Stats().Evaluated-o.before-own) / float64(alone)
	t.Logf("%d asked, and waited for %v (median), %v (p99); a request takes up to %v; the script takes %v"+
		" and evaluates %.3f times as much", len(waits), waits[len(waits)/2], p99, o.longest, took, more)
	// They wait for one running request; if several people ask at once, for one of theirs, too.
	bound := min(2, len(b.people))
	if h.told && h.slots == 4 {
		bound = max(bound, b.four)
	}
	if p99 > time.Duration(bound)*o.longest {
		t.Errorf("p99 of the waits is %v, longer than %d requests take", p99, bound)
	}
	if more > 1.05 {
		t.Errorf("the script had %.3f times as many tokens evaluated", more)
	}
}

// TestPeopleFirst: beside 500 requests of a script, people wait for at most one running request of
// each lane, however they can be told from the script; and the script evaluates almost nothing
// again.
func TestPeopleFirst(t *testing.T) {
	const (
		userAgent, browser = "User-Agent: " + scriptAgent, "User-Agent: Mozilla/5.0"
		forwarded          = "X-Forwarded-For: "

		prompt, users = "another system prompt", "20 people in Open WebUI"
	)
	one := func(peer string, headers ...string) []who {
		return []who{{peer: peer, headers: headers, whole: true}}
	}
	var inOpenWebUI, each []who
	for i := range 20 {
		inOpenWebUI = append(inOpenWebUI, openWebUI(frontAddress, fmt.Sprint("user", i)))
		each = append(each, one(fmt.Sprint("192.0.2.", i+10), userAgent)...)
	}
	here, front := who{peer: scriptAddress}, who{peer: frontAddress}
	trusted := []string{frontAddress}
	cases := []beside{
		{name: "another address", alike: true, script: here, people: one("10.9.0.8", userAgent)},
		{name: "another User-Agent", alike: true, script: here, people: one(scriptAddress, browser)},
		// The first two or three times, what they evict counts as lost, until it is known whether
		// the host cache has it; and what goes first within a program has to be paid for in
		// advance.
		{name: prompt, script: here, people: one(scriptAddress, userAgent), four: 2},
		{
			name: "behind nginx", alike: true, trusted: trusted,
			script: who{peer: frontAddress, headers: []string{forwarded + "192.0.2.1"}},
			people: one(frontAddress, userAgent, forwarded+"192.0.2.2"),
		},
		{name: "in Open WebUI", alike: true, script: front, people: inOpenWebUI[:1]},
		{
			name: "another user in the body", alike: true, script: here,
			people: []who{{peer: scriptAddress, headers: []string{userAgent}, user: "ann", whole: true}},
		},
		{
			name:   "beside a user for each request",
			script: who{peer: scriptAddress, user: "applicant"}, people: one(scriptAddress, browser),
		},
		// A client with many programs has no busiest one to compare the others with, so some of its
		// own requests go first.
		{
			name: "another address, beside a program for each request", alike: true,
			script: who{peer: scriptAddress, every: 1}, people: one("10.9.0.8", userAgent),
		},
		{
			name: "another address, beside a program for every second request", alike: true,
			script: who{peer: scriptAddress, every: 2}, people: one("10.9.0.8", userAgent),
		},
		{name: "embeddings", script: here, people: one(scriptAddress, userAgent), embeds: true},
		{name: "20 people, 20 addresses", alike: true, script: here, people: each},
		// That is charged to them as if it were lost, so they go first less often than they could.
		{name: users, script: front, people: inOpenWebUI},
		{name: "20 people in a trusted Open WebUI", trusted: trusted, script: front, people: inOpenWebUI},
	}
	for _, h := range []house{
		{slots: 1, told: true},
		{slots: 4, told: true, only: []string{prompt, users}},
		{slots: 4, only: []string{prompt, users}},
		{slots: 1, told: true, forget: true, only: []string{prompt}},
	} {
		var alone int64
		synctest.Test(t, func(t *testing.T) {
			o := newOffice(t, h)
			o.script(who{peer: scriptAddress})
			alone = o.sim.Stats().Evaluated - o.before
		})
		for _, c := range cases {
			if slices.Contains(h.only, c.name) || h.only == nil {
				t.Run(fmt.Sprint(c.name, ", ", h), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { c.run(t, h, alone) })
				})
			}
		}
	}
}
