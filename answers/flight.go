package answers

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"sync"
	"time"
)

// DefaultFlightBytes is how many bytes of an answer a Flight holds if its maker does not say, in
// bytes.
const DefaultFlightBytes = 16 << 20

// Errors of a Flight.
var (
	// ErrLagged ends a listener that is so far behind that the others would have to wait for it.
	ErrLagged = errors.New("it reads too slowly for an answer that others read, too")
	// ErrNobody is the cause of cancelling a computation that nobody listens to any more.
	ErrNobody = errors.New("nobody waits for the answer any more")
	// ErrTooLong ends an answer that is to be kept and is longer than may be kept.
	ErrTooLong = errors.New("the answer is longer than may be kept")
)

// Mark is a place in a recorded body, and the time when the body had come that far.
type Mark struct {
	End int           // bytes
	At  time.Duration // since the flight began
}

// Flight is one computation whose answer several listeners read, each from its beginning and at its
// own pace. The computation writes to it as to an http.ResponseWriter, and never waits for a
// listener: what was written is held, up to a limit. An answer beyond the limit is not recorded;
// then what all listeners have read is let go, the computation waits for a listener that is alone,
// and of several listeners those that lag by the limit are ended with ErrLagged.
//
// A computation goes on while anyone listens. When the last listener closes, its context is
// cancelled, unless Keep was called.
type Flight struct {
	limit  int
	cancel context.CancelCauseFunc
	began  time.Time
	header http.Header // written by the computation alone, until WriteHeader

	mu        sync.Mutex // guards everything below
	news      chan struct{}
	status    int         // 0 before WriteHeader
	sent      http.Header // a copy of header at WriteHeader
	data      []byte      // the body from start on
	start     int         // how many bytes of the body were let go
	marks     []Mark
	beats     int                    // how many heartbeats there were
	beat      string                 // the latest
	listeners map[*Listener]struct{} // nil: the last one has closed, which ended the computation
	kept      bool                   // it goes on without listeners
	overflown bool                   // the body is longer than the limit
	done      bool
	err       error // why the answer is not whole; nil if it is
}

// NewFlight returns a flight for a computation that cancel cancels. limit is in bytes; if zero,
// DefaultFlightBytes.
func NewFlight(limit int, cancel context.CancelCauseFunc) *Flight {
	if limit == 0 {
		limit = DefaultFlightBytes
	}
	return &Flight{
		limit: limit, cancel: cancel, began: time.Now(), header: http.Header{},
		news: make(chan struct{}), listeners: map[*Listener]struct{}{},
	}
}

// tell wakes everyone who waits for something new. f.mu must be held.
func (f *Flight) tell() {
	close(f.news)
	f.news = make(chan struct{})
}

// Header is that of http.ResponseWriter. Only the computation may use it.
func (f *Flight) Header() http.Header { return f.header }

// WriteHeader is that of http.ResponseWriter. Listeners do not get the informational answers (1xx).
func (f *Flight) WriteHeader(status int) {
	if status < 200 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writeHeader(status)
}

func (f *Flight) writeHeader(status int) {
	if f.status != 0 {
		return
	}
	f.status, f.sent = status, maps.Clone(f.header)
	f.tell()
}

// Write is that of http.ResponseWriter. It does not hold p.
func (f *Flight) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writeHeader(http.StatusOK)
	if len(p) == 0 {
		return 0, nil
	}
	f.data = append(f.data, p...)
	f.marks = append(f.marks, Mark{f.start + len(f.data), time.Since(f.began)})
	f.tell()
	for len(f.data) > f.limit {
		f.overflown, f.marks = true, nil
		if len(f.listeners) == 0 {
			if !f.kept {
				break // its context is cancelled
			}
			f.cancel(ErrTooLong)
			return 0, ErrTooLong
		}
		if f.letGo() {
			continue
		}
		news := f.news
		f.mu.Unlock()
		<-news
		f.mu.Lock()
	}
	return len(p), nil
}

// letGo drops what all listeners have read. If a listener has read all while another has read
// nothing of what is held, it ends the latter. It reports whether anything changed.
func (f *Flight) letGo() bool {
	least, most := f.start+len(f.data), f.start
	for l := range f.listeners {
		least, most = min(least, l.at), max(most, l.at)
	}
	if n := least - f.start; n > 0 {
		f.data = append(f.data[:0:0], f.data[n:]...)
		f.start = least
		return true
	}
	if most < f.start+len(f.data) {
		return false
	}
	for l := range f.listeners {
		if l.at == f.start {
			l.lagged = true
			delete(f.listeners, l)
		}
	}
	f.tell()
	return true
}

