// Command overhead measures what the proxy costs: requests per second and latency of the same load
// sent to an upstream directly, through a bare httputil.ReverseProxy, and through
// ollama-cacheproxy. The three run as separate processes and take turns, round by round, so that a
// machine whose speed drifts does not favour one. The ratio to the bare proxy is that of the same
// round. Its median need not be the ratio of the median rates, since these may be from different
// rounds.
//
// The cases called "hit" are answers that ollama-cacheproxy has kept; the bare proxy gets them from the
// upstream.
//
//	go run ./bench/overhead
//	go run ./bench/overhead -rounds 9 -time 3s -clients 16
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

func main() {
	var cfg config
	role := flag.String("role", "", "internal: upstream, or bare=URL")
	flag.StringVar(&cfg.proxy, "proxy", "", "the ollama-cacheproxy program; built from this tree if empty")
	flag.IntVar(&cfg.rounds, "rounds", 5, "rounds per case")
	flag.DurationVar(&cfg.time, "time", 2*time.Second, "how long a round loads each of the three")
	flag.IntVar(&cfg.together, "together", 50, "clients that ask the same at once, in the last case")
	flag.IntVar(&cfg.clients, "clients", 8, "clients, each with one request at a time")
	flag.StringVar(&cfg.store, "store", "memory", "where the answers of hits are kept: see --answers-store")
	flag.StringVar(&cfg.only, "only", "", "only cases whose name contains this")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := error(nil)
	if *role != "" {
		err = serve(ctx, *role)
	} else {
		err = run(ctx, cfg, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "overhead:", err)
		os.Exit(1)
	}
}

type config struct {
	proxy    string
	store    string
	only     string
	together int
	rounds   int
	time     time.Duration
	clients  int
}

// load is one case: the same request again and again.
type load struct {
	name   string
	body   []byte
	stream bool
	hit    bool // a kept answer of 8 KB
}

func loads() []load {
	body := func(size int, stream bool) []byte {
		line := `Score the candidate from 1 to 10 and explain in one sentence why.\n`
		return fmt.Appendf(nil, `{"model":"bench","stream":%v,"messages":[{"role":"user","content":"%s"}]}`, stream, strings.Repeat(line, size/len(line)))
	}
	hit := func(stream bool) []byte {
		text := bytes.Replace(body(2<<10, stream), []byte("bench"), []byte(hitModel), 1)
		return append(text[:len(text)-1], `,"options":{"temperature":0}}`...)
	}
	return []load{
		{name: "8 KB, one answer", body: body(8<<10, false)},
		{name: "8 KB, 20 chunks", body: body(8<<10, true), stream: true},
		{name: "1 MB, one answer", body: body(1<<20, false)},
		{name: "1 MB, 20 chunks", body: body(1<<20, true), stream: true},
		{name: "hit, one answer of 8 KB", body: hit(false), hit: true},
		{name: "hit, 8 KB in 64 chunks", body: hit(true), stream: true, hit: true},
	}
}

func run(ctx context.Context, cfg config, out io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if cfg.proxy == "" {
		dir, err := os.MkdirTemp("", "overhead-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		cfg.proxy = filepath.Join(dir, "ollama-cacheproxy")
		build := exec.CommandContext(ctx, "go", "build", "-o", cfg.proxy, "github.com/ollama-cacheproxy/ollama-cacheproxy/cmd/ollama-cacheproxy")
		if text, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building the proxy: %w\n%s", err, text)
		}
	}
	up, err := start(ctx, self, "-role", "upstream")
	if err != nil {
		return err
	}
	defer up.stop()
	bare, err := start(ctx, self, "-role", "bare="+up.url)
	if err != nil {
		return err
	}
	defer bare.stop()
	ours, err := start(ctx, cfg.proxy, "--listen", "127.0.0.1:0", "--upstream", up.url, "--log-format", "json")
	if err != nil {
		return err
	}
	defer ours.stop()
	keeps, err := start(ctx, cfg.proxy, "--listen", "127.0.0.1:0", "--upstream", up.url, "--log-format", "json",
		"--cache-answers", "deterministic", "--answers-store", cfg.store)
	if err != nil {
		return err
	}
	defer keeps.stop()

	fmt.Fprintf(out, "%d clients, %d rounds of %v each; medians over rounds; rate ÷ bare: in the same round, median (least to most)\n", cfg.clients, cfg.rounds, cfg.time)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "case\ttarget\trequests/s\tp50 ms\tp99 ms\trate ÷ bare\t")
	for _, l := range loads() {
		if !strings.Contains(l.name, cfg.only) {
			continue
		}
		targets := []target{{"direct", up.url}, {"bare ReverseProxy", bare.url}, {"ollama-cacheproxy", ours.url}}
		if l.hit {
			targets[2].url = keeps.url
			if err := keep(ctx, keeps.url, l); err != nil {
				return err
			}
		}
		if err := compare(ctx, table, l, targets, cfg); err != nil {
			return err
		}
		table.Flush()
	}
	return alone(ctx, out, up.url, keeps.url, cfg)
}

