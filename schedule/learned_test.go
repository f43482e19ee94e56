package schedule

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// passOn returns what another proxy reads of what was learned.
func passOn(t *testing.T, l Learned) (read Learned) {
	t.Helper()
	text, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &read); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(read, l) {
		t.Errorf("%+v became %+v", l, read)
	}
	return read
}

// TestLearned: a proxy that schedules a server next begins with the slots and rates that another
// one has found, and tries nothing that this one was sure of until that one would have.
func TestLearned(t *testing.T) {
	anew(t)
	for _, slots := range []int{1, 4} {
		run := func(l *Learned) (s *sim, tried int) {
			s = newSim(t, engineConfig{slots: slots}, New(Config{}))
			if l != nil {
				s.q.SetLearned(0, *l, s.now)
			}
			burst(s, groups(24, 4, 800, 40, 30, 3))
			for tried = -1; s.events.Len() > 0; {
				s.step()
				for _, x := range s.q.servers[0].runners {
					if x.tries > 0 && tried < 0 {
						tried = len(s.finished)
					}
				}
			}
			s.run()
			return s, tried
		}
		first, tried := run(nil)
		l := passOn(t, first.q.Learned(0))
		m := l.Models[options("m", 0).Model]
		if m.Slots != slots || !m.Sure || m.Pause < firstPause || m.Prompt.Value == 0 || m.Decode.Value == 0 || m.Service.Weight == 0 {
			t.Errorf("%d slots: learned %+v", slots, m)
		}
		d := newDesk(t, Config{})
		d.q.SetLearned(0, l, d.now)
		is, was := d.q.runner(d.q.server(0), Runner{0, options("m", 0)}, d.now).rates, first.q.servers[0].runners[0].rates
		if p, q := is.perToken(), was.perToken(); (p-q).Abs() > 1 || is.loadTime != was.loadTime || is.host != was.host || is.service != was.service {
			t.Errorf("%d slots: %+v became %+v", slots, was, is)
		}
		second, again := run(&l)
		t.Logf("%d slots: %d tokens evaluated, first tried after %d requests; then %d, and after %d", slots, first.evaluated, tried, second.evaluated, again)
		if tried < 0 || tried > 4 || again >= 0 && again < m.Pause || second.evaluated > first.evaluated {
			t.Errorf("%d slots: %d tokens evaluated, first tried after %d requests; then %d, and after %d of at least %d", slots, first.evaluated, tried, second.evaluated, again, m.Pause)
		}
	}
}

// TestLearnedWrong: what another proxy believed of the slots is corrected by what is seen here.
func TestLearnedWrong(t *testing.T) {
	anew(t)
	for _, w := range []struct{ believed, slots int }{{4, 1}, {1, 4}} {
		s := newSim(t, engineConfig{slots: w.slots}, New(Config{}))
		s.q.SetLearned(0, Learned{Version: learnedVersion, Models: map[string]LearnedModel{
			options("m", 0).Model: {Slots: w.believed, Sure: true, Pause: firstPause},
		}}, s.now)
		burst(s, groups(100, 8, 800, 40, 100, 3))
		s.run()
		if got := s.q.servers[0].runners[0].want; got != w.slots {
			t.Errorf("%d slots, believed to be %d: %d lanes in the end", w.slots, w.believed, got)
		}
	}
}

// TestLearnedLater: what was learned here since this proxy schedules the server stays; what was
// learned before another one did gives way.
func TestLearnedLater(t *testing.T) {
	d := newDesk(t, Config{Lanes: 0})
	ask := func() {
		id := d.add(on(with(alpha), 0))
		d.q.Grants()
		d.done(id, evaluated(1064, 1064), time.Second)
	}
	ask()
	name := options("m", 0).Model
	told := Learned{Version: learnedVersion, Models: map[string]LearnedModel{name: {Slots: 3, Sure: true, Prompt: Belief{1000, 5000}}}}
	x := d.q.server(0).runners[0]
	if d.q.SetLearned(0, told, d.now); x.want != 1 || x.rates.perToken() < 900*time.Microsecond {
		t.Errorf("%d lanes, %v per token", x.want, x.rates.perToken())
	}
	d.q.SetOwned(0, false, d.now)
	d.q.SetOwned(0, true, d.now)
	if d.q.SetLearned(0, told, d.now); x.want != 3 || x.rates.perToken() != time.Microsecond {
		t.Errorf("after another proxy had the server: %d lanes, %v per token", x.want, x.rates.perToken())
	}
	told.Models[name] = LearnedModel{Slots: 5}
	ask()
	if d.q.SetLearned(0, told, d.now); x.want != 3 {
		t.Errorf("after a request: %d lanes", x.want)
	}
	// Models that are used later begin with what was told last.
	told.Models["other"], told.Apart = LearnedModel{Slots: 7}, [][2]string{{name, "other"}, {name, name}, {"x", "other"}}
	d.q.SetLearned(0, told, d.now)
	y := d.q.runner(d.q.server(0), Runner{0, options("other", 0)}, d.now)
	if y.want != 7 || len(y.lanes) != 7 || d.q.server(0).between(name, "other") != apart || d.q.server(0).between("x", "other") != untried {
		t.Errorf("%d lanes, %v", y.want, d.q.server(0).relations)
	}
	if got := d.q.Learned(0).Apart; len(got) != 0 {
		t.Errorf("%v do not fit beside each other, of which one was never used", got)
	}
}

