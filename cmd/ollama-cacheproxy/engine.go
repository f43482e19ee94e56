package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// engineCmd links the proxy to the engines of an Ollama on the same machine; see docs/engine.md.
type engineCmd struct {
	Copy   engineCopyCmd   `cmd:"" help:"Copy this program into a volume, for a container of Ollama."`
	Link   engineLinkCmd   `cmd:"" help:"Link to an installed Ollama, or renew the link after an upgrade."`
	Unlink engineUnlinkCmd `cmd:"" help:"Remove a link."`
	Status engineStatusCmd `cmd:"" help:"Show what is linked and which engines run."`
}

type engineCopyCmd struct {
	File string `arg:"" placeholder:"FILE" help:"Where to put the program; an older one is replaced."`
}

func (e *engineCopyCmd) Help() string {
	return `Copies this program, so that "engine link" can run where Ollama is, in another container: this program's
image has nothing else that could copy.

Example:

  ollama-cacheproxy engine copy /linked/ollama-cacheproxy`
}

func (e *engineCopyCmd) Run(c *console) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	if err := copyProgram(program, e.File); err != nil {
		return fmt.Errorf("copying %s to %s: %w", program, e.File, err)
	}
	fmt.Fprintf(c.stdout, "copied %s to %s\n", program, e.File)
	return nil
}

// copyProgram copies a program to a file. An older one is replaced as a whole: it may be running, or
// linked.
func copyProgram(from, to string) (err error) {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.CreateTemp(filepath.Dir(to), filepath.Base(to)+".")
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	if err = errors.Join(err, target.Chmod(0o755), target.Close()); err == nil {
		err = os.Rename(target.Name(), to)
	}
	if err != nil {
		return errors.Join(err, os.Remove(target.Name()))
	}
	return nil
}

type engineLinkCmd struct {
	Ollama  string `placeholder:"PATH" help:"The installed ollama binary. Default: the one in PATH, or where installers put it."`
	To      string `required:"" placeholder:"DIR" help:"The folder of the link; it is created if necessary."`
	SWAFull bool   `name:"swa-full" help:"Let models with a sliding window (Gemma 3, gpt-oss) keep all tokens, which takes more memory, so that their contexts can be stored."`
}

func (e *engineLinkCmd) Help() string {
	return `Creates a second folder for an installed Ollama, 0.30 or later, whose engines tell the proxy where they
are and save their contexts there. The installed Ollama is not changed. Start DIR/bin/ollama in its
place, and the proxy with --contexts DIR, as the same user.

If the link is up to date, nothing is changed. So run it before each start of Ollama, and upgrades are
noticed.

Examples:

  ollama-cacheproxy engine link --to ~/.ollama-linked
  ~/.ollama-linked/bin/ollama serve
  ollama-cacheproxy engine link --ollama /opt/ollama/bin/ollama --to /var/lib/ollama-linked`
}

func (e *engineLinkCmd) Run(c *console) error {
	ollama := e.Ollama
	if ollama == "" {
		if ollama = findOllama(); ollama == "" {
			return errors.New("there is no ollama in PATH or where installers put it: " +
				"say where it is with --ollama")
		}
	}
	info, err := engine.Link(engine.LinkOptions{Ollama: ollama, Home: e.To, SWAFull: e.SWAFull})
	if err != nil {
		return err
	}
	if !info.Anew {
		fmt.Fprintf(c.stdout, "%s is linked to %s already, and nothing has changed\n",
			info.Home, info.Ollama)
		return nil
	}
	fmt.Fprintf(c.stdout, "linked %s%s to %s\n", info.Ollama, ofVersion(info), info.Home)
	nextStep(c.stdout, info)
	return nil
}

func ofVersion(info engine.Info) string {
	if info.Version == "" {
		return ""
	}
	return " (" + info.Version + ")"
}

// nextStep says how to start the linked Ollama.
func nextStep(w io.Writer, info engine.Info) {
	fmt.Fprintf(w, "\nNext, stop Ollama and start it as\n\n  %s serve\n", info.Start())
	if runtime.GOOS == "linux" {
		program, err := os.Executable()
		if err != nil {
			program = "ollama-cacheproxy"
		}
		fmt.Fprintf(w, `
or, where systemd starts it, with "systemctl edit ollama" and

  [Service]
  ExecStartPre=%s
  ExecStart=
  ExecStart=%s serve

`, info.Command(program), info.Start())
	}
	fmt.Fprintf(w, "and the proxy, as the same user, as\n\n")
	fmt.Fprintf(w, "  ollama-cacheproxy serve --contexts %s\n", info.Home)
}

// findOllama returns the ollama in PATH, or the one where installers and package managers put it;
// "" if there is none.
func findOllama() string {
	if path, err := exec.LookPath("ollama"); err == nil {
		return path
	}
	places := []string{
		"/usr/local/bin/ollama", "/usr/bin/ollama", "/bin/ollama", "/opt/ollama/bin/ollama",
		"/opt/homebrew/bin/ollama", "/Applications/Ollama.app/Contents/Resources/ollama",
	}
	if home, err := os.UserHomeDir(); err == nil {
		places = append(places, filepath.Join(home, ".local", "bin", "ollama"))
	}
	for _, place := range places {
		if info, err := os.Stat(place); err == nil && info.Mode().IsRegular() {
			return place
		}
	}
	return ""
}

type engineUnlinkCmd struct {
	Dir      string `arg:"" placeholder:"DIR" help:"The folder of the link."`
	Contexts bool   `help:"Remove the stored contexts, too."`
}

func (e *engineUnlinkCmd) Help() string {
	return `Removes what engine link has created, but keeps the stored contexts unless --contexts is given.
Stop the linked Ollama first: it needs the link to load models.

Example:

  ollama-cacheproxy engine unlink ~/.ollama-linked`
}

func (e *engineUnlinkCmd) Run(c *console) error {
	if err := engine.Unlink(e.Dir, e.Contexts); err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "unlinked %s\n", e.Dir)
	return nil
}

type engineStatusCmd struct {
	Dir string `arg:"" placeholder:"DIR" help:"The folder of the link."`
}

func (e *engineStatusCmd) Help() string {
	return `Shows which Ollama is linked, whether it has changed since, and which of its engines run. It exits
with 1 if stored contexts are off, as they are after an upgrade until engine link is run again.

Example:

  ollama-cacheproxy engine status ~/.ollama-linked`
}

func (e *engineStatusCmd) Run(c *console) error {
	info, err := engine.Inspect(e.Dir)
	if err != nil {
		return err
	}
	swa := ""
	if info.SWAFull {
		swa = ", with --swa-full"
	}
	fmt.Fprintf(c.stdout, "%s is linked to %s%s since %s%s\n",
		e.Dir, info.Ollama, ofVersion(info), info.Linked.Local().Format(time.DateTime), swa)
	running, err := engine.Processes(e.Dir)
	if err != nil {
		return err
	}
	if len(running) == 0 {
		fmt.Fprintln(c.stdout, "no engines run")
	}
	for _, p := range running {
		started := p.Started.Local().Format(time.DateTime)
		fmt.Fprintf(c.stdout, "port %d: %s, slots: %d of %d tokens, since %s, of the Ollama on %s\n",
			p.Port, p.Blob(), p.Parallel, p.ContextEach, started, p.Server)
	}
	if info.Stale != "" {
		return fmt.Errorf("stored contexts are off: %s; link anew: %s",
			info.Stale, info.Command("ollama-cacheproxy"))
	}
	return nil
}
