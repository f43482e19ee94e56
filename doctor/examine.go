package doctor

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Severity says how bad a finding is.
type Severity string

const (
	High   Severity = "high"   // answers suffer, or at least a tenth of all work is lost
	Medium Severity = "medium" // at least a fiftieth of it is
	Low    Severity = "low"    // less, or it costs memory alone
)

var severities = []Severity{High, Medium, Low}

// Finding is a problem.
type Finding struct {
	// ID names the kind of finding, for programs.
	ID       string   `json:"id"`
	Severity Severity `json:"severity"`
	Title    string   `json:"title"`
	// Upstream and Model say where; "" if more than one is concerned.
	Upstream string `json:"upstream,omitempty"`
	Model    string `json:"model,omitempty"`
	// Evidence has sentences with figures; estimates are called that.
	Evidence []string `json:"evidence"`
	// Advice is what to do, the best advice first.
	Advice []Advice `json:"advice"`
	// Cost is the cost since Facts.Since.
	Cost Waste `json:"cost"`
	// Doc is where the finding is explained.
	Doc string `json:"doc"`
}

// Advice is one possible remedy.
type Advice struct {
	// Do is a sentence.
	Do string `json:"do"`
	// Where says whose setting it is; "" if there is none to copy.
	Where Where `json:"where,omitempty"`
	// Set is the setting, ready to be copied there.
	Set string `json:"set,omitempty"`
}

// Where is a place for settings.
type Where string

const (
	InOllama Where = "ollama" // the environment of ollama serve
	InProxy  Where = "proxy"  // the flags of ollama-cacheproxy
	InClient Where = "client" // what clients send
	InShell  Where = "shell"  // a command
)

// Waste is a cost. Seconds are the times of loads, as answers report them, and the times of
// evaluating the tokens or of waiting; if Estimated is set, they are computed from a mean.
type Waste struct {
	Loads     int     `json:"loads,omitempty"`
	Tokens    int     `json:"tokens,omitempty"`
	Seconds   float64 `json:"seconds"`
	Estimated bool    `json:"estimated,omitempty"`
}

// IDs of findings.
const (
	IDNumCtx      = "num_ctx"
	IDCut         = "prompts_cut"
	IDHead        = "changing_head"
	IDFewSlots    = "too_few_slots"
	IDManySlots   = "too_many_slots"
	IDHostCache   = "host_cache"
	IDDropped     = "dropped_turns"
	IDSliding     = "sliding_window"
	IDCPU         = "part_on_cpu"
	IDKeepAlive   = "keep_alive"
	IDEvict       = "models_evict"
	IDBypass      = "bypass"
	IDLink        = "linkable_engine"
	IDUnreachable = "upstream_away"
	IDAnswers     = "answers_store_away"
	IDShared      = "shared_away"
	IDPeersAway   = "peers_away"
	IDNoPeers     = "no_peers"
	IDOneWay      = "peer_one_way"
	IDPeersLeave  = "peers_leave"
	IDPeerNames   = "peer_names"
	IDTwoOwners   = "two_owners"
	IDOwnTwice    = "own_twice"
	IDLists       = "upstream_lists"
	IDNotServed   = "fleet_upstream_away"
	IDVersions    = "peer_versions"
)

const (
	fewLoads       = 2    // fewer may be chance
	fewPrompts     = 3    // likewise
	fewTokens      = 500  // fewer do not matter
	significant    = 0.02 // share of all work: Medium
	grave          = 0.1  // … High
	defaultCache   = 8192 // MiB: the default of LLAMA_ARG_CACHE_RAM
	mostWorthSlots = 8    // the most that are recommended
)

// Examine returns the problems, worst first: by severity, and then by cost.
func Examine(f Facts) []Finding {
	list := []Finding{}
	for i := range f.Upstreams {
		list = append(list, f.upstream(&f.Upstreams[i])...)
	}
	for i := range f.Models {
		m := &f.Models[i]
		for _, check := range []func(*Model) (Finding, bool){
			f.numCtx, f.cut, f.fewSlots, f.manySlots, f.hostCache, f.dropped, f.sliding, f.keepAlive,
		} {
			if found, ok := check(m); ok {
				found.Model, found.Upstream = m.Name, m.Upstream
				list = append(list, found)
			}
		}
	}
	list = append(list, f.heads()...)
	for _, check := range []func() (Finding, bool){f.answers, f.shared} {
		if found, ok := check(); ok {
			list = append(list, found)
		}
	}
	list = append(list, f.fleet()...)
	for i := range list {
		if list[i].Severity == "" {
			list[i].Severity = f.severity(list[i].Cost)
		}
	}
	slices.SortStableFunc(list, func(a, b Finding) int {
		return cmp.Or(slices.Index(severities, a.Severity)-slices.Index(severities, b.Severity),
			cmp.Compare(b.Cost.Seconds, a.Cost.Seconds))
	})
	return list
}

