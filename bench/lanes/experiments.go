package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/chat"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/play"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// experiments returns the experiments in the order of the table.
func (b *bench) experiments() []experiment {
	var all []experiment
	add := func(w play.Workload, notes ...func(c compared) []row) {
		all = append(all, experiment{w.Name, func(ctx context.Context) ([]row, error) {
			c, err := b.compare(ctx, w)
			if err != nil {
				return nil, err
			}
			rows := []row{c.row()}
			for _, n := range notes {
				rows = append(rows, n(c)...)
			}
			return rows, nil
		}})
	}
	for _, slots := range []int{1, 4} {
		add(b.shuffled(slots, false))
		if b.Era != realollama.EraA {
			add(b.shuffled(slots, true))
		}
	}
	add(b.scripts(10))
	add(b.scripts(40))
	if costly := (&bench{play.Bench{Era: b.Era, Model: "gen-llama-costly"}, b.binary}); b.Model != costly.Model {
		w := costly.scripts(10)
		w.Name += ", " + costly.Model
		add(w)
	}
	add(b.hot(1))
	add(b.hot(4))
	add(b.numCtx())
	add(b.runners(true))
	add(b.runners(false))
	for _, slots := range []int{1, 2, 4} {
		add(b.chats(slots), sharedPrompt)
	}
	add(b.mixed(), func(c compared) []row { return append(latencies(c, "interactive"), latencies(c, "batch")...) })
	all = append(all, experiment{b.batch(true).Name, b.interactive})
	add(b.unequal(), fairness)
	add(b.decode())
	all = append(all, experiment{"a lone client", b.lone})
	whole := func(c compared) []row { return latencies(c, "") }
	add(b.Upstreams(3, 6, false), whole)
	each := 18 // enough for the proxy to notice that a server is back
	if b.Era == realollama.EraA {
		each = 6 // it evaluates most of the prompt each time, which takes as long
	}
	add(b.Upstreams(3, each, true), whole, losses)
	return all
}

