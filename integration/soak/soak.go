// Package soak runs the proxy for a long time between mixed clients and real servers that are
// killed and revived, and checks its invariants: no incomplete answer looks complete, no request is
// lost without an error, and memory does not grow.
package soak

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const (
	model = "gen-llama-tiny"
	// lost is the time without an end after which a request counts as lost: longer than
	// --try-duration, and than any queue here.
	lost = 3 * time.Minute
	// judged is the minimum duration of a run for judging its memory: before that, caches still
	// fill.
	judged = 4 * time.Minute
	// faultsPerRestart is how many requests may be lost, or interrupted, when a server dies.
	faultsPerRestart = 4
	// flat is the limit of the memory in the last quarter of a run, as a multiple of the second
	// quarter's.
	flat = 1.2
)

// Config says what to run.
type Config struct {
	Proxy  string        // the program
	For    time.Duration // how long clients run; ending takes a little longer
	Every  time.Duration // how often a server is killed, or stopped
	Report func(format string, args ...any)
}

// Run runs the soak, and returns the invariants that did not hold.
func Run(ctx context.Context, c Config) (err error) {
	s := &soak{Config: c, outcomes: map[string]int{}, bad: map[string]int{}}
	config := realollama.Config{Version: realollama.Newest(), Models: []string{model}}
	var flags []string
	for i := range 2 {
		server, err := realollama.Run(ctx, config, nil)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, server.Stop()) }()
		s.servers = append(s.servers, server)
		flags = append(flags, "--upstream", fmt.Sprintf("s%d=%s", i+1, server.URL()))
	}
	s.proxy, err = proxyprocess.Start(ctx, c.Proxy, flags[1], append(flags[2:], "--slots", "1", "--queue", "12", "--max-body", "1048576",
		"--store-entries", "20000")...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.proxy.Stop()) }()
	transport := &http.Transport{MaxIdleConnsPerHost: 100}
	defer transport.CloseIdleConnections()
	s.client = &http.Client{Transport: transport}
	idle, err := s.figures(ctx)
	if err != nil {
		return err
	}

	running, stop := context.WithTimeout(ctx, c.For)
	defer stop()
	var wg sync.WaitGroup
	for i, k := range kinds {
		for n := range k.clients {
			r := rand.New(rand.NewPCG(uint64(i), uint64(n)))
			wg.Go(func() { s.keepAsking(running, ctx, k, r) })
		}
	}
	wg.Go(func() { s.kill(running, ctx) })
	var resident []float64
	wg.Go(func() {
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		for began := time.Now(); ; {
			select {
			case <-running.Done():
				return
			case <-tick.C:
			}
			if f, err := s.figures(ctx); err != nil {
				s.count("metrics", err)
			} else if resident = append(resident, f.resident); len(resident)%15 == 0 {
				c.Report("%v: %.0f MB resident, %.0f goroutines; %s", time.Since(began).Round(time.Second), f.resident/1e6, f.goroutines, s.told())
			}
		}
	})
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	return errors.Join(s.verdict(resident), s.wellAgain(ctx), s.idleAgain(ctx, idle))
}

// keepAsking is a client that pauses between requests like a busy person, until running ends.
func (s *soak) keepAsking(running, ctx context.Context, k kind, r *rand.Rand) {
	for running.Err() == nil {
		outcome, bad := k.ask(s, ctx, r)
		s.count(k.name+": "+outcome, bad)
		select {
		case <-running.Done():
		case <-time.After(time.Duration(r.IntN(200)) * time.Millisecond):
		}
	}
}

// wellAgain lets each kind of client ask once more, now that all servers are alive.
func (s *soak) wellAgain(ctx context.Context) error {
	r := rand.New(rand.NewPCG(3, 4))
	for _, k := range kinds {
		outcome, bad := "", error(nil)
		for range 20 { // a poll may have to find a server first
			if outcome, bad = k.ask(s, ctx, r); outcome == k.well && bad == nil {
				break
			}
			time.Sleep(500 * time.Millisecond)
		}
		if outcome != k.well || bad != nil {
			return fmt.Errorf("with all servers alive, %s still ends with %q (%v)", k.name, outcome, bad)
		}
	}
	return nil
}