// severity compares a cost with all work that was done: in time, or in tokens if answers report no
// times, as under /v1.
func (f *Facts) severity(w Waste) Severity {
	cost, work, evaluated := w.Seconds, 0.0, 0.0
	for _, m := range f.Models {
		work += m.LoadSeconds + m.PromptSeconds + m.EvalSeconds
		evaluated += float64(m.Evaluated)
	}
	if cost == 0 {
		cost, work = float64(w.Tokens), evaluated
	}
	switch {
	case cost > 0 && cost >= grave*work:
		return High
	case cost > 0 && cost >= significant*work, w.Seconds == 0 && w.Loads > 0:
		return Medium
	}
	return Low
}

// about returns the server that a model is on; the zero value if it is not known.
func (f *Facts) about(m *Model) Upstream {
	for _, u := range f.Upstreams {
		if u.Name == m.Upstream {
			return u
		}
	}
	return Upstream{}
}

// waste is the cost of loads, and of the tokens that were evaluated again after them.
func (m *Model) waste(loads ...Load) (w Waste) {
	for _, l := range loads {
		w.Loads += l.Count
		w.Tokens += l.Tokens
		w.Seconds += l.Seconds
	}
	w.Seconds += float64(w.Tokens) * m.SecondsPerToken
	w.Estimated = w.Tokens > 0
	return w
}

func (w *Waste) add(more Waste) {
	w.Loads, w.Tokens, w.Seconds = w.Loads+more.Loads, w.Tokens+more.Tokens, w.Seconds+more.Seconds
	w.Estimated = w.Estimated || more.Estimated
}

// loaded returns the loads with a cause.
func (m *Model) loaded(cause Cause) (list []Load) {
	for _, l := range m.Loads {
		if l.Cause == cause {
			list = append(list, l)
		}
	}
	return list
}

// cold returns the cost of the prompts that were cold for a reason.
func (m *Model) cold(reason string) Cost {
	for _, c := range m.Cold {
		if c.Reason == reason {
			return c.Cost
		}
	}
	return Cost{}
}

// much reports whether that many tokens are worth a finding.
func (m *Model) much(tokens int) bool {
	return tokens >= fewTokens && float64(tokens) >= significant*float64(m.Evaluated)
}

func (f *Facts) numCtx(m *Model) (Finding, bool) {
	w := m.waste(m.loaded(CauseNumCtx)...)
	if w.Loads < fewLoads {
		return Finding{}, false
	}
	found := Finding{
		ID: IDNumCtx, Title: fmt.Sprintf("Clients disagree on num_ctx of %s, and it is loaded anew each time", m.Name),
		Evidence: []string{fmt.Sprintf("%s for another num_ctx, which took %s%s.",
			plural(w.Loads, "load"), duration(m.sum(CauseNumCtx)), again(w, m))},
		Cost: w, Doc: "doctor.md#clients-disagree-on-num_ctx",
	}
	none := false
	for _, a := range m.Askers {
		none = none || a.NumCtx == 0
		asks := "none"
		if a.NumCtx > 0 {
			asks = number(a.NumCtx)
		}
		line := fmt.Sprintf("num_ctx %s: %s by %s on %s", asks, plural(a.Requests, "request"), a.named(), a.Endpoint)
		if a.Loads > 0 {
			line += fmt.Sprintf(", which caused %s", plural(a.Loads, "load"))
		}
		found.Evidence = append(found.Evidence, line+".")
	}
	largest := max(m.LargestAsked, m.Context, m.DefaultContext)
	found.Advice = append(found.Advice, Advice{
		Do:    "Have all clients ask for the same one, the largest that is needed.",
		Where: InClient, Set: fmt.Sprintf(`"options": {"num_ctx": %d}`, largest),
	})
	if none {
		if m.DefaultContext > 0 {
			found.Evidence = append(found.Evidence, fmt.Sprintf("Those that ask for none get %s.", number(m.DefaultContext)))
		}
		found.Advice = append(found.Advice, Advice{
			Do:    "Or give those that ask for none, as all under /v1 do, the same by default; and take num_ctx out of the others.",
			Where: InOllama, Set: fmt.Sprintf("OLLAMA_CONTEXT_LENGTH=%d", largest),
		})
	}
	found.Advice = append(found.Advice, Advice{
		Do: "Or have the proxy give each request the largest that was asked for." +
			" It takes that much memory for all of them.",
		Where: InProxy, Set: fmt.Sprintf("--num-ctx-policy %s=raise", m.Name),
	})
	return found, true
}

