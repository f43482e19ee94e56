package doctor

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Facts are the input of Examine. The proxy's page has all of them but Proxy, Loaded and Changed,
// which the caller adds.
type Facts struct {
	Now   time.Time `json:"now"`
	Since time.Time `json:"since"` // the facts are complete from then on
	// Requests is the number of requests to models since then.
	Requests  int        `json:"requests"`
	Settings  Settings   `json:"settings"`
	Upstreams []Upstream `json:"upstreams"`
	Models    []Model    `json:"models"`
	Outside   []Outsider `json:"outside"`
	Answers   Answers    `json:"answers"`
	Shared    Shared     `json:"shared"`
	// Fleet is what is known of other proxies; nil without --peers.
	Fleet *Fleet `json:"fleet,omitempty"`

	// Proxy is the proxy's address, as clients name it.
	Proxy string `json:"-"`
	// Loaded has the models that each server reports as loaded now, by the server's name.
	Loaded map[string][]Resident `json:"-"`
	// Changed has the changing heads of prompts among the last requests.
	Changed []Changed `json:"-"`
}

// Answers is the store of kept answers and vectors. The zero value means that nothing is wrong.
type Answers struct {
	Down   bool   `json:"down"`   // it cannot be used at the moment
	Errors uint64 `json:"errors"` // its failed calls since the proxy was started
}

// Settings are the proxy's settings that findings depend on.
type Settings struct {
	KeepAlive       string `json:"keep_alive"`
	KeepAlivePolicy string `json:"keep_alive_policy"`
	Contexts        bool   `json:"contexts"` // stored contexts are on
}

// Upstream is a server, as the proxy sees it.
type Upstream struct {
	Name    string `json:"name"`
	URL     string `json:"url"`
	Up      bool   `json:"up"`
	Error   string `json:"error,omitempty"`
	Version string `json:"version,omitempty"`
	Here    bool   `json:"here"` // it is on the proxy's machine

	Simulated bool `json:"simulated,omitempty"`
}

// Model has the sums for one model on one server. Seconds are sums.
type Model struct {
	Name     string `json:"name"`
	Upstream string `json:"upstream"`
	Requests int    `json:"requests"`

	Tokens    int  `json:"prompt_tokens"`
	Evaluated int  `json:"evaluated_tokens"` // of the prompts for which it is known
	Estimated bool `json:"estimated"`        // part of it is an estimate

	LoadSeconds   float64 `json:"load_seconds"`
	PromptSeconds float64 `json:"prompt_seconds"`
	EvalSeconds   float64 `json:"eval_seconds"`
	// SecondsPerToken is the time to evaluate one token of a prompt; zero: not known.
	SecondsPerToken float64 `json:"seconds_per_token"`

	Askers []Asked `json:"askers"` // those with the most requests first
	Loads  []Load  `json:"loads"`
	Cold   []Cold  `json:"cold"`
	Cut    Cut     `json:"cut"`
	Lanes  Lanes   `json:"lanes"`

	Dropped      Cost   `json:"dropped_turns"`
	DroppedBy    []Name `json:"dropped_turns_by"`
	Sliding      bool   `json:"sliding_window"`
	TokenBytes   int    `json:"token_bytes"`   // approximate, in the engine's memory; 0: not known
	WorkingSet   int    `json:"working_set"`   // tokens, with shared beginnings counted once
	Working      int    `json:"conversations"` // that WorkingSet counts
	LargestAsked int    `json:"largest_num_ctx"`
	// Context is the longest context that the model was loaded with; DefaultContext is the one for
	// requests that ask for none. In tokens; zero: not known.
	Context        int `json:"context"`
	DefaultContext int `json:"default_context"`
}

// Name identifies an asker, without what it asks for.
type Name struct {
	Name   string `json:"name,omitempty"`
	Client string `json:"client"`
	Agent  string `json:"agent,omitempty"`
}

// Asked is an asker, with its use of the model.
type Asked struct {
	Asker
	Requests int     `json:"requests"`
	Loads    int     `json:"loads"` // that its requests caused
	Seconds  float64 `json:"load_seconds"`
	// OwnKeepAlive is the shortest keep_alive in its requests, in seconds; nil: they had none.
	OwnKeepAlive *float64 `json:"keep_alive_seconds,omitempty"`
}

// Cause says why a model was loaded.
type Cause string

const (
	CauseFirst     Cause = "first"     // its first use through the proxy
	CauseNumCtx    Cause = "num_ctx"   // a request asked for another context length
	CauseOptions   Cause = "options"   // … or for other options
	CauseExpired   Cause = "expired"   // its keep_alive had run out, or a client had unloaded it
	CauseEvicted   Cause = "evicted"   // another model was loaded meanwhile
	CauseRestarted Cause = "restarted" // the server was restarted
	CauseUnknown   Cause = "unknown"   // nothing that came through the proxy explains it
)

