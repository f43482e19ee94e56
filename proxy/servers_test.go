package proxy

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// movable is a fleet whose boxes come and go.
type movable struct {
	*severalServers
	gone chan string // names of those that have been forgotten
}

func newMovable(t *testing.T, slots int, boxes ...*box) *movable {
	t.Helper()
	return newMovableWith(t, slots, nil, boxes...)
}

// newMovableWith is newMovable with a handler that change has changed before it runs.
func newMovableWith(t *testing.T, slots int, change func(*Handler), boxes ...*box) *movable {
	t.Helper()
	m := &movable{newFleet(t, slots, boxes...), make(chan string, 100)}
	m.h.Forgotten = func(name string) { m.gone <- name }
	m.h.Done = func(Exchange) {} // the rig keeps only so many
	if change != nil {
		change(m.h)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.h.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return m
}

// server returns an upstream that is not known to the handler.
func (m *movable) server(name string, u *url.URL) (*upstream.Server, chan upstream.State) {
	s := upstream.NewServer(name, u, m.h.Transport, m.h.Log)
	polled := make(chan upstream.State, 100)
	s.Polled = func(st upstream.State) {
		m.h.Polled(s, st)
		select {
		case polled <- st:
		default:
		}
	}
	return s, polled
}

// add adds a box, and waits until it has been polled.
func (m *movable) add(b *box, lanes int) {
	m.t.Helper()
	s, polled := m.server(b.name, b.URL)
	m.h.AddUpstream(s, lanes, 0)
	if st := <-polled; !st.Up {
		m.t.Fatalf("%s: %v", b.name, st.Err)
	}
}

// names returns the names on the page of the upstreams; a - stands behind those that drain.
func (m *movable) names() (names []string) {
	for _, e := range m.h.upstreams() {
		if e.Draining {
			e.Name += "-"
		}
		names = append(names, e.Name)
	}
	return names
}

func (m *movable) listed(want ...string) {
	m.t.Helper()
	if got := m.names(); !slices.Equal(got, want) {
		m.t.Errorf("the upstreams are %v, want %v", got, want)
	}
}

// TestServerComesAndGoes: a server that is added while requests are served gets those for its
// models; once it is removed it gets no more, finishes what it has, and is forgotten. If it comes
// again, it has the index that it had.
func TestServerComesAndGoes(t *testing.T) {
	a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1", "n@2")
	m := newMovable(t, 1, a)
	if status, _ := m.ask("POST", "/api/chat", chat("n", "x")); status != 404 {
		t.Errorf("a model that nobody has: %d", status)
	}
	m.add(b, 1)
	m.listed("a", "b")
	if status, from := m.ask("POST", "/api/chat", chat("n", "x")); status != 200 || from != "b" {
		t.Errorf("%d from %q", status, from)
	}
	index := m.h.named("b").index

	hold := make(chan struct{})
	b.set(func() { b.hold = hold })
	answered := make(chan string)
	go func() {
		_, from := m.ask("POST", "/api/chat", chat("n", "y"))
		answered <- from
	}()
	<-b.came
	m.h.RemoveUpstream("b")
	m.listed("a", "b-")
	if status, _ := m.ask("POST", "/api/chat", chat("n", "z")); status != 404 {
		t.Errorf("a model that only the removed server has: %d", status)
	}
	if status, from := m.ask("POST", "/api/chat", chat("m", "z"), headerUpstream+": b"); status != 400 {
		t.Errorf("a request for the removed server: %d from %q", status, from)
	}
	for range 3 {
		if status, from := m.ask("POST", "/api/chat", chat("m", "z")); status != 200 || from != "a" {
			t.Errorf("%d from %q", status, from)
		}
	}
	if d := m.h.Draining(); !maps.Equal(d, map[string]bool{"a": false, "b": true}) {
		t.Errorf("draining: %v", d)
	}
	close(hold)
	if from := <-answered; from != "b" {
		t.Errorf("the running request was answered by %q", from)
	}
	if name := <-m.gone; name != "b" {
		t.Errorf("%q was forgotten", name)
	}
	m.listed("a")
	b.set(func() { b.hold = nil })
	m.h.at(index).foreign.Store(true) // as the fleet has said
	m.add(b, 1)
	if !m.h.named("b").foreign.Load() {
		t.Error("after it came again it is this proxy's own, and the fleet has not said so")
	}
	if status, from := m.ask("POST", "/api/chat", chat("n", "x")); status != 200 || from != "b" {
		t.Errorf("after it came again: %d from %q", status, from)
	}
	if again := m.h.named("b").index; again != index {
		t.Errorf("its index is %d, and was %d", again, index)
	}
	if name := m.h.UpstreamName(index); name != "b" {
		t.Errorf("index %d is %q", index, name)
	}
}

// TestRemovedWhileRequestsWait: requests that wait for a removed server go to another one that can
// serve them; what no other can serve waits for it and is served there.
func TestRemovedWhileRequestsWait(t *testing.T) {
	a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1", "n@2")
	m := newMovable(t, 1, a)
	m.add(b, 1)
	hold := make(chan struct{})
	for _, x := range []*box{a, b} {
		x.set(func() { x.hold = hold })
	}
	type result struct{ model, from string }
	results := make(chan result, 100)
	var wg sync.WaitGroup
	send := func(model string, id int) {
		wg.Go(func() {
			_, from := m.ask("POST", "/api/chat", chat(model, passage(id, 300)))
			results <- result{model, from}
		})
	}
	for i := range 2 { // one running on each
		send("m", i)
	}
	<-a.came
	<-b.came
	for i := range 10 {
		send("m", 10+i)
	}
	for i := range 3 {
		send("n", 20+i)
	}
	waiting(t, m.rig, 13)
	m.h.RemoveUpstream("b")
	for _, w := range m.h.Lanes.Waiting(100).First {
		if name := m.h.UpstreamName(w.Upstream); name == "b" && m.h.at(w.Upstream).modelName(w.Options.Model) == "m:latest" {
			t.Errorf("a request for m still waits for b")
		}
	}
	close(hold)
	wg.Wait()
	close(results)
	count := map[result]int{}
	for r := range results {
		count[r]++
	}
	if want := map[result]int{{"m", "a"}: 11, {"m", "b"}: 1, {"n", "b"}: 3}; !maps.Equal(count, want) {
		t.Errorf("%v, want %v", count, want)
	}
	if name := <-m.gone; name != "b" {
		t.Errorf("%q was forgotten", name)
	}
	if st := m.h.LaneStats(); slices.ContainsFunc(st.Runners, func(r schedule.RunnerStats) bool { return r.Runner.Upstream != 0 }) {
		t.Errorf("the scheduler still has the server: %+v", st.Runners)
	}
}

// TestRemovedAndAway: what waits for a removed server that does not answer gets the usual error once
// it has been waited for, and the server is forgotten.
func TestRemovedAndAway(t *testing.T) {
	a, b := newBox(t, "a", "m@1"), newBox(t, "b", "n@2")
	m := newMovable(t, 1, a)
	s, polled := m.server("b", b.URL)
	s.TryDuration = time.Second
	m.h.AddUpstream(s, 1, 0)
	<-polled
	hold := make(chan struct{})
	b.set(func() { b.hold = hold })
	var wg sync.WaitGroup
	statuses := make([]int, 3)
	for i := range statuses {
		wg.Go(func() {
			res, _ := m.do("POST", "/api/chat", chat("n", strconv.Itoa(i)))
			statuses[i] = res.StatusCode
		})
	}
	<-b.came
	waiting(t, m.rig, 2)
	m.h.RemoveUpstream("b")
	m.kill(b)
	close(hold) // by now nobody can be answered any more, not even the one that it had begun with
	wg.Wait()
	broke := func(status int) bool { return status == 502 }
	for _, s := range statuses {
		if s != 502 && s != 503 {
			t.Errorf("a request got %d", s)
		}
	}
	if !slices.ContainsFunc(statuses, broke) {
		t.Errorf("none broke off: %v", statuses)
	}
	if name := <-m.gone; name != "b" {
		t.Errorf("%q was forgotten", name)
	}
	if n := m.h.Waiting(); n != 0 {
		t.Errorf("%d wait", n)
	}
}

// TestStaysAfterAll: a server that is added again before it was forgotten stays as it is.
func TestStaysAfterAll(t *testing.T) {
	a, b := newBox(t, "a", "m@1"), newBox(t, "b", "n@2")
	m := newMovable(t, 1, a)
	m.add(b, 1)
	hold := make(chan struct{})
	b.set(func() { b.hold = hold })
	answered := make(chan int)
	go func() {
		status, _ := m.ask("POST", "/api/chat", chat("n", "y"))
		answered <- status
	}()
	<-b.came
	before := m.h.named("b")
	m.h.RemoveUpstream("b")
	elsewhere, _ := m.server("b", &url.URL{Scheme: "http", Host: "127.0.0.1:1"})
	m.h.AddUpstream(elsewhere, 1, 0) // refused
	m.listed("a", "b-")
	again, _ := m.server("b", b.URL)
	m.h.AddUpstream(again, 1, 0)
	m.listed("a", "b")
	m.h.AddUpstream(again, 1, 0) // nothing changes
	m.listed("a", "b")
	if m.h.named("b") != before {
		t.Error("it is another one")
	}
	close(hold)
	if status := <-answered; status != 200 {
		t.Errorf("the running request: %d", status)
	}
	if status, from := m.ask("POST", "/api/chat", chat("n", "z")); status != 200 || from != "b" {
		t.Errorf("%d from %q", status, from)
	}
	if len(m.gone) > 0 {
		t.Errorf("%s was forgotten", <-m.gone)
	}
	if n := strings.Count(m.log.String(), "another one has its name"); n != 1 {
		t.Errorf("%d lines about the name", n)
	}
}

// TestNoServerYet: without any server, requests get an error that says so, and the proxy's pages
// work; with the first one they are served.
func TestNoServerYet(t *testing.T) {
	a := newBox(t, "a", "m@1")
	m := newMovable(t, 1)
	for path, body := range map[string]string{
		"/api/chat": chat("m", "x"), "/api/tags": "", "/api/embed": `{"model":"m","input":"x"}`, "/": "", "/v1/models": "", "/api/pull": `{"model":"m"}`,
	} {
		method := http.MethodGet
		if body != "" {
			method = http.MethodPost
		}
		if res, text := m.do(method, path, body); res.StatusCode != 503 || !strings.Contains(text, "no Ollama server has been found") || res.Header.Get("Retry-After") == "" {
			t.Errorf("%s %s: %d %s", method, path, res.StatusCode, text)
		}
	}
	for path, want := range map[string]int{pathReady: 503, pathHealth: 200, pathQueue: 200, pathRequests: 200, pathFacts: 200, strings.TrimSuffix(pathUpstreams, "/"): 200, ownPrefix: 200} {
		if res, text := m.do("GET", path, ""); res.StatusCode != want {
			t.Errorf("%s: %d %s", path, res.StatusCode, text)
		}
	}
	m.add(a, 1)
	if status, from := m.ask("POST", "/api/chat", chat("m", "x")); status != 200 || from != "a" {
		t.Errorf("%d from %q", status, from)
	}
	if res, _ := m.do("GET", pathReady, ""); res.StatusCode != 200 {
		t.Errorf("ready: %d", res.StatusCode)
	}
	m.h.RemoveUpstream("a")
	<-m.gone
	if res, _ := m.do("POST", "/api/chat", chat("m", "x")); res.StatusCode != 503 {
		t.Errorf("after the last has gone: %d", res.StatusCode)
	}
}

// TestServersChangeUnderLoad: while servers come and go, no request fails, whatever asks for the
// pages and the statistics meanwhile.
func TestServersChangeUnderLoad(t *testing.T) {
	stays := newBox(t, "stays", "m@1")
	m := newMovable(t, 2, stays)
	var others []*box
	for i := range 3 {
		b := newBox(t, fmt.Sprintf("other-%d", i), "m@1")
		b.loaded, b.tokens = []string{"m"}, 4096 // else all goes where it is loaded
		others = append(others, b)
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var mu sync.Mutex
	from := map[string]int{}
	for c := range 6 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				status, name := m.ask("POST", "/api/chat", chat("m", passage(1000*c+i, 50)))
				if status != 200 {
					t.Errorf("status %d", status)
				}
				mu.Lock()
				from[name]++
				mu.Unlock()
			}
		})
	}
	wg.Go(func() {
		for ctx.Err() == nil {
			m.h.LaneStats()
			m.h.queue(10)
			m.h.pageUpstreams(m.h.LaneStats())
			for _, path := range []string{pathFacts, pathReady, "/api/tags"} {
				if res, text := m.do("GET", path, ""); res.StatusCode != 200 {
					t.Errorf("%s: %d %s", path, res.StatusCode, text)
				}
			}
		}
	})
	for range 4 {
		for _, b := range others {
			m.add(b, 2)
		}
		for _, b := range others {
			b.wait("POST /api/chat")
			b.took()
		}
		for _, b := range others {
			m.h.RemoveUpstream(b.name)
		}
		for range others {
			<-m.gone
		}
	}
	stop()
	wg.Wait()
	m.listed("stays")
	if len(from) != 4 {
		t.Errorf("the answers came from %v", from)
	}
}

