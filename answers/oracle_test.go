package answers

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/ollama/ollama/anthropic"
	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// What Ollama itself makes of a body is the oracle: its own types decode it, and its own functions
// make a native request of it.

// oracle is what Ollama makes of a body, without what changes no word of the answer.
type oracle struct {
	request any         // the native request, or the error
	echoed  any         // what else of the body gets into the answer
	unknown [][2]string // names and values of members that Ollama does not know
	form    Form
	prompt  bool
	options map[string]any
}

var endpoints = []prefix.Endpoint{
	prefix.Chat, prefix.Generate, prefix.ChatCompletions, prefix.Completions, prefix.Messages, prefix.Responses,
}

// ask asks the oracle.
func ask(t *testing.T, e prefix.Endpoint, body []byte) oracle {
	o := oracle{}
	decode := func(to any) error { return json.NewDecoder(bytes.NewReader(body)).Decode(to) }
	var err error
	switch e {
	case prefix.Chat:
		var r api.ChatRequest
		if err = decode(&r); err == nil {
			o.known(r, body)
			o.form, o.prompt = formOf(r.Stream == nil || *r.Stream, nil), len(r.Messages) > 0
			o.chat(&r)
		}
	case prefix.Generate:
		var r api.GenerateRequest
		if err = decode(&r); err == nil {
			o.known(r, body)
			o.form, o.prompt = formOf(r.Stream == nil || *r.Stream, nil), r.Prompt != ""
			o.generate(&r)
		}
	case prefix.ChatCompletions:
		var r openai.ChatCompletionRequest
		if err = decode(&r); err == nil {
			o.known(r, body)
			o.form, o.prompt = formOf(r.Stream, r.StreamOptions), len(r.Messages) > 0
			var native *api.ChatRequest
			if native, err = openai.FromChatRequest(r); err == nil {
				o.chat(native)
			}
		}
	case prefix.Completions:
		var r openai.CompletionRequest
		if err = decode(&r); err == nil {
			o.known(r, body)
			o.form, o.prompt = formOf(r.Stream, r.StreamOptions), r.Prompt != ""
			var native api.GenerateRequest
			if native, err = openai.FromCompleteRequest(r); err == nil {
				o.generate(&native)
			}
		}
	case prefix.Messages:
		var r anthropic.MessagesRequest
		if err = decode(&r); err == nil {
			o.known(r, body)
			o.form, o.prompt = formOf(r.Stream, nil), len(r.Messages) > 0
			o.echoed = anthropic.EstimateInputTokens(r)
			var native *api.ChatRequest
			if native, err = anthropic.FromMessagesRequest(r); err == nil {
				o.chat(native)
			}
		}
	case prefix.Responses:
		var r openai.ResponsesRequest
		if err = decode(&r); err == nil {
			o.known(r, body)
			o.form = formOf(r.Stream != nil && *r.Stream, nil)
			var native *api.ChatRequest
			if native, err = openai.FromResponsesRequest(r); err == nil {
				o.prompt = len(native.Messages) > 0
				o.chat(native)
			}
			r.Stream = nil
			o.echoed = encode(t, r)
		}
	}
	if err != nil {
		return oracle{request: errors.New("refused")}
	}
	return o
}

func formOf(stream bool, options *openai.StreamOptions) Form {
	switch {
	case !stream:
		return Whole
	case options != nil && options.IncludeUsage:
		return StreamUsage
	}
	return Stream
}

func (o *oracle) chat(r *api.ChatRequest) {
	r.Stream, r.KeepAlive = nil, nil
	if len(r.Options) == 0 {
		r.Options = nil
	}
	if len(r.Tools) == 0 {
		r.Tools = nil
	}
	r.Format = compacted(r.Format)
	o.request, o.options = *r, r.Options
}

func (o *oracle) generate(r *api.GenerateRequest) {
	r.Stream, r.KeepAlive = nil, nil
	if len(r.Options) == 0 {
		r.Options = nil
	}
	if len(r.Images) == 0 {
		r.Images = nil
	}
	r.Format = compacted(r.Format)
	o.request, o.options = *r, r.Options
}

