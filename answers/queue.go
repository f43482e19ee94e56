package answers

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"
)

// ErrBusy is Put's error when what is stored cannot be written as fast as it comes. The entries that
// had room are kept.
var ErrBusy = errors.New("the store of answers is busy: what it has not yet written has no more room")

// maxDeletions is how many keys wait to be deleted while nothing can be written.
const maxDeletions = 100_000

// queue holds what is not yet written, so that no request waits for a disk or a server. One
// goroutine writes: it calls pass when there is something, or when it is time.
type queue struct {
	limit int64 // of the bytes that wait
	pass  func()

	mu       sync.Mutex // guards everything below
	pending  batch
	writing  batch
	taken    uint64        // how many passes have begun
	finished uint64        // how many have ended
	progress chan struct{} // closed when a pass ends
	err      error         // of the last pass

	wake chan struct{} // has one place
	stop chan struct{}
	done chan struct{}
}

// batch is what one pass writes. The zero batch is empty.
type batch struct {
	entries map[Key]Entry // with Kind 0: to be deleted
	order   []Key         // of entries, each once; the first was put first
	bytes   int64
}

func newQueue(limit int64, every time.Duration, pass func()) *queue {
	q := &queue{
		limit:    limit,
		pass:     pass,
		progress: make(chan struct{}),
		wake:     make(chan struct{}, 1),
		stop:     make(chan struct{}),
		done:     make(chan struct{}),
	}
	go q.run(every)
	return q
}

func (q *queue) run(every time.Duration) {
	defer close(q.done)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-q.stop:
			q.pass()
			return
		case <-q.wake:
		case <-tick.C:
		}
		q.pass()
	}
}

// close writes what waits, and ends the goroutine.
func (q *queue) close() {
	close(q.stop)
	<-q.done
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // it will begin anyway
	}
}

// put has copies of the entries written.
func (q *queue) put(entries []Entry) error {
	defer q.signal()
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range entries {
		size := int64(len(e.Data)) + EntryBytes
		if q.pending.bytes > 0 && q.pending.bytes+size > q.limit {
			return ErrBusy
		}
		e.Data = bytes.Clone(e.Data)
		e.Made = time.UnixMilli(e.Made.UnixMilli())
		q.pending.set(e)
	}
	return nil
}

// delete has the entries of the keys removed.
func (q *queue) delete(keys []Key) {
	defer q.signal()
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, key := range keys {
		q.pending.set(Entry{Key: key})
	}
}

func (b *batch) set(e Entry) {
	if b.entries == nil {
		b.entries = map[Key]Entry{}
	}
	old, ok := b.entries[e.Key]
	if !ok {
		b.order = append(b.order, e.Key)
		b.bytes += EntryBytes
	}
	b.bytes += int64(len(e.Data) - len(old.Data))
	b.entries[e.Key] = e
}

// get fills found with what waits to be written, and returns the places of the others in keys.
func (q *queue) get(keys []Key, found []Entry) (others []int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, key := range keys {
		e, ok := q.pending.entries[key]
		if !ok {
			e, ok = q.writing.entries[key]
		}
		switch {
		case !ok:
			others = append(others, i)
		case e.Kind != 0:
			e.Data = e.Data[:len(e.Data):len(e.Data)]
			found[i] = e
		}
	}
	return others
}

// clear forgets what waits. It must not be called during a pass.
func (q *queue) clear() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pending = batch{}
}

// take begins a pass: it returns what is to be written, which get finds until finish.
func (q *queue) take() batch {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.taken++
	q.writing, q.pending = q.pending, batch{}
	return q.writing
}

// finish ends a pass. If it failed, its entries are gone, but what was to be deleted stays so.
func (q *queue) finish(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err != nil {
		for _, key := range q.writing.order {
			_, newer := q.pending.entries[key]
			if q.writing.entries[key].Kind == 0 && !newer && len(q.pending.order) < maxDeletions {
				q.pending.set(Entry{Key: key})
			}
		}
	}
	q.writing, q.err = batch{}, err
	q.finished = q.taken
	close(q.progress)
	q.progress = make(chan struct{})
}

// flush returns when everything that was put before is written, and the error of writing it.
func (q *queue) flush(ctx context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	pass := q.taken + 1
	// Not before: the signal could be for the pass before this one, and then nothing would begin this
	// one until it is time.
	q.signal()
	for q.finished < pass {
		progress := q.progress
		q.mu.Unlock()
		select {
		case <-progress:
		case <-ctx.Done():
			q.mu.Lock()
			return ctx.Err()
		}
		q.mu.Lock()
	}
	return q.err
}
