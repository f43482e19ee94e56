package proxy

import (
	"io"
	"sync/atomic"
	"time"
)

// tap is the response body on its way to the client. It notes when the first byte came, how many there were, and
// how it ended. It wraps the body, not the ResponseWriter, so that flushing and 1xx answers work as they are.
type tap struct {
	io.ReadCloser
	ex *exchange
}

func (t *tap) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	if n > 0 && t.ex.BytesOut == 0 {
		t.ex.FirstByte = time.Since(t.ex.start)
	}
	t.ex.BytesOut += int64(n)
	if err != nil {
		t.ex.bodyErr = err // io.EOF is how a body ends well
	}
	return n, err
}

// counter counts the bytes of a request body that passes through; the transport reads it in a goroutine of its own.
type counter struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}
