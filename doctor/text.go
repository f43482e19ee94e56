package doctor

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// Report is the findings as programs read them. docs/doctor.md lists what will not change.
type Report struct {
	Proxy    string    `json:"proxy"` // its URL
	Now      time.Time `json:"now"`
	Since    time.Time `json:"since"` // requests since then were examined
	Requests int       `json:"requests"`
	Findings []Finding `json:"findings"`
}

// NewReport examines facts.
func NewReport(f Facts) Report {
	return Report{Proxy: f.Proxy, Now: f.Now, Since: f.Since, Requests: f.Requests, Findings: Examine(f)}
}

// width is the most columns of the text, except for settings to be copied.
const width = 96

// wheres say where a setting is to be made.
var wheres = map[Where]string{
	InOllama: "for ollama serve, in its environment",
	InProxy:  "for ollama-cacheproxy",
	InClient: "in the client",
	InShell:  "in a shell",
}

// Write writes the report as text.
func (r Report) Write(w io.Writer) error {
	var b strings.Builder
	window := fmt.Sprintf("%s in %s, since %s", plural(r.Requests, "request"),
		duration(r.Now.Sub(r.Since).Seconds()), r.Since.Local().Format(time.DateTime))
	if len(r.Findings) == 0 {
		fmt.Fprintf(&b, "Nothing is wrong that shows in %s.\n", window)
		if r.Requests == 0 {
			b.WriteString("Run this again when the proxy has been used for a while.\n")
		}
	} else {
		fmt.Fprintf(&b, "%s, worst first, from %s at %s.\n", plural(len(r.Findings), "finding"), window, r.Proxy)
	}
	for i, f := range r.Findings {
		f.write(&b, i+1)
	}
	if len(r.Findings) > 0 {
		b.WriteString("\nAfter a change, look at what came since: ollama-cacheproxy doctor --last 10m\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (f Finding) write(b *strings.Builder, n int) {
	where := ""
	if f.Upstream != "" && f.Upstream != "upstream" {
		where = " (" + f.Upstream + ")"
	}
	fmt.Fprintf(b, "\n%d. %s: %s%s\n", n, strings.ToUpper(string(f.Severity)), f.Title, where)
	if cost := f.Cost.String(); cost != "" {
		wrap(b, "   ", "Cost: "+cost)
	}
	b.WriteByte('\n')
	for _, e := range f.Evidence {
		wrap(b, "   ", e)
	}
	b.WriteByte('\n')
	for _, a := range f.Advice {
		wrap(b, "   → ", a.Do)
		if a.Set != "" {
			fmt.Fprintf(b, "\n         %s\n     %s\n", a.Set, wheres[a.Where])
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(b, "   More: docs/%s\n", f.Doc)
}

// String returns the cost in words; "" for none.
func (w Waste) String() string {
	var parts []string
	if w.Seconds > 0 {
		s := duration(w.Seconds)
		if w.Estimated {
			s = "about " + s
		}
		parts = append(parts, s)
	}
	if w.Loads > 0 {
		parts = append(parts, plural(w.Loads, "load"))
	}
	if w.Tokens > 0 {
		parts = append(parts, number(w.Tokens)+" tokens evaluated again")
	}
	return strings.Join(parts, ", ")
}

// wrap writes text in lines: the first one after first, the others indented by its width.
func wrap(b *strings.Builder, first, text string) {
	indent := strings.Repeat(" ", len([]rune(first)))
	line, used := first, len([]rune(first))
	start := used
	for word := range strings.FieldsSeq(text) {
		n := len([]rune(word))
		if used > start && used+1+n > width {
			b.WriteString(line + "\n")
			line, used = indent, start
		}
		if used > start {
			line, used = line+" ", used+1
		}
		line, used = line+word, used+n
	}
	b.WriteString(line + "\n")
}
