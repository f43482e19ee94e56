//go:build unix

package answers_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers/storetest"
)

// fillDisk is the environment variable that has the test program fill a folder, in which no file may
// be longer than fullAt.
const fillDisk = "ANSWERS_FILL_DISK"

const fullAt = 3 << 20

// TestDiskFull has a disk with no more room: the limit is that of a process, so a process of its own
// has it.
func TestDiskFull(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fillDisk+"="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasSuffix(string(out), "as it should be\n") {
		t.Errorf("%v:\n%s", err, out)
	}
}

func limitFiles(bytes uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	limit.Cur = min(bytes, limit.Max)
	return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit)
}

func fillUntilFull(dir string) {
	if err := fillAndRecover(dir); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("as it should be")
}

func fillAndRecover(dir string) error {
	signal.Ignore(syscall.SIGXFSZ)
	answers.SetDiskFirstWait(time.Millisecond)
	ctx := context.Background()
	var log lines
	d, err := answers.OpenDisk(dir, answers.Limits{Bytes: 1 << 28}, log.logger())
	if err != nil {
		return err
	}
	if err := limitFiles(fullAt); err != nil {
		return err
	}
	n := 0
	for ; ; n++ {
		if n == 10_000 {
			return errors.New("it is never full")
		}
		if err := d.Put(ctx, []answers.Entry{storetest.EntryOf(n, 1, 4000)}); err != nil {
			return err
		}
		if d.Flush(ctx) != nil {
			break
		}
	}
	// Everything is readable, and nothing waits for the disk.
	for i := range n {
		found, err := d.Get(ctx, []answers.Key{storetest.KeyOf(i)})
		if err != nil {
			return err
		}
		if err := storetest.Check(found[0], i); err != nil {
			return err
		}
	}
	for i := range 200 {
		d.Put(ctx, []answers.Entry{storetest.EntryOf(n+i, 1, 4000)})
	}
	d.Flush(ctx)
	if st := d.Stats(); !st.Down || st.Errors == 0 || len(log.all()) != 1 {
		return fmt.Errorf("full: %+v, %q", st, log.all())
	}
	// A deletion is not lost.
	if err := d.Delete(ctx, []answers.Key{storetest.KeyOf(0)}); err != nil {
		return err
	}
	d.Flush(ctx)
	if found, err := d.Get(ctx, []answers.Key{storetest.KeyOf(0)}); err != nil || found[0].Kind != 0 {
		return fmt.Errorf("deleted, but there: %v", err)
	}
	if err := limitFiles(1 << 40); err != nil {
		return err
	}
	for d.Stats().Down {
		d.Flush(ctx)
	}
	for i := range 200 {
		if err := d.Put(ctx, []answers.Entry{storetest.EntryOf(50_000+i, 1, 4000)}); err != nil {
			return err
		}
	}
	if err := d.Flush(ctx); err != nil {
		return err
	}
	if all := log.all(); len(all) != 2 || !strings.Contains(all[1], "again") {
		return fmt.Errorf("logged: %q", all)
	}
	if err := d.Close(); err != nil {
		return err
	}
	d, err = answers.OpenDisk(dir, answers.Limits{Bytes: 1 << 28}, log.logger())
	if err != nil {
		return err
	}
	for _, i := range []int{1, n - 1, 50_000, 50_199} {
		found, err := d.Get(ctx, []answers.Key{storetest.KeyOf(i)})
		if err != nil {
			return err
		}
		if err := storetest.Check(found[0], i); err != nil {
			return err
		}
	}
	if found, err := d.Get(ctx, []answers.Key{storetest.KeyOf(0)}); err != nil || found[0].Kind != 0 {
		return fmt.Errorf("deleted, but there after opening: %v", err)
	}
	return d.Close()
}

func init() { children[fillDisk] = fillUntilFull }
