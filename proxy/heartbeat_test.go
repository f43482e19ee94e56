package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// streamText is what the upstream streams in these tests.
const streamText = "data: {\"choices\":[]}\n\ndata: [DONE]\n\n"

// streaming answers requests under /v1 like an upstream that streams, or with the result of answer.
type streaming struct {
	http.RoundTripper
	answer func(r *http.Request) *http.Response // nil, or returning nil: a stream

	mu   sync.Mutex
	sent []http.Header // of requests under /v1; guarded by mu
}

func (s *streaming) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := s.RoundTripper.RoundTrip(r)
	if err != nil || !strings.HasPrefix(r.URL.Path, "/v1/") || res.StatusCode != http.StatusOK {
		return res, err
	}
	s.mu.Lock()
	s.sent = append(s.sent, r.Header.Clone())
	s.mu.Unlock()
	if s.answer != nil {
		if other := s.answer(r); other != nil {
			other.Request, other.Proto, other.ProtoMajor, other.ProtoMinor = r, "HTTP/1.1", 1, 1
			return other, nil
		}
	}
	res.Header.Set("Content-Type", "text/event-stream")
	res.Body = io.NopCloser(strings.NewReader(streamText))
	return res, nil
}

// streamedChat is a request to /v1 for a stream.
func streamedChat(text string) string {
	return strings.Replace(chatWith("s", text, ""), `"stream":false`, `"stream":true`, 1)
}

// TestHeartbeat: a stream that waits begins with comments, followed by what the upstream streams.
// Requests that wait less, or are not for a stream of events, are answered exactly as without
// heartbeats.
func TestHeartbeat(t *testing.T) {
	inTime(
		t,
		1,
		time.Minute,
		func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
			s := &streaming{RoundTripper: h.Transport}
			h.Transport, h.Heartbeat = s, 2500*time.Millisecond
			bodies := map[string]string{
				"/v1/chat/completions": streamedChat(
					"a",
				),
				"/v1/completions": `{"model":"m","stream":true,"prompt":"b"}`,
				"/v1/responses":   `{"model":"m","stream":true,"input":"c"}`,
				"/v1/messages":    streamedChat("d"),
			}
			for path, body := range bodies {
				var before []*asked
				for i := range 6 { // a second each
					before = append(
						before,
						ask(
							"/v1/chat/completions",
							streamedChat(fmt.Sprint(i)),
							headerPriority+": interactive",
						),
					)
					synctest.Wait()
				}
				a := ask(
					path,
					body,
					headerPriority+": batch",
					"Origin: http://localhost:3000",
					"Accept-Encoding: gzip",
				)
				whole := ask(
					path,
					strings.Replace(body, `"stream":true`, `"stream":false`, 1),
					headerPriority+": batch",
				)
				native := ask("/api/chat", streamedChat("e"), headerPriority+": batch")
				time.Sleep(2500*time.Millisecond - 1)
				if text := a.seen(); text != "" {
					t.Errorf("%s: before the time: %q", path, text)
				}
				time.Sleep(time.Nanosecond)
				if text := a.seen(); text != beatText {
					t.Errorf("%s: at the time: %q", path, text)
				}
				time.Sleep(2500 * time.Millisecond)
				if text := a.seen(); text != strings.Repeat(beatText, 2) {
					t.Errorf("%s: after twice the time: %q", path, text)
				}
				time.Sleep(time.Minute)
				if got := count(append(before, a, whole, native)); got[200] != 9 {
					t.Errorf("%s: %v", path, got)
				}
				res := a.Result()
				beats, events, _ := strings.Cut(a.Body.String(), "data")
				if "data"+events != streamText || strings.ReplaceAll(beats, beatText, "") != "" ||
					res.Header.Get("Content-Type") != "text/event-stream" ||
					res.Header.Get("Cache-Control") != "no-cache" ||
					res.Header.Get("Access-Control-Allow-Origin") != "http://localhost:3000" ||
					res.Header.Get("Content-Length") != "" {
					t.Errorf("%s: %v %q", path, res.Header, a.Body)
				}
				if before[1].Body.String() != streamText || whole.Body.String() != streamText ||
					strings.Contains(native.Body.String(), "waiting") ||
					whole.Header().Get(headerWaited) == "" {
					t.Errorf(
						"%s: one that waited for a second %q, one without stream %q, one of Ollama's own %q",
						path,
						before[1].Body,
						whole.Body,
						native.Body,
					)
				}
				s.mu.Lock()
				if n := len(
					s.sent,
				); s.sent[n-1].Get(
					"Accept-Encoding",
				)+s.sent[n-2].Get(
					"Accept-Encoding",
				) != "" {
					t.Errorf(
						"%s: what was begun without Content-Encoding is asked for with one: %v",
						path,
						s.sent,
					)
				}
				s.mu.Unlock()
			}
		},
	)
}

