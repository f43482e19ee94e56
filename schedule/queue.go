// Package schedule decides which request goes to an Ollama server when. For each slot of a loaded model there is a lane,
// which serves one request at a time and remembers the prompt that it served last; a lane that falls free takes the
// waiting request that shares the most with it. What that saves, and the theory behind it, is told where it is applied.
//
// Queue is the policy: it has no clock, no goroutine and no lock, and the same events give the same grants. Scheduler is the
// shell around it in which requests wait. Where several servers may serve a request they choose one. Neither reads bodies or
// talks to a server.
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

// Priority orders requests: as long as a more urgent one waits no other is granted, but see Config.MaxWait.
type Priority int8

const (
	Interactive Priority = iota - 1
	Normal
	Batch
)

func (p Priority) String() string {
	return [...]string{urgent: "interactive", normal: "normal", lesser: "batch"}[p.rank()]
}

// ParsePriority reads what String writes; false, and Normal, for anything else.
func ParsePriority(s string) (Priority, bool) {
	for p := Interactive; p <= Batch; p++ {
		if s == p.String() {
			return p, true
		}
	}
	return Normal, false
}

// rank is a priority as an index, the most urgent first, with one for those of Normal that go before the others: see flow.
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

// priority is the priority that a request of the rank was asked for with.
func (r rank) priority() Priority {
	switch r {
	case urgent:
		return Interactive
	case lesser:
		return Batch
	}
	return Normal
}

// asked is the rank without regard to flows: which model is loaded they do not decide.
func (r rank) asked() rank {
	if r == sparse {
		return normal
	}
	return r
}

// Request is what the queue needs to know of a request.
type Request struct {
	ID     uint64 // unique among the requests that wait or are being served; Scheduler chooses it
	Runner Runner
	// Upstreams are the servers that may serve it, each once: those that have the model. With several the queue chooses, and
	// Runner.Upstream is not looked at; empty: Runner.Upstream. Not kept.
	Upstreams []uint16
	Links     []prefix.Link // of its prompt; not kept
	Tokens    int           // estimated, of the prompt; 0: guessed from the links
	Client    string        // to be fair to: an API key or an address
	Program   uint64        // which of its programs, as far as that can be told; 0: not at all, and flows make no difference
	Flow      uint64        // what the program works on, such as a conversation
	Weight    float64       // the client's share, relative to that of the greatest; 0: 1, as much as any
	Priority  Priority
	Streams   bool      // its answer comes piece by piece, so that Began is told
	Arrived   time.Time // zero: now. One whose server did not answer keeps its place by it
	// MayWait is asked once, by Queue.Add, if the request has to wait; where it says false the request
	// is not added, and Scheduler.Acquire returns ErrMayNotWait. Nil: it may.
	MayWait func() bool
}

// Refusal says that a request that waited will not be sent.
type Refusal struct {
	ID  uint64
	Err error // ErrFull: it made room for a more urgent one; or ErrAway
}

// Placement says that a request may be sent now.
type Placement struct {
	ID       uint64
	Upstream uint16         // the server to send it to
	Options  prefix.Options // of the runner that serves it
	Lane     int            // stand-in for the slot in which it will land; of its runner. Unlimited: one of more than there are slots
	Expected int            // tokens of its prompt that this slot is expected to hold, estimated
	Waited   time.Duration
}

// Result is how a granted request ended.
type Result struct {
	// Sent: it may have reached the server. Answered: its answer has begun, so that the prompt has been evaluated.
	Sent, Answered bool

	Total       int // tokens of the prompt; 0: not known
	Reused      int // of these, where ReusedKnown
	ReusedKnown bool
	Generated   int // tokens of the answer

	// What the answer tells of time. /v1 tells nothing.
	Prompt, Eval time.Duration
	Queue        time.Duration // inside Ollama: total - load - prompt_eval - eval
	Load         time.Duration
	Timed        bool // these times were told

	Loaded, LoadKnown bool // whether the model was loaded for it
}

// Config sets a queue's bounds.
type Config struct {
	Lanes   int           // per runner, as OLLAMA_NUM_PARALLEL; 0: learned, from 1 on; or Unlimited
	Limit   int           // requests that wait; 0: DefaultLimit
	MaxWait time.Duration // from when on a waiting request goes before others, whatever that costs; 0: never
}

