package integration

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestContextsFaults: whatever goes wrong with contexts, requests get the answers of Ollama alone,
// and the log says what went wrong.
func TestContextsFaults(t *testing.T) {
	version := realollama.Newest()
	t.Run("the proxy is killed in mid-save", func(t *testing.T) { contextsKilled(t, version) })
	t.Run("two proxies", func(t *testing.T) { contextsTwoProxies(t, version) })
	t.Run("torn files", func(t *testing.T) { contextsTorn(t, version) })
	t.Run("the engine is killed in mid-restore", func(t *testing.T) { contextsEngineKilled(t, version) })
}

// directAnswers returns the server's answers to the first n chats of a prefix, without the proxy.
// It leaves no model loaded.
func (p *contextsPair) directAnswers(t *testing.T, prefix, n int) []string {
	t.Helper()
	direct := &contextsPair{Pair: &linked.Pair{Server: p.Server}, client: p.client}
	var want []string
	for i := range n {
		want = append(want, direct.answer(t, contextChat(prefix, i)))
	}
	p.unload(t)
	return want
}

// logged waits for a warning of the proxy that contains each of the words, and returns how many
// such lines there are.
func (p *contextsPair) logged(t testing.TB, words ...string) int {
	t.Helper()
	var found []string
	eventually(t, fmt.Sprintf("logged with %q", words), func() bool {
		found = nil
		for line := range strings.Lines(p.Proxy.Log()) {
			warns := strings.Contains(line, `"level":"WARN"`) || strings.Contains(line, `"level":"ERROR"`)
			lacks := func(w string) bool { return !strings.Contains(line, w) }
			if warns && !slices.ContainsFunc(words, lacks) {
				found = append(found, line)
			}
		}
		return len(found) > 0
	})
	t.Logf("logged %d times, the last: %s", len(found), found[len(found)-1])
	return len(found)
}

// contextsKilled: the proxy is killed while a file is being written; the next proxy removes the
// incomplete file, and uses the complete ones.
func contextsKilled(t *testing.T, version string) {
	p := startContexts(t, realollama.Config{Version: version})
	want := p.directAnswers(t, 60, 3)
	for n := range 2 {
		p.answer(t, contextChat(60, n))
	}
	p.saved(t, 1)

	process := p.engine(t)
	url, killed := p.URL(), make(chan struct{})
	go func() { // ends when a file is being written, or nothing is saved
		defer close(killed)
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Microsecond) {
			if parts, _ := filepath.Glob(filepath.Join(p.StateDir(), "*.part")); len(parts) > 0 {
				break
			}
		}
		p.KillProxy()
	}()
	for n := 0; ; n++ { // prefixes that are worth saving, until the proxy is gone
		if _, err := chat.Send(t.Context(), p.client, url, contextChat(6000+n, 0)); err != nil {
			break
		}
	}
	<-killed
	if parts, _ := filepath.Glob(filepath.Join(p.StateDir(), "*.part")); len(parts) == 0 {
		t.Error("no save was met under way")
	}
	// A file of a save that an engine had only begun, unlike the one that was just interrupted.
	torn := filepath.Join(p.StateDir(), strings.Repeat("0", 32)+".part")
	if err := os.WriteFile(torn, []byte("ggsn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.StartProxy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if parts, _ := filepath.Glob(filepath.Join(p.StateDir(), "*.part")); len(parts) > 0 {
		t.Errorf("after a restart there is %q", parts)
	}
	p.logged(t, "not whole")
	if again := p.engine(t); again.PID != process.PID {
		t.Error("the engine has ended")
	}
	p.unload(t)
	var got string
	if n := cold(p.evaluated(t, 1, func() { got = p.answer(t, contextChat(60, 2)) })); n != 0 || got != want[2] {
		t.Errorf("%d prompts evaluated of the prefix that was saved before, answer %q, want %q", n, got, want[2])
	}
}

// contextsTwoProxies: of two proxies with one folder, the second runs without contexts, and says
// so.
func contextsTwoProxies(t *testing.T, version string) {
	p := startContexts(t, realollama.Config{Version: version})
	want := p.directAnswers(t, 65, 1)
	second := &contextsPair{
		Pair:   &linked.Pair{Server: p.Server, Proxy: startProxy(t, p.Server.URL(), "--contexts", p.Home).Process},
		client: p.client,
	}
	if got := second.answer(t, contextChat(65, 0)); got != want[0] {
		t.Errorf("answer %q, want %q", got, want[0])
	}
	second.logged(t, "stored contexts are off: another proxy has them")
}

// engine returns the one running engine.
func (p *contextsPair) engine(t testing.TB) engine.Process {
	t.Helper()
	all, err := engine.Processes(p.Home)
	if err != nil || len(all) != 1 {
		t.Fatalf("engines: %v, %v", all, err)
	}
	return all[0]
}

