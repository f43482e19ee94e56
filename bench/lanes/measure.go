package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/play"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// bench has what all measurements share.
type bench struct {
	play.Bench
	binary string
}

// way is how requests reach the server.
type way int

const (
	direct way = iota // with several servers: through leastLoaded
	given             // through the proxy, with the number of slots given
	auto              // through the proxy, which learns the number
	ways
)

// compare measures all ways in turn. If the workload says so, it does that several times, and uses
// the run with the median time for each way.
func (b *bench) compare(ctx context.Context, w play.Workload) (c compared, err error) {
	c.w = w
	if c.least, err = b.Least(ctx, w); err != nil {
		return c, fmt.Errorf("least possible: %w", err)
	}
	var all [ways][]play.Result
	for range max(1, w.Runs) {
		for i, name := range [ways]string{"directly", "slots given", "auto"} {
			r, err := b.measure(ctx, w, way(i))
			if err != nil {
				return c, fmt.Errorf("%s: %w", name, err)
			}
			all[i] = append(all[i], r)
		}
	}
	for i, runs := range all {
		slices.SortFunc(runs, func(a, b play.Result) int { return cmp.Compare(a.Wall, b.Wall) })
		c.by[i] = runs[len(runs)/2]
	}
	return c, nil
}

func (b *bench) measure(ctx context.Context, w play.Workload, how way) (play.Result, error) {
	return b.Measure(ctx, w, func(ctx context.Context, servers []*realollama.Server, slots int) ([]string, func() error, error) {
		url, stop, err := b.front(ctx, how, servers, slots)
		return []string{url}, stop, err
	})
}

// front starts the receiver of the requests, and returns its URL.
func (b *bench) front(ctx context.Context, how way, servers []*realollama.Server, slots int) (url string, stop func() error, err error) {
	switch {
	case how == direct && len(servers) > 1:
		var urls []string
		for _, s := range servers {
			urls = append(urls, s.URL())
		}
		return serveLeastLoaded(urls)
	case how == direct:
		return servers[0].URL(), func() error { return nil }, nil
	}
	flags := []string{"--slots", "auto"}
	if how == given {
		flags = []string{"--slots", fmt.Sprint(slots)}
	}
	upstream, more := play.UpstreamFlags(servers)
	flags = append(flags, more...)
	p, err := proxyprocess.Start(ctx, b.binary, upstream, flags...)
	if err != nil {
		return "", nil, err
	}
	return p.URL, p.Stop, nil
}
