package batch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// chatPieces is a stream of /api/chat with every kind of content.
func chatPieces() []api.ChatResponse {
	logprobs := func(tokens ...string) (all []api.Logprob) {
		for i, text := range tokens {
			token := api.TokenLogprob{Token: text, Logprob: -0.5, Bytes: []int{65, 66}}
			all = append(all, api.Logprob{TokenLogprob: token, TopLogprobs: []api.TokenLogprob{token, {Token: "other", Logprob: -1 - float64(i)}}})
		}
		return all
	}
	call := func(id string, index int, city string) api.ToolCall {
		arguments := api.NewToolCallFunctionArguments()
		arguments.Set("city", city)
		return api.ToolCall{ID: id, Function: api.ToolCallFunction{Index: index, Name: "weather", Arguments: arguments}}
	}
	piece := func(m api.Message, l ...api.Logprob) api.ChatResponse {
		m.Role = "assistant"
		return api.ChatResponse{Model: "m", CreatedAt: time.Unix(1e9, 0).UTC(), Message: m, Logprobs: l}
	}
	end := piece(api.Message{})
	end.Done, end.DoneReason, end.Metrics = true, "stop", api.Metrics{PromptEvalCount: 10, EvalCount: 6}
	return []api.ChatResponse{
		piece(api.Message{Thinking: "let me "}, logprobs("let", " me")...),
		piece(api.Message{Thinking: "see", Content: "\"It "}, logprobs("see", "It")...),
		piece(api.Message{}, logprobs("held back")...),
		piece(api.Message{Content: "is\n"}, logprobs("is")...),
		piece(api.Message{ToolCalls: []api.ToolCall{call("call_1", 0, "Paris"), call("call_2", 1, "Oslo")}}),
		// Some parsers restart their numbering.
		piece(api.Message{ToolCalls: []api.ToolCall{call("call_3", 1, "Rome")}}),
		piece(api.Message{Content: "<sunny> é"}, logprobs("sunny")...),
		end,
	}
}

// whole returns Ollama's answer to a request without a stream, like writeChatResponse in its
// server/routes.go.
func whole(pieces []api.ChatResponse) api.ChatResponse {
	all := pieces[len(pieces)-1]
	var m api.Message
	var logprobs []api.Logprob
	for _, p := range pieces {
		m.Thinking, m.Content = m.Thinking+p.Message.Thinking, m.Content+p.Message.Content
		m.ToolCalls = append(m.ToolCalls, p.Message.ToolCalls...)
		logprobs = append(logprobs, p.Logprobs...)
	}
	m.Role = all.Message.Role
	all.Message, all.Logprobs = m, logprobs
	return all
}

// TestJoined: joining a stream gives Ollama's answer to a request without a stream, in every
// dialect, as Ollama's own package makes both. TestBatchDialects in integration asks real servers.
func TestJoined(t *testing.T) {
	const ndjson, sse = "application/x-ndjson", "text/event-stream"
	pieces := chatPieces()
	var native, events, generated, completions bytes.Buffer
	line := func(b *bytes.Buffer, format string, v any) {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(b, format, text)
	}
	generate := func(p api.ChatResponse) api.GenerateResponse {
		return api.GenerateResponse{
			Model: p.Model, CreatedAt: p.CreatedAt, Thinking: p.Message.Thinking, Response: p.Message.Content, ToolCalls: p.Message.ToolCalls,
			Logprobs: p.Logprobs, Done: p.Done, DoneReason: p.DoneReason, Metrics: p.Metrics,
		}
	}
	for i, p := range pieces {
		line(&native, "%s\n", p)
		line(&generated, "%s\n", generate(p))
		for _, chunk := range openai.ToStreamChunks("chatcmpl-1", p, i == 0) {
			line(&events, "data: %s\n\n", chunk)
		}
		chunk := openai.ToCompleteChunk("cmpl-1", generate(p))
		chunk.Usage = new(openai.Usage)
		line(&completions, "data: %s\n\n", chunk)
	}
	end := pieces[len(pieces)-1]
	finish := openai.FinishChunk("chatcmpl-1", end, true)
	line(&events, "data: %s\n\n", finish)
	usage := openai.ToUsage(end)
	finish.Usage, finish.Choices = &usage, []openai.ChunkChoice{}
	line(&events, "data: %s\n\ndata: [DONE]\n\n", finish)
	chunk := openai.ToCompleteChunk("cmpl-1", generate(end))
	chunk.Usage, chunk.Choices = &usage, []openai.CompleteChunkChoice{}
	line(&completions, "data: %s\n\ndata: [DONE]\n\n", chunk)

	all := whole(pieces)
	for _, c := range []struct {
		path, contentType, stream string
		whole                     any
	}{
		{"/api/chat", ndjson, native.String(), all},
		{"/api/generate", ndjson, generated.String(), generate(all)},
		{"/v1/chat/completions", sse, events.String(), openai.ToChatCompletion("chatcmpl-1", all)},
		{"/v1/completions", sse, completions.String(), openai.ToCompletion("cmpl-1", generate(all))},
	} {
		text, err := json.Marshal(c.whole)
		if err != nil {
			t.Fatal(err)
		}
		r := &request{path: c.path, endpoint: endpoints[c.path]}
		want := parsed(t, text)
		delete(want, "created_at")
		if !r.native() {
			want["id"], want["created"] = "line-7", 0.0
		}
		for contentType, answer := range map[string]string{c.contentType: c.stream, "application/json": string(text)} {
			got, _, err := readAnswer(strings.NewReader(answer), r, contentType, 7, func() {})
			if err != nil {
				t.Errorf("%s, %s: %v", c.path, contentType, err)
			} else if !reflect.DeepEqual(parsed(t, got), want) {
				t.Errorf("%s, %s:\n%s\nwant\n%s", c.path, contentType, got, text)
			}
		}
	}
}

