package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/batches"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

const defaultBatchesBytes = 10 << 30

// checkBatches checks the flags about batches.
func (s *serveCmd) checkBatches() error {
	if s.BatchesBytes < 1 || s.BatchesRunning < 1 || s.BatchesTTL < 0 {
		return fmt.Errorf("--batches-bytes %d, --batches-running %d, --batches-ttl %v: want at least 1, "+
			"at least 1, and a time that is not negative", s.BatchesBytes, s.BatchesRunning, s.BatchesTTL)
	}
	return nil
}

// begin listens at the configured address, and begins with the batches: see serveBatches.
func (s *serveCmd) begin(
	ctx context.Context, set settings, h *proxy.Handler, log *slog.Logger,
) (ln net.Listener, stopBatches func(), err error) {
	if ln, err = set.listener(ctx, log); err != nil {
		return nil, nil, err
	}
	if stopBatches, err = s.serveBatches(ctx, set, h, log); err != nil {
		ln.Close()
		return nil, nil, err
	}
	return ln, stopBatches, nil
}

// serveBatches opens the folder of --batches, makes h serve it, and runs the batches in it. Once
// ctx has ended no request of a batch begins any more, and those that are under way have until
// --drain. The caller must call stop, which waits for that, or, before the end of ctx, does not.
func (s *serveCmd) serveBatches(
	ctx context.Context, set settings, h *proxy.Handler, log *slog.Logger,
) (stop func(), err error) {
	if s.Batches == "" {
		return func() {}, nil
	}
	service, err := batches.Open(batches.Config{
		Dir: s.Batches, Bytes: s.BatchesBytes, Running: s.BatchesRunning, TTL: s.BatchesTTL, Log: log,
		Owner: proxy.Owner, As: proxy.As, Knows: set.guard.Knows,
	})
	if err != nil {
		return nil, fmt.Errorf("--batches %s: %w", s.Batches, err)
	}
	h.Batches = service
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { service.Run(running, h) }) // ends with running
	wg.Go(func() {                            // ends with ctx and --drain, or with running
		select {
		case <-ctx.Done():
			limited, end := context.WithTimeout(running, s.Drain)
			defer end()
			service.Drain(limited)
			cancel()
		case <-running.Done():
		}
	})
	return func() {
		if ctx.Err() == nil {
			cancel()
		}
		wg.Wait()
		service.Close()
	}, nil
}
