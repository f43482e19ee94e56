package proxy

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// NumCtxPolicy says what becomes of the num_ctx of native requests: Ollama loads a model anew for
// each other one.
type NumCtxPolicy string

const (
	KeepNumCtx  NumCtxPolicy = "keep"  // it stays as the client states it, or does not
	PinNumCtx   NumCtxPolicy = "pin"   // it becomes the one that is loaded, where that is no less than what is asked for
	RaiseNumCtx NumCtxPolicy = "raise" // it becomes the largest that was asked for of the model so far
)

// NumCtx has a policy for each model. The zero value keeps what clients state.
type NumCtx struct {
	Default NumCtxPolicy            // "" is KeepNumCtx
	Models  map[string]NumCtxPolicy // by upstream.ModelKey; goes before Default
}

// For returns what holds for a model (upstream.ModelKey).
func (n NumCtx) For(model string) NumCtxPolicy {
	p, ok := n.Models[model]
	if !ok {
		p = n.Default
	}
	if p == "" {
		return KeepNumCtx
	}
	return p
}

// String lists the settings as ParseNumCtx reads them.
func (n NumCtx) String() string {
	list := []string{string(n.For(""))}
	for _, model := range slices.Sorted(maps.Keys(n.Models)) {
		list = append(list, upstream.DisplayName(model)+"="+string(n.Models[model]))
	}
	return strings.Join(list, ", ")
}

// ParseNumCtx reads settings of the form "pin" or "llama3=pin".
func ParseNumCtx(settings []string) (NumCtx, error) {
	n := NumCtx{Models: map[string]NumCtxPolicy{}}
	for _, s := range settings {
		model, value, perModel := strings.Cut(s, "=")
		if !perModel {
			model, value = "", s
		}
		policy := NumCtxPolicy(strings.TrimSpace(value))
		if !slices.Contains([]NumCtxPolicy{KeepNumCtx, PinNumCtx, RaiseNumCtx}, policy) {
			return n, fmt.Errorf("num-ctx policy %q: want keep, pin or raise", s)
		}
		key := upstream.ModelKey(model)
		switch {
		case !perModel:
			n.Default = policy
		case key == "":
			return n, fmt.Errorf("num-ctx policy %q: %q is not a model name", s, model)
		default:
			n.Models[key] = policy
		}
	}
	return n, nil
}

// What was done about a request's num_ctx, as logs and metrics name it.
const (
	didPin        = "pinned"  // it became the one that is loaded
	didRaiseCtx   = "raised"  // it became the largest one
	didKeepCtx    = "kept"    // it is as large, or is written in a way that is left alone
	didUnknownCtx = "unknown" // the client states none, and what Ollama takes then is not known
)

// decide returns what is done for a request that asks for so many tokens, and how many it is to
// have. asked 0: it states none.
func (p NumCtxPolicy) decide(asked int, c runners.Contexts) (did string, tokens int) {
	did, tokens = didPin, c.Loaded
	if p == RaiseNumCtx {
		did, tokens = didRaiseCtx, max(c.Loaded, c.Largest)
	}
	if asked == 0 {
		asked = c.Default
	}
	switch {
	case tokens == 0:
		return "", 0 // nothing is loaded, or known of it
	case asked == 0 && c.ByDefault && tokens == c.Loaded:
		return didKeepCtx, 0
	case asked == 0:
		return didUnknownCtx, 0
	case tokens <= asked:
		return didKeepCtx, 0
	}
	return did, tokens
}

// fit is how a request's num_ctx was changed. The zero fit: not at all.
type fit struct {
	made     bool
	edit     edit
	from, to int // tokens; from 0: none was stated
	policy   NumCtxPolicy
}

// edits returns what the fit changes of the body, in a list of its own.
func (f fit) edits() []edit {
	if !f.made {
		return nil
	}
	return []edit{f.edit}
}

// String says it in words, for the ledger's detail.
func (f fit) String() string {
	from := "none"
	if f.from > 0 {
		from = strconv.Itoa(f.from)
	}
	return fmt.Sprintf("num_ctx from %s to %d by --num-ctx-policy %s", from, f.to, f.policy)
}

// fitContext changes the num_ctx of a native request, whose chain was read from data, as the
// operator wants it: before a lane is chosen, since a lane is for one num_ctx.
func (h *Handler) fitContext(ex *exchange, data []byte) {
	policy := h.NumCtx.For(ex.key)
	if policy == KeepNumCtx || ex.reads != readsNative || ex.unloads() {
		return
	}
	asked := ex.chain.Runner.NumCtx()
	contexts := h.contexts(ex)
	did, tokens := policy.decide(asked, contexts)
	if ex.NumCtx = did; tokens == 0 {
		return
	}
	// What is loaded for requests that state none is the same runner for others only if they state
	// none, either.
	leave := contexts.ByDefault && tokens == contexts.Loaded
	e, ok := numCtxEdit(data, ex.fields, asked, tokens, leave)
	if !ok {
		ex.NumCtx = didKeepCtx
		return
	}
	ex.fit = fit{made: true, edit: e, from: asked, to: tokens, policy: policy}
	options := ex.chain.Runner.WithContext(tokens)
	if leave {
		options = options.WithoutContext()
	}
	ex.chain.Restate(options)
}

