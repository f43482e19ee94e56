package bench

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"slices"
)

// chartJS is Chart.js 4.6.1 from its package.
//
//go:embed chartjs/chart.umd.min.js
var chartJS []byte

//go:embed report.html
var pageText string

var page = template.Must(template.New("report").Parse(pageText))

const (
	curvePoints    = 200 // of a distribution
	shownRequests  = 300 // on a timeline
	timelinePhases = 5
)

// charts has the data of the page's charts.
type charts struct {
	Modes     []string   `json:"modes"`
	Evaluated []float64  `json:"evaluated"`
	Reused    []float64  `json:"reused"`
	Unknown   []float64  `json:"unknown"`
	Predicted []*float64 `json:"predicted"` // evaluated tokens; null: no prediction
	Loads     []float64  `json:"loads"`
	Whole     [][]point  `json:"whole"` // latency in ms, share of requests that took no longer in %
	First     [][]point  `json:"first"`
	Timelines []timeline `json:"timelines"`
}

type point [2]float64

// timeline shows the server's work during the first round of a mode.
type timeline struct {
	Shown int   `json:"shown"` // requests
	Of    int   `json:"of"`
	Rows  int   `json:"rows"`
	Bars  []bar `json:"bars"`
}

// bar is a request on a timeline: its row, when each phase ended (the first two: when the proxy
// sent it, when the model was ready), and its number.
type bar struct {
	Row    int                     `json:"row"`
	Ends   [timelinePhases]float64 `json:"ends"` // seconds: passed on; loaded; given a slot; prompt evaluated; answered
	Prefix int                     `json:"prefix"`
	Waited float64                 `json:"waited"` // ms, in the proxy
	Text   string                  `json:"text"`
}

// HTML writes the report as one self-contained page.
func (r *Report) HTML(w io.Writer) error {
	// Escapes <, > and &, so that no name can end the script that contains it.
	data, err := json.Marshal(r.charts())
	if err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	// A browser's developer tools would request that file.
	script, _, _ := bytes.Cut(chartJS, []byte("//# sourceMappingURL="))
	return page.Execute(w, map[string]any{
		"Report": r, "Title": r.title(), "Names": r.names(), "Modes": r.modes(), "Rows": r.rows(), "Texts": append(r.conditions(), r.Notes...),
		"Warning": map[bool]string{true: incomplete}[r.Incomplete], "Basis": r.basis(), "PredictedAs": r.predictedAs(),
		"Data": template.JS(data), "Script": template.JS(script),
	})
}

func (r *Report) charts() charts {
	none := []float64{} // the page's script needs arrays, not null
	c := charts{
		Modes: append([]string{}, r.names()...), Evaluated: none, Reused: none, Unknown: none, Loads: none, Predicted: []*float64{},
		Whole: [][]point{}, First: [][]point{}, Timelines: []timeline{},
	}
	for _, m := range r.Modes {
		c.Evaluated, c.Reused, c.Unknown = append(c.Evaluated, m.Evaluated), append(c.Reused, m.Reused), append(c.Unknown, m.Unknown)
		c.Loads = append(c.Loads, m.Loads)
		var predicted *float64
		if m.Predicted != nil {
			predicted = new(float64(m.Predicted.Evaluated))
		}
		c.Predicted = append(c.Predicted, predicted)
		c.Whole = append(c.Whole, m.curve(func(q Request) float64 { return q.Whole }))
		c.First = append(c.First, m.curve(func(q Request) float64 { return q.First }))
		c.Timelines = append(c.Timelines, m.Runs[0].timeline())
	}
	return c
}

// curve returns a distribution over the answered requests of all rounds.
func (m *ModeResult) curve(figure func(q Request) float64) []point {
	points := []point{}
	var all []float64
	for _, run := range m.Runs {
		for _, q := range run.Requests {
			if q.Error == "" {
				all = append(all, figure(q))
			}
		}
	}
	slices.Sort(all)
	n := min(len(all), curvePoints)
	for i := range n {
		part := float64(i+1) / float64(n)
		points = append(points, point{quantile(all, part), 100 * part})
	}
	return points
}

// timeline puts requests that were in Ollama at the same time on separate rows.
func (run *ModeRun) timeline() (t timeline) {
	var list []Request
	for _, q := range run.Requests {
		if q.Error == "" && q.Passed > 0 {
			list = append(list, q)
		}
	}
	slices.SortStableFunc(list, func(a, b Request) int { return cmp.Compare(a.Passed, b.Passed) })
	t.Shown, t.Of, t.Bars = min(len(list), shownRequests), len(list), []bar{}
	var busy []float64 // time until which each row is occupied
	for _, q := range list[:t.Shown] {
		end := q.Sent + q.Whole
		row := slices.IndexFunc(busy, func(until float64) bool { return until <= q.Passed })
		if row < 0 {
			row, busy = len(busy), append(busy, 0)
		}
		busy[row] = end
		b := bar{Row: row, Prefix: q.Prefix, Waited: q.waited}
		at := q.Passed
		for i, phase := range []float64{0, q.Load, q.Queue, q.Prompt, q.Answer} {
			at = min(at+phase, end)
			b.Ends[i] = at / 1000
		}
		tokens := "tokens not known"
		if q.Tokens != nil {
			tokens = fmt.Sprintf("%d tokens evaluated, %d reused (%s)", q.Tokens.Evaluated, q.Tokens.Reused, q.Basis)
		}
		b.Text = fmt.Sprintf("client %d, prefix %d, %s, num_ctx %d: %s", q.Client, q.Prefix, q.Model, q.NumCtx, tokens)
		t.Bars = append(t.Bars, b)
	}
	t.Rows = len(busy)
	return t
}
