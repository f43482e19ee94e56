package fleet

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// fed returns a fleet whose peers are fed by hand, and which runs until the test ends.
func fed(t *testing.T, local func() []Server) *Fleet {
	f := New(Config{Name: "here", Local: local})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { // ends with ctx
		defer close(done)
		f.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	synctest.Wait()
	return f
}

// feed adds a peer that is fed by hand.
func (f *Fleet) feed(addr string) *peer {
	p := newPeer(f, addr)
	p.forget = func() {}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.peers[addr] = p
	return p
}

// reportOf returns a line about one server.
func reportOf(id string, change ...func(*Server)) *Report {
	s := Server{Name: "s-" + id, Takes: true, Models: []string{"m"}, Slots: 1}
	for _, c := range change {
		c(&s)
	}
	return &Report{ID: id, Name: id, Servers: []Server{s}}
}

// TestConclusions: figures of load are concluded from at most ten times a second, and at once after a
// quiet time; whatever decides who owns what, or what a server can do, at once.
func TestConclusions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := fed(t, func() []Server { return nil })
		p := f.feed("there:1")
		running := func(n int) func(*Server) { return func(s *Server) { s.Running = n } }
		at := func() *place { return f.view.Load().places["s-there"] }
		if p.heard(reportOf("there", running(1))); at() == nil {
			t.Fatal("a peer that comes is not known at once")
		}
		time.Sleep(5*time.Second + reportEvery/2)
		if p.heard(reportOf("there", running(2))); at().Running != 2 {
			t.Error("the first figures after a quiet time are not known at once")
		}
		views := map[*view]bool{}
		const lines = 10_000
		for i := range lines {
			p.heard(reportOf("there", running(10+i)))
			views[f.view.Load()] = true
			time.Sleep(time.Millisecond)
		}
		const ticks = int(lines * time.Millisecond / reportEvery)
		if n := len(views); n < ticks-1 || n > ticks+2 {
			t.Errorf("in %d ticks there were %d conclusions", ticks, n)
		}
		time.Sleep(reportEvery)
		if n := at().Running; n != 9+lines {
			t.Errorf("the last figure is %d", n)
		}
		last := func(s *Server) {} // the changes before stay
		for what, c := range map[string]struct {
			change func(*Server)
			known  func(*place) bool
		}{
			"takes":  {func(s *Server) { s.Takes = false }, func(p *place) bool { return !p.Takes }},
			"models": {func(s *Server) { s.Models = []string{"m", "n"} }, func(p *place) bool { return len(p.Models) == 2 }},
			"loaded": {func(s *Server) { s.Loaded = []string{"m"} }, func(p *place) bool { return len(p.Loaded) == 1 }},
			"slots":  {func(s *Server) { s.Slots = 7 }, func(p *place) bool { return p.Slots == 7 }},
			"beside": {func(s *Server) { s.Beside = true }, func(p *place) bool { return p.Beside }},
		} {
			before := last
			last = func(s *Server) { before(s); c.change(s) }
			for i := range 3 { // what waits does not hold it up
				p.heard(reportOf("there", before, running(i)))
			}
			if p.heard(reportOf("there", last)); !c.known(at()) {
				t.Errorf("%s is not known at once", what)
			}
		}
		p.heard(reportOf("there", last, running(1)))
		p.heard(reportOf("there", last, running(2)))
		r := reportOf("there", last)
		r.Draining = true
		if p.heard(r); !at().owner.draining {
			t.Error("a peer that is about to stop is not known at once")
		}
		p.heard(reportOf("there", last, running(1)))
		if p.lost(errReset); !at().owner.away {
			t.Error("a peer that has gone is not known at once")
		}
	})
}

// TestConclusionsHere: what changes at this proxy's own servers is known with the next look at them,
// and what needs no change to be so, within a second.
func TestConclusionsHere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var waits atomic.Int32
		f := fed(t, func() []Server { return []Server{{Name: "own", Takes: true, Waiting: int(waits.Load())}} })
		time.Sleep(10*time.Second + reportEvery/2)
		before := f.view.Load()
		waits.Store(3)
		time.Sleep(reportEvery)
		if n := f.view.Load().places["own"].Waiting; n != 3 {
			t.Errorf("%d requests wait, not 3", n)
		}
		if before.places["own"].Waiting != 0 {
			t.Error("a view was changed")
		}
		quiet := f.view.Load()
		if time.Sleep(reportLeast / 2); f.view.Load() != quiet {
			t.Error("something was concluded although nothing has changed")
		}
		p := f.feed("there:1")
		p.heard(reportOf("there"))
		p.lost(errReset)
		if time.Sleep(awayFor + reportLeast + reportEvery); f.view.Load().places["s-there"] != nil {
			t.Error("a peer that was away for long is remembered")
		}
		if f.Drain(); !f.view.Load().members[0].draining {
			t.Error("this proxy's own draining is not known at once")
		}
	})
}

