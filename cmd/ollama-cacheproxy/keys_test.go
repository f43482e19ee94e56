package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestKeysFile: the keys are read again when the file has changed in any way, and at SIGHUP; an
// error is logged once, and leaves the previous keys.
func TestKeysFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.txt")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(path, text string) { must(os.WriteFile(path, []byte(text), 0o600)) }
	old := time.Now().Add(-time.Hour)
	rename := func(text string) {
		write(path+".new", text)
		must(os.Chtimes(path+".new", old, old))
		must(os.Rename(path+".new", path))
	}
	write(path, "one\n")
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		logger := slog.New(slog.NewTextHandler(&log, nil))
		signals := make(chan os.Signal, 1)
		k, err := readKeys(path)
		must(err)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		names := "?"
		k.replaced = func(n []string) { names = fmt.Sprint(n) }
		go func() { // ends with stop
			defer close(done)
			watchFiles(ctx, signals, logger, k)
		}()
		for _, step := range []struct {
			what   string
			change func()
			keys   int
			level  string // of the only line that is logged; "" if none is
		}{
			{"nothing", func() {}, 1, ""},
			{"another length", func() { write(path, "one\ntwo\n") }, 2, "INFO"},
			{"emptied", func() { write(path, "") }, 2, "ERROR"},
			{"still empty", func() {}, 2, ""},
			{"the marks of editors", func() { write(path, "\ufeffone\r\n\r\n  two\t\r\nthree ") }, 3, "INFO"},
			{"no text", func() { write(path, "\xff\xfeo\x00") }, 3, "ERROR"},
			{"removed", func() { must(os.Remove(path)) }, 3, "ERROR"},
			{"still away", func() {}, 3, ""},
			{"asked for while it is away", func() { signals <- syscall.SIGHUP }, 3, "ERROR"},
			{"there again", func() { rename("four\n") }, 1, "INFO"},
			{"replaced by one of the same length and time", func() { rename("a\nb\n\n") }, 2, "INFO"},
			{"a folder in its place", func() { must(os.Remove(path)); must(os.Mkdir(path, 0o700)) }, 2, "ERROR"},
			{"a link in its place", func() {
				must(os.Remove(path))
				write(path+".1", "1\n2\n3\n")
				must(os.Symlink(path+".1", path))
			}, 3, "INFO"},
			{"what the link leads to", func() { write(path+".1", "1\n2\n3\n4\n") }, 4, "INFO"},
			{"SIGHUP without a change", func() { signals <- syscall.SIGHUP }, 4, "INFO"},
			{"names and settings", func() { write(path+".1", "a 1 weight=2\nb 2 rate=1/s\n3") }, 3, "INFO"},
			{"a setting that there is not", func() { write(path+".1", "a 1\nb 2 weigth=2\n") }, 3, "line 2"},
		} {
			before := log.String()
			step.change()
			time.Sleep(filesEvery + 1)
			synctest.Wait()
			lines := strings.TrimPrefix(log.String(), before)
			want := 0
			if step.level != "" {
				want = 1
			}
			if k.keys.Len() != step.keys || strings.Count(lines, "\n") != want || !strings.Contains(lines, step.level) || want > 0 && !strings.Contains(lines, path) {
				t.Errorf("%s: %d keys, want %d and %q:\n%s", step.what, k.keys.Len(), step.keys, step.level, lines)
			}
		}
		stop()
		<-done
		if names != "[a b]" {
			t.Errorf("the names are told as %s", names)
		}
		if k.readable() {
			t.Error("what was read would be read over and over")
		}
		k.err = fs.ErrPermission // simulated, since the superuser may read everything
		if !k.readable() {
			t.Error("nobody looks whether the file may be read now")
		}
	})
}

// TestHangup: at SIGHUP the keys are read again. The signal never ends the proxy, and does nothing
// without keys.
func TestHangup(t *testing.T) {
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer up.Close()
	path := filepath.Join(t.TempDir(), "keys.txt")
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, flags := range [][]string{nil, {"--api-keys-file", path}} {
		if err := os.WriteFile(path, []byte("one\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		listen, err := freeAddr()
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		code := make(chan int, 1)
		log := &syncBuffer{}
		go func() { // ends with stop
			code <- run(ctx, append([]string{"--listen", listen, "--upstream", up.URL}, flags...), io.Discard, log)
		}()
		status := func(key string) int {
			req, err := http.NewRequest("GET", "http://"+listen+"/api/version", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+key)
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				return 0
			}
			res.Body.Close()
			return res.StatusCode
		}
		waitFor(t, func() bool { return status("one") == http.StatusOK })
		if err := os.WriteFile(path, []byte("two\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := self.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
		}
		if flags == nil {
			waitFor(t, func() bool { return strings.Contains(log.String(), "SIGHUP: there is no file of settings") })
		} else {
			waitFor(t, func() bool { return status("two") == http.StatusOK })
			waitFor(t, func() bool { return strings.Contains(log.String(), "API keys read again") })
			if got := status("one"); got != http.StatusUnauthorized {
				t.Errorf("the key that was taken out gets %d", got)
			}
		}
		stop()
		if c := <-code; c != 0 {
			t.Errorf("exit status %d\n%s", c, log)
		}
	}
}
