package proxy

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// keeper is the part of *upstream.Server that residency needs.
type keeper interface {
	Loaded(ctx context.Context) ([]upstream.Loaded, error)
	Keep(ctx context.Context, model string, d time.Duration, embedding bool,
		options map[string]any, shift *bool) error
}

// residency keeps models loaded that are used through /v1 and /v1/messages, whose requests cannot
// carry a keep_alive. It sends one empty native request per model and load: a touch. It treats
// native requests that need no keep_alive, since the model is held already, in the same way. It
// also remembers the longest keep_alive that a client has asked for.
//
// A touch should never load a model: it is sent only while /api/ps lists the model, with the
// context length seen after the proxy's own requests, and it states the options of the last of
// those. Touches only follow requests of the proxy's clients: what others, who use Ollama directly,
// do to the model later is not undone.
//
// A model is touched as soon as one of its requests is answered, or while one runs for long. From
// then on its expiry is checked once the model has been idle for a moment after a request (while
// one runs, and just after, /api/ps reports an old one): the model counts as held if it expires no
// earlier than the last keep_alive sent for it implies.
type residency struct {
	upstream keeper
	runners  *runners.Book
	keep     KeepAlive
	always   bool // put keep_alive into every request that has none: nothing else holds a model
	touched  func(model string, err error)
	log      *slog.Logger
	wake     chan struct{} // has room for one

	mu     sync.Mutex
	models *simplelru.LRU[string, *residence] // by weights, as in package runners; guarded by mu
}

// residence is the state of one model. Guarded by residency.mu.
type residence struct {
	key, name string // as the last request spelled it
	embed     bool   // … and whether that was for embeddings
	inFlight  int
	began     time.Time // when the first of the requests in flight began
	ended     time.Time // when a request last ended

	stated      prefix.Options // stated by the last request that was answered …
	statedKnown bool           // … if they are known
	context     int            // tokens, reported by /api/ps for a load with those; 0: unknown

	foreign bool // used without keep_alive since it was last unloaded
	// A request without keep_alive was answered: the model is loaded, and nothing is known to hold
	// it.
	answered bool
	pending  bool      // to be checked once it has been idle for idleDelay
	unloaded bool      // a client asked to unload it, and nobody has used it since
	checked  time.Time // when /api/ps was last looked at for this model
	quiet    time.Time // no touch before this time, since one was refused

	longest time.Duration  // the longest keep_alive that a client asked for since the load
	keptAt  time.Time      // when the keep_alive in force was sent; zero if none is known for this load
	keptFor time.Duration  // that keep_alive
	options prefix.Options // the model was held with these; the zero value if they are unknown
}

const (
	residencyModels = 1024            // models remembered
	idleDelay       = 2 * time.Second // Ollama notices the end of a request asynchronously
	checkEvery      = time.Second     // the shortest interval between two calls of /api/ps
	// Between two touches of one load: after a refused one, or if the expiry stays short.
	touchPause    = 30 * time.Second
	touchTimeout  = 2 * time.Minute // the touch waits in Ollama's queue behind a load
	loadedTimeout = 5 * time.Second
	expirySlack   = 5 * time.Second // Date headers count whole seconds
)

