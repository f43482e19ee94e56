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

// The result of a request that was sent to make its prompt warm.
const (
	PrewarmEvaluated = "evaluated" // the prompt, or a part of it, was evaluated
	PrewarmAttached  = "attached"  // a stored context was attached, and little was evaluated
	PrewarmWarm      = "warm"      // the prompt was warm already: next to nothing was evaluated
	PrewarmGivenUp   = "given_up"  // cancelled for a client's request
	PrewarmRefused   = "refused"   // the request is wrong, or its model does not exist
	PrewarmFailed    = "failed"    // the upstream answered with an error, or not at all
)

const (
	// prewarmRest is how long no client must have asked before a prompt is made warm. It doubles
	// each time that a client interrupts, up to prewarmRestMost: the engine finishes a batch before
	// it notices the cancellation, and a client that asks every other second should not pay for
	// that each time.
	prewarmRest     = time.Second
	prewarmRestMost = time.Minute
	// prewarmClient is the client of these requests for the scheduler.
	prewarmClient = "(prewarm)"
)

// prewarmer makes prompts warm before anyone asks. It sends one request at a time, while no client
// uses the servers that it needs: at the start, and whenever the model was loaded again or its
// server was restarted. It does not load a model that was unloaded meanwhile. The nil *prewarmer
// does nothing.
type prewarmer struct {
	h    *Handler
	wake chan struct{} // has room for one

	mu      sync.Mutex       // guards all below
	items   []*warmItem      // in the order of the file
	asking  map[*backend]int // clients' requests that may go to a server, or were sent to it
	rests   time.Duration    // how long no client must have asked
	ended   time.Time        // when the last of them ended, or a request here failed; or zero
	running *warming         // nil: none
	fills   []fill           // engines whose empty slots should get stored contexts
	seen    []*backend       // servers whose models at the start of the proxy have been noted
}

// warmItem is a request whose prompt should be warm. Guarded by prewarmer.mu.
type warmItem struct {
	prewarmRequest
	due   bool     // it should be sent
	loads bool     // … even if its model is not loaded
	on    *backend // where it was sent last, or its model was unloaded; nil: nowhere yet
	lost  int      // how often the server has lost its warm prompt
	told  bool     // the log says that its model does not exist
}

// fill is a loaded model whose empty slots should get stored contexts.
type fill struct {
	on      *backend
	weights string // "": the weights of model
	model   string // upstream.ModelKey
}

// warming is a warmItem under way.
type warming struct {
	item    *warmItem
	to      []*backend
	cancel  context.CancelFunc
	loading context.Context // cancelled by giveUp: the load of its model
	giveUp  context.CancelFunc
	needs   *runners.Wanted // non-nil while its model is being loaded
	// warmItem.lost when the request was sent, or when its model had been loaded for it.
	lost   int
	result string
}

type warmingKey struct{}

// newPrewarmer returns the handler's prewarmer; nil if there is nothing to do.
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

// nudge makes run check again.
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

// next returns the next thing to do. If that is nil, there is nothing to do until wait has passed,
// or (if wait is 0) until something happens.
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

// take adopts the current contents of the file. Requests that were in it before stay as warm as
// they were. p.mu must be held.
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

// gone records that a server is gone: what was warm there should be warm elsewhere.
func (p *prewarmer) gone(b *backend) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range p.items {
		if i.on == b {
			i.on, i.due, i.loads = nil, true, true
		}
	}
	at := func(other *backend) bool { return other == b }
	p.fills = slices.DeleteFunc(p.fills, func(f fill) bool { return at(f.on) })
	p.seen = slices.DeleteFunc(p.seen, at)
	if p.asking[b] == 0 {
		delete(p.asking, b)
	}
	p.nudge()
}

