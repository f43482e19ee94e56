package batch

import (
	"context"
	"fmt"
	"io"
	"time"
)

// Basis is where a figure comes from.
type Basis string

const (
	Measured  Basis = "measured"  // counted here, or reported by the answers
	Estimated Basis = "estimated" // inferred
	Unknown   Basis = "unknown"
)

// Figure is a number and its basis. An unknown one is 0.
type Figure struct {
	Value float64 `json:"value"`
	Basis Basis   `json:"basis"`
}

func measured(v float64) Figure { return Figure{v, Measured} }

// Summary is the result of a batch, over all its runs unless noted.
type Summary struct {
	Requests  int `json:"requests"`
	Succeeded int `json:"succeeded"`
	Failed    int `json:"failed"`
	Resumed   int `json:"resumed"` // done in earlier runs

	Simulated int `json:"simulated,omitempty"` // answered by a simulated server: all of its figures are made up

	PromptTokens    Figure `json:"prompt_tokens"`
	AnswerTokens    Figure `json:"answer_tokens"`
	ReusedTokens    Figure `json:"reused_tokens"`
	EvaluatedTokens Figure `json:"evaluated_tokens"`
	HitRate         Figure `json:"hit_rate"` // reused prompt tokens, 0 to 1
	ModelLoads      Figure `json:"model_loads"`
	Truncated       Figure `json:"truncated_prompts"`

	// Price is that of a million evaluated tokens, in any currency; Cost is the price of the
	// evaluated tokens, and Worth that of the reused ones. See SetPrice.
	Price float64 `json:"price,omitempty"`
	Cost  *Figure `json:"cost,omitempty"`
	Worth *Figure `json:"worth_of_reused,omitempty"`

	SecondsSaved      Figure `json:"seconds_saved"` // by reuse, compared with evaluating every prompt in full
	Seconds           Figure `json:"seconds"`       // of this run
	RequestsPerSecond Figure `json:"requests_per_second"`
}

// SetPrice sets the price of a million evaluated tokens; 0: no prices are shown.
func (s *Summary) SetPrice(perMillion float64) {
	s.Price, s.Cost, s.Worth = perMillion, nil, nil
	if perMillion == 0 {
		return
	}
	at := func(tokens Figure) *Figure { return &Figure{tokens.Value * perMillion / 1e6, tokens.Basis} }
	s.Cost, s.Worth = at(s.EvaluatedTokens), at(s.ReusedTokens)
}

// summary is made at the end.
func (b *batch) summary(ctx context.Context) *Summary {
	c := b.journal.head.Counts
	elapsed := time.Since(b.began).Seconds()
	s := &Summary{
		Requests: b.survey.Requests, Succeeded: c.Answers, Failed: c.Failed, Resumed: b.resumed, Simulated: c.Simulated,
		PromptTokens: measured(float64(c.Prompt)), AnswerTokens: measured(float64(c.Generated)),
		ModelLoads: Figure{float64(c.Loads), Estimated}, Truncated: Figure{float64(c.Truncated), Estimated},
		Seconds: measured(elapsed), RequestsPerSecond: measured(float64(b.ran.Answers+b.ran.Failed) / elapsed),
	}
	s.ReusedTokens, s.SecondsSaved = c.reuse(), c.saved()
	if s.ReusedTokens.Basis == Unknown && b.isProxy && b.worker == nil && c.Prompt > 0 {
		s.ReusedTokens, s.SecondsSaved = b.told(ctx)
	}
	if s.ReusedTokens.Basis != Unknown && c.Prompt > 0 {
		s.EvaluatedTokens = Figure{max(0, float64(c.Prompt)-s.ReusedTokens.Value), s.ReusedTokens.Basis}
		s.HitRate = Figure{min(1, s.ReusedTokens.Value/float64(c.Prompt)), s.ReusedTokens.Basis}
	} else {
		s.EvaluatedTokens.Basis, s.HitRate.Basis = Unknown, Unknown
	}
	return s
}

// reuse returns the reused tokens: measured if every answer reported them, estimated if most did.
func (c Counts) reuse() Figure {
	switch {
	case c.Prompt > 0 && c.ReusedOf == c.Prompt:
		return measured(float64(c.Reused))
	case c.Prompt > 0 && 2*c.ReusedOf > c.Prompt:
		return Figure{float64(c.Reused) / float64(c.ReusedOf) * float64(c.Prompt), Estimated}
	}
	return Figure{Basis: Unknown}
}

// saved returns the seconds that evaluating the reused tokens would have taken, at the mean rate of
// the evaluated ones.
func (c Counts) saved() Figure {
	evaluated := c.ReusedOf - c.Reused
	if c.reuse().Basis == Unknown || evaluated <= 0 || c.PromptEval <= 0 {
		return Figure{Basis: Unknown}
	}
	return Figure{c.PromptEval.Seconds() / float64(evaluated) * float64(c.Reused), Estimated}
}

// told returns what a proxy's metrics say of the time since this run began, which covers all of its
// clients.
func (b *batch) told(ctx context.Context) (reused, saved Figure) {
	reused.Basis, saved.Basis = Unknown, Unknown
	now, err := b.client.get(ctx, "/metrics")
	if err != nil || b.resumed > 0 {
		return reused, saved
	}
	grown := func(name, label string) Figure {
		const prefix = "ollama_cacheproxy_"
		return Figure{sum(now, prefix+name+"{", label) - sum(b.metrics, prefix+name+"{", label), Estimated}
	}
	return grown("estimated_prompt_tokens_total", `kind="reused"`), grown("estimated_saved_seconds_total", `kind="evaluation"`)
}

// Print writes the summary as text.
func (s *Summary) Print(w io.Writer) error {
	row := func(name, format string, f Figure) string {
		if f.Basis == Unknown {
			return fmt.Sprintf("%-22s%12s\n", name, "unknown")
		}
		return fmt.Sprintf("%-22s%12s  %s\n", name, fmt.Sprintf(format, f.Value), f.Basis)
	}
	text := fmt.Sprintf("%-22s%12d  %d succeeded, %d failed, %d of them done in earlier runs\n", "requests", s.Requests, s.Succeeded, s.Failed, s.Resumed)
	if s.Simulated > 0 {
		text += fmt.Sprintf("%-22s%12d  answers and all figures of them are made up\n", "simulated", s.Simulated)
	}
	text += row("prompt tokens", "%.0f", s.PromptTokens) + row("  reused", "%.0f", s.ReusedTokens) + row("  evaluated", "%.0f", s.EvaluatedTokens)
	rate := s.HitRate
	rate.Value *= 100
	text += row("  hit rate", "%.1f %%", rate) + row("answer tokens", "%.0f", s.AnswerTokens) + row("model loads", "%.0f", s.ModelLoads)
	if s.Truncated.Value > 0 {
		text += row("prompts cut by Ollama", "%.0f", s.Truncated)
	}
	if s.Price > 0 {
		text += fmt.Sprintf("%-22s%12g  a million evaluated tokens\n", "price", s.Price) +
			row("  of the evaluated", "%.4f", *s.Cost) + row("  of the reused", "%.4f", *s.Worth)
	}
	text += row("seconds saved", "%.1f", s.SecondsSaved) + row("seconds of this run", "%.1f", s.Seconds) + row("requests per second", "%.2f", s.RequestsPerSecond)
	_, err := io.WriteString(w, text)
	return err
}
