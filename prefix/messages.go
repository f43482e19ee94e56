package prefix

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"github.com/cespare/xxhash/v2"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// parser writes a prompt's messages as Ollama makes them of each kind of body, so that a conversation has the same links
// through /api/chat and through /v1.
type parser struct {
	writer
	reader   *Reader
	endpoint Endpoint
	tools    []byte // not written yet; nil if there are none
	body     fields
	item     fields // of the message that is being written
}

var (
	roleSystem    = []byte(`"system"`)
	roleUser      = []byte(`"user"`)
	roleAssistant = []byte(`"assistant"`)
	roleTool      = []byte(`"tool"`)
)

func (p *parser) prompt() {
	f := &p.body
	switch p.endpoint {
	case Generate, Completions:
		if empty(f.raw[fPrompt]) {
			return // loads the model only
		}
		if !empty(f.raw[fSystem]) && p.endpoint == Generate {
			p.simple(roleSystem, f.raw[fSystem])
		}
		p.head(roleUser, f.raw[fImages])
		p.text(f.raw[fPrompt])
		p.end(0, 0)
	case Chat:
		p.each(f.raw[fMessages])
	case ChatCompletions:
		p.each(f.raw[fMessages])
	case Messages:
		p.anthropicSystem(f.raw[fSystem])
		p.each(f.raw[fMessages])
	case Responses:
		if !empty(f.raw[fInstructions]) {
			p.simple(roleSystem, f.raw[fInstructions])
		}
		if in := f.raw[fInput]; len(in) > 0 && in[0] == '"' {
			p.simple(roleUser, in)
		} else {
			p.each(in)
		}
	}
	if p.message > 0 {
		p.writeTools()
	}
}

// unquoted returns a raw JSON string's text; nil where raw is no string. It is a part of raw where nothing is escaped.
func unquoted(raw []byte) []byte {
	if len(raw) < 2 || raw[0] != '"' {
		return nil
	}
	if inner := raw[1 : len(raw)-1]; bytes.IndexByte(inner, '\\') < 0 && utf8.Valid(inner) {
		return inner
	}
	s, _ := jsonscan.Unquote(raw)
	return []byte(s)
}

// empty reports whether raw is no string, or an empty one.
func empty(raw []byte) bool { return len(raw) < 3 || raw[0] != '"' }

// each writes the messages of an array.
func (p *parser) each(raw []byte) {
	if len(raw) == 0 || raw[0] != '[' {
		return
	}
	c := jsonscan.NewCursor(raw, 0)
	for c.Enter(); c.More(); {
		if c.Kind() != '{' {
			c.Value()
			continue
		}
		p.item = fields{}
		p.item.readAt(&c)
		switch p.endpoint {
		case Chat:
			p.chatMessage(&p.item)
		case ChatCompletions:
			p.openAIMessage(&p.item)
		case Messages:
			p.anthropicMessage(&p.item)
		case Responses:
			p.responsesItem(&p.item)
		}
	}
}

// head writes the Head link of a message and begins its text. extra are raw strings that are rendered beside it; nil ones
// are left out.
func (p *parser) head(role []byte, images []byte, extra ...[]byte) {
	name := unquoted(role)
	if (p.endpoint == Chat || p.endpoint == Messages) && !lower(name) {
		name = bytes.ToLower(name)
	}
	p.system = string(name) == "system"
	if !p.system {
		p.writeTools()
	}
	p.put('M', name)
	for i, raw := range extra {
		if s := unquoted(raw); len(s) > 0 {
			p.put(byte('0'+i), s)
			p.bytes += len(s)
		}
	}
	p.images(images)
	p.add(Link{Part: Head, Message: p.message})
	p.begin()
}

// simple writes a message that is nothing but text.
func (p *parser) simple(role, text []byte) {
	p.head(role, nil)
	p.text(text)
	p.end(0, 0)
}

// writeTools writes the tools. They come after the leading system messages, as most templates have them.
func (p *parser) writeTools() {
	raw := p.tools
	if p.tools = nil; len(raw) < 3 || raw[0] != '[' {
		return
	}
	var h uint64
	switch p.endpoint {
	case Chat, ChatCompletions:
		h = p.reader.canon('a', raw, apiTools)
	case Messages:
		h = p.reader.canon('m', raw, anthropicTools)
	case Responses:
		h = p.reader.canon('r', raw, sorted)
	default:
		return // not theirs
	}
	p.bytes += len(raw)
	p.putNumber('T', h)
	p.add(Link{Part: Tools, Message: p.message})
}

