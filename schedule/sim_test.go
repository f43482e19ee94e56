package schedule

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// A simulated Ollama in virtual time: slots, the engine's rule for choosing one, the host cache,
// loads, and its queue, which is first come, first served. Prompts are evaluated one after the
// other; answers are generated concurrently.

// seg is a run of a prompt's tokens.
type seg struct {
	id     uint64
	tokens int
	answer bool // generated earlier: evaluated only if no slot has it any more
}

// noFlows, as a job's program, makes flows irrelevant for it.
const noFlows = 1 << 63

// job is a request of a workload.
type job struct {
	segs     []seg
	gen      int
	client   string
	priority Priority
	model    string
	numCtx   int
	stated   bool // the request states num_ctx as the default, which changes nothing in Ollama
	program  uint64
	flow     uint64
	done     func()

	id        uint64
	q         *Queue // that has it; nil: sent directly
	entry     *proxy // where it came in, if there are several
	moves     int
	at        uint16 // the server that served it
	came, end time.Time
	sent      time.Time
	expected  int // tokens that the queue expected to be reused
}

func lcp(a, b []seg) (n int) {
	for i := 0; i < min(len(a), len(b)) && a[i].id == b[i].id; i++ {
		n += a[i].tokens
	}
	return n
}

func total(s []seg) (n int) {
	for _, x := range s {
		n += x.tokens
	}
	return n
}

func mix(h, v uint64) uint64 {
	h = (h ^ v ^ 0x9E3779B97F4A7C15) * 0xC2B2AE3D27D4EB4F
	return h ^ h>>29 | 1
}

// links builds a chain with a link for every 64 tokens of each run, as prefix does for text of 4
// bytes per token.
func (j *job) links() []prefix.Link {
	h := mix(uint64(len(j.model)), uint64(j.numCtx))
	for _, c := range j.model {
		h = mix(h, uint64(c))
	}
	links := []prefix.Link{{Hash: h, Message: -1}, {Hash: mix(h, 1), Message: -1}}
	h = mix(h, 1)
	bytes := 0
	for _, s := range j.segs {
		for n := 0; n < s.tokens; n += 64 {
			h = mix(h, s.id*1000+uint64(n))
			bytes += 4 * min(64, s.tokens-n)
			links = append(links, prefix.Link{Hash: h, Bytes: bytes, Part: prefix.Block})
		}
	}
	return links
}

type slot struct {
	holds []seg
	used  time.Time
	busy  bool
}

type engineConfig struct {
	slots    int
	host     int           // tokens that the host cache holds
	untried  bool          // the queue does not know yet that there is no host cache
	longest  bool          // Ollama before 0.30
	perToken time.Duration // of a prompt
	decode   time.Duration // per token of an answer
	load     time.Duration
	exclude  bool          // models exclude each other in memory
	silent   bool          // answers have no times, as on /v1
	untold   bool          // answers do not report reused tokens
	mute     bool          // answers arrive in one piece: nothing shows when they begin
	servers  int           // 0 means one
	jitter   time.Duration // longest delay of a request on its way: they overtake each other …
	seed     uint64        // … at random
}

// box is one server.
type box struct {
	index   uint16
	loaded  []*engine
	waiting []*job // in Ollama's queue
	down    bool
	lives   int // how often it was killed
	running int // requests that it got and has not answered

	evaluated, served int
}

type engine struct {
	key      string
	box      *box
	slots    []*slot
	host     [][]seg
	pending  []*job
	computes time.Time // end of the current evaluations
	busy     int
	loading  time.Time
}

// sim runs jobs, through a queue or directly.
type sim struct {
	t     *testing.T
	cfg   engineConfig
	q     *Queue // nil: jobs are sent directly, or by peers
	peers *peers // nil: there is only one queue
	now   time.Time
	jobs  map[uint64]*job
	next  uint64

	events events
	seq    int
	boxes  []*box
	choose func(*job) *box // chooses the server if there is no queue
	ticks  map[*Queue]time.Time

	tree      map[uint64]bool
	least     int
	evaluated int
	loads     int
	finished  []*job
	missed    int // requests that reused less than the queue expected
	onDone    func(*job)
	rng       *rand.Rand
}

type event struct {
	at  time.Time
	seq int
	do  func()
}
type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

var start = time.Unix(1_800_000_000, 0)

