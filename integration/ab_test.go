package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// abCase is one request that is sent to a real Ollama twice, directly and through the proxy.
// Status, content type and body must agree.
type abCase struct {
	name   string
	method string // "" means POST
	path   string
	body   string
	header http.Header
}

const tiny = "gen-llama-tiny"

// quick has options that make an answer short and always the same.
const quick = `"options":{"temperature":0,"seed":1,"num_predict":4}`

// abCases returns the requests whose answers must be the same directly and through the proxy, for
// every endpoint whose body the proxy reads: keep_alive values, duplicate keys, text around the
// JSON, null fields, model names, and encodings.
func abCases() []abCase {
	var cases []abCase
	add := func(name, path, body string) {
		cases = append(cases, abCase{name: name + " " + path, path: path, body: body})
	}
	native := map[string]string{
		"/api/generate": `"model":"` + tiny + `","prompt":"hi","stream":false,` + quick,
		"/api/chat":     `"model":"` + tiny + `","messages":[{"role":"user","content":"hi"}],"stream":false,` + quick,
		// Errors of these two are compared as well: not every version embeds with a completion
		// model.
		"/api/embed":      `"model":"` + tiny + `","input":"hi"`,
		"/api/embeddings": `"model":"` + tiny + `","prompt":"hi"`,
	}
	for path, members := range native {
		if strings.HasPrefix(path, "/api/embed") {
			continue
		}
		// Spellings of keep_alive, some of which Ollama refuses.
		for _, v := range []string{`"-1"`, `"5"`, `""`, `"5m"`, `300`, `-1`, `1.5`, `"-1s"`, `null`, `true`, `[]`, `{}`, `"1h30m"`, `1e2`} {
			add("keep_alive "+v, path, `{"keep_alive":`+v+`,`+members+`}`)
		}
		// Duplicate keys: the last one wins.
		add("duplicate keys", path, `{"model":"nowhere","keep_alive":"x","keep_alive":"1m",`+members+`,"keep_alive":"2m"}`)
		add("duplicate model", path, `{`+members+`,"model":"nowhere"}`)
		add("other case", path, `{`+members+`,"Keep_Alive":"5m","STREAM":false}`)
		// Text before and after the first JSON value.
		add("junk behind", path, `{`+members+`} junk`)
		add("second value", path, `{`+members+`}{"model":"z"}`)
		add("newlines before", path, "\n\r\n \t{"+members+"}")
		add("deep nesting", path, `{`+members+`,"x":`+strings.Repeat(`[`, 64)+strings.Repeat(`]`, 64)+`}`)
		add("too deep nesting", path, `{`+members+`,"x":`+strings.Repeat(`[`, 10001)+strings.Repeat(`]`, 10001)+`}`)
		add("unknown fields and large integers", path, `{`+members+`,"x":123456789012345678901234567890,"y":0.1e-7}`)
		add("control character", path, `{`+members+`,"x":"`+"\n"+`"}`)
		add("broken escape", path, `{`+members+`,"x":"\q"}`)
		add("invalid UTF-8", path, `{`+members+`,"x":"`+"\xff\xfe"+`"}`)
		add("cut off", path, `{`+members)
		// Null for every field that an SDK leaves unset.
		for _, f := range []string{"messages", "tools", "format", "stream", "keep_alive", "template", "think", "images", "context", "raw", "shift", "truncate"} {
			add(f+" null behind", path, `{`+members+`,"`+f+`":null}`)
		}
		add("format empty", path, `{`+members+`,"format":""}`)
		add("format schema", path, `{`+members+`,"format":{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}}`)
		add("stream null in front", path, `{"stream":null,`+members+`}`)
		add("options null in front", path, `{"options":null,`+members+`}`)
		add("num_ctx", path, strings.Replace(`{`+members+`}`, `"temperature"`, `"num_ctx":2048,"temperature"`, 1))
	}
	for path := range native {
		for _, body := range []string{``, `null`, `[]`, `"x"`, `{}`, `{ }`, `0`, `tru`, "\xef\xbb\xbf{}", "{\x00\"\x00a\x00", `{"model":""}`, `{"model":null}`, `{"model":5}`, `{"keep_alive":"5m"}`} {
			add(fmt.Sprintf("body %.12q", body), path, body)
		}
		// Model names.
		for _, name := range []string{"nowhere", "GEN-LLAMA-TINY", tiny + ":latest", "library/" + tiny, "registry.ollama.ai/library/" + tiny, tiny + ":1b", "x:", ":", "a b", "../x", "localhost:5000/a/b:c", " " + tiny + " "} {
			add(fmt.Sprintf("name %q", name), path, strings.Replace(`{`+native[path]+`}`, tiny, name, 1))
		}
	}
	add("empty prompt loads", "/api/generate", `{"model":"`+tiny+`"}`)
	add("empty messages load", "/api/chat", `{"model":"`+tiny+`","messages":[]}`)
	add("render only", "/api/generate", `{"_debug_render_only":true,`+native["/api/generate"]+`}`)
	add("render only", "/api/chat", `{"_debug_render_only":true,`+native["/api/chat"]+`}`)
	for _, path := range []string{"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"} {
		for _, body := range []string{``, `null`, `{}`, `{"model":"nowhere","messages":[{"role":"user","content":"x"}],"prompt":"x","input":"x","max_tokens":3}`, `{"model":5}`, `[1]`} {
			add(fmt.Sprintf("body %.24q", body), path, body)
		}
	}
	message := `"messages":[{"role":"user","content":"hi"}],"max_tokens":4,"temperature":0,"seed":1`
	add("answer", "/v1/chat/completions", `{"model":"`+tiny+`",`+message+`}`)
	add("stream", "/v1/chat/completions", `{"model":"`+tiny+`","stream":true,`+message+`}`)
	add("answer", "/v1/messages", `{"model":"`+tiny+`","messages":[{"role":"user","content":"hi"}],"max_tokens":4,"temperature":0}`)
	add("answer", "/v1/completions", `{"model":"`+tiny+`","prompt":"hi","max_tokens":4,"temperature":0,"seed":1}`)
	add("answer", "/v1/responses", `{"model":"`+tiny+`","input":"hi","max_output_tokens":4,"temperature":0}`)

	// Content-Encoding, Content-Type and long bodies.
	cases = append(cases,
		abCase{name: "gzip header", path: "/api/chat", body: "\x1f\x8b\x08\x00", header: http.Header{"Content-Encoding": {"gzip"}}},
		abCase{name: "zstd header on plain text", path: "/v1/responses", body: "{}", header: http.Header{"Content-Encoding": {"zstd"}}},
		abCase{name: "no content type", path: "/api/generate", body: `{` + native["/api/generate"] + `}`, header: http.Header{"Content-Type": nil}},
		abCase{name: "text/plain", path: "/api/generate", body: `{` + native["/api/generate"] + `}`, header: http.Header{"Content-Type": {"text/plain"}}},
		abCase{name: "2 MB of unknown field", path: "/api/chat", body: `{` + native["/api/chat"] + `,"x":"` + strings.Repeat("a", 2<<20) + `"}`},
	)
	// Routes and methods that the proxy does not read.
	for _, p := range []string{"/", "/api/version", "/api/tags", "/api/ps", "/v1/models", "/v1/models/" + tiny, "/v1/models/nowhere", "/api/nowhere", "/api/chat", "/api//chat", "/api/tags/", "/api/generate?x=%zz;y", "/%2e%2e/api/tags", "/api/blobs/sha256:00", "/nowhere%2Fat%20all"} {
		for _, method := range []string{"GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "PURGE"} {
			cases = append(cases, abCase{name: method + " " + p, method: method, path: p})
		}
	}
	add("show", "/api/show", `{"model":"`+tiny+`"}`)
	add("show unknown", "/api/show", `{"model":"nowhere"}`)
	add("show empty", "/api/show", ``)
	add("escaped path", "/api/%63hat", `{`+native["/api/chat"]+`}`)
	add("trailing slash", "/api/chat/", `{`+native["/api/chat"]+`}`)
	slices.SortFunc(cases, func(a, b abCase) int { return strings.Compare(a.name, b.name) })
	return cases
}

