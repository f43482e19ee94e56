// Package proxy is the HTTP surface. It forwards every request to one of a few Ollama servers,
// leaves requests and answers as they are, and adds the one thing that clients leave out:
// keep_alive. It owns the routes, the life of one request (handler.go, top to bottom), the edits of
// a body, the checks of Host, Origin and API keys, and the record of how long models stay loaded.
// Package schedule decides the order of requests and their servers. No prompt is kept.
package proxy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/livepage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// The proxy's own pages. Ollama has nothing below this path.
const (
	ownPrefix  = "/_cacheproxy/"
	pathHealth = ownPrefix + "health"
	pathReady  = ownPrefix + "ready"

	pathUpstreams = ownPrefix + "upstreams/"
	// PathMetrics serves the operator's monitoring.
	PathMetrics = "/metrics"
)

// DefaultMaxBody is the default of Handler.MaxBody, in bytes.
const DefaultMaxBody = 64 << 20

// Handler forwards requests to Ollama servers. Fill in the fields, call Init, and keep Run running
// while it serves.
type Handler struct {
	// Upstreams are the servers at the start; AddUpstream and RemoveUpstream change them later.
	// Requests that name no model go to the first.
	Upstreams []*upstream.Server
	Transport http.RoundTripper // if nil, NewTransport()
	KeepAlive KeepAlive
	// StableHeads are the edits of prompts that the operator enabled.
	StableHeads StableHeads
	NumCtx      NumCtx // how the num_ctx of requests is treated
	// NoTouch disables the proxy's own requests that set keep_alive for models used through /v1.
	NoTouch bool
	MaxBody int64 // bytes of a body that are read to be parsed; if zero, DefaultMaxBody
	Memory  int64 // bytes for all buffered bodies together; if zero, no limit
	// BodyTimeout is how long a request's body may make no progress. If zero, there is no limit.
	BodyTimeout time.Duration
	// UpstreamSilence is how long an upstream may send nothing before the proxy gives the request
	// up. If zero, there is no limit.
	UpstreamSilence time.Duration
	// Heartbeat is how long a streamed /v1 request waits before the proxy begins its answer, with
	// regular comments, so that clients with a timeout for the first byte stay. If zero, it never
	// does.
	Heartbeat time.Duration
	// Queue limits the requests without a lane that wait for absent servers. If zero,
	// schedule.DefaultLimit.
	Queue int

	Guard   Guard
	Trusted *TrustedProxies // proxies whose word on the client's address is believed; if nil, none
	Metrics http.Handler    // serves PathMetrics; if nil, that is forwarded like any other path
	Log     *slog.Logger    // if nil, nothing is logged

	// Limiter counts requests of API keys over several proxies; if nil, this proxy counts its own.
	Limiter Limiter

	// Batches serves /v1/files and /v1/batches; if nil, these are forwarded like any other path.
	// Owner tells it who asks.
	Batches http.Handler

	Ledger      *savings.Ledger     // if nil, prompts are neither fingerprinted nor accounted for
	Lanes       *schedule.Scheduler // decides when and where to send; may be nil with one upstream
	Contexts    *contexts.Manager   // if nil, contexts are neither stored nor attached
	Prewarm     *Prewarm            // requests whose prompts are kept warm; if nil, none
	ShowPrompts bool                // the page of the last requests has excerpts of their bodies
	Version     string              // of this program, for the page
	Price       float64             // of a million evaluated prompt tokens; 0: none on the page

	Answers      answers.Store // keeps what need not be computed twice; if nil, nothing is kept
	AnswersBytes int64         // the limit of Answers, which the proxy's pages show
	AnswersAge   time.Duration // how long they are good; 0: for ever
	CacheAnswers CacheAnswers  // which answers of chats and generations are kept
	// CacheEmbeddings says of which models the vectors are kept.
	CacheEmbeddings CacheEmbeddings
	// AnswersShared lets clients with different API keys have each other's kept answers. They could
	// then find out whether someone has asked a question before.
	AnswersShared bool
	// ReplayPaced replays a kept stream at the pace at which it was recorded, rather than at once.
	ReplayPaced bool

	// TryDuration is how long requests wait for a peer of the fleet that is away and that alone has
	// their model. (How long they wait for a server is that server's.) Zero means not at all.
	TryDuration time.Duration
	// Fleet are the other proxies that this one works with; nil: none. See Join.
	Fleet *fleet.Fleet
	// Shared, if non-nil, tells the verb doctor about what is shared with other proxies.
	Shared func() doctor.Shared

	// Done, if non-nil, is called after each request. Touched, if non-nil, is called after each
	// keep_alive that the proxy set, or failed to set, in the background.
	Done    func(Exchange)
	Touched func(model string, err error)
	// Forgotten, if non-nil, is called when a removed server has finished its requests.
	Forgotten func(name string)

	inForce atomic.Pointer[Live] // the last argument of Change; nil: the fields above
	memory  *memory
	// passedMemory is for what peers pass on: if two proxies waited for one memory each, which is full
	// of what they pass on to each other, they would wait for ever.
	passedMemory *memory
	decoder      *zstd.Decoder
	decoding     sync.Mutex
	inFlight     atomic.Int64
	waiting      atomic.Int64 // waiting requests, see Waiting
	awaiting     atomic.Int64 // … of these, the ones without a lane that wait for an absent server

	leaving   atomic.Bool   // set by Leave
	finishing atomic.Bool   // set by Finish
	closing   chan struct{} // closed by Close
	closeOnce sync.Once
	news      atomic.Pointer[chan struct{}] // closed after the next poll of any upstream

	servers    atomic.Pointer[servers]
	changing   changing
	timeline   *timeline
	live       *livepage.Hub
	prewarming *prewarmer // if nil, no prompt is kept warm
	recorder   *recorder  // the source of pathFacts
	computing  computing  // answers that several clients may read
	vectors    vectors    // … and what they have embedded
	kept       keptAnswers
	forward    *httputil.ReverseProxy
	hops       *httputil.ReverseProxy // to other proxies
	prefixes   *prefix.Reader

	lingers      time.Duration
	refreshEvery time.Duration
	refreshing   sync.Mutex
	refreshed    time.Time // guarded by refreshing
}

