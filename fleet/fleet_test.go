package fleet

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// lab has some proxies in a network in memory, in virtual time.
type lab struct {
	t       *testing.T
	net     *network
	mu      sync.Mutex
	proxies map[string]*proxy
	began   map[string]int     // how often each request was sent to a server
	drained map[[2]string]bool // what each host was ordered to do with each server
}

// proxy is a proxy of the lab. Its requests take some time to wait, and some to be answered.
type proxy struct {
	*Fleet
	lab           *lab
	host          string
	servers       []Server
	own           []string
	source        Source // if nil, of all hosts
	waits, serves time.Duration
	drops         bool // it closes the connection instead of serving the request
	declines      func(w http.ResponseWriter, p *Passed) bool
	give          func(schedule.Taker) int
	taker         func(server string, o prefix.Options) (schedule.Taker, bool)
	srv           *http.Server
	stop          func()
}

// list is a Source of fixed addresses.
type list []string

func (l list) Watch(ctx context.Context, found func([]string)) {
	found(l)
	<-ctx.Done()
}
func (l list) String() string { return strings.Join(l, " ") }

func newLab(t *testing.T, servers []string, hosts ...string) *lab {
	l := &lab{t: t, net: newNetwork(), proxies: map[string]*proxy{}, began: map[string]int{}, drained: map[[2]string]bool{}}
	for _, host := range hosts {
		m := &proxy{lab: l, host: host, waits: time.Second, serves: time.Second}
		for _, name := range servers {
			m.servers = append(m.servers, Server{Name: name, Takes: true, Models: []string{"m"}})
		}
		l.proxies[host] = m
		m.start(hosts)
	}
	t.Cleanup(func() {
		for _, m := range l.proxies {
			m.kill()
		}
		time.Sleep(5 * time.Second) // until net/http gives up dialling
	})
	return l
}

// newPair returns a lab whose proxy b has the only server.
func newPair(t *testing.T) *lab {
	l := newLab(t, []string{"s"}, "a", "b")
	l.mu.Lock()
	l.proxies["a"].servers = nil
	l.mu.Unlock()
	time.Sleep(time.Second)
	return l
}

func (m *proxy) start(hosts []string) {
	if m.source == nil {
		m.source = list(hosts)
	}
	c := Config{
		Name: m.host, Sources: []Source{m.source}, Own: m.own, Secret: []byte("secret"),
		Transport: NewTransport(m.lab.net.dialer(m.host), nil),
		Local: func() []Server {
			m.lab.mu.Lock()
			defer m.lab.mu.Unlock()
			return slices.Clone(m.servers)
		},
		Ordered: func(server string, drain bool) {
			m.lab.mu.Lock()
			defer m.lab.mu.Unlock()
			m.lab.drained[[2]string{m.host, server}] = drain
		},
		Give: m.give, Taker: m.taker, Log: slog.New(slog.DiscardHandler),
	}
	m.Fleet = New(c)
	ctx, cancel := context.WithCancel(context.Background())
	srv := &http.Server{Handler: m.Handler(m), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	srv.RegisterOnShutdown(m.HangUp)
	m.srv = srv
	ln := m.lab.net.listen(m.host)
	var wg sync.WaitGroup
	wg.Go(func() { m.Run(ctx) })
	wg.Go(func() { srv.Serve(ln) })
	m.lab.mu.Lock()
	defer m.lab.mu.Unlock()
	m.stop = func() {
		m.lab.net.kill(m.host)
		srv.Close()
		cancel()
		wg.Wait()
	}
}

func (m *proxy) kill() {
	m.lab.mu.Lock()
	stop := m.stop
	m.stop = nil
	m.lab.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// ServeHTTP serves a request that another proxy has passed on: it waits, is sent to a server, and is
// answered with its own text.
func (m *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p := PassedOf(r.Context())
	text, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if m.declines != nil && m.declines(w, p) {
		return
	}
	if m.serve(r.Context(), p, string(text)) != nil {
		panic(http.ErrAbortHandler)
	}
	fmt.Fprintf(w, "%s from %s for %s", text, p.Server, p.Client)
}

func (m *proxy) serve(ctx context.Context, p *Passed, text string) error {
	if err := pause(ctx, m.waits); err != nil {
		return err
	}
	if m.drops {
		return errReset
	}
	if err := p.Begin(ctx); err != nil {
		return err
	}
	m.lab.mu.Lock()
	m.lab.began[text]++
	m.lab.mu.Unlock()
	return pause(ctx, m.serves)
}

// pass passes a request on from a proxy.
func (l *lab) pass(from string, to Place, text string) (string, error) {
	return l.move(from, to, text, 0)
}

// move passes a request on that another proxy's servers took over some times.
func (l *lab) move(from string, to Place, text string, moves int) (string, error) {
	m := l.proxies[from]
	out, err := http.NewRequest(http.MethodPost, "/api/chat", nil)
	if err != nil {
		l.t.Error(err)
	}
	res, err := m.Pass(out, to, About{Client: "somebody\n", Server: to.Server, Moves: moves},
		bytes.NewReader([]byte(text)), int64(len(text)))
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	if Claims(res.Header) {
		l.t.Errorf("the answer has the headers %v", res.Header)
	}
	answer, err := io.ReadAll(res.Body)
	return string(answer), err
}

// place returns where a proxy would send a request.
func (l *lab) place(from string) Place {
	l.t.Helper()
	p, ok := l.proxies[from].Choose(Ask{Model: "m"})
	if !ok {
		l.t.Fatalf("%s knows no server", from)
	}
	return p
}

// owners returns each server's owner, which all live proxies must agree on.
func (l *lab) owners(hosts ...string) map[string]string {
	l.t.Helper()
	var all map[string]string
	for _, h := range hosts {
		owners := map[string]string{}
		for _, o := range l.proxies[h].Owners() {
			owners[o.Server] = o.Owner
			if o.Here != (o.Owner == h) || o.Here != l.proxies[h].Owns(o.Server) {
				l.t.Errorf("%s says of %s: %+v", h, o.Server, o)
			}
		}
		if all != nil && fmt.Sprint(all) != fmt.Sprint(owners) {
			l.t.Errorf("%s: the owners are %v, another proxy has %v", h, owners, all)
		}
		all = owners
	}
	return all
}

func names(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprint("server", i))
	}
	return all
}

