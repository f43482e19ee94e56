package fleet

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"
)

// Order is what somebody has said last about a server at one of the proxies. All of them obey: each
// tells its peers every order that it knows, and the newest one counts, so that it reaches those, too,
// that were away or have been restarted.
type Order struct {
	Server string `json:"server"`
	Drain  bool   `json:"drain"` // false: resume
	// At is the time in milliseconds since 1970, but later than that of every order about the server
	// that was known where it was given: clocks differ.
	At int64 `json:"at"`
}

// newer reports whether o counts rather than p.
func (o Order) newer(p Order) bool { return o.At > p.At || o.At == p.At && o.Drain && !p.Drain }

// orderFor is how long Order waits for peers: longer than one that is cut off counts as there.
const orderFor = silentFor + time.Second

// Order drains a server, or resumes it, at every proxy. It returns when all that are there obey, and
// otherwise after 4 s the names of those that may not: such as have an older version, or hang. ok is
// false if none of the proxies has such a server.
func (f *Fleet) Order(ctx context.Context, server string, drain bool) (missing []string, ok bool) {
	if !f.HasServer(server) {
		f.refresh() // it may be new here
	}
	f.mu.Lock()
	if !f.HasServer(server) {
		f.mu.Unlock()
		return nil, false
	}
	o := Order{server, drain, max(time.Now().UnixMilli(), f.orders[server].At+1)}
	f.adopt([]Order{o})
	f.mu.Unlock()
	f.refresh()
	ctx, cancel := context.WithTimeout(ctx, orderFor)
	defer cancel()
	for {
		news := f.News()
		if missing = f.deaf(o); len(missing) == 0 {
			return nil, true
		}
		select {
		case <-news:
		case <-ctx.Done():
			return missing, true
		}
	}
}

// deaf returns the names of the peers that are there and have not said that they know the order.
func (f *Fleet) deaf(o Order) (names []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.peers {
		knows := func(q Order) bool { return q.Server == o.Server && !o.newer(q) }
		if r := p.report; r != nil && r.ID != f.ID && !slices.ContainsFunc(r.Orders, knows) {
			names = append(names, cmp.Or(r.Name, p.addr))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// adopt takes over the orders that are newer than those known, and obeys them. f.mu must be held.
func (f *Fleet) adopt(orders []Order) {
	if names, seen := f.note(orders); len(names) > 0 {
		if seen {
			f.look()
		}
		f.obey(names)
	}
}

// note takes over the orders that are newer than those known, and returns their servers' names.
// seen means that one of these is in the view, which has to follow. f.mu must be held.
func (f *Fleet) note(orders []Order) (names []string, seen bool) {
	for _, o := range orders {
		if o.newer(f.orders[o.Server]) {
			f.orders[o.Server] = o
			names, seen = append(names, o.Server), seen || f.HasServer(o.Server)
		}
	}
	return names, seen
}

// obey calls Config.Ordered, after the view says what was ordered: what no longer finds the server
// here looks there for another one. f.mu must be held.
func (f *Fleet) obey(names []string) {
	for _, name := range names {
		if f.Ordered != nil {
			f.Ordered(name, f.orders[name].Drain)
		}
	}
}

// Remind calls Config.Ordered again for a server that is a new one here, or that comes again.
func (f *Fleet) Remind(server string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.obey([]string{server})
}

// HasServer reports whether one of the proxies has a server with this name, or had it until a short
// time ago.
func (f *Fleet) HasServer(name string) bool { return f.view.Load().places[name] != nil }

// AllDrained returns a server that has a model and is drained, if all that have it are.
func (f *Fleet) AllDrained(model string) (server string) {
	v := f.view.Load()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range v.names {
		if !v.places[name].has(model) {
			continue
		}
		if !f.orders[name].Drain {
			return ""
		}
		server = cmp.Or(server, name)
	}
	return server
}

// InFlight returns how many requests the peers have in progress at a server that is drained, as they
// said last: the view may be older than that.
func (f *Fleet) InFlight(server string) (n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ids := map[string]bool{f.ID: true}
	for _, p := range f.peers {
		if p.report == nil || ids[p.report.ID] { // a peer may have several addresses
			continue
		}
		ids[p.report.ID] = true
		for _, s := range p.report.Servers {
			if s.Name == server {
				n += s.InFlight
			}
		}
	}
	return n
}

// ordered returns the orders for a report. f.mu must be held.
func (f *Fleet) ordered() []Order {
	list := slices.Collect(maps.Values(f.orders))
	slices.SortFunc(list, func(o, p Order) int { return cmp.Compare(o.Server, p.Server) })
	return list
}