func (m *Model) sum(cause Cause) (seconds float64) {
	for _, l := range m.loaded(cause) {
		seconds += l.Seconds
	}
	return seconds
}

// again says how much was evaluated again after loads; "" if nothing was.
func again(w Waste, m *Model) string {
	if w.Tokens == 0 {
		return ""
	}
	return fmt.Sprintf("; %s tokens that had been warm were evaluated again after them%s", number(w.Tokens), m.estimated())
}

func (m *Model) estimated() string {
	if m.Estimated {
		return " (an estimate)"
	}
	return ""
}

func (f *Facts) cut(m *Model) (Finding, bool) {
	if m.Cut.Count == 0 {
		return Finding{}, false
	}
	// Needed is an estimate, so an eighth is added.
	needed := roundContext(max(m.Cut.Needed+m.Cut.Needed/8, m.Cut.Context+1))
	found := Finding{
		ID: IDCut, Severity: High,
		Title: fmt.Sprintf("Prompts are longer than the context of %s, and are cut", m.Name),
		Evidence: []string{
			fmt.Sprintf("%s had more text than the context of %s tokens holds, and fewer tokens than such a text has"+
				" (an estimate, from the lengths of both).", plural(m.Cut.Count, "prompt"), number(m.Cut.Context)),
			"What was cut is the beginning, after the system prompt: the model answers without having seen it," +
				" and the rest is evaluated from there.",
			"Sent by " + names(m.Cut.By) + ".",
		},
		Cost: Waste{}, Doc: "doctor.md#prompts-cut-by-the-context",
	}
	if m.Cut.Needed > 0 {
		found.Evidence = append(found.Evidence, fmt.Sprintf("The longest has about %s tokens with its answer, an estimate.", number(m.Cut.Needed)))
	}
	found.Advice = []Advice{
		{Do: "Ask for a context that holds them.", Where: InClient, Set: fmt.Sprintf(`"options": {"num_ctx": %d}`, needed)},
		{Do: "Or make that the default of all requests, under /v1 too, which cannot ask for one.", Where: InOllama,
			Set: fmt.Sprintf("OLLAMA_CONTEXT_LENGTH=%d", needed)},
	}
	return found, true
}

func (f *Facts) keepAlive(m *Model) (Finding, bool) {
	loads := m.loaded(CauseExpired)
	w := m.waste(loads...)
	if w.Loads < fewLoads {
		return Finding{}, false
	}
	l := loads[0]
	found := Finding{
		ID: IDKeepAlive, Cost: w, Doc: "doctor.md#keep_alive-shorter-than-the-gaps",
		Title: fmt.Sprintf("%s is dropped between requests", m.Name),
		Evidence: []string{
			fmt.Sprintf("%s after it was gone, which took %s%s.", plural(w.Loads, "load"), duration(l.Seconds), again(w, m)),
			fmt.Sprintf("It had not been used for %s (the median of these gaps), and was to stay for %s.",
				duration(l.Gap), duration(l.KeepAlive)),
		},
	}
	longer := fmt.Sprintf("--keep-alive %s=%s", m.Name, hold(l.Gap))
	unloads := false
	for _, a := range m.Askers {
		if a.OwnKeepAlive == nil || *a.OwnKeepAlive < 0 || *a.OwnKeepAlive > l.Gap {
			continue
		}
		unloads = unloads || *a.OwnKeepAlive == 0
		found.Evidence = append(found.Evidence, fmt.Sprintf("keep_alive of %s was stated by %s on %s.",
			duration(*a.OwnKeepAlive), a.named(), a.Endpoint))
	}
	if unloads {
		found.Advice = append(found.Advice, Advice{
			Do: "Take keep_alive 0 out of the client: it unloads the model after each request, and the proxy always lets it.",
		})
	}
	switch {
	case unloads && l.KeepAlive == 0: // nothing else helps
	case l.Own:
		found.Advice = append(found.Advice, Advice{
			Do: "Take keep_alive out of the clients, or have the proxy raise it.", Where: InProxy,
			Set: longer + " --keep-alive-policy at-least",
		})
	default:
		found.Advice = append(found.Advice, Advice{
			Do: "Have the proxy hold it for longer.", Where: InProxy, Set: longer,
		})
	}
	return found, true
}

