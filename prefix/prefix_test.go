package prefix

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// message is a message of a generated conversation.
type message struct {
	role, content string
	thinking      string
	images        []string // base64
	calls         []call
	toolName, id  string
}

type call struct{ id, name, arguments string }

// conversation is the content of a generated request, independent of the dialect.
type conversation struct {
	messages []message
	tools    string // JSON
	options  [][2]string
	think    string // JSON
}

var words = strings.Fields("score the candidate from 1 to 10 and explain, in one sentence: why? naïve café 日本語 \"quoted\" back\\slash tab\there 🙂 {\"k\":1} </tag> \u2028 \x7f")

func text(r *rand.Rand, size int) string {
	var b strings.Builder
	for b.Len() < size {
		b.WriteString(words[r.IntN(len(words))])
		b.WriteByte(" \n"[r.IntN(2)])
	}
	return b.String()
}

func newConversation(r *rand.Rand) conversation {
	c := conversation{options: [][2]string{{"num_ctx", "8192"}, {"temperature", "0.5"}, {"use_mmap", "true"}}}
	if r.IntN(2) == 0 {
		c.messages = append(c.messages, message{role: "system", content: text(r, r.IntN(3000))})
	}
	if r.IntN(3) == 0 {
		c.tools = `[{"type":"function","function":{"name":"get_weather","description":"The \u0022weather\u0022","parameters":{"type":"object","required":["city"],"properties":{"city":{"type":"string"},"unit":{"type":"string"}}}}}]`
	}
	if r.IntN(3) == 0 {
		c.think = "true"
	}
	for i := range 1 + r.IntN(5) {
		m := message{role: []string{"user", "assistant"}[i%2], content: text(r, r.IntN(20000))}
		if r.IntN(4) == 0 {
			m.content = ""
		}
		if i%2 == 1 && r.IntN(2) == 0 {
			m.calls = []call{{"c1", "get_weather", `{"city":"Zürich","n":12345678901234567890}`}}
			m.thinking = text(r, 50)
		}
		if i%2 == 0 && r.IntN(4) == 0 {
			m.images = []string{"aGVsbG8=", "d29ybGQ="}
		}
		c.messages = append(c.messages, m)
	}
	return c
}

// spelling writes JSON in one of the many equivalent ways.
type spelling struct {
	r *rand.Rand // nil: plain
	b bytes.Buffer
}

func (s *spelling) chance(n int) bool { return s.r != nil && s.r.IntN(n) == 0 }

func (s *spelling) space() {
	if s.chance(3) {
		s.b.WriteString([]string{" ", "\n", "\t", "  \r\n"}[s.r.IntN(4)])
	}
}

