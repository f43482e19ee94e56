package answers

import (
	"math"
	"net/http"
	"strings"
	"time"
)

// Control is what a request's Cache-Control says (RFC 9111, section 5.2.1). The zero value says
// nothing. Values that are not valid are ignored, and so are directives that are not known.
type Control struct {
	NoStore      bool // the answer must not be kept
	NoCache      bool // the answer must be a new one; it may be kept
	OnlyIfCached bool // without a kept answer, 504 (Gateway Timeout) is to be the answer

	HasMaxAge bool
	MaxAge    time.Duration // if HasMaxAge: the oldest kept answer that will do, in whole seconds
	MinFresh  time.Duration // how long a kept answer must still be good for; 0: not said
	MaxStale  time.Duration // how long it may have been no longer good; 0: not said, Any: any time

	hasMaxStale bool
}

// Any is the MaxStale of a request that takes answers of every age.
const Any = time.Duration(math.MaxInt64)

// ParseControl reads a request's header. If several values are given for one limit, the strictest
// counts. Pragma: no-cache counts if there is no Cache-Control.
func ParseControl(h http.Header) Control {
	lines, name := h["Cache-Control"], "Cache-Control"
	if len(lines) == 0 {
		lines, name = h["Pragma"], "Pragma"
	}
	var c Control
	for _, line := range lines {
		directives(line, func(directive, value string, hasValue bool) {
			directive = strings.ToLower(directive)
			if name == "Cache-Control" || directive == "no-cache" && !hasValue {
				c.set(directive, value, hasValue)
			}
		})
	}
	return c
}

// set takes one directive into account.
func (c *Control) set(directive, value string, hasValue bool) {
	switch directive {
	case "no-store":
		c.NoStore = true
	case "no-cache":
		c.NoCache = true
	case "only-if-cached":
		c.OnlyIfCached = true
	case "max-age":
		if d, ok := seconds(value); ok && (!c.HasMaxAge || d < c.MaxAge) {
			c.HasMaxAge, c.MaxAge = true, d
		}
	case "min-fresh":
		if d, ok := seconds(value); ok {
			c.MinFresh = max(c.MinFresh, d)
		}
	case "max-stale":
		d, ok := seconds(value)
		if !hasValue {
			d, ok = Any, true
		}
		if ok && (!c.hasMaxStale || d < c.MaxStale) {
			c.hasMaxStale, c.MaxStale = true, d
		}
	}
}

// Looks reports whether a kept answer may do at all. With no-store it may not either, although the
// RFC would allow it: who says so wants a new answer.
func (c Control) Looks() bool { return !c.NoCache && !c.NoStore }

// Keeps reports whether the answer may be kept.
func (c Control) Keeps() bool { return !c.NoStore }

// Takes reports whether a kept answer of that age will do, of which life is the age until which it
// is good; 0 means for ever.
func (c Control) Takes(age, life time.Duration) bool {
	switch {
	case !c.Looks(), c.HasMaxAge && age > c.MaxAge:
		return false
	case life == 0:
		return true
	case c.MinFresh > 0 && life-age < c.MinFresh:
		return false
	}
	return age <= life || age-life <= c.MaxStale
}

// seconds parses a number of seconds. The RFC wants those that are too large to be taken for 2^31.
func seconds(s string) (time.Duration, bool) {
	const most = 1 << 31
	n := int64(0)
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = min(n*10+int64(s[i]-'0'), most)
	}
	return time.Duration(n) * time.Second, s != ""
}

// directives calls f for each directive of a line. Of what is no directive it skips everything up
// to the next comma, and of a string without end the rest.
func directives(line string, f func(directive, value string, hasValue bool)) {
	for line != "" {
		line = strings.TrimLeft(line, " \t,")
		n := tokenLen(line)
		directive, rest := line[:n], line[n:]
		value, hasValue, ok := "", false, n > 0
		if ok && strings.HasPrefix(rest, "=") {
			hasValue = true
			value, rest, ok = argument(rest[1:])
		}
		rest = strings.TrimLeft(rest, " \t")
		if ok && (rest == "" || rest[0] == ',') {
			f(directive, value, hasValue)
		}
		line = skip(rest)
	}
}

// argument reads a token or a quoted string.
func argument(s string) (value, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		n := tokenLen(s)
		return s[:n], s[n:], n > 0
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:], true
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}

// skip returns what follows the next comma that is in no string.
func skip(s string) string {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case ',':
			return s[i+1:]
		case '"':
			_, rest, ok := argument(s[i:])
			if !ok {
				return ""
			}
			i = len(s) - len(rest) - 1
		}
	}
	return ""
}

// tokenLen returns the length of the token (RFC 9110, section 5.6.2) that s begins with.
func tokenLen(s string) int {
	for i := range len(s) {
		b := s[i]
		letter := 'a' <= b|0x20 && b|0x20 <= 'z' || '0' <= b && b <= '9'
		if !letter && strings.IndexByte("!#$%&'*+-.^_`|~", b) < 0 {
			return i
		}
	}
	return len(s)
}
