package metrics

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// TestAnswers: what was not computed is counted by kind, apart from the tokens of prompts.
func TestAnswers(t *testing.T) {
	m := New("v", func() int64 { return 0 })
	stats := answers.Stats{Entries: 3, Bytes: 400, Evicted: 5, Expired: 6, Errors: 7}
	m.Answers(func() answers.Stats { return stats }, func() (int, int64) { return 2, 99 })
	m.Limits(Limits{AnswerBytes: 1000})
	text := scrape(t, m)
	for _, want := range []string{ // an alert sees the first event
		`answers_requests_total{kind="answer",result="hit"} 0`,
		`answers_requests_total{kind="embedding",result="partial"} 0`,
		`answers_parts_total{kind="embedding",result="joined"} 0`,
		`answers_spared_seconds_total{kind="answer"} 0`,
	} {
		if !strings.Contains(text, "\nollama_cacheproxy_"+want+"\n") {
			t.Errorf("no %s at the start", want)
		}
	}
	done := func(c proxy.CacheUse) {
		m.Done(proxy.Exchange{Endpoint: "/api/chat", Model: "m", Outcome: proxy.OK, Status: 200, Cache: &c})
	}
	done(proxy.CacheUse{
		Kind: proxy.CacheText, Result: proxy.CacheHit, Hits: 1, Bytes: 10, Prompt: 20, Generated: 30, Saved: 4 * time.Second,
	})
	done(proxy.CacheUse{Kind: proxy.CacheText, Result: proxy.CacheMiss, Misses: 1})
	done(proxy.CacheUse{Kind: proxy.CacheText, Result: proxy.CacheJoined, Joined: 1})
	done(proxy.CacheUse{Kind: proxy.CacheText, Result: proxy.CacheBypass})
	done(proxy.CacheUse{
		Kind: proxy.CacheVectors, Result: proxy.CachePartial, Hits: 990, Misses: 9, Joined: 1,
		Bytes: 5000, Prompt: 700, Saved: 500 * time.Millisecond,
	})
	text = scrape(t, m)
	for _, want := range []string{
		`answers_requests_total{kind="answer",result="hit"} 1`,
		`answers_requests_total{kind="answer",result="miss"} 1`,
		`answers_requests_total{kind="answer",result="joined"} 1`,
		`answers_requests_total{kind="answer",result="bypass"} 1`,
		`answers_requests_total{kind="embedding",result="partial"} 1`,
		`answers_parts_total{kind="answer",result="hit"} 1`,
		`answers_parts_total{kind="embedding",result="hit"} 990`,
		`answers_parts_total{kind="embedding",result="miss"} 9`,
		`answers_parts_total{kind="embedding",result="joined"} 1`,
		`answers_spared_bytes_total{kind="answer"} 10`,
		`answers_spared_prompt_tokens_total{kind="answer"} 20`,
		`answers_spared_prompt_tokens_total{kind="embedding"} 700`,
		`answers_spared_generated_tokens_total{kind="answer"} 30`,
		`answers_spared_seconds_total{kind="answer"} 4`,
		`answers_spared_seconds_total{kind="embedding"} 0.5`,
		`answers_up 1`, `answers_entries 3`, `answers_bytes 400`, `answers_limit_bytes 1000`,
		`answers_evictions_total 5`, `answers_expirations_total 6`, `answers_errors_total 7`,
		`answers_surviving 2`, `answers_surviving_bytes 99`,
		`requests_total{endpoint="/api/chat",model="m:latest",outcome="ok"} 5`,
	} {
		if !strings.Contains(text, "\nollama_cacheproxy_"+want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	if strings.Contains(text, "_cacheproxy_prompt_tokens_total{") || strings.Contains(text, "_cacheproxy_generated_tokens_total{") {
		t.Error("tokens that were not computed are counted as computed")
	}
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}

	stats = answers.Stats{Entries: -1, Bytes: -1, Down: true}
	text = scrape(t, m)
	if strings.Contains(text, "\nollama_cacheproxy_answers_entries") || strings.Contains(text, "\nollama_cacheproxy_answers_bytes") ||
		!strings.Contains(text, "\nollama_cacheproxy_answers_up 0\n") {
		t.Error("what the store does not know is shown, or that it is away is not")
	}
}
