package schedule

import (
	"math"
	"slices"
	"time"
)

// mean is a moving mean. n is how many values it has, at most meanOver.
type mean struct {
	v float64
	n int
}

const meanOver = 16

// hint returns the same mean as if from a single value.
func (m mean) hint() mean { return mean{v: m.v, n: min(m.n, 1)} }

// sureHost is how often the host cache must have been observed before it is relied on in full: what
// it does for one prompt it does not do for each.
const sureHost = 3

func (m *mean) add(v float64) {
	m.n = min(m.n+1, meanOver)
	m.v += (v - m.v) / float64(m.n)
}

// ratio is a moving mean of ratios, weighted by their denominators.
type ratio struct{ over, under float64 }

func (r *ratio) add(over, under float64) {
	r.over, r.under = r.over*0.9+over, r.under*0.9+under
}

// rates are what has been learned of a runner's speed and its requests.
type rates struct {
	answer   mean  // tokens of an answer
	prompt   ratio // ns to evaluate a token of a prompt
	decode   ratio // ns to generate a token
	loadTime mean  // ns
	service  mean  // ns from a grant to the end
	pace     ratio // ns of that without loads, per token of its work
	around   mean  // … during which the engine did not work for it
	host     mean  // how often the host cache restored a prompt that no slot held any more …
	kept     mean  // … or that, or a slot for which there is no lane yet
}

// Assumptions before anything is known: roughly a small GPU.
const (
	firstPrompt = 500 * time.Microsecond
	firstWeight = 10
	firstAnswer = 32 // tokens
	firstLoad   = 2 * time.Second
)

// perToken returns how long evaluating a token of a prompt takes.
func (r *rates) perToken() time.Duration {
	if r.prompt.under == 0 {
		return firstPrompt
	}
	return time.Duration(r.prompt.over / r.prompt.under)
}

// evaluate returns how long evaluating this many tokens of a prompt takes.
func (r *rates) evaluate(tokens int) time.Duration { return time.Duration(tokens) * r.perToken() }

// weight returns how many tokens of a prompt take as long to evaluate as one takes to generate.
func (r *rates) weight() float64 {
	if r.prompt.under == 0 || r.decode.under == 0 {
		return firstWeight
	}
	return min(max(r.decode.over/r.decode.under/float64(max(r.perToken(), 1)), 1), 100)
}

// generated returns how many tokens an answer has.
func (r *rates) generated() float64 {
	if r.answer.n == 0 {
		return firstAnswer
	}
	return r.answer.v
}

// work returns the work of some requests, in tokens of a prompt, with this many tokens to evaluate.
func (r *rates) work(fresh, requests int) float64 {
	return float64(fresh) + float64(requests)*r.weight()*r.generated()
}

// load returns how long loading the model takes.
func (r *rates) load() time.Duration {
	if r.loadTime.n == 0 {
		return firstLoad
	}
	return time.Duration(r.loadTime.v)
}

// lostPart returns the part of a prompt that has to be evaluated again once its slot no longer
// holds it.
func (r *rates) lostPart() float64 {
	return 1 - r.host.v*float64(min(r.host.n, sureHost))/sureHost
}

// mostTransit is the longest time that a request is assumed to be on its way to a slot.
const mostTransit = 50 * time.Millisecond

// transit returns the likely maximum time until a granted request has reached its slot.
func (r *rates) transit() time.Duration { return min(time.Duration(2*r.around.v), mostTransit) }

// learn learns from how a request went.
func (r *rates) learn(it *item, res Result, evaluated int) {
	if res.Generated > 0 {
		r.answer.add(float64(res.Generated))
	}
	if res.Timed && evaluated > slack && res.Prompt > 0 && res.ReusedKnown {
		// In estimated tokens, which this is multiplied by.
		r.prompt.add(float64(res.Prompt), float64(evaluated)*float64(it.tokens)/float64(max(res.Total, 1)))
	}
	if res.Timed && res.Generated > 1 && res.Eval > 0 {
		r.decode.add(float64(res.Eval), float64(res.Generated))
	}
	if res.Loaded && res.Load > 0 {
		r.loadTime.add(float64(res.Load))
	}
}

// restored returns 1 if a prompt that no slot held any more was restored all the same, and 0 if
// not; false if that cannot be told.
func (it *item) restored(r Result) (kept float64, told bool) {
	if it.hosted == 0 || !r.ReusedKnown || r.Loaded {
		return 0, false
	}
	if it.scale(r) >= it.expected+(it.hosted-it.expected)/2 {
		return 1, true
	}
	return 0, true
}

// returns are the habits of a client: how long after an answer the request came that continues it.
type returns struct {
	gaps   [gapBuckets]float64 // by gapBounds
	missed float64             // none came, or much later
	kept   mean                // the part of what had been served that the next request shared
}

const gapBuckets = 29

// gapBounds are from 1 ms to 16 s, two for each power of two.
var gapBounds = func() (bounds [gapBuckets]time.Duration) {
	for i := range bounds {
		bounds[i] = time.Duration(math.Round(math.Pow(2, float64(i)/2) * float64(time.Millisecond)))
	}
	return bounds
}()

// firstHabits are the assumption before anything is known: every other client is a script that
// continues at once.
func firstHabits() returns {
	h := returns{missed: 1}
	h.gaps[9] = 1 // 23 ms
	return h
}

