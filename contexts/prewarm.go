package contexts

import (
	"cmp"
	"context"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// Fill attaches the most used states to the empty slots of a model's engine, as after a load; of
// several that begin alike, it takes the one that is used most. It continues as long as another
// state is worth it and more, which is called before each, returns true. It returns how many it
// attached. A request that comes meanwhile waits for one of them, which takes milliseconds.
//
// States with an owner are left out, unless they are shared: otherwise whoever asks next could find
// out by timing that somebody has sent a prompt.
func (m *Manager) Fill(
	ctx context.Context, port int, weights string, more func() bool,
) (filled int) {
	if m == nil {
		return 0
	}
	on := m.find(Request{Port: port, Weights: weights})
	if on == nil {
		return 0
	}
	list := m.Files.List()
	shared := m.Shared()
	list = slices.DeleteFunc(list, func(s contextstore.State) bool {
		return s.Format != on.Format || s.Owner != 0 && !shared || on.Context > 0 && s.Tokens > on.Context
	})
	slices.SortStableFunc(list, func(a, b contextstore.State) int {
		return cmp.Compare(b.Uses, a.Uses)
	})
	for _, s := range list {
		if ctx.Err() != nil || !more() {
			break
		}
		worth, ok := m.fill(ctx, on, s)
		if !ok {
			break
		}
		if worth {
			filled++
		}
	}
	return filled
}

// fill attaches a state to an empty slot, if it is worth it. ok means that there may be room for
// another one.
func (m *Manager) fill(ctx context.Context, on *live, state contextstore.State) (worth, ok bool) {
	if !on.act(ctx) {
		return false, false
	}
	defer on.rest()
	s := stored{State: state, reach: state.Tokens} // a prompt may part from it before its end
	m.mu.Lock()
	p, warm := s.prompt(), 0
	for _, held := range on.slots {
		warm = max(warm, p.shared(held.contents))
	}
	active := on.active
	m.mu.Unlock()
	switch {
	case active > 0:
		return false, false
	case !m.pays(s, warm):
		return false, true
	}
	if m.Files.Check(ctx, s.ID) != nil {
		return false, true
	}
	i := m.empty(ctx, on)
	if i < 0 {
		return false, false
	}
	ctx, cancel := context.WithTimeout(ctx, leastTimeout)
	defer cancel()
	got, err := on.Restore(ctx, i, s.ID, s.Bytes)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.attachFailed(s, err)
		return false, false
	}
	on.slots[i] = slot{prompt: p, tokens: got.Tokens, again: true, task: on.slots[i].task}
	m.disk.attaching.measured(s.Bytes, got.Took)
	m.counts.Filled++
	m.worked(FailedAttach)
	m.Log.Debug("context attached before anybody asks", "model", s.Model, "context", s.ID,
		"tokens", s.Tokens, "slot", i, "took", got.Took)
	return true, true
}

// empty returns the first empty slot of an engine, or -1. It takes the first since the engine gives
// the last never used slot to a prompt that fits none.
func (m *Manager) empty(ctx context.Context, on *live) int {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	list, err := on.Engine.Slots(ctx)
	if err != nil {
		return -1
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	empty := func(told engine.Slot) bool {
		return told.ID < len(on.slots) && !told.Processing && told.Tokens == 0 &&
			on.slots[told.ID].tokens == 0 && !on.slots[told.ID].claimed
	}
	if i := slices.IndexFunc(list, empty); i >= 0 {
		return list[i].ID
	}
	return -1
}
