package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// fakeKeeper is a server's memory: which models are loaded, and until when.
type fakeKeeper struct {
	mu      sync.Mutex
	expires map[string]time.Time // of the loaded models, by name as /api/ps spells it; guarded by mu
	context map[string]int       // … their contexts, if a test sets them; guarded by mu
	busy    map[string]bool      // others use it, so a keep_alive has no effect yet; guarded by mu
	keeps   []string             // "model duration [embed]"; guarded by mu
	loads   []string             // models that a Keep has loaded; guarded by mu
	asked   int                  // calls of Loaded; guarded by mu
	refuse  func(model string, embedding bool) error
	during  func(ctx context.Context, model string) // runs while a Keep is under way
	down    bool                                    // Loaded fails; guarded by mu
}

func newFakeKeeper() *fakeKeeper {
	return &fakeKeeper{expires: map[string]time.Time{}, context: map[string]int{}, busy: map[string]bool{}}
}

func (k *fakeKeeper) Loaded(context.Context) ([]upstream.Loaded, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked++
	if k.down {
		return nil, errors.New("down")
	}
	var list []upstream.Loaded
	for name, at := range k.expires {
		if at.After(time.Now()) || k.busy[name] {
			list = append(list, upstream.Loaded{Name: name, ExpiresAt: at, ContextLength: k.context[name]})
		}
	}
	return list, nil
}

func (k *fakeKeeper) Keep(ctx context.Context, model string, d time.Duration, embedding bool, options map[string]any, _ *bool) error {
	text := fmt.Sprint(model, " ", d)
	if d == upstream.Forever {
		text = model + " forever"
	}
	if embedding {
		text += " embed"
	}
	if n := options["num_ctx"]; n != nil {
		text += fmt.Sprint(" num_ctx ", n)
	}
	k.mu.Lock()
	k.keeps = append(k.keeps, text)
	refuse, during := k.refuse, k.during
	k.mu.Unlock()
	if during != nil {
		during(ctx, model)
	}
	if refuse != nil {
		if err := refuse(model, embedding); err != nil {
			return err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for name := range k.expires {
		if upstream.ModelKey(name) == upstream.ModelKey(model) {
			if d == 0 {
				delete(k.expires, name)
			} else if !k.busy[name] {
				k.expires[name] = time.Now().Add(d)
			}
			return nil
		}
	}
	k.loads = append(k.loads, model)
	return nil
}

// load loads a model, or uses it, with Ollama's own five minutes.
func (k *fakeKeeper) load(model string) { k.loadFor(model, 5*time.Minute) }

func (k *fakeKeeper) loadFor(model string, d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.expires[model] = time.Now().Add(d)
}

func (k *fakeKeeper) evict(model string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.expires, model)
}

func (k *fakeKeeper) refusing(refuse func(model string, embedding bool) error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.refuse = refuse
}

// taken returns the Keeps so far and clears them.
func (k *fakeKeeper) taken() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	taken := k.keeps
	k.keeps = nil
	return taken
}

// bed is a residency under test, running in a synctest bubble.
type bed struct {
	t *testing.T
	k *fakeKeeper
	r *residency
	p KeepAlive

	book *runners.Book
}

// inBed runs a test in a bubble with a fake clock.
func inBed(t *testing.T, p KeepAlive, test func(b *bed)) {
	synctest.Test(t, func(t *testing.T) {
		k := newFakeKeeper()
		b := &bed{t: t, k: k, p: p}
		b.book = runners.New(nil, nil)
		b.r = newResidency(k, b.book, p, func(string, error) {}, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { b.r.run(ctx) }) // ends with cancel
		test(b)
		cancel()
		wg.Wait()
		if len(k.loads) > 0 {
			t.Errorf("touches loaded %v, which were not loaded", k.loads)
		}
	})
}

// request is a request that was sent to the server.
type sentRequest struct {
	use
	run *runners.Request
}

func (q sentRequest) answer() {
	q.run.Answered()
	q.use.answer()
}

func (q sentRequest) end() {
	q.use.end()
	q.run.End(time.Now(), runners.Outcome{Accepted: true, Unload: q.unloads()})
}

// refused ends a request that the server did not accept.
func (q sentRequest) refused() {
	q.use.end()
	q.run.End(time.Now(), runners.Outcome{Refused: true})
}

// beginForeign begins a request that cannot carry keep_alive.
func beginForeign(r *residency, model string, embed bool) sentRequest {
	stated := &prefix.Options{}
	run := r.runners.Begin(time.Now(), r.runners.Wanted(upstream.ModelKey(model), "", stated))
	return sentRequest{r.beginForeign(run, model, embed, stated), run}
}

// beginNative begins a native request that states these options; nil: unknown.
func beginNative(r *residency, model string, stated *prefix.Options, f fields) (sentRequest, string, Hold) {
	run := r.runners.Begin(time.Now(), r.runners.Wanted(upstream.ModelKey(model), "", stated))
	u, did, hold := r.beginNative(run, model, false, stated, f)
	return sentRequest{u, run}, did, hold
}

// foreign serves one request of d that cannot carry keep_alive; it loads the model.
func (b *bed) foreign(model string, d time.Duration) {
	u := beginForeign(b.r, model, false)
	b.k.load(model)
	b.k.mu.Lock()
	b.k.expires[model] = later(b.k.expires[model], time.Now())
	b.k.mu.Unlock()
	u.answer()
	time.Sleep(d)
	u.end()
}

// native serves one native request; keepAlive is its JSON, "" for none.
func (b *bed) native(model, keepAlive string) {
	b.t.Helper()
	body := `{"model":"` + model + `"}`
	if keepAlive != "" {
		body = `{"model":"` + model + `","keep_alive":` + keepAlive + `}`
	}
	f, err := scan([]byte(body), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	u, _, hold := beginNative(b.r, model, nil, f)
	d := f.duration
	if hold != (Hold{}) {
		d = hold.Duration
	}
	u.answer()
	time.Sleep(time.Second)
	switch {
	case hold == (Hold{}) && f.keepAlive != keepAliveSet:
		b.k.load(model)
	case d == 0:
		b.k.evict(model)
	default:
		b.k.loadFor(model, d)
	}
	u.end()
}

// want lets time pass and compares the touches.
func (b *bed) want(after time.Duration, touches ...string) {
	b.t.Helper()
	time.Sleep(after)
	synctest.Wait()
	if got := b.k.taken(); !slices.Equal(got, touches) {
		b.t.Errorf("touches %q, want %q", got, touches)
	}
}
