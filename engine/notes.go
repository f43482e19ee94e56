//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// The name of a note's file says when and by which process it was written. It is written in the
// folder unfinished.
const (
	noteSuffix = ".json"
	unfinished = ".new"
)

// forgottenAfter is the age at which an unfinished note is removed.
const forgottenAfter = time.Minute

// noteLimit bounds a note, in bytes. A usual one has about 600.
const noteLimit = 64 << 10

// writeNote writes the note of the engine that this process is about to become. The file stays open
// and locked, across exec too, until that engine ends. So one can see whether the engine lives
// without its pid, which another namespace does not have. A note can be read as soon as it is
// complete.
func writeNote(home string, p Process) (err error) {
	folder := notesFolder(home)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	path := filepath.Join(folder, fmt.Sprintf("%d-%d%s", p.Started.UnixNano(), p.PID, noteSuffix))
	aside := path + unfinished
	// Not os.OpenFile, whose files are closed by exec.
	fd, err := syscall.Open(aside, syscall.O_RDWR|syscall.O_CREAT|syscall.O_EXCL, 0o600)
	if err != nil {
		return &os.PathError{Op: "open", Path: aside, Err: err}
	}
	defer func() {
		if err != nil {
			err = &os.PathError{Op: "write", Path: aside, Err: err}
			err = errors.Join(err, os.Remove(aside), syscall.Close(fd))
		}
	}()
	if err := syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return err
	}
	for len(text) > 0 {
		n, err := syscall.Write(fd, text)
		if err != nil {
			return err
		}
		text = text[n:]
	}
	return os.Rename(aside, path)
}

// Processes returns the running engines of a link, the most recently started last, or none if there
// is no link. It removes the notes of engines that have ended. It takes some tens of microseconds,
// and sends no engine a request.
func Processes(home string) ([]Process, error) {
	folder := notesFolder(home)
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the notes of engines: %w", err)
	}
	var all []Process
	for _, entry := range entries {
		path := filepath.Join(folder, entry.Name())
		switch {
		case strings.HasSuffix(path, unfinished):
			if info, err := entry.Info(); err == nil && time.Since(info.ModTime()) > forgottenAfter {
				os.Remove(path)
			}
			continue
		case !strings.HasSuffix(path, noteSuffix):
			continue
		}
		p, alive, err := readNote(path)
		if err != nil {
			return nil, fmt.Errorf("reading an engine's note: %w", err)
		}
		if alive {
			p.folder = ContextsFolder(home)
			all = append(all, p)
		}
	}
	slices.SortStableFunc(all, func(a, b Process) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.PID, b.PID))
	})
	return all, nil
}

// readNote reads the note of an engine, or removes it if the engine has ended.
func readNote(path string) (p Process, alive bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return p, false, nil // removed by another reader
	}
	if err != nil {
		return p, false, err
	}
	defer f.Close()
	// A shared lock, so that readers do not take each other for the engine.
	switch err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); {
	case err == nil:
		// Another reader may have been faster; a reader without write permission leaves it.
		os.Remove(path)
		return p, false, nil
	case !errors.Is(err, syscall.EWOULDBLOCK):
		return p, false, &os.PathError{Op: "lock", Path: path, Err: err}
	}
	info, err := f.Stat()
	if err != nil || info.Size() > noteLimit {
		return p, false, errors.Join(fmt.Errorf("%s is no note", path), err)
	}
	text := make([]byte, info.Size())
	n, err := f.ReadAt(text, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return p, false, err
	}
	if err := json.Unmarshal(text[:n], &p); err != nil {
		return p, false, fmt.Errorf("%s: %w", path, err)
	}
	return p, true, nil
}