// TestOwners: each server has one owner, also after a proxy has gone, is cut off or stops, and those
// of the others stay where they are.
func TestOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, names(60), "a", "b", "c")
		time.Sleep(time.Second)
		first := l.owners("a", "b", "c")
		count := map[string]int{}
		for _, o := range first {
			count[o]++
		}
		for _, h := range []string{"a", "b", "c"} {
			if count[h] < 8 {
				t.Errorf("%s owns %d of 60 servers", h, count[h])
			}
		}
		moved := func(what string, gone string, now map[string]string) {
			for s, o := range first {
				if o != gone && now[s] != o || now[s] == gone {
					t.Errorf("%s: %s was owned by %s and is by %s", what, s, o, now[s])
				}
			}
		}
		l.proxies["c"].kill()
		time.Sleep(time.Second)
		moved("killed", "c", l.owners("a", "b"))
		l.proxies["c"].start([]string{"a", "b", "c"})
		time.Sleep(5 * time.Second)
		if again := l.owners("a", "b", "c"); fmt.Sprint(again) != fmt.Sprint(first) {
			t.Errorf("after c is back, the owners are %v; before %v", again, first)
		}
		l.net.setCut("a", "c", true)
		l.net.setCut("b", "c", true)
		time.Sleep(silentFor + time.Second)
		moved("cut off", "c", l.owners("a", "b"))
		for s, o := range l.owners("c") {
			if o != "c" {
				t.Errorf("c, which is alone, says that %s owns %s", o, s)
			}
		}
		l.net.setCut("a", "c", false)
		l.net.setCut("b", "c", false)
		time.Sleep(10 * time.Second)
		l.proxies["b"].Drain()
		time.Sleep(time.Second)
		moved("draining", "b", l.owners("a", "b", "c"))
		l.mu.Lock()
		l.proxies["a"].servers[0].Takes = false // a does not reach it
		l.mu.Unlock()
		l.proxies["c"].kill()
		l.proxies["c"].own = []string{"server1"}
		l.proxies["c"].start([]string{"a", "b", "c"})
		time.Sleep(5 * time.Second)
		time.Sleep(time.Second)
		if o := l.owners("a", "b", "c"); o["server0"] != "c" || o["server1"] != "c" {
			t.Errorf("a server that only c reaches is owned by %s, one that c is beside of by %s",
				o["server0"], o["server1"])
		}
	})
}

// TestPass: a request arrives at its owner as it was sent, and its answer comes back.
func TestPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		for _, text := range []string{"hello", strings.Repeat("x", 1<<20), ""} {
			answer, err := l.pass("a", l.place("a"), text)
			if want := text + " from s for somebody\n"; err != nil || answer != want {
				t.Errorf("%d bytes: %d bytes come back, %v", len(text), len(answer), err)
			}
			if l.began[text] != 1 {
				t.Errorf("%d bytes were sent to a server %d times", len(text), l.began[text])
			}
		}
		if c := l.proxies["b"].Counts(); c.Received != 3 || c.Forgotten != 0 {
			t.Errorf("b counts %+v", c)
		}
	})
}

