package coldstart

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
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
	all     = flag.Bool("all", false, "measure every case, and print the table")
	answers = flag.Int("answers", 8, "how many answers each client asks for")
)

const (
	system    = 200 // tokens of each client's system prompt
	question  = 100 // tokens after it, different each time
	stagger   = 3 * time.Millisecond
	think     = 5 * time.Millisecond // from an answer to the client's next request
	loadTime  = 2 * time.Second
	prefill   = time.Millisecond      // per token of a prompt
	decode    = 20 * time.Millisecond // per token of an answer
	fewest    = 4                     // clients
	usedSlots = 0.7                   // share of the server's time that an open load uses
)

// load is the arrival pattern of requests.
type load string

const (
	closed  load = "closed"  // each client sends its next request when the last one is answered
	crowded load = "crowded" // … and there are twice as many clients as slots
	open    load = "open"    // independent of answers
)

// scenario is a case of the table.
type scenario struct {
	slots, length       int // length: tokens of an answer
	compatible, streams bool
	load                load
}

func (c scenario) String() string {
	pick := func(b bool, yes, no string) string {
		if b {
			return yes
		}
		return no
	}
	return fmt.Sprintf("%s, %d slots, %d tokens, %s, %s", c.load, c.slots, c.length,
		pick(c.compatible, "v1", "native"), pick(c.streams, "stream", "whole"))
}

// clients returns the number of clients.
func (c scenario) clients() int {
	if c.load == crowded {
		return max(fewest, 2*c.slots)
	}
	return max(fewest, c.slots)
}

// body returns a client's request.
func (c scenario) body(client, number int) string {
	limit := fmt.Sprintf(`"options":{"num_predict":%d}`, c.length)
	if c.compatible {
		limit = fmt.Sprintf(`"max_tokens":%d`, c.length)
	}
	return fmt.Sprintf(`{"model":"m","stream":%t,%s,"messages":[{"role":"system","content":%q},`+
		`{"role":"user","content":%q}]}`, c.streams, limit, virtual.Words(1, uint64(client)+1, system),
		virtual.Words(2, uint64(client*1000+number)+1, question))
}

// outcome has the times of a run.
type outcome struct {
	makespan, first time.Duration // first: median time until the first byte of an answer
	evaluated       int64
}

