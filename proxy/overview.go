package proxy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/livepage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	pageWaitingMost = 50 // waiting requests on the page
	pageContexts    = 20 // stored contexts on the page
)

// overview is the page's data: a livepage.Source.
type overview struct{ *Handler }

// Parts returns everything except the finished requests. Times are absolute (ms since 1970), not
// ages, so that unchanged data need not be sent again.
func (o overview) Parts() []livepage.Part {
	now := time.Now()
	var lanes schedule.Stats // asked once: the scheduler waits meanwhile
	if o.Lanes != nil {
		lanes = o.Lanes.Stats()
	}
	return []livepage.Part{
		{Name: "proxy", Data: o.pageProxy()},
		{Name: "problems", Data: o.problems(now, lanes)},
		{Name: "totals", Data: o.timeline.counted()},
		{Name: "queue", Data: o.pageQueue(now)},
		{Name: "running", Data: o.timeline.under()},
		{Name: "series", Data: o.timeline.series(now)},
		{Name: "upstreams", Data: o.pageUpstreams(lanes)},
		{Name: "answers", Data: o.pageAnswers()},
		{Name: "contexts", Data: o.pageStored()},
		{Name: "fleet", Data: o.pageFleet()},
	}
}

// Since returns the finished requests.
func (o overview) Since(from uint64) ([]any, uint64) {
	list, next := o.timeline.since(from)
	entries := make([]any, len(list))
	for i := range list {
		entries[i] = &list[i]
	}
	return entries, next
}

// pageProxy is the page's data about this process.
type pageProxy struct {
	Version  string  `json:"version"`
	Started  int64   `json:"started"`
	Price    float64 `json:"price,omitempty"`
	Bin      int     `json:"bin_s"`
	Requests int     `json:"remembered"` // how many requests are remembered at most
	Lanes    bool    `json:"lanes"`      // requests wait for lanes
	Keys     bool    `json:"keys"`       // API keys are required
	Held     string  `json:"keep_alive"` // the text of --keep-alive
}

func (h *Handler) pageProxy() pageProxy {
	return pageProxy{
		Version: h.Version, Started: h.timeline.began.UnixMilli(), Price: h.Price,
		Bin: int(binWidth / time.Second), Requests: timelineMost, Lanes: h.Lanes != nil,
		Keys: h.Guard.Keys != nil, Held: h.Live().KeepAlive.String(),
	}
}

// pageQueue is the page's data about waiting requests.
type pageQueue struct {
	Waiting  int           `json:"waiting"` // for a lane, for memory, or for a server
	Queued   int           `json:"queued"`  // of these, for a lane
	Requests []pageWaiting `json:"requests"`
}

// pageWaiting is one request that waits for a lane.
type pageWaiting struct {
	Place    int    `json:"place"`
	Name     string `json:"name,omitempty"`
	Client   string `json:"client"`
	Model    string `json:"model"`
	NumCtx   int    `json:"num_ctx,omitempty"`
	Upstream string `json:"upstream"`
	Priority string `json:"priority"`
	Tokens   int    `json:"tokens"` // estimated length of its prompt
	Since    int64  `json:"since"`
	// Start is when it is expected to begin, in whole seconds; 0: unknown.
	Start int64 `json:"start,omitempty"`
}

func (h *Handler) pageQueue(now time.Time) pageQueue {
	q := pageQueue{Waiting: int(h.Waiting()), Requests: []pageWaiting{}}
	if h.Lanes == nil {
		return q
	}
	waits := h.Lanes.Waiting(pageWaitingMost)
	q.Queued = waits.Total
	for _, w := range waits.First {
		e := h.waitingEntry(w)
		p := pageWaiting{
			Place: e.Place, Name: e.Name, Client: e.Client, Model: e.Model, NumCtx: w.Options.NumCtx(),
			Upstream: e.Upstream, Priority: e.Priority, Tokens: e.Tokens,
			Since: now.Add(-w.Age).UnixMilli(),
		}
		if w.StartKnown {
			p.Start = now.Add(w.Start).Round(time.Second).UnixMilli()
		}
		q.Requests = append(q.Requests, p)
	}
	return q
}

