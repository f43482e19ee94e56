package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers/forms"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// thinker is the template of a model that thinks in tags and calls tools. The examples make a small
// model do both.
const thinker = `<|im_start|>user
What is 2+2?<|im_end|>
<|im_start|>assistant
{{ if .Think }}<think>Two and two is four.</think>
{{ end }}4<|im_end|>
<|im_start|>user
What is the capital of Italy?<|im_end|>
<|im_start|>assistant
{{ if .Think }}<think>The capital of Italy is Rome.</think>
{{ end }}Rome<|im_end|>
{{- if .Tools }}
<|im_start|>user
What is the weather in Oslo and in Bern?<|im_end|>
<|im_start|>assistant
{{ if .Think }}<think>I call the tool.</think>
{{ end }}<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Bern"}}
</tool_call><|im_end|>
{{- end }}
{{- range .Messages }}
<|im_start|>{{ .Role }}
{{ if .Thinking }}<think>{{ .Thinking }}</think>
{{ end }}{{ .Content }}
{{- if .ToolCalls }}{{ range .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ end }}{{ end }}<|im_end|>
{{- end }}
<|im_start|>assistant
{{ if .Think }}<think>{{ end }}`

// formCase is a request that is asked as a stream and whole.
type formCase struct {
	name, path string
	body       string         // of JSON, without stream
	more       map[string]any // only for the stream
	says       string         // what the whole answer must contain, so that the case is what it is called
	tools      bool
}

