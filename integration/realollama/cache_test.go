package realollama

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// lines is a writer that tests may read while others write.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func openTestCache(t *testing.T) (*Cache, *lines) {
	t.Helper()
	t.Setenv(cacheEnv, t.TempDir())
	progress := &lines{}
	c, err := OpenCache(progress)
	if err != nil {
		t.Fatal(err)
	}
	return c, progress
}

func writeResult(content string) func(context.Context, *build) error {
	return func(_ context.Context, b *build) error {
		return writeFile(filepath.Join(b.Result, "file"), strings.NewReader(content), 0o644)
	}
}

func TestEnsureMakesAnEntryOnce(t *testing.T) {
	c, _ := openTestCache(t)
	var made atomic.Int32
	r := recipe{name: "thing", inputs: []string{"1"}, announce: "making a thing", make: func(ctx context.Context, b *build) error {
		made.Add(1)
		return writeResult("made")(ctx, b)
	}}
	// Each has its own lock file, as in another process.
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			dir, err := c.ensure(t.Context(), r)
			if err != nil {
				t.Error(err)
				return
			}
			if content, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(content) != "made" {
				t.Errorf("the entry has %q, %v", content, err)
			}
		})
	}
	all.Wait()
	if n := made.Load(); n != 1 {
		t.Errorf("it was made %d times", n)
	}

	other := r
	other.inputs = []string{"2"}
	if _, err := c.ensure(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if n := made.Load(); n != 2 {
		t.Errorf("another recipe gave the same entry")
	}
}

func TestEnsureMakesNeedsFirst(t *testing.T) {
	c, _ := openTestCache(t)
	need := recipe{name: "need", announce: "making a need", make: writeResult("needed")}
	r := recipe{name: "thing", announce: "making a thing", needs: []recipe{need}, make: func(ctx context.Context, b *build) error {
		if !exists(filepath.Join(c.Dir(), need.key(), "file")) {
			t.Error("the need is missing")
		}
		return nil
	}}
	if _, err := c.ensure(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

func TestFailedBuildLeavesOnlyItsLog(t *testing.T) {
	c, _ := openTestCache(t)
	r := recipe{name: "thing", announce: "making a thing", make: func(ctx context.Context, b *build) error {
		return b.run(ctx, command{args: []string{"sh", "-c", "echo working; echo the disk is on fire >&2; exit 3"}})
	}}
	dir, err := c.ensure(t.Context(), r)
	if err == nil {
		t.Fatal("the failed build gave ", dir)
	}
	_, after, _ := strings.Cut(err.Error(), "log: ")
	path, _, _ := strings.Cut(after, ")")
	log, readErr := os.ReadFile(path)
	if readErr != nil || !strings.Contains(string(log), "the disk is on fire") {
		t.Errorf("the log %q: %q, %v", path, log, readErr)
	}
	if !strings.Contains(err.Error(), "the disk is on fire") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("the error does not tell what failed: %v", err)
	}
	if exists(filepath.Join(c.Dir(), r.key())) || exists(filepath.Join(c.Dir(), "tmp", r.key())) {
		t.Error("the failed build left files")
	}
	// It can be made later.
	r.make = writeResult("made")
	if _, err := c.ensure(t.Context(), r); err != nil {
		t.Error(err)
	}
}

func TestUnfinishedBuildsAreCleared(t *testing.T) {
	c, _ := openTestCache(t)
	killed := filepath.Join(c.Dir(), "tmp", "killed-build", "work")
	if err := os.MkdirAll(killed, 0o755); err != nil {
		t.Fatal(err)
	}
	running := filepath.Join(c.Dir(), "tmp", "running-build")
	if err := os.MkdirAll(running, 0o755); err != nil {
		t.Fatal(err)
	}
	unlock, err := c.lock(t.Context(), "running-build")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := c.ensure(t.Context(), recipe{name: "thing", announce: "making a thing", make: writeResult("")}); err != nil {
		t.Fatal(err)
	}
	if exists(killed) {
		t.Error("what a killed build left is still there")
	}
	if !exists(running) {
		t.Error("a running build lost its folder")
	}
}

func TestLockWaitEndsWithTheContext(t *testing.T) {
	c, progress := openTestCache(t)
	unlock, err := c.lock(t.Context(), "thing")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.lock(ctx, "thing"); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting gave %v", err)
	}
	if !strings.Contains(progress.String(), "waiting for another process") {
		t.Error("the wait was not told")
	}
	unlock()
	again, err := c.lock(t.Context(), "thing")
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestVersions(t *testing.T) {
	for env, want := range map[string]struct{ all, distinct, newest string }{
		"":          {"0.24.0 0.33.0 0.34.1", "0.24.0 0.34.1", "0.34.1"},
		"0.34.1":    {"0.34.1", "0.34.1", "0.34.1"},
		"a, C":      {"0.24.0 0.34.1", "0.24.0 0.34.1", "0.34.1"},
		"v0.33.0,a": {"0.33.0 0.24.0", "0.33.0 0.24.0", "0.33.0"},
	} {
		t.Setenv(erasEnv, env)
		if got := strings.Join(Versions(), " "); got != want.all {
			t.Errorf("%s=%q gives %s, want %s", erasEnv, env, got, want.all)
		}
		if got := strings.Join(Distinct(), " "); got != want.distinct {
			t.Errorf("%s=%q has the distinct %s, want %s", erasEnv, env, got, want.distinct)
		}
		if got := Newest(); got != want.newest {
			t.Errorf("%s=%q has the newest %s, want %s", erasEnv, env, got, want.newest)
		}
	}
}
