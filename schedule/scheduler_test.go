package schedule

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func request(model string, segs ...seg) Request {
	j := &job{model: model, segs: segs}
	runner := Runner{Options: options(model, 0)}
	return Request{Runner: runner, Links: j.links(), Client: "c", Streams: true}
}

var served = Result{Sent: true, Answered: true, Total: 1000, Generated: 10}

// acquire acquires in the background.
func acquire(ctx context.Context, s *Scheduler, r Request) chan *Grant {
	ch := make(chan *Grant, 1)
	go func() {
		g, err := s.Acquire(ctx, r)
		if err != nil {
			close(ch)
			return
		}
		ch <- g
	}()
	synctest.Wait()
	return ch
}

func TestAcquire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1, Limit: 2})
		ctx := t.Context()
		a := <-acquire(ctx, s, request("m", seg{id: 1, tokens: 500}))
		if a.Lane != 0 || a.Waited != 0 {
			t.Errorf("the first was granted lane %d after %v", a.Lane, a.Waited)
		}
		batch, now := request("m", seg{id: 2, tokens: 500}), request("m", seg{id: 3, tokens: 500})
		batch.Priority, now.Priority = Batch, Interactive
		second, third := acquire(ctx, s, batch), acquire(ctx, s, now)
		synctest.Wait()
		if _, err := s.Acquire(ctx, batch); !errors.Is(err, ErrFull) {
			t.Errorf("with a full queue: %v", err)
		}
		time.Sleep(3 * time.Second)
		st := s.Stats()
		if w := st.Waiting[Batch]; w.Requests != 1 || w.Oldest != 3*time.Second {
			t.Errorf("batch requests that wait: %+v", w)
		}
		if len(st.Runners) != 1 || st.Runners[0].Busy != 1 || st.Runners[0].Waiting != 2 || !st.Runners[0].Loaded {
			t.Errorf("runners: %+v", st.Runners)
		}
		a.Release(served)
		synctest.Wait()
		g := <-third // before the one that arrived earlier
		select {
		case <-second:
			t.Error("two requests on one lane")
		default:
		}
		a.Release(served) // a second Release does nothing
		synctest.Wait()
		select {
		case <-second:
			t.Error("a grant that was released twice let another one go")
		default:
		}
		g.Release(served)
		(<-second).Release(served)
		(*Grant)(nil).Release(served)
		if st := s.Stats(); st.Runners[0].Busy != 0 || st.Grants != 3 {
			t.Errorf("at the end: %+v", st)
		}
	})
}

