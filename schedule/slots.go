package schedule

import (
	"slices"
	"time"
)

// The number of a runner's slots is found out by granting one request more than there are lanes,
// and seeing whether it waits inside Ollama.
//
// 1. A stream that has begun has a slot. If more streams have one than there are lanes, there are
// as many lanes as that, and more are tried at once: up to half as many as there are.
//
// 2. If a tried stream has not begun after twice the time that its evaluation should take, with
// nothing else to be evaluated before it, there is no slot for it.
//
// 3. An answer that comes whole reveals its slot at its end: by the time that it spent on nothing
// (Result.Queue), or under /v1 because it would have been generated faster than any other had it
// begun when another one ended. Nothing is known before, so some are tried at once at first, and
// later as many as there are lanes. The same holds for a stream that began only after another one
// had ended.
//
// 4. If there is no other slot, one more is tried only after a pause that doubles each time, up to
// a minute, or when the model or the server has been loaded anew.
//
// 5. Lanes are given up when requests wait, or do not find what their slots should hold.
//
// An attempt in vain has cost at most one prefix: the request is assumed to have landed where the
// first one ended.

// learner is the knowledge about a runner's number of slots.
type learner struct {
	idle    mean      // ns that Ollama takes beside waiting, from requests that were alone
	fastest float64   // recent maximum of work per ns that a request was served
	hasty   bool      // … in which there may be a load
	pace    float64   // recent maximum of ns until the first byte per token to be evaluated
	rough   bool      // … in which there may be a load
	began   time.Time // when the last stream began
	ready   time.Time // when an answer first began or ended since the model was loaded
	doubt   int       // evidence that requests wait with these lanes, less evidence against it
	tried   int       // … with one more
	ceiling bool      // one more lane was one too many
	seen    int       // requests since then
	pause   int       // how many of them until one more is tried …
	since   time.Time // … unless longestPause has passed since then
}

const (
	// leastLead is how long the current requests must have run before one more is tried, so that
	// they do not reach Ollama in the wrong order.
	leastLead = 5 * time.Millisecond
	// leastGap is the least time until another request ends for a wait to count as evidence: less
	// is lost in the noise.
	leastGap = 8 * time.Millisecond
	// leastStuck is how long nothing must have been granted before one more is tried despite an
	// unfinished attempt.
	leastStuck = time.Second
	firstPause = 16 // requests
	lastPause  = 4096
	// longestPause limits pauses in time: slots that seemed to be missing may have been in use by a
	// client outside the proxy that has left.
	longestPause = time.Minute
	// patient is for how many pauses one more is tried only if it costs nothing should it wait, and
	// patientTime the same in pauses of the longest length.
	patient     = 16
	patientTime = 5
	// blind is how many requests that reveal nothing before they end are tried at once, as long as
	// none has ended.
	blind = 3
	// late is after how many times its expected evaluation time an answer is late.
	late = 2
	// toldWithin is how long after a model's first request its engine is expected to report its
	// slots.
	toldWithin = 10 * time.Second
	// leastAnswer is the least number of generated tokens whose pace is evidence.
	leastAnswer = 8
	// leastWeight is the least number of prompt tokens that generating one token counts as.
	leastWeight = 5
)

// verdict is whether a request waited inside Ollama. Its number is its weight.
type verdict int

const (
	no      verdict = 0
	unknown verdict = -1 // for an attempt it counts as maybe: see conclude
	maybe   verdict = 4
	likely  verdict = 8
	yes     verdict = 16
)

// try grants requests although all lanes are busy, if it is time for that.
func (q *Queue) try(x *runner, now time.Time) {
	a := &x.learner
	for x.given() == 0 && x.waiting > 0 && x.busy >= x.want && x.busy < maxLearned {
		x.overdue(now)
		if a.ceiling && (a.pauses(1, 1, now) || x.tries > 0) {
			return
		}
		if at := x.triedAt(); now.Before(at) {
			x.server.later(at)
			return
		}
		x.lanes = append(x.lanes, &lane{name: x.unused()})
		c := choice{q: q, x: x, now: now}
		it, l, how := c.choose()
		if it == nil || a.ceiling && a.pauses(patient, patientTime, now) && c.costs(it) {
			x.lanes = x.lanes[:len(x.lanes)-1]
			return
		}
		it.tries = true
		x.tries++
		q.grant(it, l, how, now)
	}
}

