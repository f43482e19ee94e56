package ollamasim

import (
	"slices"
	"time"

	"github.com/ollama/ollama/api"
)

// engine is what a runner computes with: its slots, the requests that wait for one, and the batch
// that is being computed. All slots share the batches. A batch has the next token of each answer,
// and as many prompt tokens as fit; it takes their time at PromptRate, and that of one token at
// AnswerRate if there are answers in it. Arrivals are considered between batches. Batches with
// nothing but answers are computed many at a time, until something happens.
type engine struct {
	slots   []*slot
	granted int        // requests that have a slot, or were admitted to get one
	queue   []*request // the others: first come, first served
	arrived []*request // admitted, not yet in a slot
	host    hostCache
	next    int // era A: the slot with which the next batch begins

	computing bool
	began     time.Time     // of the batch
	each      time.Duration // how long a batch takes
	batches   int           // so many equal ones are computed
	stop      func() bool   // of the timer for their end
	number    uint64        // of the timer: one that fires too late has another number
}

// slot is one of a runner's slots.
type slot struct {
	kept
	index   int
	used    uint64 // when it was last released; 0: never
	since   time.Time
	request *request
	plan    int // tokens of its prompt in the batch
}

// kept is what a slot or the host cache has of a prompt and its answer.
type kept struct {
	tokens []token // never changed once it is here
	// low is the first token that layers with a sliding window still have.
	low         int
	checkpoints []checkpoint // of those layers, by tokens
}

// init creates the slots.
func (e *engine) init(slots int) {
	for i := range slots {
		e.slots = append(e.slots, &slot{index: i})
	}
}

// fit cuts a prompt that is longer than the context, and sets the length of the answer.
func (s *Server) fit(r *request) error {
	ctx, n := r.runner.options.numCtx, len(r.prompt)
	if !r.embed {
		limit := ctx
		if s.era != eraA {
			limit = ctx - 1
		}
		if n > limit {
			keep := min(max(r.keep, 0), limit-1)
			switch {
			case !r.truncate, s.era != eraA && !r.shift:
				return errTooLong
			case s.era != eraA: // half of what is not kept is dropped, as when an answer outgrows the context
				limit = ctx - max((ctx-keep)/2, 1)
			}
			r.prompt = slices.Concat(r.prompt[:keep], r.prompt[n-(limit-keep):])
		}
	}
	r.seed = seed(r.model.Name, r.prompt)
	switch {
	case r.embed:
	case r.limit > 0 || r.limit == 0 && s.era != eraA: // before llama-server, 0 set no limit
		r.length, r.reason = r.limit, "length"
	default:
		r.length, r.reason = r.model.AnswerTokens, "stop"
	}
	if room := ctx - len(r.prompt); !r.shift && r.length > room {
		r.length, r.reason = max(room, 0), "length"
	}
	return nil
}

var errTooLong = api.StatusError{StatusCode: 400, ErrorMessage: "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the context length in settings, or use a model with a longer context length"}

// acquire admits a request as soon as there is a slot for it. In Ollama it is a semaphore: first
// come, first served.
func (r *runner) acquire(q *request) {
	if r.granted == len(r.slots) {
		r.queue = append(r.queue, q)
		return
	}
	r.granted++
	r.arrived = append(r.arrived, q)
	r.pump()
}

// leave ends a request's part in the engine.
func (r *runner) leave(q *request) {
	if i := slices.Index(r.queue, q); i >= 0 {
		r.queue = slices.Delete(r.queue, i, i+1)
	} else if i := slices.Index(r.arrived, q); i >= 0 {
		r.arrived = slices.Delete(r.arrived, i, i+1)
		r.release()
	} else if q.slot != nil && r.computing {
		r.cut()
	}
}

// release admits the next request.
func (r *runner) release() {
	r.granted--
	if len(r.queue) > 0 {
		q := r.queue[0]
		r.queue = r.queue[1:]
		r.acquire(q)
	}
}

// pump computes, if there is anything to compute and nothing is being computed.
func (r *runner) pump() {
	if r.computing {
		r.cut()
		return
	}
	for _, q := range r.arrived {
		r.place(q)
	}
	r.arrived = r.arrived[:0]
	r.compute()
}

// compute begins the next batch.
func (r *runner) compute() {
	answers, steps, streams := r.answering()
	prompts := r.plan(max(r.options.numBatch, 1) - answers)
	if answers+prompts == 0 {
		return
	}
	r.each = time.Duration(float64(prompts) / r.model.PromptRate * float64(time.Second))
	if answers > 0 {
		r.each += time.Duration(float64(time.Second) / r.model.AnswerRate)
	}
	r.batches = 1
	if prompts == 0 && !streams {
		r.batches = steps
	}
	r.each = max(r.each, 1)
	r.began, r.computing = r.server.clock.Now(), true
	r.arm()
}

