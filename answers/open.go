package answers

import (
	"fmt"
	"log/slog"
	"strings"
)

// Open opens the store that a setting names: "memory" (or nothing), a URL of a Valkey or Redis server
// (OpenValkey), or a folder (OpenDisk). log is where the store says that it cannot be used, and that
// it can be again; it may be nil.
func Open(target string, limits Limits, log *slog.Logger) (Store, error) {
	scheme, _, isURL := strings.Cut(target, "://")
	switch {
	case target == "" || target == "memory":
		return NewMemory(limits), nil
	case isURL:
		switch scheme {
		case "valkey", "valkeys", "redis", "rediss":
			return opened(OpenValkey(target, limits, log))
		}
		return nil, fmt.Errorf("answers cannot be stored at %s://…: it must be memory, a folder, or the"+
			" URL of a server: valkey://, valkeys://, redis:// or rediss://", scheme)
	default:
		return opened(OpenDisk(target, limits, log))
	}
}

// opened is a Store or nil, where the concrete nil pointer would not be nil.
func opened[S Store](s S, err error) (Store, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}
