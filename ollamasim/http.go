package ollamasim

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/ollama/ollama/api"
)

// The answers of Ollama's server/routes.go.

func (s *Server) route() {
	s.mux = http.NewServeMux()
	for path, f := range map[string]http.HandlerFunc{
		"/{$}": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			io.WriteString(w, "Ollama is running")
		},
		"/api/version": func(w http.ResponseWriter, _ *http.Request) {
			writeBody(w, http.StatusOK, map[string]string{"version": s.config.Version})
		},
		"/api/tags": func(w http.ResponseWriter, _ *http.Request) { writeBody(w, http.StatusOK, s.list()) },
		"/api/ps":   func(w http.ResponseWriter, _ *http.Request) { writeBody(w, http.StatusOK, s.ps()) },
		"/v1/models": func(w http.ResponseWriter, _ *http.Request) {
			writeBody(w, http.StatusOK, modelList(s.list()))
		},
	} {
		s.mux.HandleFunc("GET "+path, f) // and HEAD
	}
	for path, f := range map[string]http.HandlerFunc{
		"/api/show": s.show, "/api/generate": s.generate, "/api/chat": s.chat, "/api/embed": s.embed,
		"/v1/chat/completions": s.chatCompletions, "/v1/completions": s.completions, "/v1/embeddings": s.embeddings,
	} {
		s.mux.HandleFunc("POST "+path, f)
	}
}

// writeBody writes JSON as gin does.
func writeBody(w http.ResponseWriter, status int, v any) {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // it is all our own
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	w.Write(text) // a client that has left gets no error
}

func writeError(w http.ResponseWriter, status int, message string) {
	writeBody(w, status, map[string]string{"error": message})
}

// read reads a request's body.
func read(r *http.Request, v any) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	if len(body) == 0 {
		return errors.New("missing request body")
	}
	return json.Unmarshal(body, v)
}

func (m *Model) digest() string {
	h := fnv.New128a()
	io.WriteString(h, m.Name)
	return fmt.Sprintf("%x%x", h.Sum(nil), h.Sum(nil))
}

func (m *Model) details() api.ModelDetails {
	return api.ModelDetails{Format: "gguf", Family: m.Family, Families: []string{m.Family}, ParameterSize: "simulated", QuantizationLevel: "Q4_K_M"}
}

func (s *Server) list() api.ListResponse {
	list := api.ListResponse{Models: []api.ListModelResponse{}}
	for i := range s.config.Models {
		m := &s.config.Models[i]
		list.Models = append(list.Models, api.ListModelResponse{
			Name: m.Name, Model: m.Name, Size: int64(m.SizeMiB) << 20, Digest: m.digest(), Details: m.details(),
			ModifiedAt: time.Unix(1_700_000_000, 0).UTC(),
		})
	}
	return list
}

func (s *Server) ps() api.ProcessResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep()
	list := api.ProcessResponse{Models: []api.ProcessModelResponse{}}
	for _, run := range s.loaded {
		if !run.ready {
			continue
		}
		m, size := run.model, s.size(run.model, run.options)
		gpu := size
		if s.config.MemoryMiB > 0 {
			gpu = min(size, int64(s.config.MemoryMiB)<<20)
		}
		expires := run.expires // since it was last idle
		if expires.IsZero() {
			expires = s.clock.Now().Add(run.keep)
		}
		list.Models = append(list.Models, api.ProcessModelResponse{
			Name: m.Name, Model: m.Name, Size: size, SizeVRAM: gpu, Digest: m.digest(), Details: m.details(),
			ExpiresAt: expires, ContextLength: run.options.numCtx,
		})
	}
	slices.SortStableFunc(list.Models, func(a, b api.ProcessModelResponse) int { return cmp.Compare(b.ExpiresAt.Unix(), a.ExpiresAt.Unix()) })
	return list
}

