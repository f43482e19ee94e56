package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestLearnsCheaply: learning the number of slots costs few tokens and little time, for any number
// and for all kinds of answers.
func TestLearnsCheaply(t *testing.T) {
	const (
		native     = iota // a stream of /api
		compatible        // … of /v1: it shows only when it began
		whole             // an answer of /api in one piece
		untold            // … of /v1: it shows next to nothing
		kinds
	)
	type bounds [kinds]float64
	open := func(jobs []*job) func(*sim) { return func(s *sim) { burst(s, jobs) } }
	closed := func(jobs []*job) func(*sim) {
		return func(s *sim) {
			each := len(jobs) / 8
			for c := range 8 {
				s.closed(jobs[c*each:(c+1)*each], 3*time.Millisecond)
			}
		}
	}
	for _, w := range []struct {
		name string
		load time.Duration
		work func() func(*sim)
		// Limits by kind of answer: the extra evaluated tokens compared with a given number, as a
		// fraction of the least possible; and the time relative to direct requests.
		extra bounds
		wall  bounds
	}{
		{
			"32 prefixes x 4", 0, func() func(*sim) { return open(groups(32, 4, 1000, 40, 16, 7)) },
			bounds{0.055, 0.105, 0.13, 0.16}, bounds{0.45, 0.45, 0.45, 0.45},
		},
		{
			"32 prefixes x 4, loaded", time.Second, func() func(*sim) { return open(groups(32, 4, 1000, 40, 16, 7)) },
			bounds{0.055, 0.105, 0.13, 0.16}, bounds{0.45, 0.45, 0.45, 0.45},
		},
		{
			"500 batch", 0, func() func(*sim) { return open(groups(25, 20, 600, 30, 8, 3)) },
			bounds{0.06, 0.16, 0.06, 0.34}, bounds{0.25, 0.25, 0.25, 0.25},
		},
		{
			"scripts", 0, func() func(*sim) { return func(s *sim) { scripts(s, 4, 40) } },
			bounds{0.08, 0.3, 0.23, 0.37}, bounds{1.05, 1.2, 1.01, 1.6},
		},
		{
			"scripts, loaded", time.Second, func() func(*sim) { return func(s *sim) { scripts(s, 4, 40) } },
			bounds{0.08, 0.3, 0.23, 0.37}, bounds{1.05, 1.2, 1.01, 1.6},
		},
		{
			"chats, loaded", time.Second, func() func(*sim) { return chats },
			bounds{0.05, 0.45, 0.08, 0.55}, bounds{1.15, 1.4, 1.01, 1.1},
		},
		{
			"one prefix", 0, func() func(*sim) { return closed(groups(1, 160, 1000, 40, 50, 3)) },
			bounds{0.01, 0.01, 0.01, 0.01}, bounds{1.03, 1.07, 1.07, 1.07},
		},
		{
			"short prompts, long answers", 0, func() func(*sim) { return closed(groups(160, 1, 60, 10, 96, 5)) },
			bounds{0.01, 0.01, 0.01, 0.01}, bounds{1.03, 1.05, 1.06, 1.06},
		},
	} {
		for _, slots := range []int{1, 2, 4} {
			for tells := range kinds {
				name := fmt.Sprintf("%s, %d slots, answers %d", w.name, slots, tells)
				cfg := engineConfig{slots: slots, load: w.load, mute: tells >= whole}
				cfg.silent = tells == compatible || tells == untold
				run := func(q *Queue) (ratio float64, wall time.Duration) {
					ids = 0 // the same prompts
					s := newSim(t, cfg, q)
					w.work()(s)
					wall = s.run()
					return float64(s.evaluated) / float64(s.least), wall
				}
				_, direct := run(nil)
				given, _ := run(New(Config{Lanes: slots}))
				q := New(Config{})
				auto, wall := run(q)
				found := q.servers[0].runners[0].want
				t.Logf("%-45s evaluated: given %.3f auto %.3f; auto takes %.2f of direct, and has %d lanes", name, given, auto, float64(wall)/float64(direct), found)
				if auto > given+w.extra[tells] {
					t.Errorf("%s: %.3f times the least possible, and %.3f if the number is given", name, auto, given)
				}
				if float64(wall) > w.wall[tells]*float64(direct) {
					t.Errorf("%s: %v, directly %v", name, wall, direct)
				}
				if (tells == native || tells == whole) && found != slots {
					t.Errorf("%s: %d lanes", name, found)
				}
			}
		}
	}
}

