package proxy

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// TestTiming: every answer reports how long its request waited, once, whoever writes it. What
// another proxy behind this one reports about its own queue comes after that.
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

// TestTimingOfAllWaits: other waits than for a lane count, too: for memory for the body, and the
// pauses before retries at a server whose queue was full.
func TestTimingOfAllWaits(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		quarter := h.memory.most / 3 // all of the part for the beginnings of bodies
		if !h.memory.first.TryAcquire(quarter) {
			t.Fatal("somebody has some of the memory")
		}
		a := ask("/api/chat", chatWith("s", "one", ""))
		time.Sleep(3 * time.Second)
		h.memory.first.Release(quarter)
		<-a.ended
		if got := a.Header().Get(headerWaited); got != "3.000" {
			t.Errorf("it waited for memory for 3 s, and is told %s s", got)
		}
		m.set(func() { m.busy = true })
		a = ask("/api/chat", chatWith("s", "one", ""))
		time.Sleep(10 * time.Second)
		m.set(func() { m.busy = false })
		<-a.ended
		waited, timing := a.Header().Get(headerWaited), a.Header().Get("Server-Timing")
		if waited != "12.750" || timing != "queue;dur=12750.0" { // 0.25, 0.5, 1, 2, 4 and 5 s
			t.Errorf("its server's queue was full, and it is told %s s, %s", waited, timing)
		}
	})
}

// breaksOff refuses uploads before they are complete, with an answer that breaks off.
type breaksOff struct{ http.RoundTripper }

func (b breaksOff) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodPost {
		return b.RoundTripper.RoundTrip(r)
	}
	body := io.MultiReader(strings.NewReader("begun"), iotest.ErrReader(io.ErrUnexpectedEOF))
	return &http.Response{
		StatusCode: 400, Header: http.Header{}, Body: io.NopCloser(body), ContentLength: 100, Request: r,
	}, nil
}

// TestTimingOnce: the proxy's own answer in place of a broken one also has it once.
func TestTimingOnce(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, _ *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		h.forward.Transport = breaksOff{h.forward.Transport}
		a := ask("/api/blobs/sha256:0", "what is uploaded")
		<-a.ended
		if timing := a.Result().Header.Values("Server-Timing"); a.Code != 502 || len(timing) != 1 {
			t.Errorf("%d %s, %q", a.Code, a.Body, timing)
		}
	})
}
