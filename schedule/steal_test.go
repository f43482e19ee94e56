package schedule

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// on sets the servers that may serve a request.
func on(r Request, upstreams ...uint16) Request {
	r.Upstreams = upstreams
	return r
}

// at returns the server of the only grant.
func (d *desk) at(id uint64) uint16 {
	d.t.Helper()
	return d.granted(id)[0].Upstream
}

// TestFollowsWarmth: a request goes where its prefix is warm, or is about to be.
func TestFollowsWarmth(t *testing.T) {
	d := newDesk(t, Config{Lanes: 2})
	first := d.add(on(with(alpha), 0, 1, 2))
	home := d.at(first)
	second := d.add(on(with(alpha), 0, 1, 2)) // the first is being evaluated, so it waits for that
	d.granted()
	d.done(first, evaluated(1064, 1064), time.Second)
	if at := d.at(second); at != home {
		t.Errorf("a sibling went to server %d, not %d", at, home)
	}
	d.done(second, evaluated(1064, 64), time.Second)
	d.now = d.now.Add(time.Minute)
	third := d.add(on(with(alpha), 2, 1, 0))
	if at := d.at(third); at != home {
		t.Errorf("a later sibling went to server %d, not %d", at, home)
	}
	elsewhere := (home + 1) % 3
	if at := d.at(d.add(on(with(beta), elsewhere))); at != elsewhere {
		t.Errorf("one that may go to server %d only went to %d", elsewhere, at)
	}
}

// TestBoundedLoad: new prefixes avoid a server that has much more to do than the others, whatever
// their hash.
func TestBoundedLoad(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	for i := range uint16(3) {
		d.add(on(with(alpha), i))
	}
	for i := range uint64(20) {
		d.add(on(request("m", seg{id: 50 + i, tokens: 1000}), 0))
	}
	d.granted(1, 2, 3)
	for i := range uint64(30) {
		d.add(on(request("m", seg{id: 100 + i, tokens: 1000}), 0, 1, 2))
	}
	n := [3]int{}
	for i := range n {
		n[i] = d.q.server(uint16(i)).waiting
	}
	if n[0] > 23 || n[1] < 5 || n[2] < 5 {
		t.Errorf("%v wait", n)
	}
}

// TestSparesWarmLanes: a new prefix does not displace a prompt to which a client is likely to
// return, if a lane elsewhere is not needed.
func TestSparesWarmLanes(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	long := seg{id: 9, tokens: 8000}
	for range 12 { // a script that comes back
		id := d.add(on(by("script", Normal, request("m", long, seg{id: 1000 + d.id, tokens: 64})), 0))
		d.granted(id)
		d.done(id, evaluated(8064, 64), time.Second)
		d.now = d.now.Add(50 * time.Millisecond)
	}
	d.q.SetLoaded(1, map[string]int{options("m", 0).Model: 0}, d.now, d.now)
	for i := range uint64(10) {
		id := d.add(on(request("m", seg{id: 100 + i, tokens: 300}), 0, 1))
		if at := d.at(id); at != 1 {
			t.Errorf("it displaced what the script comes back for")
		}
		d.done(id, evaluated(300, 300), 10*time.Microsecond)
	}
}

// TestUnavailable: the backlog of a server that is down goes elsewhere and keeps its order;
// requests that only it may serve stay.
func TestUnavailable(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	a, b := d.add(on(with(alpha), 0)), d.add(on(with(beta), 1))
	d.granted(a, b)
	var both []uint64
	for i := range uint64(4) { // all wait for server 0
		d.now = d.now.Add(time.Millisecond)
		d.q.SetAvailable(1, false, d.now)
		both = append(both, d.add(on(with(seg{id: 10 + i, tokens: 500}), 0, 1)))
	}
	only := d.add(on(with(seg{id: 20, tokens: 500}), 0))
	d.now = d.now.Add(time.Millisecond)
	other := d.add(on(with(seg{id: 21, tokens: 500}), 1))
	d.q.SetAvailable(1, true, d.now)
	d.q.SetAvailable(0, false, d.now)
	d.q.Cool(0, "", d.now)
	d.granted()
	if got := d.q.Stats(d.now); got.Moved != 4 || got.Waiting[Normal].Requests != 6 {
		t.Errorf("%+v", got)
	}
	d.done(a, Result{Sent: true}, 0)
	if at := d.at(only); at != 0 { // its sender learns at once that the server is down
		t.Errorf("one that may go nowhere else went to %d", at)
	}
	running := b
	for _, want := range append(both, other) {
		d.done(running, evaluated(564, 564), time.Second)
		if len(d.q.grants) == 0 {
			d.wake() // the lane was held
		}
		g := d.granted(want)[0]
		if g.Upstream != 1 || g.Waited < 100*time.Millisecond {
			t.Errorf("%+v", g)
		}
		running = want
	}
	// A server that returns takes its share.
	more := d.add(on(with(seg{id: 30, tokens: 500}), 0, 1))
	d.granted()
	d.q.SetAvailable(0, true, d.now)
	d.done(only, Result{}, 0)
	if at := d.at(more); at != 0 {
		t.Errorf("it went to server %d", at)
	}
	// With all servers down nothing is lost, and the backlog goes to whichever returns.
	last := d.add(on(with(seg{id: 31, tokens: 500}), 0, 1))
	d.q.SetAvailable(0, false, d.now)
	d.q.SetAvailable(1, false, d.now)
	d.granted()
	d.q.SetAvailable(1, true, d.now)
	d.done(running, evaluated(564, 564), time.Second)
	d.now = d.now.Add(time.Second)
	d.q.Tick(d.now)
	if at := d.at(last); at != 1 {
		t.Errorf("it went to server %d", at)
	}
}

