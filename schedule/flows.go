package schedule

import (
	"math"
	"slices"
	"time"
)

// People go before scripts without anybody's saying so. Clients, a client's programs (Request.Program) and what each of them works on
// (Request.Flow) are flows. One that has nothing else waiting and has had little of the servers' time, beside what the busiest one has had
// and waits for, is sparse, and its request goes before those of backlogged flows, as in fq_codel (RFC 8290). Whoever goes on asking
// ceases to be sparse: Autellix (arXiv 2502.13965) counts attained service, too.
//
// What goes before others pays for it, all flows together: in time, so that a crowd of new names starves nobody, and in what has to be
// evaluated again since it was pushed out of a slot. What cannot be paid for yet waits in its place, and goes first later.

const (
	// sparsePart is which part of what the busiest flow has had and waits for a sparse one has had at most.
	sparsePart = 0.25
	// flowMemory is the half-life of what a flow has had.
	flowMemory = 30 * time.Second
	// aheadPart is how much time what goes before others takes, relative to what does not: a third of all, at most.
	aheadPart = 0.5
	// pushedPart is how much time the evaluation takes of what is pushed out of slots by what goes before others, likewise; and ownPart
	// of what is pushed out by what goes before others of its own program: who has many prompts is most likely no crowd of people.
	pushedPart = 0.15
	ownPart    = 0.12
	// fewFlows is how many things a program works on at most for one of them to be taken for a person's.
	fewFlows = 4
	// newcomers is how many requests go first on credit of clients that have had little.
	newcomers = 4
	// maxFlows is how many clients are remembered, how many programs, and how many flows.
	maxFlows = 4096
	// maxDenied is how many requests are looked at again.
	maxDenied = 256
)

// flow is a client, one of its programs, or one thing that a program works on.
type flow struct {
	had    float64 // seconds of lanes, of late …
	spent  float64 // … and what was spent on going before others, as seconds of what it is paid with
	at     time.Time
	active int // requests that wait or are being served …
	first  int // … of those that go before others
	flows  int // of a program: how many of its flows are active

	program *flow // of a client: the one that has had and waits for the most
}

// attained returns how many seconds of lanes a flow has had of late.
func (f *flow) attained(now time.Time) float64 { return f.had * faded(now.Sub(f.at)) }

func faded(d time.Duration) float64 { return math.Exp2(-float64(d) / float64(flowMemory)) }

// add charges a flow.
func (f *flow) add(seconds, spent float64, now time.Time) {
	fade := faded(now.Sub(f.at))
	f.had, f.spent, f.at = f.had*fade+seconds, f.spent*fade+spent, now
}

type flowKey struct {
	client  string
	program uint64
	flow    uint64 // 0: the program, or the client if that is 0, too
}

// flow returns a flow, made if need be.
func (q *Queue) flow(key flowKey) *flow {
	f, ok := q.flows.Get(key)
	if !ok {
		f = &flow{}
		q.flows.Add(key, f)
	}
	return f
}

// demand returns what a flow has had of late, and its backlog: one that asks for one thing at a time has none.
func (q *Queue) demand(f *flow, now time.Time) float64 {
	return f.attained(now) + float64(max(0, f.active-1))*q.typical()
}

// typical returns how many seconds a request takes.
func (q *Queue) typical() float64 {
	if q.took.n == 0 {
		return 1
	}
	return q.took.v
}

// enter notes which flow a request belongs to, and has it go before others if that is sparse.
func (q *Queue) enter(it *item, now time.Time) {
	who := it.who
	if who.program == 0 {
		return
	}
	it.owner = q.flow(flowKey{client: who.client})
	it.program = q.flow(flowKey{who.client, who.program, 0})
	it.flow = q.flow(flowKey{who.client, who.program, max(who.flow, 1)})
	if it.rank == normal && q.sparse(it, now) && !q.advance(it, now) && len(q.denied) < maxDenied {
		q.denied = append(q.denied, it.id)
	}
	it.owner.active++
	it.program.active++
	if it.flow.active++; it.flow.active == 1 {
		it.program.flows++
	}
	q.rank(it, now)
}

