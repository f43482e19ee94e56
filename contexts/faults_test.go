package contexts

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// TestUselessStates: a model reuses restored tokens only if a prompt continues all of them. The
// manager learns that, and tries again later, less and less often.
func TestUselessStates(t *testing.T) {
	models := map[string]modelSpec{"m": {slots: 1, window: true}}
	const rounds = 400
	work := func(p *proxied, pause time.Duration) {
		for i := range rounds {
			p.must(ask{model: "m", prompt: long(fmt.Sprint("prefix ", i%2), i), answer: 2})
			p.rest(pause)
		}
	}
	for _, pause := range []time.Duration{0, 20 * time.Second} {
		t.Run(pause.String(), func(t *testing.T) {
			var plain int
			without(t, models, func(p *proxied) {
				work(p, pause)
				plain = p.total()
			})
			with(t, models, ample, func(p *proxied) {
				began := time.Now()
				work(p, pause)
				took := time.Since(began)
				t.Logf("%d tokens evaluated, and %d without; %d saves, %d restores in %v, %v",
					p.total(), plain, p.saved(), p.restores, took, p.m.Counts().Failed)
				if p.total() > plain {
					t.Errorf("%d tokens were evaluated, and %d without a manager", p.total(), plain)
				}
				// 2 at first, then one after 30 s, 2 min, 8 min, …
				most, after := 2, leastPause
				for sum := after; sum < took; sum += after {
					most++
					after = min(4*after, longestPause)
				}
				if p.restores < 2 || p.restores > most {
					t.Errorf("states were attached %d times, instead of 2 to %d", p.restores, most)
				}
			})
		})
	}
}

// TestOthersUseTheServer: prompts that are sent past the proxy take slots whose states should be
// saved.
func TestOthersUseTheServer(t *testing.T) {
	for _, slots := range []int{1, 3} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			with(t, map[string]modelSpec{"m": {slots: slots}}, ample, func(p *proxied) {
				r := rand.New(rand.NewPCG(3, 4))
				for i := range 200 {
					mine := text{{fmt.Sprint("mine ", r.IntN(10)), 500 + r.IntN(10)}, {fmt.Sprint(i), 20}}
					other := text{{fmt.Sprint("other ", r.IntN(10)), 300 + r.IntN(600)}}
					if r.IntN(2) == 0 {
						p.must(ask{model: "m", prompt: mine, answer: r.IntN(20)})
					} else if _, err := p.direct(context.Background(), ask{model: "m", prompt: other}); err != nil {
						t.Fatal(err)
					}
					p.rest(time.Duration(r.IntN(3)) * time.Second)
					if r.IntN(10) == 0 {
						p.unload()
					}
				}
				p.check()
				t.Logf("%d saves, %d restores, %v", p.saved(), p.restores, p.m.Counts().Failed)
				if p.restores == 0 {
					t.Error("nothing was attached")
				}
			})
		})
	}
}

// TestSlotThatHasChanged: the slot is used past the proxy before it is saved.
func TestSlotThatHasChanged(t *testing.T) {
	// Once in a while the slot is saved in the same moment, before the other prompt gets it.
	for range 20 {
		if slotThatHasChanged(t) {
			return
		}
	}
	t.Error("no change of a slot was noticed")
}

// slotThatHasChanged reports whether a change was noticed.
func slotThatHasChanged(t *testing.T) (noticed bool) {
	with(t, one, ample, func(p *proxied) {
		p.must(ask{model: "m", prompt: long("a", 1), answer: 2})
		if _, err := p.direct(context.Background(), ask{model: "m", prompt: text{{"other", 100}}}); err != nil {
			t.Fatal(err)
		}
		p.m.Leave(context.Background(), ollamaPort)
		n := p.m.Counts().Failed[FailedChanged]
		if noticed = n > 0; !noticed {
			return
		}
		if n != 1 || p.store.Stats().States != 0 {
			t.Errorf("%d changes were noticed, and %d states stored", n, p.store.Stats().States)
		}
		p.m.Leave(context.Background(), ollamaPort)
		if p.saved() != 1 {
			t.Errorf("what is not known was saved %d times", p.saved()-1)
		}
		p.evaluates(ask{model: "m", prompt: long("a", 2), answer: 2}, 1020, 1020)
		p.m.Leave(context.Background(), ollamaPort)
		p.unload()
		p.evaluates(ask{model: "m", prompt: long("a", 3), answer: 2}, 1, 20)
	})
	return noticed
}

