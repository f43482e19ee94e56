package proxy

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// backend is an Ollama server with the proxy's records of it.
type backend struct {
	*upstream.Server
	index     uint16
	port      int                              // on which it listens on this machine; 0: elsewhere
	books     atomic.Pointer[savings.Upstream] // how the ledger identifies it
	runners   *runners.Book
	residency *residency
	models    atomic.Pointer[modelKeys]
	foreign   atomic.Bool // another proxy schedules it
	draining  atomic.Bool
	looped    atomic.Bool   // a request of the proxy's own came back to the proxy through it
	inFlight  atomic.Int64  // requests that were sent to it and have not ended
	listing   chan struct{} // holds one while the models are listed to keep an answer
	slow      atomic.Int64  // until when no request waits for the list of models, in ns since 1970
	altered   atomic.Int64  // when a request last changed a model, in ns since 1970; 0: none has
	telling   sync.Mutex    // held while the scheduler learns whether the server is available
	gone      bool          // the scheduler has forgotten it; guarded by telling

	stage   stage         // guarded by changing.mu, like added and goneAt
	added   bool          // by AddUpstream
	goneAt  time.Time     // when it was forgotten
	leaving atomic.Bool   // it is removed, and finishes its requests
	removed chan struct{} // holds one after it was removed
}

func (h *Handler) newBackend(index uint16, s *upstream.Server) *backend {
	b := &backend{
		Server: s, index: index, port: localPort(s), listing: make(chan struct{}, 1),
		removed: make(chan struct{}, 1),
	}
	b.books.Store(&savings.Upstream{Name: s.Name, Index: b.index})
	b.runners = runners.New(s, func(e runners.Event) { h.changed(b, e) })
	b.residency = newResidency(s, b.runners, h.Live().KeepAlive, h.Touched, h.Log)
	b.residency.always = h.NoTouch
	return b
}

// answers reports whether the server is up, as far as is known. A single failed poll does not make
// it absent.
func (b *backend) answers() bool { return !b.State().Away && !b.looped.Load() }

// takes reports whether the server accepts new requests.
func (b *backend) takes() bool { return b.answers() && !b.draining.Load() && !b.leaving.Load() }

// Polled handles the result of polling an upstream.
func (h *Handler) Polled(s *upstream.Server, st upstream.State) {
	for _, b := range h.present() {
		if b.Server != s {
			continue
		}
		if st.Up {
			b.looped.Store(false)
		}
		h.polledBooks(b, st) // before any request is sent: after a restart nothing is cached
		h.available(b)
		h.prewarming.polled(b, st)
	}
	fresh := make(chan struct{})
	close(*h.news.Swap(&fresh))
}

// available informs the scheduler whether a server accepts new requests.
func (h *Handler) available(b *backend) {
	if h.Lanes != nil {
		b.telling.Lock() // serializes updates, so that the scheduler never keeps a stale state
		defer b.telling.Unlock()
		if b.gone {
			return // its index may be another server's
		}
		st := b.State()
		h.Lanes.SetAvailable(b.index, !b.looped.Load() && !b.draining.Load() && !b.leaving.Load())
		h.Lanes.SetAway(b.index, st.Away, st.Until)
	}
}

// drain makes a server finish its requests and get no new ones, or undoes that.
func (h *Handler) drain(b *backend, on bool) {
	if b.draining.Swap(on) != on {
		h.Log.Info("upstream draining", "upstream", b.Name, "draining", on, "in_flight", b.inFlight.Load())
	}
	h.available(b)
}

// named returns the upstream with this name, or nil.
func (h *Handler) named(name string) *backend {
	for _, b := range h.backends() {
		if b.Name == name {
			return b
		}
	}
	return nil
}

// candidates returns the servers that may get a request, without duplicates. A request that names a
// model goes where that model is. A request that changes models goes to the first server, and so
// does one that names no model; if it only reads, it goes to the first server that answers. The
// list is empty if none is left except those in tried, or no server is known yet.
func (h *Handler) candidates(ex *exchange) []*backend { return h.owning(ex, h.able(ex)) }

