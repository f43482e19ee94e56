package schedule

import (
	"math"
	"slices"
	"time"
)

// People go before scripts without having to ask for it. Clients, a client's programs
// (Request.Program) and what each of them works on (Request.Flow) are flows. A flow is sparse if it
// has nothing else waiting and has had little of the servers' time, compared with what the busiest
// flow has had and waits for. Its request goes before those of backlogged flows, as in fq_codel
// (RFC 8290). A flow that keeps asking ceases to be sparse: Autellix (arXiv 2502.13965) counts
// attained service, too.
//
// Going first has to be paid for, by all sparse flows together: in time, so that a crowd of new
// names starves nobody, and in what has to be evaluated again because it was evicted from a slot. A
// request that cannot be paid for yet waits in its place, and goes first later.

const (
	// sparsePart is the part of what the busiest flow has had and waits for that a sparse one has
	// had at most.
	sparsePart = 0.25
	// flowMemory is the half-life of what a flow has had.
	flowMemory = 30 * time.Second
	// aheadPart bounds the time of requests that go first, relative to the time of the others: a
	// third of all.
	aheadPart = 0.5
	// pushedPart likewise bounds the time of re-evaluating what requests that go first evict from
	// slots; ownPart is for what they evict of their own program: a program with many prompts is
	// most likely not a crowd of people.
	pushedPart = 0.15
	ownPart    = 0.12
	// fewFlows is the largest number of things that a program works on for one of them to be taken
	// for a person's.
	fewFlows = 4
	// newcomers is how many requests of clients that have had little go first on credit.
	newcomers = 4
	// maxFlows bounds the remembered clients, the programs, and the flows.
	maxFlows = 4096
	// maxDenied bounds the requests that are reconsidered.
	maxDenied = 256
)

// flow is a client, one of its programs, or one thing that a program works on.
type flow struct {
	had    float64 // recent seconds of lanes …
	spent  float64 // … and what going first has cost, in seconds
	at     time.Time
	active int // requests that wait or are being served …
	first  int // … and those of them that go first
	flows  int // of a program: how many of its flows are active

	program *flow // of a client: the program that has had and waits for the most
}

// attained returns how many seconds of lanes a flow has had recently.
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

// flow returns a flow, adding it if necessary.
func (q *Queue) flow(key flowKey) *flow {
	f, ok := q.flows.Get(key)
	if !ok {
		f = &flow{}
		q.flows.Add(key, f)
	}
	return f
}

// demand returns what a flow has had recently, plus its backlog; a flow with one request at a time
// has none.
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

// enter records the flow of a request, and lets the request go first if that flow is sparse.
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

// rank records the flows of a request if they are now the busiest ones.
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

// little reports whether a client, or a program, has no other requests in progress, and has had
// little compared with the busiest one.
func (q *Queue) little(f, busiest *flow, now time.Time) bool {
	return f.active == 0 && f.attained(now)+q.typical() < sparsePart*q.demand(busiest, now)
}

// sparse reports whether an arriving request belongs to a sparse flow. First of all its client must
// have had little compared with the busiest one. A client that splits its work into many programs
// has no busy one, and none that is sparse in comparison.
func (q *Queue) sparse(it *item, now time.Time) bool {
	prompt := q.served
	if q.busiest != nil {
		it.newcomer = q.little(it.owner, q.busiest, now)
		if it.newcomer || q.little(it.program, q.busiest.program, now) {
			return true
		}
	}
	// A program with many prompts is not a crowd: here, what they have had counts, not what waits.
	it.detour = prompt != nil && it.flow.active == 0 && it.program.flows <= fewFlows && it.flow.attained(now)+q.typical() < sparsePart*prompt.attained(now)
	return it.detour
}

// advance lets a request go first if that is paid for. It returns false if it is not, or if another
// request of its program goes first already.
func (q *Queue) advance(it *item, now time.Time) bool {
	if it.program.first > 0 {
		return false
	}
	charge, least := q.typical()/aheadPart, 0.0
	switch {
	case it.newcomer: // a client with many sparse programs may have spent everything
		least = -newcomers * charge
	case it.detour:
		if q.again.n == 0 { // the cost is not known yet: the first one goes on credit
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

// reconsider lets denied requests go first, as far as that is paid for now.
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

// exit records that a request of a flow neither waits nor is served any more, how long it had a
// lane, and how many tokens others had to evaluate again for it.
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
			// Of the time of all lanes together, as for what others have had.
			spent += seconds/float64(max(1, it.beside))/aheadPart + again*q.lost/part
		}
		q.ahead.add(0, spent, now)
	} else {
		q.ahead.add(seconds/float64(max(1, it.beside)), 0, now) // prompts are evaluated one after the other
	}
	it.owner.add(seconds, 0, now)
	it.program.add(seconds, 0, now)
	it.flow.add(seconds, 0, now)
	q.rank(it, now)
}