// TestVacateKeepsOrder: requests of many clients that move keep their order of arrival.
func TestVacateKeepsOrder(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	a, b := d.add(on(with(alpha), 0)), d.add(on(with(beta), 1))
	d.granted(a, b)
	for i := range uint64(200) {
		d.now = d.now.Add(time.Millisecond)
		d.add(on(by(string(rune('a'+i%7)), Normal, with(seg{id: 100 + i, tokens: 500})), uint16(i%2), 2))
		d.q.SetAvailable(2, false, d.now)
	}
	d.q.SetAvailable(1, false, d.now)
	if n := d.q.server(1).waiting; n != 100 {
		t.Fatalf("%d wait for server 1, which may go nowhere", n)
	}
	d.q.SetAvailable(0, false, d.now)
	d.q.SetAvailable(2, true, d.now)
	last := time.Time{}
	x := d.q.server(2).runners[0]
	for _, it := range x.waiters() {
		if it.arrived.Before(last) {
			t.Fatalf("%v comes after %v", it.arrived, last)
		}
		last = it.arrived
	}
	if got := len(d.q.Grants()); got != 1 || x.waiting != 199 {
		t.Errorf("%d granted, %d wait", got, x.waiting)
	}
}

// TestTakesOver: an idle server takes over a whole prefix, from the far end, and nothing of a
// prefix that is being served.
func TestTakesOver(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	d.q.SetLoaded(0, map[string]int{options("m", 0).Model: 0}, d.now, d.now)
	d.q.SetLoaded(1, map[string]int{options("m", 0).Model: 0}, d.now, d.now)
	d.q.SetAvailable(1, false, d.now)
	first := d.add(on(with(alpha), 0, 1))
	d.granted(first)
	var far []uint64
	for _, p := range []seg{alpha, beta, {id: 3, tokens: 1000}} {
		for range 3 {
			far = append(far, d.add(on(with(p), 0, 1)))
		}
	}
	d.granted()
	d.q.SetAvailable(1, true, d.now)
	if at := d.at(far[6]); at != 1 {
		t.Fatalf("the far end's oldest went to server %d", at)
	}
	if n := d.q.server(1).waiting; n != 2 || d.q.count.Stolen != 3 {
		t.Errorf("%d wait there, %d were taken over", n, d.q.count.Stolen)
	}
	for _, id := range far[6:8] {
		d.done(id, evaluated(1064, 64), time.Millisecond)
		d.granted(id + 1)
	}
	d.done(far[8], evaluated(1064, 64), time.Millisecond)
	d.granted()
	d.wake()                         // the lane was held for the client's next request
	if at := d.at(far[3]); at != 1 { // the prefix in the middle
		t.Errorf("the next went to server %d", at)
	}
	d.done(first, evaluated(1064, 1064), time.Millisecond)
	d.granted(far[0])
	if d.q.count.Spread+d.q.count.Joined != 0 {
		t.Errorf("%+v", d.q.count)
	}
}

