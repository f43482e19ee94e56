// Package savings is the ledger: for each request it says how many prompt tokens Ollama reused from a warm prefix and how
// many it evaluated, what that saved, and why a cold request was cold.
//
// Since 0.34 Ollama tells how many tokens it reused: the figure is measured. Before, it is estimated, from what the
// request has in common with what the model last saw on that server, and from how long the evaluation took: see engine.
// Both are kept beside each other. What neither tells is unknown, which is not 0.
//
// Whether a model was loaded for a request, package runners tells. The ledger holds no prompt text and makes no requests.
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

// Basis says where an entry's token counts come from.
type Basis string

const (
	Measured  Basis = "measured"  // the server told them
	Estimated Basis = "estimated" // inferred
	Unknown   Basis = "unknown"   // not known; the total may be
)

// Verdict says how warm a request was.
type Verdict string

const (
	Hit       Verdict = "hit"     // at least half of the prompt was reused
	Partial   Verdict = "partial" // less, but at least a tenth
	Cold      Verdict = "cold"
	Uncertain Verdict = "unknown"
)

// VerdictOf returns how warm a prompt of total tokens is of which so many were reused.
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

// Tokens divides a prompt's tokens.
type Tokens struct {
	Reused    int `json:"reused"`
	Evaluated int `json:"evaluated"`
}

// Entry is what the ledger has of one request.
type Entry struct {
	ID       uint64
	At       time.Time // when it was sent upstream
	Endpoint string
	Upstream string
	Model    string // its key
	Prefix   uint64 // fingerprint of the whole prompt
	Shared   uint64 // … and of the longest part of it that was known before; 0 if there is none beyond the runner
	// Conversation is prefix.Chain's.
	Conversation uint64
	Messages     int // in the prompt

	Basis    Basis
	Total    int     // prompt tokens; 0 where not known
	Tokens   *Tokens // nil where Basis is Unknown
	Estimate *Tokens // the estimate, also beside a measured figure; nil where there is none
	Verdict  Verdict
	Reason   Reason // of a request that is no Hit
	Detail   string // the same in words, and what was edited; no prompt text
	// Changed is where it differs from a prompt that it should have continued; nil: nowhere, as far as is known.
	Changed   *Changed
	Truncated bool // Ollama probably cut the prompt
	Broken    bool // the answer did not come to its end, for one because the client left: only what is known is told

	Expected      int // tokens that were expected to be reused when the request was sent
	ExpectedKnown bool

	Generated int           // tokens of the answer
	Loaded    bool          // the model was loaded for this request
	Load      time.Duration // waiting for the model; 0 where not told
	Queue     time.Duration // waiting for a slot inside Ollama; 0 where not told
	Prompt    time.Duration // evaluating the prompt; 0 where not told
	Eval      time.Duration // generating the answer; 0 where not told

	// SavedEvaluation and SavedLoading are estimates of the time that the request would have taken longer had nothing been
	// reused, and had the model been dropped five minutes after its last request, as Ollama does by default.
	SavedEvaluation, SavedLoading time.Duration

	Excerpt string // of the request, where the operator wants to see it

	Client  string        // who asked, hashed; "" for the proxy itself
	KeyName string        // of the API key that it came with; "" where that has none
	Waited  time.Duration // in the proxy: for a lane, for memory, for a server that was away
	Whole   time.Duration // from when the request came to the end of its answer
}

// Ledger accounts. Make it with New. Its methods may be called from any goroutine.
type Ledger struct {
	store contextstore.Store

	mu      sync.Mutex
	engines map[engineKey]*engine
	recent  []Entry // a ring
	next    uint64  // how many there were; recent[next % cap] is the oldest
}

type engineKey struct {
	upstream uint16
	weights  string // as package runners has them
}

// maxEngines bounds the models remembered, over all upstreams. Of more than that, the one that was used longest ago is forgotten.
const maxEngines = 1024

// maxNames bounds the names of one model.
const maxNames = 64

// New returns a ledger that knows of prefixes what the store knows, and remembers the last so many entries.
func New(store contextstore.Store, remember int) *Ledger {
	return &Ledger{store: store, engines: map[engineKey]*engine{}, recent: make([]Entry, 0, remember)}
}

// Upstream is a server, as the ledger is told of it.
type Upstream struct {
	Index uint16
	Name  string
	// TellsCached says that the server's answers tell the reused tokens: Ollama 0.34 and later.
	TellsCached bool
	// Old says that the server is Ollama before 0.30: its only cache are the slots, and of a sliding-window model's
	// prompt it reuses nothing unless the whole of the previous prompt is its beginning.
	Old bool
}

