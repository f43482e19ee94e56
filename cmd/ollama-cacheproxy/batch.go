package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/batch"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	exitFailed      = 3 // the batch is complete, but some requests failed
	defaultJobBytes = 1 << 30
)

type batchCmd struct {
	Input    string `short:"i" env:"-" default:"-" placeholder:"FILE" help:"Requests, one per line: bodies of /api/chat, /api/generate or /api/embed, or OpenAI's batch form. Default: stdin."`
	Template string `env:"-" type:"path" placeholder:"FILE" help:"A request in which {{name}} stands for a field of each row of --data."`
	Data     string `env:"-" placeholder:"FILE" help:"Rows for --template: a .csv or .tsv file whose first line names the fields, or one JSON object per line (- for stdin)."`
	Encoding string `env:"-" default:"utf-8" enum:"utf-8,windows-1252,latin1,utf-16" help:"Encoding of the input or --data: utf-8, windows-1252, latin1 or utf-16; results are UTF-8. Default: utf-8."`
	Output   string `short:"o" env:"-" default:"-" placeholder:"FILE" help:"Where to write results, one per line. With FILE.journal beside it an interrupted batch can continue. Default: stdout, which cannot be continued."`
	Errors   string `env:"-" type:"path" placeholder:"FILE" help:"Where to write the requests that failed, to be sent again with -i FILE."`

	Order       string        `env:"-" default:"input" enum:"input,completion" help:"Write results in the order of the input, or as they come. Default: input."`
	Window      int           `default:"10000" placeholder:"N" help:"How many requests to read ahead and order by what their prompts share. Default: 10000."`
	Concurrency string        `default:"auto" placeholder:"N" help:"Requests in flight; auto fills the proxy's lanes and backs off when the server is overloaded. Default: auto."`
	Retries     int           `default:"4" placeholder:"N" help:"How often to retry a request after an error that may pass, with a doubling pause. Default: 4."`
	Timeout     time.Duration `name:"request-timeout" placeholder:"TIME" help:"Cancel an answer that is not complete this long after its first byte (an embedding: after it was sent). Waiting, loading and evaluating the prompt do not count. Default: never."`

	Server   string        `env:"-" placeholder:"ADDR" help:"The proxy, or Ollama itself. Default: OLLAMA_HOST, or else 127.0.0.1:11435."`
	Wait     time.Duration `name:"wait-for-server" default:"10m" placeholder:"TIME" help:"How long to wait for a server that does not answer, at the start and later; 0s ends the batch at once. Retries count from when it answers. Default: 10m."`
	APIKey   string        `name:"api-key" placeholder:"KEY" help:"An API key of the proxy."`
	CA       string        `name:"ca" type:"path" default:"" placeholder:"FILE" help:"Believe certificates of https servers that are issued by one of these authorities, too: PEM."`
	Upstream []string      `env:"-" placeholder:"[NAME=]ADDR" help:"Run a separate proxy in front of these Ollama servers for this batch. Repeatable."`
	Slots    []string      `placeholder:"[NAME=]N" help:"With --upstream: slots per model, as for serve. Default: auto."`

	Workers   string `placeholder:"URL" help:"Share the batch with all others that are given the same input and the same Valkey or Redis server (6.2 or newer): valkey://[USER:PASSWORD@]HOST[:PORT][/DATABASE], or valkeys://…[?ca-file=FILE] with TLS. Each has the whole output if it has -o; without -o it only helps."`
	Job       string `env:"-" placeholder:"NAME" help:"With --workers: the name of what is shared. Default: made of the input."`
	JobBytes  int64  `default:"${jobbytes}" placeholder:"BYTES" help:"With --workers: memory of the Valkey server for the answers. When they are more, those that every worker has are dropped there. Default: 1073741824 (1 GiB)."`
	JobStatus bool   `env:"-" help:"With --workers, send nothing: show how far the job is."`
	JobDrop   bool   `env:"-" help:"With --workers, send nothing: remove the job from the Valkey server. Its workers end; the next one begins anew."`

	Plan        bool   `env:"-" help:"Send nothing: show how the prompts share prefixes, what the batch will cost, and what would help."`
	Check       bool   `env:"-" help:"Send nothing: report wrong lines."`
	SummaryJSON string `name:"summary-json" env:"-" type:"path" placeholder:"FILE" help:"Write the summary to this file too."`

	Price float64 `placeholder:"NUMBER" help:"What a million evaluated prompt tokens would cost elsewhere, in any currency: the summary then prices them, and those that were reused. Default: 0, which shows no prices."`

	LogLevel  slog.Level `default:"info" help:"debug, info, warn or error. Default: info."`
	LogFormat string     `default:"auto" enum:"auto,text,json" help:"text, json, or auto: text on a terminal. Default: auto."`
}