// TestSlotsChange: a server that is restarted with a different number of slots has the right lanes
// after as many requests, however long it had run before.
func TestSlotsChange(t *testing.T) {
	for _, slots := range [][2]int{{4, 1}, {4, 2}, {1, 4}, {2, 4}} {
		for _, before := range []int{300, 3000} {
			slotsChange(t, slots, before)
		}
	}
}

// TestOutsider: slots that were held by a client outside the proxy are found within minutes,
// however long that lasted.
func TestOutsider(t *testing.T) {
	for _, before := range []int{8000, 30_000} {
		s := newSim(t, engineConfig{slots: 1, load: time.Second, perToken: time.Millisecond, decode: 10 * time.Millisecond}, New(Config{Limit: before}))
		work := func(n int) []*job { return groups(n/20, 20, 300, 30, 10, 9) }
		burst(s, work(before))
		s.run()
		x := s.q.servers[0].runners[0]
		if x.want != 1 {
			t.Errorf("%d lanes while the others are taken", x.want)
		}
		s.cfg.slots, s.boxes[0].loaded = 4, nil // the queue is not informed
		began, n := s.now, 0
		var found time.Duration
		s.onDone = func(*job) {
			if n++; found == 0 && x.want == 4 {
				found = s.now.Sub(began)
			}
		}
		burst(s, work(8000))
		s.run()
		t.Logf("after %d requests: found within %v", before, found)
		if found == 0 || found > 5*time.Minute {
			t.Errorf("after %d requests: 4 slots were found within %v; %d lanes at the end", before, found, x.want)
		}
	}
}

func slotsChange(t *testing.T, slots [2]int, before int) {
	s := newSim(t, engineConfig{slots: slots[0], load: time.Second}, New(Config{}))
	burst(s, groups(before/20, 20, 300, 30, 10, 9))
	s.run()
	x := s.q.servers[0].runners[0]
	if x.want != slots[0] {
		t.Errorf("%v: %d lanes at first", slots, x.want)
	}
	s.cfg.slots = slots[1]
	s.boxes[0].loaded = nil
	s.q.Cool(0, "", s.now)
	burst(s, groups(15, 20, 300, 30, 10, 9))
	n, found := 0, 0
	s.onDone = func(*job) {
		if n++; found == 0 && x.want == slots[1] {
			found = n
		}
	}
	s.run()
	t.Logf("%v, %d before: found after %d requests", slots, before, found)
	most := 300
	if slots[1] < slots[0] {
		most = 20
	}
	if found == 0 || found > most || x.want != slots[1] {
		t.Errorf("%v: found after %d requests, %d lanes at the end", slots, found, x.want)
	}
}

// waited is the result of a request that waited inside Ollama.
func waited(d time.Duration) Result {
	r := evaluated(1064, 1064)
	r.Queue = d
	return r
}

