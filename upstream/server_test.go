package upstream

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama/ollama/api"
)

// stub is an Ollama server whose answers a test sets.
type stub struct {
	mu      sync.Mutex
	version string            // "" refuses connections; guarded by mu
	fails   error             // what every request ends with; guarded by mu
	ps      string            // guarded by mu
	date    string            // guarded by mu
	asked   []string          // method, path and body; guarded by mu
	refuse  map[string]string // path to error, with 400; guarded by mu
}

func (s *stub) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	body := ""
	if r.Body != nil {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		body = " " + string(text)
	}
	s.asked = append(s.asked, r.Method+" "+r.URL.Path+body)
	if s.version == "" {
		return nil, errRefused
	}
	if s.fails != nil {
		return nil, s.fails
	}
	w := httptest.NewRecorder()
	if s.date != "" {
		w.Header().Set("Date", s.date)
	}
	switch refused, bad := s.refuse[r.URL.Path]; {
	case bad:
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":%q}`, refused)
	case r.URL.Path == "/api/version":
		fmt.Fprintf(w, `{"version":%q}`, s.version)
	case r.URL.Path == "/api/tags":
		io.WriteString(w, `{"models":[{"name":"a:latest"},{"name":"Team/X:Q4"}]}`)
	case r.URL.Path == "/api/ps":
		io.WriteString(w, s.ps)
	default:
		io.WriteString(w, `{}`)
	}
	return w.Result(), nil
}

var errRefused = &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}

func (s *stub) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// taken returns what was asked since the last call.
func (s *stub) taken() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := strings.Join(s.asked, "; ")
	s.asked = nil
	return all
}

func newTestServer(s *stub) *Server {
	return NewServer("main", &url.URL{Scheme: "http", Host: "127.0.0.1:11434"}, s, slog.New(slog.DiscardHandler))
}

func TestPoll(t *testing.T) {
	s := &stub{version: "0.34.1", ps: `{"models":[{"name":"a:latest","size":7,"size_vram":3,"context_length":4096,"expires_at":"2030-01-01T00:00:00Z"}]}`}
	server := newTestServer(s)
	var told []State
	server.Polled = func(st State) { told = append(told, st) }
	poll := func(wantAsked string) State {
		t.Helper()
		st := server.Poll(t.Context())
		if got := s.taken(); got != wantAsked {
			t.Errorf("asked %s, want %s", got, wantAsked)
		}
		return st
	}

	st := poll("GET /api/version; GET /api/tags; GET /api/ps")
	if !st.Up || st.Err != nil || st.Version != "0.34.1" || fmt.Sprint(st.Models) != "[a:latest Team/X:Q4]" || st.Restarted || !st.LoadedKnown {
		t.Errorf("first poll: %+v", st)
	}
	if l := st.Loaded[0]; l.Name != "a:latest" || l.Size != 7 || l.SizeVRAM != 3 || l.ContextLength != 4096 {
		t.Errorf("loaded: %+v", l)
	}
	// Something is loaded: it is looked at again. The list of models is read only if the server was used.
	poll("GET /api/version; GET /api/ps")
	s.set(func() { s.ps = `{"models":[]}` })
	if st = poll("GET /api/version; GET /api/ps"); len(st.Loaded) != 0 || !st.LoadedKnown || len(st.Models) != 2 {
		t.Errorf("unloaded: %+v", st)
	}
	// Idle and empty: one request.
	if st = poll("GET /api/version"); st.LoadedKnown {
		t.Errorf("idle: %+v", st)
	}
	server.Used()
	poll("GET /api/version; GET /api/tags; GET /api/ps")

	s.set(func() { s.version = "" })
	if st = poll("GET /api/version"); st.Up || st.Err == nil || st.Restarted || len(st.Models) != 2 {
		t.Errorf("down: %+v", st)
	}
	s.set(func() { s.version = "0.34.1" })
	if st = poll("GET /api/version; GET /api/tags; GET /api/ps"); !st.Up || !st.Restarted {
		t.Errorf("up again: %+v", st)
	}
	s.set(func() { s.version = "0.35.0" })
	if st = poll("GET /api/version; GET /api/tags; GET /api/ps"); !st.Restarted || st.Version != "0.35.0" {
		t.Errorf("another version: %+v", st)
	}
	if len(told) != 8 || server.State().Version != "0.35.0" {
		t.Errorf("told of %d polls, the state is %+v", len(told), server.State())
	}
	// A poll that is cut short changes nothing.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if server.Poll(ctx); len(told) != 8 {
		t.Error("a poll without time to ask was told of")
	}
}

