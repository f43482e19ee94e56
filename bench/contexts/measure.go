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
	// embed is a text for the model to embed, instead of a chat; "" for a chat.
	embed string
}

func (q request) send(ctx context.Context, client *http.Client, url string) (chat.Answer, error) {
	if q.embed != "" {
		return chat.Embed(ctx, client, url, q.Model, q.embed)
	}
	q.Stream = true
	return chat.Send(ctx, client, url, q.Request)
}

// step is a part of a workload: an action on the server or the proxy, or requests, or first the
// action and then the requests.
type step struct {
	name string
	do   func(ctx context.Context, p *linked.Pair) error
	// clients send their requests concurrently; each sends its own one after the other, when the
	// last one is answered.
	clients [][]request
}

// workload has the actions and requests for each side.
type workload struct {
	name    string
	config  realollama.Config
	swaFull bool
	steps   []step
	// base is the side that contexts are compared with.
	base linked.Way
	// least has the requests of all steps in the best order, for one client on one slot; nil: the
	// least possible is not measured.
	least []request
}

// stage is the result of a step.
type stage struct {
	name string
	done []completion
	// evaluated is the number of tokens in all; each prompt has at least one.
	evaluated, loads int
	wall             time.Duration
}

// completion is an answered request.
type completion struct {
	id    int
	embed bool
	chat.Answer
}

// chats returns how many of the requests are in the server's log, which leaves out embeddings.
func (s stage) chats() int {
	n := 0
	for _, c := range s.done {
		if !c.embed {
			n++
		}
	}
	return n
}

// first returns the median time to the first token, without the time for loading that the server
// reports.
func (s stage) first() time.Duration {
	var all []time.Duration
	for _, c := range s.done {
		if !c.embed {
			all = append(all, c.First-c.Load)
		}
	}
	return chat.Quantile(all, 0.5)
}

// loading returns how long the server loaded models, by its own reports, for all requests together.
func (s stage) loading() time.Duration {
	var all time.Duration
	for _, c := range s.done {
		all += c.Load
	}
	return all
}

// result is the result of one side.
type result struct {
	stages []stage
	// metrics are the proxy's metrics of contexts, as it spells them.
	metrics []string
}

// total returns all stages as one.
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

// compared has both sides, and the least possible.
type compared struct {
	w               workload
	least           stage
	direct, proxied result
}

// limit is how long one side of a workload may take: longer than any does, unless it has come to a
// standstill.
const limit = 5 * time.Minute

// compare runs a workload directly and through the proxy, each on a new server.
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

// options returns the options for a side of a workload.
func (b *bench) options(w workload, way linked.Way) linked.Options {
	config := w.config
	config.Version = b.era
	return linked.Options{
		Way: way, Server: config, Program: b.binary, SWAFull: w.swaFull, Flags: strings.Fields(b.flags),
	}
}

// measure runs a workload on a new server.
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

// tell prints the result of a stage, if that was asked for.
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

// contextMetrics returns the lines of /metrics about contexts.
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

// evaluations waits until the server's log has all chats of a stage since a mark, and returns the
// evaluations in it. The lines at the ends of prompts may never appear: a load ends the previous
// model's engine, sometimes before that has written its last line. But only those lines distinguish
// chats from embeddings, and no workload here has embeddings beside loads.
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
