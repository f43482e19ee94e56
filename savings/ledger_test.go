package savings

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// engineSim is an inference engine as the ledger sees it: slots that keep the tokens of their last
// prompt and answer, a host cache for prompts that lost their slot, and evaluation times with
// noise. A word is a token.
type engineSim struct {
	r     *rand.Rand
	slots [][]string // least recently used first
	host  bool       // there is a host cache
	saved [][]string
	noise float64 // 0.3 means up to 30 % slower than the machine can be
	rate  float64 // ms per token
	load  time.Duration
	opts  string // of the current load; "" if nothing is loaded
	// busy, if not nil, returns the factors by which other work on the machine slows down the next
	// evaluation, and the tokens of its answer.
	busy func() (prompt, answer float64)
}

type msg struct{ role, content string }

func common(a, b []string) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// run evaluates a prompt and generates that many tokens.
func (s *engineSim) run(opts string, messages []msg, generate int) (a Answer, reused int, answer string) {
	a.Load = 2 * time.Millisecond
	if s.opts != opts {
		for i := range s.slots {
			s.slots[i] = nil
		}
		s.saved, s.opts = nil, opts
		a.Load = s.load
	}
	var tokens []string
	for _, m := range messages {
		tokens = append(append(append(tokens, "<s>", m.role, "\n"), strings.Fields(m.content)...), "<e>", "\n")
	}
	tokens = append(tokens, "<s>", "assistant", "\n")
	best := 0
	for i := range s.slots {
		if common(s.slots[i], tokens) > common(s.slots[best], tokens) {
			best = i
		}
	}
	if s.host {
		for i, kept := range s.saved {
			if common(kept, tokens) > common(s.slots[best], tokens) {
				s.slots[best], s.saved[i] = kept, s.slots[best]
			}
		}
	}
	slot := s.slots[best]
	reused = min(common(slot, tokens), len(tokens)-1)
	if s.host && reused < len(slot)/2 {
		s.saved = append(s.saved, slot)
	}
	words := make([]string, generate)
	for i := range words {
		words[i] = fmt.Sprintf("answer%d", s.r.IntN(1000))
	}
	s.slots = append(slices.Delete(s.slots, best, best+1), append(tokens, words...))
	ms := (10 + s.rate*float64(len(tokens)-reused)*(1+float64(len(tokens))/8000)) * (1 + s.noise*s.r.Float64())
	a.Done, a.Total, a.Generated = true, len(tokens), generate
	a.PromptEval = time.Duration(ms * float64(time.Millisecond))
	a.Eval = time.Duration(generate) * 20 * time.Millisecond
	if s.busy != nil {
		prompt, answer := s.busy()
		a.PromptEval = time.Duration(prompt * float64(a.PromptEval))
		a.Eval = time.Duration(answer * float64(a.Eval))
	}
	a.TotalTime = a.Load + a.PromptEval + a.Eval + 3*time.Millisecond
	return a, reused, strings.Join(words, " ")
}

// figures compare a ledger with the simulated engine.
type figures struct {
	requests, right   int
	evaluated, ledger int // tokens of the requests that have a figure
	unknown           int
	reasons           map[Reason]int
}

func (f figures) off() float64 { return float64(f.ledger-f.evaluated) / float64(f.evaluated) }

// told returns the number of verdicts other than unknown.
func (f figures) told() int { return f.requests - f.unknown }

func (f *figures) add(g figures) {
	f.requests += g.requests
	f.right += g.right
	f.evaluated += g.evaluated
	f.ledger += g.ledger
	f.unknown += g.unknown
	for reason, n := range g.reasons {
		f.reasons[reason] += n
	}
}

// modelKey is the model of all requests.
var modelKey = upstream.ModelKey("m")

// bench connects a ledger with an engine.
type bench struct {
	t      *testing.T
	ledger *Ledger
	book   *runners.Book
	sim    *engineSim
	up     Upstream
	now    time.Time
	reader *prefix.Reader
	figures
	last    Entry
	sliding bool
	silent  bool // wrong verdicts are counted, not logged
	answer  int  // tokens of an answer
}

