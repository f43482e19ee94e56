package proxy

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// keeper is what residency needs of a server: *upstream.Server.
type keeper interface {
	Loaded(ctx context.Context) ([]upstream.Loaded, error)
	Keep(ctx context.Context, model string, d time.Duration, embedding bool) error
}

// residency keeps loaded the models that are used through /v1 and /v1/messages, whose requests cannot carry keep_alive.
// It sends one empty native request per model and load, and only for a model that is loaded: it never brings one back
// that was evicted or unloaded. It also remembers the longest keep_alive that a client asked for.
//
// A model's expiry as /api/ps tells it is stale while a request runs, so a model is judged when it has been idle for
// a moment: held if it expires no earlier than the last keep_alive sent for it implies.
type residency struct {
	upstream keeper
	want     func(model string) Hold // by upstream.ModelKey
	touched  func(model string, err error)
	log      *slog.Logger
	wake     chan struct{} // holds one

	mu        sync.Mutex
	models    *simplelru.LRU[string, *residence] // by upstream.ModelKey; guarded by mu
	lastCheck time.Time                          // guarded by mu
}

// residence is what is known of one model. Guarded by residency.mu.
type residence struct {
	name     string // as a client spelled it last
	inFlight int
	ended    time.Time     // when a request last ended
	longest  time.Duration // the longest keep_alive that a client asked for since the load
	foreign  bool          // used through a dialect without keep_alive since it was last unloaded
	embed    bool          // … and last for embeddings
	unloaded bool          // a client asked to unload it, and nobody has used it since
	pending  bool          // to be judged when it has been idle for idleDelay
	keptAt   time.Time     // when the keep_alive in force was sent; zero if none is known for this load
	keptFor  time.Duration // that keep_alive
	quiet    time.Time     // after a failure: no touch before
}

const (
	residencyModels = 1024             // models remembered
	idleDelay       = 2 * time.Second  // Ollama notices the end of a request asynchronously
	checkEvery      = time.Second      // /api/ps is asked no more often
	afterFailure    = 30 * time.Second // before a refused touch is tried again
	touchTimeout    = 10 * time.Minute // the touch waits its turn behind a load in Ollama's queue
	expirySlack     = 5 * time.Second  // Date headers count whole seconds
)

func newResidency(up keeper, want func(string) Hold, touched func(string, error), log *slog.Logger) *residency {
	models, err := simplelru.NewLRU[string, *residence](residencyModels, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return &residency{upstream: up, want: want, touched: touched, log: log, wake: make(chan struct{}, 1), models: models}
}

// get returns the model's residence, made if need be. r.mu must be held.
func (r *residency) get(key string) *residence {
	m, ok := r.models.Get(key)
	if !ok {
		m = &residence{}
		r.models.Add(key, m)
	}
	return m
}

// use is one request's hold on a model's residence. The zero use does nothing.
type use struct {
	r *residency
	m *residence
}

// beginForeign notes a request that cannot carry keep_alive.
func (r *residency) beginForeign(key, name string, embed bool) use {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.get(key)
	m.name, m.foreign, m.embed, m.unloaded = name, true, embed, false
	m.inFlight++
	if m.keptAt.IsZero() {
		r.nudge()
	}
	return use{r, m}
}

// beginNative notes a native request and decides about its keep_alive: see KeepAlive.decide.
func (r *residency) beginNative(key, name string, k KeepAlive, f fields) (use, string, Hold) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.get(key)
	m.name = name
	m.inFlight++
	did, hold := k.decide(k.For(key), f, m.longest)
	switch set := f.keepAlive == keepAliveSet; {
	case set && f.duration == 0:
		*m = residence{name: name, inFlight: m.inFlight, unloaded: true}
	default:
		if m.unloaded = false; set {
			m.longest = max(m.longest, f.duration)
		}
		if hold != (Hold{}) {
			m.keptAt, m.keptFor = time.Now(), hold.Duration
		} else if set {
			m.keptAt, m.keptFor = time.Now(), f.duration // the client's own value wins
		}
	}
	return use{r, m}, did, hold
}

