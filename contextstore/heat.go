package contextstore

import (
	"math"
	"time"
)

// The store keeps what saves the most evaluation per byte: how often a state is of use, times what
// it costs to evaluate again, divided by its size. That is the value of GreedyDual-Size-Frequency
// (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy",
// 1998), except for aging. There, the value of new entries grows with each replacement; so prompts
// in turn that exceed the room replace each other for ever, and here each replacement writes a
// large file for nothing. Instead, uses lose weight with time, the same for all states, and a new
// state must be worth twice what is evicted for it.

// halfLife is how long it takes until a use has half of its weight.
const halfLife = 6 * time.Hour

// replaceMargin is the power of two by which a state must exceed what is evicted for it.
const replaceMargin = 1

// heat is a count of uses in which each loses weight with time. It is the logarithm to base 2 of
// the count as it would be at the Unix epoch. So it changes only with a use, and heats compare as
// the counts do at any time (Cormode et al., "Forward Decay", 2009).
type heat float64

// maxHeat exceeds any heat of the next thousand years.
const maxHeat = 1e7

// heated returns the heat of n uses at one time.
func heated(uses int, at time.Time) heat {
	halves := float64(at.UnixMilli()) / float64(halfLife.Milliseconds())
	return heat(math.Log2(float64(max(uses, 1))) + halves)
}

// plus returns the heat of both counts together.
func (h heat) plus(o heat) heat {
	most, least := max(h, o), min(h, o)
	return most + heat(math.Log2(1+math.Exp2(float64(least-most))))
}

// priority is the value of a state per byte, as a logarithm to base 2 like a heat.
func priority(h heat, s *State) float64 {
	return float64(h) + math.Log2(max(s.Cost.Seconds(), 1e-9)/float64(max(s.Bytes, 1)))
}
