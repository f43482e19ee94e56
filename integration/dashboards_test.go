package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/debian"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const (
	deployed      = "../deploy/prometheus/"
	dashboardFile = "../deploy/grafana/dashboards/ollama-cacheproxy.json"
)

// findPrometheus returns the paths of prometheus and promtool: those in PATH, or else Debian's,
// unpacked into the cache.
func findPrometheus(ctx context.Context) (server, tool string, err error) {
	server, err = exec.LookPath("prometheus")
	if err == nil {
		if tool, err = exec.LookPath("promtool"); err == nil {
			return server, tool, nil
		}
	}
	dir, err := debian.Unpack(ctx, "prometheus", "95 MB on disk", "usr/bin/promtool --version")
	if err != nil {
		return "", "", fmt.Errorf("prometheus and promtool are needed, in PATH; install them"+
			" (Debian: apt-get install prometheus): %w", err)
	}
	return filepath.Join(dir, "usr", "bin", "prometheus"), filepath.Join(dir, "usr", "bin", "promtool"), nil
}

// TestAlerts: promtool accepts the configuration, and each alert fires when it should, and only
// then.
func TestAlerts(t *testing.T) {
	_, promtool, err := findPrometheus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "config", deployed + "prometheus.yml"},
		{"test", "rules", deployed + "alerts_test.yml"},
	} {
		if out, err := command(t, promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	tests := readFile(t, deployed+"alerts_test.yml")
	alerts := regexp.MustCompile(`- alert: (\S+)`).FindAllStringSubmatch(readFile(t, deployed+"alerts.yml"), -1)
	for _, alert := range alerts {
		if !strings.Contains(tests, fmt.Sprintf(`alertname="%s"`, alert[1])) {
			t.Errorf("no test has %s fire", alert[1])
		}
	}
	if len(alerts) == 0 {
		t.Error("there are no alerts")
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// prometheus is a running Prometheus that scrapes a proxy every second.
type prometheus struct{ url string }

// startPrometheus runs Prometheus, with the configuration in deploy/, until the test ends.
func startPrometheus(t *testing.T, bin, proxyURL, key string) *prometheus {
	t.Helper()
	dir := t.TempDir()
	keyFile := filepath.Join(dir, "key")
	config := readFile(t, deployed+"prometheus.yml")
	for old, changed := range map[string]string{
		"scrape_interval: 15s":     "scrape_interval: 1s",
		"evaluation_interval: 15s": "evaluation_interval: 1s",
		"127.0.0.1:11435":          strings.TrimPrefix(proxyURL, "http://"),
		"# authorization:\n":       "authorization:\n",
		"#   credentials_file: /etc/prometheus/ollama-cacheproxy.key": "  credentials_file: " + keyFile,
	} {
		if strings.Count(config, old) != 1 {
			t.Fatalf("prometheus.yml does not have %q once", old)
		}
		config = strings.ReplaceAll(config, old, changed)
	}
	for path, text := range map[string]string{
		"prometheus.yml": config, "key": key, "alerts.yml": readFile(t, deployed+"alerts.yml"),
	} {
		if err := os.WriteFile(filepath.Join(dir, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	var log bytes.Buffer
	cmd := exec.Command(bin, "--config.file", filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", addr)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { // ends with Prometheus
		cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		end(t, cmd, exited)
		if t.Failed() {
			t.Logf("Prometheus' log:\n%s", tail(log.String(), 20))
		}
	})
	p := &prometheus{"http://" + addr}
	settles(t, func() error {
		select {
		case <-exited:
			t.Fatal("Prometheus has ended")
		default:
		}
		res, err := http.Get(p.url + "/-/ready")
		if err != nil {
			return err
		}
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("not ready: %d", res.StatusCode)
		}
		return nil
	})
	return p
}

// api sends a request to Prometheus and decodes the answer.
func (p *prometheus) api(t testing.TB, path string, into any) {
	t.Helper()
	status, _, text := get(t, p.url+"/api/v1/"+path)
	answer := struct{ Data any }{into}
	if err := json.Unmarshal([]byte(text), &answer); err != nil || status != http.StatusOK {
		t.Fatalf("%s: %d %s %v", path, status, text, err)
	}
}

// query returns the values of the series that a query finds, except NaN.
func (p *prometheus) query(t testing.TB, query string) (values []string) {
	t.Helper()
	var found struct{ Result []struct{ Value [2]any } }
	p.api(t, "query?query="+url.QueryEscape(query), &found)
	for _, r := range found.Result {
		if v := fmt.Sprint(r.Value[1]); v != "NaN" {
			values = append(values, v)
		}
	}
	return values
}

// scraped waits until Prometheus has scraped once more.
func (p *prometheus) scraped(t testing.TB) {
	t.Helper()
	const last = `timestamp(up{job="ollama-cacheproxy"})`
	before := p.query(t, last)
	eventually(t, "collected", func() bool {
		now := p.query(t, last)
		return len(now) == 1 && !slices.Equal(now, before)
	})
}

// dashboardSpan is the time that the queries look back. It is longer than the test takes on any
// machine: a quantile of what has not grown in it is NaN.
const dashboardSpan = "1h"

// panelQueries returns the dashboard's queries, with all of its variables set to All.
func panelQueries(t *testing.T) map[string][]string {
	t.Helper()
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(readFile(t, dashboardFile)), &d); err != nil {
		t.Fatal(err)
	}
	set := strings.NewReplacer("$job", ".*", "$instance", ".*", "$model", ".*", "$upstream", ".*",
		"$__rate_interval", dashboardSpan, "$__range", dashboardSpan)
	queries := map[string][]string{}
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			queries[p.Title] = append(queries[p.Title], set.Replace(target.Expr))
		}
	}
	return queries
}

// dashboardKey is the API key of the test's client; Prometheus has another one.
const dashboardKey = "key-of-alice"

// askWithKey sends a request with that key, unless a header overrides it, and returns its status.
func askWithKey(t testing.TB, url, body string, header ...string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Error(err)
		return 0
	}
	req.Header.Set("Authorization", "Bearer "+dashboardKey)
	for pair := range slices.Chunk(header, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		t.Error(err)
	}
	return res.StatusCode
}

