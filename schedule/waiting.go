package schedule

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Those who wait are told when they are expected to begin, which is an estimate: the work that goes
// before theirs (tokens to evaluate and to generate), at the pace at which the runner's lanes have
// done such work so far; after what its lanes are busy with; and after a load if there must be
// one. What goes before is taken to be what is more urgent, and of the same rank what the deficits
// let go earlier (see class.refill), in order of arrival within a round. Which prefixes lanes hold,
// and what comes later, changes that order; Estimates says by how much it was wrong so far.

// Waits is what waits at one moment.
type Waits struct {
	Total     int
	By        map[Priority]Waiting
	First     []Waiter // as many as were asked for, those first that are expected to go first
	Estimates Estimates
}

// Waiter is one request that waits.
type Waiter struct {
	Place         int // among those that wait for the same runner, from 1 on
	Client        string
	Program, Flow uint64
	Upstream      uint16 // whose runner it waits for now
	Options       prefix.Options
	Priority      Priority
	Sparse        bool // it goes before others of its priority
	Age           time.Duration
	Tokens        int // of its prompt, estimated

	Start      time.Duration // until it is expected to begin, where StartKnown
	StartKnown bool
}

// Estimates says how wrong the estimates were that were made when requests began to wait, of those
// that were granted.
type Estimates struct {
	Count    uint64
	Waited   time.Duration // the sum of what they waited
	Absolute time.Duration // the sum of the errors' sizes
	Late     time.Duration // the sum of what they waited longer, less what they waited shorter
	// Within counts the errors that were at most as large as each of EstimateBounds, as Prometheus'
	// buckets do.
	Within [len(EstimateBounds)]uint64
}

// EstimateBounds are for Estimates.Within.
var EstimateBounds = [...]time.Duration{
	100 * time.Millisecond, 300 * time.Millisecond, time.Second, 3 * time.Second, 10 * time.Second,
	30 * time.Second, 100 * time.Second, 300 * time.Second,
}

// accuracy collects Estimates, for a scheduler and for that which Aside returns.
type accuracy struct {
	mu  sync.Mutex
	sum Estimates
}

// add takes in how long a request waited for which so long was expected.
func (a *accuracy) add(expected, waited time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	late := waited - expected
	a.sum.Count++
	a.sum.Waited += waited
	a.sum.Late += late
	a.sum.Absolute += late.Abs()
	for i, bound := range EstimateBounds {
		if late.Abs() <= bound {
			a.sum.Within[i]++
		}
	}
}

func (a *accuracy) get() Estimates {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sum
}

// Waiting returns what waits: how many requests, and the first of them, at most so many. It holds
// the scheduler's lock only while it copies what it sorts.
func (s *Scheduler) Waiting(most int) Waits {
	s.mu.Lock()
	now := time.Now()
	rows := s.queue.waiters(now)
	aside := s.aside
	s.mu.Unlock()
	if aside != nil {
		aside.mu.Lock()
		rows = append(rows, aside.queue.waiters(now)...)
		aside.mu.Unlock()
	}
	by := map[Priority]Waiting{Interactive: {}, Normal: {}, Batch: {}}
	for _, r := range rows {
		w := by[r.rank.priority()]
		by[r.rank.priority()] = Waiting{w.Requests + 1, max(w.Oldest, now.Sub(r.arrived))}
	}
	return Waits{
		Total: len(rows), By: by, First: inOrder(rows, most, now), Estimates: s.accuracy.get(),
	}
}

// row is what decides when a request goes. Of its item only that is read, without the lock, which
// does not change while it waits.
type row struct {
	*item
	pace  *pace
	round int
}

// inOrder sorts the rows, and tells the first ones their place and start.
func inOrder(rows []row, most int, now time.Time) []Waiter {
	slices.SortFunc(rows, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.round, b.round),
			a.arrived.Compare(b.arrived), cmp.Compare(a.id, b.id))
	})
	first := make([]Waiter, 0, min(most, len(rows)))
	for _, r := range rows[:min(most, len(rows))] {
		p := r.pace
		p.place++
		w := Waiter{
			Place: p.place, Client: r.who.client, Program: r.who.program, Flow: r.who.flow,
			Upstream: p.upstream, Options: r.key.Options, Priority: r.rank.priority(),
			Sparse: r.rank == sparse, Age: now.Sub(r.arrived), Tokens: r.tokens,
		}
		w.Start, w.StartKnown = p.start(p.ahead)
		p.ahead += p.rates.work(r.fresh, 1)
		first = append(first, w)
	}
	return first
}

// waiters returns a row for each request that waits.
func (q *Queue) waiters(now time.Time) []row {
	rows := make([]row, 0, q.Len())
	for _, s := range q.servers {
		for _, x := range s.runners {
			if x.waiting == 0 {
				continue
			}
			p := q.paceOf(x, now)
			for r := range ranks {
				rows = x.classes[r].waiters(rows, p)
			}
		}
	}
	return rows
}

