package fleet

import (
	"fmt"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// chain returns the links of a prompt that begins as others with the same numbers do.
func chain(numbers ...int) (links []prefix.Link) {
	hash := uint64(1)
	for i, n := range numbers {
		hash = hash*1_000_003 + uint64(n) + 1
		links = append(links, prefix.Link{Hash: hash, Bytes: 1000 * (i + 1)})
	}
	return links
}

// chooser returns a proxy with the server a, whose peer has b, c and d.
func chooser() *Fleet {
	f := New(Config{Name: "here", Local: func() []Server { return nil }})
	server := func(name string) Server {
		return Server{Name: name, Takes: true, Models: []string{"m", "n"}}
	}
	there := &member{peer: &peer{addr: "there:1"}, id: "there", name: "there"}
	for _, name := range []string{"b", "c", "d"} {
		there.servers = append(there.servers, server(name))
	}
	f.view.Store(conclude([]*member{{id: f.ID, name: "here", servers: []Server{server("a")}}, there}))
	return f
}

// TestChoose: a prompt goes where the most of it was seen, and last; a new one goes to one server,
// whichever proxy asks, of those that have its model loaded.
func TestChoose(t *testing.T) {
	f := chooser()
	to := func(model string, links []prefix.Link) string {
		t.Helper()
		p, ok := f.Choose(Ask{Model: model, Links: links})
		if !ok {
			t.Fatal("there is no server")
		}
		return p.Server
	}
	other, used := chooser(), map[string]int{}
	for i := range 200 {
		p, _ := other.Choose(Ask{Model: "m", Links: chain(1000+i, 1, 2, 3)})
		used[p.Server]++
		if got := to("m", chain(1000+i, 1, 2, 3)); got != p.Server {
			t.Errorf("two proxies choose %s and %s for one new prompt", got, p.Server)
		}
	}
	if len(used) != 4 {
		t.Errorf("200 new prompts go to %v", used)
	}
	f.Sent("b", chain(1, 2, 3, 4))
	f.Sent("c", chain(1, 2, 3, 4, 5, 6, 7, 8))
	f.Sent("b", chain(21, 22, 23))
	for _, c := range []struct {
		want  string
		links []prefix.Link
	}{
		{"b", chain(21, 22, 23, 24)},
		{"c", chain(1, 2, 3, 4, 5, 6, 7, 8, 9)},
		{"c", chain(1, 2, 9)}, // both have as much of it, and c had it later
	} {
		if got := to("m", c.links); got != c.want {
			t.Errorf("a prompt of %d links goes to %s, want %s", len(c.links), got, c.want)
		}
	}
	for _, s := range f.view.Load().places {
		s.Loaded = map[bool][]string{true: {"n"}}[s.Name == "d"]
	}
	for i := range 50 {
		if got := to("n", chain(5000+i, 1, 2)); got != "d" {
			t.Fatalf("a new prompt goes to %s, which would have to load the model", got)
		}
	}
	if _, ok := f.Choose(Ask{Model: "absent"}); ok {
		t.Error("a server is found for a model that none has")
	}
	if p, ok := f.Choose(Ask{Model: "m", Server: "b", Links: chain(1)}); !ok || p.Server != "b" || p.Here() {
		t.Errorf("asked for b, it is %+v", p)
	}
	if p, ok := f.Choose(Ask{Model: "m"}); !ok || !p.Here() {
		t.Errorf("without a prompt it is %+v, want this proxy's own", p)
	}
	if _, ok := f.Choose(Ask{Model: "m", Server: "b", Not: []string{"there"}}); ok {
		t.Error("a peer that did not serve it is asked again")
	}
}

// TestHot: what several servers hold goes to the least loaded one of them; what one of them may have
// lost since goes to the last one that saw it.
func TestHot(t *testing.T) {
	f := chooser()
	places := f.view.Load().places
	for _, name := range []string{"b", "c"} {
		places[name].Slots = 2
	}
	hot := chain(1, 2, 3)
	choose := func(want, when string) {
		t.Helper()
		if p, _ := f.Choose(Ask{Model: "m", Links: hot}); p.Server != want {
			t.Errorf("%s, a hot prompt goes to %s, want %s", when, p.Server, want)
		}
		f.sent.reset("there")
	}
	f.Sent("b", hot)
	f.Sent("c", hot)
	choose("c", "with equal loads")
	places["c"].Running = 2
	choose("b", "when the last server has more to do")
	choose("b", "when that is only assumed to have got it")
	places["b"].Wait = 5
	choose("c", "when the other one's queue is longer")
	places["b"].Wait = 0
	f.Sent("c", hot)
	for i := range 3 { // more than the slots of b
		f.Sent("b", chain(100+i, 1, 2))
	}
	choose("c", "when the other one may have lost it")
}

// TestAstray: a passed prompt is sent on only if its beginning was given to another proxy's server,
// and is not warm here.
func TestAstray(t *testing.T) {
	f := chooser()
	given, own, both := chain(1, 2, 3), chain(4, 5, 6), chain(7, 8, 9)
	f.Sent("b", given)
	f.Sent("a", own)
	f.Sent("a", both)
	f.Sent("c", both)
	for _, c := range []struct {
		links []prefix.Link
		want  string
	}{{given, "b"}, {chain(1, 2, 3, 50), "b"}, {own, ""}, {both, ""}, {chain(60, 61, 62), ""}} {
		got, ok := f.Astray(Ask{Model: "m", Links: c.links})
		if got != c.want || ok != (c.want != "") {
			t.Errorf("%v: sent on to %q, want %q", fmt.Sprint(c.links[0].Hash), got, c.want)
		}
	}
	f.seen.put(Sight{Server: "a", Hashes: sample(chain(70, 71, 72))}, true)
	f.Sent("d", chain(70, 71, 72))
	if got, _ := f.Astray(Ask{Model: "m", Links: chain(70, 71, 72)}); got != "d" {
		t.Errorf("what was only assumed to be here goes to %q, want d", got)
	}
	f.seen.put(Sight{Server: "b", Hashes: sample(chain(80, 81, 82))}, true)
	if got, ok := f.Astray(Ask{Model: "m", Links: chain(80, 81, 82)}); ok {
		t.Errorf("on an assumption it is sent on to %s", got)
	}
}
