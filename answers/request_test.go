package answers

import (
	"encoding/json"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

func identify(e prefix.Endpoint, body string) Identity {
	return Identify(e, []byte(body), nil, nil, Defaults{})
}

// TestSame: bodies of one list have one Sum; those of different lists have different ones.
func TestSame(t *testing.T) {
	lists := map[prefix.Endpoint][][]string{
		prefix.Chat: {
			{
				`{"model":"m","messages":[{"role":"user","content":"a\nb"}]}`,
				`{"messages":[{"role":"user","content":"a\u000ab"}],"model":"m","stream":false,"keep_alive":-1}`,
				` { "Model" : "m" , "MESSAGES" : [ { "role" : "user" , "content" : "\u0061\nb" } ] , "tools" : null } `,
				`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"think":null,"options":{},"logprobs":false}`,
				"{\"\u017ftream\":true,\"model\":\"m\",\"me\u017f\u017fages\":[{\"role\":\"user\",\"content\":\"a\\nb\"}]}",
				`{"mode\u006c":"m","messages":[{"role":"user","content":"a\nb"}],"top_logprobs":0,"truncate":null} trailing`,
			},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"tools":[]}`},
			{`{"model":"M","messages":[{"role":"user","content":"a\nb"}]}`},
			{`{"model":"m:latest","messages":[{"role":"user","content":"a\nb"}]}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"think":false}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"format":null}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"format":""}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"other":null}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"tools":null,"tools":null}`},
			{`{"model":"m","messages":[{"content":"a\nb","role":"user"}]}`},
			{`{"model":"m","model":"m","messages":[{"role":"user","content":"a\nb"}]}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"Foo":1,"foo":2}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"foo":2,"Foo":1}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"options":{"seed":1,"seed":1}}`},
			{
				`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"options":{"seed":1,"temperature":0}}`,
				`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"options":{"temperature":0.0,"seed":1e0}}`,
			},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"options":{"seed":1,"Temperature":0}}`},
			{`{"model":"m","messages":[{"role":"user","content":"a\nb"}],"options":{"seed":1,"temperature":0,"num_ctx":null}}`},
			{`{"model":"m","messages":[{"role":"user","content":"\ud83d\ude00"}]}`, `{"model":"m","messages":[{"role":"user","content":"😀"}]}`},
			{`{"model":"m","messages":[{"role":"user","content":"\ud83d"}]}`},
			{`{"model":"m","messages":[{"role":"user","content":"\ufffd"}]}`, `{"model":"m","messages":[{"role":"user","content":"�"}]}`},
			{"{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"\xf0\"}]}"},
			{"{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"\xf1\"}]}"},
			{`{"model":"m","messages":[{"role":"user","content":1}]}`},
			{`{"model":"m","messages":[{"role":"user","content":"1"}]}`},
			{`{"model":"m","messages":[{"role":"user","content":["1"]}]}`},
		},
		prefix.Generate: {
			{
				`{"model":"m","prompt":"a"}`,
				`{"prompt":"a","raw":false,"images":[],"system":"","template":"","suffix":"","context":null,"model":"m"}`,
			},
			{`{"model":"m","prompt":"a","context":[]}`},
			{`{"model":"m","prompt":"a","raw":true}`},
		},
		prefix.ChatCompletions: {
			{
				`{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":0}`,
				`{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":0.0,"stream":true,"seed":null,"tools":[]}`,
				`{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":0e3,"stream_options":{"include_usage":true}}`,
			},
			{`{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":-0.0}`},
			{`{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":0,"max_tokens":10}`},
			{`{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":0,"max_tokens":10.0}`},
			{`{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":0,"user":"x"}`},
		},
	}
	seen := map[[32]byte]string{}
	for e, lists := range lists {
		for _, list := range lists {
			sum := identify(e, list[0]).Sum
			if other, ok := seen[sum]; ok {
				t.Errorf("%d: one sum:\n%s\n%s", e, list[0], other)
			}
			seen[sum] = list[0]
			for _, body := range list[1:] {
				if identify(e, body).Sum != sum {
					t.Errorf("%d: two sums:\n%s\n%s", e, list[0], body)
				}
			}
		}
	}
}