// guardCases differ in Host and Origin. Ollama sends a refusal without a body, the proxy one with a
// reason.
func guardCases() []abCase {
	var cases []abCase
	for _, host := range []string{"evil.example", "localhost", "LOCALHOST:1", "127.0.0.1:99", "10.1.2.3", "8.8.8.8", "a.local", "a.localhost", "a.internal", "local", "evil.example:11435", "[::1]:5"} {
		cases = append(cases, abCase{name: "host " + host, method: "GET", path: "/api/version", header: http.Header{"Host": {host}}})
	}
	for _, origin := range []string{"http://evil.example", "http://localhost", "https://localhost:3000", "http://127.0.0.1:1", "http://0.0.0.0", "null", "app://x", "file://", "vscode-webview://a", "chrome-extension://abc", "http://localhost.evil.example", "http://127.0.0.2"} {
		for _, method := range []string{"GET", "OPTIONS"} {
			cases = append(cases, abCase{name: method + " origin " + origin, method: method, path: "/api/version", header: http.Header{"Origin": {origin}, "Access-Control-Request-Method": {"POST"}}})
		}
	}
	return cases
}

func TestAB(t *testing.T) {
	for _, version := range realollama.Versions() {
		t.Run(version, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}})
			p := startProxy(t, server.URL())
			for _, c := range abCases() {
				t.Run(c.name, func(t *testing.T) {
					direct, proxied := c.send(t, server.URL()), c.send(t, p.URL)
					if !reflect.DeepEqual(direct, proxied) {
						t.Errorf("direct  %s\nproxied %s", direct, proxied)
					}
				})
			}
			for _, c := range guardCases() {
				t.Run(c.name, func(t *testing.T) {
					direct, proxied := c.send(t, server.URL()), c.send(t, p.URL)
					if direct.status != proxied.status || !reflect.DeepEqual(direct.cors, proxied.cors) && direct.status != http.StatusForbidden {
						t.Errorf("direct  %s\nproxied %s", direct, proxied)
					}
				})
			}
		})
	}
}

