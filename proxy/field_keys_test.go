package proxy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

const theKey = "sk-proxy-3f9a"

func withKeys(t *testing.T, text string) Guard {
	t.Helper()
	keys, err := ParseKeys(text)
	if err != nil {
		t.Fatal(err)
	}
	return Guard{Keys: keys}
}

// TestKeysOff: if no keys are required, clients' credentials go to the upstream.
func TestKeysOff(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h")})
	for _, path := range []string{"/api/chat", "/v1/chat/completions", "/v1/messages", "/api/tags", "/", "/api/pull"} {
		for _, header := range []string{"Authorization: Bearer dummy", "Authorization: Bearer ", "Authorization: Basic dXNlcjpwYXNz", "X-Api-Key: sk-ant-123", "X-Api-Key: ollama", "Api-Key: azure", "Authorization: ollama"} {
			client := rg.dial()
			client.send(rawPost(path, `{"model":"m"}`, header))
			client.receive()
			client.Close()
			name, value, _ := strings.Cut(header, ": ")
			if got := f.next(); !slices.Equal(got.values(name), []string{strings.TrimSpace(value)}) {
				t.Errorf("%s %s went as %q", path, header, got.headers)
			}
		}
	}
}

// TestKeysOn: which credentials are accepted, and which of them reach the upstream.
func TestKeysOn(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), Guard: withKeys(t, "# people\n\n"+theKey+"\n  second-key  \r\nthird:key=\n")})
	for _, tt := range []struct {
		path    string
		headers []string
		in      bool
		kept    []string // the credentials that reach the upstream
	}{
		{"/api/chat", []string{"Authorization: Bearer " + theKey}, true, nil},
		{"/api/chat", []string{"Authorization: bearer " + theKey}, true, nil},
		{"/api/chat", []string{"Authorization: BEARER  " + theKey + " "}, true, nil},
		{"/api/chat", []string{"authorization: Bearer second-key"}, true, nil},
		{"/api/chat", []string{"Authorization: Bearer third:key="}, true, nil},
		{"/v1/chat/completions", []string{"Authorization: Bearer " + theKey}, true, nil},
		{"/v1/messages", []string{"X-Api-Key: " + theKey}, true, nil},
		{"/v1/messages/count_tokens", []string{"X-Api-Key: " + theKey}, true, nil},
		{"/v1/messages", []string{"Authorization: Bearer " + theKey}, true, nil},
		{"/v1/messages", []string{"Authorization: Bearer " + theKey, "X-Api-Key: for-upstream"}, true, []string{"X-Api-Key: for-upstream"}},
		{"/v1/messages", []string{"Authorization: Bearer for-upstream", "X-Api-Key: " + theKey}, true, []string{"Authorization: Bearer for-upstream"}},
		{"/v1/messages", []string{"Authorization: Bearer second-key", "X-Api-Key: " + theKey}, true, nil},
		// A client may send its key in both headers on every path; neither reaches the upstream.
		{"/api/chat", []string{"Authorization: Bearer " + theKey, "X-Api-Key: " + theKey}, true, nil},
		{"/v1/chat/completions", []string{"Authorization: Bearer second-key", "X-Api-Key: " + theKey}, true, nil},
		{"/api/chat", []string{"Authorization: Bearer " + theKey, "X-Api-Key: for-upstream"}, true, []string{"X-Api-Key: for-upstream"}},
		{"/api/chat", []string{"Authorization: Bearer " + theKey, "Cookie: a=b"}, true, nil},

		{"/api/chat", nil, false, nil},
		{"/api/chat", []string{"Authorization: Bearer dummy"}, false, nil},
		{"/api/chat", []string{"Authorization: Bearer " + theKey + "x"}, false, nil},
		{"/api/chat", []string{"Authorization: Bearer " + theKey[1:]}, false, nil},
		{"/api/chat", []string{"Authorization: Bearer " + strings.ToUpper(theKey)}, false, nil},
		{"/api/chat", []string{"Authorization: Bearer"}, false, nil},
		{"/api/chat", []string{"Authorization: Bearer "}, false, nil},
		{"/api/chat", []string{"Authorization: " + theKey}, false, nil},
		{"/api/chat", []string{"Authorization: Basic " + theKey}, false, nil},
		{"/api/chat", []string{"Authorization: Token " + theKey}, false, nil},
		{"/api/chat", []string{"Authorization: Bearer # people"}, false, nil},
		{"/api/chat", []string{"Authorization: Bearer " + theKey + " second-key"}, false, nil},
		{"/api/chat", []string{"X-Api-Key: " + theKey}, false, nil}, // only on Anthropic's paths
		{"/api/chat?key=" + theKey, nil, false, nil},
		{"/api/chat", []string{"Cookie: Authorization=" + theKey}, false, nil},
		{"/v1/messages", []string{"X-Api-Key: dummy"}, false, nil},
		{"/v1/messages", []string{"X-Api-Key:"}, false, nil},
		{"/_cacheproxy/none", nil, false, nil},
		{"/metrics", nil, false, nil},
		{"/api/version", nil, false, nil}, {"/api/tags", nil, false, nil}, {"/unknown", nil, false, nil}, {"//", nil, false, nil}, {"/_cacheproxy/healthx", nil, false, nil},
	} {
		name := fmt.Sprint(tt.path, tt.headers)
		client := rg.dial()
		client.send(rawPost(tt.path, `{"model":"m"}`, append(tt.headers, "X-Other: 1")...))
		res := client.receive()
		client.Close()
		rg.ended()
		if !tt.in {
			if !strings.HasPrefix(res.line, "HTTP/1.1 401 ") {
				t.Errorf("%s: %s", name, res.line)
			}
			f.none()
			continue
		}
		if !strings.HasPrefix(res.line, "HTTP/1.1 200 ") {
			t.Errorf("%s: %s %s", name, res.line, res.body)
			continue
		}
		got := f.next()
		var creds []string
		for _, h := range got.headers {
			if k, _, _ := strings.Cut(h, ":"); k == "Authorization" || k == "X-Api-Key" {
				creds = append(creds, h)
			}
			if strings.Contains(h, theKey) || strings.Contains(h, "second-key") || strings.Contains(h, "third") {
				t.Errorf("%s: the upstream got %q", name, h)
			}
		}
		if !slices.Equal(creds, tt.kept) || got.value("X-Other") != "1" {
			t.Errorf("%s went with %q, want %q", name, got.headers, tt.kept)
		}
	}
	for _, secret := range []string{theKey, "second-key", "third:key", "dummy", "for-upstream"} {
		if strings.Contains(strings.ReplaceAll(rg.log.String(), "?key="+theKey, ""), secret) {
			t.Errorf("the log tells %q", secret)
		}
	}
}

