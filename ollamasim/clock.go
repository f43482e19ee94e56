package ollamasim

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// Clock is the time that a Server lives in: Real or Virtual.
type Clock interface {
	Now() time.Time
	// AfterFunc calls f when d has passed, in any goroutine. stop prevents that and reports whether
	// it did.
	AfterFunc(d time.Duration, f func()) (stop func() bool)
	// Wait says that a request waits for the clock from now on, and Resume that it no longer does.
	// Whoever wakes it calls Resume before it runs: time must not advance in between.
	Wait()
	Resume()
}

// Real is the time of this machine, or a faster one. In a testing/synctest bubble it is the
// bubble's time.
type Real struct {
	start time.Time
	speed float64
}

// NewReal returns a clock that runs speed times as fast as real time. A request costs the machine
// some 100 µs, whatever the clock shows meanwhile: for a speed above about 100 use Virtual.
func NewReal(speed float64) *Real { return &Real{start: time.Now(), speed: speed} }

// Now implements Clock.
func (c *Real) Now() time.Time {
	return c.start.Add(time.Duration(float64(time.Since(c.start)) * c.speed))
}

// AfterFunc implements Clock.
func (c *Real) AfterFunc(d time.Duration, f func()) (stop func() bool) {
	return time.AfterFunc(time.Duration(float64(d)/c.speed), f).Stop
}

// Wait implements Clock. It does nothing.
func (c *Real) Wait() {}

// Resume implements Clock. It does nothing.
func (c *Real) Resume() {}

// Virtual is a clock for many servers and clients in one program, in which hours pass in seconds.
// It stands still while somebody works, and jumps to the next event when everybody waits for it.
// Those who may work are participants: whoever sends requests one after the other (a goroutine with
// two requests at once is two). A participant waits while a Server serves its request, and in
// Sleep.
//
// Limits. What is between participants and servers may only pass requests on: what it does by its
// own timers happens in real time, and if it lets requests wait, Parked must return how many.
// Requests from others than participants count as participants' while they wait in a server, and
// time may then advance a little before a participant is done. During a stream, time advances while
// the pieces are on their way: measure with the times in the answer's last line. None of this
// applies in a testing/synctest bubble with in-memory connections (Listen) and a Real clock, where
// the runtime knows who waits: use that where a test can be used.
type Virtual struct {
	// Parked, if non-nil, returns how many of the participants' requests wait outside of the
	// servers until another request has been served, as in a proxy's queue. It must not count a
	// request that is on its way.
	Parked func() int
	// Patience is how long, in real time, nothing may happen before the clock advances although a
	// participant does not wait, since it may be held up by something that the clock does not know
	// of; 0: for ever. Forced counts how often that was so.
	Patience time.Duration

	kick chan struct{} // something changed; holds one

	mu      sync.Mutex // guards everything below
	now     time.Time
	events  events
	last    uint64 // number of the last event added
	joined  int    // participants
	waiting int    // requests and participants that wait for the clock
	changes int    // how often any of this changed
	forced  int
}

const pollParked = 50 * time.Microsecond

// NewVirtual returns a clock that shows start. It stands still until Run.
func NewVirtual(start time.Time) *Virtual {
	return &Virtual{kick: make(chan struct{}, 1), now: start}
}

// event is a call of f at a time.
type event struct {
	at    time.Time
	seq   uint64 // events at the same time happen in the order in which they were added
	index int    // in the heap; -1 when it has left it
	f     func()
}

type events []*event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) {
	e[i], e[j] = e[j], e[i]
	e[i].index, e[j].index = i, j
}
func (e *events) Push(x any) {
	x.(*event).index = len(*e)
	*e = append(*e, x.(*event))
}
func (e *events) Pop() any {
	n := len(*e) - 1
	x := (*e)[n]
	(*e)[n] = nil
	*e = (*e)[:n]
	x.index = -1
	return x
}

// Now implements Clock.
func (v *Virtual) Now() time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.now
}

// AfterFunc implements Clock.
func (v *Virtual) AfterFunc(d time.Duration, f func()) (stop func() bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.last++
	e := &event{at: v.now.Add(max(d, 0)), seq: v.last, f: f}
	heap.Push(&v.events, e)
	v.changed()
	return func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		if e.index < 0 {
			return false
		}
		heap.Remove(&v.events, e.index)
		v.changed()
		return true
	}
}

// Wait implements Clock.
func (v *Virtual) Wait() { v.count(&v.waiting, 1) }

// Resume implements Clock.
func (v *Virtual) Resume() { v.count(&v.waiting, -1) }

// Join adds n participants.
func (v *Virtual) Join(n int) { v.count(&v.joined, n) }

// Leave says that a participant sends nothing more.
func (v *Virtual) Leave() { v.count(&v.joined, -1) }

func (v *Virtual) count(what *int, n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	*what += n
	v.changed()
}

func (v *Virtual) changed() {
	v.changes++
	select {
	case v.kick <- struct{}{}:
	default:
	}
}

// Forced returns how often the clock advanced because of Patience.
func (v *Virtual) Forced() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.forced
}

// Sleep lets a participant wait until d has passed. It returns the cause of ctx's end if that came
// first.
func (v *Virtual) Sleep(ctx context.Context, d time.Duration) error {
	passed := make(chan struct{})
	stop := v.AfterFunc(d, func() {
		v.Resume()
		close(passed)
	})
	// Before the event is there, the clock could advance to a later one.
	v.Wait()
	select {
	case <-passed:
	case <-ctx.Done():
		if stop() {
			v.Resume()
		}
		return ctx.Err()
	}
	return nil
}

// Run advances the time until ctx ends, and returns the cause. All events happen in its goroutine.
func (v *Virtual) Run(ctx context.Context) error {
	poll := time.NewTimer(0)
	defer poll.Stop()
	seen, since := -1, time.Time{} // the last change, and when it was seen
	for ctx.Err() == nil {
		changes, happened := v.advance(seen >= 0 && v.Patience > 0 && time.Since(since) >= v.Patience)
		if happened || changes != seen {
			seen, since = changes, time.Now()
		}
		if happened {
			continue
		}
		switch {
		case v.Parked != nil:
			poll.Reset(pollParked)
		case v.Patience > 0:
			poll.Reset(v.Patience)
		}
		select {
		case <-ctx.Done():
		case <-v.kick:
		case <-poll.C:
		}
	}
	return ctx.Err()
}

// advance lets the next event happen if everybody waits for it, or if it is to be forced.
func (v *Virtual) advance(force bool) (changes int, happened bool) {
	v.mu.Lock()
	before := v.changes
	v.mu.Unlock()
	parked := 0
	if v.Parked != nil {
		parked = v.Parked()
	}
	v.mu.Lock()
	// A request that was parked and has reached a server meanwhile would count twice.
	if len(v.events) == 0 || v.changes != before || v.waiting+parked < v.joined && !force {
		defer v.mu.Unlock()
		return before, false
	}
	if v.waiting+parked < v.joined {
		v.forced++
	}
	e := heap.Pop(&v.events).(*event)
	v.now = e.at
	v.changed()
	changes = v.changes
	v.mu.Unlock()
	e.f()
	return changes, true
}
