// Package proxy is the HTTP surface: it forwards every request to one of a few Ollama servers, as it came and as it is answered,
// and adds the one thing that clients leave out, keep_alive. It owns the routes, the life of one request (handler.go, top
// to bottom), the edits of a body, the checks of Host, Origin and API keys, and what is known of a model's residency.
// It leaves it to package schedule which request goes when, and where, and keeps no prompt.
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

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
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
	// PathMetrics is where the operator's monitoring reads.
	PathMetrics = "/metrics"
)

// DefaultMaxBody is how many bytes of a body are read to be looked at, unless the operator says otherwise.
const DefaultMaxBody = 64 << 20

// Handler forwards requests to Ollama servers. Fill in the fields, call Init, and have Run running while it serves.
type Handler struct {
	// Upstreams are the servers, at least one. What is not for any one model goes to the first of them.
	Upstreams []*upstream.Server
	Transport http.RoundTripper // nil means NewTransport()
	KeepAlive KeepAlive
	// StableHeads are edits of prompts that the operator has asked for.
	StableHeads StableHeads
	NumCtx      NumCtx // what becomes of the context lengths that requests state
	NoTouch     bool   // never send a request of our own to set keep_alive for models used through /v1
	MaxBody     int64  // bytes; 0 means DefaultMaxBody
	Memory      int64  // bytes for all bodies that are held; 0: no limit
	// BodyTimeout is for how long a request's body may make no progress; 0: for ever.
	BodyTimeout time.Duration
	// UpstreamSilence is for how long an upstream may send nothing of an answer before the request is given up; 0: for ever.
	UpstreamSilence time.Duration
	// Heartbeat is after how long of waiting the answer of a streamed /v1 request is begun, with
	// comments every so often, so that clients with a first-byte timeout stay; 0: never.
	Heartbeat time.Duration
	// Queue is how many requests that need no lane wait for servers that are away; 0: schedule.DefaultLimit.
	Queue int

	Guard   Guard
	Trusted *TrustedProxies // believed when they say who asks; nil: nobody is
	Metrics http.Handler    // serves PathMetrics; nil forwards it like any other path
	Log     *slog.Logger    // nil discards

	Ledger      *savings.Ledger     // nil accounts for nothing and reads no prefixes
	Lanes       *schedule.Scheduler // says when a request may be sent, and where; nil, with one upstream only, sends them as they come
	Contexts    *contexts.Manager   // nil stores and attaches no context
	Prewarm     *Prewarm            // requests whose prompts are to be warm before anybody asks; nil: none
	ShowPrompts bool                // the page of the last requests has excerpts of their bodies
	Version     string              // of this program, for the page
	Price       float64             // of a million evaluated prompt tokens, in any currency, for the page; 0: none is shown

	// Done is told of each request when it is over, Touched of each keep_alive that was set, or refused, in the
	// background. Nil means nobody listens.
	Done    func(Exchange)
	Touched func(model string, err error)

	inForce  atomic.Pointer[Live] // what Change said last; nil: the fields above are in force
	memory   *memory
	decoder  *zstd.Decoder
	decoding sync.Mutex
	inFlight atomic.Int64
	waiting  atomic.Int64 // requests that wait, see Waiting
	awaiting atomic.Int64 // … for a server that is away, and for no lane

	closing   chan struct{} // closed by Close
	closeOnce sync.Once
	news      atomic.Pointer[chan struct{}] // closed when the next poll of an upstream has ended

	backends   []*backend // Upstreams, in the same order
	timeline   *timeline
	live       *livepage.Hub
	prewarming *prewarmer // nil: there is nothing to make warm
	recorder   *recorder  // of what pathFacts shows
	forward    *httputil.ReverseProxy
	prefixes   *prefix.Reader

	lingers      time.Duration
	refreshEvery time.Duration
	refreshing   sync.Mutex
	refreshed    time.Time // guarded by refreshing
}

