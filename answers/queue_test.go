package answers

import (
	"context"
	"testing"
	"time"
)

// TestFlushBeginsItsPass flushes a queue that does nothing by itself. Each flush returns, also if the
// queue's goroutine runs while the flush begins.
func TestFlushBeginsItsPass(t *testing.T) {
	var q *queue
	q = newQueue(1<<20, time.Hour, func() {
		q.take()
		q.finish(nil)
	})
	defer q.close()
	const some = 1000 // a slow machine has a minute for so many, not for all
	for i := range 300 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for j := range some {
			if err := q.flush(ctx); err != nil {
				t.Fatalf("flush %d: %v", i*some+j, err)
			}
		}
	}
}
