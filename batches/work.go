package batches

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/batch"
)

const (
	// pause is how long a batch rests that could not go on: a disk is full, or a server is away.
	pause = 10 * time.Second
	// sayAgain is how long nothing is logged about a batch that rests for the same reason.
	sayAgain = time.Hour
	// grace is how long output files are written after the end of Run's context.
	grace = time.Second
	// window is how many requests are read ahead and ordered by what their prompts share.
	window  = 10_000
	retries = 4 // of a request, after an error that may pass

	resultsFile = "results.jsonl" // of package batch, with its journal beside it
)

// Why a batch's context ends before that of Run.
var (
	errOver    = errors.New("the batch is over") // cancelled: its outcome is decided
	errExpired = errors.New("the completion window is over")
	errUnknown = errors.New("its API key is not accepted any more")
	errFull    = errors.New("all files together have as many bytes as they may have " +
		"(--batches-bytes): delete some")
)

// job is a batch.
type job struct {
	batchObject
	Owner      string `json:"owner"`
	Seq        int64  `json:"seq"`
	Outcome    status `json:"outcome,omitempty"`     // what it ends as; "": that is open
	OutputKept int64  `json:"output_kept,omitempty"` // for so many seconds; 0: as long as any file
	End        int64  `json:"end,omitempty"`         // when it ended

	cancel context.CancelCauseFunc // nil: no work is under way
	gate   *gate
	placed chan struct{} // closed when it has a place; nil: it does not wait for one
}

// finished reports whether a batch is at its end. The service's mu is held.
func (j *job) finished() bool {
	return slices.Contains([]status{completed, failed, cancelled, expired}, j.Status)
}

// shown returns what a client sees now. The service's mu is held.
func (j *job) shown() batchObject {
	o := j.batchObject // what its pointers lead to does not change
	o.Metadata = maps.Clone(o.Metadata)
	return o
}

// set changes a batch, and writes that down. Where it cannot be written, nothing has changed.
func (s *Service) set(j *job, change func()) error {
	before := *j
	change()
	if err := s.writeMeta(batchesFolder, j.ID, j); err != nil {
		*j = before
		return err
	}
	return nil
}

// decide sets what a batch ends as, from which it does not come back. s.mu is held.
func (s *Service) decide(j *job, outcome status, errs ...batchError) error {
	return s.set(j, func() {
		now := time.Now().Unix()
		j.Outcome = outcome
		if outcome == cancelled {
			j.Status, j.CancellingAt = cancelling, &now
		} else {
			j.Status, j.FinalizingAt = finalizing, &now
		}
		if j.Errors = nil; len(errs) > 0 {
			j.Errors = listErrors(errs...)
		}
	})
}

// end sets that a batch is at its end. s.mu is held.
func (s *Service) end(j *job, counts requestCounts, output, errs *string) error {
	return s.set(j, func() {
		now := time.Now().Unix()
		j.Status, j.End = j.Outcome, now
		j.RequestCounts, j.OutputFileID, j.ErrorFileID = counts, output, errs
		switch j.Outcome {
		case completed:
			j.CompletedAt = &now
		case failed:
			j.FailedAt = &now
		case cancelled:
			j.CancelledAt = &now
		case expired:
			j.ExpiredAt = &now
		}
	})
}

// work takes a batch to its end, or as far as it comes before ctx ends. running is ctx, and ends
// when the batch is cancelled, too. What fails because of the folder, or because of a server, is
// tried again after a pause.
func (s *Service) work(ctx, running context.Context, j *job, to http.Handler) {
	defer j.gate.quieten()
	ending, stop := lasting(ctx)
	defer stop()
	said, when := "", time.Time{}
	for {
		var err error
		if !s.decided(j) {
			err = s.step(running, j, to)
		}
		if err == nil {
			if err = s.finalize(ending, j); err == nil {
				return
			}
		}
		if ctx.Err() != nil {
			return // the next start goes on
		}
		wake := running.Done()
		if s.decided(j) {
			wake = ctx.Done()
		}
		if errors.Is(err, errOver) {
			continue
		}
		if now := time.Now(); err.Error() != said || now.Sub(when) >= sayAgain {
			said, when = err.Error(), now
			s.Log.Warn("a batch rests, and goes on by itself", "batch", j.ID, "err", err)
		}
		s.note(j, err)
		select {
		case <-time.After(s.pause):
		case <-wake:
		}
	}
}

// lasting returns a context that ends a little later than ctx, so that a batch whose last request
// was answered usually gets its files before the process ends.
func lasting(ctx context.Context) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-timer.C:
			cancel()
		case <-longer.Done():
		}
	})
	return longer, func() { stop(); cancel() }
}

// decided reports whether it is decided as what a batch ends.
func (s *Service) decided(j *job) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return j.Outcome != ""
}

