package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
)

const (
	quickLoad = 5 * time.Millisecond
	// knownLoad is so long that the ledger tells it from a request that a busy machine lets wait (less
	// than half of it), and knows who waited for the same load (they end within an eighth).
	knownLoad = 2 * time.Second
)

// simulated is a simulated Ollama without a host cache that evaluates rate tokens a second.
func simulated(t *testing.T, version string, load time.Duration, rate float64, models ...string) (*ollamasim.Server, string) {
	t.Helper()
	none := 0
	c := ollamasim.Config{Version: version, CacheRAMMiB: &none, MaxLoaded: 1}
	for _, name := range models {
		c.Models = append(c.Models, ollamasim.Model{Name: name, LoadTime: load, PromptRate: rate, AnswerRate: 1e5})
	}
	s, err := ollamasim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	return s, srv.URL
}

// benchmark runs the verb with small sizes.
func benchmark(ctx context.Context, url string, args ...string) (status int, stdout, stderr string) {
	var out, err bytes.Buffer
	all := append([]string{"bench", "--upstream", url, "--prefix-tokens", "600", "--tail-tokens", "20", "--output-tokens", "4", "--log-format", "json"}, args...)
	status = run(ctx, all, &out, &err)
	return status, out.String(), err.String()
}

// TestBench: in each workload, every mode gets answers to all requests and begins cold; nothing
// stays loaded; and the report agrees with the server about tokens and loads.
func TestBench(t *testing.T) {
	for _, name := range bench.Workloads() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			models, load, clients := []string{"a:latest"}, knownLoad, "0"
			switch name {
			case "models":
				models = append(models, "b:latest")
				fallthrough
			case "num-ctx":
				// There are many loads, so there is one client. With several, one that waits in
				// Ollama for a loaded model to make room may wait for the keep_alive of requests
				// that arrive meanwhile, which the proxy does not always prevent.
				load, clients = quickLoad, "1"
			}
			server, url := simulated(t, "", load, 1e6, models...)
			const requests, rounds = 32, 2
			status, stdout, stderr := benchmark(t.Context(), url, "--workload", name, "--requests", fmt.Sprint(requests), "--rounds", fmt.Sprint(rounds), "--clients", clients, "--json")
			if status != 0 {
				t.Fatalf("status %d: %s", status, stderr)
			}
			var report bench.Report
			if err := json.Unmarshal([]byte(stdout), &report); err != nil {
				t.Fatal(err)
			}
			if len(report.Modes) != 3 || report.Incomplete {
				t.Fatalf("%d modes, incomplete %v", len(report.Modes), report.Incomplete)
			}
			evaluated, loads := 0, 0
			for _, m := range report.Modes {
				if m.Answered != requests*rounds || m.Failed != 0 || m.Unknown != 0 || m.Truncated != 0 || m.Basis != savings.Measured {
					t.Errorf("%s: %d answered, %d failed, %v tokens unknown, %d prompts cut, %s", m.Mode, m.Answered, m.Failed, m.Unknown, m.Truncated, m.Basis)
				}
				for _, run := range m.Runs {
					evaluated += run.Evaluated
					loads += run.Loads
					if !slices.ContainsFunc(run.Requests, func(q bench.Request) bool { return q.Tokens.Reused == 0 }) {
						t.Errorf("%s, round %d: no prompt was evaluated in full", m.Mode, run.Round)
					}
					if len(run.Loaded) == 0 || len(run.Requests) != requests {
						t.Errorf("%s, round %d: %d models loaded at its end, %d requests", m.Mode, run.Round, len(run.Loaded), len(run.Requests))
					}
				}
			}
			var did int
			// The first ones measured how many tokens words have.
			for _, e := range server.Evaluations(ollamasim.Mark{})[2*len(models):] {
				did += e.Evaluated
			}
			if evaluated != did {
				t.Errorf("%d evaluated tokens are told, the server evaluated %d", evaluated, did)
			}
			if did := server.Loads(ollamasim.Mark{}) - len(models); load == knownLoad && loads != did {
				t.Errorf("%d loads are told, the server loaded %d", loads, did)
			}
			nothingLoaded(t, server)
		})
	}
}

// nothingLoaded fails t if models stay loaded. A server unloads a model when it has noticed that the
// client of its last request has left.
func nothingLoaded(t *testing.T, server *ollamasim.Server) {
	t.Helper()
	if !within30s(t.Context(), func() bool { return server.Stats().Now.Loaded == 0 }) {
		t.Errorf("%d models stay loaded", server.Stats().Now.Loaded)
	}
}

