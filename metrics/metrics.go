// Package metrics defines all Prometheus series, and counts the events that the other packages
// report. Labels take values from bounded sets only: endpoints and outcomes are the proxy's own,
// and a model is a name that the upstream is known to have.
package metrics

import (
	"net/http"
	"runtime"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	namespace = "ollama_cacheproxy"

	// maxModels limits the values of the model label. Further models of a server count as
	// modelOther.
	maxModels  = 1000
	modelOther = "other" // a name that no upstream is known to have
	modelNone  = ""      // a request that names no model
)

// Metrics counts events. Create it with New.
type Metrics struct {
	registry *prometheus.Registry

	requests  *prometheus.CounterVec
	sent      *prometheus.CounterVec
	retries   *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	firstByte *prometheus.HistogramVec
	bytesIn   *prometheus.CounterVec
	bytesOut  *prometheus.CounterVec
	keepAlive *prometheus.CounterVec
	unedited  *prometheus.CounterVec
	numCtx    *prometheus.CounterVec
	heads     *prometheus.CounterVec
	touches   *prometheus.CounterVec
	up        *prometheus.GaugeVec
	info      *prometheus.GaugeVec
	simulated *prometheus.GaugeVec
	loaded    *prometheus.GaugeVec
	loadedGPU *prometheus.GaugeVec
	refused   *prometheus.CounterVec

	tokens          *prometheus.CounterVec
	estimatedTokens *prometheus.CounterVec
	warm            *prometheus.CounterVec
	estimatedWarm   *prometheus.CounterVec
	cold            *prometheus.CounterVec
	saved           *prometheus.CounterVec
	loads           *prometheus.CounterVec
	estimatedLoads  *prometheus.CounterVec
	truncated       *prometheus.CounterVec
	prewarm         *prometheus.CounterVec
	waited          *prometheus.HistogramVec
	keyRequests     *prometheus.CounterVec
	keyTokens       *prometheus.CounterVec
	generated       *prometheus.CounterVec
	passed          *prometheus.CounterVec
	answers         cacheUse

	mu     sync.RWMutex
	models map[string]string // label by upstream.ModelKey; guarded by mu
	names  map[string]bool   // names of API keys; guarded by mu
}

