package ollamasim

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama/ollama/api"
)

func ps(t *testing.T, s *Server) string {
	t.Helper()
	var b strings.Builder
	for _, m := range s.ps().Models {
		fmt.Fprintf(&b, "%s %d %v;", m.Name, m.ContextLength, m.ExpiresAt.Sub(s.clock.Now()).Round(time.Second))
	}
	return b.String()
}

const load = `{"model":"m","keep_alive":`

func TestKeepAlive(t *testing.T) {
	for _, c := range []struct {
		name, bodies string // one a line; a number of seconds to wait, or a request
		server, want string
		expired      int
	}{
		{name: "the default", bodies: `{"model":"m"}`, want: "m:latest 4096 5m0s;"},
		{name: "it runs", bodies: "{\"model\":\"m\"}\n299", want: "m:latest 4096 1s;"},
		{name: "it has passed", bodies: "{\"model\":\"m\"}\n300", expired: 1},
		{name: "a request renews it", bodies: "{\"model\":\"m\"}\n299\n{\"model\":\"m\"}\n299", want: "m:latest 4096 1s;"},
		{name: "the server's own", server: "60", bodies: `{"model":"m"}`, want: "m:latest 4096 1m0s;"},
		{name: "seconds", bodies: load + `90}`, want: "m:latest 4096 1m30s;"},
		{name: "a duration", bodies: load + `"24h"}`, want: "m:latest 4096 24h0m0s;"},
		{name: "absent it stays", bodies: load + `"24h"}` + "\n3600\n" + `{"model":"m"}`, want: "m:latest 4096 24h0m0s;"},
		{name: "shorter", bodies: load + `"24h"}` + "\n" + load + `60}`, want: "m:latest 4096 1m0s;"},
		{name: "for ever", bodies: load + `-1}` + "\n9000000", want: "m:latest 4096 2562047h47m17s;"},
		{name: "0 unloads", bodies: "{\"model\":\"m\"}\n" + load + `0}`},
		{name: "0 after an answer", bodies: `{"model":"m","prompt":"a","stream":false,"keep_alive":0}`},
		{name: "a name without case and tag", bodies: `{"model":"M:LATEST"}`, want: "m:latest 4096 5m0s;"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, Config{KeepAlive: c.server, Models: []Model{{Name: "m"}}})
				for line := range strings.Lines(c.bodies) {
					line = strings.TrimSpace(line)
					var seconds int
					if json.Unmarshal([]byte(line), &seconds) == nil {
						time.Sleep(time.Duration(seconds) * time.Second)
						continue
					}
					ask(t, s, "/api/generate", line)
				}
				got := ps(t, s)
				if c.name == "for ever" {
					got, c.want = got[:len("m:latest 4096 2")], c.want[:len("m:latest 4096 2")]
				}
				if got != c.want {
					t.Errorf("loaded %q, want %q", got, c.want)
				}
				if st := s.Stats(); st.Expired != c.expired {
					t.Errorf("%d expired, want %d", st.Expired, c.expired)
				}
			})
		})
	}
}

