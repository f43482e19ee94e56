package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// EmbeddingsMode says whether the vectors of embedded inputs are kept.
type EmbeddingsMode string

const (
	EmbeddingsAuto EmbeddingsMode = "auto" // they are served once the model was seen to repeat them
	EmbeddingsOff  EmbeddingsMode = "off"
)

func (EmbeddingsMode) choices() []EmbeddingsMode {
	return []EmbeddingsMode{EmbeddingsAuto, EmbeddingsOff}
}

// CacheEmbeddings has a mode for each model. The zero value is EmbeddingsAuto for all.
type CacheEmbeddings = PerModel[EmbeddingsMode]

// ParseCacheEmbeddings parses settings of the form "off" or "all-minilm=off".
func ParseCacheEmbeddings(settings []string) (CacheEmbeddings, error) {
	return parsePerModel[EmbeddingsMode](settings)
}

const (
	// partsAtOnce is how many inputs of one request are sent to Ollama at a time, each as a request
	// of its own: Ollama makes such requests itself of an array's inputs, one for each.
	partsAtOnce = 16
	// partsOfModel is how many inputs of one model are sent at a time for requests with several, far
	// below the 512 requests that Ollama lets wait (OLLAMA_MAX_QUEUE). Another model, whose server may
	// be faster, does not wait for them, nor does a request that needs one input alone.
	partsOfModel = 64
	// inputsMost is how many inputs a request may have whose vectors are kept. The vectors of all are in
	// memory until the answer is written, several times: of so many inputs with 1,024 dimensions, about
	// 200 MB. Longer arrays are forwarded as they are.
	inputsMost = 8192
	// partMost is more bytes than the answer for one input has.
	partMost = 16 << 20
)

// vectors are the inputs that are being embedded, and what is known of models. The zero value is
// ready for use.
type vectors struct {
	mu    sync.Mutex
	parts map[answers.Key]*part    // guarded by mu
	known map[answers.Key]*known   // by the key of the verdict; guarded by mu
	ended int                      // requests that have removed their parts; guarded by mu
	slots map[string]chan struct{} // by model, one for each input on its way; guarded by mu
	wake  chan struct{}            // has room for one; made by ready
	runs  bool                     // run is running; guarded by mu
	wants []*probe                 // models to be tried; guarded by mu
}

// part is one input that is being embedded, or was a moment ago. It stays until its vector is kept,
// so that whoever asks meanwhile need not compute it.
type part struct {
	done chan struct{}
	answers.Embedding
	entry     answers.Entry // with the vector
	ok        bool          // it has a vector
	abandoned bool          // its client left: others may try again
}

// ready makes the channels.
func (v *vectors) ready() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.parts == nil {
		v.parts, v.known = map[answers.Key]*part{}, map[answers.Key]*known{}
		v.slots, v.wake = map[string]chan struct{}{}, make(chan struct{}, 1)
	}
}

// room returns the slots of a model (upstream.ModelKey).
func (v *vectors) room(model string) chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	slots := v.slots[model]
	if slots == nil {
		slots = make(chan struct{}, partsOfModel)
		v.slots[model] = slots
	}
	return slots
}

// claim is a part that a request has taken on itself.
type claim struct {
	key answers.Key
	*part
}

// computed is a vector that is to be kept, and the server that computed it.
type computed struct {
	answers.Entry
	by *backend
}

// embedding is a request for vectors whose parts are looked for.
type embedding struct {
	answers.EmbedRequest
	h       *Handler
	r       *http.Request
	ex      *exchange
	control answers.Control
	digest  string
	version string
	data    []byte
	context int           // of the loaded model, in tokens; 0 if unknown or not loaded
	usable  bool          // the model was tried, and gives the same vectors again
	seen    int           // vectors.ended when the store was asked
	slots   chan struct{} // of the model; nil: the request needs none

	keys  []answers.Key // one for each input
	first []int         // the index of the first input with the same key
	list  []answers.Embedding
	have  []bool

	use     CacheUse
	claimed []claim   // guarded by vectors.mu until compute has ended
	oldest  time.Time // of the kept vectors; zero if there is none
	mu      sync.Mutex
	fresh   []computed // guarded by mu
	failed  *exchange  // of an input, whose failure is not Ollama's; guarded by mu
	sub     *exchange  // the last of an input; guarded by mu
}