// TestTry: one request is granted beyond the lanes, and no other until its outcome is known.
func TestTry(t *testing.T) {
	for _, w := range []struct {
		name  string
		first bool // the request that was tried ends first
		other Result
		lanes int
		more  int // granted after that
	}{
		{"it waited", false, waited(time.Second), 1, 1},
		{"it did not", false, waited(10 * time.Millisecond), 2, 2},
		{"it ended first", true, served, 2, 1},
		{"its client left", false, Result{Sent: true}, 1, 1},
		{"it was not sent", false, Result{}, 1, 1},
		{"it tells nothing", false, served, 1, 1},
	} {
		t.Run(w.name, func(t *testing.T) {
			d := newDesk(t, Config{})
			d.q.habits = returns{missed: 100} // no client returns
			first := d.add(by("a", Normal, with(alpha)))
			d.granted(first)
			d.done(first, evaluated(1064, 1064), time.Second)
			first = d.add(by("b", Normal, with(alpha)))
			d.granted(first)
			for i := range 4 {
				d.add(request("m", seg{id: uint64(50 + i), tokens: 1000}))
			}
			d.granted()
			if wait := d.wake(); wait != leastLead {
				t.Errorf("one is tried after %v", wait)
			}
			tried := d.q.Grants()
			if len(tried) != 1 {
				t.Fatalf("granted %+v", tried)
			}
			id := tried[0].ID
			if !w.first {
				d.done(first, evaluated(1064, 64), time.Second-leastLead)
				d.granted() // this may be the only slot
			}
			d.done(id, w.other, 900*time.Millisecond)
			x := d.q.servers[0].runners[0]
			if got := len(d.q.Grants()); x.want != w.lanes || got != w.more {
				t.Errorf("%d lanes, %d granted; want %d and %d", x.want, got, w.lanes, w.more)
			}
		})
	}
}

// TestTryKeepsWhatIsWarm: if the tried request got another slot, the first one's prompt is known to
// be warm still; if not, it is known to be gone.
func TestTryKeepsWhatIsWarm(t *testing.T) {
	for _, w := range []struct {
		other    Result
		expected int
	}{{waited(time.Second), 0}, {waited(10 * time.Millisecond), 1000}} {
		d := newDesk(t, Config{})
		first := d.add(with(alpha))
		d.granted(first)
		d.done(first, evaluated(1064, 1064), time.Second)
		first = d.add(with(alpha))
		d.granted(first)
		tried := d.add(with(beta))
		d.wake()
		d.granted(tried)
		d.done(first, evaluated(1064, 64), time.Second-leastLead)
		d.done(tried, w.other, time.Second)
		again := d.add(with(alpha))
		if got := d.granted(again)[0].Expected; got > w.expected || got < w.expected-64 {
			t.Errorf("%d tokens are expected, want about %d", got, w.expected)
		}
	}
}

// TestTurnedAbout: while a model is being loaded, requests may reach a slot in a different order
// than they were sent. So if the later one ends first, that does not prove two slots; whether the
// other one waited does.
func TestTurnedAbout(t *testing.T) {
	for _, w := range []struct {
		queue time.Duration
		lanes int
	}{{time.Second, 1}, {10 * time.Millisecond, 2}} {
		d := newDesk(t, Config{})
		first := d.add(with(alpha))
		d.granted(first)
		tried := d.add(with(beta))
		d.wake()
		d.granted(tried)
		d.add(with(seg{id: 3, tokens: 1000}))
		loaded := evaluated(1064, 1064)
		loaded.Load, loaded.Loaded = 2*time.Second, true
		d.done(tried, loaded, 3*time.Second)
		d.granted()
		r := waited(w.queue)
		r.Load = 2 * time.Second
		d.done(first, r, time.Second)
		if x := d.q.servers[0].runners[0]; x.want != w.lanes || x.learner.ceiling != (w.lanes == 1) {
			t.Errorf("%d lanes after the first one waited for %v", x.want, w.queue)
		}
	}
}

// TestTryAgain: once no further slot was found, one more is tried after a pause, and for a long
// time only if it costs nothing should it have to wait.
func TestTryAgain(t *testing.T) {
	for _, w := range []struct {
		name    string
		seen    int
		since   time.Duration
		sibling bool // a waiting request would find its prefix in the slot
		tried   bool
	}{
		{"in the pause", firstPause - 1, 0, false, false},
		{"after it", firstPause, 0, false, true},
		{"after it, and it costs a prefix", firstPause, 0, true, false},
		{"much later", patient * firstPause, 0, true, true},
		{"before a minute", firstPause, longestPause - time.Second, false, false},
		{"after a minute", firstPause, longestPause, false, true},
		{"after a minute, and it costs a prefix", firstPause, longestPause, true, false},
		{"after five minutes", patient * firstPause, patientTime * longestPause, true, true},
		{"after five minutes with few requests", firstPause - 1, patientTime * longestPause, false, false},
	} {
		d := newDesk(t, Config{})
		d.q.habits = returns{missed: 100} // no client returns
		first := d.add(with(alpha))
		d.granted(first)
		a, pause := &d.q.servers[0].runners[0].learner, firstPause
		if w.since > 0 {
			pause = lastPause
		}
		a.ceiling, a.pause, a.seen, a.since = true, pause, w.seen, d.now.Add(-w.since)
		d.add(with(beta))
		if w.sibling {
			d.add(with(alpha))
		}
		d.now = d.now.Add(leastLead)
		d.q.Tick(d.now)
		if got := len(d.q.Grants()) == 1; got != w.tried {
			t.Errorf("%s: tried: %v", w.name, got)
		}
	}
}

