package savings

import (
	"bytes"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// Dialect is the format of an answer.
type Dialect uint8

const (
	Native    Dialect = iota // /api/chat and /api/generate
	OpenAI                   // /v1/chat/completions and /v1/completions
	Responses                // /v1/responses
	Anthropic                // /v1/messages
)

// marks identify the event with the counts: its data contains them, spelled as every JSON encoder
// does. Within a string the quotes would be escaped; an event that has the mark as another key, or
// as a whole string, is parsed in vain.
var marks = [...][]byte{
	Native:    []byte(`"done"`), // never in events
	OpenAI:    []byte(`"usage"`),
	Responses: []byte(`"response.completed"`),
	// Not message_start, in which Ollama only guesses the prompt's tokens.
	Anthropic: []byte(`"message_delta"`),
}

// Answer is what the end of an answer reports. It is zero if the answer broke off or failed, or if
// the client did not ask for counts (OpenAI streams have them only with
// stream_options.include_usage).
type Answer struct {
	Done bool // the end came, and it reported Total or Generated

	Total       int  // tokens of the prompt, including reused ones; 0 if unknown
	Cached      int  // reused tokens of the prompt, as the server counts them
	CachedKnown bool // if false, the server does not report it (before Ollama 0.34)
	Generated   int  // tokens of the answer; 0 if unknown

	// The rest is set for the native dialect only.

	// Zero if unknown. Load is the time until the model was ready: Ollama's queue and loading.
	// TotalTime includes the other three and the wait for a slot.
	TotalTime, Load, PromptEval, Eval time.Duration
	// DoneReason is "stop", "length" and so on, or "load" or "unload" for a request without a
	// prompt, which has no counts, so that Done is false.
	DoneReason string
}

const (
	// maxLine is the longest line, or JSON body, in bytes that is parsed; the counts of longer ones
	// are unknown. It bounds a Reader's memory to about 10 MiB: two lines, and what append
	// reserves. (A context of 128k tokens makes about 0.5 MB of text and 0.8 MB of token numbers;
	// only the log probabilities of a long answer that is not streamed are larger.)
	maxLine = 4 << 20
	// maxPooled is the largest buffer, in bytes, that is kept for the next Reader. Long answers fit
	// in it.
	maxPooled = 2 << 20
)

type framing uint8

const (
	whole  framing = iota // one JSON object
	lines                 // one JSON object per line; the last reports how the answer ended
	events                // server-sent events, each with one line of data
)

// Reader finds the counts in the body of an answer as it passes by, with any Content-Encoding
// decoded. It keeps one line at a time and parses only one, in Answer: the last that can have
// counts. It ignores anything else.
//
// A Reader is used by one goroutine at a time.
type Reader struct {
	dialect     Dialect
	framing     framing
	tellsCached bool
	limit       int // maxLine, except in tests

	line []byte // the current line so far, or the whole body
	over bool   // the line is longer than limit, and is skipped
	last []byte // the last line that can have counts
	done bool   // OpenAI's last event came
}

var readers = sync.Pool{New: func() any { return new(Reader) }}

// NewReader returns a Reader of one answer with this Content-Type header. tellsCached means that
// the server is known to be Ollama 0.34 or later. The dialect Responses always has the number of
// reused tokens, and it is 0 from servers that do not know it; so without tellsCached, 0 counts as
// unknown. The other dialects omit an unknown number.
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

// Release makes the Reader's memory available to other Readers. The Reader must not be used
// afterwards.
func (r *Reader) Release() {
	if cap(r.line) > maxPooled {
		r.line = nil
	}
	if cap(r.last) > maxPooled {
		r.last = nil
	}
	readers.Put(r)
}

// Write processes the next bytes of the body. It does not keep p.
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

// add appends to the current line.
func (r *Reader) add(p []byte) {
	if r.over || len(p) > r.limit-len(r.line) {
		r.line, r.over = nil, true
		return
	}
	r.line = append(r.line, p...)
}

// endLine completes a line. A line that came in one piece is copied only if it can have counts.
func (r *Reader) endLine(rest []byte) {
	if len(r.line) == 0 && !r.over && len(rest) <= r.limit {
		if r.canTell(rest) {
			r.last = append(r.last[:0], rest...)
		}
		return
	}
	r.add(rest)
	if r.over {
		r.last = r.last[:0] // the last line before this one may not be the end
	} else if r.canTell(r.line) {
		r.line, r.last = r.last, r.line
	}
	r.line, r.over = r.line[:0], false
}

// canTell reports whether the line can be the one with the counts; the last such line is. In lines
// of JSON that is the last line, whatever it says, so that an error after an answer's end is not
// missed.
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
	// With the first quote, the search would stop at every other quote.
	return bytes.Contains(text, marks[r.dialect][1:])
}

var dataField = []byte("data:")

// Answer returns what the body reported. Call it after the last Write.
func (r *Reader) Answer() Answer {
	r.endLine(nil) // the last line need not end with a newline
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
		// /v1/completions reports zeros in every event but the last.
		return Answer{DoneReason: a.DoneReason}
	}
	a.Done = true
	return a
}

// event parses an event's data.
func (r *Reader) event(text []byte) Answer {
	switch r.dialect {
	case OpenAI:
		if r.done { // other servers report the usage so far in every event
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

// native parses the last line of an answer.
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

// readUsage parses the usage of any dialect; Total is the number that the dialect has for the
// prompt.
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

// member returns the raw value of an object's member; nil if there is none, or if the text is not
// an object.
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

// members calls f with the name and the raw value of each member of the object. Only if it returns
// true was the text an object and nothing else, so that the members are valid.
func members(text []byte, f func(name, value []byte)) bool {
	o := jsonscan.NewObject(text)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		f(text[m.Key+1:m.KeyEnd-1], text[m.Value:m.ValueEnd])
	}
	return o.Err() == nil && len(bytes.TrimSpace(text[o.End():])) == 0
}

// count parses a number of tokens; false if it is not one. It is below 1<<30, so that the sum of
// two fits an int.
func count(value []byte) (int, bool) {
	n, err := strconv.ParseInt(string(value), 10, 31)
	if err != nil || n < 0 {
		return 0, false
	}
	return int(n), true
}

// duration parses nanoseconds; 0 if it cannot.
func duration(value []byte) time.Duration {
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(max(n, 0))
}
