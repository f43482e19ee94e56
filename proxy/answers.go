package proxy

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers/forms"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// CacheMode says which answers of chats and generations are kept.
type CacheMode string

const (
	CacheOff           CacheMode = "off"           // none
	CacheDeterministic CacheMode = "deterministic" // those that a repetition would give again
	CacheAll           CacheMode = "all"           // all
)

func (CacheMode) choices() []CacheMode {
	return []CacheMode{CacheOff, CacheDeterministic, CacheAll}
}

// CacheAnswers has a mode for each model. The zero value keeps no answers.
type CacheAnswers = PerModel[CacheMode]

// ParseCacheAnswers parses settings of the form "deterministic" or "llama3=all".
func ParseCacheAnswers(settings []string) (CacheAnswers, error) {
	return parsePerModel[CacheMode](settings)
}

const (
	// listedMost is how old a server's list of models may be when a kept answer is served: a pull
	// that did not go through the proxy is seen after this time at the latest.
	listedMost = 5 * time.Second
	// listedPause is the shortest time between two lists that are read to keep answers.
	listedPause = time.Second
	// listedWait is how long a request waits for a server's list of models. After such a wait that was
	// in vain, no request waits for listedRest.
	listedWait = time.Second
	listedRest = 30 * time.Second
)

// question is a request whose answer may be kept or known.
type question struct {
	answers.Identity
	control answers.Control
	digest  string               // of the model
	version string               // of Ollama
	written map[uint16]time.Time // when the model was written, by backend.index, before the computation
	clock   answers.Clock        // what the prompt says about the time
	where   *time.Location       // of the servers; nil: not known
	day     string               // what tells the days apart if the prompt says the date
	parts   [][]byte             // of the key, but for the form
	flight  answers.Key
}

// today tells the days apart if the answer depends on the date.
func (q *question) today(now time.Time) string {
	if q.clock == answers.NoClock {
		return ""
	}
	return answers.Day(now, q.where)
}

// key returns the key of the answer in one form.
func (q *question) key(h *Handler, form answers.Form) answers.Key {
	return answers.MakeKey(h.Answers.Secret(), answers.Text, append(q.parts, []byte{byte(form)})...)
}

// asks returns what a request asks, or nil if its answer is neither kept nor looked for. detail is
// why not, if the client is told.
func (h *Handler) asks(r *http.Request, ex *exchange) (q *question, detail string) {
	mode := h.CacheAnswers.For(ex.key)
	if mode == CacheOff || ex.prompt == prefix.None || ex.embed || !h.mayKeep(ex) {
		return nil, ""
	}
	q = &question{control: answers.ParseControl(r.Header)}
	if q.control.NoStore {
		return nil, "no-store"
	}
	var ok bool
	if q.digest, q.version, ok = h.agreed(r.Context(), ex); !ok {
		return nil, "model-unknown"
	}
	q.written = map[uint16]time.Time{}
	for _, b := range h.backends() {
		q.written[b.index] = b.State().Written[ex.key]
	}
	model, local := h.model(ex, q.digest)
	if local {
		q.where = time.Local
	}
	q.Identity = answers.Identify(ex.prompt, ex.body.data, ex.fields.members, ex.fields.long, model.Sampling)
	if !q.Prompt {
		return nil, ""
	}
	if mode == CacheDeterministic && !q.Deterministic {
		return nil, "not-deterministic"
	}
	if q.clock = max(q.Clock, model.Clock); q.clock == answers.TimeClock {
		return nil, "prompt-tells-time"
	}
	q.day = q.today(time.Now())
	sum := q.Sum
	q.parts = [][]byte{
		sum[:], []byte(r.URL.Path), []byte(r.URL.RawQuery), []byte(ex.fields.model), []byte(q.digest),
		[]byte(q.version), h.scope(r, ex), []byte(q.day), []byte(ex.fit.key()),
	}
	// A more urgent request does not wait in the place of another, and nobody joins what another
	// client may have to wait for.
	q.flight = answers.MakeKey(h.Answers.Secret(), answers.Text, append(q.parts, []byte{byte(q.Form)},
		credentials(r, ex), []byte(r.Header.Get("Accept-Encoding")), []byte(ex.holder.priority(r).String()))...)
	return q, ""
}

