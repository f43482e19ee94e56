package proxy

import (
	"context"
	"io"
	"math"
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// memory is the budget for all bodies that are held. A body takes its share before it is read, and
// gives it back when nothing can be sent again.
//
// A body of up to bodyFirst bytes, and the beginning of any other, takes its share of a quarter:
// clients that announce much and send little take little, and stand in nobody's way. What is
// longer then takes from the rest, at once, all that it may become; so nobody who holds some of
// the rest waits for more of it, and those who hold some of the quarter wait for the rest alone.
// Hence they cannot wait for each other.
type memory struct {
	first, rest *budget
	most        int64 // bytes of the longest body that fits
	// waits is called when a body has to wait: the context with which it does, and what to call afterwards; nil: as it is.
	waits func(context.Context) (context.Context, func())
	held  atomic.Int64 // bytes of all buffers

	spare      atomic.Int64 // bytes of buffers that were let go since they were last collected
	spareMost  int64        // beyond which they are
	collecting atomic.Bool
}

// budget is a part of the memory.
type budget struct {
	*semaphore.Weighted
	turns [3]*semaphore.Weighted // of each priority one body at a time waits for it, so that no crowd is before others
}

func newBudget(n int64) *budget {
	b := &budget{Weighted: semaphore.NewWeighted(n)}
	for p := range b.turns {
		b.turns[p] = semaphore.NewWeighted(1)
	}
	return b
}

// MemoryLeast is the smallest budget, in bytes.
const MemoryLeast = 16 << 20

// newMemory returns a budget of so many bytes; 0: no limit.
func newMemory(limit int64) *memory {
	if limit == 0 {
		limit = math.MaxInt64
	}
	limit = max(limit, MemoryLeast)
	first := limit / 4
	return &memory{
		first: newBudget(first), rest: newBudget(limit - first),
		most: limit - first - 1, spareMost: limit / 8,
	}
}

// drop tells that a buffer of n bytes was let go. The garbage collector by itself may let those
// become as many bytes as are held, and so double what was budgeted.
func (m *memory) drop(n int) {
	if m.spare.Add(int64(n)) > m.spareMost && m.collecting.CompareAndSwap(false, true) {
		go func() { // ends with the collection
			defer m.collecting.Store(false)
			m.spare.Store(0)
			runtime.GC()
		}()
	}
}

// share is what one body takes of the memory.
type share struct {
	of    *memory
	from  *budget // nil: nothing
	taken int64   // from that
	held  int64   // bytes of the buffer
}

// take waits until there are n bytes, and gives back what was taken before.
func (s *share) take(ctx context.Context, p schedule.Priority, from *budget, n int64) error {
	if !from.TryAcquire(n) {
		if err := s.of.acquire(ctx, p, from, n); err != nil {
			return err
		}
	}
	s.giveBack(s.taken)
	s.from, s.taken = from, n
	return nil
}

func (m *memory) acquire(ctx context.Context, p schedule.Priority, from *budget, n int64) error {
	if m.waits != nil {
		waits, end := m.waits(ctx)
		defer end()
		ctx = waits
	}
	turn := from.turns[p-schedule.Interactive]
	if err := turn.Acquire(ctx, 1); err != nil {
		return err
	}
	defer turn.Release(1)
	return from.Acquire(ctx, n)
}

func (s *share) giveBack(n int64) {
	if s.from != nil {
		s.from.Release(n)
		s.taken -= n
	}
}

// hold says how many bytes the buffer has. It never has more than were taken.
func (s *share) hold(n int) {
	s.of.held.Add(int64(n) - s.held)
	s.held = int64(n)
}

func (s *share) release() {
	s.hold(0)
	s.giveBack(s.taken)
}

const (
	bodyFirst = 64 << 10 // bytes: how large a buffer is at first, whatever was announced
	bodyGrows = 16       // and how many times as large the next one is at most
)

// read reads a body of which length bytes were announced; -1: nobody knows. When it is longer than
// most, which may be no more than m.most, over is true and the body holds what was read so far.
// longer is called before anything beyond the first bodyFirst bytes is read, when there is memory
// for it; an error of it ends the reading.
func (m *memory) read(ctx context.Context, p schedule.Priority, src io.Reader, length, most int64, longer func() error) (b *body, over bool, err error) {
	s := &share{of: m}
	need := most + 1
	if length >= 0 {
		src = io.LimitReader(src, length)
		need = min(length, most) + 1 // one more than the body, so that its end is seen without growing
	}
	all := min(bufferSize(need), m.most+1) // no more than there is
	size := min(bodyFirst, all)
	if err := s.take(ctx, p, m.first, size); err != nil {
		return nil, false, err
	}
	data := m.newBuffer(size)
	s.hold(cap(data))
	for err == nil && int64(len(data)) <= most {
		if len(data) == cap(data) {
			if s.from == m.first {
				if err = s.take(ctx, p, m.rest, all); err == nil {
					err = longer()
				}
				if err != nil {
					break
				}
			}
			size = all
			if size > 2*bodyGrows*int64(cap(data)) {
				size = bodyGrows * int64(cap(data))
			}
			data = m.moved(data, size)
			s.hold(cap(data))
		}
		var n int
		n, err = src.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
	}
	if err == io.EOF {
		err = nil
	}
	if size = bufferSize(int64(len(data))); size < int64(cap(data))/8*7 { // a few bytes less are not worth a copy
		data = m.moved(data, size)
	}
	s.hold(cap(data))
	s.giveBack(s.taken - s.held)
	if s.from == m.first && m.rest.TryAcquire(s.held) {
		s.giveBack(s.taken)
		s.from, s.taken = m.rest, s.held
	}
	return newBody(data, s), int64(len(data)) > most, err
}

// Buffers of up to bufferPooled bytes are pooled, by their sizes: eight for each power of two.
const (
	bufferLeast  = 1 << 10 // bytes
	bufferPooled = DefaultMaxBody
)

var buffers [1 + 8*16]sync.Pool // of *[]byte

// bufferClass returns the place in buffers for n bytes, and their size.
func bufferClass(n int64) (i int, size int64) {
	if n <= bufferLeast {
		return 0, bufferLeast
	}
	shift := bits.Len64(uint64(n-1)) - 4
	eighths := (n-1)>>shift + 1 // of the power of two below n: 9 to 16
	return (shift-7)*8 + int(eighths) - 8, eighths << shift
}

// bufferSize returns how large a buffer for n bytes is.
func bufferSize(n int64) int64 {
	if n > bufferPooled {
		return n
	}
	_, size := bufferClass(n)
	return size
}

// newBuffer returns an empty buffer of a size that bufferSize returned.
func (m *memory) newBuffer(size int64) []byte {
	if size <= bufferPooled {
		i, _ := bufferClass(size)
		if b, ok := buffers[i].Get().(*[]byte); ok {
			if m.spare.Add(-size) < 0 {
				m.spare.Store(0) // it was let go before the last collection
			}
			return (*b)[:0]
		}
	}
	return make([]byte, 0, size)
}

func (m *memory) freeBuffer(b []byte) {
	m.drop(cap(b))
	if i, size := bufferClass(int64(cap(b))); i < len(buffers) && size == int64(cap(b)) {
		buffers[i].Put(&b)
	}
}

// moved returns the same bytes in a buffer of another size.
func (m *memory) moved(b []byte, size int64) []byte {
	defer m.freeBuffer(b)
	return append(m.newBuffer(size), b...)
}
