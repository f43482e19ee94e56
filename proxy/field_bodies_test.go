package proxy

import (
	"bytes"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// TestUnreadableBodies: bodies that are really compressed, start with a byte order mark or are in
// UTF-16 are forwarded byte for byte, with their headers.
func TestUnreadableBodies(t *testing.T) {
	const text = `{"model":"m","keep_alive":"5m"}`
	utf16 := func(bom string, big bool) string {
		var b strings.Builder
		b.WriteString(bom)
		for _, c := range []byte(text) {
			if big {
				b.Write([]byte{0, c})
			} else {
				b.Write([]byte{c, 0})
			}
		}
		return b.String()
	}
	for name, tt := range map[string]struct{ path, body, encoding, why string }{
		"show gzip":       {"/api/show", "\x1f\x8b\x08\x00abc", "gzip", ""},
		"chat gzip":       {"/api/chat", "\x1f\x8b\x08\x00abc", "gzip", UneditedEncoded},
		"chat GZIP":       {"/api/chat", "\x1f\x8b\x08\x00abc", "GZIP", UneditedEncoded},
		"chat two":        {"/api/generate", "\x1f\x8b\x08\x00abc", "identity, gzip", UneditedEncoded},
		"responses zstd":  {"/v1/responses", "\x28\xb5\x2f\xfd\x04", "zstd", UneditedEncoded},
		"messages br":     {"/v1/messages", "\x0b\x02", "br", UneditedEncoded},
		"embed deflate":   {"/api/embed", "\x78\x9c", "deflate", UneditedEncoded},
		"unknown coding":  {"/api/chat", "x" + text, "x-none", UneditedEncoded},
		"gzip undeclared": {"/api/chat", "\x1f\x8b\x08\x00abc", "", UneditedNotJSON},
		"BOM":             {"/api/chat", "\xef\xbb\xbf" + text, "", UneditedNotJSON},
		"UTF-16LE":        {"/api/chat", utf16("\xff\xfe", false), "", UneditedNotJSON},
		"UTF-16BE":        {"/api/generate", utf16("\xfe\xff", true), "", UneditedNotJSON},
		"UTF-16 bare":     {"/v1/chat/completions", utf16("", false), "", UneditedNotJSON},
	} {
		t.Run(name, func(t *testing.T) {
			const refusal = `{"error":"invalid character"}`
			f := newFake(t, func(received) string { return answer(400, "application/json", refusal) })
			rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, Force, "24h")})
			for _, chunked := range []bool{false, true} {
				client := rg.dial()
				headers := []string{"Content-Type: application/json"}
				if tt.encoding != "" {
					headers = append(headers, "Content-Encoding: "+tt.encoding)
				}
				if chunked {
					client.send("POST " + tt.path + " HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" + lines(headers) + "\r\n")
					client.chunk(tt.body)
					client.send("0\r\n\r\n")
				} else {
					client.send(rawPost(tt.path, tt.body, headers...))
				}
				if got := client.receive(); !strings.HasPrefix(got.line, "HTTP/1.1 400 ") || string(got.body) != refusal {
					t.Errorf("got %s %s", got.line, got.body)
				}
				got := f.next()
				if string(got.body) != tt.body || got.value("Content-Encoding") != tt.encoding || got.value("Content-Type") != "application/json" {
					t.Errorf("went as %q %q", got.headers, got.body)
				}
				if ex := rg.ended(); ex.Unedited != tt.why || ex.KeepAlive != "" {
					t.Errorf("told as %+v", ex)
				}
			}
		})
	}
}

// TestPlainIsRead: a readable body is read whatever its Content-Encoding says, as by Ollama
// (TestDoors).
func TestPlainIsRead(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), NoTouch: true})
	for _, enc := range []string{"identity", "x", "gzip", "GZIP", "zstd", "br, gzip", ""} {
		rg.post("/api/chat", `{"model":"m"}`, "Content-Encoding: "+enc)
		if got := f.next(); string(got.body) != `{"keep_alive":`+day+`,"model":"m"}` || got.value("Content-Encoding") != enc {
			t.Errorf("went as %+v", got)
		}
		if ex := rg.ended(); ex.KeepAlive != didInject || ex.Unedited != "" {
			t.Errorf("told as %+v", ex)
		}
		rg.post("/v1/chat/completions", `{"model":"m"}`, "Content-Encoding: "+enc)
		if got := f.next(); string(got.body) != `{"model":"m"}` || got.value("Content-Encoding") != enc {
			t.Errorf("went as %+v", got)
		}
		if ex := rg.ended(); ex.Model != "m" {
			t.Errorf("told as %+v", ex)
		}
	}
}

