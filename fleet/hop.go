package fleet

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Headers that only peers may set. They are refused from clients.
const (
	HeaderPeer   = "X-Cacheproxy-Peer"        // the ID of the proxy that sends the request; others begin so
	headerSecret = "X-Cacheproxy-Peer-Secret" // Config.Secret
	headerClient = "X-Cacheproxy-Peer-Client" // About.Client, as base64
	headerKey    = "X-Cacheproxy-Peer-Key"    // About.Key, as base64
	headerAge    = "X-Cacheproxy-Peer-Age"    // About.Age, in milliseconds
	headerLength = "X-Cacheproxy-Peer-Length" // of the body, in bytes, whose end is held back
	headerServer = "X-Cacheproxy-Peer-Server" // About.Server
	headerMoves  = "X-Cacheproxy-Peer-Moves"  // About.Moves
	// HeaderOutcome, in an answer, tells how a request ended that its owner has answered itself.
	HeaderOutcome = "X-Cacheproxy-Peer-Outcome"
	// headerVersion, in the answer that has the reports, is Config.Version.
	headerVersion = "X-Cacheproxy-Peer-Version"
	// headerElsewhere, in an answer 421, names the server that takes the request over; it is empty
	// if the entry is to choose again.
	headerElsewhere = "X-Cacheproxy-Peer-Elsewhere"
)

// About is what the owner is told of a request.
type About struct {
	Client string        // who is asking, for fairness
	Key    string        // the digest of its API key; "" if it showed none
	Age    time.Duration // since it arrived at the entry
	Server string        // the server that the entry chose; "" for any
	Moves  int           // how often another proxy's server took it over
}

// Errors of a request that is passed on.
var (
	// ErrGone means that the peer went away before it began with the request.
	ErrGone = errors.New("the peer went away before it began with the request")
	// ErrLost means that the peer went away after it may have begun with the request.
	ErrLost = errors.New("the peer went away after it had begun with the request")
	// ErrForgotten is why a passed request ends whose entry may have sent it to another proxy.
	ErrForgotten = errors.New("the proxy that passed the request on is away")
)

// lostFor is how long an answer is waited for when its owner is away: it may be back.
const lostFor = 15 * time.Second

// Pass sends a request to the owner at a place. body has all of it that the owner needs, and length
// bytes. The answer is the owner's, or schedule.Elsewhere if it does not serve the request; without a
// server, the caller chooses again. Errors that Again accepts mean that no server can have begun
// with the request, or ever will; after any other one it must not be sent again.
//
// The end of the body is held back until the owner is about to send the request to its server,
// which it says with 102 Processing. What it was not given in full it does not send.
func (f *Fleet) Pass(
	out *http.Request, to Place, p About, body io.Reader, length int64,
) (*http.Response, error) {
	f.count(func(c *Counts) { c.Hops++ })
	ctx, cancel := context.WithCancelCause(context.Background())
	stop := context.AfterFunc(out.Context(), func() { cancel(context.Cause(out.Context())) })
	hop := &hop{data: body, end: make(chan struct{}), conn: make(chan chan struct{}, 8), cancel: cancel}
	// The context is a new one, so that what traces out does not see the 102.
	traced := httptrace.WithClientTrace(hop.trace(ctx), &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			if c := watchedOf(info.Conn); c != nil {
				hop.conn <- c.closed
			}
		},
	})
	req := out.Clone(traced)
	req.URL.Scheme, req.URL.Host, req.Host = f.Scheme, to.addr, ""
	req.Body, req.GetBody, req.ContentLength = hop, nil, -1
	// It is said, since for some methods net/http would otherwise wait for the first byte of a body.
	req.TransferEncoding, req.Trailer = []string{"chunked"}, nil
	f.sign(req.Header)
	req.Header.Set(headerClient, base64.StdEncoding.EncodeToString([]byte(p.Client)))
	if p.Key != "" {
		req.Header.Set(headerKey, base64.StdEncoding.EncodeToString([]byte(p.Key)))
	}
	req.Header.Set(headerAge, strconv.FormatInt(p.Age.Milliseconds(), 10))
	req.Header.Set(headerLength, strconv.FormatInt(length, 10))
	req.Header.Set(headerServer, p.Server)
	if p.Moves > 0 {
		req.Header.Set(headerMoves, strconv.Itoa(p.Moves))
	}
	watched := make(chan struct{})
	go func() { // ends with ctx
		defer close(watched)
		f.watch(ctx, hop, to)
	}()
	res, err := f.Transport.RoundTrip(req)
	if err != nil {
		hop.settle(over)
		cancel(err)
		stop()
		<-watched
		if left := context.Cause(out.Context()); left != nil {
			return nil, left // nobody waits for the answer, and no peer is to blame
		}
		err = hop.failure(ctx, err)
		switch {
		case errors.Is(err, ErrLost):
			f.lose(to, err)
		case errors.Is(err, ErrGone):
			f.count(func(c *Counts) { c.Again++ })
		}
		return nil, err
	}
	hop.settle(answered)
	res.Request = out
	res.Body = &hopBody{ReadCloser: res.Body, ctx: ctx, done: func() {
		stop()
		cancel(nil)
	}}
	if res.StatusCode == http.StatusMisdirectedRequest && res.Header[headerElsewhere] != nil {
		return nil, f.declined(res, hop, to)
	}
	f.count(func(c *Counts) { c.Begun++ })
	return res, nil
}

