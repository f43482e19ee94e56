//go:build linux

// Command soakfleet runs a fleet of proxies, servers and a Valkey for a long time, between clients,
// while all of them are killed, stopped and cut off from each other.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/faults"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/netns"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
)

func main() {
	var c faults.Config
	length := flag.Duration("for", 10*time.Minute, "how long, about")
	loopback := flag.Bool("loopback", false, "do without network namespaces, and so without partitions")
	rolling := flag.Int("rolling", 0, "restart all proxies so many times, gracefully, and break nothing")
	flag.IntVar(&c.Faults, "faults", 20, "how many things break meanwhile")
	flag.IntVar(&c.Proxies, "proxies", 3, "how many proxies")
	flag.IntVar(&c.Servers, "servers", 4, "how many Ollama servers, except with -sidecar")
	flag.BoolVar(&c.Sidecar, "sidecar", false, "one server beside each proxy, which has no other")
	flag.BoolVar(&c.Real, "real", false, "real Ollama servers with a small model (2 GB of memory), not simulated ones")
	flag.Uint64Var(&c.Seed, "seed", rand.Uint64(), "of what breaks and what is asked")
	flag.DurationVar(&c.HoldMost, "hold", 15*time.Second, "how long something stays broken at most")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// Half of the time is for what is whole.
	each := *length / time.Duration(max(c.Faults, 1))
	c.HoldMost = min(c.HoldMost, each*3/4)
	c.HoldLeast = c.HoldMost / 5
	c.Pause = each - (c.HoldMost+c.HoldLeast)/2
	if err := run(ctx, c, *rolling, *loopback); err != nil {
		fmt.Fprintf(os.Stderr, "soakfleet: %v\n", err)
		stop()
		os.Exit(1)
	}
	fmt.Println("soakfleet: all held")
}

func run(ctx context.Context, c faults.Config, rolling int, loopback bool) (err error) {
	if c.Dir, err = os.MkdirTemp("", "ollama-cacheproxy-soakfleet-"); err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	defer os.RemoveAll(c.Dir)
	c.Proxy = filepath.Join(c.Dir, "ollama-cacheproxy")
	if err := proxyprocess.Build(ctx, c.Proxy); err != nil {
		return err
	}
	if !loopback {
		if c.Lab, err = netns.New(); err != nil {
			return fmt.Errorf("run this as root, or give -loopback: %w", err)
		}
		defer c.Lab.Close()
	}
	began := time.Now()
	c.Report = func(format string, args ...any) {
		fmt.Printf("soakfleet: %5.0f s: "+format+"\n", append([]any{time.Since(began).Seconds()}, args...)...)
	}
	c.Report("%d proxies, seed %d", c.Proxies, c.Seed)
	if rolling > 0 {
		return faults.RunRolling(ctx, c, rolling)
	}
	return faults.Run(ctx, c)
}
