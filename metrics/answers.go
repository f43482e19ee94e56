package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// cacheUse counts what was looked for among kept answers, and what that spared.
type cacheUse struct {
	requests  *prometheus.CounterVec
	parts     *prometheus.CounterVec
	bytes     *prometheus.CounterVec
	prompt    *prometheus.CounterVec
	generated *prometheus.CounterVec
	seconds   *prometheus.CounterVec
}

// newCacheUse makes the series with a function for counters. All of them begin at 0.
func newCacheUse(counter func(name, help string, labels ...string) *prometheus.CounterVec) cacheUse {
	c := cacheUse{
		requests: counter("answers_requests_total", "Requests whose answer may be kept, by kind (answer or embedding) and result: hit (nothing was computed), partial (some inputs of an embedding were kept), miss, joined (it got the answer that another request was computing), bypass (the request, or the answer's nature, forbade it).", "kind", "result"),
		parts:    counter("answers_parts_total", "Parts of these requests, inputs of embeddings and whole answers, by result: hit, miss or joined.", "kind", "result"),
		bytes:    counter("answers_spared_bytes_total", "Bytes of kept answers and vectors that were given again.", "kind"),
		prompt:   counter("answers_spared_prompt_tokens_total", "Tokens of prompts that were not sent to Ollama, as counted when the kept answers were made. They are not among prompt_tokens_total.", "kind"),
		generated: counter("answers_spared_generated_tokens_total",
			"Tokens that were not generated, as counted when the kept answers were made.", "kind"),
		seconds: counter("answers_spared_seconds_total", "Seconds of computing that kept answers and vectors spared: what each of them took when it was made, as measured then.", "kind"),
	}
	for _, kind := range []string{proxy.CacheText, proxy.CacheVectors} {
		for _, result := range []string{
			proxy.CacheHit, proxy.CachePartial, proxy.CacheMiss, proxy.CacheJoined, proxy.CacheBypass,
		} {
			if kind == proxy.CacheVectors || result != proxy.CachePartial {
				c.requests.WithLabelValues(kind, result)
			}
		}
		c.count(&proxy.CacheUse{Kind: kind})
	}
	return c
}

// done counts a request; c is nil if nothing was looked for.
func (u cacheUse) done(c *proxy.CacheUse) {
	if c != nil {
		u.requests.WithLabelValues(c.Kind, c.Result).Inc()
		u.count(c)
	}
}

func (u cacheUse) count(c *proxy.CacheUse) {
	u.parts.WithLabelValues(c.Kind, proxy.CacheHit).Add(float64(c.Hits))
	u.parts.WithLabelValues(c.Kind, proxy.CacheMiss).Add(float64(c.Misses))
	u.parts.WithLabelValues(c.Kind, proxy.CacheJoined).Add(float64(c.Joined))
	u.bytes.WithLabelValues(c.Kind).Add(float64(c.Bytes))
	u.prompt.WithLabelValues(c.Kind).Add(float64(c.Prompt))
	u.generated.WithLabelValues(c.Kind).Add(float64(c.Generated))
	u.seconds.WithLabelValues(c.Kind).Add(max(0, c.Saved.Seconds()))
}

// Answers adds the series of the store of kept answers, and of the answers that go on without their
// clients, of which surviving returns the number and the bytes. It calls both at each scrape.
func (m *Metrics) Answers(stats func() answers.Stats, surviving func() (n int, bytes int64)) {
	m.registry.MustRegister(answersStore{stats, surviving})
}

// answersStore collects a store's statistics.
type answersStore struct {
	stats     func() answers.Stats
	surviving func() (n int, bytes int64)
}

var (
	answersUp      = prometheus.NewDesc(namespace+"_answers_up", "1 if the store of kept answers can be used; 0 while it cannot, when everything is computed.", nil, nil)
	answersEntries = prometheus.NewDesc(namespace+"_answers_entries", "Kept answers and vectors; absent while the store does not know.", nil, nil)
	answersBytes   = prometheus.NewDesc(namespace+"_answers_bytes", "Room that kept answers and vectors take; absent while the store does not know.", nil, nil)
	answersEvicted = prometheus.NewDesc(namespace+"_answers_evictions_total", "Kept answers and vectors that were dropped to make room.", nil, nil)
	answersExpired = prometheus.NewDesc(namespace+"_answers_expirations_total", "Kept answers and vectors that were dropped for their age.", nil, nil)
	answersErrors  = prometheus.NewDesc(namespace+"_answers_errors_total", "Calls of the store of kept answers that failed. Each was a miss, or an answer that was not kept.", nil, nil)

	answersSurviving      = prometheus.NewDesc(namespace+"_answers_surviving", "Answers that go on without their clients, under way or ended, and can be fetched.", nil, nil)
	answersSurvivingBytes = prometheus.NewDesc(namespace+"_answers_surviving_bytes", "… and their bytes so far.", nil, nil)
)

func (a answersStore) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		answersUp, answersEntries, answersBytes, answersEvicted, answersExpired, answersErrors,
		answersSurviving, answersSurvivingBytes,
	} {
		ch <- d
	}
}

func (a answersStore) Collect(ch chan<- prometheus.Metric) {
	value := func(d *prometheus.Desc, t prometheus.ValueType, v float64) {
		ch <- prometheus.MustNewConstMetric(d, t, v)
	}
	s := a.stats()
	up := 1.0
	if s.Down {
		up = 0
	}
	value(answersUp, prometheus.GaugeValue, up)
	if s.Entries >= 0 {
		value(answersEntries, prometheus.GaugeValue, float64(s.Entries))
	}
	if s.Bytes >= 0 {
		value(answersBytes, prometheus.GaugeValue, float64(s.Bytes))
	}
	value(answersEvicted, prometheus.CounterValue, float64(s.Evicted))
	value(answersExpired, prometheus.CounterValue, float64(s.Expired))
	value(answersErrors, prometheus.CounterValue, float64(s.Errors))
	n, bytes := a.surviving()
	value(answersSurviving, prometheus.GaugeValue, float64(n))
	value(answersSurvivingBytes, prometheus.GaugeValue, float64(bytes))
}
