package fleet

import (
	"cmp"
	"errors"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Reason is why a peer does not answer.
type Reason string

const (
	Refused     Reason = "refused"     // nobody listens at the address
	Silent      Reason = "silent"      // nothing comes back, or the host cannot be reached
	Unknown     Reason = "unknown"     // its name cannot be looked up
	Secret      Reason = "secret"      // it has another secret, or this proxy shows none
	Certificate Reason = "certificate" // one of the two does not accept the other's certificate, or has none
	NoPeer      Reason = "no_peer"     // what listens there is something else
	Broke       Reason = "broke"       // the connection ended, or anything else
)

// reasonOf returns the kind of a peer's error.
func reasonOf(err error) Reason {
	_, lookup := errors.AsType[*net.DNSError](err)
	timeout, ok := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, errSecret):
		return Secret
	case errors.Is(err, errCertificate):
		return Certificate
	case lookup:
		return Unknown
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, errSilent), ok && timeout.Timeout(), errors.Is(err, syscall.EHOSTUNREACH),
		errors.Is(err, syscall.ENETUNREACH):
		return Silent
	case errors.Is(err, errNoPeer), errors.Is(err, errForeign):
		return NoPeer
	}
	return Broke
}

// Proxy is a proxy that is there, this one or a peer.
type Proxy struct {
	ID       string
	Name     string
	Address  string // "": this proxy
	Version  string // of the program; "": not known
	Draining bool
	// Hears means that it reads this proxy's reports; true for this proxy.
	Hears   bool
	Servers []Listed
}

// Listed is a server that a proxy has configured.
type Listed struct {
	Name   string
	Beside bool // the proxy says that it is beside it
	Owned  bool // … that it owns it
	Takes  bool // … that it answers, and gets new requests
}

// Proxies returns all proxies that are there, by their names.
func (f *Fleet) Proxies() (all []Proxy) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.view.Load().members {
		if m.away {
			continue
		}
		p := Proxy{ID: m.id, Name: m.name, Version: f.Version, Draining: m.draining, Hears: true}
		if m.peer != nil {
			p.Address, p.Version, p.Hears = m.peer.addr, m.peer.version, f.readers[m.id] > 0
		}
		for _, s := range m.servers {
			owned := s.Owned
			if m.peer == nil {
				owned = f.owned[s.Name]
			}
			p.Servers = append(p.Servers, Listed{s.Name, s.Beside, owned, s.Takes})
		}
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b Proxy) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// Unserved is a server that no proxy sends requests to at the moment.
type Unserved struct {
	Server  string
	Owner   string // the name of its last owner
	Address string // of that; "": this proxy
	Away    bool   // the owner is
	Drained bool   // somebody has taken it out of use
	// Models are the keys of its models that no server has which takes requests.
	Models []string
}

// Unserved returns the servers that no proxy sends requests to, by name.
func (f *Fleet) Unserved() (all []Unserved) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.view.Load()
	served := map[string]bool{}
	for _, p := range v.places {
		if p.Takes {
			for _, m := range p.Models {
				served[m] = true
			}
		}
	}
	for _, name := range v.names {
		p := v.places[name]
		if p.Takes {
			continue
		}
		u := Unserved{Server: name, Owner: p.owner.name, Away: p.owner.away, Drained: p.Drained}
		if o := p.owner.peer; o != nil {
			u.Address = o.addr
		}
		for _, m := range p.Models {
			if !served[m] {
				u.Models = append(u.Models, m)
			}
		}
		all = append(all, u)
	}
	return all
}

const (
	// incidentsMost is how many incidents are remembered.
	incidentsMost = 256
	// settleTicks is how often it is looked whether the fleet has changed, in reportEvery.
	settleTicks = int(time.Second / reportEvery)
)

// Incident is something that went wrong between proxies: a peer went away without having said that it
// stops, or with a request.
type Incident struct {
	At    time.Time
	Peer  string // its name
	Lost  bool   // a request was lost with it, which had no answer yet
	Error string
}

// history is what has happened in the fleet.
type history struct {
	mu        sync.Mutex
	incidents []Incident // oldest first
	last      []Proxy
	settled   time.Time // last has been the same since
}

func newHistory() *history { return &history{settled: time.Now()} }

func (h *history) add(i Incident) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.incidents) == incidentsMost {
		h.incidents = slices.Delete(h.incidents, 0, 1)
	}
	h.incidents = append(h.incidents, i)
}

// look notes whether the fleet has changed.
func (h *history) look(now []Proxy) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.EqualFunc(now, h.last, Proxy.like) {
		h.last, h.settled = now, time.Now()
	}
}

// like reports whether nothing differs but whether servers answer.
func (p Proxy) like(q Proxy) bool {
	return p.ID == q.ID && p.Draining == q.Draining && p.Hears == q.Hears &&
		slices.EqualFunc(p.Servers, q.Servers, func(s, t Listed) bool {
			return s.Name == t.Name && s.Beside == t.Beside && s.Owned == t.Owned
		})
}

// Settled returns since when it is the same which proxies are there, hear this one, have which
// servers, and own them. It is looked at once a second.
func (f *Fleet) Settled() time.Time {
	f.history.mu.Lock()
	defer f.history.mu.Unlock()
	return f.history.settled
}

// Incidents returns the last incidents since a time, oldest first.
func (f *Fleet) Incidents(from time.Time) []Incident {
	f.history.mu.Lock()
	defer f.history.mu.Unlock()
	i := slices.IndexFunc(f.history.incidents, func(i Incident) bool { return !i.At.Before(from) })
	if i < 0 {
		return nil
	}
	return slices.Clone(f.history.incidents[i:])
}