// TestZstdIsRead: where Ollama decodes zstd, the proxy does, too, to read the request; it forwards
// the body as it came.
func TestZstdIsRead(t *testing.T) {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer encoder.Close()
	encoded := func(text string) string { return string(encoder.EncodeAll([]byte(text), nil)) }
	prompt := chatWith("s", strings.Repeat("What is the weather? ", 50), "")
	bomb := encoded(`{"model":"m","messages":[{"role":"user","content":"` + strings.Repeat("x", 64<<20) + `"}]}`)
	for _, tt := range []struct {
		path, body, encoding, model, why string
	}{
		{"/v1/chat/completions", encoded(prompt), "zstd", "m", ""},
		{"/v1/messages", encoded(prompt), "zstd", "m", ""},
		{"/v1/embeddings", encoded(`{"model":"m","input":"x"}`), "zstd", "m", ""},
		{"/v1/chat/completions", encoded(prompt)[:100], "zstd", "", UneditedEncoded},
		{"/v1/chat/completions", encoded("no JSON"), "zstd", "", UneditedEncoded},
		// Ollama does not know the encoding by this name.
		{"/v1/chat/completions", encoded(prompt), "ZSTD", "", UneditedEncoded},
		{"/v1/chat/completions", encoded(prompt), "", "", UneditedNotJSON},
		{"/v1/chat/completions", bomb, "zstd", "", UneditedEncoded},
		{"/api/chat", encoded(prompt), "zstd", "", UneditedEncoded},
	} {
		f := newFake(t, func(received) string { return answer(200, "application/json", chatAnswer) })
		rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), NoTouch: true, Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1})})
		for range 2 {
			res, _ := rg.post(tt.path, tt.body, "Content-Encoding: "+tt.encoding)
			if got := f.next(); string(got.body) != tt.body || got.value("Content-Encoding") != tt.encoding {
				t.Errorf("%s %q went as %q, %d bytes", tt.path, tt.encoding, got.headers, len(got.body))
			}
			asks := tt.model != "" && tt.path != "/v1/embeddings"
			ex := rg.ended()
			if ex.Model != tt.model || ex.Unedited != tt.why || (ex.Savings != nil) != asks || (res.Header.Get(headerPrefix) != "") != asks {
				t.Errorf("%s %q: told as %+v, %v", tt.path, tt.encoding, ex, res.Header)
			}
		}
	}
}

// TestPaddedBehind: Ollama does not read what follows the first value, so the proxy does not
// forward it.
func TestPaddedBehind(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, Force, "24h"), MaxBody: 1000})
	const body = `{"model":"m","keep_alive":"5m"}`
	for _, padding := range []string{strings.Repeat(" ", 3000), strings.Repeat("\n", 200_000), strings.Repeat("x", 3000)} {
		for _, chunked := range []bool{false, true} {
			client := rg.dial()
			if chunked {
				client.send("POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
				client.chunk(body + padding)
				client.send("0\r\n\r\n")
			} else {
				client.send(rawPost("/api/generate", body+padding))
			}
			if got := client.receive(); got.line != "HTTP/1.1 200 OK" {
				t.Errorf("got %+v", got)
			}
			client.Close()
			if got := f.next(); !strings.HasPrefix(string(got.body), `{"model":"m","keep_alive":`+day+`}`) || len(got.body) > len(body)+len(padding)+10 {
				t.Errorf("%d bytes went, %.60q", len(got.body), got.body)
			}
			if ex := rg.ended(); ex.KeepAlive != didForce || ex.Unedited != "" {
				t.Errorf("told as %+v", ex)
			}
		}
	}
}

