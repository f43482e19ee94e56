// Package upstream knows the Ollama servers that the proxy forwards to: their addresses, health,
// version, which models they have and which are loaded, and how to keep a model loaded. It does not
// forward requests and makes no decisions about them.
package upstream

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ollama/ollama/api"
)

// Server is one Ollama server. Its methods are safe for concurrent use.
type Server struct {
	Name string // the alias in logs, metrics and headers
	URL  *url.URL

	// Instance names this process in the InstanceHeader of its own requests.
	Instance string

	// Polled, if non-nil, is called after each poll, by the goroutine that polls.
	Polled func(State)

	// TryDuration is how long requests wait for a server that is away, counted from when it was
	// last seen up; zero means not at all. During this time it is polled more often.
	TryDuration time.Duration

	log    *slog.Logger
	own    *http.Client  // marks the proxy's own requests
	client *api.Client   // … as well
	wake   chan struct{} // asks Run for a poll now; holds one

	skew      atomic.Int64 // see ownRequests
	simulated atomic.Bool  // see ownRequests

	used  atomic.Bool               // a model may have been loaded since /api/ps was last read
	alive atomic.Pointer[time.Time] // when anything last came from the server; nil: never

	polling sync.Mutex // held while a poll is under way

	mu     sync.Mutex
	state  State     // guarded by mu
	failed int       // polls in a row, while nothing else came from the server; guarded by mu
	ended  time.Time // when the last poll ended; guarded by mu
	listed time.Time // when the models were last listed; guarded by mu
	missed int       // how often Unreachable was called; guarded by mu
	broke  time.Time // when BrokeOff was last called; guarded by mu
}

// State is the result of the last poll.
type State struct {
	Polled  time.Time         // when the poll began; zero before the first one
	Up      bool              // the server answered
	Away    bool              // it refuses connections, or has answered nothing for several polls. Neither Up nor Away: in doubt
	Seen    time.Time         // when anything last came from it; zero: never
	Until   time.Time         // if it is away: how long requests wait for it; zero: they do not, as it was never seen
	Err     error             // why it is not up
	Version string            // the last one known; "0.34.1 (simulated)" where the server says that it is
	Models  []string          // the names of all models, as /api/tags spells them
	Digests map[string]string // the digest of each model, by ModelKey; "" of those that run elsewhere
	Listed  time.Time         // when the poll began that read Models and Digests; zero: none has
	// Written is when each of Digests was written, by ModelKey, as the server says: of a model that was
	// another one for a while it differs.
	Written map[string]time.Time
	Loaded  []Loaded // nil if it was not read: see LoadedKnown

	// Simulated means that the server's answers and figures are made up, as its SimulatedHeader
	// says.
	Simulated bool
	// LoadedKnown means that this poll read Loaded. An idle server with nothing loaded is not
	// asked.
	LoadedKnown bool
	// Replaced lists the models (ModelKey) that were deleted or replaced since the previous poll.
	Replaced []string

	// Restarted means that the server was away before this poll, or has changed its version since.
	// A server that was only too slow to answer has not been restarted.
	Restarted bool

	gone bool // it was away for a reason other than a timeout, and has not answered since
}

// Loaded is a model in a server's memory.
type Loaded struct {
	Name          string    // the name under which it was loaded; other names of the same weights share its runner
	Digest        string    // of that name's manifest, as in State.Digests
	ExpiresAt     time.Time // by our clock, within about a second: when it is unloaded if unused; outdated while a request runs
	Size          int64     // bytes, all memory
	SizeVRAM      int64     // bytes of it in GPU memory
	ContextLength int       // tokens
}

const (
	pollEvery      = 15 * time.Second // Ollama writes a log line per request, so no more often than needed
	pollEveryDoubt = time.Second
	pollEveryAway  = 2 * time.Second
	pollEveryTry   = 500 * time.Millisecond // while requests may wait for it
	pollTimeout    = 3 * time.Second
	pollsFailed    = 3           // failed polls in a row after which a server is away
	listEvery      = time.Minute // models change without the proxy, too
)

// NewServer returns a server that has not been polled yet. transport carries the proxy's own few
// requests to it.
func NewServer(name string, u *url.URL, transport http.RoundTripper, log *slog.Logger) *Server {
	s := &Server{Name: name, URL: u, Instance: rand.Text(), log: log, wake: make(chan struct{}, 1)}
	s.own = &http.Client{Transport: &ownRequests{RoundTripper: transport, instance: s.Instance, skew: &s.skew, simulated: &s.simulated}}
	s.client = api.NewClient(u, s.own)
	s.used.Store(true)
	s.alive.Store(new(time.Time))
	return s
}

// InstanceHeader marks the proxy's own requests. A request that comes back to the proxy that sent
// it reveals a loop.
const InstanceHeader = "X-Cacheproxy-Instance"

