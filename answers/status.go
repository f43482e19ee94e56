package answers

import (
	"net/http"
	"strconv"
	"time"
)

// CacheName is how the proxy calls itself in Cache-Status.
const CacheName = "ollama-cacheproxy"

// Forward is why a request went upstream (RFC 9211, section 2.2).
type Forward string

// The reasons.
const (
	Bypass  Forward = "bypass"   // the cache is not used for this request; Detail says why
	Request Forward = "request"  // the request's own Cache-Control
	URIMiss Forward = "uri-miss" // there is no such answer
	Partial Forward = "partial"  // there is a part of it; Detail says how much
	Stale   Forward = "stale"    // there is one, but it is too old
)

// Status is one cache's part of the header Cache-Status (RFC 9211).
type Status struct {
	Hit       bool          // the answer was a kept one; otherwise Fwd says why it was not
	Fwd       Forward       // if it is no hit
	FwdStatus int           // the upstream's status, if it is another one than the client got; 0: left out
	Stored    bool          // the answer is kept now
	Collapsed bool          // the request waited for another one's answer
	TTL       time.Duration // until the answer is too old, in whole seconds; 0: left out
	Detail    string        // of printable ASCII; "" is left out
}

// String returns the status as it is written in the header.
func (s Status) String() string {
	b := append(make([]byte, 0, 96), CacheName...)
	switch {
	case s.Hit:
		b = append(b, "; hit"...)
	case s.Fwd != "":
		b = append(append(b, "; fwd="...), s.Fwd...)
	}
	if s.FwdStatus != 0 && !s.Hit {
		b = strconv.AppendInt(append(b, "; fwd-status="...), int64(s.FwdStatus), 10)
	}
	if s.TTL != 0 {
		b = strconv.AppendInt(append(b, "; ttl="...), int64(s.TTL/time.Second), 10)
	}
	if s.Stored && !s.Hit {
		b = append(b, "; stored"...)
	}
	if s.Collapsed && !s.Hit {
		b = append(b, "; collapsed"...)
	}
	if s.Detail != "" {
		b = appendString(append(b, "; detail="...), s.Detail)
	}
	return string(b)
}

// Set adds the status to an answer's header, after those of the caches that the answer went through
// before.
func (s Status) Set(h http.Header) { h.Add("Cache-Status", s.String()) }

// appendString writes a string of RFC 9651. Only printable ASCII can be said in one.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ' || c > '~':
			b = append(b, '?')
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		default:
			b = append(b, c)
		}
	}
	return append(b, '"')
}

// SetAge writes how long ago an answer was made, in whole seconds: what its header says already, if
// another cache had kept it when it came, and the time since then.
func SetAge(h http.Header, kept time.Duration) {
	before, _ := seconds(h.Get("Age"))
	h.Set("Age", strconv.FormatInt(int64((before+max(kept, 0))/time.Second), 10))
}
