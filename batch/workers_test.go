//go:build unix

package batch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
)

// asked counts how often each request was sent.
type asked struct {
	mu    sync.Mutex
	times map[string]int
}

func (a *asked) add(user string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.times == nil {
		a.times = map[string]int{}
	}
	a.times[user]++
}

// reset forgets them.
func (a *asked) reset() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.times = nil
}

// sum returns how often the request was sent that was sent most often, and how many were sent in all.
func (a *asked) sum() (most, all int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range a.times {
		most, all = max(most, n), all+n
	}
	return most, all
}

// counting is a server that counts what it is asked, and refuses item 7. ask, if non-nil, is called
// with each request.
func counting(t testing.TB, count *asked, ask func(r *http.Request, user string)) string {
	return serve(t, &fake{ask: func(w http.ResponseWriter, r *http.Request, user string) bool {
		count.add(user)
		if ask != nil {
			ask(r, user)
		}
		if user == "item 7" {
			w.WriteHeader(http.StatusBadRequest)
			return true
		}
		return false
	}})
}

// sharing returns c as one of several workers, with an output of its own; "-": none.
func sharing(t testing.TB, c Config, url, output string, lease time.Duration) Config {
	t.Helper()
	c.Workers = &Workers{URL: url, Bytes: 1 << 20, lease: lease}
	c.WaitForServer = time.Minute
	if c.Output = output; output != "-" {
		c.Output = filepath.Join(t.TempDir(), output)
	}
	return c
}

// together runs workers to their ends, and returns their errors.
func together(ctx context.Context, all ...Config) []error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, c := range all {
		wg.Go(func() { _, errs[i] = Run(ctx, c) })
	}
	wg.Wait()
	return errs
}

