package proxy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Join fills in what a fleet asks of this handler. Call it before Init, with the configuration from
// which Handler.Fleet is made.
func (h *Handler) Join(c *fleet.Config) {
	c.Local, c.Give, c.Taker = h.reported, h.give, h.taker
	c.Owned, c.Learned, c.Ordered = h.owned, h.learned, h.ordered
}

// reported returns what peers are told of this proxy's servers.
func (h *Handler) reported() []fleet.Server {
	loads := map[uint16]schedule.Load{}
	if h.Lanes != nil {
		for _, l := range h.Lanes.Loads() {
			loads[l.Upstream] = l
		}
	}
	var all []fleet.Server
	for _, b := range h.backends() {
		s := fleet.Server{
			Name: b.Name, Takes: b.takes() && !h.finishing.Load(), Models: b.listed(), Loaded: b.inMemory(),
			Drained: b.draining.Load() || b.leaving.Load() || h.finishing.Load(),
		}
		if s.Drained {
			s.InFlight, s.Reached = b.inFlight.Load(), b.answers() && !h.finishing.Load()
		}
		if h.Lanes != nil {
			l := loads[b.index]
			s.Wait, s.Running, s.Waiting = l.Wait.Seconds(), l.Running, l.Waiting
			for _, x := range l.Runners {
				s.Slots = max(s.Slots, x.Lanes)
				if x.Movable > 0 {
					s.Backlogs = append(s.Backlogs, fleet.Backlog{
						Options: x.Options, Movable: x.Movable, Lanes: x.Lanes,
					})
				}
			}
			if !b.foreign.Load() { // only an owner learns
				s.Learned = marshal(h.Lanes.Learned(b.index))
			}
		} else {
			s.Running = int(b.inFlight.Load())
		}
		all = append(all, s)
	}
	return all
}

// listed returns the keys of a server's models, sorted.
func (b *backend) listed() []string {
	st := b.State()
	if last := b.models.Load(); last != nil && last.at.Equal(st.Listed) {
		return last.keys
	}
	now := &modelKeys{st.Listed, slices.Sorted(maps.Keys(st.Digests))}
	b.models.Store(now)
	return now.keys
}

// inMemory returns the keys of the models that a server has loaded.
func (b *backend) inMemory() (keys []string) {
	for _, l := range b.State().Loaded {
		keys = append(keys, upstream.ModelKey(l.Name))
	}
	slices.Sort(keys)
	return keys
}

// modelKeys are the keys of a server's models when they were listed.
type modelKeys struct {
	at   time.Time
	keys []string
}

// give gives waiting requests to a peer's idle server.
func (h *Handler) give(t schedule.Taker) int {
	if h.Lanes == nil {
		return 0
	}
	return h.Lanes.Give(t)
}

// taker returns what one of this proxy's servers could take over.
func (h *Handler) taker(server string, options prefix.Options) (t schedule.Taker, ok bool) {
	b := h.named(server)
	if b == nil || h.Lanes == nil || !b.takes() || !b.serves(options.Model) {
		return t, false
	}
	t, ok = h.Lanes.Taker(b.index, options)
	t.Server = server
	return t, ok
}

// serves reports whether the server has a model with these weights.
func (b *backend) serves(weights string) bool {
	for key := range b.State().Digests {
		if b.runners.Weights(key) == weights {
			return true
		}
	}
	return false
}

// owned is called when this proxy begins or ceases to own a server.
func (h *Handler) owned(server string, on bool) {
	b := h.named(server)
	if b == nil {
		return
	}
	b.foreign.Store(!on)
	if h.Lanes != nil {
		h.Lanes.SetOwned(b.index, on)
	}
}

// ordered is called when a server is drained or resumed at one of the proxies.
func (h *Handler) ordered(server string, drain bool) {
	b := h.named(server)
	if b == nil {
		return
	}
	if h.drain(b, drain); drain && h.Lanes != nil && !b.foreign.Load() {
		h.Lanes.Yield(b.index, h.servedBesides(b))
	}
}