// Exchange is one request and the outcome of it.
type Exchange struct {
	Method   string
	Path     string
	Endpoint string // the path as a label: one of a bounded set
	Name     string // of the API key that the client showed; "" if that has none
	Client   string // the hashed client, as on the page of the queue; "" for the proxy itself
	Model    string // as the client wrote it; "" if none was read, "(invalid)" if not a name
	Status   int    // zero if the client got no answer
	Begun    bool   // a heartbeat began the answer: the client saw a 200, whatever Status is
	Outcome  Outcome

	Duration  time.Duration
	FirstByte time.Duration // from the start to the answer's first byte; 0 if none came
	BytesIn   int64         // of the request's body, as the client sent it
	BytesOut  int64         // of the answer's body

	KeepAlive string // injected, kept, raised or forced; "" if the request cannot have a keep_alive
	Unedited  string // why a body that is usually read was not: see the Unedited… constants
	// Heads are the edits that Handler.StableHeads made to the prompt, if any.
	Heads []HeadEdits
	// NumCtx is how the request's context length was treated, stated or not: pinned, raised, kept
	// or unknown; "" if there was nothing to decide.
	NumCtx string

	Upstream  string   // the name of the server that got the request; "" for none, or for all
	Simulated bool     // that server is simulated: its answers and figures are made up
	Peer      string   // the name of the proxy that it was passed on to; "" for none
	Passed    bool     // another proxy passed it on to this one, and counts it as a request
	Retries   []string // why it went to another server, or again: see the Retry… constants

	Savings *savings.Entry // nil if there is nothing to account for

	// Prewarm is the outcome of a request of the proxy's own that was to warm a prompt: see the
	// Prewarm… constants. It is "" for all other requests.
	Prewarm string

	// Cache tells what was not computed, or was not looked for; nil if the request is none whose
	// answer may be kept.
	Cache *CacheUse

	Priority string        // interactive, normal or batch; "" if the request needed no lane
	Waited   time.Duration // for a lane
}

// Outcome is the way an exchange ended.
type Outcome string

const (
	OK            Outcome = "ok"             // answered in full with a status below 400
	ClientError   Outcome = "client_error"   // answered 4xx by the upstream
	UpstreamError Outcome = "upstream_error" // answered 5xx by the upstream
	Unreachable   Outcome = "unreachable"    // the upstream did not answer: 502
	Aborted       Outcome = "aborted"        // the upstream's answer broke off
	ClientGone    Outcome = "client_gone"    // the client left before the end
	Drained       Outcome = "drained"        // cut off at the end of a graceful stop
	Refused       Outcome = "refused"        // by the proxy
	Own           Outcome = "own"            // one of the proxy's own pages
	Moved         Outcome = "moved"          // passed on by a peer, and given to another proxy's server
)

// ErrDrained is the cause for cancelling the server's base context once a graceful stop has lasted
// long enough.
var ErrDrained = errors.New("cut off while stopping")

// Why a body was forwarded unread or unedited.
const (
	UneditedTooLarge = "too_large" // longer than MaxBody
	UneditedEncoded  = "encoded"   // it has a Content-Encoding and is not JSON as it stands
	UneditedNotJSON  = "not_json"  // it is not a JSON object
)

// decodedMost is Ollama's own limit for a compressed body, in bytes after decompression.
const decodedMost = 20 << 20

// invalidModel replaces anything in logs and metrics that is no model name: it may be of any
// length.
const invalidModel = "(invalid)"