// New registers all series with a new registry. It calls inFlight at each scrape.
func New(version string, inFlight func() int64) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), models: map[string]string{}}
	name := func(n string) string { return namespace + "_" + n }
	counter := func(n, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name(n), Help: help}, labels)
		m.registry.MustRegister(v)
		return v
	}
	gauge := func(n, help string, labels ...string) *prometheus.GaugeVec {
		v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name(n), Help: help}, labels)
		m.registry.MustRegister(v)
		return v
	}
	// From a cached answer to a model load with a long generation.
	buckets := []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 60, 150, 300, 900}
	histogram := func(n, help string, labels ...string) *prometheus.HistogramVec {
		v := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name(n), Help: help, Buckets: buckets}, labels)
		m.registry.MustRegister(v)
		return v
	}

	m.requests = counter("requests_total", "Requests that ended, by endpoint, model and outcome.", "endpoint", "model", "outcome")
	m.sent = counter("upstream_requests_total", "Requests by the upstream that they were sent to last, and outcome.", "upstream", "outcome")
	m.retries = counter("retries_total", "Requests that were sent elsewhere, or again, since the upstream cannot have begun with them: unreachable, busy (503) or absent (it does not have the model any more); peer (another proxy went away before it began) or elsewhere (an idle upstream of another proxy took them over).", "reason")
	m.duration = histogram("request_duration_seconds", "Time from a request's arrival to the end of its answer.", "endpoint")
	m.firstByte = histogram("first_byte_seconds", "Time from a request's arrival to the first byte of the answer's body.", "endpoint")
	m.waited = histogram("queue_wait_seconds", "Time that requests waited for a lane, by priority.", "priority")
	m.bytesIn = counter("request_bytes_total", "Bytes of request bodies, as clients sent them.", "endpoint")
	m.bytesOut = counter("response_bytes_total", "Bytes of response bodies.", "endpoint")
	m.keepAlive = counter("keep_alive_total", "Requests that can carry keep_alive, by what was done: injected (the client gave none), held (it gave none, and the model is held already), spared (it gave none, and another request may wait for the model to make room), kept (the client's own), raised (it was shorter), forced.", "action")
	m.unedited = counter("unedited_total", "Request bodies that could not be read: too_large, encoded or not_json.", "reason")
	m.numCtx = counter("num_ctx_total", "Native requests to models with a --num-ctx-policy, by what was done about their num_ctx: pinned (to the loaded one), raised (to the largest one), kept, unknown (the client states none, and the server's default is not known).", "action")
	m.heads = counter("stable_heads_edits_total", "Edits of prompts that --stable-heads made, by rule.", "rule")
	m.touches = counter("keep_alive_touches_total", "Requests of the proxy's own that set keep_alive for models used through /v1, by result.", "model", "result")
	m.up = gauge("upstream_up", "1 if the upstream answered the last poll.", "upstream")
	m.info = gauge("upstream_info", "1, with the upstream's version.", "upstream", "version")
	m.simulated = gauge("upstream_simulated", "1 if the upstream says that it is simulated: its answers and figures are made up.", "upstream")
	m.refused = counter("refused_requests_total", "Requests that the proxy refused, by the status that it answered.", "status")
	m.loadedGPU = gauge("upstream_loaded_gpu_bytes", "How much of the memory of each loaded model is a GPU's.", "upstream", "model")
	m.loaded = gauge("upstream_loaded_bytes", "Memory of each loaded model, as the upstream's /api/ps told at the last poll.", "upstream", "model")

	m.tokens = counter("prompt_tokens_total", "Prompt tokens, by what became of them: reused or evaluated, as the server told (Ollama 0.34 and later), or unknown.", "model", "kind")
	m.estimatedTokens = counter("estimated_prompt_tokens_total", "Prompt tokens of requests whose server does not tell what it reused: an estimate of what was reused and evaluated.", "model", "kind")
	m.generated = counter("generated_tokens_total", "Tokens that were generated, as answers told.", "model")
	m.warm = counter("prompts_total", "Prompts by how warm they were: hit (at least half was reused), partial (at least a tenth), cold; as the server told; or unknown.", "model", "verdict")
	m.estimatedWarm = counter("estimated_prompts_total", "Prompts whose server does not tell what it reused, by how warm they were: an estimate.", "model", "verdict")
	m.cold = counter("estimated_cold_prompts_total", "Prompts that were not a hit, by the reason that the proxy infers.", "model", "reason")
	m.saved = counter("estimated_saved_seconds_total", "Estimated time saved: evaluation (of the tokens that were reused, at the learned time per token) and loading (of models that Ollama would have dropped five minutes after their last request).", "model", "kind")
	m.loads = counter("model_loads_total", "Model loads that requests waited for, as their answers told.", "model")
	m.estimatedLoads = counter("estimated_model_loads_total", "Model loads that are inferred from changed options, where answers do not tell (/v1).", "model")
	m.truncated = counter("estimated_truncated_prompts_total", "Prompts that Ollama has probably cut, by their token count.", "model")
	m.prewarm = counter("prewarm_requests_total",
		"Requests of the proxy's own to make prompts warm, which no other series counts.", "result")
	m.keyRequests = counter("key_requests_total",
		"Requests that ended, by the name of their API key and outcome.", "name", "outcome")
	m.keyTokens = counter("key_tokens_total",
		"Tokens of requests by the name of their API key: prompt (reused ones too) and generated, as answers told.",
		"name", "kind")
	m.passed = counter("passed_requests_total",
		"Requests that other proxies of a fleet passed on to this one, by outcome. The proxies that passed them on count them in requests_total, and this one their tokens.",
		"outcome")
	m.answers = newCacheUse(counter)
	build := gauge("build_info", "1, with the proxy's version.", "version", "goversion")
	build.WithLabelValues(version, runtime.Version()).Set(1)
	m.gauge("in_flight", "Requests being served.", inFlight)
	m.begin()
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

