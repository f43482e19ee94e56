package doctor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

var start = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

// at is that many seconds after the start.
func at(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }

// asked is an ordinary request that is sent at second s and takes one second.
func asked(s float64, change func(*Request)) Request {
	q := Request{
		Asker:    Asker{Client: "0123456789abcdef", Agent: "python-httpx/0.28", Endpoint: "/api/chat"},
		Upstream: "upstream", Model: "m:latest", Weights: "sha256-m",
		Arrived: at(s), Sent: at(s), Ended: at(s + 1), Lane: true, KeepAlive: 24 * time.Hour,
		Tokens: 1000, Reused: 900, Evaluated: 100, Known: true, Generated: 10, Bytes: 4000,
		Prompt: 100 * time.Millisecond, Eval: 100 * time.Millisecond, Context: 4096, Conversation: 1, Values: 1 << 16,
	}
	if change != nil {
		change(&q)
	}
	return q
}

// many returns n requests, ten seconds apart.
func many(n int, change func(i int, q *Request)) []Request {
	var rows []Request
	for i := range n {
		rows = append(rows, asked(float64(10*i), func(q *Request) { change(i, q) }))
	}
	return rows
}

// factsOf returns the facts of requests to an ordinary server, modified by change.
func factsOf(rows []Request, change func(*Facts)) Facts {
	f := aggregate(rows, nil)
	f.Since, f.Now, f.Proxy = start, start.Add(time.Hour), "http://127.0.0.1:11435"
	f.Upstreams = []Upstream{{Name: "upstream", URL: "http://127.0.0.1:11434", Up: true, Version: "0.34.1", Here: true}}
	f.Settings.Contexts = true
	if change != nil {
		change(&f)
	}
	return f
}

func load(q *Request) {
	q.Loaded, q.Load, q.Reason = true, 5*time.Second, "reloaded"
	q.Reused, q.Evaluated = 0, 1000
}