// TestReload: which options reload a model.
func TestReload(t *testing.T) {
	for _, c := range []struct {
		options string
		version string
		loads   int
	}{
		{options: `"options":{}`, loads: 1},
		{options: `"options":{"num_ctx":4096}`, loads: 1}, // the default
		{options: `"options":{"num_ctx":2048}`, loads: 2},
		{options: `"options":{"num_batch":256}`, loads: 2},
		{options: `"options":{"num_gpu":-1}`, loads: 1},
		{options: `"options":{"num_gpu":10}`, loads: 2},
		{options: `"options":{"num_thread":4}`, loads: 2},
		{options: `"options":{"main_gpu":1}`, loads: 2},
		{options: `"options":{"use_mmap":false}`, loads: 2},
		{options: `"options":{"temperature":0,"seed":1,"top_p":0.5,"num_predict":1,"stop":["x"]}`, loads: 1},
		{options: `"shift":false`, loads: 2},
		{options: `"shift":true`, loads: 1},
		{options: `"shift":false`, version: "0.24.0", loads: 1},
	} {
		t.Run(c.version+c.options, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, Config{Version: c.version, Models: []Model{{Name: "m"}}})
				ask(t, s, "/api/generate", `{"model":"m","prompt":"a","stream":false}`)
				mark := s.Mark()
				r := ask(t, s, "/api/generate", `{"model":"m","prompt":"a","stream":false,`+c.options+`}`)
				if got := 1 + s.Loads(mark); got != c.loads {
					t.Errorf("%d loads, want %d", got, c.loads)
				}
				if loaded := r.LoadDuration >= 5*time.Second; loaded != (c.loads == 2) {
					t.Errorf("load_duration %v with %d loads", r.LoadDuration, c.loads)
				}
				if st := s.Stats(); st.Reloads != c.loads-1 || st.Evictions != 0 {
					t.Errorf("%d reloads, %d evictions", st.Reloads, st.Evictions)
				}
			})
		})
	}
}

func TestEviction(t *testing.T) {
	for _, c := range []struct {
		name   string
		config Config
		asks   string // models in turn
		want   string
		evicts int
	}{
		{name: "there is room", asks: "abc", want: "abc"},
		{name: "three at most", asks: "abcd", want: "bcd", evicts: 1},
		{name: "one at most", config: Config{MaxLoaded: 1}, asks: "abab", want: "b", evicts: 3},
		{name: "memory for two", config: Config{MemoryMiB: 11000}, asks: "abc", want: "bc", evicts: 1},
		{name: "alone it may be too large", config: Config{MemoryMiB: 3000}, asks: "ab", want: "b", evicts: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for i := range 4 {
					c.config.Models = append(c.config.Models, Model{Name: string(rune('a' + i))})
				}
				s := start(t, c.config)
				for _, m := range c.asks {
					ask(t, s, "/api/generate", fmt.Sprintf(`{"model":"%c","prompt":"x","stream":false}`, m))
				}
				got := ""
				for _, run := range s.loaded {
					got += run.model.Name[:1]
				}
				if st := s.Stats(); got != c.want || st.Evictions != c.evicts || st.Loads != len(c.asks) {
					t.Errorf("loaded %q after %d evictions and %d loads, want %q after %d and %d", got, st.Evictions, st.Loads, c.want, c.evicts, len(c.asks))
				}
			})
		})
	}
}

// TestHeadBlocks: requests for models that are not loaded wait behind the first that has to wait;
// requests for a loaded model do not.
func TestHeadBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{MaxLoaded: 2, Models: []Model{{Name: "a"}, {Name: "b"}, {Name: "c"}}})
		began := time.Now()
		var mu sync.Mutex
		ended := map[string]time.Duration{}
		var wg sync.WaitGroup
		send := func(name, model, more string, tokens int) {
			wg.Go(func() {
				status, text := post(t.Context(), s, "/api/generate", fmt.Sprintf(`{"model":%q,"prompt":"x","stream":false,"options":{"num_predict":%d%s}}`, model, tokens, more))
				if status != http.StatusOK {
					t.Errorf("%s: %d %s", name, status, text)
				}
				mu.Lock()
				defer mu.Unlock()
				ended[name] = time.Since(began).Round(time.Second)
			})
			time.Sleep(10 * time.Millisecond)
		}
		send("first", "a", "", 1000) // loads for 5 s and answers for 20
		// Has to wait for it: 5 s of loading, 1 of the answer.
		send("other options", "a", `,"num_ctx":2048`, 50)
		send("could be loaded", "b", "", 50) // but waits behind the other
		time.Sleep(6 * time.Second)          // the first is being answered
		send("as loaded", "a", "", 50)       // needs only a slot
		if st := s.Stats().Now; st.Pending != 2 || st.Queued != 1 || st.Slots != 1 {
			t.Errorf("%+v", st)
		}
		wg.Wait()
		for name, want := range map[string]time.Duration{
			"first": 25 * time.Second, "as loaded": 26 * time.Second, "other options": 32 * time.Second, "could be loaded": 37 * time.Second,
		} {
			if got := ended[name]; got != want {
				t.Errorf("%s: answered after %v, want %v", name, got, want)
			}
		}
	})
}