// TestOwners: no owner's request is served from another owner's prompts, unless states are shared.
func TestOwners(t *testing.T) {
	for _, share := range []bool{false, true} {
		t.Run(fmt.Sprint(share), func(t *testing.T) {
			limit := ample
			limit.Share = share
			with(t, one, limit, func(p *proxied) {
				for _, owner := range []string{"alice", "bob", ""} {
					p.rest(time.Minute)
					p.unload()
					got := p.must(ask{model: "m", prompt: long("a", 1), answer: 2, owner: owner})
					if served := got.Cached > 0; served != (share && owner != "alice") {
						t.Errorf("%q was served %d tokens that others have sent", owner, got.Cached)
					}
				}
				for _, owner := range []string{"alice", "bob", ""} {
					p.rest(time.Minute)
					p.unload()
					p.evaluates(ask{model: "m", prompt: long("a", 2), answer: 2, owner: owner}, 1, 20)
				}
				if want := map[bool]int{false: 3, true: 5}[share]; p.restores != want {
					t.Errorf("%d states were attached, instead of %d", p.restores, want)
				}
			})
		})
	}
}

// hang waits until the requester gives up.
func hang(ctx context.Context, _ *llama) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestFaultsOfSaving(t *testing.T) {
	for name, c := range map[string]struct {
		fault  func(ctx context.Context, e *llama) error
		blamed bool // the disk is not used for a while
	}{
		"an error": {func(context.Context, *llama) error { return errors.New("no space left") }, true},
		"refused":  {func(context.Context, *llama) error { return engine.ErrRefused }, true},
		"a hang":   {hang, true},
		"gone":     {func(_ context.Context, e *llama) error { e.end(); return engine.ErrGone }, false},
	} {
		t.Run(name, func(t *testing.T) {
			with(t, one, ample, func(p *proxied) {
				calls := 0
				p.setFaults(faults{save: func(ctx context.Context, e *llama) error {
					calls++
					return c.fault(ctx, e)
				}})
				p.must(ask{model: "m", prompt: long("a", 1), answer: 2})
				p.m.Leave(context.Background(), ollamaPort)
				p.rest(0)
				before := calls
				p.evaluates(ask{model: "m", prompt: long("b", 1), answer: 2}, 1020, 1020)
				p.m.Leave(context.Background(), ollamaPort)
				p.rest(0)
				got := p.m.Counts()
				if got.Failed[FailedSave] != uint64(calls) || got.Saved != 0 || p.store.Stats().States != 0 {
					t.Errorf("%d saves failed, and %+v is counted", calls, got)
				}
				if before == 0 || (calls == before) != c.blamed {
					t.Errorf("saving was tried %d times, and then %d times more", before, calls-before)
				}
				// The folder has no leftovers.
				if parts, err := filepath.Glob(filepath.Join(p.dir, "*.part")); len(parts) > 0 || err != nil {
					t.Errorf("%d files are left, %v", len(parts), err)
				}
				p.setFaults(faults{})
				time.Sleep(rateCounts + time.Second)
				p.must(ask{model: "m", prompt: long("a", 2), answer: 2})
				p.m.Leave(context.Background(), ollamaPort)
				if p.store.Stats().States == 0 {
					t.Error("nothing is stored after the fault has passed")
				}
			})
		})
	}
}

