// Package storetest is the test suite that every answers.Store must pass.
package storetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// ample is more bytes than any of these tests puts.
const ample = 1 << 28

// Backend is a kind of store.
type Backend struct {
	// New returns a new, empty store with these limits, and registers its cleanup with t.
	New func(t testing.TB, limits answers.Limits) answers.Store
	// Reopen closes the store, and opens what it left behind. nil: it leaves nothing behind.
	Reopen func(t testing.TB, s answers.Store, limits answers.Limits) answers.Store
	// Settle returns when the store has done what it does in the background. nil: it does nothing
	// there.
	Settle func(t testing.TB, s answers.Store)
	// Cost is what an entry with Data of this length counts for in Stats.Bytes, of a store that
	// evicts exactly what was not used for the longest time. nil: it cannot be told.
	Cost func(length int) int64
	// Unbounded: somebody else keeps Limits.Bytes.
	Unbounded bool
	// Room is the least number of bytes that is worth testing as a limit; 0: any.
	Room int64
}

func (b Backend) settle(t testing.TB, s answers.Store) {
	t.Helper()
	if b.Settle != nil {
		b.Settle(t, s)
	}
}

// Run tests a kind of store.
func Run(t *testing.T, b Backend) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Backend)
	}{
		{"empty", testEmpty},
		{"round trips", testRoundTrips},
		{"order", testOrder},
		{"put replaces", testReplace},
		{"delete", testDelete},
		{"age", testAge},
		{"longest entry", testLongest},
		{"no room", testNoRoom},
		{"bytes", testBytes},
		{"what is used stays", testUsedStays},
		{"wipe", testWipe},
		{"secret", testSecret},
		{"reopen", testReopen},
		{"aliases", testAliases},
		{"random operations", testRandom},
		{"random operations on a full store", testRandomFull},
		{"concurrent use", testConcurrent},
		{"concurrent use of a full store", testConcurrentFull},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.run(t, b)
		})
	}
}

// KeyOf returns the n-th key. Keys of different numbers differ throughout, as those of a keyed hash.
func KeyOf(n int) (key answers.Key) {
	for i := range 4 {
		x := (uint64(n)*4 + uint64(i) + 1) * 0x9e3779b97f4a7c15 // splitmix64
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(key[8*i:], x^x>>31)
	}
	return key
}

// EntryOf returns an entry for the n-th key, made just now, whose Data has this length and reveals
// with Check whether it is one that EntryOf made for this key.
func EntryOf(n, version, length int) answers.Entry {
	e := answers.Entry{
		Key:  KeyOf(n),
		Kind: answers.Vector + answers.Kind(version%4),
		Made: time.Now().Truncate(time.Millisecond),
		Data: make([]byte, length),
	}
	x := binary.LittleEndian.Uint64(e.Key[:]) ^ uint64(version)<<32 ^ uint64(length)
	for i := range e.Data {
		if i == 0 {
			e.Data[i] = byte(version)
			continue
		}
		x = x*6364136223846793005 + 1442695040888963407
		e.Data[i] = byte(x >> 56)
	}
	return e
}

// Check returns an error unless the entry is one of EntryOf for the n-th key, in any version below
// 256.
func Check(e answers.Entry, n int) error {
	version := int(e.Kind - answers.Vector)
	if len(e.Data) > 0 {
		version = int(e.Data[0])
	}
	want := EntryOf(n, version, len(e.Data))
	if e.Key != want.Key || e.Kind != want.Kind || !bytes.Equal(e.Data, want.Data) {
		return fmt.Errorf("the entry of key %d, of kind %d and %d bytes, is not as it was put",
			n, e.Kind, len(e.Data))
	}
	return nil
}

func put(t testing.TB, s answers.Store, entries ...answers.Entry) {
	t.Helper()
	if err := s.Put(context.Background(), entries); err != nil {
		t.Fatalf("Put: %v", err)
	}
}

func get(t testing.TB, s answers.Store, keys ...answers.Key) []answers.Entry {
	t.Helper()
	found, err := s.Get(context.Background(), keys)
	if err != nil {
		t.Fatalf("Get: %v", err)
	}
	if len(found) != len(keys) {
		t.Fatalf("Get returns %d entries for %d keys", len(found), len(keys))
	}
	return found
}

func equal(a, b answers.Entry) bool {
	return a.Key == b.Key && a.Kind == b.Kind && a.Made.Equal(b.Made) &&
		a.Made.IsZero() == b.Made.IsZero() && bytes.Equal(a.Data, b.Data)
}

// wantEntry fails t unless the store returns this entry for its key.
func wantEntry(t testing.TB, s answers.Store, want answers.Entry) {
	t.Helper()
	if got := get(t, s, want.Key)[0]; !equal(got, want) {
		t.Errorf("Get returns kind %d, made %v, %d bytes; want kind %d, made %v, %d bytes",
			got.Kind, got.Made, len(got.Data), want.Kind, want.Made, len(want.Data))
	}
}

// wantNone fails t if the store returns anything for the key.
func wantNone(t testing.TB, s answers.Store, key answers.Key) {
	t.Helper()
	if got := get(t, s, key)[0]; !equal(got, answers.Entry{}) {
		t.Errorf("Get returns kind %d, made %v, %d bytes; want nothing",
			got.Kind, got.Made, len(got.Data))
	}
}

