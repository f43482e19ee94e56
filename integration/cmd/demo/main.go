// Command demo shows what the proxy is for, on a real Ollama with a small real model and unmodified
// clients, in four parts. First it asks the same questions directly and through the proxy, and
// shows whether the model stays loaded without requests. Second, for two scripts with a long prefix
// each, it shows the ledger's reused tokens beside the server's own log. Third, it sends many
// prefixes at once, and two num_ctx in turn, directly and through the proxy. Last, it restarts
// Ollama, after which a long system prompt is evaluated again directly, and attached from the disk
// through the proxy.
//
// It runs the installed Ollama, with its own port and models, or builds one.
//
//	go run ./integration/cmd/demo
//	go run ./integration/cmd/demo -era 0.24.0
package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

//go:embed client.py
var clientScript string

//go:embed requirements.txt
var requirements string

const (
	model = "smollm2"
	// serverKeepAlive replaces Ollama's default of five minutes, so that nobody has to wait that
	// long.
	serverKeepAlive = 5 * time.Second
)

var questions = []string{
	"What is the capital of France?",
	"Name three colours.",
	"Why is the sky blue?",
	"What is two plus two?",
}

func main() {
	era := flag.String("era", "", "version of Ollama to build, "+strings.Join(realollama.Versions(), ", ")+"; by default the one that this machine has, else "+realollama.EraC)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *era, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// outcome is the result of one way of asking.
type outcome struct {
	answers  []string
	stays    bool          // the model is still loaded after the server's own keep_alive
	expires  time.Duration // if it stays, the time until it would be unloaded
	nextLoad time.Duration // how long the next question waited for the model
	loads    int           // by the server's log
}

func run(ctx context.Context, era string, out io.Writer) (err error) {
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		return err
	}
	ollama, err := findOllama(ctx, cache, era, out)
	if err != nil {
		return err
	}
	python, err := cache.PythonEnv(ctx, "demo", requirements, 20)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	script := filepath.Join(dir, "client.py")
	if err := os.WriteFile(script, []byte(clientScript), 0o644); err != nil {
		return err
	}
	binary := filepath.Join(dir, "ollama-cacheproxy")
	fmt.Fprintln(out, "Building the proxy (a few seconds, half a minute the first time) …")
	if err := proxyprocess.Build(ctx, binary); err != nil {
		return err
	}

	server, err := realollama.Run(ctx, realollama.Config{
		Version: ollama.Version, Bin: ollama.Bin, Models: []string{model}, KeepAlive: serverKeepAlive.String(),
	}, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	p, err := proxyprocess.Start(ctx, binary, server.URL())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()

	fmt.Fprintf(out, "Ollama %s with %s at %s; it drops a model %v after the last request.\nollama-cacheproxy at %s. The client is Python's ollama package, told by OLLAMA_HOST alone where to go.\n\n",
		server.Version(), model, server.URL(), serverKeepAlive, p.URL)
	d := demo{ctx: ctx, server: server, python: python, script: script, out: out}
	direct, err := d.ask("directly", server.URL())
	if err != nil {
		return err
	}
	proxied, err := d.ask("through the proxy", p.URL)
	if err != nil {
		return err
	}
	if err := report(out, direct, proxied); err != nil {
		return err
	}
	if err := d.prefixes(p.URL); err != nil {
		return err
	}
	if err := lanes(ctx, ollama, binary, out); err != nil {
		return err
	}
	return contexts(ctx, ollama, binary, out)
}

// findOllama returns the Ollama of the given era. If none is given, it returns the installed one,
// or else the newest that can be built.
func findOllama(ctx context.Context, cache *realollama.Cache, era string, out io.Writer) (realollama.Installed, error) {
	if era == "" {
		found, err := cache.FindInstalled(ctx)
		if err != nil {
			return found, err
		}
		if found.Bin != "" {
			fmt.Fprintf(out, "Found Ollama %s at %s. It is run on a port, with a home and models of the demo's own: your server and your models are not touched.\n",
				found.Version, found.Bin)
			if like := realollama.Era(found.Version); found.Version != like {
				fmt.Fprintf(out, "Its log is read as that of %s, the version that the project's tests run.\n", like)
			}
			return found, nil
		}
		era = realollama.EraC
		fmt.Fprintf(out, "No Ollama of version 0.24 or newer was found on this machine, so %s is taken from the project's cache, or built (1 to 2 min on 2 cores).\n", era)
	}
	version := realollama.Version(era)
	bin, err := cache.Ollama(ctx, version)
	return realollama.Installed{Bin: bin, Version: version}, err
}

type demo struct {
	ctx            context.Context
	server         *realollama.Server
	python, script string
	out            io.Writer
}

// ask puts the questions from a cold start, waits for longer than the server keeps a model, and
// asks once more.
func (d demo) ask(way, host string) (o outcome, err error) {
	if err := d.unload(); err != nil {
		return o, err
	}
	mark := d.server.Mark()
	fmt.Fprintf(d.out, "%s: %d questions …\n", way, len(questions))
	first, err := d.client(host, questions...)
	if err != nil {
		return o, err
	}
	for i, a := range first {
		fmt.Fprintf(d.out, "  %-32s %.60q\n", questions[i], a.Text)
		o.answers = append(o.answers, a.Text)
	}
	fmt.Fprintf(d.out, "  … and nothing for %v …\n", 2*serverKeepAlive)
	select {
	case <-d.ctx.Done():
		return o, d.ctx.Err()
	case <-time.After(2 * serverKeepAlive):
	}
	ps, err := d.loaded()
	if err != nil {
		return o, err
	}
	for _, m := range ps {
		o.stays, o.expires = true, time.Until(m.ExpiresAt)
	}
	next, err := d.client(host, questions[0])
	if err != nil {
		return o, err
	}
	o.answers = append(o.answers, next[0].Text)
	o.nextLoad = time.Duration(next[0].LoadSeconds * float64(time.Second))
	o.loads = d.server.Loads(mark)
	return o, nil
}

type answer struct {
	Text        string  `json:"text"`
	LoadSeconds float64 `json:"load_seconds"`
}

func (d demo) client(host string, questions ...string) ([]answer, error) {
	cmd := exec.CommandContext(d.ctx, d.python, append([]string{d.script, model}, questions...)...)
	cmd.Env = append(os.Environ(), "OLLAMA_HOST="+host)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("running the Python client: %w\n%s", err, realollama.Quote(stderr.String()))
	}
	var answers []answer
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var a answer
		if err := dec.Decode(&a); err == io.EOF {
			return answers, nil
		} else if err != nil {
			return nil, fmt.Errorf("reading the Python client's answers: %w", err)
		}
		answers = append(answers, a)
	}
}

