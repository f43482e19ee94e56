package schedule

import (
	"slices"
	"time"
)

// Forget forgets everything about a server, so that another one can get its index; false if a
// request is served there, or waits for it. Requests that other servers can serve do not come back
// to it.
func (s *Scheduler) Forget(upstream uint16) bool {
	s.mu.Lock()
	aside := s.aside
	s.mu.Unlock()
	forgotten := true
	for _, x := range []*Scheduler{aside, s} {
		if x != nil {
			x.do(func(q *Queue, now time.Time) { forgotten = q.Forget(upstream, now) && forgotten })
		}
	}
	return forgotten
}

// Forget is Scheduler.Forget.
func (q *Queue) Forget(upstream uint16, now time.Time) bool {
	i := slices.IndexFunc(q.servers, func(s *server) bool { return s.index == upstream })
	if i < 0 {
		return true
	}
	s := q.servers[i]
	if s.waiting > 0 || slices.ContainsFunc(s.runners, func(x *runner) bool { return x.busy > 0 }) {
		return false
	}
	q.servers = slices.Delete(q.servers, i, i+1)
	for _, it := range q.items {
		if !slices.Contains(it.upstreams, upstream) {
			continue
		}
		if it.waits {
			q.counted(it, -1)
		}
		it.upstreams = slices.DeleteFunc(it.upstreams, func(u uint16) bool { return u == upstream })
		if it.waits {
			q.counted(it, 1)
		}
	}
	return true
}
