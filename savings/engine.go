package savings

import (
	"cmp"
	"math/bits"
	"slices"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
)

// engine is one model on one upstream: the prompts that it was last sent, and what the ledger has
// learned of its speed and memory. Guarded by Ledger.mu.
//
// It estimates what was reused without asking the server: see estimate.
type engine struct {
	held    []*held // oldest first
	running []*Request
	ended   time.Time // when a request last ended

	names []string // of the models that it runs

	// fresh means that everything the engine holds was sent through this ledger since the load,
	// under one name. A prompt that shares nothing with it is then certainly cold.
	fresh bool
	lost  int // how often everything it held was lost

	density  density
	fits     *simplelru.LRU[uint64, fit] // by the hash of the link that the prompts have in common
	warm     [rankBuckets]mean
	guessed  speed // learned from estimates only, for estimates
	measured speed // learned from measured counts, if there are any
	decode   mean  // ms per generated token
	unsure   []sample
	busy     busyness
}

// held is a prompt that the engine was sent.
type held struct {
	chain     *prefix.Chain
	total     int // tokens; 0: unknown
	generated int // tokens of its answer
	pending   bool
	ended     time.Time // zero while it is pending
	lost      bool      // its state in the engine is gone; why and detail give the reason
	why       Reason
	detail    string
}

const (
	maxHeld      = 64
	maxHeldLinks = 1 << 16 // of all prompts together; 64 bytes each
	// A prompt's rank is how many prompts the engine has seen since. The buckets are 0, 1, 2–3,
	// 4–7, …
	rankBuckets = 7
	// Tokens that a template adds to each message, and to the start of the answer: about.
	perMessage = 5
)

// mean is a mean in which later values count most. The zero mean is empty.
type mean struct {
	v float64
	n int
}

const meanOver = 12 // samples

func (m *mean) add(v float64) {
	m.n = min(m.n+1, meanOver)
	m.v += (v - m.v) / float64(m.n)
}

// density is the number of tokens per byte of text, as a mean of the last texts, weighted.
type density struct {
	tokens, bytes float64
	n             int // texts
}

const (
	// In bytes: most tokens of shorter texts come from the template and its own system prompt.
	densityText = 500
	densityOver = 0.9 // a text's weight after the next one
	densityFew  = 3   // texts: with fewer, a surprising token count means nothing
)

func (d *density) add(tokens, bytes float64) {
	if bytes < densityText || tokens <= 0 {
		return
	}
	d.tokens, d.bytes, d.n = densityOver*d.tokens+tokens, densityOver*d.bytes+bytes, d.n+1
}

