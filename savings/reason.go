package savings

import (
	"fmt"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Reason is why a request was not warm. Each such request has exactly one.
type Reason string

const (
	ReasonFirst    Reason = "first_seen" // nothing like it was seen before
	ReasonDiverged Reason = "diverged"   // it differs early from the nearest prompt that was seen
	ReasonTaken    Reason = "slot_taken" // another prompt took the slot that held its prefix
	ReasonReloaded Reason = "reloaded"   // the model was loaded again, with other options
	ReasonEvicted  Reason = "evicted"    // the model had been unloaded
	ReasonRestart  Reason = "restarted"  // the upstream was restarted
	ReasonBeside   Reason = "concurrent" // another request with its prefix was being evaluated
	// A model with a sliding window, on a server that reuses nothing for those.
	ReasonSliding Reason = "sliding_window"
)

// reason determines the reason. entry has the verdict; changes are the reason for the load, if any.
func (e *engine) reason(r *Request, entry *Entry, changes []prefix.Change) (Reason, string) {
	n := e.nearest(r)
	gone := r.shares(n.lost) && n.lost.Bytes > n.live.Bytes
	short := r.shares(n.live) &&
		entry.Tokens.Reused < int(0.8*float64(n.live.Bytes)/float64(r.bytes)*float64(entry.Total))
	switch {
	case entry.Loaded && len(changes) > 0 && (gone || n.siblingOf != nil):
		return ReasonReloaded, "the model was loaded anew: " + join(changes)
	case gone:
		return n.why, n.detail
	case r.shares(n.live) && r.wholeOnly():
		return ReasonSliding, "the model has a sliding window, and this version of Ollama " +
			"reuses nothing of such a prompt unless all of the one before is its beginning"
	case short && n.pending:
		return ReasonBeside, "another request with its prefix was still being evaluated"
	case short:
		return ReasonTaken, "another prompt has taken the slot that held its prefix"
	case n.siblingOf == nil && n.live.Bytes < 64:
		return ReasonFirst, "nothing like it was seen before"
	}
	return ReasonDiverged, n.diverged(r)
}

// shares reports whether the common part is a relevant part of the prompt.
func (r *Request) shares(s prefix.Shared) bool { return s.Bytes >= 64 && 10*s.Bytes >= r.bytes }

// nearest is what a prompt has in common with the most similar prompts that were sent before it.
type nearest struct {
	live    prefix.Shared // with a prompt that should be warm
	pending bool          // … whose evaluation had not ended when the request was sent

	lost   prefix.Shared // with a prompt that is lost; why and detail give the reason
	why    Reason
	detail string

	// The last prompt that begins with the same text, even if rendered or loaded differently.
	sibling   prefix.Shared
	siblingOf *prefix.Chain
}

func (e *engine) nearest(r *Request) nearest {
	n := nearest{why: ReasonEvicted, detail: "the model has been loaded anew since"}
	for _, h := range e.held[:e.before(r)] {
		s := prefix.Common(r.chain.Links, h.chain.Links)
		switch {
		case h.lost && s.Bytes >= n.lost.Bytes:
			n.lost, n.why, n.detail = s, h.why, h.detail
		case !h.lost && s.Bytes >= n.live.Bytes:
			n.live, n.pending = s, h.pending || h.ended.After(r.at)
		}
		if h.chain.Opening == r.chain.Opening {
			n.sibling, n.siblingOf = s, h.chain
		}
	}
	stored := prefix.At(r.chain.Links, r.known)
	switch {
	case stored.Bytes <= max(n.live.Bytes, n.lost.Bytes):
	case r.record.Warm:
		n.live, n.pending = stored, false
	default:
		n.lost = stored
	}
	return n
}

// diverged describes how the prompt differs from the nearest one.
func (n *nearest) diverged(r *Request) string {
	switch {
	case n.siblingOf != nil && n.siblingOf.Runner != r.chain.Runner:
		return "diverged in the options: " + join(r.chain.Runner.Changes(n.siblingOf.Runner))
	case n.siblingOf != nil && n.sibling.Bytes <= n.live.Bytes && n.live.Part < prefix.Head:
		return "diverged in the " + n.live.Part.String()
	case n.live.Bytes >= 64:
		return where(n.live)
	}
	return where(n.sibling)
}

// where describes the place where a prompt diverges from the nearest one, without any of its text.
func where(s prefix.Shared) string {
	switch s.Part {
	case prefix.Runner, prefix.Settings, prefix.Tools:
		return fmt.Sprintf("diverged in the %v from the nearest known prefix", s.Part)
	case prefix.Head:
		return fmt.Sprintf("diverged at the start of message %d (role, images or thinking) from the nearest known prefix", s.Message)
	}
	return fmt.Sprintf("diverged at message %d, byte %d from the nearest known prefix", s.Message, s.Offset)
}

func join(changes []prefix.Change) string {
	parts := make([]string, len(changes))
	for i, c := range changes {
		parts[i] = c.String()
	}
	return strings.Join(parts, ", ")
}
