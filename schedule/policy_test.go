package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// desk sends requests to a queue by hand.
type desk struct {
	t   *testing.T
	q   *Queue
	now time.Time
	id  uint64
}

func newDesk(t *testing.T, cfg Config) *desk { return &desk{t: t, q: New(cfg), now: start} }

// add adds a request and returns its number.
func (d *desk) add(r Request) uint64 {
	d.id++
	r.ID = d.id
	if !d.q.Add(r, d.now) {
		d.t.Fatalf("request %d was refused", d.id)
	}
	return d.id
}

// granted checks which requests are granted now.
func (d *desk) granted(want ...uint64) []Placement {
	d.t.Helper()
	places := slices.Clone(d.q.Grants())
	var got []uint64
	for _, p := range places {
		got = append(got, p.ID)
	}
	if !slices.Equal(got, want) {
		d.t.Fatalf("granted %v, want %v", got, want)
	}
	return places
}

// wake advances the clock to the time when the queue wants to look again, and returns how long that
// took.
func (d *desk) wake() time.Duration {
	d.t.Helper()
	at, ok := d.q.Next()
	if !ok {
		d.t.Fatal("the queue does not want to look again")
	}
	wait := at.Sub(d.now)
	d.now = at
	d.q.Tick(d.now)
	return wait
}

// evaluated is the result of a request with n evaluated tokens of its prompt, at 1 ms each.
func evaluated(total, n int) Result {
	return Result{
		Sent: true, Answered: true, Total: total, Reused: total - n, ReusedKnown: true, Generated: 10,
		Timed: true, Prompt: time.Duration(n) * time.Millisecond, Eval: 100 * time.Millisecond, LoadKnown: true,
	}
}

func (d *desk) done(id uint64, r Result, after time.Duration) {
	d.now = d.now.Add(after)
	d.q.Done(id, r, d.now)
}

func by(client string, p Priority, r Request) Request {
	r.Client, r.Priority = client, p
	return r
}

var (
	alpha, beta = seg{id: 1, tokens: 1000}, seg{id: 2, tokens: 1000}
	tails       = uint64(100)
)

// with is a request with this prefix and a new tail.
func with(prefix seg) Request {
	tails++
	return request("m", prefix, seg{id: tails, tokens: 64})
}

// TestUnsent: a request that never reached its server leaves its lane as it was. A request that
// reached it but was not answered leaves nothing there that can be relied on.
func TestUnsent(t *testing.T) {
	for _, w := range []struct {
		result   Result
		expected int
	}{{Result{}, 1000}, {Result{Sent: true}, 0}, {Result{Sent: true, Answered: true}, 0}} {
		d := newDesk(t, Config{Lanes: 1})
		d.done(d.add(with(alpha)), evaluated(1064, 1064), time.Second)
		d.granted(1)
		d.add(with(beta))
		d.granted(2)
		d.done(2, w.result, time.Second)
		d.add(with(alpha))
		if got := d.granted(3)[0].Expected; got > w.expected || got < w.expected-64 {
			t.Errorf("after %+v %d tokens are expected, want about %d", w.result, got, w.expected)
		}
	}
}

// TestLoadedAnew: a load clears what the lanes held.
func TestLoadedAnew(t *testing.T) {
	d := newDesk(t, Config{Lanes: 2})
	a, b := d.add(with(alpha)), d.add(with(beta))
	d.granted(a, b)
	d.done(a, evaluated(1064, 1064), time.Second)
	d.done(b, evaluated(1064, 1064), time.Second)
	d.now = d.now.Add(time.Hour)
	c := d.add(with(alpha))
	if got := d.granted(c)[0].Expected; got < 900 {
		t.Fatalf("%d tokens are expected", got)
	}
	r := evaluated(1064, 1064)
	r.Loaded, r.Load = true, 2*time.Second
	d.done(c, r, 3*time.Second)
	e := d.add(with(beta))
	if got := d.granted(e)[0].Expected; got != 0 {
		t.Errorf("%d tokens are expected of a prompt that was there before the load", got)
	}
}

