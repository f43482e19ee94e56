package realollama

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// probeModels have the types of weights that the tests' models have. Each type has routines of its
// own in the engine, for one token and for a batch, and each of them can use instructions that this
// machine does not permit.
var probeModels = []string{"gen-llama-tiny", "gen-llama-q4_1", "gen-llama-q4_k_m", "gen-llama-q8_0"}

// probePrompt has more tokens than any routine's smallest batch.
var probePrompt = strings.Repeat("the document is about the town and the world ", 8)

// probed probes a binary once, for as long as it, its engine and the machine stay as they are.
func (c *Cache) probed(ctx context.Context, version, bin string) error {
	inputs := []string{bin, host(), strings.Join(probeModels, " ")}
	for _, path := range []string{bin, filepath.Join(filepath.Dir(bin), "..", "lib", "ollama", "llama-server")} {
		info, err := os.Stat(path)
		if err != nil {
			if path == bin {
				return fmt.Errorf("looking at %s: %w", bin, err)
			}
			continue // era A has no such file, and installed ones may have it elsewhere
		}
		inputs = append(inputs, info.ModTime().String(), strconv.FormatInt(info.Size(), 10))
	}
	_, err := c.ensure(ctx, recipe{
		name:     "probe-" + version,
		inputs:   inputs,
		announce: fmt.Sprintf("trying ollama %s with each type of weights", version),
		make: func(ctx context.Context, b *build) error {
			return c.probe(ctx, version, bin, b.log)
		},
	})
	return err
}

// probe has a binary load a model of each type of weights, evaluate a batch, and generate. The
// server's log is copied to log.
func (c *Cache) probe(ctx context.Context, version, bin string, log io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	s, err := c.run(ctx, bin, Config{Version: version, Models: probeModels, MaxLoaded: 1}, log)
	if err != nil {
		return fmt.Errorf("probing %s: %w", bin, err)
	}
	defer s.Stop()
	for _, name := range probeModels {
		mark := s.Mark()
		if err := fewTokens(ctx, s, name); err != nil {
			return probeError(bin, name, err, s.logSince(mark))
		}
	}
	return nil
}

// probeError says which weights a server failed with, and how.
func probeError(bin, model string, err error, log string) error {
	how := "failed"
	if signal := signalIn(log + err.Error()); signal != "" {
		how = "died of " + signal
		if signal == "SIGILL" {
			how += " (an instruction that this processor lacks or its kernel does not permit)"
		}
	}
	m, findErr := findModel(model)
	if findErr != nil {
		return findErr
	}
	return fmt.Errorf("probing %s: its engine %s at the model %s (%s weights): %w\n%s", bin, how, model, m.quantized, err, meaningful(log))
}

// signalText matches how Ollama, Go's runtime and shells name the signal that ended a process.
var signalText = regexp.MustCompile(`\b(SIG(?:ILL|SEGV|BUS|ABRT|FPE|KILL))\b|(?i:(illegal instruction|segmentation (?:fault|violation)|bus error|floating point exception)|signal: (aborted|killed))`)

var signalNames = map[string]string{
	"illegal instruction": "SIGILL", "segmentation fault": "SIGSEGV", "segmentation violation": "SIGSEGV", "bus error": "SIGBUS",
	"floating point exception": "SIGFPE", "aborted": "SIGABRT", "killed": "SIGKILL",
}

// signalIn is the name of the signal that a log tells of, "" if it tells of none.
func signalIn(log string) string {
	m := signalText.FindStringSubmatch(log)
	if m == nil {
		return ""
	}
	for _, words := range m[2:] {
		if name := signalNames[strings.ToLower(words)]; name != "" {
			return name
		}
	}
	return m[1]
}

func fewTokens(ctx context.Context, s *Server, model string) error {
	body, err := json.Marshal(map[string]any{
		"model": model, "prompt": probePrompt, "stream": false, "options": map[string]any{"num_predict": 2},
	})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL()+"/api/generate", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("it answered %s: %.*s", resp.Status, quotedWidth, answer)
	}
	return nil
}
