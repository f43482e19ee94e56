// Package linked runs a real Ollama with the proxy in front of it, for tests and benchmarks that
// compare three ways: Ollama alone, the proxy without stored contexts, and the proxy with them, in
// front of an Ollama whose engine is linked to the proxy.
package linked

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// Way is the path that requests take.
type Way int

const (
	// Direct is Ollama alone.
	Direct Way = iota
	// Without is the proxy without stored contexts, in front of the same Ollama.
	Without
	// Contexts is the proxy with stored contexts, in front of a linked Ollama.
	Contexts
)

// String returns the way's name in tables.
func (w Way) String() string { return [...]string{"direct", "without contexts", "contexts"}[w] }

// Options describe what to run.
type Options struct {
	Way Way
	// Server is the Ollama's configuration. For Contexts, its Bin is the one to link.
	Server realollama.Config
	// Program is the path of the proxy's binary, which the engine is also linked to.
	Program string
	// Home is the folder of the link and of the states; "" means a new one, which Stop removes.
	Home string
	// SWAFull links the engine so that sliding windows keep the whole context.
	SWAFull bool
	// Flags are additional flags of the proxy.
	Flags []string
}

// Pair is a running Ollama and, except for Direct, the proxy in front of it.
type Pair struct {
	Server *realollama.Server
	// Proxy is nil for Direct, and after StopProxy.
	Proxy *proxyprocess.Process
	// Home is the folder of the link and of the states; "" without contexts.
	Home string

	options Options
	ended   string // logs of the proxies that have ended
	ownHome bool
	client  *http.Client
}

// Start runs an Ollama and the proxy. Stop ends both.
func Start(ctx context.Context, o Options) (*Pair, error) {
	p := &Pair{options: o, Home: o.Home, client: chat.ClientFrom("")}
	if err := p.start(ctx); err != nil {
		return nil, errors.Join(err, p.Stop())
	}
	return p, nil
}

func (p *Pair) start(ctx context.Context) error {
	config := p.options.Server
	if p.options.Way == Contexts {
		bin, err := p.link(ctx)
		if err != nil {
			return err
		}
		config.Bin = bin
	}
	var err error
	if p.Server, err = realollama.Run(ctx, config, nil); err != nil || p.options.Way == Direct {
		return err
	}
	return p.StartProxy(ctx)
}

// link makes the link in Home, and returns the path of the linked Ollama.
func (p *Pair) link(ctx context.Context) (string, error) {
	if p.Home == "" {
		dir, err := os.MkdirTemp("", "ollama-cacheproxy-linked-")
		if err != nil {
			return "", fmt.Errorf("making a folder for the link: %w", err)
		}
		p.Home, p.ownHome = dir, true
	}
	return realollama.Link(ctx, realollama.LinkConfig{
		Version: p.options.Server.Version, Ollama: p.options.Server.Bin,
		Home: p.Home, Program: p.options.Program, SWAFull: p.options.SWAFull,
	})
}

// StartProxy starts the proxy with the flags of the options and additional ones.
func (p *Pair) StartProxy(ctx context.Context, more ...string) error {
	flags := append([]string{}, p.options.Flags...)
	if p.options.Way == Contexts {
		flags = append(flags, "--contexts", p.Home)
	}
	proxy, err := proxyprocess.Start(ctx, p.options.Program, p.Server.URL(), append(flags, more...)...)
	p.Proxy = proxy
	return err
}

// URL is the address for requests.
func (p *Pair) URL() string {
	if p.Proxy == nil {
		return p.Server.URL()
	}
	return p.Proxy.URL
}

// StateDir is the folder of the state files; it may not exist yet.
func (p *Pair) StateDir() string { return filepath.Join(p.Home, "contexts") }

// Unload unloads a model without the proxy, as when its keep_alive has run out.
func (p *Pair) Unload(ctx context.Context, model string) error {
	return chat.Unload(ctx, p.client, p.Server.URL(), model)
}

// RestartServer ends Ollama and its engines, and starts it again on the same port.
func (p *Pair) RestartServer(ctx context.Context) error { return p.Server.Restart(ctx) }

// RestartProxy ends the proxy as an upgrade does, and starts it again on another port. For Direct
// it does nothing.
func (p *Pair) RestartProxy(ctx context.Context) error {
	if p.Proxy == nil {
		return nil
	}
	if err := p.StopProxy(); err != nil {
		return err
	}
	return p.StartProxy(ctx)
}

// KillProxy ends the proxy as a crash does.
func (p *Pair) KillProxy() {
	p.Proxy.Kill()
	p.ended += p.Proxy.Log()
	p.Proxy = nil
}

// StopProxy ends the proxy. URL is the server's from then on.
func (p *Pair) StopProxy() error {
	proxy := p.Proxy
	p.Proxy = nil
	err := proxy.Stop()
	p.ended += proxy.Log()
	return err
}

// Log returns the logs of all proxies so far.
func (p *Pair) Log() string {
	if p.Proxy == nil {
		return p.ended
	}
	return p.ended + p.Proxy.Log()
}

// Stop ends the proxy and Ollama, and removes the folder of the link if Start made it.
func (p *Pair) Stop() error {
	var err error
	if p.Proxy != nil {
		err = p.Proxy.Stop()
	}
	if p.Server != nil {
		err = errors.Join(err, p.Server.Stop())
	}
	if p.ownHome {
		err = errors.Join(err, os.RemoveAll(p.Home))
	}
	p.client.CloseIdleConnections()
	return err
}
