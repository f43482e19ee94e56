package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/linked"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

const other = "gen-llama-tiny-b"

// examine runs the verb doctor on a proxy, as text and as JSON, and returns the report.
func examine(t testing.TB, p *proxyProcess, flags ...string) doctor.Report {
	t.Helper()
	if len(flags) == 0 { // otherwise /metrics may need a key
		p.idle(t)
	}
	var report doctor.Report
	text, textStatus := p.doctor(t, flags...)
	out, status := p.doctor(t, append(flags, "--json")...)
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("doctor --json: %v\n%s", err, out)
	}
	want := 0
	if len(report.Findings) > 0 {
		want = 1
	}
	if status != want || textStatus != want {
		t.Errorf("doctor ends with %d, and with --json with %d, for %d findings", textStatus, status, len(report.Findings))
	}
	t.Logf("doctor says:\n%s", text)
	return report
}

// doctor runs the verb and returns its output and exit status.
func (p *proxyProcess) doctor(t testing.TB, flags ...string) (string, int) {
	t.Helper()
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	cmd := command(t, bin, append([]string{"doctor", "--proxy", p.URL}, flags...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if errs.Len() > 0 {
		t.Errorf("doctor: %s", errs.String())
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// finds returns the finding of a kind, which must be in the report and advise a setting.
func finds(t testing.TB, r doctor.Report, id, setting string) doctor.Finding {
	t.Helper()
	i := slices.IndexFunc(r.Findings, func(f doctor.Finding) bool { return f.ID == id })
	if i < 0 {
		t.Fatalf("nothing is said of %s", id)
	}
	f := r.Findings[i]
	if !slices.ContainsFunc(f.Advice, func(a doctor.Advice) bool { return strings.Contains(a.Set, setting) }) {
		t.Errorf("%s: no advice is %q: %+v", id, setting, f.Advice)
	}
	return f
}

// gone fails the test if a finding of the kind is still there.
func gone(t testing.TB, r doctor.Report, id string) {
	t.Helper()
	for _, f := range r.Findings {
		if f.ID == id {
			t.Errorf("the advice was followed, and doctor still says: %s: %v", f.Title, f.Evidence)
		}
	}
}

// chatTo returns the body of a chat: a system prompt of length words, and the user's message.
func chatTo(t testing.TB, model string, prefix uint64, length int, options map[string]any, turns ...string) string {
	t.Helper()
	return chatWithSystem(t, model, words(prefix, length), options, turns...)
}

func chatWithSystem(t testing.TB, model, system string, options map[string]any, turns ...string) string {
	t.Helper()
	set := map[string]any{"num_predict": 1, "temperature": 0}
	for k, v := range options {
		set[k] = v
	}
	messages := []map[string]string{{"role": "system", "content": system}}
	for i, text := range turns {
		messages = append(messages, map[string]string{"role": []string{"user", "assistant"}[i%2], "content": text})
	}
	body, err := json.Marshal(map[string]any{"model": model, "stream": false, "options": set, "messages": messages})
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// spent is a server's work for some requests, from its log.
type spent struct{ loads, evaluated int }

func (s spent) String() string {
	return fmt.Sprintf("%d loads, %d tokens evaluated", s.loads, s.evaluated)
}

// spend returns a server's work for requests, n of which have prompts. Its evaluated tokens are a
// lower bound.
func spend(t testing.TB, server *realollama.Server, n int, do func()) (s spent) {
	t.Helper()
	mark := server.Mark()
	do()
	settles(t, func() error {
		// An engine that is ended by another load may not have logged its last prompts.
		begun := server.Begun(mark)
		if least := n - server.Loads(mark); len(begun) < least {
			return fmt.Errorf("the server's log has %d prompts, want at least %d", len(begun), least)
		}
		s = spent{loads: server.Loads(mark)}
		for _, e := range begun {
			s.evaluated += e.Evaluated
		}
		return nil
	})
	return s
}

// TestDoctor plants problems for doctor to find, on real servers, and shows that following its
// advice removes both the finding and its cost.
func TestDoctor(t *testing.T) {
	scarce := realollama.Start(t, realollama.Config{
		Version: realollama.EraC, Models: []string{tiny, other}, MaxLoaded: 1, Parallel: 1, CacheRAMMiB: new(int),
	})
	ample := realollama.Start(t, realollama.Config{
		Version: realollama.EraC, Models: []string{tiny, other}, MaxLoaded: 3, Parallel: 4,
	})

	t.Run("nothing", func(t *testing.T) {
		p := startProxy(t, scarce.URL(), "--slots", "1")
		for n := range 6 {
			mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 1, 100, nil, words(uint64(10+n), 10)))
		}
		if r := examine(t, p); len(r.Findings) > 0 || r.Requests != 6 {
			t.Errorf("%d findings where nothing is wrong, of %d requests", len(r.Findings), r.Requests)
		}
	})

	t.Run("num_ctx", func(t *testing.T) {
		ask := func(sizes ...int) (doctor.Report, spent) {
			p := startProxy(t, scarce.URL(), "--slots", "1")
			s := spend(t, scarce, 6, func() {
				for n := range 6 {
					mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 2, 300, map[string]any{"num_ctx": sizes[n%len(sizes)]}, words(uint64(n), 10)))
				}
			})
			return examine(t, p), s
		}
		r, before := ask(2048, 8192)
		f := finds(t, r, doctor.IDNumCtx, `"num_ctx": 8192`)
		finds(t, r, doctor.IDNumCtx, "--num-ctx-policy "+tiny+":latest=raise")
		r, after := ask(8192)
		gone(t, r, doctor.IDNumCtx)
		t.Logf("before: %v; after: %v", before, after)
		if f.Cost.Loads < 5 || before.loads < 5 || after.loads > 1 || after.evaluated*2 > before.evaluated {
			t.Errorf("before: %v (told %+v); after: %v", before, f.Cost, after)
		}
	})

	t.Run("models in turn", func(t *testing.T) {
		ask := func(server *realollama.Server) (doctor.Report, spent) {
			p := startProxy(t, server.URL())
			s := spend(t, server, 8, func() {
				for n := range 8 {
					mustPost(t, p.URL+"/api/chat", chatTo(t, []string{tiny, other}[n%2], 3, 300, nil, words(uint64(n), 10)))
				}
			})
			return examine(t, p), s
		}
		r, before := ask(scarce)
		f := finds(t, r, doctor.IDEvict, "OLLAMA_MAX_LOADED_MODELS=2")
		r, after := ask(ample)
		gone(t, r, doctor.IDEvict)
		t.Logf("before: %v; after: %v", before, after)
		if f.Cost.Loads < 5 || before.loads < 7 || after.loads > 2 || after.evaluated*2 > before.evaluated {
			t.Errorf("before: %v (told %+v); after: %v", before, f.Cost, after)
		}
	})

	t.Run("host cache", func(t *testing.T) {
		ask := func(server *realollama.Server) (doctor.Report, spent) {
			p := startProxy(t, server.URL())
			mustPost(t, p.URL+"/api/chat", `{"model":"`+tiny+`"}`)
			s := spend(t, server, 24, func() {
				for n := range 24 {
					mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, uint64(10+n%6), 300, nil, words(uint64(n), 10)))
				}
			})
			return examine(t, p), s
		}
		r, before := ask(scarce)
		finds(t, r, doctor.IDHostCache, "LLAMA_ARG_CACHE_RAM=8192")
		r, after := ask(ample)
		gone(t, r, doctor.IDHostCache)
		t.Logf("before: %v; after: %v", before, after)
		if after.evaluated*2 > before.evaluated {
			t.Errorf("before: %v; after: %v", before, after)
		}
	})

	t.Run("keep_alive", func(t *testing.T) {
		ask := func(gap func(*proxyProcess), flags ...string) (doctor.Report, spent) {
			p := startProxy(t, scarce.URL(), flags...)
			s := spend(t, scarce, 4, func() {
				for n := range 4 {
					body := chatTo(t, tiny, 4, 300, nil, words(uint64(n), 10))
					mustPost(t, p.URL+"/api/chat", strings.Replace(body, "{", `{"keep_alive":"10ms",`, 1))
					gap(p)
				}
			})
			return examine(t, p), s
		}
		r, before := ask(func(*proxyProcess) {
			eventually(t, "dropped", func() bool { return len(loaded(t, scarce.URL())) == 0 })
		})
		f := finds(t, r, doctor.IDKeepAlive, "--keep-alive-policy at-least")
		r, after := ask(func(*proxyProcess) {}, "--keep-alive-policy", "at-least")
		gone(t, r, doctor.IDKeepAlive)
		t.Logf("before: %v; after: %v", before, after)
		if f.Cost.Loads < 3 || before.loads < 3 || after.loads > 1 || after.evaluated*2 > before.evaluated {
			t.Errorf("before: %v (told %+v); after: %v", before, f.Cost, after)
		}
	})

	t.Run("cut", func(t *testing.T) {
		ask := func(numCtx int) doctor.Report {
			p := startProxy(t, scarce.URL())
			var turns []string // of a chat that becomes long
			for n := range 7 {
				turns = append(turns, words(uint64(1000+2*n), 100))
				mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 5, 150, map[string]any{"num_ctx": numCtx}, turns...))
				turns = append(turns, words(uint64(1001+2*n), 100))
			}
			return examine(t, p)
		}
		r := ask(2048)
		finds(t, r, doctor.IDCut, `"num_ctx": 8192`)
		gone(t, ask(8192), doctor.IDCut)
	})

	t.Run("slots", func(t *testing.T) {
		ask := func(server *realollama.Server, slots string, each int) doctor.Report {
			p := startProxy(t, server.URL(), "--slots", slots)
			mustPost(t, p.URL+"/api/chat", `{"model":"`+tiny+`"}`)
			var wg sync.WaitGroup
			for n := range 4 {
				wg.Go(func() {
					body := chatTo(t, tiny, uint64(30+n), 20, map[string]any{"num_predict": each, "temperature": 1.5, "seed": n}, words(uint64(n), 10))
					if status, _, text := post(t, p.URL+"/api/chat", body); status != 200 {
						t.Errorf("%d %s", status, text)
					}
				})
			}
			wg.Wait()
			return examine(t, p)
		}
		f := finds(t, ask(scarce, "1", 2500), doctor.IDFewSlots, "OLLAMA_NUM_PARALLEL=4")
		r := ask(ample, "4", 2500)
		gone(t, r, doctor.IDFewSlots)
		t.Logf("waited before: %v", f.Cost)

		p := startProxy(t, ample.URL(), "--slots", "4")
		for n := range 50 {
			mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 8, 20, nil, words(uint64(n), 10)))
		}
		finds(t, examine(t, p), doctor.IDManySlots, "OLLAMA_NUM_PARALLEL=1")
		p = startProxy(t, scarce.URL(), "--slots", "1")
		for n := range 50 {
			mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 8, 20, nil, words(uint64(n), 10)))
		}
		gone(t, examine(t, p), doctor.IDManySlots)
	})

	t.Run("dropped turns", func(t *testing.T) {
		shifts := realollama.Start(t, realollama.Config{
			Version: realollama.EraC, Models: []string{tiny}, Parallel: 1, CacheRAMMiB: new(int),
			Env: []string{"LLAMA_ARG_CACHE_REUSE=64"},
		})
		ask := func(server *realollama.Server) (doctor.Report, spent) {
			p := startProxy(t, server.URL())
			var turns []string
			s := spend(t, server, 12, func() {
				for n := range 12 {
					turns = append(turns, words(uint64(2000+n), 60))
					mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 6, 40, nil, turns...))
					if turns = append(turns, words(uint64(3000+n), 60)); len(turns) > 8 {
						turns = turns[2:]
					}
				}
			})
			return examine(t, p), s
		}
		r, before := ask(scarce)
		finds(t, r, doctor.IDDropped, "LLAMA_ARG_CACHE_REUSE=64")
		r, after := ask(shifts)
		gone(t, r, doctor.IDDropped)
		t.Logf("before: %v; after: %v", before, after)
		if after.evaluated*2 > before.evaluated {
			t.Errorf("before: %v; after: %v", before, after)
		}
	})

	t.Run("past the proxy", func(t *testing.T) {
		ask := func(others func(p *proxyProcess) string) doctor.Report {
			p := startProxy(t, scarce.URL())
			for n := range 4 {
				mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 7, 100, nil, words(uint64(n), 10)))
				mustPost(t, others(p)+"/api/chat", chatTo(t, tiny, 7, 100, map[string]any{"num_ctx": 2048}, words(uint64(n), 10)))
			}
			mustPost(t, p.URL+"/api/chat", chatTo(t, tiny, 7, 100, nil, words(4, 10)))
			eventually(t, "the proxy knows the default context", func() bool {
				var facts doctor.Facts
				_, _, text := get(t, p.URL+"/_cacheproxy/facts")
				return json.Unmarshal([]byte(text), &facts) == nil && len(facts.Models) == 1 && facts.Models[0].DefaultContext > 0
			})
			return examine(t, p)
		}
		finds(t, ask(func(*proxyProcess) string { return scarce.URL() }), doctor.IDBypass, "OLLAMA_HOST=http://127.0.0.1")
		// Through the proxy, the cause is known.
		r := ask(func(p *proxyProcess) string { return p.URL })
		gone(t, r, doctor.IDBypass)
		finds(t, r, doctor.IDNumCtx, "OLLAMA_CONTEXT_LENGTH=4096") // Ollama's default
	})
}

