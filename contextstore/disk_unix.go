//go:build unix

package contextstore

import (
	"errors"
	"os"
	"syscall"
)

// lock takes the lock of a folder, without waiting. The process's end releases it.
func lock(f *os.File) error {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return ErrLocked
	}
	return err
}

// diskFree returns how many bytes of the folder's disk are available to users other than root, or
// an error if nothing can be written there at all.
func diskFree(dir string) (int64, error) {
	const writable = 2 // W_OK
	if err := syscall.Access(dir, writable); err != nil {
		return 0, &os.PathError{Op: "write to", Path: dir, Err: err}
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

// syncFolder syncs the names in a folder to the disk.
func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	// Some file systems do not support it.
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) &&
		!errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}