// abAnswer is the compared part of an answer.
type abAnswer struct {
	status      int
	contentType string
	length      string // Content-Length of answers to HEAD
	cors        http.Header
	body        any
}

func (a abAnswer) String() string {
	return fmt.Sprintf("%d %s %v length %q: %.500s", a.status, a.contentType, a.cors, a.length, fmt.Sprint(a.body))
}

func (c abCase) send(t *testing.T, base string) abAnswer {
	t.Helper()
	method := c.method
	if method == "" {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(t.Context(), method, base, strings.NewReader(c.body))
	if err != nil {
		t.Fatal(err)
	}
	path, query, _ := strings.Cut(c.path, "?")
	req.URL.Opaque, req.URL.RawQuery = path, query // exactly as written in the case
	req.Header.Set("Content-Type", "application/json")
	for k, v := range c.header {
		req.Header[k] = v
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
		req.Header.Del("Host")
	}
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	defer client.CloseIdleConnections()
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := abAnswer{status: res.StatusCode, contentType: res.Header.Get("Content-Type"), body: stable(string(text)), cors: http.Header{}}
	if method == http.MethodHead {
		a.length = res.Header.Get("Content-Length")
	}
	for k, v := range res.Header {
		if strings.HasPrefix(k, "Access-Control-") {
			a.cors[k] = v
		}
	}
	return a
}

// volatile has the members of an answer that differ from one request to the next.
var volatile = map[string]bool{
	"created_at": true, "total_duration": true, "load_duration": true, "prompt_eval_duration": true, "eval_duration": true, "id": true, "request_id": true, "created": true,
	"item_id": true, "completed_at": true, "expires_at": true, "size_vram": true, "cached_tokens": true, "prompt_eval_cached_count": true, "cache_read_input_tokens": true,
	"input_tokens": true, // Anthropic's excludes cached tokens
}

// stable returns an answer without its volatile members: a list of JSON values, or the text itself.
// A stream may be split differently each time, so the texts of its pieces are joined.
func stable(text string) any {
	var values []any
	text = strings.ReplaceAll(text, "data: [DONE]", "")
	var rest strings.Builder
	for line := range strings.Lines(text) {
		rest.WriteString(strings.TrimPrefix(line, "data: "))
	}
	var events []string
	plain := rest.String()
	for line := range strings.Lines(plain) {
		if event, ok := strings.CutPrefix(line, "event: "); ok {
			events = append(events, event)
			plain = strings.Replace(plain, line, "", 1)
		}
	}
	dec := json.NewDecoder(strings.NewReader(plain))
	for {
		var v any
		if err := dec.Decode(&v); err == io.EOF {
			break
		} else if err != nil {
			return text
		}
		values = append(values, withoutVolatile(v))
	}
	return []any{events, values}
}

// anyOrder returns a text with its lines sorted: Ollama writes a model's parameters in another
// order each time.
func anyOrder(text string) string {
	return strings.Join(slices.Sorted(strings.SplitSeq(text, "\n")), "\n")
}

func withoutVolatile(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			text, ok := e.(string)
			switch {
			case volatile[k]:
				delete(v, k)
			case ok && (k == "parameters" || k == "modelfile"):
				v[k] = anyOrder(text)
			default:
				v[k] = withoutVolatile(e)
			}
		}
	case []any:
		for i := range v {
			v[i] = withoutVolatile(v[i])
		}
	}
	return v
}
