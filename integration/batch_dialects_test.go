package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// thinks is the template of a model that only thinks: the prompt ends with the opening tag of the
// thoughts.
const thinks = `{{- range .Messages }}<|im_start|>{{ .Role }}
{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
<think>
`

// calls is the template of a model whose answers are tool calls if they are a list of them.
const calls = `{{ if .Tools }}{{ .Tools }}{{ end }}
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}{{ if .ToolCalls }}[{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}]{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
`

// TestBatchDialects: batch streams each answer and joins the pieces. In every dialect that it
// accepts, the result equals the server's answer to a request without a stream, down to the last
// log probability and tool call.
func TestBatchDialects(t *testing.T) {
	const (
		options  = `"options":{"temperature":0,"seed":1,"num_predict":12}`
		sampling = `"temperature":0,"seed":1,"max_tokens":12`
		ask      = `"messages":[{"role":"system","content":"You grade."},{"role":"user","content":"Why is the sky blue?"}]`
		tools    = `"tools":[{"type":"function","function":{"name":"weather","description":"tells it","parameters":{"type":"object","properties":{"city":{"type":"string"}}}}}]`
		// Small models call tools only if the format allows nothing else.
		call = `{"const":[{"name":"weather","arguments":{"city":"Paris"}},{"name":"weather","arguments":{"city":"Oslo"}}]}`
	)
	form := func(path, body string) string {
		return fmt.Sprintf(`{"custom_id":"a","method":"POST","url":%q,"body":%s}`, path, body)
	}
	cases := []struct {
		name, path, model, members string
		// A list or text in the answer that must have more than one element or byte.
		has string
	}{
		{"logprobs", "/api/chat", tiny, ask + `,"logprobs":true,"top_logprobs":2,` + options, "logprobs"},
		{"logprobs", "/api/generate", tiny, `"prompt":"Why is the sky blue?","logprobs":true,"top_logprobs":2,` + options, "logprobs"},
		{"logprobs", "/v1/chat/completions", tiny, ask + `,"logprobs":true,"top_logprobs":2,` + sampling, "choices.0.logprobs.content"},
		{"text", "/v1/completions", tiny, `"prompt":"Why is the sky blue?","logprobs":2,` + sampling, "choices.0.text"},
		{"thoughts", "/api/chat", "thinks", ask + `,` + options, "message.thinking"},
		{"thoughts", "/api/generate", "thinks", `"prompt":"Why is the sky blue?",` + options, "thinking"},
		{"thoughts", "/v1/chat/completions", "thinks", ask + `,` + sampling, "choices.0.message.reasoning"},
		{"tools", "/api/chat", "calls", ask + `,"logprobs":true,` + tools + `,"format":` + call + `,"options":{"temperature":0,"seed":1,"frequency_penalty":2,"num_predict":1000}`, "message.tool_calls"},
		{"tools", "/v1/chat/completions", "calls", ask + `,"logprobs":true,` + tools + `,"response_format":{"type":"json_schema","json_schema":{"schema":` + call + `}},"temperature":0,"seed":1,"frequency_penalty":2,"max_tokens":1000`,
			"choices.0.message.tool_calls"},
	}
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}})
			for name, template := range map[string]string{"thinks": thinks, "calls": calls} {
				body, err := json.Marshal(map[string]any{"model": name, "from": tiny, "template": template, "stream": false})
				if err != nil {
					t.Fatal(err)
				}
				mustPost(t, server.URL()+"/api/create", string(body))
			}
			for _, c := range cases {
				t.Run(c.name+" "+c.path, func(t *testing.T) {
					members := `"model":"` + c.model + `",` + c.members
					whole := func() any {
						return plain(t, mustPost(t, server.URL()+c.path, `{"stream":false,`+members+`}`))
					}
					joined := func(attempt int) any {
						out := filepath.Join(t.TempDir(), fmt.Sprint(attempt))
						cmd := command(t, bin, "batch", "--server", server.URL(), "-i", "-", "-o", out)
						cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
						cmd.Stdin = strings.NewReader(form(c.path, "{"+members+"}"))
						if log, err := cmd.CombinedOutput(); err != nil {
							t.Fatalf("%v\n%s", err, log)
						}
						text, err := os.ReadFile(out)
						if err != nil {
							t.Fatal(err)
						}
						var result struct {
							Response struct{ Body json.RawMessage }
						}
						if err := json.Unmarshal(text, &result); err != nil {
							t.Fatal(err)
						}
						return plain(t, string(result.Response.Body))
					}
					whole() // from then on the same tokens are reused each time
					// The engine's own answers vary now and then: see TestAnswers in realollama.
					for attempt := 0; ; attempt++ {
						want, got := whole(), joined(attempt)
						if reflect.DeepEqual(want, got) {
							if n := size(got, c.has); n < 2 {
								t.Errorf("%s has %d, want more: %v", c.has, n, got)
							}
							return
						}
						if attempt == 4 {
							t.Fatalf("%s\nwant %s", pretty(t, got), pretty(t, want))
						}
						t.Logf("attempt %d: %s\nwant %s", attempt, pretty(t, got), pretty(t, want))
					}
				})
			}
		})
	}
}

