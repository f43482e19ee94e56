//go:build linux

// Command fleet measures, on real Ollama servers, what several proxies save together: the requests of
// bench/lanes that need several servers, sent through one proxy, through three with the clients
// spread over them, and through what else is put in front of several servers. It reads the evaluated
// tokens and the loads from the servers' own logs, and prints the table of docs/fleet.md, row by row.
//
//	go run ./bench/fleet
//	go run ./bench/fleet -model gen-llama-costly -ways one,three,nginx
//
// It runs in a network namespace with nothing but the loopback interface: ollama-herd announces
// itself to its network, and would send a summary of its use to its makers.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/play"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/debian"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
)

const (
	servers = 4
	// allowed is how many more tokens several proxies may have evaluated than one.
	allowed = 1.05
)

// herdPackages are what pip installs for ollama-herd.
const herdPackages = "ollama-herd==0.11.4\n"

func main() {
	var s settings
	flag.StringVar(&s.era, "era", realollama.EraC, "version of Ollama: "+strings.Join(realollama.Versions(), ", "))
	flag.StringVar(&s.model, "model", "gen-llama-tiny", "the model; gen-llama-costly takes about a millisecond for each token")
	flag.StringVar(&s.only, "only", "", "only workloads whose name contains this")
	flag.StringVar(&s.ways, "ways", strings.Join(wayNames(), ","), "what is in front of the servers")
	flag.IntVar(&s.runs, "runs", 3, "runs of each, of which the middle one is shown")
	flag.StringVar(&s.dir, "inside", "", "internal: the folder, within the namespace")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	do := enter
	if s.dir != "" {
		do = run
	}
	if err := do(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

type settings struct {
	era, model, only, ways, dir string
	runs                        int
}

// enter makes everything that is needed, for which the network may be needed, and runs this program
// again in a namespace of its own.
func enter(ctx context.Context, s settings, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-fleet-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := prepare(ctx, s, dir); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := append([]string{"--user", "--map-root-user", "--net", "sh", "-c",
		`ip link set lo up && exec "$@"`, "sh", self, "-inside", dir}, os.Args[1:]...)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	return cmd.Run()
}

// prepare builds the proxy into the folder, and the rest into the cache.
func prepare(ctx context.Context, s settings, dir string) error {
	if err := proxyprocess.Build(ctx, filepath.Join(dir, "ollama-cacheproxy")); err != nil {
		return err
	}
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		return err
	}
	server, err := realollama.Run(ctx, realollama.Config{Version: s.era, Models: []string{s.model}}, nil)
	if err == nil {
		err = server.Stop()
	}
	if err != nil {
		return err
	}
	for _, name := range strings.Split(s.ways, ",") {
		switch name {
		case "valkey":
			_, _, err = valkeyserver.Program(ctx)
		case "nginx":
			_, err = debian.Nginx(ctx)
		case "herd":
			_, err = cache.PythonEnv(ctx, "herd", herdPackages, 150)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// run measures all workloads in all ways, and prints the table.
func run(ctx context.Context, s settings, out io.Writer) error {
	f := &fronts{dir: s.dir, binary: filepath.Join(s.dir, "ollama-cacheproxy")}
	b := play.Bench{Era: s.era, Model: s.model}
	chosen, err := f.choose(ctx, s.ways)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "ollama %s, %s, %d servers; of %d runs each the one with the middle number of tokens\n\n", s.era, s.model, servers, s.runs)
	fmt.Fprintln(out, row{"workload", "through", "evaluated (least and most of the runs)", "÷ least possible", "loads", "seconds", "median ms", "p99 ms", "errors met, requests lost", "answers equal"})
	fmt.Fprintln(out, strings.Repeat("|---", columns)+"|")
	each := 18 // enough to notice that a server is back
	if s.era == realollama.EraA {
		each = 6 // it evaluates most of the prompt each time, which takes as long
	}
	var failed []error
	for _, w := range []play.Workload{b.Upstreams(servers, 6, false), b.Upstreams(servers, each, true), b.Queued(servers, 6)} {
		if !strings.Contains(w.Name, s.only) {
			continue
		}
		if err := measure(ctx, out, b, w, chosen, s.runs); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", w.Name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(failed...)
}

// measure prints a workload's rows. Ways take turns, run by run, so that a machine whose speed
// drifts does not favour one.
func measure(ctx context.Context, out io.Writer, b play.Bench, w play.Workload, chosen []way, runs int) error {
	least, err := b.Least(ctx, w)
	if err != nil {
		return fmt.Errorf("least possible: %w", err)
	}
	results := make([][]play.Result, len(chosen))
	for range runs {
		for i, how := range chosen {
			fmt.Fprintf(os.Stderr, "%s: %s …\n", w.Name, how.label)
			r, err := b.Measure(ctx, w, how.front)
			if err != nil {
				return fmt.Errorf("%s: %w", how.label, err)
			}
			if len(r.Failed) > 0 {
				fmt.Fprintf(os.Stderr, "%s: %s: requests lost: %d, the first one: %v\n", w.Name, how.label, len(r.Failed), r.Failed[0])
			}
			results[i] = append(results[i], r)
		}
	}
	var one int
	var failed []error
	for i, how := range chosen {
		all := results[i]
		slices.SortFunc(all, func(a, b play.Result) int { return cmp.Compare(a.Evaluated, b.Evaluated) })
		r := all[len(all)/2]
		fmt.Fprintln(out, newRow(w, how.label, least, all))
		switch {
		case how.name == "one":
			one = r.Evaluated
		case how.ours && one > 0 && float64(r.Evaluated) > allowed*float64(one):
			failed = append(failed, fmt.Errorf("%s evaluated %d tokens, one proxy %d: more than %.2f times as many", how.label, r.Evaluated, one, allowed))
		}
	}
	return errors.Join(failed...)
}

const columns = 10

// row is a row of the table, cell by cell.
type row [columns]string

func (r row) String() string { return "| " + strings.Join(r[:], " | ") + " |" }

// newRow returns the row of the middle run; the runs are sorted by the tokens that they evaluated.
func newRow(w play.Workload, label string, least play.Result, all []play.Result) row {
	r := all[len(all)/2]
	equal := 0
	for _, want := range least.Done {
		if slices.ContainsFunc(r.Done, func(c play.Completion) bool { return c.Q.ID == want.Q.ID && c.Text == want.Text }) {
			equal++
		}
	}
	ms := func(part float64) string { return fmt.Sprintf("%.0f", r.Latency("", part).Seconds()*1e3) }
	return row{
		w.Name, label, fmt.Sprintf("%d (%d to %d)", r.Evaluated, all[0].Evaluated, all[len(all)-1].Evaluated),
		fmt.Sprintf("%.2f", float64(r.Evaluated)/float64(least.Evaluated)), fmt.Sprint(r.Loads), fmt.Sprintf("%.1f", r.Wall.Seconds()),
		ms(0.5), ms(0.99), fmt.Sprintf("%d, %d", r.Retried, len(r.Failed)), fmt.Sprintf("%d of %d", equal, len(least.Done)),
	}
}
