package schedule

import (
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// An idle runner with a free lane takes over requests that wait for the same model on another
// server. It takes first what fits what its lanes hold; then a whole subtree of the other's prefix
// tree in which no lane is busy, from the far end, which the other would reach last. It joins a
// prefix on which the other's lanes are busy only if that repays evaluating it once more. What is
// taken is granted at once, or follows what is, and is not taken often, so that no request goes to
// and fro.

// maxTaken is how many requests are taken over at once at most, so that no event takes long. The
// rest of a larger subtree fits what the lane then holds.
const maxTaken = 64

// maxMoves is how often a request is taken over at most.
const maxMoves = 4

// share lets servers take over requests from each other, after something has changed on one.
func (q *Queue) share(s *server, now time.Time) {
	for _, t := range q.servers {
		if t != s {
			q.takeOver(t, s, now)
		}
	}
	for _, t := range q.servers {
		if t != s {
			q.takeOver(s, t, now)
		}
	}
}

// takeOver lets a server take over the backlog of another one, as long as it has lanes for that.
func (q *Queue) takeOver(t, from *server, now time.Time) {
	if t.tier() > open || from.roaming == 0 || !t.room() {
		return
	}
	for i := 0; i < len(from.runners); i++ { // no runner is removed while it has a backlog
		y := from.runners[i]
		for y.roaming > 0 {
			x := q.idler(t, y.key.Options, now)
			if x == nil {
				break
			}
			before := q.count.Grants
			if !q.steal(x, y, now) {
				break
			}
			q.fill(t, now)
			if y.waiting == 0 && from.waiting > 0 {
				from.later(now) // something else may be loaded there
			}
			if t.roaming > 0 {
				t.later(now) // others may take that from there
			}
			if q.count.Grants == before { // another server's clients may come first there
				break
			}
		}
	}
}

// room reports whether a request might be granted on the server now.
func (s *server) room() bool {
	return len(s.runners) == 0 || slices.ContainsFunc(s.runners, func(x *runner) bool {
		return x.busy < x.want || !x.resident || s.lanes == Unlimited
	})
}

// idler returns the server's runner with some options, if it could serve a request now, otherwise
// nil. If it is not loaded, nothing else may be going on in its place. With unlimited lanes, a
// runner that serves nothing is idle.
func (q *Queue) idler(t *server, o prefix.Options, now time.Time) *runner {
	key := Runner{t.index, o}
	x := t.byKey[key]
	if x == nil || !x.resident {
		return q.loadable(t, key, now)
	}
	if t.lanes == Unlimited && x.busy > 0 || x.busy >= x.want && t.lanes != Unlimited || !q.admits(x, now) {
		return nil
	}
	return x
}

// loadable returns a runner that may be loaded on a server where nothing waits and nothing runs in
// its place, or nil.
func (q *Queue) loadable(t *server, key Runner, now time.Time) *runner {
	if t.waiting > 0 || slices.ContainsFunc(t.runners, func(z *runner) bool { return z.busy > 0 && t.excludes(z, key.Options) }) {
		return nil
	}
	x := q.runner(t, key, now)
	for _, z := range t.runners {
		if z != x && z.resident && t.excludes(z, key.Options) && !q.drained(z, x, now) {
			return nil
		}
	}
	return x
}

// loot is what a runner may take over.
type loot struct {
	it    *item
	lane  *lane // in which it will land
	owned *node // the part of it that the other runner's lanes are working on, as far as they will continue with it; nil: none
	again int   // tokens that are evaluated once more, or as much time in other ways
	share int   // tokens that the other server would have to do before it, if half of them were done elsewhere
}

// steal takes over the best loot from another runner, and reports whether there was any.
func (q *Queue) steal(x, y *runner, now time.Time) bool {
	t := q.theft(x, y, now)
	t.loading = int(x.server.loading(x, y.key.Options, &y.rates, now) / t.per)
	all, _ := t.pick()
	for i, it := range all {
		it.moves++
		it.joins = i == 0
		q.shift(it, x, now)
		q.count.Stolen++
	}
	return len(all) > 0
}

// theft is one decision about what to take over.
type theft struct {
	choice
	from    *runner
	per     time.Duration // per token
	loading int           // loading the model, as tokens
	away    bool          // for another proxy's server: see Give
	held    bool          // … and only what one of its lanes holds
}

func (q *Queue) theft(x, y *runner, now time.Time) *theft {
	r := &x.rates
	if r.prompt.under == 0 {
		r = &y.rates
	}
	return &theft{choice: choice{q: q, x: x, now: now}, from: y, per: max(r.perToken(), 1)}
}

// pick returns what is best taken over, of the most urgent that may be, and the lane for the first
// of it; nil if nothing is to be taken over now.
func (t *theft) pick() ([]*item, *lane) {
	for p := range ranks {
		k := &t.from.classes[p]
		if k.fifo.live == 0 {
			continue
		}
		k.refill()
		best := t.best(p, k)
		if best.it == nil {
			continue
		}
		if !t.repays(best) {
			return nil, nil
		}
		return t.group(best.it), best.lane
	}
	return nil, nil
}

// best returns the best loot of one priority.
func (t *theft) best(p rank, k *class) (best loot) {
	try := func(it *item) {
		if it == nil {
			return
		}
		land, tokens := t.landing(it)
		if t.blocked(it, land, tokens) {
			return
		}
		if l := t.loot(p, it, land, tokens); best.it == nil || l.better(best) {
			best = l
		}
	}
	for _, l := range t.x.lanes {
		try(t.fits(k, l))
	}
	if best.it != nil && best.again <= slack || t.held {
		return best
	}
	for n := &k.tree.root; n != nil; n = n.nextTaken() {
		tries := triesMost
		try(n.last(t, &tries))
		tries = triesMost
		try(n.ends.find(t.takes, &tries))
	}
	return best
}

// fits returns the request that shares the most with what a free lane holds, or nil.
func (t *theft) fits(k *class, l *lane) *item {
	if l.item != nil || l.tokens <= slack {
		return nil
	}
	it, tokens := k.best(l.holds)
	if it == nil || tokens <= slack || !t.takes(it) || t.held && !t.q.follows(it.who.client, tokens, l.tokens) {
		return nil
	}
	return it
}

// better reports whether it needs less re-evaluation than another loot, or relieves the other
// server more.
func (l loot) better(than loot) bool {
	return l.again < than.again-slack || l.again <= than.again+slack && l.share > than.share
}

// loot returns the costs and gains of taking a request over into a lane that has so many tokens of
// it.
func (t *theft) loot(p rank, it *item, land *lane, tokens int) loot {
	lost := int(t.q.displaced(t.x, land, tokens, t.now) / t.per)
	held := t.from.held(it.steps)
	there := max(tokensOf(it.steps[:held]), t.from.restorable(it.steps, held))
	here := max(tokens, t.x.restorable(it.steps, 0))
	l := loot{it: it, lane: land, again: max(0, there-here) + t.loading + lost}
	if n := it.owned(); n.parent != nil { // those lanes continue with it
		l.owned, l.share = n, t.from.backlog(n)
	} else {
		l.share = max(0, t.queued(p)-it.work) / 2
	}
	return l
}

// landing returns the lane in which a request will land, and how much it shares with that. With
// unlimited lanes, nothing is displaced.
func (t *theft) landing(it *item) (*lane, int) {
	if t.x.server.lanes == Unlimited {
		return &lane{}, tokensOf(it.steps[:t.x.held(it.steps)])
	}
	return t.x.landing(it)
}

// takes reports whether a request may be taken over by the runner. (If different options turned out
// to mean one runner on one server but not on the other, requests with other options stay.)
func (t *theft) takes(it *item) bool {
	if t.away {
		return it.moves < maxMoves && it.movable && it.key.Options == t.x.key.Options
	}
	s := t.x.server
	return it.moves < maxMoves && it.may(s) && s.byKey[Runner{s.index, it.key.Options}] == t.x
}

// queued returns how many tokens per lane the other server has to do before it reaches the end of
// its backlog.
func (t *theft) queued(p rank) int {
	var d time.Duration
	for _, y := range t.from.server.runners {
		d += y.ahead(p)
	}
	return int(d / t.per)
}

// repays reports whether taking something over is better than leaving it: because of its backlog,
// or once the lane has been idle for as long as it costs.
func (t *theft) repays(l loot) bool {
	if t.away && l.it.rank <= sparse { // it must not wait for longer there
		return l.again <= max(slack, t.queued(l.it.rank)-l.it.work)
	}
	if l.again <= slack || l.share >= l.again || l.it.rank <= sparse && t.loading == 0 {
		return true
	}
	at := t.from.joinable(l.it, l.owned, latest(l.lane.used, t.from.coveted), time.Duration(l.again)*t.per)
	if t.now.Before(at) {
		t.x.server.later(at)
		return false
	}
	return true
}

// group returns what is taken over together with a request: the backlog with the longest part of
// its prompt that no lane is working on, within bounds.
func (t *theft) group(it *item) []*item {
	n := it.node
	if n.busy > 0 || t.away && it.rank <= sparse { // of urgent ones, one for each lane
		return []*item{it}
	}
	for p := n.parent; p.parent != nil && p.busy == 0 && p.waiting <= maxTaken; p = n.parent {
		n = p
	}
	all := n.gather(t, []*item{it})
	slices.SortStableFunc(all, func(a, b *item) int { return a.arrived.Compare(b.arrived) })
	return all
}

// gather adds the backlog below a node that may be taken over to a list that has one of it.
func (n *node) gather(t *theft, list []*item) []*item {
	for _, it := range n.ends.items {
		if len(list) == maxTaken {
			return list
		}
		if it.waits && it != list[0] && t.takes(it) {
			list = append(list, it)
		}
	}
	for c := n.open.first; c != nil && len(list) < maxTaken; c = c.next {
		list = c.gather(t, list)
	}
	return list
}

// last returns the oldest request that may be taken over of the youngest subtree below a node in
// which no lane is busy, or nil if a few tries find none.
func (n *node) last(t *theft, tries *int) *item {
	for c := n.open.last; c != nil && *tries > 0; c = c.prev {
		if c.waiting > maxTaken {
			if it := c.last(t, tries); it != nil {
				return it
			}
		}
		if it := c.first(t.takes, tries); it != nil {
			return it
		}
	}
	return nil
}

// joinable returns when an idle lane is to join the lanes that are working on a request's prefix,
// although their backlog does not repay evaluating that once more: after as long as this takes,
// which is ski rental. If nothing has come since, those lanes are only finishing their backlog, and
// are joined if they seem stuck.
func (x *runner) joinable(it *item, n *node, idle time.Time, again time.Duration) time.Time {
	at := idle.Add(again)
	if n == nil || it.arrived.After(idle) || x.last.After(idle) {
		return at
	}
	for _, l := range x.lanes {
		for m := l.marks[it.rank]; m != nil; m = m.parent {
			if m == n {
				at = latest(at, l.item.granted.Add(2*again))
			}
		}
	}
	return at
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
