//go:build unix

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// startLimited runs the program with a limit on descriptors, and returns its address.
func startLimited(t *testing.T, ulimit, upstream string, flags ...string) (addr string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// TestMain runs the program if called by this name.
	program := filepath.Join(t.TempDir(), "ollama-cacheproxy")
	if err := os.Symlink(self, program); err != nil {
		t.Fatal(err)
	}
	if addr, err = freeAddr(); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-c", ulimit + ` && exec "$0" "$@"`, program, "--listen", addr, "--upstream", upstream}, flags...)
	cmd := exec.Command("sh", args...)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGKILL)
		cmd.Wait() // it was killed
		if t.Failed() {
			t.Log(log.String())
		}
	})
	waitFor(t, func() bool { return page(addr, "/_cacheproxy/health") == http.StatusOK })
	return addr
}

// fresh uses a connection for one request, and has a timeout.
var fresh = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}

// page gets one of the proxy's pages over a new connection, and returns its status; 0 without an
// answer.
func page(addr, path string) int {
	res, err := fresh.Get("http://" + addr + path)
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

// TestDescriptorLimit: the limit is raised at the start.
func TestDescriptorLimit(t *testing.T) {
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer up.Close()
	addr := startLimited(t, "ulimit -S -n 64 && ulimit -H -n 500", up.URL)
	res, err := fresh.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body)
	if !regexp.MustCompile(`(?m)^process_max_fds (499|500)$`).Match(text) { // Go leaves one, to see whether others change it
		t.Errorf("the limit is not 500:\n%s", text)
	}
}

// TestIdleClientsMakeRoom: if clients keep as many connections as there are descriptors, the
// longest idle ones are closed, the newest stay, and everybody gets an answer.
func TestIdleClientsMakeRoom(t *testing.T) {
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer up.Close()
	addr := startLimited(t, "ulimit -n 64", up.URL)
	var last net.Conn
	for i := range 200 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		if last = c; i%20 == 0 {
			continue // it never sends anything
		}
		for range 2 { // the second time over a connection that was idle
			io.WriteString(c, "GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || res.StatusCode != http.StatusOK {
				t.Fatalf("client %d: %v, %v", i, res, err)
			}
			io.Copy(io.Discard, res.Body)
		}
		if i%20 == 10 && page(addr, "/_cacheproxy/health") != http.StatusOK {
			t.Fatalf("with %d clients the health page does not answer", i+1)
		}
	}
	io.WriteString(last, "GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
	if res, err := http.ReadResponse(bufio.NewReader(last), nil); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("the newest client: %v, %v", res, err)
	}
}

// TestSilentClients: connections on which nothing ever arrives keep nobody out.
func TestSilentClients(t *testing.T) {
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer up.Close()
	addr := startLimited(t, "ulimit -n 64", up.URL)
	for range 100 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	waitFor(t, func() bool { return page(addr, "/_cacheproxy/health") == http.StatusOK })
	waitFor(t, func() bool { return page(addr, "/api/version") == http.StatusOK })
}

// TestBusyClientsTakeAll: if requests under way take all descriptors, new ones get 503, the health
// page answers, and the requests under way get their answers; both if each has an upstream
// connection, and if all but one wait for a lane.
func TestBusyClientsTakeAll(t *testing.T) {
	for _, slots := range []string{"off", "1"} {
		t.Run("slots "+slots, func(t *testing.T) {
			gate := make(chan struct{})
			up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/api/chat" {
					<-gate
				}
				stubOllama(w, r)
			}))
			defer up.Close()
			open := sync.OnceFunc(func() { close(gate) })
			defer open()
			addr := startLimited(t, "ulimit -n 64", up.URL, "--slots", slots, "--no-touch")
			var mu sync.Mutex
			statuses := map[string]int{}
			count := func(s string) int { mu.Lock(); defer mu.Unlock(); return statuses[s] }
			patient := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			var wg sync.WaitGroup
			const n = 100
			for range n {
				wg.Go(func() {
					status := "none"
					res, err := patient.Post("http://"+addr+"/api/chat", "application/json", strings.NewReader(`{"model":"a","messages":[{"role":"user","content":"x"}]}`))
					if err == nil {
						status = fmt.Sprint(res.StatusCode)
						if res.StatusCode == 503 && res.Header.Get("Retry-After") == "" {
							status = "503 without Retry-After"
						}
						io.Copy(io.Discard, res.Body)
						res.Body.Close()
					}
					mu.Lock()
					defer mu.Unlock()
					statuses[status]++
				})
			}
			waitFor(t, func() bool { return count("503") > 40 })
			for range 20 {
				if page(addr, "/_cacheproxy/health") != http.StatusOK {
					t.Fatal("the health page does not answer")
				}
			}
			if s := page(addr, "/api/version"); s != http.StatusServiceUnavailable {
				t.Errorf("another request gets %d", s)
			}
			open()
			wg.Wait()
			if count("200") < 20 || count("200")+count("503") != n {
				t.Errorf("%v", statuses)
			}
			waitFor(t, func() bool { return page(addr, "/api/version") == http.StatusOK })
			t.Log(statuses)
		})
	}
}
