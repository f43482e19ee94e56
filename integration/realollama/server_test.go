package realollama

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// answer is the part of a reply that the tests read.
type answer struct {
	Response   string      `json:"response"`
	Count      int         `json:"prompt_eval_count"`
	Duration   int64       `json:"prompt_eval_duration"`
	Generating int64       `json:"eval_duration"`
	Generated  int         `json:"eval_count"`
	Embeddings [][]float64 `json:"embeddings"`
}

func post(t testing.TB, s *Server, path string, body map[string]any) answer {
	t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL()+path, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var a answer
	if err := json.Unmarshal(text, &a); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %s", path, resp.Status, text)
	}
	return a
}

func generate(t testing.TB, s *Server, model, prompt string, tokens int) answer {
	t.Helper()
	return post(t, s, "/api/generate", map[string]any{
		"model": model, "prompt": prompt, "stream": false,
		"options": map[string]any{"temperature": 0, "seed": 7, "num_predict": tokens},
	})
}

// perEra runs a test on every era to test.
func perEra(t *testing.T, test func(t *testing.T, version string)) {
	for _, version := range Versions() {
		t.Run(version, func(t *testing.T) { test(t, version) })
	}
}

const question = "You read the document below and answer the question about it. What is the capital of France?"

func TestServerReuse(t *testing.T) {
	perEra(t, func(t *testing.T, version string) {
		s := Start(t, Config{Version: version, Models: []string{"smollm2", "gen-llama-tiny"}})
		for _, model := range s.Models() {
			mark := s.Mark()
			first := generate(t, s, model, question, 12)
			second := generate(t, s, model, question, 12)
			if first.Response != second.Response || first.Response == "" {
				t.Errorf("%s answered %q, then %q", model, first.Response, second.Response)
			}
			got, err := s.WaitEvaluations(t.Context(), mark, 2)
			if err != nil {
				t.Fatal(err)
			}
			want := []Evaluation{
				{Total: first.Count, Reused: 0, Evaluated: first.Count},
				{Total: first.Count, Reused: first.Count - 1, Evaluated: 1},
			}
			if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
				t.Errorf("%s: the log has evaluations %+v, want %+v", model, got, want)
			}
			if n := s.Loads(mark); n != 1 {
				t.Errorf("%s was loaded %d times, want once", model, n)
			}
		}
	})
}

func TestServerModels(t *testing.T) {
	perEra(t, func(t *testing.T, version string) {
		t.Parallel() // it mostly waits for models to be loaded
		s := Start(t, Config{Version: version, Models: ModelNames(), MaxLoaded: 1})
		answers := map[string]string{}
		for _, model := range s.Models() {
			if model == "gen-llama-embed" {
				continue
			}
			mark := s.Mark()
			a := generate(t, s, model, question, 16)
			if b := generate(t, s, model, question, 16); b.Response != a.Response {
				t.Errorf("%s answered %q, then %q", model, a.Response, b.Response)
			}
			if s.Loads(mark) != 1 {
				t.Errorf("%s was loaded %d times, want once", model, s.Loads(mark))
			}
			t.Logf("%-18s %q", model, a.Response)
			if strings.HasPrefix(model, "gen-") {
				if a.Generated != 16 || !utf8.ValidString(a.Response) || distinct(a.Response) < 8 {
					t.Errorf("%s answered with %d tokens of dull or broken text: %q", model, a.Generated, a.Response)
				}
			}
			answers[model] = a.Response
		}
		if answers["gen-llama-tiny"] == answers["gen-llama-tiny-b"] {
			t.Error("two models with different weights gave the same answer")
		}
		embedding := post(t, s, "/api/embed", map[string]any{"model": "gen-llama-embed", "input": []string{"one", "two"}})
		if len(embedding.Embeddings) != 2 || len(embedding.Embeddings[0]) != 96 {
			t.Errorf("/api/embed gave %d embeddings", len(embedding.Embeddings))
		}
	})
}

func distinct(text string) int {
	seen := map[rune]bool{}
	for _, r := range text {
		seen[r] = true
	}
	return len(seen)
}

