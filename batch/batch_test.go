package batch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// TestOrder: prefixes that alternate in the input are evaluated once each, by the server's own
// count, and results are in the input's order.
func TestOrder(t *testing.T) {
	const prefixes, each = 20, 6
	none := 0
	server, url := simulated(t, ollamasim.Config{CacheRAMMiB: &none})
	c := config(t, url, interleaved(prefixes, each, 300))
	c.Concurrency = 1
	summary, out := run(t, c)
	for i, r := range results(t, out) {
		if r.Line != i+1 || r.Response == nil || r.Response.Message.Content == "" {
			t.Fatalf("result %d: %+v", i, r)
		}
	}
	stats := server.Stats()
	if n := strings.Count(out, "\n"); n != prefixes*each || stats.Answered != n || summary.Succeeded != n || summary.Failed != 0 {
		t.Errorf("%d results, %d answered, %+v", n, stats.Answered, summary)
	}
	if got := int64(summary.EvaluatedTokens.Value); got != stats.Evaluated || summary.EvaluatedTokens.Basis != Measured {
		t.Errorf("%+v tokens evaluated, and %d by the server", summary.EvaluatedTokens, stats.Evaluated)
	}
	// In the input's order nothing would be reused; in the prefixes' order, all but one of each.
	if all := stats.Evaluated + stats.Reused; stats.Evaluated*each > all*12/10 {
		t.Errorf("%d of %d tokens evaluated", stats.Evaluated, all)
	}
}

// TestWindows: a window smaller than the input costs about one prefix for each prefix that it
// splits.
func TestWindows(t *testing.T) {
	const prefixes, each, window = 4, 40, 40
	none := 0
	server, url := simulated(t, ollamasim.Config{CacheRAMMiB: &none})
	c := config(t, url, interleaved(prefixes, each, 300))
	c.Window, c.Concurrency = window, 1
	run(t, c)
	cold := 0
	for _, e := range server.Evaluations(ollamasim.Mark{}) {
		if e.Reused < 100 {
			cold++
		}
	}
	windows := prefixes * each / window
	// Each begins with the last prefix of the window before.
	if most := windows*(prefixes-1) + 1; cold > most {
		t.Errorf("%d prompts were cold, at most %d need be", cold, most)
	}
}

// TestFlow: results that differ only in their ends are written in the input's order without
// waiting.
func TestFlow(t *testing.T) {
	c := config(t, serve(t, &fake{}), numbered(300))
	c.Concurrency = 1
	most := 0
	c.watch = func(b *batch) { most = max(most, b.journal.most) }
	run(t, c)
	if most != 1 {
		t.Errorf("%d results waited at once", most)
	}
}

// TestMemory: the window bounds what is waiting and what is read ahead, however long the input is.
func TestMemory(t *testing.T) {
	const n, window = 3000, 50
	stuck := make(chan struct{})
	var answered atomic.Int64
	f := &fake{ask: func(w http.ResponseWriter, r *http.Request, user string) bool {
		if user == "item 1" {
			<-stuck // the first result is last: all others would have to wait for it
		} else {
			answered.Add(1)
		}
		return false
	}}
	c := config(t, serve(t, f), numbered(n))
	c.Window, c.Concurrency = window, 8
	most, waited := 0, false
	c.watch = func(b *batch) {
		most = max(most, len(b.window.items)+len(b.journal.beyond)+b.inFlight)
		// No item is taken that is two windows after the first missing one. Once that is so, answer
		// it.
		if b.inFlight == 1 && b.journal.head.Next == 0 && !waited {
			waited = true
			close(stuck)
		}
	}
	_, out := run(t, c)
	if !waited || strings.Count(out, "\n") != n {
		t.Fatalf("%d results, waited: %v", strings.Count(out, "\n"), waited)
	}
	if most > 3*window+8 {
		t.Errorf("%d items at once, with a window of %d", most, window)
	}
}