// images writes the fingerprints of a JSON array of images.
func (p *parser) images(raw []byte) {
	if len(raw) == 0 || raw[0] != '[' {
		return
	}
	c := jsonscan.NewCursor(raw, 0)
	for c.Enter(); c.More(); {
		p.image(c.Value())
	}
}

// image writes the fingerprint of an image: base64 in a raw JSON string, perhaps as a data URL. Line ends do not count.
func (p *parser) image(raw []byte) {
	if len(raw) < 2 || raw[0] != '"' {
		return
	}
	data := raw[1 : len(raw)-1]
	if bytes.IndexByte(data, '\\') >= 0 {
		s, _ := jsonscan.Unquote(raw)
		data = []byte(strings.NewReplacer("\r", "", "\n", "").Replace(s))
	}
	if bytes.HasPrefix(data, []byte("data:")) {
		if _, after, ok := bytes.Cut(data[:min(len(data), 64)], []byte(";base64,")); ok {
			data = data[len(data[:min(len(data), 64)])-len(after):]
		}
	}
	p.putNumber('I', xxhash.Sum64(data))
	p.pictures++
}

// calls returns the fingerprint of a message's tool calls and their length in bytes.
func (p *parser) calls(raw []byte) (uint64, int) {
	if len(raw) < 3 || raw[0] != '[' {
		return 0, 0
	}
	return p.reader.canon('c', raw, toolCalls), len(raw)
}

func (p *parser) chatMessage(f *fields) {
	p.head(f.raw[fRole], f.raw[fImages], f.raw[fThinking], f.raw[fToolName], f.raw[fToolCallID])
	p.text(f.raw[fContent])
	p.end(p.calls(f.raw[fToolCalls]))
}

// openAIMessage: each part of a content array becomes a message of its own, and tool calls belong to the last of them.
func (p *parser) openAIMessage(f *fields) {
	reasoning, name, id := f.raw[fReasoning], f.raw[fName], f.raw[fToolCallID]
	if !bytes.EqualFold(unquoted(f.raw[fRole]), []byte("tool")) {
		name = nil // it is rendered for tools only
	}
	content := f.raw[fContent]
	if len(content) == 0 || content[0] != '[' {
		p.head(f.raw[fRole], nil, reasoning, name, id)
		p.text(content)
		p.end(p.calls(f.raw[fToolCalls]))
		return
	}
	c := jsonscan.NewCursor(content, 0)
	c.Enter()
	for more := c.More(); more; {
		part := c.Value()
		more = c.More()
		var image []byte
		switch kind, _ := jsonscan.Unquote(member(part, "type")); kind {
		case "image_url":
			if image = member(part, "image_url"); len(image) > 0 && image[0] == '{' {
				image = member(image, "url")
			}
		case "input_audio":
			image = member(member(part, "input_audio"), "data")
		}
		calls := f.raw[fToolCalls]
		if more || len(calls) < 3 {
			calls = nil
			p.part(f.raw[fRole], image)
		} else {
			p.part(f.raw[fRole], image, reasoning, name, id)
		}
		p.text(member(part, "text"))
		p.end(p.calls(calls))
	}
}

// part is head for a message with one image, or none.
func (p *parser) part(role, image []byte, extra ...[]byte) {
	var list []byte
	if image != nil {
		list = append(append([]byte{'['}, image...), ']')
	}
	p.head(role, list, extra...)
}

func (p *parser) anthropicSystem(raw []byte) {
	if !empty(raw) {
		p.simple(roleSystem, raw)
		return
	}
	if len(raw) == 0 || raw[0] != '[' {
		return
	}
	var texts [][]byte
	c := jsonscan.NewCursor(raw, 0)
	for c.Enter(); c.More(); {
		block := c.Value()
		if kind, _ := jsonscan.Unquote(member(block, "type")); kind == "text" && !empty(member(block, "text")) {
			texts = append(texts, member(block, "text"))
		}
	}
	if texts != nil {
		p.head(roleSystem, nil)
		for _, t := range texts {
			p.text(t)
		}
		p.end(0, 0)
	}
}