// latencies returns the rows for the latencies of a priority's requests.
func latencies(c compared, priority string) []row {
	var rows []row
	for _, part := range []struct {
		name string
		part float64
	}{{"median", 0.5}, {"p99", 0.99}} {
		label := part.name + ", ms"
		if priority != "" {
			label = priority + ": " + label
		}
		rows = append(rows, note(label, c.each(func(r play.Result) string {
			return fmt.Sprintf("%.1f", ms(r.Latency(priority, part.part)))
		})))
	}
	return rows
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// sharedPrompt compares with the minimum for several slots, since none can copy the system prompt
// from another. (The least possible, on one slot, evaluates it once.)
func sharedPrompt(c compared) []row {
	slots := min(c.w.Config.Parallel, len(c.w.Clients))
	if slots == 1 || len(c.least.Evaluations) <= chatTurns {
		return nil
	}
	once := c.least.Evaluations[chatTurns].Reused // the second chat's first turn
	least := c.least.Evaluated + (slots-1)*once
	return []row{note(fmt.Sprintf("relative to the system prompt once on each slot, %d", least), c.over(least))}
}

// interactive measures how long an interactive request waits, and what it costs the batch around
// it.
func (b *bench) interactive(ctx context.Context) ([]row, error) {
	c, err := b.compare(ctx, b.batch(true))
	if err != nil {
		return nil, err
	}
	var overtaken, cost [ways]string
	for i, r := range c.by {
		var own int
		for place, d := range r.Done {
			if d.Q.Priority == "interactive" {
				overtaken[i] = fmt.Sprint(place - d.Before)
				own = d.Prompt // this prefix is new, so all of it is evaluated
			}
		}
		if way(i) == direct {
			continue
		}
		without, err := b.measure(ctx, b.batch(false), way(i))
		if err != nil {
			return nil, fmt.Errorf("without: %w", err)
		}
		cost[i] = fmt.Sprint(r.Evaluated - own - without.Evaluated)
	}
	return []row{
		c.row(), latencies(c, "interactive")[0],
		note("batch requests answered between its arrival and its answer", overtaken),
		note("tokens that the batch has evaluated more than without it", cost),
	}, nil
}

// generatedWeight is how many evaluated tokens a generated one counts as when clients are compared.
const generatedWeight = 10

// fairness compares the service of two clients, in tokens evaluated and generated, for as long as
// both have requests waiting. A quantum is twenty average prompts, as in the proxy, with each
// client's average counting once.
func fairness(c compared) []row {
	var prompts, n [2]float64
	var largest float64
	for _, d := range c.least.Done {
		from := 0
		if d.Q.ID >= 10_000 {
			from = 1
		}
		prompts[from] += float64(d.Prompt)
		n[from]++
		largest = max(largest, float64(d.Prompt+generatedWeight*d.Generated))
	}
	quantum := 20 * (prompts[0]/n[0] + prompts[1]/n[1]) / 2
	return []row{
		note(fmt.Sprintf("largest difference in service, in quanta (a quantum and a largest request: %.2f)", 1+largest/quantum), c.each(func(r play.Result) string {
			difference, _ := service(r, quantum)
			return fmt.Sprintf("%.2f", difference)
		})),
		note("Jain index over ten quanta, or all there are", c.each(func(r play.Result) string {
			_, jain := service(r, quantum)
			return strings.Join(jain, ", ")
		})),
	}
}

// service returns by how many quanta one client was ahead of the other at most, and for each ten
// quanta how fairly they were divided: 1 is evenly, 0.5 is all to one (Jain, Chiu and Hawe,
// DEC-TR-301, 1984). It needs a server with one slot, whose log has prompts in the order of their
// answers.
func service(r play.Result, quantum float64) (difference float64, jain []string) {
	left := []int{longs, shorts}
	var total, window [2]float64
	for i := 0; i < min(len(r.Done), len(r.Evaluations)) && left[0] > backlog && left[1] > backlog; i++ {
		from := r.Done[i].From
		left[from]--
		cost := float64(r.Evaluations[i].Evaluated + generatedWeight*r.Done[i].Generated)
		total[from] += cost
		window[from] += cost
		difference = max(difference, (total[0]-total[1])/quantum, (total[1]-total[0])/quantum)
		if window[0]+window[1] >= 10*quantum {
			jain = append(jain, index(window))
			window = [2]float64{}
		}
	}
	if len(jain) == 0 {
		jain = append(jain, index(window))
	}
	return difference, jain
}

// index returns the Jain index of two clients' service.
func index(w [2]float64) string {
	return fmt.Sprintf("%.3f", (w[0]+w[1])*(w[0]+w[1])/2/(w[0]*w[0]+w[1]*w[1]))
}

// losses reports the requests while a server was gone, and how much was evaluated beyond the
// minimum: a prefix that only that server held is evaluated once more if it is asked for again.
func losses(c compared) []row {
	failed := c.each(func(r play.Result) string { return fmt.Sprintf("%d, %d", r.Retried, len(r.Failed)) })
	over := c.each(func(r play.Result) string {
		once := c.least.Evaluations[1].Reused
		lost := map[int]bool{}
		again := 0
		for i, d := range r.Done {
			switch killed := len(c.least.Done) / 3; {
			case i < killed && d.Server == play.ServerName(0):
				lost[d.Q.Prefix] = true
			case i < killed: // on another server, too
				delete(lost, d.Q.Prefix)
			case lost[d.Q.Prefix]:
				again++
				delete(lost, d.Q.Prefix)
			}
		}
		least := c.least.Evaluated + again*once
		return fmt.Sprintf("%.2f of %d", float64(r.Evaluated)/float64(least), least)
	})
	return []row{note("errors that clients met, requests lost", failed), note("relative to the least possible and what was lost", over)}
}

// lone measures what the proxy adds for a client that sends one request at a time: directly,
// through the proxy and through a bare reverse proxy in turn, on one server.
func (b *bench) lone(ctx context.Context) (rows []row, err error) {
	const (
		bare   = int(ways)
		rounds = 300
		first  = 5 // rounds that load the model and open connections
	)
	config := b.Config(1, true)
	config.Version = b.Era
	server, err := realollama.Run(ctx, config, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	var urls [bare + 1]string
	for _, how := range []way{direct, given, auto} {
		url, stop, err := b.front(ctx, how, []*realollama.Server{server}, 1)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, stop()) }()
		urls[how] = url
	}
	url, stop, err := startBare(ctx, server.URL())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	urls[bare] = url

	var took, added [bare + 1][]time.Duration
	equal := 0
	client := chat.ClientFrom("")
	defer client.CloseIdleConnections()
	for n := range rounds + first {
		var now [bare + 1]time.Duration
		var texts [bare + 1]string
		for i := range urls {
			i = (i + n) % len(urls) // each comes first in turn
			sent := time.Now()
			a, err := play.Ask(ctx, client, urls[i], b.Chat(0, 600, n))
			if err != nil {
				return nil, err
			}
			now[i], texts[i] = time.Since(sent), a.Text
		}
		if n < first {
			continue
		}
		for i := range urls {
			took[i] = append(took[i], now[i])
			added[i] = append(added[i], now[i]-now[direct])
		}
		if texts[given] == texts[direct] && texts[auto] == texts[direct] {
			equal++
		}
	}
	each := func(figure func(i int) string) (all [ways]string) {
		for i := range ways {
			all[i] = figure(int(i))
		}
		return all
	}
	quantiles := func(part float64) func(i int) string {
		return func(i int) string { return fmt.Sprintf("%.2f", ms(chat.Quantile(took[i], part))) }
	}
	return []row{
		{fmt.Sprintf("a lone client × %d, directly and through the proxy in turn", rounds), fmt.Sprint(rounds), "", "", "", "", "", "", fmt.Sprintf("%d of %d", equal, rounds)},
		note("median, ms", each(quantiles(0.5))),
		note("p95, ms", each(quantiles(0.95))),
		note(fmt.Sprintf("added, median of the differences, ms (by a bare reverse proxy: %.2f)", ms(chat.Quantile(added[bare], 0.5))), each(func(i int) string {
			return fmt.Sprintf("%.2f", ms(chat.Quantile(added[i], 0.5)))
		})),
	}, nil
}
