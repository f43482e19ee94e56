package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/shared"
)

// SharedStats is what a proxy and its Valkey server have exchanged.
type SharedStats struct {
	Down   bool   // the server cannot be used
	Errors uint64 // calls that failed
	Seen   contextstore.SharedStats
	Limits shared.LimitStats
}

// Shared adds the series of what proxies share through a Valkey server. It calls stats at each scrape.
func (m *Metrics) Shared(stats func() SharedStats) { m.registry.MustRegister(sharing{stats}) }

// sharing collects SharedStats.
type sharing struct{ stats func() SharedStats }

var (
	sharedUp      = prometheus.NewDesc(namespace+"_shared_up", "1 if the server of --shared can be used; 0 while it cannot, when this proxy goes on with what it knows itself.", nil, nil)
	sharedErrors  = prometheus.NewDesc(namespace+"_shared_errors_total", "Calls of the server of --shared that failed.", nil, nil)
	sharedEvents  = prometheus.NewDesc(namespace+"_shared_events_total", "Events of prefixes, by outcome: sent to other proxies, received from them, dropped (the server was gone for too long, or refused them), foreign (what was in the server is no event).", []string{"outcome"}, nil)
	sharedWaiting = prometheus.NewDesc(namespace+"_shared_events_waiting", "Events of prefixes that are not yet sent to other proxies.", nil, nil)
	sharedLimits  = prometheus.NewDesc(namespace+"_shared_limits_total", "Requests of API keys with a limit of their rate or their waiting requests, by who decided: together (over all proxies), or alone (this proxy, since the server did not answer in time).", []string{"decided"}, nil)
)

func (s sharing) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sharedUp, sharedErrors, sharedEvents, sharedWaiting, sharedLimits} {
		ch <- d
	}
}

func (s sharing) Collect(ch chan<- prometheus.Metric) {
	value := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	stats, up := s.stats(), 1.0
	if stats.Down {
		up = 0
	}
	value(sharedUp, prometheus.GaugeValue, up)
	value(sharedErrors, prometheus.CounterValue, float64(stats.Errors))
	for outcome, n := range map[string]uint64{
		"sent": stats.Seen.Sent, "received": stats.Seen.Received, "dropped": stats.Seen.Dropped,
		"foreign": stats.Seen.Foreign,
	} {
		value(sharedEvents, prometheus.CounterValue, float64(n), outcome)
	}
	value(sharedWaiting, prometheus.GaugeValue, float64(stats.Seen.Waiting))
	value(sharedLimits, prometheus.CounterValue, float64(stats.Limits.Asked-stats.Limits.Unanswered), "together")
	value(sharedLimits, prometheus.CounterValue, float64(stats.Limits.Unanswered), "alone")
}
