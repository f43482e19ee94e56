package contextstore

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/zeebo/xxh3"
)

// tendUntil maintains the files until ctx ends.
func (f *Files) tendUntil(ctx context.Context) {
	defer close(f.idle)
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			f.tend(ctx, now, n%writeUses == 0)
		}
	}
}

// tend drops what is too old, forgets files that somebody else has removed, and syncs what was
// written a while ago; with uses, it also writes use counts.
func (f *Files) tend(ctx context.Context, now time.Time, uses bool) {
	f.mu.Lock()
	gone := f.expire(now)
	all := f.states.Values()
	f.mu.Unlock()
	f.unlinkAll(gone)

	lost := 0
	for _, x := range all {
		if err := x.compare(f.dir); err == nil {
			continue
		}
		f.mu.Lock()
		if f.remove(x) {
			f.stats.Dropped++
			lost++
		}
		f.mu.Unlock()
		f.unlink(x.ID) // what is left of it
	}
	if lost > 0 {
		f.log.Info("stored contexts were removed by others", "states", lost)
	}
	f.settle(ctx, now.Add(-tendEvery), uses)
}

// expire forgets what is too old. f.mu must be held.
func (f *Files) expire(now time.Time) (gone []*file) {
	for f.limits.TTL > 0 {
		_, x, ok := f.states.GetOldest()
		if !ok || now.Sub(x.Used) < f.limits.TTL {
			break
		}
		f.remove(x)
		f.stats.Expired++
		gone = append(gone, x)
	}
	return gone
}

// settle syncs what was made before a time; with uses, it also writes use counts.
func (f *Files) settle(ctx context.Context, before time.Time, uses bool) {
	f.mu.Lock()
	var todo []*file
	for _, x := range f.states.Values() {
		if x.dirty && uses || !x.Settled && x.Made.Before(before) {
			todo = append(todo, x)
		}
	}
	f.mu.Unlock()
	for _, x := range todo {
		if ctx.Err() != nil {
			return
		}
		if err := f.write(ctx, x, before); err != nil && ctx.Err() == nil {
			f.tell(err)
			return // the rest follows in the next round
		}
	}
	if len(todo) > 0 {
		if err := syncFolder(f.dir); err != nil {
			f.tell(err)
		}
	}
}

// write rewrites a state's side file, and first syncs the state if it was made before a time.
func (f *Files) write(ctx context.Context, x *file, before time.Time) error {
	f.mu.Lock()
	s := x.side
	x.dirty = false
	f.mu.Unlock()
	if !s.Settled && s.Made.Before(before) {
		sum, err := hash(ctx, filepath.Join(f.dir, s.ID), true)
		if err != nil {
			return err
		}
		s.Sum, s.Settled, s.Boot = sum, true, ""
	}
	err := writeSide(f.dir, s, s.Settled)
	f.mu.Lock()
	held, ok := f.states.Peek(x.ID)
	if ok = ok && held == x; ok {
		if err == nil {
			x.checked = x.checked || s.Settled && !x.Settled
			x.Sum, x.Settled, x.Boot = s.Sum, s.Settled, s.Boot
		} else {
			x.dirty = true
		}
	}
	f.mu.Unlock()
	if !ok { // it was removed meanwhile
		f.unlink(x.ID)
	}
	return err
}

// hash returns the xxh3 of a file. With sync, its bytes are synced to the disk first.
func hash(ctx context.Context, path string, sync bool) (uint64, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	h := xxh3.New()
	for {
		_, err := io.CopyN(h, file, 8<<20)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
	}
	if sync {
		if err := file.Sync(); err != nil {
			return 0, err
		}
	}
	return h.Sum64(), nil
}

// Close syncs what is not yet on the disk, for as long as ctx allows, and releases the folder. An
// error means that the time was too short: unsynced states are lost if the machine stops, but not
// otherwise. Closing again does nothing.
func (f *Files) Close(ctx context.Context) error {
	f.mu.Lock()
	closed := f.closed
	f.closed = true
	f.mu.Unlock()
	if closed {
		return nil
	}
	f.stop()
	select {
	case <-f.idle:
		f.settle(ctx, time.Now().Add(time.Hour), true)
	case <-ctx.Done(): // the disk blocks it
	}
	return errors.Join(ctx.Err(), f.lock.Close())
}
