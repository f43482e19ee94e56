// Package contexts keeps the state of prompts that an Ollama server has evaluated on disk, and gives
// it back to the server when a prompt comes that begins alike: after the model was loaded again, after
// a restart, and where another prompt took the slot. It owns the decisions: when a state is saved,
// when it is attached, and when it turns out that a model makes no use of it.
//
// It keeps no file (see contextstore.Files), starts no engine (see package engine) and forwards no
// request: package proxy tells it of each before it is sent and when it has ended. What it believes of
// an engine's slots may be wrong, since others use the server, too. The engine itself compares a
// prompt's tokens with those of its slot, whatever was put there, so that a wrong belief costs time
// and never an answer.
package contexts

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// Engine is what the manager asks of a llama-server: engine.Process.
type Engine interface {
	Slots(ctx context.Context) ([]engine.Slot, error)
	Save(ctx context.Context, slot int, name string) (engine.Saved, error)
	Restore(ctx context.Context, slot int, name string, size int64) (engine.Restored, error)
}

// Running is an engine that runs now.
type Running struct {
	Engine
	ID         string   // of this process, never used again
	Port       int      // on which its Ollama server listens
	Files      []string // the base names of its model's, its projector's and its adapters'
	Format     string   // all that a state depends on beside its tokens: see engine.Process.Format
	Slots      int      // at least 1
	Context    int      // tokens, of each slot; 0: not known
	Full       bool     // it keeps all tokens of a model with a sliding window
	ValueBytes float64  // of each number in its cache
}

// Config is what a Manager works with. Running, Files and Log must be set.
type Config struct {
	// Told is told of each engine that is found, and whether states are attached to it: again when
	// that changes. It must not call the manager. Nil: nobody listens.
	Told func(e Running, attaches bool)

	Running func() []Running // the engines that run now, the newest last; called for each request
	Files   *contextstore.Files
	Log     *slog.Logger
}

// Manager decides. Make it with New, and have Run running. Its methods may be called from any
// goroutine; those of the nil Manager do nothing.
type Manager struct {
	Config
	wake    chan struct{}   // holds one
	ending  sync.WaitGroup  // of requests that have ended, and whose states are being saved
	life    context.Context // in which engines save; ended by end
	end     context.CancelFunc
	loading atomic.Int64 // requests for which the model is being loaded

	mu      sync.Mutex
	engines map[string]*live    // by Running.ID; guarded by mu
	formats map[string]*learned // by Running.Format; guarded by mu
	disk    disk                // guarded by mu
	// underway are the requests that have not ended, in the order in which they came; guarded by mu.
	underway []*Use
	beside   map[pair]bool   // models that were seen loaded beside each other; guarded by mu
	counts   Counts          // guarded by mu
	warned   map[string]bool // guarded by mu: that these, of the Failed… constants, go wrong
}

// Counts are what a manager did since it was made.
type Counts struct {
	Saved      uint64 // states
	SavedBytes uint64 // … of so many bytes
	Attached   uint64 // states
	Filled     uint64 // states that were attached before anybody asked: see Fill
	// Tokens is how many tokens of prompts were not evaluated again since a state was attached, and
	// Evaluation how long that would have taken, estimated from the speed of other evaluations.
	Tokens     uint64
	Evaluation time.Duration
	Failed     map[string]uint64 // by reason: see the Failed… constants
}

// Why something could not be done, or was done in vain.
const (
	FailedSave    = "save"    // the engine could not save a state: the disk is full, slow or read-only
	FailedAttach  = "attach"  // the engine refused a state, or did not answer
	FailedUnused  = "unused"  // a state was attached, and the engine evaluated the prompt nevertheless
	FailedChanged = "changed" // a slot held something else than was believed when it was saved
)

// live is an engine that runs, and what is believed of its slots.
type live struct {
	Running
	acting chan struct{} // full while states of idle slots are saved; new requests wait for that

	// Guarded by Manager.mu.
	told, attaches bool // Config.Told was told of it, and what

	slots  []slot
	saving []chan struct{} // by slot: closed when what that holds has been saved; nil: it is not being saved
	active int             // requests that are sent to it, or wait for acting, and have not ended
	ended  time.Time       // when the last of them ended
	clock  uint64          // counts the requests that ended
	open   []*Use          // those whose slots are not known yet, as they were sent; none if there is one slot
}

