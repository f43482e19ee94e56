package forms

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/middleware"
)

// oracle answers with the parts of a chat or a generation as Ollama 0.34.1 does: through its own
// middleware, behind which are the two branches of its handlers (which are not exported).
func oracle(chats []api.ChatResponse, generated []api.GenerateResponse, tools bool) http.Handler {
	gin.SetMode(gin.ReleaseMode)
	engine := gin.New()
	stream := func(c *gin.Context, part any) { // streamResponse
		text, _ := json.Marshal(part)
		c.Header("Content-Type", "application/x-ndjson")
		c.Writer.Write(append(text, '\n'))
	}
	isStream := func(c *gin.Context) bool {
		var request struct{ Stream *bool }
		return c.ShouldBindJSON(&request) == nil && (request.Stream == nil || *request.Stream)
	}
	chat := func(c *gin.Context) { // writeChatResponse
		if isStream(c) {
			for _, part := range chats {
				stream(c, part)
			}
			return
		}
		var all api.ChatResponse
		var content, thinking strings.Builder
		var calls []api.ToolCall
		var logprobs []api.Logprob
		for _, part := range chats {
			all = part
			content.WriteString(part.Message.Content)
			thinking.WriteString(part.Message.Thinking)
			if tools {
				calls = append(calls, part.Message.ToolCalls...)
			}
			logprobs = append(logprobs, part.Logprobs...)
		}
		all.Message.Content, all.Message.Thinking, all.Logprobs = content.String(), thinking.String(), logprobs
		if len(calls) > 0 {
			all.Message.ToolCalls = calls
		}
		c.JSON(http.StatusOK, all)
	}
	generate := func(c *gin.Context) { // GenerateHandler
		if isStream(c) {
			for _, part := range generated {
				stream(c, part)
			}
			return
		}
		var all api.GenerateResponse
		var content, thinking strings.Builder
		var logprobs []api.Logprob
		for _, part := range generated {
			all = part
			content.WriteString(part.Response)
			thinking.WriteString(part.Thinking)
			logprobs = append(logprobs, part.Logprobs...)
		}
		all.Response, all.Thinking, all.Logprobs = content.String(), thinking.String(), logprobs
		c.JSON(http.StatusOK, all)
	}
	engine.POST("/api/chat", chat)
	engine.POST("/api/generate", generate)
	engine.POST("/v1/chat/completions", middleware.ChatMiddleware(), chat)
	engine.POST("/v1/completions", middleware.CompletionsMiddleware(), generate)
	engine.POST("/v1/responses", middleware.ResponsesMiddleware(), chat)
	engine.POST("/v1/messages", middleware.AnthropicMessagesMiddleware(), chat)
	return engine
}

