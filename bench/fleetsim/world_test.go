package fleetsim

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/virtual"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	shared = 1000 // tokens of a prefix
	own    = 50   // tokens after it
	answer = 10   // tokens
	// settled is how long servers and proxies have to find each other.
	settled = 5 * time.Second
)

// size is how large a fleet and its load are.
type size struct {
	servers, proxies int
	clients          int  // in closed loops
	each             int  // requests of a client
	lanes            int  // slots, if they are given; 0: they are learned
	noCache          bool // servers have no host cache
}

// world is a fleet in memory.
type world struct {
	t      *testing.T
	size   size
	n      virtual.Network
	sims   []*ollamasim.Server
	fleets []*fleet.Fleet // none if there is one proxy
	client *http.Client

	mu   sync.Mutex
	sent map[string]messages // between proxies, by kind
}

// messages are what proxies sent each other.
type messages struct{ n, bytes int }

// newWorld starts servers and proxies in a bubble, until the test ends.
func newWorld(t *testing.T, z size) *world {
	w := &world{t: t, size: z, n: virtual.Network{}, sent: map[string]messages{}}
	config := ollamasim.Config{Models: []ollamasim.Model{{
		Name: "m", LoadTime: 10 * time.Second, PromptRate: 1000, AnswerRate: 40,
	}}}
	if z.noCache {
		config.CacheRAMMiB = new(int)
	}
	for i := range z.servers {
		s, err := ollamasim.New(config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.n.Serve(t, serverName(i), s))
		w.sims = append(w.sims, s)
	}
	peers := make([]*ollamasim.Listener, z.proxies) // all listen before one is started
	for i := range peers {
		peers[i] = ollamasim.Listen()
		w.n[peerName(i)] = peers[i]
		w.n[proxyName(i)] = ollamasim.Listen()
	}
	for i, ln := range peers {
		w.start(i, ln)
	}
	w.client = &http.Client{Transport: &http.Transport{
		DialContext: w.n.Dial, MaxIdleConnsPerHost: 4 * z.clients, DisableCompression: true,
	}}
	t.Cleanup(w.client.CloseIdleConnections)
	time.Sleep(settled)
	for i, f := range w.fleets {
		for _, p := range f.Peers() {
			if !p.Up {
				t.Errorf("proxy %d does not see %s: %s", i, p.Address, p.Error)
			}
		}
	}
	return w
}

func serverName(i int) string { return fmt.Sprintf("server%d", i) }
func proxyName(i int) string  { return fmt.Sprintf("proxy%d", i) }
func peerName(i int) string   { return fmt.Sprintf("peer%d", i) }

// start starts a proxy.
func (w *world) start(i int, peers *ollamasim.Listener) {
	transport := proxy.NewTransport()
	transport.DialContext = w.n.Dial
	w.t.Cleanup(transport.CloseIdleConnections)
	var ups []*upstream.Server
	for k := range w.size.servers {
		where := &url.URL{Scheme: "http", Host: serverName(k)}
		ups = append(ups, upstream.NewServer(where.Host, where, transport, slog.New(slog.DiscardHandler)))
	}
	h := virtual.Start(w.t, ups, transport, schedule.Config{Lanes: w.size.lanes}, func(h *proxy.Handler) {
		if w.size.proxies > 1 {
			h.Fleet = w.join(i, h)
		}
	})
	w.t.Cleanup(virtual.Serve(w.t, w.n[proxyName(i)], virtual.From(h)))
	if h.Fleet != nil {
		w.t.Cleanup(virtual.Serve(w.t, peers, h.Fleet.Handler(h)))
		w.fleets = append(w.fleets, h.Fleet)
	}
}

// join makes a proxy one of the fleet.
func (w *world) join(i int, h *proxy.Handler) *fleet.Fleet {
	var peers static
	for k := range w.size.proxies {
		if k != i {
			peers = append(peers, peerName(k)+":1")
		}
	}
	c := fleet.Config{
		Name: proxyName(i), Sources: []fleet.Source{peers}, Secret: []byte("secret"),
		Transport: fleet.NewTransport(w.n.Dial, nil),
		Trace: func(kind string, bytes int) {
			w.mu.Lock()
			defer w.mu.Unlock()
			m := w.sent[kind]
			w.sent[kind] = messages{m.n + 1, m.bytes + bytes}
		},
	}
	h.Join(&c)
	return fleet.New(c)
}

// static are addresses that never change.
type static []string

func (s static) Watch(ctx context.Context, found func([]string)) {
	found(s)
	<-ctx.Done()
}

func (s static) String() string { return strings.Join(s, ",") }

// request is one chat.
type request struct {
	entry    int // the number of the proxy that receives it
	prefix   int
	id       int    // no other request has it
	from     string // the client's address
	priority string
}

// ask sends a request, and returns how long the answer took.
func (w *world) ask(q request) time.Duration {
	body := fmt.Sprintf(`{"model":"m","stream":false,"options":{"num_predict":%d,"temperature":0},"messages":[`+
		`{"role":"system","content":%q},{"role":"user","content":%q}]}`,
		answer, virtual.Words(1, uint64(q.prefix), shared), virtual.Words(2, uint64(q.id)+1, own))
	where := "http://" + proxyName(q.entry%w.size.proxies) + "/api/chat"
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, where, strings.NewReader(body))
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
