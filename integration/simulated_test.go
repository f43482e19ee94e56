package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// simError is by which fraction of the evaluated tokens the simulated server may differ from the
// real one.
const simError = 0.03

// sameWords are words that are one token each, with the preceding blank, in both the generated and
// the simulated models. So raw prompts of them have equally many tokens on both, and any difference
// is one in reuse.
var sameWords = strings.Fields("the and it of this is with so can in one to an what do be or that")

func samePrompt(seed uint64, n int) string {
	r := rand.New(rand.NewPCG(seed, 2))
	var b strings.Builder
	for range n {
		b.WriteByte(' ')
		b.WriteString(sameWords[r.IntN(len(sameWords))])
	}
	return b.String()
}

// simPlace is a server, real and simulated, and the workloads that are sent to both in order.
type simPlace struct {
	name      string
	config    realollama.Config
	workloads []simWorkload
}

// simWorkload sends one request at a time, to each model in turn if there are two (separated by a
// comma). ask returns the answer's text.
type simWorkload struct {
	name, models string
	run          func(ask func(prompt string, numCtx int) string)
}

// simModel is the simulated counterpart of a generated model, as fast as possible.
func simModel(name string) ollamasim.Model {
	m := ollamasim.Model{Name: name, LoadTime: time.Millisecond, PromptRate: 1e7, AnswerRate: 1e6}
	const keyAndValue, half = 2, 2
	switch name {
	case "gen-llama-tiny", "gen-llama-tiny-b":
		m.TokenBytes = 2 * 32 * keyAndValue * half
	case "gen-gemma3-tiny":
		m.Family, m.Window, m.TokenBytes, m.WindowTokenBytes = "gemma3", simWindow, 1*32*keyAndValue*half, 5*32*keyAndValue*half
	}
	return m
}

// simWindow is the generated gemma3's sliding window, in tokens.
const simWindow = 512

func simPlaces(version string) []simPlace {
	const tiny, other, sliding = "gen-llama-tiny", "gen-llama-tiny-b", "gen-gemma3-tiny"
	samePrefix := func(prefix, own, n int) func(func(string, int) string) {
		return func(ask func(string, int) string) {
			for i := range n {
				ask(samePrompt(1, prefix)+samePrompt(uint64(100+i), own), 0)
			}
		}
	}
	inTurn := func(prefixes, rounds, length, own int) func(func(string, int) string) {
		return func(ask func(string, int) string) {
			for i := range rounds {
				for p := range prefixes {
					ask(samePrompt(uint64(10+p), length)+samePrompt(uint64(1000+100*p+i), own), 0)
				}
			}
		}
	}
	chats := func(ask func(string, int) string) {
		var text [2]string
		for turn := range 5 {
			for c := range text {
				// Otherwise the answer would continue a word.
				text[c] += samePrompt(uint64(5000+10*c+turn), 100) + "\n"
				text[c] += ask(text[c], 0)
			}
		}
	}
	oneChat := func(ask func(string, int) string) {
		text := ""
		for turn := range 6 {
			text += samePrompt(uint64(6000+turn), 100) + "\n"
			text += ask(text, 0)
		}
	}
	numCtx := func(ask func(string, int) string) {
		for i := range 6 {
			ask(samePrompt(7, 200)+samePrompt(uint64(7000+i), 20), []int{2048, 3072}[i%2])
		}
	}
	// A prompt that was evicted by another one is restored with its window only.
	window := func(length int) func(func(string, int) string) {
		return func(ask func(string, int) string) {
			for i := range 8 {
				if i%3 == 2 {
					ask(samePrompt(uint64(8000+i), 400), 0)
				}
				ask(samePrompt(8, length)+samePrompt(uint64(8100+i), 50), 0)
			}
		}
	}
	places := []simPlace{
		{"one slot", realollama.Config{Models: []string{tiny, sliding}}, []simWorkload{
			{"one prefix", tiny, samePrefix(400, 20, 10)},
			{"prefixes in turn", tiny, inTurn(4, 4, 300, 20)},
			{"one chat", tiny, oneChat},
			{"two chats", tiny, chats},
			{"two num_ctx in turn", tiny, numCtx},
			{"window, one prefix", sliding, samePrefix(1500, 50, 6)},
			{"window, a long prefix put aside", sliding, window(1500)},
			{"window, a short prefix put aside", sliding, window(400)},
			{"window, one chat", sliding, oneChat},
		}},
		{"two slots", realollama.Config{Models: []string{tiny}, Parallel: 2}, []simWorkload{
			{"one prefix", tiny, samePrefix(400, 20, 6)},
			{"scripts in turn", tiny, inTurn(2, 4, 300, 30)},
			{"more scripts than slots", tiny, inTurn(3, 4, 310, 30)},
			{"two chats", tiny, chats},
		}},
	}
	places = append(places, simPlace{"one model at a time", realollama.Config{Models: []string{tiny, other}, MaxLoaded: 1}, []simWorkload{
		{"two models in turn", tiny + "," + other, samePrefix(300, 20, 5)},
	}})
	if version != realollama.EraA { // era A has no host cache
		places = append(places,
			simPlace{"no host cache", realollama.Config{Models: []string{tiny}, CacheRAMMiB: new(0)}, []simWorkload{
				{"prefixes in turn", tiny, inTurn(4, 3, 300, 20)},
				{"two chats", tiny, chats},
			}},
			simPlace{"small host cache", realollama.Config{Models: []string{tiny}, CacheRAMMiB: new(1)}, []simWorkload{ // holds two of these prompts
				{"two prefixes in turn", tiny, inTurn(2, 3, 1500, 20)},
				{"prefixes in turn", tiny, inTurn(4, 3, 1510, 20)},
			}})
	}
	for i := range places {
		places[i].config.Version = version
	}
	return places
}

