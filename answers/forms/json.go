package forms

import (
	"bytes"
	"encoding/json"
	"unicode/utf8"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// layout is an object that Ollama writes: the names of its members, in its order. Each may be
// absent.
type layout []string

// checkedLen is how long a string can be that jsonscan checks to its end.
const checkedLen = 64 << 10

// read finds the raw values of an object's members: v[i] is that of l[i], or nil. It returns false
// if the text is anything else than such an object as json.Marshal writes it: if there is another
// member, another order, or white space.
func (l layout) read(text []byte, v [][]byte) bool {
	if len(text) == 0 || text[0] != '{' || bytes.IndexByte(text, '\n') >= 0 {
		return false
	}
	next, end := 0, 0 // end: of what was read
	o := jsonscan.NewObject(text)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		// A comma or the opening brace is all that may come before a key, and a colon after it.
		if m.Key != end+1 || m.Value != m.KeyEnd+1 {
			return false
		}
		name := text[m.Key+1 : m.KeyEnd-1]
		for next < len(l) && l[next] != string(name) {
			next++
		}
		if next == len(l) {
			return false
		}
		value := text[m.Value:m.ValueEnd:m.ValueEnd]
		if len(value) > checkedLen && !json.Valid(value) {
			return false
		}
		v[next] = value
		next++
		end = m.ValueEnd
	}
	if o.Err() != nil || o.End() != len(text) {
		return false
	}
	return end+1 == len(text) || len(text) == 2
}

// append writes an object with those members that are not nil.
func (l layout) append(b []byte, v [][]byte) []byte {
	b = append(b, '{')
	first := true
	for i, value := range v[:len(l)] {
		if value == nil {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(b, '"')
		b = append(b, l[i]...)
		b = append(b, '"', ':')
		b = append(b, value...)
	}
	return append(b, '}')
}

// shape is a part of a stream in which only some strings are new; it is the text around them. Most
// parts have the shape of the one before, and need not be parsed.
type shape [][]byte

// hole takes the place of a string that varies. No JSON text contains it.
var hole = []byte{0}

func newShape(text []byte) shape { return bytes.Split(text, hole) }

// match finds the raw strings of a text of this shape.
func (s shape) match(text []byte, v [][]byte) bool {
	if len(s) != len(v)+1 {
		return false // there is none yet
	}
	for i := range v {
		if !bytes.HasPrefix(text, s[i]) {
			return false
		}
		text = text[len(s[i]):]
		n := stringEnd(text)
		if n < 0 {
			return false
		}
		v[i], text = text[:n:n], text[n:]
	}
	return bytes.Equal(text, s[len(v)])
}

// stringEnd returns the length of the valid raw string at the head of a text, or -1.
func stringEnd(text []byte) int {
	if len(text) == 0 || text[0] != '"' {
		return -1
	}
	for i := 1; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			return i + 1
		case c < ' ':
			return -1
		case c == '\\':
			n := escape(text[i+1:])
			if n == 0 {
				return -1
			}
			i += n
		}
	}
	return -1
}

// escape returns the length of the escape whose backslash is before the text, without that; 0 if it
// is none.
func escape(text []byte) int {
	if len(text) == 0 {
		return 0
	}
	switch text[0] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 1
	case 'u':
		if len(text) < 5 {
			return 0
		}
		for _, c := range text[1:5] {
			if c |= 0x20; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
				return 0
			}
		}
		return 5
	}
	return 0
}

// all reports whether none of the values is nil.
func all(v ...[]byte) bool {
	for _, value := range v {
		if value == nil {
			return false
		}
	}
	return true
}

// isText reports whether a raw value is a string.
func isText(raw []byte) bool { return len(raw) >= 2 && raw[0] == '"' }

// isEmptyText reports whether a raw value is the empty string.
func isEmptyText(raw []byte) bool { return string(raw) == `""` }

// joined is a string put together from raw strings.
type joined struct {
	b []byte // with the opening quote, without the closing one
}

// add appends a raw string. It returns false if it is not one, or if the two might not be spelled
// like this in one: if a character was broken in two, each half became U+FFFD.
func (j *joined) add(raw []byte) bool {
	if !isText(raw) {
		return false
	}
	inner := raw[1 : len(raw)-1]
	if len(inner) == 0 {
		return true
	}
	if len(j.b) == 0 {
		j.b = append(j.b, raw[:len(raw)-1]...)
		return true
	}
	if isBroken(j.b[max(len(j.b)-6, 1):], inner[:min(len(inner), 6)]) {
		return false
	}
	j.b = append(j.b, inner...)
	return true
}

// isBroken reports whether what ends a string or begins the next may be a part of a character.
func isBroken(end, begin []byte) bool {
	return bytes.HasSuffix(end, replacement) || bytes.HasPrefix(begin, replacement) ||
		len(end) == 6 && isSurrogate(end) || len(begin) == 6 && isSurrogate(begin) ||
		!utf8.RuneStart(begin[0])
}

var replacement = []byte("\uFFFD")

// isSurrogate reports whether an escape is U+FFFD or one half of a character.
func isSurrogate(s []byte) bool {
	return s[0] == '\\' && s[1] == 'u' && (s[2]|0x20 == 'd' || s[2]|0x20 == 'f')
}

// text returns the raw string; nil if it is empty.
func (j *joined) text() []byte {
	if len(j.b) == 0 {
		return nil
	}
	return append(j.b, '"')
}

// textOrEmpty returns the raw string, which may be empty.
func (j *joined) textOrEmpty() []byte {
	if t := j.text(); t != nil {
		return t
	}
	return emptyText
}

// list is an array put together from raw arrays.
type list struct {
	b []byte // without the closing bracket
}

// add appends a raw array's elements; nil has none. It returns false if it is neither.
func (l *list) add(raw []byte) bool {
	if raw == nil {
		return true
	}
	if len(raw) < 3 || raw[0] != '[' || raw[1] <= ' ' {
		return false // Ollama omits empty ones
	}
	if len(l.b) == 0 {
		l.b = append(l.b, '[')
	} else {
		l.b = append(l.b, ',')
	}
	l.b = append(l.b, raw[1:len(raw)-1]...)
	return true
}

// array returns the raw array; nil if it is empty.
func (l *list) array() []byte {
	if len(l.b) == 0 {
		return nil
	}
	return append(l.b, ']')
}

var (
	emptyText  = []byte(`""`)
	emptyList  = []byte(`[]`)
	falseValue = []byte(`false`)
	nullValue  = []byte(`null`)
	zero       = []byte(`0`)
)