// TestPassFaults: a request whose owner goes away before it was sent to a server may go elsewhere,
// and is then never sent; one that was sent is lost.
func TestPassFaults(t *testing.T) {
	for _, c := range []struct {
		name  string
		after time.Duration
		fault func(l *lab)
		again bool // it may be sent to another proxy
		began int
		least time.Duration // until the entry knows
	}{
		{"killed while it waits", 500 * time.Millisecond, func(l *lab) { l.proxies["b"].kill() }, true, 0, 0},
		{"killed while it is served", 1500 * time.Millisecond, func(l *lab) { l.proxies["b"].kill() }, false, 1, 0},
		{"cut off while it waits", 500 * time.Millisecond, func(l *lab) { l.net.setCut("a", "b", true) }, true, 0, silentFor - reportLeast},
		{"cut off while it is served", 1500 * time.Millisecond, func(l *lab) { l.net.setCut("a", "b", true) }, false, 1, lostFor},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newPair(t)
				time.AfterFunc(c.after, func() { c.fault(l) })
				began := time.Now()
				_, err := l.pass("a", l.place("a"), "hello")
				if err == nil || Again(err) != c.again || c.again == errors.Is(err, ErrLost) {
					t.Errorf("the entry is told: %v", err)
				}
				if took := time.Since(began); took < c.after+c.least {
					t.Errorf("the entry knows it after %v", took)
				}
				l.net.setCut("a", "b", false)
				time.Sleep(time.Minute)
				if l.began["hello"] != c.began {
					t.Errorf("it was sent to a server %d times", l.began["hello"])
				}
			})
		})
	}
}

// TestPassDropped: when only the request's connection breaks, the entry knows at once.
func TestPassDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		l.proxies["b"].drops = true
		began := time.Now()
		_, err := l.pass("a", l.place("a"), "hello")
		if !Again(err) || time.Since(began) > l.proxies["b"].waits {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

// TestPassHealed: an answer whose connection was cut off for a moment arrives.
func TestPassHealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		time.AfterFunc(1500*time.Millisecond, func() { l.net.setCut("a", "b", true) })
		time.AfterFunc(9*time.Second, func() { l.net.setCut("a", "b", false) })
		if answer, err := l.pass("a", l.place("a"), "hello"); err != nil {
			t.Errorf("%q, %v", answer, err)
		}
	})
}

// TestPassLeft: a request whose client leaves ends at its owner, before and after it was sent.
func TestPassLeft(t *testing.T) {
	for _, after := range []time.Duration{500 * time.Millisecond, 1500 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			l := newPair(t)
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(after, cancel)
			out, err := http.NewRequestWithContext(ctx, http.MethodPost, "/", nil)
			if err != nil {
				t.Fatal(err)
			}
			l.proxies["b"].serves = time.Hour
			if _, err := l.proxies["a"].Pass(out, l.place("a"), About{}, strings.NewReader("x"), 1); err == nil {
				t.Error("it was answered")
			}
			synctest.Wait()
			if n := l.began["x"]; n != map[bool]int{true: 1}[after > l.proxies["b"].waits] {
				t.Errorf("after %v: sent %d times", after, n)
			}
			if c := l.proxies["a"].Counts(); c.Hops != 1 || c.Again+c.Lost+c.Elsewhere+c.Begun != 0 {
				t.Errorf("after %v: the client left, and it is counted as %+v", after, c)
			}
		})
	}
}

// TestDeclined: a request that its owner declines costs no connection, and is never sent by it, although
// its body ends.
func TestDeclined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		later := make(chan error, 100)
		l.proxies["b"].declines = func(w http.ResponseWriter, p *Passed) bool {
			p.Decline(w, schedule.Elsewhere{Server: "other", Moves: 3})
			go func() { // as what computes the answer for others would
				time.Sleep(time.Second)
				later <- p.Begin(context.Background())
			}()
			return true
		}
		for _, text := range []string{"hello", strings.Repeat("x", 1<<20), "", "hello"} {
			_, err := l.pass("a", l.place("a"), text)
			if e, ok := errors.AsType[schedule.Elsewhere](err); !ok || e.Server != "other" || e.Moves != 3 || !Again(err) {
				t.Errorf("the entry is told: %v", err)
			}
			time.Sleep(2 * time.Second)
			if err := <-later; !errors.Is(err, ErrForgotten) {
				t.Errorf("the owner may send what it has declined: %v", err)
			}
		}
		l.net.mu.Lock()
		defer l.net.mu.Unlock()
		if n := l.net.dialled[[2]string{"a", "b"}]; n > 2 {
			t.Errorf("a has made %d connections to b, not one for reports and one for requests", n)
		}
	})
}

