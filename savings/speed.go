package savings

import (
	"cmp"
	"math"
	"math/bits"
	"slices"
)

// speed predicts how long evaluating a prompt takes, from past evaluations. The time per token
// depends on how many tokens are evaluated (a few take longer each than many in one batch) and on
// the length of the prompt. The prediction is smoothed by a normal kernel over powers of two.
//
// A busy machine is slower than it can be, and nothing makes it faster, so only the fast ones of
// the last evaluations count.
type speed struct {
	cells []cell
}

// cell has the evaluations of similar numbers of tokens, in prompts of similar lengths.
type cell struct {
	n, total int // powers of two
	last     [8]pace
	count    int
}

// pace is the speed of one evaluation. The answer's tokens, generated right after it, show how busy
// the machine was, whatever was reused.
type pace struct {
	perToken float64 // ms
	decode   float64 // ms for each token of the answer; 0: unknown
}

type sample struct{ total, ms, decode float64 }

// few is the fixed cost of an evaluation, in tokens, before the shape of the curve is learned.
const few = 30

func (s *speed) known() bool { return len(s.cells) > 0 }

// add learns from an evaluation of n tokens of a prompt whose answer's tokens took decode ms each
// (0: unknown).
func (s *speed) add(n, total int, ms, decode float64) {
	if n < 1 || ms <= 0 {
		return
	}
	at := cell{n: bits.Len(uint(n)), total: bits.Len(uint(total))}
	i := slices.IndexFunc(s.cells, func(c cell) bool { return c.n == at.n && c.total == at.total })
	if i < 0 {
		i = len(s.cells)
		s.cells = append(s.cells, at)
	}
	c := &s.cells[i]
	c.last[c.count%len(c.last)] = pace{ms / float64(n+few), decode}
	c.count++
}

// fast returns the lower quartile of the cell's evaluations.
func (c *cell) fast() pace {
	last := c.last
	kept := last[:min(c.count, len(last))]
	slices.SortFunc(kept, func(a, b pace) int { return cmp.Compare(a.perToken, b.perToken) })
	return kept[len(kept)/4]
}

// predict returns how many ms evaluating n tokens of a prompt takes, and how many ms each token of
// the answer took when that was learned; 0 if nothing is learned yet.
func (s *speed) predict(n, total int) (ms, decode float64) {
	// Width of the kernel, in powers of two; the prompt's length matters half as much.
	const wide = 0.7
	x, y := math.Log2(float64(n)+0.5), math.Log2(float64(total)+0.5)
	var evals, decodes kernel
	nearest := math.Inf(1)
	for _, c := range s.cells {
		nearest = min(nearest, square(x-float64(c.n)+0.5)+square(y-float64(c.total)+0.5)/4)
	}
	for i := range s.cells {
		c := &s.cells[i]
		d := square(x-float64(c.n)+0.5) + square(y-float64(c.total)+0.5)/4
		w := math.Exp(-(d - nearest) / (2 * wide * wide))
		fast := c.fast()
		evals.add(w, fast.perToken)
		decodes.add(w, fast.decode)
	}
	return evals.mean() * float64(n+few), decodes.mean()
}

// kernel is a weighted geometric mean. It ignores zeros.
type kernel struct{ sum, weights float64 }

func (k *kernel) add(weight, v float64) {
	if v > 0 {
		k.sum += weight * math.Log(v)
		k.weights += weight
	}
}

func (k *kernel) mean() float64 {
	if k.weights == 0 {
		return 0
	}
	return math.Exp(k.sum / k.weights)
}

// perToken returns the time per token, in ms, when all tokens of a prompt of this length are
// evaluated; 0 if nothing is learned yet.
func (s *speed) perToken(total int) float64 {
	n := max(total, 1)
	ms, _ := s.predict(n, n)
	return ms / float64(n)
}

func square(x float64) float64 { return x * x }
