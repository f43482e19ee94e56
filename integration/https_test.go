package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/keypair"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestHTTPS: curl over HTTP/2 and the Python client use https, configured by a file of settings:
// they stream, wait with heartbeats, and only a key with the right may delete a model.
func TestHTTPS(t *testing.T) {
	versions := realollama.Distinct()
	server := realollama.Start(t, realollama.Config{Version: versions[len(versions)-1], Models: []string{"gen-llama-tiny"}})
	model := "gen-llama-tiny"
	issuer := httptest.NewTLSServer(nil) // for its certificate, which is for 127.0.0.1
	t.Cleanup(issuer.Close)
	dir := t.TempDir()
	cert, _ := keypair.Write(t, issuer.TLS.Certificates[0], dir)
	for name, text := range map[string]string{
		"keys.txt":   "alice sk-alice\nops sk-ops admin\n",
		"proxy.yaml": "tls-cert: cert.pem\ntls-key: key.pem\napi-keys-file: keys.txt\nheartbeat: 1s\nslots: {default: 1}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hold := make(chan struct{})
	proxy := startProxy(t, gate(t, server, hold).URL, "--config", filepath.Join(dir, "proxy.yaml"))
	if !strings.HasPrefix(proxy.URL, "https://127.0.0.1:") {
		t.Fatalf("it listens at %s", proxy.URL)
	}
	curl := func(key, method, path string, body any) *exec.Cmd {
		t.Helper()
		text, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		return command(t, "curl", "-sN", "--http2", "--cacert", cert,
			"-w", "\n%{http_version} %{http_code}", "-H", "Authorization: Bearer "+key,
			"-X", method, proxy.URL+path, "-d", string(text))
	}
	answer := func(cmd *exec.Cmd) (text, end string) {
		t.Helper()
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
		i := bytes.LastIndexByte(out, '\n')
		return string(out[:i]), string(out[i+1:])
	}
	chat := func(prompt string) any {
		return map[string]any{
			"model": model, "stream": true, "max_tokens": 24, "options": map[string]any{"num_predict": 24, "seed": 1},
			"messages": []any{map[string]any{"role": "user", "content": prompt}},
		}
	}

	t.Run("curl streams by HTTP/2", func(t *testing.T) {
		text, end := answer(curl("sk-alice", "POST", "/api/chat", chat("hello")))
		if lines := strings.Count(text, `"done":false`); end != "2 200" || lines < 5 || !strings.Contains(text, `"done":true`) {
			t.Errorf("%d pieces, %s:\n%s", lines, end, text)
		}
	})
	t.Run("heartbeats by HTTP/2", func(t *testing.T) {
		first := curl("sk-alice", "POST", "/v1/chat/completions", chat("HOLD"))
		if err := first.Start(); err != nil {
			t.Fatal(err)
		}
		settles(t, func() error { // it has the lane
			if text, _ := answer(curl("sk-alice", "GET", "/_cacheproxy/queue", nil)); !strings.Contains(text, `"lanes_busy":1`) {
				return errors.New(text)
			}
			return nil
		})
		second := curl("sk-alice", "POST", "/v1/chat/completions", chat("and now?"))
		out, err := second.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := second.Start(); err != nil {
			t.Fatal(err)
		}
		begin := make([]byte, len(": waiting\n"))
		if _, err := out.Read(begin); err != nil || string(begin) != ": waiting\n" {
			t.Errorf("%q, %v", begin, err)
		}
		close(hold)
		var rest bytes.Buffer
		if _, err := rest.ReadFrom(out); err != nil || !strings.Contains(rest.String(), "data: [DONE]") || !strings.HasSuffix(rest.String(), "\n2 200") {
			t.Errorf("%v: %s", err, &rest)
		}
		if err := errors.Join(first.Wait(), second.Wait()); err != nil {
			t.Error(err)
		}
	})
	t.Run("the Python client", func(t *testing.T) {
		programs, err := installed()
		if err != nil {
			t.Fatal(err)
		}
		const code = `
import os, ollama
client = ollama.Client(host=os.environ["CLIENT_BASE_URL"], headers={"Authorization": "Bearer sk-alice"})
pieces = [p.message.content for p in client.chat(os.environ["MODEL"], [{"role": "user", "content": "hello"}], stream=True, options={"num_predict": 16})]
print(len(pieces))
try:
    client.delete(os.environ["MODEL"])
except ollama.ResponseError as e:
    print(e.status_code, e.error)
`
		cmd := command(t, programs.python, "-c", code)
		cmd.Env = clientEnv(dir, "CLIENT_BASE_URL="+proxy.URL, "MODEL="+model, "SSL_CERT_FILE="+cert)
		out, err := cmd.CombinedOutput()
		var pieces, status int
		if _, serr := fmt.Sscan(string(out), &pieces, &status); err != nil || serr != nil || pieces < 3 || status != 403 || !strings.Contains(string(out), "named alice") {
			t.Errorf("%v: %s", errors.Join(err, serr), out)
		}
	})
	t.Run("only an admin deletes", func(t *testing.T) {
		if text, end := answer(curl("sk-alice", "DELETE", "/api/delete", map[string]string{"model": model})); end != "2 403" || !strings.Contains(text, "NAME KEY admin") {
			t.Errorf("%s %s", end, text)
		}
		if text, end := answer(curl("sk-ops", "POST", "/api/copy", map[string]string{"source": model, "destination": "copied"})); end != "2 200" {
			t.Errorf("%s %s", end, text)
		}
		if text, end := answer(curl("sk-ops", "DELETE", "/api/delete", map[string]string{"model": "copied"})); end != "2 200" {
			t.Errorf("%s %s", end, text)
		}
		if text, end := answer(curl("sk-alice", "GET", "/api/tags", nil)); end != "2 200" || !strings.Contains(text, model) {
			t.Errorf("%s %s", end, text)
		}
	})
}