// TestTakesOverUnloaded: a server without the model loaded takes over only as much as is worth the
// load.
func TestTakesOverUnloaded(t *testing.T) {
	for _, w := range []struct {
		waiting int
		want    bool
	}{{1, false}, {20, true}} {
		d := newDesk(t, Config{Lanes: 1})
		first := d.add(on(with(alpha), 0))
		d.granted(first)
		d.done(first, evaluated(1064, 1064), time.Second) // 1 ms for a token
		second := d.add(on(with(alpha), 0))
		d.granted(second)
		d.q.SetAvailable(1, false, d.now)
		for i := range w.waiting {
			d.add(on(request("m", seg{id: uint64(50 + i), tokens: 400}), 0, 1))
		}
		d.q.SetAvailable(1, true, d.now)
		if took := d.q.count.Stolen > 0; took != w.want {
			t.Errorf("with %d that wait: taken over %v", w.waiting, took)
		}
		d.q.Grants()
		if w.want {
			continue
		}
		// Whatever the estimates, no request waits much longer than a load takes while a server is
		// idle.
		waited := time.Duration(0)
		for d.q.count.Stolen == 0 && waited < time.Minute {
			waited += d.wake()
		}
		if waited < firstLoad || waited > 2*firstLoad {
			t.Errorf("it was taken over after %v", waited)
		}
	}
}

// TestDebtMoves: a client's debt moves with its requests.
func TestDebtMoves(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	first := d.add(on(by("heavy", Normal, with(alpha)), 0))
	d.granted(first)
	d.q.SetAvailable(1, false, d.now)
	d.add(on(by("heavy", Normal, with(beta)), 0, 1))
	d.add(on(by("heavy", Normal, with(beta)), 0, 1))
	class := &d.q.server(0).runners[0].classes[Normal.rank()]
	a := class.accounts["heavy"]
	owes := a.deficit - 50_000
	d.add(on(by("light", Normal, with(beta)), 0))
	class.charge(a, 50_000)
	d.q.SetAvailable(1, true, d.now)
	d.q.SetAvailable(0, false, d.now)
	x := d.q.server(1).runners[0]
	b := x.classes[Normal.rank()].accounts["heavy"]
	if a.deficit != 0 || b.deficit > owes+2*class.quantum {
		t.Errorf("it owed %d, and has %d and %d", -owes, a.deficit, b.deficit)
	}
}

// TestUnlimited: nothing waits, but the queue remembers what is warm where.
func TestUnlimited(t *testing.T) {
	d := newDesk(t, Config{Lanes: Unlimited})
	first := d.add(on(with(alpha), 0, 1))
	home := d.at(first)
	d.done(first, evaluated(1064, 1064), time.Second)
	var running []uint64
	lanes := map[int]bool{}
	for i := range uint64(100) {
		id := d.add(on(with(seg{id: 50 + i, tokens: 500}), home))
		g := d.granted(id)[0]
		if lanes[g.Lane] {
			t.Fatalf("lane %d twice", g.Lane)
		}
		lanes[g.Lane] = true
		running = append(running, id)
	}
	if st := d.q.Stats(d.now); st.Runners[0].Lanes != 0 || st.Runners[0].Busy != 100 {
		t.Errorf("%+v", st.Runners)
	}
	for _, id := range running {
		d.done(id, evaluated(564, 564), time.Millisecond)
	}
	x := d.q.server(home).runners[0]
	if len(x.lanes) != maxWarm {
		t.Errorf("%d lanes are remembered", len(x.lanes))
	}
	d.now = d.now.Add(time.Hour)
	warm := d.add(on(with(seg{id: 149, tokens: 500}), 0, 1))
	if g := d.granted(warm)[0]; g.Upstream != home || g.Expected < 400 {
		t.Errorf("%+v", g)
	}
	// Options that exclude each other in memory do not make requests wait either.
	r := with(alpha)
	r.Runner.Options = options("m", 4096)
	other := d.add(on(r, home))
	d.granted(other)

	d.q.SetLanes(home, 1, d.now)
	waits := d.add(on(with(alpha), home))
	d.granted()
	d.q.SetLanes(home, Unlimited, d.now)
	d.granted(waits)
	d.q.SetLanes(home, 0, d.now)
	if n := x.want; n != 1 {
		t.Errorf("learned from %d on", n)
	}
}