// TestKeptAlive: a request with keep_alive to a model that is about to be unloaded keeps it, and
// the request that waits for the unload continues to wait. Measured with 0.34.1: with "1h" the
// other request had no answer after 45 s, and without keep_alive it had one after 0.9 s.
func TestKeptAlive(t *testing.T) {
	for keepAlive, want := range map[string]time.Duration{"": 32 * time.Second, `"keep_alive":"1h"`: 26*time.Second + time.Hour + 6*time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, Config{Models: []Model{{Name: "m"}}})
			began := time.Now()
			var wg sync.WaitGroup
			wg.Go(func() { ask(t, s, "/api/generate", raw("a", 1000, "")) })
			time.Sleep(6 * time.Second)
			var took time.Duration
			wg.Go(func() {
				ask(t, s, "/api/generate", `{"model":"m","prompt":"b","stream":false,"options":{"num_ctx":2048,"num_predict":50}}`)
				took = time.Since(began).Round(time.Second)
			})
			time.Sleep(time.Second)
			wg.Go(func() { ask(t, s, "/api/generate", raw("a", 50, keepAlive)) })
			wg.Wait()
			if took != want {
				t.Errorf("%q: answered after %v, want %v", keepAlive, took, want)
			}
		})
	}
}

func TestQueueIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{MaxQueue: 2, Models: []Model{{Name: "m"}}})
		var wg sync.WaitGroup
		var mu sync.Mutex
		statuses := map[int]int{}
		var refused string
		for range 5 {
			wg.Go(func() {
				status, text := post(t.Context(), s, "/api/chat", `{"model":"m","stream":false,"messages":[{"role":"user","content":"x"}]}`)
				mu.Lock()
				defer mu.Unlock()
				if statuses[status]++; status != http.StatusOK {
					refused = text
				}
			})
		}
		wg.Wait()
		if statuses[200] != 3 || statuses[503] != 2 {
			t.Errorf("statuses %v, want 3 × 200 and 2 × 503", statuses)
		}
		if want := `{"error":"server busy, please try again.  maximum pending requests exceeded"}`; refused != want {
			t.Errorf("refused with %s", refused)
		}
		if st := s.Stats(); st.Rejected != 2 || st.Answered != 3 || st.Requests != 5 {
			t.Errorf("%+v", st)
		}
	})
}

// TestCancel: a client that leaves frees the slot at any stage; the slot keeps the computed tokens.
func TestCancel(t *testing.T) {
	for _, c := range []struct {
		name      string
		after     time.Duration // the model is loaded after 5 s, the prompt evaluated after 6, the answer ended after 26
		second    time.Duration // when the next one is answered
		evaluated int64
	}{
		// It is reloaded.
		{"while it loads", time.Second, 6500 * time.Millisecond, 500},
		{"in its evaluation", 5300 * time.Millisecond, 6012 * time.Millisecond, 512 + 500}, // after its first batch
		{"in its answer", 10 * time.Second, 10520 * time.Millisecond, 1000 + 500},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, Config{Models: []Model{{Name: "m"}}})
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), c.after)
				defer cancel()
				var wg sync.WaitGroup
				wg.Go(func() {
					if status, _ := post(ctx, s, "/api/generate", raw(words(1, 1000), 1000, "")); status != 0 {
						t.Errorf("status %d for one that left", status)
					}
				})
				time.Sleep(10 * time.Millisecond)
				ask(t, s, "/api/generate", raw(words(2, 500), 1, ""))
				took := time.Since(began)
				wg.Wait()
				if d := took - c.second; d < -20*time.Millisecond || d > 20*time.Millisecond {
					t.Errorf("the next was answered after %v, want about %v", took, c.second)
				}
				st := s.Stats()
				if st.Evaluated != c.evaluated || st.Cancelled != 1 || st.Answered != 1 || st.Now.Slots != 0 {
					t.Errorf("%+v, want %d evaluated", st, c.evaluated)
				}
			})
		})
	}
}

