package schedule

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// askers are clients that ask one thing after the other for a time, with a few system prompts.
type askers struct {
	clients, prompts  int
	common            int  // tokens at the start of all system prompts
	own               bool // client i uses prompt i only; otherwise each request takes the next one
	tokens, tail, gen int
	urgent            int // one in so many clients is interactive; 0 means none
	think             time.Duration
	lasts             time.Duration
}

// waits are the durations of requests for their clients, from sending to the end.
type waits struct {
	served    int
	mean      time.Duration
	p50, p95  time.Duration
	p99, most time.Duration
	perServed float64 // evaluated tokens
}

func (w askers) run(t *testing.T, cfg engineConfig, q *Queue) waits {
	s := newSim(t, cfg, q)
	var common []seg
	if w.common > 0 {
		common = []seg{text(w.common)}
	}
	prompts := make([]seg, w.prompts)
	for i := range prompts {
		prompts[i] = text(w.tokens)
	}
	var ask func(client, n int)
	ask = func(client, n int) {
		if s.now.Sub(start) > w.lasts {
			return
		}
		p := prompts[client%w.prompts]
		if !w.own {
			p = prompts[(client+n)%w.prompts]
		}
		j := &job{
			segs: append(slices.Clone(common), p, text(w.tail)), gen: w.gen,
			client: fmt.Sprint("client", client),
			done:   func() { s.after(w.think, func() { ask(client, n+1) }) },
		}
		if w.urgent > 0 && client%w.urgent == 0 {
			j.priority = Interactive
		}
		s.submit(j)
	}
	for c := range w.clients {
		s.after(time.Duration(c)*3*time.Millisecond, func() { ask(c, 0) })
	}
	s.run()
	return waitsOf(s)
}

func waitsOf(s *sim) waits {
	var all []time.Duration
	var sum time.Duration
	for _, j := range s.finished {
		all = append(all, j.end.Sub(j.came))
		sum += j.end.Sub(j.came)
	}
	slices.Sort(all)
	at := func(part float64) time.Duration { return all[int(part*float64(len(all)-1))].Round(time.Millisecond) }
	return waits{
		served: len(all), mean: (sum / time.Duration(len(all))).Round(time.Millisecond),
		p50: at(0.5), p95: at(0.95), p99: at(0.99), most: at(1), perServed: float64(s.evaluated) / float64(len(all)),
	}
}

// TestWaits: if the host cache keeps what the slots lose, ordering saves nothing, and loops wait no
// longer than with direct requests once that is known. If ordering saves time, it still delays
// nobody without bound.
func TestWaits(t *testing.T) {
	const ample = 1 << 20
	for _, w := range []struct {
		name  string
		slots int
		host  int
		askers
	}{
		{"6 on 3 prompts", 1, ample, askers{clients: 6, prompts: 3, own: true, tokens: 1000, gen: 100}},
		{"6 on 3 prompts in turn", 1, ample, askers{clients: 6, prompts: 3, tokens: 1000, gen: 100}},
		{"6 on 3 prompts", 4, ample, askers{clients: 6, prompts: 3, own: true, tokens: 1000, gen: 100}},
		{"8 scripts", 1, ample, askers{clients: 8, prompts: 8, own: true, tokens: 1000, gen: 20}},
		{"16 on 8 prompts", 4, ample, askers{clients: 16, prompts: 8, own: true, tokens: 1000, gen: 100}},
		{"16 on 8 prompts with one beginning", 2, ample, askers{clients: 16, prompts: 8, own: true, common: 500, tokens: 1000, gen: 100}},
		{"16 on 8 prompts with one beginning", 4, ample, askers{clients: 16, prompts: 8, own: true, common: 500, tokens: 1000, gen: 100}},
		{"6 on 3 prompts", 1, 0, askers{clients: 6, prompts: 3, own: true, tokens: 1000, gen: 100}},
		{"8 scripts", 1, 0, askers{clients: 8, prompts: 8, own: true, tokens: 1000, gen: 20}},
		{"8 scripts, room for half", 1, 4000, askers{clients: 8, prompts: 8, own: true, tokens: 1000, gen: 20}},
		{"8 scripts, long prompts", 1, 0, askers{clients: 8, prompts: 8, own: true, tokens: 8000, gen: 100}},
		{"16 on 8 prompts", 4, 0, askers{clients: 16, prompts: 8, own: true, tokens: 1000, gen: 100}},
		{"16 on 8 prompts with one beginning", 2, 0, askers{clients: 16, prompts: 8, own: true, common: 500, tokens: 1000, gen: 100}},
		{"16 on 8 prompts with one beginning", 4, 0, askers{clients: 16, prompts: 8, own: true, common: 500, tokens: 1000, gen: 100}},
	} {
		w.tail, w.lasts = 50, 10*time.Minute
		cfg := engineConfig{slots: w.slots, host: w.host, untried: true}
		direct, lanes := w.run(t, cfg, nil), w.run(t, cfg, New(Config{Lanes: w.slots}))
		name := fmt.Sprintf("%s, %d slots, host cache %d", w.name, w.slots, w.host)
		t.Logf("%-45s directly %v", name, direct)
		t.Logf("%-45s lanes    %v", "", lanes)
		switch {
		case w.host == ample && (lanes.served*100 < direct.served*99 || lanes.p95 > direct.p95*11/10 || lanes.p99 > direct.p99*11/10 ||
			lanes.most > direct.most+10*time.Second || lanes.perServed > 1.05*direct.perServed):
			t.Errorf("%s: order is kept that saves nothing", name)
		case w.host != ample && (lanes.served*2 < direct.served*3 || lanes.p99 > agedQuantum*direct.p99+longestWait || lanes.most > agedQuantum*direct.most+2*longestWait):
			t.Errorf("%s: it is not worth waiting for", name)
		}
	}
}