// TestKeyRefusalShapes: 401 in the dialect of the path, with the CORS headers that let a web page
// read it.
func TestKeyRefusalShapes(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{Guard: withKeys(t, theKey)})
	for path, read := range dialects {
		if path == "/" {
			continue // a GET needs no key
		}
		for _, method := range []string{"GET", "POST", "DELETE"} {
			res, text := rg.do(method, path, "", "Origin: https://localhost")
			message, kind, err := read(text)
			if res.StatusCode != 401 || err != nil || !strings.Contains(message, "API key") || strings.HasPrefix(path, "/v1/") && kind != "authentication_error" {
				t.Errorf("%s %s: %d %q, %v", method, path, res.StatusCode, text, err)
			}
			if res.Header.Get("WWW-Authenticate") != "Bearer" || res.Header.Get("Access-Control-Allow-Origin") != "https://localhost" || res.Header.Get("Content-Type") != "application/json; charset=utf-8" {
				t.Errorf("%s %s: headers %v", method, path, res.Header)
			}
			if ex := rg.ended(); ex.Outcome != Refused || ex.Status != 401 {
				t.Errorf("told as %+v", ex)
			}
		}
	}
	f.none()
}

// TestKeyless: probes and preflights need no key; everything else does.
func TestKeyless(t *testing.T) {
	f := newFake(t, func(r received) string {
		if strings.HasPrefix(r.line, "HEAD") {
			return "HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n"
		}
		return answer(200, "text/plain", "Ollama is running")
	})
	metrics := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "a_metric 1\n") })
	rg := newRig(t, f.URL, &Handler{Guard: withKeys(t, theKey), Metrics: metrics})
	for _, tt := range []struct {
		method, path, header string
		want                 int
	}{
		{"GET", "/", "", 200}, {"HEAD", "/", "", 200}, {"GET", "/", "Authorization: Bearer dummy", 200}, {"HEAD", "/", "Authorization: Bearer " + theKey, 200}, {"POST", "/", "", 401}, {"DELETE", "/", "", 401},
		{"GET", pathHealth, "", 200}, {"HEAD", pathHealth, "", 200}, {"POST", pathHealth, "", 401},
		{"GET", pathReady, "", 503}, {"HEAD", pathReady, "", 503},
		{"GET", PathMetrics, "", 401}, {"HEAD", PathMetrics, "", 401}, {"GET", PathMetrics, "Authorization: Bearer " + theKey, 200}, {"GET", PathMetrics, "Authorization: Bearer x", 401},
		{"GET", "/_cacheproxy/none", "Authorization: Bearer " + theKey, 404}, {"GET", "/_cacheproxy/", "", 200}, {"GET", pathEvents, "", 401},
		{"OPTIONS", "/api/chat", "Origin: http://localhost:5173", 204}, {"OPTIONS", "/v1/messages", "Origin: app://x", 204}, {"OPTIONS", PathMetrics, "Origin: http://localhost", 204},
		{"OPTIONS", "/api/chat", "Origin: http://evil.example", 403}, {"GET", "/", "Origin: http://evil.example", 403}, {"GET", pathHealth, "Origin: http://evil.example", 403},
		{"GET", pathHealth, "Host: evil.example", 403}, {"GET", PathMetrics, "Host: evil.example", 403},
		{"HEAD", "/api/tags", "", 401}, {"GET", "/api/version", "", 401}, {"GET", "/%2F", "", 401}, {"GET", "/?x=y", "", 200},
	} {
		var headers []string
		if tt.header != "" {
			headers = append(headers, tt.header)
		}
		res, text := rg.do(tt.method, tt.path, "", headers...)
		if res.StatusCode != tt.want {
			t.Errorf("%s %s %q: %d %s, want %d", tt.method, tt.path, tt.header, res.StatusCode, text, tt.want)
		}
	}
	for len(f.reqs) > 0 {
		if got := f.next(); strings.Contains(fmt.Sprint(got.headers), theKey) || !strings.Contains(got.line, " / ") && !strings.Contains(got.line, " /?x=y ") {
			t.Errorf("the upstream got %s %q", got.line, got.headers)
		}
	}
}

