package fleetsim

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

var full = flag.Bool("full", false, "64 servers, 8 proxies, 1,000 clients; otherwise an eighth of that, and 3 proxies")

func sizes() size {
	if *full {
		return size{servers: 64, proxies: 8, clients: 1000, each: 10}
	}
	return size{servers: 8, proxies: 3, clients: 125, each: 8}
}

// through returns the same with that many proxies.
func (z size) through(proxies int) size {
	z.proxies = proxies
	return z
}

// prefixesPerServer is how many prefixes there are for each server.
const prefixesPerServer = 4

// The most that a fleet may evaluate, and the least fairness that it may have, relative to one proxy
// in front of the same servers.
const (
	mostTokens      = 1.05
	mostSkewed      = 1.2 // if some prefixes are hot: owners take them over from each other
	leastFair       = 0.95
	mostInteractive = 0.25 // of the others' time, that of an interactive request
)

// outcome is what a run came to.
type outcome struct {
	proxies   int
	evaluated int64
	loads     int
	makespan  time.Duration
	took      []time.Duration // by each request, sorted
}

func quantile(took []time.Duration, part float64) time.Duration {
	slices.Sort(took)
	return took[int(part*float64(len(took)-1))].Round(time.Millisecond)
}

// run lets clients ask in a world, and says what came of it. ask notes how long a request took.
func run(t *testing.T, z size, clients func(w *world, ask func(q request) time.Duration)) (o outcome) {
	began := time.Now()
	o.proxies = z.proxies
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, z)
		var mu sync.Mutex
		start := time.Now()
		clients(w, func(q request) time.Duration {
			took := w.ask(q)
			mu.Lock()
			defer mu.Unlock()
			o.took = append(o.took, took)
			return took
		})
		o.makespan = time.Since(start)
		prefixes := 0
		for _, s := range w.sims {
			st := s.Stats()
			o.evaluated += st.Evaluated
			o.loads += st.Loads
			for _, e := range s.Evaluations(ollamasim.Mark{}) {
				if e.Reused < shared/2 {
					prefixes++
				}
			}
		}
		w.report(start)
		t.Logf("prefixes evaluated: %d", prefixes)
	})
	t.Logf("%d proxies: %d tokens evaluated, %d loads, makespan %v, median %v, p99 %v (real time %v)", z.proxies, o.evaluated, o.loads,
		o.makespan.Round(time.Millisecond), quantile(o.took, 0.5), quantile(o.took, 0.99), time.Since(began).Round(time.Millisecond))
	return o
}

// report logs what proxies sent each other since a time.
func (w *world) report(since time.Time) {
	if len(w.fleets) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var hops, taken uint64
	for _, f := range w.fleets {
		c := f.Counts()
		hops, taken = hops+c.Received, taken+c.Given
	}
	seconds := time.Since(since).Seconds()
	w.t.Logf("between proxies: %d requests passed on, %d taken over by other proxies' servers", hops, taken)
	for kind, m := range w.sent {
		w.t.Logf("between proxies: %s: %d messages of %d bytes, %.1f messages and %.0f KB a second in all", kind, m.n, m.bytes/m.n,
			float64(m.n)/seconds, float64(m.bytes)/1e3/seconds)
	}
}

// compare logs what a fleet needed relative to one proxy, and checks the tokens.
func compare(t *testing.T, one, many outcome, most float64) {
	t.Helper()
	tokens := float64(many.evaluated) / float64(one.evaluated)
	t.Logf("%d proxies ÷ one: tokens %.3f, makespan %.3f, p99 %.3f", many.proxies, tokens,
		many.makespan.Seconds()/one.makespan.Seconds(), quantile(many.took, 0.99).Seconds()/quantile(one.took, 0.99).Seconds())
	if tokens > most {
		t.Errorf("%d proxies evaluated %.3f times as many tokens as one, want at most %.2f", many.proxies, tokens, most)
	}
}

// TestCrowd has clients in closed loops that ask for any prefix, each time at any proxy: for all
// equally often, or for a few much more often than for the others.
func TestCrowd(t *testing.T) {
	crowd := func(z size, choose func(*rand.Rand) int) outcome {
		return run(t, z, func(w *world, ask func(request) time.Duration) {
			var wg sync.WaitGroup
			for c := range z.clients {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(1, uint64(c)))
					time.Sleep(time.Duration(r.Int64N(int64(time.Second))))
					for n := range z.each {
						ask(request{
							entry: r.IntN(z.proxies), prefix: choose(r),
							id: c*z.each + n, from: fmt.Sprintf("10.0.%d.%d", c/250, c%250),
						})
					}
				})
			}
			wg.Wait()
		})
	}
	z := sizes()
	prefixes := z.servers * prefixesPerServer
	for _, c := range []struct {
		name   string
		choose func(*rand.Rand) int
		most   float64
		varies float64 // by how much runs of few requests differ, also those of one proxy
	}{
		{"uniform", func(r *rand.Rand) int { return r.IntN(prefixes) }, mostTokens, 0.05},
		// Of 32 prefixes the first has a third of the requests, of 256 a quarter.
		{"skewed", func(r *rand.Rand) int {
			return int(rand.NewZipf(r, 1.2, 1, uint64(prefixes-1)).Uint64())
		}, mostSkewed, 0.15},
	} {
		t.Run(c.name, func(t *testing.T) {
			most := c.most
			if !*full {
				most += c.varies
			}
			compare(t, crowd(z.through(1), c.choose), crowd(z, c.choose), most)
		})
	}
}

