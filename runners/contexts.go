package runners

import (
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Contexts are the context lengths of one model, in tokens; 0: not known, or none.
type Contexts struct {
	// Loaded is the one with which the model is loaded, or with which a request that is under way
	// has it loaded: the largest of them. It is as large as was stated, even if the model was made
	// for less.
	Loaded int
	// ByDefault says that Loaded is what a request gets that states none.
	ByDefault bool
	// Default is what a request gets that states none: the Modelfile's, or what was seen after such
	// a request.
	Default int
	// Largest is the largest that a request stated which the server accepted.
	Largest int
}

// Contexts returns what is known of a model (upstream.ModelKey) whose manifest has this digest: see
// Wanted. listed is what /api/ps told last, which tells of a model that nobody has used through the
// proxy yet.
func (b *Book) Contexts(name, digest string, listed []upstream.Loaded) Contexts {
	w := b.Wanted(name, digest, &prefix.Options{})
	b.mu.Lock()
	defer b.mu.Unlock()
	c := Contexts{Default: w.Options.NumCtx()}
	m, ok := b.models.Peek(w.Options.Model)
	if !ok {
		c.Loaded = b.byWeights(listed)[w.Options.Model].ContextLength
		return c
	}
	if c.Default == 0 {
		c.Default = m.byDefault
	}
	c.Largest = m.largest
	switch {
	case !m.known:
		c.Loaded = m.context
	case m.context == m.byDefault:
		c.take(m.options, m.byDefault)
	default: // what requests that state none were given is not seen yet
		c.take(m.options, 0)
	}
	for _, r := range m.running {
		if r.Known {
			c.take(r.Options, m.byDefault)
		}
	}
	if w.Options.NumCtx() > 0 { // a copy of the model, whose Modelfile says what it gets
		c.ByDefault = false
	}
	return c
}

// take takes in that the model has these options, and byDefault tokens if they state none. No model
// gets more than it was made for, but what is stated counts: requests that state the same share a
// lane, and do not load the model anew.
func (c *Contexts) take(o prefix.Options, byDefault int) {
	n, stated := o.NumCtx(), o.NumCtx() > 0
	if !stated {
		n = byDefault
	}
	if n >= c.Loaded {
		c.Loaded, c.ByDefault = n, !stated
	}
}

// learnDefault takes in what /api/ps told, asked at a time, of a model that was loaded for requests
// that state no context length, if it was.
func (m *model) learnDefault(at time.Time) {
	states := func(r *Request) bool { return !r.Known || r.Options.NumCtx() > 0 }
	if m.known && m.answered && m.options.NumCtx() == 0 && m.ended.Before(at) && !slices.ContainsFunc(m.running, states) {
		m.byDefault = m.context
	}
}
