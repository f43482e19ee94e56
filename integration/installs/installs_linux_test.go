package installs

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/elf"
	"debug/pe"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// repository is the root of the source, where goreleaser writes its results into dist.
var repository = "../.."

const (
	goreleaser = "github.com/goreleaser/goreleaser/v2@v2.15.1"
	composeGo  = "github.com/compose-spec/compose-go/v2/cmd@v2.16.2"
)

// platforms are those that the test makes a release for: this machine's, and one of another system
// and another processor. Each takes a minute of two cores, and the linters compile for all systems.
var platforms = []string{"linux/" + runtime.GOARCH, "windows/" + map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]}

// everywhere is how goreleaser's settings name the platforms of a release.
const everywhere = `
    goos: [linux, darwin, windows]
    goarch: [amd64, arm64]
`

// packages are installed in the Debian on which the release's packages are tested, beside the
// minimal system. The engine of an Ollama that is assembled from prebuilt parts needs Python.
const packages = "systemd,python3,systemd-sysv,dbus,procps,curl,rpm,ruby,bash-completion,zsh,fish,man-db"

// TestRelease makes a release without publishing it, and installs the results.
func TestRelease(t *testing.T) {
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	releaser := releaser(t, cache)
	// Goreleaser reports no commit if the repository has no origin, as may be with a clone of a
	// clone.
	t.Setenv("GIT_CONFIG_COUNT", "1")
	t.Setenv("GIT_CONFIG_KEY_0", "remote.origin.url")
	t.Setenv("GIT_CONFIG_VALUE_0", "https://github.com/ollama-cacheproxy/ollama-cacheproxy.git")
	repository = tracked(t, repository)
	// As much of it as --version prints.
	commit := output(t, repository, "git", "rev-parse", "HEAD")[:12]
	output(t, repository, releaser, "check")
	output(t, repository, releaser, "release", "--snapshot", "--clean", "--config", fewer(t), "--parallelism", fmt.Sprint(runtime.NumCPU()))
	made := artifacts(t)
	t.Run("programs", func(t *testing.T) { programs(t, made, commit) })
	t.Run("archives", func(t *testing.T) { archives(t, made) })
	t.Run("bills of materials", func(t *testing.T) { billsOfMaterials(t, made) })
	t.Run("checksums", func(t *testing.T) { checksums(t, made) })
	t.Run("machine", func(t *testing.T) { machine(t, debian(t, cache), made, commit) })
}

