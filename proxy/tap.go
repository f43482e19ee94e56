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
	ex      *exchange
	silence time.Duration // Handler.UpstreamSilence
}

func (t *tap) Read(p []byte) (int, error) {
	if t.ex.silence != nil {
		t.ex.silence.Reset(t.silence)
	}
	n, err := t.ReadCloser.Read(p)
	if t.ex.silence != nil {
		t.ex.silence.Stop() // a slow client is not the upstream's silence
	}
	if n > 0 {
		if t.ex.BytesOut == 0 {
			t.ex.FirstByte = time.Since(t.ex.start)
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
	left  int64         // bytes still to come; negative if that is not known
	n     *atomic.Int64 // bytes that came
	begun atomic.Bool   // reading was begun
	ended atomic.Bool   // the whole body was read
	heard func()        // is called when something of it came; nil: nobody listens

	failed atomic.Pointer[error] // why the client's body could not be read
}

func (p *passing) Read(b []byte) (int, error) {
	p.begun.Store(true)
	if p.left == 0 {
		return 0, io.EOF
	}
	n, err := p.ReadCloser.Read(b)
	if n > 0 && p.heard != nil {
		p.heard()
	}
	p.n.Add(int64(n))
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

// Close closes the body, unless nothing was read of it: then it may be sent elsewhere, and net/http closes it in the end.
func (p *passing) Close() error {
	if !p.begun.Load() {
		return nil
	}
	return p.ReadCloser.Close()
}