func (b *batchCmd) Help() string {
	return `batch sends a file of requests in the order in which their prompts share most, as many at once as the server can use. After a crash the same command continues where it stopped, and the output is the same as that of an uninterrupted run.

Examples:

  ollama-cacheproxy batch -i requests.jsonl -o results.jsonl
      through the proxy that runs on this machine
  ollama-cacheproxy batch --template request.json --data candidates.csv -o results.jsonl --errors failed.jsonl
      one request for each row
  ollama-cacheproxy batch --upstream 127.0.0.1:11434 -i requests.jsonl -o results.jsonl
      without a running proxy
  ollama-cacheproxy batch -i requests.jsonl -o results.jsonl --workers valkey://10.0.0.5/0
      on several machines: they share the requests, and each has all results
  ollama-cacheproxy batch --template request.json --data candidates.csv --plan
      what would it cost, and would another order of the fields help?

A line is {"model": …, "messages" or "prompt" or "input": …} and may have a "custom_id", or {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}.

A template is such a line in which {{name}} stands for a field of each row, for example request.json:

  {"custom_id": "{{id}}", "model": "llama3.2", "messages": [{"role": "user", "content": "Summarize: {{text}}"}]}

A result has the line's number, its custom_id, and the whole answer without what differs between runs (times, created_at, reused tokens) and without "context". docs/batch.md has a complete example.

Exit status: 0 all requests were answered, 1 stopped before the end, 2 wrong arguments, 3 some requests failed (each has a result that says why).`
}

func (b *batchCmd) Run(ctx context.Context, c *console) error {
	source, config, err := b.config(c)
	if err != nil {
		return exitError{2, err}
	}
	defer source.Close()
	bar := newProgress(c.stderr, b.LogFormat, b.LogLevel)
	config.Log = bar.log
	config.Progress = func(now batch.Progress) { bar.show(now.Done, now.Total, now.Elapsed, now) }
	transport, err := newTransport(b.CA)
	if err != nil {
		return exitError{2, err}
	}
	defer transport.CloseIdleConnections()
	config.Transport = transport
	if b.Check {
		return b.check(ctx, c, config)
	}
	if b.JobStatus || b.JobDrop {
		return b.job(ctx, c, config)
	}
	if len(b.Upstream) > 0 {
		stop, err := b.inner(ctx, c, config)
		if err != nil {
			return err
		}
		defer stop()
		// Deferred first, so that it runs last: closing the proxy would otherwise wait for a
		// connection that was never used.
		defer transport.CloseIdleConnections()
	}
	if b.Plan {
		plan, err := batch.MakePlan(ctx, config)
		if err != nil {
			return err
		}
		return plan.Print(c.stdout)
	}
	summary, err := batch.Run(ctx, *config)
	bar.finish()
	if err != nil {
		return err
	}
	return b.report(c, summary)
}

// config evaluates the flags, and opens the input.
func (b *batchCmd) config(c *console) (*batch.Source, *batch.Config, error) {
	config := &batch.Config{
		Output: b.Output, Stdout: c.stdout, Errors: b.Errors, Order: batch.Order(b.Order), Window: b.Window,
		Retries: b.Retries, Timeout: b.Timeout, WaitForServer: b.Wait, APIKey: b.APIKey,
	}
	if b.Window < 1 || b.Retries < 0 || b.Timeout < 0 || b.Wait < 0 {
		return nil, nil, fmt.Errorf("--window %d, --retries %d, --request-timeout %v, --wait-for-server %v: want at least 1, and 0 or more",
			b.Window, b.Retries, b.Timeout, b.Wait)
	}
	if !isPrice(b.Price) {
		return nil, nil, fmt.Errorf("--price %v: want 0 (no prices) or more", b.Price)
	}
	if b.Concurrency != "auto" {
		n, err := strconv.Atoi(b.Concurrency)
		if err != nil || n < 1 {
			return nil, nil, fmt.Errorf("--concurrency %q: want auto or a number from 1 on", b.Concurrency)
		}
		config.Concurrency = n
	}
	var err error
	if config.Workers, err = b.workers(); err != nil {
		return nil, nil, err
	}
	if config.Server, err = b.server(); err != nil {
		return nil, nil, err
	}
	for _, n := range []batch.Named{
		{For: "the input", Name: b.Input}, {For: "the data", Name: b.Data}, {For: "the template", Name: b.Template},
		{For: "the summary", Name: b.SummaryJSON},
	} {
		if n.Name != "" && n.Name != "-" {
			config.Beside = append(config.Beside, n)
		}
	}
	if config.Source, err = b.source(); err != nil {
		return nil, nil, err
	}
	return config.Source, config, nil
}

