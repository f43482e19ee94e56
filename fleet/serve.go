package fleet

import (
	"bytes"
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

const (
	pathReport = "/peer/report"
	pathTake   = "/peer/take"

	takeMost = 64 << 10 // bytes of a schedule.Taker
	// goAhead is how long the owner waits until the entry tells it to go ahead: a round trip.
	goAhead = 5 * time.Second
	// takeFor is how long a peer is waited for that was asked for work. Others may have some, too.
	takeFor = 250 * time.Millisecond
)

// Passed is a request that one proxy, its entry, has passed on to this one.
type Passed struct {
	About

	fleet  *Fleet
	entry  string // its ID
	ended  chan struct{}
	cancel context.CancelCauseFunc
	done   <-chan struct{} // closed when it was given up, or answered
	body   *passedBody
	once   sync.Once

	mu sync.Mutex
	w  http.ResponseWriter // guarded by mu; nil when the request is over
	// declined is guarded by mu.
	declined bool
}

type passedKey struct{}

// PassedOf returns the request that a peer has passed on, or nil if ctx is of another request.
func PassedOf(ctx context.Context) *Passed {
	p, _ := ctx.Value(passedKey{}).(*Passed)
	return p
}

// Claims reports whether a request has a header that only peers may set.
func Claims(h http.Header) bool {
	for name := range h {
		if ofPeers(name) {
			return true
		}
	}
	return false
}

// ofPeers reports whether only peers may set a header. The names are canonical, and may be those that
// only later versions know.
func ofPeers(name string) bool { return strings.HasPrefix(name, HeaderPeer) }

// Handler serves the peers. Requests that they pass on go to next, which finds them with PassedOf.
func (f *Fleet) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !f.admits(r):
			http.Error(w, notPeer, http.StatusForbidden)
		case r.Header[headerLength] != nil: // a client's, whatever its path
			f.servePassed(w, r, next)
		case r.URL.Path == pathReport:
			f.serveReports(w, r)
		case r.URL.Path == pathTake && r.Method == http.MethodPost:
			f.serveTake(w, r)
		default:
			http.Error(w, "this is no request that a proxy of a fleet sends to another",
				http.StatusNotFound)
		}
	})
}

// notPeer is what those are told who show neither the secret nor a certificate.
const notPeer = "this is for the proxies of a fleet, which show their secret or a certificate"

// admits reports whether a request is from a peer. Where there is no secret, the listener asks for a
// certificate.
func (f *Fleet) admits(r *http.Request) bool {
	if r.Header.Get(HeaderPeer) == "" {
		return false
	}
	if len(f.Secret) == 0 {
		return r.TLS != nil && len(r.TLS.VerifiedChains) > 0
	}
	return subtle.ConstantTimeCompare([]byte(r.Header.Get(headerSecret)), f.Secret) == 1
}

// serveReports sends reports until the peer leaves.
func (f *Fleet) serveReports(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	if f.Version != "" {
		w.Header().Set(headerVersion, f.Version)
	}
	reader := r.Header.Get(HeaderPeer)
	f.reads(reader, 1)
	defer f.reads(reader, -1)
	out := http.NewResponseController(w)
	var at stream
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(f.hungUp, cancel)()
	for {
		line, err := f.outbox.next(ctx, &at)
		if err != nil {
			return
		}
		// A peer that reads nothing holds up only this goroutine, but not for ever.
		out.SetWriteDeadline(time.Now().Add(silentFor))
		if _, err := w.Write(line); err != nil {
			return
		}
		if err := out.Flush(); err != nil {
			return
		}
	}
}

// HangUp ends the reports to peers, which take this proxy for away.
func (f *Fleet) HangUp() { f.hangUp() }

