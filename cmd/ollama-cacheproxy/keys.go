package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// keysEvery is how often the file of the API keys is looked at.
const keysEvery = 2 * time.Second

// keysFile is --api-keys-file.
type keysFile struct {
	path string
	keys *proxy.Keys
	seen fs.FileInfo // of what was read last; nil: it could not be found
	err  error       // why it could not be read last

	replaced func(names []string) // called with the keys' names after each reload; nil: nobody is told
}

// readKeys reads the file for the first time.
func readKeys(path string) (*keysFile, error) {
	k := &keysFile{path: path}
	text, err := k.read()
	if err != nil {
		return nil, fmt.Errorf("--api-keys-file: %w", err)
	}
	if k.keys, err = proxy.ParseKeys(text); err != nil {
		return nil, fmt.Errorf("--api-keys-file %s: %w", path, err)
	}
	return k, nil
}

// read notes how the file looks before it reads it: what is written meanwhile is read once more.
func (k *keysFile) read() (string, error) {
	k.seen, _ = os.Stat(k.path)
	text, err := os.ReadFile(k.path)
	return string(text), err
}

// changed reports whether the file is not the one that was read.
func (k *keysFile) changed() bool {
	now, err := os.Stat(k.path)
	if err != nil || k.seen == nil {
		return (err == nil) != (k.seen != nil)
	}
	return !os.SameFile(now, k.seen) || now.Size() != k.seen.Size() || !now.ModTime().Equal(k.seen.ModTime())
}

// reload reads the file again. If that fails, the keys from before stay.
func (k *keysFile) reload(logger *slog.Logger) {
	var text string
	if now, err := os.Stat(k.path); err == nil && !now.Mode().IsRegular() {
		k.seen, k.err = now, errors.New("it is no file any more") // to read a pipe may never end
	} else if text, k.err = k.read(); k.err == nil {
		k.err = k.keys.Replace(text)
	}
	if k.err != nil {
		logger.Error("the API keys could not be read again: those from before stay", "file", k.path, "keys", k.keys.Len(), "err", k.err)
		return
	}
	if k.replaced != nil {
		k.replaced(k.keys.Names())
	}
	logger.Info("API keys read again", "file", k.path, "keys", k.keys.Len())
}

// readable reports whether the file, which could not be opened, can be now: that somebody was let at it changes neither its
// length nor its time.
func (k *keysFile) readable() bool {
	if !errors.Is(k.err, fs.ErrPermission) {
		return false
	}
	f, err := os.Open(k.path)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// watch reads the keys again when the file has changed, and at each signal, until ctx ends. k is nil if no keys are asked for.
func (k *keysFile) watch(ctx context.Context, signals <-chan os.Signal, logger *slog.Logger) {
	tick := time.NewTicker(keysEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
			if k == nil {
				logger.Info("SIGHUP: there is no --api-keys-file to read again")
				continue
			}
			k.reload(logger)
		case <-tick.C:
			if k != nil && (k.changed() || k.readable()) {
				k.reload(logger)
			}
		}
	}
}
