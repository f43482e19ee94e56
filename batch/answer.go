package batch

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// maxAnswer is how many bytes an answer may have, so that a runaway answer ends before memory does.
const maxAnswer = 64 << 20

var errLong = fmt.Errorf("the answer is longer than %d MiB", maxAnswer>>20)

// object is a JSON object that is put together from the pieces of a stream, by the types of their
// members.
//
// At the top of a piece, "response" and "thinking" are texts that grow, lists grow as well,
// "message" and "choices" are joined, and of everything else the last value that is not null stays.
// Within "message" and "choices", texts grow unless they are labels, objects are joined member by
// member, lists grow, an element that has the index of an earlier one is joined to that, and of
// everything else the last value stays.
type object struct {
	names   []string // in order of arrival
	members map[string]*value
}

// value is a member of an object. Its kind is that of the last piece that had it.
type value struct {
	kind   byte // " a growing text, [ a list, { a joined object, or 0
	text   strings.Builder
	list   []element
	object object
	raw    []byte // of kind 0
}

// element is an object that states its index, or a run of elements that do not.
type element struct {
	id, index string // raw; an id may be ""
	object    object
	run       []byte // as they came, separated by commas; nil: an object
}

// labels are texts within "message" and "choices" that name something: later pieces repeat them or
// leave them out.
var labels = []string{"role", "id", "type", "name", "finish_reason", "tool_name", "tool_call_id"}

// join adds a piece, which is valid JSON, or an object within one, which is the value of the member
// in.
func (o *object) join(in string, piece []byte) {
	c := jsonscan.NewCursor(piece, 0)
	for c.Enter(); c.More(); {
		name, _ := jsonscan.Unquote(c.Key())
		if in == "choices" && name == "delta" {
			name = "message"
		}
		v := o.members[name]
		if v == nil {
			v = &value{raw: []byte("null")}
			if o.members == nil {
				o.members = map[string]*value{}
			}
			o.members[name], o.names = v, append(o.names, name)
		}
		v.join(in, name, c.Value())
	}
}

func (v *value) join(in, name string, raw []byte) {
	if raw[0] == 'n' {
		return
	}
	kind := kindOf(in, name, raw[0])
	if kind != v.kind {
		*v = value{kind: kind}
	}
	switch kind {
	case '"':
		text, _ := jsonscan.Unquote(raw)
		v.text.WriteString(text)
	case '{':
		v.object.join(name, raw)
	case '[':
		c := jsonscan.NewCursor(raw, 0)
		for c.Enter(); c.More(); {
			v.add(name, c.Value(), in != "" || name == "choices")
		}
	default:
		v.raw = bytes.Clone(raw)
	}
}

// kindOf returns value.kind of a member that begins with a byte.
func kindOf(in, name string, first byte) byte {
	grows := in != "" && !slices.Contains(labels, name) ||
		in == "" && (name == "response" || name == "thinking")
	joined := in != "" || name == "message"
	if first == '[' || first == '{' && joined || first == '"' && grows {
		return first
	}
	return 0
}

// raw returns a member at the top that neither grows nor is joined, as it came, or null if there
// was none.
func (o *object) raw(name string) []byte {
	if v := o.members[name]; v != nil {
		return v.raw
	}
	return []byte("null")
}

// add adds an element of a list, by its index if it may have one.
func (v *value) add(name string, raw []byte, indexed bool) {
	if indexed && raw[0] == '{' {
		m, _ := members(raw) // it is valid
		e := element{id: string(m["id"]), index: string(m["index"])}
		if e.index != "" {
			// Some of Ollama's parsers of tool calls give each call the index 0, so a different id
			// means a different call.
			i := slices.IndexFunc(v.list, func(f element) bool {
				return f.run == nil && f.index == e.index && (f.id == e.id || e.id == "")
			})
			if i < 0 {
				i, v.list = len(v.list), append(v.list, e)
			}
			v.list[i].object.join(name, raw)
			return
		}
	}
	if last := len(v.list) - 1; last >= 0 && v.list[last].run != nil {
		v.list[last].run = append(append(v.list[last].run, ','), raw...)
		return
	}
	v.list = append(v.list, element{run: bytes.Clone(raw)})
}

// varies are the members of Ollama's own answers that differ from run to run. context is left out
// as well: it repeats the whole prompt in numbers, and Ollama has deprecated it.
var varies = []string{
	"created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "prompt_eval_cached_count", "context",
}

// steady replaces the members of OpenAI's answers that differ from run to run.
var steady = map[string]func(v *value, line int) []byte{
	"id":      func(_ *value, line int) []byte { return fmt.Appendf(nil, `"line-%d"`, line) },
	"created": func(*value, int) []byte { return []byte("0") },
	"usage":   func(v *value, _ int) []byte { return withoutDetails(v.raw) },
	"object": func(v *value, _ int) []byte {
		return bytes.Replace(v.raw, []byte(".chunk"), nil, 1)
	},
}

// appendTo writes the object, which is the value of the member in; "" is the answer itself. line
// stands for the id of an OpenAI answer; it is 0 for Ollama's own answers.
func (o *object) appendTo(b []byte, line int, in string) []byte {
	b = append(b, '{')
	for _, name := range o.names {
		if in == "" && line == 0 && slices.Contains(varies, name) {
			continue
		}
		if b[len(b)-1] != '{' {
			b = append(b, ',')
		}
		b = append(append(b, quoted(name)...), ':')
		v := o.members[name]
		if write := steady[name]; write != nil && in == "" && line > 0 {
			b = append(b, write(v, line)...)
		} else {
			b = v.appendTo(b, line, name)
		}
	}
	return append(b, '}')
}

