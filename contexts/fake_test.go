package contexts

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The times of these tests' engines, in virtual time. A token of a state is about 20 times smaller
// than a real one's, and the disk is slower by the same factor.
const (
	perToken   = 5 * time.Millisecond // evaluating a token of a prompt
	perAnswer  = 8 * time.Millisecond // generating a token
	loadTakes  = 2 * time.Second
	stateBytes = 1 << 10 // for each token
	batch      = 512     // tokens that are evaluated before another request has its turn
)

// part is a piece of a prompt, one link of its chain.
type part struct {
	name   string
	tokens int
}

// text is a prompt.
type text []part

// sequence returns the text's tokens.
func (x text) sequence() []uint32 {
	var all []uint32
	for _, p := range x {
		h := fnv.New32a()
		h.Write([]byte(p.name))
		seed := h.Sum32()
		for i := range p.tokens {
			all = append(all, (seed+uint32(i)*2654435761)|1)
		}
	}
	return all
}

// chain returns the text's fingerprints, as package prefix makes them, and the bytes up to each.
func (x text) chain(model string) (contents []uint64, bytes []int) {
	h := fnv.New64a()
	h.Write([]byte(model))
	n := 0
	for _, p := range x {
		fmt.Fprintf(h, "|%s %d", p.name, p.tokens)
		n += 4 * p.tokens
		contents, bytes = append(contents, max(h.Sum64(), 1)), append(bytes, n)
	}
	return contents, bytes
}

// modelSpec has the properties of a model.
type modelSpec struct {
	window bool // a restored state is only useful if the prompt continues all of it
	slots  int
}

// ollama simulates an Ollama server: it has one model loaded at a time, or as many as most says.
type ollama struct {
	t      testing.TB
	files  func() *contextstore.Files
	models map[string]modelSpec
	most   int // models that are loaded together; 0 means one

	disk   diskSpeed // guarded by mu, as are the faults
	faults faults

	mu        sync.Mutex
	engines   []*llama // the newest is last
	launched  int
	evaluated map[string]int // tokens, by model
	loads     int
	saves     int
	restores  int
	written   int64 // bytes
	saving    time.Duration
	evalTime  time.Duration
	loading   chan struct{}       // full while a model is being loaded or unloaded
	known     map[uint64][]uint32 // tokens of the prompts with these fingerprints
	attached  []attachment
}

// attachment is a successful restore.
type attachment struct {
	id, model string
}

// faults are failures to inject. They are called without a lock held, and may wait.
type faults struct {
	save, restore func(ctx context.Context, e *llama) error
}

// diskSpeed is the time that a disk takes for each KiB of a state.
type diskSpeed struct{ writing, reading time.Duration }

var ssd = diskSpeed{writing: 20 * time.Microsecond, reading: 10 * time.Microsecond}

func (o *ollama) fault() faults {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.faults
}

func (o *ollama) setFaults(f faults) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.faults = f
}

func (o *ollama) speed() diskSpeed {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.disk
}

func (o *ollama) setDisk(d diskSpeed) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.disk = d
}

func newOllama(t testing.TB, models map[string]modelSpec) *ollama {
	return &ollama{
		t: t, models: models, most: 1,
		disk:      ssd,
		evaluated: map[string]int{}, loading: make(chan struct{}, 1), known: map[uint64][]uint32{},
	}
}

// llama simulates a llama-server with the host cache off: see server-context.cpp.
type llama struct {
	o       *ollama
	id      string
	model   string
	context int
	spec    modelSpec
	compute chan struct{} // full while the engine evaluates, saves or restores
	ready   bool          // guarded by o.mu
	gone    chan struct{} // closed when the process ends

	mu      sync.Mutex
	slots   []llamaSlot
	task    int // the number of the next request
	clock   int
	changed chan struct{} // closed and replaced when a slot becomes idle
	running int
}

type llamaSlot struct {
	tokens            []uint32
	busy              bool
	restored          bool // its tokens are from a file, without checkpoints
	task              int
	used              int
	processed, cached int
}

