package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// model drives a queue with arbitrary events and checks what must hold after each.
type model struct {
	t       *testing.T
	q       *Queue
	cfg     Config
	now     time.Time
	next    uint64
	waiting map[uint64]modelRequest
	running map[uint64]modelRequest
	slots   map[slotKey]uint64
	off     [3]bool // servers that are not available
	away    [3]bool
	until   [3]time.Time // … that is over
	free    [3]bool      // … whose lanes are, or were, unlimited
	foreign [3]bool      // … that other proxies schedule
	losing  int          // the one that was just given up; -1: none
	taker   *Taker       // that was just given requests; nil: none
	taken   int          // … and how many
	granted int
	added   int
	left    int
	events  int
	every   int // events between two checks of the queue's records, which take most of the time
	data    []byte
}

type modelRequest struct {
	Request
	came time.Time
	slot slotKey
}

// servers returns the servers that may serve a request.
func (r *modelRequest) servers() []uint16 {
	if len(r.Upstreams) == 0 {
		return []uint16{r.Runner.Upstream}
	}
	return r.Upstreams
}

type slotKey struct {
	runner *runner
	lane   int
}

func (m *model) byte() int {
	if len(m.data) == 0 {
		return 0
	}
	b := m.data[0]
	m.data = m.data[1:]
	return int(b)
}

func (m *model) drain() {
	m.t.Helper()
	granted := m.granted
	for _, g := range m.q.Grants() {
		r, ok := m.waiting[g.ID]
		if !ok {
			m.t.Fatalf("request %d was granted but does not wait", g.ID)
		}
		delete(m.waiting, g.ID)
		if !slices.Contains(r.servers(), g.Upstream) {
			m.t.Fatalf("request %d was granted to server %d, and may go to %v", g.ID, g.Upstream, r.servers())
		}
		if m.away[g.Upstream] {
			m.t.Fatalf("request %d was granted to server %d, which is away", g.ID, g.Upstream)
		}
		if m.tier(g.Upstream) > m.best(r.servers()) {
			m.t.Fatalf("request %d was granted to server %d of %v; %v are not available, %v are away, %v are others'", g.ID, g.Upstream, r.servers(), m.off, m.away, m.foreign)
		}
		key := slotKey{m.q.items[g.ID].runner, g.Lane}
		if other, taken := m.slots[key]; taken {
			m.t.Fatalf("request %d was granted the lane of %d", g.ID, other)
		}
		if g.Waited != m.now.Sub(r.came) {
			m.t.Fatalf("request %d waited for %v, not %v", g.ID, m.now.Sub(r.came), g.Waited)
		}
		m.slots[key] = g.ID
		r.slot = key
		m.running[g.ID] = r
		m.granted++
	}
	for _, no := range m.q.Refusals() {
		r, ok := m.waiting[no.ID]
		if !ok {
			m.t.Fatalf("request %d was refused but does not wait", no.ID)
		}
		delete(m.waiting, no.ID)
		m.left++
		if to, ok := no.Err.(Elsewhere); ok {
			m.elsewhere(&r, to)
			continue
		}
		switch no.Err {
		case ErrAway:
			for _, u := range r.servers() {
				if !m.off[u] && (!m.away[u] || m.now.Before(m.until[u])) {
					m.t.Fatalf("request %d was refused: server %d, of %v, is away (%v) until %v; it is %v", no.ID, u, r.servers(), m.away[u], m.until[u], m.now)
				}
			}
		case ErrFull:
			if waited := len(m.waiting) + m.granted - granted; waited < m.cfg.Limit {
				m.t.Fatalf("request %d made room where %d of %d waited", no.ID, waited, m.cfg.Limit)
			}
			if m.granted == granted { // otherwise others may have left since
				m.gaveUp(r)
			}
		default:
			m.t.Fatalf("request %d was refused: %v", no.ID, no.Err)
		}
	}
	if m.events++; m.events%m.every == 0 || len(m.data) == 0 {
		m.check()
	}
}