// TestBenchTable: lanes help closed loops that have a prefix each, and the table shows it. A second
// round begins with another mode.
func TestBenchTable(t *testing.T) {
	// A lane waits for the next request only as long as that saves time, so evaluation must take a
	// while.
	_, url := simulated(t, "", quickLoad, 3e4, "a:latest")
	html := filepath.Join(t.TempDir(), "report.html")
	status, stdout, stderr := benchmark(t.Context(), url, "--workload", "closed-loops", "--requests", "40", "--html", html, "--slots", "1")
	if status != 0 {
		t.Fatalf("status %d: %s", status, stderr)
	}
	var evaluated []int
	for _, field := range strings.Fields(line(stdout, "… evaluated, measured")) {
		n, err := strconv.Atoi(strings.ReplaceAll(field, ",", ""))
		if err != nil {
			t.Fatal(err)
		}
		evaluated = append(evaluated, n)
	}
	// The line ends there, since the other flags have their defaults.
	if !strings.Contains(stdout, "1 round, --slots 1\n") {
		t.Errorf("the title is another:\n%s", stdout)
	}
	if len(evaluated) != 3 || evaluated[2]*2 > evaluated[0] {
		t.Errorf("%v tokens evaluated, want less than half with everything:\n%s", evaluated, stdout)
	}
	page, err := os.ReadFile(html)
	if err != nil || !bytes.Contains(page, []byte("Chart.js v4")) {
		t.Errorf("the page has no charts: %v", err)
	}
}

// TestBenchEstimates: if a server does not report reused tokens, they are estimated, and the table
// says so.
func TestBenchEstimates(t *testing.T) {
	_, url := simulated(t, "0.24.0", quickLoad, 5e4, "a:latest") // so slow that evaluating shows in the times
	status, stdout, stderr := benchmark(t.Context(), url, "--requests", "20", "--optimize", "true", "--optimize", "false", "--predictions")
	if status != 0 || !strings.Contains(stdout, "… evaluated, estimated") || strings.Contains(stdout, "measured  ") {
		t.Errorf("status %d: %s\n%s", status, stderr, stdout)
	}
	if !strings.Contains(stdout, "in this order: true, false.") || !strings.Contains(stdout, "predicted") || strings.Contains(stdout, "keep-alive only") {
		t.Errorf("the order, the predictions, or only what was asked for is missing:\n%s", stdout)
	}
}

// TestBenchStopped: a stopped run reports what it has measured, marked as incomplete, and leaves
// nothing loaded.
func TestBenchStopped(t *testing.T) {
	server, url := simulated(t, "", quickLoad, 1e6, "a:latest")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	server.SetFaults(func(r ollamasim.FaultRequest) *ollamasim.Fault {
		if r.Number == 30 { // in the second mode
			cancel()
		}
		return nil
	})
	status, stdout, stderr := benchmark(ctx, url, "--requests", "20")
	if status != 1 || !strings.Contains(stderr, "stopped before the end") {
		t.Errorf("status %d: %s", status, stderr)
	}
	if !strings.HasPrefix(stdout, "INCOMPLETE") || !strings.Contains(stdout, "keep-alive only") || strings.Contains(stdout, "everything") {
		t.Errorf("the table is not of what was done:\n%s", stdout)
	}
	nothingLoaded(t, server)
}

// TestBenchGivesUp: a mode without progress is ended, and the others are measured.
func TestBenchGivesUp(t *testing.T) {
	server, _ := simulated(t, "", quickLoad, 1e6, "a:latest")
	var asked atomic.Int64
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/chat" && asked.Add(1) == 10 { // in the first mode
			io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			return
		}
		server.ServeHTTP(w, r)
	}))
	defer slow.Close()
	status, stdout, stderr := benchmark(t.Context(), slow.URL, "--requests", "20", "--give-up", "10s") // longer than a busy machine takes for an answer
	if status != 3 || !strings.Contains(stderr, "13 of 60 requests failed, the last one with: nothing was answered for 10s") {
		t.Errorf("status %d: %s", status, stderr)
	}
	if strings.HasPrefix(stdout, "INCOMPLETE") || !slices.Equal(strings.Fields(line(stdout, "answered, failed")), []string{"7,", "13", "20,", "0", "20,", "0"}) {
		t.Errorf("the table:\n%s", stdout)
	}
}