// Load has the loads with one cause, and their cost.
type Load struct {
	Cause Cause `json:"cause"`
	// By is the model that was loaded before, if the cause is CauseEvicted.
	By string `json:"by,omitempty"`
	Cost
	// If the cause is CauseExpired, Gap is the median time for which the model had not been used,
	// and KeepAlive the longest keep_alive in force, in seconds. Own means that it was set by a
	// client.
	Gap       float64 `json:"gap_seconds,omitempty"`
	KeepAlive float64 `json:"keep_alive_seconds,omitempty"`
	Own       bool    `json:"own_keep_alive,omitempty"`

	gaps []float64
}

// Cost is the number of requests concerned, and what they cost.
type Cost struct {
	Count int `json:"count"`
	// Tokens is how many were evaluated again.
	Tokens int `json:"tokens"`
	// Seconds are as answers reported them: for loads, the times of loading.
	Seconds float64 `json:"seconds"`
}

// Cold has the prompts that were not warm for one of the ledger's reasons.
type Cold struct {
	Reason string `json:"reason"`
	Cost
}

// Cut has the prompts that the server has probably truncated.
type Cut struct {
	Count int `json:"count"`
	// Needed is the approximate length of the largest, in tokens; Context is what it was given.
	Needed  int `json:"needed_tokens"`
	Context int `json:"context"`
	// By has their senders.
	By []Name `json:"by"`
}

// Lanes says how requests waited for slots, without those of the lowest priority.
type Lanes struct {
	Requests int     `json:"requests"`
	Waited   int     `json:"waited"` // for a second or longer
	Seconds  float64 `json:"wait_seconds"`
	Service  float64 `json:"service_seconds"` // from the time of sending
	// Busy is how many ran at most at a time, batch included; Wanted is how many were running or
	// waiting at most at a time, without batch.
	Busy   int `json:"busy"`
	Wanted int `json:"wanted"`
	// Slots is how many the model has now; zero: unknown or unlimited. Learned means that the
	// number was learned, and may be too small.
	Slots   int  `json:"slots"`
	Learned bool `json:"learned"`
}

// Outsider is a model that was used past the proxy.
type Outsider struct {
	Upstream string      `json:"upstream"`
	Model    string      `json:"model"`
	Kind     OutsideKind `json:"kind"`
	Count    int         `json:"count"`
	Last     time.Time   `json:"last"`
}

// Resident is a model that a server has loaded.
type Resident struct {
	Name          string
	Size          int64 // bytes
	SizeVRAM      int64 // bytes of it in a GPU's memory
	ContextLength int   // tokens
}

// Changed is a place that differs from one prompt to the next, so that the rest of the prompt is
// evaluated again.
type Changed struct {
	Model string `json:"model"`
	Place string `json:"place"` // such as "system prompt"
	Kind  string `json:"kind"`  // such as "checksum"
	Byte  int    `json:"byte"`  // offset within that place
	Cost
	Since time.Time `json:"since"` // they are counted from then on
}

const (
	mostAskers = 16 // of a model, that are reported
	mostBy     = 8  // of the senders that are reported
)

// Facts returns the sums of the requests since a time; the zero time means all that are remembered.
// The caller fills in what else the proxy knows.
func (r *Recorder) Facts(now, from time.Time) Facts {
	rows, outside, since := r.since(from)
	f := aggregate(rows, outside)
	f.Now, f.Since = now, since
	return f
}

// aggregate sums up requests.
func aggregate(rows []Request, outside []Outside) Facts {
	f := Facts{Requests: len(rows), Models: []Model{}, Outside: []Outsider{}, Upstreams: []Upstream{}}
	slices.SortStableFunc(rows, func(a, b Request) int { return a.Sent.Compare(b.Sent) })
	byModel := map[[2]string]*modelRows{}
	var order []*modelRows
	for i := range rows {
		q := &rows[i]
		key := [2]string{q.Upstream, q.Weights}
		m := byModel[key]
		if m == nil {
			m = &modelRows{Model: Model{Name: q.Model, Upstream: q.Upstream}}
			byModel[key] = m
			order = append(order, m)
		}
		m.rows = append(m.rows, q)
	}
	loads := loadsOf(rows)
	for _, m := range order {
		m.count(loads)
		f.Models = append(f.Models, m.Model)
	}
	for _, o := range outside {
		i := slices.IndexFunc(f.Outside, func(x Outsider) bool {
			return x.Upstream == o.Upstream && x.Model == o.Model && x.Kind == o.Kind
		})
		if i < 0 {
			i = len(f.Outside)
			f.Outside = append(f.Outside, Outsider{Upstream: o.Upstream, Model: o.Model, Kind: o.Kind})
		}
		f.Outside[i].Count++
		f.Outside[i].Last = o.At
	}
	return f
}

