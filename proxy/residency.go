package proxy

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// keeper is what residency needs of a server: *upstream.Server.
type keeper interface {
	Loaded(ctx context.Context) ([]upstream.Loaded, error)
	Keep(ctx context.Context, model string, d time.Duration, embedding bool) error
}

// residency keeps loaded the models that are used through /v1 and /v1/messages, whose requests cannot carry keep_alive.
// It sends one empty native request per model and load, and only for a model that is loaded: it never brings one back
// that was evicted or unloaded. Native requests that need not carry keep_alive, since the model is held, are the same. It also remembers the longest keep_alive that a client asked for.
//
// A model is touched as soon as a request of its is answered, or while one runs for long. From then on its expiry is
// judged, once it has been idle for a moment (while a request runs, and just after, /api/ps tells an old one): it is
// held if it expires no earlier than the last keep_alive sent for it implies.
type residency struct {
	upstream keeper
	keep     KeepAlive
	always   bool // put keep_alive into every request that has none: nothing else holds a model
	touched  func(model string, err error)
	log      *slog.Logger
	wake     chan struct{} // holds one

	mu     sync.Mutex
	models *simplelru.LRU[string, *residence] // by upstream.ModelKey; guarded by mu
}

// residence is what is known of one model. Guarded by residency.mu.
type residence struct {
	name     string // as a client spelled it last
	inFlight int
	asks     map[prefix.Options]int // of the native ones in flight, as far as their options are known
	began    time.Time              // when the first of the requests in flight began
	ended    time.Time              // when a request last ended
	answered bool                   // a request without keep_alive has been answered: the model is loaded, and nothing is known to hold it
	served   bool                   // a request was answered since the load began: it is loaded
	checked  time.Time              // when /api/ps was last looked at for this model
	longest  time.Duration          // the longest keep_alive that a client asked for since the load
	foreign  bool                   // used through a dialect without keep_alive since it was last unloaded
	embed    bool                   // … and last for embeddings
	unloaded bool                   // a client asked to unload it, and nobody has used it since
	pending  bool                   // to be judged when it has been idle for idleDelay
	keptAt   time.Time              // when the keep_alive in force was sent; zero if none is known for this load
	keptFor  time.Duration          // that keep_alive
	options  prefix.Options         // of the request that it was sent with; the zero value if they are not known
	quiet    time.Time              // no touch before
}

const (
	residencyModels = 1024             // models remembered
	idleDelay       = 2 * time.Second  // Ollama notices the end of a request asynchronously
	checkEvery      = time.Second      // /api/ps is asked no more often
	touchPause      = 30 * time.Second // between two touches of one load: after a refused one, or where expiry stays short
	touchTimeout    = 2 * time.Minute  // the touch waits its turn behind a load in Ollama's queue
	loadedTimeout   = 5 * time.Second
	expirySlack     = 5 * time.Second // Date headers count whole seconds
)

func newResidency(up keeper, keep KeepAlive, touched func(string, error), log *slog.Logger) *residency {
	models, err := simplelru.NewLRU[string, *residence](residencyModels, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return &residency{upstream: up, keep: keep, touched: touched, log: log, wake: make(chan struct{}, 1), models: models}
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

	// Of a native request, what becomes true when the upstream accepts it.
	began    time.Time
	set      bool          // it states a keep_alive of its own …
	duration time.Duration // … which is this
	sent     Hold          // what went upstream in place of that, or of none; zero if nothing did
	options  *prefix.Options
}

// beginForeign notes a request that cannot carry keep_alive.
func (r *residency) beginForeign(key, name string, embed bool) use {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.get(key)
	m.name, m.foreign, m.embed, m.unloaded = name, true, embed, false
	m.begin()
	if m.keptAt.IsZero() {
		r.nudge()
	}
	return use{r: r, m: m}
}

// beginNative notes a native request and decides about its keep_alive: see KeepAlive.decide. options are those with which
// it has the model loaded; nil: not known.
//
// What is held already is not held again: a request that waits in Ollama for a loaded model to make room would wait until
// every keep_alive that comes meanwhile has run out (Ollama, server/sched.go: it ends the unload that is pending). Whether the
// model is still held is judged as for requests that cannot carry keep_alive. For the same reason it is not held while a request in
// flight may wait like that; a later one holds it.
func (r *residency) beginNative(key, name string, embed bool, options *prefix.Options, f fields) (use, string, Hold) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.get(key)
	m.name = name
	m.begin()
	did, hold := r.keep.decide(r.keep.floor(key, m.longest), f)
	if did == didInject && !r.always && options != nil && !m.keptAt.IsZero() && m.keptFor >= hold.Duration && m.options == *options {
		did, hold = didHold, Hold{}
		m.foreign, m.embed = true, embed
	}
	if did == didInject && !r.always {
		switch {
		case m.mixed(options):
			// Which of them is loaded in the end is not known. The next one that is alone holds it; a touch would load the model with its default options.
			did, hold, m.keptAt, m.foreign = didSpare, Hold{}, time.Time{}, false
		case m.inFlight > 1 && r.loads(m):
			did, hold = didSpare, Hold{}
		}
	}
	if options != nil {
		if m.asks == nil {
			m.asks = map[prefix.Options]int{}
		}
		m.asks[*options]++
	}
	return use{r: r, m: m, began: time.Now(), set: f.keepAlive == keepAliveSet, duration: f.duration, sent: hold, options: options}, did, hold
}