// TestAgedDuringHold: a request that has waited for too long does not wait for a held lane.
func TestAgedDuringHold(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1, MaxWait: 200 * time.Millisecond})
	// A script returns after 15 ms: enough work to leave for an aged request.
	for range 8 {
		id := d.add(by("script", Normal, with(alpha)))
		d.granted(id)
		r := evaluated(1064, 1064)
		d.done(id, r, time.Second)
		d.now = d.now.Add(15 * time.Millisecond)
	}
	id := d.add(by("script", Normal, with(alpha)))
	d.granted(id)
	d.now = d.now.Add(time.Second)
	other := d.add(by("other", Normal, with(beta)))
	d.done(id, evaluated(1064, 64), 195*time.Millisecond)
	d.granted()
	if wait := d.wake(); wait != 5*time.Millisecond {
		t.Errorf("looked again after %v", wait)
	}
	d.granted(other)
}

// TestHoldEnds: a lane is not held for a client that has used up its share, nor against a more
// urgent request.
func TestHoldEnds(t *testing.T) {
	for _, w := range []struct {
		name     string
		priority Priority
		share    int
		held     bool
	}{
		{"equally urgent", Normal, 100_000, true},
		{"more urgent", Interactive, 100_000, false},
		{"less urgent", Batch, 100_000, true},
		{"its share is used up", Normal, -1000, false},
	} {
		d := newDesk(t, Config{Lanes: 1})
		id := d.add(by("script", Normal, with(alpha)))
		d.granted(id)
		other := d.add(by("other", w.priority, with(beta)))
		x := d.q.servers[0].runners[0]
		x.classes[Normal.rank()].accounts["script"].deficit = w.share
		if w.share < 0 {
			x.classes[Normal.rank()].accounts["other"].deficit = 100
		}
		d.done(id, evaluated(1064, 1064), time.Second)
		if w.held {
			d.granted()
			d.wake()
		}
		d.granted(other)
	}
}

// TestJoin: a request whose prefix is being evaluated waits for that, unless it is urgent, enough
// others wait as well, or it has waited for as long as the evaluation takes.
func TestJoin(t *testing.T) {
	warm := func(d *desk) uint64 { // teaches 1 ms per token, and answers of 10 tokens
		id := d.add(with(beta))
		d.granted(id)
		d.done(id, evaluated(1064, 1064), time.Second)
		d.q.Cool(0, "", d.now)
		id = d.add(with(alpha))
		d.granted(id)
		return id
	}
	d := newDesk(t, Config{Lanes: 2})
	warm(d)
	second := d.add(with(alpha))
	d.granted()
	if wait := d.wake(); wait < 900*time.Millisecond || wait > 1100*time.Millisecond {
		t.Errorf("it waited for %v, and the prefix takes a second", wait)
	}
	d.granted(second)

	d = newDesk(t, Config{Lanes: 2})
	warm(d)
	urgent := d.add(by("c", Interactive, with(alpha)))
	d.granted(urgent)

	d = newDesk(t, Config{Lanes: 2})
	first := warm(d)
	sibling := d.add(with(alpha))
	d.granted()
	d.done(first, evaluated(1064, 1064), 100*time.Millisecond)
	if got := d.granted(sibling)[0].Expected; got < 900 {
		t.Errorf("the sibling finds %d tokens", got)
	}

	d = newDesk(t, Config{Lanes: 2})
	warm(d)
	n := 0
	for ; n < 40 && len(d.q.grants) == 0; n++ {
		d.add(with(alpha))
	}
	if n < 5 || n == 40 {
		t.Errorf("with %d that wait the other lane joins", n)
	}
	other := d.add(with(beta))
	if len(d.q.Grants()) != 1 {
		t.Errorf("more than one lane joined, or request %d was granted without one", other)
	}
}

// TestUrgentRunner: an interactive request for a runner that is not loaded does not wait for the
// backlog of the loaded one.
func TestUrgentRunner(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	first := d.add(by("batch", Batch, with(alpha)))
	d.granted(first)
	second := d.add(by("batch", Batch, with(alpha)))
	r := by("human", Interactive, with(alpha))
	r.Runner.Options = options("m", 4096)
	human := d.add(r)
	d.done(first, evaluated(1064, 1064), time.Second)
	d.granted(human)
	loaded := evaluated(1064, 1064)
	loaded.Loaded, loaded.Load = true, 2*time.Second
	d.done(human, loaded, time.Second)
	d.granted() // the first client may return, and a load takes longer than a short wait
	if wait := d.wake(); wait > 2*time.Second {
		t.Errorf("the model was kept for %v", wait)
	}
	d.granted(second)
}

