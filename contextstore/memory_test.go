package contextstore_test

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore/storetest"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(_ testing.TB, entries int, bytes int64) contextstore.Store {
		return contextstore.NewMemory(contextstore.Limits{Entries: entries, Bytes: bytes})
	})
}

var costs = storetest.Costs{Link: contextstore.LinkBytes}

// TestMemoryRandom compares full stores with the model: which links are dropped, and the account.
func TestMemoryRandom(t *testing.T) {
	for _, limits := range []contextstore.Limits{
		{Entries: 1, Bytes: 1 << 30},
		{Entries: 25, Bytes: 1 << 30},
		{Entries: 1000, Bytes: contextstore.LinkBytes},
		{Entries: 1000, Bytes: 3000},
		{Entries: 60, Bytes: 12000},
	} {
		t.Run(fmt.Sprintf("%+v", limits), func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(5) {
				storetest.Drive(t, contextstore.NewMemory(limits), costs, storetest.Script(seed, 400))
			}
		})
	}
}

func FuzzMemory(f *testing.F) {
	f.Fuzz(func(t *testing.T, entries uint8, bytes uint16, script []byte) {
		if len(script) > 4096 {
			return // the model takes its time
		}
		limits := contextstore.Limits{Entries: int(entries), Bytes: int64(bytes)}
		storetest.Drive(t, contextstore.NewMemory(limits), costs, script)
	})
}

// fill sets links to those of chain c, which no other c has in common.
func fill(links []prefix.Link, c int) {
	for i := range links {
		x := uint64(c)<<16 + uint64(i) + 1 // splitmix64
		x *= 0x9e3779b97f4a7c15
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		links[i].Hash = x ^ x>>31
	}
}

// filled returns a store that holds this many links, the last of chains of 64 that were put.
func filled(entries, chains int) *contextstore.Memory {
	s := contextstore.NewMemory(contextstore.Limits{Entries: entries, Bytes: 1 << 40})
	links := make([]prefix.Link, 64)
	sight := contextstore.Sight{Model: s.Model("m")}
	for c := range chains {
		fill(links, c)
		s.Put(links, sight, 1000)
	}
	return s
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // what had a finalizer
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// wantWithin fails t if what is accounted for is more than 15 % off what was measured.
func wantWithin(t *testing.T, what string, accounted, measured int64) {
	t.Helper()
	if d := accounted - measured; d*100 > measured*15 || -d*100 > measured*15 {
		t.Errorf("%s: %d bytes are accounted for, the heap grew by %d", what, accounted, measured)
	}
	t.Logf("%s: accounted %d, measured %d bytes", what, accounted, measured)
}

func TestLinkBytes(t *testing.T) {
	for _, test := range []struct{ entries, chains int }{
		{200_000, 200_000 / 64},     // just filled
		{200_000, 4 * 200_000 / 64}, // replaced several times: the map has grown once more
		{250_048, 250_048 / 64},     // the map has just grown
	} {
		before := heap()
		s := filled(test.entries, test.chains)
		grown := heap() - before
		n := int64(s.Stats().Entries)
		wantWithin(t, fmt.Sprintf("%d links, %d put, per link", n, test.chains*64), s.Stats().Bytes/n, grown/n)
	}
}

// A million links take at most 300 MB, and are all there.
func TestMillionLinks(t *testing.T) {
	const million = 1_000_000
	before := heap()
	s := filled(million, million/64)
	grown := heap() - before
	if n := s.Stats().Entries; n != million {
		t.Errorf("%d links are held", n)
	}
	if grown > 300e6 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	wantWithin(t, "a million links", s.Stats().Bytes, grown)
	links := make([]prefix.Link, 64)
	for c := range million / 64 {
		fill(links, c)
		if depth, _ := s.Match(links); depth != len(links) {
			t.Fatalf("chain %d: %d links are known", c, depth)
		}
	}
}

// TestLongChain has a prompt of so many links that to note them all would keep others waiting.
func TestLongChain(t *testing.T) {
	s := contextstore.NewMemory(contextstore.Limits{Entries: 1 << 20, Bytes: 1 << 30})
	links := make([]prefix.Link, contextstore.MaxChain+10)
	for i := range links {
		links[i].Hash = uint64(i) + 1
	}
	s.Put(links, contextstore.Sight{Model: s.Model("m")}, 1000)
	if depth, rec := s.Match(links); depth != contextstore.MaxChain || rec.Tokens != 0 {
		t.Errorf("Match is %d, %+v", depth, rec)
	}
	if n := s.Stats().Entries; n != contextstore.MaxChain {
		t.Errorf("%d links are held", n)
	}
}

func TestAllocations(t *testing.T) {
	s := filled(1000, 1)
	links := make([]prefix.Link, 64)
	fill(links, 0)
	sight := contextstore.Sight{Model: s.Model("m")}
	for name, f := range map[string]func(){
		"Match": func() { s.Match(links) },
		"Put":   func() { s.Put(links, sight, 1000) },
		"Model": func() { s.Model("m") },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s of what is known allocates %v times", name, n)
		}
	}
}

// sizes are those of the stores in benchmarks: of one chain, and of a million links, whose chains are asked for in turn, so
// that the processor's caches have none of them.
var sizes = []struct {
	name   string
	chains int
}{{"64", 1}, {"1M", 1_000_000 / 64}}

func BenchmarkMatch64(b *testing.B) {
	for _, size := range sizes {
		s := filled(size.chains*64, size.chains)
		match := func(b *testing.B) {
			links := make([]prefix.Link, 64)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				fill(links, i*7919%size.chains)
				if depth, _ := s.Match(links); depth != 64 {
					b.Fatal(depth)
				}
			}
		}
		b.Run("links="+size.name, match)
		s.Forget(s.Model("other")) // from here each link is looked at
		b.Run("links="+size.name+"/before-a-Forget", match)
	}
}

func BenchmarkPut64(b *testing.B) {
	for _, size := range sizes {
		s := filled(size.chains*64, size.chains)
		links := make([]prefix.Link, 64)
		sight := contextstore.Sight{Model: s.Model("m")}
		b.Run("known/links="+size.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				fill(links, i*7919%size.chains)
				s.Put(links, sight, 1000)
			}
		})
		next := size.chains
		b.Run("new/links="+size.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				fill(links, next)
				s.Put(links, sight, 1000)
				next++
			}
		})
	}
}
