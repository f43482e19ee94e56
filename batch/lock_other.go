//go:build !unix

package batch

import "os"

// lock cannot be had here without more code than it is worth: nothing keeps two batches from one output.
func lock(*os.File) error { return nil }