// TestExamine plants each problem, and a case that just falls short of it.
func TestExamine(t *testing.T) {
	turned := func(n int) []Request {
		return many(n, func(i int, q *Request) {
			if i > 0 {
				load(q)
				q.ByOptions, q.ByNumCtx = true, true
			}
			q.NumCtx = []int{0, 8192}[i%2]
		})
	}
	expired := func(own bool, keep time.Duration) []Request {
		return many(3, func(i int, q *Request) {
			q.OwnKeepAlive, q.KeepAlive = own, keep
			if i > 0 {
				load(q)
				q.Reason = "evicted"
			}
		})
	}
	inTurn := many(5, func(i int, q *Request) {
		if i%2 == 1 {
			q.Model, q.Weights = "n:latest", "sha256-n"
		}
		load(q)
		q.Reason = "evicted"
	})
	cold := func(n int, reason string) []Request {
		return many(n, func(i int, q *Request) {
			q.Reason, q.Reused, q.Evaluated = reason, 0, 1000
			q.Conversation = uint64(i)
		})
	}
	moved := func(n int) []Request {
		return many(n, func(i int, q *Request) {
			q.Moved, q.Reused, q.Evaluated = Moved{Bytes: 3000, After: 400}, 100, 900
		})
	}
	waited := func(n, slots int) Facts {
		var rows []Request
		for i := range n {
			rows = append(rows, asked(0, func(q *Request) { q.Sent, q.Ended = at(float64(2*i)), at(float64(2*i+2)) }))
		}
		return factsOf(rows, func(f *Facts) { f.Models[0].Lanes.Slots = slots })
	}
	// With each turn, a chat grows by 4,000 bytes, which are `each` tokens. The tokens of its tools are
	// added, and the sum is limited to `most`.
	grows := func(each, tools, most int, change func(*Request)) Facts {
		return factsOf(many(8, func(i int, q *Request) {
			q.Bytes = 4000 * (i + 1)
			if q.Tokens = tools + each*(i+1); q.Tokens > most {
				q.Tokens = most - 100*i
			}
			if change != nil {
				change(q)
			}
		}), nil)
	}
	never := 1 << 30
	docs := headings(t)
	for _, c := range []struct {
		name  string
		facts Facts
		want  string // the findings' IDs
		set   string // a setting that the first finding advises
	}{
		{"no requests", factsOf(nil, nil), "", ""},
		{"nothing wrong", factsOf(many(10, func(int, *Request) {}), nil), "", ""},
		{"num_ctx in turn", factsOf(turned(4), nil), IDNumCtx, "OLLAMA_CONTEXT_LENGTH=8192"},
		{"num_ctx changed once", factsOf(turned(2), nil), "", ""},
		{"a client's own keep_alive", factsOf(expired(true, 5*time.Second), nil), IDKeepAlive, "--keep-alive m:latest=1h --keep-alive-policy at-least"},
		{"the operator's keep_alive", factsOf(expired(false, 5*time.Second), nil), IDKeepAlive, "--keep-alive m:latest=1h"},
		{"models in turn", factsOf(inTurn, nil), IDEvict, "OLLAMA_MAX_LOADED_MODELS=2"},
		{"… where an engine could be linked", factsOf(inTurn, func(f *Facts) { f.Settings.Contexts = false }), IDEvict + " " + IDLink, "OLLAMA_MAX_LOADED_MODELS=2"},
		{"… but the server is elsewhere", factsOf(inTurn, func(f *Facts) { f.Settings.Contexts, f.Upstreams[0].Here = false, false }), IDEvict, ""},
		{"… or old", factsOf(inTurn, func(f *Facts) { f.Settings.Contexts, f.Upstreams[0].Version = false, "0.24.0" }), IDEvict, ""},
		{"loads that nobody explains", factsOf(many(4, func(i int, q *Request) {
			if i > 0 {
				load(q)
			}
		}), nil), IDBypass, "OLLAMA_HOST=http://127.0.0.1:11435"},
		{"a model that somebody else uses", factsOf(many(4, func(int, *Request) {}), func(f *Facts) {
			f.Outside = []Outsider{{Upstream: "upstream", Model: "x:latest", Kind: OutsideLoaded, Count: 1, Last: start}}
		}), IDBypass, "--listen 127.0.0.1:11434"},
		{"slots taken", factsOf(cold(8, "slot_taken"), nil), IDHostCache, "LLAMA_ARG_CACHE_RAM=8192"},
		{"… more than the default holds", factsOf(many(90, func(i int, q *Request) {
			q.Reason, q.Reused, q.Evaluated, q.Tokens, q.Conversation, q.Values = "slot_taken", 0, 1000, 1000, uint64(i), 1<<16
		}), nil), IDHostCache, "LLAMA_ARG_CACHE_RAM=14336"},
		{"… by an Ollama without a host cache", factsOf(cold(8, "slot_taken"), func(f *Facts) { f.Upstreams[0].Version = "0.24.0" }), IDHostCache, "OLLAMA_NUM_PARALLEL=8"},
		{"… twice", factsOf(cold(2, "slot_taken"), nil), "", ""},
		{"a sliding window", factsOf(cold(4, "sliding_window"), nil), IDSliding, ""},
		{"turns dropped", factsOf(moved(4), nil), IDDropped, "LLAMA_ARG_CACHE_REUSE=64"},
		{"… twice", factsOf(moved(2), nil), "", ""},
		{"prompts cut", grows(1000, 0, 4000, nil), IDCut, "OLLAMA_CONTEXT_LENGTH=16384"},
		{"… beside tools", grows(600, 2000, 4000, nil), IDCut, "OLLAMA_CONTEXT_LENGTH=8192"},
		{"… little by little", factsOf(many(12, func(i int, q *Request) {
			q.Bytes, q.Tokens = 10_000+900*i, min(2500+225*i, 4000)
		}), nil), IDCut, "OLLAMA_CONTEXT_LENGTH=8192"},
		{"… which the ledger takes for something else", grows(1000, 0, 4000, func(q *Request) {
			q.Reason, q.Reused, q.Evaluated = "slot_taken", 0, q.Tokens
			if q.Bytes <= 16_000 {
				q.Reason = "diverged"
			}
		}), IDCut, ""},
		{"… of which the ledger says so", factsOf(many(4, func(i int, q *Request) { q.Truncated = i == 3 }), nil), IDCut, "OLLAMA_CONTEXT_LENGTH=8192"},
		{"long prompts that are not", grows(1000, 0, never, func(q *Request) { q.Context = 16384 }), "", ""},
		{"… beside many tools", grows(900, 20000, never, func(q *Request) { q.Context = 32768 }), "", ""},
		{"… of text that is mostly blank", grows(450, 0, never, func(q *Request) { q.Context = 4096 }), "", ""},
		{"… with images, of which text does not tell", grows(1000, 0, 4000, func(q *Request) { q.Images = 1 }), "", ""},
		{"requests that wait", waited(6, 1), IDFewSlots, "OLLAMA_NUM_PARALLEL=6"},
		{"… of which nobody knows the slots", waited(6, 0), "", ""},
		{"slots for nobody", factsOf(many(60, func(int, *Request) {}), func(f *Facts) { f.Models[0].Lanes.Slots = 4 }), IDManySlots, "OLLAMA_NUM_PARALLEL=1"},
		{"… as was learned", factsOf(many(60, func(int, *Request) {}), func(f *Facts) {
			f.Models[0].Lanes.Slots, f.Models[0].Lanes.Learned = 4, true
		}), "", ""},
		{"part of a model on the processor", factsOf(nil, func(f *Facts) {
			f.Loaded = map[string][]Resident{"upstream": {{"m:latest", 6 << 30, 4 << 30, 16384}}}
		}), IDCPU, "OLLAMA_CONTEXT_LENGTH=8192"},
		{"all of it there", factsOf(nil, func(f *Facts) {
			f.Loaded = map[string][]Resident{"upstream": {{"m:latest", 6 << 30, 0, 16384}}}
		}), "", ""},
		{"none of it there", factsOf(nil, func(f *Facts) {
			f.Loaded = map[string][]Resident{"upstream": {{"m:latest", 6 << 30, 6 << 30, 16384}}}
		}), "", ""},
		{"a server away", factsOf(nil, func(f *Facts) { f.Upstreams[0].Up = false }), IDUnreachable, "--upstream"},
		{"a store of answers away", factsOf(nil, func(f *Facts) {
			f.Answers = Answers{Down: true, Errors: 7}
		}), IDAnswers, "--answers-store memory"},
		{"… and back", factsOf(nil, func(f *Facts) { f.Answers = Answers{Errors: 7} }), "", ""},
		{"a checksum that changes", factsOf(nil, func(f *Facts) {
			f.Changed = []Changed{{Model: "m:latest", Place: "system prompt", Kind: "checksum", Byte: 61, Cost: Cost{Count: 6, Tokens: 24900}, Since: start}}
		}), IDHead, "--stable-heads claude-billing"},
		{"tools in another order", factsOf(nil, func(f *Facts) {
			f.Changed = []Changed{{Model: "m:latest", Place: "tools", Kind: "text", Cost: Cost{Count: 6, Tokens: 24900}, Since: start}}
		}), IDHead, ""},
		{"somebody who edits a message", factsOf(nil, func(f *Facts) {
			f.Changed = []Changed{{Model: "m:latest", Place: "message 3", Kind: "text", Byte: 61, Cost: Cost{Count: 6, Tokens: 24900}, Since: start}}
		}), "", ""},
	} {
		found := Examine(c.facts)
		var ids []string
		for _, f := range found {
			ids = append(ids, f.ID)
			if f.Title == "" || len(f.Evidence) == 0 || len(f.Advice) == 0 || f.Severity == "" || f.Doc == "" {
				t.Errorf("%s: incomplete: %+v", c.name, f)
			}
			if place, ok := strings.CutPrefix(f.Doc, "doctor.md#"); ok && !slices.Contains(docs, place) {
				t.Errorf("%s: docs/doctor.md has no %q", c.name, place)
			}
		}
		if got := strings.Join(ids, " "); got != c.want {
			t.Errorf("%s: %q, want %q\n%+v", c.name, got, c.want, found)
			continue
		}
		if c.set != "" && !slices.ContainsFunc(found[0].Advice, func(a Advice) bool { return strings.Contains(a.Set, c.set) }) {
			t.Errorf("%s: %q is not advised: %+v", c.name, c.set, found[0].Advice)
		}
	}
}