// able is candidates without regard to which proxy schedules the servers.
func (h *Handler) able(ex *exchange) []*backend {
	if ex.only != nil {
		return h.untried(ex, []*backend{ex.only})
	}
	all := h.backends()
	if len(all) <= 1 {
		return h.untried(ex, all)
	}
	if ex.first {
		return h.untried(ex, all[:1])
	}
	if ex.cloud { // no server need list it; users are signed in at the first
		list := h.listing(ex)
		if len(list) == 0 {
			list = all[:1]
		}
		return h.untried(ex, list)
	}
	if ex.key != "" {
		list, _ := h.having(ex)
		if len(list) == 0 {
			h.refresh()
			var away []*backend
			if list, away = h.having(ex); len(list) == 0 && len(ex.tried) == 0 {
				list = away // any of them may come back
			}
		}
		if len(list) > 0 {
			return list
		}
	}
	// No server has the model, or no model is named: the answer is the same everywhere.
	for _, b := range all {
		if b.takes() && !slices.Contains(ex.tried, b) {
			return []*backend{b}
		}
	}
	if len(ex.tried) > 0 {
		return nil
	}
	return all[:1]
}

// untried returns the servers of a list that have not had the request.
func (h *Handler) untried(ex *exchange, list []*backend) []*backend {
	if len(ex.tried) == 0 {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), func(b *backend) bool { return slices.Contains(ex.tried, b) })
}

// having returns the available servers that have the request's model; and those that have it but
// are not available, to wait for them, or to explain to the client what is wrong with the one that
// it needs.
func (h *Handler) having(ex *exchange) (list, away []*backend) {
	var draining []*backend
	for _, b := range h.backends() {
		st := b.State()
		switch {
		case slices.Contains(ex.tried, b) || !st.Has(ex.key):
		case b.takes():
			list = append(list, b)
		case !st.Lists(ex.key):
		case b.draining.Load():
			draining = append(draining, b)
		default:
			away = append(away, b)
		}
	}
	if len(away) == 0 {
		away = draining
	}
	return list, away
}

// listing returns the available servers that list the request's model by exactly this name.
func (h *Handler) listing(ex *exchange) (list []*backend) {
	for _, b := range h.backends() {
		if b.takes() && slices.ContainsFunc(b.State().Models, func(m string) bool { return strings.EqualFold(m, ex.Model) }) {
			list = append(list, b)
		}
	}
	return list
}

// refreshEvery is the shortest interval between two listings of all servers' models that requests
// for an unknown model cause.
const refreshEvery = time.Second

// refresh lists the models of all reachable servers again. It goes on when its client leaves,
// because other requests wait for it, too.
func (h *Handler) refresh() {
	h.refreshing.Lock() // concurrent callers wait, and share the result
	defer h.refreshing.Unlock()
	if time.Since(h.refreshed) < h.refreshEvery {
		return
	}
	var wg sync.WaitGroup
	for _, b := range h.backends() {
		if !b.State().Away {
			wg.Go(func() { b.Refresh(context.Background()) }) // takes a few seconds at most
		}
	}
	wg.Wait()
	h.refreshed = time.Now()
}

// pick chooses a server for a request that needs no lane: one with its model loaded, then the one
// with the fewest requests.
func pick(list []*backend, model string) *backend {
	better := func(a, b *backend) int {
		_, al := a.loaded(a.State().Loaded, model)
		_, bl := b.loaded(b.State().Loaded, model)
		if al != bl && model != "" {
			if al {
				return -1
			}
			return 1
		}
		return int(a.inFlight.Load() - b.inFlight.Load())
	}
	return slices.MinFunc(list, better)
}

// begin prepares a request for ex.up just before it is sent: it decides on keep_alive and opens the
// ledger's entry.
func (h *Handler) begin(ex *exchange) {
	b := ex.up
	b.inFlight.Add(1)
	ex.began, ex.fixed = true, true
	defer h.recorder.sent(b, ex)
	h.tellSent(ex)
	h.timeline.sent(ex)
	if h.prewarming != nil && ex.infers() && !ex.cloud {
		h.prewarming.asked(ex, []*backend{b})
	}
	ex.silence.wait()
	if !ex.runsHere() {
		return
	}
	switch {
	case ex.reads == readsNative:
		b.Used()
		var hold Hold
		ex.run = b.runners.Begin(time.Now(), b.wanted(ex.key, ex.options()))
		ex.use, ex.KeepAlive, hold = b.residency.beginNative(ex.run, ex.fields.model, ex.embed, ex.options(), ex.fields)
		ex.edits = ex.fit.edits()
		if hold != (Hold{}) {
			ex.edits = append(ex.edits, ex.fields.splice(hold))
			slices.SortStableFunc(ex.edits, func(a, b edit) int { return a.at - b.at })
		}
	case ex.reads == readsForeign:
		b.Used()
		stated := ex.options()
		if stated == nil {
			stated = &prefix.Options{} // only Ollama's own dialect can state options
		}
		ex.run = b.runners.Begin(time.Now(), b.wanted(ex.key, stated))
		if !h.NoTouch {
			ex.use = b.residency.beginForeign(ex.run, ex.fields.model, ex.embed, stated)
		}
	}
	if ex.chain == nil {
		return
	}
	ex.spend, ex.sent = h.Ledger.Begin(time.Now(), *b.books.Load(), ex.chain, ex.run), time.Since(ex.start)
	ex.spend.Attached(ex.context.Attached())
	h.look(ex)
}

