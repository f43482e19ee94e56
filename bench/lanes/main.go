// Command lanes measures, on real Ollama servers, what scheduling saves: the same requests directly and through the proxy, with
// the tokens that the server evaluated and the models that it loaded by its own log, and the time that it all took.
//
//	go run ./bench/lanes
//	go run ./bench/lanes -era 0.24.0 -only scripts
//
// The proxy is measured twice: told how many slots the server has, and learning it while it works.
//
// The least possible is measured, too: the same requests one after the other, in the order of their prefixes, on a server of
// their own.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// request is one chat.
type request struct {
	id       int
	model    string
	numCtx   int
	messages []message
	generate int
	priority string
}

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// workload is what clients ask. Each client is a list of requests.
type workload struct {
	name    string
	config  realollama.Config
	clients [][]request
	least   []request   // the same in the best order, for one client
	best    [][]request // … or for several, one after the other
	open    bool        // clients send all that they have at once; otherwise one after the other, each when the last one is answered
	chats   bool        // answers become messages: the next request is made of the last answer
}

// result is what one way came to.
type result struct {
	evaluated, loads int
	wall             time.Duration
	answers          map[int]string
	latency          map[string][]time.Duration // by priority
}

func main() {
	era := flag.String("era", realollama.EraC, "version of Ollama: "+strings.Join(realollama.Versions(), ", "))
	only := flag.String("only", "", "only workloads whose name contains this")
	model := flag.String("model", "gen-llama-tiny", "the model; gen-llama-costly takes about a millisecond for each token")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *era, *only, *model, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "lanes:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, era, only, model string, out io.Writer) error {
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-lanes-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "ollama-cacheproxy")
	if err := proxyprocess.Build(ctx, binary); err != nil {
		return err
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "ollama %s, %s\trequests\tleast possible\tdirect\tslots given\tauto\tloads: direct\tgiven\tauto\tseconds: direct\tgiven\tauto\tanswers equal\t\n", era, model)
	for _, w := range workloads(era, model) {
		if !strings.Contains(w.name, only) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s …\n", w.name)
		w.config.Version = era
		least, err := measure(ctx, w, "", nil, true)
		if err != nil {
			return fmt.Errorf("%s, least possible: %w", w.name, err)
		}
		direct, err := measure(ctx, w, "", nil, false)
		if err != nil {
			return fmt.Errorf("%s, directly: %w", w.name, err)
		}
		given, err := measure(ctx, w, binary, []string{"--slots", fmt.Sprint(max(1, w.config.Parallel))}, false)
		if err != nil {
			return fmt.Errorf("%s, through the proxy: %w", w.name, err)
		}
		auto, err := measure(ctx, w, binary, []string{"--slots", "auto"}, false)
		if err != nil {
			return fmt.Errorf("%s, through the proxy: %w", w.name, err)
		}
		n, same := 0, 0
		for id, a := range direct.answers {
			n++
			if given.answers[id] == a && auto.answers[id] == a {
				same++
			}
		}
		ratio := func(r result) string {
			return fmt.Sprintf("%d (%.2f)", r.evaluated, float64(r.evaluated)/float64(least.evaluated))
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\t%s\t%s\t%d\t%d\t%d\t%.1f\t%.1f\t%.1f\t%d\t\n", w.name, n, least.evaluated, ratio(direct), ratio(given), ratio(auto),
			direct.loads, given.loads, auto.loads, direct.wall.Seconds(), given.wall.Seconds(), auto.wall.Seconds(), same)
		for _, p := range []string{"interactive", "batch"} {
			if strings.Contains(w.name, "interactive") {
				fmt.Fprintf(t, "%s: median seconds\t\t\t%.2f\t%.2f\t%.2f\t\t\t\t\t\t\t\t\n", p, median(direct.latency[p]).Seconds(), median(given.latency[p]).Seconds(), median(auto.latency[p]).Seconds())
			}
		}
	}
	return t.Flush()
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// measure runs a workload on a fresh server, through the proxy if binary is given; or one request at a time in the best order.
func measure(ctx context.Context, w workload, binary string, flags []string, best bool) (r result, err error) {
	config := w.config
	if best {
		config.CacheRAMMiB, config.Parallel = nil, 0
	}
	server, err := realollama.Run(ctx, config, nil)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	url := server.URL()
	if binary != "" {
		p, err := proxyprocess.Start(ctx, binary, server.URL(), flags...)
		if err != nil {
			return r, err
		}
		defer func() { err = errors.Join(err, p.Stop()) }()
		url = p.URL
	}
	clients := w.clients
	if best && w.best == nil {
		clients = [][]request{w.least}
	}
	mark := server.Mark()
	r.answers, r.latency = map[int]string{}, map[string][]time.Duration{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	errs := make(chan error, 10_000)
	begin := time.Now()
	count := 0
	send := func(q request) (string, bool) {
		sent := time.Now()
		text, err := ask(ctx, url, q)
		if err != nil {
			errs <- err
			return "", false
		}
		mu.Lock()
		defer mu.Unlock()
		r.answers[q.id] = text
		r.latency[q.priority] = append(r.latency[q.priority], time.Since(sent))
		return text, true
	}
	for i, list := range clients {
		count += len(list)
		if w.open && !best {
			for k, q := range list {
				wg.Go(func() {
					// In the order of the list, client by client: what comes first is to be there first.
					time.Sleep(time.Duration(k*len(clients)+i) * time.Millisecond)
					send(q)
				})
			}
			continue
		}
		if best {
			wg.Wait() // one client after the other
		}
		wg.Go(func() {
			var history []message
			for i, q := range list {
				if w.chats && i > 0 {
					q.messages = append(slices.Clone(history), q.messages[len(q.messages)-1])
				}
				text, ok := send(q)
				if !ok {
					return
				}
				if w.chats {
					history = append(slices.Clone(q.messages), message{"assistant", text})
				}
			}
		})
	}
	wg.Wait()
	r.wall = time.Since(begin)
	select {
	case err := <-errs:
		return r, err
	default:
	}
	log, err := server.WaitEvaluations(ctx, mark, count)
	if missing := count - len(log); err != nil && (ctx.Err() != nil || missing > count/10) {
		return r, err
	} else if missing > 0 { // a load ends the engine of the model before, sometimes before it has written its last line
		fmt.Fprintf(os.Stderr, "%s: the server's log lacks %d of %d evaluations\n", w.name, missing, count)
	}
	for _, e := range log {
		r.evaluated += max(e.Evaluated, 1)
	}
	r.loads = server.Loads(mark)
	return r, nil
}

func ask(ctx context.Context, url string, q request) (string, error) {
	options := map[string]any{"temperature": 0, "seed": 1, "num_predict": q.generate}
	if q.numCtx > 0 {
		options["num_ctx"] = q.numCtx
	}
	body, err := json.Marshal(map[string]any{"model": q.model, "stream": false, "options": options, "messages": q.messages})
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/api/chat", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	if q.priority != "" {
		req.Header.Set("X-Cacheproxy-Priority", q.priority)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	var answer struct {
		Message message
		Error   string
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return "", err
	}
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", res.Status, answer.Error)
	}
	return answer.Message.Content, nil
}

