package savings

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Changed is the place where a prompt differs from an earlier one that it would otherwise continue,
// and the cost of that. A clock, an id or a checksum at the head of a prompt makes the model
// evaluate everything after it again each time.
type Changed struct {
	Place string `json:"place"` // "system prompt", "tools" or "message 3", as prefix.Link counts messages
	// Byte is the offset of the changing text in the place's text, as prefix.Link counts bytes.
	Byte int `json:"byte"`
	// Within is 0 if Byte is exact (except for a character or two that may be equal by chance).
	// Otherwise the change begins within this many bytes from Byte on.
	Within int  `json:"within,omitempty"`
	Kind   Kind `json:"kind"`
	Tokens int  `json:"tokens"` // estimated tokens that would otherwise have been reused
	// Hoisted means that the place is a system message within the conversation which the earlier
	// prompt did not have, and that the template seems to render it at the head of the prompt.
	Hoisted bool `json:"hoisted,omitempty"`
}

// Kind is the apparent kind of text that changes from prompt to prompt.
type Kind string

const (
	KindChecksum Kind = "checksum" // hexadecimal digits, or a number labelled as a checksum
	KindUUID     Kind = "uuid"     // a UUID, or another long random name
	KindClock    Kind = "clock"    // a time of day, or seconds since 1970
	KindDate     Kind = "date"
	KindCounter  Kind = "counter" // a number labelled as a count
	KindNumber   Kind = "number"
	KindText     Kind = "text" // something else
)

// words name the kinds in sentences.
var words = map[Kind]string{
	KindChecksum: "a checksum", KindUUID: "a random id", KindClock: "a clock", KindDate: "a date",
	KindCounter: "a counter", KindNumber: "a number", KindText: "text that differs",
}

// Sentence describes the change: "a checksum at byte 61 of the system prompt, 24,900 tokens a
// turn".
func (c Changed) Sentence() string {
	place := "the " + c.Place
	if c.Place != placeSystem && c.Place != placeTools {
		place = c.Place
	}
	tokens := thousands(c.Tokens) + " tokens a turn"
	switch {
	case c.Hoisted:
		return fmt.Sprintf("%s in %s, a system message that the template puts at the prompt's head, %s", words[c.Kind], place, tokens)
	case c.Place == placeTools:
		return "the tools differ, " + tokens
	case c.Within > 0:
		return fmt.Sprintf("%s at byte %d to %d of %s, %s", words[c.Kind], c.Byte, c.Byte+c.Within-1, place, tokens)
	}
	return fmt.Sprintf("%s at byte %d of %s, %s", words[c.Kind], c.Byte, place, tokens)
}

// thousands formats a nonnegative count with commas between the thousands.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

const (
	placeSystem = "system prompt"
	placeTools  = "tools"
)

// Parting is the place where a prompt differs from an earlier one although much of the rest is
// alike. To find out what changes, the text has to be examined while the request is at hand: see
// Request.Look.
type Parting struct {
	Message  int // as prefix.Link counts them
	From, To int // offsets in the message's text; equal if the difference is not in text

	tools   bool
	hoisted bool // see Changed
	alike   int  // bytes of text that would have been reused
}

const (
	partingsLast  = 16  // earlier prompts to compare with
	partingsLeast = 256 // bytes that must be alike after the place …
	partingsShare = 10  // … and at least this fraction of the prompt
)

// parting returns the request's parting, or nil. It must be called before hold.
func (e *engine) parting(r *Request) *Parting {
	if !r.chain.HasPrompt() || r.wholeOnly() {
		return nil
	}
	var best *Parting
	var where prefix.Shared
	for i, n := len(e.held)-1, 0; i >= 0 && n < partingsLast; i-- {
		h := e.held[i]
		if h.lost {
			continue
		}
		n++
		s := prefix.Common(r.chain.Links, h.chain.Links)
		switch {
		case s.Links == len(h.chain.Links):
			return r.hoisted(h.chain)
		case s.Links == len(r.chain.Links):
			return nil // the prompt is the start of an earlier one
		case s.Links < 2: // a different runner or different settings
			continue
		}
		alike := prefix.Alike(r.chain.Links, h.chain.Links, s)
		// An earlier prompt must be clearly more alike than a later one to replace it.
		if alike >= partingsLeast && alike*partingsShare >= r.bytes && (best == nil || 4*alike > 5*best.alike) {
			best, where = &Parting{Message: s.Message, From: s.Offset, To: s.Offset, tools: s.Part == prefix.Tools, alike: alike}, s
		}
	}
	if best != nil {
		if l, ok := where.Next(r.chain.Links); ok {
			best.To += prefix.BlockPart(l)
		}
	}
	return best
}

