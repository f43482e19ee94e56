package schedule

import (
	"testing"
	"time"
)

// TestUntoldLanes: where answers tell nothing of time, requests are not sent one at a time for ever; and if some tell that
// there is one slot, there is one lane.
func TestUntoldLanes(t *testing.T) {
	var a learner
	lanes := 1
	for i := range 3 * untoldMost {
		lanes = a.learn(&item{full: lanes}, Result{Answered: true}, lanes, true)
		if want := 1; i+1 < untoldMost && lanes != want || i+1 >= untoldMost && lanes != untoldLanes {
			t.Fatalf("%d lanes after %d answers that tell nothing", lanes, i+1)
		}
	}
	for range 20 {
		lanes = a.learn(&item{full: lanes}, Result{Answered: true, Timed: true, Queue: 1e9, Prompt: 1e8, Eval: 1e8}, lanes, true)
	}
	if lanes != 1 {
		t.Errorf("%d lanes although requests wait inside", lanes)
	}
}

// TestUntoldThenTold: a few answers that tell do not keep the rest, which tell nothing, at one lane; nor does the rest add
// lanes where the few have told that there is one slot.
func TestUntoldThenTold(t *testing.T) {
	untold := Result{Answered: true}
	waited := Result{Answered: true, Timed: true, Queue: 1e9, Prompt: 1e8, Eval: 1e8}
	alone := Result{Answered: true, Timed: true, Prompt: 1e8, Eval: 1e8}

	var a learner
	lanes := a.learn(&item{full: 1, alone: true}, alone, 1, false)
	for range untoldMost {
		lanes = a.learn(&item{full: lanes}, untold, lanes, true)
	}
	if lanes != untoldLanes {
		t.Errorf("%d lanes after one answer that tells and %d that do not", lanes, untoldMost)
	}

	a, lanes = learner{}, 1
	for range 2 * untoldMost { // every other one tells
		a.learn(&item{full: 9}, alone, 1, true)
		lanes = a.learn(&item{full: 9}, untold, lanes, true)
	}
	if lanes != 1 {
		t.Errorf("%d lanes although answers tell", lanes)
	}

	lanes = 2
	for range 2 {
		lanes = a.learn(&item{full: lanes}, waited, lanes, true)
	}
	for range 4 * untoldMost {
		lanes = a.learn(&item{full: lanes}, untold, lanes, true)
	}
	if lanes != 1 {
		t.Errorf("%d lanes after it was told that there is one slot", lanes)
	}
}

// TestStuck: with lanes that are learned, a request that takes minutes does not hold up all others; with lanes that are given,
// and once it is known that there are no more, it does.
func TestStuck(t *testing.T) {
	for _, w := range []struct {
		name    string
		cfg     Config
		ceiling bool
		service time.Duration // of what was served before; 0: nothing was
		first   time.Duration // when a lane is added; 0: never
	}{
		{"nothing known", Config{}, false, 0, time.Second},
		{"short requests", Config{}, false, 100 * time.Millisecond, time.Second},
		{"long requests", Config{}, false, 20 * time.Second, 20 * time.Second},
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
			d.q.servers[0].runners[0].learner.ceiling = w.ceiling
			d.now = d.now.Add(time.Hour)
			for i := range uint64(3) {
				d.add(request("m", seg{id: 50 + i, tokens: 500}))
			}
			d.granted()
			if w.first == 0 {
				if at, ok := d.q.Next(); ok {
					t.Errorf("looks again after %v", at.Sub(d.now))
				}
				return
			}
			for n := 2; n <= 4; n++ { // one at a time
				if wait := d.wake(); wait != w.first {
					t.Errorf("lane %d comes after %v", n, wait)
				}
				if len(d.q.Grants()) != 1 || d.q.servers[0].runners[0].want != n {
					t.Fatalf("%d lanes", d.q.servers[0].runners[0].want)
				}
			}
			if d.q.Len() != 0 {
				t.Errorf("%d still wait", d.q.Len())
			}
		})
	}
}

// TestStuckUntold: a lane that was added because all were stuck goes again with what was stuck, if no answer has told meanwhile
// whether it was right; lanes would add up otherwise.
func TestStuckUntold(t *testing.T) {
	for _, w := range []struct {
		other Result
		lanes int
	}{{served, 1}, {evaluated(500, 500), 2}} {
		d := newDesk(t, Config{})
		long := d.add(with(alpha))
		d.granted(long)
		other := d.add(request("m", seg{id: 50, tokens: 500}))
		d.wake()
		d.granted(other)
		d.done(other, w.other, time.Second)
		if lanes := d.q.servers[0].runners[0].want; lanes != 2 {
			t.Errorf("%d lanes while a request is stuck", lanes)
		}
		d.done(long, served, time.Minute)
		if lanes := d.q.servers[0].runners[0].want; lanes != w.lanes {
			t.Errorf("%d lanes at the end, want %d", lanes, w.lanes)
		}
	}
}
