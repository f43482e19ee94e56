// Package fleet makes several proxies one. Each Ollama server has an owner, which is the one proxy
// that schedules it; a request that another proxy receives is passed on to the owner over one hop.
// The package knows the other proxies (peers), who owns which server, where prompts were sent, and
// how to pass a request on so that it is sent to a server at most once. It schedules nothing and
// does not read bodies.
//
// There are no locks, leases or elections. Proxies that know different peers for a moment may both
// own a server, which costs order, and never an answer: Ollama queues what exceeds its slots.
package fleet

import (
	"context"
	"crypto/rand"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Source finds the addresses (host:port) of peers; one of them may be this proxy's own.
type Source interface {
	// Watch calls found with all addresses, at first and whenever they change, until ctx ends.
	Watch(ctx context.Context, found func(addrs []string))
	String() string
}

// Config is what a Fleet needs to know. Sources and Local are required.
type Config struct {
	// Name identifies this proxy to people, and in the hash that decides who owns a server. It
	// should stay the same when the proxy is restarted, and differ from the peers' names.
	Name    string
	Sources []Source
	// Version is that of the program, which peers are told; may be empty.
	Version string
	// Own are the names of the servers that this proxy is beside of, and owns.
	Own []string
	// Secret is what peers show each other; if empty, they know each other by certificates alone,
	// for which the listener has to ask (TLS).
	Secret []byte
	// Scheme is https if peers are reached over TLS; the zero value means http.
	Scheme string
	// Transport sends requests to peers; if nil, NewTransport(nil, nil).
	Transport *http.Transport

	// Local returns what this proxy knows of its own servers. It is called ten times a second, and
	// what it has returned must not change.
	Local func() []Server
	// Give lets a peer's idle server take over waiting requests, and returns how many it gave; if
	// nil, it gives none.
	Give func(schedule.Taker) int
	// Taker returns what a server of this proxy could take over of requests with these options, if
	// it is idle; if nil, nothing.
	Taker func(server string, options prefix.Options) (schedule.Taker, bool)
	// Owned is called for each server of this proxy when it is known whether the proxy owns it, and
	// when that changes; may be nil.
	Owned func(server string, on bool)
	// Learned is called with what the former owner has learned of a server, before Owned; may be
	// nil.
	Learned func(server string, learned []byte)
	// Ordered is called when somebody has drained or resumed a server, at whichever proxy, and
	// whether this one has that server or not; may be nil.
	Ordered func(server string, drain bool)
	// Trace, if non-nil, is called for each message between proxies, for tests and figures.
	Trace func(kind string, bytes int)

	Log *slog.Logger
}

const (
	// reportEvery is how often a changed report is sent.
	reportEvery = 100 * time.Millisecond
	// sightEvery is how often peers are told where prompts were sent. At 100 ms, conversations whose
	// requests come to different proxies cost 7 % more tokens than through one (schedule's
	// TestFleetTable), at 20 ms 3 %.
	sightEvery = 20 * time.Millisecond
	// reportLeast is how often an unchanged one is sent, so that peers see that this proxy lives.
	reportLeast = time.Second
	// silentFor is how long a peer may send nothing before it counts as away.
	silentFor = 3 * time.Second
	// dialAfter is the pause before an absent peer is tried again: at first, and at most.
	dialAfter = 100 * time.Millisecond
	dialMost  = 2 * time.Second
	// askedFor is how long a server that was given requests takes no more, unless one of them comes
	// before: its slot is not free, although nothing runs in it yet.
	askedFor = time.Second
	// askAgain is how often an idle server's owner asks for waiting requests although nothing has
	// changed.
	askAgain = 500 * time.Millisecond
	// awayFor is how long it is remembered which servers an absent peer has.
	awayFor = 10 * time.Minute
)

// Fleet is one proxy's view of all proxies. Create it with New, and keep Run running. Its methods
// are safe for concurrent use.
type Fleet struct {
	Config
	ID string // differs for each process

	view     atomic.Pointer[view]
	news     atomic.Pointer[chan struct{}] // closed when the view, or a peer's error, is another one
	draining atomic.Bool
	hungUp   context.Context // ends with hangUp
	hangUp   func()
	outbox   *outbox
	seen     *sightings
	sent     *sentSince
	idle     chan struct{} // holds one if a server may have become idle, or a backlog is known
	arrivals sync.Map      // *Passed that wait in this proxy
	history  *history

	mu    sync.Mutex // guards everything below
	peers map[string]*peer
	// absent are those that went away, by their names: they may come back at another address.
	absent map[string]*peer
	local  []Server
	owned  map[string]bool // by the names of this proxy's servers
	// learned is what owners have reported of their servers, by the servers' names, as long as some
	// proxy has them.
	learned map[string][]byte
	given   map[string]time.Time // when a server of this proxy was last given requests
	orders  map[string]Order     // by the servers' names, as long as some proxy has them
	counts  Counts
	looked  time.Time // when something was last concluded
	// tired means that something was concluded since publish last looked, so that what may wait waits
	// for the next time; stale, that something waits.
	tired, stale bool
	readers      map[string]int // the streams on which this proxy's reports are read, by the readers' IDs
}

// Counts are for metrics and pages.
type Counts struct {
	Away      uint64 `json:"away"`      // how often a peer went away without having said that it stops
	Owners    uint64 `json:"owners"`    // how often this proxy began or ceased to own a server
	Hops      uint64 `json:"hops"`      // how often a request was passed on; of these times …
	Begun     uint64 `json:"begun"`     // … its owner answered it, perhaps not to the end
	Again     uint64 `json:"again"`     // … its owner went away before it began
	Lost      uint64 `json:"lost"`      // … its owner went away after that, and before it answered
	Elsewhere uint64 `json:"elsewhere"` // … another proxy's server took it over
	Given     uint64 `json:"given"`     // requests that this proxy gave to another one's server
	Received  uint64 `json:"received"`  // requests that peers passed on to this proxy
	// Forgotten are received requests that were not sent to a server, since their entry went away.
	Forgotten uint64 `json:"forgotten"`
}

// New returns a fleet of one, until Run finds others.
func New(c Config) *Fleet {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Transport == nil {
		c.Transport = NewTransport(nil, nil)
	}
	if c.Scheme == "" {
		c.Scheme = "http"
	}
	f := &Fleet{
		Config: c, ID: rand.Text()[:12], outbox: newOutbox(), seen: newSightings(),
		sent: newSentSince(), idle: make(chan struct{}, 1), peers: map[string]*peer{},
		absent: map[string]*peer{}, owned: map[string]bool{}, learned: map[string][]byte{},
		given: map[string]time.Time{}, orders: map[string]Order{}, readers: map[string]int{},
		history: newHistory(),
	}
	f.hungUp, f.hangUp = context.WithCancel(context.Background())
	f.view.Store(&view{})
	f.news.Store(new(make(chan struct{})))
	return f
}

// NewTransport returns a transport for requests to peers; dial may be nil.
func NewTransport(
	dial func(ctx context.Context, network, addr string) (net.Conn, error), tls *TLS,
) *http.Transport {
	if dial == nil {
		dial = (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: 10 * time.Second}).DialContext
	}
	watched := func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &watchedConn{Conn: conn, closed: make(chan struct{})}, nil
	}
	t := &http.Transport{
		DialContext: watched, DisableCompression: true, MaxIdleConnsPerHost: 1024,
		IdleConnTimeout: 90 * time.Second, TLSHandshakeTimeout: 2 * time.Second,
		MaxResponseHeaderBytes: 1 << 20,
	}
	if tls != nil {
		t.TLSClientConfig = tls.client
	}
	return t
}