// TestHeartbeatLong: once begun, heartbeats continue while the model thinks, and end with its
// answer.
func TestHeartbeatLong(t *testing.T) {
	inTime(
		t,
		1,
		time.Minute,
		func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
			h.Transport, h.Heartbeat = &streaming{RoundTripper: h.Transport}, 300*time.Millisecond
			first := ask("/v1/chat/completions", streamedChat("one"))
			synctest.Wait()
			second := ask("/v1/chat/completions", streamedChat("two"))
			time.Sleep(time.Minute)
			if got := count([]*asked{first, second}); got[200] != 2 {
				t.Error(got)
			}
			if first.Body.String() != streamText ||
				second.Body.String() != strings.Repeat(beatText, 6)+streamText {
				t.Errorf("%q, %q", first.Body, second.Body)
			}
		},
	)
}

// sse reads a stream of events: it counts comments; an event is its name and data.
func sse(t *testing.T, text string) (comments int, events [][2]string) {
	t.Helper()
	for block := range strings.SplitSeq(strings.TrimSuffix(text, "\n\n"), "\n\n") {
		var e [2]string
		for line := range strings.SplitSeq(block, "\n") {
			switch field, value, _ := strings.Cut(line, ": "); field {
			case "":
				comments++
			case "event":
				e[0] = value
			case "data":
				e[1] += value
			default:
				t.Errorf("the stream has a line %q", line)
			}
		}
		if e != [2]string{} {
			events = append(events, e)
		}
	}
	return comments, events
}

// TestHeartbeatErrors: any error after the answer was begun is sent once, as an event in the
// dialect's form, and ends the stream.
func TestHeartbeatErrors(t *testing.T) {
	answer := func(status int, kind, text string) func(*http.Request) *http.Response {
		return func(*http.Request) *http.Response {
			return &http.Response{
				StatusCode: status,
				Status:     fmt.Sprint(status, " ", http.StatusText(status)),
				Header: http.Header{
					"Content-Type": {kind},
				},
				Body: io.NopCloser(strings.NewReader(text)),
			}
		}
	}
	zipped := func(r *http.Request) *http.Response {
		res := answer(200, "text/event-stream", "\x1f\x8b")(r)
		res.Header.Set("Content-Encoding", "gzip")
		return res
	}
	for name, tt := range map[string]struct {
		answer  func(*http.Request) *http.Response
		happens func(m *mortal, h *Handler)
		message string
		code    any // of the error, if the upstream sent one
		status  int
	}{
		"its own error": {
			answer:  answer(400, "application/json", `{"error":{"message":"bad\nthing","code":"c1"}}`),
			message: "bad\nthing", code: "c1", status: 400,
		},
		"Ollama's error": {
			answer: answer(500, "application/json", `{"error":"it crashed"}`), message: "it crashed", status: 500,
		},
		"a page": {
			answer:  answer(502, "text/html", "<html>\n\n</html>"),
			message: "ollama answered 502 Bad Gateway", status: 502,
		},
		"an endless error": {
			answer:  answer(500, "application/json", `{"error":{"message":"`+strings.Repeat("x", 2*eventMost)),
			message: "ollama answered 500 Internal Server Error", status: 500,
		},
		"no stream": {
			answer:  answer(200, "application/json", `{"choices":[]}`),
			message: "something else than a stream", status: 502,
		},
		"one that is packed": {answer: zipped, message: "something else than a stream", status: 502},
		"the proxy stops": {
			happens: func(m *mortal, h *Handler) { h.Close() }, message: "is stopping", status: 503,
		},
		"the server dies": {
			happens: func(m *mortal, h *Handler) { m.live(false) },
			message: "has been away for longer", status: 503,
		},
		"it sends nothing": {
			happens: func(m *mortal, h *Handler) {
				l := h.Live()
				l.UpstreamSilence = 10 * time.Second
				h.Change(l)
				m.set(func() { m.silent = true })
			},
			message: "--upstream-silence", status: 504,
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, path := range []string{"/v1/chat/completions", "/v1/messages", "/v1/responses"} {
				inTime(
					t,
					1,
					time.Minute,
					func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
						told := make(chan Exchange, 100)
						h.Done = func(ex Exchange) { told <- ex }
						h.Transport, h.Heartbeat = &streaming{
							RoundTripper: h.Transport,
							answer:       tt.answer,
						}, 300*time.Millisecond
						h.UpstreamSilence = time.Hour
						body := map[string]string{"/v1/responses": `{"model":"m","stream":true,"input":"c"}`}[path]
						if body == "" {
							body = streamedChat("two")
						}
						first := ask("/api/chat", chatWith("s", "one", ""))
						synctest.Wait()
						a := ask(path, body)
						time.Sleep(500 * time.Millisecond)
						if tt.happens != nil {
							tt.happens(m, h)
						}
						time.Sleep(2 * time.Minute)
						if got := count([]*asked{a}); got[200] != 1 {
							t.Fatalf("%v", got)
						}
						_ = first
						comments, events := sse(t, a.Body.String())
						if comments < 1 || len(events) != 1 ||
							!strings.HasSuffix(a.Body.String(), "\n\n") {
							t.Fatalf("%q", a.Body)
						}
						var data struct {
							Type    string
							Message string
							Error   struct {
								Type, Message string
								Code          any
							}
						}
						if err := json.Unmarshal([]byte(events[0][1]), &data); err != nil {
							t.Fatalf("%v: %q", err, a.Body)
						}
						named, typed := "error", "error"
						if path == "/v1/chat/completions" {
							named, typed = "", ""
						}
						if events[0][0] != named || data.Type != typed ||
							!strings.Contains(data.Error.Message, tt.message) ||
							data.Error.Code != tt.code ||
							path == "/v1/responses" && data.Message != data.Error.Message {
							t.Errorf("%s: %q", path, a.Body)
						}
						ex := <-told
						for ex.Path != path {
							ex = <-told
						}
						if ex.Status != tt.status || !ex.Begun || ex.Outcome == OK ||
							ex.Outcome == ClientGone {
							t.Errorf(
								"%s: told as %d, begun %t, %s",
								path,
								ex.Status,
								ex.Begun,
								ex.Outcome,
							)
						}
					},
				)
			}
		})
	}
}

