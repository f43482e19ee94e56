package proxy

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// What became of a request that was sent to make its prompt warm.
const (
	PrewarmEvaluated = "evaluated" // the prompt, or a part of it
	PrewarmAttached  = "attached"  // a stored context was, and little was evaluated
	PrewarmWarm      = "warm"      // it was already: next to nothing was evaluated
	PrewarmGivenUp   = "given_up"  // since somebody asked
	PrewarmRefused   = "refused"   // it is wrong, or its model is not there
	PrewarmFailed    = "failed"    // the upstream did not answer as it should
)

const (
	// prewarmRest is for how long nobody must have asked before anything is made warm. It doubles
	// each time that somebody came meanwhile, up to prewarmRestMost: the engine ends a batch before
	// it notices, and who asks every other second is not to pay for that each time.
	prewarmRest     = time.Second
	prewarmRestMost = time.Minute
	// prewarmClient is whose these requests are to the scheduler.
	prewarmClient = "(prewarm)"
)

// prewarmer makes prompts warm before anybody asks: one at a time, while nobody asks for anything
// of the servers that it needs, at first and whenever their model has been loaded anew or its
// server started anew. A model that was unloaded meanwhile is not loaded for it. The nil
// *prewarmer does nothing.
type prewarmer struct {
	h    *Handler
	wake chan struct{} // holds one

	mu      sync.Mutex       // guards all below
	items   []*warmItem      // in the order of the file
	asking  map[*backend]int // requests of clients that may go to a server, or were sent to it
	rests   time.Duration    // for how long nobody must have asked
	ended   time.Time        // when the last of them ended, or something failed here; zero: none did
	running *warming         // nil: none is
	fills   []fill           // engines whose empty slots are to be given stored contexts
	seen    []*backend       // servers of which it was seen what they had loaded at first
}

// warmItem is a request whose prompt is to be warm. Guarded by prewarmer.mu.
type warmItem struct {
	prewarmRequest
	due   bool     // it is to be sent
	loads bool     // … even if its model is not loaded
	on    *backend // where it was sent last, or its model was unloaded; nil: nowhere yet
	lost  int      // how often what is warm there was lost
	told  bool     // that its model is not there has been logged
}

// fill is a model that was loaded.
type fill struct {
	on      *backend
	weights string // "": those of model
	model   string // upstream.ModelKey
}

// warming is such a request under way.
type warming struct {
	item    *warmItem
	to      []*backend
	cancel  context.CancelFunc
	loading context.Context // in which its model is loaded
	giveUp  context.CancelFunc
	needs   *runners.Wanted // while its model is being loaded
	lost    int             // warmItem.lost when it was sent, or its model had been loaded for it
	result  string
}

type warmingKey struct{}

// newPrewarmer returns what makes the handler's prompts warm; nil if there is nothing to do.
func newPrewarmer(h *Handler) *prewarmer {
	if h.Prewarm == nil && h.Contexts == nil {
		return nil
	}
	p := &prewarmer{
		h: h, wake: make(chan struct{}, 1), asking: map[*backend]int{}, rests: prewarmRest,
	}
	if h.Prewarm != nil {
		nudge := p.nudge
		h.Prewarm.replaced.Store(&nudge)
	}
	return p
}

