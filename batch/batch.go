// Package batch sends a file of requests through a proxy or to an Ollama server and writes the
// answers to another file.
//
// Data flows one way: the input (Source) is read a window ahead and ordered by prefix (window); as
// many requests as the server can use (limit) are sent (client); each result goes to the journal,
// and to the output when it is its turn. One goroutine does all of this except the sending. Memory
// is bounded by the window, whatever the input's length.
//
// Several runs can share a batch (worker): then spans of the window come from a job in a Valkey server
// and results go there, and each run's journal is fed with the results of all.
//
// Apart from that the package knows only HTTP and Ollama's API: its figures on reuse and time come from the answers
// and from a proxy's /metrics. It never changes a prompt.
package batch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/ollama/ollama/api"
)

// Config configures a run. Source, Output, Order, Window, Server, Transport and Log must be set.
type Config struct {
	Source *Source
	Output string    // the path of the results, or "-"
	Stdout io.Writer // where "-" writes to
	Errors string    // the path for requests that failed, to be sent again; "": they are not kept
	// Perm are the permissions of the output, the journal and the file for errors where they are
	// made; 0: 0o666, less the umask.
	Perm   fs.FileMode
	Beside []Named // other files of the run, which must be different from these
	Order  Order
	Window int // how many requests are read ahead and ordered, at least 1

	Concurrency int           // requests in flight; 0: learned
	Retries     int           // how often a request is retried after an error that may pass
	Timeout     time.Duration // how long an answer may take from its first byte; 0: no limit

	// WaitForServer is how long a server may be away before the batch ends; 0: it ends at once.
	WaitForServer time.Duration

	// Workers, if non-nil, is what this run shares the batch with. With Output "-" it writes no
	// results.
	Workers *Workers

	Server    *url.URL // a proxy, or Ollama itself
	Transport http.RoundTripper
	APIKey    string // "": none

	Log *slog.Logger
	// Progress, if non-nil, is called by one goroutine when a request is done and about once a
	// second.
	Progress func(Progress)
	// InFlight, if non-nil, is called by the same goroutine with how many requests are in flight:
	// before one begins, and after the result of one was recorded.
	InFlight func(n int)

	firstWait time.Duration // before a retry; 0: half a second
	compactAt int64         // 0: compactAt
	files     files         // nil: the disk
	watch     func(*batch)  // for tests: called before each step
}

// Progress is the state of a batch.
type Progress struct {
	Done, Total int
	Resumed     int // of Done, in earlier runs
	InFlight    int
	Concurrency int // the present limit of requests in flight
	Elapsed     time.Duration
	Counts      Counts // of everything that is done
	Workers     int    // that share the batch, as far as is known; 0: it is not shared
	Waiting     bool   // for the Valkey server
}

// ErrStopped means that a batch was stopped before its end and can continue.
var ErrStopped = errors.New("stopped before the end; run the same command to go on")

const pollEvery = 2 * time.Second

// batch is a run.
type batch struct {
	*Config
	client  *client
	journal *journal
	feed    feed
	window  *window // nil: the batch is shared
	worker  *worker // nil: it is not
	limit   limit
	survey  *Survey

	began    time.Time
	resumed  int
	inFlight int
	ran      Counts               // of this run
	ready    map[string]time.Time // when models were last seen loaded

	isProxy bool
	metrics []byte             // the proxy's metrics when the run began
	context map[string]int     // context of the loaded models in tokens, by their names in /api/ps
	onGPU   map[string]float64 // the part of each model that is in GPU memory
}

// finished is an item that is done.
type finished struct {
	item
	request request
	tried
	err error // ends the batch
}

func (c *Config) client() *client {
	wait := c.firstWait
	if wait == 0 {
		wait = 500 * time.Millisecond
	}
	return &client{
		url: c.Server, transport: c.Transport, key: c.APIKey, retries: c.Retries, timeout: c.Timeout,
		wait: wait, patience: c.WaitForServer, log: c.Log,
	}
}

