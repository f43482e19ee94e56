package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// naive is a store that is right because it is simple: every operation looks at everything that it
// holds.
type naive struct {
	limits  answers.Limits
	cost    func(length int) int64
	held    []answers.Entry // the one that was used last is the last
	evicted uint64
}

func (n *naive) find(key answers.Key) int {
	return slices.IndexFunc(n.held, func(e answers.Entry) bool { return e.Key == key })
}

func (n *naive) get(keys []answers.Key) []answers.Entry {
	found := make([]answers.Entry, len(keys))
	for i, key := range keys {
		if at := n.find(key); at >= 0 {
			found[i] = n.held[at]
			n.held = append(slices.Delete(n.held, at, at+1), found[i])
		}
	}
	return found
}

func (n *naive) put(entries []answers.Entry) {
	for _, e := range entries {
		if int64(len(e.Data)) > n.limits.Entry || time.Since(e.Made) > n.limits.Age ||
			n.cost != nil && n.cost(len(e.Data)) > n.limits.Bytes {
			continue
		}
		n.delete(e.Key)
		n.held = append(n.held, e)
		for n.bytes() > n.limits.Bytes {
			n.held = n.held[1:]
			n.evicted++
		}
	}
}

func (n *naive) delete(keys ...answers.Key) {
	n.held = slices.DeleteFunc(n.held, func(e answers.Entry) bool { return slices.Contains(keys, e.Key) })
}

func (n *naive) bytes() (sum int64) {
	if n.cost != nil {
		for _, e := range n.held {
			sum += n.cost(len(e.Data))
		}
	}
	return sum
}

func testRandom(t *testing.T, b Backend) {
	limits := answers.Limits{Bytes: ample, Age: 24 * time.Hour, Entry: 5000}
	for seed := range uint64(3) {
		drive(t, b, limits, seed, 1000)
	}
}

func testRandomFull(t *testing.T, b Backend) {
	if b.Cost == nil {
		return // testBytes and testUsedStays show what can be told
	}
	for seed, bytes := range []int64{1, 3000, 20_000, 60_000, 61_234} {
		limits := answers.Limits{Bytes: max(bytes, b.Room), Age: 24 * time.Hour, Entry: 5000}
		drive(t, b, limits, uint64(seed), 2000)
	}
}

// drive has a store and the naive one do the same random operations, and compares what they return.
func drive(t *testing.T, b Backend, limits answers.Limits, seed uint64, operations int) {
	t.Helper()
	const keys = 60
	random := rand.New(rand.NewPCG(seed, 1))
	s := b.New(t, limits)
	model := &naive{limits: limits, cost: b.Cost}
	some := func() (chosen []answers.Key) {
		for range 1 + random.IntN(8) {
			chosen = append(chosen, KeyOf(random.IntN(keys)))
		}
		return chosen
	}
	for i := range operations {
		switch op := random.IntN(100); {
		case op < 45:
			asked := some()
			got, want := get(t, s, asked...), model.get(asked)
			for j := range asked {
				if !equal(got[j], want[j]) {
					t.Fatalf("seed %d, operation %d, key %d of %d: got kind %d and %d bytes, want %d and %d",
						seed, i, j, len(asked), got[j].Kind, len(got[j].Data), want[j].Kind, len(want[j].Data))
				}
			}
		case op < 85:
			var batch []answers.Entry
			for range 1 + random.IntN(5) {
				e := EntryOf(random.IntN(keys), random.IntN(256), random.IntN(random.IntN(5100)+1))
				if random.IntN(10) == 0 {
					e.Made = e.Made.Add(-25 * time.Hour)
				}
				batch = append(batch, e)
			}
			put(t, s, batch...)
			model.put(batch)
		case op < 95:
			removed := some()
			if err := s.Delete(context.Background(), removed); err != nil {
				t.Fatal(err)
			}
			model.delete(removed...)
		case op < 96:
			if err := s.Wipe(context.Background()); err != nil {
				t.Fatal(err)
			}
			model.held = nil
		case op < 97 && b.Reopen != nil:
			s = b.Reopen(t, s, limits)
		default:
			b.settle(t, s)
			wantStats(t, b, s, model)
		}
	}
}

func wantStats(t *testing.T, b Backend, s answers.Store, model *naive) {
	t.Helper()
	st := s.Stats()
	if st.Entries >= 0 && st.Entries != int64(len(model.held)) {
		t.Fatalf("%d entries are counted, want %d", st.Entries, len(model.held))
	}
	if b.Cost != nil && (st.Bytes != model.bytes() || st.Evicted != model.evicted) {
		t.Fatalf("Stats are %+v, want %d bytes and %d evicted", st, model.bytes(), model.evicted)
	}
	if st.Errors != 0 || st.Down {
		t.Fatalf("Stats are %+v", st)
	}
}

func testConcurrent(t *testing.T, b Backend) {
	concurrent(t, b, answers.Limits{Bytes: ample})
}

func testConcurrentFull(t *testing.T, b Backend) {
	if b.Unbounded {
		return
	}
	limits := answers.Limits{Bytes: max(100_000, b.Room)}
	s := concurrent(t, b, limits)
	b.settle(t, s)
	within(t, s, limits.Bytes)
}

// concurrent uses a store from several goroutines at once. Whatever is found must be as it was put.
func concurrent(t *testing.T, b Backend, limits answers.Limits) answers.Store {
	s := b.New(t, limits)
	const keys, workers, rounds = 100, 8, 150
	errs := make(chan error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), 3))
			for range rounds {
				if err := step(s, random, keys); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	return s
}

func step(s answers.Store, random *rand.Rand, keys int) error {
	ctx := context.Background()
	switch op := random.IntN(100); {
	case op < 50:
		numbers := make([]int, 1+random.IntN(20))
		asked := make([]answers.Key, len(numbers))
		for i := range numbers {
			numbers[i] = random.IntN(keys)
			asked[i] = KeyOf(numbers[i])
		}
		found, err := s.Get(ctx, asked)
		if err != nil {
			return fmt.Errorf("getting entries: %w", err)
		}
		for i, e := range found {
			if e.Kind == 0 {
				continue
			}
			if err := Check(e, numbers[i]); err != nil {
				return err
			}
		}
	case op < 90:
		var batch []answers.Entry
		for range 1 + random.IntN(10) {
			batch = append(batch, EntryOf(random.IntN(keys), random.IntN(256), random.IntN(6000)))
		}
		if err := s.Put(ctx, batch); !errors.Is(err, answers.ErrBusy) {
			return err
		}
	case op < 97:
		return s.Delete(ctx, []answers.Key{KeyOf(random.IntN(keys))})
	case op < 98:
		return s.Wipe(ctx)
	default:
		s.Stats()
		s.Secret()
	}
	return nil
}
