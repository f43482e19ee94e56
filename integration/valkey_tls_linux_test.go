package integration

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// TestValkeyTLS: one server that speaks TLS alone is what proxies share, has their answers, and is
// where batches are shared, each named by a URL of one form. It may go away and come back.
func TestValkeyTLS(t *testing.T) {
	sim, err := ollamasim.New(ollamasim.Config{Models: []ollamasim.Model{
		{Name: "m", LoadTime: time.Millisecond, PromptRate: 1e6, AnswerRate: 1e6, AnswerTokens: 1},
	}})
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(sim)
	t.Cleanup(front.Close)
	f := newWorkersFolder(t, "m", 3, 5)
	f.store = valkeyserver.StartTLS(t, "--requirepass", "hunter2")
	url := strings.Replace(f.store.URL(), "//", "//:hunter2@", 1) + "?ca-file=" + f.store.Authority()
	p := startProxy(t, front.URL, "--shared", url, "--answers-store", url, "--cache-answers", "all")
	target, err := valkeyconn.Parse(url, "")
	if err != nil {
		t.Fatal(err)
	}
	store, err := valkeyconn.Connect(target.Option())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	// has reports whether the server has a key that begins so.
	has := func(prefix string) bool {
		keys, err := store.Do(t.Context(), store.B().Keys().Pattern("ollama-cacheproxy:"+prefix+"*").Build()).AsStrSlice()
		return err == nil && len(keys) > 0
	}
	up := func(n float64) func() bool {
		return func() bool {
			return p.Metric(t, "ollama_cacheproxy_shared_up") == n && p.Metric(t, "ollama_cacheproxy_answers_up") == n
		}
	}
	ask := func(text string) {
		t.Helper()
		body, err := json.Marshal(map[string]any{"model": "m", "stream": false, "prompt": text + words(1, 300)})
		if err != nil {
			t.Fatal(err)
		}
		if r := request(t.Context(), plainClient(t), http.MethodPost, p.URL+"/api/generate", string(body)); r.status != http.StatusOK {
			t.Fatal(r.status, r.body, r.err)
		}
	}
	ask("one")
	for _, prefix := range []string{"shared:seen", "answers:"} {
		eventually(t, "in the server: "+prefix, func() bool { return has(prefix) })
	}
	var log lockedBuffer
	for _, out := range []string{"a.jsonl", "b.jsonl"} {
		if err := f.command(&log, p.URL, out, "--workers", url).Run(); err != nil {
			t.Fatalf("%v\n%s", err, log.String())
		}
	}
	if a := f.read("a.jsonl"); a != f.read("b.jsonl") || strings.Count(a, "\n") != 15 || !has("batch:") {
		t.Errorf("%s", a)
	}
	f.store.Kill()
	ask("two")
	eventually(t, "seen to be gone", up(0))
	f.store.Restart()
	eventually(t, "back", up(1))
	for _, shown := range []string{p.Log(), log.String()} {
		if strings.Contains(shown, "hunter2") {
			t.Error("the password is shown")
		}
	}
}