// Unlimited as a number of lanes says that nothing waits: every request is granted at once. Which prompts are warm where is
// still remembered, for the choice between servers.
const Unlimited = -1

// DefaultLimit is how many requests wait at most, unless the operator says otherwise.
const DefaultLimit = 10_000

const (
	// quantum is how many prefixes' worth of work a lane does before it leaves a prefix, and a client gets before others, if
	// others wait: what is evaluated again is then about 5 % of it.
	quantum = 20
	// agedQuantum is the same for the sake of a request that has waited for longer than MaxWait, counted from the last such
	// request, whatever was served since. A server that is too slow for what it is sent would otherwise evaluate every prompt
	// in full, and be slower still. What the lane holds and nobody waits for is left at once.
	agedQuantum = 4
	// patience is how many requests, for each lane, go before the one that has waited for longest, whatever their priorities, even
	// without Config.MaxWait (the oldest of every k: arXiv 2502.04677). So many go, too, before a
	// runner makes room for another with less urgent requests.
	patience = 256
	// longestWait is for how much longer than without the proxy a request waits before that quantum is agedQuantum for it, too.
	// A trial whether the host cache keeps what is lost comes after a third of it.
	longestWait = 15 * time.Second
	// mostTrials is how many such trials there are while a model is loaded. Each costs two prefixes
	// at most.
	mostTrials = 3
	// copiedPatience is how many times as long a lane waits before it evaluates once more what
	// another one is evaluating, if it can have that for nothing soon: the estimate may be too short.
	copiedPatience = 3
	// copiedLeast is the least of that: at first nothing is known of how fast the server is.
	copiedLeast = 15 * time.Second
	// longestTurn is for how long a model keeps another one waiting that has to be loaded in its place, if a load takes no longer.
	longestTurn = 30 * time.Second
	// fairWeight is how many tokens of a prompt a generated one counts as when clients are compared.
	fairWeight = 10
	// slack is how many tokens in common are not worth a thought. They take a few ms.
	slack = 64
	// triesMost bounds how many requests are looked at of clients that have had their share.
	triesMost = 64
	// similarity is which part of a prompt a slot must hold for the engine to choose the slot for that, and not by recency
	// (llama.cpp --slot-prompt-similarity, which Ollama leaves as it is).
	similarity = 0.10
	maxClients = 4096 // whose habits are remembered
	maxRunners = 256  // per server
	maxVisits  = 64   // per runner
	hostWorth  = 128  // tokens that tell that the host cache had them
	maxLearned = 64   // lanes
	maxPairs   = 1024 // of models of which it is known whether they can be loaded together, per server
	maxKeys    = 1024 // of runners, with those that have turned out to be one
)

// Queue is the policy. Make it with New. It is not safe for concurrent use. Time must not go back from call to call.
type Queue struct {
	cfg     Config
	longest time.Duration    // longestWait; others for measuring what they cost
	items   map[uint64]*item // waiting or being served
	waiting [ranks]int
	roaming int       // of those that wait: how many several servers may serve
	servers []*server // in the order in which they became known
	offers  []offer   // for route
	clients *simplelru.LRU[string, *returns]
	habits  returns // of all clients: what is expected of one that is not known
	flows   *simplelru.LRU[flowKey, *flow]
	busiest *flow    // the client that has had and waits for the most; nil: there was none
	served  *flow    // the flow that has had the most; nil: there was none
	ahead   flow     // what went before others has spent, and what did not go before others has had
	denied  []uint64 // requests that are to go before others as soon as that is paid for
	took    mean     // seconds that requests took
	again   mean     // seconds that it would take to evaluate again what a detour pushed out, if it is lost …
	lost    float64  // … and which part of such is, of late
	grants  []Placement
	refused []Refusal
	count   Counts
	places  *places // who has them; nil: not noted
}

