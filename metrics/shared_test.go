package metrics

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/shared"
)

func TestShared(t *testing.T) {
	m := New("test", func() int64 { return 0 })
	stats := SharedStats{
		Errors: 1, Seen: contextstore.SharedStats{Sent: 2, Received: 3, Dropped: 4, Foreign: 5, Waiting: 6},
		Limits: shared.LimitStats{Asked: 20, Unanswered: 7},
	}
	m.Shared(func() SharedStats { return stats })
	text := scrape(t, m)
	for _, want := range []string{
		`shared_up 1`, `shared_errors_total 1`, `shared_events_total{outcome="sent"} 2`,
		`shared_events_total{outcome="received"} 3`, `shared_events_total{outcome="dropped"} 4`,
		`shared_events_total{outcome="foreign"} 5`, `shared_events_waiting 6`,
		`shared_limits_total{decided="together"} 13`, `shared_limits_total{decided="alone"} 7`,
	} {
		if !strings.Contains(text, "\nollama_cacheproxy_"+want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	if problems, err := testutil.GatherAndLint(m.registry); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	stats.Down = true
	if text := scrape(t, m); !strings.Contains(text, "\nollama_cacheproxy_shared_up 0\n") {
		t.Error("an outage is not shown")
	}
}
