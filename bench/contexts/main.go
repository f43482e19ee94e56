// Command contexts measures, on real Ollama servers, what stored contexts save. It sends the same
// requests directly and through the proxy, and compares the evaluated tokens and loaded models in
// the server's own log, and the times. It prints the table of docs/contexts.md, row by row, each
// with its target and whether it was reached; the exit status is 1 if one was missed.
//
//	go run ./bench/contexts
//	go run ./bench/contexts -era 0.33.0 -only rubric
//	go run ./bench/contexts -quick
//
// If a target refers to the least possible, that is measured, too: the same requests on a separate
// server, one after the other, in the order of their models and prefixes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

func main() {
	var b bench
	flag.StringVar(&b.era, "era", realollama.EraC,
		"version of Ollama: "+realollama.EraB+" or "+realollama.EraC)
	flag.BoolVar(&b.quick, "quick", false, "about a quarter of the requests")
	only := flag.String("only", "", "only rows whose name contains this")
	contexts := flag.Bool("contexts", true, "false: through the proxy without stored contexts")
	flag.StringVar(&b.flags, "flags", "", "more flags of the proxy, separated by spaces")
	verbose := flag.Bool("v", false, "print what each request came to")
	flag.Parse()
	b.way = linked.Contexts
	if !*contexts {
		b.way = linked.Without
	}
	if *verbose {
		b.verbose = os.Stderr
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx, *only, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "contexts:", err)
		os.Exit(1)
	}
}

// bench has what all measurements share.
type bench struct {
	era     string
	quick   bool
	way     linked.Way // of the side with a proxy
	flags   string     // additional ones, for the proxy
	binary  string     // the proxy's
	verbose io.Writer  // nil: single requests are not printed
}

var errMissed = errors.New("not all rows reach what they must")

func (b *bench) run(ctx context.Context, only string, out io.Writer) error {
	b.era = realollama.Version(b.era)
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-contexts-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b.binary = filepath.Join(dir, "ollama-cacheproxy")
	if err := proxyprocess.Build(ctx, b.binary); err != nil {
		return err
	}
	fmt.Fprintf(out, "ollama %s, directly and through the proxy (%s):\n\n", b.era, b.way)
	fmt.Fprintln(out, row{"workload", "requests", "direct", "proxy", "must reach", "reached"})
	fmt.Fprintln(out, strings.Repeat("|---", columns)+"|")
	begin := time.Now()
	var failed []error
	missed := false
	for _, e := range b.experiments() {
		if !strings.Contains(e.name, only) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s …\n", e.name)
		rows, err := e.run(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		} else if err != nil { // the other rows are useful without it
			failed = append(failed, fmt.Errorf("%s: %w", e.name, err))
		}
		for _, r := range rows {
			fmt.Fprintln(out, r)
			missed = missed || r[columns-1] == no
		}
	}
	fmt.Fprintf(out, "\n%v in all.\n", time.Since(begin).Round(time.Second))
	if missed {
		failed = append(failed, errMissed)
	}
	return errors.Join(failed...)
}

// experiment makes some rows of the table.
type experiment struct {
	name string
	run  func(ctx context.Context) ([]row, error)
}

const columns = 6

// row is a row of the table, cell by cell.
type row [columns]string

func (r row) String() string { return "| " + strings.Join(r[:], " | ") + " |" }

// note returns a row with a figure for each side and no target.
func note(label, direct, proxied string) row {
	return row{"… " + label, "", direct, proxied, "", ""}
}

const (
	yes = "yes"
	no  = "**no**"
)

// target returns a row with a target.
func target(label, direct, proxied, must string, reached bool) row {
	r := note(label, direct, proxied)
	r[4], r[5] = must, no
	if reached {
		r[5] = yes
	}
	return r
}