// TestBenchPage: a page that cannot be written is reported before the first request. If writing it
// fails later, only the page is lost; a run without results leaves the previous page.
func TestBenchPage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pages")
	server, url := simulated(t, "", quickLoad, 1e6, "a:latest")
	if status, _, _ := benchmark(t.Context(), url, "--html", filepath.Join(dir, "report.html")); status != 2 || len(server.Evaluations(ollamasim.Mark{})) != 0 {
		t.Errorf("status %d, %d prompts evaluated", status, len(server.Evaluations(ollamasim.Mark{})))
	}
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	html := filepath.Join(dir, "report.html")
	server.SetFaults(func(ollamasim.FaultRequest) *ollamasim.Fault {
		os.RemoveAll(dir)
		return nil
	})
	status, stdout, stderr := benchmark(t.Context(), url, "--requests", "2", "--optimize", "false", "--html", html)
	if status != 1 || !strings.Contains(stderr, "writing the page: ") || !strings.Contains(line(stdout, "answered, failed"), "2, 0") {
		t.Errorf("status %d: %s\n%s", status, stderr, stdout)
	}

	html = filepath.Join(t.TempDir(), "report.html")
	if err := os.WriteFile(html, []byte("the last one"), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, last := range []int{1, 3} { // while words are counted; in the first mode
		ctx, cancel := context.WithCancel(t.Context())
		asked := 0
		server.SetFaults(func(ollamasim.FaultRequest) *ollamasim.Fault {
			if asked++; asked == last {
				cancel()
			}
			return nil
		})
		status, _, stderr = benchmark(ctx, url, "--html", html)
		if status != 1 || !strings.Contains(stderr, bench.ErrStopped.Error()) || strings.Contains(stderr, "not written") != (last == 3) || strings.Contains(stderr, "canceled") {
			t.Errorf("stopped at request %d: status %d: %s", last, status, stderr)
		}
		if page, err := os.ReadFile(html); string(page) != "the last one" {
			t.Errorf("the page is %q now (%v)", page, err)
		}
		cancel()
	}
}

// line returns the text after a label in a table.
func line(table, label string) string {
	_, rest, _ := strings.Cut(table, "\n"+label)
	rest, _, _ = strings.Cut(rest, "\n")
	return rest
}

func TestBenchFailures(t *testing.T) {
	server, url := simulated(t, "", quickLoad, 1e6, "a:latest", "b:latest")
	var other atomic.Int64
	server.SetFaults(func(r ollamasim.FaultRequest) *ollamasim.Fault {
		if r.Number > 2 && other.Add(1)%2 == 0 {
			return &ollamasim.Fault{Message: "out of luck"}
		}
		return nil
	})
	status, stdout, stderr := benchmark(t.Context(), url, "--requests", "10", "--model", "a")
	if status != 3 || !strings.Contains(stderr, "15 of 30 requests failed, the last one with: status 500: out of luck") || !strings.Contains(stdout, "5, 5") {
		t.Errorf("some fail: status %d: %s\n%s", status, stderr, stdout)
	}
	server.SetFaults(func(r ollamasim.FaultRequest) *ollamasim.Fault {
		if r.Number > 2 {
			return &ollamasim.Fault{Message: "out of luck"}
		}
		return nil
	})
	status, stdout, stderr = benchmark(t.Context(), url, "--requests", "10", "--model", "a")
	if status != 1 || !strings.Contains(stderr, "the first 5 requests failed, the last one with: status 500: out of luck") || !strings.HasPrefix(stdout, "INCOMPLETE") {
		t.Errorf("all fail: status %d: %s\n%s", status, stderr, stdout)
	}
	server.SetFaults(nil)

	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/_cacheproxy/") {
			server.ServeHTTP(w, r)
		}
	}))
	defer proxy.Close()
	for _, c := range []struct {
		url    string
		args   []string
		status int
		want   string
	}{
		{url, nil, 1, "needs 1 --model of those that the server has: a:latest, b:latest"},
		{url, []string{"--model", "none"}, 1, `the server has no model "none"; it has a:latest, b:latest`},
		{url, []string{"--workload", "models", "--model", "a"}, 1, "needs 2 --model"},
		{url, []string{"--workload", "models", "--model", "a", "--model", "A:latest"}, 1, "needs two different models"},
		{proxy.URL, nil, 1, "is an ollama-cacheproxy: say with --upstream where Ollama itself is"},
		{"127.0.0.1:1", nil, 1, "does not answer"},
		{url, []string{"--workload", "none"}, 2, "must be one of"},
		{url, []string{"--requests", "0"}, 2, "want at least 1"},
		{url, []string{"--optimize", "true", "--optimize", "true"}, 2, "given twice"},
		{url, []string{"--slots", "x"}, 2, "want a number from 1"},
		{"sim:?model=a", nil, 2, "sim: is for serve"},
		{url, []string{"--model", "a", "--html", filepath.Join(t.TempDir(), "none", "report.html")}, 2, "no such file or directory"},
	} {
		status, _, stderr := benchmark(t.Context(), c.url, c.args...)
		if status != c.status || !strings.Contains(stderr, c.want) {
			t.Errorf("%q: status %d, %q; want %d, %q", c.args, status, stderr, c.status, c.want)
		}
	}
	if enum := strings.Split("same,interleaved,closed-loops,models,num-ctx,user-message-prefix,chat-turns", ","); !slices.Equal(enum, bench.Workloads()) {
		t.Errorf("the flag has %v", enum)
	}
}
