package proxy

import (
	"context"
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

// backend is an Ollama server, with what the proxy keeps for it.
type backend struct {
	*upstream.Server
	index     uint16
	port      int                              // of this machine, on which it listens; 0: it is elsewhere
	books     atomic.Pointer[savings.Upstream] // what the ledger needs to know of it
	runners   *runners.Book
	residency *residency
	draining  atomic.Bool
	looped    atomic.Bool  // one of the proxy's own requests to it came back to the proxy
	inFlight  atomic.Int64 // requests that were sent to it and have not ended
	telling   sync.Mutex   // held while the scheduler is told whether it takes requests
}

func (h *Handler) newBackend(index int, s *upstream.Server) *backend {
	b := &backend{Server: s, index: uint16(index), port: localPort(s)}
	b.books.Store(&savings.Upstream{Name: s.Name, Index: b.index})
	b.runners = runners.New(s, func(e runners.Event) { h.changed(b, e) })
	b.residency = newResidency(s, b.runners, h.KeepAlive, h.Touched, h.Log)
	b.residency.always = h.NoTouch
	return b
}

// answers reports whether the server is not known to be away. One that is in doubt, since a poll of it failed, is not.
func (b *backend) answers() bool { return !b.State().Away && !b.looped.Load() }

// takes reports whether the server gets new requests.
func (b *backend) takes() bool { return b.answers() && !b.draining.Load() }

// Polled takes in what a poll of an upstream found.
func (h *Handler) Polled(s *upstream.Server, st upstream.State) {
	for _, b := range h.backends {
		if b.Server != s {
			continue
		}
		if st.Up {
			b.looped.Store(false)
		}
		h.polledBooks(b, st) // before anything is sent: after a restart nothing is warm
		h.available(b)
		h.prewarming.polled(b, st)
	}
	fresh := make(chan struct{})
	close(*h.news.Swap(&fresh))
}

// available tells the scheduler whether a server gets new requests.
func (h *Handler) available(b *backend) {
	if h.Lanes != nil {
		b.telling.Lock() // so that the last word is the right one
		defer b.telling.Unlock()
		st := b.State()
		h.Lanes.SetAvailable(b.index, !b.looped.Load() && !b.draining.Load())
		h.Lanes.SetAway(b.index, st.Away, st.Until)
	}
}

// drain has a server finish what it has and get nothing new, or get new requests again.
func (h *Handler) drain(b *backend, on bool) {
	if b.draining.Swap(on) != on {
		h.Log.Info("upstream draining", "upstream", b.Name, "draining", on, "in_flight", b.inFlight.Load())
	}
	h.available(b)
}

// named returns the upstream with this name; nil if there is none.
func (h *Handler) named(name string) *backend {
	for _, b := range h.backends {
		if b.Name == name {
			return b
		}
	}
	return nil
}

// candidates returns the servers to which a request may be sent, none of them twice. What names a model goes where that
// is. What changes models or names none goes to the first one, if that only asks, to the first that answers. An empty list: none is
// left but those in tried.
func (h *Handler) candidates(ex *exchange) []*backend {
	if ex.only != nil {
		return h.untried(ex, []*backend{ex.only})
	}
	if len(h.backends) == 1 {
		return h.untried(ex, h.backends)
	}
	if ex.first {
		return h.untried(ex, h.backends[:1])
	}
	if ex.cloud { // it need not be listed anywhere; the first one is where people sign in
		list := h.listing(ex)
		if len(list) == 0 {
			list = h.backends[:1]
		}
		return h.untried(ex, list)
	}
	if ex.key != "" {
		list, _ := h.having(ex)
		if len(list) == 0 {
			h.refresh()
			var away []*backend
			if list, away = h.having(ex); len(list) == 0 && len(ex.tried) == 0 {
				list = away // any of which may come back
			}
		}
		if len(list) > 0 {
			return list
		}
	}
	// None has it, or none is asked for: the answer is the same everywhere.
	for _, b := range h.backends {
		if b.takes() && !slices.Contains(ex.tried, b) {
			return []*backend{b}
		}
	}
	if len(ex.tried) > 0 {
		return nil
	}
	return h.backends[:1]
}

// untried returns those of a list to which the request was not sent.
func (h *Handler) untried(ex *exchange, list []*backend) []*backend {
	if len(ex.tried) == 0 {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), func(b *backend) bool { return slices.Contains(ex.tried, b) })
}