// TestRounds: a client that returns gets one quantum, whatever credit it had left, but its debts
// stay.
func TestRounds(t *testing.T) {
	c := &class{tree: newTree(), accounts: map[string]*account{}, rates: &rates{}}
	it := func() *item { return &item{waits: true, tokens: 5} } // a quantum of 100
	leave := func(i *item) {
		i.waits = false
		c.remove(i, false)
	}
	for _, w := range []struct{ had, want int }{{500, 100}, {-30, 70}, {0, 100}, {-250, -150}} {
		first := it()
		first.who.client = "client"
		c.add(first)
		leave(first)
		c.accounts["client"].deficit = w.had
		again := it()
		again.who.client = "client"
		c.add(again)
		if got := c.accounts["client"].deficit; got != w.want {
			t.Errorf("with %d left it has %d in the next round, want %d", w.had, got, w.want)
		}
		leave(again)
	}
	// Of two clients in debt, the one that owes less continues first.
	a, b := it(), it()
	a.who.client = "a"
	c.add(a)
	b.who.client = "b"
	c.add(b)
	c.charge(a.account, 300)
	c.charge(b.account, 1000)
	c.refill()
	if a.account.deficit != 100 || b.account.deficit != -600 || c.positive != 1 {
		t.Errorf("after a refill: %d and %d, %d above 0", a.account.deficit, b.account.deficit, c.positive)
	}
	leave(a)
	leave(b)
	// A client that came first with large requests returns the excess over everyone's quantum.
	large := &item{waits: true, tokens: 1000}
	large.who.client = "large"
	c.add(large)
	c.charge(large.account, 9000)
	small := it()
	small.who.client = "small"
	c.add(small)
	if want := 20 * (1000 + 5) / 2; large.account.deficit != want-9000 || small.account.deficit != want || c.positive != 2 || c.sizes != 1005 {
		t.Errorf("%d and %d, %d above 0, want %d less what was had; sizes %v", large.account.deficit, small.account.deficit, c.positive, want, c.sizes)
	}
	leave(large)
	if leave(small); c.positive != 0 || c.sizes != 0 {
		t.Errorf("%d above 0, sizes %v with nobody there", c.positive, c.sizes)
	}
}

// TestHoldTime: a lane is never held for longer than that may save, and not if clients do not
// return.
func TestHoldTime(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 5))
	all := firstHabits()
	for range 2000 {
		var h returns
		for range rng.IntN(40) {
			if rng.IntN(3) == 0 {
				h.miss()
			} else {
				h.came(time.Duration(rng.ExpFloat64() * float64(100*time.Millisecond)))
			}
		}
		loss := time.Duration(rng.ExpFloat64() * float64(200*time.Millisecond))
		if hold := h.hold(&all, loss); hold > loss || hold < 0 {
			t.Fatalf("held for %v for %v", hold, loss)
		}
	}
	var punctual, gone returns
	for range 20 {
		punctual.came(5 * time.Millisecond)
		gone.miss()
	}
	if hold := punctual.hold(&all, time.Second); hold < 5*time.Millisecond || hold > 50*time.Millisecond {
		t.Errorf("held for %v for a client that always takes 5 ms", hold)
	}
	if hold := gone.hold(&all, 200*time.Millisecond); hold != 0 {
		t.Errorf("held for %v for clients that do not come back", hold)
	}
}

// TestForgets: a client that never continues its prompts becomes known for that.
func TestForgets(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	for i := range maxVisits + 10 {
		id := d.add(request("m", seg{id: uint64(1000 + i), tokens: 500}))
		d.granted(id)
		d.done(id, evaluated(500, 500), time.Second)
	}
	if h := d.q.client("c"); h.missed < 9 || h.total() != h.missed {
		t.Errorf("its habits: %+v", h)
	}
}

