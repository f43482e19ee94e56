package schedule

import (
	"fmt"
	"testing"
	"time"
)

// BenchmarkGrant measures a lane that becomes free while 100,000 requests wait, and a request that
// arrives to replace the one that is granted: Add and Done together are the whole cost of a
// request.
func BenchmarkGrant(b *testing.B) {
	for _, w := range []struct {
		name              string
		prefixes, clients int
		lanes             int
		servers           int // that may serve each request; 0: one, so there is no choice
	}{
		{"10000 prefixes, 1 client", 10_000, 1, 4, 0},
		{"10000 prefixes, 1000 clients", 10_000, 1000, 4, 0},
		{"1 prefix, 8 clients", 1, 8, 4, 0},
		{"100000 prefixes, 8 clients", 100_000, 8, 4, 0},
		{"10000 prefixes, 8 clients, 64 lanes", 10_000, 8, 64, 0},
		{"10000 prefixes, 8 clients, 8 servers", 10_000, 8, 4, 8},
		{"1 prefix, 8 clients, 8 servers", 1, 8, 4, 8},
		{"100000 prefixes, 8 clients, 8 servers, 16 lanes", 100_000, 8, 16, 8},
	} {
		b.Run(w.name, func(b *testing.B) {
			q := New(Config{Lanes: w.lanes, Limit: 1 << 20})
			now := start
			system := seg{id: 1, tokens: 500}
			var id uint64
			var upstreams []uint16
			for i := range w.servers {
				upstreams = append(upstreams, uint16(i))
			}
			request := func() Request {
				id++
				j := &job{model: "m", segs: []seg{system, {id: 1000 + id*7919%uint64(w.prefixes), tokens: 1000}, {id: id + 1<<32, tokens: 50}}}
				return Request{ID: id, Runner: Runner{Options: options("m", 0)}, Upstreams: upstreams, Links: j.links(), Client: fmt.Sprint(id % uint64(w.clients))}
			}
			var running []uint64
			take := func() {
				for _, g := range q.Grants() {
					running = append(running, g.ID)
				}
			}
			for range 100_000 {
				q.Add(request(), now)
				take()
			}
			r := Result{Sent: true, Answered: true, Total: 1550, Reused: 1500, ReusedKnown: true, Generated: 20, Timed: true, Prompt: 20 * time.Millisecond, Eval: 60 * time.Millisecond}
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				next := request()
				b.StartTimer()
				now = now.Add(20 * time.Millisecond)
				if len(running) == 0 {
					at, _ := q.Next()
					now = at
					q.Tick(now)
					take()
				}
				done := running[0]
				running = append(running[:0], running[1:]...)
				q.Done(done, r, now)
				take()
				q.Add(next, now)
				take()
			}
		})
	}
}

// BenchmarkVacate measures a server that goes down and comes back while 100,000 requests wait, per
// request that moves.
func BenchmarkVacate(b *testing.B) {
	for _, servers := range []int{2, 8} {
		b.Run(fmt.Sprint(servers, " servers"), func(b *testing.B) {
			q := New(Config{Lanes: 4, Limit: 1 << 20})
			var upstreams []uint16
			for i := range servers {
				upstreams = append(upstreams, uint16(i))
			}
			for id := range uint64(100_000) {
				j := &job{model: "m", segs: []seg{{id: 1, tokens: 500}, {id: 1000 + id*7919%10_000, tokens: 1000}, {id: id + 1<<32, tokens: 50}}}
				q.Add(Request{ID: id, Runner: Runner{Options: options("m", 0)}, Upstreams: upstreams, Links: j.links(), Client: fmt.Sprint(id % 8)}, start.Add(time.Duration(id)*time.Microsecond))
			}
			now := start.Add(time.Second)
			for i := 0; b.Loop(); i++ {
				q.SetAvailable(uint16(i%servers), false, now)
				q.SetAvailable(uint16(i%servers), true, now)
			}
			b.ReportMetric(float64(b.Elapsed())/float64(q.count.Moved), "ns/moved")
		})
	}
}

// BenchmarkFull measures a request that arrives at a full queue: one more of a backlog, which is
// refused, and one of a client without others, for which the backlog gives up a place.
func BenchmarkFull(b *testing.B) {
	for _, limit := range []int{1000, 10_000, 100_000} {
		for _, other := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d waiting, another client %v", limit, other), func(b *testing.B) {
				q := crowdedQueue(limit, func(i int) Request {
					return Request{Client: fmt.Sprint(i % 8), Program: 1, Flow: uint64(i % 100)}
				})
				who := Request{Client: "0", Program: 1}
				if other {
					who.Client = "other"
				}
				id, now := uint64(limit+1), start.Add(time.Hour)
				b.ReportAllocs()
				for b.Loop() {
					id++
					now = now.Add(time.Millisecond)
					if q.Add(from(who, id, now)) {
						q.Refusals()
						q.Leave(id, now)
						q.Add(from(Request{Client: "1", Program: 1}, id, now))
					}
				}
			})
		}
	}
}

// BenchmarkLone measures the wait of a client that sends one request after the other.
func BenchmarkLone(b *testing.B) {
	s := NewScheduler(Config{})
	r := request("m", seg{id: 1, tokens: 1000}, seg{id: 2, tokens: 100})
	b.ReportAllocs()
	for b.Loop() {
		g, err := s.Acquire(b.Context(), r)
		if err != nil {
			b.Fatal(err)
		}
		g.Release(served)
	}
}
