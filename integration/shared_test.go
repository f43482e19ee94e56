//go:build unix

package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// TestShared runs two proxies with --shared before one simulated Ollama, and takes them and the
// Valkey server away, one after the other.
func TestShared(t *testing.T) {
	sim, err := ollamasim.New(ollamasim.Config{Parallel: 1, Models: []ollamasim.Model{
		{Name: "quick", LoadTime: time.Millisecond, PromptRate: 1e6, AnswerRate: 1e6, AnswerTokens: 1},
		{Name: "slow", LoadTime: time.Millisecond, PromptRate: 1e6, AnswerRate: 1, AnswerTokens: 100_000, NumCtx: 1 << 20},
	}})
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(sim)
	t.Cleanup(front.Close)
	keys := filepath.Join(t.TempDir(), "keys.txt")
	if err := os.WriteFile(keys, []byte("ops sk-ops\nrated sk-rated rate=6/h\nfew sk-few max-waiting=2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	store := valkeyserver.Start(t)
	flags := []string{"--shared", store.URL(), "--api-keys-file", keys, "--slots", "1"}
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	doomed, err := proxyprocess.Start(t.Context(), bin, front.URL, flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(doomed.Kill)
	one, two := &proxyProcess{doomed}, startProxy(t, front.URL, flags...)
	client := plainClient(t)
	ask := func(ctx context.Context, p *proxyProcess, key, model string, n int) reply {
		body := fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"%d %s"}]}`, model, n, strings.Repeat("word ", 200))
		return request(ctx, client, http.MethodPost, p.URL+"/api/chat", body, "Authorization", "Bearer "+key)
	}
	metric := func(p *proxyProcess, name string) float64 {
		r := request(t.Context(), client, http.MethodGet, p.URL+"/metrics", "", "Authorization", "Bearer sk-ops")
		if r.err != nil || r.status != http.StatusOK {
			t.Fatal(r.status, r.err)
		}
		var value float64
		for line := range strings.Lines(r.body) {
			if rest, ok := strings.CutPrefix(line, "ollama_cacheproxy_"+name+" "); ok {
				fmt.Sscan(rest, &value)
			}
		}
		return value
	}

	// A rate is that of both.
	statuses := map[int]int{}
	for n := range 12 {
		statuses[ask(t.Context(), []*proxyProcess{one, two}[n%2], "sk-rated", "quick", n).status]++
	}
	// What the server did not answer in time was decided by one proxy.
	const byOne = `shared_limits_total{decided="alone"}`
	alone := int(metric(one, byOne) + metric(two, byOne))
	if n := statuses[200]; n < 6-alone || n > 6+alone || n+statuses[429] != 12 {
		t.Errorf("over two proxies: %v, %d of them decided alone", statuses, alone)
	}

	// Each knows what the other has seen, and so does one that comes later.
	if r := ask(t.Context(), one, "sk-ops", "quick", 1000); r.status != http.StatusOK {
		t.Fatal(r.status, r.body)
	}
	eventually(t, "told to the other", func() bool {
		// The last event may be sent a moment after the answer, and others follow it.
		sent := metric(one, `shared_events_total{outcome="sent"}`)
		return metric(two, `shared_events_total{outcome="received"}`) >= max(sent, 1)
	})
	late := startProxy(t, front.URL, flags...)
	eventually(t, "told to one that comes later", func() bool {
		entries := metric(two, "store_entries")
		return entries > 0 && metric(late, "store_entries") == entries
	})

	// While the server is gone, requests go on, and the rate stays used up.
	store.Kill()
	for n := range 4 {
		if r := ask(t.Context(), two, "sk-ops", "quick", 2000+n); r.status != http.StatusOK {
			t.Errorf("without the server: %d %s", r.status, r.body)
		}
	}
	if r := ask(t.Context(), two, "sk-rated", "quick", 3000); r.status != http.StatusTooManyRequests && alone == 0 {
		t.Errorf("without the server, the rate begins anew: %d", r.status)
	}
	eventually(t, "seen to be gone", func() bool { return metric(two, "shared_up") == 0 })
	if f := finds(t, examine(t, two, "--api-key", "sk-ops"), doctor.IDShared, "--shared"); f.Severity != doctor.Medium {
		t.Errorf("keys have limits: %+v", f)
	}
	store.Restart()
	eventually(t, "back for all", func() bool {
		return metric(one, "shared_up")+metric(two, "shared_up")+metric(late, "shared_up") == 3
	})
	gone(t, examine(t, two, "--api-key", "sk-ops"), doctor.IDShared)
	for _, line := range []string{"of --shared is gone", "of --shared is back"} {
		if n := strings.Count(two.Log(), line); n != 1 {
			t.Errorf("%d lines with %q", n, line)
		}
	}

	// What waits at one proxy counts at the other, until that one is killed.
	ctx, end := context.WithCancel(t.Context())
	defer end()
	busy := make(chan reply, 4)
	for _, p := range []*proxyProcess{one, two} {
		go func() { busy <- ask(ctx, p, "sk-ops", "slow", 0) }()
		eventually(t, "sent to the server", func() bool { return metric(p, "in_flight") == 2 && metric(p, "waiting_requests") == 0 })
	}
	for n := range 2 {
		go func() { busy <- ask(ctx, one, "sk-few", "slow", 1+n) }()
	}
	eventually(t, "waiting", func() bool { return metric(one, "waiting_requests") == 2 })
	// brief is a client that does not wait for long.
	brief := func() reply {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		return ask(ctx, two, "sk-few", "slow", 9)
	}
	eventually(t, "refused for what waits elsewhere", func() bool { return brief().status == http.StatusTooManyRequests })
	doomed.Kill()
	eventually(t, "let in once the other is dead", func() bool { return errors.Is(brief().err, context.DeadlineExceeded) })
	end()
	for range cap(busy) {
		<-busy
	}
}