func formCases() []formCase {
	const (
		options   = `"options":{"temperature":0,"seed":1,"num_predict":48}`
		fixed     = `"temperature":0,"seed":1,"max_tokens":48`
		france    = `"messages":[{"role":"user","content":"What is the capital of France?"}]`
		weather   = `"messages":[{"role":"user","content":"What is the weather in Madrid and in Rome?"}]`
		schema    = `{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}`
		tool      = `{"name":"weather","description":"The weather.","parameters":` + schema + `}`
		tools     = `"tools":[{"type":"function","function":` + tool + `}]`
		flat      = `"tools":[{"type":"function","name":"weather","description":"The weather.","parameters":` + schema + `}]`
		anthropic = `"tools":[{"name":"weather","description":"The weather.","input_schema":` + schema + `}]`
	)
	usage := map[string]any{"stream_options": map[string]any{"include_usage": true}}
	return []formCase{
		{name: "chat", path: "/api/chat", body: `"model":"smollm2",` + france + `,` + options, says: `Paris`},
		{name: "chat length", path: "/api/chat", body: `"model":"smollm2",` + france + `,"options":{"temperature":0,"num_predict":3}`, says: `"done_reason":"length"`},
		{name: "chat logprobs", path: "/api/chat", body: `"model":"smollm2","logprobs":true,"top_logprobs":2,` + france + `,` + options, says: `"logprobs":[{"token":`},
		{name: "chat code", path: "/api/chat", body: `"model":"smollm2","messages":[{"role":"user","content":"Write an HTML page with a <p> & an emoji \u00e9 \ud83d\ude00"}],"options":{"temperature":0,"num_predict":20}`, says: `\u003c`},
		{name: "chat format", path: "/api/chat", body: `"model":"smollm2","format":` + schema + `,` + france + `,` + options, says: `\"city\"`},
		{name: "chat thinking", path: "/api/chat", body: `"model":"thinker","think":true,` + france + `,` + options, says: `"thinking":"`},
		{name: "chat tools", path: "/api/chat", body: `"model":"thinker","think":false,` + tools + `,` + weather + `,` + options, says: `"tool_calls":[`, tools: true},
		{name: "chat tools logprobs", path: "/api/chat", body: `"model":"thinker","think":false,"logprobs":true,` + tools + `,` + weather + `,` + options, says: `"tool_calls":[`, tools: true},
		{name: "chat thinking tools", path: "/api/chat", body: `"model":"thinker","think":true,` + tools + `,` + weather + `,` + options, says: `"thinking":"I call the tool.","tool_calls":[`, tools: true},
		{name: "chat tools unused", path: "/api/chat", body: `"model":"thinker","think":false,` + tools + `,` + france + `,` + options, says: `"content":"`, tools: true},
		{name: "generate", path: "/api/generate", body: `"model":"smollm2","prompt":"Why is the sky blue?",` + options, says: `"context":[`},
		{name: "generate raw", path: "/api/generate", body: `"model":"smollm2","raw":true,"prompt":"Once upon a time",` + options, says: `"response":"`},
		{name: "generate context", path: "/api/generate", body: `"model":"smollm2","prompt":"And then?","context":[1,2,3],` + options, says: `"context":[`},
		{name: "generate logprobs", path: "/api/generate", body: `"model":"smollm2","prompt":"Hi","logprobs":true,"top_logprobs":1,` + options, says: `"logprobs":[{`},
		{name: "completions", path: "/v1/completions", body: `"model":"smollm2","prompt":"Why is the sky blue?",` + fixed, more: usage, says: `"text":"`},
		{name: "completions length", path: "/v1/completions", body: `"model":"smollm2","prompt":"Once <upon> a time","temperature":0,"max_tokens":3`, more: usage, says: `"finish_reason":"length"`},
		{name: "completions thinking", path: "/v1/completions", body: `"model":"thinker","prompt":"What is the capital of France?",` + fixed, more: usage, says: `"text":"`},
		{name: "chats", path: "/v1/chat/completions", body: `"model":"smollm2",` + france + `,` + fixed, more: usage, says: `Paris`},
		{name: "chats length", path: "/v1/chat/completions", body: `"model":"smollm2",` + france + `,"temperature":0,"max_tokens":3`, more: usage, says: `"finish_reason":"length"`},
		{name: "chats logprobs", path: "/v1/chat/completions", body: `"model":"smollm2","logprobs":true,"top_logprobs":2,` + france + `,` + fixed, more: usage, says: `"logprobs":{"content":[`},
		{name: "chats format", path: "/v1/chat/completions", body: `"model":"smollm2","response_format":{"type":"json_schema","json_schema":{"name":"a","schema":` + schema + `}},` + france + `,` + fixed, more: usage, says: `\"city\"`},
		{name: "chats thinking", path: "/v1/chat/completions", body: `"model":"thinker","reasoning_effort":"high",` + france + `,` + fixed, more: usage, says: `"reasoning":"`},
		{name: "chats thinking logprobs", path: "/v1/chat/completions", body: `"model":"thinker","reasoning_effort":"high","logprobs":true,` + france + `,` + fixed, more: usage, says: `"reasoning":"`},
		{name: "chats tools", path: "/v1/chat/completions", body: `"model":"thinker","reasoning_effort":"none",` + tools + `,` + weather + `,` + fixed, more: usage, says: `"tool_calls":[`, tools: true},
		{name: "chats thinking tools", path: "/v1/chat/completions", body: `"model":"thinker",` + tools + `,` + weather + `,` + fixed, more: usage, says: `"reasoning":"I call the tool.","tool_calls":[`, tools: true},
		{name: "messages", path: "/v1/messages", body: `"model":"smollm2",` + france + `,` + fixed, says: `"text":"`},
		{name: "messages length", path: "/v1/messages", body: `"model":"smollm2",` + france + `,"temperature":0,"max_tokens":3`, says: `"stop_reason":"max_tokens"`},
		{name: "messages thinking", path: "/v1/messages", body: `"model":"thinker","thinking":{"type":"enabled","budget_tokens":1024},` + france + `,` + fixed, says: `"thinking":"`},
		{name: "messages tools", path: "/v1/messages", body: `"model":"thinker","thinking":{"type":"disabled"},` + anthropic + `,` + weather + `,` + fixed, says: `"type":"tool_use"`, tools: true},
		{name: "messages thinking tools", path: "/v1/messages", body: `"model":"thinker","thinking":{"type":"enabled","budget_tokens":1024},` + anthropic + `,` + weather + `,` + fixed, says: `"type":"tool_use"`, tools: true},
		{name: "responses", path: "/v1/responses", body: `"model":"smollm2","input":"What is the capital of France?","instructions":"Be brief.","temperature":0,"max_output_tokens":40`, says: `"output_text"`},
		{name: "responses settings", path: "/v1/responses", body: `"model":"smollm2","input":"What is the capital of France?","temperature":0,"top_p":0.5,"truncation":"auto","max_output_tokens":40,"text":{"format":{"type":"json_schema","name":"a","strict":true,"schema":` + schema + `}}`, says: `"strict":true`},
		{name: "responses thinking", path: "/v1/responses", body: `"model":"thinker","reasoning":{"effort":"high"},"input":"What is the capital of France?","temperature":0,"max_output_tokens":40`, says: `"type":"reasoning"`},
		{name: "responses tools", path: "/v1/responses", body: `"model":"thinker","reasoning":{"effort":"none"},` + flat + `,"input":"What is the weather in Madrid and in Rome?","temperature":0,"max_output_tokens":80`, says: `"type":"function_call"`, tools: true},
		{name: "responses thinking tools", path: "/v1/responses", body: `"model":"thinker","reasoning":{"effort":"high","summary":"auto"},` + flat + `,"input":"What is the weather in Madrid and in Rome?","temperature":0,"max_output_tokens":80`, says: `"type":"function_call"`, tools: true},
		{name: "generate thinking", path: "/api/generate", body: `"model":"thinker","think":true,"prompt":"What is the capital of France?",` + options, says: `"thinking":"`},
	}
}