func newResidency(up keeper, book *runners.Book, keep KeepAlive, touched func(string, error), log *slog.Logger) *residency {
	models, err := simplelru.NewLRU[string, *residence](residencyModels, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return &residency{upstream: up, runners: book, keep: keep, touched: touched, log: log, wake: make(chan struct{}, 1), models: models}
}

// get returns the model's residence, and creates it if necessary. r.mu must be held.
func (r *residency) get(weights string) *residence {
	m, ok := r.models.Get(weights)
	if !ok {
		m = &residence{}
		r.models.Add(weights, m)
	}
	return m
}

// use is one request's part in a model's residence. The zero use does nothing.
type use struct {
	r      *residency
	m      *residence
	run    *runners.Request
	stated *prefix.Options // options that the request states; nil: unknown

	// For a native request: what takes effect when the upstream accepts it.
	native   bool
	began    time.Time
	set      bool          // it states a keep_alive …
	duration time.Duration // … which is this one
	sent     Hold          // what the proxy sent instead, or added; zero if nothing
}

// begin records a request that is about to be sent, with its run in package runners. r.mu must be
// held.
func (r *residency) begin(run *runners.Request, name string, embed bool, stated *prefix.Options) use {
	m := r.get(run.Options.Model)
	m.key, m.name, m.embed = run.Name, name, embed
	now := time.Now()
	if since := run.Since(); m.keptAt.Before(since) {
		m.gone() // that load has ended
	}
	if m.inFlight == 0 && !m.keptAt.IsZero() && now.Sub(later(m.ended, m.keptAt)) > m.keptFor {
		m.gone() // its keep_alive has run out, even if nobody saw the model unloaded
		run.Expired(now)
	}
	if m.inFlight++; m.inFlight == 1 {
		m.began = now
	}
	return use{r: r, m: m, run: run, stated: stated, began: now}
}

// beginForeign records a request that cannot carry keep_alive.
func (r *residency) beginForeign(run *runners.Request, name string, embed bool, stated *prefix.Options) use {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.begin(run, name, embed, stated)
	if u.m.foreign, u.m.unloaded = true, false; u.m.keptAt.IsZero() {
		r.nudge()
	}
	return u
}

// beginNative records a native request and decides about its keep_alive: see KeepAlive.decide.
//
// A model that is held already is not held again. A request that waits in Ollama for a loaded model
// to make room would otherwise wait until every keep_alive that arrives meanwhile has run out
// (Ollama, server/sched.go: each one cancels the pending unload). Whether the model is still held
// is checked as for requests that cannot carry keep_alive. For the same reason the proxy does not
// hold a model while a request in flight may be waiting like that; a later request holds it.
func (r *residency) beginNative(run *runners.Request, name string, embed bool, stated *prefix.Options, f fields) (use, string, Hold) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.begin(run, name, embed, stated)
	m := u.m
	did, hold := r.keep.decide(r.keep.floor(m.key, m.longest), f)
	if did == didInject && !r.always {
		switch {
		case run.Known && !m.keptAt.IsZero() && m.keptFor >= hold.Duration && m.options == run.Options:
			did, hold = didHold, Hold{}
			m.foreign = true
		case run.Mixed():
			// Nobody knows which of them is loaded in the end. The next request that is alone holds
			// it.
			did, hold, m.keptAt, m.foreign = didSpare, Hold{}, time.Time{}, false
		case run.Beside():
			did, hold = didSpare, Hold{}
		}
	}
	u.native, u.set, u.duration, u.sent = true, f.keepAlive == keepAliveSet, f.duration, hold
	return u, did, hold
}

// answer records that the upstream has accepted the request: only now does what it states take
// effect.
func (u use) answer() {
	if u.r == nil {
		return
	}
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	m := u.m
	if u.unloads() {
		*m = residence{key: m.key, name: m.name, inFlight: m.inFlight, began: m.began, unloaded: true}
		return
	}
	if m.statedKnown = u.stated != nil; m.statedKnown && m.stated != *u.stated {
		m.stated, m.context = *u.stated, 0
	}
	if !u.native {
		if m.keptAt.IsZero() {
			m.answered, m.checked = true, time.Time{}
			u.r.nudge()
		}
		return
	}
	if m.unloaded = false; u.set {
		m.longest = max(m.longest, u.duration)
		m.keptAt, m.keptFor = u.began, u.duration // the client's own value wins
	}
	sent := u.sent != (Hold{}) && !u.run.Mixed()
	if sent {
		m.keptAt, m.keptFor = u.began, u.sent.Duration
	}
	if u.set || sent {
		if m.options = (prefix.Options{}); u.run.Known {
			m.options = u.run.Options
		}
	}
}

// unloads reports whether the request asks to unload its model.
func (u use) unloads() bool { return u.set && u.duration == 0 && u.sent == (Hold{}) }

// end records the end of the request.
func (u use) end() {
	if u.r == nil {
		return
	}
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	u.m.inFlight--
	u.m.ended = time.Now()
	if u.m.inFlight == 0 && u.m.foreign && !u.m.unloaded {
		u.m.pending = true
		u.r.nudge()
	}
}

func (r *residency) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// gone resets what was known of the load that has ended.
func (m *residence) gone() {
	m.keptAt, m.longest, m.answered, m.quiet = time.Time{}, 0, false, time.Time{}
}

// changed reports whether the model is loaded with another context than the proxy's clients had it
// loaded with. A touch states what they stated, so it would load the model again.
func (m *residence) changed(l upstream.Loaded) bool {
	was := m.context
	m.context = l.ContextLength
	if stated := m.stated.NumCtx(); was == 0 {
		// The model may have been made for less: if this is seen once more, it is the context.
		was = stated
	}
	return was != 0 && l.ContextLength != 0 && was != l.ContextLength
}