// triedAt returns the time from which one more may be tried.
func (x *runner) triedAt() time.Time {
	told := x.first // the time from which it is known that no engine reports its slots
	if x.server.tells {
		told = told.Add(toldWithin)
	}
	if at := x.triedSince(); at.After(told) {
		return at
	}
	return told
}

// triedSince is triedAt, regardless of what engines report.
func (x *runner) triedSince() time.Time {
	if x.tries < x.mostTries() {
		each := time.Duration(x.rates.service.v) / time.Duration(2*x.want)
		return x.full.Add(max(leastLead, min(x.rates.transit(), each)))
	}
	// Otherwise one stream of minutes would block all other requests.
	stuck := max(leastStuck, 2*time.Duration(x.rates.service.v))
	if x.loading() {
		stuck += agedQuantum * x.rates.load()
	}
	return x.full.Add(stuck)
}

// mostTries returns how many are tried at once: few if they reveal their slots before they end,
// otherwise some.
func (x *runner) mostTries() int {
	if x.roaming > 0 {
		return 1 // others may be served elsewhere
	}
	for _, l := range x.lanes {
		if l.item != nil && l.item.tries && !l.item.told && l.item.streams {
			return max(1, x.want/2)
		}
	}
	if x.server.found == 0 && (x.silent() || x.used.Before(x.learner.ready)) {
		return blind
	}
	return x.want
}

// overdue records that there is no other slot if a tried request should have begun to be answered
// by now.
func (x *runner) overdue(now time.Time) {
	a := &x.learner
	for _, l := range x.lanes {
		it := l.item
		if it == nil || !it.tries || it.told || !it.streams || a.pace == 0 || it.from.Before(a.began) {
			continue
		}
		if at := it.from.Add(x.firstByte(it)); now.Before(at) {
			x.server.later(at)
			continue
		}
		x.told(it)
		a.stop(now)
	}
}

// told records that nothing more is expected to reveal whether a tried request has a slot.
func (x *runner) told(it *item) {
	if it.tries && !it.told {
		it.told = true
		x.tries--
	}
}

// firstByte returns the maximum time until the first byte of an answer, once its request has a
// slot.
func (x *runner) firstByte(it *item) time.Duration {
	return leastGap + time.Duration(late*x.learner.pace*float64(max(it.tokens-it.expected, slack)))
}

// Began records that the answer to a granted request has begun, as a stream.
func (q *Queue) Began(id uint64, now time.Time) {
	it := q.items[id]
	if it == nil || it.waits || !it.begun.IsZero() {
		return
	}
	x := it.runner
	it.begun, it.streams = now, true
	if x.given() == 0 {
		x.found(x.begin(it, now))
	}
	if x.given() == 0 || x.copied() {
		q.pump(x.server, now)
	}
}

// found sets the number of lanes.
func (x *runner) found(lanes int) {
	if lanes != x.want || x.learner.ceiling {
		x.want, x.server.found = lanes, lanes
		x.settle(func(it *item) bool { return it.beside <= lanes })
	}
	x.resize()
}

// begin records that a request has a slot, and returns how many lanes there should be.
func (x *runner) begin(it *item, now time.Time) int {
	a := &x.learner
	it.late = a.paces(x, it, now)
	a.heard(x, now)
	seated := x.seats(it, now)
	if seated == x.want {
		a.doubt = 0
	}
	switch {
	case seated > x.want:
		x.settle(func(o *item) bool { return x.seated(o, it) })
		a.anew()
		return seated
	case !it.late: // the end of an attempt reveals its slot
	case it.tries:
		x.told(it)
		if it.beside == x.want+1 && !a.ceiling {
			a.stop(now)
		}
	case x.want > seated && it.beside > seated:
		return x.doubts(yes, seated, now)
	}
	return x.want
}

