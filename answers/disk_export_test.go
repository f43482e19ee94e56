package answers

import "time"

// SetDiskFirstWait makes Disks opened from now on try a disk that failed again after this time.
func SetDiskFirstWait(wait time.Duration) { diskFirstWait = wait }
