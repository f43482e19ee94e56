package answers_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers/storetest"
)

// opened is a Disk that is closed once, by a test or at its end.
type opened struct {
	*answers.Disk
	dir   string
	close func() error
}

func (o opened) Close() error { return o.close() }

func openDisk(t testing.TB, dir string, limits answers.Limits, log *slog.Logger) opened {
	t.Helper()
	d, err := answers.OpenDisk(dir, limits, log)
	if err != nil {
		t.Fatal(err)
	}
	o := opened{d, dir, sync.OnceValue(d.Close)}
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
	return o
}

func TestDisk(t *testing.T) {
	storetest.Run(t, storetest.Backend{
		New: func(t testing.TB, limits answers.Limits) answers.Store {
			return openDisk(t, t.TempDir(), limits, nil)
		},
		Reopen: func(t testing.TB, s answers.Store, limits answers.Limits) answers.Store {
			o := s.(opened)
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			return openDisk(t, o.dir, limits, nil)
		},
		Settle: func(t testing.TB, s answers.Store) {
			if err := s.(opened).Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
		},
		Room: 2 << 20,
	})
}

// lines collects what is logged.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.FieldsFunc(l.buf.String(), func(r rune) bool { return r == '\n' })
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func putNumbers(t testing.TB, s answers.Store, from, to, length int) {
	t.Helper()
	for n := from; n < to; n++ {
		if err := s.Put(context.Background(), []answers.Entry{storetest.EntryOf(n, 1, length)}); err != nil {
			t.Fatal(err)
		}
	}
}

func flush(t testing.TB, s opened) {
	t.Helper()
	if err := s.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// present returns how many of the entries are there, and fails t if one is not as it was put.
func present(t testing.TB, s answers.Store, from, to int) (n int) {
	t.Helper()
	for keys := range slices.Chunk(numbers(from, to), 200) {
		var wanted []answers.Key
		for _, n := range keys {
			wanted = append(wanted, storetest.KeyOf(n))
		}
		found, err := s.Get(context.Background(), wanted)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range found {
			if e.Kind == 0 {
				continue
			}
			n++
			if err := storetest.Check(e, keys[i]); err != nil {
				t.Error(err)
			}
		}
	}
	return n
}

// numbers returns the numbers of a range.
func numbers(from, to int) (all []int) {
	for n := from; n < to; n++ {
		all = append(all, n)
	}
	return all
}

func TestDiskModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "answers")
	s := openDisk(t, dir, answers.Limits{Bytes: 1 << 24}, nil)
	putNumbers(t, s, 0, 10, 1000)
	flush(t, s)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder: %v, %v", info.Mode(), err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) < 2 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
		}
	}
}

func TestDiskInUse(t *testing.T) {
	dir := t.TempDir()
	s := openDisk(t, dir, answers.Limits{Bytes: 1 << 24}, nil)
	for range 2 {
		_, err := answers.OpenDisk(dir, answers.Limits{Bytes: 1 << 24}, nil)
		if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "stop it") {
			t.Errorf("a second one: %v", err)
		}
	}
	putNumbers(t, s, 0, 10, 100)
	flush(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := present(t, openDisk(t, dir, answers.Limits{Bytes: 1 << 24}, nil), 0, 10); n != 10 {
		t.Errorf("%d entries are there", n)
	}
}

// TestDiskShrinks: the files become smaller with what is in them.
func TestDiskShrinks(t *testing.T) {
	s := openDisk(t, t.TempDir(), answers.Limits{Bytes: 64 << 20}, nil)
	for from := 0; from < 5000; from += 500 {
		putNumbers(t, s, from, from+500, 4096)
		flush(t, s)
	}
	full := s.Stats().Bytes
	if full < 5000*4096 || full > 5000*4096*3/2 {
		t.Errorf("%d bytes for %d", full, 5000*4096)
	}
	var keys []answers.Key
	for n := range 4500 {
		keys = append(keys, storetest.KeyOf(n))
	}
	if err := s.Delete(context.Background(), keys); err != nil {
		t.Fatal(err)
	}
	flush(t, s)
	if now := s.Stats().Bytes; now > full/4 {
		t.Errorf("%d bytes, and %d after 9 of 10 entries were removed", full, now)
	}
	if n := present(t, s, 0, 5000); n != 500 {
		t.Errorf("%d entries are there", n)
	}
	if err := s.Wipe(context.Background()); err != nil {
		t.Fatal(err)
	}
	if now := s.Stats().Bytes; now > 500_000 {
		t.Errorf("%d bytes after Wipe", now)
	}
}

