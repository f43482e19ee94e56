package schedule

import (
	"cmp"
	"iter"
	"maps"
	"slices"
	"time"
)

// runner returns the runner, adding it if necessary. If there are too many, the one that was idle
// longest is forgotten.
func (q *Queue) runner(s *server, key Runner, now time.Time) *runner {
	if x, ok := s.byKey[key]; ok {
		return x
	}
	if x := s.same(key); x != nil && len(s.byKey) < maxKeys {
		s.byKey[key] = x
		return x
	}
	if len(s.runners) >= maxRunners {
		var oldest *runner
		for _, x := range s.runners {
			if x.waiting == 0 && x.busy == 0 && (oldest == nil || x.used.Before(oldest.used)) {
				oldest = x
			}
		}
		if oldest != nil {
			maps.DeleteFunc(s.byKey, func(_ Runner, x *runner) bool { return x == oldest })
			s.runners = slices.DeleteFunc(s.runners, func(x *runner) bool { return x == oldest })
		}
	}
	x := &runner{key: key, server: s, want: max(s.given(key.Options.Model), s.found, 1), used: now, sought: now}
	x.rates.host = s.host.hint()
	x.believes(now)
	x.resize()
	s.byKey[key] = x
	s.runners = append(s.runners, x)
	return x
}

// given returns how many lanes there are for a model, as its engine reports or the operator says;
// 0: learned; or Unlimited.
func (s *server) given(model string) int {
	if n := s.told[model].Count; n > 0 && s.lanes == 0 {
		return n
	}
	return s.lanes
}

// copied reports whether lanes can use what others have evaluated: see Slots.
func (x *runner) copied() bool { return x.server.told[x.key.Options.Model].Copied }

// given returns how many lanes there are for the runner; 0: learned; or Unlimited.
func (x *runner) given() int { return x.server.given(x.key.Options.Model) }

// same returns the runner for which a model is loaded with exactly the options of a key, though
// they were stated differently: num_ctx, which one request states and another does not, is the
// context that the server reports. It returns nil if there is none.
func (s *server) same(key Runner) *runner {
	context := s.loaded[key.Options.Model]
	if context == 0 || s.parted[key.Options.Model] {
		return nil
	}
	for _, x := range s.runners {
		o := x.key.Options
		if x.resident && o.Model == key.Options.Model && o.NumCtx() == 0 && o.WithContext(context) == key.Options {
			return x
		}
	}
	return nil
}

// cool forgets what is warm. Requests in progress are served after the load, or by the new runner.
func (x *runner) cool() {
	x.resident = x.busy > 0
	x.probing, x.trials, x.spare = nil, 0, nil
	for _, l := range x.lanes {
		l.before, l.visit, l.wanted = nil, nil, false
		if l.item == nil {
			l.holds, l.tokens, l.work = nil, 0, 0
		}
	}
}

// order returns the runners with a backlog: more urgent ones first, and of equally urgent ones the
// one whose requests have waited longest in sum.
func (s *server) order(now time.Time) []*runner {
	list := s.list[:0]
	for _, x := range s.runners {
		if x.waiting > 0 {
			list = append(list, x)
		}
	}
	if len(list) > 1 {
		slices.SortStableFunc(list, func(a, b *runner) int {
			return cmp.Or(cmp.Compare(a.top(), b.top()), cmp.Compare(b.accumulated(now), a.accumulated(now)))
		})
	}
	s.list = list
	return list
}

// top returns the priority of the most urgent waiting request.
func (x *runner) top() rank {
	for p := range ranks {
		if x.classes[p].fifo.live > 0 {
			return p
		}
	}
	return ranks
}

// accumulated returns the sum of the waits of the backlog.
func (x *runner) accumulated(now time.Time) time.Duration {
	return time.Duration(x.waiting)*now.Sub(epoch) - x.arrived
}