// Exchange is one request and how it was answered.
type Exchange struct {
	Method   string
	Path     string
	Endpoint string // the path as a label: one of a bounded set
	Name     string // of the API key that it came with; "" where that has none
	Client   string // who asked, hashed, as on the page of the queue; "" for the proxy itself
	Model    string // as the client wrote it; "" where none was read, "(invalid)" where it is no model's name
	Status   int    // 0 where the client got none
	Begun    bool   // a heartbeat began the answer: whatever Status is, the client saw 200
	Outcome  Outcome

	Duration  time.Duration
	FirstByte time.Duration // from the start to the first byte of the answer's body; 0 if there was none
	BytesIn   int64         // of the request's body, as the client sent it
	BytesOut  int64         // of the answer's body

	KeepAlive string // injected, kept, raised or forced; "" where the request has no keep_alive
	Unedited  string // why a body that is usually read was not: see the Unedited… constants
	// Heads are the edits that Handler.StableHeads made to its prompt; nil: none.
	Heads []HeadEdits
	// NumCtx is what was done about the context length that it states, or does not: pinned, raised,
	// kept or unknown; "" where nothing is to be done.
	NumCtx string

	Upstream  string   // the name of the one that it was sent to; "" for none, or for all
	Simulated bool     // that one is: its answer and figures are made up
	Retries   []string // why it was sent to another one, or again: see the Retry… constants

	Savings *savings.Entry // nil where there is nothing to account for

	// Prewarm says what became of a request of the proxy's own that was to make its prompt warm: see the
	// Prewarm… constants; "" of all others.
	Prewarm string

	Priority string        // interactive, normal or batch; "" where the request did not have to wait for a lane
	Waited   time.Duration // for it
}

// Outcome says how an exchange ended.
type Outcome string

const (
	OK            Outcome = "ok"             // answered with a status below 400, to the end
	ClientError   Outcome = "client_error"   // answered 4xx by the upstream
	UpstreamError Outcome = "upstream_error" // answered 5xx by the upstream
	Unreachable   Outcome = "unreachable"    // the upstream did not answer: 502
	Aborted       Outcome = "aborted"        // the upstream's answer broke off
	ClientGone    Outcome = "client_gone"    // the client left before the end
	Drained       Outcome = "drained"        // cut off at the end of a graceful stop
	Refused       Outcome = "refused"        // by the proxy
	Own           Outcome = "own"            // one of the proxy's own pages
)

// ErrDrained is the cause with which the server's base context is cancelled when a graceful stop has lasted long enough.
var ErrDrained = errors.New("cut off while stopping")

// Why a body was forwarded unread or unedited.
const (
	UneditedTooLarge = "too_large" // longer than MaxBody
	UneditedEncoded  = "encoded"   // it has a Content-Encoding, and is no JSON as it stands
	UneditedNotJSON  = "not_json"  // it is not a JSON object
)

// decodedMost is how many bytes of a compressed body Ollama reads.
const decodedMost = 20 << 20

// invalidModel stands for what a client wrote in place of a model's name, which may be anything and of any length.
const invalidModel = "(invalid)"