// Run runs a batch, or continues one, and returns its summary. An error means that the batch has
// not come to its end (errors.Is ErrStopped: because ctx ended); failed requests are no error.
func Run(ctx context.Context, c Config) (*Summary, error) {
	size := c.compactAt
	if size == 0 {
		size = compactAt
	}
	b := &batch{
		Config: &c, client: c.client(), limit: limit{fixed: c.Concurrency}, began: time.Now(),
		ready: map[string]time.Time{}, context: map[string]int{}, onGPU: map[string]float64{},
	}
	var joined string
	if c.Workers != nil {
		if err := b.join(ctx); err != nil {
			return nil, err
		}
		defer b.worker.leave()
		joined = b.worker.job.id
		if c.Output == "-" {
			c.Stdout = io.Discard
		}
	}
	j, err := openJournal(&c, joined, size)
	if err != nil {
		return nil, err
	}
	defer j.close()
	b.journal = j
	b.resumed = j.head.Next + len(j.beyond)
	if b.survey, err = TakeSurvey(ctx, c.Source, nil); ctx.Err() != nil {
		return nil, ErrStopped
	} else if err != nil {
		return nil, err
	}
	if b.resumed > 0 {
		c.Log.Info("going on with an earlier run", "output", c.Output, "done", b.resumed, "of", b.survey.Requests)
	}
	if b.resumed < b.survey.Requests {
		if err := b.work(ctx); err != nil {
			return nil, err
		}
	}
	if err := j.compact(); err != nil {
		return nil, err
	}
	return b.summary(ctx), nil
}

// work does what is not done yet.
func (b *batch) work(ctx context.Context) error {
	if b.worker == nil {
		b.window = newWindow(b.Source, b.Window, b.journal.done)
		defer b.window.stop()
		b.feed = &alone{b: b}
	} else {
		b.feed = b.worker
		if err := b.worker.look(); err != nil {
			return err
		}
	}
	if b.worker == nil || b.worker.job.joined.count < b.survey.Requests {
		if err := b.prepare(ctx); err != nil {
			return err
		}
	}
	return b.loop(ctx)
}

// prepare logs what is known to go wrong, and examines the server.
func (b *batch) prepare(ctx context.Context) error {
	b.warn()
	absent, err := b.absent(ctx)
	if ctx.Err() != nil {
		return ErrStopped
	}
	if err != nil {
		return err
	}
	if len(absent) > 0 {
		model := absent[0]
		return fmt.Errorf("model %q, which %d requests want, is not on the server at %s: pull it (ollama pull %[1]s) or take them out", model, b.survey.Models[model], b.Server)
	}
	if text, err := b.client.get(ctx, "/metrics"); err == nil && bytes.Contains(text, []byte("\nollama_cacheproxy_")) {
		b.metrics, b.isProxy = text, true
	}
	return nil
}

// absent waits for the server, and returns the models that it lacks. The server may disappear, or
// hang, while it is asked.
func (b *batch) absent(ctx context.Context) (absent []string, err error) {
	for began := time.Now(); ; {
		if _, err := b.client.await(ctx); err != nil {
			return nil, err
		}
		absent, err := b.AbsentModels(ctx, b.survey)
		if !errors.Is(err, ErrUnreachable) || time.Since(began) >= b.WaitForServer {
			return absent, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lookEvery):
		}
	}
}

// warn logs the survey's findings.
func (b *batch) warn() {
	v := b.survey
	for _, err := range v.BadLines {
		b.Log.Warn("not understood; it is recorded as an error", "err", err)
	}
	if v.Bad > len(v.BadLines) {
		b.Log.Warn("more lines are not understood: see --check", "lines", v.Bad)
	}
	if v.Repeated > 0 {
		b.Log.Warn("lines repeat the custom_id of an earlier line",
			"count", v.Repeated, "lines", lines(v.Repeats, v.Repeated))
	}
	if v.Long > 0 {
		b.Log.Warn("prompts are probably longer than the num_ctx that they state, and Ollama cuts such without a word", "prompts", v.Long, "lines", lines(v.LongLines, v.Long))
	}
}

