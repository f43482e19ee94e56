//go:build unix

package proxy

import (
	"math"
	"syscall"
)

// descriptorLimit returns how many files the process may have open. Go's os package has raised it
// at the start, as far as the hard limit allows.
func descriptorLimit() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0
	}
	return int(min(uint64(l.Cur), math.MaxInt32))
}