func newBench(t *testing.T, seed uint64, slots int, host bool) *bench {
	store := contextstore.NewMemory(contextstore.Limits{Entries: 100000, Bytes: 64 << 20})
	return &bench{
		t: t, ledger: New(store, 1000), book: runners.New(nil, nil), reader: prefix.NewReader(), now: time.Unix(1e9, 0),
		up:      Upstream{Name: "sim", Old: !host},
		sim:     &engineSim{r: rand.New(rand.NewPCG(seed, 9)), slots: make([][]string, slots), host: host, noise: 0.4, rate: 1, load: 500 * time.Millisecond},
		figures: figures{reasons: map[Reason]int{}}, answer: 8,
	}
}

// chat sends a request and returns the answer's text.
func (b *bench) chat(opts string, messages ...msg) string {
	b.t.Helper()
	list := make([]map[string]string, len(messages))
	for i, m := range messages {
		list[i] = map[string]string{"role": m.role, "content": m.content}
	}
	options := map[string]any{}
	if opts != "default" {
		options["num_ctx"] = json.RawMessage(opts)
	}
	body, err := json.Marshal(map[string]any{"model": "m", "messages": list, "options": options})
	if err != nil {
		b.t.Fatal(err)
	}
	chain := b.reader.Read(prefix.Chat, modelKey, body)
	r := b.send(&chain)
	a, reused, text := b.sim.run(opts, messages, b.answer)
	b.now = b.now.Add(a.TotalTime)
	entry, ok := b.end(r, Outcome{Answer: a, OK: true, FirstByte: a.Load + a.PromptEval, Duration: a.TotalTime})
	if !ok {
		b.t.Fatal("no entry")
	}
	b.now = b.now.Add(time.Second)
	b.requests++
	if entry.Tokens == nil {
		b.unknown++
	} else {
		b.evaluated += a.Total - reused
		b.figures.ledger += entry.Tokens.Evaluated
	}
	if want := VerdictOf(a.Total, reused); entry.Verdict == want {
		b.right++
	} else if !b.silent {
		b.t.Logf("request %d: %v (%s), is %v: total %d, reused %d, told %+v, expected %d", b.requests, entry.Verdict, entry.Reason, want, a.Total, reused, entry.Tokens, entry.Expected)
	}
	b.reasons[entry.Reason]++
	b.last = entry
	return text
}

// check requires, on a quiet machine, that at most 5 % of the verdicts are wrong, and at most 5 %
// unknown.
func (b *bench) check(name string) {
	b.t.Helper()
	b.t.Logf("%s: %d requests, %d unknown; of the others %d evaluated, estimated %d (%+.1f %%), %d classified right, reasons %v",
		name, b.requests, b.unknown, b.evaluated, b.figures.ledger, 100*b.off(), b.right, b.reasons)
	if !b.honest() || b.unknown*100 > b.requests*5 {
		b.t.Errorf("%s: %d of %d unknown, %+.1f %% off, %d of %d right",
			name, b.unknown, b.requests, 100*b.off(), b.right, b.told())
	}
}

// honest reports whether the reported figures are right: the sum of tokens and the verdicts within
// 5 %.
func (f figures) honest() bool {
	return f.off() <= 0.05 && f.off() >= -0.05 && f.right*100 >= f.told()*95
}

var vocabulary = strings.Fields("the candidate has five years of experience with distributed systems, SQL and Kubernetes; prefers remote work. Score: 1-10 {\"id\": 17, \"name\": \"Ada\"} and explain why in one sentence please")

func prose(r *rand.Rand, n int) string {
	w := make([]string, n)
	for i := range w {
		w[i] = vocabulary[r.IntN(len(vocabulary))]
	}
	return strings.Join(w, " ")
}

func TestEstimateSamePrefix(t *testing.T) {
	for seed := range uint64(5) {
		b := newBench(t, seed, 1, false)
		rubric := prose(b.sim.r, 1000)
		for range 20 {
			b.chat("default", msg{"user", rubric + "\n" + prose(b.sim.r, 20+b.sim.r.IntN(60))})
		}
		b.check("same prefix")
		if b.reasons[ReasonFirst] != 1 {
			t.Errorf("reasons %v", b.reasons)
		}
	}
}

