package proxy

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// TestRequestTarget: the target of the request line goes upstream byte for byte, and so does every method.
func TestRequestTarget(t *testing.T) {
	f := newFake(t, func(received) string { return "HTTP/1.1 204 No Content\r\n\r\n" })
	rg := newRig(t, f.URL, &Handler{})
	targets := []string{
		"/", "/api/tags", "/api/tags/", "//", "//api//tags", "/api/../etc", "/api/./tags", "/..", "/%2e%2e/x", "/a%2Fb", "/a%2fb", "/a%20b", "/a%25", "/a+b",
		"/a;b=c", "/a;b", "/a:b", "/api/blobs/sha256:abc", "/api/blobs/sha256%3Aabc", "/v1/models/hf.co%2Fu%2Fr:Q4", "/v1/models/a@b", "/~x/$a&b=c,d!(e)*'f'",
		"/%F0%9F%A6%99", "/%ff", "/%00", "/a%0d%0ab",
		"/?", "/api/tags?", "/api/tags?a=b&a=c", "/api/tags?a;b", "/api/tags?%zz", "/api/tags?a=%2F+b%20c", "/?a?b", "/x?a=b#", "/x?{\"a\":[1]}", "/x?a|b^c`d\\e", "/x?=&&=", "/x?\xff",
		"/a[1]", "/%7Bx%7D", "/a%7C",
	}
	for _, target := range targets {
		for _, method := range []string{"GET", "POST", "DELETE", "PROPFIND"} {
			client := rg.dial()
			client.send(method + " " + target + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
			if got := client.mustHead(); got.line != "HTTP/1.1 204 No Content" {
				t.Fatalf("%s %s: %s", method, target, got.line)
			}
			client.Close()
			if got := f.next(); got.line != method+" "+target+" HTTP/1.1" {
				t.Errorf("%s %s went as %s", method, target, got.line)
			}
		}
	}
	// An invalid URL is at worst escaped, and then means the same path.
	for _, target := range []string{"/a|b", "/a\"b", "/{x}", "/\xc3\xa9", "/a^b`", "/a<b>", "/a\\b"} {
		client := rg.dial()
		client.send("GET " + target + " HTTP/1.1\r\nHost: localhost\r\n\r\n")
		client.mustHead()
		client.Close()
		_, line, _ := strings.Cut(f.next().line, " ")
		u, err := url.ParseRequestURI(strings.TrimSuffix(line, " HTTP/1.1"))
		if err != nil || u.Path != target {
			t.Errorf("GET %s went as %s, %v", target, line, err)
		}
	}
	for _, method := range []string{"GET", "HEAD", "PUT", "PATCH", "TRACE", "BREW", "M-SEARCH", "get", "post"} {
		client := rg.dial()
		client.send(method + " /api/chat HTTP/1.1\r\nHost: localhost\r\n\r\n")
		client.mustHead()
		client.Close()
		if got := f.next(); got.line != method+" /api/chat HTTP/1.1" {
			t.Errorf("%s went as %s", method, got.line)
		}
	}
}

// TestUpstreamPrefix: an upstream below a path prefix.
func TestUpstreamPrefix(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, &url.URL{Scheme: "http", Host: f.URL.Host, Path: "/gpu/1"}, &Handler{})
	for _, target := range []string{"/api/tags", "/a%2Fb", "/", "/x?y=%2F"} {
		rg.do("GET", target, "")
		if got := f.next(); got.line != "GET /gpu/1"+target+" HTTP/1.1" {
			t.Errorf("%s went as %s", target, got.line)
		}
	}
}