func TestFaultsOfAttaching(t *testing.T) {
	for name, c := range map[string]struct {
		fault  func(ctx context.Context, e *llama) error
		states int // that remain
		fails  bool
	}{
		"an error": {func(context.Context, *llama) error { return errors.New("it does not work") }, 1, false},
		"refused":  {func(context.Context, *llama) error { return engine.ErrRefused }, 0, false},
		"a hang":   {hang, 1, false},
		"gone":     {func(_ context.Context, e *llama) error { e.end(); return engine.ErrGone }, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			with(t, one, ample, func(p *proxied) {
				p.must(ask{model: "m", prompt: long("a", 1), answer: 2})
				p.m.Leave(context.Background(), ollamaPort)
				p.unload()
				p.setFaults(faults{restore: c.fault})
				p.evaluates(ask{model: "m", prompt: long("a", 2), answer: 2}, 1020, 1020)
				if got := p.m.Counts(); got.Failed[FailedAttach] != 1 || got.Attached != 0 || got.Tokens != 0 {
					t.Errorf("counted is %+v", got)
				}
				if n := p.store.Stats().States; n != c.states {
					t.Errorf("%d states are left, instead of %d", n, c.states)
				}
				p.setFaults(faults{})
				p.m.Leave(context.Background(), ollamaPort)
				p.unload()
				p.evaluates(ask{model: "m", prompt: long("a", 3), answer: 2}, 1, 20)
			})
		})
	}
}

func TestFaultsOfTheStore(t *testing.T) {
	for name, fault := range map[string]func(p *proxied){
		"closed": func(p *proxied) { p.store.Close(context.Background()) },
		"torn": func(p *proxied) {
			for _, s := range p.store.List() {
				if err := os.Truncate(filepath.Join(p.dir, s.ID), s.Bytes/2); err != nil {
					p.t.Fatal(err)
				}
			}
		},
		"removed": func(p *proxied) {
			for _, s := range p.store.List() {
				if _, err := contextstore.RemoveFiles(p.dir, s.ID); err != nil {
					p.t.Fatal(err)
				}
			}
		},
		"other bytes": func(p *proxied) {
			for _, s := range p.store.List() {
				if err := os.WriteFile(filepath.Join(p.dir, s.ID), make([]byte, s.Bytes), 0o600); err != nil {
					p.t.Fatal(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			with(t, one, ample, func(p *proxied) {
				p.must(ask{model: "m", prompt: long("a", 1), answer: 2})
				p.m.Leave(context.Background(), ollamaPort)
				p.unload()
				fault(p)
				p.evaluates(ask{model: "m", prompt: long("a", 2), answer: 2}, 1020, 1020)
				p.m.Leave(context.Background(), ollamaPort)
				p.unload()
				p.must(ask{model: "m", prompt: long("a", 3), answer: 2})
			})
		})
	}
}

// TestFullStore: there is room for nothing, and then for three states, two of which are asked for
// most.
func TestFullStore(t *testing.T) {
	with(t, one, contextstore.FileLimits{Bytes: 100}, func(p *proxied) {
		for i := range 20 {
			p.must(ask{model: "m", prompt: long(fmt.Sprint(i%4), i), answer: 2})
		}
		if p.restores > 0 || p.store.Stats().States > 0 {
			t.Errorf("%d states were attached, %d are stored", p.restores, p.store.Stats().States)
		}
	})
	with(t, one, contextstore.FileLimits{Bytes: 3300 << 10}, func(p *proxied) {
		for i := range 60 {
			p.must(ask{model: "m", prompt: long(fmt.Sprint("often ", i%2), i), answer: 2})
			p.must(ask{model: "m", prompt: long(fmt.Sprint("once ", i), i), answer: 2})
		}
		least := 2*1000 + 60*1000 + 120*20
		t.Logf("%d tokens evaluated, %.3f of the least possible, %d saves of %d MiB", p.total(),
			float64(p.total())/float64(least), p.saved(), p.written>>20)
		if p.total() > least*105/100 {
			t.Errorf("%d tokens were evaluated, more than 1.05 of %d", p.total(), least)
		}
	})
}

// TestClientLeaves: a client that leaves while its request is prepared is not blamed on the disk.
func TestClientLeaves(t *testing.T) {
	with(t, one, ample, func(p *proxied) {
		p.setDisk(diskSpeed{writing: time.Millisecond}) // 1 s for a state
		p.must(ask{model: "m", prompt: long("a", 1), answer: 2})
		ctx, leave := context.WithTimeout(context.Background(), 10*time.Millisecond)
		defer leave()
		if _, err := p.ask(ctx, ask{model: "m", prompt: long("b", 1), answer: 2}); err == nil {
			t.Error("the client has not left")
		}
		if got := p.m.Counts(); got.Failed[FailedSave] != 0 || got.Saved != 1 {
			t.Errorf("counted is %+v", got)
		}
	})
}

// TestSlowDisk: if saving takes longer than it is worth, the manager learns that, and tries again
// after a while.
func TestSlowDisk(t *testing.T) {
	with(t, one, ample, func(p *proxied) {
		// 20 s for a state of 1,000 tokens, which take 5 s to evaluate.
		p.setDisk(diskSpeed{writing: 20 * time.Millisecond, reading: 20 * time.Millisecond})
		work := func(until time.Duration) {
			for began := time.Now(); time.Since(began) < until; {
				p.must(ask{model: "m", prompt: long(fmt.Sprint(p.launched, time.Since(began)), 0), answer: 2})
			}
		}
		work(rateCounts - time.Minute)
		if p.saved() != 1 {
			t.Errorf("%d states were saved", p.saved())
		}
		work(10 * rateCounts)
		if p.saved() < 5 || p.saved() > 12 {
			t.Errorf("%d states were saved in an hour and 50 minutes", p.saved())
		}
		p.setDisk(ssd)
		time.Sleep(rateCounts)
		before := p.saved()
		for i := range 10 {
			p.must(ask{model: "m", prompt: long(fmt.Sprint("new ", i), 0), answer: 2})
		}
		p.rest(time.Minute)
		if n := p.saved() - before; n < 9 {
			t.Errorf("%d of 10 states were saved once the disk was fast", n)
		}
	})
}

// TestEndSaves: states that are worth it are saved when the manager ends.
func TestEndSaves(t *testing.T) {
	for _, slots := range []int{1, 4} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			with(t, map[string]modelSpec{"m": {slots: slots}}, ample, func(p *proxied) {
				for i := range slots {
					p.must(ask{model: "m", prompt: long(fmt.Sprint(i), 0), answer: 2})
				}
				p.must(ask{model: "m", prompt: text{{"short", 30}}, answer: 2})
				p.finish()
				p.unload()
				p.begin()
				for i := range slots {
					p.evaluates(ask{model: "m", prompt: long(fmt.Sprint(i), 1), answer: 2}, 1, 20)
				}
			})
		})
	}
}

