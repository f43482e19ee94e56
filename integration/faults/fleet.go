//go:build linux

package faults

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// The programs' settings. Those about time bound how long a request may take.
const (
	serverPort, clientPort, peerPort, valkeyPort = 11434, 11435, 11436, 6379

	slots       = 2 // of each server
	maxBody     = 64 << 10
	tryDuration = 10 * time.Second // for a server that is away
	silence     = 10 * time.Second // of a server that has a request
	drainDelay  = 3 * time.Second
	drainLimit  = 20 * time.Second

	// These are the proxy's own.
	dialTimeout = 10 * time.Second
	peerSilence = 3 * time.Second // after which another proxy counts as away

	startLimit = time.Minute // for a program to start on a busy machine
)

// bound is how long a request may take at most. The worst case: a server that is cut off is dialled
// and waited for; the proxy that owns it goes; the one that takes its place dials and waits; then the
// server takes the request and falls silent; and the proxy is stopped meanwhile.
func (f *fleet) bound() time.Duration {
	return 2*(dialTimeout+tryDuration) + peerSilence + silence + f.HoldMost + 10*time.Second
}

// fleet is some proxies before some servers, with a Valkey, on hosts of their own.
type fleet struct {
	Config
	places    places
	clients   place // where the clients are
	client    *http.Client
	proxies   []*process
	servers   []*server
	valkey    *process
	ledger    *ledger
	reference *ollamasim.Server // answers as the servers do, at once; nil if they are real
	idle      map[string]float64
}

// start starts everything. The caller must call close in any case.
func (c Config) start(ctx context.Context) (*fleet, error) {
	f := &fleet{Config: c, places: places{lab: c.Lab}, ledger: &ledger{begun: map[string][]begin{}}, idle: map[string]float64{}}
	var err error
	if f.clients, err = f.places.place("clients"); err != nil {
		return f, err
	}
	f.client = &http.Client{Transport: &http.Transport{DialContext: f.clients.dial, MaxIdleConnsPerHost: 100}}
	if !c.Real {
		f.reference, err = ollamasim.New(ollamasim.Config{Parallel: 64, Models: []ollamasim.Model{{
			Name: model, LoadTime: time.Nanosecond, PromptRate: 1e9, AnswerRate: 1e9, AnswerTokens: 16,
		}}})
		if err != nil {
			return f, err
		}
	}
	if err := f.startValkey(ctx); err != nil {
		return f, err
	}
	var hosts []place
	for i := range c.Proxies {
		p, err := f.places.place(fmt.Sprintf("p%d", i+1))
		if err != nil {
			return f, err
		}
		hosts = append(hosts, p)
	}
	if err := f.startServers(ctx, hosts); err != nil {
		return f, err
	}
	if err := f.startProxies(ctx, hosts); err != nil {
		return f, err
	}
	return f, f.rememberIdle(ctx)
}

func (f *fleet) startValkey(ctx context.Context) error {
	path, env, err := valkeyserver.Program(ctx)
	if err != nil {
		return err
	}
	at, err := f.places.place("valkey")
	if err != nil {
		return err
	}
	f.valkey = &process{name: "valkey", at: at, path: path, env: env, args: []string{
		"--port", fmt.Sprint(valkeyPort), "--bind", at.addr.String(), "--protected-mode", "no",
		"--save", "", "--appendonly", "no", "--daemonize", "no", "--dir", f.Dir,
	}}
	if err := f.valkey.start(); err != nil {
		return err
	}
	return f.comesUp(ctx, f.valkey)
}

