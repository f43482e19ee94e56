package schedule

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"
)

// ErrFull means that the queue is full. The client should come again later.
var ErrFull = errors.New("too many requests are waiting; try again later")

// ErrMayNotWait means that the request would have to wait, and its Request.MayWait returned false.
var ErrMayNotWait = errors.New("as many requests of this client wait as may")

// ErrClosed means that the proxy is stopping and sends nothing more.
var ErrClosed = errors.New("the proxy is stopping")

// ErrAway means that the server, or each server that can serve the request, has been away for too
// long.
var ErrAway = errors.New("the server has been away for too long")

// Scheduler lets requests wait until Queue grants them. Create it with NewScheduler. Its methods
// are safe for concurrent use. It starts no goroutine; between events a timer calls it when the
// queue wants to look again.
type Scheduler struct {
	mu      sync.Mutex // guards everything below, and the waiters' fields
	queue   *Queue
	waiters map[uint64]*waiter // not yet granted
	last    uint64
	timer   *time.Timer // nil until it is first needed
	armed   time.Time   // for when; zero: not set
	closed  bool
	aside   *Scheduler // nil until the first request for it

	accuracy *accuracy // of the estimated starts; shared with aside
}

// waiter is a waiting request. Guarded by Scheduler.mu until ready is closed.
type waiter struct {
	ready chan struct{} // closed when it has been granted or refused
	place Placement
	err   error

	since    time.Time     // when it began to wait …
	expected time.Duration // … and its expected wait, if …
	told     bool          // … that could be estimated
}

// NewScheduler returns a scheduler with an empty queue.
func NewScheduler(cfg Config) *Scheduler {
	return &Scheduler{queue: New(cfg), waiters: map[uint64]*waiter{}, accuracy: &accuracy{}}
}

// Grant permits a request to be sent to its server, until Release. Releasing the nil Grant does
// nothing.
type Grant struct {
	Placement
	scheduler *Scheduler
}

// Acquire waits until the request may be sent. A returned grant must be released. The error is
// ErrFull, ErrMayNotWait, ErrAway, ErrClosed, an Elsewhere, or the cause of ctx's end.
func (s *Scheduler) Acquire(ctx context.Context, r Request) (*Grant, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w, err := s.join(&r)
	if err != nil {
		return nil, err
	}
	select {
	case <-w.ready:
	case <-ctx.Done():
		if s.leave(r.ID) {
			return nil, ctx.Err()
		}
		<-w.ready // it was granted at the same moment
		s.grant(w).Release(Result{})
		return nil, ctx.Err()
	}
	return s.grant(w), w.err
}

// grant returns what a waiter was granted, or nil if it was refused.
func (s *Scheduler) grant(w *waiter) *Grant {
	if w.err != nil {
		return nil
	}
	return &Grant{Placement: w.place, scheduler: s}
}

func (s *Scheduler) join(r *Request) (*waiter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	s.last++
	r.ID = s.last
	w := &waiter{ready: make(chan struct{})}
	s.waiters[r.ID] = w
	w.since = time.Now()
	refusal := ErrFull
	if mayWait := r.MayWait; mayWait != nil {
		r.MayWait = func() bool {
			may := mayWait()
			if !may {
				refusal = ErrMayNotWait
			}
			return may
		}
	}
	added := s.queue.Add(*r, w.since)
	if !added {
		delete(s.waiters, r.ID)
	}
	s.handOver()
	if !added {
		return nil, refusal
	}
	if _, waits := s.waiters[r.ID]; waits {
		w.expected, w.told = s.queue.estimate(r.ID, w.since)
	}
	return w, nil
}

// leave removes a request whose client has left. It returns false if the request no longer waits.
func (s *Scheduler) leave(id uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, waits := s.waiters[id]; !waits {
		return false
	}
	delete(s.waiters, id)
	s.queue.Leave(id, time.Now())
	s.handOver()
	return true
}

// Began records that the answer has begun, as a stream. After Release it does nothing.
func (g *Grant) Began() {
	if g == nil {
		return
	}
	s := g.scheduler
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue.Began(g.ID, time.Now())
	s.handOver()
}

// Release records that the request has ended, and how. Only the first call counts.
func (g *Grant) Release(r Result) {
	if g == nil {
		return
	}
	s := g.scheduler
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue.Done(g.ID, r, time.Now())
	s.handOver()
}

// handOver wakes the granted waiters, and sets the timer. s.mu must be held. A leaving waiter takes
// the same lock, so that nothing is granted to one that has left.
func (s *Scheduler) handOver() {
	for _, p := range s.queue.Grants() {
		w := s.waiters[p.ID]
		delete(s.waiters, p.ID)
		w.place = p
		if w.told {
			s.accuracy.add(w.expected, time.Since(w.since))
		}
		close(w.ready)
	}
	for _, r := range s.queue.Refusals() {
		w := s.waiters[r.ID]
		delete(s.waiters, r.ID)
		w.err = r.Err
		close(w.ready)
	}
	at, ok := s.queue.Next()
	switch {
	case !ok || s.closed:
		if s.timer != nil {
			s.timer.Stop()
		}
		s.armed = time.Time{}
	case !at.Equal(s.armed):
		s.armed = at
		if wait := time.Until(at); s.timer == nil {
			s.timer = time.AfterFunc(wait, s.tick)
		} else {
			s.timer.Reset(wait)
		}
	}
}