// run keeps models loaded until ctx ends.
func (r *residency) run(ctx context.Context) {
	for {
		var timer <-chan time.Time
		if wait, ok := r.due(time.Now()); ok {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-timer:
			r.check(ctx)
		}
	}
}

// due returns how long to wait until the next check; false if there is nothing to check.
func (r *residency) due(now time.Time) (wait time.Duration, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var at time.Time
	for _, m := range r.models.Values() {
		if t, open := m.due(); open && (!ok || t.Before(at)) {
			at, ok = t, true
		}
	}
	return at.Sub(now), ok
}

// due returns when to check the model; false if there is no need.
func (m *residence) due() (time.Time, bool) {
	at := later(m.quiet, m.checked.Add(checkEvery))
	switch {
	case !m.foreign || m.unloaded:
		return at, false
	case m.keptAt.IsZero() && m.answered:
		return at, true
	case m.keptAt.IsZero() && m.inFlight > 0:
		return later(at, m.began.Add(checkEvery)), true
	}
	return later(at, m.ended.Add(idleDelay)), m.inFlight == 0 && m.pending
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// check finds out what is loaded, and touches models that are not held.
func (r *residency) check(ctx context.Context) {
	now := time.Now()
	looking, cancel := context.WithTimeout(ctx, loadedTimeout)
	list, err := r.upstream.Loaded(looking)
	cancel()
	loaded := r.runners.ByWeights(list)

	type touch struct {
		weights, name string
		d             time.Duration
		embed         bool
		stated        prefix.Options
	}
	var touches []touch
	r.mu.Lock()
	for _, weights := range r.models.Keys() {
		m, _ := r.models.Peek(weights)
		at, open := m.due()
		if !open || at.After(now) {
			continue
		}
		if m.checked = now; err != nil {
			continue // tried again after checkEvery; polls report an upstream that is down
		}
		want := r.keep.floor(m.key, m.longest)
		if l, isLoaded := loaded[weights]; m.needsTouch(want, l, isLoaded, now) {
			touches = append(touches, touch{weights, m.name, want.Duration, m.embed, m.stated})
		}
	}
	r.mu.Unlock()

	for _, t := range touches {
		sent := time.Now()
		err := r.touch(ctx, t.name, t.d, t.embed, t.stated)
		if ctx.Err() != nil {
			return
		}
		r.touched(t.name, err)
		r.mu.Lock()
		m := r.get(t.weights)
		unloaded := m.unloaded // while the touch was under way, which may have loaded the model again
		switch {
		case err != nil:
			m.quiet = time.Now().Add(touchPause)
			r.log.Warn("keep_alive could not be set", "model", t.name, "err", err)
		case !unloaded:
			m.keptAt, m.keptFor, m.pending, m.answered = sent, t.d, false, false
			r.log.Debug("keep_alive set", "model", t.name, "keep_alive", t.d)
		}
		r.mu.Unlock()
		if unloaded {
			again, cancel := context.WithTimeout(ctx, loadedTimeout)
			r.upstream.Keep(again, t.name, 0, false, nil, nil) // refused or not, the client's unload has been repeated
			cancel()
		}
	}
}

// needsTouch compares the model with its entry in /api/ps at the time now, and reports whether it
// is loaded as the proxy's clients had it loaded, but not held for as long as it should be. If it
// need not be touched, needsTouch records what is now known.
func (m *residence) needsTouch(want Hold, l upstream.Loaded, isLoaded bool, now time.Time) bool {
	switch {
	case want == Hold{}:
		m.pending, m.answered, m.keptAt = false, false, now // nothing was promised for this model
	case !isLoaded && m.inFlight > 0: // still loading, or waiting to
	case !isLoaded:
		m.pending = false
		m.gone()
	case m.changed(l) || !m.statedKnown:
		m.pending, m.answered = false, false
	case m.keptAt.IsZero():
		return true
	case l.ExpiresAt.Before(m.keptAt.Add(m.keptFor - min(expirySlack, m.keptFor/2))):
		return true
	default:
		m.pending = false
	}
	return false
}

// touch sets how long a loaded model stays loaded. stated are the options that it is loaded with.
func (r *residency) touch(ctx context.Context, name string, d time.Duration, embed bool, stated prefix.Options) error {
	ctx, cancel := context.WithTimeout(ctx, touchTimeout)
	defer cancel()
	options, shift := stated.Request()
	err := r.upstream.Keep(ctx, name, d, embed, options, shift)
	if !embed && upstream.StatusCode(err) == http.StatusBadRequest {
		// The model can only do embeddings.
		err = r.upstream.Keep(ctx, name, d, true, options, nil)
	}
	return err
}
