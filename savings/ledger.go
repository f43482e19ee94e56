// Package savings is the ledger. For each request it records how many prompt tokens Ollama reused
// from a warm prefix and how many it evaluated, how much time that saved, and why a cold request
// was cold.
//
// Since version 0.34 Ollama reports how many tokens it reused, and the figure is measured. For
// older servers it is estimated, from what the request has in common with the prompts that the
// model has recently seen on that server, and from the duration of the evaluation: see engine. Both
// figures are kept side by side. If neither is available the figure is unknown, which is not 0.
//
// Package runners reports whether a model was loaded for a request. The ledger holds no prompt text
// and makes no requests.
package savings

import (
	"encoding/binary"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
)

// Basis is the source of an entry's token counts.
type Basis string

const (
	Measured  Basis = "measured"  // reported by the server
	Estimated Basis = "estimated" // inferred from times and earlier prompts
	Unknown   Basis = "unknown"   // not known; the total may still be
)

// Verdict is how warm a request was.
type Verdict string

const (
	Hit       Verdict = "hit"     // at least half of the prompt was reused
	Partial   Verdict = "partial" // less, but at least a tenth
	Cold      Verdict = "cold"
	Uncertain Verdict = "unknown"
)

// VerdictOf returns the verdict on a prompt of total tokens, some of them reused.
func VerdictOf(total, reused int) Verdict {
	switch {
	case total <= 0:
		return Uncertain
	case 2*reused >= total:
		return Hit
	case 10*reused >= total:
		return Partial
	}
	return Cold
}

// Tokens are the two parts of a prompt's tokens.
type Tokens struct {
	Reused    int `json:"reused"`
	Evaluated int `json:"evaluated"`
}

// Entry is the ledger's record of one request.
type Entry struct {
	ID       uint64
	At       time.Time // when it was sent upstream
	Endpoint string
	Upstream string
	Model    string // its key
	Prefix   uint64 // fingerprint of the whole prompt
	Shared   uint64 // … of its longest part that was known before; 0 if only the runner was
	// Conversation is prefix.Chain.Conversation.
	Conversation uint64
	Messages     int // in the prompt

	Basis    Basis
	Total    int     // prompt tokens; 0 if unknown
	Tokens   *Tokens // nil if Basis is Unknown
	Estimate *Tokens // the estimate, even if there is a measured figure; may be nil
	Verdict  Verdict
	Reason   Reason // unless the request is a Hit
	Detail   string // the reason in words, and the proxy's edits; no prompt text
	// Changed is where it differs from a prompt that it should have continued, if that is known.
	Changed   *Changed
	Truncated bool // Ollama probably cut the prompt
	Broken    bool // the answer was cut short, or the client left: other fields may be incomplete

	Expected      int // tokens that should have been reused, as predicted when the request was sent
	ExpectedKnown bool

	Generated int           // tokens of the answer
	Loaded    bool          // the model was loaded for this request
	Load      time.Duration // waiting for the model; 0 if not reported
	Queue     time.Duration // waiting for a slot inside Ollama; 0 if not reported
	Prompt    time.Duration // evaluating the prompt; 0 if not reported
	Eval      time.Duration // generating the answer; 0 if not reported

	// SavedEvaluation estimates how much longer the request would have taken if nothing had been
	// reused. SavedLoading is the same if the model had been unloaded five minutes after its last
	// request, as is Ollama's default.
	SavedEvaluation, SavedLoading time.Duration

	Excerpt string // of the request, if the operator wants to see it

	Client  string        // hashed; "" for the proxy itself
	KeyName string        // of the client's API key; "" if that has none
	Waited  time.Duration // in the proxy: for a lane, for memory, or for an absent server
	Whole   time.Duration // from the request's arrival to the end of its answer
}

// Ledger records requests. Create it with New. Its methods are safe for concurrent use.
type Ledger struct {
	store contextstore.Store

	mu      sync.Mutex
	engines map[engineKey]*engine
	recent  []Entry // a ring
	next    uint64  // how many there were so far; recent[next % cap] is the oldest
}

type engineKey struct {
	upstream uint16
	weights  string // in package runners' terms
}

