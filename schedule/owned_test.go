package schedule

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// movable is a request that another proxy may take over.
func movable(r Request) Request {
	r.Movable = true
	return r
}

// left checks which requests went elsewhere, all to one server, and returns that.
func (d *desk) left(want ...uint64) (to Elsewhere) {
	d.t.Helper()
	var got []uint64
	for i, no := range d.q.Refusals() {
		e, ok := no.Err.(Elsewhere)
		if !ok || i > 0 && e != to {
			d.t.Fatalf("request %d: %v", no.ID, no.Err)
		}
		to = e
		got = append(got, no.ID)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		d.t.Fatalf("%v went elsewhere, want %v", got, want)
	}
	return to
}

// TestOwned: a server of another proxy gets nothing that one of this proxy can serve. What runs
// there ends as usual and still teaches; what waits goes to servers of this proxy, or elsewhere.
func TestOwned(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	a, b := d.add(on(with(alpha), 0)), d.add(on(with(beta), 1))
	d.granted(a, b)
	only := d.add(movable(on(with(alpha), 0)))
	fixed := d.add(on(with(alpha), 0))
	d.q.SetAvailable(1, false, d.now) // so that it waits for server 0
	both := d.add(on(with(alpha), 0, 1))
	d.q.SetAvailable(1, true, d.now)
	d.q.SetOwned(0, false, d.now)
	if to := d.left(only); to.Server != "" || to.Moves != 0 {
		t.Errorf("it went to %+v", to)
	}
	if at := d.q.items[both].runner.server.index; at != 1 {
		t.Errorf("the one for both servers waits for %d", at)
	}
	d.done(a, evaluated(1064, 1064), time.Second)
	if at := d.at(fixed); at != 0 {
		t.Errorf("the one that may not move went to server %d", at)
	}
	if r := d.q.server(0).runners[0].rates; r.prompt.under == 0 {
		t.Error("nothing was learned of what ran there")
	}
	d.done(b, evaluated(1064, 1064), time.Second)
	d.now = d.now.Add(time.Second) // its lane is held for the client that it is warm for
	d.q.Tick(d.now)
	if at := d.at(both); at != 1 {
		t.Errorf("the one for both servers went to %d", at)
	}
	// Another proxy that takes this one for the owner sends a request: as if it were.
	d.done(fixed, evaluated(1064, 64), time.Second)
	if at := d.at(d.add(movable(on(with(alpha), 0)))); at != 0 {
		t.Errorf("the one for a server that nobody owns went to %d", at)
	}
	later := d.add(movable(on(with(alpha), 0, 1))) // server 1 is busy, and its own
	d.granted()
	d.q.SetOwned(0, true, d.now)
	d.q.SetOwned(1, false, d.now)
	d.left() // it waits for server 0 now
	if at := d.q.items[later].runner.server.index; at != 0 {
		t.Errorf("it waits for server %d", at)
	}
	if c := d.q.count; c.Disowned != 1 || c.Given != 0 {
		t.Errorf("%+v", c)
	}
}

// TestNobodysServers: requests whose servers all belong to others are served by any of these, also
// if some are away.
func TestNobodysServers(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	for u := range uint16(3) {
		d.q.SetOwned(u, false, d.now)
	}
	d.q.SetAway(0, true, d.now.Add(time.Minute), d.now)
	var at []uint16
	for range 2 {
		at = append(at, d.at(d.add(movable(on(with(alpha), 0, 1, 2)))))
		d.now = d.now.Add(time.Millisecond)
		if len(at) == 1 { // the second one would wait for the first
			d.add(movable(on(with(beta), 0, 1, 2)))
			at = append(at, d.q.Grants()[0].Upstream)
			break
		}
	}
	slices.Sort(at)
	if !slices.Equal(at, []uint16{1, 2}) {
		t.Errorf("they went to %v", at)
	}
	d.left()
}

// backlog makes server 0 serve one request, and others wait: a number of them for each prefix, in
// this order.
func (d *desk) backlog(prefixes, each int) (ids [][]uint64) {
	d.granted(d.add(on(with(alpha), 0)))
	d.done(1, evaluated(1064, 1064), time.Second)
	d.granted(d.add(on(with(alpha), 0)))
	for p := range prefixes {
		var own []uint64
		for range each {
			d.now = d.now.Add(time.Millisecond)
			own = append(own, d.add(movable(on(with(seg{id: 5000 + uint64(p), tokens: 1000}), 0))))
		}
		ids = append(ids, own)
	}
	d.granted()
	return ids
}