// start starts an engine, and returns it when its model is loaded.
func (o *ollama) start(model string, context int) *llama {
	spec := o.models[model]
	o.mu.Lock()
	o.launched++
	e := &llama{
		o: o, id: fmt.Sprint(o.launched), model: model, context: context, spec: spec,
		compute: make(chan struct{}, 1), gone: make(chan struct{}), changed: make(chan struct{}),
		slots: make([]llamaSlot, max(spec.slots, 1)),
	}
	for i := range e.slots {
		e.slots[i].task, e.slots[i].used = -1, -1
	}
	o.loads++
	o.engines = append(o.engines, e)
	o.mu.Unlock()
	time.Sleep(loadTakes)
	o.mu.Lock()
	e.ready = true
	o.mu.Unlock()
	return e
}

// loaded returns the engine that has the model loaded with this context.
func (o *ollama) loaded(model string, context int) *llama {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range o.engines {
		if e.model == model && e.context == context && e.ready {
			return e
		}
	}
	return nil
}

// ensure ensures that a model is loaded, and counts a request there, so that it is not unloaded
// meanwhile.
func (o *ollama) ensure(model string, context int) *llama {
	o.loading <- struct{}{} // in turn: later requests wait, even for a loaded model
	defer func() { <-o.loading }()
	e := o.loaded(model, context)
	if e == nil {
		for !o.makeRoom(model) {
			time.Sleep(10 * time.Millisecond) // virtual: until a request has ended
		}
		e = o.start(model, context)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running++
	return e
}

// makeRoom ends the engines that prevent another one. It reports whether none is left.
func (o *ollama) makeRoom(model string) bool {
	o.mu.Lock()
	engines := slices.Clone(o.engines)
	most := max(o.most, 1)
	o.mu.Unlock()
	left := len(engines)
	for _, e := range engines {
		if e.model != model && left < most {
			continue
		}
		e.mu.Lock()
		running := e.running
		e.mu.Unlock()
		if running == 0 {
			e.end()
			left--
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	same := slices.ContainsFunc(o.engines, func(e *llama) bool { return e.model == model })
	return !same && len(o.engines) < most
}

// unload ends all engines, as a restart does.
func (o *ollama) unload() {
	o.mu.Lock()
	engines := slices.Clone(o.engines)
	o.mu.Unlock()
	for _, e := range engines {
		e.end()
	}
}

// end ends an engine's process.
func (e *llama) end() {
	e.o.mu.Lock()
	defer e.o.mu.Unlock()
	if i := slices.Index(e.o.engines, e); i >= 0 {
		e.o.engines = slices.Delete(e.o.engines, i, i+1)
		close(e.gone)
	}
}

const ollamaPort = 11434

// running is Config.Running.
func (o *ollama) running() (list []Running) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range o.engines {
		list = append(list, Running{
			Engine: e, ID: e.id, Port: ollamaPort, Files: []string{e.model}, Format: "build " + e.model,
			Slots: len(e.slots), Context: e.context,
		})
	}
	return list
}

// lock takes the engine's loop, which does one thing at a time.
func (e *llama) lock(ctx context.Context) error {
	select {
	case <-e.gone:
		return engine.ErrGone
	default:
	}
	select {
	case e.compute <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-e.gone:
		return engine.ErrGone
	}
}

func (e *llama) unlock() { <-e.compute }

// work keeps the loop busy for a while, even if the requester has given up.
func (e *llama) work(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-e.gone:
		return engine.ErrGone
	}
}

func (e *llama) take(ctx context.Context, d time.Duration) error {
	if err := e.lock(ctx); err != nil {
		return err
	}
	defer e.unlock()
	return e.work(d)
}

// choose returns the slot for a prompt, which is busy from then on: the one with the most tokens in
// common if these are more than a tenth of the prompt, or else the least recently used one, and the
// last of equal ones. -1: all are busy.
func (e *llama) choose(prompt []uint32) int {
	at, most := -1, 0
	for i := range e.slots {
		s := &e.slots[i]
		if n := lead(s.tokens, prompt); !s.busy && n > most && n*10 > len(prompt) {
			at, most = i, n
		}
	}
	for i := range e.slots {
		if at >= 0 && most > 0 || e.slots[i].busy {
			continue
		}
		if at < 0 || e.slots[i].used <= e.slots[at].used {
			at = i
		}
	}
	return at
}

func lead(a, b []uint32) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// when waits until the loop is free and is, called with e.mu held, returns true.
func (e *llama) when(ctx context.Context, is func() bool) error {
	for {
		if err := e.lock(ctx); err != nil {
			return err
		}
		e.mu.Lock()
		ok, changed := is(), e.changed
		e.mu.Unlock()
		if ok {
			return nil
		}
		e.unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-e.gone:
			return engine.ErrGone
		}
	}
}