// anthropicMessage: the texts of a message are joined, and tool results become messages of their own: before the user's
// text, after anybody else's.
func (p *parser) anthropicMessage(f *fields) {
	content := f.raw[fContent]
	if len(content) == 0 || content[0] != '[' {
		if !empty(content) {
			p.simple(f.raw[fRole], content)
		}
		return
	}
	var texts, results [][]byte
	var images, thinking []byte
	var calls bytes.Buffer
	c := jsonscan.NewCursor(content, 0)
	for c.Enter(); c.More(); {
		block := c.Value()
		switch kind, _ := jsonscan.Unquote(member(block, "type")); kind {
		case "text":
			if t := member(block, "text"); !empty(t) {
				texts = append(texts, t)
			}
		case "image":
			images = appendImage(images, member(member(block, "source"), "data"))
		case "tool_use", "server_tool_use":
			writeCall(&calls, member(block, "id"), member(block, "name"), member(block, "input"))
		case "tool_result", "web_search_tool_result":
			results = append(results, block)
		case "thinking":
			thinking = member(block, "thinking")
		}
	}
	role, _ := jsonscan.Unquote(f.raw[fRole])
	first := strings.EqualFold(role, "user")
	if first {
		p.toolResults(results)
	}
	if texts != nil || images != nil || calls.Len() > 0 || !empty(thinking) {
		if images != nil {
			images = append(images, ']')
		}
		p.head(f.raw[fRole], images, thinking)
		for _, t := range texts {
			p.text(t)
		}
		var h uint64
		if calls.Len() > 0 {
			h = xxhash.Sum64(calls.Bytes()) | 1
		}
		p.end(h, calls.Len())
	}
	if !first {
		p.toolResults(results)
	}
}

// appendImage adds an image to a JSON array of images that is still open.
func appendImage(list, image []byte) []byte {
	if image == nil {
		return list
	}
	sep := byte(',')
	if list == nil {
		sep = '['
	}
	return append(append(list, sep), image...)
}

func (p *parser) toolResults(blocks [][]byte) {
	for _, block := range blocks {
		content := member(block, "content")
		var texts [][]byte
		var images []byte
		if len(content) > 0 && content[0] == '[' {
			c := jsonscan.NewCursor(content, 0)
			for c.Enter(); c.More(); {
				part := c.Value()
				switch kind, _ := jsonscan.Unquote(member(part, "type")); kind {
				case "text":
					texts = append(texts, member(part, "text"))
				case "image":
					images = appendImage(images, member(member(part, "source"), "data"))
				default: // a search result
					texts = append(texts, member(part, "title"), member(part, "url"))
				}
			}
		} else {
			texts = append(texts, content)
		}
		if images != nil {
			images = append(images, ']')
		}
		p.head(roleTool, images, nil, nil, member(block, "tool_use_id"))
		for _, t := range texts {
			p.text(t)
		}
		p.end(0, 0)
	}
}

// responsesItem is one item of /v1/responses' input. An item whose kind is not known here is written as it is.
func (p *parser) responsesItem(f *fields) {
	kind, _ := jsonscan.Unquote(f.raw[fType])
	if kind == "" && f.raw[fRole] != nil {
		kind = "message"
	}
	switch kind {
	case "message", "agent_message":
		p.contents(f.raw[fRole], f.raw[fContent], f.raw[fName])
	case "function_call_output":
		p.contents(roleTool, f.raw[fOutput], f.raw[fName], nil, f.raw[fCallID])
	case "function_call":
		var b bytes.Buffer
		writeCall(&b, f.raw[fCallID], f.raw[fName], f.raw[fArguments])
		p.head(roleAssistant, nil)
		p.end(xxhash.Sum64(b.Bytes())|1, b.Len())
	case "web_search_call": // not rendered
	default:
		p.head(f.raw[fType], nil, f.raw[fEncrypted], f.raw[fName], f.raw[fCallID])
		for _, raw := range [][]byte{f.raw[fArguments], f.raw[fTools], f.raw[fOutput]} {
			p.value('v', raw)
		}
		p.end(0, 0)
	}
}

// contents writes a message whose content is a string or an array of texts and images.
func (p *parser) contents(role, content []byte, extra ...[]byte) {
	if len(content) == 0 || content[0] != '[' {
		p.head(role, nil, extra...)
		p.text(content)
		p.end(0, 0)
		return
	}
	var texts [][]byte
	var images []byte
	c := jsonscan.NewCursor(content, 0)
	for c.Enter(); c.More(); {
		part := c.Value()
		texts = append(texts, member(part, "text"), member(part, "encrypted_content"))
		images = appendImage(images, member(part, "image_url"))
	}
	if images != nil {
		images = append(images, ']')
	}
	p.head(role, images, extra...)
	for _, t := range texts {
		p.text(t)
	}
	p.end(0, 0)
}
