package batch

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// files is everything that a batch does with its files, so that tests can make each step fail.
type files interface {
	OpenFile(name string, flag int, perm fs.FileMode) (file, error)
	Rename(from, to string) error
	Remove(name string) error
	SyncFolder(path string) error // makes the files' names durable
}

// file is the part of *os.File that a batch uses.
type file interface {
	io.ReadWriteSeeker
	io.ReaderAt
	io.Closer
	Name() string
	Stat() (fs.FileInfo, error)
	Truncate(size int64) error
	Sync() error
	Fd() uintptr
}

// disk is the machine's file system.
type disk struct{}

func (disk) OpenFile(name string, flag int, perm fs.FileMode) (file, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err // a nil interface, not a nil *os.File in one
	}
	return f, nil
}

func (disk) Rename(from, to string) error { return os.Rename(from, to) }
func (disk) Remove(name string) error     { return os.Remove(name) }
func (disk) SyncFolder(path string) error { return syncFolder(path) }

// fileError names the file that is meant: after a rename the system's own error has the name under
// which it was opened.
func fileError(doing, path string, err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		err = p.Err
	}
	return fmt.Errorf("%s %s: %w", doing, path, err)
}

// folder returns the folder that really has the file, even if its name is a link.
func folder(name string) string {
	if real, err := filepath.EvalSymlinks(name); err == nil {
		return filepath.Dir(real)
	}
	dir := filepath.Dir(name)
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		return real
	}
	return dir
}

// Named is a file and its purpose.
type Named struct{ For, Name string }

// apart refuses one file for two purposes of which one is written, however its name is spelled or
// linked.
func (c *Config) apart() error {
	used := slices.Clone(c.Beside)
	for _, n := range []Named{
		{"the output", c.Output}, {"the journal", c.Output + JournalSuffix}, {"the file for errors", c.Errors},
	} {
		if n.Name == "" || n.For == "the journal" && c.Output == "-" {
			continue
		}
		for _, other := range used {
			if c.same(other.Name, n.Name) {
				return fmt.Errorf("%s %s and %s %s are one file: choose another for one of them",
					other.For, other.Name, n.For, n.Name)
			}
		}
		used = append(used, n)
	}
	return nil
}

func (c *Config) same(a, b string) bool {
	x, errA := c.stat(a)
	y, errB := c.stat(b)
	if errA == nil && errB == nil {
		return x.Mode().IsRegular() && os.SameFile(x, y)
	}
	return errA != nil && errB != nil && target(a) == target(b)
}

func (c *Config) stat(name string) (fs.FileInfo, error) {
	if stdout, ok := c.Stdout.(*os.File); ok && name == "-" {
		return stdout.Stat()
	}
	return os.Stat(name)
}

// target returns the path of a file that does not exist yet, even if its name is a link.
func target(name string) string {
	for range 40 { // as many as Linux follows
		link, err := os.Readlink(name)
		if err != nil {
			break
		}
		if !filepath.IsAbs(link) {
			link = filepath.Join(filepath.Dir(name), link)
		}
		name = link
	}
	if abs, err := filepath.Abs(name); err == nil {
		name = abs
	}
	return filepath.Join(folder(name), filepath.Base(name))
}