// TestSimulated compares the simulated server with the real one: the tokens that they evaluate, and
// the loads, for the same requests.
func TestSimulated(t *testing.T) {
	for _, version := range realollama.Distinct() {
		t.Run(version, func(t *testing.T) {
			var table strings.Builder
			fmt.Fprintf(&table, "%-50s %8s %8s %9s %9s %7s %7s\n", "ollama "+version, "requests", "tokens", "evaluated", "simulated", "differs", "loads")
			for _, p := range simPlaces(version) {
				t.Run(p.name, func(t *testing.T) {
					real := realollama.Start(t, p.config)
					c := ollamasim.Config{Version: version, Parallel: p.config.Parallel, MaxLoaded: p.config.MaxLoaded, CacheRAMMiB: p.config.CacheRAMMiB}
					for _, name := range p.config.Models {
						c.Models = append(c.Models, simModel(name))
					}
					sim, err := ollamasim.New(c)
					if err != nil {
						t.Fatal(err)
					}
					for _, w := range p.workloads {
						table.WriteString(compareSimulated(t, real, sim, p.name, w))
					}
				})
			}
			t.Logf("the real server's log and the simulated server\n%s", table.String())
		})
	}
}

// compareSimulated sends a workload to both, and returns a row of the table.
func compareSimulated(t *testing.T, real *realollama.Server, sim *ollamasim.Server, place string, w simWorkload) string {
	t.Helper()
	models := strings.Split(w.models, ",")
	body := func(n int, prompt string, numCtx int) []byte {
		options := map[string]any{"temperature": 0, "num_predict": 4}
		if numCtx > 0 {
			options["num_ctx"] = numCtx
		}
		text, err := json.Marshal(map[string]any{"model": models[n%len(models)], "prompt": prompt, "raw": true, "stream": false, "options": options})
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	answer := func(status int, text []byte) string {
		var a struct{ Response string }
		if err := json.Unmarshal(text, &a); status != 200 || err != nil {
			t.Fatalf("%s: %d %s", w.name, status, text)
		}
		return a.Response
	}
	mark, requests := real.Mark(), 0
	w.run(func(prompt string, numCtx int) string {
		status, _, text := post(t, real.URL()+"/api/generate", string(body(requests, prompt, numCtx)))
		requests++
		// The next request may reload the model, which ends an engine that may not have logged yet.
		if _, err := real.WaitEvaluations(t.Context(), mark, requests); err != nil {
			t.Fatal(err)
		}
		return answer(status, []byte(text))
	})
	log := real.Evaluations(mark)
	simMark, n := sim.Mark(), 0
	w.run(func(prompt string, numCtx int) string {
		rec := httptest.NewRecorder()
		sim.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "POST", "/api/generate", bytes.NewReader(body(n, prompt, numCtx))))
		n++
		return answer(rec.Code, rec.Body.Bytes())
	})
	simLog := sim.Evaluations(simMark)
	if len(log) != requests || len(simLog) != requests {
		t.Fatalf("%s: %d requests, %d in the log, %d simulated", w.name, requests, len(log), len(simLog))
	}
	total, evaluated, simulated := 0, 0, 0
	pairs := ""
	for i, e := range log {
		total += e.Total
		evaluated += e.Evaluated
		simulated += simLog[i].Evaluated
		pairs += fmt.Sprintf(" %d/%d:%d/%d", e.Evaluated, e.Total, simLog[i].Evaluated, simLog[i].Total)
	}
	loads, simLoads := real.Loads(mark), sim.Loads(simMark)
	differs := float64(simulated-evaluated) / float64(evaluated)
	if differs > simError || differs < -simError {
		t.Errorf("%s: %d tokens evaluated, %d simulated: %+.1f%%, want %.0f%% at most; request by request (evaluated/of, simulated)%s",
			w.name, evaluated, simulated, 100*differs, 100*simError, pairs)
	}
	if loads != simLoads {
		t.Errorf("%s: %d loads, %d simulated", w.name, loads, simLoads)
	}
	return fmt.Sprintf("%-50s %8d %8d %9d %9d %+6.1f%% %3d %3d\n", place+", "+w.name, requests, total, evaluated, simulated, 100*differs, loads, simLoads)
}
