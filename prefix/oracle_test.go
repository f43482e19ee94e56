package prefix

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ollama/ollama/anthropic"
	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"
)

// understood is the result of Ollama's own parsing of a body: everything that the prompt is
// rendered from.
type understood struct {
	messages []api.Message
	tools    string
	settings string
}

// understand decodes a body as Ollama does; false if Ollama refuses it.
func understand(e Endpoint, body []byte) (understood, bool) {
	var chat api.ChatRequest
	var err error
	through := func(request any, convert func() (*api.ChatRequest, error)) {
		if err = json.Unmarshal(body, request); err != nil {
			return
		}
		converted, convertErr := convert()
		if err = convertErr; err != nil {
			return
		}
		var text []byte
		if text, err = json.Marshal(converted); err == nil {
			err = json.Unmarshal(text, &chat)
		}
	}
	switch e {
	case Chat:
		err = json.Unmarshal(body, &chat)
	case ChatCompletions:
		var r openai.ChatCompletionRequest
		through(&r, func() (*api.ChatRequest, error) { return openai.FromChatRequest(r) })
	case Responses:
		var r openai.ResponsesRequest
		through(&r, func() (*api.ChatRequest, error) { return openai.FromResponsesRequest(r) })
	case Messages:
		var r anthropic.MessagesRequest
		through(&r, func() (*api.ChatRequest, error) { return anthropic.FromMessagesRequest(r) })
	case Generate, Completions:
		var r api.GenerateRequest
		if e == Generate {
			err = json.Unmarshal(body, &r)
		} else {
			var c openai.CompletionRequest
			if err = json.Unmarshal(body, &c); err == nil {
				r, err = openai.FromCompleteRequest(c)
			}
		}
		if r.System != "" {
			chat.Messages = append(chat.Messages, api.Message{Role: "system", Content: r.System})
		}
		chat.Messages = append(chat.Messages, api.Message{Role: "user", Content: r.Prompt, Images: r.Images})
		if r.Prompt == "" {
			chat.Messages = nil
		}
		chat.Think = r.Think
		u := understood{messages: chat.Messages, settings: fmt.Sprintf("%s %q %q %v %v", thinkText(r.Think), r.Suffix, r.Template, r.Raw, r.Context)}
		return u, err == nil
	}
	u := understood{messages: chat.Messages, settings: thinkText(chat.Think)}
	if len(chat.Tools) > 0 && len(chat.Messages) > 0 {
		u.tools = chat.Tools.String()
	}
	return u, err == nil
}

func thinkText(v *api.ThinkValue) string {
	if v == nil {
		return "none"
	}
	return fmt.Sprintf("%#v", v.Value)
}

func (u understood) String() string {
	return fmt.Sprintf("%s\n%s\n%s", toJSON(append([]api.Message{}, u.messages...)), u.tools, u.settings)
}

// A body as a tree: objects, whose keys may come in any order or in a fixed one, and arrays.
type (
	object  []any // key, value, …; a nil value is left out
	ordered []any
	array   []any
)

func (s *spelling) write(v any) {
	switch v := v.(type) {
	case string:
		s.string(v)
	case json.RawMessage:
		s.raw(v)
	case array:
		s.array(len(v), func(i int) { s.write(v[i]) })
	case object:
		members := make([]any, len(v))
		for i, m := range v {
			if members[i] = m; i%2 == 1 && m != nil {
				members[i] = func() { s.write(m) }
			}
		}
		s.object(members...)
	case ordered:
		s.b.WriteByte('{')
		for i := 0; i < len(v); i += 2 {
			if i > 0 {
				s.b.WriteByte(',')
			}
			s.space()
			s.string(v[i].(string))
			s.b.WriteByte(':')
			s.write(v[i+1])
		}
		s.b.WriteByte('}')
	default:
		panic(fmt.Sprintf("%T in a body", v))
	}
}

// author generates bodies from choices: bodies that differ in one choice differ in one thing.
type author struct {
	choices []byte
	n       int
}

func (a *author) int(n int) int {
	c := a.choices[a.n%len(a.choices)]
	a.n++
	return int(c) % n
}

func (a *author) of(values ...any) any { return values[a.int(len(values))] }

func rawJSON(text string) any { return json.RawMessage(text) }

