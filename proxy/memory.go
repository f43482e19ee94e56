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

// memory is the budget for the bodies of all requests. A body reserves its share before it is read,
// and returns it when nothing needs to be sent again.
//
// A body of up to bodyFirst bytes, and the beginning of any longer one, reserves a share of the
// first quarter. Clients that announce much and send little therefore reserve little, and block
// nobody. A longer body then reserves all that it may need from the rest, at once. So a body that
// holds a part of the rest never waits for more of it, and one that holds a part of the quarter
// waits only for the rest. Hence there is no deadlock.
type memory struct {
	first, rest *budget
	most        int64 // of the longest body that fits, in bytes
	// If waits is not nil, it is called when a body has to wait. It returns the context for the
	// wait, and a function to call afterwards.
	waits func(context.Context) (context.Context, func())
	held  atomic.Int64 // bytes of all buffers

	spare      atomic.Int64 // bytes of buffers that were dropped since the last collection
	spareMost  int64        // the limit of spare, which triggers a collection
	collecting atomic.Bool
}

// budget is one part of the memory.
type budget struct {
	*semaphore.Weighted
	// Of each priority, one body at a time waits for room, so that no crowd blocks the others.
	turns [3]*semaphore.Weighted
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

// newMemory returns a budget of limit bytes; 0 means no limit.
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

// drop records that a buffer of n bytes was dropped. Left alone, the garbage collector may let
// dropped buffers grow to as many bytes as are held, which would double the budget.
func (m *memory) drop(n int) {
	if m.spare.Add(int64(n)) > m.spareMost && m.collecting.CompareAndSwap(false, true) {
		go func() { // ends with the collection
			defer m.collecting.Store(false)
			m.spare.Store(0)
			runtime.GC()
		}()
	}
}

// share is one body's share of the memory.
type share struct {
	of    *memory
	from  *budget // the budget that taken comes from; nil: none
	taken int64   // bytes
	held  int64   // bytes of the buffer
}

// take waits until n bytes are free, reserves them, and returns what was reserved before.
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

// hold records the size of the buffer. It never exceeds what was taken.
func (s *share) hold(n int) {
	s.of.held.Add(int64(n) - s.held)
	s.held = int64(n)
}

func (s *share) release() {
	s.hold(0)
	s.giveBack(s.taken)
}

const (
	bodyFirst = 64 << 10 // bytes: the size of the first buffer, whatever was announced
	bodyGrows = 16       // the largest factor by which the next buffer grows
)

// read reads a body with an announced length of length bytes; -1 if unknown. If the body is longer
// than most, which must not exceed m.most, over is true and the body holds what was read so far.
// longer is called once there is memory for more than the first bodyFirst bytes, before any more is
// read; its error ends the reading.
func (m *memory) read(ctx context.Context, p schedule.Priority, src io.Reader, length, most int64, longer func() error) (b *body, over bool, err error) {
	s := &share{of: m}
	need := most + 1
	if length >= 0 {
		src = io.LimitReader(src, length)
		need = min(length, most) + 1 // one more than the body, to see its end without growing
	}
	all := min(bufferSize(need), m.most+1) // no more than there can be
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
	// To save a few bytes is not worth a copy.
	if size = bufferSize(int64(len(data))); size < int64(cap(data))/8*7 {
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

// Buffers of up to bufferPooled bytes are pooled by size: eight sizes per power of two.
const (
	bufferLeast  = 1 << 10 // bytes
	bufferPooled = DefaultMaxBody
)

var buffers [1 + 8*16]sync.Pool // of *[]byte

// bufferClass returns the index in buffers for n bytes, and the size of the buffers there.
func bufferClass(n int64) (i int, size int64) {
	if n <= bufferLeast {
		return 0, bufferLeast
	}
	shift := bits.Len64(uint64(n-1)) - 4
	eighths := (n-1)>>shift + 1 // of the power of two below n: 9 to 16
	return (shift-7)*8 + int(eighths) - 8, eighths << shift
}

// bufferSize returns the size of a buffer for n bytes.
func bufferSize(n int64) int64 {
	if n > bufferPooled {
		return n
	}
	_, size := bufferClass(n)
	return size
}

// newBuffer returns an empty buffer of a size returned by bufferSize.
func (m *memory) newBuffer(size int64) []byte {
	if size <= bufferPooled {
		i, _ := bufferClass(size)
		if b, ok := buffers[i].Get().(*[]byte); ok {
			if m.spare.Add(-size) < 0 {
				m.spare.Store(0) // the buffer was dropped before the last collection
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

// moved copies the bytes to a buffer of another size.
func (m *memory) moved(b []byte, size int64) []byte {
	defer m.freeBuffer(b)
	return append(m.newBuffer(size), b...)
}
