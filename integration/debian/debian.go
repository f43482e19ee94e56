// Package debian unpacks Debian's packages into the cache, without installing them, for tests and
// benchmarks that need a program of them.
package debian

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// Nginx returns the path of nginx: the one that the variable NGINX names, the one in PATH, or else
// Debian's, unpacked into the cache.
func Nginx(ctx context.Context) (string, error) {
	for _, name := range []string{os.Getenv("NGINX"), "nginx", "/usr/sbin/nginx"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	dir, err := Unpack(ctx, "nginx", "2 MB on disk", "usr/sbin/nginx -v")
	if err != nil {
		return "", fmt.Errorf("nginx is needed, in PATH or as the variable NGINX names it; install it"+
			" (Debian: apt-get install nginx): %w", err)
	}
	return filepath.Join(dir, "usr", "sbin", "nginx"), nil
}

// Unpack unpacks a package into the cache, where check must succeed, and returns the folder.
func Unpack(ctx context.Context, name, size, check string) (dir string, err error) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", err
	}
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		return "", err
	}
	return cache.Ensure(ctx, realollama.Made{
		Name: name, Inputs: []string{"1"}, Announce: fmt.Sprintf("unpacking Debian's %s (%s)", name, size),
		Make: func(_ context.Context, result string, run func(string, ...string) error) error {
			if err := run(result, "apt-get", "download", name); err != nil {
				// The package lists are outdated or missing. Only root can update them.
				err := errors.Join(run("", "apt-get", "update"), run(result, "apt-get", "download", name))
				if err != nil {
					return err
				}
			}
			return run(result, "sh", "-c",
				fmt.Sprintf("dpkg-deb --extract %[1]s_*.deb . && rm %[1]s_*.deb && %s", name, check))
		},
	})
}
