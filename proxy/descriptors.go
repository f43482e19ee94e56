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

// Descriptors bounds how many of the process's file descriptors clients' connections take. As many
// clients are served as may each need a connection to an upstream too; a few more, over
// connections that are closed at once, see the proxy's own pages. Before anybody is turned away
// the connections are closed that have been idle for longest.
type Descriptors struct {
	served, most int // how many clients are served, and how many connections they may have in all; 0: no limit

	mu    sync.Mutex                 // guards the fields below
	conns int                        // open ones of clients
	idle  list.List                  // of idleConn; the longest so first
	at    map[net.Conn]*list.Element // of idle
}

// idleConn is a client's connection on which no request is.
type idleConn struct {
	net.Conn
	fresh time.Time // until when its first request is awaited; zero: it had one
}

const (
	// That are no connections: the listener, the standard streams, files, the runtime's own.
	descriptorsOther = 16
	descriptorsPause = 20 * time.Millisecond // before it is tried again to get one
	// Which a new connection is given to send a request, though others could need its descriptor.
	firstRequest = time.Second
)

// NewDescriptors returns one for the limit that the process has.
func NewDescriptors() *Descriptors {
	d := &Descriptors{at: map[net.Conn]*list.Element{}}
	if limit := descriptorLimit(); limit > 0 {
		more := min(max(limit/8, 8), 256)
		d.served = max(1, (limit-descriptorsOther-more)/2)
		d.most = d.served + more
	}
	return d
}

// ConnState is for http.Server.
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

// reached reports whether there are so many connections; limit 0 is never reached.
func (d *Descriptors) reached(limit int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return limit > 0 && d.conns >= limit
}

// closeIdle closes the connection that has been idle for longest; false where none is.
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

// ConnContext is for http.Server.
func (d *Descriptors) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if d.reached(d.served) && !d.closeIdle() {
		return context.WithValue(ctx, scarceKey{}, true)
	}
	return ctx
}

// Listener returns ln, which then accepts a connection only when there is a descriptor for it.
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

// noDescriptor refuses a request for which there is no descriptor.
func (ex *exchange) noDescriptor() *refusal {
	ex.header.Set("Retry-After", retryAfter)
	return &refusal{http.StatusServiceUnavailable, fmt.Sprintf("ollama-cacheproxy may have %d files open and has no room for more connections; try again later, or raise that limit (ulimit -n)", descriptorLimit())}
}
