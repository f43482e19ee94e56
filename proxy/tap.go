package proxy

import (
	"io"
	"sync/atomic"
	"time"
)

// tap is the response body on its way to the client. It records the time of the first byte, the
// number of bytes, and how the body ended. It wraps the body, not the ResponseWriter, so that
// flushing and 1xx answers work unchanged.
type tap struct {
	io.ReadCloser
	ex *exchange
}

func (t *tap) Read(p []byte) (int, error) {
	t.ex.silence.wait()
	n, err := t.ReadCloser.Read(p)
	t.ex.silence.stop() // while a slow client reads, the upstream is not silent
	if n > 0 {
		if t.ex.BytesOut == 0 {
			t.ex.FirstByte = time.Since(t.ex.start)
			t.ex.begins()
			t.ex.answers()
		}
		if !t.ex.gateway {
			t.ex.up.Alive() // even if it answers polls slowly meanwhile
		}
	}
	t.ex.changes()
	t.ex.BytesOut += int64(n)
	if t.ex.answer != nil {
		t.ex.answer.Write(p[:n])
	}
	if err != nil {
		t.ex.bodyErr = err // io.EOF is a good end
	}
	return n, err
}

// passing is a request body that passes through unread. It counts the bytes and ends after
// Content-Length bytes without reading the connection again. Otherwise the transport would look for
// the end after the last byte, when the answer may have begun and the server has closed the body,
// and would then cut off the answer.
type passing struct {
	io.ReadCloser
	left  int64       // bytes still to come; negative if unknown
	ex    *exchange   // counts the bytes that arrive
	begun atomic.Bool // reading has begun
	ended atomic.Bool // the whole body was read

	failed atomic.Pointer[error] // why the client's body could not be read
}

func (p *passing) Read(b []byte) (int, error) {
	p.begun.Store(true)
	if p.left == 0 {
		return 0, io.EOF
	}
	n, err := p.ReadCloser.Read(b)
	if n > 0 {
		p.ex.silence.wait() // the upstream is still waiting for the body
	}
	p.ex.in.Add(int64(n))
	if p.left > 0 {
		p.left -= int64(n)
	}
	if err == io.EOF || p.left == 0 {
		p.ended.Store(true)
	} else if err != nil {
		p.failed.Store(&err)
	}
	return n, err
}

// wasBegun reports whether reading has begun. A nil body has nothing to read.
func (p *passing) wasBegun() bool { return p != nil && p.begun.Load() }

// Close closes the body if any of it was read. Otherwise the request may be sent elsewhere, and
// net/http closes its body in the end.
func (p *passing) Close() error {
	if !p.wasBegun() {
		return nil
	}
	return p.ReadCloser.Close()
}