// exchange is an Exchange in progress.
type exchange struct {
	Exchange
	start time.Time

	header    http.Header         // of the answer to the client
	origin    string              // for CORS headers
	route                         // the meaning of its path
	holder    *keyHolder          // the owner of the client's API key; nil without a key
	stranger  bool                // it shows no API key although one is required: see keyless
	spent     []string            // request headers that only the proxy reads
	members   [12]jsonscan.Member // of the body; longer lists are allocated
	arriving  *arriving           // nil if there is no body, or no limit for it
	body      *body               // nil if the body passes through, is absent, or was released
	beginning io.ReadCloser       // what was read of a body before it was let through
	passing   *passing            // nil if the body was read, or is absent
	fields    fields              // of the body
	key       string              // upstream.ModelKey of the model that the body names; "" for none
	cloud     bool                // a remote service runs that model
	unread    bool                // it asks for a prompt's evaluation; the rest could not be read
	only      *backend
	away      string              // the only server that may answer it, which is another proxy's; or ""
	passed    *fleet.Passed       // how another proxy passed it on; nil if it did not
	survives  bool                // its answer is to go on without its client, from wherever it comes
	hop       *relay              // its way to another proxy; nil if it is not passed on
	served    string              // the server from which that proxy's answer comes; "" if it says none
	leaves    *schedule.Elsewhere // set when another proxy is to serve it, after it has waited here
	moves     int                 // how often that was so
	stops     bool                // it would have to wait while the proxy stops
	fixed     bool                // it may have been sent to a server, and leaves for no other proxy
	up        *backend            // the chosen server; nil before the choice
	unloading chan struct{}       // closed when other servers have unloaded the model; or nil
	began     bool                // it was sent to up, and has not ended
	waiting   bool                // it is counted in Handler.waiting
	paused    time.Duration       // other waits than Waited: for memory, and between retries
	gateway   bool                // the answer probably is a gateway's: see byGateway
	gaveUp    bool                // after Handler.UpstreamSilence
	silence   *silence            // gives the request up when the server is silent; if nil, never
	beat      *heartbeat          // nil if the request has none
	tried     []*backend          // servers that did not answer it
	inbound   *http.Request       // as the forwarder got it
	edits     []edit              // of the body, in order
	fit       fit                 // the change of its num_ctx
	run       *runners.Request    // nil if it needs no model loaded here
	use       use

	chain   *prefix.Chain
	spend   *savings.Request // nil if the ledger does not account for it
	grant   *schedule.Grant  // nil if it holds no lane
	context *contexts.Use    // nil if no context is to be stored or attached
	loaded  runners.Ending   // of the load that an attached context needed before it was sent
	ending  runners.Ending   // the end of its load, once that has ended
	blind   *backend         // the server that got it without a known model: see blind
	sent    time.Duration    // from the start until it was sent
	warming *warming         // set if the proxy itself sends it, to warm a prompt; else nil
	asks    []*backend       // the servers that prewarmer.asked got last
	streams bool             // the answer is a stream of events
	dialect savings.Dialect
	answer  *savings.Reader // nil if the answer is not parsed
	excerpt string
	shown   *onWay // its entry on the page; nil if it was not sent or is not shown
	said    string // why the proxy refused it

	part   bool        // it is one of those that a client's request for vectors is made of
	stands bool        // of a part: the recorder counts it as its client's request
	stood  atomic.Bool // of a client's request: one of its parts stands for it
	flight *flight     // the computation whose answer it writes; nil: it answers its client itself

	loadedFirst time.Duration // how long loadFirst took to load its model

	in      atomic.Int64 // bytes of the request's body so far; becomes BytesIn
	bodyErr error        // how reading the answer's body ended; nil if it was not read to the end
}

type exchangeKey struct{}

// NewTransport returns a transport for an Ollama server. It waits as long as a model needs to load,
// keeps many connections, and never asks for compression unless the client did.
func NewTransport() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	var t *http.Transport
	t = &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, addr)
			if errors.Is(err, syscall.EMFILE) { // idle connections use up the descriptors
				t.CloseIdleConnections()
				conn, err = dialer.DialContext(ctx, network, addr)
			}
			if tcp, ok := conn.(*net.TCPConn); ok {
				return upstreamConn{tcp}, nil
			}
			return conn, err
		},
		DisableCompression:    true,
		MaxIdleConnsPerHost:   1024,
		IdleConnTimeout:       90 * time.Second,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
	}
	return t
}

// copyBuffer is the size of the buffer for copying bodies, in bytes. Writes of a stream up to this
// size are not split.
const copyBuffer = 32 << 10

// Init prepares the handler. It starts nothing.
func (h *Handler) Init() {
	if h.Log == nil {
		h.Log = slog.New(slog.DiscardHandler)
	}
	if h.Transport == nil {
		h.Transport = NewTransport()
	}
	if h.MaxBody == 0 {
		h.MaxBody = DefaultMaxBody
	}
	if h.Done == nil {
		h.Done = func(Exchange) {}
	}
	if h.Touched == nil {
		h.Touched = func(string, error) {}
	}
	if h.Forgotten == nil {
		h.Forgotten = func(string) {}
	}
	if h.Queue == 0 {
		h.Queue = schedule.DefaultLimit
	}
	h.memory, h.passedMemory = newMemory(h.Memory), newMemory(h.Memory)
	h.memory.waits, h.passedMemory.waits = h.waitForMemory, h.waitForMemory
	h.closing = make(chan struct{})
	news := make(chan struct{})
	h.news.Store(&news)
	var err error
	if h.decoder, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(decodedMost)); err != nil {
		panic(err) // impossible: the options are valid
	}
	h.lingers, h.refreshEvery = lingers, refreshEvery
	h.prefixes = prefix.NewReader()
	h.timeline = newTimeline()
	h.live = livepage.NewHub(overview{h}, timelineMost)
	h.prewarming = newPrewarmer(h)
	h.recorder = newRecorder()
	h.servers.Store(&servers{})
	for i, s := range h.Upstreams {
		h.admitBackend(uint16(i), s, false)
	}
	if h.Contexts != nil {
		h.Contexts.Told = h.engineFound
	}
	h.forward = &httputil.ReverseProxy{
		Rewrite: h.rewrite, ModifyResponse: h.modifyResponse, ErrorHandler: h.forwardFailed,
		Transport: attempts{h},
	}
	h.hops = &httputil.ReverseProxy{
		Rewrite: h.rewriteHop, ModifyResponse: h.modifyHop, ErrorHandler: h.hopFailed,
		Transport: hops{h},
	}
	for _, p := range []*httputil.ReverseProxy{h.forward, h.hops} {
		p.FlushInterval = -1 // pass on every write of the other side at once
		p.BufferPool = newBufferPool()
		p.ErrorLog = log.New(io.Discard, "", 0) // errors are in the log line of the request
	}
}

// Run does the background work until ctx ends: it keeps models loaded and prompts warm.
func (h *Handler) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(h.tendAll(ctx))
	wg.Go(func() { h.Contexts.Run(ctx) })
	wg.Go(func() { h.prewarming.run(ctx) })
	if h.Fleet != nil {
		wg.Go(func() { h.Fleet.Run(ctx) })
	}
	if h.Answers != nil {
		wg.Go(func() { h.tries(ctx) })
	}
	wg.Wait()
	h.CutOff()
	h.computing.wg.Wait()
}

// Held returns how many bytes the buffered bodies take.
func (h *Handler) Held() int64 { return h.memory.held.Load() + h.passedMemory.held.Load() }

