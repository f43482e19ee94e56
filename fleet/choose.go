package fleet

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Ask is what Choose needs to know of a request.
type Ask struct {
	Model  string        // its key; "" if it names none
	Server string        // the only server that may answer it; "": any
	Links  []prefix.Link // of its prompt; may be empty
	// Not are the IDs of peers that did not serve it, and are not asked again.
	Not []string
}

// Place is where a request goes.
type Place struct {
	Server string
	Peer   string // the owner's ID; "" for this proxy
	Name   string // the owner's name; "" for this proxy
	addr   string
	gone   <-chan struct{}
}

// Here reports whether this proxy serves the request itself.
func (p Place) Here() bool { return p.addr == "" }

// Choose returns the server that a request should go to, and its owner. It is the least loaded of the
// servers that hold the most of the prompt, or else one by the prompt's opening, so that all proxies
// choose the same one. ok is false if no proxy is known to have a server with the model that takes
// requests.
func (f *Fleet) Choose(a Ask) (p Place, ok bool) {
	all := f.able(a)
	if len(all) == 0 {
		return Place{}, false
	}
	s := all[0]
	if len(all) > 1 {
		s = f.prefer(all, a)
	}
	f.sent.add(s.owner.id, s.Name)
	// The owner tells it to everybody once it sends the request. Until then this proxy's next
	// requests follow this one.
	f.seen.put(Sight{Server: s.Name, Hashes: sample(a.Links)}, true)
	return s.place(), true
}

// able returns the servers that a request may go to: of a proxy that is about to stop only if there
// is no other, since it would wait for each.
func (f *Fleet) able(a Ask) (all []*place) {
	v := f.view.Load()
	stay := 0
	for _, name := range v.names {
		if s := v.places[name]; s.may(a) {
			all = append(all, s)
			if !s.owner.draining {
				stay++
			}
		}
	}
	if stay == 0 || stay == len(all) {
		return all
	}
	return slices.DeleteFunc(all, func(s *place) bool { return s.owner.draining })
}

// Astray returns the server that a passed request should go to instead, if this proxy knows better
// than the entry did: it has just given what the prompt begins with to another proxy's server.
func (f *Fleet) Astray(a Ask) (server string, ok bool) {
	if s := f.seen.elsewhere(a.Links, f.able(a)); s != nil {
		return s.Name, true
	}
	return "", false
}

