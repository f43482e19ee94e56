package bench

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestQuantile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	if q := quantiles(hundred); q != (Quantiles{1, 50, 90, 99, 100}) {
		t.Errorf("of 1 to 100: %+v", q)
	}
	if q := quantiles(nil); q != (Quantiles{}) {
		t.Errorf("of nothing: %+v", q)
	}
	for want, all := range map[float64][]float64{0: nil, 3: {3}, 2.5: {4, 1, 2, 3}, 2: {3, 1, 2}} {
		if got := median(all); got != want {
			t.Errorf("median of %v: %v", all, got)
		}
	}
	for f, want := range map[float64]string{0: "0", 999: "999", 1000: "1,000", 205000: "205,000", 1234567.5: "1,234,567.5"} {
		if got := number(f); got != want {
			t.Errorf("number(%v) = %s, want %s", f, got, want)
		}
	}
}

// TestPredictions: there are predictions only if they are asked for, for the usual sizes and for
// others.
func TestPredictions(t *testing.T) {
	r := &Report{Workload: "same", Requests: 100, PrefixTokens: 2000, TailTokens: 50, OutputTokens: 50}
	if p := r.predict(Full); p != nil {
		t.Errorf("not asked for: %+v", *p)
	}
	r.Predictions = true
	for mode, want := range map[Mode]Prediction{Direct: {30, 205_000, 0}, KeepAlive: {20, 205_000, 0}, Full: {12, 7_000, 0.99}} {
		if p := r.predict(mode); *p != want {
			t.Errorf("%s: %+v, want %+v", mode, *p, want)
		}
	}
	r.Requests = 10
	if p := *r.predict(Full); p != (Prediction{0, 2500, 0.9}) {
		t.Errorf("10 requests: %+v", p)
	}
	r.Workload = "models"
	if p := r.predict(Full); p != nil {
		t.Errorf("another workload: %+v", *p)
	}
}

// TestWorkloads: each workload has the configured requests, and no two equal prompts. The same seed
// gives the same texts, another seed other texts of the same shape, and contexts are just long
// enough.
func TestWorkloads(t *testing.T) {
	for _, name := range Workloads() {
		c := &Config{Workload: name, Models: []string{"a", "b"}[:1], Requests: 90, PrefixTokens: 6000, TailTokens: 50, OutputTokens: 50, Clients: clients(name)}
		if name == "models" {
			c.Models = []string{"a", "b"}
		}
		scales := []scale{{1.5, 12}, {2, 8}}
		w, again, other := c.workload(1, scales), c.workload(1, scales), c.workload(2, scales)
		prompts, prefixes := map[string]int{}, map[string]int{}
		for i, queue := range w.queues {
			for k, q := range queue {
				prompts[q.system+q.user]++
				prefix := q.system
				if prefix == "" {
					prefix = q.user[:1000]
				}
				prefixes[prefix]++
				if q != again.queues[i][k] {
					t.Fatalf("%s: the same seed makes another request", name)
				}
				o := other.queues[i][k]
				if o.system+o.user == q.system+q.user || o.model != q.model || o.numCtx != q.numCtx || len(strings.Fields(o.system+o.user)) != len(strings.Fields(q.system+q.user)) {
					t.Fatalf("%s: another seed makes one of another shape, or the same", name)
				}
				if need := 6000 + 50 + 50; q.numCtx < need || name == "chat-turns" && q.numCtx < need+9*100 {
					t.Errorf("%s: num_ctx %d", name, q.numCtx)
				}
			}
		}
		if len(prompts) != c.Requests || slices.Max(slices.Collect(maps.Values(prompts))) != 1 {
			t.Errorf("%s: %d prompts, not %d different ones", name, len(prompts), c.Requests)
		}
		if want := map[string]int{"interleaved": manyPrefixes, "closed-loops": 4, "models": 2}[name]; len(prefixes) != max(want, 1) {
			t.Errorf("%s: %d prefixes", name, len(prefixes))
		}
	}
}