// tier is how well a server is suited for requests.
func (m *model) tier(u uint16) tier {
	switch {
	case m.off[u] || m.away[u]:
		return shut
	case m.foreign[u]:
		return foreign
	}
	return open
}

func (m *model) best(of []uint16) tier {
	best := shut
	for _, u := range of {
		best = min(best, m.tier(u))
	}
	return best
}

// elsewhere checks that a request was rightly left to another proxy.
func (m *model) elsewhere(r *modelRequest, to Elsewhere) {
	switch {
	case !r.Movable:
		m.t.Fatalf("request %d may not be moved to another proxy", r.ID)
	case to.Moves > max(maxMoves, r.Moves) || to.Moves < r.Moves:
		m.t.Fatalf("request %d was moved %d times, of these %d before it came", r.ID, to.Moves, r.Moves)
	case to.Server == "":
		if m.losing < 0 || !slices.Contains(r.servers(), uint16(m.losing)) || m.best(r.servers()) == open {
			m.t.Fatalf("request %d for %v was given up, though %v are others', and just now %d", r.ID, r.servers(), m.foreign, m.losing)
		}
	case m.taker == nil || to.Server != m.taker.Server || r.Runner.Options != m.taker.Options || to.Moves == r.Moves:
		m.t.Fatalf("request %d with options %v was given to %+v; %+v took", r.ID, r.Runner.Options, to, m.taker)
	default:
		m.taken--
	}
}

// peers makes the proxy win or lose a server, or another proxy's server take over its backlog.
func (m *model) peers() {
	b := m.byte()
	u := uint16(b % 3)
	was := m.foreign[u]
	switch b / 3 % 4 {
	case 0:
		if m.foreign[u] = b/12%3 == 0; m.foreign[u] {
			m.losing = int(u)
		}
		m.q.SetOwned(u, !m.foreign[u], m.now)
		for _, x := range m.q.server(u).runners {
			if m.losing == int(u) && was != m.foreign[u] && x.movable > 0 {
				m.t.Fatalf("%d that could move wait for server %d, which is another proxy's", x.movable, u)
			}
		}
	case 1, 2:
		t := Taker{Server: []string{"x", "y"}[b&1], Options: options([]string{"a", "b"}[b>>1&1], 2048*(b>>2&1)), Free: b >> 3 % 5, Held: b >> 5, Idle: time.Duration(b) * time.Millisecond}
		if b>>6&1 == 1 {
			t.Load = time.Duration(b) * 10 * time.Millisecond
		}
		m.taker = &t
		if m.taken = m.q.Give(t, m.now); m.taken > maxTaken {
			m.t.Fatalf("%d were taken over at once", m.taken)
		}
	case 3:
		o := options([]string{"a", "b"}[b>>4&1], 2048*(b>>5&1))
		if t, ok := m.q.Taker(u, o, m.now); ok && (m.tier(u) > open || t.Free < 0 || t.Free+t.Held <= 0 || t.Idle < 0 || t.Load < 0) {
			m.t.Fatalf("server %d would take over %+v", u, t)
		}
		l := m.q.Learned(u)
		m.q.SetLearned(uint16(b>>6)%3, l, m.now)
		running, waiting := 0, 0
		for _, load := range m.q.Loads() {
			running, waiting = running+load.Running, waiting+load.Waiting
			if load.Wait < 0 {
				m.t.Fatalf("server %d is free in %v", load.Upstream, load.Wait)
			}
		}
		if waiting != m.q.Len() || running+waiting != len(m.q.items) {
			m.t.Fatalf("%d wait and %d run by the loads, %d of %d wait", waiting, running, m.q.Len(), len(m.q.items))
		}
	}
	m.drain()
	if m.taken != 0 {
		m.t.Fatalf("%d more were given than left", m.taken)
	}
	m.losing, m.taker = -1, nil
}