// rank notes the flows of a request if they are the busiest ones now.
func (q *Queue) rank(it *item, now time.Time) {
	if b := q.busiest; b == nil || q.demand(it.owner, now) > q.demand(b, now) {
		q.busiest = it.owner
	}
	if b := it.owner.program; b == nil || q.demand(it.program, now) > q.demand(b, now) {
		it.owner.program = it.program
	}
	if b := q.served; b == nil || it.flow.attained(now) > b.attained(now) {
		q.served = it.flow
	}
}

// little reports whether a client, or a program, has nothing else under way, and has had little beside
// the busiest one.
func (q *Queue) little(f, busiest *flow, now time.Time) bool {
	return f.active == 0 && f.attained(now)+q.typical() < sparsePart*q.demand(busiest, now)
}

// sparse reports whether a request that comes is one of a sparse flow. That is first of all one of a
// client that has had little beside the busiest one. Whoever makes many programs of what it does has no
// busy one, and none that is sparse beside it.
func (q *Queue) sparse(it *item, now time.Time) bool {
	prompt := q.served
	if q.busiest != nil {
		it.newcomer = q.little(it.owner, q.busiest, now)
		if it.newcomer || q.little(it.program, q.busiest.program, now) {
			return true
		}
	}
	// A program that has many prompts is no crowd: here it counts what they have had, not what waits.
	it.detour = prompt != nil && it.flow.active == 0 && it.program.flows <= fewFlows && it.flow.attained(now)+q.typical() < sparsePart*prompt.attained(now)
	return it.detour
}

// advance has a request go before others if that is paid for: false if it is not, or if one of its program does so already.
func (q *Queue) advance(it *item, now time.Time) bool {
	if it.program.first > 0 {
		return false
	}
	charge, least := q.typical()/aheadPart, 0.0
	switch {
	case it.newcomer: // a client with many sparse programs may have spent all that there was
		least = -newcomers * charge
	case it.detour:
		if q.again.n == 0 { // nobody knows yet what that costs: the first one goes on credit
			charge += q.typical() / 2 / ownPart
		} else {
			charge += q.again.v * q.lost / ownPart
			least = charge
		}
	}
	if q.ahead.spent+least > q.ahead.had {
		return false
	}
	it.rank, it.charged = sparse, charge
	it.program.first++
	q.ahead.add(0, it.charged, now)
	return true
}

// reconsider has those go before others that were denied that, as far as it is paid for now.
func (q *Queue) reconsider(now time.Time) {
	for i := 0; i < len(q.denied); i++ {
		it := q.items[q.denied[i]]
		if it != nil && it.waits && it.rank == normal {
			again := *it
			if it.runner.waiting == 1 || !q.advance(&again, now) {
				continue
			}
			q.requeue(it, &again, it.runner, now)
		}
		q.denied = slices.Delete(q.denied, i, i+1)
		i--
	}
}

// exit notes that a request of a flow does not wait any more and is not being served: it has taken a lane for so long, and others have
// had so many tokens evaluated again for it.
func (q *Queue) exit(it *item, took time.Duration, now time.Time) {
	if it.program == nil {
		return
	}
	it.owner.active--
	it.program.active--
	if it.flow.active--; it.flow.active == 0 {
		it.program.flows--
	}
	seconds := took.Seconds()
	if took > 0 {
		q.took.add(seconds)
		q.lost = it.runner.rates.lostPart()
	}
	if it.rank == sparse {
		it.program.first--
		spent := -it.charged
		if took > 0 {
			again, part := float64(it.displaced), pushedPart
			if it.detour { // the others of its kind have it evaluated again, too
				again, part = again+float64(max(0, it.tokens-it.expected)), ownPart
			}
			again *= it.runner.rates.perToken().Seconds()
			if it.detour {
				q.again.add(again)
			}
			// Of the time of all lanes together, as what others have had is counted.
			spent += seconds/float64(max(1, it.beside))/aheadPart + again*q.lost/part
		}
		q.ahead.add(0, spent, now)
	} else {
		q.ahead.add(seconds/float64(max(1, it.beside)), 0, now) // what is evaluated is evaluated one after the other
	}
	it.owner.add(seconds, 0, now)
	it.program.add(seconds, 0, now)
	it.flow.add(seconds, 0, now)
	q.rank(it, now)
}