func TestEstimateInterleaved(t *testing.T) {
	for _, c := range []struct {
		slots int
		host  bool
	}{{1, false}, {4, false}, {1, true}, {4, true}} {
		for seed := range uint64(5) {
			b := newBench(t, seed, c.slots, c.host)
			var rubrics []string
			for range 4 {
				rubrics = append(rubrics, prose(b.sim.r, 600+b.sim.r.IntN(600)))
			}
			for i := range 40 {
				b.chat("default", msg{"system", rubrics[i%4]}, msg{"user", prose(b.sim.r, 20+b.sim.r.IntN(60))})
			}
			b.check(fmt.Sprintf("interleaved, %d slots, host cache %v", c.slots, c.host))
			if c.slots == 1 && !c.host && b.reasons[ReasonTaken] < 30 {
				t.Errorf("reasons %v", b.reasons)
			}
		}
	}
}

func TestEstimateChats(t *testing.T) {
	for _, host := range []bool{false, true} {
		all := newBench(t, 0, 1, host)
		for seed := range uint64(5) {
			b := newBench(t, seed, 1, host)
			system := msg{"system", prose(b.sim.r, 400)}
			chats := make([][]msg, 3)
			for range 6 {
				for i := range chats {
					if chats[i] == nil {
						chats[i] = []msg{system}
					}
					chats[i] = append(chats[i], msg{"user", prose(b.sim.r, 40+b.sim.r.IntN(100))})
					chats[i] = append(chats[i], msg{"assistant", b.chat("default", chats[i]...)})
				}
			}
			all.add(b.figures)
		}
		all.check(fmt.Sprintf("chats, host cache %v", host))
	}
}

func TestReloads(t *testing.T) {
	b := newBench(t, 1, 1, true)
	system := msg{"system", prose(b.sim.r, 500)}
	for i := range 10 {
		b.chat([]string{"8192", "default"}[i%2], system, msg{"user", prose(b.sim.r, 30)})
	}
	b.check("reloads")
	if b.reasons[ReasonReloaded] != 9 || !strings.Contains(b.last.Detail, "num_ctx from 8192 to default") || !b.last.Loaded {
		t.Errorf("reasons %v, last %+v", b.reasons, b.last)
	}
}

func TestLost(t *testing.T) {
	for why, want := range map[Lost]Reason{LostUnloaded: ReasonEvicted, LostRestart: ReasonRestart} {
		b := newBench(t, 1, 1, true)
		system := msg{"system", prose(b.sim.r, 500)}
		b.chat("default", system, msg{"user", "one"})
		b.chat("default", system, msg{"user", "two"})
		b.lose(why)
		b.sim.opts = ""
		b.chat("default", system, msg{"user", "three"})
		if b.last.Reason != want || b.last.Verdict != Cold {
			t.Errorf("%s: %+v", why, b.last)
		}
		b.chat("default", system, msg{"user", "four"})
		if b.last.Verdict != Hit {
			t.Errorf("after %s: %+v", why, b.last)
		}
	}
	b := newBench(t, 1, 1, true)
	system := msg{"system", prose(b.sim.r, 500)}
	b.chat("default", system, msg{"user", "one"})
	b.ledger.Forget(0, modelKey)
	b.sim.opts = ""
	b.chat("default", system, msg{"user", "one"})
	if b.last.Reason != ReasonFirst || b.last.Shared != 0 {
		t.Errorf("another model of that name: %+v", b.last)
	}
}

// TestUnknown: before anything is learned the ledger reports unknown, not 0.
func TestUnknown(t *testing.T) {
	b := newBench(t, 1, 1, true)
	b.sim.opts = "default" // others loaded and used it before the proxy started
	b.chat("default", msg{"user", prose(b.sim.r, 500)})
	if b.last.Basis != Unknown || b.last.Tokens != nil || b.last.Verdict != Uncertain || b.last.ExpectedKnown || b.last.Total == 0 {
		t.Errorf("%+v", b.last)
	}
	for range 4 {
		b.chat("default", msg{"user", prose(b.sim.r, 500)})
	}
	if b.last.Basis != Estimated {
		t.Errorf("after five requests: %+v", b.last)
	}
}