// pick returns any request, always the same one for the same events.
func pick(from map[uint64]modelRequest, n int) (uint64, bool) {
	if len(from) == 0 {
		return 0, false
	}
	ids := make([]uint64, 0, len(from))
	for id := range from {
		ids = append(ids, id)
	}
	// The n-th smallest would do; the smallest above a bound is just as good.
	best, ok := uint64(0), false
	least := ids[0]
	for _, id := range ids {
		least = min(least, id)
	}
	point := least + uint64(n)%64
	for _, id := range ids {
		if id >= point && (!ok || id < best) {
			best, ok = id, true
		}
	}
	if !ok {
		best = least
	}
	return best, true
}

func (m *model) event() {
	op := m.byte()
	if op >= 0xF0 {
		m.peers()
		return
	}
	switch op % 16 {
	case 0, 1, 2, 3, 4, 5, 6:
		m.add()
	case 7:
		if id, ok := pick(m.waiting, m.byte()); ok {
			m.q.Leave(id, m.now)
			delete(m.waiting, id)
			m.left++
		}
	case 8, 9, 10, 11:
		m.done()
	case 12:
		m.now = m.now.Add(time.Duration(m.byte()) * 4 * time.Millisecond)
		m.q.Tick(m.now)
	case 13:
		if at, ok := m.q.Next(); ok {
			m.now = latest(m.now, at)
			m.q.Tick(m.now)
		}
	case 14:
		switch b := m.byte(); b % 7 {
		case 0:
			n := b/21%6 - 1
			m.free[b/7%3] = m.free[b/7%3] || n == Unlimited
			m.q.SetLanes(uint16(b/7%3), n, m.now)
		case 5:
			u := b / 7 % 3
			m.off[u] = !m.off[u]
			m.q.SetAvailable(uint16(u), !m.off[u], m.now)
		case 6:
			u := b / 7 % 3
			m.away[u], m.until[u] = !m.away[u] && b/21%3 == 0, m.now.Add(time.Duration(b/21)*20*time.Millisecond)
			m.q.SetAway(uint16(u), m.away[u], m.until[u], m.now)
		case 1:
			m.q.Cool(uint16(b/7%3), "", m.now)
		case 2:
			m.q.Cool(uint16(b/7%3), "a", m.now)
		case 3:
			m.q.SetExclusive(uint16(b/7%3), "a", "b", b/21%2 == 0, m.now)
		case 4:
			if m.q.SetLongestMatch(uint16(b/7%3), b/21%2 == 0); b/42 > 0 {
				m.q.SetExpected(uint16(b/7%3), b/42, m.now)
			}
		}
	case 15:
		m.now = m.now.Add(time.Millisecond)
		if id, ok := pick(m.running, m.byte()); ok {
			m.q.Began(id, m.now)
		}
	}
	m.drain()
}

// SetExclusive sets whether two models exclude each other in memory, which is otherwise learned.
func (q *Queue) SetExclusive(upstream uint16, a, b string, on bool, now time.Time) {
	r := together
	if on {
		r = apart
	}
	s := q.server(upstream)
	s.relate(a, b, r)
	q.pump(s, now)
}

