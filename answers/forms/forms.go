// Package forms knows the forms in which Ollama writes an answer: as a stream or whole, in each
// dialect. It tells whether a recorded answer is complete (Complete), turns a stream into the whole
// answer that Ollama would have given (Whole) and back (Stream), and divides a stream into its lines
// or events (Lines). Whatever it cannot tell exactly, it does not tell.
package forms

import (
	"bytes"
	"iter"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// dialect is what answers on a path look like.
type dialect uint8

const (
	unknown     dialect = iota
	chat                // /api/chat
	generate            // /api/generate
	chats               // /v1/chat/completions
	completions         // /v1/completions
	responses           // /v1/responses
	messages            // /v1/messages
)

func dialectOf(path string) dialect {
	switch path {
	case "/api/chat":
		return chat
	case "/api/generate":
		return generate
	case "/v1/chat/completions":
		return chats
	case "/v1/completions":
		return completions
	case "/v1/responses":
		return responses
	case "/v1/messages":
		return messages
	}
	return unknown
}

// The media types of the answers of Ollama.
const (
	typeLines  = "application/x-ndjson"
	typeEvents = "text/event-stream"
	typeNative = "application/json; charset=utf-8"
	typeWhole  = "application/json"
)

// ContentType returns the Content-Type header with which Ollama sends an answer on this path, as a
// stream or whole; empty for a path that has no such answers.
func ContentType(path string, stream bool) string {
	switch d := dialectOf(path); {
	case d == unknown:
		return ""
	case d <= generate && stream:
		return typeLines
	case d <= generate:
		return typeNative
	case stream:
		return typeEvents
	}
	return typeWhole
}

// isType reports whether a Content-Type header has this media type.
func isType(contentType, mediaType string) bool {
	got, _, _ := strings.Cut(contentType, ";")
	return strings.EqualFold(strings.TrimSpace(got), mediaType)
}

// Complete reports whether the body of an answer (status 200, any Content-Encoding decoded) says
// everything: it has its end, and tells of no error. Only such answers are kept. The reason is how
// the generation ended, in the dialect's own words: "stop", "length", "tool_calls", "end_turn",
// "max_tokens", "tool_use", or for /v1/responses, which does not tell, "completed". An answer that
// was cut off at the number of tokens that the client allowed is complete. One that only reports
// that a model was loaded or unloaded is not, and neither is a prompt rendered for debugging.
func Complete(path, contentType string, body []byte) (reason string, ok bool) {
	d := dialectOf(path)
	switch {
	case d == unknown:
		return "", false
	case isType(contentType, typeLines):
		if d > generate {
			return "", false
		}
		reason, ok = linesEnd(body)
	case isType(contentType, typeEvents):
		switch d {
		case chats, completions:
			reason, ok = chunksEnd(body)
		case responses:
			reason, ok = responseEventsEnd(body)
		case messages:
			reason, ok = messageEventsEnd(body)
		}
	default:
		reason, ok = wholeEnd(d, body)
	}
	if !ok || reason == "load" || reason == "unload" {
		return "", false
	}
	return reason, true
}

// wholeEnd returns how the answer, one JSON object, says that it ended.
func wholeEnd(d dialect, body []byte) (string, bool) {
	m, ok := pick(body)
	if !ok || m.err != nil {
		return "", false
	}
	switch d {
	case chat, generate:
		return m.nativeEnd()
	case chats, completions:
		return finish(m.choices)
	case responses:
		return responseEnd(body)
	}
	return stopReason(m.stopReason, m.usage)
}

// linesEnd returns how a native stream ended: only its last line is done.
func linesEnd(body []byte) (reason string, ok bool) {
	for line := range split(body, lineEnd) {
		if ok {
			return "", false // something follows the end
		}
		m, valid := pick(line)
		if !valid || m.err != nil {
			return "", false
		}
		reason, ok = m.nativeEnd()
	}
	return reason, ok
}

// chunksEnd returns how a stream of /v1/chat/completions or /v1/completions ended.
func chunksEnd(body []byte) (string, bool) {
	reason, ended, done := "", false, false
	for unit := range split(body, eventEnd) {
		_, data := eventData(unit)
		if done {
			return "", false
		}
		if string(data) == "[DONE]" {
			done = true
			continue
		}
		m, ok := pick(data)
		if !ok || m.err != nil {
			return "", false
		}
		if r, ok := finish(m.choices); ok {
			if ended {
				return "", false // of two choices, which Ollama never has
			}
			reason, ended = r, true
		}
	}
	return reason, ended && done
}

// responseEventsEnd does the same for /v1/responses.
func responseEventsEnd(body []byte) (reason string, ok bool) {
	for unit := range split(body, eventEnd) {
		name, data := eventData(unit)
		if ok {
			return "", false
		}
		if isFailure(name) || !isObject(data) {
			return "", false
		}
		if string(name) == "response.completed" {
			if reason, ok = responseEnd(member(data, "response")); !ok {
				return "", false
			}
		}
	}
	return reason, ok
}

// isFailure reports whether an event of /v1/responses tells that there is no complete answer.
func isFailure(name []byte) bool {
	switch string(name) {
	case "error", "response.failed", "response.incomplete":
		return true
	}
	return false
}

// responseEnd returns the status of a /v1/responses object. It is always "completed", also for a
// request that only loaded the model, which used no tokens.
func responseEnd(object []byte) (string, bool) {
	m, ok := pick(object)
	if !ok || m.err != nil || string(m.status) != `"completed"` || !someTokens(m.usage) {
		return "", false
	}
	return "completed", true
}

// messageEventsEnd does the same for /v1/messages.
func messageEventsEnd(body []byte) (reason string, ok bool) {
	stopped := false
	for unit := range split(body, eventEnd) {
		name, data := eventData(unit)
		if stopped || !isObject(data) {
			return "", false
		}
		switch string(name) {
		case "error":
			return "", false
		case "message_delta":
			m, _ := pick(member(data, "delta"))
			reason, ok = stopReason(m.stopReason, member(data, "usage"))
		case "message_stop":
			stopped = true
		}
	}
	return reason, ok && stopped
}

// stopReason reads the stop_reason of /v1/messages. Ollama has "stop_sequence" for every reason
// that it does not know, such as that the model was only loaded.
func stopReason(raw, usage []byte) (string, bool) {
	switch string(raw) {
	case `"end_turn"`, `"max_tokens"`, `"tool_use"`:
		return string(raw[1 : len(raw)-1]), someTokens(usage)
	}
	return "", false
}

// someTokens reports whether a usage counts any token.
func someTokens(usage []byte) bool {
	in, out := member(usage, "input_tokens"), member(usage, "output_tokens")
	cached := member(usage, "cache_read_input_tokens")
	return positive(in) || positive(out) || positive(cached)
}

func positive(number []byte) bool {
	return len(number) > 0 && number[0] >= '1' && number[0] <= '9'
}

// finish returns the finish_reason of the only choice.
func finish(choices []byte) (string, bool) {
	c := jsonscan.NewCursor(choices, 0)
	if c.Kind() != '[' {
		return "", false
	}
	c.Enter()
	if !c.More() {
		return "", false
	}
	m, ok := pick(c.Value())
	if !ok || c.More() {
		return "", false
	}
	return word(m.finishReason)
}

// word returns a string that is not empty and is written without escapes.
func word(raw []byte) (string, bool) {
	if len(raw) < 3 || raw[0] != '"' || bytes.IndexByte(raw, '\\') >= 0 {
		return "", false
	}
	return string(raw[1 : len(raw)-1]), true
}

// picked are the raw values of the members by which answers end; nil where there is none.
type picked struct {
	err, done, doneReason, choices, finishReason, status, stopReason, usage []byte
}

// pick reads an object, and nothing but an object.
func pick(text []byte) (picked, bool) {
	var m picked
	o := jsonscan.NewObject(text)
	for f, ok := o.Next(); ok; f, ok = o.Next() {
		value := text[f.Value:f.ValueEnd]
		switch string(text[f.Key+1 : f.KeyEnd-1]) {
		case "error":
			if string(value) != "null" { // as in /v1/responses
				m.err = value
			}
		case "done":
			m.done = value
		case "done_reason":
			m.doneReason = value
		case "choices":
			m.choices = value
		case "finish_reason":
			m.finishReason = value
		case "status":
			m.status = value
		case "stop_reason":
			m.stopReason = value
		case "usage":
			m.usage = value
		}
	}
	return m, o.Err() == nil && len(bytes.TrimSpace(text[o.End():])) == 0
}

// nativeEnd returns the reason of a native answer that is done.
func (m *picked) nativeEnd() (string, bool) {
	if string(m.done) != "true" {
		return "", false
	}
	return word(m.doneReason)
}

// member returns the raw value of an object's member; nil if there is none.
func member(text []byte, name string) []byte {
	var found []byte
	o := jsonscan.NewObject(text)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		if string(text[m.Key+1:m.KeyEnd-1]) == name {
			found = text[m.Value:m.ValueEnd]
		}
	}
	if o.Err() != nil {
		return nil
	}
	return found
}