// network serves s in memory. Streams reach the client as they are written.
func network(t *testing.T, s *Server) *http.Client {
	l := Listen()
	server := &http.Server{Handler: s}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.Serve(l)
	}()
	transport := &http.Transport{DialContext: l.DialContext}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		server.Close()
		<-ended
	})
	return &http.Client{Transport: transport}
}

func TestStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{Models: []Model{{Name: "m"}}})
		client := network(t, s)
		ask(t, s, "/api/chat", `{"model":"m","stream":false,"messages":[{"role":"user","content":"x"}],"options":{"num_predict":5}}`)
		began := time.Now()
		res, err := client.Post("http://sim/api/chat", "", strings.NewReader(`{"model":"m","messages":[{"role":"user","content":"x"}],"options":{"num_predict":5}}`))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if got := res.Header.Get("Content-Type"); got != "application/x-ndjson" {
			t.Errorf("Content-Type %q", got)
		}
		var times []time.Duration
		var last api.ChatResponse
		text := ""
		for lines := bufio.NewScanner(res.Body); lines.Scan(); {
			last = api.ChatResponse{}
			if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
				t.Fatal(err)
			}
			text += last.Message.Content
			times = append(times, time.Since(began))
		}
		if len(times) != 6 || times[4]-times[0] != 80*time.Millisecond {
			t.Errorf("lines came at %v, want 6, the tokens 20 ms apart", times)
		}
		if !last.Done || last.DoneReason != "length" || last.EvalCount != 5 || last.PromptEvalCount == 0 || last.PromptEvalCachedCount == nil {
			t.Errorf("the last line: %+v", last)
		}
		if *last.PromptEvalCachedCount != last.PromptEvalCount-1 {
			t.Errorf("%d of %d reused", *last.PromptEvalCachedCount, last.PromptEvalCount)
		}
		var one api.ChatResponse
		status, answer := post(t.Context(), s, "/api/chat", `{"model":"m","stream":false,"messages":[{"role":"user","content":"x"}],"options":{"num_predict":5}}`)
		if json.Unmarshal([]byte(answer), &one) != nil || status != 200 || one.Message.Content != text || text == "" {
			t.Errorf("in one piece it is %q, streamed %q", one.Message.Content, text)
		}
	})
}

