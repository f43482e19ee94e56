package proxy

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestChange: each setting that may change while requests are served applies to the next request,
// and no other setting is lost.
func TestChange(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		h.Guard = withKeys(t, theKey)
		get := func(headers ...string) int { return get(ask, "/api/tags", append(headers, bearer(theKey))...).Code }
		waits := func() string { // the answer to a stream that has waited for a second
			first := ask("/api/chat", chatWith("system", "one", ""), bearer(theKey))
			synctest.Wait()
			second := ask("/v1/chat/completions", chatWith("system", "two", `,"stream":true`), bearer(theKey))
			<-first.ended
			<-second.ended
			return second.Body.String()
		}
		if got := waits(); strings.Contains(got, ": waiting") {
			t.Errorf("a heartbeat that nobody asked for: %q", got)
		}
		if got := get("Origin: https://chat.example"); got != http.StatusForbidden {
			t.Errorf("an origin that is not let in: %d", got)
		}
		l := h.Live()
		l.Heartbeat, l.AllowOrigins, l.ShowPrompts = 300*time.Millisecond, []string{"https://chat.example"}, true
		l.KeepAlive = keep(t, IfAbsent, "9h")
		h.Change(l)
		if got := waits(); !strings.Contains(got, ": waiting") {
			t.Errorf("no heartbeat: %q", got)
		}
		if got := get("Origin: https://chat.example"); got != http.StatusOK {
			t.Errorf("an origin that is let in now: %d", got)
		}
		if got := h.backends()[0].residency.keep.String(); got != "9h0m0s" {
			t.Errorf("models are held for %s", got)
		}
		keyless := ask("/api/tags", "")
		if <-keyless.ended; keyless.Code != http.StatusUnauthorized {
			t.Errorf("the keys are lost: %d", keyless.Code)
		}
	})
}