// Two prefixes in turn on one slot are only reused if the engine keeps evicted prompts in host
// memory.
func TestServerCacheRAM(t *testing.T) {
	off := 0
	perEra(t, func(t *testing.T, version string) {
		for _, ram := range []*int{nil, &off} {
			s := Start(t, Config{Version: version, Models: []string{"gen-llama-tiny"}, CacheRAMMiB: ram})
			mark := s.Mark()
			for _, prompt := range []string{"the town ", "many people ", "the town "} {
				generate(t, s, "gen-llama-tiny", strings.Repeat(prompt, 100), 1)
			}
			got, err := s.WaitEvaluations(t.Context(), mark, 3)
			if err != nil {
				t.Fatal(err)
			}
			restored := got[2].Reused > got[2].Total/2
			if want := version != EraA && ram == nil; restored != want {
				t.Errorf("evaluations %+v: restored is %v, want %v", got, restored, want)
			}
		}
	})
}

func TestServerKillAndRestart(t *testing.T) {
	perEra(t, func(t *testing.T, version string) {
		s := Start(t, Config{Version: version, Models: []string{"gen-llama-tiny"}})
		before := generate(t, s, "gen-llama-tiny", question, 4)
		url := s.URL()
		s.Kill()
		select {
		case <-s.Exited():
		default:
			t.Error("the server runs after Kill")
		}
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s.URL() != url {
			t.Errorf("the server moved from %s to %s", url, s.URL())
		}
		if after := generate(t, s, "gen-llama-tiny", question, 4); after.Response != before.Response {
			t.Errorf("it answered %q before and %q after the restart", before.Response, after.Response)
		}
		list := exec.CommandContext(t.Context(), s.Bin(), "list")
		list.Env = append(os.Environ(), "OLLAMA_HOST="+s.Addr())
		if output, err := list.CombinedOutput(); err != nil || !strings.Contains(string(output), "gen-llama-tiny:latest") {
			t.Errorf("ollama list: %v\n%s", err, output)
		}
	})
}

func TestServerSeesNoOuterSettings(t *testing.T) {
	t.Setenv("OLLAMA_HOST", "127.0.0.1:9")
	t.Setenv("OLLAMA_MODELS", t.TempDir())
	version := Versions()[0]
	s := Start(t, Config{Version: version, Models: []string{"gen-llama-tiny"}, Env: []string{"OLLAMA_KEEP_ALIVE=7m"}})
	generate(t, s, "gen-llama-tiny", question, 1)
	if !strings.Contains(s.Log(), "OLLAMA_KEEP_ALIVE:7m0s") {
		t.Error("Config.Env did not reach the server")
	}
}

func TestRunSaysWhatIsMissing(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := Run(ctx, Config{Version: "0.1.0"}, nil); err == nil || !strings.Contains(err.Error(), EraC) {
		t.Errorf("an unknown version gave %v", err)
	}
	t.Setenv("OLLAMA_BIN_0_34_1", "/nowhere/ollama")
	if _, err := Run(ctx, Config{Version: EraC}, nil); err == nil || !strings.Contains(err.Error(), "OLLAMA_BIN_0_34_1") {
		t.Errorf("a missing binary gave %v", err)
	}
}

// TestServerLogLinesAreWhole: the lines of Ollama and of its engine, which write to one log at the
// same time, stay separate, even if an engine writes a line in pieces.
func TestServerLogLinesAreWhole(t *testing.T) {
	perEra(t, func(t *testing.T, version string) {
		s := Start(t, Config{Version: version, Models: []string{"gen-llama-tiny"}})
		const requests = 100
		for i := range requests {
			generate(t, s, "gen-llama-tiny", "the town", 1+i%2)
		}
		count := 0
		for line := range strings.Lines(s.Log()) {
			if strings.HasPrefix(line, "[GIN]") && strings.Contains(line, `"/api/generate"`) {
				count++
			} else if strings.Contains(line, "[GIN] 2") && !strings.HasPrefix(line, "[GIN]") {
				t.Errorf("a line within another: %s", line)
			}
		}
		if count != requests {
			t.Errorf("the log has %d requests, sent were %d", count, requests)
		}
	})
}
