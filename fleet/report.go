package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Report is a line of the stream that a proxy sends to each peer.
type Report struct {
	ID       string `json:"id"`   // differs for each process
	Name     string `json:"name"` // Config.Name
	Draining bool   `json:"draining,omitempty"`
	// Servers are the proxy's servers. In a line of the stream null means that nothing about them has
	// changed since the line before.
	Servers []Server `json:"servers"`
	// Orders are what was last said of servers, at whichever proxy.
	Orders []Order `json:"orders,omitempty"`
	// Seen is where prompts were sent since the last line.
	Seen []Sight `json:"seen,omitempty"`
}

// Server is what a proxy knows of one of its Ollama servers.
type Server struct {
	Name   string `json:"name"`
	Beside bool   `json:"beside,omitempty"` // the proxy is beside it, and owns it
	Owned  bool   `json:"owned,omitempty"`  // by the proxy that says so
	Takes  bool   `json:"takes"`            // it answers, and gets new requests
	// Drained means that it gets none since somebody has said so.
	Drained bool `json:"drained,omitempty"`
	// Reached means that it answers, if it is drained: all proxies drain it, one after the other, and
	// its owner stays the same.
	Reached bool `json:"reached,omitempty"`
	// InFlight are the requests that this proxy has in progress there, if it is drained.
	InFlight int64 `json:"in_flight,omitempty"`
	// Models are the keys of its models (upstream.ModelKey). In a line of the stream null means the
	// same ones as in the line before.
	Models []string `json:"models"`
	// Wait is how long a new request with a new prefix waits there, in seconds, as estimated.
	Wait    float64 `json:"wait,omitempty"`
	Running int     `json:"running,omitempty"`
	Waiting int     `json:"waiting,omitempty"`
	Slots   int     `json:"slots,omitempty"` // for each model; 0: not known
	// Loaded are the keys of the models that it has loaded.
	Loaded []string `json:"loaded,omitempty"`
	// Backlogs are the waiting requests that another proxy's server may take over.
	Backlogs []Backlog `json:"backlogs,omitempty"`
	// Learned is what the scheduler has learned of it, for the next owner.
	Learned json.RawMessage `json:"learned,omitempty"`
}

// has reports whether the server has a model, by its key. The keys are sorted.
func (s *Server) has(model string) bool {
	_, found := slices.BinarySearch(s.Models, model)
	return found
}

// Backlog are requests that wait for a model, loaded with some options.
type Backlog struct {
	Options prefix.Options `json:"options"`
	Movable int            `json:"movable"` // those that another server may take over
	Lanes   int            `json:"lanes"`   // slots that serve them
}

// Sight tells that a prompt with these fingerprints was sent to a server.
type Sight struct {
	Server string   `json:"server"`
	Hashes []uint64 `json:"hashes"`
}

// outbox has the last report, and the sights that some streams have not sent yet.
type outbox struct {
	mu      sync.Mutex
	last    Report
	version uint64        // of last; it grows
	sights  []Sight       // the most recent ones
	first   uint64        // the number of sights[0]
	news    chan struct{} // closed when something has changed
}

// sightsMost is how many sights are kept for slow streams; there are at most twice as many. What is
// lost costs a prompt that is sent where its prefix is not warm.
const sightsMost = 4096

func newOutbox() *outbox { return &outbox{news: make(chan struct{})} }

func (o *outbox) put(r Report) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !reflect.DeepEqual(r, o.last) {
		o.last = r
		o.version++
		o.wake()
	}
}

func (o *outbox) sight(s Sight) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sights = append(o.sights, s)
	if len(o.sights) >= 2*sightsMost {
		o.sights = slices.Clone(o.sights[sightsMost:])
		o.first += sightsMost
	}
	o.wake()
}

func (o *outbox) wake() {
	close(o.news)
	o.news = make(chan struct{})
}

// stream is the position of a peer in the outbox.
type stream struct {
	version uint64
	sights  uint64              // the number of the first that was not sent
	models  map[string][]string // of the last line, by server; nil: nothing was sent
}

