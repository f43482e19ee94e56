package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// longBody returns a chat of about n bytes, and its exact length; all share one text.
func longBody(n int) (open func(i int) io.Reader, length int64) {
	text := bytes.Repeat([]byte("tell me more of that. "), n/22)
	const begin, end = `{"model":"m","messages":[{"role":"user","content":"`, `"}]}`
	open = func(i int) io.Reader {
		return io.MultiReader(strings.NewReader(begin+fmt.Sprintf("%08d", i)), bytes.NewReader(text), strings.NewReader(end))
	}
	return open, int64(len(begin) + 8 + len(text) + len(end))
}

// heapPeak watches the heap until done is called, which returns the peak in bytes.
func heapPeak() (done func() uint64) {
	stop, peak := make(chan struct{}), make(chan uint64)
	runtime.GC()
	go func() { // ends with done
		var most uint64
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapInuse)
			select {
			case <-stop:
				peak <- most
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return func() uint64 { close(stop); return <-peak }
}

// TestWaitingBodies: 100 requests with bodies of 8 MiB wait for one lane, in a heap of at most 512
// MiB; all are answered.
func TestWaitingBodies(t *testing.T) {
	const n, memory = 100, 512 << 20
	open, length := longBody(8 << 20)
	gate := make(chan struct{})
	var answered atomic.Int64
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, err := io.Copy(io.Discard, r.Body)
		if r.ContentLength != length || got != length || err != nil {
			t.Errorf("the upstream got %d bytes, %v", got, err)
		}
		<-gate
		answered.Add(1)
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, chatAnswer)
	}))
	defer up.Close()
	u, _ := url.Parse(up.URL)
	rg := newRig(t, u, &Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1}), Memory: memory})
	done := heapPeak()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			req, err := http.NewRequest("POST", rg.URL+"/api/chat", open(i))
			if err != nil {
				t.Error(err)
				return
			}
			req.ContentLength = length
			res, err := rg.http.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			if text, err := io.ReadAll(res.Body); err != nil || res.StatusCode != 200 {
				t.Errorf("%s %s %v", res.Status, text, err)
			}
			res.Body.Close()
		})
	}
	waiting(t, rg, int(memory*3/4/bufferSize(length+1))-1)
	t.Logf("held %d MiB, heap %d MiB", rg.h.Held()>>20, memoryOf()>>20)
	close(gate)
	wg.Wait()
	if peak := done(); peak > 512<<20 {
		t.Errorf("the heap had %d MiB", peak>>20)
	} else {
		t.Logf("the heap had at most %d MiB", peak>>20)
	}
	if answered.Load() != n || rg.h.Held() != 0 {
		t.Errorf("%d were answered, %d bytes are held", answered.Load(), rg.h.Held())
	}
}

// TestAnnouncedBodies: 1,000 clients that announce 4 MiB and send 100 bytes take 64 KiB each, and
// nothing after they have left.
func TestAnnouncedBodies(t *testing.T) {
	const n = 1000
	rg := newRig(t, newFake(t, okAnswer).URL, &Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1}), Memory: 1 << 30})
	before := memoryOf()
	var conns []*fakeConn
	for range n {
		c := rg.dial()
		c.send("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4194304\r\n\r\n" + strings.Repeat(" ", 100))
		conns = append(conns, c)
	}
	poll(t, func() bool { return rg.h.Held() == n*bodyFirst })
	const buffers = 256 << 10 // of a fakeConn, which is not the proxy's
	if each := (memoryOf()-before)/n - buffers; each > 2*bodyFirst {
		t.Errorf("each takes %d KiB", each>>10)
	} else {
		t.Logf("each takes %d KiB with its connection, held are %d MiB", each>>10, rg.h.Held()>>20)
	}
	for _, c := range conns {
		c.Close()
	}
	poll(t, func() bool { return rg.h.Held() == 0 })
}

// poll waits until ok returns true.
func poll(t *testing.T, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(patience); !ok(); runtime.Gosched() {
		if time.Now().After(until) {
			t.Fatal("it does not come to that")
		}
	}
}

