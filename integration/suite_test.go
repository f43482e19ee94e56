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
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// suite says which of Ollama's integration tests run for one version of Ollama.
//
// They pull their models if the server lacks them; here small ones have those names. These are left
// out on purpose:
//   - ChatWithHistory, Parallel…, and GenerateWithHistory in era A: minutes, on a processor
//   - TestTools, APIToolCalling…: no small model calls a tool, and they take minutes to find out
//   - TestChat: looks for its model in /api/ps, where one file has the name that loaded it
//   - TestCreate…, TestQuantization, TestVision…, TestAudio…, TestImageGeneration, Unicode…,
//     MultiModelStress: need downloads, or models of special kinds
//   - MaxQueue and UnicodeModelDir: skip themselves on a server that they did not start
//   - AllMiniLMEmbed…, EmbedCosine… and ContextExhaustion in era A: need a certain model's answers
//
// Some of the others fail without the proxy, too: they need the embeddings of all-minilm, or a
// story with emoji.
type suite struct {
	version string
	run     string   // for -test.run
	chats   []string // names for smollm2
	embeds  []string // names for gen-llama-embed
	atLeast int      // at least so many pass without the proxy
}

var suites = []suite{
	{
		version: realollama.EraA,
		run: `^(TestAPIGenerate|TestAPIChat|TestAPIListModels|TestAPIShowModel|TestAPIGenerateLogprobs|TestAPIChatLogprobs|TestBlueSky|TestNumPredict|` +
			`TestConcurrentChat|TestLongInputContext|TestAllMiniLMEmbedTruncate|TestEmbedTruncation|TestEmbedStatusCode|TestEmbedLargeInput)$`,
		chats:   []string{"llama3.2:1b", "llama3.2", "qwen3:0.6b"},
		embeds:  []string{"all-minilm"},
		atLeast: 24,
	},
	{
		version: realollama.EraC,
		run:     `^(TestAPI|TestBasic|TestEmbedding|TestContext|TestConcurrency)$`,
		chats:   []string{"llama3.2:1b", "llama3.2"},
		embeds:  []string{"all-minilm"},
		atLeast: 18,
	},
}

// TestOllamaSuite runs Ollama's own integration tests directly against a real server and then
// through the proxy: every test that passes there passes here.
func TestOllamaSuite(t *testing.T) {
	for _, s := range suites {
		if !slices.Contains(realollama.Versions(), s.version) {
			continue // the version is not among those to test
		}
		t.Run(s.version, func(t *testing.T) {
			t.Parallel() // the tests mostly wait
			program, dir := s.build(t)

			server := s.server(t)
			direct, output := s.outcomes(t, program, dir, server.URL())
			if err := server.Stop(); err != nil {
				t.Error(err)
			}
			if n := count(direct, "PASS"); n < s.atLeast {
				t.Errorf("without the proxy only %d tests pass, want at least %d\n%s", n, s.atLeast, tail(output, 60))
			}

			p := startProxy(t, s.server(t).URL())
			proxied, output := s.outcomes(t, program, dir, p.URL)
			for _, name := range slices.Sorted(maps.Keys(direct)) {
				if direct[name] == "PASS" && proxied[name] != "PASS" {
					t.Errorf("%s passes without the proxy, and through it: %q", name, proxied[name])
				}
				if direct[name] == "FAIL" {
					t.Logf("%s fails without the proxy, and through it: %s", name, proxied[name])
				}
			}
			if t.Failed() {
				t.Logf("Ollama's tests through the proxy:\n%s", tail(output, 150))
			}
			if p.Metric(t, "ollama_cacheproxy_requests_total") == 0 {
				t.Error("the proxy has seen no request")
			}
			t.Logf("without the proxy %d pass, %d fail, %d skip; through it %d, %d, %d",
				count(direct, "PASS"), count(direct, "FAIL"), count(direct, "SKIP"),
				count(proxied, "PASS"), count(proxied, "FAIL"), count(proxied, "SKIP"))
		})
	}
}