// TestStrangers: pages that need no key show a client without one whether all is well, and nothing
// else. An upstream gets nothing from such a client except the question.
func TestStrangers(t *testing.T) {
	f := newFake(t, func(r received) string {
		if strings.Contains(r.line, "/api/") {
			return answer(200, "application/json", `{"version":"0.34.1","models":[]}`)
		}
		return answer(200, "text/plain", "Ollama is running")
	})
	away := refusing(t)
	secret := []string{"big", "small", "0.34.1", f.URL.Host, away.Host}
	for _, upstream := range []*url.URL{f.URL, away} {
		rg := newRigOf(t, &Handler{Guard: withKeys(t, theKey)}, map[string]*url.URL{"big": upstream, "small": away})
		for _, b := range rg.h.Upstreams {
			b.Poll(t.Context())
		}
		for len(f.reqs) > 0 {
			f.next()
		}
		check := func(what string, got received) {
			t.Helper()
			for _, word := range secret {
				if strings.Contains(fmt.Sprint(got.line, got.headers, string(got.body), got.trailer), word) {
					t.Errorf("%s tells %q: %s %q %s", what, word, got.line, got.headers, got.body)
				}
			}
		}
		for _, state := range []string{"", "draining", "looped"} {
			for _, b := range rg.h.backends() {
				b.draining.Store(state == "draining")
				b.looped.Store(state == "looped")
			}
			for _, path := range []string{"/", "/?x=y", pathReady, pathHealth} {
				for _, headers := range [][]string{nil, {"X-Cacheproxy-Upstream: small"}, {"X-Cacheproxy-Upstream: none"}, {"Authorization: Bearer dummy"}, {"X-Api-Key: " + theKey}, {"Expect: 100-continue"}} {
					for _, body := range []string{"", "Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n"} {
						if body == "" {
							body = "\r\n"
						}
						client := rg.dial()
						client.send("GET " + path + " HTTP/1.1\r\nHost: localhost\r\n" + lines(headers) + body)
						got := client.receive()
						client.Close()
						rg.ended()
						check(fmt.Sprint(state, path, headers), got)
						if upstream == f.URL && !strings.HasPrefix(path, ownPrefix) && state == "" {
							if up := f.next(); len(up.body) > 0 || up.chunked || up.values("Content-Length") != nil || up.values("Trailer") != nil || up.values("Expect") != nil {
								t.Errorf("%s %q: the upstream got %q and %q", path, headers, up.headers, up.body)
							}
							if string(got.body) != "Ollama is running" {
								t.Errorf("%s %q: %s %s", path, headers, got.line, got.body)
							}
						}
					}
				}
			}
		}
		f.none()
		for _, b := range rg.h.backends() {
			b.draining.Store(false)
			b.looped.Store(false)
		}
		// A client with a key sees everything.
		for _, path := range []string{"/", pathReady} {
			res, text := rg.do("GET", path, "", "Authorization: Bearer "+theKey)
			if upstream == f.URL && !strings.Contains(res.Header.Get(headerUpstream)+text, "big") || upstream == away && path == "/" && !strings.Contains(text, away.Host) {
				t.Errorf("%s with a key: %v %s", path, res.Header, text)
			}
		}
		if upstream == f.URL {
			f.next()
		}
	}
}

