package schedule

import (
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Offer is a server that a prompt may go to which is warm nowhere.
type Offer struct {
	Name  string // by which several proxies know it
	Slots int    // for each model; 0: not known
}

// Opening returns the fingerprint that decides where a prompt goes that is warm nowhere.
func Opening(links []prefix.Link) uint64 { return openingOf(links) }

// Settle returns the index of the server for a new prefix: the first in the order of the rendezvous
// hash of its opening, so that several proxies choose the same one without asking each other.
func Settle(offers []Offer, opening uint64) int {
	best, first := 0, 0.0
	for i, o := range offers {
		s := server{seed: seedOf(o.Name), found: o.Slots}
		if score := s.score(opening); i == 0 || score > first {
			best, first = i, score
		}
	}
	return best
}