// TestGive: a server of another proxy takes over one prefix for each free lane, from the far end.
func TestGive(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	ids := d.backlog(6, 3)
	taker := Taker{Server: "far", Options: options("m", 0), Free: 2}
	other := taker
	if other.Options = options("m", 2048); d.q.Give(other, d.now) != 0 {
		t.Error("requests were given with other options than theirs")
	}
	if n := d.q.Give(taker, d.now); n != 6 {
		t.Errorf("%d were given", n)
	}
	if to := d.left(slices.Concat(ids[4], ids[5])...); to != (Elsewhere{"far", 1}) {
		t.Errorf("they went to %+v", to)
	}
	if st := d.q.Stats(d.now); st.Given != 6 || st.Waiting[Normal].Requests != 12 {
		t.Errorf("%+v", st)
	}
	taker.Free = 0
	if n := d.q.Give(taker, d.now); n != 0 {
		t.Errorf("%d were given to no lane", n)
	}
}

// TestGiveAtMost: what may not move, or has been moved often, stays; no more than maxTaken are given
// at once.
func TestGiveAtMost(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	d.granted(d.add(on(with(alpha), 0)))
	var moved, often, fixed []uint64
	for i := range uint64(2 * maxTaken) {
		r := movable(on(request("m", seg{id: 9000 + i, tokens: 500}), 0))
		switch i % 8 {
		case 0:
			r.Moves = maxMoves
			often = append(often, d.add(r))
		case 1:
			r.Movable = false
			fixed = append(fixed, d.add(r))
		default:
			r.Moves = maxMoves - 1
			moved = append(moved, d.add(r))
		}
	}
	taker := Taker{Server: "far", Options: options("m", 0), Free: 1000}
	if n := d.q.Give(taker, d.now); n != maxTaken {
		t.Errorf("%d were given", n)
	}
	if n := d.q.Give(taker, d.now); n != len(moved)-maxTaken {
		t.Errorf("%d more were given", n)
	}
	if to := d.left(moved...); to.Moves != maxMoves {
		t.Errorf("moved %d times", to.Moves)
	}
	if n := d.q.Len(); n != len(often)+len(fixed) {
		t.Errorf("%d are left", n)
	}
}

// TestGiveRepays: a prefix on which a lane is working is evaluated elsewhere only if its backlog
// repays that, or once a lane there has been idle for as long as that takes. What a server took
// before is warm there.
func TestGiveRepays(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	d.granted(d.add(on(with(alpha), 0)))
	d.done(1, evaluated(1064, 1064), time.Second)
	d.granted(d.add(on(with(alpha), 0)))
	add := func() uint64 { return d.add(movable(on(with(alpha), 0))) }
	first := add()
	taker := Taker{Server: "far", Options: options("m", 0), Free: 1}
	if n := d.q.Give(taker, d.now); n != 0 {
		t.Error("one request was worth evaluating its prefix again")
	}
	d.now = d.now.Add(5 * time.Second)
	if n := d.q.Give(taker, d.now); n != 0 {
		t.Error("a lane that has just become free evaluates a prefix again at once")
	}
	if taker.Idle = 3 * time.Second; d.q.Give(taker, d.now) != 1 {
		t.Error("an idle lane gets nothing")
	}
	d.left(first)
	second := add()
	if taker.Idle = 0; d.q.Give(taker, d.now) != 1 {
		t.Error("a lane that holds the prefix gets nothing")
	}
	d.left(second)
	third := add()
	if taker.Free, taker.Held = 0, 1; d.q.Give(taker, d.now) != 1 {
		t.Error("a held lane that holds the prefix gets nothing")
	}
	d.left(third)
	fourth := d.add(movable(on(with(beta), 0)))
	if d.q.Give(taker, d.now) != 0 {
		t.Error("a held lane got something else")
	}
	d.q.Leave(fourth, d.now)
	// A long backlog repays it at once. Only a part is given, since others may ask, too.
	for range 100 {
		add()
	}
	if n := d.q.Give(Taker{Server: "other", Options: options("m", 0), Free: 1}, d.now); n < 2 || n > 20 {
		t.Errorf("%d of 100 were given to one of two lanes", n)
	}
}