// TestChangesFromPages: a page of another origin, even a local or an allowed one, cannot change
// anything of the proxy's own. A page of the proxy's own origin can, and so can a client that is
// not a page.
func TestChangesFromPages(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{Guard: Guard{AllowOrigins: []string{"*"}}})
	host := strings.TrimPrefix(rg.URL, "http://")
	for _, verb := range []string{"drain", "resume"} {
		for origin, want := range map[string]int{
			"": 200, rg.URL: 200, "https://" + host: 200,
			"http://localhost:3000": 403, "http://localhost": 403, "http://127.0.0.1": 403, "http://" + host + "0": 403, "app://x": 403, "file://": 403, "null": 403, "https://chat.example.com": 403,
			"vscode-webview://x": 403,
		} {
			rg.h.backends()[0].draining.Store(verb == "resume")
			var headers []string
			if origin != "" {
				headers = append(headers, "Origin: "+origin)
			}
			res, text := rg.do("POST", pathUpstreams+"up/"+verb, "", headers...)
			if changed := rg.h.backends()[0].draining.Load() == (verb == "drain"); res.StatusCode != want || changed != (want == 200) {
				t.Errorf("%s from %q: %d %s, and it was done: %v", verb, origin, res.StatusCode, text, changed)
			}
			if res, _ := rg.do("GET", strings.TrimSuffix(pathUpstreams, "/"), "", headers...); res.StatusCode != 200 {
				t.Errorf("%q may not read: %d", origin, res.StatusCode)
			}
		}
	}
	f.none()
}