func TestOpenAI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{Models: []Model{{Name: "m", LoadTime: time.Second}}})
		_, stream := post(t.Context(), s, "/v1/chat/completions", `{"model":"m","stream":true,"stream_options":{"include_usage":true},"max_tokens":2,"messages":[{"role":"user","content":"x"}]}`)
		_, whole := post(t.Context(), s, "/v1/chat/completions", `{"model":"m","max_tokens":2,"messages":[{"role":"user","content":"x"}]}`)
		var answer struct {
			Choices []struct{ Message struct{ Content string } }
			Usage   struct {
				Prompt  int `json:"prompt_tokens"`
				Details struct {
					Cached int `json:"cached_tokens"`
				} `json:"prompt_tokens_details"`
				Completion int `json:"completion_tokens"`
			}
		}
		if err := json.Unmarshal([]byte(whole), &answer); err != nil {
			t.Fatal(err)
		}
		var text string
		events := strings.Split(strings.TrimSpace(stream), "\n\n")
		for _, e := range events[:len(events)-1] {
			var chunk struct {
				Choices []struct{ Delta struct{ Content string } }
			}
			if err := json.Unmarshal([]byte(strings.TrimPrefix(e, "data: ")), &chunk); err != nil {
				t.Fatal(err)
			}
			for _, c := range chunk.Choices {
				text += c.Delta.Content
			}
		}
		if len(events) != 5 || events[4] != "data: [DONE]" || !strings.Contains(events[3], `"usage":{"prompt_tokens":`) || !strings.Contains(events[2], `"finish_reason":"length"`) {
			t.Errorf("events:\n%s", stream)
		}
		if u := answer.Usage; answer.Choices[0].Message.Content != text || u.Completion != 2 || u.Details.Cached != u.Prompt-1 {
			t.Errorf("streamed %q, in one piece: %s", text, whole)
		}
		if status, text := post(t.Context(), s, "/v1/completions", `{"model":"m","prompt":"x","max_tokens":2}`); status != 200 || !strings.Contains(text, `"completion_tokens":2`) {
			t.Errorf("%d %s", status, text)
		}
		if status, text := post(t.Context(), s, "/v1/chat/completions", `{"model":"x","messages":[{"role":"user","content":"x"}]}`); status != 404 || !strings.Contains(text, `"type":"not_found_error"`) {
			t.Errorf("%d %s", status, text)
		}
	})
}

func TestCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{Models: []Model{{Name: "m"}}})
		client := network(t, s)
		ask(t, s, "/api/generate", raw(words(1, 100), 1, ""))
		res, err := client.Post("http://sim/api/generate", "", strings.NewReader(strings.Replace(raw(words(1, 100), 1000, ""), `"stream":false,`, "", 1)))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		go func() {
			time.Sleep(990 * time.Millisecond)
			s.Crash()
		}()
		n := 0
		lines := bufio.NewScanner(res.Body)
		for lines.Scan() {
			n++
		}
		if lines.Err() == nil || n != 50 {
			t.Errorf("%d lines came and then %v, want 50 and an error", n, lines.Err())
		}
		if status, _ := post(t.Context(), s, "/api/version", ""); status != 0 {
			t.Errorf("a server that is down answers %d", status)
		}
		s.Restart()
		mark := s.Mark()
		r := ask(t, s, "/api/generate", raw(words(1, 100), 1, ""))
		if s.Loads(mark) != 1 || *r.PromptEvalCachedCount != 0 {
			t.Errorf("after the restart %d loads, %d tokens reused: want 1 and 0", s.Loads(mark), *r.PromptEvalCachedCount)
		}
	})
}

func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{Models: []Model{{Name: "m"}}})
		for _, c := range []struct {
			fault  *Fault
			stream bool
			status int
			lines  int
			end    string
		}{
			{nil, true, 200, 11, `"eval_duration":180000000}`},
			{&Fault{Message: "no"}, true, 500, 1, `{"error":"no"}`},
			{&Fault{Status: 400, Message: "no"}, false, 400, 1, `{"error":"no"}`},
			{&Fault{After: 3, Message: "no"}, true, 200, 4, `{"error":"no"}`},
			{&Fault{After: 3, Message: "no"}, false, 500, 1, `{"error":"no"}`},
			{&Fault{Break: true}, true, 0, 0, ""},
			{&Fault{After: 3, Break: true}, true, 0, 3, `"done":false}`},
		} {
			s.SetFaults(func(r FaultRequest) *Fault {
				if r.Path != "/api/generate" || r.Model != "m" || !strings.Contains(r.Prompt, "hello") {
					t.Errorf("%+v", r)
				}
				return c.fault
			})
			status, text := post(t.Context(), s, "/api/generate", fmt.Sprintf(`{"model":"m","prompt":"hello","stream":%v,"options":{"num_predict":10}}`, c.stream))
			lines := 0
			for range strings.Lines(text) {
				lines++
			}
			if status != c.status || lines != c.lines || !strings.HasSuffix(strings.TrimSpace(text), c.end) {
				t.Errorf("%+v: %d\n%s", c.fault, status, text)
			}
		}
		if st := s.Stats(); st.Failed != 6 || st.Answered != 1 || st.Now.Slots != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestAnswers has the requests that do not generate an answer, and those that fail.
