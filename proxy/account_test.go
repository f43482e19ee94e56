package proxy

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// warmFake is an upstream that answers as Ollama 0.34 would for a model that evaluates a token per
// millisecond and has one slot. It reuses what a chat's texts have in common with those of the
// previous chat, at one token per byte.
func warmFake(t *testing.T) *fake {
	var last, options string
	return newFake(t, func(r received) string {
		var body struct {
			Messages []struct{ Content string }
			Options  struct {
				NumCtx *int `json:"num_ctx"`
			}
			Tools json.RawMessage
		}
		if err := json.Unmarshal(r.body, &body); err != nil {
			return answer(400, "application/json", `{"error":"not JSON"}`)
		}
		text := ""
		for i, m := range body.Messages {
			if i == 1 || len(body.Messages) == 1 {
				text += string(body.Tools)
			}
			text += m.Content + "|"
		}
		opts := fmt.Sprint(body.Options.NumCtx != nil && *body.Options.NumCtx > 0)
		if body.Options.NumCtx != nil {
			opts = fmt.Sprint(*body.Options.NumCtx)
		}
		load := 2 * time.Millisecond
		if opts != options {
			last, load = "", time.Second
		}
		n := 0
		for n < min(len(last), len(text)-1) && last[n] == text[n] {
			n++
		}
		last, options = text, opts
		return answer(200, "application/json", fmt.Sprintf(`{"model":"m","message":{"role":"assistant","content":"x"},"done":true,"done_reason":"stop","total_duration":%d,"load_duration":%d,"prompt_eval_count":%d,"prompt_eval_cached_count":%d,"prompt_eval_duration":%d,"eval_count":1,"eval_duration":1000000}`,
			int64(load)+int64(len(text)-n)*1e6+2e6, load, len(text), n, int64(len(text)-n)*1e6))
	})
}

// chatWith builds a chat; extra are more members, starting with a comma.
func chatWith(system, user, extra string) string {
	body, err := json.Marshal(map[string]any{"model": "m", "stream": false, "messages": []map[string]string{{"role": "system", "content": system}, {"role": "user", "content": user}}})
	if err != nil {
		panic(err)
	}
	return strings.TrimSuffix(string(body), "}") + extra + "}"
}

// ask sends a chat and returns its entry in the ledger. The upstream must get the body unchanged
// except for keep_alive.
func ask(t *testing.T, rg *rig, f *fake, body string) savings.Entry {
	t.Helper()
	if res, text := rg.post("/api/chat", body); res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, text)
	}
	if got := string(f.next().body); got != body {
		t.Fatalf("the body was changed: %.300s", got)
	}
	ex := rg.ended()
	if ex.Savings == nil {
		t.Fatalf("nothing in the ledger: %+v", ex)
	}
	return *ex.Savings
}

// prose is text of n bytes without repetitions.
func prose(n int) string {
	var b strings.Builder
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "Rule %d: a candidate with %d years gets %d points. ", i, i*7%41, i*13%97)
	}
	return b.String()[:n]
}

// The time in the first lines of a system prompt makes every prompt new, and the diagnostic shows
// where they diverge.
func TestF10TimeInTheSystemPrompt(t *testing.T) {
	f := warmFake(t)
	rg := newRig(t, f.URL, &Handler{})
	system := prose(8000)
	at := func(i int) string { return system[:i] + "#" + system[i+1:] }

	if e := ask(t, rg, f, chatWith(system, "Go.", "")); e.Reason != savings.ReasonFirst || e.Verdict != savings.Cold {
		t.Errorf("the first one: %+v", e)
	}
	e := ask(t, rg, f, chatWith(at(90), "Go.", ""))
	if e.Verdict != savings.Cold || e.Reason != savings.ReasonDiverged || !strings.Contains(e.Detail, "a number at byte 80 to 95 of the system prompt, 7,") || e.Expected > 200 {
		t.Errorf("a change at byte 90: %+v", e)
	}
	if detail, err := json.Marshal(e.Detail); err != nil || !strings.Contains(rg.log.String(), `"detail":`+string(detail)) {
		t.Errorf("the log lacks the detail %s: %s", detail, rg.log.String())
	}
	ask(t, rg, f, chatWith(system, "Go.", ""))
	e = ask(t, rg, f, chatWith(at(7900), "Go.", ""))
	if e.Verdict != savings.Hit || e.Reason != "" || e.Expected < 7500 || e.Expected > 7950 {
		t.Errorf("a change at byte 7900: %+v", e)
	}
	for _, line := range []string{rg.log.String(), page(t, rg)} {
		if strings.Contains(line, "Rule") {
			t.Errorf("prompt text in %.300s", line)
		}
	}
}

