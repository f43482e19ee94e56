package main

import (
	"fmt"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/play"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/text"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// shuffled has many prefixes in turn.
func (b *bench) shuffled(slots int, hostCache bool) play.Workload {
	name := "small"
	if hostCache {
		name = "ample"
	}
	w := play.Workload{
		Name: fmt.Sprintf("32 prefixes × 4, 8 clients, %s, %s host cache", text.Plural(slots, "slot"), name), Config: b.Config(slots, hostCache),
		Open: true, Clients: make([][]play.Request, 8),
	}
	for n := range 4 {
		for p := range 32 {
			id := n*32 + p
			w.Clients[id%8] = append(w.Clients[id%8], b.Chat(id, p+1, n))
		}
	}
	for p := range 32 {
		for n := range 4 {
			w.Least = append(w.Least, b.Chat(n*32+p, p+1, n))
		}
	}
	return w
}

// scripts has closed loops, each with one prefix.
func (b *bench) scripts(each int) play.Workload {
	w := play.Workload{Name: fmt.Sprintf("4 closed-loop scripts × %d, 1 slot, small host cache", each), Config: b.Config(1, false), Clients: make([][]play.Request, 4)}
	for s := range 4 {
		for n := range each {
			q := b.Chat(s*each+n, 100+s, n)
			w.Clients[s] = append(w.Clients[s], q)
			w.Least = append(w.Least, q)
		}
	}
	return w
}

func (b *bench) hot(slots int) play.Workload {
	w := play.Workload{Name: fmt.Sprintf("one hot prefix × 128, 8 clients, %s", text.Plural(slots, "slot")), Config: b.Config(slots, true), Clients: make([][]play.Request, 8), Runs: 3}
	for n := range 128 {
		q := b.Chat(n, 200, n)
		w.Clients[n%8] = append(w.Clients[n%8], q)
		w.Least = append(w.Least, q)
	}
	return w
}

func (b *bench) numCtx() play.Workload {
	w := play.Workload{Name: "two num_ctx × 20 in turn, 4 clients", Config: b.Config(1, true), Open: true, Clients: make([][]play.Request, 4)}
	for n := range 40 {
		q := b.Chat(n, 300, n)
		q.NumCtx = []int{2048, 4096}[n%2]
		w.Clients[n/2%4] = append(w.Clients[n/2%4], q)
		w.Least = append(w.Least, q)
	}
	slices.SortStableFunc(w.Least, func(a, b play.Request) int { return a.NumCtx - b.NumCtx })
	return w
}

// runners has two models that cannot be loaded together, each with two num_ctx. In closed loops
// each client has one pair.
func (b *bench) runners(open bool) play.Workload {
	const second = "gen-llama-tiny-b"
	n := 100
	if !open {
		n = 40
	}
	w := play.Workload{Name: fmt.Sprintf("two models × two num_ctx, %d requests in turn, all queued", n), Config: b.Config(1, true), Open: open, Clients: make([][]play.Request, 4)}
	if !open {
		w.Name = fmt.Sprintf("two models × two num_ctx, %d requests, 4 closed-loop clients with one each", n)
	}
	w.Config.Models, w.Config.MaxLoaded = append(w.Config.Models, second), 1
	for n := range n {
		q := b.Chat(n, 350, n)
		q.Model = []string{b.Model, second}[n%2]
		q.NumCtx = []int{2048, 4096}[n/2%2]
		client := n % 4
		if open {
			client = n / 4 % 4
		}
		w.Clients[client] = append(w.Clients[client], q)
	}
	for runner := range 4 {
		for _, list := range w.Clients {
			for _, q := range list {
				if q.ID%4 == runner {
					w.Least = append(w.Least, q)
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

func (b *bench) chats(slots int) play.Workload {
	w := play.Workload{
		Name:   fmt.Sprintf("%d chats of %d turns, one system prompt, %s, small host cache", chatClients, chatTurns, text.Plural(slots, "slot")),
		Config: b.Config(slots, false), Chats: true, Clients: make([][]play.Request, chatClients),
	}
	for c := range w.Clients {
		for turn := range chatTurns {
			w.Clients[c] = append(w.Clients[c], play.Request{
				ID: c*100 + turn, Model: b.Model, Generate: 8,
				Messages: []chat.Message{chat.System(text.Words(700, 250)), chat.User(text.Words(uint64(7000+100*c+turn), 30))},
			})
		}
	}
	w.Best = w.Clients
	return w
}

func (b *bench) mixed() play.Workload {
	w := play.Workload{Name: "8 interactive among 80 batch, 1 slot, small host cache", Config: b.Config(1, false), Open: true, Clients: make([][]play.Request, 9)}
	for n := range 80 {
		q := b.Chat(n, 400+n/20, n)
		q.Priority = "batch"
		w.Clients[n%8] = append(w.Clients[n%8], q)
		w.Least = append(w.Least, q)
	}
	for n := range 8 {
		q := b.Chat(1000+n, 500, n)
		q.Priority = "interactive"
		w.Clients[8] = append(w.Clients[8], q)
		w.Least = append(w.Least, q)
	}
	return w
}

// batch is 500 requests at once; with also, an interactive one arrives when 100 of them have been
// answered.
func (b *bench) batch(also bool) play.Workload {
	w := play.Workload{Name: "500 batch, 1 slot, small host cache", Config: b.Config(1, false), Open: true, Clients: make([][]play.Request, 1)}
	for n := range 500 {
		q := b.Chat(n, 410+n%25, n)
		q.Priority = "batch"
		w.Clients[0] = append(w.Clients[0], q)
	}
	w.Least = slices.Clone(w.Clients[0])
	slices.SortStableFunc(w.Least, func(a, b play.Request) int { return a.Prefix - b.Prefix })
	if also {
		q := b.Chat(1000, 500, 0)
		q.Priority = "interactive"
		w.Name = "one interactive among 500 batch (25 prefixes), 1 slot, small host cache"
		w.Least = append(w.Least, q)
		w.Events = func(p *play.Player, _ []*realollama.Server) map[int]func() error {
			return map[int]func() error{100: func() error { p.Send(chat.ClientFrom(""), 1, q); return nil }}
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
func (b *bench) unequal() play.Workload {
	w := play.Workload{
		Name: "two backlogged clients, prompts of 1,200 and of 60 tokens, 1 slot", Config: b.Config(1, false),
		Depth: backlog, Addresses: []string{"127.0.0.1", "127.0.0.2"}, Clients: make([][]play.Request, 2),
	}
	for i, n := range []int{longs, shorts} {
		for k := range n {
			q := play.Request{ID: i*10_000 + k, Model: b.Model, Generate: 4, Messages: []chat.Message{chat.User(text.Words(uint64(20_000+10_000*i+k), []int{500, 15}[i]))}}
			w.Clients[i] = append(w.Clients[i], q)
			w.Least = append(w.Least, q)
		}
	}
	return w
}

func (b *bench) decode() play.Workload {
	w := play.Workload{Name: "decode-heavy: 64 short prompts, 96 tokens each, 8 clients, 4 slots", Config: b.Config(4, true), Clients: make([][]play.Request, 8), Runs: 3}
	for n := range 64 {
		q := play.Request{ID: n, Model: b.Model, Generate: 96, Messages: []chat.Message{chat.User(text.Words(uint64(9000+n), 20))}}
		w.Clients[n%8] = append(w.Clients[n%8], q)
		w.Least = append(w.Least, q)
	}
	return w
}
