package schedule

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"
)

// ErrFull says that as many requests wait as may. The client is to come again later.
var ErrFull = errors.New("too many requests are waiting; try again later")

// ErrMayNotWait says that the request would have to wait, and its Request.MayWait says no.
var ErrMayNotWait = errors.New("as many requests of this client wait as may")

// ErrClosed says that the proxy is stopping and sends nothing more.
var ErrClosed = errors.New("the proxy is stopping")

// ErrAway says that the server, or each of those that may serve the request, has been away for too long.
var ErrAway = errors.New("the server has been away for too long")

// Scheduler lets requests wait until Queue grants them. Make it with NewScheduler. Its methods may be called from any
// goroutine. It starts none of its own; between events a timer calls it when the queue wants to look again.
type Scheduler struct {
	mu      sync.Mutex // guards all below, and what the waiters hold
	queue   *Queue
	waiters map[uint64]*waiter // not yet granted
	last    uint64
	timer   *time.Timer // nil until it is first needed
	armed   time.Time   // for when; zero: not set
	closed  bool
	aside   *Scheduler // nil before it is first asked for

	accuracy *accuracy // of the estimates of when requests begin; shared with aside
}

// waiter is a request that waits. Under Scheduler.mu until ready is closed.
type waiter struct {
	ready chan struct{} // closed when it has been granted, or refused
	place Placement
	err   error

	since    time.Time     // when it began to wait …
	expected time.Duration // … and for how long it was expected to, where …
	told     bool          // … that could be estimated
}

// NewScheduler returns a scheduler with an empty queue.
func NewScheduler(cfg Config) *Scheduler {
	return &Scheduler{queue: New(cfg), waiters: map[uint64]*waiter{}, accuracy: &accuracy{}}
}

// Grant lets a request be sent to its server, until Release. The nil Grant is none; to release it does nothing.
type Grant struct {
	Placement
	scheduler *Scheduler
}

// Acquire waits until the request may be sent. Whoever gets a grant must release it. An error is ErrFull, ErrMayNotWait,
// ErrAway, ErrClosed, or what ended ctx.
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
		<-w.ready // it was granted in the same moment
		s.grant(w).Release(Result{})
		return nil, ctx.Err()
	}
	return s.grant(w), w.err
}

// grant returns what a waiter was granted; nil if it was refused.
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

// leave takes a request out whose client has left. false: it does not wait any more.
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

// Began says that the answer has begun to come, as a stream. After Release it says nothing.
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

// Release says that the request has ended, and how. Only the first call counts: the queue knows the request no more.
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

// handOver wakes those who were granted something, and sets the timer. s.mu must be held. Whoever leaves takes the same
// lock, so that nothing is granted to one who has left.
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

// do lets f change something, and hands over what is granted by that, or by now.
func (s *Scheduler) do(f func(q *Queue, now time.Time)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	f(s.queue, now)
	s.queue.Tick(now)
	s.armed = time.Time{} // the timer may have run
	s.handOver()
}

// both is do for this scheduler and for that which Aside returns, if it has been asked for.
func (s *Scheduler) both(f func(q *Queue, now time.Time)) {
	s.do(f)
	s.mu.Lock()
	aside := s.aside
	s.mu.Unlock()
	if aside != nil {
		aside.do(f)
	}
}

// SetAvailable says whether the server is to be sent anything new. One that drains is not: what waits for it goes
// to others that may serve it. What may go nowhere else stays, and is granted as ever. Servers are available at first.
func (s *Scheduler) SetAvailable(upstream uint16, on bool) {
	s.both(func(q *Queue, now time.Time) { q.SetAvailable(upstream, on, now) })
}

// SetAway says whether the server does not answer. What waits for it then goes to others that may serve it. What may go nowhere
// else waits on, and ends with ErrAway if the server is still away at a time.
func (s *Scheduler) SetAway(upstream uint16, away bool, until time.Time) {
	s.both(func(q *Queue, now time.Time) { q.SetAway(upstream, away, until, now) })
}

// SetName gives a server the name by which several proxies know it; at first it is its index. Proxies that name their
// servers alike send new prefixes to the same ones without asking each other.
func (s *Scheduler) SetName(upstream uint16, name string) {
	s.do(func(q *Queue, _ time.Time) { q.SetName(upstream, name) })
}

// SetLoaded says which models a server listed as loaded when it was asked at a time, as those of Runner.Options: see
// Queue.SetLoaded.
func (s *Scheduler) SetLoaded(upstream uint16, models map[string]int, at time.Time) {
	s.do(func(q *Queue, now time.Time) { q.SetLoaded(upstream, models, at, now) })
}

// SetLanes says how many slots each model on the server has; 0: to be learned; or Unlimited.
func (s *Scheduler) SetLanes(upstream uint16, n int) {
	s.do(func(q *Queue, now time.Time) { q.SetLanes(upstream, n, now) })
}

// SetTells says that the engines of a server are expected to tell how many slots they have (SetSlots), as
// soon as they are started: it is not tried to find out before.
func (s *Scheduler) SetTells(upstream uint16) {
	s.do(func(q *Queue, _ time.Time) { q.SetTells(upstream) })
}

// SetSlots says what the engine of a model on the server tells: how many slots there are is not
// learned from then on. What SetLanes says goes before it.
func (s *Scheduler) SetSlots(upstream uint16, model string, told Slots) {
	s.do(func(q *Queue, now time.Time) { q.SetSlots(upstream, model, told, now) })
}

// SetExpected says how many slots each model on the server has, most likely, where that is learned:
// they begin with so many lanes, 1 otherwise.
func (s *Scheduler) SetExpected(upstream uint16, n int) {
	s.do(func(q *Queue, now time.Time) { q.SetExpected(upstream, n, now) })
}

// SetLongestMatch says whether the server chooses slots by the longest match alone, as Ollama before 0.30 does.
func (s *Scheduler) SetLongestMatch(upstream uint16, on bool) {
	s.do(func(q *Queue, _ time.Time) { q.SetLongestMatch(upstream, on) })
}

// SetMaxWait changes Config.MaxWait.
func (s *Scheduler) SetMaxWait(d time.Duration) {
	s.both(func(q *Queue, _ time.Time) { q.cfg.MaxWait = d })
}

// Cool says that the model on the server is not loaded any more. An empty one means all. That it cannot be loaded beside
// others is forgotten.
func (s *Scheduler) Cool(upstream uint16, model string) {
	s.do(func(q *Queue, now time.Time) { q.Cool(upstream, model, now) })
}

// Full reports whether a request of a client with this priority would have to wait and finds no place,
// as far as that can be told without knowing more of it: what its body may say, is in its favour.
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

// Aside returns a scheduler for requests of whose runner nothing is known: it has the bounds of this one, but one lane
// for each server that is not Unlimited, and is closed with this one.
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
			u.lanes, u.off, u.away, u.until = cmp.Or(min(t.lanes, 0), 1), t.off, t.away, t.until
		}
	}
	return s.aside
}

// Close refuses what waits and what comes from now on. What has been granted may be released as ever.
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