// having returns the servers that have the request's model and get new requests; and those that are known to have it but get none,
// to be waited for, or so that the client can be told what is wrong with the one that it needs.
func (h *Handler) having(ex *exchange) (list, away []*backend) {
	var draining []*backend
	for _, b := range h.backends {
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

// listing returns the servers that get new requests and list the request's model by just this name.
func (h *Handler) listing(ex *exchange) (list []*backend) {
	for _, b := range h.backends {
		if b.takes() && slices.ContainsFunc(b.State().Models, func(m string) bool { return strings.EqualFold(m, ex.Model) }) {
			list = append(list, b)
		}
	}
	return list
}

// refreshEvery is how often the models of all servers are listed anew for the sake of requests for one that none has.
const refreshEvery = time.Second

// refresh has the models of all servers that answer listed anew. A client that leaves does not end it: others wait for it, too.
func (h *Handler) refresh() {
	h.refreshing.Lock() // those who come meanwhile wait for what is found
	defer h.refreshing.Unlock()
	if time.Since(h.refreshed) < h.refreshEvery {
		return
	}
	var wg sync.WaitGroup
	for _, b := range h.backends {
		if !b.State().Away {
			wg.Go(func() { b.Refresh(context.Background()) }) // which takes a few seconds at most
		}
	}
	wg.Wait()
	h.refreshed = time.Now()
}

// pick chooses a server for a request that needs no lane: one that has its model loaded, then the one with the least to do.
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

// begin says that the request goes to ex.up now: what it means for keep_alive is decided, and the ledger is told.
func (h *Handler) begin(ex *exchange) {
	b := ex.up
	b.inFlight.Add(1)
	ex.began = true
	defer h.recorder.sent(b, ex)
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
			stated = &prefix.Options{} // no dialect but Ollama's own can state any
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

// wanted returns what a request needs loaded that names a model, by its key, and states these options;
// nil: they are not known. A server may be asked once what the name stands for.
func (b *backend) wanted(key string, stated *prefix.Options) runners.Wanted {
	return b.runners.Wanted(key, b.State().Digests[key], stated)
}

// loaded returns the model (its key) as it is in a list of what is loaded, under whatever name.
func (b *backend) loaded(list []upstream.Loaded, model string) (upstream.Loaded, bool) {
	l, ok := b.runners.ByWeights(list)[b.runners.Weights(model)]
	return l, ok
}

// runsHere reports whether the request names a model that no remote service runs.
func (ex *exchange) runsHere() bool { return ex.key != "" && !ex.cloud }

// options returns the options with which the request has its model loaded; nil: not known.
func (ex *exchange) options() *prefix.Options {
	if ex.chain == nil {
		return nil
	}
	return &ex.chain.Runner
}

// retract undoes begin: the server cannot have begun with the request.
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
	h.release(ex, schedule.Result{}, savings.Answer{}) // not sent
	ex.grant, ex.context = nil, nil
}

// unloadElsewhere has the model unloaded by all other servers that may hold it, and returns a channel that is closed when that
// is done; nil if there is nothing to do.
func (h *Handler) unloadElsewhere(ctx context.Context, ex *exchange) chan struct{} {
	if len(h.backends) == 1 || ex.only != nil || !ex.unloads() {
		return nil
	}
	key, f := ex.key, ex.fields
	f.members, f.long = nil, nil // of a body that is pooled
	ctx, cancel := context.WithTimeout(ctx, loadedTimeout)
	var wg sync.WaitGroup
	for _, b := range h.backends {
		if st := b.State(); b == ex.up || st.Away || !st.Has(key) {
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
	done := make(chan struct{})
	go func() { // ends with the requests, which have a time limit
		wg.Wait()
		cancel()
		close(done)
	}()
	return done
}

// unloads reports whether the request does nothing but ask to unload its model.
func (ex *exchange) unloads() bool {
	return ex.reads == readsNative && !ex.embed && ex.fields.keepAlive == keepAliveSet && ex.fields.duration == 0 && (ex.chain == nil || !ex.chain.HasPrompt())
}