// TestGiveUrgent: what is interactive is not given where it would wait for a load that takes longer
// than its turn here, and goes first otherwise.
func TestGiveUrgent(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	d.backlog(3, 2)
	urgent := d.add(movable(on(by("person", Interactive, with(seg{id: 7000, tokens: 300})), 0)))
	taker := Taker{Server: "far", Options: options("m", 0), Free: 1, Load: 20 * time.Second, Idle: longestIdle}
	if n := d.q.Give(taker, d.now); n != 0 {
		t.Errorf("%d were given", n)
	}
	taker.Load = 0
	if n := d.q.Give(taker, d.now); n != 1 {
		t.Errorf("%d were given", n)
	}
	d.left(urgent)
}

// TestGiveOwes: what a client owes when another proxy takes its requests over stays.
func TestGiveOwes(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	id := d.add(on(by("heavy", Normal, with(alpha)), 0))
	d.granted(id)
	for i := range uint64(3) {
		d.add(movable(on(by("heavy", Normal, with(seg{id: 300 + i, tokens: 1000})), 0)))
	}
	d.add(on(by("light", Normal, with(beta)), 0))
	d.q.server(0).runners[0].classes[normal].charge(d.q.items[id].account, 1_000_000)
	account := d.q.items[id].account
	owed := account.deficit
	for d.q.Give(Taker{Server: "far", Options: options("m", 0), Free: 9}, d.now) > 0 {
	}
	if account.deficit != owed || owed >= 0 {
		t.Errorf("it owes %d, not %d", account.deficit, owed)
	}
	if d.q.server(0).runners[0].classes[normal].accounts["heavy"] != account {
		t.Error("its account is gone")
	}
}

// TestTaker: a server can take something over if nothing else waits there, and as far as its lanes
// are free and not held.
func TestTaker(t *testing.T) {
	d := newDesk(t, Config{Lanes: 2})
	o := options("m", 0)
	check := func(name string, want Taker) {
		t.Helper()
		got, ok := d.q.Taker(0, o, d.now)
		want.Options = o
		if got.Idle = min(got.Idle, time.Second); got != want && ok || ok != (want.Free+want.Held > 0) {
			t.Errorf("%s: %+v, %v, want %+v", name, got, ok, want)
		}
	}
	check("nothing is loaded", Taker{Free: 2, Load: firstLoad, Idle: time.Second})
	d.q.SetLoaded(0, map[string]int{o.Model: 0}, d.now, d.now)
	check("it is listed as loaded", Taker{Free: 2, Loaded: true, Idle: time.Second})
	for range 12 { // a script that comes back at once
		d.now = d.now.Add(20 * time.Millisecond)
		id := d.add(on(by("script", Normal, with(alpha)), 0))
		d.granted(id)
		check("one is busy", Taker{Free: 1, Loaded: d.q.server(0).runners[0].used.After(d.q.server(0).runners[0].since), Load: d.q.server(0).loading(d.q.server(0).runners[0], o, &rates{}, d.now), Idle: time.Second})
		d.done(id, evaluated(1064, 1064), time.Second)
	}
	check("one is held", Taker{Free: 1, Held: 1, Loaded: true, Idle: time.Second})
	d.now = d.now.Add(time.Minute)
	check("nobody came", Taker{Free: 2, Loaded: true, Idle: time.Second})
	d.q.SetOwned(0, false, d.now)
	check("it is another proxy's", Taker{})
	d.q.SetOwned(0, true, d.now)
	d.q.SetExclusive(0, "a", o.Model, true, d.now)
	d.granted(d.add(on(request("a", seg{id: 1, tokens: 500}), 0)))
	check("another model is in use in its place", Taker{})
}