// servedBesides returns the weights of a server's models that another proxy's server has, too,
// under each of their names, and takes requests.
func (h *Handler) servedBesides(b *backend) map[string]bool {
	models := map[string]bool{}
	for key := range b.State().Digests {
		weights := b.runners.Weights(key)
		others, seen := models[weights]
		models[weights] = (others || !seen) && h.Fleet.Serves(key)
	}
	return models
}

// Learned returns what was learned of the servers that this proxy schedules, as JSON, by their names.
func (h *Handler) Learned() map[string][]byte {
	all := map[string][]byte{}
	if h.Lanes == nil {
		return all
	}
	for _, b := range h.backends() {
		if l := h.Lanes.Learned(b.index); !b.foreign.Load() && len(l.Models) > 0 {
			all[b.Name] = marshal(l)
		}
	}
	return all
}

// Learn takes over what Learned has returned, here or in another proxy.
func (h *Handler) Learn(all map[string][]byte) {
	for name, text := range all {
		h.learned(name, text)
	}
}

// learned is called with what the last owner of a server has learned of it.
func (h *Handler) learned(server string, text []byte) {
	var l schedule.Learned
	if b := h.named(server); b != nil && h.Lanes != nil && json.Unmarshal(text, &l) == nil {
		h.Lanes.SetLearned(b.index, l)
	}
}

// alone reports whether no other proxy sends requests to a server: neither as its owner, nor one that
// was, is about to stop, and still answers some.
func (h *Handler) alone(b *backend) bool {
	return h.Fleet == nil || !b.foreign.Load() && !h.Fleet.Leaving(b.Name)
}

// owning returns the servers of a list that this proxy owns; all of them if it owns none, since then a
// peer has taken it for their owner, or there is no other.
func (h *Handler) owning(ex *exchange, list []*backend) []*backend {
	if h.Fleet == nil || !ex.infers() && !ex.unloads() {
		return list
	}
	own := slices.DeleteFunc(slices.Clone(list), func(b *backend) bool { return b.foreign.Load() })
	if len(own) == 0 {
		return list
	}
	return own
}

// client returns who is asking, for fairness.
func (h *Handler) client(r *http.Request, ex *exchange) string {
	if ex.passed != nil {
		return ex.passed.Client
	}
	return h.Trusted.clientOf(r, ex.holder.client())
}

// passedOn sends a request to the proxy that owns the server which it should go to. It returns false
// if this proxy serves the request itself.
func (h *Handler) passedOn(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	switch {
	case h.Fleet == nil || ex.warming != nil || ex.stranger:
		return false
	case ex.passed != nil:
		return h.declined(w, r, ex)
	case ex.away != "" && ex.passing != nil:
		h.refuse(w, r, ex, &refusal{http.StatusRequestEntityTooLarge, fmt.Sprintf("%s: upstream %s is "+
			"another proxy's, and a body that is longer than --max-body is not passed on; send it to that proxy",
			headerUpstream, ex.away)})
		return true
	case ex.flight == nil && surviving(r, ex):
		ex.survives = true // its client will ask this proxy for the answer
		return false
	case ex.away != "":
		return h.pass(w, r, ex, ex.away)
	case ex.passing != nil || ex.cloud || ex.key == "":
		return false
	case !ex.infers() && h.suffices(ex):
		return false
	}
	return h.pass(w, r, ex, "")
}

// declined sends a request back that another proxy has passed on, if it should go elsewhere.
func (h *Handler) declined(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	if ex.moves == 0 && h.mayLeave(ex) && ex.infers() {
		if server, ok := h.Fleet.Astray(h.fleetAsk(ex)); ok {
			return h.moved(w, r, ex, schedule.Elsewhere{Server: server, Moves: 1})
		}
	}
	if ex.away == "" {
		return false
	}
	// The entry thinks that this proxy has that server.
	ex.decline(w, "")
	return true
}

