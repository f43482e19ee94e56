// Package livepage is the live page of the proxy: the files for the browser, and the hub that sends
// what they show to every open page. It knows nothing of requests or servers: a Source provides
// what there is to show.
package livepage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"time"
)

const (
	every = time.Second // how often a source is asked while any page is open
	// quiet is the time without news after which a comment is sent, so that each side notices when
	// the other one is gone.
	quiet = 15 * time.Second
	// patience is how long a browser may take to accept what is sent to it.
	patience = 20 * time.Second

	// DefaultLimit is how many pages may be open if Hub.Limit is zero.
	DefaultLimit = 200
)

// Part is one piece of what the page shows. It is sent when it differs from a second ago, so its
// times are moments, not ages, which would change while nothing happens.
type Part struct {
	Name string // unique among the parts
	Data any    // encoded by encoding/json
}

// Source provides what there is to show. Its methods are called by one goroutine at a time, once a
// second while any page is open, and never otherwise.
type Source interface {
	// Parts returns the current pieces: always the same ones, in the same order.
	Parts() []Part
	// Since returns the entries of an append-only log from the number from on, oldest first and
	// only as many as are remembered, and the number of the next entry.
	Since(from uint64) (entries []any, next uint64)
}

// Hub sends what a source provides to the open pages. All of them get the same bytes, which are
// encoded once. A browser that reads slowly gets the newest state when it is ready for more;
// nothing is buffered for it meanwhile. Make it with NewHub.
type Hub struct {
	// Remember is how many entries of the log a page gets when it is opened.
	Remember int
	// Limit is how many pages may be open; zero means DefaultLimit.
	Limit int

	source Source

	mu     sync.Mutex
	closed bool
	pages  int                // guarded by mu, as are all fields below
	stop   context.CancelFunc // ends the goroutine that asks the source; nil while no page is open
	asks   sync.WaitGroup     // of that goroutine
	tick   uint64             // how often the source was asked
	news   chan struct{}      // closed when the source is asked again, or the hub is closed
	parts  []encoded
	lines  [][]byte // the log's last entries, encoded
	next   uint64   // the number of the entry that comes after lines
	delta  []byte   // the event for a page that was up to date a tick ago; nil: nothing is new
	whole  []byte   // the event with the whole state; nil until a page needs it after a tick
}

// encoded is a part as it is sent.
type encoded struct {
	name string
	json []byte
}

// NewHub returns a hub that shows what a source provides, with that many entries of its log.
func NewHub(source Source, remember int) *Hub {
	return &Hub{source: source, Remember: remember, news: make(chan struct{})}
}

// ErrMany means that the limit of open pages is reached.
var ErrMany = errors.New("as many pages are open as may be")

// ErrClosed means that the hub is closed.
var ErrClosed = errors.New("the page is closed")

// Open counts a page that is about to be served; the error is ErrMany or ErrClosed. After a nil
// error the caller must call either Serve or Leave, once.
func (h *Hub) Open() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	limit := h.Limit
	if limit == 0 {
		limit = DefaultLimit
	}
	switch {
	case h.closed:
		return ErrClosed
	case h.pages >= limit:
		return ErrMany
	}
	if h.pages++; h.stop == nil {
		h.ask()
		ctx, stop := context.WithCancel(context.Background())
		h.stop = stop
		h.asks.Go(func() { h.run(ctx) }) // ends when the last page is closed
	}
	return nil
}

// Leave gives back a page that was opened, for callers that do not call Serve.
func (h *Hub) Leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pages--; h.pages == 0 {
		h.stop()
		h.stop, h.parts, h.lines, h.next, h.delta, h.whole = nil, nil, nil, 0, nil, nil
	}
}

// Pages returns how many pages are open.
func (h *Hub) Pages() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pages
}

// Close ends the open pages, and refuses new ones. When it returns, the source is no longer asked.
func (h *Hub) Close() {
	h.mu.Lock()
	if !h.closed {
		h.closed = true
		close(h.news)
	}
	if h.stop != nil {
		h.stop()
	}
	h.mu.Unlock()
	h.asks.Wait()
}

// run asks the source until ctx ends.
func (h *Hub) run(ctx context.Context) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		h.mu.Lock()
		if ctx.Err() == nil {
			h.ask()
			close(h.news)
			h.news = make(chan struct{})
		}
		h.mu.Unlock()
	}
}

