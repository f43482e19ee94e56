package ollamasim

import "time"

// Stats counts what a server did since it was made.
type Stats struct {
	Requests  int // that want an answer or an embedding
	Rejected  int // of them refused with 503, the queue being full
	Cancelled int // left by their clients
	Failed    int // ended by a crash or an error
	Answered  int // ended as they should

	Evaluated int64 // tokens of prompts that were computed, also for requests that did not end well
	Reused    int64 // tokens of prompts that a slot or the host cache had
	Generated int64 // tokens of answers
	Restored  int   // prompts that were found in the host cache

	Loads     int // of models, aborted ones included
	Evictions int // unloaded to make room for another model
	Reloads   int // unloaded since other options were asked for
	Expired   int // unloaded since keep_alive had passed
	Unloaded  int // unloaded since a request wanted that, with keep_alive 0

	SlotBusy time.Duration // time that slots served requests, all slots together
	Busy     time.Duration // time that engines computed, all models together

	Now Waiting // the present
}

// Waiting is how many requests wait or are served.
type Waiting struct {
	Pending int // wait for a model to be loaded, in Ollama's queue
	Queued  int // wait for a slot of a loaded model
	Slots   int // are in a slot
	Loaded  int // models that are loaded
}

// Stats returns what the server did.
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

// Evaluation is what became of a prompt whose answer has ended, as a real server's log tells it.
type Evaluation struct {
	Total     int // tokens of the prompt
	Reused    int // of them in the slot's cache
	Evaluated int // of them computed
}

// Load is a load of a model.
type Load struct {
	Model  string
	NumCtx int // tokens
	At     time.Time
}

// Mark is a place in what a server has done so far.
type Mark struct{ evaluations, loads int }

// Mark returns the present.
func (s *Server) Mark() Mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Mark{len(s.log), len(s.loads)}
}

// Evaluations returns the prompts whose answers ended since the mark, in the order in which they did.
func (s *Server) Evaluations(since Mark) []Evaluation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Evaluation(nil), s.log[since.evaluations:]...)
}

// Loads returns the number of model loads since the mark, aborted ones included.
func (s *Server) Loads(since Mark) int { return len(s.LoadLog(since)) }

// LoadLog returns the model loads since the mark, aborted ones included.
func (s *Server) LoadLog(since Mark) []Load {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Load(nil), s.loads[since.loads:]...)
}
