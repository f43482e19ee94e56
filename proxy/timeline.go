package proxy

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	timelineMost = 2000             // finished requests that the page can draw
	runningMost  = 200              // requests in progress that the page shows
	binWidth     = 10 * time.Second // of the page's charts over time …
	binMost      = 360              // … which cover the last hour
	alikeMost    = 10               // similar failures in a bin that are shown singly
)

// timeline remembers the latest requests to models for the page: the lane of each, and what it did
// there. It records each request when it is sent and when it ends, even if nobody watches, and
// holds no prompt text. Its methods may be called from any goroutine.
type timeline struct {
	mu      sync.Mutex
	began   time.Time
	ring    []drawn  // the latest finished requests; drawn.Number counts them from 1
	next    uint64   // how many have ended so far
	running []*onWay // in the order of sending
	totals  totals
	bins    [binMost]bin // a ring, indexed by time
}

// onWay is a request that was sent and has not ended. Only first changes.
type onWay struct {
	drawn
	first atomic.Int64 // ms from arrival to the first byte of the answer; 0 before that
}

// drawn is a request as the page draws it. Times are in milliseconds; unknown values are left out.
type drawn struct {
	Number   uint64  `json:"number,omitempty"` // counts finished requests; 0 before the end
	Entry    uint64  `json:"entry,omitempty"`  // its number in the ledger, as in pathRequests
	At       int64   `json:"at"`               // time of arrival, since 1970
	Waited   float64 `json:"waited,omitempty"` // in the proxy
	Sent     float64 `json:"sent,omitempty"`   // from arrival until it was sent
	First    float64 `json:"first,omitempty"`  // … until the first byte of the answer
	Duration float64 `json:"duration,omitempty"`

	Endpoint string `json:"endpoint"`
	Model    string `json:"model,omitempty"`
	NumCtx   int    `json:"num_ctx,omitempty"` // the value that it asks for
	Runner   string `json:"runner,omitempty"`  // the model as loaded there, see pageSlots
	Upstream string `json:"upstream,omitempty"`
	Lane     *int   `json:"lane,omitempty"` // its lane of the model there; nil if it holds none
	Priority string `json:"priority,omitempty"`
	Name     string `json:"name,omitempty"` // of its API key
	Group    string `json:"group,omitempty"`
	Talk     string `json:"conversation,omitempty"`

	Outcome   Outcome `json:"outcome,omitempty"` // "" while it is in progress
	Status    int     `json:"status,omitempty"`
	Said      string  `json:"said,omitempty"` // why the proxy refused it
	Retries   int     `json:"retries,omitempty"`
	Prewarm   string  `json:"prewarm,omitempty"`
	Simulated bool    `json:"simulated,omitempty"`
	*told
	*spared // nil if nothing was looked for among the kept answers
}

// told is the part of a request that the ledger knows.
type told struct {
	Prefix    string          `json:"prefix,omitempty"`
	Basis     savings.Basis   `json:"basis"`
	Total     int             `json:"total,omitempty"`
	Reused    *int            `json:"reused,omitempty"`
	Evaluated *int            `json:"evaluated,omitempty"`
	Generated int             `json:"generated,omitempty"`
	Verdict   savings.Verdict `json:"verdict"`
	Reason    savings.Reason  `json:"reason,omitempty"`
	Detail    string          `json:"detail,omitempty"`
	Loaded    bool            `json:"loaded,omitempty"`
	Truncated bool            `json:"truncated,omitempty"`
	Broken    bool            `json:"broken,omitempty"`
	Load      float64         `json:"load,omitempty"`  // this and the next three are in ms
	Queue     float64         `json:"queue,omitempty"` // inside Ollama
	Prompt    float64         `json:"prompt,omitempty"`
	Eval      float64         `json:"eval,omitempty"`
}

// totals count the requests to models since the proxy started, as /metrics does.
type totals struct {
	Requests  int            `json:"requests"`
	Outcomes  map[string]int `json:"outcomes"`
	Reused    int            `json:"reused"` // tokens that servers reported as reused …
	Evaluated int            `json:"evaluated"`
	// … or the estimate if they do not report it …
	EstimatedReused    int `json:"estimated_reused"`
	EstimatedEvaluated int `json:"estimated_evaluated"`
	// … or, if neither is known, all tokens of the prompt.
	Unknown        int            `json:"unknown"`
	Generated      int            `json:"generated"`
	Loads          int            `json:"loads"`
	EstimatedLoads int            `json:"estimated_loads"`
	Truncated      int            `json:"truncated"`
	Verdicts       map[string]int `json:"verdicts"`
	Cold           map[string]int `json:"cold"` // requests by reason
	// Estimated savings, in seconds.
	SavedEvaluation float64 `json:"saved_evaluation_s"`
	SavedLoading    float64 `json:"saved_loading_s"`
	// Cached is what was not computed, by kind: in none of the figures above but Requests and
	// Outcomes.
	Cached cached `json:"cached"`
}

