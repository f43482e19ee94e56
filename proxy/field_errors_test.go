package proxy

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// TestUpstreamDies: the upstream's answer breaks off. The client's answer must not look complete,
// and the outcome is not reported as the client's doing.
func TestUpstreamDies(t *testing.T) {
	for _, tt := range []struct {
		name, head string
		body       string // sent before the end
		framing    string // as the client sees it
		rst        bool
	}{
		{"chunked, between chunks", "Transfer-Encoding: chunked", "5\r\nhello\r\n", "chunked", false},
		{"chunked, within a chunk", "Transfer-Encoding: chunked", "ff\r\nhello", "chunked", false},
		{"chunked, before a chunk", "Transfer-Encoding: chunked", "", "chunked", false},
		{"chunked, no final line", "Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n", "chunked", false},
		{"chunked, nonsense", "Transfer-Encoding: chunked", "5\r\nhello\r\nzz\r\n", "chunked", false},
		{"chunked, reset", "Transfer-Encoding: chunked", "5\r\nhello\r\n", "chunked", true},
		{"length, short", "Content-Length: 100", "hello", "length", false},
		{"length, nothing", "Content-Length: 100", "", "length", false},
		{"length, reset", "Content-Length: 100", "hello", "length", true},
		{"until close, reset", "Connection: close", "hello", "chunked", true},
	} {
		for _, path := range []string{"/api/chat", "/v1/chat/completions", "/api/pull", "/v1/messages"} {
			t.Run(tt.name+path, func(t *testing.T) {
				f := newFake(t, nil)
				rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
				client := rg.dial()
				client.send(rawPost(path, `{"model":"m"}`))
				up := f.accept()
				up.receive()
				up.send("HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n" + tt.head + "\r\n\r\n" + tt.body)
				head := client.mustHead()
				if tt.rst {
					if _, err := client.br.Peek(1); err != nil { // it has gone through before the reset overtakes it
						t.Fatal(err)
					}
					up.reset()
				} else {
					up.Close()
				}
				err := client.rest(&head)
				if err == nil && (head.chunked || head.value("Content-Length") != "") {
					t.Errorf("the client sees a whole answer: %+v", head)
				}
				if strings.Contains(string(head.body), "error") {
					t.Errorf("something was added: %q", head.body)
				}
				client.closed()
				if ex := rg.ended(); ex.Outcome != Aborted || ex.Status != 200 {
					t.Errorf("told as %+v", ex)
				}
			})
		}
	}
}

// dialects are the shapes of an error: a path, and how to read the message there.
var dialects = map[string]func(text string) (message, kind string, err error){
	"/api/chat": func(text string) (string, string, error) {
		var e struct{ Error string }
		err := strictly(text, &e)
		return e.Error, "", err
	},
	"/v1/chat/completions": func(text string) (string, string, error) {
		var e struct {
			Error struct {
				Message, Type string
				Param         any
				Code          *string
			}
		}
		err := strictly(text, &e)
		return e.Error.Message, e.Error.Type, err
	},
	"/v1/messages": func(text string) (string, string, error) {
		var e struct {
			Type  string
			Error struct{ Type, Message string }
		}
		err := strictly(text, &e)
		if e.Type != "error" {
			err = fmt.Errorf("type %q", e.Type)
		}
		return e.Error.Message, e.Error.Type, err
	},
}

func init() { // the same shapes elsewhere
	for _, path := range []string{"/api/generate", "/api/tags", "/", "/api/embed", "/unknown", "/v1"} {
		dialects[path] = dialects["/api/chat"]
	}
	for _, path := range []string{"/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/x", "/v1/responses", "/v1/audio/transcriptions", "/v1/messagesx"} {
		dialects[path] = dialects["/v1/chat/completions"]
	}
	dialects["/v1/messages/count_tokens"] = dialects["/v1/messages"]
}

func strictly(text string, v any) error {
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	return dec.Decode(v)
}

