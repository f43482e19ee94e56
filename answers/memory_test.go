package answers_test

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, storetest.Backend{
		New: func(t testing.TB, limits answers.Limits) answers.Store {
			s := answers.NewMemory(limits)
			t.Cleanup(func() { s.Close() })
			return s
		},
		Cost: func(length int) int64 {
			return int64(cap(bytes.Clone(make([]byte, length)))) + answers.EntryBytes
		},
	})
}

func TestMemoryAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := answers.NewMemory(answers.Limits{Bytes: 1 << 20, Age: time.Hour})
		e := storetest.EntryOf(1, 1, 100)
		if err := s.Put(t.Context(), []answers.Entry{e}); err != nil {
			t.Fatal(err)
		}
		for _, want := range []answers.Kind{e.Kind, 0} {
			found, err := s.Get(t.Context(), []answers.Key{e.Key})
			if err != nil || found[0].Kind != want {
				t.Errorf("after %v: kind %d, %v", time.Since(e.Made), found[0].Kind, err)
			}
			time.Sleep(time.Hour + time.Millisecond)
		}
		if st := s.Stats(); st != (answers.Stats{Expired: 1}) {
			t.Errorf("Stats are %+v", st)
		}
	})
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // what had a finalizer
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestEntryBytes: what is accounted for is at most 20 % off (for 1 byte of Data; far less for vectors) what the heap grows by.
func TestEntryBytes(t *testing.T) {
	for _, test := range []struct{ held, put, length int }{
		{100_000, 100_000, 1},
		{115_000, 115_000, 1},   // the map has just grown
		{100_000, 400_000, 1},   // replaced several times
		{10_000, 10_000, 1536},  // 384 float32
		{10_000, 10_000, 4096},  // 1024 float32
		{2_000, 2_000, 8_200},   // just above a size class
		{1_000, 1_000, 33_000},  // whole pages
		{50_000, 50_000, 1_537}, // just above a size class
	} {
		before := heap()
		s := answers.NewMemory(answers.Limits{
			Bytes: int64(test.held) * (int64(cap(bytes.Clone(make([]byte, test.length)))) + answers.EntryBytes),
			Entry: int64(test.length),
		})
		data := make([]byte, test.length)
		for n := range test.put {
			e := answers.Entry{Key: storetest.KeyOf(n), Kind: answers.Vector, Data: data}
			if err := s.Put(context.Background(), []answers.Entry{e}); err != nil {
				t.Fatal(err)
			}
		}
		grown, st := heap()-before, s.Stats()
		if st.Entries != int64(test.held) {
			t.Errorf("%+v: %d entries are held", test, st.Entries)
		}
		if d := st.Bytes - grown; d*100 > grown*20 || -d*100 > grown*20 {
			t.Errorf("%+v: %d bytes are accounted for, the heap grew by %d", test, st.Bytes, grown)
		}
		t.Logf("%+v: per entry %d bytes accounted for, %d measured, %.0f beside Data",
			test, st.Bytes/st.Entries, grown/st.Entries,
			float64(grown)/float64(st.Entries)-float64(cap(bytes.Clone(data))))
		runtime.KeepAlive(s)
	}
}

func BenchmarkMemoryGet(b *testing.B) {
	for _, test := range []struct{ keys, length int }{{1, 8192}, {1000, 1536}, {1000, 4096}} {
		b.Run(fmt.Sprintf("keys=%d/bytes=%d", test.keys, test.length), func(b *testing.B) {
			s := answers.NewMemory(answers.Limits{Bytes: 1 << 30})
			for n := range 50_000 {
				s.Put(b.Context(), []answers.Entry{storetest.EntryOf(n, 1, test.length)})
			}
			keys := make([]answers.Key, test.keys)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				for j := range keys {
					keys[j] = storetest.KeyOf((i*test.keys + j) * 7919 % 50_000)
				}
				found, err := s.Get(b.Context(), keys)
				if err != nil || found[0].Kind == 0 {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkMemoryPut(b *testing.B) {
	for _, length := range []int{1536, 8192} {
		b.Run(fmt.Sprintf("bytes=%d", length), func(b *testing.B) {
			s := answers.NewMemory(answers.Limits{Bytes: 64 << 20})
			e := storetest.EntryOf(1, 1, length)
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				e.Key = storetest.KeyOf(n)
				s.Put(b.Context(), []answers.Entry{e})
			}
		})
	}
}
