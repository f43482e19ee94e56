package schedule

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// policy is how proxies choose servers for what enters at them, and ask each other for work.
type policy struct {
	hop    time.Duration // from one proxy to another
	report time.Duration // between two reports of a proxy …
	delay  time.Duration // … and until one has arrived
	ask    time.Duration // between two looks whether a server is idle
	eager  bool          // … and as soon as it may be
	bound  float64       // by how much the load of a new prefix's server may exceed the mean, as a part of it
	own    float64       // … and in evaluations of the prompt
	cost   bool          // what is warm is weighed against the load, as Queue.route does
	blind  bool          // what an entry has sent since the last report does not count
	loaded bool          // new prefixes go to servers that have the model loaded, if there are any
	recent bool
	give   bool // servers take over work
	sticky bool // a client always enters at the same proxy
	trace  bool
	gt     time.Duration
	part   float64 // of a prompt that must have been seen for that to count
}

// usual is as the design says.
var usual = policy{
	hop: 500 * time.Microsecond, report: 20 * time.Millisecond, delay: 100 * time.Millisecond,
	ask: 100 * time.Millisecond, bound: overload, own: 1e6, give: true, eager: true, recent: true, loaded: true,
}

// peers are several proxies before the same servers, each with a queue for those that it owns.
type peers struct {
	policy
	s       *sim
	proxies []*proxy
	owner   []*proxy // by server
	rng     *rand.Rand
	ticking bool

	passed, given, asked, vain int
}

type proxy struct {
	id     int
	q      *Queue
	seen   []map[uint64]sight // by server, by a link's fingerprint
	loads  []seenLoad         // by server
	asking []bool             // by server
	silent []time.Time        // by peer: until when it is not asked, since it had nothing to give
}

// seenLoad is what a proxy knows of a server's load.
type seenLoad struct {
	Load
	at   time.Time  // of the report
	sent []sentLoad // what it has sent there itself since about then
}

// sight is what a proxy knows of a fingerprint.
type sight struct {
	tokens int       // of a prompt up to it
	at     time.Time // when one was last sent
}

type sentLoad struct {
	at   time.Time
	cost time.Duration
}

// newPeers puts proxies before a simulation's servers, which are owned in turn.
func newPeers(s *sim, n int, cfg Config, p policy) *peers {
	ps := &peers{policy: p, s: s, rng: rand.New(rand.NewPCG(s.cfg.seed, 77))}
	s.peers = ps
	for i := range n {
		x := &proxy{id: i, q: New(cfg), asking: make([]bool, len(s.boxes)), silent: make([]time.Time, n)}
		for b := range s.boxes {
			x.seen = append(x.seen, map[uint64]sight{})
			x.loads = append(x.loads, seenLoad{})
			x.q.SetName(uint16(b), strconv.Itoa(b))
			x.q.SetOwned(uint16(b), b%n == i, s.now)
			if s.cfg.host == 0 && !s.cfg.untried {
				x.q.server(uint16(b)).host = mean{v: 0, n: 1}
			}
		}
		ps.proxies = append(ps.proxies, x)
	}
	for b := range s.boxes {
		ps.owner = append(ps.owner, ps.proxies[b%n])
	}
	return ps
}

// enter is the arrival of a request at any of the proxies.
func (ps *peers) enter(j *job) {
	if !ps.ticking {
		ps.ticking = true
		ps.tick(0)
	}
	j.entry = ps.proxies[ps.rng.IntN(len(ps.proxies))]
	if ps.sticky {
		h := uint64(0)
		for _, c := range j.client {
			h = mix(h, uint64(c))
		}
		j.entry = ps.proxies[h%uint64(len(ps.proxies))]
	}
	b := ps.chooses(j.entry, j)
	ps.pass(j, b)
}

// pass sends a request to a server's owner.
func (ps *peers) pass(j *job, b int) {
	to, hop := ps.owner[b], ps.hop
	if to == j.entry {
		hop = 0
	} else {
		ps.passed++
	}
	arrive := func() {
		r := ps.s.request(j)
		r.Movable, r.Moves = true, j.moves
		for i, o := range ps.owner {
			if o == to {
				r.Upstreams = append(r.Upstreams, uint16(i))
			}
		}
		j.q = to.q
		if !to.q.Add(r, ps.s.now) {
			ps.s.t.Fatal("a queue is full")
		}
		ps.s.pump(to.q)
	}
	if hop == 0 {
		arrive()
		return
	}
	ps.s.after(hop, arrive)
}

