//go:build unix

// Package valkeyserver runs a real Valkey or Redis server for tests, on a loopback port.
package valkeyserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// unpack has Debian's server and the libraries that it needs in the present folder. The server is
// one program under several names, of which Debian's package of tools has another one.
const unpack = `
set -e
apt-get download valkey-tools >/dev/null 2>&1 || apt-get download redis-tools
for library in $(dpkg-deb -f *-tools_*.deb Depends | tr ',' '\n' | sed 's/[(|].*//' | tr -d ' ' |
		grep '^lib' | grep -v -x libc6); do
	apt-get download "$library"
done
for package in *.deb; do dpkg-deb --extract "$package" .; done
rm *.deb
mkdir bin
for check in usr/bin/*-check-rdb; do cp -L "$check" bin/server; done
LD_LIBRARY_PATH="$(find "$PWD" -name '*.so.*' -exec dirname {} \; | sort -u | tr '\n' ':')" bin/server --version
`

// Program returns the path of a server, and the variables that it needs in its environment:
// valkey-server or redis-server in PATH, or else Debian's, which it downloads into the cache (2 MB,
// once).
func Program(ctx context.Context) (path string, env []string, err error) {
	for _, name := range []string{"valkey-server", "redis-server"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil, nil
		}
	}
	const advice = "a Valkey or Redis server is needed, in PATH as valkey-server or redis-server; install" +
		" it (Debian: apt-get install valkey-server, or redis-server; macOS: brew install valkey)"
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", nil, errors.New(advice)
	}
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		return "", nil, err
	}
	dir, err := cache.Ensure(ctx, realollama.Made{
		Name: "valkey-server", Inputs: []string{unpack}, Announce: "unpacking Debian's Valkey or Redis (2 MB)",
		Make: func(_ context.Context, result string, run func(string, ...string) error) error {
			if err := run(result, "sh", "-c", unpack); err != nil {
				// The package lists are outdated or missing. Only root can update them.
				return errors.Join(run("", "apt-get", "update"),
					run(result, "sh", "-c", "rm -rf ./*"), run(result, "sh", "-c", unpack))
			}
			return nil
		},
	})
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", advice, err)
	}
	var libraries []string
	err = filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if strings.Contains(filepath.Base(path), ".so.") {
			libraries = append(libraries, filepath.Dir(path))
		}
		return err
	})
	return filepath.Join(dir, "bin", "server"), []string{"LD_LIBRARY_PATH=" + strings.Join(libraries, ":")}, err
}

// Server is a running server. What it keeps is lost when it is killed.
type Server struct {
	t    testing.TB
	port int
	tls  *identity // nil: no TLS
	args []string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
}

// Start starts a server, which is killed when the test ends. args are the server's, such as
// "--maxmemory", "10mb".
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	return start(t, nil, args)
}

// StartTLS starts a server that speaks TLS alone, with a certificate for 127.0.0.1 whose authority is
// in the file Authority.
func StartTLS(t testing.TB, args ...string) *Server {
	t.Helper()
	return start(t, newIdentity(t), args)
}

func start(t testing.TB, secure *identity, args []string) *Server {
	t.Helper()
	s := &Server{t: t, tls: secure, args: args}
	t.Cleanup(s.Kill)
	for range 5 { // another process may take the port meanwhile
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.port = ln.Addr().(*net.TCPAddr).Port
		ln.Close()
		if s.start() {
			return s
		}
	}
	t.Fatal("the Valkey server does not start, five times; what it says is above")
	return nil
}

// Addr is the server's address.
func (s *Server) Addr() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

// URL is the server's address as a URL, without the parameter ca-file that TLS needs.
func (s *Server) URL() string {
	if s.tls != nil {
		return "valkeys://" + s.Addr()
	}
	return "valkey://" + s.Addr()
}

// Authority is a file with the authority of the server's certificate; "": it has none.
func (s *Server) Authority() string {
	if s.tls != nil {
		return s.tls.cert
	}
	return ""
}

// Restart starts the server again after Kill, empty and at the same address.
func (s *Server) Restart() {
	s.t.Helper()
	if !s.start() {
		s.t.Fatal("the Valkey server does not start again; what it says is above")
	}
}

// startLimit is how long a server may take until it accepts connections.
const startLimit = 30 * time.Second

// start reports whether the server accepts connections.
func (s *Server) start() bool {
	s.t.Helper()
	path, env, err := Program(context.Background())
	if err != nil {
		s.t.Fatal(err)
	}
	args := []string{"--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no", "--dir", s.t.TempDir()}
	if s.tls == nil {
		args = append(args, "--port", fmt.Sprint(s.port))
	} else {
		args = append(args, "--port", "0", "--tls-port", fmt.Sprint(s.port), "--tls-cert-file", s.tls.cert,
			"--tls-key-file", s.tls.key, "--tls-ca-cert-file", s.tls.cert, "--tls-auth-clients", "no")
	}
	s.cmd = exec.Command(path, append(args, s.args...)...)
	s.cmd.Env = append(os.Environ(), env...)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.cmd.Stderr = s.cmd.Stdout
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ready, done := make(chan bool, 1), make(chan struct{})
	s.done = done
	var said []string
	go func() {
		defer close(done)
		realollama.EachLine(out, func(line string) {
			if strings.Contains(line, "Ready to accept connections") {
				select {
				case ready <- true:
				default:
				}
			}
			if len(said) < 100 {
				said = append(said, line)
			}
		})
		s.cmd.Wait()
	}()
	select {
	case <-ready:
		return true
	case <-done:
	case <-time.After(startLimit):
		s.cmd.Process.Kill()
		<-done
		s.t.Logf("the Valkey server accepts no connections within %v", startLimit)
	}
	s.t.Log(strings.Join(said, "\n"))
	s.cmd = nil
	return false
}

// Kill ends the server at once. It may be called again.
func (s *Server) Kill() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Kill()
	<-s.done
	s.cmd = nil
}

// Pause stops the server, as if its machine were busy: connections stay, and nothing is answered.
func (s *Server) Pause() { s.signal(syscall.SIGSTOP) }

// Continue ends a Pause.
func (s *Server) Continue() { s.signal(syscall.SIGCONT) }

func (s *Server) signal(sig os.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}