func (s *Server) show(w http.ResponseWriter, r *http.Request) {
	var req struct{ Model, Name string } // Name is the older one
	if err := read(r, &req); err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	name := cmp.Or(req.Model, req.Name)
	m := s.model(name)
	if m == nil {
		writeError(w, http.StatusNotFound, fmt.Sprintf("model '%s' not found", name))
		return
	}
	info := map[string]any{"general.architecture": m.Family, m.Family + ".context_length": 131072}
	if m.Window > 0 {
		info[m.Family+".attention.sliding_window"] = m.Window
	}
	capability := "completion"
	if m.Embedding {
		capability = "embedding"
	}
	// Only the keys that exist: the type writes dates that nobody set.
	writeBody(w, http.StatusOK, map[string]any{
		"details": m.details(), "model_info": info, "capabilities": []string{capability}, "modified_at": time.Unix(1_700_000_000, 0).UTC(),
		"license": "", "modelfile": "# simulated\nFROM " + m.Name + "\n", "template": "{{ .Prompt }}",
	})
}

// question is a request for an answer, in the one form to which Ollama reduces them all.
type question struct {
	path, model string
	kind        string // chat or generate
	options     map[string]any
	keepAlive   *api.Duration
	shift       *bool
	truncate    *bool
	stream      bool
	empty       bool // it only loads or unloads the model
	prompt      func(numCtx int) string
	context     bool    // the end of the answer has all tokens
	before      []token // context of the request
	debug       bool    // only the prompt is wanted, once the model is loaded
}

// writer writes an answer in one of the dialects.
type writer interface {
	token(text string) // of a stream
	end(text string, m outcome)
	fail(status int, err error, begun bool)
}

// outcome is what the end of an answer reports.
type outcome struct {
	api.Metrics
	reason   string
	context  []int
	rendered *api.DebugInfo // only the prompt was wanted, and there is no answer
}

// answer answers a request.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, q question, out writer) {
	m := s.model(q.model)
	switch {
	case m == nil:
		out.fail(http.StatusNotFound, fmt.Errorf("model '%s' not found", q.model), false)
		return
	case q.empty && q.keepAlive != nil && q.keepAlive.Duration == 0:
		s.expire(m)
		out.end("", outcome{reason: "unload"})
		return
	case m.Embedding:
		out.fail(http.StatusBadRequest, fmt.Errorf("%q does not support %s", q.model, q.kind), false)
		return
	}
	req, o, err := s.request(m, q.options, q.keepAlive, q.shift, q.truncate)
	if err != nil {
		out.fail(http.StatusInternalServerError, err, false)
		return
	}
	req.stream, req.loadOnly = q.stream, q.empty || q.debug
	var text string
	if !q.empty {
		req.limit, req.keep = o.NumPredict, o.NumKeep
		text = q.prompt(req.options.numCtx)
		req.prompt = q.tokens(text)
	}
	req.fault = s.faultOf(q, text)
	if req.fault != nil && req.fault.After == 0 {
		s.failed(out, &faultError{*req.fault}, false)
		return
	}
	s.arrive(req)
	if sent, err := s.write(r, req, out); err != nil {
		s.failed(out, err, sent > 0)
		return
	}
	end := s.outcome(req)
	if q.debug {
		end = outcome{rendered: &api.DebugInfo{RenderedTemplate: detokenize(q.before) + text}}
	}
	answer := answerTokens(make([]token, 0, req.made), req.seed, 0, req.made)
	if q.context {
		end.context = ids(slices.Concat(req.prompt, answer))
	}
	if q.stream { // it has all been sent
		answer = nil
	}
	out.end(detokenize(answer), end)
}

// tokens returns the tokens of the prompt, of which text is the new part.
func (q *question) tokens(text string) []token {
	all := tokenize(slices.Grow(slices.Clone(q.before), len(text)/3), text)
	if len(all) == 0 { // raw text may have none
		return tokenize(nil, "\n")
	}
	return all
}