// maxEngines limits the models remembered on all upstreams together. Beyond it, the least recently
// used one is forgotten.
const maxEngines = 1024

// maxNames limits the names of one model.
const maxNames = 64

// New returns a ledger that takes known prefixes from the store and keeps the latest entries, up to
// remember.
func New(store contextstore.Store, remember int) *Ledger {
	return &Ledger{store: store, engines: map[engineKey]*engine{}, recent: make([]Entry, 0, remember)}
}

// Upstream identifies a server, with the properties that matter to the ledger.
type Upstream struct {
	Index uint16
	Name  string
	// TellsCached means that answers report the reused tokens: Ollama 0.34 and later.
	TellsCached bool
	// Old means Ollama before 0.30. It has no cache but the slots, and for a sliding-window model
	// it reuses nothing unless the whole previous prompt is the beginning of the new one.
	Old bool
}

// Request is a request in progress. The nil Request does nothing.
type Request struct {
	ledger   *Ledger
	engine   *engine
	upstream Upstream
	chain    *prefix.Chain
	held     *held
	at       time.Time
	bytes    int
	lost     int     // engine.lost at the start
	beside   float64 // estimated tokens of the prompts that the model got meanwhile

	parting *Parting // nil if there is none …
	changed *Changed // … nil if its text was not examined

	known         int // leading links that the store knew
	record        contextstore.Record
	run           *runners.Request
	attached      int // tokens of its prompt in a stored state that the engine got for it
	Expected      int // tokens that should be reused
	ExpectedKnown bool
}

// Attached records, before the request is sent, that the engine got a stored state with this many
// tokens of its prompt.
func (r *Request) Attached(tokens int) {
	if r != nil && tokens > 0 {
		r.attached = tokens
		r.Expected, r.ExpectedKnown = max(r.Expected, tokens), true
	}
}

// Begin records that a request is sent. The chain must not change afterwards. run is the same
// request in package runners.
func (l *Ledger) Begin(now time.Time, up Upstream, chain *prefix.Chain, run *runners.Request) *Request {
	model := l.store.Model(chain.Runner.Model)
	known, record := l.store.Match(chain.Links)
	if known > 0 && record.Model != model {
		known, record = 0, contextstore.Record{}
	}
	record.Warm = record.Warm && record.Upstream == up.Index

	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.engine(up.Index, run)
	r := &Request{ledger: l, engine: e, upstream: up, chain: chain, run: run, at: now, bytes: chain.Bytes(), lost: e.lost, known: known, record: record}
	r.Expected, r.ExpectedKnown = e.expect(r)
	r.parting = e.parting(r)
	r.held = e.hold(chain)
	size := e.size(r)
	for _, other := range e.running {
		other.beside += size
		r.beside += e.size(other)
	}
	e.running = append(e.running, r)
	return r
}

// engine returns the engine, creating it if necessary. l.mu must be held.
func (l *Ledger) engine(upstream uint16, run *runners.Request) *engine {
	key := engineKey{upstream, run.Options.Model}
	e, ok := l.engines[key]
	if !ok {
		if len(l.engines) >= maxEngines {
			l.dropEngine()
		}
		e = newEngine()
		l.engines[key] = e
	}
	if !slices.Contains(e.names, run.Name) && len(e.names) < maxNames {
		e.names = append(e.names, run.Name)
		// To the ledger, prompts for two names have nothing in common, even if the engine can share
		// them.
		e.fresh = e.fresh && len(e.names) == 1
	}
	return e
}

// dropEngine forgets the least recently used model.
func (l *Ledger) dropEngine() {
	var oldest engineKey
	var since time.Time
	for key, e := range l.engines {
		if len(e.running) == 0 && (since.IsZero() || e.ended.Before(since)) {
			oldest, since = key, e.ended
		}
	}
	delete(l.engines, oldest)
}