// TestIdentify: what is read beside the sum.
func TestIdentify(t *testing.T) {
	zero, warm, seed, random := 0.0, 0.7, int64(3), int64(-1)
	for _, c := range []struct {
		endpoint prefix.Endpoint
		body     string
		defaults Defaults
		form     Form
		fixed    bool
		prompt   bool
	}{
		{prefix.Chat, `{"messages":[{}]}`, Defaults{}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"stream":null,"options":{"temperature":0}}`, Defaults{}, Stream, true, true},
		{prefix.Chat, `{"messages":[{}],"stream":false,"options":{"seed":7}}`, Defaults{}, Whole, true, true},
		{prefix.Chat, `{"messages":[{}],"options":{"seed":-1}}`, Defaults{Seed: &seed}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"options":{"seed":4294967295}}`, Defaults{}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"options":{"seed":1e300}}`, Defaults{}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"options":{"Seed":7}}`, Defaults{}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"temperature":0,"seed":1}`, Defaults{}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"options":{"temperature":0.5}}`, Defaults{Temperature: &zero}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"options":{"temperature":null}}`, Defaults{Temperature: &zero}, Stream, true, true},
		{prefix.Chat, `{"messages":[{}],"options":{"temperature":1e-60}}`, Defaults{}, Stream, true, true},
		{prefix.Chat, `{"messages":[{}],"options":{"temperature":0,"temperature":1}}`, Defaults{}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"options":{"temperature":0},"options":{}}`, Defaults{}, Stream, false, false},
		{prefix.Chat, `{"messages":[{}]}`, Defaults{Temperature: &zero}, Stream, true, true},
		{prefix.Chat, `{"messages":[{}]}`, Defaults{Temperature: &warm, Seed: &seed}, Stream, true, true},
		{prefix.Chat, `{"messages":[{}]}`, Defaults{Temperature: &warm, Seed: &random}, Stream, false, true},
		{prefix.Chat, `{"messages":[{}],"options":{"temperature":0},"tools":[{"type":"function"}]}`, Defaults{}, Stream, true, true},
		{prefix.Chat, `{"messages":[{}],"options":{"temperature":0},"tools":[{"TYPE":"web_search"}]}`, Defaults{}, Stream, false, true},
		{prefix.Chat, `{"messages":[ ],"options":{"temperature":0}}`, Defaults{}, Stream, true, false},
		{prefix.Generate, `{"prompt":"","options":{"temperature":0}}`, Defaults{}, Stream, true, false},
		{prefix.Generate, `{"Prompt":"a","Stream":false}`, Defaults{}, Whole, false, true},
		{prefix.ChatCompletions, `{"messages":[{}]}`, Defaults{Temperature: &zero}, Whole, false, true},
		{prefix.ChatCompletions, `{"messages":[{}],"stream":true}`, Defaults{Seed: &seed}, Stream, true, true},
		{prefix.ChatCompletions, `{"messages":[{}],"stream":true,"stream":null,"stream_options":{"Include_Usage":true}}`, Defaults{}, StreamUsage, false, false},
		{prefix.ChatCompletions, `{"messages":[{}],"stream":true,"stream_options":{"include_usage":false},"seed":0}`, Defaults{}, Stream, true, true},
		{prefix.ChatCompletions, `{"messages":[{}],"stream":false,"stream_options":{"include_usage":true},"temperature":0}`, Defaults{}, Whole, true, true},
		{prefix.Completions, `{"prompt":"a","temperature":0.0}`, Defaults{}, Whole, true, true},
		{prefix.Completions, `{"prompt":"","temperature":0.0}`, Defaults{}, Whole, true, false},
		{prefix.Messages, `{"messages":[{}],"temperature":0,"tools":[{"name":"x","type":"custom"},{"name":"y"}]}`, Defaults{}, Whole, true, true},
		{prefix.Messages, `{"messages":[{}],"temperature":0,"tools":[{"name":"x"},{"type":"web_search_20250305"}]}`, Defaults{}, Whole, false, true},
		{prefix.Messages, `{"messages":[{}],"seed":1,"stream":true,"stream_options":{"include_usage":true}}`, Defaults{}, Stream, false, true},
		{prefix.Messages, `{"messages":[{}]}`, Defaults{Temperature: &zero}, Whole, true, true},
		{prefix.Responses, `{"input":"a","temperature":0}`, Defaults{}, Whole, true, true},
		{prefix.Responses, `{"input":"a","stream":null}`, Defaults{Temperature: &zero}, Whole, false, true},
		{prefix.Responses, `{"input":[{}],"temperature":0,"previous_response_id":"x","stream":true}`, Defaults{}, Stream, false, true},
		{prefix.Responses, `{"input":[{}],"temperature":0,"previous_response_id":null}`, Defaults{}, Whole, true, true},
		{prefix.Responses, `{"input":"","temperature":0,"conversation":{"id":"x"}}`, Defaults{}, Whole, false, false},
		{prefix.None, `{"prompt":"a","temperature":0}`, Defaults{}, 0, false, false},
	} {
		id := Identify(c.endpoint, []byte(c.body), nil, nil, c.defaults)
		if id.Form != c.form || id.Deterministic != c.fixed || id.Prompt != c.prompt {
			text, _ := json.Marshal(c.defaults)
			t.Errorf("%d %s %s: form %d, deterministic %v, prompt %v", c.endpoint, c.body, text, id.Form, id.Deterministic, id.Prompt)
		}
	}
}
