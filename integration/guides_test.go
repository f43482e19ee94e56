package integration

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/text"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const (
	guidesModel   = "llama3.2"        // the model named in the guides
	guidesAddress = "127.0.0.1:11435" // the proxy's address in the guides
)

// block is a fenced block of a Markdown file.
type block struct {
	language string // sh, python and js are run; console and others are only for reading
	file     string // the second word after the fence: the name of the block's file
	code     string
}

func blocks(t *testing.T, path string) []block {
	t.Helper()
	source, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var found []block
	err = ast.Walk(goldmark.DefaultParser().Parse(text.NewReader(source)), func(node ast.Node, entering bool) (ast.WalkStatus, error) {
		fenced, ok := node.(*ast.FencedCodeBlock)
		if !ok || !entering || fenced.Info == nil {
			return ast.WalkContinue, nil
		}
		language, file, _ := strings.Cut(string(fenced.Info.Segment.Value(source)), " ")
		found = append(found, block{language, strings.TrimSpace(file), string(fenced.Lines().Value(source))})
		return ast.WalkContinue, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestGuides runs the documentation's code as written, on a real Ollama through the proxy. Only two
// things are replaced: the address, since the proxy's default port may be taken, and llama3.2,
// which here is a small model under that name.
func TestGuides(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{tiny}})
	if status, _, answer := post(t, server.URL()+"/api/copy", fmt.Sprintf(`{"source":%q,"destination":%q}`, tiny, guidesModel)); status != 200 {
		t.Fatalf("copying the model: %d %s", status, answer)
	}
	// How many blocks are run, and the minimum of requests to models that they send.
	guides := map[string]struct{ runs, asks int }{
		"../docs/guides/python.md":         {5, 5},
		"../docs/guides/javascript.md":     {2, 3},
		"../docs/guides/langchain.md":      {1, 5},
		"../docs/guides/continue.md":       {0, 0},
		"../docs/guides/ollama-command.md": {1, 2},
		"../docs/batch.md":                 {1, 2},
	}
	for path, want := range guides {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".md"), func(t *testing.T) {
			p := startProxy(t, server.URL())
			ran := 0
			var env []string
			if strings.HasSuffix(path, "batch.md") { // otherwise it takes the proxy's default port
				env = append(env, "OLLAMA_HOST="+p.URL)
			}
			dir := guideFolder(t)
			for i, b := range blocks(t, path) {
				if b.file != "" {
					write(t, filepath.Join(dir, b.file), b.code)
				}
				if out, ok := runBlock(t, dir, b, p.URL, server.Bin(), env...); ok {
					ran++
					if strings.TrimSpace(out) == "" {
						t.Errorf("block %d prints nothing:\n%s", i+1, b.code)
					}
				}
			}
			if ran != want.runs {
				t.Errorf("%d blocks were run, want %d", ran, want.runs)
			}
			settles(t, func() error { // the last one is counted a moment after its end
				asked := 0
				for _, endpoint := range []string{"/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages"} {
					asked += int(p.Metric(t, `ollama_cacheproxy_requests_total{endpoint="`+endpoint+`",model="`+guidesModel+`:latest",outcome="ok"`))
				}
				if asked < want.asks {
					return fmt.Errorf("the proxy answered %d requests to the model, want at least %d", asked, want.asks)
				}
				return nil
			})
		})
	}
	t.Run("README", func(t *testing.T) { readme(t, server) })
	t.Run("continue's schema", func(t *testing.T) { continueSchema(t) })
	t.Run("keys", func(t *testing.T) { guidesKeys(t, server) })
}

