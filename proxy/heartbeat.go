package proxy

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// beatText is a comment in a stream of events, which clients skip.
const beatText = ": waiting\n\n"

// eventMost is how many bytes of an upstream's refusal are read, to pass it on as an event.
const eventMost = 64 << 10

// heartbeat is the writer of an answer that is a stream of events. If the request has waited long
// enough, it begins the answer with status 200 and then writes comments at intervals until the
// upstream's answer arrives. That follows in the same body; see exchange.asEvent for an answer that
// is not a stream of events. A nil heartbeat does nothing.
type heartbeat struct {
	http.ResponseWriter
	every  time.Duration
	origin string // for CORS headers

	mu    sync.Mutex // guards all below, and the writer until over is set
	timer *time.Timer
	waits bool          // the answer is begun only while this is set: nothing else uses the header
	since time.Time     // when waits was set
	left  time.Duration // the rest of the wait before the answer is begun
	began bool
	over  bool // the answer itself is being written
}

// heartbeats returns the writer for a request whose body has been read: with a heartbeat if it may
// have one.
func (h *Handler) heartbeats(w http.ResponseWriter, ex *exchange) http.ResponseWriter {
	every := h.Live().Heartbeat
	if ex.beat != nil { // it has begun to wait before
		ex.beat.redirect(w, ex.origin)
		return ex.beat
	}
	if every == 0 || ex.passed != nil || ex.reads != readsForeign || ex.prompt == prefix.None ||
		ex.fields.stream != 't' {
		return w
	}
	ex.beat = &heartbeat{
		ResponseWriter: w, every: every, left: every, origin: ex.origin,
	}
	return ex.beat
}

// redirect makes an answer that has not begun be written to w, which may be b itself.
func (b *heartbeat) redirect(w http.ResponseWriter, origin string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if w != http.ResponseWriter(b) && !b.began && !b.over {
		b.ResponseWriter, b.origin = w, origin
	}
}

// wait records that the request waits until waited is called.
func (b *heartbeat) wait() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waits, b.since = true, time.Now()
	switch {
	case b.began || b.over: // the timer is running, or never will again
	case b.timer == nil:
		b.timer = time.AfterFunc(b.left, b.beat)
	default:
		b.timer.Reset(b.left)
	}
}

func (b *heartbeat) waited() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waits = false; !b.began && !b.over {
		b.left = max(0, b.left-time.Since(b.since))
		b.timer.Stop()
	}
}

// beat runs when the timer fires.
func (b *heartbeat) beat() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over || !b.began && !b.waits {
		return
	}
	if !b.began {
		b.began = true
		header := b.Header()
		setCORS(header, b.origin)
		header.Set("Content-Type", "text/event-stream")
		header.Set("Cache-Control", "no-cache")
		header.Set("X-Accel-Buffering", "no") // otherwise nginx would keep the comments back
		b.ResponseWriter.WriteHeader(http.StatusOK)
	}
	// If the client is gone, net/http notices and ends the request's context.
	if f, ok := b.ResponseWriter.(*answers.Flight); ok {
		f.Beat(beatText) // it is no part of the answer
	} else {
		io.WriteString(b.ResponseWriter, beatText)
		http.NewResponseController(b.ResponseWriter).Flush()
	}
	b.timer.Reset(b.every)
}

// begun reports whether a heartbeat has begun the answer.
func (b *heartbeat) begun() bool {
	if b == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.began
}

// stop ends the heartbeats, before the answer is written or the request ends.
func (b *heartbeat) stop() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	if b.timer != nil {
		b.timer.Stop()
	}
}

// Unwrap serves http.ResponseController.
func (b *heartbeat) Unwrap() http.ResponseWriter { return b.ResponseWriter }

// WriteHeader writes the header of the answer, unless it has been written.
func (b *heartbeat) WriteHeader(status int) {
	final := status >= 200
	if final {
		b.stop()
	}
	if !b.begun() {
		b.ResponseWriter.WriteHeader(status)
	}
}

func (b *heartbeat) Write(p []byte) (int, error) {
	b.stop()
	return b.ResponseWriter.Write(p)
}

// asEvent fits the upstream's answer into an answer that a heartbeat has begun with another header.
// A stream of events stays as it is; anything else becomes an event that reports an error.
func (ex *exchange) asEvent(res *http.Response) {
	stream := strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream") &&
		res.Header.Get("Content-Encoding") == ""
	if res.StatusCode < 300 && stream {
		return
	}
	text, err := io.ReadAll(io.LimitReader(res.Body, eventMost))
	res.Body.Close()
	ref := &refusal{res.StatusCode, "ollama answered " + res.Status}
	var told struct {
		Error json.RawMessage `json:"error"`
	}
	switch {
	case err != nil:
		ref = &refusal{http.StatusBadGateway, "ollama's answer broke off: " + reason(err)}
	case res.StatusCode < 300:
		ref.status = http.StatusBadGateway
		ref.message = "ollama answered with something else than a stream of events"
	default:
		json.Unmarshal(text, &told)              // other JSON is not passed on
		json.Unmarshal(told.Error, &ref.message) // Ollama's own form
	}
	event := ref.event(ex.Path, told.Error)
	res.StatusCode, res.ContentLength = ref.status, int64(len(event))
	res.Body = io.NopCloser(strings.NewReader(event))
}