// exchange is an Exchange under way.
type exchange struct {
	Exchange
	start time.Time

	header    http.Header         // the client's answer's
	origin    string              // for CORS headers
	route                         // what its path means
	holder    *keyHolder          // who it is by the API key that was checked, and what that client may do; nil without one
	stranger  bool                // it shows no API key although keys are asked for: see keyless
	spent     []string            // request headers that are for the proxy alone
	members   [12]jsonscan.Member // of the body; more are allocated
	arriving  *arriving           // nil where there is no body, or no limit for it
	body      *body               // nil where the body passes through, or there is none, or it was let go
	beginning io.ReadCloser       // of a body that passes through although it was read that far
	passing   *passing            // nil where the body was read, or there is none
	fields    fields              // of the body
	key       string              // upstream.ModelKey of the model that it names; "" for none
	cloud     bool                // a remote service runs that
	unread    bool                // it asks for a prompt to be evaluated, and that is all that could be found out
	only      *backend
	up        *backend         // to which it is sent; nil before that is chosen
	unloading chan struct{}    // closed when other servers have unloaded the model, too; nil: they need not
	began     bool             // it was sent to up, and has not ended
	waiting   bool             // it is counted in Handler.waiting
	paused    time.Duration    // for how long it waited beside Waited: for memory, and to be sent again
	gateway   bool             // the answer is not the server's, most likely: see byGateway
	gaveUp    bool             // after Handler.UpstreamSilence
	silence   *silence         // gives the request up; nil: never
	beat      *heartbeat       // nil: the request has none
	tried     []*backend       // to which it was sent in vain
	inbound   *http.Request    // as it was given to the forwarder
	edits     []edit           // of the body, in order
	fit       fit              // of its num_ctx
	run       *runners.Request // nil where it needs no model loaded here
	use       use

	chain   *prefix.Chain
	spend   *savings.Request // nil where the ledger does not account for it
	grant   *schedule.Grant  // nil where it holds no lane
	context *contexts.Use    // nil where nothing is to be stored or attached
	loaded  runners.Ending   // of the load that was caused before it was sent, to attach something
	ending  runners.Ending   // of its load, once it has ended
	blind   *backend         // as to which the recorder knows that its model is not known; nil: it is
	sent    time.Duration    // from start until it was sent
	warming *warming         // it is the proxy's own, to make its prompt warm; nil: it is not
	asks    []*backend       // what prewarmer.asked was told last
	streams bool             // the answer is a stream of events
	dialect savings.Dialect
	answer  *savings.Reader // nil where nobody reads the answer
	excerpt string
	shown   *onWay // on the page; nil: it was not sent, or is not shown there
	said    string // why the proxy refused it

	loadedFirst time.Duration // how long its model took to load, where loadFirst had it loaded

	in      atomic.Int64 // bytes of the request's body so far; becomes BytesIn
	bodyErr error        // how reading the answer's body ended; nil if it was never read to an end
}

type exchangeKey struct{}

// NewTransport returns a transport for an Ollama server: it waits for as long as a model needs to load, keeps many
// connections, and never asks for compression that the client did not ask for.
func NewTransport() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	var t *http.Transport
	t = &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, addr)
			if errors.Is(err, syscall.EMFILE) { // kept connections, to other servers perhaps, have the descriptors
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

// copyBuffer is how many bytes are moved at a time. A stream's writes up to this size are not split.
const copyBuffer = 32 << 10

// Init makes the handler ready; it starts nothing.
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
	if h.Queue == 0 {
		h.Queue = schedule.DefaultLimit
	}
	h.memory = newMemory(h.Memory)
	h.memory.waits = h.waitForMemory
	h.closing = make(chan struct{})
	news := make(chan struct{})
	h.news.Store(&news)
	var err error
	if h.decoder, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(decodedMost)); err != nil {
		panic(err) // the options are right
	}
	h.lingers, h.refreshEvery = lingers, refreshEvery
	h.prefixes = prefix.NewReader()
	h.timeline = newTimeline()
	h.live = livepage.NewHub(overview{h}, timelineMost)
	h.prewarming = newPrewarmer(h)
	h.recorder = newRecorder()
	for i, s := range h.Upstreams {
		b := h.newBackend(i, s)
		h.backends = append(h.backends, b)
		if h.Lanes != nil {
			h.Lanes.SetName(b.index, s.Name)
			if h.Contexts != nil && b.port != 0 {
				h.Lanes.SetTells(b.index)
			}
		}
	}
	if h.Contexts != nil {
		h.Contexts.Told = h.engineFound
	}
	h.forward = &httputil.ReverseProxy{
		Rewrite:        h.rewrite,
		ModifyResponse: h.modifyResponse,
		ErrorHandler:   h.forwardFailed,
		Transport:      attempts{h},
		FlushInterval:  -1, // every write of the upstream goes on at once
		BufferPool:     newBufferPool(),
		ErrorLog:       log.New(io.Discard, "", 0), // the line per request says it
	}
}

