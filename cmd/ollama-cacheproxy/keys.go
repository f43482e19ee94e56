package main

import (
	"fmt"
	"log/slog"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// keysFile is --api-keys-file.
type keysFile struct {
	settingsFile
	keys *proxy.Keys

	replaced func(names []string) // called with the keys' names after each reload; nil: nobody is told
}

// readKeys reads the file for the first time.
func readKeys(path string) (*keysFile, error) {
	k := &keysFile{settingsFile: settingsFile{path: path}}
	text, err := k.read()
	if err != nil {
		return nil, fmt.Errorf("--api-keys-file: %w", err)
	}
	if k.keys, err = proxy.ParseKeys(text); err != nil {
		return nil, fmt.Errorf("--api-keys-file %s: %w", path, err)
	}
	return k, nil
}

// reload reads the file again. If that fails, the keys from before stay.
func (k *keysFile) reload(logger *slog.Logger) {
	if err := k.again(k.keys.Replace); err != nil {
		logger.Error("the API keys could not be read again: those from before stay", "file", k.path, "keys", k.keys.Len(), "err", err)
		return
	}
	if k.replaced != nil {
		k.replaced(k.keys.Names())
	}
	logger.Info("API keys read again", "file", k.path, "keys", k.keys.Len(), "admins", k.keys.Admins())
}

// warn says that no key may change models, where that is so: a file from before there was that right
// has none that may.
func (k *keysFile) warn(logger *slog.Logger) {
	if k.keys.Admins() == 0 {
		logger.Warn("no API key may pull, create, copy, push or delete models, or drain upstreams: add the word admin to the line of one that may, such as 'NAME KEY admin'", "file", k.path)
	}
}
