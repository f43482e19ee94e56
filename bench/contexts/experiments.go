package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/text"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// costly takes about a millisecond for each token, like a model of some billion parameters on a
// GPU.
const costly = "gen-llama-costly"

// embedder is an embedding model.
const embedder = "gen-llama-embed"

// experiments returns the experiments in the order of the table.
func (b *bench) experiments() []experiment {
	var all []experiment
	add := func(w workload, rows func(c compared) []row) {
		all = append(all, experiment{w.name, func(ctx context.Context) ([]row, error) {
			c, err := b.compare(ctx, w)
			if err != nil {
				return nil, err
			}
			return rows(c), nil
		}})
	}
	most := func(times float64) func(c compared) []row {
		return func(c compared) []row { return c.rows(times) }
	}
	add(b.rubric(), afterwards)
	add(b.twoModels(), most(1.1))
	add(b.numCtx(), most(1.1))
	for _, slots := range []int{1, 4} {
		add(b.rounds(slots), laterRounds)
	}
	add(b.systemPrompt(), most(1.01))
	add(b.inTurn(), half)
	add(b.document(), back)
	add(b.window(true), most(1.1))
	add(b.window(false), notSlower)
	all = append(all, experiment{"a lone chat, everything warm", b.lone})
	return all
}

// n returns a number of requests, or a quarter of it for a quick run.
func (b *bench) n(all int) int {
	if b.quick {
		return max(all/4, 1)
	}
	return all
}

// ask returns a request with a prefix of length words and a unique tail.
func ask(id, prefix, length int, model string) request {
	return request{id: id, Request: chat.Request{
		Model: model, Generate: 4,
		Messages: []chat.Message{
			chat.System(text.Words(uint64(prefix), length)),
			chat.User(text.Words(uint64(100_000+id), 12)),
		},
	}}
}

// pause gives the proxy the idle time in which it saves.
func pause(ctx context.Context, _ *linked.Pair) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(2 * time.Second):
		return nil
	}
}

// rubric is a long system prompt that is asked for again after each event that makes all caches
// cold. There are two seconds without requests before each of them.
func (b *bench) rubric() workload {
	const model = "smollm2"
	length := 1960 // about 2,000 tokens
	if b.quick {
		length = 500
	}
	id := 0
	one := func(n int) [][]request {
		var list []request
		for range n {
			id++
			list = append(list, ask(id, 1, length, model))
		}
		return [][]request{list}
	}
	type action = func(ctx context.Context, p *linked.Pair) error
	after := func(name string, do ...action) step {
		return step{name, func(ctx context.Context, p *linked.Pair) error {
			for _, f := range append([]action{pause}, do...) {
				if err := f(ctx, p); err != nil {
					return err
				}
			}
			return nil
		}, one(1)}
	}
	unload := func(ctx context.Context, p *linked.Pair) error { return p.Unload(ctx, model) }
	server := func(ctx context.Context, p *linked.Pair) error { return p.RestartServer(ctx) }
	proxy := func(ctx context.Context, p *linked.Pair) error { return p.RestartProxy(ctx) }
	return workload{
		name:   "a rubric of 2,000 tokens, and what makes it cold",
		config: realollama.Config{Models: []string{model}, KeepAlive: "10m"},
		steps: []step{
			{name: "cold", clients: one(1)},
			{name: "warm", clients: one(5)},
			after("the model unloaded", unload),
			after("Ollama restarted", server),
			after("the proxy restarted, the model unloaded", proxy, unload),
			after("both restarted", proxy, server),
		},
	}
}

// afterwards compares the steps after an event that makes the rubric cold with the warm ones. The
// proxy may have the model loaded before it sends a request, so the time of a load is the direct
// side's.
func afterwards(c compared) []row {
	rows := c.rows(0)
	warmTokens, warmFirst := [2]int{}, [2]time.Duration{}
	for i, r := range []result{c.direct, c.proxied} {
		warm := r.stages[1]
		warmTokens[i] = (warm.evaluated + len(warm.done) - 1) / len(warm.done)
		warmFirst[i] = warm.first()
	}
	rows = append(rows,
		note("evaluated when warm, tokens", fmt.Sprint(warmTokens[0]), fmt.Sprint(warmTokens[1])),
		note("time to first token when warm, ms", milliseconds(warmFirst[0]), milliseconds(warmFirst[1])))
	for i := range c.direct.stages[2:] {
		d, p := c.direct.stages[2+i], c.proxied.stages[2+i]
		more := p.evaluated - warmTokens[1]
		rows = append(rows,
			target(p.name+": tokens of the prefix evaluated",
				fmt.Sprint(max(d.evaluated-warmTokens[0], 0)), fmt.Sprint(max(more, 0)), "≤ 20", more <= 20),
			target(p.name+": time to first token, ms",
				milliseconds(d.done[0].First), milliseconds(p.done[0].First),
				"≤ 1.25 × warm, and a load", p.done[0].First <= warmFirst[1]*5/4+d.loading()))
	}
	return rows
}

