package proxy

import (
	"cmp"
	"hash/maphash"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unique"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// pathFacts serves the verb doctor: a summary of recent requests, without prompt text and without
// clients' addresses.
const pathFacts = ownPrefix + "facts"

// agentMost is how many bytes of a User-Agent header are kept.
const agentMost = 48

// recorder collects the data of pathFacts.
type recorder struct {
	*doctor.Recorder

	mu   sync.Mutex
	seen map[residentKey]seen // models, as listed by the latest poll; guarded by mu
	// looked has the time when each server last listed its loaded models. Models in the first list
	// may have been loaded before the proxy started. Guarded by mu.
	looked map[uint16]time.Time
	// blind counts the requests without a known model, by server; guarded by mu.
	blind map[uint16]blind
	// contexts has the context lengths, in tokens, of models that the last request loaded without
	// asking for a length: the server's defaults. Guarded by mu.
	contexts map[residentKey]int
}

type residentKey struct {
	upstream uint16
	weights  string
}

// seen is a loaded model, as a poll reported it.
type seen struct {
	polled, expires time.Time
	context         int // tokens
}

// blind counts requests to a server without a known model, such as uploads: they may use any model.
type blind struct {
	inFlight int
	ended    time.Time // when the last one ended
}

func newRecorder() *recorder {
	return &recorder{
		Recorder: doctor.NewRecorder(time.Now()), seen: map[residentKey]seen{}, looked: map[uint16]time.Time{},
		blind: map[uint16]blind{}, contexts: map[residentKey]int{},
	}
}

// gone forgets what it knows of a server; another one may get its index.
func (r *recorder) gone(index uint16) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of := func(key residentKey) bool { return key.upstream == index }
	maps.DeleteFunc(r.seen, func(key residentKey, _ seen) bool { return of(key) })
	maps.DeleteFunc(r.contexts, func(key residentKey, _ int) bool { return of(key) })
	delete(r.looked, index)
	delete(r.blind, index)
}

// sent records that a request is sent.
func (r *recorder) sent(b *backend, ex *exchange) {
	if ex.blind == nil && ex.run == nil && ex.Method == http.MethodPost {
		ex.blind = b
		r.blindly(b, 1)
	}
}

func (r *recorder) blindly(b *backend, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blind[b.index] = blind{r.blind[b.index].inFlight + n, time.Now()}
}

// record remembers a finished request if a model answered it.
func (h *Handler) record(r *http.Request, ex *exchange) {
	if ex.blind != nil {
		h.recorder.blindly(ex.blind, -1)
	}
	if ex.run == nil || ex.up == nil || ex.warming != nil || ex.Status == 0 || ex.Status >= 300 {
		return
	}
	if ex.part && !ex.stands && !ex.ending.Loaded { // a client's request is one, unless it loads twice
		return
	}
	q := doctor.Request{
		Asker: doctor.Asker{
			Name: ex.Name, Client: ex.Client,
			Agent: agentOf(r), Endpoint: ex.Endpoint, NumCtx: ex.run.Options.NumCtx(),
		},
		Upstream: ex.up.Name, Model: upstream.DisplayName(ex.key), Weights: ex.run.Options.Model,
		Arrived: ex.start, Sent: ex.start.Add(cmp.Or(ex.sent, ex.Waited+ex.paused)),
		Ended: ex.start.Add(ex.Duration),
		Batch: ex.Priority == schedule.Batch.String(), Lane: ex.Priority != "",
		Foreign: ex.reads == readsForeign,
		Loaded:  ex.ending.Loaded, ByOptions: len(ex.ending.Changes) > 0,
		ByNumCtx:  slices.ContainsFunc(ex.ending.Changes, func(c prefix.Change) bool { return c.Option == "num_ctx" }),
		Restarted: ex.ending.Restarted, Context: ex.run.Context,
		Values: ex.run.Values, Sliding: ex.run.Sliding,
	}
	q.KeepAlive, q.OwnKeepAlive = h.keeps(ex)
	if c := ex.chain; c != nil && c.HasPrompt() {
		q.Bytes, q.Images, q.Conversation = c.Bytes(), c.Images, c.Opening
		if c.Messages > 2 {
			q.Conversation = c.Conversation
			q.Moved = h.recorder.Turns(conversationOf(q.Client, programOf(r, ex), c.Opening), c)
		}
	}
	if e := ex.Savings; e != nil {
		q.Load, q.Prompt, q.Eval = e.Load, e.Prompt, e.Eval
		q.Tokens, q.Generated, q.Reason, q.Truncated = e.Total, e.Generated, string(e.Reason), e.Truncated
		if e.Tokens != nil {
			q.Known, q.Estimated = true, e.Basis != savings.Measured
			q.Reused, q.Evaluated = e.Tokens.Reused, e.Tokens.Evaluated
		}
	}
	h.recorder.Add(q)
}