func newSim(t *testing.T, cfg engineConfig, q *Queue) *sim {
	if cfg.perToken == 0 {
		cfg.perToken = 300 * time.Microsecond
	}
	if cfg.decode == 0 {
		cfg.decode = 3 * time.Millisecond
	}
	if q != nil && cfg.longest {
		q.SetLongestMatch(0, true)
	}
	s := &sim{t: t, cfg: cfg, q: q, now: start, jobs: map[uint64]*job{}, ticks: map[*Queue]time.Time{}, tree: map[uint64]bool{}, rng: rand.New(rand.NewPCG(cfg.seed, 2))}
	for i := range max(cfg.servers, 1) {
		s.boxes = append(s.boxes, &box{index: uint16(i)})
	}
	if q != nil && cfg.host == 0 && !cfg.untried {
		for _, b := range s.boxes {
			q.server(b.index).host = mean{v: 0, n: 1}
		}
	}
	s.choose = func(*job) *box { return s.boxes[0] }
	return s
}

// leastLoaded is the baseline: the server with the fewest requests, and among equals the next one
// in turn.
func (s *sim) leastLoaded(*job) *box {
	s.seq++
	best := s.boxes[s.seq%len(s.boxes)]
	for i := range s.boxes {
		if b := s.boxes[(s.seq+i)%len(s.boxes)]; !b.down && (best.down || b.running < best.running) {
			best = b
		}
	}
	return best
}

// upstreams returns the servers that may serve a request.
func (s *sim) upstreams() (all []uint16) {
	for _, b := range s.boxes {
		if !b.down {
			all = append(all, b.index)
		}
	}
	return all
}

