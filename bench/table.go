package bench

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/text"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
)

// row has a figure of each mode.
type row struct {
	Label     string
	Cells     []string
	Predicted bool // a prediction, not a measurement
}

// title returns a line that says what was measured.
func (r *Report) title() string {
	title := fmt.Sprintf("workload %s: %s requests, %s + %s prompt tokens, %s generated; %s, %s", r.Workload,
		number(float64(r.Requests)), number(float64(r.PrefixTokens)), number(float64(r.TailTokens)), number(float64(r.OutputTokens)), text.Plural(r.Clients, "client"), text.Plural(r.Rounds, "round"))
	for _, flag := range []struct {
		name, value string
		usual       bool
	}{
		{"pause", fmt.Sprint(duration(r.PauseMS)), r.PauseMS == 0},
		{"give-up", fmt.Sprint(duration(r.GiveUpMS)), r.GiveUpMS == ms(DefaultGiveUp)},
		{"slots", r.Slots, r.Slots == DefaultSlots},
		{"seed", fmt.Sprint(r.Seed), r.Seed == DefaultSeed},
	} {
		if !flag.usual {
			title += fmt.Sprintf(", --%s %s", flag.name, flag.value)
		}
	}
	return title
}

func duration(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

// names returns the modes' names for the head of the table.
func (r *Report) names() (names []string) {
	for _, m := range r.Modes {
		names = append(names, map[Mode]string{Direct: "directly", KeepAlive: "keep-alive only", Full: "everything"}[m.Mode])
	}
	return names
}

func (r *Report) predictedAs() string {
	if r.predicted() {
		return "predicted"
	}
	return "reckoned as predicted"
}

func (r *Report) rows() (rows []row) {
	add := func(label string, figure func(m *ModeResult) string) {
		next := row{Label: label}
		for _, m := range r.Modes {
			next.Cells = append(next.Cells, figure(m))
		}
		rows = append(rows, next)
	}
	predicted := func(figure func(p *Prediction) string) {
		next := row{Label: r.predictedAs(), Predicted: true}
		some := false
		for _, m := range r.Modes {
			text := ""
			if m.Predicted != nil {
				text = figure(m.Predicted)
			}
			next.Cells, some = append(next.Cells, text), some || text != ""
		}
		if some {
			rows = append(rows, next)
		}
	}
	spread := func(m *ModeResult, format func(float64) string, figure func(run *ModeRun) float64) string {
		if len(m.Runs) < 2 {
			return ""
		}
		all := m.each(figure)
		return fmt.Sprintf(" (%s to %s)", format(slices.Min(all)), format(slices.Max(all)))
	}
	seconds := func(s float64) string { return fmt.Sprintf("%.2f", s) }

	add("answered, failed", func(m *ModeResult) string { return fmt.Sprintf("%d, %d", m.Answered, m.Failed) })
	add("seconds", func(m *ModeResult) string {
		return seconds(m.Seconds) + spread(m, seconds, func(run *ModeRun) float64 { return run.Seconds })
	})
	predicted(func(p *Prediction) string {
		if p.Seconds == 0 {
			return ""
		}
		return fmt.Sprintf("%.0f", p.Seconds)
	})
	add("prompt tokens", func(m *ModeResult) string { return number(m.Prompt) })
	add("… evaluated, "+string(r.basis()), func(m *ModeResult) string {
		return number(m.Evaluated) + spread(m, number, func(run *ModeRun) float64 { return float64(run.Evaluated) })
	})
	predicted(func(p *Prediction) string { return number(float64(p.Evaluated)) })
	add("… reused, "+string(r.basis()), func(m *ModeResult) string { return number(m.Reused) })
	if r.Price > 0 {
		add(fmt.Sprintf("at %g a million: evaluated (reused)", r.Price), func(m *ModeResult) string {
			return fmt.Sprintf("%.4f (%.4f)", m.Evaluated*r.Price/1e6, m.Reused*r.Price/1e6)
		})
	}
	if slices.ContainsFunc(r.Modes, func(m *ModeResult) bool { return m.Unknown > 0 }) {
		add("… not known", func(m *ModeResult) string { return number(m.Unknown) })
	}
	add("hits (half or more reused), "+string(r.basis()), func(m *ModeResult) string {
		if m.HitRate < 0 {
			return "not known"
		}
		return fmt.Sprintf("%.1f %%", 100*m.HitRate)
	})
	predicted(func(p *Prediction) string { return fmt.Sprintf("%.0f %%", 100*p.HitRate) })
	add("the others, by reason, inferred", func(m *ModeResult) string {
		var all []string
		for _, reason := range slices.Sorted(maps.Keys(m.Cold)) {
			all = append(all, fmt.Sprintf("%d %s", m.Cold[reason], reason))
		}
		return strings.Join(all, ", ")
	})
	add("model loads, inferred", func(m *ModeResult) string { return number(m.Loads) })
	latency := func(label string, of func(m *ModeResult) Quantiles) {
		add(label, func(m *ModeResult) string {
			q := of(m)
			return fmt.Sprintf("%.1f, %.1f, %.1f, %.1f", q.P50, q.P90, q.P99, q.Max)
		})
	}
	latency("latency: p50, p90, p99, max, ms", func(m *ModeResult) Quantiles { return m.Whole })
	latency("first token: the same", func(m *ModeResult) Quantiles { return m.First })
	latency("waited in the proxy: the same", func(m *ModeResult) Quantiles { return m.Waited })
	add("time in Ollama: load, slot, prompt, answer", func(m *ModeResult) string {
		s := m.Shares
		return fmt.Sprintf("%.0f, %.0f, %.0f, %.0f %%", 100*s.Load, 100*s.Queue, 100*s.Prompt, 100*s.Answer)
	})
	if slices.ContainsFunc(r.Modes, func(m *ModeResult) bool { return m.Truncated > 0 }) {
		add("prompts probably cut by Ollama, estimated", func(m *ModeResult) string { return fmt.Sprint(m.Truncated) })
	}
	return rows
}

// basis is that of all token figures together: an estimate if some are estimates.
func (r *Report) basis() savings.Basis {
	basis := savings.Unknown
	for _, m := range r.Modes {
		if m.Basis == savings.Estimated || basis == savings.Unknown {
			basis = m.Basis
		}
	}
	return basis
}

// conditions says how it was measured.
func (r *Report) conditions() []string {
	list := []string{
		fmt.Sprintf("Ollama %s at %s, %s, %s.", r.Ollama, r.Upstream, strings.Join(r.Models, " and "), r.At.Format("2006-01-02 15:04 MST")),
		fmt.Sprintf("The same server in all modes, in this order: %s%s. Before each the models were unloaded, and each has texts of its own, of the same shape, so that none profits from another's cache.", join(r.Order), map[bool]string{true: "; in later rounds another is first", false: ""}[r.Rounds > 1]),
		"All modes are measured by the proxy's ledger; directly means through a proxy that changes nothing and lets nothing wait. Latencies are the client's.",
	}
	for _, m := range r.Memory {
		if m.BytesPerToken == 0 {
			continue
		}
		most := ""
		if m.Window > 0 {
			most = "at most "
		}
		text := fmt.Sprintf("A cached token of %s takes %s%s bytes (estimated: %d layers × %d KV heads × (%d + %d) × 2 bytes), a prefix of %s tokens %s%.1f MiB", m.Model, most,
			number(float64(m.BytesPerToken)), m.Layers, m.KVHeads, m.KeyLength, m.ValueLength, number(float64(r.PrefixTokens)), most, float64(m.BytesPerToken)*float64(r.PrefixTokens)/(1<<20))
		if m.Window > 0 {
			text += fmt.Sprintf("; some layers keep only the last %s tokens", number(float64(m.Window)))
		}
		list = append(list, text+".")
	}
	return list
}

func join(modes []Mode) string {
	var all []string
	for _, m := range modes {
		all = append(all, string(m))
	}
	return strings.Join(all, ", ")
}

const incomplete = "INCOMPLETE: it was stopped before the end. Totals are of different numbers of requests."

// Print writes the report as text.
func (r *Report) Print(w io.Writer) error {
	var b strings.Builder
	if r.Incomplete {
		fmt.Fprintf(&b, "%s\n\n", incomplete)
	}
	fmt.Fprintf(&b, "%s\n\n", r.title())
	t := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "\t%s\n", strings.Join(r.names(), "\t"))
	fmt.Fprintf(t, "--optimize\t%s\n", strings.Join(r.modes(), "\t"))
	for _, row := range r.rows() {
		label := row.Label
		if row.Predicted {
			label = "    " + label
		}
		fmt.Fprintf(t, "%s\t%s\n", label, strings.Join(row.Cells, "\t"))
	}
	t.Flush() // cannot fail, since it writes to memory
	b.WriteString("\n")
	for _, text := range append(r.conditions(), r.Notes...) {
		fmt.Fprintf(&b, "- %s\n", text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *Report) modes() (modes []string) {
	for _, m := range r.Modes {
		modes = append(modes, string(m.Mode))
	}
	return modes
}