// TestMeasured: what the server reports is the figure, and the estimate is kept beside it.
func TestMeasured(t *testing.T) {
	b := newBench(t, 1, 1, true)
	r := b.begin(msg{"user", "hello there"})
	entry, _ := b.end(r, Outcome{OK: true, Answer: Answer{Done: true, Total: 100, Cached: 0, CachedKnown: true, Load: time.Second, PromptEval: time.Second}})
	if entry.Basis != Measured || *entry.Tokens != (Tokens{0, 100}) || entry.Verdict != Cold || entry.Reason != ReasonFirst || !entry.Loaded {
		t.Errorf("%+v", entry)
	}
	r = b.begin(msg{"user", "hello there"})
	entry, _ = b.end(r, Outcome{OK: true, Answer: Answer{Done: true, Total: 100, Cached: 99, CachedKnown: true, Load: time.Millisecond, PromptEval: 10 * time.Millisecond}})
	if *entry.Tokens != (Tokens{99, 1}) || entry.Verdict != Hit || entry.Reason != "" || entry.Estimate == nil {
		t.Errorf("%+v", entry)
	}
	if entry.SavedEvaluation < 500*time.Millisecond {
		t.Errorf("99 tokens at 10 ms saved %v", entry.SavedEvaluation)
	}
}

func (b *bench) begin(messages ...msg) *Request {
	list := make([]map[string]string, len(messages))
	for i, m := range messages {
		list[i] = map[string]string{"role": m.role, "content": m.content}
	}
	body, err := json.Marshal(map[string]any{"model": "m", "messages": list})
	if err != nil {
		b.t.Fatal(err)
	}
	chain := b.reader.Read(prefix.Chat, modelKey, body)
	return b.send(&chain)
}

func (b *bench) send(chain *prefix.Chain) *Request {
	o := chain.Runner
	w := b.book.Wanted(o.Model, "", &o)
	w.Sliding = b.sliding
	return b.ledger.Begin(b.now, b.up, chain, b.book.Begin(b.now, w))
}

// end ends a request now.
func (b *bench) end(r *Request, o Outcome) (Entry, bool) {
	o.sane()
	o.Ending = r.run.End(b.now, runners.Outcome{
		Refused: o.Refused, Accepted: o.OK, Load: o.Load, Unload: o.DoneReason == "unload",
	})
	return r.End(b.now, o)
}

// lose makes the server lose what it holds; everything, if it was restarted.
func (b *bench) lose(why Lost) {
	if why == LostRestart {
		b.book.Restarted()
		b.ledger.Lose(0, "", why)
		return
	}
	b.book.Unloaded(modelKey)
	b.ledger.Lose(0, modelKey, why)
}

// TestTruncated: a prompt that was cut is flagged, and is not expected to be warm.
func TestTruncated(t *testing.T) {
	b := newBench(t, 1, 1, true)
	for range 4 {
		b.chat("default", msg{"user", prose(b.sim.r, 300)})
	}
	b.book.Listed([]upstream.Loaded{{Name: "m", ContextLength: 1000}}, b.now)
	long := prose(b.sim.r, 3000)
	r := b.begin(msg{"user", long})
	entry, _ := b.end(r, Outcome{OK: true, Answer: Answer{Done: true, Total: 1000, Load: time.Millisecond, PromptEval: time.Second}})
	if !entry.Truncated {
		t.Errorf("%+v", entry)
	}
	if r = b.begin(msg{"user", long + " more"}); r.Expected > 50 {
		t.Errorf("%d tokens of a prompt that was cut are expected to be warm", r.Expected)
	}
}

