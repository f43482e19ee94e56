package attach

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// A group's life: two requests as they came, sixteen by turns, then with stored context, but for a check now and then.
func TestGroup(t *testing.T) {
	for name, f := range map[string]*fakeOllama{
		"plain tokenizer":  {},
		"with a BOS token": {bos: true},
		"no tail": {bos: true, template: func(system, prompt string) string {
			return system + prompt
		}},
		"faster": {attachedTakes: -time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, f)
			var sent []bool
			for n := range 30 {
				sent = append(sent, b.ask(bodyOf(n, `,"system":"You grade.","keep_alive":"5m","options":{"temperature":0}`)))
			}
			turns, checked := 0, 0
			for n, attached := range sent {
				switch {
				case n < 2 && attached:
					t.Errorf("request %d was attached before anything was known", n)
				case n >= 2 && n < 18 && attached:
					turns++
				case n >= 18 && !attached:
					checked++
				}
			}
			if checked != 1 { // the 16th since the form was found
				t.Errorf("%d requests not attached after that, want 1", checked)
			}
			if turns != 8 {
				t.Errorf("%d of 16 requests attached while measuring, want 8", turns)
			}
			want := map[string]int{Trusted: 1, NoSlower: 1, Attached: 19}
			if fmt.Sprint(b.outcomes) != fmt.Sprint(want) {
				t.Errorf("outcomes %v, want %v", b.outcomes, want)
			}
			if f.renders != 5 {
				t.Errorf("%d renders for a group, want 5", f.renders)
			}
		})
	}
}

// A template begins to write something else, as with the name of the day. Requests sent as they came show it.
func TestTemplateChanges(t *testing.T) {
	today := "Monday"
	b := newBench(t, &fakeOllama{template: func(system, prompt string) string { return today + chatML(system, prompt) }})
	for n := range 40 {
		b.ask(bodyOf(n, ""))
	}
	if b.got(NoSlower) != 1 {
		t.Fatalf("outcomes %v", b.outcomes)
	}
	today = "Tuesday"
	p := b.Plan(model1, []byte(bodyOf(0, "")))
	for ; p != nil; p = b.Plan(model1, []byte(bodyOf(0, ""))) {
		if p.Body() == nil {
			_, answer := b.answer(t, []byte(bodyOf(0, "")))
			p.Answered(answer)
		}
	}
	if b.got(ContextDiffers) != 1 {
		t.Errorf("outcomes %v", b.outcomes)
	}
}

// What an attached body looks like: the client's, but for four things.
func TestBody(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	const members = `, "System" : "You \u0067rade." ,"x":12345678901234567890,"template":"","keep_alive":null`
	for n := range 20 {
		b.ask(bodyOf(n, members))
	}
	p := b.Plan(model1, []byte(bodyOf(20, members)+" junk"))
	if p == nil || p.Body() == nil {
		t.Fatal("not attached")
	}
	body := string(p.Body())
	context := string(p.form.context)
	rest, _ := p.form.rest(rubric + `number ua said "yes"`)
	want := `{"model":"m","prompt":` + quote(rest) + `,"stream":false, "System" : "" ,"x":12345678901234567890,"template":"","keep_alive":null,"template":"{{ .Prompt }}","context":` + context + `} junk`
	if body != want {
		t.Errorf("got\n%s\nwant\n%s", body, want)
	}
	if !strings.HasSuffix(rest, " said \"yes\"<|im_end|>\n<|im_start|>assistant\n") || len(rest) > 300 {
		t.Errorf("the prompt is %q", rest)
	}
}