// number returns the next task's number.
func (e *llama) number() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.task++
	return e.task - 1
}

// occupy waits for a slot.
func (e *llama) occupy(ctx context.Context, prompt []uint32) (at int, err error) {
	task := e.number()
	err = e.when(ctx, func() bool {
		if at = e.choose(prompt); at >= 0 {
			e.slots[at].busy, e.slots[at].task = true, task
		}
		return at >= 0
	})
	if err == nil {
		e.unlock()
	}
	return at, err
}

// release makes a slot idle. The engine's record of how the prompt was evaluated goes with that.
func (e *llama) release(i int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.clock++
	s := &e.slots[i]
	s.busy, s.used, s.processed, s.cached = false, e.clock, 0, 0
	close(e.changed)
	e.changed = make(chan struct{})
}

// complete evaluates a prompt and generates an answer. It calls began with the first token.
func (e *llama) complete(ctx context.Context, prompt []uint32, answer int, began func()) (Answer, error) {
	i, err := e.occupy(ctx, prompt)
	if err != nil {
		return Answer{}, err
	}
	defer e.release(i)
	e.mu.Lock()
	s := &e.slots[i]
	n := lead(s.tokens, prompt)
	if e.spec.window && s.restored && n < len(s.tokens) {
		n = 0
	}
	n = min(n, len(prompt)-1)
	s.tokens, s.restored, s.cached = slices.Clone(prompt[:n]), false, n
	e.mu.Unlock()

	a := Answer{Total: len(prompt), Cached: n, CachedKnown: true, Generated: answer}
	for n < len(prompt) {
		to := min(n+batch, len(prompt))
		took := perToken * time.Duration(to-n)
		if err := e.take(ctx, took); err != nil {
			return Answer{}, err
		}
		e.mu.Lock()
		s.tokens = append(s.tokens, prompt[n:to]...)
		s.processed += to - n
		e.mu.Unlock()
		e.o.mu.Lock()
		e.o.evaluated[e.model] += to - n
		e.o.evalTime += took
		e.o.mu.Unlock()
		a.Prompt += took
		n = to
	}
	for i, token := range (text{{"answer", answer}}).sequence() {
		if err := e.take(ctx, perAnswer); err != nil {
			return Answer{}, err
		}
		if i == 0 {
			began()
		}
		e.mu.Lock()
		if i < answer-1 { // the last token is not evaluated
			s.tokens = append(s.tokens, token)
		}
		e.mu.Unlock()
	}
	return a, nil
}

// Slots implements Engine.
func (e *llama) Slots(ctx context.Context) ([]engine.Slot, error) {
	if err := e.take(ctx, 100*time.Microsecond); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []engine.Slot
	for i, s := range e.slots {
		told := engine.Slot{ID: i, Processing: s.busy, Task: s.task, Context: e.context}
		if s.task >= 0 {
			told.Tokens, told.Processed, told.Cached = len(s.tokens), s.processed, s.cached
		}
		list = append(list, told)
	}
	return list, nil
}

// hold waits until a slot is idle, and takes the loop then. It does not change when the slot was
// used.
func (e *llama) hold(ctx context.Context, i int) error {
	if i >= len(e.slots) {
		return engine.ErrRefused
	}
	e.number()
	return e.when(ctx, func() bool { return !e.slots[i].busy })
}

