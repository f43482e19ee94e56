package integration

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// warmModel takes about a millisecond for each token of a prompt.
const warmModel = "gen-llama-costly"

// warmPrompt is a chat with one of the prefixes, of length words, and a question.
func warmPrompt(t testing.TB, prefix uint64, length int, question string) string {
	t.Helper()
	text, err := json.Marshal(map[string]any{
		"model": warmModel, "stream": false, "options": map[string]any{"temperature": 0, "num_predict": 4},
		"messages": []map[string]string{
			{"role": "system", "content": words(prefix, length)}, {"role": "user", "content": question},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// prewarmFile writes a file for --prewarm.
func prewarmFile(t testing.TB, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "prewarm.jsonl")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// prewarmed returns how many of the proxy's own requests had this result; "": any.
func (p *proxyProcess) prewarmed(t testing.TB, result string) int {
	t.Helper()
	series := "ollama_cacheproxy_prewarm_requests_total{"
	if result != "" {
		series += fmt.Sprintf("result=%q}", result)
	}
	return int(p.Metric(t, series))
}

// warm checks that almost nothing is evaluated of a prompt, sent now, whose prefix is warm.
func (p *proxyProcess) warm(t testing.TB, server *realollama.Server, what, body string) {
	t.Helper()
	mark := server.Mark()
	mustPost(t, p.URL+"/api/chat", body)
	total, evaluated := evaluations(t, server, mark, 1)
	t.Logf("%s: %d of %d tokens were evaluated", what, evaluated, total)
	if evaluated > 40 || total < 150 { // 20, and the question itself
		t.Errorf("%s: %d of %d tokens were evaluated", what, evaluated, total)
	}
}

// TestPrewarm: on real servers, the prompts of --prewarm are warm before the first request: at the
// start, after a load and after a restart.
func TestPrewarm(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			t.Parallel() // the proxy mostly waits until nobody asks
			server := realollama.Start(t, realollama.Config{
				Version: version, Models: []string{warmModel}, Parallel: 3,
			})
			const length = 150
			lines := []string{
				warmPrompt(t, 1, length, "?"),
				`{"path":"/v1/chat/completions","body":` + warmPrompt(t, 2, length, "?") + `}`,
			}
			// Era A puts all prompts with the same beginning into one slot.
			if version == realollama.EraA {
				lines = lines[:1]
			}
			n := len(lines)
			p := startProxy(t, server.URL(), "--prewarm", prewarmFile(t, lines...))
			again := func(what string, sent int) {
				t.Helper()
				eventually(t, "warm "+what, func() bool { return p.prewarmed(t, "") >= sent })
				for prefix := range uint64(n) {
					p.warm(t, server, what, warmPrompt(t, prefix+1, length, "What about "+what+"?"))
				}
				if got := p.prewarmed(t, ""); got != sent {
					t.Errorf("%s: %d requests were sent to make prompts warm, want %d", what, got, sent)
				}
			}
			again("at first", n)

			mustPost(t, p.URL+"/api/generate", `{"model":"`+warmModel+`","keep_alive":0}`)
			eventually(t, "unloaded", func() bool { return len(loaded(t, server.URL())) == 0 })
			mustPost(t, p.URL+"/api/chat", warmPrompt(t, 3, 20, "Who?"))
			again("after a load", 2*n)

			server.Kill()
			eventually(t, "seen to be away", func() bool {
				return p.Metric(t, "ollama_cacheproxy_upstream_up{") == 0
			})
			if err := server.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			again("after a restart", 3*n)
			if got := p.prewarmed(t, "evaluated"); got != 3*n {
				t.Errorf("%d requests had their prompts evaluated, want %d", got, 3*n)
			}
			// Only clients' requests are counted as requests.
			p.counts(t, `ollama_cacheproxy_requests_total{endpoint="/api/chat"`, float64(3*n+1))
		})
	}
}

// TestPrewarmGivesWay: a client that arrives while a prompt is being prewarmed does not wait for
// the end of that evaluation, and prewarming resumes afterwards.
func TestPrewarmGivesWay(t *testing.T) {
	server := realollama.Start(t, realollama.Config{
		Version: realollama.Newest(), Models: []string{warmModel}, Parallel: 1,
	})
	p := startProxy(t, server.URL(), "--prewarm", prewarmFile(t, warmPrompt(t, 1, 900, "?")))
	eventually(t, "loaded for the prompt", func() bool { return len(loaded(t, server.URL())) == 1 })
	mark := server.Mark()
	mustPost(t, p.URL+"/api/chat", warmPrompt(t, 2, 20, "Who?"))
	first, err := server.WaitEvaluations(t.Context(), mark, 1)
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 1 || first[0].Total > 300 {
		t.Errorf("when the client was answered the server had evaluated %+v", first)
	}
	p.counts(t, `ollama_cacheproxy_prewarm_requests_total{result="given_up"}`, 1)
	eventually(t, "warm", func() bool { return p.prewarmed(t, "") == 2 })
	p.warm(t, server, "then", warmPrompt(t, 1, 900, "What?"))
}

// TestPrewarmFile: a wrong file is refused at the start, and read again when it is changed.
func TestPrewarmFile(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{warmModel}})
	path := prewarmFile(t, warmPrompt(t, 1, 150, "?"))
	p := startProxy(t, server.URL(), "--prewarm", path)
	eventually(t, "warm", func() bool { return p.prewarmed(t, "evaluated") == 1 })
	if err := os.WriteFile(path, []byte(warmPrompt(t, 2, 150, "?")+"\n{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "refused", func() bool { return strings.Contains(p.Log(), "could not be read again") })
	if err := os.WriteFile(path, []byte(warmPrompt(t, 2, 150, "?")), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "warm, too", func() bool { return p.prewarmed(t, "evaluated") == 2 })
	p.warm(t, server, "of the changed file", warmPrompt(t, 2, 150, "What?"))
	if status, _, _ := get(t, p.URL+"/_cacheproxy/ready"); status != http.StatusOK {
		t.Errorf("ready: %d", status)
	}
}

// TestPrewarmContexts: stored contexts are attached before the first request: those of the file's
// prompts after a restart of both, and the most used ones after a load.
func TestPrewarmContexts(t *testing.T) {
	prewarmContexts(t, realollama.Newest())
}

func prewarmContexts(t *testing.T, version string) {
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(t.TempDir(), "home")
	ollama, err := realollama.Link(t.Context(), realollama.LinkConfig{
		Version: version, Home: home, Program: bin,
	})
	if err != nil {
		t.Fatal(err)
	}
	server := realollama.Start(t, realollama.Config{
		Version: version, Bin: ollama, Models: []string{warmModel}, Parallel: 4,
	})
	const length, contexts = 150, "ollama_cacheproxy_contexts_"
	file := prewarmFile(t, warmPrompt(t, 1, length, "?"))
	unload := func() {
		t.Helper()
		mustPost(t, server.URL()+"/api/generate", `{"model":"`+warmModel+`","keep_alive":0}`)
		eventually(t, "unloaded", func() bool { return len(loaded(t, server.URL())) == 0 })
	}

	p := startProxy(t, server.URL(), "--contexts", home, "--prewarm", file)
	eventually(t, "warm", func() bool { return p.prewarmed(t, "evaluated") == 1 })
	eventually(t, "stored", func() bool { return p.Metric(t, contexts+"saved_total") == 1 })
	for n := range 2 { // another prefix, used twice
		mustPost(t, p.URL+"/api/chat", warmPrompt(t, 2, length, fmt.Sprintf("Which %d?", n)))
		eventually(t, "stored, too", func() bool { return p.Metric(t, contexts+"saved_total") >= 2 })
		unload()
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}

	mark := server.Mark()
	p = startProxy(t, server.URL(), "--contexts", home, "--prewarm", file)
	eventually(t, "warm again", func() bool { return p.prewarmed(t, "") == 1 })
	if total, evaluated := evaluations(t, server, mark, 1); evaluated > 20 || p.prewarmed(t, "attached") != 1 {
		t.Errorf("%d of %d tokens were evaluated to make the prompt warm again", evaluated, total)
	}
	eventually(t, "filled", func() bool { return p.Metric(t, contexts+"filled_total") == 1 })
	attached := p.Metric(t, contexts+"attached_total")
	p.warm(t, server, "of the file, after a restart", warmPrompt(t, 1, length, "What?"))
	p.warm(t, server, "of no file, after a restart", warmPrompt(t, 2, length, "What?"))
	if n := p.Metric(t, contexts+"attached_total"); n != attached {
		t.Errorf("%v contexts were attached when somebody asked", n-attached)
	}

	// A proxy that finds the model loaded knows of its slots only which ones are empty.
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	p = startProxy(t, server.URL(), "--contexts", home)
	eventually(t, "filled at first", func() bool { return p.Metric(t, contexts+"filled_total") == 2 })
}