// answering returns how many requests have answers under way, after how many tokens the first of
// those ends, and whether one is streamed.
func (r *runner) answering() (n, steps int, streams bool) {
	for _, l := range r.slots {
		q := l.request
		if q == nil || q.done < len(q.prompt) {
			continue
		}
		if n++; steps == 0 || q.length-q.made < steps {
			steps = q.length - q.made
		}
		if q.fault != nil {
			steps = min(steps, max(q.fault.After-q.made, 1))
		}
		streams = streams || q.stream
	}
	return n, steps, streams
}

// plan sets how many tokens of each prompt the next batch has, within room, and returns the sum.
func (r *runner) plan(room int) (tokens int) {
	// In llama-server's batches, the lower slot comes first; before that, whoever had no room in
	// the last one.
	first := 0
	if r.server.era == eraA {
		first = r.next
	}
	r.next = 0
	passed := false
	for i := range r.slots {
		l := r.slots[(first+i)%len(r.slots)]
		q := l.request
		if q == nil || q.done == len(q.prompt) {
			continue
		}
		if room <= 0 {
			if !passed {
				r.next, passed = l.index, true
			}
			continue
		}
		if q.started.IsZero() {
			q.started = r.server.clock.Now()
		}
		l.plan = min(len(q.prompt)-q.done, room)
		if r.model.Window > 0 && r.server.era != eraA && !q.embed {
			l.plan = l.checkpoint(q, l.plan, max(r.options.numBatch, 1), r.model.Window)
		}
		room -= l.plan
		tokens += l.plan
	}
	return tokens
}

// arm sets the timer for the end of the batches.
func (r *runner) arm() {
	r.number++
	number := r.number
	s := r.server
	r.stop = s.clock.AfterFunc(r.began.Add(time.Duration(r.batches)*r.each).Sub(s.clock.Now()), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !r.dead && r.number == number {
			r.computed()
		}
	})
}

// cut makes the engine look for arrivals after the present batch, not after all equal ones.
func (r *runner) cut() {
	n := int((r.server.clock.Now().Sub(r.began) + r.each - 1) / r.each)
	if n = max(n, 1); n < r.batches {
		r.batches = n
		r.stop()
		r.arm()
	}
}

// computed ends batches.
func (r *runner) computed() {
	s, now := r.server, r.server.clock.Now()
	r.computing = false
	s.stats.Busy += time.Duration(r.batches) * r.each
	var ended []*request
	free := 0
	for _, l := range r.slots {
		q := l.request
		if q == nil {
			continue
		}
		r.advance(l, q, now)
		if !q.over && !q.failing() && (q.done < len(q.prompt) || q.made < q.length) {
			if q.stream && q.made > 0 {
				s.wake(q)
			}
			continue
		}
		if !q.over {
			ended = append(ended, q)
		}
		l.release(r, now)
		free++
	}
	// What was admitted before is in the next batch; what a free slot admits now is not, since
	// Ollama and its client have to hear of the end first.
	r.pump()
	for range free {
		r.release()
	}
	for _, q := range ended {
		if q.failing() {
			s.end(q, &faultError{*q.fault})
			continue
		}
		s.log = append(s.log, Evaluation{len(q.prompt), q.reused, len(q.prompt) - q.reused})
		s.end(q, nil)
	}
}

// advance records what batches have computed for the request in a slot.
func (r *runner) advance(l *slot, q *request, now time.Time) {
	stats := &r.server.stats
	if q.done == len(q.prompt) {
		q.made += r.batches
		stats.Generated += int64(r.batches)
		return
	}
	q.done += l.plan
	stats.Evaluated += int64(l.plan)
	if q.done == len(q.prompt) {
		q.evaled = now
		if q.length > 0 { // the last batch of a prompt makes the first token of the answer
			q.made = 1
			stats.Generated++
		}
	}
	l.plan = 0
}

// failing reports whether the request has reached its fault.
func (q *request) failing() bool { return q.fault != nil && q.made >= q.fault.After }

// release frees a slot. It keeps what its request left in it: the last token of an answer was never
// in a batch.
func (l *slot) release(r *runner, now time.Time) {
	q := l.request
	l.request, q.slot = nil, nil
	r.server.stats.SlotBusy += now.Sub(l.since)
	r.server.lastUsed++
	l.used = r.server.lastUsed
	if q.embed {
		l.kept = kept{}
		return
	}
	made := max(q.made-1, 0)
	l.tokens = answerTokens(slices.Grow(slices.Clip(q.prompt[:q.done]), made), q.seed, 0, made)
	if len(l.tokens) > r.options.numCtx { // half of the context was thrown away for the answer to continue
		l.kept = kept{tokens: l.tokens[:min(max(q.keep, 0), len(q.prompt))]}
	}
	l.lower(r)
}
