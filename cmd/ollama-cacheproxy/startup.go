package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// This file explains errors at the start of the proxy, and what to do about them.

// occupant is whoever listens at the proxy's address.
type occupant string

const (
	nobodyKnown occupant = ""
	anOllama    occupant = "an Ollama"
	aProxy      occupant = "another ollama-cacheproxy"
)

// anybody asks whoever listens at an address how it is, and nothing else. It sends no key, and
// accepts any certificate: a health check knows an address, and seldom a name or an authority.
var anybody = &http.Client{
	Timeout:   5 * time.Second,
	Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true},
}

// occupantOf finds out who listens at an address.
func occupantOf(ctx context.Context, listen string) occupant {
	ask := func(scheme, path, member string) bool {
		u, err := upstream.ParseAddr(scheme+"://"+listen, defaultPort)
		if err != nil {
			return false
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.JoinPath(path).String(), nil)
		if err != nil {
			return false
		}
		res, err := anybody.Do(req)
		if err != nil {
			return false
		}
		defer res.Body.Close()
		var answer map[string]any
		err = json.NewDecoder(io.LimitReader(res.Body, 4<<10)).Decode(&answer)
		return err == nil && res.StatusCode == http.StatusOK && answer[member] != nil
	}
	// All at once: a silent listener would keep each of them waiting.
	var health, secure, version bool
	var wg sync.WaitGroup
	wg.Go(func() { health = ask("http", "/_cacheproxy/health", "status") })
	wg.Go(func() { secure = ask("https", "/_cacheproxy/health", "status") })
	wg.Go(func() { version = ask("http", "/api/version", "version") })
	wg.Wait()
	switch {
	case health, secure:
		return aProxy
	case version:
		return anOllama
	}
	return nobodyKnown
}

// tryListen listens where the settings say. Its error says what to do; by is who has the address.
func (set settings) tryListen(ctx context.Context) (ln net.Listener, by occupant, err error) {
	ln, err = net.Listen("tcp", set.listen)
	if err == nil {
		return ln, "", nil
	}
	hint := "choose another address with --listen"
	if errors.Is(err, syscall.EADDRINUSE) {
		switch by = occupantOf(ctx, set.listen); by {
		case anOllama:
			hint = fmt.Sprintf("an Ollama listens on the proxy's address: is OLLAMA_HOST exported for it, too? Start it with 'OLLAMA_HOST=%s ollama serve', or %s", set.ollamaAt(), hint)
		case aProxy:
			hint = string(by) + " listens there: stop it, or " + hint
		default:
			hint = "another program listens there; " + hint
		}
	}
	return nil, by, fmt.Errorf("listening on %s: %w (%s)", set.listen, err, hint)
}

// ollamaAt is the address at which an Ollama on this machine must listen for the proxy to find it.
func (set settings) ollamaAt() string {
	for _, t := range set.upstreams {
		if t.sim == nil && upstream.Here(t.url) {
			return t.url.Host
		}
	}
	return "127.0.0.1:" + upstream.DefaultPort
}

// absent returns why an upstream may not answer; "" without any sign.
func (set settings) absent(u *url.URL) string {
	if !upstream.Here(u) {
		return ""
	}
	if inContainer() {
		return "in a container " + u.Hostname() + " is the container itself: an Ollama on the host is at --upstream host.docker.internal:" + u.Port() +
			" (docker run --add-host host.docker.internal:host-gateway), one in another container at that one's name"
	}
	if own, err := upstream.ParseAddr(os.Getenv("OLLAMA_HOST"), upstream.DefaultPort); err == nil && selfTarget(set.listen, own) {
		return fmt.Sprintf("OLLAMA_HOST is the proxy's own address here: that is right for clients, but an 'ollama serve' with it wants the proxy's port; start that with 'OLLAMA_HOST=%s ollama serve'", set.ollamaAt())
	}
	return ""
}

// containerMarks lists files that only containers have, and text that /proc/1/cgroup has only in
// one. It is a variable for tests.
var containerMarks = struct {
	files  []string
	cgroup string
}{[]string{"/.dockerenv", "/run/.containerenv"}, "/proc/1/cgroup"}

// inContainer reports whether this process seems to run in a container.
func inContainer() bool {
	for _, name := range containerMarks.files {
		if _, err := os.Stat(name); err == nil {
			return true
		}
	}
	if os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		return true
	}
	text, err := os.ReadFile(containerMarks.cgroup)
	return err == nil && (strings.Contains(string(text), "docker") || strings.Contains(string(text), "kubepods") || strings.Contains(string(text), "containerd"))
}
