// Package runners knows what an Ollama server holds in memory: which models are loaded, with which
// options, since when, and under which names they are used. A Book, one for each server, is fed by
// the requests that are sent and the answers that come, and by what /api/ps lists. It tells what
// changed (Event); the ledger and the scheduler listen, and whoever keeps models loaded asks.
//
// Ollama keeps one runner for a model's weights, whatever name asks for them, and loads it anew for
// a request with other runner options (0.24 to 0.34, server/sched.go: schedulerModelKey,
// needsReload). So does a Book: see Wanted.
//
// The package makes no request but /api/show, once for each model, and decides nothing.
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

// Kind says what has changed.
type Kind uint8

const (
	Loaded    Kind = iota // a request found its model not loaded, and had it loaded
	Replaced              // the model is loaded with other options than before
	Unloaded              // it is not loaded any more
	Restarted             // the server was started anew: it holds nothing
	Idle                  // the last request to the model that was under way has ended
)

// Event is a change of what a server holds.
type Event struct {
	Kind Kind
	// Listed says that /api/ps told it, and not a request that came through the proxy.
	Listed  bool
	Weights string // of which model, as in Wanted.Options.Model; "" with Restarted: all
}

const (
	maxModels = 1024           // that are remembered, by weights …
	maxNames  = 4096           // … and by name
	maxEqual  = 8              // options of which it is known that they mean the same as those loaded
	maxLoad   = 24 * time.Hour // that is believed
	maxLoads  = 8              // loads, of one model
)

// Book is what is known of one server. Make it with New. Its methods may be called from any goroutine.
type Book struct {
	show   Shower
	told   func(Event) // called without the lock
	asking singleflight.Group

	mu     sync.Mutex
	names  *simplelru.LRU[string, named]  // by upstream.ModelKey; guarded by mu
	models *simplelru.LRU[string, *model] // by weights; guarded by mu
	latest time.Time                      // when the last load ended, of any model; guarded by mu
}

// model is what is known of the runner of some weights. Guarded by Book.mu.
type model struct {
	weights string
	running []*Request
	ended   time.Time // when a request last ended

	since    time.Time // no load that was asked for before then is still there
	answered bool      // a request was answered since: it is loaded

	options   prefix.Options // with which it is loaded, if known
	known     bool
	equal     []prefix.Options // that turned out to mean the same
	context   int              // tokens, as /api/ps tells; 0: not known
	byDefault int              // tokens that it has where a request states none, as was seen; 0: not known
	largest   int              // tokens that a request stated that was accepted
	restarted bool             // the server was, and nothing has been loaded since

	loads    []load        // the last ones
	loadTime time.Duration // how long they take
	warmLoad time.Duration // load_duration where nothing is loaded
}

// load is one that a request told.
type load struct {
	end     time.Time
	options prefix.Options
}

// New returns a book that knows nothing. show nil: every name is a model of its own. told is called
// for each event, by whoever caused it; nil: nobody listens.
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

// model returns the model, made if need be. b.mu must be held.
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

// forget forgets a load that has ended: the next one was asked for at a time, if it was.
func (m *model) forget(at time.Time) {
	m.since = at
	m.known, m.answered, m.equal, m.context = false, false, nil, 0
}

// same reports whether a request with these options needs no other load than the present one.
func (m *model) same(o prefix.Options) bool {
	return m.known && (o == m.options || slices.Contains(m.equal, o))
}

// Request is one that was sent to the server and has not ended. The nil Request does nothing.
type Request struct {
	Wanted

	// WasLoaded says that the model was loaded like that when it was sent, LoadKnown that it was known
	// how it was loaded, if at all.
	WasLoaded, LoadKnown bool
	// Idle is how long the model had had nothing to do; 0 if another request was under way.
	Idle time.Duration
	// Context is how many tokens the model's context has, as far as /api/ps has told; 0: not known.
	Context int

	book   *Book
	model  *model
	at     time.Time
	beside bool // another request was under way meanwhile
}

// Begin notes that a request is sent.
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

// Loaded reports whether it is known that the model is loaded as is wanted, since a request that came
// through here was answered like that.
func (b *Book) Loaded(w Wanted) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	m, ok := b.models.Peek(w.Options.Model)
	return ok && w.Known && m.answered && m.same(w.Options)
}