// serveTake gives a peer waiting requests. As with Pass, the end of the body is held back until this
// proxy is about to give them: a peer that has asked another one meanwhile never ends it.
func (f *Fleet) serveTake(w http.ResponseWriter, r *http.Request) {
	out := http.NewResponseController(w)
	if err := out.EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusHTTPVersionNotSupported)
		return
	}
	var t schedule.Taker
	if err := json.NewDecoder(io.LimitReader(r.Body, takeMost)).Decode(&t); err != nil {
		http.Error(w, "this is no request for work: "+err.Error(), http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusProcessing)
	out.SetReadDeadline(time.Now().Add(goAhead))
	if n, err := r.Body.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		panic(http.ErrAbortHandler) // the peer does not wait any more
	}
	out.SetReadDeadline(time.Time{})
	n := 0
	if f.Give != nil {
		n = f.Give(t)
	}
	f.count(func(c *Counts) { c.Given += uint64(n) })
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(given{n}) // an error means that the peer is gone
}

// servePassed serves a request that a peer has passed on.
func (f *Fleet) servePassed(w http.ResponseWriter, r *http.Request, next http.Handler) {
	p, length, err := parsePassed(r.Header)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.count(func(c *Counts) { c.Received++ })
	if p.Moves > 0 {
		f.expect(p.Server, false)
	}
	out := http.NewResponseController(w)
	// Otherwise net/http would read the whole body before it writes the answer's header.
	if err := out.EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusHTTPVersionNotSupported)
		return
	}
	ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), passedKey{}, p))
	defer cancel(nil)
	p.fleet, p.cancel, p.done, p.ended, p.w = f, cancel, ctx.Done(), make(chan struct{}), w
	body := &passedBody{rest: r.Body, left: length, passed: p, watched: make(chan struct{})}
	p.body = body
	inner := r.WithContext(ctx)
	inner.Header = r.Header.Clone()
	maps.DeleteFunc(inner.Header, func(name string, _ []string) bool { return ofPeers(name) })
	inner.Body, inner.ContentLength, inner.TransferEncoding = body, length, nil
	if length == 0 {
		inner.Body = http.NoBody
		body.watch()
	}
	f.arrivals.Store(p, p.entry)
	// What reads the body ends when its connection is not read any more.
	giveUp := func() { out.SetReadDeadline(time.Now()) }
	stop := context.AfterFunc(ctx, giveUp)
	broken := true // by a panic: nothing, or not all, was answered
	defer func() {
		f.arrivals.Delete(p)
		p.mu.Lock()
		p.w = nil
		p.mu.Unlock()
		if broken { // flushed, nothing would look like an answer
			giveUp()
			if body.watches.Load() {
				<-body.watched
			}
			return
		}
		out.Flush() // the entry ends the body when it has the answer's header
		late := false
		if body.watches.Load() {
			select {
			case <-body.watched:
			case <-time.After(goAhead):
				late = true
				giveUp()
				<-body.watched
			}
		}
		if !stop() || late {
			panic(http.ErrAbortHandler) // what is left of the body would be read as the next request
		}
	}()
	next.ServeHTTP(w, inner)
	broken = false
}

