package contextstore

import (
	"hash/maphash"
	"math"
	"sort"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// The components of Memory's bytes, measured as growth of the heap by TestLinkBytes.
const (
	// LinkBytes is the cost of a link: 96 for its entry in the LRU, the rest for its place in a
	// map. The map grows in steps, so it varies between 119 and 148 with the number of links, and
	// with how long they have been replaced.
	LinkBytes = 132
)

const (
	// maxModels is how many models are remembered. It divides 1<<32, so that all numbers of a slot
	// have the same remainder.
	maxModels = 1024
	// maxChain is how many links of one chain are kept: twice what 4 MB of text have in the
	// shortest blocks. The lock is held for a whole chain, and nobody should wait for one of a
	// million empty messages.
	maxChain = 1 << 15
)

// Memory is a Store in the process's memory. Make it with NewMemory.
//
// Cool and Forget do not search for the affected links. Time is counted in ticks, and each call
// ends a tick. A link has the tick in which it was put, which is compared with the ticks in which
// its model was last cooled and forgotten.
//
// Put goes from a chain's last link to its first. Hence, for any link that is held, all links
// before it in its chain are held too, are newer in the LRU, and have no earlier tick. Match relies
// on that.
type Memory struct {
	limits Limits
	seed   maphash.Seed

	mu        sync.Mutex // guards everything below
	links     *simplelru.LRU[uint64, link]
	evictions uint64
	tick      uint64            // the present tick; from 1
	forgotten uint64            // the last tick in which any model was forgotten
	cooled    map[uint16]uint64 // the last tick in which all models were cooled, by upstream

	// numbers has the numbers of the remembered models, by the hashes of their keys, so that long
	// keys cost nothing. If two keys had the same hash, they would be one model here, and forgotten
	// together.
	numbers *simplelru.LRU[uint64, uint32]
	slots   [maxModels]slot // by number modulo maxModels
}

// slot is what is known of a model. When it is reused for another model, the number grows by
// maxModels, so that links and callers with the earlier number are recognized.
type slot struct {
	number    uint32
	forgotten uint64            // the last tick in which it was forgotten
	cooled    map[uint16]uint64 // the last tick in which it was cooled, by upstream
}

// link is the 32 bytes kept of one link, so that an entry of the LRU has 96, a size class of the
// allocator.
type link struct {
	at       int64  // Unix time in nanoseconds; 0: the zero time.Time
	tick     uint64 // in which it was put
	tokens   uint32
	model    uint32
	upstream uint16
	lane     uint16
}

// NewMemory returns an empty store.
func NewMemory(limits Limits) *Memory {
	return &Memory{
		limits:  Limits{Entries: max(limits.Entries, 0), Bytes: max(limits.Bytes, 0)},
		seed:    maphash.MakeSeed(),
		links:   newLRU[link](),
		tick:    1,
		cooled:  map[uint16]uint64{},
		numbers: newLRU[uint32](),
	}
}

// newLRU returns an LRU that drops nothing by itself: its own limit counts only entries, and would
// drop a chain's first links while its last ones are being put.
func newLRU[V any]() *simplelru.LRU[uint64, V] {
	l, err := simplelru.NewLRU[uint64, V](math.MaxInt, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return l
}

// Model implements Store.
func (m *Memory) Model(key string) uint32 {
	hash := maphash.String(m.seed, key)
	m.mu.Lock()
	defer m.mu.Unlock()
	if number, ok := m.numbers.Get(hash); ok {
		return number
	}
	number := uint32(m.numbers.Len()) + 1
	if number > maxModels {
		_, number, _ = m.numbers.RemoveOldest()
		m.forget(m.slot(number))
		number += maxModels
	}
	m.numbers.Add(hash, number)
	m.slots[number%maxModels].number = number // the ticks there are older than any link of this model
	return number
}

// Match implements Store.
func (m *Memory) Match(links []prefix.Link) (depth int, rec Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	depth, last := m.match(links)
	if depth == 0 {
		return 0, Record{}
	}
	rec = Record{
		Sight:  Sight{Upstream: last.upstream, Lane: last.lane, Model: last.model},
		Warm:   last.tick > m.cooled[last.upstream] && last.tick > m.slot(last.model).cooled[last.upstream],
		Tokens: int(last.tokens),
	}
	if last.at != 0 {
		rec.At = time.Unix(0, last.at)
	}
	return depth, rec
}

// match returns how many leading links are known, and the last of those. m.mu must be held.
func (m *Memory) match(links []prefix.Link) (depth int, last link) {
	// The links that are held are a leading run, whose end is found without looking at each: with a
	// million links, most of them outside the processor's caches, a look costs 0.1 µs.
	held := sort.Search(len(links), func(i int) bool { return !m.links.Contains(links[i].Hash) })
	if held == 0 {
		return 0, link{}
	}
	if l, _ := m.links.Peek(links[held-1].Hash); l.tick > m.forgotten {
		return held, l // known, and so are all before it
	}
	for ; depth < held; depth++ {
		l, _ := m.links.Peek(links[depth].Hash)
		if !m.known(l) {
			break
		}
		last = l
	}
	return depth, last
}

// known reports whether the link is still valid. m.mu must be held.
func (m *Memory) known(l link) bool {
	s := m.slot(l.model)
	return s != nil && l.tick > s.forgotten
}

// slot returns the slot of the model with this number, or nil if it is not remembered. m.mu must be
// held.
func (m *Memory) slot(number uint32) *slot {
	if s := &m.slots[number%maxModels]; number != 0 && s.number == number {
		return s
	}
	return nil
}

// Put implements Store.
func (m *Memory) Put(links []prefix.Link, s Sight, tokens int) {
	seen := link{model: s.Model, upstream: s.Upstream, lane: s.Lane}
	if !s.At.IsZero() {
		seen.at = s.At.UnixNano()
	}
	last := len(links) - 1
	kept := min(int64(len(links)), maxChain, int64(m.limits.Entries), m.limits.Bytes/LinkBytes)

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.slot(s.Model) == nil {
		return
	}
	seen.tick = m.tick
	// From the last link to the first, so that the first is the newest and dropped last.
	for i := int(kept) - 1; i >= 0; i-- {
		l, hash := seen, links[i].Hash
		if old, ok := m.links.Peek(hash); ok && old.model == l.model && m.known(old) {
			l.tokens = old.tokens
		}
		if i == last && tokens > 0 {
			l.tokens = uint32(min(tokens, math.MaxInt32))
		}
		m.links.Add(hash, l)
	}
	m.trim()
}

// trim drops the oldest links until the limits hold. m.mu must be held.
func (m *Memory) trim() {
	for m.links.Len() > m.limits.Entries || m.bytes() > m.limits.Bytes {
		m.links.RemoveOldest()
		m.evictions++
	}
}

// bytes returns how many bytes are held. m.mu must be held.
func (m *Memory) bytes() int64 { return int64(m.links.Len()) * LinkBytes }

// Cool implements Store.
func (m *Memory) Cool(upstream uint16, model uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if model == 0 {
		m.cooled[upstream] = m.tick
	} else if s := m.slot(model); s != nil {
		if s.cooled == nil {
			s.cooled = map[uint16]uint64{}
		}
		s.cooled[upstream] = m.tick
	}
	m.tick++
}

// Forget implements Store. When it forgets all models, it frees their memory, too.
func (m *Memory) Forget(model uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if model == 0 {
		m.links = newLRU[link]()
	} else if s := m.slot(model); s != nil {
		m.forget(s)
	}
}

// forget invalidates what is known of a model. m.mu must be held.
func (m *Memory) forget(s *slot) {
	s.forgotten, m.forgotten = m.tick, m.tick
	m.tick++
}

// Stats implements Store.
func (m *Memory) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Stats{Entries: m.links.Len(), Bytes: m.bytes(), Evictions: m.evictions, Limits: m.limits}
}