func isObject(text []byte) bool {
	_, ok := pick(text)
	return ok
}

var (
	lineEnd  = []byte("\n")
	eventEnd = []byte("\n\n")
)

// split yields the parts of a text, each with the separator at its end; only the last may lack it.
func split(text, end []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for len(text) > 0 {
			n := bytes.Index(text, end)
			if n < 0 {
				n = len(text)
			} else {
				n += len(end)
			}
			if !yield(text[:n:n]) {
				return
			}
			text = text[n:]
		}
	}
}

// Lines yields the units in which an answer can be replayed, in order: the lines of a native
// stream, the events of server-sent events, and of any other body the whole. Put together they are
// the body.
func Lines(contentType string, body []byte) iter.Seq[[]byte] {
	switch {
	case isType(contentType, typeLines):
		return split(body, lineEnd)
	case isType(contentType, typeEvents):
		return split(body, eventEnd)
	}
	return func(yield func([]byte) bool) {
		if len(body) > 0 {
			yield(body)
		}
	}
}

// eventData returns the name of an event, if it has one, and its data, which Ollama writes on one
// line.
func eventData(unit []byte) (name, data []byte) {
	if data, ok := chunkData(unit); ok {
		return nil, data
	}
	if name, data, ok := namedEvent(unit); ok {
		return name, data
	}
	for line := range split(unit, lineEnd) {
		line = bytes.TrimRight(line, "\r\n")
		if rest, ok := bytes.CutPrefix(line, []byte("event: ")); ok {
			name = rest
		} else if rest, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
			data = rest
		}
	}
	return name, data
}

