package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

func TestTouchOncePerLoad(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
		asked := b.k.asked
		b.want(time.Hour)
		if b.k.asked != asked {
			t.Errorf("/api/ps is asked %d times while nothing happens", b.k.asked-asked)
		}
		for range 5 { // later requests of the same load: Ollama keeps what was set
			u := beginForeign(b.r, "M:latest", false)
			u.answer()
			time.Sleep(3 * time.Second)
			b.k.loadFor("m", 24*time.Hour)
			u.end()
			b.want(10 * time.Second)
		}
		// Evicted, which a poll notices, and loaded again.
		b.k.evict("m")
		b.book.Listed(nil, time.Now())
		b.want(time.Hour)
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
		// Evicted and loaded again between two polls.
		b.k.evict("m")
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
		// The same, while a native request loads it again.
		b.k.evict("m")
		b.native("m", "")
		b.want(time.Minute)
	})
}

func TestTouchAfterRestart(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
		b.k.evict("m")
		b.book.Restarted()
		b.want(5 * time.Second)
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
	})
}

func TestTouchLongRequest(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		// Loading takes a while: nothing is sent before the model is loaded.
		u := beginForeign(b.r, "m", false)
		b.want(2 * time.Minute)
		b.k.load("m")
		b.k.mu.Lock()
		b.k.busy["m"] = true // its expiry does not move while it runs
		b.k.mu.Unlock()
		u.answer()
		b.want(20*time.Minute, "m 24h0m0s")
		b.k.mu.Lock()
		b.k.busy["m"] = false
		b.k.mu.Unlock()
		b.k.loadFor("m", 24*time.Hour)
		u.end()
		b.want(time.Hour)
	})
}

// TestTouchBusyElsewhere: somebody who uses Ollama directly keeps the model busy, so that /api/ps
// keeps reporting an expiry from before the touch. That is no reason to touch again and again.
func TestTouchBusyElsewhere(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		b.k.busy["m"] = true
		b.foreign("m", time.Second)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := b.k.taken(); len(got) == 0 || len(got) > 2 {
			t.Errorf("%d touches in ten minutes after one request", len(got))
		}
	})
}

// TestTouchLoadsNothing: a touch states what the proxy's clients stated, and is not sent while
// somebody who uses Ollama directly has loaded the model with other options.
func TestTouchLoadsNothing(t *testing.T) {
	options := func(numCtx int) *prefix.Options {
		o := prefix.NewReader().Read(prefix.Generate, "m", fmt.Appendf(nil, `{"options":{"num_ctx":%d}}`, numCtx)).Runner
		return &o
	}
	use := func(b *bed, stated *prefix.Options, context int) { // and the hold has no effect
		u, _, _ := beginNative(b.r, "m", stated, fields{})
		b.k.load("m")
		b.k.context["m"] = context
		u.answer()
		u.end()
	}
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		use(b, options(8192), 8192)
		use(b, options(8192), 8192) // it is believed to be held, but is not
		b.want(time.Minute, "m 24h0m0s num_ctx 8192")
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // somebody else loads it with 2048 tokens first
		use(b, options(8192), 8192)
		use(b, options(8192), 2048)
		b.want(time.Hour)
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // every 12 s, by somebody else, after a request through /v1
		b.k.context["m"] = 4096
		b.foreign("m", time.Second)
		b.want(3*time.Second, "m 24h0m0s")
		for range 10 {
			b.k.context["m"] = 2048
			b.k.load("m")
			b.want(12 * time.Second)
		}
		u := beginForeign(b.r, "m", false) // its runner is about to be replaced
		u.answer()
		u.end()
		b.want(12 * time.Second)
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // the options of the request are unknown
		use(b, options(8192), 8192)
		use(b, nil, 8192)
		b.want(time.Minute)
	})
}

