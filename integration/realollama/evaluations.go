package realollama

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Mark is a place in a server's log.
type Mark int64

// Evaluation is the server's log of one prompt: the only ground truth of reuse. Eras B and C log it
// at the end of an answer, and not for aborted requests and embeddings; era A logs it before the
// evaluation.
type Evaluation struct {
	// Total is the number of the prompt's tokens, 0 if the log does not say.
	Total int
	// Reused is how many of them a slot's cache had.
	Reused int
	// Evaluated is how many of them were computed.
	Evaluated int
}

// Mark returns the current end of the log.
func (s *Server) Mark() Mark {
	info, err := os.Stat(s.path("server.log"))
	if err != nil {
		return 0
	}
	return Mark(info.Size())
}

// Log returns the whole log so far; "" once the server is stopped.
func (s *Server) Log() string { return s.logSince(0) }

// logSince returns the log from a mark on, without an incomplete last line.
func (s *Server) logSince(since Mark) string {
	f, err := os.Open(s.path("server.log"))
	if err != nil {
		return ""
	}
	defer f.Close()
	content, err := io.ReadAll(io.NewSectionReader(f, int64(since), 1<<40))
	if err != nil {
		return ""
	}
	return string(content[:bytes.LastIndexByte(content, '\n')+1])
}

// Evaluations returns the prompts in the log from a mark on, in the log's order. The log may lag
// behind an answer: see WaitEvaluations.
func (s *Server) Evaluations(since Mark) []Evaluation {
	return parseEvaluations(s.logSince(since))
}

// WaitEvaluations waits until the log has n prompts from a mark on, and returns all that it has by
// then. It fails when ctx ends or after a minute.
func (s *Server) WaitEvaluations(ctx context.Context, since Mark, n int) ([]Evaluation, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		got := s.Evaluations(since)
		if len(got) >= n {
			return got, nil
		}
		select {
		case <-ctx.Done():
			return got, fmt.Errorf("waiting for %d evaluations in the log of ollama %s, which has %d: %w", n, s.Version(), len(got), ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

// Begun returns the prompts whose evaluation an engine of eras B and C has begun, from a mark on,
// in the log's order. It includes aborted ones, embeddings, and those whose engine ended before it
// had written its last line.
func (s *Server) Begun(since Mark) []Evaluation { return parseBegun(s.logSince(since)) }

// Loads returns the number of model loads in the log from a mark on, including failed ones. Loads
// of the same model with other options count.
func (s *Server) Loads(since Mark) int { return countLoads(s.logSince(since)) }

var (
	// Era A: the line of a runner, before it evaluates.
	cacheSlotLine = regexp.MustCompile(`msg="loading cache slot" .*\bprompt=(\d+) used=(\d+) remaining=(\d+)`)
	// Eras B and C: the lines of a llama-server. Requests of one slot follow
	// each other.
	newPromptLine = regexp.MustCompile(`id +(\d+) \| task +(\d+) \| new prompt,.* task\.n_tokens = (\d+)`)
	cachedLine    = regexp.MustCompile(`id +(\d+) \| task +(\d+) \| cached n_tokens = (\d+), memory_seq_rm`)
	timingLine    = regexp.MustCompile(`id +(\d+) \| task +(\d+) \|`)
	evaluatedLine = regexp.MustCompile(`prompt eval time = .* ms / +(\d+) tokens`)
)

func parseEvaluations(log string) []Evaluation {
	var all []Evaluation
	// Each llama-server numbers its own tasks, so tasks of two models may have the same number at
	// the same time.
	totals := map[string][]int{}
	task := ""
	for line := range strings.Lines(log) {
		if m := cacheSlotLine.FindStringSubmatch(line); m != nil {
			all = append(all, Evaluation{Total: number(m[1]), Reused: number(m[2]), Evaluated: number(m[3])})
			continue
		}
		if m := newPromptLine.FindStringSubmatch(line); m != nil {
			key := m[1] + "/" + m[2]
			totals[key] = append(totals[key], number(m[3]))
			continue
		}
		// Some builds have the slot and the task in the line before.
		if m := timingLine.FindStringSubmatch(line); m != nil {
			task = m[1] + "/" + m[2]
		}
		if m := evaluatedLine.FindStringSubmatch(line); m != nil {
			e := Evaluation{Evaluated: number(m[1])}
			if known := totals[task]; len(known) > 0 {
				e.Total, totals[task] = known[0], known[1:]
				e.Reused = e.Total - e.Evaluated
			}
			all = append(all, e)
		}
	}
	return all
}

func parseBegun(log string) []Evaluation {
	var all []Evaluation
	totals := map[string]int{} // of prompts whose reused tokens are not known yet
	for line := range strings.Lines(log) {
		if m := newPromptLine.FindStringSubmatch(line); m != nil {
			totals[m[1]+"/"+m[2]] = number(m[3])
		} else if m := cachedLine.FindStringSubmatch(line); m != nil {
			// A long prompt has one such line for each part.
			if total, ok := totals[m[1]+"/"+m[2]]; ok {
				delete(totals, m[1]+"/"+m[2])
				all = append(all, Evaluation{Total: total, Reused: number(m[3]), Evaluated: total - number(m[3])})
			}
		}
	}
	return all
}

// loadLine is what a server logs when it starts the process of a model: a runner
// of era A, a llama-server since. Era A also starts runners to find GPUs, whose
// command names no model.
var loadLine = regexp.MustCompile(`msg="starting (runner|llama-server)" cmd=.* --model `)

func countLoads(log string) int {
	n := 0
	for line := range strings.Lines(log) {
		if loadLine.MatchString(line) {
			n++
		}
	}
	return n
}

// number is the value of digits that a pattern has matched.
func number(digits string) int {
	n, err := strconv.Atoi(digits)
	if err != nil {
		panic("realollama: a pattern for digits matched " + digits)
	}
	return n
}
