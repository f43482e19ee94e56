package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// engineName is the name under which Ollama starts its engine.
const engineName = "llama-server"

// The files of a link, relative to its folder.
var (
	linkFile       = "link.json"
	linkedOllama   = filepath.Join("bin", "ollama")
	linkedLib      = filepath.Join("lib", "ollama")
	linkedEngine   = filepath.Join(linkedLib, engineName)
	originalEngine = filepath.Join(linkedLib, engineName+".installed")
)

// ErrNotLinked means that a folder is not a link.
var ErrNotLinked = errors.New("it is no link to an Ollama")

// errDamaged means that the record of what was linked cannot be read.
var errDamaged = errors.New("it is damaged")

// Called reports whether the program was called as an engine, by os.Args: then it only runs Main.
func Called(args []string) bool { return len(args) > 0 && filepath.Base(args[0]) == engineName }

// LinkOptions say what to link, and where.
type LinkOptions struct {
	// Ollama is the installed binary. Symlinks are followed, as Ollama itself does.
	Ollama string
	// Home is the folder of the link, which is created if necessary.
	Home string
	// Program becomes llama-server; "" means this program itself.
	Program string
	// SWAFull makes the engines keep all tokens in layers with a sliding window (--swa-full), which
	// takes more memory; without it states of such models are of little use.
	SWAFull bool
}

// Info describes a link.
type Info struct {
	// Home is the link's folder.
	Home string
	// Given is the path of the installed binary as it was given, made absolute.
	Given string
	// Ollama and Engine are the installed binary and its llama-server, with symlinks followed.
	Ollama, Engine string
	// Version is the version that the installed Ollama reported, or "".
	Version string
	// Build identifies the engine's build: it is the same wherever the same files are installed.
	Build string
	// SWAFull is the option of that name.
	SWAFull bool
	// Linked is when it was linked.
	Linked time.Time
	// Stale says in words what has changed since, so that stored contexts are off until it is
	// linked again; "" if nothing has.
	Stale string `json:"-"`
	// Anew means that Link has made it, rather than found it up to date.
	Anew bool `json:"-"`
}

// Command is the command that renews the link, with the name or the path of this program.
func (i Info) Command(program string) string {
	swa := ""
	if i.SWAFull {
		swa = " --swa-full"
	}
	return program + " engine link --ollama " + i.Given + " --to " + i.Home + swa
}

// Start is the binary to start in place of the installed one.
func (i Info) Start() string { return filepath.Join(i.Home, linkedOllama) }

// link is the content of link.json.
type link struct {
	Info
	// OllamaFile, EngineFile and ProgramFile identify the linked files, so that newer ones are
	// noticed.
	OllamaFile, EngineFile, ProgramFile identity
	// Program is the path of what became llama-server.
	Program string
	// Library identifies the files beside the engine.
	Library string
}

// Link makes a link, renews it if what is linked has changed, and otherwise changes nothing. It
// fails, and changes nothing, if Ollama is older than 0.30, if the folder has something else under
// the names that it needs, or if the folder cannot be written.
func Link(o LinkOptions) (Info, error) {
	if err := supported(); err != nil {
		return Info{}, err
	}
	wanted, err := plan(o)
	if err != nil {
		return Info{}, err
	}
	if err := os.MkdirAll(wanted.Home, 0o700); err != nil {
		return Info{}, fmt.Errorf("making the link's folder: %w", err)
	}
	if wanted.Home, err = filepath.EvalSymlinks(wanted.Home); err != nil {
		return Info{}, fmt.Errorf("making the link's folder: %w", err)
	}
	unlock, err := lockFolder(wanted.Home)
	if err != nil {
		return Info{}, err
	}
	defer unlock()
	present, err := readLink(wanted.Home)
	switch {
	case err == nil && present.is(wanted):
		return present.kept(wanted)
	case errors.Is(err, ErrNotLinked):
		err = nothingThere(wanted.Home)
	case errors.Is(err, errDamaged):
		err = nil
	}
	if err != nil {
		return Info{}, err
	}
	return wanted.anew()
}

// anew does the slow part of the plan, and makes the link.
func (l link) anew() (info Info, err error) {
	if l.Version == "" {
		l.Version = VersionOf(context.Background(), l.Ollama)
	}
	if l.Build, err = buildOf(filepath.Dir(l.Engine)); err != nil {
		return Info{}, err
	}
	if err := l.make(); err != nil {
		return Info{}, fmt.Errorf("linking %s to %s: %w", l.Ollama, l.Home, err)
	}
	l.Anew = true
	return l.Info, nil
}

