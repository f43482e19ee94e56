package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/play"
)

// leastLoaded is the router to compare with: each request goes to the server with the fewest under
// way, and to equal ones in turn. A server that does not answer is left out for a second.
type leastLoaded struct {
	mu       sync.Mutex // also guards the backends' fields
	backends []*backend
	turn     int
}

type backend struct {
	name  string
	proxy *httputil.ReverseProxy
	busy  int
	until time.Time // when it is tried again
}

// serveLeastLoaded serves a leastLoaded on a free port of loopback.
func serveLeastLoaded(urls []string) (string, func() error, error) {
	l := &leastLoaded{}
	for i, server := range urls {
		u, err := url.Parse(server)
		if err != nil {
			return "", nil, err
		}
		b := &backend{name: play.ServerName(i)}
		b.proxy = &httputil.ReverseProxy{
			Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u) },
			Transport: &http.Transport{MaxIdleConnsPerHost: 1000},
			ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
				l.mu.Lock()
				b.until = time.Now().Add(time.Second)
				l.mu.Unlock()
				w.WriteHeader(http.StatusBadGateway)
				fmt.Fprintf(w, `{"error": %q}`, err)
			},
		}
		l.backends = append(l.backends, b)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: l}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }() // until it is closed
	return "http://" + listener.Addr().String(), func() error {
		err := server.Close()
		if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, fmt.Errorf("serving: %w", served))
		}
		return err
	}, nil
}

// startBare runs a bare reverse proxy for a server as a separate process, as ours is: half of a
// proxy's cost is waking another process.
func startBare(ctx context.Context, server string) (url string, stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, self, "-bare", server)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() error { return errors.Join(in.Close(), cmd.Wait()) }
	if url, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		return "", nil, errors.Join(fmt.Errorf("the bare proxy does not say where it is: %w", err), stop())
	}
	return strings.TrimSpace(url), stop, nil
}

// beBare is the main function of that process. It ends with its input.
func beBare(server string) error {
	url, stop, err := serveLeastLoaded([]string{server})
	if err != nil {
		return err
	}
	fmt.Println(url)
	_, err = io.Copy(io.Discard, os.Stdin)
	return errors.Join(err, stop())
}

func (l *leastLoaded) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b := l.take()
	defer l.give(b)
	w.Header().Set(chat.HeaderServer, b.name)
	b.proxy.ServeHTTP(w, r)
}

func (l *leastLoaded) take() *backend {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turn++
	best := l.backends[l.turn%len(l.backends)]
	for i := range l.backends {
		b := l.backends[(l.turn+i)%len(l.backends)]
		if b.until.Before(time.Now()) && (b.busy < best.busy || best.until.After(time.Now())) {
			best = b
		}
	}
	best.busy++
	return best
}

func (l *leastLoaded) give(b *backend) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b.busy--
}
