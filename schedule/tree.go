package schedule

import (
	"slices"
	"sort"
	"time"
)

// step is the part of a link that is kept: its cumulative fingerprint, and the approximate number
// of the prompt's tokens up to and including it.
type step struct {
	hash   uint64
	tokens int32
}

// common returns how many leading steps two prompts share. Fingerprints are cumulative, so it need
// not compare all of them.
func common(a, b []step) int {
	n := min(len(a), len(b))
	if n == 0 || a[0].hash != b[0].hash {
		return 0
	}
	if a[n-1].hash == b[n-1].hash {
		return n
	}
	return sort.Search(n, func(i int) bool { return a[i].hash != b[i].hash })
}

// shared returns roughly how many tokens a prompt shares with another one.
func shared(a, other []step) int { return tokensOf(a[:common(a, other)]) }

// tree is the prefix tree of one runner's requests of one priority: those that wait, and those that
// its lanes are serving. Chains of nodes with one child are one node.
type tree struct {
	root  node
	nodes map[uint64]*node // by the first fingerprint of their steps, which no two nodes share
}

// node is a run of steps that all requests below it share.
type node struct {
	parent *node
	steps  []step // never empty except for the root

	// Of the requests that end here or below:
	waiting int
	tokens  int // of the waiting ones' prompts
	busy    int // being served

	ends    fifo      // the waiting requests that end here
	arrived time.Time // of the earliest waiting request below

	// Children with waiting requests: those in which no lane is busy, and the others. Oldest first.
	open, taken siblings
	in          *siblings // the list of its parent that has this node
	prev, next  *node
}

// siblings is a list of nodes.
type siblings struct{ first, last *node }

// reorderMost is how many siblings that began to wait later a node may overtake: those from another
// server keep their places, but not at any cost.
const reorderMost = 256

// add adds a node in order of arrival, which is at the end unless it comes from another server.
func (s *siblings) add(n *node) {
	after := s.last
	for i := 0; i < reorderMost && after != nil && after.arrived.After(n.arrived); i++ {
		after = after.prev
	}
	if after == nil {
		s.pushFront(n)
		return
	}
	n.in, n.prev, n.next = s, after, after.next
	if n.next != nil {
		n.next.prev = n
	} else {
		s.last = n
	}
	after.next = n
}

func (s *siblings) pushFront(n *node) {
	n.in, n.prev, n.next = s, nil, s.first
	if s.first != nil {
		s.first.prev = n
	} else {
		s.last = n
	}
	s.first = n
}

// unlink removes the node from its list.
func (n *node) unlink() {
	if n.in == nil {
		return
	}
	if n.prev != nil {
		n.prev.next = n.next
	} else {
		n.in.first = n.next
	}
	if n.next != nil {
		n.next.prev = n.prev
	} else {
		n.in.last = n.prev
	}
	n.in, n.prev, n.next = nil, nil, nil
}

// depth returns roughly how many tokens a prompt has up to the node's end.
func (n *node) depth() int { return tokensOf(n.steps) }

// list puts the node in its place among its siblings.
func (n *node) list() {
	if n.parent == nil {
		return
	}
	to := &n.parent.open
	switch {
	case n.waiting == 0:
		n.unlink()
		return
	case n.busy > 0:
		to = &n.parent.taken
	}
	if n.in == to {
		return
	}
	began := n.in != nil
	n.unlink()
	if began {
		to.pushFront(n) // what has been begun is older than most
	} else {
		to.add(n)
	}
}

func newTree() *tree { return &tree{nodes: map[uint64]*node{}} }

// place returns the node at which a prompt with these steps ends, adding it if necessary.
func (t *tree) place(steps []step) *node {
	n := &t.root
	for len(steps) > 0 {
		child, ok := t.nodes[steps[0].hash]
		if !ok {
			child = &node{parent: n, steps: steps}
			t.nodes[steps[0].hash] = child
			return child
		}
		i := common(child.steps, steps)
		if i < len(child.steps) {
			child = t.split(child, i)
		}
		n, steps = child, steps[i:]
	}
	return n
}

// split splits a node in two, and returns the new one, which has its first i steps.
func (t *tree) split(n *node, i int) *node {
	upper := &node{parent: n.parent, steps: n.steps[:i:i], waiting: n.waiting, tokens: n.tokens, busy: n.busy, arrived: n.arrived}
	if n.in != nil { // in the same place
		upper.in, upper.prev, upper.next = n.in, n.prev, n.next
		if n.prev != nil {
			n.prev.next = upper
		} else {
			n.in.first = upper
		}
		if n.next != nil {
			n.next.prev = upper
		} else {
			n.in.last = upper
		}
		n.in, n.prev, n.next = nil, nil, nil
	}
	n.parent, n.steps = upper, n.steps[i:]
	t.nodes[upper.steps[0].hash], t.nodes[n.steps[0].hash] = upper, n
	n.list()
	return upper
}

