package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// secretFile writes a secret for peers.
func secretFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// freeAddrs returns so many addresses at which nobody listens.
func freeAddrs(t *testing.T, n int) (addrs []string) {
	t.Helper()
	for range n {
		addr, err := freeAddr()
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

// TestGossipFound: two proxies that know each other by gossip alone find each other. (Reading their
// settings must not take the address for gossip, which they listen at afterwards.)
func TestGossipFound(t *testing.T) {
	ollama := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer ollama.Close()
	secret, at := secretFile(t), freeAddrs(t, 4)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var logs [2]syncBuffer
	var running sync.WaitGroup
	for i := range logs {
		args := []string{
			"--listen", "127.0.0.1:0", "--upstream", "a=" + ollama.URL, "--peer-secret-file", secret,
			"--peers", "gossip:" + at[0], "--gossip-listen", at[i], "--peer-listen", at[2+i],
		}
		running.Go(func() { run(ctx, args, &logs[i], &logs[i]) })
	}
	for i := range logs {
		if !within30s(ctx, func() bool {
			said := logs[i].String()
			return strings.Contains(said, "peer found") || strings.Contains(said, "peer is back")
		}) {
			t.Errorf("proxy %d finds no other:\n%s", i, logs[i].String())
		}
	}
	stop()
	running.Wait()
}

// TestInnerAlone: the proxy within another verb is none of the fleet that the environment configures
// for the proxy which runs all the time, such as in a container where both are started.
func TestInnerAlone(t *testing.T) {
	ollama := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer ollama.Close()
	at := freeAddrs(t, 2)
	t.Setenv("OLLAMA_CACHEPROXY_PEERS", at[0])
	t.Setenv("OLLAMA_CACHEPROXY_PEER_LISTEN", at[1])
	t.Setenv("OLLAMA_CACHEPROXY_PEER_SECRET_FILE", secretFile(t))
	t.Setenv("OLLAMA_CACHEPROXY_OWN", "gpu")
	server, stop, err := runInner(t.Context(), &console{io.Discard, io.Discard},
		[]string{"--upstream", ollama.URL}, nil, environment)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	res, err := http.Get(server.String() + pathFleet)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusNotFound {
		t.Errorf("%s is answered %d: it is one of a fleet", pathFleet, res.StatusCode)
	}
}
