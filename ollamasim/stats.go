package ollamasim

import "time"

// Stats counts what a server has done since it was made.
type Stats struct {
	Requests  int // that want an answer or an embedding
	Rejected  int // of these refused with 503 because the queue was full
	Cancelled int // abandoned by their clients
	Failed    int // ended by a crash or an error
	Answered  int // ended normally

	Evaluated int64 // computed prompt tokens, including those of requests that did not end normally
	Reused    int64 // prompt tokens that a slot or the host cache had
	Generated int64 // tokens of answers
	Restored  int   // prompts that were found in the host cache

	Loads     int // of models, including aborted ones
	Evictions int // unloaded to make room for another model
	Reloads   int // unloaded because other options were requested
	Expired   int // unloaded because keep_alive had passed
	Unloaded  int // unloaded because a request wanted that, with keep_alive 0

	SlotBusy time.Duration // time that slots served requests, all slots together
	Busy     time.Duration // time that engines computed, all models together

	Now Waiting // at present
}

// Waiting counts requests that wait or are served.
type Waiting struct {
	Pending int // wait for a model to be loaded, in Ollama's queue
	Queued  int // wait for a slot of a loaded model
	Slots   int // are in a slot
	Loaded  int // models that are loaded
}

// Stats returns the server's Stats.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep()
	st := s.stats
	st.Now = Waiting{Pending: len(s.pending)}
	if s.head != nil {
		st.Now.Pending++
	}
	for _, run := range s.loaded {
		st.Now.Queued += len(run.queue)
		st.Now.Slots += run.granted
		if run.ready {
			st.Now.Loaded++
		}
	}
	return st
}

// Evaluation is how a prompt was served whose answer has ended, as a real server's log shows it.
type Evaluation struct {
	Total     int // tokens of the prompt
	Reused    int // of these in the slot's cache
	Evaluated int // of these computed
}

// Load is a load of a model.
type Load struct {
	Model  string
	NumCtx int // tokens
	At     time.Time
}

// Mark is a point in a server's history.
type Mark struct{ evaluations, loads int }

// Mark returns the present point.
func (s *Server) Mark() Mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Mark{len(s.log), len(s.loads)}
}

// Evaluations returns the prompts whose answers ended since the mark, in that order.
func (s *Server) Evaluations(since Mark) []Evaluation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Evaluation(nil), s.log[since.evaluations:]...)
}

// Loads returns the number of model loads since the mark, including aborted ones.
func (s *Server) Loads(since Mark) int { return len(s.LoadLog(since)) }

// LoadLog returns the model loads since the mark, including aborted ones.
func (s *Server) LoadLog(since Mark) []Load {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Load(nil), s.loads[since.loads:]...)
}
