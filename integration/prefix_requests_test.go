package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// prefixModel is a model, defined by its template; all have the weights of a small one.
type prefixModel struct {
	name, from, template    string // no template: the model as it is
	tools, thinking, suffix bool
}

var prefixModels = []prefixModel{
	{name: tiny, tools: true},
	{name: "prefix-gemma", from: tiny, suffix: true, template: `{{- if .Suffix }}<PRE> {{ .Prompt }} <SUF>{{ .Suffix }} <MID>
{{- else }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if or (eq .Role "user") (eq .Role "system") }}<start_of_turn>user
{{ .Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}
{{- else }}<start_of_turn>model
{{ .Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- end }}
{{- end }}
{{- end }}`},
	{name: "prefix-think", from: "gen-qwen3-tiny", tools: true, thinking: true, template: `{{- if or .System .Tools }}<|im_start|>system
{{ .System }}
{{- if .Tools }}

# Tools
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>
{{- end }}<|im_end|>
{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}{{ continue }}{{ end }}<|im_start|>{{ .Role }}
{{ if .Thinking }}<think>{{ .Thinking }}</think>
{{ end }}{{ .Content }}
{{- range .ToolCalls }}
<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>
{{- end }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ if and $.IsThinkSet (not $.Think) }}<think>

</think>

{{ end }}`},
}

// conversation is a request, independent of a dialect.
type conversation struct {
	messages []api.Message
	tools    []json.RawMessage
	think    string // JSON
	extra    map[string]any
	parts    bool // contents are arrays, if the dialect has them
}

func (c conversation) clone() conversation {
	c.messages, c.tools, c.extra = slices.Clone(c.messages), slices.Clone(c.tools), maps.Clone(c.extra)
	for i := range c.messages {
		c.messages[i].ToolCalls = slices.Clone(c.messages[i].ToolCalls)
	}
	return c
}

// dialects write a conversation as a body.
var dialects = []struct {
	endpoint prefix.Endpoint
	path     string
	body     func(c conversation) map[string]any
}{
	{prefix.Chat, "/api/chat", chatDialect},
	{prefix.Generate, "/api/generate", generateDialect},
	{prefix.Completions, "/v1/completions", func(c conversation) map[string]any {
		b := map[string]any{"prompt": c.messages[len(c.messages)-1].Content}
		if s, ok := c.extra["suffix"]; ok {
			b["suffix"] = s
		}
		return b
	}},
	{prefix.ChatCompletions, "/v1/chat/completions", openAIDialect},
	{prefix.Messages, "/v1/messages", anthropicDialect},
	{prefix.Responses, "/v1/responses", responsesDialect},
}

func chatDialect(c conversation) map[string]any {
	b := map[string]any{"messages": c.messages}
	if c.tools != nil {
		b["tools"] = c.tools
	}
	if c.think != "" {
		b["think"] = json.RawMessage(c.think)
	}
	return b
}

func generateDialect(c conversation) map[string]any {
	last := c.messages[len(c.messages)-1]
	b := map[string]any{"prompt": last.Content, "images": last.Images}
	if m := c.messages[0]; m.Role == "system" && c.extra["raw"] == nil && c.extra["suffix"] == nil {
		b["system"] = m.Content
	}
	if c.think != "" {
		b["think"] = json.RawMessage(c.think)
	}
	maps.Copy(b, c.extra)
	return b
}

