// Package bench compares an Ollama server used directly with the same server behind the proxy: the
// same requests in each mode, mode after mode in one run, each from a cold start.
//
// All modes are measured by the same instrument, the proxy's own ledger: in the mode Direct the
// requests pass through a proxy that changes nothing and lets nothing wait. The client measures its
// own waits.
package bench

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/text"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Mode is how requests reach the server.
type Mode string

const (
	Direct    Mode = "false"      // nothing is optimised
	KeepAlive Mode = "keep-alive" // requests get a keep_alive and are sent in order of arrival
	// Full gives requests a keep_alive and lets them wait for the slot that is warm for them.
	Full Mode = "true"
)

// Modes returns all modes, in the order of the report.
func Modes() []Mode { return []Mode{Direct, KeepAlive, Full} }

// Config says what to measure. All fields except Models, Clients, Pause, Slots, Transport and
// Progress must be set.
type Config struct {
	Upstream *url.URL // Ollama itself
	// Models are two for the workload "models", otherwise one. If empty, they are the server's, if
	// it has no more than needed.
	Models   []string
	Modes    []Mode // in the order of the first round
	Workload string // one of Workloads

	Requests, PrefixTokens, TailTokens, OutputTokens int
	// Clients is how many send at once; zero means the workload's default.
	Clients int
	Rounds  int
	// Pause is the time between an answer and the client's next request.
	Pause time.Duration
	// GiveUp is the time without an answer after which a mode is ended.
	GiveUp time.Duration
	Seed   uint64 // of the generated texts
	// Slots is what Front gives the mode Full; it is only reported.
	Slots string
	// Predictions shows the figures of Prediction beside those of the workload "same".
	Predictions bool
	// Price is that of a million evaluated tokens, in any currency; zero shows no prices.
	Price float64

	// Front starts the proxy for a mode. done is called after each request, and never after stop
	// has returned.
	Front     func(ctx context.Context, mode Mode, done func(proxy.Exchange)) (base *url.URL, stop func() error, err error)
	Transport http.RoundTripper // nil: http.DefaultTransport
	Log       *slog.Logger
	Progress  func(Progress) // called by one goroutine at a time when a request is done; may be nil
}

// Progress is the state of a run.
type Progress struct {
	Mode        Mode
	Done, Total int // requests of all modes and rounds
	Failed      int
	Elapsed     time.Duration
}

// Words returns the text beside the progress bar.
func (p Progress) Words() string { return fmt.Sprintf("--optimize %s, %d errors", p.Mode, p.Failed) }

// Attrs returns the same for a line of the log.
func (p Progress) Attrs() []any {
	return []any{"optimize", string(p.Mode), "done", p.Done, "of", p.Total, "errors", p.Failed}
}

// ErrStopped means that a run was stopped before its end. The report has the results until then.
var ErrStopped = errors.New("stopped before the end")

// Defaults, which a report's title leaves out.
const (
	DefaultGiveUp = 5 * time.Minute
	DefaultSeed   = 1
	DefaultSlots  = "auto"
)

const (
	coolLimit  = 2 * time.Minute // for a model to be unloaded
	coolEvery  = 20 * time.Millisecond
	hopeless   = 5 // failures in a row at the beginning, after which the run ends
	askedReady = 10 * time.Millisecond
)

// bench is a run.
type bench struct {
	*Config
	server *upstream.Server
	client *http.Client
	report *Report
	began  time.Time

	mu       sync.Mutex // guards what follows, and Progress
	progress Progress
}

