package batch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	mostInSpan  = 32
	spansAtBest = 64 // of a short input: more than there are workers
	putGrace    = 2 * time.Second
)

// errTakenOver ends the requests of a span that another worker has taken over, since this one was
// silent for too long.
var errTakenOver = errors.New("another worker has taken this over")

// span is some items that follow each other in the plan, which one worker sends.
type span struct {
	id    string
	left  int // items whose answers are not in the server yet
	ctx   context.Context
	leave context.CancelCauseFunc
}

// worker is the feed of a batch that is shared: items come from a job in a Valkey server, and their
// answers go there. From there every worker reads all answers, also its own, into its journal, so
// that any of them can write the output, and each writes the same.
type worker struct {
	b   *batch
	job *job

	// Set by begin.
	running context.Context
	putting context.Context // outlives running by putGrace
	in      inbox
	puts    sync.WaitGroup

	want chan struct{} // asks for a span

	// Of loop's goroutine.
	spans    map[string]*span // that are not done, by their ids
	queue    []item           // that are to be sent
	fetching bool
	read     int          // answers that are in the journal
	taken    int          // of these, answers that a loss of power cannot take away
	round    atomic.Int64 // how often the answers were begun to be read again
	workers  int

	// Of fetch's goroutine.
	window  *window   // where the input is being read
	pending []string  // spans of the last window that was read
	filled  int       // windows up to and with that one
	claimed time.Time // when spans of silent workers were last looked for
}

// join joins the job, or begins it.
func (b *batch) join(ctx context.Context) error {
	j, err := b.Workers.open(ctx, b.Source.fingerprint(), b.WaitForServer, b.Log)
	if err == nil {
		if err = j.join(ctx, b.Window); err != nil {
			j.client.Close()
		}
	}
	if ctx.Err() != nil {
		return ErrStopped
	}
	b.worker = &worker{b: b, job: j, want: make(chan struct{}, 1), spans: map[string]*span{}}
	return err
}

// output reports whether this worker writes an output.
func (w *worker) output() bool { return w.b.Output != "-" }

// look says what is so when the worker comes.
func (w *worker) look() error {
	was := w.job.joined
	w.b.resumed = was.count
	how := "joined a batch that another worker has begun"
	if w.job.begun { // perhaps by mistake, with an input that is not quite that of the others
		how = "began a batch that others share if they have the same input (or --job) and --workers"
	}
	output := w.b.Output
	if !w.output() {
		output = "none: without -o this worker only helps"
	}
	w.b.Log.Info(how, "job", w.job.name, "worker", w.job.me, "output", output, "answered", was.count,
		"of", w.b.survey.Requests)
	if was.dropped > 0 && w.output() && w.done() == 0 && w.b.journal.head.Next == 0 && len(w.b.journal.beyond) == 0 {
		return errDropped(was.dropped)
	}
	return nil
}

func errDropped(n int) error {
	return fmt.Errorf("%d answers were dropped from the Valkey server (--job-bytes) before this worker had all of them:"+
		" the output of another worker has them. Without --workers, the same command sends what this output lacks", n)
}

func (w *worker) begin(ctx context.Context, wg *sync.WaitGroup, in inbox) {
	w.running, w.in = ctx, in
	var stop context.CancelFunc
	w.putting, stop = context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() { time.AfterFunc(putGrace, stop) })
	wg.Go(func() { w.fetch(ctx) })
	wg.Go(func() { w.readAll(ctx) })
	wg.Go(func() { w.beat(ctx) })
}

// leave gives back what is not done, once the answers that there are have been put.
func (w *worker) leave() {
	w.puts.Wait()
	total := 0 // not known
	if w.b.survey != nil {
		total = w.b.survey.Requests
	}
	w.job.leave(total, slices.Collect(maps.Keys(w.spans)))
	w.job.client.Close()
}

func (w *worker) next() (item, bool, error) {
	for len(w.queue) > 0 {
		it := w.queue[0]
		w.queue = w.queue[1:]
		if it.span.ctx.Err() == nil {
			return it, true, nil
		}
	}
	if !w.fetching {
		w.fetching = true
		w.want <- struct{}{}
	}
	return item{}, false, nil
}

