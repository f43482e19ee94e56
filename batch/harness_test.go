package batch

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// simulated is a simulated Ollama that is as fast as possible.
func simulated(t testing.TB, c ollamasim.Config) (*ollamasim.Server, string) {
	t.Helper()
	if c.Models == nil {
		c.Models = []ollamasim.Model{{Name: "m"}}
	}
	for i := range c.Models {
		c.Models[i].LoadTime, c.Models[i].PromptRate, c.Models[i].AnswerRate = time.Millisecond, 1e7, 1e6
	}
	s, err := ollamasim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s, serve(t, s)
}

func serve(t testing.TB, h http.Handler) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}

// config returns a batch for an input, which it writes to a file.
func config(t testing.TB, server, input string) Config {
	t.Helper()
	dir := t.TempDir()
	in := filepath.Join(dir, "in.jsonl")
	write(t, in, input)
	s, err := OpenLines(in, nil, UTF8)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return over(t, server, s, filepath.Join(dir, "out.jsonl"))
}

func over(t testing.TB, server string, s *Source, out string) Config {
	t.Helper()
	u, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return Config{
		Source: s, Output: out, Order: InputOrder, Window: 1000, Retries: 3, Server: u, Transport: transport,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), firstWait: time.Millisecond,
	}
}

// run runs a batch to its end and returns its summary and the output.
func run(t testing.TB, c Config) (*Summary, string) {
	t.Helper()
	s, err := Run(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s, read(t, c.Output)
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// words returns text of n tokens of the simulated server, different for each id.
func words(id, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, " w%dx%d", id, i)
	}
	return b.String()
}

func chat(system, user string) string {
	text, err := json.Marshal(map[string]any{
		"model": "m", "options": map[string]any{"num_predict": 3, "temperature": 0},
		"messages": []map[string]string{{"role": "system", "content": system}, {"role": "user", "content": user}},
	})
	if err != nil {
		panic(err) // texts
	}
	return string(text)
}

// interleaved returns an input whose prefixes alternate.
func interleaved(prefixes, each, length int) string {
	var b strings.Builder
	for n := range each {
		for p := range prefixes {
			b.WriteString(chat(words(p, length), words(1000+p*each+n, 5)) + "\n")
		}
	}
	return b.String()
}

// resultLine is a line of the output.
type resultLine struct {
	Line     int
	CustomID json.RawMessage `json:"custom_id"`
	Response *struct {
		Message         struct{ Content string }
		StatusCode      int             `json:"status_code"`
		Body            json.RawMessage // OpenAI's
		PromptEvalCount int             `json:"prompt_eval_count"`
	}
	Error *struct {
		Code, Message string
		Status        int
	}
}

func results(t testing.TB, text string) []resultLine {
	t.Helper()
	var all []resultLine
	for line := range strings.Lines(text) {
		var r resultLine
		if err := json.Unmarshal([]byte(line), &r); err != nil || !strings.HasSuffix(line, "\n") {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

// fake answers /api/chat with the last message's text, unless ask answers.
type fake struct {
	// Returns true if it has answered.
	ask func(w http.ResponseWriter, r *http.Request, user string) bool
	get func(w http.ResponseWriter, r *http.Request) bool
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	if f.get != nil && f.get(w, r) {
		return
	}
	switch r.URL.Path {
	case "/api/show":
		io.WriteString(w, `{}`)
	case "/api/ps":
		io.WriteString(w, `{"models":[]}`)
	case "/api/version":
		io.WriteString(w, `{"version":"0.34.1"}`)
	case "/api/chat":
		var req struct{ Messages []struct{ Content string } }
		if err := json.Unmarshal(body, &req); err != nil || len(req.Messages) == 0 {
			http.Error(w, `{"error":"no messages"}`, 400)
			return
		}
		user := strings.TrimSpace(req.Messages[len(req.Messages)-1].Content)
		if f.ask != nil && f.ask(w, r, user) {
			return
		}
		said(w, user)
	default:
		http.NotFound(w, r)
	}
}

// said streams an answer in two pieces and an end.
func said(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	line := func(v any) {
		out, _ := json.Marshal(v)
		w.Write(append(out, '\n'))
		w.(http.Flusher).Flush()
	}
	piece := func(s string) map[string]any {
		return map[string]any{"model": "m", "created_at": time.Now(), "message": map[string]string{"role": "assistant", "content": s}, "done": false}
	}
	line(piece(text[:len(text)/2]))
	line(piece(text[len(text)/2:]))
	end := piece("")
	end["done"], end["done_reason"], end["prompt_eval_count"], end["eval_count"] = true, "stop", 10, 2
	end["total_duration"], end["prompt_eval_duration"], end["eval_duration"] = 3e6, 1e6, 2e6
	line(end)
}

func numbered(n int) string {
	var b bytes.Buffer
	for i := range n {
		fmt.Fprintln(&b, chat("be brief", fmt.Sprintf("item %d", i+1)))
	}
	return b.String()
}