// oldest returns the request that has waited longest.
func (x *runner) oldest() *item {
	var oldest *item
	for p := range x.classes {
		if it := x.classes[p].fifo.front(); it != nil && (oldest == nil || it.arrived.Before(oldest.arrived)) {
			oldest = it
		}
	}
	return oldest
}

// aged reports whether a request has waited too long.
func (q *Queue) aged(it *item, now time.Time) bool {
	return q.cfg.MaxWait > 0 && it != nil && now.Sub(it.arrived) >= q.cfg.MaxWait
}

// admits reports whether requests may be sent to the runner now. What must be unloaded for it is
// drained first. The server chooses the runner to load next like a buffer in front of a machine
// with an expensive setup: the one whose requests have waited longest in sum.
func (q *Queue) admits(x *runner, now time.Time) bool {
	for y := range x.rivals() {
		if y.busy > 0 { // it is loaded for those, or will be
			return false
		}
	}
	for _, y := range x.server.runners {
		if y != x && x.server.relation(x, y) == untried && (y.overtakes(x, now) || x.overtakes(y, now)) {
			return false
		}
	}
	if x.resident {
		for y := range x.rivals() {
			if y.waiting > 0 && !y.resident && q.yields(x, y, now) {
				return false
			}
		}
		return x.untangled(now)
	}
	return q.load(x, now)
}

// load makes a runner replace those that cannot be loaded beside it, unless one of these is kept.
func (q *Queue) load(x *runner, now time.Time) bool {
	x.replaced = nil
	for y := range x.rivals() {
		if y.resident && !q.drained(y, x, now) {
			return false
		}
	}
	for y := range x.rivals() {
		if y.resident {
			x.replaced = append(x.replaced, y)
			y.cool()
			if y.waiting > 0 {
				y.sought = now
			}
		}
	}
	x.loads(now)
	x.skipped = 0
	q.count.RunnerLoads++
	return true
}

// yields reports whether x, which is loaded, is to make room for y although x has a backlog.
func (q *Queue) yields(x, y *runner, now time.Time) bool {
	if y.top().asked() < x.top().asked() {
		return true
	}
	if y.top().asked() > x.top().asked() && y.skipped < patience*y.want && !q.aged(y.oldest(), now) {
		return false
	}
	load := x.rates.load()
	begin, turn := x.since.Add(load), quantum*load // from when it is loaded: a load alone is not a turn
	if q.aged(y.oldest(), now) {
		turn = agedQuantum * load
	} else if y.sought.After(begin) {
		begin = y.sought
	}
	turn = min(turn, max(longestTurn, load))
	if at := begin.Add(turn); now.Before(at) {
		x.server.later(at)
		if q.cfg.MaxWait > 0 {
			if aged := y.oldest().arrived.Add(q.cfg.MaxWait); aged.After(now) {
				x.server.later(aged)
			}
		}
		return false
	}
	return true
}

// drained reports whether y may be unloaded for x: nothing equally urgent waits for it, and no
// expected request is worth waiting for.
func (q *Queue) drained(y, x *runner, now time.Time) bool {
	if y.waiting > 0 {
		return q.yields(y, x, now)
	}
	if !y.wanted || x.top().asked() < y.rank.asked() {
		return true
	}
	until := y.used.Add(y.habits.hold(&q.habits, y.rates.load()))
	if now.Before(until) {
		y.server.later(until)
		return false
	}
	if !y.missed && !y.used.Equal(until) {
		y.missed = true
		y.habits.miss()
		q.count.HoldsExpired++
	}
	return true
}

// came learns from a request to a runner without a backlog.
func (x *runner) came(now time.Time) {
	if !x.wanted || x.busy > 0 {
		return
	}
	if x.missed {
		x.habits.unmiss()
	}
	x.habits.came(now.Sub(x.used))
	x.wanted = false
}

// loads records that the runner was loaded, after all others.
func (x *runner) loads(at time.Time) {
	x.server.turns++
	x.resident, x.since, x.turn = true, at, x.server.turns
}

// relation is whether two models fit beside each other.
type relation uint8

const (
	untried relation = iota
	together
	apart
)