func openAIDialect(c conversation) map[string]any {
	messages := []map[string]any{}
	for _, m := range c.messages {
		message := map[string]any{"role": m.Role, "content": m.Content}
		if c.parts && m.Content != "" {
			message["content"] = []any{map[string]any{"type": "text", "text": m.Content}}
		}
		if m.Thinking != "" {
			message["reasoning"], message["content"] = m.Thinking, m.Content
		}
		if m.ToolCallID != "" {
			message["tool_call_id"], message["content"] = m.ToolCallID, m.Content
		}
		calls := []any{}
		for i, call := range m.ToolCalls {
			calls = append(calls, map[string]any{"id": call.ID, "index": i, "type": "function", "function": map[string]any{"name": call.Function.Name, "arguments": call.Function.Arguments.String()}})
		}
		if len(calls) > 0 {
			message["tool_calls"] = calls
		}
		messages = append(messages, message)
	}
	b := map[string]any{"messages": messages, "max_tokens": 5}
	if c.tools != nil {
		b["tools"] = c.tools
	}
	switch c.think {
	case `"high"`, `"low"`:
		b["reasoning_effort"] = json.RawMessage(c.think)
	case "false":
		b["reasoning"] = map[string]any{"effort": "none"}
	}
	return b
}

func anthropicDialect(c conversation) map[string]any {
	b := map[string]any{"max_tokens": 5}
	messages := []any{}
	for i, m := range c.messages {
		text := map[string]any{"type": "text", "text": m.Content, "cache_control": map[string]any{"type": "ephemeral"}}
		switch {
		case m.Role == "system" && i == 0 && c.parts:
			b["system"] = []any{text}
			continue
		case m.Role == "system" && i == 0:
			b["system"] = m.Content
			continue
		case m.Role == "tool":
			messages = append(messages, map[string]any{"role": "user", "content": []any{map[string]any{"type": "tool_result", "tool_use_id": m.ToolCallID, "content": m.Content}}})
			continue
		case !c.parts && m.Thinking == "" && m.ToolCalls == nil:
			messages = append(messages, map[string]any{"role": m.Role, "content": m.Content})
			continue
		}
		var blocks []any
		if m.Thinking != "" {
			blocks = append(blocks, map[string]any{"type": "thinking", "thinking": m.Thinking})
		}
		if m.Content != "" {
			blocks = append(blocks, text)
		}
		for _, call := range m.ToolCalls {
			blocks = append(blocks, map[string]any{"type": "tool_use", "id": call.ID, "name": call.Function.Name, "input": call.Function.Arguments})
		}
		messages = append(messages, map[string]any{"role": m.Role, "content": blocks})
	}
	b["messages"] = messages
	for _, raw := range c.tools {
		f := toolFunction(raw)
		tools, _ := b["tools"].([]any)
		b["tools"] = append(tools, map[string]any{"name": f.Name, "description": f.Description, "input_schema": f.Parameters})
	}
	switch c.think {
	case "true":
		b["thinking"] = map[string]any{"type": "enabled", "budget_tokens": 1024}
	case "false":
		b["thinking"] = map[string]any{"type": "disabled"}
	case `"high"`, `"low"`:
		b["output_config"] = map[string]any{"effort": json.RawMessage(c.think)}
	}
	return b
}

func responsesDialect(c conversation) map[string]any {
	b := map[string]any{"max_output_tokens": 5}
	items := []any{}
	for i, m := range c.messages {
		if m.Role == "system" && i == 0 {
			b["instructions"] = m.Content
			continue
		}
		if m.Thinking != "" {
			items = append(items, map[string]any{"type": "reasoning", "summary": []any{}, "encrypted_content": m.Thinking})
		}
		kind := map[bool]string{true: "output_text", false: "input_text"}[m.Role == "assistant"]
		switch {
		case m.Role == "tool":
			items = append(items, map[string]any{"type": "function_call_output", "call_id": m.ToolCallID, "output": m.Content})
		case m.Content == "":
		case c.parts:
			items = append(items, map[string]any{"type": "message", "role": m.Role, "content": []any{map[string]any{"type": kind, "text": m.Content}}})
		default:
			items = append(items, map[string]any{"role": m.Role, "content": m.Content})
		}
		for _, call := range m.ToolCalls {
			items = append(items, map[string]any{"type": "function_call", "call_id": call.ID, "name": call.Function.Name, "arguments": call.Function.Arguments.String()})
		}
	}
	b["input"] = items
	for _, raw := range c.tools {
		f := toolFunction(raw)
		tools, _ := b["tools"].([]any)
		b["tools"] = append(tools, map[string]any{"type": "function", "name": f.Name, "description": f.Description, "parameters": f.Parameters})
	}
	switch c.think {
	case `"high"`, `"low"`:
		b["reasoning"] = map[string]any{"effort": json.RawMessage(c.think)}
	case "false":
		b["reasoning"] = map[string]any{"effort": "none"}
	}
	return b
}