// bin counts the requests that ended within ten seconds.
type bin struct {
	at int64 // since 1970, in units of binWidth; 0: unused

	requests, reused, evaluated, unknown, generated, loads int

	wrong [len(wrongs)]int // by outcome
}

// wrongs are the outcomes that count as problems.
var wrongs = [...]Outcome{Unreachable, UpstreamError, Aborted, Refused}

// binEntry is a bin in the page's data: its start in seconds, then the counts in bin.
type binEntry [7]int64

func newTimeline() *timeline {
	return &timeline{
		began: time.Now(),
		totals: totals{
			Outcomes: map[string]int{}, Verdicts: map[string]int{}, Cold: map[string]int{},
			Cached: cached{}.clone(),
		},
	}
}

// shows reports whether the page shows a request: only one that asks a model for something. A
// client without a required API key must not displace other requests.
func (ex *exchange) shows() bool { return ex.infers() && !ex.stranger }

// draw returns what is known of a request before its end.
func (ex *exchange) draw() drawn {
	d := drawn{
		At: ex.start.UnixMilli(), Waited: ms(ex.Waited + ex.paused), Endpoint: ex.Endpoint,
		Priority: ex.Priority, Name: ex.Name, Retries: len(ex.Retries),
	}
	if d.Model = ex.Model; ex.key != "" {
		d.Model = upstream.DisplayName(ex.key)
	}
	if ex.up != nil {
		d.Upstream = ex.up.Name
	}
	if ex.grant != nil {
		lane := ex.grant.Lane
		d.Lane = &lane
		d.Runner = hashed(schedule.Runner{Upstream: ex.grant.Upstream, Options: ex.grant.Options})
	}
	if c := ex.chain; c != nil {
		d.NumCtx = c.Runner.NumCtx()
		if c.HasPrompt() {
			d.Group = savings.PrefixString(cmp.Or(c.Opening, c.Leaf()))
			d.Talk = savings.PrefixString(c.Conversation)
		}
	}
	return d
}

// sent records that a request is sent.
func (t *timeline) sent(ex *exchange) {
	if !ex.shows() {
		return
	}
	w := &onWay{drawn: ex.draw()}
	w.Sent = ms(time.Since(ex.start))
	t.mu.Lock()
	defer t.mu.Unlock()
	ex.shown = w
	t.running = append(t.running, w)
}

// retracted records that a request was not sent after all.
func (t *timeline) retracted(ex *exchange) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(ex)
}

// remove removes a request from the ones in progress. t.mu must be held.
func (t *timeline) remove(ex *exchange) {
	if i := slices.Index(t.running, ex.shown); i >= 0 {
		t.running = slices.Delete(t.running, i, i+1)
	}
	ex.shown = nil
}

// answers records that a request's answer has begun to arrive.
func (ex *exchange) answers() {
	if ex.shown != nil {
		ex.shown.first.Store(ex.FirstByte.Milliseconds())
	}
}

