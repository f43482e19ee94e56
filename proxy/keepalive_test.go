package proxy

import (
	"fmt"
	"io"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

var nativePaths = []string{"/api/generate", "/api/chat", "/api/embed", "/api/embeddings"}

const day = `"24h0m0s"`

// TestKeepAliveSpellings compares the exact bytes that go upstream, for every way to write
// keep_alive, on every native endpoint, under every policy, with the operator's 24h.
func TestKeepAliveSpellings(t *testing.T) {
	type class int
	const (
		absent class = iota
		invalid
		zero
		shorter
		equal
		longer
	)
	// The new value under each policy; "" leaves the client's.
	want := map[class]map[KeepAlivePolicy]string{
		absent:  {IfAbsent: day, AtLeast: day, Force: day},
		invalid: {},
		zero:    {},
		shorter: {AtLeast: day, Force: day},
		equal:   {},
		longer:  {Force: day},
	}
	did := map[class]map[KeepAlivePolicy]string{
		absent:  {IfAbsent: didInject, AtLeast: didInject, Force: didInject},
		invalid: {},
		zero:    {},
		shorter: {AtLeast: didRaise, Force: didForce},
		equal:   {},
		longer:  {Force: didForce},
	}
	values := []struct {
		value string
		class class
	}{
		{`null`, absent},
		// Ollama answers 400 to these; the proxy has no opinion.
		{`"-1"`, invalid}, {`"5"`, invalid}, {`""`, invalid}, {`" 5m"`, invalid}, {`"5 m"`, invalid}, {`"forever"`, invalid},
		{`true`, invalid}, {`false`, invalid}, {`[]`, invalid}, {`[5]`, invalid}, {`{}`, invalid}, {`{"keep_alive":5}`, invalid}, {`1e400`, invalid},
		{`"24"`, invalid}, {`"1d"`, invalid},
		{`0`, zero}, {`"0"`, zero}, {`"0s"`, zero}, {`0.0`, zero}, {`-0`, zero}, {`-0.0`, zero}, {`0e5`, zero}, {`"0h0m"`, zero}, {`"-0s"`, zero}, {`1e-12`, zero},
		{`"+0"`, zero}, {`"\u0030"`, zero},
		{`"5m"`, shorter}, {`300`, shorter}, {`1e2`, shorter}, {`0.5`, shorter}, {`"1ns"`, shorter}, {`"5\u006d"`, shorter}, {`1E+1`, shorter}, {`"1.5h"`, shorter}, {`86399.9`, shorter},
		{`"24h"`, equal}, {`"24h0m0s"`, equal}, {`86400`, equal}, {`8.64e4`, equal}, {`"1440m"`, equal},
		{`-1`, longer}, {`-1.5`, longer}, {`-1e-9`, longer}, {`"-1s"`, longer}, {`"-5m"`, longer}, {`"48h"`, longer}, {`86401`, longer},
	}
	keys := []string{
		`"keep_alive"`, `"KEEP_ALIVE"`, `"Keep_Alive"`, `"\u006beep_alive"`, `"keep\u005falive"`, `"keep\u005Falive"`,
		`"\u212aeep_alive"`, "\"\u212aeep_alive\"", "\"\u212aEEP_ALIVE\"",
	}
	f := newFake(t, okAnswer)
	for _, policy := range []KeepAlivePolicy{IfAbsent, AtLeast, Force} {
		t.Run(string(policy), func(t *testing.T) {
			rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, policy, "24h")})
			n := 0
			check := func(path, head, value, tail, want, wantDid string) {
				t.Helper()
				n++ // a model for each case: what one client asked for holds for the next
				model := fmt.Sprintf("m%d", n)
				head = strings.ReplaceAll(head, "MODEL", model)
				rg.post(path, head+value+tail)
				got := f.next()
				if want == "" {
					want = value
				}
				if string(got.body) != head+want+tail {
					t.Errorf("POST %s %s%s%s\nwent as %s\nwant    %s", path, head, value, tail, got.body, head+want+tail)
				}
				if cl := got.value("Content-Length"); cl != fmt.Sprint(len(got.body)) || got.chunked {
					t.Errorf("%s%s%s: Content-Length %q, chunked %v, body %d", head, value, tail, cl, got.chunked, len(got.body))
				}
				if wantDid == "" {
					wantDid = didKeep
				}
				if ex := rg.ended(); ex.KeepAlive != wantDid || ex.Model != model {
					t.Errorf("%s%s%s: told as %q of %q, want %q of %q", head, value, tail, ex.KeepAlive, ex.Model, wantDid, model)
				}
			}
			const tail = ` , "unknown":{"z":1,"a":[12345678901234567890,1.0e0]} ,"stream":false}`
			for i, v := range values {
				for j, key := range keys {
					path := nativePaths[(i+j)%len(nativePaths)]
					check(path, "{\"model\":\"MODEL\",\n "+key+" :\t", v.value, tail, want[v.class][policy], did[v.class][policy])
				}
				for _, path := range nativePaths {
					check(path, `{"model":"MODEL","keep_alive":`, v.value, "}", want[v.class][policy], did[v.class][policy])
					check(path, `{"keep_alive":`, v.value, fmt.Sprintf(`,"model":"m%d"}`, n+1), want[v.class][policy], did[v.class][policy])
				}
			}
			for _, path := range nativePaths {
				n++
				body := fmt.Sprintf(`{ "model":"m%d"%s`, n, tail)
				rg.post(path, body)
				if got := f.next(); string(got.body) != `{"keep_alive":`+day+`,`+body[1:] {
					t.Errorf("%s %s went as %s", path, body, got.body)
				}
				rg.ended()
			}
		})
	}
}

