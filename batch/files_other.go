//go:build !unix

package batch

// lock cannot be had here without more code than it is worth: nothing keeps two batches from one output.
func lock(file) error { return nil }

// syncFolder has no meaning where a folder cannot be opened as a file.
func syncFolder(string) error { return nil }
