package schedule

import (
	"slices"
	"time"
)

// How many slots a runner has is found out by granting one request more than there are lanes, now and then, and looking at
// whether it waited inside Ollama: if the time that it spent there on nothing (Result.Queue) is about as long as it took until
// one of the others ended, it waited for that one's slot. If it did not wait, there is a lane more from then on, and the next
// one is tried. If it did, that is all there are, and one more is tried only after a pause that doubles each time, up to a minute. Until then
// it has cost at most one prefix: it is taken to have landed where the first one ended, and no other is tried meanwhile. Lanes are
// given up when requests wait, or do not find what their slots should hold.

// learner is what is known of the number of slots of a runner.
type learner struct {
	idle    mean      // ns that Ollama takes for other things than waiting, as requests that were alone tell
	fastest float64   // tokens for each ns that a request generated that was alone, at most; of late
	doubt   int       // what tells that requests wait with this many lanes, less what tells that they do not
	tried   int       // … with one more
	fits    int       // requests in a row that were tried and did not wait
	ceiling bool      // one more lane was one too many
	seen    int       // requests since then
	pause   int       // how many of them until one more is tried …
	since   time.Time // … unless longestPause has passed since then
}

const (
	// leastLead is how long what runs has run when one more is tried, so that they do not reach Ollama the other way about.
	leastLead = 5 * time.Millisecond
	// leastGap is what it takes until one of the others ends at least, for the time that a request waited to tell anything:
	// less is not told from noise.
	leastGap = 8 * time.Millisecond
	// leastStuck is how long nothing was granted before one more is tried although another one that was tried is under way.
	leastStuck = time.Second
	firstPause = 16 // requests
	lastPause  = 4096
	// longestPause bounds pauses in time: what was mistaken for slots that are not there may have been somebody else's requests in
	// them, who has gone.
	longestPause = time.Minute
	// patient is for how many pauses one more is tried only where that costs nothing if it waits, and patientTime for how many of
	// the longest ones.
	patient     = 16
	patientTime = 5
	// sureLanes is up to how many lanes one that did not wait is enough.
	sureLanes = 4
	// leastAnswer is how many tokens are generated at least for their pace to tell anything.
	leastAnswer = 8
	// leastWeight is as how many tokens of a prompt it takes to generate one, at least.
	leastWeight = 5
)

// verdict says whether a request waited inside Ollama. Its number is how much that counts.
type verdict int

const (
	unknown verdict = -1
	no      verdict = 0
	maybe   verdict = 1
	yes     verdict = 4
)

