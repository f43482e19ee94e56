package metrics

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}

func TestSeries(t *testing.T) {
	m := New("v1.2.3", func() int64 { return 7 })
	m.Polled("main", upstream.State{Up: true, Version: "0.34.1", Models: []string{"llama3:latest", "Team/X:Q4"}, Loaded: []upstream.Loaded{{Name: "llama3:latest", Size: 1024}}, LoadedKnown: true})
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "LLAMA3", Outcome: proxy.OK, Status: 200, Duration: 3 * time.Second, FirstByte: time.Second, BytesIn: 10, BytesOut: 20, KeepAlive: "injected"})
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "team/x:q4", Outcome: proxy.UpstreamError, Status: 500, KeepAlive: "kept"})
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "nowhere", Outcome: proxy.ClientError, Status: 404})
	m.Done(proxy.Exchange{Endpoint: "/api/tags", Outcome: proxy.OK, Status: 200})
	m.Done(proxy.Exchange{Endpoint: "/api/generate", Outcome: proxy.OK, Unedited: proxy.UneditedNotJSON})
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "llama3", Outcome: proxy.OK, Savings: &savings.Entry{
		Basis: savings.Measured, Total: 100, Tokens: &savings.Tokens{Reused: 90, Evaluated: 10}, Verdict: savings.Hit, SavedEvaluation: 3 * time.Second, SavedLoading: time.Second}})
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "llama3", Outcome: proxy.OK, Savings: &savings.Entry{
		Basis: savings.Estimated, Total: 50, Tokens: &savings.Tokens{Reused: 5, Evaluated: 45}, Verdict: savings.Partial, Reason: savings.ReasonTaken, Loaded: true, Load: time.Second, Truncated: true}})
	m.Done(proxy.Exchange{Endpoint: "/v1/chat/completions", Model: "llama3", Outcome: proxy.OK, Savings: &savings.Entry{Basis: savings.Unknown, Verdict: savings.Uncertain, Loaded: true}})
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "llama3", Outcome: proxy.OK, Savings: &savings.Entry{Basis: savings.Unknown, Total: 7, Verdict: savings.Uncertain}})
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "llama3", Outcome: proxy.OK, Duration: time.Hour, Priority: "batch", Upstream: "main", Prewarm: proxy.PrewarmEvaluated})
	m.Held(func() int64 { return 600 })
	m.Store(func() contextstore.Stats { return contextstore.Stats{Entries: 3, Bytes: 400, Evictions: 5} })
	m.Touched("llama3", nil)
	m.Touched("llama3", errors.New("refused"))
	text := scrape(t, m)
	for _, want := range []string{
		`ollama_cacheproxy_build_info{goversion="go`,
		`ollama_cacheproxy_in_flight 7`,
		`ollama_cacheproxy_requests_total{endpoint="/api/chat",model="llama3:latest",outcome="ok"} 4`,
		`ollama_cacheproxy_requests_total{endpoint="/api/chat",model="Team/X:Q4",outcome="upstream_error"} 1`,
		`ollama_cacheproxy_requests_total{endpoint="/api/chat",model="other",outcome="client_error"} 1`,
		`ollama_cacheproxy_requests_total{endpoint="/api/tags",model="",outcome="ok"} 1`,
		`ollama_cacheproxy_request_duration_seconds_sum{endpoint="/api/chat"} 3`,
		`ollama_cacheproxy_first_byte_seconds_count{endpoint="/api/chat"} 1`,
		`ollama_cacheproxy_request_bytes_total{endpoint="/api/chat"} 10`,
		`ollama_cacheproxy_response_bytes_total{endpoint="/api/chat"} 20`,
		`ollama_cacheproxy_prompt_tokens_total{kind="reused",model="llama3:latest"} 90`,
		`ollama_cacheproxy_prompt_tokens_total{kind="evaluated",model="llama3:latest"} 10`,
		`ollama_cacheproxy_prompt_tokens_total{kind="unknown",model="llama3:latest"} 7`,
		`ollama_cacheproxy_estimated_prompt_tokens_total{kind="reused",model="llama3:latest"} 5`,
		`ollama_cacheproxy_estimated_prompt_tokens_total{kind="evaluated",model="llama3:latest"} 45`,
		`ollama_cacheproxy_prompts_total{model="llama3:latest",verdict="hit"} 1`,
		`ollama_cacheproxy_prompts_total{model="llama3:latest",verdict="unknown"} 2`,
		`ollama_cacheproxy_estimated_prompts_total{model="llama3:latest",verdict="partial"} 1`,
		`ollama_cacheproxy_estimated_cold_prompts_total{model="llama3:latest",reason="slot_taken"} 1`,
		`ollama_cacheproxy_model_loads_total{model="llama3:latest"} 1`,
		`ollama_cacheproxy_estimated_model_loads_total{model="llama3:latest"} 1`,
		`ollama_cacheproxy_estimated_truncated_prompts_total{model="llama3:latest"} 1`,
		`ollama_cacheproxy_estimated_saved_seconds_total{kind="evaluation",model="llama3:latest"} 3`,
		`ollama_cacheproxy_estimated_saved_seconds_total{kind="loading",model="llama3:latest"} 1`,
		`ollama_cacheproxy_prewarm_requests_total{result="evaluated"} 1`,
		`ollama_cacheproxy_held_bytes 600`,
		`ollama_cacheproxy_store_entries 3`,
		`ollama_cacheproxy_store_bytes 400`,
		`ollama_cacheproxy_store_evictions_total 5`,
		`ollama_cacheproxy_keep_alive_total{action="injected"} 1`,
		`ollama_cacheproxy_keep_alive_total{action="kept"} 1`,
		`ollama_cacheproxy_unedited_total{reason="not_json"} 1`,
		`ollama_cacheproxy_keep_alive_touches_total{model="llama3:latest",result="ok"} 1`,
		`ollama_cacheproxy_keep_alive_touches_total{model="llama3:latest",result="error"} 1`,
		`ollama_cacheproxy_upstream_up{upstream="main"} 1`,
		`ollama_cacheproxy_upstream_info{upstream="main",version="0.34.1"} 1`,
		`ollama_cacheproxy_upstream_loaded_bytes{model="llama3:latest",upstream="main"} 1024`,
		"\ngo_goroutines ",
		"\nprocess_start_time_seconds ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s", want)
		}
	}
	// The series of the previous version and of the unloaded model are gone.
	m.Polled("main", upstream.State{Up: true, Version: "0.35.0"})
	text = scrape(t, m)
	if strings.Contains(text, `version="0.34.1"`) || strings.Contains(text, "upstream_loaded_bytes{") || !strings.Contains(text, `version="0.35.0"`) {
		t.Error("the state of the poll before is still shown")
	}
	m.Polled("main", upstream.State{Err: errors.New("down")})
	if text = scrape(t, m); !strings.Contains(text, `ollama_cacheproxy_upstream_up{upstream="main"} 0`) || strings.Contains(text, "upstream_info{") {
		t.Error("an upstream that is down is shown as up")
	}
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}

