package integration

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/debian"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// nginxConf makes nginx run in the foreground, as the current user, with all its files in one
// folder.
const nginxConf = `
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	server {
		listen %s;
		location / {
			proxy_pass %s;
			proxy_http_version 1.1;
			proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
			proxy_buffering off;
			proxy_read_timeout 1h;
		}
	}
}
`

// startNginx runs nginx in front of a server until the test ends, and returns its address.
func startNginx(t *testing.T, bin, upstream string) (addr string) {
	t.Helper()
	for range 5 { // another process may take the port meanwhile
		if addr = tryNginx(t, bin, upstream); addr != "" {
			return addr
		}
	}
	t.Fatal("nginx does not start, five times; its log is above")
	return ""
}

func tryNginx(t *testing.T, bin, upstream string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	dir := t.TempDir()
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, addr, upstream), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(bin, "-p", dir, "-c", conf, "-e", "stderr")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { // ends with nginx
		cmd.Wait()
		close(exited)
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 3000 {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			t.Cleanup(func() {
				end(t, cmd, exited)
				if t.Failed() {
					t.Logf("nginx's log:\n%s", tail(log.String(), 30))
				}
			})
			return addr
		}
		select {
		case <-tick.C:
		case <-exited:
			t.Logf("nginx has ended:\n%s", log.String())
			return ""
		}
	}
	cmd.Process.Kill()
	<-exited
	t.Fatalf("nginx does not listen:\n%s", log.String())
	return ""
}

// caller is a client at an address of this machine.
type caller struct {
	t     *testing.T
	http  *http.Client
	claim string // the address in its X-Forwarded-For header
}

func callerAt(t *testing.T, address, claim string) caller {
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	transport := &http.Transport{DialContext: dialer.DialContext}
	t.Cleanup(transport.CloseIdleConnections)
	return caller{t, &http.Client{Transport: transport}, claim}
}

func (c caller) post(ctx context.Context, addr, body string) *http.Response {
	url := "http://" + addr + "/api/generate"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		c.t.Error(err)
		return &http.Response{Body: http.NoBody}
	}
	req.Header.Set("X-Forwarded-For", c.claim)
	res, err := c.http.Do(req)
	if err != nil {
		c.t.Error(err)
		return &http.Response{Body: http.NoBody}
	}
	return res
}

// status returns the status of a short answer.
func (c caller) status(addr string) int {
	res := c.post(c.t.Context(), addr, generate(tiny, ""))
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		c.t.Error(err)
	}
	return res.StatusCode
}

// endless makes a model answer without end, and returns a function that ends it. It reads the first
// pieces, which must arrive while the rest is still being made.
func (c caller) endless(p *proxyProcess, addr string) (leave func()) {
	c.t.Helper()
	ctx, cancel := context.WithCancel(c.t.Context())
	stream := c.post(ctx, addr, fmt.Sprintf(
		`{"model":%q,"prompt":"hi","raw":true,"options":{"num_predict":10000000}}`, tiny))
	lines := bufio.NewReader(stream.Body)
	for range 3 {
		if line, err := lines.ReadString('\n'); err != nil || !strings.Contains(line, `"done":false`) {
			c.t.Fatalf("a stream through nginx: %q %v", line, err)
		}
	}
	// Including the request for this figure.
	if n := p.Metric(c.t, "ollama_cacheproxy_in_flight"); n < 2 {
		c.t.Error("the first pieces came when the answer had ended")
	}
	return func() {
		cancel()
		stream.Body.Close()
	}
}

// TestNginx: two people behind nginx who send the same are distinguished if nginx is trusted,
// whatever their headers claim, and are not if it is untrusted. The test sees that by who loses a
// place in a full queue: the one with more requests in it. A stream passes piece by piece, and ends
// when its client leaves.
func TestNginx(t *testing.T) {
	nginx, err := debian.Nginx(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{tiny}})
	for _, c := range []struct {
		name, refused string
		flags         []string
	}{
		{"trusted", "the script", []string{"--trusted-proxy", "127.0.0.1/32"}},
		{"not trusted", "the person", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := startProxy(t, server.URL(), append(c.flags, "--slots", "1", "--queue", "3")...)
			addr := startNginx(t, nginx, p.URL)
			// (Linux has all of 127.0.0.0/8.)
			script, person := callerAt(t, "127.0.0.2", "127.0.0.3"), callerAt(t, "127.0.0.3", "127.0.0.3")
			leave := script.endless(p, addr)
			defer leave()

			type told struct {
				who    string
				status int
			}
			answers := make(chan told, 4)
			for i := range 3 {
				go func() { answers <- told{"the script", script.status(addr)} }() // ends with the stream
				eventually(t, fmt.Sprint(i+1, " waiting"), func() bool {
					return p.Metric(t, "ollama_cacheproxy_waiting_requests") == float64(i+1)
				})
			}
			go func() { answers <- told{"the person", person.status(addr)} }() // likewise
			timeout := time.After(time.Minute)
			next := func() (a told) {
				select {
				case a = <-answers:
				case <-timeout:
					t.Fatal("no answer in a minute")
				}
				return a
			}
			if first, want := next(), (told{c.refused, http.StatusServiceUnavailable}); first != want {
				t.Errorf("while the stream lasts the answer is %v, want %v", first, want)
			}
			leave()
			for range 3 {
				if a := next(); a.status != http.StatusOK {
					t.Errorf("after its client has left: %v", a)
				}
			}
		})
	}
}