func (w *worker) done() int { return w.read }

// over reports whether all answers were read. If some were missed, since the server was restarted
// with the data of a moment before, they are all read again.
func (w *worker) over() (bool, error) {
	j, total := w.b.journal, w.b.survey.Requests
	switch {
	case j.head.Next >= total, w.read >= total && !w.output():
		return true, nil
	case w.read < total:
		return false, nil
	case w.round.Load() == 0:
		w.round.Add(1)
		w.read = 0
		return false, nil
	}
	return false, errDropped(total - j.head.Next - len(j.beyond))
}

// record puts an answer into the server. While that is away, the answer waits in memory, and what
// has been taken from the plan is still sent.
func (w *worker) record(it item, failed bool, counts Counts, result []byte) error {
	line, _ := appendEntry(nil, it.entry(failed), &counts, result)
	w.puts.Go(func() { // ends with putting
		err := w.job.put(w.putting, it.index, line[:len(line)-1])
		w.in.put(w.running, func() error {
			if it.span.left--; err == nil && it.span.left == 0 && it.span.ctx.Err() == nil {
				w.finish(it.span)
			}
			return err
		})
	})
	return nil
}

// finish takes a span that is done out of the plan.
func (w *worker) finish(s *span) {
	delete(w.spans, s.id)
	s.leave(nil)
	w.puts.Go(func() { // ends with putting
		if err := w.job.ack(w.putting, s.id); err != nil {
			w.in.put(w.running, func() error { return err })
		}
	})
}