// TestRunaway: one answer of twenty never ends. With a limit it is cancelled, and the others are
// answered, even those that wait for longer than the limit; num_predict is never added.
func TestRunaway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slot := make(chan struct{}, 1)
		var cancelled atomic.Int64
		f := &fake{ask: func(w http.ResponseWriter, r *http.Request, user string) bool {
			select {
			case slot <- struct{}{}:
				defer func() { <-slot }()
			case <-r.Context().Done():
				return true
			}
			time.Sleep(time.Second) // to read the prompt
			for user == "item 7" && r.Context().Err() == nil {
				io.WriteString(w, `{"message":{"content":"and "},"done":false}`+"\n")
				w.(http.Flusher).Flush()
				time.Sleep(20 * time.Millisecond)
			}
			if user == "item 7" {
				cancelled.Add(1)
			}
			return user == "item 7"
		}}
		ln := ollamasim.Listen()
		srv := &http.Server{Handler: f}
		go srv.Serve(ln) // ends with srv.Close
		defer srv.Close()
		over := func(timeout time.Duration) Config {
			c := config(t, "http://server", numbered(20))
			c.Transport.(*http.Transport).DialContext = ln.DialContext
			c.Timeout, c.Concurrency = timeout, 10
			return c
		}
		c := over(3 * time.Second)
		summary, out := run(t, c)
		c.Transport.(*http.Transport).CloseIdleConnections()
		if summary.Succeeded != 19 || summary.Failed != 1 || cancelled.Load() != 1 {
			t.Errorf("%d succeeded, %d failed, %d cancelled", summary.Succeeded, summary.Failed, cancelled.Load())
		}
		for i, r := range results(t, out) {
			if failed := r.Error != nil; failed != (i == 6) || failed && r.Error.Code != codeTimeout {
				t.Errorf("result %d: %+v", i+1, r)
			}
		}

		// Without a limit nothing is interrupted: the batch waits.
		waiting, stop := context.WithTimeout(t.Context(), 10*time.Minute)
		defer stop()
		c = over(0)
		var last Progress
		c.Progress = func(p Progress) { last = p }
		if _, err := Run(waiting, c); !errors.Is(err, ErrStopped) || last.InFlight == 0 || last.Counts.Failed > 0 || last.Elapsed < 10*time.Minute-2*time.Second {
			t.Errorf("%v, %+v", err, last)
		}
		c.Transport.(*http.Transport).CloseIdleConnections()
		time.Sleep(10 * time.Second) // until the server has noticed
	})
}

