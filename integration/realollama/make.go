package realollama

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Made describes an entry of the cache that another package makes.
type Made struct {
	Name     string   // begins the entry's folder name: no slashes
	Inputs   []string // everything that the result depends on
	Announce string   // what is done and how long it takes
	// Megabytes is the approximate size of the result, for the progress; zero: none is shown.
	Megabytes int64
	// Make fills the folder result. run runs a command in a folder ("" is scratch space), with its
	// output in a log that an error names and quotes.
	Make func(ctx context.Context, result string, run func(dir string, args ...string) error) error
}

// Ensure returns the entry's folder. It is made once, complete or not at all, by one of the
// processes that ask for it.
func (c *Cache) Ensure(ctx context.Context, m Made) (string, error) {
	return c.ensure(ctx, recipe{
		name: m.Name, inputs: m.Inputs, announce: m.Announce,
		make: func(ctx context.Context, b *build) error {
			if m.Megabytes > 0 {
				b.follow(bytesUnder(m.Megabytes, b.Result))
			}
			return m.Make(ctx, b.Result, func(dir string, args ...string) error { return b.run(ctx, command{dir: dir, args: args}) })
		},
	})
}

// PythonEnv returns the interpreter of a virtual environment that has the packages of requirements,
// in pip's format. They take about that many MB on disk.
func (c *Cache) PythonEnv(ctx context.Context, name, requirements string, megabytes int64) (string, error) {
	dir, err := c.ensure(ctx, recipe{
		name:     "python-" + name,
		inputs:   []string{requirements, pythonVersion()},
		announce: fmt.Sprintf("installing the Python packages for %s (%d MB on disk)", name, megabytes),
		make: func(ctx context.Context, b *build) error {
			file := filepath.Join(b.Work, "requirements.txt")
			if err := os.WriteFile(file, []byte(requirements), 0o644); err != nil {
				return fmt.Errorf("writing the requirements: %w", err)
			}
			python, err := b.venv(ctx, filepath.Join(b.Result, "venv"))
			if err != nil {
				return err
			}
			b.follow(bytesUnder(megabytes, b.Result, b.Work))
			return b.run(ctx, command{env: []string{"TMPDIR=" + b.Work}, args: []string{
				python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", file,
			}})
		},
	})
	if err != nil {
		return "", err
	}
	return venvPython(filepath.Join(dir, "venv")), nil
}