// ids writes tokens as a client sees them.
func ids(tokens []token) []int {
	list := make([]int, len(tokens))
	for i, t := range tokens {
		list[i] = int(t)
	}
	return list
}

func (s *Server) faultOf(q question, prompt string) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault == nil || q.empty || q.debug {
		return nil
	}
	s.asked++
	f := s.fault(FaultRequest{Path: q.path, Model: q.model, Prompt: prompt, Number: s.asked})
	if f != nil && f.After == 0 {
		s.stats.Requests++
		s.stats.Failed++
	}
	return f
}

type faultError struct{ Fault }

func (f *faultError) Error() string { return f.Message }

// request returns a request for what a client wants of a model.
func (s *Server) request(m *Model, given map[string]any, keepAlive *api.Duration, shift, truncate *bool) (*request, api.Options, error) {
	o := api.DefaultOptions()
	o.NumCtx = m.NumCtx
	if err := o.FromMap(maps.Clone(given)); err != nil {
		return nil, o, err
	}
	r := &request{
		model: m, options: s.runnerOptions(o, shift),
		truncate: truncate == nil || *truncate, shift: shift == nil || *shift,
	}
	if keepAlive != nil {
		r.keepAlive = &keepAlive.Duration
	}
	return r, o, nil
}

// write passes on the tokens of a stream as they are made, and waits for the end.
func (s *Server) write(r *http.Request, req *request, out writer) (sent int, err error) {
	for over := false; !over && err == nil; {
		err = s.await(r.Context(), req, func() bool { return req.stream && req.made > sent })
		s.mu.Lock()
		made := req.made
		over = req.over
		s.mu.Unlock()
		if req.stream {
			for ; sent < made; sent++ {
				out.token(detokenize([]token{answerToken(req.seed, sent)}))
			}
		}
	}
	return sent, err
}

// failed ends an answer with an error.
func (s *Server) failed(out writer, err error, begun bool) {
	var fault *faultError
	var status api.StatusError
	switch {
	case errors.Is(err, errCrashed), errors.Is(err, errLeft):
		panic(http.ErrAbortHandler)
	case errors.As(err, &fault):
		if fault.Break {
			panic(http.ErrAbortHandler)
		}
		out.fail(cmp.Or(fault.Status, http.StatusInternalServerError), err, begun)
	case errors.Is(err, errMaxQueue):
		out.fail(http.StatusServiceUnavailable, err, begun)
	case errors.As(err, &status):
		out.fail(status.StatusCode, errors.New(status.ErrorMessage), begun)
	default:
		out.fail(http.StatusInternalServerError, err, begun)
	}
}

// outcome returns what the end of an answer reports. A time of zero becomes a microsecond, since
// Ollama omits 0, and no real server takes no time.
func (s *Server) outcome(r *request) outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	took := func(from, to time.Time) time.Duration { return max(to.Sub(from), time.Microsecond) }
	m := outcome{reason: r.reason}
	if r.loadOnly {
		return m
	}
	m.LoadDuration, m.TotalDuration = took(r.arrived, r.ready), took(r.arrived, r.ended)
	m.PromptEvalCount, m.EvalCount = len(r.prompt), r.made
	if s.era == eraC {
		m.PromptEvalCachedCount = &r.reused
	}
	m.PromptEvalDuration, m.EvalDuration = took(r.started, r.evaled), took(r.evaled, r.ended)
	return m
}