// InFlight returns how many requests are in progress.
func (h *Handler) InFlight() int64 { return h.inFlight.Load() }

// ServeHTTP is the life of one request.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.inFlight.Add(1)
	ex := h.arrives(w, r)
	ctx, end := r.Context(), func() {}
	if ex.route.outlives() {
		ctx, end = outlive(ctx, h.closing, h.lingers)
	}
	defer end()
	// A copy: after an early answer, net/http looks at its own request's body to decide whether to
	// read on.
	r = r.WithContext(context.WithValue(ctx, exchangeKey{}, ex))
	defer func() { // runs in a panic, too: http.ErrAbortHandler
		if ex.flight == nil { // otherwise its computation finishes it
			h.finish(ex, w, r)
		}
	}()

	scarce := r.Context().Value(scarceKey{}) != nil
	if scarce || h.leaving.Load() {
		w.Header().Set("Connection", "close")
	}
	if done := h.admit(w, r, ex); done {
		return
	}
	if h.ours(w, r, ex) {
		return
	}
	if scarce {
		h.refuse(w, r, ex, ex.noDescriptor())
		return
	}
	ex.takes(r)
	ref := cmp.Or(h.tooFast(r.Context(), ex), h.only(r, ex))
	if ref == nil && h.merge(w, r, ex) {
		return
	}
	if ref == nil {
		ref = h.read(r, ex)
	}
	if ref != nil {
		h.refuse(w, r, ex, ref)
		return
	}
	switch {
	case h.passedOn(w, r, ex):
	case ex.beat.begun(): // nothing else can be written any more than what a server answers
		h.serve(w, r, ex)
	default:
		h.answer(w, r, ex)
	}
}

// arrives returns the exchange of a request that has just come.
func (h *Handler) arrives(w http.ResponseWriter, r *http.Request) *exchange {
	rt := routeOf(r)
	ex := &exchange{start: time.Now(), header: w.Header(), route: rt, Exchange: Exchange{Method: r.Method, Path: r.URL.Path, Endpoint: rt.label}}
	if ex.passed = fleet.PassedOf(r.Context()); ex.passed != nil {
		ex.start, ex.moves, ex.Passed = ex.start.Add(-ex.passed.Age), ex.passed.Moves, true
	}
	if limit := h.Live().BodyTimeout; limit > 0 && ex.passed == nil && r.Body != nil && r.Body != http.NoBody {
		ex.arriving = &arriving{ReadCloser: r.Body, conn: http.NewResponseController(w), limit: limit}
	}
	ex.warming, _ = r.Context().Value(warmingKey{}).(*warming)
	return ex
}

// answer answers a request whose body has been read: with what is kept, or by forwarding it.
func (h *Handler) answer(w http.ResponseWriter, r *http.Request, ex *exchange) {
	if !h.embedded(w, r, ex) && !h.recall(w, r, ex) {
		h.serve(w, r, ex)
	}
}

// serve waits until a request whose body has been read may be sent, and forwards it.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request, ex *exchange) {
	if ex.survives && h.passedOn(w, r, ex) {
		return
	}
	w = h.heartbeats(w, ex)
	ref := h.wait(r, ex)
	for ex.leaves != nil {
		if h.moved(w, r, ex, *ex.leaves) {
			return
		}
		ref = h.wait(r, ex)
	}
	if ref == nil {
		ref = h.loadFirst(r, ex)
	}
	if ref != nil {
		h.refuse(w, r, ex, ref)
		return
	}
	r, over := h.givesUp(r, ex)
	defer over()
	ex.unloading = h.unloadElsewhere(r, ex, "")
	h.prepare(r.Context(), ex)
	h.begin(ex)
	h.forward.ServeHTTP(w, r)
}

// takes replaces the request's body by the one that the proxy has read.
func (ex *exchange) takes(r *http.Request) {
	if ex.arriving != nil {
		r.Body = ex.arriving
	}
	if ex.stranger {
		r.Body, r.ContentLength, r.TransferEncoding, r.Trailer = http.NoBody, 0, nil, nil
	}
}

// givesUp makes the request end when its upstream is silent for too long. The caller calls over
// when the request has ended.
func (h *Handler) givesUp(r *http.Request, ex *exchange) (bounded *http.Request, over func()) {
	limit := h.Live().UpstreamSilence
	if limit == 0 {
		return r, func() {}
	}
	ctx, giveUp := context.WithCancelCause(r.Context())
	timer := time.AfterFunc(limit, func() { giveUp(errSilent) })
	ex.silence = &silence{timer, limit}
	return r.WithContext(ctx), func() { giveUp(nil) }
}

// lingers is how long a request goes on without its client: see route.outlives.
const lingers = 30 * time.Second

// outlive returns a context that ends this much later than ctx, or at the end of a drain.
func outlive(ctx context.Context, closing <-chan struct{}, by time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if context.Cause(ctx) != ErrDrained {
			select {
			case <-longer.Done():
			case <-closing:
			case <-time.After(by):
			}
		}
		cancel(context.Cause(ctx))
	})
	return longer, func() {
		stop()
		cancel(nil)
	}
}

// admit checks Host, Origin and API key, and answers preflights.
func (h *Handler) admit(w http.ResponseWriter, r *http.Request, ex *exchange) (done bool) {
	if ex.passed != nil { // the proxy that passed it on has checked it
		if ex.holder = h.Guard.Keys.holder(ex.passed.Key); ex.holder != nil {
			ex.Name = ex.holder.name
		}
		return false
	}
	h.identify(r, ex)
	ex.stranger = h.Guard.Keys != nil && ex.holder == nil && ex.warming == nil
	if ex.holder != nil {
		ex.Name = ex.holder.name
	}
	guard := h.guard()
	ref := cmp.Or(h.loop(r), h.claims(r), guard.host(r))
	if ref == nil {
		ex.origin, ref = guard.origin(r)
	}
	if ref == nil && r.Method == http.MethodOptions && (ex.origin != "" || localName(hostname(r.Host))) {
		ex.Status, ex.Outcome = http.StatusNoContent, Own
		preflight(w, ex.origin, h.Guard.Keys != nil)
		return true
	}
	if ref == nil {
		ref = ex.keyed(r)
	}
	if ref != nil {
		h.refuse(w, r, ex, ref)
	}
	return ref != nil
}