// TestFullQueueUnread: with a full queue, a request with an announced length gets its answer before
// a byte of its body was sent, a chunked one after 64 KiB at most.
func TestFullQueueUnread(t *testing.T) {
	rg := fullRig(t)
	for _, path := range []string{"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"} {
		announced, chunked := rg.dial(), rg.dial()
		announced.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 62914560\r\n\r\n")
		if got := announced.receive(); !strings.Contains(got.line, " 503 ") || got.value("Retry-After") == "" {
			t.Errorf("%s, announced: %+v", path, got)
		}
		text := `{"model":"m","prompt":"` + strings.Repeat("x", bodyFirst)
		chunked.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
		go func() { // ends with the connection, which the proxy closes
			for n := 0; n < 60<<20; n += bodyFirst {
				if _, err := fmt.Fprintf(chunked, "%x\r\n%s\r\n", bodyFirst, text[:bodyFirst]); err != nil {
					return
				}
			}
			t.Errorf("%s: all of a chunked body was read", path)
		}()
		if got := chunked.receive(); !strings.Contains(got.line, " 503 ") || got.value("Retry-After") == "" {
			t.Errorf("%s, chunked: %+v", path, got)
		}
		for range 2 {
			if ex := rg.ended(); ex.Outcome != Refused || ex.BytesIn > bodyFirst {
				t.Errorf("%s: %+v", path, ex)
			}
		}
	}
	if held := rg.h.Held(); held > 4*bufferLeast {
		t.Errorf("%d bytes are held", held)
	}
}

// TestLaneNeedsWholeBody: a request takes no lane before its body is complete, however it is
// framed.
func TestLaneNeedsWholeBody(t *testing.T) {
	for _, path := range []string{"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"} {
		rg, f := laneRig(t, schedule.Config{Lanes: 1})
		announced, chunked := rg.dial(), rg.dial()
		body := chatWith("s", strings.Repeat("x", 100<<10), "")
		announced.send(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body[:len(body)-1]))
		chunked.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
		chunked.chunk(body) // but no last chunk
		poll(t, func() bool { return rg.h.Held() > 2*int64(len(body)) })
		other := rg.dial()
		other.send(rawPost("/api/chat", chatWith("s", "whole", "")))
		up := f.accept()
		if got := up.receive(); !strings.Contains(string(got.body), "whole") {
			t.Errorf("%s: the upstream got %.80s", path, got.body)
		}
		up.send(answer(200, "application/json", chatAnswer))
		other.receive()
	}
}

// TestBodyLetGo: a body is held until the answer's header, since it may have to be sent again, and
// dropped then, whatever the answer is.
func TestBodyLetGo(t *testing.T) {
	for _, status := range []int{200, 400, 404, 500, 503} {
		rg, f := laneRig(t, schedule.Config{Lanes: 1})
		client := rg.dial()
		client.send(rawPost("/api/chat", chatWith("s", strings.Repeat("x", 1<<20), "")))
		up := f.accept()
		up.receive()
		if held := rg.h.Held(); held < 1<<20 {
			t.Errorf("%d bytes are held while it may have to be sent again", held)
		}
		up.send(fmt.Sprintf("HTTP/1.1 %d X\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n", status))
		client.mustHead()
		poll(t, func() bool { return rg.h.Held() == 0 }) // the answer has not ended
		up.send("0\r\n\r\n")
		client.mustChunk()
	}
}

// TestFullQueueOfAnother: if another client's backlog fills the queue, a body is not refused
// unread: a place is made for it.
func TestFullQueueOfAnother(t *testing.T) {
	f := newFake(t, nil)
	lanes := schedule.NewScheduler(schedule.Config{Lanes: 1, Limit: 3})
	rg := newRig(t, f.URL, &Handler{Lanes: lanes, Trusted: trusting(t, "127.0.0.1")})
	const script, person = "X-Forwarded-For: 192.0.2.1", "X-Forwarded-For: 192.0.2.2"
	var clients []*fakeConn
	for i := range 4 {
		c := rg.dial()
		c.send(rawPost("/api/chat", chatWith("s", fmt.Sprint(i), ""), script))
		if i == 0 {
			f.accept().receive()
		}
		waiting(t, rg, i)
		clients = append(clients, c)
	}
	long := rg.dial()
	long.send(rawPost("/api/chat", chatWith("p", strings.Repeat("x", 2*bodyFirst), ""), person))
	if got := clients[3].receive(); !strings.Contains(got.line, " 503 ") || got.value("Retry-After") == "" {
		t.Errorf("the newest of the backlog: %+v", got)
	}
	waiting(t, rg, 3)
	if ex := rg.ended(); ex.Outcome != Refused {
		t.Errorf("told as %+v", ex)
	}
	more := rg.dial()
	more.send(rawPost("/api/chat", chatWith("s", "more", ""), script))
	if got := more.receive(); !strings.Contains(got.line, " 503 ") {
		t.Errorf("more of the backlog: %+v", got)
	}
}

