package forms

import (
	"bytes"
	"encoding/json"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// The members of an answer of /v1/messages.
const (
	anID = iota
	anType
	anRole
	anModel
	anContent
	anReason
	anUsage
	anMembers
)

var anMessage = layout{"id", "type", "role", "model", "content", "stop_reason", "usage"}

// The members of a block of content.
const (
	blockType = iota
	blockText
	blockID
	blockName
	blockInput
	blockThinking
	blockMembers
)

var anBlock = layout{"type", "text", "id", "name", "input", "thinking"}

// The events of a stream. Each has its type as its first member.
var (
	anStart      = layout{"type", "message"}
	anBlockStart = layout{"type", "index", "content_block"}
	anBlockDelta = layout{"type", "index", "delta"}
	anBlockStop  = layout{"type", "index"}
	anDelta      = layout{"type", "delta", "usage"}
	anStop       = layout{"type"}
	anPart       = layout{"type", "text", "partial_json", "thinking"}
	anEnd        = layout{"stop_reason"}
	anCounts     = layout{"input_tokens", "cache_read_input_tokens", "output_tokens"}
)

var (
	typeThinking = []byte(`"thinking"`)
	typeText     = []byte(`"text"`)
	typeTool     = []byte(`"tool_use"`)
	typeMessage  = []byte(`"message"`)
	emptyObject  = []byte(`{}`)
)

// namedEvent returns an event's name and data, as writeSSE in Ollama's middleware writes them.
func namedEvent(unit []byte) (name, data []byte, ok bool) {
	name, data, ok = bytes.Cut(unit, lineEnd)
	if !ok {
		return nil, nil, false
	}
	if name, ok = bytes.CutPrefix(name, []byte("event: ")); !ok {
		return nil, nil, false
	}
	data, ok = chunkData(data)
	return name, data, ok
}

// appendEvent writes such an event, whose type is its name.
func appendEvent(b []byte, name string, l layout, v ...[]byte) []byte {
	b = append(b, "event: "...)
	b = append(b, name...)
	b = append(b, "\ndata: "...)
	v[0] = quoted(name)
	return append(l.append(b, v), eventEnd...)
}

// quoted returns a string that needs no escapes as a raw one.
func quoted(s string) []byte {
	b := make([]byte, 0, len(s)+2)
	return append(append(append(b, '"'), s...), '"')
}

// isQuoted reports whether a raw string is s.
func isQuoted(raw, s []byte) bool {
	return len(raw) == len(s)+2 && raw[0] == '"' && bytes.Equal(raw[1:len(raw)-1], s)
}

// anStream is a stream of /v1/messages as it is read.
type anStream struct {
	tools    bool
	message  [anMembers][]byte
	thinking joined
	text     joined
	calls    list
	kind     []byte // of the open block; nil if none is open
	call     [blockMembers][]byte
	index    int // of the next block, or of the open one
	ended    bool
	stopped  bool

	same shape // of the last delta of the open block; nil if there is none
}

// wholeMessages does what ToMessagesResponse in anthropic/anthropic.go does.
func wholeMessages(stream []byte, tools bool) ([]byte, bool) {
	s := anStream{tools: tools}
	var text [1][]byte
	for unit := range split(stream, eventEnd) {
		if s.same.match(unit, text[:]) {
			if !s.add(text[0]) {
				return nil, false
			}
			continue
		}
		name, data, ok := namedEvent(unit)
		if !ok || s.stopped || !s.event(name, data) {
			return nil, false
		}
	}
	if !s.stopped {
		return nil, false
	}
	s.message[anContent] = s.content()
	b := make([]byte, 0, sizeOf(s.message[:])+256)
	return append(anMessage.append(b, s.message[:]), '\n'), true
}

// anEvents are the layouts of the events.
var anEvents = map[string]layout{
	"message_start": anStart, "content_block_start": anBlockStart,
	"content_block_delta": anBlockDelta, "content_block_stop": anBlockStop,
	"message_delta": anDelta, "message_stop": anStop,
}

// event reads one event.
func (s *anStream) event(name, data []byte) bool {
	var v [3][]byte
	l := anEvents[string(name)]
	if l == nil || !l.read(data, v[:]) || !isQuoted(v[0], name) {
		return false
	}
	begun := s.message[anID] != nil
	switch string(name) {
	case "message_start":
		return !begun && s.start(v[1])
	case "message_delta":
		return begun && s.kind == nil && !s.ended && s.end(v[1], v[2])
	case "message_stop":
		s.stopped = s.ended
		return s.ended
	}
	return begun && s.isIndex(v[1]) && s.block(string(name), v[2])
}

// block reads an event of a block.
func (s *anStream) block(name string, value []byte) bool {
	switch name {
	case "content_block_start":
		return s.kind == nil && s.open(value)
	case "content_block_delta":
		return s.delta(value)
	}
	return s.close()
}

func (s *anStream) isIndex(raw []byte) bool {
	n, err := strconv.Atoi(string(raw))
	return err == nil && n == s.index && !s.ended
}

func (s *anStream) start(message []byte) bool {
	m := &s.message
	var counts [3][]byte
	return anMessage.read(message, m[:]) && all(m[:anReason]...) && m[anUsage] != nil &&
		m[anReason] == nil && string(m[anContent]) == "[]" && bytes.Equal(m[anType], typeMessage) &&
		anCounts.read(m[anUsage], counts[:]) // an estimate
}

func (s *anStream) open(block []byte) bool {
	switch string(block) {
	case `{"type":"thinking","thinking":""}`:
		s.kind = typeThinking
	case `{"type":"text","text":""}`:
		s.kind = typeText
	default:
		var v [blockMembers][]byte
		if !anBlock.read(block, v[:]) || !isCall(v) || string(v[blockInput]) != "{}" {
			return false
		}
		s.kind, s.call = v[blockType], v
		return s.tools
	}
	return true
}

// isCall reports whether a block is a tool's call.
func isCall(v [blockMembers][]byte) bool {
	return bytes.Equal(v[blockType], typeTool) && isName(v[blockID]) && isName(v[blockName]) &&
		v[blockInput] != nil && v[blockText] == nil && v[blockThinking] == nil
}

// isName reports whether a raw value is a string that is not empty.
func isName(raw []byte) bool { return isText(raw) && !isEmptyText(raw) }

func (s *anStream) delta(part []byte) bool {
	var v [4][]byte
	if !anPart.read(part, v[:]) {
		return false
	}
	switch string(v[0]) {
	case `"thinking_delta"`:
		return bytes.Equal(s.kind, typeThinking) && s.textDelta(v, 3)
	case `"text_delta"`:
		return bytes.Equal(s.kind, typeText) && s.textDelta(v, 1)
	case `"input_json_delta"`: // the whole input
		return bytes.Equal(s.kind, typeTool) && s.inputDelta(v)
	}
	return false
}

// textDelta reads a part of a text, which is at a place in anPart.
func (s *anStream) textDelta(v [4][]byte, place int) bool {
	text := v[place]
	v[place] = nil
	if text == nil || !s.add(text) || sizeOf(v[1:]) > 0 {
		return false
	}
	v[place] = hole
	index := strconv.AppendInt(nil, int64(s.index), 10)
	part := anPart.append(nil, v[:])
	s.same = newShape(appendEvent(nil, "content_block_delta", anBlockDelta, nil, index, part))
	return true
}

func (s *anStream) inputDelta(v [4][]byte) bool {
	raw, ok := jsonscan.Unquote(v[2])
	if !ok || v[1] != nil || v[3] != nil || string(s.call[blockInput]) != "{}" {
		return false
	}
	s.call[blockInput] = []byte(raw)
	return isCompact(s.call[blockInput])
}

// add adds to the open block's text.
func (s *anStream) add(text []byte) bool {
	if bytes.Equal(s.kind, typeThinking) {
		return s.thinking.add(text)
	}
	return s.text.add(text)
}

// isCompact reports whether a text is an object, written without white space, that a string can
// have.
func isCompact(text []byte) bool {
	if len(text) == 0 || text[0] != '{' || !utf8.Valid(text) {
		return false
	}
	var b bytes.Buffer
	return json.Compact(&b, text) == nil && b.Len() == len(text)
}

func (s *anStream) close() bool {
	if s.kind == nil {
		return false
	}
	if bytes.Equal(s.kind, typeTool) {
		s.addBlock(s.call[:])
	}
	s.kind, s.same = nil, nil
	s.index++
	return true
}

// addBlock adds to the calls.
func (s *anStream) addBlock(v [][]byte) {
	b := make([]byte, 1, 128)
	b[0] = '['
	s.calls.add(append(anBlock.append(b, v), ']'))
}

func (s *anStream) end(delta, usage []byte) bool {
	var v [1][]byte
	var counts [3][]byte
	if !anEnd.read(delta, v[:]) || !anCounts.read(usage, counts[:]) {
		return false
	}
	if _, ok := stopReason(v[0], usage); !ok {
		return false
	}
	s.message[anReason], s.message[anUsage], s.ended = v[0], usage, true
	return true
}

// content returns all blocks in the order of an answer in one piece.
func (s *anStream) content() []byte {
	var l list
	for i, text := range [][]byte{s.thinking.text(), s.text.text()} {
		if text == nil {
			continue
		}
		v := [blockMembers][]byte{blockType: typeThinking, blockThinking: text}
		if i == 1 {
			v = [blockMembers][]byte{blockType: typeText, blockText: text}
		}
		b := make([]byte, 1, len(text)+64)
		b[0] = '['
		l.add(append(anBlock.append(b, v[:]), ']'))
	}
	l.add(s.calls.array())
	if a := l.array(); a != nil {
		return a
	}
	return nullValue // a slice that was never made
}

// streamMessages writes a block for the thoughts, one for the text, and one for each call.
func streamMessages(whole []byte) ([]byte, bool) {
	var m [anMembers][]byte
	var counts [3][]byte
	whole, ok := bytes.CutSuffix(whole, lineEnd)
	if !ok || !anMessage.read(whole, m[:]) || !all(m[:]...) ||
		!bytes.Equal(m[anType], typeMessage) || !anCounts.read(m[anUsage], counts[:]) {
		return nil, false
	}
	if _, ok := stopReason(m[anReason], m[anUsage]); !ok {
		return nil, false
	}
	start := m
	begin := counts
	begin[2] = []byte("0")
	start[anContent], start[anReason] = emptyList, nil
	start[anUsage] = anCounts.append(nil, begin[:])
	b := make([]byte, 0, 2*len(whole)+2048)
	b = appendEvent(b, "message_start", anStart, nil, anMessage.append(nil, start[:]))
	if b, ok = appendBlocks(b, m[anContent]); !ok {
		return nil, false
	}
	end := anEnd.append(nil, m[anReason:anReason+1])
	b = appendEvent(b, "message_delta", anDelta, nil, end, m[anUsage])
	return appendEvent(b, "message_stop", anStop, nil), true
}

// appendBlocks writes the blocks of an array, or of null: one of thoughts, one of text, and calls,
// of which each may be missing.
func appendBlocks(b, content []byte) ([]byte, bool) {
	if string(content) == "null" {
		return b, true
	}
	c := jsonscan.NewCursor(content, 0)
	if c.Kind() != '[' {
		return nil, false
	}
	stage, end := 0, 0 // stage: 1 after thoughts, 2 after text, 3 after a call
	c.Enter()
	for index := 0; c.More(); index++ {
		if c.Pos() != end+1 {
			return nil, false // white space
		}
		value := c.Value()
		end = c.Pos()
		var v [blockMembers][]byte
		if !anBlock.read(value, v[:]) {
			return nil, false
		}
		next, block, part := blockParts(v)
		if next == 0 || next < stage || next == stage && next != 3 {
			return nil, false
		}
		stage = next
		i := strconv.AppendInt(nil, int64(index), 10)
		b = appendEvent(b, "content_block_start", anBlockStart, nil, i, block)
		b = appendEvent(b, "content_block_delta", anBlockDelta, nil, i, part)
		b = appendEvent(b, "content_block_stop", anBlockStop, nil, i)
	}
	return b, stage > 0 && end+1 == len(content)
}

// blockParts returns which kind of block it is (1 thoughts, 2 text, 3 a call, 0 something else),
// how it begins in a stream, and what is added.
func blockParts(v [blockMembers][]byte) (kind int, block, part []byte) {
	begin, other := v, v
	var delta [4][]byte
	switch string(v[blockType]) {
	case string(typeThinking):
		kind, begin[blockThinking] = 1, emptyText
		delta[0], delta[3] = []byte(`"thinking_delta"`), v[blockThinking]
		other[blockThinking] = nil
	case string(typeText):
		kind, begin[blockText] = 2, emptyText
		delta[0], delta[1] = []byte(`"text_delta"`), v[blockText]
		other[blockText] = nil
	default:
		input, err := json.Marshal(string(v[blockInput]))
		if err != nil || !isCall(v) || !isCompact(v[blockInput]) {
			return 0, nil, nil
		}
		begin[blockInput] = emptyObject
		delta[0], delta[2] = []byte(`"input_json_delta"`), input
		return 3, anBlock.append(nil, begin[:]), anPart.append(nil, delta[:])
	}
	if !isName(slices.Concat(delta[1], delta[3])) || sizeOf(other[1:]) > 0 {
		return 0, nil, nil
	}
	return kind, anBlock.append(nil, begin[:]), anPart.append(nil, delta[:])
}
