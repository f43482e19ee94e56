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
	untold  int  // requests whose answers tell nothing, as long as none has told anything
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
)

// learn takes in whether a request waited inside Ollama, and returns how many lanes there should be. more: requests wait.
func (a *learner) learn(it *item, r Result, lanes int, more bool) int {
	switch {
	case !r.Answered:
		return lanes
	case !r.Timed && r.FirstByte == 0:
		if a.untold++; a.seen == 0 && a.untold >= untoldMost {
			return max(lanes, untoldLanes)
		}
		return lanes
	case r.Loaded:
		return lanes
	}
	a.seen++
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
