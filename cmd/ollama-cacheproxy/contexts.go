package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

type contextsCmd struct {
	Ls     contextsLs     `cmd:"" help:"List what is stored, most recently used first."`
	Rm     contextsRm     `cmd:"" help:"Remove stored contexts."`
	Verify contextsVerify `cmd:"" help:"Check that what is stored is complete and unchanged."`
}

func (contextsCmd) Help() string {
	return `Contexts are evaluated prompts that serve --contexts HOME keeps on disk.
These verbs work whether or not it runs.

Examples:

  ollama-cacheproxy contexts ls /var/lib/ollama-cacheproxy
  ollama-cacheproxy contexts rm /var/lib/ollama-cacheproxy --model llama3 --older 7d
      those of one model that were unused for a week
  ollama-cacheproxy contexts verify /var/lib/ollama-cacheproxy
      exits with 1 if something is torn, and says what to do`
}

// contextsHome is the folder that all of these verbs work on.
type contextsHome struct {
	Home string `arg:"" type:"path" help:"The folder given to serve --contexts."`
}

func (h contextsHome) dir() string { return engine.ContextsFolder(h.Home) }

// read returns the stored states, and the problems found among them.
func (h contextsHome) read() ([]contextstore.State, []contextstore.Problem, error) {
	states, problems, err := contextstore.ReadFiles(h.dir())
	return states, problems, h.explain(err)
}

// explain adds what a missing folder means.
func (h contextsHome) explain(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: there is no such folder: nothing has been stored, "+
			"or %s is not what serve --contexts is given", h.dir(), h.Home)
	}
	return err
}

type contextsLs struct {
	contextsHome
	JSON bool `name:"json" env:"-" help:"Print one JSON array."`
}

func (contextsLs) Help() string {
	return `MB are 1,000,000 bytes. COST is roughly how long evaluating it again would take. USES counts how often
it was asked for.

Examples:

  ollama-cacheproxy contexts ls /var/lib/ollama-cacheproxy
  ollama-cacheproxy contexts ls /var/lib/ollama-cacheproxy --json | jq 'map(.bytes) | add'
      how many bytes are stored`
}

// listed is one state as --json shows it: of the prompt, only its length.
type listed struct {
	ID      string    `json:"id"`
	Model   string    `json:"model"`
	Format  string    `json:"format"`
	Links   int       `json:"links"`
	Tokens  int       `json:"tokens"`
	Bytes   int64     `json:"bytes"`
	Seconds float64   `json:"evaluation_seconds"`
	Made    time.Time `json:"made"`
	Used    time.Time `json:"used"`
	Uses    int       `json:"uses"`
}

// shownID is how many letters of an ID the list shows: in practice, enough to distinguish any two.
const shownID = 12