// count adds to a node and all above it, and removes nodes that are no longer needed.
func (t *tree) count(n *node, waiting, tokens, busy int) {
	for n != nil {
		n.waiting += waiting
		n.tokens += tokens
		n.busy += busy
		n.list()
		parent := n.parent
		if n.waiting == 0 && n.busy == 0 && parent != nil {
			delete(t.nodes, n.steps[0].hash)
		}
		n = parent
	}
}

// wait adds a waiting request.
func (t *tree) wait(it *item) {
	it.node = t.place(it.steps)
	for n := it.node; n != nil && n.waiting == 0; n = n.parent {
		n.arrived = it.arrived
	}
	it.node.ends.push(it)
	t.count(it.node, 1, it.tokens, 0)
}

// leave removes a request that waited and is no longer marked as waiting. serve means that it is
// being served from now on.
func (t *tree) leave(it *item, serve bool) {
	it.node.ends.dropped()
	busy := 0
	if serve {
		busy = 1
	}
	t.count(it.node, -1, -it.tokens, busy)
}

// walk returns the last node with waiting requests on a prompt's path, how many tokens the prompt
// shares with everything below it, and whether it shares all of the node's own steps.
func (t *tree) walk(steps []step) (n *node, tokens int, whole bool) {
	n, whole = &t.root, true
	for len(steps) > 0 {
		child, ok := t.nodes[steps[0].hash]
		if !ok || child.waiting == 0 {
			break
		}
		i := common(child.steps, steps)
		n, tokens = child, int(steps[i-1].tokens)
		if i < len(child.steps) {
			return n, tokens, false
		}
		steps = steps[i:]
	}
	return n, tokens, true
}

// first returns a request below a node that may be taken, the oldest subtree first. It examines at
// most *tries of those that may not, so that it stays fast where thousands wait.
func (n *node) first(may func(*item) bool, tries *int) *item {
	if it := n.ends.find(may, tries); it != nil {
		return it
	}
	for c := n.open.first; c != nil && *tries > 0; c = c.next {
		if it := c.first(may, tries); it != nil {
			return it
		}
	}
	return nil
}

// fifo is a list of waiting requests in order of arrival. Those that no longer wait are skipped,
// and removed now and then.
type fifo struct {
	items  []*item
	live   int
	late   bool // one was put in an earlier place since the list was last read
	sorted int  // how many are in order, if not all are; otherwise 0
}

// push adds a request: at the end, unless it keeps an earlier place. If many do in succession,
// since they come from another server, they are sorted when the list is read.
func (f *fifo) push(it *item) {
	f.live++
	n := len(f.items)
	if n == 0 || f.sorted > 0 || !it.arrived.Before(f.items[n-1].arrived) {
		f.items = append(f.items, it)
		return
	}
	if f.late {
		f.items, f.sorted = append(f.items, it), n
		return
	}
	f.late = true
	i := sort.Search(n, func(i int) bool { return it.arrived.Before(f.items[i].arrived) })
	f.items = slices.Insert(f.items, i, it)
}

// dropped records that one of the list no longer waits.
func (f *fifo) dropped() {
	f.live--
	if f.live == 0 {
		*f = fifo{}
		return
	}
	f.front()
	if len(f.items) > 2*f.live+16 {
		kept := make([]*item, 0, f.live+f.live/4)
		for _, it := range f.items {
			if it.waits {
				kept = append(kept, it)
			}
		}
		f.items = kept
	}
}

// order sorts the list.
func (f *fifo) order() {
	f.late = false
	if f.sorted == 0 {
		return
	}
	added := slices.Clone(f.items[f.sorted:])
	slices.SortStableFunc(added, func(a, b *item) int { return a.arrived.Compare(b.arrived) })
	i, j := f.sorted, len(added) // merged from the end
	for at := len(f.items); j > 0; at-- {
		if i > 0 && f.items[i-1].arrived.After(added[j-1].arrived) {
			i--
			f.items[at-1] = f.items[i]
		} else {
			j--
			f.items[at-1] = added[j]
		}
	}
	f.sorted = 0
}

// front returns the oldest request, or nil.
func (f *fifo) front() *item {
	f.order()
	for len(f.items) > 0 && !f.items[0].waits {
		f.items[0] = nil
		f.items = f.items[1:]
	}
	if len(f.items) == 0 {
		return nil
	}
	return f.items[0]
}

// back returns the latest request, or nil.
func (f *fifo) back() *item {
	f.order()
	for i := len(f.items) - 1; i >= 0; i-- {
		if f.items[i].waits {
			clear(f.items[i+1:]) // so that nobody examines them again
			f.items = f.items[:i+1]
			return f.items[i]
		}
	}
	return nil
}

// find returns the first that may be taken; see node.first.
func (f *fifo) find(may func(*item) bool, tries *int) *item {
	f.order()
	for _, it := range f.items {
		if *tries <= 0 {
			return nil
		}
		if !it.waits {
			continue
		}
		if may(it) {
			return it
		}
		*tries--
	}
	return nil
}
