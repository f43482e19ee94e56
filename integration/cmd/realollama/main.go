// Command realollama builds and runs real Ollama servers for tests and
// demonstrations: see package realollama.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

type commands struct {
	Ensure ensureCommand `cmd:"" help:"Find or build servers, and models if asked."`
	Path   pathCommand   `cmd:"" help:"Print the path of an era's ollama binary."`
	Serve  serveCommand  `cmd:"" help:"Run a server until interrupted."`
	Models modelsCommand `cmd:"" help:"List the models that a server can have."`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var c commands
	k := kong.Parse(&c,
		kong.Name("realollama"),
		kong.Description("Real Ollama servers and small models, from package registries alone."),
		kong.UsageOnError(),
		kong.BindTo(ctx, (*context.Context)(nil)),
	)
	k.FatalIfErrorf(k.Run())
}

type ensureCommand struct {
	Era    []string `help:"Version or letter of an era (a, b, c); all eras if none is given." sep:","`
	Models bool     `help:"Make sure of all models, too."`
}

func (e *ensureCommand) Run(ctx context.Context) error {
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		return err
	}
	eras := e.Era
	if len(eras) == 0 {
		eras = realollama.Versions()
	}
	for _, era := range eras {
		bin, err := cache.Ollama(ctx, realollama.Version(era))
		if err != nil {
			return err
		}
		fmt.Println(bin)
	}
	if !e.Models {
		return nil
	}
	for _, name := range realollama.ModelNames() {
		path, err := cache.Model(ctx, name)
		if err != nil {
			return err
		}
		fmt.Println(path)
	}
	return nil
}

type pathCommand struct {
	Era string `arg:"" help:"Version or letter of an era."`
}

func (p *pathCommand) Run(ctx context.Context) error {
	cache, err := realollama.OpenCache(os.Stderr)
	if err != nil {
		return err
	}
	bin, err := cache.Ollama(ctx, realollama.Version(p.Era))
	if err != nil {
		return err
	}
	fmt.Println(bin)
	return nil
}

type serveCommand struct {
	Era      string   `help:"Version or letter of the era." default:"c"`
	Port     int      `help:"Loopback port; 0 takes a free one." default:"0"`
	Model    []string `help:"Models to have; all if none is given." sep:","`
	Parallel int      `help:"OLLAMA_NUM_PARALLEL; 0 leaves Ollama's default." default:"0"`
	Env      []string `help:"More environment variables, NAME=value." sep:"none" placeholder:"K=V"`
	Quiet    bool     `help:"Do not print the server's log."`
}

func (s *serveCommand) Run(ctx context.Context) error {
	config := realollama.Config{
		Version:  realollama.Version(s.Era),
		Models:   s.Model,
		Port:     s.Port,
		Parallel: s.Parallel,
		Env:      s.Env,
	}
	if len(config.Models) == 0 {
		config.Models = realollama.ModelNames()
	}
	log := os.Stderr
	if s.Quiet {
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("opening the null device: %w", err)
		}
		defer null.Close()
		log = null
	}
	server, err := realollama.Run(ctx, config, log)
	if err != nil {
		return err
	}
	fmt.Printf("ollama %s listens on %s\n", server.Version(), server.URL())
	select {
	case <-ctx.Done():
	case <-server.Exited():
		fmt.Println("ollama ended by itself")
	}
	return server.Stop()
}

type modelsCommand struct{}

func (modelsCommand) Run() error {
	for _, name := range realollama.ModelNames() {
		fmt.Printf("%-18s %s\n", name, realollama.AboutModel(name))
	}
	return nil
}