// alone measures what only ollama-cacheproxy does.
func alone(ctx context.Context, out io.Writer, up, keeps string, cfg config) error {
	if strings.Contains("together", cfg.only) {
		if err := together(ctx, out, keeps, cfg); err != nil {
			return err
		}
	}
	if strings.Contains("hop", cfg.only) {
		return hop(ctx, out, up, cfg)
	}
	return nil
}

// hop measures what it costs that a request is received by another proxy than the one that schedules
// its server. A request through each is sent in turn, by one client, so that the difference is that
// of neighbours in time.
func hop(ctx context.Context, out io.Writer, up string, cfg config) error {
	both, stop, err := peers(ctx, up, cfg.proxy)
	if err != nil {
		return err
	}
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, cfg.time*time.Duration(cfg.rounds)+time.Minute)
	defer cancel()
	transport := &http.Transport{MaxIdleConnsPerHost: 2, DisableCompression: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	passed := 0
	for _, l := range []load{small(), loads()[0]} {
		l.body = bytes.Replace(l.body, []byte("bench"), []byte(listedModel), 1)
		took, err := inTurn(ctx, client, both, l, cfg.time*time.Duration(cfg.rounds)/2)
		if err != nil {
			return err
		}
		var added []float64
		for n := range took[0] {
			added = append(added, took[1][n]-took[0][n])
		}
		passed += len(added)
		slices.Sort(added)
		fmt.Fprintf(out, "%s, one client × %d: median %.2f ms through the owner, %.2f ms through another proxy; added, median of the differences: %.2f ms (p95 %.2f ms)\n",
			l.name, len(added), middle(took[0]), middle(took[1]), middle(added), added[len(added)*95/100])
	}
	if f, err := proxyprocess.AskFleet(ctx, both[0].url); err != nil || f.Counts.Received < passed {
		return errors.Join(err, fmt.Errorf("of %d requests only %d were passed on to the owner", passed, f.Counts.Received))
	}
	return nil
}

// inTurn sends a load to two targets in turn for some time, and returns how long each took, in ms.
func inTurn(ctx context.Context, client *http.Client, both [2]*process, l load, d time.Duration) (took [2][]float64, err error) {
	begin := time.Now()
	for n := -warmUp; n <= 0 || time.Since(begin) < d; n++ {
		for i := range both {
			i = (i + n&1) % 2 // each comes first in turn
			sent := time.Now()
			if _, err := one(ctx, client, both[i].url, l); err != nil {
				return took, err
			}
			if n >= 0 {
				took[i] = append(took[i], time.Since(sent).Seconds()*1e3)
			}
		}
	}
	return took, nil
}

// peers starts two proxies that work as one before an upstream, of which the first owns it.
func peers(ctx context.Context, up, program string) (both [2]*process, stop func(), err error) {
	var stops []func()
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	dir, err := os.MkdirTemp("", "overhead-")
	if err != nil {
		return both, stop, err
	}
	stops = append(stops, func() { os.RemoveAll(dir) })
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte(rand.Text()), 0o600); err != nil {
		return both, stop, err
	}
	addrs, err := freeAddrs(len(both))
	if err != nil {
		return both, stop, err
	}
	for i := range both {
		args := []string{
			"--listen", "127.0.0.1:0", "--upstream", "up=" + up, "--log-format", "json",
			"--peer-listen", addrs[i], "--peers", addrs[1-i], "--peer-secret-file", secret,
		}
		if i == 0 {
			args = append(args, "--own", "up")
		}
		if both[i], err = start(ctx, program, args...); err != nil {
			return both, stop, err
		}
		stops = append(stops, both[i].stop)
	}
	for _, p := range both {
		if _, err := proxyprocess.Joined(ctx, p.url, 1); err != nil {
			return both, stop, err
		}
	}
	return both, stop, nil
}

// warmUp is how many requests open the connections, and are not counted.
const warmUp = 20