// beat renews the lease of what this worker has begun, until ctx ends. While its Ollama is away, it
// does not, so that others take over.
func (w *worker) beat(ctx context.Context) {
	tick := time.NewTicker(w.job.lease / 3)
	defer tick.Stop()
	for {
		var held []string
		var taken int
		asked := make(chan struct{})
		w.in.put(ctx, func() error {
			held, taken = slices.Collect(maps.Keys(w.spans)), w.taken
			close(asked)
			return nil
		})
		select {
		case <-asked:
		case <-ctx.Done():
			return
		}
		p, err := w.job.beat(ctx, w.b.survey.Requests, taken, w.output(), !w.b.client.away.Load(), held)
		w.in.put(ctx, func() error {
			if err != nil {
				return err
			}
			return w.felt(p)
		})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// felt is what beat has found.
func (w *worker) felt(p pulse) error {
	w.workers = p.workers
	for _, id := range p.lost {
		if s := w.spans[id]; s != nil {
			delete(w.spans, id)
			s.leave(errTakenOver)
		}
	}
	// Answers are dropped from the server only when they fill it, and only those that are safe here.
	if p.bytes > w.job.bytes/2 && w.taken != w.read {
		j := w.b.journal
		if err := j.file.Sync(); err != nil {
			return j.failed("writing the journal", j.path, err)
		}
		w.taken = w.read
	}
	return nil
}

// readAll reads the answers of all workers into the journal, until ctx ends.
func (w *worker) readAll(ctx context.Context) {
	var round int64
	total, size := w.b.survey.Requests, w.b.Source.size
	for n := 0; ctx.Err() == nil; {
		if now := w.round.Load(); now != round {
			round, n = now, 0
		}
		found, err := w.job.answers(ctx, n)
		lines := make([]journalEntry, len(found))
		for i, e := range found {
			if err == nil {
				if n, lines[i], err = decodeAnswer(e, total, size); err != nil {
					err = foreign(err)
				}
			}
		}
		if err == nil && len(found) == 0 {
			continue
		}
		w.in.put(ctx, func() error {
			if err != nil {
				return err
			}
			return w.keep(lines, n, round)
		})
	}
}

// keep adds answers to the journal, of which the last is the nth.
func (w *worker) keep(lines []journalEntry, n int, round int64) error {
	j := w.b.journal
	for _, e := range lines {
		if j.done(e.Index) {
			continue
		}
		counts, result := *e.Counts, e.Result
		e.Counts, e.Result = nil, nil
		if err := j.record(e, counts, result); err != nil {
			return err
		}
	}
	if round == w.round.Load() {
		w.read = n
	}
	w.b.tell()
	return nil
}

// fetch finds a span whenever one is wanted, until ctx ends.
func (w *worker) fetch(ctx context.Context) {
	w.rewind()
	defer func() { w.window.stop() }()
	for {
		select {
		case <-w.want:
		case <-ctx.Done():
			return
		}
		id, items, err := w.find(ctx)
		w.in.put(ctx, func() error {
			w.fetching = false
			if err == nil && w.spans[id] == nil { // else it is one of this worker's own, whose lease had ended
				w.add(id, items)
			}
			return err
		})
	}
}

func (w *worker) add(id string, items []item) {
	s := &span{id: id, left: len(items)}
	s.ctx, s.leave = context.WithCancelCause(w.running)
	w.spans[id] = s
	for _, it := range items {
		it.span = s
		w.queue = append(w.queue, it)
	}
}

// find returns a span that has something to be sent, once Ollama is there.
func (w *worker) find(ctx context.Context) (id string, items []item, err error) {
	for {
		if _, err := w.b.client.await(ctx); err != nil {
			return "", nil, err
		}
		found, again, err := w.entry(ctx)
		if err != nil {
			return "", nil, err
		}
		for _, e := range found { // at most one
			if items, err = decodeSpan(e.value, w.b.survey.Requests, w.b.Source.size); err != nil {
				return "", nil, foreign(err)
			}
			if again {
				items, err = w.job.undone(ctx, items)
			}
			if err == nil && len(items) == 0 {
				err = w.job.ack(ctx, e.id)
			}
			if err != nil || len(items) > 0 {
				return e.id, items, err
			}
		}
	}
}

// entry returns a span in the server: first of a worker that is silent, then a new one. It may
// return none.
func (w *worker) entry(ctx context.Context) (found []entry, again bool, err error) {
	// After an outage, the leases of all workers have ended, and each needs a moment to renew its own.
	if time.Since(w.job.away.Ended()) > w.job.lease && time.Since(w.claimed) >= jobTryEvery {
		w.claimed = time.Now()
		for cursor := "0-0"; ; {
			if cursor, found, err = w.job.claim(ctx, cursor); err != nil || len(found) > 0 {
				return found, true, err
			}
			if cursor == "0-0" {
				break
			}
		}
	}
	if found, err = w.job.next(ctx, false); err != nil || len(found) > 0 {
		return found, false, err
	}
	grown, err := w.plan(ctx)
	if err != nil {
		return nil, false, err
	}
	found, err = w.job.next(ctx, !grown)
	return found, false, err
}

// plan plans the next window, unless another worker was faster, or what lies two windows before it
// must be answered first, as without workers.
func (w *worker) plan(ctx context.Context) (grown bool, err error) {
	now := w.job.planned
	if now*w.job.window >= w.b.survey.Requests {
		return false, nil
	}
	if w.filled > now+1 { // the server has forgotten some
		w.rewind()
	}
	if w.filled != now+1 {
		if err := w.window.fill(); err != nil {
			return false, fmt.Errorf("reading the input: %w", err)
		}
		w.pending, w.filled = spans(w.window.items, w.b.survey.Requests), now+1
		w.window.items = nil
	}
	w.job.planned, err = w.job.plan(ctx, now, max(0, now-2)*w.job.window, w.pending)
	return w.job.planned > now, err
}

// rewind begins to read the input for the plan; windows that are planned are skipped.
func (w *worker) rewind() {
	if w.window != nil {
		w.window.stop()
	}
	w.window = newWindow(w.b.Source, w.job.window, func(index int) bool { return index < w.job.planned*w.job.window })
	w.filled = 0
}

// spans cuts the items of a window, each time where the least is shared across the cut.
func spans(items []item, total int) (values []string) {
	most := min(mostInSpan, max(1, total/spansAtBest))
	for len(items) > 0 {
		n := len(items)
		if n > most {
			n = most
			for at := most - 1; at >= (most+1)/2; at-- {
				if items[at].shared < items[n].shared {
					n = at
				}
			}
		}
		values = append(values, encodeSpan(items[:n]))
		items = items[n:]
	}
	return values
}
