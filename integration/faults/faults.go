//go:build linux

// Package faults proves what a fleet promises: it runs proxies, Ollama servers and a Valkey on hosts
// of their own, with clients at all proxies, and kills, stops and cuts off all of them. Every request
// must end, with the right answer or with an error, and no server may begin with a request that any
// server has begun with before.
package faults

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/netns"
)

// Config says what to run.
type Config struct {
	Proxy   string     // the program
	Dir     string     // an empty folder
	Lab     *netns.Lab // where; nil: on loopback, without partitions
	Proxies int
	Servers int  // not used with Sidecar
	Sidecar bool // a server beside each proxy, which is its only one
	Real    bool // real Ollama servers with a small model, rather than simulated ones

	Seed   uint64
	Faults int
	// HoldLeast and HoldMost bound how long a fault lasts; Pause is the time between two.
	HoldLeast, HoldMost, Pause time.Duration

	Report func(format string, args ...any)
}

// Run runs clients while things break, and returns what did not hold.
func Run(ctx context.Context, c Config) (err error) {
	f, err := c.start(ctx)
	defer func() { err = f.end(err) }()
	if err != nil {
		return err
	}
	load := f.load(ctx, f.anywhere)
	r := rand.New(rand.NewPCG(c.Seed, 0))
	broke := f.breakThings(ctx, r, func(fault *fault, took time.Duration) {
		load.count("fault: " + fault.kind)
		c.Report("%s (%s) for %.1f s; %s", fault.kind, fault.what, took.Seconds(), load.told())
	})
	load.stop()
	c.Report("in the end: %s", load.told())
	err = errors.Join(broke, load.verdict())
	if broke != nil {
		return err
	}
	return errors.Join(err, f.servesAgain(ctx), f.isIdle(ctx), f.sameAnswers(ctx, load))
}

// RunRolling restarts all proxies, one after the other and rounds times, while clients run that
// follow the proxies' pages of readiness. No request may fail.
func RunRolling(ctx context.Context, c Config, rounds int) (err error) {
	f, err := c.start(ctx)
	defer func() { err = f.end(err) }()
	if err != nil {
		return err
	}
	balancer := f.balance(ctx)
	load := f.load(ctx, balancer.entries)
	restart := func() error {
		for range rounds {
			for _, p := range f.proxies {
				if err := p.stop(drainDelay + drainLimit); err != nil {
					return err
				}
				if err := p.start(); err != nil {
					return err
				}
				if err := errors.Join(f.isReady(ctx, p), balancer.sees(ctx, p)); err != nil {
					return err
				}
				load.count("restart")
				c.Report("%s was restarted; %s", p.name, load.told())
			}
		}
		return nil
	}
	err = restart()
	load.stop()
	balancer.stop()
	c.Report("in the end: %s", load.told())
	for _, name := range load.outcomes() {
		if kind, how, _ := strings.Cut(name, ": "); kind != "restart" && how != answered && how != left {
			err = errors.Join(err, fmt.Errorf("a request failed: %s (%d times)", name, load.outcome[name]))
		}
	}
	return errors.Join(err, load.verdict(), f.servesAgain(ctx), f.isIdle(ctx))
}

// end closes the fleet, and reports its logs if something did not hold.
func (f *fleet) end(err error) error {
	if err != nil {
		f.dump()
	}
	if err = errors.Join(err, f.close()); err != nil {
		f.Report("%s", f.logs())
	}
	return err
}

// load is the clients, and how their requests ended.
type load struct {
	f    *fleet
	stop func() // lets requests end, and waits

	mu      sync.Mutex
	outcome map[string]int // guarded by mu until stop has returned, like the others
	bad     map[string]int
	results map[*request]result
	longest time.Duration
}

// load starts the clients. Each asks the entries in an order that entries returns.
func (f *fleet) load(ctx context.Context, entries func(*rand.Rand) []*process) *load {
	l := &load{f: f, outcome: map[string]int{}, bad: map[string]int{}, results: map[*request]result{}}
	running, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i, k := range kinds {
		for n := range k.clients {
			r := rand.New(rand.NewPCG(f.Seed, uint64(1+100*i+n)))
			wg.Go(func() { // ends with running
				for running.Err() == nil {
					q := newRequest(k, r)
					l.add(q, f.ask(ctx, q, entries(r)))
					sleep(running, time.Duration(r.IntN(100))*time.Millisecond)
				}
			})
		}
	}
	l.stop = func() {
		stop()
		wg.Wait()
	}
	return l
}