// guideFolder returns a folder with the Node modules, in which blocks are run.
func guideFolder(t *testing.T) string {
	t.Helper()
	programs, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	return programs.scripts(t)
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// runBlock runs a block in front of the proxy at url, and returns its output. Its last result is
// false for a block that is only for reading.
func runBlock(t *testing.T, dir string, b block, url, ollama string, env ...string) (string, bool) {
	t.Helper()
	cmd, ok := blockCommand(t, dir, b, url, ollama)
	if !ok {
		return "", false
	}
	cmd.Env = append(cmd.Env, env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		killGroup(cmd)
		t.Errorf("%v:\n%s\nprints\n%s", err, b.code, tail(string(out), 40))
	}
	return string(out), true
}

func blockCommand(t *testing.T, dir string, b block, url, ollama string) (*exec.Cmd, bool) {
	t.Helper()
	programs, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	program, ok := map[string][]string{
		"sh":     {"bash", "-euo", "pipefail", "block.sh"},
		"python": {programs.python, "block.py"},
		"js":     {programs.node, "block.mjs"},
	}[b.language]
	if !ok {
		return nil, false
	}
	address := strings.TrimPrefix(url, "http://")
	write(t, filepath.Join(dir, program[len(program)-1]), strings.ReplaceAll(b.code, guidesAddress, address))
	cmd := command(t, program[0], program[1:]...)
	// A shell's programs end with it: the README's leaves a proxy behind if it is killed.
	ownGroup(cmd)
	kill := cmd.Cancel
	cmd.Cancel = func() error {
		killGroup(cmd)
		return kill()
	}
	cmd.WaitDelay = endLimit // the proxy ends after the shell
	cmd.Dir = dir
	cmd.Env = append(clientEnv(dir), "PATH="+strings.Join([]string{filepath.Dir(ollama), filepath.Dir(programs.python), binDir, os.Getenv("PATH")}, ":"))
	return cmd, true
}

// readme runs the README's first block in the root of the repository: it builds the proxy, starts
// it and asks through it.
func readme(t *testing.T, server *realollama.Server) {
	all := blocks(t, "../README.md")
	if len(all) == 0 || all[0].language != "sh" {
		t.Fatal("README.md does not begin with a block of shell")
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	b := all[0]
	const start = "bin/ollama-cacheproxy &"
	before, after, ok := strings.Cut(b.code, start)
	if !ok {
		t.Fatalf("README.md does not start the proxy with %q:\n%s", start, b.code)
	}
	// A person who types this has waited long enough, and sees if the proxy ends; a script must
	// wait until the proxy listens, or has ended.
	ready := fmt.Sprintf(`trap 'kill $!' EXIT
until curl --silent --fail --output /dev/null http://%s/_cacheproxy/health; do
	kill -0 $! || { echo "the proxy has ended"; exit 1; }
	sleep 0.05
done
`, address)
	_, after, _ = strings.Cut(after, "\n")
	b.code = "cd \"$REPOSITORY\"\n" + before + start + "\n" + ready + after + "curl --silent --fail http://" + address + "/metrics\n"
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	home, err := exec.Command("go", "env", "GOPATH", "GOCACHE", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	settings := strings.Fields(string(home))
	out, _ := runBlock(t, guideFolder(t), b, "http://"+address, server.Bin(), "REPOSITORY="+root,
		"GOPATH="+settings[0], "GOCACHE="+settings[1], "GOMODCACHE="+settings[2], "GOPROXY=off",
		"OLLAMA_CACHEPROXY_LISTEN="+address, "OLLAMA_CACHEPROXY_UPSTREAM="+server.URL())
	if want := `ollama_cacheproxy_requests_total{endpoint="/api/generate",model="` + guidesModel + `:latest",outcome="ok"} `; !strings.Contains(out, want) {
		t.Errorf("the question did not go through the proxy:\n%s", tail(out, 20))
	}
}

// continueSchema checks the configuration of the guide for Continue with Continue's own package,
// and that the package refuses one without a provider.
func continueSchema(t *testing.T) {
	var config string
	for _, b := range blocks(t, "../docs/guides/continue.md") {
		if b.language == "yaml" {
			config = b.code
		}
	}
	programs, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	dir := guideFolder(t)
	write(t, filepath.Join(dir, "check.mjs"), `
import { parseConfigYaml, validateConfigYaml } from '@continuedev/config-yaml'
const config = parseConfigYaml(process.argv[2])
const errors = validateConfigYaml(config)
if (errors?.length) throw new Error(JSON.stringify(errors))
console.log(config.models[0].apiBase)
`)
	check := func(config string) (string, error) {
		cmd := command(t, programs.node, filepath.Join(dir, "check.mjs"), config)
		cmd.Env = clientEnv(dir)
		out, err := cmd.CombinedOutput()
		return string(bytes.TrimSpace(out)), err
	}
	if out, err := check(config); err != nil || out != "http://"+guidesAddress {
		t.Errorf("Continue says of the guide's configuration: %v %s", err, out)
	}
	if _, err := check(strings.Replace(config, "provider: ollama", "", 1)); err == nil {
		t.Error("Continue accepts a model without a provider: the check shows nothing")
	}
}

// guidesKeys shows what the guides say about API keys: the Python package sends OLLAMA_API_KEY, the
// ollama command does not.
func guidesKeys(t *testing.T, server *realollama.Server) {
	const key = "sk-guides"
	dir := guideFolder(t)
	write(t, filepath.Join(dir, "keys"), "guides "+key+"\n")
	p := startProxy(t, server.URL(), "--api-keys-file", filepath.Join(dir, "keys"))
	python := block{language: "sh", code: `export OLLAMA_HOST=` + guidesAddress + `
python3 -c 'import ollama; print(ollama.generate("` + guidesModel + `", "Why is the sky blue?").response)'`}
	if out, _ := runBlock(t, dir, python, p.URL, server.Bin(), "OLLAMA_API_KEY="+key); strings.TrimSpace(out) == "" {
		t.Error("the Python package has no answer")
	}
	for name, b := range map[string]block{
		"the Python package without a key": python,
		"the ollama command":               {language: "sh", code: "OLLAMA_API_KEY=" + key + " OLLAMA_HOST=" + guidesAddress + " ollama list"},
	} {
		cmd, _ := blockCommand(t, dir, b, p.URL, server.Bin())
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("%s gets an answer without a key: %s", name, out)
		}
	}
}