func (a *author) text() any {
	long := strings.Repeat("0123456789abcdef", 1050)
	if a.int(200) > 0 {
		long = long[:200]
	}
	return a.of("a", "b", "ab", "", "q\"\\\n", "é🙂", long+"a", long+"b", long)
}

func (a *author) short() any { return a.of(nil, "", "a", "b") }

func (a *author) role() any { return a.of("user", "assistant", "system", "tool", "User", "developer") }

func (a *author) image() any { return a.of("aGk=", "aGo=", "aG\nk=") }

func (a *author) list(most int, item func() any) array {
	list := array{}
	for range a.int(most + 1) {
		list = append(list, item())
	}
	return list
}

// optional is a list that may be absent, or null.
func (a *author) optional(most int, item func() any) any {
	if v := a.of(nil, rawJSON("null"), true, true); v != true {
		return v
	}
	return a.list(most, item)
}

// parts is a list of one or two elements.
func (a *author) parts(part func() any) array { return append(array{part()}, a.list(1, part)...) }

func (a *author) arguments() any {
	return a.of(ordered{}, ordered{"x", rawJSON("1")}, ordered{"x", rawJSON("1.0")}, ordered{"x", "1"}, ordered{"x", rawJSON("1"), "y", rawJSON("[true,null]")}, ordered{"y", rawJSON("[true,null]"), "x", rawJSON("1")},
		ordered{"x", object{"k", "v", "l", rawJSON("12345678901234567890")}}, ordered{"x", rawJSON("2"), "x", rawJSON("1")})
}

func (a *author) schema() any {
	return a.of(object{"type", "object", "properties", ordered{}}, object{"type", "object", "required", array{"x"}, "properties", ordered{"x", object{"type", "string"}}},
		object{"type", "object", "properties", ordered{"x", object{"type", array{"string", "null"}, "enum", array{"a"}, "items", object{"b", rawJSON("1"), "a", rawJSON("2")}}, "y", object{"description", "y"}}},
		object{"type", "object", "additionalProperties", rawJSON("false"), "properties", ordered{}})
}

func (a *author) tool() any {
	return object{"type", a.of("function", "function", "web_search_1"), "function", object{"name", a.of("f", "g"), "description", a.of(nil, "d", "e"), "parameters", a.schema()}}
}

// body generates a body for an endpoint.
func (a *author) body(e Endpoint) object {
	b := object{"model", "m", "stream", rawJSON("false"), "options", object{"temperature", rawJSON("0"), "stop", array{"a"}}, "max_tokens", rawJSON("5")}
	switch e {
	case Chat:
		b = append(b, "messages", a.list(3, a.chatMessage), "tools", a.optional(2, a.tool), "think", a.think(), "format", a.of(nil, "json"))
	case Generate:
		b = append(b, "prompt", a.text(), "system", a.short(), "suffix", a.short(), "template", a.short(), "raw", a.of(nil, rawJSON("false"), rawJSON("true")), "think", a.think(),
			"images", a.optional(2, a.image), "context", a.of(nil, rawJSON("null"), rawJSON("[1,2]"), rawJSON("[1]")))
	case Completions:
		b = append(b, "prompt", a.text(), "suffix", a.short(), "system", a.short())
	case ChatCompletions:
		b = append(b, "messages", a.list(3, a.openAIMessage), "tools", a.optional(2, a.tool), "reasoning_effort", a.effort(), "reasoning", a.of(nil, nil, rawJSON("null"), object{}, object{"effort", a.effort()}))
	case Messages:
		b = append(b, "messages", a.list(3, a.anthropicMessage), "system", a.of(nil, "", "a", a.list(2, func() any {
			return object{"type", a.of("text", "other"), "text", a.text(), a.of("x", "TEXT").(string), "z"}
		})),
			"tools", a.optional(2, func() any {
				return object{"type", a.of(nil, "custom", "web_search_1"), "name", a.of("f", "web_search"), "description", a.short(), "input_schema", a.schema(), "cache_control", a.of(nil, object{"type", "ephemeral"})}
			}),
			"thinking", a.of(nil, object{"type", "enabled", "budget_tokens", rawJSON("5")}, object{"type", "disabled"}, object{"type", "adaptive"}),
			"output_config", a.of(nil, object{"effort", a.of("low", " High", "xhigh", "max", "none", "minimal", "ultra", "")}))
	case Responses:
		b = append(b, "input", a.of("", "a", a.list(4, a.responsesItem), a.list(4, a.responsesItem)), "instructions", a.short(), "tools", a.optional(2, func() any {
			f := object{"type", "function", "name", a.of("f", "g"), "description", a.of("d", "e"), "strict", rawJSON("true"), "parameters", a.schema()}
			return a.of(f, f, object{"type", "namespace", "name", "n", "tools", array{f}})
		}), "reasoning", a.of(nil, object{}, object{"effort", a.effort(), "summary", "auto"}), "think", a.think())
	}
	return b
}

