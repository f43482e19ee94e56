package answers

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
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
	case valkeyconn.Scheme(target) != "":
		return opened(OpenValkey(target, limits, log))
	default:
		return opened(OpenDisk(target, limits, log))
	}
}

// Check returns what is wrong with a setting that is to be opened, as far as it can be told without
// opening it. The error does not quote a password.
func Check(target string) error {
	scheme := valkeyconn.Scheme(target)
	if scheme == "" {
		return nil
	}
	_, err := valkeyconn.Parse(target, valkeyPrefix)
	if errors.Is(err, valkeyconn.ErrScheme) {
		return fmt.Errorf("answers cannot be stored at %s://…: it must be memory, a folder, or the URL of"+
			" a server: %w", scheme, err)
	}
	return err
}

// opened is a Store or nil, where the concrete nil pointer would not be nil.
func opened[S Store](s S, err error) (Store, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}