func page(t *testing.T, rg *rig) string {
	t.Helper()
	res, text := rg.do("GET", pathRequests, "")
	rg.ended()
	if res.StatusCode != 200 {
		t.Fatalf("%s: %d %s", pathRequests, res.StatusCode, text)
	}
	return text
}

// The same tools in another order are not a hit, and the diagnostic names them. Their bytes are
// forwarded unchanged, and the conversation is still the same one.
func TestF11ToolsOrder(t *testing.T) {
	f := warmFake(t)
	rg := newRig(t, f.URL, &Handler{})
	var tools []string
	for i := range 8 {
		tools = append(tools, fmt.Sprintf(`{"type":"function","function":{"name":"tool%d","description":"%s","parameters":{"type":"object","properties":{"x":{"type":"string"}}}}}`, i, prose(200)))
	}
	inOrder := `,"tools":[` + strings.Join(tools, ",") + `]`
	first := tools[0]
	tools[0] = fmt.Sprintf(`{"function":{"parameters":{"type":"object","properties":{"x":{"type":"string"}}},"description":"%s","name":"tool0"},"type":"function"}`, prose(200))
	otherKeys := `,"tools":[` + strings.Join(tools, ",") + `]`
	tools[0] = first
	for i, j := 0, len(tools)-1; i < j; i, j = i+1, j-1 {
		tools[i], tools[j] = tools[j], tools[i]
	}
	reversed := `,"tools":[` + strings.Join(tools, ",") + `]`

	a := ask(t, rg, f, chatWith("Be brief.", "What is the weather?", inOrder))
	if e := ask(t, rg, f, chatWith("Be brief.", "What is the weather?", inOrder)); e.Verdict != savings.Hit || e.Prefix != a.Prefix {
		t.Errorf("the same: %+v", e)
	}
	e := ask(t, rg, f, chatWith("Be brief.", "What is the weather?", reversed))
	if e.Verdict != savings.Cold || e.Reason != savings.ReasonDiverged || !strings.Contains(e.Detail, "tools") || e.Expected*10 > e.Total {
		t.Errorf("reversed: %+v", e)
	}
	if e.Conversation != a.Conversation {
		t.Error("reversed: another conversation")
	}
	ask(t, rg, f, chatWith("Be brief.", "What is the weather?", inOrder))
	if e := ask(t, rg, f, chatWith("Be brief.", "What is the weather?", otherKeys)); e.Prefix != a.Prefix || e.Expected*2 < e.Total {
		t.Errorf("a tool's keys in another order: %+v", e) // Ollama renders the same prompt
	}
}

// The options that make Ollama load a model again are part of a prefix, and the loads are counted
// and explained.
func TestF12NumCtx(t *testing.T) {
	f := warmFake(t)
	rg := newRig(t, f.URL, &Handler{})
	system := prose(3000)
	reloads := 0
	for i := range 10 {
		extra := []string{`,"options":{"num_ctx":32768}`, "", `,"options":{"num_ctx":8192}`}[i%3]
		e := ask(t, rg, f, chatWith(system, fmt.Sprintf("Candidate %d", i), extra))
		if !e.Loaded {
			t.Errorf("request %d: no load was noticed", i)
		}
		if e.Reason == savings.ReasonReloaded {
			reloads++
			from := []string{"8192", "32768", "default"}[i%3]
			to := []string{"32768", "default", "8192"}[i%3]
			if want := fmt.Sprintf("num_ctx from %s to %s", from, to); !strings.Contains(e.Detail, want) {
				t.Errorf("request %d: %q, want %q", i, e.Detail, want)
			}
		}
	}
	if reloads != 9 {
		t.Errorf("%d reloads explained, want 9", reloads)
	}
}

