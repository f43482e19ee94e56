package schedule

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// lone is a request whose prompt has nothing in common with others.
func lone(client string, p Priority, tokens int) Request {
	tails++
	return by(client, p, request("m", seg{id: 1 << 40 * tails, tokens: tokens}))
}

// TestWaitingOrder: without common prefixes, requests start in the reported order, except for those
// for which the lane is held: with priorities, with clients with much and little to do, with
// weights, and with prompts of all lengths.
func TestWaitingOrder(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		d := newDesk(t, Config{Lanes: 1})
		for range 200 {
			client := int(r.ExpFloat64() * 2)
			req := lone(fmt.Sprint(client), Priority(r.IntN(3)-1), 100+r.IntN(2000))
			req.Weight = []float64{1, 0.5, 0.25}[client%3]
			d.add(req)
			d.now = d.now.Add(time.Millisecond)
		}
		told := map[uint64]int{}
		rows := d.q.waiters(d.now)
		first := inOrder(rows, len(rows), d.now)
		for i, row := range rows {
			told[row.id] = i
			if w := first[i]; w.Place != i+1 || w.StartKnown {
				t.Fatalf("row %d: %+v", i, w)
			}
		}
		off := 0
		g := d.granted(1) // the first found a free lane
		for i := range len(rows) {
			d.done(g[0].ID, evaluated(1000, 1000), time.Second)
			for g = d.q.Grants(); len(g) == 0; g = d.q.Grants() {
				d.wake()
			}
			off += max(told[g[0].ID]-i, i-told[g[0].ID])
		}
		if mean := float64(off) / float64(len(rows)); mean > 5 {
			t.Errorf(
				"seed %d: of %d requests each is %.1f places off on average",
				seed,
				len(rows),
				mean,
			)
		}
	}
}

// TestWaitingStart: if everything takes as long as before, requests start when predicted, on one
// lane and on several. Nothing is predicted before anything is known, or while the server is away.
func TestWaitingStart(t *testing.T) {
	for _, lanes := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			s := NewScheduler(Config{Lanes: lanes})
			work := func(i int) {
				g, err := s.Acquire(t.Context(), lone(fmt.Sprint(i%4), Normal, 1000))
				if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Second)
				g.Release(Result{Sent: true, Answered: true, Total: 1000, Generated: firstAnswer})
			}
			send := func(from, to int) {
				for i := from; i < to; i++ {
					go work(i)
					synctest.Wait()
				}
			}
			send(0, 2*lanes)
			w := s.Waiting(100)
			if w.Total != lanes || len(w.First) != lanes || w.First[0].StartKnown ||
				w.First[0].Place != 1 {
				t.Errorf("before anything is known: %+v", w)
			}
			time.Sleep(10 * time.Second)
			if e := s.Waiting(0).Estimates; e.Count != 0 {
				t.Errorf("estimates of nothing: %+v", e)
			}
			send(0, 30)
			time.Sleep(500 * time.Millisecond)
			w = s.Waiting(5)
			if w.Total != 30-lanes || len(w.First) != 5 {
				t.Errorf("%d of %d are told", len(w.First), w.Total)
			}
			for i, f := range w.First {
				want := time.Duration(i/lanes)*time.Second + 500*time.Millisecond
				if d := (f.Start - want).Abs(); !f.StartKnown || d > 700*time.Millisecond ||
					f.Age != 500*time.Millisecond ||
					f.Tokens != 1001 {
					t.Errorf("%d lanes: %+v, want %v", lanes, f, want)
				}
			}
			s.SetAway(0, true, time.Now().Add(time.Hour))
			if f := s.Waiting(1).First[0]; f.StartKnown {
				t.Errorf("a server that is away: %+v", f)
			}
			s.SetAway(0, false, time.Time{})
			time.Sleep(time.Minute)
			e := s.Stats().Estimates
			if mean := e.Absolute / time.Duration(
				max(e.Count, 1),
			); e.Count != uint64(30-lanes) || mean > 700*time.Millisecond || e.Late.Abs() > e.Absolute ||
				e.Within[len(e.Within)-1] != e.Count {
				t.Errorf("%d lanes: on average %v wrong: %+v", lanes, mean, e)
			}
		})
	}
}