// end says that the request is over.
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

// polled takes in what a poll of the upstream found.
func (r *residency) polled(st upstream.State) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if st.Up && !st.Restarted && !st.LoadedKnown {
		return
	}
	loaded := byKey(st.Loaded)
	for _, key := range r.models.Keys() {
		m, _ := r.models.Peek(key)
		if _, ok := loaded[key]; !st.Up || !ok && m.inFlight == 0 && m.ended.Before(st.Polled) {
			m.gone()
		}
	}
}

// gone forgets what held for the load that ended.
func (m *residence) gone() { m.keptAt, m.longest = time.Time{}, 0 }

func byKey(loaded []upstream.Loaded) map[string]upstream.Loaded {
	byKey := make(map[string]upstream.Loaded, len(loaded))
	for _, l := range loaded {
		byKey[upstream.ModelKey(l.Name)] = l
	}
	return byKey
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
	if earliest := r.lastCheck.Add(checkEvery); at.Before(earliest) {
		at = earliest
	}
	return at.Sub(now), ok
}

// due returns when the model is to be looked at; false if it need not be.
func (m *residence) due() (time.Time, bool) {
	switch {
	case !m.foreign || m.unloaded:
		return time.Time{}, false
	case m.inFlight > 0 && m.keptAt.IsZero():
		return m.quiet, true
	case m.inFlight == 0 && m.pending:
		return later(m.ended.Add(idleDelay), m.quiet), true
	}
	return time.Time{}, false
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// check asks what is loaded and touches what is not held.
func (r *residency) check(ctx context.Context) {
	now := time.Now()
	r.mu.Lock()
	r.lastCheck = now
	r.mu.Unlock()
	list, err := r.upstream.Loaded(ctx)
	if err != nil {
		return // asked again after checkEvery; an upstream that is down is reported by its polls
	}
	loaded := byKey(list)

	type touch struct {
		key, name string
		d         time.Duration
		embed     bool
	}
	var touches []touch
	r.mu.Lock()
	for _, key := range r.models.Keys() {
		m, _ := r.models.Peek(key)
		at, open := m.due()
		if !open || at.After(now) {
			continue
		}
		want := r.want(key)
		l, isLoaded := loaded[key]
		switch {
		case want == Hold{}:
			m.pending, m.keptAt = false, now // nothing is promised for this model
		case !isLoaded && m.inFlight > 0: // still loading, or waiting to
		case !isLoaded:
			m.pending = false
			m.gone()
		case !m.keptAt.IsZero() && !l.ExpiresAt.Before(m.keptAt.Add(m.keptFor-min(expirySlack, m.keptFor/2))):
			m.pending = false
		default:
			touches = append(touches, touch{key, m.name, max(want.Duration, m.longest), m.embed})
		}
	}
	r.mu.Unlock()

	for _, t := range touches {
		sent := time.Now()
		err := r.touch(ctx, t.name, t.d, t.embed)
		if ctx.Err() != nil {
			return
		}
		r.touched(t.name, err)
		r.mu.Lock()
		m := r.get(t.key)
		unloaded := m.unloaded // while the touch was under way, which may have loaded the model again
		switch {
		case err != nil:
			m.quiet = time.Now().Add(afterFailure)
			r.log.Warn("keep_alive could not be set", "model", t.name, "err", err)
		case !unloaded:
			m.keptAt, m.keptFor = sent, t.d
			r.log.Debug("keep_alive set", "model", t.name, "keep_alive", t.d)
		}
		r.mu.Unlock()
		if unloaded {
			r.upstream.Keep(ctx, t.name, 0, false) // refused or not, the client's unload has been repeated
		}
	}
}

func (r *residency) touch(ctx context.Context, name string, d time.Duration, embed bool) error {
	ctx, cancel := context.WithTimeout(ctx, touchTimeout)
	defer cancel()
	err := r.upstream.Keep(ctx, name, d, embed)
	if !embed && upstream.StatusCode(err) == http.StatusBadRequest {
		err = r.upstream.Keep(ctx, name, d, true) // a model that can do nothing but embeddings
	}
	return err
}
