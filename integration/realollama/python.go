package realollama

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// PythonEnv returns the interpreter of a virtual environment that has the packages of requirements, in pip's format. It
// is made once and kept in the cache; size says in the announcement what to expect.
func (c *Cache) PythonEnv(ctx context.Context, name, requirements, size string) (string, error) {
	dir, err := c.ensure(ctx, pythonEnvRecipe(ctx, name, requirements, size))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "venv", "bin", "python3"), nil
}

func pythonEnvRecipe(ctx context.Context, name, requirements, size string) recipe {
	// An environment belongs to the interpreter that made it. Without one, making it says what to install.
	version, _ := exec.CommandContext(ctx, "python3", "-c", "import sys; print(sys.version, sys.base_prefix)").Output()
	return recipe{
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
	}
}