// Run measures. If it fails after anything was measured, it also returns a report, marked
// incomplete.
func Run(ctx context.Context, c Config) (*Report, error) {
	c.Clients = cmp.Or(c.Clients, clients(c.Workload))
	if c.Transport == nil {
		c.Transport = http.DefaultTransport
	}
	b := &bench{Config: &c, client: &http.Client{Transport: c.Transport}, began: time.Now()}
	b.server = upstream.NewServer("upstream", c.Upstream, c.Transport, slog.New(slog.DiscardHandler))
	b.progress.Total = c.Requests * c.Rounds * len(c.Modes)
	state, err := b.look(ctx)
	var scales []scale
	if err == nil {
		scales, err = b.calibrate(ctx)
	}
	if ctx.Err() != nil {
		return nil, ErrStopped
	}
	if err != nil {
		return nil, err
	}
	b.report = newReport(&c, state.Version, b.began)
	for _, model := range c.Models {
		b.report.Memory = append(b.report.Memory, b.memory(ctx, model))
	}
	err = b.rounds(ctx, scales)
	if ctx.Err() != nil {
		err = ErrStopped
	}
	// Unload the models, which the proxy has told Ollama to keep for a day.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), coolLimit)
	defer cancel()
	if coolErr := b.cool(end); err == nil {
		err = coolErr
	}
	b.report.Incomplete = err != nil
	b.report.sum()
	return b.report, err
}

// rounds measures each mode in each round.
func (b *bench) rounds(ctx context.Context, scales []scale) error {
	seed := b.Seed * 1_000_003
	for round := range b.Rounds {
		for i := range b.Modes {
			seed++
			mode := b.Modes[(i+round)%len(b.Modes)] // each mode comes first in some round
			if err := b.run(ctx, mode, round, seed, scales); err != nil {
				return err
			}
		}
	}
	return nil
}

// look asks the server for its version, and chooses the models.
func (b *bench) look(ctx context.Context) (upstream.State, error) {
	st := b.server.Refresh(ctx)
	if !st.Up {
		return st, fmt.Errorf("the server at %s does not answer: %w (start Ollama, or say where it is with --upstream)", b.Upstream, st.Err)
	}
	if req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.Upstream.JoinPath("/_cacheproxy/health").String(), nil); err == nil {
		if res, err := b.client.Do(req); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return st, fmt.Errorf("%s is an ollama-cacheproxy: say with --upstream where Ollama itself is", b.Upstream)
			}
		}
	}
	want := 1
	if b.Workload == "models" {
		want = 2
	}
	names := strings.Join(st.Models, ", ")
	if len(b.Models) == 0 && len(st.Models) == want {
		b.Models = st.Models
	}
	switch {
	case len(st.Models) < want:
		return st, fmt.Errorf("the workload %s needs %d models and the server has %d (%s): pull one", b.Workload, want, len(st.Models), names)
	case len(b.Models) != want:
		return st, fmt.Errorf("the workload %s needs %d --model of those that the server has: %s", b.Workload, want, names)
	case want == 2 && upstream.ModelKey(b.Models[0]) == upstream.ModelKey(b.Models[1]):
		return st, fmt.Errorf("the workload %s needs two different models of those that the server has: %s", b.Workload, names)
	}
	for _, m := range b.Models {
		if !st.Has(upstream.ModelKey(m)) {
			return st, fmt.Errorf("the server has no model %q; it has %s", m, names)
		}
	}
	for _, l := range st.Loaded {
		b.Log.Warn("a model is loaded: if others use this server now, their requests will be disturbed and so will the figures", "model", l.Name)
	}
	return st, nil
}

// calibrate measures how many tokens each model makes of words. It also makes the server read each
// model's file once, so that the first mode is not the only one to read it from the disk.
func (b *bench) calibrate(ctx context.Context) (scales []scale, err error) {
	const short, long = 100, 800 // words
	for _, model := range b.Models {
		var counts [2]int
		for i, n := range []int{short, long} {
			// Different words each time: the count includes reused tokens, but Ollama may change
			// that.
			q := request{model: model, numCtx: minNumCtx, system: text.Words(b.Seed<<40+uint64(i), n-1), user: text.Words(uint64(i), 1)}
			asking, cancel := context.WithTimeoutCause(ctx, b.GiveUp, fmt.Errorf("nothing was answered for %v (--give-up)", b.GiveUp))
			a := b.ask(asking, b.Upstream, q, nil, 1)
			a.err = because(asking, a.err)
			cancel()
			if a.err != nil {
				return nil, fmt.Errorf("asking %s: %w", model, a.err)
			}
			counts[i] = a.prompt
		}
		s := scale{tokensPerWord: float64(counts[1]-counts[0]) / (long - short)}
		if s.tokensPerWord <= 0 {
			return nil, fmt.Errorf("%s tells %d tokens of a prompt of %d words and %d of one of %d: is it a model that answers?", model, counts[0], short, counts[1], long)
		}
		s.overhead = max(0, float64(counts[0])-short*s.tokensPerWord)
		scales = append(scales, s)
	}
	return scales, nil
}