// SimulatedHeader is on every answer of a simulated server (package ollamasim). Clients receive it,
// too.
const SimulatedHeader = "X-Cacheproxy-Simulated"

// ownRequests sends the proxy's own requests. It marks them, and records from the answers how far
// the server's clock is ahead of ours (the Date header, in whole seconds) and whether the server is
// simulated.
type ownRequests struct {
	http.RoundTripper
	instance string
	skew     *atomic.Int64 // nanoseconds

	simulated *atomic.Bool
}

func (c *ownRequests) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(InstanceHeader, c.instance)
	res, err := c.RoundTripper.RoundTrip(r)
	if err == nil {
		c.simulated.Store(res.Header[SimulatedHeader] != nil)
		if date, derr := http.ParseTime(res.Header.Get("Date")); derr == nil {
			c.skew.Store(int64(time.Until(date)))
		}
	}
	return res, err
}

// CloseIdleConnections closes connections that no request uses.
func (c *ownRequests) CloseIdleConnections() {
	if t, ok := c.RoundTripper.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
}

// persist sends one of the proxy's own requests, and sends it again if it breaks off: it may have
// used a connection from before a restart of the server, and others of these may be left. Polls are
// not repeated, since their failure is what reveals a restart.
func (s *Server) persist(ctx context.Context, ask func() error) error {
	err := ask()
	if Closed(err) && ctx.Err() == nil {
		s.own.CloseIdleConnections()
		err = ask()
	}
	return err
}

// State returns the result of the last poll.
func (s *Server) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dated(s.state)
}

// dated adds when the server was last seen, and what follows from that.
func (s *Server) dated(st State) State {
	if st.Seen = *s.alive.Load(); st.Away && !st.Seen.IsZero() {
		st.Until = st.Seen.Add(s.TryDuration)
	}
	return st
}

// Alive records that something came from the server. It reports whether the server counts as away
// nevertheless, until the next poll, which is made at once.
func (s *Server) Alive() (away bool) {
	s.seen()
	s.mu.Lock()
	away = s.state.Away
	poll := away && time.Since(s.ended) >= pollEveryTry
	s.mu.Unlock()
	if poll {
		s.Failed()
	}
	return away
}

func (s *Server) seen() {
	now := time.Now()
	s.alive.Store(&now)
}

// Used records that a request was sent that may load a model, so that the next poll reads what is
// loaded.
func (s *Server) Used() { s.used.Store(true) }

// NoConnection reports whether a request failed because no connection to the server could be made,
// so that the server cannot have begun with it.
func NoConnection(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial" && !errors.Is(err, context.Canceled) &&
		!slices.ContainsFunc(ours, func(e error) bool { return errors.Is(err, e) })
}

// ours are errors of this machine, which say nothing about the server.
var ours = []error{syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM}

// Unreachable records that no connection to the server could be made (NoConnection). It counts as
// away from now on, until a poll finds it again; one is made at once.
func (s *Server) Unreachable(err error) {
	s.mu.Lock()
	was := s.state.Away
	s.state.Up, s.state.Away, s.state.gone, s.state.Err = false, true, s.state.gone || !timedOut(err), err
	s.missed++
	s.mu.Unlock()
	if !was {
		s.warnAway(err)
	}
	s.Failed()
}

// timedOut reports whether connecting timed out. A server that is only slow may not have been
// restarted.
func timedOut(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

func (s *Server) warnAway(err error) {
	s.log.Warn("upstream does not answer", "upstream", s.Name, "url", s.URL.String(), "err", err)
}

// BrokeOff records that the server closed the connection of a request, which it may have begun. If
// the next poll, made at once, ends the same way, it is away: something that accepts connections in
// its place, such as a container's port, is not the server.
func (s *Server) BrokeOff() {
	s.mu.Lock()
	s.broke = time.Now()
	s.mu.Unlock()
	s.Failed()
}

// Closed reports whether a request failed because the other side closed the connection before the
// answer's end.
func Closed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Failed records that a request was not answered. The next poll is made at once.
func (s *Server) Failed() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Changed records that a model may have been changed or removed. The next poll, made at once, lists
// all models.
func (s *Server) Changed() {
	s.Used()
	s.Failed()
}

// Run polls the server until ctx ends.
func (s *Server) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-time.After(s.pause()):
		}
		s.Poll(ctx)
	}
}

// pause returns how long to wait before the next poll.
func (s *Server) pause() time.Duration {
	switch st := s.State(); {
	case st.Away && time.Now().Before(st.Until):
		return pollEveryTry
	case st.Away:
		return pollEveryAway
	case !st.Up && !answered(st.Err):
		return pollEveryDoubt
	case s.TryDuration > 0: // counted from the last poll, if there is nothing else
		return min(pollEvery, max(s.TryDuration/4, pollEveryDoubt))
	}
	return pollEvery
}