// next returns the next line for a peer. The first one waits until there is a report; others wait for
// news for up to reportLeast, and for sightEvery after the last line.
func (o *outbox) next(ctx context.Context, s *stream) ([]byte, error) {
	var least <-chan time.Time
	if s.models != nil {
		if err := pause(ctx, sightEvery); err != nil {
			return nil, err
		}
		timer := time.NewTimer(reportLeast - sightEvery)
		defer timer.Stop()
		least = timer.C
	}
	for waits := true; waits; {
		changed, some := o.changed(s)
		if some {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		case <-least:
			waits = false
		}
	}
	text, err := json.Marshal(o.line(s))
	return append(text, '\n'), err
}

// changed reports whether there is something for a peer, and returns what is closed when there is more.
func (o *outbox) changed(s *stream) (more <-chan struct{}, some bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	same := s.version == o.version && s.sights == o.first+uint64(len(o.sights))
	return o.news, o.version > 0 && !same
}

// line returns what is new for a peer.
func (o *outbox) line(s *stream) Report {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := o.last
	if s.version == o.version {
		r.Servers = nil
	} else {
		r.Servers = s.shorten(r.Servers)
	}
	if s.sights < o.first {
		s.sights = o.first
	}
	r.Seen = slices.Clone(o.sights[s.sights-o.first:])
	s.sights, s.version = o.first+uint64(len(o.sights)), o.version
	return r
}

// shorten leaves out the models that the line before had. A server that was not in that one has its
// models again, even if they were sent earlier.
func (s *stream) shorten(servers []Server) []Server {
	short, models := append([]Server{}, servers...), make(map[string][]string, len(servers))
	for i := range short {
		v := &short[i]
		models[v.Name] = v.Models
		if before, ok := s.models[v.Name]; ok && slices.Equal(before, v.Models) {
			v.Models = nil
		} else {
			v.Models = append([]string{}, v.Models...)
		}
	}
	s.models = models
	return short
}

// pause waits, unless ctx ends before.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// since completes a line from the one before it, where that says that something is the same, and
// returns how much is new.
func (r *Report) since(before *Report) difference {
	switch {
	case before == nil:
		return standing
	case r.Servers == nil:
		r.Servers = before.Servers
	default:
		r.fill(before)
	}
	if r.Draining != before.Draining {
		return standing
	}
	return differ(before.Servers, r.Servers)
}

// fill adds the models that a line leaves out.
func (r *Report) fill(before *Report) {
	models := make(map[string][]string, len(before.Servers))
	for _, b := range before.Servers {
		models[b.Name] = b.Models
	}
	for i := range r.Servers {
		if s := &r.Servers[i]; s.Models == nil {
			s.Models = models[s.Name]
		}
	}
}

// difference is how much is new about a proxy's servers.
type difference int

const (
	nothing  difference = iota
	figures             // of load, and what was learned or is only told: what decides at most over the order
	standing            // which servers there are, who may own them, and what they can serve
)

// differ compares what a proxy has said of its servers with what it says now.
func differ(before, now []Server) difference {
	if !slices.EqualFunc(before, now, stands) {
		return standing
	}
	if !slices.EqualFunc(before, now, stays) {
		return figures
	}
	return nothing
}

func stands(s, t Server) bool {
	return s.Name == t.Name && s.Beside == t.Beside && s.Takes == t.Takes && s.Reached == t.Reached &&
		s.Slots == t.Slots && slices.Equal(s.Models, t.Models) && slices.Equal(s.Loaded, t.Loaded)
}

// stays compares what stands does not.
func stays(s, t Server) bool {
	return s.Owned == t.Owned && s.Drained == t.Drained && s.InFlight == t.InFlight &&
		s.Wait == t.Wait && s.Running == t.Running && s.Waiting == t.Waiting && slices.Equal(s.Backlogs, t.Backlogs) &&
		bytes.Equal(s.Learned, t.Learned)
}