// Flush is that of http.Flusher. Everything is passed on at once anyway.
func (f *Flight) Flush() {}

// Beat passes a comment on to those who listen now and have read everything. It is not recorded.
func (f *Flight) Beat(comment string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.beats, f.beat = f.beats+1, comment
	f.tell()
}

// End ends the answer; err tells why it is not whole. Only the first call counts.
func (f *Flight) End(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.done {
		return
	}
	f.done, f.err = true, err
	f.tell()
}

// Keep makes the computation go on when nobody listens.
func (f *Flight) Keep() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept = true
}

// Release undoes Keep: the computation ends with its last listener, or now if there is none.
func (f *Flight) Release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept = false
	if len(f.listeners) > 0 || f.done {
		return
	}
	f.listeners = nil
	f.cancel(ErrNobody)
}

// GiveUp cancels the computation unless its answer has ended: then what follows that goes on.
func (f *Flight) GiveUp(cause error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.done {
		f.cancel(cause)
	}
}

// Recorded returns the answer's status, body and marks when it has ended, and whether it is whole:
// it has ended well and is no longer than the limit. None of them may be changed.
func (f *Flight) Recorded() (status int, body []byte, marks []Mark, whole bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status, f.data, f.marks, f.done && f.err == nil && !f.overflown
}

// Sent returns the header and the body as far as there are any; ok is false if the body's beginning is
// no longer held. None of them may be changed.
func (f *Flight) Sent() (header http.Header, body []byte, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sent, f.data[:len(f.data):len(f.data)], !f.overflown
}

// Progress returns how many bytes of the body there are, and whether the answer has ended.
func (f *Flight) Progress() (bytes int, ended bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.start + len(f.data), f.done, f.err
}

// Listener reads a Flight from the beginning of its answer.
type Listener struct {
	f      *Flight
	at     int // how many bytes of the body it has read; guarded by f.mu, as is the next
	beats  int // how many heartbeats it has seen
	lagged bool
}

// Listen returns a listener, or nil if the beginning of the answer is no longer held. The listener
// must be closed.
func (f *Flight) Listen() *Listener {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.overflown || f.listeners == nil && !f.kept {
		return nil
	}
	if f.listeners == nil {
		f.listeners = map[*Listener]struct{}{}
	}
	l := &Listener{f: f, beats: f.beats}
	f.listeners[l] = struct{}{}
	return l
}

// Close ends the listener. cause says why; it becomes the cause of the computation's end if nobody
// else listens, and is ErrNobody if nil.
func (l *Listener) Close(cause error) {
	f := l.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.listeners[l]; ok {
		delete(f.listeners, l)
		f.tell()
	}
	if len(f.listeners) > 0 || f.kept || f.done {
		return
	}
	if cause == nil {
		cause = ErrNobody
	}
	f.listeners = nil
	f.cancel(cause)
}

// Header waits for the answer's status and header, which must not be changed. The error is that of
// ctx, or the one with which the computation ended before it wrote any.
func (l *Listener) Header(ctx context.Context) (int, http.Header, error) {
	for {
		l.f.mu.Lock()
		status, header, news := l.f.status, l.f.sent, l.f.news
		done, err := l.f.done, l.f.err
		l.f.mu.Unlock()
		switch {
		case status != 0:
			return status, header, nil
		case done && err == nil:
			return 0, nil, io.ErrUnexpectedEOF
		case done:
			return 0, nil, err
		}
		select {
		case <-news:
		case <-ctx.Done():
			return 0, nil, context.Cause(ctx)
		}
	}
}

// Next waits for the next part of the body, which must not be changed, or for a heartbeat. It
// returns io.EOF at the end of a whole answer.
func (l *Listener) Next(ctx context.Context) ([]byte, error) {
	f := l.f
	for {
		f.mu.Lock()
		switch {
		case l.lagged:
			f.mu.Unlock()
			return nil, ErrLagged
		case l.at < f.start+len(f.data):
			part := f.data[l.at-f.start:]
			l.at = f.start + len(f.data)
			l.beats = f.beats
			if f.overflown {
				f.tell() // the computation may be waiting for this
			}
			f.mu.Unlock()
			return part[:len(part):len(part)], nil
		case f.done:
			err := f.err
			f.mu.Unlock()
			if err == nil {
				err = io.EOF
			}
			return nil, err
		case l.beats < f.beats:
			l.beats = f.beats
			beat := f.beat
			f.mu.Unlock()
			return []byte(beat), nil
		}
		news := f.news
		f.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
