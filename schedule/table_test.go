package schedule

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// outcome is the cost of a workload.
type outcome struct {
	ratio float64 // evaluated tokens / the least possible
	wall  time.Duration
	loads int
	sim   *sim
}

// compare runs a workload directly and through a queue.
func compare(t *testing.T, name string, cfg engineConfig, q Config, work func(*sim)) (direct, lanes outcome) {
	t.Helper()
	run := func(queue *Queue) outcome {
		s := newSim(t, cfg, queue)
		work(s)
		wall := s.run()
		return outcome{float64(s.evaluated) / float64(s.least), wall, s.loads, s}
	}
	direct, lanes = run(nil), run(New(q))
	if cfg.host == 0 && cfg.load == 0 && lanes.sim.missed > 0 {
		t.Errorf("%s: %d requests landed elsewhere than expected", name, lanes.sim.missed)
	}
	t.Logf("%-58s direct %.3f %6.1fs %d loads | lanes %.3f %6.1fs %d loads", name, direct.ratio, direct.wall.Seconds(), direct.loads, lanes.ratio, lanes.wall.Seconds(), lanes.loads)
	return direct, lanes
}

var ids uint64

func text(tokens int) seg {
	ids++
	return seg{id: ids, tokens: tokens}
}

// groups builds prefixes with a number of requests each, in random order.
func groups(prefixes, each, prefixTokens, tail, gen int, seed uint64) []*job {
	rng := rand.New(rand.NewPCG(seed, 1))
	var jobs []*job
	for range prefixes {
		p := text(prefixTokens + rng.IntN(prefixTokens/10+1))
		for range each {
			jobs = append(jobs, &job{segs: []seg{p, text(tail + rng.IntN(tail/2+1))}, gen: gen, client: "c"})
		}
	}
	rng.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
	return jobs
}

// burst sends all at once.
func burst(s *sim, jobs []*job) {
	for i, j := range jobs {
		s.after(time.Duration(i)*50*time.Microsecond, func() { s.submit(j) })
	}
}

// TestPrefixes: 32 prefixes × 4, all queued by 8 clients.
func TestPrefixes(t *testing.T) {
	for _, slots := range []int{1, 2, 4} {
		for _, host := range []int{0, 100_000} {
			for _, order := range []string{"random", "sorted"} {
				name := fmt.Sprintf("32 prefixes x 4, %d slots, host %d, %s", slots, host, order)
				_, lanes := compare(t, name, engineConfig{slots: slots, host: host}, Config{Lanes: slots}, func(s *sim) {
					jobs := groups(32, 4, 1000, 40, 16, 7)
					if order == "sorted" {
						slices.SortStableFunc(jobs, func(a, b *job) int { return cmp.Compare(a.segs[0].id, b.segs[0].id) })
					}
					for i, j := range jobs {
						j.client = fmt.Sprint("client", i%8)
					}
					burst(s, jobs)
				})
				if lanes.ratio > 1.05 {
					t.Errorf("%s: %.3f times the least possible, want 1.05", name, lanes.ratio)
				}
			}
		}
	}
}

// TestRaces: if requests overtake each other on the way, those with a new prefix rarely take slots
// from those that continue one.
func TestRaces(t *testing.T) {
	for _, longest := range []bool{false, true} {
		for jitter, most := range map[time.Duration]float64{8 * time.Millisecond: 1.01, 30 * time.Millisecond: 1.08} {
			for _, gen := range []int{4, 16} {
				ratio := 0.0
				const runs = 10
				for seed := range uint64(runs) {
					s := newSim(t, engineConfig{slots: 4, jitter: jitter, seed: seed, perToken: 100 * time.Microsecond, longest: longest}, New(Config{Lanes: 4}))
					burst(s, groups(32, 4, 620, 35, gen, seed))
					s.run()
					ratio += float64(s.evaluated) / float64(s.least) / runs
				}
				t.Logf("longest match %v, up to %v on the way, answers of %d tokens: %.3f", longest, jitter, gen, ratio)
				if ratio > most {
					t.Errorf("longest match %v, up to %v on the way, answers of %d tokens: %.3f times the least possible, want %.3f", longest, jitter, gen, ratio, most)
				}
			}
		}
	}
}

