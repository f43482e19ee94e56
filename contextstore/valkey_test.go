//go:build unix

package contextstore_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore/storetest"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// named are the servers of one proxy, in its order.
type named []string

func (n named) name(i uint16) string {
	if int(i) < len(n) {
		return n[i]
	}
	return ""
}

func (n named) index(name string) (uint16, bool) {
	for i := range n {
		if n[i] == name {
			return uint16(i), true
		}
	}
	return 0, false
}

// sharing is the store of one proxy.
type sharing struct {
	*contextstore.Valkey
	conn *valkeyconn.Conn
}

// share opens a store, which is closed when the test ends.
func share(t testing.TB, target string, limits contextstore.Limits, servers named, log *slog.Logger) sharing {
	t.Helper()
	parsed, err := valkeyconn.Parse(target, "test:")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := valkeyconn.Open(parsed, valkeyconn.Options{Gone: "it is gone", Back: "it is back", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	v := contextstore.NewValkey(conn, limits, servers.name, servers.index)
	t.Cleanup(func() {
		v.Close()
		conn.Close()
	})
	return sharing{v, conn}
}

// leaks fails t if goroutines are left when it has ended.
func leaks(t *testing.T) {
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

var suites atomic.Int64

func TestValkey(t *testing.T) {
	leaks(t)
	server := valkeyserver.Start(t)
	t.Run("suite", func(t *testing.T) {
		storetest.Run(t, func(t testing.TB, entries int, bytes int64) contextstore.Store {
			all := func(i uint16) string { return fmt.Sprint("server ", i) }
			parsed, err := valkeyconn.Parse(server.URL(), fmt.Sprintf("suite %d:", suites.Add(1)))
			if err != nil {
				t.Fatal(err)
			}
			conn, err := valkeyconn.Open(parsed, valkeyconn.Options{})
			if err != nil {
				t.Fatal(err)
			}
			v := contextstore.NewValkey(conn, contextstore.Limits{Entries: entries, Bytes: bytes}, all,
				func(string) (uint16, bool) { return 0, false })
			t.Cleanup(func() {
				v.Close()
				if s := v.Shared(); s.Waiting > 0 || s.Received > 0 || s.Foreign > 0 {
					t.Errorf("Shared is %+v", s)
				}
				conn.Close()
			})
			return v
		})
	})
}

func numbered(number, n int) []prefix.Link {
	links := make([]prefix.Link, n)
	fill(links, number)
	return links
}

var plenty = contextstore.Limits{Entries: 1 << 20, Bytes: 1 << 30}

// TestValkeyShared: what one proxy has seen the other knows, under its own numbers, also if it comes
// later; what has ended for one has ended for both.
func TestValkeyShared(t *testing.T) {
	leaks(t)
	server := valkeyserver.Start(t)
	one := share(t, server.URL(), plenty, named{"big", "small", "own"}, nil)
	two := share(t, server.URL(), plenty, named{"other", "small", "big"}, nil)
	two.Model("something else") // so that numbers of models differ
	at := time.Now().Add(-time.Minute)
	a, b := numbered(1, 20), numbered(2, 30)
	one.Put(a, contextstore.Sight{Upstream: 0, Lane: 3, Model: one.Model("m"), At: at}, 500)
	one.Put(b, contextstore.Sight{Upstream: 1, Model: one.Model("m"), At: at}, 0)
	one.Put(numbered(3, 5), contextstore.Sight{Upstream: 2, Model: one.Model("m"), At: at}, 0)
	want := func(s sharing, upstream uint16) {
		t.Helper()
		valkeyserver.Until(t, "the other proxy knows it", func() bool {
			n, _ := s.Match(b)
			return n == 30
		})
		n, rec := s.Match(a)
		wanted := contextstore.Record{
			Sight: contextstore.Sight{Upstream: upstream, Lane: 3, Model: s.Model("m"), At: rec.At},
			Warm:  true, Tokens: 500,
		}
		if n != 20 || rec != wanted || !rec.At.Equal(at) {
			t.Errorf("Match is %d, %+v, want %+v", n, rec, wanted)
		}
		if n, _ := s.Match(numbered(3, 5)); n != 0 {
			t.Error("a chain of a server that this proxy does not have is known")
		}
	}
	want(two, 2)
	want(share(t, server.URL(), plenty, named{"big", "small"}, nil), 0) // began later
	two.Cool(2, two.Model("m"))
	valkeyserver.Until(t, "it is cool", func() bool {
		_, rec := one.Match(a)
		return !rec.Warm
	})
	if n, rec := one.Match(b); n != 30 || !rec.Warm {
		t.Errorf("on another server, Match is %d, %+v", n, rec)
	}
	two.Forget(two.Model("m"))
	valkeyserver.Until(t, "it is forgotten", func() bool {
		n, _ := one.Match(a)
		return n == 0
	})
	late := share(t, server.URL(), plenty, named{"big", "small"}, nil)
	valkeyserver.Until(t, "the last event has arrived", func() bool { return late.Shared().Received == 5 })
	if n, _ := late.Match(b); n != 0 {
		t.Error("what was forgotten is known to a proxy that began later")
	}
	valkeyserver.Until(t, "the answers have come", func() bool { return one.Shared().Sent >= 3 })
	if s := one.Shared(); s.Sent != 3 || s.Received != 2 || s.Dropped != 0 || s.Foreign != 0 {
		t.Errorf("Shared is %+v", s)
	}
}

// TestValkeyNoText: nothing of a name or a prompt is in the server but the names of servers.
func TestValkeyNoText(t *testing.T) {
	leaks(t)
	server := valkeyserver.Start(t)
	s := share(t, server.URL(), plenty, named{"big"}, nil)
	s.Put(numbered(1, 20), contextstore.Sight{Model: s.Model("secret-model")}, 500)
	valkeyserver.Until(t, "it is sent", func() bool { return s.Shared().Sent == 1 })
	ctx, c := context.Background(), server.Client(t)
	all, err := c.Do(ctx, c.B().Xrange().Key("test:seen").Start("-").End("+").Build()).AsXRange()
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprint(all)
	if !strings.Contains(text, "big") || strings.Contains(text, "secret") {
		t.Error(text)
	}
	if left, err := c.Do(ctx, c.B().Ttl().Key("test:seen").Build()).AsInt64(); err != nil || left < 80_000 || left > 86_400 {
		t.Errorf("the stream expires after %d s, %v", left, err)
	}
}

// lines is a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// count returns how many lines contain a text.
func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

// TestValkeyGone: while the server is gone, each proxy knows what it has seen itself, and what it saw
// meanwhile arrives once the server is back.
func TestValkeyGone(t *testing.T) {
	for _, outage := range []struct {
		name       string
		rounds     int
		begin, end func(*valkeyserver.Server)
	}{
		{"killed", 3, (*valkeyserver.Server).Kill, (*valkeyserver.Server).Restart},
		{"hangs", 1, (*valkeyserver.Server).Pause, (*valkeyserver.Server).Continue},
	} {
		t.Run(outage.name, func(t *testing.T) {
			leaks(t)
			server := valkeyserver.Start(t)
			var log lines
			servers := named{"big"}
			one, two := share(t, server.URL(), plenty, servers, log.logger()), share(t, server.URL(), plenty, servers, nil)
			for round := range outage.rounds {
				outage.begin(server)
				for i := range 100 {
					one.Put(numbered(1000*round+i, 10), contextstore.Sight{Model: one.Model("m")}, 100)
					if n, _ := one.Match(numbered(1000*round+i, 10)); n != 10 {
						t.Fatal("a proxy does not know what it has seen itself")
					}
				}
				valkeyserver.Until(t, "both notice", func() bool { return one.conn.Gone() && two.conn.Gone() })
				if n, _ := two.Match(numbered(1000*round, 10)); n != 0 {
					t.Error("it is known without the server")
				}
				outage.end(server)
				valkeyserver.Until(t, "what was seen meanwhile has arrived", func() bool {
					n, _ := two.Match(numbered(1000*round+99, 10))
					return n == 10
				})
				for i := range 100 {
					if n, _ := two.Match(numbered(1000*round+i, 10)); n != 10 {
						t.Errorf("of chain %d, %d links are known", i, n)
					}
				}
				// A server that hung may have done what it was sent before.
				valkeyserver.Until(t, "it is back", func() bool { return !one.conn.Gone() && one.Shared().Waiting == 0 })
				valkeyserver.Until(t, "the lines are there", func() bool { return log.count("it is back") > round })
				if gone, back := log.count("it is gone"), log.count("it is back"); gone != round+1 || back != round+1 {
					t.Errorf("%d and %d lines", gone, back)
				}
			}
			if s := one.Shared(); s.Dropped != 0 {
				t.Errorf("Shared is %+v", s)
			}
		})
	}
}

// TestValkeyLongOutage puts more than may wait: the oldest is dropped.
func TestValkeyLongOutage(t *testing.T) {
	leaks(t)
	server := valkeyserver.Start(t)
	one, two := share(t, server.URL(), plenty, named{"big"}, nil), share(t, server.URL(), plenty, named{"big"}, nil)
	server.Kill()
	valkeyserver.Until(t, "both notice", func() bool { return one.conn.Gone() && two.conn.Gone() })
	const many = 400 // of 16 KB
	for i := range many {
		one.Put(numbered(i, 2000), contextstore.Sight{Model: one.Model("m")}, 100)
	}
	waiting := one.Shared()
	if waiting.Waiting == 0 || waiting.Dropped == 0 || waiting.Waiting+int(waiting.Dropped) != many {
		t.Fatalf("Shared is %+v", waiting)
	}
	server.Restart()
	valkeyserver.Until(t, "the last has arrived", func() bool {
		n, _ := two.Match(numbered(many-1, 2000))
		return n == 2000
	})
	if got := int(two.Shared().Received); got != waiting.Waiting {
		t.Errorf("%d events have arrived of %d that waited", got, waiting.Waiting)
	}
	if n, _ := two.Match(numbered(0, 2000)); n != 0 {
		t.Error("the oldest has arrived")
	}
}

// TestValkeyBounded: the stream has an upper bound, and of a long chain the links nearest to the first.
func TestValkeyBounded(t *testing.T) {
	leaks(t)
	server := valkeyserver.Start(t)
	limits := contextstore.Limits{Entries: 6400, Bytes: 1 << 30} // 100 events
	one := share(t, server.URL(), limits, named{"big"}, nil)
	const many = 5000
	for i := range many {
		one.Put(numbered(i, 3), contextstore.Sight{Model: one.Model("m")}, 100)
	}
	long := numbered(many, 3000)
	one.Put(long, contextstore.Sight{Model: one.Model("m")}, 100)
	valkeyserver.Until(t, "all are sent", func() bool { return one.Shared().Sent == many+1 })
	ctx, c := context.Background(), server.Client(t)
	if n, err := c.Do(ctx, c.B().Xlen().Key("test:seen").Build()).AsInt64(); err != nil || n < 100 || n > 300 {
		t.Errorf("the stream has %d events, %v", n, err)
	}
	two := share(t, server.URL(), limits, named{"big"}, nil)
	valkeyserver.Until(t, "the other knows the last", func() bool {
		n, _ := two.Match(long)
		return n > 0
	})
	if n, rec := two.Match(long); n != 2048 || rec.Tokens != 0 {
		t.Errorf("Match is %d, %+v", n, rec)
	}
}

// TestValkeyForeign: what others write to the server is passed over, whatever it is, and said once if
// nothing can be read or written.
func TestValkeyForeign(t *testing.T) {
	leaks(t)
	server := valkeyserver.Start(t)
	ctx, c := context.Background(), server.Client(t)
	for _, field := range []string{"e", "x"} {
		if err := c.Do(ctx, c.B().Xadd().Key("test:seen").Id("*").FieldValue().
			FieldValue(field, "nonsense").Build()).Error(); err != nil {
			t.Fatal(err)
		}
	}
	var log lines
	one := share(t, server.URL(), plenty, named{"big"}, log.logger())
	two := share(t, server.URL(), plenty, named{"big"}, nil)
	one.Put(numbered(1, 3), contextstore.Sight{Model: one.Model("m")}, 100)
	valkeyserver.Until(t, "what is an event has arrived", func() bool {
		n, _ := two.Match(numbered(1, 3))
		return n == 3
	})
	if s := two.Shared(); s.Foreign != 2 || s.Received != 1 {
		t.Errorf("Shared is %+v", s)
	}
	set := func() {
		t.Helper()
		if err := c.Do(ctx, c.B().Set().Key("test:seen").Value("not a stream").Build()).Error(); err != nil {
			t.Fatal(err)
		}
	}
	set()
	valkeyserver.Until(t, "it says so", func() bool {
		one.Put(numbered(2, 3), contextstore.Sight{Model: one.Model("m")}, 100)
		return log.count("refuses to be told") == 1 && log.count("does not tell") == 1
	})
	if err := c.Do(ctx, c.B().Del().Key("test:seen").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	valkeyserver.Until(t, "it works again", func() bool {
		one.Put(numbered(3, 3), contextstore.Sight{Model: one.Model("m")}, 100)
		n, _ := two.Match(numbered(3, 3))
		return n == 3 && log.count("is told again") == 1
	})
	if n := log.count("refuses to be told"); n != 1 {
		t.Errorf("%d lines", n)
	}
	if one.conn.Gone() {
		t.Error("the server counts as gone")
	}
}

// BenchmarkValkeyPut is what a request pays for it: one is put, and sent in the background.
func BenchmarkValkeyPut(b *testing.B) {
	server := valkeyserver.Start(b)
	s := share(b, server.URL(), plenty, named{"big"}, nil)
	links := numbered(1, 64)
	sight := contextstore.Sight{Model: s.Model("m")}
	b.ReportAllocs()
	for b.Loop() {
		s.Put(links, sight, 100)
	}
	b.ReportMetric(float64(s.Shared().Dropped)/float64(b.N), "dropped/op")
}
