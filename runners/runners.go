// Package runners knows what an Ollama server holds in memory: which models are loaded, with which
// options, since when, and under which names they are used. A Book, one per server, learns it from
// the requests that are sent, the answers that come, and the lists of /api/ps. It reports changes
// as Events to the ledger and the scheduler, and answers the questions of whatever keeps models
// loaded.
//
// Ollama keeps one runner for a model's weights, whatever name asks for them, and loads it anew for
// a request with other runner options (0.24 to 0.34, server/sched.go: schedulerModelKey,
// needsReload). So does a Book: see Wanted.
//
// The package makes no request except /api/show, once per model, and decides nothing.
package runners

import (
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/sync/singleflight"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Kind is what has changed.
type Kind uint8

const (
	Loaded    Kind = iota // a request found its model not loaded, and had it loaded
	Replaced              // the model is loaded with other options than before
	Unloaded              // it is no longer loaded
	Restarted             // the server was restarted and holds nothing
	Idle                  // the last request to the model in progress has ended
)

// Event is a change of what a server holds.
type Event struct {
	Kind Kind
	// Listed means that /api/ps revealed it, rather than a request through the proxy.
	Listed  bool
	Weights string // which model, as in Wanted.Options.Model; "" with Restarted: all of them
}

const (
	maxModels = 1024           // remembered by weights …
	maxNames  = 4096           // … and by name
	maxEqual  = 8              // options that are known to mean the same as those loaded
	maxLoad   = 24 * time.Hour // longer loads are not believed
	maxLoads  = 8              // remembered loads of one model
)

// Book records the state of one server. Create it with New. Its methods are safe for concurrent
// use.
type Book struct {
	show   Shower
	told   func(Event) // called without the lock
	asking singleflight.Group

	mu     sync.Mutex
	names  *simplelru.LRU[string, named]  // by upstream.ModelKey; guarded by mu
	models *simplelru.LRU[string, *model] // by weights; guarded by mu
	latest time.Time                      // when the last load ended, of any model; guarded by mu
}

// model is the state of the runner of some weights. Guarded by Book.mu.
type model struct {
	weights string
	running []*Request
	ended   time.Time // when the last request ended

	since    time.Time // a load that was requested earlier is no longer there
	answered bool      // a request has been answered since, so it is loaded

	options   prefix.Options // with which it is loaded, if known
	known     bool
	equal     []prefix.Options // known to mean the same
	context   int              // tokens, from /api/ps; 0: not known
	byDefault int              // tokens of a request that states none, as seen; 0: not known
	largest   int              // tokens that an accepted request stated
	restarted bool             // the server was restarted, and nothing has been loaded since

	loads    []load        // the last ones
	loadTime time.Duration // how long a load takes
	warmLoad time.Duration // load_duration when the model was loaded already
}

// load is one that a request reported.
type load struct {
	end     time.Time
	options prefix.Options
}

// New returns an empty book. If show is nil, every name counts as a separate model. told, if
// non-nil, is called for each event, by the goroutine that causes it.
func New(show Shower, told func(Event)) *Book {
	names, err := simplelru.NewLRU[string, named](maxNames, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	models, err := simplelru.NewLRU[string, *model](maxModels, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	if told == nil {
		told = func(Event) {}
	}
	return &Book{show: show, told: told, names: names, models: models}
}

// model returns the model, adding it if necessary. b.mu must be held.
func (b *Book) model(weights string) *model {
	m, ok := b.models.Get(weights)
	if !ok {
		m = &model{weights: weights}
		b.models.Add(weights, m)
	}
	return m
}

func (m *model) event(kind Kind) Event { return Event{Kind: kind, Weights: m.weights} }

func (m *model) listed(kind Kind) Event { return Event{Kind: kind, Weights: m.weights, Listed: true} }

// forget drops a load that has ended. The next one cannot have been requested before at.
func (m *model) forget(at time.Time) {
	m.since = at
	m.known, m.answered, m.equal, m.context = false, false, nil, 0
}

// same reports whether a request with these options can use the present load.
func (m *model) same(o prefix.Options) bool {
	return m.known && (o == m.options || slices.Contains(m.equal, o))
}

// Request is a request that was sent to the server and has not ended. The nil Request does nothing.
type Request struct {
	Wanted

	// WasLoaded means that the model was loaded with these options when the request was sent;
	// LoadKnown means that this was known.
	WasLoaded, LoadKnown bool
	// Idle is how long the model had been idle; 0 if another request was in progress.
	Idle time.Duration
	// Context is the size of the model's context in tokens, from /api/ps; 0 if not known.
	Context int

	book   *Book
	model  *model
	at     time.Time
	beside bool // another request was in progress meanwhile
}

// Begin records that a request is sent.
func (b *Book) Begin(now time.Time, w Wanted) *Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := b.model(w.Options.Model)
	r := &Request{
		Wanted: w, WasLoaded: w.Known && m.same(w.Options), LoadKnown: m.known,
		Context: m.context, book: b, model: m, at: now, beside: len(m.running) > 0,
	}
	if !m.ended.IsZero() && len(m.running) == 0 {
		r.Idle = now.Sub(m.ended)
	}
	for _, other := range m.running {
		other.beside = true
	}
	m.running = append(m.running, r)
	return r
}

// Loaded reports whether the model is known to be loaded as wanted, since a request through the
// proxy was answered that way.
func (b *Book) Loaded(w Wanted) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	m, ok := b.models.Peek(w.Options.Model)
	return ok && w.Known && m.answered && m.same(w.Options)
}

// Since returns when the model's present load was requested, or when the last one was seen to have
// ended: a keep_alive sent earlier does not hold it. Zero if neither is known.
func (r *Request) Since() time.Time {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	return r.model.since
}

// Expired records that the model's keep_alive had run out when the request was sent.
func (r *Request) Expired(now time.Time) {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	r.model.forget(now)
	r.WasLoaded = false
}

// Mixed reports whether requests to the same model with other options are in progress. One of them
// may wait in Ollama until the others make room.
func (r *Request) Mixed() bool {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	return slices.ContainsFunc(r.model.running, func(other *Request) bool {
		return other != r && other.Known && (!r.Known || other.Options != r.Options)
	})
}

// Beside reports whether another request to the model is in progress while a request to another
// model may need a load, and wait in Ollama for this model to make room.
func (r *Request) Beside() bool {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	return len(r.model.running) > 1 && slices.ContainsFunc(r.book.models.Values(), func(m *model) bool {
		return m != r.model && len(m.running) > 0 && !m.answered
	})
}

// Answered records that the server has accepted the request, so its model is loaded.
func (r *Request) Answered() {
	if r == nil {
		return
	}
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	r.model.answered = true
}

// Outcome is how a request ended.
type Outcome struct {
	Refused  bool          // the server did not accept it, or never received it
	Accepted bool          // the server answered with a status below 300. Neither Refused nor Accepted: the client left before
	Load     time.Duration // time spent waiting for the model, as reported; 0: not reported (/v1)
	Unload   bool          // it asked to unload the model, and the server did
}

// Ending is what a request's end reveals of its model's load.
type Ending struct {
	Loaded    bool            // the model was loaded for this request
	Changes   []prefix.Change // how its options differ from those loaded before
	Restarted bool            // it was the first load after a restart
	LoadTime  time.Duration   // how long a load takes; 0: not known
}

// End records how the request ended.
func (r *Request) End(now time.Time, o Outcome) Ending {
	if r == nil {
		return Ending{}
	}
	b, m := r.book, r.model
	if o.Load < 0 || o.Load > maxLoad {
		o.Load = 0
	}
	b.mu.Lock()
	if i := slices.Index(m.running, r); i >= 0 {
		m.running = slices.Delete(m.running, i, i+1)
	}
	var events []Event
	var ending Ending
	switch {
	case o.Accepted:
		ending, events = r.accepted(now, o)
	case !o.Refused && r.Known && m.known && !m.same(r.Options):
		m.forget(r.at) // the model may have been loaded for it, or may still be
	}
	ending.LoadTime = m.loadTime
	if len(m.running) == 0 {
		events = append(events, m.event(Idle))
	}
	b.mu.Unlock()
	for _, e := range events {
		b.told(e)
	}
	return ending
}

// accepted records that the server has answered the request. Book.mu must be held.
func (r *Request) accepted(now time.Time, o Outcome) (e Ending, events []Event) {
	m := r.model
	m.ended = now
	if o.Unload {
		m.forget(now)
		return Ending{}, []Event{m.event(Unloaded)}
	}
	m.largest = max(m.largest, r.Options.NumCtx())
	replaced := m.known && !m.same(r.Options)
	if r.Known {
		e = r.loaded(now, o.Load)
	}
	m.answered = true
	switch {
	case e.Loaded && replaced:
		events = append(events, m.event(Replaced))
	case e.Loaded:
		events = append(events, m.event(Loaded))
	}
	return e, events
}

// loaded finds out whether the model was loaded for the request, and records the consequences. took
// is what the answer reported, 0 if nothing. Book.mu must be held.
func (r *Request) loaded(now time.Time, took time.Duration) (e Ending) {
	m := r.model
	same := m.same(r.Options) // at this time: others may have ended since it began
	if m.known && !same {
		e.Changes = r.Options.Changes(m.options)
	}
	switch {
	case took == 0: // /v1 does not report it
		e.Loaded = m.known && !same
	case !m.warm(took, same):
		end := r.at.Add(min(took, now.Sub(r.at)))
		if i := m.shared(r.at, end, took, r.Options, r.book.latest); i >= 0 {
			if i == len(m.loads)-1 {
				m.options, m.known = r.Options, true
				if r.at.Before(m.since) {
					m.since = r.at
				}
			}
			return Ending{}
		}
		e.Loaded, m.loadTime, r.book.latest = true, took, end
		m.loads = append(m.loads, load{end, r.Options})
		m.loads = m.loads[max(0, len(m.loads)-maxLoads):]
	}
	switch {
	case e.Loaded:
		e.Restarted, m.restarted = m.restarted, false
		m.forget(r.at)
	case m.known && !same && took > 0 && !r.beside && len(m.equal) < maxEqual:
		m.equal = append(m.equal, r.Options, m.options) // they mean the same
	}
	m.options, m.known = r.Options, true
	return e
}

// warm reports whether such a short load_duration means that the model was loaded already, and if
// so learns from it. same: its options made that likely.
func (m *model) warm(took time.Duration, same bool) bool {
	limit := max(100*time.Millisecond, 4*m.warmLoad)
	if same {
		limit = max(limit, m.loadTime/2) // unless that was likely, it must look like a load
	}
	if took > limit {
		return false
	}
	m.warmLoad = (3*m.warmLoad + took) / 4
	return true
}

// shared returns which of the loads that other requests reported is the one of a request that was
// sent at a time, or -1. All requests that waited for one load continue at the same moment, within
// what a busy machine adds; and nothing is loaded again before something else was, the last of
// which is latest.
func (m *model) shared(at, end time.Time, took time.Duration, o prefix.Options, latest time.Time) int {
	apart := max(100*time.Millisecond, took/8)
	return slices.IndexFunc(m.loads, func(l load) bool {
		return l.options == o && at.Before(l.end) && (l.end.Equal(latest) || end.Sub(l.end).Abs() <= apart)
	})
}

// Unloaded records that the model of this name is no longer loaded: it was deleted or replaced.
func (b *Book) Unloaded(name string) {
	b.mu.Lock()
	m := b.model(b.peek(name).Weights)
	m.forget(time.Now())
	e := m.event(Unloaded)
	b.mu.Unlock()
	b.told(e)
}

// Restarted records that the server was restarted, or cannot be reached, so that it holds nothing.
func (b *Book) Restarted() {
	b.mu.Lock()
	for _, m := range b.models.Values() {
		m.forget(time.Now())
		m.restarted, m.byDefault = true, 0 // it may have been started with another default
	}
	b.mu.Unlock()
	b.told(Event{Kind: Restarted})
}

// Listed records a list of /api/ps, asked for at this time, and returns it as ByWeights does.
func (b *Book) Listed(list []upstream.Loaded, at time.Time) map[string]upstream.Loaded {
	b.mu.Lock()
	loaded := b.byWeights(list)
	var events []Event
	for _, key := range b.models.Keys() {
		m, _ := b.models.Peek(key)
		l, ok := loaded[key]
		quiet := len(m.running) == 0 && m.ended.Before(at)
		switch {
		case !ok && quiet && (m.known || m.answered):
			m.forget(at)
			events = append(events, m.listed(Unloaded))
		case !ok:
			m.context = 0
		case quiet && m.context > 0 && l.ContextLength > 0 && l.ContextLength != m.context:
			// A client that bypasses the proxy has had it loaded with other options.
			m.forget(at)
			m.context = l.ContextLength
			events = append(events, m.listed(Replaced))
		default:
			m.context = l.ContextLength
			m.learnDefault(at)
		}
	}
	b.mu.Unlock()
	for _, e := range events {
		b.told(e)
	}
	return loaded
}
