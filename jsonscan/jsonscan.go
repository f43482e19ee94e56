// Package jsonscan walks JSON text in place: it finds the members of an object and where their
// values begin and end, without allocating.
//
// It accepts exactly what encoding/json's Decoder accepts as its first value (the fuzz tests
// compare the two), so it finds what an Ollama server will find. There is one exception, for speed:
// of a string longer than 64 KiB only the first part is checked for control characters and unknown
// escapes. Text after the first value is ignored, as the Decoder ignores it. Except for strings
// (Unquote), it does not decode values into Go types.
package jsonscan

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
)

// ErrSyntax means that encoding/json would not accept the text.
var ErrSyntax = errors.New("invalid JSON")

// ErrNotObject means that the first value is not an object.
var ErrNotObject = errors.New("not a JSON object")

// maxDepth is encoding/json's limit on nested arrays and objects.
const maxDepth = 10000

// Member is one key and value of an object, as offsets into the text.
type Member struct {
	Key      int // the key's opening quote
	KeyEnd   int // just past the key's closing quote
	Value    int // the value's first byte
	ValueEnd int // just past the value's last byte
}

// Object iterates over the members of the object at the head of a text:
//
//	o := jsonscan.NewObject(text)
//	for m, ok := o.Next(); ok; m, ok = o.Next() { … }
//	if err := o.Err(); err != nil { … }
//
// The whole object is valid only if Next has returned false and Err returns nil.
type Object struct {
	scanner
	pos  int
	open int
	err  error
	n    int
	done bool
}

// NewObject starts at the first value of text. If that is not an object, Err says so.
func NewObject(text []byte) Object {
	o := Object{scanner: scanner{text: text}}
	o.pos = skipSpace(text, 0)
	if o.pos >= len(text) {
		o.err = ErrSyntax
		return o
	}
	if text[o.pos] != '{' {
		o.err = ErrNotObject
		return o
	}
	o.pos++
	o.open = o.pos
	return o
}

// Open returns the offset just past the opening brace.
func (o *Object) Open() int { return o.open }

// End returns the offset just past the closing brace, once Next has returned false without an
// error.
func (o *Object) End() int { return o.pos }

// Len returns how many members Next has returned.
func (o *Object) Len() int { return o.n }

// Err returns ErrSyntax, ErrNotObject or nil.
func (o *Object) Err() error { return o.err }

// Next returns the next member, or false at the object's end or at an error.
func (o *Object) Next() (Member, bool) {
	if o.err != nil || o.done {
		return Member{}, false
	}
	b := o.text
	p := skipSpace(b, o.pos)
	if p >= len(b) {
		return o.fail()
	}
	switch {
	case b[p] == '}':
		o.pos = p + 1
		o.done = true
		return Member{}, false
	case o.n > 0:
		if b[p] != ',' {
			return o.fail()
		}
		p = skipSpace(b, p+1)
	}
	m, p := o.member(p, 1)
	if p < 0 {
		return o.fail()
	}
	o.pos = p
	o.n++
	return m, true
}

func (o *Object) fail() (Member, bool) {
	o.err = ErrSyntax
	return Member{}, false
}

// KeyIs reports whether encoding/json would store the member with this raw key (quotes included) in
// a field called name: it folds case, by Unicode's simple folding, and reads escapes.
func KeyIs(raw, name []byte) bool {
	if len(raw) < 2 {
		return false // the text is invalid
	}
	inner := raw[1 : len(raw)-1]
	if bytes.IndexByte(inner, '\\') < 0 {
		return bytes.EqualFold(inner, name)
	}
	s, ok := Unquote(raw)
	return ok && bytes.EqualFold([]byte(s), name)
}

// Unquote decodes a raw string (quotes included) as encoding/json does. It returns false if it is
// not a string.
func Unquote(raw []byte) (string, bool) {
	if len(raw) < 2 || raw[0] != '"' {
		return "", false
	}
	if plainASCII(raw[1 : len(raw)-1]) {
		return string(raw[1 : len(raw)-1]), true
	}
	var s string
	err := json.Unmarshal(raw, &s)
	return s, err == nil
}

// plainASCII reports whether s needs no decoding.
func plainASCII(s []byte) bool {
	for _, c := range s {
		if c >= 0x80 || c == '\\' {
			return false
		}
	}
	return true
}

// Long returns the last string longer than 64 KiB that was read, for Cursor.Know, or nil if there
// was none.
func (o *Object) Long() []byte { return o.long }

// scanner reads a text. Its methods, and the functions below, return the offset just past what they
// read, or -1.
type scanner struct {
	text []byte
	long []byte // the last long string
}

func skipSpace(b []byte, p int) int {
	for p < len(b) && (b[p] == ' ' || b[p] == '\n' || b[p] == '\r' || b[p] == '\t') {
		p++
	}
	return p
}

func (s *scanner) member(p, depth int) (Member, int) {
	b := s.text
	if p >= len(b) || b[p] != '"' {
		return Member{}, -1
	}
	m := Member{Key: p}
	p = s.skipString(p)
	if p < 0 {
		return m, -1
	}
	m.KeyEnd = p
	p = skipSpace(b, p)
	if p >= len(b) || b[p] != ':' {
		return m, -1
	}
	m.Value = skipSpace(b, p+1)
	p = s.skipValue(m.Value, depth)
	m.ValueEnd = p
	return m, p
}