// pageUpstream is the page's data about a server.
type pageUpstream struct {
	upstreamEntry
	Away  bool        `json:"away"`
	Loops bool        `json:"loops,omitempty"` // its requests come back to this proxy
	Seen  int64       `json:"seen,omitempty"`
	Until int64       `json:"until,omitempty"` // when requests stop waiting for it
	Loads []pageModel `json:"loads"`           // the loaded models
	Slots []pageSlots `json:"slots"`
}

// pageModel is a model in a server's memory.
type pageModel struct {
	Model   string `json:"model"`
	Size    int64  `json:"size"`
	GPU     int64  `json:"gpu"` // the part of Size in GPU memory, in bytes
	Context int    `json:"context"`
	Expires int64  `json:"expires,omitempty"` // 0: never
	Running int    `json:"running"`           // requests through this proxy in progress
	// Holder is the source of the keep_alive in force: proxy, client, or others.
	Holder string `json:"holder"`
	For    string `json:"for,omitempty"` // the keep_alive in force
}

// pageSlots are the lanes of a model with one set of options.
type pageSlots struct {
	Runner  string `json:"runner"` // as in drawn.Runner
	Model   string `json:"model"`
	NumCtx  int    `json:"num_ctx,omitempty"`
	Loaded  bool   `json:"loaded"`
	Waiting int    `json:"waiting"`
	Busy    int    `json:"busy"`
	Held    int    `json:"held"`
	Lanes   int    `json:"lanes"`  // 0: no limit
	Source  string `json:"source"` // learned, given, told (by the engine) or none
}

func (h *Handler) pageUpstreams(lanes schedule.Stats) []pageUpstream {
	var list []pageUpstream
	present := h.present()
	for _, b := range present {
		st := b.State()
		u := pageUpstream{
			upstreamEntry: h.upstream(b), Away: st.Away, Loops: b.looped.Load(),
			Loads: []pageModel{}, Slots: []pageSlots{},
		}
		if !st.Up && !st.Seen.IsZero() {
			u.Seen = st.Seen.UnixMilli()
		}
		if st.Away && !st.Until.IsZero() {
			u.Until = st.Until.UnixMilli()
		}
		for _, l := range st.Loaded {
			if st.Up {
				u.Loads = append(u.Loads, b.pageModel(l))
			}
		}
		list = append(list, u)
	}
	for _, x := range lanes.Runners {
		i := indexOf(present, x.Runner.Upstream)
		if i < 0 {
			continue // it is gone
		}
		u := &list[i]
		s := pageSlots{
			Runner: hashed(x.Runner), Model: h.modelName(x.Runner), NumCtx: x.Runner.Options.NumCtx(),
			Loaded: x.Loaded, Waiting: x.Waiting, Busy: x.Busy, Held: x.Held, Lanes: x.Lanes,
			Source: "given",
		}
		switch {
		case x.Lanes == 0:
			s.Source = "none"
		case x.Told:
			s.Source = "told"
		case x.Learned:
			s.Source = "learned"
		}
		u.Slots = append(u.Slots, s)
	}
	return list
}

// pageModel returns the page's data about a loaded model.
func (b *backend) pageModel(l upstream.Loaded) pageModel {
	m := pageModel{
		Model: upstream.DisplayName(l.Name), Size: l.Size, GPU: l.SizeVRAM, Context: l.ContextLength,
	}
	// Ollama reports a model that is kept for ever as expiring in some hundred years.
	if time.Until(l.ExpiresAt) < 10*365*24*time.Hour {
		m.Expires = l.ExpiresAt.Round(time.Second).UnixMilli()
	}
	m.Holder, m.For, m.Running = b.residency.holder(b.runners.Weights(upstream.ModelKey(l.Name)))
	return m
}