// Save implements Engine.
func (e *llama) Save(ctx context.Context, i int, name string) (engine.Saved, error) {
	if f := e.o.fault().save; f != nil {
		if err := f(ctx, e); err != nil {
			return engine.Saved{}, err
		}
	}
	if err := e.hold(ctx, i); err != nil {
		return engine.Saved{}, err
	}
	defer e.unlock()
	e.mu.Lock()
	tokens := slices.Clone(e.slots[i].tokens)
	e.mu.Unlock()
	file := stateOf(tokens, e.model)
	size := int64(len(file) + stateBytes*len(tokens))
	took := e.o.speed().writing * time.Duration(size>>10)
	path := filepath.Join(e.o.files().Dir(), name)
	if err := os.WriteFile(path, file, 0o600); err != nil {
		return engine.Saved{}, err
	}
	if err := os.Truncate(path, size); err != nil {
		return engine.Saved{}, err
	}
	if err := e.work(took); err != nil {
		return engine.Saved{}, err
	}
	e.o.mu.Lock()
	defer e.o.mu.Unlock()
	e.o.saves++
	e.o.written += size
	e.o.saving += took
	return engine.Saved{Tokens: len(tokens), Bytes: size, Took: took}, nil
}

// stateOf returns the beginning of a state's file, as llama.cpp writes it, with the model's name in
// place of keys and values.
func stateOf(tokens []uint32, model string) []byte {
	var file []byte
	for _, w := range []uint32{0x67677371, 3, uint32(len(tokens)) + 3, 0xffffffff, 1, uint32(len(tokens))} {
		file = binary.LittleEndian.AppendUint32(file, w)
	}
	for _, w := range tokens {
		file = binary.LittleEndian.AppendUint32(file, w)
	}
	return fmt.Appendf(file, "%-16s", model)
}

// readState is the opposite of stateOf.
func readState(path string) (tokens []uint32, model string, err error) {
	file, err := os.ReadFile(path)
	if err != nil || len(file) < 40 || binary.LittleEndian.Uint32(file) != 0x67677371 {
		return nil, "", engine.ErrRefused
	}
	n := int(binary.LittleEndian.Uint32(file[20:]))
	if len(file) != 24+4*n+16+stateBytes*n {
		return nil, "", engine.ErrRefused // torn
	}
	for i := range n {
		tokens = append(tokens, binary.LittleEndian.Uint32(file[24+4*i:]))
	}
	return tokens, strings.TrimSpace(string(file[24+4*n:][:16])), nil
}

// Restore implements Engine.
func (e *llama) Restore(ctx context.Context, i int, name string, _ int64) (engine.Restored, error) {
	if err := e.hold(ctx, i); err != nil {
		return engine.Restored{}, err
	}
	defer e.unlock()
	e.mu.Lock()
	s := &e.slots[i]
	s.tokens, s.restored = nil, false // lost even if the file is refused
	e.mu.Unlock()
	if f := e.o.fault().restore; f != nil {
		if err := f(ctx, e); err != nil {
			return engine.Restored{}, err
		}
	}
	tokens, model, err := readState(filepath.Join(e.o.files().Dir(), name))
	if err != nil || len(tokens) > e.context {
		return engine.Restored{}, fmt.Errorf("%w: no such state", engine.ErrRefused)
	}
	if model != e.model {
		e.o.t.Errorf("a state of %s was attached to %s: answers would differ", model, e.model)
	}
	size := int64(len(tokens)) * stateBytes
	took := e.o.speed().reading * time.Duration(size>>10)
	if err := e.work(took); err != nil {
		return engine.Restored{}, err
	}
	e.mu.Lock()
	s.tokens, s.restored = tokens, true
	e.mu.Unlock()
	e.o.mu.Lock()
	defer e.o.mu.Unlock()
	e.o.restores++
	e.o.attached = append(e.o.attached, attachment{name, e.model})
	return engine.Restored{Tokens: len(tokens), Bytes: size, Took: took}, nil
}

// saved returns how many states were saved.
func (o *ollama) saved() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.saves
}