// try grants a request although all lanes are busy, if it is time for that.
func (q *Queue) try(x *runner, now time.Time) {
	a := &x.learner
	for x.server.lanes == 0 && x.waiting > 0 && x.busy >= x.want && x.busy < maxLearned && !(a.ceiling && (a.pauses(1, 1, now) || x.tries > 0)) {
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

// triedAt returns from when on one more may be tried.
func (x *runner) triedAt() time.Time {
	if x.tries == 0 {
		return x.full.Add(max(leastLead, min(x.rates.transit(), time.Duration(x.rates.service.v)/time.Duration(2*x.want))))
	}
	stuck := max(leastStuck, 2*time.Duration(x.rates.service.v)) // a stream of minutes would otherwise hold up everybody
	if x.loading() {
		stuck += agedQuantum * x.rates.load()
	}
	return x.full.Add(stuck)
}

// loading reports whether nothing was answered since the model was loaded.
func (x *runner) loading() bool { return !x.used.After(x.since) }

// costs reports whether a prompt that runs is likely to be evaluated again if a request takes the slot of whatever ends first.
func (c *choice) costs(it *item) bool {
	x := c.x
	for _, l := range x.lanes {
		if l.item == nil {
			continue
		}
		kept := shared(it.steps, l.holds)
		lost := float64(l.tokens-kept) * x.rates.lostPart()
		if lost <= slack || l.work >= quantum*l.tokens { // it has had its turn
			continue
		}
		if c.q.client(l.item.account.name).hold(&c.q.habits, time.Duration(lost)*x.rates.perToken()) > 0 {
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

// learn takes in whether a request waited inside Ollama, and returns how many lanes there should be.
func (x *runner) learn(it *item, r Result, now time.Time) int {
	a, lanes := &x.learner, x.want
	if !r.Answered {
		return lanes
	}
	a.seen++
	if it.tries && it.overtaken.IsZero() && x.loading() {
		// While a model is loaded requests change places: whether the other one waited tells.
		for _, l := range x.lanes {
			if l.item != nil && x.busy == 1 {
				l.item.tries, l.item.beside = true, it.beside
				x.tries++
			}
		}
		return lanes
	}
	v := a.judge(it, r, now)
	if !it.tries && r.ReusedKnown {
		if f := it.found(r); f != unknown {
			v = f
		}
	}
	if it.beside == 1 && it.overtaken.IsZero() { // it did not wait
		if r.Timed && x.busy == 0 {
			a.idle.add(float64(r.Queue))
		}
		if it.granted.After(x.since) {
			done := float64(r.Generated) + float64(it.tokens-it.expected)/leastWeight
			a.fastest = max(0.99*a.fastest, done/float64(max(now.Sub(it.granted), 1)))
		}
	}
	switch {
	case it.tries && v == no:
		// The more slots are busy, the less it is certain which request waits, and a lane too many has many prompts evaluated again.
		if a.fits++; it.beside > sureLanes && a.fits < 2 {
			return lanes
		}
		a.anew()
		return max(lanes, it.beside)
	case it.tries && it.beside == lanes+1:
		a.fits = 0
		if a.tried += max(int(v), int(maybe)); a.tried >= int(yes) {
			a.stop(now)
		}
	case it.beside != lanes || lanes == 1 || v == unknown:
	case v == no:
		a.doubt = max(0, a.doubt-int(yes))
	default:
		// The more slots are busy, the longer a request waits until the engine has time for it.
		if a.doubt += int(v); a.doubt >= int(yes)*min(lanes, 3) {
			a.stop(now)
			return lanes - 1
		}
	}
	return lanes
}

// stop notes that one lane more would be one too many.
func (a *learner) stop(now time.Time) {
	a.doubt, a.tried, a.seen, a.since, a.ceiling = 0, 0, 0, now, true
	a.pause = min(max(2*a.pause, firstPause), lastPause)
}

// pauses reports whether so many pauses are not over yet. They are after so many of the longest ones, too, if not too few requests
// were served meanwhile: where each takes a minute one more is not tried beside all of them.
func (a *learner) pauses(n, longest int, now time.Time) bool {
	return a.seen < n*firstPause || a.seen < n*a.pause && now.Before(a.since.Add(time.Duration(longest)*longestPause))
}

// anew forgets that one lane more would be one too many.
func (a *learner) anew() {
	a.doubt, a.tried, a.fits, a.seen, a.ceiling, a.pause = 0, 0, 0, 0, false, 0
}

// judge tells whether a request waited inside Ollama until one of the others ended. If it ended first it did not. Where the answer
// does not tell for how long it waited (on /v1), it did not if it began earlier, or must have generated faster than any
// other if it began then.
func (a *learner) judge(it *item, r Result, now time.Time) verdict {
	if it.overtaken.IsZero() {
		return no
	}
	gap := it.overtaken.Sub(it.granted)
	if !r.Timed {
		since := float64(max(now.Sub(it.overtaken), 1))
		if r.FirstByte > 0 && r.FirstByte < gap || a.fastest > 0 && r.Generated >= leastAnswer && float64(r.Generated) > 1.5*a.fastest*since {
			return no
		}
		return maybe
	}
	gap -= r.Load // which it would have waited for in any case
	wait := r.Queue - time.Duration(a.idle.v)
	switch {
	case gap < max(leastGap, time.Duration(3*a.idle.v)):
		return unknown
	case wait < gap/3:
		return no
	case wait > gap/2 && (wait > (r.Prompt+r.Eval)/2 || wait < gap+gap/4):
		return yes
	}
	return unknown // the engine was busy with something else
}

// found tells whether a request found in its slot what its lane should hold. If there are too few slots it did not.
func (it *item) found(r Result) verdict {
	switch reused := it.scale(r); {
	case r.Loaded || it.expected < hostWorth:
	case reused >= it.expected-it.expected/8:
		return no
	case reused < it.expected/2:
		return yes
	}
	return unknown
}

// resize makes as many lanes as there should be. Busy ones stay until they fall free.
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