// masks are the members that differ between two computations of one answer.
var masks = regexp.MustCompile(`"(created_at|created|completed_at|id|call_id|[a-z_]+_duration)":("[^"]*"|[0-9]+)`)

func masked(text string) string { return masks.ReplaceAllString(text, `"$1":0`) }

// limits are the members that bound an answer's length.
var limits = regexp.MustCompile(`"(num_predict|max_tokens|max_output_tokens)":[0-9]+`)

// warm evaluates the prompt, and generates one token.
func (c formCase) warm(t *testing.T, url string) {
	t.Helper()
	c.body = limits.ReplaceAllString(c.body, `"$1":1`)
	c.ask(t, url, false)
}

// ask sends a request as a stream or not, and returns the answer's body.
func (c formCase) ask(t *testing.T, url string, stream bool) (contentType, body string) {
	t.Helper()
	request := map[string]any{}
	if err := json.Unmarshal([]byte("{"+c.body+"}"), &request); err != nil {
		t.Fatal(err)
	}
	request["stream"] = stream
	if stream {
		maps.Copy(request, c.more)
	}
	text, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	status, contentType, body := post(t, url+c.path, string(text))
	if status != 200 {
		t.Fatalf("%s: %d %s", text, status, body)
	}
	return contentType, body
}

// TestAnswerForms asks real servers the same as a stream and in one piece, and makes each from the
// other.
func TestAnswerForms(t *testing.T) {
	for _, version := range realollama.Versions() {
		t.Run(version, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{"smollm2"}})
			mustPost(t, server.URL()+"/api/create", fmt.Sprintf(`{"model":"thinker","from":"smollm2","template":%q,"parameters":{"repeat_penalty":1},"stream":false}`, thinker))
			asked, made := replayer{}, replayer{}
			for _, c := range formCases() {
				t.Run(c.name, func(t *testing.T) {
					stream, again := c.check(t, server.URL())
					key := [2]string{c.path, strings.ReplaceAll(c.name, " ", "-")}
					asked[key], made[key] = stream, again
				})
			}
			t.Run("clients", func(t *testing.T) {
				want, got := asked.collect(t, server), made.collect(t, server)
				for _, name := range slices.Sorted(maps.Keys(want)) {
					if w, ok := want[name].(map[string]any); ok && strings.HasPrefix(name, "responses") &&
						w["helper"] == nil && version == realollama.EraA {
						delete(w, "helper") // it cannot read Ollama's stream, but may read ours
						delete(got[name].(map[string]any), "helper")
					}
					if !reflect.DeepEqual(got[name], want[name]) {
						t.Errorf("%s: a client collects\n%v\nfrom Ollama's stream\n%v", name, got[name], want[name])
					}
				}
				if len(want) != len(formCases()) {
					t.Errorf("%d results", len(want))
				}
			})
		})
	}
}

