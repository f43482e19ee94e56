//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// startArgs are the arguments of an engine, as Ollama passes them, with weights that exist.
func startArgs(t *testing.T) []string {
	model := filepath.Join(must(filepath.EvalSymlinks(t.TempDir())), "sha256-1")
	write(t, model, "GGUF")
	return replaced(plain, "--model", model)
}

func TestShim(t *testing.T) {
	info := linkTo(t, install(t))
	args := startArgs(t)
	t.Setenv("OLLAMA_HOST", "0.0.0.0:4242")
	s := start(t, info.Home, nil, args...)
	contexts := filepath.Join(info.Home, "contexts")
	want := with(append([]string{info.Engine}, args...), "--slot-save-path", contexts+"/")
	if !slices.Equal(s.report.Args, want) {
		t.Errorf("the engine has %q, want %q", s.report.Args, want)
	}
	if s.report.PID != s.Process.Pid {
		t.Errorf("the engine is process %d, and %d was started", s.report.PID, s.Process.Pid)
	}
	all := processes(t, info.Home)
	if len(all) != 1 {
		t.Fatalf("engines %+v, want one", all)
	}
	p := all[0]
	if p.PID != s.Process.Pid || p.Port != 4711 || p.Blob() != "sha256-1" || p.Parallel != 2 ||
		p.ContextEach != 4096 || p.Server != "0.0.0.0:4242" || p.Version != "0.34.1" ||
		p.Build != info.Build || p.SaveFolder != contexts ||
		p.Elsewhere ||
		p.Folder() != contexts ||
		p.Started.IsZero() {
		t.Errorf("the note is %+v", p)
	}
	if said := s.end(t); said != "" {
		t.Errorf("stderr has %q", said)
	}
	if all := processes(t, info.Home); len(all) != 0 {
		t.Errorf("engines %+v, want none", all)
	}
}

// TestShimUmask: only the owner can read the files that an engine writes, but only if it saves
// states.
func TestShimUmask(t *testing.T) {
	info := linkTo(t, install(t))
	old := syscall.Umask(0o022)
	defer syscall.Umask(old)
	for _, test := range []struct {
		args []string
		want os.FileMode
	}{{startArgs(t), 0o600}, {discovery, 0o644}} {
		s := start(t, info.Home, nil, test.args...)
		for _, entry := range s.Env {
			if path, ok := strings.CutPrefix(entry, "TEST_REPORT="); ok {
				if got := must(os.Stat(path)).Mode().Perm(); got != test.want {
					t.Errorf("%q writes files of the mode %v, want %v", test.args, got, test.want)
				}
			}
		}
		s.end(t)
	}
}

func TestShimArguments(t *testing.T) {
	info := linkTo(t, install(t))
	options := LinkOptions{Ollama: info.Ollama, Home: filepath.Join(t.TempDir(), "swa"), SWAFull: true}
	swa := must(Link(options))
	args := startArgs(t)
	for name, test := range map[string]struct {
		home        string
		args, added []string
		engines     int
	}{
		"discovery":         {info.Home, discovery, nil, 0},
		"devices":           {info.Home, devices, nil, 0},
		"nothing":           {info.Home, nil, nil, 0},
		"save path of ones": {info.Home, with(args, "--slot-save-path", "/x/"), nil, 1},
		"swa": {swa.Home, args, []string{"--slot-save-path", swa.Home + "/contexts/",
			"--swa-full"}, 1},
		"swa given": {swa.Home, with(args, "--swa-full"),
			[]string{"--slot-save-path", swa.Home + "/contexts/"}, 1},
	} {
		s := start(t, test.home, nil, test.args...)
		want := append(append([]string{info.Engine}, test.args...), test.added...)
		if !slices.Equal(s.report.Args, want) {
			t.Errorf("%s: the engine has %q, want %q", name, s.report.Args, want)
		}
		all := processes(t, test.home)
		if len(all) != test.engines {
			t.Errorf("%s: engines %+v, want %d", name, all, test.engines)
		}
		for _, p := range all {
			if p.SWAFull != strings.HasPrefix(name, "swa") ||
				p.Elsewhere != (name == "save path of ones") {
				t.Errorf("%s: the note is %+v", name, p)
			}
		}
		if said := s.end(t); said != "" {
			t.Errorf("%s: stderr has %q", name, said)
		}
	}
}