// TestLoads: they are what route assumes of a new prefix.
func TestLoads(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	d.q.SetExclusive(0, options("m", 0).Model, "b", true, d.now)
	d.backlog(5, 4)
	for i := range uint64(3) {
		d.add(on(request("b", seg{id: 800 + i, tokens: 700}), 0))
	}
	d.add(on(by("later", Batch, with(beta)), 0))
	loads := d.q.Loads()
	if len(loads) != 1 || len(loads[0].Runners) != 2 {
		t.Fatalf("%+v", loads)
	}
	l := loads[0]
	if l.Running != 1 || l.Waiting != d.q.Len() || l.Runners[0].Busy != 1 || l.Runners[0].Movable != 20 || l.Runners[1].Waiting != 3 || l.Runners[1].Resident {
		t.Errorf("%+v", l)
	}
	for _, x := range d.q.server(0).runners {
		it := &item{rank: normal, key: x.key, tokens: 1000}
		it.steps, _ = stepsOf(request(x.key.Options.Model, seg{id: 99999, tokens: 1000}).Links, 1000)
		o := offer{server: x.server, x: x}
		d.q.fillIn(&o, it, &x.rates, false, d.now)
		if got := l.Wait + x.server.loading(x, x.key.Options, &x.rates, d.now); (got - o.load()).Abs() > time.Millisecond {
			t.Errorf("%s: %v, route assumes %v", x.key.Options.Model, got, o.load())
		}
	}
}

// TestElsewhere: Acquire returns where a request is to be sent instead.
func TestElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(Config{Lanes: 1})
		first := <-acquire(t.Context(), s, with(alpha))
		errs := make(chan error, 2)
		wait := func(ctx context.Context, r Request) {
			go func() {
				_, err := s.Acquire(ctx, movable(r))
				errs <- err
			}()
			synctest.Wait()
		}
		wait(t.Context(), with(beta))
		if n := s.Give(Taker{Server: "far", Options: options("m", 0), Free: 1}); n != 1 {
			t.Errorf("%d were given", n)
		}
		var to Elsewhere
		if err := <-errs; !errors.As(err, &to) || to != (Elsewhere{"far", 1}) {
			t.Errorf("it ended with %v", err)
		}
		wait(t.Context(), with(beta))
		s.SetOwned(0, false)
		if err := <-errs; !errors.As(err, &to) || to != (Elsewhere{}) {
			t.Errorf("it ended with %v", err)
		}
		first.Release(served)
		s.SetOwned(0, true)
		if l := s.Loads(); len(l) != 1 || l[0].Running+l[0].Waiting != 0 {
			t.Errorf("%+v", l)
		}
		if _, ok := s.Taker(0, options("m", 0)); !ok {
			t.Error("an idle server takes nothing over")
		}
		s.Close()
	})
}

// BenchmarkLoads measures what a report needs, with 10,000 requests that wait for 256 servers.
func BenchmarkLoads(b *testing.B) {
	for _, servers := range []int{4, 256} {
		b.Run(fmt.Sprint(servers, " servers"), func(b *testing.B) {
			q, _ := fullFleet(servers)
			b.ReportAllocs()
			for b.Loop() {
				q.Loads()
			}
		})
	}
}

// BenchmarkGive measures an ask for one lane with 10,000 requests that wait, per ask and with one
// request that arrives for each that was given.
func BenchmarkGive(b *testing.B) {
	for _, servers := range []int{4, 256} {
		b.Run(fmt.Sprint(servers, " servers"), func(b *testing.B) {
			q, now := fullFleet(servers)
			id := uint64(1 << 20)
			b.ReportAllocs()
			for b.Loop() {
				n := q.Give(Taker{Server: "far", Options: options("m", 0), Free: 1}, now)
				if n == 0 {
					b.Fatal("nothing was given")
				}
				q.Refusals()
				b.StopTimer()
				for range n {
					id++
					q.Add(fleetRequest(id, servers), now)
				}
				q.Grants()
				b.StartTimer()
			}
		})
	}
}

// fullFleet returns a queue with 10,000 movable requests that wait for a number of servers.
func fullFleet(servers int) (*Queue, time.Time) {
	q := New(Config{Lanes: 4, Limit: 1 << 20})
	for id := range uint64(10_000) {
		q.Add(fleetRequest(id, servers), start.Add(time.Duration(id)*time.Microsecond))
	}
	q.Grants()
	return q, start.Add(time.Second)
}

func fleetRequest(id uint64, servers int) Request {
	j := &job{model: "m", segs: []seg{{id: 1, tokens: 500}, {id: 1000 + id*7919%2500, tokens: 1000}, {id: id + 1<<32, tokens: 50}}}
	r := Request{ID: id, Runner: Runner{Options: options("m", 0)}, Links: j.links(), Client: fmt.Sprint(id % 8), Movable: true}
	r.Upstreams = []uint16{uint16(id * 7919 % 2500 % uint64(servers))}
	return r
}