// Since returns when the model's present load was asked for, or the last one was seen to have ended: no
// keep_alive that was sent before holds it. Zero: neither is known.
func (r *Request) Since() time.Time {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	return r.model.since
}

// Expired says that the model's keep_alive had run out when the request was sent.
func (r *Request) Expired(now time.Time) {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	r.model.forget(now)
	r.WasLoaded = false
}

// Mixed reports whether requests to the same model with other options are under way: one of them may
// wait in Ollama for what others use to make room.
func (r *Request) Mixed() bool {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	return slices.ContainsFunc(r.model.running, func(other *Request) bool {
		return other != r && other.Known && (!r.Known || other.Options != r.Options)
	})
}

// Beside reports whether another request to the model is under way, while one to another model may
// have to load that, and wait in Ollama for this one to make room.
func (r *Request) Beside() bool {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	return len(r.model.running) > 1 && slices.ContainsFunc(r.book.models.Values(), func(m *model) bool {
		return m != r.model && len(m.running) > 0 && !m.answered
	})
}

// Answered says that the server has accepted the request, and answers: its model is loaded.
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
	Refused  bool          // the server did not accept it, or never got it
	Accepted bool          // the server answered it, with a status below 300; neither: the client left before
	Load     time.Duration // waiting for the model, as told; 0: /v1 does not tell
	Unload   bool          // it asked to unload the model, and that was done
}

// Ending is what a request's end tells of its model's load.
type Ending struct {
	Loaded    bool            // the model was loaded for it
	Changes   []prefix.Change // how its options differ from those loaded before
	Restarted bool            // it was the first load after a restart
	LoadTime  time.Duration   // how long a load takes; 0: not known
}

// End notes how the request ended.
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
		m.forget(r.at) // it may have been loaded for it, or may be yet
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

// accepted notes that the server has answered the request. Book.mu must be held.
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

// loaded finds out whether the model was loaded for the request, and notes what that means. took is
// what the answer told, 0 if it did not. Book.mu must be held.
func (r *Request) loaded(now time.Time, took time.Duration) (e Ending) {
	m := r.model
	same := m.same(r.Options) // as of now: others may have ended since it began
	if m.known && !same {
		e.Changes = r.Options.Changes(m.options)
	}
	switch {
	case took == 0: // /v1 does not tell
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

// warm reports whether so short a load_duration is one of a model that was loaded, and learns from
// it then. same: with these options it was to be expected to be.
func (m *model) warm(took time.Duration, same bool) bool {
	limit := max(100*time.Millisecond, 4*m.warmLoad)
	if same {
		limit = max(limit, m.loadTime/2) // unless it was to be expected, it must look like one
	}
	if took > limit {
		return false
	}
	m.warmLoad = (3*m.warmLoad + took) / 4
	return true
}

// shared returns which load that another request has told is the one that a request tells which was sent
// at a time; -1: none. All that waited for one load go on at the same moment, within what a busy machine
// takes; and nothing is loaded once more before something else was, of which latest is the last.
func (m *model) shared(at, end time.Time, took time.Duration, o prefix.Options, latest time.Time) int {
	apart := max(100*time.Millisecond, took/8)
	return slices.IndexFunc(m.loads, func(l load) bool {
		return l.options == o && at.Before(l.end) && (l.end.Equal(latest) || end.Sub(l.end).Abs() <= apart)
	})
}

// Unloaded says that what was loaded under this name is not any more: the model was deleted, or made anew.
func (b *Book) Unloaded(name string) {
	b.mu.Lock()
	m := b.model(b.peek(name).Weights)
	m.forget(time.Now())
	e := m.event(Unloaded)
	b.mu.Unlock()
	b.told(e)
}

// Restarted says that the server was started anew, or cannot be reached, so that it holds nothing.
func (b *Book) Restarted() {
	b.mu.Lock()
	for _, m := range b.models.Values() {
		m.forget(time.Now())
		m.restarted, m.byDefault = true, 0 // it may have been started with another default
	}
	b.mu.Unlock()
	b.told(Event{Kind: Restarted})
}

// Listed takes in what /api/ps listed, asked at a time, and returns it as ByWeights does.
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
			// Somebody who does not come through the proxy has had it loaded with other options.
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
