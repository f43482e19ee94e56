// Command lanes measures, on real Ollama servers, what scheduling saves. It sends the same requests
// directly and through the proxy, and compares the evaluated tokens and loaded models in the
// server's own log, and the total time. It prints the table of docs/lanes.md, row by row.
//
//	go run ./bench/lanes
//	go run ./bench/lanes -era 0.24.0 -only scripts
//
// The proxy is measured twice: with the number of slots given, and while it learns it.
//
// The least possible is measured, too: the same requests one after the other, in the order of their
// prefixes, on a separate server.
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
	"slices"
	"strings"
	"syscall"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/play"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

func main() {
	era := flag.String("era", realollama.EraC, "version of Ollama: "+strings.Join(realollama.Versions(), ", "))
	only := flag.String("only", "", "only workloads whose name contains this")
	model := flag.String("model", "gen-llama-tiny", "the model; gen-llama-costly takes about a millisecond for each token")
	bare := flag.String("bare", "", "internal: be a bare reverse proxy for this server")
	flag.Parse()
	if *bare != "" {
		if err := beBare(*bare); err != nil {
			fmt.Fprintln(os.Stderr, "lanes:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *era, *only, *model, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "lanes:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, era, only, model string, out io.Writer) error {
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-lanes-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{Bench: play.Bench{Era: era, Model: model}, binary: filepath.Join(dir, "ollama-cacheproxy")}
	if err := proxyprocess.Build(ctx, b.binary); err != nil {
		return err
	}
	fmt.Fprintf(out, "ollama %s, %s:\n\n", era, model)
	fmt.Fprintln(out, row{"workload", "requests", "least possible", "direct", "slots given", "auto", "loads: direct, given, auto", "seconds: direct, given, auto", "answers equal"})
	fmt.Fprintln(out, strings.Repeat("|---", columns)+"|")
	var failed []error
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
		}
	}
	return errors.Join(failed...)
}

// experiment makes some rows of the table.
type experiment struct {
	name string
	run  func(ctx context.Context) ([]row, error)
}

const columns = 9

// row is a row of the table, cell by cell.
type row [columns]string

func (r row) String() string { return "| " + strings.Join(r[:], " | ") + " |" }

// note returns a row with one figure for each way.
func note(label string, figures [ways]string) row {
	return row{"… " + label, "", "", figures[direct], figures[given], figures[auto], "", "", ""}
}

// compared has the results of all ways, and the least possible.
type compared struct {
	w     play.Workload
	least play.Result
	by    [ways]play.Result
}

// each returns a figure of each way.
func (c compared) each(figure func(r play.Result) string) (all [ways]string) {
	for i, r := range c.by {
		all[i] = figure(r)
	}
	return all
}

// over returns the tokens that each way evaluated, as a multiple of the least possible.
func (c compared) over(least int) [ways]string {
	return c.each(func(r play.Result) string { return ratio(r.Evaluated, least) })
}

func ratio(n, least int) string { return fmt.Sprintf("%d (%.2f)", n, float64(n)/float64(least)) }

func (c compared) row() row {
	var equal int
	for _, d := range c.by[direct].Done {
		same := func(e play.Completion) bool { return e.Q.ID == d.Q.ID && e.Text == d.Text }
		if slices.ContainsFunc(c.by[given].Done, same) && slices.ContainsFunc(c.by[auto].Done, same) {
			equal++
		}
	}
	over := c.over(c.least.Evaluated)
	loads := c.each(func(r play.Result) string { return fmt.Sprint(r.Loads) })
	seconds := c.each(func(r play.Result) string {
		if base := c.by[direct].Wall; r.Wall != base {
			return fmt.Sprintf("%.1f (%.2f)", r.Wall.Seconds(), r.Wall.Seconds()/base.Seconds())
		}
		return fmt.Sprintf("%.1f", r.Wall.Seconds())
	})
	return row{c.w.Name, fmt.Sprint(len(c.least.Done)), fmt.Sprint(c.least.Evaluated), over[direct], over[given], over[auto],
		strings.Join(loads[:], ", "), strings.Join(seconds[:], ", "), fmt.Sprintf("%d of %d", equal, len(c.least.Done))}
}