func (s *spelling) string(v string) {
	s.b.WriteByte('"')
	for _, c := range v {
		switch {
		case s.chance(8) && c > 0xFFFF:
			c -= 0x10000
			fmt.Fprintf(&s.b, `\u%04x\u%04X`, 0xD800+c>>10, 0xDC00+c&0x3FF)
		case s.chance(8) && c <= 0xFFFF:
			fmt.Fprintf(&s.b, `\u%04x`, c)
		case c == '"' || c == '\\':
			s.b.WriteString(`\` + string(c))
		case c == '/' && s.chance(2):
			s.b.WriteString(`\/`)
		case c == '\n':
			s.b.WriteString(`\n`)
		case c == '\t':
			s.b.WriteString(`\t`)
		case c < 0x20:
			fmt.Fprintf(&s.b, `\u%04x`, c)
		default:
			s.b.WriteRune(c)
		}
	}
	s.b.WriteByte('"')
}

// object writes members, each by its own function, in any order.
func (s *spelling) object(members ...any) {
	var order []int
	for i := 0; i < len(members); i += 2 {
		if members[i+1] != nil {
			order = append(order, i)
		}
	}
	if s.r != nil {
		s.r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	s.b.WriteByte('{')
	for n, i := range order {
		if n > 0 {
			s.b.WriteByte(',')
		}
		s.space()
		s.string(members[i].(string))
		s.space()
		s.b.WriteByte(':')
		s.space()
		switch v := members[i+1].(type) {
		case string:
			s.string(v)
		case json.RawMessage:
			s.raw(v)
		case func():
			v()
		}
		s.space()
	}
	s.b.WriteByte('}')
}

func (s *spelling) array(n int, item func(int)) {
	s.b.WriteByte('[')
	for i := range n {
		if i > 0 {
			s.b.WriteByte(',')
		}
		s.space()
		item(i)
		s.space()
	}
	s.b.WriteByte(']')
}

// raw writes JSON, possibly indented.
func (s *spelling) raw(v json.RawMessage) {
	if s.chance(2) {
		if err := json.Indent(&s.b, v, " ", "\t"); err != nil {
			panic(err)
		}
		return
	}
	s.b.Write(v)
}

func some[T any](ok bool, v T) any {
	if !ok {
		return nil
	}
	return v
}

// body writes the conversation for an endpoint.
func (c conversation) body(e Endpoint, r *rand.Rand) []byte {
	s := &spelling{r: r}
	options := func() {
		var members []any
		for _, o := range c.options {
			members = append(members, o[0], json.RawMessage(o[1]))
		}
		s.object(members...)
	}
	images := func(m message) any {
		return some(len(m.images) > 0, func() { s.array(len(m.images), func(i int) { s.string(m.images[i]) }) })
	}
	calls := func(m message) any {
		return some(len(m.calls) > 0, func() {
			s.array(len(m.calls), func(i int) {
				args := any(json.RawMessage(m.calls[i].arguments))
				if e == ChatCompletions {
					args = m.calls[i].arguments
				}
				s.object("id", m.calls[i].id, "function", func() { s.object("name", m.calls[i].name, "arguments", args) })
			})
		})
	}
	message := func(i int) {
		m := c.messages[i]
		switch e {
		case Chat:
			s.object("role", m.role, "content", m.content, "thinking", some(m.thinking != "", m.thinking), "images", images(m), "tool_calls", calls(m),
				"tool_name", some(m.toolName != "", m.toolName), "tool_call_id", some(m.id != "", m.id), "unknown", json.RawMessage(`[1,{"content":"x"}]`))
		case ChatCompletions:
			s.object("role", m.role, "content", m.content, "reasoning", some(m.thinking != "", m.thinking), "tool_calls", calls(m))
		case Responses:
			s.object("role", m.role, "content", m.content)
		case Messages:
			s.object("role", m.role, "content", func() {
				s.array(1, func(int) { s.object("type", "text", "text", m.content) })
			})
		}
	}
	tools := some(c.tools != "", json.RawMessage(c.tools))
	think := some(c.think != "", json.RawMessage(c.think))
	key := "messages"
	if e == Responses {
		key = "input"
	}
	s.space()
	switch e {
	case Generate, Completions:
		last := c.messages[len(c.messages)-1]
		var system any
		if c.messages[0].role == "system" {
			system = c.messages[0].content
		}
		s.object("model", "m", "prompt", last.content, "system", system, "options", options, "think", think, "images", images(last))
	default:
		s.object("model", "m", key, func() { s.array(len(c.messages), message) }, "tools", tools, "options", options, "think", some(e == Chat, think))
	}
	return s.b.Bytes()
}

// read reads a body that must be valid.
func read(t testing.TB, e Endpoint, body []byte) Chain {
	t.Helper()
	o := jsonscan.NewObject(body)
	members := []jsonscan.Member{}
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		members = append(members, m)
	}
	if o.Err() != nil {
		t.Fatalf("the test's body is not valid: %v\n%s", o.Err(), body)
	}
	c := testReader.Read(e, "m", body)
	if known := testReader.ReadMembers(e, "m", body, members, o.Long()); !equal(known, c) {
		t.Fatalf("another chain where the members are known: %s", body)
	}
	return c
}

var testReader = NewReader()

var endpoints = []Endpoint{Chat, Generate, ChatCompletions, Completions, Responses, Messages}

func equal(a, b Chain) bool {
	return len(a.Links) == len(b.Links) && Common(a.Links, b.Links).Links == len(a.Links) && a.Conversation == b.Conversation && a.Messages == b.Messages && a.Images == b.Images
}

// TestSpelling: the same request has the same links however its JSON is written.
func TestSpelling(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		c := newConversation(r)
		for _, e := range endpoints {
			want := read(t, e, c.body(e, nil))
			for range 3 {
				body := c.body(e, r)
				if got := read(t, e, body); !equal(got, want) {
					t.Fatalf("endpoint %d, seed %d: %d links, %+v in common, of %d\n%.2000s\n%.2000s", e, seed, len(got.Links), Common(got.Links, want.Links), len(want.Links), body, c.body(e, nil))
				}
			}
		}
	}
}

// TestAppend: an additional message keeps all existing links.
func TestAppend(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 2))
		c := newConversation(r)
		for _, e := range []Endpoint{Chat, ChatCompletions, Responses, Messages} {
			before := read(t, e, c.body(e, r))
			more := c
			more.messages = append(append([]message{}, c.messages...), message{role: "user", content: "and " + text(r, 1000)})
			after := read(t, e, more.body(e, r))
			if s := Common(before.Links, after.Links); s.Links != len(before.Links) || len(after.Links) <= len(before.Links) {
				t.Fatalf("endpoint %d, seed %d: %d of %d links kept", e, seed, s.Links, len(before.Links))
			}
			if before.Conversation != after.Conversation {
				t.Fatalf("endpoint %d, seed %d: another conversation", e, seed)
			}
		}
	}
}

// spelled is a text as links count its bytes.
func spelled(text string) []byte {
	var b []byte
	for _, r := range text {
		b = appendSpelled(b, r)
	}
	return b
}

// TestChange: a changed byte in a message changes every link from its block on and none before, and
// Common reports where.
func TestChange(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		c := newConversation(r)
		i := r.IntN(len(c.messages))
		if c.messages[i].content == "" {
			continue
		}
		changed := c
		changed.messages = append([]message{}, c.messages...)
		runes := []rune(c.messages[i].content)
		at := r.IntN(len(runes))
		before := spelled(c.messages[i].content)
		if runes[at]++; r.IntN(2) == 0 {
			runes[at] = 'X'
		}
		changed.messages[i].content = string(runes)
		after, offset := spelled(changed.messages[i].content), 0
		for offset < min(len(before), len(after)) && before[offset] == after[offset] {
			offset++
		}
		e := []Endpoint{Chat, ChatCompletions, Responses, Messages}[r.IntN(4)]
		a, b := read(t, e, c.body(e, r)), read(t, e, changed.body(e, r))
		s := Common(a.Links, b.Links)
		if c.messages[i].content == changed.messages[i].content {
			continue
		}
		index := i
		if e == Messages { // an empty message is left out there
			for _, m := range c.messages[:i] {
				if m.content == "" {
					index--
				}
			}
		}
		part := blockSize(offset) / Fines
		// One of 256 sixteenths looks like another one by chance.
		if told := s.Offset/part - offset/part; s.Message != index || told < 0 || told > 1 {
			t.Fatalf("endpoint %d, seed %d: byte %d of message %d differs; told %+v", e, seed, offset, index, s)
		}
		for n := s.Links; n < min(len(a.Links), len(b.Links)); n++ {
			if a.Links[n].Hash == b.Links[n].Hash {
				t.Fatalf("endpoint %d, seed %d: link %d is equal after the change", e, seed, n)
			}
		}
		if n := a.Links[s.Links]; int(n.Message) != index || n.Offset > offset || offset-n.Offset >= blockSize(n.Offset) {
			t.Fatalf("endpoint %d, seed %d: the first other link is %+v, the change at byte %d of message %d", e, seed, n, offset, index)
		}
	}
}

// TestDialects: a plain conversation has the same links in every dialect.
func TestDialects(t *testing.T) {
	chat := `{"model":"m","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi there"}]}`
	for name, other := range map[string]struct {
		e    Endpoint
		body string
	}{
		"generate":       {Generate, `{"model":"m","system":"Be brief.","prompt":"Hi there"}`},
		"upper case":     {Chat, `{"MODEL":"m","Messages":[{"ROLE":"System","Content":"Be brief."},{"rolE":"USER","content":"Hi there"}]}`},
		"last one wins":  {Generate, `{"system":"x","system":"Be brief.","prompt":"y","PROMPT":"Hi there","prompt":null}`},
		"openai":         {ChatCompletions, `{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi there"}],"max_tokens":5}`},
		"openai parts":   {ChatCompletions, `{"messages":[{"role":"system","content":[{"type":"text","text":"Be brief."}]},{"role":"user","content":[{"text":"Hi there","type":"text"}]}]}`},
		"anthropic":      {Messages, `{"system":"Be brief.","messages":[{"role":"user","content":"Hi there"}],"max_tokens":5}`},
		"anthropic list": {Messages, `{"system":[{"type":"text","text":"Be "},{"type":"text","text":"brief."}],"messages":[{"role":"user","content":[{"type":"text","text":"Hi "},{"type":"text","text":"there"}]}]}`},
		"responses":      {Responses, `{"instructions":"Be brief.","input":"Hi there"}`},
		"responses list": {Responses, `{"input":[{"role":"system","content":"Be brief."},{"type":"message","role":"user","content":[{"type":"input_text","text":"Hi there"}]}]}`},
	} {
		want := read(t, Chat, []byte(chat))
		if got := read(t, other.e, []byte(other.body)); !equal(got, want) {
			t.Errorf("%s: %+v\nwant %+v", name, got.Links, want.Links)
		}
	}
}

// TestDiffers: requests that are rendered or loaded differently diverge where they differ.
func TestDiffers(t *testing.T) {
	const base = `"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi there"}]`
	const tools = `"tools":[{"type":"function","function":{"name":"a","description":"d","parameters":{"type":"object","properties":{"x":{"type":"string"},"y":{"type":"string"}}}}},{"type":"function","function":{"name":"b","parameters":{"type":"object","properties":{}}}}]`
	const reordered = `"tools":[{"function":{"parameters":{"properties":{"x":{"type":"string"},"y":{"type":"string"}},"type":"object"},"description":"d","name":"a"},"type":"function"},{"type":"function","function":{"name":"b","parameters":{"type":"object","properties":{}}}}]`
	const reversed = `"tools":[{"type":"function","function":{"name":"b","parameters":{"type":"object","properties":{}}}},{"type":"function","function":{"name":"a","description":"d","parameters":{"type":"object","properties":{"x":{"type":"string"},"y":{"type":"string"}}}}}]`
	for _, test := range []struct {
		name string
		e    Endpoint
		a, b string
		part Part // where they diverge; 255 if they do not
	}{
		{"num_ctx", Chat, base, base + `,"options":{"num_ctx":8192}`, Runner},
		{"num_ctx again", Chat, base + `,"options":{"num_ctx":8192}`, base + `,"options":{"num_ctx":8.192e3,"seed":3}`, 255},
		{"two options objects are one", Chat, base + `,"options":{"num_ctx":8192,"num_batch":1}`, base + `,"options":{"num_ctx":8192},"OPTIONS":{"num_batch":1}`, 255},
		{"options null", Chat, base, base + `,"options":{"num_ctx":8192},"options":null`, 255},
		{"option key in capitals is none", Chat, base, base + `,"options":{"NUM_CTX":8192}`, 255},
		{"num_gpu -1 is none", Chat, base, base + `,"options":{"num_gpu":-1}`, 255},
		{"shift", Chat, base, base + `,"shift":false`, Runner},
		{"shift true is the default", Chat, base, base + `,"shift":true`, 255},
		{"sampling", Chat, base, base + `,"options":{"temperature":1,"stop":["a"]},"stream":false,"keep_alive":5,"format":"json"`, 255},
		{"think", Chat, base, base + `,"think":false`, Settings},
		{"think null", Chat, base, base + `,"think":null`, 255},
		{"tools", Chat, base, base + "," + tools, Tools},
		{"tools order", Chat, base + "," + tools, base + "," + reversed, Tools},
		{"tools keys", Chat, base + "," + tools, base + "," + reordered, 255},
		{"no tools", Chat, base, base + `,"tools":[]`, 255},
		{"openai options are not runner options", ChatCompletions, base, base + `,"options":{"num_ctx":8192}`, 255},
		{"effort", ChatCompletions, base, base + `,"reasoning_effort":"high"`, Settings},
		{"effort spelled", ChatCompletions, base + `,"reasoning":{"effort":"high"}`, base + `,"reasoning_effort":"high"`, 255},
		{"template", Generate, `"prompt":"x"`, `"prompt":"x","template":"{{ .Prompt }}"`, Settings},
		{"raw", Generate, `"prompt":"x"`, `"prompt":"x","raw":true`, Settings},
		{"raw false", Generate, `"prompt":"x"`, `"prompt":"x","raw":false`, 255},
		{"suffix", Generate, `"prompt":"x"`, `"prompt":"x","suffix":"y"`, Settings},
		{"context", Generate, `"prompt":"x","context":[1,2]`, `"prompt":"x","context":[1, 3]`, Settings},
		{"context spelled", Generate, `"prompt":"x","context":[1,2]`, `"prompt":"x","context":[1, 2 ]`, 255},
		{"image", Generate, `"prompt":"x","images":["aGk="]`, `"prompt":"x","images":["aGo="]`, Head},
		{"image spelled", Generate, `"prompt":"x","images":["aG\nk="]`, `"prompt":"x","images":["aGk="]`, 255},
		{"image url", ChatCompletions, `"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,aGk="}}]}]`, `"messages":[{"role":"user","content":[{"type":"image_url","image_url":"data:image/jpeg;base64,aGk="}]}]`, 255},
		{"other image url", ChatCompletions, `"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,aGk="}}]}]`, `"messages":[{"role":"user","content":[{"type":"image_url","image_url":"data:image/jpeg;base64,aGo="}]}]`, Head},
		{"role", Chat, `"messages":[{"role":"user","content":"x"}]`, `"messages":[{"role":"assistant","content":"x"}]`, Head},
		{"tool calls", Chat, `"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"a","arguments":{"x":1}}}]}]`, `"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"a","arguments":{"x":2}}}]}]`, Tail},
		{"text, and where the message ends", Chat, `"messages":[{"role":"user","content":"ab"},{"role":"user","content":"c"}]`, `"messages":[{"role":"user","content":"a"},{"role":"user","content":"bc"}]`, Tail},
		{"lone surrogate", Chat, `"messages":[{"role":"user","content":"\ud800x"}]`, `"messages":[{"role":"user","content":"\ufffdx"}]`, 255},
		{"invalid UTF-8", Chat, "\"messages\":[{\"role\":\"user\",\"content\":\"a\xffx\"}]", `"messages":[{"role":"user","content":"a\ufffdx"}]`, 255},
		{"anthropic thinking", Messages, base, base + `,"thinking":{"type":"enabled","budget_tokens":5}`, Settings},
		{"anthropic tool result", Messages, `"messages":[{"role":"user","content":[{"type":"tool_result","tool_use_id":"1","content":"a"}]}]`, `"messages":[{"role":"user","content":[{"type":"tool_result","tool_use_id":"1","content":[{"type":"text","text":"a"}]}]}]`, 255},
		{"responses call", Responses, `"input":[{"type":"function_call","call_id":"1","name":"f","arguments":"{\"a\":1}"}]`, `"input":[{"type":"function_call","call_id":"1","name":"f","arguments":"{ \"a\": 1 }"}]`, 255},
		{"responses other call", Responses, `"input":[{"type":"function_call","call_id":"1","name":"f","arguments":"{\"a\":1}"}]`, `"input":[{"type":"function_call","call_id":"1","name":"f","arguments":"{\"a\":2}"}]`, Tail},
	} {
		a, b := read(t, test.e, []byte("{"+test.a+"}")), read(t, test.e, []byte("{"+test.b+"}"))
		s := Common(a.Links, b.Links)
		switch {
		case test.part == 255 && !equal(a, b):
			t.Errorf("%s: differs at %+v", test.name, s)
		case test.part != 255 && equal(a, b):
			t.Errorf("%s: no difference", test.name)
		case test.part != 255 && a.Links[s.Links].Part != test.part && b.Links[s.Links].Part != test.part:
			t.Errorf("%s: differs at %+v, want %v", test.name, s, test.part)
		}
	}
}

// TestLongText: blocks grow, and a long message's links stay few.
func TestLongText(t *testing.T) {
	body := chatBody(8 << 20)
	c := read(t, Chat, body)
	if len(c.Links) > 450 {
		t.Errorf("%d links for 8 MiB", len(c.Links))
	}
	for _, l := range c.Links {
		if l.Part == Block && l.Offset%int(l.Length) != 0 || l.Offset >= blockFlat && int(l.Length) > l.Offset/32 {
			t.Errorf("block %+v", l)
		}
	}
	changed := bytes.Clone(body)
	at := 5 << 20
	for changed[at] != 'S' {
		at++
	}
	changed[at] = 'Z'
	s := Common(c.Links, read(t, Chat, changed).Links)
	if s.Offset > at || at-s.Offset > 2*blockSize(at)/Fines+(300<<10) { // the body's offset counts escapes, the message's does not
		t.Errorf("differs at %+v, changed at byte %d", s, at)
	}
}

func TestCommonOfEqual(t *testing.T) {
	c := read(t, Chat, []byte(`{"messages":[{"role":"user","content":"Hello"}]}`))
	if s := Common(c.Links, c.Links); s.Links != len(c.Links) || s.Bytes != 5 || s.Offset != 5 {
		t.Errorf("%+v", s)
	}
	if s := Common(nil, c.Links); s != (Shared{}) {
		t.Errorf("%+v", s)
	}
}

// TestWithContext: adding a context gives the same chain as a request that states it.
func TestWithContext(t *testing.T) {
	for _, body := range []string{`{}`, `{"options":{"num_ctx":8192}}`} {
		got := read(t, Chat, []byte(body)).Runner.WithContext(4096)
		if want := read(t, Chat, []byte(`{"options":{"num_ctx":4096}}`)).Runner; got != want {
			t.Errorf("%s: %+v, want %+v", body, got, want)
		}
	}
}

func TestOptionsChanges(t *testing.T) {
	a := read(t, Chat, []byte(`{"options":{"num_ctx":4096,"use_mmap":false}}`)).Runner
	b := read(t, Chat, []byte(`{"options":{"num_ctx":8192},"shift":false}`)).Runner
	if got, want := fmt.Sprint(b.Changes(a)), "[num_ctx from 4096 to 8192 use_mmap from false to default shift from default to false]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if b.NumCtx() != 8192 || a == b || a != read(t, Chat, []byte(`{"options":{"use_mmap":false,"num_ctx":4096}}`)).Runner {
		t.Error("options do not compare")
	}
}