// TestForgotten: of servers, owners and models that come and go nothing is kept for ever. What was
// learned of a server is kept as long as a proxy has it, or had it before it went away a while ago.
func TestForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := fed(t, func() []Server { return []Server{{Name: "mine", Takes: true}} })
		p := f.feed("there:1")
		learned := func(server, id string) *Report {
			return reportOf(id, func(s *Server) { s.Name, s.Owned, s.Learned = server, true, []byte("{}") })
		}
		kept := func() int {
			f.mu.Lock()
			defer f.mu.Unlock()
			return len(f.learned)
		}
		p.heard(learned("mine", "there"))
		for i := range 100 {
			server := fmt.Sprint("server", i)
			p.heard(learned(server, "there"))
			f.Sent(server, chain(i, 1))
			f.expect(server, true)
			f.inVain(offered{Backlog{Options: prefix.Options{Model: server}}, p, p.addr})
			time.Sleep(reportEvery)
		}
		if n := kept(); n != 2 {
			t.Errorf("of %d servers it is known what was learned, not of 2", n)
		}
		f.seen.mu.Lock()
		if n := len(f.seen.got); n > 1 {
			t.Errorf("it is counted what %d servers got, not what one did", n)
		}
		f.seen.mu.Unlock()
		f.mu.Lock()
		if len(f.given) > 2 || len(p.vain) > 2 {
			t.Errorf("%d servers were given something, and %d backlogs gave nothing", len(f.given), len(p.vain))
		}
		f.mu.Unlock()
		p.lost(errReset)
		if time.Sleep(awayFor / 2); kept() != 2 {
			t.Errorf("a while later of %d, not of 2", kept())
		}
		if time.Sleep(awayFor); kept() != 1 {
			t.Errorf("long after of %d, not of this proxy's own alone", kept())
		}
		for i := range 100 { // each process has an ID of its own
			id := fmt.Sprint("id", i)
			p.heard(learned("s", id))
			p.lost(errReset)
			f.sent.add(id, "s") // by a request that chose it just before
		}
		time.Sleep(2 * reportLeast)
		f.sent.mu.Lock()
		defer f.sent.mu.Unlock()
		if n := len(f.sent.n); n > 1 {
			t.Errorf("it is counted what was sent to %d processes that are gone", n)
		}
	})
}

// TestBack: the log says that a peer is back if it was there before, and of no other.
func TestBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		f := New(Config{Name: "here", Log: slog.New(slog.NewTextHandler(&log, nil))})
		said := func(want string) {
			t.Helper()
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log says %q, not that %s", log.String(), want)
			}
			log.Reset()
		}
		p, q := f.feed("there:1"), f.feed("there:2")
		p.lost(errReset)
		said("does not answer")
		p.heard(reportOf("there"))
		said("peer found")
		p.lost(errReset)
		said("peer is away")
		q.heard(reportOf("there"))
		said("peer is back")
		p.heard(reportOf("other"))
		said("peer found")
	})
}

// BenchmarkReports measures what a proxy does with the reports of a tenth of a second, apart from
// decoding them: each peer has sent one in which all figures of load are new.
func BenchmarkReports(b *testing.B) {
	for _, c := range []struct {
		shape            string
		proxies, servers int // servers: that each proxy lists
		shared           bool
	}{
		{"edge", 8, 64, true}, {"edge", 8, 1000, true}, {"edge", 8, 10_000, true},
		{"sidecar", 64, 1, false}, {"sidecar", 1000, 1, false}, {"sidecar", 10_000, 1, false},
	} {
		b.Run(fmt.Sprintf("%s-%d-proxies-%d-servers", c.shape, c.proxies, max(c.proxies, c.servers)), func(b *testing.B) {
			servers := func(proxy, load int) (all []Server) {
				models := []string{"gemma3:12b", "llama3.2:latest", "qwen3:8b"}
				for i := range c.servers {
					name := fmt.Sprint("server-", i)
					if !c.shared {
						name = fmt.Sprint("server-", proxy)
					}
					all = append(all, Server{Name: name, Beside: !c.shared, Takes: true, Models: models, Loaded: models[:1],
						Slots: 4, Running: load, Waiting: 3 * load, Wait: float64(load)})
				}
				return all
			}
			var local [2][]Server
			reports := make([][2]Report, c.proxies)
			for i := range reports {
				for load := range 2 {
					reports[i][load] = Report{ID: fmt.Sprint("id", i), Name: fmt.Sprint("proxy-", i), Servers: servers(i, load)}
				}
			}
			local[0], local[1] = reports[0][0].Servers, reports[0][1].Servers
			n := 0
			f := New(Config{Name: "proxy-0", Local: func() []Server { return slices.Clone(local[n%2]) }})
			if !c.shared {
				f.Own = []string{"server-0"}
			}
			peers := make([]*peer, 0, c.proxies)
			for i := range c.proxies - 1 {
				peers = append(peers, f.feed(fmt.Sprint("address-", i)))
			}
			// Of what arrives, only the first round would be concluded from one by one.
			f.mu.Lock()
			for i, p := range peers {
				r := reports[i+1][1]
				p.report, p.last, p.gone = &r, &r, make(chan struct{})
			}
			f.mu.Unlock()
			b.ReportAllocs()
			for b.Loop() {
				f.refresh()
				for i, p := range peers {
					r := reports[i+1][n%2]
					p.heard(&r)
				}
				n++
			}
		})
	}
}

// TestDiffer: whatever is told of a server is new if it differs, also when nothing else does.
func TestDiffer(t *testing.T) {
	for i, typ := 0, reflect.TypeFor[Server](); i < typ.NumField(); i++ {
		var s Server
		switch v := reflect.ValueOf(&s).Elem().Field(i); v.Kind() {
		case reflect.Bool:
			v.SetBool(true)
		case reflect.String:
			v.SetString("x")
		case reflect.Int, reflect.Int64:
			v.SetInt(1)
		case reflect.Float64:
			v.SetFloat(1)
		case reflect.Slice:
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		default:
			t.Fatalf("%s: set it here", typ.Field(i).Name)
		}
		if differ([]Server{{}}, []Server{s}) == nothing {
			t.Errorf("%s alone differs, and that is taken for nothing", typ.Field(i).Name)
		}
	}
}