// pair returns the key of two models.
func pair(a, b string) [2]string {
	if a > b {
		a, b = b, a
	}
	return [2]string{a, b}
}

func (s *server) relate(a, b string, r relation) {
	if _, known := s.relations[pair(a, b)]; known || len(s.relations) < maxPairs {
		s.relations[pair(a, b)] = r
	}
}

// relation returns the known relation of two runners.
func (s *server) relation(x, y *runner) relation {
	return s.between(x.key.Options.Model, y.key.Options.Model)
}

// rivals returns the server's other runners that are not known to fit beside this one.
func (x *runner) rivals() iter.Seq[*runner] {
	return func(yield func(*runner) bool) {
		for _, y := range x.server.runners {
			if y != x && x.server.relation(x, y) == apart && !yield(y) {
				return
			}
		}
	}
}

// between returns the known relation of two models. A model is loaded only once.
func (s *server) between(a, b string) relation {
	if a == b {
		return apart
	}
	return s.relations[pair(a, b)]
}

// untangled reports whether the runner may be used, considering the other loaded ones. When a
// second model is loaded, a single request to the first one shows whether that was unloaded for it.
// Until then the two are not used at the same time, since they might evict each other with every
// request. Nobody waits much longer than a load for that, and an idle model gets the single request
// at once.
func (x *runner) untangled(now time.Time) bool {
	for _, y := range x.server.runners {
		if y == x || !y.resident || x.server.relation(x, y) != untried {
			continue
		}
		if until := x.tangled(y); now.Before(until) {
			x.server.later(until)
			return false
		}
	}
	return true
}

// tangled returns until when a runner must not be used because it is not known yet whether another
// one was unloaded for it; zero if it may be used.
func (x *runner) tangled(y *runner) time.Time {
	load := max(x.rates.load(), y.rates.load())
	switch {
	case y.turn > x.turn && y.busy > 0 && !y.answered() && (x.busy > 0 || x.asked.After(y.since)):
		// The single request and the other's first one are in progress.
		return y.since.Add(2 * load)
	case y.turn < x.turn && x.answered() && !y.tried.After(x.since) && (y.waiting > 0 || y.busy > 0):
		return x.used.Add(2 * load)
	}
	return time.Time{}
}

// leastAhead is how much earlier a request must be granted than another one to reach Ollama
// earlier, too.
const leastAhead = 100 * time.Millisecond

// overtakes reports whether a request to the runner, which is not loaded, might reach Ollama before
// the requests to y that are being served. Then it would not be clear which of two models was
// loaded first. Nothing is sent to y meanwhile.
func (x *runner) overtakes(y *runner, now time.Time) bool {
	if x.waiting == 0 || x.resident || !y.resident || y.busy == 0 {
		return false
	}
	until := x.sought.Add(leastAhead)
	if !now.Before(until) {
		return false
	}
	x.server.later(until)
	return true
}

// serves reports whether the runner is busy with a request that was granted well before another
// one, so that it was loaded for that before anything that the other one needs.
func (x *runner) serves(before *item) bool {
	for _, l := range x.lanes {
		if l.item != nil && !l.item.granted.Add(leastAhead).After(before.granted) {
			return true
		}
	}
	return false
}

// answered reports whether a request was answered that was granted since the runner is believed to
// be loaded. Until then it may not be, since requests overtake each other on their way.
func (x *runner) answered() bool { return !x.tried.Before(x.since) }

// loaded learns whether a request to a runner that was believed to be loaded found it so.
func (q *Queue) loaded(x *runner, it *item, r Result, now time.Time) {
	x.learnBeside(it)
	if !r.Loaded {
		q.kept(x, it, now)
	} else if it.replaced == nil && x.since.Before(it.granted) && x.served != it.key {
		q.part(x, it.key, now)
	}
	if x.since.Before(it.granted) {
		x.learnEvictor(it, r.Loaded)
	}
	if r.Loaded {
		if x.since.Before(it.granted) {
			x.loads(it.granted)
		}
		x.empty(it)
	}
	for y := range x.rivals() {
		if y.resident && y.busy == 0 {
			y.cool()
			y.sought = now
		}
	}
}

