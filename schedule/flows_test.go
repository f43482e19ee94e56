package schedule

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestPeople: a person asks now and then beside a script with hundreds of waiting requests, and
// waits for at most one running request per lane. That holds whether the script is another client,
// another program of the same client, or the same program with another prompt. It costs the script
// few tokens.
func TestPeople(t *testing.T) {
	for _, slots := range []int{1, 4} {
		for _, who := range []struct {
			name    string
			client  string
			program uint64
			flow    uint64
		}{
			{"another client", "person", 1, 1},
			{"another program", "script", 2, 1},
			{"another prompt", "script", 1, 2},
		} {
			t.Run(fmt.Sprint(who.name, ", ", slots, " slots"), func(t *testing.T) {
				alone := 0
				for _, people := range []bool{false, true} {
					s := newSim(t, engineConfig{slots: slots, load: time.Second}, New(Config{Lanes: slots}))
					for i := range 1000 {
						s.submit(&job{segs: []seg{{id: 1, tokens: 1000}, {id: uint64(1000 + i), tokens: 50}}, gen: 100, client: "script", program: 1, flow: 1})
					}
					var chats []*job
					for i := range 10 {
						if !people {
							break
						}
						s.after(time.Duration(i+1)*12*time.Second, func() {
							j := &job{segs: []seg{{id: 2, tokens: 200}, {id: uint64(5000 + i), tokens: 50}}, gen: 50, client: who.client, program: who.program, flow: who.flow}
							chats = append(chats, j)
							s.submit(j)
						})
					}
					s.run()
					if !people {
						alone = s.evaluated
						continue
					}
					own := s.cfg.perToken*250 + s.cfg.decode*50
					running := s.cfg.perToken*1050 + s.cfg.decode*100
					var waits []time.Duration
					for _, j := range chats {
						waits = append(waits, j.end.Sub(j.came)-own)
					}
					slices.Sort(waits)
					more := float64(s.evaluated-len(chats)*250) / float64(alone)
					t.Logf("waits %v, a request of the script takes up to %v; the script evaluates %.3f times as much", waits, running, more)
					if most := waits[len(waits)-1]; most > running {
						t.Errorf("a person waited for %v, longer than for one request, %v", most, running)
					}
					if more > 1+float64(len(chats)*1000*slots)/float64(alone) {
						t.Errorf("the script had %.3f times as many tokens evaluated", more)
					}
				}
			})
		}
	}
}

// off makes a workload's flows irrelevant.
func off(jobs []*job) []*job {
	for _, j := range jobs {
		j.program = noFlows
	}
	return jobs
}

// beside is a batch with a long prefix, next to a small program with different prompts.
func beside(t *testing.T, prefix int, think time.Duration, flows bool) (makespan, longest time.Duration, evaluated int) {
	s := newSim(t, engineConfig{slots: 1, load: time.Second, perToken: time.Millisecond, decode: 10 * time.Millisecond}, New(Config{Lanes: 1}))
	set := func(j *job) *job {
		if !flows {
			off([]*job{j})
		}
		return j
	}
	left := 400
	for i := range left {
		s.submit(set(&job{segs: []seg{{id: 1, tokens: prefix}, {id: uint64(1000 + i), tokens: 50}}, gen: 20, client: "batch", program: 1, flow: 1, done: func() {
			if left--; left == 0 {
				makespan = s.now.Sub(start)
			}
		}}))
	}
	var ask func(n int)
	ask = func(n int) {
		j := &job{segs: []seg{{id: 2, tokens: 60}, {id: uint64(10_000 + n), tokens: 60}}, gen: 10, client: "small", program: 2, flow: 2}
		j.done = func() {
			longest = max(longest, j.end.Sub(j.came))
			if left > 0 {
				s.after(think, func() { ask(n + 1) })
			}
		}
		s.submit(set(j))
	}
	s.after(time.Second, func() { ask(0) })
	s.run()
	return makespan, longest, s.evaluated
}

// TestAheadPays: requests that go ahead of a batch with a long prefix, and evict that from the only
// slot, may not do so at any cost.
func TestAheadPays(t *testing.T) {
	for _, prefix := range []int{500, 2000, 8000} {
		for _, think := range []time.Duration{500 * time.Millisecond, 2 * time.Second, 10 * time.Second, 30 * time.Second} {
			plain, _, few := beside(t, prefix, think, false)
			makespan, longest, many := beside(t, prefix, think, true)
			t.Logf("prefix %d, asked every %v: the batch takes %v (%v without flows), %d tokens (%d); the longest wait beside it is %v", prefix, think, makespan, plain, many, few, longest)
			if makespan > plain*3/2 {
				t.Errorf("prefix %d, asked every %v: the batch takes %v, without flows %v", prefix, think, makespan, plain)
			}
		}
	}
}

