package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
)

// partOnCPU is an answer of Ollama 0.34.1 to /api/ps, for a model that is partly in the memory of
// the processor.
const partOnCPU = `{"models":[{"name":"a:latest","model":"a:latest","size":6119991978,"digest":"57a7a1","details":{"parent_model":"","format":"gguf",` +
	`"family":"llama","families":["llama"],"parameter_size":"8.0B","quantization_level":"Q4_K_M"},"expires_at":"2026-11-30T21:12:23.4Z",` +
	`"size_vram":4898834858,"context_length":16384}]}`

// runDoctor runs the verb and returns its exit status and what it wrote.
func runDoctor(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), append([]string{"doctor"}, args...), &out, &errs)
	return status, out.String(), errs.String()
}

// TestDoctor: which requests the verb makes, what it prints, and its exit status.
func TestDoctor(t *testing.T) {
	ps := `{"models":[]}`
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/api/ps":
			io.WriteString(w, ps)
		case strings.HasPrefix(r.URL.Path, "/_cacheproxy/"):
			http.NotFound(w, r)
		default:
			stubOllama(w, r)
		}
	}))
	defer up.Close()
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keys, []byte("sk-one\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	start := func(flags ...string) string {
		u, stop, err := runInner(t.Context(), &console{io.Discard, io.Discard}, append([]string{"--upstream", "big=" + up.URL}, flags...), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
		return u.Host
	}
	p, guarded := start(), start("--api-keys-file", keys)
	nobody, err := freeAddr()
	if err != nil {
		t.Fatal(err)
	}
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()

	for _, c := range []struct {
		name   string
		args   []string
		status int
		stdout string // contains this
		stderr string
	}{
		{"nothing", []string{"--proxy", p}, 0, "Nothing is wrong that shows in 0 requests", ""},
		{"a key", []string{"--proxy", guarded, "--api-key", "sk-one"}, 0, "Nothing is wrong", ""},
		{"no key", []string{"--proxy", guarded}, 3, "", "asks for an API key: give it with --api-key"},
		{"a server by its name", []string{"--proxy", p, "--upstream", "big=" + up.URL}, 0, "Nothing", ""},
		{"… and by its address", []string{"--proxy", p, "--upstream", up.URL}, 0, "Nothing", ""},
		{"nobody there", []string{"--proxy", nobody}, 3, "", "Start it with: ollama-cacheproxy"},
		{"Ollama there", []string{"--proxy", up.URL}, 3, "", "OLLAMA_HOST=127.0.0.1:11434 ollama serve"},
		{"something else there", []string{"--proxy", other.URL}, 3, "", "neither an ollama-cacheproxy nor an Ollama"},
		{"https there", []string{"--proxy", secure.Listener.Addr().String()}, 3, "", "give --proxy https://127.0.0.1:"},
		{"… of an unknown issuer", []string{"--proxy", secure.URL}, 3, "", "--ca FILE"},
		{"a wrong address", []string{"--proxy", "host:99999"}, 2, "", "--proxy"},
		{"a wrong time", []string{"--proxy", p, "--last", "-1h"}, 2, "", "--last"},
		{"an unknown server", []string{"--proxy", p, "--upstream", "small=" + up.URL}, 2, "", "it has big=http://"},
		{"an unknown flag", []string{"--wrong"}, 2, "", "unknown flag"},
	} {
		status, stdout, stderr := runDoctor(t, c.args...)
		if status != c.status || !strings.Contains(stdout, c.stdout) || !strings.Contains(stderr, c.stderr) {
			t.Errorf("%s: %d, want %d\n%s\n%s", c.name, status, c.status, stdout, stderr)
		}
		if stdout != "" && stderr != "" {
			t.Errorf("%s: it writes both\n%s\n%s", c.name, stdout, stderr)
		}
	}

	ps = partOnCPU
	status, stdout, _ := runDoctor(t, "--proxy", p, "--json")
	var r doctor.Report
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v\n%s", err, stdout)
	}
	if status != 1 || len(r.Findings) != 1 || r.Findings[0].ID != doctor.IDCPU || r.Findings[0].Upstream != "big" {
		t.Errorf("%d, %+v", status, r.Findings)
	}
	if status, stdout, _ := runDoctor(t, "--proxy", p); status != 1 || !strings.Contains(stdout, "19 % of a:latest runs on the processor (big)") {
		t.Errorf("%d\n%s", status, stdout)
	}
	ps = strings.Replace(partOnCPU, "4898834858", "6119991978", 1)
	if status, stdout, _ := runDoctor(t, "--proxy", p); status != 0 {
		t.Errorf("%d\n%s", status, stdout)
	}
}