// TestWaitCurve measures the cost of leaving a prefix earlier for waiting requests: longestWait is
// where that cost becomes small.
func TestWaitCurve(t *testing.T) {
	for _, w := range []struct {
		name  string
		slots int
		askers
	}{
		{"8 scripts, prompts of 1,000", 1, askers{clients: 8, prompts: 8, own: true, tokens: 1000, gen: 20}},
		{"8 scripts, prompts of 8,000", 1, askers{clients: 8, prompts: 8, own: true, tokens: 8000, gen: 100}},
		{"6 on 3 prompts of 1,000", 1, askers{clients: 6, prompts: 3, own: true, tokens: 1000, gen: 100}},
		{"16 on 8 prompts of 1,000", 4, askers{clients: 16, prompts: 8, own: true, tokens: 1000, gen: 100}},
	} {
		w.tail, w.lasts = 50, 20*time.Minute
		cfg := engineConfig{slots: w.slots}
		direct := w.run(t, cfg, nil)
		t.Logf("%s, %d slots, directly: %v", w.name, w.slots, direct)
		var list []waits
		for _, longest := range []time.Duration{0, 5 * time.Second, longestWait, 30 * time.Second, time.Hour} {
			q := New(Config{Lanes: w.slots})
			q.longest = longest
			l := w.run(t, cfg, q)
			t.Logf("  %-6v %.2f times as many served, p99 %.1f s, longest %.1f s, %.1f tokens each", longest, float64(l.served)/float64(direct.served), l.p99.Seconds(), l.most.Seconds(), l.perServed)
			list = append(list, l)
		}
		first, chosen, last := list[0], list[2], list[4]
		if chosen.served*4 < last.served*3 || chosen.most > last.most || first.most > agedQuantum*direct.most {
			t.Errorf("%s: %v where nobody is left for others, %v as chosen, %v where all are", w.name, last, chosen, first)
		}
	}
}

func (w waits) String() string {
	sec := func(d time.Duration) float64 { return d.Seconds() }
	return fmt.Sprintf("%5d served, mean %6.2f s, p50 %6.2f p95 %6.2f p99 %6.2f longest %6.2f, %7.1f tokens each", w.served, sec(w.mean), sec(w.p50), sec(w.p95), sec(w.p99), sec(w.most), w.perServed)
}

// TestShortPrompts: the host cache's effect is learned from short system prompts, too, if they take
// long to evaluate on a slow machine.
func TestShortPrompts(t *testing.T) {
	cfg := engineConfig{host: 1 << 20, untried: true, perToken: 10 * time.Millisecond, decode: 30 * time.Millisecond}
	for _, cfg.slots = range []int{1, 4} {
		w := askers{clients: 8, prompts: 8, own: true, tokens: 200, tail: 50, gen: 20, lasts: 20 * time.Minute}
		direct, lanes := w.run(t, cfg, nil), w.run(t, cfg, New(Config{Lanes: cfg.slots}))
		t.Logf("%d slots, directly %v", cfg.slots, direct)
		t.Logf("%d slots, lanes    %v", cfg.slots, lanes)
		if lanes.p95 > direct.p95*11/10 || lanes.most > direct.most+10*time.Second {
			t.Errorf("%d slots: order is kept that saves nothing", cfg.slots)
		}
	}
}

// TestUntold: if answers do not report reused tokens, leaving a lane teaches nothing, and lanes are
// not left again and again to find out.
func TestUntold(t *testing.T) {
	w := askers{clients: 8, prompts: 8, own: true, tokens: 8000, tail: 50, gen: 100, lasts: 10 * time.Minute}
	run := func(untold bool) waits {
		return w.run(t, engineConfig{slots: 1, untried: true, untold: untold}, New(Config{Lanes: 1}))
	}
	want, got := run(false), run(true)
	t.Logf("told   %v", want)
	t.Logf("untold %v", got)
	if got.perServed > 1.1*want.perServed {
		t.Errorf("%.0f tokens for each request, %.0f where it is told", got.perServed, want.perServed)
	}
}

// TestMaxWaitAmple: if the host cache keeps what the slots lose, a request that has waited for
// MaxWait goes at once, even if urgent requests could fill the slot.
func TestMaxWaitAmple(t *testing.T) {
	w := askers{
		clients: 16, prompts: 8, own: true, urgent: 4, tokens: 1000, tail: 50, gen: 20,
		lasts: 10 * time.Minute,
	}
	cfg := engineConfig{slots: 1, host: 1 << 20, untried: true}
	const longest = 2 * time.Second
	direct, lanes := w.run(t, cfg, nil), w.run(t, cfg, New(Config{Lanes: 1, MaxWait: longest}))
	t.Logf("directly %v", direct)
	t.Logf("lanes    %v", lanes)
	if lanes.p99 > longest+direct.p99 || lanes.most > longest+2*direct.most {
		t.Error("those that have waited for so long wait for an order that saves nothing")
	}
}
