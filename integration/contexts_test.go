package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// contextModel takes about a millisecond for each token, so that a state is worth keeping.
const contextModel = "gen-llama-costly"

// contextsMetric is the prefix of the proxy's metrics of stored contexts.
const contextsMetric = "ollama_cacheproxy_contexts_"

// engineEras returns the versions that have an engine to link.
func engineEras() []string {
	return slices.DeleteFunc(realollama.Versions(), func(v string) bool {
		return v == realollama.EraA
	})
}

// contextsPair is a linked Ollama with the proxy in front of it, with helpers for tests.
type contextsPair struct {
	*linked.Pair
	client *http.Client
}

// startContexts runs both until the test ends.
func startContexts(t *testing.T, config realollama.Config, flags ...string) *contextsPair {
	t.Helper()
	return startContextsIn(t, "", config, flags...)
}

// startContextsIn does the same with a given folder for the link and the states; "" for a new one.
func startContextsIn(t *testing.T, home string, config realollama.Config, flags ...string) *contextsPair {
	t.Helper()
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	if config.Models == nil {
		config.Models = []string{contextModel}
	}
	config.KeepAlive = "10m"
	pair, err := linked.Start(t.Context(), linked.Options{
		Way: linked.Contexts, Server: config, Program: bin, Home: home,
		Flags: append([]string{"--log-level", "debug"}, flags...),
	})
	if err != nil {
		t.Fatal(err)
	}
	p := &contextsPair{pair, chat.ClientFrom("")}
	t.Cleanup(func() {
		server := p.Server.Log()
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		p.client.CloseIdleConnections()
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", tail(p.Log(), 60))
			t.Logf("the server's log:\n%s", tail(server, 30))
		}
	})
	return p
}

// contextChat is a chat with one of the prefixes and a unique tail.
func contextChat(prefix, n int) chat.Request {
	return chat.Request{
		Model: contextModel, Generate: 6,
		Messages: []chat.Message{
			chat.System(words(uint64(prefix), 150)), chat.User(words(uint64(1000+100*prefix+n), 10)),
		},
	}
}

// answer sends a chat through the proxy, or directly if that is stopped, and returns the text.
func (p *contextsPair) answer(t testing.TB, q chat.Request) string {
	t.Helper()
	a, err := chat.Send(t.Context(), p.client, p.URL(), q)
	if err != nil {
		t.Error(err)
	}
	return a.Text
}

// evaluated calls do, which sends n prompts, and returns the evaluations in the server's log.
func (p *contextsPair) evaluated(t testing.TB, n int, do func()) []realollama.Evaluation {
	t.Helper()
	mark := p.Server.Mark()
	do()
	var all []realollama.Evaluation
	eventually(t, fmt.Sprintf("%d prompts in the log", n), func() bool {
		all = p.Server.Begun(mark)
		return len(all) >= n
	})
	if len(all) > n {
		t.Errorf("%d prompts in the log, for %d requests", len(all), n)
	}
	return all
}

// cold returns how many prompts had most of their tokens evaluated.
func cold(all []realollama.Evaluation) int {
	n := 0
	for _, e := range all {
		if 2*e.Evaluated > e.Total {
			n++
		}
	}
	return n
}

// saved waits until n states are stored.
func (p *contextsPair) saved(t testing.TB, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d states", n), func() bool { return len(p.states(t)) >= n })
}

// metric returns one of the proxy's metrics of contexts.
func (p *contextsPair) metric(t testing.TB, name string) float64 {
	t.Helper()
	return (&proxyProcess{p.Proxy}).Metric(t, contextsMetric+name)
}

func (p *contextsPair) unload(t testing.TB) {
	t.Helper()
	if err := p.Unload(t.Context(), contextModel); err != nil {
		t.Fatal(err)
	}
}

