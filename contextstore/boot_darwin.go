package contextstore

import "syscall"

// bootID returns a value that differs after each start of the machine, or "" if it is not known.
func bootID() string {
	id, _ := syscall.Sysctl("kern.bootsessionuuid")
	return id
}