// TestRacesIdle: of two requests that arrive at about the same time while all slots are idle, the
// one with a new prefix does not take the slot of the other, although that has been idle for
// longer.
func TestRacesIdle(t *testing.T) {
	for _, gap := range []time.Duration{0, time.Millisecond} {
		s := newSim(t, engineConfig{slots: 2, jitter: 8 * time.Millisecond, perToken: 100 * time.Microsecond}, New(Config{Lanes: 2}))
		p := text(1000)
		for i := range 50 {
			s.after(time.Duration(i)*5*time.Second, func() {
				s.submit(&job{segs: []seg{p, text(64)}, gen: 4, client: "warm"})
				s.after(gap, func() { s.submit(&job{segs: []seg{text(800)}, gen: 40, client: "cold"}) })
			})
		}
		s.run()
		if s.evaluated != s.least || s.missed > 0 {
			t.Errorf("%v apart: %d tokens evaluated, want %d; %d landed elsewhere", gap, s.evaluated, s.least, s.missed)
		}
	}
}

// TestRacesLearned: requests that overtake each other on the way to the only slot do not look like
// two slots.
func TestRacesLearned(t *testing.T) {
	for _, load := range []time.Duration{0, 300 * time.Millisecond} {
		ratio, lanes := 0.0, 0
		const runs = 10
		for seed := range uint64(runs) {
			s := newSim(t, engineConfig{slots: 1, jitter: 8 * time.Millisecond, seed: seed, perToken: 25 * time.Microsecond, decode: 1500 * time.Microsecond, load: load}, New(Config{}))
			for i, j := range groups(32, 4, 620, 35, 4, seed) {
				s.after(time.Duration(i)*time.Millisecond, func() { s.submit(j) })
			}
			s.run()
			ratio += float64(s.evaluated) / float64(s.least) / runs
			lanes = max(lanes, s.q.servers[0].runners[0].want)
		}
		t.Logf("loading takes %v: %.3f, at most %d lanes in the end", load, ratio, lanes)
		if ratio > 1.08 || lanes > 1 {
			t.Errorf("loading takes %v: %.3f times the least possible, want 1.08; %d lanes", load, ratio, lanes)
		}
	}
}

// TestScripts: closed loops, each with its own prefix, on one slot.
func TestScripts(t *testing.T) {
	for _, host := range []int{0, 2000, 100_000} {
		for _, one := range []bool{false, true} {
			name := fmt.Sprintf("4 scripts, 1 slot, host %d, one address %v", host, one)
			direct, lanes := compare(t, name, engineConfig{slots: 1, host: host}, Config{Lanes: 1}, func(s *sim) {
				for c := range 4 {
					p := text(1000)
					var jobs []*job
					client := "script"
					if !one {
						client = fmt.Sprint(client, c)
					}
					for range 24 {
						jobs = append(jobs, &job{segs: []seg{p, text(60)}, gen: 16, client: client})
					}
					s.after(time.Duration(c)*time.Millisecond, func() { s.closed(jobs, 5*time.Millisecond) })
				}
			})
			if lanes.ratio > 1.15 {
				t.Errorf("%s: %.3f times the least possible, want 1.15", name, lanes.ratio)
			}
			if host < 4000 && lanes.wall > direct.wall*6/10 {
				t.Errorf("%s: %v, want 0.6 of %v", name, lanes.wall, direct.wall)
			}
		}
	}
}

// TestChats: turns of chats that share a system prompt.
func TestChats(t *testing.T) {
	for _, host := range []int{0, 100_000} {
		for _, slots := range []int{1, 2, 4} {
			for _, each := range []int{1, 4} {
				name := fmt.Sprintf("4 clients x %d chats of 10 turns, %d slots, host %d", each, slots, host)
				direct, lanes := compare(t, name, engineConfig{slots: slots, host: host}, Config{Lanes: slots}, func(s *sim) {
					system := text(500)
					for c := range 4 {
						var jobs []*job
						for range each {
							jobs = append(jobs, conversation(system, c)...)
						}
						s.after(time.Duration(c)*10*time.Millisecond, func() { s.chat(jobs, 20*time.Millisecond) })
					}
				})
				if lanes.ratio > direct.ratio {
					t.Errorf("%s: %.3f times the least possible, direct %.3f", name, lanes.ratio, direct.ratio)
				}
			}
		}
	}
}

// TestPauses measures a case that cannot be improved: chats whose turns do not overlap. All slots
// are free at each turn, and the engine moves a new chat to a slot that holds another one, because
// they share the system prompt.
func TestPauses(t *testing.T) {
	for _, longest := range []bool{false, true} {
		direct, lanes := compare(t, fmt.Sprintf("4 clients with pauses, 4 slots, longest match %v", longest), engineConfig{slots: 4, longest: longest}, Config{Lanes: 4}, func(s *sim) {
			system := text(500)
			for c := range 4 {
				jobs := conversation(system, c)
				s.after(time.Duration(c)*time.Second, func() { s.chat(jobs, 4*time.Second+time.Duration(c)*300*time.Millisecond) })
			}
		})
		if lanes.ratio > direct.ratio || lanes.wall > direct.wall {
			t.Errorf("%.3f times the least possible in %v, direct %.3f in %v", lanes.ratio, lanes.wall, direct.ratio, direct.wall)
		}
	}
}

