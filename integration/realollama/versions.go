package realollama

import (
	"os"
	"slices"
	"strings"
)

// The versions of Ollama that stand for the three eras.
const (
	// EraA has its runners inside the ollama binary.
	EraA = "0.24.0"
	// EraB runs a llama-server per model.
	EraB = "0.33.0"
	// EraC is era B with cached token counts in its answers.
	EraC = "0.34.1"
)

// erasEnv names the eras to test, separated by spaces or commas.
const erasEnv = "OLLAMA_ERAS"

// Versions are the versions to test: those that OLLAMA_ERAS names, else all
// three. An era may be named by its version or its letter.
func Versions() []string {
	named := strings.FieldsFunc(os.Getenv(erasEnv), func(r rune) bool { return r == ',' || r == ' ' })
	if len(named) == 0 {
		return []string{EraA, EraB, EraC}
	}
	for i, name := range named {
		named[i] = Version(name)
	}
	return named
}

// Version is the version that an era's name means: a letter from A to C in
// either case, or a version itself.
func Version(era string) string {
	letters := map[string]string{"a": EraA, "b": EraB, "c": EraC}
	if v, ok := letters[strings.ToLower(era)]; ok {
		return v
	}
	return strings.TrimPrefix(era, "v")
}

func known(version string) bool {
	return slices.Contains([]string{EraA, EraB, EraC}, version)
}
