package batch

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"time"
)

// Rate returns how many requests this run has done per second, and how long the rest takes at that
// rate; 0 if that is not known.
func (p Progress) Rate() (perSecond float64, left time.Duration) {
	done := p.Done - p.Resumed
	if done <= 0 || p.Elapsed <= 0 {
		return 0, 0
	}
	perSecond = float64(done) / p.Elapsed.Seconds()
	return perSecond, time.Duration(float64(p.Total-p.Done) / perSecond * float64(time.Second)).Round(time.Second)
}

// Words returns what is worth knowing beside the progress bar. Unknown figures are left out.
func (p Progress) Words() string {
	text := ""
	if reused := p.Counts.reuse(); reused.Basis != Unknown {
		text += fmt.Sprintf("%.0f%% reused, %.0f tokens evaluated, ", 100*reused.Value/float64(p.Counts.Prompt), float64(p.Counts.Prompt)-reused.Value)
	}
	if saved := p.Counts.saved(); saved.Basis != Unknown {
		text += fmt.Sprintf("~%v saved, ", time.Duration(saved.Value*float64(time.Second)).Round(time.Second))
	}
	text += fmt.Sprintf("%d errors", p.Counts.Failed)
	if p.Workers > 0 {
		text += fmt.Sprintf(", %d workers", p.Workers)
	}
	if p.Waiting {
		text += ", waiting for Valkey"
	}
	return text
}

// Attrs is the same for a line of the log.
func (p Progress) Attrs() []any {
	rate, left := p.Rate()
	attrs := []any{"done", p.Done, "of", p.Total, "per_second", fmt.Sprintf("%.2f", rate), "left", left.String(), "in_flight", p.InFlight, "errors", p.Counts.Failed}
	if p.Workers > 0 {
		attrs = append(attrs, "workers", p.Workers, "waiting_for_valkey", p.Waiting)
	}
	if reused := p.Counts.reuse(); reused.Basis != Unknown {
		attrs = append(attrs, "reused_tokens", int(reused.Value), "evaluated_tokens", p.Counts.Prompt-int(reused.Value), "reuse", string(reused.Basis))
	}
	if saved := p.Counts.saved(); saved.Basis != Unknown {
		attrs = append(attrs, "estimated_seconds_saved", int(saved.Value))
	}
	return attrs
}

// Print writes the survey as text. unknown says why the absent models are not known.
func (v *Survey) Print(w io.Writer, absent []string, unknown error) error {
	text := fmt.Sprintf("requests    %d, of which %d are wrong\n", v.Requests, v.Bad)
	for _, model := range slices.Sorted(maps.Keys(v.Models)) {
		where := "on the server"
		switch {
		case unknown != nil:
			where = "not looked for"
		case slices.Contains(absent, model):
			where = "NOT on the server: pull it"
		}
		text += fmt.Sprintf("model       %s: %d requests, %s\n", model, v.Models[model], where)
	}
	if unknown != nil {
		text += fmt.Sprintf("server      %v\n", unknown)
	}
	if v.Repeated > 0 {
		text += fmt.Sprintf("custom_id   %d lines repeat that of an earlier line: %s\n",
			v.Repeated, lines(v.Repeats, v.Repeated))
	}
	if v.Long > 0 {
		text += fmt.Sprintf("num_ctx     %d prompts are probably longer than the num_ctx that they state, and would be cut: lines %s (estimated, at %d bytes a token)\n", v.Long, lines(v.LongLines, v.Long), tokenBytes)
	}
	_, err := io.WriteString(w, text)
	return err
}
