//go:build unix

package valkeyconn_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParse(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("a secret that is long enough"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ target, address, prefix, secret string }{
		{"valkey://host", "host:6379", "default:", ""},
		{"redis://u:p@10.0.0.1:7000/3", "10.0.0.1:7000", "default:", ""},
		{"valkeys://[::1]:7000?prefix=", "[::1]:7000", "", ""},
		{"rediss://host?prefix=a[*]b:&secret-file=" + file, "host:6379", "a[*]b:", "a secret that is long enough"},
	} {
		got, err := valkeyconn.Parse(test.target, "default:")
		if err != nil || got.Address != test.address || got.Prefix != test.prefix ||
			string(got.Secret) != test.secret || (got.Secret == nil) != (test.secret == "") {
			t.Errorf("%s: %+v, %v", test.target, got, err)
		}
	}
	if err := os.WriteFile(file, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	for target, want := range map[string]string{
		"host:6379":                       "valkey://host:6379",
		"":                                "valkey://host:6379",
		"http://u:hunter2@host":           "valkey://",
		"valkey:u:hunter2@host":           "valkey://host",
		"valkey://u:hunter2@%zz":          "valkey://host",
		"valkey://u:hunter2@host/x":       "database",
		"valkey://h?secret-file=" + file:  "16 characters",
		"valkey://h?secret-file=/no/file": "no such file",
		"valkey://h?ca-file=" + file:      "valkeys://",
		"valkeys://h?ca-file=" + file:     "no certificate",
		"valkeys://h?ca-file=/no/file":    "no such file",
		"valkeys://h?ca_file=" + file:     "ca-file, prefix, secret-file",
	} {
		_, err := valkeyconn.Parse(target, "")
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, want one with %q", target, err, want)
		}
	}
	if got := valkeyconn.Redacted("valkey://u:hunter2@host/1"); got != "valkey://u:xxxxx@host/1" {
		t.Error(got)
	}
}

// lines is a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// count returns how many lines contain a text.
func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

func ping(ctx context.Context, c valkey.Client) error { return c.Do(ctx, c.B().Ping().Build()).Error() }

// TestRefused: what no time mends is said at the start; a server that is full or busy is waited for.
func TestRefused(t *testing.T) {
	server := valkeyserver.Start(t)
	open := func(target string) (*valkeyconn.Conn, error) {
		parsed, err := valkeyconn.Parse(target, "")
		if err != nil {
			t.Fatal(err)
		}
		return valkeyconn.Open(parsed, valkeyconn.Options{Setting: "--here"})
	}
	for _, target := range []string{server.URL() + "/4711", "valkey://nobody:secret@" + server.Addr()} {
		if c, err := open(target); err == nil {
			c.Close()
			t.Errorf("%s is taken for a server that is away", target)
		} else if !strings.Contains(err.Error(), "the database in --here") || strings.Contains(err.Error(), "secret") {
			t.Error(err)
		}
	}
	first, err := open(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	// Not from the beginning: the server may notice late that those before have closed their connections.
	valkeyserver.Until(t, "it lets in nobody else", func() bool {
		return first.Call(context.Background(), valkeyconn.Wait, func(ctx context.Context, c valkey.Client) error {
			return c.Do(ctx, c.B().ConfigSet().ParameterValue().ParameterValue("maxclients", "1").Build()).Error()
		}) == nil
	})
	second, err := open(server.URL()) // the server has no room for it
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if first.Gone() || !second.Gone() {
		t.Errorf("the first is gone: %v, the second: %v", first.Gone(), second.Gone())
	}
}

// TestGone has a server that is killed and one that hangs, with calls from several goroutines. Each
// outage is one line, during which no call reaches anything, and so is each return.
func TestGone(t *testing.T) {
	server := valkeyserver.Start(t)
	var log lines
	var readied, returned atomic.Int32
	target, err := valkeyconn.Parse(server.URL(), "")
	if err != nil {
		t.Fatal(err)
	}
	c, err := valkeyconn.Open(target, valkeyconn.Options{
		Setting: "--test", Gone: "it is gone", Back: "it is back", Log: slog.New(slog.NewTextHandler(&log, nil)),
		Ready: func(ctx context.Context, c valkey.Client) error { readied.Add(1); return ping(ctx, c) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.OnReturn(func() { returned.Add(1) })
	ctx := context.Background()
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := make(chan struct{})
	defer close(stop)
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					// So patient that a busy machine is no outage. What hangs, the test finds out below.
					c.Call(ctx, time.Minute, ping)
				}
			}
		})
	}
	for round, outage := range []struct{ begin, end func() }{
		{server.Kill, server.Restart}, {server.Pause, server.Continue}, {server.Kill, server.Restart},
	} {
		valkeyserver.Until(t, "calls succeed", func() bool { return c.Call(ctx, valkeyconn.Wait, ping) == nil })
		outage.begin()
		valkeyserver.Until(t, "it is gone", func() bool {
			return errors.Is(c.Call(ctx, 50*time.Millisecond, ping), valkeyconn.ErrGone)
		})
		called := false
		err := c.Call(ctx, 0, func(context.Context, valkey.Client) error { called = true; return nil })
		if !errors.Is(err, valkeyconn.ErrGone) || called {
			t.Errorf("while it is gone: %v, called: %v", err, called)
		}
		outage.end()
		valkeyserver.Until(t, "it is back", func() bool { return !c.Gone() && int(returned.Load()) == round+1 })
		if gone, back := log.count("it is gone"), log.count("it is back"); gone != round+1 || back != round+1 {
			t.Errorf("%d and %d lines after %d outages", gone, back, round+1)
		}
		if int(readied.Load()) != round+2 {
			t.Errorf("Ready was called %d times", readied.Load())
		}
	}
	if gone, failed := c.State(); gone || failed == 0 {
		t.Errorf("State is %v, %d", gone, failed)
	}
}