// A server or a template that is not what the form needs: attaching is switched off, with the reason, and says so once.
func TestSwitchedOff(t *testing.T) {
	long := strings.Repeat("long and good. ", 60)
	cases := map[string]struct {
		fake     *fakeOllama
		members  string
		want     string
		attached int // at most
	}{
		"rendering fails":            {fake: &fakeOllama{err: errFake}, want: RenderFailed},
		"another text":               {fake: &fakeOllama{lie: func(s string) string { return strings.Replace(s, "Candidate", "candidate", 1) }}, want: TextDiffers},
		"a space more at the start":  {fake: &fakeOllama{lie: func(s string) string { return " " + s }}, want: TextDiffers},
		"something more at the end":  {fake: &fakeOllama{lie: func(s string) string { return s + "\n" }}, want: TextDiffers},
		"context is ignored":         {fake: &fakeOllama{lie: func(s string) string { return s[max(0, strings.LastIndex(s, "<|im_end|>"), len(s)-1):] }}, want: TextDiffers},
		"upper-case template":        {fake: &fakeOllama{template: func(s, p string) string { return strings.ToUpper(p) }}, want: Template},
		"spaces are folded":          {fake: &fakeOllama{template: func(s, p string) string { return chatML(s, strings.ReplaceAll(p, "\n\n", "\n")) }}, want: Template},
		"template counts the prompt": {fake: &fakeOllama{template: func(s, p string) string { return chatML(s, p) + p[len(p)-13:] }}, want: Template},
		"a date in the template":     {fake: &fakeOllama{template: func(s, p string) string { return "Today is 2026-11-25. " + chatML(s, p) }}, want: Template},
		"a date behind the prompt":   {fake: &fakeOllama{template: func(s, p string) string { return chatML(s, p) + "It is 12:15." }}, want: Template},
		"a leading BOS":              {fake: &fakeOllama{template: func(s, p string) string { return "<|begin_of_text|>" + chatML(s, p) }}, want: Template},
		"date, and digits in system": {fake: &fakeOllama{template: func(s, p string) string { return "It is 12:15. " + chatML(s, p) }}, members: `,"system":"Give 10 to 20 points."`, want: Template},
		"no context in the answer":   {fake: &fakeOllama{lieAnswer: func(a *Answer) { a.Context = nil }}, want: ContextDiffers, attached: 1},
		"no tokens in the context":   {fake: &fakeOllama{lieAnswer: func(a *Answer) { a.Context = []byte("[]") }}, want: ContextDiffers, attached: 1},
		"another context":            {fake: &fakeOllama{lieAnswer: func(a *Answer) { a.Context[2]++ }}, want: ContextDiffers, attached: 1},
		"one token more":             {fake: &fakeOllama{lieAnswer: func(a *Answer) { a.PromptTokens++ }}, want: CountDiffers, attached: 1},
		"one token less":             {fake: &fakeOllama{lieAnswer: func(a *Answer) { a.PromptTokens-- }}, want: CountDiffers, attached: 1},
		"one token more, with BOS":   {fake: &fakeOllama{bos: true, lieAnswer: func(a *Answer) { a.PromptTokens++ }}, want: CountDiffers, attached: 1},
		"half the tokens":            {fake: &fakeOllama{lieAnswer: func(a *Answer) { a.PromptTokens /= 2 }}, want: Unverifiable, attached: 8},
		"slower":                     {fake: &fakeOllama{attachedTakes: time.Microsecond}, want: Slower, attached: 8},
		"long system, prompt gone":   {fake: &fakeOllama{template: func(s, p string) string { return s }}, members: `,"system":"` + long + `"`, want: Template},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			b := newBench(t, c.fake)
			b.Log = slog.New(slog.NewTextHandler(&log, nil))
			attached := 0
			for n := range 40 {
				if b.ask(bodyOf(n, c.members)) {
					attached++
				}
			}
			if b.got(c.want) != 1 || b.got(NoSlower) > 0 || b.got(Attached) > c.attached || attached > c.attached {
				t.Errorf("outcomes %v after %d attached requests, want %s once", b.outcomes, attached, c.want)
			}
			if strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), "outcome="+c.want) || strings.Contains(log.String(), "rubric") {
				t.Errorf("the log says %q", log.String())
			}
			if level := "level=WARN"; c.want != Slower && !strings.Contains(log.String(), level) {
				t.Errorf("no warning: %q", log.String())
			}
			if c.fake.renders > 8 {
				t.Errorf("%d renders", c.fake.renders)
			}
			if b.Plan(model1, []byte(bodyOf(0, c.members))) != nil {
				t.Error("still planning")
			}
			b.Forget(model1)
			if b.Plan(model1, []byte(bodyOf(0, c.members))) == nil {
				t.Error("a model that was forgotten is still off")
			}
		})
	}
}

