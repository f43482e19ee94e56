package proxy

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// Descriptors bounds how many of the process's file descriptors client connections may use. The
// proxy serves only as many clients as can each have an upstream connection, too. A few more can
// reach the proxy's own pages, over connections that are closed at once. Before anybody is turned
// away, the connections that have been idle longest are closed.
type Descriptors struct {
	// Limits of clients that are served, and of all their connections; 0: no limit.
	served, most int

	mu    sync.Mutex                 // guards the fields below
	conns int                        // open client connections
	idle  list.List                  // of idleConn, longest idle first
	at    map[net.Conn]*list.Element // elements of idle
}

// idleConn is a client connection without a request.
type idleConn struct {
	net.Conn
	fresh time.Time // deadline of its first request; zero: it had one
}

const (
	// Descriptors that are not connections: the listener, the standard streams, files, the
	// runtime's own.
	descriptorsOther = 16
	descriptorsPause = 20 * time.Millisecond // between two attempts to get one
	// How long a new connection may take to send a request although others need its descriptor.
	firstRequest = time.Second
)

// NewDescriptors returns Descriptors for the limit of the process.
func NewDescriptors() *Descriptors {
	d := &Descriptors{at: map[net.Conn]*list.Element{}}
	if limit := descriptorLimit(); limit > 0 {
		more := min(max(limit/8, 8), 256)
		d.served = max(1, (limit-descriptorsOther-more)/2)
		d.most = d.served + more
	}
	return d
}

// ConnState is http.Server's ConnState.
func (d *Descriptors) ConnState(c net.Conn, s http.ConnState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.at[c]; e != nil {
		d.idle.Remove(e)
		delete(d.at, c)
	}
	switch s {
	case http.StateNew:
		d.conns++
		d.at[c] = d.idle.PushBack(idleConn{c, time.Now().Add(firstRequest)})
	case http.StateIdle:
		d.at[c] = d.idle.PushBack(idleConn{Conn: c})
	case http.StateClosed, http.StateHijacked:
		d.conns--
	}
}

// reached reports whether the number of connections has reached the limit; 0 means no limit.
func (d *Descriptors) reached(limit int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return limit > 0 && d.conns >= limit
}

// closeIdle closes the connection that has been idle longest; false if there is none.
func (d *Descriptors) closeIdle() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for e := d.idle.Front(); e != nil; e = e.Next() {
		if c := e.Value.(idleConn); time.Now().After(c.fresh) {
			d.idle.Remove(e)
			delete(d.at, c.Conn)
			c.Close()
			return true
		}
	}
	return false
}

type scarceKey struct{}

// ConnContext is http.Server's ConnContext.
func (d *Descriptors) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if d.reached(d.served) && !d.closeIdle() {
		return context.WithValue(ctx, scarceKey{}, true)
	}
	return ctx
}

// Listener wraps ln so that it accepts a connection only while there is a descriptor for it.
func (d *Descriptors) Listener(ln net.Listener) net.Listener { return listener{ln, d} }

type listener struct {
	net.Listener
	d *Descriptors
}

func (l listener) Accept() (net.Conn, error) {
	for {
		var c net.Conn
		err := error(syscall.EMFILE)
		if !l.d.reached(l.d.most) {
			c, err = l.Listener.Accept()
		}
		if !errors.Is(err, syscall.EMFILE) {
			return c, err
		}
		l.d.closeIdle()
		time.Sleep(descriptorsPause)
	}
}

// noDescriptor refuses a request because no descriptor is left for it.
func (ex *exchange) noDescriptor() *refusal {
	ex.header.Set("Retry-After", retryAfter)
	return &refusal{http.StatusServiceUnavailable, fmt.Sprintf("ollama-cacheproxy may have %d files open and has no room for more connections; try again later, or raise that limit (ulimit -n)", descriptorLimit())}
}