// TestHeaders: an answer reports its prefix and the expected reuse.
func TestHeaders(t *testing.T) {
	f := warmFake(t)
	rg := newRig(t, f.URL, &Handler{})
	res, _ := rg.post("/api/chat", chatWith(prose(1000), "a", ""))
	e := rg.ended().Savings
	if got := res.Header.Get(headerPrefix); got != savings.PrefixString(e.Prefix) || len(got) != 16 {
		t.Errorf("%s: %q, ledger %x", headerPrefix, got, e.Prefix)
	}
	if got := res.Header.Get(headerExpected); got != "unknown" {
		t.Errorf("%s: %q before anything is known", headerExpected, got)
	}
	res, _ = rg.post("/api/chat", chatWith(prose(1000), "b", ""))
	e = rg.ended().Savings
	if got := res.Header.Get(headerExpected); got != fmt.Sprint(e.Expected) || e.Expected < 900 {
		t.Errorf("%s: %q, ledger %d", headerExpected, got, e.Expected)
	}
	if res, _ = rg.do("GET", "/api/tags", ""); res.Header.Get(headerPrefix) != "" {
		t.Error("a prefix where there is no prompt")
	}
	rg.ended()
}

// TestRequestsPage: the page is JSON, newest first, and has prompt text only if that is enabled.
func TestRequestsPage(t *testing.T) {
	f := warmFake(t)
	rg := newRig(t, f.URL, &Handler{ShowPrompts: true})
	if got := strings.TrimSpace(page(t, rg)); got != `{"requests":[]}` {
		t.Errorf("an empty page: %s", got)
	}
	for i := range 3 {
		ask(t, rg, f, chatWith(prose(2000), fmt.Sprintf("Candidate %d", i), ""))
	}
	var got requestsPage
	if err := json.Unmarshal([]byte(page(t, rg)), &got); err != nil || len(got.Requests) != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
	newest := got.Requests[0]
	if newest.ID != 3 || newest.Model != "m:latest" || newest.Endpoint != "/api/chat" || newest.Basis != savings.Measured || newest.Tokens.Reused == nil || newest.Upstream != "up" || newest.Shared == "" {
		t.Errorf("%+v", newest)
	}
	if !strings.HasPrefix(newest.Excerpt, `{"messages":[{"content":"Rule 0`) || !strings.Contains(newest.Excerpt, "Candidate 2") || len(newest.Excerpt) > 500 {
		t.Errorf("excerpt %q", newest.Excerpt)
	}
	for path, want := range map[string]int{pathRequests + "?n=2": 200, pathRequests + "?n=x": 400, pathRequests + "?n=-1": 400} {
		if res, text := rg.do("GET", path, ""); res.StatusCode != want {
			t.Errorf("%s: %d %s", path, res.StatusCode, text)
		}
		rg.ended()
	}
}

// TestUnloadForgetsWarmth: a model's prompts are no longer warm after a client has unloaded it,
// after a poll misses it or finds a different model under its name, and after a restart.
func TestUnloadForgetsWarmth(t *testing.T) {
	polled := time.Now
	for name, c := range map[string]struct {
		lose func(rg *rig)
		want savings.Reason
	}{
		"unloaded by a client": {func(rg *rig) { rg.post("/api/generate", `{"model":"m","keep_alive":0}`); rg.ended() }, savings.ReasonEvicted},
		"not loaded any more": {func(rg *rig) {
			rg.h.Polled(rg.h.Upstreams[0], upstream.State{Up: true, Version: "0.34.1", Polled: polled(), LoadedKnown: true})
		}, savings.ReasonEvicted},
		"restarted": {func(rg *rig) {
			rg.h.Polled(rg.h.Upstreams[0], upstream.State{Up: true, Version: "0.34.1", Polled: polled(), Restarted: true})
		}, savings.ReasonRestart},
		"another model": {func(rg *rig) {
			rg.h.Polled(rg.h.Upstreams[0], upstream.State{Up: true, Version: "0.34.1", Polled: polled(), Replaced: []string{upstream.ModelKey("m")}})
		}, savings.ReasonFirst},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, func(r received) string {
				cached, load := 0, int64(time.Second)
				if strings.Contains(string(r.body), "warm") {
					cached, load = 900, int64(time.Millisecond)
				}
				return answer(200, "application/json", fmt.Sprintf(`{"done":true,"total_duration":3000000000,"load_duration":%d,"prompt_eval_count":1000,"prompt_eval_cached_count":%d,"prompt_eval_duration":%d,"eval_count":1}`, load, cached, (1000-cached)*1e6))
			})
			rg := newRig(t, f.URL, &Handler{})
			system := prose(4000)
			ask(t, rg, f, chatWith(system, "cold", ""))
			if e := ask(t, rg, f, chatWith(system, "warm", "")); e.Expected < 900 {
				t.Fatalf("%+v", e)
			}
			c.lose(rg)
			for len(f.reqs) > 0 {
				f.next()
			}
			e := ask(t, rg, f, chatWith(system, "and now", ""))
			if e.Expected > 0 || e.Reason != c.want {
				t.Errorf("%+v, want %s", e, c.want)
			}
		})
	}
}

