package proxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
)

// body is a request body held in memory, to be sent once or, if the server had not begun to read it, again.
// Its bytes are pooled: they are free again when release was called and every reader that open returned is closed.
type body struct {
	data []byte
	refs atomic.Int32
}

// errBodyClosed is what a reader returns once the transport has closed it.
var errBodyClosed = errors.New("request body is closed")

const (
	bodyFirst   = 64 << 10 // bytes: a new buffer's size
	bodyTrusted = 4 << 20  // bytes: what a Content-Length may reserve before any byte has come
	bodyPooled  = 4 << 20  // bytes: a larger buffer is not kept
)

var bodyPool = sync.Pool{New: func() any { return &body{data: make([]byte, 0, bodyFirst)} }}

// readBody reads the request's body. When it is longer than max, over is true and the body holds what was read so
// far; the rest is still in r.Body.
func readBody(r *http.Request, max int64) (b *body, over bool, err error) {
	b = bodyPool.Get().(*body)
	b.refs.Store(1)
	data := b.data[:0]
	if want := min(r.ContentLength, bodyTrusted) + 1; int64(cap(data)) < want {
		data = make([]byte, 0, want) // one more than the body, so that its end is seen without growing
	}
	for {
		if int64(len(data)) > max {
			over = true
			break
		}
		if len(data) == cap(data) {
			grown := make([]byte, len(data), 2*cap(data))
			copy(grown, data)
			data = grown
		}
		n, rerr := r.Body.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		if rerr == io.EOF {
			break
		}
		if rerr != nil {
			err = rerr
			break
		}
	}
	b.data = data
	return b, over || int64(len(data)) > max, err
}

func (b *body) release() {
	if b.refs.Add(-1) == 0 && cap(b.data) <= bodyPooled {
		bodyPool.Put(b)
	}
}

// open returns a reader of the body with the edit made.
func (b *body) open(e edit) io.ReadCloser {
	b.refs.Add(1)
	return &bodyReader{body: b, parts: [3][]byte{b.data[:e.at], e.text, b.data[e.at+e.cut:]}}
}

// bodyReader reads the parts in turn. The transport may close it while another goroutine still reads.
type bodyReader struct {
	mu    sync.Mutex
	body  *body // nil once closed
	parts [3][]byte
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
		r.body = nil
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

// grow returns by how many bytes the edit lengthens the body.
func (e edit) grow() int { return len(e.text) - e.cut }

// rest is a body too long to hold: what was read of it, then what still comes.
type rest struct {
	io.Reader
	io.Closer
}

// bufferPool serves httputil.ReverseProxy.
type bufferPool struct{ sync.Pool }

func newBufferPool() *bufferPool {
	return &bufferPool{sync.Pool{New: func() any { return new([copyBuffer]byte) }}}
}

func (p *bufferPool) Get() []byte  { return p.Pool.Get().(*[copyBuffer]byte)[:] }
func (p *bufferPool) Put(b []byte) { p.Pool.Put((*[copyBuffer]byte)(b)) }
