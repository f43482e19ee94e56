// Package ollamasim is a simulated Ollama server: an http.Handler that answers as Ollama does and
// takes the time that a model would take, without one. It owns everything that decides about that
// time: Ollama's scheduler (loads, evictions, keep_alive, the queue before a load), the engine's
// slots and which of them a prompt is given, what it can reuse of the slot and of the host cache,
// and batches, which the slots share. Its rules are read from Ollama 0.24.0 and 0.34.1 and from
// llama.cpp b10865; each is beside the code that follows it.
//
// Time is a Clock's: real, faster than real, or virtual. Text is cut into made-up tokens, prompts
// are rendered as ChatML whatever the model, and an answer is made-up words that depend only on the
// model and the prompt, so that it is the same however the request was sent.
//
// Not simulated: images, thinking, tool calls in answers, stop sequences, format, templates and
// suffix; pulling and creating models; /v1/responses and /v1/messages; the time that the server
// itself takes (about a millisecond per request).
package ollamasim

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Config describes the server to simulate. At least one model must be given; the other fields may
// be zero.
type Config struct {
	// Version is Ollama's. Before 0.30 a prompt is given the free slot with the longest match, and
	// there is no host cache; from 0.34 on answers report how many tokens were reused. "" means
	// 0.34.1.
	Version string
	// Models are the models that the server has.
	Models []Model
	// Parallel is OLLAMA_NUM_PARALLEL, the number of slots of each loaded model; 0: 1.
	Parallel int
	// MaxLoaded is OLLAMA_MAX_LOADED_MODELS; 0: 3.
	MaxLoaded int
	// MaxQueue is OLLAMA_MAX_QUEUE: how many requests wait for a model to be loaded, beside the one
	// that it is loaded for; 0: 512.
	MaxQueue int
	// KeepAlive is OLLAMA_KEEP_ALIVE, a Go duration or seconds; "": 5m.
	KeepAlive string
	// CacheRAMMiB is LLAMA_ARG_CACHE_RAM, the host memory for evicted prompts in MiB (0 turns it
	// off, -1 sets no limit); nil: 8192.
	CacheRAMMiB *int
	// MemoryMiB is the memory for all models together, in MiB; 0: unlimited.
	MemoryMiB int
	// Clock is the time that the server lives in; nil: real time.
	Clock Clock
}

// Model describes how a model behaves. Only Name must be set.
type Model struct {
	// Name is as in requests; without a tag it means name:latest.
	Name string
	// Family is shown in /api/tags, /api/ps and /api/show; "": llama.
	Family string
	// Embedding means that it only makes embeddings. Other models make none from Ollama 0.30 on.
	Embedding bool
	// LoadTime is how long loading it takes; 0: 5 s.
	LoadTime time.Duration
	// PromptRate is how many prompt tokens all slots together evaluate per second; 0: 1000.
	PromptRate float64
	// AnswerRate is how many tokens each slot generates per second while no prompt is evaluated; 0:
	// 50.
	AnswerRate float64
	// AnswerTokens is the length of an answer whose request does not limit it, in tokens; 0: 64. A
	// limited one is as long as its limit.
	AnswerTokens int
	// NumCtx is the context length of a request that states none, in tokens; 0: 4096.
	NumCtx int
	// SizeMiB is its memory in MiB, without its context; 0: 4700.
	SizeMiB int
	// TokenBytes is the memory of a token of context, in the layers that keep all of it; 0: 128
	// KiB.
	TokenBytes int
	// Window is the sliding window in tokens, for models that have one (gemma3: 1024, or 512 for
	// the small ones); 0: none.
	Window int
	// WindowTokenBytes is the memory of a token in the layers that have the window.
	WindowTokenBytes int
}

// Gemma3 is a model like gemma3:12b on one large graphics card: a window of 1024 tokens in 40 of 48
// layers, each of 8 KiB per token, and 10 s to load. The rates are round numbers. 8 GiB of host
// cache hold five to seven of its prompts of 2,000 tokens.
func Gemma3() Model {
	return Model{
		Name: "gemma3:12b", Family: "gemma3", LoadTime: 10 * time.Second, PromptRate: 1000, AnswerRate: 40, SizeMiB: 8100,
		TokenBytes: 64 << 10, Window: 1024, WindowTokenBytes: 320 << 10,
	}
}

func (m *Model) setDefaults() {
	if m.Name = canonical(m.Name); m.Family == "" {
		m.Family = "llama"
	}
	or := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	or(&m.AnswerTokens, 64)
	or(&m.NumCtx, 4096)
	or(&m.SizeMiB, 4700)
	or(&m.TokenBytes, 128<<10)
	if m.LoadTime == 0 {
		m.LoadTime = 5 * time.Second
	}
	if m.PromptRate == 0 {
		m.PromptRate = 1000
	}
	if m.AnswerRate == 0 {
		m.AnswerRate = 50
	}
}

// canonical returns a model's name with its tag. Ollama folds case.
func canonical(name string) string {
	name = strings.ToLower(name)
	if !strings.Contains(name[strings.LastIndexByte(name, '/')+1:], ":") {
		name += ":latest"
	}
	return name
}

