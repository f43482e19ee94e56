//go:build unix

package batch

import (
	"os"
	"syscall"
)

// lock keeps two batches from one output. The lock ends with the process.
func lock(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
