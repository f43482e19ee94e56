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

// likeness is how the last line that was parsed looks, apart from its time and its text.
type likeness struct {
	shape    shape
	thinking bool // the text is of the thoughts
}

// add adds the text of a line that looks like the last one.
func (l *likeness) add(line []byte, g *gathered) (matched, ok bool) {
	var v [2][]byte
	if !l.shape.match(line, v[:]) {
		return false, false
	}
	if l.thinking {
		return true, g.thinking.add(v[1])
	}
	return true, g.content.add(v[1])
}

// wholeChat does what writeChatResponse in server/routes.go does: the text, the thoughts, the calls
// and the log probabilities of all parts, and everything else of the last.
func wholeChat(stream []byte, tools bool) ([]byte, bool) {
	var g gathered
	var v [chatMembers][]byte
	var m [msgMembers][]byte
	var like likeness
	done := false
	for line := range split(stream, lineEnd) {
		line = bytes.TrimSuffix(line, lineEnd)
		if matched, ok := like.add(line, &g); matched && !done {
			if !ok {
				return nil, false
			}
			continue
		}
		v, m = [chatMembers][]byte{}, [msgMembers][]byte{}
		if done || !chatLine.read(line, v[:]) || !chatMsg.read(v[chatMessage], m[:]) {
			return nil, false
		}
		var ok bool
		if done, ok = isDone(v[chatDone], v[chatReason]); !ok {
			return nil, false
		}
		if m[msgCalls] != nil && !tools && !done {
			return nil, false
		}
		if !g.add(m[msgContent], m[msgThinking], m[msgCalls], v[chatLogprobs]) {
			return nil, false
		}
		if !done && m[msgCalls] == nil && v[chatLogprobs] == nil {
			like.thinking = m[msgThinking] != nil && isEmptyText(m[msgContent])
			if like.thinking {
				m[msgThinking] = hole
			} else {
				m[msgContent] = hole
			}
			v[chatCreated], v[chatMessage] = hole, chatMsg.append(nil, m[:])
			like.shape = newShape(chatLine.append(nil, v[:]))
		}
	}
	if !done || !all(v[chatModel], v[chatCreated], m[msgRole]) {
		return nil, false
	}
	m[msgContent], m[msgThinking] = g.content.textOrEmpty(), g.thinking.text()
	m[msgCalls] = g.calls.array()
	v[chatLogprobs] = g.logprobs.array()
	v[chatMessage] = chatMsg.append(nil, m[:])
	return chatLine.append(make([]byte, 0, sizeOf(v[:])+256), v[:]), true
}

// wholeGenerate does what GenerateHandler does, which knows no calls but those of the last part.
func wholeGenerate(stream []byte) ([]byte, bool) {
	var g gathered
	var v [genMembers][]byte
	var like likeness
	done := false
	for line := range split(stream, lineEnd) {
		line = bytes.TrimSuffix(line, lineEnd)
		if matched, ok := like.add(line, &g); matched && !done {
			if !ok {
				return nil, false
			}
			continue
		}
		v = [genMembers][]byte{}
		if done || !genLine.read(line, v[:]) {
			return nil, false
		}
		var ok bool
		if done, ok = isDone(v[genDone], v[genReason]); !ok || v[genCalls] != nil && !done {
			return nil, false
		}
		if !g.add(v[genResponse], v[genThinking], nil, v[genLogprobs]) {
			return nil, false
		}
		if !done && v[genLogprobs] == nil {
			like.thinking = v[genThinking] != nil && isEmptyText(v[genResponse])
			if like.thinking {
				v[genThinking] = hole
			} else {
				v[genResponse] = hole
			}
			v[genCreated] = hole
			like.shape = newShape(genLine.append(nil, v[:]))
		}
	}
	if !done || !all(v[genModel], v[genCreated]) {
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
	if !ok || !done || !all(v[chatModel], v[chatCreated], m[msgRole]) || !areParts(m[:], v[chatLogprobs]) {
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
