package storetest

import (
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Costs is what a store charges, in bytes.
type Costs struct {
	Link int64 // per link
}

// naive is a store that is right because it is simple: every operation looks at everything it
// holds. It uses the model numbers that it is given.
type naive struct {
	limits    contextstore.Limits
	costs     Costs
	models    map[uint32]bool
	held      []*naiveLink // the newest first
	evictions uint64
}

type naiveLink struct {
	hash      uint64
	rec       contextstore.Record
	forgotten bool
}

// find returns the link with this hash, valid or invalidated, or nil.
func (n *naive) find(hash uint64) *naiveLink {
	for _, l := range n.held {
		if l.hash == hash {
			return l
		}
	}
	return nil
}

func (n *naive) Match(links []prefix.Link) (depth int, rec contextstore.Record) {
	for _, link := range links {
		l := n.find(link.Hash)
		if l == nil || l.forgotten {
			break
		}
		depth, rec = depth+1, l.rec
	}
	return depth, rec
}

func (n *naive) Put(links []prefix.Link, s contextstore.Sight, tokens int) {
	if !n.models[s.Model] {
		return
	}
	kept := len(links)
	for kept > n.limits.Entries || int64(kept)*n.costs.Link > n.limits.Bytes {
		kept--
	}
	for i := kept - 1; i >= 0; i-- {
		l := &naiveLink{hash: links[i].Hash, rec: contextstore.Record{Sight: s, Warm: true}}
		if old := n.find(l.hash); old != nil {
			if !old.forgotten && old.rec.Model == s.Model {
				l.rec.Tokens = old.rec.Tokens
			}
			n.held = slices.DeleteFunc(n.held, func(x *naiveLink) bool { return x == old })
		}
		if tokens > 0 && i == len(links)-1 {
			l.rec.Tokens = tokens
		}
		n.held = slices.Insert(n.held, 0, l)
	}
	n.trim()
}

func (n *naive) trim() {
	for st := n.Stats(); st.Entries > n.limits.Entries || st.Bytes > n.limits.Bytes; st = n.Stats() {
		n.held = n.held[:len(n.held)-1]
		n.evictions++
	}
}

func (n *naive) Cool(upstream uint16, model uint32) {
	for _, l := range n.held {
		if l.rec.Upstream == upstream && (model == 0 || l.rec.Model == model) {
			l.rec.Warm = false
		}
	}
}

func (n *naive) Forget(model uint32) {
	if model == 0 {
		n.held = nil
	}
	for _, l := range n.held {
		if l.rec.Model == model {
			l.forgotten = true
		}
	}
}

func (n *naive) Stats() contextstore.Stats {
	st := contextstore.Stats{Entries: len(n.held), Evictions: n.evictions, Limits: n.limits}
	st.Bytes = int64(len(n.held)) * n.costs.Link
	return st
}
