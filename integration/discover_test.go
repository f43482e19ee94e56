package integration

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/discover/dnstest"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestDiscovered: while clients ask, DNS lists a second server, and then no longer the first one,
// which is stopped. Each server gets requests while it is listed and none afterwards, and no request
// fails. When DNS lists nothing any more, the last known server stays.
func TestDiscovered(t *testing.T) {
	const model = "gen-llama-tiny"
	servers := map[string]*realollama.Server{}
	records := map[string][]string{}
	for _, name := range []string{"one", "two"} {
		servers[name] = realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{model}})
		host, port, err := net.SplitHostPort(servers[name].Addr())
		if err != nil {
			t.Fatal(err)
		}
		records[name] = []string{"_ollama._tcp.test. 1 IN SRV 0 0 " + port + " " + name + ".test.", name + ".test. 1 IN A " + host}
	}
	upstream := func(name string) string {
		return "found-" + strings.ReplaceAll(servers[name].Addr(), ":", "-")
	}
	dns := dnstest.Start(t, records["one"]...)
	p := startProxy(t, "found=srv:_ollama._tcp.test.?resolver="+dns.Addr)

	var mu sync.Mutex
	from := map[string]int{} // answers by upstream
	ask := func(n int) {
		body, err := json.Marshal(map[string]any{
			"model": model, "stream": false, "options": map[string]any{"temperature": 0, "num_predict": 32},
			"messages": []map[string]string{{"role": "system", "content": words(uint64(n%20), 100)}, {"role": "user", "content": words(uint64(100+n), 5)}},
		})
		if err != nil {
			t.Error(err)
			return
		}
		res, err := http.Post(p.URL+"/api/chat", "application/json", bytes.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		defer res.Body.Close()
		if text, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusOK || !bytes.Contains(text, []byte(`"done":true`)) {
			t.Errorf("request %d: %s, %s, %v", n, res.Status, text, err)
		}
		mu.Lock()
		defer mu.Unlock()
		from[res.Header.Get("X-Cacheproxy-Upstream")]++
	}
	// listed returns the names on the page of the upstreams.
	listed := func() (names []string) {
		_, _, text := get(t, p.URL+"/_cacheproxy/upstreams")
		var page struct{ Upstreams []struct{ Name string } }
		if err := json.Unmarshal([]byte(text), &page); err != nil {
			t.Fatal(err)
		}
		for _, u := range page.Upstreams {
			names = append(names, u.Name)
		}
		return names
	}
	until := func(what string, so func() bool) {
		t.Helper()
		for limit := time.Now().Add(2 * time.Minute); !so(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(limit) || t.Failed() {
				mu.Lock()
				defer mu.Unlock()
				t.Fatalf("%s: %v are listed, and the answers came from %v", what, listed(), from)
			}
		}
	}
	answered := func(name string, n int) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return from[upstream(name)] >= n
		}
	}

	until("the first server is found", func() bool { return slices.Equal(listed(), []string{upstream("one")}) })
	var asked atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	end := sync.OnceFunc(func() {
		close(stop)
		wg.Wait()
	})
	defer end()
	for range 8 { // enough that some wait, however slow this process is beside the servers
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					ask(int(asked.Add(1)))
				}
			}
		})
	}
	until("it answers", answered("one", 10))
	dns.Set(t, append(records["one"], records["two"]...)...)
	until("the second one answers", answered("two", 10))
	dns.Set(t, records["two"]...)
	until("the first one is gone", func() bool { return slices.Equal(listed(), []string{upstream("two")}) })
	mark := servers["one"].Mark()
	mu.Lock()
	before := from[upstream("two")]
	mu.Unlock()
	dns.Set(t)
	until("lookups fail", func() bool { return strings.Contains(p.Log(), "addresses cannot be looked up") })
	until("the second one goes on", answered("two", before+10))
	if begun := servers["one"].Begun(mark); len(begun) > 0 {
		t.Errorf("the first server got %d requests after it was gone", len(begun))
	}
	if err := servers["one"].Stop(); err != nil {
		t.Error(err)
	}
	until("the second one goes on alone", answered("two", before+20))
	end()
	if n := from[upstream("one")] + from[upstream("two")]; len(from) != 2 || n != int(asked.Load()) {
		t.Errorf("%d requests; the answers came from %v", asked.Load(), from)
	}
	t.Logf("%d requests without an error; answers: %v", asked.Load(), from)
}
