package fleet

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestOrders: what is said about a server at one proxy counts at all of them, the newest word last,
// whichever clock is ahead; so it does for those that come later, or were cut off meanwhile.
func TestOrders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, []string{"s", "other"}, "a", "b", "c")
		a, b, c := l.proxies["a"], l.proxies["b"], l.proxies["c"]
		time.Sleep(time.Second)
		order := func(m *proxy, server string, drain bool, want ...string) {
			t.Helper()
			if missing, ok := m.Order(t.Context(), server, drain); !ok || !slices.Equal(missing, want) {
				t.Errorf("%s: %v, %v; want %v not to have heard of it", m.host, missing, ok, want)
			}
		}
		drained := func(server string, want ...string) {
			t.Helper()
			l.mu.Lock()
			defer l.mu.Unlock()
			var got []string
			for _, host := range []string{"a", "b", "c"} {
				if l.drained[[2]string{host, server}] {
					got = append(got, host)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%v drain %s, want %v", got, server, want)
			}
		}
		if _, ok := a.Order(t.Context(), "nobody's", true); ok {
			t.Error("an order about a server that no proxy has")
		}
		began := time.Now()
		order(b, "s", true)
		if took := time.Since(began); took > 2*reportEvery+2*sightEvery {
			t.Errorf("it took %v until all had heard of it", took)
		}
		drained("s", "a", "b", "c")
		drained("other")
		if got := c.AllDrained("m"); got != "" {
			t.Errorf("all servers are drained, such as %s", got)
		}
		order(c, "other", true)
		if got := a.AllDrained("m"); got != "other" {
			t.Errorf("%q is drained, with all others", got)
		}
		order(a, "other", false)
		drained("other")

		// The clock of the one that drains is ahead.
		a.mu.Lock()
		a.adopt([]Order{{"s", true, time.Now().Add(time.Hour).UnixMilli()}})
		a.mu.Unlock()
		time.Sleep(time.Second)
		order(c, "s", false)
		drained("s")

		// One that begins later.
		order(c, "s", true)
		a.kill()
		l.mu.Lock()
		delete(l.drained, [2]string{"a", "s"})
		l.mu.Unlock()
		a.start([]string{"a", "b", "c"})
		time.Sleep(3 * time.Second)
		drained("s", "a", "b", "c")

		// One that is cut off: it is waited for until it counts as away, and hears of it later.
		for _, x := range []string{"b", "c"} {
			l.net.setCut("a", x, true)
		}
		order(b, "s", false)
		drained("s", "a")
		for _, x := range []string{"b", "c"} {
			l.net.setCut("a", x, false)
		}
		time.Sleep(10 * time.Second)
		drained("s")

		// One that says nothing of it, such as an older version, is named.
		b.mu.Lock()
		b.peers["old"] = &peer{fleet: b.Fleet, addr: "old", report: &Report{ID: "x", Name: "old"}}
		b.mu.Unlock()
		order(b, "s", true, "old")
		drained("s", "a", "b", "c")
	})
}

// TestOrderTie: two orders of one moment mean the same everywhere.
func TestOrderTie(t *testing.T) {
	drain, resume := Order{"s", true, 1}, Order{"s", false, 1}
	if !drain.newer(resume) || resume.newer(drain) || drain.newer(drain) {
		t.Error("which of two orders counts depends on which is known first")
	}
}

// TestOrderEarly: an order counts at all proxies although the one that is asked has just begun, or
// has just been given the server.
func TestOrderEarly(t *testing.T) {
	f := New(Config{Name: "a", Local: func() []Server { return []Server{{Name: "s"}} }})
	missing, ok := f.Order(t.Context(), "s", true)
	if !ok || len(missing) > 0 || !f.orders["s"].Drain {
		t.Errorf("%v, %v, and these orders are known: %v", missing, ok, f.orders)
	}
}

// TestOrderConfirmed: a report that has an order says of the server what it is after that.
func TestOrderConfirmed(t *testing.T) {
	drained := false
	var f *Fleet
	f = New(Config{
		Name: "a", Ordered: func(_ string, drain bool) { drained = drain },
		Local: func() []Server {
			s := Server{Name: "s", Drained: drained, Takes: !drained}
			f.mu.Lock() // meanwhile a peer says it
			defer f.mu.Unlock()
			f.adopt([]Order{{"s", true, 1}})
			return []Server{s}
		},
	})
	for range 3 {
		f.refresh()
		if r := f.outbox.last; len(r.Orders) > 0 && !r.Servers[0].Drained {
			t.Errorf("the order is confirmed, and the server is not drained: %+v", r)
		}
	}
	if len(f.outbox.last.Orders) == 0 {
		t.Error("it is never confirmed")
	}
}

// TestOrderedInFlight: what a peer says that it has in progress counts at once, although other
// figures may wait.
func TestOrderedInFlight(t *testing.T) {
	f := New(Config{Name: "a"})
	p := newPeer(f, "b")
	f.peers["b"] = p
	for n := range int64(3) {
		p.heard(&Report{ID: "b", Name: "b", Servers: []Server{{Name: "s", Drained: true, InFlight: n}}})
		if got := f.InFlight("s"); got != n {
			t.Errorf("%d requests are in progress, want %d", got, n)
		}
	}
}

// TestOrderedPlace: a proxy that knows that a server is drained sends nothing there, although the
// server's owner has not said so yet.
func TestOrderedPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		a, b := l.proxies["a"], l.proxies["b"]
		for _, drain := range []bool{true, false} {
			if _, ok := b.Order(t.Context(), "s", drain); !ok {
				t.Fatal("there is no such server")
			}
			if p, ok := a.Choose(Ask{Model: "m"}); ok == drain {
				t.Errorf("drained: %v; a request goes to %+v", drain, p)
			}
		}
	})
}