// comesUp waits until Valkey accepts connections.
func (f *fleet) comesUp(ctx context.Context, p *process) error {
	return eventually(ctx, startLimit, p.name+" accepts no connection", func(ctx context.Context) error {
		if !p.running() {
			return fmt.Errorf("%w: %w", errEnded, p.err)
		}
		conn, err := f.clients.dial(ctx, "tcp", netip.AddrPortFrom(p.at.addr, valkeyPort).String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// startServers starts the servers: as sidecars one beside each proxy, otherwise on hosts of their
// own.
func (f *fleet) startServers(ctx context.Context, hosts []place) error {
	n := f.Servers
	if f.Sidecar {
		n = len(hosts)
	}
	for i := range n {
		name := fmt.Sprintf("s%d", i+1)
		var at place
		var err error
		if f.Sidecar {
			at = hosts[i]
		} else if at, err = f.places.place(name); err != nil {
			return err
		}
		s, err := newServer(ctx, name, at, f.Real, f.ledger)
		if s != nil {
			f.servers = append(f.servers, s)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *fleet) startProxies(ctx context.Context, hosts []place) error {
	secret := filepath.Join(f.Dir, "secret")
	if err := os.WriteFile(secret, []byte("a-secret-of-the-fleet-in-this-test\n"), 0o600); err != nil {
		return err
	}
	var peers []string
	for _, h := range hosts {
		peers = append(peers, "--peers", netip.AddrPortFrom(h.addr, peerPort).String())
	}
	if f.Lab != nil {
		var addrs []netip.Addr
		for _, h := range hosts {
			addrs = append(addrs, h.addr)
		}
		f.Lab.SetName("proxies", addrs...)
		peers = []string{"--peers", fmt.Sprintf("dns:proxies:%d", peerPort)}
	}
	for i, h := range hosts {
		args := []string{
			"--listen", netip.AddrPortFrom(h.addr, clientPort).String(), "--log-format", "json", "--log-level", "debug",
			"--slots", fmt.Sprint(slots), "--max-body", fmt.Sprint(maxBody), "--try-duration", tryDuration.String(),
			"--upstream-silence", silence.String(), "--drain", drainLimit.String(), "--drain-delay", drainDelay.String(),
		}
		for j, s := range f.servers {
			if !f.Sidecar || i == j {
				args = append(args, "--upstream", s.name+"=http://"+s.addr())
			}
		}
		if len(hosts) > 1 {
			args = append(args, peers...)
			args = append(args, "--peer-listen", netip.AddrPortFrom(h.addr, peerPort).String(), "--peer-secret-file", secret,
				"--peer-name", h.name, "--shared", "valkey://"+netip.AddrPortFrom(f.valkey.at.addr, valkeyPort).String())
		}
		if f.Sidecar {
			args = append(args, "--own", f.servers[i].name)
		}
		p := &process{name: h.name, at: h, path: f.Proxy, args: args}
		f.proxies = append(f.proxies, p)
		if err := p.start(); err != nil {
			return err
		}
	}
	for _, p := range f.proxies {
		if err := f.isReady(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

func (f *fleet) url(p *process) string {
	return "http://" + netip.AddrPortFrom(p.at.addr, clientPort).String()
}

// isReady waits until a proxy is ready.
func (f *fleet) isReady(ctx context.Context, p *process) error {
	return eventually(ctx, startLimit, p.name+" does not become ready", func(ctx context.Context) error {
		if !p.running() {
			return fmt.Errorf("%w: %w", errEnded, p.err)
		}
		_, err := f.get(ctx, p, "/_cacheproxy/ready")
		return err
	})
}

// get returns a page of a proxy, and an error if its status is not 200.
func (f *fleet) get(ctx context.Context, p *process, page string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, f.url(p)+page, nil)
	if err != nil {
		return "", err
	}
	res, err := f.client.Do(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %.300s", page, res.Status, text)
	}
	return string(text), err
}

// metrics returns the sum of the series of each name.
func (f *fleet) metrics(ctx context.Context, p *process) (map[string]float64, error) {
	text, err := f.get(ctx, p, "/metrics")
	if err != nil {
		return nil, err
	}
	sums := map[string]float64{}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			continue
		}
		var v float64
		if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &v); err != nil {
			return nil, fmt.Errorf("/metrics: %q: %w", line, err)
		}
		name, _, _ := strings.Cut(line[:strings.LastIndexByte(line, ' ')], "{")
		sums[name] += v
	}
	return sums, nil
}

const (
	goroutines = "go_goroutines"
	inFlight   = "ollama_cacheproxy_in_flight"
	queued     = "ollama_cacheproxy_queue_requests"
)

// keptConnections is how many goroutines a proxy may have more than before the first request: two
// for each connection that it keeps to a server or another proxy.
const keptConnections = 60

// isIdle waits until no proxy has a request, and none has more goroutines than before the first
// one, except for those of kept connections.
func (f *fleet) isIdle(ctx context.Context) error {
	f.client.CloseIdleConnections()
	var errs []error
	for _, p := range f.proxies {
		errs = append(errs, eventually(ctx, time.Minute, p.name+" is not idle again", func(ctx context.Context) error {
			m, err := f.metrics(ctx, p)
			switch _, ok := m[queued]; {
			case err != nil:
				return err
			case !ok || m[goroutines] == 0:
				return errors.New("/metrics lacks the queue or the goroutines")
			case m[inFlight] > 1 || m[queued] > 0: // this scrape is one in flight
				return fmt.Errorf("%v requests are in flight, %v wait", m[inFlight], m[queued])
			case m[goroutines] > f.idle[p.name]+keptConnections:
				return fmt.Errorf("it has %v goroutines, and had %v", m[goroutines], f.idle[p.name])
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// rememberIdle notes how many goroutines the proxies have.
func (f *fleet) rememberIdle(ctx context.Context) error {
	for _, p := range f.proxies {
		m, err := f.metrics(ctx, p)
		if err != nil {
			return err
		}
		f.idle[p.name] = m[goroutines]
	}
	return nil
}

// close ends everything, and reports what ended by itself.
func (f *fleet) close() error {
	var errs []error
	for _, p := range f.proxies {
		if p.exited != nil {
			errs = append(errs, p.stop(drainDelay+drainLimit+20*time.Second))
		}
		if p.log.panicked != "" {
			errs = append(errs, fmt.Errorf("%s: %s", p.name, p.log.panicked))
		}
	}
	if f.valkey != nil && f.valkey.exited != nil {
		errs = append(errs, f.valkey.kill())
	}
	for _, s := range f.servers {
		errs = append(errs, s.close())
	}
	if f.client != nil {
		f.client.CloseIdleConnections()
	}
	return errors.Join(errs...)
}

// dump ends the proxies in a way that makes them write what their goroutines do. None learns before
// from another's end.
func (f *fleet) dump() {
	for _, s := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGQUIT, syscall.SIGCONT} {
		for _, p := range f.proxies {
			if p.running() {
				p.cmd.Process.Signal(s) // if it has ended meanwhile, there is nothing to write
			}
		}
	}
	for _, p := range f.proxies {
		if p.exited != nil {
			<-p.exited
			p.exited = nil
		}
	}
}

// logs returns the last lines of all proxies' logs.
func (f *fleet) logs() string {
	var all strings.Builder
	for _, p := range append(slices.Clone(f.proxies), f.valkey) {
		if p != nil {
			fmt.Fprintf(&all, "the log of %s:\n%s\n", p.name, p.log.String())
		}
	}
	return all.String()
}

// errEnded says that waiting has no purpose.
var errEnded = errors.New("it has ended")

// eventually polls until check returns nil, or errEnded.
func eventually(ctx context.Context, limit time.Duration, what string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for last := error(nil); ; {
		once, end := context.WithTimeout(ctx, 5*time.Second)
		err := check(once)
		end()
		if err != nil && ctx.Err() != nil && last != nil { // it was only interrupted
			err = last
		}
		last = err
		if err == nil {
			return nil
		}
		if errors.Is(err, errEnded) {
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v, %s: %w", limit, what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
