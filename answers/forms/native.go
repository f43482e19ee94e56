package forms

import "bytes"

// The members of an answer of /api/chat, and their places in chatLine.
const (
	chatModel = iota
	chatCreated
	chatMessage
	chatDone
	chatReason
	chatLogprobs
	chatMembers = 13
)

var chatLine = layout{
	"model", "created_at", "message", "done", "done_reason", "logprobs", "total_duration",
	"load_duration", "prompt_eval_count", "prompt_eval_cached_count", "prompt_eval_duration",
	"eval_count", "eval_duration",
}

// The members of its message.
const (
	msgRole = iota
	msgContent
	msgThinking
	msgCalls
	msgMembers
)

var chatMsg = layout{"role", "content", "thinking", "tool_calls"}

// The members of an answer of /api/generate.
const (
	genModel = iota
	genCreated
	genResponse
	genThinking
	genDone
	genReason
	genCalls    = 14
	genLogprobs = 15
	genMembers  = 16
)

var genLine = layout{
	"model", "created_at", "response", "thinking", "done", "done_reason", "context",
	"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_cached_count",
	"prompt_eval_duration", "eval_count", "eval_duration", "tool_calls", "logprobs",
}

// isDone reports whether a native answer says that it is done. ok is false if it says neither that
// nor the opposite, or tells of something else than a generation.
func isDone(done, reason []byte) (is, ok bool) {
	switch string(done) {
	case "false":
		return false, reason == nil
	case "true":
		r, ok := word(reason)
		return true, ok && r != "load" && r != "unload"
	}
	return false, false
}

// gathered is what is put together from the parts of a stream.
type gathered struct {
	content, thinking joined
	calls, logprobs   list
}

// add adds one part. Only the content may not be nil.
func (g *gathered) add(content, thinking, calls, logprobs []byte) bool {
	return g.content.add(content) && (thinking == nil || g.thinking.add(thinking)) &&
		g.calls.add(calls) && g.logprobs.add(logprobs)
}

// nativeLine reads one line of a native stream.
type nativeLine interface {
	read(line []byte) (nativePart, bool)
	// holed returns the line that was read, with holes in place of its time and its thoughts or
	// content.
	holed(thinking bool) []byte
}

// nativePart is what a line says.
type nativePart struct {
	content, thinking, calls, logprobs []byte
	done                               bool
}

// gather puts the parts of a stream together. The last line is the one that l has read then.
func (g *gathered) gather(stream []byte, l nativeLine) bool {
	var same shape // of the last line that was read
	thinking := false
	var text [2][]byte
	done := false
	for line := range split(stream, lineEnd) {
		line = bytes.TrimSuffix(line, lineEnd)
		if done {
			return false
		}
		if same.match(line, text[:]) {
			if !g.text(thinking).add(text[1]) {
				return false
			}
			continue
		}
		p, ok := l.read(line)
		if !ok || !g.add(p.content, p.thinking, p.calls, p.logprobs) {
			return false
		}
		if done = p.done; !done && p.calls == nil && p.logprobs == nil {
			thinking = p.thinking != nil && isEmptyText(p.content)
			same = newShape(l.holed(thinking))
		}
	}
	return done
}

// text returns the thoughts or the content.
func (g *gathered) text(thinking bool) *joined {
	if thinking {
		return &g.thinking
	}
	return &g.content
}

// chatPart is a line of /api/chat.
type chatPart struct {
	v     [chatMembers][]byte
	m     [msgMembers][]byte
	tools bool // the request has some
}

func (c *chatPart) read(line []byte) (p nativePart, ok bool) {
	c.v, c.m = [chatMembers][]byte{}, [msgMembers][]byte{}
	if !chatLine.read(line, c.v[:]) || !chatMsg.read(c.v[chatMessage], c.m[:]) {
		return p, false
	}
	p = nativePart{c.m[msgContent], c.m[msgThinking], c.m[msgCalls], c.v[chatLogprobs], false}
	p.done, ok = isDone(c.v[chatDone], c.v[chatReason])
	return p, ok && (p.calls == nil || c.tools || p.done)
}

func (c *chatPart) holed(thinking bool) []byte {
	if thinking {
		c.m[msgThinking] = hole
	} else {
		c.m[msgContent] = hole
	}
	c.v[chatCreated], c.v[chatMessage] = hole, chatMsg.append(nil, c.m[:])
	return chatLine.append(nil, c.v[:])
}

// wholeChat does what writeChatResponse in server/routes.go does: the text, the thoughts, the calls
// and the log probabilities of all parts, and everything else of the last.
func wholeChat(stream []byte, tools bool) ([]byte, bool) {
	var g gathered
	last := chatPart{tools: tools}
	v, m := &last.v, &last.m
	if !g.gather(stream, &last) || !all(v[chatModel], v[chatCreated], m[msgRole]) {
		return nil, false
	}
	m[msgContent], m[msgThinking] = g.content.textOrEmpty(), g.thinking.text()
	m[msgCalls] = g.calls.array()
	v[chatLogprobs] = g.logprobs.array()
	v[chatMessage] = chatMsg.append(nil, m[:])
	return chatLine.append(make([]byte, 0, sizeOf(v[:])+256), v[:]), true
}

