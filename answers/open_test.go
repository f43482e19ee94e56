package answers_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

func TestOpen(t *testing.T) {
	limits := answers.Limits{Bytes: 1 << 20}
	for target, want := range map[string]func(answers.Store) bool{
		"":       func(s answers.Store) bool { _, ok := s.(*answers.Memory); return ok },
		"memory": func(s answers.Store) bool { _, ok := s.(*answers.Memory); return ok },
		filepath.Join(t.TempDir(), "a b?c%d#e"): func(s answers.Store) bool {
			_, ok := s.(*answers.Disk)
			return ok
		},
		"valkey://127.0.0.1:1": func(s answers.Store) bool { _, ok := s.(*answers.Valkey); return ok },
	} {
		s, err := answers.Open(target, limits, nil)
		if err != nil || !want(s) {
			t.Errorf("%q: %T, %v", target, s, err)
			continue
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	for target, want := range map[string]string{
		"http://host":   "valkey://",
		"/dev/null/dir": "folder",
		"valkey://h/x":  "database",

		"unix://u:hunter2@/s":    "valkey://",
		"valkey:/u:hunter2@h":    "valkey://host",
		"Redis:u:hunter2@h":      "redis://host",
		"rediss://u:hunter2@h/x": "database",
	} {
		s, err := answers.Open(target, limits, nil)
		if err == nil || s != nil || !strings.Contains(err.Error(), want) ||
			strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, %v", target, s, err)
		}
	}
}