type soak struct {
	Config
	servers []*realollama.Server
	proxy   *proxyprocess.Process
	client  *http.Client

	mu       sync.Mutex
	outcomes map[string]int // guarded by mu
	bad      map[string]int // what must not happen; guarded by mu
}

func (s *soak) count(outcome string, bad error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if bad != nil {
		s.bad[outcome+": "+bad.Error()]++
	}
	s.outcomes[outcome]++
}

func (s *soak) told() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, name := range slices.Sorted(maps.Keys(s.outcomes)) {
		all = append(all, fmt.Sprintf("%s %d", name, s.outcomes[name]))
	}
	return strings.Join(all, ", ")
}

// verdict returns what did not hold while the clients ran.
func (s *soak) verdict(resident []float64) error {
	s.Report("in the end: %s", s.told())
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(s.bad)) {
		errs = append(errs, fmt.Errorf("%s (%d times)", name, s.bad[name]))
	}
	for _, k := range kinds {
		if s.outcomes[k.name+": "+k.well] == 0 {
			errs = append(errs, fmt.Errorf("%s: no request ended with %q", k.name, k.well))
		}
	}
	// Only what a server was doing when it died may be lost: one lane, requests that passed unread,
	// and requests on their way.
	faults := 0
	for name, n := range s.outcomes {
		kind, how, _ := strings.Cut(name, ": ")
		if kind != "list" && (how == "502" || how == "504" || how == "broken off") { // lists do not wait
			faults += n
		}
	}
	if most := faultsPerRestart * s.outcomes["server: restarted"]; faults > most {
		errs = append(errs, fmt.Errorf("%d requests were lost or broken off, in %d restarts", faults, s.outcomes["server: restarted"]))
	}
	quarter := len(resident) / 4
	if quarter == 0 {
		return errors.Join(errs...)
	}
	early, late := median(resident[quarter:2*quarter]), median(resident[3*quarter:])
	s.Report("resident memory: %.0f MB in the second quarter, %.0f MB in the last one (%.2f times)", early/1e6, late/1e6, late/early)
	if s.For >= judged && late > flat*early {
		errs = append(errs, fmt.Errorf("the proxy's memory has grown from %.0f to %.0f MB", early/1e6, late/1e6))
	}
	return errors.Join(errs...)
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// idleAgain waits until the proxy has as many goroutines as before the first request, except for
// those of kept connections to servers.
func (s *soak) idleAgain(ctx context.Context, idle figures) error {
	s.client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		now, err := s.figures(ctx)
		if err != nil {
			return fmt.Errorf("the proxy is not idle again, it has %.0f goroutines, %.0f before: %w", now.goroutines, idle.goroutines, err)
		}
		if now.inFlight <= 1 && now.goroutines <= idle.goroutines+20 { // two for each kept connection
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the proxy is not idle again: %.0f requests are in flight, it has %.0f goroutines, %.0f before", now.inFlight, now.goroutines, idle.goroutines)
		case <-time.After(time.Second):
		}
	}
}

// kill kills or stops a server now and then, sometimes both servers, and revives them after a
// while.
func (s *soak) kill(running, ctx context.Context) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := 0; ; n++ {
		select {
		case <-running.Done():
			return
		case <-time.After(s.Every):
		}
		dying := s.servers[n%2 : n%2+1]
		if n%4 == 3 {
			dying = s.servers
		}
		for _, server := range dying {
			if r.IntN(2) == 0 {
				server.Kill()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(r.IntN(3000)) * time.Millisecond):
		}
		for _, server := range dying {
			err := server.Restart(ctx)
			s.count("server: restarted", err)
		}
	}
}