// seats returns how many requests are known to have a slot now that one has. The others' evaluation
// may begin only now, since prompts are evaluated one after the other.
func (x *runner) seats(it *item, now time.Time) (n int) {
	for _, l := range x.lanes {
		if o := l.item; o != nil && x.seated(o, it) {
			n++
		} else if o != nil {
			o.from = now
		}
	}
	return n
}

// settle records which attempts have a slot, as decided by seated.
func (x *runner) settle(seated func(*item) bool) {
	for _, l := range x.lanes {
		if o := l.item; o != nil && o.tries && seated(o) {
			x.told(o)
			o.tries = false
		}
	}
}

// doubts adds evidence that there are too many lanes, and returns how many there should be: as few
// once there is enough of it. The more slots are busy, the longer a request waits until the engine
// has time for it.
func (x *runner) doubts(v verdict, few int, now time.Time) int {
	a := &x.learner
	if a.doubt += int(v); a.doubt < int(yes)*min(x.want, 3) {
		return x.want
	}
	a.stop(now)
	a.doubt = 0
	return few
}

// paces records how long it took until the answer to a request began, and reports whether that was
// so long that the request must have waited for another one's slot.
func (a *learner) paces(x *runner, it *item, now time.Time) bool {
	from := it.from
	if x.used.After(from) {
		from = x.used // it may have waited until then
	}
	first := !a.began.After(x.since)
	pace := float64(now.Sub(from)) / float64(max(it.tokens-it.expected, slack))
	if first && a.pace == 0 {
		a.pace, a.rough = pace, true // possibly including a load
	} else if !first {
		if a.rough {
			a.pace, a.rough = 0, false
		}
		a.pace = max(0.9*a.pace, pace)
	}
	a.began = now
	return x.used.Sub(it.from) > x.firstByte(it)
}

// before returns how long others are probably evaluated before a request that is granted now: as
// estimated, or those streams that have not begun.
func (x *runner) before(it *item, now time.Time) time.Duration {
	tokens := 0
	for _, l := range x.lanes {
		if o := l.item; o != nil && o.streams && o.begun.IsZero() {
			tokens += max(o.tokens-o.expected, 0)
		}
	}
	turn := max(x.evaluates.Sub(now), time.Duration(x.learner.pace*float64(tokens)), 0)
	if x.evaluates.Before(now) {
		x.evaluates = now
	}
	x.evaluates = x.evaluates.Add(x.rates.evaluate(max(it.tokens-it.expected, 1)))
	return turn
}

// seated reports whether a request that is being served has a slot, now that another one has.
func (x *runner) seated(o, it *item) bool {
	// Ollama's queue is first come, first served, but while a model is loaded requests change
	// places.
	lead := max(leastGap, x.rates.transit())
	before := !o.granted.Add(lead).After(it.granted)
	return !o.begun.IsZero() || before && !x.silent() && !o.granted.Before(x.learner.ready)
}

// loading reports whether nothing was answered since the model was loaded.
func (x *runner) loading() bool { return !x.used.After(x.since) }

// costs reports whether a running prompt will probably be evaluated again if a request takes the
// slot of whatever ends first.
func (c *choice) costs(it *item) bool {
	x := c.x
	for _, l := range x.lanes {
		if l.item == nil {
			continue
		}
		kept := shared(it.steps, l.holds)
		lost := float64(l.tokens-kept) * (1 - x.rates.kept.v)
		if lost <= slack || l.work >= quantum*l.tokens { // it has had its turn
			continue
		}
		if c.q.client(l.item.account.name).hold(&c.q.habits, x.rates.evaluate(int(lost))) > 0 {
			return true
		}
		for p := range x.classes {
			if t := x.classes[p].tree; t != nil {
				if _, tokens, _ := t.walk(l.holds); tokens > kept+slack {
					return true
				}
			}
		}
	}
	return false
}

