package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
)

// fakeOllama renders and answers as Ollama does, with a template and a tokenizer of its own.
type fakeOllama struct {
	// template is the model's own; nil is chatML.
	template func(system, prompt string) string
	// lie changes what is rendered or returned for an attached request.
	lie       func(rendered string) string
	lieAnswer func(a *Answer)
	// err is what rendering answers in place of a text.
	err error
	// bos has the tokenizer put a token before every prompt, counted and not in the context.
	bos bool
	// attachedTakes is how much longer an attached request takes, without evaluation; it may be negative.
	attachedTakes time.Duration
	load          time.Duration

	mu      sync.Mutex
	ids     map[string]int32
	pieces  []string
	renders int
}

func chatML(system, prompt string) string {
	if system != "" {
		system = "<|im_start|>system\n" + system + "<|im_end|>\n"
	}
	return system + "<|im_start|>user\n" + prompt + "<|im_end|>\n<|im_start|>assistant\n"
}

// tokenize cuts before each space and around everything that is no letter; what is not ASCII has a token per byte.
func (f *fakeOllama) tokenize(text string) []int32 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ids == nil {
		f.ids = map[string]int32{}
	}
	letter := func(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }
	var list []int32
	for i := 0; i < len(text); {
		end := i + 1
		if letter(text[i]) || text[i] == ' ' {
			for end < len(text) && letter(text[end]) {
				end++
			}
		}
		piece := text[i:end]
		id, ok := f.ids[piece]
		if !ok {
			id = int32(len(f.pieces))
			f.ids[piece] = id
			f.pieces = append(f.pieces, piece)
		}
		list = append(list, id)
		i = end
	}
	return list
}

func (f *fakeOllama) detokenize(list []int) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var b strings.Builder
	for _, id := range list {
		b.WriteString(f.pieces[id])
	}
	return b.String()
}

// prompt is what the request's prompt renders to; whether with a stored context.
func (f *fakeOllama) prompt(req api.GenerateRequest) (string, bool) {
	template := f.template
	if template == nil {
		template = chatML
	}
	if req.Template == "" {
		return f.detokenize(req.Context) + template(req.System, req.Prompt), len(req.Context) > 0
	}
	if req.Template != passThrough {
		panic("another template: " + req.Template)
	}
	text := f.detokenize(req.Context) + req.Prompt
	if f.lie != nil {
		text = f.lie(text)
	}
	return text, true
}

func decode(body []byte) (req api.GenerateRequest, err error) {
	return req, json.NewDecoder(strings.NewReader(string(body))).Decode(&req)
}

// Render is the Attacher's.
func (f *fakeOllama) Render(_ context.Context, body []byte) (string, error) {
	req, err := decode(body)
	if err != nil || !req.DebugRenderOnly || req.KeepAlive != nil || req.Prompt == "" {
		return "", fmt.Errorf("not a request to render: %s", body)
	}
	f.mu.Lock()
	f.renders++
	f.mu.Unlock()
	if f.err != nil {
		return "", f.err
	}
	text, _ := f.prompt(req)
	coded, err := json.Marshal(text) // as it comes over HTTP: incomplete characters are replaced
	if err != nil {
		return "", err
	}
	err = json.Unmarshal(coded, &text)
	return text, err
}

// answer answers a request; the text that was answered tells whether two requests were the same to the model.
func (f *fakeOllama) answer(t testing.TB, body []byte) (string, Answer) {
	t.Helper()
	req, err := decode(body)
	if err != nil {
		t.Errorf("%v: %s", err, body)
		return "", Answer{}
	}
	prompt, isAttached := f.prompt(req)
	sum := fnv.New64a()
	sum.Write([]byte(prompt))
	said := fmt.Sprintf(" answer %d.", sum.Sum64())
	context := f.tokenize(prompt + said)
	answer := Answer{
		Context: array(context), PromptTokens: len(f.tokenize(prompt)), AnswerTokens: len(f.tokenize(said)) + 1,
		Load: f.load, PromptEval: time.Duration(sum.Sum64() % 1e9), Eval: time.Second,
	}
	answer.Total = f.load + answer.PromptEval + answer.Eval + 10*time.Millisecond
	if f.bos {
		answer.PromptTokens++
	}
	if isAttached {
		answer.Total += f.attachedTakes
		if f.lieAnswer != nil {
			f.lieAnswer(&answer)
		}
	}
	return prompt, answer
}

// bench is an Attacher on a fake.
type bench struct {
	*Attacher
	*fakeOllama
	t        testing.TB
	mu       sync.Mutex
	outcomes map[string]int
}

const model1 = "m:latest"

func newBench(t testing.TB, f *fakeOllama) *bench {
	b := &bench{fakeOllama: f, t: t, outcomes: map[string]int{}}
	b.Attacher = &Attacher{
		Render:        f.Render,
		ContextLength: func(string) int { return 1 << 20 },
		Outcome: func(model, outcome string) {
			b.mu.Lock()
			defer b.mu.Unlock()
			if model != model1 {
				t.Errorf("outcome %s of model %q", outcome, model)
			}
			b.outcomes[outcome]++
		},
	}
	b.Init()
	return b
}

// settle does what Run would do by now.
func (b *bench) settle() {
	for {
		select {
		case g := <-b.queue:
			b.compare(b.t.Context(), g)
		default:
			return
		}
	}
}

// ask sends a request as the proxy does, and checks that the model sees what it would see of the client's own. It returns
// whether the request was attached.
func (b *bench) ask(body string) bool {
	b.t.Helper()
	own := []byte(body)
	p := b.Plan(model1, own)
	sent := own
	if p != nil && p.Body() != nil {
		sent = p.Body()
	}
	direct := b.direct(own)
	saw, answer := b.answer(b.t, sent)
	if saw != direct && b.lie == nil {
		b.t.Errorf("the model saw\n%q\nin place of\n%q", saw, direct)
	}
	clear(own) // a caller's buffer is used again
	if p != nil {
		p.Answered(answer)
	}
	b.settle()
	return p != nil && p.Body() != nil
}

// direct is what the model sees of a body that is sent as it came.
func (b *bench) direct(body []byte) string {
	req, err := decode(body)
	if err != nil {
		b.t.Errorf("%v: %s", err, body)
	}
	prompt, _ := b.prompt(req)
	return prompt
}

// got reports how often an outcome was told.
func (b *bench) got(outcome string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.outcomes[outcome]
}

var rubric = "Grade the candidate by this rubric. " + strings.Repeat("A good answer names its sources, and a bad one does not. ", 12) + "\n\nCandidate: "

// body is a request of one group, n telling it from others.
func bodyOf(n int, members string) string {
	return promptBody(rubric+fmt.Sprintf("number %c%c said \"yes\"", 'a'+n%26, 'a'+n/26), members)
}

func promptBody(prompt, members string) string {
	return fmt.Sprintf(`{"model":"m","prompt":%s,"stream":false%s}`, quote(prompt), members)
}

var errFake = errors.New("fake")