// warm returns how many tokens of a prompt a proxy has seen go to a server.
func (x *proxy) warm(b int, links []prefix.Link) sight {
	for i := len(links) - 1; i >= 0; i-- {
		if n, ok := x.seen[b][links[i].Hash]; ok {
			return n
		}
	}
	return sight{}
}

func (x *proxy) sees(b int, links []prefix.Link, at time.Time) {
	for _, l := range links {
		x.seen[b][l.Hash] = sight{l.Bytes / 4, latest(at, x.seen[b][l.Hash].at)}
	}
}

// loadOf returns what a proxy believes to be the load of a server for new prefixes, and whether
// it has the model loaded.
func (ps *peers) loadOf(x *proxy, b int, o prefix.Options) (_ time.Duration, resident bool) {
	l := x.loads[b]
	if ps.owner[b] == x {
		for _, own := range x.q.Loads(ps.s.now) {
			if int(own.Upstream) == b {
				l.Load = own
			}
		}
	}
	wait, load := l.Wait, time.Duration(0)
	resident = ps.s.cfg.load == 0 // then all are listed as loaded
	for _, r := range l.Runners {
		if r.Options == o {
			load = r.Load
			resident = resident || r.Resident
		}
	}
	if !ps.blind && ps.owner[b] != x {
		for _, c := range l.sent {
			wait += c.cost
		}
	}
	return wait + load, resident
}

// chooses returns the server for a request that has entered at a proxy.
func (ps *peers) chooses(x *proxy, j *job) int {
	links, tokens, o := j.links(), total(j.segs), ps.s.runner(j).Options
	per := ps.s.cfg.perToken // as all have learned soon
	type choice struct {
		warm     int
		load     time.Duration
		resident bool
		at       time.Time
		score    float64
	}
	all := make([]choice, len(ps.s.boxes))
	most, sum, resident := 0, time.Duration(0), false
	opening := openingOf(links)
	for b := range all {
		seen := x.warm(b, links)
		all[b] = choice{warm: seen.tokens, at: seen.at, score: x.q.server(uint16(b)).score(opening)}
		all[b].load, all[b].resident = ps.loadOf(x, b, o)
		resident = resident || all[b].resident
		most = max(most, all[b].warm)
		sum += all[b].load
	}
	best := -1
	switch {
	case most <= slack || float64(most) < ps.part*float64(tokens):
		bound := time.Duration((1+ps.bound)*float64(sum)/float64(len(all)) + ps.own*float64(tokens)*float64(per))
		for b, c := range all {
			if c.load <= bound && (!ps.loaded || c.resident == resident) && (best < 0 || c.score > all[best].score) {
				best = b
			}
		}
	case ps.recent:
		for b, c := range all {
			if c.warm+slack >= most && (best < 0 || c.at.After(all[best].at) || c.at.Equal(all[best].at) && c.score > all[best].score) {
				best = b
			}
		}
	case ps.cost:
		least := time.Duration(math.MaxInt64)
		for b, c := range all {
			if cost := c.load + time.Duration(tokens-c.warm+most-c.warm)*per; cost < least || cost == least && c.score > all[best].score {
				best, least = b, cost
			}
		}
	default:
		for b, c := range all {
			if c.warm+slack >= most && (best < 0 || c.load < all[best].load || c.load == all[best].load && c.score > all[best].score) {
				best = b
			}
		}
	}
	lanes := 1
	for _, r := range x.loads[best].Runners {
		lanes = max(lanes, r.Lanes)
	}
	work := time.Duration(tokens-all[best].warm+16*10) * per / time.Duration(lanes)
	x.loads[best].sent = append(x.loads[best].sent, sentLoad{ps.s.now, work})
	x.sees(best, links, ps.s.now)
	return best
}

// sent is called when a queue has sent a request to a server.
func (ps *peers) sent(j *job, q *Queue) {
	links, b, at := j.links(), int(j.at), ps.s.now
	for _, x := range ps.proxies {
		if x.q == q {
			x.sees(b, links, at)
		} else {
			ps.s.after(ps.delay, func() { x.sees(b, links, at) })
		}
	}
}

