package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

var update = flag.Bool("update", false, "write what docs/settings.md says of the flags")

// flagsOf returns serve's flags as the program has them.
func flagsOf(t *testing.T) []*kong.Flag {
	var c cli
	return serveFlags(newParser(t.Context(), &c, io.Discard, io.Discard, func(int) {}).Model)
}

var defaultSaid = regexp.MustCompile(` ?Default: (.*?)\.$`)

// settingRow is a flag's row in docs/settings.md.
func settingRow(f *kong.Flag) string {
	name := "--" + f.Name
	if f.PlaceHolder != "" {
		name += " " + f.PlaceHolder
	}
	help, unless := f.Help, ""
	if m := defaultSaid.FindStringSubmatch(help); m != nil {
		unless, help = m[1], strings.TrimSuffix(help, m[0])
	} else if f.Default != "" {
		unless = f.Default
	}
	live := ""
	if slices.Contains(liveSettings, f.Name) {
		live = "live"
	}
	return fmt.Sprintf("| `%s` | %s | %s | %s |\n", name, unless, live, strings.ReplaceAll(help, "|", `\|`))
}

// TestSettingsDocs: docs/settings.md has every flag, with its text from --help.
func TestSettingsDocs(t *testing.T) {
	const path = "../../docs/settings.md"
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(before)
	for _, group := range groups {
		table := "\n| flag | default | | |\n|---|---|---|---|\n"
		for _, f := range flagsOf(t) {
			if f.Group != nil && f.Group.Key == group.Key {
				table += settingRow(f)
			}
		}
		begin := regexp.MustCompile(`(?s)(<!-- ` + group.Key + `: [^\n]*-->\n).*?(\n?<!-- end -->)`)
		if !begin.MatchString(text) {
			t.Fatalf("%s has no place for the group %s", path, group.Key)
		}
		text = begin.ReplaceAllStringFunc(text, func(old string) string {
			return begin.FindStringSubmatch(old)[1] + table + "\n<!-- end -->"
		})
	}
	if text == string(before) {
		return
	}
	if !*update {
		t.Errorf("%s does not say what --help does: write it with go test ./cmd/ollama-cacheproxy -run TestSettingsDocs -update", path)
		return
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestSettingsKnown: flags that other code names exist, every flag has a group, and the file can
// set every flag but those for the command line.
func TestSettingsKnown(t *testing.T) {
	names := map[string]bool{}
	for _, f := range flagsOf(t) {
		names[f.Name] = true
		if f.Group == nil {
			t.Errorf("--%s has no group", f.Name)
		}
	}
	for _, name := range append(slices.Clone(liveSettings), ofCommandLine...) {
		if !names[name] {
			t.Errorf("there is no flag --%s", name)
		}
	}
}
