package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// loaded returns how long each loaded model will stay, according to /api/ps.
func loaded(t testing.TB, base string) map[string]time.Duration {
	t.Helper()
	status, _, text := get(t, base+"/api/ps")
	var ps api.ProcessResponse
	if err := json.Unmarshal([]byte(text), &ps); status != http.StatusOK || err != nil {
		t.Fatalf("/api/ps: %d %s, %v", status, text, err)
	}
	stays := map[string]time.Duration{}
	for _, m := range ps.Models {
		stays[m.Name] = time.Until(m.ExpiresAt)
	}
	return stays
}

func mustPost(t testing.TB, url, body string) string {
	t.Helper()
	status, _, text := post(t, url, body)
	if status != http.StatusOK {
		t.Fatalf("POST %s %s: %d %s", url, body, status, text)
	}
	return text
}

// about reports whether a model stays for d, within the time that a request takes.
func about(stays, d time.Duration) bool { return stays > d-30*time.Second && stays <= d+time.Second }

const forever = 100 * 365 * 24 * time.Hour // /api/ps shows "for ever" as a date beyond this

func generate(model, members string) string {
	return `{"model":"` + model + `","prompt":"hi","stream":false,"options":{"num_predict":1}` + members + `}`
}

func v1(model string) string {
	return `{"model":"` + model + `","messages":[{"role":"user","content":"hi"}],"max_tokens":1}`
}

// TestKeepAlivePolicies: three clients in turn, in every order. Under if-absent the last one that
// sets a value decides, as with Ollama itself; under the other policies the order does not matter.
func TestKeepAlivePolicies(t *testing.T) {
	const day = 24 * time.Hour
	clients := map[string]string{"5m": `,"keep_alive":"5m"`, "none": ``, "-1": `,"keep_alive":-1`}
	orders := [][]string{{"5m", "none", "-1"}, {"5m", "-1", "none"}, {"none", "5m", "-1"}, {"none", "-1", "5m"}, {"-1", "5m", "none"}, {"-1", "none", "5m"}}
	want := map[string]func(order []string, stays time.Duration) bool{
		"if-absent": func(order []string, stays time.Duration) bool {
			switch order[2] {
			case "5m":
				return about(stays, 5*time.Minute)
			default: // -1 was asked for before, and a request without a value does not shorten it
				return stays > forever
			}
		},
		"at-least": func(_ []string, stays time.Duration) bool { return stays > forever },
		"force":    func(_ []string, stays time.Duration) bool { return about(stays, day) },
	}
	for _, version := range realollama.Distinct() {
		server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}})
		for policy, ok := range want {
			p := startProxy(t, server.URL(), "--keep-alive-policy", policy)
			for _, order := range orders {
				t.Run(fmt.Sprintf("%s/%s/%v", version, policy, order), func(t *testing.T) {
					for _, client := range order {
						mustPost(t, p.URL+"/api/generate", generate(tiny, clients[client]))
					}
					// Ollama notices the end of a request shortly after the client.
					eventually(t, fmt.Sprintf("the expiry that %s asks for after %v", policy, order), func() bool {
						stays, isLoaded := loaded(t, p.URL)[tiny+":latest"]
						return isLoaded && ok(order, stays)
					})
					unload := mustPost(t, p.URL+"/api/generate", `{"model":"`+tiny+`","keep_alive":0}`)
					if !strings.Contains(unload, `"done_reason":"unload"`) {
						t.Errorf("keep_alive 0 became %s", unload)
					}
					eventually(t, "unloaded", func() bool { return len(loaded(t, p.URL)) == 0 })
				})
			}
		}
	}
}

