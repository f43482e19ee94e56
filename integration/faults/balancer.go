//go:build linux

package faults

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
)

// balancer knows which proxies are ready, as a load balancer does.
type balancer struct {
	f    *fleet
	stop func()

	mu    sync.Mutex
	ready map[*process]bool // guarded by mu
}

// checkEvery is how often the balancer asks: several times within --drain-delay.
const checkEvery = drainDelay / 10

// balance asks all proxies now, and then again and again until stop is called.
func (f *fleet) balance(ctx context.Context) *balancer {
	b := &balancer{f: f, ready: map[*process]bool{}}
	ctx, cancel := context.WithCancel(ctx)
	var first, all sync.WaitGroup
	for _, p := range f.proxies {
		first.Add(1)
		all.Go(func() { // ends with stop
			for again := false; ; again = true {
				b.check(ctx, p)
				if !again {
					first.Done()
				}
				if sleep(ctx, checkEvery); ctx.Err() != nil {
					return
				}
			}
		})
	}
	first.Wait()
	b.stop = func() {
		cancel()
		all.Wait()
	}
	return b
}

func (b *balancer) check(ctx context.Context, p *process) {
	ctx, cancel := context.WithTimeout(ctx, drainDelay/3)
	defer cancel()
	_, err := b.f.get(ctx, p, "/_cacheproxy/ready")
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready[p] = err == nil
}

// entries returns the ready proxies in any order, and then the others.
func (b *balancer) entries(r *rand.Rand) []*process {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.f.anywhere(r)
	slices.SortStableFunc(all, func(x, y *process) int {
		switch {
		case b.ready[x] == b.ready[y]:
			return 0
		case b.ready[x]:
			return -1
		}
		return 1
	})
	return all
}

// sees waits until the balancer has seen that a proxy is ready.
func (b *balancer) sees(ctx context.Context, p *process) error {
	return eventually(ctx, startLimit, "the balancer does not see "+p.name, func(context.Context) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !b.ready[p] {
			return errors.New("it is not ready")
		}
		return nil
	})
}
