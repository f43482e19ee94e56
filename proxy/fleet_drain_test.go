package proxy

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// orders drains or resumes a server at a proxy, and returns what is said of it.
func (p *ally) orders(server, verb string) (e upstreamEntry) {
	p.t.Helper()
	res, text := p.post(pathUpstreams+server+"/"+verb, "")
	if err := json.Unmarshal([]byte(text), &e); err != nil || res.StatusCode != 200 {
		p.t.Errorf("%s %s: %s %s", verb, server, res.Status, text)
	}
	if e.Name != server || e.Draining != (verb == verbDrain) || len(e.Unheard) > 0 {
		p.t.Errorf("%s %s: %+v", verb, server, e)
	}
	return e
}

// occupies sends a request to a server, which holds it until release is called.
func (p *ally) occupies(b *box) (release func(), answer <-chan string) {
	p.t.Helper()
	release = b.holding()
	answer = p.sends(p.t.Context(), "/api/chat", chat("m", "held"), headerUpstream+": "+b.name)
	b.holds(answer)
	return release, answer
}

// chats returns how many chats a server got.
func (b *box) chats() (n int) {
	for _, text := range b.took() {
		if strings.HasPrefix(text, "POST /api/chat") {
			n++
		}
	}
	return n
}

// TestDrainAtAll: a server that is drained at one proxy is drained at all of them, whether the proxy
// owns it, lists it, or neither; what it is answering ends.
func TestDrainAtAll(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "m@1")
	a := edgeOf(t, 3, nil, x, y)
	owner, entry := a.of("x")
	release, answer := owner.occupies(x)
	x.took()
	if e := entry.orders("x", verbDrain); e.InFlight != 1 {
		t.Errorf("%d requests are in flight", e.InFlight)
	}
	for _, p := range a.proxy {
		for i := range 4 {
			text := strings.Repeat("different ", i+1)
			if status, from := p.ask("POST", "/api/chat", chat("m", text)); status != 200 || from != "y" {
				t.Errorf("%d from %q", status, from)
			}
		}
	}
	if n := x.chats(); n != 0 {
		t.Errorf("the drained server got %d requests", n)
	}
	release()
	if got := <-answer; !strings.HasPrefix(got, "200 ") {
		t.Errorf("what was in progress: %s", got)
	}
	a.rest()
	if e := owner.orders("x", verbDrain); e.InFlight != 0 {
		t.Errorf("%d requests are still in flight", e.InFlight)
	}
	a.proxy[0].orders("y", verbDrain)
	for _, p := range a.proxy {
		res, text := p.post("/api/chat", chat("m", "s"))
		if res.StatusCode != 503 || !strings.Contains(text, "is draining") {
			t.Errorf("all are drained: %s %s", res.Status, text)
		}
	}
	a.proxy[2].orders("x", verbResume)
	for _, p := range a.proxy {
		if status, from := p.ask("POST", "/api/chat", chat("m", "s")); status != 200 || from != "x" {
			t.Errorf("%d from %q", status, from)
		}
	}
	// A server that is added, having been away, is still drained.
	y.took()
	owner, _ = a.of("y")
	owner.h.RemoveUpstream("y")
	poll(t, func() bool { return owner.h.named("y") == nil })
	s := upstream.NewServer("y", y.URL, owner.h.Transport, owner.h.Log)
	s.Polled = func(st upstream.State) { owner.h.Polled(s, st) }
	owner.h.AddUpstream(s, 1, 0)
	if b := owner.h.named("y"); b == nil || !b.draining.Load() {
		t.Error("a drained server that comes again gets requests")
	}
}

// TestSidecarDrain: a server that only another proxy has is drained through any of them.
func TestSidecarDrain(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "n@2")
	a := sidecars(t, func(_ int, h *Handler, c *fleet.Config) {
		h.Guard = withKeys(t, "alice "+theKey+"a\nops "+theKey+"b admin")
	}, x, y)
	alice, ops := "Authorization: Bearer "+theKey+"a", "Authorization: Bearer "+theKey+"b"
	owner, entry := a.of("x")
	for _, name := range []string{"x", "nobodys"} {
		if res, text := entry.post(pathUpstreams+name+"/drain", "", alice); res.StatusCode/100 != 4 {
			t.Errorf("%s is drained without a right to: %s %s", name, res.Status, text)
		}
	}
	if res, text := entry.post(pathUpstreams+"nobodys/drain", "", ops); res.StatusCode != 404 {
		t.Errorf("a server that nobody has: %s %s", res.Status, text)
	}
	if res, text := entry.post(pathUpstreams+"x/unload?model=m", "", ops); res.StatusCode != 404 {
		t.Errorf("unloading at a server of another proxy: %s %s", res.Status, text)
	}
	for _, verb := range []string{verbDrain, verbResume} {
		res, text := entry.post(pathUpstreams+"x/"+verb, "", ops)
		if res.StatusCode != 200 || strings.Contains(text, "unheard") ||
			!strings.Contains(text, `"draining":`+map[bool]string{true: "true", false: "false"}[verb == verbDrain]) {
			t.Errorf("%s: %s %s", verb, res.Status, text)
		}
		want := 200
		if verb == verbDrain {
			want = 503
		}
		for _, p := range []*ally{entry, owner} {
			if res, text := p.post("/api/chat", chat("m", "s"), alice); res.StatusCode != want ||
				want == 503 && !strings.Contains(text, "upstream x is draining") {
				t.Errorf("after %s: %s %s", verb, res.Status, text)
			}
		}
	}
}