// server is one Ollama server.
type server struct {
	index     uint16
	seed      uint64           // of its rendezvous hash
	off       bool             // it is to be sent nothing new
	away      bool             // it does not answer: what waits for it is held …
	until     time.Time        // … and is refused from then on
	lanes     int              // per runner; 0: learned
	told      map[string]Slots // by model
	tells     bool             // a model's engine is expected to tell, when it is loaded
	found     int              // … for the runner that this was last learned of: what others begin with
	host      mean             // rates.host of all its runners: what others begin with
	longest   bool             // it chooses slots by the longest match alone
	runners   []*runner
	byKey     map[Runner]*runner // several keys may have turned out to be one runner
	list      []*runner          // for order
	waiting   int
	roaming   int // of these: how many others may serve, too
	turns     uint64
	loaded    map[string]int         // the models that it lists as loaded, if that is known, and their context in tokens if it tells that
	parted    map[string]bool        // models for which runners were taken for one that are not
	wake      time.Time              // when to look again; zero: after the next event
	relations map[[2]string]relation // of models
}

// runner is what is known of a Runner.
type runner struct {
	key     Runner
	server  *server
	classes [ranks]class
	waiting int
	roaming int
	prompts int           // tokens of what waits
	work    [ranks]int    // of what waits, in tokens: what is to be evaluated, estimated when it came, and generated
	running int           // of what is being served
	arrived time.Duration // the sum of the arrivals of what waits, since epoch. It may overflow: differences are right all the same
	lanes   []*lane
	want    int // lanes
	busy    int
	eldest  *item     // the one that has waited for longest …
	passed  int       // … and how many went before it since it is that
	skipped int       // how many went to runners that cannot be loaded beside it while requests waited for it
	tries   int       // requests that are served beyond want, to see whether there is a slot for them
	spare   []*lane   // lanes that fell free since then: whose slots those have got, unless there are more
	full    time.Time // when a request was last granted so that no lane was free
	first   time.Time // when a request was first granted

	resident  bool      // believed to be loaded
	since     time.Time // when that began
	turn      uint64    // … in the order of the server's loads
	used      time.Time // when a request last ended
	served    Runner    // what the last request that was answered asked for
	tried     time.Time // when the last request that was answered was granted
	asked     time.Time // when a request was last granted
	replaced  []*runner // those that are believed to have been unloaded for it, until its next grant
	sought    time.Time // since when requests wait for it while it is not resident
	habits    returns   // when requests for it came after it had nothing to do
	wanted    bool      // others waited when it had nothing to do any more
	missed    bool      // it was held for requests that did not come
	rank      rank      // of the last request
	idle      time.Time // since when a lane is free and a request waits
	coveted   time.Time // since when requests wait that others may serve, too
	visits    []*visit  // oldest first
	rates     rates
	learner   learner
	evaluates time.Time // until when what was granted is evaluated, most likely
	probing   *visit    // the one for which it was not held last, until it is continued
	trials    int       // how often that was done since it was loaded
}

// item is a request that waits or is being served.
type item struct {
	id      uint64
	key     Runner // as it was asked for
	runner  *runner
	class   *class
	account *account
	rank    rank
	arrived time.Time
	tokens  int
	weight  float64       // of its client; 0: 1
	fresh   int           // of tokens, those to be evaluated, as estimated when it came
	work    int           // in tokens, as runner.work
	due     time.Duration // after how long it would have been served if all were served as they come
	steps   []step
	node    *node
	waits   bool

	who           flowKey // as the request says
	owner         *flow   // its client; nil: not known, and so are …
	program, flow *flow
	newcomer      bool    // it goes before others since its client has had little
	detour        bool    // it goes before others of its program
	charged       float64 // what it is expected to spend, if it goes before others
	displaced     int     // tokens that its lane held and that it did not use

	upstreams []uint16 // that may serve it, if there are several
	opening   uint64   // see openingOf
	moves     int      // how often it was taken over

	lane     *lane // while it is served
	granted  time.Time
	freed    time.Time // when its lane had last fallen free by then
	expected int
	cost     int // charged so far to its client …
	takes    int // … and to its lane

	overtaken time.Time     // when the first of those ended that were served when it was granted, or later
	beside    int           // how many were served when it was granted, with it
	tries     bool          // it was granted with all lanes busy, and is not known to have a slot …
	told      bool          // … and nothing more is waited for to hear that
	late      bool          // its answer began so late that it must have waited for a slot
	streams   bool          // its answer is a stream
	begun     time.Time     // when that began
	turn      time.Duration // until those were evaluated that were granted before, as far as is known
	from      time.Time     // when nothing else was to be evaluated before it any more, as far as is known
	replaced  []*runner     // those that are believed to have been unloaded for it
	hosted    int           // tokens that the host cache may have restored; 0: nothing to learn
}