// slot is what is believed of an engine's slot. The zero slot holds nothing that is known.
type slot struct {
	prompt
	tokens  int // of the prompt and of its answer
	again   bool
	used    uint64 // live.clock when a request last used it
	claimed bool   // a request was sent that is expected to use it
	cannot  bool   // be saved
	task    int    // the engine's number for the last request that was seen to use it
}

// New returns a manager.
func New(c Config) *Manager {
	life, end := context.WithCancel(context.Background())
	return &Manager{
		Config: c, life: life, end: end, wake: make(chan struct{}, 1),
		beside: map[pair]bool{}, engines: map[string]*live{}, formats: map[string]*learned{}, disk: newDisk(),
		counts: Counts{Failed: map[string]uint64{}}, warned: map[string]bool{},
	}
}

// Owner returns what stands for whoever has a secret; 0 for nil.
func (m *Manager) Owner(secret []byte) uint64 {
	if m == nil || secret == nil {
		return 0
	}
	return m.Files.OwnerOf(string(secret))
}

// Shared reports whether states are attached whoever their owners are.
func (m *Manager) Shared() bool { return m.Files.Stats().Limits.Share }

// Counts returns what was done so far.
func (m *Manager) Counts() Counts {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.counts
	c.Failed = maps.Clone(c.Failed)
	return c
}

// Request is one that is about to be sent to a server.
type Request struct {
	Port     int      // of the server, which is on this machine
	Weights  string   // of its model, as package runners names them: its files, with + between them
	Model    string   // its name, for people
	Owner    uint64   // whose it is; 0: nobody's in particular
	Contents []uint64 // prefix.Chain.Contents
	Bytes    []int    // of text, up to and with each link

	// Values is how many numbers the engine keeps for each token; 0: not known.
	Values int
	// Sliding says that the model's attention has a sliding window.
	Sliding bool
	// Loaded says that the model is loaded as the request needs it, for certain.
	Loaded bool
	// Load has the model loaded as the request needs it, and returns how long that took.
	Load func(ctx context.Context) (time.Duration, error)
}

// Use is a request that is sent to an engine. The nil Use does nothing.
type Use struct {
	m    *Manager
	r    Request
	on   *live // nil: none is known
	slot int   // that it is expected to use; -1: not known

	warm     int // tokens of its prompt that a slot was believed to hold
	expected int // tokens that are to be reused beyond that since a state was attached; 0: none was
	exact    bool
	attached string // the state's ID
	loading  time.Duration
	sought   bool          // on was sought once more, since it was not there before
	done     chan struct{} // closed when the request has ended

	place place // guarded by Manager.mu
}

// Answer is how a request ended. The zero Answer: nothing came of it, and what its slot holds is not
// known.
type Answer struct {
	Unsent      bool // it did not reach the server
	Total       int  // tokens of the prompt; 0: not known
	Cached      int  // of these reused, if CachedKnown; else an estimate, -1 for none
	CachedKnown bool
	Generated   int           // tokens of the answer
	Prompt      time.Duration // evaluating the prompt; 0: not known
	Awaited     bool          // other requests wait, perhaps for what this one has evaluated
	Unloads     bool          // the model is unloaded with the answer's end (keep_alive 0)
}

// Loading is how long the model took to load, where Before had it loaded; else 0.
func (u *Use) Loading() time.Duration {
	if u == nil {
		return 0
	}
	return u.loading
}

// Attached is how many tokens of the request's prompt a state has that was attached for it; 0: none was.
func (u *Use) Attached() int {
	if u == nil || u.expected == 0 {
		return 0
	}
	return u.warm + u.expected
}

// Before prepares the server for a request that is about to be sent: what its slot would lose is
// saved, and what is stored of its prompt attached, where that takes much less time than it saves. It
// returns when the request may be sent.
func (m *Manager) Before(ctx context.Context, r Request) *Use {
	if m == nil || len(r.Contents) == 0 {
		return nil
	}
	u := &Use{m: m, r: r, slot: -1, place: place{after: -1}, done: make(chan struct{})}
	m.mu.Lock()
	m.underway = append(m.underway, u)
	m.mu.Unlock()
	u.seek()
	if u.outlasts(ctx) {
		u.seek()
	}
	if u.on == nil || !r.Loaded {
		u.load(ctx)
	}
	if u.on != nil && !m.restores(u.on, r) {
		u.over()
		return nil
	}
	u.sized()
	if u.on == nil { // the model is loaded for this request, or by an engine that is not linked
		m.loading.Add(1)
		m.nudge()
		return u
	}
	m.mu.Lock()
	u.on.active++ // so that at most the state is saved first that is being saved
	m.mu.Unlock()
	defer u.sends()
	if !u.on.act(ctx) {
		return u
	}
	u.on.rest()
	if !u.attach(ctx) {
		u.replace(ctx)
	}
	return u
}

