// Package schedule decides when a request goes to an Ollama server, and to which. For each slot of
// a loaded model there is a lane, which serves one request at a time and remembers the prompt that
// it served last; a lane that becomes free takes the waiting request that shares the most with it:
//
//	arrival   A B C A B C A B C     (one lane; A, B and C are prefixes)
//	served    A A A B B B C C C
//
// Queue is the policy: it has no clock, no goroutine and no lock, and the same events give the same
// grants. Scheduler is the shell around it in which requests wait. If several servers can serve a
// request, the queue chooses one. Neither reads bodies or talks to a server.
package schedule

import (
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Runner is a model as one server has it loaded: with other options Ollama loads it again.
type Runner struct {
	Upstream uint16
	Options  prefix.Options
}

// Priority orders requests: while a more urgent one waits, no other is granted, except by
// Config.MaxWait.
type Priority int8

const (
	Interactive Priority = iota - 1
	Normal
	Batch
)

func (p Priority) String() string {
	return [...]string{urgent: "interactive", normal: "normal", lesser: "batch"}[p.rank()]
}

// ParsePriority parses the form that String returns. For anything else it returns Normal and false.
func ParsePriority(s string) (Priority, bool) {
	for p := Interactive; p <= Batch; p++ {
		if s == p.String() {
			return p, true
		}
	}
	return Normal, false
}

// rank is a priority as an index, the most urgent first, with an additional one for Normal requests
// that go first: see flow.
type rank uint8

const (
	urgent rank = iota // Interactive
	sparse
	normal
	lesser // Batch
	ranks
)

func (p Priority) rank() rank {
	switch {
	case p <= Interactive:
		return urgent
	case p >= Batch:
		return lesser
	}
	return normal
}

// priority is the priority that a request of the rank asked for.
func (r rank) priority() Priority {
	switch r {
	case urgent:
		return Interactive
	case lesser:
		return Batch
	}
	return Normal
}

// asked is the rank without regard to flows, which do not decide which model is loaded.
func (r rank) asked() rank {
	if r == sparse {
		return normal
	}
	return r
}

// Request is what the queue needs to know about a request.
type Request struct {
	ID     uint64 // unique among the requests that wait or are being served; set by Scheduler
	Runner Runner
	// Upstreams are the servers that can serve it, each once: those that have the model. With
	// several, the queue chooses one and ignores Runner.Upstream; empty means Runner.Upstream. Not
	// kept.
	Upstreams []uint16
	Links     []prefix.Link // of its prompt; not kept
	Tokens    int           // of the prompt, estimated; 0: guessed from the links
	Client    string        // the unit of fairness: an API key or an address
	Program   uint64        // which of the client's programs sent it; 0: unknown, and flows make no difference
	Flow      uint64        // what the program works on, such as a conversation
	Weight    float64       // the client's share, relative to the greatest possible one; 0 means 1
	Priority  Priority
	Streams   bool      // the answer is streamed, so that Began is called
	Arrived   time.Time // zero: now. A request whose server did not answer keeps its place by it
	Movable   bool      // another proxy's server may take it over while it waits: see Elsewhere
	Moves     int       // how often it was taken over before it came here (Elsewhere.Moves)
	// MayWait, if non-nil, is called once by Queue.Add if the request has to wait. If it returns
	// false, the request is not added, and Scheduler.Acquire returns ErrMayNotWait.
	MayWait func() bool
}

// Refusal means that a waiting request will not be sent.
type Refusal struct {
	ID  uint64
	Err error // ErrFull if it made room for a more urgent one, ErrAway, or Elsewhere
}

// Placement means that a request may be sent now.
type Placement struct {
	ID       uint64
	Upstream uint16         // the server to send it to
	Options  prefix.Options // of the runner that serves it
	Lane     int            // the lane, that is, the slot; if Unlimited, lanes can outnumber slots
	Expected int            // estimated tokens of its prompt that this slot holds
	Waited   time.Duration
}

// Result is how a granted request ended.
type Result struct {
	// Sent: it may have reached the server. Answered: its answer has begun, so its prompt has been
	// evaluated.
	Sent, Answered bool

	Total       int // tokens of the prompt; 0: not known
	Reused      int // reused tokens of these, if ReusedKnown
	ReusedKnown bool
	Generated   int // tokens of the answer

	// Times from the answer. /v1 reports none.
	Prompt, Eval time.Duration
	Queue        time.Duration // inside Ollama: total - load - prompt_eval - eval
	Load         time.Duration
	Timed        bool // these times were reported

	Loaded, LoadKnown bool // whether the model was loaded for it
}

// Config bounds a queue.
type Config struct {
	Lanes   int           // per runner, as OLLAMA_NUM_PARALLEL; 0: learned, beginning with 1; or Unlimited
	Limit   int           // waiting requests; 0: DefaultLimit
	MaxWait time.Duration // how long a request may be passed over; 0: no limit
}

// Unlimited lanes mean that nothing waits: every request is granted at once. Where prompts are warm
// is still remembered, for the choice of a server.
const Unlimited = -1

// DefaultLimit is the largest number of waiting requests, unless the operator sets another.
const DefaultLimit = 10_000

const (
	// quantum is how many prefixes' worth of work a lane does before it leaves a prefix for others
	// that wait, and a client gets before others: the re-evaluation is then about 5 % of it.
	quantum = 20
	// agedQuantum is the same for a request that has waited longer than MaxWait, counted from the
	// last such request, whatever was served since. Otherwise a server that is too slow for its
	// requests would evaluate every prompt in full, and become slower still. A prefix that nobody
	// waits for is left at once.
	agedQuantum = 4
	// patience is how many requests per lane go before the one that has waited longest, whatever
	// their priorities, even without Config.MaxWait (the oldest of every k: arXiv 2502.04677). It
	// is also how many go before a runner makes room for another with less urgent requests.
	patience = 256
	// longestWait is the wait, beyond that without the proxy, after which quantum becomes
	// agedQuantum for a request, too. A trial whether the host cache keeps what is lost may begin
	// after a third of it.
	longestWait = 15 * time.Second
	// mostTrials is how many such trials there are while a model is loaded. Each costs at most two
	// prefixes.
	mostTrials = 3
	// copiedPatience is how many times as long a lane waits before it evaluates once more what
	// another one is evaluating, if it can soon have that for nothing: the estimate may be too
	// short.
	copiedPatience = 3
	// copiedLeast is the minimum of that wait, since at first the server's speed is not known.
	copiedLeast = 15 * time.Second
	// longestTurn is how long a model keeps another one waiting that has to replace it, unless a
	// load takes longer.
	longestTurn = 30 * time.Second
	// fairWeight is how many prompt tokens a generated one counts as when clients are compared.
	fairWeight = 10
	// slack is how many shared tokens are negligible. They take a few ms.
	slack = 64
	// triesMost bounds how many requests are examined of clients that have had their share.
	triesMost = 64
	// similarity is the part of a prompt that a slot must hold for the engine to choose the slot
	// for that, rather than by recency (llama.cpp --slot-prompt-similarity, which Ollama does not
	// change).
	similarity = 0.10
	maxClients = 4096 // clients whose habits are remembered
	maxRunners = 256  // per server
	maxVisits  = 64   // per runner
	hostWorth  = 128  // tokens that prove that the host cache had them
	maxLearned = 64   // lanes
	maxPairs   = 1024 // of models, per server, for which it is known whether they fit beside each other
	maxKeys    = 1024 // keys of runners, including equivalent ones
)

// Queue is the policy. Create it with New. It is not safe for concurrent use. Time must not go back
// between calls.
type Queue struct {
	cfg      Config
	longest  time.Duration    // longestWait, unless a test measures others
	items    map[uint64]*item // waiting or being served
	waiting  [ranks]int
	roaming  int       // how many waiting requests several servers can serve
	servers  []*server // in the order in which they became known
	offers   []offer   // for route
	clients  *simplelru.LRU[string, *returns]
	habits   returns // of all clients: the assumption for an unknown one
	flows    *simplelru.LRU[flowKey, *flow]
	outposts *simplelru.LRU[outpostKey, *runner] // other proxies' runners that took requests over
	busiest  *flow                               // the client that has had and waits for the most; nil: none yet
	served   *flow                               // the flow that has had the most; nil: none yet
	ahead    flow                                // what going first has cost, and what other requests have had
	denied   []uint64                            // requests that go first as soon as that is paid for
	took     mean                                // seconds that requests took
	again    mean                                // seconds of re-evaluating what a detour evicted, if it is lost …
	lost     float64                             // … and the part of such that was lost recently
	grants   []Placement
	refused  []Refusal
	count    Counts
	places   *places // who has them; nil: not recorded
}

// server is one Ollama server.
type server struct {
	index     uint16
	seed      uint64           // of its rendezvous hash
	off       bool             // it gets nothing new
	foreign   bool             // another proxy owns it: see SetOwned
	away      bool             // it does not answer: its backlog is held …
	until     time.Time        // … and is refused from this time on
	lanes     int              // per runner; 0: learned
	told      map[string]Slots // by model
	tells     bool             // a model's engine is expected to report its slots once it is loaded
	found     int              // … for the runner that learned it last: the others' initial value
	host      mean             // rates.host of all its runners: the initial value of new ones
	longest   bool             // it chooses slots by the longest match alone
	runners   []*runner
	byKey     map[Runner]*runner // several keys may belong to one runner
	list      []*runner          // ordered
	waiting   int
	roaming   int // how many of these other servers can serve, too
	turns     uint64
	loaded    map[string]int          // the loaded models that it lists, if known, with their context in tokens, if reported
	parted    map[string]bool         // models whose runners were wrongly united
	wake      time.Time               // when to look again; zero: after the next event
	relations map[[2]string]relation  // of models
	believed  map[string]LearnedModel // what another proxy has learned, by model
}

// runner tracks one loaded model: its lanes, backlog and learned speeds.
type runner struct {
	key     Runner
	server  *server
	classes [ranks]class
	waiting int
	roaming int
	movable int
	prompts int           // tokens of its backlog
	work    [ranks]int    // of its backlog, in tokens: those to be evaluated, as estimated on arrival, and those generated
	running int           // of what is being served
	arrived time.Duration // the sum of the arrivals of its backlog, since epoch. It may overflow; differences are still right
	lanes   []*lane
	want    int // wanted number of lanes
	busy    int
	eldest  *item     // the request that has waited longest …
	passed  int       // … and how many went before it since it is the longest
	skipped int       // how many went to runners that cannot be loaded beside it while it had a backlog
	tries   int       // requests that are served beyond want, to find out whether there is a slot for them
	spare   []*lane   // lanes that became free since then, whose slots those have, unless there are more
	full    time.Time // when a request was last granted that left no lane free
	first   time.Time // when a request was first granted

	resident  bool      // believed to be loaded
	since     time.Time // when that began
	turn      uint64    // … as a number in the order of the server's loads
	used      time.Time // when a request last ended
	served    Runner    // what the last answered request asked for
	taught    bool      // a request has been answered since this proxy schedules the server
	tried     time.Time // when the last answered request was granted
	asked     time.Time // when a request was last granted
	replaced  []*runner // runners that are believed to have been unloaded for it, until its next grant
	sought    time.Time // since when it has a backlog while it is not resident
	habits    returns   // when requests for it came after it had become idle
	wanted    bool      // others waited when it became idle
	missed    bool      // it was held for requests that did not come
	rank      rank      // of the last request
	idle      time.Time // since when a lane is free and a request waits
	last      time.Time // when the latest of the requests that waited here arrived
	coveted   time.Time // since when requests wait that other servers can serve, too
	visits    []*visit  // oldest first
	rates     rates
	learner   learner
	evaluates time.Time // when the evaluation of everything granted so far has probably ended
	probing   *visit    // the one for which a lane was last not held, until it is continued
	trials    int       // how often that was done since it was loaded
}

// item is a request that waits or is being served.
type item struct {
	id      uint64
	key     Runner // as it was requested
	runner  *runner
	class   *class
	account *account
	rank    rank
	arrived time.Time
	tokens  int
	weight  float64       // of its client; 0: 1
	fresh   int           // tokens to be evaluated, as estimated on arrival
	work    int           // in tokens, as runner.work
	due     time.Duration // how long it would have waited in order of arrival
	steps   []step
	node    *node
	waits   bool

	who           flowKey // from the request
	owner         *flow   // its client; nil: unknown, and so are …
	program, flow *flow
	newcomer      bool    // it goes first since its client has had little
	detour        bool    // it goes before others of its own program
	charged       float64 // its expected cost, if it goes first
	displaced     int     // tokens that its lane held and that it did not use

	upstreams []uint16 // that can serve it, if there are several
	opening   uint64   // see openingOf
	moves     int      // how often it was taken over
	movable   bool     // another proxy may take it over
	joins     bool     // it was taken over although its prefix is evaluated once more for it

	lane     *lane // while it is served
	granted  time.Time
	freed    time.Time // when its lane had last become free at that time
	expected int
	cost     int // charged so far to its client …
	takes    int // … and to its lane

	overtaken time.Time     // when the first request ended that was served when this one was granted, or later
	beside    int           // how many were served when it was granted, including it
	tries     bool          // it was granted with all lanes busy, and is not known to have a slot …
	told      bool          // … and nothing more is expected to reveal that
	late      bool          // its answer began so late that it must have waited for a slot
	streams   bool          // its answer is a stream
	begun     time.Time     // when that began
	turn      time.Duration // until the requests granted earlier were evaluated, as far as known
	from      time.Time     // when nothing else was left to be evaluated before it, as far as known
	replaced  []*runner     // runners that are believed to have been unloaded for it
	hosted    int           // tokens that the host cache may have restored; 0: nothing to learn
}

// lane represents a slot.
type lane struct {
	name   int
	holds  []step // the prompt that it served last, or is serving
	tokens int    // of that prompt
	before []step // what it held before that
	marks  [ranks]*node
	item   *item // nil: free

	used     time.Time // when it was last taken or became free; zero: never
	class    rank      // of the request that it served last
	work     int       // tokens, since it began its prefix
	since    int       // … and since a request was last granted because it had waited too long
	visit    *visit    // the request that it served last
	wanted   bool      // requests waited when it became free, so that holding it costs something, and may save something
	reported bool      // its hold has been counted
}

// visit is a served prompt, remembered to learn when a request comes that continues it.
type visit struct {
	steps  []step
	tokens int
	client string
	at     time.Time
	state  visitState

	generated int // tokens of the answer
}

type visitState uint8

const (
	visitOpen     visitState = iota
	visitMissed              // none came while the lane was held for it
	visitReturned            // one came
)

// Counts count what the policy has done since New.
type Counts struct {
	Grants       uint64 // with a lane
	Continued    uint64 // to a lane that held most of what the two shared
	Opened       uint64 // to a lane that held none of it
	Joined       uint64 // … although another lane was working on its prefix
	Aged         uint64 // for having waited longer than MaxWait
	RunnerLoads  uint64 // to a runner that was not loaded
	HoldsHit     uint64 // lanes held for a request that came
	HoldsExpired uint64 // … and that did not come
	Spread       uint64 // requests sent elsewhere than where most of the prompt was warm, because of the load there
	Stolen       uint64 // requests that an idle server took over from a busy one
	Moved        uint64 // … and from one that was no longer available
	Given        uint64 // requests that another proxy's server took over
	Disowned     uint64 // … and that went back since no server for them belongs to this proxy any more
}

// New returns an empty queue.
func New(cfg Config) *Queue {
	if cfg.Limit == 0 {
		cfg.Limit = DefaultLimit
	}
	clients, err := simplelru.NewLRU[string, *returns](maxClients, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	flows, err := simplelru.NewLRU[flowKey, *flow](3*maxFlows, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	outposts, err := simplelru.NewLRU[outpostKey, *runner](maxRunners, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return &Queue{
		cfg: cfg, longest: longestWait, items: map[uint64]*item{}, habits: firstHabits(),
		clients: clients, flows: flows, outposts: outposts,
	}
}

// epoch is what arrivals are counted from, so that they can be summed.
var epoch = time.Unix(1_600_000_000, 0)

// Len returns how many requests wait.
func (q *Queue) Len() (n int) {
	for _, w := range q.waiting {
		n += w
	}
	return n
}

// Add adds a request. It returns false if the queue is full and the request is not added. If others
// have more than their share of the places, or are less urgent, one of theirs is refused instead:
// see crowd.
func (q *Queue) Add(r Request, now time.Time) bool {
	if r.Arrived.IsZero() || r.Arrived.After(now) {
		r.Arrived = now
	}
	it := &item{id: r.ID, key: r.Runner, rank: r.Priority.rank(), arrived: r.Arrived, weight: r.Weight}
	it.who, it.streams = flowKey{r.Client, r.Program, r.Flow}, r.Streams
	it.movable, it.moves = r.Movable, max(0, r.Moves)
	it.steps, it.tokens = stepsOf(r.Links, r.Tokens)
	q.enter(it, now)
	switch len(r.Upstreams) {
	case 0:
	case 1:
		it.key.Upstream = r.Upstreams[0]
	default:
		it.upstreams, it.opening = slices.Clone(r.Upstreams), openingOf(r.Links)
	}
	s, learn := q.route(it, now)
	it.key.Upstream = s.index
	x := q.runner(s, it.key, now)
	if learn == nil {
		learn = x
	}
	q.returned(learn, it, now)

	full := q.Len() >= q.cfg.Limit
	if full && !q.room(it, x) && q.crowded().yields(it) == it {
		q.exit(it, 0, now)
		return false
	}
	q.items[it.id] = it
	q.enqueue(it, x, now)
	q.pump(s, now)
	return q.stays(it.id, r.MayWait, now)
}

// stays refuses a waiting request if the added one is one too many, and returns false if it is the
// added one that is refused. No request gives up its place for one that may not wait.
func (q *Queue) stays(id uint64, mayWait func() bool, now time.Time) bool {
	it := q.items[id] // another one than was added, if it was moved
	if mayWait != nil && it != nil && it.waits && !mayWait() {
		q.Leave(id, now)
		return false
	}
	if q.Len() <= q.cfg.Limit {
		return true
	}
	last := q.crowded().last()
	if last == it {
		q.Leave(id, now)
		return false
	}
	s := last.runner.server
	q.refuse(last, ErrFull, now)
	q.pump(s, now)
	return true
}

// refuse removes a waiting request that will not be sent.
func (q *Queue) refuse(it *item, err error, now time.Time) {
	q.drop(it.id, now)
	q.refused = append(q.refused, Refusal{it.id, err})
}

// room reports whether a request might be granted at once.
func (q *Queue) room(it *item, x *runner) bool {
	if !x.server.away && (x.busy < x.want || x.server.lanes == Unlimited) {
		return true
	}
	for _, u := range it.upstreams {
		s := q.server(u)
		if y := s.byKey[Runner{u, it.key.Options}]; !s.away && (y == nil || y.busy < y.want) {
			return true
		}
	}
	return false
}

// enqueue adds a request to a runner's backlog.
func (q *Queue) enqueue(it *item, x *runner, now time.Time) {
	c := &x.classes[it.rank]
	if c.tree == nil {
		c.tree, c.accounts, c.rates = newTree(), map[string]*account{}, &x.rates
		for _, l := range x.lanes {
			if l.item != nil {
				l.mark(it.rank, c.tree)
			}
		}
	}
	it.runner, it.class, it.waits, x.last = x, c, true, latest(x.last, it.arrived)
	if x.waiting == 0 {
		x.sought, x.skipped = now, 0
		x.came(now)
	}
	if (it.roams() || it.movable) && x.roaming+x.movable == 0 {
		x.coveted = now
	}
	warm, _ := x.warmth(it, true)
	it.fresh = max(it.tokens-warm, 1)
	it.work = int(x.rates.work(it.fresh, 1))
	it.due = x.direct()
	q.counted(it, 1)
	x.arrived += it.arrived.Sub(epoch)
	c.add(it)
	if q.places != nil {
		q.places.add(it)
	}
}

// direct returns how long it would take to serve the backlog in order of arrival.
func (x *runner) direct() time.Duration {
	tokens := float64(x.prompts)*x.rates.lostPart() + float64(x.waiting)*x.rates.weight()*x.rates.generated()
	return x.rates.evaluate(int(tokens) / max(x.want, 1))
}

// counted adds a waiting request to all counts, or removes it from them.
func (q *Queue) counted(it *item, n int) {
	x := it.runner
	q.waiting[it.rank] += n
	x.server.waiting += n
	x.waiting += n
	x.prompts += n * it.tokens
	x.work[it.rank] += n * it.work
	if it.movable {
		x.movable += n
	}
	if it.roams() {
		q.roaming += n
		x.server.roaming += n
		x.roaming += n
	}
}

// stepsOf returns the steps of a prompt's links, and the prompt's number of tokens.
func stepsOf(links []prefix.Link, tokens int) ([]step, int) {
	if len(links) == 0 {
		return nil, max(tokens, 1)
	}
	all := links[len(links)-1].Bytes
	if tokens <= 0 {
		tokens = all/4 + 1 // roughly as English text
	}
	steps := make([]step, len(links))
	for i := range links {
		steps[i] = step{hash: links[i].Hash}
		if all > 0 {
			steps[i].tokens = int32(int64(tokens) * int64(links[i].Bytes) / int64(all))
		}
	}
	return steps, tokens
}

// Leave removes a waiting request whose client has left. If it has been granted, Done must be
// called.
func (q *Queue) Leave(id uint64, now time.Time) {
	if it := q.drop(id, now); it != nil {
		q.pump(it.runner.server, now)
	}
}

// drop removes a waiting request without granting anything. It returns nil if there is none.
func (q *Queue) drop(id uint64, now time.Time) *item {
	it := q.items[id]
	if it == nil || !it.waits {
		return nil
	}
	delete(q.items, id)
	q.unwait(it, false)
	q.exit(it, 0, now)
	return it
}

// unwait removes a request from the backlog.
func (q *Queue) unwait(it *item, serve bool) {
	x := it.runner
	q.counted(it, -1)
	x.arrived -= it.arrived.Sub(epoch)
	if x.waiting == 0 {
		x.idle = time.Time{}
	}
	it.waits = false
	it.class.remove(it, serve)
	if q.places != nil {
		if q.places.remove(it); q.Len() <= q.cfg.Limit/2 {
			q.places = nil
		}
	}
}

// Done records that a granted request has ended. It ignores a request that is not being served.
func (q *Queue) Done(id uint64, r Result, now time.Time) {
	it := q.items[id]
	if it == nil || it.waits {
		return
	}
	delete(q.items, id)
	x, l := it.runner, it.lane
	took := time.Duration(0)
	if r.Sent {
		took = now.Sub(it.granted)
	}
	q.exit(it, took, now)
	q.reconsider(now)
	it.frees(now)
	evaluated := 0
	switch {
	case !r.Sent: // the slot is unchanged
		l.holds, l.before = l.before, nil
		l.tokens = tokensOf(l.holds)
	case !r.Answered: // it may hold a part of it, and what it held before is lost
		evaluated = max(it.tokens-it.expected, 1)
		l.holds, l.before, l.tokens = nil, nil, 0
	default:
		evaluated = q.answered(it, r, now)
	}
	it.pays(r, evaluated)
	l.wanted = x.server.waiting > 0 || q.roaming > 0
	if x.given() == 0 {
		x.found(x.learn(it, r, now))
	}
	for _, other := range x.lanes {
		if other.item != nil && other.item.overtaken.IsZero() {
			other.item.overtaken = now
		}
	}
	x.used, x.rank, x.missed = now, it.rank, false
	x.wanted = x.waiting == 0 && x.busy == 0 && x.server.waiting > 0
	if r.Answered && it.granted.After(x.tried) {
		x.tried = it.granted
	}
	x.resize()
	q.pump(x.server, now)
}

// frees makes a request that has ended release its lane.
func (it *item) frees(now time.Time) {
	x, l := it.runner, it.lane
	for p := range x.classes {
		if l.marks[p] != nil {
			x.classes[p].tree.count(l.marks[p], 0, 0, -1)
			l.marks[p] = nil
		}
	}
	x.busy--
	x.running -= it.work
	if it.tries && !it.told {
		x.tries--
	}
	it.account.running--
	l.item, l.used, l.class, l.wanted, l.reported, l.visit = nil, now, it.rank, false, false, nil
}

// answered learns from an answered request, and returns how many tokens of its prompt were
// evaluated.
func (q *Queue) answered(it *item, r Result, now time.Time) int {
	x, evaluated := it.runner, max(it.tokens-it.expected, 1)
	if r.ReusedKnown && r.Total > 0 {
		evaluated = max(r.Total-r.Reused, 1)
	}
	if r.LoadKnown {
		q.loaded(x, it, r, now)
	}
	x.served, x.taught = it.key, true
	x.rates.learn(it, r, evaluated)
	if kept, told := it.restored(r); told {
		x.rates.kept.add(kept)
		if kept == 0 || x.given() > 0 || x.learner.ceiling { // with fewer lanes than slots another slot may have kept it
			x.rates.host.add(kept)
			x.server.host.add(kept)
		}
	}
	took := now.Sub(it.granted)
	x.rates.service.add(float64(took))
	if !r.Loaded || r.Load > 0 {
		x.rates.pace.add(float64(max(0, took-r.Load)), x.rates.work(it.fresh, 1))
	}
	if r.Timed && !r.Loaded {
		x.rates.around.add(float64(max(0, took-r.Prompt-r.Eval)))
	}
	q.visited(x, it, r.Generated, now)
	return evaluated
}

// pays charges a request's client and its lane with its actual cost instead of the expected one.
func (it *item) pays(r Result, evaluated int) {
	x, cost, work := it.runner, 0, 0
	if r.Sent {
		cost, work = evaluated+fairWeight*r.Generated, evaluated+int(x.rates.weight()*float64(r.Generated))
	}
	it.lane.charge(work - it.takes)
	it.class.charge(it.account, cost-it.cost)
	if a := x.classes[normal].accounts[it.account.name]; it.rank == sparse && a != nil {
		x.classes[normal].charge(a, cost) // splitting work into many flows must not pay
	}
}

func tokensOf(steps []step) int {
	if len(steps) == 0 {
		return 0
	}
	return int(steps[len(steps)-1].tokens)
}

// Tick grants what may be granted by now. Call it at the time that Next returned.
func (q *Queue) Tick(now time.Time) {
	for _, s := range q.servers {
		if !s.wake.IsZero() && !now.Before(s.wake) {
			q.pump(s, now)
		}
	}
}

// Next returns when Tick is to be called; false means not before the next event.
func (q *Queue) Next() (at time.Time, ok bool) {
	for _, s := range q.servers {
		if !s.wake.IsZero() && (!ok || s.wake.Before(at)) {
			at, ok = s.wake, true
		}
	}
	return at, ok
}

// Grants returns the grants since its last call. The slice is valid until the next call of any
// method.
func (q *Queue) Grants() []Placement {
	g := q.grants
	q.grants = q.grants[:0]
	return g
}

// Refusals returns the waiting requests that were refused since its last call. The slice is valid
// until the next call of any method.
func (q *Queue) Refusals() []Refusal {
	r := q.refused
	q.refused = q.refused[:0]
	return r
}

// SetLanes sets how many slots each model on the server has; 0: learned; or Unlimited.
func (q *Queue) SetLanes(upstream uint16, n int, now time.Time) {
	s := q.server(upstream)
	before := s.lanes
	s.lanes = n
	for _, x := range s.runners {
		switch {
		case x.given() > 0:
			x.want = x.given()
		case n == 0 && before == Unlimited:
			x.want = max(s.found, 1)
		}
		x.resize()
	}
	q.pump(s, now)
}

// Slots is an engine's report about its slots.
type Slots struct {
	Count int // at least 1
	// Copied means that what one slot has evaluated is available to the others for next to nothing,
	// as soon as the request that it was evaluated for has ended.
	Copied bool
}

// SetTells sets whether the engines of a server are expected to report how many slots they have
// (SetSlots) as soon as they are started. Then nothing is tried to find out before.
func (q *Queue) SetTells(upstream uint16) { q.server(upstream).tells = true }

// SetSlots sets what the engine of a model on the server reports. The number of slots is no longer
// learned from then on. SetLanes takes precedence.
func (q *Queue) SetSlots(upstream uint16, model string, told Slots, now time.Time) {
	s := q.server(upstream)
	if s.told[model] == told {
		return
	}
	if s.told == nil {
		s.told = map[string]Slots{}
	}
	s.told[model] = told
	for _, x := range s.runners {
		if x.key.Options.Model == model && s.lanes == 0 {
			x.want = told.Count
			x.resize()
		}
	}
	q.pump(s, now)
}

// SetExpected sets the probable number of slots of each model on the server, for servers where it
// is learned. Models begin with this many lanes.
func (q *Queue) SetExpected(upstream uint16, n int, now time.Time) {
	s := q.server(upstream)
	if s.lanes != 0 {
		return
	}
	for _, x := range s.runners {
		if x.given() == 0 {
			x.want = n
			x.learner.anew()
			x.resize()
		}
	}
	s.found = n
	q.pump(s, now)
}

// SetLongestMatch sets whether the server chooses slots only by the longest match, as Ollama before
// 0.30 does.
func (q *Queue) SetLongestMatch(upstream uint16, on bool) { q.server(upstream).longest = on }

// Cool records that the model on the server is no longer loaded, so that nothing is warm there; ""
// means all models. It also forgets that the model does not fit beside others, since what was taken
// for that may have been such an end, and that there are no more slots, since the server may have
// been restarted with other settings.
func (q *Queue) Cool(upstream uint16, model string, now time.Time) {
	s := q.server(upstream)
	maps.DeleteFunc(s.relations, func(p [2]string, r relation) bool {
		return r == apart && (model == "" || p[0] == model || p[1] == model)
	})
	for _, x := range s.runners {
		if model == "" || x.key.Options.Model == model {
			x.cool()
			x.learner.anew()
		}
	}
	q.pump(s, now)
}

func (q *Queue) server(index uint16) *server {
	for _, s := range q.servers {
		if s.index == index {
			return s
		}
	}
	s := &server{index: index, seed: seedOf(strconv.Itoa(int(index))), lanes: q.cfg.Lanes, byKey: map[Runner]*runner{}, parted: map[string]bool{}, relations: map[[2]string]relation{}}
	q.servers = append(q.servers, s)
	return s
}

// mark records in a class's tree which prompt the lane is working on.
func (l *lane) mark(p rank, t *tree) {
	l.marks[p] = t.place(l.holds)
	t.count(l.marks[p], 0, 0, 1)
}