// pieces returns parts of a text.
func pieces(r *rand.Rand, most int) []string {
	words := []string{
		"the", " quick", " <b>", "&", `"`, `\`, "\n", "é", "😀", "\u2028", "\t", "\x00", " \uFFFD ", "{", "日本", "",
	}
	var all []string
	for range r.IntN(most + 1) {
		var b strings.Builder
		for range r.IntN(4) {
			b.WriteString(words[r.IntN(len(words))])
		}
		if b.Len() > 0 {
			all = append(all, b.String())
		}
	}
	return all
}

func calls(r *rand.Rand, from, n int) []api.ToolCall {
	var all []api.ToolCall
	for i := range n {
		call := api.ToolCall{ID: fmt.Sprintf("call_%d", from+i)}
		call.Function.Index, call.Function.Name = from+i, "weather"
		call.Function.Arguments = api.NewToolCallFunctionArguments()
		for range r.IntN(3) {
			var value any = strings.Join(pieces(r, 3), "")
			switch r.IntN(4) {
			case 0:
				value = r.NormFloat64()
			case 1:
				value = []any{"<a>", map[string]any{"b": nil}}
			}
			call.Function.Arguments.Set(fmt.Sprint("k", r.IntN(9)), value)
		}
		all = append(all, call)
	}
	return all
}

// parts returns a generation in parts, as the handlers make them.
func randomParts(r *rand.Rand) (chats []api.ChatResponse, generated []api.GenerateResponse) {
	created := time.Date(2026, 11, 30, 5, 0, 0, r.IntN(1e9), time.UTC)
	var messages []api.Message
	for _, text := range pieces(r, 3) {
		messages = append(messages, api.Message{Thinking: text})
	}
	for _, text := range pieces(r, 5) {
		messages = append(messages, api.Message{Content: text})
	}
	for n := range r.IntN(3) {
		messages = append(messages, api.Message{ToolCalls: calls(r, 3*n, 1+r.IntN(2))})
	}
	if len(messages) > 1 && r.IntN(3) == 0 { // thoughts and text in one part
		messages[1].Thinking, messages[0] = messages[0].Thinking+messages[1].Thinking, messages[1]
		messages = messages[1:]
	}
	if r.IntN(6) == 0 {
		r.Shuffle(len(messages), func(i, k int) { messages[i], messages[k] = messages[k], messages[i] })
	}
	if len(messages) == 0 || r.IntN(3) > 0 {
		messages = append(messages, api.Message{})
	}
	logprobs := r.IntN(3) == 0
	for i, m := range messages {
		m.Role = "assistant"
		chat := api.ChatResponse{Model: "m<1>", CreatedAt: created, Message: m}
		part := api.GenerateResponse{Model: "m<1>", CreatedAt: created, Response: m.Content, Thinking: m.Thinking}
		if logprobs && r.IntN(2) == 0 {
			l := []api.Logprob{{TokenLogprob: api.TokenLogprob{Token: "<t>", Logprob: -r.ExpFloat64(), Bytes: []int{1, 2}}}}
			chat.Logprobs, part.Logprobs = l, l
		}
		if i == len(messages)-1 {
			chat.Done, part.Done = true, true
			reason := []string{"stop", "length"}[r.IntN(2)]
			chat.DoneReason, part.DoneReason = reason, reason
			chat.Metrics = api.Metrics{TotalDuration: 5, LoadDuration: time.Duration(r.IntN(2)), PromptEvalCount: 1 + r.IntN(9), EvalCount: r.IntN(9)}
			if r.IntN(2) == 0 {
				cached := r.IntN(2)
				chat.PromptEvalCachedCount = &cached
			}
			part.Metrics, part.ToolCalls = chat.Metrics, m.ToolCalls
			if r.IntN(2) == 0 {
				part.Context = []int{1, 2, 3}
			}
		}
		chats, generated = append(chats, chat), append(generated, part)
		created = created.Add(time.Millisecond)
	}
	return chats, generated
}

func oracleBody(path string, stream bool) string {
	more := map[string]string{
		"/v1/chat/completions": `,"stream_options":{"include_usage":true},"messages":[{"role":"user","content":"x"}]`,
		"/v1/completions":      `,"stream_options":{"include_usage":true},"prompt":"x"`,
		"/v1/responses": `,"input":"x","instructions":"<b>","top_p":0.25,"reasoning":{"effort":"high"},` +
			`"tools":[{"type":"function","name":"weather","parameters":{"b":1,"a":2}}]`,
		"/v1/messages": `,"max_tokens":9,"messages":[{"role":"user","content":"x"}]`,
	}
	return fmt.Sprintf(`{"model":"m<1>","stream":%v%s}`, stream, more[path])
}

// TestOracle compares with Ollama's own code, for generations of all kinds.
func TestOracle(t *testing.T) {
	converted, streamed, total := map[string]int{}, map[string]int{}, 300
	for seed := range total {
		r := rand.New(rand.NewPCG(uint64(seed), 22))
		chats, generated := randomParts(r)
		tools := r.IntN(4) > 0
		handler := oracle(chats, generated, tools)
		for d := range byte(6) {
			path := pathOf(d + 1)
			if path == "/v1/messages" && thinksAgain(chats) {
				continue
			}
			ask := func(stream bool) []byte {
				w := httptest.NewRecorder()
				request := httptest.NewRequest(http.MethodPost, path, strings.NewReader(oracleBody(path, stream)))
				handler.ServeHTTP(w, request)
				if w.Code != http.StatusOK {
					t.Fatalf("%s: %d %s", path, w.Code, w.Body)
				}
				if got := w.Header().Get("Content-Type"); got != ContentType(path, stream) {
					t.Fatalf("%s: %s", path, got)
				}
				return w.Body.Bytes()
			}
			whole, stream := ask(false), ask(true)
			if made, ok := Whole(path, stream, tools); ok {
				converted[path]++
				if maskedIDs(made) != maskedIDs(whole) {
					t.Fatalf("%d, %s:\n%s\nOllama has\n%s\nfrom\n%s", seed, path, made, whole, stream)
				}
			} else if tools && path != "/v1/responses" && path != "/v1/messages" && !bytes.Contains(stream, []byte("\uFFFD")) && path != "/api/generate" {
				t.Errorf("%d, %s: not converted:\n%s", seed, path, stream)
			}
			if again, ok := Stream(path, whole, true); ok {
				streamed[path]++
				if back, ok := Whole(path, again, true); !ok || !bytes.Equal(back, whole) {
					t.Fatalf("%d, %s:\n%s\nas a stream\n%s\nwhole\n%s", seed, path, whole, again, back)
				}
			} else if path != "/v1/responses" && path != "/v1/messages" {
				t.Errorf("%d, %s: no stream:\n%s", seed, path, whole)
			}
		}
	}
	t.Logf("of %d: whole answers of streams: %v; streams of whole answers: %v", total, converted, streamed)
}

// ownMasks are the ids and times that Ollama's middleware makes anew for each answer.
var ownMasks = regexp.MustCompile(`"(chatcmpl-|cmpl-|resp_|msg_|rs_resp_|fc_resp_)[0-9a-f]+|"(created|created_at|completed_at)":[0-9]+`)

func maskedIDs(text []byte) string { return string(ownMasks.ReplaceAll(text, []byte(`"$1$2`))) }

// thinksAgain reports whether thoughts follow something else. Ollama leaves them out of a stream of
// /v1/messages.
func thinksAgain(chats []api.ChatResponse) bool {
	other := false
	for _, c := range chats {
		if c.Message.Thinking != "" && other {
			return true
		}
		other = other || c.Message.Content != "" || len(c.Message.ToolCalls) > 0
	}
	return false
}
