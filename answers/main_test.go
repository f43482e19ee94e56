package answers_test

import (
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// children are what the test program does instead of its tests, by the environment variable that
// has the folder for it.
var children = map[string]func(dir string){writeForEver: writeUntilKilled}

func TestMain(m *testing.M) {
	// What is stored is found, however long a busy machine takes to read it. The tests of a disk that
	// hangs, and of a server that does, wait as long as a proxy.
	answers.SetDiskWait(time.Minute)
	answers.SetGetWait(time.Minute)
	for name, child := range children {
		if dir := os.Getenv(name); dir != "" {
			child(dir)
			return
		}
	}
	goleak.VerifyTestMain(m)
}
