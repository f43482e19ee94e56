package integration

import (
	"math/rand/v2"
	"strings"
)

// words returns n words, different for each seed.
func words(seed uint64, n int) string {
	rnd := rand.New(rand.NewPCG(seed, 1))
	list := strings.Fields("the quick brown fox judges every candidate answer by a long rubric " +
		"of twelve criteria with scores from one to five")
	var b strings.Builder
	for range n {
		b.WriteString(list[rnd.IntN(len(list))])
		b.WriteByte(' ')
	}
	return b.String()
}