func parsed(t testing.TB, text []byte) (v map[string]any) {
	t.Helper()
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return v
}

// TestJoinedByType: the rule depends on types only, and knows no names, so later versions may add
// some.
func TestJoinedByType(t *testing.T) {
	for _, c := range []struct{ pieces, want string }{
		{ // as OpenAI streams the arguments of calls
			`{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"a","type":"function","function":{"name":"f","arguments":"{\"x\""}}]}}]}
{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":":1}"}},{"index":1,"id":"b","type":"function","function":{"name":"g","arguments":"{}"}}]}}]}`,
			`{"choices":[{"index":0,"message":{"tool_calls":[{"index":0,"id":"a","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}},{"index":1,"id":"b","type":"function","function":{"name":"g","arguments":"{}"}}]}}]}`,
		},
		{ // more than one choice
			`{"choices":[{"index":0,"text":"a","finish_reason":null},{"index":1,"text":"b","finish_reason":null}]}
{"choices":[{"index":1,"text":"B","finish_reason":"stop"},{"index":0,"text":"A","finish_reason":"length"}]}`,
			`{"choices":[{"index":0,"text":"aA","finish_reason":"length"},{"index":1,"text":"bB","finish_reason":"stop"}]}`,
		},
		{ // other lists, texts, objects and numbers within choices
			`{"choices":[{"index":0,"logprobs":{"content":[1],"refusal":null,"text_offset":[0]},"delta":{"refusal":"no","audio":{"data":"AA","expires_at":1}}}]}
{"choices":[{"index":0,"logprobs":{"content":[2, 3],"refusal":[4],"text_offset":[]},"delta":{"refusal":" way","audio":{"data":"BB","expires_at":2}}}]}`,
			`{"choices":[{"index":0,"logprobs":{"content":[1,2,3],"refusal":[4],"text_offset":[0]},"message":{"refusal":"no way","audio":{"data":"AABB","expires_at":2}}}]}`,
		},
		{`{"message":{"role":"assistant","content":""}}
{"message":{"role":"assistant","content":null,"images":["x"]}}
{"message":{"role":"assistant","content":"a\u00e9"},"done":true}`, `{"message":{"role":"assistant","content":"aé","images":["x"]},"done":true}`},
	} {
		var o object
		for piece := range strings.Lines(c.pieces) {
			o.join("", []byte(piece))
		}
		if got := string(o.appendTo(nil, 0, "")); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}
}

// FuzzJoined: whatever a server streams is joined to one valid answer or refused, and an answer in
// one piece is not changed.
func FuzzJoined(f *testing.F) {
	f.Add(`{"message":{"content":"a","logprobs":[{"index":0,"id":"x"},{"index":1},2,[3]]},"choices":[{"index":0,"text":"a"}],"response":"x","done":true}`)
	f.Add(`{"message":{"content":"a","a":{"b":[]}},"response":"x"}` + "\n" + `{"message":{"content":"b","a":{"b":[{"index":0}]}},"done":true,"response":null}`)
	f.Fuzz(func(t *testing.T, pieces string) {
		r := &request{path: "/api/chat", endpoint: prefix.Chat}
		read := func(text string) ([]byte, error) {
			answer, _, err := readAnswer(strings.NewReader(text), r, "application/x-ndjson", 1, func() {})
			return answer, err
		}
		joined, err := read(pieces)
		if err != nil {
			return
		}
		if again, err := read(string(joined)); err != nil || !json.Valid(joined) || !bytes.Equal(again, joined) {
			t.Fatalf("%s\nbecame\n%s\nand that\n%s, %v", pieces, joined, again, err)
		}
	})
}