func TestAnswers(t *testing.T) {
	s := start(t, Config{Models: []Model{{Name: "m", LoadTime: 1}, {Name: "e", Embedding: true, LoadTime: 1, PromptRate: 1e9}}})
	client := network(t, s)
	long := words(1, 5000)
	for _, c := range []struct {
		method, path, body string
		status             int
		contains           string
	}{
		{"GET", "/", "", 200, "Ollama is running"},
		{"HEAD", "/", "", 200, ""},
		{"GET", "/api/version", "", 200, `{"version":"0.34.1"}`},
		{"GET", "/api/tags", "", 200, `"name":"m:latest"`},
		{"GET", "/v1/models", "", 200, `"id":"m:latest"`},
		{"GET", "/api/ps", "", 200, `{"models":[]}`},
		{"POST", "/api/show", `{"model":"m"}`, 200, `"capabilities":["completion"]`},
		{"POST", "/api/show", `{"model":"x"}`, 404, `{"error":"model 'x' not found"}`},
		{"POST", "/api/chat", `{"model":"x"}`, 404, `{"error":"model 'x' not found"}`},
		{"POST", "/api/chat", ``, 400, `{"error":"missing request body"}`},
		{"POST", "/api/chat", `{"model":`, 400, `{"error":"unexpected end of JSON input"}`},
		{"POST", "/api/chat", `{"model":"m"}`, 200, `"done":true,"done_reason":"load"`},
		{"POST", "/api/chat", `{"model":"m","keep_alive":0}`, 200, `"done_reason":"unload"`},
		{"POST", "/api/chat", `{"model":"e","messages":[{"role":"user","content":"x"}]}`, 400, `does not support chat`},
		{"POST", "/api/generate", `{"model":"m","keep_alive":"300"}`, 400, `missing unit in duration`},
		{"POST", "/api/generate", `{"model":"m","options":{"num_ctx":"x"}}`, 500, `must be of type integer`},
		{"POST", "/api/generate", `{"model":"m","raw":true,"system":"x","prompt":"y"}`, 400, `raw mode does not support`},
		{"POST", "/api/generate", `{"model":"m","prompt":"hello","_debug_render_only":true}`, 200, `"rendered_template":"\u003c|im_start|\u003euser\nhello\u003c|im_end|\u003e\n\u003c|im_start|\u003eassistant\n"`},
		{"POST", "/api/generate", `{"model":"m","raw":true,"stream":false,"options":{"num_predict":1},"prompt":"` + long + `"}`, 200, `"prompt_eval_count":2050`},
		{"POST", "/api/generate", `{"model":"m","raw":true,"stream":false,"truncate":false,"prompt":"` + long + `"}`, 400, `the prompt is longer than the context length`},
		{"POST", "/api/embed", `{"model":"e","input":["a b","c"]}`, 200, `"prompt_eval_count":3`},
		{"POST", "/api/embed", `{"model":"m","input":"a"}`, 501, `does not support embeddings`},
		{"POST", "/v1/embeddings", `{"model":"e","input":"a"}`, 200, `"object":"embedding"`},
		{"GET", "/api/chat", "", 405, ""},
		{"POST", "/api/none", "", 404, ""},
	} {
		req, _ := http.NewRequest(c.method, "http://sim"+c.path, strings.NewReader(c.body))
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		lines := bufio.NewReader(res.Body)
		lines.WriteTo(&b)
		res.Body.Close()
		if got := b.String(); res.StatusCode != c.status || !strings.Contains(got, c.contains) {
			t.Errorf("%s %s %.100s: %d %.300s, want %d and %s", c.method, c.path, c.body, res.StatusCode, got, c.status, c.contains)
		}
	}
}

