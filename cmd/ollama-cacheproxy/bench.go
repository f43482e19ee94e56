package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

type benchCmd struct {
	Workload string   `env:"-" default:"same" enum:"same,interleaved,closed-loops,models,num-ctx,user-message-prefix,chat-turns" help:"One of the workloads above; num-ctx and closed-loops show most. Default: same."`
	Optimize []string `env:"-" placeholder:"MODE" enum:"false,keep-alive,true" help:"false: Ollama alone; keep-alive: models stay loaded; true: requests also wait for the slot that is warm for them. Repeatable. Default: all three, compared."`
	Requests int      `env:"-" default:"100" placeholder:"N" help:"Requests per mode and round. Default: 100."`

	PrefixTokens int `env:"-" default:"2000" placeholder:"N" help:"Tokens that prompts share. Default: 2000."`
	TailTokens   int `env:"-" default:"50" placeholder:"N" help:"Tokens of each prompt that no other has. Default: 50."`
	OutputTokens int `env:"-" default:"50" placeholder:"N" help:"Tokens of each answer. Default: 50."`

	Clients int           `env:"-" placeholder:"N" help:"How many clients send at once. Default: 1 for same and user-message-prefix, 32 for interleaved, 4 for the others."`
	Pause   time.Duration `env:"-" placeholder:"TIME" help:"How long a client pauses after an answer. Default: no pause."`
	GiveUp  time.Duration `env:"-" default:"5m" placeholder:"TIME" help:"End a mode when nothing has been answered for this long; the rest of its requests count as failed. Default: 5m."`
	Rounds  int           `env:"-" default:"1" placeholder:"N" help:"How often to measure each mode; a different one comes first each time. Default: 1."`
	Seed    uint64        `env:"-" default:"1" placeholder:"N" help:"Seed of the generated texts. Default: 1."`

	Upstream string   `env:"-" placeholder:"ADDR" help:"The Ollama server, which nobody else should use meanwhile. Default: OLLAMA_HOST, or else 127.0.0.1:11434."`
	CA       string   `name:"ca" type:"path" default:"" placeholder:"FILE" help:"Believe certificates of https servers that are issued by one of these authorities, too: PEM."`
	Model    []string `env:"-" placeholder:"NAME" help:"The model; give two for the workload models. Default: the only one that the server has."`
	Slots    string   `env:"-" default:"auto" placeholder:"N" help:"With --optimize true: slots per model, as for serve. Default: auto."`

	Predictions bool `env:"-" help:"With the workload same: set the figures that are commonly expected of a caching proxy beside the measured ones, and say what is wrong with them (docs/bench.md)."`

	Price float64 `placeholder:"NUMBER" help:"What a million evaluated prompt tokens would cost elsewhere, in any currency: the report then prices them, and those that were reused. Default: 0, which shows no prices."`

	JSON bool   `name:"json" env:"-" help:"Write the report to stdout as JSON, request by request, instead of a table."`
	HTML string `name:"html" env:"-" type:"path" placeholder:"FILE" help:"Also write the report to this file: one page with charts that needs no network."`

	LogLevel  slog.Level `default:"info" help:"debug, info, warn or error. Default: info."`
	LogFormat string     `default:"auto" enum:"auto,text,json" help:"text, json, or auto: text on a terminal. Default: auto."`
}

func (b *benchCmd) Help() string {
	return `bench sends the same requests to one Ollama directly, with keep_alive alone, and through the proxy, and sets the three beside each other. Models are unloaded before each mode and at the end, so use a server that nobody else uses.

Workloads:
  num-ctx              4 clients, two values of num_ctx in turn: what clients that disagree cost
  closed-loops         4 scripts with a prefix each, which ask again as soon as they have an answer
  models               4 clients, two models in turn
  interleaved          8 prefixes in turn, 32 requests at once
  chat-turns           4 chats of 10 turns with one system prompt
  same                 one client, one prefix: little to gain from any proxy
  user-message-prefix  as same, with the prefix in the user's message

Start with num-ctx, which shows a gain on any Ollama, and closed-loops, which shows one where prompts do not fit into Ollama's host cache.

Examples:

  ollama-cacheproxy bench --workload num-ctx --model llama3.2
      clients that disagree on num_ctx, in all three modes
  ollama-cacheproxy bench --workload closed-loops --requests 1000 --rounds 3 --html report.html
      four scripts, measured three times, with charts
  ollama-cacheproxy bench --optimize false --optimize true --json > report.json
      two modes, request by request

Ctrl-C stops it and reports what was measured so far, marked as incomplete.

Exit status: 0 all requests were answered, 1 stopped before the end, 2 wrong arguments, 3 some requests failed.`
}

