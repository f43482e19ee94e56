package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// embedModel makes embeddings.
const embedModel = "gen-llama-embed"

// textCounter is a server before Ollama that counts the texts to be embedded which reach it.
type textCounter struct {
	URL   string
	mu    sync.Mutex
	texts []string // guarded by mu
}

func countTexts(t *testing.T, ollama string) *textCounter {
	t.Helper()
	to, err := url.Parse(ollama)
	if err != nil {
		t.Fatal(err)
	}
	c := &textCounter{}
	forward := httputil.NewSingleHostReverseProxy(to)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "embed") {
			body, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			c.count(body)
		}
		forward.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	c.URL = srv.URL
	return c
}

// count notes the texts of a request, but those with which the proxy tries a model.
func (c *textCounter) count(body []byte) {
	var q struct{ Input any }
	if json.Unmarshal(body, &q) != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	list, ok := q.Input.([]any)
	if !ok {
		list = []any{q.Input}
	}
	for _, text := range list {
		if s := fmt.Sprint(text); strings.Contains(s, "chunk") {
			c.texts = append(c.texts, s)
		}
	}
}

// since returns the texts that have come since the last call.
func (c *textCounter) since() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := c.texts
	c.texts = nil
	return list
}

var embedDurations = regexp.MustCompile(`,"(total|load)_duration":\d+`)

// embeddingsBody is a request, with more members.
func embeddingsBody(t *testing.T, input any, more string) string {
	t.Helper()
	text, err := json.Marshal(input)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`{"model":%q,"input":%s%s}`, embedModel, text, more)
}

func chunks(n, length int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("chunk %d: %s", i, words(uint64(i), length))
	}
	return list
}

// TestEmbeddingsExact: every answer is Ollama's own, whether its inputs are known or not.
func TestEmbeddingsExact(t *testing.T) {
	for _, version := range realollama.Versions() {
		t.Run(version, func(t *testing.T) {
			t.Parallel() // they mostly wait until the model has been seen to repeat
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{embedModel}})
			p := startProxy(t, server.URL())
			texts := chunks(12, 30)
			mixed := []string{texts[3], "chunk new", texts[3], texts[0], "chunk é\n\"<&>"}
			long := strings.Repeat("chunk of many words ", 200)
			hits := 0
			for range 2 {
				for _, q := range []struct{ path, body string }{
					{"/api/embed", embeddingsBody(t, texts, "")},
					{"/api/embed", embeddingsBody(t, mixed, "")},
					{"/api/embed", embeddingsBody(t, texts[0], `,"dimensions":16`)},
					{"/v1/embeddings", embeddingsBody(t, mixed, "")},
					{"/v1/embeddings", embeddingsBody(t, texts, `,"encoding_format":"base64"`)},
					{"/v1/embeddings", embeddingsBody(t, texts[:2], `,"dimensions":16`)},
					{"/api/embeddings", fmt.Sprintf(`{"model":%q,"prompt":"chunk one"}`, embedModel)},
					{"/api/embed", embeddingsBody(t, []string{"chunk a", long}, `,"options":{"num_ctx":64}`)},
					{"/api/embed", embeddingsBody(t, []string{"chunk a", long}, `,"options":{"num_ctx":64},"truncate":false`)},
					{"/api/embed", embeddingsBody(t, []any{"chunk", 1}, "")},
					{"/api/embed", embeddingsBody(t, []string{}, "")},
					{"/v1/embeddings", embeddingsBody(t, "chunk", `,"encoding_format":"int8"`)},
					{"/api/embed", `{"model":"no-such-model","input":"chunk"}`},
				} {
					status, kind, got, cached := embedThrough(t, p.URL+q.path, q.body)
					hits += strings.Count(cached, "; hit")
					wantStatus, wantKind, want := post(t, server.URL()+q.path, q.body)
					got, want = embedDurations.ReplaceAllString(got, ""), embedDurations.ReplaceAllString(want, "")
					if status != wantStatus || kind != wantKind || got != want {
						t.Errorf("%s %.200s (%s):\n%d %s %.300s\nOllama:\n%d %s %.300s", q.path, q.body, cached, status, kind, got, wantStatus, wantKind, want)
					}
				}
			}
			if hits < 6 {
				t.Errorf("%d answers of the second round were known; want 8 but for models that were not tried yet", hits)
			}
		})
	}
}

