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
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// gate is a server between the proxy and Ollama: a request that contains HOLD is answered when hold
// is closed, one that contains FAIL with an error.
func gate(t *testing.T, server *realollama.Server, hold <-chan struct{}) *httptest.Server {
	target, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	forward := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target) },
		FlushInterval: -1,
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		switch {
		case bytes.Contains(body, []byte("HOLD")):
			select {
			case <-hold:
			case <-r.Context().Done():
			}
		case bytes.Contains(body, []byte("FAIL")):
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusInternalServerError)
			io.WriteString(w, `{"error":{"message":"the engine broke","type":"api_error"}}`)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		forward.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return srv
}

// queued returns how many requests wait for a lane, and how many lanes are busy.
func queued(proxy string) (waiting, busy int, err error) {
	res, err := http.Get(proxy + "/_cacheproxy/queue?limit=0")
	if err != nil {
		return 0, 0, err
	}
	defer res.Body.Close()
	var page struct {
		Queued  int
		Servers []struct {
			Models []struct {
				Busy int `json:"lanes_busy"`
			}
		}
	}
	if err := json.NewDecoder(res.Body).Decode(&page); err != nil {
		return 0, 0, err
	}
	for _, s := range page.Servers {
		for _, m := range s.Models {
			busy += m.Busy
		}
	}
	return page.Queued, busy, nil
}

// TestHeartbeat: clients that wait at most three seconds for a byte get their turn through a proxy
// with --heartbeat, and give up without it. They report a later failure as an error.
func TestHeartbeat(t *testing.T) {
	versions := realollama.Distinct()
	server := realollama.Start(t, realollama.Config{
		Version: versions[len(versions)-1], Models: []string{"gen-llama-tiny"},
	})
	for name, n := range map[string]int{"heartbeat.py": 8, "heartbeat.mjs": 4} {
		for _, flags := range [][]string{{"--heartbeat", "1s"}, nil} {
			t.Run(fmt.Sprint(name, flags), func(t *testing.T) {
				t.Parallel() // the clients mostly wait
				hold := make(chan struct{})
				p := startProxy(t, gate(t, server, hold).URL, append(flags, "--slots", "1")...)
				first := make(chan int, 1)
				go func() { // ends when hold is closed
					body := `{"model":"gen-llama-tiny","messages":[{"role":"user","content":"HOLD"}],"stream":false}`
					res, err := http.Post(
						p.URL+"/api/chat",
						"application/json",
						strings.NewReader(body),
					)
					if err != nil {
						first <- 0
						return
					}
					res.Body.Close()
					first <- res.StatusCode
				}()
				settles(t, func() error {
					if _, busy, err := queued(p.URL); err != nil || busy != 1 {
						return fmt.Errorf("%d lanes are busy, want 1 (%v)", busy, err)
					}
					return nil
				})
				go func() { // ends soon after the clients wait, or after a minute
					defer close(hold)
					for until := time.Now().Add(time.Minute); time.Now().Before(until); {
						if waiting, _, err := queued(p.URL); err != nil || waiting == n {
							break
						}
						time.Sleep(200 * time.Millisecond)
					}
					time.Sleep(5 * time.Second) // longer than the clients wait for a byte
				}()
				checkBeats(t, script(name)(t, target{p.URL, server}), n, len(flags) > 0)
				if status := <-first; status != http.StatusOK {
					t.Errorf("the one that held the lane: %d", status)
				}
			})
		}
	}
}

// checkBeats checks the clients' view of their answers.
func checkBeats(t *testing.T, results map[string]any, n int, beats bool) {
	t.Helper()
	if len(results) != n {
		t.Errorf("%d results, want %d: %v", len(results), n, results)
	}
	for asked, got := range results {
		want := "streamed"
		switch {
		case !beats:
			want = "timeout"
		case strings.HasSuffix(asked, "FAIL"):
			want = "the engine broke"
		}
		if !strings.Contains(fmt.Sprint(got), want) {
			t.Errorf("%s: %v, want %s", asked, got, want)
		}
	}
}
