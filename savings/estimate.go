package savings

import (
	"math"
	"slices"
)

// guess is an estimate.
type guess struct {
	reused int
	known  bool      // probable enough to be told
	sure   bool      // … and to be learned from
	best   candidate // the one that would have been the most; of no tokens if there is none
	picked candidate // the one that was
}

const (
	// enough is how probable a verdict must be to be told. From 0.8 on it makes little difference:
	// most are either clear or in great doubt.
	enough = 0.9
	// certain is how probable a verdict must be to be learned from. Lower, the first mistakes on a
	// busy machine make the next ones more probable.
	certain = 0.97
	// vague is how wrong a figure may be on the average, as a part of the prompt, to be told.
	vague = 0.1
)

// estimate infers how many tokens were reused, or says that it cannot.
//
// Each prompt that the engine saw lately, and that the new one has a beginning in common with, is a
// candidate for what was reused, beside nothing at all. The time that the evaluation took tells
// which of them it was: a candidate predicts it from the tokens left to evaluate and the speed that
// was learned. Slots and host caches need not be known: the prior is how often a prompt was still
// warm after so many others, which is learned, too.
//
// A time is no proof. Nothing makes a machine faster than it can be, so a short time is strong
// evidence for a hit; but other work can make any hit take as long as a cold prompt, so a long time
// is weak evidence against one. The figure is told only if its verdict is probable enough after
// all.
func (e *engine) estimate(r *Request, o Outcome, loaded bool) guess {
	if o.Total == 0 {
		return guess{}
	}
	list := distinct(e.possible(r, o.Total, loaded), o.Total)
	if len(list) == 0 && (loaded || e.fresh) {
		return guess{known: true, sure: true}
	}
	list = append(list, candidate{rank: none})
	g, ev := guess{best: list[0]}, r.evidence(o)
	if !e.guessed.known() {
		if !e.fresh {
			return g // it may be warm from before, for all we know
		}
		ev.ms = 0 // it says nothing yet: what is expected must do
	}
	chances := e.weigh(ev, list, r.upstream.Old)
	picked, agreed, wrong := likeliest(list, chances, o.Total)
	g.picked, g.reused = picked, picked.tokens
	g.known = agreed >= enough && wrong <= vague
	g.sure = agreed >= certain && wrong <= vague/3 && ev.ms > 0
	if ev.ms == 0 {
		return g
	}
	d, idle := e.deviation(ev, o.Total-g.reused), 0.0
	if d.told {
		idle = min(0, d.busier) // the speed was learned on a busier machine
	}
	if e.fresh || d.slower-idle > -math.Ln2 {
		e.observe(ev, list, chances, g.sure)
		return g
	}
	// It took less than all that is known to be in common explains: the engine holds what was sent by
	// others, or aborted.
	n := max(int(ev.ms/(e.guessed.perToken(o.Total)*math.Exp(idle))), 1)
	g.reused, g.sure = max(g.reused, o.Total-n), false
	g.known = d.told || e.busy.jitter() < math.Ln2
	return g
}

// possible returns what may have been reused, the most tokens first.
func (e *engine) possible(r *Request, total int, loaded bool) (list []candidate) {
	if !loaded {
		list = e.candidates(r, total)
	}
	if n := min(r.attached, total-1); n > 0 {
		list = append(list, candidate{tokens: n, share: 1})
		slices.SortFunc(list, mostTokens)
	}
	return list
}

// likeliest returns the most probable candidate, how probable its verdict is, and how wrong its
// tokens are on the average, as a part of the prompt's.
func likeliest(list []candidate, chances []float64, total int) (
	c candidate, agreed, wrong float64) {
	best := 0
	for i := range chances {
		if chances[i] > chances[best] {
			best = i
		}
	}
	c = list[best]
	for i, other := range list {
		if VerdictOf(total, other.tokens) == VerdictOf(total, c.tokens) {
			agreed += chances[i]
		}
		wrong += chances[i] * float64(abs(other.tokens-c.tokens)) / float64(total)
	}
	return c, agreed, wrong
}

// distinct leaves out candidates that say about the same as an earlier one that was seen more
// lately.
func distinct(list []candidate, total int) []candidate {
	const most = 12
	var kept []candidate
	for _, c := range list {
		same := func(k candidate) bool { return abs(k.tokens-c.tokens)*50 <= total }
		if i := slices.IndexFunc(kept, same); i < 0 {
			if len(kept) < most {
				kept = append(kept, c)
			}
		} else if c.rank < kept[i].rank {
			kept[i].rank = c.rank
		}
	}
	return kept
}

// evidence is what a request's times tell of how many of its tokens were evaluated.
type evidence struct {
	total  int     // tokens of the prompt
	ms     float64 // how long the evaluation took; 0: not known
	decode float64 // ms for each token of the answer; 0: not known
	beside float64 // tokens of the prompts that the model was given meanwhile
}

func (r *Request) evidence(o Outcome) evidence {
	return evidence{total: o.Total, ms: r.engine.observed(o), decode: r.decode(o), beside: r.beside}
}

// observed returns how long the prompt's evaluation took, in ms; 0 where that is not known.
func (e *engine) observed(o Outcome) float64 {
	switch {
	case o.PromptEval > 0:
		return toMs(o.PromptEval)
	case o.TotalTime > 0:
		return 0 // a native answer that tells times tells this one, too
	case o.FirstByte > 0 && o.FirstByte < o.Duration:
		return toMs(o.FirstByte)
	case o.Duration > 0:
		return max(0.1, toMs(o.Duration)-e.decode.v*float64(o.Generated))
	}
	return 0
}

