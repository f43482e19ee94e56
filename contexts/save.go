package contexts

import (
	"context"
	"errors"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// again estimates how long so many tokens of a stored state take to evaluate: from what was learned
// of the model, otherwise from what was known when it was stored. m.mu must be held.
func (m *Manager) again(s stored, tokens int) time.Duration {
	if t := m.learned(s.Format).evaluation(tokens); t > 0 {
		return t
	}
	return time.Duration(float64(s.Cost) * float64(max(tokens, 0)) / float64(max(s.Tokens, 1)))
}

// gain estimates how much time attaching a state saves, if a slot already holds the first tokens of
// the prompt.
func (m *Manager) gain(s stored, warm int) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.again(s, s.reach-warm) - m.disk.attaching.estimate(s.Bytes)
}

// pays reports whether a state is to be attached.
func (m *Manager) pays(s stored, warm int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	saves, takes := m.again(s, s.reach-warm), m.disk.attaching.estimate(s.Bytes)
	return saves >= leastGain && saves >= pays*takes && m.learned(s.Format).useful(s.exact)
}

// check has all of a state's file read, unless that was done before, for as long as it may gain
// anything. A disk that is too slow for that is too slow to attach it.
func (m *Manager) check(ctx context.Context, s stored, gain time.Duration) error {
	limit := max(gain, time.Second) // a shorter time says nothing about a disk
	reading, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := m.Files.Check(reading, s.ID)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.disk.attaching.measured(s.Bytes, limit)
	}
	return err
}

// attachFailed records that attaching a state failed. m.mu must be held.
func (m *Manager) attachFailed(s stored, err error) {
	switch {
	case errors.Is(err, engine.ErrRefused):
		m.Files.Drop(s.ID, "the engine refused it")
	case !errors.Is(err, engine.ErrGone): // otherwise the next engine does not know of it
		m.learned(s.Format).judge(s.exact, false) // each costs time, and what the slot held
	}
	m.failed(FailedAttach, "a stored context could not be attached; requests go on without",
		"model", s.Model, "context", s.ID, "err", err)
}

// unstored returns how many of a slot's tokens are in no stored state.
func (m *Manager) unstored(on *live, s slot) int {
	if s.tokens < leastTokens || len(s.contents) == 0 || s.cannot {
		return 0
	}
	covered, ok := m.best(on.Format, 0, Request{Owner: s.owner, Contents: s.contents})
	if !ok {
		return s.tokens
	}
	if covered.exact && len(covered.Links) == len(s.contents) {
		return s.tokens - covered.Tokens
	}
	return s.tokens - covered.reach
}

// unsaved estimates how long it would take to evaluate what a slot holds and no stored state has.
func (m *Manager) unsaved(on *live, s slot) time.Duration {
	n := m.unstored(on, s)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.learned(on.Format).evaluation(n)
}

// due reports whether what a slot holds is to be saved.
func (m *Manager) due(on *live, i int, when occasion) bool {
	m.mu.Lock()
	s := on.slots[i]
	m.mu.Unlock()
	return m.saves(on, s, when)
}

// saves reports whether what a slot holds is to be saved.
func (m *Manager) saves(on *live, s slot, when occasion) bool {
	n := m.unstored(on, s)
	if n < leastTokens {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.learned(on.Format)
	if !l.useful(false) && !l.useful(true) {
		return false
	}
	worth, takes := l.evaluation(n), m.disk.saving.estimate(l.size(s.tokens))
	if l.perState == 0 {
		when = min(when, trying)
	}
	return worth >= leastGain && float64(worth) >= float64(when)*float64(takes)
}

// save has the engine save what a slot holds, or waits for a save that is under way. It reports
// whether the state is stored now.
func (m *Manager) save(ctx context.Context, on *live, i int) bool {
	m.mu.Lock()
	if under := on.saving[i]; under != nil {
		s := on.slots[i]
		m.mu.Unlock()
		select {
		case <-under:
		case <-ctx.Done():
		}
		return m.unstored(on, s) < leastTokens
	}
	under := make(chan struct{})
	on.saving[i] = under
	m.mu.Unlock()
	defer close(under)
	stored := m.saveNow(on, i)
	m.mu.Lock()
	defer m.mu.Unlock()
	on.saving[i] = nil
	return stored
}

func (m *Manager) saveNow(on *live, i int) bool {
	m.mu.Lock()
	s, l := on.slots[i], m.learned(on.Format)
	state := contextstore.State{
		Format: on.Format, Model: s.model, Owner: s.owner, Links: s.contents, LinkTokens: s.upTo,
		Tokens: s.tokens, Cost: l.evaluation(s.tokens),
	}
	state.Bytes, state.Uses = l.size(s.tokens), 1
	if l.perState == 0 { // an estimate must not cause a refusal
		state.Bytes = min(state.Bytes, m.Files.Stats().Limits.Bytes)
	}
	if s.again {
		state.Uses = 2
	}
	m.mu.Unlock()
	name, err := m.Files.Room(state)
	if err != nil {
		return errors.Is(err, contextstore.ErrHeld)
	}
	// An engine that has begun continues, whether or not the client that waits for it leaves.
	ctx, cancel := context.WithTimeout(m.life, saveTimeout)
	defer cancel()
	saved, err := on.Save(ctx, i, name)
	if err != nil || !s.holds(saved.Tokens) {
		m.Log.Debug("context not saved", "model", s.model, "slot", i, "tokens", saved.Tokens,
			"prompt", s.size(), "expected", s.tokens, "err", err)
		m.Files.Abort(name)
		m.notSaved(on, i, state, err)
		return false
	}
	state.Tokens = saved.Tokens
	_, err = m.Files.Commit(name, state)

	m.mu.Lock()
	defer m.mu.Unlock()
	learnFrom(&l.perState, float64(saved.Bytes)/float64(max(saved.Tokens, 1)))
	m.disk.saving.measured(saved.Bytes, saved.Took) // not while it waited for the engine
	if err != nil {
		m.failed(FailedSave, "a context could not be stored; requests go on without",
			"model", s.model, "err", err)
		return false
	}
	m.worked(FailedSave)
	m.counts.Saved++
	m.counts.SavedBytes += uint64(saved.Bytes)
	m.Log.Debug("context saved", "model", s.model, "tokens", saved.Tokens, "bytes", saved.Bytes, "slot", i,
		"took", saved.Took)
	return true
}

// notSaved records that the engine could not save a state, or, if err is nil, that its slot holds
// something other than expected.
func (m *Manager) notSaved(on *live, i int, state contextstore.State, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		m.counts.Failed[FailedChanged]++
		on.slots[i] = slot{task: on.slots[i].task, claimed: on.slots[i].claimed}
		return
	}
	switch {
	case errors.Is(err, engine.ErrUnsupported): // such as a prompt with an image
		on.slots[i].cannot = true
	case !errors.Is(err, engine.ErrGone): // otherwise the disk is not to blame
		m.disk.saving.measured(state.Bytes, saveTimeout)
	}
	m.failed(FailedSave, "a context could not be saved; requests go on without",
		"model", state.Model, "err", err)
}