// anywhere returns all proxies in any order.
func (f *fleet) anywhere(r *rand.Rand) []*process {
	all := slices.Clone(f.proxies)
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

func (l *load) count(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.outcome[name]++
}

func (l *load) add(q *request, res result) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.outcome[q.kind.name+": "+res.outcome]++
	if q.body = nil; !l.f.Real { // a soak has many
		q.reference = nil
	}
	l.results[q] = res
	l.longest = max(l.longest, res.took)
	if res.wrong != nil {
		l.bad[fmt.Sprintf("%s at %s: %v", q.kind.name, res.entry, res.wrong)]++
	}
}

func (l *load) outcomes() []string {
	return slices.Sorted(maps.Keys(l.outcome))
}

func (l *load) told() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := []string{fmt.Sprintf("%d requests, the longest %.1f s", len(l.results), l.longest.Seconds())}
	for _, name := range l.outcomes() {
		all = append(all, fmt.Sprintf("%s %d", name, l.outcome[name]))
	}
	return strings.Join(all, ", ")
}

// verdict returns what did not hold. The clients must have stopped.
func (l *load) verdict() error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(l.bad)) {
		errs = append(errs, fmt.Errorf("%s (%d times)", name, l.bad[name]))
	}
	for _, k := range kinds {
		if want := k.wants(); l.outcome[k.name+": "+want] == 0 {
			errs = append(errs, fmt.Errorf("no request of the kind %s ended as %q", k.name, want))
		}
	}
	begun := 0
	for q, res := range l.results {
		times := l.f.ledger.of(q.id)
		begun += len(times)
		if len(times) > 1 {
			errs = append(errs, fmt.Errorf("%s (%s at %s: %s) was begun %d times: %v", q.id, q.kind.name, res.entry, res.outcome, len(times), times))
		}
		if res.outcome == answered && len(times) != 1 {
			errs = append(errs, fmt.Errorf("%s was answered, and was begun %d times", q.id, len(times)))
		}
	}
	l.f.Report("%d requests, of which %d were begun; no answer took longer than %.1f s (the bound is %.0f s)",
		len(l.results), begun, l.longest.Seconds(), l.f.bound().Seconds())
	return errors.Join(errs...)
}

func (k kind) wants() string {
	if k.leaves {
		return left
	}
	return answered
}

// againLimit bounds how long all proxies together take to answer again, besides one request that
// takes as long as any may.
const againLimit = 3 * time.Minute

// errNotAgain is the cause of giving up the requests of servesAgain.
var errNotAgain = errors.New("the proxies together take too long to answer again")

// servesAgain waits until each proxy answers each kind of request again, and reaches each server
// that it has. It stops at the first that does not: the others would likely take as long, each.
func (f *fleet) servesAgain(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, f.bound()+againLimit, errNotAgain)
	defer cancel()
	r := rand.New(rand.NewPCG(f.Seed, 1<<32))
	for _, p := range f.proxies {
		for _, k := range kinds {
			if k.leaves {
				continue
			}
			// The context of a single check is not for these requests: a good one may take longer.
			ask := func(context.Context) error {
				q := newRequest(k, r)
				res := f.ask(ctx, q, []*process{p})
				if res.outcome != answered {
					return errors.Join(fmt.Errorf("%s: %s", k.name, res.outcome), res.wrong)
				}
				if times := f.ledger.of(q.id); len(times) != 1 {
					return fmt.Errorf("%s: it was begun %d times", k.name, len(times))
				}
				return nil
			}
			err := eventually(ctx, f.bound(), p.name+" does not answer again", ask)
			if err != nil {
				return errors.Join(err, context.Cause(ctx))
			}
		}
	}
	return nil
}

// compared is how many answers of real servers are compared.
const compared = 40

// sameAnswers asks a real server, directly and one after the other, what clients have asked: the
// answers are the same. Those of simulated servers have been compared already.
func (f *fleet) sameAnswers(ctx context.Context, l *load) error {
	if !f.Real {
		return nil
	}
	var errs []error
	n := 0
	for _, q := range slices.SortedFunc(maps.Keys(l.results), func(a, b *request) int { return strings.Compare(a.id, b.id) }) {
		res := l.results[q]
		if res.outcome != answered || n == compared {
			continue
		}
		n++
		want, err := f.direct(ctx, q)
		if err == nil && res.text != want {
			err = fmt.Errorf("another answer than directly: %.200q, want %.200q", res.text, want)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", q.kind.name, err))
		}
	}
	f.Report("%d answers were compared with direct ones", n)
	return errors.Join(errs...)
}
