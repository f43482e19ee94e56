// Package outage says once when something outside this process cannot be used, and once when it can
// be again, and how long to wait before it is tried again.
package outage

import (
	"log/slog"
	"sync"
	"time"
)

// Outage is whether something can be used. Its fields must not change. Its methods may be called
// concurrently.
type Outage struct {
	Log        *slog.Logger
	Gone, Back string        // the two lines
	Args       []any         // of both
	First      time.Duration // how long to wait after the first failure; it doubles with each, …
	Most       time.Duration // … up to this

	mu     sync.Mutex // guards everything below
	since  time.Time  // zero: it can be used
	ended  time.Time  // when the last outage ended
	wait   time.Duration
	next   time.Time // no try before
	err    error     // of the last try
	failed uint64
}

// Failure notes a failed try, and returns since when it is unusable. (Why may be asked only after
// another goroutine's Success, and return zero.)
func (o *Outage) Failure(err error) (since time.Time) {
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed++
	o.err = err
	if o.since.IsZero() {
		// What goes again when it has just come back is tried less and less often, too: there are two
		// lines each time.
		if o.wait = max(2*o.wait, o.First); now.Sub(o.ended) > o.Most {
			o.wait = o.First
		}
		o.since, o.wait = now, min(o.wait, o.Most)
		o.Log.Warn(o.Gone, append(o.Args[:len(o.Args):len(o.Args)], "err", err)...)
	} else {
		o.wait = min(2*o.wait, o.Most)
	}
	o.next = now.Add(o.wait)
	return o.since
}

// Success notes that it can be used.
func (o *Outage) Success() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() {
		return
	}
	o.Log.Info(o.Back, append(o.Args[:len(o.Args):len(o.Args)], "after", time.Since(o.since).Round(time.Millisecond))...)
	o.since, o.err, o.next, o.ended = time.Time{}, nil, time.Time{}, time.Now()
}

// Note counts an error that leaves it usable.
func (o *Outage) Note() {
	o.mu.Lock()
	o.failed++
	o.mu.Unlock()
}

// Refused returns the error of the last try if it is too early for another one.
func (o *Outage) Refused() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() || !time.Now().Before(o.next) {
		return nil
	}
	return o.err
}

// State returns whether it is unusable, and how many calls failed.
func (o *Outage) State() (down bool, failed uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.since.IsZero(), o.failed
}

// Why returns since when it is unusable, and the error of the last try; zero if it can be used.
func (o *Outage) Why() (since time.Time, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.since, o.err
}

// Ended returns when the last outage that is over ended; zero: there was none.
func (o *Outage) Ended() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended
}

// Next returns when it may be tried again, after a failure.
func (o *Outage) Next() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.next
}
