package answers

import "time"

// SetDiskFirstWait makes Disks opened from now on try a disk that failed again after this time.
func SetDiskFirstWait(wait time.Duration) { diskFirstWait = wait }

// SetDiskWait replaces DiskWait until the result is called. No Disk may be read meanwhile.
func SetDiskWait(wait time.Duration) (restore func()) {
	before := diskWait
	diskWait = wait
	return func() { diskWait = before }
}

// SetGetWait replaces GetWait until the result is called. No Valkey may be read meanwhile.
func SetGetWait(wait time.Duration) (restore func()) {
	before := getWait
	getWait = wait
	return func() { getWait = before }
}

// Hang makes all reads of a Disk wait until its result is called, as those of a hung disk do.
func (d *Disk) Hang() (end func()) {
	d.dbMu.Lock()
	return d.dbMu.Unlock
}

// Overdue returns how many reads nobody waits for any more.
func (d *Disk) Overdue() int { return int(d.overdue.Load()) }

// FoundBroken notes that a write failed because the file was broken, which was replaced since. end
// ends the wait before the next one. A pass that is under way ends before it: its success would
// end the wait, too.
func (d *Disk) FoundBroken() (end func()) {
	d.dbMu.Lock()
	defer d.dbMu.Unlock()
	d.outage.Failure(errForeign)
	return d.outage.Success
}
