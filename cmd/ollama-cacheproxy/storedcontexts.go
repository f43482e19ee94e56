package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// contextsLeave is how many bytes of the disk stored contexts leave free.
const contextsLeave = 2 << 30

// storedContexts opens the store of --contexts, and sets set.contexts to its manager. The caller
// closes the files, which is safe for nil.
func (s *serveCmd) storedContexts(set *settings, log *slog.Logger) (*contextstore.Files, error) {
	if s.ContextBytes < 1 || s.ContextTTL < 0 {
		return nil, exitError{2, fmt.Errorf("--context-bytes %d, --context-ttl %v: want at least 1 byte, and a time that is not negative", s.ContextBytes, s.ContextTTL)}
	}
	if s.Contexts == "" {
		return nil, nil
	}
	files, err := contextstore.OpenFiles(engine.ContextsFolder(s.Contexts), contextstore.FileLimits{
		Bytes: s.ContextBytes, TTL: s.ContextTTL, Free: contextsLeave, Share: s.ContextsShared,
	}, log)
	if errors.Is(err, contextstore.ErrLocked) {
		log.Warn("stored contexts are off: another proxy has them", "folder", s.Contexts)
		return nil, nil
	}
	if brokenDisk(err) {
		log.Warn("stored contexts are off", "err", err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("--contexts %s: %w", s.Contexts, err)
	}
	home, named := s.Contexts, atomic.Bool{}
	if told := linkState(home); told != "" {
		log.Warn("no context is stored yet: "+told, "contexts", home)
	}
	set.contexts = contexts.New(contexts.Config{
		Running: func() []contexts.Running { return running(home, log, &named) },
		Files:   files, Log: log,
	})
	return files, nil
}

// linkState returns what keeps the engines of a link from storing contexts, and what to do about
// it; "" if nothing does.
func linkState(home string) string {
	info, err := engine.Inspect(home)
	switch {
	case err != nil:
		return fmt.Sprintf("no Ollama is linked there: run 'ollama-cacheproxy engine link --to %s', and start the linked one", home)
	case info.Stale != "" && gone(info.Ollama) && gone(info.Engine):
		// It was linked in another container, which has Ollama, and from where the engines say what
		// is wrong.
		return ""
	case info.Stale != "":
		return info.Stale + fmt.Sprintf(": run 'ollama-cacheproxy engine link --to %s' again, and start the linked one", home)
	}
	return ""
}

func gone(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// aboutContexts explains --contexts in a few words, for --check.
func (s *serveCmd) aboutContexts() string {
	if s.Contexts == "" {
		return "off"
	}
	if told := linkState(s.Contexts); told != "" {
		return "off so far: " + told
	}
	return fmt.Sprintf("in %s, at most %d MiB", engine.ContextsFolder(s.Contexts), s.ContextBytes>>20)
}

// brokenDisk reports whether an error is the disk's fault, so that a restarted proxy has to do
// without contexts, and not a wrong setting.
func brokenDisk(err error) bool {
	for _, of := range []error{syscall.EROFS, syscall.ENOSPC, syscall.EDQUOT, syscall.EIO} {
		if errors.Is(err, of) {
			return true
		}
	}
	return false
}

// running returns the running engines of a link. If they cannot be listed, it logs that once, until
// they can be listed again; told remembers that.
func running(home string, log *slog.Logger, told *atomic.Bool) []contexts.Running {
	processes, err := engine.Processes(home)
	if err == nil {
		told.Store(false)
	} else if !told.Swap(true) {
		log.Warn("no context is stored or attached: the running engines cannot be told "+
			"(is Ollama another user?)", "err", err)
	}
	var list []contexts.Running
	for _, p := range processes {
		_, port, err := net.SplitHostPort(p.Server)
		n, nerr := strconv.Atoi(port)
		if err != nil || nerr != nil || p.Embeddings || p.Elsewhere {
			continue
		}
		list = append(list, contexts.Running{
			Engine: p, ID: fmt.Sprintf("%d %d %d", p.PID, p.Port, p.Started.UnixNano()), Port: n,
			Files: p.Files(), Format: p.Format(), Slots: max(p.Parallel, 1), Context: p.ContextEach,
			Full: p.SWAFull, ValueBytes: p.ValueBytes(),
		})
	}
	return list
}