// Run polls at its pace, sooner while the server is down, and at once when a request failed.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stub{version: "0.34.1", ps: `{"models":[]}`}
		server := newTestServer(s)
		server.Poll(t.Context())
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { server.Run(ctx); close(ended) }() // ends with ctx
		count := func(d time.Duration) int {
			s.taken()
			time.Sleep(d)
			synctest.Wait()
			return strings.Count(s.taken(), "/api/version")
		}
		if n := count(10 * time.Minute); n != 40 {
			t.Errorf("%d polls in ten minutes, want 40", n)
		}
		s.set(func() { s.version = "" })
		server.Failed()
		server.Failed()
		synctest.Wait()
		if server.State().Up {
			t.Error("still up after a failed request")
		}
		if n := count(time.Minute); n < 29 || n > 31 {
			t.Errorf("%d polls in a minute of being away, want 30", n)
		}
		// While requests may wait for it, it is looked for more often.
		server.TryDuration = time.Minute
		s.set(func() { s.version = "0.34.1" })
		server.Failed()
		count(time.Second)
		if n := count(10 * time.Minute); n != 40 {
			t.Errorf("%d polls in ten minutes, want 40", n)
		}
		s.set(func() { s.version = "" })
		server.Failed()
		if n := count(50 * time.Second); n < 80 {
			t.Errorf("%d polls in 50 s while requests wait, want 100 but for those before it was found away", n)
		}
		count(time.Minute)
		if n := count(time.Minute); n < 29 || n > 31 {
			t.Errorf("%d polls in a minute when none wait any more, want 30", n)
		}
		cancel()
		<-ended
	})
}