// TestHTMLEscapes: no name ends the script that contains it.
func TestHTMLEscapes(t *testing.T) {
	const bad = `x</script><script>alert(1)</script><!--`
	r := newReport(&Config{Upstream: &url.URL{Scheme: "http", Host: "h"}, Models: []string{bad}, Workload: "same", Modes: Modes(), Requests: 1, Rounds: 1}, bad, time.Time{})
	r.Modes = []*ModeResult{{Mode: Direct, Runs: []*ModeRun{{Requests: []Request{{Model: bad, Passed: 1, Whole: 5, Answer: 4}}}}}}
	r.sum()
	var page bytes.Buffer
	if err := r.HTML(&page); err != nil {
		t.Fatal(err)
	}
	text := page.String()
	if strings.Contains(text, bad) || strings.Contains(text, "<script>alert") {
		t.Error("the name stands in the page as it is")
	}
	_, data, _ := strings.Cut(text, `id="data">`)
	data, _, _ = strings.Cut(data, "</script>")
	var c charts
	if err := json.Unmarshal([]byte(data), &c); err != nil {
		t.Fatalf("the data are not JSON: %v", err)
	}
	if b := c.Timelines[0].Bars[0]; !strings.Contains(b.Text, bad) {
		t.Errorf("the data have lost the name: %q", b.Text)
	}
	for _, away := range []string{"http://www", "https://cdn", "src=", "sourceMappingURL"} {
		if strings.Contains(text, away) {
			t.Errorf("the page refers to something else: %s", away)
		}
	}
}

// TestChartsHaveNoNull: without results, and if all requests failed, the page's script gets empty
// lists.
func TestChartsHaveNoNull(t *testing.T) {
	r := &Report{}
	for range 2 {
		data, err := json.Marshal(r.charts())
		if err != nil || bytes.Contains(data, []byte("null")) {
			t.Errorf("%d modes: %s, %v", len(r.Modes), data, err)
		}
		r.Modes = []*ModeResult{{Mode: Direct, Predicted: &Prediction{}, Runs: []*ModeRun{{Requests: []Request{{Error: "no"}}}}}}
	}
}

// TestTitle: the title has the settings that are not defaults, and the JSON has all of them.
func TestTitle(t *testing.T) {
	c := &Config{Upstream: nowhere, Workload: "same", Requests: 10, Clients: 1, Rounds: 1, GiveUp: DefaultGiveUp, Seed: DefaultSeed, Slots: DefaultSlots}
	if title := newReport(c, "", time.Time{}).title(); !strings.HasSuffix(title, "1 client, 1 round") {
		t.Error(title)
	}
	c.Pause, c.GiveUp, c.Seed, c.Slots = 1500*time.Millisecond, time.Hour, 7, "off"
	r := newReport(c, "", time.Time{})
	if title := r.title(); !strings.HasSuffix(title, "1 round, --pause 1.5s, --give-up 1h0m0s, --slots off, --seed 7") {
		t.Error(title)
	}
	data, err := json.Marshal(r)
	if err != nil || !bytes.Contains(data, []byte(`"pause_ms":1500,"give_up_ms":3600000,"seed":7,"slots":"off","modes":[]`)) {
		t.Errorf("%s, %v", data, err)
	}
}

// TestWords: texts claim no more than was measured. For a model with a sliding window the size is
// an upper limit; different numbers of loads are not called equal; predictions for other sizes are
// calculated.
func TestWords(t *testing.T) {
	for _, c := range []struct {
		window, requests int
		loads            float64
		want, not        string
	}{
		{0, 100, 1, "a takes 100 bytes", "at most"},
		{512, 100, 1, "a takes at most 100 bytes", "takes 100 bytes"},
		{512, 100, 1, "tokens at most 0.2 MiB; some layers", "; less"},
		{0, 100, 1, "is not unloaded: 1 loads without and 1 with", "of which"},
		{0, 100, 9, "of which there were 9 without and 1 with", "not unloaded"},
		{0, 100, 1, "    predicted  ", "reckoned as"},
		{0, 99, 1, "    reckoned as predicted  ", "    predicted  "},
	} {
		r := &Report{Workload: "same", Predictions: true, Requests: c.requests, PrefixTokens: 2000, TailTokens: 50, Memory: []Memory{{Model: "a", BytesPerToken: 100, Window: c.window}}}
		for mode, loads := range map[Mode]float64{Direct: c.loads, KeepAlive: 1} {
			run := &ModeRun{Prompt: 10, Loads: int(loads), Requests: []Request{{Total: 10}}}
			r.Modes = append(r.Modes, &ModeResult{Mode: mode, Predicted: r.predict(mode), Runs: []*ModeRun{run}})
		}
		r.sum()
		var table strings.Builder
		if err := r.Print(&table); err != nil {
			t.Fatal(err)
		}
		if text := table.String(); !strings.Contains(text, c.want) || strings.Contains(text, c.not) {
			t.Errorf("want %q and not %q:\n%s", c.want, c.not, text)
		}
	}
}

