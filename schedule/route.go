package schedule

import (
	"cmp"
	"hash/fnv"
	"math"
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// A request that several servers may serve goes to the one where it costs the least time: waiting, evaluating what is not
// warm there, loading the model, and evaluating anew what others lose by it. So a prefix stays where it is warm, and spreads
// when its backlog repays evaluating it elsewhere, too. Of a prompt that is warm nowhere, a hash decides, within what the
// load allows, so that several proxies choose alike without asking each other. What waits is taken over by
// servers that have nothing to do: see steal.go.

const (
	// overload is by which part of the mean a server's load may exceed that for it to be given a new prefix (the ε of
	// Mirrokni et al., "Consistent hashing with bounded loads", arXiv 1608.01350).
	overload = 0.25
	// openingBytes is up to where a prompt decides to which server it goes if it is warm nowhere. Prompts that share more than
	// that (about 1,000 tokens) go to one.
	openingBytes = 4096
	// openingPart is which part of the first two messages decides at most, so that short prompts with different ends
	// go to one server, too, and many conversations with one short system prompt do not.
	openingPart = 0.75
	// leastOpening is how many bytes are not worth sending prompts to one server for.
	leastOpening = 256
)

// offer is what it takes to serve a request on one server.
type offer struct {
	server    *server
	x         *runner // nil: the server was not asked for it yet
	warm      int     // tokens of the prompt that need not be evaluated
	wait      time.Duration
	loading   time.Duration
	displaced time.Duration // what others lose
	cost      time.Duration // all of these, and the evaluation
	score     float64       // rendezvous
}

// load is what counts against giving the server something new.
func (o *offer) load() time.Duration { return o.wait + o.loading + o.displaced }

// SetAvailable says whether a server is to be sent anything new. One that drains is not: what waits for it goes
// to others that may serve it, and keeps its place there. What may go nowhere else stays, and is granted as ever. Servers are
// available at first.
func (q *Queue) SetAvailable(upstream uint16, on bool, now time.Time) {
	s := q.server(upstream)
	was := s.shut()
	s.off = !on
	q.opened(s, was, now)
}

// SetAway says whether a server does not answer. What waits for it then goes to others that may serve it; what may go nowhere else
// waits on, and is refused (ErrAway) if the server is still away at a time, or when none of several is expected back any more.
func (q *Queue) SetAway(upstream uint16, away bool, until, now time.Time) {
	s := q.server(upstream)
	was := s.shut()
	s.away, s.until = away, until
	q.opened(s, was, now)
	q.pump(s, now)
}

// shut reports whether a server is to be sent nothing that may go elsewhere.
func (s *server) shut() bool { return s.off || s.away }

// opened has what waits go elsewhere after a server may have been shut, or opened.
func (q *Queue) opened(s *server, was bool, now time.Time) {
	shut := s.shut()
	if was == shut {
		return
	}
	for _, t := range slices.Clone(q.servers) {
		if t.shut() && (shut || t != s) {
			q.vacate(t, now)
		}
	}
	for _, t := range q.servers {
		q.pump(t, now)
	}
}

// hold is what is done for a server that is away in place of granting something: what has waited for long enough is refused,
// unless another one that may serve it is not away, or may still come back.
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

// SetName gives a server the name by which several proxies know it; at first it is its index.
func (q *Queue) SetName(upstream uint16, name string) { q.server(upstream).seed = seedOf(name) }

// SetLoaded says which models a server listed as loaded when it was asked at a time, as those of Runner.Options, and with how many
// tokens of context, 0 where it did not say: these can be loaded at the same time, and what is missing has been unloaded, for a
// later one if there is one. It is learned from answers, too; but those to other proxies are not seen here. The queue keeps the map.
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

// uniteSame makes one of runners that state the same options in different ways, after the server was
// asked at a time what is loaded.
func (q *Queue) uniteSame(s *server, at, now time.Time) {
	for _, y := range slices.Clone(s.runners) {
		x := s.same(y.key)
		if x == nil || x == y {
			continue
		}
		// While x takes the place of y the server may still list y, with the context that y has.
		if y.turn == 0 || x.answered() && x.since.Before(at) {
			q.unite(x, y, now)
		}
	}
}

// evictor returns a runner for which this one, which the server does not list any more, has been unloaded, if all that may be are of one
// model: those that are listed, and were loaded later and since this one was used last; and as long as that is not long ago, those that
// serve, or are being loaded to serve. (Ollama has their requests wait for what runs.) nil: none, or that is not clear.
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

// seedOf returns what a server's rendezvous hashes begin with. It must not differ between proxies, or versions of them.
func seedOf(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return h.Sum64()
}

// vacate has what waits for a server that is not available wait for others, as far as there are any.
func (q *Queue) vacate(s *server, now time.Time) {
	for _, x := range slices.Clone(s.runners) {
		if x.roaming == 0 {
			continue
		}
		for _, it := range x.waiters() {
			if to, _ := q.route(it, now); to != s {
				q.shift(it, q.runner(to, Runner{to.index, it.key.Options}, now), now)
				q.count.Moved++
			}
		}
	}
}

// waiters returns what waits for a runner, more urgent ones first, and of those equally urgent in order of arrival.
func (x *runner) waiters() []*item {
	all := make([]*item, 0, x.waiting)
	for p := range x.classes {
		f := &x.classes[p].fifo
		f.front() // puts them in order
		for _, it := range f.items {
			if it.waits {
				all = append(all, it)
			}
		}
	}
	return all
}

// may reports whether a request that waits may be served by a server.
func (it *item) may(s *server) bool {
	return it.runner.server == s || slices.Contains(it.upstreams, s.index)
}

// roams reports whether the queue has a choice where to send it.
func (it *item) roams() bool { return len(it.upstreams) > 1 }

// route returns the server to which a request is to go, of those that may serve it and are available; of all that may serve it, if
// none of them is. learn is the runner where it is warmest; nil: that of this server.
func (q *Queue) route(it *item, now time.Time) (to *server, learn *runner) {
	if !it.roams() {
		return q.server(it.key.Upstream), nil
	}
	offers := q.offers[:0]
	for _, all := range []bool{false, true} {
		for _, u := range it.upstreams {
			if s := q.server(u); all || !s.shut() {
				offers = append(offers, offer{server: s, x: s.byKey[Runner{u, it.key.Options}]})
			}
		}
		if len(offers) > 0 {
			break
		}
	}
	q.offers = offers
	if len(offers) == 1 {
		return offers[0].server, nil
	}
	known := familiar(offers)
	warmest := q.weigh(offers, it, known, false, now)
	if 2*warmest.warm < it.tokens { // it takes longer to look at what host caches may have
		warmest = q.weigh(offers, it, known, true, now)
	}
	if warmest.warm <= slack {
		return settle(offers, known.evaluate(it.tokens)), nil
	}
	best := &offers[0]
	for i := range offers {
		o := &offers[i]
		// What is evaluated once more counts twice: others wait for it, too. Conversations would go to and fro otherwise.
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

// familiar returns the rates of a runner that has evaluated something, to go by where one has not.
func familiar(offers []offer) *rates {
	for _, o := range offers {
		if o.x != nil && o.x.rates.prompt.under > 0 {
			return &o.x.rates
		}
	}
	return &rates{}
}

// settle returns the server for a new prefix: the first in the order of its rendezvous hash whose load does not exceed the mean by
// more than overload and by what it takes to evaluate the prompt, since that is what it costs if another proxy sends it elsewhere.
func settle(offers []offer, own time.Duration) *server {
	var sum time.Duration
	for i := range offers {
		sum += offers[i].load()
	}
	bound := time.Duration((1+overload)*float64(sum)/float64(len(offers))) + own
	var best *offer
	for i := range offers { // one of them has no more than the mean
		if o := &offers[i]; o.load() <= bound && (best == nil || o.score > best.score) {
			best = o
		}
	}
	return best.server
}

// weigh fills in offers, and returns that of the server where the most is warm.
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

// fillIn fills in an offer. host: what the host cache may restore counts as warm.
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

// width is how many requests are taken to be served beside each other.
func (x *runner) width() float64 {
	if x.server.lanes == Unlimited {
		return 1 // as OLLAMA_NUM_PARALLEL, unless that is set
	}
	return float64(max(x.want, 1))
}

// serving returns how many tokens of what is being served are still to come: half, for all that is known.
func (x *runner) serving() float64 { return float64(x.running) / 2 }

// queued returns the work, in tokens, of what waits and is as urgent.
func (x *runner) queued(p rank) float64 {
	tokens := 0
	for _, n := range x.work[:p+1] {
		tokens += n
	}
	return float64(tokens)
}

// ahead returns for how long a runner has to do, with what is as urgent.
func (x *runner) ahead(p rank) time.Duration {
	if x.running == 0 && x.waiting == 0 {
		return 0
	}
	return time.Duration((x.serving() + x.queued(p)) / x.width() * float64(x.rates.perToken()))
}

// warmth returns how many tokens of a prompt need not be evaluated if it is sent to the runner, since a lane holds them, or
// since a request is to be served there that has them, too; and how many tokens' work goes before it. Those of
// one prefix follow each other, so that one whose prefix is there waits for these alone. What waits
// counts like what is warm: siblings that come in a burst would otherwise scatter.
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

// restorable returns how many tokens of a prompt the server's host cache is expected to have, if that is more than
// the given number of steps, by how often it had what it was asked for; before it was asked for anything, half of it.
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

// further returns common if that is more than n, else at most n. Fingerprints are cumulative: one tells whether it is.
func further(a, b []step, n int) int {
	if len(a) <= n || len(b) <= n || a[n].hash != b[n].hash {
		return 0
	}
	return common(a, b)
}

// loading returns how long it takes until a model is loaded, and to load again what is unloaded for it and was in use of late.
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
		return 0 // by others, and with the same options for all that is known
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

// excludes reports whether a runner cannot be loaded beside what is loaded with some options, for all that is known.
func (s *server) excludes(y *runner, o prefix.Options) bool {
	return s.between(y.key.Options.Model, o.Model) == apart
}

// displaced returns how long it takes to evaluate again what a lane holds and its client is likely to come back for, if so many
// tokens of it are kept.
func (q *Queue) displaced(x *runner, l *lane, kept int, now time.Time) time.Duration {
	v := l.visit
	if v == nil || v.state == visitReturned {
		return 0
	}
	return time.Duration(q.client(v.client).later(&q.habits, now.Sub(v.at)) * float64(x.rates.evaluate(q.loss(x, l, kept))))
}

// later returns how likely it is that a client comes back which has not come back for some time. What is known of all clients
// counts as much as two answers of this one.
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

// score is the server's rendezvous hash for a prompt's opening, weighted by its lanes where their number is given or
// found (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005).
func (s *server) score(opening uint64) float64 {
	h := opening ^ s.seed // mixed as SplitMix64 does
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	h ^= h >> 31
	u := (float64(h>>11) + 0.5) / (1 << 53)
	return float64(max(s.lanes, s.found, 1)) / -math.Log(u)
}

// openingOf returns the fingerprint that decides where a prompt goes that is warm nowhere: that of a part which its siblings have,
// too, most likely, and which later turns of a conversation do not change.
func openingOf(links []prefix.Link) uint64 {
	end := 0
	for _, l := range links {
		if l.Message > 1 || end >= 2*openingBytes {
			break
		}
		end = l.Bytes
	}
	limit := openingBytes
	for float64(limit) > openingPart*float64(end) { // in few steps, so that siblings of somewhat different lengths have the same one
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

// shift has a request that waits wait for another runner, in the place that it has by its arrival. What its client owes goes with
// the last of its requests.
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

// requeue has a request that waits wait as another one, for a runner. Lists still have the first, as one that has ceased to wait.
func (q *Queue) requeue(it, again *item, to *runner, now time.Time) {
	q.unwait(it, false)
	q.items[it.id] = again
	q.enqueue(again, to, now)
}
