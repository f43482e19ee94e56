package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// bench has what all measurements share.
type bench struct {
	era, model, binary string
}

// way is how requests reach the server.
type way int

const (
	direct way = iota // with several servers: through leastLoaded
	given             // through the proxy, with the number of slots given
	auto              // through the proxy, which learns the number
	ways

	least // directly, one at a time, in the best order
)

// result is the result of one way.
type result struct {
	evaluated, loads int
	wall             time.Duration
	done             []completion
	evaluations      []realollama.Evaluation // in the order of the log
	retried          int                     // requests that failed and were sent again
	failed           []error                 // … and failed again
}

// latency returns the time that the given share of a priority's requests did not exceed.
func (r result) latency(priority string, part float64) time.Duration {
	var all []time.Duration
	for _, c := range r.done {
		if c.q.priority == priority {
			all = append(all, c.took)
		}
	}
	return chat.Quantile(all, part)
}

// compare measures all ways in turn. If the workload says so, it does that several times, and uses
// the run with the median time for each way.
func (b *bench) compare(ctx context.Context, w workload) (c compared, err error) {
	c.w = w
	if c.least, err = b.measure(ctx, w, least); err != nil {
		return c, fmt.Errorf("least possible: %w", err)
	}
	var all [ways][]result
	for range max(1, w.runs) {
		for i, name := range [ways]string{"directly", "slots given", "auto"} {
			r, err := b.measure(ctx, w, way(i))
			if err != nil {
				return c, fmt.Errorf("%s: %w", name, err)
			}
			all[i] = append(all[i], r)
		}
	}
	for i, runs := range all {
		slices.SortFunc(runs, func(a, b result) int { return cmp.Compare(a.wall, b.wall) })
		c.by[i] = runs[len(runs)/2]
	}
	return c, nil
}

// limit is how long a workload may take: longer than any does, unless it has come to a standstill.
const limit = 3 * time.Minute

// measure runs a workload on new servers.
func (b *bench) measure(ctx context.Context, w workload, how way) (r result, err error) {
	config := w.config
	config.Version = b.era
	n := max(1, w.servers)
	if how == least {
		config.CacheRAMMiB, config.Parallel, n = nil, 0, 1
	}
	var servers []*realollama.Server
	var marks []realollama.Mark
	for range n {
		s, err := realollama.Run(ctx, config, nil)
		if err != nil {
			return r, err
		}
		defer func() { err = errors.Join(err, s.Stop()) }()
		servers, marks = append(servers, s), append(marks, s.Mark())
	}
	url, stop, err := b.front(ctx, how, servers, max(1, config.Parallel))
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, stop()) }()

	ctx, end := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it is not done after %v", limit))
	defer end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := &player{ctx: ctx, cancel: cancel, url: url, retries: w.retries}
	if w.events != nil && how != least {
		p.events = w.events(p, servers)
	}
	begin := time.Now()
	p.play(w, how == least)
	r.wall = time.Since(begin)
	r.done, r.retried, r.failed = p.done, p.retried, p.failed
	if err := context.Cause(ctx); err != nil {
		return r, err
	}
	for i, s := range servers {
		r.loads += s.Loads(marks[i])
	}
	r.evaluations, err = chat.Evaluations(ctx, servers, marks, len(p.done))
	if missing := len(p.done) - len(r.evaluations); err != nil && (ctx.Err() != nil || missing > r.loads) {
		return r, err
	} else if missing > 0 {
		// A load, or a kill, ends the previous engine, sometimes before it has written its last line.
		fmt.Fprintf(os.Stderr, "%s: the server's log lacks %d of %d evaluations\n", w.name, missing, len(p.done))
	}
	for _, e := range r.evaluations {
		r.evaluated += max(e.Evaluated, 1)
	}
	return r, nil
}

