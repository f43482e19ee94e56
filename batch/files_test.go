package batch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// faultyDisk is a disk on which one step fails, or the power does. It remembers what would be left:
// the synced content of each file, under the name that it had when its folder was synced.
type faultyDisk struct {
	disk
	fault  fault
	at     int // the step that fails, from 0
	steps  int // taken
	failed string
	path   string // of the file or folder of the failed step

	names  map[string]*string // the synced content of each file, by its name
	synced map[string]*string // the same for the names that are on the disk
}

type fault string

const (
	short fault = "short write" // half of a write, then no space
	full  fault = "full disk"   // from then on nothing can be written or created
	once  fault = "one failure"
	power fault = "power loss" // nothing works any more
)

// step counts a step, and returns its error; write means that it needs space.
func (d *faultyDisk) step(op, path string, write bool) error {
	now := d.steps
	d.steps++
	switch {
	case now < d.at || now > d.at && (d.fault == short || d.fault == once):
		return nil
	case d.fault == full && !write, d.fault == short && op != "write":
		if now == d.at {
			d.at++ // then the next step fails, too
		}
		return nil
	}
	if d.failed == "" {
		d.failed, d.path = op, path
	}
	if d.fault == once || d.fault == power {
		return &fs.PathError{Op: op, Path: path, Err: syscall.EIO}
	}
	return &fs.PathError{Op: op, Path: path, Err: syscall.ENOSPC}
}

func (d *faultyDisk) OpenFile(name string, flag int, perm fs.FileMode) (file, error) {
	if err := d.step("open", name, flag&os.O_CREATE != 0); err != nil {
		return nil, err
	}
	f, err := d.disk.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	if d.names[name] == nil {
		d.names[name] = new(string)
	}
	return &faultyFile{f, d, name, d.names[name]}, nil
}

func (d *faultyDisk) Rename(from, to string) error {
	if err := d.step("rename", to, true); err != nil {
		return err
	}
	d.names[to] = d.names[from]
	delete(d.names, from)
	return d.disk.Rename(from, to)
}

func (d *faultyDisk) Remove(name string) error {
	if d.failed != "" && d.fault == power {
		return syscall.EIO
	}
	delete(d.names, name)
	return d.disk.Remove(name)
}

func (d *faultyDisk) SyncFolder(path string) error {
	if err := d.step("sync", path, true); err != nil {
		return err
	}
	here := func(name string, _ *string) bool { return filepath.Dir(name) == path }
	maps.DeleteFunc(d.synced, here)
	for name, synced := range d.names {
		if here(name, synced) {
			d.synced[name] = synced
		}
	}
	return nil
}

// cutPower leaves for each name, by chance, the synced or the current state, and likewise for each
// file's content.
func (d *faultyDisk) cutPower(t *testing.T, chance *rand.Rand) {
	t.Helper()
	all := maps.Clone(d.synced)
	maps.Copy(all, d.names)
	left := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		kept := [2]map[string]*string{d.synced, d.names}[chance.IntN(2)][name]
		if kept == nil {
			continue
		}
		left[name] = *kept
		if now, err := os.ReadFile(name); err == nil && d.names[name] == kept && chance.IntN(2) == 1 {
			left[name] = string(now)
		}
	}
	for name := range all {
		os.Remove(name)
	}
	for name, text := range left {
		write(t, name, text)
	}
}

type faultyFile struct {
	file
	disk   *faultyDisk
	name   string
	synced *string
}

func (f *faultyFile) step(op string, write bool) error { return f.disk.step(op, f.name, write) }

func (f *faultyFile) Write(p []byte) (int, error) {
	if err := f.step("write", true); err != nil {
		n := 0
		if f.disk.fault == short {
			n, _ = f.file.Write(p[:len(p)/2])
		}
		return n, err
	}
	return f.file.Write(p)
}

func (f *faultyFile) Sync() error {
	if err := f.step("sync", true); err != nil {
		return err
	}
	info, err := f.file.Stat()
	if err != nil {
		return err
	}
	text := make([]byte, info.Size())
	if _, err := f.file.ReadAt(text, 0); err != nil && err != io.EOF {
		return err
	}
	*f.synced = string(text)
	return nil
}

func (f *faultyFile) Read(p []byte) (int, error) {
	if err := f.step("read", false); err != nil {
		return 0, err
	}
	return f.file.Read(p)
}

func (f *faultyFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.step("read", false); err != nil {
		return 0, err
	}
	return f.file.ReadAt(p, off)
}

func (f *faultyFile) Seek(offset int64, whence int) (int64, error) {
	if err := f.step("seek", false); err != nil {
		return 0, err
	}
	return f.file.Seek(offset, whence)
}

func (f *faultyFile) Truncate(size int64) error {
	if err := f.step("truncate", false); err != nil {
		return err
	}
	return f.file.Truncate(size)
}