// TestMakesRoom: a more urgent request gets a place in a full queue; the latest of the least urgent
// ones makes room.
func TestMakesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1, Limit: 3})
		running := <-acquire(t.Context(), s, request("m", text(500)))
		errs := map[string]chan error{}
		add := func(name string, p Priority, arrived time.Time) {
			r := request("m", text(500))
			r.Priority, r.Arrived = p, arrived
			errs[name] = make(chan error, 1)
			go func() {
				g, err := s.Acquire(t.Context(), r)
				errs[name] <- err
				g.Release(served)
			}()
			time.Sleep(time.Second)
		}
		refused := func() (names string) {
			synctest.Wait()
			for _, name := range slices.Sorted(maps.Keys(errs)) {
				select {
				case err := <-errs[name]:
					if delete(errs, name); !errors.Is(err, ErrFull) {
						t.Errorf("%s: %v", name, err)
					}
					names += name + " "
				default:
				}
			}
			return names
		}
		began := time.Now()
		for _, c := range []struct {
			name    string
			p       Priority
			arrived time.Time
			refused string
		}{
			{"batch 1", Batch, time.Time{}, ""},
			{"batch 2", Batch, time.Time{}, ""},
			{"normal 1", Normal, time.Time{}, ""},
			{"batch 3", Batch, time.Time{}, "batch 3 "},
			{"normal 2", Normal, time.Time{}, "batch 2 "},
			{"batch 0, sent in vain before", Batch, began.Add(-time.Second), "batch 1 "},
			{"interactive 1", Interactive, time.Time{}, "batch 0, sent in vain before "},
			{"interactive 2", Interactive, time.Time{}, "normal 2 "},
			{"interactive 3", Interactive, time.Time{}, "normal 1 "},
			{"interactive 4", Interactive, time.Time{}, "interactive 4 "},
			{"normal 3", Normal, time.Time{}, "normal 3 "},
		} {
			full := s.Full(c.p, "c")
			add(c.name, c.p, c.arrived)
			got := refused()
			if got != c.refused {
				t.Errorf("%s came, and refused was %q, want %q", c.name, got, c.refused)
			}
			if full && got != c.name+" " && c.arrived.IsZero() {
				t.Errorf("%s: was full %v, and %q was refused", c.name, full, got)
			}
		}
		running.Release(served)
		synctest.Wait()
		for name, c := range errs {
			if err := <-c; err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// TestAway: requests wait for an absent server until it returns, and then the most urgent go first;
// or they end with an error when it was away for too long.
func TestAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		running := <-acquire(t.Context(), s, request("m", text(500)))
		var order []string
		ended := make(chan error, 100)
		add := func(name string, p Priority) {
			r := request("m", text(500))
			r.Priority = p
			go func() {
				g, err := s.Acquire(t.Context(), r)
				if err == nil {
					order = append(order, name) // one after the other
					g.Release(served)
				}
				ended <- err
			}()
			synctest.Wait()
		}
		add("batch", Batch)
		s.SetAway(0, true, time.Now().Add(time.Minute))
		running.Release(Result{Sent: true}) // it broke off
		add("normal", Normal)
		add("interactive", Interactive)
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if len(order) > 0 || len(ended) > 0 {
			t.Fatalf("granted %v, %d ended while the server was away", order, len(ended))
		}
		s.SetAway(0, false, time.Time{})
		for range 3 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if want := []string{"interactive", "normal", "batch"}; !slices.Equal(order, want) {
			t.Errorf("back: %v, want %v", order, want)
		}

		s.SetAway(0, true, time.Now().Add(time.Minute))
		add("a", Normal)
		add("b", Interactive)
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(ended) != 2 {
			t.Fatalf("%d were told that it was away for too long", len(ended))
		}
		add("c", Normal) // at once
		for range 3 {
			if err := <-ended; !errors.Is(err, ErrAway) {
				t.Errorf("away for too long: %v", err)
			}
		}
		if st := s.Stats(); st.Waiting[Normal].Requests != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestAwayElsewhere: requests that several servers may serve wait for whichever returns first, and
// no longer than for the last of them.
func TestAwayElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		ask := func() (chan *Grant, chan error) {
			r := request("m", text(500))
			r.Upstreams = []uint16{0, 1}
			granted, refused := make(chan *Grant, 1), make(chan error, 1)
			go func() {
				if g, err := s.Acquire(t.Context(), r); err != nil {
					refused <- err
				} else {
					granted <- g
				}
			}()
			synctest.Wait()
			return granted, refused
		}
		s.SetAway(0, true, time.Now().Add(time.Minute))
		granted, _ := ask()
		if g := <-granted; g.Upstream != 1 {
			t.Errorf("sent to %d, which is away", g.Upstream)
		} else {
			g.Release(served)
		}
		s.SetAway(1, true, time.Now().Add(2*time.Minute))
		granted, refused := ask()
		time.Sleep(119 * time.Second)
		synctest.Wait()
		if len(granted)+len(refused) > 0 {
			t.Error("it did not wait for the second server")
		}
		s.SetAway(0, false, time.Time{})
		synctest.Wait()
		if g := <-granted; g.Upstream != 0 {
			t.Errorf("sent to %d, which is away", g.Upstream)
		} else {
			g.Release(served)
		}
		s.SetAway(0, true, time.Now())
		granted, refused = ask()
		time.Sleep(time.Second)
		if err := <-refused; !errors.Is(err, ErrAway) || len(granted) > 0 {
			t.Error(err)
		}
	})
}