func (s *Server) generate(w http.ResponseWriter, r *http.Request) {
	var req api.GenerateRequest
	if err := read(r, &req); err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	if req.Raw && (req.Template != "" || req.System != "" || len(req.Context) > 0) {
		writeError(w, http.StatusBadRequest, "raw mode does not support template, system, or context")
		return
	}
	q := question{
		path: r.URL.Path, kind: "generate", model: req.Model, options: req.Options, keepAlive: req.KeepAlive, shift: req.Shift, truncate: req.Truncate,
		stream: (req.Stream == nil || *req.Stream) && req.Prompt != "", empty: req.Prompt == "", debug: req.DebugRenderOnly,
		context: req.Prompt != "" && !req.Raw && !req.DebugRenderOnly,
		prompt:  func(int) string { return generatePrompt(&req) },
	}
	for _, t := range req.Context {
		q.before = append(q.before, token(t))
	}
	s.answer(w, r, q, &native{w: w, s: s, model: req.Model, stream: q.stream})
}

func generatePrompt(r *api.GenerateRequest) string {
	if r.Raw {
		return r.Prompt
	}
	var messages []api.Message
	if r.System != "" {
		messages = append(messages, api.Message{Role: "system", Content: r.System})
	}
	return render(append(messages, api.Message{Role: "user", Content: r.Prompt}), nil)
}

func (s *Server) chat(w http.ResponseWriter, r *http.Request) {
	var req api.ChatRequest
	if err := read(r, &req); err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	stream := (req.Stream == nil || *req.Stream) && len(req.Messages) > 0
	s.answer(w, r, chatQuestion(r.URL.Path, &req, stream), &native{w: w, s: s, model: req.Model, stream: stream, chat: true})
}

func chatQuestion(path string, req *api.ChatRequest, stream bool) question {
	return question{
		path: path, kind: "chat", model: req.Model, options: req.Options, keepAlive: req.KeepAlive, shift: req.Shift, truncate: req.Truncate,
		stream: stream, empty: len(req.Messages) == 0, debug: req.DebugRenderOnly,
		prompt: func(numCtx int) string {
			return chatPrompt(req.Messages, req.Tools, numCtx, req.Truncate == nil || *req.Truncate)
		},
	}
}

// chatPrompt drops the first messages of a conversation that is too long, except for the system's
// and the last.
func chatPrompt(messages []api.Message, tools api.Tools, numCtx int, truncate bool) string {
	var system []api.Message
	for i := 0; ; i++ {
		text := render(slices.Concat(system, messages[i:]), tools)
		// A token has at least one byte.
		if !truncate || i == len(messages)-1 || len(text) <= numCtx || len(tokenize(nil, text)) <= numCtx {
			return text
		}
		if messages[i].Role == "system" {
			system = append(system, messages[i])
		}
	}
}

// native writes the answers of /api/chat and /api/generate.
type native struct {
	w            http.ResponseWriter
	s            *Server
	model        string
	stream, chat bool
	begun        bool
}

func (n *native) token(text string) { n.line(text, outcome{}, false) }

func (n *native) end(text string, m outcome) { n.line(text, m, true) }

func (n *native) line(text string, m outcome, done bool) {
	var v any
	done = done && m.rendered == nil
	now := n.s.clock.Now().UTC()
	if n.chat {
		v = api.ChatResponse{Model: n.model, CreatedAt: now, Message: api.Message{Role: "assistant", Content: text}, Done: done, DoneReason: m.reason, Metrics: m.Metrics, DebugInfo: m.rendered}
	} else {
		v = api.GenerateResponse{Model: n.model, CreatedAt: now, Response: text, Done: done, DoneReason: m.reason, Metrics: m.Metrics, DebugInfo: m.rendered, Context: m.context}
	}
	if !n.stream || m.rendered != nil {
		writeBody(n.w, http.StatusOK, v)
		return
	}
	n.write(v)
}

func (n *native) write(v any) {
	if !n.begun {
		n.begun = true
		n.w.Header().Set("Content-Type", "application/x-ndjson")
	}
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // it is all our own
	}
	n.w.Write(append(text, '\n')) // if the client has left, its context says so
	http.NewResponseController(n.w).Flush()
}

func (n *native) fail(status int, err error, begun bool) {
	if begun {
		n.write(map[string]string{"error": err.Error()})
		return
	}
	writeError(n.w, status, err.Error())
}