// TestSeverity: a cost is compared with the time of all work or, if answers report no times, as
// under /v1, with the tokens that were evaluated.
func TestSeverity(t *testing.T) {
	for _, c := range []struct {
		name   string
		timed  bool
		tokens int // that a changing head has cost, of 100,000
		want   Severity
	}{
		{"timed, little", true, 600, Low},
		{"timed, much", true, 50_000, High},
		{"not timed, little", false, 600, Low},
		{"not timed, more", false, 5_000, Medium},
		{"not timed, much", false, 50_000, High},
	} {
		facts := factsOf(many(10, func(_ int, q *Request) {
			q.Foreign, q.Tokens, q.Reused, q.Evaluated, q.Bytes, q.Context = true, 10_000, 0, 10_000, 40_000, 16384
			if q.Prompt = time.Second; !c.timed {
				q.Prompt, q.Eval = 0, 0
			}
		}), func(f *Facts) {
			f.Changed = []Changed{{Model: "m:latest", Place: "system prompt", Kind: "clock", Cost: Cost{Count: 3, Tokens: c.tokens}, Since: start}}
		})
		if found := Examine(facts); len(found) != 1 || found[0].Severity != c.want {
			t.Errorf("%s: want %s: %+v", c.name, c.want, found)
		}
	}
	untold := factsOf(many(4, func(_ int, q *Request) {
		q.Prompt, q.Eval, q.Loaded, q.ByOptions, q.ByNumCtx = 0, 0, true, true, true
	}), nil)
	if found := Examine(untold); len(found) != 1 || found[0].Severity != Medium {
		t.Errorf("loads of which no time is told: %+v", found)
	}
}

