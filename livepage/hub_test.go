package livepage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// script is a source that tests change.
type script struct {
	mu    sync.Mutex
	asked int
	parts []Part
	log   []any
}

func (s *script) Parts() []Part {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	return append([]Part(nil), s.parts...)
}

func (s *script) Since(from uint64) ([]any, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]any(nil), s.log[from:]...), uint64(len(s.log))
}

func (s *script) set(name string, data any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.parts {
		if s.parts[i].Name == name {
			s.parts[i].Data = data
		}
	}
}

func (s *script) add(entries ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, entries...)
}

func (s *script) times() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// screen is a ResponseWriter that keeps what is written, in writes that a test may block.
type screen struct {
	http.ResponseWriter
	mu     sync.Mutex
	writes [][]byte
	stuck  chan struct{} // nil: nothing blocks it
	broken bool
}

func newScreen() *screen { return &screen{ResponseWriter: httptest.NewRecorder()} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	stuck := s.stuck
	s.mu.Unlock()
	if stuck != nil {
		<-stuck
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		return 0, io.ErrClosedPipe
	}
	s.writes = append(s.writes, bytes.Clone(p))
	return len(p), nil
}

func (s *screen) Flush() {}

func (s *screen) hold(stuck chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stuck = stuck
}

// message is an event as a page reads it.
type message struct {
	Whole bool                       `json:"whole"`
	Parts map[string]json.RawMessage `json:"parts"`
	Log   []any                      `json:"log"`
}

// take returns the events since the last call, with comments as messages without parts.
func (s *screen) take(t *testing.T) (list []message) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.writes {
		text, isData := strings.CutPrefix(string(w), "data: ")
		var m message
		if isData {
			if err := json.Unmarshal([]byte(text), &m); err != nil || !strings.HasSuffix(text, "\n\n") {
				t.Fatalf("%q: %v", w, err)
			}
		} else if !strings.HasPrefix(string(w), ": ") {
			t.Fatalf("neither an event nor a comment: %q", w)
		}
		list = append(list, m)
	}
	s.writes = nil
	return list
}

// look opens a page, and returns a function that closes it.
func look(t *testing.T, h *Hub, w http.ResponseWriter) (leave func()) {
	t.Helper()
	if err := h.Open(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		h.Serve(w, httptest.NewRequestWithContext(ctx, "GET", "/", nil), map[string]bool{"admin": true}, nil)
		close(done)
	}()
	return func() { cancel(); <-done }
}

func TestChangesAreSentOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{parts: []Part{{"a", 1}, {"b", "x"}}, log: []any{"first"}}
		h := NewHub(s, 3)
		defer h.Close()
		w := newScreen()
		leave := look(t, h, w)
		synctest.Wait()
		got := w.take(t)
		if len(got) != 2 || string(got[0].Parts["you"]) != `{"admin":true}` || !got[1].Whole ||
			string(got[1].Parts["b"]) != `"x"` || fmt.Sprint(got[1].Log) != "[first]" {
			t.Fatalf("at first: %+v", got)
		}
		time.Sleep(3*every + every/2) // half way between two ticks, as at all later changes
		if got := w.take(t); len(got) != 0 {
			t.Errorf("nothing is new, and %+v was sent", got)
		}
		s.set("a", 2)
		s.add("second")
		time.Sleep(2 * every)
		got = w.take(t)
		if len(got) != 1 || got[0].Whole || len(got[0].Parts) != 1 || string(got[0].Parts["a"]) != "2" || fmt.Sprint(got[0].Log) != "[second]" {
			t.Errorf("what is new: %+v", got)
		}
		time.Sleep(quiet + every)
		if got := w.take(t); len(got) != 1 || got[0].Parts != nil {
			t.Errorf("want a comment in %v without anything new, got %+v", quiet, got)
		}
		s.add("third", "fourth")
		time.Sleep(2 * every)
		late := newScreen()
		leaveToo := look(t, h, late)
		synctest.Wait()
		if got := late.take(t); len(got) != 2 || fmt.Sprint(got[1].Log) != "[second third fourth]" {
			t.Errorf("a page that is opened later is told %+v; want the last three entries", got)
		}
		leave()
		leaveToo()
	})
}

func TestNobodyAsksWhileNobodyLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{parts: []Part{{"a", 1}}}
		h := NewHub(s, 3)
		defer h.Close()
		time.Sleep(10 * every)
		if n := s.times(); n != 0 {
			t.Errorf("asked %d times before anybody looked", n)
		}
		leave, leaveToo := look(t, h, newScreen()), look(t, h, newScreen())
		time.Sleep(10*every + every/2)
		if n := s.times(); n != 11 {
			t.Errorf("asked %d times in ten seconds for two pages, want 11", n)
		}
		leave()
		leaveToo()
		synctest.Wait()
		n := s.times()
		time.Sleep(10 * every)
		if s.times() != n || h.Pages() != 0 {
			t.Errorf("asked %d times more after all had left; %d pages", s.times()-n, h.Pages())
		}
	})
}

// TestSlowPage: a page that cannot keep up gets the newest state when it can, in one event, and
// delays no other page.
func TestSlowPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{parts: []Part{{"a", 0}, {"b", 0}}}
		h := NewHub(s, 5)
		defer h.Close()
		slow, quick := newScreen(), newScreen()
		leave, leaveToo := look(t, h, slow), look(t, h, quick)
		synctest.Wait()
		slow.take(t)
		quick.take(t)
		stuck := make(chan struct{})
		slow.hold(stuck)
		time.Sleep(every / 2) // half way between two ticks
		for i := 1; i <= 20; i++ {
			s.set("a", i)
			s.add(i)
			time.Sleep(every)
		}
		synctest.Wait()
		if got := len(quick.take(t)); got < 19 {
			t.Errorf("the quick page got %d events of 20", got)
		}
		slow.hold(nil)
		close(stuck)
		synctest.Wait()
		got := slow.take(t)
		if len(got) != 2 { // the one at which it was blocked, and the newest
			t.Fatalf("the slow page got %d events", len(got))
		}
		if last := got[1]; !last.Whole || string(last.Parts["a"]) != "20" || fmt.Sprint(last.Log) != "[16 17 18 19 20]" {
			t.Errorf("the slow page got %+v", last)
		}
		leave()
		leaveToo()
	})
}

// TestWholeIsShared: pages that need the whole state at one time get the same bytes, so that many
// of them, or slow ones, take no more memory than one.
func TestWholeIsShared(t *testing.T) {
	h := NewHub(&script{parts: []Part{{"a", 1}}, log: []any{"x"}}, 5)
	defer h.Close()
	if err := h.Open(); err != nil {
		t.Fatal(err)
	}
	defer h.Leave()
	one, _, _ := h.since(0)
	other, _, _ := h.since(0)
	if len(one) == 0 || &one[0] != &other[0] {
		t.Error("two pages are sent copies")
	}
	h.mu.Lock()
	h.ask()
	kept := h.whole
	h.mu.Unlock()
	if kept != nil {
		t.Error("it is kept for nobody")
	}
}

func TestLimitAndClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHub(&script{parts: []Part{{"a", 1}}}, 3)
		h.Limit = 2
		leave, gone := look(t, h, newScreen()), newScreen()
		leaveToo := look(t, h, gone)
		if err := h.Open(); !errors.Is(err, ErrMany) {
			t.Errorf("a third page: %v", err)
		}
		leave()
		gone.mu.Lock()
		gone.broken = true // its connection is gone, which a comment finds out
		gone.mu.Unlock()
		time.Sleep(quiet + every)
		if n := h.Pages(); n != 0 {
			t.Errorf("%d pages are open", n)
		}
		leaveToo()
		leave = look(t, h, newScreen())
		h.Close()
		synctest.Wait()
		if n := h.Pages(); n != 0 {
			t.Errorf("%d pages are open after the end", n)
		}
		leave()
		if err := h.Open(); !errors.Is(err, ErrClosed) {
			t.Errorf("a page after the end: %v", err)
		}
	})
}

