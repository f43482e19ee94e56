package batches

import (
	"context"
	"errors"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"time"
)

const (
	// loopback is the address that requests within the process seem to come from and to go to.
	loopback = "127.0.0.1"

	leastRetry = time.Second // after an answer 429
	mostRetry  = 2 * time.Minute

	forever = 1<<63 - 1
)

// sender sends a batch's requests to a handler within this process, in the name of the batch's
// owner. An answer 429 (the owner's own limits) is no result: the request waits and is sent again.
type sender struct {
	service  *Service
	job      *job
	to       http.Handler
	stop     context.CancelCauseFunc
	measured time.Time // when the results' size was last looked at; of one goroutine

	running sync.WaitGroup // handlers
}

// wait waits until no handler runs any more.
func (t *sender) wait() { t.running.Wait() }

// RoundTrip makes the sender an http.RoundTripper.
func (t *sender) RoundTrip(r *http.Request) (*http.Response, error) {
	for {
		if !t.service.Knows(t.job.Owner) {
			t.stop(errUnknown)
			return nil, errUnknown
		}
		if r.Method == http.MethodPost {
			if err := t.job.gate.pass(r.Context()); err != nil {
				return nil, err
			}
		}
		res, err := t.send(r)
		if err != nil || res.StatusCode != http.StatusTooManyRequests || r.GetBody == nil {
			return res, err
		}
		after, _ := strconv.Atoi(res.Header.Get("Retry-After")) // 0 is too little
		res.Body.Close()
		wait := min(max(time.Duration(after)*time.Second, leastRetry), mostRetry)
		if err := t.job.gate.rest(r.Context(), wait); err != nil {
			return nil, err
		}
		if r.Body, err = r.GetBody(); err != nil {
			return nil, err
		}
	}
}

// send sends a request once.
func (t *sender) send(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(t.service.As(r.Context(), t.job.Owner))
	// With a server in its context a reverse proxy panics when an answer breaks off, as it does for
	// a client on the network.
	ctx = context.WithValue(ctx, http.ServerContextKey, &http.Server{})
	in := r.Clone(ctx)
	in.RequestURI, in.RemoteAddr, in.Host = in.URL.RequestURI(), loopback+":0", loopback
	if in.Body == nil {
		in.Body = http.NoBody
	}
	from, to := io.Pipe()
	w := &answer{header: http.Header{}, body: to, begun: make(chan *http.Response, 1)}
	w.response = &http.Response{
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, ContentLength: -1, Request: r,
		Body: &answerBody{from, cancel},
	}
	over := t.job.gate.begin()
	t.running.Go(func() { // ends with ctx at the latest
		defer over()
		defer cancel()
		defer in.Body.Close()
		defer func() {
			if broken := recover(); broken != nil {
				if broken != http.ErrAbortHandler { // as net/http does for a client on the network
					t.service.Log.Error("a request of a batch has ended in a panic", "batch", t.job.ID,
						"panic", broken, "stack", string(debug.Stack()))
				}
				w.end(io.ErrUnexpectedEOF)
				return
			}
			w.WriteHeader(http.StatusOK) // unless that was said
			w.end(nil)
		}()
		t.to.ServeHTTP(w, in)
	})
	if res := <-w.begun; res != nil {
		return res, nil
	}
	if r.Context().Err() != nil {
		return nil, context.Cause(r.Context())
	}
	return nil, errors.New("the proxy has broken the answer off")
}

// answer is the http.ResponseWriter of a request within the process.
type answer struct {
	header   http.Header
	response *http.Response
	body     *io.PipeWriter

	mu    sync.Mutex // a heartbeat and the answer may write at once
	said  bool
	begun chan *http.Response // gets one value, nil if there is no answer
}

func (w *answer) Header() http.Header { return w.header }

func (w *answer) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.said || status < 200 {
		return
	}
	w.said = true
	w.response.StatusCode, w.response.Status = status, strconv.Itoa(status)+" "+http.StatusText(status)
	w.response.Header = w.header.Clone()
	w.begun <- w.response
}

func (w *answer) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.Write(p)
}

// FlushError makes flushing known: each write is passed on at once.
func (w *answer) FlushError() error {
	w.WriteHeader(http.StatusOK)
	return nil
}

// end ends the answer, with nil as it should end.
func (w *answer) end(err error) {
	w.mu.Lock()
	if !w.said {
		w.said = true
		w.begun <- nil
	}
	w.mu.Unlock()
	w.body.CloseWithError(err)
}

// answerBody ends the request when it is closed, as a connection does.
type answerBody struct {
	*io.PipeReader
	cancel context.CancelFunc
}

func (b *answerBody) Close() error {
	b.cancel()
	return b.PipeReader.Close()
}

// gate is where requests stop when the process is to end: those before it wait, until the batch
// has nothing else under way.
type gate struct {
	quiet chan struct{} // closed when nothing is under way, or the batch is over

	mu     sync.Mutex
	closed bool
	once   sync.Once
	held   int // requests that wait
	flying int // requests that package batch has begun, with those that wait
	active int // requests that a handler has
}

func newGate() *gate { return &gate{quiet: make(chan struct{})} }

// pass lets a request go on, or waits until its context ends.
func (g *gate) pass(ctx context.Context) error {
	g.mu.Lock()
	if !g.closed {
		g.mu.Unlock()
		return nil
	}
	g.mu.Unlock()
	return g.rest(ctx, forever)
}

// rest lets a request wait that is not under way.
func (g *gate) rest(ctx context.Context, wait time.Duration) error {
	g.mu.Lock()
	g.held++
	g.look()
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.held--
	}()
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// inFlight tells how many requests have begun and are not recorded.
func (g *gate) inFlight(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flying = n
	g.look()
}

// begin notes that a handler has one more request, until over is called.
func (g *gate) begin() (over func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.active++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.active--
		g.look()
	}
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.look()
}

func (g *gate) quieten() { g.once.Do(func() { close(g.quiet) }) }

// look notices that all that is under way waits here. g.mu is held.
func (g *gate) look() {
	if g.closed && g.active == 0 && g.held >= g.flying {
		g.quieten()
	}
}