// TestWaitingLoad: a request for another model is predicted to need a load, after the current
// model's turn.
func TestWaitingLoad(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	of := func(model string) Request {
		r := lone("c", Normal, 1000)
		r.Runner.Options = options(model, 0)
		return r
	}
	once := func(model string) {
		id := d.add(of(model))
		g := d.q.Grants()
		for ; len(g) == 0; g = d.q.Grants() {
			d.wake()
		}
		r := evaluated(1000, 1000)
		r.Loaded, r.Load = true, 10*time.Second
		d.done(id, r, 11*time.Second)
	}
	once("a")
	once("b")
	once("a")
	once("b")
	if r := d.q.servers[0].relation(
		d.q.servers[0].runners[0],
		d.q.servers[0].runners[1],
	); r != apart {
		t.Fatalf("the models are taken for %v", r)
	}
	busy := d.add(of("b"))
	d.granted(busy)
	d.add(of("b"))
	d.add(of("a"))
	first := inOrder(d.q.waiters(d.now), 10, d.now)
	if len(first) != 2 || first[0].Place != 1 || first[1].Place != 1 {
		t.Fatalf("%+v", first)
	}
	for _, w := range first {
		low, high := 500*time.Millisecond, 2*time.Second
		if w.Options.Model == first[1].Options.Model {
			low, high = 11*time.Second, 15*time.Second // what runs, what waits, and the load
		}
		if !w.StartKnown || w.Start < low || w.Start > high {
			t.Errorf("%s: %v, want %v to %v", w.Options.Model, w.Start, low, high)
		}
	}
}

// TestWaitingBeside: the list of waiting requests can be read while requests come, go, move and
// leave.
func TestWaitingBeside(t *testing.T) {
	s := NewScheduler(Config{Limit: 50})
	var wg sync.WaitGroup
	for client := range 8 {
		wg.Go(func() {
			for i := range 200 {
				ctx, leave := context.WithCancel(t.Context())
				if i%7 == 0 {
					leave()
				}
				r := by(
					fmt.Sprint(client),
					Priority(i%3-1),
					request("m", seg{id: uint64(i%5) + 1, tokens: 900}),
				)
				r.Upstreams, r.Program, r.Flow = []uint16{0, 1}, uint64(client), uint64(i)
				if g, err := s.Acquire(ctx, r); err == nil {
					g.Release(served)
				}
				leave()
			}
		})
	}
	done := make(chan struct{})
	go func() { // ends with the others
		defer close(done)
		wg.Wait()
	}()
	for n := 0; ; n++ {
		if w := s.Waiting(10); len(w.First) != min(w.Total, 10) || w.Total > 50 {
			t.Errorf("%d of %d", len(w.First), w.Total)
		}
		select {
		case <-done:
			if w := s.Waiting(10); w.Total != 0 { // whether any request had to wait is chance
				t.Errorf("at the end: %+v", w)
			}
			return
		default:
		}
	}
}

// BenchmarkWaiting measures how long the page holds the scheduler's lock, with 10,000 waiting
// requests of 1,000 clients.
func BenchmarkWaiting(b *testing.B) {
	q := New(Config{Lanes: 1, Limit: 20_000})
	now := start
	for i := range 10_001 {
		r := lone(fmt.Sprint(i%1000), Normal, 1000)
		r.ID = uint64(i + 1)
		q.Add(r, now)
	}
	b.ReportAllocs()
	for b.Loop() {
		if rows := q.waiters(now); len(rows) != 10_000 {
			b.Fatal(len(rows))
		}
	}
}