// TestHeartbeatAway: a request that waits for a server that is away, or whose queue is full, also
// gets heartbeats, for all its waits together.
func TestHeartbeatAway(t *testing.T) {
	for _, lanes := range []int{-2, 1} {
		inTime(
			t,
			lanes,
			time.Minute,
			func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
				h.Transport, h.Heartbeat = &streaming{RoundTripper: h.Transport}, 15*time.Second
				m.live(false)
				a := ask("/v1/chat/completions", streamedChat("one"))
				time.Sleep(31 * time.Second)
				if text := a.seen(); text != strings.Repeat(beatText, 2) {
					t.Errorf("away for 31 s: %q", text)
				}
				m.live(true)
				time.Sleep(5 * time.Second)
				if got := count(
					[]*asked{a},
				); got[200] != 1 ||
					!strings.HasSuffix(a.Body.String(), beatText+streamText) {
					t.Errorf("%v %q", got, a.Body)
				}
			},
		)
	}
	inTime(
		t,
		1,
		time.Minute,
		func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
			h.Transport, h.Heartbeat = &streaming{RoundTripper: h.Transport}, 15*time.Second
			m.set(func() { m.busy = true })
			a := ask("/v1/messages", streamedChat("one"))
			time.Sleep(20 * time.Second) // retries after 0.25, 0.5, 1, 2, 4, 5, 5 s
			if text := a.seen(); text != beatText {
				t.Errorf("busy for 20 s: %q", text)
			}
			m.set(func() { m.busy = false })
			time.Sleep(10 * time.Second)
			if got := count([]*asked{a}); got[200] != 1 || a.Body.String() != beatText+streamText {
				t.Errorf("%v %q", got, a.Body)
			}
		},
	)
}

