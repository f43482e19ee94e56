package proxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
)

func TestNumCtxDecide(t *testing.T) {
	type contexts = runners.Contexts
	for _, c := range []struct {
		name   string
		asked  int
		known  contexts
		policy NumCtxPolicy
		did    string
		tokens int
	}{
		{"nothing is loaded", 2048, contexts{Default: 4096}, PinNumCtx, "", 0},
		{"a larger one is loaded", 2048, contexts{Loaded: 8192}, PinNumCtx, "pinned", 8192},
		{"the same one is loaded", 8192, contexts{Loaded: 8192}, PinNumCtx, "kept", 0},
		{"a smaller one is loaded", 16384, contexts{Loaded: 8192}, PinNumCtx, "kept", 0},
		{"none stated, the default not known", 0, contexts{Loaded: 8192}, PinNumCtx, "unknown", 0},
		{"none stated, loaded by default", 0, contexts{Loaded: 4096, ByDefault: true, Default: 4096}, PinNumCtx, "kept", 0},
		{"none stated, loaded by a default that is not known", 0, contexts{Loaded: 1, ByDefault: true}, PinNumCtx, "kept", 0},
		{"none stated, a smaller default", 0, contexts{Loaded: 8192, Default: 4096}, PinNumCtx, "pinned", 8192},
		{"none stated, a larger default", 0, contexts{Loaded: 8192, Default: 32768}, PinNumCtx, "kept", 0},
		{"a larger one was seen", 2048, contexts{Loaded: 8192, Largest: 16384}, PinNumCtx, "pinned", 8192},
		{"a larger one was seen", 2048, contexts{Loaded: 8192, Largest: 16384}, RaiseNumCtx, "raised", 16384},
		{"only seen", 2048, contexts{Largest: 16384}, RaiseNumCtx, "raised", 16384},
		{"nothing was seen", 2048, contexts{}, RaiseNumCtx, "", 0},
		{"none stated", 0, contexts{Loaded: 4096, ByDefault: true, Default: 4096, Largest: 8192}, RaiseNumCtx, "raised", 8192},
	} {
		if did, tokens := c.policy.decide(c.asked, c.known); did != c.did || tokens != c.tokens {
			t.Errorf("%s, %s: %q %d, want %q %d", c.name, c.policy, did, tokens, c.did, c.tokens)
		}
	}
}

// TestNumCtxOnAll: of several servers, in any order, only what holds for each is assumed.
func TestNumCtxOnAll(t *testing.T) {
	type contexts = runners.Contexts
	for _, c := range []struct {
		name string
		list []contexts
		want contexts
	}{
		{"none", nil, contexts{}},
		{"one, by its default", []contexts{{Loaded: 4096, ByDefault: true, Default: 4096, Largest: 2048}}, contexts{Loaded: 4096, ByDefault: true, Default: 4096, Largest: 2048}},
		{"one, by a default that was not seen yet", []contexts{{Loaded: 4096, ByDefault: true}}, contexts{Loaded: 4096, ByDefault: true}},
		{"one, with what was stated", []contexts{{Loaded: 4096, Default: 4096}}, contexts{Loaded: 4096, Default: 4096}},
		{"a default that is not known", []contexts{{}, {Loaded: 8192, Default: 4096}}, contexts{Loaded: 8192}},
		{"another default", []contexts{{Default: 4096}, {Loaded: 32768, ByDefault: true, Default: 32768}}, contexts{Loaded: 32768, Default: 32768}},
		{"the same default", []contexts{{Default: 4096}, {Loaded: 4096, ByDefault: true, Default: 4096}}, contexts{Loaded: 4096, ByDefault: true, Default: 4096}},
		{"the same default, and more is loaded", []contexts{{Loaded: 8192, Default: 4096}, {Loaded: 4096, ByDefault: true, Default: 4096}}, contexts{Loaded: 8192, Default: 4096}},
		{"one that is loaded by a default, and one with it stated", []contexts{{Loaded: 4096, Default: 8192}, {Loaded: 4096, ByDefault: true, Default: 4096}}, contexts{Loaded: 4096, Default: 8192}},
		{"the largest of each", []contexts{{Largest: 8192, Default: 4096}, {Largest: 2048, Default: 4096}}, contexts{Largest: 8192, Default: 4096}},
	} {
		for range 2 {
			if got := onAll(c.list); got != c.want {
				t.Errorf("%s: %+v make %+v, want %+v", c.name, c.list, got, c.want)
			}
			slices.Reverse(c.list)
		}
	}
}