// pass sends a request to a server's owner, or, without the server's name, to the owner of the one
// that it should go to. It returns false if that is this proxy.
func (h *Handler) pass(w http.ResponseWriter, r *http.Request, ex *exchange, server string) bool {
	hop := &relay{ask: h.fleetAsk(ex)}
	hop.choose(h.Fleet, server)
	if hop.known && hop.place.Here() {
		return false
	}
	w = h.heartbeats(w, ex)
	h.waits(ex)
	began := time.Now()
	for {
		if !hop.known {
			if ref := h.returns(r, ex, hop); ref != nil {
				h.refuse(w, r, ex, ref)
				return true
			}
		}
		if hop.place.Here() {
			ex.Waited += time.Since(began)
			return false
		}
		if server == "" && ex.unloading == nil {
			ex.unloading = h.unloadElsewhere(r, ex, hop.place.Peer)
		}
		ex.hop, hop.back = hop, false
		ex.beat.wait()
		h.hops.ServeHTTP(w, r)
		if !hop.back {
			return true
		}
		ex.hop = nil
	}
}

// returns waits for a server with the request's model, if only proxies that are away had it. Without
// a refusal it has set the hop's place, which is this proxy if no other ever had it.
func (h *Handler) returns(r *http.Request, ex *exchange, hop *relay) *refusal {
	limit := time.After(h.TryDuration)
	defer h.awaiting.Add(-1)
	for waiting := h.awaiting.Add(1); ; {
		news := h.Fleet.News()
		if found, ref := h.seek(ex, hop); found || ref != nil {
			return ref
		}
		if waiting > int64(h.Queue) {
			return ex.busy()
		}
		ex.beat.wait()
		var ref func() *refusal
		select {
		case <-news:
			hop.ask.Not = nil // these may be back
		case <-h.closing:
			ref = ex.stopping
		case <-r.Context().Done():
			ref = func() *refusal { return givenUp(r.Context().Err()) }
		case <-limit:
			ref = ex.allAway
		}
		if ex.beat.waited(); ref != nil {
			return ref()
		}
	}
}

// seek looks once for what returns waits for. It refuses a request that nobody serves before somebody
// says so.
func (h *Handler) seek(ex *exchange, hop *relay) (found bool, ref *refusal) {
	if hop.choose(h.Fleet, ""); hop.known {
		return true, nil
	}
	if hop.ask.Server != "" {
		return false, nil
	}
	if h.exists(ex.key) || !h.Fleet.Has(ex.key) {
		return true, nil
	}
	server := h.Fleet.AllDrained(ex.key)
	switch {
	case server == "":
		return false, nil
	case !ex.unloads():
		return false, draining(server)
	}
	hop.choose(h.Fleet, server)
	return hop.known, nil
}

func (ex *exchange) allAway() *refusal {
	ex.header.Set("Retry-After", retryAfter)
	return &refusal{http.StatusServiceUnavailable,
		"the proxies whose ollama has this model have been away for too long (--try-duration); " +
			"GET " + pathFleet + " shows which"}
}

// fleetAsk is what decides where a request goes.
func (h *Handler) fleetAsk(ex *exchange) fleet.Ask {
	ask := fleet.Ask{Model: ex.key}
	if ask.Server = ex.away; ex.only != nil {
		ask.Server = ex.only.Name
	}
	if ex.chain != nil && ex.chain.HasPrompt() {
		ask.Links = ex.chain.Links
	}
	return ask
}

// relay is the way of a request to another proxy.
type relay struct {
	ask   fleet.Ask
	place fleet.Place // this proxy if it is not known
	known bool        // a proxy has a server for it
	tries int
	back  bool // no other proxy has begun with it, and it is to go to the place
}

// choose sets the place: at a certain server if one is named and there, else at any.
func (p *relay) choose(f *fleet.Fleet, server string) {
	ask := p.ask
	ask.Server = cmp.Or(server, ask.Server)
	if p.place, p.known = f.Choose(ask); !p.known && ask.Server != p.ask.Server {
		p.place, p.known = f.Choose(p.ask)
	}
}

// hopsMost is how many proxies are tried at most.
const hopsMost = 8

// errBack means that no other proxy can serve the request at the moment.
var errBack = errors.New("no other proxy can serve the request at the moment")

// hops is the transport of requests that are passed on. If an owner goes away before it has begun,
// or another proxy's server takes the request over, it is sent there.
type hops struct{ h *Handler }

