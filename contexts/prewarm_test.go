package contexts

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

var four = map[string]modelSpec{"m": {slots: 4}}

// always reports that nobody asks.
func always() bool { return true }

func (p *proxied) fill(more func() bool) int {
	return p.m.Fill(context.Background(), ollamaPort, "m", more)
}

// used stores the states of prompts; the first ones are used most often.
func (p *proxied) used(prompts ...string) {
	for i, name := range prompts {
		for n := range 1 + len(prompts) - i {
			p.must(ask{model: "m", prompt: long(name, n), answer: 5})
			p.rest(time.Minute)
			p.unload()
		}
	}
}

// TestFill: after a load the empty slots get the most used states, so that almost nothing of their
// prompts is evaluated, and nothing is attached for them.
func TestFill(t *testing.T) {
	with(t, four, ample, func(p *proxied) {
		p.used("a", "b", "c", "d", "e")
		p.must(ask{model: "m", prompt: long("z", 1), answer: 5})
		p.m.ending.Wait()
		if n := p.fill(always); n != 3 {
			t.Errorf("%d states were attached, of three empty slots", n)
		}
		if n := p.fill(always); n != 0 {
			t.Errorf("%d states were attached once more", n)
		}
		restores := p.restores
		for i, name := range []string{"a", "b", "c", "z"} {
			p.evaluates(ask{model: "m", prompt: long(name, 100+i), answer: 5}, 1, 25)
			p.rest(time.Second)
		}
		if p.restores != restores {
			t.Errorf("%d states were attached for prompts that were warm", p.restores-restores)
		}
		if c := p.m.Counts(); c.Filled != 3 {
			t.Errorf("%d are counted", c.Filled)
		}
	})
}

// TestFillLeavesTheLeastUsed: a prompt that fits none takes the slot of the least used state.
func TestFillLeavesTheLeastUsed(t *testing.T) {
	with(t, four, ample, func(p *proxied) {
		p.used("a", "b", "c", "d")
		p.ensure("m", 4096).leave()
		if n := p.fill(always); n != 4 {
			t.Errorf("%d states were attached, of four empty slots", n)
		}
		p.must(ask{model: "m", prompt: long("z", 1), answer: 5})
		p.rest(time.Second)
		restores := p.restores
		for _, name := range []string{"a", "b", "c"} {
			p.evaluates(ask{model: "m", prompt: long(name, 100), answer: 5}, 1, 25)
			p.rest(time.Second)
		}
		if p.restores != restores {
			t.Errorf("%d states had to be attached again", p.restores-restores)
		}
	})
}

// TestFillNothing: if it is not worth it, not allowed, or a client asks.
func TestFillNothing(t *testing.T) {
	for _, tt := range []struct {
		name  string
		limit contextstore.FileLimits
		owner string
		set   func(p *proxied) (done func())
		more  func() bool
		want  int
	}{
		{name: "nobody's", want: 1},
		{name: "somebody's", owner: "key"},
		{name: "somebody's, shared", owner: "key", limit: contextstore.FileLimits{Share: true}, want: 1},
		{name: "somebody asks", more: func() bool { return false }},
		{name: "somebody's request runs", set: func(p *proxied) func() {
			u := p.m.Before(context.Background(), p.request(ask{model: "m", context: 4096, prompt: long("q", 1)}))
			return func() { u.After(Answer{Unsent: true}, func() {}) }
		}},
		{name: "the engine refuses", set: func(p *proxied) func() {
			p.faults.restore = func(context.Context, *llama) error { return engine.ErrRefused }
			return func() {
				if n := len(p.store.List()); n != 0 {
					t.Errorf("%d states are stored that the engine refuses", n)
				}
			}
		}},
		{name: "it is of no use", set: func(p *proxied) func() {
			p.m.mu.Lock()
			defer p.m.mu.Unlock()
			p.m.learned("build m").partial.until = time.Now().Add(time.Hour)
			return func() {}
		}},
		{name: "too long for the context", set: func(p *proxied) func() {
			p.unload()
			p.ensure("m", 512).leave()
			return func() {}
		}},
		{name: "another model's", set: func(p *proxied) func() {
			p.unload()
			return func() {}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.limit.Bytes = ample.Bytes
			with(t, four, tt.limit, func(p *proxied) {
				p.must(ask{model: "m", prompt: long("a", 1), answer: 5, owner: tt.owner})
				p.rest(time.Minute)
				p.unload()
				p.ensure("m", 4096).leave()
				done := func() {}
				if tt.set != nil {
					done = tt.set(p)
				}
				if tt.more == nil {
					tt.more = always
				}
				if n := p.fill(tt.more); n != tt.want || p.restores != tt.want {
					t.Errorf("%d states were attached, %d by the engine's count; want %d", n, p.restores, tt.want)
				}
				done()
			})
		})
	}
	if n := (*Manager)(nil).Fill(context.Background(), ollamaPort, "m", always); n != 0 {
		t.Errorf("no manager has attached %d states", n)
	}
}

// TestFillBesideRequests: a request that arrives meanwhile gets the right slot, and waits for at
// most one state.
func TestFillBesideRequests(t *testing.T) {
	with(t, four, ample, func(p *proxied) {
		p.used("a", "b", "c", "d")
		for round := range 20 {
			p.unload()
			p.ensure("m", 4096).leave()
			var wg sync.WaitGroup
			wg.Go(func() { p.fill(always) })
			for i, name := range []string{"a", "b", "y"} {
				wg.Go(func() {
					time.Sleep(time.Duration(round*i) * time.Millisecond)
					began := time.Now()
					u := p.m.Before(context.Background(), p.request(ask{
						model: "m", context: 4096, prompt: long(name, 1000+round),
					}))
					if took := time.Since(began); took > time.Second {
						t.Errorf("a request waited for %v", took)
					}
					u.After(Answer{Unsent: true}, func() {})
				})
			}
			wg.Wait()
			p.check()
		}
	})
}
