//go:build !unix

package batches

import "os"

func lockFile(*os.File) error { return nil }

func syncFolder(string) error { return nil }

func noSpace(error) bool { return false }
