package attach

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

const (
	// maxBody is how many bytes a body may have to be looked at.
	maxBody = 1 << 20
	// minShared is how many bytes of text the requests of a group share at least, in the system prompt or at the head of
	// the prompt.
	minShared = 512
	// checked is how many bytes of a string jsonscan looks at for control characters, which no string may have.
	checked = 64 << 10
	// passThrough is the template that renders to the prompt alone.
	passThrough = `{{ .Prompt }}`
)

// request is a body of /api/generate as Ollama reads it, with the offsets of what is edited. Ollama decodes with
// encoding/json: keys fold case, the last duplicate wins, and null leaves a string as it was.
type request struct {
	body   []byte
	prompt string
	system string
	numCtx int // tokens, the least of all that the options name; 0 if they name none

	promptAt, systemAt span   // the values that count; systemAt is empty where there is no system prompt
	keepAlives         []span // every keep_alive's value
	end                int    // the offset of the closing brace

	// group is the same for two requests if their rendered prompts differ by nothing but the prompt: every member but the
	// prompt and what only concerns the answer, as it is written, and the prompt's head and outer space.
	group string
}

// span is a range of bytes.
type span struct{ at, end int }

// change replaces a span by text.
type change struct {
	span
	text string
}

// Members by what they are for. Any other member is part of the group, also one that nobody knows.
var (
	keyPrompt    = []byte("prompt")
	keySystem    = []byte("system")
	keyOptions   = []byte("options")
	keyKeepAlive = []byte("keep_alive")
	keyNumCtx    = []byte("num_ctx")
	keyContext   = []byte("context")

	// With one of these a request has a form of its own.
	ownForm = keys("raw", "suffix", "images", "template", "_debug_render_only")
	// These do not change the prompt.
	perRequest = keys("stream", "logprobs", "top_logprobs")
	// These are the options with which a model is loaded; other options concern the answer.
	runnerOptions = keys("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict")
)

// markers are what templates and Ollama's renderers look for in a user's prompt, and treat in another way than other text.
// U+FFFD is there because an incomplete character of a detokenized text shows as one.
var markers = []string{"/think", "<think", "no_think", "tool_response>", "[img", "\uFFFD"}

func keys(names ...string) [][]byte {
	list := make([][]byte, len(names))
	for i, name := range names {
		list[i] = []byte(name)
	}
	return list
}

func isOne(key []byte, names [][]byte) bool {
	return slices.ContainsFunc(names, func(name []byte) bool { return jsonscan.KeyIs(key, name) })
}

// read reads a body; false where a stored context cannot be attached to it.
func read(body []byte) (*request, bool) {
	if len(body) > maxBody {
		return nil, false
	}
	r := &request{body: body}
	var group []byte
	o := jsonscan.NewObject(body)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		if group, ok = r.readMember(m, group); !ok {
			return nil, false
		}
	}
	marked := func(s string) bool { return strings.Contains(r.prompt, s) }
	if o.Err() != nil || slices.ContainsFunc(markers, marked) {
		return nil, false
	}
	r.end = o.End() - 1

	// A template that trims a prompt or not does so by its outer space.
	text := strings.TrimSpace(r.prompt)
	if text == "" {
		return nil, false
	}
	before, after, _ := strings.Cut(r.prompt, text)
	group = append(append(append(append(group, '\n'), strconv.Quote(before)...), strconv.Quote(after)...), '\n')
	if len(r.system) < minShared {
		if len(r.prompt) < minShared {
			return nil, false
		}
		group = append(group, r.prompt[:minShared]...)
	}
	r.group = string(group)
	return r, true
}

// readMember takes in a member, and appends it to the group if it is part of that; false where a
// stored context cannot be attached.
func (r *request) readMember(m jsonscan.Member, group []byte) ([]byte, bool) {
	key, value := r.body[m.Key:m.KeyEnd], r.body[m.Value:m.ValueEnd]
	switch {
	case isOne(key, perRequest):
		return group, true
	case jsonscan.KeyIs(key, keyPrompt):
		return group, readString(value, &r.prompt, m, &r.promptAt)
	case jsonscan.KeyIs(key, keyOptions):
		return r.readOptions(value, group)
	case jsonscan.KeyIs(key, keyKeepAlive):
		r.keepAlives = append(r.keepAlives, span{m.Value, m.ValueEnd})
		return group, !unloads(value)
	case jsonscan.KeyIs(key, keySystem):
		if !readString(value, &r.system, m, &r.systemAt) {
			return nil, false
		}
	case jsonscan.KeyIs(key, keyContext):
		// With an empty one, too, Ollama leaves out the messages that the model was created with.
		if string(value) != "null" {
			return nil, false
		}
	case isOne(key, ownForm):
		if !empty(value) {
			return nil, false
		}
	}
	return append(append(append(append(group, key...), ':'), value...), ','), true
}

