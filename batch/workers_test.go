//go:build unix

package batch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
)

// asked counts how often each request was sent.
type asked struct {
	mu    sync.Mutex
	times map[string]int
}

func (a *asked) add(user string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.times == nil {
		a.times = map[string]int{}
	}
	a.times[user]++
	return a.times[user]
}

// most returns the most often sent request, and how many were sent in all.
func (a *asked) sum() (most, all int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range a.times {
		most, all = max(most, n), all+n
	}
	return most, all
}

// sharing returns c as one of several workers, with an output of its own; "-": none.
func sharing(t testing.TB, c Config, url, output string) Config {
	t.Helper()
	c.Workers = &Workers{URL: url, Bytes: 1 << 20, lease: 300 * time.Millisecond}
	c.WaitForServer = time.Minute
	if c.Output = output; output != "-" {
		c.Output = filepath.Join(t.TempDir(), output)
	}
	return c
}

// TestWorkers: three workers share a batch, of which two write outputs. Each request is sent once,
// and the outputs are those of one worker without the others.
func TestWorkers(t *testing.T) {
	var count asked
	server := serve(t, &fake{ask: func(w http.ResponseWriter, _ *http.Request, user string) bool {
		count.add(user)
		if user == "item 7" {
			w.WriteHeader(http.StatusBadRequest)
			return true
		}
		return false
	}})
	const n = 300
	alone := config(t, server, numbered(n)+"nonsense\n")
	alone.Window = 100
	_, want := run(t, alone)
	count.times = nil
	valkey := valkeyserver.Start(t)
	outputs := []string{"a", "b", "-"}
	var all []Config
	var wg sync.WaitGroup
	for _, output := range outputs {
		c := sharing(t, alone, valkey.URL(), output)
		c.Log = testLog(t)
		all = append(all, c)
		wg.Go(func() {
			s, err := Run(t.Context(), c)
			if err != nil {
				t.Error(err)
				return
			}
			if s.Requests != n+1 || s.Succeeded != n-1 || s.Failed != 2 {
				t.Errorf("%+v", s)
			}
		})
	}
	wg.Wait()
	for _, c := range all[:2] {
		if got := read(t, c.Output); got != want {
			t.Errorf("%d bytes, want %d", len(got), len(want))
		}
	}
	if most, sent := count.sum(); most != 1 || sent != n {
		t.Errorf("%d requests sent, one of them %d times; want %d, each once", sent, most, n)
	}
	// A worker that comes later has the output without sending anything.
	late := sharing(t, alone, valkey.URL(), "late")
	if _, got := run(t, late); got != want {
		t.Errorf("the late worker has %d bytes, want %d", len(got), len(want))
	}
	if _, sent := count.sum(); sent != n {
		t.Errorf("%d requests sent, want %d", sent, n)
	}
	_ = errors.Is
	_ = context.Canceled
	_ = fmt.Sprint
}

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, nil))
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}