// targets returns the servers that may get the request. p.mu must be held.
func (p *prewarmer) targets(i *warmItem) (to []*backend) {
	absent, all := 0, p.h.backends()
	for _, b := range all {
		st := b.State()
		switch {
		case st.Polled.IsZero() || !b.takes() || b.foreign.Load():
		case !st.Has(i.key):
			absent++
		case i.loads || b == i.on:
			to = append(to, b)
		}
	}
	if absent == len(all) && absent > 0 && !i.told {
		i.told = true
		p.h.Log.Warn("a prompt cannot be made warm before its model is there",
			"model", upstream.DisplayName(i.key))
	}
	return to
}

// idle reports whether no client uses the servers, and no request waits. p.mu must be held.
func (p *prewarmer) idle(list []*backend) bool {
	return p.h.waiting.Load() == 0 &&
		!slices.ContainsFunc(list, func(b *backend) bool { return p.asking[b] > 0 })
}

// asked records that a client's request may go to these servers from now on, and to no others; an
// empty list means that it has ended. It cancels what is being made warm there.
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

// abandon cancels a request because a client asks. If its model is being loaded as the client needs
// it, the load continues, since it would only start again. prewarmer.mu must be held.
func (w *warming) abandon(b *backend, ex *exchange) {
	w.cancel()
	if w.needs != nil && ex.key != "" && b.runners.Weights(ex.key) == w.needs.Options.Model {
		if o := ex.options(); o == nil || b.wanted(ex.key, o).Options == w.needs.Options {
			return
		}
	}
	w.giveUp()
}

// warm sends a request if its model is loaded, or may be loaded for it.
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
		return // a client came first; its end triggers the next check
	}
	p.running, w.lost = w, i.lost
	p.mu.Unlock()
	p.send(asking, w)

	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = nil
	switch w.result {
	case PrewarmEvaluated, PrewarmAttached, PrewarmWarm:
		if i.lost == w.lost { // otherwise changed has decided what to do next
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

// loaded reports whether the model is loaded as the request needs it, where the request was sent
// last. It asks the server, since others use that, too.
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

// send makes the handler serve a request as if a client had sent it.
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
	if len(w.to) == 1 && len(p.h.backends()) > 1 {
		r.Header.Set(headerUpstream, w.to[0].Name)
	}
	defer func() {
		if v := recover(); v != nil && v != http.ErrAbortHandler { // net/http would have caught it
			panic(v)
		}
	}()
	p.h.ServeHTTP(discard{}, r)
}

// discard is a client that ignores its answer.
type discard http.Header

func (d discard) Header() http.Header         { return http.Header(d) }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}
func (d discard) Flush()                      {}

// loadFirst loads the model before a request is sent that makes its prompt warm. If a client asks
// meanwhile that needs the same model, the load continues.
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
			h.Contexts.Leave(r.Context(), ex.up.port) // the load may evict other models
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

// warmed sets the result of a request that makes its prompt warm.
func (h *Handler) warmed(r *http.Request, ex *exchange) {
	w := ex.warming
	if w == nil {
		return
	}
	reused := false // at least nine tenths
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

// fill attaches the most used stored contexts to the empty slots of a model that was loaded.
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

// changed processes a change of what a server holds.
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

// polled processes a poll of a server.
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

// fillLater schedules the filling of a model's empty slots. p.mu must be held.
func (p *prewarmer) fillLater(f fill) {
	if p.h.Contexts != nil && f.on.port != 0 && !slices.Contains(p.fills, f) {
		p.fills = append(p.fills, f)
	}
}

// changed processes a change of the request's model on a server. prewarmer.mu must be held.
func (i *warmItem) changed(b *backend, kind runners.Kind) {
	if i.on == nil && kind == runners.Unloaded {
		// It was to be loaded here; meanwhile others have loaded and unloaded it.
		i.on = b
	}
	if i.on != b {
		return
	}
	i.lost++
	i.due = kind != runners.Unloaded
	i.loads = kind == runners.Restarted || i.due && i.loads
}
