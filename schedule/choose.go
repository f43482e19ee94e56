package schedule

import (
	"math"
	"time"
)

// The rules by which a free lane takes its next request, in this order:
//
//	 1. A request that has waited longer than Config.MaxWait goes first, if the lane has done
//	    some work since it last took such a request. So does the one that has waited longest
//	    once patience requests per lane went before it.
//	 2. If a lane was left to find out whether the host cache restores what it loses (6), the
//	    request that shows it goes next.
//	 3. The most urgent rank goes first: interactive, sparse (flows.go), normal, batch. Within a
//	    rank, clients that have had their share wait for those that have not (fair.go).
//	 4. The request that shares the most with the lane continues its prefix.
//	 5. But the request that has waited longest goes, whatever it shares, once the lane has
//	    worked for others for so many times what leaving its prefix costs: quantum, or
//	    agedQuantum if the request has waited longestWait more than in order of arrival. Where
//	    the host cache restores what is lost, leaving costs nothing, and requests go in order of
//	    arrival. A system prompt on which another lane works, too, prevents none of this.
//	 6. While it is uncertain whether the host cache restores, a lane is left up to mostTrials
//	    times for a request that has waited a third of longestWait too long.
//	 7. A lane is held for the client that it is warm for, at most as long as evaluating again
//	    what that client would find takes (held).
//	 8. A request that would land where another one belongs that is on its way waits until that
//	    has arrived (overtakes).
//	 9. If no free lane shares anything, the prefix is opened whose requests have waited longest
//	    and on which no other lane works. A prefix on which another lane works is joined if its
//	    backlog repays evaluating it once more, or if nothing else waits (join).
//
// Which models are loaded is decided before that (runners.go), and the number of lanes
// independently of it (slots.go).

// pump grants what may be granted after something has changed on a server. Other servers may be
// affected.
func (q *Queue) pump(s *server, now time.Time) {
	q.fill(s, now)
	if q.roaming > 0 {
		q.share(s, now)
	}
}

// fill grants what may be granted on a server, and records when to look again.
func (q *Queue) fill(s *server, now time.Time) {
	s.wake = time.Time{}
	if s.waiting == 0 {
		return
	}
	if s.away {
		q.hold(s, now)
		return
	}
	if s.lanes == Unlimited {
		q.release(s, now)
		return
	}
	for _, x := range s.order(now) {
		if q.admits(x, now) {
			q.serve(x, now)
			q.try(x, now)
		}
	}
}

// later records when the server is to be looked at again.
func (s *server) later(at time.Time) {
	if s.wake.IsZero() || at.Before(s.wake) {
		s.wake = at
	}
}

// serve grants requests of a runner as long as there are lanes for them.
func (q *Queue) serve(x *runner, now time.Time) {
	for x.waiting > 0 && x.busy < x.want {
		if x.idle.IsZero() {
			x.idle = now
		}
		c := choice{q: q, x: x, now: now}
		it, l, how := c.choose()
		if it == nil {
			return
		}
		q.grant(it, l, how, now)
	}
	x.idle = time.Time{}
}

// choice is one decision about what to grant next.
type choice struct {
	q      *Queue
	x      *runner
	now    time.Time
	racing bool // what was to be granted waits for others to arrive: nothing less urgent takes its lane
}

// reason is why a request was chosen.
type reason uint8

const (
	byMatch reason = iota // it shares the most with the lane
	byOpening
	byJoining
	byAge
	byTrial // to find out whether the host cache keeps what the lane loses: the next request for that shows it
)

// choose returns what to grant now, and the lane in which it will land, or nil if every waiting
// request is better off waiting.
func (c *choice) choose() (*item, *lane, reason) {
	x := c.x
	if it := x.oldest(); c.q.cfg.MaxWait > 0 && it != nil {
		at := it.arrived.Add(c.q.cfg.MaxWait)
		if c.now.Before(at) {
			x.server.later(at)
		} else if l, tokens := x.landing(it); l.since >= agedQuantum*x.lost(l, tokens) {
			return it, l, byAge
		}
	}
	if it := x.oldest(); x.passed >= patience*x.want && it == x.eldest {
		l, _ := x.landing(it)
		return it, l, byAge
	}
	if it, l := c.probe(); it != nil {
		return it, l, byMatch
	}
	for p := range ranks {
		k := &x.classes[p]
		if k.fifo.live == 0 {
			continue
		}
		k.refill()
		if it, l, how := c.front(k); it != nil {
			return it, l, how
		}
		if it, l := c.match(k); it != nil {
			return it, l, byMatch
		}
		if it, l, how := c.join(p, k); it != nil {
			return it, l, how
		}
		if c.racing {
			break
		}
	}
	return nil, nil, 0
}

