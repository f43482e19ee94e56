package integration

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestUpstreams: three servers share thirty prefixes, and each prefix is evaluated on one of them;
// then the same again while one is killed and revived. No request is lost: each is answered, or
// ends with an error and is answered the second time.
func TestUpstreams(t *testing.T) {
	version := realollama.Newest()
	const model = "gen-llama-tiny"
	const prefixes, each, clients = 30, 6, 180
	names := []string{"a", "b", "c"}
	servers := map[string]*realollama.Server{}
	var flags []string
	for _, name := range names {
		config := realollama.Config{Version: version, Models: []string{model}}
		if version != realollama.EraA {
			config.CacheRAMMiB = new(int) // only the slot holds a prompt
		}
		servers[name] = realollama.Start(t, config)
		flags = append(flags, "--upstream", name+"="+servers[name].URL())
	}
	ask := func(url string, seed, prefix, n int) (status int, text, from string, total int) {
		body, err := json.Marshal(map[string]any{
			"model": model, "stream": false, "options": map[string]any{"temperature": 0, "num_predict": 4},
			"messages": []map[string]string{{"role": "system", "content": words(uint64(seed+prefix), 200)}, {"role": "user", "content": words(uint64(seed+1000+100*prefix+n), 10)}},
		})
		if err != nil {
			t.Error(err)
			return
		}
		res, err := http.Post(url+"/api/chat", "application/json", bytes.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		defer res.Body.Close()
		all, err := io.ReadAll(res.Body)
		var answer struct {
			Message struct{ Content string }
			Total   int `json:"prompt_eval_count"`
		}
		if err != nil || json.Unmarshal(all, &answer) != nil {
			t.Errorf("%s: %s, %v", res.Status, all, err)
		}
		return res.StatusCode, answer.Message.Content, res.Header.Get("X-Cacheproxy-Upstream"), answer.Total
	}
	marks := func() map[string]realollama.Mark {
		m := map[string]realollama.Mark{}
		for name, s := range servers {
			m[name] = s.Mark()
		}
		return m
	}
	type id struct{ prefix, n int }

	// The minimum: one after the other on one server, in the order of the prefixes.
	want := map[id]string{}
	least := func(seed int) int {
		ask(servers["a"].URL(), 1, 0, 0)
		mark := servers["a"].Mark()
		for prefix := range prefixes {
			for n := range each {
				_, want[id{prefix, n}], _, _ = ask(servers["a"].URL(), seed, prefix, n)
			}
		}
		_, sum := evaluations(t, servers["a"], mark, prefixes*each)
		// No server has the model loaded when the proxy begins, so all requests are waiting by the
		// time that the first one is served. A prefix whose requests arrive one by one is evaluated
		// again between them, whatever the order.
		for _, name := range names {
			if err := servers[name].Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		return sum
	}

	// run sends everything through the proxy, by clients that each wait for their answer; at is
	// called with the number of answered requests.
	run := func(seed int, p *proxyProcess, at func(done int)) (from map[id]string, failed int) {
		var order []id
		for prefix := range prefixes {
			for n := range each {
				order = append(order, id{prefix, n})
			}
		}
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		from = map[id]string{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		next, differ := 0, 0
		for range clients {
			wg.Go(func() {
				for {
					mu.Lock()
					if next == len(order) {
						mu.Unlock()
						return
					}
					q := order[next]
					next++
					mu.Unlock()
					status, text, name, _ := ask(p.URL, seed, q.prefix, q.n)
					if status == http.StatusBadGateway { // it had been sent to the killed server
						mu.Lock()
						failed++
						mu.Unlock()
						status, text, name, _ = ask(p.URL, seed, q.prefix, q.n)
					}
					mu.Lock()
					if status != http.StatusOK {
						t.Errorf("request %v: %d", q, status)
					}
					from[q] = name
					if text != want[q] {
						differ++
					}
					at(len(from))
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if len(from) != len(order) {
			t.Errorf("%d of %d requests were answered", len(from), len(order))
		}
		// The engine's own answers vary now and then: see TestAnswers in realollama.
		if differ*20 > len(order) {
			t.Errorf("%d of %d answers differ", differ, len(order))
		}
		return from, failed
	}
	evaluated := func(since map[string]realollama.Mark) (sum int, per map[string]int) {
		per = map[string]int{}
		for name, s := range servers {
			for _, e := range s.Evaluations(since[name]) {
				sum += e.Evaluated
				per[name] += e.Evaluated
			}
		}
		return sum, per
	}
	start := func() *proxyProcess {
		return startProxy(t, "a="+servers["a"].URL(), append(slices.Clone(flags[2:]), "--slots", "1")...)
	}

	possible := least(100)
	since := marks()
	from, failed := run(100, start(), func(int) {})
	eventually(t, "all logged", func() bool {
		n := 0
		for name, s := range servers {
			n += len(s.Evaluations(since[name]))
		}
		return n >= prefixes*each
	})
	sum, per := evaluated(since)
	homes := map[int]map[string]bool{}
	for q, name := range from {
		if homes[q.prefix] == nil {
			homes[q.prefix] = map[string]bool{}
		}
		homes[q.prefix][name] = true
	}
	t.Logf("%d tokens evaluated (%v), %d are the least possible: %.3f", sum, per, possible, float64(sum)/float64(possible))
	if sum*100 > possible*120 || failed > 0 {
		t.Errorf("%d tokens evaluated, %d are the least possible; %d failed", sum, possible, failed)
	}
	for _, name := range names {
		if !slices.Contains(slices.Collect(maps.Values(from)), name) {
			t.Errorf("%s got nothing", name)
		}
	}

	// The same with other prefixes, while one server is killed and revived.
	possible = least(5000)
	since = marks()
	p := start()
	var steps sync.WaitGroup
	_, failed = run(5000, p, func(done int) {
		switch done {
		case prefixes * each / 3:
			steps.Go(servers["b"].Kill)
		case prefixes * each * 2 / 3:
			steps.Wait()
			if err := servers["b"].Restart(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
	steps.Wait()
	sum, per = evaluated(since)
	t.Logf("with one killed and revived: %d tokens evaluated (%v), %d are the least possible: %.3f; %d requests failed and were sent again", sum, per, possible, float64(sum)/float64(possible), failed)
	if sum*100 > possible*120 {
		t.Errorf("%d tokens evaluated, %d are the least possible", sum, possible)
	}
	if failed > 2 { // one lane, and a request on its way
		t.Errorf("%d requests failed: one was under way when the server was killed", failed)
	}

	// Afterwards all three serve, and lists have each model once.
	eventually(t, "all up", func() bool {
		_, _, text := get(t, p.URL+"/_cacheproxy/upstreams")
		return strings.Count(text, `"up":true`) == 3
	})
	if status, _, text := get(t, p.URL+"/api/tags"); status != 200 || strings.Count(text, `"model":"`+model) != 1 {
		t.Errorf("/api/tags: %d %s", status, text)
	}
	if n := p.Metric(t, `ollama_cacheproxy_upstream_up{`); n != 3 {
		t.Errorf("%v upstreams are up, as told by the metrics", n)
	}
}