// TestWorkers: three workers share a batch, of which two write outputs. Each request is sent once,
// and the outputs are those of one worker without the others.
func TestWorkers(t *testing.T) {
	var count asked
	var hold atomic.Bool
	seen := make(chan struct{})
	server := counting(t, &count, func(r *http.Request, user string) {
		if hold.Load() && user == "item 200" { // a worker that comes when all is answered may see none
			select {
			case <-seen:
			case <-r.Context().Done():
			}
		}
	})
	const n = 300
	alone := config(t, server, numbered(n)+"nonsense\n")
	alone.Window = 100 // of which there are four
	_, want := run(t, alone)
	count.reset()
	store := valkeyserver.Start(t)
	ignored := goleak.IgnoreCurrent()
	outputs := []Config{}
	var wg, see sync.WaitGroup
	hold.Store(true)
	for _, output := range []string{"a", "b", "-"} {
		c := sharing(t, alone, store.URL(), output, jobLease)
		if output != "-" {
			outputs = append(outputs, c)
		}
		see.Add(1)
		sees := sync.OnceFunc(see.Done)
		c.Progress = func(p Progress) {
			if p.Workers >= 1 {
				sees()
			}
		}
		wg.Go(func() {
			defer sees() // it failed
			s, err := Run(t.Context(), c)
			if err != nil || s.Requests != n+1 || s.Succeeded != n-1 || s.Failed != 2 {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
	see.Wait()
	close(seen)
	wg.Wait()
	alone.Transport.(*http.Transport).CloseIdleConnections()
	goleak.VerifyNone(t, ignored)
	for _, c := range outputs {
		if got := read(t, c.Output); got != want {
			t.Errorf("%d bytes, want %d", len(got), len(want))
		}
	}
	if most, sent := count.sum(); most != 1 || sent != n {
		t.Errorf("%d requests sent, one of them %d times; want %d, each once", sent, most, n)
	}
	// A worker that comes later has the output without sending anything.
	late := sharing(t, alone, store.URL(), "late", jobLease)
	if s, got := run(t, late); got != want || s.Resumed != n+1 {
		t.Errorf("the late worker has %d bytes, want %d; %+v", len(got), len(want), s)
	}
	if _, sent := count.sum(); sent != n {
		t.Errorf("%d requests sent, want %d", sent, n)
	}
	status, err := LookAtJob(t.Context(), &late)
	if err != nil || status.Answered != n+1 || status.Requests != n+1 || status.Held == 0 || status.Dropped != 0 ||
		len(status.Workers) != 0 || status.Kept > jobEnded || status.Kept <= 0 {
		t.Errorf("%+v, %v", status, err)
	}
	for _, want := range []error{nil, ErrNoJob} {
		if name, err := DropJob(t.Context(), &late); !errors.Is(err, want) || name != status.Name {
			t.Errorf("%s, %v; want %s, %v", name, err, status.Name, want)
		}
	}
	if status, err := LookAtJob(t.Context(), &late); !errors.Is(err, ErrNoJob) {
		t.Errorf("%+v, %v", status, err)
	}
}

// TestWorkersGiveBack: what a worker has begun when it is told to stop is there for others at once:
// the lease is an hour.
func TestWorkersGiveBack(t *testing.T) {
	var count asked
	var held atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	const atOnce = 4
	first := counting(t, &count, func(r *http.Request, _ string) {
		n := held.Add(1)
		if n == 20+atOnce { // so many have come, and are answered as long as the worker is not stopped
			stop()
		}
		if n > 20 {
			<-r.Context().Done()
		}
	})
	const n = 200
	store := valkeyserver.Start(t)
	c := sharing(t, config(t, first, numbered(n)), store.URL(), "a", time.Hour)
	c.Concurrency = atOnce
	if _, err := Run(ctx, c); !errors.Is(err, ErrStopped) {
		t.Fatal(err)
	}
	second := counting(t, &count, nil)
	other := over(t, second, c.Source, "")
	other = sharing(t, other, store.URL(), "b", time.Hour)
	s, err := Run(t.Context(), other)
	if err != nil || s.Resumed != 20 {
		t.Fatalf("%+v, %v", s, err)
	}
	if lines := results(t, read(t, other.Output)); len(lines) != n {
		t.Errorf("%d results, want %d", len(lines), n)
	}
	if most, sent := count.sum(); most != 2 || sent != n+atOnce {
		t.Errorf("%d requests sent, one of them %d times; want %d", sent, most, n+atOnce)
	}
}

// TestWorkersKill: three workers, each with an output, are killed at any moment and started again.
// In the end all outputs are those of an uninterrupted batch, and at most what was under way at each
// kill was sent again.
func TestWorkersKill(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var count asked
	var kill atomic.Pointer[func()]
	server := counting(t, &count, func(*http.Request, string) {
		if k := kill.Load(); k != nil {
			(*k)()
		}
	})
	const n, workers, atOnce = 400, 3, 6
	dir := t.TempDir()
	in := filepath.Join(dir, "in.jsonl")
	write(t, in, numbered(n)+"nonsense\n")
	store := valkeyserver.Start(t)
	command := func(out string, more ...string) *exec.Cmd {
		cmd := exec.Command(exe, append([]string{server, in, filepath.Join(dir, out), string(InputOrder)}, more...)...)
		cmd.Env = append(os.Environ(), "BATCH_CHILD=1")
		return cmd
	}
	if text, err := command("whole").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	count.reset()
	var killed atomic.Int64
	var wg sync.WaitGroup
	left := new(atomic.Int64) // requests until the next kill
	left.Store(30)
	victims := make(chan int)
	k := func() {
		if left.Add(-1) == 0 {
			victims <- rand.IntN(workers)
		}
	}
	kill.Store(&k)
	var running [workers]atomic.Pointer[exec.Cmd]
	done := make(chan struct{})
	go func() {
		for victim := range victims {
			if cmd := running[victim].Load(); cmd != nil {
				cmd.Process.Kill() // it fails if the process has ended
			}
			left.Store(20 + rand.Int64N(40))
		}
		close(done)
	}()
	for i := range workers {
		wg.Go(func() {
			for {
				cmd := command(fmt.Sprint("out", i), store.URL())
				var text strings.Builder
				cmd.Stderr = &text
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				running[i].Store(cmd)
				cmd.Wait()
				if cmd.ProcessState.ExitCode() != -1 {
					if !cmd.ProcessState.Success() {
						t.Errorf("worker %d: %v\n%s", i, cmd.ProcessState, text.String())
					}
					return
				}
				killed.Add(1)
			}
		})
	}
	wg.Wait()
	kill.Store(nil)
	close(victims)
	<-done
	if killed.Load() < 4 {
		t.Errorf("only %d were killed", killed.Load())
	}
	for i := range workers {
		for _, file := range []string{"", ".errors"} {
			if got, want := read(t, filepath.Join(dir, fmt.Sprint("out", i, file))), read(t, filepath.Join(dir, "whole"+file)); got != want {
				t.Errorf("output %d%s has %d bytes, want %d", i, file, len(got), len(want))
			}
		}
	}
	// Besides those at the server, answers that have come and are not yet in Valkey are under way.
	const most = 3 * atOnce
	_, sent := count.sum()
	t.Logf("%d kills, %d of %d requests sent again", killed.Load(), sent-n, n)
	if sent < n || sent > n+int(killed.Load())*most {
		t.Errorf("%d requests sent for %d, with %d kills", sent, n, killed.Load())
	}
}

// persistent are the arguments of a server that keeps its data in a folder.
func persistent(t testing.TB) []string {
	return []string{"--dir", t.TempDir(), "--appendonly", "yes", "--appendfsync", "always"}
}

// TestWorkersValkeyAway: the Valkey server is killed in the middle, and comes back with its data.
// The workers wait for it, and nothing is sent twice.
func TestWorkersValkeyAway(t *testing.T) {
	var count asked
	reached := make(chan struct{})
	var once sync.Once
	server := counting(t, &count, func(_ *http.Request, user string) {
		if user == "item 60" {
			once.Do(func() { close(reached) })
		}
	})
	const n = 200
	alone := config(t, server, numbered(n))
	_, want := run(t, alone)
	count.reset()
	reached, once = make(chan struct{}), sync.Once{}
	store := valkeyserver.Start(t, persistent(t)...)
	waited := make(chan struct{}, 1)
	a, b := sharing(t, alone, store.URL(), "a", longerLease), sharing(t, alone, store.URL(), "-", longerLease)
	a.Progress = func(p Progress) {
		if p.Waiting {
			select {
			case waited <- struct{}{}:
			default:
			}
		}
	}
	errs := make(chan []error, 1)
	go func() { errs <- together(t.Context(), a, b) }()
	<-reached
	store.Kill()
	<-waited
	store.Restart()
	if errs := <-errs; errs[0] != nil || errs[1] != nil {
		t.Fatal(errs)
	}
	if got := read(t, a.Output); got != want {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
	if most, sent := count.sum(); most != 1 || sent != n {
		t.Errorf("%d requests sent, one of them %d times; want %d, each once", sent, most, n)
	}
}

// TestWorkersValkeyLost: the Valkey server comes back without its data. All workers end with an error
// that says what to do, what they have written is right, and each output can be finished alone.
func TestWorkersValkeyLost(t *testing.T) {
	var count asked
	reached, goOn := make(chan struct{}), make(chan struct{})
	hold := atomic.Bool{}
	server := counting(t, &count, func(_ *http.Request, user string) {
		if user == "item 100" && hold.Swap(false) { // also if it is sent again, to another worker's account
			close(reached)
			<-goOn
		}
	})
	alone := config(t, server, numbered(200))
	_, want := run(t, alone)
	hold.Store(true)
	store := valkeyserver.Start(t)
	a, b := sharing(t, alone, store.URL(), "a", shortLease), sharing(t, alone, store.URL(), "b", shortLease)
	errs := make(chan []error, 1)
	go func() { errs <- together(t.Context(), a, b) }()
	<-reached
	// One that only begins now would take the empty server for that of a new batch.
	valkeyserver.Until(t, "both have written something", func() bool {
		return !slices.ContainsFunc([]Config{a, b}, func(c Config) bool {
			info, err := os.Stat(c.Output)
			return err != nil || info.Size() == 0
		})
	})
	store.Kill()
	store.Restart()
	close(goOn)
	for _, err := range <-errs {
		if !errors.Is(err, errJobLost) {
			t.Fatal(err)
		}
	}
	for _, c := range []Config{a, b} {
		if got := read(t, c.Output); !strings.HasPrefix(want, got) || got == "" || got == want {
			t.Errorf("%d bytes, which are not the first of %d", len(got), len(want))
		}
		if _, err := Run(t.Context(), c); !errors.Is(err, errChanged) {
			t.Errorf("the same command: %v", err)
		}
		c.Workers = nil
		if _, got := run(t, c); got != want {
			t.Errorf("alone: %d bytes, want %d", len(got), len(want))
		}
	}
}

// TestWorkersValkeyOld: the Valkey server comes back with the data of a moment before. What it has
// forgotten, windows of the plan too, is sent again, and all outputs are complete.
func TestWorkersValkeyOld(t *testing.T) {
	var count asked
	var hold atomic.Bool
	reached, goOn := make(chan struct{}), make(chan struct{})
	store := valkeyserver.Start(t, "--dir", t.TempDir())
	c := store.Client(t)
	server := counting(t, &count, func(_ *http.Request, user string) {
		switch {
		case hold.Load() && user == "item 40":
			if err := c.Do(t.Context(), c.B().Arbitrary("SAVE").Build()).Error(); err != nil {
				t.Error(err)
			}
		case user == "item 100" && hold.Swap(false):
			close(reached)
			<-goOn
		}
	})
	const n = 200
	alone := config(t, server, numbered(n))
	alone.Concurrency, alone.Window = 1, 20
	_, want := run(t, alone)
	count.reset()
	hold.Store(true)
	a, b := sharing(t, alone, store.URL(), "a", longerLease), sharing(t, alone, store.URL(), "b", longerLease)
	errs := make(chan []error, 1)
	go func() { errs <- together(t.Context(), a) }()
	<-reached
	store.Kill()
	store.Restart()
	close(goOn)
	if errs := append(together(t.Context(), b), <-errs...); errs[0] != nil || errs[1] != nil {
		t.Fatal(errs)
	}
	for _, c := range []Config{a, b} {
		if got := read(t, c.Output); got != want {
			t.Errorf("%d bytes, want %d", len(got), len(want))
		}
	}
	if most, sent := count.sum(); most != 2 || sent <= n || sent > n+100 {
		t.Errorf("%d requests sent, one of them %d times", sent, most)
	}
}

// TestWorkersFull: the server keeps a few answers only. What an output has taken is dropped, so the
// batch comes to its end, and a worker that comes too late for an output is told so.
func TestWorkersFull(t *testing.T) {
	var count asked
	server := counting(t, &count, nil)
	alone := config(t, server, numbered(150))
	_, want := run(t, alone)
	store := valkeyserver.Start(t)
	var all []Config
	for _, output := range []string{"a", "-", "late", "-"} {
		c := sharing(t, alone, store.URL(), output, shortLease)
		c.Workers.Bytes = 10_000
		all = append(all, c)
	}
	if errs := together(t.Context(), all[0], all[1]); errs[0] != nil || errs[1] != nil {
		t.Fatal(errs)
	}
	if got := read(t, all[0].Output); got != want {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
	status, err := LookAtJob(t.Context(), &all[0])
	if err != nil || status.Dropped == 0 || status.Held > 10_000 {
		t.Errorf("%+v, %v", status, err)
	}
	_, err = Run(t.Context(), all[2])
	if err == nil || !strings.Contains(err.Error(), "were dropped from the Valkey server") {
		t.Error(err)
	}
	if _, err := Run(t.Context(), all[3]); err != nil {
		t.Error(err)
	}
	// Without an output nothing may be dropped.
	all[3].Workers.Job, all[3].WaitForServer = "other", 100*time.Millisecond
	if _, err := Run(t.Context(), all[3]); !errors.Is(err, errJobFull) {
		t.Error(err)
	}
}

// TestWorkersOllamaAway: a worker whose Ollama does not answer any more leaves what it has begun to
// another, and ends by itself.
func TestWorkersOllamaAway(t *testing.T) {
	var count asked
	var away atomic.Bool
	broken := &fake{
		get: func(w http.ResponseWriter, r *http.Request) bool {
			if away.Load() {
				panic(http.ErrAbortHandler)
			}
			return false
		},
		ask: func(_ http.ResponseWriter, _ *http.Request, user string) bool {
			count.add(user)
			if _, all := count.sum(); all > 20 {
				away.Store(true)
				panic(http.ErrAbortHandler)
			}
			return false
		},
	}
	const n = 100
	store := valkeyserver.Start(t)
	a := sharing(t, config(t, serve(t, broken), numbered(n)), store.URL(), "-", shortLease)
	a.Concurrency = 4
	away20 := make(chan struct{})
	var once sync.Once
	a.Progress = func(p Progress) {
		if away.Load() {
			once.Do(func() { close(away20) })
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := Run(ctx, a)
		ended <- err
	}()
	<-away20
	b := sharing(t, over(t, counting(t, new(asked), nil), a.Source, ""), store.URL(), "b", shortLease)
	_, got := run(t, b)
	if lines := results(t, got); len(lines) != n {
		t.Errorf("%d results, want %d", len(lines), n)
	}
	// All is answered, so it ends although its Ollama is still away.
	if err := <-ended; err != nil {
		t.Error(err)
	}
	stop()
}

// TestWorkersRefused: what cannot be shared is refused before anything is sent.
func TestWorkersRefused(t *testing.T) {
	var count asked
	server := counting(t, &count, nil)
	store := valkeyserver.Start(t)
	first, other := config(t, server, numbered(3)), config(t, server, numbered(4))
	begun := sharing(t, first, store.URL(), "a", jobLease)
	begun.Workers.Job = "one"
	if _, err := Run(t.Context(), begun); err != nil {
		t.Fatal(err)
	}
	_, before := count.sum()
	key := filepath.Join(t.TempDir(), "key")
	write(t, key, "a key of 16 bytes or more")
	for want, change := range map[string]func(c *Config){
		"another input":     func(c *Config) { c.Source = other.Source },
		"does not answer":   func(c *Config) { c.Workers.URL, c.WaitForServer = "valkey://127.0.0.1:1", 0 },
		"DB index":          func(c *Config) { c.Workers.URL += "/4711" },
		"WRONGPASS":         func(c *Config) { c.Workers.URL = strings.Replace(c.Workers.URL, "//", "//someone:secret@", 1) },
		"not a URL":         func(c *Config) { c.Workers.URL = "valkey://a:secret@host:b ad" },
		"want valkey://":    func(c *Config) { c.Workers.URL = "http://host" },
		"hide nothing":      func(c *Config) { c.Workers.URL += "?secret-file=" + key },
		"without --workers": func(c *Config) { c.Output, c.Workers.Job = begun.Output, "two" },
		"--job-bytes 0":     func(c *Config) { c.Workers.Bytes = 0 },
		"is being written":  func(c *Config) {},
	} {
		c := sharing(t, first, store.URL(), "b", jobLease)
		c.Workers.Job = "one"
		if change(&c); want == "is being written" {
			f, err := os.Create(c.Output)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := lock(f); err != nil {
				t.Fatal(err)
			}
		}
		err := c.Workers.Check()
		if err == nil {
			_, err = Run(t.Context(), c)
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret@") {
			t.Errorf("want %s: %v", want, err)
		}
	}
	if _, after := count.sum(); after != before {
		t.Errorf("%d requests were sent", after-before)
	}
}

// TestWorkersTLS: workers share a batch over TLS, with keys that begin as the URL says. A certificate
// that is not believed ends the batch, which would wait for a server that is away.
func TestWorkersTLS(t *testing.T) {
	var count asked
	const n = 40
	alone := config(t, counting(t, &count, nil), numbered(n))
	store := valkeyserver.StartTLS(t)
	a := sharing(t, alone, store.URL()+"/1?prefix=ours:&ca-file="+store.Authority(), "a", jobLease)
	b := sharing(t, alone, a.Workers.URL, "b", jobLease)
	if errs := together(t.Context(), a, b); errs[0] != nil || errs[1] != nil {
		t.Fatal(errs)
	}
	if most, sent := count.sum(); most != 1 || sent != n || read(t, a.Output) != read(t, b.Output) {
		t.Errorf("%d requests sent, one of them %d times; or the outputs differ", sent, most)
	}
	c := store.Client(t)
	for key, want := range map[string]int64{"ours:{" + a.Workers.name(alone.Source.fingerprint()) + "}:job": 1, "x": 0} {
		all := c.DoMulti(t.Context(), c.B().Select().Index(1).Build(), c.B().Exists().Key(key).Build())
		if got, err := all[1].AsInt64(); err != nil || got != want {
			t.Errorf("%d keys %s, %v; want %d", got, key, err, want)
		}
	}
	a.Workers.URL = store.URL()
	if _, err := Run(t.Context(), a); err == nil || !strings.Contains(err.Error(), "is not believed (check the host and ca-file in --workers)") {
		t.Error(err)
	}
}

// TestWorkersEvicted: a server that may evict the job is warned of.
func TestWorkersEvicted(t *testing.T) {
	store := valkeyserver.Start(t, "--maxmemory", "50mb", "--maxmemory-policy", "volatile-lru")
	var log strings.Builder
	c := sharing(t, config(t, counting(t, new(asked), nil), numbered(1)), store.URL(), "a", jobLease)
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	run(t, c)
	if !strings.Contains(log.String(), "evicts keys when it is full") {
		t.Error(log.String())
	}
}

// TestSpans: the items of a window are all in its spans, in their order, and a prefix that fits into
// half of a span is not cut.
func TestSpans(t *testing.T) {
	const prefixes, each = 60, 11
	c := config(t, "http://127.0.0.1:1", interleaved(prefixes, each, 300))
	w := newWindow(c.Source, prefixes*each, func(int) bool { return false })
	defer w.stop()
	if err := w.fill(); err != nil {
		t.Fatal(err)
	}
	want := slices.Clone(w.items)
	var got []item
	groups := map[int]int{} // in how many spans the items of a prefix are
	for _, value := range spans(w.items, mostInSpan*spansAtBest) {
		items, err := decodeSpan(value, prefixes*each, c.Source.size)
		if err != nil {
			t.Fatal(err)
		}
		here := map[int]bool{}
		for _, it := range items {
			here[it.index%prefixes] = true
		}
		for group := range maps.Keys(here) {
			groups[group]++
		}
		got = append(got, items...)
	}
	for i := range want {
		want[i].shared = 0
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d items, want %d", len(got), len(want))
	}
	for group, n := range groups {
		if n != 1 {
			t.Errorf("prefix %d is in %d spans", group, n)
		}
	}
}
