package integration

import (
	"encoding/json"
	"net/http"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestRestart: fifty requests wait while the only server is ended, as in a crash and as in an
// upgrade, and restarted. The request under way is lost, since it may have been begun; all others
// are answered.
func TestRestart(t *testing.T) {
	const model, waiting = "gen-llama-tiny", 50
	server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{model}})
	p := startProxy(t, server.URL(), "--slots", "1")
	for name, end := range map[string]func(){"crash": server.Kill, "stop": func() {}} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var wg, steps sync.WaitGroup
			statuses, done := map[int]int{}, 0
			for n := range waiting {
				wg.Go(func() {
					body, err := json.Marshal(map[string]any{
						"model": model, "stream": false, "options": map[string]any{"temperature": 0, "num_predict": 16},
						"messages": []map[string]string{{"role": "user", "content": words(uint64(n), 50)}},
					})
					if err != nil {
						t.Error(err)
						return
					}
					status, _, text := post(t, p.URL+"/api/chat", string(body))
					mu.Lock()
					defer mu.Unlock()
					if statuses[status]++; status != http.StatusOK && status != http.StatusBadGateway {
						t.Errorf("%d %s", status, text)
					}
					if done++; done == 5 {
						steps.Go(func() {
							end()
							if err := server.Restart(t.Context()); err != nil {
								t.Error(err)
							}
						})
					}
				})
			}
			wg.Wait()
			steps.Wait()
			t.Logf("statuses: %v", statuses)
			// The only lane had one request; when that was lost, the next may have been sent before
			// the proxy noticed.
			if statuses[http.StatusOK] < waiting-2 || statuses[http.StatusOK]+statuses[http.StatusBadGateway] != waiting {
				t.Errorf("of %d requests, one of which was under way: %v", waiting, statuses)
			}
		})
	}
}