// recordChange remembers that a user of the proxy's own pages held a model for this long, or
// unloaded it (0), like an empty request of a client. Otherwise the next load would look as if
// another program had caused it.
func (h *Handler) recordChange(r *http.Request, ex *exchange, b *backend, key string, keepAlive time.Duration) {
	h.recorder.Add(doctor.Request{
		Asker: doctor.Asker{
			Name: ex.Name, Client: h.clientShown(r, ex),
			Agent: agentOf(r), Endpoint: ex.Endpoint,
		},
		Upstream: b.Name, Model: upstream.DisplayName(key), Weights: b.runners.Weights(key),
		Arrived: ex.start, Sent: ex.start, Ended: time.Now(), OwnKeepAlive: true, KeepAlive: keepAlive,
	})
}

// keeps returns how long the request's model stays loaded after it (negative if Ollama decides),
// and whether the client asked for that.
func (h *Handler) keeps(ex *exchange) (d time.Duration, own bool) {
	hold := h.Live().KeepAlive.For(ex.key)
	switch {
	case ex.KeepAlive == didKeep && ex.fields.keepAlive == keepAliveSet:
		return ex.fields.duration, true
	case hold == (Hold{}) || ex.reads == readsForeign && h.NoTouch:
		return -1, false
	}
	return hold.Duration, false
}

// conversationOf returns a key for the chats of one program that begin with the same text.
func conversationOf(client string, program, opening uint64) uint64 {
	return maphash.Comparable(seed, [3]any{client, program, opening})
}

// agentOf returns the first word of the User-Agent header, cut to agentMost bytes; "" if it is not
// plain text.
func agentOf(r *http.Request) string {
	agent, _, _ := strings.Cut(r.UserAgent(), " ")
	agent = agent[:min(len(agent), agentMost)]
	if strings.ContainsFunc(agent, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return ""
	}
	return unique.Make(agent).Value() // all requests of one program share the string
}

// outside records that a program outside the proxy loaded a model with different options.
func (r *recorder) outside(b *backend, weights string) {
	r.sign(b, b.modelName(weights), doctor.OutsideOptions)
}

func (r *recorder) sign(b *backend, model string, kind doctor.OutsideKind) {
	r.AddOutside(doctor.Outside{At: time.Now(), Upstream: b.Name, Model: model, Kind: kind})
}

// listed handles the loaded models that a poll found, by weights. It records signs of programs
// outside the proxy: a model that no client here has used, or an expiry that moved while none used
// the model.
func (r *recorder) listed(b *backend, loaded map[string]upstream.Loaded, polled time.Time) {
	if b.residency.always {
		return // residency does not see all requests then
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	looked, blind := r.looked[b.index], r.blind[b.index]
	r.looked[b.index] = polled
	sees := blind.inFlight == 0 && blind.ended.Add(idleDelay).Before(looked)
	for weights, l := range loaded {
		key := residentKey{b.index, weights}
		before, known := r.seen[key]
		if b.residency.asksNoContext(weights) && (len(r.contexts) < residencyModels || r.contexts[key] > 0) {
			r.contexts[key] = l.ContextLength
		}
		r.seen[key] = seen{polled, l.ExpiresAt, l.ContextLength}
		if sees && (known || !looked.IsZero()) {
			r.compare(b, weights, l, before)
		}
	}
	for key, s := range r.seen { // models that are not listed any more
		if key.upstream == b.index && s.polled != polled {
			delete(r.seen, key)
		}
	}
}

// watches reports whether it has compared a server's loaded models since other proxies used it.
func (r *recorder) watches(b *backend) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.looked[b.index].IsZero()
}

// unwatch forgets what a server had loaded: of what other proxies load there nothing follows.
func (r *recorder) unwatch(b *backend) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.looked, b.index)
	maps.DeleteFunc(r.seen, func(key residentKey, _ seen) bool { return key.upstream == b.index })
}

// compare looks for signs of other programs on a loaded model. before is zero if the model was not
// loaded before.
func (r *recorder) compare(b *backend, weights string, l upstream.Loaded, before seen) {
	used, last := b.residency.lastUse(weights)
	name := upstream.DisplayName(upstream.ModelKey(l.Name))
	switch {
	case !used && before == (seen{}):
		r.sign(b, name, doctor.OutsideLoaded)
	case before == (seen{}) || before.context != l.ContextLength: // package runners reports it
	case l.ExpiresAt.Sub(before.expires) > expirySlack && last.Before(before.polled):
		r.sign(b, name, doctor.OutsideUsed)
	}
}

// lastUse reports whether the proxy's clients have used a model, by its weights, and until when
// that use may have moved its expiry.
func (r *residency) lastUse(weights string) (used bool, last time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, ok := r.models.Peek(weights)
	switch {
	case !ok:
		return false, time.Time{}
	case m.inFlight > 0:
		return true, time.Now()
	}
	return true, later(m.checked, later(m.ended, m.keptAt)).Add(idleDelay) // a check may touch it
}

