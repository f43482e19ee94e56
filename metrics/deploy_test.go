package metrics

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// dashboardFile is the dashboard that operators import into Grafana.
const dashboardFile = "../deploy/grafana/dashboards/ollama-cacheproxy.json"

var (
	described = regexp.MustCompile(`^Desc\{fqName: "([^"]+)", .*variableLabels: \{([^}]*)\}\}$`)
	docsRow   = regexp.MustCompile("(?m)^\\| (`[a-z_`, ]+`) \\| ([a-z_, ]*) ?\\|")
	series    = regexp.MustCompile(namespace + `_[a-z_]+`)
	part      = regexp.MustCompile(`_(bucket|sum|count)$`) // suffixes of a histogram's series
	runbook   = regexp.MustCompile(`(?m)^ *runbook_url: .*/docs/(\S+\.md)#(\S+)$`)
	heading   = regexp.MustCompile(`(?m)^#+ (.*)$`)
)

// all returns the labels of every series of the proxy, by name, with every part of it in use.
func all(t *testing.T) map[string]string {
	t.Helper()
	m := New("v", func() int64 { return 0 })
	m.Lanes(func(uint16) string { return "up" }, func() schedule.Stats { return schedule.Stats{} })
	m.Store(func() contextstore.Stats { return contextstore.Stats{} })
	m.Contexts(func() contexts.Counts { return contexts.Counts{} },
		func() contextstore.FileStats { return contextstore.FileStats{} })
	m.Fleet(nil)
	m.Shared(func() SharedStats { return SharedStats{} })
	m.Answers(func() answers.Stats { return answers.Stats{} }, func() (int, int64) { return 0, 0 })
	m.Held(func() int64 { return 0 })
	m.Waiting(func() int64 { return 0 })
	m.Draining(func() map[string]bool { return nil })
	m.Limits(Limits{ContextBytes: 1})
	descriptions := make(chan *prometheus.Desc)
	go func() { // ends when all are read
		m.registry.Describe(descriptions)
		close(descriptions)
	}()
	found := map[string]string{}
	for d := range descriptions {
		fields := described.FindStringSubmatch(d.String())
		if fields == nil {
			t.Errorf("a description is not read: %s", d)
			continue
		}
		if name, ours := strings.CutPrefix(fields[1], namespace+"_"); ours {
			found[name] = strings.ReplaceAll(fields[2], ",", ", ")
		}
	}
	return found
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestDocs: the table of docs/metrics.md has exactly the proxy's series, with their labels.
func TestDocs(t *testing.T) {
	want, got := all(t), map[string]string{}
	for _, row := range docsRow.FindAllStringSubmatch(read(t, "../docs/metrics.md"), -1) {
		for name := range strings.SplitSeq(row[1], ", ") {
			got[strings.Trim(name, "`")] = strings.TrimSpace(row[2])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if labels, ok := got[name]; !ok {
			t.Errorf("docs/metrics.md does not have %s", name)
		} else if labels != want[name] {
			t.Errorf("docs/metrics.md says that %s has the labels %q, and it has %q", name, labels, want[name])
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("docs/metrics.md has %s, which is no series", name)
		}
	}
}

// TestDeployNames: every series of the proxy that dashboards, alerts and documentation name exists.
func TestDeployNames(t *testing.T) {
	known := all(t)
	files := []string{"../README.md", dashboardFile}
	for _, pattern := range []string{"../deploy/prometheus/*.yml", "../docs/*.md"} {
		more, err := filepath.Glob(pattern)
		if err != nil || len(more) == 0 {
			t.Fatalf("%s: %v %v", pattern, more, err)
		}
		files = append(files, more...)
	}
	for _, path := range files {
		names := series.FindAllString(read(t, path), -1)
		for _, full := range slices.Compact(slices.Sorted(slices.Values(names))) {
			name := strings.TrimPrefix(full, namespace+"_")
			_, whole := known[name]
			_, base := known[part.ReplaceAllString(name, "")]
			if !whole && !base && !strings.HasSuffix(name, "_") { // "ollama_cacheproxy_…" in prose
				t.Errorf("%s has %s, which is no series", path, full)
			}
		}
		if path == dashboardFile && len(names) < 50 {
			t.Errorf("%s names %d series: it is not read", path, len(names))
		}
	}
}

// classic is the form of dashboards that every Grafana imports; those before 12 know no other.
//
//lint:ignore SA1019 the form that is preferred to it is not for them
type classic = dashboard.Dashboard

// TestDashboard: the dashboard is valid by Grafana's own schema, and answers the five questions.
func TestDashboard(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	text := []byte(read(t, dashboardFile))
	// It finds unknown and missing fields but keeps only some of the data, and returns an empty
	// list of errors instead of nil.
	if err := new(classic).UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
		t.Fatal(err)
	}
	var d classic
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	if err := d.Validate(); err != nil {
		t.Error(err)
	}
	var rows []string
	ids := map[uint32]bool{}
	right := uint32(0)
	for _, p := range d.Panels {
		switch {
		case p.RowPanel != nil:
			rows = append(rows, *p.RowPanel.Title)
			ids[p.RowPanel.Id] = true
		case p.Panel.Title == nil || len(p.Panel.Targets) == 0:
			t.Errorf("panel %d has no title, or no query", *p.Panel.Id)
			fallthrough
		default:
			ids[*p.Panel.Id] = true
			right = max(right, p.Panel.GridPos.X+p.Panel.GridPos.W)
		}
	}
	if len(ids) != len(d.Panels) || right != 24 {
		t.Errorf("%d ids for %d panels, which are %d wide", len(ids), len(d.Panels), right)
	}
	if want := []string{
		"Is it up?", "Who waits?", "What is it worth?", "Where do tokens go?", "What is full?",
	}; !slices.Equal(rows, want) {
		t.Errorf("the rows are %q, want %q", rows, want)
	}
}

// TestRunbooks: each alert's runbook is a section of an existing document.
func TestRunbooks(t *testing.T) {
	rules := read(t, "../deploy/prometheus/alerts.yml")
	links := runbook.FindAllStringSubmatch(rules, -1)
	if alerts := strings.Count(rules, "- alert: "); alerts == 0 || len(links) != alerts {
		t.Errorf("%d alerts, and %d runbooks", alerts, len(links))
	}
	for _, link := range links {
		var anchors []string
		for _, h := range heading.FindAllStringSubmatch(read(t, "../docs/"+link[1]), -1) {
			// GitHub's rule for anchors.
			anchor := strings.ReplaceAll(strings.ToLower(h[1]), " ", "-")
			anchors = append(anchors, regexp.MustCompile(`[^a-z0-9_-]`).ReplaceAllString(anchor, ""))
		}
		if !slices.Contains(anchors, link[2]) {
			t.Errorf("%s has no section #%s", link[1], link[2])
		}
	}
}