// parsePassed reads the headers of a request that a peer has passed on.
func parsePassed(h http.Header) (*Passed, int64, error) {
	p := &Passed{About: About{Server: h.Get(headerServer)}, entry: h.Get(HeaderPeer)}
	client, err1 := base64.StdEncoding.DecodeString(h.Get(headerClient))
	key, err2 := base64.StdEncoding.DecodeString(h.Get(headerKey))
	age, err3 := strconv.ParseUint(h.Get(headerAge), 10, 32)
	length, err4 := strconv.ParseUint(h.Get(headerLength), 10, 62)
	var err5 error
	if moves := h.Get(headerMoves); moves != "" {
		var n uint64
		n, err5 = strconv.ParseUint(moves, 10, 16)
		p.Moves = int(n)
	}
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return nil, 0, fmt.Errorf("the headers of a peer are not valid: %s",
			strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	p.Client, p.Key, p.Age = string(client), string(key), time.Duration(age)*time.Millisecond
	return p, int64(length), nil
}

// passedBody is the body of a passed request without its end.
type passedBody struct {
	rest    io.ReadCloser
	left    int64
	passed  *Passed
	streams atomic.Bool   // Begin was called before all of it was read
	watches atomic.Bool   // all of it was read
	watched chan struct{} // closed when the end was read
}

func (b *passedBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.rest.Read(p[:min(int64(len(p)), b.left)])
	if b.left -= int64(n); b.left == 0 {
		if !b.streams.Load() {
			b.watch()
			return n, nil
		}
		b.watches.Store(true)
		if b.readEnd(); b.passed.begun() {
			return n, nil
		}
		return 0, ErrForgotten
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// watch reads the body's end, or finds that the entry has given the request up.
func (b *passedBody) watch() {
	b.watches.Store(true)
	go b.readEnd() // ends with the connection, or the body
}

func (b *passedBody) readEnd() {
	defer close(b.watched)
	n, err := b.rest.Read(make([]byte, 1))
	if n == 0 && err == io.EOF {
		close(b.passed.ended)
		return
	}
	b.passed.cancel(ErrForgotten)
}

// begun reports whether the entry has said that the request may be sent.
func (p *Passed) begun() bool {
	select {
	case <-p.ended:
		p.mu.Lock()
		defer p.mu.Unlock()
		return !p.declined
	default:
		return false
	}
}

func (b *passedBody) Close() error { return nil } // net/http closes the rest

// Begin asks the entry whether the request may be sent to a server. The first call waits for that;
// later ones repeat its result. A nil Passed may always be sent. If the body is still arriving, its
// last bytes are held back until the entry has answered.
func (p *Passed) Begin(ctx context.Context) error {
	if p == nil {
		return nil
	}
	p.once.Do(func() {
		if !p.body.watches.Load() {
			p.body.streams.Store(true)
		}
		if p.announce(); p.body.streams.Load() {
			return
		}
		select {
		case <-p.ended:
		case <-ctx.Done():
		case <-p.done: // ctx may be of a computation that goes on for others
		case <-time.After(goAhead):
			p.cancel(ErrForgotten)
		}
	})
	if p.begun() {
		p.fleet.arrivals.Delete(p) // its entry no longer decides over it
		return nil
	}
	if p.body.streams.Load() && ctx.Err() == nil {
		return nil // reading the last bytes tells
	}
	p.fleet.count(func(c *Counts) { c.Forgotten++ })
	return ErrForgotten
}

// announce tells the entry that the request is about to be sent. What computes an answer may outlive
// the request that began it, whose writer is then no longer its own.
func (p *Passed) announce() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w != nil && !p.declined {
		p.w.WriteHeader(http.StatusProcessing)
	}
}

// forgets ends the requests of an entry that has gone away, as far as they have not begun: it may
// send them to others.
func (f *Fleet) forgets(entry string) {
	f.arrivals.Range(func(key, value any) bool {
		if p := key.(*Passed); value == entry {
			p.cancel(ErrForgotten)
		}
		return true
	})
}

// Decline answers a request that this proxy does not serve: another server takes it over, or the
// entry chooses again. The entry ends the body then, as after any answer; so what is still computing
// for others is told that it may not send the request. After Begin it is too late to decline.
func (p *Passed) Decline(w http.ResponseWriter, e schedule.Elsewhere) {
	p.mu.Lock()
	p.declined = true
	p.mu.Unlock()
	w.Header().Set(headerElsewhere, e.Server)
	w.Header().Set(headerMoves, strconv.Itoa(e.Moves))
	w.WriteHeader(http.StatusMisdirectedRequest)
	http.NewResponseController(w).Flush()
}

// Idle is called when a server of this proxy may be able to begin with something: it is asked for at
// once, since a pause after each request would be a part of each request.
func (f *Fleet) Idle() {
	select {
	case f.idle <- struct{}{}:
	default:
	}
}

// ask asks peers for waiting requests while a server of this proxy is idle.
func (f *Fleet) ask(ctx context.Context) {
	if f.Taker == nil {
		return
	}
	tick := time.NewTicker(askAgain)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.idle:
		case <-tick.C:
		}
		f.askOnce(ctx)
	}
}