// wanted returns the runner that a request needs, for a model by its key and the stated options;
// nil options are unknown. It may ask the server once what the name refers to.
func (b *backend) wanted(key string, stated *prefix.Options) runners.Wanted {
	return b.runners.Wanted(key, b.State().Digests[key], stated)
}

// loaded finds a model, by its key, in a list of loaded models, under whatever name.
func (b *backend) loaded(list []upstream.Loaded, model string) (upstream.Loaded, bool) {
	l, ok := b.runners.ByWeights(list)[b.runners.Weights(model)]
	return l, ok
}

// runsHere reports whether the request names a model that runs on an upstream, and not remotely.
func (ex *exchange) runsHere() bool { return ex.key != "" && !ex.cloud }

// options returns the options that the request loads its model with; nil if they are unknown.
func (ex *exchange) options() *prefix.Options {
	if ex.chain == nil {
		return nil
	}
	return &ex.chain.Runner
}

// retract undoes begin if the server cannot have started on the request.
func (h *Handler) retract(ex *exchange) {
	ex.up.inFlight.Add(-1)
	ex.began = false
	h.timeline.retracted(ex)
	ex.use.end()
	ex.use = use{}
	ex.run.End(time.Now(), runners.Outcome{Refused: true})
	ex.run = nil
	ex.spend.End(time.Now(), savings.Outcome{Refused: true})
	ex.spend = nil
	ex.began = false
	h.release(ex, schedule.Result{}, savings.Answer{}) // it was not sent
	ex.grant, ex.context = nil, nil
}

// unloadElsewhere makes all other servers that may have the model loaded unload it, by their owners,
// but for those of one peer. The channel that it returns is closed when that is done; it is nil if
// there is nothing to do.
func (h *Handler) unloadElsewhere(r *http.Request, ex *exchange, but string) chan struct{} {
	if ex.only != nil || !ex.unloads() {
		return nil
	}
	key, f := ex.key, ex.fields
	f.members, f.long = nil, nil // their memory belongs to a pooled body
	peers := h.unloaders(ex, but)
	all := h.backends()
	if len(all) == 1 && all[0] == ex.up && len(peers) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), loadedTimeout)
	var wg sync.WaitGroup
	for _, b := range all {
		if st := b.State(); b == ex.up || b.foreign.Load() || st.Away || !st.Has(key) {
			continue
		}
		wg.Go(func() {
			run := b.runners.Begin(time.Now(), b.wanted(key, nil))
			u, _, _ := b.residency.beginNative(run, f.model, false, nil, f)
			defer u.end()
			b.Used()
			if err := b.residency.touch(ctx, f.model, 0, false, prefix.Options{}); err != nil {
				h.Log.Warn("a model could not be unloaded", "upstream", b.Name, "model", f.model, "err", err)
				run.End(time.Now(), runners.Outcome{Refused: true})
				return
			}
			u.answer()
			run.End(time.Now(), runners.Outcome{Accepted: true, Unload: true})
		})
	}
	if len(peers) > 0 {
		body, n := ex.whole() // until all have read it
		text, _ := io.ReadAll(body)
		body.Close()
		for _, to := range peers {
			wg.Go(func() { h.unloadAt(ctx, r, ex, to, text[:n]) })
		}
	}
	done := make(chan struct{})
	go func() { // ends after the requests, which have a time limit
		wg.Wait()
		cancel()
		close(done)
	}()
	return done
}

// unloads reports whether the request only asks to unload its model.
func (ex *exchange) unloads() bool {
	return ex.reads == readsNative && !ex.embed && ex.fields.keepAlive == keepAliveSet && ex.fields.duration == 0 && (ex.chain == nil || !ex.chain.HasPrompt())
}