// TestUpstreamSilent: without any answer the client gets 502, in the dialect of the path, which
// says where and why.
func TestUpstreamSilent(t *testing.T) {
	dying := func(first string, rst bool) func(t *testing.T) *url.URL {
		return func(t *testing.T) *url.URL {
			f := newFake(t, nil)
			f.ln.SetDeadline(noDeadline)
			done := make(chan struct{})
			t.Cleanup(func() { f.ln.Close(); <-done })
			go func() { // ends when the listener is closed
				defer close(done)
				for {
					conn, err := f.ln.Accept()
					if err != nil {
						return
					}
					c := newFakeConn(t, conn)
					if r, err := c.head(); err == nil {
						c.rest(&r)
					}
					io.WriteString(c, first)
					if rst {
						c.reset()
					}
					c.Close()
				}
			}()
			return f.URL
		}
	}
	for name, tt := range map[string]struct {
		up  func(t *testing.T) *url.URL
		why string
	}{
		"refuses connections":    {refusing, "connection refused"},
		"closes":                 {dying("", false), "it closed the connection before it answered"},
		"resets":                 {dying("", true), "connection reset by peer"},
		"closes in the headers":  {dying("HTTP/1.1 200 OK\r\nContent-Type: te", false), "it closed the connection before it answered"},
		"is not an HTTP server":  {dying("SSH-2.0-OpenSSH_9.6\r\n", false), "malformed HTTP"},
		"answers 103, then dies": {dying("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", false), "it closed the connection before it answered"},
	} {
		t.Run(name, func(t *testing.T) {
			up := tt.up(t)
			rg := newRig(t, up, &Handler{KeepAlive: keep(t, "", "24h")})
			for path, read := range dialects {
				for _, method := range []string{"POST", "GET"} {
					res, text := rg.do(method, path, `{"model":"m"}`, "Origin: http://localhost:3000")
					message, kind, err := read(text)
					if res.StatusCode != 502 || err != nil {
						t.Errorf("%s %s: %d %q, %v", method, path, res.StatusCode, text, err)
					}
					if !strings.Contains(message, up.Host) || !strings.Contains(message, tt.why) {
						t.Errorf("%s %s: %q does not say %q and %q", method, path, message, up.Host, tt.why)
					}
					if strings.HasPrefix(path, "/v1/") && kind != "api_error" {
						t.Errorf("%s %s: error type %q", method, path, kind)
					}
					if ct := res.Header.Get("Content-Type"); ct != "application/json; charset=utf-8" {
						t.Errorf("Content-Type %q", ct)
					}
					if got := res.Header.Values("Access-Control-Allow-Origin"); len(got) != 1 || got[0] != "http://localhost:3000" {
						t.Errorf("%s %s: Access-Control-Allow-Origin %q", method, path, got)
					}
					if res.Header.Get("Link") != "" {
						t.Error("a header of the 103 is left in the final answer")
					}
					if ex := rg.ended(); ex.Outcome != Unreachable || ex.Status != 502 {
						t.Errorf("told as %+v", ex)
					}
				}
			}
			res, text := rg.do("HEAD", "/", "")
			if res.StatusCode != 502 || text != "" {
				t.Errorf("HEAD /: %d %q", res.StatusCode, text)
			}
		})
	}
}

// TestUpstreamErrorsUnchanged: the upstream's own errors are passed on unchanged, once.
func TestUpstreamErrorsUnchanged(t *testing.T) {
	for _, status := range []int{400, 401, 403, 404, 405, 408, 413, 429, 499, 500, 501, 502, 503, 504} {
		for _, path := range []string{"/api/chat", "/v1/chat/completions", "/v1/messages", "/api/tags"} {
			body := fmt.Sprintf("{\"error\":\"server busy %d\"}\n", status)
			f := newFake(t, func(received) string {
				return fmt.Sprintf("HTTP/1.1 %d Custom Text\r\nContent-Type: application/json\r\nRetry-After: 7\r\nWWW-Authenticate: Basic realm=x\r\nX-Odd: a\r\nX-Odd: b\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
			})
			rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
			res, got := rg.post(path, `{"model":"m"}`)
			if res.StatusCode != status || got != body || res.Header.Get("Retry-After") != "7" || res.Header.Get("WWW-Authenticate") != "Basic realm=x" ||
				fmt.Sprint(res.Header["X-Odd"]) != "[a b]" || res.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%d %s: %d %v %q", status, path, res.StatusCode, res.Header, got)
			}
			f.next()
			f.none()
			want := ClientError
			if status >= 500 {
				want = UpstreamError
			}
			if ex := rg.ended(); ex.Outcome != want || ex.Status != status {
				t.Errorf("%d: told as %+v", status, ex)
			}
		}
	}
}

// TestErrorInStream: an error line in a stream that began well is a line like any other.
func TestErrorInStream(t *testing.T) {
	f := newFake(t, nil)
	rg := newRig(t, f.URL, &Handler{})
	client, up, _ := stream(t, rg, f, "/api/chat", "application/x-ndjson")
	for _, w := range []string{"{\"message\":{\"content\":\"a\"}}\n", "{\"error\":\"an error was encountered while running the model\"}\n"} {
		up.chunk(w)
		if got := client.mustChunk(); got != w {
			t.Errorf("%q came as %q", w, got)
		}
	}
	up.send("0\r\n\r\n")
	if client.mustChunk() != "" || rg.ended().Outcome != OK {
		t.Error("the stream did not end well")
	}
}

// TestRedirect: redirects are left to the client; gin answers with one for a trailing slash.
func TestRedirect(t *testing.T) {
	f := newFake(t, func(received) string {
		return "HTTP/1.1 307 Temporary Redirect\r\nLocation: /api/chat\r\nContent-Length: 0\r\n\r\n"
	})
	rg := newRig(t, f.URL, &Handler{})
	res, _ := rg.post("/api/chat/", `{"model":"m"}`)
	if res.StatusCode != http.StatusTemporaryRedirect || res.Header.Get("Location") != "/api/chat" {
		t.Errorf("%d %v", res.StatusCode, res.Header)
	}
	f.next()
	f.none()
}