// askOnce asks the peers with the longest backlogs for what this proxy's servers could begin with.
func (f *Fleet) askOnce(ctx context.Context) {
	if f.draining.Load() {
		return // it would never end
	}
	for _, b := range f.backlogs() {
		if f.muted(b.peer) { // since another of its backlogs was asked for
			continue
		}
		v := f.view.Load()
		for _, name := range v.names {
			if v.places[name].owner.peer != nil || !v.places[name].Takes || f.expects(name) {
				continue
			}
			t, ok := f.Taker(name, b.Options)
			if !ok {
				continue
			}
			// It is noted before the answer comes, since the first of the requests may come before that.
			f.expect(name, true)
			n, err := f.take(ctx, b.addr, t)
			if n == 0 && !errors.Is(err, ErrLost) {
				f.expect(name, false)
			}
			if err != nil {
				f.Log.Debug("a peer gives no work", "address", b.addr, "err", err)
				f.mute(b.peer)
				break
			}
			if n == 0 {
				f.inVain(b)
			}
		}
	}
}

// mute notes that a peer did not answer. It is not asked again before it is heard of.
func (f *Fleet) mute(p *peer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p.mute = true
}

func (f *Fleet) muted(p *peer) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return p.mute
}

// expects reports whether a server was given requests that have not come yet.
func (f *Fleet) expects(server string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, ok := f.given[server]
	return ok && time.Since(at) < askedFor
}

// expect notes that a server was given requests, or that one of them has come.
func (f *Fleet) expect(server string, on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if delete(f.given, server); on {
		f.given[server] = time.Now()
	}
}

// offered is a backlog of a peer.
type offered struct {
	Backlog
	peer *peer
	addr string
}

// backlogs returns what peers' servers have more of than they can begin with, the longest first.
func (f *Fleet) backlogs() (all []offered) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.peers {
		if p.report == nil || p.mute {
			continue
		}
		for _, s := range p.report.Servers {
			for _, b := range s.Backlogs {
				if at, ok := p.vain[b.Options]; ok && time.Since(at) < reportEvery {
					continue
				}
				all = append(all, offered{b, p, p.addr})
			}
		}
	}
	each := func(b offered) float64 { return float64(b.Movable) / float64(max(b.Lanes, 1)) }
	slices.SortStableFunc(all, func(a, b offered) int { return cmp.Compare(each(b), each(a)) })
	return all
}

// inVain notes that nothing of a backlog was given. It is asked for again a while later, since what
// does not repay evaluating a prefix once more at first does when a server has been idle for longer.
func (f *Fleet) inVain(b offered) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b.peer.vain == nil {
		b.peer.vain = map[prefix.Options]time.Time{}
	}
	maps.DeleteFunc(b.peer.vain, func(_ prefix.Options, at time.Time) bool { return time.Since(at) >= reportEvery })
	b.peer.vain[b.Options] = time.Now()
}

// take asks a peer for waiting requests, and returns how many it gave. They come as any other request
// that is passed on. An error means that it did not answer, and gives nothing later either, except for
// ErrLost: it may have given some.
func (f *Fleet) take(ctx context.Context, addr string, t schedule.Taker) (int, error) {
	text, err := json.Marshal(t)
	if err != nil {
		panic(err) // of strings and numbers
	}
	ctx, cancel := context.WithTimeout(ctx, takeFor)
	defer cancel()
	body := &hop{data: bytes.NewReader(text), end: make(chan struct{})}
	defer context.AfterFunc(ctx, func() { body.settle(over) })() // net/http waits for the body's end
	f.trace("take", len(text))
	res, err := f.do(body.trace(ctx), addr, http.MethodPost, pathTake, body)
	if err == nil {
		defer res.Body.Close()
		var answer given
		if err = json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(&answer); err == nil {
			return answer.Given, nil
		}
	}
	if body.settle(over); body.state.Load() == begun {
		err = fmt.Errorf("%w: %w", ErrLost, err)
	}
	return 0, err
}

// given is the answer to a request for work.
type given struct {
	Given int `json:"given"`
}