// ended records that a request has ended.
func (t *timeline) ended(ex *exchange) {
	if !ex.shows() {
		return
	}
	d := ex.draw()
	if ex.shown != nil {
		d.Sent = ex.shown.Sent
	}
	d.First, d.Duration = ms(ex.FirstByte), ms(ex.Duration)
	d.Outcome, d.Status, d.Said = ex.Outcome, ex.Status, ex.said
	d.Prewarm, d.Simulated, d.spared = ex.Prewarm, ex.Simulated, sparedOf(ex.Cache)
	if e := ex.Savings; e != nil {
		d.Entry, d.told = e.ID, toldOf(e)
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(ex)
	if ex.part { // the client's request, which it is a part of, is counted and shown
		return
	}
	if ex.Prewarm == "" { // otherwise it is the proxy's own request
		t.totals.add(ex.Exchange)
	}
	if alike := t.bin(now).add(ex.Exchange); alike <= alikeMost || ex.Savings != nil {
		t.keep(d)
	}
}

// keep remembers a finished request. The caller drops most of many that fail alike, so that they do
// not displace all others. t.mu must be held.
func (t *timeline) keep(d drawn) {
	t.next++
	d.Number = t.next
	if len(t.ring) < timelineMost {
		t.ring = append(t.ring, d)
	} else {
		t.ring[(t.next-1)%timelineMost] = d
	}
}

func toldOf(e *savings.Entry) *told {
	x := &told{
		Prefix: savings.PrefixString(e.Prefix), Basis: e.Basis, Total: e.Total, Generated: e.Generated,
		Verdict: e.Verdict, Reason: e.Reason, Detail: e.Detail, Loaded: e.Loaded,
		Truncated: e.Truncated, Broken: e.Broken,
		Load: ms(e.Load), Queue: ms(e.Queue), Prompt: ms(e.Prompt), Eval: ms(e.Eval),
	}
	if e.Tokens != nil {
		tokens := *e.Tokens
		x.Reused, x.Evaluated = &tokens.Reused, &tokens.Evaluated
	}
	return x
}

// add counts a request: see metrics.Metrics.Done.
func (t *totals) add(ex Exchange) {
	t.Requests++
	t.Outcomes[string(ex.Outcome)]++
	t.Cached.add(ex.Cache)
	e := ex.Savings
	if e == nil {
		return
	}
	switch {
	case e.Tokens == nil:
		t.Unknown += e.Total
	case e.Basis == savings.Estimated:
		t.EstimatedReused += e.Tokens.Reused
		t.EstimatedEvaluated += e.Tokens.Evaluated
	default:
		t.Reused += e.Tokens.Reused
		t.Evaluated += e.Tokens.Evaluated
	}
	t.Generated += e.Generated
	t.Verdicts[string(e.Verdict)]++
	if e.Reason != "" {
		t.Cold[string(e.Reason)]++
	}
	switch {
	case e.Loaded && e.Load > 0:
		t.Loads++
	case e.Loaded:
		t.EstimatedLoads++
	}
	if e.Truncated {
		t.Truncated++
	}
	t.SavedEvaluation += max(0, e.SavedEvaluation.Seconds())
	t.SavedLoading += max(0, e.SavedLoading.Seconds())
}

// bin returns the bin for requests that end now. t.mu must be held.
func (t *timeline) bin(now time.Time) *bin {
	at := now.UnixNano() / int64(binWidth)
	b := &t.bins[at%binMost]
	if b.at != at {
		*b = bin{at: at}
	}
	return b
}

// add counts a request, and returns how many in the bin have failed alike.
func (b *bin) add(ex Exchange) (alike int) {
	b.requests++
	if i := slices.Index(wrongs[:], ex.Outcome); i >= 0 {
		b.wrong[i]++
		alike = b.wrong[i]
	}
	e := ex.Savings
	if e == nil {
		return alike
	}
	if e.Tokens != nil {
		b.reused += e.Tokens.Reused
		b.evaluated += e.Tokens.Evaluated
	} else {
		b.unknown += e.Total
	}
	b.generated += e.Generated
	if e.Loaded {
		b.loads++
	}
	return alike
}

// counted returns a copy of the totals.
func (t *timeline) counted() totals {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.totals
	c.Outcomes, c.Verdicts, c.Cold = maps.Clone(c.Outcomes), maps.Clone(c.Verdicts), maps.Clone(c.Cold)
	c.Cached = c.Cached.clone()
	return c
}

// series returns the nonempty bins of the last hour, the oldest first.
func (t *timeline) series(now time.Time) []binEntry {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := []binEntry{}
	last := now.UnixNano() / int64(binWidth)
	for at := last - binMost + 1; at <= last; at++ {
		if b := t.bins[at%binMost]; b.at == at {
			list = append(list, binEntry{
				at * int64(binWidth/time.Second), int64(b.requests), int64(b.reused),
				int64(b.evaluated), int64(b.unknown), int64(b.generated), int64(b.loads),
			})
		}
	}
	return list
}

// under returns the requests in progress, in the order of sending.
func (t *timeline) under() []drawn {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]drawn, 0, min(len(t.running), runningMost))
	for _, w := range t.running[:min(len(t.running), runningMost)] {
		d := w.drawn
		d.First = float64(w.first.Load())
		list = append(list, d)
	}
	return list
}

// since returns the remembered requests that ended, starting at an index (the first request has
// index 0), and the index of the next one to end.
func (t *timeline) since(from uint64) ([]drawn, uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	from = max(from, t.next-uint64(len(t.ring)))
	list := make([]drawn, 0, t.next-min(from, t.next))
	for i := from; i < t.next; i++ {
		list = append(list, t.ring[i%timelineMost])
	}
	return list, t.next
}