// TestTouchNeverBringsBack: a model that is not loaded is not touched, whether unloaded, evicted or
// never loaded.
func TestTouchNeverBringsBack(t *testing.T) {
	for name, leave := range map[string]func(b *bed){
		"never there": func(b *bed) { b.k.evict("m") },
		"evicted at once": func(b *bed) {
			b.k.evict("m")
			b.book.Listed(nil, time.Now())
		},
		"unloaded by a client": func(b *bed) { b.native("m", "0") },
		"unloaded as text":     func(b *bed) { b.native("M:latest", `"0s"`) },
	} {
		t.Run(name, func(t *testing.T) {
			inBed(t, keep(t, "", "24h"), func(b *bed) {
				u := beginForeign(b.r, "m", false) // refused or failed: never answered
				b.k.load("m")
				leave(b)
				u.end()
				b.want(time.Hour)
			})
		})
	}
}

func TestTouchAfterUnload(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
		b.native("m", "0")
		b.want(time.Hour)
		b.foreign("m", time.Second) // real traffic loads it again
		b.want(time.Minute, "m 24h0m0s")
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // unloaded while a request of another client runs
		u := beginForeign(b.r, "m", false)
		b.k.load("m")
		b.native("m", "0")
		b.k.load("m") // Ollama unloads it when the running request has ended
		u.answer()
		b.want(time.Minute)
		b.k.evict("m")
		u.end()
		b.want(time.Hour)
	})
}

// TestUnloadDuringTouch: the touch may have loaded the model again, so the unload is repeated.
func TestUnloadDuringTouch(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		once := true
		b.k.during = func(context.Context, string) {
			if once {
				once = false
				b.native("m", "0")
				b.k.loadFor("m", 24*time.Hour) // which the touch has loaded again
			}
		}
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s", "m 0s")
		b.want(time.Hour)
		if len(b.k.expires) > 0 {
			t.Error("the model is still loaded")
		}
	})
}

func TestTouchRefused(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		b.k.refusing(func(string, bool) error { return api.StatusError{StatusCode: http.StatusServiceUnavailable} })
		b.foreign("m", time.Second)
		b.want(touchPause-5*time.Second, "m 24h0m0s")
		b.want(10*time.Second, "m 24h0m0s")
		for range 5 { // traffic does not shorten the pause
			b.foreign("m", 100*time.Millisecond)
		}
		b.want(touchPause - 10*time.Second)
		b.k.refusing(nil)
		b.want(time.Minute, "m 24h0m0s")
		b.want(time.Hour)
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // a refused touch does not delay another model's
		b.k.refuse = func(model string, _ bool) error {
			if model == "bad" {
				return errors.New("no")
			}
			return nil
		}
		b.foreign("bad", time.Second)
		b.want(5*time.Second, "bad 24h0m0s")
		b.foreign("good", time.Second)
		b.want(5*time.Second, "good 24h0m0s")
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // /api/ps does not answer for a while
		b.k.down = true
		b.foreign("m", time.Second)
		b.want(time.Minute)
		b.k.mu.Lock()
		if b.k.asked > 70 {
			t.Errorf("/api/ps was asked %d times in a minute", b.k.asked)
		}
		b.k.down = false
		b.k.mu.Unlock()
		b.want(time.Minute, "m 24h0m0s")
	})
}

func TestTouchEmbeddings(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) { // used for embeddings
		u := beginForeign(b.r, "e", true)
		b.k.load("e")
		u.answer()
		u.end()
		b.want(time.Minute, "e 24h0m0s embed")
		b.want(time.Hour)
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // Ollama answers 400 to everything else
		b.k.refuse = func(_ string, embedding bool) error {
			if !embedding {
				return api.StatusError{StatusCode: http.StatusBadRequest, ErrorMessage: `"e" does not support generate`}
			}
			return nil
		}
		b.foreign("e", time.Second)
		b.want(time.Minute, "e 24h0m0s", "e 24h0m0s embed")
		b.want(time.Hour)
	})
}