// Refresh returns the server's state with the current models. Concurrent callers share one poll, if
// that began after they called.
func (s *Server) Refresh(ctx context.Context) State {
	return s.since(ctx, func() time.Time { return s.state.Listed }, s.Used)
}

// Check returns the server's current state. Concurrent callers share one poll.
func (s *Server) Check(ctx context.Context) State {
	return s.since(ctx, func() time.Time { return s.state.Polled }, func() {})
}

// since polls, prepared by before, unless last reports, with s.mu held, that another caller's poll
// was enough.
func (s *Server) since(ctx context.Context, last func() time.Time, before func()) State {
	asked := time.Now()
	s.polling.Lock()
	defer s.polling.Unlock()
	s.mu.Lock()
	state, done := s.dated(s.state), last().After(asked)
	s.mu.Unlock()
	if done {
		return state
	}
	before()
	return s.poll(ctx)
}

// Poll asks the server for its state, stores it and calls Polled.
func (s *Server) Poll(ctx context.Context) State {
	s.polling.Lock()
	defer s.polling.Unlock()
	return s.poll(ctx)
}

// poll is Poll with s.polling held.
func (s *Server) poll(ctx context.Context) State {
	s.mu.Lock()
	prev, missed, list := s.state, s.missed, time.Since(s.listed) >= listEvery
	s.mu.Unlock()
	used := s.used.Swap(false)
	next, listed := s.ask(ctx, prev, used, used || list)
	if used && !next.Up {
		s.Used()
	}
	if ctx.Err() != nil {
		return s.dated(prev)
	}
	s.mu.Lock()
	s.judge(&next, prev)
	if !next.Away && s.missed != missed { // it was gone meanwhile: the next poll finds out whether it is back
		next.Up, next.Away, next.gone, next.Err = false, true, true, s.state.Err
		s.Changed()
	}
	was := s.state.Away
	s.state, s.ended = next, time.Now()
	if listed {
		s.listed = s.ended
	}
	s.mu.Unlock()

	if !prev.Polled.IsZero() {
		s.logChange(next, prev.Up, was)
	}
	next = s.dated(next)
	if s.Polled != nil {
		s.Polled(next)
	}
	return next
}

// logChange logs what a poll has found, if it differs from the poll before.
func (s *Server) logChange(next State, wasUp, wasAway bool) {
	switch {
	case next.Up && wasAway:
		s.log.Info("upstream answers", "upstream", s.Name, "url", s.URL.String(),
			"version", next.Version, "models", len(next.Models))
	case next.Away && !wasAway:
		s.warnAway(next.Err)
	case !next.Up && wasUp:
		s.log.Info("a poll of the upstream failed; it counts as away if the next ones fail too",
			"upstream", s.Name, "url", s.URL.String(), "err", next.Err)
	}
}

// judge decides, after a poll, whether a server is away. s.mu must be held.
func (s *Server) judge(next *State, prev State) {
	// A server that refuses to give its version, such as a gateway that admits only inference,
	// answers, too.
	if next.Up || answered(next.Err) {
		s.seen()
		s.failed = 0
		return
	}
	slow := errors.Is(next.Err, context.DeadlineExceeded)
	seen := *s.alive.Load()
	answers := seen.After(prev.Polled) // something other than this poll
	if answers {
		s.failed = 0
	}
	s.failed++
	broken := (Closed(next.Err) || StatusCode(next.Err) > 0) &&
		(seen.IsZero() || s.broke.After(seen))
	next.Away = prev.Away && !answers || NoConnection(next.Err) && !slow || broken || s.failed >= pollsFailed
	next.gone = prev.gone || next.Away && !slow
	if next.Away {
		next.Loaded = nil
	}
}

// answered reports whether a failed poll was answered all the same, and not by a gateway in the
// server's place.
func answered(err error) bool {
	status := StatusCode(err)
	return status > 0 && status < http.StatusInternalServerError
}

// ask makes a poll's requests. list: the models are to be listed; listed: they were.
func (s *Server) ask(ctx context.Context, prev State, used, list bool) (next State, listed bool) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	next = State{Polled: time.Now()}
	if next.Version, next.Err = s.client.Version(ctx); next.Err != nil {
		next.Version, next.Simulated = prev.Version, prev.Simulated
		next.Models, next.Digests, next.Loaded = prev.Models, prev.Digests, prev.Loaded
		next.Listed, next.Written = prev.Listed, prev.Written
		return next, false
	}
	if next.Simulated = s.simulated.Load(); next.Simulated {
		next.Version += " (simulated)"
	}
	next.Up = true
	next.Restarted = !prev.Polled.IsZero() && (prev.gone || prev.Version != "" && prev.Version != next.Version)
	next.Models, next.Digests, next.Listed = prev.Models, prev.Digests, prev.Listed
	next.Written = prev.Written
	if list || next.Restarted {
		listed = s.list(ctx, &next)
	}
	if used || len(prev.Loaded) > 0 || prev.Away || next.Restarted {
		var err error
		next.Loaded, err = s.Loaded(ctx)
		next.LoadedKnown = err == nil
	}
	return next, listed
}

