package contextstore

import (
	"slices"
	"sort"
)

// group is the states of one format and one owner, sorted by their chains link by link, shorter
// ones first. In this order all chains that begin with the same links are adjacent, and the chain
// that shares most with a given one is next to that one's own place. So no map of all links is
// needed, of which 10,000 states may have ten million.
type group []member

// member is one state of a group, with what a walk along the group needs: a walk reads one piece of
// memory from end to end, and no chains.
type member struct {
	*file
	bytes  int64
	tokens int32
	links  int32
	shared int32 // leading links shared with the member before it
}

// Common returns how many leading links a and b share. Since each link stands for all links before
// it, the first difference is found without comparing every one.
func Common(a, b []uint64) int {
	return sort.Search(min(len(a), len(b)), func(i int) bool { return a[i] != b[i] })
}

// place returns the index of the first state with these links, or where it would be inserted.
func (g group) place(links []uint64) int {
	return sort.Search(len(g), func(i int) bool {
		have := g[i].Links
		n := Common(have, links)
		if n == len(have) || n == len(links) {
			return len(have) >= len(links)
		}
		return have[n] > links[n]
	})
}

// insert returns the group with one more state.
func (g group) insert(f *file) group {
	at := g.place(f.Links)
	m := member{file: f, bytes: f.Bytes, tokens: int32(f.Tokens), links: int32(len(f.Links))}
	if at > 0 {
		m.shared = int32(Common(g[at-1].Links, f.Links))
	}
	if at < len(g) {
		g[at].shared = int32(Common(f.Links, g[at].Links))
	}
	return slices.Insert(g, at, m)
}

// remove returns the group without a state.
func (g group) remove(f *file) group {
	for at := g.place(f.Links); at < len(g); at++ { // several may have the same links
		if g[at].file != f {
			continue
		}
		if at+1 < len(g) {
			g[at+1].shared = min(g[at].shared, g[at+1].shared)
		}
		return slices.Delete(g, at, at+1)
	}
	return g
}

// walk visits the states that share a link with these links, from their own place upwards and then
// downwards, so that in each direction those that share more come first. visit receives the number
// of shared leading links, and ends its direction by returning false.
func (g group) walk(links []uint64, visit func(m *member, shared int) bool) {
	at := g.place(links)
	if at < len(g) {
		n := Common(g[at].Links, links)
		for i := at; n > 0 && visit(&g[i], n) && i+1 < len(g); i++ {
			n = min(n, int(g[i+1].shared))
		}
	}
	if at > 0 {
		n := Common(g[at-1].Links, links)
		for i := at - 1; n > 0 && visit(&g[i], n) && i > 0; i-- {
			n = min(n, int(g[i].shared))
		}
	}
}

// best returns the state that shares the most leading links with links, the smallest of several,
// and their number. It considers only states of at most so many tokens (0: any). It returns nil if
// there is none.
func (g group) best(links []uint64, tokens int) (best *file, depth int) {
	var bytes int64
	g.walk(links, func(m *member, n int) bool {
		switch {
		case n < depth:
			return false
		case n == depth && m.bytes >= bytes:
		case tokens > 0 && int(m.tokens) > tokens || n < int(m.links) && m.Whole:
		default:
			best, depth, bytes = m.file, n, m.bytes
		}
		return true
	})
	return best, depth
}

// coveredBy returns the states that s makes redundant.
func (g group) coveredBy(s *State) (covered []*file) {
	g.walk(s.Links, func(m *member, n int) bool {
		if n == int(m.links) && s.covers(&m.State, n) {
			covered = append(covered, m.file)
		}
		return true
	})
	return covered
}

// covers reports whether one of the states makes s redundant.
func (g group) covers(s *State) (covered bool) {
	g.walk(s.Links, func(m *member, n int) bool {
		covered = covered || m.covers(s, n)
		return n == len(s.Links) && !covered
	})
	return covered
}