// hoisted returns the parting of a prompt that continues another one if a system message was added
// after that. If the template moves that message to the head, everything in between is evaluated
// again.
func (r *Request) hoisted(earlier *prefix.Chain) *Parting {
	if r.chain.Inserted < max(1, earlier.Messages) {
		return nil
	}
	p := &Parting{Message: r.chain.Inserted, To: hoistedLook, hoisted: true, alike: earlier.Bytes() - r.headBytes()}
	if p.alike < partingsLeast || p.alike*partingsShare < r.bytes {
		return nil
	}
	return p
}

// hoistedLook is how many bytes of a system message are examined.
const hoistedLook = 256

// headBytes returns the length of the text of the leading system messages and the tools.
func (r *Request) headBytes() (bytes int) {
	for _, l := range r.chain.Links {
		if int(l.Message) >= r.chain.Leading && l.Part != prefix.Tools {
			break
		}
		bytes = l.Bytes
	}
	return bytes
}

// reusesHead reports whether only the head of the prompt was reused, to within a quarter of it plus
// the template's text.
func (r *Request) reusesHead(total, reused int) bool {
	head := total * r.headBytes() / max(1, r.bytes)
	return abs(reused-head) <= head/4+32
}

// lookAround is how many bytes of text on both sides are needed to recognize a kind.
const lookAround = 64

// Look returns the message, and the range of bytes in it, that show what changes; false if there is
// none.
func (r *Request) Look() (message, from, to int, ok bool) {
	if r == nil || r.parting == nil {
		return 0, 0, 0, false
	}
	p := r.parting
	return p.Message, max(0, p.From-lookAround), p.To + lookAround, true
}

// Looked processes the text that Look asked for, and keeps none of it.
func (r *Request) Looked(x prefix.Excerpt) {
	p := r.parting
	c := Changed{Place: fmt.Sprintf("message %d", p.Message), Byte: p.From, Kind: KindText}
	switch {
	case p.tools:
		c.Place, c.Byte = placeTools, 0
	case x.System && p.Message == 0:
		c.Place = placeSystem
	}
	if p.hoisted {
		c.Hoisted = true
		c.Kind, c.Byte = KindOf(x.Text, 0, len(x.Text))
	} else if p.To > p.From {
		var n int
		c.Kind, n = KindOf(x.Text, p.From-x.Offset, p.To-x.Offset)
		c.Byte = x.Offset + n
		// Numbers are too common for an exact place.
		if c.Kind == KindText || c.Kind == KindNumber || p.To-p.From > exactPart {
			c.Byte, c.Within = p.From, p.To-p.From
		}
	}
	r.changed = &c
}

// exactPart is the length of a sixteenth of a block in the first 16 KiB of a message. Within so few
// bytes, the change can be distinguished from the text beside it.
const exactPart = 16

// changedBy returns the cost of the change in a prompt of total tokens; nil if there is none.
func (r *Request) changedBy(total int, tokens Tokens) *Changed {
	if r.changed == nil || r.bytes == 0 {
		return nil
	}
	c := *r.changed
	c.Tokens = int(float64(total)*float64(r.parting.alike)/float64(r.bytes) + 0.5)
	if c.Tokens == 0 || 2*tokens.Evaluated < c.Tokens {
		return nil // most of it was reused anyway
	}
	if c.Hoisted && !r.reusesHead(total, tokens.Reused) {
		return nil // there is another reason
	}
	c.Tokens = min(c.Tokens, tokens.Evaluated)
	return &c
}

// tellChanged records the change, and describes it in the detail if nothing else is the reason. c
// may be nil.
func (e *Entry) tellChanged(c *Changed) {
	switch {
	case c == nil, c.Hoisted && e.Basis != Measured: // an estimate counts it as reused
		return
	case e.Reason == ReasonTaken && c.Hoisted, e.Reason == ReasonFirst:
		e.Reason = ReasonDiverged
	case e.Reason != ReasonDiverged && e.Reason != "":
		return // the model was loaded again, or the slot was taken
	}
	e.Changed, e.Detail = c, c.Sentence()
}

// pattern recognizes a kind. If the expression has a group, the group is what changes.
type pattern struct {
	kind Kind
	*regexp.Regexp
}

const month = `(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t(?:ember)?)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)`