// plan finds out what is to be linked, except for what takes long.
func plan(o LinkOptions) (link, error) {
	home, err := filepath.Abs(o.Home)
	if err != nil || o.Home == "" {
		return link{}, errors.Join(errors.New("no folder is given to link to"), err)
	}
	given, ollama, err := installed(o.Ollama)
	if err != nil {
		return link{}, err
	}
	version := ""
	engine, err := findEngine(ollama)
	if err != nil {
		if version = VersionOf(context.Background(), ollama); older(version) {
			err = errors.New("Ollama " + version + " has no llama-server; 0.30 and later have")
		}
		return link{}, err
	}
	program := o.Program
	if program == "" {
		if program, err = os.Executable(); err != nil {
			return link{}, fmt.Errorf("finding this program: %w", err)
		}
	}
	if program, err = filepath.EvalSymlinks(program); err != nil {
		return link{}, fmt.Errorf("finding this program: %w", err)
	}
	l := link{
		Info: Info{
			Home: home, Given: given, Ollama: ollama, Engine: engine, Version: version,
			SWAFull: o.SWAFull, Linked: time.Now().Truncate(time.Second),
		},
		Program: program,
	}
	for path, id := range map[string]*identity{
		ollama: &l.OllamaFile, engine: &l.EngineFile, program: &l.ProgramFile,
	} {
		if *id, err = identify(path); err != nil {
			return link{}, err
		}
	}
	l.Library, err = listing(filepath.Dir(engine))
	return l, err
}

// installed returns the binary that a path leads to, and that path made absolute. The binary is one
// that can be linked. If the path leads into a link, it is the binary that is linked there.
func installed(path string) (given, real string, err error) {
	if path == "" {
		return "", "", errors.New("no Ollama is given to link")
	}
	if given, err = filepath.Abs(path); err != nil {
		return "", "", err
	}
	if real, err = filepath.EvalSymlinks(given); err != nil {
		return "", "", fmt.Errorf("finding Ollama: %w", err)
	}
	if l, err := readLink(filepath.Dir(filepath.Dir(real))); err == nil {
		return installed(l.Given)
	}
	f, err := os.Open(real)
	if err != nil {
		return "", "", fmt.Errorf("reading Ollama: %w", err)
	}
	defer f.Close()
	var begin [2]byte
	if _, err := io.ReadFull(f, begin[:]); err != nil {
		return "", "", fmt.Errorf("%s is no program: %w", real, err)
	}
	if string(begin[:]) == "#!" {
		return "", "", fmt.Errorf("%s is a script: give the program that it starts", real)
	}
	return given, real, nil
}

// findEngine finds the llama-server of an Ollama where that looks for it (its ml/path.go and
// llm/llama_binary.go).
func findEngine(ollama string) (string, error) {
	beside := filepath.Dir(ollama)
	up, down := filepath.Join(beside, "..", "lib", "ollama"), filepath.Join(beside, "lib", "ollama")
	places := []string{up, down}
	if runtime.GOOS == "darwin" {
		places = []string{down, up}
	}
	places = append(places,
		filepath.Join(beside, "build", "lib", "ollama"),
		filepath.Join(beside, "dist", runtime.GOOS+"-"+runtime.GOARCH, "lib", "ollama"))
	if runtime.GOOS == "darwin" {
		places = append(places, beside)
	}
	for _, place := range places {
		if real, err := filepath.EvalSymlinks(place); err == nil {
			if engine := filepath.Join(real, engineName); isFile(engine) {
				return engine, nil
			}
		}
	}
	return "", fmt.Errorf("there is no llama-server where %s looks for it (%s)",
		ollama, strings.Join(places, ", "))
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

var versionLine = regexp.MustCompile(`version is v?(\S+)`)

// VersionOf returns the version that an ollama binary reports, or "" if it reports none within ten
// seconds.
func VersionOf(ctx context.Context, ollama string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, ollama, "--version")
	// Nobody listens there; otherwise it would report the version of a running server.
	cmd.Env = append(os.Environ(), "OLLAMA_HOST=127.0.0.1:1")
	output, err := cmd.CombinedOutput()
	if m := versionLine.FindSubmatch(output); err == nil && m != nil {
		return string(m[1])
	}
	return ""
}

// older reports whether a version has no llama-server yet.
func older(version string) bool {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	n, err := strconv.Atoi(minor)
	return err == nil && major == "0" && 0 < n && n < 30
}