// reads notes that a peer begins to read this proxy's reports, or ends.
func (f *Fleet) reads(id string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readers[id] += n; f.readers[id] == 0 {
		delete(f.readers, id)
	}
}

// Peer is another proxy, for pages and metrics.
type Peer struct {
	Name     string    `json:"name"` // "" if it has never been heard of
	ID       string    `json:"id,omitempty"`
	Address  string    `json:"address"`
	Up       bool      `json:"up"`
	Since    time.Time `json:"since"` // of being up, or away
	Draining bool      `json:"draining,omitempty"`
	Error    string    `json:"error,omitempty"`
	Version  string    `json:"version,omitempty"` // of the program; "": not known
	// Reason is the kind of Error; "" while there is none.
	Reason Reason `json:"reason,omitempty"`
	// Servers are those that it had when it was last heard of.
	Servers []string `json:"-"`
}

// Peers returns the other proxies, by address.
func (f *Fleet) Peers() []Peer {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := []Peer{}
	for _, p := range f.peers {
		if errors.Is(p.err, errSelf) {
			continue
		}
		e := Peer{Address: p.addr, Up: p.gone != nil, Since: p.since}
		if r := cmp.Or(p.report, p.last); r != nil {
			e.Name, e.ID, e.Draining, e.Version = r.Name, r.ID, r.Draining, p.version
			for _, s := range r.Servers {
				e.Servers = append(e.Servers, s.Name)
			}
		}
		if p.err != nil {
			e.Error, e.Reason = p.err.Error(), reasonOf(p.err)
		}
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b Peer) int { return strings.Compare(a.Address, b.Address) })
	return all
}

// Owner is a server and its owner, for pages.
type Owner struct {
	Server  string  `json:"server"`
	Owner   string  `json:"owner"`          // its name
	Here    bool    `json:"here"`           // this proxy
	Away    bool    `json:"away,omitempty"` // the owner is
	Takes   bool    `json:"takes"`
	Wait    float64 `json:"wait_s"` // of a new request
	Running int     `json:"running"`
	Waiting int     `json:"waiting"`
	Models  int     `json:"models"`
}

// Owners returns all servers with their owners, by name.
func (f *Fleet) Owners() []Owner {
	v := f.view.Load()
	all := []Owner{}
	for _, name := range v.names {
		p := v.places[name]
		all = append(all, Owner{
			Server: name, Owner: p.owner.name, Here: p.owner.peer == nil, Away: p.owner.away, Takes: p.Takes,
			Wait: p.Wait, Running: p.Running, Waiting: p.Waiting, Models: len(p.Models),
		})
	}
	return all
}

// Takes reports whether a server of another proxy takes requests.
func (f *Fleet) Takes() bool {
	for _, p := range f.view.Load().places {
		if p.Takes && p.owner.peer != nil {
			return true
		}
	}
	return false
}

// Others returns the peers that own a server which is wanted, each once.
func (f *Fleet) Others(wanted func(Server) bool) (all []Place) {
	v := f.view.Load()
	seen := map[string]bool{}
	for _, name := range v.names {
		if p := v.places[name]; p.owner.peer != nil && !p.owner.away && !seen[p.owner.id] && wanted(p.Server) {
			seen[p.owner.id] = true
			all = append(all, p.place())
		}
	}
	return all
}

// Has reports whether any proxy is known to have a server with the model.
func (f *Fleet) Has(model string) bool {
	v := f.view.Load()
	for _, p := range v.places {
		if p.has(model) {
			return true
		}
	}
	return false
}

// Serves reports whether another proxy's server has a model and takes requests.
func (f *Fleet) Serves(model string) bool {
	for _, p := range f.view.Load().places {
		if p.has(model) && p.Takes && p.owner.peer != nil {
			return true
		}
	}
	return false
}

// Owns reports whether this proxy owns a server.
func (f *Fleet) Owns(server string) bool {
	p := f.view.Load().places[server]
	return p != nil && p.owner.peer == nil
}
