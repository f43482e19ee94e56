package storetest

import (
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Tests of how a store keeps its limits, and what it drops for that.

func testEvictionOrder(t *testing.T, s contextstore.Store) {
	a, b, c, d := links("a", 4), links("b", 4), links("c", 4), links("d", 4)
	put(s, a, "m")
	put(s, b, "m")
	put(s, c, "m")
	put(s, a, "m")
	// None of these makes a link newer.
	s.Cool(0, s.Model("m"))
	s.Forget(s.Model("other"))
	s.Match(b)
	put(s, d[:2], "m")
	for _, want := range []struct {
		links []prefix.Link
		depth int
	}{{b, 2}, {a, 4}, {c, 4}, {d, 2}} {
		wantDepth(t, s, want.links, want.depth)
	}
	put(s, d, "m")
	wantDepth(t, s, b, 0)
	put(s, b[:3], "m")
	wantDepth(t, s, c, 1)
	if st := s.Stats(); st.Entries != 12 || st.Evictions != 7 {
		t.Errorf("Stats are %+v, want 12 entries and 7 evictions", st)
	}
}

func testSharedLinks(t *testing.T, s contextstore.Store) {
	put(s, links("aaab", 6), "m") // three links of its own
	put(s, links("aaac", 6), "m")
	put(s, links("aaad", 6), "m") // 12
	put(s, links("aaae", 4), "m")
	wantDepth(t, s, links("aaab", 6), 5)
	put(s, links("e", 6), "m")
	wantDepth(t, s, links("aaab", 6), 3)
	wantDepth(t, s, links("aaac", 6), 3)
	wantDepth(t, s, links("aaad", 6), 5)
	wantDepth(t, s, links("aaae", 4), 4)
	wantDepth(t, s, links("e", 6), 6)
}

func testLongChain(t *testing.T, s contextstore.Store) {
	long := links("a", 500)
	put(s, links("b", 3), "m")
	for range 3 {
		s.Put(long, contextstore.Sight{Model: s.Model("m")}, 12345)
		depth, rec := s.Match(long)
		if st := s.Stats(); depth < 5 || depth >= len(long) || depth != st.Entries {
			t.Fatalf("Match knows %d leading links of %d; Stats are %+v", depth, len(long), st)
		}
		if rec.Tokens != 0 {
			t.Fatal("the whole prompt's tokens are stored at a link that is not its last")
		}
		within(t, s)
	}
	put(s, links("b", 3), "m")
	wantDepth(t, s, links("b", 3), 3)
	if depth, _ := s.Match(long); depth < 2 {
		t.Error("a short prompt dropped the whole of a long one")
	}
}

func testVeryLongChain(t *testing.T, s contextstore.Store) {
	long := links("a", 100_000)
	put(s, long, "m")
	if depth, _ := s.Match(long); depth < 1<<14 || depth != s.Stats().Entries {
		t.Errorf("Match knows %d leading links of %d; Stats are %+v", depth, len(long), s.Stats())
	}
}

// within fails t if the store exceeds its limits.
func within(t testing.TB, s contextstore.Store) {
	t.Helper()
	if st := s.Stats(); st.Entries < 0 || st.Entries > st.Limits.Entries || st.Bytes < 0 || st.Bytes > st.Limits.Bytes {
		t.Fatalf("beyond its limits: %+v", st)
	}
}

func testNoRoom(t *testing.T, s contextstore.Store) {
	chain := links("a", 3)
	put(s, chain, "m")
	wantDepth(t, s, chain, 0)
	within(t, s)
}

func testBytes(t *testing.T, s contextstore.Store) {
	put(s, links("a", 1), "m")
	link := s.Stats().Bytes
	if link <= 0 {
		t.Fatalf("a link costs %d bytes", link)
	}
	for i := range 2_000 {
		chain := numbered(i, 9)
		put(s, chain, "m")
		within(t, s)
		if st := s.Stats(); st.Bytes != int64(st.Entries)*link {
			t.Fatalf("%d links of %d bytes, but %d bytes", st.Entries, link, st.Bytes)
		}
		wantDepth(t, s, chain, 9)
	}
	if st := s.Stats(); st.Bytes < st.Limits.Bytes-9*link || st.Evictions == 0 {
		t.Errorf("links were dropped without need, or none was: %+v", st)
	}
}