// identity tells a file from the one that an upgrade puts in its place.
type identity struct {
	Size    int64
	ModTime time.Time
	Inode   uint64
	// Sum is the SHA-256 of its content, which matters only if the others differ: image layers and
	// copies of folders change those.
	Sum string
}

func identify(path string) (identity, error) {
	info, err := os.Stat(path)
	if err != nil {
		return identity{}, err
	}
	h := sha256.New()
	if err := addContent(h, path); err != nil {
		return identity{}, err
	}
	sum := hex.EncodeToString(h.Sum(nil))
	return identity{info.Size(), info.ModTime().UTC(), inode(info), sum}, nil
}

// change says in words how the file at a path differs, or "".
func (id identity) change(path string) string {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "is not there any more"
	case info.Size() == id.Size && info.ModTime().Equal(id.ModTime) && inode(info) == id.Inode:
		return ""
	}
	if info.Size() == id.Size {
		if now, err := identify(path); err == nil && now.Sum == id.Sum {
			return ""
		}
	}
	return "is not the one any more that was linked"
}

func addContent(h hash.Hash, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(h, f)
	return err
}

// changed says in words how the engine and Ollama differ from what was linked, or "".
func (l link) changed() string {
	if now, err := filepath.EvalSymlinks(l.Given); err == nil && now != l.Ollama {
		return l.Given + " is " + now + " now"
	}
	for path, id := range map[string]identity{l.Ollama: l.OllamaFile, l.Engine: l.EngineFile} {
		if why := id.change(path); why != "" {
			return path + " " + why
		}
	}
	return ""
}

// wants is everything that makes one link different from another.
func (l link) wants() [8]any {
	return [8]any{
		l.Home, l.Ollama, l.Engine, l.SWAFull, l.Library,
		l.OllamaFile.Sum, l.EngineFile.Sum, l.ProgramFile.Sum,
	}
}

// is reports whether a link is complete and as it would be if it were made now.
func (l link) is(wanted link) bool {
	if l.wants() != wanted.wants() {
		return false
	}
	for _, name := range []string{linkedOllama, linkedEngine, originalEngine} {
		if !isFile(filepath.Join(l.Home, name)) {
			return false
		}
	}
	return true
}

// places is where the linked files are: the same files may move to another place on the disk.
func (l link) places() [3]any { return [3]any{l.Given, l.OllamaFile, l.EngineFile} }

// kept keeps a link as it is, and records where the files of the wanted one are now.
func (l link) kept(wanted link) (Info, error) {
	if l.places() == wanted.places() {
		return l.Info, nil
	}
	l.Given = wanted.Given
	l.OllamaFile, l.EngineFile = wanted.OllamaFile, wanted.EngineFile
	l.ProgramFile = wanted.ProgramFile
	return l.Info, l.write(wanted.Home)
}

// nothingThere fails if a folder that is not a link has something under the names of one.
func nothingThere(home string) error {
	for _, name := range []string{"bin", "lib"} {
		if _, err := os.Lstat(filepath.Join(home, name)); err == nil {
			return fmt.Errorf("%s has a %s already, and no %s: give a folder of its own",
				home, name, linkFile)
		}
	}
	return nil
}

func readLink(home string) (link, error) {
	text, err := os.ReadFile(filepath.Join(home, linkFile))
	if errors.Is(err, fs.ErrNotExist) {
		return link{}, fmt.Errorf("%s: %w", home, ErrNotLinked)
	}
	if err != nil {
		return link{}, fmt.Errorf("reading what is linked: %w", err)
	}
	var l link
	if err := json.Unmarshal(text, &l); err != nil {
		return link{}, fmt.Errorf("reading what is linked in %s: %w: %w", home, errDamaged, err)
	}
	return l, nil
}

// write writes link.json under another name and renames it.
func (l link) write(folder string) error {
	text, err := json.MarshalIndent(l, "", "\t")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(folder, linkFile+".")
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(folder, linkFile))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// make makes the link in a folder aside and then moves it into place.
func (l link) make() error {
	for _, folder := range []string{notesFolder(l.Home), ContextsFolder(l.Home)} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return err
		}
	}
	stage, err := os.MkdirTemp(l.Home, ".link-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(stage)
	for _, folder := range []string{filepath.Dir(linkedOllama), linkedLib} {
		if err := os.MkdirAll(filepath.Join(stage, folder), 0o700); err != nil {
			return err
		}
	}
	if err := linkOrCopy(l.Ollama, filepath.Join(stage, linkedOllama)); err != nil {
		return err
	}
	if err := linkOrCopy(l.Program, filepath.Join(stage, linkedEngine)); err != nil {
		return err
	}
	if err := os.Symlink(l.Engine, filepath.Join(stage, originalEngine)); err != nil {
		return err
	}
	library := filepath.Dir(l.Engine)
	entries, err := os.ReadDir(library)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Name() == engineName {
			continue
		}
		from := filepath.Join(library, entry.Name())
		if err := os.Symlink(from, filepath.Join(stage, linkedLib, entry.Name())); err != nil {
			return err
		}
	}
	if err := l.write(stage); err != nil {
		return err
	}
	return swap(stage, l.Home)
}

