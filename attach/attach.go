// Package attach sends requests to /api/generate with the context that an earlier answer returned, in the one form that
// renders to the same prompt: the tokens that the requests of a group have in common, none of an answer, a template that
// passes the prompt through, and the rest of the rendered text as the prompt. It does so only for groups whose form was
// compared byte for byte with what the requests render to, and only where that was measured to be no slower.
//
// It owns what is known of the groups, and when to attach. It sends nothing itself: requests are the caller's, and so is
// the rendering. docs/attach-context.md tells when the form is exact, and what it is worth.
package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// ErrNotLoaded is what Attacher.Render returns for a model that is not loaded any more. Nothing is concluded from it.
var ErrNotLoaded = errors.New("the model is not loaded")

// Outcomes, as a metric counts them. All but Attached, Trusted, NoSlower and Unsuitable switch attaching off for the model.
const (
	Attached   = "attached"   // a request was sent with stored context and answered
	Trusted    = "trusted"    // a group's form was compared and renders to the same text
	NoSlower   = "no_slower"  // a group's form was measured, and is used from now on
	Unsuitable = "unsuitable" // a group has too little in common, or its prompts are not told apart from the template

	Slower         = "slower"          // a group's form was measured to be slower than sending the text
	Template       = "template"        // the template changes the prompt, or its own text may change
	TextDiffers    = "text_differs"    // the form, or the stored context, renders to another text
	ContextDiffers = "context_differs" // an answer's context does not begin with the stored tokens
	CountDiffers   = "count_differs"   // an answer's prompt had more tokens or less than it must have
	Unverifiable   = "unverifiable"    // the number of a prompt's tokens cannot be checked
	RenderFailed   = "render_failed"   // rendering failed
	Refused        = "refused"         // the upstream refused a request that was sent with stored context
)

const (
	maxModels = 256      // models that attaching is switched off for, or whose template trims
	maxGroups = 1024     // of all models
	maxBytes  = 64 << 20 // of all groups: texts, tokens and samples
	maxQueued = 16       // groups that wait to be compared; another tries again with its next requests

	// maxPairs is how many pairs of samples a group is tried with.
	maxPairs = 3
	// maxForms is how often a group gets another form because prompts come that share less text.
	maxForms = 4
	// measured is how many answers of each form are compared.
	measured = 8
	// loading is a load_duration that only loading takes. Without it is some milliseconds, mostly for reading the body.
	loading = 100 * time.Millisecond
)

// Attacher decides which requests go with stored context. Set the fields and call Init before use. Its methods may be
// used concurrently.
type Attacher struct {
	// Render posts a body to the upstream's /api/generate and returns what the prompt renders to
	// (_debug_info.rendered_template); the body asks for that and for nothing else. It must return ErrNotLoaded where
	// the model is not loaded any more, so that nothing is loaded for it, and must not take for ever. Any other error
	// switches attaching off, and is logged. It is only called by Run.
	Render func(ctx context.Context, body []byte) (string, error)
	// ContextLength returns with how many tokens of context a model is loaded (context_length of /api/ps); 0 if that is
	// not known. Where a request does not say either, nothing is attached, as always if this is nil and num_ctx is not set.
	ContextLength func(model string) int
	// Outcome, if set, is told each outcome; see the constants.
	Outcome func(model, outcome string)
	// Log gets a warning when attaching is switched off for a model; nil logs nothing.
	Log *slog.Logger

	mu     sync.Mutex
	models *simplelru.LRU[string, model]
	groups *simplelru.LRU[groupKey, *group]
	bytes  int // of all groups
	queue  chan *group
}

// model is what is known of a model beyond its groups.
type model struct {
	off   bool
	trims bool // the template trims prompts, so that those with outer space are left alone
}

type groupKey struct{ model, settings string }

type state int

const (
	collecting state = iota // wants two samples
	comparing               // Run looks at them
	measuring               // sends by turns, attached and not
	attaching               // attaches always
	hopeless                // does nothing any more
)