func (f *Facts) dropped(m *Model) (Finding, bool) {
	if m.Dropped.Count < fewPrompts || !m.much(m.Dropped.Tokens) {
		return Finding{}, false
	}
	return Finding{
		ID: IDDropped, Title: fmt.Sprintf("A client drops the oldest turns of its chats with %s each time", m.Name),
		Evidence: []string{
			fmt.Sprintf("%s went on without the oldest turns of the one before, so that what follows them moved and was evaluated again: about %s tokens.",
				plural(m.Dropped.Count, "prompt"), number(m.Dropped.Tokens)),
			"Sent by " + names(m.DroppedBy) + ".",
		},
		Advice: []Advice{
			{Do: "Keep all turns for as long as the context holds them, and then drop half of them at once: all but one turn of many stays warm."},
			{Do: "Or have the engine (Ollama 0.30 or later) shift what it has instead of evaluating it again. That is not exact:" +
				" the model sees the kept turns as they were understood beside those that are gone. It helps here, and nowhere else.",
				Where: InOllama, Set: "LLAMA_ARG_CACHE_REUSE=64"},
		},
		Cost: m.evaluation(m.Dropped.Tokens), Doc: "doctor.md#clients-that-drop-their-oldest-turns",
	}, true
}

// evaluation is the cost of evaluating tokens.
func (m *Model) evaluation(tokens int) Waste {
	return Waste{Tokens: tokens, Seconds: float64(tokens) * m.SecondsPerToken, Estimated: true}
}

func (f *Facts) sliding(m *Model) (Finding, bool) {
	c := m.cold("sliding_window")
	if c.Count < fewPrompts || !m.much(c.Tokens) {
		return Finding{}, false
	}
	return Finding{
		ID: IDSliding, Title: fmt.Sprintf("This Ollama reuses nothing for %s, which has a sliding window", m.Name),
		Evidence: []string{fmt.Sprintf("%s had much in common with an earlier one and %s of their tokens were evaluated%s: "+
			"Ollama %s reuses of such a prompt nothing unless all of the one before is its beginning.",
			plural(c.Count, "prompt"), number(c.Tokens), m.estimated(), f.about(m).Version)},
		Advice: []Advice{{Do: "Install Ollama 0.30 or later there."}},
		Cost:   m.evaluation(c.Tokens), Doc: "doctor.md#a-sliding-window-before-030",
	}, true
}

func (f *Facts) hostCache(m *Model) (Finding, bool) {
	c := m.cold("slot_taken")
	if c.Count < fewPrompts || !m.much(c.Tokens) {
		return Finding{}, false
	}
	found := Finding{
		ID: IDHostCache, Cost: m.evaluation(c.Tokens), Doc: "doctor.md#the-host-cache-is-too-small",
		Evidence: []string{fmt.Sprintf("%s began like one that had been evaluated, and another had taken its place: they evaluated %s tokens%s.",
			plural(c.Count, "prompt"), number(c.Tokens), m.estimated())},
	}
	working := fmt.Sprintf("%s with about %s tokens were in use", plural(m.Working, "conversation"), number(m.WorkingSet))
	u := f.about(m)
	if !upstream.AtLeast(u.Version, 0, 30) {
		found.Title = fmt.Sprintf("%s has fewer slots than there are prefixes, and this Ollama keeps nothing beside them", m.Name)
		found.Evidence = append(found.Evidence, working+".")
		found.Advice = []Advice{
			{Do: "Install Ollama 0.30 or later there: its engine keeps what a slot loses in the machine's memory, 8 GiB by default."},
			{Do: "Or give each model more slots. Each takes a context's memory.", Where: InOllama,
				Set: fmt.Sprintf("OLLAMA_NUM_PARALLEL=%d", min(mostWorthSlots, max(2, m.Working)))},
		}
		return found, true
	}
	need := defaultCache
	if m.TokenBytes > 0 {
		mib := m.WorkingSet * m.TokenBytes >> 20
		found.Evidence = append(found.Evidence, fmt.Sprintf("%s, which take about %s MiB (an estimate: %d bytes a token).", working, number(mib), m.TokenBytes))
		if more := (mib + mib/4 + 1023) / 1024 * 1024; more > defaultCache {
			need = more
		}
	}
	found.Title = fmt.Sprintf("The engine's cache in the machine's memory is too small for what %s is asked", m.Name)
	do := "Give it room for them."
	if need == defaultCache {
		do = "The engine's default holds them, so it has been set to less: take LLAMA_ARG_CACHE_RAM away, or set it to the default."
	}
	found.Advice = []Advice{{Do: do, Where: InOllama, Set: fmt.Sprintf("LLAMA_ARG_CACHE_RAM=%d", need)}}
	return found, true
}
