package prefix

import (
	"encoding/json"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// canon returns decode(raw), cached by raw's fingerprint and tag.
func (r *Reader) canon(tag uint64, raw []byte, decode func([]byte) []canonical) []canonical {
	key := xxhash.Sum64(raw) + tag
	if c, ok := r.canonical.Get(key); ok {
		return c
	}
	c := decode(raw)
	r.canonical.Add(key, c)
	return c
}

// canonicalOf returns the fingerprint of a canonical text.
func canonicalOf(text []byte) canonical { return canonical{xxhash.Sum64(text), len(text)} }

// refused returns the fingerprint of something that Ollama refuses.
func refused(raw []byte) []canonical { return []canonical{canonicalOf(compact(raw))} }

// writeTools writes the tools. They come after the leading system messages, as in most templates.
func (p *parser) writeTools() {
	raw := p.tools
	if p.tools = nil; len(raw) == 0 || raw[0] != '[' {
		return
	}
	var tools []canonical
	switch p.endpoint {
	case Chat, ChatCompletions:
		tools = p.reader.canon('a', raw, apiTools)
	case Messages:
		tools = p.reader.canon('m', raw, anthropicTools)
	case Responses:
		tools = p.reader.canon('r', raw, responsesTools)
	}
	for _, tool := range tools {
		p.bytes += tool.bytes
		p.putNumber('T', tool.hash)
		p.add(Link{Part: Tools, Message: p.message})
	}
}

// apiTools reads tools in Ollama's own format: the JSON that templates get.
func apiTools(raw []byte) []canonical {
	var tools api.Tools
	if json.Unmarshal(raw, &tools) != nil {
		return refused(raw)
	}
	return listed(tools)
}

func listed(tools api.Tools) []canonical {
	list := make([]canonical, len(tools))
	for i, tool := range tools {
		list[i] = canonicalOf([]byte(tool.String()))
	}
	return list
}

// anthropicTools reads the tools of /v1/messages. Anthropic's own web search gets Ollama's
// description, and replaces a tool with its name.
func anthropicTools(raw []byte) []canonical {
	var tools []struct {
		Type        string          `json:"type"`
		Name        string          `json:"name"`
		Description string          `json:"description"`
		InputSchema json.RawMessage `json:"input_schema"`
	}
	if json.Unmarshal(raw, &tools) != nil {
		return refused(raw)
	}
	const search = "web_search"
	searches := false
	for _, t := range tools {
		searches = searches || strings.HasPrefix(t.Type, search)
	}
	var list api.Tools
	for _, t := range tools {
		tool := api.Tool{Type: "function", Function: api.ToolFunction{Name: t.Name, Description: t.Description}}
		switch {
		case strings.HasPrefix(t.Type, search):
			tool = api.Tool{Type: search}
		case searches && t.Name == search:
			continue
		case len(t.InputSchema) > 0 && json.Unmarshal(t.InputSchema, &tool.Function.Parameters) != nil:
			return refused(raw)
		}
		list = append(list, tool)
	}
	return listed(list)
}

// responsesTool is a tool of /v1/responses. Parameters are decoded into a map, so the order of
// their keys does not matter.
type responsesTool struct {
	Type        string          `json:"type"`
	Name        string          `json:"name"`
	Description string          `json:"description"`
	Parameters  map[string]any  `json:"parameters"`
	Tools       []responsesTool `json:"tools"` // if it is a namespace
}

func responsesTools(raw []byte) []canonical {
	var tools []responsesTool
	if json.Unmarshal(raw, &tools) != nil {
		return refused(raw)
	}
	var list api.Tools
	for _, t := range tools {
		list = t.appendTo(list, "")
	}
	return listed(list)
}

// appendTo appends the tool, or those of a namespace, to a list.
func (t responsesTool) appendTo(list api.Tools, namespace string) api.Tools {
	if namespace != "" {
		t.Name = namespaced(namespace, t.Name)
	}
	if t.Type == "namespace" {
		for _, member := range t.Tools {
			list = member.appendTo(list, t.Name)
		}
		return list
	}
	tool := api.Tool{Type: t.Type, Function: api.ToolFunction{Name: t.Name, Description: t.Description}}
	if text, err := json.Marshal(t.Parameters); t.Parameters != nil && err == nil {
		if json.Unmarshal(text, &tool.Function.Parameters) != nil {
			tool.Items = t.Parameters // Ollama refuses it
		}
	}
	return append(list, tool)
}

// namespaced returns a tool's name in a namespace. Ollama joins the two in one of several ways.
func namespaced(namespace, name string) string { return namespace + "\x00" + name }

// calls are the fingerprints of one message's tool calls.
type calls []canonical

// all returns the fingerprint of all calls; the zero value if there are none.
func (c calls) all() canonical {
	if len(c) == 0 {
		return canonical{}
	}
	all := canonical{hash: 1}
	for _, call := range c {
		all.hash = (all.hash ^ call.hash) * 0x9E3779B97F4A7C15
		all.bytes += call.bytes
	}
	return all
}

// callText returns the fingerprint of one call. A template may render its id, and its index among
// the calls as the client numbers them.
func callText(id, name string, index int, arguments api.ToolCallFunctionArguments) canonical {
	text, _ := json.Marshal(api.ToolCall{ID: id, Function: api.ToolCallFunction{Name: name, Index: index, Arguments: arguments}})
	return canonicalOf(text)
}

// toolCalls returns the tool calls of a message of /api/chat or /v1/chat/completions.
func (p *parser) toolCalls(raw []byte) canonical {
	switch {
	case len(raw) == 0 || raw[0] != '[':
		return canonical{}
	case p.endpoint == Chat:
		return calls(p.reader.canon('c', raw, apiCalls)).all()
	}
	return calls(p.reader.canon('o', raw, openAICalls)).all()
}

func apiCalls(raw []byte) []canonical {
	var list []api.ToolCall
	if json.Unmarshal(raw, &list) != nil {
		return refused(raw)
	}
	var c []canonical
	for _, call := range list {
		c = append(c, callText(call.ID, call.Function.Name, call.Function.Index, call.Function.Arguments))
	}
	return c
}

// openAICalls reads tool calls whose arguments are a string of JSON and whose index is not
// rendered.
func openAICalls(raw []byte) []canonical {
	var list []struct {
		ID       string `json:"id"`
		Function struct {
			Name      string `json:"name"`
			Arguments string `json:"arguments"`
		} `json:"function"`
	}
	if json.Unmarshal(raw, &list) != nil {
		return refused(raw)
	}
	var c []canonical
	for _, call := range list {
		var arguments api.ToolCallFunctionArguments
		if json.Unmarshal([]byte(call.Function.Arguments), &arguments) != nil {
			return refused(raw)
		}
		c = append(c, callText(call.ID, call.Function.Name, 0, arguments))
	}
	return c
}

// anthropicCall reads a tool_use block.
func anthropicCall(block []byte) []canonical {
	var call struct {
		ID    string                        `json:"id"`
		Name  string                        `json:"name"`
		Input api.ToolCallFunctionArguments `json:"input"`
	}
	if json.Unmarshal(block, &call) != nil {
		return refused(block)
	}
	return []canonical{callText(call.ID, call.Name, 0, call.Input)}
}

// responsesCall reads a function_call or a tool_search_call item.
func responsesCall(item []byte) []canonical {
	var call struct {
		Type      string          `json:"type"`
		CallID    string          `json:"call_id"`
		Name      string          `json:"name"`
		Namespace string          `json:"namespace"`
		Arguments json.RawMessage `json:"arguments"`
	}
	if json.Unmarshal(item, &call) != nil {
		return refused(item)
	}
	text := []byte(call.Arguments)
	if s, ok := jsonscan.Unquote(text); ok {
		text = []byte(s)
	}
	if call.Type == "tool_search_call" {
		call.Name = "tool_search"
	}
	if call.Namespace != "" {
		call.Name = namespaced(call.Namespace, call.Name)
	}
	var arguments api.ToolCallFunctionArguments
	if len(text) > 0 && json.Unmarshal(text, &arguments) != nil {
		return refused(item)
	}
	return []canonical{callText(call.CallID, call.Name, 0, arguments)}
}