func (m *model) add() {
	m.next++
	b, c := m.byte(), m.byte()
	r := Request{
		ID:       m.next,
		Runner:   Runner{Upstream: uint16(b & 1), Options: options([]string{"a", "b"}[b>>1&1], 2048*(b>>2&1))},
		Client:   fmt.Sprint(b >> 3 & 3),
		Priority: Priority(b>>5&3) - 1, // one in four is not a known priority
		Streams:  c&2 == 0,
	}
	if c&1 == 1 {
		r.Program, r.Flow = uint64(c>>1&3), uint64(c>>3&3)
	}
	where := m.byte()
	r.Upstreams = [][]uint16{nil, {1}, {0, 1}, {1, 2}, {0, 1, 2}, {2, 0, 1}, {0, 2}, {0, 1, 2}}[where%8]
	r.Movable, r.Moves = where>>3&3 == 3, where>>5&7
	if m.next%8 == 7 { // it was sent before, and not answered
		r.Arrived = m.now.Add(-time.Duration(c) * time.Millisecond)
	}
	// One of a few families, with a few prefixes in each, and a tail that may be shared as well.
	j := job{model: r.Runner.Options.Model, numCtx: r.Runner.Options.NumCtx()}
	for i, width := range []int{1, 3, 7, 3} {
		j.segs = append(j.segs, seg{id: uint64(i*100 + c%(width+1)), tokens: 40 + 200*(i&1)})
		if c /= width + 1; c == 0 && b>>6&1 == 1 {
			break
		}
	}
	r.Links = j.links()
	came := m.now
	if !r.Arrived.IsZero() {
		came = r.Arrived
	}
	mayNot := false
	if m.next%16 == 5 {
		r.MayWait = func() bool { mayNot = b&1 == 1; return !mayNot }
	}
	if m.q.Add(r, m.now) {
		m.waiting[r.ID] = modelRequest{Request: r, came: came}
		m.added++
	} else if mayNot {
		for _, no := range m.q.refused {
			if no.Err == ErrFull {
				m.t.Fatalf("request %d gave up its place for one that may not wait", no.ID)
			}
		}
	} else if len(m.waiting) < m.cfg.Limit {
		m.t.Fatalf("refused with %d waiting", len(m.waiting))
	} else if len(m.q.grants) == 0 { // otherwise others may have left since
		m.gaveUp(modelRequest{Request: r, came: came})
	}
}

// gaveUp checks that the queue, when full, refused the right request: no other client's share of
// the places was larger, and nothing of the same flow came later.
func (m *model) gaveUp(r modelRequest) {
	who := flowKey{r.Client, r.Program, r.Flow}
	counts := map[crowdKey]int{}
	for level := range int8(crowdLevels) {
		counts[who.at(level)]++
	}
	for id, other := range m.waiting {
		if r.Priority.rank() < other.Priority.rank() {
			m.t.Fatalf("request %d was refused in place of %d, which is less urgent", r.ID, id)
		}
		if r.Priority.rank() > other.Priority.rank() {
			continue
		}
		key := flowKey{other.Client, other.Program, other.Flow}
		if key == who && r.came.Before(other.came) {
			m.t.Fatalf("request %d was refused in place of %d, which came later", r.ID, id)
		}
		for level := range int8(crowdLevels) {
			counts[key.at(level)]++
		}
	}
	for key, n := range counts {
		beside := key.level == 0 || who.at(key.level-1) == key.at(key.level-1)
		if most := counts[who.at(key.level)]; beside && n > most {
			m.t.Fatalf("request %d was refused: of %v %d wait, of %v %d", r.ID, who.at(key.level), most, key, n)
		}
	}
}

func (m *model) done() {
	b := m.byte()
	id, ok := pick(m.running, b)
	if !ok {
		return
	}
	r := m.running[id]
	delete(m.running, id)
	delete(m.slots, r.slot)
	total := r.Links[len(r.Links)-1].Bytes/4 + 1
	m.q.Done(id, Result{
		Sent: b&15 != 0, Answered: b&15 > 1, Total: total, Reused: total * (b >> 4 & 3) / 4, ReusedKnown: b&1 == 0, Generated: b & 31,
		Timed: b&2 == 0, Prompt: time.Duration(b) * time.Millisecond, Eval: time.Duration(b) * time.Millisecond, Queue: time.Duration(b>>6) * 40 * time.Millisecond,
		Load: time.Second, Loaded: b%11 == 0, LoadKnown: b%3 == 0,
	}, m.now)
}

