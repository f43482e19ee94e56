package integration

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestTwoNames: two scripts that use one model under two names share its slot. One after the other,
// they evaluate their prefix once each; in turns, each request would evaluate all of it.
func TestTwoNames(t *testing.T) {
	const each = 20
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			config := realollama.Config{Version: version, Models: []string{tiny}}
			if version != realollama.EraA {
				config.CacheRAMMiB = new(int) // only the slot holds a prompt
			}
			server := realollama.Start(t, config)
			p := startProxy(t, server.URL(), "--slots", "1")
			mustPost(t, p.URL+"/api/copy", `{"source":"`+tiny+`","destination":"copy"}`)
			mustPost(t, p.URL+"/api/create", `{"model":"made","from":"`+tiny+`","parameters":{"temperature":0}}`)
			mustPost(t, p.URL+"/api/chat", `{"model":"`+tiny+`"}`) // loads it
			mark := server.Mark()
			names := []string{tiny, "copy", "made"}
			var wg sync.WaitGroup
			for i, model := range names {
				for n := range each {
					body, err := json.Marshal(map[string]any{
						"model": model, "stream": false, "options": map[string]any{"num_predict": 1},
						"messages": []map[string]string{
							{"role": "system", "content": words(uint64(i+1), 150)},
							{"role": "user", "content": words(uint64(1000+100*i+n), 10)},
						},
					})
					if err != nil {
						t.Fatal(err)
					}
					wg.Go(func() {
						if status, _, text := post(t, p.URL+"/api/chat", string(body)); status != 200 {
							t.Errorf("%s: %d %s", model, status, text)
						}
					})
				}
			}
			wg.Wait()
			total, evaluated := evaluations(t, server, mark, len(names)*each)
			t.Logf("%d tokens, %d evaluated, of requests under %d names", total, evaluated, len(names))
			if 3*evaluated > total {
				t.Errorf("%d of %d tokens were evaluated, want less than a third", evaluated, total)
			}
		})
	}
}

// TestTouchLeavesOthers: an app that uses Ollama directly, with another num_ctx, keeps the model as
// it loaded it, whatever was asked for through the proxy before or meanwhile.
func TestTouchLeavesOthers(t *testing.T) {
	const other = "gen-llama-tiny-b"
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny, other}})
			p := startProxy(t, server.URL())
			held := func(model string) func() bool {
				return func() bool { return about(loaded(t, server.URL())[model+":latest"], 24*time.Hour) }
			}
			mustPost(t, p.URL+"/v1/chat/completions", v1(tiny))
			eventually(t, "held for a day", held(tiny))
			mark := server.Mark()
			app := strings.Replace(generate(tiny, ""), `"num_predict":1`, `"num_predict":1,"num_ctx":2048`, 1)
			mustPost(t, server.URL()+"/api/generate", app)
			mustPost(t, p.URL+"/v1/chat/completions", v1(other))
			// The proxy has polled the loaded models.
			eventually(t, "the other model held", held(other))
			for range 3 {
				mustPost(t, server.URL()+"/api/generate", app)
			}
			if n := server.Loads(mark); n != 2 {
				t.Errorf("%d loads, want the app's own and the other model's", n)
			}
		})
	}
}
