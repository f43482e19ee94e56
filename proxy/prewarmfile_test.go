package proxy

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestParsePrewarm: the request is sent as in the line, except for the length of the answer and
// streaming.
func TestParsePrewarm(t *testing.T) {
	const said = `"messages":[{"role":"user","content":"a<b \u003c \"é"}]`
	for _, tt := range []struct{ name, line, path, body string }{
		{
			"as for /api/chat", `{"model":"m",` + said + `,"Stream":true,"options":{"num_ctx":2048}}`, "/api/chat",
			`{` + said + `,"model":"m","options":{"num_ctx":2048,"num_predict":1},"stream":false}`,
		},
		{
			"a path beside", ` {"path":"/api/generate","model":"m","prompt":"x","options":null} `, "/api/generate",
			`{"model":"m","options":{"num_predict":1},"prompt":"x","stream":false}`,
		},
		{
			"a body", `{"path":"/v1/chat/completions","body":{"model":"m",` + said +
				`,"max_completion_tokens":9,"stream":true,"stream_options":{"include_usage":true}}}`,
			"/v1/chat/completions", `{"max_tokens":1,` + said + `,"model":"m","stream":false}`,
		},
		{
			"responses", `{"path":"/v1/responses","body":{"model":"m","input":"x"}}`, "/v1/responses",
			`{"input":"x","max_output_tokens":1,"model":"m","stream":false}`,
		},
		{
			"messages", `{"path":"/v1/messages","model":"m","max_tokens":64,` + said + `}`, "/v1/messages",
			`{"max_tokens":1,` + said + `,"model":"m","stream":false}`,
		},
	} {
		p, err := ParsePrewarm("\ufeff\n" + tt.line + "\r\n\n" + tt.line + "\n")
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if list := p.list(); len(list) != 1 || list[0].path != tt.path || list[0].body != tt.body {
			t.Errorf("%s: %+v", tt.name, list)
		}
	}
	for _, tt := range []struct{ text, want string }{
		{"", "no request in it"},
		{" \n\n", "no request in it"},
		{`{"model":"m",` + said + `}` + "\n" + `{"model":"m"`, "line 2: want a request"},
		{`[1]`, "line 1: want a request"},
		{`null`, "and not null"},
		{`{"path":"/v1/messages","body":null}`, "and not null"},
		{`{"path":"/v1/messages","body":[]}`, `"body": want a JSON object`},
		{`{"path":7,"body":{}}`, `"path": 7 is no string`},
		{`{"path":"/api/embed","body":{"model":"m","input":"x"}}`, "want one of /api/chat, /api/generate, /v1/"},
		{`{"path":"/api/tags","model":"m"}`, `path "/api/tags"`},
		{`{"messages":[]}`, `"model": ""`},
		{`{"model":"m"}`, "a request to /api/chat without a prompt"},
		{`{"model":"m",` + said + `,"options":[]}`, `"options": want a JSON object`},
		{`{"model":"m-cloud:cloud",` + said + `}`, "runs elsewhere"},
		{`{"model":"m",` + said + `,"keep_alive":0}`, "would unload the model"},
		{`{"model":"m",` + said + `,"keep_alive":"x"}`, `"keep_alive": want a duration`},
		{`{"model":"m",` + said + `} x`, "line 1: want a request"},
	} {
		p, err := ParsePrewarm(tt.text)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error with %q", tt.text, err, tt.want)
		}
		if p.Len() != 0 {
			t.Errorf("%s: %d requests in spite of the error", tt.text, p.Len())
		}
	}
}

func FuzzPrewarm(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePrewarm(text)
		if (err == nil) != (p.Len() > 0) {
			t.Fatalf("%d requests, %v", p.Len(), err)
		}
		for _, r := range p.list() {
			if r.key == "" || !r.chain.HasPrompt() || !json.Valid([]byte(r.body)) {
				t.Fatalf("%+v", r)
			}
			// The body that is sent parses as intended, and to the same again.
			again, err := answeredShortly(r.path, decoded(t, r.body))
			if err != nil || string(again) != r.body {
				t.Fatalf("%s, again %s, %v", r.body, again, err)
			}
			if d := decoded(t, r.body); string(d["stream"]) != "false" {
				t.Fatalf("%s", r.body)
			}
		}
	})
}

func decoded(t *testing.T, body string) (members map[string]json.RawMessage) {
	if err := json.Unmarshal([]byte(body), &members); err != nil {
		t.Fatal(err)
	}
	return members
}
