package schedule

import (
	"cmp"
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Several proxies schedule one set of servers: each server belongs to one of them, its owner. A
// request goes to servers of this proxy if there are any for it, otherwise to those of others, as
// if they were this one's: for a moment two proxies may both, or neither, take a server for theirs.
// An owner with an idle server asks another one for a part of its backlog, which goes there through
// the proxy that the client asked.

// Elsewhere is the error of a Movable request that waits no longer, since another proxy is to send
// it.
type Elsewhere struct {
	// Server is the name of another proxy's server that takes the request over. "" means that no
	// server for it belongs to this proxy any more.
	Server string
	Moves  int // for Request.Moves there
}

func (e Elsewhere) Error() string {
	if e.Server == "" {
		return "this proxy no longer schedules a server for the request; send it to the proxy that does"
	}
	return "server " + e.Server + " takes the request over; send it to the proxy that schedules that"
}

// SetOwned sets whether this proxy schedules a server; at first it does. Requests for which it
// schedules another one do not go to a server that it does not schedule, and wait for that no
// longer. Other Movable ones that wait for it end with Elsewhere. What else waits for it is granted
// as before, and so is what comes later and has no other server.
func (q *Queue) SetOwned(upstream uint16, on bool, now time.Time) {
	s := q.server(upstream)
	if s.foreign == !on {
		return
	}
	was := s.tier()
	s.foreign = !on
	q.opened(s, was, now)
	if on {
		s.forget()
		q.pump(s, now)
		return
	}
	for _, x := range slices.Clone(s.runners) {
		if x.movable == 0 {
			continue
		}
		for _, it := range x.waiters() {
			if it.movable {
				q.refuse(it, Elsewhere{Moves: it.moves}, now)
				q.count.Disowned++
			}
		}
	}
	q.pump(s, now)
}

// forget forgets what idle lanes hold, since another proxy has used their slots. What that one has
// learned is more recent than what was learned here.
func (s *server) forget() {
	for _, x := range s.runners {
		x.taught = false
		for _, l := range x.lanes {
			if l.item == nil {
				*l = lane{name: l.name, used: l.used}
			}
		}
	}
}

// Taker is a server of another proxy that could serve more than it is asked to.
type Taker struct {
	Server  string
	Options prefix.Options // with which it could serve requests now
	Loaded  bool           // with these options
	Free    int            // lanes
	Load    time.Duration  // until it is loaded, with what has to be loaded again for that
	Idle    time.Duration  // how long one of the lanes has been free, at most longestIdle
}

// longestIdle bounds Taker.Idle. Nothing is evaluated for longer.
const longestIdle = time.Hour

// Taker returns what a server of this proxy could take over with some options from another proxy,
// apart from its name; false if nothing now. It must have the model. Lanes whose clients are
// expected to come back soon are not free.
func (q *Queue) Taker(upstream uint16, o prefix.Options, now time.Time) (Taker, bool) {
	s := q.server(upstream)
	if s.tier() > open {
		return Taker{}, false
	}
	x := q.idler(s, o, now)
	if x == nil || x.waiting > 0 {
		return Taker{}, false
	}
	t := Taker{Options: o, Load: s.loading(x, o, &x.rates, now)}
	t.Loaded = t.Load == 0
	for _, l := range x.lanes {
		if l.item == nil && !q.expects(x, l, now) {
			t.Free++
			t.Idle = max(t.Idle, min(now.Sub(l.used), longestIdle))
		}
	}
	if t.Free = min(t.Free, x.want-x.busy); s.lanes == Unlimited {
		t.Free, t.Idle = 1, min(now.Sub(x.used), longestIdle)
	}
	return t, t.Free > 0
}

// expects reports whether a free lane's client is likely to come back so soon that the lane would
// be held for it if others waited here.
func (q *Queue) expects(x *runner, l *lane, now time.Time) bool {
	v := l.visit
	if v == nil || v.state != visitOpen {
		return false
	}
	return now.Before(v.at.Add(q.client(v.client).hold(&q.habits, x.rates.evaluate(q.loss(x, l, 0)))))
}

// Give gives a part of the backlog to another proxy's server, and returns how many requests that
// is: for each of the server's free lanes a subtree of the prefix tree in which no lane is busy,
// from the far end, or a part of a prefix that lanes are busy with if evaluating it once more
// repays that. What the clients of these requests owe stays.
func (q *Queue) Give(t Taker, now time.Time) (given int) {
	for lanes := t.Free; lanes > 0 && given < maxTaken; lanes-- {
		n := q.giveLane(t, maxTaken-given, now)
		if n == 0 {
			break
		}
		given += n
	}
	return given
}

// giveLane gives what one lane is to serve, from the longest backlog from which that repays.
func (q *Queue) giveLane(t Taker, most int, now time.Time) int {
	var from []*runner
	for _, s := range q.servers {
		if y := s.byKey[Runner{s.index, t.Options}]; y != nil && y.movable > 0 {
			from = append(from, y)
		}
	}
	slices.SortStableFunc(from, func(a, b *runner) int { return cmp.Compare(b.ahead(lesser), a.ahead(lesser)) })
	for _, y := range from {
		if n := q.give(t, y, most, now); n > 0 {
			q.pump(y.server, now)
			return n
		}
	}
	return 0
}

// give gives what one lane is to serve from one backlog.
func (q *Queue) give(to Taker, y *runner, most int, now time.Time) (given int) {
	l := &lane{used: now.Add(-to.Idle)}
	x := &runner{key: Runner{Options: to.Options}, server: &server{}, lanes: []*lane{l}, want: 1, rates: y.rates}
	t := q.theft(x, y, now)
	t.away, t.loading = true, int(to.Load/t.per)
	work := 0
	for all := t.pick(); len(all) > 0 && given < most; all = t.more(l, work) {
		for _, it := range all[:min(len(all), most-given)] {
			q.refuse(it, Elsewhere{to.Server, it.moves + 1}, now)
			q.count.Given++
			work += it.work
			given++
		}
		l.holds, l.tokens, l.class = all[0].steps, all[0].tokens, all[0].rank
	}
	return given
}

// more returns a request that continues what a lane has been given, as long as the lanes that are
// working on its prefix have more to do.
func (t *theft) more(l *lane, work int) []*item {
	k := &t.from.classes[l.class]
	if l.class <= sparse || k.fifo.live == 0 {
		return nil
	}
	it, tokens := k.best(l.holds)
	if it == nil || !t.takes(it) || 2*tokens < it.tokens {
		return nil
	}
	if n := it.owned(); n.parent == nil || t.from.backlog(n) < work {
		return nil
	}
	return []*item{it}
}

// Load is the load of a server.
type Load struct {
	Upstream uint16
	Wait     time.Duration // of a new normal request with a new prefix, without loading its model
	PerToken time.Duration // to evaluate a token of a prompt; 0: not known
	Running  int
	Waiting  int
	Runners  []RunnerLoad // loaded, or with a backlog
}

// RunnerLoad is the load of a model as a server has it loaded, or is to load it.
type RunnerLoad struct {
	Options  prefix.Options
	Resident bool
	Lanes    int // 0: Unlimited
	Busy     int
	Waiting  int
	Movable  int           // of those that wait
	Load     time.Duration // until it is loaded, with what has to be loaded again for that
}

// Loads returns the loads of all servers.
func (q *Queue) Loads(now time.Time) []Load {
	loads := make([]Load, 0, len(q.servers))
	runners := 0
	for _, s := range q.servers {
		runners += len(s.runners)
	}
	all := make([]RunnerLoad, 0, runners)
	for _, s := range q.servers {
		l := Load{Upstream: s.index, Waiting: s.waiting}
		first := len(all)
		for _, x := range s.runners {
			l.Wait += x.ahead(normal)
			l.Running += x.busy
			if x.rates.prompt.under > 0 {
				l.PerToken = max(l.PerToken, x.rates.perToken())
			}
			if !x.resident && x.waiting == 0 {
				continue
			}
			r := RunnerLoad{Options: x.key.Options, Resident: x.resident, Lanes: x.want, Busy: x.busy, Waiting: x.waiting, Movable: x.movable}
			if s.lanes == Unlimited {
				r.Lanes = 0
			}
			r.Load = s.loading(x, x.key.Options, &x.rates, now)
			all = append(all, r)
		}
		l.Runners = all[first:len(all):len(all)]
		loads = append(loads, l)
	}
	return loads
}

// SetOwned sets whether this proxy schedules the server: see Queue.SetOwned.
func (s *Scheduler) SetOwned(upstream uint16, on bool) {
	s.both(func(q *Queue, now time.Time) { q.SetOwned(upstream, on, now) })
}

// Give gives waiting requests to another proxy's server, and returns how many: see Queue.Give.
func (s *Scheduler) Give(t Taker) (given int) {
	s.do(func(q *Queue, now time.Time) { given = q.Give(t, now) })
	return given
}

// Taker returns what a server of this proxy could take over: see Queue.Taker. Taker.Server is to be
// set by the caller.
func (s *Scheduler) Taker(upstream uint16, o prefix.Options) (t Taker, ok bool) {
	s.do(func(q *Queue, now time.Time) { t, ok = q.Taker(upstream, o, now) })
	return t, ok
}

// Loads returns the loads of all servers, in the order in which they became known.
func (s *Scheduler) Loads() []Load {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.queue.Loads(time.Now())
}