// TestManyAtOnce: requests of several models and owners, with restarts, faults and clients that
// leave. Whenever all is quiet, each lane has been released once, and nothing is claimed.
func TestManyAtOnce(t *testing.T) {
	models := map[string]modelSpec{"a": {slots: 1}, "b": {slots: 4}, "c": {slots: 2, window: true}}
	limit := contextstore.FileLimits{Bytes: 20 << 20}
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			with(t, models, limit, func(p *proxied) {
				p.most = 2
				p.blind = seed%2 == 1
				p.mistakes = 1000
				p.setFaults(faults{restore: func(_ context.Context, e *llama) error {
					switch rand.IntN(20) {
					case 0:
						e.end()
						return engine.ErrGone
					case 1:
						return engine.ErrRefused
					}
					return nil
				}})
				for range 3 {
					var wg sync.WaitGroup
					for c := range 12 {
						r := rand.New(rand.NewPCG(seed, uint64(c)))
						wg.Go(func() {
							for i := range 15 {
								p.some(r, i)
							}
						})
					}
					wg.Wait()
					p.rest(0)
					p.check()
					p.finish()
					p.begin()
				}
			})
		})
	}
}

// some is a random request, or an event on the server.
func (p *proxied) some(r *rand.Rand, i int) {
	ctx := context.Background()
	if r.IntN(6) == 0 {
		var leave context.CancelFunc
		ctx, leave = context.WithTimeout(ctx, time.Duration(r.IntN(5000))*time.Millisecond)
		defer leave()
	}
	a := ask{
		model: string(rune('a' + r.IntN(3))), context: 2048 << r.IntN(2), awaited: true,
		streams: r.IntN(2) == 0,
		prompt: text{
			{fmt.Sprint("p", r.IntN(6)), 200 + 100*r.IntN(4)}, {fmt.Sprint(r.IntN(3), i), 10 + r.IntN(50)},
		},
		answer: 1 + r.IntN(8), owner: []string{"", "alice", "bob"}[r.IntN(3)],
	}
	switch r.IntN(12) {
	case 0:
		p.unload()
	case 1:
		p.m.Leave(ctx, ollamaPort)
	case 2:
		p.direct(ctx, a)
	default:
		p.ask(ctx, a)
	}
}