// states returns the files of the stored states.
func (p *contextsPair) states(t testing.TB) []string {
	t.Helper()
	// Beside each state, and written after it.
	all, err := filepath.Glob(filepath.Join(p.StateDir(), "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range all {
		all[i] = strings.TrimSuffix(name, ".json") + ".bin"
	}
	return all
}

// TestContexts is bench/contexts on a small scale: which prompts are evaluated, and which models
// are loaded.
func TestContexts(t *testing.T) {
	for _, version := range engineEras() {
		t.Run(version, func(t *testing.T) {
			t.Run("restarts", func(t *testing.T) { contextsRestarts(t, version) })
			t.Run("two models", func(t *testing.T) { contextsTwoModels(t, version) })
			if version != realollama.Newest() {
				// It has the engine of the version above, and reported reuse matters only there.
				return
			}
			for _, slots := range []int{1, 4} {
				t.Run(fmt.Sprintf("rounds, slots %d", slots), func(t *testing.T) {
					contextsRounds(t, version, slots)
				})
			}
			t.Run("one system prompt", func(t *testing.T) { contextsSystemPrompt(t, version) })
			t.Run("keys", func(t *testing.T) { contextsKeys(t, version) })
		})
	}
}

// contextsRestarts: whatever is reloaded or restarted, the prefix is not evaluated again, and the
// answers are those of an Ollama without the proxy.
func contextsRestarts(t *testing.T, version string) {
	p := startContexts(t, realollama.Config{Version: version})
	var want []string
	for n := range 5 {
		a, err := chat.Send(t.Context(), p.client, p.Server.URL(), contextChat(1, n))
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, a.Text)
	}
	p.unload(t)

	first := p.evaluated(t, 1, func() { p.answer(t, contextChat(1, 5)) })
	warm := p.evaluated(t, 1, func() { p.answer(t, contextChat(1, 6)) })
	if cold(first) != 1 || cold(warm) != 0 {
		t.Fatalf("first %v, then %v: the other way round was wanted", first, warm)
	}
	p.saved(t, 1)
	restartServer := func() {
		if err := p.RestartServer(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	restartProxy := func() {
		if err := p.RestartProxy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for n, tt := range []struct {
		name  string
		do    func()
		loads int
	}{
		{"unloaded", func() { p.unload(t) }, 1},
		{"Ollama restarted", restartServer, 1},
		{"the proxy restarted", restartProxy, 0},
		{"the proxy restarted, unloaded", func() { restartProxy(); p.unload(t) }, 1},
		{"both restarted", func() { restartProxy(); restartServer() }, 1},
	} {
		tt.do()
		mark := p.Server.Mark()
		var got string
		all := p.evaluated(t, 1, func() { got = p.answer(t, contextChat(1, n)) })
		if len(all) != 1 || all[0].Evaluated > warm[0].Evaluated+20 {
			t.Errorf("%s: %v, and %v when warm", tt.name, all, warm)
		}
		if loads := p.Server.Loads(mark); loads != tt.loads {
			t.Errorf("%s: %d loads, want %d", tt.name, loads, tt.loads)
		}
		if got != want[n] {
			t.Errorf("%s: %q, want %q", tt.name, got, want[n])
		}
	}
	if p.metric(t, "attached_total") < 1 { // by the proxy started last
		t.Error("no context was attached, by the metrics")
	}
}

// contextsTwoModels: two models that evict each other, each with one client, evaluate their
// prefixes only once.
func contextsTwoModels(t *testing.T, version string) {
	const each = 8
	models := []string{contextModel, "gen-qwen3-costly"}
	p := startContexts(t, realollama.Config{Version: version, Models: models, MaxLoaded: 1})
	all := p.evaluated(t, each*len(models), func() {
		var wg sync.WaitGroup
		for i, model := range models {
			wg.Go(func() {
				for n := range each {
					q := contextChat(10+i, n)
					q.Model = model
					p.answer(t, q)
				}
			})
		}
		wg.Wait()
	})
	if n := cold(all); n != len(models) {
		t.Errorf("%d prompts were evaluated, of two models' one prefix each: %v", n, all)
	}
}

// contextsRounds: with more prefixes than slots, strictly in turn, each is evaluated once.
func contextsRounds(t *testing.T, version string, slots int) {
	const prefixes, rounds = 10, 3
	p := startContexts(t, realollama.Config{Version: version, Parallel: slots, CacheRAMMiB: new(int)})
	for round := range rounds {
		all := p.evaluated(t, prefixes, func() {
			for prefix := range prefixes {
				p.answer(t, contextChat(20+prefix, round))
			}
		})
		want := 0
		if round == 0 {
			want = prefixes
		}
		if n := cold(all); n != want {
			t.Errorf("round %d: %d prompts were evaluated, want %d: %v", round+1, n, want, all)
		}
	}
}

// contextsSystemPrompt: for clients that arrive at the same time with one system prompt, it is
// evaluated once, and copied to the other slots.
func contextsSystemPrompt(t *testing.T, version string) {
	const clients, each = 8, 3
	p := startContexts(t, realollama.Config{Version: version, Parallel: 4})
	all := p.evaluated(t, clients*each, func() {
		var wg sync.WaitGroup
		for client := range clients {
			wg.Go(func() {
				for n := range each {
					p.answer(t, contextChat(40, 10*client+n))
				}
			})
		}
		wg.Wait()
	})
	if n := cold(all); n != 1 {
		t.Errorf("%d prompts were evaluated, of one prefix: %v", n, all)
	}
}

// contextsKeys: a state is attached only to requests of the client that sent the prefix, unless the
// proxy was told to share states.
func contextsKeys(t *testing.T, version string) {
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keys, []byte("alice key-of-alice\nbob key-of-bob\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprintf("shared %v", shared), func(t *testing.T) {
			flags := []string{"--api-keys-file", keys}
			if shared {
				flags = append(flags, "--contexts-shared")
			}
			p := startContexts(t, realollama.Config{Version: version}, flags...)
			ask := func(key string, n int) int {
				q := contextChat(50, n)
				q.Key = key
				return cold(p.evaluated(t, 1, func() { p.answer(t, q) }))
			}
			dirty := ask("key-of-alice", 0)
			if again := ask("key-of-alice", 1); dirty != 1 || again != 0 {
				t.Fatalf("alice's first and second prompt: %d and %d were evaluated", dirty, again)
			}
			p.saved(t, 1)
			p.unload(t)
			if n, want := ask("key-of-bob", 2), map[bool]int{false: 1, true: 0}[shared]; n != want {
				t.Errorf("bob's prompt, which alice had sent: %d evaluated, want %d", n, want)
			}
			p.unload(t)
			if n := ask("key-of-alice", 3); n != 0 {
				t.Error("alice's own prefix was evaluated again")
			}
		})
	}
}