// conversation returns ten turns of a client's chat that begins with a system prompt.
func conversation(system seg, client int) (jobs []*job) {
	segs := []seg{system}
	for range 10 {
		segs = append(slices.Clone(segs), text(60+7*client))
		jobs = append(jobs, &job{segs: segs, gen: 60, client: fmt.Sprint("client", client)})
	}
	return jobs
}

// chat is closed with each answer in the next turn's prompt.
func (s *sim) chat(jobs []*job, think time.Duration) {
	if len(jobs) == 0 {
		return
	}
	j, rest := jobs[0], jobs[1:]
	j.done = func() {
		answer := seg{id: j.id<<32 | 5, tokens: j.gen, answer: true}
		for _, next := range rest {
			if n := len(j.segs); len(next.segs) > n && next.segs[n-1].id == j.segs[n-1].id {
				next.segs = slices.Insert(slices.Clone(next.segs), n, answer)
			}
		}
		s.after(think, func() { s.chat(rest, think) })
	}
	s.submit(j)
}

// hot has clients ask for one prefix several times each: all at once if open, otherwise one after
// the other.
func hot(s *sim, clients, each int, open bool) {
	jobs := groups(1, clients*each, 1000, 40, 50, 3)
	for i, j := range jobs {
		j.client = fmt.Sprint("client", i%clients)
	}
	if open {
		burst(s, jobs)
		return
	}
	for c := range clients {
		s.closed(jobs[c*each:(c+1)*each], 3*time.Millisecond)
	}
}

// TestHotPrefix: one prefix must fill every slot.
func TestHotPrefix(t *testing.T) {
	for _, loop := range []string{"open", "closed"} {
		direct, lanes := compare(t, "one prefix, 8 clients, 4 slots, "+loop, engineConfig{slots: 4}, Config{Lanes: 4}, func(s *sim) {
			hot(s, 8, 20, loop == "open")
		})
		if float64(direct.wall)/float64(lanes.wall) < 0.97 {
			t.Errorf("%s: throughput %.3f of direct, want 0.97", loop, float64(direct.wall)/float64(lanes.wall))
		}
	}
}

// TestRunners: two models that exclude each other, and two num_ctx, in 100 interleaved requests.
func TestRunners(t *testing.T) {
	for _, loop := range []string{"open", "closed"} {
		for _, told := range []bool{true, false} {
			name := fmt.Sprintf("2 models x 2 num_ctx, 100 requests, %s, told %v", loop, told)
			cfg := engineConfig{slots: 1, load: 2 * time.Second, exclude: true}
			_, lanes := compare(t, name, cfg, Config{Lanes: 1}, func(s *sim) {
				if s.q != nil && told {
					s.q.SetExclusive(0, "a", "b", true, s.now)
				}
				var jobs []*job
				for i := range 100 {
					jobs = append(jobs, &job{segs: []seg{text(300)}, gen: 20, client: fmt.Sprint("client", i%4), model: []string{"a", "b"}[i%2], numCtx: 2048 * (1 + i/2%2)})
				}
				if loop == "open" {
					burst(s, jobs)
					return
				}
				for c := range 4 {
					var own []*job
					for i := c; i < 100; i += 4 {
						own = append(own, jobs[i])
					}
					s.closed(own, 5*time.Millisecond)
				}
			})
			most := 4 + 2
			if loop == "open" && told {
				most = 4
			}
			if lanes.loads > most {
				t.Errorf("%s: %d loads, want %d", name, lanes.loads, most)
			}
		}
	}
}

// TestOvertaking: eight scripts with two models and two num_ctx learn whether the models can be
// loaded together, although requests overtake each other on the way to the server.
func TestOvertaking(t *testing.T) {
	for _, exclude := range []bool{true, false} {
		for _, slots := range []int{1, 4} {
			for _, contexts := range []int{1, 2} {
				seen := map[int]int{}
				for seed := range uint64(20) {
					s := newSim(t, engineConfig{slots: slots, load: 2 * time.Second, exclude: exclude, jitter: 8 * time.Millisecond, seed: seed}, New(Config{Lanes: slots}))
					s.dealt(100, func(i int) *job {
						return &job{segs: []seg{text(300)}, gen: 20, model: []string{"a", "b"}[i%2], numCtx: 2048 * (1 + i/2%contexts)}
					})
					s.run()
					seen[s.loads]++
				}
				most := 2 * contexts
				if exclude {
					most += 2
				}
				t.Logf("exclude %v, %d slots, %d num_ctx: runs by loads %v", exclude, slots, contexts, seen)
				if loads := slices.Max(slices.Collect(maps.Keys(seen))); loads > most {
					t.Errorf("exclude %v, %d slots, %d num_ctx: %d loads, want %d", exclude, slots, contexts, loads, most)
				}
			}
		}
	}
}