// FuzzRead: no text causes a panic; a valid one has the same links when it is encoded again.
func FuzzRead(f *testing.F) {
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 4))
		c := newConversation(r)
		for i := range c.messages {
			c.messages[i].content = c.messages[i].content[:min(len(c.messages[i].content), 600)]
		}
		for _, e := range endpoints {
			f.Add(uint8(e), c.body(e, r))
		}
	}
	f.Add(uint8(Chat), []byte(`{"messages":[{"content":"\ud83d\ude00\ud83d"},3,null,[{}]],"tools":{"a":[`))
	f.Fuzz(func(t *testing.T, endpoint uint8, body []byte) {
		e := Endpoint(endpoint % 7)
		got := testReader.Read(e, "m", body)
		if len(got.Links) < 2 {
			t.Fatalf("%d links", len(got.Links))
		}
		o := jsonscan.NewObject(body)
		for _, ok := o.Next(); ok; _, ok = o.Next() {
		}
		if o.Err() != nil {
			return
		}
		var compacted bytes.Buffer
		if json.Compact(&compacted, body[:o.End()]) != nil {
			return
		}
		if again := testReader.Read(e, "m", compacted.Bytes()); !equal(again, got) {
			t.Fatalf("%q has other links than %q: %+v", body, compacted.Bytes(), Common(again.Links, got.Links))
		}
	})
}