// TestNullsUnchanged: fields that are null, empty or of an unexpected type are left to the
// upstream, and so is the Content-Type. Ollama itself answers 400 to some of these and streams for
// "stream": null.
func TestNullsUnchanged(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	n := 0
	for _, fields := range []string{
		`"options":null`, `"options":{"num_ctx":null}`, `"options":{}`, `"options":[]`, `"options":"x"`, `"options":{"num_ctx":"4096"}`, `"messages":null`, `"messages":[null]`, `"messages":{}`, `"tools":null`, `"format":null`, `"format":""`,
		`"format":{"type":"object"}`, `"format":"json"`, `"stream":null`, `"stream":"yes"`, `"think":null`, `"images":null`, `"context":null`, `"input":null`, `"template":null`, `"":null`,
	} {
		for _, contentType := range []string{"application/json", "text/plain", "", "application/x-www-form-urlencoded", "application/json; charset=utf-16"} {
			for _, path := range nativePaths {
				n++
				body := fmt.Sprintf(`{"model":"m%d",%s}`, n, fields)
				client := rg.dial()
				var headers []string
				if contentType != "" {
					headers = append(headers, "Content-Type: "+contentType)
				}
				client.send(rawPost(path, body, headers...))
				client.receive()
				client.Close()
				if got := f.next(); string(got.body) != `{"keep_alive":`+day+`,`+body[1:] || got.value("Content-Type") != contentType {
					t.Errorf("%s %q %s went as %q %s", path, contentType, body, got.headers, got.body)
				}
				if ex := rg.ended(); ex.KeepAlive != didInject {
					t.Errorf("told as %+v", ex)
				}
			}
		}
	}
}

// TestExpectContinue: a client that waits for 100 gets it at once, sends 30 MB, and they arrive.
func TestExpectContinue(t *testing.T) {
	for _, path := range []string{"/api/chat", "/v1/chat/completions"} {
		f := newFake(t, okAnswer)
		rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
		body := `{"model":"m","images":["` + strings.Repeat("QUJD", 30<<18) + `"]}`
		client := rg.dial()
		client.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: " + fmt.Sprint(len(body)) + "\r\n\r\n")
		if got := client.mustHead(); got.line != "HTTP/1.1 100 Continue" {
			t.Fatalf("got %+v", got)
		}
		f.none() // the upstream gets no request before the body is complete
		client.send(body)
		if got := client.receive(); got.line != "HTTP/1.1 200 OK" {
			t.Errorf("got %+v", got)
		}
		got := f.next()
		want := body
		if path == "/api/chat" {
			want = `{"keep_alive":` + day + `,` + body[1:]
		}
		if string(got.body) != want || got.values("Expect") != nil {
			t.Errorf("%d bytes went with %q", len(got.body), got.headers)
		}
	}
}