type rawFunction struct {
	Name, Description string
	Parameters        json.RawMessage
}

func toolFunction(raw json.RawMessage) rawFunction {
	var tool struct{ Function rawFunction }
	if err := json.Unmarshal(raw, &tool); err != nil {
		panic(err)
	}
	return tool.Function
}

// prefixText is text that occurs nowhere else, with characters of one to four bytes, some of which
// JSON escapes.
func prefixText(r *rand.Rand, size int) string {
	const letters = `abcdefghijklmnopqrstuvwxyz    eeaaiioonnttrrss` + "\n\"\\\té日🙂<&"
	runes := []rune(letters)
	var b strings.Builder
	for b.Len() < size {
		b.WriteRune(runes[r.IntN(len(runes))])
	}
	return b.String()
}

// prefixTool is a tool whose JSON has a unique word near its end: unit.
func prefixTool(r *rand.Rand, name string) json.RawMessage {
	return fmt.Appendf(nil, `{"type":"function","function":{"name":%q,"description":"looks up %x","parameters":{"type":"object","required":["city"],"properties":{"city":{"type":"string","description":"the city"},"unit":{"type":"string","enum":["%016x"]}}}}}`,
		name, r.Uint64(), r.Uint64())
}

var toolWord = regexp.MustCompile(`\["([0-9a-f]{16})"\]`)

func prefixCall(r *rand.Rand, name string) api.ToolCall {
	arguments := api.NewToolCallFunctionArguments()
	arguments.Set("city", fmt.Sprintf("%016x", r.Uint64()))
	arguments.Set("days", float64(r.IntN(10)))
	return api.ToolCall{ID: fmt.Sprintf("call_%08x", r.Uint32()), Function: api.ToolCallFunction{Name: name, Arguments: arguments}}
}

// newConversation makes a conversation that the model accepts.
func newConversation(r *rand.Rand, m prefixModel) conversation {
	c := conversation{parts: r.IntN(2) == 0, extra: map[string]any{}}
	size := func() int { return []int{20, 300, 900, 3000}[r.IntN(4)] + r.IntN(300) }
	add := func(role string, n int) {
		c.messages = append(c.messages, api.Message{Role: role, Content: prefixText(r, n)})
	}
	if r.IntN(3) > 0 {
		add("system", size())
	}
	add("user", size())
	for range r.IntN(4) {
		add("assistant", 30+r.IntN(600))
		answer := &c.messages[len(c.messages)-1]
		if m.thinking && r.IntN(3) > 0 {
			answer.Thinking = prefixText(r, 60)
		}
		if m.tools && r.IntN(3) > 0 {
			answer.ToolCalls = []api.ToolCall{prefixCall(r, "weather"), prefixCall(r, "weather")}[:1+r.IntN(2)]
			id := answer.ToolCalls[0].ID
			add("tool", size()/4+20)
			c.messages[len(c.messages)-1].ToolCallID = id
		}
		add("user", 20+r.IntN(500))
	}
	if m.tools && r.IntN(4) > 0 {
		c.tools = []json.RawMessage{prefixTool(r, "weather"), prefixTool(r, "stocks"), prefixTool(r, "news")}
	}
	if m.suffix && r.IntN(2) == 0 {
		c.extra["suffix"] = prefixText(r, 100)
	}
	return c
}

