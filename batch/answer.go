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

// maxAnswer is how many bytes an answer may have, so that a runaway one ends before memory does.
const maxAnswer = 64 << 20

var errLong = fmt.Errorf("the answer is longer than %d MiB", maxAnswer>>20)

// joined are the members of a stream's pieces that are joined to one text, appended to one list, or joined member by member.
var joined = map[string]byte{
	"content": '"', "thinking": '"', "reasoning": '"', "response": '"', "text": '"',
	"tool_calls": '[', "logprobs": '[', "message": '{', "delta": '{',
}

// object is a JSON object that is put together from the pieces of a stream.
type object struct {
	names   []string // in the order in which they came
	members map[string]*value
}

type value struct {
	text   *strings.Builder // of joined texts
	list   [][]byte         // of appended lists
	object *object
	raw    []byte // the last one that was not null
}

// join takes in a piece.
func (o *object) join(piece []byte) error {
	s := jsonscan.NewObject(piece)
	for m, ok := s.Next(); ok; m, ok = s.Next() {
		key, raw := piece[m.Key:m.KeyEnd], piece[m.Value:m.ValueEnd]
		name, _ := jsonscan.Unquote(key)
		v := o.members[name]
		if v == nil {
			v = &value{raw: []byte("null")}
			if o.members == nil {
				o.members = map[string]*value{}
			}
			o.members[name], o.names = v, append(o.names, name)
		}
		if err := v.join(name, raw); err != nil {
			return err
		}
	}
	return s.Err()
}

func (v *value) join(name string, raw []byte) error {
	switch kind := raw[0]; {
	case kind == 'n':
	case kind == '"' && joined[name] == '"':
		text, ok := jsonscan.Unquote(raw)
		if !ok {
			return jsonscan.ErrSyntax
		}
		if v.text == nil {
			v.text = new(strings.Builder)
		}
		v.text.WriteString(text)
	case kind == '[' && joined[name] == '[':
		c := jsonscan.NewCursor(raw, 0)
		for c.Enter(); c.More(); {
			v.list = append(v.list, bytes.Clone(c.Value()))
		}
	case kind == '{' && (joined[name] == '{' || name == "logprobs"):
		if v.object == nil {
			v.object = new(object)
		}
		return v.object.join(raw)
	case kind == '[' && name == "choices": // Ollama makes one
		c := jsonscan.NewCursor(raw, 0)
		for c.Enter(); c.More(); {
			if v.object == nil {
				v.object = new(object)
			}
			if err := v.object.join(c.Value()); err != nil {
				return err
			}
		}
	default:
		v.raw = bytes.Clone(raw)
	}
	return nil
}

// varies are the members of Ollama's own answers that differ from run to run. context is left out as well: it repeats the whole
// prompt in numbers, and Ollama has deprecated it.
var varies = []string{
	"created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "prompt_eval_cached_count", "context",
}

// appendTo writes the object. line is what stands in an OpenAI answer for its id; 0 for Ollama's own answers.
func (o *object) appendTo(b []byte, line int, top bool) []byte {
	b = append(b, '{')
	for _, name := range o.names {
		v := o.members[name]
		if top && line == 0 && slices.Contains(varies, name) {
			continue
		}
		if b[len(b)-1] != '{' {
			b = append(b, ',')
		}
		if name == "delta" {
			name = "message"
		}
		b = append(append(b, quoted(name)...), ':')
		switch {
		case top && line > 0 && name == "id":
			b = fmt.Appendf(b, `"line-%d"`, line)
		case top && line > 0 && name == "created":
			b = append(b, '0')
		case top && line > 0 && name == "usage":
			b = append(b, withoutDetails(v.raw)...)
		case top && line > 0 && name == "object":
			b = append(b, bytes.Replace(v.raw, []byte(".chunk"), nil, 1)...)
		case name == "choices" && v.object != nil:
			b = append(v.object.appendTo(append(b, '['), line, false), ']')
		case v.object != nil:
			b = v.object.appendTo(b, line, false)
		case v.text != nil:
			b = append(b, quoted(v.text.String())...)
		case v.list != nil:
			b = append(b, '[')
			for i, e := range v.list {
				if i > 0 {
					b = append(b, ',')
				}
				b = append(b, compacted(e)...)
			}
			b = append(b, ']')
		default:
			b = append(b, compacted(v.raw)...)
		}
	}
	return append(b, '}')
}

// withoutDetails is OpenAI's usage without the tokens that were reused, which differ from run to run.
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

// readAnswer reads an answer with status 200 and returns it in one piece, as the result has it, and its counts. begun is called
// when the answer begins.
func readAnswer(body io.Reader, r *request, contentType string, line int, begun func()) ([]byte, Counts, error) {
	mediaType, _, _ := strings.Cut(contentType, ";")
	events := strings.TrimSpace(mediaType) == "text/event-stream"
	in := bufio.NewReader(io.LimitReader(body, maxAnswer+1))
	var all object
	whole, size := false, 0
	for {
		piece, err := in.ReadBytes('\n')
		if len(piece) > 0 && size == 0 {
			begun()
		}
		if size += len(piece); size > maxAnswer {
			return nil, Counts{}, errLong
		}
		text := bytes.TrimSpace(piece)
		if events {
			var data bool
			if text, data = bytes.CutPrefix(text, []byte("data:")); !data {
				text = nil
			}
			if text = bytes.TrimSpace(text); string(text) == "[DONE]" {
				whole, text = true, nil
			}
		}
		if len(text) > 0 {
			if e := all.join(text); e != nil {
				return nil, Counts{}, fmt.Errorf("reading the answer: %w", errors.Join(e, err))
			}
			if e := all.members["error"]; e != nil && string(e.raw) != "null" {
				return nil, Counts{}, &serverError{message(text)}
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, Counts{}, err
		}
	}
	id := line
	if r.native() {
		id = 0
		done := all.members["done"]
		whole = r.endpoint == prefix.Embed || done != nil && string(done.raw) == "true"
	} else if !events {
		whole = true
	}
	if size == 0 || !whole {
		return nil, Counts{}, fmt.Errorf("the answer broke off: %w", io.ErrUnexpectedEOF)
	}
	return all.appendTo(nil, id, true), all.counts(r), nil
}

// serverError is what the server said instead of the end of an answer that had begun.
type serverError struct{ text string }

func (e *serverError) Error() string { return e.text }

// counts reads what an answer's end tells.
func (o *object) counts(r *request) Counts {
	number := func(name string, to any) {
		if v := o.members[name]; v != nil {
			json.Unmarshal(v.raw, to) // what is no number tells nothing
		}
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

// message returns what an error's body says.
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