// TestDoctorLink: stored contexts save the prompts that evictions cost, once the engine is linked.
func TestDoctorLink(t *testing.T) {
	// What takes no time to evaluate is not worth storing.
	models := []string{"gen-llama-costly", "gen-qwen3-costly"}
	ask := func(t *testing.T, way linked.Way) (doctor.Report, spent) {
		bin, err := proxyBinary()
		if err != nil {
			t.Fatal(err)
		}
		pair, err := linked.Start(t.Context(), linked.Options{Way: way, Program: bin, Server: realollama.Config{
			Version: realollama.EraC, Models: models, MaxLoaded: 1,
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := pair.Stop(); err != nil {
				t.Error(err)
			}
		})
		p := &proxyProcess{pair.Proxy}
		s := spend(t, pair.Server, 8, func() {
			for n := range 8 {
				mustPost(t, p.URL+"/api/chat", chatTo(t, models[n/2%2], 9, 200, nil, words(uint64(n), 10)))
			}
		})
		return examine(t, p), s
	}
	r, before := ask(t, linked.Without)
	finds(t, r, doctor.IDLink, "--contexts")
	r, after := ask(t, linked.Contexts)
	gone(t, r, doctor.IDLink)
	t.Logf("before: %v; after: %v", before, after)
	if after.evaluated*3 > before.evaluated*2 {
		t.Errorf("before: %v; after: %v", before, after)
	}
}

// TestDoctorSlidingWindow: Ollama before 0.30 reuses nothing of prompts to a model with a sliding
// window; later versions do.
func TestDoctorSlidingWindow(t *testing.T) {
	if !slices.Contains(realollama.Versions(), realollama.EraA) {
		return // the version is not among those to test
	}
	const gemma = "gen-gemma3-tiny"
	ask := func(version string) (doctor.Report, spent) {
		server := realollama.Start(t, realollama.Config{Version: version, Models: []string{gemma}})
		p := startProxy(t, server.URL())
		mark := server.Mark()
		for n := range 12 {
			mustPost(t, p.URL+"/api/chat", chatTo(t, gemma, 11, 300, nil, words(uint64(n), 10)))
		}
		_, evaluated := evaluations(t, server, mark, 12)
		return examine(t, p), spent{server.Loads(mark), evaluated}
	}
	r, before := ask(realollama.EraA)
	finds(t, r, doctor.IDSliding, "")
	r, after := ask(realollama.EraC)
	gone(t, r, doctor.IDSliding)
	t.Logf("before: %v; after: %v", before, after)
	if after.evaluated*2 > before.evaluated {
		t.Errorf("before: %v; after: %v", before, after)
	}
}