// TestDeclinedLate: what an owner was told to begin with it cannot decline. (It never does.) And one
// that hangs while it declines holds up nothing.
func TestDeclinedLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		l.proxies["b"].declines = func(w http.ResponseWriter, p *Passed) bool {
			if err := p.Begin(t.Context()); err != nil {
				t.Error(err)
			}
			p.Decline(w, schedule.Elsewhere{})
			return true
		}
		if _, err := l.pass("a", l.place("a"), "hello"); Again(err) || !errors.Is(err, ErrLost) {
			t.Errorf("the entry is told: %v", err)
		}
		lost := l.proxies["a"].Incidents(time.Time{})
		if n := l.proxies["a"].Counts().Lost; n != 1 || len(lost) != 1 || !lost[0].Lost || lost[0].Peer != "b" {
			t.Errorf("%d requests are counted as lost, of which it is remembered: %+v", n, lost)
		}
		l.proxies["b"].declines = func(w http.ResponseWriter, p *Passed) bool {
			p.Decline(w, schedule.Elsewhere{})
			time.Sleep(time.Second)
			return true
		}
		began := time.Now()
		if _, err := l.pass("a", l.place("a"), "hello"); !Again(err) || time.Since(began) > 2*drainFor {
			t.Errorf("after %v the entry is told: %v", time.Since(began), err)
		}
	})
}

// TestAtMostOnce: whatever is cut off, killed and healed when, no request is sent to a server twice,
// and each is answered or fails.
func TestAtMostOnce(t *testing.T) {
	const hosts, requests = 4, 150
	for seed := range uint64(8) {
		synctest.Test(t, func(t *testing.T) {
			random, clients := rand.New(rand.NewPCG(seed, 1)), rand.New(rand.NewPCG(seed, 2))
			all := []string{"p0", "p1", "p2", "p3"}
			l := newLab(t, names(4), all...)
			var arrived atomic.Int32
			l.proxies["p3"].declines = func(w http.ResponseWriter, p *Passed) bool {
				if arrived.Add(1)%3 > 0 {
					return false
				}
				p.Decline(w, schedule.Elsewhere{})
				go func() { // ends when the end of the body is read, or does not come
					if p.Begin(context.Background()) == nil {
						t.Errorf("seed %d: p3 may send what it has declined", seed)
					}
				}()
				return true
			}
			time.Sleep(time.Second)
			done := make(chan struct{})
			var faults sync.WaitGroup
			faults.Go(func() {
				for {
					a, b := all[random.IntN(hosts)], all[random.IntN(hosts)]
					kill := a == b && a != "p0"
					if kill {
						l.proxies[a].kill()
					} else {
						l.net.setCut(a, b, true)
					}
					time.Sleep(time.Duration(random.IntN(9000)) * time.Millisecond)
					if kill {
						l.proxies[a].start(all)
					}
					l.net.setCut(a, b, false)
					select {
					case <-done:
						return
					case <-time.After(time.Duration(random.IntN(3000)) * time.Millisecond):
					}
				}
			})
			var wg sync.WaitGroup
			var mu sync.Mutex
			answered, failed := 0, 0
			for i := range requests {
				pauses := time.Duration(clients.IntN(60_000)) * time.Millisecond
				wg.Go(func() {
					time.Sleep(pauses)
					text := fmt.Sprint("request", i)
					err := l.send("p0", text, i)
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						answered++
					} else {
						failed++
					}
				})
			}
			wg.Wait()
			close(done)
			faults.Wait()
			time.Sleep(time.Minute)
			for text, n := range l.began {
				if n > 1 {
					t.Errorf("seed %d: %s was sent to a server %d times", seed, text, n)
				}
			}
			c := l.proxies["p0"].Counts()
			if c.Hops == 0 || c.Again == 0 || c.Elsewhere == 0 {
				t.Errorf("seed %d: nothing was sent again, or declined: %+v", seed, c)
			}
			if c.Begun == 0 || c.Begun+c.Again+c.Lost+c.Elsewhere != c.Hops {
				t.Errorf("seed %d: what became of a hop is not counted once: %+v", seed, c)
			}
			if answered < requests/2 || answered+failed != requests {
				t.Errorf("seed %d: %d answered, %d failed", seed, answered, failed)
			}
		})
	}
}

// send sends a request as an entry does: to its server's owner, and to the next one as long as that
// cannot send it twice.
func (l *lab) send(entry, text string, i int) error {
	links := make([]prefix.Link, 4)
	for j := range links {
		links[j] = prefix.Link{Hash: uint64(i*1000 + j + 1), Bytes: 1000 * (j + 1)}
	}
	ask := Ask{Model: "m", Links: links}
	for range 8 {
		l.mu.Lock()
		m := l.proxies[entry]
		l.mu.Unlock()
		to, ok := m.Choose(ask)
		if !ok {
			return errors.New("no server")
		}
		if to.Here() {
			return m.serve(context.Background(), nil, text)
		}
		_, err := l.pass(entry, to, text)
		if err == nil || !Again(err) {
			return err
		}
		ask.Not = append(ask.Not, to.Peer)
	}
	return errors.New("tried too often")
}

