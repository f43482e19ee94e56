package proxy

import (
	"fmt"
	"strings"
	"testing"
)

// TestLogLine: one line per request, with the fields that apply.
func TestLogLine(t *testing.T) {
	f := newFake(t, func(r received) string {
		if strings.Contains(r.line, "/api/show") {
			return answer(404, "application/json", `{"error":"x"}`)
		}
		return answer(200, "application/json", `{"done":true}`)
	})
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), MaxBody: 1000, Guard: withKeys(t, theKey)})
	auth := "Authorization: Bearer " + theKey
	for _, tt := range []struct {
		method, path, body string
		headers            []string
		want               map[string]any // nil: the field is not there
	}{
		{"POST", "/api/chat", `{"model":"Qwen"}`, []string{auth}, map[string]any{"level": "INFO", "model": "Qwen", "status": 200.0, "bytes_in": 16.0, "bytes_out": 13.0, "outcome": "ok", "keep_alive": "injected", "unedited": nil}},
		{"POST", "/api/chat", `{"model":"m","keep_alive":5}`, []string{auth}, map[string]any{"model": "m", "keep_alive": "kept"}},
		{"POST", "/v1/chat/completions", `{"model":"m"}`, []string{auth}, map[string]any{"model": "m", "keep_alive": nil, "outcome": "ok"}},
		{"POST", "/api/generate", `nonsense`, []string{auth}, map[string]any{"model": nil, "unedited": "not_json", "bytes_in": 8.0}},
		{"POST", "/api/generate", `{"model":"m","x":"` + strings.Repeat("y", 1000) + `"}`, []string{auth}, map[string]any{"model": nil, "unedited": "too_large", "bytes_in": 1020.0}},
		{"POST", "/api/generate", `zzz`, []string{auth, "Content-Encoding: gzip"}, map[string]any{"unedited": "encoded", "bytes_in": 3.0}},
		{"POST", "/api/show", `{"model":"m"}`, []string{auth}, map[string]any{"model": nil, "status": 404.0, "outcome": "client_error", "bytes_in": 13.0, "bytes_out": 13.0}},
		{"GET", "/api/tags", "", []string{auth}, map[string]any{"status": 200.0, "bytes_in": 0.0}},
		{"GET", "/api/tags", "", nil, map[string]any{"level": "INFO", "status": 401.0, "outcome": "refused"}},
		{"GET", "/api/tags", "", []string{auth, "Host: evil.example"}, map[string]any{"status": 403.0, "outcome": "refused"}},
		{"GET", "/", "", nil, map[string]any{"level": "DEBUG", "status": 200.0, "outcome": "ok"}},
		{"GET", pathHealth, "", nil, map[string]any{"level": "DEBUG", "status": 200.0, "outcome": "own"}},
		{"OPTIONS", "/api/chat", "", []string{"Origin: app://x"}, map[string]any{"level": "DEBUG", "status": 204.0, "outcome": "own"}},
	} {
		before := len(rg.log.lines(t, "request"))
		rg.do(tt.method, tt.path, tt.body, tt.headers...)
		rg.ended()
		all := rg.log.lines(t, "request")
		if len(all) != before+1 {
			t.Fatalf("%s %s: %d lines", tt.method, tt.path, len(all)-before)
		}
		line := all[before]
		if tt.want["level"] == nil {
			tt.want["level"] = "INFO"
		}
		tt.want["method"], tt.want["path"] = tt.method, tt.path
		for field, want := range tt.want {
			if got := line[field]; got != want {
				t.Errorf("%s %s %.40s: %s is %v, want %v", tt.method, tt.path, tt.body, field, got, want)
			}
		}
		if d, ok := line["duration_ms"].(float64); !ok || d < 0 {
			t.Errorf("%s %s: duration %v", tt.method, tt.path, line["duration_ms"])
		}
	}
}

// TestLogsNoContent: no text of prompts or answers is in the log at any level, whatever goes wrong.
func TestLogsNoContent(t *testing.T) {
	const marker = "XYZZY-secret"
	bodies := []string{
		`{"model":"m","prompt":"` + marker + `"}`,
		`{"model":"m","messages":[{"role":"user","content":"` + marker + `"}],"keep_alive":"` + marker + `"}`,
		`{"model":"m","prompt":"` + marker,
		`{"` + marker + `":1,"model":"m"}`,
		marker,
		`{"model":"m","input":["` + marker + `"],"keep_alive":0}`,
		`{"model":"m","prompt":"` + strings.Repeat(marker, 500) + `"}`,
	}
	answers := []string{
		answer(200, "application/json", `{"response":"`+marker+`"}`),
		answer(500, "application/json", `{"error":"`+marker+`"}`),
		answer(400, "application/json", `{"error":"`+marker+`"}`),
		"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n" + marker, // breaks off
	}
	for _, text := range answers {
		f := newFake(t, nil)
		f.ln.SetDeadline(noDeadline)
		done := make(chan struct{})
		go func() { // ends when the listener is closed
			defer close(done)
			for {
				conn, err := f.ln.Accept()
				if err != nil {
					return
				}
				c := &fakeConn{Conn: conn, br: newReader(conn)}
				if r, err := c.head(); err == nil {
					c.rest(&r)
				}
				fmt.Fprint(conn, text)
				conn.Close()
			}
		}()
		transport := NewTransport()
		transport.DisableKeepAlives = true
		rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, Force, "24h"), Transport: transport, MaxBody: 5000})
		n := 0
		for _, body := range bodies {
			for _, path := range []string{"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages", "/api/embed", "/api/pull", "/api/chat?q=" + marker, "/other"} {
				client := rg.dial()
				client.send(rawPost(path, body, "Connection: close", "X-Title: "+marker, "Authorization: Bearer "+marker, "Cookie: "+marker))
				client.closed()
				client.Close()
				rg.ended()
				n++
			}
		}
		client := rg.dial() // leaves in the middle of its prompt
		client.send("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{\"model\":\"m\",\"prompt\":\"" + marker)
		client.Close()
		rg.ended()
		f.ln.Close()
		<-done
		if got := len(rg.log.lines(t, "request")); got != n+1 {
			t.Errorf("%d log lines for %d requests", got, n+1)
		}
		for line := range strings.Lines(rg.log.String()) {
			if strings.Contains(line, marker) {
				t.Errorf("answered %.60q, the log says %s", text, line)
				break
			}
		}
	}
}