// TestNativeNeedsNoTouch: native requests keep their model loaded by themselves.
func TestNativeNeedsNoTouch(t *testing.T) {
	inBed(t, keep(t, "", "24h", "off=off"), func(b *bed) {
		b.native("m", "")
		b.native("m", `"5m"`)
		b.native("n", "-1")
		b.native("off", "")
		b.want(time.Hour)
		b.foreign("off", time.Second) // nothing was promised for it
		b.want(time.Hour)
		asked := b.k.asked
		b.want(time.Hour)
		if b.k.asked != asked {
			t.Errorf("/api/ps was asked %d times for a model that is left alone", b.k.asked-asked)
		}
	})
}

// TestClientsOwnValueHolds: touches respect a keep_alive that a native client stated, until the
// model has been loaded again.
func TestClientsOwnValueHolds(t *testing.T) {
	use := func(b *bed, d time.Duration) { // a request through /v1, for the current load
		u := beginForeign(b.r, "m", false)
		u.answer()
		time.Sleep(time.Second)
		b.k.loadFor("m", d)
		u.end()
	}
	inBed(t, keep(t, "", "24h"), func(b *bed) { // shorter
		b.native("m", `"10m"`)
		use(b, 10*time.Minute)
		b.want(time.Minute)
		b.k.evict("m")
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
	})
	inBed(t, keep(t, "", "24h"), func(b *bed) { // for ever
		b.native("m", `-1`)
		use(b, upstream.Forever)
		b.want(time.Minute)
		use(b, 5*time.Minute) // somebody else has shortened it, bypassing the proxy
		b.want(time.Minute, "m forever")
	})
	inBed(t, keep(t, AtLeast, "24h"), func(b *bed) {
		b.native("m", `"10m"`)
		use(b, 24*time.Hour)
		b.want(time.Minute)
		use(b, 5*time.Minute)
		b.want(time.Minute, "m 24h0m0s")
	})
}

// TestForceHoldsForTouches: under Force, the operator's value overrides a client's longer one in
// touches, too.
func TestForceHoldsForTouches(t *testing.T) {
	inBed(t, keep(t, Force, "24h"), func(b *bed) {
		b.native("m", `-1`) // goes upstream as 24h
		b.k.evict("m")      // and is loaded again before a poll notices
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
	})
}

func TestTouchSettings(t *testing.T) {
	inBed(t, keep(t, "", "off", "a=1h", "b=-1", "c=90s"), func(b *bed) {
		for _, m := range []string{"a", "B:latest", "library/c"} {
			b.foreign(m, time.Second)
			time.Sleep(10 * time.Second)
		}
		b.foreign("d", time.Second)
		b.want(time.Minute, "a 1h0m0s", "B:latest forever", "library/c 1m30s")
	})
}

// TestResidencyBound: any number of model names takes bounded memory.
func TestResidencyBound(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		var open []sentRequest
		for i := range 3 * residencyModels {
			name := fmt.Sprint("m", i)
			open = append(open, beginForeign(b.r, name, false))
		}
		for _, u := range open {
			u.end()
		}
		if n := b.r.models.Len(); n > residencyModels {
			t.Errorf("%d models are remembered", n)
		}
		b.want(time.Hour)
	})
}

// TestResidencyConcurrent makes everything happen at once, for the race detector, and checks the
// final counts.
func TestResidencyConcurrent(t *testing.T) {
	p := keep(t, AtLeast, "24h")
	k := newFakeKeeper()
	r := newResidency(k, runners.New(nil, nil), p, func(string, error) {}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	var background, wg sync.WaitGroup
	background.Go(func() { r.run(ctx) }) // ends with cancel
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				name := fmt.Sprint("m", (g+i)%5)
				var u sentRequest
				switch i % 4 {
				case 0, 1:
					u = beginForeign(r, name, i%8 == 0)
				case 2:
					u, _, _ = beginNative(r, name, nil, fields{keepAlive: keepAliveSet, duration: time.Duration(i%3) * time.Minute})
				case 3:
					u, _, _ = beginNative(r, name, nil, fields{})
				}
				k.load(name)
				u.answer()
				if i%7 == 0 {
					r.runners.Listed(nil, time.Now())
				}
				if i%11 == 0 {
					r.check(ctx)
				}
				u.end()
			}
		})
	}
	wg.Wait()
	cancel()
	background.Wait()
	for _, m := range r.models.Values() {
		if m.inFlight != 0 {
			t.Errorf("%s has %d requests in flight at the end", m.name, m.inFlight)
		}
	}
}