// TestNumCtxEdit: %d is the number that is asked for; 8192 is the one to set.
func TestNumCtxEdit(t *testing.T) {
	for _, c := range []struct {
		body  string
		asked int
		want  string // "" if the body stays as it is
		leave string // the same with leave; "" if the body stays as it is
	}{
		{`{"model":"m","options":{"num_ctx":2048}}`, 2048, `{"model":"m","options":{"num_ctx":8192}}`, `{"model":"m","options":{}}`},
		{`{"options":{"a":1, "num_ctx":2048 },"model":"m"}`, 2048, `{"options":{"a":1, "num_ctx":8192 },"model":"m"}`, `{"options":{"a":1 },"model":"m"}`},
		{`{"options":{"num_ctx": 2048 , "a":[1,{"num_ctx":7}]}}`, 2048, `{"options":{"num_ctx": 8192 , "a":[1,{"num_ctx":7}]}}`, `{"options":{"a":[1,{"num_ctx":7}]}}`},
		{`{"options":{"a":"x","num_ctx":2.048e3,"b":2}}`, 2048, `{"options":{"a":"x","num_ctx":8192,"b":2}}`, `{"options":{"a":"x","b":2}}`},
		{`{"OPTIONS":{"num\u005fctx":2048}}`, 2048, `{"OPTIONS":{"num\u005fctx":8192}}`, `{"OPTIONS":{}}`},
		{`{"model":"m"}`, 0, `{"options":{"num_ctx":8192},"model":"m"}`, ""},
		{`{"model":"m","options":null}`, 0, `{"model":"m","options":{"num_ctx":8192}}`, ""},
		{`{"model":"m","options":{}}`, 0, `{"model":"m","options":{"num_ctx":8192}}`, ""},
		{`{"model":"m","options":{"Num_Ctx":1}}`, 0, `{"model":"m","options":{"num_ctx":8192,"Num_Ctx":1}}`, ""},

		{`{"model":"m","options":{"num_ctx":"2048"}}`, 0, "", ""},
		{`{"model":"m","options":{"num_ctx":null}}`, 0, "", ""},
		{`{"model":"m","options":{"num_ctx":0}}`, 0, "", ""},
		{`{"model":"m","options":{"num_ctx":-1}}`, -1, "", ""},
		{`{"options":{"num_ctx":1},"options":{"num_ctx":2048}}`, 2048, "", ""},
		{`{"options":{"num_ctx":1,"num_ctx":2048}}`, 2048, "", ""},
		{`{"model":"m","options":7}`, 0, "", ""},
		{`{}`, 0, "", ""},
	} {
		for _, leave := range []bool{false, true} {
			want := c.want
			if leave {
				want = c.leave
			}
			f, err := scan([]byte(c.body), nil)
			if err != nil {
				t.Fatalf("%s: %v", c.body, err)
			}
			e, ok := numCtxEdit([]byte(c.body), f, c.asked, 8192, leave)
			got := ""
			if ok {
				got = c.body[:e.at] + string(e.text) + c.body[e.at+e.cut:]
			}
			if got != want {
				t.Errorf("%s, leave %v: %s, want %s", c.body, leave, got, want)
			}
		}
	}
}

func TestParseNumCtx(t *testing.T) {
	n, err := ParseNumCtx([]string{"pin", "llama3=raise", "b:7b=keep"})
	if err != nil || n.For("x") != PinNumCtx || n.String() != "pin, b:7b=keep, llama3:latest=raise" {
		t.Errorf("%v %v", n, err)
	}
	if s := (NumCtx{}).String(); s != "keep" {
		t.Error(s)
	}
	for _, wrong := range []string{"largest", "a b=pin", "=pin", "", "llama3="} {
		if _, err := ParseNumCtx([]string{wrong}); err == nil {
			t.Errorf("%q is accepted", wrong)
		}
	}
}