// TestKeepAliveV1: models used through /v1 are kept loaded as well, by one request of the proxy per
// load, which never loads a model itself.
func TestKeepAliveV1(t *testing.T) {
	const other = "gen-llama-tiny-b"
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			t.Parallel() // it mostly waits for Ollama
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny, other}, KeepAlive: "10s"})
			p := startProxy(t, server.URL())
			touches := func() float64 { return p.Metric(t, "ollama_cacheproxy_keep_alive_touches_total{") }
			// A touch is counted when it is answered, shortly after the model is held.
			touched := func(want float64, why string) {
				t.Helper()
				eventually(t, "counted: "+why, func() bool { return touches() >= want })
				if n := touches(); n != want {
					t.Errorf("%v touches %s, want %v", n, why, want)
				}
			}
			held := func(model string) func() bool {
				return func() bool { return about(loaded(t, p.URL)[model+":latest"], 24*time.Hour) }
			}

			mark := server.Mark()
			for path, body := range map[string]string{
				"/v1/chat/completions": v1(tiny),
				"/v1/completions":      `{"model":"` + tiny + `","prompt":"hi","max_tokens":1}`,
				"/v1/responses":        `{"model":"` + tiny + `","input":"hi","max_output_tokens":1}`,
				"/v1/messages":         v1(tiny),
			} {
				mustPost(t, p.URL+path, body)
			}
			eventually(t, "held for a day", held(tiny))
			touched(1, "for one load")
			if n := server.Loads(mark); n != 1 {
				t.Errorf("%d loads, want 1: setting keep_alive must not reload", n)
			}

			// A client's own unload remains one. Another model's touch shows that the proxy has
			// polled since.
			unload := mustPost(t, p.URL+"/api/chat", `{"model":"`+tiny+`","messages":[],"keep_alive":"0s"}`)
			if !strings.Contains(unload, `"done_reason":"unload"`) || strings.Count(unload, "\n") > 1 {
				t.Errorf("unloading answered %q", unload)
			}
			eventually(t, "unloaded", func() bool { _, isLoaded := loaded(t, p.URL)[tiny+":latest"]; return !isLoaded })
			mark = server.Mark()
			mustPost(t, p.URL+"/v1/chat/completions", v1(other))
			eventually(t, "the other model held", held(other))
			touched(2, "for two")
			if _, isLoaded := loaded(t, p.URL)[tiny+":latest"]; isLoaded || server.Loads(mark) != 1 {
				t.Errorf("the model that the client unloaded is back: %v, %d loads", loaded(t, p.URL), server.Loads(mark))
			}

			// When it is used again, it is loaded again and held again.
			mustPost(t, p.URL+"/v1/chat/completions", v1(tiny))
			eventually(t, "held again", held(tiny))

			// The same after the server was killed and restarted.
			server.Kill()
			eventually(t, "the proxy sees that the upstream is gone", func() bool {
				status, _, text := get(t, p.URL+"/api/version")
				return status == http.StatusBadGateway && strings.Contains(text, server.Addr()) && p.Metric(t, "ollama_cacheproxy_upstream_up") == 0
			})
			if err := server.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			before := touches()
			mustPost(t, p.URL+"/v1/chat/completions", v1(tiny))
			eventually(t, "held after the restart", held(tiny))
			touched(before+1, "with one after the restart")
		})
	}
}

// TestKeepAliveV1LeavesClients: a client that pinned a model natively keeps its own value; the
// touch can be switched off.
func TestKeepAliveV1LeavesClients(t *testing.T) {
	version := realollama.Versions()[0]
	server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}})
	p := startProxy(t, server.URL(), "--no-touch")
	mustPost(t, p.URL+"/api/generate", `{"model":"`+tiny+`","keep_alive":-1}`)
	mustPost(t, p.URL+"/v1/chat/completions", v1(tiny))
	if stays := loaded(t, p.URL)[tiny+":latest"]; stays < forever {
		t.Errorf("stays for %v, want for ever", stays)
	}
	if n := p.Metric(t, "ollama_cacheproxy_keep_alive_touches_total{"); n != 0 {
		t.Errorf("%v touches with --no-touch", n)
	}
}

