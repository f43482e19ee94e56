package proxy

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// TestEmbeddingsBehindArrays: a request for one vector does not wait for the inputs of large ones.
func TestEmbeddingsBehindArrays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		held := make(chan struct{})
		d.change = func(r *http.Request, texts []string, _ int, _ []float32) {
			if strings.HasPrefix(texts[0], "slow") {
				select {
				case <-held:
				case <-r.Context().Done():
				}
			}
		}
		var wg sync.WaitGroup
		for i := range 2 * partsOfModel / partsAtOnce {
			wg.Go(func() {
				var texts []string
				for k := range 2 * partsAtOnce {
					texts = append(texts, fmt.Sprint("slow ", i, " ", k))
				}
				if a := d.ask("/api/embed", embedBody(texts, "")); a.status != http.StatusOK {
					t.Errorf("array %d: %d %s", i, a.status, a.body)
				}
			})
		}
		time.Sleep(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if a := d.send(ctx, "http://proxy", "/api/embed", embedBody("quick", "")); a.status != http.StatusOK {
			t.Errorf("while arrays are being embedded: %d %s %v", a.status, a.body, a.err)
		}
		close(held)
		wg.Wait()
		if one, other := d.h.vectors.room("m:latest"), d.h.vectors.room("n:latest"); one == other {
			t.Error("the models share their slots")
		}
	})
}

// TestEmbeddingsAway: while the server is away an array waits for it as one request, not as one for
// each of its inputs, and is answered when it is back.
func TestEmbeddingsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, func(h *Handler) {
			keys, err := ParseKeys("few k1 max-waiting=2\n")
			if err != nil {
				t.Fatal(err)
			}
			h.Guard.Keys = keys
			h.Upstreams[0].TryDuration = time.Minute
		})
		var texts []string
		for i := range 2 * partsAtOnce {
			texts = append(texts, fmt.Sprint("chunk ", i))
		}
		d.mu.Lock()
		d.gone = true
		d.mu.Unlock()
		time.Sleep(30 * time.Second) // it is found to be away
		var wg sync.WaitGroup
		wg.Go(func() {
			a := d.ask("/api/embed", embedBody(texts, ""), "Authorization: Bearer k1")
			if a.status != http.StatusOK {
				t.Errorf("%d %s", a.status, a.body)
			}
		})
		time.Sleep(time.Second)
		if n := d.h.awaiting.Load(); n != 1 {
			t.Errorf("%d requests wait, want 1", n)
		}
		d.mu.Lock()
		d.gone = false
		d.mu.Unlock()
		wg.Wait()
	})
}

// TestEmbeddingsSlowList: a server that does not list its models in time delays one request, not all.
func TestEmbeddingsSlowList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		d.ask("/api/embed", embedBody("a", ""))
		d.reached()
		d.mu.Lock()
		d.lists = 10 * time.Second
		d.mu.Unlock()
		time.Sleep(2 * listedMost)
		began := time.Now()
		for i := range 10 {
			if a := d.ask("/api/embed", embedBody(fmt.Sprint("b", i), "")); a.status != http.StatusOK {
				t.Errorf("%d %s", a.status, a.body)
			}
		}
		if took := time.Since(began); took > 2*listedWait {
			t.Errorf("ten requests took %v of virtual time", took)
		}
	})
}

// TestEmbeddingsRenewed: no-cache has an input embedded again, and that vector is kept.
func TestEmbeddingsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := answers.NewMemory(answers.Limits{Bytes: 1 << 20})
		d := newIdeal(t, store, nil)
		d.ask("/api/embed", embedBody("a", ""), "Cache-Control: no-cache")
		d.reached()
		if a := d.ask("/api/embed", embedBody("a", "")); !a.hit() {
			t.Errorf("after a request with no-cache: %v", a.header)
		}
	})
}

// TestSurvivorShared: who removes an answer that goes on by itself does not end it for another client
// that has joined it.
func TestSurvivorShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, nil)
		body := strings.Replace(coldChat("x", ""), `"num_predict":8`, `"num_predict":200`, 1)
		where := lib.ask("/api/chat", body, "Prefer: respond-async").header.Get("Location")
		var wg sync.WaitGroup
		wg.Go(func() {
			if a := lib.ask("/api/chat", body); !strings.Contains(a.body, `"done":true`) {
				t.Errorf("the other client's answer: %d %q %v", a.status, a.body, a.err)
			}
		})
		synctest.Wait()
		if gone := lib.send(t.Context(), http.MethodDelete, where, ""); gone.status != http.StatusOK {
			t.Errorf("removing it: %d %s", gone.status, gone.body)
		}
		wg.Wait()
		if n := lib.computed(); n != 1 {
			t.Errorf("computed %d times", n)
		}

		// Alone, it ends.
		where = lib.ask("/api/chat", strings.Replace(body, `"x"`, `"y"`, 1), "Prefer: respond-async").header.Get("Location")
		synctest.Wait()
		lib.send(t.Context(), http.MethodDelete, where, "")
		synctest.Wait()
		if n := lib.h.InFlight(); n != 0 {
			t.Errorf("%d requests are left", n)
		}
	})
}

// TestAnswersNumCtx: an answer that was computed with a context length of the operator's is no answer
// for another one.
func TestAnswersNumCtx(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, func(h *Handler) { h.NumCtx = NumCtx{Default: PinNumCtx} })
		with := func(text, tokens string) string {
			return strings.Replace(coldChat(text, ""), `"options":{`, `"options":{"num_ctx":`+tokens+`,`, 1)
		}
		lib.ask("/api/chat", with("load", "4096"))
		lib.computed()
		lib.ask("/api/chat", with("x", "1024"))
		if n := lib.computed(); n != 1 {
			t.Fatalf("computed %d times", n)
		}
		if a := lib.ask("/api/chat", with("x", "1024")); !a.hit() {
			t.Errorf("in the same context: %v", a.header)
		}
		lib.ask("/api/chat", with("load", "8192"))
		lib.computed()
		if a := lib.ask("/api/chat", with("x", "1024")); a.hit() {
			t.Errorf("in a longer context: %v", a.header)
		}
	})
}

// TestEmbeddingsMany: an array of more inputs than are kept in memory at a time is forwarded as it is.
func TestEmbeddingsMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		texts := make([]string, inputsMost+1)
		for i := range texts {
			texts[i] = fmt.Sprint(i)
		}
		a := d.ask("/v1/embeddings", embedBody(texts, ""))
		d.mu.Lock()
		asked := d.asked
		d.mu.Unlock()
		if a.status != http.StatusOK || asked != 1 || !strings.Contains(a.header.Get("Cache-Status"), "too-many-inputs") {
			t.Errorf("%d %v; %d requests reached the server", a.status, a.header, asked)
		}
	})
}