// seek finds the engine that runs the request's model.
func (u *Use) seek() { u.set(u.m.find(u.r)) }

// set notes the engine. Others look at it, too: see rival.
func (u *Use) set(on *live) {
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	u.on = on
}

// over says that the request has ended.
func (u *Use) over() {
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	if i := slices.Index(u.m.underway, u); i >= 0 {
		u.m.underway = slices.Delete(u.m.underway, i, i+1)
		close(u.done)
	}
}

// outlasts waits until the requests to other models have ended that came before this one to a server,
// where one of the two models may have to make room for the other: what is unloaded is unloaded in
// the moment in which its last request ends, and what that left could not be saved any more. The
// server would have this one wait for them, too. Of models that were seen loaded beside each
// other neither waits. It reports whether it has waited.
func (u *Use) outlasts(ctx context.Context) (waited bool) {
	began := time.Now()
	for {
		o, worth := u.rival()
		if o == nil || time.Since(began) > worth || ctx.Err() != nil {
			return waited
		}
		waited = true
		select {
		case <-o.done:
		case <-time.After(scanSoon): // they may be loaded beside each other by now
			u.m.scan()
		case <-ctx.Done():
		}
	}
}

// rival returns a request that came before this one, to another model of its server that was not seen
// loaded beside this one's, and for how long it is worth waiting for that; nil: there is none.
func (u *Use) rival() (*Use, time.Duration) {
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	for _, o := range u.m.underway {
		if o == u {
			break
		}
		if o.r.Port == u.r.Port && o.r.Weights != u.r.Weights && !u.m.beside[pairOf(u.r, o.r)] {
			return o, u.m.outlast(o)
		}
	}
	return nil, 0
}

// outlast returns for how long another request waits for this one: for twice as long as what it leaves
// takes to evaluate, once by itself and once again if it is lost, within bounds. m.mu must be held.
func (m *Manager) outlast(u *Use) time.Duration {
	if u.on == nil {
		return usualOutlast // it is being loaded
	}
	again := m.learned(u.on.Format).evaluation(u.r.estimate())
	return min(max(2*again, leastOutlast), mostOutlast)
}

// pair is two models of one server.
type pair struct {
	port          int
	first, second string
}

func pairOf(a, b Request) pair {
	return pair{a.Port, min(a.Weights, b.Weights), max(a.Weights, b.Weights)}
}

// together notes which models are loaded beside each other. m.mu must be held.
func (m *Manager) together(all []*live) {
	for i, a := range all {
		for _, b := range all[:i] {
			if a.Port == b.Port && a.Files[0] != b.Files[0] {
				m.beside[pairOf(a.request(), b.request())] = true
			}
		}
	}
}

// request is one to the engine's model.
func (r *Running) request() Request {
	return Request{Port: r.Port, Weights: strings.Join(r.Files, "+")}
}

// sized notes how large a state of the model will be, before the first one tells.
func (u *Use) sized() {
	if u.on == nil || u.r.Values == 0 {
		return
	}
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	if l := u.m.learned(u.on.Format); l.perState == 0 {
		l.perState = float64(u.r.Values) * u.on.ValueBytes
	}
}