// anyLength is for changes that are at the head of a chain, but anywhere in a template's prompt.
const anyLength = 1 << 30

// prefixChange turns one conversation into another. It returns how many more bytes the prompts may
// share than their chains do, apart from the template's words; false if it does not apply.
type prefixChange struct {
	name string
	make func(r *rand.Rand, m prefixModel, c *conversation) (beyond int, ok bool)
}

// edited replaces the character at or after byte at.
func edited(r *rand.Rand, text string, at int) string {
	for at > 0 && text[at]&0xC0 == 0x80 {
		at--
	}
	before, rest := text[:at], []rune(text[at:])
	for old := rest[0]; rest[0] == old; {
		rest[0] = []rune("xyzé\n\"🙂日")[r.IntN(8)]
	}
	return before + string(rest)
}

var prefixChanges = []prefixChange{
	{"a byte among a message's first 16", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		m := &c.messages[r.IntN(len(c.messages))]
		m.Content = edited(r, m.Content, r.IntN(16))
		return 0, true
	}},
	{"a byte of a message", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		m := &c.messages[r.IntN(len(c.messages))]
		m.Content = edited(r, m.Content, r.IntN(len(m.Content)))
		return 0, true
	}},
	{"a byte of the last message", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		m := &c.messages[len(c.messages)-1]
		m.Content = edited(r, m.Content, r.IntN(len(m.Content)))
		return 0, true
	}},
	{"the last message is longer", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		c.messages[len(c.messages)-1].Content += prefixText(r, 1+r.IntN(400))
		return 0, true
	}},
	{"a character became two", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		m := &c.messages[r.IntN(len(c.messages))]
		at := r.IntN(len([]rune(m.Content)))
		head := string([]rune(m.Content)[:at])
		m.Content = head + "\\n" + m.Content[len(head):]
		return 0, true
	}},
	{"a role", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		m := &c.messages[len(c.messages)-1]
		m.Role = "assistant"
		return 0, len(c.messages) > 1 && m.ToolCallID == ""
	}},
	{"another system prompt", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		m := &c.messages[0]
		if m.Role != "system" {
			return 0, false
		}
		m.Content = prefixText(r, 200)
		return 0, true
	}},
	{"no system prompt", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		if c.messages[0].Role != "system" {
			return 0, false
		}
		c.messages = c.messages[1:]
		return 0, true
	}},
	{"messages appended", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		for _, role := range []string{"assistant", "user"}[:1+r.IntN(2)] {
			c.messages = append(c.messages, api.Message{Role: role, Content: prefixText(r, 20+r.IntN(300))})
		}
		return 0, true
	}},
	{"a tool call's argument", func(r *rand.Rand, m prefixModel, c *conversation) (int, bool) {
		for i := range c.messages {
			if calls := c.messages[i].ToolCalls; calls != nil {
				calls[0] = prefixCall(r, "weather")
				calls[0].ID = c.messages[i].ToolCalls[0].ID
				return 0, true
			}
		}
		return 0, false
	}},
	{"another tool called", func(r *rand.Rand, m prefixModel, c *conversation) (int, bool) {
		for i := range c.messages {
			if calls := c.messages[i].ToolCalls; calls != nil {
				calls[len(calls)-1].Function.Name = "stocks"
				return 150, true // after the first call, whose place a chain does not have
			}
		}
		return 0, false
	}},
	{"thinking", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		for i := range c.messages {
			if m := &c.messages[i]; m.Thinking != "" {
				m.Thinking = edited(r, m.Thinking, r.IntN(len(m.Thinking)))
				return 64, true
			}
		}
		return 0, false
	}},
	{"tools added", func(r *rand.Rand, m prefixModel, c *conversation) (int, bool) {
		c.tools = append(c.tools, prefixTool(r, "calendar"))
		return 0, m.tools
	}},
	{"tools reversed", func(_ *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		slices.Reverse(c.tools)
		return 80, c.tools != nil // both begin with the same words as any tool
	}},
	{"a tool's last property", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		if c.tools == nil {
			return 0, false
		}
		tool := &c.tools[r.IntN(len(c.tools))]
		*tool = toolWord.ReplaceAll(*tool, fmt.Appendf(nil, `["%016x"]`, r.Uint64()))
		return len(*tool) + 80, true // a tool has no blocks
	}},
	{"no tools", func(_ *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		had := c.tools != nil
		c.tools = nil
		return 0, had
	}},
	{"an image", func(_ *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		c.messages[len(c.messages)-1].Images = []api.ImageData{[]byte("an image")}
		return 0, c.extra["suffix"] == nil // otherwise images are not rendered
	}},
	{"think", func(r *rand.Rand, m prefixModel, c *conversation) (int, bool) {
		c.think = []string{"true", "false", `"high"`}[r.IntN(3)]
		return anyLength, m.thinking
	}},
	{"suffix", func(r *rand.Rand, m prefixModel, c *conversation) (int, bool) {
		c.extra["suffix"] = prefixText(r, 50)
		return anyLength, m.suffix
	}},
	{"raw", func(_ *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		c.extra = map[string]any{"raw": true}
		return anyLength, true
	}},
	{"template", func(_ *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		c.extra = map[string]any{"template": "{{ .System }}\n{{ .Prompt }}"}
		return anyLength, true
	}},
	{"context", func(r *rand.Rand, _ prefixModel, c *conversation) (int, bool) {
		c.extra["context"] = []int{100 + r.IntN(50), 101}
		return anyLength, true
	}},
}