// begin creates the series whose labels are known in advance, at 0. Prometheus sees no increase in
// a counter that appears with the value 1, so an alert would miss the first event.
func (m *Metrics) begin() {
	for _, status := range []int{
		http.StatusUnauthorized, http.StatusForbidden, http.StatusRequestTimeout,
		http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusLoopDetected,
	} {
		m.refused.WithLabelValues(strconv.Itoa(status))
	}
	for _, reason := range []string{
		proxy.RetryUnreachable, proxy.RetryBusy, proxy.RetryAbsent,
		proxy.RetryPeer, proxy.RetryElsewhere,
	} {
		m.retries.WithLabelValues(reason)
	}
	for _, reason := range []string{proxy.UneditedTooLarge, proxy.UneditedEncoded, proxy.UneditedNotJSON} {
		m.unedited.WithLabelValues(reason)
	}
	for _, result := range []string{
		proxy.PrewarmEvaluated, proxy.PrewarmAttached, proxy.PrewarmWarm,
		proxy.PrewarmGivenUp, proxy.PrewarmRefused, proxy.PrewarmFailed,
	} {
		m.prewarm.WithLabelValues(result)
	}
}

// Handler serves the registry.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// Done counts a finished request.
func (m *Metrics) Done(ex proxy.Exchange) {
	if ex.Prewarm != "" { // a request of the proxy's own
		m.prewarm.WithLabelValues(ex.Prewarm).Inc()
		return
	}
	model := m.model(ex.Model, ex.Outcome == proxy.OK)
	if ex.Passed {
		m.passed.WithLabelValues(string(ex.Outcome)).Inc()
	} else {
		m.asked(ex, model)
	}
	if ex.Upstream != "" {
		m.sent.WithLabelValues(ex.Upstream, string(ex.Outcome)).Inc()
	}
	for _, reason := range ex.Retries {
		m.retries.WithLabelValues(reason).Inc()
	}
	if ex.KeepAlive != "" {
		m.keepAlive.WithLabelValues(ex.KeepAlive).Inc()
	}
	if ex.Peer == "" { // otherwise that proxy counts what becomes of the body
		m.edited(ex)
	}
	if ex.Priority != "" {
		m.waited.WithLabelValues(ex.Priority).Observe(ex.Waited.Seconds())
	}
	if ex.Savings != nil {
		m.account(model, ex.Savings)
	}
	m.answers.done(ex.Cache)
	m.named(ex)
}

// edited counts the edits of a request's body.
func (m *Metrics) edited(ex proxy.Exchange) {
	if ex.NumCtx != "" {
		m.numCtx.WithLabelValues(ex.NumCtx).Inc()
	}
	for _, done := range ex.Heads {
		m.heads.WithLabelValues(done.Rule).Add(float64(done.Edits))
	}
}

// asked counts a client's request. Of a fleet, the proxy does that to which the client sent it.
func (m *Metrics) asked(ex proxy.Exchange, model string) {
	m.requests.WithLabelValues(ex.Endpoint, model, string(ex.Outcome)).Inc()
	m.duration.WithLabelValues(ex.Endpoint).Observe(ex.Duration.Seconds())
	if ex.Outcome == proxy.Refused {
		m.refused.WithLabelValues(strconv.Itoa(ex.Status)).Inc()
	}
	if ex.FirstByte > 0 {
		m.firstByte.WithLabelValues(ex.Endpoint).Observe(ex.FirstByte.Seconds())
	}
	m.bytesIn.WithLabelValues(ex.Endpoint).Add(float64(ex.BytesIn))
	m.bytesOut.WithLabelValues(ex.Endpoint).Add(float64(ex.BytesOut))
	if ex.Unedited != "" {
		m.unedited.WithLabelValues(ex.Unedited).Inc()
	}
}

// named counts a request by the name of its API key. A name that has left the file is not counted,
// so the label has no more values than the file has names.
func (m *Metrics) named(ex proxy.Exchange) {
	m.mu.RLock()
	defer m.mu.RUnlock() // held while counting: KeyNames must not delete the series meanwhile
	if !m.names[ex.Name] || ex.Outcome == proxy.Own {
		return
	}
	if !ex.Passed {
		m.keyRequests.WithLabelValues(ex.Name, string(ex.Outcome)).Inc()
	}
	if e := ex.Savings; e != nil {
		m.keyTokens.WithLabelValues(ex.Name, "prompt").Add(float64(e.Total))
		m.keyTokens.WithLabelValues(ex.Name, "generated").Add(float64(e.Generated))
	}
}