func (c *contextsLs) Run(out *console) error {
	states, problems, err := c.read()
	if err != nil {
		return err
	}
	if n := len(problems); n > 0 {
		fmt.Fprintf(out.stderr, "%s not whole: see ollama-cacheproxy contexts verify %s\n",
			counted(n, "file is", "files are"), c.Home)
	}
	if c.JSON {
		list := make([]listed, len(states))
		for i, s := range states {
			list[i] = listed{stem(s.ID), s.Model, s.Format, len(s.Links), s.Tokens, s.Bytes,
				s.Cost.Seconds(), s.Made, s.Used, s.Uses}
		}
		enc := json.NewEncoder(out.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(list)
	}
	table := tabwriter.NewWriter(out.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ID\tMODEL\tTOKENS\tMB\tCOST\tMADE\tUSED\tUSES")
	for _, s := range states {
		fmt.Fprintf(table, "%s\t%s\t%d\t%.1f\t%v\t%s\t%s\t%d\n", stem(s.ID)[:shownID], s.Model,
			s.Tokens, float64(s.Bytes)/1e6, s.Cost.Round(10*time.Millisecond), ago(s.Made),
			ago(s.Used), s.Uses)
	}
	return table.Flush()
}

// stem returns a file's name without the extension.
func stem(id string) string {
	name, _, _ := strings.Cut(id, ".")
	return name
}

// counted returns a number and its noun.
func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

// ago returns how long ago a time was, in the largest unit.
func ago(t time.Time) string {
	d := max(time.Since(t), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd ago", int(d.Hours()/24))
	}
}

type contextsRm struct {
	contextsHome
	IDs   []string `arg:"" optional:"" name:"id" help:"As ls shows them; the first letters are enough."`
	All   bool     `env:"-" help:"All of them, including remains of torn ones."`
	Model string   `env:"-" placeholder:"NAME" help:"Those of one model."`
	Older age      `env:"-" placeholder:"TIME" help:"Those unused for this long: 7d, 12h."`
}

func (contextsRm) Help() string {
	return `A proxy that runs goes on without them.

Examples:

  ollama-cacheproxy contexts rm /var/lib/ollama-cacheproxy 3f9c0a
  ollama-cacheproxy contexts rm /var/lib/ollama-cacheproxy --older 30d
  ollama-cacheproxy contexts rm /var/lib/ollama-cacheproxy --model llama3 --older 7d
      both must hold
  ollama-cacheproxy contexts rm /var/lib/ollama-cacheproxy --all`
}

// Validate is called by kong.
func (c *contextsRm) Validate() error {
	switch chosen := c.Model != "" || c.Older != 0; {
	case c.All && (chosen || len(c.IDs) > 0), chosen && len(c.IDs) > 0:
		return errors.New("want IDs, or --all, or --model and --older")
	case !c.All && !chosen && len(c.IDs) == 0:
		return errors.New("which? want IDs (see ollama-cacheproxy contexts ls), " +
			"--all, --model or --older")
	}
	return nil
}

func (c *contextsRm) Run(out *console) error {
	states, problems, err := c.read()
	if err != nil {
		return err
	}
	var ids []string
	for _, s := range states {
		if len(c.IDs) == 0 && c.chooses(s) {
			ids = append(ids, s.ID)
		}
	}
	for _, p := range problems {
		if c.All {
			ids = append(ids, p.ID)
		}
	}
	for _, asked := range c.IDs {
		id, err := find(asked, states, problems)
		if err != nil {
			return err
		}
		ids = append(ids, id)
	}
	freed, err := contextstore.RemoveFiles(c.dir(), ids...)
	fmt.Fprintf(out.stdout, "removed %s, %.1f MB\n", counted(len(ids), "context", "contexts"),
		float64(freed)/1e6)
	return err
}

// chooses reports whether the flags select a state.
func (c *contextsRm) chooses(s contextstore.State) bool {
	if c.Model != "" && upstream.ModelKey(s.Model) != upstream.ModelKey(c.Model) {
		return false
	}
	return c.All || time.Since(s.Used) >= time.Duration(c.Older)
}

// find returns the file whose name begins with asked.
func find(asked string, states []contextstore.State, problems []contextstore.Problem) (string, error) {
	var ids []string
	for _, s := range states {
		ids = append(ids, s.ID)
	}
	for _, p := range problems {
		ids = append(ids, p.ID)
	}
	found := ""
	for _, id := range ids {
		switch {
		case !strings.HasPrefix(id, asked) || stem(id) == stem(found):
		case found != "":
			return "", fmt.Errorf("%s: several begin so", asked)
		default:
			found = id
		}
	}
	if found == "" {
		return "", fmt.Errorf("%s: no context begins so", asked)
	}
	return found, nil
}

type contextsVerify struct {
	contextsHome
	Quick bool `env:"-" help:"Compare only beginnings and sizes, not checksums."`
}

func (contextsVerify) Help() string {
	return `Exits with 0 if all is whole, otherwise with 1. An engine refuses a file that is torn, and
evaluates the prompt; one in which bytes have changed it would take, and answer wrongly.

Examples:

  ollama-cacheproxy contexts verify /var/lib/ollama-cacheproxy
  ollama-cacheproxy contexts verify /var/lib/ollama-cacheproxy --quick`
}

func (c *contextsVerify) Run(ctx context.Context, out *console) error {
	sum, problems, err := contextstore.Verify(ctx, c.dir(), !c.Quick)
	if err != nil {
		return c.explain(err)
	}
	for _, p := range problems {
		fmt.Fprintf(out.stdout, "%s: %s\n", p.ID, p.What)
	}
	about := fmt.Sprintf("%s, %.1f MB", counted(sum.States, "context", "contexts"),
		float64(sum.Bytes)/1e6)
	if len(problems) == 0 {
		fmt.Fprintf(out.stdout, "%s: all whole (%d with a checksum)\n", about, sum.Hashed)
		return nil
	}
	ids := make([]string, 0, len(problems))
	for _, p := range problems {
		ids = append(ids, stem(p.ID)[:shownID])
	}
	return exitError{1, fmt.Errorf("%s: %s not whole; to remove what is not: "+
		"ollama-cacheproxy contexts rm %s %s",
		about, counted(len(problems), "is", "are"), quoted(c.Home), strings.Join(ids, " "))}
}

// quoted returns a path quoted for a shell.
func quoted(path string) string {
	if strings.ContainsAny(path, " \t\n'\"\\$`&;|<>()*?[]#~!{}") {
		return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
	}
	return path
}

// age is a duration that may be given in days.
type age time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *age) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if days, ok := strings.CutSuffix(string(text), "d"); ok {
		var n float64
		n, err = strconv.ParseFloat(days, 64)
		d = time.Duration(n * 24 * float64(time.Hour))
	}
	if err != nil || d <= 0 {
		return fmt.Errorf("%q: want a time such as 7d or 12h", text)
	}
	*a = age(d)
	return nil
}