// claims refuses a client that poses as another proxy.
func (h *Handler) claims(r *http.Request) *refusal {
	if h.Fleet == nil || !fleet.Claims(r.Header) {
		return nil
	}
	return &refusal{http.StatusForbidden, "headers that begin with X-Cacheproxy-Peer are only for the proxies of a fleet, at their own address (--peer-listen)"}
}

// keyed refuses a request without an API key that may send it.
func (ex *exchange) keyed(r *http.Request) *refusal {
	switch {
	case ex.stranger && !keyless(r):
		return &refusal{http.StatusUnauthorized, "a valid API key is needed: send it as 'Authorization: Bearer KEY' (the keys are in the file that ollama-cacheproxy was started with: --api-keys-file)"}
	case ex.admins:
		return ex.notAdmin()
	}
	return nil
}

// loop refuses requests that come back to this proxy from its upstreams, as its own requests
// reveal. It refuses everything while all upstreams lead back.
func (h *Handler) loop(r *http.Request) *refusal {
	instance := r.Header.Get(upstream.InstanceHeader)
	var back *backend
	list := h.backends()
	all := len(list) > 0
	for _, b := range list {
		if instance != "" && b.Instance == instance {
			back = b
			b.looped.Store(true)
		}
		all = all && b.looped.Load()
	}
	if back == nil && !all || strings.HasPrefix(r.URL.Path, ownPrefix) || r.URL.Path == PathMetrics {
		return nil
	}
	if back == nil {
		back = list[0]
	}
	return loops(back)
}

func loops(b *backend) *refusal {
	return &refusal{http.StatusLoopDetected, fmt.Sprintf("requests to %s come back to this ollama-cacheproxy; point --upstream to Ollama itself", b.URL)}
}

func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, ex *exchange, ref *refusal) {
	// A peer that passed the request on can send it to another proxy, since this one never will to a
	// server. (What a computation writes is not for that peer alone.)
	if ex.passed != nil && ex.flight == nil &&
		(ex.stops || errors.Is(context.Cause(r.Context()), fleet.ErrForgotten)) {
		ex.decline(w, "")
		return
	}
	ex.Outcome = Refused
	if r.Context().Err() != nil && ref.status != http.StatusRequestTimeout {
		ex.Outcome = ClientGone
	}
	ex.reply(w, r, ref)
}

// reply answers instead of the upstream.
func (ex *exchange) reply(w http.ResponseWriter, r *http.Request, ref *refusal) {
	ex.beat.stop()
	ex.Status, ex.said = ref.status, ref.message
	setCORS(w.Header(), ex.origin)
	ex.timing(w.Header())
	if ex.passed != nil {
		w.Header().Set(fleet.HeaderOutcome, string(ex.Outcome))
	}
	if ex.stranger && ref.status >= 500 {
		// The message may name an upstream, or its address.
		ref = &refusal{ref.status, "no answer of Ollama; whoever shows an API key is told why"}
	}
	if ref.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if ex.beat.begun() {
		n, _ := io.WriteString(w, ref.event(r.URL.Path, nil)) // an error: the client is gone
		ex.BytesOut = int64(n)
	} else {
		ex.BytesOut = int64(ref.write(w, r.URL.Path))
	}
	http.NewResponseController(w).Flush() // the connection may be closed right after this, when the proxy stops
}

// unreadable refuses a request whose body came too slowly, or broke off.
func (ex *exchange) unreadable(err error) *refusal {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		ex.header.Set("Connection", "close")
		return &refusal{http.StatusRequestTimeout, fmt.Sprintf("no byte of the request's body came for %v; send it again, or start ollama-cacheproxy with a longer --body-timeout", ex.arriving.limit)}
	}
	return &refusal{http.StatusBadRequest, fmt.Sprintf("reading the request's body: %v", err)}
}

// read reads the body, as far as the proxy may, and parses its model and prompt.
func (h *Handler) read(r *http.Request, ex *exchange) *refusal {
	if h.passes(ex) {
		if name, ok := strings.CutPrefix(r.URL.Path, pathModel); ok {
			ex.key = upstream.ModelKey(name)
		}
		ex.pass(r)
		return nil
	}
	data, over, ref := h.readBody(r, ex)
	if ref != nil {
		return ref
	}
	// Ollama reads the first JSON value and ignores the rest. It also ignores Content-Encoding,
	// except for zstd under /v1.
	f, err := scan(data, ex.members[:])
	if err == nil {
		h.understand(ex, f, data)
		h.steady(ex, data)
		h.account(ex, data)
		return nil
	}
	switch enc := r.Header.Get("Content-Encoding"); {
	case ex.reads == readsNothing && !over:
		return nil // it was read to be passed on
	case over:
		ex.Unedited = UneditedTooLarge
		ex.in.Store(0)
		ex.beginning = once{ex.body.open()}
		ex.letGo()
		r.Body = &rest{io.MultiReader(ex.beginning, r.Body), r.Body}
		ex.pass(r)
	case enc == "zstd" && ex.reads == readsForeign && h.readZstd(ex, data):
		return nil
	case enc != "" && !strings.EqualFold(enc, "identity"):
		ex.Unedited = UneditedEncoded
	default:
		ex.Unedited = UneditedNotJSON
		return nil // Ollama refuses it
	}
	ex.unread = ex.prompt != prefix.None && !ex.embed
	return nil
}