// group are requests whose rendered prompts begin alike. The Attacher's lock guards it, but for what comparing reads.
type group struct {
	key   groupKey
	state state
	bytes int

	pair   [2]*sample // while collecting and comparing
	common []int32    // the tokens that all samples had in common; nil before the first
	pairs  int        // how many were of no use
	forms  int        // how many there were

	form  *form // while measuring and attaching
	turn  uint  // requests since it has its form
	sure  bool  // an attached answer's token count was checked
	times [2][]time.Duration
}

// Indices of group.times.
const (
	plain    = 0
	attached = 1
)

// Answer is what the last line of a successful answer tells. Times are 0 where a member is absent.
type Answer struct {
	Context      []byte // the member context as it is written, a JSON array
	PromptTokens int    // prompt_eval_count
	AnswerTokens int    // eval_count

	Total, Load, PromptEval, Eval time.Duration // total_duration, load_duration, prompt_eval_duration, eval_duration
}

// overhead is what an answer took beside evaluation: reading the body, rendering, tokenizing, waiting. The rest is the same
// in both forms, since the tokens are, and varies more than the forms differ.
func (a Answer) overhead() time.Duration { return a.Total - a.PromptEval - a.Eval }

// Plan is what is to be done about one request. It may be dropped at any time.
type Plan struct {
	a    *Attacher
	key  groupKey
	own  *request // a copy, where the answer may be a sample
	form *form    // where the request is part of a measurement, or attached
	body []byte   // nil to send the client's own
}

// Init makes the Attacher ready; it starts nothing.
func (a *Attacher) Init() {
	if a.Log == nil {
		a.Log = slog.New(slog.DiscardHandler)
	}
	if a.Outcome == nil {
		a.Outcome = func(string, string) {}
	}
	if a.ContextLength == nil {
		a.ContextLength = func(string) int { return 0 }
	}
	// The sizes are above 0, which is all that can be wrong.
	a.models, _ = simplelru.NewLRU[string, model](maxModels, nil)
	a.groups, _ = simplelru.NewLRU(maxGroups, func(_ groupKey, g *group) { a.bytes -= g.bytes })
	a.queue = make(chan *group, maxQueued)
}

// Run compares what groups render to, one group at a time, until ctx ends. Nothing is attached without it.
func (a *Attacher) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case g := <-a.queue:
			a.compare(ctx, g)
		}
	}
}

// Forget drops what is known of a model: it was created anew or deleted, or the upstream has restarted.
func (a *Attacher) Forget(model string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.models.Remove(model)
	a.dropGroups(model)
}

// Plan looks at a request's body, which it does not keep. model is the name by which the caller knows the model, the same
// for all ways to write it. The result is nil where there is nothing to do about the request, not even to tell of its
// answer.
func (a *Attacher) Plan(model string, body []byte) *Plan {
	a.mu.Lock()
	known, _ := a.models.Get(model)
	a.mu.Unlock()
	if known.off {
		return nil
	}
	r, ok := read(body)
	if !ok || known.trims && strings.TrimSpace(r.prompt) != r.prompt {
		return nil
	}
	limit := a.ContextLength(model)
	if r.numCtx > 0 && (limit == 0 || r.numCtx < limit) {
		limit = r.numCtx
	}

	p := &Plan{a: a, key: groupKey{model, r.group}}
	rest, want := a.turn(p, r, limit)
	switch {
	case !want:
		return nil
	case rest != "":
		p.body = r.attached(rest, p.form.context)
	case p.form == nil:
		own := *r
		own.body = slices.Clone(body)
		p.own = &own
	}
	return p
}

// turn says what is done about a request: nothing, or to send rest as the prompt, or to look at its answer.
func (a *Attacher) turn(p *Plan, r *request, limit int) (rest string, want bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	g, ok := a.groups.Get(p.key)
	if !ok || g.state == collecting {
		return "", true
	}
	if g.form == nil {
		return "", false
	}
	rest, ok = g.form.rest(r.prompt)
	if !ok {
		return "", g.forms < maxForms // it has less in common with the group: a sample for another form
	}
	// A token stands for a byte of text at least, so that the prompt has no more tokens than this, with some to spare for
	// those that a tokenizer adds. A prompt that is cut may be cut in another place.
	if len(g.form.tokens)+len(rest)+minTokens >= limit {
		return "", false
	}
	p.form = g.form
	turn := bits.OnesCount(g.turn)
	g.turn++
	// While measuring, the Thue-Morse sequence: neither form gets more of the odd, or of the first requests. Then one request
	// in ever more, those that are powers of two, goes as it came, so that its answer tells if the template has changed.
	if g.state == measuring && turn%2 == 0 || g.state == attaching && turn == 1 {
		return "", true
	}
	return rest, true
}