var words = strings.Fields("the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you were all her she there would their we him been has when who will no more if out so up said what its about than into them can only other time new some could these two may first then do any like my now over such our man me even most made after also did many off before must well back through years where much your way down should because long each just state those people too mr how little good world make very year still see own work men day get here old between both life being under three never know same last another while us might great")

func text(seed uint64, n int) string {
	r := rand.New(rand.NewPCG(seed, 7))
	list := make([]string, n)
	for i := range list {
		list[i] = words[r.IntN(len(words))]
	}
	return strings.Join(list, " ")
}

// workloads are those of the table in docs/lanes.md. Prefixes have about 600 tokens, tails 30.
func workloads(era, model string) []workload {
	var list []workload
	small := new(int) // no host cache
	base := func(parallel int, cache *int) realollama.Config {
		c := realollama.Config{Models: []string{model}, Parallel: parallel, KeepAlive: "10m"}
		if era != realollama.EraA {
			c.CacheRAMMiB = cache
		}
		return c
	}
	one := func(id, prefix, n int) request {
		return request{id: id, model: model, generate: 4, messages: []message{{"system", text(uint64(prefix), 250)}, {"user", text(uint64(1000*prefix+n+7), 12)}}}
	}
	caches := []struct {
		name string
		mib  *int
	}{{"small", small}, {"ample", nil}}
	for _, slots := range []int{1, 4} {
		for _, c := range caches {
			if era == realollama.EraA && c.mib == nil {
				continue // it has none
			}
			w := workload{name: fmt.Sprintf("32 prefixes × 4, 8 clients, %d slots, %s host cache", slots, c.name), config: base(slots, c.mib), open: true, clients: make([][]request, 8)}
			for n := range 4 {
				for p := range 32 {
					q := one(n*32+p, p+1, n)
					w.clients[(n*32+p)%8] = append(w.clients[(n*32+p)%8], q)
				}
			}
			for p := range 32 {
				for n := range 4 {
					w.least = append(w.least, one(n*32+p, p+1, n))
				}
			}
			list = append(list, w)
		}
	}
	scripts := workload{name: "4 closed-loop scripts × 10, 1 slot, small host cache", config: base(1, small), clients: make([][]request, 4)}
	for s := range 4 {
		for n := range 10 {
			q := one(s*10+n, 100+s, n)
			scripts.clients[s] = append(scripts.clients[s], q)
			scripts.least = append(scripts.least, q)
		}
	}
	list = append(list, scripts)
	for _, slots := range []int{1, 4} {
		w := workload{name: fmt.Sprintf("one hot prefix × 64, 8 clients, %d slots", slots), config: base(slots, nil), clients: make([][]request, 8)}
		for n := range 64 {
			q := one(n, 200, n)
			w.clients[n%8] = append(w.clients[n%8], q)
			w.least = append(w.least, q)
		}
		list = append(list, w)
	}
	ctx := workload{name: "two num_ctx × 20 in turn, 4 clients", config: base(1, nil), open: true, clients: make([][]request, 4)}
	for n := range 40 {
		q := one(n, 300, n)
		q.numCtx = []int{2048, 4096}[n%2]
		ctx.clients[n/2%4] = append(ctx.clients[n/2%4], q)
		ctx.least = append(ctx.least, q)
	}
	slices.SortStableFunc(ctx.least, func(a, b request) int { return a.numCtx - b.numCtx })
	list = append(list, ctx)
	for _, slots := range []int{1, 4} {
		w := workload{name: fmt.Sprintf("4 chats of 8 turns, one system prompt, %d slots, small host cache", slots), config: base(slots, small), chats: true, clients: make([][]request, 4)}
		for c := range 4 {
			for turn := range 8 {
				q := request{id: c*100 + turn, model: model, generate: 8, messages: []message{{"system", text(700, 250)}, {"user", text(uint64(7000+100*c+turn), 30)}}}
				w.clients[c] = append(w.clients[c], q)
			}
		}
		w.best = w.clients
		list = append(list, w)
	}
	inter := workload{name: "8 interactive among 80 batch, 1 slot", config: base(1, small), open: true, clients: make([][]request, 9)}
	for n := range 80 {
		q := one(n, 400+n/20, n)
		q.priority = "batch"
		inter.clients[n%8] = append(inter.clients[n%8], q)
		inter.least = append(inter.least, q)
	}
	for n := range 8 {
		q := one(1000+n, 500, n)
		q.priority = "interactive"
		inter.clients[8] = append(inter.clients[8], q)
		inter.least = append(inter.least, q)
	}
	list = append(list, inter)
	decode := workload{name: "decode-heavy: 32 short prompts, 48 tokens each, 8 clients, 4 slots", config: base(4, nil), clients: make([][]request, 8)}
	for n := range 32 {
		q := request{id: n, model: model, generate: 48, messages: []message{{"user", text(uint64(9000+n), 20)}}}
		decode.clients[n%8] = append(decode.clients[n%8], q)
		decode.least = append(decode.least, q)
	}
	list = append(list, decode)
	lone := workload{name: "a lone client × 40", config: base(1, nil), clients: make([][]request, 1)}
	for n := range 40 {
		q := one(n, 600, n)
		lone.clients[0] = append(lone.clients[0], q)
		lone.least = append(lone.least, q)
	}
	return append(list, lone)
}
