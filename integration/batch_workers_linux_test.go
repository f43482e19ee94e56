package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// workersFolder is a folder in which batches are shared.
type workersFolder struct {
	t     testing.TB
	dir   string
	store *valkeyserver.Server
}

// newWorkersFolder writes requests to model, of which each prefix has some, and which alternate.
func newWorkersFolder(t testing.TB, model string, prefixes, each int) *workersFolder {
	t.Helper()
	f := &workersFolder{t: t, dir: t.TempDir(), store: valkeyserver.Start(t)}
	var input bytes.Buffer
	for n := range prefixes * each {
		text, err := json.Marshal(map[string]any{
			"model": model, "options": map[string]any{"temperature": 0, "num_predict": 1},
			"messages": []map[string]string{
				{"role": "system", "content": words(uint64(n%prefixes), 100)},
				{"role": "user", "content": fmt.Sprintf("item %d", n)},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		input.Write(append(text, '\n'))
	}
	if err := os.WriteFile(filepath.Join(f.dir, "in.jsonl"), input.Bytes(), 0o666); err != nil {
		t.Fatal(err)
	}
	return f
}

// command returns a batch through server, with an output.
func (f *workersFolder) command(log io.Writer, server, out string, more ...string) *exec.Cmd {
	f.t.Helper()
	bin, err := proxyBinary()
	if err != nil {
		f.t.Fatal(err)
	}
	cmd := command(f.t, bin, append([]string{"batch", "--server", server, "-i", "in.jsonl",
		"-o", out, "--concurrency", "4", "--log-format", "json", "--summary-json", out + ".summary"}, more...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = f.dir, log, log
	return cmd
}

// worker is a batch that has been started.
type worker struct {
	*exec.Cmd
	log   lockedBuffer
	ended chan struct{} // closed when it has ended and err is set
	err   error
}

// start starts a batch, which ends when the test ends.
func (f *workersFolder) start(server, out string, more ...string) *worker {
	f.t.Helper()
	w := &worker{ended: make(chan struct{})}
	w.Cmd = f.command(&w.log, server, out, more...)
	if err := w.Start(); err != nil {
		f.t.Fatal(err)
	}
	go func() { // command bounds it
		w.err = w.Cmd.Wait()
		close(w.ended)
	}()
	f.t.Cleanup(func() { w.Wait() })
	return w
}

// Wait waits until the batch has ended. Others may wait too.
func (w *worker) Wait() error {
	<-w.ended
	return w.err
}

func (f *workersFolder) read(name string) string {
	f.t.Helper()
	text, err := os.ReadFile(filepath.Join(f.dir, name))
	if err != nil {
		f.t.Fatal(err)
	}
	return string(text)
}

// workerGate is a server of one worker's, which answers some requests and then holds all others
// until it is opened or the worker is gone.
type workerGate struct {
	http.Handler
	full chan struct{} // closed once as many are held as the worker sends at once

	mu     sync.Mutex
	left   int         // that are answered
	sent   map[int]int // how often each item was sent
	held   map[int]bool
	opened chan struct{}
}

// unheld makes a gate answer all requests. The number of requests that a test expects would not do:
// a worker that sends one again would wait for ever.
const unheld = math.MaxInt

func newWorkerGate(t testing.TB, left int) (*workerGate, string) {
	t.Helper()
	sim, err := ollamasim.New(ollamasim.Config{Models: []ollamasim.Model{{Name: "m", LoadTime: time.Millisecond, PromptRate: 1e6, AnswerRate: 1e6}}})
	if err != nil {
		t.Fatal(err)
	}
	g := &workerGate{Handler: sim, full: make(chan struct{}), left: left, sent: map[int]int{}, held: map[int]bool{}, opened: make(chan struct{})}
	srv := httptest.NewServer(g)
	t.Cleanup(srv.Close)
	return g, srv.URL
}

var itemNumber = regexp.MustCompile(`item (\d+)`)

func (g *workerGate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/api/chat" {
		body, err := io.ReadAll(r.Body)
		found := itemNumber.FindSubmatch(body)
		if err != nil || found == nil {
			http.Error(w, "no item", http.StatusBadRequest)
			return
		}
		n, _ := strconv.Atoi(string(found[1]))
		r.Body = io.NopCloser(bytes.NewReader(body))
		if g.hold(n) {
			select {
			case <-g.opened:
			case <-r.Context().Done():
				return
			}
		}
	}
	g.Handler.ServeHTTP(w, r)
}

// hold reports whether an item is held.
func (g *workerGate) hold(n int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sent[n]++
	if g.left--; g.left >= 0 {
		return false
	}
	if g.held[n] {
		return true
	}
	if g.held[n] = true; len(g.held) == 4 {
		close(g.full)
	}
	return true
}

// fills waits until as many requests are held as the worker sends at once.
func (g *workerGate) fills(t testing.TB, w *worker) {
	t.Helper()
	select {
	case <-g.full:
		return
	case <-w.ended:
		t.Fatalf("it has ended and should wait for answers: %v\n%s", w.err, w.log.String())
	case <-time.After(time.Minute):
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	t.Fatalf("after a minute %d items have been sent, and %d are held\n%s",
		len(g.sent), len(g.held), w.log.String())
}

// items returns how many items have been sent.
func (g *workerGate) items() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.sent)
}

// TestBatchWorkers: three workers, as processes, share a batch. One is killed and one is stopped in
// the middle, and the third finishes it: its output has the bytes of one worker's without Valkey. Only
// the requests that were under way at the two ends are sent again. The one that was killed has the
// same output when it is started again.
func TestBatchWorkers(t *testing.T) {
	const prefixes, each, atOnce, first = 12, 20, 4, 20
	f := newWorkersFolder(t, "m", prefixes, each)
	_, aloneURL := newWorkerGate(t, unheld)
	var log lockedBuffer
	if err := f.command(&log, aloneURL, "alone.jsonl").Run(); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	shared := []string{"--workers", f.store.URL() + "/2", "--job", "nightly"}
	var gates []*workerGate
	var workers []*worker
	for _, out := range []string{"killed.jsonl", "stopped.jsonl", "third.jsonl"} {
		g, url := newWorkerGate(t, first)
		gates = append(gates, g)
		workers = append(workers, f.start(url, out, shared...))
	}
	store, err := valkey.NewClient(valkey.ClientOption{InitAddress: []string{f.store.Addr()}, SelectDB: 2, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	for i, g := range gates {
		g.fills(t, workers[i])
	}
	// All that was answered is in the server; what was sent besides is under way.
	eventually(t, "answered", func() bool {
		n, err := store.Do(t.Context(), store.B().Bitcount().Key("ollama-cacheproxy:batch:1:{nightly}:done").Build()).AsInt64()
		return err == nil && n == 3*first
	})
	killed, stopped, third := workers[0], workers[1], workers[2]
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	killed.Wait()
	if err := stopped.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	stopped.Wait()
	if text := stopped.log.String(); stopped.ProcessState.ExitCode() != 1 ||
		!strings.Contains(text, "stopped before the end") {
		t.Errorf("stopped: %v\n%s", stopped.ProcessState, text)
	}
	close(gates[2].opened)
	if err := third.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, third.log.String())
	}
	want := f.read("alone.jsonl")
	if got := f.read("third.jsonl"); got != want || strings.Count(got, "\n") != prefixes*each {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
	sent, again := 0, 0
	for n := range prefixes * each {
		times, held := 0, false
		for _, g := range gates {
			g.mu.Lock()
			times, held = times+g.sent[n], held || g != gates[2] && g.held[n]
			g.mu.Unlock()
		}
		sent += times
		if times == 1 {
			continue
		}
		again++
		if times != 2 || !held {
			t.Errorf("item %d was sent %d times, and was not under way", n, times)
		}
	}
	t.Logf("%d requests for %d items, of which %d were under way and sent again", sent, prefixes*each, again)
	if again > 2*atOnce {
		t.Errorf("%d were sent again, want at most %d", again, 2*atOnce)
	}
	// Started again, the one that was killed has all from the server.
	g, url := newWorkerGate(t, unheld)
	if err := f.command(&log, url, "killed.jsonl", shared...).Run(); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	if got := f.read("killed.jsonl"); got != want || g.items() != 0 {
		t.Errorf("%d bytes, want %d; %d requests sent", len(got), len(want), g.items())
	}
	var status lockedBuffer
	want = fmt.Sprintf("requests    %d, of which %[1]d are answered\n", prefixes*each)
	if err := f.command(&status, url, "none.jsonl", append(shared, "--job-status")...).Run(); err != nil || !strings.Contains(status.String(), want) {
		t.Errorf("%v\n%s", err, status.String())
	}
	if err := f.command(&status, url, "none.jsonl", append(shared, "--job-drop")...).Run(); err != nil {
		t.Errorf("%v\n%s", err, status.String())
	}
	left, err := store.Do(t.Context(), store.B().Dbsize().Build()).AsInt64()
	if err != nil || left != 0 {
		t.Errorf("%d keys are left, %v", left, err)
	}
}

// TestBatchWorkersReal: two workers share a batch on a real server. One is killed. The other has an answer for every line, which is that of one worker, as far as
// the engine answers alike.
func TestBatchWorkersReal(t *testing.T) {
	const model, prefixes, each = "gen-llama-tiny", 8, 25
	const n = prefixes * each
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{model}})
	p := startProxy(t, server.URL(), "--slots", "1")
	f := newWorkersFolder(t, model, prefixes, each)
	var log lockedBuffer
	if err := f.command(&log, p.URL, "alone.jsonl").Run(); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	victim := f.start(p.URL, "victim.jsonl", "--workers", f.store.URL())
	eventually(t, "so far", func() bool {
		text, err := os.ReadFile(filepath.Join(f.dir, "victim.jsonl"))
		return err == nil && bytes.Count(text, []byte("\n")) >= prefixes // results are in the order of the input
	})
	other := f.start(p.URL, "other.jsonl", "--workers", f.store.URL())
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	victim.Wait()
	if err := other.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, other.log.String())
	}
	got, want := strings.SplitAfter(f.read("other.jsonl"), "\n"), strings.SplitAfter(f.read("alone.jsonl"), "\n")
	if len(got) != n+1 || len(want) != n+1 {
		t.Fatalf("%d results, want %d", len(got)-1, n)
	}
	differ := 0
	for i, line := range got[:n] {
		var r struct {
			Line     int
			Response struct{ Done bool }
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil || !r.Response.Done || r.Line != i+1 {
			t.Fatalf("result %d: %s, %v", i, line, err)
		}
		if line != want[i] {
			differ++
		}
	}
	// The engine's own answers vary now and then: see TestAnswers in realollama.
	if differ*20 > n {
		t.Errorf("%d of %d results differ from those of one worker", differ, n)
	}
	t.Logf("%d of %d results differ", differ, n)
}

// TestBatchWorkersEvaluated: workers that share a batch have as little evaluated as one alone, on
// servers without a host cache, where each change of the prompt's beginning costs: three workers and
// one, over a proxy before one server and before two.
func TestBatchWorkersEvaluated(t *testing.T) {
	const model = "gen-llama-tiny"
	if _, err := proxyBinary(); err != nil { // before the time is taken
		t.Fatal(err)
	}
	var servers []*realollama.Server
	for range 2 {
		servers = append(servers, realollama.Start(t, realollama.Config{
			Version: realollama.EraC, Models: []string{model}, CacheRAMMiB: new(int),
		}))
	}
	for _, load := range []struct{ prefixes, each int }{{1, 50}, {10, 20}} {
		f := newWorkersFolder(t, model, load.prefixes, load.each)
		for before := 1; before <= len(servers); before++ {
			t.Run(fmt.Sprintf("%d prefixes, %d servers", load.prefixes, before), func(t *testing.T) {
				began := time.Now()
				alone, answers := f.evaluated(t, servers[:before], 1)
				first := time.Since(began)
				shared, same := f.evaluated(t, servers[:before], 3)
				t.Logf("%.0f tokens evaluated for one worker in %v, %.0f for three in %v; answers equal: %v", alone,
					first.Round(time.Second/10), shared, (time.Since(began) - first).Round(time.Second/10), answers == same)
				// Where requests wait for long, the proxy tries up to three times whether the server keeps
				// what it puts aside, which costs two prefixes each (docs/lanes.md), and a prefix may be evaluated
				// on both servers. Workers out of step would change the prefix with every few requests: ten
				// times as much.
				if shared > 2*alone {
					t.Errorf("three workers evaluate %.0f tokens, one evaluates %.0f", shared, alone)
				}
				// The engine's own answers vary now and then: see TestAnswers in realollama.
				one, three := strings.SplitAfter(answers, "\n"), strings.SplitAfter(same, "\n")
				differ := 0
				for i := range min(len(one), len(three)) {
					if one[i] != three[i] {
						differ++
					}
				}
				if len(one) != len(three) || differ*20 > len(one) {
					t.Errorf("%d and %d results, of which %d differ", len(one)-1, len(three)-1, differ)
				}
			})
		}
	}
}

// evaluated runs so many workers at once through a proxy of their own before servers that have nothing
// loaded. It returns how many tokens were evaluated, and the output, which is that of each worker.
func (f *workersFolder) evaluated(t *testing.T, servers []*realollama.Server, workers int) (tokens float64, output string) {
	t.Helper()
	t.Run(fmt.Sprintf("%d workers", workers), func(t *testing.T) { // which ends the proxy
		var flags []string
		for _, s := range servers {
			unloadAll(t, s)
			if s != servers[0] {
				flags = append(flags, "--upstream", s.URL())
			}
		}
		p := startProxy(t, servers[0].URL(), flags...)
		job := fmt.Sprintf("%d-%d", len(servers), workers)
		var all []*worker
		for i := range workers {
			all = append(all, f.start(p.URL, fmt.Sprintf("%s-%d.jsonl", job, i),
				"--concurrency", "auto", "--workers", f.store.URL(), "--job", job))
		}
		for i, w := range all {
			if err := w.Wait(); err != nil {
				t.Fatalf("%v\n%s", err, w.log.String())
			}
			text := f.read(fmt.Sprintf("%s-%d.jsonl", job, i))
			if i > 0 && text != output {
				t.Errorf("the outputs of workers 0 and %d differ", i)
			}
			output = text
		}
		tokens = p.Metric(t, `ollama_cacheproxy_prompt_tokens_total{kind="evaluated"`)
	})
	return tokens, output
}