// Body returns what is sent in place of the client's body; nil if that is sent as it is.
func (p *Plan) Body() []byte { return p.body }

// Refused tells that the upstream answered with an error's status. It does not matter to plans without a body.
func (p *Plan) Refused(status int) {
	// 503 says that the queue is full.
	if p.body != nil && status >= 400 && status != 503 && p.current() {
		p.a.switchOff(p.key.model, &reason{Refused, "the upstream refused the attached form"})
	}
}

// Answered tells how an answer ended that came whole, with status 200.
func (p *Plan) Answered(answer Answer) {
	if p.own != nil {
		if s := p.sampled(answer); s != nil {
			p.a.sample(p, s)
		}
		return
	}
	context, _ := tokens(answer.Context) // none does not begin with the stored tokens
	sure, err := p.form.judge(context, answer.PromptTokens)
	if why, ok := errors.AsType[*reason](err); ok {
		if p.current() { // else the model may be another one by now
			p.a.switchOff(p.key.model, why)
		}
		return
	}
	which := plain
	if p.body != nil {
		which = attached
		p.a.Outcome(p.key.model, Attached)
	}
	p.a.measure(p, answer, which, sure)
}

// current reports whether the plan's form is still its group's.
func (p *Plan) current() bool {
	p.a.mu.Lock()
	defer p.a.mu.Unlock()
	g, ok := p.a.groups.Peek(p.key)
	return ok && g.form == p.form
}

// sampled returns the answer to a request that was sent as it came, as a sample; nil if it is none.
func (p *Plan) sampled(answer Answer) *sample {
	context, ok := tokens(answer.Context)
	n := answer.PromptTokens - 1
	// A prompt that was cut has less tokens than the context, which is that of the whole text. An answer's tokens need not be
	// exactly as many as its text has.
	if !ok || n < 1 || n > len(context) || len(context)-n > answer.AnswerTokens+answer.AnswerTokens/8+minTokens {
		return nil
	}
	return &sample{request: p.own, tokens: context[:n:n]}
}

// sample takes in a sample. The second one of a group has Run compare them.
func (a *Attacher) sample(p *Plan, s *sample) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if known, _ := a.models.Get(p.key.model); known.off {
		return
	}
	g, ok := a.groups.Get(p.key)
	if !ok {
		g = &group{key: p.key}
		a.groups.Add(p.key, g)
	}
	if g.form != nil {
		if _, fits := g.form.rest(s.prompt); fits || g.forms >= maxForms {
			return
		}
		g.state, g.form = collecting, nil
	}
	if g.state != collecting || g.pair[0] != nil && g.pair[0].prompt == s.prompt {
		return
	}
	if g.common == nil {
		g.common = s.tokens
	}
	g.common = commonPrefix(g.common, s.tokens)
	if g.pair[0] == nil {
		g.pair[0] = s
	} else {
		select {
		case a.queue <- g: // Run waits for the lock before it reads the pair
			g.pair[1] = s
			g.state = comparing
		default:
		}
	}
	a.weigh(g)
}