// TestHeartbeatLeaves: when a client leaves while it gets heartbeats, its wait ends, and nothing is
// written to it afterwards.
func TestHeartbeatLeaves(t *testing.T) {
	inTime(
		t,
		1,
		time.Minute,
		func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
			h.Transport, h.Heartbeat = &streaming{RoundTripper: h.Transport}, 100*time.Millisecond
			busy := ask("/api/chat", chatWith("s", "one", ""))
			synctest.Wait()
			ctx, leave := context.WithCancel(t.Context())
			r := httptest.NewRequestWithContext(
				ctx,
				http.MethodPost,
				"/v1/chat/completions",
				strings.NewReader(streamedChat("two")),
			)
			r.Host = "localhost"
			w := httptest.NewRecorder()
			gone := make(chan struct{})
			go func() { // ends with leave
				defer close(gone)
				h.ServeHTTP(w, r)
			}()
			time.Sleep(450 * time.Millisecond)
			leave()
			<-gone
			text := w.Body.String()
			if n, _ := sse(t, text); n != 4 || h.Waiting() != 0 {
				t.Errorf("%q, %d wait", text, h.Waiting())
			}
			time.Sleep(10 * time.Second)
			if got := count(
				[]*asked{busy},
			); got[200] != 1 || w.Body.String() != text ||
				m.asked() != 1 {
				t.Errorf("%v, %d were sent; then %q", got, m.asked(), w.Body)
			}
		},
	)
}

// TestHeartbeatWire: the same on real connections: an event is visible as soon as it is sent, a
// client that disconnects leaves the queue, and without busy lanes nothing differs.
func TestHeartbeatWire(t *testing.T) {
	f := newFake(t, nil)
	rg := newRig(
		t,
		f.URL,
		&Handler{
			Lanes:     schedule.NewScheduler(schedule.Config{Lanes: 1}),
			Heartbeat: time.Millisecond,
		},
	)
	busy := rg.dial()
	busy.send(rawPost("/api/chat", chatWith("s", "one", "")))
	up := f.accept()
	up.receive()
	begun := func(text string) *fakeConn {
		c := rg.dial()
		c.send(rawPost("/v1/chat/completions", streamedChat(text)))
		if head := c.mustHead(); head.line != "HTTP/1.1 200 OK" ||
			head.value("Content-Type") != "text/event-stream" ||
			!head.chunked {
			t.Fatalf("%+v", head)
		}
		for range 3 {
			if chunk := c.mustChunk(); chunk != beatText {
				t.Fatalf("%q", chunk)
			}
		}
		return c
	}
	leaves, stays := begun("two"), begun("three")
	waiting(t, rg, 2)
	leaves.Close()
	waiting(t, rg, 1)
	if ex := rg.ended(); ex.Outcome != ClientGone || !ex.Begun {
		t.Errorf("%+v", ex)
	}
	up.send(answer(200, "application/json", chatAnswer))
	busy.receive()
	if got := up.receive(); !bytes.Contains(got.body, []byte("three")) {
		t.Errorf("then came %s", got.body)
	}
	up.send(
		"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
	)
	up.chunk(streamText)
	chunk := stays.mustChunk()
	for chunk == beatText {
		chunk = stays.mustChunk()
	}
	if chunk != streamText {
		t.Errorf("%q", chunk)
	}
	up.send("0\r\n\r\n")
	if chunk := stays.mustChunk(); chunk != "" {
		t.Errorf("at the end: %q", chunk)
	}
	ex := rg.ended()
	if other := rg.ended(); other.Begun { // the lane was free before the first one was told of
		ex = other
	}
	if ex.Outcome != OK || !ex.Begun || ex.Status != 200 ||
		ex.BytesOut != int64(len(streamText)) {
		t.Errorf("%+v", ex)
	}
}

// FuzzEvent: whatever an upstream sends as an error, the client gets one event, whose data is JSON
// with a message, in one line.
func FuzzEvent(f *testing.F) {
	f.Add(uint8(0), []byte(`{"message":"bad\nthing","code":null}`))
	f.Add(uint8(1), []byte(`"text"`))
	f.Add(uint8(2), []byte("{\"message\":\"\u2028\\u0000\",\"a\":1e400}"))
	f.Fuzz(func(t *testing.T, which uint8, told []byte) {
		paths := []string{"/v1/chat/completions", "/v1/messages", "/v1/responses"}
		path := paths[int(which)%len(paths)]
		text := (&refusal{http.StatusBadGateway, "broken"}).event(path, told)
		comments, events := sse(t, text)
		if comments != 0 || len(events) != 1 || !strings.HasSuffix(text, "\n\n") || strings.Contains(text, "\r") {
			t.Fatalf("%q", text)
		}
		var data struct{ Error map[string]any }
		if err := json.Unmarshal([]byte(events[0][1]), &data); err != nil || data.Error == nil {
			t.Fatalf("%v: %q", err, text)
		}
		var fields map[string]any
		if json.Unmarshal(told, &fields) != nil || fields == nil {
			if data.Error["message"] != "broken" {
				t.Errorf("%q", text)
			}
		}
	})
}
