package proxy

import (
	"cmp"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Draining reports which upstreams, by name, are draining: they get no new requests.
func (h *Handler) Draining() map[string]bool {
	list := h.present()
	all := make(map[string]bool, len(list))
	for _, b := range list {
		all[b.Name] = b.draining.Load() || b.leaving.Load()
	}
	return all
}

// LaneStats returns the scheduler's statistics with each model's weights replaced by a name: the
// one in /api/ps, or else the one that requests used.
func (h *Handler) LaneStats() schedule.Stats {
	st := h.Lanes.Stats()
	for i := range st.Runners {
		r := &st.Runners[i].Runner
		b, weights := h.at(r.Upstream), r.Options.Model
		listed := b.runners.ByWeights(b.State().Loaded)[weights]
		r.Options.Model = cmp.Or(listed.Name, b.runners.Name(weights))
	}
	return st
}
