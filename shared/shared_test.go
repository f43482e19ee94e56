//go:build unix

package shared_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/shared"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// childEnv has the URL of a server for a child, which has requests wait until it is killed.
const childEnv = "TEST_SHARED_CHILD"

func TestMain(m *testing.M) {
	if target := os.Getenv(childEnv); target != "" {
		parsed, err := valkeyconn.Parse(target, "test:")
		if err != nil {
			panic(err)
		}
		conn, err := valkeyconn.Open(parsed, valkeyconn.Options{})
		if err != nil {
			panic(err)
		}
		shared.NewLimits(conn).Waiting("a key", 3)
		select {}
	}
	goleak.VerifyTestMain(m)
}

// connect opens a connection, which is closed when the test ends.
func connect(t testing.TB, target string, log io.Writer) *valkeyconn.Conn {
	t.Helper()
	parsed, err := valkeyconn.Parse(target, "test:")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := valkeyconn.Open(parsed, valkeyconn.Options{
		Gone: "it is gone", Back: "it is back", Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// limits opens the limits of one proxy.
func limits(t testing.TB, target string) (*shared.Limits, *valkeyconn.Conn) {
	t.Helper()
	conn := connect(t, target, io.Discard)
	l := shared.NewLimits(conn)
	t.Cleanup(func() { l.Close() })
	return l, conn
}

// patient has questions wait for their answers, for tests of what is counted.
func patient(t *testing.T) { t.Cleanup(shared.SetTakeWait(time.Minute)) }

// surely is Take where the server is there.
func surely(t testing.TB, l *shared.Limits, what proxy.Taking) (taken proxy.Taken) {
	t.Helper()
	valkeyserver.Until(t, "the server answers", func() bool {
		var err error
		taken, err = l.Take(context.Background(), what)
		return err == nil
	})
	return taken
}

// TestRate has two proxies take requests of the same keys at once: each key gets as many as it may,
// by whatever proxy.
func TestRate(t *testing.T) {
	patient(t)
	server := valkeyserver.Start(t)
	one, _ := limits(t, server.URL())
	two, _ := limits(t, server.URL())
	var wg sync.WaitGroup
	var through [3]atomic.Int32
	const burst = 50
	for _, l := range []*shared.Limits{one, two, one, two} {
		wg.Go(func() {
			for i := range 90 {
				key := i % len(through)
				what := proxy.Taking{Key: fmt.Sprint("key ", key), Rate: 1.0 / 3600, Burst: burst}
				if surely(t, l, what).OK {
					through[key].Add(1)
				}
			}
		})
	}
	wg.Wait()
	for key := range through {
		if n := through[key].Load(); n != burst {
			t.Errorf("key %d: %d of 120 requests were let through", key, n)
		}
	}
	c, ctx := server.Client(t), context.Background()
	names, err := c.Do(ctx, c.B().Keys().Pattern("*").Build()).AsStrSlice()
	if err != nil || len(names) != len(through) {
		t.Fatal(names, err)
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "test:rate:") || strings.Contains(name, "key ") {
			t.Errorf("a key of the server is %q", name)
		}
		if left, err := c.Do(ctx, c.B().Ttl().Key(name).Build()).AsInt64(); err != nil || left <= 0 || left > burst*3600+1 {
			t.Errorf("%q expires after %d s, %v", name, left, err)
		}
	}
}

// TestRateFills: what is used up comes back with time, by the server's clock, and what a proxy knows to
// be used up is used up for all.
func TestRateFills(t *testing.T) {
	patient(t)
	server := valkeyserver.Start(t)
	one, _ := limits(t, server.URL())
	two, _ := limits(t, server.URL())
	slow := proxy.Taking{Key: "slow", Rate: 1.0 / 3600, Burst: 10}
	slow.Used = 6
	if got := surely(t, one, slow); !got.OK || got.Used < 6.99 || got.Used > 7 {
		t.Errorf("%+v", got)
	}
	slow.Used = 0
	if got := surely(t, two, slow); !got.OK || got.Used < 7.98 || got.Used > 8 {
		t.Errorf("%+v", got)
	}
	slow.Used = 1e300
	if got := surely(t, two, slow); got.OK || got.Used > 10 {
		t.Errorf("%+v", got)
	}
	quick := proxy.Taking{Key: "quick", Rate: 1000, Burst: 1}
	valkeyserver.Until(t, "a thousandth of a second is over", func() bool { return surely(t, one, quick).OK })
	valkeyserver.Until(t, "another one is over", func() bool { return surely(t, two, quick).OK })
	if got := surely(t, one, proxy.Taking{Key: "free"}); !got.OK || got.Used != 0 || got.Waiting != 0 {
		t.Errorf("without limits: %+v", got)
	}
}

// TestForeign: whatever others have written to the keys, a client is not locked out.
func TestForeign(t *testing.T) {
	patient(t)
	server := valkeyserver.Start(t)
	c, ctx := server.Client(t), context.Background()
	l, conn := limits(t, server.URL())
	what := proxy.Taking{Key: "a", Rate: 1000, Burst: 5, Waits: true}
	surely(t, l, proxy.Taking{Key: "a", Rate: 1.0 / 3600, Burst: 5}) // whose key stays for a while
	l.Waiting("a", 1)
	var names []string
	valkeyserver.Until(t, "both keys are there", func() bool {
		names, _ = c.Do(ctx, c.B().Keys().Pattern("*").Build()).AsStrSlice()
		return len(names) == 2
	})
	rate, waiting := names[0], names[1]
	if strings.Contains(rate, "waiting") {
		rate, waiting = waiting, rate
	}
	for _, value := range []string{"", "x", "nan", "inf", "-inf", "1e308", "-1", "9999999999999999999999", "0x7f"} {
		if err := c.Do(ctx, c.B().Set().Key(rate).Value(value).Build()).Error(); err != nil {
			t.Fatal(err)
		}
		for _, field := range []string{"other", ""} {
			if err := c.Do(ctx, c.B().Hset().Key(waiting).FieldValue().FieldValue(field, value).
				FieldValue("dead", "7 1").Build()).Error(); err != nil {
				t.Fatal(err)
			}
		}
		valkeyserver.Until(t, "a request is let through with "+value, func() bool {
			got := surely(t, l, what)
			if got.Waiting != 0 {
				t.Errorf("%q: %d wait", value, got.Waiting)
			}
			return got.OK
		})
	}
	if got := l.Stats(); got.Asked == 0 {
		t.Errorf("Stats are %+v", got)
	}
	for till, want := range map[time.Duration]int{4 * time.Second: 1_000_000, time.Hour: 0} {
		valkeyserver.Until(t, fmt.Sprintf("%d wait", want), func() bool { // again, if it takes longer than it counts
			value := fmt.Sprintf("99999999999999999999 %d", time.Now().Add(till).UnixMicro())
			if err := c.Do(ctx, c.B().Hset().Key(waiting).FieldValue().
				FieldValue("other", value).Build()).Error(); err != nil {
				t.Fatal(err)
			}
			return surely(t, l, what).Waiting == want
		})
	}
	for _, name := range names { // of another type
		if err := c.Do(ctx, c.B().Del().Key(name).Build()).Error(); err != nil {
			t.Fatal(err)
		}
		if err := c.Do(ctx, c.B().Sadd().Key(name).Member("x").Build()).Error(); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Take(ctx, what); err == nil {
			t.Errorf("%s is of another type: %+v", name, got)
		}
	}
	if conn.Gone() {
		t.Error("the server counts as gone")
	}
}

// TestWaiting: what waits at one proxy the others know, until it no longer waits or the proxy ends.
func TestWaiting(t *testing.T) {
	patient(t)
	server := valkeyserver.Start(t)
	one, _ := limits(t, server.URL())
	two, _ := limits(t, server.URL())
	third := shared.NewLimits(connect(t, server.URL(), io.Discard))
	what := proxy.Taking{Key: "a", Waits: true}
	wants := func(l *shared.Limits, want int) {
		t.Helper()
		valkeyserver.Until(t, fmt.Sprint(want, " wait elsewhere"), func() bool { return surely(t, l, what).Waiting == want })
	}
	for range 3 {
		one.Waiting("a", 1)
	}
	third.Waiting("a", 5)
	third.Waiting("another", 7)
	wants(two, 8)
	wants(one, 5)
	one.Waiting("a", -1)
	wants(two, 7)
	if err := third.Close(); err != nil {
		t.Error(err)
	}
	wants(two, 2)
	one.Waiting("a", -2)
	wants(two, 0)
	c, ctx := server.Client(t), context.Background()
	valkeyserver.Until(t, "nothing is left", func() bool {
		n, err := c.Do(ctx, c.B().Dbsize().Build()).AsInt64()
		return err == nil && n == 0
	})
}

// TestWaitingKilled: the waiting requests of a proxy that was killed count no longer after a while.
// Those of one that lives do, however long they wait.
func TestWaitingKilled(t *testing.T) {
	patient(t)
	server := valkeyserver.Start(t)
	one, _ := limits(t, server.URL())
	two, _ := limits(t, server.URL())
	what := proxy.Taking{Key: "a key", Waits: true}
	two.Waiting("a key", 2)
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+server.URL())
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	valkeyserver.Until(t, "all wait", func() bool { return surely(t, one, what).Waiting == 5 })
	child.Process.Kill()
	child.Wait()
	got, lasts := surely(t, one, what).Waiting, waitingLasts(t, server)
	if got != 5 && lasts { // unless it took so long that they count no longer
		t.Errorf("right after the end, %d wait", got)
	}
	valkeyserver.Until(t, "only those of the proxy that lives are left", func() bool { return surely(t, one, what).Waiting == 2 })
}

// waitingLasts reports whether the waiting requests of two proxies are there and still count.
func waitingLasts(t *testing.T, server *valkeyserver.Server) bool {
	t.Helper()
	ctx, c := context.Background(), server.Client(t)
	names, err := c.Do(ctx, c.B().Keys().Pattern("test:waiting:*").Build()).AsStrSlice()
	if err != nil || len(names) == 0 {
		return false
	}
	all, err := c.Do(ctx, c.B().Hgetall().Key(names[0]).Build()).AsStrMap()
	if err != nil {
		t.Fatal(err)
	}
	now, err := c.Do(ctx, c.B().Time().Build()).AsIntSlice()
	if err != nil {
		t.Fatal(err)
	}
	lasts := len(all) == 2
	for _, value := range all {
		var count, till int64
		if _, err := fmt.Sscan(value, &count, &till); err != nil {
			t.Fatal(value, err)
		}
		lasts = lasts && till > now[0]*1_000_000+now[1]
	}
	return lasts
}

// TestOutage: while the server is gone, no call waits, and what waits is told once it is back.
func TestOutage(t *testing.T) {
	server := valkeyserver.Start(t)
	one, conn := limits(t, server.URL())
	two, other := limits(t, server.URL())
	ctx, what := context.Background(), proxy.Taking{Key: "a", Rate: 1, Burst: 5, Waits: true}
	surely(t, one, what)
	server.Pause()
	calls := 0
	for ; !conn.Gone(); calls++ {
		if _, err := one.Take(ctx, what); err == nil {
			t.Fatal("a server that is stopped answers")
		}
	}
	if calls > 3 {
		t.Errorf("%d calls waited", calls)
	}
	for range 1000 {
		if _, err := one.Take(ctx, what); !errors.Is(err, valkeyconn.ErrGone) {
			t.Fatal(err)
		}
	}
	if s := one.Stats(); s.Unanswered < 1000 {
		t.Errorf("Stats are %+v", s)
	}
	one.Waiting("a", 4)
	server.Continue()
	valkeyserver.Until(t, "what waits is told", func() bool { return !other.Gone() && surely(t, two, what).Waiting == 4 })
	server.Kill()
	valkeyserver.Until(t, "both notice", func() bool {
		two.Take(ctx, what)
		return conn.Gone() && other.Gone()
	})
	server.Restart() // empty
	valkeyserver.Until(t, "what waits is told again", func() bool {
		return !other.Gone() && surely(t, two, what).Waiting == 4
	})
}

// handler is a proxy with one API key, before a server that answers everything.
func handler(t *testing.T, target string) (*httptest.Server, *valkeyconn.Conn) {
	t.Helper()
	ollama := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"done":true}`)
	}))
	t.Cleanup(ollama.Close)
	to, err := url.Parse(ollama.URL)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := proxy.ParseKeys("a sk-a rate=20/h")
	if err != nil {
		t.Fatal(err)
	}
	l, conn := limits(t, target)
	transport := proxy.NewTransport()
	t.Cleanup(transport.CloseIdleConnections)
	h := &proxy.Handler{
		Upstreams: []*upstream.Server{upstream.NewServer("u", to, transport, slog.New(slog.DiscardHandler))},
		Transport: transport, Guard: proxy.Guard{Keys: keys}, Limiter: l, NoTouch: true,
	}
	h.Init()
	front := httptest.NewServer(h)
	t.Cleanup(front.Close)
	return front, conn
}

// ask sends a request to each of the proxies in turn, and returns how many were answered by which
// status.
func ask(t *testing.T, n int, proxies ...*httptest.Server) map[int]int {
	t.Helper()
	got := map[int]int{}
	for i := range n {
		r, err := http.NewRequest(http.MethodPost, proxies[i%len(proxies)].URL+"/api/chat", strings.NewReader(`{"model":"m"}`))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer sk-a")
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		got[res.StatusCode]++
	}
	return got
}

// TestTwoProxies: a key gets its rate over both proxies. When the server is gone they go on by
// themselves, each knowing what both have used up, and a server that comes back empty changes nothing.
func TestTwoProxies(t *testing.T) {
	patient(t)
	defer http.DefaultClient.CloseIdleConnections()
	server := valkeyserver.Start(t)
	one, onesConn := handler(t, server.URL())
	two, twosConn := handler(t, server.URL())
	if got := ask(t, 40, one, two); got[200] != 20 || got[429] != 20 {
		t.Errorf("%v", got)
	}
	server.Kill()
	if got := ask(t, 10, one, two); got[200] > 2 || got[200]+got[429] != 10 {
		t.Errorf("without the server: %v", got)
	}
	valkeyserver.Until(t, "both notice", func() bool { return onesConn.Gone() && twosConn.Gone() })
	server.Restart()
	valkeyserver.Until(t, "it is back", func() bool { return !onesConn.Gone() && !twosConn.Gone() })
	if got := ask(t, 10, one, two); got[200] > 1 || got[200]+got[429] != 10 {
		t.Errorf("with an empty server: %v", got)
	}
}

// TestLearned: what one proxy saves another one finds, also across an outage.
func TestLearned(t *testing.T) {
	server := valkeyserver.Start(t)
	var log bytes.Buffer // read only when the connection is closed
	conn := connect(t, server.URL(), &log)
	one, two := shared.NewLearned(conn), shared.NewLearned(connect(t, server.URL(), io.Discard))
	defer two.Close()
	ctx := context.Background()
	found := func(name, want string) {
		t.Helper()
		valkeyserver.Until(t, name+" is found", func() bool {
			got, err := two.LoadLearned(ctx)
			return err == nil && string(got[name]) == want
		})
	}
	one.SaveLearned("big", []byte(`{"slots":1}`))
	one.SaveLearned("big", []byte(`{"slots":2}`))
	one.SaveLearned("small", []byte(`{"slots":3}`))
	one.SaveLearned("", []byte(`{}`))
	one.SaveLearned("torn", []byte(`{`))
	one.SaveLearned("long", []byte(`"`+strings.Repeat("x", 64<<10)+`"`))
	found("big", `{"slots":2}`)
	found("small", `{"slots":3}`)
	if got, err := two.LoadLearned(ctx); err != nil || len(got) != 2 {
		t.Errorf("%q, %v", got, err)
	}
	c := server.Client(t)
	if left, err := c.Do(ctx, c.B().Ttl().Key("test:learned").Build()).AsInt64(); err != nil || left < 600_000 || left > 604_800 {
		t.Errorf("it expires after %d s, %v", left, err)
	}
	server.Kill()
	valkeyserver.Until(t, "it is gone", func() bool {
		_, err := one.LoadLearned(ctx)
		return errors.Is(err, valkeyconn.ErrGone)
	})
	one.SaveLearned("big", []byte(`{"slots":5}`))
	one.SaveLearned("big", []byte(`{"slots":6}`))
	server.Restart()
	found("big", `{"slots":6}`)
	one.SaveLearned("last", []byte(`{}`))
	one.Close()
	if got, err := two.LoadLearned(ctx); err != nil || string(got["last"]) != `{}` {
		t.Errorf("after Close: %q, %v", got, err)
	}
	conn.Close()
	if text := log.String(); strings.Count(text, "it is gone") != 1 || strings.Count(text, "it is back") != 1 {
		t.Error(text)
	}
}

// TestRights: the user of docs/shared.md may do all that a proxy does, and reach nothing else.
func TestRights(t *testing.T) {
	patient(t)
	docs, err := os.ReadFile("../docs/shared.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rule, found := strings.Cut(string(docs), "ACL SETUSER ")
	rule, _, _ = strings.Cut(rule, "\n")
	if !found {
		t.Fatal("docs/shared.md has no ACL SETUSER")
	}
	server := valkeyserver.Start(t)
	c, ctx := server.Client(t), context.Background()
	words := strings.Fields(strings.NewReplacer("'", "", "SECRET", "hunter2", "ollama-cacheproxy:shared:", "test:").Replace(rule))
	if err := c.Do(ctx, c.B().Arbitrary("ACL", "SETUSER").Args(words...).Build()).Error(); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer // read only when the connection is closed
	conn := connect(t, "valkey://"+words[0]+":hunter2@"+server.Addr(), &log)
	l, learned := shared.NewLimits(conn), shared.NewLearned(conn)
	one := func(uint16) string { return "one" }
	seen := contextstore.NewValkey(conn, contextstore.Limits{Entries: 1000, Bytes: 1 << 20}, one,
		func(string) (uint16, bool) { return 0, true })
	another := contextstore.NewValkey(conn, contextstore.Limits{Entries: 1000, Bytes: 1 << 20}, one,
		func(string) (uint16, bool) { return 0, true })
	links := []prefix.Link{{Hash: 1}, {Hash: 2}}
	seen.Put(links, contextstore.Sight{Model: seen.Model("m")}, 10)
	valkeyserver.Until(t, "what was seen arrives", func() bool {
		depth, _ := another.Match(links)
		return depth == 2
	})
	l.Waiting("a", 3)
	if got := surely(t, l, proxy.Taking{Key: "a", Rate: 1, Burst: 5, Waits: true}); !got.OK {
		t.Errorf("%+v", got)
	}
	learned.SaveLearned("one", []byte(`{}`))
	valkeyserver.Until(t, "what was learned is found", func() bool {
		got, err := learned.LoadLearned(ctx)
		return err == nil && len(got) == 1
	})
	for _, command := range [][]string{{"GET", "theirs"}, {"FLUSHALL"}, {"KEYS", "*"}, {"CONFIG", "GET", "*"}} {
		err := conn.Call(ctx, 0, func(ctx context.Context, c valkey.Client) error {
			return c.Do(ctx, c.B().Arbitrary(command...).Build()).Error()
		})
		if err == nil || !strings.Contains(err.Error(), "NOPERM") {
			t.Errorf("%v: %v", command, err)
		}
	}
	for _, store := range []io.Closer{l, learned, seen, another} {
		store.Close()
	}
	conn.Close()
	if log.Len() > 0 {
		t.Error(log.String())
	}
}

// BenchmarkTake is what each request of a key with limits waits for.
func BenchmarkTake(b *testing.B) {
	server := valkeyserver.Start(b)
	l, _ := limits(b, server.URL())
	what := proxy.Taking{Key: "a", Rate: 1e6, Burst: 1e6, Waits: true}
	late := 0
	for b.Loop() {
		if _, err := l.Take(context.Background(), what); err != nil {
			late++
		}
	}
	b.ReportMetric(float64(late), "late")
}