// TestAborted: nothing is known of a request without an end, and its prompt does not count as warm.
func TestAborted(t *testing.T) {
	b := newBench(t, 1, 1, true)
	system := msg{"system", prose(b.sim.r, 500)}
	b.chat("default", msg{"user", "something else"})
	r := b.begin(system)
	entry, ok := b.end(r, Outcome{})
	if !ok || !entry.Broken || entry.Basis != Unknown || entry.Tokens != nil || entry.Verdict != Uncertain {
		t.Errorf("an aborted request: %v, %+v", ok, entry)
	}
	// The client left, but only after the counts had arrived.
	o := told(500, 500)
	o.OK = false
	if entry, _ = b.end(b.begin(msg{"user", "left"}), o); entry.Broken || entry.Total != 500 {
		t.Errorf("a request that was counted before its client left: %+v", entry)
	}
	if r = b.begin(system); r.Expected > 0 {
		t.Errorf("%d tokens expected", r.Expected)
	}
	var none *Request
	if _, ok := none.End(b.now, Outcome{}); ok {
		t.Error("an entry of no request")
	}
}

func TestRecent(t *testing.T) {
	store := contextstore.NewMemory(contextstore.Limits{Entries: 10, Bytes: 1 << 20})
	b := newBench(t, 1, 1, true)
	b.ledger = New(store, 3)
	for i := range 5 {
		b.chat("default", msg{"user", fmt.Sprint(i)})
		var ids []uint64
		for _, e := range b.ledger.Recent(100) {
			ids = append(ids, e.ID)
		}
		want := []uint64{5, 4, 3, 2, 1}[4-i:]
		if want = want[:min(3, len(want))]; !slices.Equal(ids, want) {
			t.Errorf("after %d: %v, want %v", i+1, ids, want)
		}
	}
	if len(b.ledger.Recent(1)) != 1 || len(New(store, 0).Recent(5)) != 0 {
		t.Error("Recent ignores its limit")
	}
}

// TestSliding: for a sliding-window model on a server before 0.30, a prompt that diverges from the
// last one is expected to reuse nothing, and has that reason; a prompt that continues the last one
// is warm.
func TestSliding(t *testing.T) {
	b := newBench(t, 1, 1, false)
	system := msg{"system", prose(b.sim.r, 500)}
	first := []msg{system, {"user", "one"}}
	answer := b.chat("default", first...)
	b.sliding = true
	more := append(slices.Clone(first), msg{"assistant", answer}, msg{"user", "go on"})
	if r := b.begin(more...); r.Expected < 500 {
		t.Errorf("%d tokens expected of what continues the last prompt", r.Expected)
	}
	r := b.begin(system, msg{"user", "two"})
	if r.Expected != 0 || !r.ExpectedKnown {
		t.Errorf("%d tokens expected", r.Expected)
	}
	entry, _ := b.end(r, Outcome{OK: true, Answer: Answer{Done: true, Total: 510, Load: time.Millisecond, PromptEval: 500 * time.Millisecond}})
	if entry.Verdict != Cold || entry.Reason != ReasonSliding {
		t.Errorf("%+v", entry)
	}
}

// TestAttached: if the server does not report what it reused, a prompt with an attached state is
// judged by its time; a prompt without one, after a load, is certainly cold.
func TestAttached(t *testing.T) {
	for _, w := range []struct {
		attached, evaluated int
		verdict             Verdict
	}{{0, 510, Cold}, {500, 10, Hit}, {500, 510, Uncertain}} { // a busy machine takes as long for what is warm
		b := newBench(t, 1, 1, false)
		system := msg{"system", prose(b.sim.r, 500)}
		for range 5 { // show how fast the machine is
			b.end(b.begin(msg{"system", prose(b.sim.r, 500)}, msg{"user", "first"}), told(510, 510))
		}
		r := b.begin(system, msg{"user", "one"})
		if r.Attached(w.attached); w.attached > 0 && (r.Expected != w.attached || !r.ExpectedKnown) {
			t.Errorf("%+v: %d tokens are expected", w, r.Expected)
		}
		o := told(510, w.evaluated)
		o.Ending.Loaded = true
		if entry, _ := b.end(r, o); entry.Verdict != w.verdict || entry.Basis == Measured {
			t.Errorf("%+v: %s %s, %+v", w, entry.Basis, entry.Verdict, entry.Tokens)
		}
	}
}

