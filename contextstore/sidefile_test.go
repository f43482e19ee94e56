package contextstore_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// FuzzSideFile: whatever stands in a side file, what is made of it is a state that the store could
// have written, and is the same when it is written and read again.
func FuzzSideFile(f *testing.F) {
	const stem = "00112233445566778899aabbccddeeff"
	f.Fuzz(func(t *testing.T, text []byte) {
		s, again, err := contextstore.ParseSide(stem+".json", text)
		if err != nil {
			return
		}
		if s.ID != stem+".bin" || s.Format == "" || len(s.Links) == 0 || s.Bytes <= 0 ||
			s.Tokens < 0 || s.Tokens > math.MaxInt32 || s.Uses < 0 || s.Cost < 0 ||
			len(s.LinkTokens) != 0 && len(s.LinkTokens) != len(s.Links) {
			t.Fatalf("taken for a state: %+v", s)
		}
		same, more, err := contextstore.ParseSide(stem+".json", again)
		if err != nil || !bytes.Equal(again, more) {
			t.Fatalf("written again %s, and then %s; %v", again, more, err)
		}
		if !s.Made.Equal(same.Made) || !s.Used.Equal(same.Used) {
			t.Fatalf("times of %+v are read again as %+v", s, same)
		}
		s.Made, s.Used = same.Made, same.Used // the same in another zone, perhaps
		if len(s.LinkTokens) == 0 {
			s.LinkTokens = same.LinkTokens // empty or nil
		}
		if !reflect.DeepEqual(s, same) {
			t.Fatalf("read as %+v, and again as %+v", s, same)
		}
	})
}

// FuzzHeader: whatever an engine, or nobody, has written, no more tokens are made of it than the
// words that it says it has.
func FuzzHeader(f *testing.F) {
	f.Add(stateFile(7, 100))
	f.Add(stateFile(0, 40))
	f.Add([]byte("qsgg\x03\x00\x00\x00\x04\x00\x00\x00\x09\x00\x00\x00\x09\x00\x00\x00\x09\x00\x00\x00"))
	f.Add([]byte("nonsense, and enough of it"))
	f.Fuzz(func(t *testing.T, head []byte) {
		n, err := contextstore.ParseHeader(head)
		if err != nil {
			if n != 0 {
				t.Fatalf("%d tokens, and %v", n, err)
			}
			return
		}
		if n < 0 || len(head) < 24 || !bytes.HasPrefix(head, []byte("qsgg")) {
			t.Fatalf("%d tokens of %q", n, head)
		}
	})
}

// TestChainText: fingerprints are written as they are, whatever their size.
func TestChainText(t *testing.T) {
	for _, want := range []contextstore.Chain{{}, {1}, {math.MaxUint64, 0, 1 << 63}} {
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got contextstore.Chain
		if err := json.Unmarshal(text, &got); err != nil || !slices.Equal(got, want) {
			t.Errorf("%v is written as %s and read as %v, %v", want, text, got, err)
		}
	}
	for _, text := range []string{`"AAAA"`, `"no base64"`, `"AAAAAAAAAAA"`, `[1]`} {
		var got contextstore.Chain
		if err := json.Unmarshal([]byte(text), &got); err == nil {
			t.Errorf("%s is read as %v", text, got)
		}
	}
}

// manyStates are so many states of so long chains: of which this many first links are the same.
func manyStates(states, links, shared int) (many []contextstore.State) {
	for i := range states {
		chain := make([]uint64, links)
		for j := range chain {
			chain[j] = uint64(j+1) * 0x9e3779b97f4a7c15
			if j >= shared {
				chain[j] = uint64(i*links+j+1) * 0xbf58476d1ce4e5b9
			}
		}
		many = append(many, contextstore.State{
			ID: fmt.Sprint(i), Format: "f", Links: chain, Bytes: int64(1e6 + i*7919%states), Cost: 1, Uses: 1,
		})
	}
	return many
}

// BenchmarkBest looks for the best of 10,000 states of 1,000 links each: of prompts that have nothing
// in common, that all begin with the same 300, and asked for by one that has only these.
func BenchmarkBest(b *testing.B) {
	const states, links = 10_000, 1_000
	for _, test := range []struct {
		name        string
		shared, ask int // links in common with all, and with the one that is asked for
	}{
		{"nothing-in-common", 0, 900},
		{"one-system-prompt/its-own", 300, 900},
		{"one-system-prompt/no-more", 300, 300},
		{"unknown", 300, 0},
	} {
		b.Run(test.name, func(b *testing.B) {
			many := manyStates(states, links, test.shared)
			x := contextstore.NewIndex(many)
			ask := make([]uint64, links)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				copy(ask, many[i*7919%states].Links[:test.ask])
				for j := test.ask; j < links; j++ {
					ask[j] = uint64(j)<<32 + uint64(i) | 1<<63
				}
				if _, depth := x.Best(ask); depth != test.ask {
					b.Fatal(depth)
				}
			}
		})
	}
}

// BenchmarkRoom asks whether there is room in a store that is full with 10,000 states: for what has
// not been asked for before, and for what has, but is worth less than all of them.
func BenchmarkRoom(b *testing.B) {
	const states = 10_000
	many := manyStates(states, 100, 30)
	limits := contextstore.FileLimits{Bytes: 1e10}
	f, err := contextstore.NewFull(b.TempDir(), limits, many)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close(b.Context())
	s := stateOf(chainOf("x", 100), 8e6)
	s.Cost = 1 // as little as the others
	for _, uses := range []int{1, 2} {
		b.Run(fmt.Sprint("uses=", uses), func(b *testing.B) {
			s.Uses = uses
			b.ReportAllocs()
			for b.Loop() {
				if _, err := f.Room(s); err != contextstore.ErrFull {
					b.Fatal(err)
				}
			}
		})
	}
}