// passes reports whether the body need not be read: nothing depends on it.
func (h *Handler) passes(ex *exchange) bool {
	if ex.away != "" {
		return false
	}
	return ex.reads == readsNothing || ex.reads == readsName && len(h.backends()) == 1 && h.Fleet == nil
}

// readBody reads the request's body into ex.body and returns the part to parse. over reports that
// the body is longer than the proxy may read, and that the rest is still to come.
func (h *Handler) readBody(r *http.Request, ex *exchange) (data []byte, over bool, ref *refusal) {
	m := h.memory
	if ex.passed != nil {
		m = h.passedMemory
	}
	most := min(h.MaxBody, m.most)
	if r.ContentLength > most {
		most = min(most, bodyFirst-1) // the part that Ollama reads may end there
	}
	longer := func() error { return h.full(r, ex) }
	var err error
	if r.ContentLength > bodyFirst {
		err = longer()
	}
	if err == nil {
		ex.body, over, err = m.read(r.Context(), ex.holder.priority(r), r.Body, r.ContentLength, most, longer)
	}
	if ex.body != nil {
		data = ex.body.data[:min(int64(len(ex.body.data)), most)]
		ex.in.Store(int64(len(ex.body.data)))
	}
	ref, ok := errors.AsType[*refusal](err)
	switch {
	case err == nil || ok:
		return data, over, ref
	case !errors.Is(err, context.Canceled):
		return nil, false, ex.unreadable(err)
	case r.Context().Err() != nil:
		return nil, false, givenUp(err)
	}
	// Only the wait for memory was cancelled, because the proxy is stopping: see waitForMemory.
	h.waits(ex) // stopping ends the wait
	return nil, false, ex.stopping()
}

// readZstd parses the text of a compressed body, and reports whether that is a JSON object.
func (h *Handler) readZstd(ex *exchange, data []byte) bool {
	h.decoding.Lock() // so that at most one text takes memory besides its body
	defer h.decoding.Unlock()
	text, err := h.decoder.DecodeAll(data, nil)
	if err != nil {
		return false
	}
	f, err := scan(text, ex.members[:])
	if err != nil {
		return false
	}
	h.understand(ex, f, text)
	h.account(ex, text)
	h.steadyText(ex, text)
	ex.fields.members, ex.fields.long = nil, nil // they point into the text, not into the body
	return true
}

// understand stores the fields f, which were found in data, and what follows from them for the
// model.
func (h *Handler) understand(ex *exchange, f fields, data []byte) {
	if ex.reads == readsName && f.model == "" {
		f.model = f.name(data) // the name that Ollama reads
	}
	ex.key = upstream.ModelKey(f.model)
	switch {
	case ex.reads == readsName:
	case ex.key != "":
		ex.Model = f.model
	case f.model != "":
		ex.Model = invalidModel
	}
	ex.cloud = ex.key != "" && upstream.IsCloud(f.model)
	if ex.runsHere() { // otherwise nothing stays loaded here
		ex.fields = f
	}
}

// rewrite builds the outbound request: the same one, addressed to the upstream, with the edited
// body.
func (h *Handler) rewrite(pr *httputil.ProxyRequest) {
	ex := pr.In.Context().Value(exchangeKey{}).(*exchange)
	ex.inbound = pr.In
	pr.SetURL(ex.up.URL)
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery // ReverseProxy drops what Go cannot parse
	keepForwarded(pr)
	ex.strip(pr.Out.Header)
	if ex.beat.begun() {
		pr.Out.Header.Del("Accept-Encoding") // the answer cannot have an encoding any more
	}
	pr.Out.Trailer = pr.In.Trailer // filled in when the body has been read
	if b := ex.body; b != nil {
		pr.Out.Header.Del("Expect") // the body has already come
		pr.Out.ContentLength = int64(len(b.data) + grow(ex.edits))
		pr.Out.TransferEncoding = nil
		if len(pr.In.Trailer) > 0 {
			pr.Out.ContentLength = -1 // only a chunked body has trailers
		}
		// With GetBody the transport sends the body again if a reused connection turns out to be
		// closed before anything was written. But with one of these headers it would do so even if
		// the upstream may have read it.
		if pr.In.Header["Idempotency-Key"] == nil && pr.In.Header["X-Idempotency-Key"] == nil {
			pr.Out.GetBody = func() (io.ReadCloser, error) { return b.open(ex.edits...), nil }
		}
		if pr.Out.Body = http.NoBody; len(b.data) > 0 {
			pr.Out.Body = b.open(ex.edits...)
		}
	}
}

// keepForwarded keeps what ReverseProxy takes out of a request.
func keepForwarded(pr *httputil.ProxyRequest) {
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v, ok := pr.In.Header[name]; ok {
			pr.Out.Header[name] = v
		}
	}
}

// strip removes the headers that an upstream must not see.
func (ex *exchange) strip(header http.Header) {
	ex.stripHop(header)
	header.Del(headerPriority)
	header.Del(headerUpstream)
	if ex.stranger {
		header.Del("Expect") // there is no body
	}
}

// stripHop removes the headers that neither an upstream nor another proxy must see.
func (ex *exchange) stripHop(header http.Header) {
	for _, name := range ex.spent {
		header.Del(name)
	}
	// The proxy could not check the traffic of another protocol. Ollama speaks only HTTP/1.1.
	header.Del("Connection")
	header.Del("Upgrade")
	// The proxy has checked the origin against the inbound Host. The upstream sees another Host and
	// would decide wrongly.
	header.Del("Origin")
}