// contexts returns what is known of the context lengths of the request's model, on all servers to
// which it may be sent.
func (h *Handler) contexts(ex *exchange) runners.Contexts {
	var list []runners.Contexts
	for _, b := range h.candidates(ex) {
		st := b.State()
		list = append(list, b.runners.Contexts(ex.key, st.Digests[ex.key], st.Loaded))
	}
	return onAll(list)
}

// onAll returns what is known of several servers' context lengths where nobody knows yet which of
// them gets the request: the largest ones. A default is known if each one's is, and what is loaded is
// it only if it is on each of them: elsewhere a request that states none would get less.
func onAll(list []runners.Contexts) (all runners.Contexts) {
	known, by, everywhere := true, false, true
	for _, c := range list {
		all.Loaded, all.Largest = max(all.Loaded, c.Loaded), max(all.Largest, c.Largest)
		all.Default = max(all.Default, c.Default)
		known = known && c.Default > 0
	}
	for _, c := range list {
		here := c.ByDefault && c.Loaded == all.Loaded
		by = by || here
		everywhere = everywhere && (here || c.Default == all.Loaded)
	}
	if !known {
		all.Default = 0
	}
	all.ByDefault = by && everywhere
	return all
}

var (
	keyOptions = []byte("options")
	keyNumCtx  = []byte("num_ctx")
)

// numCtxEdit returns the edit by which a body that asks for so many tokens (0: it states none) asks
// for others, or, with leave, states none. false: it is written in a way that is left alone.
func numCtxEdit(data []byte, f fields, asked, tokens int, leave bool) (edit, bool) {
	options, n := f.options(data)
	if asked < 0 || n > 1 || f.empty || leave && asked == 0 {
		return edit{}, false
	}
	number := `"num_ctx":` + strconv.Itoa(tokens)
	switch {
	case n == 0:
		return edit{at: f.open, text: []byte(`"options":{` + number + "},")}, asked == 0
	case data[options.Value] == 'n':
		return edit{at: options.Value, cut: options.ValueEnd - options.Value, text: []byte("{" + number + "}")}, asked == 0
	case data[options.Value] != '{':
		return edit{}, false
	}
	stated, ok := findOption(data, options, keyNumCtx)
	switch {
	case !ok || (stated.n > 0) != (asked > 0):
		return edit{}, false
	case leave:
		return edit{at: stated.from, cut: stated.to - stated.from}, true
	case stated.n > 0:
		return edit{at: stated.value, cut: stated.valueEnd - stated.value, text: []byte(strconv.Itoa(tokens))}, true
	case stated.others:
		number += ","
	}
	return edit{at: options.Value + 1, text: []byte(number)}, true
}

// options returns the last member of this name, and how many there are.
func (f fields) options(data []byte) (last jsonscan.Member, n int) {
	for _, m := range f.members {
		if jsonscan.KeyIs(data[m.Key:m.KeyEnd], keyOptions) {
			last = m
			n++
		}
	}
	return last, n
}

// option is where a number stands in an object, as offsets into the body.
type option struct {
	n               int // how often; nothing else is set where it is 0
	value, valueEnd int
	from, to        int  // the member, with the comma that goes with it
	others          bool // the object has other members
}

// findOption looks for a member of an options object, whose keys do not fold case. false: it is
// there more than once, or is no number.
func findOption(data []byte, options jsonscan.Member, name []byte) (option, bool) {
	var o option
	c := jsonscan.NewCursor(data, options.Value)
	c.Enter()
	end := -1 // of the member before
	for more := c.More(); more; {
		key := c.Pos()
		raw := c.Key()
		value := c.Pos()
		c.Value()
		valueEnd := c.Pos()
		next := valueEnd
		if more = c.More(); more {
			next = c.Pos()
		}
		if s, ok := jsonscan.Unquote(raw); !ok || s != string(name) {
			o.others, end = true, valueEnd
			continue
		}
		o.n++
		o.value, o.valueEnd, o.from, o.to = value, valueEnd, key, next
		if !more && end >= 0 {
			o.from, o.to = end, valueEnd
		}
		if first := data[value]; first != '-' && (first < '0' || first > '9') {
			return o, false
		}
		end = valueEnd
	}
	return o, o.n <= 1
}