func (v *value) appendTo(b []byte, line int, name string) []byte {
	switch v.kind {
	case '"':
		return append(b, quoted(v.text.String())...)
	case '{':
		return v.object.appendTo(b, line, name)
	case '[':
		b = append(b, '[')
		for i, e := range v.list {
			if i > 0 {
				b = append(b, ',')
			}
			if e.run != nil {
				run := compacted(slices.Concat([]byte("["), e.run, []byte("]")))
				b = append(b, run[1:len(run)-1]...)
			} else {
				b = e.object.appendTo(b, line, name)
			}
		}
		return append(b, ']')
	}
	return append(b, compacted(v.raw)...)
}

// withoutDetails returns OpenAI's usage without the reused tokens, which differ from run to run.
func withoutDetails(usage []byte) []byte {
	var u struct {
		Prompt     int `json:"prompt_tokens"`
		Completion int `json:"completion_tokens"`
		Total      int `json:"total_tokens"`
	}
	if json.Unmarshal(usage, &u) != nil {
		return []byte("null")
	}
	text, err := json.Marshal(u)
	if err != nil {
		panic(err) // three numbers
	}
	return text
}

// readAnswer reads an answer with status 200 and returns it in one piece, as the result has it,
// with its counts. begun is called when the answer begins.
func readAnswer(body io.Reader, r *request, contentType string, line int, begun func()) ([]byte, Counts, error) {
	mediaType, _, _ := strings.Cut(contentType, ";")
	events := strings.TrimSpace(mediaType) == "text/event-stream"
	in := bufio.NewReader(io.LimitReader(body, maxAnswer+1))
	var all object
	whole, size := !events, 0
	var err error
	for err == nil {
		var piece []byte
		piece, err = in.ReadBytes('\n')
		if len(piece) > 0 && size == 0 {
			begun()
		}
		if size += len(piece); size > maxAnswer {
			return nil, Counts{}, errLong
		}
		text := bytes.TrimSpace(piece)
		if events {
			if text = eventData(text); string(text) == "[DONE]" {
				whole, text = true, nil
			}
		}
		if len(text) > 0 {
			if _, e := members(text); e != nil {
				return nil, Counts{}, fmt.Errorf("reading the answer: %w", errors.Join(e, err))
			}
			all.join("", text)
			if string(all.raw("error")) != "null" {
				return nil, Counts{}, &serverError{message(text)}
			}
		}
	}
	if err != io.EOF {
		return nil, Counts{}, err
	}
	id := line
	if r.native() {
		id = 0
		whole = r.endpoint == prefix.Embed || string(all.raw("done")) == "true"
	}
	if size == 0 || !whole {
		return nil, Counts{}, fmt.Errorf("the answer broke off: %w", io.ErrUnexpectedEOF)
	}
	return all.appendTo(nil, id, ""), all.counts(r), nil
}

// eventData returns the data in a line of an event stream, or nil if there is none.
func eventData(line []byte) []byte {
	data, found := bytes.CutPrefix(line, []byte("data:"))
	if !found {
		return nil
	}
	return bytes.TrimSpace(data)
}

// serverError is what the server reported instead of the end of an answer that had begun.
type serverError struct{ text string }

func (e *serverError) Error() string { return e.text }

// counts reads the figures at an answer's end.
func (o *object) counts(r *request) Counts {
	number := func(name string, to any) {
		json.Unmarshal(o.raw(name), to) // what is not a number is ignored
	}
	c := Counts{Answers: 1}
	if r.native() {
		var m api.Metrics
		number("prompt_eval_count", &m.PromptEvalCount)
		number("prompt_eval_cached_count", &m.PromptEvalCachedCount)
		number("eval_count", &m.EvalCount)
		number("total_duration", &m.TotalDuration)
		number("load_duration", &m.LoadDuration)
		number("prompt_eval_duration", &m.PromptEvalDuration)
		number("eval_duration", &m.EvalDuration)
		c.Prompt, c.Generated = m.PromptEvalCount, m.EvalCount
		c.Total, c.Load, c.PromptEval, c.Eval = m.TotalDuration, m.LoadDuration, m.PromptEvalDuration, m.EvalDuration
		if m.PromptEvalCachedCount != nil {
			c.ReusedOf, c.Reused = c.Prompt, min(*m.PromptEvalCachedCount, c.Prompt)
		}
		return c
	}
	var usage struct {
		Prompt     int `json:"prompt_tokens"`
		Completion int `json:"completion_tokens"`
		Details    *struct {
			Cached *int `json:"cached_tokens"`
		} `json:"prompt_tokens_details"`
	}
	number("usage", &usage)
	c.Prompt, c.Generated = usage.Prompt, usage.Completion
	if d := usage.Details; d != nil && d.Cached != nil {
		c.ReusedOf, c.Reused = c.Prompt, min(*d.Cached, c.Prompt)
	}
	return c
}

// message returns the message in an error's body.
func message(body []byte) string {
	var e struct{ Error json.RawMessage }
	if json.Unmarshal(body, &e) == nil && e.Error != nil {
		var text string
		if json.Unmarshal(e.Error, &text) == nil {
			return text
		}
		var o struct{ Message string }
		if json.Unmarshal(e.Error, &o) == nil && o.Message != "" {
			return o.Message
		}
	}
	const enough = 500
	return strings.ToValidUTF8(string(body[:min(len(body), enough)]), "\uFFFD")
}
