package proxy

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Response headers about the request's prefix.
const (
	headerPrefix   = "X-Cacheproxy-Prefix"         // the fingerprint of the whole prompt, 16 hexadecimal digits
	headerExpected = "X-Cacheproxy-Expected-Reuse" // how many tokens should be reused, or "unknown"
)

const (
	pathRequests  = ownPrefix + "requests"
	shownRequests = 100 // entries on the page without ?n=
	excerptHead   = 300 // length of an excerpt's first part, in bytes …
	excerptTail   = 100 // … and of its last part
)

// account reads the chain of a request from its body. data may differ from the body that is sent.
func (h *Handler) account(ex *exchange, data []byte) {
	if h.Ledger == nil || ex.prompt == prefix.None || !ex.runsHere() {
		return
	}
	if !h.known(ex.key) {
		if h.refresh(); !h.known(ex.key) { // created just now, and not through the proxy
			return
		}
	}
	chain := h.prefixes.ReadMembers(ex.prompt, ex.key, data, ex.fields.members, ex.fields.long)
	ex.chain, ex.dialect = &chain, ex.route.answer // a copy, which the ledger keeps
	h.fitContext(ex, data)
	if h.Live().ShowPrompts {
		ex.excerpt = excerpt(data)
	}
}

// look reports to the ledger which part of a prompt changes, while the text is at hand.
func (h *Handler) look(ex *exchange) {
	message, from, to, ok := ex.spend.Look()
	if ok && ex.body != nil && ex.fields.members != nil { // otherwise the body is compressed
		ex.spend.Looked(h.prefixes.Look(ex.prompt, ex.body.data, ex.fields.members, ex.fields.long, message, from, to))
	}
}

// exists reports whether an upstream is known to have the model. Made-up names must not displace
// the records of real models.
func (h *Handler) exists(model string) bool {
	for _, b := range h.backends() {
		if b.State().Has(model) {
			return true
		}
	}
	return false
}

// known reports whether an upstream of this proxy, or of one of its peers, has the model.
func (h *Handler) known(model string) bool {
	return h.exists(model) || h.Fleet != nil && h.Fleet.Has(model)
}

// accounted closes the request's entry in the ledger.
func (h *Handler) accounted(ex *exchange) {
	end := runners.Outcome{
		Refused:  ex.Status >= 300 && !ex.gaveUp || ex.Outcome == Unreachable,
		Accepted: ex.Status >= 200 && ex.Status < 300, Unload: ex.use.unloads() && ex.Outcome == OK,
	}
	if ex.spend == nil {
		ex.ending = ex.run.End(time.Now(), end)
		h.free(ex, savings.Answer{})
		return
	}
	if !h.Live().ShowPrompts { // the setting may have changed since the request arrived
		ex.excerpt = ""
	}
	o := savings.Outcome{
		OK: ex.Outcome == OK, Refused: end.Refused,
		Counted:  ex.dialect == savings.Native && ex.answer != nil,
		Edits:    ex.edited(),
		Duration: ex.Duration - ex.sent, Endpoint: ex.Endpoint, Excerpt: ex.excerpt,
		Client: ex.Client, KeyName: ex.Name, Waited: ex.Waited + ex.paused, Whole: ex.Duration,
	}
	if ex.streams && ex.FirstByte > ex.sent {
		o.FirstByte = ex.FirstByte - ex.sent
	}
	if ex.answer != nil {
		o.Answer = ex.answer.Answer()
		defer ex.answer.Release()
	}
	ex.count(&o.Answer)
	end.Load, end.Unload = o.Load, end.Unload || o.DoneReason == "unload"
	o.Ending = ex.run.End(time.Now(), end)
	ex.loadedBefore(&o)
	ex.ending = o.Ending
	if entry, ok := ex.spend.End(time.Now(), o); ok {
		ex.Savings = &entry
	}
	h.free(ex, o.Answer)
}

// changed handles a change in what a server has loaded.
func (h *Handler) changed(b *backend, e runners.Event) {
	switch e.Kind {
	case runners.Loaded:
		b.Changed() // ask /api/ps what else is loaded, and what was displaced
	case runners.Replaced:
		if b.Changed(); e.Listed {
			if h.Fleet == nil || h.alone(b) && h.recorder.watches(b) {
				h.recorder.outside(b, e.Weights)
			}
			h.lose(b, e, savings.LostReloaded)
		}
	case runners.Unloaded:
		h.lose(b, e, savings.LostUnloaded)
	case runners.Restarted:
		h.lose(b, e, savings.LostRestart)
	}
	h.prewarming.changed(b, e)
}

// lose records that a model's cache on a server is gone.
func (h *Handler) lose(b *backend, e runners.Event, why savings.Lost) {
	if h.Ledger != nil {
		h.Ledger.Lose(b.index, e.Weights, why)
	}
	// The scheduler itself notices what is missing from /api/ps, and what replaced it.
	if h.Lanes != nil && !(e.Listed && e.Kind == runners.Unloaded) {
		h.Lanes.Cool(b.index, e.Weights)
	}
}

// excerpt returns the start and the end of a body.
func excerpt(body []byte) string {
	if len(body) <= excerptHead+excerptTail {
		return strings.ToValidUTF8(string(body), "\uFFFD")
	}
	return strings.ToValidUTF8(string(body[:excerptHead])+" … "+string(body[len(body)-excerptTail:]), "\uFFFD")
}