// small is a request of about 200 bytes.
func small() load {
	l := loads()[0]
	l.name, l.body = "200 bytes, one answer", []byte(`{"model":"bench","stream":false,"messages":[{"role":"user","content":"Score the candidate from 1 to 10 and explain in one sentence why."}]}`)
	return l
}

// freeAddrs returns addresses on loopback where nothing listens.
func freeAddrs(n int) (addrs []string, err error) {
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer ln.Close() // when all are found, so that they differ
		addrs = append(addrs, ln.Addr().String())
	}
	return addrs, nil
}

// target is what a load is sent to.
type target struct{ name, url string }

// compare sends a load to the targets in turns, and prints what came out.
func compare(ctx context.Context, table io.Writer, l load, targets []target, cfg config) error {
	results := make([][]result, len(targets))
	for range cfg.rounds {
		for i, t := range targets {
			r, err := measure(ctx, t.url, l, cfg.clients, cfg.time)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", l.name, t.name, err)
			}
			results[i] = append(results[i], r)
		}
	}
	for i, t := range targets {
		rate := median(results[i], func(r result) float64 { return r.rate })
		var ratios []float64
		for round, r := range results[i] {
			ratios = append(ratios, r.rate/results[1][round].rate)
		}
		fmt.Fprintf(table, "%s\t%s\t%.0f\t%.2f\t%.2f\t%.2f (%.2f to %.2f)\t\n", l.name, t.name, rate,
			median(results[i], func(r result) float64 { return r.p50 }), median(results[i], func(r result) float64 { return r.p99 }),
			middle(ratios), slices.Min(ratios), slices.Max(ratios))
	}
	return nil
}