// total returns how many tokens of prompts were evaluated.
func (o *ollama) total() (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, v := range o.evaluated {
		n += v
	}
	return n
}

// proxied simulates a proxy in front of an ollama: a request waits for a lane, of which its model
// has as many as slots.
type proxied struct {
	*ollama
	m        *Manager // if nil, nothing is stored
	store    *contextstore.Files
	limit    contextstore.FileLimits
	dir      string
	stop     context.CancelFunc
	ended    chan struct{}
	failed   map[string]uint64 // Counts.Failed of managers that have ended
	mistakes int               // states that may be stored for the wrong prompts
	turn     chan struct{}     // full while a request is under way; nil: several may be under way
	blind    bool              // the engine does not report what was reused

	mu    sync.Mutex
	lanes map[string]chan struct{}
	gates map[string]*gate // by model
}

// gate gives a model's lanes to requests of one context length at a time, as the proxy's queue
// does: for another length the model must be reloaded.
type gate struct {
	mu      sync.Mutex
	context int
	n       int           // requests under way
	changed chan struct{} // closed when n becomes 0
}

func (g *gate) enter(context int) {
	g.mu.Lock()
	for g.n > 0 && g.context != context {
		changed := g.changed
		g.mu.Unlock()
		<-changed
		g.mu.Lock()
	}
	g.context = context
	g.n++
	g.mu.Unlock()
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n--; g.n == 0 {
		close(g.changed)
		g.changed = make(chan struct{})
	}
}

// ask is one request.
type ask struct {
	model   string
	context int // 0: 4096
	prompt  text
	answer  int    // tokens
	owner   string // a secret
	streams bool
	awaited bool // others are waiting
}

func newProxied(t testing.TB, models map[string]modelSpec, limit contextstore.FileLimits) *proxied {
	p := &proxied{
		ollama: newOllama(t, models), lanes: map[string]chan struct{}{}, gates: map[string]*gate{},
		failed: map[string]uint64{}, limit: limit,
		dir: filepath.Join(t.TempDir(), "contexts"),
	}
	p.files = func() *contextstore.Files { return p.store }
	return p
}

// begin starts the manager, with the states that an earlier one has stored.
func (p *proxied) begin() {
	p.t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, err := contextstore.OpenFiles(p.dir, p.limit, log)
	if err != nil {
		p.t.Fatal(err)
	}
	p.store = store
	p.m = New(Config{Running: p.running, Files: store, Log: log})
	ctx, stop := context.WithCancel(context.Background())
	p.stop, p.ended = stop, make(chan struct{})
	go func() {
		defer close(p.ended)
		p.m.Run(ctx)
	}()
}

// finish ends the manager, and checks the remaining state.
func (p *proxied) finish() {
	p.t.Helper()
	if p.m == nil {
		return
	}
	p.stop()
	<-p.ended
	p.check()
	for why, n := range p.m.Counts().Failed {
		p.failed[why] += n
	}
	if err := p.store.Close(context.Background()); err != nil {
		p.t.Error(err)
	}
	p.m = nil
}

// check checks invariants that hold whenever no request is under way.
func (p *proxied) check() {
	p.t.Helper()
	p.m.ending.Wait()
	p.m.mu.Lock()
	for _, l := range p.m.engines {
		if l.active != 0 {
			p.t.Errorf("engine %s is believed to serve %d requests", l.ID, l.active)
		}
		for i, s := range l.slots {
			if s.claimed {
				p.t.Errorf("slot %d of engine %s is claimed for ever", i, l.ID)
			}
		}
	}
	p.m.mu.Unlock()
	if n := p.m.loading.Load(); n != 0 {
		p.t.Errorf("models are believed to be loaded for %d requests", n)
	}
	if st := p.store.Stats(); st.Bytes > p.limit.Bytes {
		p.t.Errorf("%d bytes are stored, more than %d", st.Bytes, p.limit.Bytes)
	}
	p.checkStored()
}

