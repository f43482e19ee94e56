package schedule

import "time"

// learner finds out how many slots a runner has: as many as can be busy without requests waiting inside Ollama.
type learner struct {
	idle    mean // ns that Ollama takes for other things than waiting, as requests that were alone tell
	clean   int  // requests in a row that did not wait although all lanes were busy
	waited  int  // requests that did, with this many lanes
	unsure  int  // … and in a row that may have: their answers do not tell
	ceiling bool // one more lane was one too many
	seen    int  // requests since then
	pause   int  // how many of them until it is tried again
	untold  int  // requests in a row whose answers tell nothing
	lent    int  // lanes that were added because all were stuck, since an answer last told anything
}

const (
	leastWait  = 5 * time.Millisecond // less is not told from noise
	unsureMost = 8                    // requests that may have waited, until it is believed
	firstPause = 64                   // requests; doubled each time, up to lastPause
	lastPause  = 4096
	// If so many answers tell nothing (/v1 without streaming), untoldLanes are used: a server with fewer slots then has some
	// requests wait inside, one with more is not held back to one at a time.
	untoldMost  = 16
	untoldLanes = 4
	// leastStuck is how long all lanes are busy, and requests wait, before one more is tried without waiting for an answer.
	leastStuck = time.Second
)

// stuck adds a lane if all are busy with requests that take longer than usual while others wait, and nothing has told yet
// that one more is too many: a stream of minutes would otherwise hold up everybody. Answers tell later whether it was right.
func (x *runner) stuck(now time.Time) bool {
	a := &x.learner
	if x.server.lanes > 0 || a.ceiling || x.waiting == 0 || x.busy < x.want || x.want >= maxLearned {
		return false
	}
	at := x.full
	if oldest := x.oldest(); oldest.arrived.After(at) {
		at = oldest.arrived
	}
	at = at.Add(max(leastStuck, time.Duration(x.rates.service.v)))
	if now.Before(at) {
		x.server.later(at)
		return false
	}
	a.clean, a.waited, a.unsure = 0, 0, 0
	a.lent++
	x.want, x.full = x.want+1, now
	x.resize()
	return true
}

// learn takes in whether a request waited inside Ollama, and returns how many lanes there should be. more: requests wait.
func (a *learner) learn(it *item, r Result, lanes int, more bool) int {
	switch {
	case !r.Answered:
		return lanes
	case !r.Timed && r.FirstByte == 0:
		if a.lent > 0 && it.full > 0 && it.full < lanes { // one of those that were stuck: the lane for that may be too many
			a.lent--
			lanes--
		}
		if a.untold++; !a.ceiling && a.untold >= untoldMost {
			return max(lanes, untoldLanes)
		}
		return lanes
	case r.Loaded:
		return lanes
	}
	a.seen++
	a.untold, a.lent = 0, 0
	if it.alone && r.Timed {
		a.idle.add(float64(r.Queue))
	}
	if it.full != lanes {
		return lanes // it says nothing of this many
	}
	if lanes > 1 {
		switch a.judge(it, r) {
		case maybe:
			return lanes
		case yes:
			a.clean = 0
			if a.waited++; a.waited < 2 {
				return lanes
			}
			a.pause = min(max(2*a.pause, firstPause), lastPause)
			a.waited, a.unsure, a.seen, a.ceiling = 0, 0, 0, true
			return lanes - 1
		}
	}
	if a.clean++; a.clean > 8*(lanes+2) {
		a.waited = 0
	}
	if !more || a.clean < lanes+2 || a.ceiling && a.seen < a.pause || lanes >= maxLearned {
		return lanes
	}
	a.clean, a.waited, a.unsure = 0, 0, 0
	return lanes + 1
}

type verdict uint8

const (
	no verdict = iota
	maybe
	yes
)

// judge tells whether a request waited inside Ollama. Where the answer does not say so (on /v1), one that began before any of
// those had ended that were being served when it was sent did not wait. One that began later may only have been slow.
func (a *learner) judge(it *item, r Result) verdict {
	if r.Timed {
		if r.Queue > max(leastWait, time.Duration(3*a.idle.v), (r.Prompt+r.Eval)/8) {
			return yes
		}
		return no
	}
	if it.overtaken.IsZero() || it.granted.Add(r.FirstByte).Before(it.overtaken) {
		a.unsure = 0
		return no
	}
	if a.unsure++; a.unsure < unsureMost {
		return maybe
	}
	a.waited++ // so that this one is enough
	return yes
}
