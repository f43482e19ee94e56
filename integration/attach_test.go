package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/attach"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// generated is the answer to a request to /api/generate.
type generated struct {
	Response           string
	Context            json.RawMessage
	PromptEvalCount    int           `json:"prompt_eval_count"`
	EvalCount          int           `json:"eval_count"`
	TotalDuration      time.Duration `json:"total_duration"`
	LoadDuration       time.Duration `json:"load_duration"`
	PromptEvalDuration time.Duration `json:"prompt_eval_duration"`
	EvalDuration       time.Duration `json:"eval_duration"`
	DebugInfo          struct {
		RenderedTemplate string `json:"rendered_template"`
	} `json:"_debug_info"`
}

func (g generated) overhead() time.Duration {
	return g.TotalDuration - g.PromptEvalDuration - g.EvalDuration
}

func askGenerate(ctx context.Context, server *realollama.Server, body []byte) (g generated, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL()+"/api/generate", bytes.NewReader(body))
	if err != nil {
		return g, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return g, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return g, err
	}
	if res.StatusCode != http.StatusOK {
		return g, fmt.Errorf("%s %s", res.Status, text)
	}
	return g, json.Unmarshal(text, &g)
}

func mustGenerate(t testing.TB, server *realollama.Server, body []byte) generated {
	t.Helper()
	g, err := askGenerate(t.Context(), server, body)
	if err != nil {
		t.Fatalf("%.200s: %v", body, err)
	}
	return g
}

// attaching is an Attacher in front of a server, without a proxy.
type attaching struct {
	*attach.Attacher
	server   *realollama.Server
	renders  atomic.Int64
	outcomes chan string
}

// The longest that a test's models and texts need.
const attachContext = 16384