// TestIndices: a name has one index, others get it only when nothing is free, and of as many
// servers as there can be no more are added.
func TestIndices(t *testing.T) {
	h := &Handler{}
	h.Init()
	u := &url.URL{Scheme: "http", Host: "127.0.0.1:1"}
	add := func(name string) *backend {
		h.AddUpstream(upstream.NewServer(name, u, http.DefaultTransport, h.Log), 0, 0)
		return h.named(name)
	}
	leave := func(b *backend) {
		h.RemoveUpstream(b.Name)
		if !h.end(b, func() {}) {
			t.Fatalf("%s is not gone", b.Name)
		}
	}
	for i := range mostIndices {
		b := add(fmt.Sprint("name", i))
		if int(b.index) != i {
			t.Fatalf("the index of server %d is %d", i, b.index)
		}
		leave(b)
	}
	if b := add("name7"); b.index != 7 {
		t.Errorf("index %d, and it was 7", b.index)
	}
	if b := add("other"); b.index != 0 {
		t.Errorf("index %d, want the oldest, 0", b.index)
	}
	for i := range mostServers {
		add(fmt.Sprint("more", i))
	}
	seen := map[uint16]bool{}
	for _, b := range h.backends() {
		if seen[b.index] || h.at(b.index) != b {
			t.Errorf("index %d is not only %s's", b.index, b.Name)
		}
		seen[b.index] = true
	}
	if len(seen) != mostServers || len(h.servers.Load().known) != mostIndices {
		t.Errorf("%d servers with %d indices", len(seen), len(h.servers.Load().known))
	}
}

// TestServerKeepsAnswers: answers of a server are kept although others have come and gone before it.
func TestServerKeepsAnswers(t *testing.T) {
	a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1")
	m := newMovableWith(t, 1, func(h *Handler) {
		h.Answers = answers.NewMemory(answers.Limits{Bytes: 1 << 20})
		h.CacheAnswers = CacheAnswers{Default: CacheAll}
	}, a)
	m.add(b, 1)
	m.h.RemoveUpstream("a")
	<-m.gone
	if status, from := m.ask("POST", "/api/chat", chat("m", "s")); status != 200 || from != "b" {
		t.Errorf("%d from %q", status, from)
	}
	poll(t, func() bool { return m.h.Answers.Stats().Entries == 1 })
}