// A group that cannot be used is left alone; other groups of the model are not touched.
func TestUnsuitable(t *testing.T) {
	long := `,"system":"` + strings.Repeat("Reply in one word. ", 40) + `"`
	b := newBench(t, &fakeOllama{})
	for _, word := range []string{"a", "user", "word", "system", "e", "im", "in", "start", "n"} {
		b.ask(promptBody(word, long))
	}
	if b.got(Unsuitable) != 1 || b.renders != 2*maxPairs {
		t.Errorf("outcomes %v after %d renders, want one group unsuitable after %d", b.outcomes, b.renders, 2*maxPairs)
	}
	for n := range 20 {
		b.ask(bodyOf(n, ""))
	}
	if b.got(NoSlower) != 1 {
		t.Errorf("outcomes %v: another group suffered", b.outcomes)
	}
}

// With a template that trims, prompts with outer space are left alone and the others attached.
func TestTrims(t *testing.T) {
	b := newBench(t, &fakeOllama{template: func(s, p string) string { return chatML(s, strings.TrimSpace(p)) }})
	spaced := func(n int) string { return strings.Replace(bodyOf(n, ""), `said \"yes\"`, `said\n \n`, 1) }
	for n := range 40 {
		if b.ask(spaced(n)) {
			t.Fatal("a prompt was attached that the template trims")
		}
		b.ask(bodyOf(n, ""))
	}
	if b.got(NoSlower) != 1 || b.got(Attached) != 28 || b.got(Unsuitable) != 1 || b.renders != 7 {
		t.Errorf("outcomes %v, %d renders", b.outcomes, b.renders)
	}
	// Where the template does not trim, outer space is text like other text.
	b = newBench(t, &fakeOllama{})
	for n := range 20 {
		b.ask(spaced(n))
	}
	if b.got(NoSlower) != 1 {
		t.Errorf("outcomes %v with a template that does not trim", b.outcomes)
	}
}

// Prompts come that share less than the first two did: the group gets another form, a few times.
func TestLessInCommon(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	prompt := func(shared, n int) string {
		text := strings.Repeat("one after the other ", 200)[:shared]
		return promptBody(text+fmt.Sprintf(". Then comes number %c%c, and no more.", 'a'+n%26, 'a'+n/26), "")
	}
	for n := range 20 {
		b.ask(prompt(3000, n))
	}
	first := b.Plan(model1, []byte(prompt(3000, 0)))
	for i := range 8 {
		for n := range 20 {
			b.ask(prompt(2800-200*i, n))
		}
	}
	if b.got(Trusted) != maxForms || b.got(NoSlower) != maxForms || b.renders != 5*maxForms {
		t.Errorf("outcomes %v, %d renders; want %d forms", b.outcomes, b.renders, maxForms)
	}
	last := b.Plan(model1, []byte(prompt(3000, 0)))
	if last == nil || last.Body() == nil || len(last.form.text) >= len(first.form.text) {
		t.Errorf("the form did not become shorter: %d bytes, then %v", len(first.form.text), last)
	}
}

// The cut lies within characters of several tokens.
func TestCharacters(t *testing.T) {
	for _, char := range []string{"é", "語", "😀"} {
		for shift := range 4 {
			b := newBench(t, &fakeOllama{})
			for n := range 20 {
				b.ask(promptBody(fmt.Sprintf("%s%s%c", "abcd"[:shift], strings.Repeat(char, 300), 'e'+n), ""))
			}
			if b.got(NoSlower) != 1 {
				t.Errorf("%s, %d more: outcomes %v after %d renders", char, shift, b.outcomes, b.renders)
			}
		}
	}
}

func TestContextLength(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	loaded := 1 << 20
	b.ContextLength = func(string) int { return loaded }
	for n := range 20 {
		b.ask(bodyOf(n, ""))
		b.ask(bodyOf(n, `,"options":{"num_ctx":8192}`))
	}
	p := b.Plan(model1, []byte(bodyOf(0, "")))
	rest, _ := p.form.rest(rubric + `number aa said "yes"`)
	need := len(p.form.tokens) + len(rest) + minTokens + 1
	for _, c := range []struct {
		loaded  int
		members string
		want    bool
	}{
		{need, "", true},
		{need - 1, "", false},
		{0, "", false}, // unknown
		{0, `,"options":{"num_ctx":8192}`, true},
		{need - 1, `,"options":{"num_ctx":8192}`, false},
	} {
		loaded = c.loaded
		p := b.Plan(model1, []byte(bodyOf(0, c.members)))
		if got := p != nil && p.Body() != nil; got != c.want {
			t.Errorf("context of %d%s: attached %v, want %v", c.loaded, c.members, got, c.want)
		}
	}
}