// The holders of a model in memory.
const (
	holderProxy  = "proxy"  // the proxy's own keep_alive
	holderClient = "client" // a keep_alive that a client has asked for
	holderOthers = "others" // no keep_alive that passed through the proxy is known to be in force
)

// holder returns the source of the keep_alive in force for a model, its text, and how many requests
// to the model are in progress.
func (r *residency) holder(weights string) (who, long string, running int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, ok := r.models.Peek(weights)
	if !ok {
		return holderOthers, "", 0
	}
	if m.keptAt.IsZero() {
		return holderOthers, "", m.inFlight
	}
	who, long = holderProxy, "ever"
	if m.keptFor != upstream.Forever {
		long = m.keptFor.String()
	}
	if m.longest != 0 && m.keptFor == m.longest {
		who = holderClient
	}
	return who, long, m.inFlight
}

// pageContextsPart are the stored contexts; nil if contexts are not stored.
type pageContextsPart struct {
	States    int               `json:"states"`
	Bytes     int64             `json:"bytes"`
	Limit     int64             `json:"limit"`
	Saved     uint64            `json:"saved"`
	Attached  uint64            `json:"attached"`
	Filled    uint64            `json:"filled"`
	Tokens    uint64            `json:"tokens"` // tokens that did not have to be evaluated again
	Seconds   float64           `json:"seconds"`
	Failed    map[string]uint64 `json:"failed"`
	Refused   uint64            `json:"refused"`
	Contexts  []pageContext     `json:"contexts"`
	NotListed int               `json:"not_listed"`
}

// pageContext is one stored context.
type pageContext struct {
	Model  string  `json:"model"`
	Tokens int     `json:"tokens"`
	Bytes  int64   `json:"bytes"`
	Cost   float64 `json:"cost_s"` // estimated seconds to evaluate it again
	Uses   int     `json:"uses"`
	Made   int64   `json:"made"`
	Used   int64   `json:"used"`
}

func (h *Handler) pageStored() *pageContextsPart {
	if h.Contexts == nil {
		return nil
	}
	c, st, states := h.Contexts.Counts(), h.Contexts.Files.Stats(), h.Contexts.Files.List()
	p := &pageContextsPart{
		States: st.States, Bytes: st.Bytes, Limit: st.Limits.Bytes, Refused: st.Refused,
		Saved: c.Saved, Attached: c.Attached, Filled: c.Filled, Tokens: c.Tokens,
		Seconds: c.Evaluation.Seconds(), Failed: c.Failed, Contexts: []pageContext{},
	}
	for _, s := range states[:min(len(states), pageContexts)] {
		p.Contexts = append(p.Contexts, pageContext{
			s.Model, s.Tokens, s.Bytes, s.Cost.Seconds(), s.Uses, s.Made.UnixMilli(), s.Used.UnixMilli(),
		})
	}
	p.NotListed = len(states) - len(p.Contexts)
	return p
}

// problem is a current problem and its remedy.
type problem struct {
	Kind  string `json:"kind"`  // from a fixed set, for tests and styles
	Level string `json:"level"` // error, warning or note
	What  string `json:"what"`
	Do    string `json:"do"`
}

const (
	isError   = "error"
	isWarning = "warning"
	isNote    = "note"
	// lately is how old a finished request may be to count as a sign of a current problem.
	lately = 5 * time.Minute
	// longWait is the wait from which the page reports a request as a problem.
	longWait = 30 * time.Second
)

