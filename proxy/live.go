package proxy

import "time"

// Live are the settings that may change while requests are served. Each is as the Handler's field of
// the same name says, and so is its zero value.
type Live struct {
	KeepAlive                               KeepAlive
	AllowHosts, AllowOrigins                []string // Guard's
	BodyTimeout, UpstreamSilence, Heartbeat time.Duration
	ShowPrompts                             bool
}

// Change puts other settings into force, in the place of those that the Handler's fields say. A
// request that is under way may go on with the old ones. A model that is held stays held for as long
// as it was to be; a new keep_alive counts from its next request or load on.
func (h *Handler) Change(l Live) {
	h.inForce.Store(&l)
	if !l.ShowPrompts && h.Ledger != nil {
		h.Ledger.ForgetExcerpts() // without the setting no prompt text is kept
	}
	for _, b := range h.backends {
		b.residency.setKeep(l.KeepAlive)
	}
}

// Live returns the settings in force.
func (h *Handler) Live() Live {
	if l := h.inForce.Load(); l != nil {
		return *l
	}
	return Live{
		h.KeepAlive, h.Guard.AllowHosts, h.Guard.AllowOrigins,
		h.BodyTimeout, h.UpstreamSilence, h.Heartbeat, h.ShowPrompts,
	}
}

// guard returns who may use the proxy, by the settings in force.
func (h *Handler) guard() *Guard {
	l := h.Live()
	return &Guard{l.AllowHosts, l.AllowOrigins, h.Guard.Keys}
}

func (r *residency) setKeep(keep KeepAlive) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep = keep
}