// TestMemoryPriority: if the memory is full, a body waits behind at most one of each other
// priority, however many there are.
func TestMemoryPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 6 << 20 // two of them fit
		m := newMemory(MemoryLeast)
		came := make(chan string, 100)
		bodies := make(chan *body, 100)
		read := func(p schedule.Priority) {
			go func() { // ends when the body is read
				b, _, err := m.read(t.Context(), p, bytes.NewReader(make([]byte, size-1)), size-1, m.most, func() error { return nil })
				if err != nil {
					t.Error(err)
				}
				bodies <- b
				came <- p.String()
			}()
			synctest.Wait()
		}
		for range 10 {
			read(schedule.Batch)
		}
		read(schedule.Normal)
		read(schedule.Interactive)
		var order []string
		for range 12 {
			(<-bodies).release()
			synctest.Wait()
			order = append(order, <-came)
		}
		if got := strings.Join(order[:5], " "); got != "batch batch batch normal interactive" { // the first two found room
			t.Errorf("%s came first", got)
		}
		if held := m.held.Load(); held != 0 {
			t.Errorf("%d bytes are held", held)
		}
	})
}

// TestMemoryWaitEnds: a wait for memory ends when the proxy stops, of which the client is informed,
// or when the client leaves.
func TestMemoryWaitEnds(t *testing.T) {
	for _, stops := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			logger := slog.New(slog.DiscardHandler)
			up := upstream.NewServer("u", &url.URL{Scheme: "http", Host: "127.0.0.1:11434"}, nil, logger)
			var ended []Exchange
			h := &Handler{
				Upstreams: []*upstream.Server{up}, Transport: stubUpstream{}, Memory: MemoryLeast,
				Done: func(ex Exchange) { ended = append(ended, ex) },
			}
			h.Init()
			for h.memory.first.TryAcquire(1 << 10) {
			}
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			body := strings.NewReader(chatWith("s", "one", ""))
			r := httptest.NewRequestWithContext(ctx, "POST", "http://127.0.0.1:11435/api/chat", body)
			w := httptest.NewRecorder()
			go h.ServeHTTP(w, r) // ends when it waits no more
			synctest.Wait()
			if len(ended) != 0 || h.Waiting() != 1 {
				t.Fatalf("%d wait, %+v", h.Waiting(), ended)
			}
			outcome := ClientGone
			if stops {
				outcome = Refused
				h.Close()
			} else {
				leave()
			}
			synctest.Wait()
			if len(ended) != 1 || ended[0].Outcome != outcome || h.Waiting() != 0 {
				t.Fatalf("%d wait, %+v", h.Waiting(), ended)
			}
			told := w.Code == http.StatusServiceUnavailable && w.Header().Get("Retry-After") != "" &&
				strings.Contains(w.Body.String(), "is stopping")
			if told != stops {
				t.Errorf("stops %v: %d %s", stops, w.Code, w.Body)
			}
		})
	}
}

// TestPassingBodyStuck: a body that passes through and makes no progress also ends with 408, in the
// path's dialect, whether or not the upstream has begun to process it; its upstream connection is
// broken off.
func TestPassingBodyStuck(t *testing.T) {
	for _, path := range []string{"/api/create", "/api/blobs/sha256:0", "/v1/audio/transcriptions"} {
		f := newFake(t, nil)
		rg := newRig(t, f.URL, &Handler{BodyTimeout: 100 * time.Millisecond})
		client := rg.dial()
		client.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
		up := f.accept()
		up.mustHead()
		got := client.receive()
		if !strings.Contains(got.line, " 408 ") || !strings.Contains(string(got.body), "--body-timeout") || got.value("Connection") != "close" {
			t.Errorf("%s: %+v %s", path, got, got.body)
		}
		up.closed()
		client.closed()
		if ex := rg.ended(); ex.Outcome != Refused || ex.Status != http.StatusRequestTimeout {
			t.Errorf("%s: %+v", path, ex)
		}
	}
}