// KeyNames sets the names of the current API keys, and removes the series of all others.
func (m *Metrics) KeyNames(names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.names
	m.names = map[string]bool{}
	for _, name := range names {
		m.names[name] = true
	}
	for name := range before {
		if !m.names[name] {
			m.keyRequests.DeletePartialMatch(prometheus.Labels{"name": name})
			m.keyTokens.DeletePartialMatch(prometheus.Labels{"name": name})
		}
	}
}

// account counts an entry of the ledger.
func (m *Metrics) account(model string, e *savings.Entry) {
	tokens, warm := m.tokens, m.warm
	if e.Basis == savings.Estimated {
		tokens, warm = m.estimatedTokens, m.estimatedWarm
	}
	if e.Tokens != nil {
		tokens.WithLabelValues(model, "reused").Add(float64(e.Tokens.Reused))
		tokens.WithLabelValues(model, "evaluated").Add(float64(e.Tokens.Evaluated))
	} else {
		tokens.WithLabelValues(model, "unknown").Add(float64(e.Total))
	}
	warm.WithLabelValues(model, string(e.Verdict)).Inc()
	if e.Reason != "" {
		m.cold.WithLabelValues(model, string(e.Reason)).Inc()
	}
	loads, estimatedLoads, truncated := m.loads.WithLabelValues(model),
		m.estimatedLoads.WithLabelValues(model), m.truncated.WithLabelValues(model) // at 0 from the model's first request on
	switch {
	case e.Loaded && e.Load > 0:
		loads.Inc()
	case e.Loaded:
		estimatedLoads.Inc()
	}
	if e.Truncated {
		truncated.Inc()
	}
	m.generated.WithLabelValues(model).Add(float64(e.Generated))
	m.saved.WithLabelValues(model, "evaluation").Add(max(0, e.SavedEvaluation.Seconds()))
	m.saved.WithLabelValues(model, "loading").Add(max(0, e.SavedLoading.Seconds()))
}

// Lanes adds the series of a scheduler. It calls stats at each scrape, and name for the names of its
// upstreams.
func (m *Metrics) Lanes(name func(uint16) string, stats func() schedule.Stats) {
	m.registry.MustRegister(&lanes{metrics: m, name: name, stats: stats})
}

// lanes collects a scheduler's statistics.
type lanes struct {
	metrics *Metrics
	name    func(uint16) string
	stats   func() schedule.Stats
}

var (
	queueLength  = prometheus.NewDesc(namespace+"_queue_requests", "Requests that wait for a lane, by priority.", []string{"priority"}, nil)
	queueOldest  = prometheus.NewDesc(namespace+"_queue_oldest_seconds", "How long the request has waited that came first, by priority.", []string{"priority"}, nil)
	laneCount    = prometheus.NewDesc(namespace+"_lanes", "Lanes of loaded models, by state: busy, held (free although requests wait: one that continues its prefix is expected), idle.", []string{"upstream", "model", "num_ctx", "state"}, nil)
	laneLearned  = prometheus.NewDesc(namespace+"_lanes_learned", "How many slots a model has, as learned; nothing where the number is given.", []string{"upstream", "model", "num_ctx"}, nil)
	laneSwitches = prometheus.NewDesc(namespace+"_lane_switches_total", "Requests that lanes took, by what the lane held: continued (most of what they had in common), opened (nothing of it), joined (nothing, while another lane is busy with it), load (its model is not loaded).", []string{"kind"}, nil)
	waitError    = prometheus.NewDesc(namespace+"_estimated_wait_error_seconds", "How wrong the estimates were, made when requests began to wait, of when they would begin: the error's size.", nil, nil)
	waitBias     = prometheus.NewDesc(namespace+"_estimated_wait_bias_seconds", "By how much longer requests waited than estimated, on average; negative: shorter.", nil, nil)
	laneHolds    = prometheus.NewDesc(namespace+"_lane_holds_total", "Lanes that were held for a request expected to continue their prefix, by outcome: hit (it came), expired.", []string{"outcome"}, nil)
)