func (h *Handler) modifyResponse(res *http.Response) error {
	ex := res.Request.Context().Value(exchangeKey{}).(*exchange)
	if !ex.gateway {
		if ex.up.Alive() {
			h.available(ex.up) // how long other requests wait for it has changed
		}
	}
	ex.unloaded()
	if res.StatusCode == http.StatusSwitchingProtocols {
		return errors.New("it switches to another protocol, which nobody asked for")
	}
	if ex.beat.begun() {
		ex.asEvent(res)
	}
	ex.changes() // it may be flushed before any of the body is read
	if ex.Status = res.StatusCode; ex.Status < 300 {
		ex.run.Answered()
		ex.use.answer()
	}
	ex.flight.answered(res)
	setCORS(res.Header, ex.origin)
	res.Header.Del(headerUpstream) // set by another proxy behind this one
	res.Header.Del(headerWaited)
	ex.name()
	ex.Simulated = res.Header[upstream.SimulatedHeader] != nil
	if ex.spend != nil {
		ex.tell(res.Header)
		if ex.Status < 300 && res.Header.Get("Content-Encoding") == "" {
			ex.streams = strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream")
			ex.answer = savings.NewReader(ex.dialect, res.Header.Get("Content-Type"), ex.up.books.Load().TellsCached)
		}
	}
	if res.StatusCode >= 400 && ex.passing != nil && !ex.passing.ended.Load() {
		if err := readEarly(res); err != nil {
			return err
		}
	}
	ex.timing(ex.header) // nothing fails after this, so no second answer repeats it
	if res.Header["Content-Type"] == nil {
		ex.header["Content-Type"] = nil // otherwise net/http would guess one
	}
	res.Body = &tap{res.Body, ex}
	return nil
}

// name puts the upstream's name into the answer's header.
func (ex *exchange) name() {
	if !ex.stranger {
		ex.header.Set(headerUpstream, ex.up.Name)
	}
}

// changes notes that the request may have changed a model by now. A client that has read that must
// not get an answer of the model as it was.
func (ex *exchange) changes() {
	if ex.alters && ex.up != nil {
		ex.up.altered.Store(time.Now().UnixNano())
	}
}

// unloaded waits until other servers have unloaded the model.
func (ex *exchange) unloaded() {
	if ex.unloading != nil {
		<-ex.unloading
	}
}

// readEarly reads a refusal that came before the request's body was sent in full. Once the answer's
// header is written, the server stops reading the body, and then the transport breaks the
// connection from which the answer comes.
func readEarly(res *http.Response) error {
	_, err := peek(res, copyBuffer)
	return err
}

// peek reads at most this many bytes from the start of an answer's body, and leaves the answer
// unchanged. (A read error comes back at the next read: the transport's bodies remember it.)
func peek(res *http.Response, most int64) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(res.Body, most))
	res.Body = &rest{io.MultiReader(bytes.NewReader(text), res.Body), res.Body}
	return text, err
}

// forwardFailed answers a request whose upstream did not.
func (h *Handler) forwardFailed(w http.ResponseWriter, r *http.Request, err error) {
	ex := r.Context().Value(exchangeKey{}).(*exchange)
	if ref, ok := errors.AsType[*refusal](err); ok && ref.status == http.StatusGatewayTimeout {
		ex.Outcome, ex.gaveUp = UpstreamError, true
		ex.name()
		ex.reply(w, r, ref)
		return
	}
	if ex.arriving != nil && ex.arriving.late() {
		h.refuse(w, r, ex, ex.unreadable(os.ErrDeadlineExceeded))
		return
	}
	if r.Context().Err() != nil {
		ex.Outcome = ClientGone
		panic(http.ErrAbortHandler) // nothing was written, and must not become an empty 200
	}
	if ex.passing != nil {
		if cause := ex.passing.failed.Load(); cause != nil {
			h.refuse(w, r, ex, ex.unreadable(*cause))
			return
		}
	}
	ref, ok := errors.AsType[*refusal](err)
	if errors.Is(err, fleet.ErrForgotten) {
		ref, ok = givenUp(err), true
	}
	if errors.Is(err, syscall.EMFILE) {
		ref, ok = ex.noDescriptor(), true
	}
	if ok {
		h.refuse(w, r, ex, ref)
		return
	}
	ex.up.Failed()
	ex.Outcome = Unreachable
	h.Log.Debug("upstream request failed", "upstream", ex.up.Name, "err", err)
	ex.name()
	ex.reply(w, r, &refusal{http.StatusBadGateway, fmt.Sprintf("ollama at %s does not answer: %s; start it, or point ollama-cacheproxy's --upstream to where it runs", ex.up.URL, reason(err))})
}

// reason describes an error in a few words.
func reason(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "it closed the connection before it answered"
	}
	return err.Error()
}

// finish releases everything that the request held, then logs and counts it.
func (h *Handler) finish(ex *exchange, w http.ResponseWriter, r *http.Request) {
	ex.beat.stop() // nothing may be written once ServeHTTP has returned
	ex.unloaded()
	ex.silence.stop()
	h.waited(ex)
	ex.use.end()
	ex.letGo()
	if ex.beginning != nil {
		ex.beginning.Close()
	}
	if ex.arriving != nil {
		ex.arriving.end(nil)
	}
	if ex.up != nil {
		ex.Upstream = ex.up.Name
	}
	ex.Client = h.clientShown(r, ex)
	ex.Begun = ex.beat.begun()
	ex.Duration = time.Since(ex.start)
	ex.BytesIn = ex.in.Load()
	if ex.Outcome == "" {
		ex.Outcome = ex.outcome(r)
	}
	if context.Cause(r.Context()) == ErrDrained && ex.Outcome == ClientGone {
		ex.Outcome = Drained
	}
	if ex.Outcome == Aborted {
		h.aborted(ex, w, r)
	}
	h.accounted(ex)
	h.record(r, ex)
	h.warmed(r, ex)
	h.timeline.ended(ex)
	h.prewarming.asked(ex, nil)
	if ex.began {
		ex.up.inFlight.Add(-1)
	}
	ex.changes()
	if ex.Outcome == OK && ex.alters && ex.up != nil {
		ex.up.Changed()
	}
	level := ex.level()
	if h.Log.Enabled(context.Background(), level) {
		h.Log.LogAttrs(context.Background(), level, "request", ex.attrs()...)
	}
	h.inFlight.Add(-1) // after its log line, so that a drain does not end before the last line
	if !ex.part {      // otherwise the client's request is counted
		h.Done(ex.Exchange)
	}
}

