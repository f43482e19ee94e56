package main

import (
	"fmt"
	"log/slog"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// openAnswers opens the store of --answers-store.
func (s *serveCmd) openAnswers(log *slog.Logger) (answers.Store, error) {
	limits := answers.Limits{Bytes: s.AnswersBytes, Age: s.AnswersTTL}
	if s.AnswersStore != "memory" {
		return nil, fmt.Errorf("--answers-store %s: want memory", s.AnswersStore)
	}
	return answers.NewMemory(limits), nil
}