// workers returns what the batch is shared through, or nil.
func (b *batchCmd) workers() (*batch.Workers, error) {
	if b.Workers == "" {
		if b.Job != "" || b.JobStatus || b.JobDrop {
			return nil, errors.New("--job, --job-status and --job-drop need --workers, which says where the job is")
		}
		return nil, nil
	}
	if b.JobStatus && b.JobDrop {
		return nil, errors.New("--job-status and --job-drop: give one of them")
	}
	w := &batch.Workers{URL: b.Workers, Job: b.Job, Bytes: b.JobBytes}
	return w, w.Check()
}

// job is --job-status and --job-drop.
func (b *batchCmd) job(ctx context.Context, c *console, config *batch.Config) error {
	if b.JobDrop {
		name, err := batch.DropJob(ctx, config)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "job %s is removed; outputs that it has begun can be finished without --workers\n", name)
		return err
	}
	status, err := batch.LookAtJob(ctx, config)
	if err != nil {
		return err
	}
	return status.Print(c.stdout)
}

// server returns the URL that requests are sent to.
func (b *batchCmd) server() (server *url.URL, err error) {
	switch host := os.Getenv("OLLAMA_HOST"); {
	case b.Server != "":
		server, err = upstream.ParseAddr(b.Server, defaultPort)
	case host != "":
		server, err = upstream.ParseAddr(host, upstream.DefaultPort)
	default:
		server = &url.URL{Scheme: "http", Host: net.JoinHostPort("127.0.0.1", defaultPort)}
	}
	if err != nil {
		return nil, fmt.Errorf("--server, OLLAMA_HOST: %w", err)
	}
	return server, nil
}

func (b *batchCmd) source() (*batch.Source, error) {
	if (b.Template == "") != (b.Data == "") {
		return nil, errors.New("--template and --data go together")
	}
	if b.Template == "" {
		return batch.OpenLines(b.Input, os.Stdin, batch.Encoding(b.Encoding))
	}
	if b.Input != "-" {
		return nil, errors.New("-i has whole requests: give either that, or --template and --data")
	}
	text, err := os.ReadFile(b.Template)
	if err != nil {
		return nil, fmt.Errorf("reading the template: %w", err)
	}
	template, err := batch.ParseTemplate(text)
	if err != nil {
		return nil, err
	}
	return batch.OpenRows(b.Data, os.Stdin, batch.Encoding(b.Encoding), template)
}

// check is --check.
func (b *batchCmd) check(ctx context.Context, c *console, config *batch.Config) error {
	v, err := batch.TakeSurvey(ctx, config.Source, func(err error) { fmt.Fprintln(c.stderr, err) })
	if err != nil {
		return err
	}
	absent, unknown := config.AbsentModels(ctx, v)
	if err := v.Print(c.stdout, absent, unknown); err != nil {
		return err
	}
	switch {
	case v.Bad > 0:
		return exitError{exitFailed, fmt.Errorf("%d of %d lines are wrong", v.Bad, v.Requests)}
	case len(absent) > 0:
		return exitError{exitFailed, fmt.Errorf("%d models are not on the server", len(absent))}
	}
	return nil
}

// inner runs a proxy within the program, and sends the batch through it.
func (b *batchCmd) inner(ctx context.Context, c *console, config *batch.Config) (stop func(), err error) {
	args := []string{"--log-format", b.LogFormat}
	if b.CA != "" {
		args = append(args, "--upstream-ca", b.CA)
	}
	for _, up := range b.Upstream {
		args = append(args, "--upstream", up)
	}
	for _, n := range b.Slots {
		args = append(args, "--slots", n)
	}
	server, end, err := runInner(ctx, c, args, nil, environment)
	if err != nil {
		return nil, err
	}
	config.Server = server
	return func() { end() }, nil // how the proxy ends does not matter once the batch is over
}

// report prints the outcome of the batch.
func (b *batchCmd) report(c *console, s *batch.Summary) error {
	s.SetPrice(b.Price)
	if err := s.Print(c.stderr); err != nil {
		return err
	}
	if b.SummaryJSON != "" {
		text, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(b.SummaryJSON, append(text, '\n'), 0o666); err != nil {
			return fmt.Errorf("writing the summary: %w", err)
		}
	}
	if s.Failed > 0 {
		return exitError{exitFailed, fmt.Errorf("%d of %d requests failed; the results say why%s", s.Failed, s.Requests, b.collected())}
	}
	return nil
}

func (b *batchCmd) collected() string {
	if b.Errors == "" {
		return ""
	}
	return fmt.Sprintf(", and %s has them to be sent again", b.Errors)
}