// Run does what the handler does in the background until ctx ends: it keeps models loaded, and prompts
// warm.
func (h *Handler) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, b := range h.backends {
		wg.Go(func() { b.residency.run(ctx) })
	}
	wg.Go(func() { h.Contexts.Run(ctx) })
	wg.Go(func() { h.prewarming.run(ctx) })
	wg.Wait()
}

// Held returns how many bytes the bodies take that are held.
func (h *Handler) Held() int64 { return h.memory.held.Load() }

// InFlight returns how many requests are being served.
func (h *Handler) InFlight() int64 { return h.inFlight.Load() }

// ServeHTTP is the life of one request.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.inFlight.Add(1)
	rt := routeOf(r)
	ex := &exchange{start: time.Now(), header: w.Header(), route: rt, Exchange: Exchange{Method: r.Method, Path: r.URL.Path, Endpoint: rt.label}}
	if limit := h.Live().BodyTimeout; limit > 0 && r.Body != nil && r.Body != http.NoBody {
		ex.arriving = &arriving{ReadCloser: r.Body, conn: http.NewResponseController(w), limit: limit}
	}
	ex.warming, _ = r.Context().Value(warmingKey{}).(*warming)
	ctx, end := r.Context(), func() {}
	if rt.outlives() {
		ctx, end = outlive(ctx, h.closing, h.lingers)
	}
	defer end()
	// A copy: net/http looks at its own request's body when it decides whether to read on after an early answer.
	r = r.WithContext(context.WithValue(ctx, exchangeKey{}, ex))
	defer h.finish(ex, w, r) // a broken copy panics with http.ErrAbortHandler

	scarce := r.Context().Value(scarceKey{}) != nil
	if scarce {
		w.Header().Set("Connection", "close")
	}
	if done := h.admit(w, r, ex); done {
		return
	}
	if h.own(w, r, ex) {
		return
	}
	if scarce {
		h.refuse(w, r, ex, ex.noDescriptor())
		return
	}
	ex.takes(r)
	ref := cmp.Or(h.tooFast(ex), h.only(r, ex))
	if ref == nil && h.merge(w, r, ex) {
		return
	}
	if ref == nil {
		ref = h.read(r, ex)
	}
	if ref == nil {
		w = h.heartbeats(w, ex)
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
	ex.unloading = h.unloadElsewhere(r.Context(), ex)
	h.prepare(r.Context(), ex)
	h.begin(ex)
	h.forward.ServeHTTP(w, r)
}

// takes gives the request the body that is read of it.
func (ex *exchange) takes(r *http.Request) {
	if ex.arriving != nil {
		r.Body = ex.arriving
	}
	if ex.stranger {
		r.Body, r.ContentLength, r.TransferEncoding, r.Trailer = http.NoBody, 0, nil, nil
	}
}

// givesUp has the request given up when its upstream is silent for too long. over is to be called when
// it has ended.
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

// lingers is for how long a request goes on without its client: see route.outlives.
const lingers = 30 * time.Second

