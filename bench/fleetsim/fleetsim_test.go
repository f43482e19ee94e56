package fleetsim

import (
	"context"
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

var full = flag.Bool("full", false, "64 servers, 8 proxies, 1,000 clients; otherwise an eighth of the servers and clients, and 3 proxies")

// size is how large a fleet and its load are.
type size struct {
	servers, proxies, clients int
	each                      int // requests of a client
}

func sizes() size {
	if *full {
		return size{servers: 64, proxies: 8, clients: 1000, each: 10}
	}
	return size{servers: 8, proxies: 3, clients: 125, each: 4}
}

const (
	prefixesPerServer = 4
	shared            = 1000 // tokens of a prefix
	own               = 50   // tokens after it
	answer            = 10   // tokens
)

// world is a fleet in memory, and what it serves.
type world struct {
	t      *testing.T
	n      virtual.Network
	sims   []*ollamasim.Server
	client *http.Client
	hosts  []string // of the proxies
	prefix func(i int) string
	system int

	mu    sync.Mutex
	trace map[string]messages
}

// messages counts what proxies sent each other.
type messages struct{ n, bytes int }

// newWorld starts servers and proxies in a bubble, until the test ends.
func newWorld(t *testing.T, z size) *world {
	w := &world{t: t, n: virtual.Network{}, trace: map[string]messages{}}
	for i := range z.servers {
		s, err := ollamasim.New(ollamasim.Config{Models: []ollamasim.Model{{
			Name: "m", LoadTime: 10 * time.Second, PromptRate: 1000, AnswerRate: 40,
		}}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.n.Serve(t, serverName(i), s))
		w.sims = append(w.sims, s)
	}
	for i := range z.proxies {
		w.start(i, z)
	}
	w.client = &http.Client{Transport: &http.Transport{
		DialContext: w.n.Dial, MaxIdleConnsPerHost: z.clients, DisableCompression: true,
	}}
	t.Cleanup(w.client.CloseIdleConnections)
	return w
}

func serverName(i int) string { return fmt.Sprintf("server%d", i) }

// start starts a proxy.
func (w *world) start(i int, z size) {
	transport := proxy.NewTransport()
	transport.DialContext = w.n.Dial
	w.t.Cleanup(transport.CloseIdleConnections)
	var ups []*upstream.Server
	for k := range z.servers {
		where := &url.URL{Scheme: "http", Host: serverName(k)}
		ups = append(ups, upstream.NewServer(where.Host, where, transport, slog.New(slog.DiscardHandler)))
	}
	h := virtual.Start(w.t, ups, transport, schedule.Config{}, func(h *proxy.Handler) {})
	host := fmt.Sprintf("proxy%d", i)
	w.t.Cleanup(w.n.Serve(w.t, host, virtual.From(h)))
	w.hosts = append(w.hosts, host)
}

// request is one chat.
type request struct {
	entry, prefix int
	id            uint64
	from          string
	priority      string
}

// ask sends a request, and returns how long the answer took.
func (w *world) ask(q request) time.Duration {
	body := fmt.Sprintf(`{"model":"m","stream":false,"options":{"num_predict":%d,"temperature":0},"messages":[`+
		`{"role":"system","content":%q},{"role":"user","content":%q}]}`,
		answer, virtual.Words(1, uint64(q.prefix), shared), virtual.Words(2, q.id+1, own))
	host := w.hosts[q.entry%len(w.hosts)]
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, "http://"+host+"/api/chat", strings.NewReader(body))
	if err != nil {
		w.t.Error(err)
		return 0
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(virtual.HeaderFrom, q.from+":1")
	if q.priority != "" {
		req.Header.Set("X-Cacheproxy-Priority", q.priority)
	}
	sent := time.Now()
	res, err := w.client.Do(req)
	if err != nil {
		w.t.Error(err)
		return 0
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		w.t.Errorf("%d %s %v", res.StatusCode, text, err)
	}
	return time.Since(sent)
}

// outcome is what a run came to.
type outcome struct {
	evaluated int64
	loads     int
	makespan  time.Duration
	latencies []time.Duration // sorted
	trace     map[string]messages
}

// crowd runs clients in closed loops, each of which asks for any prefix, some of which are asked for
// more often, at any entry.
func crowd(t *testing.T, z size) (o outcome) {
	began := time.Now()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, z)
		var mu sync.Mutex
		var wg sync.WaitGroup
		start := time.Now()
		for c := range z.clients {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(1, uint64(c)))
				time.Sleep(time.Duration(r.Int64N(int64(time.Second))))
				for n := range z.each {
					u := r.Float64()
					took := w.ask(request{
						entry: r.IntN(z.proxies), prefix: int(u * u * float64(z.servers*prefixesPerServer)),
						id: uint64(c*z.each + n), from: fmt.Sprintf("10.0.%d.%d", c/250, c%250),
					})
					mu.Lock()
					o.latencies = append(o.latencies, took)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		o.makespan = time.Since(start)
		for _, s := range w.sims {
			st := s.Stats()
			o.evaluated += st.Evaluated
			o.loads += st.Loads
		}
		o.trace = w.trace
	})
	slices.Sort(o.latencies)
	at := func(q float64) time.Duration {
		return o.latencies[int(q*float64(len(o.latencies)-1))].Round(time.Millisecond)
	}
	t.Logf("%d proxies: evaluated %d, loads %d, makespan %v, median %v, p99 %v; real time %v", z.proxies, o.evaluated, o.loads, o.makespan.Round(time.Millisecond), at(0.5), at(0.99), time.Since(began).Round(time.Millisecond))
	return o
}

func TestCrowd(t *testing.T) {
	z := sizes()
	one := z
	one.proxies = 1
	alone := crowd(t, one)
	_ = alone
	_ = context.Canceled
}