// TestKeepAliveNotTheKey: members that encoding/json does not take for keep_alive.
func TestKeepAliveNotTheKey(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, IfAbsent, "24h")})
	for i, key := range []string{`keep-alive`, `keepalive`, ` keep_alive`, `keep_alive `, "keep_al\u0131ve", `keep\\u005falive`, `\"keep_alive`, ``, `keep_alive\u0000`, "keep_alive\xff"} {
		body := fmt.Sprintf(`{"%s":"1m","model":"m%d"}`, key, i)
		rg.post("/api/chat", body)
		if got := string(f.next().body); got != `{"keep_alive":`+day+`,`+body[1:] {
			t.Errorf("%s went as %s", body, got)
		}
	}
}

// TestKeepAliveBodies: odd bodies, with the exact bytes that go upstream.
func TestKeepAliveBodies(t *testing.T) {
	const inject = `"keep_alive":` + day
	deep := strings.Repeat(`{"a":[`, 32) + strings.Repeat(`]}`, 32)
	tooDeep := strings.Repeat(`[`, 10001) + strings.Repeat(`]`, 10001)
	type want = map[KeepAlivePolicy]string
	for _, tt := range []struct {
		name, in string
		want     want   // under each policy; missing: unchanged
		model    string // as told
	}{
		{name: "empty object", in: `{}`},
		{name: "blank object", in: `{ }`},
		{name: "no body", in: ``},
		{name: "null", in: `null`}, {name: "array", in: `[]`}, {name: "string", in: `"x"`}, {name: "number", in: `5`},
		{name: "array of requests", in: `[{"model":"m"}]`},
		{name: "model null", in: `{"model":null}`},
		{name: "model number", in: `{"model":5}`},
		{name: "model empty", in: `{"model":""}`},
		{name: "model bad", in: `{"model":"a b"}`, model: invalidModel},
		{name: "truncated", in: `{"model":"m"`}, {name: "trailing comma", in: `{"model":"m",}`}, {name: "single quotes", in: `{'model':'m'}`},
		{name: "comment", in: `{/**/"model":"m"}`}, {name: "no colon", in: `{"model" "m"}`}, {name: "bare key", in: `{model:"m"}`},
		{name: "control character", in: "{\"model\":\"m\x01\"}"}, {name: "leading comma", in: `{,"model":"m"}`},
		{name: "form feed", in: "\f{\"model\":\"m\"}"}, {name: "no-break space", in: "\u00a0{\"model\":\"m\"}"},
		{name: "too deep", in: `{"model":"m","x":` + tooDeep + `}`},
		{name: "trailing junk", in: `{"model":"m"} junk`, model: "m", want: want{"": `{` + inject + `,"model":"m"} junk`}},
		{name: "two values", in: `{"model":"m"}{"model":"z"}`, model: "m", want: want{"": `{` + inject + `,"model":"m"}{"model":"z"}`}},
		{name: "second keeps", in: `{"model":"m"}{"keep_alive":1}`, model: "m", want: want{"": `{` + inject + `,"model":"m"}{"keep_alive":1}`}},
		{name: "trailing brace", in: `{"model":"m"}}`, model: "m", want: want{"": `{` + inject + `,"model":"m"}}`}},
		{name: "leading newlines", in: "\n\r\n\t {\"model\":\"m\"}\n", model: "m", want: want{"": "\n\r\n\t {" + inject + ",\"model\":\"m\"}\n"}},
		{name: "blank after brace", in: "{\n  \"model\": \"m\"\n}\n", model: "m", want: want{"": "{" + inject + ",\n  \"model\": \"m\"\n}\n"}},
		{name: "64 deep", in: `{"x":` + deep + `,"model":"m"}`, model: "m", want: want{"": `{` + inject + `,"x":` + deep + `,"model":"m"}`}},
		{name: "nested keep_alive", in: `{"options":{"keep_alive":"1m","model":"z"},"model":"m"}`, model: "m", want: want{"": `{` + inject + `,"options":{"keep_alive":"1m","model":"z"},"model":"m"}`}},
		{name: "keep_alive in text", in: `{"model":"m","prompt":"\"keep_alive\":0}"}`, model: "m", want: want{"": `{` + inject + `,"model":"m","prompt":"\"keep_alive\":0}"}`}},
		{name: "big integers", in: `{"model":"m","options":{"seed":9007199254740993,"x":-0.10,"y":1E5}}`, model: "m", want: want{"": `{` + inject + `,"model":"m","options":{"seed":9007199254740993,"x":-0.10,"y":1E5}}`}},
		{name: "F13", in: `{"model":"a","model":"b","keep_alive":"1m","keep_alive":"2m","stream":true,"stream":false}`, model: "b",
			want: want{IfAbsent: ``, "": `{"model":"a","model":"b","keep_alive":"1m","keep_alive":` + day + `,"stream":true,"stream":false}`}},
		{name: "model escaped", in: `{"MODEL":"\u006d"}`, model: "m", want: want{"": `{` + inject + `,"MODEL":"\u006d"}`}},
		{name: "model then null", in: `{"model":"m","Model":null}`, model: "m", want: want{"": `{` + inject + `,"model":"m","Model":null}`}},
		{name: "later null", in: `{"model":"m","keep_alive":"5m","keep_alive":null}`, model: "m", want: want{"": `{"model":"m","keep_alive":"5m","keep_alive":` + day + `}`}},
		{name: "later null of another case", in: `{"keep_alive":0,"KEEP_ALIVE":null,"model":"m"}`, model: "m", want: want{"": `{"keep_alive":0,"KEEP_ALIVE":` + day + `,"model":"m"}`}},
		{name: "null then 0", in: `{"model":"m","keep_alive":null,"keep_alive":0}`, model: "m"},
		{name: "5m then 0", in: `{"model":"m","keep_alive":"5m","Keep_Alive":0}`, model: "m"},
		{name: "0 then 5m", in: `{"model":"m","keep_alive":0,"keep_alive":"5m"}`, model: "m", want: want{IfAbsent: ``, "": `{"model":"m","keep_alive":0,"keep_alive":` + day + `}`}},
		{name: "bad then good", in: `{"model":"m","keep_alive":"-1","keep_alive":5}`, model: "m"},
		{name: "good then bad", in: `{"model":"m","keep_alive":5,"keep_alive":"-1"}`, model: "m"},
		{name: "bad then null", in: `{"model":"m","keep_alive":"-1","keep_alive":null}`, model: "m"},
		{name: "invalid UTF-8", in: "{\"model\":\"m\",\"prompt\":\"\xff\xfe\"}", model: "m", want: want{"": "{" + inject + ",\"model\":\"m\",\"prompt\":\"\xff\xfe\"}"}},
		{name: "lone surrogate", in: `{"model":"m","prompt":"\ud800"}`, model: "m", want: want{"": `{` + inject + `,"model":"m","prompt":"\ud800"}`}},
		{name: "unload by generate", in: `{"model":"m","keep_alive":0}`, model: "m"},
		{name: "unload by chat", in: `{"model":"m","messages":[],"keep_alive":"0s"}`, model: "m"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, policy := range []KeepAlivePolicy{IfAbsent, AtLeast, Force} {
				want, ok := tt.want[policy]
				if !ok {
					want = tt.want[""]
				}
				if want == "" {
					want = tt.in
				}
				for _, chunked := range []bool{false, true} {
					f := newFake(t, okAnswer)
					rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, policy, "24h")})
					var body io.Reader = strings.NewReader(tt.in)
					if chunked {
						body = struct{ io.Reader }{body} // of a length that the client does not know
					}
					res, err := rg.http.Post(rg.URL+"/api/generate", "application/json", body)
					if err != nil {
						t.Fatal(err)
					}
					res.Body.Close()
					got := f.next()
					if string(got.body) != want {
						t.Errorf("%s, chunked %v: %.200s\nwent as %.200s\nwant    %.200s", policy, chunked, tt.in, got.body, want)
					}
					if got.chunked || got.value("Content-Length") != fmt.Sprint(len(want)) {
						t.Errorf("%s, chunked %v: Content-Length %q, chunked %v for %d bytes", policy, chunked, got.value("Content-Length"), got.chunked, len(want))
					}
					if ex := rg.ended(); ex.Model != tt.model || ex.BytesIn != int64(len(tt.in)) {
						t.Errorf("%s: told model %q, %d bytes; want %q, %d", policy, ex.Model, ex.BytesIn, tt.model, len(tt.in))
					}
				}
			}
		})
	}
}