// outlive returns a context that ends by so much later than ctx, or at the end of a drain.
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
	ex.holder, ex.spent = h.Guard.key(r)
	ex.stranger = h.Guard.Keys != nil && ex.holder == nil && ex.warming == nil
	if ex.holder != nil {
		ex.Name = ex.holder.name
	}
	ref := h.loop(r)
	if ref == nil {
		ref = h.guard().host(r)
	}
	if ref == nil {
		ex.origin, ref = h.guard().origin(r)
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

// keyed refuses a request that shows no API key that may send it.
func (ex *exchange) keyed(r *http.Request) *refusal {
	switch {
	case ex.stranger && !keyless(r):
		return &refusal{http.StatusUnauthorized, "a valid API key is needed: send it as 'Authorization: Bearer KEY' (the keys are in the file that ollama-cacheproxy was started with: --api-keys-file)"}
	case ex.admins:
		return ex.notAdmin()
	}
	return nil
}

// loop refuses what comes back to this proxy from its upstreams, as its own requests show, and everything while all of them
// lead back.
func (h *Handler) loop(r *http.Request) *refusal {
	instance := r.Header.Get(upstream.InstanceHeader)
	var back *backend
	all := true
	for _, b := range h.backends {
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
		back = h.backends[0]
	}
	return loops(back)
}

func loops(b *backend) *refusal {
	return &refusal{http.StatusLoopDetected, fmt.Sprintf("requests to %s come back to this ollama-cacheproxy; point --upstream to Ollama itself", b.URL)}
}

func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, ex *exchange, ref *refusal) {
	ex.Outcome = Refused
	if r.Context().Err() != nil && ref.status != http.StatusRequestTimeout {
		ex.Outcome = ClientGone
	}
	ex.reply(w, r, ref)
}

// reply answers in the upstream's place.
func (ex *exchange) reply(w http.ResponseWriter, r *http.Request, ref *refusal) {
	ex.beat.stop()
	ex.Status, ex.said = ref.status, ref.message
	setCORS(w.Header(), ex.origin)
	ex.timing(w.Header())
	if ex.stranger && ref.status >= 500 {
		// It would name an upstream, or say where that is.
		ref = &refusal{ref.status, "no answer of Ollama; whoever shows an API key is told why"}
	}
	if ref.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if ex.beat.begun() {
		n, _ := io.WriteString(w, ref.event(r.URL.Path, nil)) // a client that is gone has nobody to tell
		ex.BytesOut = int64(n)
	} else {
		ex.BytesOut = int64(ref.write(w, r.URL.Path))
	}
	http.NewResponseController(w).Flush() // the connection may be closed right after this, when the proxy stops
}

// unreadable refuses a request whose body the client did not send as it should.
func (ex *exchange) unreadable(err error) *refusal {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		ex.header.Set("Connection", "close")
		return &refusal{http.StatusRequestTimeout, fmt.Sprintf("no byte of the request's body came for %v; send it again, or start ollama-cacheproxy with a longer --body-timeout", ex.arriving.limit)}
	}
	return &refusal{http.StatusBadRequest, fmt.Sprintf("reading the request's body: %v", err)}
}