// asksNoContext reports whether the last answered request to a model asked for no context length,
// so that the model has the server's default.
func (r *residency) asksNoContext(weights string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, ok := r.models.Peek(weights)
	return ok && m.statedKnown && m.stated.NumCtx() == 0
}

// facts serves pathFacts.
func (h *Handler) facts(w http.ResponseWriter, r *http.Request, ex *exchange) {
	now := time.Now()
	var from time.Time
	if text := r.URL.Query().Get("last"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d <= 0 {
			ex.Endpoint = pathFacts
			h.refuse(w, r, ex, &refusal{http.StatusBadRequest, "last: want a time such as 6h"})
			return
		}
		from = now.Add(-d)
	}
	f := h.recorder.Facts(now, from)
	keep := h.Live().KeepAlive
	f.Settings = doctor.Settings{
		KeepAlive: keep.String(), KeepAlivePolicy: string(cmp.Or(keep.Policy, IfAbsent)),
		Contexts: h.Contexts != nil,
	}
	if h.Answers != nil {
		st := h.Answers.Stats()
		f.Answers = doctor.Answers{Down: st.Down, Errors: st.Errors}
	}
	if h.Shared != nil {
		f.Shared = h.Shared()
	}
	if h.Fleet != nil {
		f.Fleet = h.fleetFacts(f.Since)
	}
	for _, b := range h.backends() {
		st := b.State()
		u := doctor.Upstream{
			Name: b.Name, URL: b.URL.String(), Up: st.Up, Version: st.Version, Here: b.port != 0,
			Simulated: st.Simulated,
		}
		if st.Err != nil {
			u.Error = st.Err.Error()
		}
		f.Upstreams = append(f.Upstreams, u)
	}
	h.addLoaded(f.Models)
	ex.page(w, pathFacts, http.StatusOK, f)
}

// fleetFacts returns what is known of other proxies.
func (h *Handler) fleetFacts(since time.Time) *doctor.Fleet {
	f := &doctor.Fleet{
		Name: h.Fleet.Name, Settled: h.Fleet.Settled(), Sources: []string{}, Peers: []doctor.Peer{},
		Proxies: []doctor.Proxy{}, Unserved: []doctor.Unserved{}, Incidents: []doctor.Incident{},
	}
	for _, s := range h.Fleet.Sources {
		f.Sources = append(f.Sources, s.String())
	}
	for _, p := range h.Fleet.Peers() {
		f.Peers = append(f.Peers, doctor.Peer{
			Name: p.Name, Address: p.Address, Up: p.Up, Since: p.Since, Stopped: p.Draining,
			Error: p.Error, Reason: doctor.Reason(p.Reason), Servers: p.Servers,
		})
	}
	for _, p := range h.Fleet.Proxies() {
		x := doctor.Proxy{
			Name: p.Name, Address: p.Address, Version: p.Version, Leaving: p.Draining, Hears: p.Hears,
			Servers: []doctor.Listed{},
		}
		for _, s := range p.Servers {
			x.Servers = append(x.Servers, doctor.Listed{
				Name: s.Name, Beside: s.Beside, Owned: s.Owned, Takes: s.Takes,
			})
		}
		f.Proxies = append(f.Proxies, x)
	}
	for _, u := range h.Fleet.Unserved() {
		x := doctor.Unserved{
			Server: u.Server, Owner: u.Owner, Address: u.Address, Away: u.Away, Drained: u.Drained,
			Models: []string{},
		}
		for _, key := range u.Models {
			x.Models = append(x.Models, upstream.DisplayName(key))
		}
		f.Unserved = append(f.Unserved, x)
	}
	for _, i := range h.Fleet.Incidents(since) {
		f.Incidents = append(f.Incidents, doctor.Incident{At: i.At, Peer: i.Peer, Lost: i.Lost, Error: i.Error})
	}
	return f
}

// addLoaded adds how models are loaded: the number of slots, if known, and the default context
// length. If a model has several runners, it takes the one with the most slots.
func (h *Handler) addLoaded(models []doctor.Model) {
	find := func(b *backend, weights string) *doctor.Model {
		name := b.modelName(weights)
		i := slices.IndexFunc(models, func(m doctor.Model) bool { return m.Upstream == b.Name && m.Name == name })
		if i < 0 {
			return &doctor.Model{} // no request has used it in this period
		}
		return &models[i]
	}
	h.recorder.mu.Lock()
	for key, context := range h.recorder.contexts {
		find(h.at(key.upstream), key.weights).DefaultContext = context
	}
	h.recorder.mu.Unlock()
	if h.Lanes == nil {
		return
	}
	for _, x := range h.Lanes.Stats().Runners {
		m := find(h.at(x.Runner.Upstream), x.Runner.Options.Model)
		if x.Lanes > m.Lanes.Slots {
			m.Lanes.Slots, m.Lanes.Learned = x.Lanes, x.Learned
		}
	}
}