// plain returns an answer without the members that differ from run to run, at any depth.
func plain(t testing.TB, text string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	var strip func(any)
	strip = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				strip(e)
			}
		case map[string]any:
			for name, e := range v {
				switch name {
				case "id", "created", "created_at", "context", "prompt_tokens_details", "prompt_eval_cached_count",
					"total_duration", "load_duration", "prompt_eval_duration", "eval_duration":
					delete(v, name)
				default:
					strip(e)
				}
			}
		}
	}
	strip(v)
	return v
}

// size returns the length of the list or text at a place.
func size(v any, place string) int {
	for step := range strings.SplitSeq(place, ".") {
		switch at := v.(type) {
		case map[string]any:
			v = at[step]
		case []any:
			if len(at) == 0 {
				return 0
			}
			v = at[0]
		}
	}
	switch v := v.(type) {
	case []any:
		return len(v)
	case string:
		return len(v)
	}
	return 0
}

func pretty(t testing.TB, v any) []byte {
	t.Helper()
	text, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestBatchRestart: a server that crashes during a batch, and returns, costs the batch only time,
// directly and through a proxy.
func TestBatchRestart(t *testing.T) {
	const n = 200
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	var input bytes.Buffer
	for i := range n {
		fmt.Fprintf(&input, `{"model":%q,"prompt":%q,"options":{"temperature":0,"num_predict":4}}`+"\n", tiny, words(1, 100)+words(uint64(i+100), 5))
	}
	for _, through := range []string{"directly", "through the proxy"} {
		t.Run(through, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{tiny}})
			address := server.URL()
			if through != "directly" {
				address = startProxy(t, server.URL(), "--slots", "1").URL
			}
			out := filepath.Join(t.TempDir(), "results.jsonl")
			done := func() int {
				text, err := os.ReadFile(out)
				if err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
				return bytes.Count(text, []byte("\n"))
			}
			var log lockedBuffer
			cmd := command(t, bin, "batch", "--server", address, "-i", "-", "-o", out,
				"--retries", "1", "--log-format", "json")
			cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input.Bytes()), &log, &log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "so far", func() bool { return done() >= n/4 })
			server.Kill()
			eventually(t, "waiting", func() bool {
				return strings.Contains(log.String(), "the server does not answer; waiting for it")
			})
			at := done()
			if err := server.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v\n%s", err, log.String())
			}
			if at >= n || done() != n || !strings.Contains(log.String(), "the server answers again") {
				t.Errorf("%d results, %d when it was away\n%s", done(), at, log.String())
			}
		})
	}
}
