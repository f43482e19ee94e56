// Package contexts keeps the states of prompts that an Ollama server has evaluated on disk, and
// gives them back to the server when a prompt with the same beginning comes: after a reload, after
// a restart, and when another prompt has taken the slot. It owns the decisions: when a state is
// saved, when it is attached, and whether a model can use it.
//
// It keeps no file (see contextstore.Files), starts no engine (see package engine) and forwards no
// request: package proxy calls it before each request is sent and when it has ended. What it
// believes of an engine's slots may be wrong, since others use the server, too. The engine itself
// compares a prompt's tokens with those of its slot, whatever was put there, so that a wrong belief
// costs time and never an answer.
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

// Engine is what the manager needs of a llama-server; engine.Process implements it.
type Engine interface {
	Slots(ctx context.Context) ([]engine.Slot, error)
	Save(ctx context.Context, slot int, name string) (engine.Saved, error)
	Restore(ctx context.Context, slot int, name string, size int64) (engine.Restored, error)
}

// Running is a running engine.
type Running struct {
	Engine
	ID         string   // of this process, never reused
	Port       int      // of its Ollama server
	Files      []string // the base names of its model's, its projector's and its adapters' files
	Format     string   // everything but tokens that a state depends on: see engine.Process.Format
	Slots      int      // at least 1
	Context    int      // tokens per slot; 0: not known
	Full       bool     // it keeps all tokens of a model with a sliding window
	ValueBytes float64  // per number in its cache
}

// Config configures a Manager. Running, Files and Log must be set.
type Config struct {
	// Told, if non-nil, is called for each engine that is found, with whether states are attached
	// to it, and again when that changes. It must not call the manager.
	Told func(e Running, attaches bool)

	Running func() []Running // returns the engines that run now, the newest last; called for each request
	Files   *contextstore.Files
	Log     *slog.Logger
}

// Manager makes the decisions. Make it with New, and run Run. Its methods are safe for concurrent
// use; those of the nil Manager do nothing.
type Manager struct {
	Config
	wake    chan struct{}   // holds one
	ending  sync.WaitGroup  // ended requests whose states are being saved
	life    context.Context // in which engines save; cancelled by end
	end     context.CancelFunc
	loading atomic.Int64 // requests for which the model is being loaded

	mu      sync.Mutex
	engines map[string]*live    // by Running.ID; guarded by mu
	formats map[string]*learned // by Running.Format; guarded by mu
	disk    disk                // guarded by mu
	// underway are the requests that have not ended, in order of arrival; guarded by mu.
	underway []*Use
	beside   map[pair]bool   // models that were seen loaded beside each other; guarded by mu
	counts   Counts          // guarded by mu
	warned   map[string]bool // the Failed… reasons that were logged since they last went well; guarded by mu
}

// Counts are what a manager has done since it was made.
type Counts struct {
	Saved      uint64 // states
	SavedBytes uint64 // … and their bytes
	Attached   uint64 // states
	Filled     uint64 // states that were attached before anybody asked: see Fill
	// Tokens is how many tokens of prompts were not evaluated again because a state was attached.
	// Evaluation is how long that would have taken, estimated from the speed of other evaluations.
	Tokens     uint64
	Evaluation time.Duration
	Failed     map[string]uint64 // by reason: see the Failed… constants
}

// Why something failed, or was done in vain.
const (
	FailedSave    = "save"    // the engine could not save a state: the disk is full, slow or read-only
	FailedAttach  = "attach"  // the engine refused a state, or did not answer
	FailedUnused  = "unused"  // a state was attached, and the engine evaluated the prompt nevertheless
	FailedChanged = "changed" // a slot held something other than expected when it was saved
)

// live is a running engine, and what is believed of its slots.
type live struct {
	Running
	acting chan struct{} // full while states of idle slots are saved; new requests wait for that

	// Guarded by Manager.mu.
	told, attaches bool // whether Config.Told was called for it, and with what

	slots  []slot
	saving []chan struct{} // by slot: closed when its content has been saved; nil: it is not being saved
	active int             // requests that are sent to it or wait for acting, and have not ended
	ended  time.Time       // when the last of them ended
	clock  uint64          // counts the requests that ended
	open   []*Use          // requests whose slots are not known yet, in the order in which they were sent; none if there is one slot
}