// front starts the receiver of the requests, and returns its URL.
func (b *bench) front(ctx context.Context, how way, servers []*realollama.Server, slots int) (url string, stop func() error, err error) {
	switch {
	case how == direct && len(servers) > 1:
		var urls []string
		for _, s := range servers {
			urls = append(urls, s.URL())
		}
		return serveLeastLoaded(urls)
	case how == direct || how == least:
		return servers[0].URL(), func() error { return nil }, nil
	}
	flags := []string{"--slots", "auto"}
	if how == given {
		flags = []string{"--slots", fmt.Sprint(slots)}
	}
	upstream := servers[0].URL()
	if len(servers) > 1 {
		upstream = serverName(0) + "=" + upstream
		for i, s := range servers[1:] {
			flags = append(flags, "--upstream", serverName(i+1)+"="+s.URL())
		}
	}
	p, err := proxyprocess.Start(ctx, b.binary, upstream, flags...)
	if err != nil {
		return "", nil, err
	}
	return p.URL, p.Stop, nil
}

// player sends a workload's requests and records their results.
type player struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc // called if a request or an event fails
	url     string
	retries bool // failed requests are sent again
	events  map[int]func() error
	wg      sync.WaitGroup

	mu      sync.Mutex // guards all below
	done    []completion
	retried int
	failed  []error
}

// completion is an answered request.
type completion struct {
	q    request
	from int // number of the client
	chat.Answer
	took   time.Duration
	before int // how many requests had been answered before it was sent
}

// play sends all requests, or those of the best order one at a time.
func (p *player) play(w workload, best bool) {
	clients := w.clients
	if best && w.best == nil {
		clients = [][]request{w.least}
	}
	for i, list := range clients {
		var address string
		if w.addresses != nil && !best {
			address = w.addresses[i]
		}
		client := chat.ClientFrom(address)
		defer client.CloseIdleConnections()
		switch {
		case best:
			p.wg.Wait() // one client after the other
			p.wg.Go(func() { p.sequence(client, i, list, w.chats) })
		case w.open:
			for k, q := range list {
				p.wg.Go(func() {
					// In the order of the list, client by client: the first one must arrive first.
					time.Sleep(time.Duration(k*len(clients)+i) * time.Millisecond)
					p.send(client, i, q)
				})
			}
		case w.depth > 1:
			queue := make(chan request, len(list))
			for _, q := range list {
				queue <- q
			}
			close(queue)
			for range w.depth {
				p.wg.Go(func() {
					for q := range queue {
						p.send(client, i, q)
					}
				})
			}
		default:
			p.wg.Go(func() { p.sequence(client, i, list, w.chats) })
		}
	}
	p.wg.Wait()
}

// sequence sends requests one after the other, each when the last one is answered. In a chat,
// answers become messages of the next request.
func (p *player) sequence(client *http.Client, from int, list []request, isChat bool) {
	var history []chat.Message
	for i, q := range list {
		if isChat && i > 0 {
			q.messages = append(slices.Clone(history), q.messages[len(q.messages)-1])
		}
		text := p.send(client, from, q)
		if isChat {
			history = append(slices.Clone(q.messages), chat.Assistant(text))
		}
	}
}

// send returns the answer, or "" after an error.
func (p *player) send(client *http.Client, from int, q request) string {
	if p.ctx.Err() != nil {
		return ""
	}
	p.mu.Lock()
	before := len(p.done)
	p.mu.Unlock()
	sent := time.Now()
	a, err := ask(p.ctx, client, p.url, q)
	if err != nil && p.retries {
		p.mu.Lock()
		p.retried++
		p.mu.Unlock()
		a, err = ask(p.ctx, client, p.url, q)
	}
	took := time.Since(sent)
	p.mu.Lock()
	if err != nil {
		p.failed = append(p.failed, err)
		p.mu.Unlock()
		if !p.retries {
			p.cancel(err)
		}
		return ""
	}
	p.done = append(p.done, completion{q, from, a, took, before})
	event := p.events[len(p.done)]
	p.mu.Unlock()
	if event != nil {
		p.wg.Go(func() {
			if err := event(); err != nil {
				p.cancel(err)
			}
		})
	}
	return a.Text
}

// ask sends a request, not as a stream.
func ask(ctx context.Context, client *http.Client, url string, q request) (chat.Answer, error) {
	return chat.Send(ctx, client, url, chat.Request{
		Model: q.model, Messages: q.messages, Generate: q.generate, NumCtx: q.numCtx, Priority: q.priority,
	})
}