// TestExpectPassesThrough: if the body passes through, the upstream's own 100, or refusal, decides.
func TestExpectPassesThrough(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		f := newFake(t, nil)
		rg := newRig(t, f.URL, &Handler{})
		client := rg.dial()
		client.send("POST /api/blobs/sha256:00 HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
		up := f.accept()
		head := up.mustHead()
		if head.value("Expect") != "100-continue" {
			t.Errorf("went as %+v", head)
		}
		if refuse {
			// Ollama's server does this when it refuses before it has read the body. (Without
			// "Connection: close", the rest of the body has to be sent before the connection can be
			// reused, and Go's transport sends it.)
			up.send("HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
			if got := client.receive(); got.line != "HTTP/1.1 401 Unauthorized" || string(got.body) != "no" {
				t.Errorf("got %+v", got)
			}
			if sent := up.closed(); sent != "" {
				t.Errorf("%q was sent nevertheless", sent)
			}
			continue
		}
		up.send("HTTP/1.1 100 Continue\r\n\r\n")
		if got := client.mustHead(); got.line != "HTTP/1.1 100 Continue" {
			t.Errorf("got %+v", got)
		}
		client.send("GGUF")
		if err := up.rest(&head); err != nil || string(head.body) != "GGUF" {
			t.Errorf("%q, %v", head.body, err)
		}
		up.send("HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
		got := client.receive()
		if got.line == "HTTP/1.1 100 Continue" { // the server's own, when it begins to read the body: a client takes any number
			got = client.receive()
		}
		if got.line != "HTTP/1.1 201 Created" {
			t.Errorf("got %+v", got)
		}
	}
}

// TestExpectRefused: the proxy refuses a request before the 100, so that no body is sent in vain.
func TestExpectRefused(t *testing.T) {
	keys, err := ParseKeys("secret")
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ header, status string }{
		"no key": {"X-None: 1", "HTTP/1.1 401 Unauthorized"},
		"origin": {"Origin: http://evil.example", "HTTP/1.1 403 Forbidden"},
	} {
		for _, path := range []string{"/api/chat", "/api/blobs/sha256:00"} {
			f := newFake(t, okAnswer)
			rg := newRig(t, f.URL, &Handler{Guard: Guard{Keys: keys}})
			client := rg.dial()
			client.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 30000000\r\n" + tt.header + "\r\n\r\n")
			if got := client.receive(); got.line != tt.status {
				t.Errorf("%s: got %s", name, got.line)
			}
			f.none()
		}
	}
}

// TestEarlyRefusal: the upstream refuses an upload after little of it. The client, which is still
// sending, gets that refusal, and not a 502.
func TestEarlyRefusal(t *testing.T) {
	for _, path := range []string{"/api/blobs/sha256:00", "/api/create", "/v1/audio/transcriptions"} {
		for _, status := range []int{400, 401, 404, 413, 429, 500, 503} {
			f := newFake(t, nil)
			rg := newRig(t, f.URL, &Handler{})
			client := rg.dial()
			client.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n\r\nGGUF")
			up := f.accept()
			up.mustHead()
			const refusal = `{"error":"no"}`
			up.send(fmt.Sprintf("HTTP/1.1 %d X\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", status, len(refusal), refusal))
			sent := make(chan struct{})
			go func() { // ends with the client's connection, at the latest
				defer close(sent)
				io.Copy(client.Conn, io.LimitReader(filler{}, 50000000-4))
			}()
			if got := client.receive(); !strings.HasPrefix(got.line, fmt.Sprintf("HTTP/1.1 %d ", status)) || string(got.body) != refusal {
				t.Errorf("%s: got %s %s", path, got.line, got.body)
			}
			up.Close()
			client.Close()
			<-sent
			if ex := rg.ended(); ex.Status != status || ex.Outcome != ClientError && ex.Outcome != UpstreamError {
				t.Errorf("%s: told as %+v", path, ex)
			}
		}
	}
}

// TestOverMaxBody: a body that is too long to be read streams through unchanged; its first bytes
// reach the upstream before the client has sent the last.
func TestOverMaxBody(t *testing.T) {
	const max = 100 << 10
	head := `{"model":"m","prompt":"`
	for _, path := range []string{"/api/chat", "/v1/chat/completions"} {
		for _, chunked := range []bool{false, true} {
			f := newFake(t, nil)
			rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), MaxBody: max})
			body := head + strings.Repeat("x", 3*max) + `"}`
			client := rg.dial()
			request := "POST " + path + " HTTP/1.1\r\nHost: localhost\r\n"
			if chunked {
				client.send(request + "Transfer-Encoding: chunked\r\n\r\n")
				client.chunk(body[:2*max])
			} else {
				client.send(request + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)) + body[:2*max])
			}
			up := f.accept()
			got := up.mustHead()
			if got.chunked != chunked || !chunked && got.value("Content-Length") != fmt.Sprint(len(body)) {
				t.Errorf("chunked %v: went as %+v", chunked, got)
			}
			if _, err := up.br.Peek(len(head)); err != nil { // the client has more to send
				t.Fatal(err)
			}
			if chunked {
				client.chunk(body[2*max:])
				client.send("0\r\n\r\n")
			} else {
				client.send(body[2*max:])
			}
			if err := up.rest(&got); err != nil || string(got.body) != body {
				t.Errorf("chunked %v: %d bytes arrived, want %d, %v", chunked, len(got.body), len(body), err)
			}
			up.send(answer(200, "a/b", "{}"))
			if got := client.receive(); got.line != "HTTP/1.1 200 OK" {
				t.Errorf("got %+v", got)
			}
			if ex := rg.ended(); ex.Unedited != UneditedTooLarge || ex.BytesIn != int64(len(body)) || ex.KeepAlive != "" {
				t.Errorf("told as %+v", ex)
			}
		}
	}
}