// run lets the clients ask and returns the times. lanes is as in schedule.Config; direct means
// without a proxy.
func (c scenario) run(t *testing.T, direct bool, lanes int) (o outcome) {
	synctest.Test(t, func(t *testing.T) {
		n := virtual.Network{}
		transport := proxy.NewTransport()
		transport.DialContext = n.Dial
		defer transport.CloseIdleConnections()
		none := 0
		sim, err := ollamasim.New(ollamasim.Config{
			Parallel: c.slots, CacheRAMMiB: &none,
			Models: []ollamasim.Model{{
				Name: "m", LoadTime: loadTime,
				PromptRate: float64(time.Second / prefill), AnswerRate: float64(time.Second / decode),
			}},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer n.Serve(t, "sim", sim)()
		host := "sim"
		if !direct {
			where := &url.URL{Scheme: "http", Host: "sim"}
			up := upstream.NewServer("sim", where, transport, slog.New(slog.DiscardHandler))
			h := virtual.Proxy(t, []*upstream.Server{up}, transport, schedule.Config{Lanes: lanes})
			defer n.Serve(t, "proxy", h)()
			host = "proxy"
		}
		began := time.Now()
		firsts := c.ask(t, n, host)
		o.makespan = time.Since(began)
		slices.Sort(firsts)
		o.first, o.evaluated = firsts[len(firsts)/2], sim.Stats().Evaluated
	})
	return o
}

// ask lets all clients ask, and returns how long each request waited for the first byte of its
// answer.
func (c scenario) ask(t *testing.T, n virtual.Network, host string) []time.Duration {
	client := &http.Client{Transport: &http.Transport{
		DialContext: n.Dial, MaxIdleConnsPerHost: 1000, DisableCompression: true,
	}}
	defer client.CloseIdleConnections()
	path := "/api/chat"
	if c.compatible {
		path = "/v1/chat/completions"
	}
	var mu sync.Mutex
	var firsts []time.Duration
	one := func(who, number int) {
		sent := time.Now()
		body := strings.NewReader(c.body(who, number))
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+host+path, body)
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set(virtual.HeaderFrom, "127.0.0.1:1")
		res, err := client.Do(req)
		if err != nil {
			t.Error(err)
			return
		}
		defer res.Body.Close()
		_, err = io.ReadFull(res.Body, make([]byte, 1))
		first := time.Since(sent)
		_, rest := io.Copy(io.Discard, res.Body)
		if err != nil || rest != nil || res.StatusCode != http.StatusOK {
			t.Error(res.StatusCode, err, rest)
		}
		mu.Lock()
		defer mu.Unlock()
		firsts = append(firsts, first)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	if c.load == open {
		// The server's capacity: evaluations take turns, and answers are generated concurrently.
		each := (system + question) * prefill
		service := each + time.Duration(c.length)*decode
		gap := float64(max(each, service/time.Duration(c.slots))) / usedSlots
		r := rand.New(rand.NewPCG(1, 1))
		for number := range *answers {
			for who := range c.clients() {
				wg.Go(func() { one(who, number) })
				time.Sleep(time.Duration(r.ExpFloat64() * gap))
			}
		}
		wg.Wait()
		return firsts
	}
	for who := range c.clients() {
		wg.Go(func() {
			time.Sleep(time.Duration(who) * stagger)
			for number := range *answers {
				one(who, number)
				time.Sleep(think)
			}
		})
	}
	wg.Wait()
	return firsts
}

// cost is the cost of learning the number of slots: the time until all are answered, and the median
// time until the first byte of an answer, relative to direct; and the evaluated tokens, relative to
// those with the number given.
type cost struct{ makespan, first, evaluated float64 }

// most is the bound.
var most = cost{1.05, 1.10, 1.05}

func (c scenario) measure(t *testing.T) cost {
	direct, given, auto := c.run(t, true, 0), c.run(t, false, c.slots), c.run(t, false, 0)
	m := cost{
		makespan:  auto.makespan.Seconds() / direct.makespan.Seconds(),
		first:     auto.first.Seconds() / direct.first.Seconds(),
		evaluated: float64(auto.evaluated) / float64(given.evaluated),
	}
	t.Logf("makespan %.3f, first %.3f, evaluated %.3f; direct %v, %v; given %v, %v, %d",
		m.makespan, m.first, m.evaluated,
		direct.makespan, direct.first, given.makespan, given.first, given.evaluated)
	return m
}

// String returns a cell of the table, bold if it exceeds its bound.
func (m cost) String() string {
	cell := func(v, bound float64) string {
		text := fmt.Sprintf("%.2f", v)
		if v > bound {
			return "**" + text + "**"
		}
		return text
	}
	return cell(m.makespan, most.makespan) + " " + cell(m.first, most.first) + " " +
		cell(m.evaluated, most.evaluated)
}

// TestColdStart checks the cases that meet the bounds; docs/lanes.md has those that do not.
func TestColdStart(t *testing.T) {
	for _, c := range []scenario{
		{1, 20, false, true, closed},
		{1, 400, true, true, closed},
		{1, 400, false, true, open},
		{2, 400, false, true, closed},
		{4, 20, true, true, closed},
		{4, 400, false, true, closed},
		{4, 400, true, true, closed},
		{4, 20, false, false, closed},
		{4, 400, true, false, closed},
		{8, 20, true, true, open},
		{16, 400, true, true, closed},
		{16, 20, false, true, open},
	} {
		t.Run(c.String(), func(t *testing.T) {
			m := c.measure(t)
			if m.makespan > most.makespan || m.first > most.first || m.evaluated > most.evaluated {
				t.Errorf("%+v, want at most %+v", m, most)
			}
		})
	}
}

// TestTable prints the table of docs/lanes.md, with -all.
func TestTable(t *testing.T) {
	if !*all {
		t.Skip("-all is not given")
	}
	head := "\n| requests | slots | answers | stream | stream, /v1 | whole | whole, /v1 |\n" +
		"|---|---|---|---|---|---|---|\n"
	var rows strings.Builder
	for _, load := range []load{closed, crowded, open} {
		for _, slots := range []int{1, 2, 4, 8, 16} {
			if load == crowded && 2*slots <= fewest {
				continue // that is closed
			}
			for _, length := range []int{20, 400} {
				fmt.Fprintf(&rows, "| %s | %d | %d tokens |", load, slots, length)
				for kind := range 4 {
					c := scenario{slots, length, kind%2 == 1, kind < 2, load}
					t.Run(c.String(), func(t *testing.T) { fmt.Fprintf(&rows, " %v |", c.measure(t)) })
				}
				rows.WriteString("\n")
			}
		}
	}
	t.Log(head + rows.String())
}