// The expiry is told by our clock, whatever the server's.
func TestLoadedClock(t *testing.T) {
	now := time.Now()
	for _, skew := range []time.Duration{0, time.Hour, -3 * time.Minute} {
		s := &stub{version: "1", date: now.Add(skew).UTC().Format(http.TimeFormat)}
		s.ps = fmt.Sprintf(`{"models":[{"name":"a","expires_at":%q}]}`, now.Add(skew+5*time.Minute).Format(time.RFC3339Nano))
		loaded, err := newTestServer(s).Loaded(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if off := loaded[0].ExpiresAt.Sub(now.Add(5 * time.Minute)).Abs(); off > 10*time.Second {
			t.Errorf("clock ahead by %v: the expiry is off by %v", skew, off)
		}
	}
}

func TestKeep(t *testing.T) {
	s := &stub{version: "1"}
	server := newTestServer(s)
	for _, tc := range []struct {
		d         time.Duration
		embedding bool
		options   map[string]any
		shift     *bool
		want      string
	}{
		{24 * time.Hour, false, nil, nil, `/api/generate {"model":"m","prompt":"","keep_alive":"24h0m0s"}`},
		{Forever, false, nil, nil, `/api/generate {"model":"m","prompt":"","keep_alive":-1}`},
		{0, false, map[string]any{"num_ctx": 2048}, new(bool), `/api/generate {"model":"m","prompt":"","keep_alive":"0s","options":{"num_ctx":2048},"shift":false}`},
		{time.Minute, true, map[string]any{"num_ctx": 2048}, nil, `/api/embed {"model":"m","input":[],"keep_alive":"1m0s","options":{"num_ctx":2048}}`},
	} {
		if err := server.Keep(t.Context(), "m", tc.d, tc.embedding, tc.options, tc.shift); err != nil {
			t.Error(err)
		}
		got := s.taken()
		path, body, _ := strings.Cut(strings.TrimPrefix(got, "POST "), " ")
		var sent, want map[string]any
		wantPath, wantBody, _ := strings.Cut(tc.want, " ")
		if json.Unmarshal([]byte(body), &sent) != nil || json.Unmarshal([]byte(wantBody), &want) != nil || path != wantPath {
			t.Errorf("%v: %s, want %s", tc.d, got, tc.want)
		}
		for k, v := range want {
			if fmt.Sprint(sent[k]) != fmt.Sprint(v) {
				t.Errorf("%v: %s is %v, want %v", tc.d, k, sent[k], v)
			}
		}
	}
	s.set(func() { s.refuse = map[string]string{"/api/generate": "does not support generate"} })
	err := server.Keep(t.Context(), "m", time.Minute, false, nil, nil)
	if StatusCode(err) != http.StatusBadRequest || !strings.Contains(err.Error(), "does not support generate") {
		t.Errorf("refused: %v (%d)", err, StatusCode(err))
	}
	s.set(func() { s.version = "" })
	if err := server.Keep(t.Context(), "m", time.Minute, false, nil, nil); err == nil || StatusCode(err) != 0 {
		t.Errorf("down: %v (%d)", err, StatusCode(err))
	}
}

// TestPersist: what breaks off, on a connection that was kept from before a restart, is sent once more;
// what cannot be sent at all is not.
func TestPersist(t *testing.T) {
	for _, w := range []struct {
		fails error
		asked int
	}{{syscall.ECONNRESET, 2}, {syscall.ECONNREFUSED, 1}} {
		up := &stub{version: "0.34.1", fails: w.fails}
		s := NewServer("s", &url.URL{Scheme: "http", Host: "ollama"}, up, slog.New(slog.DiscardHandler))
		if err := s.Load(t.Context(), "m", nil, nil); err == nil || len(up.asked) != w.asked {
			t.Errorf("%v: sent %d times, want %d; %v", w.fails, len(up.asked), w.asked, err)
		}
	}
}

// TestDoubt: a poll that fails is no server that is away: that is one that refuses connections, or three polls in a row that
// failed while nothing else came from it. And one that was only too slow has not been restarted.
func TestDoubt(t *testing.T) {
	slow, broken := fmt.Errorf("asking: %w", context.DeadlineExceeded), io.EOF
	forbidden, gateway := api.StatusError{StatusCode: 403}, api.StatusError{StatusCode: 502}
	for _, tc := range []struct {
		name      string
		polls     []error // how one after the other ends, after one that was answered
		answers   bool    // something else comes from the server between them
		away      string  // whether it is away after each
		restarted bool    // by the next poll that is answered
	}{
		{"slow once", []error{slow}, false, "-", false},
		{"broken off once", []error{broken}, false, "-", false},
		{"slow for long", []error{slow, slow, slow, slow}, false, "--xx", false},
		{"broken off for long", []error{broken, broken, broken}, false, "--x", true},
		{"a gateway that refuses polls", []error{forbidden, forbidden, forbidden, forbidden}, false, "----", false},
		{"a gateway without the server", []error{gateway, gateway, gateway}, false, "--x", true},
		{"slow, now and then", []error{slow, slow, nil, slow, slow}, false, "-----", false},
		{"slow while it answers", []error{slow, slow, slow, slow, slow}, true, "-----", false},
		{"refused", []error{errRefused}, false, "x", true},
		{"refused while it answers", []error{errRefused}, true, "x", true},
		{"refused, then slow", []error{errRefused, slow}, false, "xx", true},
		{"no route", []error{&net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}}, false, "x", true},
		{"no descriptors", []error{&net.OpError{Op: "dial", Err: syscall.EMFILE}}, false, "-", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &stub{version: "0.34.1", ps: `{"models":[{"name":"a:latest"}]}`}
				server := newTestServer(s)
				server.TryDuration = time.Minute
				server.Poll(t.Context())
				seen := time.Now()
				away := ""
				var st State
				for _, err := range tc.polls {
					time.Sleep(time.Second)
					if tc.answers {
						seen = time.Now()
						server.Alive()
						time.Sleep(time.Second)
					}
					s.set(func() { s.fails = err })
					st = server.Poll(t.Context())
					if err == nil || err == forbidden {
						seen = time.Now()
					}
					if st.Up != (err == nil) || !st.Away && len(st.Loaded) != 1 || len(st.Models) != 2 || !st.Seen.Equal(seen) || st.Away && !st.Until.Equal(seen.Add(time.Minute)) {
						t.Errorf("after %v: %+v, last seen %v", err, st, seen)
					}
					away += map[bool]string{true: "x", false: "-"}[st.Away]
				}
				if away != tc.away {
					t.Errorf("away: %s, want %s", away, tc.away)
				}
				s.set(func() { s.fails = nil })
				if st := server.Poll(t.Context()); !st.Up || st.Away || st.Restarted != tc.restarted || !st.LoadedKnown {
					t.Errorf("then: %+v", st)
				}
			})
		})
	}
}