// A prompt that Ollama cut is no sample: its count is not that of the context.
func TestCutSample(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	for n := range 4 {
		own := []byte(bodyOf(n, ""))
		_, answer := b.answer(t, own)
		answer.PromptTokens /= 2
		b.Plan(model1, own).Answered(answer)
		b.settle()
	}
	if b.renders > 0 || b.groups.Len() > 0 {
		t.Errorf("%d renders, %d groups for prompts that were cut", b.renders, b.groups.Len())
	}
}

// Answers that loaded the model are not measured, and those that broke off are not waited for.
func TestMeasuring(t *testing.T) {
	f := &fakeOllama{attachedTakes: -time.Millisecond}
	b := newBench(t, f)
	for n := range 10 {
		b.ask(bodyOf(n, ""))
	}
	f.load, f.attachedTakes = 200*time.Millisecond, time.Hour
	for n := range 40 {
		b.ask(bodyOf(n, ""))
	}
	for n := range 40 {
		b.Plan(model1, []byte(bodyOf(n, "")))
	}
	f.load, f.attachedTakes = 0, -time.Millisecond
	for n := range 20 {
		b.ask(bodyOf(n, ""))
	}
	if b.got(NoSlower) != 1 || b.got(Slower) > 0 {
		t.Errorf("outcomes %v", b.outcomes)
	}
}

func TestNotLoaded(t *testing.T) {
	f := &fakeOllama{err: fmt.Errorf("rendering: %w", ErrNotLoaded)}
	b := newBench(t, f)
	for n := range 10 {
		b.ask(bodyOf(n, ""))
	}
	if len(b.outcomes) > 0 {
		t.Errorf("outcomes %v of a model that is not loaded", b.outcomes)
	}
	f.err = nil
	for n := range 20 {
		b.ask(bodyOf(n, ""))
	}
	if b.got(NoSlower) != 1 {
		t.Errorf("outcomes %v once it is loaded", b.outcomes)
	}
}

func TestRefused(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	plans := func() *Plan { return b.Plan(model1, []byte(bodyOf(0, ""))) }
	plans().Refused(500) // not attached: nothing is to be concluded
	for n := range 18 {
		b.ask(bodyOf(n, ""))
	}
	plans().Refused(503)
	if p := plans(); p == nil || p.Body() == nil {
		t.Fatal("a full queue switched attaching off")
	}
	plans().Refused(500)
	if b.got(Refused) != 1 || plans() != nil {
		t.Errorf("outcomes %v", b.outcomes)
	}
}

// What was planned before a model was forgotten says nothing about the one that has its name now.
func TestForgetInFlight(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	for n := range 18 {
		b.ask(bodyOf(n, ""))
	}
	old := b.Plan(model1, []byte(bodyOf(0, "")))
	b.Forget("another")
	if p := b.Plan(model1, []byte(bodyOf(0, ""))); p.Body() == nil {
		t.Error("another model was forgotten, and this one with it")
	}
	b.Forget(model1)
	if p := b.Plan(model1, []byte(bodyOf(0, ""))); p == nil || p.Body() != nil {
		t.Error("not forgotten")
	}
	old.Answered(Answer{Context: []byte("[1]"), PromptTokens: 1})
	old.Refused(500)
	for n := range 18 {
		b.ask(bodyOf(n, ""))
	}
	if b.got(NoSlower) != 2 || b.got(ContextDiffers) > 0 || b.got(Refused) > 0 {
		t.Errorf("outcomes %v", b.outcomes)
	}

	// Forgotten while Run compares: what it finds is dropped.
	b = newBench(t, &fakeOllama{})
	b.Attacher.Render = func(ctx context.Context, body []byte) (string, error) {
		b.Forget(model1)
		return b.fakeOllama.Render(ctx, body)
	}
	for n := range 2 {
		b.ask(bodyOf(n, ""))
	}
	if b.got(Trusted) > 0 || b.groups.Len() > 0 || b.bytes != 0 {
		t.Errorf("outcomes %v, %d groups of %d bytes", b.outcomes, b.groups.Len(), b.bytes)
	}
}

