package fleet

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// network is a network in memory, whose hosts can be cut off from each other. As with TCP, what was
// written to a connection before a cut arrives when it is healed, and whoever writes does not
// notice.
type network struct {
	mu        sync.Mutex
	arrives   sync.Cond                 // something arrives, or never will
	listeners map[string]*memListener   // by address
	cut       map[[2]string]bool        // from, to
	conns     map[string]map[*conn]bool // by host
	refused   error                     // of dialling an address without a listener
	dialled   map[[2]string]int         // connections that were made, by from and to
}

func newNetwork() *network {
	n := &network{
		listeners: map[string]*memListener{}, cut: map[[2]string]bool{},
		conns: map[string]map[*conn]bool{}, refused: errors.New("connection refused"),
		dialled: map[[2]string]int{},
	}
	n.arrives.L = &n.mu
	return n
}

// setCut cuts two hosts off from each other, or heals that.
func (n *network) setCut(a, b string, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[[2]string{a, b}], n.cut[[2]string{b, a}] = cut, cut
	n.arrives.Broadcast()
}

// kill resets all connections of a host, and removes its listener.
func (n *network) kill(host string) {
	n.mu.Lock()
	l := n.listeners[host]
	delete(n.listeners, host)
	for c := range n.conns[host] {
		c.reset()
	}
	n.mu.Unlock()
	if l != nil {
		l.Close()
	}
}

func (n *network) listen(host string) *memListener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &memListener{
		network: n, host: host, incoming: make(chan net.Conn), done: make(chan struct{}),
	}
	n.listeners[host] = l
	return l
}

// dialer dials as a host.
func (n *network) dialer(from string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, to string) (net.Conn, error) {
		to, _, _ = strings.Cut(to, ":") // net/http adds a port
		n.mu.Lock()
		l, cut := n.listeners[to], n.cut[[2]string{from, to}]
		refused := n.refused
		n.mu.Unlock()
		if cut {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if l == nil {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: refused}
		}
		there, back := &half{}, &half{}
		here := &conn{network: n, local: from, remote: to, in: back, out: there}
		far := &conn{network: n, local: to, remote: from, in: there, out: back}
		n.mu.Lock()
		for _, c := range []*conn{here, far} {
			if n.conns[c.local] == nil {
				n.conns[c.local] = map[*conn]bool{}
			}
			n.conns[c.local][c] = true
		}
		n.dialled[[2]string{from, to}]++
		n.mu.Unlock()
		select {
		case l.incoming <- far:
			return here, nil
		case <-l.done:
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: refused}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

type memListener struct {
	network  *network
	host     string
	incoming chan net.Conn
	once     sync.Once
	done     chan struct{}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.incoming:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *memListener) Addr() net.Addr { return memAddr(l.host) }

type memAddr string

func (a memAddr) Network() string { return "mem" }
func (a memAddr) String() string  { return string(a) }

// half is one direction of a connection. Guarded by network.mu.
type half struct {
	data []byte
	end  error // after data
}

type conn struct {
	network       *network
	local, remote string
	in, out       *half

	// Guarded by network.mu.
	deadline time.Time
	timer    *time.Timer
	closed   bool
}

func (c *conn) Read(p []byte) (int, error) {
	n := c.network
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		cut := n.cut[[2]string{c.remote, c.local}]
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case !c.deadline.IsZero() && !time.Now().Before(c.deadline):
			return 0, os.ErrDeadlineExceeded
		case !cut && len(c.in.data) > 0:
			read := copy(p, c.in.data)
			c.in.data = c.in.data[read:]
			return read, nil
		case !cut && c.in.end != nil:
			return 0, c.in.end
		}
		n.arrives.Wait()
	}
}

func (c *conn) Write(p []byte) (int, error) {
	n := c.network
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.closed {
		return 0, net.ErrClosed
	}
	if c.out.end != nil {
		return 0, c.out.end
	}
	c.out.data = append(c.out.data, p...)
	n.arrives.Broadcast()
	return len(p), nil
}

func (c *conn) Close() error {
	n := c.network
	n.mu.Lock()
	defer n.mu.Unlock()
	c.shut(io.EOF)
	return nil
}

// reset is Close as if the process were killed.
func (c *conn) reset() { c.shut(errReset) }

var errReset = errors.New("connection reset by peer")

func (c *conn) shut(end error) {
	n := c.network
	if c.closed {
		return
	}
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}
	delete(n.conns[c.local], c)
	if c.out.end == nil {
		c.out.end = end
	}
	if end == errReset {
		c.in.end = errReset // for whoever writes
	}
	n.arrives.Broadcast()
}

func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

func (c *conn) SetReadDeadline(t time.Time) error {
	n := c.network
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.deadline = t; c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if !t.IsZero() && !c.closed {
		c.timer = time.AfterFunc(time.Until(t), func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.arrives.Broadcast()
		})
	}
	n.arrives.Broadcast()
	return nil
}

func (c *conn) SetWriteDeadline(time.Time) error { return nil } // writing never blocks
func (c *conn) LocalAddr() net.Addr              { return memAddr(c.local) }
func (c *conn) RemoteAddr() net.Addr             { return memAddr(c.remote) }
