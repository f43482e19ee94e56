package contexts

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// ample is a limit that no test reaches.
var ample = contextstore.FileLimits{Bytes: 1 << 40}

var one = map[string]modelSpec{"m": {slots: 1}}

// with runs f in virtual time, with a manager in front of the models.
func with(t *testing.T, models map[string]modelSpec, limit contextstore.FileLimits, f func(p *proxied)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := newProxied(t, models, limit)
		p.begin()
		f(p)
		p.finish()
	})
}

// without is like with, but without a manager.
func without(t *testing.T, models map[string]modelSpec, f func(p *proxied)) {
	t.Helper()
	synctest.Test(t, func(*testing.T) { f(newProxied(t, models, ample)) })
}

// long is a prompt whose first 1,000 tokens are common to all with this name.
func long(name string, question int) text {
	return text{{name, 1000}, {fmt.Sprint("question ", question), 20}}
}

// evaluates checks how many tokens of a prompt are evaluated.
func (p *proxied) evaluates(a ask, least, most int) {
	p.t.Helper()
	got := p.must(a)
	if n := got.Total - got.Cached; n < least || n > most {
		p.t.Errorf("%d of %d tokens were evaluated, instead of %d to %d", n, got.Total, least, most)
	}
}

func TestStateComesBackAfterALoad(t *testing.T) {
	for name, ends := range map[string]func(p *proxied){
		"unloaded": (*proxied).unload,
		"unloaded with another prompt between": func(p *proxied) {
			p.must(ask{model: "m", prompt: long("b", 1)})
			p.unload()
		},
		"the proxy restarted": func(p *proxied) {
			p.finish()
			p.begin()
		},
		"both restarted": func(p *proxied) {
			p.finish()
			p.unload()
			p.begin()
		},
		"loaded with another context": func(p *proxied) {
			p.must(ask{model: "m", context: 8192, prompt: long("b", 1)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			with(t, one, ample, func(p *proxied) {
				p.evaluates(ask{model: "m", prompt: long("a", 1), answer: 10}, 1020, 1020)
				p.rest(time.Minute)
				ends(p)
				p.evaluates(ask{model: "m", prompt: long("a", 2), answer: 10}, 1, 20)
				p.rest(time.Minute)
				ends(p)
				p.evaluates(ask{model: "m", prompt: long("a", 3), answer: 10}, 1, 20)
			})
		})
	}
}

// TestStateComesBackWithoutRest: there are no pauses, as in a benchmark.
func TestStateComesBackWithoutRest(t *testing.T) {
	with(t, one, ample, func(p *proxied) {
		p.evaluates(ask{model: "m", prompt: long("a", 1), answer: 10}, 1020, 1020)
		p.evaluates(ask{model: "m", prompt: long("b", 1), answer: 10}, 1020, 1020)
		p.evaluates(ask{model: "m", prompt: long("a", 2), answer: 10}, 1, 20)
		p.evaluates(ask{model: "m", prompt: long("b", 2), answer: 10}, 1, 20)
	})
}

// TestModelsThatEvictEachOther: 40 requests each, in closed loops, with a queue that has learned to
// keep turns, and with none.
func TestModelsThatEvictEachOther(t *testing.T) {
	models := map[string]modelSpec{"m": {slots: 1}, "n": {slots: 1}}
	for _, turns := range []bool{true, false} {
		t.Run(fmt.Sprintf("turns %t", turns), func(t *testing.T) {
			with(t, models, ample, func(p *proxied) {
				if turns {
					p.turn = make(chan struct{}, 1)
				}
				var wg sync.WaitGroup
				for model := range models {
					wg.Go(func() {
						for i := range 40 {
							p.must(ask{model: model, prompt: long("own", i), answer: 10})
						}
					})
				}
				wg.Wait()
				least := 2 * (1000 + 40*20)
				t.Logf("%d tokens evaluated, %.3f of the least possible; %d loads, %d saves, %d restores", p.total(),
					float64(p.total())/float64(least), p.loads, p.saves, p.restores)
				if p.total() > least*11/10 {
					t.Errorf("%d tokens were evaluated, more than 1.1 of %d", p.total(), least)
				}
			})
		})
	}
}

// TestContextsInTurn: two context lengths in turn, with and without a pause.
func TestContextsInTurn(t *testing.T) {
	for _, pause := range []time.Duration{0, time.Minute} {
		t.Run(pause.String(), func(t *testing.T) {
			with(t, one, ample, func(p *proxied) {
				for i := range 40 {
					p.must(ask{model: "m", context: 4096 << (i % 2), prompt: long("a", i), answer: 10})
					p.rest(pause)
				}
				least := 1000 + 40*20
				t.Logf("%d tokens evaluated, %.3f of the least possible", p.total(), float64(p.total())/float64(least))
				if p.total() > least*11/10 {
					t.Errorf("%d tokens were evaluated, more than 1.1 of %d", p.total(), least)
				}
			})
		})
	}
}

// TestHundredPrefixes: three rounds, in an order in which no slot is ever warm.
func TestHundredPrefixes(t *testing.T) {
	for _, c := range []struct {
		slots, clients  int
		streams, varied bool
	}{
		{1, 1, false, false},
		{1, 8, true, false},
		{4, 1, false, false},
		{4, 4, true, false},
		{4, 8, true, true},
		{4, 8, false, true},
		{4, 8, false, false},
	} {
		name := fmt.Sprintf("%d slots, %d clients, streams %t, varied %t", c.slots, c.clients, c.streams, c.varied)
		t.Run(name, func(t *testing.T) {
			with(t, map[string]modelSpec{"m": {slots: c.slots}}, ample, func(p *proxied) {
				if c.clients > 1 && !c.varied {
					// Of two equally long ones that are sent, and end, at the same time, the wrong
					// one may be taken.
					p.mistakes = 6
				}
				p.hundredPrefixes(c.clients, c.streams, c.varied)
			})
		})
	}
}

func (p *proxied) hundredPrefixes(clients int, streams, varied bool) {
	const prefixes, rounds = 100, 3
	least, first := 0, 0
	for round := range rounds {
		work := make(chan int)
		var wg sync.WaitGroup
		for range clients {
			wg.Go(func() {
				for i := range work {
					if clients > 1 { // keeps them from running in lockstep
						time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
					}
					x := long(fmt.Sprint("prefix ", i), round)
					if varied {
						x[0].tokens += 3 * i
					}
					p.must(ask{model: "m", prompt: x, answer: 5, streams: streams, awaited: clients > 1})
				}
			})
		}
		for i := range prefixes {
			work <- i
			if least += 20; round == 0 {
				if least += 1000; varied {
					least += 3 * i
				}
			}
		}
		close(work)
		wg.Wait()
		if round == 0 {
			first = p.total()
		}
	}
	later := p.total() - first - (rounds-1)*prefixes*20
	p.t.Logf("%d tokens evaluated, %.3f of the least possible; of prefixes in later rounds %d; "+
		"%d saves, %d restores, %v", p.total(), float64(p.total())/float64(least), later, p.saves, p.restores, p.m.Counts().Failed)
	if p.total() > least*105/100+2000*p.mistakes {
		p.t.Errorf("%d tokens were evaluated, more than 1.05 of %d", p.total(), least)
	}
	if later > first/100+2000*p.mistakes {
		p.t.Errorf("%d tokens of prefixes were evaluated in later rounds, more than 1 %% of %d", later, first)
	}
}

// TestOneSystemPrompt: 8 clients and 4 slots, with one system prompt.
func TestOneSystemPrompt(t *testing.T) {
	with(t, map[string]modelSpec{"m": {slots: 4}}, ample, func(p *proxied) {
		p.must(ask{model: "m", prompt: long("system", 0), answer: 5})
		p.rest(time.Minute)
		before := p.total()
		var wg sync.WaitGroup
		for c := range 8 {
			wg.Go(func() {
				for i := range 10 {
					p.must(ask{model: "m", prompt: long("system", 100*c+i), answer: 5})
				}
			})
		}
		wg.Wait()
		if n := p.total() - before; n > 80*20*101/100 {
			t.Errorf("%d tokens were evaluated, instead of 80 × 20", n)
		}
	})
}

// chat is the prompt of a turn of a conversation, with a short answer to each.
func chat(name string, turn int) text {
	x := text{{name, 300}}
	for i := range turn {
		x = append(x, part{fmt.Sprint(name, i), 40})
	}
	return x
}

func TestLoneWarmChat(t *testing.T) {
	for _, pause := range []time.Duration{0, 5 * time.Second, 2 * time.Minute} {
		t.Run(pause.String(), func(t *testing.T) {
			with(t, one, ample, func(p *proxied) {
				const turns = 60
				var onPath time.Duration
				for i := range turns {
					began := time.Now()
					u := p.m.Before(context.Background(),
						p.request(ask{model: "m", context: 4096, prompt: chat("a", i)}))
					if i > 0 {
						onPath += time.Since(began)
					}
					got, err := p.direct(context.Background(), ask{model: "m", prompt: chat("a", i), answer: 5})
					if err != nil {
						t.Fatal(err)
					}
					u.After(got, func() {})
					p.rest(pause)
				}
				t.Logf("%d saves of %d KiB in all, %v on the path, %v of %v spent saving",
					p.saves, p.written>>10, onPath, p.saving, p.evalTime)
				if p.restores > 0 {
					t.Errorf("%d states were attached to what was warm", p.restores)
				}
				if onPath > 0 {
					t.Errorf("requests waited for %v", onPath)
				}
				if p.saving > p.evalTime/10 {
					t.Errorf("saving took %v, and evaluating %v", p.saving, p.evalTime)
				}
			})
		})
	}
}

// TestPromptsThatNeverComeBack: the cost of useless saves is bounded, in time and in bytes.
func TestPromptsThatNeverComeBack(t *testing.T) {
	limit := contextstore.FileLimits{Bytes: 100 << 20}
	for slots, prompts := range map[int]int{1: 10_000, 2: 2_000} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			with(t, map[string]modelSpec{"m": {slots: slots}}, limit, func(p *proxied) {
				began := time.Now()
				r := rand.New(rand.NewPCG(1, 2))
				for i := range prompts {
					x := text{{"system", 10}, {fmt.Sprint("once ", i), 100 + r.IntN(400)}}
					p.must(ask{model: "m", prompt: x, answer: 2})
				}
				took := time.Since(began)
				t.Logf("%v in all, %v evaluating, %v saving, %d saves of %d MiB, %d restores, %v",
					took, p.evalTime, p.saving, p.saves, p.written>>20, p.restores, p.m.Counts().Failed)
				if p.saving > p.evalTime/20 {
					t.Errorf("saving took %v, more than a twentieth of %v", p.saving, p.evalTime)
				}
				if p.written > 3*limit.Bytes/2 {
					t.Errorf("%d MiB were written for a limit of %d", p.written>>20, limit.Bytes>>20)
				}
				answers := time.Duration(prompts) * 2 * perAnswer
				if spent := took - p.evalTime - answers - loadTakes; spent > p.evalTime/20 {
					t.Errorf("%v were spent on what never came back", spent)
				}
			})
		})
	}
}