// TestPause: the pause doubles each time a further slot is not found, up to a limit, and starts
// over when one is.
func TestPause(t *testing.T) {
	x := &runner{want: 1}
	tries := func(queue time.Duration) {
		it := &item{tries: true, beside: x.want + 1, granted: start, overtaken: start.Add(time.Second)}
		x.want = x.learn(it, Result{Answered: true, Timed: true, Queue: queue}, start.Add(2*time.Second))
	}
	for want := firstPause; want <= 4*lastPause; want *= 2 {
		if tries(time.Second); x.want != 1 || x.learner.pause != min(want, lastPause) {
			t.Fatalf("%d lanes and a pause of %d requests, want %d", x.want, x.learner.pause, want)
		}
	}
	tries(0)
	tries(time.Second)
	if x.want != 2 || x.learner.pause != firstPause {
		t.Errorf("%d lanes and a pause of %d requests", x.want, x.learner.pause)
	}
}

// TestJudge: what an answer reveals about a wait inside Ollama.
func TestJudge(t *testing.T) {
	const ms = time.Millisecond
	a := learner{fastest: 10.0 / float64(time.Second)}
	a.idle.add(float64(2 * ms))
	for _, w := range []struct {
		name string
		gap  time.Duration // from the grant to the end of another request; 0 if none ended
		took time.Duration
		r    Result
		want verdict
	}{
		{"it ended first", 0, 100 * ms, Result{}, no},
		{"it waited for the other one's end", 100 * ms, 150 * ms, Result{Timed: true, Queue: 101 * ms, Prompt: 20 * ms, Eval: 20 * ms}, yes},
		{"it waited, and was long itself", 100 * ms, time.Second, Result{Timed: true, Queue: 101 * ms, Prompt: 20 * ms, Eval: 900 * ms}, yes},
		{"it waited, and the model was loaded first", 600 * ms, 650 * ms, Result{Timed: true, Load: 500 * ms, Queue: 101 * ms, Eval: 50 * ms}, yes},
		{"it began at once", 100 * ms, 150 * ms, Result{Timed: true, Queue: 3 * ms, Eval: 140 * ms}, no},
		{"it began at once when the model was loaded", 600 * ms, 650 * ms, Result{Timed: true, Load: 500 * ms, Queue: 5 * ms, Eval: 140 * ms}, no},
		{"it waited for the engine", 100 * ms, 300 * ms, Result{Timed: true, Queue: 40 * ms, Eval: 140 * ms}, no},
		{"the engine was busy for longer", 100 * ms, 900 * ms, Result{Timed: true, Queue: 200 * ms, Eval: 700 * ms}, unknown},
		{"there was no time to wait", 5 * ms, 50 * ms, Result{Timed: true, Queue: 7 * ms, Eval: 40 * ms}, unknown},
		{"it tells nothing", 100 * ms, 200 * ms, Result{}, maybe},
		{"it was faster than any if it waited", time.Second, 1500 * ms, Result{Generated: 10}, no},
		{"as fast as others if it waited", time.Second, 2 * time.Second, Result{Generated: 10}, yes},
		{"… but not for long", time.Second / 2, 3 * time.Second / 2, Result{Generated: 10}, likely},
		{"… or for no time to speak of", time.Second / 15, time.Second, Result{Generated: 10}, unknown},
		{"too short to tell", time.Second, 1010 * ms, Result{Generated: leastAnswer - 1}, maybe},
	} {
		it := &item{granted: start}
		if w.gap > 0 {
			it.overtaken = start.Add(w.gap)
		}
		if got := a.judge(it, w.r, start.Add(w.took)); got != w.want {
			t.Errorf("%s: %d, want %d", w.name, got, w.want)
		}
	}
}

