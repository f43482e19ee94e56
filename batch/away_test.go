package batch

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// machine is a machine on which a server is started and killed.
type machine struct {
	handler http.Handler

	mu     sync.Mutex
	ln     *ollamasim.Listener
	server *http.Server
	starts int
}

func (m *machine) start() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ln, m.server = ollamasim.Listen(), &http.Server{Handler: m.handler}
	m.starts++
	go m.server.Serve(m.ln) // ends with kill
}

// kill breaks all connections, and refuses new ones.
func (m *machine) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ln.Close()
	m.server.Close()
}

func (m *machine) killFor(d time.Duration) {
	m.kill()
	time.AfterFunc(d, m.start)
}

func (m *machine) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	m.mu.Lock()
	ln := m.ln
	m.mu.Unlock()
	return ln.DialContext(ctx, network, addr)
}

// away runs a batch of n requests on virtual time, on a machine that begin gets before that.
func away(t *testing.T, n int, f *fake, begin func(*machine, *Config)) (*Summary, string, error) {
	t.Helper()
	m := &machine{handler: f}
	m.start()
	c := config(t, "http://server", numbered(n))
	transport := c.Transport.(*http.Transport)
	transport.DialContext = m.dial
	defer transport.CloseIdleConnections()
	defer m.kill()
	var log bytes.Buffer
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	c.WaitForServer, c.Concurrency = 10*time.Minute, 4
	begin(m, &c)
	summary, err := Run(t.Context(), c)
	if summary != nil && strings.Count(read(t, c.Output), "\n") != n {
		t.Errorf("%d results, want %d", strings.Count(read(t, c.Output), "\n"), n)
	}
	return summary, log.String(), err
}

// TestServerComesLater: the batch waits for a server that appears after its start, and logs the
// waiting time now and then.
func TestServerComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		summary, log, err := away(t, 5, &fake{}, func(m *machine, _ *Config) { m.killFor(3*time.Minute - time.Second/2) })
		if err != nil || summary.Succeeded != 5 {
			t.Fatalf("%+v, %v", summary, err)
		}
		for want, n := range map[string]int{
			`level=WARN msg="the server does not answer; waiting for it" server=http://server up_to=10m0s err=`: 1,
			`level=WARN msg="still waiting for the server" server=http://server waited=`:                        5,
			`level=INFO msg="the server answers again" server=http://server waited=3m0s`:                        1,
		} {
			if strings.Count(log, want) != n {
				t.Errorf("%q is told %d times, want %d:\n%s", want, strings.Count(log, want), n, log)
			}
		}
	})
}

// TestServerRestarts: while the server is away no retries are counted, and earlier ones are
// forgotten. Requests under way are sent again.
func TestServerRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		tries := map[string]int{}
		f := &fake{}
		restarts := 0
		var m *machine
		f.ask = func(w http.ResponseWriter, r *http.Request, user string) bool {
			mu.Lock()
			defer mu.Unlock()
			tries[user]++
			switch {
			case user == "item 3" && tries[user]%3 != 0: // each time one retry below the limit
				w.WriteHeader(500)
				return true
			case user == "item 3" && tries[user] < 9, user == "item 20" && tries[user] == 1:
				restarts++
				m.killFor(5 * time.Minute)
				<-r.Context().Done()
				return true
			}
			return false
		}
		summary, log, err := away(t, 40, f, func(on *machine, c *Config) { m, c.Retries = on, 2 })
		if err != nil || summary.Succeeded != 40 {
			t.Fatalf("%+v, %v\n%s", summary, err, log)
		}
		if restarts != 3 || tries["item 3"] != 9 || m.starts != 4 {
			t.Errorf("%d restarts, %d starts, item 3 was sent %d times", restarts, m.starts, tries["item 3"])
		}
		for user, n := range tries {
			if user != "item 3" && n > 1+restarts {
				t.Errorf("%s was sent %d times", user, n)
			}
		}
		if n := strings.Count(log, "the server answers again"); n != restarts {
			t.Errorf("it is told %d times that the server is back:\n%s", n, log)
		}
	})
}

// TestServerDiesOfRequest: a request that kills the server each time is abandoned, but the batch
// goes on.
func TestServerDiesOfRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		var m *machine
		f.ask = func(w http.ResponseWriter, r *http.Request, user string) bool {
			if user != "item 4" {
				return false
			}
			m.killFor(time.Minute)
			<-r.Context().Done()
			return true
		}
		var out string
		summary, log, err := away(t, 10, f, func(on *machine, c *Config) {
			m, c.Retries, c.Concurrency = on, 2, 1
			out = c.Output
		})
		if err != nil || summary.Succeeded != 9 || summary.Failed != 1 || m.starts != 4 {
			t.Errorf("%+v, %v, %d starts\n%s", summary, err, m.starts, log)
		}
		const want = "the server went away each time that it was at this, 3 times: "
		if got := results(t, read(t, out))[3].Error; got == nil || !strings.HasPrefix(got.Message, want) {
			t.Errorf("%+v", got)
		}
	})
}

