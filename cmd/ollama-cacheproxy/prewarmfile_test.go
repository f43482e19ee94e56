package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestPrewarmFile: the requests are read again when the file has changed, and at SIGHUP, as other
// files are; errors are logged, and the previous requests stay.
func TestPrewarmFile(t *testing.T) {
	dir := t.TempDir()
	path, keys := filepath.Join(dir, "prewarm.jsonl"), filepath.Join(dir, "keys.txt")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const line = `{"model":"m","messages":[{"role":"user","content":"x"}]}`
	other := strings.Replace(line, "x", "y", 1)
	write(path, line)
	write(keys, "one")
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		signals := make(chan os.Signal, 1)
		f, err := readPrewarm(path)
		if err != nil {
			t.Fatal(err)
		}
		k, err := readKeys(keys)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { // ends with stop
			defer close(done)
			watchFiles(ctx, signals, slog.New(slog.NewTextHandler(&log, nil)), k, f)
		}()
		for _, step := range []struct {
			what     string
			change   func()
			requests int
			logged   string // in the last line; "" for no line
			lines    int
		}{
			{"nothing", func() {}, 1, "", 0},
			{"another line", func() { write(path, line+"\n"+other) }, 2, "requests=2", 1},
			{"a wrong one", func() { write(path, line+"\n{}") }, 2, "line 2:", 1},
			{"the keys alone", func() { write(keys, "one\ntwo") }, 2, "API keys read again", 1},
			{"SIGHUP", func() { write(path, line); signals <- syscall.SIGHUP }, 1, "requests=1", 2},
		} {
			before := log.String()
			step.change()
			time.Sleep(filesEvery + 1)
			synctest.Wait()
			lines := strings.TrimPrefix(log.String(), before)
			if f.requests.Len() != step.requests || strings.Count(lines, "\n") != step.lines ||
				!strings.Contains(lines, step.logged) {
				t.Errorf("%s: %d requests, want %d, and %d lines with %q:\n%s",
					step.what, f.requests.Len(), step.requests, step.lines, step.logged, lines)
			}
		}
		stop()
		<-done
	})
}