// forgone returns how many of a lane's tokens other waiting requests would have to evaluate again,
// if so many are kept. Few tokens count as none.
func (x *runner) forgone(l *lane, kept int) int {
	most := 0
	for p := range x.classes {
		k := &x.classes[p]
		if k.fifo.live == 0 {
			continue
		}
		n, tokens, _ := k.tree.walk(l.holds)
		for n.waiting == 0 {
			n = n.parent
		}
		most = max(most, min(tokens, n.depth()))
	}
	if most <= kept+slack {
		return 0
	}
	return most
}

// probe returns the request that continues one for which a lane was not held, to find out whether
// the host cache has kept that. It is as urgent as any other.
func (c *choice) probe() (*item, *lane) {
	v := c.x.probing
	p := c.x.top()
	if v == nil || c.x.classes[p].tree == nil {
		return nil, nil
	}
	n, tokens, _ := c.x.classes[p].tree.walk(v.steps)
	tries := triesMost
	it := n.first((*item).owed, &tries)
	if it == nil || n.busy > 0 || !c.q.follows(v.client, tokens, v.tokens) {
		return nil, nil
	}
	c.x.probing = nil
	l, _ := c.x.landing(it)
	return it, l
}

// keeps reports whether a lane keeps most of what its client is expected to reuse, if so many
// tokens of it are kept.
func (q *Queue) keeps(l *lane, tokens int) bool {
	if l.visit == nil {
		return tokens > slack && 2*tokens >= l.tokens
	}
	return q.follows(l.visit.client, tokens, l.tokens)
}

// lost returns how many of a lane's tokens other waiting requests have to evaluate again, if so
// many are kept.
func (x *runner) lost(l *lane, kept int) int {
	return int(float64(x.forgone(l, kept)) * x.rates.lostPart())
}

// match returns the request that shares the most with a free lane and does not belong to another
// lane, and that lane.
func (c *choice) match(k *class) (*item, *lane) {
	var best *item
	var at *lane
	most := -1
	for _, l := range c.x.lanes {
		if l.item != nil {
			continue
		}
		it, tokens := k.best(l.holds)
		if it == nil || tokens <= most {
			continue
		}
		land, tokens := c.x.landing(it)
		if c.blocked(it, land, tokens) {
			continue
		}
		best, at, most = it, land, tokens
	}
	return best, at
}

// front returns the request that has waited longest, and its lane, if that has done enough for
// others. Only the lane in which it will land counts: any other free lane loses nothing.
func (c *choice) front(k *class) (*item, *lane, reason) {
	it := k.oldest()
	if it == nil {
		return nil, nil, 0
	}
	l, kept := c.x.landing(it)
	// What another lane works on is left to that lane, unless this lane holds it as well, such as a
	// system prompt that all requests begin with.
	if it.owned().depth() > kept+slack {
		return nil, nil, 0
	}
	if best, _ := k.best(l.holds); best == nil || best == it { // join or match chooses
		return nil, nil, 0
	}
	how, turned := c.turned(l, it, kept)
	if !turned || c.overtakes(it, l, kept) {
		return nil, nil, 0
	}
	if how == byTrial {
		c.x.probing = l.visit
		c.x.trials++
	}
	return it, l, how
}

// turned reports whether a lane has worked for others long enough for front to go, whatever it is,
// of which so many tokens would be kept: long enough that the re-evaluation is a small part of that
// work.
func (c *choice) turned(l *lane, front *item, kept int) (reason, bool) {
	x := c.x
	lost := x.lost(l, kept)
	if at := c.q.loss(x, l, kept); at > lost && c.holds(front, l, kept) {
		lost = at
	}
	late := c.now.Sub(front.arrived) - front.due
	switch {
	case l.work >= quantum*lost:
		return byMatch, true
	case late >= c.q.longest && l.since >= agedQuantum*lost:
		return byAge, true
	case late >= longestWait/3 && lost >= hostWorth && x.tests(l):
		return byTrial, true
	}
	return 0, false
}

// tests reports whether a lane may be left to find out whether the host cache keeps what it loses:
// there is no evidence against that so far, and too little for it. Answers that do not report the
// reuse provide no evidence, however often it is tried.
func (x *runner) tests(l *lane) bool {
	host := x.rates.host
	open := host.n == 0 || host.v == 1 && host.n < sureHost
	return open && !x.server.longest && x.trials < mostTrials && x.probing == nil && l.visit != nil
}