// mayKeep reports whether the answer to a request may be kept as far as the proxy's own reasons go: it
// has read the body, nobody has asked for a certain server, and Ollama need not see the request in
// order to refuse its keep_alive or to unload the model after it.
func (h *Handler) mayKeep(ex *exchange) bool {
	if f := ex.fields; f.keepAlive == keepAliveInvalid || f.keepAlive == keepAliveSet && f.duration == 0 {
		return false
	}
	return h.Answers != nil && ex.runsHere() && !ex.stranger && ex.warming == nil && ex.only == nil &&
		!ex.unread && ex.body != nil && ex.fields.members != nil // else the body is compressed
}

// scope separates the kept answers of clients that may not have each other's.
func (h *Handler) scope(r *http.Request, ex *exchange) []byte {
	if h.AnswersShared {
		return nil
	}
	return credentials(r, ex)
}

// credentials identifies what a client shows to be let in, here or at the upstream: whoever may not
// ask the upstream must not get its kept answers either.
func credentials(r *http.Request, ex *exchange) []byte {
	if ex.holder != nil {
		return ex.holder.secret()
	}
	if ex.passed != nil && ex.passed.Key != "" { // a key that this proxy has not been told of yet
		return []byte(ex.passed.Key)
	}
	sum, any := sha256.New(), false
	for _, name := range []string{"Authorization", "X-Api-Key", "Api-Key", "Cookie", "Proxy-Authorization"} {
		for _, value := range r.Header[name] {
			fmt.Fprintf(sum, "%s %d %s\n", name, len(value), value)
			any = true
		}
	}
	if !any {
		return nil
	}
	return sum.Sum(nil)
}

// agreed returns the digest of the request's model, and Ollama's version, if they are known and the
// same at all servers that may answer. It reads the list of models again if that is old. What is
// known of a server that is away counts.
func (h *Handler) agreed(ctx context.Context, ex *exchange) (digest, version string, ok bool) {
	since := time.Now().Add(-listedMost)
	h.fresh(ctx, ex.key, since)
	for _, b := range h.backends() {
		st := b.State()
		d, has := st.Digests[ex.key]
		switch {
		case !has:
		case !st.Away && b.outdated(st, since): // it has not said it in time
			return "", "", false
		case d == "" || st.Version == "" || b.looped.Load(), ok && (d != digest || st.Version != version):
			return "", "", false
		default:
			digest, version, ok = d, st.Version, true
		}
	}
	return digest, version, ok
}

// outdated reports whether a server's models were last listed before a time, or before a request
// changed one.
func (b *backend) outdated(st upstream.State, since time.Time) bool {
	return st.Listed.Before(since) || st.Listed.UnixNano() <= b.altered.Load()
}

// model returns what is known of the request's model, and whether all servers that have it are on
// this machine.
func (h *Handler) model(ex *exchange, digest string) (m runners.Model, local bool) {
	local = true
	for _, b := range h.backends() {
		if b.State().Digests[ex.key] == digest {
			m = b.runners.Model(ex.key, digest)
			local = local && b.port != 0
		}
	}
	return m, local
}

// fresh lists the models of the servers that have a model, if they were last listed before a time.
// A server that is away goes on with what is known of it.
func (h *Handler) fresh(ctx context.Context, model string, since time.Time) {
	ctx, cancel := context.WithTimeout(ctx, listedWait)
	defer cancel()
	now := time.Now()
	var waits []<-chan struct{}
	for _, b := range h.backends() {
		st := b.State()
		if !st.Has(model) || st.Away || !b.outdated(st, since) || now.UnixNano() < b.slow.Load() {
			continue
		}
		listed := make(chan struct{})
		waits = append(waits, listed)
		h.computing.wg.Go(func() { // ends soon after ctx: it may wait for another poll
			defer close(listed)
			if st := b.Refresh(ctx); b.outdated(st, since) && context.Cause(ctx) == context.DeadlineExceeded {
				b.slow.Store(now.Add(listedRest).UnixNano())
			}
		})
	}
	for _, listed := range waits {
		select {
		case <-listed:
		case <-ctx.Done():
		}
	}
}

