package savings

import (
	"bytes"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// Dialect says how an answer is written.
type Dialect uint8

const (
	Native    Dialect = iota // /api/chat and /api/generate
	OpenAI                   // /v1/chat/completions and /v1/completions
	Responses                // /v1/responses
	Anthropic                // /v1/messages
)

// marks has what the data of the one event that tells the counts contains, spelled as every JSON encoder spells it. Within
// a string its quotes would be escaped; an event that has it as another key or as a whole string is read, and tells nothing.
var marks = [...][]byte{
	Native:    []byte(`"done"`), // never as events
	OpenAI:    []byte(`"usage"`),
	Responses: []byte(`"response.completed"`),
	Anthropic: []byte(`"message_delta"`), // not message_start, in which Ollama only guesses the prompt's tokens
}

// Answer is what the end of an answer tells. The zero Answer tells nothing: the answer broke off or failed, or the
// client did not ask for counts (OpenAI streams have them only with stream_options.include_usage).
type Answer struct {
	Done bool // the end came, and it told Total or Generated

	Total       int  // tokens of the prompt, reused ones included; 0 if unknown
	Cached      int  // tokens of the prompt that were reused, as the server counts them
	CachedKnown bool // false: the server does not tell (Ollama before 0.34), and Cached is 0
	Generated   int  // tokens of the answer; 0 if unknown

	// Of the native dialect only.

	// Zero if unknown. Load is the time until the model was ready, in Ollama's queue and loading; TotalTime holds the other
	// three and the wait for a slot.
	TotalTime, Load, PromptEval, Eval time.Duration
	// DoneReason is "stop", "length", …, and "load" or "unload" for a request without a prompt, which has no counts: Done
	// is false then.
	DoneReason string
}

const (
	// maxLine is how many bytes of one line, or of a JSON body, are kept to be read. It bounds a Reader's memory to
	// about 10 MiB: two of them, and what append reserves. What is longer is given up and its counts are unknown. (128k
	// tokens make about 0.5 MB of text and 0.8 MB of context; only the log probabilities of a long answer that is not
	// streamed make more than this.)
	maxLine = 4 << 20
	// maxPooled is the largest buffer, in bytes, that is kept for the next Reader: one that long answers still fit in.
	maxPooled = 2 << 20
)

type framing uint8

const (
	whole  framing = iota // one JSON object
	lines                 // one JSON object a line; the last tells how the answer ended
	events                // server-sent events, each with one line of data
)

// Reader finds the counts in an answer's body that passes by, without its Content-Encoding. It keeps one line at a time
// and parses one, the last that can tell counts, in Answer. What is not the JSON that it looks for tells nothing.
//
// A Reader is used by one goroutine at a time.
type Reader struct {
	dialect     Dialect
	framing     framing
	tellsCached bool
	limit       int // maxLine; lower in tests

	line []byte // the line that has begun, or the whole body
	over bool   // the line is longer than limit, and given up
	last []byte // the last line that can tell counts
	done bool   // OpenAI's last event came
}

var readers = sync.Pool{New: func() any { return new(Reader) }}

// NewReader returns a Reader of one answer with this Content-Type header. tellsCached says that the server is known to be
// Ollama 0.34 or later: in the dialect Responses the number of reused tokens is always there, and 0 from servers that
// cannot tell, so that without tellsCached 0 is taken for unknown. The other dialects leave the number out if it is unknown.
func NewReader(d Dialect, contentType string, tellsCached bool) *Reader {
	r := readers.Get().(*Reader)
	*r = Reader{dialect: d, tellsCached: tellsCached, limit: maxLine, line: r.line[:0], last: r.last[:0]}
	mediaType, _, _ := strings.Cut(contentType, ";")
	switch mediaType = strings.TrimSpace(mediaType); {
	case strings.EqualFold(mediaType, "text/event-stream"):
		r.framing = events
	case strings.EqualFold(mediaType, "application/x-ndjson"):
		r.framing = lines
	}
	return r
}

// Release makes the Reader's memory available to others. The Reader may not be used any more.
func (r *Reader) Release() {
	if cap(r.line) > maxPooled {
		r.line = nil
	}
	if cap(r.last) > maxPooled {
		r.last = nil
	}
	readers.Put(r)
}

// Write takes in the next bytes of the body. It does not keep p.
func (r *Reader) Write(p []byte) {
	for r.framing != whole {
		n := bytes.IndexByte(p, '\n')
		if n < 0 {
			break
		}
		r.endLine(p[:n])
		p = p[n+1:]
	}
	r.add(p)
}

// add adds to the line that has begun.
func (r *Reader) add(p []byte) {
	if r.over || len(p) > r.limit-len(r.line) {
		r.line, r.over = nil, true
		return
	}
	r.line = append(r.line, p...)
}

// endLine takes in the rest of a line. One that came in one piece is not copied, unless it can tell counts.
func (r *Reader) endLine(rest []byte) {
	if len(r.line) == 0 && !r.over && len(rest) <= r.limit {
		if r.canTell(rest) {
			r.last = append(r.last[:0], rest...)
		}
		return
	}
	r.add(rest)
	if r.over {
		r.last = r.last[:0] // what came before may not be the end
	} else if r.canTell(r.line) {
		r.line, r.last = r.last, r.line
	}
	r.line, r.over = r.line[:0], false
}

// canTell reports whether the line can be the one that tells the counts. The last one that can is the one: in lines of
// JSON it is the last line, whatever it says, so that an error after an answer's end is not overlooked.
func (r *Reader) canTell(line []byte) bool {
	if r.framing != events {
		return len(bytes.TrimSpace(line)) > 0
	}
	text, ok := bytes.CutPrefix(line, dataField)
	if !ok {
		return false // a comment, the event's name, or the blank line at its end
	}
	if r.dialect == OpenAI && string(bytes.TrimSpace(text)) == "[DONE]" {
		r.done = true
		return false
	}
	return bytes.Contains(text, marks[r.dialect][1:]) // with the first quote, the search would stop at each of the others
}

var dataField = []byte("data:")

// Answer returns what the body told, after its last byte was written.
func (r *Reader) Answer() Answer {
	r.endLine(nil) // the last line need not have an end
	var a Answer
	switch text := r.last; {
	case r.framing != events && r.dialect == Native:
		a = native(text)
	case r.framing != events:
		a = readUsage(member(text, "usage"))
	default:
		a = r.event(bytes.TrimPrefix(text, dataField))
	}
	if r.dialect == Anthropic && a.CachedKnown {
		a.Total += a.Cached // its input_tokens are those that were not reused
	}
	if r.dialect == Responses && a.Cached == 0 {
		a.CachedKnown = a.CachedKnown && r.tellsCached
	}
	if a.Cached > a.Total {
		a.Cached, a.CachedKnown = 0, false // a contradiction
	}
	if a.Total == 0 && a.Generated == 0 {
		return Answer{DoneReason: a.DoneReason} // /v1/completions tells zeros in every event but the last
	}
	a.Done = true
	return a
}

// event reads an event's data.
func (r *Reader) event(text []byte) Answer {
	switch r.dialect {
	case OpenAI:
		if r.done { // other servers tell the usage so far in every event
			return readUsage(member(text, "usage"))
		}
	case Responses:
		if bytes.Equal(member(text, "type"), marks[Responses]) {
			return readUsage(member(member(text, "response"), "usage"))
		}
	case Anthropic:
		if bytes.Equal(member(text, "type"), marks[Anthropic]) {
			return readUsage(member(text, "usage"))
		}
	}
	return Answer{}
}

// native reads the last line of an answer.
func native(text []byte) Answer {
	var a Answer
	done := false
	ok := members(text, func(name, value []byte) {
		switch string(name) {
		case "done":
			done = string(value) == "true"
		case "done_reason":
			a.DoneReason, _ = jsonscan.Unquote(value)
		case "prompt_eval_count":
			a.Total, _ = count(value)
		case "prompt_eval_cached_count":
			a.Cached, a.CachedKnown = count(value)
		case "eval_count":
			a.Generated, _ = count(value)
		case "total_duration":
			a.TotalTime = duration(value)
		case "load_duration":
			a.Load = duration(value)
		case "prompt_eval_duration":
			a.PromptEval = duration(value)
		case "eval_duration":
			a.Eval = duration(value)
		}
	})
	if !ok || !done {
		return Answer{}
	}
	return a
}

// readUsage reads the usage of any dialect; Total is the one number that it has for the prompt.
func readUsage(text []byte) Answer {
	var a Answer
	ok := members(text, func(name, value []byte) {
		switch string(name) {
		case "prompt_tokens", "input_tokens":
			a.Total, _ = count(value)
		case "completion_tokens", "output_tokens":
			a.Generated, _ = count(value)
		case "prompt_tokens_details", "input_tokens_details":
			a.Cached, a.CachedKnown = count(member(value, "cached_tokens"))
		case "cache_read_input_tokens":
			a.Cached, a.CachedKnown = count(value)
		}
	})
	if !ok {
		return Answer{}
	}
	return a
}

// member returns the raw value of an object's member; nil if there is none, or if the text is not an object.
func member(text []byte, name string) []byte {
	var found []byte
	if !members(text, func(n, value []byte) {
		if string(n) == name {
			found = value
		}
	}) {
		return nil
	}
	return found
}

// members calls f with the name and the raw value of each of the object's members. Only if it returns true is the text an
// object and nothing else, and do they mean anything.
func members(text []byte, f func(name, value []byte)) bool {
	o := jsonscan.NewObject(text)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		f(text[m.Key+1:m.KeyEnd-1], text[m.Value:m.ValueEnd])
	}
	return o.Err() == nil && len(bytes.TrimSpace(text[o.End():])) == 0
}

// count reads a number of tokens; false if it is none. It is below 1<<30, so that the sum of two is an int.
func count(value []byte) (int, bool) {
	n, err := strconv.ParseInt(string(value), 10, 31)
	if err != nil || n < 0 {
		return 0, false
	}
	return int(n), true
}

// duration reads nanoseconds; 0 if they are none.
func duration(value []byte) time.Duration {
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(max(n, 0))
}
