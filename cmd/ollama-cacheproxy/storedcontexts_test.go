package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestEnginesThatCannotBeTold: the log says once why nothing is stored.
func TestEnginesThatCannotBeTold(t *testing.T) {
	home := t.TempDir()
	notes := filepath.Join(home, "engines")
	if err := os.WriteFile(notes, nil, 0o600); err != nil { // not a folder, so it cannot be listed
		t.Fatal(err)
	}
	var lines bytes.Buffer
	log, told := slog.New(slog.NewTextHandler(&lines, nil)), atomic.Bool{}
	for i, want := range []int{1, 1} {
		running(home, log, &told)
		if n := strings.Count(lines.String(), "level=WARN"); n != want {
			t.Errorf("after %d requests there are %d warnings", i+1, n)
		}
	}
	if err := os.Remove(notes); err != nil {
		t.Fatal(err)
	}
	running(home, log, &told)
	if told.Load() {
		t.Error("what goes wrong again would not be told")
	}
}