// slot is what is believed of an engine's slot. The zero slot holds nothing that is known.
type slot struct {
	prompt
	tokens  int // of the prompt and its answer
	again   bool
	used    uint64 // live.clock when a request last used it
	claimed bool   // a request was sent that is expected to use it
	cannot  bool   // be saved
	task    int    // the engine's number of the last request that was seen to use it
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

// Owner returns the owner that stands for a secret, or 0 for nil.
func (m *Manager) Owner(secret []byte) uint64 {
	if m == nil || secret == nil {
		return 0
	}
	return m.Files.OwnerOf(string(secret))
}

// Shared reports whether states are attached whoever their owners are.
func (m *Manager) Shared() bool { return m.Files.Stats().Limits.Share }

// Counts returns what has been done so far.
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
	Weights  string   // of its model, as package runners names them: its files, joined by +
	Model    string   // its name, for display
	Owner    uint64   // who sends it; 0: nobody in particular
	Contents []uint64 // prefix.Chain.Contents
	Bytes    []int    // of text, up to and including each link

	// Values is how many numbers the engine keeps per token; 0: not known.
	Values int
	// Sliding means that the model's attention has a sliding window.
	Sliding bool
	// Loaded means that the model is certainly loaded as the request needs it.
	Loaded bool
	// Load has the model loaded as the request needs it, and returns how long that took.
	Load func(ctx context.Context) (time.Duration, error)
}

// Use is a request that is sent to an engine. The nil Use does nothing.
type Use struct {
	m    *Manager
	r    Request
	on   *live // nil: not known
	slot int   // that it is expected to use; -1: not known

	warm     int // tokens of its prompt that a slot was believed to hold
	expected int // tokens expected to be reused beyond that because of an attached state; 0: none was attached
	exact    bool
	attached string // the state's ID
	loading  time.Duration
	sought   bool          // on was looked for again, since it was not there before
	done     chan struct{} // closed when the request has ended

	place place // guarded by Manager.mu
}

// Answer is how a request ended. The zero Answer means that it had no result, and that the content
// of its slot is not known.
type Answer struct {
	Unsent      bool // it did not reach the server
	Total       int  // tokens of the prompt; 0: not known
	Cached      int  // reused ones of these if CachedKnown; otherwise an estimate, or -1
	CachedKnown bool
	Generated   int           // tokens of the answer
	Prompt      time.Duration // evaluating the prompt; 0: not known
	Awaited     bool          // other requests wait that may use what this one has evaluated
	Unloads     bool          // the model is unloaded at the answer's end (keep_alive 0)
}

// Loading is how long the load took that Before caused, or 0.
func (u *Use) Loading() time.Duration {
	if u == nil {
		return 0
	}
	return u.loading
}

// Attached is how many tokens of the request's prompt are in the state that was attached for it; 0:
// none was.
func (u *Use) Attached() int {
	if u == nil || u.expected == 0 {
		return 0
	}
	return u.warm + u.expected
}

// Before prepares the server for a request that is about to be sent: it saves what the request's
// slot would lose, and attaches what is stored of its prompt if that takes much less time than it
// saves. It returns when the request may be sent.
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
	u.on.active++ // so that at most the save that is under way comes first
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

// set sets the engine. Other requests look at it, too: see rival.
func (u *Use) set(on *live) {
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	u.on = on
}

// over records that the request has ended.
func (u *Use) over() {
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	if i := slices.Index(u.m.underway, u); i >= 0 {
		u.m.underway = slices.Delete(u.m.underway, i, i+1)
		close(u.done)
	}
}

// outlasts waits until the earlier requests to other models of a server have ended, where one of
// the two models may have to make room for the other. A model is unloaded at the moment in which
// its last request ends, and then its state could no longer be saved. The server would make this
// request wait for them, too. Models that were seen loaded beside each other do not wait. It
// reports whether it has waited.
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

// rival returns an earlier request, to another model of the same server that was not seen loaded
// beside this one's, and how long it is worth waiting for; nil if there is none.
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

// outlast returns how long another request waits for this one: twice as long as its state takes to
// evaluate, once for the evaluation and once for its possible loss, within bounds. m.mu must be
// held.
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

// together records which models are loaded beside each other. m.mu must be held.
func (m *Manager) together(all []*live) {
	for i, a := range all {
		for _, b := range all[:i] {
			if a.Port == b.Port && a.Files[0] != b.Files[0] {
				m.beside[pairOf(a.request(), b.request())] = true
			}
		}
	}
}

// request returns a request to the engine's model.
func (r *Running) request() Request {
	return Request{Port: r.Port, Weights: strings.Join(r.Files, "+")}
}

// sized estimates how large a state of the model will be, before the first one shows.
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