// Whole returns the answer that Ollama gives to the same request with "stream": false, byte for
// byte, made from the complete stream that it gave with "stream": true. The time of the answer
// (created_at, created) is the stream's, and the ids are those of the stream as far as it has them.
//
// It returns false if that cannot be told: the stream is not complete, it has members other than
// those of Ollama 0.24 to 0.34, it lacks the counts (under /v1 it has them only if the client asked
// for them), or it is an answer of a remote model.
//
// One thing cannot be seen: thoughts that follow text or calls, which Ollama leaves out of a stream
// of /v1/messages, are missing in the whole answer made from it.
//
// tools says whether the request has tools. Without any, Ollama drops what it nevertheless took for
// a call from an answer in one piece, but not from a stream; Whole returns false then.
func Whole(path string, stream []byte, tools bool) ([]byte, bool) {
	switch dialectOf(path) {
	case chat:
		return wholeChat(stream, tools)
	case generate:
		return wholeGenerate(stream)
	case chats:
		return wholeChats(stream, tools)
	case completions:
		return wholeCompletions(stream)
	case messages:
		return wholeMessages(stream, tools)
	case responses:
		return wholeResponses(stream, tools)
	}
	return nil, false
}

// Stream returns a stream that says the same as an answer in one piece, as Ollama 0.34 would write
// it if the model's thoughts, its text and its tool calls came in one piece each. For
// /v1/chat/completions and /v1/completions, usage says whether the client asked for
// stream_options.include_usage; the other dialects always report it. It returns false where Whole
// would. Whole returns exactly the answer when given the stream (with usage).
func Stream(path string, whole []byte, usage bool) ([]byte, bool) {
	switch dialectOf(path) {
	case chat:
		return streamChat(whole)
	case generate:
		return streamGenerate(whole)
	case chats:
		return streamChats(whole, usage)
	case completions:
		return streamCompletions(whole, usage)
	case messages:
		return streamMessages(whole)
	case responses:
		return streamResponses(whole)
	}
	return nil, false
}
