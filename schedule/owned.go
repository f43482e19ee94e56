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
// it. Proxies tell it to each other.
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
	q.disown(s, func(string) bool { return true }, now)
	q.pump(s, now)
}

// Yield ends the Movable requests that wait for a server and for a model, by its weights, with
// Elsewhere: other proxies have servers for these models, and this one drains. SetAvailable has to
// come before, so that what another server of this proxy can serve stays here.
func (q *Queue) Yield(upstream uint16, models map[string]bool, now time.Time) {
	s := q.server(upstream)
	q.disown(s, func(weights string) bool { return models[weights] }, now)
	q.pump(s, now)
}

// disown ends the Movable requests that wait for a server and for some models with Elsewhere.
func (q *Queue) disown(s *server, model func(weights string) bool, now time.Time) {
	for _, x := range slices.Clone(s.runners) {
		if x.movable == 0 {
			continue
		}
		for _, it := range x.waiters() {
			if it.movable && model(it.key.Options.Model) {
				q.refuse(it, Elsewhere{Moves: it.moves}, now)
				q.count.Disowned++
			}
		}
	}
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

// Taker is a server of another proxy that could serve more than it is asked to, as JSON between
// proxies.
type Taker struct {
	Server  string         `json:"server"`
	Options prefix.Options `json:"options"` // with which it could serve requests now
	Loaded  bool           `json:"loaded"`  // with these options
	Free    int            `json:"free"`    // lanes
	// Held are lanes that are free, but held for clients that are expected to come back.
	Held int `json:"held"`
	// Load is how long it takes until it is loaded, with what has to be loaded again for that.
	Load time.Duration `json:"load"` // in nanoseconds
	// Idle is how long one of the lanes has been free, at most longestIdle.
	Idle time.Duration `json:"idle"` // in nanoseconds
}

// longestIdle bounds Taker.Idle. Nothing is evaluated for longer.
const longestIdle = time.Hour

// Taker returns what a server of this proxy could take over with some options from another proxy,
// apart from its name; false if nothing now. It must have the model.
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
		switch {
		case l.item != nil:
		case q.expects(x, l, now):
			t.Held++
		default:
			t.Free++
			t.Idle = max(t.Idle, min(now.Sub(l.used), longestIdle))
		}
	}
	if s.lanes == Unlimited {
		t.Free, t.Held, t.Idle = 1, 0, min(now.Sub(x.used), longestIdle)
	}
	return t, t.Free+t.Held > 0
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
// repays that. What a lane was given before counts as warm there. What the clients of these
// requests owe stays.
func (q *Queue) Give(t Taker, now time.Time) (given int) {
	t.Free = min(t.Free, maxTaken)
	t.Held = min(t.Held, maxTaken-t.Free)
	x := q.outpost(t, now)
	for i := 0; i < t.Free+t.Held && given < maxTaken; i++ {
		n := q.giveLane(x, t, maxTaken-given, i >= t.Free, now)
		if n == 0 && i >= t.Free {
			break
		}
		if n == 0 { // perhaps what the held ones hold
			i = t.Free - 1
		}
		given += n
	}
	for _, l := range x.lanes {
		l.item = nil
	}
	return given
}

type outpostKey struct {
	server  string
	options prefix.Options
}

// outpost returns a runner that stands for another proxy's one. Its lanes hold what that was given.
func (q *Queue) outpost(t Taker, now time.Time) *runner {
	key := outpostKey{t.Server, t.Options}
	x, ok := q.outposts.Get(key)
	if !ok {
		x = &runner{key: Runner{Options: t.Options}, server: &server{}}
		q.outposts.Add(key, x)
	}
	for x.want = max(x.want, t.Free+t.Held); len(x.lanes) < x.want; {
		x.lanes = append(x.lanes, &lane{})
	}
	for _, l := range x.lanes {
		l.used = now.Add(-t.Idle)
	}
	return x
}

// giveLane gives what one lane is to serve, from the longest backlog from which that repays. To a
// lane that is held for a client it gives only what continues what such a lane was given before.
func (q *Queue) giveLane(x *runner, to Taker, most int, held bool, now time.Time) int {
	var from []*runner
	for _, s := range q.servers {
		if y := s.byKey[Runner{s.index, to.Options}]; y != nil && y.movable > 0 {
			from = append(from, y)
		}
	}
	slices.SortStableFunc(from, func(a, b *runner) int { return cmp.Compare(b.ahead(lesser), a.ahead(lesser)) })
	for _, y := range from {
		t := q.theft(x, y, now)
		t.away, t.held, t.loading = true, held, int(to.Load/t.per)
		if n := t.give(to.Server, most); n > 0 {
			q.pump(y.server, now)
			return n
		}
	}
	return 0
}

// give gives what one lane is to serve from one backlog.
func (t *theft) give(to string, most int) (given int) {
	all, l := t.pick()
	if len(all) == 0 {
		return 0
	}
	work := 0
	for ; len(all) > 0 && given < most; all = t.more(l, work) {
		for _, it := range all[:min(len(all), most-given)] {
			t.q.refuse(it, Elsewhere{to, it.moves + 1}, t.now)
			t.q.count.Given++
			work += it.work
			given++
		}
		l.holds, l.tokens, l.class, l.item = all[0].steps, all[0].tokens, all[0].rank, all[0]
	}
	return given
}

// giveTime is how much work of a prefix that lanes are busy with a lane is given at once, so that
// others get their part, too. It asks again when that is done.
const giveTime = 500 * time.Millisecond

// more returns a request that continues what a lane has been given, as long as the lanes that are
// working on its prefix have more to do.
func (t *theft) more(l *lane, work int) []*item {
	k := &t.from.classes[l.class]
	if l.class <= sparse || k.fifo.live == 0 || time.Duration(work)*t.per >= giveTime {
		return nil
	}
	it, tokens := k.best(l.holds)
	if it == nil || !t.takes(it) || !t.q.follows(it.who.client, tokens, l.tokens) {
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
	Movable  int // of those that wait
}

// Loads returns the loads of all servers.
func (q *Queue) Loads() []Load {
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
			if !x.resident && x.waiting == 0 {
				continue
			}
			r := RunnerLoad{Options: x.key.Options, Resident: x.resident, Lanes: x.want, Busy: x.busy, Waiting: x.waiting, Movable: x.movable}
			if s.lanes == Unlimited {
				r.Lanes = 0
			}
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

// Yield sends waiting requests to other proxies' servers: see Queue.Yield.
func (s *Scheduler) Yield(upstream uint16, models map[string]bool) {
	s.both(func(q *Queue, now time.Time) { q.Yield(upstream, models, now) })
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
	return s.queue.Loads()
}