// level returns the level of the request's log line.
func (ex *exchange) level() slog.Level {
	if ex.Outcome == Own || ex.Endpoint == "/" || ex.part {
		return slog.LevelDebug // probes and scrapes, and parts of a client's request
	}
	return slog.LevelInfo
}

// aborted is called when the upstream's answer broke off.
func (h *Handler) aborted(ex *exchange, w http.ResponseWriter, r *http.Request) {
	if !r.ProtoAtLeast(1, 1) {
		reset(w)
	}
	if upstream.Closed(ex.bodyErr) && ex.up != nil { // otherwise it was a peer's answer
		h.brokeOff(r.Context(), ex.up)
	}
}

// waitForMemory counts a request as waiting for memory, and ends the wait when the proxy stops.
func (h *Handler) waitForMemory(ctx context.Context) (context.Context, func()) {
	h.waiting.Add(1)
	began := time.Now()
	ex := ctx.Value(exchangeKey{}).(*exchange)
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with the wait
		select {
		case <-h.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel()
		h.waiting.Add(-1)
		ex.paused += time.Since(began)
	}
}

// letGo releases the body once it can no longer be sent again.
func (ex *exchange) letGo() {
	if ex.body != nil {
		ex.body.release()
		ex.body, ex.fields.members, ex.fields.long = nil, nil, nil
	}
}

// pass lets the body pass through, and counts its bytes.
func (ex *exchange) pass(r *http.Request) {
	if r.Body == nil || r.Body == http.NoBody {
		return
	}
	ex.passing = &passing{ReadCloser: r.Body, left: r.ContentLength, ex: ex}
	r.Body = ex.passing
}

// reset ends an HTTP/1.0 client's connection with an error. Such an answer ends where the
// connection does, so a truncated one would look complete.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return // not a connection of net/http's server
	}
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn() // without TLS's close alert: the answer would look complete
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}

func (ex *exchange) outcome(r *http.Request) Outcome {
	switch {
	case ex.bodyErr != nil && ex.bodyErr != io.EOF && r.Context().Err() == nil:
		return Aborted
	case ex.bodyErr != io.EOF:
		return ClientGone
	case ex.Status >= 500:
		return UpstreamError
	case ex.Status >= 400:
		return ClientError
	}
	return OK
}

func (ex *exchange) attrs() []slog.Attr {
	attrs := make([]slog.Attr, 0, 24)
	attrs = append(attrs, slog.String("method", ex.Method), slog.String("path", ex.Path[:min(len(ex.Path), 256)]))
	attrs = said(attrs, slog.String("model", ex.Model), slog.String("key_name", ex.Name))
	attrs = append(attrs,
		slog.Int("status", ex.Status),
		milliseconds("duration_ms", ex.Duration),
		slog.Int64("bytes_in", ex.BytesIn),
		slog.Int64("bytes_out", ex.BytesOut),
		slog.String("outcome", string(ex.Outcome)))
	attrs = said(attrs, slog.String("client", ex.Client))
	if ex.FirstByte > 0 {
		attrs = append(attrs, milliseconds("first_byte_ms", ex.FirstByte))
	}
	attrs = said(attrs, slog.String("keep_alive", ex.KeepAlive), slog.String("unedited", ex.Unedited),
		slog.String("prewarm", ex.Prewarm), slog.String("stable_heads", ex.headsEdited()),
		slog.String("num_ctx", ex.NumCtx))
	if ex.Begun {
		attrs = append(attrs, slog.Bool("heartbeat", true))
	}
	attrs = said(attrs, slog.String("upstream", cmp.Or(ex.Upstream, ex.served)), slog.String("peer", ex.Peer))
	if ex.Passed {
		attrs = append(attrs, slog.Bool("passed", true))
	}
	if ex.Simulated {
		attrs = append(attrs, slog.Bool("simulated", true))
	}
	if len(ex.Retries) > 0 {
		attrs = append(attrs, slog.String("retries", strings.Join(ex.Retries, ",")))
	}
	attrs = ex.Cache.attrs(attrs)
	if waited := ex.Waited + ex.paused; waited >= time.Millisecond {
		attrs = append(attrs, milliseconds("waited_ms", waited))
	}
	if e := ex.Savings; e != nil && e.Total > 0 {
		attrs = append(attrs, slog.Int("prompt_tokens", e.Total), slog.String("warm", string(e.Verdict)))
		if e.Tokens != nil {
			attrs = append(attrs, slog.Int("evaluated", e.Tokens.Evaluated), slog.String("basis", string(e.Basis)))
		}
		attrs = said(attrs, slog.String("reason", string(e.Reason)), slog.String("detail", e.Detail))
	}
	return attrs
}

// said adds the attributes of more that have a text.
func said(attrs []slog.Attr, more ...slog.Attr) []slog.Attr {
	for _, a := range more {
		if a.Value.String() != "" {
			attrs = append(attrs, a)
		}
	}
	return attrs
}

func milliseconds(key string, d time.Duration) slog.Attr {
	return slog.Float64(key, ms(d))
}
