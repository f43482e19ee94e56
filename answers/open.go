package answers

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
)

// Open opens the store that a setting names: "memory" (or nothing), a URL of a Valkey or Redis server
// (OpenValkey), or a folder (OpenDisk). log is where the store says that it cannot be used, and that
// it can be again; it may be nil.
func Open(target string, limits Limits, log *slog.Logger) (Store, error) {
	if err := Check(target); err != nil {
		return nil, err
	}
	switch {
	case target == "" || target == "memory":
		return NewMemory(limits), nil
	case Scheme(target) != "":
		return opened(OpenValkey(target, limits, log))
	default:
		return opened(OpenDisk(target, limits, log))
	}
}

// schemes are those of the URLs that Open takes.
var schemes = []string{"valkey", "valkeys", "redis", "rediss"}

// Scheme returns the scheme of a store that is meant to be a URL, also where its slashes are missing,
// or "" for a folder or memory.
func Scheme(target string) string {
	scheme, rest, found := strings.Cut(target, ":")
	scheme = strings.ToLower(scheme)
	if found && (strings.HasPrefix(rest, "//") || slices.Contains(schemes, scheme)) {
		return scheme
	}
	return "" // C:\answers, too
}

// Check returns what is wrong with a setting that is to be opened, as far as it can be told without
// opening it. The error does not quote a password.
func Check(target string) error {
	switch scheme := Scheme(target); {
	case scheme == "":
		return nil
	case !slices.Contains(schemes, scheme):
		return fmt.Errorf("answers cannot be stored at %s://…: it must be memory, a folder, or the"+
			" URL of a server: valkey://, valkeys://, redis:// or rediss://", scheme)
	case !strings.HasPrefix(target[len(scheme):], "://"):
		return fmt.Errorf("the address of the %s server is not a URL like %[1]s://host:6379", scheme)
	}
	return new(Valkey).parse(target)
}

// opened is a Store or nil, where the concrete nil pointer would not be nil.
func opened[S Store](s S, err error) (Store, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}