// note shows in a batch why it does not go on. It is not written down.
func (s *Service) note(j *job, err error) {
	code := "waiting"
	if errors.Is(err, errFull) || noSpace(err) {
		code = "storage_full"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.Outcome == "" {
		j.Errors = listErrors(batchError{
			Code: code, Message: "the batch waits, and goes on by itself: " + err.Error(),
		})
	}
}

// step validates a batch and sends its requests, and decides as what it ends.
func (s *Service) step(ctx context.Context, j *job, to http.Handler) error {
	s.mu.Lock()
	validated, expires := j.Status == inProgress, *j.ExpiresAt
	s.mu.Unlock()
	ctx, cancel := context.WithDeadlineCause(ctx, time.Unix(expires, 0), errExpired)
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	sender := &sender{service: s, job: j, to: to, stop: stop}
	defer sender.wait()
	var err error
	if !validated {
		err = s.validate(ctx, j, sender)
	}
	if err == nil {
		err = s.run(ctx, j, sender)
	}
	outcome, errs := verdict(ctx, err)
	if outcome == "" {
		return cmp.Or(context.Cause(ctx), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.Outcome != "" {
		return nil // it was cancelled meanwhile
	}
	return s.decide(j, outcome, errs...)
}

// verdict returns as what a batch ends whose requests were sent with this outcome; "" if it is not
// at its end.
func verdict(ctx context.Context, err error) (status, []batchError) {
	if err == nil {
		return completed, nil
	}
	if bad, ok := errors.AsType[*badInput](err); ok {
		return failed, bad.errors
	}
	switch context.Cause(ctx) {
	case errExpired:
		return expired, nil
	case errUnknown:
		return failed, []batchError{{
			Code: codeKey, Message: "the API key that made this batch is not accepted any more: " +
				"what was answered before is in the output file",
		}}
	}
	return "", nil
}

// run sends the requests of a batch, once it is its turn, with package batch.
func (s *Service) run(ctx context.Context, j *job, sender *sender) error {
	if err := s.take(ctx, j); err != nil {
		return err
	}
	defer s.give(j)
	folder := s.path(batchesFolder, j.ID)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	defer func() {
		s.mu.Lock()
		s.working[j.ID] = folderSize(folder)
		s.mu.Unlock()
	}()
	source, err := batch.OpenLines(s.path(filesFolder, j.InputFileID+dataSuffix), nil, batch.UTF8)
	if err != nil {
		return lost(err)
	}
	defer source.Close()
	config := s.config(j, sender)
	config.Source = source
	config.Progress = func(p batch.Progress) { s.progress(j, sender, folder, p) }
	config.InFlight = j.gate.inFlight
	defer j.gate.inFlight(0)
	_, err = batch.Run(ctx, config)
	return err
}

// config is how package batch sends a batch's requests.
func (s *Service) config(j *job, sender *sender) batch.Config {
	return batch.Config{
		Output: s.path(batchesFolder, j.ID, resultsFile), Order: batch.CompletionOrder, Window: window,
		Perm:    0o600,
		Retries: retries, WaitForServer: longestWindow, // the completion window ends the wait
		Server: &url.URL{Scheme: "http", Host: loopback}, Transport: sender,
		Log: s.Log.With("batch", j.ID),
	}
}

// progress notes how far a batch has come. Package batch calls it after each result, and about once
// a second.
func (s *Service) progress(j *job, sender *sender, folder string, p batch.Progress) {
	size := int64(-1)
	if now := time.Now(); now.Sub(sender.measured) >= time.Second {
		size, sender.measured = folderSize(folder), now
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.Outcome != "" {
		return
	}
	j.RequestCounts = requestCounts{p.Total, p.Counts.Answers, p.Counts.Failed}
	j.Errors = nil
	c := p.Counts
	u := &usage{Input: c.Prompt, Output: c.Generated, Total: c.Prompt + c.Generated}
	u.InputDetails.Cached = p.Counts.Reused
	j.Usage = u
	if size >= 0 {
		s.working[j.ID] = size
		if s.used() > s.Bytes {
			sender.stop(errFull)
		}
	}
}

// take waits for a place among the batches that run. The next place is for the owner who has the
// fewest, of these for the one whose last turn is longest ago, and of that owner's batches for the
// oldest.
func (s *Service) take(ctx context.Context, j *job) error {
	s.mu.Lock()
	placed := make(chan struct{})
	j.placed = placed
	s.waiting = append(s.waiting, j)
	s.place()
	s.mu.Unlock()
	select {
	case <-placed:
		if s.room() {
			return nil
		}
		s.give(j)
		return errFull
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		if i := slices.Index(s.waiting, j); i >= 0 {
			s.waiting = slices.Delete(s.waiting, i, i+1)
		} else {
			s.leave(j)
		}
		return context.Cause(ctx)
	}
}

// place gives free places. s.mu is held.
func (s *Service) place() {
	for s.places > 0 && len(s.waiting) > 0 {
		next := slices.MinFunc(s.waiting, func(a, b *job) int {
			return cmp.Or(
				cmp.Compare(s.running[a.Owner], s.running[b.Owner]),
				cmp.Compare(s.served[a.Owner], s.served[b.Owner]),
				cmp.Compare(a.Seq, b.Seq),
			)
		})
		s.waiting = slices.DeleteFunc(s.waiting, func(j *job) bool { return j == next })
		s.places--
		s.running[next.Owner]++
		s.turn++
		s.served[next.Owner] = s.turn
		close(next.placed)
	}
}

// give gives a batch's place to the next one.
func (s *Service) give(j *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leave(j)
}

// leave is give while s.mu is held.
func (s *Service) leave(j *job) {
	s.places++
	if s.running[j.Owner]--; s.running[j.Owner] == 0 {
		delete(s.running, j.Owner)
	}
	s.place()
}

// badInput is an input that no request of is sent.
type badInput struct{ errors []batchError }

func (e *badInput) Error() string { return fmt.Sprintf("%d errors in the input", len(e.errors)) }