func (t hops) RoundTrip(out *http.Request) (*http.Response, error) {
	h, ex := t.h, out.Context().Value(exchangeKey{}).(*exchange)
	p := ex.hop
	failed := map[string]int{}
	for {
		body, n := ex.whole()
		about := h.about(ex.inbound, ex)
		about.Server, about.Moves = p.place.Server, ex.moves
		res, err := h.Fleet.Pass(out, p.place, about, body, n)
		body.Close()
		if err == nil {
			ex.letGo() // nothing is sent again after this
			return res, nil
		}
		if cause := context.Cause(out.Context()); cause != nil {
			return nil, cause
		}
		if p.tries++; !fleet.Again(err) || p.tries > hopsMost {
			return nil, err
		}
		why, server, from, disowned := RetryPeer, "", p.place.Peer, false
		if e, ok := errors.AsType[schedule.Elsewhere](err); ok {
			why, server, disowned = RetryElsewhere, e.Server, e.Server == ""
			ex.moves = max(ex.moves+1, e.Moves)
		} else if failed[from]++; failed[from] > 1 {
			p.ask.Not = append(p.ask.Not, from) // the first time its connection may have been stale
		}
		ex.Retries = append(ex.Retries, why)
		p.choose(h.Fleet, server)
		// A proxy that no longer owns the server says so in its next report, too.
		for n := 0; disowned && p.place.Peer == from && n < newsMost; n++ {
			h.heard(out.Context())
			p.choose(h.Fleet, server)
		}
		if p.place.Here() {
			return nil, errBack
		}
	}
}

// newsMost is how many reports are waited for until one tells of another owner.
const newsMost = 20

// heard waits until something about the fleet is new, but not for long.
func (h *Handler) heard(ctx context.Context) {
	select {
	case <-h.Fleet.News():
	case <-ctx.Done():
	case <-time.After(busyPause):
	}
}

// about returns what a peer is told of a request.
func (h *Handler) about(r *http.Request, ex *exchange) fleet.About {
	return fleet.About{
		Client: h.client(r, ex), Key: ex.holder.client(), Age: time.Since(ex.start),
	}
}

// others returns the peers that own servers which this proxy does not have, and with a model if one is
// given; none for a request that a peer has passed on.
func (h *Handler) others(ex *exchange, model string) []fleet.Place {
	return h.owners(ex, func(s fleet.Server) bool {
		return h.named(s.Name) == nil && (model == "" || slices.Contains(s.Models, model))
	})
}

// owners returns the peers that own a server which is wanted; none for a request that a peer has
// passed on.
func (h *Handler) owners(ex *exchange, wanted func(fleet.Server) bool) []fleet.Place {
	if h.Fleet == nil || ex.passed != nil {
		return nil
	}
	return h.Fleet.Others(wanted)
}

// suffices reports whether this proxy has a server for a request that evaluates nothing. That needs no
// owner, only a server that has the model; but only owners unload.
func (h *Handler) suffices(ex *exchange) bool {
	if !ex.unloads() {
		return h.exists(ex.key)
	}
	return slices.ContainsFunc(h.backends(), func(b *backend) bool {
		return !b.foreign.Load() && b.State().Has(ex.key) && (ex.only == nil || ex.only == b)
	})
}

// unloaders returns the peers that own a server with the request's model, but for one of them. Only
// the owner may unload it: it knows what is loaded there, and for how long, by what it has sent.
func (h *Handler) unloaders(ex *exchange, but string) []fleet.Place {
	return slices.DeleteFunc(h.owners(ex, func(s fleet.Server) bool {
		b := h.named(s.Name)
		return slices.Contains(s.Models, ex.key) || b != nil && b.State().Has(ex.key)
	}), func(p fleet.Place) bool { return p.Peer == but })
}

// unloadAt passes a request that unloads a model on to the peer that owns other servers.
func (h *Handler) unloadAt(
	ctx context.Context, r *http.Request, ex *exchange, to fleet.Place, text []byte,
) {
	out := r.Clone(ctx)
	ex.stripHop(out.Header)
	out.Header.Del("Accept-Encoding")
	res, err := h.Fleet.Pass(out, to, h.about(r, ex), bytes.NewReader(text), int64(len(text)))
	if err != nil {
		h.Log.Warn("a model could not be unloaded", "peer", to.Name, "model", ex.key, "err", err)
		return
	}
	res.Body.Close()
}