// learn records whether a request waited inside Ollama, and returns how many lanes there should be.
func (x *runner) learn(it *item, r Result, now time.Time) int {
	if !r.Answered {
		return x.want
	}
	a := &x.learner
	a.seen++
	a.heard(x, now)
	if it.tries && it.begun.IsZero() && it.overtaken.IsZero() && x.loading() {
		x.exchange(it)
		return x.want
	}
	v := a.judge(it, r, now)
	if v == yes && !it.tries && r.Queue < it.turn*5/4 {
		v = unknown // the evaluation of others explains that
	}
	a.hurry(it, r, now)
	if f := it.finds(r); !it.tries && f != unknown {
		v = f
	}
	if it.beside == 1 && it.overtaken.IsZero() && r.Timed && x.busy == 0 { // it did not wait
		a.idle.add(float64(r.Queue))
	}
	return x.conclude(it, v, now)
}

// exchange records that a tried request ended first. While a model is loaded requests change
// places; then the other one's wait is the evidence.
func (x *runner) exchange(it *item) {
	for _, l := range x.lanes {
		if o := l.item; o != nil && x.busy == 1 && o.begun.IsZero() {
			if !o.tries || o.told {
				x.tries++
			}
			o.tries, o.told, o.beside = true, false, it.beside
		}
	}
}

// conclude returns how many lanes there should be after all that is known of an ended request.
func (x *runner) conclude(it *item, v verdict, now time.Time) int {
	a := &x.learner
	switch {
	case it.tries && v == no:
		a.anew()
		return max(x.want, it.beside)
	case it.told || it.late && v != no: // that was considered when it began
	case it.tries && it.beside == x.want+1:
		// An attempt without evidence has cost a prefix all the same: trying again and again, and
		// learning nothing, costs more than a mistake.
		if a.tried += max(int(v), int(maybe)); a.tried >= int(yes) {
			a.stop(now)
		}
	case it.beside != x.want || x.want == 1 || v == unknown:
	case v == no:
		a.doubt = max(0, a.doubt-int(yes))
	default:
		return x.doubts(v, x.want-1, now)
	}
	return x.want
}

// worked returns the work done for a request, in tokens of answers.
func (it *item) worked(r Result) float64 {
	evaluated := it.tokens - it.expected
	if r.ReusedKnown && r.Total > 0 {
		evaluated = r.Total - r.Reused
	}
	return float64(r.Generated) + float64(evaluated)/leastWeight
}

// stop records that one more lane would be one too many.
func (a *learner) stop(now time.Time) {
	a.tried, a.seen, a.since, a.ceiling = 0, 0, now, true
	a.pause = min(max(2*a.pause, firstPause), lastPause)
}

// pauses reports whether n pauses are not over yet. They also end after the given number of the
// longest ones, unless too few requests were served meanwhile: if each takes a minute, one more is
// not tried beside every one of them.
func (a *learner) pauses(n, longest int, now time.Time) bool {
	over := a.since.Add(time.Duration(longest) * longestPause)
	return a.seen < n*firstPause || a.seen < n*a.pause && now.Before(over)
}

// anew forgets that one more lane was one too many.
func (a *learner) anew() {
	a.doubt, a.tried, a.seen, a.ceiling, a.pause = 0, 0, 0, false, 0
}

