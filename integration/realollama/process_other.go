//go:build !unix

package realollama

import (
	"errors"
	"os"
	"os/exec"
)

var errNotUnix = errors.New("real Ollama servers are only run on Unix-like systems")

func tryLock(*os.File) (bool, error) { return false, errNotUnix }

func ownGroup(*exec.Cmd) {}

func terminate(int) {}

func killGroup(int) {}

func groupGone(int) bool { return true }

func alive(int) bool { return false }

func killHome(string) {}
