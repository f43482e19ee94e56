package proxy

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Servers may come and go while requests are served. Everything that looks at them takes one
// snapshot of them, so that no lock is held. The scheduler, the ledger and the records know a server
// by its index, which stays its name's: another name gets it only once nothing else is free, long
// after the server has gone.

const (
	// mostServers is how many there can be at once, and mostIndices how many indices are used before
	// those of servers that have gone are given to others.
	mostServers = 256
	mostIndices = 4 * mostServers
	// leavingEvery is how often it is checked whether a removed server has finished its requests.
	leavingEvery = 100 * time.Millisecond
)

// servers is a snapshot of the upstreams.
type servers struct {
	live []*backend // those that get requests, in order: Handler.Upstreams, then in that of AddUpstream
	// known has every server by its index: those that are live or leaving, and the last one that
	// had the index if it is gone.
	known []*backend
}

// The states of a backend. Guarded by changing.mu.
type stage int

const (
	isLive    stage = iota
	isLeaving       // removed: it finishes what it has
	isGone
)

// changing is what changes the servers needs.
type changing struct {
	mu      sync.Mutex
	running context.Context // while Run runs; nil: not
	tended  sync.WaitGroup  // a goroutine for each server
}

// backends returns the servers that get requests, in order. There may be none.
func (h *Handler) backends() []*backend { return h.servers.Load().live }

// at returns the server that has an index, or had it last.
func (h *Handler) at(index uint16) *backend { return h.servers.Load().known[index] }

// present returns the live servers, and then those that are leaving.
func (h *Handler) present() []*backend {
	all := h.servers.Load()
	list := slices.Clip(all.live)
	for _, b := range all.known {
		if b.leaving.Load() {
			list = append(list, b)
		}
	}
	return list
}

// indexOf returns the place of a server, by its index, in a list; -1 if it is not there.
func indexOf(list []*backend, index uint16) int {
	return slices.IndexFunc(list, func(b *backend) bool { return b.index == index })
}

// UpstreamName returns the name of the server that has an index, or had it last.
func (h *Handler) UpstreamName(index uint16) string { return h.at(index).Name }

// UpstreamIndex returns the index of the server with a name.
func (h *Handler) UpstreamIndex(name string) (index uint16, ok bool) {
	if b := h.named(name); b != nil {
		return b.index, true
	}
	return 0, false
}

// AddUpstream adds a server while requests are served: with so many lanes for each model
// (Scheduler.SetLanes), or expected ones (Scheduler.SetExpected), and only with Handler.Lanes. Its
// Polled, if it has one, has to call Handler.Polled. Run polls it. A server that is still being
// removed stays instead if it has the same name and address. What cannot be added is logged. It is
// safe for concurrent use.
func (h *Handler) AddUpstream(s *upstream.Server, lanes, expected int) {
	h.changing.mu.Lock()
	defer h.changing.mu.Unlock()
	known := h.servers.Load().known
	if i := slices.IndexFunc(known, func(b *backend) bool { return b.Name == s.Name && b.stage != isGone }); i >= 0 {
		b := known[i]
		if b.URL.String() != s.URL.String() {
			h.Log.Error("an upstream cannot be added: another one has its name; rename one of them",
				"upstream", s.Name, "url", s.URL.String(), "other", b.URL.String())
		} else if b.stage == isLeaving {
			h.stages(b, isLive)
			h.remind(b)
			h.Log.Info("upstream stays after all", "upstream", b.Name, "url", b.URL.String())
		}
		return
	}
	index, ok := h.freeIndex(s.Name)
	if !ok {
		h.Log.Error("an upstream cannot be added: there are as many as there can be",
			"upstream", s.Name, "url", s.URL.String(), "most", mostServers)
		return
	}
	if h.Lanes != nil {
		h.Lanes.Forget(index) // the one that had it
		h.Lanes.SetLanes(index, lanes)
		if expected > 0 {
			h.Lanes.SetExpected(index, expected)
		}
	}
	// A server that comes again is owned by the same proxy until the fleet says otherwise: to the
	// fleet it may not have been away.
	again := int(index) < len(known) && known[index].Name == s.Name
	foreign := again && known[index].foreign.Load()
	if foreign && h.Lanes != nil {
		h.Lanes.SetOwned(index, false)
	}
	b := h.admitBackend(index, s, foreign)
	b.added = true
	h.Log.Info("upstream added", "upstream", b.Name, "url", b.URL.String())
	h.remind(b)
	h.tend(b)
}

// remind drains or resumes a server as the fleet was told, perhaps while this proxy had it not.
func (h *Handler) remind(b *backend) {
	if h.Fleet != nil {
		h.Fleet.Remind(b.Name)
	}
}