// TestRequeued: a request whose server did not answer keeps its place.
func TestRequeued(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	first := d.add(with(alpha))
	d.granted(first)
	d.now = d.now.Add(time.Second)
	d.add(with(beta))
	again := with(seg{id: 3, tokens: 1000})
	again.Arrived = start
	id := d.add(again)
	if st := d.q.Stats(d.now); st.Waiting[Normal].Oldest != 0 && st.Waiting[Normal].Requests != 2 {
		t.Errorf("%+v", st.Waiting)
	}
	d.q.cfg.MaxWait = time.Second
	d.q.servers[0].runners[0].lanes[0].since = 1 << 20
	d.done(first, Result{}, 10*time.Millisecond)
	if g := d.q.Grants(); len(g) != 1 || g[0].ID != id || g[0].Waited != 1010*time.Millisecond {
		t.Errorf("granted %+v, want request %d", g, id)
	}
}

// TestClientsGone: any number of clients are forgotten once they are gone.
func TestClientsGone(t *testing.T) {
	d := newDesk(t, Config{Lanes: 1})
	for i := range 5 * leastSweep {
		id := d.add(by(fmt.Sprint("client", i), Normal, with(alpha)))
		d.granted(id)
		d.done(id, served, time.Second)
	}
	if n := len(d.q.servers[0].runners[0].classes[Normal.rank()].accounts); n > leastSweep {
		t.Errorf("%d accounts are kept", n)
	}
}

// TestTogether: two models in use at the same time can be loaded together, which is known once a
// request to one is answered while an earlier one to the other is running.
func TestTogether(t *testing.T) {
	d := newDesk(t, Config{Lanes: 2})
	first := d.add(request("a", alpha))
	d.granted(first)
	second := d.add(request("b", alpha))
	d.granted() // it might overtake the first one
	d.wake()
	d.granted(second)
	d.add(request("a", beta)) // while b is loaded, a gets nothing else: that might need a load
	d.granted()
	d.done(second, evaluated(1000, 1000), time.Second)
	d.granted(3)
	third := d.add(request("b", beta))
	d.granted(third)
	s := d.q.servers[0]
	if r := s.relation(s.runners[0], s.runners[1]); r != together {
		t.Errorf("the models' relation is %d", r)
	}
}

func TestPriorityNames(t *testing.T) {
	for p, want := range map[Priority]string{Interactive: "interactive", Normal: "normal", Batch: "batch", -100: "interactive", 100: "batch"} {
		if p.String() != want {
			t.Errorf("%d is %q", p, p)
		}
	}
}

// sole has a model serve one request by itself; loaded means that this caused a load.
func (d *desk) sole(model string, loaded bool) {
	d.t.Helper()
	id := d.add(request(model, alpha))
	d.granted(id)
	r := evaluated(1000, 1000)
	if r.Loaded = loaded; loaded {
		r.Load = 2 * time.Second
	}
	d.done(id, r, 3*time.Second)
	d.now = d.now.Add(time.Minute)
}

// TestExpiryIsNotExclusive: if a model's keep_alive ran out while another one was loaded, the two
// seem to exclude each other. An answer, or a list, that shows both loaded overrules that, even for
// requests that already wait.
func TestExpiryIsNotExclusive(t *testing.T) {
	for _, w := range []struct {
		name string
		tell func(*desk)
		fit  bool
	}{
		{"nothing more is known", func(*desk) {}, false},
		{"no load was seen", func(d *desk) { d.sole("b", false) }, true},
		{"a load was seen", func(d *desk) { d.sole("b", true) }, false},
		{"both are loaded", func(d *desk) { d.q.SetLoaded(0, map[string]int{"a": 0, "b": 0}, d.now, d.now) }, true},
		{"a is unloaded", func(d *desk) { d.q.Cool(0, "a", d.now) }, true},
		{"b is unloaded", func(d *desk) { d.q.Cool(0, "b", d.now) }, true},
		{"another one is unloaded", func(d *desk) { d.q.Cool(0, "c", d.now) }, false},
	} {
		t.Run(w.name, func(t *testing.T) {
			d := newDesk(t, Config{Lanes: 2})
			d.sole("a", true)
			d.sole("b", true)
			d.sole("a", true) // it had expired
			s := d.q.servers[0]
			if r := s.relations[pair("a", "b")]; r != apart {
				t.Fatalf("the models' relation is %d at first", r)
			}
			w.tell(d)
			if r := s.relations[pair("a", "b")]; (r != apart) != w.fit {
				t.Errorf("the models' relation is %d", r)
			}
			long := d.add(request("a", alpha))
			d.granted(long)
			other := d.add(request("b", alpha))
			if w.fit {
				if s.relations[pair("a", "b")] == untried {
					d.wake()
				}
				d.granted(other)
				return
			}
			d.granted()
			d.q.SetLoaded(0, map[string]int{"a": 0, "b": 0}, d.now, d.now)
			d.granted(other)
		})
	}
}

