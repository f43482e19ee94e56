package schedule

import "testing"

// TestUntoldLanes: where answers tell nothing of time, requests are not sent one at a time for ever; and if some tell that
// there is one slot, there is one lane.
func TestUntoldLanes(t *testing.T) {
	var a learner
	lanes := 1
	for i := range 3 * untoldMost {
		lanes = a.learn(&item{full: lanes}, Result{Answered: true}, lanes, true)
		if want := 1; i+1 < untoldMost && lanes != want || i+1 >= untoldMost && lanes != untoldLanes {
			t.Fatalf("%d lanes after %d answers that tell nothing", lanes, i+1)
		}
	}
	for range 20 {
		lanes = a.learn(&item{full: lanes}, Result{Answered: true, Timed: true, Queue: 1e9, Prompt: 1e8, Eval: 1e8}, lanes, true)
	}
	if lanes != 1 {
		t.Errorf("%d lanes although requests wait inside", lanes)
	}
}