// oldest returns the request that has waited longest, of clients that have not had their share, or
// nil.
func (k *class) oldest() *item {
	front := k.fifo.front()
	if front == nil || front.account.deficit > 0 {
		return front
	}
	front = nil
	for _, a := range k.backlogged {
		if it := a.fifo.front(); a.deficit > 0 && (front == nil || it.arrived.Before(front.arrived)) {
			front = it
		}
	}
	return front
}

// owed reports whether a request's client has not had its share.
func (it *item) owed() bool { return it.account.deficit > 0 }

// best returns the request that shares the most with a prompt, of those that share nothing more
// with what a busy lane works on, and how many tokens it shares.
func (k *class) best(holds []step) (*item, int) {
	n, tokens, whole := k.tree.walk(holds)
	tries := triesMost
	if !whole {
		if n.busy == 0 {
			if it := n.first((*item).owed, &tries); it != nil {
				return it, tokens
			}
		}
		n = n.parent
	}
	for ; n != nil; n = n.parent {
		if it := n.first((*item).owed, &tries); it != nil {
			return it, min(tokens, n.depth())
		}
	}
	return nil, 0
}

// owned returns the last node on a request's path on which a lane is busy.
func (it *item) owned() *node {
	n := it.node
	for n.busy == 0 && n.parent != nil {
		n = n.parent
	}
	return n
}

// landing returns the lane in which the engine will put a request that is sent now, and how many
// tokens the two share. It is the free lane that holds the most of the prompt, if that is enough of
// it, otherwise the least recently used one. Before 0.30 it is always the one that holds the most,
// and the first of several; all that were ever used hold what every prompt of the model begins
// with.
func (x *runner) landing(it *item) (*lane, int) {
	var best, lru *lane
	most := 0
	for _, l := range x.lanes {
		if l.item != nil {
			continue
		}
		n := shared(it.steps, l.holds)
		if n > most || best == nil && x.server.longest && len(l.holds) > 0 {
			best, most = l, n
		}
		if lru == nil || !x.server.longest && l.used.Before(lru.used) {
			lru = l
		}
	}
	if best != nil && (x.server.longest || float64(most) > similarity*float64(it.tokens)) {
		return best, most
	}
	return lru, shared(it.steps, lru.holds)
}

// blocked reports whether a request must not take the lane, since that is held for an expected
// request, or since it might take another request's slot.
func (c *choice) blocked(it *item, l *lane, tokens int) bool {
	return c.overtakes(it, l, tokens) || c.holds(it, l, tokens)
}

// holds reports whether a lane, of which so many tokens would be kept, is held against a request.
func (c *choice) holds(it *item, l *lane, tokens int) bool {
	return c.q.held(c.x, l, it.rank, c.x.rates.evaluate(c.q.loss(c.x, l, tokens)), c.now)
}

// overtakes reports whether a request that finds nothing in its lane might reach the engine before
// one that was granted earlier, and take that one's slot. To prevent it, the request waits at most
// as long as the other would have to evaluate again. Interactive requests do not wait.
func (c *choice) overtakes(it *item, l *lane, tokens int) bool {
	x := c.x
	if float64(tokens) > similarity*float64(it.tokens) || it.rank == urgent {
		return false
	}
	wait, before := false, c.now.Before(l.used.Add(mostTransit))
	for _, o := range x.lanes {
		before = before && o != l
		if o.item == nil || float64(o.item.expected)*x.rates.lostPart() <= slack {
			continue
		}
		preferred := !o.item.freed.After(l.used) // by the engine, as it was used less recently
		if x.server.longest {
			preferred = before // as it comes first
		}
		if at := o.item.granted.Add(min(x.rates.transit(), x.rates.evaluate(o.item.expected))); preferred && c.now.Before(at) {
			x.server.later(at)
			wait = true
		}
	}
	c.racing = c.racing || wait
	return wait
}

// loss returns how many tokens the client that a lane is warm for would have to evaluate again, if
// so many tokens of the lane are kept.
func (q *Queue) loss(x *runner, l *lane, kept int) int {
	if l.visit == nil {
		return 0
	}
	part := q.client(l.visit.client).part(&q.habits)
	expected := part * float64(l.tokens)
	if part > 0.97 { // a chat: the answer is part of the next prompt
		expected += float64(l.visit.generated)
	}
	return int(max(0, expected-float64(kept)) * (1 - x.rates.kept.v))
}