func embedThrough(t *testing.T, url, body string) (status int, kind, text, cached string) {
	t.Helper()
	res, err := http.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, res.Header.Get("Content-Type"), string(data), res.Header.Get("Cache-Status")
}

// TestReindex embeds 2,000 chunks, and again when 1 in 100 has changed.
func TestReindex(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{embedModel}})
	between := countTexts(t, server.URL())
	p := startProxy(t, between.URL)
	texts := chunks(2000, 100)
	began := time.Now()
	if status, _, text, _ := embedThrough(t, p.URL+"/api/embed", embeddingsBody(t, texts, "")); status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	first := time.Since(began)
	if n := len(between.since()); n != len(texts) {
		t.Errorf("%d texts reached Ollama, want %d", n, len(texts))
	}
	var text string
	second := first
	for range 3 { // the fastest of these counts: the machine may have more to do in one of them
		var changed []string
		for i := 0; i < len(texts); i += 100 {
			texts[i] += " changed"
			changed = append(changed, texts[i])
		}
		began = time.Now()
		var cached string
		_, _, text, cached = embedThrough(t, p.URL+"/api/embed", embeddingsBody(t, texts, ""))
		second = min(second, time.Since(began))
		reached := between.since()
		slices.Sort(reached)
		slices.Sort(changed)
		if !slices.Equal(reached, changed) {
			t.Errorf("%d texts reached Ollama (%s), want the %d that have changed",
				len(reached), cached, len(changed))
		}
	}
	t.Logf("2,000 chunks: %v, and with 20 changed %v: %.4f", first, second, float64(second)/float64(first))
	if second > first/20 {
		t.Errorf("with 20 changed it took %v, at first %v: want at most 0.05 of it", second, first)
	}
	_, _, want := post(t, server.URL()+"/api/embed", embeddingsBody(t, texts, ""))
	if embedDurations.ReplaceAllString(text, "") != embedDurations.ReplaceAllString(want, "") {
		t.Error("the answer is not Ollama's")
	}
}

// TestReindexClients does the same with langchain-ollama and the OpenAI client, unchanged.
func TestReindexClients(t *testing.T) {
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	requirements, err := os.ReadFile("clients/requirements.txt")
	if err != nil {
		t.Fatal(err)
	}
	python, err := cache.PythonEnv(t.Context(), "clients", string(requirements), 600)
	if err != nil {
		t.Fatal(err)
	}
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{embedModel}})
	between := countTexts(t, server.URL())
	p := startProxy(t, between.URL)
	texts := chunks(1000, 100)
	data, err := json.Marshal(texts)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "chunks.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, python, "reindex.py")
	cmd.Dir = "clients"
	cmd.Env = clientEnv(t.TempDir(), "CLIENT_BASE_URL="+p.URL, "CLIENT_CHUNKS="+path)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(stderr.String(), 30))
	}
	var seconds []float64
	if err := json.Unmarshal(out, &seconds); err != nil || len(seconds) != 4 {
		t.Fatalf("%s: %v", out, err)
	}
	if n, want := len(between.since()), 2*(len(texts)+3*len(texts)/100); n != want {
		t.Errorf("%d texts reached Ollama, want %d", n, want)
	}
	for i, client := range []string{"langchain-ollama", "openai"} {
		ratio := seconds[2*i+1] / seconds[2*i]
		t.Logf("%s: 1,000 chunks: %.2f s, and with 10 changed %.3f s: %.4f", client, seconds[2*i], seconds[2*i+1], ratio)
		if ratio > 0.05 {
			t.Errorf("%s: the second run took %.4f of the first, want at most 0.05", client, ratio)
		}
	}
}