// compacted is what the encoder makes of raw JSON on its way to the engine.
func compacted(raw json.RawMessage) json.RawMessage {
	if raw == nil {
		return nil
	}
	var b bytes.Buffer
	if err := json.Compact(&b, raw); err != nil {
		return raw
	}
	return b.Bytes()
}

// known collects the members that the type has no field for.
func (o *oracle) known(request any, body []byte) {
	typ := reflect.TypeOf(request)
	object := jsonscan.NewObject(body)
	for m, ok := object.Next(); ok; m, ok = object.Next() {
		key := body[m.Key:m.KeyEnd]
		known := jsonscan.KeyIs(key, []byte("stream_options")) || jsonscan.KeyIs(key, []byte("keep_alive"))
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			known = known || jsonscan.KeyIs(key, []byte(name))
		}
		if known {
			continue
		}
		var name string
		var value any
		decoder := json.NewDecoder(bytes.NewReader(body[m.Value:m.ValueEnd]))
		decoder.UseNumber()
		_ = json.Unmarshal(key, &name)
		_ = decoder.Decode(&value)
		text, _ := json.Marshal(value)
		o.unknown = append(o.unknown, [2]string{name, string(text)})
	}
}

func (o oracle) equal(p oracle) bool {
	return reflect.DeepEqual(o.request, p.request) && reflect.DeepEqual(o.echoed, p.echoed) &&
		alike(o.unknown, p.unknown)
}

// alike reports whether two lists have the same members but for their order and for case: with a
// newer Ollama, they may be known.
func alike(a, b [][2]string) bool {
	b = slices.Clone(b)
	for _, m := range a {
		i := slices.IndexFunc(b, func(n [2]string) bool { return strings.EqualFold(m[0], n[0]) })
		if i < 0 || b[i][1] != m[1] {
			return false
		}
		b = slices.Delete(b, i, i+1)
	}
	return len(b) == 0
}

// fixed reports whether the engine is asked for the likeliest tokens, or with a seed.
func (o oracle) fixed(t *testing.T, defaults map[string]any) bool {
	options := api.DefaultOptions()
	if err := options.FromMap(defaults); err != nil {
		t.Fatal(err)
	}
	var decoded map[string]any // between Ollama's converters and its handlers lies JSON
	if err := json.Unmarshal(encode(t, o.options), &decoded); err != nil {
		t.Fatal(err)
	}
	err := options.FromMap(decoded)
	return err != nil || options.Temperature == 0 || uint32(options.Seed) != 1<<32-1 // or refused
}