func (d demo) loaded() ([]api.ProcessModelResponse, error) {
	var ps api.ProcessResponse
	res, err := http.Get(d.server.URL() + "/api/ps")
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	err = json.NewDecoder(res.Body).Decode(&ps)
	return ps.Models, err
}

// unload unloads everything, so that both ways begin alike.
func (d demo) unload() error {
	res, err := http.Post(d.server.URL()+"/api/generate", "application/json", strings.NewReader(`{"model":"`+model+`","keep_alive":0}`))
	if err != nil {
		return err
	}
	res.Body.Close()
	for {
		ps, err := d.loaded()
		if err != nil || len(ps) == 0 {
			return err
		}
		select {
		case <-d.ctx.Done():
			return d.ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func report(out io.Writer, direct, proxied outcome) error {
	stays := func(o outcome) string {
		if o.stays {
			return "yes, for " + o.expires.Round(time.Minute).String()
		}
		return "no, dropped"
	}
	equal := slices.Equal(direct.answers, proxied.answers)
	same := "equal"
	if !equal {
		same = "DIFFERENT"
	}
	fmt.Fprintln(out)
	t := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "\tdirectly\tthrough the proxy\n")
	fmt.Fprintf(t, "answers\t%d\t%d, %s\n", len(direct.answers), len(proxied.answers), same)
	fmt.Fprintf(t, "still loaded after %v\t%s\t%s\n", 2*serverKeepAlive, stays(direct), stays(proxied))
	fmt.Fprintf(t, "model loads (server's log)\t%d\t%d\n", direct.loads, proxied.loads)
	fmt.Fprintf(t, "next question waited for the model\t%v\t%v\n", direct.nextLoad.Round(time.Millisecond), proxied.nextLoad.Round(time.Millisecond))
	t.Flush()
	if direct.loads > proxied.loads {
		fmt.Fprintf(out, "\nSaved: %d of %d model loads, and %v of waiting by the one who asks next. A large model takes that many times longer to load.\n",
			direct.loads-proxied.loads, direct.loads, (direct.nextLoad - proxied.nextLoad).Round(time.Millisecond))
	}
	if !equal || direct.stays || !proxied.stays || proxied.loads != 1 {
		return errors.New("this is not what the proxy promises: equal answers, and a model that stays loaded through the proxy alone")
	}
	return nil
}