// modelRows is a model while its requests are summed up.
type modelRows struct {
	Model
	rows []*Request
}

func (m *modelRows) count(loads map[*Request]loaded) {
	m.Requests = len(m.rows)
	m.cut()
	m.askers()
	m.tokens()
	m.loads(loads)
	m.Lanes = lanesOf(m.rows)
	m.dropped()
}

func (m *modelRows) askers() {
	all := map[Asker]*Asked{}
	for _, q := range m.rows {
		a := all[q.Asker]
		if a == nil {
			a = &Asked{Asker: q.Asker}
			all[q.Asker] = a
		}
		a.Requests++
		m.LargestAsked = max(m.LargestAsked, q.NumCtx)
		if q.Loaded && q.ByNumCtx {
			a.Loads++
			a.Seconds += q.Load.Seconds()
		}
		if own := q.KeepAlive.Seconds(); q.OwnKeepAlive && (a.OwnKeepAlive == nil || own < *a.OwnKeepAlive) {
			a.OwnKeepAlive = &own
		}
	}
	for _, a := range all {
		m.Askers = append(m.Askers, *a)
	}
	slices.SortFunc(m.Askers, func(a, b Asked) int {
		return cmp.Or(b.Requests-a.Requests, cmp.Compare(a.Client, b.Client), cmp.Compare(a.Agent, b.Agent),
			cmp.Compare(a.Endpoint, b.Endpoint), a.NumCtx-b.NumCtx)
	})
	m.Askers = m.Askers[:min(len(m.Askers), mostAskers)]
}

func (m *modelRows) tokens() {
	working := map[uint64]int{}
	cold := map[string]*Cold{}
	timed := 0
	for _, q := range m.rows {
		m.Tokens += q.Tokens
		m.PromptSeconds += q.Prompt.Seconds()
		m.EvalSeconds += q.Eval.Seconds()
		if q.Known {
			m.Evaluated += q.Evaluated
			m.Estimated = m.Estimated || q.Estimated
			if q.Prompt > 0 {
				timed += q.Evaluated
			}
		}
		working[q.Conversation] = max(working[q.Conversation], q.Tokens+q.Generated)
		if q.Values > 0 {
			m.TokenBytes = 2 * q.Values // 16 bits each, unless OLLAMA_KV_CACHE_TYPE says otherwise
		}
		m.Sliding = m.Sliding || q.Sliding
		m.Context = max(m.Context, q.Context)
		// A truncated prompt differs from what was warm, whatever reason the ledger gives.
		if q.Reason != "" && !q.cut {
			c := cold[q.Reason]
			if c == nil {
				c = &Cold{Reason: q.Reason}
				cold[q.Reason] = c
			}
			c.add(q)
		}
	}
	if timed > 0 {
		m.SecondsPerToken = m.PromptSeconds / float64(timed)
	}
	for _, reason := range slices.Sorted(maps.Keys(cold)) {
		m.Cold = append(m.Cold, *cold[reason])
	}
	for _, n := range working {
		m.WorkingSet += n
	}
	m.Working = len(working)
}

// add counts a request, and the evaluated tokens of its prompt.
func (c *Cost) add(q *Request) {
	c.Count++
	if q.Known {
		c.Tokens += q.Evaluated
	}
	c.Seconds += q.Prompt.Seconds()
}

func (m *modelRows) loads(loads map[*Request]loaded) {
	var last *Load
	index := map[[2]string]*Load{}
	for _, q := range m.rows {
		if l, ok := loads[q]; ok {
			key := [2]string{string(l.cause), l.by}
			if last = index[key]; last == nil {
				last = &Load{Cause: l.cause, By: l.by}
				index[key] = last
			}
			last.Count++
			last.Seconds += q.Load.Seconds()
			m.LoadSeconds += q.Load.Seconds()
			if l.cause == CauseExpired {
				last.gaps = append(last.gaps, l.gap.Seconds())
				last.KeepAlive = max(last.KeepAlive, l.keepAlive.Seconds())
				last.Own = last.Own || l.own
			}
		}
		// Tokens that were warm before a load are evaluated again after it, by the first prompts
		// that begin with them.
		if last != nil && q.Known && afterLoad[q.Reason] {
			last.Tokens += q.Evaluated
		}
	}
	for _, l := range index {
		if slices.Sort(l.gaps); len(l.gaps) > 0 {
			l.Gap = l.gaps[len(l.gaps)/2]
		}
		m.Model.Loads = append(m.Model.Loads, *l)
	}
	slices.SortFunc(m.Model.Loads, func(a, b Load) int {
		return cmp.Or(b.Count-a.Count, cmp.Compare(a.Cause, b.Cause), cmp.Compare(a.By, b.By))
	})
}