func encode(t *testing.T, v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// check compares what Identify says about two bodies with what the oracle says. It returns whether
// each of them takes them for one.
func check(t *testing.T, e prefix.Endpoint, a, b []byte) (same, hit bool) {
	t.Helper()
	if !valid(a) || !valid(b) {
		return false, false
	}
	seed, zero := int64(7), 0.0
	defaults := map[string]any{"seed": float64(seed)}
	given := Defaults{Seed: &seed}
	if len(a)%2 == 1 {
		defaults, given = map[string]any{"temperature": zero}, Defaults{Temperature: &zero}
	}
	x, y := Identify(e, a, nil, nil, given), Identify(e, b, nil, nil, Defaults{})
	p, q := ask(t, e, a), ask(t, e, b)
	same, hit = p.equal(q), x.Sum == y.Sum
	if hit && !same {
		t.Fatalf("%d: one sum, but Ollama tells them apart:\n%q\n%q\n%+v\n%+v", e, a, b, p, q)
	}
	for _, c := range []struct {
		body     []byte
		id       Identity
		oracle   oracle
		defaults map[string]any
	}{{a, x, p, defaults}, {b, y, q, nil}} {
		if _, refused := c.oracle.request.(error); refused {
			continue // nothing is kept of that
		}
		if c.id.Prompt && !c.oracle.prompt {
			t.Fatalf("%d: nothing to evaluate in %q", e, c.body)
		}
		if c.id.Form != c.oracle.form {
			t.Fatalf("%d: form %d, want %d: %q", e, c.id.Form, c.oracle.form, c.body)
		}
		if c.id.Deterministic && !c.oracle.fixed(t, c.defaults) {
			t.Fatalf("%d: not determined: %q", e, c.body)
		}
	}
	return same, hit
}

// valid reports whether the body is an object, and of a depth that the test's own recursion is for.
func valid(body []byte) bool {
	o := jsonscan.NewObject(body)
	for _, ok := o.Next(); ok; _, ok = o.Next() {
	}
	return o.Err() == nil && bytes.Count(body, []byte("["))+bytes.Count(body, []byte("{")) < 1000
}

// node is a JSON value that can be changed, and written in many ways.
type node struct {
	kind byte // of jsonscan.Cursor.Kind
	text string
	keys []string
	kids []*node
}

func parse(c *jsonscan.Cursor) *node {
	n := &node{kind: c.Kind()}
	switch n.kind {
	case '{', '[':
		for c.Enter(); c.More(); {
			if n.kind == '{' {
				key, _ := jsonscan.Unquote(c.Key())
				n.keys = append(n.keys, key)
			}
			n.kids = append(n.kids, parse(c))
		}
	case '"':
		n.text, _ = jsonscan.Unquote(c.Value())
	default:
		n.text = string(c.Value())
	}
	return n
}

// all lists the node and those below it.
func (n *node) all() []*node {
	list := []*node{n}
	for _, k := range n.kids {
		list = append(list, k.all()...)
	}
	return list
}

// chance is where a test's decisions come from: bytes that the fuzzer chooses.
type chance struct {
	bytes []byte
	calm  bool // decisions about spelling are taken in the usual way
}

func (c *chance) n(n int) int {
	if len(c.bytes) == 0 || n < 2 {
		return 0
	}
	v := int(c.bytes[0]) % n
	c.bytes = c.bytes[1:]
	return v
}

// odd is true once in n times.
func (c *chance) odd(n int) bool { return !c.calm && c.n(n) == 1 }

// write writes the value; the members of the outermost object, and of its options, in any order.
func (n *node) write(b *bytes.Buffer, c *chance, depth int, shuffle bool) {
	space := func() {
		if c.odd(12) {
			b.WriteString([]string{" ", "\n", "\t ", "\r"}[c.n(4)])
		}
	}
	switch n.kind {
	case '{', '[':
		b.WriteByte(n.kind)
		order := make([]int, len(n.kids))
		for i := range order {
			order[i] = i
		}
		for i := len(order) - 1; shuffle && i > 0 && !c.calm; i-- {
			j := c.n(i + 1)
			order[i], order[j] = order[j], order[i]
		}
		for at, i := range order {
			if at > 0 {
				b.WriteByte(',')
			}
			space()
			if n.kind == '{' {
				key := n.keys[i]
				if depth == 0 && c.odd(8) {
					key = []string{strings.ToUpper(key), capital(key), strings.ReplaceAll(key, "s", "\u017f")}[c.n(3)]
				}
				writeString(b, c, key)
				b.WriteByte(':')
				space()
			}
			inside := depth == 0 && n.kind == '{' && strings.EqualFold(n.keys[i], "options")
			n.kids[i].write(b, c, depth+1, inside)
			space()
		}
		b.WriteByte(n.kind + 2)
	case '"':
		writeString(b, c, n.text)
	default:
		text := n.text
		if n.kind != 't' && n.kind != 'f' && n.kind != 'n' && c.odd(6) && !strings.ContainsAny(text, ".eE") {
			text += []string{".0", "e0", ".00", "E+0"}[c.n(4)]
		}
		b.WriteString(text)
	}
}

func capital(s string) string {
	_, n := utf8.DecodeRuneInString(s)
	return strings.ToUpper(s[:n]) + s[n:]
}

// writeString writes a string, some of it with escapes.
func writeString(b *bytes.Buffer, c *chance, s string) {
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"', r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ', r <= 0xffff && c.odd(30):
			fmt.Fprintf(b, `\u%04x`, r)
		case r > 0xffff && c.odd(3):
			fmt.Fprintf(b, `\u%04X\u%04x`, 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
}

// pool are values to put in the place of others.
var pool = []string{
	`null`, `true`, `false`, `0`, `-0`, `1`, `-1`, `0.0`, `0.7`, `1e-60`, `1E400`, `10`, `4294967295`, `""`, `"a"`, `[]`, `{}`,
	`[null]`, `"json"`, `{"type":"object"}`, `"\ud800"`, `"\ufffd"`, `[1,2]`, `["a"]`, `"high"`, `"function"`, `"web_search"`,
	`[{"type":"web_search"}]`, `{"temperature":0}`, `{"seed":1,"temperature":1}`, `{"include_usage":true}`, `"AAAA"`, `["AAAA"]`,
	`[{"role":"user","content":"hi"}]`, `[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"b":{"type":"string"},"a":{"type":"integer"}}}}}]`,
}

// names are members to add.
var names = []string{
	"stream", "stream_options", "keep_alive", "model", "messages", "prompt", "input", "options", "tools", "think", "format", "raw",
	"images", "suffix", "system", "template", "context", "truncate", "shift", "logprobs", "top_logprobs", "_debug_render_only",
	"max_tokens", "seed", "stop", "temperature", "frequency_penalty", "presence_penalty", "top_p", "top_k", "response_format",
	"reasoning", "reasoning_effort", "thinking", "metadata", "output_config", "stop_sequences", "tool_choice", "instructions",
	"max_output_tokens", "text", "truncation", "include", "conversation", "previous_response_id", "background", "user", "n",
	"keep_alıve", "other", "Other",
}

// change changes the value a little.
func (n *node) change(c *chance) {
	list := n.all()
	put := func() *node {
		cursor := jsonscan.NewCursor([]byte(pool[c.n(len(pool))]), 0)
		return parse(&cursor)
	}
	switch at := list[c.n(len(list))]; c.n(6) {
	case 0: // another value
		if at != n {
			*at = *put()
		}
	case 1: // a member more, at the top
		n.keys, n.kids = append(n.keys, names[c.n(len(names))]), append(n.kids, put())
	case 2: // a member or element less
		if i := c.n(len(at.kids)); len(at.kids) > 0 {
			at.kids = slices.Delete(at.kids, i, i+1)
			if at.kind == '{' {
				at.keys = slices.Delete(at.keys, i, i+1)
			}
		}
	case 3: // one of them twice
		if i := c.n(len(at.kids)); len(at.kids) > 0 {
			at.kids = append(at.kids, at.kids[i])
			if at.kind == '{' {
				at.keys = append(at.keys, at.keys[i])
			}
		}
	case 4: // two of them exchanged
		if len(at.kids) > 1 {
			i, j := c.n(len(at.kids)), c.n(len(at.kids))
			at.kids[i], at.kids[j] = at.kids[j], at.kids[i]
			if at.kind == '{' {
				at.keys[i], at.keys[j] = at.keys[j], at.keys[i]
			}
		}
	case 5: // a letter more
		if at.kind == '"' {
			at.text += []string{"a", "\n", "é", "\u2028", "😀", "<", "\x00"}[c.n(7)]
		}
	}
}

// pair makes two bodies of one: the second is the first changed in a few places, or in none, and each
// is written in a way of its own.
func pair(body, choices []byte) (a, b []byte) {
	c := &chance{bytes: choices}
	cursor := jsonscan.NewCursor(body, 0)
	n := parse(&cursor)
	for range c.n(3) {
		n.change(c)
	}
	var x, y bytes.Buffer
	calm := c.n(2) == 0
	c.calm = calm
	n.write(&x, c, 0, true)
	c.calm = false
	for range c.n(3) {
		n.change(c)
	}
	n.write(&y, c, 0, true)
	return x.Bytes(), y.Bytes()
}

// bodies are where the fuzzers start.
var bodies = map[prefix.Endpoint][]string{
	prefix.Chat: {
		`{"model":"m","messages":[{"role":"system","content":"be kind"},{"role":"user","content":"why is the sky blue?\n\u00e9"}],"options":{"temperature":0,"num_ctx":4096,"seed":3,"stop":["\n"]},"stream":true,"keep_alive":"5m"}`,
		`{"model":"m","messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{"b":1.0,"a":"x"}}}]},{"role":"tool","tool_name":"f","content":"7"}],"tools":[{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object","required":["a"],"properties":{"b":{"type":"number"},"a":{"type":["string","null"],"enum":["x",1]}}}}}],"think":"high","format":{"type":"object","properties":{"x":{"maximum":1.0}}}}`,
	},
	prefix.Generate: {
		`{"model":"m","prompt":"Hello \ud83d\ude00","system":"s","options":{"seed":1,"top_p":0.9},"images":["AAAA"],"stream":false,"context":[1,2,3]}`,
		`{"model":"m:latest","prompt":"def f(","suffix":"return","raw":true,"format":"json","template":"{{ .Prompt }}","think":false}`,
	},
	prefix.ChatCompletions: {
		`{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi"},{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]}],"temperature":0,"seed":1,"stream":true,"stream_options":{"include_usage":true},"max_tokens":10,"user":"u"}`,
		`{"model":"m","messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"call_1","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","tool_call_id":"call_1","content":"7"}],"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"a":{"type":"integer"}}}}}],"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object"}}},"stop":["a","b"],"reasoning_effort":"low"}`,
	},
	prefix.Completions: {
		`{"model":"m","prompt":"Once","max_tokens":5,"temperature":0.0,"stop":"x","logprobs":2,"top_p":0.1,"suffix":"."}`,
	},
	prefix.Messages: {
		`{"model":"m","max_tokens":100,"system":[{"type":"text","text":"s","cache_control":{"type":"ephemeral"}}],"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":[{"type":"tool_use","id":"t","name":"f","input":{"b":1,"a":2}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":"7"}]}],"tools":[{"name":"f","description":"d","input_schema":{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"integer"}}}}],"temperature":0,"thinking":{"type":"disabled"},"metadata":{"user_id":"u"}}`,
	},
	prefix.Responses: {
		`{"model":"m","input":"hi","instructions":"be kind","temperature":0,"max_output_tokens":9,"reasoning":{"effort":"low"}}`,
		`{"model":"m","input":[{"type":"message","role":"user","content":[{"type":"input_text","text":"hi"}]},{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"c","output":"7"}],"tools":[{"type":"function","name":"f","parameters":{"type":"object","properties":{}}}],"text":{"format":{"type":"json_schema","name":"x","schema":{"type":"object"}}},"stream":true,"truncation":"auto"}`,
	},
}

// FuzzOracle: two bodies of one sum are one request for Ollama.
func FuzzOracle(f *testing.F) {
	for i, e := range endpoints {
		for _, body := range bodies[e] {
			f.Add(uint8(i), []byte(body), []byte{})
			f.Add(uint8(i), []byte(body), []byte("\x01\x05\x01\x07\x02\x01\x01\x01\x09\x01\x03\x04\x05"))
		}
	}
	f.Fuzz(func(t *testing.T, endpoint uint8, body, choices []byte) {
		if !valid(body) {
			return
		}
		e := endpoints[int(endpoint)%len(endpoints)]
		a, b := pair(body, choices)
		check(t, e, a, b)
		check(t, e, body, a)
	})
}

// FuzzPair: the same, for two bodies that the fuzzer writes itself.
func FuzzPair(f *testing.F) {
	for i, e := range endpoints {
		for _, body := range bodies[e] {
			f.Add(uint8(i), []byte(body), []byte(strings.ReplaceAll(body, ":", ": ")))
		}
	}
	f.Fuzz(func(t *testing.T, endpoint uint8, a, b []byte) {
		check(t, endpoints[int(endpoint)%len(endpoints)], a, b)
	})
}

// TestOracle tells how often two spellings of one request miss each other.
func TestOracle(t *testing.T) {
	const pairs = 300
	rng := rand.New(rand.NewPCG(22, 0))
	for _, e := range endpoints {
		var same, hits int
		for i := range pairs {
			choices := make([]byte, 400)
			for j := range choices {
				choices[j] = byte(rng.Uint32())
			}
			a, b := pair([]byte(bodies[e][i%len(bodies[e])]), choices)
			s, h := check(t, e, a, b)
			if _, refused := ask(t, e, a).request.(error); refused {
				continue
			}
			if s {
				same++
			}
			if h {
				hits++
			}
		}
		t.Logf("endpoint %d: of %d pairs that are one request for Ollama, %d have one sum", e, same, hits)
		// The JSON of Messages' tools and of Responses' input counts as it is written.
		if same < pairs/20 || hits*3 < same && e != prefix.Messages && e != prefix.Responses || hits == 0 {
			t.Errorf("endpoint %d: %d of %d", e, hits, same)
		}
	}
}

// FuzzString: a string has the sum of what encoding/json decodes it to, unless that replaces something.
func FuzzString(f *testing.F) {
	for _, s := range []string{`a`, `\n\u000a`, `\ud83d\ude00`, `\ud83d`, `\ude00\ud83d`, `\ud83d\ud83d\ude00`, "\xff", `\/\b\f\r\t\\\"`} {
		f.Add([]byte(s), []byte("a"))
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var x, y string
		a, b = slices.Concat([]byte{'"'}, a, []byte{'"'}), slices.Concat([]byte{'"'}, b, []byte{'"'})
		if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
			return
		}
		sum := func(raw []byte) [32]byte {
			return identify(prefix.Generate, `{"prompt":`+string(raw)+`}`).Sum
		}
		if sum(a) == sum(b) && x != y {
			t.Fatalf("%s and %s have one sum", a, b)
		}
		if utf8.Valid(a) && utf8.Valid(b) && !strings.Contains(x+y, "\ufffd") && x == y && sum(a) != sum(b) {
			t.Fatalf("%s and %s have two sums", a, b)
		}
		plain := encode(t, x)
		if utf8.Valid(a) && !strings.Contains(x, "\ufffd") && sum(a) != sum(plain) {
			t.Fatalf("%s and %s have two sums", a, plain)
		}
	})
}

