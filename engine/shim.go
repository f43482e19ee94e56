//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Main is the program under the name llama-server, called with os.Args. It becomes the installed
// llama-server and does not return unless there is none; then it returns an exit status. Anything
// else that goes wrong costs only the stored contexts, which a line on stderr reports, and not the
// answer.
func Main(args []string) int {
	home, err := homeOf(args[0])
	if err != nil {
		complain("finding the installed llama-server: %v", err)
		return 1
	}
	original, rest := filepath.Join(home, originalEngine), args[1:]
	// A path leads to the engine, so that even a damaged link.json does no harm.
	original, err = filepath.EvalSymlinks(original)
	if err != nil {
		complain("the installed llama-server is not there any more: %v; "+
			"link anew: ollama-cacheproxy engine link --to %s", err, home)
		return 1
	}
	if startsModel(rest) {
		if more, err := prepare(home, rest); err != nil {
			complain("stored contexts are off for this model: %v", err)
		} else {
			rest = more
		}
	}
	err = syscall.Exec(original, append([]string{original}, rest...), os.Environ())
	complain("starting the installed llama-server, %s: %v", original, err)
	return 1
}

func complain(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "ollama-cacheproxy: "+format+"\n", args...)
}

// homeOf returns the link's folder, from the name under which this program was called: it is
// lib/ollama/llama-server in that folder.
func homeOf(name string) (string, error) {
	if !filepath.IsAbs(name) {
		exe, err := os.Executable()
		if err != nil {
			return "", err
		}
		name = exe
	}
	return filepath.Dir(filepath.Dir(filepath.Dir(filepath.Clean(name)))), nil
}

// prepare writes the note of the engine that is started with args, and returns the arguments that
// it should get.
func prepare(home string, args []string) (more []string, err error) {
	defer func() {
		if bug := recover(); bug != nil {
			more, err = nil, fmt.Errorf("a bug: %v", bug)
		}
	}()
	l, err := readLink(home)
	if err != nil {
		return nil, err
	}
	if why := l.changed(); why != "" {
		return nil, errors.New(why + "; link anew: " + l.Command("ollama-cacheproxy"))
	}
	environ := os.Environ()
	p := parse(args, environ)
	added := []string{}
	if p.SaveFolder != "" {
		p.Elsewhere = true
	} else {
		folder := ContextsFolder(home)
		if err := usable(folder); err != nil {
			return nil, err
		}
		// The engine itself would add the slash.
		p.SaveFolder = folder
		added = append(added, "--slot-save-path", folder+string(filepath.Separator))
	}
	if l.SWAFull && !p.SWAFull {
		p.SWAFull = true
		added = append(added, "--swa-full")
	}
	weights := blobs(p.Model)
	p.Model = weights[0]
	p.Decisive = append(p.Decisive, baseNames(weights[1:])...)
	if turnsByContext(p.Model) {
		p.Decisive = append(p.Decisive, fmt.Sprintf("positions by a context of %d", p.ContextEach))
	}
	p.PID, p.Started = os.Getpid(), time.Now()
	p.Server = serverAddr(os.Getenv("OLLAMA_HOST"))
	p.Build, p.Version = l.Build, l.Version
	if err := writeNote(home, p); err != nil {
		return nil, err
	}
	// States contain what people wrote.
	syscall.Umask(0o077)
	return append(append([]string{}, args...), added...), nil
}

// usable makes sure that a folder exists and can be written, since otherwise the engine does not
// start.
func usable(folder string) error {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	const write, search = 2, 1
	if err := syscall.Access(folder, write|search); err != nil {
		return &os.PathError{Op: "write", Path: folder, Err: err}
	}
	return nil
}

func baseNames(paths []string) []string {
	names := make([]string, len(paths))
	for i, path := range paths {
		names[i] = filepath.Base(path)
	}
	return names
}
