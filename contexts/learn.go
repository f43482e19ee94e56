package contexts

import (
	"math"
	"time"
)

// Thresholds for saving and attaching.
const (
	// leastTokens is of how many tokens a state must save the evaluation.
	leastTokens = 64
	// leastGain is the least time that a state must save.
	leastGain = 50 * time.Millisecond
	// pays is how many times as long evaluating must take as attaching. The gain is more than time:
	// meanwhile the engine evaluates for nobody else.
	pays = 2

	// statusTimeout is for an engine to report its slots, which it does between two batches of
	// tokens: after seconds, on a slow machine. A request that is sent meanwhile has to wait as
	// long.
	statusTimeout = 10 * time.Second
	leastTimeout  = 10 * time.Second // for it to attach a state, also between two batches
	saveTimeout   = 30 * time.Second // for it to save one
	longestHold   = 5 * time.Second  // for which a lane is held while the state of its request is saved
	endTimeout    = 10 * time.Second // for everything that is saved when the manager ends

	// leastOutlast and mostOutlast bound how long a request waits for a request to another model
	// that may have to make room; usualOutlast is for one whose model is being loaded.
	leastOutlast, usualOutlast, mostOutlast = 5 * time.Second, 10 * time.Second, 20 * time.Second
)

// occasion is when a state may be saved: the number is how many times as long evaluating it again
// must take as saving it. Where nothing is about to be lost, that bounds what saving costs in all
// to a twentieth of the time that the server evaluates.
type occasion float64

const (
	ending  occasion = 20 // a request has ended, and the next one may wait for its lane
	resting occasion = 8  // the engine is idle
	leaving occasion = 3  // the state is about to be lost
	trying  occasion = 1  // the first state of a format, which shows how large they are
	copying occasion = 3  // other requests wait that can use it in their slots, too
)

// learned is what is known of a model in an engine's build. Guarded by Manager.mu.
type learned struct {
	perToken float64 // seconds that evaluating a token takes; 0: not known
	perState float64 // bytes of a state per token; 0: not known
	partial  verdict // on states that a prompt parts from before their end
	exact    verdict // on states that a prompt continues
	named    bool    // it was logged that its states cannot be of use
}

// learned returns what is known of a format, adding it if necessary. m.mu must be held.
func (m *Manager) learned(format string) *learned {
	l := m.formats[format]
	if l == nil {
		l = &learned{}
		m.formats[format] = l
	}
	return l
}

// learnFrom moves a learned value towards an observed one. The first one counts fully.
func learnFrom(value *float64, seen float64) {
	if *value == 0 {
		*value = seen
		return
	}
	*value += (seen - *value) / 4
}

// evaluated learns from an evaluation of n tokens. Small n take longer per token, and say nothing
// about large ones.
func (l *learned) evaluated(tokens int, took time.Duration) {
	if tokens >= leastTokens && took > 0 {
		learnFrom(&l.perToken, took.Seconds()/float64(tokens))
	}
}

// evaluation estimates how long n tokens take to evaluate; 0 if nothing was learned yet.
func (l *learned) evaluation(tokens int) time.Duration {
	return seconds(l.perToken * float64(max(tokens, 0)))
}

// usualState is the assumed size of a state per token, in bytes, before the first one is saved:
// that of a model of 8 billion parameters with 8 heads for keys and values in 16 bits (Llama 3 8B:
// 32 layers of 2 × 8 × 128 × 2 bytes).
const usualState = 128 << 10

// size estimates how many bytes a state of n tokens has.
func (l *learned) size(tokens int) int64 {
	per := l.perState
	if per == 0 {
		per = usualState
	}
	return int64(per * float64(tokens))
}

// verdict counts how often a state was attached in vain since one was last of use.
type verdict struct {
	failed int
	until  time.Time // nothing is attached before
}

const (
	mostFailed   = 2                // in a row, after which nothing is attached for a while
	leastPause   = 30 * time.Second // the first pause; each further one is four times as long
	longestPause = 6 * time.Hour
)

// judge records whether an attached state was of use. It reports whether attaching is suspended
// from now on, for the first time.
func (l *learned) judge(exact, helped bool) (first bool) {
	v := &l.partial
	if exact {
		v = &l.exact
	}
	if helped {
		*v = verdict{}
		return false
	}
	if v.failed++; v.failed >= mostFailed {
		pause := float64(leastPause) * math.Pow(4, float64(v.failed-mostFailed))
		v.until = time.Now().Add(time.Duration(min(pause, float64(longestPause))))
	}
	return v.failed == mostFailed
}

// useful reports whether states may be attached.
func (l *learned) useful(exact bool) bool {
	if exact {
		return time.Now().After(l.exact.until)
	}
	return time.Now().After(l.partial.until)
}

// disk is the measured speed of saving and attaching, including what the engine does for it.
type disk struct{ saving, attaching rate }

// rate is in seconds per byte. A measurement counts for a while, so that a disk that was busy is
// tried again.
type rate struct {
	usual, seen float64
	at          time.Time
}

const rateCounts = 10 * time.Minute

// newDisk returns rates of 500 MB/s for writing and 1 GB/s for reading, those of an SSD.
func newDisk() disk { return disk{saving: rate{usual: 2e-9}, attaching: rate{usual: 1e-9}} }

// overhead is what saving and attaching take whatever the size, roughly: two requests on loopback.
const overhead = 2 * time.Millisecond

func (r *rate) estimate(bytes int64) time.Duration {
	per := r.seen
	if per == 0 || time.Since(r.at) > rateCounts {
		per = r.usual
	}
	return overhead + seconds(per*float64(bytes))
}

func (r *rate) measured(bytes int64, took time.Duration) {
	if bytes > 0 {
		if time.Since(r.at) > rateCounts {
			r.seen = 0
		}
		learnFrom(&r.seen, max(took-overhead, 0).Seconds()/float64(bytes))
		r.at = time.Now()
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
