package realollama

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// Macros of instructions that the baseline lacks: a build that has any of them may use instructions
// that another machine lacks, or that a kernel does not permit.
var beyondBaseline = []string{"__AMX_TILE__", "__AMX_INT8__", "__AMX_BF16__", "__AVX512F__", "__AVXVNNI__"}

// TestBuildsAreForABaseline checks the environment and the flags of each build, as the commands get
// them. Without the baseline, -march=native on a Xeon with AMX, whose kernel permits no tiles, gave
// an engine that died of SIGILL and an Ollama 0.24.0 that did not link.
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
	}
}

// TestBuildCommandsGetTheBaseline runs the recipes with programs in place of cmake, ninja and go
// that record their arguments and environment.
func TestBuildCommandsGetTheBaseline(t *testing.T) {
	c, _ := openTestCache(t)
	for _, name := range []string{"CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CGO_CFLAGS", "CGO_CXXFLAGS", "CGO_CPPFLAGS", "CGO_LDFLAGS"} {
		t.Setenv(name, "-march=native")
	}
	t.Setenv("GOFLAGS", "-tags=native")
	t.Setenv("GOAMD64", "v4-native")
	tools := t.TempDir()
	noted := filepath.Join(tools, "noted")
	for _, name := range []string{"cmake", "ninja", "go"} {
		script := "#!/bin/sh\n{ echo " + name + " \"$@\"; env | grep -E '^(CGO_|GO|C|LD)[A-Z0-9]*='; env | grep FLAGS; } >>" + noted + "\n" +
			"[ \"$1 $2\" = 'mod download' ] && echo '{\"Dir\": \"" + tools + "\"}'\nexit 0\n"
		if err := os.WriteFile(filepath.Join(tools, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	_, err := c.ensure(t.Context(), recipe{name: "builds", make: func(ctx context.Context, b *build) error {
		// It fails since there is no result after the build.
		_ = b.cmake(ctx, b.Work, sourceFlags(runtime.GOARCH))
		for _, version := range []string{EraB, EraC, EraA} {
			if err := b.buildProgram(ctx, version, programEnv(version, runtime.GOARCH, "/headers")); err != nil {
				return err
			}
		}
		return nil
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

// TestGoSettingsDoNotReachBuilds: settings of `go env -w` do not reach builds. An empty variable
// would not override them.
func TestGoSettingsDoNotReachBuilds(t *testing.T) {
	settings := filepath.Join(t.TempDir(), "env")
	var hostile strings.Builder
	for _, name := range []string{"GOFLAGS", "CGO_CFLAGS", "CGO_CXXFLAGS", "CGO_CPPFLAGS", "CGO_LDFLAGS"} {
		hostile.WriteString(name + "=-march=native\n")
	}
	hostile.WriteString("GOAMD64=v4\nGOARM64=v9.5\n")
	if err := os.WriteFile(settings, []byte(hostile.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{EraA, EraC} {
		cmd := exec.CommandContext(t.Context(), "go", "env", "GOFLAGS", "CGO_CFLAGS", "CGO_CXXFLAGS", "CGO_CPPFLAGS", "CGO_LDFLAGS", "GOAMD64", "GOARM64")
		cmd.Env = slices.Concat(os.Environ(), []string{"GOENV=" + settings}, programEnv(version, runtime.GOARCH, "/headers"))
		output, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range []string{"native", "v4", "v9.5"} {
			if strings.Contains(string(output), bad) {
				t.Errorf("ollama %s is built with %q:\n%s", version, bad, output)
			}
		}
	}
}

// TestCompilerKeepsToTheBaseline asks the compiler itself, whatever processor this is.
func TestCompilerKeepsToTheBaseline(t *testing.T) {
	compiler := firstInPath(os.Getenv("CC"), "cc", "gcc", "clang")
	if compiler == "" {
		t.Fatal("a C compiler is needed; install one (Debian: apt-get install build-essential)")
	}
	ask := func(flags []string) []byte {
		t.Helper()
		args := append(flags, "-dM", "-E", "-x", "c", os.DevNull)
		macros, err := exec.CommandContext(t.Context(), compiler, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", compiler, args, err, macros)
		}
		return macros
	}
	macros := ask(baselineCompilerFlags(runtime.GOARCH))
	if runtime.GOARCH == "amd64" {
		// The same check finds what -march=native would mean on a Xeon with AMX (GCC 11, Clang 12,
		// and later).
		if trap := ask([]string{"-march=sapphirerapids"}); !bytes.Contains(trap, []byte("#define __AMX_TILE__ ")) {
			t.Error("the compiler does not tell when it uses AMX: this test shows nothing")
		}
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
