package main

import (
	"fmt"
	"log/slog"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// prewarmFile is the file of --prewarm.
type prewarmFile struct {
	settingsFile
	requests *proxy.Prewarm
}

// readPrewarm reads the file for the first time.
func readPrewarm(path string) (*prewarmFile, error) {
	f := &prewarmFile{settingsFile: settingsFile{path: path}}
	text, err := f.read()
	if err != nil {
		return nil, fmt.Errorf("--prewarm: %w", err)
	}
	if f.requests, err = proxy.ParsePrewarm(text); err != nil {
		return nil, fmt.Errorf("--prewarm %s: %w", path, err)
	}
	return f, nil
}

// reload reads the file again. If that fails, the previous requests stay.
func (f *prewarmFile) reload(logger *slog.Logger) {
	if err := f.again(f.requests.Replace); err != nil {
		logger.Error("the requests of --prewarm could not be read again: those from before stay",
			"file", f.path, "requests", f.requests.Len(), "err", err)
		return
	}
	logger.Info("requests of --prewarm read again", "file", f.path, "requests", f.requests.Len())
}
