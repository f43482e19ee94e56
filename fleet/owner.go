package fleet

import (
	"hash/fnv"
	"maps"
	"slices"
)

// member is a proxy, as it was last heard of.
type member struct {
	peer     *peer // nil: this proxy
	id, name string
	draining bool
	away     bool // it is not there, but may come back
	servers  []Server
}

// view is what follows from what is known of all proxies. It is not changed once it is made.
type view struct {
	members []*member
	places  map[string]*place // by the server's name
	names   []string          // of the servers, sorted
}

// place is a server and its owner.
type place struct {
	Server // as its owner says
	owner  *member
	gone   <-chan struct{} // closed when the owner goes away; nil for this proxy
}

// conclude decides who owns which server.
func conclude(members []*member) *view {
	alike := map[string]int{}
	for _, m := range members {
		alike[m.name]++
	}
	best := map[string]candidate{} // by the server's name
	for _, m := range members {
		for i := range m.servers {
			s := &m.servers[i]
			c := candidate{m: m, s: s, score: score(m, s.Name, alike[m.name] > 1)}
			if b, ok := best[s.Name]; !ok || c.before(b) {
				best[s.Name] = c
			}
		}
	}
	v := &view{
		members: members, names: slices.Sorted(maps.Keys(best)),
		places: make(map[string]*place, len(best)),
	}
	for name, c := range best {
		p := &place{Server: *c.s, owner: c.m}
		p.Takes = p.Takes && !c.m.away
		if c.m.peer != nil {
			p.gone = c.m.peer.gone
		}
		v.places[name] = p
	}
	return v
}

// candidate is a proxy that may own a server.
type candidate struct {
	m     *member
	s     *Server
	score uint64
}

// before reports whether c rather than d owns the server: a proxy that is there and not about to
// stop, that is beside the server, that reaches it, or else the first in the order of the rendezvous hash
// (Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996).
func (c candidate) before(d candidate) bool {
	switch {
	case c.m.away != d.m.away:
		return d.m.away
	case c.m.draining != d.m.draining:
		return d.m.draining
	case c.s.Beside != d.s.Beside:
		return c.s.Beside
	case c.s.reached() != d.s.reached():
		return c.s.reached()
	case c.score != d.score:
		return c.score > d.score
	}
	return c.m.id < d.m.id
}

func (s *Server) reached() bool { return s.Takes || s.Reached }

// score is the rendezvous hash of a proxy for a server. Proxies of one name (which should not be)
// are told apart by what differs for each process.
func score(m *member, server string, alike bool) uint64 {
	h := fnv.New64a()
	h.Write([]byte(m.name))
	if alike {
		h.Write([]byte{0})
		h.Write([]byte(m.id))
	}
	h.Write([]byte{0})
	h.Write([]byte(server))
	x := h.Sum64() // FNV does not mix its last bytes well; finish as SplitMix64 does
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Leaving reports whether a peer that has a server is about to stop.
func (f *Fleet) Leaving(server string) bool {
	return slices.ContainsFunc(f.view.Load().members, func(m *member) bool {
		return m.peer != nil && m.draining && !m.away &&
			slices.ContainsFunc(m.servers, func(s Server) bool { return s.Name == server })
	})
}
