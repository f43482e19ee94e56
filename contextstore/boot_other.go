//go:build !darwin

package contextstore

import (
	"os"
	"strings"
)

// bootID returns what is another after each start of the machine; "" where that is not known.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // Linux has it
	return strings.TrimSpace(string(id))
}