// Run finds the peers and talks to them until ctx ends.
func (f *Fleet) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer f.Transport.CloseIdleConnections()
	f.refresh() // what peers say at once is about servers that are known here
	found := make([][]string, len(f.Sources))
	for i, s := range f.Sources {
		wg.Go(func() {
			s.Watch(ctx, func(addrs []string) {
				f.mu.Lock()
				defer f.mu.Unlock()
				found[i] = addrs
				f.meet(ctx, &wg, slices.Concat(found...))
			})
		})
	}
	wg.Go(func() { f.publish(ctx) })
	wg.Go(func() { f.ask(ctx) })
	<-ctx.Done()
}

// meet starts the connections to peers, and ends those to peers that are listed no longer, once they
// are away: what lists them may be wrong for a moment, or leaves out those that are about to stop, and
// both still answer requests. f.mu must be held.
func (f *Fleet) meet(ctx context.Context, wg *sync.WaitGroup, addrs []string) {
	for addr, p := range f.peers {
		if p.listed = slices.Contains(addrs, addr); !p.listed && p.gone == nil {
			f.drop(p)
		}
	}
	for _, addr := range addrs {
		if f.peers[addr] == nil && ctx.Err() == nil {
			p := newPeer(f, addr)
			f.peers[addr] = p
			var own context.Context
			own, p.forget = context.WithCancel(ctx)
			wg.Go(func() { p.run(own) })
		}
	}
	f.look()
}

// drop ends the connections to a peer. f.mu must be held.
func (f *Fleet) drop(p *peer) {
	p.forget()
	delete(f.peers, p.addr)
}

