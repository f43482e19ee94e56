//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// TestMain also makes the test binary the Ollama that is linked, its engine, and the program that a
// link has in place of the engine.
func TestMain(m *testing.M) {
	// With the race detector each process would wait for a second at its end.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	switch name := filepath.Base(os.Args[0]); {
	case name == "ollama":
		fmt.Println("Warning: could not connect to a running Ollama instance")
		fmt.Println("Warning: client version is " + os.Getenv("TEST_VERSION"))
		os.Exit(0)
	case Called(os.Args) && os.Getenv("TEST_AS_ENGINE") == "":
		os.Setenv("TEST_AS_ENGINE", "1") // for the program that it executes
		os.Exit(Main(os.Args))
	case Called(os.Args):
		os.Exit(fakeEngine())
	case os.Getenv("TEST_HOLD_NOTE") != "":
		os.Exit(holdNote())
	}
	goleak.VerifyTestMain(m)
}

// report is a fake engine's report about itself.
type report struct {
	Args []string
	PID  int
}

// fakeEngine writes its report to the path in TEST_REPORT. It exits with the status in TEST_EXIT,
// or else at the end of its input.
func fakeEngine() int {
	text, err := json.Marshal(report{os.Args, os.Getpid()})
	if err != nil {
		return 99
	}
	path := os.Getenv("TEST_REPORT")
	// The umask must be able to change this mode.
	if os.WriteFile(path+".new", text, 0o666) != nil || os.Rename(path+".new", path) != nil {
		return 98
	}
	fmt.Println("reported")
	if code, err := strconv.Atoi(os.Getenv("TEST_EXIT")); err == nil {
		return code
	}
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// install installs an Ollama with an engine in a new folder, as its packages do, and returns its
// binary.
func install(t testing.TB) string {
	t.Helper()
	t.Setenv("TEST_VERSION", "0.34.1")
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	lib := filepath.Join(root, "lib", "ollama")
	for _, dir := range []string{filepath.Join(root, "bin"), filepath.Join(lib, "cuda_v13")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ollama := filepath.Join(root, "bin", "ollama")
	for _, path := range []string{ollama, filepath.Join(lib, engineName)} {
		if err := linkOrCopy(self, path); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"libllama.so", "cuda_v13/libggml-cuda.so"} {
		write(t, filepath.Join(lib, name), "the content of "+name)
	}
	return ollama
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// linkTo links an Ollama in a new folder.
func linkTo(t testing.TB, ollama string) Info {
	t.Helper()
	info, err := Link(LinkOptions{Ollama: ollama, Home: filepath.Join(t.TempDir(), "home")})
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// shim is a started program of a link.
type shim struct {
	*exec.Cmd
	stderr strings.Builder
	input  io.Closer
	report report
	home   string
}

// start starts the program of a link as Ollama does, and waits for the engine that it executes.
func start(t testing.TB, home string, env []string, args ...string) *shim {
	t.Helper()
	path := filepath.Join(t.TempDir(), "report")
	s := &shim{Cmd: exec.Command(filepath.Join(home, linkedEngine), args...), home: home}
	s.Env = append(append(os.Environ(), "TEST_REPORT="+path), env...)
	s.Stderr = &s.stderr
	var err error
	if s.input, err = s.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Process.Kill(); s.Wait() })
	line := make([]byte, len("reported\n"))
	if _, err := io.ReadFull(out, line); err != nil {
		s.input.Close()
		s.Wait()
		t.Fatalf("the engine was not started: %v: %s", err, s.stderr.String())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &s.report); err != nil {
		t.Fatal(err)
	}
	return s
}

// end lets the engine end by itself and returns its stderr.
func (s *shim) end(t testing.TB) string {
	t.Helper()
	s.input.Close()
	if err := s.Wait(); err != nil {
		t.Errorf("the engine ended with %v: %s", err, s.stderr.String())
	}
	return s.stderr.String()
}