// act begins what no request may be in the way of. It reports whether that was before ctx ended;
// rest ends it then.
func (l *live) act(ctx context.Context) bool {
	select {
	case l.acting <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (l *live) rest() { <-l.acting }

// scan returns the engines that run, and forgets those that do not.
func (m *Manager) scan() []*live {
	running := m.Running()
	m.mu.Lock()
	all := m.known(running)
	m.together(all)
	var news []func()
	for _, l := range all {
		if attaches := m.learned(l.Format).useful(false); !l.told || l.attaches != attaches {
			l.told, l.attaches = true, attaches
			news = append(news, func() { m.Told(l.Running, attaches) })
		}
	}
	m.mu.Unlock()
	for _, tell := range news {
		if m.Told != nil {
			tell()
		}
	}
	return all
}

// known returns what is known of each engine that runs. m.mu must be held.
func (m *Manager) known(running []Running) []*live {
	maps.DeleteFunc(m.engines, func(id string, _ *live) bool {
		return !slices.ContainsFunc(running, func(e Running) bool { return e.ID == id })
	})
	all := make([]*live, 0, len(running))
	for _, e := range running {
		l := m.engines[e.ID]
		if l == nil {
			l = &live{
				Running: e, slots: make([]slot, e.Slots), ended: time.Now(), acting: make(chan struct{}, 1),
				saving: make([]chan struct{}, e.Slots),
			}
			for i := range l.slots {
				l.slots[i].task = -1 // an engine's first request has the number 0
			}
			m.engines[e.ID] = l
		}
		all = append(all, l)
	}
	return all
}

// find returns the engine that runs the request's model, the newest if there are several; nil: none.
func (m *Manager) find(r Request) (found *live) {
	for _, l := range m.scan() {
		if l.Port == r.Port && l.runs(r.Weights) && (found == nil || len(l.Files) >= len(found.Files)) {
			found = l
		}
	}
	return found
}

// runs reports whether the engine runs these weights: files with + between them, the model's first.
// They may have a draft model, too, which is no part of a state.
func (r *Running) runs(weights string) bool {
	files := strings.Split(weights, "+")
	return len(r.Files) > 0 && r.Files[0] == files[0] && !slices.ContainsFunc(r.Files, func(file string) bool {
		return !slices.Contains(files, file)
	})
}

// restores reports whether the engine makes use of the states of the request's model. Those of one
// with a sliding window have no more than the last window, and no prompt is found to go on from that
// (seen with Gemma 3 on Ollama 0.34.1, with a chat's next turn, too).
func (m *Manager) restores(on *live, r Request) bool {
	if !r.Sliding || on.Full {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.learned(on.Format); !l.named {
		l.named = true
		m.Log.Warn("no context is stored for this model, which has a sliding window: that takes "+
			"'ollama-cacheproxy engine link --swa-full', and more memory", "model", r.Model)
	}
	return false
}

// load has the request's model loaded before the request is sent, if a state is stored that can be
// attached then. What is loaded may have to make room for it, so that its states are saved first.
func (u *Use) load(ctx context.Context) {
	m := u.m
	m.Leave(ctx, u.r.Port)
	best, ok := m.best("", 0, u.r)
	if !ok || u.r.Load == nil || !m.pays(best, 0) {
		return
	}
	took, err := u.r.Load(ctx)
	if err != nil {
		m.Log.Debug("the model could not be loaded to attach a context", "model", u.r.Model, "err", err)
		return // the request itself will tell
	}
	u.loading = took
	if u.seek(); u.on == nil {
		m.Log.Debug("no engine is found to attach a context to", "model", u.r.Model, "weights", u.r.Weights)
	}
}

// attach puts the best stored state into a slot, if that saves much more time than it takes.
func (u *Use) attach(ctx context.Context) bool {
	m, on := u.m, u.on
	m.mu.Lock()
	warm, at := on.warmest(u.r)
	// The engine takes the slot with the most in common if that is more than a tenth of the prompt
	// (--slot-prompt-similarity), else the one that was used least recently.
	if u.warm = warm; at >= 0 && warm*10 >= u.r.estimate() {
		u.claim(at)
	}
	m.mu.Unlock()
	best, ok := m.best(on.Format, on.Context, u.r)
	if !ok || !m.pays(best, warm) {
		m.Log.Debug("no context attached", "model", u.r.Model, "stored", ok, "common", best.reach, "warm", warm)
		return false
	}
	gain := m.gain(best, warm)
	if err := m.check(ctx, best, gain); err != nil {
		m.Log.Debug("no context attached", "model", u.r.Model, "context", best.ID, "err", err)
		return false // it has changed, and the engine would not notice
	}
	i, ok := u.choose(ctx, gain)
	if !ok {
		m.Log.Debug("no context attached, for want of a slot", "model", u.r.Model, "context", best.ID)
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, max(gain, leastTimeout))
	defer cancel()
	got, err := on.Restore(ctx, i, best.ID, best.Bytes)
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &on.slots[i]
	if *s = (slot{task: s.task, used: s.used, claimed: true}); err != nil {
		m.attachFailed(best, err)
		return true
	}
	s.prompt, s.tokens, s.again = best.prompt(), got.Tokens, true
	u.expected, u.exact, u.attached = best.reach-warm, best.exact, best.ID
	m.disk.attaching.measured(best.Bytes, got.Took)
	m.counts.Attached++
	m.worked(FailedAttach)
	m.Log.Debug("context attached", "model", best.Model, "context", best.ID, "tokens", best.Tokens,
		"common", best.reach, "warm", warm, "slot", i, "took", got.Took)
	m.Files.Used(best.ID)
	return true
}

// replace is called where nothing is attached: what the request's slot loses is saved, if it is worth
// that.
func (u *Use) replace(ctx context.Context) {
	m, on := u.m, u.on
	m.mu.Lock()
	if u.slot < 0 && len(on.slots) == 1 && !on.slots[0].claimed {
		u.claim(0)
	}
	var lost []int
	for i, s := range on.slots {
		if s.tokens-u.warm >= leastTokens && (u.slot == i || u.slot < 0 && !s.claimed) {
			lost = append(lost, i)
		}
	}
	slices.SortFunc(lost, func(a, b int) int { return cmp.Compare(on.slots[a].used, on.slots[b].used) })
	m.mu.Unlock()
	lost = slices.DeleteFunc(lost, func(i int) bool { return !m.due(on, i, leaving) })
	if len(lost) == 0 {
		return
	}
	idle, err := u.idle(ctx, statusTimeout)
	if err != nil {
		return
	}
	if i := slices.IndexFunc(lost, idle); i >= 0 {
		m.save(ctx, on, lost[i]) // the engine takes the one that was used least recently
	}
}

// idle asks which slots are idle. An engine with one slot is not asked: who has its lane has its slot.
func (u *Use) idle(ctx context.Context, limit time.Duration) (func(slot int) bool, error) {
	if len(u.on.slots) == 1 {
		return func(int) bool { return true }, nil
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	list, err := u.on.Engine.Slots(ctx)
	if err != nil {
		return nil, err
	}
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	for _, s := range list {
		u.place.after = max(u.place.after, s.Task)
	}
	return func(slot int) bool {
		return slices.ContainsFunc(list, func(s engine.Slot) bool { return s.ID == slot && !s.Processing })
	}, nil
}

// warmest returns how many tokens of the request's prompt a slot is believed to hold, and which; -1:
// none. Manager.mu must be held.
func (l *live) warmest(r Request) (tokens, at int) {
	at = -1
	for i, s := range l.slots {
		if n := s.shared(r.Contents); n > tokens && !s.claimed {
			tokens, at = n, i
		}
	}
	return tokens, at
}

// choose claims the idle slot that loses least if something is attached to it: of several the one that
// was used last, since the engine gives the one used least recently to a prompt that fits none.
func (u *Use) choose(ctx context.Context, gain time.Duration) (int, bool) {
	m, on := u.m, u.on
	idle, err := u.idle(ctx, max(gain/4, statusTimeout))
	if err != nil {
		return 0, false
	}
	best, loses := u.cheapest(idle)
	if best < 0 {
		return 0, false
	}
	if m.due(on, best, leaving) && m.save(ctx, on, best) {
		loses = 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Without a slot of its own that is warm, the request takes one that loses as much, or more.
	if loses > gain/2 && u.slot >= 0 && best != u.slot || on.slots[best].claimed && best != u.slot {
		return 0, false
	}
	u.claim(best)
	return best, true
}

// claim says which slot the request is expected to use. Manager.mu must be held.
func (u *Use) claim(slot int) {
	if u.slot >= 0 {
		u.on.slots[u.slot].claimed = false
	}
	u.slot = slot
	u.on.slots[slot].claimed = true
}

// cheapest returns the idle slot that loses least, and how long that takes to evaluate again; -1: none is
// free.
func (u *Use) cheapest(idle func(slot int) bool) (best int, loses time.Duration) {
	m, on := u.m, u.on
	best, used := -1, uint64(0)
	for i := range on.slots {
		m.mu.Lock()
		s := on.slots[i]
		m.mu.Unlock()
		if s.claimed && i != u.slot || !idle(i) {
			continue
		}
		cost := m.unsaved(on, s)
		if best < 0 || cost < loses || cost == loses && s.used > used {
			best, loses, used = i, cost, s.used
		}
	}
	return best, loses
}

// After says how the request ended. It calls release, once, when its lane may be given to another
// request: at once, or as soon as a state that is worth it has been saved.
func (u *Use) After(a Answer, release func()) {
	if u == nil {
		release()
		return
	}
	free := sync.OnceFunc(func() {
		u.over()
		release()
	})
	if !u.begun() {
		free()
		return
	}
	m, on := u.m, u.on
	held, asks := u.ended(a)
	if held.tokens == 0 {
		free()
		return
	}
	when := ending
	if len(on.slots) > 1 && a.Awaited {
		when = copying
	}
	hold := m.saves(on, held, when)
	if !hold && !asks {
		free()
		return
	}
	m.ending.Go(func() {
		if !hold {
			free()
		}
		// An engine that hangs does not hold the lane up.
		defer time.AfterFunc(longestHold, free).Stop()
		ctx, cancel := context.WithTimeout(m.life, saveTimeout)
		defer cancel()
		if i := u.identify(ctx, held); i >= 0 && hold {
			m.save(ctx, on, i)
		}
		free()
	})
}

// begun reports whether an engine is known that the request ran on. Where the model was loaded for it,
// that is found now.
func (u *Use) begun() bool {
	if u.on != nil && (u.r.Loaded || u.m.runs(u.on)) {
		return true
	}
	if u.on != nil { // it was replaced for the request
		u.m.mu.Lock()
		u.close()
		u.on.active--
		u.on, u.slot, u.warm, u.expected, u.sought = nil, -1, 0, 0, true
		u.m.mu.Unlock()
	}
	if !u.sought {
		u.sought = true
		u.m.loading.Add(-1)
	}
	on := u.m.find(u.r)
	if on == nil || !u.m.restores(on, u.r) {
		return false
	}
	u.set(on)
	u.sized()
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	u.on.active++
	if len(u.on.slots) > 1 {
		u.on.open = slices.Insert(u.on.open, 0, u)
	}
	return true
}

// runs reports whether an engine runs now.
func (m *Manager) runs(on *live) bool {
	return slices.Contains(m.scan(), on)
}

// ended takes in what an answer tells, and returns what the slot holds that the request used, with
// no tokens if that is not known; asks says that the engine must be asked which slot that is.
func (u *Use) ended(a Answer) (held slot, asks bool) {
	m, on := u.m, u.on
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.nudge()
	defer func() {
		if !asks {
			u.close()
		}
	}()
	on.active--
	on.ended = time.Now()
	on.clock++
	if u.slot >= 0 {
		on.slots[u.slot].claimed = false
	}
	switch {
	case a.Unsent:
		return slot{}, false
	case a.Total == 0:
		if u.slot >= 0 {
			on.slots[u.slot] = slot{task: on.slots[u.slot].task}
		}
		return slot{}, false
	case a.Cached >= 0:
		m.learned(on.Format).evaluated(a.Total-a.Cached, a.Prompt)
		u.judge(a.Cached)
	}
	if a.Unloads {
		return slot{}, false // by the time that it could be saved, it is gone
	}
	held = slot{
		prompt: prompt{
			contents: u.r.Contents, upTo: spread(a.Total, u.r.Bytes), owner: u.r.Owner, model: u.r.Model,
		},
		tokens: a.Total + a.Generated, used: on.clock, again: u.warm >= leastTokens || u.expected > 0,
	}
	if len(on.slots) == 1 {
		held.task = on.slots[0].task
		on.slots[0] = held
		return held, false
	}
	u.place.holds = a.Total + max(a.Generated-1, 0)
	return held, true
}

// judge learns whether what was attached was of use, from how many tokens were reused. Manager.mu must
// be held.
func (u *Use) judge(cached int) {
	if u.expected == 0 {
		return
	}
	m, l := u.m, u.m.learned(u.on.Format)
	saved := cached - u.warm
	helped := saved >= u.expected/2
	if l.judge(u.exact, helped) {
		m.Log.Warn("stored contexts seem to be of no use to this model, and are not attached for a while",
			"model", u.r.Model)
	}
	if saved < leastTokens {
		// It may be another prompt's: somebody else's that ran in the slot when it was saved. As long as it is
		// there, that of this prompt is not stored.
		m.Files.Drop(u.attached, "the engine made no use of it")
	}
	if !helped {
		m.counts.Failed[FailedUnused]++
		return
	}
	m.counts.Tokens += uint64(saved)
	m.counts.Evaluation += l.evaluation(saved)
}

// failed counts that something went wrong, and tells that as a warning the first time since it went well.
// m.mu must be held.
func (m *Manager) failed(why, message string, args ...any) {
	m.counts.Failed[why]++
	level := slog.LevelWarn
	if m.warned[why] {
		level = slog.LevelDebug
	}
	m.warned[why] = true
	m.Log.Log(context.Background(), level, message, args...)
}

// worked notes that something went well. m.mu must be held.
func (m *Manager) worked(why string) { delete(m.warned, why) }

// nudge has Run look again.
func (m *Manager) nudge() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}