// TestEvidence: what observations of two models teach about them, whatever else is loaded.
func TestEvidence(t *testing.T) {
	loaded := evaluated(1000, 1000)
	loaded.Loaded, loaded.Load = true, 2*time.Second
	for _, w := range []struct {
		name string
		see  func(*desk)
		want relation
	}{
		{"b runs while a, which had expired, is loaded and answers", func(d *desk) {
			d.sole("a", true)
			d.sole("b", true)
			d.granted(d.add(request("b", alpha)))
			d.now = d.now.Add(time.Second)
			id := d.add(request("a", alpha))
			d.granted(id)
			d.done(id, loaded, 3*time.Second)
		}, together},
		{"b evicts a; a third one, which is loaded since, fits beside both", func(d *desk) {
			d.sole("a", true)
			d.sole("c", true)
			d.sole("a", false)
			d.sole("b", true)
			d.sole("a", true)
		}, apart},
		{"b's first request is given up while it waits in Ollama, and a answers meanwhile", func(d *desk) {
			d.sole("a", true)
			long := d.add(request("a", alpha))
			d.granted(long)
			first := d.add(request("b", alpha))
			d.wake()
			d.granted(first)
			d.done(first, Result{Sent: true}, 5*time.Second)
			d.done(long, evaluated(1000, 1000), time.Second)
			d.sole("a", false)
		}, untried},
	} {
		d := newDesk(t, Config{Lanes: 2})
		if w.see(d); d.q.servers[0].relations[pair("a", "b")] != w.want {
			t.Errorf("%s: their relation is %d, want %d", w.name, d.q.servers[0].relations[pair("a", "b")], w.want)
		}
	}
}

// TestNothingLesserMeanwhile: while a request waits for others to reach their slots, a less urgent
// one does not take its lane.
func TestNothingLesserMeanwhile(t *testing.T) {
	d := newDesk(t, Config{Lanes: 2})
	d.q.habits.missed = 1e6 // no client returns, so nothing is held
	a, b := d.add(with(alpha)), d.add(with(beta))
	d.granted(a, b)
	next := d.add(with(alpha))
	cold := d.add(with(seg{id: 3, tokens: 1000}))
	batch := d.add(by("c", Batch, with(beta)))
	d.done(a, evaluated(1064, 1064), 1300*time.Millisecond)
	d.granted(next)
	d.done(b, evaluated(1064, 1064), 5*time.Millisecond)
	d.granted()
	d.wake()
	d.granted(cold)
	d.done(next, evaluated(1064, 64), time.Second)
	d.granted(batch)
}

// TestLesserRunner: requests of lower priority for a model that is not loaded get their turn even
// under an endless stream of more urgent ones for the loaded model.
func TestLesserRunner(t *testing.T) {
	for _, p := range []Priority{Normal, Batch} {
		d := newDesk(t, Config{Lanes: 1})
		d.q.SetExclusive(0, "a", "b", true, d.now)
		var running []uint64
		add := func(model string, p Priority) uint64 {
			id := d.add(by(model, p, request(model, seg{id: d.id % 8, tokens: 1000})))
			return id
		}
		for range 3 {
			add("a", p-1)
		}
		lesser := add("b", p)
		grants, got, since := 0, 0, 0
		for i := 0; i < 10*patience && got < 2; i++ {
			d.q.Tick(d.now)
			for _, g := range d.q.Grants() {
				running = append(running, g.ID)
				since++
				if g.ID == lesser {
					if since > patience+64 {
						t.Errorf("%s: %d were served first", p, since)
					}
					got, since, lesser = got+1, 0, 0
				} else {
					grants++
				}
			}
			if len(running) == 0 {
				d.wake()
				continue
			}
			id := running[0]
			running = running[1:]
			if lesser == 0 {
				lesser = add("b", p) // again and again
			}
			d.done(id, served, time.Second)
			add("a", p-1)
		}
		if got < 2 {
			t.Errorf("%s: it was served %d times, and others %d times", p, got, grants)
		}
		if grants < 10*got {
			t.Errorf("%s: more urgent ones were served %d times only", p, grants)
		}
	}
}