func newEngine() *engine {
	fits, err := simplelru.NewLRU[uint64, fit](maxFits, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return &engine{fits: fits}
}

// hold records that the engine is being sent a prompt.
func (e *engine) hold(chain *prefix.Chain) *held {
	links, keep := len(chain.Links), 0
	for i := len(e.held) - 1; i >= 0 && keep < maxHeld-1; i-- {
		if links += len(e.held[i].chain.Links); links > maxHeldLinks {
			break
		}
		keep++
	}
	e.held = slices.Delete(e.held, 0, len(e.held)-keep)
	h := &held{chain: chain, pending: true}
	e.held = append(e.held, h)
	return h
}

// settle records the end of a prompt. Earlier prompts that were the same are no longer needed.
func (e *engine) settle(h *held, now time.Time, total, generated int) {
	h.total, h.generated, h.pending, h.ended = total, generated, false, now
	leaf := h.chain.Leaf()
	if !slices.Contains(e.held, h) {
		return // pushed out
	}
	e.held = slices.DeleteFunc(e.held, func(other *held) bool { return other != h && !other.pending && other.chain.Leaf() == leaf })
}

func (e *engine) drop(h *held) {
	if i := slices.Index(e.held, h); i >= 0 {
		e.held = slices.Delete(e.held, i, i+1)
	}
}

func (e *engine) forget(r *Request) {
	if i := slices.Index(e.running, r); i >= 0 {
		e.running = slices.Delete(e.running, i, i+1)
	}
}

// size estimates a prompt's tokens; if nothing is learned yet, from its bytes alone.
func (e *engine) size(r *Request) float64 {
	return cmp.Or(e.tokens(r.bytes, r.chain.Messages), float64(r.bytes)/3) + 1
}

// lose marks everything that is held as lost.
func (e *engine) lose(why Lost) {
	reason, detail := ReasonEvicted, "the model was unloaded: by a client, because its keep_alive had run out, or because another model needed the memory"
	switch why {
	case LostRestart:
		reason, detail = ReasonRestart, "the upstream was restarted"
	case LostReplaced:
		detail = "the model was deleted or created anew"
	case LostReloaded:
		reason, detail = ReasonReloaded, "the model was loaded anew with other options, by a client that does not come through this proxy"
	}
	e.loseAll(reason, detail, nil)
	e.lost++
}

// loseAll marks as lost what was held before the load that the prompt but waited for; nil:
// everything.
func (e *engine) loseAll(reason Reason, detail string, but *held) {
	for _, h := range e.held {
		// A prompt that waited for the load is evaluated after it.
		if h != but && !h.lost && !(h.pending && but != nil) {
			h.lost, h.why, h.detail = true, reason, detail
		}
	}
	e.fresh = false
}

// load records that the model was loaded for the request.
func (e *engine) load(r *Request, end runners.Ending) {
	reason, detail := ReasonEvicted, "the model was not loaded: its keep_alive had run out, it was unloaded, or another model needed the memory"
	if len(end.Changes) > 0 {
		reason, detail = ReasonReloaded, "the model was loaded anew: "+join(end.Changes)
	}
	if end.Restarted {
		reason, detail = ReasonRestart, "the upstream was restarted"
	}
	e.loseAll(reason, detail, r.held)
	e.fresh = len(e.names) == 1
}

// wholeOnly reports whether the engine reuses nothing of a prompt unless the whole previous prompt
// is its beginning.
func (r *Request) wholeOnly() bool { return r.run.Sliding && r.upstream.Old }

// candidate is a possible number of reused tokens.
type candidate struct {
	tokens int
	rank   int // none for the candidate that means nothing was reused
	// share is the probability of these tokens if the prompt was reused. If the number is not
	// clear, two candidates represent one prompt, and share the probability.
	share float64
	other bool // the second of the two: expect takes the first
}

const none = -1

// before returns how many of the held prompts were sent before the request.
func (e *engine) before(r *Request) int {
	if i := slices.Index(e.held, r.held); r.held != nil && i >= 0 {
		return i
	}
	return len(e.held)
}

// candidates returns what a prompt of total tokens (0: estimate it) may have reused of what the
// engine holds, most tokens first, each with its best rank.
func (e *engine) candidates(r *Request, total int) []candidate {
	var list []candidate
	rank, deepest := 0, 0
	for i := e.before(r) - 1; i >= 0; i-- {
		h := e.held[i]
		if h.lost {
			continue
		}
		s := prefix.Common(r.chain.Links, h.chain.Links)
		// A later prompt continued this one in its slot, so this one is no longer there by itself.
		continued := s.Links == len(h.chain.Links) && s.Links < deepest
		deepest = max(deepest, s.Links)
		if s.Links >= 2 && s.Bytes > 0 && !continued {
			list = e.tokensOf(list, rank, r, h, s, total)
		}
		rank++
	}
	if r.known > max(2, deepest) && r.record.Warm {
		s := prefix.At(r.chain.Links, r.known)
		list = e.tokensOf(list, maxHeld, r, nil, s, total)
	}
	slices.SortFunc(list, mostTokens)
	return list
}

// mostTokens orders candidates by tokens, most first, then by rank.
func mostTokens(a, b candidate) int { return cmp.Or(b.tokens-a.tokens, a.rank-b.rank) }

// tokensOf appends to the list how many tokens of a prompt of total tokens (0: estimate it) the
// engine can reuse of h (nil: of some prompt that has s in common with it).
func (e *engine) tokensOf(list []candidate, rank int, r *Request, h *held, s prefix.Shared,
	total int) []candidate {
	if total == 0 {
		total = int(e.tokens(r.bytes, r.chain.Messages))
	}
	whole := h != nil && s.Links == len(h.chain.Links)
	switch {
	case total == 0, r.wholeOnly() && !whole:
		return list
	case whole && h.total > 0:
		// The whole earlier prompt, and its answer if the new prompt continues with it.
		n := h.total
		if s.Links < len(r.chain.Links) {
			n += h.generated
		}
		return append(list, candidate{tokens: min(n, total-1), rank: rank, share: 1})
	}
	// The tokens after the last common link are their share of the text, plus what the template
	// adds. If several prompts with that link were seen, they show how many tokens it has.
	perByte := max(0, float64(total-perMessage*(r.chain.Messages+1))/float64(max(1, r.bytes)))
	shared := s.Bytes
	if l, ok := s.Next(r.chain.Links); ok && s.Offset > 0 {
		shared += prefix.BlockPart(l) / 2 // they diverge somewhere within this part
	}
	last := r.chain.Links[s.Links-1]
	y, x := afterLink(r.chain, last, total)
	plain, line := y-perByte*x, e.line(last, h)
	reused := line.with(x, y).intercept(perByte)
	// A line through texts of other kinds can be far off, since the text up to the link has no
	// density of its own: keep it within bounds.
	text, added := perByte*float64(last.Bytes), float64(perMessage*max(0, int(last.Message)+1))
	after := perByte * float64(min(shared, r.bytes)-last.Bytes)
	reused = min(max(reused, text/2), 2*text+added) + after
	within := func(n float64) int { return max(0, min(int(n+0.5), total-1)) }
	likely := candidate{tokens: within(reused), rank: rank, share: 1}
	// A line through few prompts may mislead if their texts are of different kinds. Then the share
	// of the text is as likely, and the time has to decide.
	if n := within(plain + after); line.few() && n > 0 && abs(n-likely.tokens)*20 > total {
		likely.share = 0.5
		list = append(list, candidate{tokens: n, rank: rank, share: 0.5, other: true})
	}
	if likely.tokens > 0 {
		list = append(list, likely)
	}
	return list
}

// afterLink returns a prompt's tokens without those that the template adds after the link, and the
// bytes of its text after the link.
func afterLink(c *prefix.Chain, l prefix.Link, total int) (y, x float64) {
	messages := c.Messages - max(0, int(l.Message))
	return float64(total - perMessage*messages), float64(c.Bytes() - l.Bytes)
}

// fit is a line through prompts that have a link in common: tokens over bytes of text after the
// link.
type fit struct{ n, x, y, xx, xy float64 } // sums

const (
	maxFits = 256
	// fewFits is how many prompts it takes to trust a line.
	fewFits = 4
	// ridge is the weight of the known slope against the samples, in square bytes: tokens scatter
	// by about eight around the line, and slopes by 20 % of some 0.5 tokens a byte.
	ridge = 8 * 8 / (0.1 * 0.1)
)

func (f fit) with(x, y float64) fit {
	if f.n >= 50 { // later ones count most
		f = fit{f.n / 2, f.x / 2, f.y / 2, f.xx / 2, f.xy / 2}
	}
	return fit{f.n + 1, f.x + x, f.y + y, f.xx + x*x, f.xy + x*y}
}

// intercept returns the tokens of the text up to the link, given an approximate slope in tokens per
// byte.
func (f fit) intercept(slope float64) float64 {
	mx, my := f.x/f.n, f.y/f.n
	slope = (f.xy - f.n*mx*my + ridge*slope) / (f.xx - f.n*mx*mx + ridge)
	return my - slope*mx
}

// few reports whether the line has too few prompts to be trusted.
func (f fit) few() bool { return f.n > 0 && f.n < fewFits }

// line returns the line learned from prompts that have the link in common, or else one through h.
func (e *engine) line(l prefix.Link, h *held) fit {
	f, ok := e.fits.Peek(l.Hash)
	if !ok && h != nil && h.total > 0 {
		y, x := afterLink(h.chain, l, h.total)
		f = f.with(x, y)
	}
	return f
}

// tokens estimates a prompt's tokens; 0 if nothing is learned yet.
func (e *engine) tokens(bytes, messages int) float64 {
	if e.density.n == 0 {
		return 0
	}
	return e.density.tokens/e.density.bytes*float64(bytes) + float64(perMessage*(messages+1))
}

func bucket(rank int) int { return min(bits.Len(uint(rank)), rankBuckets-1) }

// chance returns how often a prompt of this rank was found warm. old: see Upstream.
func (e *engine) chance(rank int, old bool) float64 {
	m := e.warm[bucket(rank)]
	prior, most := 0.5, 0.9 // the next workload may be different
	switch {
	case rank == 0: // a slot always keeps its last prompt
		prior, most = 0.95, 0.97
	case old: // no host cache: only slots hold prompts, and by default there is one slot
		prior = 0.15
	}
	// The prior counts like two observations.
	return min(max((m.v*float64(m.n)+2*prior)/float64(m.n+2), 1-most), most)
}

// expect returns how many tokens the request is expected to reuse.
func (e *engine) expect(r *Request) (int, bool) {
	if !r.chain.HasPrompt() || e.density.n == 0 {
		return 0, false
	}
	if !r.run.WasLoaded {
		return 0, r.run.LoadKnown
	}
	for _, c := range e.candidates(r, 0) {
		if !c.other && e.chance(c.rank, r.upstream.Old) >= 0.5 {
			return c.tokens, true
		}
	}
	return 0, true
}

func toMs(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// learn learns from a finished request.
func (e *engine) learn(r *Request, o Outcome, g guess, entry *Entry) {
	if o.Total == 0 || entry.Truncated {
		return
	}
	e.density.add(float64(o.Total-perMessage*(r.chain.Messages+1)), float64(r.bytes))
	e.learnFits(r, o.Total)
	ms, decode := toMs(o.PromptEval), r.decode(o)
	if decode > 0 {
		e.decode.add(decode)
	}
	switch {
	case g.sure:
		e.guessed.add(o.Total-g.reused, o.Total, ms, decode)
	case ms > 0 && !e.guessed.known() && !g.known && o.Total >= 16:
		e.learnCold(sample{float64(o.Total), ms, decode})
	}
	if entry.Basis == Measured {
		e.measured.add(entry.Tokens.Evaluated, o.Total, ms, 0)
	}
	// A doubtful estimate must not teach: a wrong one would make the next wrong one more probable.
	if g.sure && g.best.tokens*10 >= o.Total {
		hit := 0.0
		if g.picked.rank == g.best.rank || g.reused*10 >= g.best.tokens*8 {
			hit = 1
		}
		e.warm[bucket(g.best.rank)].add(hit)
	}
}

// learnCold learns from prompts that may have been warm, as long as nothing better is known: of
// three, it takes the slowest per token to be cold.
func (e *engine) learnCold(s sample) {
	if e.unsure = append(e.unsure, s); len(e.unsure) < 3 {
		return
	}
	slowest := slices.MaxFunc(e.unsure, func(a, b sample) int {
		return cmp.Compare(a.ms/a.total, b.ms/b.total)
	})
	e.guessed.add(int(slowest.total), int(slowest.total), slowest.ms, slowest.decode)
	e.unsure = nil
}

func abs(n int) int { return max(n, -n) }

// learnFits learns from the prompt how many tokens the links have that it shares with earlier
// prompts.
func (e *engine) learnFits(r *Request, total int) {
	const most = 8 // links
	var seen [most]uint64
	n := 0
	for i := e.before(r) - 1; i >= 0 && n < most; i-- {
		h := e.held[i]
		if h.total == 0 {
			continue
		}
		s := prefix.Common(r.chain.Links, h.chain.Links)
		if s.Links < 3 || s.Links == len(h.chain.Links) {
			continue
		}
		last := r.chain.Links[s.Links-1]
		if slices.Contains(seen[:n], last.Hash) {
			continue
		}
		seen[n] = last.Hash
		n++
		y, x := afterLink(r.chain, last, total)
		e.fits.Add(last.Hash, e.line(last, h).with(x, y))
	}
}

// saved returns how long evaluating the reused tokens would have taken; 0 if nothing is learned
// yet.
func (e *engine) saved(reused, total int) time.Duration {
	from := &e.measured
	if !from.known() {
		from = &e.guessed
	}
	if !from.known() {
		return 0
	}
	return time.Duration(min(from.perToken(total)*float64(reused), maxTime.Seconds()*1000) * float64(time.Millisecond))
}

// truncated reports whether a prompt of total tokens was probably cut: its text suggests more
// tokens than the context can hold, and it has as many as Ollama leaves of such a prompt, which is
// the whole context or half of it.
func (e *engine) truncated(r *Request, total int) bool {
	ctx := cmp.Or(r.run.Options.NumCtx(), r.run.Context)
	if ctx == 0 || total == 0 || e.density.n < densityFew {
		return false
	}
	predicted := e.tokens(r.bytes, r.chain.Messages)
	near := func(n int) bool { return total <= n+n/16 && total >= n-n/16 }
	return predicted > 1.2*float64(ctx) && float64(total) < 0.75*predicted && (near(ctx) || near(ctx/2))
}