// TestLeave: a client that leaves while it waits, or at the moment of its grant, holds nothing.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		a := <-acquire(t.Context(), s, request("m", seg{id: 1, tokens: 500}))
		ctx, cancel := context.WithCancel(t.Context())
		left := acquire(ctx, s, request("m", seg{id: 2, tokens: 500}))
		stays := acquire(t.Context(), s, request("m", seg{id: 3, tokens: 500}))
		cancel()
		if g, ok := <-left; ok {
			t.Errorf("granted %+v to a client that has left", g)
		}
		if n := s.Stats().Waiting[Normal].Requests; n != 1 {
			t.Errorf("%d wait", n)
		}
		a.Release(served)
		(<-stays).Release(served)
		if _, err := s.Acquire(ctx, request("m")); !errors.Is(err, context.Canceled) {
			t.Errorf("a client that had left before: %v", err)
		}

		// At the same moment: either may win.
		for range 200 {
			a := <-acquire(t.Context(), s, request("m", seg{id: 1, tokens: 500}))
			ctx, cancel := context.WithCancel(t.Context())
			ch := acquire(ctx, s, request("m", seg{id: 1, tokens: 500}))
			go cancel()
			a.Release(served)
			synctest.Wait()
			if g := <-ch; g != nil {
				g.Release(Result{})
			}
			if st := s.Stats(); st.Runners[0].Busy != 0 || st.Waiting[Normal].Requests != 0 {
				t.Fatalf("a lane is stranded: %+v", st)
			}
		}
	})
}

// TestHold: a lane is held for a client that may return, and the timer admits others if it does
// not.
func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		slow := Result{Sent: true, Answered: true, Total: 1050, ReusedKnown: true, Generated: 10, Timed: true, Prompt: time.Second, Eval: 100 * time.Millisecond}
		script := seg{id: 1, tokens: 1000}
		a := <-acquire(t.Context(), s, request("m", script, seg{id: 2, tokens: 50}))
		other := request("m", seg{id: 3, tokens: 1000})
		other.Client = "other"
		b := acquire(t.Context(), s, other)
		a.Release(slow)
		synctest.Wait()
		if len(b) != 0 {
			t.Fatal("the lane was not held for the script")
		}
		time.Sleep(5 * time.Millisecond)
		a = <-acquire(t.Context(), s, request("m", script, seg{id: 4, tokens: 50}))
		if a.Waited != 0 || a.Expected < 900 {
			t.Errorf("the script's next request: %+v", a.Placement)
		}
		released := time.Now()
		a.Release(slow)
		g := <-b
		if held := time.Since(released); held == 0 || held > time.Second {
			t.Errorf("the lane was held for %v", held)
		}
		g.Release(slow)
		if st := s.Stats(); st.HoldsHit != 1 || st.HoldsExpired != 1 {
			t.Errorf("holds: %+v", st.Counts)
		}
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		a := <-acquire(t.Context(), s, request("m"))
		errs := make(chan error)
		go func() {
			_, err := s.Acquire(t.Context(), request("m"))
			errs <- err
		}()
		synctest.Wait()
		s.Close()
		if err := <-errs; !errors.Is(err, ErrClosed) {
			t.Errorf("what waited: %v", err)
		}
		if _, err := s.Acquire(t.Context(), request("m")); !errors.Is(err, ErrClosed) {
			t.Errorf("what came later: %v", err)
		}
		a.Release(served)
		s.Close()
	})
}

