// Package integration tests the proxy on real Ollama servers and with real clients. A test that
// cannot get its server or its client fails; none is skipped.
package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// binDir has the programs that the tests build once.
var binDir string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "making a folder for the test's programs:", err)
		os.Exit(1)
	}
	binDir = dir
	// This covers the reading of an answer too: no stream of these tests lasts as long.
	http.DefaultClient.Timeout = longest
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// Bounds of what a test waits for. Without them what hangs would only end with go test's own limit
// for all tests together, and nothing would say which part of them hung.
const (
	longest   = 5 * time.Minute  // of a request, and of a program that a test runs
	testLimit = 10 * time.Minute // of what a test does with a proxy
	endLimit  = 30 * time.Second // of a program that has been told to end
)

// command returns a program for a test to run. It is killed when the test ends, and fails the test
// if it takes too long. A process that it leaves behind with its output open does not hold up Wait.
func command(t testing.TB, name string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(t.Context(), longest)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 5 * time.Second
	cmd.Cancel = func() error {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) { // otherwise the test has ended
			t.Errorf("%s has run for %v and is killed", name, longest)
		}
		return cmd.Process.Kill()
	}
	return cmd
}

// end makes a program end, and kills it if it does not. exited is closed when it has ended.
func end(t testing.TB, cmd *exec.Cmd, exited <-chan struct{}) {
	t.Helper()
	cmd.Process.Signal(syscall.SIGTERM) // it fails if the program has ended
	select {
	case <-exited:
	case <-time.After(endLimit):
		cmd.Process.Kill()
		<-exited
		t.Errorf("%s did not end within %v of SIGTERM", cmd.Path, endLimit)
	}
}

// watched aborts a proxy whose test takes too long, so that what waits for the proxy fails, and its
// log says what its goroutines did. The function that it returns ends the watch, and returns how
// many lines of the log the test shows if it has failed: so many, or all of an aborted proxy.
func watched(t testing.TB, p *proxyprocess.Process) (over func(lines int) int) {
	timer := time.AfterFunc(testLimit, p.Abort)
	return func(lines int) int {
		t.Helper()
		if timer.Stop() {
			return lines
		}
		t.Errorf("the test took longer than %v; the proxy's goroutines are in its log", testLimit)
		return math.MaxInt
	}
}

// proxyBinary builds the proxy, with the race detector if the tests have it.
var proxyBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(binDir, "ollama-cacheproxy")
	return path, proxyprocess.Build(context.Background(), path, fmt.Sprintf("-race=%v", raceEnabled))
})

// proxyProcess is a running proxy, with helpers for tests.
type proxyProcess struct{ *proxyprocess.Process }

// startProxy runs the proxy, built from this tree, in front of upstream (a URL), and stops it when
// the test ends.
func startProxy(t testing.TB, upstream string, flags ...string) *proxyProcess {
	t.Helper()
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	p, err := proxyprocess.Start(t.Context(), bin, upstream, append([]string{"--log-level", "debug"}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	over := watched(t, p)
	t.Cleanup(func() {
		lines := over(60)
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", tail(p.Log(), lines))
		}
	})
	return &proxyProcess{p}
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

// counts waits until the series whose name and labels begin with prefix add up to want. The proxy
// counts a request a moment after its client has the answer.
func (p *proxyProcess) counts(t testing.TB, prefix string, want float64) {
	t.Helper()
	settles(t, func() error {
		if n := p.Metric(t, prefix); n != want {
			return fmt.Errorf("%s adds up to %v, want %v", prefix, n, want)
		}
		return nil
	})
}

// idle waits until no request is in flight but the one that asks for this: by then the ledger and
// what doctor reads have all that was answered.
func (p *proxyProcess) idle(t testing.TB) {
	t.Helper()
	p.counts(t, "ollama_cacheproxy_in_flight", 1)
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

// do sends a request with more headers, each a name and a value.
func do(t testing.TB, method, url, body string, header ...string) (int, string, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for pair := range slices.Chunk(header, 2) {
		req.Header.Set(pair[0], pair[1])
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

// eventually polls until ok returns true.
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

// evaluations waits until the server's log has n evaluations since the mark, and returns how many
// tokens their prompts have, and how many of those were evaluated.
func evaluations(t testing.TB, server *realollama.Server, mark realollama.Mark, n int) (total, evaluated int) {
	t.Helper()
	log, err := server.WaitEvaluations(t.Context(), mark, n)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range log {
		total += e.Total
		evaluated += e.Evaluated
	}
	return total, evaluated
}