// embedded answers a request for vectors from those that are kept, and computes the others one by
// one. It returns false if the request should be forwarded as it is.
func (h *Handler) embedded(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	e, detail := h.embeds(r, ex)
	if e == nil {
		ex.bypass(CacheVectors, detail)
		return false
	}
	ex.Cache = &e.use
	h.vectors.ready()
	repeats, tried := e.verdict()
	if tried && !repeats.Serves() {
		e.use.Result = CacheBypass
		answers.Status{Fwd: answers.Bypass, Detail: "not-reproducible"}.Set(ex.header)
		return false
	}
	e.lookUp(tried)
	defer e.tryLater(tried)
	status := e.status()
	if missing := e.missing(); len(missing) > 0 {
		if !e.control.OnlyIfCached && h.absent(ex) {
			return e.bypass("away") // the request waits for its server as one
		}
		if e.control.OnlyIfCached {
			status.Set(ex.header)
			h.refuse(w, r, ex, &refusal{http.StatusGatewayTimeout, "not all of these vectors are kept, and the request " +
				"says Cache-Control: only-if-cached; leave that out to have them computed"})
			return true
		}
		ok := e.compute(missing)
		e.keep()
		if !ok {
			return e.fails(w, r)
		}
	}
	e.answer(w, status)
	return true
}

// embeds reads what a request asks for. It returns nil if its vectors are neither kept nor looked
// for; detail is why not, if the client is told.
func (h *Handler) embeds(r *http.Request, ex *exchange) (e *embedding, detail string) {
	if !ex.embed || !h.mayKeep(ex) || ex.unloads() || r.URL.RawQuery != "" || len(r.Trailer) > 0 ||
		h.CacheEmbeddings.For(ex.key) == EmbeddingsOff {
		return nil, ""
	}
	e = &embedding{h: h, r: r, ex: ex, data: ex.body.data, control: answers.ParseControl(r.Header)}
	if e.control.NoStore {
		return nil, "no-store"
	}
	var ok bool
	if e.EmbedRequest, ok = answers.ParseEmbed(r.URL.Path, e.data, ex.fields.members); !ok {
		return nil, ""
	}
	if len(e.Inputs) > inputsMost {
		return nil, "too-many-inputs"
	}
	if e.digest, e.version, ok = h.agreed(r.Context(), ex); !ok {
		return nil, "model-unknown"
	}
	e.use.Kind = CacheVectors
	e.context = h.contextOf(ex.key)
	e.name()
	return e, ""
}

// contextOf returns the context length of a loaded model, in tokens; 0 if it is not known, or not
// the same on all servers.
func (h *Handler) contextOf(key string) (tokens int) {
	for _, b := range h.backends() {
		l, ok := b.loaded(b.State().Loaded, key)
		switch {
		case !ok:
		case tokens != 0 && tokens != l.ContextLength:
			return 0
		default:
			tokens = l.ContextLength
		}
	}
	return tokens
}

// name finds the keys of the inputs.
func (e *embedding) name() {
	secret, fit := e.h.Answers.Secret(), e.ex.fit.key()
	scope := e.h.scope(e.r, e.ex)
	// The name as it is written: Ollama before 0.30 does not find each spelling at each endpoint.
	parts := []string{"vector", e.Sum(), e.Model, fit, e.digest, e.version, string(scope), ""}
	n := len(e.Inputs)
	e.keys, e.first = make([]answers.Key, n), make([]int, n)
	e.list, e.have = make([]answers.Embedding, n), make([]bool, n)
	at := make(map[string]int, n)
	for i, text := range e.Inputs {
		first, ok := at[text]
		if !ok {
			first, at[text] = i, i
			parts[len(parts)-1] = text
			e.keys[i] = answers.MakeKey(secret, answers.Vector, parts...)
		}
		e.keys[i], e.first[i] = e.keys[first], first
	}
}

// lookUp finds the vectors that are kept. Unless the model was tried, they are not used; if it is
// being tried, that is waited for.
func (e *embedding) lookUp(tried bool) {
	if e.control.NoCache {
		return
	}
	v := &e.h.vectors
	v.mu.Lock()
	e.seen = v.ended
	v.mu.Unlock()
	list, err := e.h.Answers.Get(e.r.Context(), e.keys)
	if err != nil { // the store has said so
		list = make([]answers.Entry, len(e.keys))
	}
	v.mu.Lock()
	for i, key := range e.keys {
		if p := v.parts[key]; p != nil && p.ended() && list[i].Data == nil {
			list[i] = p.entry // it is about to be kept
		}
	}
	v.mu.Unlock()
	e.usable = tried || e.trial(list)
	for i, entry := range list {
		if e.usable {
			e.take(i, entry)
		}
	}
}

