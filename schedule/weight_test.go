package schedule

import (
	"cmp"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestWeight: clients that all have a backlog are served in proportion to their weights; a missing
// weight and zero count as one.
func TestWeight(t *testing.T) {
	for _, weights := range [][2]float64{{1, 1}, {0, 0.5}, {1, 0.25}, {0.5, 1}, {0.05, 1}} {
		d := newDesk(t, Config{Lanes: 1})
		client := map[uint64]int{}
		for range 400 {
			for c, w := range weights {
				r := by(fmt.Sprint(c), Normal, request("m", seg{id: 5000 + d.id, tokens: 1000}))
				r.Weight = w
				client[d.add(r)] = c
			}
		}
		var served [2]float64
		for range 300 {
			g := d.q.Grants()
			for len(g) == 0 { // the lane is held for a moment
				d.wake()
				g = d.q.Grants()
			}
			id := g[0].ID
			served[client[id]]++
			d.done(id, evaluated(1000, 1000), time.Second)
		}
		want := weights[1] / cmp.Or(weights[0], 1)
		if got := served[1] / served[0]; got < 0.75*want || got > 1.3*want {
			t.Errorf(
				"weights %v: served %v, in a ratio of %.2f, want %.2f",
				weights,
				served,
				got,
				want,
			)
		}
	}
}

// TestMayWait: MayWait is called only for a request that has to wait; if it returns false, the
// request is not queued.
func TestMayWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		asked, may := 0, false
		r := request("m", seg{id: 1, tokens: 500})
		r.MayWait = func() bool { asked++; return may }
		first, err := s.Acquire(t.Context(), r)
		if err != nil || asked != 0 {
			t.Fatalf("with a free lane: %v, asked %d times", err, asked)
		}
		if _, err := s.Acquire(t.Context(), r); !errors.Is(err, ErrMayNotWait) || asked != 1 {
			t.Errorf("%v, asked %d times", err, asked)
		}
		may = true
		second := acquire(t.Context(), s, r)
		if st := s.Stats(); asked != 2 || st.Waiting[Normal].Requests != 1 || len(s.waiters) != 1 {
			t.Errorf("asked %d times, %+v", asked, st)
		}
		first.Release(served)
		g := <-second
		g.Release(served)
		if st := s.Stats(); st.Waiting[Normal].Requests != 0 || st.Runners[0].Busy != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestMayNotWaitTakesNoPlace: in a full queue, a request that may not wait takes no other request's
// place, and one that may wait does.
func TestMayNotWaitTakesNoPlace(t *testing.T) {
	const limit = 20
	for _, may := range []bool{false, true} {
		q := crowdedQueue(limit, script)
		asked := 0
		r, now := from(Request{Client: "other", Program: 1, Flow: 1}, limit+1, start.Add(time.Second))
		r.MayWait = func() bool { asked++; return may }
		if q.Add(r, now) != may || asked != 1 || q.Len() != limit || len(q.items) != limit+1 {
			t.Errorf("may wait %v: asked %d times, %d wait of %d", may, asked, q.Len(), len(q.items))
		}
		if no := q.Refusals(); len(no) > 0 != may {
			t.Errorf("may wait %v: refused was %v", may, no)
		}
	}
}