// swap moves what a folder has aside into place, link.json last, and restores what was there if a
// step fails.
func swap(stage, home string) (err error) {
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for _, f := range slices.Backward(undo) {
			err = errors.Join(err, f())
		}
	}()
	for _, name := range []string{"bin", "lib"} {
		from, to := filepath.Join(stage, name), filepath.Join(home, name)
		old := filepath.Join(stage, "old-"+name)
		switch err := os.Rename(to, old); {
		case err == nil:
			undo = append(undo, func() error { return os.Rename(old, to) })
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		if err := os.Rename(from, to); err != nil {
			return err
		}
		undo = append(undo, func() error { return os.Rename(to, from) })
	}
	return os.Rename(filepath.Join(stage, linkFile), filepath.Join(home, linkFile))
}

// linkOrCopy makes a hard link, or a copy where that is impossible: on another file system, or if
// the file belongs to another user.
func linkOrCopy(from, to string) error {
	if os.Link(from, to) == nil {
		return nil
	}
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}

// readFully is the largest file whose content counts for the build of an engine, in bytes. Larger
// files come from accelerator vendors, and their sizes tell them apart.
const readFully = 64 << 20

// buildOf returns a key of an engine's files, wherever they are: the contents of those in its
// folder, and the names and sizes of those in folders beneath.
func buildOf(library string) (string, error) {
	h := sha256.New()
	err := filepath.WalkDir(library, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Stat(path)
		if err != nil || info.IsDir() {
			return nil // a dangling link
		}
		name, err := filepath.Rel(library, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%s %d\n", filepath.ToSlash(name), info.Size())
		if info.Size() <= readFully && filepath.Dir(path) == library && info.Mode().IsRegular() {
			return addContent(h, path)
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("reading the engine's files: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}

// listing returns a key of the files beside an engine, from their names, sizes and times in
// seconds.
func listing(library string) (string, error) {
	entries, err := os.ReadDir(library)
	if err != nil {
		return "", fmt.Errorf("reading the engine's files: %w", err)
	}
	h := sha256.New()
	for _, entry := range entries {
		if entry.Name() == engineName {
			continue // it has its own identity
		}
		if info, err := os.Stat(filepath.Join(library, entry.Name())); err == nil {
			fmt.Fprintf(h, "%s %d %d\n", entry.Name(), info.Size(), info.ModTime().Unix())
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}

// Inspect describes the link in a folder, and says whether what is linked has changed since.
func Inspect(home string) (Info, error) {
	home, err := filepath.Abs(home)
	if err != nil {
		return Info{}, err
	}
	l, err := readLink(home)
	if err != nil {
		return Info{}, err
	}
	l.Stale = l.changed()
	if l.Stale == "" {
		if now, err := listing(filepath.Dir(l.Engine)); err != nil || now != l.Library {
			l.Stale = "the files beside " + l.Engine + " have changed"
		}
	}
	return l.Info, nil
}

// Unlink removes a link, and with contexts the saved states, too. It refuses if a folder is not a
// link, or while engines of the link run.
func Unlink(home string, contexts bool) error {
	if err := supported(); err != nil {
		return err
	}
	if _, err := readLink(home); errors.Is(err, ErrNotLinked) {
		return err
	}
	unlock, err := lockFolder(home)
	if err != nil {
		return err
	}
	defer unlock()
	running, err := Processes(home)
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return fmt.Errorf("engines of %s run (%d): stop that Ollama first", home, len(running))
	}
	folders := []string{"bin", "lib", "engines"}
	if contexts {
		folders = append(folders, "contexts")
	}
	// That file goes last: without it the folder no longer counts as a link.
	for _, name := range append(folders, linkFile) {
		if err := os.RemoveAll(filepath.Join(home, name)); err != nil {
			return fmt.Errorf("unlinking: %w", err)
		}
	}
	// Nothing else of ours is in there; a folder with other content stays.
	os.Remove(home)
	return nil
}
