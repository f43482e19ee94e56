package proxy

import (
	"net/http"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// TestTiming: every answer says for how long its request waited, once, whoever gives it; what
// another
// proxy behind this one says of its own queue comes after that.
func TestTiming(t *testing.T) {
	f := newFake(t, func(r received) string {
		head := "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Cacheproxy-Waited: 9\r\n"
		return head + "Server-Timing: queue;dur=9\r\nContent-Length: 2\r\n\r\n{}"
	})
	rg := newRig(t, f.URL, &Handler{
		Guard: withKeys(t, theKey), Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1}),
	})
	for _, tt := range []struct {
		method, path, body, key string
		status                  int
		timings                 int
	}{
		{"POST", "/api/chat", chatWith("s", "x", ""), theKey, 200, 2},
		{"POST", "/v1/embeddings", `{"model":"m"}`, theKey, 200, 2},
		{"POST", "/api/generate", `{"model":"m","keep_alive":0}`, theKey, 200, 2},
		{"GET", "/api/tags", "", theKey, 200, 2},
		{"POST", "/v1/messages", chatWith("s", "x", ""), "wrong", 401, 1},
		{"GET", pathHealth, "", "", 200, 0},
	} {
		res, text := rg.do(tt.method, tt.path, tt.body, bearer(tt.key))
		waited, timing := res.Header.Values(headerWaited), res.Header.Values("Server-Timing")
		if res.StatusCode != tt.status || len(timing) != tt.timings ||
			len(waited) != min(tt.timings, 1) {
			t.Errorf(
				"%s %s: %d %s, %q, %q",
				tt.method,
				tt.path,
				res.StatusCode,
				text,
				waited,
				timing,
			)
			continue
		}
		if tt.timings > 0 && (!strings.HasPrefix(timing[0], "queue;dur=") || timing[0] == "queue;dur=9") {
			t.Errorf("%s %s: %q, %q", tt.method, tt.path, waited, timing)
		}
	}
	if res, _ := rg.do(
		http.MethodPost,
		"/api/chat",
		"{}",
		bearer(theKey),
		headerUpstream+": none",
	); res.StatusCode != 400 ||
		res.Header.Get(headerWaited) != "0.000" {
		t.Errorf("refused by the proxy: %d %v", res.StatusCode, res.Header)
	}
}
