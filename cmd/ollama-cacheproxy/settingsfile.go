package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"time"
)

// filesEvery is how often settings files are checked for changes.
const filesEvery = 2 * time.Second

// settingsFile is a file that is read again when it changes.
type settingsFile struct {
	path string
	seen fs.FileInfo // of the file when last read; nil: it could not be found
	err  error       // of the last attempt to read it
}

// read notes the file's state before it reads it, so that a change during reading causes another.
func (f *settingsFile) read() (string, error) {
	f.seen, _ = os.Stat(f.path)
	text, err := os.ReadFile(f.path)
	return string(text), err
}

// again reads the file once more and passes its text to take.
func (f *settingsFile) again(take func(text string) error) error {
	var text string
	if now, err := os.Stat(f.path); err == nil && !now.Mode().IsRegular() {
		f.seen, f.err = now, errors.New("it is no file any more") // reading a pipe may never end
	} else if text, f.err = f.read(); f.err == nil {
		f.err = take(text)
	}
	return f.err
}

// due reports whether the file is to be read again.
func (f *settingsFile) due() bool { return f.changed() || f.readable() }

// changed reports whether the file is not the one that was read.
func (f *settingsFile) changed() bool {
	now, err := os.Stat(f.path)
	if err != nil || f.seen == nil {
		return (err == nil) != (f.seen != nil)
	}
	return !os.SameFile(now, f.seen) || now.Size() != f.seen.Size() ||
		!now.ModTime().Equal(f.seen.ModTime())
}

// readable reports whether the file, which could not be opened, can be opened now: new permissions
// change neither its length nor its time.
func (f *settingsFile) readable() bool {
	if !errors.Is(f.err, fs.ErrPermission) {
		return false
	}
	file, err := os.Open(f.path)
	if err != nil {
		return false
	}
	file.Close()
	return true
}

// reloader is a settings file.
type reloader interface {
	due() bool
	reload(*slog.Logger)
}

// watchFiles reads files again when they have changed, and at each signal, until ctx ends.
func watchFiles(
	ctx context.Context, signals <-chan os.Signal, logger *slog.Logger, files ...reloader,
) {
	tick := time.NewTicker(filesEvery)
	defer tick.Stop()
	for {
		hangup := false
		select {
		case <-ctx.Done():
			return
		case <-signals:
			if hangup = true; len(files) == 0 {
				logger.Info("SIGHUP: there is no file of settings to read again (--config, --api-keys-file, --prewarm, --tls-cert)")
			}
		case <-tick.C:
		}
		for _, f := range files {
			if hangup || f.due() {
				f.reload(logger)
			}
		}
	}
}