// waiters adds a row for each request of the class that waits.
func (c *class) waiters(rows []row, p *pace) []row {
	for _, a := range c.backlogged {
		fresh, n := 0, 0
		a.fifo.front() // puts the list in order
		for _, it := range a.fifo.items {
			if it.waits {
				rows = append(rows, row{it, p, c.roundOf(a, &p.rates, fresh, n)})
				fresh, n = fresh+it.fresh, n+1
			}
		}
	}
	return rows
}

// roundOf returns in which round from now on a client is served what comes after so much else of
// its own: after so many requests, of which so many tokens are to be evaluated.
func (c *class) roundOf(a *account, r *rates, fresh, requests int) int {
	cost := float64(fresh) + float64(requests)*fairWeight*r.generated()
	over := int(cost/a.weight) - a.deficit
	if over < 0 {
		return 0
	}
	return 1 + over/max(c.quantum, 1)
}

// accountsMost is how many clients are looked at when a request begins to wait. More are taken to
// be like those.
const accountsMost = 64

// aheadOf returns how much work goes before a request that has just begun to wait.
func (q *Queue) aheadOf(it *item) float64 {
	x, c, a := it.runner, it.class, it.account
	sum := x.rates.work(a.fresh-it.fresh, a.waiting-1)
	for r := range it.rank {
		sum += x.rates.work(x.classes[r].fresh, x.classes[r].fifo.live)
	}
	round := c.roundOf(a, &x.rates, a.fresh-it.fresh, a.waiting-1)
	stride := 1 + (len(c.backlogged)-1)/accountsMost
	for i := 0; i < len(c.backlogged); i += stride {
		if b := c.backlogged[i]; b != a {
			owed := float64(b.deficit+round*c.quantum) * b.weight
			sum += float64(stride) * min(max(owed, 0), x.rates.work(b.fresh, b.waiting))
		}
	}
	return sum
}

// estimate returns how long a request that has just begun to wait is expected to; false where
// nothing has been learned that tells.
func (q *Queue) estimate(id uint64, now time.Time) (time.Duration, bool) {
	it := q.items[id]
	return q.paceOf(it.runner, now).start(q.aheadOf(it))
}

// pace is how fast a runner does what waits for it.
type pace struct {
	upstream uint16
	rates    rates
	known    bool
	per      float64         // ns that a lane takes for a token of work
	free     []time.Duration // until each lane falls free, the first one first
	base     time.Duration   // until any lane may begin

	place int     // for inOrder: how many requests have one …
	ahead float64 // … and their work
}

// paceOf returns the pace of a runner.
func (q *Queue) paceOf(x *runner, now time.Time) *pace {
	p := &pace{upstream: x.server.index, rates: x.rates, per: x.rates.perWork()}
	p.known = p.per > 0 && !x.server.away
	if !p.known {
		return p
	}
	for _, l := range x.lanes {
		p.free = append(p.free, l.remaining(&x.rates, now))
	}
	slices.Sort(p.free)
	if len(p.free) == 0 {
		p.free = []time.Duration{0}
	}
	switch load := x.rates.load(); {
	case !x.resident:
		p.base = x.vacates(now) + load
	case x.loading() && x.busy > 0:
		p.base = max(0, load-now.Sub(x.since))
	}
	return p
}

// perWork returns how many ns a lane takes for a token of work.
func (r *rates) perWork() float64 {
	if r.pace.under == 0 {
		return 0
	}
	return r.pace.over / r.pace.under
}

// remaining returns how long a lane is expected to be busy still.
func (l *lane) remaining(r *rates, now time.Time) time.Duration {
	if l.item == nil {
		return 0
	}
	return max(0, time.Duration(r.work(l.item.fresh, 1)*r.perWork())-now.Sub(l.item.granted))
}

// vacates returns how long it takes at most, as far as is known, until what cannot be loaded beside
// the runner has made room: it serves what is under way, and what waits for it for no longer than a
// turn.
func (x *runner) vacates(now time.Time) (longest time.Duration) {
	for y := range x.rivals() {
		if !y.resident {
			continue
		}
		var busy time.Duration
		for _, l := range y.lanes {
			busy = max(busy, l.remaining(&y.rates, now))
		}
		backlog := 0.0
		for i := range y.classes {
			backlog += y.rates.work(y.classes[i].fresh, y.classes[i].fifo.live)
		}
		turn := time.Duration(backlog * y.rates.perWork() / float64(max(y.want, 1)))
		longest = max(longest, busy+min(turn, max(longestTurn, y.rates.load())))
	}
	return longest
}

// start returns when a request begins that has so much work before it: when the lanes, as they fall
// free, have done that. false: nothing is known.
func (p *pace) start(ahead float64) (time.Duration, bool) {
	if !p.known {
		return 0, false
	}
	left, at, lanes := ahead*p.per, float64(p.free[0]), 1
	for ; lanes < len(p.free); lanes++ {
		gap := (float64(p.free[lanes]) - at) * float64(lanes)
		if gap >= left {
			break
		}
		left, at = left-gap, float64(p.free[lanes])
	}
	at += left/float64(lanes) + float64(p.base)
	return time.Duration(min(at, float64(math.MaxInt64/2))), true
}