func (l *lanes) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{queueLength, queueOldest, laneCount, laneLearned, laneSwitches, laneHolds, waitError, waitBias} {
		ch <- d
	}
}

func (l *lanes) Collect(ch chan<- prometheus.Metric) {
	st := l.stats()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	for p, w := range st.Waiting {
		gauge(queueLength, float64(w.Requests), p.String())
		gauge(queueOldest, w.Oldest.Seconds(), p.String())
	}
	// Runners may differ in options that are not labels: their lanes are added up.
	type key struct{ upstream, model, numCtx string }
	states, learned := map[key][3]int{}, map[key]int{}
	for _, r := range st.Runners {
		k := key{l.name(r.Runner.Upstream), l.metrics.model(r.Runner.Options.Model, true), "default"}
		if n := r.Runner.Options.NumCtx(); n > 0 {
			k.numCtx = strconv.Itoa(n)
		}
		s := states[k]
		states[k] = [3]int{s[0] + r.Busy, s[1] + r.Held, s[2] + max(0, r.Lanes-r.Busy-r.Held)}
		if r.Learned {
			learned[k] = max(learned[k], r.Lanes)
		}
	}
	for k, s := range states {
		for i, state := range []string{"busy", "held", "idle"} {
			gauge(laneCount, float64(s[i]), k.upstream, k.model, k.numCtx, state)
		}
	}
	for k, n := range learned {
		gauge(laneLearned, float64(n), k.upstream, k.model, k.numCtx)
	}
	count(laneSwitches, st.Continued, "continued")
	count(laneSwitches, st.Opened, "opened")
	count(laneSwitches, st.Joined, "joined")
	count(laneSwitches, st.RunnerLoads, "load")
	if e := st.Estimates; e.Count > 0 {
		buckets := map[float64]uint64{}
		for i, bound := range schedule.EstimateBounds {
			buckets[bound.Seconds()] = e.Within[i]
		}
		ch <- prometheus.MustNewConstHistogram(waitError, e.Count, e.Absolute.Seconds(), buckets)
		gauge(waitBias, e.Late.Seconds()/float64(e.Count))
	}
	count(laneHolds, st.HoldsHit, "hit")
	count(laneHolds, st.HoldsExpired, "expired")
}

// Store adds the series of a store. It calls stats at each scrape.
func (m *Metrics) Store(stats func() contextstore.Stats) {
	m.gauge("store_entries", "Links of prefixes that are remembered.", func() int64 { return int64(stats().Entries) })
	m.gauge("store_bytes", "Memory that the remembered prefixes take.", func() int64 { return stats().Bytes })
	m.counter("store_evictions_total", "Links that were forgotten to make room.", func() float64 { return float64(stats().Evictions) })
}

// Contexts adds the series of stored contexts. It calls counts and files at each scrape.
func (m *Metrics) Contexts(counts func() contexts.Counts, files func() contextstore.FileStats) {
	m.gauge("contexts", "Stored contexts.", func() int64 { return int64(files().States) })
	m.gauge("contexts_bytes", "Disk that the stored contexts take.", func() int64 { return files().Bytes })
	m.counter("contexts_saved_total", "Contexts that were stored.", func() float64 { return float64(counts().Saved) })
	m.counter("contexts_saved_bytes_total", "… and their bytes.", func() float64 { return float64(counts().SavedBytes) })
	m.counter("contexts_attached_total", "Stored contexts that were given to an engine, for a request.", func() float64 { return float64(counts().Attached) })
	m.counter("contexts_filled_total", "Stored contexts that were given to an engine before anybody asked.", func() float64 { return float64(counts().Filled) })
	m.counter("contexts_dropped_total", "Stored contexts that were dropped: for room, since nobody needed them, or as they could not be used.", func() float64 {
		s := files()
		return float64(s.Evicted + s.Expired + s.Dropped)
	})
	m.counter("contexts_refused_total", "Contexts that were not stored for want of room, on the disk or within --context-bytes.", func() float64 { return float64(files().Refused) })
	m.counter("contexts_reused_tokens_total", "Tokens of prompts that were not evaluated since a context was attached, as the server or its engine told.", func() float64 { return float64(counts().Tokens) })
	m.counter("estimated_contexts_saved_seconds_total", "How long the evaluation of those tokens would have taken, at the speed that was learned.", func() float64 { return counts().Evaluation.Seconds() })
	m.registry.MustRegister(failures{counts})
}

