package bench

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Report is the result of a run. Tokens are those of prompts unless they are called generated;
// times are in milliseconds.
type Report struct {
	// Incomplete means that the run was stopped, or ended by an error: the figures are from before.
	Incomplete bool      `json:"incomplete"`
	At         time.Time `json:"at"`
	Upstream   string    `json:"upstream"`
	Ollama     string    `json:"ollama"` // version
	Models     []string  `json:"models"`
	Workload   string    `json:"workload"`
	Order      []Mode    `json:"order"` // of the modes in the first round

	Requests     int     `json:"requests"`
	PrefixTokens int     `json:"prefix_tokens"`
	TailTokens   int     `json:"tail_tokens"`
	OutputTokens int     `json:"output_tokens"`
	Clients      int     `json:"clients"`
	Rounds       int     `json:"rounds"`
	PauseMS      float64 `json:"pause_ms"`
	GiveUpMS     float64 `json:"give_up_ms"`
	Seed         uint64  `json:"seed"`
	Slots        string  `json:"slots"` // of the mode Full, in the syntax of serve's flag
	Predictions  bool    `json:"predictions,omitempty"`
	Price        float64 `json:"price,omitempty"` // of a million evaluated tokens

	Modes  []*ModeResult `json:"modes"` // in the order of Modes, without those that were not run
	Memory []Memory      `json:"memory"`
	Notes  []string      `json:"notes"` // hints for reading the figures
}

// ModeResult is the result of a mode. Figures of several rounds are medians, except for latencies
// and verdicts, which are those of all requests together.
type ModeResult struct {
	Mode Mode `json:"mode"`
	// Predicted is nil unless Config.Predictions asks for it and the workload is "same".
	Predicted *Prediction   `json:"predicted,omitempty"`
	Basis     savings.Basis `json:"basis"`   // of evaluated and reused tokens
	Seconds   float64       `json:"seconds"` // from the first request to the last answer
	Prompt    float64       `json:"prompt_tokens"`
	Evaluated float64       `json:"evaluated_tokens"`
	Reused    float64       `json:"reused_tokens"`
	Unknown   float64       `json:"unknown_tokens"` // neither reported nor inferred
	Loads     float64       `json:"loads"`
	Answered  int           `json:"answered"` // of all rounds
	Failed    int           `json:"failed"`   // of all rounds, including unsent ones
	Truncated int           `json:"truncated"`
	// HitRate is the share of prompts of which at least half was reused, among those for which that
	// is known; -1 if there are none.
	HitRate float64        `json:"hit_rate"`
	Cold    map[string]int `json:"cold"` // the ledger's reasons for the other prompts
	Whole   Quantiles      `json:"latency_ms"`
	First   Quantiles      `json:"first_token_ms"`
	Waited  Quantiles      `json:"waited_ms"` // in the proxy, for a slot
	Shares  Shares         `json:"shares"`
	Runs    []*ModeRun     `json:"runs"`
}

// Shares divide the time that Ollama reports for all requests by its use. They add up to 1, or are
// all 0.
type Shares struct {
	Load   float64 `json:"load"`
	Queue  float64 `json:"queue"` // waiting for a slot inside Ollama
	Prompt float64 `json:"prompt_evaluation"`
	Answer float64 `json:"answer"`
}