// TestEmbeddingEraA: Ollama's own runner made embeddings with any model.
func TestEmbeddingEraA(t *testing.T) {
	s := start(t, Config{Version: "0.24.0", Models: []Model{{Name: "m", LoadTime: 1, PromptRate: 1e9}}})
	if status, text := post(t.Context(), s, "/api/embed", `{"model":"m","input":"a"}`); status != 200 {
		t.Errorf("%d %s", status, text)
	}
}

func TestNew(t *testing.T) {
	model := []Model{{Name: "m"}}
	for want, c := range map[string]Config{
		`version "1.0" is not known`: {Version: "1.0", Models: model},
		`keep_alive "x" is neither`:  {KeepAlive: "x", Models: model},
		"needs a model":              {},
		"model 2 of":                 {Models: []Model{{Name: "m"}, {}}},
	} {
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// TestContext: the tokens of an answer, sent back, precede the next prompt.
func TestContext(t *testing.T) {
	s := start(t, Config{Models: []Model{{Name: "m", LoadTime: 1, PromptRate: 1e9, AnswerRate: 1e9}}})
	one := ask(t, s, "/api/generate", `{"model":"m","prompt":"héllo","stream":false,"options":{"num_predict":3}}`)
	context, _ := json.Marshal(one.Context)
	two := ask(t, s, "/api/generate", `{"model":"m","prompt":"again","stream":false,"_debug_render_only":true,"context":`+string(context)+`}`)
	want := "<|im_start|>user\nhéllo<|im_end|>\n<|im_start|>assistant\n" + one.Response + "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
	if got := two.DebugInfo.RenderedTemplate; got != want {
		t.Errorf("rendered %q, want %q", got, want)
	}
	three := ask(t, s, "/api/generate", `{"model":"m","prompt":"again","stream":false,"context":`+string(context)+`}`)
	// The slot has all but the answer's last token.
	if got, want := *three.PromptEvalCachedCount, one.PromptEvalCount+one.EvalCount-1; got != want {
		t.Errorf("%d tokens reused, want %d", got, want)
	}
}

// TestProperties sends random requests and checks invariants.
func TestProperties(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			ram := []int{0, 4, 8192, -1}[rng.IntN(4)]
			slots := 1 + rng.IntN(4)
			s := start(t, Config{
				Version: []string{"0.24.0", "0.33.0", "0.34.1"}[rng.IntN(3)], Parallel: slots, MaxLoaded: 1 + rng.IntN(2), MaxQueue: 1 + rng.IntN(20),
				CacheRAMMiB: &ram, Models: []Model{{Name: "a"}, {Name: "b", Window: 64, WindowTokenBytes: 1 << 10}, {Name: "c", Embedding: true}},
			})
			var mu sync.Mutex
			answers := map[string]string{}
			var prompt, cached, made int
			var wg sync.WaitGroup
			for c := range 12 {
				seed := rng.Uint64()
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(seed, uint64(c)))
					for range 12 {
						text := words(rng.IntN(6), 20+rng.IntN(3)*100) + words(100+rng.IntN(6), 1+rng.IntN(600))
						body := fmt.Sprintf(`{"model":"%c","raw":true,"prompt":%q,"stream":%v,"options":{"num_predict":%d,"num_ctx":%d}%s}`,
							"ab"[rng.IntN(2)], text, rng.IntN(2) == 0, rng.IntN(30), 2048*(1+rng.IntN(2)), []string{"", `,"keep_alive":1`, `,"keep_alive":0`}[rng.IntN(3)])
						ctx, cancel := t.Context(), func() {}
						if rng.IntN(4) == 0 {
							ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(8000))*time.Millisecond)
						}
						status, answer := post(ctx, s, "/api/generate", body)
						cancel()
						if status == 200 {
							whole, last := "", api.GenerateResponse{}
							for line := range strings.Lines(answer) {
								last = api.GenerateResponse{}
								if err := json.Unmarshal([]byte(line), &last); err != nil {
									t.Error(err)
								}
								whole += last.Response
							}
							if last.Done { // otherwise the client had left during the answer
								key := fmt.Sprint(last.Model, text, last.EvalCount)
								mu.Lock()
								if before, ok := answers[key]; ok && before != whole {
									t.Errorf("%q and %q to one prompt", before, whole)
								}
								answers[key] = whole
								prompt += last.PromptEvalCount
								made += last.EvalCount
								if last.PromptEvalCachedCount != nil {
									cached += *last.PromptEvalCachedCount
								}
								mu.Unlock()
								if last.TotalDuration < last.LoadDuration+last.PromptEvalDuration+last.EvalDuration-4*time.Microsecond {
									t.Errorf("%+v", last.Metrics)
								}
							}
						}
						check(t, s, slots)
						time.Sleep(time.Duration(rng.IntN(3000)) * time.Millisecond)
					}
				})
			}
			wg.Wait()
			// Of the bubble's clock: the slot of a client that left is free after its batch.
			time.Sleep(10 * time.Second)
			st := s.Stats()
			evaluated, reused := 0, 0
			for _, e := range s.Evaluations(Mark{}) {
				if e.Evaluated < 1 || e.Evaluated+e.Reused != e.Total {
					t.Errorf("%+v", e)
				}
				evaluated += e.Evaluated
				reused += e.Reused
			}
			if st.Requests != 144 || st.Answered+st.Cancelled+st.Rejected+st.Failed != st.Requests {
				t.Errorf("of %d requests: %+v", st.Requests, st)
			}
			if st.Now.Slots != 0 || st.Now.Queued != 0 || len(s.live) != 0 {
				t.Errorf("at the end %+v, %d live", st.Now, len(s.live))
			}
			if evaluated+reused < prompt || int64(evaluated) > st.Evaluated || int64(made) > st.Generated || s.era == eraC && cached > reused {
				t.Errorf("tokens do not add up: %d and %d in the log, answers tell %d, %d, %d, counted %+v", evaluated, reused, prompt, cached, made, st)
			}
			if st.Loads < st.Evictions+st.Reloads+st.Expired+st.Unloaded+st.Now.Loaded {
				t.Errorf("more went than came: %+v", st)
			}
			if st.SlotBusy <= 0 || st.Busy <= 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// check checks invariants that hold at any time.