// TestDraining: requests go to servers of proxies that are about to stop only if there is no other.
func TestDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil, "a", "b", "c")
		l.mu.Lock()
		for _, host := range []string{"a", "b", "c"} { // each has a server of its own
			l.proxies[host].servers = []Server{{Name: "s" + host, Takes: true, Models: []string{"m"}}}
		}
		l.mu.Unlock()
		time.Sleep(2 * time.Second)
		for _, stops := range []string{"a", "b", "c"} {
			l.proxies[stops].Drain()
			time.Sleep(time.Second)
			for _, entry := range []string{"a", "b", "c"} {
				for i := range 20 {
					p, ok := l.proxies[entry].Choose(Ask{Model: "m", Links: []prefix.Link{{Hash: uint64(i), Bytes: 1000}}})
					if !ok || stops != "c" && p.Server <= "s"+stops {
						t.Errorf("%s stops, and %s chooses %s (%v)", stops, entry, p.Server, ok)
					}
				}
				if p, ok := l.proxies[entry].Choose(Ask{Model: "m", Server: "sa"}); !ok || p.Server != "sa" {
					t.Errorf("%s stops, and %s does not find the server that a client wants: %v", stops, entry, p)
				}
			}
		}
	})
}

// TestBodyWithoutEnd: what comes after an answer, of the body that it is an answer to, is not taken
// for the next request.
func TestBodyWithoutEnd(t *testing.T) {
	for name, wait := range map[string]time.Duration{"in time": goAhead / 2, "late": 2 * goAhead, "forgotten": goAhead / 2} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork()
			f := New(Config{Name: "b", Secret: []byte("secret"), Local: func() []Server { return nil }})
			srv := &http.Server{Handler: f.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				text, err := io.ReadAll(r.Body)
				if err != nil {
					t.Error(err)
				}
				if name == "forgotten" {
					<-r.Context().Done()
				}
				w.Write(text)
			}))}
			served := make(chan error, 1)
			ln := n.listen("b")
			go func() { served <- srv.Serve(ln) }() // ends with Close
			defer func() {
				srv.Close()
				<-served
			}()
			conn, err := n.dialer("a")(t.Context(), "tcp", "b")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			const request = "POST / HTTP/1.1\r\nHost: b\r\nX-Cacheproxy-Peer: a\r\nX-Cacheproxy-Peer-Secret: secret\r\n" +
				"X-Cacheproxy-Peer-Age: 0\r\nX-Cacheproxy-Peer-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
			io.WriteString(conn, request)
			time.Sleep(wait)
			if name == "forgotten" {
				f.forgets("a")
				synctest.Wait()
			}
			io.WriteString(conn, "0\r\n\r\n"+request+"0\r\n\r\n")
			answers := 0
			for in := bufio.NewReader(conn); answers < 2; answers++ {
				res, err := http.ReadResponse(in, nil)
				if err != nil {
					break
				}
				if text, err := io.ReadAll(res.Body); res.StatusCode != http.StatusOK || err == nil && string(text) != "hello" {
					t.Errorf("%s: answer %d: %s %q, %v", name, answers, res.Status, text, err)
				}
			}
			if want := map[bool]int{true: 2, false: 1}[name == "in time"]; answers != want {
				t.Errorf("%s: %d answers, want %d", name, answers, want)
			}
		})
	}
}

// TestStrangers: only peers are served at their address.
func TestStrangers(t *testing.T) {
	f := New(Config{Name: "a", Secret: []byte("secret"), Local: func() []Server { return nil }})
	h := f.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("it was served")
	}))
	for _, headers := range []map[string]string{
		{}, {HeaderPeer: "b"}, {HeaderPeer: "b", headerSecret: "secre"}, {headerSecret: "secret"},
		{HeaderPeer: "b", headerSecret: "secret2"},
	} {
		for _, path := range []string{pathReport, pathTake, "/api/chat"} {
			r, err := http.NewRequest(http.MethodPost, path, strings.NewReader("{}"))
			if err != nil {
				t.Fatal(err)
			}
			for name, value := range headers {
				r.Header.Set(name, value)
			}
			rec := &recorder{header: http.Header{}}
			if h.ServeHTTP(rec, r); rec.status != http.StatusForbidden {
				t.Errorf("%s with %v: status %d", path, headers, rec.status)
			}
		}
	}
	if !Claims(http.Header{"X-Cacheproxy-Peer-Client": {""}}) || !Claims(http.Header{"X-Cacheproxy-Peer-Later": {""}}) || Claims(http.Header{"X-Cacheproxy-Upstream": {"a"}}) {
		t.Error("headers of peers are told from others by Claims")
	}
}