// TestIdleBesideLoad: a loaded, idle model serves at once while another one, which fits beside it,
// is loaded for the first time.
func TestIdleBesideLoad(t *testing.T) {
	s := newSim(t, engineConfig{slots: 1, load: 30 * time.Second}, New(Config{Lanes: 1}))
	one := func(model string, id uint64) *job {
		return &job{segs: []seg{{id: id, tokens: 100}}, gen: 10, model: model}
	}
	s.submit(one("a", 1))
	s.run()
	s.submit(one("b", 2))
	var asked []*job
	for i := range 20 {
		s.after(time.Duration(i+1)*time.Second, func() {
			j := one("a", uint64(10+i))
			asked = append(asked, j)
			s.submit(j)
		})
	}
	s.run()
	for i, j := range asked {
		if took := j.end.Sub(j.came); took > 100*time.Millisecond {
			t.Errorf("request %d to the loaded model took %v", i, took)
		}
	}
	if s.loads != 2 {
		t.Errorf("%d loads", s.loads)
	}
}

// TestSecondModel: a client asks for a model once a minute beside four loops on another one that
// has to be unloaded for it. It waits for one load and half a minute, or for two loads if those
// take longer.
func TestSecondModel(t *testing.T) {
	for _, load := range []time.Duration{2 * time.Second, 30 * time.Second, time.Minute} {
		s := newSim(t, engineConfig{slots: 1, load: load, exclude: true}, New(Config{Lanes: 1}))
		s.q.SetExclusive(0, "a", "b", true, s.now)
		for c := range 4 {
			var own []*job
			for i := range 4000 {
				own = append(own, &job{segs: []seg{{id: uint64(c), tokens: 300}, {id: uint64(100_000*(c+1) + i), tokens: 30}}, gen: 20, client: fmt.Sprint("loop", c), model: "a"})
			}
			s.closed(own, 5*time.Millisecond)
		}
		var asked []*job
		for i := range 4 {
			s.after(time.Duration(i+1)*(time.Minute+2*load), func() {
				j := &job{segs: []seg{{id: uint64(900_000 + i), tokens: 100}}, gen: 20, client: "person", model: "b"}
				asked = append(asked, j)
				s.submit(j)
			})
		}
		s.run()
		most := max(longestTurn, load) + load + 2*time.Second // and the requests being served
		for i, j := range asked {
			if took := j.end.Sub(j.came); took > most {
				t.Errorf("a load takes %v: request %d took %v, want %v", load, i, took, most)
			}
		}
		t.Logf("a load takes %v: %d loads for 4 requests", load, s.loads)
	}
}

// TestLongLoads: if a load takes longer than a turn, the models still do more than load.
func TestLongLoads(t *testing.T) {
	for _, loads := range []time.Duration{10 * time.Second, 35 * time.Second, time.Minute} {
		s := newSim(t, engineConfig{slots: 2, load: loads, exclude: true, perToken: time.Millisecond, decode: 10 * time.Millisecond}, New(Config{Lanes: 2}))
		s.q.SetExclusive(0, "a", "b", true, s.now)
		served := map[string]int{}
		end := start.Add(2 * time.Hour)
		var ask func(model string, n uint64)
		ask = func(model string, n uint64) {
			if s.now.After(end) {
				return
			}
			s.submit(&job{segs: []seg{{id: n, tokens: 200}}, gen: 20, client: model, model: model, done: func() {
				served[model]++
				s.after(5*time.Millisecond, func() { ask(model, n+8) })
			}})
		}
		for i := range uint64(8) {
			ask([]string{"a", "b"}[i%2], 1000+i)
		}
		s.run()
		busy := time.Duration(s.loads) * loads
		t.Logf("a load takes %v: served %v, %d loads take %v of 2 h", loads, served, s.loads, busy)
		if busy > 80*time.Minute || min(served["a"], served["b"])*2 < max(served["a"], served["b"]) {
			t.Errorf("a load takes %v: served %v, %d loads", loads, served, s.loads)
		}
	}
}

