package realollama

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

// probeModels have the types of weights that the tests' models have. For each type the engine has
// separate routines, for one token and for a batch, and each of them may use instructions that this
// machine does not permit.
var probeModels = []string{"gen-llama-tiny", "gen-llama-q4_1", "gen-llama-q4_k_m", "gen-llama-q8_0"}

// probePrompt has at least probeBatch tokens, more than any routine's smallest batch.
const probeBatch = 64

var probePrompt = strings.Repeat("the document is about the town and the world ", 8)

// probed probes a binary once, for as long as it, its engine and the machine do not change.
func (c *Cache) probed(ctx context.Context, version, bin string) error {
	inputs, err := probeInputs(version, bin, host())
	if err != nil {
		return err
	}
	_, err = c.ensure(ctx, recipe{
		name:     "probe-" + version,
		inputs:   inputs,
		announce: fmt.Sprintf("trying ollama %s with each type of weights", version),
		make: func(ctx context.Context, b *build) error {
			return c.probe(ctx, version, bin, b.log)
		},
	})
	return err
}

// probeInputs returns what a probe's outcome depends on: the program, its engine, and the machine.
func probeInputs(version, bin, host string) ([]string, error) {
	inputs := []string{"probe 2", bin, host, strings.Join(probeModels, " ")}
	if Era(version) != EraA {
		inputs = append(inputs, pythonVersion()) // which runs the prebuilt engine
	}
	for _, path := range []string{bin, filepath.Join(filepath.Dir(bin), "..", "lib", "ollama", "llama-server")} {
		info, err := os.Stat(path)
		if err != nil {
			if path == bin {
				return nil, fmt.Errorf("looking at %s: %w", bin, err)
			}
			continue // era A has no such file, and installed ones may have it in another place
		}
		inputs = append(inputs, info.ModTime().String(), strconv.FormatInt(info.Size(), 10))
	}
	return inputs, nil
}

// probe makes a binary load a model of each type of weights, evaluate a batch, and generate. The
// server's log is copied to log.
func (c *Cache) probe(ctx context.Context, version, bin string, log io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	s, err := c.run(ctx, bin, Config{Version: version, Models: probeModels, MaxLoaded: 1}, log)
	if err != nil {
		return fmt.Errorf("probing %s:\nit %s:\n%w", bin, ended(err.Error()), err)
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

// probeError says with which weights a server failed, and how.
func probeError(bin, model string, err error, log string) error {
	m, findErr := findModel(model)
	if findErr != nil {
		return findErr
	}
	return fmt.Errorf("probing %s:\nat the model %s (%s weights) its engine %s:\n%w\n%s", bin, model, m.quantized, ended(log+err.Error()), err, Quote(log))
}

// ended says how the program that wrote a log ended.
func ended(log string) string {
	switch signal := signalIn(log); signal {
	case "":
		return "failed"
	case "SIGILL":
		return "died of SIGILL (an instruction that this processor lacks or its kernel does not permit)"
	default:
		return "died of " + signal
	}
}

// signalText matches how Ollama, Go's runtime and shells name the signal that ended a process.
var signalText = regexp.MustCompile(`\b(SIG(?:ILL|SEGV|BUS|ABRT|FPE|KILL))\b|(?i:(illegal instruction|segmentation (?:fault|violation)|bus error|floating point exception)|signal: (aborted|killed))`)

var signalNames = map[string]string{
	"illegal instruction": "SIGILL", "segmentation fault": "SIGSEGV", "segmentation violation": "SIGSEGV", "bus error": "SIGBUS",
	"floating point exception": "SIGFPE", "aborted": "SIGABRT", "killed": "SIGKILL",
}

// signalIn returns the name of the last signal in a log, or "".
func signalIn(log string) string {
	all := signalText.FindAllStringSubmatch(log, -1)
	if len(all) == 0 {
		return ""
	}
	m := all[len(all)-1]
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
	var told struct {
		Response string
		Prompt   int `json:"prompt_eval_count"`
		Tokens   int `json:"eval_count"`
	}
	if err := json.Unmarshal(answer, &told); resp.StatusCode != http.StatusOK || err != nil ||
		told.Prompt < probeBatch || told.Tokens != 2 || told.Response == "" {
		return errors.New(shorten(fmt.Sprintf("it answered %s: %s", resp.Status, bytes.TrimSpace(answer)), quotedWidth))
	}
	return nil
}
