// Package storetest is the test suite that every contextstore.Store must pass.
package storetest

import (
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// ample is more bytes, or links, than any of these tests uses.
const ample = 1 << 30

// Run tests a kind of store. newStore returns a new, empty store with these limits, and registers
// its cleanup with t.
func Run(t *testing.T, newStore func(t testing.TB, entries int, bytes int64) contextstore.Store) {
	for _, test := range []struct {
		name           string
		entries, bytes int
		run            func(*testing.T, contextstore.Store)
	}{
		{"empty", 10, ample, testEmpty},
		{"match is a leading run", ample, ample, testLeadingRun},
		{"match tells of the deepest link", ample, ample, testDeepest},
		{"put overwrites", ample, ample, testOverwrite},
		{"time", ample, ample, testTime},
		{"the oldest leave first", 12, ample, testEvictionOrder},
		{"shared links leave last", 12, ample, testSharedLinks},
		{"chain longer than the entries", 10, ample, testLongChain},
		{"chain longer than the bytes", ample, 5_000, testLongChain},
		{"very long chain", ample, ample, testVeryLongChain},
		{"no entries", 0, ample, testNoRoom},
		{"no bytes", ample, 0, testNoRoom},
		{"limits below 0", -1, -1, testNoRoom},
		{"bytes", ample, 50_000, testBytes},
		{"cool", ample, ample, testCool},
		{"cool all models", ample, ample, testCoolAll},
		{"forget", ample, ample, testForget},
		{"forget all models", ample, ample, testForgetAll},
		{"another model", ample, ample, testAnotherModel},
		{"no model", ample, ample, testNoModel},
		{"models", ample, ample, testModels},
		{"too many models", ample, ample, testTooManyModels},
		{"random operations", ample, ample, testRandom},
		{"concurrent use", ample, ample, testConcurrent},
		{"concurrent use of a full store", 100, 20_000, testConcurrentFull},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.run(t, newStore(t, test.entries, int64(test.bytes)))
		})
	}
}

var noon = time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC)

// links returns the chain of n links with a name: each letter of the name is a point at which
// chains of other names may part. "aab" is "aabbbbb…" and shares two links with "a".
func links(name string, n int) []prefix.Link {
	var chain []prefix.Link
	var hash uint64 = 1
	for i := range max(n, len(name)) {
		letter := name[min(i, len(name)-1)]
		hash = (hash ^ uint64(letter)) * 0x9e3779b97f4a7c15
		chain = append(chain, prefix.Link{Hash: hash | 1})
	}
	return chain[:n]
}

// numbered returns a chain of n links that shares nothing with those of other numbers.
func numbered(number, n int) []prefix.Link {
	chain := make([]prefix.Link, n)
	for i := range chain {
		chain[i].Hash = uint64(number)<<16 + uint64(i) + 1
	}
	return chain
}

// put puts links under the model with this key, seen on upstream 0.
func put(s contextstore.Store, links []prefix.Link, key string) {
	s.Put(links, contextstore.Sight{Model: s.Model(key), At: noon}, 0)
}

func wantDepth(t testing.TB, s contextstore.Store, links []prefix.Link, want int) {
	t.Helper()
	if depth, _ := s.Match(links); depth != want {
		t.Errorf("Match knows %d leading links, want %d", depth, want)
	}
}

// record returns what is known of the last of the links, all of which must be known.
func record(t *testing.T, s contextstore.Store, links []prefix.Link) contextstore.Record {
	t.Helper()
	depth, rec := s.Match(links)
	if depth != len(links) {
		t.Fatalf("Match knows %d leading links of %d", depth, len(links))
	}
	return rec
}