// Why a request that was passed on was sent to another proxy.
const (
	RetryPeer      = "peer"      // its owner went away before it began
	RetryElsewhere = "elsewhere" // another proxy's server took it over
)

// whole returns the request's body, and its length.
func (ex *exchange) whole() (io.ReadCloser, int64) {
	if ex.body == nil {
		return http.NoBody, 0
	}
	return ex.body.open(), int64(len(ex.body.data))
}

// rewriteHop builds the request to a peer: the same one, without what only this proxy has to know.
func (h *Handler) rewriteHop(pr *httputil.ProxyRequest) {
	ex := pr.In.Context().Value(exchangeKey{}).(*exchange)
	ex.inbound = pr.In
	u := *pr.In.URL
	pr.Out.URL = &u
	keepForwarded(pr)
	ex.stripHop(pr.Out.Header)
	pr.Out.Header.Del("Expect") // the body has already come
	if ex.survives {
		pr.Out.Header.Del(headerSurvive)
		pr.Out.Header.Del("Prefer")
	}
	if ex.beat != nil {
		pr.Out.Header.Del("Accept-Encoding") // a heartbeat may begin the answer, without an encoding
	}
}

func (h *Handler) modifyHop(res *http.Response) error {
	ex := res.Request.Context().Value(exchangeKey{}).(*exchange)
	ex.beat.waited()
	h.waited(ex)
	ex.unloaded()
	switch o := Outcome(res.Header.Get(fleet.HeaderOutcome)); o {
	case Refused, Unreachable, UpstreamError: // the owner itself has answered
		ex.Outcome = o
	}
	res.Header.Del(fleet.HeaderOutcome)
	if ex.beat.begun() {
		ex.asEvent(res)
	}
	ex.Status, ex.Peer = res.StatusCode, ex.hop.place.Name
	ex.served = res.Header.Get(headerUpstream)
	ex.Simulated = res.Header[upstream.SimulatedHeader] != nil
	setCORS(res.Header, ex.origin)
	if res.Header["Content-Type"] == nil {
		ex.header["Content-Type"] = nil // otherwise net/http would guess one
	}
	res.Body = &hopTap{res.Body, ex}
	return nil
}

// hopTap is the body of a peer's answer on its way to the client. It counts.
type hopTap struct {
	io.ReadCloser
	ex *exchange
}

func (t *hopTap) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	if n > 0 && t.ex.BytesOut == 0 {
		t.ex.FirstByte = time.Since(t.ex.start)
	}
	t.ex.BytesOut += int64(n)
	if err != nil {
		t.ex.bodyErr = err // io.EOF is a good end
	}
	return n, err
}

// hopFailed answers a request that could not be passed on.
func (h *Handler) hopFailed(w http.ResponseWriter, r *http.Request, err error) {
	ex := r.Context().Value(exchangeKey{}).(*exchange)
	ex.beat.waited()
	switch {
	case errors.Is(err, errBack):
		ex.hop.back = true
	case r.Context().Err() != nil:
		ex.Outcome = ClientGone
		panic(http.ErrAbortHandler) // nothing was written, and must not become an empty 200
	case errors.Is(err, fleet.ErrLost):
		h.Log.Warn("a request was lost with the proxy that served it", "upstream", ex.hop.place.Server,
			"err", err)
		ex.Outcome = Unreachable
		ex.reply(w, r, &refusal{http.StatusBadGateway, "the proxy that served this request went away; " +
			"ollama may have begun with it, so it was not sent again: send it again if that does no harm"})
	default:
		h.Log.Debug("passing a request on failed", "upstream", ex.hop.place.Server, "err", err)
		ex.header.Set("Retry-After", retryAfter)
		h.refuse(w, r, ex, &refusal{http.StatusServiceUnavailable,
			"none of the proxies of this fleet takes the request at the moment; try again"})
	}
}

// moved handles a request that another proxy is to serve, while it waited here. It returns false
// if this proxy serves it after all.
func (h *Handler) moved(
	w http.ResponseWriter, r *http.Request, ex *exchange, e schedule.Elsewhere,
) bool {
	ex.leaves, ex.moves = nil, e.Moves
	if e.Server != "" { // what begins alike is to follow
		h.Fleet.Sent(e.Server, ex.chain.Links)
	}
	if ex.passed != nil {
		ex.decline(w, e.Server)
		return true
	}
	return h.pass(w, r, ex, e.Server)
}