func TestFiles(t *testing.T) {
	get := func(name, etag string) *http.Response {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("If-None-Match", etag)
		ServeFile(w, r, name)
		return w.Result()
	}
	for name, kind := range map[string]string{"": "text/html", "app.js": "text/javascript", "style.css": "text/css", "vendor/uplot.LICENSE": "text/plain", "icon.svg": "image/svg+xml"} {
		res := get(name, "")
		if res.StatusCode != 200 || !strings.HasPrefix(res.Header.Get("Content-Type"), kind) {
			t.Errorf("%q: %s, %s", name, res.Status, res.Header.Get("Content-Type"))
		}
		if !strings.Contains(res.Header.Get("Content-Security-Policy"), "default-src 'none'; script-src 'self'; style-src 'self'") {
			t.Errorf("%q: policy %q", name, res.Header.Get("Content-Security-Policy"))
		}
		if again := get(name, res.Header.Get("ETag")); again.StatusCode != http.StatusNotModified {
			t.Errorf("%q: asked again: %s", name, again.Status)
		}
	}
	if res := get("../static.go", ""); res.StatusCode != 404 {
		t.Errorf("another file: %s", res.Status)
	}
	// The page has nothing that the policy forbids, which would not work.
	for name, f := range static() {
		if strings.HasPrefix(name, "vendor/") {
			continue
		}
		for _, bad := range []string{"innerHTML", "dangerouslySet", "eval(", "new Function", " onclick=", "<style", "http://", "https://"} {
			text := strings.ReplaceAll(string(f.text), "http://www.w3.org/2000/svg", "")
			if strings.Contains(text, bad) {
				t.Errorf("%s has %s in it", name, bad)
			}
		}
	}
}

// hundred opens a hundred pages on a server, each of which reads everything it gets.
func hundred(tb testing.TB, h *Hub) (read func() int64, leave func()) {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := h.Open(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		h.Serve(w, r, nil, nil)
	})}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	var mu sync.Mutex
	var bytes int64
	var conns []net.Conn
	for range 100 {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			tb.Fatal(err)
		}
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		conns = append(conns, c)
		wg.Go(func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := c.Read(buf)
				mu.Lock()
				bytes += int64(n)
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	for h.Pages() < 100 {
		time.Sleep(time.Millisecond)
	}
	return func() int64 { mu.Lock(); defer mu.Unlock(); return bytes }, func() {
		h.Close()
		for _, c := range conns {
			c.Close()
		}
		srv.Close()
		wg.Wait()
	}
}

// TestHundredPages: news are encoded once for all pages, and none of them stay in memory.
func TestHundredPages(t *testing.T) {
	s := &script{parts: []Part{{"a", 0}}}
	h := NewHub(s, 10)
	_, leave := hundred(t, h)
	defer leave()
	h.mu.Lock()
	first := h.tick
	h.mu.Unlock()
	for i := range 5 {
		s.set("a", i+1)
		h.mu.Lock()
		h.ask()
		close(h.news)
		h.news = make(chan struct{})
		h.mu.Unlock()
	}
	if asked := s.times(); uint64(asked) > first+5+5 { // the clock's own ticks may be among them
		t.Errorf("the source was asked %d times for a hundred pages", asked)
	}
}

// BenchmarkHundredPages is one second of a hundred open pages: 20 KB of changed parts and ten
// requests.
func BenchmarkHundredPages(b *testing.B) {
	s := &script{parts: []Part{{"a", strings.Repeat("x", 20<<10)}}}
	h := NewHub(s, 2000)
	read, leave := hundred(b, h)
	defer leave()
	entry := strings.Repeat("y", 400)
	before := read()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		s.set("a", strings.Repeat(string(rune('a'+i%26)), 20<<10))
		for range 10 {
			s.add(entry)
		}
		h.mu.Lock()
		h.ask()
		close(h.news)
		h.news = make(chan struct{})
		h.mu.Unlock()
		for read()-before < int64(i)*100*20<<10 {
			time.Sleep(50 * time.Microsecond)
		}
	}
	b.ReportMetric(float64(read()-before)/float64(b.N), "bytes/op")
}
