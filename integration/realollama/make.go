package realollama

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Made describes an entry of the cache that is made by something else than this package.
type Made struct {
	Name     string   // begins the entry's folder name: no slashes
	Inputs   []string // all that the result depends on
	Announce string   // what is being done and how long it takes
	// Make fills the folder result. run runs a command in a folder ("" is scratch space), with its output in a log that an
	// error names and quotes.
	Make func(ctx context.Context, result string, run func(dir string, args ...string) error) error
}

// Ensure returns the entry's folder, which is made once, complete or not at all, by one of all processes that ask.
func (c *Cache) Ensure(ctx context.Context, m Made) (string, error) {
	return c.ensure(ctx, recipe{
		name: m.Name, inputs: m.Inputs, announce: m.Announce,
		make: func(ctx context.Context, b *build) error {
			return m.Make(ctx, b.Result, func(dir string, args ...string) error { return b.run(ctx, command{dir: dir, args: args}) })
		},
	})
}

// PythonEnv returns the interpreter of a virtual environment that has the packages of requirements, in pip's format. size
// says in the announcement what to expect.
func (c *Cache) PythonEnv(ctx context.Context, name, requirements, size string) (string, error) {
	// An environment belongs to the interpreter that made it. Without one, making it says what to install.
	version, _ := exec.CommandContext(ctx, "python3", "-c", "import sys; print(sys.version, sys.base_prefix)").Output()
	dir, err := c.ensure(ctx, recipe{
		name:     "python-" + name,
		inputs:   []string{requirements, string(version)},
		announce: "installing the Python packages for " + name + " (" + size + ")",
		make: func(ctx context.Context, b *build) error {
			if _, err := b.python(ctx); err != nil {
				return err
			}
			file := filepath.Join(b.Work, "requirements.txt")
			if err := os.WriteFile(file, []byte(requirements), 0o644); err != nil {
				return fmt.Errorf("writing the requirements: %w", err)
			}
			venv := filepath.Join(b.Result, "venv")
			if err := b.run(ctx, command{args: []string{"python3", "-m", "venv", venv}}); err != nil {
				return err
			}
			return b.run(ctx, command{args: []string{filepath.Join(venv, "bin", "python3"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", file}})
		},
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "venv", "bin", "python3"), nil
}
