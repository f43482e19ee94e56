// Package play has what the benchmarks of scheduling share: workloads, and a player that sends them
// to real Ollama servers, through whatever is in front of these, and reads from the servers' logs
// what they did.
package play

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// Bench has what all measurements share.
type Bench struct{ Era, Model string }

// Front starts what receives the requests for some servers with that many slots each, and returns
// its URLs.
type Front func(ctx context.Context, servers []*realollama.Server, slots int) (urls []string, stop func() error, err error)

// Direct is a Front that is the first server itself.
func Direct(_ context.Context, servers []*realollama.Server, _ int) ([]string, func() error, error) {
	return []string{servers[0].URL()}, func() error { return nil }, nil
}

// Result is how a workload went.
type Result struct {
	Evaluated, Loads int
	Wall             time.Duration
	Done             []Completion
	Evaluations      []realollama.Evaluation // in the order of the log
	Retried          int                     // requests that failed and were sent again
	Failed           []error                 // … and failed again
}

// Latency returns the time that the given share of a priority's requests did not exceed.
func (r Result) Latency(priority string, part float64) time.Duration {
	var all []time.Duration
	for _, c := range r.Done {
		if c.Q.Priority == priority {
			all = append(all, c.Took)
		}
	}
	return chat.Quantile(all, part)
}

// limit is how long a workload may take: longer than any does, unless it has come to a standstill.
const limit = 3 * time.Minute

// Measure runs a workload on new servers.
func (b Bench) Measure(ctx context.Context, w Workload, front Front) (Result, error) {
	return b.measure(ctx, w, front, false)
}

// Least measures the least possible: the same requests one after the other, in the best order, on
// one server with an ample host cache.
func (b Bench) Least(ctx context.Context, w Workload) (Result, error) {
	w.Config.CacheRAMMiB, w.Config.Parallel, w.Servers = nil, 0, 1
	return b.measure(ctx, w, Direct, true)
}

func (b Bench) measure(ctx context.Context, w Workload, front Front, best bool) (r Result, err error) {
	config := w.Config
	config.Version = b.Era
	var servers []*realollama.Server
	var marks []realollama.Mark
	for range max(1, w.Servers) {
		s, err := realollama.Run(ctx, config, nil)
		if err != nil {
			return r, err
		}
		defer func() { err = errors.Join(err, s.Stop()) }()
		servers, marks = append(servers, s), append(marks, s.Mark())
	}
	urls, stop, err := front(ctx, servers, max(1, config.Parallel))
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, stop()) }()

	ctx, end := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it is not done after %v", limit))
	defer end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := &Player{Ctx: ctx, cancel: cancel, urls: urls, retries: w.Retries}
	if w.Events != nil && !best {
		p.events = w.Events(p, servers)
	}
	begin := time.Now()
	p.play(w, best)
	r.Wall = time.Since(begin)
	r.Done, r.Retried, r.Failed = p.done, p.retried, p.failed
	if err := context.Cause(ctx); err != nil {
		return r, err
	}
	for i, s := range servers {
		r.Loads += s.Loads(marks[i])
	}
	r.Evaluations, err = chat.Evaluations(ctx, servers, marks, len(p.done))
	if missing := len(p.done) - len(r.Evaluations); err != nil && (ctx.Err() != nil || missing > r.Loads) {
		return r, err
	} else if missing > 0 {
		// A load, or a kill, ends the previous engine, sometimes before it has written its last line.
		fmt.Fprintf(os.Stderr, "%s: the server's log lacks %d of %d evaluations\n", w.Name, missing, len(p.done))
	}
	for _, e := range r.Evaluations {
		r.Evaluated += max(e.Evaluated, 1)
	}
	return r, nil
}

// Player sends a workload's requests and records their results.
type Player struct {
	Ctx     context.Context
	cancel  context.CancelCauseFunc // called if a request or an event fails
	urls    []string                // each request goes to any of them
	retries bool                    // failed requests are sent again
	events  map[int]func() error
	wg      sync.WaitGroup

	mu      sync.Mutex // guards all below
	done    []Completion
	retried int
	failed  []error
}

// Completion is an answered request.
type Completion struct {
	Q    Request
	From int // number of the client
	chat.Answer
	Took   time.Duration
	Before int // how many requests had been answered before it was sent
}

// play sends all requests, or those of the best order one at a time.
func (p *Player) play(w Workload, best bool) {
	clients := w.Clients
	if best && w.Best == nil {
		clients = [][]Request{w.Least}
	}
	for i, list := range clients {
		var address string
		if w.Addresses != nil && !best {
			address = w.Addresses[i]
		}
		client := chat.ClientFrom(address)
		defer client.CloseIdleConnections()
		switch {
		case best:
			p.wg.Wait() // one client after the other
			p.wg.Go(func() { p.sequence(client, i, list, w.Chats) })
		case w.Open:
			for k, q := range list {
				p.wg.Go(func() {
					// In the order of the list, client by client: the first one must arrive first.
					time.Sleep(time.Duration(k*len(clients)+i) * time.Millisecond)
					p.Send(client, i, q)
				})
			}
		case w.Depth > 1:
			queue := make(chan Request, len(list))
			for _, q := range list {
				queue <- q
			}
			close(queue)
			for range w.Depth {
				p.wg.Go(func() {
					for q := range queue {
						p.Send(client, i, q)
					}
				})
			}
		default:
			p.wg.Go(func() { p.sequence(client, i, list, w.Chats) })
		}
	}
	p.wg.Wait()
}

// sequence sends requests one after the other, each when the last one is answered. In a chat,
// answers become messages of the next request.
func (p *Player) sequence(client *http.Client, from int, list []Request, isChat bool) {
	var history []chat.Message
	for i, q := range list {
		if isChat && i > 0 {
			q.Messages = append(slices.Clone(history), q.Messages[len(q.Messages)-1])
		}
		text := p.Send(client, from, q)
		if isChat {
			history = append(slices.Clone(q.Messages), chat.Assistant(text))
		}
	}
}

// Send returns the answer, or "" after an error.
func (p *Player) Send(client *http.Client, from int, q Request) string {
	if p.Ctx.Err() != nil {
		return ""
	}
	p.mu.Lock()
	before := len(p.done)
	p.mu.Unlock()
	// The same request always takes the same way in, so that runs can be compared.
	entry := rand.New(rand.NewPCG(uint64(q.ID), 5)).IntN(len(p.urls))
	sent := time.Now()
	a, err := Ask(p.Ctx, client, p.urls[entry], q)
	if err != nil && p.retries {
		p.mu.Lock()
		p.retried++
		p.mu.Unlock()
		a, err = Ask(p.Ctx, client, p.urls[(entry+1)%len(p.urls)], q)
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
	p.done = append(p.done, Completion{q, from, a, took, before})
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

// Ask sends a request, not as a stream.
func Ask(ctx context.Context, client *http.Client, url string, q Request) (chat.Answer, error) {
	return chat.Send(ctx, client, url, chat.Request{
		Model: q.Model, Messages: q.Messages, Generate: q.Generate, NumCtx: q.NumCtx, Priority: q.Priority,
	})
}
