//go:build unix

package main

import (
	"io/fs"
	"syscall"
)

// blocks is what a file takes on disk: holes take nothing.
func blocks(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int64(st.Blocks) * 512
	}
	return info.Size()
}