// TestKeepAliveOrder: three clients in turn, in every order. The last keep_alive that Ollama gets,
// after all three, is the same.
func TestKeepAliveOrder(t *testing.T) {
	clients := map[string]string{"5m": `,"keep_alive":"5m"`, "none": ``, "forever": `,"keep_alive":-1`}
	for _, tt := range []struct {
		policy KeepAlivePolicy
		want   string // of a request without keep_alive that comes after them
	}{
		{IfAbsent, `-1`},
		{AtLeast, `-1`},
		{Force, day},
	} {
		for _, order := range [][]string{
			{"5m", "none", "forever"}, {"5m", "forever", "none"}, {"none", "5m", "forever"},
			{"none", "forever", "5m"}, {"forever", "5m", "none"}, {"forever", "none", "5m"},
		} {
			t.Run(fmt.Sprint(tt.policy, order), func(t *testing.T) {
				f := newFake(t, okAnswer)
				rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, tt.policy, "24h"), NoTouch: true}) // every request is edited
				for _, c := range order {
					body := `{"model":"m"` + clients[c] + `}`
					rg.post("/api/chat", body)
					got := string(f.next().body)
					if tt.policy == IfAbsent && c != "none" && got != body {
						t.Errorf("%s went as %s", body, got)
					}
				}
				if tt.policy != IfAbsent { // the state in force is what the last of them set
					last := f // the requests were taken: repeat the last client
					rg.post("/api/chat", `{"model":"M:latest"`+clients[order[2]]+`}`)
					got := string(last.next().body)
					if !strings.Contains(got, `"keep_alive":`+tt.want) {
						t.Errorf("after %v: %s, want keep_alive %s", order, got, tt.want)
					}
				}
				rg.post("/api/generate", `{"model":"m"}`)
				if got := string(f.next().body); got != `{"keep_alive":`+tt.want+`,"model":"m"}` {
					t.Errorf("after %v: %s, want keep_alive %s", order, got, tt.want)
				}
				// A 0 stays 0, and then nothing is left of what the clients asked for before.
				rg.post("/api/generate", `{"model":"m","keep_alive":0}`)
				if got := string(f.next().body); got != `{"model":"m","keep_alive":0}` {
					t.Errorf("unload went as %s", got)
				}
				rg.post("/api/generate", `{"model":"m"}`)
				if got := string(f.next().body); got != `{"keep_alive":`+day+`,"model":"m"}` {
					t.Errorf("after the unload: %s", got)
				}
			})
		}
	}
}

