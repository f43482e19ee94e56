package discover

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// watch runs Watch until the test or stop ends it, and returns what it finds.
func watch(t *testing.T, s Source) (found chan []string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	found = make(chan []string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Watch(ctx, func(addrs []string) { found <- addrs })
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return found, stop
}

// until waits until exactly these addresses are found.
func until(t *testing.T, found chan []string, want ...string) {
	t.Helper()
	limit := time.After(30 * time.Second)
	var last []string
	for {
		select {
		case last = <-found:
			if len(last) == len(want) && equal(last, want) {
				return
			}
		case <-limit:
			t.Fatalf("found %v, want %v", last, want)
		}
	}
}

func equal(a, b []string) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