// feed is where items come from and where their answers go. The goroutine of loop calls it.
type feed interface {
	// begin starts what the feed does in the background; it ends with ctx.
	begin(ctx context.Context, wg *sync.WaitGroup, in inbox)
	// next returns an item to send; false: there is none now.
	next() (item, bool, error)
	// over reports whether the batch is done.
	over() (bool, error)
	// record keeps an item's result.
	record(it item, failed bool, counts Counts, result []byte) error
	// done returns how many items are done.
	done() int
}

// alone is the feed of a batch that is not shared.
type alone struct {
	b     *batch
	ended bool
}

func (a *alone) begin(context.Context, *sync.WaitGroup, inbox) {}

func (a *alone) next() (it item, ok bool, err error) {
	if a.ended || a.b.inFlight > 0 && a.b.window.behind() > a.b.journal.head.Next {
		return item{}, false, nil
	}
	it, ok, err = a.b.window.take()
	a.ended = !ok
	return it, ok, err
}

func (a *alone) over() (bool, error) { return a.ended && a.b.inFlight == 0, nil }

func (a *alone) record(it item, failed bool, counts Counts, result []byte) error {
	return a.b.journal.add(it, failed, counts, result)
}

func (a *alone) done() int { return a.b.journal.head.Next + len(a.b.journal.beyond) }

// loop sends everything that is not done yet.
func (b *batch) loop(ctx context.Context) error {
	running, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	in := make(inbox)
	wg.Go(func() { b.poll(running, in) }) // ends with running
	b.feed.begin(running, &wg, in)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		for b.inFlight < b.limit.target() {
			it, ok, err := b.feed.next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			b.flies(1)
			wg.Go(func() { b.send(running, it, in) }) // ends with running at the latest
		}
		if b.watch != nil {
			b.watch(b)
		}
		if over, err := b.feed.over(); over || err != nil {
			return err
		}
		select {
		case do := <-in:
			if err := do(); err != nil {
				return err
			}
		case <-tick.C:
			b.tell()
		case <-ctx.Done():
			return ErrStopped
		}
	}
}

// inbox receives what other goroutines have found for loop.
type inbox chan func() error

func (in inbox) put(ctx context.Context, do func() error) {
	select {
	case in <- do:
	case <-ctx.Done():
	}
}

// send sends an item. It ends with ctx at the latest.
func (b *batch) send(ctx context.Context, it item, in inbox) {
	f := finished{item: it}
	running := ctx
	if it.span != nil {
		ctx = it.span.ctx // it ends with running, or earlier
	}
	if f.request, f.err = b.Source.request(it); f.err != nil {
		if f.bad, f.err = badLine(f.err); f.err == nil {
			f.failure = &failure{Code: codeInvalid, Message: f.bad.Error()}
		}
	} else {
		f.tried, f.err = b.client.ask(ctx, &f.request, it.line, func(sent time.Time, why string) {
			in.put(ctx, func() error {
				if b.limit.backOff(sent, time.Now()) {
					b.Log.Warn("the server has too much to do: fewer requests at once",
						"concurrency", b.limit.target(), "err", why)
				}
				return nil
			})
		})
	}
	in.put(running, func() error { return b.finish(running, f) })
}

// flies changes how many requests are in flight.
func (b *batch) flies(by int) {
	b.inFlight += by
	if b.InFlight != nil {
		b.InFlight(b.inFlight)
	}
}

func (b *batch) tell() {
	if b.Progress == nil {
		return
	}
	p := Progress{
		Done: b.feed.done(), Total: b.survey.Requests, Resumed: b.resumed,
		InFlight: b.inFlight, Concurrency: b.limit.target(), Elapsed: time.Since(b.began), Counts: b.journal.head.Counts,
	}
	if b.worker != nil {
		p.Workers, p.Waiting = b.worker.workers, b.worker.job.waiting()
	}
	b.Progress(p)
}

