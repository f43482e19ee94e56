package contextstore_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// smallDisk returns a folder on a disk of one megabyte; ok is false if this user may not mount one.
func smallDisk(t *testing.T) (dir string, ok bool) {
	t.Helper()
	dir = t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=0700"); err != nil {
		t.Logf("no disk of its own: %v", err)
		return dir, false
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir, true
}

// TestFilesFullDisk: a disk that is full, or fills up in the middle of a save, costs that save only.
// Who may not mount a small disk has it as full as limits can tell.
func TestFilesFullDisk(t *testing.T) {
	dir, own := smallDisk(t)
	f, log := openFiles(t, dir, ample)
	kept := mustSave(t, f, stateOf(chainOf("a", 5), 300_000))
	part, err := f.Room(stateOf(chainOf("b", 5), 300_000))
	if err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	if own {
		if err := os.WriteFile(filepath.Join(dir, part), stateFile(7, 300_000), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		if _, err := f.Commit(part, stateOf(chainOf("b", 5), 300_000)); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("stored on a full disk: %v", err)
		}
		if _, err := f.Room(stateOf(chainOf("b", 5), 900_000)); !errors.Is(err, contextstore.ErrNoDisk) {
			t.Errorf("room on a full disk: %v", err)
		}
		if log.count("\n") != 2 {
			t.Errorf("logged: %s", log)
		}
	} else {
		f.Abort(part)
	}
	if s, _, ok := f.Best(contextstore.Query{Format: "f", Links: kept.Links}); !ok || s.ID != kept.ID {
		t.Error("what was stored is gone")
	}
	if err := os.RemoveAll(filler); err != nil {
		t.Fatal(err)
	}
	mustSave(t, f, stateOf(chainOf("b", 5), 300_000))
	if n := len(names(t, dir)); n != 4 {
		t.Errorf("%d files of 2 states", n)
	}
	// What is asked for again makes room on the disk, too, if it is worth it.
	worth := stateOf(chainOf("c", 5), 600_000)
	worth.Cost = time.Hour
	mustSave(t, f, worth)
	want := 3
	if own {
		want = 2
	}
	if st := f.Stats(); st.States != want {
		t.Errorf("%+v", st)
	}
}

// readOnly makes a folder one that can only be read, until the test ends or it is undone.
func readOnly(t *testing.T, dir string) (undo func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		if err := os.Chmod(dir, 0o500); err != nil {
			t.Fatal(err)
		}
		return sync.OnceFunc(func() { os.Chmod(dir, 0o700) })
	}
	// Modes are nothing to root, so the folder is mounted over itself.
	const again = syscall.MS_BIND | syscall.MS_REMOUNT | syscall.MS_RDONLY
	if err := errors.Join(syscall.Mount(dir, dir, "", syscall.MS_BIND, ""),
		syscall.Mount("", dir, "", again, "")); err != nil {
		t.Fatalf("root may not mount here: %v", err)
	}
	undo = sync.OnceFunc(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(undo)
	return undo
}

// TestFilesReadOnly: what is stored in a folder that can only be read is still of use.
func TestFilesReadOnly(t *testing.T) {
	dir := t.TempDir()
	f, log := openFiles(t, dir, ample)
	s := mustSave(t, f, stateOf(chainOf("a", 5), 4000))
	undo := readOnly(t, dir)
	for range 3 {
		if _, err := f.Room(stateOf(chainOf("b", 5), 4000)); err == nil {
			t.Error("room where nothing can be written")
		}
	}
	if log.count("cannot be stored as they should be") != 1 || log.count("\n") != 1 {
		t.Errorf("logged: %s", log)
	}
	q := contextstore.Query{Format: "f", Links: s.Links}
	if best, _, ok := f.Best(q); !ok || best.ID != s.ID {
		t.Error("what was stored is gone")
	}
	f.Used(s.ID)
	f.Close(t.Context())
	if f, err := contextstore.OpenFiles(dir, ample, nil); err == nil { // the lock's mode allows it
		if _, err := f.Room(stateOf(chainOf("b", 5), 4000)); err == nil || f.Stats().States != 1 {
			t.Errorf("opened what cannot be written: %+v, %v", f.Stats(), err)
		}
		f.Close(t.Context())
	}
	if states, problems, err := contextstore.ReadFiles(dir); len(states) != 1 ||
		len(problems) != 0 || err != nil {
		t.Errorf("%+v %+v %v", states, problems, err)
	}
	if _, err := contextstore.RemoveFiles(dir, s.ID); err == nil {
		t.Error("removed what cannot be removed")
	}
	undo()
	f, log = openFiles(t, dir, ample)
	if best, _, ok := f.Best(q); !ok || best.ID != s.ID {
		t.Error("what was stored is gone")
	}
	// Whenever it begins again it is told again.
	for i := range 3 {
		undo := readOnly(t, dir)
		f.Room(stateOf(chainOf("c", 5), 4000))
		undo()
		mustSave(t, f, stateOf(chainOf(fmt.Sprint(i, "x"), 5), 4000))
	}
	if log.count("cannot be stored as they should be") != 3 {
		t.Errorf("logged: %s", log)
	}
}