// TestTooMany: if lanes should hold something and slots do not, there are too many lanes, even if
// answers have no times.
func TestTooMany(t *testing.T) {
	for _, timed := range []bool{true, false} {
		x := &runner{want: 2}
		cold := Result{Answered: true, Total: 1000, Reused: 10, ReusedKnown: true, Timed: timed}
		warm := cold
		warm.Reused = 990
		learn := func(lanes int, r Result) {
			it := &item{beside: lanes, tokens: 1000, expected: 900, granted: start, overtaken: start.Add(time.Second)}
			x.want = x.learn(it, r, start.Add(2*time.Second))
		}
		learn(2, warm)
		if x.want != 2 {
			t.Errorf("timed %v: %d lanes although their prompts are found", timed, x.want)
		}
		learn(2, cold)
		learn(2, cold)
		if x.want != 1 {
			t.Errorf("timed %v: %d lanes although their prompts are not found", timed, x.want)
		}
		x.want, x.learner = 4, learner{}
		for range 20 { // one may have landed elsewhere
			learn(4, cold)
			learn(4, warm)
		}
		if x.want != 4 {
			t.Errorf("timed %v: %d lanes although one of two prompts is found", timed, x.want)
		}
	}
}

// TestStuck: while lanes are being learned, requests that take minutes never block all others,
// however many there are. They do if lanes are given, or once it is known that there are no more.
func TestStuck(t *testing.T) {
	for _, w := range []struct {
		name    string
		cfg     Config
		ceiling bool
		service time.Duration // of an earlier request; 0 if there was none
		next    time.Duration // when one more is tried; 0 means never
	}{
		{"the model is being loaded", Config{}, false, 0, leastStuck + agedQuantum*firstLoad},
		{"short requests", Config{}, false, 100 * time.Millisecond, leastStuck},
		{"long requests", Config{}, false, 20 * time.Second, 40 * time.Second},
		{"ceiling", Config{}, true, 0, 0},
		{"given", Config{Lanes: 1}, false, 0, 0},
	} {
		t.Run(w.name, func(t *testing.T) {
			d := newDesk(t, w.cfg)
			if w.service > 0 {
				id := d.add(with(alpha))
				d.granted(id)
				d.done(id, served, w.service)
			}
			long := d.add(with(alpha))
			d.granted(long)
			d.q.servers[0].runners[0].learner = learner{ceiling: w.ceiling, pause: firstPause}
			for i := range uint64(4) {
				d.add(request("m", seg{id: 50 + i, tokens: 500}))
			}
			d.granted()
			if w.next == 0 {
				if at, ok := d.q.Next(); ok {
					t.Errorf("looks again after %v", at.Sub(d.now))
				}
				return
			}
			for n := range 4 { // one at a time
				want := w.next
				if n == 0 {
					want = leastLead
				}
				if wait := d.wake(); wait != want || len(d.q.Grants()) != 1 {
					t.Fatalf("number %d comes after %v, want %v", n, wait, want)
				}
			}
			if x := d.q.servers[0].runners[0]; d.q.Len() != 0 || x.want != 1 {
				t.Errorf("%d still wait, for %d lanes", d.q.Len(), x.want)
			}
		})
	}
}

func scripts(s *sim, n, each int) {
	for c := range n {
		p := text(1000)
		var jobs []*job
		for range each {
			jobs = append(jobs, &job{segs: []seg{p, text(60)}, gen: 16, client: fmt.Sprint("script", c)})
		}
		s.after(time.Duration(c)*time.Millisecond, func() { s.closed(jobs, 5*time.Millisecond) })
	}
}

func chats(s *sim) {
	system := text(500)
	for c := range 4 {
		jobs := conversation(system, c)
		s.after(time.Duration(c)*time.Millisecond, func() { s.chat(jobs, 5*time.Millisecond) })
	}
}