// TestDrainMeanwhile: a request that comes to the proxy beside a server while that is drained goes
// to another proxy's server, whatever the entry has heard by then.
func TestDrainMeanwhile(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "m@1")
	a := sidecars(t, nil, x, y)
	owner, entry := a.of("x")
	b := owner.h.named("x")
	asks := func(p *ally, i int) {
		t.Helper()
		res, text := p.post("/api/chat", chat("m", strings.Repeat("another ", i+1)))
		if from := res.Header.Get(headerUpstream); res.StatusCode != 200 || from != "y" {
			t.Errorf("%s from %q: %s", res.Status, from, text)
		}
	}
	for i := range 5 {
		owner.h.drain(b, true) // the entry knows of it with the next report
		asks(entry, i)
		owner.h.drain(b, false)
		a.agree()
		ordered := make(chan struct{})
		go func() { // ends when both have heard of it
			defer close(ordered)
			entry.h.Fleet.Order(t.Context(), "x", true)
		}()
		poll(t, b.draining.Load)
		asks(owner, i)
		<-ordered
		owner.orders("x", verbResume)
		a.agree()
	}
	if n := x.chats(); n > 0 {
		t.Errorf("the drained server got %d requests", n)
	}
}

// TestDrainUnload: a model of a server that is drained can be unloaded, through every proxy.
func TestDrainUnload(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "n@2")
	a := sidecars(t, nil, x, y)
	owner, entry := a.of("x")
	owner.orders("x", verbDrain)
	for _, p := range []*ally{owner, entry} {
		x.took()
		res, text := p.post("/api/generate", `{"model":"m","keep_alive":0}`)
		if got := x.took(); res.StatusCode != 200 || !slices.ContainsFunc(got, func(s string) bool {
			return strings.HasPrefix(s, "POST /api/generate")
		}) {
			t.Errorf("%s %s; the server got %q", res.Status, text, got)
		}
	}
}

// TestDrainWaiting: what waits for the only server with its model when that is drained is still
// answered, at whichever proxy it is drained: all go on to think that one and the same owns it.
func TestDrainWaiting(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "n@2")
	a := edgeOf(t, 3, nil, x, y)
	owner, entry := a.of("x")
	for i, p := range []*ally{owner, entry} {
		changes := owner.h.Fleet.Counts().Owners
		release := x.holding()
		answer := owner.sends(t.Context(), "/api/chat", chat("m", "held"))
		x.holds(answer)
		waiting := entry.sends(t.Context(), "/api/chat", chat("m", strings.Repeat("waits ", i+1)))
		poll(t, func() bool { return owner.h.Waiting() == 1 })
		p.orders("x", verbDrain)
		release()
		for _, answer := range []<-chan string{answer, waiting} {
			if got := <-answer; !strings.HasPrefix(got, "200 ") {
				t.Errorf("what came before it was drained: %s", got)
			}
		}
		p.orders("x", verbResume)
		a.agree()
		if n := owner.h.Fleet.Counts().Owners - changes; n > 0 {
			t.Errorf("the owner has begun and ceased to own servers %d times", n)
		}
	}
}

// TestDrainYields: what waits for a server that is drained goes to another proxy's, although that
// one is not idle.
func TestDrainYields(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "m@1")
	a := sidecars(t, nil, x, y)
	owner, entry := a.of("x")
	releaseX, answerX := owner.occupies(x)
	releaseY, answerY := owner.occupies(y)
	answers := []<-chan string{answerX, answerY}
	waiting := func(p *ally) (n int) {
		for _, l := range p.h.Lanes.Loads() {
			n += l.Waiting
		}
		return n
	}
	// Which server each goes to follows from its prompt.
	for i := 0; waiting(owner) < 2 && i < 50; i++ {
		before := waiting(owner) + waiting(entry)
		for _, p := range []*ally{owner, entry} {
			answers = append(answers, p.sends(t.Context(), "/api/chat", chat("m", passage(2*i, 300))))
		}
		poll(t, func() bool { return waiting(owner)+waiting(entry) == before+2 })
	}
	x.took()
	entry.orders("x", verbDrain)
	poll(t, func() bool { return waiting(owner) == 0 && waiting(entry) == len(answers)-2 })
	releaseX()
	releaseY()
	for _, answer := range answers {
		if got := <-answer; !strings.HasPrefix(got, "200 ") {
			t.Error(got)
		}
	}
	if n := x.chats(); n > 0 {
		t.Errorf("the drained server got %d requests", n)
	}
}

// TestDrainStays: a server that is removed from a proxy, and stays there after all, is drained or
// resumed as it was ordered meanwhile.
func TestDrainStays(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "m@1")
	a := edgeOf(t, 2, nil, x, y)
	owner, other := a.of("x")
	release, answer := owner.occupies(x)
	for _, verb := range []string{verbDrain, verbResume} {
		owner.h.RemoveUpstream("x")
		if owner.h.named("x") != nil {
			t.Fatal("it is not removed")
		}
		other.orders("x", verb)
		s := upstream.NewServer("x", x.URL, owner.h.Transport, owner.h.Log)
		owner.h.AddUpstream(s, 1, 0)
		if b := owner.h.named("x"); b == nil || b.draining.Load() != (verb == verbDrain) {
			t.Errorf("%s does not count for a server that stays", verb)
		}
	}
	release()
	if got := <-answer; !strings.HasPrefix(got, "200 ") {
		t.Errorf("what was in progress: %s", got)
	}
}
