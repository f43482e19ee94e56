package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// resident returns the bytes of heap that the process holds from the system.
func resident() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapSys - m.HeapReleased)
}

// TestDefaultMemory: a quarter of the machine's memory, or of the cgroup's limit if that is less.
func TestDefaultMemory(t *testing.T) {
	gib := func(n uint64) memlimit.Provider { return memlimit.Limit(n << 30) }
	none := func() (uint64, error) { return 0, memlimit.ErrNoLimit }
	for _, at := range []struct {
		machine, cgroup memlimit.Provider
		want            int64
	}{{gib(8), none, 2 << 30}, {gib(8), gib(4), 1 << 30}, {gib(4), gib(8), 1 << 30}, {none, gib(4), 1 << 30}, {gib(8), memlimit.Limit(1 << 20), proxy.MemoryLeast}} {
		if got := defaultMemory(at.machine, at.cgroup); got != at.want {
			t.Errorf("%d, want %d", got, at.want)
		}
	}
	if got := defaultMemory(memlimit.FromSystem, memlimit.FromCgroup); got > 1<<50 {
		t.Errorf("%d: the limits of this machine are unknown", got)
	}
}

// TestMemoryGivenBack: within 60 s after a load its memory is returned to the system, even if some
// client keeps using a little.
func TestMemoryGivenBack(t *testing.T) {
	const requests, length = 64, 4 << 20
	var came sync.WaitGroup
	came.Add(requests)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, _ := io.Copy(io.Discard, r.Body); n > length {
			came.Done()
			came.Wait() // all are there at once, however few of them a busy machine begins at a time
		}
		io.WriteString(w, "{}")
	}))
	defer up.Close()
	u, err := upstream.ParseAddr(up.URL, "")
	if err != nil {
		t.Fatal(err)
	}
	transport := proxy.NewTransport()
	defer transport.CloseIdleConnections()
	h := &proxy.Handler{Upstreams: []*upstream.Server{upstream.NewServer("u", u, transport, slog.New(slog.DiscardHandler))}, Transport: transport}
	h.Init()
	text := bytes.Repeat([]byte("x"), length)
	runtime.GC()
	before := resident()
	var wg sync.WaitGroup
	for range requests {
		wg.Go(func() {
			body := io.MultiReader(bytes.NewReader([]byte(`{"model":"m","prompt":"`)), bytes.NewReader(text), bytes.NewReader([]byte(`"}`)))
			r := httptest.NewRequest("POST", "http://localhost/api/generate", body)
			h.ServeHTTP(httptest.NewRecorder(), r)
		})
	}
	wg.Wait()
	loaded := resident() - before
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { trim(ctx, transport); close(done) }() // ends with stop
		used := make([][]byte, 40)
		for i := range 60 {
			time.Sleep(time.Second)
			used[i%len(used)] = fmt.Append(nil, i) // of the client that is still there
		}
		stop()
		<-done
	})
	left := resident() - before
	t.Logf("%d MiB more after the load, %d MiB a minute later", loaded>>20, left>>20)
	if loaded < 64<<20 || left > 16<<20 {
		t.Error("it was not given back")
	}
}