// recall answers a request with a kept answer, or with the one that another request is getting. If
// there is none it computes the answer where others can read it. It returns false if the request
// should be forwarded as if nothing were kept.
func (h *Handler) recall(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	q, detail := h.asks(r, ex)
	if q == nil {
		ex.bypass(CacheText, detail)
		on := surviving(r, ex)
		if on {
			h.compute(w, r, ex, nil, nil)
		}
		return on
	}
	ex.Cache = &CacheUse{Kind: CacheText, Result: CacheMiss, Misses: 1}
	status := &answers.Status{Fwd: answers.URIMiss}
	if q.control.NoCache {
		status.Fwd = answers.Request
	} else if age, record, ok := h.find(r.Context(), r.URL.Path, q); ok {
		h.replay(w, r, ex, record, age)
		return true
	}
	if q.control.OnlyIfCached {
		status.Set(ex.header)
		h.refuse(w, r, ex, &refusal{http.StatusGatewayTimeout, "this answer is not kept, and the request says " +
			"Cache-Control: only-if-cached; leave that out to have it computed"})
		return true
	}
	h.compute(w, r, ex, q, status)
	return true
}

// bypass tells the client, if there is a detail to tell, why nothing was looked for.
func (ex *exchange) bypass(kind, detail string) {
	if detail != "" {
		ex.Cache = &CacheUse{Kind: kind, Result: CacheBypass}
		answers.Status{Fwd: answers.Bypass, Detail: detail}.Set(ex.header)
	}
}

// find looks for a kept answer, in the form that is asked for, or in one that it can be made from.
func (h *Handler) find(ctx context.Context, path string, q *question) (age time.Duration, r answers.Record, ok bool) {
	forms := []answers.Form{q.Form, answers.Whole}
	if q.Form == answers.Whole {
		forms = []answers.Form{q.Form, answers.StreamUsage, answers.Stream}
	}
	keys := make([]answers.Key, len(forms))
	for i, form := range forms {
		keys[i] = q.key(h, form)
	}
	list, err := h.Answers.Get(ctx, keys)
	if err != nil {
		return 0, r, false // the store has said so
	}
	for i, e := range list {
		if e.Data == nil {
			continue
		}
		age = time.Since(e.Made)
		if !q.control.Takes(age, h.AnswersAge) {
			continue
		}
		if r, err = answers.DecodeRecord(e.Data); err != nil {
			h.Log.Warn("a kept answer is torn; it is computed again", "err", err)
			continue
		}
		if forms[i] == q.Form {
			return age, r, true
		}
		// What is being computed, or was a moment ago, is the better answer.
		if (q.control.OnlyIfCached || !h.computing.has(q.flight)) && q.convert(path, &r) {
			return age, r, true
		}
	}
	return 0, r, false
}

// sizedMost is how long an answer is at most that has a Content-Length, in bytes: net/http adds it to
// what it could hold back until the end.
const sizedMost = 2048

// convert turns a record into the form that is asked for.
func (q *question) convert(path string, r *answers.Record) (ok bool) {
	r.Marks = nil
	if q.Form == answers.Whole {
		r.Body, ok = forms.Whole(path, r.Body, q.Tools)
	} else {
		r.Body, ok = forms.Stream(path, r.Body, q.Form == answers.StreamUsage)
	}
	if !ok {
		return false
	}
	r.Sized = q.Form == answers.Whole && len(r.Body) <= sizedMost
	r.Header = maps.Clone(r.Header)
	r.Header["Content-Type"] = []string{forms.ContentType(path, q.Form != answers.Whole)}
	delete(r.Header, "Cache-Control")
	if q.Form != answers.Whole && (path == "/v1/messages" || path == "/v1/responses") {
		r.Header["Cache-Control"] = []string{"no-cache"} // as Ollama does
	}
	return true
}

