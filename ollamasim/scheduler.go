package ollamasim

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/ollama/ollama/api"
)

// Ollama's own scheduler: which models are loaded. It follows server/sched.go, in all eras.

var (
	errCrashed  = errors.New("the simulated server crashed")
	errLeft     = errors.New("the client has gone")
	errMaxQueue = errors.New("server busy, please try again.  maximum pending requests exceeded")
)

// options are what a model is loaded with: a request with other options reloads it.
type options struct {
	numCtx, numBatch, numGPU, mainGPU, numThread, draft int
	mmap                                                string
	shift                                               bool
}

// runnerOptions are the options that matter for a load.
func (s *Server) runnerOptions(o api.Options, shift *bool) options {
	r := options{
		numCtx: max(o.NumCtx, 4), numBatch: o.NumBatch, numGPU: max(o.NumGPU, -1), mainGPU: -1,
		numThread: o.NumThread, draft: o.DraftNumPredict, mmap: "auto",
	}
	if o.MainGPU != nil {
		r.mainGPU = *o.MainGPU
	}
	if o.UseMMap != nil {
		r.mmap = map[bool]string{true: "on", false: "off"}[*o.UseMMap]
	}
	// Only llama-server is started with it.
	r.shift = s.era != eraA && (shift == nil || *shift)
	return r
}

// request is a request that a runner has to serve. Guarded by Server.mu.
type request struct {
	model     *Model
	options   options
	keepAlive *time.Duration
	loadOnly  bool
	stream    bool // its handler wants to see every token
	embed     bool
	prompt    []token
	limit     int // of the answer's tokens; negative: none was given
	keep      int // tokens at the prompt's beginning that stay when it is cut
	truncate  bool
	shift     bool // an answer may outgrow the context
	fault     *Fault

	runner  *runner // nil before it is scheduled
	slot    *slot   // nil unless it has one
	reused  int
	done    int // tokens of the prompt that are in the slot
	length  int // tokens that the answer will have
	made    int // tokens of the answer so far
	reason  string
	seed    uint64
	arrived time.Time
	ready   time.Time // when it had a runner
	started time.Time // when its evaluation began
	evaled  time.Time // when its evaluation ended
	ended   time.Time
	over    bool // it has ended, with err
	err     error

	waiting bool
	notify  chan struct{} // makes a waiting handler look again; holds one
}

// runner is a loaded model, or one that is being loaded. Guarded by Server.mu.
type runner struct {
	server  *Server
	model   *Model
	options options
	ready   bool
	dead    bool
	refs    int           // requests that use it
	keep    time.Duration // keep_alive
	why     *int          // the counter of its unload, if it was chosen for one
	expires time.Time     // when it was last idle, plus keep; zero before
	engine
}

// size is the runner's memory in bytes.
func (s *Server) size(m *Model, o options) int64 {
	return int64(m.SizeMiB)<<20 + int64(o.numCtx)*int64(s.slots(m))*int64(m.TokenBytes)
}

func (s *Server) slots(m *Model) int {
	if m.Embedding {
		return 1
	}
	return s.config.Parallel
}

// await blocks until ready, which is called with s.mu held, returns true, or the request has ended.
// It returns why the request failed, or errLeft if ctx ended.
func (s *Server) await(ctx context.Context, r *request, ready func() bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !r.over && !ready() {
		r.waiting = true
		s.clock.Wait()
		s.mu.Unlock()
		select {
		case <-r.notify:
			s.mu.Lock()
		case <-ctx.Done():
			s.mu.Lock()
			if r.waiting {
				r.waiting = false
				s.clock.Resume()
			} else {
				<-r.notify
			}
			s.end(r, errLeft)
		}
	}
	return r.err
}

// wake makes the request's handler look again.
func (s *Server) wake(r *request) {
	if r.waiting {
		r.waiting = false
		s.clock.Resume()
		r.notify <- struct{}{}
	}
}

// arrive accepts a request. A model that is loaded as the request wants it serves it at once,
// whoever waits for another.
func (s *Server) arrive(r *request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.arrived, r.notify = s.clock.Now(), make(chan struct{}, 1)
	s.live[r] = struct{}{}
	if !r.loadOnly {
		s.stats.Requests++
	}
	if s.down {
		s.end(r, errCrashed)
		return
	}
	s.sweep()
	switch run := s.runner(r.model); {
	case run != nil && run.ready && run.options == r.options:
		s.use(run, r)
	case s.head != nil && len(s.pending) >= s.config.MaxQueue:
		s.end(r, errMaxQueue)
	default:
		s.pending = append(s.pending, r)
		s.process()
	}
}

func (s *Server) runner(m *Model) *runner {
	if i := slices.IndexFunc(s.loaded, func(r *runner) bool { return r.model == m }); i >= 0 {
		return s.loaded[i]
	}
	return nil
}