// TestNumCtxSent: clients that disagree cost one load: the largest loaded num_ctx goes upstream
// together with keep_alive, and the ledger reports it. Requests for more than is loaded, and
// requests without a policy, stay as they are.
func TestNumCtxSent(t *testing.T) {
	f := warmFake(t)
	k := keep(t, IfAbsent, "1h")
	rg := newRig(t, f.URL, &Handler{KeepAlive: k, NoTouch: true, NumCtx: NumCtx{Default: PinNumCtx, Models: map[string]NumCtxPolicy{}}})
	sent := func(body string) (string, Exchange) {
		t.Helper()
		rg.post("/api/chat", body)
		return string(f.next().body), rg.ended()
	}
	chat := func(options string) string { return chatWith(prose(2000), "Go.", options) }
	hold := func(body string) string { return `{"keep_alive":"1h0m0s",` + body[1:] }

	if got, ex := sent(chat(`,"options":{"num_ctx":8192}`)); got != hold(chat(`,"options":{"num_ctx":8192}`)) || ex.NumCtx != "" {
		t.Errorf("the first one: %q, %.100s", ex.NumCtx, got)
	}
	got, ex := sent(chat(`,"options":{"num_ctx":2048,"top_k":1}`))
	if got != hold(chat(`,"options":{"num_ctx":8192,"top_k":1}`)) || ex.NumCtx != "pinned" {
		t.Errorf("a smaller one: %q, %s", ex.NumCtx, got)
	}
	if e := ex.Savings; e.Loaded || e.Verdict != "hit" || e.Detail != "num_ctx from 2048 to 8192 by --num-ctx-policy pin" {
		t.Errorf("a smaller one: %+v", e)
	}
	if got, ex := sent(chat(`,"options":{"num_ctx":16384}`)); !strings.Contains(got, "16384") || ex.NumCtx != "kept" || !ex.Savings.Loaded {
		t.Errorf("a larger one: %q, %s", ex.NumCtx, got)
	}
	if got, ex := sent(chat("")); strings.Contains(got, "num_ctx") || ex.NumCtx != "unknown" {
		t.Errorf("none stated: %q, %s", ex.NumCtx, got)
	}
	rg.post("/v1/chat/completions", chat(`,"options":{"num_ctx":2048}`))
	if got, ex := string(f.next().body), rg.ended(); got != chat(`,"options":{"num_ctx":2048}`) || ex.NumCtx != "" {
		t.Errorf("/v1: %q, %s", ex.NumCtx, got)
	}
	rg.h.NumCtx = NumCtx{}
	if got, ex := sent(chat(`,"options":{"num_ctx":2048}`)); !strings.Contains(got, `"num_ctx":2048`) || ex.NumCtx != "" {
		t.Errorf("without a policy: %q, %s", ex.NumCtx, got)
	}
}

// FuzzNumCtx: the edited body asks for the wanted num_ctx, or for none, and is otherwise unchanged.
func FuzzNumCtx(f *testing.F) {
	for _, seed := range []string{
		`{"model":"m","options":{"num_ctx":2048}}`, `{"options":{"a":1,"num_ctx":2048},"b":2}`, `{"options":null}`, `{"a":1}`,
		`{"options":{"num_ctx":2048,"a":{"b":[1,2]}}} junk`, `{"options":{},"options":{}}`, `{"options":{"num_ctx":"x"}}`,
	} {
		f.Add([]byte(seed), false)
		f.Add([]byte(seed), true)
	}
	reader := prefix.NewReader()
	f.Fuzz(func(t *testing.T, data []byte, leave bool) {
		fs, err := scan(data, nil)
		if err != nil {
			return
		}
		chain := reader.ReadMembers(prefix.Chat, "m", data, fs.members, fs.long)
		asked := chain.Runner.NumCtx()
		e, ok := numCtxEdit(data, fs, asked, 12345, leave)
		if !ok {
			return
		}
		edited := append(append(bytes.Clone(data[:e.at]), e.text...), data[e.at+e.cut:]...)
		after, err := scan(edited, nil)
		if err != nil {
			t.Fatalf("%q became %q: %v", data, edited, err)
		}
		// The lane's num_ctx is the one that is sent.
		restated := chain.Runner.WithContext(12345)
		if leave {
			restated = restated.WithoutContext()
		}
		chain.Restate(restated)
		if again := reader.ReadMembers(prefix.Chat, "m", edited, after.members, after.long); !reflect.DeepEqual(chain, again) {
			t.Fatalf("%q became %q, whose chain is another: %+v, %+v", data, edited, chain.Runner, again.Runner)
		}
		type body struct {
			Options map[string]any
		}
		var before, now body
		if json.NewDecoder(bytes.NewReader(data)).Decode(&before) != nil {
			return
		}
		if err := json.NewDecoder(bytes.NewReader(edited)).Decode(&now); err != nil {
			t.Fatalf("%q became %q: %v", data, edited, err)
		}
		want := "12345"
		if leave {
			want = "<nil>"
		}
		if got := fmt.Sprint(now.Options["num_ctx"]); got != want {
			t.Fatalf("%q became %q: num_ctx %s", data, edited, got)
		}
		delete(before.Options, "num_ctx")
		delete(now.Options, "num_ctx")
		if len(before.Options)+len(now.Options) > 0 && !reflect.DeepEqual(before, now) {
			t.Fatalf("%q became %q", data, edited)
		}
	})
}
