package proxy

import (
	"context"
	"errors"
	"math"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
)

// counting is a Limiter for several handlers in one process. Its buckets fill continuously, as a
// rate.Limiter's do.
type counting struct {
	mu      sync.Mutex
	away    bool
	full    map[string]time.Time // when nothing is used up any more
	waiting map[string]int
	others  int
	taken   int // calls of Take
}

func (c *counting) Take(_ context.Context, t Taking) (Taken, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.taken++
	if c.away {
		return Taken{}, errors.New("away")
	}
	taken := Taken{OK: true, Waiting: c.others}
	if t.Rate > 0 {
		each := time.Duration(float64(time.Second) / t.Rate)
		owed := max(time.Until(c.full[t.Key]), time.Duration(t.Used*float64(each)), 0)
		if taken.OK = owed+each <= each*time.Duration(t.Burst)+time.Microsecond; taken.OK {
			owed += each
		}
		c.full[t.Key] = time.Now().Add(owed)
		taken.Used = owed.Seconds() * t.Rate
	}
	return taken, nil
}

func (c *counting) Waiting(key string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting[key] += n
}

func newCounting() *counting {
	return &counting{full: map[string]time.Time{}, waiting: map[string]int{}}
}

// TestSharedRate has three proxies that share one rate. Together they let as many requests through as
// one would. When they can no longer share, none lets one through that it would not have before.
func TestSharedRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		shared := newCounting()
		var proxies []*keyHolder
		for range 3 {
			keys, err := ParseKeys("a k rate=30/m")
			if err != nil {
				t.Fatal(err)
			}
			proxies = append(proxies, keys.check("k"))
		}
		// round asks at all proxies in turn, and returns how many requests were let through.
		round := func(n int) (through int) {
			for i := range n {
				if proxies[i%3].take(ctx, shared, true) <= 0 {
					through++
				}
			}
			return through
		}
		if n := round(90); n != 30 {
			t.Errorf("%d requests of 90 at once were let through", n)
		}
		if wait := proxies[0].take(ctx, shared, true); wait <= time.Second || wait > 2*time.Second {
			t.Errorf("the next one has to wait for %v", wait)
		}
		time.Sleep(20 * time.Second)
		if n := round(90); n != 10 {
			t.Errorf("after 20 s, %d requests were let through", n)
		}
		for i, p := range proxies { // all know what all have used up, to within one
			if left := p.limiter.Tokens(); left > 0.99 || left < -0.02 {
				t.Errorf("proxy %d believes that %.2f requests are left", i, left)
			}
		}
		shared.away = true
		if n := round(90); n > 0 {
			t.Errorf("alone, %d requests were let through at once", n)
		}
		time.Sleep(10 * time.Second) // each proxy counts its own: five requests
		if n := round(90); n < 14 || n > 17 {
			t.Errorf("alone for 10 s, %d requests were let through", n)
		}
		shared.away = false
		clear(shared.full) // it comes back empty, and believes what the proxies know
		if n := round(90); n > 1 {
			t.Errorf("together again, %d requests were let through at once", n)
		}
		time.Sleep(2 * time.Minute)
		if n := round(90); n != 30 {
			t.Errorf("unused for two minutes, %d requests were let through", n)
		}
	})
}

// TestSharedPassedOn: of a request that another proxy passed on, nothing is taken here, but what waits
// elsewhere is found out anew. Otherwise what once waited there would count for ever.
func TestSharedPassedOn(t *testing.T) {
	shared := newCounting()
	keys, err := ParseKeys("a k rate=1/h max-waiting=2")
	if err != nil {
		t.Fatal(err)
	}
	h, p := &Handler{Limiter: shared}, keys.check("k")
	ask := func(passed *fleet.Passed) *refusal {
		ex := &exchange{header: http.Header{}, holder: p, passed: passed, route: route{reads: readsNative}}
		return h.tooFast(t.Context(), ex)
	}
	shared.others = 2
	if ref := ask(nil); ref != nil || !p.waits() {
		t.Fatalf("the first request: %v; that two wait elsewhere is known: %v", ref, p.waits())
	}
	shared.others = 0
	if ref := ask(&fleet.Passed{}); ref != nil || p.waits() {
		t.Errorf("a request that was passed on: %v; none waits elsewhere any more: %v", ref, !p.waits())
	}
	shared.others, shared.away = 2, true
	if ref := ask(&fleet.Passed{}); ref != nil || p.waits() {
		t.Errorf("away: %v, %v", ref, !p.waits())
	}
}

// TestSharedRateFollows: whatever a Limiter answers, a proxy's own limiter stays within its bounds.
func TestSharedRateFollows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, taken := range []Taken{
			{OK: true, Used: -5}, {OK: true, Used: 1e9}, {OK: false, Used: -5}, {OK: false, Used: 1e9},
			{OK: true, Used: math.Inf(1)}, {OK: false, Used: 10}, {OK: false, Used: 9.5},
		} {
			keys, err := ParseKeys("a k rate=10/s")
			if err != nil {
				t.Fatal(err)
			}
			p := keys.check("k")
			wait := p.follow(taken)
			if taken.OK && wait > 0 || !taken.OK && (wait <= 0 || wait > 100*time.Millisecond) {
				t.Errorf("%+v: wait for %v", taken, wait)
			}
			if left := p.limiter.Tokens(); left < -1 || left > 10 {
				t.Errorf("%+v: %v are left", taken, left)
			}
			time.Sleep(2 * time.Second)
			if p.take(context.Background(), nil, true) > 0 {
				t.Errorf("%+v: the client is locked out", taken)
			}
		}
	})
}

// TestSharedWaiting: requests that wait at other proxies count, unless nobody knows; what waits here
// is told to the others, and that it no longer does.
func TestSharedWaiting(t *testing.T) {
	inTime(t, 1, time.Minute, func(t *testing.T, m *mortal, h *Handler, ask func(string, string, ...string) *asked) {
		shared := newCounting()
		h.Guard, h.Limiter = withKeys(t, "few k1 max-waiting=2\nmany k2"), shared
		key := h.Guard.Keys.check("k1").client()
		m.live(false)
		shared.others = 1
		first := ask("/api/embed", `{"model":"m","input":"x"}`, bearer("k1"))
		synctest.Wait()
		if n := shared.waiting[key]; n != 1 {
			t.Errorf("%d are told to wait", n)
		}
		refused := ask("/api/embed", `{"model":"m","input":"y"}`, bearer("k1"))
		other := ask("/api/embed", `{"model":"m","input":"z"}`, bearer("k2"))
		synctest.Wait()
		if refused.Code != 429 {
			t.Errorf("with one here and one elsewhere, a third is answered %d", refused.Code)
		}
		shared.away = true
		alone := ask("/api/embed", `{"model":"m","input":"w"}`, bearer("k1"))
		synctest.Wait()
		if n := shared.waiting[key]; n != 2 {
			t.Errorf("%d are told to wait", n)
		}
		m.live(true)
		time.Sleep(5 * time.Second)
		if got := count([]*asked{first, other, alone}); got[200] != 3 {
			t.Errorf("back: %v", got)
		}
		if n := shared.waiting[key]; n != 0 || len(shared.waiting) != 1 {
			t.Errorf("%d are told to wait at the end, of %d keys", n, len(shared.waiting))
		}
		if shared.taken != 3 {
			t.Errorf("Take was called %d times for the three requests of the key with a limit", shared.taken)
		}
	})
}