// decode returns how many ms each token of the answer took. 0: not known, or other requests were
// served in the same batches.
func (r *Request) decode(o Outcome) float64 {
	if o.Eval <= 0 || o.Generated < 2 || r.beside > 0 {
		return 0
	}
	return toMs(o.Eval) / float64(o.Generated)
}

// weigh returns how probable each candidate is. The list is sorted, the most tokens first, and ends
// with none.
func (e *engine) weigh(ev evidence, list []candidate, old bool) []float64 {
	const foreign = 0.01 // how often all of it is cold for a reason unknown to the ledger, at least
	chances := make([]float64, len(list))
	colder, sum := 1.0, 0.0 // colder: that all before were cold; the most that is warm is reused
	for i, c := range list {
		p := max(colder, foreign)
		if c.rank != none {
			warm := e.chance(c.rank, old) * c.share
			p, colder = colder*warm, colder*(1-warm)
		}
		if ev.ms > 0 {
			p *= e.likelihood(ev, ev.total-c.tokens)
		}
		chances[i] = p
		sum += p
	}
	for i := range chances {
		chances[i] /= sum
	}
	return chances
}

// deviation is how a time differs from what is learned, if so many tokens were evaluated. Its
// logarithms are natural.
type deviation struct {
	slower float64 // log of the time over the learned one
	busier float64 // log of how much slower the machine is, by the answer's tokens or else lately
	told   bool    // by the answer's tokens
	spread float64 // log of the longest time that is explained over the shortest
}

func (e *engine) deviation(ev evidence, evaluated int) deviation {
	least, decode := e.guessed.predict(evaluated, ev.total)
	most := least + e.guessed.perToken(ev.total)*ev.beside // what was evaluated in the same batches
	d := deviation{busier: e.busy.lately, spread: math.Log(most / least)}
	if ev.decode > 0 && decode > 0 {
		d.busier, d.told = believed(math.Log(ev.decode/decode)), true
	}
	switch {
	case ev.ms < least:
		d.slower = math.Log(ev.ms / least)
	case ev.ms > most:
		d.slower = math.Log(ev.ms / most)
	}
	return d
}

// believed bounds the log of how many times slower a machine is: a single absurd time must not undo
// what is known.
func believed(slower float64) float64 { return min(max(slower, -2), 3) }

// likelihood returns how probable the evidence is if so many tokens were evaluated, as a density of
// the logarithm of the time. It is a mixture: the machine is as fast as ever, or as busy as it
// seems to be now, or has a burst of other work, of any strength. The shares and widths fit what
// real servers did on a quiet machine, beside stress-ng, and beside bursts of it; a third more or
// less of them makes little difference (TestBusy).
func (e *engine) likelihood(ev evidence, evaluated int) float64 {
	const (
		faster = 0.02 // share of times too short: the speed was learned on a busier machine
		long   = 1.5  // mean of the log of how many times a burst slows down
	)
	d, scatter := e.deviation(ev, evaluated), e.busy.scatter()
	// The answer's tokens tell what the machine is doing now; what it did lately tells less, the
	// less the more that changes.
	now, burst, width := 0.65, 0.1, 0.35+0.25*math.Abs(d.busier)
	if !d.told {
		now, burst, width = 0.3, min(0.1+0.4*e.busy.jitter(), 0.6), width+0.3
	}
	p := (1 - now - burst - faster) * lopsided(d.slower, 0.3, scatter)
	p += now * lopsided(d.slower-d.busier, width, max(width, scatter))
	if over := d.slower - max(0, d.busier); over >= 0 {
		p += burst * math.Exp(-over/long) / long
	} else if d.slower < 0 {
		p += faster * 2 * math.Exp(2*d.slower)
	}
	return p / (1 + d.spread)
}

// lopsided is the density of a normal distribution whose deviation is another one on either side.
func lopsided(x, below, above float64) float64 {
	sigma := above
	if x < 0 {
		sigma = below
	}
	return math.Exp(-square(x/sigma)/2) / ((below + above) * math.Sqrt(math.Pi/2))
}

// busyness is what is known of how much other work slows the machine down. The zero value knows
// nothing.
type busyness struct {
	above  mean    // squares of by how much times were longer than explained, in natural logarithms
	lately float64 // log of how many times slower than learned the last evaluations were
	// Means of the same log over more evaluations, and of its square.
	level, squares mean
}

// scatter returns how far above what is explained times are.
func (b *busyness) scatter() float64 {
	const usual, samples = 0.4, 8 // of a quiet machine, and how many samples that counts for
	n := float64(b.above.n)
	return math.Sqrt((samples*square(usual) + n*b.above.v) / (samples + n))
}

// jitter returns how much the machine's speed changes from one request to another, as the deviation
// of a natural logarithm.
func (b *busyness) jitter() float64 {
	return math.Sqrt(max(0, b.squares.v-square(b.level.v)))
}

// observe takes in how busy the machine was. Every request counts, each of its candidates as much
// as it is probable: those that are in doubt are the ones that show that times scatter.
func (e *engine) observe(ev evidence, list []candidate, chances []float64, sure bool) {
	var above, busy float64
	told := false
	for i, c := range list {
		d := e.deviation(ev, ev.total-c.tokens)
		above += chances[i] * square(max(0, d.slower-max(0, d.busier)))
		if told = told || d.told; d.told {
			busy += chances[i] * d.busier
		} else {
			busy += chances[i] * d.slower
		}
	}
	busy = believed(busy)
	e.busy.above.add(min(above, 4))
	e.busy.level.add(busy)
	e.busy.squares.add(square(busy))
	if sure || told {
		e.busy.lately += (busy - e.busy.lately) / 2
	}
}
