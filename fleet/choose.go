package fleet

import (
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Ask is what Choose needs to know of a request.
type Ask struct {
	Model  string        // its key; "" if it names none
	Server string        // the only server that may answer it; "": any
	Links  []prefix.Link // of its prompt; may be empty
	Tokens int           // of the prompt, estimated
	// Not are the IDs of peers that did not serve it, and are not asked again.
	Not []string
}

// Place is where a request goes.
type Place struct {
	Server string
	Peer   string // the owner's ID; "" for this proxy
	addr   string
	gone   <-chan struct{}
}

// Here reports whether this proxy serves the request itself.
func (p Place) Here() bool { return p.addr == "" }

// Choose returns the server that a request should go to, and its owner. It is the server where the
// most of the prompt was seen, or else one by the prompt's opening, so that all proxies choose the
// same one. ok is false if no proxy is known to have a server with the model that takes requests.
func (f *Fleet) Choose(a Ask) (p Place, ok bool) {
	v := f.view.Load()
	var all []*place
	for _, name := range v.names {
		if s := v.places[name]; s.may(a) {
			all = append(all, s)
		}
	}
	if len(all) == 0 {
		return Place{}, false
	}
	s := all[0]
	if len(all) > 1 {
		s = f.prefer(all, a)
	}
	f.sent.add(s.owner.id, s.Name, time.Duration(float64(a.Tokens)*s.PerToken*float64(time.Second)))
	return s.place(), true
}

func (s *place) place() Place {
	p := Place{Server: s.Name}
	if o := s.owner.peer; o != nil {
		p.Peer, p.addr, p.gone = s.owner.id, o.addr, s.gone
	}
	return p
}

// may reports whether a request may go to the server.
func (s *place) may(a Ask) bool {
	if slices.Contains(a.Not, s.owner.id) && s.owner.peer != nil {
		return false
	}
	if s.owner.away || a.Server != "" {
		return s.Name == a.Server && !s.owner.away
	}
	if !s.Takes {
		return false
	}
	_, has := slices.BinarySearch(s.Models, a.Model)
	return has || a.Model == ""
}

// slack is how many bytes of a prompt are not worth a detour.
const slack = 256

// prefer chooses one of several servers.
func (f *Fleet) prefer(all []*place, a Ask) *place {
	load := func(s *place) time.Duration {
		return time.Duration(s.Wait*float64(time.Second)) + f.sent.get(s.owner.id, s.Name)
	}
	if len(a.Links) == 0 {
		// Nothing to be warm: this proxy's own servers save a hop.
		if own := slices.DeleteFunc(slices.Clone(all), func(s *place) bool {
			return s.owner.peer != nil
		}); len(own) > 0 {
			all = own
		}
		return slices.MinFunc(all, func(s, t *place) int { return int(load(s) - load(t)) })
	}
	if warm := f.seen.deepest(a.Links, all); len(warm) > 0 {
		return slices.MinFunc(warm, func(s, t *place) int { return int(load(s) - load(t)) })
	}
	offers := make([]schedule.Offer, len(all))
	for i, s := range all {
		offers[i] = schedule.Offer{Name: s.Name, Slots: s.Slots, Load: load(s)}
		offers[i].Own = time.Duration(float64(a.Tokens) * s.PerToken * float64(time.Second))
	}
	return all[schedule.Settle(offers, schedule.Opening(a.Links))]
}

// Sent notes that a prompt was sent to a server, or is about to be, and tells the peers.
func (f *Fleet) Sent(server string, links []prefix.Link) {
	s := Sight{Server: server, Hashes: sample(links)}
	f.seen.put(s)
	f.outbox.sight(s)
}

// sample returns the fingerprints of some links by which other prompts that begin alike are
// recognized: those at powers of two, and the last few, where a conversation goes on.
func sample(links []prefix.Link) []uint64 {
	var hashes []uint64
	next := 1
	for i, l := range links {
		if i+1 == next || i >= len(links)-3 {
			if i+1 >= next {
				next *= 2
			}
			if l.Bytes > slack {
				hashes = append(hashes, l.Hash)
			}
		}
	}
	return hashes
}

// sightings are the servers to which prompts with some fingerprint were sent.
type sightings struct {
	mu     sync.Mutex
	byHash *simplelru.LRU[uint64, []string] // the latest server last
}

const (
	hashesMost = 200_000 // a hash takes about 100 bytes
	placesMost = 4       // servers that are remembered for one hash
)

func newSightings() *sightings {
	lru, err := simplelru.NewLRU[uint64, []string](hashesMost, nil)
	if err != nil {
		panic(err) // impossible: the size is positive
	}
	return &sightings{byHash: lru}
}

func (s *sightings) put(at Sight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range at.Hashes {
		names, _ := s.byHash.Get(h)
		if n := len(names); n > 0 && names[n-1] == at.Server {
			continue
		}
		names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == at.Server })
		if len(names) >= placesMost {
			names = names[1:]
		}
		s.byHash.Add(h, append(names, at.Server))
	}
}

// deepest returns those of some servers where the most of a prompt was seen.
func (s *sightings) deepest(links []prefix.Link, all []*place) (warm []*place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range slices.Backward(links) {
		names, ok := s.byHash.Peek(l.Hash)
		if !ok || l.Bytes <= slack {
			continue
		}
		for _, p := range all {
			if slices.Contains(names, p.Name) {
				warm = append(warm, p)
			}
		}
		if len(warm) > 0 {
			return warm
		}
	}
	return nil
}

// sentSince is the work that this proxy has sent to servers since their owners last reported.
type sentSince struct {
	mu   sync.Mutex
	work map[string]map[string]time.Duration // by the owner's ID and the server's name
}

func newSentSince() *sentSince {
	return &sentSince{work: map[string]map[string]time.Duration{}}
}

func (s *sentSince) add(owner, server string, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.work[owner] == nil {
		s.work[owner] = map[string]time.Duration{}
	}
	s.work[owner][server] += d
}

func (s *sentSince) get(owner, server string) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.work[owner][server]
}

func (s *sentSince) reset(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.work, owner)
}
