package answers_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// children are what the test program does instead of its tests, by the environment variable that
// has the folder for it.
var children = map[string]func(dir string){writeForEver: writeUntilKilled}

func TestMain(m *testing.M) {
	for name, child := range children {
		if dir := os.Getenv(name); dir != "" {
			child(dir)
			return
		}
	}
	goleak.VerifyTestMain(m)
}