// TestStorm: 1,319 requests at once on four lanes, from clients many of which give up: no more than
// four run at a time, and nothing is lost or stranded.
func TestStorm(t *testing.T) {
	s := NewScheduler(Config{Lanes: 4})
	var running, most, done, gone atomic.Int64
	var wg sync.WaitGroup
	for i := range 1319 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if i%3 == 0 {
				go func() {
					for range rand.IntN(50) {
						s.Stats()
					}
					cancel()
				}()
			}
			r := request("m", seg{id: uint64(1 + i%20), tokens: 500}, seg{id: uint64(1000 + i), tokens: 50})
			r.Client = fmt.Sprint(i % 5)
			g, err := s.Acquire(ctx, r)
			if err != nil {
				gone.Add(1)
				return
			}
			defer g.Release(served)
			n := running.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			s.Stats()
			running.Add(-1)
			done.Add(1)
		})
	}
	wg.Wait()
	st := s.Stats()
	if most.Load() > 4 || done.Load()+gone.Load() != 1319 || gone.Load() > 440 {
		t.Errorf("%d at once, %d done, %d gone", most.Load(), done.Load(), gone.Load())
	}
	if st.Runners[0].Busy != 0 || st.Runners[0].Waiting != 0 {
		t.Errorf("at the end: %+v", st.Runners)
	}
	s.Close() // stops the timer
}

// TestRetries: a client gives up and sends the same request again, three times: one runs at a time,
// and abandoned requests no longer wait.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		a := <-acquire(t.Context(), s, request("m", seg{id: 9, tokens: 100}))
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			if g, err := s.Acquire(ctx, request("m", seg{id: 1, tokens: 100})); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, %v", g, err)
			}
			cancel()
			if n := s.Stats().Waiting[Normal].Requests; n != 0 {
				t.Errorf("%d wait after the client gave up", n)
			}
		}
		a.Release(served)
	})
}

// TestAside: unread requests have one lane per server, or no limit, whatever other requests hold,
// and the queue's limit applies to them separately. They are refused when the Scheduler is closed.
func TestAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 4, Limit: 1})
		s.SetLanes(1, Unlimited)
		ask := func(s *Scheduler, upstream uint16) chan error {
			ended := make(chan error, 1)
			go func() {
				_, err := s.Acquire(t.Context(), Request{Upstreams: []uint16{upstream}})
				ended <- err
			}()
			synctest.Wait()
			return ended
		}
		for range 3 {
			if err := <-ask(s.Aside(), 1); err != nil {
				t.Error(err)
			}
		}
		if err := <-ask(s.Aside(), 0); err != nil {
			t.Error(err)
		}
		waits := ask(s.Aside(), 0)
		if err := <-ask(s.Aside(), 0); !errors.Is(err, ErrFull) {
			t.Errorf("the second that waits: %v", err)
		}
		if err := <-ask(s, 0); err != nil {
			t.Errorf("one that is known: %v", err)
		}
		s.Close()
		if err := <-waits; !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		late := NewScheduler(Config{})
		late.Close()
		if err := <-ask(late.Aside(), 0); !errors.Is(err, ErrClosed) {
			t.Errorf("after the end: %v", err)
		}
	})
}

// TestSetMaxWait: a new bound for a running scheduler applies to its queue, and to the queue of
// unread requests, whether or not that exists yet.
func TestSetMaxWait(t *testing.T) {
	s := NewScheduler(Config{Lanes: 1, MaxWait: time.Second})
	s.SetMaxWait(time.Minute)
	aside := s.Aside()
	if s.queue.cfg.MaxWait != time.Minute || aside.queue.cfg.MaxWait != time.Minute {
		t.Errorf("%v, aside %v", s.queue.cfg.MaxWait, aside.queue.cfg.MaxWait)
	}
	if s.SetMaxWait(time.Hour); s.queue.cfg.MaxWait != time.Hour || aside.queue.cfg.MaxWait != time.Hour {
		t.Errorf("then %v, aside %v", s.queue.cfg.MaxWait, aside.queue.cfg.MaxWait)
	}
}
