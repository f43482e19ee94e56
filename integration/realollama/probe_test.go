package realollama

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// brokenOllama is the newest Ollama with an engine that runs a shell script before it starts, which
// sees the engine's command line.
func brokenOllama(t *testing.T, c *Cache, script string) (bin string) {
	t.Helper()
	good, err := c.Ollama(t.Context(), EraC)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bin = filepath.Join(dir, "bin", "ollama")
	engine := filepath.Join(dir, "lib", "ollama", "llama-server")
	real := filepath.Join(filepath.Dir(good), "..", "lib", "ollama", "llama-server")
	script = "#!/bin/sh\n" + script + "\nexec " + real + ` "$@"` + "\n"
	if err := linkOrCopy(good, bin); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(engine, strings.NewReader(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return bin
}

// TestProbeOfAnEngineThatDiesOfQuantizedWeights is the case of a Xeon with AMX that the kernel does
// not permit: the engine answers from single precision, and dies of Q4_1.
func TestProbeOfAnEngineThatDiesOfQuantizedWeights(t *testing.T) {
	c, err := OpenCache(t.Output())
	if err != nil {
		t.Fatal(err)
	}
	var log lines
	bin := brokenOllama(t, c, `for model; do [ "$before" = --model ] && head -c 1000 "$model" | grep -q Q4_1 && kill -ILL $$; before=$model; done`)
	err = c.probe(t.Context(), EraC, bin, &log)
	if err == nil {
		t.Fatal("the probe passes an engine that dies of quantized weights")
	}
	for _, want := range []string{"gen-llama-q4_1", "Q4_1 weights", "SIGILL", "kernel does not permit"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	checkQuotation(t, err.Error())
	if !strings.Contains(log.String(), "starting llama-server") {
		t.Errorf("the server's log is not kept: %s", log.String())
	}
}

// TestProbeIsRepeatedForAnotherEngine has a binary that was probed be probed anew when its engine is
// another file.
func TestProbeIsRepeatedForAnotherEngine(t *testing.T) {
	t.Setenv("OLLAMA_BIN_0_34_1", "")
	c, err := OpenCache(t.Output())
	if err != nil {
		t.Fatal(err)
	}
	bin := brokenOllama(t, c, "")
	if err := c.probed(t.Context(), EraC, bin); err != nil {
		t.Fatal(err)
	}
	engine := filepath.Join(filepath.Dir(bin), "..", "lib", "ollama", "llama-server")
	if err := os.WriteFile(engine, []byte("#!/bin/sh\nkill -SEGV $$\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := c.probed(t.Context(), EraC, bin); err == nil || !strings.Contains(err.Error(), "SIGSEGV") {
		t.Errorf("an engine that dies at once gave %v", err)
	}
}

func TestSignalIn(t *testing.T) {
	for log, want := range map[string]string{
		"llama-server exited: signal: illegal instruction (core dumped)":                    "SIGILL",
		"SIGILL: illegal instruction":                                                       "SIGILL",
		"fatal error: unexpected signal\n[signal SIGSEGV: segmentation violation code=0x1]": "SIGSEGV",
		"Illegal instruction":     "SIGILL",
		"signal: killed":          "SIGKILL",
		"model requires a signal": "",
	} {
		if got := signalIn(log); got != want {
			t.Errorf("%q tells of %q, want %q", log, got, want)
		}
	}
}

// checkQuotation holds an error to what it may quote of a program's output.
func checkQuotation(t *testing.T, text string) {
	t.Helper()
	lines := strings.Split(text, "\n")
	if len(lines) > quotedLines+2 {
		t.Errorf("the error has %d lines:\n%s", len(lines), text)
	}
	for _, line := range lines[1:] { // the first one is ours
		if len(line) > quotedWidth {
			t.Errorf("a line of the error has %d bytes: %s", len(line), line)
		}
	}
}
