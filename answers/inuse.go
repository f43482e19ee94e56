package answers

import "errors"

// ErrInUse is in the error of OpenDisk if another process has the folder open.
var ErrInUse = errors.New("in use by another process")