// happens causes what the dashboard shows: on a real Ollama with stored contexts, on a simulated
// one that does not report reuse, and on one that is away.
func happens(t *testing.T, p *contextsPair, prom *prometheus, round int) {
	ask := func(path, body string, header ...string) {
		t.Helper()
		if status := askWithKey(t, p.URL()+path, body, header...); status != http.StatusOK {
			t.Errorf("%s %s: %d", path, body, status)
		}
	}
	body := func(model string, prefix, n int, more string) string {
		return fmt.Sprintf(`{"model":%q,"stream":false,"messages":[{"role":"system","content":%q},`+
			`{"role":"user","content":%q}]%s}`,
			model, words(uint64(prefix), 150), words(uint64(1000+100*round+n), 10), more)
	}
	const short = `,"options":{"num_predict":4}`

	// Loaded, reused, stored, and attached after an unload.
	ask("/v1/chat/completions", body(contextModel, 1, 0, `,"max_tokens":4`))
	ask("/api/chat", body(contextModel, 1, 1, short))
	p.saved(t, 1)
	p.unload(t)
	ask("/v1/chat/completions", body(contextModel, 1, 2, `,"max_tokens":4`))

	// Estimated; then a truncated prompt, and an inferred load.
	ask("/api/chat", body("old", 1, 0, short))
	ask("/api/chat", body("old", 1, 1, short))
	if round > 0 {
		ask("/api/generate", fmt.Sprintf(`{"model":"old","prompt":%q,"stream":false,"options":{"num_ctx":256,"num_predict":4}}`,
			words(5, 600)))
		ask("/v1/chat/completions", body("old", 1, 2, `,"max_tokens":4`))
	}

	// Kept, given again, and dropped for room.
	const cold = `,"options":{"temperature":0,"num_predict":4}`
	for n := range 20 {
		ask("/api/chat", body("old", 2, 50+n, cold))
	}
	eventually(t, "a kept answer", func() bool {
		ask("/api/chat", body("old", 2, 50, cold))
		return len(prom.query(t, "ollama_cacheproxy_answers_spared_seconds_total > 0")) > 0
	})

	// A request without end has the only slot while two wait.
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var all sync.WaitGroup
	all.Go(func() { // ends with ctx
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL()+"/api/generate", strings.NewReader(
			fmt.Sprintf(`{"model":%q,"prompt":"hi","raw":true,"options":{"num_predict":10000000}}`, contextModel)))
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("Authorization", "Bearer "+dashboardKey)
		if res, err := http.DefaultClient.Do(req); err == nil {
			io.Copy(io.Discard, res.Body) // until it is interrupted
			res.Body.Close()
		}
	})
	eventually(t, "busy", func() bool {
		return len(prom.query(t, `ollama_cacheproxy_lanes{state="busy",model=~"`+contextModel+`.*"} > 0`)) > 0
	})
	for n, priority := range []string{"batch", "interactive"} {
		all.Go(func() { // ends when the slot is free
			ask("/api/chat", body(contextModel, 1, 3+n, short), "X-Cacheproxy-Priority", priority)
		})
	}
	eventually(t, "waiting", func() bool {
		return slices.Equal(prom.query(t, "ollama_cacheproxy_waiting_requests"), []string{"2"})
	})
	leave()
	all.Wait()

	if status := askWithKey(t, p.URL()+"/api/chat", "no JSON"); status != http.StatusBadRequest {
		t.Errorf("no JSON: %d", status)
	}
	status := askWithKey(t, p.URL()+"/api/chat", body(contextModel, 1, 0, ""), "X-Cacheproxy-Upstream", "away")
	if status != http.StatusBadGateway {
		t.Errorf("to an upstream that is away: %d", status)
	}
	for range 25 {
		status := askWithKey(t, p.URL()+"/api/chat", "{}", "Authorization", "Bearer wrong")
		if status != http.StatusUnauthorized {
			t.Errorf("a wrong key: %d", status)
		}
	}
}

