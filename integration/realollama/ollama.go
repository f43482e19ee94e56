package realollama

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// Ollama returns the path of the ollama binary of a version: the one that the environment names
// (OLLAMA_BIN_0_34_1), else the one in PATH if it has that version, else one built into the cache.
// A probe has shown that it answers on this machine, with weights of each type that the tests use.
func (c *Cache) Ollama(ctx context.Context, version string) (string, error) {
	if !known(version) {
		return "", fmt.Errorf("no Ollama %q; there are %s, %s and %s", version, EraA, EraB, EraC)
	}
	if bin := os.Getenv(binEnv(version)); bin != "" {
		if err := c.probed(ctx, version, bin); err != nil {
			return "", fmt.Errorf("using the ollama that %s names: %w", binEnv(version), err)
		}
		return bin, nil
	}
	if bin := firstInPath("ollama"); bin != "" && engine.VersionOf(ctx, bin) == version {
		err := c.probed(ctx, version, bin)
		if err == nil || ctx.Err() != nil {
			return bin, err
		}
		c.say("the ollama %s in PATH does not work here, another is built: %v", version, err)
	}
	bin, err := c.built(ctx, version)
	if err != nil {
		return "", err
	}
	if err := c.probed(ctx, version, bin); err != nil {
		return "", fmt.Errorf("%w\nName an Ollama that works on this machine with %s=/path/to/ollama%s", err, binEnv(version), otherEngine(version))
	}
	return bin, nil
}

// otherEngine says what else to try if a built server does not work.
func otherEngine(version string) string {
	if version == EraA || os.Getenv(engineEnv) == "source" {
		return "."
	}
	return ", or have the engine built from its source with " + engineEnv + "=source (about 10 min)."
}

// binEnv returns the variable with which a person chooses the binary of a version.
func binEnv(version string) string { return "OLLAMA_BIN_" + strings.ReplaceAll(version, ".", "_") }

// Installed is an installed Ollama: its binary and the version that it reports.
type Installed struct{ Bin, Version string }

// FindInstalled returns the installed Ollama, in PATH or where installers put it, if its version is
// 0.24 or newer and it works; the zero value if there is none. It reports an Ollama that cannot be
// used to the cache's progress. The error is the context's.
func (c *Cache) FindInstalled(ctx context.Context) (Installed, error) {
	return c.firstWorking(ctx, append([]string{firstInPath("ollama")}, usualPlaces()...))
}

func (c *Cache) firstWorking(ctx context.Context, places []string) (Installed, error) {
	tried := map[string]bool{}
	for _, bin := range places {
		real, err := filepath.EvalSymlinks(bin)
		if bin == "" || err != nil || tried[real] {
			continue
		}
		tried[real] = true
		version := engine.VersionOf(ctx, bin)
		if err := ctx.Err(); err != nil {
			return Installed{}, fmt.Errorf("looking for an Ollama: %w", err)
		}
		if Era(version) == "" {
			c.say("%s is not used: it gives itself the version %q, and 0.24 or newer is needed", bin, version)
			continue
		}
		if err := c.probed(ctx, version, bin); err != nil {
			if ctx.Err() != nil {
				return Installed{}, err
			}
			c.say("%s is not used: %v", bin, err)
			continue
		}
		return Installed{bin, version}, nil
	}
	return Installed{}, nil
}

// usualPlaces are where Ollama's installers and package managers put its binary.
func usualPlaces() []string {
	places := []string{
		"/usr/local/bin/ollama", "/usr/bin/ollama", "/opt/ollama/bin/ollama", "/snap/bin/ollama",
		"/opt/homebrew/bin/ollama", "/Applications/Ollama.app/Contents/Resources/ollama",
	}
	if home, err := os.UserHomeDir(); err == nil {
		places = append(places, filepath.Join(home, ".local", "bin", "ollama"), filepath.Join(home, "bin", "ollama"))
	}
	return places
}

// built returns the path of a version's binary in the cache, with its engine in the place where it
// looks for it.
func (c *Cache) built(ctx context.Context, version string) (string, error) {
	program, err := programRecipe(version)
	if err != nil {
		return "", err
	}
	if version != EraA {
		engine, err := c.engineRecipe(ctx)
		if err != nil {
			return "", err
		}
		program = withEngine(version, program, engine)
	}
	dir, err := c.ensure(ctx, program)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "bin", "ollama"), nil
}

// withEngine puts a program beside an engine: the program looks for it in ../lib/ollama.
func withEngine(version string, program, engine recipe) recipe {
	return recipe{
		name:     "ollama-" + version,
		announce: "putting ollama " + version + " and " + engine.name + " together",
		inputs:   []string{program.key(), engine.key()},
		needs:    []recipe{program, engine},
		make: func(ctx context.Context, b *build) error {
			return errors.Join(
				linkTree(b.path(program), b.Result),
				linkTree(b.path(engine), filepath.Join(b.Result, "lib", "ollama")),
			)
		},
	}
}