// TestTimeline: concurrent requests are on separate rows, and phases follow each other.
func TestTimeline(t *testing.T) {
	run := &ModeRun{Requests: []Request{
		{Sent: 0, Passed: 1, Whole: 11, Load: 2, Prompt: 3, Answer: 4},
		{Sent: 0, Passed: 2, Whole: 20},
		{Sent: 0, Passed: 12, Whole: 15, waited: 12},
		{Sent: 3, Whole: 1, Error: "no"},
	}}
	got := run.timeline()
	if got.Rows != 2 || got.Shown != 3 || got.Of != 3 || got.Bars[0].Row != 0 || got.Bars[1].Row != 1 || got.Bars[2].Row != 0 {
		t.Errorf("%+v", got)
	}
	if want := [timelinePhases]float64{0.001, 0.003, 0.003, 0.006, 0.01}; got.Bars[0].Ends != want {
		t.Errorf("phases %v, want %v", got.Bars[0].Ends, want)
	}
}

// transport answers in memory, so that times can be simulated.
type transport func(*http.Request) (*http.Response, error)

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }

func inMemory(c Config, answer func(*http.Request) (status int, body string)) *bench {
	c.Log = slog.New(slog.DiscardHandler)
	return &bench{Config: &c, client: &http.Client{Transport: transport(func(r *http.Request) (*http.Response, error) {
		status, body := answer(r)
		if status == 0 { // none
			<-r.Context().Done()
			return nil, r.Context().Err()
		}
		return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
	})}}
}

var nowhere = &url.URL{Scheme: "http", Host: "nowhere"}

// TestPauseIsNoStandstill: clients may wait longer between requests than an answer may take, and a
// standstill is noticed nevertheless.
func TestPauseIsNoStandstill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		b := inMemory(Config{Workload: "same", Models: []string{"a"}, Requests: 5, PrefixTokens: 10, TailTokens: 5, OutputTokens: 1, Clients: 1, Pause: 3 * time.Hour, GiveUp: time.Hour},
			func(*http.Request) (int, string) {
				if asked++; asked == 4 {
					return 0, ""
				}
				return http.StatusOK, `{"done":true}`
			})
		p := &play{bench: b, mode: Direct, base: nowhere}
		if err := p.play(t.Context(), b.workload(1, []scale{{1, 0}})); err != nil {
			t.Fatal(err)
		}
		if len(p.done) != 4 || p.done[2].err != nil || p.done[3].err == nil || p.wall != 3*b.Pause+b.GiveUp {
			t.Errorf("%d requests are over after %v, the last one with %v", len(p.done), p.wall, p.done[len(p.done)-1].err)
		}
	})
}

// TestBeginningsEnd: the wait for a server or a proxy that never answers ends.
func TestBeginningsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Config{Upstream: nowhere, Models: []string{"a"}, GiveUp: time.Hour}
		b := inMemory(c, func(*http.Request) (int, string) { return 0, "" })
		if _, err := b.calibrate(t.Context()); err == nil || !strings.Contains(err.Error(), "nothing was answered for 1h0m0s (--give-up)") {
			t.Errorf("the server: %v", err)
		}
		if err := b.ready(t.Context(), nowhere); err == nil || !strings.Contains(err.Error(), "not ready within 1h0m0s (--give-up)") {
			t.Errorf("a silent proxy: %v", err)
		}
		b = inMemory(c, func(*http.Request) (int, string) { return http.StatusServiceUnavailable, "" })
		if err := b.ready(t.Context(), nowhere); err == nil || !strings.Contains(err.Error(), "not ready within 1h0m0s (--give-up)") {
			t.Errorf("a proxy that is not ready: %v", err)
		}
	})
}