func (h *returns) total() float64 {
	n := h.missed
	for _, g := range h.gaps {
		n += g
	}
	return n
}

// fade makes room for new observations.
func (h *returns) fade() {
	if h.total() < 32 {
		return
	}
	for i := range h.gaps {
		h.gaps[i] /= 2
	}
	h.missed /= 2
}

func (h *returns) came(gap time.Duration) {
	h.fade()
	if i, _ := slices.BinarySearch(gapBounds[:], gap); i < gapBuckets {
		h.gaps[i]++
	} else {
		h.missed++
	}
}

func (h *returns) miss() {
	h.fade()
	h.missed++
}

// unmiss takes back a miss: the request came after all.
func (h *returns) unmiss() { h.missed = max(0, h.missed-1) }

// part returns the part of what a client was served that its next request is expected to share. For
// an unknown client it is the mean of all.
func (h *returns) part(all *returns) float64 {
	switch {
	case h.kept.n > 0:
		return h.kept.v
	case all.kept.n > 0:
		return all.kept.v
	}
	return 0.9
}

// hold returns how long to hold a lane for a client that is expected to come back, so that the mean
// gain, less the wait, is largest; 0 if it is not worth it. It is never longer than loss, which is
// what is gained if the client comes. The habits of all clients count as much as two answers of
// this one.
func (h *returns) hold(all *returns, loss time.Duration) time.Duration {
	total, others := h.total()+2, all.total()
	came, waited, best, at := 0.0, 0.0, 0.0, 0
	var hold time.Duration
	for i := range gapBuckets {
		t := gapBounds[i]
		if t > loss {
			break
		}
		p := (h.gaps[i] + 2*all.gaps[i]/others) / total
		came += p
		waited += p * float64(t)
		if gain := came*float64(loss) - waited - (1-came)*float64(t); gain > best {
			best, hold, at = gain, t, i
		} else if gain > 0.75*best && i <= at+2 { // waiting a little more costs little, and the next request may come a little later than all before
			hold = t
		}
	}
	return hold
}

// client returns a client's habits.
func (q *Queue) client(name string) *returns {
	h, ok := q.clients.Get(name)
	if !ok {
		h = &returns{}
		q.clients.Add(name, h)
	}
	return h
}

// returned learns which of the requests served before an arriving request continues, and after how
// long.
func (q *Queue) returned(x *runner, it *item, now time.Time) {
	v, tokens := x.closest(it.steps)
	if v == nil || v.client != it.who.client || v.state == visitReturned || it.arrived.Before(v.at) || tokens <= slack || 2*tokens < v.tokens {
		return
	}
	h := q.client(v.client)
	follows := q.follows(v.client, tokens, v.tokens)
	h.kept.add(float64(tokens) / float64(v.tokens))
	q.habits.kept.add(float64(tokens) / float64(v.tokens))
	if !follows {
		return
	}
	if v.state == visitMissed {
		h.unmiss()
		q.habits.unmiss()
	}
	v.state = visitReturned
	h.came(now.Sub(v.at))
	q.habits.came(now.Sub(v.at))
}

// follows reports whether a request that shares this many tokens with a served prompt is the one
// expected of its client, rather than another one with, say, the same system prompt.
func (q *Queue) follows(client string, shared, served int) bool {
	return shared > slack && float64(shared) >= 0.9*q.client(client).part(&q.habits)*float64(served)
}

// closest returns the recently served prompt that shares the most with another, the last of
// several, and how many tokens that is.
func (x *runner) closest(steps []step) (*visit, int) {
	var best *visit
	most := 0
	for i := len(x.visits) - 1; i >= 0; i-- {
		if n := shared(steps, x.visits[i].steps); n > most {
			best, most = x.visits[i], n
		}
	}
	return best, most
}

// visited remembers a served request.
func (q *Queue) visited(x *runner, it *item, generated int, now time.Time) {
	v := &visit{steps: it.steps, tokens: it.tokens, client: it.account.name, at: now, generated: generated}
	// Of prompts that continue each other the last one is enough, so that many prefixes are
	// remembered.
	if w, tokens := x.closest(v.steps); w != nil && q.follows(v.client, tokens, w.tokens) {
		x.visits = slices.DeleteFunc(x.visits, func(o *visit) bool { return o == w })
	}
	if len(x.visits) >= maxVisits {
		if old := x.visits[0]; old.state == visitOpen {
			q.client(old.client).miss()
			q.habits.miss()
		}
		copy(x.visits, x.visits[1:])
		x.visits = x.visits[:len(x.visits)-1]
	}
	x.visits = append(x.visits, v)
	it.lane.visit = v
}

// displaced returns how many tokens of a prompt that no lane holds any more the server held, in
// case the request landed there, if those are many more than its lane holds; otherwise 0.
func (x *runner) displaced(it *item, lands int) int {
	v, tokens := x.closest(it.steps)
	if v == nil || tokens < lands+hostWorth {
		return 0
	}
	for _, l := range x.lanes {
		// A busy slot cannot have been used. While the number of slots is being learned, a lane may
		// have no slot.
		if l.item != nil && (x.given() > 0 || x.learner.ceiling) {
			continue
		}
		if shared(it.steps, l.holds) > lands+hostWorth {
			return 0
		}
	}
	return tokens
}

// scale returns how many tokens were reused, in the units in which the prompt was estimated rather
// than the server's.
func (it *item) scale(r Result) int { return r.Reused * it.tokens / max(r.Total, 1) }
