package savings

import (
	"fmt"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Reason says why a request was not warm. Each such request has one.
type Reason string

const (
	ReasonFirst    Reason = "first_seen"     // nothing like it was seen before
	ReasonDiverged Reason = "diverged"       // it differs early from the nearest prompt that was seen
	ReasonTaken    Reason = "slot_taken"     // another prompt took the slot that held its prefix
	ReasonReloaded Reason = "reloaded"       // the model was loaded anew, with other options
	ReasonEvicted  Reason = "evicted"        // the model had been unloaded
	ReasonRestart  Reason = "restarted"      // the upstream was restarted
	ReasonBeside   Reason = "concurrent"     // another request with its prefix was still being evaluated
	ReasonSliding  Reason = "sliding_window" // a model with a sliding window, on a server that reuses nothing for those
)

// reason finds out why. entry has its verdict; changes are those for which the model was loaded.
func (e *engine) reason(r *Request, entry *Entry, changes []prefix.Change) (Reason, string) {
	// The nearest prompts: of those that should be warm, and of those that are lost.
	var live, lost prefix.Shared
	var lostTo *held
	sibling := prefix.Shared{} // that begins with the same text, though it was to be rendered or loaded otherwise
	var siblingOf *held
	pending := false // the nearest one's evaluation was not over when this request was sent
	for _, h := range e.held[:e.before(r)] {
		s := prefix.Common(r.chain.Links, h.chain.Links)
		switch {
		case h.lost && s.Bytes >= lost.Bytes:
			lost, lostTo = s, h
		case !h.lost && s.Bytes >= live.Bytes:
			live, pending = s, h.pending || h.ended.After(r.at)
		}
		if h.chain.Opening == r.chain.Opening {
			sibling, siblingOf = s, h
		}
	}
	if stored := prefix.At(r.chain.Links, r.known); stored.Bytes > max(live.Bytes, lost.Bytes) {
		if r.record.Warm && r.record.Upstream == r.upstream.Index {
			live, pending = stored, false
		} else {
			lost = stored
		}
	}
	share := func(s prefix.Shared) bool { return s.Bytes >= 64 && 10*s.Bytes >= r.bytes }
	switch {
	case entry.Loaded && len(changes) > 0 && siblingOf != nil:
		return ReasonReloaded, "the model was loaded anew: " + join(changes)
	case share(lost) && lost.Bytes > live.Bytes && entry.Loaded && len(changes) > 0:
		return ReasonReloaded, "the model was loaded anew: " + join(changes)
	case share(lost) && lost.Bytes > live.Bytes && lostTo != nil:
		return lostTo.why, lostTo.detail
	case share(lost) && lost.Bytes > live.Bytes:
		return ReasonEvicted, "the model has been loaded anew since"
	case share(live) && r.run.Sliding && r.upstream.Old:
		return ReasonSliding, "the model has a sliding window, and this version of Ollama reuses nothing of such a prompt unless all of the one before is its beginning"
	case share(live) && entry.Tokens.Reused < int(0.8*float64(live.Bytes)/float64(r.bytes)*float64(entry.Total)):
		if pending {
			return ReasonBeside, "another request with its prefix was still being evaluated"
		}
		return ReasonTaken, "another prompt has taken the slot that held its prefix"
	case siblingOf != nil && sibling.Links <= 2 && siblingOf.chain.Runner != r.chain.Runner:
		return ReasonDiverged, "diverged in the options: " + join(r.chain.Runner.Changes(siblingOf.chain.Runner))
	case siblingOf != nil && sibling.Bytes <= live.Bytes && live.Part != prefix.Block && live.Part != prefix.Tail && live.Part != prefix.Head:
		return ReasonDiverged, "diverged in the " + live.Part.String()
	case live.Bytes >= 64 || share(live):
		return ReasonDiverged, where(live)
	case siblingOf != nil:
		return ReasonDiverged, where(sibling)
	}
	return ReasonFirst, "nothing like it was seen before"
}

// where says where a prompt differs from the nearest one, without a word of its text.
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