// TestKeepAlivePerModel: a model's own setting overrides the default, however the model is spelled;
// off leaves it alone.
func TestKeepAlivePerModel(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, AtLeast, "24h", "short=90s", "Team/X:Q4=-1", "left=off", "hf.co/u/R:Q4_K_M = 1h"), NoTouch: true})
	for _, tt := range []struct{ model, value, want string }{
		{"short", "", `"1m30s"`}, {"SHORT", "", `"1m30s"`}, {"short:latest", "", `"1m30s"`}, {"registry.ollama.ai/library/short", "", `"1m30s"`},
		{"short", "60", `"1m30s"`}, {"short:1b", "", day},
		{"team/x:q4", "", `-1`}, {"team/x:q4", `"5m"`, `-1`}, {"team/x", "", day},
		{"hf.co/u/r:q4_k_m", "", `"1h0m0s"`},
		{"left", "", ""}, {"left", "5", "5"}, {"LEFT:latest", "-1", "-1"}, {"left", "0", "0"},
		// Cloud models run elsewhere.
		{"glm:cloud", "", ""}, {"gpt-oss:120b-cloud", "", ""}, {"GLM:Cloud", "5", "5"}, {"a/b:x-CLOUD", "null", "null"},
	} {
		in := `{"model":"` + tt.model + `"}`
		want := `{"keep_alive":` + tt.want + `,"model":"` + tt.model + `"}`
		if tt.want == "" {
			want = in
		}
		if tt.value != "" {
			in = `{"model":"` + tt.model + `","keep_alive":` + tt.value + `}`
			want = `{"model":"` + tt.model + `","keep_alive":` + tt.want + `}`
		}
		rg.post("/api/chat", in)
		if got := string(f.next().body); got != want {
			t.Errorf("%s went as %s, want %s", in, got, want)
		}
	}
}

