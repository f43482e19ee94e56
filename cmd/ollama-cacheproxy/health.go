package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

type healthCmd struct {
	Listen string `default:"127.0.0.1:11435" placeholder:"ADDR" help:"Where the proxy listens: an address, or https://ADDR with --tls-cert, whose certificate is not checked."`
	Ready  bool   `help:"Check the upstream, too, not only the proxy."`
}

func (h *healthCmd) Help() string {
	return `Exits with 0 if the proxy answers (with --ready: and its upstream does), otherwise with 1 and the reason.

Examples:

  ollama-cacheproxy health
  ollama-cacheproxy health --ready --listen 127.0.0.1:8080`
}

func (h *healthCmd) Run(ctx context.Context, c *console) error {
	u, err := upstream.ParseAddr(h.Listen, defaultPort)
	if err != nil {
		return exitError{2, fmt.Errorf("--listen: %w", err)}
	}
	page := "health"
	if h.Ready {
		page = "ready"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.JoinPath("/_cacheproxy/", page).String(), nil)
	if err != nil {
		return err
	}
	res, err := anybody.Do(req)
	if err != nil {
		return fmt.Errorf("no proxy answers at %s: %w", u, err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	if err != nil {
		return fmt.Errorf("reading the answer of %s: %w", u, err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s: %s", u, res.Status, strings.TrimSpace(string(text)))
	}
	_, err = c.stdout.Write(text)
	return err
}