// TestSameRunner: a request that states an option and one that does not share a runner if the
// server causes no load for the second, and become two runners once it does.
func TestSameRunner(t *testing.T) {
	asks := func(numCtx int) Request {
		r := with(alpha)
		r.Runner.Options = options("m", numCtx)
		return r
	}
	found := evaluated(1064, 64) // without a load
	d := newDesk(t, Config{Lanes: 4})
	first := d.add(asks(0))
	d.granted(first)
	stated := d.add(asks(4096))
	d.granted()
	d.done(first, found, time.Second)
	for d.q.Len() > 0 && len(d.q.grants) == 0 {
		d.wake()
	}
	d.granted(stated)
	waits := d.add(asks(0)) // it waits for what seems to be another runner, and then no longer does
	d.granted()
	d.done(stated, found, time.Second)
	d.granted(waits)
	again := d.add(by("c", Interactive, asks(4096)))
	d.granted(again)
	if n := len(d.q.servers[0].runners); n != 1 {
		t.Fatalf("%d runners", n)
	}
	d.done(waits, found, time.Second)

	// A load after the same options is an expiry; one after other options shows that they differ.
	loaded := found
	loaded.Loaded, loaded.Load = true, 2*time.Second
	d.done(again, found, time.Second)
	d.now = d.now.Add(time.Hour)
	expired := d.add(asks(4096))
	d.granted(expired)
	d.done(expired, loaded, time.Second)
	d.now = d.now.Add(time.Hour)
	differs := d.add(asks(0))
	d.granted(differs)
	waits = d.add(by("c", Interactive, asks(4096)))
	d.granted(waits)
	d.done(differs, loaded, time.Second)
	d.done(waits, found, time.Second)
	long := d.add(asks(0))
	d.granted(long)
	d.add(by("c", Interactive, asks(4096)))
	d.granted()
	if n := len(d.q.servers[0].runners); n != 2 {
		t.Errorf("%d runners after a load", n)
	}
}

// TestEvicted: a model that disappears from the list just after its last use, while another one
// serves or is being loaded, was unloaded for that one. On a real server this is the only sign if
// both are always in demand: /api/ps lists neither while one replaces the other.
func TestEvicted(t *testing.T) {
	for _, c := range []struct {
		name   string
		listed map[string]int
		later  time.Duration // since the last use of a
		want   relation
	}{
		{"b is being loaded", map[string]int{}, 5 * time.Millisecond, apart},
		{"b is listed", map[string]int{"b": 0}, 5 * time.Millisecond, apart},
		{"both are listed", map[string]int{"a": 0, "b": 0}, 5 * time.Millisecond, together},
		{"a may have expired", map[string]int{}, 2 * longestTurn, untried},
	} {
		d := newDesk(t, Config{Lanes: 1})
		ask := func(model string) uint64 { return d.add(request(model, seg{id: uint64(len(model)) + 7, tokens: 100})) }
		a := ask("a")
		d.granted(a)
		b := ask("b")
		d.wake()
		d.granted(b)
		loaded := evaluated(100, 100)
		loaded.Loaded, loaded.LoadKnown, loaded.Load = true, true, 50*time.Millisecond
		d.done(a, loaded, 50*time.Millisecond)
		d.now = d.now.Add(c.later)
		d.q.SetLoaded(0, c.listed, d.now, d.now)
		if got := d.q.servers[0].between("a", "b"); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