func testEmpty(t *testing.T, s contextstore.Store) {
	chain := links("a", 3)
	for _, l := range [][]prefix.Link{nil, chain} {
		if depth, rec := s.Match(l); depth != 0 || !equal(rec, contextstore.Record{}) {
			t.Errorf("Match of %d links is %d, %+v", len(l), depth, rec)
		}
	}
	s.Put(nil, contextstore.Sight{Model: s.Model("m")}, 7)
	s.Cool(3, s.Model("m"))
	s.Cool(3, 0)
	s.Cool(3, 1_000_000)
	s.Forget(1_000_000)
	s.Forget(0)
	want := contextstore.Stats{Limits: contextstore.Limits{Entries: 10, Bytes: ample}}
	if got := s.Stats(); got != want {
		t.Errorf("Stats are %+v, want %+v", got, want)
	}
}

func testLeadingRun(t *testing.T, s contextstore.Store) {
	chain := links("a", 8)
	put(s, chain, "m")
	for n := range len(chain) + 1 {
		wantDepth(t, s, chain[:n], n)
	}
	wantDepth(t, s, links("aaab", 8), 3)
	wantDepth(t, s, links("b", 8), 0)
	put(s, chain[:3], "m") // the others stay known
	wantDepth(t, s, chain, 8)
	put(s, links("a", 20), "m")
	wantDepth(t, s, links("a", 30), 20)
}

func testDeepest(t *testing.T, s contextstore.Store) {
	m := s.Model("m")
	first := contextstore.Sight{Upstream: 1, Lane: 2, Model: m, At: noon}
	second := contextstore.Sight{Upstream: 65535, Lane: 65535, Model: m, At: noon.Add(time.Hour)}
	s.Put(links("aaab", 6), first, 600)
	s.Put(links("aaac", 8), second, 800)
	for _, test := range []struct {
		name  string
		ask   []prefix.Link
		depth int
		want  contextstore.Record
	}{
		{"the earlier", links("aaab", 6), 6, contextstore.Record{Sight: first, Warm: true, Tokens: 600}},
		{"a continuation of the earlier", links("aaab", 9), 6, contextstore.Record{Sight: first, Warm: true, Tokens: 600}},
		{"its beginning", links("aaab", 4), 4, contextstore.Record{Sight: first, Warm: true}},
		{"the later", links("aaac", 8), 8, contextstore.Record{Sight: second, Warm: true, Tokens: 800}},
		{"what they share", links("aaad", 8), 3, contextstore.Record{Sight: second, Warm: true}},
	} {
		if depth, rec := s.Match(test.ask); depth != test.depth || !equal(rec, test.want) {
			t.Errorf("%s: Match is %d, %+v; want %d, %+v", test.name, depth, rec, test.depth, test.want)
		}
	}
}

func testOverwrite(t *testing.T, s contextstore.Store) {
	chain := links("a", 5)
	m := s.Model("m")
	s.Put(chain, contextstore.Sight{Upstream: 1, Model: m, At: noon}, 50)
	before := s.Stats()
	sight := contextstore.Sight{Upstream: 2, Lane: 1, Model: m, At: noon.Add(time.Second)}
	for _, test := range []struct{ tokens, want int }{{0, 50}, {51, 51}, {0, 51}} {
		s.Put(chain, sight, test.tokens)
		if rec := record(t, s, chain); !equal(rec, contextstore.Record{Sight: sight, Warm: true, Tokens: test.want}) {
			t.Errorf("after Put with %d tokens: %+v, want %d tokens", test.tokens, rec, test.want)
		}
	}
	s.Put(chain[:2], sight, 20)
	if rec := record(t, s, chain); rec.Tokens != 51 {
		t.Errorf("a shorter prompt's Put changed the tokens to %d", rec.Tokens)
	}
	if got := s.Stats(); got != before {
		t.Errorf("Stats were %+v and are %+v", before, got)
	}
}

func testTime(t *testing.T, s contextstore.Store) {
	chain := links("a", 1)
	for _, at := range []time.Time{{}, noon, noon.Add(1), time.Now(), noon.In(time.FixedZone("", 3600))} {
		s.Put(chain, contextstore.Sight{Model: s.Model("m"), At: at}, 0)
		if got := record(t, s, chain).At; !got.Equal(at) || got.IsZero() != at.IsZero() {
			t.Errorf("At is %v, was %v", got, at)
		}
	}
}