// replayer serves streams by path and model.
type replayer map[[2]string]string

func (r replayer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/forms" {
		json.NewEncoder(w).Encode(slices.Collect(maps.Keys(r)))
		return
	}
	var body struct{ Model string }
	if err := json.NewDecoder(req.Body).Decode(&body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", forms.ContentType(req.URL.Path, true))
	io.WriteString(w, r[[2]string{req.URL.Path, body.Model}])
}

// collect returns what clients make of the streams.
func (r replayer) collect(t *testing.T, server *realollama.Server) map[string]any {
	t.Helper()
	recorded := httptest.NewServer(r)
	defer recorded.Close()
	return script("answer_forms.py")(t, target{recorded.URL, server})
}

// check returns Ollama's stream, and the one that is made from its whole answer.
func (c formCase) check(t *testing.T, url string) (stream, made string) {
	c.warm(t, url) // so that both find as much of the prompt in the slot
	wholeType, whole := c.ask(t, url, false)
	streamType, stream := c.ask(t, url, true)
	if !strings.Contains(whole, c.says) {
		t.Fatalf("the answer does not contain %s:\n%s", c.says, whole)
	}
	if want := forms.ContentType(c.path, false); wholeType != want {
		t.Errorf("whole: Content-Type is %q, want %q", wholeType, want)
	}
	if want := forms.ContentType(c.path, true); streamType != want {
		t.Errorf("stream: Content-Type is %q, want %q", streamType, want)
	}
	reason, ok := forms.Complete(c.path, wholeType, []byte(whole))
	if !ok {
		t.Errorf("not complete:\n%s", whole)
	}
	if r, ok := forms.Complete(c.path, streamType, []byte(stream)); !ok || r != reason {
		t.Errorf("complete: %v, %q, want %q:\n%s", ok, r, reason, stream)
	}
	var lines strings.Builder
	n := 0
	for line := range forms.Lines(streamType, []byte(stream)) {
		lines.Write(line)
		n++
		if n == 1 { // a stream that breaks off
			if _, ok := forms.Complete(c.path, streamType, line); ok {
				t.Errorf("complete after one line: %s", line)
			}
		}
	}
	if lines.String() != stream || n < 2 {
		t.Errorf("%d lines are not the stream", n)
	}
	joined, ok := forms.Whole(c.path, []byte(stream), c.tools)
	if !ok {
		t.Fatalf("a whole answer cannot be made from\n%s", stream)
	}
	if masked(string(joined)) != masked(whole) {
		t.Errorf("from the stream:\n%s\nOllama's:\n%s", joined, whole)
	}
	again, ok := forms.Stream(c.path, []byte(whole), true)
	if !ok {
		t.Fatalf("a stream cannot be made from\n%s", whole)
	}
	if r, ok := forms.Complete(c.path, streamType, again); !ok || r != reason {
		t.Errorf("the stream is not complete (%q, want %q):\n%s", r, reason, again)
	}
	if back, ok := forms.Whole(c.path, again, c.tools); !ok || string(back) != whole {
		t.Errorf("whole:\n%s\nas a stream:\n%s\nwhole again:\n%s", whole, again, back)
	}
	return stream, string(again)
}