// TestAnswers: what the server answers is no outage, nor is a caller who leaves.
func TestAnswers(t *testing.T) {
	server := valkeyserver.Start(t)
	target, err := valkeyconn.Parse(server.URL(), "")
	if err != nil {
		t.Fatal(err)
	}
	c, err := valkeyconn.Open(target, valkeyconn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 10 {
		err := c.Call(context.Background(), 0, func(ctx context.Context, c valkey.Client) error {
			return c.Do(ctx, c.B().Arbitrary("NONSENSE").Build()).Error()
		})
		if !valkeyconn.IsAnswer(err) {
			t.Fatal(err)
		}
		left, leave := context.WithCancel(context.Background())
		leave()
		if err := c.Call(left, 0, ping); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if gone, failed := c.State(); gone || failed != 10 {
		t.Errorf("State is %v, %d", gone, failed)
	}
}

// TestCloseUnanswered: nobody waits for a server that is not there, at an address where nothing answers.
func TestCloseUnanswered(t *testing.T) {
	server := valkeyserver.Start(t)
	target, err := valkeyconn.Parse(server.URL(), "")
	if err != nil {
		t.Fatal(err)
	}
	server.Pause() // the kernel accepts connections, and nobody answers
	c, err := valkeyconn.Open(target, valkeyconn.Options{Gone: "gone"})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Gone() {
		t.Error("a server that answers nothing is usable")
	}
	c.Close()
	server.Continue()
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"valkey://u:hunter2@host:1/2?prefix=a", "rediss://h?db=x", "valkey:", "valkey://%", "redis://[::1]:7/0?addr=b",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, target string) {
		if strings.Contains(target, "-file") {
			return // it would read a file
		}
		got, err := valkeyconn.Parse(target, "p:")
		if err == nil && got.Address == "" {
			t.Errorf("%q has no address", target)
		}
		valkeyconn.Redacted(target)
	})
}

// TestTLS: a certificate is believed if its authority is in the file, and otherwise the server is not
// used. Whoever forgets TLS, or asks for it in vain, is told.
func TestTLS(t *testing.T) {
	plain := valkeyserver.Start(t).Addr()
	talks, err := net.Listen("tcp", "127.0.0.1:0") // which the end of a line in the handshake may bring about
	if err != nil {
		t.Fatal(err)
	}
	var talking sync.WaitGroup
	defer talking.Wait()
	defer talks.Close()
	talking.Go(func() {
		for {
			conn, err := talks.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte("-ERR unknown command\r\n"))
			talking.Go(func() {
				io.Copy(io.Discard, conn) // until the client has read it
				conn.Close()
			})
		}
	})
	server := valkeyserver.StartTLS(t, "--requirepass", "hunter2")
	address, authority := server.Addr(), server.Authority()
	for target, want := range map[string]string{
		"valkeys://:hunter2@" + address + "/3?ca-file=" + authority: "",
		"rediss://:hunter2@" + address + "?ca-file=" + authority:    "",
		"valkeys://:hunter2@" + address:                             "unknown authority",
		"valkey://:hunter2@" + address:                              "begin its URL with valkeys://",
		"valkeys://:hunter2@" + plain:                               "begin its URL with valkey://",
		"valkeys://:hunter2@" + talks.Addr().String():               "begin its URL with valkey://",
	} {
		parsed, err := valkeyconn.Parse(target, "")
		if err != nil {
			t.Fatal(err)
		}
		var log lines
		c, err := valkeyconn.Open(parsed, valkeyconn.Options{Gone: "gone", Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		if want == "" { // at once, or later on a machine that has no time for it
			valkeyserver.Until(t, "it answers", func() bool { return c.Call(context.Background(), 0, ping) == nil })
		} else if err := c.Call(context.Background(), 0, ping); !errors.Is(err, valkeyconn.ErrGone) || log.count(want) != 1 {
			t.Errorf("%s: %v; %d times %s", target, err, log.count(want), want)
		}
		if log.count("hunter2") != 0 {
			t.Error("the password is logged")
		}
		c.Close()
	}
}