// TestKeepAliveElsewhere: no body is edited where keep_alive has no meaning, or for a method other
// than POST.
func TestKeepAliveElsewhere(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, Force, "24h")})
	const body = `{"model":"m","keep_alive":"5m","prompt":"x"}`
	for _, path := range []string{
		"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/responses/compact", "/v1/messages", "/v1/messages/count_tokens",
		"/api/show", "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/me", "/api/unknown", "/api/chat/", "/api//chat", "/API/chat", "/v1/unknown", "/x/api/chat",
	} {
		rg.post(path, body)
		if got := f.next(); string(got.body) != body {
			t.Errorf("%s went as %s", path, got.body)
		}
	}
	for _, method := range []string{"PUT", "PATCH", "DELETE", "GET", "BREW"} {
		rg.do(method, "/api/chat", body)
		if got := f.next(); string(got.body) != body || !strings.HasPrefix(got.line, method+" ") {
			t.Errorf("%s went as %s %s", method, got.line, got.body)
		}
	}
	// An escaped spelling of a path is the same path to Ollama's router.
	rg.post("/api/%63hat", body)
	if got := f.next(); string(got.body) != `{"model":"m","keep_alive":`+day+`,"prompt":"x"}` || got.line != "POST /api/%63hat HTTP/1.1" {
		t.Errorf("%s went as %s", got.line, got.body)
	}
}

