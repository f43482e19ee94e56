package realollama

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestErrorsQuoteWhatMatters is the failed link of an Ollama 0.24.0: one line of 30 KB, and the two
// that tell what is wrong after it.
func TestErrorsQuoteWhatMatters(t *testing.T) {
	var output strings.Builder
	for i := range 300 {
		fmt.Fprintf(&output, "mkdir -p $WORK/b%03d/\n", i)
	}
	output.WriteString("/usr/local/go/pkg/tool/linux_amd64/link: running g++ failed: exit status 1\n")
	for range 100 { // what other packages are at meanwhile
		output.WriteString("packagefile google.golang.org/protobuf/internal/errors=/cache/ab-d\n")
		output.WriteString("/usr/local/go/pkg/tool/linux_amd64/compile -o $WORK/b042/_pkg_.a -trimpath x -p errors\n")
	}
	output.WriteString("/usr/bin/g++ -m64 -o $WORK/b001/exe/a.out " + strings.Repeat("$WORK/b001/error.o ", 1600) + "\n")
	output.WriteString("/usr/bin/ld: ggml-cpu.o: undefined reference to `ggml_backend_amx_buffer_type()'\n\n")
	output.WriteString("collect2: error: ld returned 1 exit status\n")
	got := Quote(output.String())
	checkQuotation(t, "ours\n"+got)
	for _, want := range []string{"running g++ failed", "undefined reference to `ggml_backend_amx_buffer_type()'", "collect2: error"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not quoted:\n%s", want, got)
		}
	}
	if !strings.HasSuffix(got, "ld returned 1 exit status") {
		t.Errorf("the last line is not the last:\n%s", got)
	}

	// Faults far above the end are quoted, the noise between is not.
	got = Quote("file.c:3: error: no such type\n" + strings.Repeat("ninja: job\n", 50) + "ninja: build stopped: subcommand failed.\n")
	if !strings.HasPrefix(got, "file.c:3: error") || strings.Count(got, "\n") > quotedLines {
		t.Errorf("quoted is:\n%s", got)
	}
	if got := Quote(""); got != "" {
		t.Errorf("of nothing %q is quoted", got)
	}
	if got := Quote(strings.Repeat("ä", 300)); !strings.HasSuffix(got, "ä…") || len(got) > quotedWidth {
		t.Errorf("a long line became %q", got)
	}
}

func TestProgressTellsWhatIsLeft(t *testing.T) {
	for _, at := range []struct {
		p    progress
		want string
	}{
		{progress{25, 100, "files"}, "25 of 100 files, about 3m0s left"},
		{progress{1, 100, "files"}, "1 of 100 files"}, // too early to tell
		{progress{100, 100, "files"}, "100 of 100 files"},
		{progress{120, 100, "MB"}, "100 of 100 MB"},
		{progress{7, 0, "MB"}, "7 MB"},
	} {
		if got := at.p.after(time.Minute); got != at.want {
			t.Errorf("%+v is told as %q, want %q", at.p, got, at.want)
		}
	}
}

// TestLongStepsTellHowFarTheyAre makes an entry that takes a while, on a clock of the test's own.
func TestLongStepsTellHowFarTheyAre(t *testing.T) {
	c, told := openTestCache(t)
	synctest.Test(t, func(t *testing.T) {
		r := recipe{name: "thing", announce: "making a thing", make: func(_ context.Context, b *build) error {
			time.Sleep(heartbeat + time.Second)
			b.follow(bytesUnder(4, b.Work))
			if err := os.WriteFile(filepath.Join(b.Work, "part"), make([]byte, 2e6), 0o644); err != nil {
				return err
			}
			time.Sleep(heartbeat)
			b.forget()
			b.line([]byte("reading lists"))
			b.line([]byte("unpacking curl"))
			time.Sleep(heartbeat)
			return nil
		}}
		if _, err := c.ensure(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	})
	for _, want := range []string{
		"making a thing …",
		"… thing: at work (10s so far)",
		"… thing: 2 of 4 MB, about 10s left (20s so far)",
		`… thing: 2 lines of output, the last is "unpacking curl" (30s so far)`,
		"thing is ready after 31s",
	} {
		if !strings.Contains(told.String(), want) {
			t.Errorf("%q is not told:\n%s", want, told.String())
		}
	}
}

func TestLineWatcherSeesWholeLines(t *testing.T) {
	var seen []string
	w := &lineWatcher{look: func(line []byte) { seen = append(seen, string(line)) }}
	for _, part := range []string{"[1/3] a\n[2", "/3] b", "\n", "\n[3/3]"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("writing gave %d, %v", n, err)
		}
	}
	if got := strings.Join(seen, "|"); got != "[1/3] a|[2/3] b|" {
		t.Errorf("seen were %q", got)
	}
}

// TestCompileLinesAreCounted has lines of go build -x.
func TestCompileLinesAreCounted(t *testing.T) {
	for line, want := range map[string]bool{
		`/usr/local/go/pkg/tool/linux_amd64/compile -o $WORK/b042/_pkg_.a -trimpath "…" -p errors`:                                  true,
		`TERM='dumb' gcc -I . -fPIC -m64 -pthread -I $WORK/b001/ -O2 -g -frandom-seed=x -o $WORK/b001/_x002.o -c sqlite3-binding.c`: true,
		`TERM='dumb' g++ -I ./ -fPIC -mavx2 -O3 -o $WORK/b099/_x030.o -c llama-model.cpp`:                                           true,
		`cd /home/x/ggml-cpu`:  false,
		`mkdir -p $WORK/b042/`: false,
		`TERM='dumb' gcc -I ./ -fPIC -pthread -Wl,--build-id=none -o $WORK/b001/_cgo_.o`:                  false,
		`TERM='dumb' gcc -I $WORK/b01/ -m64 -O2 -g -frandom-seed=x -o $WORK/b01/_x001.o -c _cgo_export.c`: false, // cgo's own
		`TERM='dumb' gcc -I ./ -m64 -O2 -g -o $WORK/b01/_x001.o -c $WORK/b01/_cgo_export.c`:               false,
	} {
		if got := compileLine.MatchString(line); got != want {
			t.Errorf("%s counts: %v, want %v", line, got, want)
		}
	}
}

func TestStepsAreCounted(t *testing.T) {
	const list = "go: downloading github.com/foo/bar v1.2.3\nstale 0 0\nstale 2 31\n\ngo: downloading x v1\n"
	if got := countSteps(list); got != 35 {
		t.Errorf("%d steps, want 35", got)
	}
}