func (s *place) place() Place {
	p := Place{Server: s.Name}
	if o := s.owner.peer; o != nil {
		p.Peer, p.Name, p.addr, p.gone = s.owner.id, s.owner.name, o.addr, s.gone
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
	return a.Model == "" || s.has(a.Model)
}

// slack is how many bytes of a prompt are not worth a detour: about 64 tokens.
const slack = 256

// prefer chooses one of several servers. Load decides only between servers that are equally warm, and
// over what has no prompt: each entry sees only a part of what is sent, so that several would choose
// different servers for what belongs together. Owners, who see all of it, spread the work
// (schedule.Scheduler.Give).
func (f *Fleet) prefer(all []*place, a Ask) *place {
	if len(a.Links) == 0 {
		return f.idlest(all)
	}
	if warm := f.seen.deepest(a.Links, all); len(warm) > 0 {
		return slices.MinFunc(warm, f.byLoad)
	}
	// Without the model it would be loaded there, perhaps in the place of another one.
	if loaded := slices.DeleteFunc(slices.Clone(all), func(s *place) bool {
		return !slices.Contains(s.Loaded, a.Model)
	}); len(loaded) > 0 {
		all = loaded
	}
	offers := make([]schedule.Offer, len(all))
	for i, s := range all {
		offers[i] = schedule.Offer{Name: s.Name, Slots: s.Slots}
	}
	return all[schedule.Settle(offers, schedule.Opening(a.Links))]
}

// idlest chooses a server for a request that nothing is warm for: one of this proxy's own, which
// saves a hop, where the least waits.
func (f *Fleet) idlest(all []*place) *place {
	if own := slices.DeleteFunc(slices.Clone(all), func(s *place) bool {
		return s.owner.peer != nil
	}); len(own) > 0 {
		all = own
	}
	return slices.MinFunc(all, f.byLoad)
}

// byLoad compares servers by what was reported of them, and what this proxy has sent there since.
// Seconds and requests are added, so that the ones decide where requests are long, the others where
// they are short.
func (f *Fleet) byLoad(s, t *place) int {
	load := func(s *place) float64 { return s.Wait + float64(s.Running+f.sent.get(s.owner.id, s.Name)) }
	return cmp.Compare(load(s), load(t))
}

// Sent notes that a prompt was sent to a server, or is about to be, and tells the peers.
func (f *Fleet) Sent(server string, links []prefix.Link) {
	s := Sight{Server: server, Hashes: sample(links)}
	f.seen.put(s, false)
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
	byHash *simplelru.LRU[uint64, []sighting] // the latest last
	got    map[string]uint64                  // how many prompts were sent to a server, by its name
}

type sighting struct {
	server string
	n      uint64 // what got was for that server
	// assumed means that a request was sent on its way there by this proxy, and that the server's
	// owner has not said that it began with it.
	assumed bool
}

const (
	hashesMost = 200_000 // a hash takes about 100 bytes
	placesMost = 4       // servers that are remembered for one hash
)

func newSightings() *sightings {
	lru, err := simplelru.NewLRU[uint64, []sighting](hashesMost, nil)
	if err != nil {
		panic(err) // impossible: the size is positive
	}
	return &sightings{byHash: lru, got: map[string]uint64{}}
}

// put adds a sight. One that is not assumed replaces those that are.
func (s *sightings) put(at Sight, assumed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !assumed {
		s.got[at.Server]++
	}
	got := s.got[at.Server]
	for _, h := range at.Hashes {
		before, _ := s.byHash.Get(h)
		if n := len(before); n > 0 && before[n-1].server == at.Server && (assumed || !before[n-1].assumed) {
			before[n-1].n = got
			continue
		}
		now, latest := make([]sighting, 0, placesMost), sighting{at.Server, got, assumed}
		for _, b := range before {
			switch {
			case b.server == at.Server:
				latest.assumed = latest.assumed && b.assumed
			case assumed || !b.assumed:
				now = append(now, b)
			}
		}
		if len(now) >= placesMost {
			now = now[1:]
		}
		s.byHash.Add(h, append(now, latest))
	}
}

// deepest returns those of some servers that hold the most of a prompt, the one that saw it last
// first; none if it was seen nowhere. One that saw it earlier may have lost it, and then evaluating it
// again costs more than waiting for the last one.
func (s *sightings) deepest(links []prefix.Link, all []*place) (warm []*place) {
	s.search(links, func(seen []sighting) (*place, bool) {
		for _, at := range slices.Backward(seen) {
			p := placeOf(all, at.server)
			if p != nil && (len(warm) == 0 || s.got[at.server]-at.n <= uint64(max(p.Slots, 1))) {
				warm = append(warm, p)
			}
		}
		return nil, len(warm) > 0
	})
	return warm
}

// elsewhere returns the server, of those that are not this proxy's, to which a prompt belongs that a
// peer has passed on; nil if it is as warm here, or warm nowhere.
func (s *sightings) elsewhere(links []prefix.Link, all []*place) *place {
	return s.search(links, func(seen []sighting) (there *place, ok bool) {
		for _, at := range slices.Backward(seen) {
			switch p := placeOf(all, at.server); {
			case p == nil || at.assumed:
			case p.owner.peer == nil:
				return nil, true
			case there == nil:
				there = p
			}
		}
		return there, there != nil
	})
}

// search looks for a prompt's fingerprints, from the last one on, and returns what judge says of the
// first of which it says something. What begins too many prompts says nothing.
func (s *sightings) search(
	links []prefix.Link, judge func(seen []sighting) (p *place, ok bool),
) *place {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range slices.Backward(links) {
		if l.Bytes <= slack {
			break
		}
		if seen, ok := s.byHash.Peek(l.Hash); ok {
			if p, ok := judge(seen); ok {
				return p
			}
		}
	}
	return nil
}

// placeOf returns the place of a server; nil if it is not there.
func placeOf(all []*place, server string) *place {
	if i := slices.IndexFunc(all, func(p *place) bool { return p.Name == server }); i >= 0 {
		return all[i]
	}
	return nil
}

// keep forgets what was counted of all servers but some. If another one is back, it has probably lost
// what it held; got-n is then far beyond what it can hold, until it has got as much again.
func (s *sightings) keep(places map[string]*place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.got, func(server string, _ uint64) bool { return places[server] == nil })
}

// sentSince is how many requests this proxy has sent to servers since their owners last reported.
type sentSince struct {
	mu sync.Mutex
	n  map[string]map[string]int // by the owner's ID and the server's name
}

func newSentSince() *sentSince { return &sentSince{n: map[string]map[string]int{}} }

func (s *sentSince) add(owner, server string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n[owner] == nil {
		s.n[owner] = map[string]int{}
	}
	s.n[owner][server]++
}

func (s *sentSince) get(owner, server string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n[owner][server]
}

func (s *sentSince) reset(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.n, owner)
}

// keep forgets all owners but some.
func (s *sentSince) keep(owners map[string]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.n, func(owner string, _ map[string]int) bool { return !owners[owner] })
}