// decline tells the proxy that passed the request on that this one does not serve it: a server of
// another one takes it over, or, without a name, that proxy chooses again.
func (ex *exchange) decline(w http.ResponseWriter, server string) {
	ex.Status, ex.Outcome = http.StatusMisdirectedRequest, Moved
	ex.passed.Decline(w, schedule.Elsewhere{Server: server, Moves: ex.moves})
}

// mayLeave reports whether another proxy may serve the request while it waits here: it can be sent
// there as it came, and nobody else waits for its answer.
func (h *Handler) mayLeave(ex *exchange) bool {
	return h.Fleet != nil && ex.body != nil && !ex.fixed && !ex.unread && !ex.part && ex.flight == nil &&
		ex.only == nil && ex.warming == nil
}

// awayServer returns the name of a peer's server that a client wants; "" if it is none.
func (h *Handler) awayServer(name string) string {
	if h.Fleet == nil || !slices.ContainsFunc(h.Fleet.Owners(), func(o fleet.Owner) bool {
		return o.Server == name && !o.Here
	}) {
		return ""
	}
	return name
}

// tellSent tells the peers where a prompt is sent.
func (h *Handler) tellSent(ex *exchange) {
	if h.Fleet != nil && ex.chain != nil && ex.chain.HasPrompt() && ex.grant != nil {
		h.Fleet.Sent(ex.up.Name, ex.chain.Links)
	}
}

const pathFleet = ownPrefix + "fleet"

// fleetPage is the content of pathFleet.
type fleetPage struct {
	Name     string        `json:"name"`
	Draining bool          `json:"draining,omitempty"`
	Peers    []fleet.Peer  `json:"peers"`
	Servers  []fleet.Owner `json:"upstreams"`
	Counts   fleet.Counts  `json:"counts"`
}

func (h *Handler) fleetPage() fleetPage {
	return fleetPage{
		Name: h.Fleet.Name, Draining: h.Fleet.Draining(), Peers: h.Fleet.Peers(),
		Servers: h.Fleet.Owners(), Counts: h.Fleet.Counts(),
	}
}

// pageFleetPart is the page's data about other proxies; nil if there are none.
type pageFleetPart struct {
	Name     string        `json:"name"` // of this proxy
	Draining bool          `json:"draining,omitempty"`
	Peers    []pagePeer    `json:"peers"`
	Servers  []fleet.Owner `json:"servers"`
}

// pagePeer is another proxy.
type pagePeer struct {
	Name     string `json:"name,omitempty"` // "" if it was never heard of
	Address  string `json:"address"`
	Up       bool   `json:"up"`
	Draining bool   `json:"draining,omitempty"`
	Since    int64  `json:"since"` // of being up, or away
	Error    string `json:"error,omitempty"`
}

func (h *Handler) pageFleet() *pageFleetPart {
	if h.Fleet == nil {
		return nil
	}
	p := &pageFleetPart{
		Name: h.Fleet.Name, Draining: h.Fleet.Draining(), Peers: []pagePeer{}, Servers: h.Fleet.Owners(),
	}
	for _, x := range h.Fleet.Peers() {
		p.Peers = append(p.Peers, pagePeer{
			Name: x.Name, Address: x.Address, Up: x.Up, Draining: x.Draining,
			Since: x.Since.UnixMilli(), Error: x.Error,
		})
	}
	return p
}

// peersAway returns the problems with other proxies.
func (h *Handler) peersAway() (list []problem) {
	if h.Fleet == nil {
		return nil
	}
	for _, p := range h.Fleet.Peers() {
		if !p.Up && p.Error != "" {
			list = append(list, problem{"peer", isWarning,
				fmt.Sprintf("The proxy %s does not answer: %s.", strings.TrimSpace(p.Name+" at "+p.Address), strings.TrimSpace(p.Error)),
				"Start it, or correct --peers. Meanwhile this fleet works without it; models that only its servers have are waited for (--try-duration)."})
		}
	}
	return list
}
