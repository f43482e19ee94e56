package main

import (
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/text"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// request is one chat.
type request struct {
	id       int
	prefix   int // index of its prefix in the workload, if that matters
	model    string
	numCtx   int
	messages []chat.Message
	generate int
	priority string
}

// workload has the requests of some clients. Each client is a list of requests.
type workload struct {
	name    string
	config  realollama.Config
	servers int // 0 means one
	clients [][]request
	least   []request   // the same requests in the best order, for one client
	best    [][]request // … or for several clients, one after the other
	// Clients send all requests at once; otherwise one after the other, when the last one is
	// answered.
	open      bool
	depth     int      // … or this many at a time
	chats     bool     // answers become messages: the next request includes the last answer
	addresses []string // the clients' addresses; nil: one for all
	retries   bool     // clients send failed requests again
	runs      int      // of which the median is used; 0 means one
	// events returns the actions to take after a number of answered requests.
	events func(p *player, servers []*realollama.Server) map[int]func() error
}

// config returns a server's configuration, with a host cache of the default size or none; era A has
// none.
func (b *bench) config(slots int, hostCache bool) realollama.Config {
	c := realollama.Config{Models: []string{b.model}, Parallel: slots, KeepAlive: "10m"}
	if !hostCache && b.era != realollama.EraA {
		c.CacheRAMMiB = new(int)
	}
	return c
}

// chat returns a request with a prefix of about 600 tokens and a tail of 30.
func (b *bench) chat(id, prefix, n int) request {
	return request{id: id, prefix: prefix, model: b.model, generate: 4, messages: []chat.Message{chat.System(text.Words(uint64(prefix), 250)), chat.User(text.Words(uint64(1000*prefix+n+7), 12))}}
}

// shuffled has many prefixes in turn.
func (b *bench) shuffled(slots int, hostCache bool) workload {
	name := "small"
	if hostCache {
		name = "ample"
	}
	w := workload{
		name: fmt.Sprintf("32 prefixes × 4, 8 clients, %s, %s host cache", text.Plural(slots, "slot"), name), config: b.config(slots, hostCache),
		open: true, clients: make([][]request, 8),
	}
	for n := range 4 {
		for p := range 32 {
			id := n*32 + p
			w.clients[id%8] = append(w.clients[id%8], b.chat(id, p+1, n))
		}
	}
	for p := range 32 {
		for n := range 4 {
			w.least = append(w.least, b.chat(n*32+p, p+1, n))
		}
	}
	return w
}

// scripts has closed loops, each with one prefix.
func (b *bench) scripts(each int) workload {
	w := workload{name: fmt.Sprintf("4 closed-loop scripts × %d, 1 slot, small host cache", each), config: b.config(1, false), clients: make([][]request, 4)}
	for s := range 4 {
		for n := range each {
			q := b.chat(s*each+n, 100+s, n)
			w.clients[s] = append(w.clients[s], q)
			w.least = append(w.least, q)
		}
	}
	return w
}

func (b *bench) hot(slots int) workload {
	w := workload{name: fmt.Sprintf("one hot prefix × 128, 8 clients, %s", text.Plural(slots, "slot")), config: b.config(slots, true), clients: make([][]request, 8), runs: 3}
	for n := range 128 {
		q := b.chat(n, 200, n)
		w.clients[n%8] = append(w.clients[n%8], q)
		w.least = append(w.least, q)
	}
	return w
}

func (b *bench) numCtx() workload {
	w := workload{name: "two num_ctx × 20 in turn, 4 clients", config: b.config(1, true), open: true, clients: make([][]request, 4)}
	for n := range 40 {
		q := b.chat(n, 300, n)
		q.numCtx = []int{2048, 4096}[n%2]
		w.clients[n/2%4] = append(w.clients[n/2%4], q)
		w.least = append(w.least, q)
	}
	slices.SortStableFunc(w.least, func(a, b request) int { return a.numCtx - b.numCtx })
	return w
}

// runners has two models that cannot be loaded together, each with two num_ctx. In closed loops
// each client has one pair.
func (b *bench) runners(open bool) workload {
	const second = "gen-llama-tiny-b"
	n := 100
	if !open {
		n = 40
	}
	w := workload{name: fmt.Sprintf("two models × two num_ctx, %d requests in turn, all queued", n), config: b.config(1, true), open: open, clients: make([][]request, 4)}
	if !open {
		w.name = fmt.Sprintf("two models × two num_ctx, %d requests, 4 closed-loop clients with one each", n)
	}
	w.config.Models, w.config.MaxLoaded = append(w.config.Models, second), 1
	for n := range n {
		q := b.chat(n, 350, n)
		q.model = []string{b.model, second}[n%2]
		q.numCtx = []int{2048, 4096}[n/2%2]
		client := n % 4
		if open {
			client = n / 4 % 4
		}
		w.clients[client] = append(w.clients[client], q)
	}
	for runner := range 4 {
		for _, list := range w.clients {
			for _, q := range list {
				if q.id%4 == runner {
					w.least = append(w.least, q)
				}
			}
		}
	}
	return w
}

const (
	chatClients = 4
	chatTurns   = 10
)

func (b *bench) chats(slots int) workload {
	w := workload{
		name:   fmt.Sprintf("%d chats of %d turns, one system prompt, %s, small host cache", chatClients, chatTurns, text.Plural(slots, "slot")),
		config: b.config(slots, false), chats: true, clients: make([][]request, chatClients),
	}
	for c := range w.clients {
		for turn := range chatTurns {
			w.clients[c] = append(w.clients[c], request{
				id: c*100 + turn, model: b.model, generate: 8,
				messages: []chat.Message{chat.System(text.Words(700, 250)), chat.User(text.Words(uint64(7000+100*c+turn), 30))},
			})
		}
	}
	w.best = w.clients
	return w
}

func (b *bench) mixed() workload {
	w := workload{name: "8 interactive among 80 batch, 1 slot, small host cache", config: b.config(1, false), open: true, clients: make([][]request, 9)}
	for n := range 80 {
		q := b.chat(n, 400+n/20, n)
		q.priority = "batch"
		w.clients[n%8] = append(w.clients[n%8], q)
		w.least = append(w.least, q)
	}
	for n := range 8 {
		q := b.chat(1000+n, 500, n)
		q.priority = "interactive"
		w.clients[8] = append(w.clients[8], q)
		w.least = append(w.least, q)
	}
	return w
}

// batch is 500 requests at once; with also, an interactive one arrives when 100 of them have been
// answered.
func (b *bench) batch(also bool) workload {
	w := workload{name: "500 batch, 1 slot, small host cache", config: b.config(1, false), open: true, clients: make([][]request, 1)}
	for n := range 500 {
		q := b.chat(n, 410+n%25, n)
		q.priority = "batch"
		w.clients[0] = append(w.clients[0], q)
	}
	w.least = slices.Clone(w.clients[0])
	slices.SortStableFunc(w.least, func(a, b request) int { return a.prefix - b.prefix })
	if also {
		q := b.chat(1000, 500, 0)
		q.priority = "interactive"
		w.name = "one interactive among 500 batch (25 prefixes), 1 slot, small host cache"
		w.least = append(w.least, q)
		w.events = func(p *player, _ []*realollama.Server) map[int]func() error {
			return map[int]func() error{100: func() error { p.send(chat.ClientFrom(""), 1, q); return nil }}
		}
	}
	return w
}

const (
	longs, shorts = 70, 740
	backlog       = 16 // requests that each of the two clients has under way
)

// unequal has two clients that always have requests waiting; one of them sends larger ones. No two
// prompts have anything in common.
func (b *bench) unequal() workload {
	w := workload{
		name: "two backlogged clients, prompts of 1,200 and of 60 tokens, 1 slot", config: b.config(1, false),
		depth: backlog, addresses: []string{"127.0.0.1", "127.0.0.2"}, clients: make([][]request, 2),
	}
	for i, n := range []int{longs, shorts} {
		for k := range n {
			q := request{id: i*10_000 + k, model: b.model, generate: 4, messages: []chat.Message{chat.User(text.Words(uint64(20_000+10_000*i+k), []int{500, 15}[i]))}}
			w.clients[i] = append(w.clients[i], q)
			w.least = append(w.least, q)
		}
	}
	return w
}

func (b *bench) decode() workload {
	w := workload{name: "decode-heavy: 64 short prompts, 96 tokens each, 8 clients, 4 slots", config: b.config(4, true), clients: make([][]request, 8), runs: 3}
	for n := range 64 {
		q := request{id: n, model: b.model, generate: 96, messages: []chat.Message{chat.User(text.Words(uint64(9000+n), 20))}}
		w.clients[n%8] = append(w.clients[n%8], q)
		w.least = append(w.least, q)
	}
	return w
}

const (
	upstreamPrefixes = 30
	upstreamClients  = 12
)

// upstreams has clients that ask for any prefix. If killed, one of the servers is killed after a
// third of the requests, and restarted after two thirds.
func (b *bench) upstreams(each int, killed bool) workload {
	w := workload{
		name:   fmt.Sprintf("3 upstreams, %d prefixes × %d, %d closed-loop clients", upstreamPrefixes, each, upstreamClients),
		config: b.config(1, true), servers: 3, clients: make([][]request, upstreamClients), retries: true,
	}
	for p := range upstreamPrefixes {
		for n := range each {
			w.least = append(w.least, b.chat(p*each+n, 800+p, n))
		}
	}
	r := rand.New(rand.NewPCG(11, 7))
	for i, k := range r.Perm(len(w.least)) {
		w.clients[i%upstreamClients] = append(w.clients[i%upstreamClients], w.least[k])
	}
	if killed {
		w.name += ", one killed and revived"
		w.events = func(p *player, servers []*realollama.Server) map[int]func() error {
			gone := make(chan struct{})
			return map[int]func() error{
				len(w.least) / 3: func() error { servers[0].Kill(); close(gone); return nil },
				2 * len(w.least) / 3: func() error {
					<-gone
					return servers[0].Restart(p.ctx)
				},
			}
		}
	}
	return w
}
