package prefix

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/cespare/xxhash/v2"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// parser writes a prompt's messages as Ollama builds them from each kind of body, so that a
// conversation has the same links through /api/chat and through /v1.
type parser struct {
	writer
	reader   *Reader
	endpoint Endpoint
	tools    []byte // not written yet; nil if there are none
	long     []byte // a long string whose end is already known
	body     fields
	item     fields // of the message that is being written

	// For /v1/responses, where several items can form one message:
	open     bool   // an assistant's message has been written except for its end
	made     calls  // its tool calls
	thinking []byte // for the assistant's next message
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
			return // the request only loads the model
		}
		if !empty(f.raw[fSystem]) && p.endpoint == Generate {
			p.simple(roleSystem, f.raw[fSystem])
		}
		p.head(roleUser, f.raw[fImages])
		p.text(f.raw[fPrompt])
		p.end(0, 0)
	case Chat, ChatCompletions:
		p.each(f.raw[fMessages])
	case Messages:
		p.anthropicSystem(f.raw[fSystem])
		p.each(f.raw[fMessages])
	case Responses:
		if !empty(f.raw[fInstructions]) {
			p.simple(roleSystem, f.raw[fInstructions])
		}
		if in := f.raw[fInput]; !empty(in) {
			p.simple(roleUser, in)
		} else {
			p.each(in)
			p.close()
			if !empty(p.thinking) {
				p.head(roleAssistant, nil, p.thinking)
				p.end(0, 0)
			}
		}
	}
	if p.message > 0 {
		p.writeTools()
	}
}

// unquoted returns the text of a raw JSON string, or nil if raw is no string. It is a slice of raw
// if nothing is escaped.
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

// quoted returns a text as a raw JSON string.
func quoted(text string) []byte {
	raw, _ := json.Marshal(text) // cannot fail for a string
	return raw
}

// empty reports whether raw is not a string, or an empty one.
func empty(raw []byte) bool { return len(raw) < 3 || raw[0] != '"' }

// each writes the messages of an array.
func (p *parser) each(raw []byte) {
	if !isList(raw) {
		return
	}
	c := jsonscan.NewCursor(raw, 0)
	c.Know(p.long)
	for c.Enter(); c.More(); {
		if len(p.links) == maxLinks {
			p.put('Z', raw) // the chain is full, so the raw text suffices
			return
		}
		p.item = fields{text: p.endpoint == Chat}
		var raw []byte
		if p.endpoint != Responses && c.Kind() == '{' {
			p.item.readAt(&c)
		} else if raw = c.Value(); len(raw) > 0 && raw[0] == '{' { // null is an empty message
			p.item.read(raw)
		}
		switch p.endpoint {
		case Chat:
			p.chatMessage(&p.item)
		case ChatCompletions:
			p.openAIMessage(&p.item)
		case Messages:
			p.anthropicMessage(&p.item)
		case Responses:
			p.responsesItem(&p.item, raw)
		}
	}
}