func TestDiskOldIsRemoved(t *testing.T) {
	dir := t.TempDir()
	s := openDisk(t, dir, answers.Limits{Bytes: 1 << 24}, nil)
	putNumbers(t, s, 0, 10, 100)
	old := storetest.EntryOf(10, 1, 100)
	old.Made = old.Made.Add(-48 * time.Hour)
	if err := s.Put(context.Background(), []answers.Entry{old}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = openDisk(t, dir, answers.Limits{Bytes: 1 << 24, Age: 24 * time.Hour}, nil)
	flush(t, s)
	if st := s.Stats(); st.Entries != 10 || st.Expired != 1 {
		t.Errorf("Stats are %+v", st)
	}
}

// TestDiskBroken: a file that is torn, or something else, is set aside with one line, and a new one
// begun; whatever is found afterwards is as it was put.
func TestDiskBroken(t *testing.T) {
	// A write that finds the file broken begins a new one, and is followed by others at once.
	answers.SetDiskFirstWait(0)
	t.Cleanup(func() { answers.SetDiskFirstWait(time.Second) })
	limits := answers.Limits{Bytes: 1 << 26}
	for _, test := range []struct {
		name  string
		spoil func(data []byte) []byte
		aside bool // at once, when it is opened
	}{
		{"text", func([]byte) []byte { return []byte(strings.Repeat("Dear diary, ", 1000)) }, true},
		{"another program's database", func(d []byte) []byte { copy(d[68:72], "Mine"); return d }, true},
		{"another version", func(d []byte) []byte { d[63] = 99; return d }, true},
		{"no first page", func(d []byte) []byte { clear(d[100:8192]); return d }, true},
		{"empty", func([]byte) []byte { return nil }, false},
		{"half", func(d []byte) []byte { return d[:len(d)/2] }, false},
		{"zeros inside", func(d []byte) []byte { clear(d[len(d)/4 : len(d)/2]); return d }, false},
		{"noise inside", func(d []byte) []byte {
			for i := len(d) / 3; i < len(d)/2; i += 97 {
				d[i] ^= 0x55
			}
			return d
		}, false},
		{"noise in the tables' roots", func(d []byte) []byte {
			for i := 8192 * 2; i < 8192*12; i += 11 {
				d[i] ^= 0x33
			}
			return d
		}, false},
		{"one byte of data", func(d []byte) []byte { d[len(d)-3000] ^= 1; return d }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "answers.db")
			s := openDisk(t, dir, limits, nil)
			putNumbers(t, s, 0, 500, 3000)
			s.Close()
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, test.spoil(data), 0o600); err != nil {
				t.Fatal(err)
			}
			var log lines
			s = openDisk(t, dir, limits, log.logger())
			if _, err := os.Stat(path + ".broken"); test.aside && err != nil {
				t.Error(err)
			}
			// An error is a miss; what is returned is checked.
			for n := range 500 {
				found, err := s.Get(context.Background(), []answers.Key{storetest.KeyOf(n)})
				if err == nil && found[0].Kind != 0 {
					if err := storetest.Check(found[0], n); err != nil {
						t.Error(err)
					}
				}
			}
			// The first write may be the one that finds it.
			putNumbers(t, s, 1000, 1200, 3000)
			s.Flush(context.Background())
			for from := 2000; from < 2300; from += 100 {
				putNumbers(t, s, from, from+100, 3000)
				flush(t, s)
			}
			if n := present(t, s, 2000, 2300); n != 300 {
				t.Errorf("%d entries are there afterwards", n)
			}
			told := 0
			for _, line := range log.all() {
				if strings.Contains(line, "set aside") {
					told++
				}
			}
			_, err = os.Stat(path + ".broken")
			if told > 1 || (told == 1) != (err == nil) {
				t.Errorf("%d lines, set aside: %v:\n%s", told, err, strings.Join(log.all(), "\n"))
			}
		})
	}
}

// writeForEver is the environment variable that has the test program write to a folder until it is
// killed.
const writeForEver = "ANSWERS_WRITE_FOR_EVER"

// writeUntilKilled prints a number when all entries below are written.
func writeUntilKilled(dir string) {
	d, err := answers.OpenDisk(dir, answers.Limits{Bytes: 1 << 28}, nil)
	if err != nil {
		panic(err)
	}
	for n := 0; ; {
		for range 50 {
			if err := d.Put(context.Background(), []answers.Entry{storetest.EntryOf(n, n%256, 100+n%7000)}); err != nil {
				panic(err)
			}
			n++
		}
		if err := d.Flush(context.Background()); err != nil {
			panic(err)
		}
		fmt.Println(n)
	}
}

// TestDiskKilled: what Flush has reported is there after the process is killed, and everything that
// is there is whole.
func TestDiskKilled(t *testing.T) {
	dir := t.TempDir()
	for kills := range 12 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writeForEver+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		written := 0
		read := bufio.NewScanner(out)
		for n := 0; n < 2+kills && read.Scan(); n++ {
			fmt.Sscan(read.Text(), &written)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for read.Scan() {
			if strings.HasSuffix(read.Text(), "0") {
				fmt.Sscan(read.Text(), &written)
			}
		}
		cmd.Wait()
		var log lines
		d, err := answers.OpenDisk(dir, answers.Limits{Bytes: 1 << 28}, log.logger())
		if err != nil {
			t.Fatal(err)
		}
		if n := present(t, d, 0, written); n != written || written == 0 {
			t.Errorf("kill %d: %d of %d entries are there", kills, n, written)
		}
		present(t, d, written, written+500) // is whole, if there
		if err := d.Close(); err != nil || len(log.all()) > 0 {
			t.Errorf("%v, %v", err, log.all())
		}
	}
}

func BenchmarkDisk(b *testing.B) {
	for _, length := range []int{1536, 3072, 4096, 25_000} {
		s := openDisk(b, b.TempDir(), answers.Limits{Bytes: 4 << 30}, nil)
		held := min(50_000, 200_000_000/length)
		start := time.Now()
		for n := 0; n < held; n += 100 {
			putNumbers(b, s, n, n+100, length)
			flush(b, s)
		}
		b.Logf("%d bytes: %.0f µs per entry written, %.2f bytes on disk per byte", length,
			time.Since(start).Seconds()*1e6/float64(held), float64(s.Stats().Bytes)/float64(held)/float64(length))
		for _, n := range []int{1, 1000} {
			b.Run(fmt.Sprintf("get/keys=%d/bytes=%d", n, length), func(b *testing.B) {
				keys := make([]answers.Key, n)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					for j := range keys {
						keys[j] = storetest.KeyOf((i*n + j) * 7919 % held)
					}
					found, err := s.Get(context.Background(), keys)
					if err != nil || found[0].Kind == 0 {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