// TestServerStaysAway: a server that stays away ends the batch, which continues when it is back. If
// the server may never be away, the batch ends at once.
func TestServerStaysAway(t *testing.T) {
	for _, patience := range []time.Duration{0, 10 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			var m *machine
			var c *Config
			f := &fake{}
			var once sync.Once
			f.ask = func(w http.ResponseWriter, r *http.Request, user string) bool {
				if user == "item 7" {
					once.Do(m.kill)
				}
				return false
			}
			began := time.Now()
			_, log, err := away(t, 20, f, func(on *machine, config *Config) {
				m, c = on, config
				c.WaitForServer = patience
			})
			if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "the server does not answer at http://server: ") {
				t.Fatalf("%v\n%s", err, log)
			}
			if waited := time.Since(began); waited < patience || waited > patience+time.Minute {
				t.Errorf("it waited %v, want %v", waited, patience)
			}
			m.start()
			if summary, err := Run(t.Context(), *c); err != nil || summary.Succeeded != 20 || summary.Resumed == 0 {
				t.Errorf("%+v, %v", summary, err)
			}
			m.kill()
			c.Transport.(*http.Transport).CloseIdleConnections()
		})
	}
}

// TestStoppedWaiting: Ctrl-C ends the waiting.
func TestStoppedWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, err := away(t, 5, &fake{}, func(m *machine, c *Config) { m.kill() })
		if !errors.Is(err, ErrUnreachable) {
			t.Errorf("%v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := config(t, "http://server", numbered(1))
		c.WaitForServer = time.Hour
		nobody := ollamasim.Listen()
		nobody.Close()
		c.Transport.(*http.Transport).DialContext = nobody.DialContext
		if _, err := Run(ctx, c); !errors.Is(err, ErrStopped) {
			t.Errorf("%v", err)
		}
	})
}

// TestAwayBehindProxy: a proxy sends 502 or 503 for a server that is away. That does not mean that
// the server is overloaded.
func TestAwayBehindProxy(t *testing.T) {
	for _, status := range []int{http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			var back time.Time
			asked := 0
			f := &fake{}
			f.get = func(w http.ResponseWriter, r *http.Request) bool {
				mu.Lock()
				defer mu.Unlock()
				if r.URL.Path == "/api/chat" {
					if asked++; asked == 10 {
						back = time.Now().Add(time.Minute)
					}
				}
				if time.Now().Before(back) {
					w.Header().Set("Retry-After", "5")
					w.WriteHeader(status)
					io.WriteString(w, `{"error":"it does not answer"}`)
					return true
				}
				return false
			}
			summary, log, err := away(t, 30, f, func(_ *machine, c *Config) { c.Retries = 1 })
			if err != nil || summary.Succeeded != 30 || strings.Contains(log, "too much to do") || strings.Count(log, "waiting for it") != 1 {
				t.Errorf("%d: %+v, %v\n%s", status, summary, err, log)
			}
		})
	}
}

// TestAwayAtModels: the batch also waits for a server that disappears, or hangs, when it is asked
// for its models. After Ctrl-C it says that it was stopped.
func TestAwayAtModels(t *testing.T) {
	for _, hangs := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			f := &fake{}
			f.get = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/api/show" || time.Since(began) > time.Minute {
					return false
				}
				if hangs {
					<-r.Context().Done()
				}
				panic(http.ErrAbortHandler)
			}
			summary, log, err := away(t, 5, f, func(*machine, *Config) {})
			if err != nil || summary.Succeeded != 5 {
				t.Errorf("hangs %v: %+v, %v\n%s", hangs, summary, err, log)
			}
			began = time.Now().Add(time.Hour)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			m := &machine{handler: f}
			m.start()
			c := config(t, "http://server", numbered(1))
			transport := c.Transport.(*http.Transport)
			transport.DialContext = m.dial
			c.WaitForServer = time.Hour
			if _, err := Run(ctx, c); !errors.Is(err, ErrStopped) {
				t.Errorf("hangs %v, stopped: %v", hangs, err)
			}
			transport.CloseIdleConnections()
			m.kill()
		})
	}
}