// fewer returns a file with goreleaser's settings, for platforms only.
func fewer(t *testing.T) string {
	settings := string(must(os.ReadFile(filepath.Join(repository, ".goreleaser.yaml"))))
	if strings.Count(settings, everywhere) != 1 {
		t.Fatalf("goreleaser's settings do not name all platforms:%s", everywhere)
	}
	var targets strings.Builder
	targets.WriteString("\n    targets:\n")
	for _, platform := range platforms {
		// Without its variant, goreleaser takes that of goamd64 or goarm64.
		fmt.Fprintf(&targets, "      - %s\n", strings.ReplaceAll(platform, "/", "_"))
	}
	file := filepath.Join(t.TempDir(), "goreleaser.yaml")
	if err := os.WriteFile(file, []byte(strings.Replace(settings, everywhere, targets.String(), 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// tracked returns a folder with the source in which git works: the source's own, or else a copy with
// one commit, since a release is made of a commit and an archive of the source has none.
func tracked(t *testing.T, source string) string {
	if exec.Command("git", "-C", source, "rev-parse", "HEAD").Run() == nil {
		return source
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(source)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, ".git")); err != nil { // one that git does not accept
		t.Fatal(err)
	}
	t.Cleanup(func() { repository = source }) // the folder is gone then
	output(t, dir, "git", "init", "--quiet")
	output(t, dir, "git", "add", "--all")
	output(t, dir, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message", "source")
	return dir
}

// TestCompose loads the compose files with the reference implementation, and checks that the files
// they mount exist.
func TestCompose(t *testing.T) {
	t.Setenv("CACHEPROXY_PEER_SECRET", "of the fleet")
	compose(t, "deploy/docker/compose.yaml", "ollama", "cacheproxy", "prometheus", "grafana")
	compose(t, "deploy/compose/fleet.yaml", "ollama-a", "ollama-b", "proxy-a", "proxy-b", "proxy-c", "valkey")
}

// compose checks one file, which must have these services.
func compose(t *testing.T, file string, services ...string) {
	t.Helper()
	text := output(t, filepath.Join(repository, filepath.Dir(file)), "go", "run", composeGo, "-format", "json", filepath.Base(file))
	var project struct {
		Services map[string]struct {
			Ports   []struct{ Host_IP string }
			Volumes []struct{ Type, Source string }
		}
	}
	if err := json.Unmarshal([]byte(text), &project); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	for _, name := range services {
		if _, ok := project.Services[name]; !ok {
			t.Errorf("%s has no service %s", file, name)
		}
	}
	for name, service := range project.Services {
		for _, port := range service.Ports {
			if port.Host_IP != "127.0.0.1" {
				t.Errorf("%s is published to others: %+v", name, port)
			}
		}
		for _, volume := range service.Volumes {
			if _, err := os.Stat(volume.Source); volume.Type == "bind" && err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// releaser returns the path of goreleaser, which is built once: it takes minutes, fewer without the
// compiler's optimizations.
func releaser(t *testing.T, cache *realollama.Cache) string {
	dir, err := cache.Ensure(t.Context(), realollama.Made{
		Name: "goreleaser", Inputs: []string{goreleaser, runtime.Version()}, Announce: "building goreleaser (2 to 4 min)",
		Make: func(_ context.Context, result string, run func(string, ...string) error) error {
			return run("", "env", "GOBIN="+result, "go", "install", "-gcflags=all=-N -l", goreleaser)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "goreleaser")
}

// debian returns the folder of a small Debian (or of this machine's own distribution, as its apt
// provides it), which is made once.
func debian(t *testing.T, cache *realollama.Cache) string {
	if os.Getuid() != 0 {
		t.Fatal("packages are tried in a container of systemd-nspawn, which only root may start: run this test as root")
	}
	sources, err := filepath.Glob("/etc/apt/sources.list.d/*")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/etc/apt/sources.list"); err == nil {
		sources = append(sources, "/etc/apt/sources.list")
	}
	for _, tool := range [][2]string{{"mmdebstrap", "mmdebstrap"}, {"systemd-nspawn", "systemd-container"}} {
		if _, err := exec.LookPath(tool[0]); err != nil {
			output(t, "", "apt-get", "update")
			output(t, "", "apt-get", "install", "--yes", "--no-install-recommends", tool[1])
		}
	}
	dir, err := cache.Ensure(t.Context(), realollama.Made{
		Name: "debian", Inputs: append([]string{"1", packages}, sources...), Announce: "making a small Debian (1 to 2 min, 400 MB)",
		Make: func(_ context.Context, result string, run func(string, ...string) error) error {
			command := []string{"mmdebstrap", "--variant=minbase", "--include=" + packages, "", filepath.Join(result, "root")}
			return run("", append(command, sources...)...)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "root")
}

// artifact is one of goreleaser's results.
type artifact struct {
	Name, Path, Type, GOOS, GOARCH string
}

// open returns a reader of the file.
func (a artifact) open(t *testing.T) *os.File {
	f, err := os.Open(filepath.Join(repository, a.Path))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func artifacts(t *testing.T) []artifact {
	text, err := os.ReadFile(filepath.Join(repository, "dist/artifacts.json"))
	if err != nil {
		t.Fatal(err)
	}
	var made []artifact
	if err := json.Unmarshal(text, &made); err != nil {
		t.Fatal(err)
	}
	return made
}

// of returns the artifacts of a type, by platform. There must be one for each.
func of(t *testing.T, made []artifact, kind string) map[string]artifact {
	t.Helper()
	found := map[string]artifact{}
	for _, a := range made {
		if a.Type == kind {
			found[a.GOOS+"/"+a.GOARCH] = a
		}
	}
	for _, platform := range platforms {
		if _, ok := found[platform]; !ok {
			t.Errorf("there is no %s for %s", kind, platform)
		}
	}
	return found
}

// one returns the artifact for this machine whose name has a suffix.
func one(t *testing.T, made []artifact, suffix string) artifact {
	t.Helper()
	for _, a := range made {
		if a.GOOS == "linux" && a.GOARCH == runtime.GOARCH && strings.HasSuffix(a.Name, suffix) {
			return a
		}
	}
	t.Fatalf("there is no %s for linux/%s", suffix, runtime.GOARCH)
	return artifact{}
}

// programs checks each program's format, and runs this machine's with --version.
func programs(t *testing.T, made []artifact, commit string) {
	for platform, a := range of(t, made, "Binary") {
		machine, err := programOf(a.GOOS, a.open(t))
		if err != nil {
			t.Errorf("%s: %v", platform, err)
		}
		want := map[string]string{
			"linux/amd64": "EM_X86_64", "linux/arm64": "EM_AARCH64", "windows/amd64": "8664", "windows/arm64": "aa64",
		}[platform]
		if machine != want {
			t.Errorf("%s: the program is for %s, not %s", platform, machine, want)
		}
	}
	said := output(t, "", filepath.Join(must(filepath.Abs(repository)), one(t, made, "ollama-cacheproxy").Path), "--version")
	if !strings.Contains(said, "commit "+commit) || !strings.Contains(said, runtime.Version()) {
		t.Errorf("--version of %s and %s: %q", commit, runtime.Version(), said)
	}
}

// programOf returns the processor that a program is for.
func programOf(goos string, f io.ReaderAt) (string, error) {
	switch goos {
	case "linux":
		program, err := elf.NewFile(f)
		if err != nil {
			return "", err
		}
		if slices.ContainsFunc(program.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
			return "", errors.New("the program is linked to libraries of the system")
		}
		return program.Machine.String(), nil
	default:
		program, err := pe.NewFile(f)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%x", program.Machine), nil
	}
}

// archives checks the archive for this machine.
func archives(t *testing.T, made []artifact) {
	of(t, made, "Archive")
	zipped, err := gzip.NewReader(one(t, made, ".tar.gz").open(t))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for reader := tar.NewReader(zipped); ; {
		header, err := reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
	}
	for _, name := range []string{"ollama-cacheproxy", "README.md", "extras/ollama-cacheproxy.1", "extras/ollama-cacheproxy.zsh"} {
		if !slices.Contains(names, name) {
			t.Errorf("the archive has no %s: %q", name, names)
		}
	}
}

// billsOfMaterials looks for a library in each of them. They name what they describe only in their
// file names.
func billsOfMaterials(t *testing.T, made []artifact) {
	for _, platform := range platforms {
		i := slices.IndexFunc(made, func(a artifact) bool {
			return a.Type == "SBOM" && strings.HasSuffix(a.Name, "_"+strings.ReplaceAll(platform, "/", "_")+".cdx.json")
		})
		if i < 0 {
			t.Errorf("there is none for %s", platform)
			continue
		}
		var bill struct {
			BOMFormat  string
			Components []struct{ PURL string }
		}
		if err := json.NewDecoder(made[i].open(t)).Decode(&bill); err != nil {
			t.Errorf("%s: %v", platform, err)
		}
		if bill.BOMFormat != "CycloneDX" || !slices.ContainsFunc(bill.Components, func(c struct{ PURL string }) bool {
			return strings.HasPrefix(c.PURL, "pkg:golang/github.com/alecthomas/kong@")
		}) {
			t.Errorf("%s: kong is not among %d components of a %s", platform, len(bill.Components), bill.BOMFormat)
		}
	}
}

// checksums compares each checksum with its file.
func checksums(t *testing.T, made []artifact) {
	sums := map[string]string{}
	i := slices.IndexFunc(made, func(a artifact) bool { return a.Type == "Checksum" })
	if i < 0 {
		t.Fatal("there are no checksums")
	}
	for lines := bufio.NewScanner(made[i].open(t)); lines.Scan(); {
		sum, name, _ := strings.Cut(lines.Text(), "  ")
		sums[name] = sum
	}
	for _, a := range made {
		if a.Type != "Archive" && a.Type != "Linux Package" && a.Type != "SBOM" {
			continue
		}
		hash := sha256.New()
		if _, err := io.Copy(hash, a.open(t)); err != nil {
			t.Fatal(err)
		}
		if sums[a.Name] != hex.EncodeToString(hash.Sum(nil)) {
			t.Errorf("%s: the checksum is %q", a.Name, sums[a.Name])
		}
	}
}

// tryUnit makes systemd run machine.sh, and end with its status.
const tryUnit = `[Unit]
SuccessAction=exit
FailureAction=exit
[Service]
Type=oneshot
WorkingDirectory=%[1]s
ExecStart=/bin/bash %[1]s/machine.sh
StandardOutput=file:%[1]s/log
StandardError=inherit
`

// machine boots the Debian in root, runs machine.sh there, and builds what the formula needs. It
// leaves nothing in root. The loopback addresses are this machine's, and a real Ollama runs there.
func machine(t *testing.T, root string, made []artifact, commit string) {
	server := realollama.Start(t, realollama.Config{Version: realollama.Newest(), Models: []string{"smollm2"}})
	dir := t.TempDir()
	copies := map[string]string{
		"package.deb": filepath.Join(repository, one(t, made, ".deb").Path),
		"package.rpm": filepath.Join(repository, one(t, made, ".rpm").Path),
		"formula.rb":  filepath.Join(repository, "deploy/homebrew/ollama-cacheproxy.rb"),
		"install.md":  filepath.Join(repository, "docs/install.md"),
	}
	for _, a := range made {
		if a.GOOS == "linux" && (a.Type == "Archive" || a.Type == "Linux Package") || a.Type == "Checksum" {
			copies[a.Name] = filepath.Join(repository, a.Path)
		}
	}
	for _, name := range []string{"machine.sh", "homebrew.rb", "zsh-completes.zsh"} {
		copies[name] = filepath.Join("testdata", name)
	}
	for name, from := range copies {
		if err := os.WriteFile(filepath.Join(dir, name), must(os.ReadFile(from)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "try.service"), fmt.Appendf(nil, tryUnit, dir), 0o644); err != nil {
		t.Fatal(err)
	}
	listen, ollama := must(net.Listen("tcp", "127.0.0.1:0")), must(net.Listen("tcp", "127.0.0.1:0"))
	listen.Close()
	ollama.Close()
	binary := server.Bin()
	command := exec.CommandContext(t.Context(), "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe",
		"--directory="+root, "--volatile=overlay", "--bind="+dir, "--bind-ro="+dir+"/try.service:/etc/systemd/system/try.service",
		"--bind-ro="+binary+":/usr/local/bin/ollama", "--bind-ro="+filepath.Join(filepath.Dir(binary), "../lib/ollama")+":/usr/local/lib/ollama",
		"--bind-ro="+server.ModelsDir()+":/srv/models", "--boot", "systemd.unit=try.service", "systemd.setenv=COMMIT="+commit,
		"systemd.setenv=OLLAMA_CACHEPROXY_LISTEN="+listen.Addr().String(), "systemd.setenv=OLLAMA_CACHEPROXY_UPSTREAM="+server.Addr(),
		"systemd.setenv=OLLAMA_HOST="+ollama.Addr().String(), "systemd.setenv=OLLAMA_MODELS=/srv/models", "systemd.setenv=OLLAMA_NO_CLOUD=1",
		// As in package realollama.
		"systemd.setenv=OMP_WAIT_POLICY=passive")
	console, err := command.CombinedOutput()
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil || !strings.HasSuffix(string(log), "\nall is well\n") {
		t.Fatalf("%v: %s\nthe script's log: %s", err, console, log)
	}
	formula(t, string(log), filepath.Join(dir, "brewed"))
}

// formula runs the formula's build command, as the log of machine.sh has it.
func formula(t *testing.T, log, prefix string) {
	_, line, ok := strings.Cut(log, "\nRUN ")
	if !ok {
		t.Fatal("the formula builds nothing")
	}
	var command []string
	line, _, _ = strings.Cut(line, "\n")
	if err := json.Unmarshal([]byte(line), &command); err != nil || command[0] != "go" {
		t.Fatalf("%q: %v", line, err)
	}
	program := filepath.Join(prefix, "bin/ollama-cacheproxy")
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	output(t, repository, command[0], command[1:]...)
	_, version, _ := strings.Cut(line, "main.versionText=")
	version, _, _ = strings.Cut(version, `"`)
	if said := output(t, "", program, "--version"); version == "" || !strings.HasPrefix(said, "ollama-cacheproxy "+version+" ") {
		t.Errorf("--version of %s: %q", version, said)
	}
}

// output runs a command in a folder and returns its output; it must succeed.
func output(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	command := exec.CommandContext(t.Context(), name, args...)
	command.Dir = dir
	var errors strings.Builder
	command.Stderr = &errors
	text, err := command.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, text, errors.String())
	}
	return string(text)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