// held reports whether a lane is held, against a request of the given priority, for the next
// request of the client that it is warm for: if that is likely to come soon enough, compared with
// evaluating the prompt, or loading the model, again. This is ski rental: the lane is never held
// longer than that takes.
func (q *Queue) held(x *runner, l *lane, against rank, loss time.Duration, now time.Time) bool {
	v := l.visit
	if l.item != nil || v == nil || v.state != visitOpen || !l.wanted || against < l.class {
		return false
	}
	if a := x.classes[l.class].accounts[v.client]; a != nil && a.deficit <= 0 && x.classes[l.class].positive > 0 {
		return false
	}
	h := q.client(v.client)
	for_ := h.hold(&q.habits, loss)
	if for_ == 0 {
		return false
	}
	if until := v.at.Add(for_); now.Before(until) {
		x.server.later(until)
		return true
	}
	if !l.reported {
		l.reported = true
		q.count.HoldsExpired++
	}
	v.state = visitMissed
	h.miss()
	q.habits.miss()
	return false
}

// join returns a request whose prefix another lane is working on, if evaluating it once more is
// better than waiting: when next to nothing is to be evaluated; when the backlog would keep those
// lanes busy for longer than that takes; or when a lane has been idle for as long as it takes. The
// latter is ski rental again: it takes at most twice the time of the best possible decision.
func (c *choice) join(p rank, k *class) (*item, *lane, reason) {
	var best *item
	var at *lane
	least, most := -1, 0
	try := func(it *item, owned *node) {
		land, tokens := c.x.landing(it)
		if c.blocked(it, land, tokens) {
			return
		}
		again, share := c.again(owned, tokens), c.x.backlog(owned)
		if least >= 0 && (again > least+slack || again > least-slack && share <= most) {
			return
		}
		if p == urgent || c.worth(it, owned, again, share) {
			best, at, least, most = it, land, again, share
		}
	}
	for n := &k.tree.root; n != nil; n = n.nextTaken() {
		tries := triesMost
		if it := n.first((*item).owed, &tries); it != nil && n.busy > 0 {
			try(it, n)
		}
	}
	for i := 0; best == nil && i < len(k.backlogged); i++ {
		if a := k.backlogged[i]; a.deficit > 0 {
			it := a.fifo.front()
			try(it, it.owned())
		}
	}
	how := byJoining
	if least <= slack {
		how = byOpening
	}
	return best, at, how
}

// again returns how many tokens are evaluated once more if a prefix on which another lane works is
// put on a lane that holds so many tokens of it.
func (c *choice) again(owned *node, tokens int) int {
	n := max(0, owned.depth()-tokens)
	switch {
	case !c.x.copied():
		// A lane that would be idle otherwise relies on the first sign of a host cache.
		return int(float64(n) * (1 - c.x.rates.host.v))
	case c.x.evaluated(owned):
		return 0
	}
	return n
}

// nextTaken returns the next node that has waiting requests and busy lanes, in depth-first order.
func (n *node) nextTaken() *node {
	if n.taken.first != nil {
		return n.taken.first
	}
	for n.parent != nil {
		if n.next != nil {
			return n.next
		}
		n = n.parent
	}
	return nil
}

// backlog returns the waiting work below a node in tokens, per lane that is busy there, with one
// more lane.
func (x *runner) backlog(n *node) int { return int(x.below(n)) / (n.busy + 1) }

// below returns the waiting work below a node, in tokens.
func (x *runner) below(n *node) float64 {
	return x.rates.work(n.tokens-n.waiting*n.depth(), n.waiting)
}

// worth reports whether a lane should evaluate so many tokens again rather than leave a backlog to
// the lanes that are busy there.
func (c *choice) worth(it *item, n *node, again, backlog int) bool {
	// Where the result of another lane's evaluation is available once its request has ended, the
	// backlog is no reason: all of it may be served then.
	if again <= slack || it.joins || backlog >= again && !c.x.copied() {
		return true
	}
	takes, owned := c.x.rates.evaluate(again), n
	if !it.roams() {
		// With one server, an idle lane loses nothing by joining, unless one of those others is
		// done before that.
		if c.generating(it, n) > takes {
			return true
		}
		n = nil
	}
	at := c.x.joinable(it, n, c.x.idle, c.patience(it, owned, takes))
	if c.now.Before(at) {
		c.x.server.later(at)
		return false
	}
	return true
}

