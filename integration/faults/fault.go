//go:build linux

package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"
)

// fault is something that breaks, and is put right after a while.
type fault struct {
	kind  string
	what  string // "p1", "p1 and s2"
	begin func() error
	end   func(context.Context) error
}

// faultKinds are the kinds of faults. Each makes a fault of random participants; nil if there is
// none of this kind here.
var faultKinds = []func(*fleet, *rand.Rand) *fault{
	(*fleet).killProxy, (*fleet).killServer, (*fleet).killValkey, (*fleet).stopProxy,
	(*fleet).cutProxies, (*fleet).cutServer, (*fleet).cutValkey,
}

// plan returns n faults: each kind before any comes again.
func (f *fleet) plan(n int, r *rand.Rand) []*fault {
	var all []*fault
	for len(all) < n {
		before := len(all)
		for _, i := range r.Perm(len(faultKinds)) {
			if fault := faultKinds[i](f, r); fault != nil && len(all) < n {
				all = append(all, fault)
			}
		}
		if len(all) == before {
			break
		}
	}
	return all
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

func (f *fleet) killProxy(r *rand.Rand) *fault {
	p := pick(r, f.proxies)
	return &fault{"kill -9 of a proxy", p.name, p.kill, func(ctx context.Context) error {
		if err := p.start(); err != nil {
			return err
		}
		return f.isReady(ctx, p)
	}}
}

func (f *fleet) killServer(r *rand.Rand) *fault {
	s := pick(r, f.servers)
	return &fault{"kill -9 of a server", s.name, func() error { s.kill(); return nil }, s.restart}
}

func (f *fleet) killValkey(*rand.Rand) *fault {
	return &fault{"kill -9 of Valkey", f.valkey.name, f.valkey.kill, func(ctx context.Context) error {
		if err := f.valkey.start(); err != nil {
			return err
		}
		return f.comesUp(ctx, f.valkey)
	}}
}

// stopProxy is what a machine does that swaps, or a virtual one that is moved.
func (f *fleet) stopProxy(r *rand.Rand) *fault {
	p := pick(r, f.proxies)
	signal := func(s syscall.Signal) error { return p.cmd.Process.Signal(s) }
	return &fault{"SIGSTOP of a proxy", p.name,
		func() error { return signal(syscall.SIGSTOP) }, func(context.Context) error { return signal(syscall.SIGCONT) }}
}

func (f *fleet) cutProxies(r *rand.Rand) *fault {
	if len(f.proxies) < 2 {
		return nil
	}
	i := r.IntN(len(f.proxies))
	j := (i + 1 + r.IntN(len(f.proxies)-1)) % len(f.proxies)
	return f.cut("two proxies", f.proxies[i].at, f.proxies[j].at)
}

func (f *fleet) cutServer(r *rand.Rand) *fault {
	if f.Sidecar {
		return nil // they are on one host
	}
	return f.cut("a proxy and a server", pick(r, f.proxies).at, pick(r, f.servers).at)
}

func (f *fleet) cutValkey(r *rand.Rand) *fault {
	return f.cut("a proxy and Valkey", pick(r, f.proxies).at, f.valkey.at)
}

func (f *fleet) cut(kind string, a, b place) *fault {
	if f.Lab == nil {
		return nil // loopback cannot be cut
	}
	return &fault{"partition between " + kind, fmt.Sprintf("%s and %s", a.name, b.name),
		func() error { return f.Lab.Cut(a.host, b.host) },
		func(context.Context) error { return f.Lab.Heal(a.host, b.host) }}
}

// breakThings makes the faults one after the other until there are no more, or ctx ends.
func (f *fleet) breakThings(ctx context.Context, r *rand.Rand, tell func(fault *fault, took time.Duration)) error {
	for _, fault := range f.plan(f.Faults, r) {
		hold := f.HoldLeast + time.Duration(r.Int64N(int64(f.HoldMost-f.HoldLeast)+1))
		began := time.Now()
		if err := fault.begin(); err != nil {
			return fmt.Errorf("%s (%s): %w", fault.kind, fault.what, err)
		}
		sleep(ctx, hold)
		if err := fault.end(context.WithoutCancel(ctx)); err != nil {
			return fmt.Errorf("the end of %s (%s): %w", fault.kind, fault.what, err)
		}
		tell(fault, time.Since(began))
		if sleep(ctx, f.Pause); ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
