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
	t.ex.silence.wait()
	n, err := t.ReadCloser.Read(p)
	t.ex.silence.stop() // a slow client is not the upstream's silence
	if n > 0 {
		if t.ex.BytesOut == 0 {
			t.ex.FirstByte = time.Since(t.ex.start)
			t.ex.begins()
			t.ex.answers()
		}
		if !t.ex.gateway {
			t.ex.up.Alive() // however slowly it answers polls meanwhile
		}
	}
	t.ex.BytesOut += int64(n)
	if t.ex.answer != nil {
		t.ex.answer.Write(p[:n])
	}
	if err != nil {
		t.ex.bodyErr = err // io.EOF is how a body ends well
	}
	return n, err
}

// passing is a request body that passes through unread. It counts the bytes, and once as many have come as
// Content-Length announced it ends without asking the connection again: the transport looks for the end after the last
// byte, when the answer may be on its way already and the server has closed the body, and would break off the answer.
type passing struct {
	io.ReadCloser
	left  int64       // bytes still to come; negative if that is not known
	ex    *exchange   // it is told of the bytes that come
	begun atomic.Bool // reading was begun
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
		p.ex.silence.wait() // the upstream has something to wait for still
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

// wasBegun reports whether reading was begun. Nothing is read of a nil body.
func (p *passing) wasBegun() bool { return p != nil && p.begun.Load() }

// Close closes the body, unless nothing was read of it: then it may be sent elsewhere, and net/http closes it in the end.
func (p *passing) Close() error {
	if !p.wasBegun() {
		return nil
	}
	return p.ReadCloser.Close()
}