// recorder is an http.ResponseWriter for a status.
type recorder struct {
	header http.Header
	status int
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }

// FuzzPassed: no headers of a peer make the parser panic, or claim an absurd length or age.
func FuzzPassed(f *testing.F) {
	f.Add("c29tZWJvZHk=", "", "12", "100", "s", "1")
	f.Add("!", "", "-1", "1e9", "", "")
	f.Add("", "", "4294967295", "4611686018427387904", "", "65536")
	f.Fuzz(func(t *testing.T, client, key, age, length, server, moves string) {
		h := http.Header{
			headerClient: {client}, headerKey: {key}, headerAge: {age}, headerLength: {length},
			headerServer: {server}, headerMoves: {moves},
		}
		p, n, err := parsePassed(h)
		if err == nil && (n < 0 || p.Age < 0 || p.Moves < 0 || p.Server != server) {
			t.Errorf("%+v, %d bytes", p.About, n)
		}
	})
}

// TestPassGet: a request without a body reaches its owner at once, too.
func TestPassGet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		l.proxies["b"].waits, l.proxies["b"].serves = 0, 0
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodDelete, http.MethodPost} {
			out, err := http.NewRequest(method, "/api/tags", nil)
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			res, err := l.proxies["a"].Pass(out, l.place("a"), About{}, http.NoBody, 0)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if took := time.Since(began); took > 0 {
				t.Errorf("%s took %v", method, took)
			}
		}
	})
}

// changing is a Source of addresses that change.
type changing chan []string

func (c changing) Watch(ctx context.Context, found func([]string)) {
	for {
		select {
		case list := <-c:
			found(list)
		case <-ctx.Done():
			return
		}
	}
}
func (c changing) String() string { return "changing" }

// TestUnlisted: a peer that is no longer listed answers what it has, and is forgotten once it is away.
func TestUnlisted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		a, b := l.proxies["a"], l.proxies["b"]
		a.kill()
		found := make(changing)
		l.mu.Lock()
		a.source, b.serves = found, 2*lostFor
		l.mu.Unlock()
		a.start(nil)
		found <- []string{"a", "b"}
		time.Sleep(time.Second)
		time.AfterFunc(2*time.Second, func() { found <- []string{"a"} })
		if answer, err := l.pass("a", l.place("a"), "hello"); err != nil {
			t.Errorf("%q, %v", answer, err)
		}
		b.Drain()
		b.kill()
		time.Sleep(time.Second)
		if p := a.Peers(); len(p) != 0 || a.Counts().Away != 0 {
			t.Errorf("there still is %+v, %+v", p, a.Counts())
		}
		if _, ok := a.Choose(Ask{Model: "m"}); ok || !a.Has("m") {
			t.Error("the models are forgotten of a peer that is started again, or it is chosen")
		}
		b.start([]string{"a", "b"})
		found <- []string{"b"}
		time.Sleep(time.Second)
		if p := a.Peers(); len(p) != 1 || !p[0].Up {
			t.Errorf("it does not come back: %+v", p)
		}
		l.place("a")
		b.kill()
		time.Sleep(awayFor + time.Second)
		if a.Has("m") {
			t.Error("it is remembered for longer than it should be")
		}
	})
}

// TestAddresses: a peer that is listed with two addresses, such as one of IPv4 and one of IPv6, is one
// proxy, which goes away once.
func TestAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		a, b := l.proxies["a"], l.proxies["b"]
		a.kill()
		l.mu.Lock()
		a.source = list{"a", "b:1", "b:2"}
		l.mu.Unlock()
		a.start(nil)
		time.Sleep(time.Second)
		if p := a.Proxies(); len(a.Peers()) != 2 || len(p) != 2 || p[1].Name != "b" {
			t.Errorf("a hears %+v, and knows of %+v", a.Peers(), p)
		}
		b.kill()
		time.Sleep(time.Second)
		if lost := a.Incidents(time.Time{}); len(lost) != 1 || a.Counts().Away != 1 {
			t.Errorf("it went away %d times: %+v", a.Counts().Away, lost)
		}
		if u := a.Unserved(); len(u) != 1 || u[0].Server != "s" || !u[0].Away {
			t.Errorf("its server is remembered so: %+v", u)
		}
	})
}