// TestUpstreamComesLater: the proxy starts without its upstream, logs that, and works once it
// appears.
func TestUpstreamComesLater(t *testing.T) {
	version := realollama.Versions()[0]
	server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}})
	server.Kill()
	p := startProxy(t, server.URL())
	if !strings.Contains(p.Log(), "does not answer yet") {
		t.Errorf("the log does not say that the upstream does not answer:\n%s", p.Log())
	}
	status, contentType, text := post(t, p.URL+"/api/generate", generate(tiny, ""))
	var answer struct{ Error string }
	if err := json.Unmarshal([]byte(text), &answer); status != http.StatusBadGateway || err != nil || !strings.Contains(answer.Error, server.Addr()) || !strings.HasPrefix(contentType, "application/json") {
		t.Errorf("%d %s %s, want 502 and an error that names %s", status, contentType, text, server.Addr())
	}
	if status, _, _ := get(t, p.URL+"/_cacheproxy/ready"); status != http.StatusServiceUnavailable {
		t.Errorf("ready: %d without the upstream, want 503", status)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustPost(t, p.URL+"/api/generate", generate(tiny, ""))
	eventually(t, "ready", func() bool { status, _, _ := get(t, p.URL+"/_cacheproxy/ready"); return status == http.StatusOK })
}

// TestClientGone: on a real server, a client that disconnects frees the only slot at every stage.
func TestClientGone(t *testing.T) {
	for _, version := range realollama.Distinct() {
		server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}, Parallel: 1})
		p := startProxy(t, server.URL())
		for _, stream := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/stream=%v", version, stream), func(t *testing.T) {
				gone := func() float64 {
					return p.Metric(t, `ollama_cacheproxy_requests_total{endpoint="/api/generate",model="`+tiny+`:latest",outcome="client_gone"}`)
				}
				before := gone()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				// Endless: no end of text stops it, and the context shifts.
				body := fmt.Sprintf(`{"model":%q,"prompt":"hi","raw":true,"stream":%v,"options":{"num_predict":10000000,"num_ctx":256}}`, tiny, stream)
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL+"/api/generate", strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() {
					res, err := http.DefaultClient.Do(req)
					if err == nil {
						if _, err = io.ReadFull(res.Body, make([]byte, 1)); err == nil {
							cancel() // during the stream
						}
						res.Body.Close()
					}
					ended <- err
				}()
				if !stream {
					eventually(t, "the request is under way", func() bool { return p.Metric(t, "ollama_cacheproxy_in_flight") >= 2 && len(loaded(t, p.URL)) > 0 })
					cancel() // before the answer's header
				}
				<-ended
				eventually(t, "counted as client_gone", func() bool { return gone() == before+1 })
				// The only slot is free again: another request is answered.
				mustPost(t, p.URL+"/api/generate", generate(tiny, ""))
			})
		}
	}
}

// TestPendingUnload: a request that waits in Ollama for a model to make room is answered once that
// model's running requests have ended, even if more requests for it arrive meanwhile. If one of
// those carried a keep_alive, it would have to wait that long.
func TestPendingUnload(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny}, Parallel: 1})
			p := startProxy(t, server.URL(), "--slots", "off")
			ask := func(numCtx, generate int) {
				body := fmt.Sprintf(`{"model":%q,"prompt":"hi","raw":true,"stream":false,"options":{"num_predict":%d,"num_ctx":%d}}`, tiny, generate, numCtx)
				if status, _, text := post(t, p.URL+"/api/generate", body); status != http.StatusOK {
					t.Errorf("num_ctx %d: %d %s", numCtx, status, text)
				}
			}
			ask(2048, 1)
			var wg sync.WaitGroup
			wg.Go(func() { ask(2048, 1500) })
			eventually(t, "a long answer under way", func() bool { return p.Metric(t, "ollama_cacheproxy_in_flight") >= 2 })
			wg.Go(func() { ask(4096, 1) })
			eventually(t, "an unload pending", func() bool { return strings.Contains(server.Log(), "resetting model to expire immediately") })
			wg.Go(func() { ask(2048, 1) })
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			select {
			case <-done:
			case <-time.After(2 * time.Minute): // a watchdog
				t.Fatal("a request waits for the keep_alive of another one")
			}
		})
	}
}