// TestStoreAfterLoad: prompts that were warm before a load are not warm after it, nor is the
// store's record.
func TestStoreAfterLoad(t *testing.T) {
	b := newBench(t, 1, 1, true)
	system := msg{"system", prose(b.sim.r, 500)}
	b.chat("default", system, msg{"user", "one"})
	r := b.begin(system, msg{"user", "x"})
	if !r.record.Warm {
		t.Fatalf("%+v", r.record)
	}
	b.end(r, Outcome{})
	b.chat("8192", msg{"user", "another prompt, with other options"})
	if r = b.begin(system, msg{"user", "y"}); r.record.Warm || r.known < 3 {
		t.Errorf("%d links known, %+v", r.known, r.record)
	}
}

// told is the answer of an upstream that does not report what it reused: a token takes a
// millisecond.
func told(total, evaluated int) Outcome {
	return Outcome{OK: true, Answer: Answer{Done: true, Total: total, Load: time.Millisecond, PromptEval: time.Duration(10+evaluated) * time.Millisecond, TotalTime: time.Minute}}
}

// TestShortPrompt: a short prompt, most of whose tokens are the template's, does not make longer
// ones look cut.
func TestShortPrompt(t *testing.T) {
	b := newBench(t, 1, 1, true)
	for range 5 {
		b.end(b.begin(msg{"user", "hi"}), told(36, 36))
	}
	b.book.Listed([]upstream.Loaded{{Name: "m", ContextLength: 4096}}, b.now)
	long := msg{"user", prose(b.sim.r, 1400)}
	for i := range 5 {
		evaluated := 1500
		if i > 0 {
			evaluated = 10
		}
		entry, _ := b.end(b.begin(long, msg{"user", fmt.Sprint(i)}), told(1500, evaluated))
		if entry.Truncated || i > 0 && entry.Verdict != Hit {
			t.Errorf("request %d: %+v, %+v", i, entry, entry.Tokens)
		}
	}
}

// TestAbortedThenWarm: what an aborted request left warm is not reported as evaluated, and the
// ledger learns nothing wrong from it.
func TestAbortedThenWarm(t *testing.T) {
	b := newBench(t, 1, 1, true)
	first := told(1500, 1500)
	first.Load = time.Second // so that everything it holds is known
	b.end(b.begin(msg{"user", prose(b.sim.r, 1400)}), first)
	for range 4 {
		b.now = b.now.Add(time.Minute)
		prompt := msg{"user", prose(b.sim.r, 1400)}
		b.end(b.begin(prompt), Outcome{})
		entry, ok := b.end(b.begin(prompt), told(1500, 10))
		if !ok || entry.Tokens != nil && entry.Tokens.Evaluated > 200 {
			t.Errorf("%+v, %+v", entry, entry.Tokens)
		}
	}
	entry, _ := b.end(b.begin(msg{"user", prose(b.sim.r, 1400)}), told(1500, 1500))
	if entry.Verdict != Cold {
		t.Errorf("a cold one: %+v, %+v", entry, entry.Tokens)
	}
}

// TestAbsurdTimes: an upstream's absurd times are bounded in the ledger's entries.
func TestAbsurdTimes(t *testing.T) {
	b := newBench(t, 1, 1, true)
	for _, d := range []time.Duration{1 << 62, -1, 0, 1} {
		for range 2 {
			o := told(1000, 1000)
			o.PromptEval, o.Load, o.Eval, o.TotalTime, o.Cached, o.CachedKnown = d, d, d, d, 999, true
			entry, _ := b.end(b.begin(msg{"user", prose(b.sim.r, 900)}), o)
			if entry.SavedEvaluation < 0 || entry.SavedEvaluation > maxTime || entry.SavedLoading < 0 || entry.Queue < 0 || entry.Load > maxTime {
				t.Errorf("%v: %+v", d, entry)
			}
		}
	}
}