// because returns why ctx ended if that is the reason of an error.
func because(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// cool unloads the models, which also drops everything that the server has cached of prompts.
func (b *bench) cool(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, coolLimit, fmt.Errorf("a model is still loaded after %v: is somebody else using the server?", coolLimit))
	defer cancel()
	for {
		loaded, err := b.server.Loaded(ctx)
		if err != nil {
			return fmt.Errorf("asking what is loaded: %w", err)
		}
		left := 0
		for _, l := range loaded {
			if slices.ContainsFunc(b.Models, func(m string) bool { return upstream.ModelKey(m) == upstream.ModelKey(l.Name) }) {
				left++
				if err := b.server.Keep(ctx, l.Name, 0, false, nil, nil); err != nil {
					return fmt.Errorf("unloading %s: %w", l.Name, err)
				}
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(coolEvery):
		}
	}
}

// run measures a mode once. Even after an error, the report has what was measured.
func (b *bench) run(ctx context.Context, mode Mode, round int, seed uint64, scales []scale) error {
	if err := b.cool(ctx); err != nil {
		return err
	}
	var exchanges []proxy.Exchange
	var mu sync.Mutex // guards exchanges
	base, stop, err := b.Front(ctx, mode, func(ex proxy.Exchange) {
		if ex.Savings != nil {
			mu.Lock()
			exchanges = append(exchanges, ex)
			mu.Unlock()
		}
	})
	if err != nil {
		return fmt.Errorf("starting the proxy: %w", err)
	}
	p := &play{bench: b, mode: mode, base: base}
	if err = b.ready(ctx, base); err == nil {
		err = p.play(ctx, b.workload(seed, scales))
	}
	loaded, _ := b.server.Loaded(ctx) // an error is ignored, since nothing depends on it
	err = errors.Join(err, stop())
	if len(p.done) > 0 {
		unsent := 0
		if err == nil {
			unsent = b.Requests - len(p.done)
		}
		b.report.add(mode, round, p, exchanges, loaded, unsent)
	}
	return err
}

// ready waits until the proxy has polled the server, since its ledger does not know the models
// before that.
func (b *bench) ready(ctx context.Context, base *url.URL) error {
	ctx, cancel := context.WithTimeoutCause(ctx, b.GiveUp, fmt.Errorf("the proxy was not ready within %v (--give-up): does Ollama still answer?", b.GiveUp))
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath("/_cacheproxy/ready").String(), nil)
		if err != nil {
			return err
		}
		res, err := b.client.Do(req)
		if err != nil {
			return because(ctx, err)
		}
		res.Body.Close()
		if res.StatusCode == http.StatusOK {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(askedReady):
		}
	}
}

// play sends a workload's requests.
type play struct {
	*bench
	mode     Mode
	base     *url.URL
	began    time.Time
	wall     time.Duration
	watchdog *time.Timer // ends it
	done     []played    // guarded by bench.mu
}

// played is a request that was answered or has failed.
type played struct {
	request
	client int
	sent   time.Time
	answer
}

