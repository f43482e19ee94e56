package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
)

// TestAnswersStores: what happens to a store happens to no request.
func TestAnswersStores(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{tiny}})
	mustPost(t, server.URL()+"/api/chat", coldChat(tiny, "load", 1, ""))
	t.Run("valkey", func(t *testing.T) { storesValkey(t, server) })
	t.Run("killed", func(t *testing.T) { storesKilled(t, server) })
	t.Run("torn", func(t *testing.T) { storesTorn(t, server) })
	t.Run("full", func(t *testing.T) { storesFull(t, server) })
}

// told returns the proxy's lines about its store, by level.
func (p *proxyProcess) told(level string) (lines []string) {
	for line := range strings.Lines(p.Log()) {
		var entry struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Level == level &&
			(strings.Contains(entry.Msg, "answers") || strings.Contains(entry.Msg, "alkey")) {
			lines = append(lines, line)
		}
	}
	return lines
}

// keptAgain asks for something new until its answer is kept.
func keptAgain(t *testing.T, url, text string) {
	t.Helper()
	n := 0
	settles(t, func() error {
		n++
		body := coldChat(tiny, fmt.Sprintf("%s %d", text, n/50), 5, "")
		asks(t, url, body)
		r := request(t.Context(), plainClient(t), http.MethodPost, url, body, "Cache-Control", "only-if-cached")
		if !r.hit() {
			return errors.New("nothing is kept")
		}
		return nil
	})
}

// storesValkey: two proxies share a server, which goes and comes back.
func storesValkey(t *testing.T, server *realollama.Server) {
	store := valkeyserver.Start(t, "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
	f := newFront(t, server)
	a := startProxy(t, f.URL, cached, "--answers-store", store.URL())
	b := startProxy(t, f.URL, cached, "--answers-store", store.URL())
	body := coldChat(tiny, "valkey", 20, "")
	asks(t, a.URL+"/api/chat", body)
	first := kept(t, a.URL+"/api/chat", body)
	if err := kept(t, b.URL+"/api/chat", body).same(first); err != nil {
		t.Errorf("the other proxy's: %v", err)
	}
	if n := len(f.computed()); n != 1 {
		t.Errorf("%d computations", n)
	}

	store.Kill()
	for n := range 20 {
		asks(t, a.URL+"/api/chat", coldChat(tiny, fmt.Sprint("gone ", n), 5, ""))
	}
	asks(t, a.URL+"/api/chat", body)
	eventually(t, "told", func() bool { return len(a.told("WARN")) > 0 })
	store.Restart()
	keptAgain(t, a.URL+"/api/chat", "back")
	eventually(t, "told to be back", func() bool { return len(a.told("INFO")) > 0 })
	if gone, back := a.told("WARN"), a.told("INFO"); len(gone) != 1 || len(back) != 1 {
		t.Errorf("told %d and %d times:\n%s", len(gone), len(back), strings.Join(append(gone, back...), ""))
	}
}

// storesKilled: what a killed proxy had kept is there after its start.
func storesKilled(t *testing.T, server *realollama.Server) {
	dir := filepath.Join(t.TempDir(), "answers")
	f := newFront(t, server)
	body := coldChat(tiny, "killed", 20, "")
	first := startProxy(t, f.URL, cached, "--answers-store", dir)
	asks(t, first.URL+"/api/chat", body)
	want := kept(t, first.URL+"/api/chat", body)
	if err := first.Stop(); err != nil { // writes what it has
		t.Fatal(err)
	}
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	second, err := proxyprocess.Start(t.Context(), bin, f.URL, cached, "--answers-store", dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := kept(t, second.URL+"/api/chat", body).same(want); err != nil {
		t.Errorf("after a stop: %v", err)
	}
	for n := range 20 {
		asks(t, second.URL+"/api/chat", coldChat(tiny, fmt.Sprint("killed ", n), 20, ""))
	}
	second.Kill()
	third := startProxy(t, f.URL, cached, "--answers-store", dir)
	if err := kept(t, third.URL+"/api/chat", body).same(want); err != nil {
		t.Errorf("after a kill: %v", err)
	}
	for n := range 20 {
		asks(t, third.URL+"/api/chat", coldChat(tiny, fmt.Sprint("killed ", n), 20, ""))
	}
	if n := len(f.computed()); n > 1+2*20 {
		t.Errorf("%d computations", n)
	}
}

// storesTorn: the files are damaged while the proxy is stopped.
func storesTorn(t *testing.T, server *realollama.Server) {
	dir := filepath.Join(t.TempDir(), "answers")
	f := newFront(t, server)
	for round := range 4 {
		p := startProxy(t, f.URL, cached, "--answers-store", dir)
		for n := range 10 {
			asks(t, p.URL+"/api/chat", coldChat(tiny, fmt.Sprint("torn ", n), 20, ""))
		}
		keptAgain(t, p.URL+"/api/chat", fmt.Sprint("whole ", round))
		if err := p.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() || filepath.Ext(path) == ".lock" {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil || len(text) == 0 {
				return err
			}
			switch round {
			case 0: // torn off
				text = text[:len(text)/2]
			case 1: // a broken page here and there
				for i := 100; i < len(text); i += 5000 {
					text[i] ^= 0xff
				}
			case 2: // something else
				text = []byte("something else")
			}
			return os.WriteFile(path, text, 0o600)
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// storesFull: the disk has no more room, and then it has.
func storesFull(t *testing.T, server *realollama.Server) {
	dir := t.TempDir()
	mount := func(flags uintptr, size string) {
		if err := syscall.Mount("tmpfs", dir, "tmpfs", flags, "size="+size+",mode=0700"); err != nil {
			t.Fatal(err)
		}
	}
	mount(0, "512k")
	t.Cleanup(func() { // lazily, since the proxy may still have it open
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	f := newFront(t, server)
	p := startProxy(t, f.URL, cached, "--answers-store", dir)
	for n := range 60 {
		asks(t, p.URL+"/api/chat", coldChat(tiny, fmt.Sprint("full ", n), 100, ""))
	}
	eventually(t, "told", func() bool { return len(p.told("WARN")) > 0 })
	mount(syscall.MS_REMOUNT, "64m")
	keptAgain(t, p.URL+"/api/chat", "room")
	// A short answer may have found room before the disk had more.
	settles(t, func() error { // the log's last line may come a moment after the answer
		if gone, back := p.told("WARN"), p.told("INFO"); len(gone) > len(back) || len(gone) > 10 {
			return fmt.Errorf("told %d and %d times:\n%s", len(gone), len(back),
				strings.Join(append(gone, back...), ""))
		}
		return nil
	})
}
