package realollama

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"time"
)

// heartbeat is how often a long step reports its progress.
const heartbeat = 10 * time.Second

// progress is how far a step is, in its own units.
type progress struct {
	done, total int64
	unit        string
}

// after returns the progress in words, with an estimate of the time left at the pace so far, for a
// step that has run for elapsed.
func (p progress) after(elapsed time.Duration) string {
	s := fmt.Sprintf("%d %s", p.done, p.unit)
	if p.total <= 0 {
		return s
	}
	s = fmt.Sprintf("%d of %d %s", min(p.done, p.total), p.total, p.unit)
	// At the very beginning the pace is not known.
	if p.done*20 > p.total && p.done < p.total {
		left := time.Duration(float64(elapsed) * float64(p.total-p.done) / float64(p.done))
		s += ", about " + left.Round(5*time.Second).String() + " left"
	}
	return s
}

// tracker has the current progress of a build, for the goroutine that reports it.
type tracker struct {
	step  atomic.Pointer[step]
	lines atomic.Int64           // of all programs' output so far
	last  atomic.Pointer[string] // the last of them
}

// step is a part of a build with a known progress.
type step struct {
	look  func() progress
	begin time.Time
}

// follow uses look as the source of the progress until it is replaced.
func (t *tracker) follow(look func() progress) { t.step.Store(&step{look, time.Now()}) }

// forget ends the current step: nothing is known of the next one.
func (t *tracker) forget() { t.step.Store(nil) }

// line notes a line of a program's output.
func (t *tracker) line(text []byte) {
	t.lines.Add(1)
	last := shorten(strings.TrimSpace(string(text)), 100)
	t.last.Store(&last)
}

// String returns the progress of the build: from the current step's figures, or else from the
// output.
func (t *tracker) String() string {
	if s := t.step.Load(); s != nil {
		if p := s.look(); p.total <= 0 || p.done < p.total {
			return p.after(time.Since(s.begin))
		}
		// Everything is counted, but something follows, such as the linker.
	}
	if last := t.last.Load(); last != nil {
		return fmt.Sprintf("%d lines of output, the last is %q", t.lines.Load(), *last)
	}
	return "at work"
}

// bytesUnder counts the bytes in folders that will grow to about that many MB, as the progress of a
// download or an installation.
func bytesUnder(megabytes int64, dirs ...string) func() progress {
	return func() progress {
		var n int64
		for _, dir := range dirs {
			// Files come and go meanwhile.
			_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return nil
				}
				if info, err := d.Info(); err == nil {
					n += info.Size()
				}
				return nil
			})
		}
		return progress{n / 1e6, megabytes, "MB"}
	}
}

// EachLine calls f with each line of a program's output, without its newline, until the output
// ends. A line may be of any length: where reading ended early, the program would wait for ever to
// write.
func EachLine(output io.Reader, f func(line string)) {
	for lines := bufio.NewReader(output); ; {
		line, err := lines.ReadString('\n')
		if line != "" {
			f(strings.TrimSuffix(line, "\n"))
		}
		if err != nil {
			return
		}
	}
}

// lineWatcher gets a program's output, and passes on each complete line.
type lineWatcher struct {
	look func(line []byte)
	rest []byte // the beginning of the next line
}

func (w *lineWatcher) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		line, rest, found := bytes.Cut(w.rest, []byte("\n"))
		if !found {
			return len(p), nil
		}
		w.look(line)
		w.rest = rest
	}
}

// heartbeat reports every few seconds how far the making of name is, until stop is called.
func (c *Cache) heartbeat(name string, start time.Time, t *tracker) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	// It ends when stop closes done.
	go func() {
		defer close(ended)
		tick := time.NewTicker(heartbeat)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				c.say("… %s: %s (%s so far)", name, t, time.Since(start).Round(time.Second))
			}
		}
	}()
	return func() { close(done); <-ended }
}

const (
	quotedLines = 20  // of a program's output in an error
	quotedWidth = 200 // bytes of each line
)

// faultLine matches lines that name a fault, as compilers, linkers, pip, npm and Ollama write them.
var faultLine = regexp.MustCompile(`(?i)\b(errors?|fatal|undefined|panic|failed|cannot|can't|unable|denied|killed|no space|no such|not found|illegal|signal|SIG[A-Z]{3,4})\b`)

// commandLine matches the commands that go build -x prints, among which are names such as
// internal/errors.
var commandLine = regexp.MustCompile(`^(?:packagefile |modinfo |cd |mkdir |cat |cp |mv |rm |echo |touch |true |printf |WORK=|TERM=|CGO_|GOROOT=|EOF$|# internal$|\S*/pkg/tool/\S+/\w+ |\S*/(?:gcc|g\+\+|cc|c\+\+|clang|clang\+\+) -)`)

// Quote returns the part of a program's output that an error quotes: the last lines that name a
// fault and the last lines of all, at most 20, each cut to 200 bytes.
func Quote(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n\t ")
		if line != "" && !commandLine.MatchString(line) {
			lines = append(lines, line)
		}
	}
	const ends = 5 // of the last lines, whatever they contain
	keep := map[int]bool{}
	for i := len(lines) - 1; i >= 0 && len(keep) < quotedLines; i-- {
		if i >= len(lines)-ends || faultLine.MatchString(lines[i]) {
			keep[i] = true
		}
	}
	var quoted []string
	for i, line := range lines {
		if keep[i] {
			quoted = append(quoted, shorten(line, quotedWidth))
		}
	}
	return strings.Join(quoted, "\n")
}

// shorten cuts a line to that many bytes.
func shorten(line string, width int) string {
	if len(line) <= width {
		return line
	}
	return strings.ToValidUTF8(line[:width-len("…")], "") + "…"
}

// lastLines returns the last n lines of a text.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