// mixed reports whether requests with other options are in flight: one of them may wait in Ollama for what others use to make room.
func (m *residence) mixed(options *prefix.Options) bool {
	for o := range m.asks {
		if options == nil || o != *options {
			return true
		}
	}
	return false
}

// loads reports whether a request in flight may have to load another model, and wait in Ollama for this one to make room. r.mu must be held.
func (r *residency) loads(but *residence) bool {
	return slices.ContainsFunc(r.models.Values(), func(m *residence) bool { return m != but && m.inFlight > 0 && !m.served })
}

// begin notes the begin of a request. A load whose keep_alive has run out since the last one is over, whether or not
// anybody saw it end.
func (m *residence) begin() {
	now := time.Now()
	if m.inFlight == 0 && !m.keptAt.IsZero() && now.Sub(later(m.ended, m.keptAt)) > m.keptFor {
		m.gone()
	}
	if m.inFlight++; m.inFlight == 1 {
		m.began = now
	}
}

// answer says that the upstream has accepted the request: only now does what it asks for hold.
func (u use) answer() {
	if u.r == nil {
		return
	}
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	u.m.served = true
	switch m := u.m; {
	case u.began.IsZero(): // not native
		if m.keptAt.IsZero() {
			m.answered, m.checked = true, time.Time{}
			u.r.nudge()
		}
	case u.set && u.duration == 0:
		*m = residence{name: m.name, inFlight: m.inFlight, asks: m.asks, began: m.began, unloaded: true}
	default:
		if m.unloaded = false; u.set {
			m.longest = max(m.longest, u.duration)
			m.keptAt, m.keptFor = u.began, u.duration // the client's own value wins
		}
		sent := u.sent != (Hold{}) && !m.mixed(u.options)
		if sent {
			m.keptAt, m.keptFor = u.began, u.sent.Duration
		}
		if u.set || sent {
			if m.options = (prefix.Options{}); u.options != nil {
				m.options = *u.options
			}
		}
	}
}

// unloads reports whether the request asks to unload its model.
func (u use) unloads() bool { return u.set && u.duration == 0 && u.sent == (Hold{}) }

// end says that the request is over.
func (u use) end() {
	if u.r == nil {
		return
	}
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	u.m.inFlight--
	if o := u.options; o != nil {
		if u.m.asks[*o]--; u.m.asks[*o] == 0 {
			delete(u.m.asks, *o)
		}
	}
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
func (m *residence) gone() {
	m.keptAt, m.longest, m.answered, m.served, m.quiet = time.Time{}, 0, false, false, time.Time{}
}

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
	return at.Sub(now), ok
}

// due returns when the model is to be looked at; false if it need not be.
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

// check asks what is loaded and touches what is not held.
func (r *residency) check(ctx context.Context) {
	now := time.Now()
	looking, cancel := context.WithTimeout(ctx, loadedTimeout)
	list, err := r.upstream.Loaded(looking)
	cancel()
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
		if m.checked = now; err != nil {
			continue // asked again after checkEvery; an upstream that is down is reported by its polls
		}
		want := r.keep.floor(key, m.longest)
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
			touches = append(touches, touch{key, m.name, want.Duration, m.embed})
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
		m.quiet = time.Now().Add(touchPause)
		switch {
		case err != nil:
			r.log.Warn("keep_alive could not be set", "model", t.name, "err", err)
		case !unloaded:
			m.keptAt, m.keptFor = sent, t.d
			r.log.Debug("keep_alive set", "model", t.name, "keep_alive", t.d)
		}
		r.mu.Unlock()
		if unloaded {
			again, cancel := context.WithTimeout(ctx, loadedTimeout)
			r.upstream.Keep(again, t.name, 0, false) // refused or not, the client's unload has been repeated
			cancel()
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