// together has many clients ask the same at once, of what is not kept, and prints within what time
// their first bytes come.
func together(ctx context.Context, out io.Writer, target string, cfg config) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	transport := &http.Transport{MaxIdleConnsPerHost: cfg.together, DisableCompression: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	var spreads []float64
	for round := range 4 * cfg.rounds {
		body := fmt.Sprintf(`{"model":%q,"stream":true,"together":%d,"options":{"temperature":0},"messages":[{"role":"user","content":"x"}]}`, hitModel, round)
		firsts, errs := make([]time.Time, cfg.together), make([]error, cfg.together)
		var wg sync.WaitGroup
		for i := range cfg.together {
			wg.Go(func() {
				firsts[i], errs[i] = first(ctx, client, target, body)
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
		spreads = append(spreads, slices.MaxFunc(firsts, time.Time.Compare).Sub(slices.MinFunc(firsts, time.Time.Compare)).Seconds()*1e3)
	}
	fmt.Fprintf(out, "%d clients at once, computed once: the first bytes come within %.1f ms (median of %d rounds; %.1f to %.1f)\n",
		cfg.together, middle(spreads), len(spreads), slices.Min(spreads), slices.Max(spreads))
	return nil
}

// first returns when the first byte of the answer's body came. It reads the rest, too.
func first(ctx context.Context, client *http.Client, target, body string) (at time.Time, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target+"/api/chat", strings.NewReader(body))
	if err != nil {
		return at, err
	}
	res, err := client.Do(req)
	if err != nil {
		return at, err
	}
	defer res.Body.Close()
	if _, err := io.ReadFull(res.Body, make([]byte, 1)); err != nil {
		return at, err
	}
	at = time.Now()
	n, err := io.Copy(io.Discard, res.Body)
	if err == nil && n < 8<<10-1 {
		err = fmt.Errorf("status %d, %d bytes", res.StatusCode, n)
	}
	return at, err
}

// result is one round of one target: requests per second, and latencies in ms.
type result struct{ rate, p50, p99 float64 }

func median(rs []result, get func(result) float64) float64 {
	var v []float64
	for _, r := range rs {
		v = append(v, get(r))
	}
	return middle(v)
}

// middle returns the median; of an even number of values, the mean of the two in the middle.
func middle(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// measure loads the target for the time with closed-loop clients.
func measure(ctx context.Context, target string, l load, clients int, d time.Duration) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, d+30*time.Second)
	defer cancel()
	transport := &http.Transport{MaxIdleConnsPerHost: clients, DisableCompression: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	var wg sync.WaitGroup
	times := make([][]float64, clients)
	errs := make([]error, clients)
	begin := time.Now()
	for i := range clients {
		wg.Go(func() {
			for errs[i] == nil && time.Since(begin) < d {
				start := time.Now()
				_, errs[i] = one(ctx, client, target, l)
				times[i] = append(times[i], time.Since(start).Seconds()*1e3)
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(begin).Seconds()
	all := slices.Concat(times...)
	slices.Sort(all)
	at := func(q float64) float64 { return all[int(math.Ceil(q*float64(len(all))))-1] }
	return result{float64(len(all)) / elapsed, at(.5), at(.99)}, errors.Join(errs...)
}

// keep asks until the answer is kept.
func keep(ctx context.Context, target string, l load) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		header, err := one(ctx, http.DefaultClient, target, l)
		if err != nil {
			return fmt.Errorf("%s: it is not kept: %w", l.name, err)
		}
		if strings.Contains(header.Get("Cache-Status"), "hit") {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// one sends the load's request and reads the answer.
func one(ctx context.Context, client *http.Client, target string, l load) (http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target+"/api/chat", bytes.NewReader(l.body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	if err != nil {
		return nil, err
	}
	want := 0
	for _, part := range l.chunks() {
		want += len(part)
	}
	if res.StatusCode != http.StatusOK || n != int64(want) {
		return nil, fmt.Errorf("status %d, %d bytes; want 200 and %d", res.StatusCode, n, want)
	}
	return res.Header, nil
}

const (
	hitModel    = "hits"
	listedModel = "listed" // only a model that the upstream has is passed on
	chunk       = `{"model":"bench","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"token"},"done":false}` + "\n"
	// lastChunk ends an answer that may be kept.
	lastChunk = `{"model":"bench","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}` + "\n"
	hitChunks = 64
)

var (
	hitStream = append(slices.Repeat([]string{chunk + strings.Repeat(" ", 12)}, hitChunks-1), lastChunk)
	hitWhole  = []string{strings.Replace(lastChunk, `""`, `"`+strings.Repeat("token ", 8<<10/6)+`"`, 1)}
	stream20  = slices.Repeat([]string{chunk}, 20)
)

// chunks are the parts of the answer.
func (l load) chunks() []string {
	switch {
	case l.hit && l.stream:
		return hitStream
	case l.hit:
		return hitWhole
	case l.stream:
		return stream20
	}
	return stream20[:1]
}

// serve is the main function of a child process: the upstream, or the bare proxy.
func serve(ctx context.Context, role string) error {
	var h http.Handler = http.HandlerFunc(upstream)
	if target, ok := strings.CutPrefix(role, "bare="); ok {
		u, err := url.Parse(target)
		if err != nil {
			return err
		}
		bare := &httputil.ReverseProxy{
			Rewrite: func(pr *httputil.ProxyRequest) { pr.SetURL(u) },
			// The same as the proxy's, so that only the proxy's own work differs.
			Transport:     proxy.NewTransport(),
			FlushInterval: -1,
		}
		h = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// Without this the server closes the request's body at the first byte of an answer. The
			// transport looks once more for the body's end, and then breaks off answers that arrive
			// quickly.
			if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
				panic(err)
			}
			bare.ServeHTTP(w, r)
		})
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "listen http://%s\n", ln.Addr())
	srv := &http.Server{Handler: h}
	context.AfterFunc(ctx, func() { srv.Close() })
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func upstream(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/api/chat" {
		io.WriteString(w, `{"version":"0.0.0","models":[{"name":"`+hitModel+`:latest","digest":"0123"},{"name":"`+listedModel+`:latest","digest":"4567"}]}`)
		return
	}
	head, err := bufio.NewReader(r.Body).Peek(60)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	l := load{stream: bytes.Contains(head, []byte(`"stream":true`)), hit: bytes.Contains(head, []byte(hitModel))}
	w.Header().Set("Content-Type", "application/x-ndjson")
	if bytes.Contains(head, []byte(`"together"`)) {
		time.Sleep(300 * time.Millisecond) // until all have asked
	}
	for _, part := range l.chunks() {
		io.WriteString(w, part)
		if l.stream {
			w.(http.Flusher).Flush()
		}
	}
}

// process is one of the three.
type process struct {
	url string
	cmd *exec.Cmd
}

var listens = regexp.MustCompile(`"?listen"?[ :"]+(http://[0-9.:]+)`)

// start runs a program and waits for the line on its standard error that says where it listens.
func start(ctx context.Context, name string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, name, args...)}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewReader(stderr)
	for {
		line, err := lines.ReadString('\n')
		if m := listens.FindStringSubmatch(line); m != nil {
			p.url = m[1]
			go io.Copy(io.Discard, lines) // ends with the process
			return p, nil
		}
		if err != nil {
			p.stop()
			return nil, fmt.Errorf("%s ended before it listened: %s", name, line)
		}
	}
}

func (p *process) stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.cmd.Wait() // its status does not matter, since it was told to end
}