// nudge has run look again.
func (p *prewarmer) nudge() {
	if p == nil {
		return
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run makes prompts warm until ctx ends.
func (p *prewarmer) run(ctx context.Context) {
	if p == nil {
		return
	}
	for ctx.Err() == nil {
		do, wait := p.next()
		if do != nil {
			do(ctx)
			continue
		}
		var due <-chan time.Time
		if wait > 0 {
			due = time.After(wait)
		}
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-due:
		}
	}
}

// next returns what is to be done now; nil: nothing, before so much time has passed, or something
// happens (0).
func (p *prewarmer) next() (do func(context.Context), wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.take(p.h.Prewarm.list())
	if left := p.rests - time.Since(p.ended); left > 0 {
		return nil, left
	}
	for _, i := range p.items {
		if !i.due {
			continue
		}
		if to := p.targets(i); len(to) > 0 && p.idle(to) {
			loads := i.loads
			return func(ctx context.Context) { p.warm(ctx, i, to, loads) }, 0
		}
	}
	for n, f := range p.fills {
		if p.idle([]*backend{f.on}) {
			p.fills = slices.Delete(p.fills, n, n+1)
			return func(ctx context.Context) { p.fill(ctx, f) }, 0
		}
	}
	return nil, 0
}

// take takes in what the file has now. Requests that it had before are as warm as they were. p.mu
// must be held.
func (p *prewarmer) take(list []prewarmRequest) {
	if len(list) == len(p.items) && (len(list) == 0 || list[0].chain == p.items[0].chain) {
		return
	}
	before := p.items
	p.items = make([]*warmItem, 0, len(list))
	for _, r := range list {
		if at := slices.IndexFunc(before, func(i *warmItem) bool { return i.same(r) }); at >= 0 {
			before[at].chain = r.chain
			p.items = append(p.items, before[at])
			continue
		}
		p.items = append(p.items, &warmItem{prewarmRequest: r, due: true, loads: true})
	}
}

// targets returns the servers to one of which a request is to be sent. p.mu must be held.
func (p *prewarmer) targets(i *warmItem) (to []*backend) {
	absent := 0
	for _, b := range p.h.backends {
		st := b.State()
		switch {
		case st.Polled.IsZero() || !b.takes():
		case !st.Has(i.key):
			absent++
		case i.loads || b == i.on:
			to = append(to, b)
		}
	}
	if absent == len(p.h.backends) && !i.told {
		i.told = true
		p.h.Log.Warn("a prompt cannot be made warm before its model is there",
			"model", upstream.DisplayName(i.key))
	}
	return to
}

// idle reports whether nobody asks for anything of the servers, and nothing waits. p.mu must be
// held.
func (p *prewarmer) idle(list []*backend) bool {
	return p.h.waiting.Load() == 0 &&
		!slices.ContainsFunc(list, func(b *backend) bool { return p.asking[b] > 0 })
}

// asked says that a client's request may go to these servers from now on, and to no others; none:
// it has ended. What is made warm there meanwhile is given up.
func (p *prewarmer) asked(ex *exchange, list []*backend) {
	if p == nil || ex.warming != nil || slices.Equal(ex.asks, list) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range ex.asks {
		if p.asking[b]--; p.asking[b] == 0 {
			p.ended = time.Now()
			p.nudge()
		}
	}
	ex.asks = slices.Clone(list)
	for _, b := range ex.asks {
		p.asking[b]++
		if w := p.running; w != nil && slices.Contains(w.to, b) {
			w.abandon(b, ex)
		}
	}
}

// abandon gives a request up since a client asks. Where its model is being loaded as the client
// needs it, that goes on: it would have to be loaded anew. prewarmer.mu must be held.
func (w *warming) abandon(b *backend, ex *exchange) {
	w.cancel()
	if w.needs != nil && ex.key != "" && b.runners.Weights(ex.key) == w.needs.Options.Model {
		if o := ex.options(); o == nil || b.wanted(ex.key, o).Options == w.needs.Options {
			return
		}
	}
	w.giveUp()
}

// warm sends a request, if its model is loaded or may be.
func (p *prewarmer) warm(ctx context.Context, i *warmItem, to []*backend, loads bool) {
	if !loads && !p.loaded(ctx, i) {
		p.mu.Lock()
		defer p.mu.Unlock()
		i.due = false
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	loading, giveUp := context.WithCancel(ctx)
	defer giveUp()
	w := &warming{item: i, to: to, loading: loading, giveUp: giveUp}
	asking, cancelAsking := context.WithCancel(context.WithValue(ctx, warmingKey{}, w))
	defer cancelAsking()
	w.cancel = cancelAsking

	p.mu.Lock()
	if !p.idle(to) {
		p.mu.Unlock()
		return // somebody came; when that has ended it is looked at again
	}
	p.running, w.lost = w, i.lost
	p.mu.Unlock()
	p.send(asking, w)

	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = nil
	switch w.result {
	case PrewarmEvaluated, PrewarmAttached, PrewarmWarm:
		if i.lost == w.lost { // else what was lost meanwhile says what is to be done
			i.due, i.loads = false, false
		}
		p.rests = prewarmRest
	case PrewarmRefused:
		i.due = false // until its model is loaded again
	default:
		p.ended = time.Now()
		p.rests = min(2*p.rests, prewarmRestMost)
	}
}

// loaded reports whether the model is loaded as the request needs it, where it was sent last: the
// server is asked, since others use it, too.
func (p *prewarmer) loaded(ctx context.Context, i *warmItem) bool {
	if !i.on.runners.Loaded(i.on.wanted(i.key, &i.chain.Runner)) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	list, err := i.on.Server.Loaded(ctx)
	if err != nil {
		return false
	}
	_, ok := i.on.loaded(list, i.key)
	return ok
}

// send has the handler serve a request as if a client had sent it.
func (p *prewarmer) send(ctx context.Context, w *warming) {
	i := w.item
	r := (&http.Request{
		Method: http.MethodPost, URL: &url.URL{Path: i.path}, Host: "localhost",
		RemoteAddr: prewarmClient, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{
			"Content-Type": {"application/json"}, headerPriority: {schedule.Batch.String()},
		},
		Body: io.NopCloser(strings.NewReader(i.body)), ContentLength: int64(len(i.body)),
	}).WithContext(ctx)
	if len(w.to) == 1 && len(p.h.backends) > 1 {
		r.Header.Set(headerUpstream, w.to[0].Name)
	}
	defer func() {
		if v := recover(); v != nil && v != http.ErrAbortHandler { // which net/http would have caught
			panic(v)
		}
	}()
	p.h.ServeHTTP(discard{}, r)
}

// discard is a client that reads nothing.
type discard http.Header

func (d discard) Header() http.Header         { return http.Header(d) }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}
func (d discard) Flush()                      {}

// loadFirst has the model loaded for a request that is to make its prompt warm, before that is
// sent: if somebody asks meanwhile who needs the same, the load goes on.
func (h *Handler) loadFirst(r *http.Request, ex *exchange) *refusal {
	w := ex.warming
	if w == nil {
		return nil
	}
	p := h.prewarming
	p.mu.Lock()
	w.item.on = ex.up
	p.mu.Unlock()
	if ex.options() == nil {
		return nil
	}
	if wanted := ex.up.wanted(ex.key, ex.options()); !ex.up.runners.Loaded(wanted) {
		p.mu.Lock()
		w.needs = &wanted
		p.mu.Unlock()
		ex.up.Used()
		if ex.up.port != 0 {
			h.Contexts.Leave(r.Context(), ex.up.port) // others may have to make room
		}
		took, err := ex.load(w.loading, wanted)
		ex.loadedFirst = took
		p.mu.Lock()
		w.needs, w.lost = nil, w.item.lost
		p.mu.Unlock()
		if status := upstream.StatusCode(err); err != nil && r.Context().Err() == nil {
			if status == 0 {
				status = http.StatusBadGateway
			}
			return &refusal{status, "the model could not be loaded: " + err.Error()}
		}
	}
	if err := r.Context().Err(); err != nil {
		return givenUp(err)
	}
	return nil
}

// warmed says what became of a request that was to make its prompt warm.
func (h *Handler) warmed(r *http.Request, ex *exchange) {
	w := ex.warming
	if w == nil {
		return
	}
	reused := false // nine tenths at least
	if e := ex.Savings; e != nil && e.Tokens != nil {
		reused = 10*e.Tokens.Evaluated <= e.Total
	}
	switch {
	case ex.Outcome == OK && ex.context.Attached() > 0:
		w.result = PrewarmAttached
	case ex.Outcome == OK && reused:
		w.result = PrewarmWarm
	case ex.Outcome == OK:
		w.result = PrewarmEvaluated
	case r.Context().Err() != nil:
		w.result = PrewarmGivenUp
	case ex.Status >= 400 && ex.Status < 500:
		w.result = PrewarmRefused
	default:
		w.result = PrewarmFailed
	}
	ex.Prewarm = w.result
}

// fill gives the empty slots of a model that was loaded the stored contexts that are used most.
func (p *prewarmer) fill(ctx context.Context, f fill) {
	on := []*backend{f.on}
	if f.weights == "" {
		f.weights = f.on.wanted(f.model, nil).Options.Model
	}
	p.h.Contexts.Fill(ctx, f.on.port, f.weights, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.idle(on)
	})
}

