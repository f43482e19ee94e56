package schedule

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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
	return Request{Runner: Runner{Options: options(model, 0)}, Links: j.links(), Client: "c"}
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
		if _, err := s.Acquire(ctx, now); !errors.Is(err, ErrFull) {
			t.Errorf("with a full queue: %v", err)
		}
		free := now
		free.SlotFree = true
		if g, err := s.Acquire(ctx, free); err != nil || g.Lane != -1 {
			t.Errorf("a request that needs no slot: %v, %v", g, err)
		} else {
			g.Release(served)
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
		g := <-third // before the one that came earlier
		select {
		case <-second:
			t.Error("two requests on one lane")
		default:
		}
		a.Release(served) // counts for nothing
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

// TestLeave: a client that leaves while it waits, or in the moment in which it is granted, holds nothing.
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

		// In the same moment: whoever is first.
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

// TestHold: a lane is held for a client that comes back, and the timer lets others go when it does not.
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

// TestStorm: 1,319 requests at once, of clients many of which give up, on four lanes (field case F19): never more than
// four run, and nothing is lost or stranded.
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

// TestRetries: a client that gives up and sends the same again, three times (field case F20): one at a time, and what was given
// up does not wait any more.
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

// TestAside: requests of which nothing is known have one lane per server, or no limit, whatever the others hold; and are
// refused when those are.
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