// programRecipe builds the ollama program of a version from its Go module.
func programRecipe(version string) (recipe, error) {
	goVersion, err := goEnv("GOVERSION")
	if err != nil {
		return recipe{}, fmt.Errorf("building Ollama needs Go: %w", err)
	}
	took := "1 to 2 min"
	if version == EraA {
		took = "4 to 8 min"
	}
	r := recipe{
		name:     "ollama-program-" + version,
		announce: fmt.Sprintf("building ollama %s (%s on 2 cores)", version, took),
		inputs:   append([]string{"recipe 2", version, goVersion}, programEnv(version, runtime.GOARCH, "")...),
	}
	if version == EraA {
		r.needs = []recipe{headersRecipe()}
		r.inputs = append(r.inputs, headersRecipe().key())
	}
	r.make = func(ctx context.Context, b *build) error {
		if err := b.compilers(ctx); err != nil {
			return err
		}
		env := programEnv(version, runtime.GOARCH, b.path(headersRecipe()))
		return b.buildProgram(ctx, version, env)
	}
	return r, nil
}

// programEnv is the environment for building the ollama program of a version.
func programEnv(version, goarch, headers string) []string {
	env := append(portableEnv(), "CGO_ENABLED=1")
	if version != EraA {
		return env
	}
	// It compiles the runners, too. Without -O3 and a baseline they are 20 times slower. With
	// OpenMP their threads can sleep while they wait for each other, as those of eras B and C do
	// (see Server.environment).
	flags := strings.Join(append(baselineCompilerFlags(goarch), "-O3", "-fopenmp", "-DGGML_USE_OPENMP", "'-I"+headers+"'"), " ")
	return append(env, "CGO_CFLAGS="+flags, "CGO_CXXFLAGS="+flags, "CGO_LDFLAGS=-fopenmp")
}

// buildProgram builds a version's program from its module, and counts packages and files of C and
// C++ for the progress.
func (b *build) buildProgram(ctx context.Context, version string, env []string) error {
	module, err := b.goModule(ctx, "github.com/ollama/ollama@v"+version)
	if err != nil {
		return err
	}
	flags := []string{"-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X github.com/ollama/ollama/version.Version=" + version}
	var list bytes.Buffer
	format := `{{if .Stale}}stale {{len .CFiles}} {{len .CXXFiles}}{{end}}`
	if err := b.run(ctx, command{dir: module, env: env, watch: &list, args: slices.Concat([]string{"go", "list", "-deps", "-f", format}, flags, []string{"."})}); err != nil {
		return err
	}
	total := countSteps(list.String())
	var done atomic.Int64
	b.follow(func() progress { return progress{done.Load(), total, "packages and C files"} })
	defer b.forget()
	watch := &lineWatcher{look: func(line []byte) {
		if compileLine.Match(line) {
			done.Add(1)
		}
	}}
	// -x prints each command.
	args := slices.Concat([]string{"go", "build", "-x", "-o", filepath.Join(b.Result, "bin", "ollama")}, flags, []string{"."})
	return b.run(ctx, command{dir: module, env: env, watch: watch, args: args})
}

// countSteps counts the packages, and the files of C and C++, in a list of lines "stale C-FILES
// C++-FILES" between others.
func countSteps(list string) int64 {
	total := int64(0)
	for line := range strings.Lines(list) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != "stale" {
			continue // "go: downloading …"
		}
		total++
		for _, field := range fields[1:] {
			if n, err := strconv.Atoi(field); err == nil {
				total += int64(n)
			}
		}
	}
	return total
}

// compileLine matches the commands in the output of go build -x that compile a package of Go, or a
// C file that is not generated by cgo.
var compileLine = regexp.MustCompile(`/compile"? -o |\s-c (?:\./)?[^\s_$][^\s]*\.(?:c|cc|cpp|cxx)$`)

// goModule downloads a Go module and returns its folder.
func (b *build) goModule(ctx context.Context, module string) (string, error) {
	var output bytes.Buffer
	if err := b.run(ctx, command{env: portableEnv(), watch: &output, args: []string{"go", "mod", "download", "-json", module}}); err != nil {
		return "", err
	}
	var downloaded struct{ Dir string }
	text := output.Bytes()
	if err := json.Unmarshal(text[max(0, bytes.IndexByte(text, '{')):], &downloaded); err != nil || downloaded.Dir == "" {
		return "", fmt.Errorf("downloading %s: go mod download told no folder: %w", module, err)
	}
	return downloaded.Dir, nil
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
