package schedule

import (
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Offer is a server that a prompt may go to which is warm nowhere.
type Offer struct {
	Name  string        // by which several proxies know it
	Slots int           // for each model; 0: not known
	Load  time.Duration // how long a request waits there
	Own   time.Duration // how long the prompt's evaluation takes
}

// Opening returns the fingerprint that decides where a prompt goes that is warm nowhere.
func Opening(links []prefix.Link) uint64 { return openingOf(links) }

// Settle returns the index of the server for a new prefix, as a Queue with these servers would
// choose it, so that several proxies choose the same one without asking each other.
func Settle(offers []Offer, opening uint64) int {
	var sum time.Duration
	for _, o := range offers {
		sum += o.Load
	}
	best, first := -1, 0.0
	for i, o := range offers {
		s := server{seed: seedOf(o.Name), found: o.Slots}
		bound := time.Duration((1+overload)*float64(sum)/float64(len(offers))) + o.Own
		if score := s.score(opening); o.Load <= bound && (best < 0 || score > first) {
			best, first = i, score
		}
	}
	return max(best, 0)
}
