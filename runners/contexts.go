package runners

import (
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Contexts are the context lengths of one model, in tokens; 0 if unknown or absent.
type Contexts struct {
	// Loaded is the largest context length with which the model is loaded, or is being loaded by a
	// request in progress. It is the stated length, even if the model was made for less.
	Loaded int
	// ByDefault means that a request that states no length gets Loaded.
	ByDefault bool
	// Default is the length for a request that states none: the Modelfile's, or the one that was
	// seen after such a request.
	Default int
	// Largest is the largest stated length that the server has accepted.
	Largest int
}

// Contexts returns the context lengths of a model (upstream.ModelKey) whose manifest has this
// digest: see Wanted. listed is the latest list of /api/ps, which also has models that no request
// through the proxy has used yet.
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
	default: // the default has not been seen yet
		c.take(m.options, 0)
	}
	for _, r := range m.running {
		if r.Known {
			c.take(r.Options, m.byDefault)
		}
	}
	if w.Options.NumCtx() > 0 { // a copy of the model, whose Modelfile sets the length
		c.ByDefault = false
	}
	return c
}

// take adds a use of the model with these options, which has byDefault tokens if the options state
// none. A model never gets more than it was made for, but the stated length counts: requests that
// state the same length share a lane, and cause no load.
func (c *Contexts) take(o prefix.Options, byDefault int) {
	n, stated := o.NumCtx(), o.NumCtx() > 0
	if !stated {
		n = byDefault
	}
	if n >= c.Loaded {
		c.Loaded, c.ByDefault = n, !stated
	}
}

// learnDefault records the default length that /api/ps showed when it was asked at this time, if
// the model was loaded for requests that state no length.
func (m *model) learnDefault(at time.Time) {
	states := func(r *Request) bool { return !r.Known || r.Options.NumCtx() > 0 }
	if m.known && m.answered && m.options.NumCtx() == 0 && m.ended.Before(at) && !slices.ContainsFunc(m.running, states) {
		m.byDefault = m.context
	}
}
