package jsonscan

import "bytes"

// Cursor walks a text that an Object's iteration has found valid, without checking it again:
//
//	c := jsonscan.NewCursor(text, 0)
//	for c.Enter(); c.More(); {
//		switch key := c.Key(); string(key) {
//		case `"messages"`: … another Enter and More, for the elements
//		default: c.Value()
//		}
//	}
//
// Exactly one of Value, or Enter with More until it is false, must follow each More (and Key, in an
// object). On an invalid text what it returns has no meaning, but it ends and stays within the
// text.
type Cursor struct {
	text []byte
	pos  int

	long []byte // a string whose end is known
}

// NewCursor returns a cursor at the value that begins at or after pos.
func NewCursor(text []byte, pos int) Cursor {
	return Cursor{text: text, pos: skipSpace(text, pos)}
}

// Know gives the cursor a long string of its text, from Object.Long, since finding its end again
// would take a while.
func (c *Cursor) Know(long []byte) { c.long = long }

// Pos returns the offset of what comes next: of the value that Value returns, or of the key that Key returns.
func (c *Cursor) Pos() int { return c.pos }

// Kind returns the value's first byte, which reveals its type: one of { [ " t f n - 0…9, or 0 at
// the end of the text.
func (c *Cursor) Kind() byte {
	if c.pos >= len(c.text) {
		return 0
	}
	return c.text[c.pos]
}

// Enter steps into the array or object.
func (c *Cursor) Enter() { c.pos++ }

// More steps to the next element, or the key of the next member. It returns false if there is none;
// then the cursor is past the end of the array or object.
func (c *Cursor) More() bool {
	p := skipSpace(c.text, c.pos)
	if p < len(c.text) && c.text[p] == ',' {
		p = skipSpace(c.text, p+1)
	}
	c.pos = p
	if p >= len(c.text) {
		return false
	}
	if b := c.text[p]; b == ']' || b == '}' {
		c.pos++
		return false
	}
	return true
}

// Key returns the member's raw key, quotes included, and steps to its value.
func (c *Cursor) Key() []byte {
	start := c.pos
	end := min(stringEnd(c.text, start), len(c.text))
	p := skipSpace(c.text, end)
	c.pos = skipSpace(c.text, p+1) // past the colon
	return c.text[min(start, end):end]
}

// Value returns the raw value and steps past it.
func (c *Cursor) Value() []byte {
	start := c.pos
	if start >= len(c.text) {
		return nil
	}
	p := start
	switch c.text[p] {
	case '"':
		if len(c.long) > 0 && &c.text[p] == &c.long[0] {
			p += len(c.long)
		} else {
			p = stringEnd(c.text, p)
		}
	case '{', '[':
		p = compositeEnd(c.text, p)
	default:
		for p++; p < len(c.text); p++ {
			if b := c.text[p]; b == ',' || b == ']' || b == '}' || b <= ' ' {
				break
			}
		}
	}
	c.pos = min(p, len(c.text))
	return c.text[start:c.pos]
}

// stringEnd returns the offset past the string that begins at p.
func stringEnd(b []byte, p int) int {
	if p+1 >= len(b) {
		return len(b)
	}
	if end := skipUnchecked(b, p+1); end >= 0 {
		return end
	}
	return len(b)
}

// compositeEnd returns the offset past the array or object that begins at p.
func compositeEnd(b []byte, p int) int {
	for depth := 0; p < len(b); {
		switch b[p] {
		case '"':
			p = stringEnd(b, p)
			continue
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return p + 1
			}
		}
		p++
	}
	return len(b)
}

// Name returns the key without its quotes if it is written without escapes, otherwise nil.
func Name(raw []byte) []byte {
	if len(raw) < 2 || bytes.IndexByte(raw, '\\') >= 0 {
		return nil
	}
	return raw[1 : len(raw)-1]
}