// refused sends on what a queue has given away.
func (ps *peers) refused(q *Queue) {
	if ps.give && ps.eager {
		for _, x := range ps.proxies {
			if x.q == q {
				ps.asks(x)
			}
		}
	}
	for _, no := range slices.Clone(q.Refusals()) {
		var to Elsewhere
		if !errors.As(no.Err, &to) {
			ps.s.t.Fatal(no.Err)
		}
		j := ps.s.jobs[no.ID]
		j.moves = to.Moves
		if b, err := strconv.Atoi(to.Server); err == nil {
			j.entry.sees(b, j.links(), ps.s.now)
		}
		b, err := strconv.Atoi(to.Server)
		if err != nil {
			b = ps.chooses(j.entry, j)
		}
		ps.s.after(ps.hop, func() { ps.pass(j, b) })
	}
}

// tick sends reports and asks for work now and then.
func (ps *peers) tick(n int) {
	const step = 5 * time.Millisecond
	if len(ps.s.jobs) == 0 { // until something enters
		ps.ticking = false
		return
	}
	every := func(d time.Duration) bool { return d > 0 && n%int(d/step) == 0 }
	for _, x := range ps.proxies {
		if every(ps.report) {
			ps.reports(x)
		}
		if ps.give && every(ps.ask) {
			ps.asks(x)
		}
	}
	ps.s.after(step, func() { ps.tick(n + 1) })
}

func (ps *peers) reports(x *proxy) {
	loads, at := x.q.Loads(ps.s.now), ps.s.now
	ps.s.after(ps.delay, func() {
		for _, l := range loads {
			if ps.owner[l.Upstream] != x {
				continue
			}
			for _, y := range ps.proxies {
				known := &y.loads[l.Upstream]
				known.Load, known.at = l, at
				if ps.eager && ps.give && y != x {
					defer ps.asks(y)
				}
				known.sent = slices.DeleteFunc(known.sent, func(c sentLoad) bool { return c.at.Add(ps.hop).Before(at) })
			}
		}
	})
}

// asks makes a proxy ask others for work for its idle servers.
func (ps *peers) asks(x *proxy) {
	for b := range ps.s.boxes {
		if ps.owner[b] != x || x.asking[b] {
			continue
		}
		type offer struct {
			from    *proxy
			options prefix.Options
			backlog float64
		}
		var offers []offer
		for other, l := range x.loads {
			if from := ps.owner[other]; from != x && !ps.s.now.Before(x.silent[from.id]) {
				for _, r := range l.Runners {
					if r.Movable > 0 {
						offers = append(offers, offer{from, r.Options, float64(r.Movable) / float64(max(r.Lanes, 1))})
					}
				}
			}
		}
		slices.SortStableFunc(offers, func(a, b offer) int { return cmp.Compare(b.backlog, a.backlog) })
		for _, o := range offers {
			t, ok := x.q.Taker(uint16(b), o.options, ps.s.now)
			if !ok {
				continue
			}
			t.Server = strconv.Itoa(b)
			x.asking[b] = true
			ps.asked++
			ps.s.after(ps.hop, func() {
				n := o.from.q.Give(t, ps.s.now)
				ps.given += n
				if ps.trace {
					fmt.Printf("%8.3f box %d (%d+%d free, idle %v, load %v) asks %d: %d given, %d wait there\n", ps.s.now.Sub(start).Seconds(), b, t.Free, t.Held, t.Idle, t.Load, o.from.id, n, o.from.q.Len())
				}
				if n == 0 {
					ps.vain++
				}
				ps.s.pump(o.from.q)
				ps.s.after(3*ps.hop, func() { // the answer, and the requests by way of their entries
					x.asking[b] = false
					if n == 0 {
						x.silent[o.from.id] = ps.s.now.Add(ps.report)
					}
				})
			})
			break
		}
	}
}

// TestFleetTable compares three proxies with one before four servers.
func TestFleetTable(t *testing.T) {
	for _, w := range fleetWorkloads(1) {
		for _, slots := range []int{1, 4} {
			fleetRow(t, w, slots, usual)
		}
	}
}

type fleetWorkload struct {
	name string
	cfg  engineConfig
	work func(*sim)
}

