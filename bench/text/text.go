// Package text makes up text for benchmarks.
package text

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

var list = strings.Fields("the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you were all her she there would their we him been has when who will no more if out so up said what its about than into them can only other time new some could these two may first then do any like my now over such our man me even most made after also did many off before must well back through years where much your way down should because long each just state those people too mr how little good world make very year still see own work men day get here old between both life being under three never know same last another while us might great")

// Words returns n words, always the same for one seed.
func Words(seed uint64, n int) string {
	r := rand.New(rand.NewPCG(seed, 7))
	chosen := make([]string, n)
	for i := range chosen {
		chosen[i] = list[r.IntN(len(list))]
	}
	return strings.Join(chosen, " ")
}

// Plural returns a count and its noun: "1 slot", "4 slots".
func Plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