func check(t *testing.T, s *Server, slots int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, run := range s.loaded {
		seen := map[*request]bool{}
		busy := 0
		for _, l := range run.slots {
			if q := l.request; q != nil {
				if busy++; seen[q] || q.slot != l || q.done > len(q.prompt) || q.made > q.length {
					t.Errorf("slot %d: %+v", l.index, q)
				}
				seen[q] = true
			}
			if len(l.tokens) > run.options.numCtx {
				t.Errorf("slot %d holds %d tokens", l.index, len(l.tokens))
			}
		}
		if run.granted != busy+len(run.arrived) || run.granted > slots || len(run.queue) > 0 && run.granted < slots || busy > 0 && !run.computing {
			t.Errorf("%d granted, %d busy, %d arrived, %d in the queue, computing %v", run.granted, busy, len(run.arrived), len(run.queue), run.computing)
		}
		var bytes int64
		for _, e := range run.host.entries {
			bytes += run.bytes(e)
		}
		if limit := s.limit(); bytes != run.host.bytes || limit > 0 && bytes > limit {
			t.Errorf("the host cache has %d bytes and counts %d, at most %d", bytes, run.host.bytes, limit)
		}
	}
	if len(s.loaded) > s.config.MaxLoaded || len(s.pending) > s.config.MaxQueue {
		t.Errorf("%d loaded, %d pending", len(s.loaded), len(s.pending))
	}
}