// checkPlaces compares the recorded shares of the places with the waiting requests.
func (m *model) checkPlaces() {
	if m.q.places == nil {
		return
	}
	waiting, noted := [ranks]map[crowdKey]int{}, 0
	for _, r := range m.waiting {
		p := r.Priority.rank()
		if waiting[p] == nil {
			waiting[p] = map[crowdKey]int{}
		}
		for level := range int8(crowdLevels) {
			waiting[p][flowKey{r.Client, r.Program, r.Flow}.at(level)]++
		}
	}
	for p, at := range m.q.places {
		noted += at.all.waiting
		if len(at.parts) != len(waiting[p]) {
			m.t.Fatalf("%d crowds wait, %d are noted", len(waiting[p]), len(at.parts))
		}
		for key, c := range at.parts {
			if c.key != key || c.waiting != waiting[p][key] || c.within.parts[c.index] != c ||
				c.within.parts[0].waiting < c.waiting {
				m.t.Fatalf("of %v %d wait, noted is %+v", key, waiting[p][key], c)
			}
		}
	}
	if noted != len(m.waiting) {
		m.t.Fatalf("%d wait, %d are noted", len(m.waiting), noted)
	}
}

// check compares the queue with its own records. (It does not call Helper, which takes half of the
// time.)
func (m *model) check() {
	q := m.q
	if q.Len() != len(m.waiting) || q.Len() > m.cfg.Limit || len(q.items) != len(m.waiting)+len(m.running) {
		m.t.Fatalf("%d wait and %d are known, want %d and %d more", q.Len(), len(q.items), len(m.waiting), len(m.running))
	}
	m.checkPlaces()
	roams := 0
	for _, s := range q.servers {
		waiting, busy, loaded, roaming := 0, 0, 0, 0
		for _, x := range s.runners {
			m.checkRunner(x)
			waiting += x.waiting
			roaming += x.roaming
			busy += x.busy
			for _, y := range s.runners {
				if x != y && x.resident && y.resident && x.busy > 0 && y.busy > 0 && x.key.Options.Model == y.key.Options.Model {
					loaded++
				}
			}
		}
		if loaded > 0 && !m.free[s.index] && m.cfg.Lanes != Unlimited {
			m.t.Fatalf("one model is in use with two sets of options")
		}
		if waiting != s.waiting || roaming != s.roaming {
			m.t.Fatalf("%d wait, the server counts %d; %d of these may go elsewhere, it counts %d", waiting, s.waiting, roaming, s.roaming)
		}
		if roams += roaming; s.lanes == Unlimited && waiting > 0 && !s.away {
			m.t.Fatalf("%d wait although nothing should", waiting)
		}
		if busy == 0 && waiting == 0 && s.wake.IsZero() && s.tier() == open && m.wanted(s) {
			m.t.Fatalf("server %d has nothing to do, others have, and it does not look again", s.index)
		}
		if waiting > 0 && busy == 0 && s.wake.IsZero() {
			m.t.Fatalf("%d wait for nothing", waiting)
		}
	}
	if roams != q.roaming {
		m.t.Fatalf("%d that wait may go elsewhere, counted %d", roams, q.roaming)
	}
}

// wanted reports whether a server could serve requests that wait on another one, which is not going
// to look again either.
func (m *model) wanted(s *server) bool {
	for _, it := range m.q.items {
		y := it.runner
		if it.waits && y.server.wake.IsZero() && it.moves < maxMoves && y.server != s && it.may(s) && it.key.Options == y.key.Options {
			if x := s.byKey[Runner{s.index, it.key.Options}]; x == nil || x.key.Options == it.key.Options {
				return true
			}
		}
	}
	return false
}