// Leave is called before the models that a server has loaded may have to make room. It saves what
// is worth it.
func (m *Manager) Leave(ctx context.Context, port int) {
	if m == nil {
		return
	}
	for _, on := range m.scan() {
		if on.Port == port {
			m.rest(ctx, on, leaving)
		}
	}
}

// look asks an engine without requests what its slots hold, and forgets what is believed of those
// that hold something else, since others have used them.
func (m *Manager) look(ctx context.Context, on *live) {
	if !on.act(ctx) { // so that no request begins meanwhile
		return
	}
	defer on.rest()
	if m.active(on) > 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	list, err := on.Engine.Slots(ctx)
	if err != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, told := range list {
		if told.ID >= len(on.slots) || told.Task < 0 { // a slot reports nothing before its first request
			continue
		}
		if s := &on.slots[told.ID]; s.tokens > 0 && !s.holds(told.Tokens) {
			*s = slot{task: told.Task}
		}
	}
}

// holds reports whether what a slot is believed to hold has as many tokens as its engine reports.
// Of the answer it holds all but the last token, or less if a stop word ended it.
func (s *slot) holds(tokens int) bool { return tokens >= s.size()-1 && tokens <= s.tokens+1 }

// active returns how many requests are under way to an engine.
func (m *Manager) active(on *live) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return on.active
}

// rest saves what an engine's slots hold, if no request is under way there.
func (m *Manager) rest(ctx context.Context, on *live, when occasion) {
	if !on.act(ctx) {
		return
	}
	defer on.rest()
	for i := range on.slots {
		if m.active(on) > 0 || ctx.Err() != nil {
			return
		}
		if m.due(on, i, when) {
			m.save(ctx, on, i)
		}
	}
}

const (
	restAfter  = time.Second      // of idleness, until what is worth it is saved
	leaveAfter = 20 * time.Second // … and what is worth it only since it may be lost
	scanEvery  = 5 * time.Second
	scanSoon   = 100 * time.Millisecond // while a model is loaded for a request
)

// Run saves what is worth it while the engines are idle, until ctx ends, and then once more.
func (m *Manager) Run(ctx context.Context) {
	if m == nil {
		return
	}
	for ctx.Err() == nil {
		wait := scanEvery
		if m.loading.Load() > 0 {
			wait = scanSoon
		}
		for _, on := range m.scan() {
			m.mu.Lock()
			active, idle := on.active, time.Since(on.ended)
			m.mu.Unlock()
			switch {
			case active > 0:
				continue
			case idle < restAfter:
				wait = min(wait, restAfter-idle)
				continue
			case idle < leaveAfter:
				wait = min(wait, leaveAfter-idle)
			}
			m.look(ctx, on)
			if idle >= leaveAfter {
				m.rest(ctx, on, leaving)
			} else {
				m.rest(ctx, on, resting)
			}
		}
		select {
		case <-ctx.Done():
		case <-m.wake:
		case <-time.After(wait):
		}
	}
	last := time.AfterFunc(endTimeout, m.end) // an engine that hangs is not waited for
	defer last.Stop()
	m.ending.Wait()
	for _, on := range m.scan() {
		m.rest(m.life, on, leaving)
	}
}