// TestThreeModels: three models that exclude each other are recognized, too. Whether each client
// uses one of them or all in turn, learning this costs a limited number of loads more than knowing
// it.
func TestThreeModels(t *testing.T) {
	names := []string{"a", "b", "c"}
	for _, slots := range []int{1, 4} {
		for _, rotate := range []int{0, 1} {
			loads := func(told bool, seed uint64) int {
				s := newSim(t, engineConfig{slots: slots, load: 2 * time.Second, exclude: true, jitter: 8 * time.Millisecond, seed: seed}, New(Config{Lanes: slots}))
				for i := range names {
					for _, other := range names[:i] {
						if told {
							s.q.SetExclusive(0, names[i], other, true, s.now)
						}
					}
				}
				s.dealt(120, func(i int) *job {
					return &job{segs: []seg{text(300)}, gen: 20, model: names[(i%8+i/8*rotate)%3]}
				})
				s.run()
				return s.loads
			}
			known, learned := 0, 0
			for seed := range uint64(20) {
				known, learned = max(known, loads(true, seed)), max(learned, loads(false, seed))
			}
			t.Logf("%d slots, rotating %d: at most %d loads for 120 requests, %d if it is known", slots, rotate, learned, known)
			if learned > known+25 {
				t.Errorf("%d slots, rotating %d: %d loads for 120 requests, %d if it is known", slots, rotate, learned, known)
			}
		}
	}
}

// TestStatedDefault: clients that state an option's default value share the model with clients that
// do not, as in Ollama: none waits for a turn.
func TestStatedDefault(t *testing.T) {
	for _, slots := range []int{1, 4} {
		direct, lanes := compare(t, fmt.Sprintf("6 loops, of which 3 state the default num_ctx, %d slots", slots), engineConfig{slots: slots, load: 2 * time.Second}, Config{Lanes: slots}, func(s *sim) {
			for c := range 6 {
				var own []*job
				for range 100 {
					own = append(own, &job{segs: []seg{text(200)}, gen: 50, client: fmt.Sprint("client", c), stated: c%2 == 1})
				}
				s.after(time.Duration(c)*3*time.Millisecond, func() { s.closed(own, 5*time.Millisecond) })
			}
			if s.q != nil { // /api/ps is polled soon after a load
				s.after(2*time.Second+500*time.Millisecond, func() { s.q.SetLoaded(0, map[string]int{options("m", 0).Model: 4096}, s.now, s.now); s.pumped() })
			}
		})
		longest := [2]time.Duration{waitsOf(direct.sim).most, waitsOf(lanes.sim).most}
		t.Logf("the longest request takes %v, directly %v", longest[1], longest[0])
		if lanes.loads > 1 || lanes.wall > direct.wall*103/100 || longest[1] > longest[0]*13/10 {
			t.Errorf("%d slots: %d loads, %v (directly %v), the longest request %v (%v)", slots, lanes.loads, lanes.wall, direct.wall, longest[1], longest[0])
		}
	}
}

// TestListedLate: a server's list may be older than the latest requests. While a load replaces one
// num_ctx with another, the two are not taken for the same.
func TestListedLate(t *testing.T) {
	cfg := engineConfig{slots: 1, load: 200 * time.Millisecond, exclude: true}
	for _, late := range []time.Duration{5 * time.Millisecond, 200 * time.Millisecond} {
		s := newSim(t, cfg, New(Config{Lanes: 1}))
		jobs := groups(200, 1, 300, 10, 50, 5)
		for i, j := range jobs {
			j.numCtx = 2048 * ((i/4 + i) % 2)
		}
		for c := range 4 {
			var own []*job
			for i := c; i < len(jobs); i += 4 {
				own = append(own, jobs[i])
			}
			s.after(time.Duration(c)*3*time.Millisecond, func() { s.closed(own, 5*time.Millisecond) })
		}
		both, united := false, false
		var poll func()
		poll = func() {
			at, contexts := s.now, map[string]int{}
			for _, e := range s.boxes[0].loaded {
				contexts[options(e.model(), 0).Model] = 4096
				if e.key == "m/2048" {
					contexts[options(e.model(), 0).Model] = 2048
				}
			}
			s.after(late, func() {
				s.q.SetLoaded(0, contexts, at, s.now)
				runners := len(s.q.servers[0].runners)
				both, united = both || runners == 2, united || both && runners < 2
				s.pumped()
			})
			if len(s.jobs) > 0 {
				s.after(100*time.Millisecond, poll)
			}
		}
		s.after(0, poll)
		s.run()
		if !both || united {
			t.Errorf("listed %v late: told apart %v, taken for the same %v", late, both, united)
		}
	}
}