// filler is an endless body.
type filler struct{}

func (filler) Read(p []byte) (int, error) { return len(p), nil }

// TestBlobMemory: 200 MB in chunks to /api/blobs pass without the memory growing.
func TestBlobMemory(t *testing.T) {
	const size = 200 << 20
	sink := &discardUpstream{}
	rg := newRig(t, newFake(t, nil).URL, &Handler{Transport: sink})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	res, err := rg.http.Post(rg.URL+"/api/blobs/sha256:00", "application/octet-stream", struct{ io.Reader }{io.LimitReader(filler{}, size)})
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	runtime.ReadMemStats(&after)
	if sink.n != size {
		t.Errorf("%d bytes arrived", sink.n)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
		t.Errorf("%d bytes were allocated for %d", used, size)
	}
	if ex := rg.ended(); ex.BytesIn != size {
		t.Errorf("told as %+v", ex)
	}
}

// discardUpstream reads a request's body and answers.
type discardUpstream struct{ n int64 }

func (d *discardUpstream) RoundTrip(r *http.Request) (*http.Response, error) {
	var err error
	if d.n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Body, make([]byte, 32<<10)); err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: 201, Request: r, Header: http.Header{}, Body: http.NoBody}, nil
}

// TestMultipart: audio for transcription passes unchanged, including the boundary.
func TestMultipart(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	var buf bytes.Buffer
	mw := multipart.NewWriter(&buf)
	mw.WriteField("model", "whisper")
	part, err := mw.CreateFormFile("file", "a.wav")
	if err != nil {
		t.Fatal(err)
	}
	part.Write(pattern(300<<10, 1))
	mw.Close()
	rg.do("POST", "/v1/audio/transcriptions", buf.String(), "Content-Type: "+mw.FormDataContentType())
	if got := f.next(); !bytes.Equal(got.body, buf.Bytes()) || got.value("Content-Type") != mw.FormDataContentType() || got.value("Content-Length") != fmt.Sprint(buf.Len()) {
		t.Errorf("went as %q, %d bytes", got.headers, len(got.body))
	}
}

// TestModelNames: the name under which a request's model is reported, and which names mean the same
// model. The name in the body is never rewritten.
func TestModelNames(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{})
	for model, key := range map[string]string{
		"qwen": "registry.ollama.ai/library/qwen:latest", "QWEN": "registry.ollama.ai/library/qwen:latest", "qwen:latest": "registry.ollama.ai/library/qwen:latest",
		"registry.ollama.ai/library/qwen": "registry.ollama.ai/library/qwen:latest", "qwen:1b": "registry.ollama.ai/library/qwen:1b",
		"team/x:q4_k_m": "registry.ollama.ai/team/x:q4_k_m", "Team/X:Q4_K_M": "registry.ollama.ai/team/x:q4_k_m",
		"hf.co/u/r:q4_k_m": "hf.co/u/r:q4_k_m", "hf.co/u/R:Q4_K_M": "hf.co/u/r:q4_k_m", "localhost:5000/a/b:c": "localhost:5000/a/b:c",
		"x:": "", "": "", ":x": "", "a b": "", "/": "", "a/": "", "a\\b": "", "m\u0131": "", "\u00e9": "", strings.Repeat("x", 400): "",
	} {
		if got := upstream.ModelKey(model); got != key {
			t.Errorf("ModelKey(%q) = %q, want %q", model, got, key)
		}
		for _, path := range []string{"/api/chat", "/v1/chat/completions", "/v1/messages", "/api/embed"} {
			body := fmt.Sprintf(`{"model":%q}`, model)
			rg.post(path, body)
			if got := f.next(); string(got.body) != body {
				t.Errorf("%s went as %s", body, got.body)
			}
			want := model
			if key == "" && model != "" {
				want = invalidModel // it could be anything, a prompt too, and of any length
			}
			if ex := rg.ended(); ex.Model != want && ex.Unedited == "" {
				t.Errorf("%s: model %q, want %q", body, ex.Model, want)
			}
		}
	}
}
