package main

import (
	"context"
	"net"
	"net/url"

	"github.com/alecthomas/kong"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// environment lets every flag be set by a variable, too.
var environment = kong.DefaultEnvars("OLLAMA_CACHEPROXY")

// runInner runs a proxy within the program for another verb, with serve's flags. It listens on a
// free port of loopback and ends with stop, not with ctx. done, which may be nil, is called after
// each request, and never after stop has returned.
func runInner(ctx context.Context, c *console, flags []string, done func(proxy.Exchange), options ...kong.Option) (server *url.URL, stop func() error, err error) {
	var inner cli
	parser, err := kong.New(&inner, append(options, vars)...)
	if err != nil {
		panic(err) // the same struct tags as run's
	}
	// Settings for files and clients from the environment do not apply to this proxy.
	// What is kept by a proxy that runs all the time belongs to that one.
	flags = append([]string{"serve", "--config=", "--tls-cert=", "--tls-key=", "--batches=", "--answers-store=memory", "--shared=", "--listen", "127.0.0.1:0", "--log-level", "warn"}, flags...)
	if _, err := parser.Parse(flags); err != nil {
		return nil, nil, exitError{2, err}
	}
	inner.Serve.fleetFlags = fleetFlags{} // the environment's fleet is that of the proxy which runs all the time
	listens := make(chan net.Addr, 1)
	inner.Serve.listening = func(addr net.Addr) { listens <- addr }
	inner.Serve.done = done
	serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- inner.Serve.Run(serving, c) }() // ends with stop
	select {
	case addr := <-listens:
		return &url.URL{Scheme: "http", Host: addr.String()}, func() error { cancel(); return <-ended }, nil
	case err := <-ended:
		cancel()
		return nil, nil, err
	}
}