// compare gives a group its form.
func (a *Attacher) compare(ctx context.Context, g *group) {
	a.mu.Lock()
	pair, common := g.pair, g.common
	now, ok := a.groups.Peek(g.key)
	a.mu.Unlock()
	if !ok || now != g { // forgotten, or pushed out
		return
	}

	f, err := a.newForm(ctx, pair, common)

	why, off := errors.AsType[*reason](err)
	outcome := ""
	a.mu.Lock()
	if now, ok = a.groups.Peek(g.key); !ok || now != g {
		a.mu.Unlock()
		return
	}
	g.pair = [2]*sample{}
	switch {
	case err == nil:
		outcome = Trusted
		g.state, g.form, g.common = measuring, f, f.tokens
		g.forms++
		g.turn, g.sure, g.times = 0, false, [2][]time.Duration{}
	case off:
	case errors.Is(err, errTrimmed):
		a.models.Add(g.key.model, model{trims: true})
		outcome = Unsuitable
		g.state, g.common = hopeless, nil
	case errors.Is(err, errUnsuitable) && g.pairs+1 >= maxPairs:
		outcome = Unsuitable
		g.state, g.common = hopeless, nil
	default: // another pair may do, or the model will be loaded again
		g.state, g.common = collecting, nil
		if errors.Is(err, errUnsuitable) {
			g.pairs++
		}
	}
	a.weigh(g)
	a.mu.Unlock()

	if off {
		a.switchOff(g.key.model, why)
	} else if outcome != "" {
		a.Outcome(g.key.model, outcome)
	}
}

// render renders a body; an error is a *reason unless nothing is to be concluded from it.
func (a *Attacher) render(ctx context.Context, body []byte) (string, error) {
	text, err := a.Render(ctx, body)
	if err != nil && !errors.Is(err, ErrNotLoaded) && ctx.Err() == nil {
		return "", &reason{RenderFailed, "rendering failed: " + err.Error()}
	}
	return text, err
}

// measure takes in how long an answer took, and decides once there are enough of both forms.
func (a *Attacher) measure(p *Plan, answer Answer, which int, sure bool) {
	if answer.Load >= loading {
		return
	}
	a.mu.Lock()
	g, ok := a.groups.Peek(p.key)
	if !ok || g.form != p.form || g.state != measuring {
		a.mu.Unlock()
		return
	}
	g.sure = g.sure || sure && which == attached
	g.times[which] = append(g.times[which], answer.overhead())
	times := g.times
	if len(times[plain]) < measured || len(times[attached]) < measured {
		a.mu.Unlock()
		return
	}
	without, with := median(times[plain]), median(times[attached])
	var why *reason
	switch {
	case !g.sure:
		why = &reason{Unverifiable, "no answer told that its prompt had the right number of tokens"}
	case with > without:
		why = &reason{Slower, fmt.Sprintf("the attached form takes %v, sending the text %v", with, without)}
	default:
		g.state, g.times = attaching, [2][]time.Duration{}
	}
	a.mu.Unlock()

	if why != nil {
		a.switchOff(p.key.model, why)
		return
	}
	a.Outcome(p.key.model, NoSlower)
}

// switchOff attaches nothing to the model's requests until it is forgotten.
func (a *Attacher) switchOff(name string, why *reason) {
	a.mu.Lock()
	known, _ := a.models.Get(name)
	already := known.off
	known.off = true
	a.models.Add(name, known)
	a.dropGroups(name)
	a.mu.Unlock()
	if already {
		return
	}
	level := slog.LevelWarn
	if why.outcome == Slower {
		level = slog.LevelInfo // nothing is wrong
	}
	a.Outcome(name, why.outcome)
	a.Log.Log(context.Background(), level, "stored context is not attached for this model any more", "model", name, "outcome", why.outcome, "found", why.found)
}

// dropGroups forgets a model's groups; the lock is held.
func (a *Attacher) dropGroups(model string) {
	for _, key := range a.groups.Keys() {
		if key.model == model {
			a.groups.Remove(key)
		}
	}
}

// weigh takes in that a group has changed, and pushes out others if there is too much; the lock is held.
func (a *Attacher) weigh(g *group) {
	size := len(g.key.model) + len(g.key.settings) + 4*cap(g.common)
	for _, s := range g.pair {
		if s != nil {
			size += s.size()
		}
	}
	if f := g.form; f != nil {
		size += 4*cap(f.tokens) + len(f.context) + len(f.text) + len(f.head) + len(f.tail)
	}
	a.bytes += size - g.bytes
	g.bytes = size
	for a.bytes > maxBytes {
		a.groups.RemoveOldest()
	}
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
