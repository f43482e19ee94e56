package proxy

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// probeTexts are what a model is asked to embed again and again, alone and in arrays. They are short,
// so that nobody waits for them noticeably, and of different lengths, so that batches differ.
var probeTexts = [...]string{
	"The tide was out.",
	"A list of what is in the cellar: two chairs, a ladder, seven empty jars.",
	"She wrote down the number of the train, the hour at which it left, and the name of the town.",
}

const (
	// probeWait is how long a request whose vectors are kept waits for the model to be tried.
	probeWait = 5 * time.Second
	// probeLimit is how long the trial of a model may take.
	probeLimit = time.Minute
	// probesMost is how often a model is tried if its answers are not what was expected.
	probesMost = 5
	// knownMost is how many models are remembered.
	knownMost = 1000
)

// known is what is known of a model: whether it gives the same vectors again.
type known struct {
	verdictEntry
	tried  bool
	tries  int           // how many trials have ended without a verdict
	trying chan struct{} // closed when the trial ends; nil if there is none
}

// verdictEntry is a model on the page of the answers.
type verdictEntry struct {
	Model   string `json:"model"`
	Digest  string `json:"digest"`
	Version string `json:"version"` // of Ollama
	Vectors string `json:"vectors"` // "unit": of length 1, or "raw": as /api/embeddings gives them
	Serves  bool   `json:"served"`  // kept vectors are served
	answers.Repeats
}

// probe is the trial of a model.
type probe struct {
	key     answers.Key // of the verdict
	known   *known
	request answers.EmbedRequest
	r       *http.Request // like which those of the trial are …
	ex      *exchange     // … and for whose client
	on      *backend
	options *prefix.Options // with which the model is loaded; nil: unknown
	bodies  [][]byte        // for each text alone, then for arrays, forwards and backwards
}

// verdict returns what is known of the request's model, if anything is.
func (e *embedding) verdict() (repeats answers.Repeats, tried bool) {
	v, key := &e.h.vectors, e.verdictKey()
	v.mu.Lock()
	k := v.known[key]
	v.mu.Unlock()
	if k == nil {
		k = &known{verdictEntry: verdictEntry{
			Model: upstream.DisplayName(e.ex.key), Digest: e.digest, Version: e.version, Vectors: e.Family(),
		}}
		list, err := e.h.Answers.Get(e.r.Context(), []answers.Key{key})
		if err == nil && list[0].Data != nil && json.Unmarshal(list[0].Data, &k.Repeats) == nil {
			k.tried, k.Serves = true, k.Repeats.Serves()
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if first := v.known[key]; first != nil {
		k = first
	} else {
		if len(v.known) >= knownMost {
			clear(v.known)
		}
		v.known[key] = k
	}
	return k.Repeats, k.tried
}

func (e *embedding) verdictKey() answers.Key {
	return answers.MakeKey(e.h.Answers.Secret(), answers.Verdict, "vectors", e.Family(), e.digest, e.version)
}

// trial waits until the model was tried if any vector of the request is kept and that can be done
// now. It reports whether kept vectors may be served.
func (e *embedding) trial(list []answers.Entry) bool {
	if !slices.ContainsFunc(list, func(entry answers.Entry) bool { return entry.Data != nil }) {
		return false
	}
	done := e.h.vectors.try(e, nil)
	if done == nil {
		return false
	}
	timer := time.NewTimer(probeWait)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-e.r.Context().Done():
	}
	repeats, tried := e.verdict()
	return tried && repeats.Serves()
}

// tryLater has the model tried, now that it is loaded, unless it was tried before.
func (e *embedding) tryLater(tried bool) {
	if !tried && e.sub != nil && e.sub.Outcome == OK {
		e.h.vectors.try(e, e.sub)
	}
}

// try asks for a model to be tried on the server that a request was sent to, or may be sent to. It
// returns what is closed when the trial ends; nil if there will be none.
func (v *vectors) try(e *embedding, sent *exchange) <-chan struct{} {
	p := &probe{key: e.verdictKey(), request: e.EmbedRequest, r: e.r, ex: e.ex, options: e.ex.options()}
	if e.ex.reads == readsForeign {
		p.options = &prefix.Options{}
	}
	if sent != nil {
		p.on = sent.up
	} else if list := e.h.candidates(e.ex); len(list) > 0 {
		p.on = pick(list, e.ex.key)
	}
	if f := e.ex.fields; p.on == nil || f.keepAlive == keepAliveSet && f.duration == 0 {
		return nil // it is unloaded at once
	}
	p.write(e)
	v.mu.Lock()
	defer v.mu.Unlock()
	k := v.known[p.key]
	switch {
	case k == nil || k.tried || !v.runs || k.tries >= probesMost:
		return nil
	case k.trying == nil:
		k.trying = make(chan struct{})
		p.known = k
		v.wants = append(v.wants, p)
		select {
		case v.wake <- struct{}{}:
		default:
		}
	}
	return k.trying
}

// write writes the bodies of the requests: the client's with other inputs.
func (p *probe) write(e *embedding) {
	add := func(input any) {
		text, _ := json.Marshal(input) // cannot fail: these are texts
		p.bodies = append(p.bodies, e.With(e.data, text))
	}
	for _, text := range probeTexts {
		add(text)
	}
	back := slices.Clone(probeTexts[:])
	slices.Reverse(back)
	add(probeTexts)
	add(back)
}

// tries tries models until ctx ends.
func (h *Handler) tries(ctx context.Context) {
	v := &h.vectors
	v.ready()
	v.mu.Lock()
	v.runs = true
	v.mu.Unlock()
	for {
		v.mu.Lock()
		var p *probe
		if len(v.wants) > 0 {
			p, v.wants = v.wants[0], v.wants[1:]
		}
		v.mu.Unlock()
		if p != nil {
			h.try(ctx, p)
			continue
		}
		select {
		case <-v.wake:
		case <-ctx.Done():
			v.stop()
			return
		}
	}
}

// stop ends the waits for trials.
func (v *vectors) stop() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.runs = false
	for _, p := range v.wants {
		close(p.known.trying)
		p.known.trying = nil
	}
	v.wants = nil
}

