// Package doctor says what is wrong with how an Ollama is used, and which setting changes that. A
// Recorder, fed by the proxy, remembers the last requests; Facts are what they add up to, with what
// the servers say of themselves; Examine turns facts into findings, worst first. It keeps no prompt
// text, makes no requests, and decides nothing: docs/doctor.md.
package doctor

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

const (
	// remembered bounds the requests of which facts are made; one takes about 300 bytes.
	remembered = 10_000
	// maxFlows bounds the conversations that are watched for turns that are dropped, and maxTurns
	// the messages of each; a message takes 16 bytes.
	maxFlows = 256
	maxTurns = 256
	// maxOutside bounds the signs of use that did not come through the proxy.
	maxOutside = 256
)

// Asker is who sends requests of one kind, as far as that can be told without knowing anybody.
type Asker struct {
	// Name is that of the API key; "" where there is none.
	Name string `json:"name,omitempty"`
	// Client is a hash of the key or the address, the same for as long as the proxy runs.
	Client string `json:"client"`
	// Agent is the first word of the User-Agent header.
	Agent string `json:"agent,omitempty"`
	// Endpoint is the path.
	Endpoint string `json:"endpoint"`
	// NumCtx is the context length that is asked for, in tokens; 0: none is.
	NumCtx int `json:"num_ctx"`
}

// Request is one request to a model that has ended.
type Request struct {
	Asker
	Upstream string
	Model    string // as people write it
	Weights  string // what stands for its weights: names of one model share a runner

	Arrived time.Time
	Sent    time.Time // to the server; Arrived, where it did not have to wait
	Ended   time.Time
	Batch   bool // it was of the least urgent priority
	Lane    bool // it took a slot

	// OwnKeepAlive says that the client's own keep_alive went to the server, which is KeepAlive
	// then. Otherwise KeepAlive is what the proxy holds the model for, negative where it leaves
	// that to Ollama.
	OwnKeepAlive bool
	KeepAlive    time.Duration
	Foreign      bool // it was sent under /v1, and could not carry one

	Loaded    bool          // the model was loaded for it
	Load      time.Duration // for how long it waited for that; 0: not told
	ByOptions bool          // … since it asks for other options than were loaded
	ByNumCtx  bool          // … among them another num_ctx
	Restarted bool          // … since the server was restarted

	Tokens    int // of the prompt; 0: not known
	Reused    int // of these, where Known
	Evaluated int
	Known     bool
	Estimated bool // the two above are estimates
	Generated int
	Prompt    time.Duration // that the evaluation took; 0: not told
	Eval      time.Duration // that the answer took; 0: not told
	Reason    string        // why it was not warm, as the ledger has it
	Truncated bool          // the server has probably cut the prompt
	Bytes     int           // of the prompt's text
	Images    int           // in the prompt
	Moved     Moved         // since the oldest turns of its conversation are gone: see Recorder.Turns
	Context   int           // tokens that the model is loaded with, as far as is known; 0: it is not

	Conversation uint64 // the same for prompts of which one goes on where the other ends, or that begin alike
	Values       int    // numbers that each token takes in the engine's memory; 0: not known
	Sliding      bool   // the model's attention has a sliding window

	cut bool // as aggregate finds
}

// Outside is a sign that a server was used by somebody who does not come through the proxy.
type Outside struct {
	At       time.Time
	Upstream string
	Model    string
	Kind     OutsideKind
}

// OutsideKind says what the sign is.
type OutsideKind string

const (
	OutsideOptions OutsideKind = "options" // the model was loaded anew, with another context length
	OutsideUsed    OutsideKind = "used"    // its expiry moved, and no request here moved it
	OutsideLoaded  OutsideKind = "loaded"  // it was loaded, and nobody here had asked for it
)

// Recorder remembers the last requests. Make it with NewRecorder. Its methods may be called from
// any goroutine.
type Recorder struct {
	started time.Time

	mu      sync.Mutex
	ring    []Request                      // guarded by mu
	next    int                            // where the oldest one is, once the ring is full; guarded by mu
	outside []Outside                      // oldest first; guarded by mu
	turns   *simplelru.LRU[uint64, []turn] // guarded by mu
}

// NewRecorder returns a recorder that has seen nothing since it was started.
func NewRecorder(started time.Time) *Recorder {
	turns, err := simplelru.NewLRU[uint64, []turn](maxFlows, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return &Recorder{started: started, turns: turns}
}

// Add takes in a request that has ended.
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

// AddOutside takes in a sign of use that did not come through the proxy.
func (r *Recorder) AddOutside(o Outside) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.outside) == maxOutside {
		r.outside = append(r.outside[:0], r.outside[1:]...)
	}
	r.outside = append(r.outside, o)
}

// Turns takes in the prompt of a conversation, which flow stands for, and returns what of it has
// moved since the one before had older turns, which are gone: as clients do that keep the last
// few.
func (r *Recorder) Turns(flow uint64, chain *prefix.Chain) Moved {
	now := turnsOf(chain)
	r.mu.Lock()
	defer r.mu.Unlock()
	before, _ := r.turns.Get(flow)
	r.turns.Add(flow, now)
	return moved(before, now)
}

// since returns the requests and signs since a time, oldest first, and from when on there is
// nothing missing among them.
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