func (a *author) think() any {
	return a.of(nil, rawJSON("null"), rawJSON("true"), rawJSON("false"), "high", "low")
}

func (a *author) effort() any {
	return a.of(nil, rawJSON("null"), "", "none", "minimal", "low", "high", "max", "xhigh", "ultra")
}

func (a *author) chatMessage() any {
	return object{"role", a.role(), "content", a.text(), "thinking", a.short(), "tool_name", a.short(), "tool_call_id", a.short(), "images", a.optional(2, a.image), "tool_calls", a.optional(2, func() any {
		return object{"id", a.short(), "type", "function", "function", object{"name", a.of("f", "g"), "arguments", a.arguments(), "index", a.of(nil, rawJSON("0"), rawJSON("1"))}}
	}), "name", a.short()}
}

func (a *author) openAIMessage() any {
	content := a.of("a", "b", "", rawJSON("null"), a.parts(func() any {
		return a.of(object{"type", "text", "text", a.text(), a.of("x", "TEXT").(string), "z"}, object{"type", "image_url", "image_url", object{"url", a.dataURL()}}, object{"type", "image_url", "image_url", a.dataURL()},
			object{"type", "input_audio", "input_audio", object{"data", "aGk="}})
	}))
	return object{"role", a.role(), "content", content, "reasoning", a.short(), "tool_call_id", a.short(), "name", a.short(), "tool_calls", a.optional(2, func() any {
		s := &spelling{}
		s.write(a.arguments())
		return object{"id", a.of(nil, "c", "d"), "index", rawJSON("1"), "function", object{"name", a.of("f", "g"), "arguments", s.b.String()}}
	})}
}

func (a *author) dataURL() any {
	return a.of("data:image/png;base64,aGk=", "data:image/jpeg;base64,aGk=", "data:image/png;base64,aGo=")
}

func (a *author) source() any {
	return object{"type", "base64", "media_type", a.of("image/png", "image/jpeg"), "data", a.of("aGk=", "aGo=")}
}

func (a *author) anthropicMessage() any {
	return object{"role", a.of("user", "assistant", "system"), "content", a.of("", "a", a.list(3, a.anthropicBlock), a.list(3, a.anthropicBlock))}
}

func (a *author) anthropicBlock() any {
	cached := a.of(nil, object{"type", "ephemeral"})
	return a.of(object{"type", "text", "text", a.text(), "cache_control", cached},
		object{"type", "image", "source", a.source()},
		object{"type", a.of("tool_use", "server_tool_use"), "id", a.of("1", "2"), "name", a.of("f", "g"), "input", a.arguments(), "cache_control", cached},
		object{"type", "tool_result", "tool_use_id", a.short(), "is_error", a.of(nil, rawJSON("true")), "content", a.of(nil, "", "a", a.list(2, func() any {
			return a.of(object{"type", "text", "text", a.text(), a.of("x", "TEXT").(string), "z"}, object{"type", "image", "source", a.source()}, object{"type", "other", "title", "a"})
		}))},
		object{"type", "web_search_tool_result", "tool_use_id", a.short(), "content", a.of("a", a.list(2, func() any {
			return object{"type", "web_search_result", "title", a.of("a", "b: c"), "url", a.of("c: d", "d"), "encrypted_content", a.short()}
		}), object{"type", "web_search_tool_result_error", "error_code", a.short()}, array{object{"type", "web_search_tool_result_error", "error_code", a.short()}})},
		object{"type", "thinking", "thinking", a.short(), "signature", a.short()})
}