// empty forgets what slots held before the model was loaded for a request, and how many there were:
// the server may have been restarted with other settings.
func (x *runner) empty(by *item) {
	if x.learner.since.Before(by.granted) {
		x.learner.anew()
	}
	for _, l := range slices.Concat(x.lanes, x.spare) {
		if l.item == nil && l != by.lane && l.used.Before(by.granted) {
			l.holds, l.tokens, l.before = nil, 0, nil
		}
	}
}

// learnBeside learns from a request that was answered while others were served that were granted
// well before it.
func (x *runner) learnBeside(it *item) {
	for _, y := range x.server.runners {
		if y != x && y.resident && x.server.relation(x, y) == untried && y.serves(it) {
			x.relate(y, together)
		}
	}
}

// kept learns from a request that found its model loaded although others were believed to have
// replaced it.
func (q *Queue) kept(x *runner, it *item, now time.Time) {
	for _, y := range it.replaced {
		switch {
		case y.key.Options.Model == x.key.Options.Model:
			q.unite(x, y, now)
		case y.answered(): // y has been used since, and x was not unloaded for it
			x.relate(y, together)
		}
	}
}

// learnEvictor learns which of the runners that were loaded since x do not fit beside it: none if a
// request found x loaded, otherwise the one for which it was unloaded.
func (x *runner) learnEvictor(it *item, loaded bool) {
	var last *runner // the candidate: preferably one of which nothing is known yet
	for _, y := range x.server.runners {
		known := x.server.relation(x, y)
		if y == x || !y.resident || y.turn < x.turn || !y.since.Before(it.granted) || !y.answered() || known == apart {
			continue
		}
		if !loaded {
			x.relate(y, together)
		} else if !y.serves(it) && (last == nil || cmp.Or(cmp.Compare(x.server.relation(x, last), known), cmp.Compare(y.turn, last.turn)) > 0) {
			last = y
		}
	}
	if last == nil {
		return
	}
	learned := apart
	if x.server.relation(x, last) == together {
		learned = untried // an assumption was wrong
	}
	x.relate(last, learned)
}

// relate records whether two runners fit beside each other.
func (x *runner) relate(y *runner, r relation) {
	x.server.relate(x.key.Options.Model, y.key.Options.Model, r)
}

// unite treats y as x from now on: a request had y's options, and the server did not load the model
// again for them. That is so, for example, if a request states the default value of an option.
func (q *Queue) unite(x, y *runner, now time.Time) {
	s := x.server
	if s.byKey[y.key] != y || y.busy > 0 || len(s.byKey) >= maxKeys {
		return
	}
	for key, z := range s.byKey {
		if z == y {
			s.byKey[key] = x
		}
	}
	s.runners = slices.DeleteFunc(s.runners, func(z *runner) bool { return z == y })
	if y.want > x.want {
		x.want, x.learner = y.want, y.learner
		x.resize()
	}
	q.move(y, func(*item) *runner { return x }, now)
}

// part undoes unite: the model has been loaded again for the options of key, so that other options
// are other runners.
func (q *Queue) part(x *runner, key Runner, now time.Time) {
	s := x.server
	if s.byKey[key] != x {
		return // it has been undone
	}
	before := len(s.byKey)
	maps.DeleteFunc(s.byKey, func(_ Runner, z *runner) bool { return z == x })
	x.key = key
	s.byKey[key] = x
	s.parted[key.Options.Model] = true
	if len(s.byKey) < before {
		q.move(x, func(it *item) *runner { return q.runner(s, it.key, now) }, now)
	}
}

// move moves a runner's backlog to others.
func (q *Queue) move(x *runner, to func(*item) *runner, now time.Time) {
	for _, it := range x.waiters() {
		if y := to(it); y != x {
			q.shift(it, y, now)
		}
	}
}
