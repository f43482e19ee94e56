package discover

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// member returns a source that gossips on loopback, and its address for gossip.
func member(t *testing.T, peer, secret string, log *slog.Logger, seeds ...string) (Source, string) {
	t.Helper()
	s, err := NewGossip("127.0.0.1:0", peer, seeds, []byte(secret), log)
	if err == nil {
		err = s.(*gossip).listen()
	}
	if err != nil {
		t.Fatal(err)
	}
	return s, s.(*gossip).list.LocalNode().Address()
}

func TestGossip(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	a, seed := member(t, "10.0.0.1:11436", "open sesame", log, "127.0.0.1:1")
	b, _ := member(t, "[fd00::2]:11436", "open sesame", log, seed)
	foundA, stopA := watch(t, a)
	foundB, _ := watch(t, b)
	until(t, foundA, "[fd00::2]:11436")
	until(t, foundB, "10.0.0.1:11436")

	c, third := member(t, "host-3.example:11436", "open sesame", log, seed)
	foundC, stopC := watch(t, c)
	until(t, foundA, "[fd00::2]:11436", "host-3.example:11436")
	until(t, foundB, "10.0.0.1:11436", "host-3.example:11436")
	until(t, foundC, "10.0.0.1:11436", "[fd00::2]:11436")

	// A seed goes, and leaves the others; one that goes says so.
	stopA()
	until(t, foundB, "host-3.example:11436")
	d, _ := member(t, "10.0.0.4:11436", "open sesame", log, third)
	foundD, _ := watch(t, d)
	until(t, foundD, "[fd00::2]:11436", "host-3.example:11436")
	stopC()
	until(t, foundD, "[fd00::2]:11436")
	until(t, foundB, "10.0.0.4:11436")
}

// lines is a log that several goroutines write.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// TestGossipSecret: who knows another secret, or none, finds nobody and is found by nobody. What
// memberlist logs is at the level debug; that no seed can be joined is one line.
func TestGossipSecret(t *testing.T) {
	var log lines
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	quiet := slog.New(slog.DiscardHandler)
	a, seed := member(t, "10.0.0.1:1", "one", quiet)
	b, _ := member(t, "10.0.0.2:2", "other", logger, seed)
	c, _ := member(t, "10.0.0.3:3", "", quiet, seed)
	d, _ := member(t, "10.0.0.4:4", "one", quiet, seed)
	for _, s := range []Source{b, c} {
		if n, err := s.(*gossip).list.Join([]string{seed}); err == nil {
			t.Errorf("joined %d members with another secret", n)
		}
	}
	foundA, _ := watch(t, a)
	foundB, stopB := watch(t, b)
	foundC, _ := watch(t, c)
	foundD, _ := watch(t, d)
	until(t, foundA, "10.0.0.4:4")
	until(t, foundD, "10.0.0.1:1")
	for !strings.Contains(log.String(), "level=WARN") { // as soon as it has tried to join
		time.Sleep(time.Millisecond)
	}
	stopB()
	until(t, foundB)
	until(t, foundC)
	if len(foundA)+len(foundB)+len(foundC)+len(foundD) > 0 {
		t.Error("more was found")
	}
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "memberlist: ") && !strings.Contains(line, "level=DEBUG") {
			t.Errorf("memberlist's line is not at debug: %s", line)
		}
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "memberlist: ") {
		t.Errorf("%d warnings; want one, and memberlist's lines:\n%s", n, log.String())
	}
}

func TestGossipErrors(t *testing.T) {
	for want, try := range map[string][3]string{
		"want HOST:PORT, an address": {"nothing", "10.0.0.1:1", "10.0.0.2:2"},
		"that peers are told":        {"127.0.0.1:0", "10.0.0.1", "10.0.0.2:2"},
		"a seed":                     {"127.0.0.1:0", "10.0.0.1:1", "10.0.0.2"},
	} {
		_, err := NewGossip(try[0], try[1], try[2:], nil, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v; want %q", try, err, want)
		}
	}
}

// TestGossipTaken: settings can be read while another program has the address, and as soon as that
// is gone, the others are found.
func TestGossipTaken(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	a, at := member(t, "10.0.0.1:1", "", log)
	_, stop := watch(t, a)
	c, seed := member(t, "10.0.0.2:2", "", log)
	watch(t, c)
	var said lines
	b, err := NewGossip(at, "10.0.0.3:3", []string{seed}, nil, slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	found, _ := watch(t, b)
	until(t, found)
	stop()
	until(t, found, "10.0.0.2:2")
	for _, want := range []string{"cannot listen for gossip", "listens for gossip at last"} {
		if n := strings.Count(said.String(), want); n != 1 {
			t.Errorf("%d lines say %q; want one:\n%s", n, want, said.String())
		}
	}
}