// ask asks the source, and encodes the news. h.mu must be held.
func (h *Hub) ask() {
	h.tick++
	parts := h.source.Parts()
	if len(h.parts) != len(parts) {
		h.parts = make([]encoded, len(parts))
	}
	var fresh []encoded
	for i, p := range parts {
		text, err := json.Marshal(p.Data)
		if err != nil {
			// JSON cannot represent some numbers; the other parts are shown nevertheless.
			text = []byte("null")
		}
		if !bytes.Equal(text, h.parts[i].json) {
			h.parts[i] = encoded{p.Name, text}
			fresh = append(fresh, h.parts[i])
		}
	}
	entries, next := h.source.Since(h.next)
	before := len(h.lines)
	for _, e := range entries {
		if text, err := json.Marshal(e); err == nil {
			h.lines = append(h.lines, text)
		}
	}
	added := h.lines[before:]
	if over := len(h.lines) - h.Remember; over > 0 {
		h.lines = append([][]byte(nil), h.lines[over:]...)
	}
	h.next = next
	h.delta, h.whole = nil, nil
	if len(fresh)+len(added) > 0 {
		h.delta = event(fresh, added, false)
	}
}

// event returns some parts and log entries as a server-sent event. If whole, they are the whole
// state, and replace what the page has.
func event(parts []encoded, lines [][]byte, whole bool) []byte {
	size := 128
	for _, p := range parts {
		size += len(p.name) + len(p.json) + 4
	}
	for _, l := range lines {
		size += len(l) + 1
	}
	b := bytes.NewBuffer(make([]byte, 0, size))
	b.WriteString(`data: {"at":`)
	at, _ := json.Marshal(time.Now().UnixMilli()) // a number
	b.Write(at)
	if whole {
		b.WriteString(`,"whole":true`)
	}
	b.WriteString(`,"parts":{`)
	for i, p := range parts {
		if i > 0 {
			b.WriteByte(',')
		}
		name, _ := json.Marshal(p.name) // a string
		b.Write(name)
		b.WriteByte(':')
		b.Write(p.json)
	}
	b.WriteString(`},"log":[`)
	b.Write(bytes.Join(lines, []byte(",")))
	b.WriteString("]}\n\n")
	return b.Bytes()
}

// since returns the event for a page that is up to date to a tick; 0: it has nothing.
func (h *Hub) since(seen uint64) (text []byte, tick uint64, news chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch seen {
	case h.tick:
		return nil, h.tick, h.news
	case h.tick - 1:
		if seen > 0 {
			return h.delta, h.tick, h.news
		}
	}
	if h.whole == nil { // shared by all pages that are opened now, or are slow
		h.whole = event(h.parts, h.lines, true)
	}
	return h.whole, h.tick, h.news
}

// Serve sends a page what there is to show until the request ends, or the hub is closed. Open must
// have returned nil before. viewer is sent to this page alone, first, as its part "you". may, if
// non-nil, is called whenever the source is asked; the page ends once it returns false.
func (h *Hub) Serve(w http.ResponseWriter, r *http.Request, viewer any, may func() bool) {
	defer h.Leave()
	rc := http.NewResponseController(w)
	send := func(text []byte) bool {
		// Not every ResponseWriter supports deadlines; those of net/http do.
		_ = rc.SetWriteDeadline(time.Now().Add(patience))
		_, err := w.Write(text)
		return err == nil && rc.Flush() == nil
	}
	header := w.Header()
	header.Set("Content-Type", "text/event-stream; charset=utf-8")
	header.Set("Cache-Control", "no-store")
	header.Set("X-Accel-Buffering", "no") // otherwise nginx would buffer events
	if r.ProtoMajor == 1 {
		header.Set("Connection", "close") // the write deadline is for this page alone
	}
	header.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(http.StatusOK)
	you, err := json.Marshal(viewer)
	if err != nil || !send(event([]encoded{{"you", you}}, nil, false)) {
		return
	}
	beat := time.NewTimer(quiet)
	defer beat.Stop()
	var seen uint64
	for may == nil || may() {
		text, tick, news := h.since(seen)
		seen = tick
		if text != nil {
			if !send(text) {
				return
			}
			beat.Reset(quiet)
		}
		if h.isClosed() {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-news:
		case <-beat.C:
			if !send([]byte(": nothing new\n\n")) {
				return
			}
			beat.Reset(quiet)
		}
	}
}

func (h *Hub) isClosed() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.closed
}