// figures are the proxy's own metrics.
type figures struct{ resident, goroutines, inFlight float64 }

func (s *soak) figures(ctx context.Context) (f figures, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.proxy.URL+"/metrics", nil)
	if err != nil {
		return f, err
	}
	res, err := s.client.Do(r)
	if err != nil {
		return f, err
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		to := map[string]*float64{"process_resident_memory_bytes": &f.resident, "go_goroutines": &f.goroutines, "ollama_cacheproxy_in_flight": &f.inFlight}[name]
		if to == nil {
			continue
		}
		if _, err := fmt.Sscan(value, to); err != nil {
			return f, fmt.Errorf("/metrics: %s: %w", lines.Text(), err)
		}
	}
	if f.resident == 0 || f.goroutines == 0 || f.inFlight == 0 { // this request counts as in flight
		return f, errors.New("/metrics does not tell memory, goroutines and requests in flight")
	}
	return f, lines.Err()
}

var errLost = errors.New("no end and no error")

// kind is a kind of client.
type kind struct {
	name    string
	clients int
	well    string // the outcome that most of its requests have
	ask     func(s *soak, ctx context.Context, r *rand.Rand) (outcome string, bad error)
}

// kinds are the kinds of clients. All send short prompts, some of which share their beginning.
var kinds = []kind{
	{"script", 6, "whole", func(s *soak, ctx context.Context, r *rand.Rand) (string, error) {
		return s.ask(ctx, "/api/chat", map[string]any{"stream": false, "messages": messages(r, 3)}, "batch")
	}},
	{"chat", 3, "whole", func(s *soak, ctx context.Context, r *rand.Rand) (string, error) {
		return s.ask(ctx, "/api/chat", map[string]any{"messages": messages(r, 30)}, "interactive")
	}},
	{"completion", 2, "whole", func(s *soak, ctx context.Context, r *rand.Rand) (string, error) {
		return s.ask(ctx, "/api/generate", map[string]any{"prompt": messages(r, 5)[1]["content"], "stream": r.IntN(2) == 0}, "")
	}},
	{"openai", 3, "whole", func(s *soak, ctx context.Context, r *rand.Rand) (string, error) {
		return s.ask(ctx, "/v1/chat/completions", map[string]any{"stream": true, "max_tokens": 16, "messages": messages(r, 10)}, "")
	}},
	{"anthropic", 1, "whole", func(s *soak, ctx context.Context, r *rand.Rand) (string, error) {
		return s.ask(ctx, "/v1/messages", map[string]any{"stream": r.IntN(2) == 0, "max_tokens": 16, "messages": messages(r, 10)[1:]}, "")
	}},
	{"long body", 1, "whole", func(s *soak, ctx context.Context, r *rand.Rand) (string, error) {
		return s.ask(ctx, "/api/chat", map[string]any{"stream": false, "messages": messages(r, 3), "padding": strings.Repeat("x", 1<<19+r.IntN(1<<20))}, "")
	}},
	{"list", 1, "whole", func(s *soak, ctx context.Context, _ *rand.Rand) (string, error) {
		return s.ask(ctx, "/api/tags", nil, "")
	}},
	{"leaver", 2, "left", func(s *soak, ctx context.Context, r *rand.Rand) (string, error) {
		ctx, leave := context.WithTimeout(ctx, time.Duration(r.IntN(500))*time.Millisecond)
		defer leave()
		if _, err := s.ask(ctx, "/api/chat", map[string]any{"messages": messages(r, 30)}, ""); err != nil && ctx.Err() == nil {
			return "left", err
		}
		return "left", nil
	}},
	{"announcer", 2, "left", (*soak).announce},
}