// finish records an item's result.
func (b *batch) finish(ctx context.Context, f finished) error {
	switch {
	case f.err != nil && ctx.Err() != nil:
		return ErrStopped
	case f.err != nil && f.span != nil && f.span.ctx.Err() != nil:
		b.flies(-1) // another worker has taken it over
		return nil
	case f.err != nil:
		return f.err
	}
	counts := f.counts
	if f.failure != nil {
		counts = Counts{Failed: 1}
		b.Log.Debug("a request has failed", "line", f.line, "code", f.failure.Code, "err", f.failure.Message)
	} else {
		counts.Text = f.text
		b.learn(&f, &counts)
	}
	b.limit.answered(b.inFlight, counts)
	b.ran.add(counts)
	result := f.request.result(f.line, f.answer, f.failure)
	if err := b.feed.record(f.item, f.failure != nil, counts, result); err != nil {
		return err
	}
	b.flies(-1)
	b.tell()
	return nil
}

// shortLoad is how long a loaded model may take to be ready.
const shortLoad = 100 * time.Millisecond

// learn learns what an answer reveals beyond its counts.
func (b *batch) learn(f *finished, c *Counts) {
	model := f.request.runner()
	// Requests that waited for the same load all report it: it is another load only if it began
	// after the last one was over.
	if c.Load > shortLoad {
		ready := time.Now().Add(c.Load - c.Total)
		if last, ok := b.ready[model]; !ok || ready.Sub(last) >= c.Load {
			c.Loads = 1
		}
		b.ready[model] = ready
	}
	// A prompt for which fewer tokens were counted than its text has, and about as many as fit.
	all := b.journal.head.Counts
	perToken := float64(tokenBytes)
	if all.Answers >= 8 && all.Prompt > 0 {
		perToken = float64(all.Text) / float64(all.Prompt)
	}
	room := b.context[model]
	if stated := numCtx(&f.request); stated > 0 {
		room = stated
	}
	if room > 0 && c.Prompt > 0 && c.Prompt <= room && float64(c.Text)/perToken > 1.1*float64(room) {
		c.Truncated = 1
		if all.Truncated < named {
			b.Log.Warn("the prompt is probably longer than the model's context, and was cut by Ollama", "line", f.line, "num_ctx", room, "prompt_tokens", c.Prompt)
		}
	}
}

func numCtx(r *request) int {
	var o struct {
		Options struct {
			NumCtx float64 `json:"num_ctx"`
		}
	}
	if !r.native() || json.Unmarshal(r.body, &o) != nil {
		return 0
	}
	return int(o.Options.NumCtx)
}

// poll examines the server until ctx ends.
func (b *batch) poll(ctx context.Context, in inbox) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		var metrics []byte
		if b.isProxy {
			metrics, _ = b.client.get(ctx, "/metrics") // read again in a moment
		}
		var ps api.ProcessResponse
		text, err := b.client.get(ctx, "/api/ps")
		if err != nil || json.Unmarshal(text, &ps) != nil {
			ps.Models = nil
		}
		in.put(ctx, func() error {
			b.look(metrics, ps.Models)
			return nil
		})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look records the result of a poll.
func (b *batch) look(metrics []byte, loaded []api.ProcessModelResponse) {
	if n := lanes(metrics); n > 0 {
		b.limit.lanes = n
	}
	for _, m := range loaded {
		r := request{model: m.Name}
		b.context[r.runner()] = m.ContextLength
		if m.Size <= 0 {
			continue
		}
		part := float64(m.SizeVRAM) / float64(m.Size)
		was, known := b.onGPU[m.Name]
		b.onGPU[m.Name] = part
		// Without a GPU, no model was ever in GPU memory.
		if part < 1 && part > 0 && !known || known && part < was {
			if b.limit.backOff(time.Now(), time.Now()) {
				b.Log.Warn("a model is not all in GPU memory: fewer requests at once", "model", m.Name, "size", m.Size, "size_vram", m.SizeVRAM, "concurrency", b.limit.target())
			}
		}
	}
}
