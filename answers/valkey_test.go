//go:build unix

package answers_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers/storetest"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
)

// shared is a Valkey that is closed once, by a test or at its end.
type shared struct {
	*answers.Valkey
	target string
	close  func() error
}

func (s shared) Close() error { return s.close() }

func openValkey(t testing.TB, target string, limits answers.Limits, log *slog.Logger) shared {
	t.Helper()
	v, err := answers.OpenValkey(target, limits, log)
	if err != nil {
		t.Fatal(err)
	}
	s := shared{v, target, sync.OnceValue(v.Close)}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// prefixes makes each store of the suite one of its own, on the same server.
var prefixes atomic.Int64

func TestValkey(t *testing.T) {
	server := valkeyserver.Start(t)
	t.Run("suite", func(t *testing.T) {
		storetest.Run(t, storetest.Backend{
			New: func(t testing.TB, limits answers.Limits) answers.Store {
				target := fmt.Sprintf("%s/3?prefix=test[*]%d:", server.URL(), prefixes.Add(1))
				return openValkey(t, target, limits, nil)
			},
			Reopen: func(t testing.TB, s answers.Store, limits answers.Limits) answers.Store {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				return openValkey(t, s.(shared).target, limits, nil)
			},
			Settle: func(t testing.TB, s answers.Store) {
				if err := s.(shared).Flush(context.Background()); err != nil {
					t.Fatal(err)
				}
			},
			Unbounded: true,
		})
	})
}

// settle waits until what was put is written, whether or not that failed.
func settle(s shared) error { return s.Flush(context.Background()) }

// TestValkeyShared: two proxies have one secret and one store; Wipe leaves what is not ours.
func TestValkeyShared(t *testing.T) {
	server := valkeyserver.Start(t)
	limits := answers.Limits{Bytes: 1 << 24, Age: time.Hour}
	one, two := openValkey(t, server.URL(), limits, nil), openValkey(t, server.URL(), limits, nil)
	if one.Secret() != two.Secret() {
		t.Error("two proxies have two secrets")
	}
	putNumbers(t, one, 0, 2500, 100)
	if err := settle(one); err != nil {
		t.Fatal(err)
	}
	if n := present(t, two, 0, 2500); n != 2500 {
		t.Errorf("the other proxy finds %d entries", n)
	}
	ctx, c := context.Background(), server.Client(t)
	key := storetest.KeyOf(1)
	name := "ollama-cacheproxy:answers:" + string(key[:])
	left, err := c.Do(ctx, c.B().Pttl().Key(name).Build()).AsInt64()
	if err != nil || left <= 0 || left > time.Hour.Milliseconds() {
		t.Errorf("an entry expires after %d ms, %v", left, err)
	}
	if err := c.Do(ctx, c.B().Set().Key("theirs").Value("1").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	if err := two.Wipe(ctx); err != nil {
		t.Fatal(err)
	}
	if n := present(t, one, 0, 2500); n != 0 {
		t.Errorf("%d entries are there after Wipe", n)
	}
	keys, err := c.Do(ctx, c.B().Keys().Pattern("*").Build()).AsStrSlice()
	slices.Sort(keys)
	if err != nil || !slices.Equal(keys, []string{"ollama-cacheproxy:answers:secret", "theirs"}) {
		t.Errorf("left are %q, %v", keys, err)
	}
	valkeyserver.Until(t, "the other proxy has the new secret", func() bool { return one.Secret() == two.Secret() })
}

func TestValkeySecretFile(t *testing.T) {
	server := valkeyserver.Start(t)
	file := filepath.Join(t.TempDir(), "secret")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	target := server.URL() + "?secret-file=" + url.QueryEscape(file)
	limits := answers.Limits{Bytes: 1 << 24}
	if _, err := answers.OpenValkey(target, limits, nil); err == nil {
		t.Error("there is no file")
	}
	write("short")
	if _, err := answers.OpenValkey(target, limits, nil); err == nil || !strings.Contains(err.Error(), "16") {
		t.Error(err)
	}
	write("a secret that is long enough")
	one, two, without := openValkey(t, target, limits, nil), openValkey(t, target, limits, nil),
		openValkey(t, server.URL(), limits, nil)
	if one.Secret() != two.Secret() || one.Secret() == without.Secret() {
		t.Error("the secret must depend on the file, and on nothing else of a process")
	}
}

func TestValkeyRefused(t *testing.T) {
	server := valkeyserver.Start(t, "--requirepass", "pass/word")
	for _, user := range []string{"", ":wrong@", "nobody:wrong@"} {
		_, err := answers.OpenValkey("valkey://"+user+server.Addr(), answers.Limits{Bytes: 1}, nil)
		if err == nil || !strings.Contains(err.Error(), server.Addr()) || strings.Contains(err.Error(), "wrong@") {
			t.Errorf("as %q: %v", user, err)
		}
	}
	_, err := answers.OpenValkey("valkey://:pass%2Fword@"+server.Addr()+"/4711", answers.Limits{Bytes: 1}, nil)
	if err == nil || !strings.Contains(err.Error(), "the database in --answers-store") {
		t.Errorf("a database that the server has not: %v", err)
	}
	s := openValkey(t, "redis://:pass%2Fword@"+server.Addr(), answers.Limits{Bytes: 1 << 20}, nil)
	putNumbers(t, s, 0, 3, 10)
	if err := settle(s); err != nil {
		t.Error(err)
	}
	for _, target := range []string{"valkey://:secretword@%zz", "valkey://host/db", "http://host"} {
		if _, err := answers.OpenValkey(target, answers.Limits{}, nil); err == nil ||
			strings.Contains(err.Error(), "secretword") {
			t.Errorf("%s: %v", target, err)
		}
	}
}

// wantLines fails t unless these texts were logged, once each and in this order, and nothing else but
// the warning of noeviction, which is the default.
func wantLines(t *testing.T, log *lines, want ...string) {
	t.Helper()
	var got []string
	for _, line := range log.all() {
		if !strings.Contains(line, "evicts nothing") {
			got = append(got, line)
		}
	}
	ok := len(got) == len(want)
	for i := 0; ok && i < len(got); i++ {
		ok = strings.Contains(got[i], want[i])
	}
	if !ok {
		t.Errorf("logged:\n%s\nwant %q", strings.Join(got, "\n"), want)
	}
}

// TestValkeyGone kills the server and starts it again, several times.
func TestValkeyGone(t *testing.T) {
	server := valkeyserver.Start(t)
	var log lines
	s := openValkey(t, server.URL(), answers.Limits{Bytes: 1 << 24}, log.logger())
	ctx := context.Background()
	var want []string
	for round := range 3 {
		putNumbers(t, s, 0, 100, 1000)
		if err := settle(s); err != nil {
			t.Fatal(err)
		}
		secret := s.Secret()
		server.Kill()
		valkeyserver.Until(t, "it is down", func() bool {
			s.Get(ctx, []answers.Key{storetest.KeyOf(1)})
			return s.Stats().Down
		})
		errs := s.Stats().Errors
		// None of these waits for anything, or counts as another try.
		for range 10_000 {
			found, err := s.Get(ctx, []answers.Key{storetest.KeyOf(1), storetest.KeyOf(2)})
			if err == nil || len(found) != 2 || found[0].Kind != 0 {
				t.Fatal(found, err)
			}
			if err := s.Put(ctx, []answers.Entry{storetest.EntryOf(1, 1, 10)}); err == nil {
				t.Fatal("Put reports nothing")
			}
		}
		if err := s.Wipe(ctx); err == nil {
			t.Error("Wipe reports nothing")
		}
		if now := s.Stats().Errors; now > errs+100 {
			t.Errorf("%d tries", now-errs)
		}
		if err := s.Delete(ctx, []answers.Key{storetest.KeyOf(5)}); err != nil {
			t.Error(err)
		}
		server.Restart()
		valkeyserver.Until(t, "it is back", func() bool { return !s.Stats().Down })
		want = append(want, "is gone", "is back")
		wantLines(t, &log, want...)
		if s.Secret() != secret {
			t.Errorf("round %d: the secret is lost, with all that others have", round)
		}
	}
	putNumbers(t, s, 0, 100, 1000)
	if err := settle(s); err != nil {
		t.Fatal(err)
	}
	if n := present(t, s, 0, 100); n != 100 {
		t.Errorf("%d entries are there", n)
	}
}

func TestValkeyAbsent(t *testing.T) {
	server := valkeyserver.Start(t)
	server.Kill()
	var log lines
	s := openValkey(t, server.URL(), answers.Limits{Bytes: 1 << 24}, log.logger())
	if !s.Stats().Down {
		t.Error("it is not down")
	}
	server.Restart()
	valkeyserver.Until(t, "it is there", func() bool { return !s.Stats().Down })
	wantLines(t, &log, "is gone", "is back")
	putNumbers(t, s, 0, 10, 10)
	if err := settle(s); err != nil {
		t.Error(err)
	}
}

// TestValkeySlow pauses the server: three calls wait, and those after them do not.
func TestValkeySlow(t *testing.T) {
	server := valkeyserver.Start(t)
	var log lines
	s := openValkey(t, server.URL(), answers.Limits{Bytes: 1 << 24}, log.logger())
	putNumbers(t, s, 0, 100, 1000)
	if err := settle(s); err != nil {
		t.Fatal(err)
	}
	server.Pause()
	ctx := context.Background()
	restore := answers.SetGetWait(answers.GetWait)
	calls := 0
	for ; !s.Stats().Down; calls++ {
		if _, err := s.Get(ctx, []answers.Key{storetest.KeyOf(1)}); err == nil {
			t.Fatal("a server that is stopped answers")
		}
	}
	if calls > 3 {
		t.Errorf("%d calls waited", calls)
	}
	restore()
	if err := s.Put(ctx, []answers.Entry{storetest.EntryOf(1, 1, 10)}); err == nil {
		t.Error("Put reports nothing")
	}
	server.Continue()
	valkeyserver.Until(t, "it is back", func() bool { return !s.Stats().Down })
	wantLines(t, &log, "is gone", "is back")
	if n := present(t, s, 0, 100); n != 100 {
		t.Errorf("%d entries are there", n)
	}
}

// TestValkeyFull has a server that refuses to write, since it evicts nothing.
func TestValkeyFull(t *testing.T) {
	server := valkeyserver.Start(t, "--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
	var log lines
	s := openValkey(t, server.URL(), answers.Limits{Bytes: 1 << 26}, log.logger())
	if all := log.all(); len(all) != 1 || !strings.Contains(all[0], "maxmemory-policy allkeys-lru") {
		t.Errorf("logged: %q", all)
	}
	n := 0
	for ; settle(s) == nil; n++ {
		if n == 10_000 {
			t.Fatal("it is never full")
		}
		if s.Put(context.Background(), []answers.Entry{storetest.EntryOf(n, 1, 4000)}) != nil {
			break
		}
	}
	wantLines(t, &log, "is full")
	if found := present(t, s, 0, n); found == 0 {
		t.Error("what is there is not found")
	}
	if s.Stats().Down {
		t.Error("it is down")
	}
	ctx, c := context.Background(), server.Client(t)
	if err := c.Do(ctx, c.B().ConfigSet().ParameterValue().
		ParameterValue("maxmemory-policy", "allkeys-lru").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	last := storetest.EntryOf(20_000, 1, 4000)
	valkeyserver.Until(t, "it keeps answers again", func() bool {
		return s.Put(ctx, []answers.Entry{last}) == nil && settle(s) == nil
	})
	wantLines(t, &log, "is full", "keeps new answers again")
	if n := present(t, s, 20_000, 20_001); n != 1 {
		t.Error("the last entry is not there")
	}
}

// TestValkeyRefusesToWrite has a server that keeps nothing new for a reason that passes: it lacks a
// replica here, and cannot write its own disk elsewhere. The proxy starts, and says so once.
func TestValkeyRefusesToWrite(t *testing.T) {
	server := valkeyserver.Start(t)
	ctx, c := context.Background(), server.Client(t)
	replicas := func(n string) {
		t.Helper()
		if err := c.Do(ctx, c.B().ConfigSet().ParameterValue().
			ParameterValue("min-replicas-to-write", n).Build()).Error(); err != nil {
			t.Fatal(err)
		}
	}
	replicas("1")
	var early lines
	s := openValkey(t, server.URL(), answers.Limits{Bytes: 1 << 24}, early.logger())
	wantLines(t, &early, "is gone")
	replicas("0")
	valkeyserver.Until(t, "it is back", func() bool { return !s.Stats().Down })
	wantLines(t, &early, "is gone", "is back")

	putNumbers(t, s, 0, 3, 10)
	if err := settle(s); err != nil {
		t.Fatal(err)
	}
	replicas("1")
	var late lines
	other := openValkey(t, server.URL(), answers.Limits{Bytes: 1 << 24}, late.logger())
	wantLines(t, &late) // the secret is there, and can be read
	for n := range 20 {
		other.Put(ctx, []answers.Entry{storetest.EntryOf(10+n, 1, 10)})
		settle(other)
	}
	wantLines(t, &late, "keeps no new answers")
	if n := present(t, other, 0, 3); n != 3 {
		t.Errorf("%d of 3 entries are found", n)
	}
	replicas("0")
	valkeyserver.Until(t, "it keeps answers again", func() bool {
		return other.Put(ctx, []answers.Entry{storetest.EntryOf(50, 1, 10)}) == nil && settle(other) == nil
	})
	wantLines(t, &late, "keeps no new answers", "keeps new answers again")
}

// TestValkeyForeign: values that are not as we wrote them are misses.
func TestValkeyForeign(t *testing.T) {
	server := valkeyserver.Start(t)
	s := openValkey(t, server.URL(), answers.Limits{Bytes: 1 << 24}, nil)
	putNumbers(t, s, 0, 6, 1000)
	if err := settle(s); err != nil {
		t.Fatal(err)
	}
	ctx, c := context.Background(), server.Client(t)
	name := func(n int) string {
		key := storetest.KeyOf(n)
		return "ollama-cacheproxy:answers:" + string(key[:])
	}
	whole, err := c.Do(ctx, c.B().Get().Key(name(0)).Build()).ToString()
	if err != nil {
		t.Fatal(err)
	}
	for n, value := range []string{whole, whole, whole[:500], "", "\x01\x01 something", whole + "x"} {
		if err := c.Do(ctx, c.B().Set().Key(name(n)).Value(value).Build()).Error(); err != nil {
			t.Fatal(err)
		}
	}
	if n := present(t, s, 0, 6); n != 1 {
		t.Errorf("%d entries are there, want the one that is whole and its own", n)
	}
}

func BenchmarkValkey(b *testing.B) {
	server := valkeyserver.Start(b)
	for _, length := range []int{1536, 8192} {
		s := openValkey(b, server.URL(), answers.Limits{Bytes: 1 << 30}, nil)
		start := time.Now()
		for n := 0; n < 10_000; n += 100 {
			putNumbers(b, s, n, n+100, length)
			settle(s)
		}
		b.Logf("%d bytes: %.0f µs per entry written", length, time.Since(start).Seconds()*1e6/10_000)
		for _, n := range []int{1, 1000} {
			b.Run(fmt.Sprintf("get/keys=%d/bytes=%d", n, length), func(b *testing.B) {
				keys := make([]answers.Key, n)
				for i := 0; b.Loop(); i++ {
					for j := range keys {
						keys[j] = storetest.KeyOf((i*n + j) * 7919 % 10_000)
					}
					found, err := s.Get(context.Background(), keys)
					if err != nil || found[0].Kind == 0 {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
