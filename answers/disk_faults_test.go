package answers_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// text is an entry of a key with a text that repeats a word.
func text(key, word string, size int) answers.Entry {
	data := bytes.Repeat([]byte(word), size/len(word)+1)[:size]
	return answers.Entry{Key: sha256.Sum256([]byte(key)), Kind: answers.Text, Made: time.Now(), Data: data}
}

// filesWith returns the files of a folder that contain a word.
func filesWith(t *testing.T, dir, word string) (names []string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no files in %s (%v)", dir, err)
	}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(content, []byte(word)) {
			names = append(names, filepath.Base(path))
		}
	}
	return names
}

// TestDiskForgets removes texts in each way that there is, and looks for them in the bytes of the
// files: in pages with others, in those of its own that a long text has, and in SQLite's log.
func TestDiskForgets(t *testing.T) {
	const secret = "TheSecretWord"
	sizes := []int{100, 5_000, 40_000, 300_000}
	for _, c := range []struct {
		name   string
		limits answers.Limits
		remove func(t *testing.T, d opened)
	}{
		{"deleted", answers.Limits{Bytes: 64 << 20}, func(t *testing.T, d opened) {
			for _, size := range sizes {
				key := text(fmt.Sprint(size), secret, 1).Key
				if err := d.Delete(t.Context(), []answers.Key{key}); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"replaced", answers.Limits{Bytes: 64 << 20}, func(t *testing.T, d opened) {
			for _, size := range sizes {
				d.Put(t.Context(), []answers.Entry{text(fmt.Sprint(size), "harmless", 200)})
			}
		}},
		{"evicted", answers.Limits{Bytes: 4 << 20}, func(t *testing.T, d opened) {
			for i := range 100 {
				d.Put(t.Context(), []answers.Entry{text(fmt.Sprint("other", i), "harmless", 100_000)})
				flush(t, d)
			}
		}},
		{"wiped", answers.Limits{Bytes: 64 << 20}, func(t *testing.T, d opened) {
			if err := d.Wipe(t.Context()); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := openDisk(t, t.TempDir(), c.limits, nil)
			for _, size := range sizes {
				d.Put(t.Context(), []answers.Entry{text(fmt.Sprint(size), secret, size)})
			}
			for i := range 20 { // so that pages are shared, and few are free
				d.Put(t.Context(), []answers.Entry{text(fmt.Sprint("first", i), "harmless", 30_000)})
			}
			flush(t, d)
			if len(filesWith(t, d.dir, secret)) == 0 {
				t.Fatal("the text is in no file before")
			}
			c.remove(t, d)
			flush(t, d)
			flush(t, d) // what a tick does: a pass with nothing to write
			if names := filesWith(t, d.dir, secret); len(names) > 0 {
				t.Errorf("a text that was %s is still in %v", c.name, names)
			}
		})
	}
}

// TestDiskRemoved removes the folder while it is open. SQLite would write on, to files without a
// name, of which nothing bounds the log.
func TestDiskRemoved(t *testing.T) {
	var said lines
	log := slog.New(slog.NewTextHandler(&said, nil))
	d := openDisk(t, filepath.Join(t.TempDir(), "answers"), answers.Limits{Bytes: 4 << 20}, log)
	d.Put(t.Context(), []answers.Entry{text("before", "x", 100)})
	flush(t, d)
	if err := os.RemoveAll(d.dir); err != nil {
		t.Fatal(err)
	}
	d.Put(t.Context(), []answers.Entry{text("lost", "x", 100)})
	d.Flush(t.Context()) // finds out
	after := text("after", "y", 100)
	d.Put(t.Context(), []answers.Entry{after})
	flush(t, d)
	if got, err := d.Get(t.Context(), []answers.Key{after.Key}); err != nil || got[0].Kind == 0 {
		t.Errorf("an entry is not found that was put after the folder was made again: %v", err)
	}
	if len(filesWith(t, d.dir, "SQLite format 3")) == 0 {
		t.Error("there is no new file")
	}
	if d.Stats().Bytes == 0 || d.Stats().Down {
		t.Errorf("%+v", d.Stats())
	}
	if all := said.all(); len(all) != 1 || !strings.Contains(all[0], "was removed") {
		t.Errorf("want one line that the folder was removed, got %q", all)
	}
	if _, err := answers.OpenDisk(d.dir, answers.Limits{Bytes: 1 << 20}, nil); !errors.Is(err, answers.ErrInUse) {
		t.Errorf("the new folder is not locked: %v", err)
	}
}

// TestDiskOpensAgain lets a wipe fail, after which there is no file to write to, until it can be
// made again.
func TestDiskOpensAgain(t *testing.T) {
	answers.SetDiskFirstWait(0)
	t.Cleanup(func() { answers.SetDiskFirstWait(time.Second) })
	dir := filepath.Join(t.TempDir(), "answers")
	d := openDisk(t, dir, answers.Limits{Bytes: 4 << 20}, nil)
	goOn := d.Hang() // a pass in between would make the folder again
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.WriteFile(dir, nil, 0o600) // not even root makes a file in that
	}
	goOn()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Wipe(t.Context()); err == nil {
		t.Fatal("a wipe that cannot remove anything has no error")
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	d.Flush(t.Context()) // may end a pass that failed
	e := text("after", "y", 100)
	d.Put(t.Context(), []answers.Entry{e})
	flush(t, d)
	if got, err := d.Get(t.Context(), []answers.Key{e.Key}); err != nil || got[0].Kind == 0 {
		t.Errorf("the store does not come back: %v", err)
	}
}

// TestDiskSetAsideOnce lets passes follow on one that found the file broken, before the store is
// tried again. The file is a new one by then, and is not to be taken for the broken one.
func TestDiskSetAsideOnce(t *testing.T) {
	answers.SetDiskFirstWait(time.Hour)
	t.Cleanup(func() { answers.SetDiskFirstWait(time.Second) })
	var said lines
	log := slog.New(slog.NewTextHandler(&said, nil))
	d := openDisk(t, t.TempDir(), answers.Limits{Bytes: 1 << 20}, log)
	flush(t, d)
	end := d.FoundBroken()
	for range 3 {
		d.Delete(t.Context(), []answers.Key{{1}})
		if d.Flush(t.Context()) == nil {
			t.Error("it was tried again at once")
		}
	}
	if names := filesWith(t, d.dir, ""); slices.Contains(names, "answers.db.broken") || len(said.all()) != 1 {
		t.Errorf("set aside: %v, %q", names, said.all())
	}
	end()
	flush(t, d)
}

// TestDiskHangs lets the disk hang. Requests wait for it no longer than DiskWait, and once several
// have, not at all.
func TestDiskHangs(t *testing.T) {
	d := openDisk(t, t.TempDir(), answers.Limits{Bytes: 4 << 20}, nil)
	e := text("a", "x", 100)
	d.Put(t.Context(), []answers.Entry{e})
	flush(t, d)
	restore := answers.SetDiskWait(answers.DiskWait)
	end := d.Hang()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if got, err := d.Get(context.Background(), []answers.Key{e.Key}); err == nil || len(got) != 1 {
				t.Errorf("%d entries, %v", len(got), err)
			}
		})
	}
	wg.Wait()
	if n := d.Overdue(); n != 4 {
		t.Errorf("%d reads are overdue, want 4", n)
	}
	if _, err := d.Get(t.Context(), []answers.Key{e.Key}); err == nil || d.Overdue() != 4 {
		t.Errorf("another read was begun (%v, %d overdue)", err, d.Overdue())
	}
	restore()
	end()
	for d.Overdue() > 0 {
		time.Sleep(time.Millisecond)
	}
	if got, err := d.Get(t.Context(), []answers.Key{e.Key}); err != nil || got[0].Kind == 0 {
		t.Errorf("the store does not come back: %v", err)
	}
}
