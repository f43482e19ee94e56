package main

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// asInContainer makes the process look as if it ran in a container, or not.
func asInContainer(t *testing.T, in bool) {
	before := containerMarks
	t.Cleanup(func() { containerMarks = before })
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	containerMarks.files, containerMarks.cgroup = nil, filepath.Join(t.TempDir(), "cgroup")
	if in {
		if err := os.WriteFile(containerMarks.cgroup, []byte("0::/system.slice/docker-1234.scope\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAddressTaken: the start and --check report who has the proxy's address, and what to do.
func TestAddressTaken(t *testing.T) {
	asInContainer(t, false)
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	t.Cleanup(up.Close)
	other := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(other.Close)
	mute, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and hangs up
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mute.Close() })
	go func() { // ends with Close
		for {
			c, err := mute.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	plain, _ := startTLS(t, "--upstream", up.URL)
	cert, key := newAuthority(t).write(t.TempDir(), 2)
	secure, _ := startTLS(t, "--upstream", up.URL, "--tls-cert", cert, "--tls-key", key)
	for _, tt := range []struct {
		what, listen, want string
		check              int // the status of --check
	}{
		{"an Ollama", up.Listener.Addr().String(), "an Ollama listens on the proxy's address: is OLLAMA_HOST exported for it, too? Start it with 'OLLAMA_HOST=127.0.0.1:1 ollama serve'", 1},
		{"a proxy", plain, "another ollama-cacheproxy listens there", 0},
		{"a proxy with TLS", secure, "another ollama-cacheproxy listens there", 0},
		{"another program", other.Listener.Addr().String(), "another program listens there", 1},
		{"one that hangs up", mute.Addr().String(), "another program listens there", 1},
	} {
		t.Run(tt.what, func(t *testing.T) {
			out := &syncBuffer{}
			code := run(t.Context(), []string{"--listen", tt.listen, "--upstream", "127.0.0.1:1"}, out, out)
			if code != 1 || !strings.Contains(out.String(), tt.want) || !strings.Contains(out.String(), "--listen") {
				t.Errorf("status %d, want 1 and %q\n%s", code, tt.want, out)
			}
			out = &syncBuffer{}
			upstream := up.URL
			if upstream == "http://"+tt.listen {
				upstream = other.URL // the proxy's own address would be refused
			}
			if code := run(t.Context(), []string{"--check", "--listen", tt.listen, "--upstream", upstream}, out, out); code != tt.check || !strings.Contains(out.String(), "listen      http://"+tt.listen+" (") {
				t.Errorf("--check: status %d, want %d\n%s", code, tt.check, out)
			}
		})
	}
}

// TestOccupantIsAskedAtOnce: all questions are sent at the same time, so that an occupant that does
// not answer delays the start only once.
func TestOccupantIsAskedAtOnce(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() { // ends with Close; it answers nobody until all are there
		var asked []net.Conn
		for range 3 {
			c, err := ln.Accept()
			if err != nil {
				break
			}
			asked = append(asked, c)
		}
		for _, c := range asked {
			// An answer to no question would be refused by a client that has not asked yet.
			if _, err := c.Read(make([]byte, 1<<10)); err != nil {
				continue
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{\"status\":\"ok\"}")
			defer c.Close()
		}
		ln.Accept()
	}()
	if who := occupantOf(t.Context(), ln.Addr().String()); who != aProxy {
		t.Errorf("it is %q", who)
	}
}

// TestAbsentHints: hints about an upstream on this machine that does not answer.
func TestAbsentHints(t *testing.T) {
	for _, tt := range []struct {
		what      string
		container bool
		host      string // OLLAMA_HOST
		upstream  string
		want      string // "" if there is no hint
	}{
		{"plain", false, "", "127.0.0.1:1", ""},
		{"in a container", true, "", "127.0.0.1:1", "--upstream host.docker.internal:1 "},
		{"in a container, elsewhere", true, "", "192.0.2.1:1", ""},
		{"OLLAMA_HOST is the proxy's", false, "127.0.0.1:11499", "127.0.0.1:1", "OLLAMA_HOST=127.0.0.1:1 ollama serve"},
		{"OLLAMA_HOST is the proxy's, otherwise written", false, "http://localhost:11499/", "127.0.0.1:1", "OLLAMA_HOST=127.0.0.1:1 ollama serve"},
		{"OLLAMA_HOST is another", false, "127.0.0.1:11434", "127.0.0.1:1", ""},
	} {
		t.Run(tt.what, func(t *testing.T) {
			asInContainer(t, tt.container)
			t.Setenv("OLLAMA_HOST", tt.host)
			s, err := parsed(t, "--listen", "127.0.0.1:11499", "--upstream", tt.upstream)
			if err != nil {
				t.Fatal(err)
			}
			set, err := s.settings()
			if err != nil {
				t.Fatal(err)
			}
			got := set.absent(set.upstreams[0].url)
			if !strings.Contains(got, tt.want) || (got == "") != (tt.want == "") {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
	asInContainer(t, true)
	out := &syncBuffer{}
	if code := run(t.Context(), []string{"--check", "--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1"}, out, out); code != 1 || !strings.Contains(out.String(), "host.docker.internal:1 ") {
		t.Errorf("--check: status %d\n%s", code, out)
	}
}
