package metrics

import "github.com/prometheus/client_golang/prometheus"

// Draining adds the series of draining upstreams. It calls draining at each scrape.
func (m *Metrics) Draining(draining func() map[string]bool) {
	m.registry.MustRegister(drains{draining})
}

// drains collects which upstreams are draining.
type drains struct{ draining func() map[string]bool }

var upstreamDraining = prometheus.NewDesc(namespace+"_upstream_draining",
	"1 if the upstream drains: it finishes what it has, and gets nothing new.", []string{"upstream"}, nil)

func (d drains) Describe(ch chan<- *prometheus.Desc) { ch <- upstreamDraining }

func (d drains) Collect(ch chan<- prometheus.Metric) {
	for name, on := range d.draining() {
		value := 0.0
		if on {
			value = 1
		}
		ch <- prometheus.MustNewConstMetric(upstreamDraining, prometheus.GaugeValue, value, name)
	}
}

// Limits are the sizes of the bounded resources, from the settings. Dashboards and alerts divide by
// them.
type Limits struct {
	Held         int64 // bytes of buffered bodies (--memory)
	Queue        int   // waiting requests (--queue)
	StoreEntries int   // remembered links of prefixes (--store-entries)
	StoreBytes   int64 // and the bytes for them (--store-bytes)
	ContextBytes int64 // bytes on the disk (--context-bytes); 0 if contexts are not stored
	AnswerBytes  int64 // bytes of kept answers and vectors (--answers-bytes)
}

// Limits adds the series of the limits.
func (m *Metrics) Limits(l Limits) {
	limit := func(name, help string, n int64) { m.gauge(name, help, func() int64 { return n }) }
	limit("held_limit_bytes", "How much memory the bodies of requests that wait may take (--memory).", l.Held)
	limit("queue_limit_requests", "How many requests may wait (--queue).", int64(l.Queue))
	limit("store_limit_entries", "How many links of prefixes may be remembered (--store-entries).", int64(l.StoreEntries))
	limit("store_limit_bytes", "How much memory the remembered prefixes may take (--store-bytes).", l.StoreBytes)
	limit("answers_limit_bytes", "How much room kept answers and vectors may take (--answers-bytes).", l.AnswerBytes)
	if l.ContextBytes > 0 {
		limit("contexts_limit_bytes", "How much disk the stored contexts may take (--context-bytes).", l.ContextBytes)
	}
}