func testEmpty(t *testing.T, b Backend) {
	s := b.New(t, answers.Limits{Bytes: ample})
	ctx := context.Background()
	if found := get(t, s); len(found) != 0 {
		t.Errorf("Get of no keys returns %d entries", len(found))
	}
	wantNone(t, s, KeyOf(1))
	wantNone(t, s, answers.Key{})
	put(t, s)
	for _, err := range []error{s.Delete(ctx, nil), s.Delete(ctx, []answers.Key{KeyOf(1)}), s.Wipe(ctx)} {
		if err != nil {
			t.Error(err)
		}
	}
	b.settle(t, s)
	if st := s.Stats(); st.Entries > 0 || st.Evicted+st.Expired+st.Errors != 0 || st.Down {
		t.Errorf("Stats are %+v", st)
	}
}

func testRoundTrips(t *testing.T, b Backend) {
	s := b.New(t, answers.Limits{Bytes: ample})
	var all []answers.Entry
	for n, length := range []int{0, 1, 2, 100, 1536, 4096, 4097, 65_536, 1_000_003} {
		e := EntryOf(n, n, length)
		e.Made = e.Made.Add(-time.Duration(n) * time.Hour)
		all = append(all, e)
		put(t, s, e)
		wantEntry(t, s, e)
	}
	b.settle(t, s)
	for _, e := range all {
		wantEntry(t, s, e)
	}
	if st := s.Stats(); st.Entries >= 0 && st.Entries != int64(len(all)) {
		t.Errorf("%d entries are counted, want %d", st.Entries, len(all))
	}
	zero := EntryOf(0, 1, 10)
	zero.Key = answers.Key{}
	put(t, s, zero)
	wantEntry(t, s, zero)
}

func testOrder(t *testing.T, b Backend) {
	s := b.New(t, answers.Limits{Bytes: ample})
	var batch []answers.Entry
	for n := range 500 {
		batch = append(batch, EntryOf(n, n, 10+n))
	}
	put(t, s, batch...)
	check := func() {
		t.Helper()
		keys := make([]answers.Key, 1000)
		for i := range keys {
			keys[i] = KeyOf(i * 7919 % 1000) // every second one is not there, some twice
		}
		keys[3], keys[4] = keys[2], keys[2]
		for i, got := range get(t, s, keys...) {
			n := i * 7919 % 1000
			if i == 3 || i == 4 {
				n = 2 * 7919 % 1000
			}
			want := answers.Entry{}
			if n < len(batch) {
				want = batch[n]
			}
			if !equal(got, want) {
				t.Fatalf("place %d, key %d: got kind %d and %d bytes, want %d and %d",
					i, n, got.Kind, len(got.Data), want.Kind, len(want.Data))
			}
		}
	}
	check()
	b.settle(t, s)
	check()
}

func testReplace(t *testing.T, b Backend) {
	s := b.New(t, answers.Limits{Bytes: ample})
	for version, length := range []int{100, 5000, 0, 100} {
		e := EntryOf(1, version, length)
		e.Made = e.Made.Add(time.Duration(version) * time.Second)
		put(t, s, e)
		wantEntry(t, s, e)
		if version%2 == 0 {
			b.settle(t, s)
			wantEntry(t, s, e)
		}
		if st := s.Stats(); st.Entries > 1 {
			t.Errorf("one key has %d entries", st.Entries)
		}
	}
	// The last one of a batch is what stays.
	put(t, s, EntryOf(2, 1, 10), EntryOf(2, 2, 20), EntryOf(2, 3, 5))
	b.settle(t, s)
	if got := get(t, s, KeyOf(2))[0]; len(got.Data) != 5 {
		t.Errorf("the first of a batch stays: %d bytes", len(got.Data))
	}
}

func testDelete(t *testing.T, b Backend) {
	s := b.New(t, answers.Limits{Bytes: ample})
	for _, settled := range []bool{false, true} {
		for n := range 10 {
			put(t, s, EntryOf(n, 1, 1000))
		}
		if settled {
			b.settle(t, s)
		}
		if err := s.Delete(context.Background(), []answers.Key{KeyOf(3), KeyOf(77), KeyOf(4)}); err != nil {
			t.Error(err)
		}
		for n := range 10 {
			if n == 3 || n == 4 {
				wantNone(t, s, KeyOf(n))
				continue
			}
			wantEntry(t, s, get(t, s, KeyOf(n))[0])
		}
		b.settle(t, s)
		if st := s.Stats(); st.Entries >= 0 && st.Entries != 8 {
			t.Errorf("%d entries are counted, want 8", st.Entries)
		}
		wantNone(t, s, KeyOf(3))
		put(t, s, EntryOf(3, 2, 10))
		if err := Check(get(t, s, KeyOf(3))[0], 3); err != nil {
			t.Error(err)
		}
	}
}

func testAge(t *testing.T, b Backend) {
	made := func(n int, ago time.Duration) answers.Entry {
		e := EntryOf(n, 1, 100)
		e.Made = e.Made.Add(-ago)
		return e
	}
	s := b.New(t, answers.Limits{Bytes: ample, Age: 24 * time.Hour})
	// None of these is near the limit, so that a slow machine makes no difference.
	put(t, s, made(1, 0), made(2, 23*time.Hour), made(3, 25*time.Hour), made(4, -time.Hour))
	for range 2 {
		for _, n := range []int{1, 2, 4} {
			if err := Check(get(t, s, KeyOf(n))[0], n); err != nil {
				t.Error(err)
			}
		}
		wantNone(t, s, KeyOf(3))
		b.settle(t, s)
	}
	forever := b.New(t, answers.Limits{Bytes: ample})
	put(t, forever, made(1, 1000*24*time.Hour))
	b.settle(t, forever)
	wantEntry(t, forever, get(t, forever, KeyOf(1))[0])
	if b.Reopen == nil {
		return
	}
	aged := b.Reopen(t, forever, answers.Limits{Bytes: ample, Age: 24 * time.Hour})
	wantNone(t, aged, KeyOf(1))
}
