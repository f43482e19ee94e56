package schedule

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestForget: a server is forgotten if and only if nothing is served there and nothing waits for it.
// Its index then is a new server's, and no request that came before goes there.
func TestForget(t *testing.T) {
	forgotten, kept, spared := 0, 0, 0
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 5))
		data := make([]byte, 1500)
		for i := range data {
			data[i] = byte(rng.IntN(256))
		}
		m := &model{t: t, every: 1, now: start, waiting: map[uint64]modelRequest{}, running: map[uint64]modelRequest{}, slots: map[slotKey]uint64{}, data: data, cfg: Config{Lanes: rng.IntN(3), Limit: 40}}
		m.q = New(m.cfg)
		for len(m.data) > 0 {
			m.event()
			if rng.IntN(10) > 0 {
				continue
			}
			u := uint16(rng.IntN(3))
			m.off[u] = true
			m.q.SetAvailable(u, false, m.now)
			m.drain()
			used := false
			for _, it := range m.q.items {
				used = used || it.runner.server.index == u
			}
			if gone := m.q.Forget(u, m.now); gone == used {
				t.Fatalf("forgotten %v, although used %v", gone, used)
			}
			if used {
				kept++
				continue
			}
			forgotten++
			m.off[u], m.away[u], m.until[u], m.free[u], m.foreign[u] = false, false, time.Time{}, false, false
			for id, r := range m.waiting {
				if slices.Contains(r.Upstreams, u) {
					spared++
					r.Upstreams = slices.DeleteFunc(slices.Clone(r.Upstreams), func(other uint16) bool { return other == u })
					m.waiting[id] = r
				}
			}
			m.drain()
		}
		m.finish()
	}
	if forgotten < 100 || kept < 100 || spared < 100 {
		t.Errorf("forgotten %d times, kept %d times, while %d requests waited elsewhere", forgotten, kept, spared)
	}
}

// TestForgetAside: the requests of Aside count, too.
func TestForgetAside(t *testing.T) {
	s := NewScheduler(Config{Lanes: 1})
	g, err := s.Aside().Acquire(t.Context(), Request{Runner: Runner{Upstream: 3}})
	if err != nil {
		t.Fatal(err)
	}
	if s.Forget(3) {
		t.Error("forgotten while a request is served")
	}
	g.Release(Result{})
	for range 2 { // the second time it is not known
		if !s.Forget(3) {
			t.Error("it is not forgotten")
		}
	}
}