// TestWrongStateGoes: another client's prompt that is as long as the previous one is mistaken for
// it when its state is saved. The state is dropped as soon as that shows, and the right one is
// stored.
func TestWrongStateGoes(t *testing.T) {
	with(t, one, ample, func(p *proxied) {
		short := func(name string, i int) ask {
			return ask{model: "m", prompt: text{{name, 150}, {fmt.Sprint(i), 5}}, answer: 2}
		}
		// So slow that saving waits for an idle moment.
		p.setDisk(diskSpeed{writing: 500 * time.Microsecond, reading: time.Microsecond})
		p.must(short("first", 0))
		p.must(short("a", 0))
		if _, err := p.direct(context.Background(), short("other", 0)); err != nil {
			t.Fatal(err)
		}
		p.m.Leave(context.Background(), ollamaPort)
		p.unload()
		if n := p.store.Stats().States; n != 2 {
			t.Fatalf("%d states are stored: one of them is to be the wrong one", n)
		}
		p.evaluates(short("a", 1), 155, 155)
		if n := p.m.Counts().Failed[FailedUnused]; n != 1 {
			t.Errorf("%d states were of no use", n)
		}
		p.m.Leave(context.Background(), ollamaPort)
		p.unload()
		p.evaluates(short("a", 2), 1, 10)
	})
}

// TestRequestWaitsForOneSave: however many slots must be saved before their engine may end, a
// request waits for one save; and for one of the slot that it takes, if that is not warm for it.
func TestRequestWaitsForOneSave(t *testing.T) {
	t.Run("warm", func(t *testing.T) { testWaits(t, true, 1) })
	t.Run("cold", func(t *testing.T) { testWaits(t, false, 2) })
}

func testWaits(t *testing.T, warm bool, saves int) {
	with(t, map[string]modelSpec{"m": {slots: 4}}, ample, func(p *proxied) {
		p.must(ask{model: "m", prompt: long("first", 0), answer: 2})
		p.rest(0)
		p.setDisk(diskSpeed{writing: 100 * time.Microsecond, reading: time.Microsecond})
		p.must(ask{model: "m", prompt: long("b", 0), answer: 2}) // it shows how slow the disk is
		p.must(ask{model: "m", prompt: long("c", 0), answer: 2})
		p.must(ask{model: "m", prompt: long("d", 0), answer: 2})
		p.rest(0)
		before := p.saved()
		r := p.request(ask{model: "m", context: 4096, prompt: long("d", 0)})
		p.m.mu.Lock()
		// As if others had evaluated the same before, and nothing had been stored.
		for _, l := range p.m.engines {
			for i := range l.slots {
				l.slots[i].contents = slices.Clone(l.slots[i].contents)
				for j := range l.slots[i].contents {
					l.slots[i].contents[j]++
				}
			}
		}
		p.m.mu.Unlock()
		left := make(chan struct{})
		go func() {
			defer close(left)
			p.m.Leave(context.Background(), ollamaPort)
		}()
		time.Sleep(time.Millisecond) // virtual: the first save is under way
		for j := range r.Contents {
			r.Contents[j]++
			if !warm {
				r.Contents[j] += 2
			}
		}
		u := p.m.Before(context.Background(), r)
		if n := p.saved() - before; n != saves {
			t.Errorf("the request has waited for %d saves, instead of %d", n, saves)
		}
		u.After(Answer{Unsent: true}, func() {})
		<-left
		for _, s := range p.store.List() { // the invented states
			if p.known[s.Links[0]] == nil {
				p.store.Drop(s.ID, "it was made up")
			}
		}
	})
}
