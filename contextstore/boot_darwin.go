package contextstore

import "syscall"

// bootID returns what is another after each start of the machine; "" where that is not known.
func bootID() string {
	id, _ := syscall.Sysctl("kern.bootsessionuuid")
	return id
}
