package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestAttachThroughProxy: with --attach-context auto a group's requests are sent with stored context sooner or later, and
// every client gets what it would have got directly: text, context and counts.
func TestAttachThroughProxy(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			const model = "gen-llama-tiny"
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{model}})
			p := startProxy(t, server.URL(), "--attach-context", "auto")
			rubric := words(3, 600)
			ask := func(url string, n int) generated {
				t.Helper()
				body, err := json.Marshal(map[string]any{
					"model": model, "stream": false, "system": "You judge texts.", "prompt": rubric + "\n" + words(uint64(100+n), 40),
					"options": map[string]any{"temperature": 0, "seed": 1, "num_predict": 12, "num_ctx": attachContext},
				})
				if err != nil {
					t.Fatal(err)
				}
				status, _, text := post(t, url+"/api/generate", string(body))
				var g generated
				if err := json.Unmarshal([]byte(text), &g); err != nil || status != http.StatusOK {
					t.Fatalf("%d %v", status, err)
				}
				return g
			}
			count := func(outcome string) float64 {
				return p.Metric(t, fmt.Sprintf(`ollama_cacheproxy_attach_context_total{model="%s:latest",outcome=%q}`, model, outcome))
			}
			compare := func(n int) {
				t.Helper()
				ask(server.URL(), n) // so that both have the same tokens left to evaluate: the last one
				direct, proxied := ask(server.URL(), n), ask(p.URL, n)
				if direct.Response != proxied.Response || !bytes.Equal(direct.Context, proxied.Context) || direct.PromptEvalCount != proxied.PromptEvalCount || direct.EvalCount != proxied.EvalCount {
					t.Fatalf("request %d: %q, %d prompt tokens; directly %q, %d", n, proxied.Response, proxied.PromptEvalCount, direct.Response, direct.PromptEvalCount)
				}
			}
			for n := range 2 {
				compare(n)
			}
			eventually(t, "trusted", func() bool { return count("trusted") > 0 })
			for n := 2; n < 40 && count("no_slower")+count("slower") == 0; n++ {
				compare(n)
			}
			if count("attached") < 8 || count("no_slower")+count("slower") != 1 {
				t.Errorf("attached %v times, no slower %v, slower %v", count("attached"), count("no_slower"), count("slower"))
			}
			for _, bad := range []string{"text_differs", "context_differs", "count_differs", "render_failed", "refused"} {
				if n := count(bad); n > 0 {
					t.Errorf("%s: %v", bad, n)
				}
			}
			t.Logf("attached %v times; no slower %v, slower %v", count("attached"), count("no_slower"), count("slower"))
		})
	}
}