// Ten requests with three num_ctx in turn load the model three times, not nine.
func TestFieldF12(t *testing.T) {
	direct, lanes := compare(t, "10 requests, 3 num_ctx in turn", engineConfig{slots: 1, load: 2 * time.Second}, Config{Lanes: 1}, func(s *sim) {
		var jobs []*job
		for i := range 10 {
			jobs = append(jobs, &job{segs: []seg{text(300)}, gen: 20, client: "c", numCtx: []int{32768, 0, 8192}[i%3]})
		}
		burst(s, jobs)
	})
	if lanes.loads != 3 || direct.loads != 10 {
		t.Errorf("%d loads, direct %d", lanes.loads, direct.loads)
	}
	for _, j := range lanes.sim.finished {
		if wait := j.sent.Sub(j.came); wait > lanes.wall {
			t.Errorf("a request waited for %v", wait)
		}
	}
}

// TestStarvation: a request beside a stream of others that fit better waits for a bounded time:
// about MaxWait if that is set, otherwise until the others have had their turn.
func TestStarvation(t *testing.T) {
	for _, w := range []struct {
		name    string
		maxWait time.Duration
		stream  func(s *sim, i int) *job
		other   *job
		within  time.Duration
	}{
		{name: "one prefix", within: 8 * time.Second},
		{name: "one prefix, 5 s", maxWait: 5 * time.Second, within: 8 * time.Second},
		{name: "more urgent", within: 60 * time.Second, other: &job{priority: Batch}},
		{name: "more urgent, 5 s", maxWait: 5 * time.Second, within: 8 * time.Second, other: &job{priority: Batch}},
		{name: "another runner", within: 60 * time.Second, other: &job{numCtx: 4096}},
		{name: "another runner, 5 s", maxWait: 5 * time.Second, within: 20 * time.Second, other: &job{numCtx: 4096}},
	} {
		s := newSim(t, engineConfig{slots: 1, load: time.Second}, New(Config{Lanes: 1, MaxWait: w.maxWait}))
		p := text(1000)
		for i := range 2000 { // they arrive slightly faster than they can be served
			s.after(time.Duration(i)*75*time.Millisecond, func() { s.submit(&job{segs: []seg{p, text(60)}, gen: 20, client: "stream"}) })
		}
		other := w.other
		if other == nil {
			other = &job{}
		}
		// As the same client it has no claim to be served earlier.
		other.segs, other.gen, other.client = []seg{text(1000)}, 20, "stream"
		s.after(time.Second, func() { s.submit(other) })
		s.run()
		wait := other.sent.Sub(other.came)
		t.Logf("beside %s: waited %v", w.name, wait)
		if wait > w.within {
			t.Errorf("beside %s: it waited for %v, want %v", w.name, wait, w.within)
		}
	}
}

// TestMaxWait: once a request has waited for longer than MaxWait, no later request goes before it,
// except to finish making use of a shared prefix.
func TestMaxWait(t *testing.T) {
	const maxWait = time.Second
	for _, w := range []struct {
		name   string
		shares int // consecutive requests of the stream with a common prefix
		gen    int
		most   int // limit of later requests that go before one that has waited too long
	}{
		{"nothing", 1, 20, 0},
		{"in twos", 2, 60, 4},
		{"in fives", 5, 80, 5},
		{"all", 1000, 100, 4},
	} {
		for _, priority := range []Priority{Normal, Batch} {
			t.Run(fmt.Sprint(w.name, " ", priority), func(t *testing.T) {
				s := newSim(t, engineConfig{slots: 1}, New(Config{Lanes: 1, MaxWait: maxWait}))
				var p seg
				for i := range 200 { // bursts of twenty; most exceed maxWait
					if i%w.shares == 0 {
						p = text(1000)
					}
					j := &job{segs: []seg{p, text(60)}, gen: w.gen, client: fmt.Sprint("stream", i%8)}
					s.after(time.Duration(i/20)*10*time.Second+time.Duration(i%20)*10*time.Millisecond, func() { s.submit(j) })
				}
				for i := range 50 {
					j := &job{segs: []seg{text(400)}, gen: 20, client: "other", priority: priority}
					s.after(time.Duration(i)*2*time.Second+45*time.Millisecond, func() { s.submit(j) })
				}
				s.run()
				aged, most := 0, 0
				for _, j := range s.finished {
					if j.sent.Sub(j.came) <= maxWait {
						continue
					}
					n := 0
					for _, k := range s.finished {
						if k.came.After(j.came) && k.sent.Before(j.sent) && k.sent.After(j.came.Add(maxWait)) {
							n++
						}
					}
					aged, most = aged+1, max(most, n)
				}
				t.Logf("%d waited for longer; %d went before one of these that had come later", aged, most)
				if aged < 20 || most > w.most {
					t.Errorf("%d went before one that had waited for longer, want %d at most; %d waited for longer", most, w.most, aged)
				}
			})
		}
	}
}

