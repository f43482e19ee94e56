// Package doctor says what is wrong with how an Ollama is used, and which setting changes that. A
// Recorder, fed by the proxy, remembers the last requests. Facts are their sums, together with what
// the servers report about themselves. Examine turns facts into findings, worst first. The package
// keeps no prompt text, makes no requests, and decides nothing: docs/doctor.md.
package doctor

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

const (
	// remembered bounds the requests that facts are made from; one takes about 300 bytes.
	remembered = 10_000
	// maxFlows bounds the conversations that are watched for dropped turns, and maxTurns the
	// messages of each; a message takes 16 bytes.
	maxFlows = 256
	maxTurns = 256
	// maxOutside bounds the signs of use that bypassed the proxy.
	maxOutside = 256
)

// Asker is a client that sends requests of one kind, as far as clients can be distinguished without
// knowing who they are.
type Asker struct {
	// Name is the name of the API key; "" without one.
	Name string `json:"name,omitempty"`
	// Client is a hash of the key or the address, the same for as long as the proxy runs.
	Client string `json:"client"`
	// Agent is the first word of the User-Agent header.
	Agent string `json:"agent,omitempty"`
	// Endpoint is the path.
	Endpoint string `json:"endpoint"`
	// NumCtx is the requested context length, in tokens; zero if the request has none.
	NumCtx int `json:"num_ctx"`
}

// Request is a finished request to a model.
type Request struct {
	Asker
	Upstream string
	Model    string // as the client wrote it
	Weights  string // identifies its weights: all names of a model share a runner

	Arrived time.Time
	Sent    time.Time // to the server; equal to Arrived if it did not have to wait
	Ended   time.Time
	Batch   bool // it had the lowest priority
	Lane    bool // it took a slot

	// OwnKeepAlive means that the client's own keep_alive, in KeepAlive, went to the server.
	// Otherwise KeepAlive is how long the proxy holds the model, negative if it leaves that to
	// Ollama.
	OwnKeepAlive bool
	KeepAlive    time.Duration
	Foreign      bool // it was sent under /v1, which has no keep_alive

	Loaded    bool          // the model was loaded for it
	Load      time.Duration // how long it waited for that; 0: not reported
	ByOptions bool          // … because it asks for other options than were loaded
	ByNumCtx  bool          // … among them a different num_ctx
	Restarted bool          // … because the server was restarted

	Tokens    int // of the prompt; 0: not known
	Reused    int // of those tokens, if Known
	Evaluated int
	Known     bool
	Estimated bool // the two above are estimates
	Generated int
	Prompt    time.Duration // of the prompt's evaluation; 0: not reported
	Eval      time.Duration // of the answer's generation; 0: not reported
	Reason    string        // why it was not warm, according to the ledger
	Truncated bool          // the server has probably cut the prompt
	Bytes     int           // of the prompt's text
	Images    int           // in the prompt
	Moved     Moved         // text that moved as old turns were dropped: see Recorder.Turns
	Context   int           // tokens that the model is loaded with; 0: not known

	Conversation uint64 // equal for prompts that continue each other, or begin alike
	Values       int    // numbers that each token takes in the engine's memory; 0: not known
	Sliding      bool   // the model's attention has a sliding window

	cut bool // set by aggregate
}

// Outside is a sign that somebody used a server past the proxy.
type Outside struct {
	At       time.Time
	Upstream string
	Model    string
	Kind     OutsideKind
}

// OutsideKind names the sign.
type OutsideKind string

const (
	OutsideOptions OutsideKind = "options" // the model was reloaded with another context length
	OutsideUsed    OutsideKind = "used"    // its expiry moved without a request through this proxy
	OutsideLoaded  OutsideKind = "loaded"  // it was loaded without a request through this proxy
)

// Recorder remembers the last requests. Make it with NewRecorder. Its methods may be called from
// any goroutine.
type Recorder struct {
	started time.Time

	mu      sync.Mutex
	ring    []Request                      // guarded by mu
	next    int                            // the oldest one, once the ring is full; guarded by mu
	outside []Outside                      // oldest first; guarded by mu
	turns   *simplelru.LRU[uint64, []turn] // guarded by mu
}

// NewRecorder returns an empty recorder that was started at that time.
func NewRecorder(started time.Time) *Recorder {
	turns, err := simplelru.NewLRU[uint64, []turn](maxFlows, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return &Recorder{started: started, turns: turns}
}

// Add adds a finished request.
func (r *Recorder) Add(q Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ring) < remembered {
		r.ring = append(r.ring, q)
		return
	}
	r.ring[r.next] = q
	r.next = (r.next + 1) % remembered
}

// AddOutside adds a sign of use past the proxy.
func (r *Recorder) AddOutside(o Outside) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.outside) == maxOutside {
		r.outside = append(r.outside[:0], r.outside[1:]...)
	}
	r.outside = append(r.outside, o)
}

// Turns takes the prompt of the conversation that flow identifies, and returns how much of its text
// has moved because older turns are gone since the previous prompt, as with clients that keep only
// the last few.
func (r *Recorder) Turns(flow uint64, chain *prefix.Chain) Moved {
	now := turnsOf(chain)
	r.mu.Lock()
	defer r.mu.Unlock()
	before, _ := r.turns.Get(flow)
	r.turns.Add(flow, now)
	return moved(before, now)
}

// since returns the requests and signs since a time, oldest first, and the time from which on they
// are complete.
func (r *Recorder) since(from time.Time) (rows []Request, outside []Outside, since time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if since = r.started; len(r.ring) == remembered {
		since = r.ring[r.next].Ended
	}
	if from.After(since) {
		since = from
	}
	for i := range r.ring {
		if q := r.ring[(r.next+i)%len(r.ring)]; !q.Arrived.Before(from) {
			rows = append(rows, q)
		}
	}
	for _, o := range r.outside {
		if !o.At.Before(from) {
			outside = append(outside, o)
		}
	}
	return rows, outside, since
}