// TestAnswersWithoutCounts: an OpenAI stream without usage is unknown in the ledger; an error and a
// truncated answer are not in it.
func TestAnswersWithoutCounts(t *testing.T) {
	f := newFake(t, func(r received) string {
		if strings.Contains(r.line, "/v1/chat") {
			return answer(200, "text/event-stream", "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\ndata: [DONE]\n\n")
		}
		if strings.Contains(string(r.body), "refuse") {
			return answer(404, "application/json", `{"error":"no such model"}`)
		}
		return okAnswer(r)
	})
	rg := newRig(t, f.URL, &Handler{})
	rg.post("/v1/chat/completions", chatWith(prose(500), "a", ""))
	if e := rg.ended().Savings; e == nil || e.Basis != savings.Unknown || e.Total != 0 || e.Verdict != savings.Uncertain {
		t.Errorf("%+v", e)
	}
	rg.post("/api/chat", chatWith(prose(500), "refuse", ""))
	if e := rg.ended().Savings; e != nil {
		t.Errorf("a refused request: %+v", e)
	}

	f = newFake(t, nil)
	rg = newRig(t, f.URL, &Handler{})
	c := rg.dial()
	c.send(rawPost("/api/chat", chatWith(prose(500), "break", "")))
	up := f.accept()
	up.receive()
	up.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
	up.Close()
	c.closed()
	if ex := rg.ended(); ex.Outcome != Aborted || ex.Savings == nil || !ex.Savings.Broken || ex.Savings.Basis != savings.Unknown {
		t.Errorf("a broken answer: %+v", ex)
	}
}

// TestSlidingWindowIsAsked: the proxy asks a server before 0.30, once, whether a model has a
// sliding window.
func TestSlidingWindowIsAsked(t *testing.T) {
	f := newFake(t, func(r received) string {
		switch {
		case strings.Contains(r.line, "/api/show"):
			return answer(200, "application/json", `{"model_info":{"gemma3.attention.sliding_window":512}}`)
		case strings.Contains(r.line, "/api/version"):
			return answer(200, "application/json", `{"version":"0.24.0"}`)
		case strings.Contains(r.line, "/api/tags"):
			return answer(200, "application/json", `{"models":[{"name":"m:latest","digest":"d"}]}`)
		case strings.Contains(r.line, "/api/ps"):
			return answer(200, "application/json", `{"models":[]}`)
		}
		return answer(200, "application/json", fmt.Sprintf(`{"done":true,"total_duration":3000000000,"load_duration":1000000,"prompt_eval_count":1000,"prompt_eval_duration":%d,"eval_count":1}`, int(1e9)))
	})
	rg := newRig(t, f.URL, &Handler{})
	rg.h.Polled(rg.h.Upstreams[0], rg.h.Upstreams[0].Poll(t.Context()))
	var reason savings.Reason
	for i := range 8 { // the first ones show how long an evaluation takes
		rg.post("/api/chat", chatWith(prose(4000), strings.Repeat("x", i+1), ""))
		reason = rg.ended().Savings.Reason
	}
	if reason != savings.ReasonSliding {
		t.Errorf("reason %q", reason)
	}
	asked := 0
	for len(f.reqs) > 0 {
		if strings.Contains(f.next().line, "/api/show") {
			asked++
		}
	}
	if asked != 1 {
		t.Errorf("/api/show was asked %d times", asked)
	}
}

// TestAliveWhileItAnswers: a server that answers requests does not count as away, even if its polls
// fail.
func TestAliveWhileItAnswers(t *testing.T) {
	f := newFake(t, nil)
	rg := newRig(t, f.URL, &Handler{})
	s := rg.h.Upstreams[0]
	c := rg.dial()
	c.send(rawPost("/api/chat", chatWith(prose(500), "a", "")))
	up := f.accept()
	up.receive()
	last := s.State().Seen
	for _, part := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{", "}"} {
		up.send(part)
		for s.State().Seen.Equal(last) { // the test's own time limit ends this
			runtime.Gosched()
		}
		last = s.State().Seen
	}
	rg.ended()
}