// build returns Ollama's tests as a program, from the cache if possible, and the folder to run them
// in.
func (s suite) build(t *testing.T) (program, dir string) {
	t.Helper()
	module := "github.com/ollama/ollama@v" + s.version
	out, err := goCommand(t, "", "mod", "download", "-json", module)
	if err != nil {
		t.Fatalf("downloading %s: %v", module, err)
	}
	var downloaded struct{ Dir string }
	if err := json.Unmarshal(out, &downloaded); err != nil {
		t.Fatalf("downloading %s: %v", module, err)
	}
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := cache.Ensure(t.Context(), realollama.Made{
		Name: "suite-" + s.version, Inputs: []string{runtime.Version()}, Announce: "building the tests of Ollama " + s.version + " (10 to 60 s)",
		Make: func(_ context.Context, result string, _ func(string, ...string) error) error {
			_, err := goCommand(t, downloaded.Dir, "test", "-c", "-tags", "integration,fast", "-o", filepath.Join(result, "suite.test"), "./integration")
			return err
		},
	})
	if err != nil {
		t.Fatalf("building Ollama's tests: %v", err)
	}
	return filepath.Join(entry, "suite.test"), filepath.Join(downloaded.Dir, "integration")
}

func goCommand(t *testing.T, dir string, args ...string) ([]byte, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("running go %s: %w\n%s%s", strings.Join(args, " "), err, tail(stdout.String(), 20), tail(stderr.String(), 20))
	}
	return stdout.Bytes(), nil
}

// server starts a new server with the models that the tests ask for. Answers are short and always
// the same, unless a test asks for others.
func (s suite) server(t *testing.T) *realollama.Server {
	t.Helper()
	server := realollama.Start(t, realollama.Config{Version: s.version, Models: []string{"smollm2", "gen-llama-embed"}})
	create := func(name, from string) {
		body := fmt.Sprintf(`{"model":%q,"from":%q,"stream":false,"license":"as the model's","parameters":{"temperature":0,"seed":1,"num_predict":40}}`, name, from)
		if status, _, text := post(t, server.URL()+"/api/create", body); status != http.StatusOK {
			t.Fatalf("creating %s: %d %s", name, status, text)
		}
	}
	for _, name := range s.chats {
		create(name, "smollm2")
	}
	for _, name := range s.embeds {
		create(name, "gen-llama-embed")
	}
	return server
}

var outcomeLine = regexp.MustCompile(`(?m)^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)

// outcomes runs the tests against a server and returns PASS, FAIL or SKIP by test.
func (s suite) outcomes(t *testing.T, program, dir, url string) (map[string]string, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	// They skip tests that they expect to exceed their time, from two minutes before their limit
	// on.
	args := []string{"-test.v", "-test.timeout=10m", "-test.run=" + s.run}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = 5 * time.Second // what it leaves behind may have its output
	cmd.Dir = dir
	cmd.Env = clientEnv(t.TempDir(), "OLLAMA_HOST="+url, "OLLAMA_TEST_EXISTING=1")
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		t.Fatalf("running Ollama's tests: %v %v\n%s", ctx.Err(), err, tail(string(out), 60))
	}
	outcomes := map[string]string{}
	for _, m := range outcomeLine.FindAllStringSubmatch(string(out), -1) {
		outcomes[m[2]] = m[1]
	}
	return outcomes, string(out)
}

// count counts tests, but not subtests: a test passes even if all its subtests are skipped.
func count(outcomes map[string]string, outcome string) int {
	parents := map[string]bool{}
	for name := range outcomes {
		for i, c := range name {
			if c == '/' {
				parents[name[:i]] = true
			}
		}
	}
	n := 0
	for name, o := range outcomes {
		if o == outcome && !parents[name] {
			n++
		}
	}
	return n
}