// TestFailures: an error that may pass is retried; one that stays is recorded, and kept for another
// run.
func TestFailures(t *testing.T) {
	var mu sync.Mutex
	tries := map[string]int{}
	f := &fake{ask: func(w http.ResponseWriter, r *http.Request, user string) bool {
		mu.Lock()
		tries[user]++
		n := tries[user]
		mu.Unlock()
		fail := func(status int, text string) bool {
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"error":%q}`, text)
			return true
		}
		switch user {
		case "item 2": // the error passes
			return n < 3 && fail(503, "server busy, please try again.  maximum pending requests exceeded")
		case "item 3": // the error stays
			return fail(500, "model runner has unexpectedly stopped")
		case "item 4": // the error is permanent
			return fail(400, "invalid options")
		case "item 5": // interrupted, once
			if n == 1 {
				io.WriteString(w, `{"message":{"content":"half"},"done":false}`+"\n")
				panic(http.ErrAbortHandler)
			}
		case "item 6": // an error within a stream, once
			if n == 1 {
				io.WriteString(w, `{"message":{"content":"half"},"done":false}`+"\n"+`{"error":"an error was encountered while running the model"}`+"\n")
				return true
			}
		}
		return false
	}}
	input := strings.Replace(numbered(8), "{", `{"custom_id":"the first",`, 1)
	c := config(t, serve(t, f), input+"{\"model\":\"m\"\nnonsense\n")
	c.Errors = c.Output + ".errors"
	summary, out := run(t, c)
	if summary.Succeeded != 6 || summary.Failed != 4 {
		t.Errorf("%+v", summary)
	}
	all := results(t, out)
	for i, want := range map[int]string{2: "model runner has", 3: "invalid options", 8: "line 9: invalid JSON at byte 13", 9: "line 10: "} {
		if all[i].Error == nil || !strings.Contains(all[i].Error.Message, want) {
			t.Errorf("result %d: %+v, want %q", i+1, all[i].Error, want)
		}
	}
	if all[4].Response.Message.Content != "item 5" || all[5].Response.Message.Content != "item 6" || string(all[0].CustomID) != `"the first"` {
		t.Errorf("%s", out)
	}
	want := map[string]int{"item 1": 1, "item 2": 3, "item 3": 4, "item 4": 1, "item 5": 2, "item 6": 2, "item 7": 1, "item 8": 1}
	if fmt.Sprint(tries) != fmt.Sprint(want) {
		t.Errorf("tries %v, want %v", tries, want)
	}
	lines := strings.Split(read(t, c.Errors), "\n")
	if len(lines) != 5 || !strings.HasPrefix(lines[0], `{"custom_id":"line 3",`) || lines[2] != `{"model":"m"` || lines[3] != "nonsense" {
		t.Errorf("%q", lines)
	}

	// Only the failed ones, once more.
	again := config(t, serve(t, &fake{}), strings.Join(lines[:2], "\n"))
	if s, out := run(t, again); s.Succeeded != 2 || !strings.HasPrefix(out, `{"line":1,"custom_id":"line 3","response"`) {
		t.Errorf("%+v %s", s, out)
	}
	// The same command again sends nothing.
	before := len(tries)
	if s, _ := run(t, c); s.Failed != 4 || s.Resumed != 10 || len(tries) != before {
		t.Errorf("%+v", s)
	}
}

// TestServerGone: a server that is gone ends the batch, which continues when it is back.
func TestServerGone(t *testing.T) {
	var gone atomic.Bool
	f := &fake{}
	f.get = func(w http.ResponseWriter, r *http.Request) bool {
		if gone.Load() {
			w.WriteHeader(http.StatusBadGateway)
			io.WriteString(w, `{"error":"ollama does not answer"}`)
		}
		return gone.Load()
	}
	c := config(t, serve(t, f), numbered(30))
	c.Concurrency = 2
	c.Progress = func(p Progress) { gone.Store(p.Done >= 10) }
	if _, err := Run(t.Context(), c); !errors.Is(err, ErrUnreachable) {
		t.Fatalf("%v", err)
	}
	gone.Store(false)
	c.Progress = nil
	if s, out := run(t, c); s.Succeeded != 30 || s.Resumed < 10 || strings.Count(out, "\n") != 30 {
		t.Errorf("%+v", s)
	}
}

// TestRefused: a run that cannot be continued is refused, with the reason.
func TestRefused(t *testing.T) {
	url := serve(t, &fake{})
	c := config(t, url, numbered(3))
	run(t, c)
	other := func(input, want string, change func(*Config)) {
		t.Helper()
		n := config(t, url, input)
		n.Output = c.Output
		change(&n)
		before := read(t, c.Output)
		if _, err := Run(t.Context(), n); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		if read(t, c.Output) != before {
			t.Error("the output was changed")
		}
	}
	other(numbered(4), "the input or its template is not what it was", func(*Config) {})
	other(numbered(3), "begun with --order input", func(c *Config) { c.Order = CompletionOrder })
	other(numbered(3), "begun with --errors \"\"", func(c *Config) { c.Errors = c.Output + ".errors" })
	if err := os.Remove(c.Output + JournalSuffix); err != nil {
		t.Fatal(err)
	}
	other(numbered(3), "exists already, and no journal", func(*Config) {})

	f := &fake{get: func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/api/show" {
			w.WriteHeader(404)
		}
		return r.URL.Path == "/api/show"
	}}
	c = config(t, serve(t, f), numbered(3))
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), `model "m", which 3 requests want, is not on the server`) {
		t.Errorf("%v", err)
	}
}

// TestOneFile: two of a batch's files are never the same one, however they are spelled or linked.
func TestOneFile(t *testing.T) {
	for _, link := range []func(old, new string) error{os.Symlink, os.Link} {
		c := config(t, serve(t, &fake{}), numbered(2))
		c.Errors = c.Output + ".link"
		write(t, c.Output, "")
		if err := link(c.Output, c.Errors); err != nil {
			t.Fatal(err)
		}
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "are one file") {
			t.Errorf("%v", err)
		}
	}
	c := config(t, serve(t, &fake{}), numbered(2))
	for _, errors := range []string{c.Output, filepath.Join(filepath.Dir(c.Output), "x", "..", "out.jsonl"), c.Output + JournalSuffix} {
		c.Errors = errors
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "choose another") {
			t.Errorf("%s: %v", errors, err)
		}
	}
	if err := os.Symlink(c.Output+JournalSuffix, c.Output+".link"); err != nil {
		t.Fatal(err)
	}
	c.Errors = c.Output + ".link" // of a journal that does not exist yet
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "are one file") {
		t.Errorf("%v", err)
	}
	c.Errors = ""
	// Nor is one of them another file of the run, even if neither exists yet.
	dir := filepath.Dir(c.Output)
	if err := os.Symlink(dir, dir+"/dir"); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/template", "x")
	for name, change := range map[string]func(*Config){
		"template":                  func(c *Config) { c.Output = dir + "/dir/template" },
		"summary":                   func(c *Config) { c.Output = dir + "/dir/summary" },
		"out.jsonl" + JournalSuffix: func(*Config) {},
		"errors":                    func(c *Config) { c.Errors = dir + "/dir/errors" },
	} {
		c := c
		c.Beside = []Named{{"the other", filepath.Join(dir, name)}}
		change(&c)
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "the other "+dir+"/"+name+" and the ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if read(t, dir+"/template") != "x" {
		t.Error("the template was changed")
	}
	// Stdout may be a file, too.
	stdout, err := os.Create(dir + "/stdout")
	if err != nil {
		t.Fatal(err)
	}
	defer stdout.Close()
	out := c
	out.Output, out.Stdout, out.Errors = "-", stdout, dir+"/stdout"
	if _, err := Run(t.Context(), out); err == nil || !strings.Contains(err.Error(), "are one file") {
		t.Errorf("%v", err)
	}
	// A path that is not a regular file may be used several times.
	for _, name := range []string{os.DevNull, "-"} {
		out.Output, out.Stdout, out.Errors = name, io.Discard, os.DevNull
		if s, err := Run(t.Context(), out); err != nil || s.Succeeded != 2 {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	if s, _ := run(t, c); s.Succeeded != 2 {
		t.Errorf("%+v", s)
	}
}

// TestForms: OpenAI's batch format, and embeddings, with the simulated server, which answers in
// OpenAI's own types.
func TestForms(t *testing.T) {
	_, url := simulated(t, ollamasim.Config{Models: []ollamasim.Model{{Name: "m"}, {Name: "e", Embedding: true}}})
	input := `{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","max_tokens":3,"stream":false,"messages":[{"role":"user","content":"hello"}]}}
{"custom_id":"b","url":"https://api.example.com/v1/completions","body":{"model":"m","max_tokens":3,"prompt":"hello"}}
{"custom_id":"c","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":["wrong"]}],"max_tokens":"x"}}
{"model":"e","input":["x","y"]}
{"model":"m","prompt":"hello","stream":false,"options":{"num_predict":2}}
{"custom_id":"d","method":"POST","url":"/api/chat","body":{"model":"m","options":{"num_predict":2},"messages":[{"role":"user","content":"hello"}]}}
`
	c := config(t, url, input)
	summary, out := run(t, c)
	again := c
	again.Output += ".again"
	if _, second := run(t, again); second != out {
		t.Errorf("the second time it is\n%s\nafter\n%s", second, out)
	}
	got := strings.Split(out, "\n")
	for i, want := range []string{
		`{"id":"batch_req_1","custom_id":"a","response":{"status_code":200,"request_id":"req_1","body":{"id":"line-1","object":"chat.completion","created":0,"model":"m","system_fingerprint":"fp_ollama","choices":[{"index":0,"message":{"role":"assistant","content":"`,
		`{"id":"batch_req_2","custom_id":"b","response":{"status_code":200,"request_id":"req_2","body":{"id":"line-2","object":"text_completion","created":0,`,
		`{"id":"batch_req_3","custom_id":"c","response":{"status_code":400,"request_id":"req_3","body":{"error":{`,
		`{"line":4,"response":{"model":"e","embeddings":[[`,
		`{"line":5,"response":{"model":"m","response":"`,
		`{"id":"batch_req_6","custom_id":"d","response":{"status_code":200,"request_id":"req_6","body":{"model":"m","message":{"role":"assistant","content":"`,
	} {
		if !strings.HasPrefix(got[i], want) {
			t.Errorf("%s\nwant %s…", got[i], want)
		}
	}
	if !strings.Contains(got[0], `"usage":{"prompt_tokens":`) || summary.Failed != 1 || summary.PromptTokens.Value == 0 {
		t.Errorf("%+v\n%s", summary, got[0])
	}
}

// TestRefusedLines: a refused line keeps its custom_id and its form, as far as they can be read.
func TestRefusedLines(t *testing.T) {
	input := `{"custom_id":"no model","method":"POST","url":"/v1/chat/completions","body":{"messages":[{"role":"user","content":"x"}]}}
{"custom_id":"no such url","url":"/v1/responses","body":{"model":"m"}}
{"custom_id":"cut off","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[
{"custom_id":"in /api","prompt":"x"}
{"custom_id":"` + "\xfc" + `","model":"m","prompt":"x"}
{"custom_id":"twice","model":"m"} {}
nonsense
`
	c := config(t, serve(t, &fake{}), input)
	c.Errors = c.Output + ".errors"
	summary, out := run(t, c)
	if summary.Failed != 7 {
		t.Errorf("%+v", summary)
	}
	got := strings.Split(out, "\n")
	const refused = `"error":{"code":"invalid_request","message":"line `
	for i, want := range []string{
		`{"id":"batch_req_1","custom_id":"no model","response":null,` + refused + `1: no \"model\" is named"`,
		`{"id":"batch_req_2","custom_id":"no such url","response":null,` + refused + `2: url`,
		`{"id":"batch_req_3","custom_id":"cut off","response":null,` + refused + `3: invalid JSON at byte`,
		`{"line":4,"custom_id":"in /api",` + refused + `4: no \"model\" is named"`,
		`{"line":5,"custom_id":"` + "\uFFFD" + `",` + refused + `5, column 15: byte 0xFC is not UTF-8`,
		`{"line":6,"custom_id":"twice",` + refused + `6: more text after the object"`,
		`{"line":7,` + refused + `7: invalid JSON at byte`,
	} {
		if !strings.HasPrefix(got[i], want) {
			t.Errorf("%s\nwant %s…", got[i], want)
		}
	}
	if read(t, c.Errors) != input {
		t.Errorf("to be sent again: %s", read(t, c.Errors))
	}

	const inForm = `{"custom_id":"{{id}}","url":"/v1/completions","body":{"model":"m","prompt":"{{text}}"}}`
	s, err := rowsOf(t, "rows.jsonl", `{"id":7}`+"\n"+`{"text":"x"}`+"\n", inForm)
	if err != nil {
		t.Fatal(err)
	}
	_, out = run(t, over(t, c.Server.String(), s, c.Output+".objects"))
	want := `{"id":"batch_req_1","custom_id":7,"response":null,` + refused + "1: the template's field {{text}} is not in the row\"}}\n" +
		`{"id":"batch_req_2","custom_id":null,"response":null,` + refused + "2: the template's field {{id}} is not in the row\"}}\n"
	if out != want {
		t.Errorf("%s\nwant\n%s", out, want)
	}

	s, err = rowsOf(t, "rows.csv", "id,text\n1,a\n2\n3,\n4,\xfc\n", inForm)
	if err != nil {
		t.Fatal(err)
	}
	c = over(t, c.Server.String(), s, c.Output+".rows")
	_, out = run(t, c)
	got = strings.Split(out, "\n")
	for i, want := range []string{
		`{"id":"batch_req_3","custom_id":null,"response":null,` + refused + `3: the row has not`,
		`{"id":"batch_req_4","custom_id":"3","response":null,` + refused + `4: \"prompt\" is empty`,
		`{"id":"batch_req_5","custom_id":"4","response":null,` + refused + `5, column 3: byte 0xFC`,
	} {
		if !strings.HasPrefix(got[i+1], want) {
			t.Errorf("%s\nwant %s…", got[i+1], want)
		}
	}
}

// TestRepeatedIDs: lines that repeat a custom_id are counted, and the first of them are named,
// before the run and by --check.
func TestRepeatedIDs(t *testing.T) {
	var input strings.Builder
	for n := range 40 {
		fmt.Fprintf(&input, `{"custom_id": %q,"model":"m","messages":[{"content":"x"}]}`+"\n", fmt.Sprint(n%25))
	}
	input.WriteString(`{"custom_id":"24","model":""}` + "\n" + chat("", "has none") + "\n" + chat("", "has none") + "\n")
	c := config(t, serve(t, &fake{}), input.String())
	var log, page strings.Builder
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	run(t, c)
	v, err := TakeSurvey(t.Context(), c.Source, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Print(&page, nil, nil); err != nil {
		t.Fatal(err)
	}
	const first = `"0" (line 26), "1" (line 27), "2" (line 28), "3" (line 29), "4" (line 30), "5" (line 31), "6" (line 32), "7" (line 33), "8" (line 34), "9" (line 35), …`
	if want := "custom_id   16 lines repeat that of an earlier line: " + first + "\n"; !strings.Contains(page.String(), want) {
		t.Errorf("%s", page.String())
	}
	if want := fmt.Sprintf("repeat the custom_id of an earlier line\" count=16 lines=%q", first); !strings.Contains(log.String(), want) {
		t.Errorf("%s", log.String())
	}
}

// TestStdout: results in the order of completion, and to stdout, where a run cannot be continued.
func TestStdout(t *testing.T) {
	for _, order := range []Order{InputOrder, CompletionOrder} {
		c := config(t, serve(t, &fake{}), numbered(50))
		var b strings.Builder
		c.Output, c.Stdout, c.Order, c.Concurrency = "-", &b, order, 8
		if _, err := Run(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		seen := map[int]bool{}
		for i, r := range results(t, b.String()) {
			if order == InputOrder && r.Line != i+1 || seen[r.Line] {
				t.Errorf("%s: result %d is of line %d", order, i+1, r.Line)
			}
			seen[r.Line] = true
		}
		if len(seen) != 50 {
			t.Errorf("%s: %d results", order, len(seen))
		}
	}
}