// TestUnloadAdvice: a client that unloads its model each time is only advised to stop doing that.
func TestUnloadAdvice(t *testing.T) {
	found := Examine(factsOf(many(4, func(i int, q *Request) {
		if q.OwnKeepAlive, q.KeepAlive = true, 0; i > 0 {
			load(q)
		}
	}), nil))
	if len(found) != 1 || len(found[0].Advice) != 1 || found[0].Advice[0].Set != "" {
		t.Errorf("%+v", found)
	}
}

// headings returns the anchors of docs/doctor.md, as links name them.
func headings(t *testing.T) (places []string) {
	t.Helper()
	text, err := os.ReadFile("../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if title, ok := strings.CutPrefix(line, "## "); ok {
			place := strings.NewReplacer(" ", "-", ",", "", ".", "", "?", "").Replace(strings.ToLower(strings.TrimSpace(title)))
			places = append(places, place)
		}
	}
	return places
}

// TestCauses: why a model was loaded.
func TestCauses(t *testing.T) {
	n := func(q *Request) { q.Model, q.Weights = "n:latest", "sha256-n" }
	elsewhere := func(q *Request) { n(q); q.Upstream = "other" }
	is := func(all ...func(*Request)) func(*Request) {
		return func(q *Request) {
			for _, f := range all {
				f(q)
			}
		}
	}
	for _, c := range []struct {
		name string
		rows []Request
		want Cause // of the last load
		by   string
	}{
		{"first", []Request{asked(0, load)}, CauseFirst, ""},
		{"another num_ctx", []Request{asked(0, load), asked(10, is(load, func(q *Request) { q.ByOptions, q.ByNumCtx = true, true }))}, CauseNumCtx, ""},
		{"another num_gpu", []Request{asked(0, load), asked(10, is(load, func(q *Request) { q.ByOptions = true }))}, CauseOptions, ""},
		{"a restart", []Request{asked(0, load), asked(10, is(load, func(q *Request) { q.Restarted = true }))}, CauseRestarted, ""},
		{"in place of another one", []Request{asked(0, load), asked(10, is(load, n)), asked(20, load)}, CauseEvicted, "n:latest"},
		{"another one was used, and not loaded", []Request{asked(0, n), asked(5, load), asked(10, n), asked(20, load)}, CauseUnknown, ""},
		{"another server's", []Request{asked(0, load), asked(10, is(load, elsewhere)), asked(20, load)}, CauseUnknown, ""},
		{"after its time", []Request{asked(0, func(q *Request) { q.KeepAlive = time.Second }), asked(10, load)}, CauseExpired, ""},
		{"within its time", []Request{asked(0, func(q *Request) { q.KeepAlive = time.Minute }), asked(10, load)}, CauseUnknown, ""},
		{"after it was unloaded", []Request{asked(0, func(q *Request) { q.OwnKeepAlive, q.KeepAlive = true, 0 }), asked(10, load)}, CauseExpired, ""},
		{"by Ollama's own time", []Request{asked(0, func(q *Request) { q.KeepAlive = -1 }), asked(400, load)}, CauseExpired, ""},
		{
			"a client's own time outlasts requests that can state none",
			[]Request{
				asked(0, func(q *Request) { q.OwnKeepAlive, q.KeepAlive = true, 5*time.Second }),
				asked(2, func(q *Request) { q.Foreign = true }), asked(10, load),
			}, CauseExpired, "",
		},
	} {
		found := loadsOf(c.rows)
		got := found[&c.rows[len(c.rows)-1]]
		if got.cause != c.want || got.by != c.by {
			t.Errorf("%s: %q by %q, want %q by %q", c.name, got.cause, got.by, c.want, c.by)
		}
	}
}

