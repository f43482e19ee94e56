package realollama

import (
	"context"
	"fmt"
	"os"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// LinkConfig says which Ollama to link to the proxy, and where.
type LinkConfig struct {
	// Version is EraB or EraC, or the version of Ollama; EraA has no separate engine to link.
	Version string
	// Ollama is an installed binary to link, as FindInstalled returns it; "" finds or builds one.
	Ollama string
	// Home is the folder of the link.
	Home string
	// Program is the path of the proxy's binary.
	Program string
	// SWAFull makes the engine keep the whole context of sliding windows.
	SWAFull bool
}

// Link makes a linked Ollama in a folder, and returns the path of its binary, for Config.Bin. The
// original, which is given, cached or built, is not changed.
func Link(ctx context.Context, config LinkConfig) (string, error) {
	original := config.Ollama
	if original == "" {
		c, err := OpenCache(os.Stderr)
		if err != nil {
			return "", err
		}
		if original, err = c.Ollama(ctx, config.Version); err != nil {
			return "", err
		}
	}
	info, err := engine.Link(engine.LinkOptions{
		Ollama: original, Home: config.Home, Program: config.Program, SWAFull: config.SWAFull,
	})
	if err != nil {
		return "", fmt.Errorf("linking ollama %s: %w", config.Version, err)
	}
	return info.Start(), nil
}