func (a *author) responsesItem() any {
	content := a.of("a", "b", a.list(2, func() any {
		return a.of(object{"type", a.of("input_text", "output_text"), "text", a.text()}, object{"type", "input_image", "image_url", a.of("", a.dataURL())}, object{"type", "encrypted_content", "encrypted_content", a.short()})
	}))
	s := &spelling{}
	s.write(a.arguments())
	return a.of(object{"type", a.of(nil, "message"), "role", a.role(), "content", content, "id", a.short()},
		object{"type", "message", "role", "assistant", "content", content, "id", a.short()},
		object{"type", "function_call", "call_id", a.of("1", "2"), "name", a.of("f", "g"), "namespace", a.of(nil, nil, "n"), "arguments", s.b.String(), "id", a.short()},
		object{"type", "function_call_output", "call_id", a.of("3", "4"), "output", content},
		object{"type", "function_call_output", "name", a.of("f", "g"), "namespace", a.of(nil, "n"), "output", content},
		object{"type", "reasoning", "encrypted_content", a.short(), "summary", array{}, "id", a.short()},
		object{"type", "agent_message", "author", a.short(), "recipient", a.short(), "content", a.list(1, func() any { return object{"type", "input_text", "text", a.text()} })},
		object{"type", "web_search_call", "id", a.short()},
		object{"type", "tool_search_call", "call_id", "1", "execution", "client", "arguments", a.arguments()},
		object{"type", "tool_search_output", "call_id", "1", "tools", array{object{"type", "function", "name", a.of("f", "g")}}})
}

// place is where two prompts diverge, according to Ollama's parsing of their bodies.
func place(a, b []api.Message) (message, offset int) {
	beside := func(m api.Message) string {
		m.Content, m.ToolCalls = "", nil
		return toJSON(m)
	}
	for i := range min(len(a), len(b)) {
		switch {
		case toJSON(a[i]) == toJSON(b[i]):
			continue
		case beside(a[i]) != beside(b[i]):
			return i, 0
		}
		n, x, y := 0, spelled(a[i].Content), spelled(b[i].Content)
		for n < min(len(x), len(y)) && x[n] == y[n] {
			n++
		}
		return i, n
	}
	return min(len(a), len(b)), 0
}

func toJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// oracle compares chains with Ollama's own parsing of the same bodies.
type oracle struct {
	t      *testing.T
	e      Endpoint
	prompt map[uint64]string // by the chain's leaf
	leaf   map[string]uint64 // by the prompt
	body   map[uint64][]byte // by the chain's leaf
	late   int               // how often the place was reported one sixteenth late
	places int
}

func newOracle(t *testing.T, e Endpoint) *oracle {
	return &oracle{t: t, e: e, prompt: map[uint64]string{}, leaf: map[string]uint64{}, body: map[uint64][]byte{}}
}

// add checks that the body's chain equals another body's exactly if their prompts are equal. plain
// is the body in a readable spelling.
func (o *oracle) add(body, plain []byte) (c Chain, u understood, ok bool) {
	if u, ok = understand(o.e, body); !ok {
		return c, u, false
	}
	c = read(o.t, o.e, body)
	leaf, prompt := c.Leaf(), u.String()
	if other, seen := o.prompt[leaf]; seen && other != prompt {
		o.t.Fatalf("endpoint %d: the same chain for two prompts\n%.1500s\n%.1500s\n%.1500s\n%.1500s", o.e, plain, o.body[leaf], prompt, other)
	}
	if other, seen := o.leaf[prompt]; seen && other != leaf {
		o.t.Fatalf("endpoint %d: two chains for one prompt\n%.1500s\n%.1500s\n%.1500s", o.e, plain, o.body[other], prompt)
	}
	if c.Messages != len(u.messages) {
		o.t.Fatalf("endpoint %d: %d messages, want %d\n%.1500s", o.e, c.Messages, len(u.messages), plain)
	}
	o.prompt[leaf], o.leaf[prompt], o.body[leaf] = prompt, leaf, plain
	return c, u, true
}

// part checks that Common reports where two prompts diverge that differ only in their messages.
func (o *oracle) part(a, b Chain, x, y understood) {
	message, offset := place(x.messages, y.messages)
	if x.settings != y.settings || x.tools != y.tools || message == min(len(x.messages), len(y.messages)) {
		return
	}
	told, part := Common(a.Links, b.Links), BlockPart(Link{Offset: offset})
	late := told.Offset/part - offset/part
	if told.Message != message || late < 0 || late > 1 {
		o.t.Fatalf("endpoint %d: part at message %d, byte %d; told %+v\n%.1500s\n%.1500s", o.e, message, offset, told, x, y)
	}
	o.late += late
	o.places++
}

