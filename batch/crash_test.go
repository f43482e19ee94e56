package batch

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// shortLease is the lease of workers in tests that wait for its end.
const shortLease = 300 * time.Millisecond

// longerLease is that of workers in tests that count what is sent again: longer than a busy machine
// keeps a worker from renewing it.
const longerLease = 3 * time.Second

// TestMain also runs the program that the crash tests kill, if an argument says so.
func TestMain(m *testing.M) {
	if os.Getenv("BATCH_CHILD") == "" {
		os.Exit(m.Run())
	}
	if err := child(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// child runs a batch: server, input, output, order, and optionally the Valkey server through which
// it is shared.
func child(args []string) error {
	u, err := url.Parse(args[0])
	if err != nil {
		return err
	}
	s, err := OpenLines(args[1], nil, UTF8)
	if err != nil {
		return err
	}
	var workers *Workers
	if len(args) > 4 {
		workers = &Workers{URL: args[4], Bytes: 1 << 20, lease: longerLease}
	}
	_, err = Run(context.Background(), Config{
		Workers: workers, WaitForServer: time.Minute,
		Source: s, Output: args[2], Errors: args[2] + ".errors", Order: Order(args[3]), Window: 40, Concurrency: 6, Server: u,
		Transport: &http.Transport{MaxIdleConnsPerHost: 8}, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), compactAt: 2000,
	})
	return err
}

// TestKill: a batch that is killed repeatedly, at any moment, ends with the same output as an
// uninterrupted one.
func TestKill(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var kill atomic.Pointer[func()]
	f := &fake{ask: func(w http.ResponseWriter, r *http.Request, user string) bool {
		if k := kill.Load(); k != nil {
			(*k)()
		}
		if strings.HasSuffix(user, "3") {
			w.WriteHeader(400)
			io.WriteString(w, `{"error":"not this one"}`)
			return true
		}
		return false
	}}
	server := serve(t, f)
	const n = 250
	dir := t.TempDir()
	in := filepath.Join(dir, "in.jsonl")
	write(t, in, numbered(n)+"nonsense\n")
	for _, order := range []Order{InputOrder, CompletionOrder} {
		command := func(out string) *exec.Cmd {
			cmd := exec.Command(exe, server, in, filepath.Join(dir, out+string(order)), string(order))
			cmd.Env = append(os.Environ(), "BATCH_CHILD=1")
			return cmd
		}
		kill.Store(nil)
		if text, err := command("whole").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		rnd := rand.New(rand.NewPCG(1, uint64(len(order))))
		killed := 0
		for range 8 {
			cmd := command("killed")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			left := new(atomic.Int64)
			left.Store(1 + rnd.Int64N(60))
			k := func() {
				if left.Add(-1) == 0 {
					cmd.Process.Kill() // at any point; it fails if the process has ended
				}
			}
			kill.Store(&k)
			// Ended by the signal; otherwise it was complete.
			if cmd.Wait(); cmd.ProcessState.ExitCode() == -1 {
				killed++
			}
		}
		if killed < 4 {
			t.Errorf("it was killed %d times only", killed)
		}
		kill.Store(nil)
		if text, err := command("killed").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		for _, file := range []string{string(order), string(order) + ".errors"} {
			whole, killed := read(t, filepath.Join(dir, "whole"+file)), read(t, filepath.Join(dir, "killed"+file))
			if order == CompletionOrder {
				whole, killed = sorted(whole), sorted(killed)
			}
			if whole != killed {
				t.Errorf("%s: %d bytes after being killed, %d otherwise", file, len(killed), len(whole))
			}
		}
		if got := strings.Count(read(t, filepath.Join(dir, "killed"+string(order))), "\n"); got != n+1 {
			t.Errorf("%d results, want %d", got, n+1)
		}
	}
}

func sorted(text string) string {
	lines := strings.SplitAfter(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// TestTorn: whichever part of the journal's last lines, and of the output, reached the disk, the
// batch ends with the same result.
func TestTorn(t *testing.T) {
	for _, order := range []Order{InputOrder, CompletionOrder} {
		var came atomic.Int64
		var hold atomic.Bool
		f := &fake{ask: func(w http.ResponseWriter, r *http.Request, user string) bool {
			if hold.Load() && came.Add(1) > 4 { // otherwise all may be answered when it is told to stop
				<-r.Context().Done()
				return true
			}
			if user != "item 2" {
				return false
			}
			w.WriteHeader(400)
			return true
		}}
		server := serve(t, f)
		c := config(t, server, numbered(6))
		c.Order, c.Errors, c.Concurrency = order, c.Output+".errors", 3
		ctx, stop := context.WithCancel(t.Context())
		c.Progress = func(p Progress) {
			if p.Done == 4 {
				stop()
			}
		}
		hold.Store(true)
		if _, err := Run(ctx, c); err == nil {
			t.Fatal("it came to its end")
		}
		hold.Store(false)
		c.Progress = nil
		journal, out, errs := read(t, c.Output+JournalSuffix), read(t, c.Output), read(t, c.Errors)
		whole := c
		whole.Output, whole.Errors = c.Output+".whole", c.Output+".whole.errors"
		_, want := run(t, whole)
		wantErrs := read(t, whole.Errors)
		head := strings.IndexByte(journal, '\n') + 1
		step := max(1, (len(journal)-head)/60) // about sixty places, which must not all be alike
		for n := head; n <= len(journal); n += step {
			write(t, c.Output+JournalSuffix, journal[:n])
			write(t, c.Output, out[:len(out)*(n%7)/6%(len(out)+1)])
			write(t, c.Errors, errs[:min(len(errs), n%50)])
			_, got := run(t, c)
			if order == CompletionOrder {
				got, want = sorted(got), sorted(want)
			}
			if got != want || read(t, c.Errors) != wantErrs {
				t.Fatalf("%s, journal cut at %d of %d:\n%s\nwant\n%s", order, n, len(journal), got, want)
			}
		}
	}
}