// skipValue reads the value at p, which lies within depth arrays and objects.
func (s *scanner) skipValue(p, depth int) int {
	b := s.text
	if p >= len(b) {
		return -1
	}
	switch c := b[p]; {
	case c == '"':
		return s.skipString(p)
	case c == '{':
		return s.skipComposite(p, depth+1, '}')
	case c == '[':
		return s.skipComposite(p, depth+1, ']')
	case c == 't':
		return skipLiteral(b, p, "true")
	case c == 'f':
		return skipLiteral(b, p, "false")
	case c == 'n':
		return skipLiteral(b, p, "null")
	case c == '-' || '0' <= c && c <= '9':
		return skipNumber(b, p)
	}
	return -1
}

// skipComposite reads the object or array that opens at p and ends with end.
func (s *scanner) skipComposite(p, depth int, end byte) int {
	b := s.text
	if depth > maxDepth {
		return -1
	}
	p = skipSpace(b, p+1)
	if p < len(b) && b[p] == end {
		return p + 1
	}
	for {
		if end == '}' {
			_, p = s.member(p, depth)
		} else {
			p = s.skipValue(p, depth)
		}
		if p < 0 {
			return -1
		}
		p = skipSpace(b, p)
		if p >= len(b) {
			return -1
		}
		if b[p] == end {
			return p + 1
		}
		if b[p] != ',' {
			return -1
		}
		p = skipSpace(b, p+1)
	}
}

func skipLiteral(b []byte, p int, lit string) int {
	if len(b)-p < len(lit) || string(b[p:p+len(lit)]) != lit {
		return -1
	}
	return p + len(lit)
}

func skipNumber(b []byte, p int) int {
	if b[p] == '-' {
		p++
	}
	switch {
	case p >= len(b):
		return -1
	case b[p] == '0':
		p++
	default:
		if p = skipDigits(b, p); p < 0 {
			return -1
		}
	}
	if p < len(b) && b[p] == '.' {
		if p = skipDigits(b, p+1); p < 0 {
			return -1
		}
	}
	if p < len(b) && (b[p] == 'e' || b[p] == 'E') {
		p++
		if p < len(b) && (b[p] == '+' || b[p] == '-') {
			p++
		}
		return skipDigits(b, p)
	}
	return p
}

// skipDigits reads one digit or more.
func skipDigits(b []byte, p int) int {
	start := p
	for p < len(b) && '0' <= b[p] && b[p] <= '9' {
		p++
	}
	if p == start {
		return -1
	}
	return p
}

const (
	// window is how many bytes of a string are searched at a time: few enough to stay in the
	// processor's first cache while they are searched for a quote, for backslashes and for control
	// characters.
	window = 8 << 10
	// checked is how many bytes of a string are checked. Finding each escape in a megabyte of text
	// takes five times as long as finding its end.
	checked = 64 << 10
)

// skipString reads the string whose opening quote is at p. Quotes and backslashes are found by
// bytes.IndexByte, which uses the processor's vector instructions; control characters a word at a
// time.
func (s *scanner) skipString(p int) int {
	b, opening := s.text, p
	p++
	for limit := p + checked; p < len(b); {
		if p >= limit {
			if p = skipUnchecked(b, p); p >= 0 {
				s.long = b[opening:p]
			}
			return p
		}
		end := min(p+window, len(b))
		n := bytes.IndexByte(b[p:end], '"')
		if n >= 0 {
			end = p + n
		}
		start := p
		for p < end {
			slash := bytes.IndexByte(b[p:end], '\\')
			if slash < 0 {
				p = end
			} else if p = skipEscape(b, p+slash+1); p < 0 {
				return -1
			}
		}
		if hasControl(b[start:min(p, end)]) {
			return -1
		}
		if n >= 0 && p == end { // otherwise the quote was escaped, or is still to come
			return end + 1
		}
	}
	return -1
}

// skipUnchecked finds the end of a string from p on, where no escape is open: the first quote that
// an even number of backslashes precedes.
func skipUnchecked(b []byte, p int) int {
	for start := p; ; {
		n := bytes.IndexByte(b[p:], '"')
		if n < 0 {
			return -1
		}
		quote := p + n
		slashes := 0
		for quote-slashes > start && b[quote-slashes-1] == '\\' {
			slashes++
		}
		if p = quote + 1; slashes%2 == 0 {
			return p
		}
	}
}

const (
	ones  = 0x0101010101010101
	highs = 0x8080808080808080
)

// hasControl reports whether s has a byte below 0x20. (Bit Twiddling Hacks, "Determine if a word
// has a byte less than n": the high bit of a byte is set if it was borrowed for and was not set
// before; the lowest byte marked is right.)
func hasControl(s []byte) bool {
	for ; len(s) >= 32; s = s[32:] {
		x0, x1 := binary.LittleEndian.Uint64(s), binary.LittleEndian.Uint64(s[8:])
		x2, x3 := binary.LittleEndian.Uint64(s[16:]), binary.LittleEndian.Uint64(s[24:])
		if ((x0-ones*0x20)&^x0|(x1-ones*0x20)&^x1|(x2-ones*0x20)&^x2|(x3-ones*0x20)&^x3)&highs != 0 {
			return true
		}
	}
	for _, c := range s {
		if c < 0x20 {
			return true
		}
	}
	return false
}

// skipEscape reads what follows a backslash.
func skipEscape(b []byte, p int) int {
	if p >= len(b) {
		return -1
	}
	switch b[p] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return p + 1
	case 'u':
		if len(b)-p < 5 {
			return -1
		}
		for _, c := range b[p+1 : p+5] {
			if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F') {
				return -1
			}
		}
		return p + 5
	}
	return -1
}
