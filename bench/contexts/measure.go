package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// request is one chat of a workload, or an embedding.
type request struct {
	id int // the same on both sides
	chat.Request
	// embed is a text to embed by the model instead of a chat; "" for a chat.
	embed string
}

func (q request) send(ctx context.Context, client *http.Client, url string) (chat.Answer, error) {
	if q.embed != "" {
		return chat.Embed(ctx, client, url, q.Model, q.embed)
	}
	q.Stream = true
	return chat.Send(ctx, client, url, q.Request)
}

// step is a part of a workload: something that is done to the server or the proxy, or requests, or
// first the one and then the other.
type step struct {
	name string
	do   func(ctx context.Context, p *linked.Pair) error
	// clients send their requests one after the other, each when its last one is answered, all
	// clients beside each other.
	clients [][]request
}

// workload is what is done and asked on each side.
type workload struct {
	name    string
	config  realollama.Config
	swaFull bool
	steps   []step
	// base is what the contexts are compared with.
	base linked.Way
	// least are the requests of all steps in the best order, for one client on one slot; nil: the
	// least possible is not measured.
	least []request
}

// stage is what a step came to.
type stage struct {
	name string
	done []completion
	// evaluated is the number of tokens in all; each prompt has one at least.
	evaluated, loads int
	wall             time.Duration
}

// completion is a request that was answered.
type completion struct {
	id    int
	embed bool
	chat.Answer
}

// chats is how many of the requests the server's log tells of: embeddings it leaves out.
func (s stage) chats() int {
	n := 0
	for _, c := range s.done {
		if !c.embed {
			n++
		}
	}
	return n
}

// first returns the median time to the first token, without what the server says that it spent on
// loading.
func (s stage) first() time.Duration {
	var all []time.Duration
	for _, c := range s.done {
		if !c.embed {
			all = append(all, c.First-c.Load)
		}
	}
	return chat.Quantile(all, 0.5)
}

// loading is how long the server says that it loaded models, for all requests together.
func (s stage) loading() time.Duration {
	var all time.Duration
	for _, c := range s.done {
		all += c.Load
	}
	return all
}

// result is what one side came to.
type result struct {
	stages []stage
	// metrics are the proxy's about contexts, as it spells them.
	metrics []string
}

// total is all stages in one.
func (r result) total() stage {
	var all stage
	for _, s := range r.stages {
		all.done = append(all.done, s.done...)
		all.evaluated += s.evaluated
		all.loads += s.loads
		all.wall += s.wall
	}
	return all
}

// compared is both sides, beside the least possible.
type compared struct {
	w               workload
	least           stage
	direct, proxied result
}

// limit is how long one side of a workload may take: longer than any does, unless something has
// come to a standstill.
const limit = 5 * time.Minute

// compare runs a workload directly and through the proxy, on a fresh server each.
func (b *bench) compare(ctx context.Context, w workload) (c compared, err error) {
	c.w = w
	if w.least != nil {
		best := w
		best.steps = []step{{name: "least", clients: [][]request{w.least}}}
		best.config.CacheRAMMiB, best.config.Parallel = nil, 0
		r, err := b.measure(ctx, best, linked.Direct)
		if err != nil {
			return c, fmt.Errorf("least possible: %w", err)
		}
		c.least = r.total()
	}
	if c.direct, err = b.measure(ctx, w, w.base); err != nil {
		return c, fmt.Errorf("%s: %w", w.base, err)
	}
	if c.proxied, err = b.measure(ctx, w, b.way); err != nil {
		return c, fmt.Errorf("through the proxy: %w", err)
	}
	return c, nil
}

// options are those of a side of a workload.
func (b *bench) options(w workload, way linked.Way) linked.Options {
	config := w.config
	config.Version = b.era
	return linked.Options{
		Way: way, Server: config, Program: b.binary, SWAFull: w.swaFull, Flags: strings.Fields(b.flags),
	}
}

// measure runs a workload on a fresh server.
func (b *bench) measure(ctx context.Context, w workload, way linked.Way) (r result, err error) {
	p, err := linked.Start(ctx, b.options(w, way))
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it is not done after %v", limit))
	defer cancel()
	client := chat.ClientFrom("")
	defer client.CloseIdleConnections()
	for _, s := range w.steps {
		if s.do != nil {
			if err := s.do(ctx, p); err != nil {
				return r, fmt.Errorf("%s: %w", s.name, err)
			}
		}
		if s.clients == nil {
			continue
		}
		done, err := play(ctx, client, p, s)
		if err != nil {
			return r, fmt.Errorf("%s: %w", s.name, errors.Join(err, context.Cause(ctx)))
		}
		r.stages = append(r.stages, done)
		b.tell(way, done)
	}
	if way == linked.Contexts {
		r.metrics, err = contextMetrics(ctx, client, p.URL())
	}
	if b.verbose != nil && p.Proxy != nil {
		fmt.Fprintf(b.verbose, "%s\n%s", strings.Join(r.metrics, "\n"), p.Log())
	}
	return r, err
}

// tell prints what a stage came to, if that was asked for.
func (b *bench) tell(way linked.Way, s stage) {
	if b.verbose == nil {
		return
	}
	fmt.Fprintf(b.verbose, "  %s, %s: %d requests, %d evaluated, %d loads, %v\n",
		way, s.name, len(s.done), s.evaluated, s.loads, s.wall.Round(time.Millisecond))
	for _, c := range s.done[:min(len(s.done), 10)] {
		fmt.Fprintf(b.verbose, "    %d: prompt %d, load %v, first %v, took %v\n", c.id, c.Prompt,
			c.Load.Round(time.Millisecond), c.First.Round(time.Millisecond), c.Took.Round(time.Millisecond))
	}
}

// contextMetrics are the lines of /metrics about contexts.
func contextMetrics(ctx context.Context, client *http.Client, url string) ([]string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var all []string
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "ollama_cacheproxy_context") {
			all = append(all, lines.Text())
		}
	}
	return all, lines.Err()
}

// play sends the requests of a step.
func play(ctx context.Context, client *http.Client, p *linked.Pair, s step) (stage, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	st := stage{name: s.name}
	var mu sync.Mutex
	var wg sync.WaitGroup
	mark, begin := p.Server.Mark(), time.Now()
	for _, list := range s.clients {
		wg.Go(func() {
			for _, q := range list {
				a, err := q.send(ctx, client, p.URL())
				if err != nil {
					cancel(err)
					return
				}
				mu.Lock()
				st.done = append(st.done, completion{q.id, q.embed != "", a})
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	st.wall = time.Since(begin)
	if err := context.Cause(ctx); err != nil {
		return st, err
	}
	st.loads = p.Server.Loads(mark)
	all, err := evaluations(ctx, p.Server, mark, st)
	for _, e := range all {
		st.evaluated += max(e.Evaluated, 1)
	}
	return st, err
}

// evaluations waits until the server's log tells of all chats of a stage since a mark, and returns
// what it then tells. What it tells at their ends may never come: a load ends the engine of the model
// before, sometimes before that has written its last line. But only there it tells chats from
// embeddings, which no workload here has beside loads.
func evaluations(
	ctx context.Context, server *realollama.Server, mark realollama.Mark, st stage,
) ([]realollama.Evaluation, error) {
	if st.chats() < len(st.done) {
		return server.WaitEvaluations(ctx, mark, st.chats())
	}
	for range 100 {
		if all := server.Begun(mark); len(all) >= len(st.done) {
			return all, nil
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil, fmt.Errorf("the server's log does not tell of %d prompts", len(st.done))
}