func (m *model) checkRunner(x *runner) {
	busy := 0
	for _, l := range x.lanes {
		if l.item != nil {
			busy++
		}
	}
	if busy != x.busy || len(x.lanes) < x.want || len(x.lanes) > max(x.want, busy) {
		m.t.Fatalf("%d of %d lanes are busy, counted %d, want %d lanes", busy, len(x.lanes), x.busy, x.want)
	}
	if x.waiting > 0 && x.busy < x.want && x.resident && x.server.wake.IsZero() {
		others := 0
		for _, y := range x.server.runners {
			others += y.busy
		}
		if others == 0 {
			m.t.Fatalf("a lane is idle, %d wait, and nobody looks again", x.waiting)
		}
	}
	waiting, roaming, movable, running, tries, prompts := 0, 0, 0, 0, 0, 0
	for _, l := range x.lanes {
		if l.item != nil {
			running += l.item.work
			if l.item.tries && !l.item.told {
				tries++
			}
		}
	}
	if tries != x.tries {
		m.t.Fatalf("%d are tried, counted %d", tries, x.tries)
	}
	for _, it := range x.waiters() {
		prompts += it.tokens
		if it.movable {
			movable++
		}
		if !it.roams() {
			continue
		}
		roaming++
		if it.moves > max(maxMoves, m.waiting[it.id].Moves) {
			m.t.Fatalf("request %d was taken over %d times", it.id, it.moves)
		}
		if x.server.tier() > m.best(it.upstreams) {
			m.t.Fatalf("request %d waits for a server that is not available", it.id)
		}
	}
	if roaming != x.roaming || movable != x.movable || running != x.running {
		m.t.Fatalf("%d may go to another server, counted %d; %d to another proxy, counted %d; %d tokens run, counted %d", roaming, x.roaming, movable, x.movable, running, x.running)
	}
	if prompts != x.prompts {
		m.t.Fatalf("%d tokens of prompts wait, counted %d", prompts, x.prompts)
	}
	for p := range x.classes {
		c := &x.classes[p]
		work := 0
		for _, it := range c.fifo.items {
			if it.waits {
				work += it.work
			}
		}
		if work != x.work[p] {
			m.t.Fatalf("%d tokens' work waits, counted %d", work, x.work[p])
		}
		if c.tree == nil {
			continue
		}
		waiting += c.fifo.live
		positive, backlog := 0, 0
		for i, a := range c.backlogged {
			if a.index != i || a.waiting == 0 || a.fifo.live != a.waiting {
				m.t.Fatalf("account %q: index %d at %d, %d wait, %d listed", a.name, a.index, i, a.waiting, a.fifo.live)
			}
			backlog += a.waiting
			if a.deficit > 0 {
				positive++
			}
		}
		if positive != c.positive || backlog != c.fifo.live {
			m.t.Fatalf("%d accounts are positive, counted %d; %d wait, counted %d", positive, c.positive, backlog, c.fifo.live)
		}
		nodes := 0
		children := map[*node][]*node{}
		for hash, n := range c.tree.nodes {
			if len(n.steps) == 0 || n.steps[0].hash != hash {
				m.t.Fatalf("a node is filed under a wrong fingerprint")
			}
			children[n.parent] = append(children[n.parent], n)
		}
		n, _, busy := checkNode(m.t, children, &c.tree.root, &nodes)
		if n != c.fifo.live || nodes != len(c.tree.nodes) || busy != x.busy {
			m.t.Fatalf("the tree has %d that wait, want %d; %d nodes of %d; %d busy of %d", n, c.fifo.live, nodes, len(c.tree.nodes), busy, x.busy)
		}
	}
	if waiting != x.waiting {
		m.t.Fatalf("%d wait, counted %d", waiting, x.waiting)
	}
}