// tell adds the headers about the prefix to the answer.
func (ex *exchange) tell(header http.Header) {
	if !ex.chain.HasPrompt() {
		return
	}
	expected := "unknown"
	if ex.spend.ExpectedKnown {
		expected = strconv.Itoa(ex.spend.Expected)
	}
	header.Set(headerPrefix, savings.PrefixString(ex.chain.Leaf()))
	header.Set(headerExpected, expected)
}

// polledBooks passes the result of a poll to everything that keeps records of the server.
func (h *Handler) polledBooks(b *backend, st upstream.State) {
	if !st.Up {
		return // the records still hold for requests in progress
	}
	up := savings.Upstream{Name: b.Name, Index: b.index, TellsCached: st.AtLeast(0, 34), Old: st.AtLeast(0, 1) && !st.AtLeast(0, 30)}
	b.books.Store(&up)
	if h.Lanes != nil {
		h.Lanes.SetLongestMatch(up.Index, up.Old)
	}
	if st.Restarted {
		b.runners.Restarted()
	}
	for _, model := range st.Replaced {
		if h.Ledger != nil {
			h.Ledger.Forget(b.index, model)
		}
		b.runners.Unloaded(model)
	}
	if st.LoadedKnown {
		loaded := b.runners.Listed(st.Loaded, st.Polled)
		if h.alone(b) {
			h.recorder.listed(b, loaded, st.Polled)
		} else {
			h.recorder.unwatch(b)
		}
		if h.Lanes != nil {
			contexts := make(map[string]int, len(loaded))
			for model, l := range loaded {
				contexts[model] = l.ContextLength
			}
			h.Lanes.SetLoaded(up.Index, contexts, st.Polled)
		}
	}
}

// requestsPage is the content of pathRequests.
type requestsPage struct {
	Requests []requestEntry `json:"requests"`
}

type requestEntry struct {
	ID       uint64    `json:"id"`
	At       time.Time `json:"at"`
	Endpoint string    `json:"endpoint"`
	Model    string    `json:"model"`
	Upstream string    `json:"upstream"`

	Simulated bool `json:"simulated,omitempty"` // answer and figures are made up

	Name   string `json:"name,omitempty"`   // of the API key
	Client string `json:"client,omitempty"` // hashed; absent for the proxy itself

	Prefix   string          `json:"prefix"`
	Shared   string          `json:"shared_prefix,omitempty"` // the longest known part
	Messages int             `json:"messages"`
	Basis    savings.Basis   `json:"basis"`
	Tokens   promptTokens    `json:"tokens"`
	Estimate *savings.Tokens `json:"estimate,omitempty"`
	Expected *int            `json:"expected_reuse,omitempty"`
	Verdict  savings.Verdict `json:"verdict"`
	Reason   savings.Reason  `json:"reason,omitempty"`
	Detail   string          `json:"detail,omitempty"`

	Changed *savings.Changed `json:"changed,omitempty"`

	Truncated bool    `json:"probably_truncated,omitempty"`
	Broken    bool    `json:"broken_off,omitempty"` // the answer was cut short
	Loaded    bool    `json:"loaded_model,omitempty"`
	Generated int     `json:"generated_tokens,omitempty"`
	Waited    float64 `json:"waited_ms"`   // in the proxy, before it was sent
	Duration  float64 `json:"duration_ms"` // of the whole request, including the wait
	Load      float64 `json:"load_ms"`
	Queue     float64 `json:"queue_ms"`
	Prompt    float64 `json:"prompt_eval_ms"`
	Eval      float64 `json:"eval_ms"`

	EstimatedSavedMS float64 `json:"estimated_saved_ms"`
	Excerpt          string  `json:"prompt,omitempty"`
}

// promptTokens are the known counts: absent means unknown, 0 means none.
type promptTokens struct {
	Total     int  `json:"total,omitempty"`
	Reused    *int `json:"reused,omitempty"`
	Evaluated *int `json:"evaluated,omitempty"`
}

// requests returns the latest n requests, newest first.
func (h *Handler) requests(n int) requestsPage {
	page := requestsPage{Requests: []requestEntry{}}
	for _, e := range h.Ledger.Recent(n) {
		entry := requestEntry{
			ID: e.ID, At: e.At, Endpoint: e.Endpoint, Model: upstream.DisplayName(e.Model), Upstream: e.Upstream,
			Name: e.KeyName, Client: e.Client, Waited: ms(e.Waited), Duration: ms(e.Whole),
			Prefix: savings.PrefixString(e.Prefix), Messages: e.Messages,
			Basis: e.Basis, Tokens: promptTokens{Total: e.Total}, Estimate: e.Estimate, Verdict: e.Verdict, Reason: e.Reason, Detail: e.Detail, Changed: e.Changed,
			Truncated: e.Truncated, Broken: e.Broken, Loaded: e.Loaded, Generated: e.Generated,
			Load: ms(e.Load), Queue: ms(e.Queue), Prompt: ms(e.Prompt), Eval: ms(e.Eval),
			EstimatedSavedMS: ms(e.SavedEvaluation + e.SavedLoading), Excerpt: e.Excerpt,
		}
		if b := h.named(e.Upstream); b != nil {
			entry.Simulated = b.State().Simulated
		}
		if e.Shared != 0 {
			entry.Shared = savings.PrefixString(e.Shared)
		}
		if e.Tokens != nil {
			entry.Tokens.Reused, entry.Tokens.Evaluated = &e.Tokens.Reused, &e.Tokens.Evaluated
		}
		if e.ExpectedKnown {
			entry.Expected = &e.Expected
		}
		page.Requests = append(page.Requests, entry)
	}
	return page
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