// list asks for the server's models, and reports whether it answered. next has those of the
// previous poll.
func (s *Server) list(ctx context.Context, next *State) bool {
	list, err := s.client.List(ctx)
	if err != nil {
		return false
	}
	before := next.Digests
	next.Models, next.Digests = nil, make(map[string]string, len(list.Models))
	next.Written = make(map[string]time.Time, len(list.Models))
	next.Listed = next.Polled
	for _, m := range list.Models {
		next.Models = append(next.Models, m.Name)
		if !IsCloud(m.Name) { // a local model may have the same name except for the suffix
			digest := m.Digest
			if m.RemoteHost != "" { // it runs elsewhere, and may change there
				digest = ""
			}
			next.Digests[ModelKey(m.Name)] = digest
			next.Written[ModelKey(m.Name)] = m.ModifiedAt
		}
	}
	for model, digest := range before {
		if next.Digests[model] != digest {
			next.Replaced = append(next.Replaced, model)
		}
	}
	return true
}

// Has reports whether the server is known to have the model (ModelKey), or may have it because its
// models are not known.
func (st State) Has(model string) bool { return st.Lists(model) || st.Digests == nil }

// Lists reports whether the server is known to have the model (ModelKey).
func (st State) Lists(model string) bool {
	_, ok := st.Digests[model]
	return ok
}

// Loaded returns which models are loaded now.
func (s *Server) Loaded(ctx context.Context) ([]Loaded, error) {
	ps, err := s.client.ListRunning(ctx)
	if err != nil {
		return nil, err
	}
	loaded := make([]Loaded, 0, len(ps.Models))
	for _, m := range ps.Models {
		loaded = append(loaded, Loaded{Name: m.Name, Digest: m.Digest, ExpiresAt: m.ExpiresAt.Add(-time.Duration(s.skew.Load())), Size: m.Size, SizeVRAM: m.SizeVRAM, ContextLength: m.ContextLength})
	}
	return loaded, nil
}

// Show returns what the server says of a model.
func (s *Server) Show(ctx context.Context, model string) (show *api.ShowResponse, err error) {
	err = s.persist(ctx, func() (err error) {
		show, err = s.client.Show(ctx, &api.ShowRequest{Model: model})
		return err
	})
	return show, err
}

// AtLeast reports whether the server's version is known and is this one or later.
func (st State) AtLeast(major, minor int) bool { return AtLeast(st.Version, major, minor) }

// AtLeast reports whether a version is this one or later; an unknown version is not.
func AtLeast(version string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(version, "%d.%d", &a, &b); n < 2 {
		return false
	}
	return a > major || a == major && b >= minor
}

// Forever is the keep_alive that never expires; to Ollama, any negative value means the same.
const Forever = time.Duration(1<<63 - 1)

// Keep sets how long the model stays loaded after its last request, without evaluating anything. It
// loads the model if it is not loaded, or loaded with other options than these (nil: any options).
// embedding means that the model was used for embeddings, since a model that can do nothing else
// refuses /api/generate.
func (s *Server) Keep(ctx context.Context, model string, d time.Duration, embedding bool,
	options map[string]any, shift *bool) error {
	keep := &api.Duration{Duration: d}
	if d == Forever {
		keep.Duration = -1
	}
	if embedding {
		_, err := s.client.Embed(ctx, &api.EmbedRequest{Model: model, KeepAlive: keep, Input: []string{}, Options: options})
		return err
	}
	stream := false
	return s.client.Generate(ctx,
		&api.GenerateRequest{Model: model, KeepAlive: keep, Stream: &stream, Options: options, Shift: shift},
		func(api.GenerateResponse) error { return nil })
}

// Load has the model loaded with these options, like a request that states them. It evaluates
// nothing, and states no keep_alive.
func (s *Server) Load(ctx context.Context, model string, options map[string]any, shift *bool) error {
	stream := false
	return s.persist(ctx, func() error {
		return s.client.Generate(ctx,
			&api.GenerateRequest{Model: model, Stream: &stream, Options: options, Shift: shift},
			func(api.GenerateResponse) error { return nil })
	})
}

// StatusCode returns the HTTP status with which a server refused a request, or 0 if it did not
// answer.
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