// problems returns the current problems, the worst first.
func (h *Handler) problems(now time.Time, lanes schedule.Stats) []problem {
	list := []problem{}
	up := 0
	for _, b := range h.backends() {
		if b.answers() && b.State().Up {
			up++
		}
		list = append(list, h.wrongWith(b)...)
	}
	list = append(list, h.timeline.problems(now)...)
	list = append(list, h.peersAway()...)
	list = append(list, waitingLong(now, lanes)...)
	if h.Answers != nil && h.Answers.Stats().Down {
		list = append(list, problem{"answers", isWarning,
			"The store of kept answers cannot be used: everything is computed.",
			"The log says why, and when it is back; it is tried again by itself (--answers-store, docs/answers.md)."})
	}
	if h.Contexts != nil {
		failed := h.Contexts.Counts().Failed
		for _, reason := range []string{contexts.FailedSave, contexts.FailedAttach} {
			if n := failed[reason]; n > 0 {
				list = append(list, problem{"contexts", isWarning,
					fmt.Sprintf("Stored contexts that could not be %sed since the start: %d.", strings.TrimSuffix(reason, "e"), n),
					"The log says why; most often the disk is full, slow or read-only (docs/contexts.md)."})
			}
		}
	}
	levels := []string{isError, isWarning, isNote}
	slices.SortStableFunc(list, func(a, b problem) int {
		return cmp.Compare(slices.Index(levels, a.Level), slices.Index(levels, b.Level))
	})
	return list
}

// wrongWith returns a server's problems.
func (h *Handler) wrongWith(b *backend) (list []problem) {
	st := b.State()
	add := func(kind, level, what, do string) { list = append(list, problem{kind, level, what, do}) }
	switch {
	case b.looped.Load():
		add("loop", isError, fmt.Sprintf("Requests to %s at %s come back to this proxy.", b.Name, b.URL),
			"Point --upstream to Ollama itself. If Ollama should be there, OLLAMA_HOST may have made "+
				"it listen elsewhere.")
	case st.Polled.IsZero():
	case !st.Up:
		what := fmt.Sprintf("%s at %s does not answer: %s.", b.Name, b.URL, reason(st.Err))
		add("away", isError, what, "Start Ollama there (ollama serve), or say with --upstream where it is.")
	}
	if b.draining.Load() {
		add("draining", isNote, fmt.Sprintf("%s is draining: it gets no new requests.", b.Name),
			"Resume it when you are done with it.")
	}
	if st.Simulated {
		add("simulated", isNote, fmt.Sprintf("%s is simulated: its answers and figures are made up.", b.Name), "")
	}
	for _, l := range st.Loaded {
		if st.Up && l.SizeVRAM > 0 && l.SizeVRAM < l.Size {
			add("cpu", isWarning, fmt.Sprintf("%d %% of %s are not in GPU memory on %s, which is slow.",
				100-100*l.SizeVRAM/l.Size, l.Name, b.Name),
				"Ask for a smaller num_ctx, use a smaller quantization, or unload other models.")
		}
	}
	return list
}

// waitingLong reports requests that have waited too long.
func waitingLong(now time.Time, lanes schedule.Stats) []problem {
	var oldest time.Duration
	n := 0
	for p, w := range lanes.Waiting {
		n += w.Requests
		if p != schedule.Batch { // batch requests may wait
			oldest = max(oldest, w.Oldest)
		}
	}
	if oldest < longWait {
		return nil
	}
	since := now.Add(-oldest).Format("15:04:05")
	return []problem{{"waiting", isWarning,
		fmt.Sprintf("Requests have waited since %s; now there are %d.", since, n),
		"Give Ollama more slots (OLLAMA_NUM_PARALLEL) or another server (--upstream), or mark what can " +
			"wait with X-Cacheproxy-Priority: batch."}}
}

// evidence is what recent requests reveal about problems.
type evidence struct {
	counts map[string]int    // number of requests by kind of problem
	said   map[string]string // the refusal or error of one such request, by outcome
	// contexts has the num_ctx values that requests asked for, by model.
	contexts map[string]map[int]bool
}

// evidence collects the evidence from requests that ended at this time (ms since 1970) or later.
func (t *timeline) evidence(since int64) evidence {
	e := evidence{map[string]int{}, map[string]string{}, map[string]map[int]bool{}}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.bins {
		if b := &t.bins[i]; b.at*binWidth.Milliseconds() >= since {
			for i, n := range b.wrong {
				e.counts[string(wrongs[i])] += n
			}
		}
	}
	for i := range t.ring {
		if d := &t.ring[i]; d.At+int64(d.Duration) >= since {
			e.add(d)
		}
	}
	return e
}

