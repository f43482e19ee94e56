package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// fleet is the cost of a workload on several servers.
type fleet struct {
	outcome
	median, p99 time.Duration
}

// onServers runs a workload through a queue, and through least-loaded routing without one.
func onServers(t *testing.T, name string, cfg engineConfig, q Config, work func(*sim)) (least, lanes fleet) {
	t.Helper()
	run := func(queue *Queue) fleet {
		s := newSim(t, cfg, queue)
		if queue == nil {
			s.choose = s.leastLoaded
		}
		work(s)
		wall := s.run()
		f := fleet{outcome: outcome{float64(s.evaluated) / float64(s.least), wall, s.loads, s}}
		took := make([]time.Duration, 0, len(s.finished))
		for _, j := range s.finished {
			took = append(took, j.end.Sub(j.came))
		}
		slices.Sort(took)
		f.median, f.p99 = took[len(took)/2], took[len(took)*99/100]
		return f
	}
	least, lanes = run(nil), run(New(q))
	t.Logf("%-50s least loaded %.3f %6.1fs, median %5.2fs p99 %6.2fs | queue %.3f %6.1fs, median %5.2fs p99 %6.2fs, spread %d stolen %d moved %d held %d/%d, by server %s", name,
		least.ratio, least.wall.Seconds(), least.median.Seconds(), least.p99.Seconds(), lanes.ratio, lanes.wall.Seconds(), lanes.median.Seconds(), lanes.p99.Seconds(),
		lanes.sim.q.count.Spread, lanes.sim.q.count.Stolen, lanes.sim.q.count.Moved, lanes.sim.q.count.HoldsHit, lanes.sim.q.count.HoldsExpired, lanes.sim.byServer())
	return least, lanes
}

func (s *sim) byServer() string {
	text := ""
	for _, b := range s.boxes {
		text += fmt.Sprintf(" %d (%d tokens)", b.served, b.evaluated)
	}
	return text
}

// spaced sends requests with random pauses between them.
func spaced(s *sim, jobs []*job, mean time.Duration, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 9))
	at := time.Duration(0)
	for _, j := range jobs {
		s.after(at, func() { s.submit(j) })
		at += time.Duration(rng.ExpFloat64() * float64(mean))
	}
}

// loops makes each prefix a script.
func loops(s *sim, jobs []*job) {
	byPrefix := map[uint64][]*job{}
	var order []uint64
	for _, j := range jobs {
		id := j.segs[0].id
		if byPrefix[id] == nil {
			order = append(order, id)
		}
		byPrefix[id] = append(byPrefix[id], j)
	}
	for i, id := range order {
		for _, j := range byPrefix[id] {
			j.client = fmt.Sprint("script", i)
		}
		s.after(time.Duration(i)*time.Millisecond, func() { s.closed(byPrefix[id], 5*time.Millisecond) })
	}
}

// TestFifoOrder: whatever the order of insertion, a list returns requests in order of arrival.
func TestFifoOrder(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for range 200 {
		var f fifo
		left := map[*item]bool{}
		for range rng.IntN(100) {
			for range rng.IntN(6) {
				it := &item{waits: true, arrived: start.Add(time.Duration(rng.IntN(40)) * time.Second)}
				f.push(it)
				left[it] = true
			}
			if rng.IntN(2) == 0 {
				continue
			}
			var oldest *item
			for it := range left {
				if oldest == nil || it.arrived.Before(oldest.arrived) {
					oldest = it
				}
			}
			front := f.front()
			if (front == nil) != (oldest == nil) || front != nil && !front.arrived.Equal(oldest.arrived) {
				t.Fatalf("the oldest is %v, want %v", front, oldest)
			}
			if front != nil {
				front.waits = false
				delete(left, front)
				f.dropped()
			}
			if f.live != len(left) {
				t.Fatalf("%d are live, want %d", f.live, len(left))
			}
		}
	}
}

// anew makes a test's texts, and so their hashes, independent of earlier tests.
func anew(t *testing.T) {
	before := ids
	ids = 1 << 30
	t.Cleanup(func() { ids = before })
}