// Many clients at once, prompts that share more or less, all forms of a body: the model sees what it would see without.
func TestNothingOfAnother(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	one := func(rnd *rand.Rand) {
		text := rubric[:min(len(rubric), minShared+rnd.IntN(400))]
		prompt := text + strings.Repeat("maybe ", rnd.IntN(3)) + fmt.Sprint(rnd.IntN(1000)) + []string{"", "\n", "."}[rnd.IntN(3)]
		system := []string{"", `,"system":"one"`, `,"system":"two"`, `,"think":true`, `,"options":{"num_ctx":4096}`}[rnd.IntN(5)]
		own := []byte(promptBody(prompt, system))
		p := b.Plan(model1, own)
		if p == nil {
			return
		}
		sent := own
		if p.Body() != nil {
			sent = p.Body()
		}
		saw, answer := b.answer(t, sent)
		if direct := b.direct(own); saw != direct {
			t.Errorf("the model saw\n%q\nin place of\n%q", saw, direct)
		}
		p.Answered(answer)
	}
	for first := rand.New(rand.NewPCG(1, 1)); b.got(Trusted) == 0; b.settle() {
		one(first)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running, clients sync.WaitGroup
	running.Go(func() { b.Run(ctx) })
	for client := range 8 {
		clients.Go(func() {
			rnd := rand.New(rand.NewPCG(2, uint64(client)))
			for range 300 {
				one(rnd)
			}
		})
	}
	clients.Wait()
	cancel()
	running.Wait()
	if b.got(Attached) == 0 {
		t.Errorf("nothing was attached: %v", b.outcomes)
	}
}

func TestBounded(t *testing.T) {
	b := newBench(t, &fakeOllama{})
	for n := range 2 * maxGroups {
		b.ask(promptBody(fmt.Sprintf("number %d %s", n, rubric), ""))
	}
	if b.groups.Len() > maxGroups {
		t.Errorf("%d groups", b.groups.Len())
	}
	big := strings.Repeat("x ", maxBody/2-1000)
	for n := range 60 {
		own := []byte(promptBody(fmt.Sprintf("number %d %s", n, big), ""))
		b.Plan(model1, own).Answered(Answer{Context: array(make([]int32, 1000)), PromptTokens: 1000})
	}
	sum := 0
	for _, g := range b.groups.Values() {
		sum += g.bytes
	}
	if sum != b.bytes || b.bytes > maxBytes || b.bytes < maxBytes/2 {
		t.Errorf("%d bytes, counted %d", sum, b.bytes)
	}
	// As many groups as there are wait for Run, which does not come.
	b = newBench(t, &fakeOllama{})
	for n := range 200 {
		own := []byte(promptBody(fmt.Sprint(n/2, rubric, n), ""))
		p := b.Plan(model1, own)
		_, answer := b.answer(t, own)
		p.Answered(answer)
	}
	if len(b.queue) != maxQueued {
		t.Errorf("%d groups wait", len(b.queue))
	}
}

func BenchmarkPlan(b *testing.B) {
	long := strings.Repeat("A good answer names its sources, and a bad one does not. ", 140)
	body := func(n int) []byte {
		return []byte(promptBody(fmt.Sprintf("%s number %d", long, n), `,"options":{"temperature":0}`))
	}
	run := func(name string, requests int, f *fakeOllama) {
		b.Run(name, func(b *testing.B) {
			bench := newBench(b, f)
			for n := range requests {
				bench.ask(string(body(n)))
			}
			own := body(0)
			b.SetBytes(int64(len(own)))
			b.ReportAllocs()
			for b.Loop() {
				bench.Plan(model1, own)
			}
		})
	}
	run("unknown", 0, &fakeOllama{})
	run("attached", 20, &fakeOllama{})
	run("off", 4, &fakeOllama{err: errFake})
}