// TestOverload: even if all requests have waited for longer than MaxWait, prompts are not evaluated
// again for each of them.
func TestOverload(t *testing.T) {
	_, lanes := compare(t, "32 prefixes x 20, MaxWait long over", engineConfig{slots: 1}, Config{Lanes: 1, MaxWait: time.Second}, func(s *sim) {
		burst(s, groups(32, 20, 1000, 40, 16, 7))
	})
	if lanes.ratio > 3 {
		t.Errorf("%.3f times the least possible", lanes.ratio)
	}
}

// TestInteractive: an interactive request among 500 batch requests waits for one running request,
// and costs one prefix.
func TestInteractive(t *testing.T) {
	for _, slots := range []int{1, 4} {
		work := func(with bool) func(*sim) {
			return func(s *sim) {
				jobs := groups(10, 50, 1000, 40, 30, 11)
				for _, j := range jobs {
					j.priority = Batch
				}
				burst(s, jobs)
				if with {
					s.after(5*time.Second, func() {
						s.submit(&job{segs: []seg{text(400)}, gen: 30, client: "human", priority: Interactive})
					})
				}
			}
		}
		_, without := compare(t, fmt.Sprintf("500 batch requests, %d slots", slots), engineConfig{slots: slots}, Config{Lanes: slots}, work(false))
		_, with := compare(t, fmt.Sprintf("500 batch requests and an interactive one, %d slots", slots), engineConfig{slots: slots}, Config{Lanes: slots}, work(true))
		for _, j := range with.sim.finished {
			if j.priority == Interactive {
				if wait := j.sent.Sub(j.came); wait > 500*time.Millisecond {
					t.Errorf("%d slots: it waited for %v, which is longer than one request takes", slots, wait)
				}
			}
		}
		if extra := with.sim.evaluated - without.sim.evaluated - 400; extra > 1100 {
			t.Errorf("%d slots: it cost %d tokens beside its own", slots, extra)
		}
	}
}

// TestFair: two clients with a constant backlog, one with long prompts and one with short ones, get
// the same service: neither is ever ahead by more than a quantum and a request per lane, and any
// ten quanta are evenly divided.
func TestFair(t *testing.T) {
	const long, short, gen, depth = 2000, 100, 10, 16
	const later = time.Millisecond // the second client's start after the first
	q := 20 * (long + short) / 2.0 // as in class.fair, for the average request of both clients
	for _, slots := range []int{1, 4} {
		for _, first := range []string{"long", "short"} {
			s := newSim(t, engineConfig{slots: slots}, New(Config{Lanes: slots}))
			var send func(client string, size int)
			sent := 0
			send = func(client string, size int) {
				if sent++; sent <= 8000 {
					s.submit(&job{segs: []seg{text(size)}, gen: gen, client: client, done: func() { send(client, size) }})
				}
			}
			for i, client := range []string{"long", "short"} {
				size := []int{long, short}[i]
				begins := time.Duration(0)
				if client != first {
					begins = later
				}
				for k := range depth {
					s.after(begins+time.Duration(k)*100*time.Microsecond, func() { send(client, size) })
				}
			}
			var served, window [2]float64
			most, jain, windows := 0.0, 1.0, 0
			s.onDone = func(j *job) {
				if sent > 8000 || j.sent.Sub(start) < later {
					return // one of them had no backlog
				}
				i := 0
				if j.client == "short" {
					i = 1
				}
				cost := float64(total(j.segs) + fairWeight*gen)
				served[i] += cost
				window[i] += cost
				most = max(most, math.Abs(served[0]-served[1]))
				if a, b := window[0], window[1]; a+b >= 10*q {
					jain = min(jain, (a+b)*(a+b)/(2*(a*a+b*b)))
					window = [2]float64{}
					windows++
				}
			}
			s.run()
			bound := q + float64(slots+1)*(long+fairWeight*gen) // one more, ahead as another flow
			t.Logf("%d slots, %s first: at most %.2f quanta ahead (bound %.2f), Jain index at least %.4f in %d times ten quanta", slots, first, most/q, bound/q, jain, windows)
			if most > bound || jain < 0.99 || windows < 3 {
				t.Errorf("%d slots, %s first: unfair", slots, first)
			}
		}
	}
}

// TestLone: a client that sends one request after the other never waits, whatever it sends.
func TestLone(t *testing.T) {
	for _, lanes := range []int{0, 1, 4} {
		s := newSim(t, engineConfig{slots: max(lanes, 1), load: time.Second}, New(Config{Lanes: lanes}))
		var jobs []*job
		a, b := text(1000), text(1000)
		for i := range 60 {
			jobs = append(jobs, &job{segs: []seg{[]seg{a, b}[i%2], text(30)}, gen: 10, client: "lone", numCtx: 2048 * (i / 20)})
		}
		s.closed(jobs, 5*time.Millisecond)
		s.run()
		for _, j := range s.finished {
			if j.sent != j.came {
				t.Errorf("%d lanes: a request waited for %v", lanes, j.sent.Sub(j.came))
			}
		}
	}
}