// RemoveUpstream removes a server while requests are served. It gets nothing new from now on. What
// waits for it goes to others, if these can serve it; else it goes to this one, or gets the usual
// error if this one does not answer. When it has finished, it is forgotten, and Handler.Forgotten
// is called. It is safe for concurrent use.
func (h *Handler) RemoveUpstream(name string) {
	h.changing.mu.Lock()
	defer h.changing.mu.Unlock()
	for _, b := range h.backends() {
		if b.Name == name {
			h.stages(b, isLeaving)
			h.Log.Info("upstream removed: it finishes its requests and gets no new ones",
				"upstream", b.Name, "url", b.URL.String(), "in_flight", b.inFlight.Load())
			select {
			case b.removed <- struct{}{}:
			default: // it has not noticed an earlier removal yet
			}
		}
	}
}

// admitBackend makes a server one of the live ones. h.changing.mu must be held.
func (h *Handler) admitBackend(index uint16, s *upstream.Server, foreign bool) *backend {
	b := h.newBackend(index, s)
	b.foreign.Store(foreign)
	if h.Lanes != nil {
		h.Lanes.SetName(index, s.Name)
		if h.Contexts != nil && b.port != 0 {
			h.Lanes.SetTells(index)
		}
	}
	known := slices.Clone(h.servers.Load().known)
	if int(index) == len(known) {
		known = append(known, b)
	} else {
		known[index] = b
	}
	h.servers.Store(&servers{append(slices.Clone(h.backends()), b), known})
	h.available(b)
	return b
}

// stages changes the stage of a server. h.changing.mu must be held.
func (h *Handler) stages(b *backend, to stage) {
	b.stage = to
	b.leaving.Store(to == isLeaving)
	if to == isGone {
		b.telling.Lock()
		b.gone = true
		b.telling.Unlock()
	}
	all := h.servers.Load()
	live := slices.DeleteFunc(slices.Clone(all.live), func(other *backend) bool { return other == b })
	if to == isLive {
		live = append(live, b)
	}
	h.servers.Store(&servers{live, all.known})
	if to != isGone {
		h.available(b)
	}
}

// freeIndex returns the index for a new server: the one that its name had before, or one that
// nobody had, or else that of the server that has been gone for longest. h.changing.mu must be held.
func (h *Handler) freeIndex(name string) (index uint16, ok bool) {
	var oldest *backend
	present := 0
	known := h.servers.Load().known
	for _, b := range known {
		switch {
		case b.stage != isGone:
			present++
		case b.Name == name:
			return b.index, true
		case oldest == nil || b.goneAt.Before(oldest.goneAt):
			oldest = b
		}
	}
	switch {
	case present >= mostServers:
		return 0, false
	case len(known) < mostIndices:
		return uint16(len(known)), true
	}
	return oldest.index, true
}

// tendAll begins to tend all servers, until ctx ends. The function that it returns waits for the
// end.
func (h *Handler) tendAll(ctx context.Context) (wait func()) {
	h.changing.mu.Lock()
	defer h.changing.mu.Unlock()
	h.changing.running = ctx
	for _, b := range h.present() {
		h.tend(b)
	}
	return func() {
		<-ctx.Done()
		h.changing.mu.Lock()
		h.changing.running = nil // no goroutine begins from now on
		h.changing.mu.Unlock()
		h.changing.tended.Wait()
	}
}

// tend does what a server needs in the background until Run ends, or it is gone. h.changing.mu must
// be held.
func (h *Handler) tend(b *backend) {
	if h.changing.running == nil {
		return // Run will
	}
	ctx, cancel := context.WithCancel(h.changing.running)
	var wg sync.WaitGroup
	wg.Go(func() { b.residency.run(ctx) })
	if b.added { // whoever has filled in Handler.Upstreams polls those
		wg.Go(func() {
			b.Poll(ctx)
			b.Server.Run(ctx)
		})
	}
	stop := func() {
		cancel()
		wg.Wait()
	}
	h.changing.tended.Go(func() {
		defer stop()
		for {
			var again <-chan time.Time
			if b.leaving.Load() {
				if h.end(b, stop) {
					return
				}
				again = time.After(leavingEvery)
			}
			select {
			case <-ctx.Done():
				return
			case <-b.removed:
			case <-again:
			}
		}
	})
}

// end forgets a removed server if it has no request any more. stop ends its polls, which do not
// take the lock that is held meanwhile.
func (h *Handler) end(b *backend, stop func()) bool {
	h.changing.mu.Lock()
	defer h.changing.mu.Unlock()
	if b.stage != isLeaving || b.inFlight.Load() > 0 || h.Lanes != nil && !h.Lanes.Forget(b.index) {
		return false
	}
	stop()
	h.stages(b, isGone)
	b.goneAt = time.Now()
	if h.Lanes != nil {
		h.Lanes.Forget(b.index) // what a last poll has told
	}
	if h.Ledger != nil {
		h.Ledger.Gone(b.index)
	}
	h.recorder.gone(b.index)
	h.prewarming.gone(b)
	h.Forgotten(b.Name)
	h.Log.Info("upstream gone", "upstream", b.Name, "url", b.URL.String())
	return true
}
