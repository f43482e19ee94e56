package storetest

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// Tests of how a store keeps its limits, of Wipe, of the secret, and of what is left to others.

func testLongest(t *testing.T, b Backend) {
	s := b.New(t, answers.Limits{Bytes: ample, Entry: 1000})
	put(t, s, EntryOf(1, 1, 1000), EntryOf(2, 1, 1001), EntryOf(3, 1, 999))
	b.settle(t, s)
	wantNone(t, s, KeyOf(2))
	for _, n := range []int{1, 3} {
		if err := Check(get(t, s, KeyOf(n))[0], n); err != nil {
			t.Error(err)
		}
	}
	put(t, s, EntryOf(1, 2, 5000)) // leaves what was there
	wantEntry(t, s, wanted(t, s, 1, 1000))

	eighth := b.New(t, answers.Limits{Bytes: 8 << 20})
	put(t, eighth, EntryOf(1, 1, 1<<20), EntryOf(2, 1, 1<<20+1))
	b.settle(t, eighth)
	wantEntry(t, eighth, wanted(t, eighth, 1, 1<<20))
	wantNone(t, eighth, KeyOf(2))
	if st := eighth.Stats(); st.Errors != 0 || st.Evicted != 0 {
		t.Errorf("Stats are %+v", st)
	}
}

// wanted returns what the store has for the n-th key, and fails t unless it has this length.
func wanted(t testing.TB, s answers.Store, n, length int) answers.Entry {
	t.Helper()
	e := get(t, s, KeyOf(n))[0]
	if err := Check(e, n); err != nil || len(e.Data) != length {
		t.Errorf("%d bytes, want %d: %v", len(e.Data), length, err)
	}
	return e
}

func testNoRoom(t *testing.T, b Backend) {
	for _, limits := range []answers.Limits{{}, {Entry: 100}, {Bytes: -1, Entry: -1}} {
		s := b.New(t, limits)
		put(t, s, EntryOf(1, 1, 10), EntryOf(2, 1, 0))
		b.settle(t, s)
		wantNone(t, s, KeyOf(1))
		wantNone(t, s, KeyOf(2))
		if st := s.Stats(); st.Entries > 0 {
			t.Errorf("Stats are %+v", st)
		}
	}
}

// within fails t if the store exceeds its limit.
func within(t testing.TB, s answers.Store, limit int64) {
	t.Helper()
	if st := s.Stats(); st.Entries < 0 || st.Bytes < 0 || st.Bytes > limit {
		t.Fatalf("beyond its limit of %d bytes: %+v", limit, st)
	}
}

// testBytes puts much more than there is room for.
func testBytes(t *testing.T, b Backend) {
	if b.Unbounded {
		return
	}
	limit := max(300_000, b.Room)
	s := b.New(t, answers.Limits{Bytes: limit, Entry: limit})
	put(t, s, EntryOf(0, 0, int(limit)+1), EntryOf(1, 1, int(limit)-1))
	b.settle(t, s)
	within(t, s, limit)
	random := rand.New(rand.NewPCG(1, 2))
	for n, total := 2, int64(0); total < 5*limit; n++ {
		length := random.IntN(int(limit) / 30)
		total += int64(length)
		put(t, s, EntryOf(n, n, length))
		if n%10 == 0 {
			b.settle(t, s)
			within(t, s, limit)
		}
	}
	b.settle(t, s)
	within(t, s, limit)
	st := s.Stats()
	if st.Evicted == 0 || st.Errors != 0 {
		t.Errorf("Stats are %+v", st)
	}
	if st.Bytes < limit/2 {
		t.Errorf("only %d bytes of %d are used", st.Bytes, limit)
	}
}

// testUsedStays puts much more than there is room for, and uses a few entries all the time.
func testUsedStays(t *testing.T, b Backend) {
	if b.Unbounded {
		return
	}
	limit := max(400_000, b.Room)
	s := b.New(t, answers.Limits{Bytes: limit})
	const used, each = 5, 2000
	var keys []answers.Key
	for n := range used {
		keys = append(keys, KeyOf(n))
		put(t, s, EntryOf(n, 1, each))
	}
	others := int(limit / each * 3)
	for n := used; n < used+others; n++ {
		put(t, s, EntryOf(n, 1, each))
		if n%20 == 0 { // a tenth of the limit, or less
			b.settle(t, s)
			for i, e := range get(t, s, keys...) {
				if err := Check(e, i); err != nil {
					t.Fatalf("after %d others: %v", n, err)
				}
			}
		}
	}
	b.settle(t, s)
	if st := s.Stats(); st.Evicted < uint64(others/2) {
		t.Errorf("Stats are %+v", st)
	}
	wantNone(t, s, KeyOf(used)) // was never used
}