// Request is a request under way. The nil Request does nothing.
type Request struct {
	ledger   *Ledger
	engine   *engine
	upstream Upstream
	chain    *prefix.Chain
	held     *held
	at       time.Time
	bytes    int
	lost     int     // engine.lost when it began
	beside   float64 // about how many tokens the prompts had that the model was given meanwhile

	parting *Parting // nil: there is none …
	changed *Changed // … or nobody looked what changes there

	known         int // leading links that the store knew
	record        contextstore.Record
	run           *runners.Request
	attached      int // tokens of its prompt of which a stored state was given to the engine for it
	Expected      int // tokens expected to be reused
	ExpectedKnown bool
}

// Attached says, before the request is sent, that a stored state was given to the engine for it which
// has so many tokens of its prompt.
func (r *Request) Attached(tokens int) {
	if r != nil && tokens > 0 {
		r.attached = tokens
		r.Expected, r.ExpectedKnown = max(r.Expected, tokens), true
	}
}

// Begin notes that a request is sent. The chain must stay as it is. run is the same request.
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

// engine returns the engine, made if need be. l.mu must be held.
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
		// Prompts of two names have nothing in common for the ledger, whatever the engine makes of them.
		e.fresh = e.fresh && len(e.names) == 1
	}
	return e
}

// dropEngine forgets the model that was used longest ago.
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
	Refused   bool          // the upstream did not accept it: it has evaluated nothing
	Counted   bool          // an answer of this kind that ends well always tells counts
	FirstByte time.Duration // from Begin to the first byte of an answer that is streamed; 0 otherwise
	Duration  time.Duration // from Begin to the end

	// Edits is what the proxy changed in the request, in words, for the entry's detail; "": nothing worth telling.
	Edits string

	Ending            runners.Ending
	Endpoint, Excerpt string // for the entry
	Client, KeyName   string
	Waited, Whole     time.Duration
}

// End accounts for a request, and returns its entry. One that the upstream did not accept, or that has no prompt, has none:
// false.
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

// maxTime is the longest time that is believed.
const maxTime = 24 * time.Hour

// sane takes out times that cannot be.
func (o *Outcome) sane() {
	for _, d := range []*time.Duration{&o.TotalTime, &o.Load, &o.PromptEval, &o.Eval} {
		if *d < 0 || *d > maxTime {
			*d = 0
		}
	}
}

// end is End but for the store, which is not to be waited for with the lock held; put says that it is to be told.
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
	whole := o.Done || o.OK && !o.Counted // the client may have left after the counts had come
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
		// The engine may have evaluated some of it: what it holds now is not known, and what is not known is not warm.
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

// also adds to the detail what was edited, if anything was.
func (e *Entry) also(edits string) {
	if edits != "" && e.Detail != "" {
		e.Detail += "; "
	}
	e.Detail += edits
}

// load reports whether the model was loaded for the request, and forgets what was warm before.
func (r *Request) load(o Outcome) bool {
	if o.Ending.Loaded {
		r.engine.load(r, o.Ending)
		r.ledger.cool(r.upstream.Index, r.engine)
	}
	return o.Ending.Loaded
}

// cool tells the store that what the engine held is gone. l.mu must be held.
func (l *Ledger) cool(upstream uint16, e *engine) {
	for _, name := range e.names {
		l.store.Cool(upstream, l.store.Model(name))
	}
}

// defaultKeepAlive is how long Ollama keeps a model after its last request, unless told otherwise.
const defaultKeepAlive = 5 * time.Minute

// account fills in the tokens of a request that has a prompt, and notes what the engine holds from now on; false: not this
// prompt.
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
		e.drop(r.held) // what is warm is not what was sent, or belongs to an earlier load
		e.fresh = e.fresh && !entry.Truncated
		return false
	}
	e.settle(r.held, now, o.Total, o.Generated)
	return true
}

// Lost says why what a model held is not warm any more.
type Lost string

const (
	LostUnloaded Lost = "unloaded" // it is not loaded any more: its keep_alive ran out, or another model needed the memory
	LostRestart  Lost = "restart"  // the server was restarted
	LostReplaced Lost = "replaced" // the model was deleted or created anew: its tokens may be others, too
	LostReloaded Lost = "reloaded" // somebody else had it loaded with other options
)

// Lose says that what some weights held on the upstream is gone. Empty ones mean all of the upstream.
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

// Forget says that a name means another model than before.
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

// ForgetExcerpts removes the excerpts of requests from the entries that are remembered.
func (l *Ledger) ForgetExcerpts() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.recent {
		l.recent[i].Excerpt = ""
	}
}

// Recent returns the last entries, newest first, n at most.
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

// PrefixString writes a fingerprint as headers and pages show it.
func PrefixString(hash uint64) string {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], hash)
	return hex.EncodeToString(b[:])
}
