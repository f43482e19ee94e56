package ollamasim

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"
)

// OpenAI's dialect, converted by Ollama's own package, as its middleware does.

func modelList(l api.ListResponse) any { return openai.ToListCompletion(l) }

func writeOpenAIError(w http.ResponseWriter, status int, message string) {
	writeBody(w, status, openai.NewError(status, message))
}

func (s *Server) chatCompletions(w http.ResponseWriter, r *http.Request) {
	var req openai.ChatCompletionRequest
	if err := read(r, &req); err != nil {
		writeOpenAIError(w, http.StatusBadRequest, err.Error())
		return
	}
	if len(req.Messages) == 0 {
		writeOpenAIError(w, http.StatusBadRequest, "[] is too short - 'messages'")
		return
	}
	chat, err := openai.FromChatRequest(req)
	if err != nil {
		writeOpenAIError(w, http.StatusBadRequest, err.Error())
		return
	}
	chat.Options = fromJSON(chat.Options)
	out := &compatible{w: w, s: s, model: req.Model, stream: req.Stream, usage: req.StreamOptions, chat: true}
	s.answer(w, r, chatQuestion(r.URL.Path, chat, req.Stream), out)
}

// fromJSON converts numbers to what they are when read from JSON, as in Ollama, whose middleware
// writes the body anew.
func fromJSON(options map[string]any) (read map[string]any) {
	text, err := json.Marshal(options)
	if err == nil {
		err = json.Unmarshal(text, &read)
	}
	if err != nil {
		panic(err) // it was read from JSON
	}
	return read
}

func (s *Server) completions(w http.ResponseWriter, r *http.Request) {
	var req openai.CompletionRequest
	if err := read(r, &req); err != nil {
		writeOpenAIError(w, http.StatusBadRequest, err.Error())
		return
	}
	g, err := openai.FromCompleteRequest(req)
	if err != nil {
		writeOpenAIError(w, http.StatusBadRequest, err.Error())
		return
	}
	q := question{
		path: r.URL.Path, kind: "generate", model: req.Model, options: fromJSON(g.Options), stream: req.Stream, empty: g.Prompt == "",
		prompt: func(int) string { return generatePrompt(&g) },
	}
	s.answer(w, r, q, &compatible{w: w, s: s, model: req.Model, stream: req.Stream, usage: req.StreamOptions})
}

func (s *Server) embeddings(w http.ResponseWriter, r *http.Request) {
	var req openai.EmbedRequest
	if err := read(r, &req); err != nil {
		writeOpenAIError(w, http.StatusBadRequest, err.Error())
		return
	}
	answer, status, err := s.embedding(r, &api.EmbedRequest{Model: req.Model, Input: req.Input, Dimensions: req.Dimensions})
	if err != nil {
		writeOpenAIError(w, status, err.Error())
		return
	}
	writeBody(w, http.StatusOK, openai.ToEmbeddingList(req.Model, *answer, req.EncodingFormat))
}

// compatible writes the answers of /v1/chat/completions and /v1/completions.
type compatible struct {
	w            http.ResponseWriter
	s            *Server
	model        string
	stream, chat bool
	usage        *openai.StreamOptions
	begun        bool
}

func (c *compatible) id() string {
	if c.chat {
		return "chatcmpl-1"
	}
	return "cmpl-1"
}

func (c *compatible) chatResponse(text string, m outcome, done bool) api.ChatResponse {
	return api.ChatResponse{Model: c.model, CreatedAt: c.s.clock.Now().UTC(), Message: api.Message{Role: "assistant", Content: text}, Done: done, DoneReason: m.reason, Metrics: m.Metrics}
}

func (c *compatible) token(text string) {
	if c.chat {
		for _, chunk := range openai.ToStreamChunks(c.id(), c.chatResponse(text, outcome{}, false), !c.begun) {
			c.event(chunk)
		}
		return
	}
	c.chunk(text, outcome{}, false)
}

// chunk is one of /v1/completions, which reports zeros in every event but the last.
func (c *compatible) chunk(text string, m outcome, done bool) {
	r := api.GenerateResponse{Model: c.model, CreatedAt: c.s.clock.Now().UTC(), Response: text, Done: done, DoneReason: m.reason, Metrics: m.Metrics}
	chunk := openai.ToCompleteChunk(c.id(), r)
	counts := c.usage != nil && c.usage.IncludeUsage
	if counts {
		chunk.Usage = &openai.Usage{}
	}
	c.event(chunk)
	if done && counts {
		u := openai.ToUsageGenerate(r)
		chunk.Usage, chunk.Choices = &u, []openai.CompleteChunkChoice{}
		c.event(chunk)
	}
}

func (c *compatible) end(text string, m outcome) {
	if !c.stream {
		c.w.Header().Set("Content-Type", "application/json")
		if c.chat {
			writeBody(c.w, http.StatusOK, openai.ToChatCompletion(c.id(), c.chatResponse(text, m, true)))
		} else {
			writeBody(c.w, http.StatusOK, openai.ToCompletion(c.id(), api.GenerateResponse{Model: c.model, CreatedAt: c.s.clock.Now().UTC(), Response: text, Done: true, DoneReason: m.reason, Metrics: m.Metrics}))
		}
		return
	}
	if !c.chat {
		c.chunk("", m, true)
	} else {
		if !c.begun {
			c.token("")
		}
		r := c.chatResponse("", m, true)
		finish := openai.FinishChunk(c.id(), r, false)
		c.event(finish)
		if c.usage != nil && c.usage.IncludeUsage {
			u := openai.ToUsage(r)
			finish.Usage, finish.Choices = &u, []openai.ChunkChoice{}
			c.event(finish)
		}
	}
	c.data([]byte("[DONE]"))
}

// fail writes an error. Within a stream Ollama's middleware turns it into an empty piece, and the
// stream has no end.
func (c *compatible) fail(status int, err error, begun bool) {
	switch {
	case !begun:
		writeOpenAIError(c.w, status, err.Error())
	default:
		c.token("")
	}
}

func (c *compatible) event(v any) {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // it is all our own
	}
	c.data(text)
}

func (c *compatible) data(text []byte) {
	if !c.begun {
		c.begun = true
		c.w.Header().Set("Content-Type", "text/event-stream")
	}
	fmt.Fprintf(c.w, "data: %s\n\n", text) // if the client has left, its context says so
	http.NewResponseController(c.w).Flush()
}