func messages(r *rand.Rand, last int) []map[string]string {
	rubric := r.IntN(5)
	return []map[string]string{
		{"role": "system", "content": strings.Repeat(fmt.Sprintf("Rule %d of rubric %d says what counts. ", 7*rubric, rubric), 30)},
		{"role": "user", "content": strings.Repeat(fmt.Sprintf("Candidate %d. ", r.IntN(100000)), last)},
	}
}

// ask sends a request and returns how it ended: whole, broken off, or with a status. bad is an
// outcome that must not happen.
func (s *soak) ask(ctx context.Context, path string, body map[string]any, priority string) (outcome string, bad error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lost, errLost)
	defer cancel()
	method, text := http.MethodGet, []byte(nil)
	if body != nil {
		method, body["model"] = http.MethodPost, model
		if !strings.HasPrefix(path, "/v1/") {
			body["options"] = map[string]any{"num_predict": 16}
		}
		var err error
		if text, err = json.Marshal(body); err != nil {
			return "marshal", err
		}
	}
	r, err := http.NewRequestWithContext(ctx, method, s.proxy.URL+path, bytes.NewReader(text))
	if err != nil {
		return "request", err
	}
	r.Header.Set("Content-Type", "application/json")
	if priority != "" {
		r.Header.Set("X-Cacheproxy-Priority", priority)
	}
	res, err := s.client.Do(r)
	if err != nil {
		return brokeOff(ctx)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return brokeOff(ctx)
	case res.StatusCode >= 500:
		if !json.Valid(answer) {
			return "error", fmt.Errorf("%d %.200q", res.StatusCode, answer)
		}
		return fmt.Sprint(res.StatusCode), nil
	case res.StatusCode != http.StatusOK:
		return fmt.Sprint(res.StatusCode), fmt.Errorf("%.200q", answer)
	}
	return "whole", isWhole(path, res.Header.Get("Content-Type"), answer)
}

// brokeOff returns the outcome of a request that ended with an error, which is acceptable unless it
// took too long.
func brokeOff(ctx context.Context) (string, error) {
	if cause := context.Cause(ctx); cause == errLost {
		return "lost", cause
	}
	return "broken off", nil
}

// isWhole returns an error if an answer that ended normally is incomplete.
func isWhole(path, contentType string, answer []byte) error {
	end := answer[bytes.LastIndexByte(bytes.TrimRight(answer, "\n"), '\n')+1:]
	var last struct {
		Done    bool
		Error   any
		Models  []any
		Choices []any
		Type    string
	}
	switch {
	case strings.HasPrefix(contentType, "text/event-stream") && path == "/v1/messages":
		if !bytes.Contains(end, []byte(`"message_stop"`)) && !bytes.Contains(end, []byte(`"type":"error"`)) {
			return fmt.Errorf("it ends with %.200q", end)
		}
		return nil
	case strings.HasPrefix(contentType, "text/event-stream"):
		if !bytes.Equal(bytes.TrimSpace(end), []byte("data: [DONE]")) && !bytes.Contains(end, []byte(`"error"`)) {
			return fmt.Errorf("it ends with %.200q", end)
		}
		return nil
	}
	if err := json.Unmarshal(end, &last); err != nil {
		return fmt.Errorf("it ends with %.200q: %w", end, err)
	}
	if !last.Done && last.Error == nil && last.Models == nil && len(last.Choices) == 0 && last.Type != "message" {
		return fmt.Errorf("it ends with %.200q", end)
	}
	return nil
}

// announce announces a large body, sends little of it, and leaves.
func (s *soak) announce(ctx context.Context, r *rand.Rand) (string, error) {
	u, err := url.Parse(s.proxy.URL)
	if err != nil {
		return "url", err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return "dial", err
	}
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: 4194304\r\n\r\n{\"model\":%q,",
		[]string{"/api/chat", "/v1/chat/completions"}[r.IntN(2)], u.Host, model)
	if err != nil {
		return "write", err
	}
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(r.IntN(3000)) * time.Millisecond):
	}
	return "left", nil
}