// read reads the body, as far as the proxy may, and what it says of the model and the prompt.
func (h *Handler) read(r *http.Request, ex *exchange) *refusal {
	if ex.reads == readsNothing || ex.reads == readsName && len(h.backends) == 1 {
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
	// Ollama reads the first value, whatever follows it; and the body as it stands, whatever its
	// Content-Encoding says, but for zstd under /v1.
	f, err := scan(data, ex.members[:])
	if err == nil {
		h.understand(ex, f, data)
		h.steady(ex, data)
		h.account(ex, data)
		return nil
	}
	switch enc := r.Header.Get("Content-Encoding"); {
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

// readBody makes ex.body of the request's body, and returns of it what is to be looked at. over: it is
// longer than the proxy may read, and the rest is still to come.
func (h *Handler) readBody(r *http.Request, ex *exchange) (data []byte, over bool, ref *refusal) {
	most := min(h.MaxBody, h.memory.most)
	if r.ContentLength > most {
		most = min(most, bodyFirst-1) // what Ollama reads may end there
	}
	longer := func() error { return h.full(r, ex) }
	var err error
	if r.ContentLength > bodyFirst {
		err = longer()
	}
	if err == nil {
		ex.body, over, err = h.memory.read(r.Context(), ex.holder.priority(r), r.Body, r.ContentLength, most, longer)
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
	// Only the wait for memory was cancelled, as the end of the proxy does: see waitForMemory.
	ex.waiting = true // until it is told
	h.waiting.Add(1)
	return nil, false, ex.stopping()
}

// readZstd looks at the text of a compressed body; false where that is no JSON object.
func (h *Handler) readZstd(ex *exchange, data []byte) bool {
	h.decoding.Lock() // until the text is read, so that no more than one takes memory beside its body
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
	ex.fields.members, ex.fields.long = nil, nil // they are the text's, not the body's
	return true
}

// understand takes in what a body says of its model: f, which was found in data.
func (h *Handler) understand(ex *exchange, f fields, data []byte) {
	if ex.reads == readsName && f.model == "" {
		f.model = f.name(data) // as Ollama reads it
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
	if ex.runsHere() { // else nothing here stays loaded
		ex.fields = f
	}
}

// rewrite makes the outbound request: the same, to the upstream, with the body's edit.
func (h *Handler) rewrite(pr *httputil.ProxyRequest) {
	ex := pr.In.Context().Value(exchangeKey{}).(*exchange)
	ex.inbound = pr.In
	pr.SetURL(ex.up.URL)
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery // not cleaned of what Go cannot parse
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v, ok := pr.In.Header[name]; ok {
			pr.Out.Header[name] = v
		}
	}
	ex.strip(pr.Out.Header)
	if ex.beat.begun() {
		pr.Out.Header.Del("Accept-Encoding") // the answer has no Content-Encoding any more
	}
	pr.Out.Trailer = pr.In.Trailer // filled in when the body has been read
	if b := ex.body; b != nil {
		pr.Out.Header.Del("Expect") // the body has come already
		pr.Out.ContentLength = int64(len(b.data) + grow(ex.edits))
		pr.Out.TransferEncoding = nil
		if len(pr.In.Trailer) > 0 {
			pr.Out.ContentLength = -1 // only a chunked body has trailers
		}
		// With GetBody the transport sends the body again if a kept connection turns out to be closed before anything was
		// written. But with one of these headers it would do so even if the upstream may have read it.
		if pr.In.Header["Idempotency-Key"] == nil && pr.In.Header["X-Idempotency-Key"] == nil {
			pr.Out.GetBody = func() (io.ReadCloser, error) { return b.open(ex.edits...), nil }
		}
		if pr.Out.Body = http.NoBody; len(b.data) > 0 {
			pr.Out.Body = b.open(ex.edits...)
		}
	}
}

// strip takes out of a request's header what is for the proxy alone.
func (ex *exchange) strip(header http.Header) {
	for _, name := range ex.spent {
		header.Del(name)
	}
	header.Del(headerPriority)
	header.Del(headerUpstream)
	// What another protocol carries could not be checked. Ollama speaks none but HTTP/1.1, and answers in that.
	header.Del("Connection")
	header.Del("Upgrade")
	if ex.stranger {
		header.Del("Expect") // there is no body
	}
	// The origin was judged here, by the inbound Host; the upstream sees another Host and would judge wrongly.
	header.Del("Origin")
}

func (h *Handler) modifyResponse(res *http.Response) error {
	ex := res.Request.Context().Value(exchangeKey{}).(*exchange)
	if !ex.gateway {
		if ex.up.Alive() {
			h.available(ex.up) // for how long others wait for it has changed
		}
	}
	ex.unloaded()
	if res.StatusCode == http.StatusSwitchingProtocols {
		return errors.New("it switches to another protocol, which nobody asked for")
	}
	if ex.beat.begun() {
		ex.asEvent(res)
	}
	if ex.Status = res.StatusCode; ex.Status < 300 {
		ex.run.Answered()
		ex.use.answer()
	}
	setCORS(res.Header, ex.origin)
	res.Header.Del(headerUpstream) // of another proxy behind this one
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
	ex.timing(ex.header) // nothing fails after this, so that no other answer has it twice
	if res.Header["Content-Type"] == nil {
		ex.header["Content-Type"] = nil // or net/http would guess one
	}
	res.Body = &tap{res.Body, ex}
	return nil
}

// name tells the client which upstream it is.
func (ex *exchange) name() {
	if !ex.stranger {
		ex.header.Set(headerUpstream, ex.up.Name)
	}
}

// unloaded waits until other servers have unloaded the model.
func (ex *exchange) unloaded() {
	if ex.unloading != nil {
		<-ex.unloading
	}
}

// readEarly reads a refusal that came before the request's body had been sent. When the answer's header is written, the
// server stops reading the body, at which the transport breaks off the connection that the answer comes from.
func readEarly(res *http.Response) error {
	_, err := peek(res, copyBuffer)
	return err
}

// peek reads the beginning of an answer's body, as far as it is not longer than most, and leaves the answer as it was. (What
// cannot be read fails once more when it is read again: the transport's bodies remember their errors.)
func peek(res *http.Response, most int64) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(res.Body, most))
	res.Body = &rest{io.MultiReader(bytes.NewReader(text), res.Body), res.Body}
	return text, err
}

// forwardFailed answers where the upstream did not.
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
		panic(http.ErrAbortHandler) // nothing was written, and nothing must not become an empty 200
	}
	if ex.passing != nil {
		if cause := ex.passing.failed.Load(); cause != nil {
			h.refuse(w, r, ex, ex.unreadable(*cause))
			return
		}
	}
	ref, ok := errors.AsType[*refusal](err)
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

// reason says why in a few words.
func reason(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "it closed the connection before it answered"
	}
	return err.Error()
}