// process serves the queue, first come, first served: all wait behind the head until its model is
// loaded.
func (s *Server) process() {
	for !s.blocked {
		if s.head == nil || s.head.over { // a request whose client has left keeps its place in the queue until here
			if s.head = nil; len(s.pending) == 0 {
				return
			}
			s.head, s.pending = s.pending[0], s.pending[1:]
			continue
		}
		r := s.head
		var victim *runner
		switch run := s.runner(r.model); {
		case run != nil && !run.ready:
			return // it is being loaded for the head
		case run != nil && run.options == r.options:
			s.head = nil
			s.use(run, r)
			continue
		case run != nil:
			victim = run
		case len(s.loaded) >= s.config.MaxLoaded || !s.fits(r):
			victim = s.victim()
		default:
			s.load(r)
			return
		}
		victim.keep, victim.why = 0, &s.stats.Evictions
		if victim.model == r.model {
			victim.why = &s.stats.Reloads
		}
		if victim.refs > 0 {
			// Ollama waits for any unload, and does not look before that. A request with a
			// keep_alive that comes to the victim meanwhile keeps the victim loaded for that long,
			// and the head waiting: measured with 0.34.1.
			s.blocked = true
			s.watch()
			return
		}
		s.unload(victim, victim.why)
	}
}

// fits reports whether the head's model can be loaded beside the others. Alone, a model is always
// loaded.
func (s *Server) fits(r *request) bool {
	if s.config.MemoryMiB == 0 || len(s.loaded) == 0 {
		return true
	}
	sum := s.size(r.model, r.options)
	for _, run := range s.loaded {
		sum += s.size(run.model, run.options)
	}
	return sum <= int64(s.config.MemoryMiB)<<20
}

// victim returns which runner is unloaded: the idle one, otherwise any, that would expire first by
// its keep_alive.
func (s *Server) victim() *runner {
	return slices.MinFunc(s.loaded, func(a, b *runner) int {
		return cmp.Or(cmp.Compare(min(a.refs, 1), min(b.refs, 1)), cmp.Compare(a.keep, b.keep), strings.Compare(a.model.Name, b.model.Name))
	})
}

// load loads the model of the head.
func (s *Server) load(r *request) {
	run := &runner{server: s, model: r.model, options: r.options, keep: s.keepAlive}
	if r.keepAlive != nil {
		run.keep = *r.keepAlive
	}
	run.init(s.slots(r.model))
	s.loaded = append(s.loaded, run)
	s.stats.Loads++
	s.loads = append(s.loads, Load{run.model.Name, run.options.numCtx, s.clock.Now()})
	s.clock.AfterFunc(r.model.LoadTime, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if run.dead {
			return
		}
		run.ready, s.head = true, nil
		s.use(run, r)
		s.process()
	})
}

// use gives a request its runner.
func (s *Server) use(run *runner, r *request) {
	run.refs++
	if r.keepAlive != nil {
		run.keep = *r.keepAlive
	}
	r.runner, r.ready = run, s.clock.Now()
	if r.loadOnly {
		r.reason = "load"
		s.end(r, nil)
		return
	}
	if err := s.fit(r); err != nil {
		s.end(r, err)
		return
	}
	run.acquire(r)
}

// end ends a request, with err if it failed. Its slot, if it has one, becomes free after the
// present batch.
func (s *Server) end(r *request, err error) {
	if r.over {
		return
	}
	r.over, r.err, r.ended = true, err, s.clock.Now()
	delete(s.live, r)
	switch {
	case r.loadOnly:
	case err == nil:
		s.stats.Answered++
	case err == errLeft:
		s.stats.Cancelled++
	case err == errMaxQueue:
		s.stats.Rejected++
	default:
		s.stats.Failed++
	}
	s.wake(r)
	run := r.runner
	if run != nil && run.dead {
		return
	}
	if run == nil {
		if loading := s.runner(r.model); s.head == r && loading != nil && !loading.ready { // the load is abandoned
			s.remove(loading)
			s.process()
		}
		return
	}
	run.leave(r)
	if run.refs--; run.refs > 0 {
		return
	}
	if run.keep <= 0 {
		s.unload(run, cmp.Or(run.why, &s.stats.Unloaded))
		s.process()
		return
	}
	run.expires = r.ended.Add(run.keep)
	s.watch()
}

// unload removes a runner, and counts it under count.
func (s *Server) unload(run *runner, count *int) {
	*count++
	s.remove(run)
	s.blocked = false
}

func (s *Server) remove(run *runner) {
	run.dead = true
	if i := slices.Index(s.loaded, run); i >= 0 {
		s.loaded = slices.Delete(s.loaded, i, i+1)
	}
}

// sweep unloads what has expired. It is called before anything that depends on what is loaded, so
// that no timer is needed: an idle server has no events, and a virtual clock never jumps for one.
func (s *Server) sweep() {
	now := s.clock.Now()
	for _, run := range slices.Clone(s.loaded) {
		if run.ready && run.refs == 0 && !now.Before(run.expires) {
			s.unload(run, &s.stats.Expired)
		}
	}
	s.process()
}

// watch sets the only timer that is needed: while the head waits for an unload, for what expires
// next.
func (s *Server) watch() {
	if s.recheck != nil {
		s.recheck()
		s.recheck = nil
	}
	if !s.blocked {
		return
	}
	var next time.Time
	for _, run := range s.loaded {
		if run.ready && run.refs == 0 && run.keep != forever && (next.IsZero() || run.expires.Before(next)) {
			next = run.expires
		}
	}
	if !next.IsZero() {
		s.recheck = s.clock.AfterFunc(next.Sub(s.clock.Now()), func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.sweep()
		})
	}
}

// expire is keep_alive 0 without a prompt: the model is unloaded once nobody uses it.
func (s *Server) expire(m *Model) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep()
	run := s.runner(m)
	if run == nil || !run.ready {
		return
	}
	run.keep, run.expires = 0, s.clock.Now()
	if run.refs == 0 {
		s.unload(run, &s.stats.Unloaded)
		s.process()
	}
}