// TestBurst: of siblings that arrive at once, the first is the first seen, and no prompt took the
// others' slot.
func TestBurst(t *testing.T) {
	b := newBench(t, 1, 4, true)
	b.chat("default", msg{"user", prose(b.sim.r, 900)})
	rubric := prose(b.sim.r, 1400)
	var list []*Request
	for i := range 3 {
		list = append(list, b.begin(msg{"user", rubric + fmt.Sprint(i)}))
	}
	for i, r := range list {
		b.now = b.now.Add(time.Second)
		o := told(1500, 1500)
		o.CachedKnown = true
		entry, _ := b.end(r, o)
		want := ReasonBeside
		if i == 0 {
			want = ReasonFirst
		}
		if entry.Reason != want {
			t.Errorf("request %d: %s (%s), want %s", i, entry.Reason, entry.Detail, want)
		}
	}
}

// TestSavedLoading: a load is counted as saved once, by the first request after the pause.
func TestSavedLoading(t *testing.T) {
	b := newBench(t, 1, 1, true)
	b.chat("default", msg{"user", prose(b.sim.r, 900)}) // loads
	b.now = b.now.Add(time.Hour)
	b.end(b.begin(msg{"user", "refused"}), Outcome{Refused: true})
	var list []*Request
	for i := range 3 {
		list = append(list, b.begin(msg{"user", fmt.Sprint(i)}))
	}
	var saved time.Duration
	for _, r := range list {
		entry, _ := b.end(r, told(20, 20))
		saved += entry.SavedLoading
	}
	if saved != b.sim.load {
		t.Errorf("saved %v, a load takes %v", saved, b.sim.load)
	}
}

// TestLoadReasons: each load is reported once, with its reason.
func TestLoadReasons(t *testing.T) {
	b := newBench(t, 1, 1, true)
	system := msg{"system", prose(b.sim.r, 500)}
	b.chat("default", system, msg{"user", "one"})
	b.lose(LostRestart)
	b.sim.opts = ""
	b.chat("default", system, msg{"user", "two"})
	b.sim.opts = "" // it expires
	b.chat("default", system, msg{"user", "three"})
	if b.last.Reason != ReasonEvicted {
		t.Errorf("the second load after a restart: %+v", b.last)
	}

	// A request that unloads the model states no options; that does not mean the default ones.
	b.chat("8192", system, msg{"user", "four"})
	body := []byte(`{"model":"m","keep_alive":0}`)
	chain := b.reader.Read(prefix.Generate, modelKey, body)
	b.end(b.send(&chain), Outcome{OK: true, Answer: Answer{DoneReason: "unload"}})
	b.lose(LostUnloaded)
	b.sim.opts = ""
	b.chat("8192", system, msg{"user", "five"})
	if b.last.Reason != ReasonEvicted || strings.Contains(b.last.Detail, "num_ctx") {
		t.Errorf("after an unload: %+v", b.last)
	}

	// Two requests under way at once, with different options, make two loads.
	x, y := b.begin(system, msg{"user", "x"}), b.begin(system, msg{"user", "y"}) // default options
	o := told(520, 520)
	o.Load = time.Second
	b.now = b.now.Add(2 * time.Second)
	ex, _ := b.end(x, o)
	b.sim.opts = "default"
	b.chat("8192", system, msg{"user", "z"})
	b.now = b.now.Add(2 * time.Second)
	o.Load = b.now.Sub(y.at)
	ey, _ := b.end(y, o)
	if !ex.Loaded || !b.last.Loaded || !ey.Loaded || !strings.Contains(ey.Detail, "num_ctx from 8192 to default") {
		t.Errorf("loads %v, %v, %v; %q", ex.Loaded, b.last.Loaded, ey.Loaded, ey.Detail)
	}
}

// TestNothingCounted: if an answer lacks the counts that it should have, its evaluated tokens are
// unknown.
func TestNothingCounted(t *testing.T) {
	b := newBench(t, 1, 1, true)
	b.chat("default", msg{"user", prose(b.sim.r, 900)})
	prompt := msg{"user", prose(b.sim.r, 900)}
	entry, _ := b.end(b.begin(prompt), Outcome{OK: true, Counted: true})
	if !entry.Broken || entry.Basis != Unknown {
		t.Errorf("%+v", entry)
	}
	if r := b.begin(prompt); r.Expected > 50 {
		t.Errorf("%d tokens expected", r.Expected)
	}
}
