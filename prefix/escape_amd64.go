package prefix

// scanEscapes returns the offset of the first backslash before a u or a slash among the n bytes at p, or one from which on
// the last few bytes are still to be looked at. It looks at 16 bytes at a time (SSE2, which every amd64 has).
//
//go:noescape
func scanEscapes(p *byte, n int) int

// oddEscape returns the offset of the first backslash before a u or a slash, -1 if there is none: of what may be an escape
// that is not spelled as texts are hashed.
func oddEscape(s []byte) int {
	if len(s) == 0 {
		return -1
	}
	for i := scanEscapes(&s[0], len(s)); i+1 < len(s); i++ {
		if s[i] == '\\' && (s[i+1] == 'u' || s[i+1] == '/') {
			return i
		}
	}
	return -1
}
