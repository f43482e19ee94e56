// Package virtual has what the benchmarks in virtual time share: servers in memory, and a proxy
// with serve's defaults in front of them, all in one testing/synctest bubble.
package virtual

import (
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/metrics"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// HeaderFrom is the origin of a request, since connections in memory have no address.
const HeaderFrom = "X-From"

// Proxy runs a proxy with serve's defaults, except for the lanes, until the test ends.
func Proxy(
	t *testing.T, ups []*upstream.Server, transport http.RoundTripper, lanes schedule.Config,
) http.Handler {
	return From(Start(t, ups, transport, lanes, func(*proxy.Handler) {}))
}

// From serves requests as if they came from where their HeaderFrom says.
func From(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = r.Header.Get(HeaderFrom)
		h.ServeHTTP(w, r)
	})
}

// Start runs a proxy as Proxy does; change may set more of its fields before it starts.
func Start(
	t *testing.T, ups []*upstream.Server, transport http.RoundTripper, lanes schedule.Config,
	change func(h *proxy.Handler),
) *proxy.Handler {
	if raced {
		// For each answer ReverseProxy sets a timer that fires at once. In a bubble two of these
		// must not fire at the same time, since Go 1.26's race detector crashes then
		// (runtime.(*timer).unlockAndRun).
		procs := runtime.GOMAXPROCS(1)
		t.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	}
	lanes.Limit = 10_000
	ctx, cancel := context.WithCancel(t.Context())
	store := contextstore.NewMemory(contextstore.Limits{Entries: 1_000_000, Bytes: 256 << 20})
	keep, err := proxy.ParseKeepAlive("if-absent", []string{"24h"})
	if err != nil {
		t.Fatal(err)
	}
	h := &proxy.Handler{
		Upstreams: ups, Transport: transport, KeepAlive: keep, Ledger: savings.New(store, 1000),
		Lanes: schedule.NewScheduler(lanes), Log: slog.New(slog.NewJSONHandler(io.Discard, nil)),
		Guard: proxy.Guard{AllowHosts: []string{"*"}},
	}
	counts := metrics.New("test", h.InFlight)
	h.Metrics, h.Done, h.Touched = counts.Handler(), counts.Done, counts.Touched
	var wg sync.WaitGroup
	for _, up := range ups {
		up.Polled = func(st upstream.State) {
			h.Polled(up, st)
			counts.Polled(up.Name, st)
		}
	}
	change(h)
	h.Init()
	for _, up := range ups {
		up.Poll(ctx)
		wg.Go(func() { up.Run(ctx) })
	}
	wg.Go(func() { h.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return h
}

// Network has servers in memory, by name.
type Network map[string]*ollamasim.Listener

// Dial is for http.Transport's DialContext.
func (n Network) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	return n[host].DialContext(ctx, network, addr)
}

// Serve starts a server. After stop its address is free again.
func (n Network) Serve(t *testing.T, name string, h http.Handler) (stop func()) {
	ln := ollamasim.Listen()
	n[name] = ln
	return Serve(t, ln, h)
}

// Serve starts a server on a listener.
func Serve(t *testing.T, ln net.Listener, h http.Handler) (stop func()) {
	srv := &http.Server{Handler: h}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }() // ends with stop
	return func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		<-served
	}
}

// Words returns text of n simulated tokens. The first one is unique to the id.
func Words(seed, id uint64, n int) string {
	r := rand.New(rand.NewPCG(seed, id))
	var b strings.Builder
	for i := range n {
		b.WriteByte(' ')
		x := uint64(r.Uint32())
		if i == 0 {
			x = id
		}
		for range 5 {
			b.WriteByte(byte('a' + x%26))
			x /= 26
		}
	}
	return b.String()
}
