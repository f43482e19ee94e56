package answers

import "time"

// SetDiskFirstWait makes Disks opened from now on try a disk that failed again after this time.
func SetDiskFirstWait(wait time.Duration) { diskFirstWait = wait }

// SetGetWait replaces GetWait until the result is called. No Valkey may be in use.
func SetGetWait(wait time.Duration) (restore func()) {
	getWait = wait
	return func() { getWait = GetWait }
}
