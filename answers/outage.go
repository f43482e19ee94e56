package answers

import (
	"log/slog"
	"sync"
	"time"
)

// outage says once when a store cannot be used, and once when it can be again, and how long to wait
// before it is tried again.
type outage struct {
	log         *slog.Logger
	gone, back  string // the two lines
	args        []any  // of both
	first, most time.Duration

	mu     sync.Mutex // guards everything below
	since  time.Time  // zero: it can be used
	wait   time.Duration
	next   time.Time // no try before
	err    error     // of the last try
	failed uint64
}

// failure notes a failed try.
func (o *outage) failure(err error) {
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed++
	o.err = err
	if o.since.IsZero() {
		o.since, o.wait = now, o.first
		o.log.Warn(o.gone, append(o.args[:len(o.args):len(o.args)], "err", err)...)
	} else {
		o.wait = min(2*o.wait, o.most)
	}
	o.next = now.Add(o.wait)
}

// success notes that the store can be used.
func (o *outage) success() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() {
		return
	}
	o.log.Info(o.back, append(o.args[:len(o.args):len(o.args)], "after", time.Since(o.since).Round(time.Millisecond))...)
	o.since, o.err, o.next = time.Time{}, nil, time.Time{}
}

// note counts an error that does not make the store unusable.
func (o *outage) note() {
	o.mu.Lock()
	o.failed++
	o.mu.Unlock()
}

// refused returns the error of the last try if it is too early for another one.
func (o *outage) refused() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() || !time.Now().Before(o.next) {
		return nil
	}
	return o.err
}

// state returns whether the store is unusable, and how many calls failed.
func (o *outage) state() (down bool, failed uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.since.IsZero(), o.failed
}
