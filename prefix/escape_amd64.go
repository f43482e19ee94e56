package prefix

// scanEscapes returns the offset of the first backslash before a u or a slash among the n bytes at
// p. It looks at 16 bytes at a time (SSE2, which every amd64 has), so it may instead return an
// offset from which the caller has to check the last few bytes.
//
//go:noescape
func scanEscapes(p *byte, n int) int

// oddEscape returns the offset of the first backslash before a u or a slash, which may be an escape
// in another spelling than the hashed text's; -1 if there is none.
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
