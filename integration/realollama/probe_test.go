package realollama

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// goodOllama is the newest Ollama, from the cache that all tests share.
func goodOllama(t *testing.T) string {
	t.Helper()
	c, err := OpenCache(t.Output())
	if err != nil {
		t.Fatal(err)
	}
	bin, err := c.Ollama(t.Context(), EraC)
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// brokenOllama is the newest Ollama with an engine that first runs a shell script, which gets the
// engine's command line.
func brokenOllama(t *testing.T, script string) (bin string) {
	t.Helper()
	good := goodOllama(t)
	dir := t.TempDir()
	bin = filepath.Join(dir, "bin", "ollama")
	engine := filepath.Join(dir, "lib", "ollama", "llama-server")
	real := filepath.Join(filepath.Dir(good), "..", "lib", "ollama", "llama-server")
	script = "#!/bin/sh\n" + script + "\nexec '" + real + `' "$@"` + "\n"
	if err := linkOrCopy(good, bin); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(engine, strings.NewReader(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return bin
}

// TestProbeOfAnEngineThatDiesOfQuantizedWeights simulates a Xeon with AMX that the kernel does not
// permit: the engine answers with single precision, and dies with Q4_1.
func TestProbeOfAnEngineThatDiesOfQuantizedWeights(t *testing.T) {
	var log lines
	bin := brokenOllama(t, `for model; do [ "$before" = --model ] && head -c 1000 "$model" | grep -q Q4_1 && kill -ILL $$; before=$model; done`)
	c, _ := openTestCache(t)
	err := c.probe(t.Context(), EraC, bin, &log)
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

// TestProbeIsRepeatedForAnotherEngine: a binary is probed again when its engine has changed.
func TestProbeIsRepeatedForAnotherEngine(t *testing.T) {
	bin := brokenOllama(t, "")
	c, _ := openTestCache(t)
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

// TestProbeLooksAtTheAnswer: a server that answers everything with an empty 200 fails.
func TestProbeLooksAtTheAnswer(t *testing.T) {
	answers := map[string]string{
		"nothing":          `{}`,
		"no JSON":          `ok`,
		"no text":          `{"response":"","prompt_eval_count":100,"eval_count":2}`,
		"one token":        `{"response":"a","prompt_eval_count":100,"eval_count":1}`,
		"no batch":         `{"response":"ab","prompt_eval_count":1,"eval_count":2}`,
		"what is expected": `{"response":"ab","prompt_eval_count":100,"eval_count":2}`,
	}
	for name, answer := range answers {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) }))
		err := fewTokens(t.Context(), &Server{addr: server.Listener.Addr().String()}, "m")
		server.Close()
		if expected := name == "what is expected"; (err == nil) != expected {
			t.Errorf("%s: %s gave %v", name, answer, err)
		}
	}
}

// TestProbeOfWhatEndsAtOnce: a program that exits before it listens.
func TestProbeOfWhatEndsAtOnce(t *testing.T) {
	c, _ := openTestCache(t)
	bin := filepath.Join(t.TempDir(), "ollama")
	if err := os.WriteFile(bin, []byte("#!/bin/sh\nkill -ILL $$\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := c.probe(t.Context(), EraC, bin, nil); err == nil || !strings.Contains(err.Error(), "died of SIGILL") {
		t.Errorf("a program that dies at once gave %v", err)
	}
}

// TestProbeIsRepeatedOnAnotherMachine: the cache was moved.
func TestProbeIsRepeatedOnAnotherMachine(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "ollama")
	if err := os.WriteFile(bin, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	key := func(host string) string {
		inputs, err := probeInputs(EraC, bin, host)
		if err != nil {
			t.Fatal(err)
		}
		return recipe{name: "probe", inputs: inputs}.key()
	}
	here, again, there := key("EPYC"), key("EPYC"), key("Xeon")
	if here != again {
		t.Error("a probe does not hold on its own machine")
	}
	if here == there {
		t.Error("a probe holds for a processor that it was not made on")
	}
	if !strings.Contains(host(), runtime.GOARCH) || runtime.GOOS == "linux" && (processor() == "" || kernel() == "") {
		t.Errorf("the machine is told as %q", host())
	}
	if _, err := probeInputs(EraC, bin+"-gone", ""); err == nil {
		t.Error("a program that is not there can be probed")
	}
}

func TestSignalIn(t *testing.T) {
	for log, want := range map[string]string{
		"llama-server exited: signal: illegal instruction (core dumped)":                    "SIGILL",
		"SIGILL: illegal instruction":                                                       "SIGILL",
		"fatal error: unexpected signal\n[signal SIGSEGV: segmentation violation code=0x1]": "SIGSEGV",
		"Illegal instruction":     "SIGILL",
		"signal: killed":          "SIGKILL",
		"signal: killed\nSIGILL":  "SIGILL", // the previous runner was killed
		"model requires a signal": "",
	} {
		if got := signalIn(log); got != want {
			t.Errorf("%q tells of %q, want %q", log, got, want)
		}
	}
}

// checkQuotation checks the limits of what an error quotes of a program's output.
func checkQuotation(t *testing.T, text string) {
	t.Helper()
	lines := strings.Split(text, "\n")
	if len(lines) > quotedLines+2 {
		t.Errorf("the error has %d lines:\n%s", len(lines), text)
	}
	for _, line := range lines {
		if len(line) > quotedWidth {
			t.Errorf("a line of the error has %d bytes: %s", len(line), line)
		}
	}
}