// chats returns the chain of a chat.
func chats(t testing.TB, texts ...string) *prefix.Chain {
	t.Helper()
	var messages []map[string]string
	for i, text := range texts {
		role := []string{"user", "assistant"}[i%2]
		if text == "system" {
			role = "system"
		}
		messages = append(messages, map[string]string{"role": role, "content": text})
	}
	body, err := json.Marshal(map[string]any{"model": "m", "messages": messages})
	if err != nil {
		t.Fatal(err)
	}
	chain := prefix.NewReader().Read(prefix.Chat, "m:latest", body)
	return &chain
}

// TestTurns: the text that a prompt shares, further down, with the previous one.
func TestTurns(t *testing.T) {
	long := func(i int) string { return strings.Repeat(fmt.Sprintf("This is message number %d. ", i), 30) }
	a, b, c, d, e, f, g := long(1), long(2), long(3), long(4), long(5), long(6), long(7)
	edited := c[:300] + "But not quite. " + c[300:]
	for _, x := range []struct {
		name        string
		before, now []string
		want        bool
	}{
		{"it goes on", []string{"system", a, b, c}, []string{"system", a, b, c, d, e}, false},
		{"the oldest turn is gone", []string{"system", a, b, c, d, e}, []string{"system", c, d, e, f, g}, true},
		{"… without a system prompt", []string{a, b, c, d, e}, []string{c, d, e, f, g}, true},
		{"… and nothing new has come", []string{"system", a, b, c, d, e}, []string{"system", c, d, e}, false},
		{"most turns are gone", []string{"system", a, b, c, d, e}, []string{"system", e, f, g}, false},
		{"a turn was edited", []string{"system", a, b, c, d, e}, []string{"system", edited, d, e, f, g}, false},
		{"another chat", []string{"system", a, b, c}, []string{"system", d, e, f}, false},
		{"the first one", nil, []string{"system", a, b, c}, false},
		{"it says the same again", []string{"system", a, a, a}, []string{"system", a, a, a, a, a}, false},
	} {
		r := NewRecorder(start)
		if len(x.before) > 0 {
			r.Turns(1, chats(t, x.before...))
		}
		r.Turns(2, chats(t, x.before...)) // of another conversation
		now := chats(t, x.now...)
		got := r.Turns(1, now)
		if (got.Bytes > 0) != x.want {
			t.Errorf("%s: %+v", x.name, got)
		}
		if x.want && (got.After != len(f)+len(g) || got.Bytes != len(c)+len(d)+len(e)) {
			t.Errorf("%s: %+v of %d bytes", x.name, got, now.Bytes())
		}
	}
}

// TestRecorderIsBounded: what a recorder keeps, and the time from which on that is complete.
func TestRecorderIsBounded(t *testing.T) {
	r := NewRecorder(start)
	for i := range remembered + 10 {
		r.Add(asked(float64(i), nil))
	}
	f := r.Facts(at(20_000), time.Time{})
	if f.Requests != remembered || !f.Since.Equal(at(11)) {
		t.Errorf("%d requests since %v", f.Requests, f.Since)
	}
	if f = r.Facts(at(remembered+10), at(remembered)); f.Requests != 10 || !f.Since.Equal(at(remembered)) {
		t.Errorf("of the last ten seconds: %d requests since %v", f.Requests, f.Since)
	}
	for i := range 2 * maxOutside {
		r.AddOutside(Outside{At: at(float64(i)), Upstream: "u", Model: "m"})
	}
	if n := len(r.outside); n != maxOutside {
		t.Errorf("%d signs", n)
	}
	for i := range uint64(2 * maxFlows) {
		r.Turns(i, chats(t, "system", "a", "b"))
	}
	if n := r.turns.Len(); n != maxFlows {
		t.Errorf("%d conversations", n)
	}
	f = aggregate(many(200, func(i int, q *Request) {
		q.Client, q.Truncated = fmt.Sprintf("%08d", i), true
	}), nil)
	if m := f.Models[0]; len(m.Askers) != mostAskers || len(m.Cut.By) != mostBy {
		t.Errorf("%d askers, of %d it is said that they send what is cut", len(m.Askers), len(m.Cut.By))
	}
}

