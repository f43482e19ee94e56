package schedule

import (
	"cmp"
	"hash/fnv"
	"math"
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// A request that several servers can serve goes to the one where it costs the least time: waiting,
// evaluating what is not warm there, loading the model, and evaluating again what others lose by
// it. So a prefix stays where it is warm, and spreads when its backlog repays evaluating it
// elsewhere, too. A prompt that is warm nowhere goes where a hash says, within what the load
// allows, so that several proxies choose alike without asking each other. Idle servers take over
// the backlog of others: see steal.go.

const (
	// overload is the part of the mean by which a server's load may exceed the mean and still get a
	// new prefix (the ε of Mirrokni et al., "Consistent hashing with bounded loads", arXiv
	// 1608.01350).
	overload = 0.25
	// openingBytes is the length of the beginning of a prompt that decides where it goes if it is
	// warm nowhere. Prompts that share more than that (about 1,000 tokens) go to the same server.
	openingBytes = 4096
	// openingPart is the part of the first two messages that decides at most. So short prompts with
	// different ends go to one server, too, and many conversations with one short system prompt do
	// not.
	openingPart = 0.75
	// leastOpening is the number of bytes below which it is not worth sending prompts to one
	// server.
	leastOpening = 256
)

// offer is the cost of serving a request on one server.
type offer struct {
	server    *server
	x         *runner // nil: the server has had no request for it yet
	warm      int     // tokens of the prompt that need no evaluation
	wait      time.Duration
	loading   time.Duration
	displaced time.Duration // what others lose
	cost      time.Duration // the sum of these, and the evaluation
	score     float64       // rendezvous
}

// load is the part of the cost that speaks against giving the server new prefixes.
func (o *offer) load() time.Duration { return o.wait + o.loading + o.displaced }

// SetAvailable sets whether a server gets new requests. The backlog of one that drains goes to
// others that can serve it, and keeps its place there. What no other can serve stays, and is
// granted as usual. Servers are available at first.
func (q *Queue) SetAvailable(upstream uint16, on bool, now time.Time) {
	s := q.server(upstream)
	was := s.tier()
	s.off = !on
	q.opened(s, was, now)
}

// SetAway sets whether a server does not answer. Then its backlog goes to others that can serve it.
// What no other can serve continues to wait, and is refused (ErrAway) if the server is still away
// at a time, or when none of several is expected back any more.
func (q *Queue) SetAway(upstream uint16, away bool, until, now time.Time) {
	s := q.server(upstream)
	was := s.tier()
	s.away, s.until = away, until
	q.opened(s, was, now)
	q.pump(s, now)
}

// shut reports whether a server gets nothing that may go elsewhere.
func (s *server) shut() bool { return s.off || s.away }

// tier is how well a server is suited for requests: they go to one of the lowest tier that any of
// their servers is in.
type tier uint8

const (
	open    tier = iota
	foreign      // another proxy schedules it
	shut
)

func (s *server) tier() tier {
	switch {
	case s.shut():
		return shut
	case s.foreign:
		return foreign
	}
	return open
}

// opened moves backlogs after a server's tier may have changed.
func (q *Queue) opened(s *server, was tier, now time.Time) {
	is := s.tier()
	if was == is {
		return
	}
	for _, t := range slices.Clone(q.servers) {
		if t.tier() > open && (is > was || t != s) {
			q.vacate(t, now)
		}
	}
	for _, t := range q.servers {
		q.pump(t, now)
	}
}

// hold replaces granting for a server that is away: it refuses requests that have waited long
// enough, unless another server for them is not away, or may still return.
func (q *Queue) hold(s *server, now time.Time) {
	if now.Before(s.until) {
		s.later(s.until)
		return
	}
	for _, x := range slices.Clone(s.runners) {
		for _, it := range x.waiters() {
			i := slices.IndexFunc(it.upstreams, func(u uint16) bool {
				t := q.server(u)
				return t != s && !t.off && (!t.away || now.Before(t.until))
			})
			if i < 0 {
				q.refuse(it, ErrAway, now)
				continue
			}
			to := q.server(it.upstreams[i])
			q.shift(it, q.runner(to, Runner{to.index, it.key.Options}, now), now)
			q.count.Moved++
			q.fill(to, now)
		}
	}
}

// SetName sets the name by which several proxies identify a server; the default is its index.
func (q *Queue) SetName(upstream uint16, name string) { q.server(upstream).seed = seedOf(name) }

// SetLoaded sets which models (as Runner.Options) a server listed as loaded when it was asked at a
// time, and with how many tokens of context, 0 if not reported. These fit beside each other, and
// what is missing has been unloaded, for a later one if there is one. That is learned from answers,
// too; but answers to other proxies are not seen here. The queue keeps the map.
func (q *Queue) SetLoaded(upstream uint16, models map[string]int, at, now time.Time) {
	s := q.server(upstream)
	s.loaded = models
	for m := range models {
		for other := range models {
			if m < other {
				s.relate(m, other, together)
			}
		}
	}
	q.uniteSame(s, at, now)
	for _, x := range s.runners {
		if _, listed := s.loaded[x.key.Options.Model]; x.resident && x.busy == 0 && !listed && x.since.Before(at) && x.used.Before(at) {
			if y := x.evictor(now); y != nil {
				s.relate(x.key.Options.Model, y.key.Options.Model, apart)
			}
			x.cool()
		}
	}
	q.pump(s, now)
}

// uniteSame unites runners that state the same options in different ways. at is when the server was
// asked for its loaded models.
func (q *Queue) uniteSame(s *server, at, now time.Time) {
	for _, y := range slices.Clone(s.runners) {
		x := s.same(y.key)
		if x == nil || x == y {
			continue
		}
		// While x replaces y, the server may still list y, with y's context.
		if y.turn == 0 || x.answered() && x.since.Before(at) {
			q.unite(x, y, now)
		}
	}
}

// evictor returns the runner for which this one, which the server no longer lists, has been
// unloaded, if all candidates are of one model. Candidates are those that are listed, and were
// loaded later and since this one was last used; and, while that is recent, those that serve, or
// are being loaded to serve. (Ollama makes their requests wait for what runs.) It returns nil if
// there is none, or it is not clear.
func (x *runner) evictor(now time.Time) (only *runner) {
	for _, y := range x.server.runners {
		if !y.resident || y.key.Options.Model == x.key.Options.Model {
			continue
		}
		_, listed := x.server.loaded[y.key.Options.Model]
		later := listed && y.turn > x.turn && y.since.After(x.used)
		if !later && (y.busy == 0 || now.Sub(x.used) > longestTurn) {
			continue
		}
		if only != nil && only.key.Options.Model != y.key.Options.Model {
			return nil
		}
		only = y
	}
	return only
}

// seedOf returns the seed of a server's rendezvous hashes. It must be the same in all proxies, and
// all versions of them.
func seedOf(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return h.Sum64()
}

// vacate moves the backlog of a server that is not open to better ones, as far as there are any.
func (q *Queue) vacate(s *server, now time.Time) {
	for _, x := range slices.Clone(s.runners) {
		if x.roaming == 0 {
			continue
		}
		for _, it := range x.waiters() {
			if to, _ := q.route(it, now); to != s && (s.shut() || to.tier() < s.tier()) {
				q.shift(it, q.runner(to, Runner{to.index, it.key.Options}, now), now)
				q.count.Moved++
			}
		}
	}
}

// waiters returns a runner's backlog, more urgent requests first, and equally urgent ones in order
// of arrival.
func (x *runner) waiters() []*item {
	all := make([]*item, 0, x.waiting)
	for p := range x.classes {
		f := &x.classes[p].fifo
		f.front() // sorts them
		for _, it := range f.items {
			if it.waits {
				all = append(all, it)
			}
		}
	}
	return all
}

// may reports whether a server can serve a waiting request.
func (it *item) may(s *server) bool {
	return it.runner.server == s || slices.Contains(it.upstreams, s.index)
}

// roams reports whether the queue has a choice of servers for it.
func (it *item) roams() bool { return len(it.upstreams) > 1 }

// route returns the server to which a request goes, of the best tier of those that can serve it.
// learn is the runner where it is warmest, or nil for that of this server.
func (q *Queue) route(it *item, now time.Time) (to *server, learn *runner) {
	if !it.roams() {
		return q.server(it.key.Upstream), nil
	}
	offers := q.offers[:0]
	for at := open; len(offers) == 0; at++ {
		for _, u := range it.upstreams {
			if s := q.server(u); s.tier() == at {
				offers = append(offers, offer{server: s, x: s.byKey[Runner{u, it.key.Options}]})
			}
		}
	}
	q.offers = offers
	if len(offers) == 1 {
		return offers[0].server, nil
	}
	known := familiar(offers)
	warmest := q.weigh(offers, it, known, false, now)
	if 2*warmest.warm < it.tokens { // looking for what host caches may have takes longer
		warmest = q.weigh(offers, it, known, true, now)
	}
	if warmest.warm <= slack {
		return settle(offers, known.evaluate(it.tokens)), nil
	}
	best := &offers[0]
	for i := range offers {
		o := &offers[i]
		// Tokens to evaluate once more count twice, since others wait for that, too. Otherwise
		// conversations would move back and forth.
		o.cost += known.evaluate(warmest.warm - o.warm)
		if o.cost < best.cost || o.cost == best.cost && o.score > best.score {
			best = o
		}
	}
	if best.warm+slack < warmest.warm {
		q.count.Spread++
	}
	return best.server, warmest.x
}

// familiar returns the rates of a runner that has evaluated something, as a substitute for one that
// has not.
func familiar(offers []offer) *rates {
	for _, o := range offers {
		if o.x != nil && o.x.rates.prompt.under > 0 {
			return &o.x.rates
		}
	}
	return &rates{}
}

// settle returns the server for a new prefix: the first in the order of its rendezvous hash whose
// load exceeds the mean by at most overload and the prompt's evaluation, since that is the cost if
// another proxy sends it elsewhere.
func settle(offers []offer, own time.Duration) *server {
	var sum time.Duration
	for i := range offers {
		sum += offers[i].load()
	}
	bound := time.Duration((1+overload)*float64(sum)/float64(len(offers))) + own
	var best *offer
	for i := range offers { // one of them does not exceed the mean
		if o := &offers[i]; o.load() <= bound && (best == nil || o.score > best.score) {
			best = o
		}
	}
	return best.server
}

// weigh computes the offers, and returns that of the server where the most is warm.
func (q *Queue) weigh(offers []offer, it *item, known *rates, host bool, now time.Time) *offer {
	warmest := &offers[0]
	for i := range offers {
		o := &offers[i]
		if q.fillIn(o, it, known, host, now); o.warm > warmest.warm {
			warmest = o
		}
	}
	return warmest
}

// fillIn computes an offer. host means that what the host cache may restore counts as warm.
func (q *Queue) fillIn(o *offer, it *item, known *rates, host bool, now time.Time) {
	*o = offer{server: o.server, x: o.x}
	s, x := o.server, o.x
	r := known
	if x != nil && x.rates.prompt.under > 0 {
		r = &x.rates
	}
	for _, y := range s.runners {
		if y != x {
			o.wait += y.ahead(it.rank)
		}
	}
	if x != nil {
		var ahead float64
		o.warm, ahead = x.warmth(it, host)
		o.wait += time.Duration((x.serving()/x.width() + ahead) * float64(r.perToken()))
		if x.resident && x.busy < x.want && s.lanes != Unlimited {
			l, tokens := x.landing(it)
			o.displaced = q.displaced(x, l, tokens, now)
		}
	}
	o.loading = s.loading(x, it.key.Options, known, now)
	o.cost = o.load() + time.Duration(r.work(it.tokens-o.warm, 1)*float64(r.perToken()))
	o.score = s.score(it.opening)
}

// width is how many requests are assumed to be served at once.
func (x *runner) width() float64 {
	if x.server.lanes == Unlimited {
		return 1 // as OLLAMA_NUM_PARALLEL by default
	}
	return float64(max(x.want, 1))
}

// serving estimates how many tokens of the running requests are still to come: half, for lack of
// better knowledge.
func (x *runner) serving() float64 { return float64(x.running) / 2 }

// queued returns the work of the equally urgent backlog, in tokens.
func (x *runner) queued(p rank) float64 {
	tokens := 0
	for _, n := range x.work[:p+1] {
		tokens += n
	}
	return float64(tokens)
}

// ahead returns how long a runner is busy with equally urgent requests.
func (x *runner) ahead(p rank) time.Duration {
	if x.running == 0 && x.waiting == 0 {
		return 0
	}
	return time.Duration((x.serving() + x.queued(p)) / x.width() * float64(x.rates.perToken()))
}

// warmth returns how many tokens of a prompt need no evaluation if it is sent to the runner, since
// a lane holds them, or since a waiting request has them, too; and how many tokens' work goes
// before it. Requests of one prefix follow each other, so that one whose prefix is there waits only
// for those. The backlog counts like what is warm: otherwise siblings that come in a burst would
// scatter.
func (x *runner) warmth(it *item, host bool) (warm int, ahead float64) {
	steps := x.held(it.steps)
	warm = tokensOf(it.steps[:steps])
	var nodes [ranks]*node
	var depths [ranks]int
	for p := range ranks {
		if k := &x.classes[p]; k.fifo.live > 0 {
			nodes[p], depths[p], _ = k.tree.walk(it.steps)
			warm = max(warm, depths[p])
		}
	}
	restored := 0
	if host {
		restored = x.restorable(it.steps, steps)
	}
	if warm <= slack || restored > warm+slack {
		return max(warm, restored), x.queued(it.rank) / x.width()
	}
	for p := range it.rank + 1 {
		if n := nodes[p]; n != nil && depths[p]+slack >= warm {
			ahead += min(x.below(n)/float64(max(n.busy, 1)), float64(x.work[p])/x.width())
		}
	}
	return warm, ahead
}

// held returns how many steps of a prompt a lane holds.
func (x *runner) held(steps []step) int {
	n := 0
	for _, l := range x.lanes {
		n = max(n, further(steps, l.holds, n))
	}
	return n
}

// restorable returns how many tokens of a prompt the server's host cache is expected to have, if
// that is more than the given number of steps, by how often it had what was needed; half of it
// before anything is known.
func (x *runner) restorable(steps []step, least int) int {
	part := 0.5
	if x.rates.host.n > 0 {
		part = x.rates.host.v
	}
	if x.server.longest || part == 0 {
		return 0
	}
	for _, v := range x.visits {
		least = max(least, further(steps, v.steps, least))
	}
	return int(float64(tokensOf(steps[:least])) * part)
}

// further returns common if that is more than n, otherwise at most n. Fingerprints are cumulative,
// so one comparison is enough.
func further(a, b []step, n int) int {
	if len(a) <= n || len(b) <= n || a[n].hash != b[n].hash {
		return 0
	}
	return common(a, b)
}

// loading returns how long loading a model takes, plus loading again what is unloaded for it and
// was recently used.
func (s *server) loading(x *runner, o prefix.Options, known *rates, now time.Time) time.Duration {
	r := known
	if x != nil && x.rates.loadTime.n > 0 {
		r = &x.rates
	}
	if x != nil && x.resident {
		if x.used.After(x.since) {
			return 0
		}
		return max(0, x.since.Add(r.load()).Sub(now))
	}
	if _, listed := s.loaded[o.Model]; listed && !slices.ContainsFunc(s.runners, func(y *runner) bool { return y.resident && y.key.Options.Model == o.Model }) {
		return 0 // by others, and as far as known with the same options
	}
	sum := r.load()
	for _, y := range s.runners {
		if y == x || !y.resident || !s.excludes(y, o) {
			continue
		}
		if again := y.rates.load(); y.busy+y.waiting > 0 || now.Sub(y.used) < quantum*again {
			sum += again
		}
	}
	return sum
}

// excludes reports whether a runner is not known to fit beside what is loaded with some options.
func (s *server) excludes(y *runner, o prefix.Options) bool {
	return s.between(y.key.Options.Model, o.Model) == apart
}

// displaced returns how long evaluating again what a lane holds and its client is likely to reuse
// takes, if so many tokens of it are kept.
func (q *Queue) displaced(x *runner, l *lane, kept int, now time.Time) time.Duration {
	v := l.visit
	if v == nil || v.state == visitReturned {
		return 0
	}
	return time.Duration(q.client(v.client).later(&q.habits, now.Sub(v.at)) * float64(x.rates.evaluate(q.loss(x, l, kept))))
}

// later returns how likely it is that a client comes back which has not come back for some time.
// The habits of all clients count as much as two answers of this one.
func (h *returns) later(all *returns, since time.Duration) float64 {
	others := all.total()
	came, missed := 0.0, h.missed+2*all.missed/others
	first, _ := slices.BinarySearch(gapBounds[:], since)
	for i := first; i < gapBuckets; i++ {
		came += h.gaps[i] + 2*all.gaps[i]/others
	}
	if came == 0 {
		return 0
	}
	return came / (came + missed)
}

// score is the server's rendezvous hash for a prompt's opening, weighted by its lanes if their
// number is given or learned (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA
// 2005).
func (s *server) score(opening uint64) float64 {
	h := opening ^ s.seed // mixed as SplitMix64 does
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	h ^= h >> 31
	u := (float64(h>>11) + 0.5) / (1 << 53)
	return float64(max(s.lanes, s.found, 1)) / -math.Log(u)
}

// openingOf returns the fingerprint that decides where a prompt goes that is warm nowhere: that of
// a part which its siblings probably have, too, and which later turns of a conversation do not
// change.
func openingOf(links []prefix.Link) uint64 {
	end := 0
	for _, l := range links {
		if l.Message > 1 || end >= 2*openingBytes {
			break
		}
		end = l.Bytes
	}
	limit := openingBytes
	for float64(limit) > openingPart*float64(end) { // in few steps, so that siblings of slightly different lengths have the same one
		limit /= 2
	}
	if limit < leastOpening {
		limit = end
	}
	i, _ := slices.BinarySearchFunc(links, limit, func(l prefix.Link, limit int) int { return cmp.Compare(l.Bytes, limit) })
	if i == len(links) {
		return 0
	}
	return links[i].Hash
}

// shift moves a waiting request to another runner's backlog, at the place of its arrival. What its
// client owes moves with the last of its requests.
func (q *Queue) shift(it *item, to *runner, now time.Time) {
	again := *it
	again.key.Upstream = to.server.index
	from := it.account
	q.requeue(it, &again, to, now)
	if from.waiting == 0 && from.deficit < 0 {
		again.class.owe(again.account, -from.deficit)
		from.deficit = 0
	}
}

// requeue replaces a waiting request by another one, for another runner. Lists still have the first
// one, which no longer waits.
func (q *Queue) requeue(it, again *item, to *runner, now time.Time) {
	q.unwait(it, false)
	q.items[it.id] = again
	q.enqueue(again, to, now)
}
