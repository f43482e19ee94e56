//go:build unix

package batch

import (
	"errors"
	"os"
	"syscall"
)

// lock keeps two batches from one file. The lock ends with the process.
func lock(f file) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }

func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) { // some file systems do not support it
		return err
	}
	return nil
}