// TestRequestHeaders: a client's headers are forwarded unchanged, except those of the connection
// and Host, which becomes the upstream's.
func TestRequestHeaders(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	for _, path := range []string{"/api/chat", "/v1/chat/completions", "/api/tags", "/v1/messages"} {
		headers := []string{
			"Authorization: Bearer dummy", "X-Api-Key: sk-ant-1", "Cookie: a=b; c=d", "User-Agent: ollama-python/0.6 (x86_64 linux)", "Accept: text/event-stream, */*", "Accept-Encoding: gzip, br",
			"Content-Type: text/plain", "Cf-Connecting-Ip: 1.2.3.4", "Cf-Ray: abc", "X-Forwarded-For: 1.2.3.4, 5.6.7.8", "X-Forwarded-Proto: https", "X-Forwarded-Host: chat.example.com", "Forwarded: for=1.2.3.4",
			"X-Real-Ip: 1.2.3.4", "Via: 1.1 nginx", "Openai-Beta: x", "Anthropic-Version: 2023-06-01", "X-Stainless-Lang: js", "Traceparent: 00-1-2-01", "X-Empty:", "X-Multi: 1", "X-Multi: 2",
			"Referer: http://x/y", "Sec-Fetch-Mode: cors", "Range: bytes=0-5", "If-None-Match: \"x\"", "Te: trailers", "Prefer: wait=5", "Cache-Control: no-cache", "Accept-Language: de",
		}
		client := rg.dial()
		client.send(rawPost(path, `{"model":"m"}`, append(headers, "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "Connection: keep-alive, X-Hop", "X-Hop: 1")...))
		client.receive()
		got := f.next()
		sent := map[string]int{}
		for _, h := range headers {
			name, _, _ := strings.Cut(h, ":")
			sent[name]++
		}
		for name := range sent {
			var want []string
			for _, h := range headers {
				if k, v, _ := strings.Cut(h, ":"); k == name {
					want = append(want, strings.TrimSpace(v))
				}
			}
			if v := got.values(name); fmt.Sprint(v) != fmt.Sprint(want) {
				t.Errorf("%s: %s: %q, want %q", path, name, v, want)
			}
		}
		if got.value("Host") != f.URL.Host {
			t.Errorf("Host %q", got.value("Host"))
		}
		for _, h := range got.headers {
			name, _, _ := strings.Cut(h, ":")
			if sent[name] == 0 && name != "Host" && name != "Content-Length" {
				t.Errorf("%s: the upstream got %q, which the client did not send", path, h)
			}
		}
	}
	client := rg.dial() // a client without User-Agent has none made up
	client.send(rawPost("/api/chat", `{}`))
	client.receive()
	if got := f.next(); got.values("User-Agent") != nil || got.values("Accept-Encoding") != nil || got.values("X-Forwarded-For") != nil {
		t.Errorf("headers were made up: %q", got.headers)
	}
}

// TestResponseHeaders: the upstream's headers are passed on unchanged, except those of the
// connection. Only Date, the upstream's name and the time that the request waited are added.
func TestResponseHeaders(t *testing.T) {
	for name, body := range map[string]string{"text": "plain text", "html": "<html>", "json": `{"a":1}`, "none": "", "gzip": "\x1f\x8b\x08\x00"} {
		f := newFake(t, func(received) string {
			return fmt.Sprintf("HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nServer: x\r\nKeep-Alive: timeout=5\r\nX-Request-Id: 7\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		})
		rg := newRig(t, f.URL, &Handler{})
		want := []string{"Date: Mon, 01 Jan 2024 00:00:00 GMT", "Set-Cookie: a=b", "Set-Cookie: c=d", "Server: x", "X-Cacheproxy-Upstream: up", "X-Request-Id: 7",
			"X-Cacheproxy-Waited: 0.000", "Server-Timing: queue;dur=0.0", fmt.Sprintf("Content-Length: %d", len(body))}
		slices.Sort(want)
		for range 30 { // headers and body may go out together or apart
			client := rg.dial()
			client.send("GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n")
			got := client.receive().headers
			if slices.Sort(got); !slices.Equal(got, want) {
				t.Errorf("%s: headers %q, want %q", name, got, want)
				break
			}
		}
	}
}

// TestRequestFraming: the upstream gets one framing whatever the client's was: a length if the body
// was read, and the client's own if it passes through.
func TestRequestFraming(t *testing.T) {
	const body = `{"model":"m","prompt":"x"}`
	chunked := "9\r\n" + body[:9] + "\r\n" + fmt.Sprintf("%x;ext=1\r\n", len(body)-9) + body[9:] + "\r\n0\r\n\r\n"
	for _, tt := range []struct {
		path, in, want string
		chunked        bool // towards the upstream, if the client's is
	}{
		{"/api/generate", body, `{"keep_alive":` + day + `,` + body[1:], false},
		{"/api/generate", `{"model":"m","keep_alive":1,"x":"   "}`, "", false},
		{"/v1/chat/completions", body, "", false},
		{"/v1/messages", body, "", false},
		{"/api/pull", body, "", true},
		{"/api/blobs/sha256:00", body, "", true},
		{"/other", body, "", true},
	} {
		f := newFake(t, okAnswer)
		rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), NoTouch: true})
		if tt.want == "" {
			tt.want = tt.in
		}
		if tt.in == body {
			client := rg.dial()
			client.send("POST " + tt.path + " HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked)
			client.receive()
			got := f.next()
			if string(got.body) != tt.want || got.chunked != tt.chunked || (len(got.values("Content-Length")) == 1) == tt.chunked {
				t.Errorf("%s chunked went as %+v %q", tt.path, got, got.body)
			}
			if ex := rg.ended(); ex.BytesIn != int64(len(body)) {
				t.Errorf("%s chunked: %d bytes in", tt.path, ex.BytesIn)
			}
		}
		client := rg.dial()
		client.send(rawPost(tt.path, tt.in))
		client.receive()
		if got := f.next(); string(got.body) != tt.want || got.chunked || got.value("Content-Length") != fmt.Sprint(len(tt.want)) {
			t.Errorf("%s with a length went as %+v %q", tt.path, got, got.body)
		}
		client = rg.dial()
		client.send("POST " + tt.path + " HTTP/1.0\r\nContent-Length: " + fmt.Sprint(len(tt.in)) + "\r\n\r\n" + tt.in)
		client.closed()
		if got := f.next(); string(got.body) != tt.want || got.chunked {
			t.Errorf("%s of HTTP/1.0 went as %+v %q", tt.path, got, got.body)
		}
		for _, empty := range []string{"Content-Length: 0\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "\r\n"} {
			client = rg.dial()
			client.send("POST " + tt.path + " HTTP/1.1\r\nHost: localhost\r\n" + empty)
			client.receive()
			if got := f.next(); len(got.body) != 0 || len(got.values("Content-Length"))+len(got.values("Transfer-Encoding")) != 1 {
				t.Errorf("%s without a body went as %+v", tt.path, got)
			}
		}
	}
}

// TestTrailers: trailers pass in both directions, announced or not.
func TestTrailers(t *testing.T) {
	f := newFake(t, func(received) string {
		return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\n{}\r\n0\r\nX-Sum: 7\r\nX-Late: 8\r\n\r\n"
	})
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	for _, path := range []string{"/api/chat", "/v1/chat/completions", "/api/pull", "/other"} {
		client := rg.dial()
		client.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nTE: trailers\r\nTrailer: X-Digest\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{\"model\":\"m\"}\r\n0\r\nX-Digest: abc\r\n\r\n")
		head := client.receive()
		if head.value("Trailer") != "X-Sum" || fmt.Sprint(head.trailer) != "[X-Sum: 7 X-Late: 8]" && fmt.Sprint(head.trailer) != "[X-Late: 8 X-Sum: 7]" {
			t.Errorf("%s: the client got Trailer %q, then %q", path, head.value("Trailer"), head.trailer)
		}
		if string(head.body) != "{}" {
			t.Errorf("%s: body %q", path, head.body)
		}
		got := f.next()
		want := `{"model":"m"}`
		if path == "/api/chat" {
			want = `{"keep_alive":` + day + `,"model":"m"}`
		}
		if string(got.body) != want || !got.chunked {
			t.Errorf("%s went as %+v %q", path, got, got.body)
		}
		if fmt.Sprint(got.trailer) != "[X-Digest: abc]" || got.value("Trailer") != "X-Digest" {
			t.Errorf("%s: the upstream got Trailer %q, then %q", path, got.value("Trailer"), got.trailer)
		}
	}
}

// TestInformational: a 103 is passed on when it arrives, and none of its headers end up in the
// answer.
func TestInformational(t *testing.T) {
	f := newFake(t, nil)
	rg := newRig(t, f.URL, &Handler{})
	client := rg.dial()
	client.send(rawPost("/api/chat", `{"model":"m"}`, "Origin: http://localhost:3000"))
	up := f.accept()
	up.receive()
	for i := range 2 {
		up.send(fmt.Sprintf("HTTP/1.1 103 Early Hints\r\nLink: </%d>\r\n\r\n", i))
		if got := client.mustHead(); got.line != "HTTP/1.1 103 Early Hints" || got.value("Link") != fmt.Sprintf("</%d>", i) {
			t.Errorf("got %+v", got)
		}
	}
	up.send("HTTP/1.1 102 Processing\r\n\r\n")
	if got := client.mustHead(); !strings.HasPrefix(got.line, "HTTP/1.1 102 ") {
		t.Errorf("got %+v", got)
	}
	up.send("HTTP/1.1 200 OK\r\nX-Kept: 1\r\nContent-Type: a/b\r\nContent-Length: 2\r\n\r\n{}")
	got := client.receive()
	if got.line != "HTTP/1.1 200 OK" || got.value("X-Kept") != "1" || got.value("Content-Type") != "a/b" || got.values("Link") != nil || string(got.body) != "{}" || got.value("Access-Control-Allow-Origin") != "http://localhost:3000" {
		t.Errorf("got %+v", got)
	}
}

// TestUpgrade: no other protocol is let through, since nothing in it could be checked. The request
// is forwarded without the upgrade, and answered in HTTP/1.1, as by Ollama.
func TestUpgrade(t *testing.T) {
	for _, wish := range [][]string{
		{"Connection: Upgrade", "Upgrade: websocket", "Sec-Websocket-Key: x"}, {"Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"},
		{"connection: keep-alive, upgrade", "upgrade: H2C"}, {"Connection: keep-alive", "Connection: Upgrade", "Upgrade: TLS/1.0, HTTP/1.1"}, {"Upgrade: h2c"}, {"Connection: Upgrade"},
	} {
		for _, switches := range []bool{false, true} {
			for _, request := range []string{rawPost("/api/chat", `{"model":"m"}`, wish...), rawPost("/api/pull", `{"model":"m"}`, wish...), "GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\n" + lines(wish) + "\r\n"} {
				f := newFake(t, nil)
				rg := newRig(t, f.URL, &Handler{})
				client := rg.dial()
				client.send(request)
				up := f.accept()
				if got := up.receive(); got.values("Upgrade") != nil || got.values("Connection") != nil || got.values("Http2-Settings") != nil && wish[0] != "Upgrade: h2c" {
					t.Errorf("%q went as %q", wish, got.headers)
				}
				if !switches {
					up.send(answer(200, "application/json", "{}"))
					if got := client.receive(); got.line != "HTTP/1.1 200 OK" {
						t.Errorf("%q: %+v", wish, got)
					}
					continue
				}
				up.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
				if got := client.receive(); !strings.HasPrefix(got.line, "HTTP/1.1 502 ") || !strings.Contains(string(got.body), "another protocol") {
					t.Errorf("%q: %s %s", wish, got.line, got.body)
				}
				if got := up.closed(); got != "" {
					t.Errorf("%q went on as %q", wish, got)
				}
				if ex := rg.ended(); ex.Status != http.StatusBadGateway || ex.Outcome != Unreachable {
					t.Errorf("told as %+v", ex)
				}
			}
		}
	}
}

// TestHead: an answer to HEAD has the headers of a body, and no body.
func TestHead(t *testing.T) {
	for _, framing := range []string{"Content-Length: 17", "Transfer-Encoding: chunked"} {
		f := newFake(t, func(received) string { return "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n" + framing + "\r\n\r\n" })
		rg := newRig(t, f.URL, &Handler{})
		for _, path := range []string{"/", "/api/version", "/api/tags", "/api/blobs/sha256:00"} {
			res, body := rg.do("HEAD", path, "")
			if res.StatusCode != 200 || body != "" || res.Header.Get("Content-Type") != "text/plain" {
				t.Errorf("HEAD %s: %d %v %q", path, res.StatusCode, res.Header, body)
			}
			if framing[0] == 'C' && res.ContentLength != 17 {
				t.Errorf("HEAD %s: length %d", path, res.ContentLength)
			}
			if ex := rg.ended(); ex.Outcome != OK {
				t.Errorf("told as %+v", ex)
			}
		}
	}
}