func (e *evidence) add(d *drawn) {
	if d.Said != "" {
		e.said[string(d.Outcome)] = d.Said
	}
	if d.told == nil {
		return
	}
	if d.Truncated {
		e.counts["truncated"]++
	}
	if d.Loaded {
		e.counts[string(d.Reason)]++
	}
	if e.contexts[d.Model] == nil {
		e.contexts[d.Model] = map[int]bool{}
	}
	e.contexts[d.Model][d.NumCtx] = true
}

// disagree reports whether requests for one model asked for more than one num_ctx.
func (e *evidence) disagree() bool {
	for _, seen := range e.contexts {
		if len(seen) > 1 {
			return true
		}
	}
	return false
}

// symptoms are the problems that evidence can show: the smallest count, the severity, and the
// remedy.
var symptoms = []struct {
	kind        string
	least       int
	level       string
	what, todo  string
	onlyNumCtx  bool // only if clients disagree on num_ctx …
	otherNumCtx bool // … or only if they agree
}{
	{kind: string(Unreachable), least: 1, level: isError,
		what: "Requests in the last 5 minutes that did not reach Ollama: %d.",
		todo: "Start the server that is shown as away below, or correct --upstream."},
	{kind: string(UpstreamError), least: 1, level: isError,
		what: "Requests in the last 5 minutes that Ollama answered with an error: %d.",
		todo: "Open one of them below, and read Ollama's log of that time."},
	{kind: string(Aborted), least: 1, level: isError,
		what: "Answers in the last 5 minutes that broke off: %d.",
		todo: "Ollama, or something between, closed the connection: its log says why. A crash is most " +
			"often a lack of memory."},
	{kind: string(Refused), least: 1, level: isWarning,
		what: "Requests in the last 5 minutes that the proxy refused: %d.",
		todo: "Open one of them below: the reason names the setting."},
	{kind: string(savings.ReasonReloaded), least: 2, level: isWarning, onlyNumCtx: true,
		what: "Clients disagree on num_ctx. Model loads that this cost in the last 5 minutes: %d.",
		todo: "Set one num_ctx in all clients, or leave it out of them and set OLLAMA_CONTEXT_LENGTH for " +
			"Ollama; or start the proxy with --num-ctx-policy pin. 'ollama-cacheproxy doctor' says who asks for what."},
	{kind: string(savings.ReasonReloaded), least: 2, level: isWarning, otherNumCtx: true,
		what: "Clients ask for different options. Model loads that this cost in the last 5 minutes: %d.",
		todo: "Have all clients ask for the same options; a request's detail below says which one differs."},
	{kind: string(savings.ReasonEvicted), least: 2, level: isWarning,
		what: "Models push each other out of memory. Loads that this cost in the last 5 minutes: %d.",
		todo: "Use smaller models or contexts, more memory (OLLAMA_MAX_LOADED_MODELS), or a server for each."},
	{kind: "truncated", least: 1, level: isWarning,
		what: "Prompts in the last 5 minutes whose beginning Ollama has probably cut off: %d.",
		todo: "Ask for a larger num_ctx, or send less."},
}

// problems derives problems from recently finished requests.
func (t *timeline) problems(now time.Time) (list []problem) {
	e := t.evidence(now.Add(-lately).UnixMilli())
	for _, s := range symptoms {
		n := e.counts[s.kind]
		if n < s.least || s.onlyNumCtx && !e.disagree() || s.otherNumCtx && e.disagree() {
			continue
		}
		what := fmt.Sprintf(s.what, n)
		if text := e.said[s.kind]; text != "" {
			what += " One of them was told: " + text + "."
		}
		list = append(list, problem{s.kind, s.level, what, s.todo})
	}
	return list
}