// FuzzOddEscape: the fast search finds the same as the plain one.
func FuzzOddEscape(f *testing.F) {
	for _, s := range []string{"", "\\", "\\u", "abc\\/", strings.Repeat("x", 15) + "\\u0041" + strings.Repeat("y", 40), strings.Repeat("\\n", 40) + "\\\\u", strings.Repeat("ab\\", 20) + "/"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, s []byte) {
		for i := range min(len(s)+1, 40) { // at every alignment
			if got, want := oddEscape(s[i:]), oddEscapeGeneric(s[i:]); got != want {
				t.Fatalf("%q: %d, want %d", s[i:], got, want)
			}
		}
	})
}

// TestManyMessages: a chain is bounded however many messages a body has, and still distinguishes
// prompts.
func TestManyMessages(t *testing.T) {
	body := func(last string) []byte {
		return []byte(`{"messages":[` + strings.Repeat(`{},`, 100_000) + `{"role":"user","content":"` + last + `"}]}`)
	}
	a, b, again := read(t, Chat, body("a")), read(t, Chat, body("b")), read(t, Chat, body("a"))
	if len(a.Links) != maxLinks || a.Leaf() == b.Leaf() || a.Leaf() != again.Leaf() {
		t.Errorf("%d links, leaves %x and %x", len(a.Links), a.Leaf(), b.Leaf())
	}
	if s := Common(a.Links, b.Links); s.Links != maxLinks-1 {
		t.Errorf("%+v in common", s)
	}
}

// TestContents: the contents of a chain depend on the model, and not on the other runner options.
func TestContents(t *testing.T) {
	r := NewReader()
	read := func(model, options string) Chain {
		return r.Read(Chat, model, []byte(`{"messages":[{"role":"user","content":"`+strings.Repeat("a word ", 200)+`"}]`+options+`}`))
	}
	plain, wide := read("m", ""), read("m", `,"options":{"num_ctx":8192,"num_gpu":1}`)
	if n := Common(plain.Links, wide.Links).Links; n != 0 {
		t.Errorf("with other options %d links are in common, want none", n)
	}
	if got, want := wide.Contents(), plain.Contents(); !slices.Equal(got, want) {
		t.Errorf("with other options the contents are %x, want %x", got, want)
	}
	for i, l := range plain.Links {
		if l.Hash != plain.Contents()[i] {
			t.Errorf("link %d is %x, its contents %x, without any option", i, l.Hash, plain.Contents()[i])
		}
	}
	if other := read("n", ""); other.Contents()[0] == plain.Contents()[0] || other.Contents()[4] == plain.Contents()[4] {
		t.Error("two models have the same contents")
	}
}