// replay answers with a kept answer.
func (h *Handler) replay(
	w http.ResponseWriter, r *http.Request, ex *exchange, a answers.Record, age time.Duration,
) {
	*ex.Cache = CacheUse{
		Kind: CacheText, Result: CacheHit, Hits: 1, Bytes: int64(len(a.Body)),
		Prompt: a.Prompt, Generated: a.Generated, Saved: a.Cost,
	}
	header := w.Header()
	maps.Copy(header, a.Header)
	setCORS(header, ex.origin)
	ex.timing(header)
	answers.Status{Hit: true, TTL: h.left(age)}.Set(header)
	answers.SetAge(header, age)
	if a.Sized {
		header.Set("Content-Length", fmt.Sprint(len(a.Body)))
	}
	ex.Status = a.Status
	ex.FirstByte = time.Since(ex.start)
	w.WriteHeader(a.Status)
	ex.bodyErr = h.play(w, r, ex, a)
	if ex.bodyErr == io.EOF {
		return
	}
	panic(http.ErrAbortHandler)
}

// left returns for how long an answer of that age is still good; 0: for ever.
func (h *Handler) left(age time.Duration) time.Duration {
	if h.AnswersAge == 0 {
		return 0
	}
	return max(h.AnswersAge-age, time.Second)
}

// play writes the body of a kept answer, and returns io.EOF at its end.
func (h *Handler) play(w http.ResponseWriter, r *http.Request, ex *exchange, a answers.Record) error {
	from := 0
	if h.ReplayPaced {
		began := time.Now()
		for _, m := range a.Marks {
			select {
			case <-time.After(time.Until(began.Add(m.At))):
			case <-r.Context().Done():
				return context.Cause(r.Context())
			}
			n, err := w.Write(a.Body[from:m.End])
			ex.BytesOut += int64(n)
			if err != nil {
				return err
			}
			flush(w)
			from = m.End
		}
	}
	n, err := w.Write(a.Body[from:])
	ex.BytesOut += int64(n)
	if err != nil {
		return err
	}
	if !a.Sized {
		flush(w) // otherwise net/http would add the length of a short answer
	}
	return io.EOF
}

// flight is the computation of an answer that is recorded.
type flight struct {
	*answers.Flight
	cancel context.CancelCauseFunc
	record *answers.Record // filled in when the upstream answers; nil: the answer is not kept

	mu     sync.Mutex
	joined []joined // those who have joined it; guarded by mu
}

// joined is a request that reads along with a computation.
type joined struct {
	ctx    context.Context // ends when it no longer does
	passed *fleet.Passed   // nil if its client is this proxy's own
}

func (f *flight) join(j joined) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.joined = append(f.joined, j)
}

// other returns how a request was passed on that still reads along, each once.
func (f *flight) other() (p *fleet.Passed, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.joined) > 0 && !ok {
		j := f.joined[0]
		f.joined = f.joined[1:]
		p, ok = j.passed, j.ctx.Err() == nil
	}
	return p, ok
}

// answered notes what the upstream says of an answer that may be kept.
func (f *flight) answered(res *http.Response) {
	if f == nil || res.StatusCode != http.StatusOK {
		return
	}
	control := strings.ToLower(strings.Join(res.Header["Cache-Control"], ","))
	if res.Header["Set-Cookie"] != nil || res.Header["Content-Encoding"] != nil ||
		strings.Contains(control, "no-store") || strings.Contains(control, "private") {
		return // a gateway in front of Ollama says that this answer is for one client
	}
	f.record = &answers.Record{Head: answers.Head{
		Status: res.StatusCode, Header: http.Header{}, Sized: res.ContentLength >= 0,
	}}
	for name, values := range res.Header {
		if !unkept[name] && !strings.HasPrefix(name, "Access-Control-") &&
			(name == upstream.SimulatedHeader || !strings.HasPrefix(name, "X-Cacheproxy-")) {
			f.record.Header[name] = values
		}
	}
}

// unkept are the headers of an answer that do not belong to what is kept of it.
var unkept = map[string]bool{
	"Date": true, "Content-Length": true, "Transfer-Encoding": true, "Connection": true,
	"Keep-Alive": true, "Trailer": true, "Server-Timing": true, "Cache-Status": true, "Age": true,
}

// computing are the answers that are being computed where several clients may read them.
type computing struct {
	wg    sync.WaitGroup
	mu    sync.Mutex
	under map[answers.Key]*flight // those that others may join; guarded by mu
	all   map[*flight]bool        // guarded by mu
}

// CutOff ends the computation of answers that go on without their clients.
func (h *Handler) CutOff() {
	c := &h.computing
	c.mu.Lock()
	defer c.mu.Unlock()
	for f := range c.all {
		f.cancel(ErrDrained)
	}
}

