package realollama

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// What a processor has that the baseline has not: with any of these a build may use instructions
// that another machine lacks, or that a kernel does not permit.
var beyondBaseline = []string{"__AMX_TILE__", "__AMX_INT8__", "__AMX_BF16__", "__AVX512F__", "__AVXVNNI__"}

// TestBuildsAreForABaseline looks at the environment and the flags of each build, as the commands
// get them. Seen without: -march=native on a Xeon with AMX, whose kernel permits no tiles, gave an
// engine that died of SIGILL and an Ollama 0.24.0 that did not link.
func TestBuildsAreForABaseline(t *testing.T) {
	for _, goarch := range []string{"amd64", "arm64"} {
		for _, version := range []string{EraA, EraB, EraC} {
			env := strings.Join(programEnv(version, goarch, "/headers"), "\n")
			if strings.Contains(env, "native") {
				t.Errorf("ollama %s on %s is built for this machine: %s", version, goarch, env)
			}
			if version == EraA && !strings.Contains(env, baselineCompilerFlags(goarch)[0]) {
				t.Errorf("ollama %s on %s is built without the baseline's flags: %s", version, goarch, env)
			}
		}
		flags := strings.Join(sourceFlags(goarch), " ")
		if !strings.Contains(flags, "-DGGML_NATIVE=OFF") || strings.Contains(flags, "NATIVE=ON") {
			t.Errorf("the engine on %s is built for this machine: %s", goarch, flags)
		}
		for _, variable := range []string{"CFLAGS=", "CXXFLAGS=", "GOFLAGS="} {
			if !strings.Contains("\n"+strings.Join(portableEnv(), "\n")+"\n", "\n"+variable+"\n") {
				t.Errorf("the caller's %s reaches the builds", variable)
			}
		}
	}
}

// TestBuildCommandsGetTheBaseline runs the recipes with programs in place of cmake, ninja and go
// that note what they are called with.
func TestBuildCommandsGetTheBaseline(t *testing.T) {
	c, _ := openTestCache(t)
	t.Setenv("CFLAGS", "-march=native")
	t.Setenv("CXXFLAGS", "-march=native")
	tools := t.TempDir()
	noted := filepath.Join(tools, "noted")
	for _, name := range []string{"cmake", "ninja", "go"} {
		script := "#!/bin/sh\n{ echo " + name + " \"$@\"; echo CFLAGS=$CFLAGS CXXFLAGS=$CXXFLAGS CGO_CFLAGS=$CGO_CFLAGS CGO_CXXFLAGS=$CGO_CXXFLAGS; } >>" + noted + "\n" +
			"[ \"$1 $2\" = 'mod download' ] && echo '{\"Dir\": \"" + tools + "\"}'\nexit 0\n"
		if err := os.WriteFile(filepath.Join(tools, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	_, err := c.ensure(t.Context(), recipe{name: "builds", make: func(ctx context.Context, b *build) error {
		// It fails for want of a result, after it was built.
		_ = b.cmake(ctx, b.Work, sourceFlags(runtime.GOARCH))
		return b.buildProgram(ctx, EraA, programEnv(EraA, runtime.GOARCH, "/headers"))
	}})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(noted)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"cmake -G Ninja", "ninja -C", "go build -x"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%q was not run:\n%s", want, text)
		}
	}
	if strings.Contains(string(text), "native") {
		t.Errorf("a build is for this machine:\n%s", text)
	}
	for _, flag := range baselineCompilerFlags(runtime.GOARCH) {
		if !strings.Contains(string(text), flag) {
			t.Errorf("the build of ollama %s does not get %s:\n%s", EraA, flag, text)
		}
	}
}

// TestCompilerKeepsToTheBaseline asks the compiler itself, on whatever processor this is.
func TestCompilerKeepsToTheBaseline(t *testing.T) {
	compiler := firstInPath(os.Getenv("CC"), "cc", "gcc", "clang")
	if compiler == "" {
		t.Fatal("a C compiler is needed; install one (Debian: apt-get install build-essential)")
	}
	args := append(baselineCompilerFlags(runtime.GOARCH), "-dM", "-E", "-x", "c", os.DevNull)
	macros, err := exec.CommandContext(t.Context(), compiler, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", compiler, args, err, macros)
	}
	if runtime.GOARCH == "amd64" {
		for _, macro := range []string{"__AVX2__", "__FMA__", "__F16C__", "__BMI2__"} {
			if !bytes.Contains(macros, []byte("#define "+macro+" ")) {
				t.Errorf("the compiler does not set %s", macro)
			}
		}
	}
	for _, macro := range beyondBaseline {
		if bytes.Contains(macros, []byte("#define "+macro+" ")) {
			t.Errorf("the compiler sets %s, which is beyond the baseline", macro)
		}
	}
}