// A load with a client's keep_alive of a few seconds ends when those have passed, even if no poll
// noticed: the next load, with the server's longer default, is touched.
func TestTouchAfterShortKeepAlive(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		b.native("m", `"3s"`)
		time.Sleep(4 * time.Second)
		b.k.evict("m") // no poll has noticed
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
	})
}

// A refused request changes nothing: neither what later requests get, nor what is known of a load,
// nor that a model was unloaded.
func TestRefusedRequestsChangeNothing(t *testing.T) {
	inBed(t, keep(t, "", "24h"), func(b *bed) {
		refused := func(keepAlive string) {
			f, err := scan([]byte(`{"model":"m","prompt":5,"keep_alive":`+keepAlive+`}`), nil)
			if err != nil {
				t.Fatal(err)
			}
			u, _, _ := beginNative(b.r, "m", nil, f)
			u.refused()
		}
		refused("-1")
		if _, hold := func() (string, Hold) {
			u, did, hold := beginNative(b.r, "m", nil, fields{})
			u.refused()
			return did, hold
		}(); hold.Duration != 24*time.Hour {
			t.Errorf("after a refused -1 a request without keep_alive is given %v", hold)
		}
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
		refused(`"1m"`)
		b.want(time.Minute) // still the same load
		refused("0")        // an unload that did not happen
		b.k.evict("m")
		b.book.Listed(nil, time.Now())
		b.foreign("m", time.Second)
		b.want(time.Minute, "m 24h0m0s")
	})
}

// TestSpared: a model is not held while a request may wait in Ollama for it to make room; the next
// one holds it.
func TestSpared(t *testing.T) {
	options := func(numCtx int) *prefix.Options {
		o := prefix.NewReader().Read(prefix.Generate, "m", fmt.Appendf(nil, `{"options":{"num_ctx":%d}}`, numCtx)).Runner
		return &o
	}
	small, large := options(2048), options(4096)
	r := newResidency(newFakeKeeper(), runners.New(nil, nil), keep(t, IfAbsent, "24h"), func(string, error) {}, slog.New(slog.DiscardHandler))
	begin := func(model string, o *prefix.Options, want string) sentRequest {
		t.Helper()
		u, did, hold := beginNative(r, model, o, fields{})
		if did != want || (hold == Hold{}) != (want != didInject) {
			t.Errorf("%s: %s %v, want %s", model, did, hold, want)
		}
		return u
	}
	first := begin("m", small, didInject)
	other := begin("m", large, didSpare) // waits for the first one
	again := begin("m", small, didSpare) // finds what the first one had loaded, and the other waits
	unknown := begin("m", nil, didSpare)
	for _, u := range []sentRequest{other, again, unknown} {
		u.answer()
		u.end()
	}
	begin("m", small, didInject).end() // nothing waits any longer
	first.answer()
	first.end()
	last := begin("m", small, didInject) // nobody knows which one is loaded
	last.answer()
	last.end()
	held := begin("m", small, didHold)
	other = begin("m", large, didSpare) // this one ends the hold
	held.end()
	other.answer()
	other.end()
	last = begin("m", small, didInject)
	other = begin("m", large, didSpare)
	last.answer() // it may have been unloaded for the other one since
	last.end()
	other.end()
	begin("m", small, didInject).end()

	a := begin("a", small, didInject)
	b := begin("b", small, didInject) // it has to be loaded, so it ends no other hold
	begin("a", small, didSpare).end() // b may wait for a to make room
	b.answer()
	begin("a", small, didInject).end() // b is loaded
	a.end()
	b.end()
	for _, m := range r.models.Values() {
		if m.inFlight != 0 {
			t.Errorf("%+v at the end", m)
		}
	}
}