// Quantiles describe a distribution.
type Quantiles struct {
	Min float64 `json:"min"`
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// ModeRun is a mode in one round.
type ModeRun struct {
	Round     int     `json:"round"` // the first is 0
	Seconds   float64 `json:"seconds"`
	Prompt    int     `json:"prompt_tokens"`
	Evaluated int     `json:"evaluated_tokens"`
	Reused    int     `json:"reused_tokens"`
	Unknown   int     `json:"unknown_tokens"`
	Loads     int     `json:"loads"`
	// Unsent is the number of requests that were not sent, or abandoned, at a standstill.
	Unsent   int       `json:"unsent"`
	Loaded   []Loaded  `json:"loaded"` // at its end
	Requests []Request `json:"requests"`
}

// Loaded is a model as /api/ps shows it.
type Loaded struct {
	Model  string `json:"model"`
	NumCtx int    `json:"num_ctx"`
	Bytes  int64  `json:"bytes"`
}

// Request is a request that was sent. Figures unknown to the ledger are zero.
type Request struct {
	Client int    `json:"client"`
	Prefix int    `json:"prefix"`
	Model  string `json:"model"`
	NumCtx int    `json:"num_ctx"`
	Error  string `json:"error,omitempty"`

	Sent  float64 `json:"sent_ms"`        // by the client, since the run's beginning
	First float64 `json:"first_token_ms"` // since Sent
	Whole float64 `json:"latency_ms"`     // since Sent

	Upstream string `json:"upstream,omitempty"`
	// Passed is when the proxy sent it, since the run's beginning.
	Passed  float64         `json:"passed_ms,omitempty"`
	Load    float64         `json:"load_ms"`
	Queue   float64         `json:"queue_ms"`
	Prompt  float64         `json:"prompt_evaluation_ms"`
	Answer  float64         `json:"answer_ms"`
	Loaded  bool            `json:"loaded"`
	Basis   savings.Basis   `json:"basis"`
	Total   int             `json:"prompt_tokens"`
	Tokens  *savings.Tokens `json:"tokens,omitempty"`
	Made    int             `json:"generated_tokens"`
	Verdict savings.Verdict `json:"verdict,omitempty"`
	Reason  savings.Reason  `json:"reason,omitempty"`

	truncated bool
	waited    float64
}

func newReport(c *Config, version string, at time.Time) *Report {
	return &Report{
		At: at, Upstream: c.Upstream.String(), Ollama: version, Models: c.Models, Workload: c.Workload, Order: c.Modes,
		Requests: c.Requests, PrefixTokens: c.PrefixTokens, TailTokens: c.TailTokens, OutputTokens: c.OutputTokens,
		Clients: c.Clients, Rounds: c.Rounds, PauseMS: ms(c.Pause), GiveUpMS: ms(c.GiveUp), Seed: c.Seed, Slots: c.Slots, Predictions: c.Predictions,
		Price: c.Price,
		Modes: []*ModeResult{}, Notes: []string{},
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// add adds a run, with the proxy's records of its requests. The two are joined by the prompts'
// fingerprints, which no two requests share.
func (r *Report) add(mode Mode, round int, p *play, exchanges []proxy.Exchange, loaded []upstream.Loaded, unsent int) {
	known := make(map[string]*proxy.Exchange, len(exchanges))
	for i := range exchanges {
		known[savings.PrefixString(exchanges[i].Savings.Prefix)] = &exchanges[i]
	}
	run := &ModeRun{Round: round, Seconds: p.wall.Seconds(), Unsent: unsent}
	for _, d := range p.done {
		q := Request{
			Client: d.client, Prefix: d.prefix, Model: d.model, NumCtx: d.numCtx,
			Sent: ms(d.sent.Sub(p.began)), First: ms(d.first), Whole: ms(d.whole), Basis: savings.Unknown, Total: d.prompt,
		}
		if d.err != nil {
			q.Error = d.err.Error()
		}
		if ex := known[d.fingerprint]; ex != nil && d.err == nil {
			e := ex.Savings
			q.Upstream, q.Passed, q.waited = e.Upstream, ms(e.At.Sub(p.began)), ms(ex.Waited)
			q.Load, q.Queue, q.Prompt, q.Answer = ms(e.Load), ms(e.Queue), ms(e.Prompt), ms(e.Eval)
			q.Loaded, q.Basis, q.Total, q.Tokens, q.Made = e.Loaded, e.Basis, e.Total, e.Tokens, e.Generated
			q.Verdict, q.Reason, q.truncated = e.Verdict, e.Reason, e.Truncated
		}
		run.Prompt += q.Total
		if q.Tokens != nil {
			run.Evaluated += q.Tokens.Evaluated
			run.Reused += q.Tokens.Reused
		} else {
			run.Unknown += q.Total
		}
		if q.Loaded {
			run.Loads++
		}
		run.Requests = append(run.Requests, q)
	}
	slices.SortStableFunc(run.Requests, func(a, b Request) int { return cmp.Compare(a.Sent, b.Sent) })
	for _, l := range loaded {
		run.Loaded = append(run.Loaded, Loaded{l.Name, l.ContextLength, l.Size})
	}
	m := r.mode(mode)
	if m == nil {
		m = &ModeResult{Mode: mode, Predicted: r.predict(mode)}
		r.Modes = append(r.Modes, m)
		slices.SortFunc(r.Modes, func(a, b *ModeResult) int {
			return cmp.Compare(slices.Index(Modes(), a.Mode), slices.Index(Modes(), b.Mode))
		})
	}
	m.Runs = append(m.Runs, run)
}

// mode returns the result of a mode, or nil.
func (r *Report) mode(mode Mode) *ModeResult {
	for _, m := range r.Modes {
		if m.Mode == mode {
			return m
		}
	}
	return nil
}

// sum computes the results of the runs.
func (r *Report) sum() {
	for _, m := range r.Modes {
		m.sum()
	}
	r.Notes = r.explain()
}

func (m *ModeResult) sum() {
	over := func(figure func(run *ModeRun) float64) float64 { return median(m.each(figure)) }
	m.Seconds = over(func(run *ModeRun) float64 { return run.Seconds })
	m.Prompt = over(func(run *ModeRun) float64 { return float64(run.Prompt) })
	m.Evaluated = over(func(run *ModeRun) float64 { return float64(run.Evaluated) })
	m.Reused = over(func(run *ModeRun) float64 { return float64(run.Reused) })
	m.Unknown = over(func(run *ModeRun) float64 { return float64(run.Unknown) })
	m.Loads = over(func(run *ModeRun) float64 { return float64(run.Loads) })

	var whole, first, waited []float64
	var hits, known int
	m.Basis, m.Cold = savings.Unknown, map[string]int{}
	for _, run := range m.Runs {
		m.Failed += run.Unsent
		for _, q := range run.Requests {
			if q.Error != "" {
				m.Failed++
				continue
			}
			m.Answered++
			whole, first, waited = append(whole, q.Whole), append(first, q.First), append(waited, q.waited)
			m.Shares.Load += q.Load
			m.Shares.Queue += q.Queue
			m.Shares.Prompt += q.Prompt
			m.Shares.Answer += q.Answer
			if q.truncated {
				m.Truncated++
			}
			switch { // one estimate makes the sum an estimate
			case q.Basis == savings.Estimated, q.Basis == savings.Measured && m.Basis == savings.Unknown:
				m.Basis = q.Basis
			}
			switch q.Verdict {
			case savings.Hit:
				hits++
				known++
			case savings.Partial, savings.Cold:
				known++
				m.Cold[string(q.Reason)]++
			}
		}
	}
	m.Whole, m.First, m.Waited = quantiles(whole), quantiles(first), quantiles(waited)
	m.HitRate = -1
	if known > 0 {
		m.HitRate = float64(hits) / float64(known)
	}
	s := &m.Shares
	if sum := s.Load + s.Queue + s.Prompt + s.Answer; sum > 0 {
		*s = Shares{s.Load / sum, s.Queue / sum, s.Prompt / sum, s.Answer / sum}
	}
}

// each returns a figure of each run.
func (m *ModeResult) each(figure func(run *ModeRun) float64) (all []float64) {
	for _, run := range m.Runs {
		all = append(all, figure(run))
	}
	return all
}

func median(all []float64) float64 {
	slices.Sort(all)
	if n := len(all); n%2 == 0 && n > 0 {
		return (all[n/2-1] + all[n/2]) / 2
	}
	return quantile(all, 0.5)
}

// quantile returns the value that the given share of the sorted values does not exceed (nearest
// rank), or 0 if there are none.
func quantile(sorted []float64, part float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(max(int(math.Ceil(part*float64(len(sorted))))-1, 0), len(sorted)-1)]
}

func quantiles(all []float64) Quantiles {
	slices.Sort(all)
	return Quantiles{quantile(all, 0), quantile(all, 0.5), quantile(all, 0.9), quantile(all, 0.99), quantile(all, 1)}
}

// Prediction is a common expectation of what a caching proxy saves for 100 requests that share a
// prefix of 2,000 tokens, each with 50 further ones. It assumes that Ollama alone never reuses a
// prefix; docs/bench.md says what is wrong with that.
type Prediction struct {
	Seconds   float64 `json:"seconds,omitempty"` // 0: none for this size
	Evaluated int     `json:"evaluated_tokens"`
	HitRate   float64 `json:"hit_rate"`
}

// predicted reports whether the sizes are those that the prediction was made for. Predictions for
// other sizes are calculated in the same way.
func (r *Report) predicted() bool {
	return r.Requests == 100 && r.PrefixTokens == 2000 && r.TailTokens == 50
}

// predict assumes that without the proxy, and with keep_alive alone, every prompt is evaluated as a
// whole, and with the proxy the prefix only once.
func (r *Report) predict(mode Mode) *Prediction {
	if !r.Predictions || r.Workload != "same" {
		return nil
	}
	p := &Prediction{Evaluated: r.Requests * (r.PrefixTokens + r.TailTokens)}
	if mode == Full {
		p.Evaluated = r.PrefixTokens + r.Requests*r.TailTokens
		p.HitRate = float64(r.Requests-1) / float64(r.Requests)
	}
	if r.predicted() && r.OutputTokens == 50 {
		p.Seconds = map[Mode]float64{Direct: 30, KeepAlive: 20, Full: 12}[mode]
	}
	return p
}

// explain says what a workload cannot show, and why the measurements differ from the prediction.
func (r *Report) explain() []string {
	notes := []string{}
	if r.Workload == "same" || r.Workload == "user-message-prefix" {
		notes = append(notes, "One client with one prefix has little to gain from any proxy, since Ollama reuses a prefix by itself as long as nothing comes between. Try --workload num-ctx and --workload closed-loops, which are what several programs do to a server.")
	}
	base := r.mode(Direct)
	if base == nil || base.Predicted == nil || base.Prompt == 0 {
		return notes
	}
	if base.Reused > 0 {
		notes = append(notes, fmt.Sprintf("The prediction takes it that Ollama alone evaluates all of each prompt. It does not: a slot keeps its last prompt, and the next one is evaluated from where the two part. Directly, %.0f %% of the prompt tokens were reused (%s).",
			100*base.Reused/base.Prompt, base.Basis))
	}
	if k := r.mode(KeepAlive); k != nil {
		text := "and a model that is asked all the time is not unloaded: %s loads without and %s with keep_alive. It counts where pauses are longer than the server's own keep_alive (--pause shows it)."
		if base.Loads != k.Loads {
			text = "of which there were %s without and %s with keep_alive."
		}
		notes = append(notes, fmt.Sprintf("The prediction has keep_alive save a third of the time. It saves loads, "+text, number(base.Loads), number(k.Loads)))
	}
	if s := base.Shares; s != (Shares{}) {
		notes = append(notes, fmt.Sprintf("The prediction takes reading and tokenizing the prompt for the cost. Directly, Ollama spent its time on loading (%.0f %%), waiting for a slot (%.0f %%), evaluating prompts (%.0f %%) and generating answers (%.0f %%); tokenizing is a part of what is left over and not told.",
			100*s.Load, 100*s.Queue, 100*s.Prompt, 100*s.Answer))
	}
	if base.Predicted.Seconds > 0 {
		notes = append(notes, "The predicted seconds belong to no machine or model that is known; compare the modes with each other.")
	}
	return notes
}

// Memory is the size of a cached context. Values that the server does not report are zero.
type Memory struct {
	Model       string `json:"model"`
	Layers      int    `json:"layers"`
	KVHeads     int    `json:"kv_heads"`
	KeyLength   int    `json:"key_length"`   // per head
	ValueLength int    `json:"value_length"` // per head
	Window      int    `json:"sliding_window"`
	// BytesPerToken is the size of the keys and values of all layers, at two bytes per number: an
	// upper bound with a sliding window, since some layers keep fewer tokens then.
	BytesPerToken int `json:"bytes_per_token"`
}

// memory computes, from the answer of /api/show, the size of a token of context.
func (b *bench) memory(ctx context.Context, model string) Memory {
	m := Memory{Model: model}
	show, err := b.server.Show(ctx, model)
	if err != nil {
		return m // the error is ignored, since nothing depends on it
	}
	info := show.ModelInfo
	arch, _ := info["general.architecture"].(string)
	get := func(key string) int {
		n, _ := info[arch+"."+key].(float64)
		return int(n)
	}
	m.Layers, m.KVHeads, m.Window = get("block_count"), get("attention.head_count_kv"), get("attention.sliding_window")
	head := 0
	if heads := get("attention.head_count"); heads > 0 {
		head = get("embedding_length") / heads
	}
	m.KeyLength, m.ValueLength = cmp.Or(get("attention.key_length"), head), cmp.Or(get("attention.value_length"), head)
	m.BytesPerToken = 2 * m.Layers * m.KVHeads * (m.KeyLength + m.ValueLength)
	return m
}

// number formats a count, with a decimal if a median has one, and with separators of thousands.
func number(f float64) string {
	text := fmt.Sprintf("%.1f", f)
	whole, tenth, _ := strings.Cut(text, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if tenth != "0" {
		whole += "." + tenth
	}
	return whole
}