// TestBegan: a stream's first byte shows whether it has its own slot, and so does the lack of one.
func TestBegan(t *testing.T) {
	const ms = time.Millisecond
	// prepare grants two streams, of which the first has begun after a second, while two more wait.
	prepare := func(t *testing.T) (d *desk, x *runner, first, second uint64) {
		d = newDesk(t, Config{})
		d.q.habits = returns{missed: 100} // no client returns
		first = d.add(with(alpha))
		d.granted(first)
		d.now = d.now.Add(time.Second)
		d.q.Began(first, d.now)
		second = d.add(with(beta))
		d.granted(second)
		d.add(request("m", seg{id: 50, tokens: 1000}))
		d.add(request("m", seg{id: 51, tokens: 1000}))
		return d, d.q.servers[0].runners[0], first, second
	}
	t.Run("both run", func(t *testing.T) {
		d, x, _, second := prepare(t)
		d.now = d.now.Add(time.Second)
		d.q.Began(second, d.now)
		d.q.Began(second, d.now) // nothing new
		if got := len(d.q.Grants()); x.want != 2 || x.tries != 1 || got != 1 {
			t.Errorf("%d lanes, %d granted then, %d tried, want one", x.want, got, x.tries)
		}
	})
	t.Run("it is late", func(t *testing.T) {
		d, x, _, second := prepare(t)
		if wait := d.wake(); wait < 2*time.Second || wait > 3*time.Second || !x.learner.ceiling || x.want != 1 {
			t.Errorf("after %v: ceiling %v", wait, x.learner.ceiling)
		}
		d.q.Began(second, d.now.Add(ms)) // it arrives after all
		if x.learner.ceiling || x.want != 2 {
			t.Errorf("%d lanes, ceiling %v", x.want, x.learner.ceiling)
		}
	})
	t.Run("it waited for the other one's end", func(t *testing.T) {
		d, x, first, second := prepare(t)
		d.now = d.now.Add(2100 * ms)
		d.done(first, served, 0)
		d.now = d.now.Add(time.Second)
		d.q.Began(second, d.now)
		if x.want != 1 || !x.learner.ceiling {
			t.Errorf("%d lanes, ceiling %v", x.want, x.learner.ceiling)
		}
	})
	t.Run("it began soon after the other one's end", func(t *testing.T) {
		d, x, first, second := prepare(t)
		d.done(first, served, 100*ms)
		d.q.Began(second, d.now.Add(900*ms))
		if x.want != 1 || x.learner.ceiling {
			t.Errorf("%d lanes, ceiling %v, but nothing is known", x.want, x.learner.ceiling)
		}
	})
	t.Run("not the one that is beside a whole answer in a load", func(t *testing.T) {
		for _, loading := range []bool{true, false} {
			d := newDesk(t, Config{})
			before := d.add(with(alpha))
			d.granted(before)
			if !loading {
				d.done(before, served, time.Second)
				whole := with(alpha)
				whole.Streams = false
				d.granted(d.add(whole))
			} else {
				d.q.items[before].streams = false
			}
			second := d.add(with(beta))
			d.now = d.now.Add(leastGap)
			d.q.Tick(d.now)
			d.granted(second)
			d.q.Began(second, d.now.Add(ms))
			if x := d.q.servers[0].runners[0]; (x.want == 2) == loading {
				t.Errorf("while it is loaded %v: %d lanes", loading, x.want)
			}
		}
	})
}

// TestBlind: answers in one piece reveal nothing at first, so more requests are tried at once, but
// only until something is known.
func TestBlind(t *testing.T) {
	for _, known := range []bool{false, true} {
		d := newDesk(t, Config{})
		if known {
			d.q.server(0).found = 1
		}
		for i := range uint64(8) {
			r := request("m", seg{id: 50 + i, tokens: 1000})
			r.Streams = false
			d.add(r)
		}
		for range 20 * leastLead / time.Millisecond {
			d.now = d.now.Add(time.Millisecond)
			d.q.Tick(d.now)
		}
		want := 1 + blind
		if known {
			want = 2
		}
		if got := len(d.q.Grants()); got != want {
			t.Errorf("known %v: %d are sent at once, want %d", known, got, want)
		}
	}
}