func (b *benchCmd) Run(ctx context.Context, c *console) error {
	config, err := b.config()
	if err != nil {
		return exitError{2, err}
	}
	if err := b.tryPage(); err != nil {
		return exitError{2, fmt.Errorf("--html: %w", err)}
	}
	bar := newProgress(c.stderr, b.LogFormat, b.LogLevel)
	config.Log = bar.log
	config.Progress = func(now bench.Progress) { bar.show(now.Done, now.Total, now.Elapsed, now) }
	config.Front = func(ctx context.Context, mode bench.Mode, done func(proxy.Exchange)) (*url.URL, func() error, error) {
		flags := []string{"--upstream", config.Upstream.String(), "--log-format", b.LogFormat, "--upstream-ca=" + b.CA, "--cache-embeddings=off"}
		switch mode {
		case bench.Direct:
			flags = append(flags, "--slots", "off", "--keep-alive", "off", "--no-touch")
		case bench.KeepAlive:
			flags = append(flags, "--slots", "off")
		default:
			flags = append(flags, "--slots", b.Slots)
		}
		// Settings from the environment are left out: the report would not show them.
		return runInner(ctx, c, flags, done)
	}
	transport, err := newTransport(b.CA)
	if err != nil {
		return exitError{2, err}
	}
	defer transport.CloseIdleConnections()
	config.Transport = transport
	report, err := bench.Run(ctx, *config)
	bar.finish()
	if report == nil {
		return err
	}
	return errors.Join(b.print(c, report), b.writePage(report), cmp.Or(err, failures(report)))
}

// config evaluates the flags.
func (b *benchCmd) config() (*bench.Config, error) {
	if !isPrice(b.Price) {
		return nil, errors.New("--price: want 0 (no prices) or more")
	}
	for _, n := range []int{b.Requests, b.PrefixTokens, b.TailTokens, b.OutputTokens, b.Rounds} {
		if n < 1 {
			return nil, errors.New("--requests, --prefix-tokens, --tail-tokens, --output-tokens, --rounds: want at least 1")
		}
	}
	if b.Clients < 0 || b.Pause < 0 || b.GiveUp <= 0 {
		return nil, errors.New("--clients, --pause, --give-up: want 0 or more, and of the last more")
	}
	if _, err := parseSlots(b.Slots); err != nil {
		return nil, fmt.Errorf("--slots %q: %w", b.Slots, err)
	}
	config := &bench.Config{
		Models: b.Model, Workload: b.Workload, Requests: b.Requests, PrefixTokens: b.PrefixTokens, TailTokens: b.TailTokens, OutputTokens: b.OutputTokens,
		Clients: b.Clients, Pause: b.Pause, GiveUp: b.GiveUp, Rounds: b.Rounds, Seed: b.Seed, Slots: b.Slots, Predictions: b.Predictions,
		Price: b.Price,
	}
	for _, mode := range b.Optimize {
		if slices.Contains(config.Modes, bench.Mode(mode)) {
			return nil, fmt.Errorf("--optimize %s is given twice", mode)
		}
		config.Modes = append(config.Modes, bench.Mode(mode))
	}
	if config.Modes == nil {
		config.Modes = bench.Modes()
	}
	_, addr, sim, err := parseTarget(cmp.Or(b.Upstream, os.Getenv("OLLAMA_HOST"), defaultUpstream))
	if err != nil {
		return nil, fmt.Errorf("--upstream, OLLAMA_HOST: %w", err)
	}
	if sim != nil {
		return nil, errors.New("--upstream sim: is for serve: figures of a simulated server would say nothing of yours; say where Ollama is")
	}
	config.Upstream = addr
	return config, nil
}

// tryPage checks before a run, which may take hours, that the page can be written at its end. An
// existing file stays until then.
func (b *benchCmd) tryPage() error {
	if b.HTML == "" {
		return nil
	}
	f, err := os.OpenFile(b.HTML, os.O_WRONLY|os.O_CREATE, 0o666)
	if err != nil {
		return err
	}
	return f.Close()
}

func (b *benchCmd) writePage(report *bench.Report) error {
	if b.HTML == "" {
		return nil
	}
	if len(report.Modes) == 0 {
		return fmt.Errorf("%s was not written: there is nothing to show, as no request was over", b.HTML)
	}
	f, err := os.Create(b.HTML)
	if err == nil {
		err = errors.Join(report.HTML(f), f.Close())
	}
	if err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	return nil
}

func (b *benchCmd) print(c *console, report *bench.Report) error {
	if !b.JSON {
		return report.Print(c.stdout)
	}
	e := json.NewEncoder(c.stdout)
	e.SetIndent("", "  ")
	return e.Encode(report)
}

// failures returns an error if requests failed.
func failures(report *bench.Report) error {
	failed, all, last := 0, 0, ""
	for _, m := range report.Modes {
		failed += m.Failed
		all += m.Failed + m.Answered
		for _, run := range m.Runs {
			for _, q := range run.Requests {
				last = cmp.Or(q.Error, last)
			}
		}
	}
	if failed == 0 {
		return nil
	}
	return exitError{exitFailed, fmt.Errorf("%d of %d requests failed, the last one with: %s", failed, all, last)}
}