// TestPreflightOfKeys: a page may send a key in both headers that the proxy checks. If no keys are
// required, preflights are Ollama's (TestOriginsAsOllama).
func TestPreflightOfKeys(t *testing.T) {
	f := newFake(t, okAnswer)
	var without string
	for _, guard := range []Guard{{}, withKeys(t, theKey)} {
		rg := newRig(t, f.URL, &Handler{Guard: guard})
		for _, path := range []string{"/v1/messages", "/api/chat", "/v1/messages/count_tokens"} {
			res, _ := rg.do("OPTIONS", path, "", "Origin: http://localhost:3000", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: x-api-key")
			allowed := res.Header.Get("Access-Control-Allow-Headers")
			if guard.Keys == nil {
				without = allowed
			}
			if res.StatusCode != 204 || guard.Keys == nil && strings.Contains(strings.ToLower(allowed), "api-key") || guard.Keys != nil && allowed != without+",X-Api-Key" {
				t.Errorf("%s: %d, allowed are %s", path, res.StatusCode, allowed)
			}
		}
	}
	f.none()
}

// TestCORSOnOwnAnswers: a web page can read the proxy's own answers. The upstream's CORS headers
// are replaced, not repeated.
func TestCORSOnOwnAnswers(t *testing.T) {
	const origin = "http://localhost:5173"
	f := newFake(t, func(received) string {
		return "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\nVary: Accept-Encoding\r\nContent-Length: 2\r\n\r\n{}"
	})
	rg := newRig(t, f.URL, &Handler{})
	for path, status := range map[string]int{"/api/tags": 200, "/v1/models": 200, "/_cacheproxy/none": 404, pathHealth: 200, pathReady: 503} {
		res, _ := rg.do("GET", path, "", "Origin: "+origin)
		h := res.Header
		if res.StatusCode != status || !slices.Equal(h["Access-Control-Allow-Origin"], []string{origin}) || h["Access-Control-Allow-Credentials"] != nil || !slices.Contains(h["Vary"], "Origin") {
			t.Errorf("%s: %d %v", path, res.StatusCode, h)
		}
		if status == 200 && path != pathHealth && !slices.Contains(h["Vary"], "Accept-Encoding") {
			t.Errorf("%s: the upstream's Vary is lost: %v", path, h)
		}
		// A client that is not a page of another origin gets the upstream's own headers.
		res, _ = rg.do("GET", path, "")
		if h := res.Header; path[1] != '_' && (h.Get("Access-Control-Allow-Origin") != "*" || slices.Contains(h["Vary"], "Origin")) {
			t.Errorf("%s without an Origin: %v", path, h)
		}
	}
	for len(f.reqs) > 0 { // the upstream would judge the page by another Host
		if got := f.next(); got.values("Origin") != nil {
			t.Errorf("the upstream got Origin %q", got.values("Origin"))
		}
	}
	res, text := rg.do("GET", "/v1/models", "", "Origin: http://evil.example")
	if res.StatusCode != 403 || res.Header.Get("Access-Control-Allow-Origin") != "" || !strings.Contains(text, "permission_error") {
		t.Errorf("%d %v %s", res.StatusCode, res.Header, text)
	}
}

func TestParseKeys(t *testing.T) {
	for text, want := range map[string][]string{
		"a": {"a"}, "a\nb\n": {"a", "b"}, "# x\na\n\n#b\n": {"a"}, "a\r\nb\r\n": {"a", "b"}, "a\rb\r": {"a", "b"},
		"\ufeffa\n": {"a"}, "\ufeff# people\r\n \ta\t \r\n\ufeffb": {"a", "b"}, "\u00a0a\u00a0\n\v\n": {"a"}, "\ufeff \ufeffa": {"a"},
		"a=b:c/+~é": {"a=b:c/+~é"},
	} {
		k, err := ParseKeys(text)
		if err != nil || k.Len() != len(want) {
			t.Errorf("%q: %v, %v", text, k, err)
			continue
		}
		for _, key := range want {
			if k.check(key) == nil {
				t.Errorf("%q: %q is no key", text, key)
			}
		}
	}
	for _, text := range []string{"", "\n\n", "# only\n", "a b c\n", "a\tb\tc", "a weight=2", "\ufeff", "\ufeff\r\n", "\xff\xfea\x00b\x00", "a\x00b\x00", "ok\nke\xffy"} {
		if k, err := ParseKeys(text); err == nil {
			t.Errorf("%q gives %d keys", text, k.Len())
		} else if strings.Contains(text, "a") && strings.Contains(err.Error(), "b c") {
			t.Errorf("the error tells the key: %v", err)
		}
	}
}

// TestReplaceKeys: new keys apply from the next request on; a file with errors leaves the old ones.
func TestReplaceKeys(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{Guard: withKeys(t, "one\ntwo")})
	for _, step := range []struct {
		text string
		fail bool
		in   map[string]int
	}{
		{"two\nthree", false, map[string]int{"one": 401, "two": 200, "three": 200}},
		{"# nobody", true, map[string]int{"one": 401, "two": 200, "three": 200}},
		{"four x y", true, map[string]int{"two": 200, "four": 401}},
		{"four", false, map[string]int{"two": 401, "four": 200}},
	} {
		if err := rg.h.Guard.Keys.Replace(step.text); (err != nil) != step.fail {
			t.Errorf("%q: %v", step.text, err)
		}
		for key, want := range step.in {
			if res, _ := rg.do("GET", "/api/version", "", "Authorization: Bearer "+key); res.StatusCode != want {
				t.Errorf("after %q: %s gets %d, want %d", step.text, key, res.StatusCode, want)
			}
		}
	}
}

