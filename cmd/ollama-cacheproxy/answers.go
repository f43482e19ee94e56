package main

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// openAnswers opens the store of --answers-store. A folder that cannot be used for now, since
// another process has it or the disk is broken, is replaced by memory: requests go on.
func (s *serveCmd) openAnswers(log *slog.Logger) (answers.Store, error) {
	limits := answers.Limits{Bytes: s.AnswersBytes, Age: s.AnswersTTL}
	store, err := answers.Open(s.AnswersStore, limits, log)
	switch {
	case errors.Is(err, answers.ErrInUse) || brokenDisk(err):
		log.Warn("answers are kept in memory alone until a restart", "err", err)
		return answers.NewMemory(limits), nil
	case err != nil:
		return nil, valkeyconn.Wrong("--answers-store", s.AnswersStore, err)
	}
	return store, nil
}

// checkAnswers checks the store.
func (s *serveCmd) checkAnswers() error {
	if err := answers.Check(s.AnswersStore); err != nil {
		return valkeyconn.Wrong("--answers-store", s.AnswersStore, err)
	}
	return nil
}

// aboutAnswers explains in a few words what is kept, for --check.
func (s *serveCmd) aboutAnswers(set settings) string {
	long := "for ever"
	if s.AnswersTTL > 0 {
		long = "for " + s.AnswersTTL.String()
	}
	shared := "each API key has its own"
	if s.AnswersShared {
		shared = "shared by all API keys"
	}
	return fmt.Sprintf("%v; vectors %v; kept in %s, at most %d MiB, %s, %s",
		set.cached, set.vectors, valkeyconn.Redacted(s.AnswersStore), s.AnswersBytes>>20, long, shared)
}
