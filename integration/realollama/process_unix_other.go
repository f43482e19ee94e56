//go:build unix && !linux

package realollama

import "syscall"

// dieWithParent does nothing: only Linux offers it.
func dieWithParent(*syscall.SysProcAttr) {}

// killHome does nothing: only Linux shows the environment of other processes.
func killHome(string) {}
