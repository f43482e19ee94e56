package proxy

import "time"

// Live are the settings that can change while requests are served. The Handler's fields of the same
// names define their meaning and zero values.
type Live struct {
	KeepAlive                               KeepAlive
	AllowHosts, AllowOrigins                []string // see Guard
	BodyTimeout, UpstreamSilence, Heartbeat time.Duration
	ShowPrompts                             bool
}

// Change replaces the settings of the Handler's fields. A request in progress may go on with the
// old ones. A held model keeps its hold; a new keep_alive applies from its next request or load.
func (h *Handler) Change(l Live) {
	h.changing.mu.Lock() // a server that is added meanwhile gets them, too
	defer h.changing.mu.Unlock()
	h.inForce.Store(&l)
	if !l.ShowPrompts && h.Ledger != nil {
		h.Ledger.ForgetExcerpts() // no prompt text is kept without the setting
	}
	for _, b := range h.present() {
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

// guard returns the Guard with the settings in force.
func (h *Handler) guard() *Guard {
	l := h.Live()
	return &Guard{l.AllowHosts, l.AllowOrigins, h.Guard.Keys}
}

func (r *residency) setKeep(keep KeepAlive) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep = keep
}
