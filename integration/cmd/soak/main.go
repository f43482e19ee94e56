// Command soak runs the proxy for a long time between mixed clients and two real servers that are
// killed and revived.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/soak"
)

func main() {
	length := flag.Duration("for", 10*time.Minute, "how long the clients run")
	every := flag.Duration("every", 15*time.Second, "how often a server is killed or stopped, and revived")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *length, *every); err != nil {
		fmt.Fprintf(os.Stderr, "soak: %v\n", err)
		stop()
		os.Exit(1)
	}
	fmt.Println("soak: all held")
}

func run(ctx context.Context, length, every time.Duration) error {
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-soak-")
	if err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "ollama-cacheproxy")
	if err := proxyprocess.Build(ctx, bin); err != nil {
		return err
	}
	fmt.Printf("soak: %v, a server is killed or stopped every %v\n", length, every)
	return soak.Run(ctx, soak.Config{Proxy: bin, For: length, Every: every, Report: func(format string, args ...any) {
		fmt.Printf("soak: "+format+"\n", args...)
	}})
}
