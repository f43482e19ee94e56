package schedule

import (
	"cmp"
	"container/heap"
	"slices"
	"time"
)

// A full queue's places are shared: whoever has the most of them gives one up for whoever has
// fewer. Among all clients that is the one with the most waiting requests, likewise among its
// programs, and among that program's flows; the newest request of that flow is refused. So nobody
// gains a place by using more names, and a script's backlog shuts nobody out. (fq_codel and CAKE
// drop from the longest queue likewise.) Less urgent requests give up their places first.

// crowd is a group of waiting requests of one priority: all of them, one client's, one of its
// programs', or one of that program's flows.
type crowd struct {
	key     crowdKey
	within  *crowd // nil: this is the group of all
	index   int    // in within.parts
	waiting int
	latest  time.Time // when its newest request came, even if that no longer waits
	parts   crowds    // of a flow: none
	fifo    fifo      // of a flow
}

// crowdKey identifies a crowd. Below its level, everything is zero.
type crowdKey struct {
	level int8 // 0: a client, 1: a program, 2: a flow
	flowKey
}

const crowdLevels = 3

// at returns the key of the client, program or flow that a flow belongs to.
func (k flowKey) at(level int8) crowdKey {
	if level < 2 {
		k.flow = 0
	}
	if level < 1 {
		k.program = 0
	}
	return crowdKey{level, k}
}

// crowds is a heap: on top is the largest crowd, and of several the one that got a request last.
type crowds []*crowd

func (c crowds) Len() int { return len(c) }

func (c crowds) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(c[j].waiting, c[i].waiting), c[j].latest.Compare(c[i].latest)) < 0
}

func (c crowds) Swap(i, j int) {
	c[i], c[j] = c[j], c[i]
	c[i].index, c[j].index = i, j
}

func (c *crowds) Push(x any) {
	part := x.(*crowd)
	part.index = len(*c)
	*c = append(*c, part)
}

func (c *crowds) Pop() any {
	all := *c
	last := all[len(all)-1]
	all[len(all)-1] = nil
	*c = all[:len(all)-1]
	return last
}

// places records who has a queue's places, for each priority, from when the queue is full until it
// is half empty.
type places [ranks]struct {
	all   crowd
	parts map[crowdKey]*crowd
}

// add adds a waiting request.
func (p *places) add(it *item) {
	at := &p[it.rank.asked()]
	if at.parts == nil {
		at.parts = map[crowdKey]*crowd{}
	}
	c := &at.all
	for level := range int8(crowdLevels) {
		key := it.who.at(level)
		part := at.parts[key]
		if part == nil {
			part = &crowd{key: key, within: c}
			at.parts[key] = part
			heap.Push(&c.parts, part)
		}
		c = part
	}
	c.fifo.push(it)
	for ; c != nil; c = c.within {
		c.waiting++
		c.latest = latest(c.latest, it.arrived)
		c.moved()
	}
}

// remove removes a request that no longer waits.
func (p *places) remove(it *item) {
	at := &p[it.rank.asked()]
	c := at.parts[it.who.at(crowdLevels-1)]
	c.fifo.dropped()
	for ; c != nil; c = c.within {
		if c.waiting--; c.waiting > 0 || c.within == nil {
			c.moved()
			continue
		}
		heap.Remove(&c.within.parts, c.index)
		delete(at.parts, c.key)
	}
}

// moved restores a crowd's place in its heap after a change.
func (c *crowd) moved() {
	if c.within != nil {
		heap.Fix(&c.within.parts, c.index)
	}
}

// newest returns the newest request of the largest flow of the largest program of the largest
// client.
func (c *crowd) newest() *item {
	for len(c.parts) > 0 {
		c = c.parts[0]
	}
	return c.fifo.back()
}

// last returns which of the waiting requests, if they are too many, is refused, or nil if none
// waits.
func (p *places) last() *item {
	for r := ranks; r > 0; {
		if r--; p[r].all.waiting > 0 {
			return p[r].all.newest()
		}
	}
	return nil
}

// yields returns the request that gives up its place for one that finds none, which may be that one
// itself. An earlier request whose server did not answer counts as older than all others.
func (p *places) yields(it *item) *item {
	last := p.last()
	at := &p[it.rank.asked()]
	switch {
	case last == nil || last.rank.asked() < it.rank.asked():
		return it
	case last.rank.asked() > it.rank.asked():
		return last
	}
	return at.all.yields(it, at.parts)
}

func (c *crowd) yields(it *item, parts map[crowdKey]*crowd) *item {
	for level := range int8(crowdLevels) {
		own, largest := parts[it.who.at(level)], c.parts[0]
		if own == largest {
			c = own
			continue
		}
		n := 1
		if own != nil {
			n += own.waiting
		}
		if n < largest.waiting || n == largest.waiting && it.arrived.Before(largest.latest) {
			return largest.newest()
		}
		if own == nil {
			return it
		}
		c = own
	}
	if last := c.fifo.back(); it.arrived.Before(last.arrived) {
		return last
	}
	return it
}

// crowded returns who has the places of a full queue.
func (q *Queue) crowded() *places {
	if q.places != nil {
		return q.places
	}
	var all []*item
	for _, it := range q.items {
		if it.waits {
			all = append(all, it)
		}
	}
	slices.SortFunc(all, func(a, b *item) int {
		return cmp.Or(a.arrived.Compare(b.arrived), cmp.Compare(a.id, b.id))
	})
	q.places = &places{}
	for _, it := range all {
		q.places.add(it)
	}
	return q.places
}

// full implements Scheduler.Full. A request may have a place if it finds a free lane, or if another
// one would give its place up. Of a known client the request may be of a new program.
func (q *Queue) full(p Priority, client string, now time.Time) bool {
	if q.Len() < q.cfg.Limit {
		return false
	}
	for _, s := range q.servers {
		for _, x := range s.runners {
			if !s.away && (s.lanes == Unlimited || x.busy < x.want) {
				return false
			}
		}
	}
	const unknown = 1<<64 - 1
	it := &item{rank: p.rank(), arrived: now, who: flowKey{client, unknown, unknown}}
	return q.crowded().yields(it) == it
}