// act begins something that excludes requests. It reports whether that began before ctx ended; then
// rest ends it.
func (l *live) act(ctx context.Context) bool {
	select {
	case l.acting <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (l *live) rest() { <-l.acting }

// scan returns the running engines, and forgets those that have ended.
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

// known returns what is known of each running engine. m.mu must be held.
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

// find returns the engine that runs the request's model, the newest if there are several, or nil.
func (m *Manager) find(r Request) (found *live) {
	for _, l := range m.scan() {
		if l.Port == r.Port && l.runs(r.Weights) && (found == nil || len(l.Files) >= len(found.Files)) {
			found = l
		}
	}
	return found
}

// runs reports whether the engine runs these weights: files joined by +, the model's first. There
// may be a draft model, too, which is not part of a state.
func (r *Running) runs(weights string) bool {
	files := strings.Split(weights, "+")
	return len(r.Files) > 0 && r.Files[0] == files[0] && !slices.ContainsFunc(r.Files, func(file string) bool {
		return !slices.Contains(files, file)
	})
}

// restores reports whether the engine can use the states of the request's model. Those of a model
// with a sliding window have only the last window, and no prompt was found to continue from that
// (tried with Gemma 3 on Ollama 0.34.1, also with a chat's next turn).
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

// load has the request's model loaded before the request is sent, if there is a stored state that
// can be attached then. What is loaded may have to make room for it, so its states are saved first.
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
		return // the request itself will show the error
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
	// The engine takes the slot that shares most with the prompt if that is more than a tenth of it
	// (--slot-prompt-similarity), otherwise the least recently used one.
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

// replace is called if nothing is attached: it saves what the request's slot loses, if that is
// worth it.
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
		m.save(ctx, on, lost[i]) // the engine takes the least recently used one
	}
}

// idle asks which slots are idle. An engine with one slot is not asked: whoever has its lane has
// its slot.
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

// warmest returns how many tokens of the request's prompt a slot is believed to hold, and which
// slot; -1 if none. Manager.mu must be held.
func (l *live) warmest(r Request) (tokens, at int) {
	at = -1
	for i, s := range l.slots {
		if n := s.shared(r.Contents); n > tokens && !s.claimed {
			tokens, at = n, i
		}
	}
	return tokens, at
}

// choose claims the idle slot that loses least if something is attached to it. Of several it takes
// the most recently used one, since the engine gives the least recently used one to a prompt that
// fits none.
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
	// Without a warm slot, the request takes one that loses as much, or more.
	if loses > gain/2 && u.slot >= 0 && best != u.slot || on.slots[best].claimed && best != u.slot {
		return 0, false
	}
	u.claim(best)
	return best, true
}

// claim records which slot the request is expected to use. Manager.mu must be held.
func (u *Use) claim(slot int) {
	if u.slot >= 0 {
		u.on.slots[u.slot].claimed = false
	}
	u.slot = slot
	u.on.slots[slot].claimed = true
}

// cheapest returns the idle slot that loses least, and how long that takes to evaluate again, or -1
// if none is idle.
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

// After records how the request ended. It calls release once, when the lane may be given to another
// request: at once, or as soon as a valuable state has been saved.
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
		// An engine that hangs must not hold the lane.
		defer time.AfterFunc(longestHold, free).Stop()
		ctx, cancel := context.WithTimeout(m.life, saveTimeout)
		defer cancel()
		if i := u.identify(ctx, held); i >= 0 && hold {
			m.save(ctx, on, i)
		}
		free()
	})
}

// begun reports whether the engine that the request ran on is known. If the model was loaded for
// the request, it is looked for now.
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

// ended learns from an answer, and returns what the request's slot holds, with no tokens if that is
// not known. asks means that the engine must be asked which slot that is.
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

// judge learns from the number of reused tokens whether what was attached was of use. Manager.mu
// must be held.
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
		// It may belong to another client's prompt that ran in the slot when it was saved. As long
		// as it is there, the state of this prompt is not stored.
		m.Files.Drop(u.attached, "the engine made no use of it")
	}
	if !helped {
		m.counts.Failed[FailedUnused]++
		return
	}
	m.counts.Tokens += uint64(saved)
	m.counts.Evaluation += l.evaluation(saved)
}

// failed counts a failure, and logs a warning if it is the first since the last success. m.mu must
// be held.
func (m *Manager) failed(why, message string, args ...any) {
	m.counts.Failed[why]++
	level := slog.LevelWarn
	if m.warned[why] {
		level = slog.LevelDebug
	}
	m.warned[why] = true
	m.Log.Log(context.Background(), level, message, args...)
}

// worked records a success. m.mu must be held.
func (m *Manager) worked(why string) { delete(m.warned, why) }

// nudge makes Run look again.
func (m *Manager) nudge() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}
