package batch

import (
	"math"
	"strings"
	"time"
)

const (
	startAt = 2   // requests in flight before anything is known
	mostAt  = 512 // the most requests in flight: Ollama's own queue is as long
	// perLane is how many requests are kept in flight for each lane of a proxy that schedules:
	// enough for it to choose from. A waiting request costs it a few hundred bytes.
	perLane      = 16
	recoverAfter = 32 // answers after which one more request is tried again
)

// limit is how many requests are in flight.
type limit struct {
	fixed    int     // 0: learned
	lanes    int     // of the proxy; 0: not known
	slots    float64 // estimated slots of the server
	ceiling  float64 // set when the server was overloaded; 0: none
	backedAt time.Time
	good     int // answers since then, or since the ceiling was last raised
}

func (l *limit) target() int {
	if l.fixed > 0 {
		return l.fixed
	}
	n := float64(startAt)
	switch {
	case l.lanes > 0:
		n = float64(perLane * (l.lanes + 1))
	case l.slots > 0:
		n = math.Ceil(l.slots) + 1
	}
	if l.ceiling > 0 {
		n = min(n, l.ceiling)
	}
	return int(max(1, min(n, mostAt)))
}

// answered learns from an answer that came while so many were in flight. With n requests on s slots
// each waits for n/s-1 times as long as it is served. Ollama's own endpoints report both times.
func (l *limit) answered(inFlight int, c Counts) {
	if c.Failed == 0 && l.ceiling > 0 {
		if l.good++; l.good >= recoverAfter {
			l.good, l.ceiling = 0, l.ceiling+1
		}
	}
	served := c.PromptEval + c.Eval
	if served <= 0 || c.Total < served || c.Load > served { // a load holds up the others, too
		return
	}
	waited := max(0, c.Total-c.Load-served)
	seen := float64(inFlight) * float64(served) / float64(waited+served)
	if l.slots == 0 {
		l.slots = startAt
	}
	l.slots += (seen - l.slots) / 8
}

// backOff halves the number in flight, since a request that was sent at that number was too much.
// It reports whether that was news.
func (l *limit) backOff(sent, now time.Time) bool {
	if sent.Before(l.backedAt) {
		return false // one of those that led to it
	}
	l.ceiling, l.backedAt, l.good = max(1, math.Floor(float64(l.target())/2)), now, 0
	return true
}

// overloaded reports whether an error means that the server is overloaded, or lacks memory.
func overloaded(status int, text string) bool {
	if status == 503 || status == 429 {
		return true
	}
	text = strings.ToLower(text)
	for _, sign := range []string{"out of memory", "requires more system memory", "cudamalloc failed", "unable to allocate"} {
		if strings.Contains(text, sign) {
			return true
		}
	}
	return false
}
