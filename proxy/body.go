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

// body is a request body held in memory, to be sent once or, if the server had not begun to read it, again.
// It is let go when release was called and every reader that open returned is closed.
type body struct {
	data  []byte
	refs  atomic.Int32
	share *share // of the memory for bodies; nil: none
}

// errBodyClosed is what a reader returns once the transport has closed it, or the body was let go.
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
		b.data = nil // the transport's request leads here until the answer has ended
	}
}

// open returns a reader of the body with the edits made, which are in order and do not overlap.
func (b *body) open(list ...edit) io.ReadCloser {
	b.refs.Add(1) // only while the exchange holds it, too
	parts, from := make([][]byte, 0, 2*len(list)+1), 0
	for _, e := range list {
		parts = append(parts, b.data[from:e.at], e.text)
		from = e.at + e.cut
	}
	return &bodyReader{body: b, parts: append(parts, b.data[from:])}
}

// bodyReader reads the parts in turn. The transport may close it while another goroutine still reads.
type bodyReader struct {
	mu    sync.Mutex
	body  *body // nil once closed
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

// writeTo writes what is left to the connection, without a copy of it.
func (r *bodyReader) writeTo(conn *net.TCPConn) (int64, error) {
	r.mu.Lock()
	b := r.body
	if b == nil {
		r.mu.Unlock()
		return 0, errBodyClosed
	}
	b.refs.Add(1) // closing must not wait for the write
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

// upstreamConn is a connection to which a bodyReader is written without a copy. The transport hands its ReadFrom the
// request's body, limited to the Content-Length.
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

// grow returns by how many bytes edits lengthen the body.
func grow(list []edit) (n int) {
	for _, e := range list {
		n += len(e.text) - e.cut
	}
	return n
}

// rest is a body too long to hold: what was read of it, then what still comes.
type rest struct {
	io.Reader
	io.Closer
}

// once is a reader that is closed at its end.
type once struct{ io.ReadCloser }

func (o once) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	if err == io.EOF {
		o.Close()
	}
	return n, err
}

// arriving is a request's body as it comes from the client, which may not leave off for longer than limit.
type arriving struct {
	io.ReadCloser
	conn  *http.ResponseController
	limit time.Duration

	mu    sync.Mutex // guards the fields below
	over  bool       // no more of it is read: the connection may be another request's
	until time.Time  // when the limit is reached; zero while nobody waits for the client
}

func (a *arriving) Read(p []byte) (int, error) {
	a.mu.Lock()
	if !a.over {
		a.until = time.Now().Add(a.limit)
		a.conn.SetReadDeadline(a.until) // what is no connection of net/http's server has none
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

// end takes the limit off a body that has come whole: from then on net/http reads to see the client leave. On any other it stays
// for what net/http reads of it before it sends the answer.
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

// late reports whether it left off for longer than limit. net/http cancels the request's context before that is read as
// an error.
func (a *arriving) late() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.until.IsZero() && !time.Now().Before(a.until)
}

// bufferPool serves httputil.ReverseProxy.
type bufferPool struct{ sync.Pool }

func newBufferPool() *bufferPool {
	return &bufferPool{sync.Pool{New: func() any { return new([copyBuffer]byte) }}}
}

func (p *bufferPool) Get() []byte  { return p.Pool.Get().(*[copyBuffer]byte)[:] }
func (p *bufferPool) Put(b []byte) { p.Pool.Put((*[copyBuffer]byte)(b)) }