func newAttaching(t testing.TB, server *realollama.Server) *attaching {
	a := &attaching{server: server, outcomes: make(chan string, 1000)}
	a.Attacher = &attach.Attacher{
		Render: func(ctx context.Context, body []byte) (string, error) {
			a.renders.Add(1)
			g, err := askGenerate(ctx, server, body)
			if err == nil && g.DebugInfo.RenderedTemplate == "" {
				err = errors.New("nothing was rendered")
			}
			return g.DebugInfo.RenderedTemplate, err
		},
		ContextLength: func(string) int { return attachContext },
		Outcome:       func(_, outcome string) { a.outcomes <- outcome },
	}
	a.Init()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { // until the test ends
		defer close(ended)
		a.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return a
}

// answered tells the Attacher of an answer. The times are all alike, so that measuring never finds the form slower.
func answered(p *attach.Plan, g generated) {
	p.Answered(attach.Answer{Context: g.Context, PromptTokens: g.PromptEvalCount, AnswerTokens: g.EvalCount})
}

// learn sends requests of a group until it is trusted, and as many more as measuring takes.
func (a *attaching) learn(t testing.TB, model string, body func(n int) []byte) {
	t.Helper()
	for n := range 2 {
		answered(a.Plan(model, body(n)), mustGenerate(t, a.server, body(n)))
	}
	if outcome := <-a.outcomes; outcome != attach.Trusted {
		t.Fatalf("%s, want %s", outcome, attach.Trusted)
	}
	for n := 2; ; n++ {
		p := a.Plan(model, body(n))
		sent := body(n)
		if p.Body() != nil {
			sent = p.Body()
		}
		answered(p, mustGenerate(t, a.server, sent))
		for len(a.outcomes) > 0 {
			switch outcome := <-a.outcomes; outcome {
			case attach.Attached:
			case attach.NoSlower:
				return
			default:
				t.Fatalf("%s while measuring", outcome)
			}
		}
	}
}

// words are some text, another for each seed.
func words(seed uint64, n int) string {
	rnd := rand.New(rand.NewPCG(seed, 1))
	list := strings.Fields("the quick brown fox judges every candidate answer by a long rubric of twelve criteria with scores from one to five")
	var b strings.Builder
	for range n {
		b.WriteString(list[rnd.IntN(len(list))])
		b.WriteByte(' ')
	}
	return b.String()
}

func generateBody(t testing.TB, model, prompt, members string) []byte {
	t.Helper()
	quoted, err := json.Marshal(prompt)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Appendf(nil, `{"model":%q,"prompt":%s,"stream":false,"options":{"temperature":0,"seed":1,"num_predict":8,"num_ctx":%d}%s}`, model, quoted, attachContext, members)
}

// A group of requests, each sent as it came and with its stored context: the same answers, returned contexts and counts, and
// the model neither loaded anew nor held for another time. Beside it the naive form, which is another prompt.
func TestAttachContext(t *testing.T) {
	zero := 0
	type group struct {
		prompt  func(n int) string
		members string
	}
	rubric := group{func(n int) string { return words(1, 120) + "\n\nCandidate: " + words(uint64(100+n), 5) + "end" }, `,"keep_alive":"20m"`}
	system := group{func(n int) string { return words(uint64(100+n), 5) + "\n" }, `,"keep_alive":"20m","system":"` + words(2, 120) + `"`}
	characters := group{func(n int) string { return strings.Repeat("é語😀", 80) + words(uint64(100+n), 5) + "end" }, ""} // of several tokens
	// A model with a system prompt and messages of its own, which the pass-through template does not write.
	const made = "made"
	models := map[string]map[string]group{
		tiny:              {"rubric": rubric, "system": system, "characters": characters},
		made:              {"rubric": rubric, "system": system},
		"gen-gemma3-tiny": {"rubric": rubric}, // another template
	}
	for _, version := range realollama.Distinct() {
		// Without the host cache a prompt is never restored from another request than the one before it.
		server := realollama.Start(t, realollama.Config{Version: version, Models: []string{tiny, "gen-gemma3-tiny"}, CacheRAMMiB: &zero})
		mustPost(t, server.URL()+"/api/create", `{"model":"`+made+`","from":"`+tiny+`","system":"You grade.","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes?"}],"stream":false}`)
		for model := range models {
			t.Run(version+"/"+model, func(t *testing.T) {
				a := newAttaching(t, server)
				mustGenerate(t, server, generateBody(t, model, "hi", `,"keep_alive":"20m"`))
				loaded1 := server.Mark()
				for name, group := range models[model] {
					body := func(n int) []byte { return generateBody(t, model, group.prompt(n), group.members) }
					rendersBefore := a.renders.Load()
					a.learn(t, model, body)
					if n := a.renders.Load() - rendersBefore; n < 5 || n > 8 {
						t.Errorf("%s: %d renders, want 5, or up to 8 where a character is cut", name, n)
					}
					compared := 0
					for n := 100; compared < 3; n++ {
						p := a.Plan(model, body(n))
						if p == nil {
							t.Fatalf("%s: no plan for request %d", name, n)
						}
						if p.Body() == nil {
							continue // one that checks the template
						}
						compared++
						// The slot holds the same before both, so that both evaluate the same tokens in the same batches.
						mustGenerate(t, server, body(99))
						direct := mustGenerate(t, server, body(n))
						mustGenerate(t, server, body(99))
						with := mustGenerate(t, server, p.Body())
						if with.Response != direct.Response || with.Response == "" || string(with.Context) != string(direct.Context) || with.PromptEvalCount != direct.PromptEvalCount || with.EvalCount != direct.EvalCount {
							t.Errorf("%s, request %d: answered %q, %d and %d tokens, context %s\nwithout stored context %q, %d and %d tokens, context %s",
								name, n, with.Response, with.PromptEvalCount, with.EvalCount, with.Context, direct.Response, direct.PromptEvalCount, direct.EvalCount, direct.Context)
						}
						answered(p, with)
						if outcome := <-a.outcomes; outcome != attach.Attached {
							t.Errorf("%s, request %d: %s", name, n, outcome)
						}
					}
				}

				// The naive form: request 1's context with request 2.
				body := func(n int, members string) []byte {
					return generateBody(t, model, rubric.prompt(n), members)
				}
				first, direct := mustGenerate(t, server, body(1, "")), mustGenerate(t, server, body(2, ""))
				naive := mustGenerate(t, server, body(2, `,"context":`+string(first.Context)))
				if naive.PromptEvalCount < 2*direct.PromptEvalCount-20 || naive.Response == direct.Response {
					t.Errorf("the naive form has %d tokens and answers %q; the text alone has %d and %q", naive.PromptEvalCount, naive.Response, direct.PromptEvalCount, direct.Response)
				}

				if n := server.Loads(loaded1); n != 0 {
					t.Errorf("%d more loads", n)
				}
				eventually(t, "held as long as the clients asked for", func() bool {
					stays := slices.Collect(maps.Values(loaded(t, server.URL()))) // those of one file may be listed by either name
					return len(stays) > 0 && !slices.ContainsFunc(stays, func(d time.Duration) bool { return !about(d, 20*time.Minute) })
				})
			})
		}
	}
}

// BenchmarkAttachContext measures sending a group's requests as they come and with stored context, by turns, beside the naive
// form. Each iteration is one pair. Run it with -benchtime 40x; docs/attach-context.md has what it gave.
func BenchmarkAttachContext(b *testing.B) {
	zero := 0
	for _, version := range realollama.Distinct() {
		server := realollama.Start(b, realollama.Config{Version: version, Models: []string{tiny, "gen-llama-costly"}, CacheRAMMiB: &zero})
		for _, c := range []struct {
			model string
			words int
		}{{tiny, 250}, {tiny, 2000}, {"gen-llama-costly", 250}} {
			rubric := words(1, c.words)
			body := func(n int, members string) []byte {
				return generateBody(b, c.model, rubric+"\n\nCandidate: "+words(uint64(100+n), 12)+"end", members)
			}
			plain := func(n int) []byte { return body(n, "") }
			first := mustGenerate(b, server, plain(0))
			b.Run(fmt.Sprintf("%s/%s/%d-tokens", version, c.model, first.PromptEvalCount), func(b *testing.B) {
				a := newAttaching(b, server)
				a.learn(b, c.model, plain)
				var direct, with, naive []generated
				n := 1000
				for b.Loop() {
					var p *attach.Plan
					for p = nil; p == nil || p.Body() == nil; n++ {
						p = a.Plan(c.model, plain(n))
					}
					send := func(list *[]generated, sent []byte) {
						mustGenerate(b, server, plain(999)) // the slot holds the same before each
						*list = append(*list, mustGenerate(b, server, sent))
					}
					if n%2 == 0 {
						send(&direct, plain(n-1))
						send(&with, p.Body())
					} else {
						send(&with, p.Body())
						send(&direct, plain(n-1))
					}
					if len(naive) < 3 {
						send(&naive, body(n-1, `,"context":`+string(first.Context)))
					}
				}
				same := 0
				for i := range direct {
					if direct[i].Response == with[i].Response && string(direct[i].Context) == string(with[i].Context) && direct[i].PromptEvalCount == with[i].PromptEvalCount {
						same++
					}
				}
				b.ReportMetric(float64(same)/float64(len(direct))*100, "%same")
				report := func(name string, list []generated, of func(generated) time.Duration) {
					var times []time.Duration
					for _, g := range list {
						times = append(times, of(g))
					}
					slices.Sort(times)
					b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, name)
				}
				total := func(g generated) time.Duration { return g.TotalDuration }
				report("text-overhead-ms", direct, generated.overhead)
				report("text-total-ms", direct, total)
				report("attached-overhead-ms", with, generated.overhead)
				report("attached-total-ms", with, total)
				report("naive-overhead-ms", naive, generated.overhead)
				report("naive-total-ms", naive, total)
				b.ReportMetric(float64(naive[0].PromptEvalCount), "naive-tokens")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