// generatePart is a line of /api/generate.
type generatePart [genMembers][]byte

func (v *generatePart) read(line []byte) (p nativePart, ok bool) {
	*v = generatePart{}
	if !genLine.read(line, v[:]) {
		return p, false
	}
	p = nativePart{v[genResponse], v[genThinking], nil, v[genLogprobs], false}
	p.done, ok = isDone(v[genDone], v[genReason])
	return p, ok && (v[genCalls] == nil || p.done)
}

func (v *generatePart) holed(thinking bool) []byte {
	if thinking {
		v[genThinking] = hole
	} else {
		v[genResponse] = hole
	}
	v[genCreated] = hole
	return genLine.append(nil, v[:])
}

// wholeGenerate does what GenerateHandler does, which knows no calls but those of the last part.
func wholeGenerate(stream []byte) ([]byte, bool) {
	var g gathered
	var v generatePart
	if !g.gather(stream, &v) || !all(v[genModel], v[genCreated]) {
		return nil, false
	}
	v[genResponse], v[genThinking] = g.content.textOrEmpty(), g.thinking.text()
	v[genLogprobs] = g.logprobs.array()
	return genLine.append(make([]byte, 0, sizeOf(v[:])+256), v[:]), true
}

// sizeOf returns the length of all values.
func sizeOf(v [][]byte) int {
	n := 0
	for _, value := range v {
		n += len(value)
	}
	return n
}

// streamChat writes a line each for the thoughts, the text and the calls, and then the last line.
func streamChat(whole []byte) ([]byte, bool) {
	var v [chatMembers][]byte
	var m [msgMembers][]byte
	if !chatLine.read(whole, v[:]) || !chatMsg.read(v[chatMessage], m[:]) {
		return nil, false
	}
	done, ok := isDone(v[chatDone], v[chatReason])
	if !ok || !done || !all(v[chatModel], v[chatCreated], m[msgRole]) ||
		!areParts(m[:], v[chatLogprobs]) {
		return nil, false
	}
	b := make([]byte, 0, len(whole)+1024)
	part := [chatMembers][]byte{
		chatModel: v[chatModel], chatCreated: v[chatCreated], chatDone: falseValue,
		chatLogprobs: v[chatLogprobs],
	}
	for p := range parts(m) {
		part[chatMessage] = chatMsg.append(nil, p[:])
		b = append(chatLine.append(b, part[:]), '\n')
		part[chatLogprobs], v[chatLogprobs] = nil, nil // they were written
	}
	v[chatMessage] = chatMsg.append(nil, [][]byte{m[msgRole], emptyText, nil, nil})
	return append(chatLine.append(b, v[:]), '\n'), true
}

// areParts reports whether the members of a message, and its log probabilities, are what Ollama
// writes: what is empty is left out, except for the content.
func areParts(m [][]byte, logprobs []byte) bool {
	var g gathered
	return !isEmptyText(m[msgThinking]) && g.add(m[msgContent], m[msgThinking], m[msgCalls], logprobs)
}

// parts yields the messages of the parts of a stream that together say what the message says.
func parts(m [msgMembers][]byte) func(func([msgMembers][]byte) bool) {
	return func(yield func([msgMembers][]byte) bool) {
		if m[msgThinking] != nil &&
			!yield([msgMembers][]byte{m[msgRole], emptyText, m[msgThinking], nil}) {
			return
		}
		if !isEmptyText(m[msgContent]) &&
			!yield([msgMembers][]byte{m[msgRole], m[msgContent], nil, nil}) {
			return
		}
		if m[msgCalls] != nil {
			yield([msgMembers][]byte{m[msgRole], emptyText, nil, m[msgCalls]})
		}
	}
}

// streamGenerate does the same; calls are on the last line.
func streamGenerate(whole []byte) ([]byte, bool) {
	var v [genMembers][]byte
	if !genLine.read(whole, v[:]) {
		return nil, false
	}
	done, ok := isDone(v[genDone], v[genReason])
	m := [msgMembers][]byte{msgContent: v[genResponse], msgThinking: v[genThinking]}
	if !ok || !done || !all(v[genModel], v[genCreated]) || !areParts(m[:], v[genLogprobs]) {
		return nil, false
	}
	b := make([]byte, 0, len(whole)+1024)
	part := [genMembers][]byte{
		genModel: v[genModel], genCreated: v[genCreated], genDone: falseValue,
		genLogprobs: v[genLogprobs],
	}
	for p := range parts(m) {
		part[genResponse], part[genThinking] = p[msgContent], p[msgThinking]
		b = append(genLine.append(b, part[:]), '\n')
		part[genLogprobs], v[genLogprobs] = nil, nil
	}
	v[genResponse], v[genThinking] = emptyText, nil
	return append(genLine.append(b, v[:]), '\n'), true
}