// twoModels has two models that evict each other, each with one client in a closed loop.
func (b *bench) twoModels() workload {
	models := []string{costly, "gen-qwen3-costly"}
	w := workload{
		name:   "two models that evict each other, two closed loops",
		config: realollama.Config{Models: models, KeepAlive: "10m", MaxLoaded: 1},
	}
	clients := make([][]request, len(models))
	for i, model := range models {
		for n := range b.n(40) {
			clients[i] = append(clients[i], ask(1000*i+n, 10+i, 250, model))
		}
		w.least = append(w.least, clients[i]...)
	}
	w.steps = []step{{name: "all", clients: clients}}
	return w
}

// numCtx is one client that asks with two context lengths in turn.
func (b *bench) numCtx() workload {
	w := workload{
		name:   "two num_ctx strictly in turn, one client",
		config: realollama.Config{Models: []string{costly}, KeepAlive: "10m"},
	}
	var list []request
	for n := range b.n(40) {
		q := ask(n, 20, 250, costly)
		q.NumCtx = []int{2048, 4096}[n%2]
		list = append(list, q)
	}
	w.steps = []step{{name: "all", clients: [][]request{list}}}
	// With room for a copy, one state would do for both: the minimum is to evaluate the prefix
	// once.
	for _, q := range list {
		q.NumCtx = 4096
		w.least = append(w.least, q)
	}
	return w
}

// rounds has many prefixes in turn, from one client, several times: the slots never hold the next
// one.
func (b *bench) rounds(slots int) workload {
	w := workload{
		config: realollama.Config{
			Models: []string{costly}, KeepAlive: "10m", Parallel: slots, CacheRAMMiB: new(int),
		},
	}
	prefixes := b.n(100)
	w.name = fmt.Sprintf("%d prefixes × 3 rounds strictly in turn, %s, no host cache",
		prefixes, text.Plural(slots, "slot"))
	for round := range 3 {
		var list []request
		for p := range prefixes {
			list = append(list, ask(1000*round+p, 100+p, 90, costly))
		}
		name := fmt.Sprintf("round %d", round+1)
		w.steps = append(w.steps, step{name: name, clients: [][]request{list}})
	}
	for p := range prefixes {
		for round := range 3 {
			w.least = append(w.least, w.steps[round].clients[0][p])
		}
	}
	return w
}

// laterRounds reports what the second and the third round evaluated of prefixes.
func laterRounds(c compared) []row {
	rows := c.rows(1.05)
	first := c.proxied.stages[0].evaluated
	// In the best order, the rounds after the first evaluate only tails.
	tails := c.least.evaluated - c.direct.stages[0].evaluated
	again := func(r result) int {
		return max(r.stages[1].evaluated+r.stages[2].evaluated-tails, 0)
	}
	return append(rows, target("of prefixes, in the second and the third round",
		fmt.Sprint(again(c.direct)), fmt.Sprint(again(c.proxied)),
		fmt.Sprintf("≤ 1 %% of the first round's, %d", first), again(c.proxied)*100 <= first))
}

// systemPrompt is one prefix, for clients that arrive at the same time, on several slots.
func (b *bench) systemPrompt() workload {
	w := workload{
		name:   "one system prompt, 8 clients, 4 slots",
		config: realollama.Config{Models: []string{costly}, KeepAlive: "10m", Parallel: 4},
	}
	clients := make([][]request, 8)
	for i := range clients {
		for n := range b.n(8) {
			clients[i] = append(clients[i], ask(100*i+n, 30, 500, costly))
		}
		w.least = append(w.least, clients[i]...)
	}
	w.steps = []step{{name: "all", clients: clients}}
	return w
}

