package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

const progressEvery = 10 * time.Second // without a terminal

// progress shows how far a run is: as a bar on a terminal, otherwise as a line in the log every ten
// seconds.
type progress struct {
	log *slog.Logger

	mu     sync.Mutex               // guards the fields below, and writing to the terminal
	bar    *progressbar.ProgressBar // nil: no terminal
	logged time.Duration
	stderr io.Writer
}

func newProgress(stderr io.Writer, format string, level slog.Level) *progress {
	p := &progress{stderr: stderr}
	f, isFile := stderr.(*os.File)
	if !isFile || !term.IsTerminal(int(f.Fd())) || format == "json" {
		p.log = newLogger(stderr, format, level)
		return p
	}
	p.bar = progressbar.NewOptions(-1,
		progressbar.OptionSetWriter(stderr), progressbar.OptionFullWidth(), progressbar.OptionShowCount(), progressbar.OptionShowIts(),
		progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionSetItsString("requests"))
	p.log = newLogger(p, "text", level)
	return p
}

// Write writes a line of the log in place of the bar, and draws the bar again below it.
func (p *progress) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bar.Clear() // a terminal that cannot be cleared shows both
	return p.stderr.Write(line)
}

// show shows how many requests are done. now adds further facts, as words and for the log.
func (p *progress) show(done, total int, elapsed time.Duration, now interface {
	Words() string
	Attrs() []any
}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		if p.bar.GetMax() != total {
			p.bar.ChangeMax(total)
		}
		p.bar.Describe(now.Words())
		p.bar.Set(done) // if drawing fails, the next call draws
		return
	}
	if elapsed-p.logged >= progressEvery {
		p.logged = elapsed
		p.log.Info("progress", now.Attrs()...)
	}
}

func (p *progress) finish() {
	if p.bar != nil {
		p.bar.Exit()
		fmt.Fprintln(p.stderr)
	}
}
