// Package upstream knows the Ollama servers that the proxy forwards to: how they are addressed, whether they answer,
// their version, which models they have and which of them are loaded, and how to keep a model loaded. It does not
// forward requests and decides nothing about them.
package upstream

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama/ollama/api"
)

// Server is one Ollama server. Its methods may be called from any goroutine.
type Server struct {
	Name string // the alias that logs, metrics and headers show
	URL  *url.URL

	// Instance names this process in the InstanceHeader of its own requests.
	Instance string

	// Polled is called after each poll, by the goroutine that polls; nil means nobody listens.
	Polled func(State)

	log    *slog.Logger
	client *api.Client
	wake   chan struct{} // asks Run for a poll now; holds one

	skew atomic.Int64 // see ownRequests
	used atomic.Bool  // a model may have been loaded since the last look at /api/ps

	mu    sync.Mutex
	state State // guarded by mu
}

// State is what the last poll found.
type State struct {
	Polled  time.Time // when the poll began; zero before the first one
	Up      bool      // the server answered
	Err     error     // why not
	Version string
	Models  []string // every model's name, as /api/tags spells it
	Loaded  []Loaded // nil where it was not asked for: see LoadedKnown

	// LoadedKnown says that Loaded was read in this poll. An idle server with nothing loaded is not asked.
	LoadedKnown bool
	// Restarted says that the server was down at the poll before, or changed its version since.
	Restarted bool
}

// Loaded is a model in a server's memory.
type Loaded struct {
	Name          string
	ExpiresAt     time.Time // by our clock, within about a second: when it leaves memory if unused; stale while a request runs
	Size          int64     // bytes, all memory
	SizeVRAM      int64     // bytes of it in GPU memory
	ContextLength int       // tokens
}

const (
	pollEvery     = 15 * time.Second // Ollama writes a log line per request: no more often than needed
	pollEveryDown = 2 * time.Second
	pollTimeout   = 3 * time.Second
)

// NewServer returns a server that has not been polled. transport serves the proxy's own few requests to it.
func NewServer(name string, u *url.URL, transport http.RoundTripper, log *slog.Logger) *Server {
	s := &Server{Name: name, URL: u, Instance: rand.Text(), log: log, wake: make(chan struct{}, 1)}
	s.client = api.NewClient(u, &http.Client{Transport: &ownRequests{RoundTripper: transport, instance: s.Instance, skew: &s.skew}})
	s.used.Store(true)
	return s
}

// InstanceHeader is on the proxy's own requests: one that comes back to the proxy that sent it shows a loop.
const InstanceHeader = "X-Cacheproxy-Instance"

// ownRequests sends the proxy's own requests. It marks them, and notes how far the server's clock is ahead of ours, from
// the Date header (whole seconds).
type ownRequests struct {
	http.RoundTripper
	instance string
	skew     *atomic.Int64 // nanoseconds
}

func (c *ownRequests) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(InstanceHeader, c.instance)
	res, err := c.RoundTripper.RoundTrip(r)
	if err == nil {
		if date, derr := http.ParseTime(res.Header.Get("Date")); derr == nil {
			c.skew.Store(int64(time.Until(date)))
		}
	}
	return res, err
}

// State returns what the last poll found.
func (s *Server) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Used says that a request was sent that may load a model, so that the next poll reads what is loaded.
func (s *Server) Used() { s.used.Store(true) }

// Failed says that a request could not reach the server: the next poll is made at once.
func (s *Server) Failed() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run polls the server until ctx ends.
func (s *Server) Run(ctx context.Context) {
	for {
		next := pollEvery
		if !s.State().Up {
			next = pollEveryDown
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-time.After(next):
		}
		s.Poll(ctx)
	}
}

// Poll asks the server how it is, stores that and tells Polled. It must not be called by two goroutines at once.
func (s *Server) Poll(ctx context.Context) State {
	prev, used := s.State(), s.used.Swap(false)
	next := s.ask(ctx, prev, used)
	if ctx.Err() != nil {
		return prev
	}
	s.mu.Lock()
	s.state = next
	s.mu.Unlock()

	first := prev.Polled.IsZero()
	switch {
	case !first && next.Up && !prev.Up:
		s.log.Info("upstream answers", "upstream", s.Name, "url", s.URL.String(), "version", next.Version, "models", len(next.Models))
	case !first && !next.Up && prev.Up:
		s.log.Warn("upstream does not answer", "upstream", s.Name, "url", s.URL.String(), "err", next.Err)
	}
	if s.Polled != nil {
		s.Polled(next)
	}
	return next
}

func (s *Server) ask(ctx context.Context, prev State, used bool) State {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	next := State{Polled: time.Now()}
	if next.Version, next.Err = s.client.Version(ctx); next.Err != nil {
		next.Models = prev.Models
		return next
	}
	next.Up = true
	next.Restarted = !prev.Polled.IsZero() && (!prev.Up || prev.Version != next.Version)
	next.Models = prev.Models
	if used || next.Restarted {
		if list, err := s.client.List(ctx); err == nil {
			next.Models = next.Models[:0:0]
			for _, m := range list.Models {
				next.Models = append(next.Models, m.Name)
			}
		}
	}
	if used || len(prev.Loaded) > 0 || next.Restarted {
		var err error
		next.Loaded, err = s.Loaded(ctx)
		next.LoadedKnown = err == nil
	}
	return next
}

// Loaded asks which models are loaded now.
func (s *Server) Loaded(ctx context.Context) ([]Loaded, error) {
	ps, err := s.client.ListRunning(ctx)
	if err != nil {
		return nil, err
	}
	loaded := make([]Loaded, 0, len(ps.Models))
	for _, m := range ps.Models {
		loaded = append(loaded, Loaded{Name: m.Name, ExpiresAt: m.ExpiresAt.Add(-time.Duration(s.skew.Load())), Size: m.Size, SizeVRAM: m.SizeVRAM, ContextLength: m.ContextLength})
	}
	return loaded, nil
}

// Forever is the keep_alive that never ends; any negative value means the same to Ollama.
const Forever = time.Duration(1<<63 - 1)

// Keep sets how long the model stays loaded after its last request, evaluating nothing. It loads the model, with its
// default options, if it is absent. embedding says that the model was used for embeddings: one that can do
// nothing else refuses /api/generate.
func (s *Server) Keep(ctx context.Context, model string, d time.Duration, embedding bool) error {
	keep := &api.Duration{Duration: d}
	if d == Forever {
		keep.Duration = -1
	}
	if embedding {
		_, err := s.client.Embed(ctx, &api.EmbedRequest{Model: model, KeepAlive: keep, Input: []string{}})
		return err
	}
	stream := false
	return s.client.Generate(ctx, &api.GenerateRequest{Model: model, KeepAlive: keep, Stream: &stream},
		func(api.GenerateResponse) error { return nil })
}

// StatusCode returns the HTTP status with which a server refused what was asked, 0 where it did not answer.
func StatusCode(err error) int {
	var status api.StatusError
	if errors.As(err, &status) {
		return status.StatusCode
	}
	var auth api.AuthorizationError
	if errors.As(err, &auth) {
		return auth.StatusCode
	}
	return 0
}
