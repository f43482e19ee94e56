package proxy

import (
	"cmp"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Draining reports, by upstream, whether it drains: it is given nothing new.
func (h *Handler) Draining() map[string]bool {
	all := make(map[string]bool, len(h.backends))
	for _, b := range h.backends {
		all[b.Name] = b.draining.Load()
	}
	return all
}

// LaneStats returns what Lanes tell, with models by name instead of by what stands for their weights:
// the name under which /api/ps lists the model, else the one by which it was asked for.
func (h *Handler) LaneStats() schedule.Stats {
	st := h.Lanes.Stats()
	for i := range st.Runners {
		r := &st.Runners[i].Runner
		b, weights := h.backends[r.Upstream], r.Options.Model
		listed := b.runners.ByWeights(b.State().Loaded)[weights]
		r.Options.Model = cmp.Or(listed.Name, b.runners.Name(weights))
	}
	return st
}
