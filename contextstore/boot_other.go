//go:build !darwin

package contextstore

import (
	"os"
	"strings"
)

// bootID returns a value that differs after each start of the machine, or "" if it is not known.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // only Linux has it
	return strings.TrimSpace(string(id))
}