// patience returns how long a lane is idle before it evaluates once more, for time, what other
// lanes are working on. Where it can have the result as soon as one of them has ended, it waits
// longer while that is being evaluated, and as usual once an answer has begun.
func (c *choice) patience(it *item, n *node, takes time.Duration) time.Duration {
	if !c.x.copied() {
		return takes
	}
	for _, l := range c.x.lanes {
		if l.item != nil && !l.item.begun.IsZero() && shared(it.steps, l.holds) >= n.depth() {
			return max(takes, l.item.begun.Add(takes).Sub(c.x.idle))
		}
	}
	return max(copiedPatience*takes, copiedLeast)
}

// evaluated reports whether a request that was evaluated up to a node has ended, so that a lane
// that is busy there found its result.
func (x *runner) evaluated(n *node) bool {
	for _, l := range x.lanes {
		if l.item != nil && l.item.expected+slack >= n.depth() && shared(l.item.steps, l.holds) >= n.depth() {
			return true
		}
	}
	return false
}

// generating returns how long the first of a node's busy lanes to become free is expected to
// generate until then: the engine evaluates one prompt after the other, but beside what is
// generated.
func (c *choice) generating(it *item, n *node) time.Duration {
	first := time.Duration(math.MaxInt64)
	for _, l := range c.x.lanes {
		if l.item == nil || shared(it.steps, l.holds) < n.depth() {
			continue
		}
		evaluated := l.item.granted.Add(c.x.rates.evaluate(l.item.tokens - l.item.expected))
		first = min(first, l.item.granted.Add(time.Duration(c.x.rates.service.v)).Sub(latest(evaluated, c.now)))
	}
	return first
}

// grant sends a request to the lane in which it will land.
func (q *Queue) grant(it *item, l *lane, how reason, now time.Time) {
	x := it.runner
	tokens := shared(it.steps, l.holds)
	keeps := q.keeps(l, tokens)
	oldest := x.oldest() == it
	x.overtaken(it)
	q.counts(it, l, how, keeps)

	q.unwait(it, true)
	it.lane, it.granted, it.from, it.freed, it.expected = l, now, now, l.used, tokens
	it.turn = x.before(it, now)
	it.displaced, it.hosted = max(0, l.tokens-tokens), x.displaced(it, tokens)
	x.asked = now
	if x.first.IsZero() {
		x.first = now
	}
	x.busy++
	it.beside = x.busy
	x.running += it.work
	if x.busy >= x.want {
		x.full = now
	}
	it.replaced, x.replaced = x.replaced, nil
	for y := range x.rivals() {
		if y.waiting > 0 {
			y.skipped++
		}
	}

	if !keeps {
		l.work = 0
	}
	if how == byAge || oldest {
		l.since = 0
	}
	l.take(it, now)
	evaluated := max(it.tokens-tokens, 1)
	it.cost, it.takes = evaluated+int(fairWeight*x.rates.generated()), int(x.rates.work(evaluated, 1))
	it.account.running++
	it.class.charge(it.account, it.cost)
	l.charge(it.takes)
	q.grants = append(q.grants, Placement{ID: it.id, Upstream: x.server.index, Options: x.key.Options, Lane: l.name, Expected: tokens, Waited: now.Sub(it.arrived)})
}

// overtaken counts the requests that go before the one that has waited longest.
func (x *runner) overtaken(by *item) {
	oldest := x.oldest()
	if oldest == by {
		return
	}
	if x.eldest != oldest {
		x.eldest, x.passed = oldest, 0
	}
	x.passed++
}

// counts counts the grant of a request that is about to be granted.
func (q *Queue) counts(it *item, l *lane, how reason, keeps bool) {
	if v := l.visit; v != nil && l.wanted && v.state == visitReturned && !l.reported && keeps && it.arrived.After(v.at) {
		q.count.HoldsHit++
	}
	q.count.Grants++
	switch {
	case how == byAge:
		q.count.Aged++
	case how == byJoining:
		q.count.Joined++
	case keeps:
		q.count.Continued++
	default:
		q.count.Opened++
	}
}

// take lets the lane serve a request.
func (l *lane) take(it *item, now time.Time) {
	l.before, l.holds, l.tokens, l.item, l.used = l.holds, it.steps, it.tokens, it, now
	for p := range it.runner.classes {
		if t := it.runner.classes[p].tree; rank(p) == it.rank {
			l.marks[p] = it.node
		} else if t != nil {
			l.mark(rank(p), t)
		}
	}
}

// charge counts work that the lane does, in tokens.
func (l *lane) charge(tokens int) {
	l.work += tokens
	l.since += tokens
}
