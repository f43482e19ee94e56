//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// names returns the files beneath a folder, except those in omit.
func names(t testing.TB, folder string, omit ...string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		name := must(filepath.Rel(folder, path))
		if slices.Contains(omit, name) {
			return nil
		}
		if err == nil && !entry.IsDir() {
			all = append(all, filepath.ToSlash(name))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestLink(t *testing.T) {
	ollama := install(t)
	root := filepath.Dir(filepath.Dir(ollama))
	before := names(t, root)
	info := linkTo(t, ollama)
	if !info.Anew || info.Ollama != ollama || info.Version != "0.34.1" || info.SWAFull ||
		len(info.Build) != 32 ||
		info.Stale != "" ||
		info.Start() != filepath.Join(info.Home, "bin", "ollama") {
		t.Errorf("linked %+v", info)
	}
	want := []string{
		"bin/ollama",
		"lib/ollama/cuda_v13",
		"lib/ollama/libllama.so",
		"lib/ollama/llama-server",
		"lib/ollama/llama-server.installed",
		"link.json",
	}
	if got := names(t, info.Home); !slices.Equal(got, want) {
		t.Errorf("it has %q, want %q", got, want)
	}
	if after := names(t, root); !slices.Equal(after, before) {
		t.Errorf("the installed one had %q and has %q", before, after)
	}
	text := must(os.ReadFile(filepath.Join(info.Home, "lib/ollama/cuda_v13/libggml-cuda.so")))
	if string(text) != "the content of cuda_v13/libggml-cuda.so" {
		t.Errorf("a library has %q", text)
	}
	for name, mode := range map[string]fs.FileMode{"": 0o700, "bin": 0o700, "lib/ollama": 0o700,
		"engines": 0o700, "contexts": 0o700, "link.json": 0o600} {
		if got := must(os.Stat(filepath.Join(info.Home, name))).Mode().Perm(); got != mode {
			t.Errorf("%q has the mode %v, want %v", name, got, mode)
		}
	}
	if got := must(os.Stat(info.Start())).Mode().Perm(); got&0o100 == 0 {
		t.Errorf("ollama has the mode %v", got)
	}

	link := func(o LinkOptions) Info {
		t.Helper()
		if o.Home == "" {
			o.Home = info.Home
		}
		info, err := Link(o)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	if again := link(LinkOptions{Ollama: ollama}); again.Anew || again.Build != info.Build ||
		!again.Linked.Equal(info.Linked) {
		t.Errorf("linked again without need: %+v", again)
	}
	if again := link(LinkOptions{Ollama: info.Start()}); again.Anew || again.Ollama != ollama {
		t.Errorf("linked to itself: %+v", again)
	}
	symlink := filepath.Join(t.TempDir(), "ollama")
	if err := os.Symlink(ollama, symlink); err != nil {
		t.Fatal(err)
	}
	if again := link(LinkOptions{Ollama: symlink}); again.Anew || again.Ollama != ollama {
		t.Errorf("linked by a symlink: %+v", again)
	}
	if again := link(LinkOptions{Ollama: ollama, SWAFull: true}); !again.Anew || !again.SWAFull ||
		again.Build != info.Build {
		t.Errorf("linked with --swa-full: %+v", again)
	}
	// The same files in another place are the same build, and have the same name for states.
	other := link(LinkOptions{Ollama: install(t), Home: filepath.Join(t.TempDir(), "other")})
	if other.Build != info.Build {
		t.Errorf("the same engine is another build: %+v, %+v", other, info)
	}
	// An incomplete folder is completed.
	if err := os.Remove(info.Start()); err != nil {
		t.Fatal(err)
	}
	if again := link(LinkOptions{Ollama: ollama}); !again.Anew {
		t.Error("a link without ollama was left as it was")
	}
	write(t, filepath.Join(info.Home, "link.json"), "{")
	if again := link(LinkOptions{Ollama: ollama}); !again.Anew {
		t.Error("a damaged link was left as it was")
	}
	if got := names(t, info.Home); !slices.Equal(got, want) {
		t.Errorf("after all that it has %q, want %q", got, want)
	}
}

// upgrade replaces a file by another one, as packages do.
func upgrade(t testing.TB, path string) {
	t.Helper()
	content := must(os.ReadFile(path))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(content, "newer"...), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestLinkUpgraded(t *testing.T) {
	for _, name := range []string{"bin/ollama", "lib/ollama/llama-server", "lib/ollama/libllama.so"} {
		t.Run(name, func(t *testing.T) {
			ollama := install(t)
			info := linkTo(t, ollama)
			if got := must(Inspect(info.Home)); got.Stale != "" || got.Anew ||
				got.Build != info.Build {
				t.Errorf("before: %+v", got)
			}
			upgrade(t, filepath.Join(filepath.Dir(filepath.Dir(ollama)), name))
			if got := must(Inspect(info.Home)); !strings.Contains(got.Stale, "linked") &&
				!strings.Contains(got.Stale, "have changed") {
				t.Errorf("after an upgrade: %+v", got)
			}
			t.Setenv("TEST_VERSION", "0.35.0")
			again, err := Link(LinkOptions{Ollama: ollama, Home: info.Home})
			if err != nil || !again.Anew || again.Version != "0.35.0" ||
				(again.Build == info.Build) != (name == "bin/ollama") {
				t.Errorf("linked anew: %+v was %+v, %v", again, info, err)
			}
			if got := must(Inspect(info.Home)); got.Stale != "" {
				t.Errorf("after it was linked anew: %+v", got)
			}
			if must(os.Stat(again.Start())).Size() != must(os.Stat(ollama)).Size() {
				t.Error("the linked ollama is not the new one")
			}
			if _, err := os.Stat(filepath.Join(info.Home, "contexts")); err != nil {
				t.Error(err)
			}
		})
	}
	// Another folder with the same files, such as a layer of an image, is no upgrade.
	ollama := install(t)
	info := linkTo(t, ollama)
	for _, path := range []string{ollama, info.Engine} {
		content := must(os.ReadFile(path))
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o755); err != nil {
			t.Fatal(err)
		}
		past := time.Now().Add(-time.Hour)
		if err := os.Chtimes(path, past, past); err != nil {
			t.Fatal(err)
		}
	}
	if l := must(readLink(info.Home)); l.changed() != "" {
		t.Errorf("the same files: %s", l.changed())
	}
	// The given path leads to another version, and the old one still exists.
	given := filepath.Join(t.TempDir(), "ollama")
	if err := os.Symlink(ollama, given); err != nil {
		t.Fatal(err)
	}
	again := must(Link(LinkOptions{Ollama: given, Home: info.Home}))
	if again.Anew || again.Given != given ||
		again.Command("x") != "x engine link --ollama "+given+" --to "+info.Home {
		t.Errorf("linked by a symlink: %+v", again)
	}
	newer := install(t)
	if err := errors.Join(os.Remove(given), os.Symlink(newer, given)); err != nil {
		t.Fatal(err)
	}
	if got := must(Inspect(info.Home)); got.Stale != given+" is "+newer+" now" {
		t.Errorf("the symlink leads to another one: %+v", got)
	}
	if again := must(Link(LinkOptions{Ollama: given, Home: info.Home})); !again.Anew ||
		again.Ollama != newer ||
		again.Stale != "" {
		t.Errorf("linked anew by a symlink: %+v", again)
	}
	info = must(Link(LinkOptions{Ollama: ollama, Home: info.Home}))
	// The installed Ollama is gone.
	if err := os.RemoveAll(filepath.Dir(info.Engine)); err != nil {
		t.Fatal(err)
	}
	if got := must(Inspect(info.Home)); !strings.Contains(got.Stale, "is not there any more") {
		t.Errorf("without an engine: %+v", got)
	}
}

func TestLinkRefuses(t *testing.T) {
	ollama := install(t)
	empty := t.TempDir()
	script := filepath.Join(empty, "script")
	write(t, script, "#!/bin/sh\nexec ollama")
	if err := os.MkdirAll(filepath.Join(empty, "taken", "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	alone := filepath.Join(empty, "alone", "bin", "ollama")
	if err := os.MkdirAll(filepath.Dir(alone), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := linkOrCopy(ollama, alone); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		ollama, home, version, want string
	}{
		{"", "x", "", "no Ollama is given"},
		{ollama, "", "", "no folder is given"},
		{filepath.Join(empty, "nothing"), "x", "", "finding Ollama"},
		{empty, "x", "", "is no program"},
		{script, "x", "", "is a script: give the program that it starts"},
		{alone, "x", "0.24.0", "Ollama 0.24.0 has no llama-server; 0.30 and later have"},
		{alone, "x", "0.34.1", "there is no llama-server where " + alone + " looks for it"},
		{alone, "x", "0.0.0", "there is no llama-server where " + alone + " looks for it"},
		{ollama, filepath.Join(empty, "taken"), "",
			"has a bin already, and no link.json: give a folder of its own"},
		{ollama, filepath.Dir(filepath.Dir(ollama)), "", "has a bin already"},
		{ollama, filepath.Join(script, "home"), "", "making the link's folder"},
	} {
		home := test.home
		if home == "x" {
			home = filepath.Join(empty, "home")
		}
		t.Setenv("TEST_VERSION", test.version)
		before := names(t, empty)
		if info, err := Link(LinkOptions{Ollama: test.ollama, Home: home}); err == nil ||
			!strings.Contains(err.Error(), test.want) {
			t.Errorf("linking %q to %q: %+v, %v, want %q", test.ollama, home, info, err, test.want)
		}
		if after := names(t, empty); !slices.Equal(before, after) {
			t.Errorf("linking %q to %q: %q, before %q", test.ollama, home, after, before)
		}
	}
	if _, err := Inspect(empty); !errors.Is(err, ErrNotLinked) {
		t.Errorf("inspecting no link: %v", err)
	}
}

// TestLinkFails: a failure at any point leaves the previous state.
func TestLinkFails(t *testing.T) {
	ollama := install(t)
	info := linkTo(t, ollama)
	before := must(os.ReadFile(filepath.Join(info.Home, "link.json")))
	upgrade(t, ollama)
	wanted := must(plan(LinkOptions{Ollama: ollama, Home: info.Home}))
	for name, spoil := range map[string]func(*link){
		"no program": func(l *link) { l.Program += "x" },
		"no ollama":  func(l *link) { l.Ollama += "x" },
		"no library": func(l *link) { l.Engine = filepath.Join(l.Home, "nothing", "llama-server") },
	} {
		spoiled := wanted
		spoil(&spoiled)
		if err := spoiled.make(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	stage := filepath.Join(info.Home, "stage")
	for _, name := range []string{"bin", "lib"} {
		if err := os.MkdirAll(filepath.Join(stage, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := swap(stage, info.Home); err == nil {
			t.Errorf("a link without link.json was put in place")
		}
	}
	if err := os.RemoveAll(stage); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"bin/ollama",
		"lib/ollama/cuda_v13",
		"lib/ollama/libllama.so",
		"lib/ollama/llama-server",
		"lib/ollama/llama-server.installed",
		"link.json",
	}
	if got := names(t, info.Home); !slices.Equal(got, want) ||
		string(must(os.ReadFile(filepath.Join(info.Home, "link.json")))) != string(before) {
		t.Errorf("it has %q, want %q", got, want)
	}
	if entries := must(os.ReadDir(info.Home)); len(entries) != 5 {
		t.Errorf("something is left: %v", entries)
	}
	// Two at the same time.
	unlock := must(lockFolder(info.Home))
	defer unlock()
	if _, err := Link(LinkOptions{Ollama: ollama, Home: info.Home}); err == nil ||
		!strings.Contains(err.Error(), "is being linked by another process") {
		t.Errorf("beside another one: %v", err)
	}
}

func TestUnlink(t *testing.T) {
	ollama := install(t)
	info := linkTo(t, ollama)
	if err := Unlink(filepath.Dir(info.Home), true); !errors.Is(err, ErrNotLinked) {
		t.Errorf("unlinking no link: %v", err)
	}
	state := filepath.Join(info.Home, "contexts", "state")
	write(t, state, "x")
	_, end := hold(t, info.Home, 1)
	if err := Unlink(info.Home, true); err == nil ||
		!strings.Contains(err.Error(), "run (1): stop that Ollama first") {
		t.Errorf("unlinking below a running engine: %v", err)
	}
	end()
	if err := Unlink(info.Home, false); err != nil {
		t.Fatal(err)
	}
	if got := names(t, info.Home); !slices.Equal(got, []string{"contexts/state"}) {
		t.Errorf("%q is left", got)
	}
	// A new link finds the old contexts.
	if _, err := Link(LinkOptions{Ollama: ollama, Home: info.Home}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(state); err != nil {
		t.Error(err)
	}
	if err := Unlink(info.Home, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(info.Home); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
	if got := names(t, filepath.Dir(filepath.Dir(ollama))); len(got) != 4 {
		t.Errorf("the installed one has %q", got)
	}
	if err := Unlink(info.Home, false); !errors.Is(err, ErrNotLinked) {
		t.Errorf("unlinking again: %v", err)
	}
}

func TestOlder(t *testing.T) {
	for version, want := range map[string]bool{"0.24.0": true, "0.29.9": true, "0.9": true,
		"0.30.0": false, "0.30.0-rc1": false, "1.2.0": false, "0.0.0": false, "": false, "x": false} {
		if older(version) != want {
			t.Errorf("%q: %v", version, !want)
		}
	}
}