// compute answers with what a computation writes: one that is under way, or a new one. q is nil if
// the answer is not kept.
func (h *Handler) compute(
	w http.ResponseWriter, r *http.Request, ex *exchange, q *question, status *answers.Status,
) {
	c := &h.computing
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	begin := func() *flight { return &flight{Flight: answers.NewFlight(0, cancel), cancel: cancel} }
	f, l, leads := c.join(q, begin)
	on, async := survives(r, ex)
	kept := keptAnswer{
		owner: string(credentials(r, ex)), path: ex.Path, model: ex.Model, flight: f,
	}
	if on && !h.kept.add(&kept) {
		on, async = false, false // as if the client had not asked, which it sees by the header
	}
	reader := ex
	if leads {
		reader = &exchange{start: ex.start, header: ex.header, Exchange: ex.Exchange, origin: ex.origin, passed: ex.passed}
		ex.flight, ex.header, ex.origin = f, f.Header(), ""
		if ex.arriving != nil {
			ex.arriving.end(io.EOF) // the connection is this client's alone, who may leave
		}
		c.wg.Go(func() { h.run(f, r.WithContext(ctx), ex, q) }) // ends with ctx
	} else {
		cancel(nil)
		j := joined{r.Context(), ex.passed}
		if async {
			j.ctx = context.Background() // it comes for the answer later
		}
		f.join(j)
		ex.Cache.Result, ex.Cache.Misses, ex.Cache.Joined = CacheJoined, 0, 1
		status.Collapsed = true
	}
	if on {
		w.Header().Set(headerAnswer, kept.id)
	}
	if async {
		l.Close(nil)
		reader.accept(w, kept)
		return
	}
	h.listen(w, r, reader, f, l, status)
}

// join returns the computation that the request asks for, with a listener. If there is none, it
// begins one, and leads is true.
func (c *computing) join(q *question, begin func() *flight) (f *flight, l *answers.Listener, leads bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if q != nil && !q.control.NoCache { // otherwise what is under way may be older than wanted
		if f = c.under[q.flight]; f != nil {
			if l = f.Listen(); l != nil {
				return f, l, false
			}
		}
	}
	f = begin()
	if c.all == nil {
		c.under, c.all = map[answers.Key]*flight{}, map[*flight]bool{}
	}
	if c.all[f] = true; q != nil {
		c.under[q.flight] = f
	}
	return f, f.Listen(), true
}

// has reports whether a computation is under way, or was a moment ago.
func (c *computing) has(key answers.Key) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.under[key] != nil
}

// leave forgets a computation: later requests for the same answer begin another.
func (c *computing) leave(f *flight, q *question) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if delete(c.all, f); q != nil && c.under[q.flight] == f {
		delete(c.under, q.flight)
	}
}

// run computes an answer for all who listen, and keeps it.
func (h *Handler) run(f *flight, r *http.Request, ex *exchange, q *question) {
	defer f.cancel(nil)
	defer h.computing.leave(f, q)
	err := h.served(f, r, ex)
	f.End(err)
	if err == nil {
		h.keep(r, ex, f, q)
	}
}

// caught logs what a request of the proxy's own ended with if that is a fault, as net/http does for a
// client's.
func (h *Handler) caught(ex *exchange, v any) {
	if v != http.ErrAbortHandler {
		h.Log.Error("a request ended with a fault in this program", "path", ex.Path, "err", v, "stack", string(debug.Stack()))
	}
}

// served serves the request of a computation. It returns why the answer is not whole.
func (h *Handler) served(f *flight, r *http.Request, ex *exchange) (err error) {
	defer func() {
		if v := recover(); v != nil {
			h.caught(ex, v)
			err = http.ErrAbortHandler
		}
	}()
	defer h.finish(ex, f.Flight, r)
	h.serve(f.Flight, r, ex)
	return nil
}

