package storetest

import (
	"fmt"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Tests of how the content of a store becomes outdated.

func testCool(t *testing.T, s contextstore.Store) {
	m, other := s.Model("m"), s.Model("other")
	a, b, c, d := links("a", 4), links("b", 4), links("c", 4), links("d", 4)
	s.Put(a, contextstore.Sight{Upstream: 1, Model: m}, 40)
	s.Put(b, contextstore.Sight{Upstream: 2, Model: m}, 40)
	s.Put(c, contextstore.Sight{Upstream: 1, Model: other}, 40)
	s.Cool(1, m)
	s.Put(d, contextstore.Sight{Upstream: 1, Model: m}, 40)
	warm := func(step string, want ...bool) {
		t.Helper()
		for i, links := range [][]prefix.Link{a, b, c, d} {
			if got := record(t, s, links).Warm; got != want[i] {
				t.Errorf("%s: warm is %v for chain %d", step, got, i)
			}
		}
	}
	warm("cooled", false, true, true, true)
	want := contextstore.Record{Sight: contextstore.Sight{Upstream: 1, Model: m}, Tokens: 40}
	if rec := record(t, s, a); !equal(rec, want) {
		t.Errorf("of a link that is not warm %+v is known, want %+v", rec, want)
	}
	s.Put(a[:2], contextstore.Sight{Upstream: 1, Model: m}, 0)
	if !record(t, s, a[:2]).Warm {
		t.Error("links that were seen again are not warm")
	}
	warm("its beginning seen again", false, true, true, true)
	s.Put(a, contextstore.Sight{Upstream: 1, Model: m}, 0)
	warm("seen again", true, true, true, true)
	s.Cool(1, m)
	s.Put(a, contextstore.Sight{Upstream: 2, Model: m}, 0)
	warm("seen elsewhere", true, true, true, false)
	s.Cool(1, m)
	warm("cooled where it was before", true, true, true, false)
	s.Cool(2, m)
	warm("cooled there", false, false, true, false)
}

func testCoolAll(t *testing.T, s contextstore.Store) {
	for i, key := range []string{"m", "other"} {
		for up := range 2 {
			s.Put(numbered(2*i+up, 3), contextstore.Sight{Upstream: uint16(up), Model: s.Model(key)}, 0)
		}
	}
	s.Cool(1, 0)
	for i := range 2 {
		for up := range 2 {
			if rec := record(t, s, numbered(2*i+up, 3)); rec.Warm != (up == 0) {
				t.Errorf("model %d, upstream %d: warm is %v", i, up, rec.Warm)
			}
		}
	}
	s.Put(links("c", 3), contextstore.Sight{Upstream: 1, Model: s.Model("new")}, 0)
	if !record(t, s, links("c", 3)).Warm {
		t.Error("what was seen since is not warm")
	}
}

func testForget(t *testing.T, s contextstore.Store) {
	m := s.Model("m")
	a, b := links("a", 5), links("b", 5)
	s.Put(a, contextstore.Sight{Model: m}, 50)
	s.Put(b, contextstore.Sight{Model: s.Model("other")}, 50)
	s.Forget(m)
	wantDepth(t, s, a, 0)
	wantDepth(t, s, b, 5)
	if again := s.Model("m"); again != m {
		t.Errorf("the model's number was %d and is %d", m, again)
	}
	s.Put(a[:4], contextstore.Sight{Model: m}, 0)
	wantDepth(t, s, a, 4)
	s.Put(a, contextstore.Sight{Model: m}, 0)
	if rec := record(t, s, a); !equal(rec, contextstore.Record{Sight: contextstore.Sight{Model: m}, Warm: true}) {
		t.Errorf("%+v is left of what was forgotten", rec)
	}
	s.Cool(0, m)
	if record(t, s, a).Warm {
		t.Error("a model that was forgotten cannot be cooled any more")
	}
	within(t, s)
}

func testForgetAll(t *testing.T, s contextstore.Store) {
	m := s.Model("m")
	put(s, links("a", 5), "m")
	put(s, links("b", 5), "other")
	s.Forget(0)
	for _, name := range []string{"a", "b"} {
		wantDepth(t, s, links(name, 5), 0)
	}
	if again := s.Model("m"); again != m {
		t.Errorf("the model's number was %d and is %d", m, again)
	}
	put(s, links("a", 5), "m")
	wantDepth(t, s, links("a", 5), 5)
	put(s, links("b", 5), "other")
	within(t, s)
}

func testAnotherModel(t *testing.T, s contextstore.Store) {
	chain := links("a", 5)
	s.Put(chain, contextstore.Sight{Model: s.Model("m")}, 50)
	sight := contextstore.Sight{Model: s.Model("other")}
	s.Put(chain, sight, 0)
	if rec := record(t, s, chain); !equal(rec, contextstore.Record{Sight: sight, Warm: true}) {
		t.Errorf("%+v is known, partly of another model", rec)
	}
	s.Forget(s.Model("m"))
	wantDepth(t, s, chain, 5)
	s.Forget(s.Model("other"))
	wantDepth(t, s, chain, 0)
}

func testNoModel(t *testing.T, s contextstore.Store) {
	chain := links("a", 5)
	for _, number := range []uint32{0, s.Model("m") + 1<<20} {
		s.Put(chain, contextstore.Sight{Model: number}, 50)
		wantDepth(t, s, chain, 0)
	}
}

func testModels(t *testing.T, s contextstore.Store) {
	keys := map[uint32]string{}
	for range 2 {
		for i := range 1024 {
			key := fmt.Sprint("model ", i)
			number := s.Model(key)
			if was, ok := keys[number]; number == 0 || ok && was != key {
				t.Fatalf("%q has the number %d, which is of %q", key, number, was)
			}
			keys[number] = key
		}
	}
	if len(keys) != 1024 {
		t.Errorf("1024 models have %d numbers", len(keys))
	}
	// What is done for one must not affect another.
	for number := range keys {
		s.Put(numbered(int(number), 2), contextstore.Sight{Model: number}, 0)
	}
	s.Forget(s.Model("model 7"))
	s.Cool(0, s.Model("model 8"))
	for number, key := range keys {
		switch depth, rec := s.Match(numbered(int(number), 2)); {
		case (depth == 0) != (key == "model 7"):
			t.Errorf("%q: Match knows %d links", key, depth)
		case depth > 0 && rec.Warm == (key == "model 8"):
			t.Errorf("%q: warm is %v", key, rec.Warm)
		}
	}
}

// testTooManyModels holds for a store that remembers few models and for one that remembers all.
func testTooManyModels(t *testing.T, s contextstore.Store) {
	const many = 5000
	first := s.Model("model 0")
	chain := links("a", 3)
	s.Put(chain, contextstore.Sight{Model: first}, 0)
	wantDepth(t, s, chain, 3)
	used := s.Model("used")
	put(s, links("u", 3), "used")
	for i := range many {
		s.Model("used")
		put(s, numbered(i, 3), fmt.Sprint("model ", i))
		wantDepth(t, s, numbered(i, 3), 3)
	}
	if depth, _ := s.Match(chain); depth > 0 && s.Model("model 0") != first {
		t.Errorf("of a model that is not remembered, %d links are known", depth)
	}

	s.Put(links("late", 3), contextstore.Sight{Model: first}, 0) // by a request that took long
	s.Forget(s.Model("model 0"))
	wantDepth(t, s, chain, 0)
	wantDepth(t, s, links("late", 3), 0)
	if s.Model("used") != used {
		t.Error("a model that is in use was not remembered")
	}
	wantDepth(t, s, links("u", 3), 3)
	for i := range many {
		s.Forget(s.Model(fmt.Sprint("model ", i)))
		wantDepth(t, s, numbered(i, 3), 0)
	}
}