// Server is a simulated Ollama server. Its methods are safe for concurrent use. It starts no
// goroutine; a Clock calls it.
type Server struct {
	config    Config
	clock     Clock
	keepAlive time.Duration // the default
	era       era
	mux       *http.ServeMux

	mu       sync.Mutex // guards everything below, and the fields of requests and runners
	down     bool
	fault    func(FaultRequest) *Fault
	asked    int                   // how often fault was called
	live     map[*request]struct{} // those that have not ended
	loaded   []*runner             // one may still be loading
	head     *request              // the one that the others wait behind: a model is loaded for it, or has to be unloaded first
	blocked  bool                  // head waits for an unload
	pending  []*request
	recheck  func() bool // stops looking for what expires, which happens while blocked
	lastUsed uint64      // counts uses of slots
	stats    Stats
	log      []Evaluation
	loads    []Load
}

// era is a group of versions that behave differently.
type era int

const (
	eraA era = iota // up to 0.2x: Ollama's own runner
	eraB            // 0.30 and later: llama-server
	eraC            // 0.34 and later: it reports how much was reused
)

// New returns a server with nothing loaded.
func New(config Config) (*Server, error) {
	s := &Server{config: config, clock: config.Clock, live: map[*request]struct{}{}}
	if s.clock == nil {
		s.clock = NewReal(1)
	}
	c := &s.config
	if c.Version == "" {
		c.Version = "0.34.1"
	}
	major, rest, _ := strings.Cut(c.Version, ".")
	text, _, _ := strings.Cut(rest, ".")
	minor, err := strconv.Atoi(text)
	if err != nil || major != "0" {
		return nil, fmt.Errorf("version %q is not known: give Ollama's, such as 0.34.1", c.Version)
	}
	switch {
	case minor >= 34:
		s.era = eraC
	case minor >= 30:
		s.era = eraB
	}
	if s.keepAlive, err = parseKeepAlive(c.KeepAlive); err != nil {
		return nil, err
	}
	c.Parallel = max(c.Parallel, 1)
	if c.MaxLoaded <= 0 {
		c.MaxLoaded = 3
	}
	if c.MaxQueue <= 0 {
		c.MaxQueue = 512
	}
	if len(c.Models) == 0 {
		return nil, fmt.Errorf("a simulated server needs a model")
	}
	c.Models = slices.Clone(c.Models)
	for i := range c.Models {
		if c.Models[i].Name == "" {
			return nil, fmt.Errorf("model %d of the simulated server needs a name", i+1)
		}
		c.Models[i].setDefaults()
	}
	s.route()
	return s, nil
}

// parseKeepAlive reads OLLAMA_KEEP_ALIVE. A negative value means for ever.
func parseKeepAlive(text string) (time.Duration, error) {
	d := 5 * time.Minute
	if text != "" {
		var err error
		if d, err = time.ParseDuration(text); err != nil {
			seconds, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("keep_alive %q is neither a duration such as 5m nor a number of seconds", text)
			}
			d = time.Duration(seconds) * time.Second
		}
	}
	if d < 0 {
		d = forever
	}
	return d, nil
}

const forever time.Duration = 1<<63 - 1

func (s *Server) model(name string) *Model {
	name = canonical(name)
	for i := range s.config.Models {
		if s.config.Models[i].Name == name {
			return &s.config.Models[i]
		}
	}
	return nil
}

// ServeHTTP answers as Ollama does, with a header that marks it as simulated.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	down := s.down
	s.mu.Unlock()
	if down {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set(upstream.SimulatedHeader, "true")
	w.Header().Set("Date", s.clock.Now().UTC().Format(http.TimeFormat)) // shows clients how far the clocks are apart
	s.mux.ServeHTTP(w, r)
}

// Crash ends all requests by breaking their connections. Nothing is loaded any more, and every
// request breaks until Restart.
func (s *Server) Crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, run := range s.loaded {
		run.dead = true
	}
	s.down, s.loaded, s.head, s.pending, s.blocked = true, nil, nil, nil, false
	for r := range s.live {
		s.end(r, errCrashed)
	}
}

// Restart lets a server answer again after a Crash; a running one crashes first.
func (s *Server) Restart() {
	s.Crash()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = false
}

// Version is the version that the server reports.
func (s *Server) Version() string { return s.config.Version }

// FaultRequest is what a fault may depend on.
type FaultRequest struct {
	Path   string // /api/chat, …
	Model  string // as in the request
	Prompt string // as rendered
	Number int    // of this request since SetFaults; the first is 1
}

// Fault is how a request fails.
type Fault struct {
	// After is how many tokens of the answer come first; 0: the request is refused before it takes
	// a slot.
	After int
	// Break breaks the connection. Otherwise the answer is an error.
	Break bool
	// Status is the status of an error, if nothing has been sent before; 0: 500.
	Status int
	// Message is the error's text.
	Message string
}

// SetFaults makes f decide how a request for an answer fails; nil, as at first, means that none
// does. f is called by one goroutine at a time and must not call the server.
func (s *Server) SetFaults(f func(FaultRequest) *Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault, s.asked = f, 0
}