// TestExpected: a stated number of slots is believed at first, and corrected if it is wrong.
func TestExpected(t *testing.T) {
	d := newDesk(t, Config{})
	d.q.SetExpected(0, 4, d.now)
	for i := range uint64(6) {
		d.add(request("m", seg{id: 50 + i, tokens: 1000}))
	}
	if got := len(d.q.Grants()); got != 4 {
		t.Errorf("%d are sent at once, want 4", got)
	}
	for _, w := range []struct{ said, slots int }{
		{4, 4}, {8, 8}, {4, 1}, {4, 2}, {8, 4}, {1, 4}, {2, 8},
	} {
		for kind := range 4 {
			mute, length := kind%2 == 1, 40+kind/2*400
			q := New(Config{})
			q.SetExpected(0, w.said, start)
			s := newSim(t, engineConfig{slots: w.slots, load: time.Second, mute: mute}, q)
			burst(s, groups(20, 20, 300, 30, length, 9))
			right, n := 0, 0
			s.onDone = func(*job) {
				if n++; q.servers[0].runners[0].want != w.slots {
					right = n
				}
			}
			s.run()
			t.Logf("%+v, whole answers %v, %d tokens: right after %d of 400 requests", w, mute, length, right)
			if w.said == w.slots && right > 0 || right > 60 {
				t.Errorf("%+v, whole answers %v: right after %d requests only", w, mute, right)
			}
		}
	}
}

// TestTurn: a request that waited while others were evaluated does not prove that there are too
// many lanes.
func TestTurn(t *testing.T) {
	for _, w := range []struct {
		turn  time.Duration
		lanes int
	}{{0, 1}, {time.Second, 2}} {
		x := &runner{want: 2}
		for range 4 {
			it := &item{beside: 2, granted: start, overtaken: start.Add(time.Second), turn: w.turn}
			r := Result{Answered: true, Timed: true, Queue: time.Second}
			x.want = x.learn(it, r, start.Add(2*time.Second))
		}
		if x.want != w.lanes {
			t.Errorf("%d lanes although others were evaluated for %v, want %d", x.want, w.turn, w.lanes)
		}
	}
	x := &runner{learner: learner{pace: float64(time.Millisecond)}}
	for i, it := range []*item{
		nil, {tokens: 100, streams: true, expected: 40}, {tokens: 100},
		{tokens: 100, streams: true, begun: start},
	} {
		x.lanes = append(x.lanes, &lane{name: i, item: it})
	}
	it := &item{tokens: 1000}
	if got := x.before(it, start); got != 60*time.Millisecond {
		t.Errorf("streams that have not begun take %v, want 60ms", got)
	}
	x.lanes = nil
	later := start.Add(200 * time.Millisecond)
	if got := x.before(it, later); got != 1000*firstPrompt-200*time.Millisecond {
		t.Errorf("the one before takes %v", got)
	}
}

// TestSlotsTold: if an engine reports its number of slots, nothing is learned for its model, and
// only the operator's number overrides it.
func TestSlotsTold(t *testing.T) {
	for _, lanes := range []int{0, 2} {
		d := newDesk(t, Config{Lanes: lanes})
		d.q.SetSlots(0, "m", Slots{Count: 4}, d.now)
		for range 6 {
			d.add(with(seg{id: tails + 1000, tokens: 1000}))
		}
		want := cmp.Or(lanes, 4)
		granted := len(slices.Clone(d.q.Grants()))
		if stats := d.q.Stats(d.now).Runners[0]; granted != want || stats.Learned {
			t.Errorf("with --slots %d: %d of 6 granted, learned %v; want %d, told", lanes, granted, stats.Learned, want)
		}
		d.q.SetSlots(0, "m", Slots{Count: 1}, d.now)
		for i := range granted {
			d.done(uint64(i+1), evaluated(1064, 1064), time.Second)
		}
		if n := d.q.Stats(d.now).Runners[0].Lanes; n != cmp.Or(lanes, 1) {
			t.Errorf("with --slots %d: %d lanes after the model was loaded with 1 slot", lanes, n)
		}
	}
}