// TestCrowd: a crowd of requests, each under a new name, gets no more than a part of what a client
// with one name gets.
func TestCrowd(t *testing.T) {
	served := func(flows bool) (victim, crowd int) {
		s := newSim(t, engineConfig{slots: 1, load: time.Second, perToken: time.Millisecond, decode: 10 * time.Millisecond}, New(Config{Lanes: 1}))
		end := start.Add(20 * time.Minute)
		n := uint64(0)
		var ask func(client string, count *int)
		ask = func(client string, count *int) {
			if n++; s.now.After(end) {
				return
			}
			j := &job{segs: []seg{{id: 5, tokens: 100}, {id: 1000 + n, tokens: 100}}, gen: 20, client: client, program: 1, flow: 1}
			if client == "crowd" {
				j.program = 1000 + n
			}
			if !flows {
				off([]*job{j})
			}
			j.done = func() {
				*count++
				s.after(5*time.Millisecond, func() { ask(client, count) })
			}
			s.submit(j)
		}
		ask("victim", &victim)
		for range 30 {
			ask("crowd", &crowd)
		}
		s.run()
		return victim, crowd
	}
	plain, _ := served(false)
	victim, crowd := served(true)
	t.Logf("served %d, and %d of the crowd; without flows %d", victim, crowd, plain)
	if victim*2 < plain {
		t.Errorf("served %d requests, without flows %d", victim, plain)
	}
}

// TestEarlyPerson: a person goes first even if nothing of a batch has been answered yet, and even
// after asking for a minute before the batch came.
func TestEarlyPerson(t *testing.T) {
	for _, history := range []int{0, 4} {
		s := newSim(t, engineConfig{slots: 1, load: time.Second, perToken: time.Millisecond, decode: 10 * time.Millisecond}, New(Config{Lanes: 1}))
		chat := func(n int) *job {
			j := &job{segs: []seg{{id: 2, tokens: 100}, {id: uint64(100 + n), tokens: 50}}, gen: 250, client: "c", program: 2, flow: 2}
			s.submit(j)
			return j
		}
		for i := range history {
			s.after(time.Duration(i)*15*time.Second, func() { chat(i) })
		}
		var asked *job
		s.after(time.Minute, func() {
			for i := range 300 {
				s.submit(&job{segs: []seg{{id: 1, tokens: 500}, {id: uint64(1000 + i), tokens: 50}}, gen: 50, client: "c", program: 1, flow: 1})
			}
			s.after(500*time.Millisecond, func() { asked = chat(99) })
		})
		s.run()
		if took := asked.end.Sub(asked.came); took > 6*time.Second {
			t.Errorf("after %d chats: it took %v", history, took)
		}
	}
}

// TestOnePage: five people share a page that sends no names, beside another program's script: none
// of them waits for the whole script.
func TestOnePage(t *testing.T) {
	for _, people := range []int{5, 20} {
		s := newSim(t, engineConfig{slots: 1, load: time.Second, perToken: time.Millisecond, decode: 10 * time.Millisecond}, New(Config{Lanes: 1}))
		for i := range 400 {
			s.submit(&job{segs: []seg{{id: 1, tokens: 500}, {id: uint64(1000 + i), tokens: 50}}, gen: 80, client: "script", program: 1, flow: 1})
		}
		var took []time.Duration
		for p := range people {
			for n := range 5 {
				s.after(time.Duration(p)*time.Second+time.Duration(n+1)*time.Minute, func() {
					j := &job{segs: []seg{{id: 2, tokens: 100}, {id: uint64(100*(p+1) + n), tokens: 50}}, gen: 80, client: "page", program: 2, flow: uint64(2 + p)}
					j.done = func() { took = append(took, j.end.Sub(j.came)) }
					s.submit(j)
				})
			}
		}
		s.run()
		slices.Sort(took)
		p95, longest := took[len(took)*95/100], took[len(took)-1]
		t.Logf("%d people: p95 %v, longest %v", people, p95, longest)
		if longest > 2*time.Minute {
			t.Errorf("%d people: p95 %v, longest %v", people, p95, longest)
		}
	}
}

// TestAheadOnManyLanes: requests that go ahead may take a third of the time of all lanes together,
// not of one lane. So people who take a fifth of it wait for at most one running request, since
// they share the script's prefix, and nothing is evicted for them.
func TestAheadOnManyLanes(t *testing.T) {
	for _, slots := range []int{1, 4} {
		cfg := engineConfig{slots: slots, load: time.Second, perToken: time.Millisecond, decode: 10 * time.Millisecond}
		s := newSim(t, cfg, New(Config{Lanes: slots}))
		segs := func(i int) []seg { return []seg{{id: 1, tokens: 500}, {id: uint64(1000 + i), tokens: 20}} }
		const gen = 100 // a second
		for i := range 400 * slots {
			s.submit(&job{segs: segs(i), gen: gen, client: "c", program: 1, flow: 1})
		}
		var waits []time.Duration
		every := 5 * time.Second / time.Duration(slots)
		for i := range 50 * slots {
			s.after(10*time.Second+time.Duration(i)*every, func() {
				person := uint64(2 + i%20)
				j := &job{segs: segs(10_000 + i), gen: gen, client: "c", program: person, flow: 1}
				j.done = func() { waits = append(waits, j.sent.Sub(j.came)) }
				s.submit(j)
			})
		}
		s.run()
		slices.Sort(waits)
		p95 := waits[len(waits)*95/100]
		t.Logf("%d slots: %d waited for %v (median), %v (p95)", slots, len(waits), waits[len(waits)/2], p95)
		if running := s.cfg.perToken*time.Duration(20*slots) + s.cfg.decode*gen; p95 > running {
			t.Errorf("%d slots: p95 of the waits is %v, a request takes %v", slots, p95, running)
		}
	}
}