// TestServers: 30 prefixes with 10 requests each on three servers, one of which may fail midway and
// return.
func TestServers(t *testing.T) {
	anew(t)
	for _, slots := range []int{1, 4} {
		for _, host := range []int{0, 100_000} {
			for _, arrival := range []string{"burst", "spaced", "loops"} {
				for _, fails := range []bool{false, true} {
					name := fmt.Sprintf("30 x 10, %d slots, host %d, %s, fails %v", slots, host, arrival, fails)
					least, lanes := onServers(t, name, engineConfig{servers: 3, slots: slots, host: host}, Config{Lanes: slots}, func(s *sim) {
						jobs := groups(30, 10, 1000, 40, 16, 5)
						switch arrival {
						case "burst":
							burst(s, jobs)
						case "spaced":
							spaced(s, jobs, 35*time.Millisecond, 3)
						case "loops":
							loops(s, jobs)
						}
						if fails {
							s.after(3*time.Second, func() { s.kill(1) })
							s.after(6*time.Second, func() { s.revive(1) })
						}
					})
					most := 1.05
					if fails {
						most = 1.2
					}
					// Requests that arrive one by one find their slot taken by another prefix in
					// any order: there is no such bound.
					if arrival != "spaced" && lanes.ratio > most {
						t.Errorf("%s: %.3f times the least possible, want %.2f", name, lanes.ratio, most)
					}
					if lanes.ratio >= least.ratio || lanes.wall >= least.wall || lanes.median > least.median {
						t.Errorf("%s: worse than least-loaded routing", name)
					}
					// Scripts take turns, so the first requests of the last ones wait for the
					// others.
					if arrival != "loops" && lanes.p99 > least.p99 {
						t.Errorf("%s: p99 is %v, least-loaded %v", name, lanes.p99, least.p99)
					}
					if c := lanes.sim.q.count; c.Stolen > 300 {
						t.Errorf("%s: %d requests were taken over", name, c.Stolen)
					}
				}
			}
		}
	}
}

// TestUnlimitedServers: without waiting, requests still go where their prefix is warm, and not all
// to one server.
func TestUnlimitedServers(t *testing.T) {
	anew(t)
	for _, arrival := range []string{"spaced", "loops"} {
		least, lanes := onServers(t, "30 x 10, 4 slots, unlimited, "+arrival, engineConfig{servers: 3, slots: 4, host: 100_000}, Config{Lanes: Unlimited}, func(s *sim) {
			jobs := groups(30, 10, 1000, 40, 16, 5)
			if arrival == "spaced" {
				spaced(s, jobs, 50*time.Millisecond, 3)
			} else {
				loops(s, jobs)
			}
		})
		if lanes.ratio > 0.75*least.ratio || lanes.wall > least.wall || lanes.median > least.median/2 {
			t.Errorf("%s: not much better than least-loaded routing", arrival)
		}
		for _, b := range lanes.sim.boxes {
			if b.served < 80 || b.served > 120 {
				t.Errorf("%s: server %d served %d of 300", arrival, b.index, b.served)
			}
		}
	}
}

// TestHotOverServers: one prefix on three servers gets nearly three times the throughput of one
// server.
func TestHotOverServers(t *testing.T) {
	anew(t)
	for _, slots := range []int{1, 4} {
		for _, loop := range []string{"open", "closed"} {
			work := func(s *sim) { hot(s, 24, 60, loop == "open") }
			name := fmt.Sprintf("one prefix, 24 clients, %d slots, %s", slots, loop)
			_, one := onServers(t, name+", 1 server", engineConfig{slots: slots}, Config{Lanes: slots}, work)
			_, three := onServers(t, name, engineConfig{slots: slots, servers: 3}, Config{Lanes: slots}, work)
			if speedup := float64(one.wall) / float64(three.wall); speedup < 2.7 {
				t.Errorf("%s: %.2f times the throughput", name, speedup)
			} else {
				t.Logf("%.2f times the throughput", speedup)
			}
		}
	}
}

// TestTurnsStay: the turns of a conversation stay on one server, beside five others; if that server
// fails, they move once.
func TestTurnsStay(t *testing.T) {
	anew(t)
	for _, slots := range []int{1, 4} {
		for _, fails := range []bool{false, true} {
			name := fmt.Sprintf("a conversation beside 5 others, %d slots, fails %v", slots, fails)
			s := newSim(t, engineConfig{slots: slots, servers: 2, host: 100_000}, New(Config{Lanes: slots}))
			for c := range 6 {
				var jobs []*job
				segs := []seg{text(800)}
				for range 10 {
					segs = append(slices.Clone(segs), text(60+11*c))
					jobs = append(jobs, &job{segs: segs, gen: 60, client: fmt.Sprint("client", c)})
				}
				s.after(time.Duration(c)*100*time.Millisecond, func() { s.chat(jobs, time.Duration(3000+140*c)*time.Millisecond) })
			}
			where := map[string][]uint16{}
			s.onDone = func(j *job) {
				where[j.client] = append(where[j.client], j.at)
				if fails && j.client == "client0" && len(where[j.client]) == 5 {
					s.kill(int(j.at))
				}
			}
			s.run()
			moves := map[string]int{}
			for client, at := range where {
				for i := 1; i < len(at); i++ {
					if at[i] != at[i-1] {
						moves[client]++
					}
				}
			}
			t.Logf("%s: %.3f, moves %v", name, float64(s.evaluated)/float64(s.least), moves)
			want := 0
			if fails {
				want = 1
			}
			if moves["client0"] != want {
				t.Errorf("%s: it moved %d times: %v", name, moves["client0"], where["client0"])
			}
		}
	}
}