// checkNode checks a node and everything below it.
func checkNode(t *testing.T, children map[*node][]*node, n *node, nodes *int) (waiting, tokens, busy int) {
	waiting = n.ends.live
	for _, it := range n.ends.items {
		if it != nil && it.waits {
			tokens += it.tokens
		}
	}
	in := make(map[*node]*siblings, len(children[n]))
	for _, list := range []*siblings{&n.open, &n.taken} {
		var prev *node
		for c := list.first; c != nil; prev, c = c, c.next {
			if c.prev != prev || c.in != list || c.parent != n {
				t.Fatalf("a list of siblings is broken")
			}
			in[c] = list
		}
		if list.last != prev {
			t.Fatalf("a list of siblings has a wrong end")
		}
	}
	below := 0
	for _, c := range children[n] {
		*nodes++
		w, k, b := checkNode(t, children, c, nodes)
		want := (*siblings)(nil)
		switch {
		case w > 0 && b > 0:
			want = &n.taken
		case w > 0:
			want = &n.open
		}
		if in[c] != want || w+b == 0 {
			t.Fatalf("a node with %d that wait and %d busy is in the wrong list", w, b)
		}
		waiting, tokens, below = waiting+w, tokens+k, below+b
	}
	if waiting != n.waiting || tokens != n.tokens || below > n.busy {
		t.Fatalf("a node counts %d waiting, %d tokens, %d busy; there are %d, %d, %d below", n.waiting, n.tokens, n.busy, waiting, tokens, below)
	}
	return n.waiting, n.tokens, n.busy
}

// finish ends the running requests and lets all waiting ones run: nothing may be left.
func (m *model) finish() {
	m.t.Helper()
	m.data = nil
	for i := 0; len(m.waiting)+len(m.running) > 0; i++ {
		if i > 100_000 {
			m.t.Fatalf("%d still wait", len(m.waiting))
		}
		if len(m.running) > 0 {
			id, _ := pick(m.running, 0)
			r := m.running[id]
			delete(m.running, id)
			delete(m.slots, r.slot)
			m.now = m.now.Add(50 * time.Millisecond)
			m.q.Done(id, Result{Sent: true, Answered: true, Total: 100, Generated: 10, LoadKnown: true}, m.now)
		} else {
			at, ok := m.q.Next()
			if !ok {
				m.t.Fatalf("%d wait, and nobody looks again", len(m.waiting))
			}
			m.now = latest(m.now, at)
			m.q.Tick(m.now)
		}
		m.drain()
	}
	if m.granted+m.left != m.added {
		m.t.Fatalf("%d were added, %d granted, %d left", m.added, m.granted, m.left)
	}
}

func runModel(t *testing.T, data []byte, every int) Counts {
	m := &model{t: t, every: every, losing: -1, now: start, waiting: map[uint64]modelRequest{}, running: map[uint64]modelRequest{}, slots: map[slotKey]uint64{}, data: data}
	b := m.byte()
	m.cfg = Config{Lanes: b % 4, Limit: 40}
	if b&0x38 == 0x38 {
		m.cfg.Lanes = Unlimited
	}
	if b&4 != 0 {
		m.cfg.MaxWait = 300 * time.Millisecond
	}
	m.q = New(m.cfg)
	for len(m.data) > 0 {
		m.event()
	}
	m.finish()
	for _, s := range m.q.servers {
		for _, x := range s.runners {
			for p := range x.classes {
				if c := &x.classes[p]; c.tree != nil && len(c.tree.nodes) > 0 {
					t.Fatalf("%d nodes are left", len(c.tree.nodes))
				}
			}
		}
	}
	return m.q.count
}

func TestModel(t *testing.T) {
	var all Counts
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 2))
		data := make([]byte, 1500)
		for i := range data {
			data[i] = byte(rng.IntN(256))
		}
		c := runModel(t, data, 1)
		all.Spread += c.Spread
		all.Stolen += c.Stolen
		all.Moved += c.Moved
		all.Given += c.Given
		all.Disowned += c.Disowned
	}
	if all.Spread == 0 || all.Stolen < 200 || all.Moved < 500 || all.Given == 0 || all.Disowned == 0 {
		t.Errorf("too little happened between servers, or proxies: %+v", all)
	}
}

func FuzzQueue(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4000 {
			return
		}
		runModel(t, data, 8)
	})
}
