package ollamasim

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var epoch = time.Unix(1_800_000_000, 0)

// run runs a clock for a test.
func run(t *testing.T, v *Virtual) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- v.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the clock ended with %v", err)
		}
	})
}

func TestVirtualOrder(t *testing.T) {
	v := NewVirtual(epoch)
	var got []int
	done := make(chan struct{})
	for _, x := range []struct{ n, after int }{{1, 20}, {2, 10}, {3, 10}, {4, 0}} {
		v.AfterFunc(time.Duration(x.after)*time.Hour, func() { got = append(got, x.n) })
	}
	if stop := v.AfterFunc(time.Hour, func() { t.Error("a stopped event happened") }); !stop() || stop() {
		t.Error("an event is stopped once")
	}
	v.AfterFunc(30*time.Hour, func() { close(done) })
	run(t, v)
	<-done
	if want := []int{4, 2, 3, 1}; !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
	if now := v.Now().Sub(epoch); now != 30*time.Hour {
		t.Errorf("%v passed, want 30h", now)
	}
}

// TestVirtualStandsStill: no time passes while a participant works, whatever the others wait for.
func TestVirtualStandsStill(t *testing.T) {
	v := NewVirtual(epoch)
	v.Join(2)
	run(t, v)
	slept := make(chan struct{})
	go func() {
		defer close(slept)
		if err := v.Sleep(context.Background(), time.Hour); err != nil {
			t.Error(err)
		}
		v.Leave()
	}()
	for range 1000 {
		if now := v.Now(); !now.Equal(epoch) {
			t.Fatalf("it is %v while a participant works", now.Sub(epoch))
		}
	}
	v.Leave()
	<-slept
	if now := v.Now().Sub(epoch); now != time.Hour {
		t.Errorf("%v passed, want 1h", now)
	}
}

func TestVirtualSleepEnds(t *testing.T) {
	v := NewVirtual(epoch)
	v.Join(2) // one of which works for ever
	run(t, v)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := v.Sleep(ctx, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("Sleep: %v", err)
	}
	if v.waiting != 0 || len(v.events) != 0 {
		t.Errorf("%d wait for %d events after Sleep ended", v.waiting, len(v.events))
	}
}

// TestVirtualParked: requests that wait in another place wait for the clock as well.
func TestVirtualParked(t *testing.T) {
	v := NewVirtual(epoch)
	var parked atomic.Int64
	v.Parked = func() int { return int(parked.Load()) }
	v.Join(3)
	run(t, v)
	v.Wait()
	v.Wait()
	happened := make(chan struct{})
	v.AfterFunc(time.Minute, func() { close(happened) })
	if now := v.Now(); !now.Equal(epoch) {
		t.Errorf("it is %v with one of three at work", now.Sub(epoch))
	}
	parked.Store(1)
	<-happened
	if n := v.Forced(); n != 0 {
		t.Errorf("forced %d times", n)
	}
}

// TestVirtualSleep: who sleeps for as long as others, from the same moment on, wakes with them.
func TestVirtualSleep(t *testing.T) {
	v := NewVirtual(epoch)
	const sleepers, rounds = 4, 2000
	v.Join(sleepers)
	run(t, v)
	var wg sync.WaitGroup
	for range sleepers {
		wg.Go(func() {
			defer v.Leave()
			for range rounds {
				if err := v.Sleep(t.Context(), time.Second); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := v.Now().Sub(epoch); got != rounds*time.Second {
		t.Errorf("%v passed, want %v", got, rounds*time.Second)
	}
}

func TestVirtualPatience(t *testing.T) {
	v := NewVirtual(epoch)
	v.Patience = time.Millisecond
	v.Join(1)
	run(t, v)
	happened := make(chan struct{})
	v.AfterFunc(time.Minute, func() { close(happened) })
	<-happened
	if n := v.Forced(); n != 1 {
		t.Errorf("forced %d times, want 1", n)
	}
}

// TestVirtualServers has clients of two servers over loopback, with pauses in which the models
// expire.
func TestVirtualServers(t *testing.T) {
	v := NewVirtual(epoch)
	var servers []*Server
	var urls []string
	for range 2 {
		s := start(t, Config{Parallel: 2, Models: []Model{{Name: "m"}}, Clock: v})
		h := httptest.NewServer(s)
		t.Cleanup(h.Close)
		servers, urls = append(servers, s), append(urls, h.URL)
	}
	const clients, rounds, each = 4, 3, 10
	v.Join(clients)
	run(t, v)
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			defer v.Leave()
			for i := range rounds * each {
				res, err := http.Post(urls[c%2]+"/api/generate", "", strings.NewReader(shared(0, 980, 20, i*clients+c)))
				if err != nil {
					t.Error(err)
					return
				}
				if text, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusOK {
					t.Errorf("%d %s", res.StatusCode, text)
				}
				res.Body.Close()
				if i%each == each-1 {
					if err := v.Sleep(t.Context(), 6*time.Minute); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for _, s := range servers {
		st := s.Stats()
		// Both slots evaluate the prefix after each load.
		if want := int64(rounds*2*980 + rounds*2*each*20); st.Loads != rounds || st.Expired != rounds || st.Evaluated != want {
			t.Errorf("%+v, want %d loads and %d tokens", st, rounds, want)
		}
	}
	// Each round loads for 5 s, evaluates 2,000 tokens for two slots and then 20 at a time, and
	// generates 16 tokens ten times at 20 ms.
	if got := v.Now().Sub(epoch); got < rounds*(6*time.Minute+10*time.Second) || got > rounds*(6*time.Minute+14*time.Second) || v.Forced() > 0 {
		t.Errorf("%v passed, forced %d times", got, v.Forced())
	}
}

// TestRealSpeed: a clock that is faster than real time.
func TestRealSpeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewReal(60)
		began, virtual := time.Now(), c.Now()
		s := start(t, Config{Models: []Model{{Name: "m"}}, Clock: c})
		ask(t, s, "/api/generate", `{"model":"m"}`)
		if real, took := time.Since(began), c.Now().Sub(virtual); real > 5*time.Second/59 || took < 5*time.Second-time.Millisecond || took > 5100*time.Millisecond {
			t.Errorf("a load of 5 s took %v, and on the clock %v", real, took)
		}
	})
}
