// Command ollama-cacheproxy is a transparent HTTP proxy in front of Ollama that keeps models loaded.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// cli is the command line. Each verb has its own file.
type cli struct {
	Serve    serveCmd    `cmd:"" default:"withargs" help:"Forward requests to Ollama (the default verb)."`
	Answers  answersCmd  `cmd:"" help:"Wipe kept answers and vectors, or say how many there are: of a store, or of a running proxy."`
	Batch    batchCmd    `cmd:"" help:"Send a file of requests, and go on where it was after a crash."`
	Bench    benchCmd    `cmd:"" help:"Measure what the proxy is worth on an Ollama server: directly and through it, in one run."`
	Contexts contextsCmd `cmd:"" help:"List, remove and verify the contexts that serve --contexts keeps."`
	Doctor   doctorCmd   `cmd:"" help:"Say what is wrong with how a running proxy's Ollama is used, and which setting changes that."`
	Engine   engineCmd   `cmd:"" help:"Link to the engines of an Ollama on this machine, for stored contexts."`
	Health   healthCmd   `cmd:"" help:"Ask a running proxy whether it and its upstream are well; for a container's health check."`
	Version  versionCmd  `cmd:"" help:"Print the version, the commit and Go's version."`

	Completion completionCmd `cmd:"" help:"Print what makes a shell complete verbs, flags and their values: bash, zsh or fish."`
	Man        manCmd        `cmd:"" hidden:"" help:"Print the man page."`
}

// exitError ends the program with this status.
type exitError struct {
	code int
	error
}

// console is where a verb reads and writes.
type console struct {
	stdout, stderr io.Writer
}

func main() {
	if engine.Called(os.Args) {
		os.Exit(engine.Main(os.Args))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The first signal asks for a graceful stop. After it a signal kills, as it does by default.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// joinNegative writes "--keep-alive -1" as "--keep-alive=-1", since kong takes -1 for a flag.
func joinNegative(args []string) []string {
	var joined []string
	for _, arg := range args {
		if last := len(joined) - 1; last >= 0 && joined[last] == "--keep-alive" && len(arg) > 1 && arg[0] == '-' && '0' <= arg[1] && arg[1] <= '9' {
			joined[last] += "=" + arg
			continue
		}
		joined = append(joined, arg)
	}
	return joined
}

// vars are values that help texts and defaults refer to.
var vars = kong.Vars{"maxbody": strconv.Itoa(proxy.DefaultMaxBody), "storebytes": strconv.Itoa(defaultStoreBytes), "contextbytes": strconv.Itoa(defaultContextBytes), "answersbytes": strconv.Itoa(defaultAnswersBytes), "batchesbytes": strconv.Itoa(defaultBatchesBytes), "jobbytes": strconv.Itoa(defaultJobBytes)}

// groups are the two parts of serve's flags. Those without a group tag are special.
var groups = []kong.Group{{Key: "everyday", Title: "Everyday flags:"}, {Key: "special", Title: "Special flags:"}}

// newParser returns the parser that reads a command line into c.
func newParser(ctx context.Context, c *cli, stdout, stderr io.Writer, exit func(int)) *kong.Kong {
	parser, err := kong.New(c,
		kong.Name("ollama-cacheproxy"),
		kong.Description("A transparent HTTP proxy in front of Ollama: point OLLAMA_HOST at it and models stay loaded."),
		environment,
		kong.ExplicitGroups(groups),
		kong.PostBuild(func(k *kong.Kong) error {
			for _, f := range serveFlags(k.Model) {
				if f.Group == nil {
					f.Group = &groups[1]
				}
			}
			return nil
		}),
		kong.Writers(stdout, stderr),
		kong.Exit(exit),
		kong.ConfigureHelp(kong.HelpOptions{WrapUpperBound: 110}),
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(&console{stdout, stderr}),
		vars,
	)
	if err != nil {
		panic(err) // the struct tags above are wrong
	}
	return parser
}

// run is the program. It returns the exit status: 0, 1 for a failure, 2 for wrong arguments.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var c cli
	exit := -1
	parser := newParser(ctx, &c, stdout, stderr, func(code int) { exit = code })
	if len(args) > 0 && (args[0] == "-h" || args[0] == "--help") {
		args = append([]string{"serve"}, args...) // users look for the help of the default verb
	}
	if len(args) > 0 && args[0] == "--version" {
		args[0] = "version"
	}
	args = joinNegative(args)
	kctx, err := parser.Parse(args)
	if exit >= 0 { // --help
		return exit
	}
	if err != nil {
		if strings.Contains(err.Error(), "unknown flag --attach-context") {
			err = errors.New("--attach-context is gone, since it saved no time: --contexts is what does")
		}
		fmt.Fprintf(stderr, "ollama-cacheproxy: %v (see ollama-cacheproxy --help)\n", plain(err))
		return 2
	}
	c.Serve.again = func() (*serveCmd, error) {
		var again cli
		_, err := newParser(ctx, &again, io.Discard, io.Discard, func(int) {}).Parse(args)
		return &again.Serve, plain(err)
	}
	if err := kctx.Run(); err != nil {
		if quiet, ok := errors.AsType[silentError](err); ok {
			return quiet.code
		}
		fmt.Fprintf(stderr, "ollama-cacheproxy: %v\n", err)
		if exit, ok := errors.AsType[exitError](err); ok {
			return exit.code
		}
		return 1
	}
	return 0
}