// failures collects the failures to store or attach contexts, by reason.
type failures struct{ counts func() contexts.Counts }

var failed = prometheus.NewDesc(namespace+"_contexts_failed_total",
	"Contexts that could not be stored or attached, or were of no use.", []string{"reason"}, nil)

func (f failures) Describe(ch chan<- *prometheus.Desc) { ch <- failed }

func (f failures) Collect(ch chan<- prometheus.Metric) {
	counts := f.counts().Failed
	for _, reason := range []string{
		contexts.FailedSave, contexts.FailedAttach, contexts.FailedUnused, contexts.FailedChanged,
	} {
		ch <- prometheus.MustNewConstMetric(failed, prometheus.CounterValue, float64(counts[reason]), reason)
	}
}

// counter adds a counter without labels, and calls value at each scrape.
func (m *Metrics) counter(name, help string, value func() float64) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: namespace + "_" + name, Help: help}, value))
}

// Held adds the series for the memory of bodies. It calls held at each scrape.
func (m *Metrics) Held(held func() int64) {
	m.gauge("held_bytes", "Memory that the bodies take of requests that wait, or may have to be sent again.", held)
}

// Waiting adds the series of waiting requests. It calls waiting at each scrape.
func (m *Metrics) Waiting(waiting func() int64) {
	m.gauge("waiting_requests", "Requests that wait for a lane, for memory, or for an upstream that is away.", waiting)
}

// gauge adds a gauge without labels, and calls value at each scrape.
func (m *Metrics) gauge(name, help string, value func() int64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: namespace + "_" + name, Help: help},
		func() float64 { return float64(value()) }))
}

// Touched counts a keep_alive that the proxy set by a request of its own.
func (m *Metrics) Touched(model string, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.touches.WithLabelValues(m.model(model, err == nil), result).Inc()
}

// Polled records the result of polling an upstream.
func (m *Metrics) Polled(name string, st upstream.State) {
	up := 0.0
	if st.Up {
		up = 1
	}
	m.up.WithLabelValues(name).Set(up)
	for _, outcome := range []proxy.Outcome{
		proxy.OK, proxy.ClientError, proxy.UpstreamError, proxy.Unreachable, proxy.Aborted,
	} {
		m.sent.WithLabelValues(name, string(outcome))
	}
	m.simulated.DeleteLabelValues(name)
	if st.Simulated {
		m.simulated.WithLabelValues(name).Set(1)
	}
	m.info.DeletePartialMatch(prometheus.Labels{"upstream": name})
	if st.Up {
		m.info.WithLabelValues(name, st.Version).Set(1)
	}
	for _, model := range st.Models {
		m.model(model, true)
	}
	m.loaded.DeletePartialMatch(prometheus.Labels{"upstream": name})
	m.loadedGPU.DeletePartialMatch(prometheus.Labels{"upstream": name})
	for _, l := range st.Loaded {
		m.loadedGPU.WithLabelValues(name, m.model(l.Name, true)).Set(float64(l.SizeVRAM))
		m.loaded.WithLabelValues(name, m.model(l.Name, true)).Set(float64(l.Size))
	}
}

// Forget removes the series of an upstream that is none any more.
func (m *Metrics) Forget(name string) {
	for _, series := range []interface {
		DeletePartialMatch(prometheus.Labels) int
	}{m.sent, m.up, m.info, m.simulated, m.loaded, m.loadedGPU} {
		series.DeletePartialMatch(prometheus.Labels{"upstream": name})
	}
}

// model returns the label for a model's name. Only if exists, which means that an upstream has the
// model, is the name remembered.
func (m *Metrics) model(name string, exists bool) string {
	if name == "" {
		return modelNone
	}
	key := upstream.ModelKey(name)
	m.mu.RLock()
	label, ok := m.models[key]
	m.mu.RUnlock()
	switch {
	case ok:
		return label
	case key == "" || !exists:
		return modelOther
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.models) >= maxModels {
		return modelOther
	}
	label = upstream.DisplayName(name)
	m.models[key] = label
	return label
}