// Names that no upstream has become no labels, however many clients try them; known names have a
// limit.
func TestModelLabelsAreBounded(t *testing.T) {
	m := New("v", func() int64 { return 0 })
	for i := range 5000 {
		m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: fmt.Sprintf("unknown%d", i), Outcome: proxy.ClientError})
	}
	for i := range maxModels + 500 {
		m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: fmt.Sprintf("known%d", i), Outcome: proxy.OK})
	}
	m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "a//b", Outcome: proxy.OK})
	text := scrape(t, m)
	if n := strings.Count(text, "\nollama_cacheproxy_requests_total{"); n != maxModels+2 {
		t.Errorf("%d series, want %d models and two for the others", n, maxModels)
	}
	if want := `model="other",outcome="client_error"} 5000`; !strings.Contains(text, want) {
		t.Errorf("no %s", want)
	}
}

// TestKeyNames: requests are counted by the name of their API key. Names that have left the file
// have no series, even if still in use.
func TestKeyNames(t *testing.T) {
	m := New("v", func() int64 { return 0 })
	done := func(name string, outcome proxy.Outcome, e *savings.Entry) {
		m.Done(proxy.Exchange{Endpoint: "/api/chat", Name: name, Outcome: outcome, Savings: e})
	}
	done("alice", proxy.OK, nil) // before the name is known
	m.KeyNames([]string{"alice", "bob"})
	done("alice", proxy.OK, &savings.Entry{Total: 100, Generated: 7, Verdict: savings.Uncertain})
	done("alice", proxy.OK, &savings.Entry{Total: 20, Verdict: savings.Uncertain})
	done("bob", proxy.Refused, nil)
	done("bob", proxy.Own, nil)
	done("", proxy.OK, nil)
	for i := range 1000 {
		done(fmt.Sprintf("made up %d", i), proxy.Refused, nil)
	}
	check := func(present []string, series int) {
		t.Helper()
		text := scrape(t, m)
		for _, want := range present {
			if !strings.Contains(text, "\nollama_cacheproxy_"+want+"\n") {
				t.Errorf("no %s", want)
			}
		}
		if n := strings.Count(text, "\nollama_cacheproxy_key_requests_total{") + strings.Count(text, "\nollama_cacheproxy_key_tokens_total{"); n != series {
			t.Errorf("%d series, want %d", n, series)
		}
	}
	check([]string{`key_requests_total{name="alice",outcome="ok"} 2`, `key_requests_total{name="bob",outcome="refused"} 1`,
		`key_tokens_total{kind="prompt",name="alice"} 120`, `key_tokens_total{kind="generated",name="alice"} 7`}, 4)
	m.KeyNames([]string{"alice", "carol"})
	done("bob", proxy.OK, nil) // a request that was under way
	done("carol", proxy.OK, nil)
	check([]string{`key_requests_total{name="alice",outcome="ok"} 2`, `key_requests_total{name="carol",outcome="ok"} 1`}, 4)
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}

// TestEstimates: the error of the estimates is exported once there were any.
func TestEstimates(t *testing.T) {
	m := New("v", func() int64 { return 0 })
	var st schedule.Stats
	m.Lanes(func(uint16) string { return "up" }, func() schedule.Stats { return st })
	if text := scrape(t, m); strings.Contains(text, "estimated_wait") {
		t.Error("estimates that were never made are shown")
	}
	e := &st.Estimates
	e.Count, e.Absolute, e.Late = 4, 10*time.Second, -6*time.Second
	for i := range e.Within {
		e.Within[i] = uint64(min(i, 4))
	}
	text := scrape(t, m)
	for _, want := range []string{
		`estimated_wait_error_seconds_sum 10`, `estimated_wait_error_seconds_count 4`,
		`estimated_wait_error_seconds_bucket{le="0.1"} 0`,
		`estimated_wait_error_seconds_bucket{le="300"} 4`,
		`estimated_wait_error_seconds_bucket{le="+Inf"} 4`, `estimated_wait_bias_seconds -1.5`,
	} {
		if !strings.Contains(text, "\nollama_cacheproxy_"+want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}