// changed takes in what has changed of what a server holds.
func (p *prewarmer) changed(b *backend, e runners.Event) {
	if p == nil || e.Kind == runners.Idle {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range p.items {
		if e.Kind == runners.Restarted || b.runners.Weights(i.key) == e.Weights {
			i.changed(b, e.Kind)
		}
	}
	if e.Kind == runners.Loaded || e.Kind == runners.Replaced {
		p.fillLater(fill{on: b, weights: e.Weights})
	}
	p.nudge()
}

// polled takes in what a poll of a server found.
func (p *prewarmer) polled(b *backend, st upstream.State) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if st.LoadedKnown && !slices.Contains(p.seen, b) {
		p.seen = append(p.seen, b)
		for _, l := range st.Loaded {
			p.fillLater(fill{on: b, model: upstream.ModelKey(l.Name)})
		}
	}
	p.nudge()
}

// fillLater has the empty slots of a model filled when nobody asks. p.mu must be held.
func (p *prewarmer) fillLater(f fill) {
	if p.h.Contexts != nil && f.on.port != 0 && !slices.Contains(p.fills, f) {
		p.fills = append(p.fills, f)
	}
}

// changed takes in what has changed of the request's model on a server. prewarmer.mu must be held.
func (i *warmItem) changed(b *backend, kind runners.Kind) {
	if i.on == nil && kind == runners.Unloaded {
		i.on = b // it was to be loaded here; others have had it loaded, and it was unloaded since
	}
	if i.on != b {
		return
	}
	i.lost++
	i.due = kind != runners.Unloaded
	i.loads = kind == runners.Restarted || i.due && i.loads
}
