package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestImports: packages import each other only downwards, as docs/architecture.md says.
func TestImports(t *testing.T) {
	const module = "github.com/ollama-cacheproxy/ollama-cacheproxy/"
	allowed := map[string][]string{
		"jsonscan":              {},
		"discover":              {},
		"discover/dnstest":      {},
		"upstream":              {},
		"ollamasim":             {"upstream"},
		"prefix":                {"jsonscan"},
		"outage":                {},
		"valkeyconn":            {"outage"},
		"answers":               {"jsonscan", "outage", "prefix", "valkeyconn"},
		"answers/forms":         {"jsonscan"},
		"batch":                 {"jsonscan", "outage", "prefix", "valkeyconn"},
		"batches":               {"batch"},
		"contextstore":          {"outage", "prefix", "valkeyconn"},
		"engine":                {},
		"contexts":              {"contextstore", "engine"},
		"runners":               {"answers", "prefix", "upstream"},
		"savings":               {"contextstore", "jsonscan", "prefix", "runners"},
		"schedule":              {"prefix"},
		"doctor":                {"prefix", "upstream"},
		"livepage":              {},
		"fleet":                 {"prefix", "schedule"},
		"proxy":                 {"answers", "answers/forms", "contexts", "doctor", "fleet", "jsonscan", "livepage", "prefix", "runners", "savings", "schedule", "upstream"},
		"shared":                {"outage", "proxy", "valkeyconn"},
		"metrics":               {"answers", "contexts", "contextstore", "fleet", "proxy", "savings", "schedule", "shared", "upstream"},
		"bench":                 {"bench/text", "proxy", "savings", "upstream"},
		"cmd/ollama-cacheproxy": {"answers", "batch", "batches", "bench", "contexts", "contextstore", "discover", "doctor", "engine", "fleet", "metrics", "ollamasim", "proxy", "savings", "schedule", "shared", "upstream", "valkeyconn"},
	}
	for pkg, want := range allowed {
		out, err := exec.Command("go", "list", "-f", `{{join .Imports "\n"}}`, module+pkg).Output()
		if err != nil {
			t.Fatal(err)
		}
		for imported := range strings.Lines(string(out)) {
			imported = strings.TrimSpace(imported)
			if ours, ok := strings.CutPrefix(imported, module); ok && !slices.Contains(want, ours) {
				t.Errorf("%s imports %s", pkg, ours)
			}
			if strings.HasPrefix(imported, "github.com/prometheus/") && pkg != "metrics" {
				t.Errorf("%s imports %s: only metrics may", pkg, imported)
			}
		}
	}
}
