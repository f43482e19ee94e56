package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// This file is the third part: many long prefixes in turn, and two num_ctx in turn. The model has
// random weights and takes a millisecond or less for a token; its answers are compared, not shown.
const (
	lanesModel   = "gen-llama-costly"
	lanePrefixes = 6
	laneEach     = 4 // requests of each prefix
	laneContexts = 8 // requests, with the two num_ctx in turn
)

// question is a request of the third part.
type question struct {
	prefix, n, numCtx int
}

// interleaved returns the two loads, run one after the other, by client: each client asks one
// question after the other.
func interleaved() (loads [2][][]question) {
	for n := range laneEach {
		for p := range lanePrefixes {
			loads[0] = append(loads[0], []question{{p, n, 4096}})
		}
	}
	loads[1] = make([][]question, 2)
	for n := range laneContexts {
		loads[1][n%2] = append(loads[1][n%2], question{lanePrefixes, n, []int{4096, 2048}[n%2]})
	}
	return loads
}

// effort is the result of one way.
type effort struct {
	requests, evaluated, loads int
	wall                       time.Duration
	answers                    map[question]string
}

// lanes asks the same questions directly and through the proxy, each time on a new server with one
// slot and no host memory for prompts (as if they exceeded it).
func lanes(ctx context.Context, ollama realollama.Installed, binary string, out io.Writer) error {
	fmt.Fprintf(out, "\n%d prefixes × %d requests at once, then two scripts with a num_ctx each, %d requests in turn: directly and through the proxy (--slots auto) …\n\n",
		lanePrefixes, laneEach, laneContexts)
	direct, err := tryLanes(ctx, ollama, "")
	if err != nil {
		return fmt.Errorf("directly: %w", err)
	}
	proxied, err := tryLanes(ctx, ollama, binary)
	if err != nil {
		return fmt.Errorf("through the proxy: %w", err)
	}
	equal := 0
	for q, a := range direct.answers {
		if proxied.answers[q] == a {
			equal++
		}
	}
	t := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "\tdirectly\tthrough the proxy\n")
	fmt.Fprintf(t, "prompt tokens evaluated (server's log)\t%d\t%d\n", direct.evaluated, proxied.evaluated)
	fmt.Fprintf(t, "model loads (server's log)\t%d\t%d\n", direct.loads, proxied.loads)
	fmt.Fprintf(t, "seconds\t%.1f\t%.1f\n", direct.wall.Seconds(), proxied.wall.Seconds())
	fmt.Fprintf(t, "answers\t%d\t%d, %d equal\n", direct.requests, proxied.requests, equal)
	t.Flush()
	if proxied.evaluated >= direct.evaluated || proxied.loads >= direct.loads {
		return errors.New("this is not what the proxy promises: fewer tokens evaluated and fewer loads")
	}
	return nil
}

// tryLanes asks through the proxy if binary is not empty.
func tryLanes(ctx context.Context, ollama realollama.Installed, binary string) (e effort, err error) {
	config := realollama.Config{Version: ollama.Version, Bin: ollama.Bin, Models: []string{lanesModel}, KeepAlive: "10m"}
	if realollama.Era(ollama.Version) != realollama.EraA { // era A has no such memory
		config.CacheRAMMiB = new(int)
	}
	server, err := realollama.Run(ctx, config, nil)
	if err != nil {
		return e, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	url := server.URL()
	if binary != "" {
		p, err := proxyprocess.Start(ctx, binary, url, "--slots", "auto")
		if err != nil {
			return e, err
		}
		defer func() { err = errors.Join(err, p.Stop()) }()
		url = p.URL
	}
	mark, begin := server.Mark(), time.Now()
	e.answers = map[question]string{}
	for _, clients := range interleaved() {
		if err := e.play(ctx, url, clients); err != nil {
			return e, err
		}
	}
	e.wall = time.Since(begin)
	// A load ends the previous engine, sometimes before that has written its last line.
	log, err := server.WaitEvaluations(ctx, mark, e.requests-server.Loads(mark))
	if err != nil {
		return e, err
	}
	for _, l := range log {
		e.evaluated += l.Evaluated
	}
	e.loads = server.Loads(mark)
	return e, nil
}

// play lets all clients ask their questions.
func (e *effort) play(ctx context.Context, url string, clients [][]question) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex // guards e
	var wg sync.WaitGroup
	for i, list := range clients {
		wg.Go(func() {
			time.Sleep(time.Duration(i) * time.Millisecond) // keeps them in this order
			for _, q := range list {
				text, err := q.ask(ctx, url)
				if err != nil {
					cancel(err)
					return
				}
				mu.Lock()
				e.requests++
				e.answers[q] = text
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

func (q question) ask(ctx context.Context, base string) (string, error) {
	u, err := url.Parse(base)
	if err != nil {
		return "", err
	}
	stream := false
	instructions := fmt.Sprintf("You are judge number %d. %s", q.prefix, jobs[q.prefix%len(jobs)].instructions)
	var answer string
	err = api.NewClient(u, http.DefaultClient).Chat(ctx, &api.ChatRequest{
		Model: lanesModel, Stream: &stream, Options: map[string]any{"temperature": 0, "num_predict": 4, "num_ctx": q.numCtx},
		Messages: []api.Message{{Role: "system", Content: instructions}, {Role: "user", Content: fmt.Sprintf("Text number %d.", q.n)}},
	}, func(r api.ChatResponse) error {
		answer = r.Message.Content
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("asking for a text: %w", err)
	}
	return answer, nil
}
