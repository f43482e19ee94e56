package shared

import "time"

// SetTakeWait replaces TakeWait until the result is called. No Limits may be in use.
func SetTakeWait(wait time.Duration) (restore func()) {
	takeWait = wait
	return func() { takeWait = TakeWait }
}