// Outcome is how a request ended.
type Outcome struct {
	Answer
	OK        bool          // the upstream accepted it and answered to the end
	Refused   bool          // the upstream refused it, and evaluated nothing
	Counted   bool          // this kind of answer always has counts if it ends well
	FirstByte time.Duration // from Begin to the first byte of a streamed answer; otherwise 0
	Duration  time.Duration // from Begin to the end

	// Edits describes the proxy's changes to the request, for the entry's detail; may be "".
	Edits string

	Ending            runners.Ending
	Endpoint, Excerpt string // for the entry
	Client, KeyName   string
	Waited, Whole     time.Duration
}

// End closes a request's record and returns its entry; false if it has none, because the upstream
// refused it or it has no prompt.
func (r *Request) End(now time.Time, o Outcome) (Entry, bool) {
	if r == nil {
		return Entry{}, false
	}
	o.sane()
	entry, put, ok := r.end(now, o)
	if put {
		l := r.ledger
		l.store.Put(r.chain.Links, contextstore.Sight{Upstream: r.upstream.Index, Model: l.store.Model(r.chain.Runner.Model), At: r.at}, o.Total)
	}
	return entry, ok
}

// maxTime is the longest duration that is believed.
const maxTime = 24 * time.Hour

// sane removes impossible durations.
func (o *Outcome) sane() {
	for _, d := range []*time.Duration{&o.TotalTime, &o.Load, &o.PromptEval, &o.Eval} {
		if *d < 0 || *d > maxTime {
			*d = 0
		}
	}
}

// end is End except for the store, which must not be called with the lock held; put reports whether
// the store needs the chain.
func (r *Request) end(now time.Time, o Outcome) (entry Entry, put, ok bool) {
	l, e := r.ledger, r.engine
	l.mu.Lock()
	defer l.mu.Unlock()
	e.forget(r)
	if o.Refused {
		e.drop(r.held)
		return Entry{}, false, false
	}
	e.ended = now
	prompt := r.chain.HasPrompt()
	if !prompt && (!o.OK || !o.Done) { // it only loaded the model, or asked for embeddings
		e.drop(r.held)
		r.load(o)
		return Entry{}, false, false
	}
	whole := o.Done || o.OK && !o.Counted // the client may have left after the counts arrived
	entry = Entry{
		ID: l.next + 1, At: r.at, Endpoint: o.Endpoint, Upstream: r.upstream.Name, Model: r.chain.Runner.Model, Prefix: r.chain.Leaf(), Conversation: r.chain.Conversation, Messages: r.chain.Messages,
		Expected: r.Expected, ExpectedKnown: r.ExpectedKnown,
		Basis: Unknown, Total: o.Total, Verdict: Uncertain, Generated: o.Generated, Broken: !whole,
		Load: o.Load, Prompt: o.PromptEval, Eval: o.Eval, Excerpt: o.Excerpt,
		Client: o.Client, KeyName: o.KeyName, Waited: o.Waited, Whole: o.Whole,
	}
	if r.known > 2 {
		entry.Shared = r.chain.Links[r.known-1].Hash
	}
	if o.TotalTime > 0 {
		entry.Queue = max(0, o.TotalTime-o.Load-o.PromptEval-o.Eval)
	}
	switch entry.Loaded = r.load(o); {
	case !whole:
		// The engine may have evaluated a part. What it holds now is unknown, and must not count as
		// warm.
		e.drop(r.held)
		e.fresh, entry.Detail = false, "the answer did not come to its end"
	case prompt:
		put = r.account(now, o, &entry)
	}
	entry.also(o.Edits)
	if !entry.Loaded && r.run.Idle > defaultKeepAlive && r.run.WasLoaded {
		entry.SavedLoading = o.Ending.LoadTime
	}
	if n := cap(l.recent); n > 0 {
		l.recent = l.recent[:min(len(l.recent)+1, n)]
		l.recent[l.next%uint64(n)] = entry
	}
	l.next++
	return entry, put, true
}

// also adds the proxy's edits to the detail, if any.
func (e *Entry) also(edits string) {
	if edits != "" && e.Detail != "" {
		e.Detail += "; "
	}
	e.Detail += edits
}

