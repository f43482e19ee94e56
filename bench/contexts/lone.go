package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// lone measures what contexts add for a client that sends one request at a time, with everything
// warm: directly, through a proxy without and one with contexts, in turn, all on one server.
func (b *bench) lone(ctx context.Context) (rows []row, err error) {
	const first = 5 // rounds that load the model and open connections
	rounds := b.n(200)
	w := workload{config: realollama.Config{Models: []string{"gen-llama-tiny"}, KeepAlive: "10m"}}
	p, err := linked.Start(ctx, b.options(w, b.way))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	without, err := proxyprocess.Start(ctx, b.binary, p.Server.URL())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, without.Stop()) }()
	urls := []string{p.Server.URL(), without.URL, p.URL()}
	took, added := make([][]time.Duration, len(urls)), make([][]time.Duration, len(urls))
	differ := 0
	client := chat.ClientFrom("")
	defer client.CloseIdleConnections()
	for n := range rounds + first {
		now := make([]chat.Answer, len(urls))
		for i := range urls {
			i = (i + n) % len(urls) // each comes first in turn
			q := ask(n, 70, 250, "gen-llama-tiny")
			if now[i], err = q.send(ctx, client, urls[i]); err != nil {
				return nil, err
			}
		}
		if n < first {
			continue
		}
		for i := range urls {
			took[i] = append(took[i], now[i].Took)
			added[i] = append(added[i], now[i].Took-now[1].Took)
		}
		if now[2].Text != now[0].Text {
			differ++
		}
	}
	median := func(all []time.Duration) string { return milliseconds2(chat.Quantile(all, 0.5)) }
	more := chat.Quantile(added[2], 0.5)
	return []row{
		{"a lone chat, everything warm", fmt.Sprint(rounds), "", "", "", ""},
		note("median, ms", median(took[0]), median(took[2])),
		note("median through the proxy without contexts, ms", "", median(took[1])),
		target("added by contexts, median of the differences, ms", "", milliseconds2(more),
			"≤ 1", more <= time.Millisecond),
		note("answers that differ", "", fmt.Sprintf("%d of %d", differ, rounds)),
	}, nil
}

func milliseconds2(d time.Duration) string {
	return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond))
}