func (p *play) play(ctx context.Context, w workload) error {
	whole := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p.began = time.Now()
	stalled := fmt.Errorf("nothing was answered for %v", p.GiveUp)
	p.watchdog = time.AfterFunc(p.GiveUp, func() { cancel(stalled) })
	defer p.watchdog.Stop()
	var wg sync.WaitGroup
	for i, queue := range w.queues {
		next := make(chan request, len(queue))
		for _, q := range queue {
			next <- q
		}
		close(next)
		for k := range w.depth {
			wg.Go(func() { // until the queue is empty
				var history []api.Message
				for q := range next {
					messages := q.messages(history)
					sent := time.Now()
					// A pause does not count as a standstill, neither before a request nor (in
					// note) after one.
					p.watchdog.Reset(p.GiveUp)
					a := p.ask(ctx, p.base, q, messages, p.OutputTokens)
					switch context.Cause(ctx) {
					case nil:
					case stalled:
						a.err = stalled
					default:
						return
					}
					if w.chat {
						history = append(messages, api.Message{Role: "assistant", Content: a.text})
					}
					p.note(played{q, i*w.depth + k, sent, a}, cancel)
					if ctx.Err() != nil {
						return
					}
					if p.Pause > 0 && len(next) > 0 {
						select {
						case <-ctx.Done():
						case <-time.After(p.Pause):
						}
					}
				}
			})
		}
	}
	wg.Wait()
	p.wall = time.Since(p.began)
	if cause := context.Cause(ctx); cause != stalled {
		return cause
	}
	p.Log.Warn("gave up on a mode", "optimize", string(p.mode), "err", stalled)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.progress.Total -= p.Requests - len(p.done)
	return whole.Err()
}

// note records a finished request.
func (p *play) note(d played, cancel context.CancelCauseFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watchdog.Reset(p.GiveUp + p.Pause)
	p.done = append(p.done, d)
	now := &p.progress
	now.Mode, now.Elapsed = p.mode, time.Since(p.bench.began)
	now.Done++
	if d.err != nil {
		now.Failed++
		if now.Failed == now.Done && now.Done >= hopeless {
			cancel(fmt.Errorf("the first %d requests failed, the last one with: %w", hopeless, d.err))
		}
	}
	if p.Progress != nil {
		p.Progress(*now)
	}
}

// answer is a client's view of an answer.
type answer struct {
	text         string
	prompt       int    // tokens
	fingerprint  string // of the prompt, by the proxy
	first, whole time.Duration
	err          error
}

// ask sends one request. If messages is nil, it sends the request's own.
func (b *bench) ask(ctx context.Context, base *url.URL, q request, messages []api.Message, output int) (a answer) {
	if messages == nil {
		messages = q.messages(nil)
	}
	began := time.Now()
	defer func() { a.whole = time.Since(began) }()
	var body []byte
	// With num_predict, and temperature 0, all answers have the same length, and are the same
	// whenever they are requested.
	body, a.err = json.Marshal(map[string]any{"model": q.model, "messages": messages, "options": map[string]any{"num_ctx": q.numCtx, "num_predict": output, "temperature": 0, "seed": 1}})
	if a.err != nil {
		return a
	}
	var req *http.Request
	if req, a.err = http.NewRequestWithContext(ctx, http.MethodPost, base.JoinPath("/api/chat").String(), bytes.NewReader(body)); a.err != nil {
		return a
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := b.client.Do(req)
	if err != nil {
		a.err = err
		return a
	}
	defer res.Body.Close()
	a.fingerprint = res.Header.Get("X-Cacheproxy-Prefix")
	var all strings.Builder
	lines := bufio.NewReader(res.Body)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) == 0 {
			a.err = fmt.Errorf("status %d: the answer broke off: %w", res.StatusCode, err)
			return a
		}
		if a.first == 0 {
			a.first = time.Since(began)
		}
		var said struct {
			Error string
			api.ChatResponse
		}
		if err := json.Unmarshal(line, &said); err != nil || res.StatusCode != http.StatusOK || said.Error != "" {
			a.err = fmt.Errorf("status %d: %s", res.StatusCode, cmp.Or(said.Error, strings.TrimSpace(string(line))))
			return a
		}
		all.WriteString(said.Message.Content)
		if said.Done {
			a.text, a.prompt = all.String(), said.PromptEvalCount
			// Read the end as well: for the proxy, a client that leaves before it has no answer.
			_, a.err = io.Copy(io.Discard, lines)
			return a
		}
	}
}