func testWipe(t *testing.T, b Backend) {
	limits := answers.Limits{Bytes: ample}
	s := b.New(t, limits)
	for round := range 3 {
		for n := range 20 {
			put(t, s, EntryOf(n, 1, 5000))
		}
		if round > 0 {
			b.settle(t, s)
		}
		secret := s.Secret()
		if err := s.Wipe(context.Background()); err != nil {
			t.Fatal(err)
		}
		if s.Secret() == secret {
			t.Error("Wipe leaves the secret")
		}
		for n := range 20 {
			wantNone(t, s, KeyOf(n))
		}
		b.settle(t, s)
		if st := s.Stats(); st.Entries > 0 {
			t.Errorf("Stats are %+v", st)
		}
		if b.Reopen != nil {
			secret = s.Secret()
			s = b.Reopen(t, s, limits)
			wantNone(t, s, KeyOf(1))
			if s.Secret() != secret {
				t.Error("the secret since Wipe is lost")
			}
		}
	}
	put(t, s, EntryOf(1, 2, 10))
	wantEntry(t, s, wanted(t, s, 1, 10))
}

func testSecret(t *testing.T, b Backend) {
	limits := answers.Limits{Bytes: ample}
	one, two := b.New(t, limits), b.New(t, limits)
	if one.Secret() == ([32]byte{}) || one.Secret() == two.Secret() {
		t.Error("the secrets are not random")
	}
	secret := one.Secret()
	put(t, one, EntryOf(1, 1, 1))
	if one.Secret() != secret {
		t.Error("the secret changes")
	}
	if b.Reopen != nil && b.Reopen(t, one, limits).Secret() != secret {
		t.Error("the secret is lost")
	}
}

func testReopen(t *testing.T, b Backend) {
	if b.Reopen == nil {
		return
	}
	limits := answers.Limits{Bytes: ample}
	s := b.New(t, limits)
	for round := range 3 {
		for n := range 200 {
			put(t, s, EntryOf(n, round, 10*n))
		}
		// Close writes what is not yet written.
		s = b.Reopen(t, s, limits)
		for n := range 200 {
			e := wanted(t, s, n, 10*n)
			if n > 0 && e.Data[0] != byte(round) {
				t.Fatalf("round %d: an earlier entry is back", round)
			}
		}
		if st := s.Stats(); st.Entries >= 0 && st.Entries != 200 {
			t.Errorf("%d entries are counted, want 200", st.Entries)
		}
	}
	if b.Unbounded {
		return
	}
	// A lower limit holds at once, or soon.
	limit := max(300_000, b.Room)
	for n := range 200 {
		put(t, s, EntryOf(n, 1, int(limit)/100))
	}
	s = b.Reopen(t, s, answers.Limits{Bytes: limit})
	b.settle(t, s)
	within(t, s, limit)
}

// testAliases: neither what was put nor what was returned can be changed from the other side.
func testAliases(t *testing.T, b Backend) {
	s := b.New(t, answers.Limits{Bytes: ample})
	e, next := EntryOf(1, 1, 1000), EntryOf(2, 1, 1000)
	buffer := append(append([]byte(nil), e.Data...), next.Data...)
	mine, other := e, next
	mine.Data, other.Data = buffer[:1000], buffer[1000:]
	put(t, s, mine, other)
	for i := range buffer {
		buffer[i] = 'x' // as a buffer that returns to its pool
	}
	var held []answers.Entry
	for range 2 {
		found := get(t, s, KeyOf(1), KeyOf(2))
		for i := range found {
			if err := Check(found[i], i+1); err != nil {
				t.Error(err)
			}
			_ = append(found[i].Data, "something behind it"...)
		}
		held = append(held, found...)
		b.settle(t, s)
	}
	put(t, s, EntryOf(1, 2, 1000))
	b.settle(t, s)
	if err := s.Delete(context.Background(), []answers.Key{KeyOf(2)}); err != nil {
		t.Error(err)
	}
	if err := s.Wipe(context.Background()); err != nil {
		t.Error(err)
	}
	b.settle(t, s)
	if b.Reopen != nil {
		b.Reopen(t, s, answers.Limits{Bytes: ample})
	}
	for i, e := range held {
		if err := Check(e, i%2+1); err != nil || e.Data[0] != 1 {
			t.Errorf("what was returned has changed: %v", err)
		}
	}
}