// load reports whether the model was loaded for the request; if so, it forgets what was warm
// before.
func (r *Request) load(o Outcome) bool {
	if o.Ending.Loaded {
		r.engine.load(r, o.Ending)
		r.ledger.cool(r.upstream.Index, r.engine)
	}
	return o.Ending.Loaded
}

// cool informs the store that what the engine held is gone. l.mu must be held.
func (l *Ledger) cool(upstream uint16, e *engine) {
	for _, name := range e.names {
		l.store.Cool(upstream, l.store.Model(name))
	}
}

// defaultKeepAlive is how long Ollama keeps a model after its last request by default.
const defaultKeepAlive = 5 * time.Minute

// account sets the tokens of a request with a prompt, and records what the engine holds now. It
// returns false if that is not this prompt.
func (r *Request) account(now time.Time, o Outcome, entry *Entry) bool {
	e := r.engine
	guess := e.estimate(r, o, entry.Loaded)
	entry.Truncated = e.truncated(r, o.Total)
	if guess.known {
		entry.Basis, entry.Estimate = Estimated, &Tokens{guess.reused, o.Total - guess.reused}
		entry.Tokens = entry.Estimate
	}
	if o.CachedKnown && o.Total > 0 {
		entry.Basis, entry.Tokens = Measured, &Tokens{o.Cached, o.Total - o.Cached}
	}
	if entry.Tokens != nil {
		entry.Verdict = VerdictOf(o.Total, entry.Tokens.Reused)
		if entry.Verdict != Hit {
			entry.Reason, entry.Detail = e.reason(r, entry, o.Ending.Changes)
		}
		entry.tellChanged(r.changedBy(o.Total, *entry.Tokens))
		entry.SavedEvaluation = e.saved(entry.Tokens.Reused, o.Total)
	}
	e.learn(r, o, guess, entry)
	if entry.Truncated || r.lost != e.lost {
		e.drop(r.held) // Ollama cut the prompt, or it belongs to an earlier load
		e.fresh = e.fresh && !entry.Truncated
		return false
	}
	e.settle(r.held, now, o.Total, o.Generated)
	return true
}

// Lost is why a model's cache was lost.
type Lost string

const (
	LostUnloaded Lost = "unloaded" // its keep_alive ran out, or another model needed the memory
	LostRestart  Lost = "restart"  // the server was restarted
	LostReplaced Lost = "replaced" // the model was deleted or created again; its tokens may differ
	LostReloaded Lost = "reloaded" // a program outside the proxy loaded it with other options
)

// Lose records that a model's cache on the upstream is gone, by weights; "" means all models.
func (l *Ledger) Lose(upstream uint16, weights string, why Lost) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, e := range l.engines {
		if key.upstream == upstream && (weights == "" || key.weights == weights) {
			l.cool(upstream, e)
			e.lose(why)
		}
	}
}

// Forget records that a name now refers to another model.
func (l *Ledger) Forget(upstream uint16, name string) {
	l.store.Forget(l.store.Model(name))
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, e := range l.engines {
		if key.upstream != upstream || !slices.Contains(e.names, name) {
			continue
		}
		if l.cool(upstream, e); len(e.running) == 0 {
			delete(l.engines, key)
		} else {
			e.lose(LostReplaced)
		}
	}
}

// Gone forgets what a server holds, since it is no upstream any more. Another one may get its index.
func (l *Ledger) Gone(upstream uint16) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, e := range l.engines {
		if key.upstream == upstream && len(e.running) == 0 {
			l.cool(upstream, e)
			delete(l.engines, key)
		}
	}
}

// ForgetExcerpts removes the requests' excerpts from all remembered entries.
func (l *Ledger) ForgetExcerpts() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.recent {
		l.recent[i].Excerpt = ""
	}
}

// Recent returns the latest entries, at most n, newest first.
func (l *Ledger) Recent(n int) []Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	n = min(n, len(l.recent))
	list := make([]Entry, 0, n)
	for i := range uint64(n) {
		list = append(list, l.recent[(l.next-1-i)%uint64(cap(l.recent))])
	}
	return list
}

// PrefixString formats a fingerprint for headers and pages.
func PrefixString(hash uint64) string {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], hash)
	return hex.EncodeToString(b[:])
}
