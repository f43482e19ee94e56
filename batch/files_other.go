//go:build !unix

package batch

// lock does nothing here, where a lock would take more code than it is worth: nothing keeps two
// batches from one output.
func lock(file) error { return nil }

// syncFolder does nothing where a folder cannot be opened as a file.
func syncFolder(string) error { return nil }