// listed makes a queue know that the model is loaded on all servers, unless that takes time.
func (w *fleetWorkload) listed(s *sim, q *Queue) {
	for b := range s.boxes {
		if w.cfg.load == 0 {
			q.SetLoaded(uint16(b), map[string]int{options("m", 0).Model: 0}, s.now, s.now)
		}
	}
}

func fleetWorkloads(seed uint64) []fleetWorkload {
	twoModels := func(s *sim) {
		var jobs []*job
		for i := range 100 {
			jobs = append(jobs, &job{segs: []seg{text(300)}, gen: 20, client: fmt.Sprint("client", i%4), model: []string{"a", "b"}[i%2], numCtx: 2048 * (1 + i/2%2)})
		}
		burst(s, jobs)
	}
	chats := func(s *sim) {
		system := text(500)
		rng := rand.New(rand.NewPCG(seed, 4))
		for c := range 16 {
			jobs := conversation(system, c)
			s.after(time.Duration(rng.IntN(200))*time.Millisecond, func() { s.chat(jobs, 20*time.Millisecond) })
		}
	}
	return []fleetWorkload{
		{"32 prefixes x 4, at once", engineConfig{}, func(s *sim) {
			jobs := groups(32, 4, 1000, 40, 16, 7+seed)
			for i, j := range jobs {
				j.client = fmt.Sprint("client", i%8)
			}
			burst(s, jobs)
		}},
		{"32 prefixes x 4, spaced", engineConfig{}, func(s *sim) { spaced(s, groups(32, 4, 1000, 40, 16, 7+seed), 35*time.Millisecond, seed) }},
		{"30 prefixes x 10, loops", engineConfig{}, func(s *sim) { loops(s, groups(30, 10, 1000, 40, 16, 5+seed)) }},
		{"30 prefixes x 10, loops, host cache", engineConfig{host: 100_000}, func(s *sim) { loops(s, groups(30, 10, 1000, 40, 16, 5+seed)) }},
		{"one prefix x 128, at once", engineConfig{}, func(s *sim) { hot(s, 8, 16, true) }},
		{"one prefix x 128, 8 loops", engineConfig{}, func(s *sim) { hot(s, 8, 16, false) }},
		{"one prefix x 1440, 24 loops", engineConfig{}, func(s *sim) { hot(s, 24, 60, false) }},
		{"16 chats of 10 turns", engineConfig{}, chats},
		{"16 chats of 10 turns, host cache", engineConfig{host: 100_000}, chats},
		{"2 models x 2 num_ctx, 100 at once", engineConfig{load: 2 * time.Second, exclude: true}, twoModels},
		{"400 prefixes x 6, at once", engineConfig{}, func(s *sim) { burst(s, groups(400, 6, 1000, 40, 16, 21+seed)) }},
	}
}

// fleetRow runs a workload on four servers with one queue, and with three.
func fleetRow(t *testing.T, w fleetWorkload, slots int, p policy) (tokens, wall float64) {
	t.Helper()
	anew(t)
	cfg := w.cfg
	cfg.slots, cfg.servers = slots, 4
	q := Config{Lanes: slots}
	base := ids
	one := newSim(t, cfg, New(q))
	w.listed(one, one.q)
	w.work(one)
	oneWall := one.run()
	ids = base
	s := newSim(t, cfg, nil)
	ps := newPeers(s, 3, q, p)
	for _, x := range ps.proxies {
		w.listed(s, x.q)
	}
	w.work(s)
	threeWall := s.run()
	for _, x := range ps.proxies {
		if len(x.q.items) > 0 {
			t.Errorf("%d requests are left", len(x.q.items))
		}
	}
	tokens, wall = float64(s.evaluated)/float64(one.evaluated), float64(threeWall)/float64(oneWall)
	t.Logf("%-36s %d slots | one %.3f %6.1fs %d loads | three %.3f %6.1fs %d loads | tokens %.3f wall %.3f | passed %d given %d in %d of %d asked, stolen %d, by server%s, one%s",
		w.name, slots, float64(one.evaluated)/float64(one.least), oneWall.Seconds(), one.loads, float64(s.evaluated)/float64(s.least), threeWall.Seconds(), s.loads,
		tokens, wall, ps.passed, ps.given, ps.asked-ps.vain, ps.asked, one.q.count.Stolen, s.byServer(), one.byServer())
	return tokens, wall
}