// TestOracle: chains are equal exactly if Ollama's own code makes equal prompts of the bodies, and
// diverge where those diverge.
func TestOracle(t *testing.T) {
	for _, e := range endpoints {
		o := newOracle(t, e)
		refused := 0
		for seed := range uint64(250) {
			r := rand.New(rand.NewPCG(seed, uint64(e)))
			choices := make([]byte, 400)
			for i := range choices {
				choices[i] = byte(r.Uint32())
			}
			var last Chain
			var before understood
			for variant := range 3 {
				if variant > 0 {
					choices[r.IntN(60)] = byte(r.Uint32())
				}
				tree := (&author{choices: choices}).body(e)
				spelled, plain := &spelling{r: r}, &spelling{}
				spelled.write(tree)
				plain.write(tree)
				c, u, ok := o.add(spelled.b.Bytes(), plain.b.Bytes())
				if !ok {
					refused++
					break
				}
				if variant > 0 {
					o.part(c, last, u, before)
				}
				last, before = c, u
			}
		}
		if o.late > 2+o.places/50 {
			t.Errorf("endpoint %d: %d of %d places told late", e, o.late, o.places)
		}
		t.Logf("endpoint %d: %d prompts, %d bodies refused, %d places", e, len(o.prompt), refused, o.places)
	}
}

// TestOdd does the same with bodies that no client sends on purpose.
func TestOdd(t *testing.T) {
	for e, groups := range map[Endpoint][][]string{
		Chat: {
			{`"messages":[{"role":"user","content":"a"}]`, `"messages":[{"role":"user","content":"a"}],"tools":[ ]`, `"messages":[{"role":"user","content":"a","tool_calls":[ ],"images":[ ]}]`, `"messages":[null,{"role":"user","content":"a"}]`,
				`"messages":[{"role":"user","content":"a","images":[null]}]`, `"messages":[{"role":"user","content":"a"}],"messages":[{"role":"user","content":"b"}]`,
				`"messages":[{"role":"user","content":"b","content":"a"}]`, `"messages":[{"role":"user","content":"b","CONTENT":"a"}]`, `"messages":[{"role":"user","content":"a","content":null}]`, `"messages":[{"role":"user","content":"b","content":null}]`},
			{`"messages":[]`, `"messages":null`, ``, `"messages":[ ],"tools":[{"type":"function"}]`},
		},
		ChatCompletions: {
			{`"messages":[{"role":"user","content":"a"},{"role":"ASSISTANT","content":null,"tool_calls":[ ]}]`, `"messages":[{"role":"user","content":"a"},{"role":"assistant","content":""}]`,
				`"messages":[{"role":"user","content":[{"type":"text","text":"a","TEXT":"b"}]},{"role":"assistant","content":""}]`, `"messages":[{"role":"user","content":[{"type":"text","Text":"b","text":"a"}]},{"role":"assistant","content":[]}]`},
		},
		Messages: {
			{`"messages":[{"role":"user","content":"a"}]`, `"messages":[{"role":"USER","content":[{"type":"text","text":"a"},{"type":"text"},{"type":"other"}]},{"role":"user","content":""}]`, `"messages":[{"role":"user","content":"a"}],"tools":[ ],"system":[ ]`,
				`"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image","source":{"type":"base64"}}]}]`, `"messages":[{"role":"user","content":[{"type":"thinking","thinking":"t"},{"type":"thinking"},{"type":"text","text":"a"}]}]`},
		},
		Responses: {
			{`"input":"a"`, `"input":[{"role":"user","content":"a"}]`, `"input":[{"type":"message","role":"USER","content":[{"type":"input_text","text":"a"}]}],"tools":[ ]`, `"input":[{"type":"reasoning","encrypted_content":"t"},{"role":"user","content":"a"}]`,
				`"input":[{"role":"user","content":"a"},{"type":"reasoning","encrypted_content":"t"}]`, `"input":[{"role":"user","content":"a"},{"type":"reasoning","encrypted_content":""}]`},
			{`"instructions":"a","input":""`, `"instructions":"a","input":[ ]`},
		},
	} {
		for _, bodies := range groups {
			o := newOracle(t, e)
			for _, body := range bodies {
				if _, _, ok := o.add([]byte("{"+body+"}"), []byte(body)); !ok {
					t.Errorf("endpoint %d: Ollama refuses %s", e, body)
				}
			}
		}
	}
}