// TestHangUp: a server of peers that is shut down ends what it answers, and waits for no reports.
func TestHangUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		ended := make(chan error)
		time.AfterFunc(1500*time.Millisecond, func() { ended <- l.proxies["b"].srv.Shutdown(t.Context()) })
		began := time.Now()
		if answer, err := l.pass("a", l.place("a"), "hello"); err != nil {
			t.Errorf("%q, %v", answer, err)
		}
		if err := <-ended; err != nil || time.Since(began) > 5*time.Second {
			t.Errorf("it ended after %v: %v", time.Since(began), err)
		}
	})
}

// TestReturns: a server that is listed again, after it was not, is told of with its models.
func TestReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		b := l.proxies["b"]
		servers := b.servers
		for _, listed := range []bool{false, true, false, true} {
			l.mu.Lock()
			if b.servers = nil; listed {
				b.servers = servers
			}
			l.mu.Unlock()
			if time.Sleep(time.Second); l.proxies["a"].Has("m") != listed {
				t.Errorf("listed: %v, and a thinks otherwise of its model", listed)
			}
		}
	})
}

// TestFirstLine: a peer is told nothing before there is a report.
func TestFirstLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, at := newOutbox(), stream{}
		o.sight(Sight{Server: "s", Hashes: []uint64{1}})
		time.AfterFunc(5*time.Second, func() { o.put(Report{ID: "b"}) })
		if line, err := o.next(t.Context(), &at); err != nil || !strings.Contains(string(line), `"id":"b","name":"","servers":[]`) {
			t.Errorf("%s, %v", line, err)
		}
		for n := range 100 { // servers that come and go
			o.put(Report{ID: "b", Servers: []Server{{Name: fmt.Sprint(n)}}})
			if _, err := o.next(t.Context(), &at); err != nil {
				t.Fatal(err)
			}
		}
		if len(at.models) != 1 {
			t.Errorf("the models of %d servers are kept, not of one", len(at.models))
		}
	})
}

// TestDropped: the last line of a peer that is listed no longer, which comes when it has been given up,
// does not count, and its end not against the peer that is listed at this address meanwhile.
func TestDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := fed(t, func() []Server { return nil })
		old := f.feed("there:1")
		old.listed = false
		f.mu.Lock()
		f.drop(old)
		f.mu.Unlock()
		now := f.feed("there:1")
		old.heard(reportOf("there"))
		old.lost(nil)
		if f.Has("m") || len(f.Peers()) != 1 {
			t.Errorf("a peer that was given up counts, or there are %d peers", len(f.Peers()))
		}
		news := f.News()
		now.lost(errReset)
		select {
		case <-news:
		default:
			t.Error("that it does not answer is no news")
		}
		if now.heard(reportOf("there")); !f.Has("m") {
			t.Error("the peer at this address does not count")
		}
	})
}

// TestRunEnds: a proxy that stops does not begin to own what its peers own when it hears no more of
// them: what it knows of their servers is old.
func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPair(t)
		owned := make(chan string, 10)
		f := New(Config{
			Name: "c", Sources: []Source{list{"b"}}, Secret: []byte("secret"),
			Transport: NewTransport(l.net.dialer("c"), nil),
			Local:     func() []Server { return []Server{{Name: "s"}} },
			Owned: func(_ string, on bool) {
				if on {
					owned <- "s"
				}
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { // ends with ctx
			defer close(ended)
			f.Run(ctx)
		}()
		time.Sleep(time.Second)
		f.Drain()
		for len(owned) > 0 { // before b was found
			<-owned
		}
		cancel()
		if <-ended; len(owned) > 0 {
			t.Error("it owns a server when it has stopped")
		}
	})
}

// TestEndlessLine: what answers at a peer's address, but sends no lines, does not fill the memory.
func TestEndlessLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil, "a", "b")
		b := l.proxies["b"]
		b.kill()
		time.Sleep(time.Second)
		text := bytes.Repeat([]byte("x"), reportMost/8)
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for range 9 {
				if w.Write(text); pause(r.Context(), time.Millisecond) != nil {
					return
				}
			}
			<-r.Context().Done()
		})}
		served := make(chan error, 1)
		ln := l.net.listen("b")
		go func() { served <- srv.Serve(ln) }() // ends with Close
		time.Sleep(2 * time.Second)
		p := l.proxies["a"].Peers()
		srv.Close()
		<-served
		if i := slices.IndexFunc(p, func(p Peer) bool { return p.Address == "b" }); i < 0 || !strings.Contains(p[i].Error, "longer than") {
			t.Errorf("%+v", p)
		}
	})
}