func TestParseKeepAlive(t *testing.T) {
	for in, want := range map[string]Hold{
		"24h": {24 * time.Hour, day}, "300": {5 * time.Minute, `"5m0s"`}, "-1": {math.MaxInt64, "-1"}, "-1s": {math.MaxInt64, "-1"},
		"off": {}, "1h30m": {90 * time.Minute, `"1h30m0s"`}, " 5m ": {5 * time.Minute, `"5m0s"`},
	} {
		k, err := ParseKeepAlive("", []string{in})
		if err != nil || k.Default != want {
			t.Errorf("%q = %v, %v; want %v", in, k.Default, err, want)
		}
	}
	for _, in := range []string{"", "0", "0s", "5 m", "forever", "1d", "m=", "=5m", "a b=5m", "m=0", "x:=1h"} {
		if k, err := ParseKeepAlive("", []string{in}); err == nil {
			t.Errorf("%q = %v, want an error", in, k)
		}
	}
	if _, err := ParseKeepAlive("sometimes", nil); err == nil {
		t.Error("an unknown policy is accepted")
	}
}

// TestKeepAliveRefusalComesBack: Ollama's own message for a bad value reaches the client byte for
// byte.
func TestKeepAliveRefusalComesBack(t *testing.T) {
	const text = `{"error":"time: missing unit in duration \"-1\""}`
	f := newFake(t, func(received) string { return answer(400, "application/json; charset=utf-8", text) })
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, Force, "24h")})
	res, got := rg.post("/api/chat", `{"model":"m","keep_alive":"-1"}`)
	if res.StatusCode != http.StatusBadRequest || got != text || res.Header.Get("Content-Type") != "application/json; charset=utf-8" {
		t.Errorf("%d %v %s", res.StatusCode, res.Header, got)
	}
	if ex := rg.ended(); ex.Outcome != ClientError || ex.Status != 400 || ex.KeepAlive != didKeep {
		t.Errorf("told as %+v", ex)
	}
}

// TestHeldOnce: a held model is not held again, since that would cancel an unload that another
// request waits for; unless it may be a new load, or should be held for longer.
func TestHeldOnce(t *testing.T) {
	f := newFake(t, okAnswer)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, IfAbsent, "24h")})
	sent := func(body, want, did string) {
		t.Helper()
		rg.post("/api/chat", body)
		if got := string(f.next().body); got != want {
			t.Errorf("%s went as %s, want %s", body, got, want)
		}
		if ex := rg.ended(); ex.KeepAlive != did {
			t.Errorf("%s: %s, want %s", body, ex.KeepAlive, did)
		}
	}
	const inject = `{"keep_alive":"24h0m0s",`
	plain, other := `{"model":"m","messages":[]}`, `{"model":"m","options":{"num_ctx":9}}`
	sent(plain, inject+plain[1:], didInject)
	sent(plain, plain, didHold)
	sent(`{"model":"M:latest","options":{"seed":1}}`, `{"model":"M:latest","options":{"seed":1}}`, didHold)
	sent(other, inject+other[1:], didInject) // another load
	sent(other, other, didHold)
	sent(plain, inject+plain[1:], didInject)
	sent(`{"model":"m","keep_alive":"5m"}`, `{"model":"m","keep_alive":"5m"}`, didKeep)
	sent(plain, inject+plain[1:], didInject) // 5m is too short
	sent(`{"model":"m","keep_alive":-1}`, `{"model":"m","keep_alive":-1}`, didKeep)
	sent(plain, plain, didHold)
	rg.h.Polled(rg.h.Upstreams[0], upstream.State{Up: true, Version: "0.34.1", Polled: time.Now(), LoadedKnown: true}) // it is gone
	sent(plain, inject+plain[1:], didInject)
	sent(plain, plain, didHold)
	if _, ok := rg.h.backends()[0].residency.due(time.Now()); !ok {
		t.Error("what was not injected is never looked at: an unseen load would end after five minutes")
	}
}