// TestSlotsAwaited: while engines are expected to report their slots, no trial begins until the
// first of them could have, and trials begin if none does.
func TestSlotsAwaited(t *testing.T) {
	for _, tells := range []bool{false, true} {
		d := newDesk(t, Config{})
		if tells {
			d.q.SetTells(0)
		}
		for range 4 {
			d.add(with(seg{id: tails + 1000, tokens: 1000}))
		}
		d.granted(1)
		for len(d.q.Grants()) == 0 {
			d.wake()
		}
		if waited := d.now.Sub(start); tells != (waited >= toldWithin) || waited > 2*toldWithin {
			t.Errorf("expected to tell %v: a second one is tried after %v", tells, waited)
		}
	}
}

// TestSlotsNotTold: if no engine reports its slots, short requests one after the other do not delay
// the trials for ever.
func TestSlotsNotTold(t *testing.T) {
	d := newDesk(t, Config{})
	d.q.SetTells(0)
	for range 4 {
		d.add(with(seg{id: tails + 1000, tokens: 1000}))
	}
	for busy := d.granted(1)[0].ID; d.now.Sub(start) < 3*toldWithin; {
		ends := d.now.Add(time.Second)
		for at, ok := d.q.Next(); ok && at.Before(ends); at, ok = d.q.Next() {
			d.wake()
			if len(d.q.Grants()) > 0 {
				return
			}
		}
		d.done(busy, evaluated(1064, 1064), ends.Sub(d.now))
		next := slices.Clone(d.q.Grants())
		for len(next) == 0 {
			d.wake()
			next = slices.Clone(d.q.Grants())
		}
		if len(next) > 1 {
			return
		}
		busy = next[0].ID
		d.add(with(seg{id: tails + 1000, tokens: 1000}))
	}
	t.Errorf("no second lane was tried within %v", d.now.Sub(start))
}

// TestSlotsCopied: if slots can copy each other's evaluations, one request evaluates a prefix for
// many that wait, and all go on when it has ended. If its answer would take longer than evaluating
// the prefix again, the others do not wait.
func TestSlotsCopied(t *testing.T) {
	for _, w := range []struct {
		copied     bool
		generation time.Duration
		want       int // granted at once
		streams    bool
	}{
		{false, 100 * time.Millisecond, 4, false},
		{true, 100 * time.Millisecond, 1, false},
		{true, time.Minute, 4, false},
		{true, 100 * time.Millisecond, 1, true},
	} {
		d := newDesk(t, Config{})
		d.q.SetSlots(0, "m", Slots{Count: 4, Copied: w.copied}, d.now)
		r := evaluated(1064, 1064)
		r.Eval = w.generation
		d.done(d.add(with(beta)), r, time.Second+w.generation) // shows how fast it is
		d.q.Grants()
		for range 9 {
			tails++
			d.add(request("m", alpha, seg{id: tails, tokens: 600}))
		}
		granted := d.now
		places := slices.Clone(d.q.Grants())
		if w.streams {
			d.q.Began(places[0].ID, d.now) // the length of its answer no longer matters
			d.wake()
			if n := len(d.q.Grants()); n != 3 || d.now.Sub(granted) > 2*time.Second {
				t.Errorf("%+v: %d more are granted %v after the first answer has begun", w, n, d.now.Sub(granted))
			}
			continue
		}
		if len(places) != w.want {
			t.Errorf("%+v: %d of 9 with one prefix are granted at once", w, len(places))
		}
		for _, p := range places {
			d.done(p.ID, r, time.Second)
		}
		for range 3 { // some wait for others to arrive first
			if _, ok := d.q.Next(); ok && len(d.q.grants) < 4 {
				d.wake()
			}
		}
		if n := len(d.q.Grants()); n != 4 {
			t.Errorf("%+v: %d go on when the prefix is evaluated, on 4 slots", w, n)
		}
	}
}