// TestLanes: how many requests ran and waited at a time.
func TestLanes(t *testing.T) {
	one := func(arrived, sent, ended float64, batch bool) *Request {
		q := asked(0, func(q *Request) { q.Arrived, q.Sent, q.Ended, q.Batch = at(arrived), at(sent), at(ended), batch })
		return &q
	}
	got := lanesOf([]*Request{one(0, 0, 2, false), one(0, 2, 4, false), one(1, 2, 5, true), one(4, 4, 6, false)})
	want := Lanes{Requests: 3, Waited: 1, Seconds: 2, Service: 6, Busy: 2, Wanted: 2}
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestChangedOf: the sums of the last requests by place.
func TestChangedOf(t *testing.T) {
	place := func(kind string, b int) *EntryPlace {
		return &EntryPlace{Place: "system prompt", Byte: b, Kind: kind, Tokens: 100}
	}
	got := ChangedOf([]Entry{
		{At: at(9), Model: "m:latest", Changed: place("clock", 70)},
		{At: at(8), Model: "m:latest", Changed: place("clock", 64)},
		{At: at(7), Model: "m:latest"},
		{At: at(6), Model: "m:latest", Changed: place("uuid", 1)},
		{At: at(5), Model: "n:latest", Changed: place("clock", 64)},
		{At: at(1), Model: "m:latest", Changed: place("clock", 3)},
	}, at(2))
	want := []Changed{
		{Model: "m:latest", Place: "system prompt", Kind: "clock", Byte: 64, Cost: Cost{Count: 2, Tokens: 200}, Since: at(2)},
		{Model: "m:latest", Place: "system prompt", Kind: "uuid", Byte: 1, Cost: Cost{Count: 1, Tokens: 100}, Since: at(2)},
		{Model: "n:latest", Place: "system prompt", Kind: "clock", Byte: 64, Cost: Cost{Count: 1, Tokens: 100}, Since: at(2)},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestReport: the text that is printed, and the JSON for programs. To write the files anew:
// DOCTOR_UPDATE=1 go test ./doctor
func TestReport(t *testing.T) {
	t.Setenv("TZ", "UTC")
	rows := many(6, func(i int, q *Request) {
		q.NumCtx = []int{0, 8192}[i%2]
		q.Agent = []string{"openai-python", "ollama-python/0.6.1"}[i%2]
		if i > 0 {
			load(q)
			q.ByOptions, q.ByNumCtx = true, true
		}
	})
	f := factsOf(rows, func(f *Facts) {
		f.Loaded = map[string][]Resident{"upstream": {{"m:latest", 6 << 30, 4 << 30, 8192}}}
		f.Since = start.Local()
	})
	report := NewReport(f)
	var text bytes.Buffer
	if err := report.Write(&text); err != nil {
		t.Fatal(err)
	}
	report.Since, report.Now = report.Since.UTC(), report.Now.UTC()
	indented, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	written := strings.ReplaceAll(text.String(), start.Local().Format(time.DateTime), start.Format(time.DateTime))
	for name, got := range map[string]string{"report.txt": written, "report.json": string(indented) + "\n"} {
		path := filepath.Join("testdata", name)
		if os.Getenv("DOCTOR_UPDATE") != "" {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil || got != string(want) {
			t.Errorf("%s: %v\n%s", path, err, got)
		}
	}
	for line := range strings.Lines(written) {
		if n := len([]rune(line)); n > width+2 && !strings.Contains(line, "finding") {
			t.Errorf("%d characters: %s", n, line)
		}
	}
}

// BenchmarkRecorder is the cost of the recorder for one request of a chat with 64 messages.
func BenchmarkRecorder(b *testing.B) {
	var texts []string
	for i := range 64 {
		texts = append(texts, strings.Repeat(fmt.Sprintf("This is message number %d. ", i), 20))
	}
	chain, r, q := chats(b, texts...), NewRecorder(start), asked(0, nil)
	b.ReportAllocs()
	for b.Loop() {
		q.Moved = r.Turns(1, chain)
		r.Add(q)
	}
}

// BenchmarkFacts is the cost of one look at the page, with a full recorder.
func BenchmarkFacts(b *testing.B) {
	r := NewRecorder(start)
	for i := range remembered {
		r.Add(asked(float64(i), func(q *Request) { q.Conversation, q.Loaded = uint64(i%500), i%10 == 0 }))
	}
	b.ReportAllocs()
	for b.Loop() {
		Examine(r.Facts(at(20_000), time.Time{}))
	}
}