// afterLoad has the ledger's reasons which mean that a load has cost warm tokens.
var afterLoad = map[string]bool{"reloaded": true, "evicted": true, "restarted": true}

func (m *modelRows) dropped() {
	for _, q := range m.rows {
		if q.Moved.Bytes == 0 {
			continue
		}
		lost := 0
		if q.Known && q.Bytes > 0 { // the rest would have been evaluated in any case
			lost = min(q.Evaluated-q.Tokens*q.Moved.After/q.Bytes, q.Tokens*q.Moved.Bytes/q.Bytes)
		}
		m.Dropped.Count++
		m.Dropped.Tokens += max(0, lost)
		m.DroppedBy = q.Asker.addTo(m.DroppedBy)
	}
}

func (a Asker) addTo(list []Name) []Name {
	n := Name{a.Name, a.Client, a.Agent}
	if slices.Contains(list, n) || len(list) == mostBy {
		return list
	}
	return append(list, n)
}

const (
	// cutBytes is how many bytes a conversation must have grown by to prove a truncation.
	cutBytes = 1000
	// cutDensity is more bytes of text than any token has.
	cutDensity = 10
)

// cut finds the truncated prompts: those that the ledger recognised by their token counts, and
// those of a conversation that has since grown by more than the context holds while the token count
// has not. (Ollama leaves out whole messages, so the rest may be shorter than the context.)
func (m *modelRows) cut() {
	whole := map[uint64]*grown{}
	tokens, bytes := 0, 0
	for _, q := range m.rows {
		if q.Tokens == 0 || q.Bytes == 0 || q.Images > 0 {
			continue
		}
		g := whole[q.Conversation]
		if g == nil {
			g = &grown{first: q, last: q}
			whole[q.Conversation] = g
		}
		context := cmp.Or(q.NumCtx, q.Context)
		needed, cut := g.cut(q, context)
		if !cut && !q.Truncated {
			if tokens, bytes = tokens+q.Tokens, bytes+q.Bytes; q.Bytes >= g.last.Bytes && !g.stalls(q) {
				g.last = q
			}
			continue
		}
		if !cut && bytes > 0 {
			needed = q.Bytes * tokens / bytes
		}
		q.cut = true
		m.Cut.Count++
		m.Cut.Context = max(m.Cut.Context, context)
		m.Cut.By = q.Asker.addTo(m.Cut.By)
		m.Cut.Needed = max(m.Cut.Needed, needed+q.Generated)
	}
}

// grown is the untruncated part of a conversation: its first prompt and its longest.
type grown struct{ first, last *Request }

// stalls reports whether a later prompt of the conversation has more text, but not the tokens for
// it.
func (g *grown) stalls(q *Request) bool {
	return (q.Tokens-g.last.Tokens)*cutDensity < q.Bytes-g.last.Bytes
}

// cut reports whether a later prompt of the conversation was truncated, and its approximate length
// in tokens.
func (g *grown) cut(q *Request, context int) (needed int, cut bool) {
	bytes := q.Bytes - g.last.Bytes
	if context == 0 || q.Tokens > context || bytes < cutBytes || !g.stalls(q) {
		return 0, false
	}
	each := float64(g.last.Tokens) / float64(g.last.Bytes)
	// The difference excludes tools, and what templates add.
	if more := g.last.Bytes - g.first.Bytes; more >= cutBytes {
		each = float64(g.last.Tokens-g.first.Tokens) / float64(more)
	}
	needed = g.last.Tokens + int(each*float64(bytes))
	return needed, needed > context
}

// lanesOf returns how requests to a model waited.
func lanesOf(rows []*Request) (l Lanes) {
	type edge struct {
		at           time.Time
		busy, wanted int
	}
	var edges []edge
	for _, q := range rows {
		if !q.Lane {
			continue
		}
		edges = append(edges, edge{q.Sent, 1, 0}, edge{q.Ended, -1, 0})
		if q.Batch {
			continue
		}
		edges = append(edges, edge{q.Arrived, 0, 1}, edge{q.Ended, 0, -1})
		l.Requests++
		wait := q.Sent.Sub(q.Arrived)
		if wait >= time.Second {
			l.Waited++
		}
		l.Seconds += wait.Seconds()
		l.Service += q.Ended.Sub(q.Sent).Seconds()
	}
	slices.SortFunc(edges, func(a, b edge) int {
		return cmp.Or(a.at.Compare(b.at), a.busy-b.busy, a.wanted-b.wanted) // ends first
	})
	busy, wanted := 0, 0
	for _, e := range edges {
		busy, wanted = busy+e.busy, wanted+e.wanted
		l.Busy, l.Wanted = max(l.Busy, busy), max(l.Wanted, wanted)
	}
	return l
}
