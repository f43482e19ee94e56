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

// Response headers that tell of a request's prefix.
const (
	headerPrefix   = "X-Cacheproxy-Prefix"         // the fingerprint of the whole prompt, 16 hexadecimal digits
	headerExpected = "X-Cacheproxy-Expected-Reuse" // tokens that were expected to be reused, or "unknown"
)

const (
	pathRequests  = ownPrefix + "requests"
	shownRequests = 100 // entries that the page shows unless told otherwise
	excerptHead   = 300 // bytes of a body that an excerpt begins with …
	excerptTail   = 100 // … and ends with
)

// account reads the chain of a request whose body has been read: data, which need not be what is sent.
func (h *Handler) account(ex *exchange, data []byte) {
	if h.Ledger == nil || ex.prompt == prefix.None || !ex.runsHere() {
		return
	}
	if !h.exists(ex.key) {
		if h.refresh(); !h.exists(ex.key) { // it may have been made just now, past the proxy
			return
		}
	}
	chain := h.prefixes.ReadMembers(ex.prompt, ex.key, data, ex.fields.members, ex.fields.long)
	ex.chain, ex.dialect = &chain, ex.route.answer // on its own: the ledger keeps it for longer than the exchange
	h.fitContext(ex, data)
	if h.Live().ShowPrompts {
		ex.excerpt = excerpt(data)
	}
}

// look tells the ledger what it is that changes in a prompt, while its text is there.
func (h *Handler) look(ex *exchange) {
	message, from, to, ok := ex.spend.Look()
	if ok && ex.body != nil && ex.fields.members != nil { // else it is compressed
		ex.spend.Looked(h.prefixes.Look(ex.prompt, ex.body.data, ex.fields.members, ex.fields.long, message, from, to))
	}
}

// exists reports whether an upstream has the model, as far as is known: made-up names are not to push out what is known of
// real ones.
func (h *Handler) exists(model string) bool {
	for _, b := range h.backends {
		if b.State().Has(model) {
			return true
		}
	}
	return false
}

// accounted ends it.
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
	if !h.Live().ShowPrompts { // it may have been shown when the request came
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

// changed takes in what has changed of what a server holds.
func (h *Handler) changed(b *backend, e runners.Event) {
	switch e.Kind {
	case runners.Loaded:
		b.Changed() // /api/ps tells what that was loaded beside, and what in place of
	case runners.Replaced:
		if b.Changed(); e.Listed {
			h.recorder.outside(b, e.Weights)
			h.lose(b, e, savings.LostReloaded)
		}
	case runners.Unloaded:
		h.lose(b, e, savings.LostUnloaded)
	case runners.Restarted:
		h.lose(b, e, savings.LostRestart)
	}
	h.prewarming.changed(b, e)
}

// lose tells that what a model held on a server is gone.
func (h *Handler) lose(b *backend, e runners.Event, why savings.Lost) {
	if h.Ledger != nil {
		h.Ledger.Lose(b.index, e.Weights, why)
	}
	// What /api/ps does not list any more the scheduler sees by itself, and what took its place.
	if h.Lanes != nil && !(e.Listed && e.Kind == runners.Unloaded) {
		h.Lanes.Cool(b.index, e.Weights)
	}
}

// excerpt returns a body's beginning and end.
func excerpt(body []byte) string {
	if len(body) <= excerptHead+excerptTail {
		return strings.ToValidUTF8(string(body), "\uFFFD")
	}
	return strings.ToValidUTF8(string(body[:excerptHead])+" … "+string(body[len(body)-excerptTail:]), "\uFFFD")
}

// tell puts what is known of the prefix into the answer's header.
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

// polledBooks tells what a poll of a server found to all that keep books of it.
func (h *Handler) polledBooks(b *backend, st upstream.State) {
	if !st.Up {
		return // what was known of it holds for the requests that are still under way
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
		h.recorder.listed(b, loaded, st.Polled)
		if h.Lanes != nil {
			contexts := make(map[string]int, len(loaded))
			for model, l := range loaded {
				contexts[model] = l.ContextLength
			}
			h.Lanes.SetLoaded(up.Index, contexts, st.Polled)
		}
	}
}

// requestsPage is what pathRequests shows.
type requestsPage struct {
	Requests []requestEntry `json:"requests"`
}

type requestEntry struct {
	ID       uint64    `json:"id"`
	At       time.Time `json:"at"`
	Endpoint string    `json:"endpoint"`
	Model    string    `json:"model"`
	Upstream string    `json:"upstream"`

	Simulated bool `json:"simulated,omitempty"` // the answer and these figures are made up

	Name   string `json:"name,omitempty"`   // of the API key
	Client string `json:"client,omitempty"` // hashed, as on the page of the queue; none: the proxy itself

	Prefix   string          `json:"prefix"`
	Shared   string          `json:"shared_prefix,omitempty"` // the longest part of the prompt that was known before
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
	Broken    bool    `json:"broken_off,omitempty"` // the answer did not come to its end
	Loaded    bool    `json:"loaded_model,omitempty"`
	Generated int     `json:"generated_tokens,omitempty"`
	Waited    float64 `json:"waited_ms"`   // in the proxy, before it was sent
	Duration  float64 `json:"duration_ms"` // of the whole request, that wait included
	Load      float64 `json:"load_ms"`
	Queue     float64 `json:"queue_ms"`
	Prompt    float64 `json:"prompt_eval_ms"`
	Eval      float64 `json:"eval_ms"`

	EstimatedSavedMS float64 `json:"estimated_saved_ms"`
	Excerpt          string  `json:"prompt,omitempty"`
}

// promptTokens has what is known: absent is unknown, 0 is none.
type promptTokens struct {
	Total     int  `json:"total,omitempty"`
	Reused    *int `json:"reused,omitempty"`
	Evaluated *int `json:"evaluated,omitempty"`
}

// requests returns the last n requests, newest first.
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