// TestQueued has all requests sent at once, to any proxy, on servers without a host cache, so that
// the order of a queue decides what is evaluated again.
func TestQueued(t *testing.T) {
	queued := func(z size) outcome {
		return run(t, z, func(w *world, ask func(request) time.Duration) {
			const each = 6
			var wg sync.WaitGroup
			r := rand.New(rand.NewPCG(11, 7))
			for i, id := range r.Perm(z.servers * prefixesPerServer * each) {
				entry := r.IntN(z.proxies)
				wg.Go(func() {
					time.Sleep(time.Duration(i) * time.Millisecond)
					ask(request{entry: entry, prefix: id / each, id: id, from: "10.0.0.1"})
				})
			}
			wg.Wait()
		})
	}
	z := sizes()
	z.lanes, z.noCache = 1, true
	compare(t, queued(z.through(1)), queued(z), mostTokens)
}

// TestFair has one client with many more requests under way than two others, each at proxies of its
// own, and one that is interactive. Servers are to serve the clients equally, wherever they ask, and
// the interactive one first.
func TestFair(t *testing.T) {
	type figures struct {
		fair                float64 // Jain's index of the tokens that clients were served
		interactive, others time.Duration
	}
	measure := func(z size, lasts time.Duration) (f figures) {
		var mu sync.Mutex
		served := make([]float64, 3)
		var interactive, others []time.Duration
		run(t, z, func(w *world, ask func(request) time.Duration) {
			const depth = 4 // so that each client has requests waiting at every server
			// It counts when all servers have loaded the model and served all clients.
			begin := time.Now().Add(lasts / 3)
			end := begin.Add(lasts) // several quanta of each server (docs/lanes.md)
			var wg sync.WaitGroup
			loops := func(client, n int, priority string, think time.Duration, note func(took time.Duration)) {
				for k := range n {
					wg.Go(func() {
						r := rand.New(rand.NewPCG(uint64(client), uint64(k)))
						for n := 0; time.Now().Before(end); n++ {
							took := ask(request{
								// Each client has entries of its own, if there are so many.
								entry: client*z.proxies/4 + r.IntN(max(1, z.proxies/4)), prefix: r.IntN(z.servers * prefixesPerServer),
								id: client<<24 + k<<12 + n, from: fmt.Sprintf("10.0.0.%d", client+1), priority: priority,
							})
							if now := time.Now(); now.After(begin) && now.Before(end) {
								mu.Lock()
								note(took)
								mu.Unlock()
							}
							time.Sleep(think)
						}
					})
				}
			}
			for client, share := range []int{70, 15, 15} { // per cent of the loops
				loops(client, depth*z.clients*share/100, "", 0, func(took time.Duration) {
					served[client]++
					others = append(others, took)
				})
			}
			loops(3, 1, "interactive", 500*time.Millisecond, func(took time.Duration) { interactive = append(interactive, took) })
			wg.Wait()
		})
		var sum, squares float64
		for _, s := range served {
			sum, squares = sum+s, squares+s*s
		}
		f = figures{sum * sum / float64(len(served)) / squares, quantile(interactive, 0.5), quantile(others, 0.5)}
		t.Logf("%d proxies: answers of the three clients %v, Jain's index %.3f; interactive: %d answers, median %v, the others' %v",
			z.proxies, served, f.fair, len(interactive), f.interactive, f.others)
		return f
	}
	z, lasts := sizes(), 3*time.Minute
	if !*full {
		z.servers, z.clients, lasts = z.servers/2, z.clients/2, 150*time.Second
	}
	one, many := measure(z.through(1), lasts), measure(z, lasts)
	least := leastFair
	if !*full { // in so short a time the index of one proxy is anything from 0.95 to 1
		least -= 0.03
	}
	if many.fair < least*one.fair || one.fair < least {
		t.Errorf("Jain's index is %.3f, and %.3f through one proxy: want at least %.2f of that, and for that", many.fair, one.fair, least)
	}
	if ratio := many.interactive.Seconds() / many.others.Seconds(); ratio > mostInteractive {
		t.Errorf("an interactive request takes %.2f times as long as others, want at most %.2f", ratio, mostInteractive)
	}
}
