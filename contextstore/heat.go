package contextstore

import (
	"math"
	"time"
)

// What is kept is what saves most evaluation per byte: how often a state is of use, times what it
// costs to evaluate again, divided by its size. That is the value of GreedyDual-Size-Frequency
// (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy",
// 1998), but for how what is no longer asked for grows old. There, whatever comes in is worth a sum
// more, which grows with each replacement; so prompts in turn that are more than there is room for
// replace each other for ever, and here each time is a large file written for nothing. Instead uses
// count for less as time goes by, the same for all, and what comes in must be worth twice what goes.

// halfLife is how long it takes until a use counts for half.
const halfLife = 6 * time.Hour

// replaceMargin is by how much more, as a power of two, a state must be worth than what goes for it.
const replaceMargin = 1

// heat is a count of uses in which each counts for less the longer ago it was. It is the logarithm
// to base 2 of the count as it would be at the Unix epoch, so that it changes with a use only, and
// heats compare as the counts do at any time (Cormode et al., "Forward Decay", 2009).
type heat float64

// maxHeat is more than any heat is in the next thousand years.
const maxHeat = 1e7

// heated returns the heat of so many uses at one time.
func heated(uses int, at time.Time) heat {
	halves := float64(at.UnixMilli()) / float64(halfLife.Milliseconds())
	return heat(math.Log2(float64(max(uses, 1))) + halves)
}

// plus returns the heat of both counts together.
func (h heat) plus(o heat) heat {
	most, least := max(h, o), min(h, o)
	return most + heat(math.Log2(1+math.Exp2(float64(least-most))))
}

// priority is what a state is worth per byte, as a logarithm to base 2 like a heat.
func priority(h heat, s *State) float64 {
	return float64(h) + math.Log2(max(s.Cost.Seconds(), 1e-9)/float64(max(s.Bytes, 1)))
}