// ended reports whether the part is no longer under way. Its other fields may be read then.
func (p *part) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// take uses a kept vector, and reports whether it may.
func (e *embedding) take(i int, entry answers.Entry) bool {
	if entry.Data == nil || !e.control.Takes(time.Since(entry.Made), e.h.AnswersAge) {
		return false
	}
	vector, err := answers.DecodeEmbedding(entry.Data)
	if err != nil || !vector.Holds(e.context, len(e.Inputs[i])) {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list[i], e.have[i] = vector, true
	e.use.Hits++
	e.use.Bytes += int64(len(entry.Data))
	e.use.Prompt += vector.Tokens
	e.use.Saved += vector.Cost
	if e.oldest.IsZero() || entry.Made.Before(e.oldest) {
		e.oldest = entry.Made
	}
	return true
}

// missing returns the inputs that are not kept, each once.
func (e *embedding) missing() (list []int) {
	for i := range e.Inputs {
		if !e.have[i] && e.first[i] == i {
			list = append(list, i)
		}
	}
	return list
}

// status tells the client what was found.
func (e *embedding) status() answers.Status {
	switch {
	case e.control.NoCache:
		e.use.Result = CacheMiss
		return answers.Status{Fwd: answers.Request}
	case e.use.Hits == len(e.Inputs):
		e.use.Result = CacheHit
		return answers.Status{Hit: true}
	case e.use.Hits > 0:
		e.use.Result = CachePartial
		return answers.Status{Fwd: answers.Partial, Detail: fmt.Sprintf("%d/%d", e.use.Hits, len(e.Inputs))}
	}
	e.use.Result = CacheMiss
	return answers.Status{Fwd: answers.URIMiss}
}

// compute embeds the missing inputs, several at a time. It returns false if one of them failed.
func (e *embedding) compute(missing []int) bool {
	ctx, cancel := context.WithCancel(e.r.Context())
	defer cancel()
	workers := min(partsAtOnce, len(missing))
	if workers > 1 {
		e.slots = e.h.vectors.room(e.ex.key)
	}
	var next atomic.Int64
	var failed atomic.Bool
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				n := int(next.Add(1)) - 1
				if n >= len(missing) || ctx.Err() != nil {
					return
				}
				if !e.one(ctx, missing[n], workers) {
					failed.Store(true)
					cancel()
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() || e.r.Context().Err() != nil {
		return false
	}
	for i, first := range e.first {
		if i != first && !e.have[i] {
			e.list[i], e.have[i] = e.list[first], true
			e.use.Joined++
		}
	}
	return true
}

// one embeds an input, or waits for another request that does.
func (e *embedding) one(ctx context.Context, i, workers int) bool {
	for {
		p, mine, kept := e.claim(ctx, i)
		switch {
		case kept:
			return true
		case p == nil:
			return false
		case mine:
			return e.ask(ctx, i, workers, p)
		}
		select {
		case <-p.done:
		case <-ctx.Done():
			return false
		}
		if p.abandoned {
			continue
		}
		if p.ok {
			e.mu.Lock()
			e.list[i], e.have[i] = p.Embedding, true
			e.use.Joined++
			e.mu.Unlock()
		}
		return p.ok
	}
}

// claim returns the part for an input: one that is under way, or a new one that is the caller's to
// compute, which holds a slot; or nil if ctx ended. kept: another request has kept it meanwhile.
func (e *embedding) claim(ctx context.Context, i int) (p *part, mine, kept bool) {
	v, key := &e.h.vectors, e.keys[i]
	if !e.control.NoCache { // otherwise what is under way may be older than wanted
		v.mu.Lock()
		p = v.parts[key]
		v.mu.Unlock()
		if e.joins(p) {
			return p, false, false
		}
	}
	if !e.enter(ctx) {
		return nil, false, false
	}
	own := &part{done: make(chan struct{})}
	if e.control.NoCache {
		return own, true, false
	}
	v.mu.Lock()
	if p = v.parts[key]; e.joins(p) {
		v.mu.Unlock()
		e.leave()
		return p, false, false
	}
	v.parts[key] = own
	e.claimed = append(e.claimed, claim{key, own})
	again := v.ended != e.seen
	v.mu.Unlock()
	if again && e.again(ctx, i, own) {
		e.leave()
		return own, false, true
	}
	return own, true, false
}

// enter takes a slot, unless the request needs none. It returns false if ctx ended.
func (e *embedding) enter(ctx context.Context) bool {
	if e.slots == nil {
		return ctx.Err() == nil
	}
	select {
	case e.slots <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// leave gives back what enter took.
func (e *embedding) leave() {
	if e.slots != nil {
		<-e.slots
	}
}

// joins reports whether the request may have the vector of a part. Before the model was tried that
// holds only for what is under way.
func (e *embedding) joins(p *part) bool {
	return p != nil && (e.usable || !p.ended())
}

// forget removes a part, unless there is another for its input by now. v.mu must be held.
func (v *vectors) forget(c claim) {
	if v.parts[c.key] == c.part {
		delete(v.parts, c.key)
	}
}

// again looks for a vector once more, since a request has ended that may have kept it.
func (e *embedding) again(ctx context.Context, i int, p *part) bool {
	if !e.usable {
		return false
	}
	list, err := e.h.Answers.Get(ctx, e.keys[i:i+1])
	if err != nil || !e.take(i, list[0]) {
		return false
	}
	p.Embedding, p.entry, p.ok = e.list[i], list[0], true
	close(p.done)
	return true
}

// ask sends an input to Ollama in a request like the client's. It gives back the slot.
func (e *embedding) ask(ctx context.Context, i, workers int, p *part) bool {
	v := &e.h.vectors
	defer func() {
		if !p.ok { // whoever waits for it does not find it again
			v.mu.Lock()
			v.forget(claim{e.keys[i], p})
			v.mu.Unlock()
		}
		close(p.done)
		e.leave()
	}()
	input, err := json.Marshal(e.Inputs[i])
	if err != nil {
		return false
	}
	sub, rec := e.h.subrequest(ctx, e.r, e.ex, e.With(e.data, input))
	vector, ok := answers.Embedding{}, false
	if sub.Outcome == OK && rec.status == http.StatusOK && rec.header.Get("Content-Encoding") == "" {
		one := e.EmbedRequest
		vector, ok = one.ParseAnswer(rec.body.Bytes())
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sub = sub
	if !ok {
		p.abandoned = ctx.Err() != nil
		if sub.Outcome != OK && sub.Outcome != ClientError && sub.Outcome != UpstreamError && ctx.Err() == nil {
			e.failed = sub
		}
		return false
	}
	vector.Cost = max(1, sub.Duration/time.Duration(workers))
	vector.Load /= time.Duration(workers)
	vector.Context = e.h.contextOf(e.ex.key)
	p.Embedding, p.ok = vector, true
	p.entry = answers.Entry{Key: e.keys[i], Kind: answers.Vector, Made: time.Now(), Data: vector.Encode()}
	e.list[i], e.have[i] = vector, true
	e.use.Misses++
	control := answers.ParseControl(rec.header)
	if sub.fit.made == e.ex.fit.made && sub.fit.to == e.ex.fit.to && !control.NoStore &&
		rec.header["Set-Cookie"] == nil {
		e.fresh = append(e.fresh, computed{p.entry, sub.up})
	}
	return true
}

// keep keeps the computed vectors, if their server's list of models, read after that, still has the
// model that the keys name. Until then they are found where they were computed.
func (e *embedding) keep() {
	if len(e.claimed) == 0 && len(e.fresh) == 0 {
		return
	}
	h, ctx, ended := e.h, context.WithoutCancel(e.r.Context()), time.Now()
	h.computing.wg.Go(func() { // ends after a few short requests at most
		var list []answers.Entry
		right := map[*backend]bool{}
		for _, c := range e.fresh {
			ok, asked := right[c.by]
			if !asked {
				st := c.by.relisted(ctx, ended)
				ok = !st.Listed.Before(ended) && st.Digests[e.ex.key] == e.digest && st.Version == e.version
				right[c.by] = ok
			}
			if ok {
				list = append(list, c.Entry)
			}
		}
		if len(list) > 0 {
			h.Answers.Put(ctx, list) // a store that fails has said so
		}
		v := &h.vectors
		v.mu.Lock()
		defer v.mu.Unlock()
		for _, c := range e.claimed {
			v.forget(c)
		}
		v.ended++
	})
}

// fails ends a request one of whose inputs could not be embedded. Ollama's own refusal is what the
// client gets for the request as it is; what the proxy itself says, it says once.
func (e *embedding) fails(w http.ResponseWriter, r *http.Request) bool {
	ex := e.ex
	if sub := e.failed; sub != nil && r.Context().Err() == nil && sub.Status > 0 && sub.said != "" {
		ex.up, ex.Retries = sub.up, sub.Retries
		if after := sub.header["Retry-After"]; after != nil {
			ex.header["Retry-After"] = after
		}
		e.h.refuse(w, r, ex, &refusal{sub.Status, sub.said})
		ex.Outcome = sub.Outcome
		return true
	}
	if r.Context().Err() != nil {
		ex.Outcome = ClientGone
		panic(http.ErrAbortHandler)
	}
	return e.bypass("failed")
}

// bypass has the request forwarded as it is, and tells the client why. It returns false.
func (e *embedding) bypass(why string) bool {
	e.use = CacheUse{Kind: CacheVectors, Result: CacheBypass}
	answers.Status{Fwd: answers.Bypass, Detail: why}.Set(e.ex.header)
	return false
}

// absent reports whether all servers that may answer a request are away.
func (h *Handler) absent(ex *exchange) bool {
	return !slices.ContainsFunc(h.candidates(ex), func(b *backend) bool { return !b.State().Away })
}

// answer writes the answer.
func (e *embedding) answer(w http.ResponseWriter, status answers.Status) {
	ex, header := e.ex, w.Header()
	var total, load time.Duration
	for i, first := range e.first {
		if i == first {
			total += e.list[i].Cost
			load += e.list[i].Load
		}
	}
	if e.use.Misses == 0 && e.use.Joined > 0 && e.use.Hits == 0 {
		e.use.Result, status.Collapsed = CacheJoined, true
	}
	if sub := e.sub; sub != nil {
		ex.up, ex.KeepAlive, ex.NumCtx, ex.Retries = sub.up, sub.KeepAlive, sub.NumCtx, sub.Retries
		ex.Waited, ex.paused, ex.Simulated = sub.Waited, sub.paused, sub.Simulated
		ex.name()
	}
	header.Set("Content-Type", e.ContentType())
	if ex.Simulated {
		header.Set(upstream.SimulatedHeader, "true")
	}
	setCORS(header, ex.origin)
	ex.timing(header)
	status.Set(header)
	if !e.oldest.IsZero() {
		answers.SetAge(header, time.Since(e.oldest))
	}
	ex.Status, ex.FirstByte = http.StatusOK, time.Since(ex.start)
	w.WriteHeader(http.StatusOK)
	n, err := w.Write(e.Compose(e.list, total, load))
	ex.BytesOut = int64(n)
	if ex.bodyErr = io.EOF; err != nil {
		ex.bodyErr = err
		panic(http.ErrAbortHandler)
	}
}

// recorded is the answer to a request of the proxy's own for one input.
type recorded struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorded) Header() http.Header { return r.header }
func (r *recorded) Flush()              {}

func (r *recorded) WriteHeader(status int) {
	if r.status == 0 && status >= 200 {
		r.status = status
	}
}

func (r *recorded) Write(b []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	if r.body.Len()+len(b) > partMost {
		return 0, errors.New("longer than the vector of one input")
	}
	return r.body.Write(b)
}

// subrequest serves a request like a client's with another body, as a part of that request: for the
// same client, with the same keep_alive and the same choice of a server.
func (h *Handler) subrequest(
	ctx context.Context, r *http.Request, of *exchange, data []byte,
) (*exchange, *recorded) {
	rec := &recorded{header: http.Header{}}
	ex := &exchange{
		start: time.Now(), header: rec.header, route: of.route, holder: of.holder, spent: of.spent, part: true, passed: of.passed,
		stands:   of.stood.CompareAndSwap(false, true),
		Exchange: Exchange{Method: of.Method, Path: of.Path, Endpoint: of.Endpoint, Name: of.Name},
	}
	h.inFlight.Add(1)
	part := r.Clone(context.WithValue(ctx, exchangeKey{}, ex))
	for _, name := range []string{"Accept-Encoding", "Content-Encoding", "Expect", "Cache-Control", "Idempotency-Key", "X-Idempotency-Key"} {
		part.Header.Del(name)
	}
	part.Body, part.ContentLength, part.TransferEncoding = http.NoBody, int64(len(data)), nil
	h.servePart(rec, part, ex, data)
	return ex, rec
}

// servePart serves a request for one input.
func (h *Handler) servePart(rec *recorded, r *http.Request, ex *exchange, data []byte) {
	defer func() {
		if v := recover(); v != nil {
			h.caught(ex, v)
		}
	}()
	defer h.finish(ex, rec, r)
	ex.body = newBody(data, nil)
	ex.in.Store(int64(len(data)))
	f, err := scan(data, ex.members[:])
	if err != nil {
		h.refuse(rec, r, ex, &refusal{http.StatusBadRequest, err.Error()})
		return
	}
	h.understand(ex, f, data)
	h.account(ex, data)
	h.serve(rec, r, ex)
}