// respell writes the same JSON differently: spaces, escapes, and the order of keys where it has no
// meaning.
func respell(r *rand.Rand, body []byte) []byte {
	var b bytes.Buffer
	space := func() { b.WriteString([]string{"", "", " ", "\n\t"}[r.IntN(4)]) }
	var value func(c *jsonscan.Cursor, ordered bool)
	text := func(raw []byte) {
		s, _ := jsonscan.Unquote(raw)
		b.WriteByte('"')
		for _, c := range s {
			switch {
			case c == '/' && r.IntN(2) == 0:
				b.WriteString(`\/`)
			case c > 0xFFFF && r.IntN(2) == 0:
				fmt.Fprintf(&b, `\u%04x\u%04X`, 0xD800+(c-0x10000)>>10, 0xDC00+(c-0x10000)&0x3FF)
			case c <= 0xFFFF && (c < 0x20 || c == '"' || c == '\\' || r.IntN(20) == 0):
				fmt.Fprintf(&b, `\u%04x`, c)
			default:
				b.WriteRune(c)
			}
		}
		b.WriteByte('"')
	}
	value = func(c *jsonscan.Cursor, ordered bool) {
		space()
		switch kind := c.Kind(); kind {
		case '{':
			type member struct{ key, value []byte }
			var members []member
			for c.Enter(); c.More(); {
				key := c.Key()
				members = append(members, member{key, c.Value()})
			}
			if !ordered {
				r.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
			}
			for i, m := range members {
				b.WriteByte("{,"[min(i, 1)])
				text(m.key)
				space()
				b.WriteByte(':')
				name, inner := string(m.key), jsonscan.NewCursor(m.value, 0)
				value(&inner, name == `"properties"` || name == `"arguments"` || name == `"input"`)
			}
			if len(members) == 0 {
				b.WriteByte('{')
			}
			b.WriteByte('}')
		case '[':
			b.WriteByte('[')
			n := 0
			for c.Enter(); c.More(); n++ {
				if n > 0 {
					b.WriteByte(',')
				}
				value(c, false)
			}
			b.WriteByte(']')
		case '"':
			text(c.Value())
		default:
			b.Write(c.Value())
		}
		space()
	}
	c := jsonscan.NewCursor(body, 0)
	value(&c, false)
	return b.Bytes()
}