// TestWhoIsCharged: a client is identified by the key that was checked, whatever its spelling, and
// whatever else is in the header.
func TestWhoIsCharged(t *testing.T) {
	g := withKeys(t, "one\ntwo")
	who := func(path, remote string, headers ...string) string {
		r := httptest.NewRequest("POST", path, nil)
		r.RemoteAddr = remote
		for _, h := range headers {
			k, v, _ := strings.Cut(h, ": ")
			r.Header.Add(k, v)
		}
		client, _ := g.key(r)
		return (*TrustedProxies)(nil).clientOf(r, client.client())
	}
	one, two := who("/api/chat", "10.0.0.1:1", "Authorization: Bearer one"), who("/api/chat", "10.0.0.1:1", "Authorization: Bearer two")
	if one == two {
		t.Error("two keys are one client")
	}
	for want, same := range map[string][][]string{
		one: {
			{"/api/chat", "Authorization: bEaReR one"}, {"/api/chat", "Authorization: BEARER   one  "}, {"/api/chat", "Authorization: Bearer one", "Authorization: Bearer junk"},
			{"/api/chat", "Authorization: Bearer one", "X-Api-Key: junk"}, {"/api/chat", "Authorization: Bearer one", "X-Api-Key: two"}, {"/v1/messages", "Authorization: Bearer one", "X-Api-Key: two"},
			{"/v1/messages", "X-Api-Key: one"}, {"/v1/messages", "X-Api-Key: one", "Authorization: Bearer junk"}, {"/v1/messages", "X-Api-Key: one", "Authorization: junk"},
		},
		two: {{"/v1/messages", "X-Api-Key: two", "Authorization: Basic b25l"}, {"/v1/chat/completions", "Authorization: bearer two", "X-Api-Key: one"}},
	} {
		for i, h := range same {
			if got := who(h[0], fmt.Sprintf("10.0.0.%d:%d", i, i), h[1:]...); got != want {
				t.Errorf("%q is another client", h)
			}
		}
	}
	g.Keys = nil // without keys, clients are distinguished by address
	if who("/api/chat", "10.0.0.1:1", "Authorization: Bearer one") != who("/api/chat", "10.0.0.1:2", "X-Api-Key: junk") || who("/api/chat", "10.0.0.1:1") == who("/api/chat", "10.0.0.2:1") {
		t.Error("clients without keys are not told apart by their addresses")
	}
}

// TestJunkIsNoClient: a client that writes its key differently each time gets no more than its fair
// share.
func TestJunkIsNoClient(t *testing.T) {
	const each = 40
	f := newFake(t, nil)
	rg := newRig(t, f.URL, &Handler{Guard: withKeys(t, "honest\ncheat"), Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1})})
	first := rg.dial()
	first.send(rawPost("/v1/messages", chatWith("s", "first", ""), "X-Api-Key: honest"))
	up := f.accept()
	up.receive()
	for i := range each {
		scheme := []byte("bearer")
		for bit := range scheme {
			if i>>bit&1 != 0 {
				scheme[bit] -= 'a' - 'A'
			}
		}
		rg.dial().send(rawPost("/v1/messages", chatWith(fmt.Sprint("c", i), "cheat", ""), fmt.Sprintf("Authorization: %s cheat", scheme), fmt.Sprint("X-Api-Key: junk", i)))
		waiting(t, rg, i+1)
	}
	for i := range each {
		rg.dial().send(rawPost("/v1/messages", chatWith(fmt.Sprint("h", i), "honest", ""), "Authorization: Bearer honest"))
		waiting(t, rg, each+i+1)
	}
	honest := 0
	for range each {
		up.send(answer(200, "application/json", chatAnswer))
		if strings.Contains(string(up.receive().body), "honest") {
			honest++
		}
	}
	if honest < each/4 {
		t.Errorf("the honest client got %d of %d", honest, each)
	}
}