// TestKnown: what can be known of a fleet from one of its proxies.
func TestKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, names(2), "a", "b", "c")
		a, b, c := l.proxies["a"], l.proxies["b"], l.proxies["c"]
		time.Sleep(20 * time.Second)
		all := a.Proxies()
		if len(all) != 3 || len(a.Unserved()) != 0 || len(a.Incidents(time.Time{})) != 0 {
			t.Errorf("%+v, %+v, %+v", all, a.Unserved(), a.Incidents(time.Time{}))
		}
		owned := 0
		for i, p := range all {
			if p.Name != []string{"a", "b", "c"}[i] || !p.Hears || len(p.Servers) != 2 {
				t.Errorf("%+v", p)
			}
			for _, s := range p.Servers {
				if s.Owned {
					owned++
				}
			}
		}
		if owned != 2 || time.Since(a.Settled()) < 15*time.Second {
			t.Errorf("%d owners of 2 servers, settled for %v", owned, time.Since(a.Settled()))
		}

		// b comes back without knowing of a, with a server of its own and another version.
		b.kill()
		l.mu.Lock()
		b.source = list{"b", "c"}
		b.servers = []Server{{Name: "other", Takes: true, Drained: true, Models: []string{"n"}}}
		l.mu.Unlock()
		b.start(nil)
		time.Sleep(5 * time.Second)
		if s := time.Since(a.Settled()); s > 5*time.Second {
			t.Errorf("settled for %v", s)
		}
		if p := a.Proxies()[1]; p.Hears || p.Address != "b" || len(p.Servers) != 1 {
			t.Errorf("what does not read reports: %+v", p)
		}
		if p := c.Proxies()[1]; !p.Hears {
			t.Errorf("what reads reports: %+v", p)
		}

		began := time.Now()
		b.kill()
		c.Drain()
		time.Sleep(time.Second) // until a has heard it
		c.kill()
		time.Sleep(2 * time.Second)
		l.mu.Lock()
		a.servers[0].Takes = false
		l.mu.Unlock()
		time.Sleep(time.Second)
		got := fmt.Sprintf("%+v", a.Incidents(began))
		if len(a.Incidents(began)) != 1 || !strings.Contains(got, "Peer:b Lost:false") {
			t.Errorf("b went away, and c has stopped: %s", got)
		}
		if n := len(a.Incidents(time.Now().Add(time.Second))); n != 0 {
			t.Errorf("%d incidents in the future", n)
		}
		got = ""
		for _, u := range a.Unserved() {
			got += fmt.Sprint(u.Server, " ", u.Owner, " ", u.Away, " ", u.Drained, " ", u.Models, " ")
		}
		if got != "other b true true [n] server0 a false false [] " {
			t.Errorf("what nobody reaches: %q", got)
		}
		for _, p := range a.Peers() {
			if p.Up || p.Reason != Broke { // the network in memory has an error of its own
				t.Errorf("%+v", p)
			}
		}
		for range 2 * incidentsMost {
			a.history.add(Incident{})
		}
		if n := len(a.Incidents(time.Time{})); n != incidentsMost {
			t.Errorf("%d incidents are remembered", n)
		}
	})
}

// TestReasons: why a peer does not answer.
func TestReasons(t *testing.T) {
	ctx := t.Context()
	answers := func(status int, text string) string {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			io.WriteString(w, text)
		}))
		t.Cleanup(srv.Close)
		return srv.Listener.Addr().String()
	}
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	secure.StartTLS()
	defer secure.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close() // nobody listens there now
	for _, c := range []struct {
		name, addr, scheme string
		want               Reason
	}{
		{"nobody listens", ln.Addr().String(), "http", Refused},
		{"another secret", answers(403, notPeer+"\n"), "http", Secret},
		{"the address for clients", answers(403, `{"error":"headers that begin with …"}`), "http", NoPeer},
		{"another program", answers(404, "not found"), "http", NoPeer},
		{"no report", answers(200, "hello\n"), "http", NoPeer},
		{"a gateway without a proxy behind it", answers(502, ""), "http", Broke},
		{"an unknown authority", secure.Listener.Addr().String(), "https", Certificate},
		{"TLS where this proxy has none", secure.Listener.Addr().String(), "http", Certificate},
		{"none where this proxy has it", answers(200, ""), "https", Certificate},
	} {
		f := New(Config{Name: "a", Secret: []byte("secret"), Scheme: c.scheme})
		if err := newPeer(f, c.addr).follow(ctx); reasonOf(err) != c.want {
			t.Errorf("%s: %q, want %q: %v", c.name, reasonOf(err), c.want, err)
		}
		f.Transport.CloseIdleConnections()
	}
	for want, err := range map[Reason]error{
		Silent: fmt.Errorf("%w for 3 s", errSilent), Unknown: &net.OpError{Op: "dial", Err: &net.DNSError{}},
	} {
		if got := reasonOf(err); got != want {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
	}
}