// inTurn has clients in closed loops whose prefixes alternate: no two waiting ones have the same.
func (b *bench) inTurn() workload {
	w := workload{
		name:   "8 closed-loop clients over 16 prefixes in turn, 1 slot, no host cache",
		config: realollama.Config{Models: []string{costly}, KeepAlive: "10m", CacheRAMMiB: new(int)},
	}
	clients := make([][]request, 8)
	for n := range max(b.n(8), 6) { // each prefix three times, otherwise nothing is worth saving
		for i := range clients {
			clients[i] = append(clients[i], ask(100*i+n, 40+i+8*(n%2), 250, costly))
		}
	}
	w.steps = []step{{name: "all", clients: clients}}
	w.least = slices.Concat(clients...)
	prefix := func(q request) int { return q.id/100*2 + q.id%2 }
	slices.SortStableFunc(w.least, func(x, y request) int { return prefix(x) - prefix(y) })
	return w
}

// half also checks the time.
func half(c compared) []row {
	rows := c.rows(1.05)
	d, p := c.direct.total().wall, c.proxied.total().wall
	rows[2] = target("seconds", seconds(d), seconds(p), "≤ 0.5 of the direct", p <= d/2)
	return rows
}

// document is a long text, and a restart of Ollama.
func (b *bench) document() workload {
	const model = "gen-llama-q8_0" // only two layers, so that a test takes little time
	length := 13_000
	if b.quick {
		length = 3000
	}
	one := func(id int) [][]request {
		q := ask(id, 50, length, model)
		q.NumCtx = 32_768
		return [][]request{{q}}
	}
	return workload{
		name:   "a document of 30,000 tokens, two layers",
		config: realollama.Config{Models: []string{model}, KeepAlive: "10m"},
		steps: []step{
			{name: "cold", clients: one(1)},
			{name: "warm", clients: one(2)},
			{name: "restarted", clients: one(3), do: func(ctx context.Context, p *linked.Pair) error {
				if err := pause(ctx, p); err != nil {
					return err
				}
				return p.RestartServer(ctx)
			}},
		},
	}
}

// back reports how soon the document is available again.
func back(c compared) []row {
	d, p := c.direct.stages[2], c.proxied.stages[2]
	return append(c.rows(0),
		note("tokens of the prompt", fmt.Sprint(d.done[0].Prompt), fmt.Sprint(p.done[0].Prompt)),
		note("evaluated after the restart", fmt.Sprint(d.evaluated), fmt.Sprint(p.evaluated)),
		target("time to first token after the restart, ms",
			milliseconds(d.done[0].First), milliseconds(p.done[0].First), "≤ 2000, and a load",
			p.done[0].First <= 2*time.Second+d.loading()))
}

// window is a model with a sliding window, with prefixes longer than the window, and embeddings in
// between. Both sides are proxies, so that only contexts are compared.
func (b *bench) window(full bool) workload {
	const model = "gen-gemma3-costly"
	w := workload{
		name: "a sliding window of 512, 8 prefixes × 3 rounds strictly in turn, embeddings beside",
		config: realollama.Config{
			Models: []string{model, embedder}, KeepAlive: "10m", CacheRAMMiB: new(int),
		},
		swaFull: full, base: linked.Without,
	}
	if full {
		w.name += ", --swa-full"
		w.config.Env = []string{"LLAMA_ARG_SWA_FULL=1"} // on both sides
	}
	var list, beside []request
	for round := range 3 {
		for p := range b.n(8) {
			id := 100*round + p
			list = append(list, ask(id, 60+p, 350, model))
			q := request{id: 1000 + id, embed: text.Words(uint64(id), 40)}
			q.Model = embedder
			beside = append(beside, q)
		}
	}
	w.steps = []step{{name: "all", clients: [][]request{list, beside}}}
	w.least = slices.Clone(list)
	slices.SortStableFunc(w.least, func(x, y request) int { return x.id%100 - y.id%100 })
	return w
}

// notSlower tolerates the variation between two runs of the same.
func notSlower(c compared) []row {
	rows := c.rows(0)
	d, p := c.direct.total().wall, c.proxied.total().wall
	rows[2] = target("seconds", seconds(d), seconds(p), "≤ 1.05 of that without contexts",
		float64(p) <= 1.05*float64(d))
	return rows
}