// publish tells the peers what this proxy's servers do, and finds out what changed here.
func (f *Fleet) publish(ctx context.Context) {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for i := 0; ; i++ {
		f.mu.Lock()
		f.tired = false
		f.mu.Unlock()
		f.refresh()
		if i%settleTicks == 0 {
			f.history.look(f.Proxies())
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// refresh reads the state of this proxy's servers, concludes what follows from what has changed,
// and sends it to the peers.
func (f *Fleet) refresh() {
	f.mu.Lock()
	orders := f.ordered() // a report has only those that what it says of the servers follows
	f.mu.Unlock()
	local := f.Local()
	for i := range local {
		local[i].Beside = slices.Contains(f.Own, local[i].Name)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	changed := differ(f.local, local)
	f.local = local
	f.sent.reset(f.ID)
	if changed != nothing || f.stale {
		f.look()
	} else if time.Since(f.looked) >= reportLeast { // absent peers are forgotten at some time
		f.look()
		f.tired = false
	}
	f.outbox.put(f.report(orders))
}

// report returns what peers are told. f.mu must be held.
func (f *Fleet) report(orders []Order) Report {
	r := Report{
		ID: f.ID, Name: f.Name, Draining: f.draining.Load(), Servers: slices.Clone(f.local),
		Orders: orders,
	}
	for i := range r.Servers {
		s := &r.Servers[i]
		s.Owned = f.owned[s.Name]
	}
	return r
}

// Drain tells the peers that this proxy is about to stop: it owns nothing more, as soon as there is
// another owner.
func (f *Fleet) Drain() {
	f.draining.Store(true)
	f.mu.Lock()
	f.stale = true
	f.mu.Unlock()
	f.refresh()
}

// Draining reports whether Drain was called.
func (f *Fleet) Draining() bool { return f.draining.Load() }

// lookSoon draws the conclusions from changed figures of load: at once after a quiet time, and
// otherwise at publish's next look. So that happens ten times a second at most, however many peers
// have something to say. f.mu must be held.
func (f *Fleet) lookSoon() {
	if f.stale = true; !f.tired {
		f.look()
	}
}

// look draws the conclusions from what is known of all proxies. f.mu must be held.
func (f *Fleet) look() {
	f.tired, f.stale, f.looked = true, false, time.Now()
	members := []*member{{
		id: f.ID, name: f.Name, draining: f.draining.Load(), servers: f.local,
	}}
	ids := map[string]bool{f.ID: true}
	for _, addr := range slices.Sorted(maps.Keys(f.peers)) {
		p := f.peers[addr]
		if r := p.report; r != nil && !ids[r.ID] { // a peer may have several addresses
			ids[r.ID] = true
			members = append(members, &member{
				peer: p, id: r.ID, name: r.Name, draining: r.Draining, servers: r.Servers,
			})
			if p.changed {
				p.changed = false
				f.sent.reset(r.ID)
			}
		}
	}
	maps.DeleteFunc(f.absent, func(name string, p *peer) bool {
		back := slices.ContainsFunc(members, func(m *member) bool { return m.name == name })
		return back || p.gone != nil || time.Since(p.since) >= awayFor
	})
	for _, p := range f.absent {
		members = append(members, &member{
			peer: p, id: p.last.ID, name: p.last.Name, away: true, servers: p.last.Servers,
		})
	}
	v := conclude(members)
	for name, o := range f.orders { // before its owner says so
		if p := v.places[name]; p != nil && o.Drain {
			p.Takes, p.Drained = false, true
		}
	}
	maps.DeleteFunc(f.learned, func(server string, _ []byte) bool { return v.places[server] == nil })
	maps.DeleteFunc(f.orders, func(server string, _ Order) bool { return v.places[server] == nil })
	maps.DeleteFunc(f.given, func(server string, _ time.Time) bool { return v.places[server] == nil })
	f.sent.keep(ids)
	f.seen.keep(v.places)
	f.view.Store(v)
	f.wake()
	f.change(v)
}

func (f *Fleet) wake() { close(*f.news.Swap(new(make(chan struct{})))) }

// change tells which of its servers this proxy owns, where that is new. f.mu must be held.
func (f *Fleet) change(v *view) {
	owned := make(map[string]bool, len(f.local))
	for _, s := range f.local {
		on := v.places[s.Name].owner.peer == nil
		owned[s.Name] = on
		before, known := f.owned[s.Name]
		if known && before == on {
			continue
		}
		if known || on {
			f.counts.Owners++
		}
		f.Log.Debug("an upstream has an owner", "upstream", s.Name, "this_proxy", on)
		if l := f.learned[s.Name]; on && l != nil && f.Learned != nil {
			f.Learned(s.Name, l)
		}
		if f.Owned != nil {
			f.Owned(s.Name, on)
		}
	}
	f.owned = owned
}

// News returns a channel that is closed when something about the proxies or their servers is new,
// and once a second at least.
func (f *Fleet) News() <-chan struct{} { return *f.news.Load() }

// Counts returns what has happened so far.
func (f *Fleet) Counts() Counts {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts
}

func (f *Fleet) count(add func(c *Counts)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	add(&f.counts)
}

func (f *Fleet) trace(kind string, n int) {
	if f.Trace != nil {
		f.Trace(kind, n)
	}
}
