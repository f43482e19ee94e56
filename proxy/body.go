package proxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// body is a request body held in memory, to be sent once, or again if the server had not begun to
// read it. It is freed when release was called and every reader from open is closed.
type body struct {
	data  []byte
	refs  atomic.Int32
	share *share // of the memory for bodies; may be nil
}

// errBodyClosed is the error of a reader that the transport has closed, or whose body was freed.
var errBodyClosed = errors.New("request body is closed")

func newBody(data []byte, s *share) *body {
	b := &body{data: data, share: s}
	b.refs.Store(1)
	return b
}

func (b *body) release() {
	if b.refs.Add(-1) == 0 {
		if b.share != nil {
			b.share.of.freeBuffer(b.data)
			b.share.release()
		}
		b.data = nil // the transport's request refers to the body until the answer ends
	}
}

// open returns a reader of the body with the edits applied. They must be in order and must not
// overlap.
func (b *body) open(list ...edit) io.ReadCloser {
	b.refs.Add(1) // safe only while the exchange holds the body, too
	parts, from := make([][]byte, 0, 2*len(list)+1), 0
	for _, e := range list {
		parts = append(parts, b.data[from:e.at], e.text)
		from = e.at + e.cut
	}
	return &bodyReader{body: b, parts: append(parts, b.data[from:])}
}

// bodyReader reads the parts in turn. The transport may close it while another goroutine is still
// reading.
type bodyReader struct {
	mu    sync.Mutex
	body  *body // nil after Close
	parts [][]byte
	i     int
}

func (r *bodyReader) Read(p []byte) (n int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.body == nil {
		return 0, errBodyClosed
	}
	for r.i < len(r.parts) && n < len(p) {
		c := copy(p[n:], r.parts[r.i])
		n += c
		r.parts[r.i] = r.parts[r.i][c:]
		if len(r.parts[r.i]) == 0 {
			r.i++
		}
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

// writeTo writes the rest to the connection without copying it.
func (r *bodyReader) writeTo(conn *net.TCPConn) (int64, error) {
	r.mu.Lock()
	b := r.body
	if b == nil {
		r.mu.Unlock()
		return 0, errBodyClosed
	}
	b.refs.Add(1) // Close must not wait for the write
	left := net.Buffers(r.parts[r.i:])
	r.i = len(r.parts)
	r.mu.Unlock()
	defer b.release()
	return left.WriteTo(conn)
}

func (r *bodyReader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.body != nil {
		r.body.release()
		r.body, r.parts = nil, nil
	}
	return nil
}

// upstreamConn is a connection that can write a bodyReader without copying it. The transport passes
// the request's body, limited to the Content-Length, to its ReadFrom.
type upstreamConn struct{ *net.TCPConn }

func (c upstreamConn) ReadFrom(r io.Reader) (int64, error) {
	if limited, ok := r.(*io.LimitedReader); ok {
		if body, ok := limited.R.(*bodyReader); ok {
			n, err := body.writeTo(c.TCPConn)
			limited.N -= n
			return n, err
		}
	}
	return c.TCPConn.ReadFrom(r)
}

// edit replaces cut bytes at offset at by text. The zero edit changes nothing.
type edit struct {
	at, cut int
	text    []byte
}

// grow returns how many bytes the edits add to the body.
func grow(list []edit) (n int) {
	for _, e := range list {
		n += len(e.text) - e.cut
	}
	return n
}

// rest is a body too long to hold: the part that was read, then the part still to come.
type rest struct {
	io.Reader
	io.Closer
}

// once is a reader that closes itself at the end.
type once struct{ io.ReadCloser }

func (o once) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	if err == io.EOF {
		o.Close()
	}
	return n, err
}

// arriving is a request's body as the client sends it. The client may pause for at most limit.
type arriving struct {
	io.ReadCloser
	conn  *http.ResponseController
	limit time.Duration

	mu    sync.Mutex // guards the fields below
	over  bool       // reading has ended: the connection may belong to the next request
	until time.Time  // when the limit is reached; zero while no read is waiting
}

func (a *arriving) Read(p []byte) (int, error) {
	a.mu.Lock()
	if !a.over {
		a.until = time.Now().Add(a.limit)
		a.conn.SetReadDeadline(a.until) // fails without a connection of net/http's server
	}
	a.mu.Unlock()
	n, err := a.ReadCloser.Read(p)
	if err != nil {
		a.end(err)
		return n, err
	}
	a.mu.Lock()
	a.until = time.Time{}
	a.mu.Unlock()
	return n, nil
}

// end removes the limit after a complete body: from then on net/http reads to notice that the
// client leaves. After any other body the limit stays for the part that net/http reads before it
// sends the answer.
func (a *arriving) end(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.over:
	case err == io.EOF:
		a.until = time.Time{}
		a.conn.SetReadDeadline(time.Time{})
	case err == nil: // the request is over
		a.conn.SetReadDeadline(time.Now().Add(a.limit))
	}
	a.over = true
}

// late reports whether the client paused for longer than limit. net/http cancels the request's
// context before a read returns that error.
func (a *arriving) late() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.until.IsZero() && !time.Now().Before(a.until)
}

// bufferPool is a httputil.BufferPool.
type bufferPool struct{ sync.Pool }

func newBufferPool() *bufferPool {
	return &bufferPool{sync.Pool{New: func() any { return new([copyBuffer]byte) }}}
}

func (p *bufferPool) Get() []byte  { return p.Pool.Get().(*[copyBuffer]byte)[:] }
func (p *bufferPool) Put(b []byte) { p.Pool.Put((*[copyBuffer]byte)(b)) }
