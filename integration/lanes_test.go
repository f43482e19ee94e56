package integration

import (
	"encoding/json"
	"fmt"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestLanes: waiting requests that share a prefix follow each other, and so do those with the same
// options. The server's log shows the evaluations and loads.
func TestLanes(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			const model = "gen-llama-tiny"
			config := realollama.Config{Version: version, Models: []string{model}}
			if version != realollama.EraA {
				config.CacheRAMMiB = new(int) // only the slot holds a prompt
			}
			server := realollama.Start(t, config)
			hold := make(chan struct{}) // lets one request go on
			p := startProxy(t, gate(t, server, hold).URL, "--slots", "1")
			ask := func(url string, prefix, n, numCtx int) string {
				body, err := json.Marshal(map[string]any{
					"model": model, "stream": false, "options": map[string]any{"temperature": 0, "num_predict": 4, "num_ctx": numCtx},
					"messages": []map[string]string{{"role": "system", "content": words(uint64(prefix), 150)}, {"role": "user", "content": words(uint64(1000+100*prefix+n), 10)}},
				})
				if err != nil {
					t.Error(err)
					return ""
				}
				status, _, text := post(t, url+"/api/chat", string(body))
				var answer struct{ Message struct{ Content string } }
				if err := json.Unmarshal([]byte(text), &answer); err != nil || status != 200 {
					t.Errorf("%d %s", status, text)
				}
				return answer.Message.Content
			}
			evaluated := func(mark realollama.Mark, n int) int {
				t.Helper()
				_, sum := evaluations(t, server, mark, n)
				return sum
			}
			// together sends n requests with send. The only lane is busy until all of them wait:
			// requests that arrive one by one are served one by one.
			together := func(n int, send func()) {
				t.Helper()
				var first sync.WaitGroup
				first.Go(func() {
					body := `{"model":"` + model + `","messages":[{"role":"user","content":"HOLD"}],` +
						`"stream":false,"options":{"num_predict":1,"num_ctx":4096}}`
					if status, _, text := post(t, p.URL+"/api/chat", body); status != 200 {
						t.Errorf("the first: %d %s", status, text)
					}
				})
				queues := func(wantWaiting int) {
					t.Helper()
					settles(t, func() error {
						waiting, busy, err := queued(p.URL)
						if err != nil || waiting != wantWaiting || busy != 1 {
							return fmt.Errorf("%d wait, %d lanes are busy, want %d and 1 (%v)",
								waiting, busy, wantWaiting, err)
						}
						return nil
					})
				}
				queues(0)
				send()
				queues(n)
				hold <- struct{}{}
				first.Wait()
			}
			const prefixes, each = 12, 4

			// The minimum: one after the other, in the order of the prefixes.
			ask(server.URL(), 99, 0, 4096)
			mark := server.Mark()
			want := map[string]string{}
			for prefix := range prefixes {
				for n := range each {
					want[fmt.Sprint(prefix, n)] = ask(server.URL(), prefix, n, 4096)
				}
			}
			least := evaluated(mark, prefixes*each)

			// All at once, with the prefixes in turn.
			mark = server.Mark()
			var mu sync.Mutex
			var wg sync.WaitGroup
			got := map[string]string{}
			together(prefixes*each, func() {
				for n := range each {
					for prefix := range prefixes {
						wg.Go(func() {
							text := ask(p.URL, prefix, n, 4096)
							mu.Lock()
							defer mu.Unlock()
							got[fmt.Sprint(prefix, n)] = text
						})
					}
				}
			})
			wg.Wait()
			// One more than those: the first.
			if sum := evaluated(mark, prefixes*each+1); sum*100 > least*115 {
				t.Errorf("%d tokens evaluated, %d are the least possible", sum, least)
			} else {
				t.Logf("%d tokens evaluated, %d are the least possible", sum, least)
			}
			differ := 0
			for id, text := range want {
				if got[id] != text {
					differ++
				}
			}
			// The engine's own answers vary now and then: see TestAnswers in realollama.
			if differ*20 > len(want) {
				t.Errorf("%d of %d answers differ", differ, len(want))
			}

			// Three num_ctx, ten requests of each, all at once.
			loads := server.Mark()
			together(30, func() {
				for n := range 30 {
					wg.Go(func() { ask(p.URL, 50, n, []int{2048, 3072, 4096}[n%3]) })
				}
			})
			wg.Wait()
			if n := server.Loads(loads); n > 5 {
				t.Errorf("%d loads for three num_ctx", n)
			} else {
				t.Logf("%d loads for three num_ctx", n)
			}
		})
	}
}