// checkStored checks that each state has the tokens of the prompt that it is stored for.
func (p *proxied) checkStored() {
	p.t.Helper()
	wrong, example := 0, ""
	for _, s := range p.store.List() {
		tokens, _, err := readState(filepath.Join(p.dir, s.ID))
		if err != nil {
			p.t.Errorf("a state of %d tokens is torn: %v", s.Tokens, err)
			continue
		}
		p.ollama.mu.Lock()
		want := p.known[s.Links[len(s.Links)-1]]
		p.ollama.mu.Unlock()
		if n := lead(tokens, want); n < len(want) {
			wrong++
			example = fmt.Sprintf("for a prompt of %d tokens, with which it has %d in common", len(want), n)
		}
	}
	if wrong > p.mistakes {
		p.t.Errorf("%d states are stored for other prompts than theirs, such as one %s", wrong, example)
	}
}

// lane returns the lanes of a model.
func (p *proxied) lane(model string) chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lanes[model] == nil {
		p.lanes[model] = make(chan struct{}, max(p.models[model].slots, 1))
	}
	return p.lanes[model]
}

func (p *proxied) gate(model string) *gate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gates[model] == nil {
		p.gates[model] = &gate{changed: make(chan struct{})}
	}
	return p.gates[model]
}

// request returns a request as the manager sees it.
func (p *proxied) request(a ask) Request {
	contents, bytes := a.prompt.chain(a.model)
	p.ollama.mu.Lock()
	p.known[contents[len(contents)-1]] = a.prompt.sequence()
	p.ollama.mu.Unlock()
	var owner uint64
	if p.m != nil && a.owner != "" {
		owner = p.m.Owner([]byte(a.owner))
	}
	return Request{
		Port: ollamaPort, Weights: a.model, Model: a.model, Owner: owner, Contents: contents, Bytes: bytes,
		Loaded: p.loaded(a.model, a.context) != nil,
		Load: func(context.Context) (time.Duration, error) {
			began := time.Now()
			p.ensure(a.model, a.context).leave()
			return time.Since(began), nil
		},
	}
}

// leave ends what ensure began.
func (e *llama) leave() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running--; e.running < 0 {
		e.o.t.Error("more requests have ended than begun")
	}
}

// direct sends a request past the proxy.
func (p *proxied) direct(ctx context.Context, a ask) (Answer, error) {
	if a.context == 0 {
		a.context = 4096
	}
	return p.send(ctx, a, func() {})
}

func (p *proxied) send(ctx context.Context, a ask, began func()) (Answer, error) {
	e := p.ensure(a.model, a.context)
	defer e.leave()
	return e.complete(ctx, a.prompt.sequence(), a.answer, began)
}

// ask sends a request through the proxy. It returns when the request has ended, which may be before
// its lane is free again.
func (p *proxied) ask(ctx context.Context, a ask) (Answer, error) {
	if a.context == 0 {
		a.context = 4096
	}
	lane := p.lane(a.model)
	gate := p.gate(a.model)
	gate.enter(a.context)
	lane <- struct{}{}
	if p.turn != nil {
		p.turn <- struct{}{}
	}
	u := p.m.Before(ctx, p.request(a))
	got, err := p.send(ctx, a, func() {
		if a.streams {
			u.Began(!p.blind)
		}
	})
	told := got
	told.Awaited = a.awaited
	if p.blind {
		told.Cached, told.CachedKnown = u.Cached(told.Total)
	}
	var freed atomic.Bool
	u.After(told, func() {
		if !freed.CompareAndSwap(false, true) {
			p.t.Error("a lane was released more than once")
			return
		}
		if p.turn != nil {
			<-p.turn
		}
		<-lane
		gate.leave()
	})
	return got, err
}

// must is ask for requests that must not fail.
func (p *proxied) must(a ask) Answer {
	p.t.Helper()
	got, err := p.ask(context.Background(), a)
	if err != nil {
		p.t.Error(err)
	}
	return got
}

// rest waits until all lanes are free, and then for d.
func (p *proxied) rest(d time.Duration) {
	if p.m != nil {
		p.m.ending.Wait()
	}
	time.Sleep(d)
}