func (f *faultyFile) Stat() (fs.FileInfo, error) {
	if err := f.step("stat", false); err != nil {
		return nil, err
	}
	return f.file.Stat()
}

// inProcess sends requests to a handler, without a network.
type inProcess struct{ http.Handler }

func (p inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	p.ServeHTTP(w, r)
	return w.Result(), nil
}

// TestFaultyDisk: any step of keeping the files may fail, in a new batch and in a continued one.
// The batch ends with an error that names the file, no finished request is sent again, no file is
// left over, and the same command on a working disk ends as if nothing had happened.
func TestFaultyDisk(t *testing.T) {
	for _, order := range []Order{InputOrder, CompletionOrder} {
		for _, f := range []fault{short, full, once, power} {
			for _, resumed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/resumed=%v", order, f, resumed), func(t *testing.T) { testFaultyDisk(t, order, f, resumed) })
			}
		}
	}
}

func testFaultyDisk(t *testing.T, order Order, f fault, resumed bool) {
	const prefixes, each = 2, 5
	asked := 0
	server := inProcess{&fake{ask: func(w http.ResponseWriter, r *http.Request, user string) bool {
		if asked++; !strings.HasSuffix(user, "x3") {
			return false
		}
		w.WriteHeader(400)
		return true
	}}}
	var input strings.Builder // results of one prefix wait for those of the other
	for n := range prefixes * each {
		input.WriteString(chat(words(n%prefixes, 300), fmt.Sprintf("item x%d", n)) + "\n")
	}
	c := config(t, "http://server", input.String())
	c.Transport, c.Concurrency, c.Order, c.compactAt = server, 1, order, 1500
	c.Errors = filepath.Join(t.TempDir(), "errors.jsonl") // in another folder
	dir := filepath.Dir(c.Output)

	whole := c
	whole.Output, whole.Errors = c.Output+".whole", c.Output+".whole.errors"
	summary, want := run(t, whole)
	wantErrors := read(t, whole.Errors)
	if summary.Failed != 1 || strings.Count(wantErrors, "\n") != 1 {
		t.Fatalf("%+v\n%s", summary, wantErrors)
	}
	for _, name := range []string{whole.Output, whole.Errors, whole.Output + JournalSuffix} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	begun := map[string]string{}
	if resumed {
		ctx, stop := context.WithCancel(t.Context())
		first := c
		first.Progress = func(p Progress) {
			if p.Done == each {
				stop()
			}
		}
		if _, err := Run(ctx, first); !errors.Is(err, ErrStopped) {
			t.Fatal(err)
		}
		for _, name := range []string{c.Output, c.Errors, c.Output + JournalSuffix} {
			begun[name] = read(t, name)
		}
	}

	n := 0
	for ; ; n++ {
		for _, name := range []string{c.Output, c.Errors, c.Output + JournalSuffix} {
			os.Remove(name)
		}
		d := &faultyDisk{fault: f, at: n, names: map[string]*string{}, synced: map[string]*string{}}
		for name, text := range begun {
			write(t, name, text)
			d.names[name] = &text
			d.synced[name] = &text
		}
		asked = 0
		told := 0
		bad := c
		bad.files = d
		bad.Progress = func(p Progress) { told = max(told, p.Done) }
		_, err := Run(t.Context(), bad)
		if d.failed == "" {
			if err != nil {
				t.Fatal(err)
			}
			break // the run has fewer steps
		}
		where := fmt.Sprintf("step %d, %s of %s", n, d.failed, filepath.Base(d.path))
		// The file in question is the journal even if it is written, or was opened, under another
		// name first.
		if err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(filepath.Base(d.path), ".new")) || strings.Contains(err.Error(), ".new") {
			t.Errorf("%s: the error is %v", where, err)
		}
		left, e := os.ReadDir(dir)
		if e != nil {
			t.Fatal(e)
		}
		for _, entry := range left {
			if name := filepath.Join(dir, entry.Name()); f != power && strings.HasSuffix(name, ".new") {
				t.Errorf("%s: %s is left over", where, name)
			}
		}
		if f == power {
			d.cutPower(t, rand.New(rand.NewPCG(1, uint64(n))))
		}
		s, out := run(t, c)
		if order == CompletionOrder {
			out, want = sorted(out), sorted(want)
		}
		if out != want || read(t, c.Errors) != wantErrors {
			t.Fatalf("%s, then:\n%s\nwant\n%s", where, out, want)
		}
		if s.Succeeded != prefixes*each-1 || s.Failed != 1 || s.PromptTokens != summary.PromptTokens {
			t.Errorf("%s: %+v", where, s)
		}
		if f != power && (s.Resumed < told || asked > prefixes*each+1) {
			t.Errorf("%s: %d were told as done, then %d were; %d requests were asked %d times", where, told, s.Resumed, prefixes*each, asked)
		}
	}
	t.Logf("%d steps", n)
	if n < 20 {
		t.Errorf("only %d steps were taken", n)
	}
}
