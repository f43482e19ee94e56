package schedule

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Clients can see when their requests are expected to begin. That is an estimate: the work that
// goes before (tokens to evaluate and to generate), at the pace of the runner's lanes so far, after
// what its lanes are busy with, and after a load if one is needed. More urgent requests go before a
// request, and so do those of the same rank that the deficits let go earlier (see class.refill), in
// order of arrival within a round. The prompts in the lanes, and later requests, change that order;
// Estimates records the errors of the estimates so far.

// Waits are the waiting requests at one moment.
type Waits struct {
	Total     int
	By        map[Priority]Waiting
	First     []Waiter // up to the requested number, in their expected order
	Estimates Estimates
}

// Waiter is one waiting request.
type Waiter struct {
	Place         int // among the requests for the same runner, from 1
	Client        string
	Program, Flow uint64
	Upstream      uint16 // whose runner it waits for now
	Options       prefix.Options
	Priority      Priority
	Sparse        bool // goes before the others of its priority
	Age           time.Duration
	Tokens        int // of its prompt, estimated

	Start      time.Duration // until its expected start, if StartKnown
	StartKnown bool
}

// Estimates records the errors of the estimates that were made when requests began to wait, for the
// requests that were granted.
type Estimates struct {
	Count    uint64
	Waited   time.Duration // the sum of their waits
	Absolute time.Duration // the sum of the errors' sizes
	Late     time.Duration // sum of the waits beyond the estimates, minus the waits short of them
	// Within counts the errors that were at most as large as each of EstimateBounds, like
	// Prometheus' buckets.
	Within [len(EstimateBounds)]uint64
}

// EstimateBounds are for Estimates.Within.
var EstimateBounds = [...]time.Duration{
	100 * time.Millisecond, 300 * time.Millisecond, time.Second, 3 * time.Second, 10 * time.Second,
	30 * time.Second, 100 * time.Second, 300 * time.Second,
}

// accuracy collects Estimates, for a scheduler and for the one that Aside returns.
type accuracy struct {
	mu  sync.Mutex
	sum Estimates
}

// add records how long a request waited, and how long it was expected to.
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

// Waiting returns how many requests wait, and the first of them, up to a limit. It holds the
// scheduler's lock only while it copies what it sorts.
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

// row has the values that decide when a request goes. Without the lock, only fields of its item are
// read that do not change while it waits.
type row struct {
	*item
	pace  *pace
	round int
}

// inOrder sorts the rows, and sets the place and start of the first ones.
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

// waiters returns a row for each waiting request.
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

// waiters adds a row for each waiting request of the class.
func (c *class) waiters(rows []row, p *pace) []row {
	for _, a := range c.backlogged {
		fresh, n := 0, 0
		a.fifo.front() // sorts the list
		for _, it := range a.fifo.items {
			if it.waits {
				rows = append(rows, row{it, p, c.roundOf(a, &p.rates, fresh, n)})
				fresh, n = fresh+it.fresh, n+1
			}
		}
	}
	return rows
}

// roundOf returns the round, counted from now, in which a client's request is served if it comes
// after this many other requests of the client, with fresh tokens to evaluate in all.
func (c *class) roundOf(a *account, r *rates, fresh, requests int) int {
	cost := float64(fresh) + float64(requests)*fairWeight*r.generated()
	over := int(cost/a.weight) - a.deficit
	if over < 0 {
		return 0
	}
	return 1 + over/max(c.quantum, 1)
}

// accountsMost is how many clients are examined when a request begins to wait. The others are
// assumed to be like those.
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

// estimate returns how long a request that has just begun to wait is expected to wait; false if
// nothing has been learned for that.
func (q *Queue) estimate(id uint64, now time.Time) (time.Duration, bool) {
	it := q.items[id]
	return q.paceOf(it.runner, now).start(q.aheadOf(it))
}

// pace is how fast a runner works through its backlog.
type pace struct {
	upstream uint16
	rates    rates
	known    bool
	per      float64         // ns per token of work, for one lane
	free     []time.Duration // until each lane becomes free, in ascending order
	base     time.Duration   // until any lane may begin

	place int     // for inOrder: how many requests have a place …
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

// remaining returns how long a lane is expected to stay busy.
func (l *lane) remaining(r *rates, now time.Time) time.Duration {
	if l.item == nil {
		return 0
	}
	return max(0, time.Duration(r.work(l.item.fresh, 1)*r.perWork())-now.Sub(l.item.granted))
}

// vacates returns the longest time, as far as known, until the runners that do not fit beside this
// one have made room: they finish their running requests, and serve their backlogs for at most a
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

// start returns the time until a request begins that has this much work before it, as the lanes
// become free and do it; false if nothing is known.
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