// contextsTorn: truncated, overwritten and missing states are reported and forgotten.
func contextsTorn(t *testing.T, version string) {
	p := startContexts(t, realollama.Config{Version: version})
	for i, tt := range []struct {
		kind string
		tear func(path string) error
		why  string // in the log
	}{
		{"cut off", func(path string) error { return os.Truncate(path, 1000) }, "it is torn"},
		{"gone", os.Remove, "its file is gone"},
		{"foreign", func(path string) error { // of the same size
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, make([]byte, info.Size()), 0o600)
		}, "the engine refused"},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			seed := 70 + i // of a prefix of its own, so that it has to be saved
			want, saved := p.directAnswers(t, seed, 4), p.metric(t, "saved_total")
			for n := range 2 {
				p.answer(t, contextChat(seed, n))
			}
			eventually(t, "saved", func() bool { return p.metric(t, "saved_total") > saved })
			p.unload(t)
			for _, path := range p.states(t) {
				if err := tt.tear(path); err != nil {
					t.Fatal(err)
				}
			}
			var got string
			n := cold(p.evaluated(t, 1, func() { got = p.answer(t, contextChat(seed, 3)) }))
			if n != 1 || got != want[3] {
				t.Errorf("%d prompts evaluated, want 1; answer %q, want %q", n, got, want[3])
			}
			p.logged(t, "stored context", tt.why)
		})
	}
}

// contextsEngineKilled: an engine stops answering the proxy, and is then killed.
func contextsEngineKilled(t *testing.T, version string) {
	p := startContexts(t, realollama.Config{Version: version, CacheRAMMiB: new(int)})
	want := p.directAnswers(t, 80, 3)
	for _, prefix := range []int{80, 80, 81} {
		p.answer(t, contextChat(prefix, 0))
	}
	p.saved(t, 2)
	process := p.engine(t)
	if err := syscall.Kill(process.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	answered := make(chan string, 1)
	go func() { answered <- p.answer(t, contextChat(80, 2)) }()
	eventually(t, "waiting for the engine", func() bool { return unread(t, process.Port) })
	if err := syscall.Kill(process.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := <-answered; got != want[2] {
		t.Errorf("answer %q, want %q", got, want[2])
	}
	// Everything continues as before.
	p.unload(t)
	if n := cold(p.evaluated(t, 1, func() { p.answer(t, contextChat(80, 1)) })); n != 0 {
		t.Error("the prefix was evaluated again")
	}
}

// unread reports whether data sent to a port of loopback has not been read yet.
func unread(t testing.TB, port int) bool {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	local := fmt.Sprintf("0100007F:%04X", port)
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && fields[1] == local && fields[3] == "01" { // established
			_, received, _ := strings.Cut(fields[4], ":")
			if strings.Trim(received, "0") != "" {
				return true
			}
		}
	}
	return false
}

// mountsEnv is set if the test runs in a new mount namespace.
const mountsEnv = "CACHEPROXY_TEST_MOUNTS"

// TestContextsDisk: a read-only folder, and a full disk. Each needs its own file system, so the
// test runs again in a namespace in which it may mount one.
func TestContextsDisk(t *testing.T) {
	if os.Getenv(mountsEnv) == "" {
		cmd := exec.CommandContext(t.Context(), "unshare", "--user", "--map-root-user", "--mount",
			os.Args[0], "-test.run=^TestContextsDisk$", "-test.v", "-test.timeout=5m")
		cmd.Env = append(os.Environ(), mountsEnv+"=1")
		cmd.WaitDelay = 5 * time.Second // what it leaves behind may have its output
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("in a mount namespace: %v\n%s", err, tail(string(out), 150))
		}
		return
	}
	for _, disk := range []struct {
		name    string
		flags   uintptr
		options string
		later   bool     // only once the engine has started
		words   []string // of the log's line about missing contexts
	}{
		{"read-only", syscall.MS_RDONLY, "size=64m", false, []string{"read-only file system"}},
		// (The proxy leaves 2 GiB of a disk free for others.)
		{"read-only later", syscall.MS_RDONLY, "size=4g", true, []string{"read-only file system"}},
		{"full", 0, "size=256k", false, []string{"the disk has no room"}},
	} {
		t.Run(disk.name, func(t *testing.T) {
			home := t.TempDir()
			dir := filepath.Join(home, "contexts")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			mount := func() {
				if err := syscall.Mount("tmpfs", dir, "tmpfs", disk.flags, disk.options+",mode=0700"); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { // lazily, since the proxy may still have it open
					if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
						t.Error(err)
					}
				})
			}
			if !disk.later {
				mount()
			}
			p := startContextsIn(t, home, realollama.Config{Version: realollama.Newest()})
			want := p.directAnswers(t, 90, 4)
			if disk.later {
				// A save that is under way during the mount may still go to the folder below, so
				// the test waits until there is none, and saves another prefix after it.
				p.answer(t, contextChat(91, 0))
				p.saved(t, 1)
				// Over the folder: a mount with files open for writing cannot be made read-only.
				mount()
			}
			for n := range 3 {
				if got := p.answer(t, contextChat(90, n)); got != want[n] {
					t.Errorf("answer %d: %q, want %q", n, got, want[n])
				}
			}
			p.logged(t, disk.words...)
			p.unload(t)
			if got := p.answer(t, contextChat(90, 3)); got != want[3] {
				t.Errorf("answer after an unload: %q, want %q", got, want[3])
			}
			if n := p.logged(t, disk.words...); n > 2 { // at the start, and at the first save
				t.Errorf("it was told %d times", n)
			}
			status, _, text := get(t, p.URL()+"/_cacheproxy/health")
			if status != http.StatusOK {
				t.Errorf("the proxy's health: %d %s", status, text)
			}
		})
	}
}
