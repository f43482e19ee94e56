package savings

import (
	"math"
	"slices"
)

// guess is an estimate.
type guess struct {
	reused int
	known  bool      // probable enough to be reported
	sure   bool      // … and to learn from
	best   candidate // the largest possible one; without tokens if there is none
	picked candidate // the most probable one
}

const (
	// enough is how probable a verdict must be to be reported. From 0.8 on, the value makes little
	// difference: most verdicts are either clear or very doubtful.
	enough = 0.9
	// certain is how probable a verdict must be to learn from it. With a lower value, the first
	// mistakes on a busy machine make further ones more probable.
	certain = 0.97
	// vague is how wrong a reported figure may be on average, as a fraction of the prompt.
	vague = 0.1
)

// estimate infers how many tokens were reused, or reports that it cannot.
//
// Each recent prompt of the engine that shares a beginning with the new one is a candidate for what
// was reused; another candidate is that nothing was. The evaluation time decides between them: each
// candidate predicts it from the number of tokens left to evaluate and the learned speed. Slots and
// host caches need not be known: the prior is how often a prompt was still warm after so many
// others, which is learned, too.
//
// A time is no proof. Nothing makes a machine faster than it can be, so a short time is strong
// evidence for a hit; but other work can make any hit take as long as a cold prompt, so a long time
// is weak evidence against one. The figure is reported only if its verdict is probable enough.
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
			return g // the prompt may be warm from before the ledger began
		}
		ev.ms = 0 // no speed is learned yet, so only the priors count
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
	// The time was shorter than any known common prefix explains: the engine holds prompts that
	// others sent, or that were aborted.
	n := max(int(ev.ms/(e.guessed.perToken(o.Total)*math.Exp(idle))), 1)
	g.reused, g.sure = max(g.reused, o.Total-n), false
	g.known = d.told || e.busy.jitter() < math.Ln2
	return g
}

// possible returns the candidates for what was reused, most tokens first.
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

// likeliest returns the most probable candidate, the probability of its verdict, and the mean error
// of its tokens, as a fraction of the prompt's.
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

// distinct drops candidates that predict about the same as an earlier one, which gets the better
// rank.
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

// evidence is what a request's times say about how many of its tokens were evaluated.
type evidence struct {
	total  int     // tokens of the prompt
	ms     float64 // how long the evaluation took; 0: unknown
	decode float64 // ms for each token of the answer; 0: unknown
	beside float64 // tokens of the prompts that the model was given meanwhile
}

func (r *Request) evidence(o Outcome) evidence {
	return evidence{total: o.Total, ms: r.engine.observed(o), decode: r.decode(o), beside: r.beside}
}

// observed returns how long the prompt's evaluation took, in ms; 0 if that is unknown.
func (e *engine) observed(o Outcome) float64 {
	switch {
	case o.PromptEval > 0:
		return toMs(o.PromptEval)
	case o.TotalTime > 0:
		return 0 // a native answer with times would have this one, too
	case o.FirstByte > 0 && o.FirstByte < o.Duration:
		return toMs(o.FirstByte)
	case o.Duration > 0:
		return max(0.1, toMs(o.Duration)-e.decode.v*float64(o.Generated))
	}
	return 0
}

// decode returns how many ms each token of the answer took. It is 0 if that is unknown, or if other
// requests were served in the same batches.
func (r *Request) decode(o Outcome) float64 {
	if o.Eval <= 0 || o.Generated < 2 || r.beside > 0 {
		return 0
	}
	return toMs(o.Eval) / float64(o.Generated)
}

// weigh returns the probability of each candidate. The list is sorted, most tokens first, and ends
// with the candidate of rank none.
func (e *engine) weigh(ev evidence, list []candidate, old bool) []float64 {
	const foreign = 0.01 // at least how often everything is cold for a reason unknown to the ledger
	chances := make([]float64, len(list))
	// colder is the probability that all candidates before were cold: the largest warm one is
	// reused.
	colder, sum := 1.0, 0.0
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

// deviation compares a time with the learned one, given how many tokens were evaluated. Its
// logarithms are natural.
type deviation struct {
	slower float64 // log of the time divided by the learned one
	// Log of how much slower the machine is: by the answer's tokens, or else as it was lately.
	busier float64
	told   bool    // whether busier is by the answer's tokens
	spread float64 // log of the longest explained time divided by the shortest
}

func (e *engine) deviation(ev evidence, evaluated int) deviation {
	least, decode := e.guessed.predict(evaluated, ev.total)
	// most includes what was evaluated in the same batches.
	most := least + e.guessed.perToken(ev.total)*ev.beside
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

// believed bounds the log of how many times slower a machine is, so that a single absurd time does
// not spoil what was learned.
func believed(slower float64) float64 { return min(max(slower, -2), 3) }

// likelihood returns the probability of the evidence, as a density of the logarithm of the time,
// given how many tokens were evaluated. It is a mixture: the machine is as fast as ever, or as busy
// as it seems to be now, or has a burst of other work of any strength. The shares and widths fit
// real servers on a quiet machine, beside stress-ng, and beside bursts of it; a third more or less
// of them makes little difference (TestBusy).
func (e *engine) likelihood(ev evidence, evaluated int) float64 {
	const (
		faster = 0.02 // share of times too short: the speed was learned on a busier machine
		long   = 1.5  // mean of the log of the factor by which a burst slows down
	)
	d, scatter := e.deviation(ev, evaluated), e.busy.scatter()
	// The answer's tokens show how busy the machine is now. How busy it was lately says less, and
	// the less the more that varies.
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

// lopsided is the density of a normal distribution with different deviations on its two sides.
func lopsided(x, below, above float64) float64 {
	sigma := above
	if x < 0 {
		sigma = below
	}
	return math.Exp(-square(x/sigma)/2) / ((below + above) * math.Sqrt(math.Pi/2))
}

// busyness is how much other work slows the machine down. The zero value means that nothing is
// known.
type busyness struct {
	above  mean    // squares of the log by which times were longer than explained
	lately float64 // log of how many times slower than learned the last evaluations were
	// Means of the same log over more evaluations, and of its square.
	level, squares mean
}

// scatter returns by how much times exceed what is explained, as a deviation of the logarithm.
func (b *busyness) scatter() float64 {
	const usual, samples = 0.4, 8 // on a quiet machine, and how many samples it counts for
	n := float64(b.above.n)
	return math.Sqrt((samples*square(usual) + n*b.above.v) / (samples + n))
}

// jitter returns how much the machine's speed varies from one request to another, as the deviation
// of a natural logarithm.
func (b *busyness) jitter() float64 {
	return math.Sqrt(max(0, b.squares.v-square(b.level.v)))
}

// observe records how busy the machine was. Every request counts, and each of its candidates by its
// probability: the doubtful ones are those that show how times scatter.
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