// head writes the Head link of a message and begins its text. extra are raw strings that are
// rendered with the head; nil ones are skipped.
func (p *parser) head(role []byte, images []byte, extra ...[]byte) {
	name := unquoted(role)
	if !lower(name) {
		name = bytes.ToLower(name)
	}
	p.system = string(name) == "system"
	p.look.role(p.message, p.system)
	switch {
	case !p.system:
		p.writeTools()
		p.spoken = true
	case p.spoken:
		p.inserted = p.message
	default:
		p.leading++
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

// simple writes a message that has only text.
func (p *parser) simple(role, text []byte) {
	p.head(role, nil)
	p.text(text)
	p.end(0, 0)
}

// images writes the fingerprints of a JSON array of images.
func (p *parser) images(raw []byte) {
	if !isList(raw) {
		return
	}
	c := jsonscan.NewCursor(raw, 0)
	for c.Enter(); c.More(); {
		p.image(c.Value())
	}
}

// image writes the fingerprint of an image: base64 in a raw JSON string, perhaps as a data URL.
// Line breaks do not count. Anything but a string is an empty image, which still has a place in the
// prompt.
func (p *parser) image(raw []byte) {
	var data []byte
	if !empty(raw) {
		data = raw[1 : len(raw)-1]
	}
	if bytes.IndexByte(data, '\\') >= 0 {
		s, _ := jsonscan.Unquote(raw)
		data = []byte(strings.NewReplacer("\r", "", "\n", "").Replace(s))
	}
	if head := data[:min(len(data), 64)]; bytes.HasPrefix(head, []byte("data:")) {
		if _, after, ok := bytes.Cut(head, []byte(";base64,")); ok {
			data = data[len(head)-len(after):]
		}
	}
	p.putNumber('I', xxhash.Sum64(data))
	p.pictures++
}

func (p *parser) chatMessage(f *fields) {
	p.head(f.raw[fRole], f.raw[fImages], f.raw[fThinking], f.raw[fToolName], f.raw[fToolCallID])
	p.text(f.raw[fContent])
	calls := p.toolCalls(f.raw[fToolCalls])
	p.end(calls.hash, calls.bytes)
}

// openAIMessage writes a message in OpenAI's format. Each part of a content array becomes a
// separate message, and tool calls belong to the last one.
func (p *parser) openAIMessage(f *fields) {
	reasoning, name, id := f.raw[fReasoning], f.raw[fName], f.raw[fToolCallID]
	content, calls := f.raw[fContent], p.toolCalls(f.raw[fToolCalls])
	if content == nil || !bytes.EqualFold(unquoted(f.raw[fRole]), []byte("tool")) {
		name = nil // rendered only for tools with content
	}
	if !isList(content) {
		p.head(f.raw[fRole], nil, reasoning, name, id)
		p.text(content)
		p.end(calls.hash, calls.bytes)
		return
	}
	c := jsonscan.NewCursor(content, 0)
	c.Enter()
	more := c.More()
	if !more && calls.hash != 0 { // Ollama adds the calls to the previous message
		p.head(f.raw[fRole], nil, reasoning, name, id)
		p.end(calls.hash, calls.bytes)
	}
	for more {
		part := c.Value()
		more = c.More()
		var image []byte
		switch string(unquoted(entry(part, "type"))) {
		case "image_url":
			if image = entry(part, "image_url"); len(image) > 0 && image[0] == '{' {
				image = entry(image, "url")
			}
		case "input_audio":
			image = entry(entry(part, "input_audio"), "data")
		}
		if more || calls.hash == 0 {
			p.part(f.raw[fRole], image)
		} else {
			p.part(f.raw[fRole], image, reasoning, name, id)
		}
		p.text(entry(part, "text"))
		if more {
			p.end(0, 0)
		} else {
			p.end(calls.hash, calls.bytes)
		}
	}
}

// part is head for a message with at most one image.
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
	if !isList(raw) {
		return
	}
	var texts [][]byte
	c := jsonscan.NewCursor(raw, 0)
	for c.Enter(); c.More(); {
		block := c.Value()
		if text := entry(block, "text"); string(unquoted(entry(block, "type"))) == "text" && !empty(text) {
			texts = append(texts, text)
		}
	}
	if texts != nil {
		p.head(roleSystem, nil)
		p.texts(texts)
		p.end(0, 0)
	}
}

func (p *parser) texts(raw [][]byte) {
	for _, t := range raw {
		p.text(t)
	}
}

// anthropicMessage writes a message in Anthropic's format. Its texts are joined, and tool results
// become separate messages: before the text of a user, after that of others.
func (p *parser) anthropicMessage(f *fields) {
	content := f.raw[fContent]
	if !isList(content) {
		if !empty(content) {
			p.simple(f.raw[fRole], content)
		}
		return
	}
	var texts, results [][]byte
	var images, thinking []byte
	var made calls
	c := jsonscan.NewCursor(content, 0)
	for c.Enter(); c.More(); {
		block := c.Value()
		switch string(unquoted(member(block, "type"))) {
		case "text":
			if t := member(block, "text"); !empty(t) {
				texts = append(texts, t)
			}
		case "image":
			images = appendImage(images, member(member(block, "source"), "data"))
		case "tool_use", "server_tool_use":
			made = append(made, p.reader.canon('u', block, anthropicCall)...)
		case "tool_result", "web_search_tool_result":
			results = append(results, block)
		case "thinking":
			if t := member(block, "thinking"); t != nil {
				thinking = t
			}
		}
	}
	first := strings.EqualFold(string(unquoted(f.raw[fRole])), "user")
	if first {
		p.toolResults(results)
	}
	p.blocks(f.raw[fRole], texts, closed(images), thinking, made.all())
	if !first {
		p.toolResults(results)
	}
}

// blocks writes a message made of blocks, unless none of them is rendered.
func (p *parser) blocks(role []byte, texts [][]byte, images, thinking []byte, made canonical) {
	if texts != nil || images != nil || made.hash != 0 || !empty(thinking) {
		p.head(role, images, thinking)
		p.texts(texts)
		p.end(made.hash, made.bytes)
	}
}

func isList(raw []byte) bool { return len(raw) > 0 && raw[0] == '[' }

// appendImage adds an image to a JSON array of images that is still open.
func appendImage(list, image []byte) []byte {
	if image == nil {
		image = []byte(`""`)
	}
	sep := byte(',')
	if list == nil {
		sep = '['
	}
	return append(append(list, sep), image...)
}

// closed completes such an array.
func closed(list []byte) []byte {
	if list == nil {
		return nil
	}
	return append(list, ']')
}

func (p *parser) toolResults(blocks [][]byte) {
	for _, block := range blocks {
		content := member(block, "content")
		if string(unquoted(member(block, "type"))) == "web_search_tool_result" {
			p.head(roleTool, nil, nil, nil, member(block, "tool_use_id"))
			p.searchResults(content)
			p.end(0, 0)
			continue
		}
		var texts [][]byte
		var images []byte
		if isList(content) {
			c := jsonscan.NewCursor(content, 0)
			for c.Enter(); c.More(); {
				part := c.Value()
				switch string(unquoted(entry(part, "type"))) {
				case "text":
					texts = append(texts, entry(part, "text"))
				case "image":
					images = appendImage(images, entry(entry(part, "source"), "data"))
				}
			}
		} else {
			texts = append(texts, content)
		}
		p.head(roleTool, closed(images), nil, nil, member(block, "tool_use_id"))
		p.texts(texts)
		p.end(0, 0)
	}
}

// searchResults writes the results of Anthropic's web search as the text that Ollama makes of them.
func (p *parser) searchResults(content []byte) {
	if !isList(content) {
		if !empty(content) {
			p.text(content)
		} else {
			p.searchError(content)
		}
		return
	}
	c := jsonscan.NewCursor(content, 0)
	for c.Enter(); c.More(); {
		found := c.Value()
		if string(unquoted(entry(found, "type"))) != "web_search_result" {
			p.searchError(found)
			continue
		}
		p.text([]byte(`"- "`))
		p.text(entry(found, "title"))
		p.text([]byte(`": "`))
		p.text(entry(found, "url"))
		p.text([]byte(`"\n"`))
	}
}

func (p *parser) searchError(found []byte) {
	const kind = "web_search_tool_result_error"
	if string(unquoted(entry(found, "type"))) != kind {
		return
	}
	p.text(quoted(kind))
	if code := entry(found, "error_code"); !empty(code) {
		p.text([]byte(`": "`))
		p.text(code)
	}
}

// responsesItem writes an item of the input of /v1/responses. Function calls belong to the
// assistant's message before them, and reasoning to the one after it. An item of an unknown kind is
// written unparsed.
func (p *parser) responsesItem(f *fields, raw []byte) {
	kind := string(unquoted(f.raw[fType]))
	if kind == "" && f.raw[fRole] != nil {
		kind = "message"
	}
	switch kind {
	case "function_call", "tool_search_call":
		p.responsesCall(raw)
		return
	case "reasoning":
		p.thinking = f.raw[fEncrypted]
		return
	case "web_search_call": // not rendered
		return
	}
	p.close()
	switch kind {
	case "message":
		if string(unquoted(f.raw[fRole])) == "assistant" {
			p.contents(f.raw[fRole], f.raw[fContent], nil, p.thinking)
			p.open, p.thinking = true, nil
			return
		}
		p.contents(f.raw[fRole], f.raw[fContent], nil)
	case "agent_message":
		var lead []byte
		if author, recipient := unquoted(member(raw, "author")), unquoted(member(raw, "recipient")); len(author)+len(recipient) > 0 {
			lead = quoted(fmt.Sprintf("Agent message from %q to %q:\n", author, recipient))
		}
		p.contents(roleUser, f.raw[fContent], lead)
	case "function_call_output":
		p.contents(roleTool, f.raw[fOutput], nil, nil, f.raw[fName], f.raw[fCallID], member(raw, "namespace"))
	case "tool_search_output":
		found, err := json.Marshal(json.RawMessage(f.raw[fTools]))
		if err != nil || f.raw[fTools] == nil {
			found = []byte("[]")
		}
		p.head(roleTool, nil, nil, quoted("tool_search"), f.raw[fCallID])
		p.text(quoted(string(found)))
	default:
		p.head(f.raw[fType], nil, f.raw[fEncrypted], f.raw[fName], f.raw[fCallID])
		for _, v := range [][]byte{f.raw[fArguments], f.raw[fTools], f.raw[fOutput]} {
			p.value('v', v)
		}
	}
	p.end(0, 0)
}

// responsesCall adds a call to the open assistant's message, or opens one.
func (p *parser) responsesCall(raw []byte) {
	if !p.open {
		p.head(roleAssistant, nil, p.thinking)
		p.open, p.thinking = true, nil
	}
	if !empty(p.thinking) { // it replaces the thinking of the message
		p.made = append(p.made, canonicalOf(unquoted(p.thinking)))
		p.thinking = nil
	}
	p.made = append(p.made, p.reader.canon('f', raw, responsesCall)...)
}

// close ends the open assistant's message, if any.
func (p *parser) close() {
	if p.open {
		calls := p.made.all()
		p.end(calls.hash, calls.bytes)
	}
	p.open, p.made = false, nil
}

// contents writes a message except for its end. Its content is a string, or an array of texts and
// images; lead is a raw string that comes first.
func (p *parser) contents(role, content, lead []byte, extra ...[]byte) {
	var texts [][]byte
	var images []byte
	if !isList(content) {
		texts = append(texts, content)
	} else {
		c := jsonscan.NewCursor(content, 0)
		for c.Enter(); c.More(); {
			part := c.Value()
			switch string(unquoted(member(part, "type"))) {
			case "input_text", "output_text":
				texts = append(texts, member(part, "text"))
			case "encrypted_content":
				texts = append(texts, member(part, "encrypted_content"))
			case "input_image":
				if image := member(part, "image_url"); !empty(image) {
					images = appendImage(images, image)
				}
			}
		}
	}
	p.head(role, closed(images), extra...)
	p.text(lead)
	p.texts(texts)
}