// TestShimWithout: whatever is wrong, Ollama gets its engine, and the log says why there are no
// contexts.
func TestShimWithout(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(t *testing.T, info Info)
		says  string
	}{
		"upgraded engine": {func(t *testing.T, info Info) { upgrade(t, info.Engine) },
			"is not the one any more that was linked; link anew: ollama-cacheproxy engine link --ollama "},
		"upgraded ollama": {func(t *testing.T, info Info) { upgrade(t, info.Ollama) },
			"is not the one any more that was linked; link anew"},
		"ollama is gone": {func(t *testing.T, info Info) { os.Remove(info.Ollama) },
			"is not there any more; link anew"},
		"damaged link": {func(t *testing.T, info Info) {
			write(t, filepath.Join(info.Home, "link.json"), "{")
		}, "it is damaged"},
		"no link": {func(t *testing.T, info Info) {
			os.Remove(filepath.Join(info.Home, "link.json"))
		}, "it is no link"},
		"no contexts": {func(t *testing.T, info Info) {
			os.Remove(filepath.Join(info.Home, "contexts"))
			write(t, filepath.Join(info.Home, "contexts"), "")
		}, "not a directory"},
		"no notes": {func(t *testing.T, info Info) {
			os.Remove(filepath.Join(info.Home, "engines"))
			write(t, filepath.Join(info.Home, "engines"), "")
		}, "not a directory"},
	} {
		info := linkTo(t, install(t))
		test.spoil(t, info)
		args := startArgs(t)
		s := start(t, info.Home, nil, args...)
		if want := append([]string{info.Engine}, args...); !slices.Equal(s.report.Args, want) {
			t.Errorf("%s: the engine has %q, want %q", name, s.report.Args, want)
		}
		if all, err := Processes(info.Home); len(all) != 0 {
			t.Errorf("%s: engines %+v, %v", name, all, err)
		}
		said := s.end(t)
		const begins = "ollama-cacheproxy: stored contexts are off for this model: "
		if !strings.HasPrefix(said, begins) || !strings.Contains(said, test.says) ||
			strings.Count(said, "\n") != 1 {
			t.Errorf("%s: stderr has %q, want %q", name, said, test.says)
		}
	}
}

func TestShimNoEngine(t *testing.T) {
	info := linkTo(t, install(t))
	for _, damage := range []func() error{
		func() error {
			return errors.Join(os.Remove(info.Engine), os.WriteFile(info.Engine, nil, 0o600))
		},
		func() error { return os.Remove(info.Engine) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		output, err := exec.Command(filepath.Join(info.Home, linkedEngine), discovery...).
			CombinedOutput()
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.ExitCode() != 1 ||
			!strings.Contains(string(output), "the installed llama-server") {
			t.Errorf("%v, %s", err, output)
		}
	}
}

// TestShimEnds: whoever started the engine sees its exit status.
func TestShimEnds(t *testing.T) {
	info := linkTo(t, install(t))
	s := start(t, info.Home, []string{"TEST_EXIT=7"}, startArgs(t)...)
	err := s.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 7 {
		t.Errorf("it ended with %v, want 7", err)
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		s := start(t, info.Home, nil, startArgs(t)...)
		if err := s.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		err := s.Wait()
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.Sys().(syscall.WaitStatus).Signal() != signal {
			t.Errorf("it ended with %v, want %v", err, signal)
		}
		if all := processes(t, info.Home); len(all) != 0 {
			t.Errorf("after %v: %+v", signal, all)
		}
	}
}

// TestShimInPath: the shim finds its folder even if it is started by its name alone.
func TestShimInPath(t *testing.T) {
	home := must(homeOf("/a/b/home/lib/ollama/llama-server"))
	if home != "/a/b/home" {
		t.Errorf("the home is %s", home)
	}
	exe := must(os.Executable())
	if home := must(homeOf("llama-server")); home != filepath.Dir(filepath.Dir(filepath.Dir(exe))) {
		t.Errorf("by %s the home is %s", exe, home)
	}
	for name, want := range map[string]bool{"llama-server": true, "/x/llama-server": true,
		"ollama-cacheproxy": false, "/llama-server/x": false, "": false} {
		if Called([]string{name}) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
	if Called(nil) {
		t.Error("called by no name")
	}
}
