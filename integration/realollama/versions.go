package realollama

import (
	"os"
	"slices"
	"strconv"
	"strings"
)

// One version of Ollama for each of the three eras.
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

// Versions returns the versions to test: those that OLLAMA_ERAS names, or else all three. An era
// may be named by its version or its letter.
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

// Distinct returns Versions without EraB, unless that was asked for: it has the engine of EraC, and
// its API lacks only what EraA's lacks, too. It is for tests that depend on either the engine or
// the API.
func Distinct() []string {
	versions := Versions()
	if os.Getenv(erasEnv) != "" {
		return versions
	}
	return slices.DeleteFunc(versions, func(v string) bool { return v == EraB })
}

// Newest returns the newest of Versions, for tests in which eras do not differ.
func Newest() string {
	versions := Versions()
	for _, v := range []string{EraC, EraB} {
		if slices.Contains(versions, v) {
			return v
		}
	}
	return versions[0]
}

// Version returns the version that an era's name means: a letter from A to C in either case, or a
// version itself.
func Version(era string) string {
	letters := map[string]string{"a": EraA, "b": EraB, "c": EraC}
	if v, ok := letters[strings.ToLower(era)]; ok {
		return v
	}
	return strings.TrimPrefix(era, "v")
}

// Era returns the era of any version of Ollama, as one of EraA, EraB and EraC; versions newer than
// all of them belong to the newest. It is "" for versions before EraA, which this package does not
// support, and for a text that is no version.
func Era(version string) string {
	number, _, _ := strings.Cut(version, "-") // "0.35.0-rc1"
	parts := strings.Split(number, ".")
	if len(parts) < 2 {
		return ""
	}
	major, err := strconv.Atoi(parts[0])
	if err != nil {
		return ""
	}
	minor, err := strconv.Atoi(parts[1])
	switch {
	case err != nil, major < 0, major == 0 && minor < 24:
		return ""
	case major == 0 && minor < 30:
		return EraA
	case major == 0 && minor < 34:
		return EraB
	}
	return EraC
}

func known(version string) bool {
	return slices.Contains([]string{EraA, EraB, EraC}, version)
}