// finish releases what the request held, and tells of it.
func (h *Handler) finish(ex *exchange, w http.ResponseWriter, r *http.Request) {
	ex.beat.stop() // nothing may be written when ServeHTTP has returned
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
	if ex.Outcome == OK && ex.alters && ex.up != nil {
		ex.up.Changed()
	}
	level := slog.LevelInfo
	if ex.Outcome == Own || ex.Endpoint == "/" {
		level = slog.LevelDebug // probes and scrapes
	}
	if h.Log.Enabled(context.Background(), level) {
		h.Log.LogAttrs(context.Background(), level, "request", ex.attrs()...)
	}
	h.inFlight.Add(-1) // its line is logged: who waits for the last one may go
	h.Done(ex.Exchange)
}

// aborted is called when the upstream's answer broke off.
func (h *Handler) aborted(ex *exchange, w http.ResponseWriter, r *http.Request) {
	if !r.ProtoAtLeast(1, 1) {
		reset(w)
	}
	if upstream.Closed(ex.bodyErr) {
		h.brokeOff(r.Context(), ex.up)
	}
}

// waitForMemory counts a request that waits for memory, and has it wait no longer than until the proxy stops.
func (h *Handler) waitForMemory(ctx context.Context) (context.Context, func()) {
	h.waiting.Add(1)
	began := time.Now()
	ex := ctx.Value(exchangeKey{}).(*exchange)
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with the waiting
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

// letGo releases the body, once it cannot be sent again.
func (ex *exchange) letGo() {
	if ex.body != nil {
		ex.body.release()
		ex.body, ex.fields.members, ex.fields.long = nil, nil, nil
	}
}

// pass has the body pass through, counted.
func (ex *exchange) pass(r *http.Request) {
	if r.Body == nil || r.Body == http.NoBody {
		return
	}
	ex.passing = &passing{ReadCloser: r.Body, left: r.ContentLength, ex: ex}
	r.Body = ex.passing
}

// reset ends an HTTP/1.0 client's connection with an error. An answer to HTTP/1.0 has no other end than the connection's,
// so that an answer which broke off would look whole.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return // not a connection of net/http's server
	}
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn() // without TLS's own goodbye, which would make the answer look whole
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
	attrs = said(attrs, slog.String("upstream", ex.Upstream))
	if ex.Simulated {
		attrs = append(attrs, slog.Bool("simulated", true))
	}
	if len(ex.Retries) > 0 {
		attrs = append(attrs, slog.String("retries", strings.Join(ex.Retries, ",")))
	}
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

// said adds those of more that have a text.
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