// TestBufferClasses: a buffer is at most an eighth larger than necessary, and each size has its own
// pool.
func TestBufferClasses(t *testing.T) {
	last, lastSize := 0, int64(0)
	for n := int64(1); n <= bufferPooled; n += 1 + n/100 {
		i, size := bufferClass(n)
		if size < n || n > bufferLeast && (size-n)*8 > n || i < last || (i == last) != (size == lastSize) && lastSize > 0 {
			t.Fatalf("%d bytes: %d, after %d in %d; class %d after %d", n, size, lastSize, n, i, last)
		}
		if again, same := bufferClass(size); again != i || same != size {
			t.Fatalf("a buffer of %d bytes goes to class %d (%d) instead of %d", size, again, same, i)
		}
		last, lastSize = i, size
	}
	if i, size := bufferClass(bufferPooled); i != len(buffers)-1 || size != bufferPooled {
		t.Errorf("the last class is %d, %d bytes", i, size)
	}
}

// TestMemoryBudgets: whatever the budget, and whatever is announced, bodies take no more than there
// is, and one that fits is read.
func TestMemoryBudgets(t *testing.T) {
	for limit := int64(MemoryLeast); limit < 400<<20; limit += 3_333_333 {
		m := newMemory(limit)
		most := min(int64(DefaultMaxBody), m.most)
		for _, announced := range []int64{-1, 200 << 10, most, most + 1, 1<<63 - 1} {
			ctx, cancel := context.WithCancel(t.Context())
			src := &limited{left: 200 << 10, end: cancel}
			b, over, err := m.read(ctx, schedule.Normal, src, announced, most, func() error { return nil })
			if err != nil || over || len(b.data) != 200<<10 {
				t.Fatalf("a budget of %d, %d announced: %v", limit, announced, err)
			}
			b.release()
			cancel()
			if held := m.held.Load(); held != 0 {
				t.Fatalf("a budget of %d: %d bytes are held", limit, held)
			}
		}
	}
}

// limited is a reader of left bytes. A caller that keeps asking for zero bytes gets an error, and
// end is called.
type limited struct {
	left, empty int
	end         func()
}

func (l *limited) Read(p []byte) (int, error) {
	if len(p) == 0 {
		if l.empty++; l.empty > 100 {
			l.end()
			return 0, errors.New("asked for nothing")
		}
	}
	if l.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), l.left)
	l.left -= n
	return n, nil
}

// TestMemoryCrowd: a crowd of short bodies that wait for memory does not block a more urgent one.
func TestMemoryCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(MemoryLeast)
		read := func(p schedule.Priority) *body {
			b, _, err := m.read(t.Context(), p, strings.NewReader(strings.Repeat("x", 50<<10)), 50<<10, 1<<20, func() error { return nil })
			if err != nil {
				t.Error(err)
			}
			return b
		}
		var held []*body
		for m.first.TryAcquire(bodyFirst) {
			m.first.Release(bodyFirst)
			held = append(held, read(schedule.Batch))
		}
		var mu sync.Mutex
		var order []schedule.Priority
		var served []*body // released at the end: each would let in the next, whoever runs first
		var wg sync.WaitGroup
		wait := func(p schedule.Priority) {
			wg.Go(func() {
				b := read(p)
				mu.Lock()
				order = append(order, p)
				served = append(served, b)
				mu.Unlock()
			})
			synctest.Wait()
		}
		for range 20 {
			wait(schedule.Batch)
		}
		wait(schedule.Interactive)
		for _, b := range held {
			b.release()
			synctest.Wait()
		}
		wg.Wait()
		for _, b := range served {
			b.release()
		}
		if i := slices.Index(order, schedule.Interactive); i > 2 {
			t.Errorf("%d of the crowd went before it", i)
		}
	})
}
