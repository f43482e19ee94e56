package proxy

import (
	"fmt"
	"strconv"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
)

// NumCtxPolicy decides on the num_ctx of native requests, because Ollama loads a model again
// whenever that changes.
type NumCtxPolicy string

const (
	KeepNumCtx  NumCtxPolicy = "keep"  // leave it as the client states it, or omits it
	PinNumCtx   NumCtxPolicy = "pin"   // use the loaded one, unless the client asks for more
	RaiseNumCtx NumCtxPolicy = "raise" // use the largest that was asked for of the model so far
)

func (NumCtxPolicy) choices() []NumCtxPolicy {
	return []NumCtxPolicy{KeepNumCtx, PinNumCtx, RaiseNumCtx}
}

// NumCtx has a policy for each model. The zero value changes nothing.
type NumCtx = PerModel[NumCtxPolicy]

// ParseNumCtx parses settings of the form "pin" or "llama3=pin".
func ParseNumCtx(settings []string) (NumCtx, error) {
	return parsePerModel[NumCtxPolicy](settings)
}

// How a request's num_ctx was treated, in the words of logs and metrics.
const (
	didPin        = "pinned"  // set to the loaded one
	didRaiseCtx   = "raised"  // set to the largest one
	didKeepCtx    = "kept"    // as large already, or in a form that the proxy does not edit
	didUnknownCtx = "unknown" // the client states none, and Ollama's default is not known
)

// decide returns how to treat a request that asks for so many tokens (0 if it states none), and the
// num_ctx to set, or 0.
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
		return "", 0 // nothing is loaded, or it is not known
	case asked == 0 && c.ByDefault && tokens == c.Loaded:
		return didKeepCtx, 0
	case asked == 0:
		return didUnknownCtx, 0
	case tokens <= asked:
		return didKeepCtx, 0
	}
	return did, tokens
}

// fit is the change of a request's num_ctx. The zero fit changes nothing.
type fit struct {
	made     bool
	edit     edit
	from, to int // tokens; from is 0 if none was stated
	policy   NumCtxPolicy
}

// edits returns the fit's edit of the body as a new list.
func (f fit) edits() []edit {
	if !f.made {
		return nil
	}
	return []edit{f.edit}
}

// key tells requests apart whose context lengths were changed in different ways; "" if nothing was.
func (f fit) key() string {
	if !f.made {
		return ""
	}
	return fmt.Sprint(f.to, len(f.edit.text))
}

// String describes the fit for the ledger's detail.
func (f fit) String() string {
	from := "none"
	if f.from > 0 {
		from = strconv.Itoa(f.from)
	}
	return fmt.Sprintf("num_ctx from %s to %d by --num-ctx-policy %s", from, f.to, f.policy)
}

// fitContext applies the operator's policy to the num_ctx of a native request, whose chain was read
// from data. It does so before a lane is chosen, because each lane belongs to one num_ctx.
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
	// A model that was loaded by requests without a num_ctx serves others from the same runner only
	// if they state none, either.
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

// contexts returns the context lengths known for the request's model on all servers that may get
// it.
func (h *Handler) contexts(ex *exchange) runners.Contexts {
	var list []runners.Contexts
	for _, b := range h.candidates(ex) {
		st := b.State()
		list = append(list, b.runners.Contexts(ex.key, st.Digests[ex.key], st.Loaded))
	}
	return onAll(list)
}

// onAll combines the context lengths of several servers if any of them may get the request: it
// takes the largest. The default is known only if every server's is. The loaded length counts as
// the default only if it is so on every server; otherwise a request that states none might get less
// elsewhere.
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

// numCtxEdit returns the edit that changes a body's num_ctx from asked (0 if absent) to tokens, or,
// with leave, removes it. It returns false for a body in a form that the proxy does not edit.
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

// options returns the last member named "options", and the number of such members.
func (f fields) options(data []byte) (last jsonscan.Member, n int) {
	for _, m := range f.members {
		if jsonscan.KeyIs(data[m.Key:m.KeyEnd], keyOptions) {
			last = m
			n++
		}
	}
	return last, n
}

// option is a number in an object, as offsets into the body.
type option struct {
	n               int // number of occurrences; if 0, only others is set
	value, valueEnd int
	from, to        int  // the whole member, with its comma
	others          bool // the object has other members
}

// findOption finds a member of an options object, whose keys do not fold case. It returns false if
// the member occurs twice or is not a number.
func findOption(data []byte, options jsonscan.Member, name []byte) (option, bool) {
	var o option
	c := jsonscan.NewCursor(data, options.Value)
	c.Enter()
	end := -1 // end of the previous member
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