// TestDecodeHeavy: if generation takes most of the time, no slot may be idle.
func TestDecodeHeavy(t *testing.T) {
	for _, loop := range []string{"open", "closed"} {
		direct, lanes := compare(t, "short prompts, long answers, 4 slots, "+loop, engineConfig{slots: 4}, Config{Lanes: 4}, func(s *sim) {
			jobs := groups(4, 20, 150, 30, 300, 5)
			if loop == "open" {
				burst(s, jobs)
				return
			}
			for c := range 8 {
				for _, j := range jobs[c*10 : c*10+10] {
					j.client = fmt.Sprint("client", c)
				}
				s.closed(jobs[c*10:c*10+10], 5*time.Millisecond)
			}
		})
		if lanes.wall > direct.wall*101/100 {
			t.Errorf("%s: %v, direct %v", loop, lanes.wall, direct.wall)
		}
	}
}

// TestManyLanes: thousands of prefixes and hundreds of lanes, compared with the best order known in
// advance: sorted depth-first and cut into contiguous runs.
func TestManyLanes(t *testing.T) {
	const slots = 200
	var offline int
	_, lanes := compare(t, "2000 prefixes x 3 in 50 families, 200 slots", engineConfig{slots: slots}, Config{Lanes: slots, Limit: 1 << 20}, func(s *sim) {
		rng := rand.New(rand.NewPCG(4, 4))
		var jobs []*job
		for range 50 {
			family := text(300)
			for range 40 {
				p := text(700)
				for range 3 {
					jobs = append(jobs, &job{segs: []seg{family, p, text(40)}, gen: 16, client: "c"})
				}
			}
		}
		offline = 0
		per := len(jobs) / slots
		for i, j := range jobs {
			if i%per == 0 {
				offline += total(j.segs)
			} else {
				offline += total(j.segs) - lcp(j.segs, jobs[i-1].segs)
			}
		}
		rng.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
		burst(s, jobs)
	})
	ratio := float64(lanes.sim.evaluated) / float64(offline)
	t.Logf("evaluated %d, the offline order %d: %.3f", lanes.sim.evaluated, offline, ratio)
	if ratio > 1.05 {
		t.Errorf("%.3f times the tokens of the offline order", ratio)
	}
}

// TestLearnsHost: if the host cache keeps what the slots lose, lanes are not held for long.
func TestLearnsHost(t *testing.T) {
	direct, lanes := compare(t, "8 scripts of 200, ample host cache", engineConfig{slots: 1, host: 100_000}, Config{Lanes: 1}, func(s *sim) {
		for c := range 8 {
			p := text(1000)
			var jobs []*job
			for range 200 {
				jobs = append(jobs, &job{segs: []seg{p, text(60)}, gen: 16, client: fmt.Sprint("script", c)})
			}
			s.closed(jobs, 20*time.Millisecond)
		}
	})
	if lanes.ratio > 1.05 || lanes.wall > direct.wall*105/100 {
		t.Errorf("%.3f times the least possible in %v, direct %v", lanes.ratio, lanes.wall, direct.wall)
	}
}

// TestLearnsLanes: the number of slots is found within a few dozen requests, whether or not answers
// report how long they waited, and another model starts with it.
func TestLearnsLanes(t *testing.T) {
	for _, silent := range []bool{false, true} {
		for _, slots := range []int{1, 2, 4} {
			s := newSim(t, engineConfig{slots: slots, silent: silent}, New(Config{}))
			burst(s, groups(40, 10, 500, 60, 40, 9))
			found, n, wrong := 0, 0, 0
			s.onDone = func(*job) {
				n++
				x := s.q.servers[0].runners[0]
				if x.want == slots && x.learner.ceiling && found == 0 {
					found = n
				}
				if found > 0 && x.want != slots {
					wrong++
				}
			}
			s.run()
			t.Logf("%d slots, silent %v: found after %d requests, off for %d of the next %d", slots, silent, found, wrong, n-found)
			if found == 0 || found > 72 || wrong > 72 {
				t.Errorf("%d slots: found after %d requests, then off for %d", slots, found, wrong)
			}
			s.submit(&job{segs: []seg{text(100)}, model: "other", client: "c"})
			s.run()
			if x := s.q.servers[0].runners[1]; x.want != slots {
				t.Errorf("another model begins with %d lanes, want %d", x.want, slots)
			}
		}
	}
}