// TestNoHerd: under load, new conversations with a common system prompt do not all go to one
// server; without load, they go where the system prompt is warm.
func TestNoHerd(t *testing.T) {
	anew(t)
	for _, w := range []struct {
		name string
		gap  time.Duration
		most float64 // share of the requests on one server
	}{
		{"all at once", time.Millisecond, 0.40},
		{"as fast as three servers can", 110 * time.Millisecond, 0.45},
		{"one by one", 2 * time.Second, 1},
	} {
		s := newSim(t, engineConfig{slots: 1, servers: 3}, New(Config{Lanes: 1}))
		system := text(500)
		var jobs []*job
		for i := range 120 {
			jobs = append(jobs, &job{segs: []seg{system, text(300)}, gen: 60, client: fmt.Sprint("client", i)})
		}
		for i, j := range jobs {
			s.after(time.Duration(i)*w.gap, func() { s.submit(j) })
		}
		wall := s.run()
		most := 0
		for _, b := range s.boxes {
			most = max(most, b.served)
		}
		t.Logf("%s: %s, %.3f, %v", w.name, s.byServer(), float64(s.evaluated)/float64(s.least), wall)
		if part := float64(most) / 120; part > w.most {
			t.Errorf("%s: %.2f of all on one server", w.name, part)
		}
	}
}

// TestProxiesAgree: two independent proxies send new prefixes to the same servers.
func TestProxiesAgree(t *testing.T) {
	anew(t)
	for _, gap := range []time.Duration{time.Second, 150 * time.Millisecond} {
		var sims []*sim
		ids := ids
		for range 2 {
			s := newSim(t, engineConfig{slots: 4, servers: 5}, New(Config{Lanes: 4}))
			for i := range s.boxes {
				s.q.SetName(uint16(i), fmt.Sprint("gpu", i))
				s.q.SetLoaded(uint16(i), map[string]int{options("m", 0).Model: 0}, s.now, s.now)
			}
			sims = append(sims, s)
			ids := ids
			rng := rand.New(rand.NewPCG(uint64(len(sims)), 1))
			for range 400 { // each sees other requests with the same prefixes
				ids++
				j := &job{segs: []seg{{id: ids, tokens: 700 + 3*int(ids%100)}, {id: ids<<20 + uint64(len(sims)), tokens: 30 + rng.IntN(60)}}, gen: 16, client: "c"}
				s.after(time.Duration(rng.IntN(50))*time.Millisecond+time.Duration(ids)*gap, func() { s.submit(j) })
			}
			s.run()
		}
		at := map[uint64]uint16{}
		for _, j := range sims[0].finished {
			at[j.segs[0].id] = j.at
		}
		same, boxes := 0, map[uint16]int{}
		for _, j := range sims[1].finished {
			if boxes[j.at]++; at[j.segs[0].id] == j.at {
				same++
			}
		}
		t.Logf("one every %v: %d of 400 alike, by server %v", gap, same, boxes)
		if same < 360 {
			t.Errorf("one every %v: %d of 400 alike", gap, same)
		}
	}
}

// TestEvenSplit: thousands of prefixes on eight servers take as long as an eighth of them on one,
// and no prefix is evaluated on two servers except at the very end.
func TestEvenSplit(t *testing.T) {
	anew(t)
	for _, slots := range []int{1, 4} {
		work := func(prefixes int) func(s *sim) {
			return func(s *sim) {
				burst(s, groups(prefixes, 6, 1000, 40, 16, 21))
			}
		}
		name := fmt.Sprintf("4000 x 6, 8 servers, %d slots", slots)
		cfg, q := engineConfig{slots: slots}, Config{Lanes: slots, Limit: 1 << 20}
		_, one := onServers(t, name+", an eighth", cfg, q, work(500))
		cfg.servers = 8
		_, eight := onServers(t, name, cfg, q, work(4000))
		if r := float64(eight.wall) / float64(one.wall); r > 1.05 || eight.ratio > 1.02 {
			t.Errorf("%s: %.3f times the least possible, %.3f times an even split", name, eight.ratio, r)
		}
	}
}

// TestLearnsBesideServers: trying for more slots on one server takes no requests from idle servers.
func TestLearnsBesideServers(t *testing.T) {
	for _, mute := range []bool{false, true} {
		s := newSim(t, engineConfig{slots: 1, host: 1 << 20, servers: 8, load: 4 * time.Second, mute: mute}, New(Config{}))
		p := text(2000)
		for c := range 8 {
			var own []*job
			for range 300 {
				own = append(own, &job{segs: []seg{p, text(50)}, gen: 64, client: "c"})
			}
			s.after(time.Duration(c)*3*time.Millisecond, func() { s.closed(own, time.Millisecond) })
		}
		s.run()
		if s.loads < 7 {
			t.Errorf("answers come whole %v: %d of 8 servers serve 8 loops", mute, s.loads)
		}
	}
}