// FuzzKey: keys are equal if, and only if, the kind, the secret and all parts are.
func FuzzKey(f *testing.F) {
	f.Add("sum", "/api/chat", "m", "digest", "0.34.1", "scope", uint8(1), uint8(0), uint16(3))
	f.Add("", "", "", "", "", "", uint8(2), uint8(3), uint16(1))
	f.Fuzz(func(t *testing.T, sum, path, model, digest, version, scope string, form, kind uint8, move uint16) {
		var secret [32]byte
		parts := []string{sum, path, model, digest, version, scope, string(rune(form))}
		key := MakeKey(secret, Kind(kind), parts...)
		if MakeKey(secret, Kind(kind), slices.Clone(parts)...) != key {
			t.Fatal("not repeatable")
		}
		other := slices.Clone(parts) // some bytes go from the end of one part to the head of the next
		i := int(move) % (len(parts) - 1)
		n := min(len(parts[i]), int(move)/8%8)
		at := len(parts[i]) - n
		other[i], other[i+1] = parts[i][:at], parts[i][at:]+parts[i+1]
		if (MakeKey(secret, Kind(kind), other...) == key) != slices.Equal(parts, other) {
			t.Fatalf("%q and %q", parts, other)
		}
		if MakeKey(secret, Kind(kind), append(parts, "")...) == key || MakeKey(secret, Kind(kind+1), parts...) == key {
			t.Fatal("another part or kind, and the same key")
		}
		for i := range parts {
			other := slices.Clone(parts)
			other[i] += "x"
			if MakeKey(secret, Kind(kind), other...) == key {
				t.Fatalf("%q and %q", parts, other)
			}
		}
		secret[31] = 1
		if MakeKey(secret, Kind(kind), parts...) == key {
			t.Fatal("another secret and the same key")
		}
	})
}
