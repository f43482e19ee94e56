package realollama

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstalledOllamaIsUsed: an installed Ollama that reports a version unknown to the tests is
// found beside some that cannot be used.
func TestInstalledOllamaIsUsed(t *testing.T) {
	good := goodOllama(t)
	c, told := openTestCache(t)
	place := func(name, version, serve string) string {
		path := filepath.Join(t.TempDir(), name)
		script := "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'Warning: could not connect to a running Ollama instance'; echo 'Warning: client version is " +
			version + "'; exit; }\n" + serve + "\n"
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	old := place("old", "0.12.3", "exec '"+good+`' "$@"`)
	broken := place("broken", "0.35.0", "echo no such library >&2; exit 127")
	newer := place("newer", "0.99.1-rc0", "exec '"+good+`' "$@"`)

	found, err := c.firstWorking(t.Context(), []string{"", "/nowhere/ollama", old, broken, newer})
	if err != nil {
		t.Fatal(err)
	}
	if found.Bin != newer || found.Version != "0.99.1-rc0" {
		t.Fatalf("found was %+v, want the newer one", found)
	}
	for _, want := range []string{
		old + ` is not used: it gives itself the version "0.12.3", and 0.24 or newer is needed`,
		broken + " is not used: ",
		"no such library",
	} {
		if !strings.Contains(told.String(), want) {
			t.Errorf("%q is not told:\n%s", want, told.String())
		}
	}
	if none, err := c.firstWorking(t.Context(), []string{"", old}); none != (Installed{}) || err != nil {
		t.Errorf("found was %+v, %v, want nothing", none, err)
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	if none, err := c.firstWorking(stopped, []string{newer}); none != (Installed{}) || !errors.Is(err, context.Canceled) {
		t.Errorf("after Ctrl-C found was %+v, %v", none, err)
	}

	// It runs beside the user's own server and models, and its log is read as the newest era's.
	s := Start(t, Config{Version: found.Version, Bin: found.Bin, Models: []string{"gen-llama-tiny"}})
	if s.Bin() != newer || s.Version() != found.Version || Era(s.Version()) != EraC {
		t.Errorf("the server is %s of version %s", s.Bin(), s.Version())
	}
	mark := s.Mark()
	a := generate(t, s, "gen-llama-tiny", question, 2)
	log, err := s.WaitEvaluations(t.Context(), mark, 1)
	if err != nil || len(log) != 1 || log[0].Total != a.Count || s.Loads(mark) != 1 {
		t.Errorf("its log tells of %+v and %d loads, %v; it answered with %d prompt tokens", log, s.Loads(mark), err, a.Count)
	}
}

func TestEra(t *testing.T) {
	for version, want := range map[string]string{
		"0.24.0": EraA, "0.29.9": EraA, "0.30.0-rc1": EraB, "0.33.4": EraB, "0.34.0": EraC, "0.35.0-rc1": EraC, "1.2.0": EraC,
		"0.23.9": "", "0.1.0": "", "": "", "x.y": "", "0.x": "", "-1.2": "", "0": "",
	} {
		if got := Era(version); got != want {
			t.Errorf("%q is of era %q, want %q", version, got, want)
		}
	}
}