// try tries a model, if it is loaded and no request is on its way to its server.
func (h *Handler) try(ctx context.Context, p *probe) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	repeats, begun, ok := answers.Repeats{Same: true, Batches: true}, false, false
	if p.on.inFlight.Load() == 0 && p.loaded(ctx) {
		begun = true
		ok = h.asksAgain(ctx, p, &repeats)
	}
	if ok {
		data, _ := json.Marshal(repeats) // cannot fail: numbers and truth values
		h.Answers.Put(ctx, []answers.Entry{{Key: p.key, Kind: answers.Verdict, Made: time.Now(), Data: data}})
		said := "the vectors of this model are kept, and served from now on"
		if !repeats.Serves() {
			said = "the vectors of this model differ from one time to the next, so none is kept"
		}
		h.Log.Info(said, "model", p.known.Model, "upstream", p.on.Name, "same_again", repeats.Same,
			"same_in_arrays", repeats.Batches, "cosine_distance", repeats.Cosine, "largest_difference", repeats.Largest)
	}
	v := &h.vectors
	v.mu.Lock()
	defer v.mu.Unlock()
	k := p.known
	if begun && !ok {
		k.tries++
	}
	if ok {
		k.Repeats, k.tried, k.Serves = repeats, true, repeats.Serves()
	}
	close(k.trying)
	k.trying = nil
}

// loaded reports whether the model is loaded as the requests need it.
func (p *probe) loaded(ctx context.Context) bool {
	key := p.ex.key
	if p.options != nil && !p.on.runners.Loaded(p.on.wanted(key, p.options)) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	list, err := p.on.Server.Loaded(ctx)
	if err != nil {
		return false
	}
	_, ok := p.on.loaded(list, key)
	return ok
}

// asksAgain asks for the texts alone, alone again, and together in both orders.
func (h *Handler) asksAgain(ctx context.Context, p *probe, repeats *answers.Repeats) bool {
	ask := func(body []byte, n int) ([][]float32, bool) {
		sub, rec := h.subrequest(ctx, p.r, p.ex, body)
		if sub.Outcome != OK || rec.status != http.StatusOK || sub.up != p.on {
			return nil, false
		}
		return p.request.Vectors(rec.body.Bytes(), n)
	}
	var alone [len(probeTexts)][]float32
	for i := range 2 * len(probeTexts) {
		list, ok := ask(p.bodies[i%len(probeTexts)], 1)
		if !ok {
			return false
		}
		if i < len(probeTexts) {
			alone[i] = list[0]
			continue
		}
		repeats.Compare(alone[i-len(probeTexts)], list[0], true)
	}
	if !p.request.Lists() {
		return h.asksTogether(ask, p, alone[:], repeats)
	}
	for n, body := range p.bodies[len(probeTexts):] {
		list, ok := ask(body, len(probeTexts))
		if !ok {
			return false
		}
		if n == 1 {
			slices.Reverse(list)
		}
		for i := range list {
			repeats.Compare(alone[i], list[i], false)
		}
	}
	return true
}

// asksTogether asks for the texts at the same time, where an array cannot be asked for.
func (h *Handler) asksTogether(
	ask func([]byte, int) ([][]float32, bool), p *probe, alone [][]float32, repeats *answers.Repeats,
) bool {
	var wg sync.WaitGroup
	lists := make([][][]float32, len(alone))
	for i := range alone {
		wg.Go(func() { lists[i], _ = ask(p.bodies[i], 1) })
	}
	wg.Wait()
	for i, list := range lists {
		if list == nil {
			return false
		}
		repeats.Compare(alone[i], list[0], false)
	}
	return true
}

// verdicts returns what is known of models, for the page.
func (v *vectors) verdicts() []verdictEntry {
	v.mu.Lock()
	defer v.mu.Unlock()
	list := []verdictEntry{}
	for _, k := range v.known {
		if k.tried {
			list = append(list, k.verdictEntry)
		}
	}
	slices.SortFunc(list, func(a, b verdictEntry) int {
		return strings.Compare(a.Model+a.Digest+a.Version+a.Vectors, b.Model+b.Digest+b.Version+b.Vectors)
	})
	return list
}
