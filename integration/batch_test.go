package integration

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestBatch: a CSV file of 2,000 rows with one rubric, on a real server. A batch that is killed
// three times has the same result as an uninterrupted run, of which only a part is made: every row
// has its answer, in the input's order. The batch's figures for tokens agree with the server's log.
func TestBatch(t *testing.T) {
	const model, rows, part = "gen-llama-tiny", 2000, 300
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{model}})
	p := startProxy(t, server.URL(), "--slots", "1", "--log-level", "info")
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	template, err := json.Marshal(map[string]any{
		"model": model, "options": map[string]any{"temperature": 0, "num_predict": 1},
		"messages": []map[string]string{{"role": "system", "content": words(1, 100)}, {"role": "user", "content": "{{name}} of {{city}}: {{answer}}"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var data, some bytes.Buffer
	w := csv.NewWriter(&data)
	w.Write([]string{"name", "city", "answer"})
	for n := range rows {
		if n == part {
			w.Flush()
			some.Write(data.Bytes())
		}
		w.Write([]string{fmt.Sprintf("candidate %d", n), []string{"Paris", "Köln, west"}[n%2], "\"" + words(uint64(n+100), 1) + "\",\nshe said"})
	}
	if w.Flush(); w.Error() != nil {
		t.Fatal(w.Error())
	}
	for name, text := range map[string][]byte{"request.json": template, "candidates.csv": data.Bytes(), "some.csv": some.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	batch := func(data, out string, stderr *lockedBuffer) *exec.Cmd {
		cmd := command(t, bin, "batch", "--server", p.URL, "--template", "request.json",
			"--data", data, "-o", out, "--summary-json", out+".summary", "--log-format", "json")
		cmd.Dir, cmd.Stdout, cmd.Stderr = dir, stderr, stderr
		return cmd
	}
	content := func(path string) string {
		text, err := os.ReadFile(filepath.Join(dir, path))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return string(text)
	}
	began := time.Now()
	var log lockedBuffer
	for _, share := range []int{1, 2, 3} { // of four
		cmd := batch("candidates.csv", "results.jsonl", &log)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// However slow the machine is, there are more of them within a minute.
		for n, now := 0, 0; n < rows*share/4; n = now {
			eventually(t, fmt.Sprintf("beyond %d results", n), func() bool {
				now = strings.Count(content("results.jsonl"), "\n")
				return now > n
			})
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() {
			t.Fatalf("it was not killed: %v\n%s", cmd.ProcessState, log.String())
		}
	}
	if err := batch("candidates.csv", "results.jsonl", &log).Run(); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	t.Logf("killed three times: %v", time.Since(began).Round(time.Millisecond))
	killed := content("results.jsonl")

	began = time.Now()
	mark := server.Mark()
	if err := batch("some.csv", "whole.jsonl", &log).Run(); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	t.Logf("a part, not killed: %v", time.Since(began).Round(time.Millisecond))
	whole := content("whole.jsonl")

	lines, wholeLines := strings.SplitAfter(killed, "\n"), strings.SplitAfter(whole, "\n")
	if len(lines) != rows+1 || len(wholeLines) != part+1 {
		t.Fatalf("%d and %d results, want %d and %d", len(lines)-1, len(wholeLines)-1, rows, part)
	}
	differ := 0
	for i, line := range lines[:rows] {
		var r struct {
			Line     int
			Response struct {
				Message struct{ Content string }
				Done    bool
			}
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil || !r.Response.Done || r.Line != 2+2*i {
			t.Fatalf("result %d: %s, %v", i, line, err)
		}
		if i < part && line != wholeLines[i] {
			differ++
		}
	}
	// The engine's own answers vary now and then: see TestAnswers in realollama.
	if differ*20 > part {
		t.Errorf("%d of %d results differ from those of a run that was not killed", differ, part)
	} else {
		t.Logf("%d of %d results differ from those of a run that was not killed", differ, part)
	}

	var summary struct {
		Succeeded int
		Evaluated struct {
			Value int
			Basis string
		} `json:"evaluated_tokens"`
	}
	if err := json.Unmarshal([]byte(content("whole.jsonl.summary")), &summary); err != nil {
		t.Fatal(err)
	}
	_, sum := evaluations(t, server, mark, part)
	if summary.Succeeded != part || summary.Evaluated.Basis != "measured" || summary.Evaluated.Value != sum {
		t.Errorf("the summary says %+v, the server's log %d tokens", summary, sum)
	}
	t.Logf("%d tokens evaluated", sum)
}

// lockedBuffer is written by a process's output while a test reads it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
