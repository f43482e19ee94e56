// Package integration proves the proxy on real Ollama servers and with real clients. A test that cannot have its
// server or its client fails; none is skipped.
package integration

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// binDir holds the programs that the tests build once.
var binDir string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "making a folder for the test's programs:", err)
		os.Exit(1)
	}
	binDir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// proxyBinary builds the proxy, with the race detector if the tests have it.
var proxyBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(binDir, "ollama-cacheproxy")
	args := []string{"build", "-o", path}
	if raceEnabled {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, "github.com/ollama-cacheproxy/ollama-cacheproxy/cmd/ollama-cacheproxy")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the proxy: %w\n%s", err, out)
	}
	return path, nil
})

// proxyProcess is a running proxy.
type proxyProcess struct {
	URL string

	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended and err is set
	err    error
	mu     sync.Mutex
	log    bytes.Buffer // guarded by mu
}

// startProxy runs the proxy, built from this tree, in front of upstream (a URL), and stops it when the test ends.
func startProxy(t testing.TB, upstream string, flags ...string) *proxyProcess {
	t.Helper()
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	args := append([]string{"--listen", "127.0.0.1:0", "--upstream", upstream, "--log-format", "json", "--log-level", "debug"}, flags...)
	p := &proxyProcess{cmd: exec.Command(bin, args...), exited: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1")
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	go func() { // ends with the process
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			p.mu.Lock()
			p.log.WriteString(lines.Text() + "\n")
			p.mu.Unlock()
			var line struct{ Msg, Listen string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && strings.HasPrefix(line.Msg, "ready") && line.Listen != "" {
				ready <- line.Listen
			}
		}
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", tail(p.Log(), 60))
		}
	})
	select {
	case p.URL = <-ready:
	case <-p.exited:
		t.Fatalf("the proxy ended: %v\n%s", p.err, p.Log())
	case <-time.After(30 * time.Second):
		t.Fatalf("the proxy is not ready after 30 s\n%s", p.Log())
	}
	return p
}

// stop asks the proxy to stop, and reports it if it does not end well.
func (p *proxyProcess) stop(t testing.TB) {
	select {
	case <-p.exited:
	default:
		p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.exited:
		case <-time.After(45 * time.Second):
			p.cmd.Process.Kill()
			<-p.exited
			t.Error("the proxy did not stop within 45 s of SIGTERM")
		}
	}
	if p.err != nil {
		t.Errorf("the proxy ended with %v", p.err)
	}
}

// Log returns what the proxy has logged.
func (p *proxyProcess) Log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// Metric returns the sum of the series whose name and labels begin with prefix, such as
// `ollama_cacheproxy_keep_alive_total{action="injected"`.
func (p *proxyProcess) Metric(t testing.TB, prefix string) float64 {
	t.Helper()
	status, _, text := get(t, p.URL+"/metrics")
	if status != http.StatusOK {
		t.Fatalf("/metrics: %d %s", status, text)
	}
	sum := 0.0
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, prefix) {
			continue
		}
		var v float64
		if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &v); err != nil {
			t.Fatalf("/metrics: %q: %v", line, err)
		}
		sum += v
	}
	return sum
}

// get and post return status, content type and body.
func get(t testing.TB, url string) (int, string, string) {
	t.Helper()
	return do(t, http.MethodGet, url, "")
}

func post(t testing.TB, url, body string) (int, string, string) {
	t.Helper()
	return do(t, http.MethodPost, url, body)
}

func do(t testing.TB, method, url, body string) (int, string, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, res.Header.Get("Content-Type"), string(text)
}

// settles polls until check succeeds; a test that waits longer than a minute has failed.
func settles(t testing.TB, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("after a minute: %v", err)
		case <-tick.C:
		}
	}
}

// eventually polls until ok says yes.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	settles(t, func() error {
		if !ok() {
			return errors.New("still not " + what)
		}
		return nil
	})
}

func tail(text string, lines int) string {
	all := strings.SplitAfter(text, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "")
}