// keep keeps a computed answer if it is complete, and was certainly made by the model that the key
// names: a list of models that was read after its end must still say so.
func (h *Handler) keep(r *http.Request, ex *exchange, f *flight, q *question) {
	status, body, marks, whole := f.Recorded()
	if q == nil || !whole || f.record == nil || status != f.record.Status || ex.Outcome != OK {
		return
	}
	ended := time.Now()
	_, complete := forms.Complete(r.URL.Path, f.record.Header.Get("Content-Type"), body)
	if !complete || q.today(ended) != q.day {
		return
	}
	if !q.same(ex, ex.up.relisted(r.Context(), ended), ended) { // it was another model meanwhile
		return
	}
	record := f.record
	record.Body = body
	if q.Form != answers.Whole {
		record.Marks = marks
	}
	record.Cost = ex.Duration - ex.sent
	if e := ex.Savings; e != nil {
		record.Prompt, record.Generated = e.Total, e.Generated
		if e.Tokens != nil {
			record.Evaluated = e.Tokens.Evaluated
		}
	}
	entry := answers.Entry{Key: q.key(h, q.Form), Kind: answers.Text, Made: ended, Data: record.Encode()}
	h.Answers.Put(r.Context(), []answers.Entry{entry}) // a store that fails has said so
}

// same reports whether a server's state is from after that time, and has the model that the key names.
func (q *question) same(ex *exchange, st upstream.State, after time.Time) bool {
	written, known := q.written[ex.up.index]
	return known && !st.Listed.Before(after) && st.Digests[ex.key] == q.digest &&
		st.Version == q.version && st.Written[ex.key].Equal(written)
}

// relisted returns the server's state after its models were listed again, unless they were after that
// time. It lists them at most once in listedPause. The server may not answer.
func (b *backend) relisted(ctx context.Context, after time.Time) upstream.State {
	select {
	case b.listing <- struct{}{}:
		defer func() { <-b.listing }()
	case <-ctx.Done():
		return b.State()
	}
	st := b.State()
	if !st.Listed.Before(after) {
		return st
	}
	select {
	case <-time.After(time.Until(st.Listed.Add(listedPause))):
	case <-ctx.Done():
		return st
	}
	return b.Refresh(ctx)
}

// listen answers a client with what a computation writes.
func (h *Handler) listen(
	w http.ResponseWriter, r *http.Request, ex *exchange, f *flight, l *answers.Listener,
	cached *answers.Status,
) {
	ctx := r.Context()
	err := ex.follow(ctx, w, l, cached)
	if err != io.EOF {
		f.outlive(r.URL.Path)
	}
	l.Close(context.Cause(ctx))
	if ex.bodyErr = err; err == io.EOF {
		ex.Outcome = ""
		return
	}
	if ctx.Err() == nil && !r.ProtoAtLeast(1, 1) {
		reset(w)
	}
	panic(http.ErrAbortHandler) // what was written, if anything, must not look whole
}

// endsWithin is how long an upstream may take to end an answer of which all has come.
const endsWithin = time.Second

// outlive lets the computation end by itself if all of the answer has come: the clients of OpenAI
// leave when they have read the last event, before the end of the body.
func (f *flight) outlive(path string) {
	header, body, ok := f.Sent()
	if _, complete := forms.Complete(path, header.Get("Content-Type"), body); ok && complete {
		f.Keep()
		time.AfterFunc(endsWithin, func() { f.GiveUp(answers.ErrNobody) })
	}
}

// follow writes what a computation writes. It returns io.EOF at the end of a whole answer.
func (ex *exchange) follow(
	ctx context.Context, w http.ResponseWriter, l *answers.Listener, cached *answers.Status,
) error {
	status, from, err := l.Header(ctx)
	if err != nil {
		return err
	}
	header := w.Header()
	for name, values := range from {
		header[name] = slices.Clone(values)
	}
	if ex.passed == nil {
		header.Del(fleet.HeaderOutcome)
	}
	setCORS(header, ex.origin)
	if cached != nil {
		cached.Set(header)
	}
	ex.Status = status
	w.WriteHeader(status)
	for {
		part, err := l.Next(ctx)
		if err != nil {
			return err
		}
		if ex.BytesOut == 0 {
			ex.FirstByte = time.Since(ex.start)
		}
		n, err := w.Write(part)
		ex.BytesOut += int64(n)
		if err != nil {
			return err
		}
		flush(w)
	}
}

// flush sends what was written. An error means that the client is gone, or that w is a test's.
func flush(w http.ResponseWriter) { http.NewResponseController(w).Flush() }
