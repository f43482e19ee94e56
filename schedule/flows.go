package schedule

import (
	"math"
	"time"
)

// People go before scripts without anybody's saying so. A client's programs (Request.Program) and what each of them works on
// (Request.Flow) are flows. One that has nothing else waiting and has had little of the servers' time is sparse, and its request goes
// before those of backlogged flows, as in fq_codel (RFC 8290); CAKE's two levels keep a program with many prompts from
// looking like many people. Whoever goes on asking ceases to be sparse: Autellix (arXiv 2502.13965) counts attained service, too.

const (
	// sparsePart is which part of what the busiest program has had of late a sparse one has had at most; of the busiest
	// flow's, likewise.
	sparsePart = 0.25
	// flowMemory is the half-life of what a flow has had.
	flowMemory = 30 * time.Second
	// detour is which part of a program's time its others may spend on evaluating again what its own sparse flows pushed out of
	// slots: that is how much longer a batch takes beside a person who uses the same program.
	detour = 0.05
	// maxFlows is how many programs are remembered, and how many flows.
	maxFlows = 4096
)

// flow is a program, or one thing that a program works on.
type flow struct {
	had     float64 // seconds of lanes, of late …
	at      time.Time
	active  int     // requests that wait or are being served
	detours int     // … of those that went before others of the same program
	spent   float64 // what that cost, relative to what it may cost, as seconds of lanes
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
	flow    uint64 // 0: the program
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

// enter notes which flow a request belongs to, and has it go before others if that is sparse.
func (q *Queue) enter(it *item, r *Request, now time.Time) {
	if r.Program == 0 {
		return
	}
	it.program = q.flow(flowKey{r.Client, r.Program, 0})
	it.flow = q.flow(flowKey{r.Client, r.Program, max(r.Flow, 1)})
	if it.rank == Normal.rank() {
		switch {
		case it.program.active == 0 && it.program.sparse(q.busiest[0], now):
			it.rank = sparse
		case it.flow.active == 0 && it.flow.sparse(q.busiest[1], now) && it.program.detours == 0 && it.program.spent <= it.program.had:
			it.rank, it.detour = sparse, true
			it.program.detours++
		}
	}
	it.program.active++
	it.flow.active++
}

// sparse reports whether a flow has had little, compared with the one that has had the most.
func (f *flow) sparse(busiest *flow, now time.Time) bool {
	return busiest != nil && f.attained(now) < sparsePart*busiest.attained(now)
}

// exit notes that a request of a flow does not wait any more and is not being served: it has taken a lane for so long, and others have
// had so many tokens evaluated again for it.
func (q *Queue) exit(it *item, took time.Duration, now time.Time) {
	if it.program == nil {
		return
	}
	spent := 0.0
	if it.detour {
		it.program.detours--
		again := float64(it.displaced) * it.runner.rates.lostPart() * it.runner.rates.perToken().Seconds()
		spent = took.Seconds()/sparsePart + again/detour
	}
	it.program.active--
	it.flow.active--
	it.program.add(took.Seconds(), spent, now)
	it.flow.add(took.Seconds(), 0, now)
	for i, f := range []*flow{it.program, it.flow} {
		if b := q.busiest[i]; b == nil || f.attained(now) > b.attained(now) {
			q.busiest[i] = f
		}
	}
}