// TestNoPingPong: however servers come and go, a request moves only a few times, and there are
// never more moves than requests.
func TestNoPingPong(t *testing.T) {
	anew(t)
	for _, slots := range []int{1, 3} {
		s := newSim(t, engineConfig{servers: 4, slots: slots, load: time.Second}, New(Config{Lanes: slots}))
		jobs := groups(60, 12, 800, 60, 20, 8)
		for i, j := range jobs {
			j.numCtx = 2048 * (i % 2)
		}
		spaced(s, jobs, 20*time.Millisecond, 4)
		for i := range 20 {
			s.after(time.Duration(i)*1500*time.Millisecond, func() { s.kill(i % 4) })
			s.after(time.Duration(i)*1500*time.Millisecond+time.Second, func() { s.revive(i % 4) })
		}
		wall := s.run()
		t.Logf("%d slots: %v, %+v, %d loads, %s", slots, wall, s.q.count, s.loads, s.byServer())
		if s.q.count.Stolen > uint64(len(jobs)) {
			t.Errorf("%d slots: %d requests were taken over of %d", slots, s.q.count.Stolen, len(jobs))
		}
	}
}

func TestOpening(t *testing.T) {
	block := func(bytes int, message int32) prefix.Link {
		return prefix.Link{Hash: uint64(bytes)<<8 | uint64(message+1), Bytes: bytes, Message: message, Part: prefix.Block}
	}
	chain := func(system, user int, rest ...int) (links []prefix.Link) {
		links = append(links, prefix.Link{Hash: 1, Message: -1}, prefix.Link{Hash: 2, Message: -1})
		at, message := 0, int32(0)
		for _, n := range append([]int{system, user}, rest...) {
			for end := at + n; at < end; {
				at = min(at+256, end)
				links = append(links, block(at, message))
			}
			message++
		}
		return links
	}
	for _, w := range []struct {
		name  string
		links []prefix.Link
		bytes int
	}{
		{"nothing", nil, 0},
		{"no text", chain(0, 0), 0},
		{"tiny: all of it", chain(0, 100), 100},
		{"a short system prompt and a longer question", chain(300, 900), 300 + 256},
		{"a long system prompt and a short question", chain(3000, 200), 2048},
		{"the same, and another question", chain(3000, 350), 2048},
		{"longer than what decides", chain(20_000, 20_000), 4096},
		{"turns do not matter", chain(300, 900, 5000, 5000), 300 + 256},
	} {
		i := slices.IndexFunc(w.links, func(l prefix.Link) bool { return l.Hash == openingOf(w.links) })
		got := 0
		if i >= 0 {
			got = w.links[i].Bytes
		}
		if got != w.bytes {
			t.Errorf("%s: the first %d bytes decide, want %d", w.name, got, w.bytes)
		}
	}
}

// TestNames: servers are identified by their names, in any order.
func TestNames(t *testing.T) {
	place := func(names ...string) map[uint64]string {
		d := newDesk(t, Config{Lanes: 1})
		for i, n := range names {
			d.q.SetName(uint16(i), n)
			d.q.SetLoaded(uint16(i), map[string]int{options("m", 0).Model: 0}, d.now, d.now)
		}
		at := map[uint64]string{}
		for i := range uint64(50) {
			id := d.add(on(request("m", seg{id: 900 + i, tokens: 800}), 0, 1, 2))
			at[i] = names[d.at(id)]
			d.done(id, evaluated(800, 800), time.Second)
			d.now = d.now.Add(time.Hour)
		}
		return at
	}
	a, b := place("x", "y", "z"), place("z", "x", "y")
	counts := map[string]int{}
	for i := range a {
		if counts[a[i]]++; a[i] != b[i] {
			t.Errorf("prefix %d goes to %s and to %s", i, a[i], b[i])
		}
	}
	if len(counts) != 3 {
		t.Errorf("by server: %v", counts)
	}
}

// TestSchedulerServers: when a server goes down, its backlog in the Scheduler is granted elsewhere.
func TestSchedulerServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		s.SetName(0, "left")
		s.SetName(1, "right")
		s.SetLoaded(1, map[string]int{options("m", 0).Model: 0}, time.Now())
		a := <-acquire(t.Context(), s, on(request("m", alpha), 0))
		s.SetAvailable(1, false)
		b := acquire(t.Context(), s, on(request("m", beta), 0, 1))
		if len(b) != 0 {
			t.Fatal("it does not wait")
		}
		s.SetAvailable(1, true)
		synctest.Wait()
		g := <-b
		if g.Upstream != 1 {
			t.Errorf("%+v", g.Placement)
		}
		a.Release(served)
		g.Release(served)
		s.SetLanes(0, Unlimited)
		one, two := <-acquire(t.Context(), s, on(request("m", alpha), 0)), <-acquire(t.Context(), s, on(request("m", beta), 0))
		one.Release(served)
		two.Release(served)
		s.Close()
	})
}
