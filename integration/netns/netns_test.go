//go:build linux

package netns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// TestLab: hosts reach each other by address and by name, not while they are cut off, and again
// afterwards; connections survive that.
func TestLab(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()) // which nobody else uses
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) }) // after the lab's end
	Test(t, testLab, func(*testing.T) {})
}

func testLab(t *testing.T, lab *Lab) {
	host := func(name string) *Host {
		h, err := lab.Host(name)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	a, b, c := host("a"), host("b"), host("c")
	ln, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, r.Body)
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		<-served
	})
	ask := func(from *Host, transport *http.Transport, within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://b/", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		res, err := transport.RoundTrip(r)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if text, err := io.ReadAll(res.Body); err != nil || string(text) != "hello" {
			t.Errorf("from %s: %q, %v", from.Name, text, err)
		}
		return nil
	}
	const long, short = time.Minute, 100 * time.Millisecond
	fromA, fromC := a.Transport(), c.Transport()
	defer fromA.CloseIdleConnections()
	defer fromC.CloseIdleConnections()
	kept, err := a.DialContext(t.Context(), "tcp", "b:80")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if err := ask(a, fromA, long); err != nil {
		t.Fatal(err)
	}

	if err := lab.Cut(a, b); err != nil {
		t.Fatal(err)
	}
	fromA.CloseIdleConnections()
	if err := ask(a, fromA, short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a has been cut off from b, and gets %v", err)
	}
	if err := ask(c, fromC, long); err != nil {
		t.Errorf("c has not been cut off: %v", err)
	}
	if _, err := io.WriteString(kept, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Error(err)
	}
	kept.SetReadDeadline(time.Now().Add(short))
	if n, err := kept.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("on a connection that has been cut off: %d bytes, %v", n, err)
	}
	if err := lab.Heal(a, b); err != nil {
		t.Fatal(err)
	}
	if err := ask(a, fromA, long); err != nil {
		t.Error(err)
	}
	kept.SetReadDeadline(time.Now().Add(long))
	if text, err := io.ReadAll(kept); err != nil || !strings.HasPrefix(string(text), "HTTP/1.0 200") {
		t.Errorf("on a connection that was cut off for a while: %q, %v", text, err)
	}
	if _, err := a.DialContext(t.Context(), "tcp", "b:81"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	testNames(t, lab, a, b)
	testCommands(t, a)
}

// testNames: programs on a host resolve what the lab serves.
func testNames(t *testing.T, lab *Lab, a, b *Host) {
	lab.SetName("both.example.com", a.Addr, b.Addr)
	lab.SetService("_peers._tcp.example.com", Service{Target: "b", Port: 80})
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return a.DialContext(ctx, network, dnsAddr.String()+":53")
	}}
	addrs, err := resolver.LookupHost(t.Context(), "both.example.com")
	if slices.Sort(addrs); err != nil || !slices.Equal(addrs, []string{a.Addr.String(), b.Addr.String()}) {
		t.Errorf("both hosts: %v, %v", addrs, err)
	}
	_, services, err := resolver.LookupSRV(t.Context(), "peers", "tcp", "example.com")
	if err != nil || len(services) != 1 || services[0].Target != "b." || services[0].Port != 80 {
		t.Errorf("the service: %v, %v", services, err)
	}
	lab.SetName("both.example.com")
	var missing *net.DNSError
	if _, err := resolver.LookupHost(t.Context(), "both.example.com"); !errors.As(err, &missing) || !missing.IsNotFound {
		t.Errorf("a removed name: %v", err)
	}
	text, err := a.Run(t.Context(), "cat", "/etc/resolv.conf")
	if err != nil || !strings.Contains(text, "nameserver "+dnsAddr.String()) {
		t.Errorf("/etc/resolv.conf: %q, %v", text, err)
	}
	if text, err := os.ReadFile("/etc/resolv.conf"); err == nil && strings.Contains(string(text), dnsAddr.String()) {
		t.Error("this process sees the lab's /etc/resolv.conf")
	}
}

// testCommands: what is started on a host has only the host's links, and ends with the lab.
func testCommands(t *testing.T, a *Host) {
	text, err := a.Run(t.Context(), "cat", "/proc/self/net/dev")
	if err != nil || !strings.Contains(text, card+":") || strings.Count(text, ":") != 2 {
		t.Errorf("links: %q, %v", text, err)
	}
	other, err := New()
	if err != nil {
		t.Fatal(err)
	}
	h, err := other.Host("other")
	if err != nil {
		t.Fatal(err)
	}
	cmd := h.Command(context.Background(), "sleep", "1000")
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a command at the end of its lab: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(os.TempDir(), "netns-resolv-*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