// TestBrokeOff: a server that closes the connections of a request and of a poll is away, one that closes either is not; nor is
// one that has answered something since.
func TestBrokeOff(t *testing.T) {
	for _, tc := range []struct {
		name          string
		poll          error
		alive, missed bool
		away          bool
	}{
		{"both", io.EOF, false, true, true},
		{"reset", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, false, true, true},
		{"the request alone", nil, false, true, false},
		{"the poll alone", io.EOF, false, false, false},
		{"a slow poll", context.DeadlineExceeded, false, true, false},
		{"something came since", io.EOF, true, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &stub{version: "0.34.1", ps: `{"models":[]}`}
				server := newTestServer(s)
				server.Poll(t.Context())
				time.Sleep(time.Second)
				server.client = api.NewClient(server.URL, &http.Client{Transport: tripper(func(r *http.Request) (*http.Response, error) {
					time.Sleep(time.Second)
					if tc.alive {
						server.Alive()
					}
					return s.RoundTrip(r)
				})})
				s.set(func() { s.fails = tc.poll })
				if tc.missed {
					server.BrokeOff()
				}
				server.Check(t.Context())
				if st := server.State(); st.Away != tc.away || st.Up != (tc.poll == nil) {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

// TestAliveWhileAway: a server that answers although it counts as away is polled at once.
func TestAliveWhileAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stub{version: "0.34.1", ps: `{"models":[]}`}
		server := newTestServer(s)
		ctx, stop := context.WithCancel(t.Context())
		server.Poll(ctx)
		server.Unreachable(errRefused)
		<-server.wake
		ended := make(chan struct{})
		go func() { server.Run(ctx); close(ended) }()
		synctest.Wait()
		time.Sleep(pollEveryTry) // not for each piece of an answer
		began := time.Now()
		server.Alive()
		synctest.Wait()
		if st := server.State(); !st.Up || !time.Now().Equal(began) {
			t.Errorf("%+v", st)
		}
		stop()
		<-ended
	})
}

// TestNeverAnswered: one that was never seen is away as well, and nobody waits for it.
func TestNeverAnswered(t *testing.T) {
	server := newTestServer(&stub{})
	server.TryDuration = time.Minute
	if st := server.Poll(t.Context()); !st.Away || !st.Seen.IsZero() || !st.Until.IsZero() {
		t.Errorf("%+v", st)
	}
}

// TestCheck: what a poll found that ended since somebody asked need not be asked again.
func TestCheck(t *testing.T) {
	s := &stub{}
	server := newTestServer(s)
	for _, shared := range []bool{false, true, false} {
		if server.state.Polled = time.Now(); shared {
			server.state.Polled = time.Now().Add(time.Hour) // as if while it waited for its turn
		}
		if st := server.Check(t.Context()); !st.Away {
			t.Errorf("%+v", st)
		}
		if polled := s.taken() != ""; polled == shared {
			t.Errorf("polled: %v, another poll ended meanwhile: %v", polled, shared)
		}
	}
}

// TestRefresh: the models are as they are now, and so they are after a minute.
func TestRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stub{version: "0.34.1", ps: `{"models":[]}`}
		server := newTestServer(s)
		lists := func() int { return strings.Count(s.taken(), "/api/tags") }
		server.Poll(t.Context())
		lists()
		if st := server.Refresh(t.Context()); !st.Has("registry.ollama.ai/library/a:latest") || st.Has("registry.ollama.ai/library/b:latest") || lists() != 1 {
			t.Errorf("after a poll: %+v", st)
		}
		// While it waits for its turn, a poll ends that began after it was called, or before.
		for _, after := range []bool{true, false} {
			server.listed = time.Now().Add(time.Second)
			if server.state.Listed = time.Now().Add(-time.Second); after {
				server.state.Listed = time.Now().Add(time.Second)
			}
			server.Refresh(t.Context())
			if n := lists(); n == 1 == after {
				t.Errorf("%d lists, another one that began after the call: %v", n, after)
			}
		}
		// Models come and go without the proxy, too.
		time.Sleep(listEvery)
		if server.Poll(t.Context()); lists() != 1 {
			t.Error("an idle server's models were not listed after a minute")
		}
	})
}

func TestUnreachable(t *testing.T) {
	s := &stub{version: "0.34.1", ps: `{"models":[]}`}
	server := newTestServer(s)
	server.Poll(t.Context())
	server.Unreachable(errRefused)
	if st := server.State(); st.Up || !st.Away || st.Err == nil || len(st.Models) != 2 {
		t.Errorf("after a connection was refused: %+v", st)
	}
	if st := server.Poll(t.Context()); !st.Up || !st.Restarted {
		t.Errorf("found again: %+v", st)
	}
}

// TestUnreachableDuringPoll: a poll that began before does not say that the server is well.
func TestUnreachableDuringPoll(t *testing.T) {
	s := &stub{version: "0.34.1", ps: `{"models":[]}`}
	server := newTestServer(s)
	server.Poll(t.Context())
	server.client = api.NewClient(server.URL, &http.Client{Transport: tripper(func(r *http.Request) (*http.Response, error) {
		if r.URL.Path == "/api/version" {
			server.Unreachable(errRefused)
		}
		return s.RoundTrip(r)
	})})
	if st := server.Poll(t.Context()); st.Up || !st.Away {
		t.Errorf("gone during the poll: %+v", st)
	}
	server.client = api.NewClient(server.URL, &http.Client{Transport: s})
	if st := server.Poll(t.Context()); !st.Up || !st.Restarted {
		t.Errorf("found again: %+v", st)
	}
}

type tripper func(*http.Request) (*http.Response, error)

func (f tripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