// patterns are tried in this order, so that of several matches the one that is most likely to
// change each time wins.
var patterns = []pattern{
	{KindUUID, regexp.MustCompile(`(?i)\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b`)},
	{KindChecksum, regexp.MustCompile(`(?i)\b(?:cch|sha-?\d*|hash|checksum|digest|etag|md5|crc(?:32)?|sig(?:nature)?|fingerprint)["']?\s?[=:]\s?["']?([0-9a-f]{3,128})\b`)},
	{KindChecksum, regexp.MustCompile(`\b(?:[0-9a-f]{7,128}|[0-9A-F]{7,128})\b`)},
	{KindUUID, regexp.MustCompile(`\b[A-Za-z0-9_]{16,}\b`)},
	{KindClock, regexp.MustCompile(`(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?(?:\s?[AaPp][Mm]\b)?`)},
	{KindClock, regexp.MustCompile(`\b1[5-9]\d{8}(?:\d{3}|\d{6})?(?:\.\d+)?\b`)},
	{KindDate, regexp.MustCompile(`\b(?:19|20)\d\d[-/.](?:0[1-9]|1[0-2])[-/.](?:0[1-9]|[12]\d|3[01])(?:T|\b)`)},
	{KindDate, regexp.MustCompile(`\b\d{1,2}[/.]\d{1,2}[/.](?:19|20)?\d\d\b`)},
	{KindDate, regexp.MustCompile(`\b` + month + `\.? \d{1,2}(?:st|nd|rd|th)?\b(?:,? (?:19|20)\d\d\b)?`)},
	{KindDate, regexp.MustCompile(`\b\d{1,2}(?:st|nd|rd|th|\.)? ` + month + `\b(?:,? (?:19|20)\d\d\b)?`)},
	{KindDate, regexp.MustCompile(`\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b`)},
	{KindCounter, regexp.MustCompile(`(?i)\b(?:turn|step|count|counter|request|iteration|message|attempt|round|seq(?:uence)?|index|nr|no|tokens? (?:left|used|remaining))\.?\s*(?:number|no\.?|nr\.?)?\s*[#:=]?\s*(\d+)\b`)},
	{KindCounter, regexp.MustCompile(`#(\d+)\b`)},
	{KindCounter, regexp.MustCompile(`(?i)\b(\d[\d,]*) (?:tokens?|messages?|turns?|steps?|requests?|iterations?) (?:left|remaining|used|so far)\b`)},
	{KindNumber, regexp.MustCompile(`\d+(?:[.,]\d+)*`)},
}

// KindOf returns the kind of the text that changes somewhere between two offsets, judged by its
// surroundings, and the offset where it begins (from itself for KindText). The text is as in JSON.
func KindOf(text []byte, from, to int) (Kind, int) {
	from, to = min(max(from, 0), len(text)), min(max(to, 0), len(text))
	text = unescaped(text)
	for _, p := range patterns {
		for _, at := range p.FindAllSubmatchIndex(text, -1) {
			start, end := at[len(at)-2], at[len(at)-1] // of the group, if there is one
			if start < to && end > from && p.is(text, start, end) {
				return p.kind, start
			}
		}
	}
	return KindText, from
}

// unescaped returns a JSON string's text with spaces instead of its escapes, at the same length.
func unescaped(text []byte) []byte {
	text = append([]byte(nil), text...)
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			continue
		}
		n := 2
		if i+1 < len(text) && text[i+1] == 'u' {
			n = 6
		}
		for ; n > 0 && i < len(text); n, i = n-1, i+1 {
			text[i] = ' '
		}
		i--
	}
	return text
}

// is checks conditions that a regular expression cannot.
func (p pattern) is(text []byte, start, end int) bool {
	if p.NumSubexp() > 0 {
		return true // the text before it names its kind
	}
	switch found := text[start:end]; p.kind {
	case KindChecksum:
		return amount(found, digits) > 0 && amount(found, letters) > 0
	case KindUUID:
		n := amount(found, digits)
		mixed := amount(found, lower) > 0 && amount(found, upper) > 0
		return len(found) == 36 || n >= 3 && amount(found, letters) >= 3 && (mixed || n >= 6)
	case KindClock:
		return isClock(text, start, end)
	}
	return true
}

// isClock reports whether the text around an apparent time of day allows one.
func isClock(text []byte, start, end int) bool {
	before, after := text[:start], text[end:]
	if len(after) > 0 && (after[0] == ':' || strings.IndexByte(digits, after[0]) >= 0) {
		return false
	}
	if len(before) > 1 && before[len(before)-1] == 'T' { // after a date
		return strings.IndexByte(digits, before[len(before)-2]) >= 0
	}
	return len(before) == 0 || strings.IndexByte(letters+digits+"_:./-", before[len(before)-1]) < 0
}

const (
	digits  = "0123456789"
	lower   = "abcdefghijklmnopqrstuvwxyz"
	upper   = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	letters = lower + upper
)

// amount returns how many bytes of text are in among.
func amount(text []byte, among string) (n int) {
	for _, c := range text {
		if strings.IndexByte(among, c) >= 0 {
			n++
		}
	}
	return n
}