// lane stands for a slot.
type lane struct {
	name   int
	holds  []step // the prompt that it last served, or serves
	tokens int    // of that prompt
	before []step // what it held before that
	marks  [ranks]*node
	item   *item // nil: free

	used     time.Time // when it was last taken or fell free; zero: never
	class    rank      // of the request that it last served
	work     int       // tokens, since it took up its prefix
	since    int       // … and since a request was last granted for having waited for too long
	visit    *visit    // the request that it last served
	wanted   bool      // requests waited when it fell free, so that to hold it costs something, and may save something
	reported bool      // its hold has been counted
}

// visit is a prompt that has been served, remembered to learn when one that continues it comes.
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

// Counts count what the policy did, since New.
type Counts struct {
	Grants       uint64 // with a lane
	Continued    uint64 // to a lane that held most of what the two had in common
	Opened       uint64 // to a lane that held nothing of it
	Joined       uint64 // … although another lane was busy with its prefix
	Aged         uint64 // for having waited longer than MaxWait
	RunnerLoads  uint64 // to a runner that was not loaded
	HoldsHit     uint64 // lanes held for a request that came
	HoldsExpired uint64 // … and that did not come
	Spread       uint64 // requests sent elsewhere than where most of the prompt was warm, since there was too much to do
	Stolen       uint64 // requests taken over by a server that had nothing to do from one for which they waited
	Moved        uint64 // … from one that was not available any more
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
	return &Queue{cfg: cfg, longest: longestWait, items: map[uint64]*item{}, clients: clients, habits: firstHabits(), flows: flows}
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

// Add adds a request. false: the queue is full, and the request is not in it. Where others have more
// than their share of the places, or are less urgent, one of theirs is refused in its place: see crowd.
func (q *Queue) Add(r Request, now time.Time) bool {
	if r.Arrived.IsZero() || r.Arrived.After(now) {
		r.Arrived = now
	}
	it := &item{id: r.ID, key: r.Runner, rank: r.Priority.rank(), arrived: r.Arrived, weight: r.Weight}
	it.who, it.streams = flowKey{r.Client, r.Program, r.Flow}, r.Streams
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

// stays refuses one of those that wait if a request that was added is one too many, and returns false
// if that is the request itself. Nobody gives up a place for one that may not wait.
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

// refuse takes out a request that waits and will not be sent.
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

// enqueue has a request wait for a runner.
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
	it.runner, it.class, it.waits = x, c, true
	if x.waiting == 0 {
		x.sought, x.skipped = now, 0
		x.came(now)
	}
	if it.roams() && x.roaming == 0 {
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

// direct returns how long it would take to serve all that wait as they came.
func (x *runner) direct() time.Duration {
	tokens := float64(x.prompts)*x.rates.lostPart() + float64(x.waiting)*x.rates.weight()*x.rates.generated()
	return x.rates.evaluate(int(tokens) / max(x.want, 1))
}

// counted adds a request that waits to all counts of such, or takes it out of them.
func (q *Queue) counted(it *item, n int) {
	x := it.runner
	q.waiting[it.rank] += n
	x.server.waiting += n
	x.waiting += n
	x.prompts += n * it.tokens
	x.work[it.rank] += n * it.work
	if it.roams() {
		q.roaming += n
		x.server.roaming += n
		x.roaming += n
	}
}

// stepsOf returns what is kept of a prompt's links, and how many tokens it has.
func stepsOf(links []prefix.Link, tokens int) ([]step, int) {
	if len(links) == 0 {
		return nil, max(tokens, 1)
	}
	all := links[len(links)-1].Bytes
	if tokens <= 0 {
		tokens = all/4 + 1 // about what English text has
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

// Leave takes out a request that waits and whose client has left. Of one that has been granted, Done must be told.
func (q *Queue) Leave(id uint64, now time.Time) {
	if it := q.drop(id, now); it != nil {
		q.pump(it.runner.server, now)
	}
}

// drop takes out a request that waits, and grants nothing for that; nil: there is none.
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

// unwait takes a request out of what waits.
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

// Done says that a granted request has ended. Of one that is not being served it takes no notice.
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
	case !r.Sent: // the slot is as it was
		l.holds, l.before = l.before, nil
		l.tokens = tokensOf(l.holds)
	case !r.Answered: // it may hold some of it, and what it held before is lost
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

// frees has a request that has ended take its lane no longer.
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

// answered learns from a request that was answered, and returns how many tokens of its prompt were evaluated.
func (q *Queue) answered(it *item, r Result, now time.Time) int {
	x, evaluated := it.runner, max(it.tokens-it.expected, 1)
	if r.ReusedKnown && r.Total > 0 {
		evaluated = max(r.Total-r.Reused, 1)
	}
	if r.LoadKnown {
		q.loaded(x, it, r, now)
	}
	x.served = it.key
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

// pays charges a request's client and its lane with what it took instead of what it was expected to take.
func (it *item) pays(r Result, evaluated int) {
	x, cost, work := it.runner, 0, 0
	if r.Sent {
		cost, work = evaluated+fairWeight*r.Generated, evaluated+int(x.rates.weight()*float64(r.Generated))
	}
	it.lane.charge(work - it.takes)
	it.class.charge(it.account, cost-it.cost)
	if a := x.classes[normal].accounts[it.account.name]; it.rank == sparse && a != nil {
		x.classes[normal].charge(a, cost) // whoever has many flows is owed no more for that
	}
}

func tokensOf(steps []step) int {
	if len(steps) == 0 {
		return 0
	}
	return int(steps[len(steps)-1].tokens)
}

// Tick grants what may be granted by now. It is to be called at the time that Next returned.
func (q *Queue) Tick(now time.Time) {
	for _, s := range q.servers {
		if !s.wake.IsZero() && !now.Before(s.wake) {
			q.pump(s, now)
		}
	}
}

// Next returns when Tick is to be called; false: not before the next event.
func (q *Queue) Next() (at time.Time, ok bool) {
	for _, s := range q.servers {
		if !s.wake.IsZero() && (!ok || s.wake.Before(at)) {
			at, ok = s.wake, true
		}
	}
	return at, ok
}

// Grants returns the grants since it was last called. The slice is valid until the next call of any method.
func (q *Queue) Grants() []Placement {
	g := q.grants
	q.grants = q.grants[:0]
	return g
}

// Refusals returns those that wait no more since Refusals was last called, and will not be sent. The slice is valid until the
// next call of any method.
func (q *Queue) Refusals() []Refusal {
	r := q.refused
	q.refused = q.refused[:0]
	return r
}

// SetLanes says how many slots each model on the server has; 0: to be learned; or Unlimited.
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

// Slots is what an engine tells of itself.
type Slots struct {
	Count int // at least 1
	// Copied says that what one slot has evaluated is in the others for next to nothing, as soon as
	// the request that it was evaluated for has ended.
	Copied bool
}

// SetTells says that the engines of a server are expected to tell how many slots they have (SetSlots), as
// soon as they are started: it is not tried to find out before.
func (q *Queue) SetTells(upstream uint16) { q.server(upstream).tells = true }

// SetSlots says what the engine of a model on the server tells: how many slots there are is not
// learned from then on. What SetLanes says goes before it.
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

// SetExpected says how many slots each model on the server has, most likely, where that is learned:
// they begin with so many lanes.
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

// SetLongestMatch says whether the server chooses slots by the longest match alone, as Ollama before 0.30 does.
func (q *Queue) SetLongestMatch(upstream uint16, on bool) { q.server(upstream).longest = on }

// Cool says that the model on the server is not loaded any more, so that nothing is warm there. An empty one means all.
// That it cannot be loaded beside others is forgotten: what was taken for that may have been such an
// end. So is that there are no more slots: the server may have been started anew with other settings.
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

// mark notes in a class's tree which prompt the lane is busy with.
func (l *lane) mark(p rank, t *tree) {
	l.marks[p] = t.place(l.holds)
	t.count(l.marks[p], 0, 0, 1)
}