// kill makes a server drop all its work; unanswered requests are sent elsewhere.
func (s *sim) kill(i int) {
	b := s.boxes[i]
	b.down, b.lives, b.running = true, b.lives+1, 0
	for _, e := range b.loaded {
		e.pending = nil
	}
	b.loaded, b.waiting = nil, nil
	ids := make([]uint64, 0, len(s.jobs))
	for id := range s.jobs {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	if s.q != nil {
		s.q.SetAvailable(b.index, false, s.now)
		s.q.Cool(b.index, "", s.now)
	}
	for _, id := range ids {
		j := s.jobs[id]
		if j.at != b.index || j.sent.IsZero() {
			continue
		}
		j.sent = time.Time{}
		if s.q == nil {
			s.send(j, s.choose(j))
			continue
		}
		s.q.Done(j.id, Result{Sent: true}, s.now)
		s.add(j)
	}
	if s.q != nil {
		s.pumped()
	}
}

func (s *sim) revive(i int) {
	s.boxes[i].down = false
	if s.q != nil {
		s.q.SetAvailable(uint16(i), true, s.now)
		s.pumped()
	}
}

func (s *sim) after(d time.Duration, do func()) {
	s.seq++
	heap.Push(&s.events, event{s.now.Add(d), s.seq, do})
}

// submit is a client sending a request.
func (s *sim) submit(j *job) {
	s.next++
	j.id, j.came = s.next, s.now
	if j.model == "" {
		j.model = "m"
	}
	s.jobs[j.id] = j
	h, fresh := uint64(7), 0
	for _, c := range fmt.Sprint(j.model, j.numCtx) {
		h = mix(h, uint64(c))
	}
	for _, g := range j.segs {
		if h = mix(h, g.id); !s.tree[h] {
			s.tree[h] = true
			if !g.answer {
				fresh += g.tokens
			}
		}
	}
	s.least += max(fresh, 1)
	switch {
	case s.peers != nil:
		s.peers.enter(j)
	case s.q == nil:
		s.send(j, s.choose(j))
	default:
		s.add(j)
		s.pumped()
	}
}

func (s *sim) add(j *job) {
	r := s.request(j)
	if len(s.boxes) > 1 {
		r.Upstreams = s.upstreams()
	}
	j.q = s.q
	if !s.q.Add(r, s.now) {
		s.t.Fatalf("the queue is full")
	}
}

func (s *sim) request(j *job) Request {
	r := Request{ID: j.id, Runner: s.runner(j), Links: j.links(), Tokens: total(j.segs), Client: j.client, Program: j.program, Flow: j.flow, Priority: j.priority, Arrived: j.came}
	r.Streams = !s.cfg.mute
	if r.Program == noFlows {
		r.Program = 0
	} else if r.Program == 0 { // like the proxy: by the start of the prompt
		r.Program, r.Flow = 1, j.segs[0].id
	}
	return r
}

func (s *sim) runner(j *job) Runner {
	if j.stated {
		return Runner{Options: options(j.model, 4096)}
	}
	return Runner{Options: options(j.model, j.numCtx)}
}

var optionsRead = map[string]prefix.Options{}

// options parses runner options, which only package prefix can build.
func options(model string, numCtx int) prefix.Options {
	body := `{}`
	if numCtx > 0 {
		body = fmt.Sprintf(`{"options":{"num_ctx":%d}}`, numCtx)
	}
	key := model + body
	o, ok := optionsRead[key]
	if !ok {
		o = prefix.NewReader().Read(prefix.Generate, model, []byte(body)).Runner
		optionsRead[key] = o
	}
	return o
}

// pumped sends the requests that the queue has granted.
func (s *sim) pumped() { s.pump(s.q) }

func (s *sim) pump(q *Queue) {
	for _, g := range slices.Clone(q.Grants()) {
		b := s.boxes[g.Upstream]
		if b.down {
			s.t.Fatalf("request %d was sent to a server that is down", g.ID)
		}
		s.jobs[g.ID].expected = g.Expected
		s.send(s.jobs[g.ID], b)
		if s.peers != nil {
			s.peers.sent(s.jobs[g.ID], q)
		}
	}
	if s.peers != nil {
		s.peers.refused(q)
	}
	if at, ok := q.Next(); ok && !at.Equal(s.ticks[q]) {
		s.ticks[q] = at
		s.after(max(0, at.Sub(s.now)), func() {
			s.ticks[q] = time.Time{}
			q.Tick(s.now)
			s.pump(q)
		})
	}
}

// send is the arrival of a request at Ollama.
func (s *sim) send(j *job, b *box) {
	j.sent, j.at = s.now, b.index
	b.running++
	arrive := func() {
		b.waiting = append(b.waiting, j)
		s.schedule(b)
	}
	if s.cfg.jitter == 0 {
		arrive()
		return
	}
	s.after(time.Duration(s.rng.Int64N(int64(s.cfg.jitter))), arrive)
}

// schedule is Ollama's own scheduling: the head of its queue waits until its model can be loaded,
// and all others behind it.
func (s *sim) schedule(b *box) {
	for len(b.waiting) > 0 {
		j := b.waiting[0]
		key := fmt.Sprint(j.model, "/", j.numCtx)
		i := slices.IndexFunc(b.loaded, func(e *engine) bool { return e.key == key })
		if i < 0 {
			for k := 0; k < len(b.loaded); k++ {
				e := b.loaded[k]
				if !s.cfg.exclude && e.model() != j.model {
					continue
				}
				if e.busy > 0 || len(e.pending) > 0 {
					return
				}
				b.loaded = slices.Delete(b.loaded, k, k+1)
				k--
			}
			e := &engine{key: key, box: b, loading: s.now.Add(s.cfg.load), computes: s.now}
			for range s.cfg.slots {
				e.slots = append(e.slots, &slot{})
			}
			b.loaded = append(b.loaded, e)
			s.loads++
			i = len(b.loaded) - 1
		}
		b.waiting = b.waiting[1:]
		e := b.loaded[i]
		e.pending = append(e.pending, j)
		if wait := e.loading.Sub(s.now); wait > 0 {
			s.after(wait, func() { s.place(e) })
		} else {
			s.place(e)
		}
	}
}

func (e *engine) model() string { return e.key[:slices.Index([]byte(e.key), '/')] }

// place assigns slots to pending requests, by the engine's rule.
func (s *sim) place(e *engine) {
	for len(e.pending) > 0 && !s.now.Before(e.loading) {
		j := e.pending[0]
		var best, lru *slot
		most := 0
		for _, l := range e.slots {
			if l.busy {
				continue
			}
			if n := lcp(j.segs, l.holds); n > most || s.cfg.longest && best == nil && len(l.holds) > 0 {
				best, most = l, n
			}
			if lru == nil || l.used.Before(lru.used) {
				lru = l
			}
		}
		if lru == nil {
			return
		}
		e.pending = e.pending[1:]
		all := total(j.segs)
		l, recency := best, false
		if best == nil || !s.cfg.longest && float64(most) <= 0.1*float64(all) {
			l, recency = lru, true
		}
		kept := lcp(j.segs, l.holds)
		if held := total(l.holds); s.cfg.host > 0 && (recency || 2*kept < held) {
			e.save(l.holds, s.cfg.host)
			l.holds, kept = e.restore(j.segs, l.holds, kept)
		}
		evaluated := max(all-kept, 1)
		s.evaluated += evaluated
		e.box.evaluated += evaluated
		e.box.served++
		if j.q != nil && kept < j.expected-slack {
			s.missed++
		}
		begin := s.now
		if e.computes.After(begin) {
			begin = e.computes
		}
		e.computes = begin.Add(time.Duration(evaluated) * s.cfg.perToken)
		decode := time.Duration(j.gen) * s.cfg.decode
		end := e.computes.Add(decode)
		l.busy, l.used, l.holds = true, s.now, append(slices.Clone(j.segs), seg{id: j.id<<32 | 5, tokens: j.gen, answer: true})
		e.busy++
		loaded := j.sent.Before(e.loading) && s.cfg.load > 0
		load := max(0, e.loading.Sub(j.sent))
		r := Result{
			Sent: true, Answered: true, Total: all, Reused: all - evaluated, ReusedKnown: true, Generated: j.gen, Timed: true,
			Prompt: e.computes.Sub(s.now), Eval: decode, Queue: max(0, s.now.Sub(j.sent)-load), Load: load, Loaded: loaded, LoadKnown: true,
		}
		if s.cfg.silent {
			r.Timed, r.Prompt, r.Eval, r.Queue, r.Load, r.Loaded, r.LoadKnown = false, 0, 0, 0, 0, false, false
		}
		if s.cfg.untold {
			r.Reused, r.ReusedKnown = 0, false
		}
		lives := e.box.lives
		if j.q != nil && !s.cfg.mute {
			s.after(e.computes.Sub(s.now), func() {
				if e.box.lives == lives {
					j.q.Began(j.id, s.now)
					s.pump(j.q)
				}
			})
		}
		s.after(end.Sub(s.now), func() {
			if e.box.lives != lives {
				return // killed meanwhile
			}
			l.busy, l.used = false, s.now
			e.busy--
			e.box.running--
			j.end = s.now
			s.finished = append(s.finished, j)
			delete(s.jobs, j.id)
			s.place(e)
			s.schedule(e.box)
			if j.q != nil {
				j.q.Done(j.id, r, s.now)
				s.pump(j.q)
			}
			if s.onDone != nil {
				s.onDone(j)
			}
			if j.done != nil {
				j.done()
			}
		})
	}
}

func (e *engine) save(holds []seg, limit int) {
	n := total(holds)
	if n == 0 || n > limit {
		return
	}
	e.host = append(e.host, holds)
	sum := 0
	for _, h := range e.host {
		sum += total(h)
	}
	for sum > limit {
		sum -= total(e.host[0])
		e.host = e.host[1:]
	}
}

func (e *engine) restore(segs, holds []seg, kept int) ([]seg, int) {
	best := -1
	part, sim := float64(kept)/float64(max(total(holds), 1)), kept
	for i, h := range e.host {
		n := lcp(segs, h)
		if p := float64(n) / float64(total(h)); p >= 0.25 && p > part && n > sim {
			best, part, sim = i, p, n
		}
	}
	if best < 0 {
		return holds, kept
	}
	holds = e.host[best]
	e.host = slices.Delete(e.host, best, best+1)
	return holds, sim
}

func (s *sim) step() {
	e := heap.Pop(&s.events).(event)
	s.now = e.at
	e.do()
}

// run runs until nothing is left to happen, and returns how long that took.
func (s *sim) run() time.Duration {
	for s.events.Len() > 0 {
		s.step()
	}
	if len(s.jobs) > 0 {
		s.t.Fatalf("%d requests were lost", len(s.jobs))
	}
	if s.q != nil && (s.q.Len() != 0 || len(s.q.items) != 0) {
		s.t.Fatalf("%d requests wait, %d are known, at the end", s.q.Len(), len(s.q.items))
	}
	last := start
	for _, j := range s.finished {
		if j.end.After(last) {
			last = j.end
		}
	}
	return last.Sub(start)
}

// dealt has eight scripts, which begin shortly after each other, send n requests, each every eighth
// one.
func (s *sim) dealt(n int, request func(i int) *job) {
	const scripts = 8
	for c := range scripts {
		var own []*job
		for i := c; i < n; i += scripts {
			j := request(i)
			j.client = fmt.Sprint("client", c)
			own = append(own, j)
		}
		s.after(time.Duration(c)*3*time.Millisecond, func() { s.closed(own, 5*time.Millisecond) })
	}
}

// closed has a client send its requests one after the other.
func (s *sim) closed(jobs []*job, think time.Duration) {
	if len(jobs) == 0 {
		return
	}
	j, rest := jobs[0], jobs[1:]
	j.done = func() { s.after(think, func() { s.closed(rest, think) }) }
	s.submit(j)
}
