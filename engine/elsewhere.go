//go:build !(linux || darwin || freebsd || netbsd || openbsd || dragonfly)

package engine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
)

var errSystem = errors.New("there is no link to the engine on " + runtime.GOOS)

// Main reports that there is no link on this system.
func Main([]string) int {
	fmt.Fprintf(os.Stderr, "ollama-cacheproxy: %v\n", errSystem)
	return 1
}

// Processes returns none on this system.
func Processes(string) ([]Process, error) { return nil, nil }

func supported() error { return errSystem }

func inode(os.FileInfo) uint64 { return 0 }

func lockFolder(string) (unlock func(), err error) { return nil, errSystem }