// lose notes that a request is lost with a peer.
func (f *Fleet) lose(to Place, err error) {
	f.count(func(c *Counts) { c.Lost++ })
	f.history.add(Incident{At: time.Now(), Peer: to.Name, Lost: true, Error: err.Error()})
}

// drainFor is how long the end of an answer that declines a request is waited for: it comes after
// about a round trip.
const drainFor = 100 * time.Millisecond

// declined returns the error of a request that its owner does not serve.
func (f *Fleet) declined(res *http.Response, h *hop, to Place) error {
	// The owner reads the body's end before it ends the answer. Then the connection is as good as new.
	late := time.AfterFunc(drainFor, func() { h.cancel(nil) })
	io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswer))
	late.Stop()
	res.Body.Close()
	if h.state.Load() == begun {
		err := fmt.Errorf("%w: it has declined it after that", ErrLost)
		f.lose(to, err)
		return err
	}
	f.count(func(c *Counts) { c.Elsewhere++ })
	e := schedule.Elsewhere{Server: res.Header.Get(headerElsewhere)}
	e.Moves, _ = strconv.Atoi(res.Header.Get(headerMoves)) // 0 if there is none
	return e
}

// Again reports whether a request that Pass failed to pass on may be sent to another proxy.
func Again(err error) bool {
	if _, ok := errors.AsType[schedule.Elsewhere](err); ok {
		return true
	}
	return errors.Is(err, ErrGone)
}

// watch ends a hop whose owner goes away: at once if it has not begun, otherwise after a while.
func (f *Fleet) watch(ctx context.Context, h *hop, to Place) {
	var closed chan struct{} // by net/http: the peer has closed it, or reset it
	for waits := true; waits; {
		select {
		case <-ctx.Done(): // net/http waits until the body has been read
			h.settle(over)
			return
		case closed = <-h.conn:
		case <-closed: // as well
			h.settle(over)
			closed = nil
		case <-to.gone:
			waits = false
		}
	}
	if h.settle(over) {
		h.cancel(ErrGone)
		return
	}
	if h.state.Load() == over {
		return
	}
	for lost := time.Duration(0); lost < lostFor; lost += time.Second {
		if pause(ctx, time.Second) != nil {
			return
		}
		if gone := f.present(to); gone != nil {
			select { // it is back; what it sent meanwhile is on its way
			case <-ctx.Done():
				return
			case <-gone:
				lost = 0
			}
		}
	}
	h.cancel(ErrLost)
}

// present returns what is closed when the peer at a place goes away, or nil if it is away.
func (f *Fleet) present(to Place) <-chan struct{} {
	for _, m := range f.view.Load().members {
		if m.peer != nil && m.id == to.Peer {
			f.mu.Lock()
			defer f.mu.Unlock()
			return m.peer.gone
		}
	}
	return nil
}

// The states of a hop. It goes from pending to one of the others, and stays there.
const (
	pending  int32 = iota
	begun          // its owner has been told to go ahead
	answered       // the answer's header came before that
	over           // it was given up: its owner will never be told to go ahead
)

// hop is the body of a request that is passed on. It ends when its owner is told to go ahead.
type hop struct {
	data   io.Reader
	state  atomic.Int32
	end    chan struct{}      // closed when the state is no longer pending
	conn   chan chan struct{} // the connections that it got: watchedConn.closed
	cancel context.CancelCauseFunc
}

// watchedConn is a connection that tells when it is closed.
type watchedConn struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *watchedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// watchedOf returns the connection below a connection that net/http uses, which may be TLS's.
func watchedOf(c net.Conn) *watchedConn {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	w, _ := c.(*watchedConn)
	return w
}

// settle changes the state, and reports whether the owner may go ahead, or has answered, or (for
// over) will not.
func (h *hop) settle(to int32) bool {
	if h.state.CompareAndSwap(pending, to) {
		close(h.end)
		return true
	}
	return h.state.Load() == to || to == answered
}

// trace returns a context for a request with this body, which ends it when its owner asks for that.
func (h *hop) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			if code == http.StatusProcessing && !h.settle(begun) {
				return ErrGone
			}
			return nil
		},
	})
}

func (h *hop) Read(p []byte) (int, error) {
	n, err := h.data.Read(p)
	if n > 0 || err != io.EOF {
		if err == io.EOF {
			err = nil
		}
		return n, err
	}
	<-h.end
	if h.state.Load() == over {
		return 0, ErrGone
	}
	return 0, io.EOF
}

// Close is called by the transport when it needs the body no more.
func (h *hop) Close() error {
	h.settle(over)
	return nil
}

// failure returns the error of a hop that came to nothing.
func (h *hop) failure(ctx context.Context, err error) error {
	switch {
	case errors.Is(context.Cause(ctx), ErrLost):
		return ErrLost
	case h.state.Load() == begun:
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	return fmt.Errorf("%w: %w", ErrGone, err)
}

// hopBody is the body of an answer.
type hopBody struct {
	io.ReadCloser
	ctx  context.Context
	done func()
}

func (b *hopBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), ErrLost) {
		err = ErrLost
	}
	return n, err
}

func (b *hopBody) Close() error {
	err := b.ReadCloser.Close()
	b.done()
	return err
}