// onlyWhenItHappens are the dashboard's counters that may stay at 0 in this test, since they need a
// full disk, a broken engine, or several busy servers. Other tests cause that, and promtool's tests
// make the alerts on them fire.
var onlyWhenItHappens = []string{
	"contexts_dropped_total", "contexts_failed_total", "contexts_filled_total",
	"contexts_refused_total", "lane_holds_total", "retries_total",
}

// TestDashboards: a real Prometheus scrapes a proxy in use, in front of a real Ollama. Every query
// of the dashboard finds something, each counter on it has counted, and each alert has the series
// that it needs.
func TestDashboards(t *testing.T) {
	bin, promtool, err := findPrometheus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const key = "key-of-prometheus"
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keys, []byte("alice "+dashboardKey+"\nprometheus "+key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close() // so that nothing listens there
	p := startContexts(t, realollama.Config{Version: realollama.Newest(), Parallel: 1},
		"--api-keys-file", keys, "--try-duration", "0s", "--store-entries", "20",
		"--cache-answers", "old=deterministic", "--answers-bytes", "16384",
		"--upstream", "old=sim:?model=old&version=0.24.0", "--upstream", "away="+ln.Addr().String(),
		"--shared", "valkey://"+ln.Addr().String(),
		"--prewarm", prewarmFile(t, `{"model":"old","messages":[{"role":"user","content":"Hello?"}]}`))
	prom := startPrometheus(t, bin, p.Proxy.URL, key)
	for round := range 2 { // a rate needs a series that existed before
		happens(t, p, prom, round)
		prom.scraped(t)
	}

	queries := panelQueries(t)
	for title, list := range queries {
		for _, query := range list {
			if len(prom.query(t, query)) == 0 {
				t.Errorf("%q: nothing is found by %s", title, query)
			}
		}
	}
	counter := regexp.MustCompile(`ollama_cacheproxy_(\w+_total)`)
	for _, name := range counter.FindAllStringSubmatch(fmt.Sprint(queries), -1) {
		counted := len(prom.query(t, "max_over_time("+name[0]+"["+dashboardSpan+"]) > 0")) > 0
		if !counted && !slices.Contains(onlyWhenItHappens, name[1]) {
			t.Errorf("%s has counted nothing", name[0])
		}
	}
	prom.alerts(t)

	_, _, text := do(t, http.MethodGet, p.URL()+"/metrics", "", "Authorization", "Bearer "+key)
	check := command(t, promtool, "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if out, err := check.CombinedOutput(); err != nil || !strings.Contains(text, "ollama_cacheproxy_") {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// alerts checks that each alert is evaluated, that its series exist, and that the expected ones
// fire.
func (p *prometheus) alerts(t *testing.T) {
	t.Helper()
	type alert struct{ Name, Query, Health, LastError, State string }
	judge := func() (all map[string]alert) {
		var judged struct{ Groups []struct{ Rules []alert } }
		p.api(t, "rules?type=alert", &judged)
		all = map[string]alert{}
		for _, g := range judged.Groups {
			for _, a := range g.Rules {
				all[a.Name] = a
			}
		}
		return all
	}
	settles(t, func() error { // alerts are evaluated once a second
		all := judge()
		for name, want := range map[string]string{
			"CacheproxyUpstreamAway": "pending", "CacheproxySimulated": "pending",
			"CacheproxyWrongKeys": "firing", "CacheproxyPromptsCut": "firing",
			"CacheproxyDown": "inactive", "CacheproxyNoUpstream": "inactive", "CacheproxyQueueFills": "inactive",
		} {
			if state := all[name].State; state != want {
				return fmt.Errorf("alert %s is %q, want %q", name, state, want)
			}
		}
		return nil
	})
	series := regexp.MustCompile(`(ollama_cacheproxy|process)_\w+`)
	for _, a := range judge() {
		if a.Health != "ok" {
			t.Errorf("alert %s: %s %s", a.Name, a.Health, a.LastError)
		}
		for _, name := range series.FindAllString(a.Query, -1) {
			if len(p.query(t, "count("+name+")")) == 0 {
				t.Errorf("alert %s is about %s, which is not there", a.Name, name)
			}
		}
	}
}