func (s *Scheduler) tick() { s.do(func(*Queue, time.Time) {}) }

// do applies a change to the queue, and hands out the grants that follow from it or are due by now.
func (s *Scheduler) do(f func(q *Queue, now time.Time)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	f(s.queue, now)
	s.queue.Tick(now)
	s.armed = time.Time{} // the timer may have fired
	s.handOver()
}

// both is do for this scheduler and for the one that Aside returns, if that exists.
func (s *Scheduler) both(f func(q *Queue, now time.Time)) {
	s.do(f)
	s.mu.Lock()
	aside := s.aside
	s.mu.Unlock()
	if aside != nil {
		aside.do(f)
	}
}

// SetAvailable sets whether the server gets new requests: see Queue.SetAvailable.
func (s *Scheduler) SetAvailable(upstream uint16, on bool) {
	s.both(func(q *Queue, now time.Time) { q.SetAvailable(upstream, on, now) })
}

// SetAway sets whether the server does not answer: see Queue.SetAway.
func (s *Scheduler) SetAway(upstream uint16, away bool, until time.Time) {
	s.both(func(q *Queue, now time.Time) { q.SetAway(upstream, away, until, now) })
}

// SetName sets the name by which several proxies know a server; at first it is its index. Proxies
// that use the same names send new prefixes to the same servers without asking each other.
func (s *Scheduler) SetName(upstream uint16, name string) {
	s.do(func(q *Queue, _ time.Time) { q.SetName(upstream, name) })
}

// SetLoaded sets which models (as Runner.Options) a server listed as loaded when it was asked at a
// time: see Queue.SetLoaded.
func (s *Scheduler) SetLoaded(upstream uint16, models map[string]int, at time.Time) {
	s.do(func(q *Queue, now time.Time) { q.SetLoaded(upstream, models, at, now) })
}

// SetLanes sets how many slots each model on the server has; 0: learned; or Unlimited.
func (s *Scheduler) SetLanes(upstream uint16, n int) {
	s.do(func(q *Queue, now time.Time) { q.SetLanes(upstream, n, now) })
}

// SetTells sets whether the engines of a server are expected to report how many slots they have
// (SetSlots) as soon as they are started. Then nothing is tried to find out before.
func (s *Scheduler) SetTells(upstream uint16) {
	s.do(func(q *Queue, _ time.Time) { q.SetTells(upstream) })
}

// SetSlots sets what the engine of a model on the server reports. The number of slots is no longer
// learned from then on. SetLanes takes precedence.
func (s *Scheduler) SetSlots(upstream uint16, model string, told Slots) {
	s.do(func(q *Queue, now time.Time) { q.SetSlots(upstream, model, told, now) })
}

// SetExpected sets the probable number of slots of each model on the server, for servers where it
// is learned. Models begin with this many lanes, or 1.
func (s *Scheduler) SetExpected(upstream uint16, n int) {
	s.do(func(q *Queue, now time.Time) { q.SetExpected(upstream, n, now) })
}

// SetLongestMatch sets whether the server chooses slots only by the longest match, as Ollama before
// 0.30 does.
func (s *Scheduler) SetLongestMatch(upstream uint16, on bool) {
	s.do(func(q *Queue, _ time.Time) { q.SetLongestMatch(upstream, on) })
}

// SetMaxWait changes Config.MaxWait.
func (s *Scheduler) SetMaxWait(d time.Duration) {
	s.both(func(q *Queue, _ time.Time) { q.cfg.MaxWait = d })
}

// Cool records that the model on the server is no longer loaded; "" means all models. It forgets
// that the model does not fit beside others.
func (s *Scheduler) Cool(upstream uint16, model string) {
	s.do(func(q *Queue, now time.Time) { q.Cool(upstream, model, now) })
}

// Full reports whether a request of a client with this priority would have to wait and finds no
// place. It assumes the best of a body that is not read yet.
func (s *Scheduler) Full(p Priority, client string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.queue.full(p, client, time.Now())
}

// Stats returns what a page or a scrape shows.
func (s *Scheduler) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.queue.Stats(time.Now())
	st.Estimates = s.accuracy.get()
	return st
}

// Aside returns a scheduler for requests whose runner is not known. It has the bounds of this one,
// but one lane for each server that is not Unlimited, and is closed with this one.
func (s *Scheduler) Aside() *Scheduler {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aside == nil {
		cfg := s.queue.cfg
		if cfg.Lanes != Unlimited {
			cfg.Lanes = 1
		}
		s.aside = NewScheduler(cfg)
		s.aside.closed, s.aside.accuracy = s.closed, s.accuracy
		for _, t := range s.queue.servers {
			u := s.aside.queue.server(t.index)
			u.lanes, u.off, u.foreign, u.away, u.until = cmp.Or(min(t.lanes, 0), 1), t.off, t.foreign, t.away, t.until
		}
	}
	return s.aside
}

// Close refuses everything that waits and that comes from now on. Grants may be released as usual.
func (s *Scheduler) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for id, w := range s.waiters {
		s.queue.drop(id, time.Now())
		w.err = ErrClosed
		close(w.ready)
	}
	clear(s.waiters)
	s.handOver()
	if s.aside != nil {
		s.aside.Close()
	}
}