// judge decides whether a request waited inside Ollama until one of the others ended. If it ended
// first it did not. If the answer does not report its wait (on /v1), it did not if it began
// earlier, or would have been generated faster than any other had it begun then.
func (a *learner) judge(it *item, r Result, now time.Time) verdict {
	if it.overtaken.IsZero() {
		if !it.begun.IsZero() {
			return unknown // that was considered when it began
		}
		return no
	}
	gap := it.overtaken.Sub(it.granted)
	if !r.Timed {
		return a.judgeUntimed(it, r, gap, now.Sub(it.overtaken))
	}
	gap -= r.Load // which it would have waited for in any case
	wait, margin := r.Queue-time.Duration(a.idle.v), leastGap/2+gap/4
	switch {
	case gap < max(leastGap, time.Duration(3*a.idle.v)):
		return unknown
	case wait < gap-margin: // it had its slot when the other one ended
		return no
	case wait < gap+margin || wait > gap && wait > (r.Prompt+r.Eval)/2:
		return yes
	}
	return unknown // the engine was busy with something else
}

// judgeUntimed is judge for answers that reveal only their length and their time: gap until another
// one ended, and since after that.
func (a *learner) judgeUntimed(it *item, r Result, gap, since time.Duration) verdict {
	least := 0.8
	if a.hasty {
		least = 1.0 / 30
	}
	switch alone := it.worked(r) / a.fastest; {
	case !it.begun.IsZero() && !it.tries, a.fastest == 0:
		return unknown
	case !it.begun.IsZero():
		return a.judgeBegun(it)
	case r.Generated < leastAnswer:
		return maybe
	case float64(since)*a.fastest < float64(r.Generated)*least: // otherwise it was faster than any
		return no
	case a.hasty || float64(gap) < alone/10:
		return unknown
	case float64(gap+since) > 1.7*alone:
		return yes
	}
	return likely
}

// judgeBegun is judge for a stream that began after another one had ended. Perhaps it had its slot
// before, and was still being evaluated; then less of it was left at that time.
func (a *learner) judgeBegun(it *item) verdict {
	evaluation := a.pace * float64(max(it.tokens-it.expected, slack))
	since, gap := it.begun.Sub(it.overtaken), it.overtaken.Sub(it.from)
	if float64(min(since, gap)) > evaluation*3/4 {
		return likely
	}
	return maybe
}

// hurry records how fast a request was served.
func (a *learner) hurry(it *item, r Result, now time.Time) {
	pace, hasty := it.worked(r)/float64(max(now.Sub(it.granted), 1)), it.granted.Before(a.ready)
	switch {
	case a.fastest == 0 || a.hasty && !hasty:
		a.fastest, a.hasty = pace, hasty
	case a.hasty == hasty:
		a.fastest = max(0.99*a.fastest, pace)
	}
}

// heard records that an answer has begun or ended.
func (a *learner) heard(x *runner, now time.Time) {
	if x.silent() {
		a.ready = now
	}
}

// silent reports whether no answer has begun or ended since the model was loaded.
func (x *runner) silent() bool { return !x.learner.ready.After(x.since) }

// finds reports whether a request found in its slot what its lane should hold. If there are too few
// slots it did not.
func (it *item) finds(r Result) verdict {
	switch reused := it.scale(r); {
	case !r.ReusedKnown || r.Loaded || it.expected < hostWorth:
	case reused >= it.expected-it.expected/8:
		return no
	case reused < it.expected/2:
		return yes
	}
	return unknown
}

// resize creates as many lanes as there should be. Busy ones stay until they become free.
func (x *runner) resize() {
	if x.server.lanes == Unlimited {
		x.want = min(len(x.lanes), x.busy+maxWarm)
	}
	for len(x.lanes) < x.want {
		l := &lane{}
		if n := len(x.spare); n > 0 {
			l, x.spare = x.spare[n-1], x.spare[:n-1]
		}
		l.name = x.unused()
		x.lanes = append(x.lanes, l)
	}
	for len(x.lanes) > x.want {
		i := -1
		for j, l := range x.lanes {
			if l.item == nil && (i < 0 || l.used.Before(x.lanes[i].used)) {
				i = j
			}
		}
		if i < 0 {
			break
		}
		if x.tries > 0 {
			x.spare = append(x.spare, x.lanes[i])
		}
		x.lanes = slices.Delete(x.lanes, i, i+1)
	}
	if x.tries == 0 {
		x.spare = nil
	}
}