// readString takes in a string's value; false where Ollama will refuse it. A prompt that is written anew must not become
// valid by that.
func readString(value []byte, s *string, m jsonscan.Member, at *span) bool {
	if string(value) == "null" {
		return true
	}
	if len(value) > checked && slices.ContainsFunc(value, func(c byte) bool { return c < ' ' }) {
		return false
	}
	var ok bool
	*s, ok = jsonscan.Unquote(value)
	*at = span{m.Value, m.ValueEnd}
	return ok
}

// readOptions appends the options with which the model is loaded to the group.
func (r *request) readOptions(value, group []byte) ([]byte, bool) {
	group = append(group, "options{"...)
	if string(value) == "null" {
		return append(group, "null}"...), true // it also forgets what a duplicate before it said
	}
	o := jsonscan.NewObject(value)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		key, option := value[m.Key:m.KeyEnd], value[m.Value:m.ValueEnd]
		if !isOne(key, runnerOptions) {
			continue
		}
		group = append(append(append(append(group, key...), ':'), option...), ',')
		if jsonscan.KeyIs(key, keyNumCtx) && string(option) != "null" {
			n, err := strconv.ParseFloat(string(option), 64)
			if err != nil || n < 1 {
				return group, false
			}
			if n < 1<<31 && (r.numCtx == 0 || int(n) < r.numCtx) {
				r.numCtx = int(n)
			}
		}
	}
	return append(group, '}'), o.Err() == nil
}

// empty reports whether a member of ownForm says nothing.
func empty(value []byte) bool {
	switch string(value) {
	case "null", "false", `""`:
		return true
	}
	return len(value) > 0 && value[0] == '[' && len(bytes.TrimSpace(value[1:len(value)-1])) == 0
}

// unloads reports whether a keep_alive may be 0: the model is gone after the request, and rendering would load it again.
func unloads(value []byte) bool {
	return value[0] == '0' || bytes.HasPrefix(value, []byte(`"0`))
}

// attached returns the body with prompt in place of the client's and the context (a JSON array) in place of what comes
// before it. Every other byte stays. What is new stands at the end, where it goes before any duplicate.
func (r *request) attached(prompt string, context []byte) []byte {
	return r.edit(r.attachedChanges(prompt, context)...)
}

func (r *request) attachedChanges(prompt string, context []byte) []change {
	changes := []change{
		{r.promptAt, quote(prompt)},
		{span{r.end, r.end}, `,"template":"` + passThrough + `","context":` + string(context)},
	}
	if r.systemAt.end > 0 {
		changes = append(changes, change{r.systemAt, `""`})
	}
	return changes
}

// rendering returns the body with changes, made to render only. It leaves keep_alive out: the client's own counts already,
// or another client's that came since.
func (r *request) rendering(changes ...change) []byte {
	for _, at := range r.keepAlives {
		changes = append(changes, change{at, "null"})
	}
	return r.edit(append(changes, change{span{r.end, r.end}, `,"_debug_render_only":true`})...)
}

// edit makes changes that do not overlap; those at one place stay in their order.
func (r *request) edit(changes ...change) []byte {
	slices.SortStableFunc(changes, func(a, b change) int { return cmp.Compare(a.at, b.at) })
	grow := 0
	for _, c := range changes {
		grow += len(c.text)
	}
	out := make([]byte, 0, len(r.body)+grow)
	from := 0
	for _, c := range changes {
		out = append(append(out, r.body[from:c.at]...), c.text...)
		from = c.end
	}
	return append(out, r.body[from:]...)
}

// quote writes a string as JSON.
func quote(s string) string {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		panic(err) // a string always encodes
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// tokens reads a JSON array of token ids; false where it is something else.
func tokens(array []byte) ([]int32, bool) {
	b := bytes.TrimSpace(array)
	if len(b) < 2 || b[0] != '[' || b[len(b)-1] != ']' {
		return nil, false
	}
	b = b[1 : len(b)-1]
	list := make([]int32, 0, len(b)/4)
	for len(bytes.TrimSpace(b)) > 0 {
		var number []byte
		var more bool
		number, b, more = bytes.Cut(b, []byte(","))
		n, err := strconv.ParseInt(string(bytes.TrimSpace(number)), 10, 32)
		if err != nil || more && len(bytes.TrimSpace(b)) == 0 {
			return nil, false
		}
		list = append(list, int32(n))
	}
	return list, true
}

// array writes token ids as a JSON array.
func array(list []int32) []byte {
	b := []byte{'['}
	for i, n := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, int64(n), 10)
	}
	return append(b, ']')
}