// TestLearnedGiven: what the operator or the engine says of the slots takes precedence.
func TestLearnedGiven(t *testing.T) {
	d := newDesk(t, Config{Lanes: 2})
	m := options("m", 0).Model
	l := Learned{Version: learnedVersion, Models: map[string]LearnedModel{m: {Slots: 5}}}
	d.q.SetLearned(0, l, d.now)
	x := d.q.runner(d.q.server(0), Runner{0, options("m", 0)}, d.now)
	if x.want != 2 {
		t.Errorf("%d lanes", x.want)
	}
	d.q.SetLanes(0, 0, d.now)
	d.q.SetSlots(0, m, Slots{Count: 3}, d.now)
	if d.q.SetLearned(0, l, d.now); x.want != 3 {
		t.Errorf("%d lanes", x.want)
	}
}

// TestLearnedAbsurd: what cannot be true is ignored, and so is another version.
func TestLearnedAbsurd(t *testing.T) {
	good := LearnedModel{Slots: 4, Prompt: Belief{1000, 5}}
	with := func(change func(*LearnedModel)) LearnedModel {
		m := good
		change(&m)
		return m
	}
	models := map[string]LearnedModel{
		"slots":                  with(func(m *LearnedModel) { m.Slots = maxLearned + 1 }),
		"negative slots":         with(func(m *LearnedModel) { m.Slots = -1 }),
		"pause":                  with(func(m *LearnedModel) { m.Pause = math.MaxInt }),
		"negative pause":         with(func(m *LearnedModel) { m.Pause = -1 }),
		"NaN":                    with(func(m *LearnedModel) { m.Prompt.Value = math.NaN() }),
		"infinite":               with(func(m *LearnedModel) { m.Pace.Weight = math.Inf(1) }),
		"NaN weight":             with(func(m *LearnedModel) { m.Decode.Weight = math.NaN() }),
		"negative":               with(func(m *LearnedModel) { m.Load.Value = -1 }),
		"negative weight":        with(func(m *LearnedModel) { m.Service.Weight = -1 }),
		"huge":                   with(func(m *LearnedModel) { m.Around.Value = 1e300 }),
		"more than all":          with(func(m *LearnedModel) { m.Host.Value = 1.5 }),
		"kept more than all":     with(func(m *LearnedModel) { m.Kept.Value = 2 }),
		"a long answer":          with(func(m *LearnedModel) { m.Answer.Value = 1e12 }),
		strings.Repeat("x", 513): good,
	}
	check := func(name string, l Learned, model string, want int) {
		t.Helper()
		d := newDesk(t, Config{})
		d.q.SetLearned(0, l, d.now)
		if x := d.q.runner(d.q.server(0), Runner{0, options(model, 0)}, d.now); x.want != want || len(x.lanes) != want {
			t.Errorf("%s: %d lanes", name, x.want)
		}
	}
	for name, m := range models {
		check(name, Learned{Version: learnedVersion, Models: map[string]LearnedModel{name: m}}, name, 1)
	}
	models["good"] = good
	check("one of many", Learned{Version: learnedVersion, Models: models}, "good", 4)
	check("another version", Learned{Version: learnedVersion + 1, Models: models}, "good", 1)
	for i := range maxLearnedModels {
		models[fmt.Sprint(i)] = good
	}
	check("too many", Learned{Version: learnedVersion, Models: models}, "good", 1)
}

// TestLearnedBounded: of many models, those are told that were used last.
func TestLearnedBounded(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	for i := range 2 * maxLearnedModels {
		id := d.add(on(request(fmt.Sprint("model", i), alpha), 0))
		for d.q.Len() > 0 {
			d.wake()
		}
		d.granted(id)
		d.done(id, evaluated(1000, 1000), time.Second)
	}
	l := passOn(t, d.q.Learned(0))
	if len(l.Models) != maxLearnedModels {
		t.Errorf("%d models", len(l.Models))
	}
	if _, last := l.Models[options(fmt.Sprint("model", 2*maxLearnedModels-1), 0).Model]; !last {
		t.Errorf("the last one is missing of %v", slices.Sorted(maps.Keys(l.Models)))
	}
}

// FuzzLearned: whatever another proxy claims, the queue works as usual.
func FuzzLearned(f *testing.F) {
	f.Add([]byte(`{"version":1,"models":{"m":{"slots":4,"sure":true,"pause":16,"prompt":{"v":300000,"n":1000}}},"apart":[["m","b"]]}`))
	f.Add([]byte(`{"version":1,"models":{"m":{"slots":64,"prompt":{"v":6e10,"n":2147483647},"load":{"v":8.64e13,"n":16},"host":{"v":1,"n":9}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var l Learned
		if json.Unmarshal(data, &l) != nil {
			return
		}
		q := New(Config{})
		q.SetLearned(0, l, start)
		now := start
		for id := range uint64(8) {
			r := request("m", seg{id: id / 2, tokens: 500}, seg{id: 10 + id, tokens: 50})
			r.ID = id
			q.Add(r, now)
		}
		served := 0
		for n := 0; served < 8; n++ {
			if n > 10_000 {
				t.Fatalf("%d of 8 were served", served)
			}
			now = now.Add(time.Second)
			q.Tick(now)
			for _, g := range slices.Clone(q.Grants()) {
				served++
				q.Done(g.ID, evaluated(550, 100), now)
			}
		}
		for _, l := range q.Loads() {
			if l.Wait < 0 {
				t.Errorf("it waits for %v", l.Wait)
			}
		}
		if again := q.Learned(0); len(again.Models) > maxLearnedModels {
			t.Errorf("%d models", len(again.Models))
		}
	})
}
