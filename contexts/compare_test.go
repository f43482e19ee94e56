package contexts

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// load is a random schedule: the requests of some clients, in order, and other events.
type load struct {
	models  map[string]modelSpec
	most    int
	disk    diskSpeed
	limit   int64
	clients [][]step
}

// step is a client's next step.
type step struct {
	ask
	pause time.Duration // before the step
	// 'r': a request; 'd': one past the proxy; 'u': everything is unloaded; 'p': the proxy
	// restarts.
	what byte
}

const mostTokens = 1610 // of a random prompt

// randomLoad makes a schedule from a seed.
func randomLoad(seed uint64) load {
	r := rand.New(rand.NewPCG(seed, 7))
	l := load{
		models: map[string]modelSpec{}, most: 1 + r.IntN(2), disk: ssd,
		limit: []int64{1 << 40, 8 << 20, 2 << 20}[r.IntN(3)],
	}
	for i := range 1 + r.IntN(2) {
		l.models[string(rune('a'+i))] = modelSpec{slots: 1 + r.IntN(4), window: r.IntN(4) == 0}
	}
	if r.IntN(3) == 0 {
		l.disk = diskSpeed{writing: ssd.writing * 20, reading: ssd.reading * 20}
	}
	prefixes, tokens := 1+r.IntN(12), 50+r.IntN(1500)
	longest := []time.Duration{0, time.Second, time.Minute}[r.IntN(3)]
	clients := 1 + r.IntN(4)
	for c := range clients {
		var steps []step
		for i := range 120 / clients {
			s := step{what: 'r'}
			if longest > 0 {
				s.pause = time.Duration(r.Int64N(int64(longest)))
			}
			switch n := r.IntN(40); {
			case n < 3:
				s.what = 'd'
			case n == 3:
				s.what = 'u'
			case n == 4 && clients == 1:
				s.what = 'p'
			}
			p := r.IntN(prefixes)
			s.ask = ask{
				model: string(rune('a' + r.IntN(len(l.models)))), answer: 1 + r.IntN(10),
				streams: r.IntN(2) == 0,
				prompt: text{
					{fmt.Sprint("prefix ", p), tokens + p*r.IntN(2)}, {fmt.Sprint(c, i), 5 + r.IntN(40)},
				},
			}
			if r.IntN(10) == 0 {
				s.context = 8192
			}
			steps = append(steps, s)
		}
		l.clients = append(l.clients, steps)
	}
	return l
}

// spent is the cost of a schedule.
type spent struct {
	tokens, loads, saves, restores int
	took                           time.Duration
	failed                         map[string]uint64
}

// play plays a schedule, with a manager or without one, in virtual time.
func (l load) play(t *testing.T, managed bool) (s spent) {
	synctest.Test(t, func(t *testing.T) {
		p := newProxied(t, l.models, contextstore.FileLimits{Bytes: l.limit})
		p.most, p.disk = l.most, l.disk
		for _, x := range slices.Concat(l.clients...) {
			if x.what == 'd' || len(l.clients) > 1 {
				p.mistakes++ // it may be as long as another one, whose slot it takes
			}
		}
		if l.most == 1 && len(l.models) > 1 {
			p.turn = make(chan struct{}, 1)
		}
		if managed {
			p.begin()
		}
		began := time.Now()
		var wg sync.WaitGroup
		for _, steps := range l.clients {
			wg.Go(func() {
				for _, x := range steps {
					p.step(x, managed)
				}
			})
		}
		wg.Wait()
		s.took = time.Since(began)
		if managed {
			p.m.ending.Wait()
			p.finish()
			s.failed = p.failed
		}
		s.tokens, s.loads, s.saves, s.restores = p.total(), p.loads, p.saves, p.restores
	})
	return s
}

func (p *proxied) step(x step, managed bool) {
	time.Sleep(x.pause)
	switch x.what {
	case 'u':
		if p.m != nil && len(x.prompt)%2 == 0 {
			p.m.Leave(context.Background(), ollamaPort)
		}
		p.unload()
	case 'p':
		if managed {
			p.finish()
			p.begin()
		}
	case 'd':
		for again := true; again; { // until no unload interrupts it
			_, err := p.direct(context.Background(), x.ask)
			again = err != nil
		}
	default:
		for again := true; again; {
			_, err := p.ask(context.Background(), x.ask)
			again = err != nil
		}
	}
}

// compare checks that a manager does no harm: at most 1 % more tokens, and 5 % more time.
func (l load) compare(t *testing.T) (with, without spent) {
	without, with = l.play(t, false), l.play(t, true)
	// The cost of attempts until a manager learns that a model makes no use of them.
	tokens, took := without.tokens*101/100, without.took*105/100+5*time.Second
	for _, m := range l.models {
		if m.window { // each manager learns it again
			vain := int(with.failed[FailedUnused]) * mostTokens
			tokens, took = tokens+vain, took+time.Duration(vain)*perToken
		}
	}
	if len(l.clients) > 1 {
		// The order of concurrent requests, the slot of a prompt, and what an unload interrupts
		// depend on chance.
		tokens += without.tokens/20 + 2*mostTokens
		took += time.Duration(max(with.loads-without.loads, 0))*loadTakes + without.took/20
	}
	if with.tokens > tokens {
		t.Errorf("%d tokens were evaluated, and %d without a manager: %+v", with.tokens, without.tokens, with)
	}
	if with.took > took {
		t.Errorf("it took %v, and %v without a manager: %+v", with.took, without.took, with)
	}
	return with, without
}

// TestNoHarm plays schedules from different seeds. Each must take not much more than without a
// manager, and all together must take less.
func TestNoHarm(t *testing.T) {
	var all, plain spent
	for seed := range uint64(24) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			with, without := randomLoad(seed).compare(t)
			t.Logf("%.3f of the tokens, %.3f of the time, %+v", float64(with.tokens)/float64(without.tokens),
				with.took.Seconds()/without.took.Seconds(), with)
			all.add(with)
			plain.add(without)
		})
	}
	t.Logf("in all %+v, and without a manager %+v", all, plain)
	if all.tokens > plain.tokens*9/10 || all.took > plain.took {
		t.Error("that is no gain")
	}
}

func (s *spent) add(o spent) {
	s.tokens += o.tokens
	s.took += o.took
	s.loads += o.loads
	s.saves += o.saves
	s.restores += o.restores
}

// FuzzNoHarm looks for a schedule that takes longer with a manager.
func FuzzNoHarm(f *testing.F) {
	f.Fuzz(func(t *testing.T, seed uint64) { randomLoad(seed).compare(t) })
}
