package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// parsed reads a command line as run does, without running it.
func parsed(t *testing.T, args ...string) (*serveCmd, error) {
	t.Helper()
	var c cli
	_, err := newParser(t.Context(), &c, io.Discard, io.Discard, func(int) {}).Parse(args)
	c.Serve.again = func() (*serveCmd, error) { return parsed(t, args...) }
	return &c.Serve, plain(err)
}

// TestConfigReload: when the file changes, live settings change, the others are named in the log,
// and a file with a mistake changes nothing.
func TestConfigReload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "proxy.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const first = "keep-alive: 1h\nlog-level: info\nqueue: 10\n"
	write(first)
	s, err := parsed(t, "--config", path, "--heartbeat", "9s")
	if err != nil {
		t.Fatal(err)
	}
	set, err := s.settings()
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		level := new(slog.LevelVar)
		logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: level}))
		with, err := s.openShared(logger)
		if err != nil {
			t.Fatal(err)
		}
		h, _ := s.handler(set, nil, proxy.NewTransport(), nil, with, logger)
		c := newConfigReload(s, set, h, level)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { // ends with stop
			defer close(done)
			watchFiles(ctx, nil, logger, c...)
		}()
		for _, step := range []struct {
			what, text string
			want       []string // in the log after that
			not        string
			keep       string
			level      slog.Level
		}{
			{"nothing", "", nil, "settings", "", slog.LevelInfo},
			{"live ones", "keep-alive: {default: 2h, b: off}\nlog-level: debug\nqueue: 10\n", []string{`changed="[keep-alive log-level]"`}, "restart", "2h0m0s, b:latest=off", slog.LevelDebug},
			{"one that needs a restart", "keep-alive: 3h\nqueue: 11\ntls-cert: x\n", []string{"tls-cert and --tls-key go together", "those from before stay", "proxy.yaml:3: "}, "changed=", "2h0m0s, b:latest=off", slog.LevelDebug},
			{"the same without the mistake", "keep-alive: 3h\nqueue: 11\n", []string{`changed="[keep-alive log-level]"`, "after a restart", "settings=[queue]"}, "heartbeat", "3h0m0s", slog.LevelInfo},
			{"a name", "keep-alive: 4h\nkeep_alive: 5h\n", []string{`proxy.yaml:2: there is no setting`}, "changed=", "3h0m0s", slog.LevelInfo},
			{"a value", "keep-alive:\n- 4h\n- a=5x\nlog-level: debug\n", []string{`proxy.yaml:3: --keep-alive`}, "changed=", "3h0m0s", slog.LevelInfo},
			{"no YAML", "keep-alive: [\n", []string{"those from before stay"}, "changed=", "3h0m0s", slog.LevelInfo},
			{"a flag goes before", "keep-alive: 3h\nheartbeat: 1m\nqueue: 10\n", []string{`changed=[]`}, "restart", "3h0m0s", slog.LevelInfo},
		} {
			before := log.String()
			if step.text != "" {
				write(step.text)
			}
			time.Sleep(filesEvery + 1)
			synctest.Wait()
			lines := strings.TrimPrefix(log.String(), before)
			for _, w := range step.want {
				if !strings.Contains(lines, w) {
					t.Errorf("%s: the log lacks %q:\n%s", step.what, w, lines)
				}
			}
			if strings.Contains(lines, step.not) {
				t.Errorf("%s: the log has %q:\n%s", step.what, step.not, lines)
			}
			if got := h.Live(); step.keep != "" && got.KeepAlive.String() != step.keep || got.Heartbeat != 9*time.Second || level.Level() != step.level {
				t.Errorf("%s: in force are %v, %v, %v", step.what, got.KeepAlive, got.Heartbeat, level)
			}
		}
		stop()
		<-done
	})
}

// TestConfigLive: a request that arrives after the file has changed is served by the new settings.
func TestConfigLive(t *testing.T) {
	up := httptest.NewServer(http.HandlerFunc(stubOllama))
	defer up.Close()
	path := filepath.Join(t.TempDir(), "proxy.yaml")
	write := func(text string) {
		if err := os.WriteFile(path, []byte("upstream: "+up.URL+"\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("keep-alive: 1h\n")
	listen, err := freeAddr()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	log, code := &syncBuffer{}, make(chan int, 1)
	go func() { code <- run(ctx, []string{"--listen", listen, "--config", path}, io.Discard, log) }() // ends with stop
	// sent returns what the upstream gets.
	sent := func() string {
		res, err := http.Post("http://"+listen+"/api/chat", "application/json", strings.NewReader(`{"model":"a"}`))
		if err != nil {
			return ""
		}
		defer res.Body.Close()
		text, _ := io.ReadAll(res.Body)
		return string(text)
	}
	waitFor(t, func() bool { return strings.Contains(sent(), `"1h0m0s"`) })
	write("keep-alive: 90m\nallow-host: [proxy.example]\n")
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return strings.Contains(sent(), `"1h30m0s"`) })
	req, err := http.NewRequest("GET", "http://"+listen+"/api/version", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "proxy.example"
	res, err := http.DefaultClient.Do(req)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("a host that is allowed now: %v, %v", res, err)
	}
	stop()
	if c := <-code; c != 0 {
		t.Errorf("exit status %d\n%s", c, log)
	}
}

// TestInlineKeysReload: keys in the file change with it. Adding the first keys, or removing the
// last ones, needs a restart.
func TestInlineKeysReload(t *testing.T) {
	const keys = "api-keys: {alice: one, bob: two}\n"
	for _, tt := range []struct {
		what, before, after string
		names               string // in force after that
		want                string // in the log
	}{
		{"others", keys, "api-keys: {alice: one, carol: three}\n", "[alice carol]", "changed=[api-keys]"},
		{"the same", keys, "# again\n" + keys, "[alice bob]", "changed=[]"},
		{"a mistake", keys, "api-keys: {alice: one, bob: one}\n", "[alice bob]", "another entry has this key"},
		{"none any more", keys, "queue: 10\n", "[alice bob]", `settings="[queue api-keys]"`},
		{"the first ones", "queue: 10000\n", keys, "none", "settings=[api-keys]"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "proxy.yaml")
			write := func(text string) {
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write(tt.before)
			s, err := parsed(t, "--config", path)
			if err != nil {
				t.Fatal(err)
			}
			set, err := s.settings()
			if err != nil {
				t.Fatal(err)
			}
			var log syncBuffer
			logger := slog.New(slog.NewTextHandler(&log, nil))
			with, err := s.openShared(logger)
			if err != nil {
				t.Fatal(err)
			}
			h, _ := s.handler(set, nil, proxy.NewTransport(), nil, with, logger)
			if len(set.files()) > 0 {
				t.Error("the file would be read as one of keys, too")
			}
			write(tt.after)
			newConfigReload(s, set, h, new(slog.LevelVar))[0].reload(logger)
			got := "none"
			if h.Guard.Keys != nil {
				got = fmt.Sprint(h.Guard.Keys.Names())
			}
			if got != tt.names || !strings.Contains(log.String(), tt.want) {
				t.Errorf("%s, want %s and %q:\n%s", got, tt.names, tt.want, &log)
			}
		})
	}
}
