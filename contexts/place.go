package contexts

import (
	"context"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// place is what is known of where a request runs, on an engine with several slots. The engine
// chooses the slot and does not say whose request it serves there, but it numbers its tasks in
// order of arrival.
type place struct {
	after   int           // its own task has a larger number
	running []engine.Slot // the engine's slots when the answer had begun
	at      *engine.Slot  // the one of these on which it certainly runs; nil: not known
	begun   bool          // its answer has begun
	holds   int           // tokens that its slot holds after it has ended; 0: it has not
	lost    bool          // its slot cannot be told from another's
}

// sends records that the request is sent now.
func (u *Use) sends() {
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	if len(u.on.slots) > 1 {
		u.on.open = append(u.on.open, u)
	}
}

// close records that the request's slot is known, or will never be. Manager.mu must be held.
func (u *Use) close() {
	u.on.open = slices.DeleteFunc(u.on.open, func(o *Use) bool { return o == u })
}

// alike returns the requests whose slots are not known yet and that satisfy a condition, in the
// order in which they were sent. Manager.mu must be held.
func (l *live) alike(is func(p *place) bool) (list []*Use) {
	for _, o := range l.open {
		if o.place.at == nil && is(&o.place) {
			list = append(list, o)
		}
	}
	return list
}

// Began records that the answer has begun, as a stream. An engine reports how much of a prompt it
// has reused, and in which slot, only until the answer has ended, so it is asked now. If there is
// one slot, and the answer will report the reuse, there is nothing to ask.
func (u *Use) Began(tellsCached bool) {
	if u == nil || u.on == nil || tellsCached && len(u.on.slots) == 1 {
		return
	}
	on := u.on
	u.m.mu.Lock()
	u.place.begun = true
	u.m.mu.Unlock()
	u.m.ending.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
		defer cancel()
		list, err := on.Engine.Slots(ctx)
		if err != nil {
			return
		}
		u.m.mu.Lock()
		defer u.m.mu.Unlock()
		if u.on != on { // it was replaced
			return
		}
		u.place.running = list
		of := u.candidates(list, func(s engine.Slot) bool {
			return s.Processing && s.Tokens > s.Processed+s.Cached // part of an answer, too
		})
		alike := u.on.alike(func(p *place) bool { return p.begun && p.holds == 0 })
		if len(of) == 1 && len(alike) == 1 && alike[0] == u {
			u.place.at = &of[0]
			u.on.slots[of[0].ID].task = of[0].Task // no other request's
		}
	})
}

// Cached returns how many of the total tokens of the request's prompt were reused, if its engine
// has reported that.
func (u *Use) Cached(total int) (cached int, ok bool) {
	if u == nil || u.on == nil {
		return 0, false
	}
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	s, ok := u.counted(total)
	return s.Cached, ok
}

// counted finds the slot on which the request ran by the tokens of its prompt. Manager.mu must be
// held.
func (u *Use) counted(total int) (found engine.Slot, ok bool) {
	if at := u.place.at; at != nil {
		return *at, at.Processed+at.Cached == total
	}
	of := u.candidates(u.place.running, func(s engine.Slot) bool {
		return total > 0 && s.Processed+s.Cached == total
	})
	if len(of) != 1 {
		return engine.Slot{}, false
	}
	return of[0], true
}

// candidates returns the fitting slots that the request may have used last, in the order of their
// tasks: those tasks have no known request, and began after this one was sent. If one of the slots
// is the expected one, it is that one. Manager.mu must be held.
func (u *Use) candidates(list []engine.Slot, fits func(engine.Slot) bool) (of []engine.Slot) {
	for _, s := range list {
		if s.ID >= len(u.on.slots) || s.Task <= max(u.place.after, u.on.slots[s.ID].task) || !fits(s) {
			continue
		}
		if s.ID == u.slot {
			return []engine.Slot{s}
		}
		if !u.on.slots[s.ID].claimed {
			of = append(of, s)
		}
	}
	slices.SortFunc(of, func(a, b engine.Slot) int { return a.Task - b.Task })
	return of
}

// ran finds the slot of a request that has just ended. Of several that ended at once and hold the
// same number of tokens, the one sent first got the first task. Manager.mu must be held.
func (u *Use) ran(list []engine.Slot, held *slot) (found engine.Slot, ok bool) {
	if at := u.place.at; at != nil {
		i := slices.IndexFunc(list, func(s engine.Slot) bool { return s.ID == at.ID && s.Task == at.Task })
		if i < 0 {
			return engine.Slot{}, false
		}
		return list[i], !list[i].Processing && held.holds(list[i].Tokens)
	}
	of := u.candidates(list, func(s engine.Slot) bool { return !s.Processing && s.Tokens == u.place.holds })
	if len(of) == 1 && of[0].ID == u.slot {
		return of[0], true
	}
	alike := u.on.alike(func(p *place) bool { return p.holds == u.place.holds })
	rank := slices.Index(alike, u)
	if u.place.lost || rank < 0 || len(of) != len(alike) {
		for _, o := range alike { // another request has begun in the slot of one of them
			o.place.lost = true
		}
		return engine.Slot{}, false
	}
	return of[rank], true
}

// identify finds the slot of a request that has just ended, and records what that holds. It returns
// -1 if there is none, or if another request has begun there.
func (u *Use) identify(ctx context.Context, held slot) int {
	m, on := u.m, u.on
	if len(on.slots) == 1 {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	list, err := on.Engine.Slots(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	defer u.close()
	if err != nil {
		return -1
	}
	s, ok := u.ran(list, &held)
	if !ok {
		return -1
	}
	held.task, held.claimed = s.Task, on.slots[s.ID].claimed
	on.slots[s.ID] = held
	return s.ID
}
