package runners

import (
	"cmp"
	"context"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Shower is what a Book needs of a server; *upstream.Server implements it.
type Shower interface {
	Show(ctx context.Context, model string) (*api.ShowResponse, error)
}

const (
	showTimeout = 2 * time.Second // a request waits for it, once per model
	showAgain   = time.Minute     // after a failure
)

// Model is what a name refers to.
type Model struct {
	// Weights identifies the files from which Ollama makes a runner: the model, its adapters and
	// projectors. If they are unknown, it is the name.
	Weights string
	// Defaults are the runner options that the Modelfile sets.
	Defaults prefix.Options
	// Sliding means that the model's attention has a sliding window.
	Sliding bool
	// Sampling has the parameters that the Modelfile sets and a request may leave out.
	Sampling answers.Defaults
	// Clock is what its prompts say about the time.
	Clock answers.Clock
	// Values is how many numbers the attention's keys and values take per token, in all layers; 0
	// if unknown.
	Values int
}

// named is a name with the model that it refers to.
type named struct {
	digest string // of its manifest at that time
	Model
	again time.Time // when to ask again after a failure; zero: it did not fail
}

// Wanted is what a request needs loaded.
type Wanted struct {
	Name string // upstream.ModelKey
	// Options are the request's own, completed by the Modelfile's. Their Model identifies the
	// weights (Model.Weights). Requests with the same Options share a load; of those with the same
	// Model, Ollama holds one at a time.
	Options prefix.Options
	Known   bool // Options has everything that the request states
	Sliding bool // the model's attention has a sliding window
	Values  int  // see Model.Values
}

// Wanted returns what a request needs loaded that names a model (upstream.ModelKey). digest is that
// of its manifest, from /api/tags; "" if not known, and then the server is not asked. o are the
// options that the request states; nil if they are not known.
//
// The server is asked once per manifest, for at most two seconds.
func (b *Book) Wanted(name, digest string, o *prefix.Options) Wanted {
	m := b.resolve(name, digest)
	w := Wanted{Name: name, Known: o != nil, Sliding: m.Sliding, Values: m.Values}
	if o != nil {
		w.Options = o.Over(m.Defaults)
	}
	w.Options.Model = m.Weights
	return w
}

// Model returns what a name refers to. Its digest is as for Wanted.
func (b *Book) Model(name, digest string) Model { return b.resolve(name, digest) }

func (b *Book) resolve(name, digest string) Model {
	if digest == "" || b.show == nil {
		return Model{Weights: b.Weights(name)}
	}
	if n, ok := b.find(name, digest); ok {
		return n.Model
	}
	found, _, _ := b.asking.Do(digest, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), showTimeout) // other requests wait for it, too
		defer cancel()
		show, err := b.show.Show(ctx, name)
		n := named{digest: digest, Model: Model{Weights: name}, again: time.Now().Add(showAgain)}
		switch {
		case err == nil:
			n.Model, n.again = describe(name, show), time.Time{}
		case upstream.NoConnection(err) || upstream.Closed(err):
			n.again = time.Now() // it is restarting, which fails at once
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.names.Add(name, n)
		return n.Model, nil
	})
	return found.(Model)
}

// find returns the record of a name, or of another name that is a copy of it.
func (b *Book) find(name, digest string) (named, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, ok := b.names.Get(name)
	if ok && n.digest == digest && (n.again.IsZero() || time.Now().Before(n.again)) {
		return n, true
	}
	for _, other := range b.names.Values() {
		if other.digest == digest && other.again.IsZero() {
			b.names.Add(name, other)
			return other, true
		}
	}
	return named{}, false
}

// Weights returns the weights of a model, by its name, as far as they are known. It does not ask
// the server.
func (b *Book) Weights(name string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.peek(name).Weights
}

// Name returns the name, in the form of upstream.ModelKey, under which these weights were last
// used. If there is none, it returns the weights.
func (b *Book) Name(weights string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	name := weights
	for _, key := range b.names.Keys() { // the most recently used one is last
		if n, ok := b.names.Peek(key); ok && n.Weights == weights {
			name = key
		}
	}
	return name
}

// ByWeights returns a list of /api/ps by the models' weights.
func (b *Book) ByWeights(list []upstream.Loaded) map[string]upstream.Loaded {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.byWeights(list)
}

func (b *Book) byWeights(list []upstream.Loaded) map[string]upstream.Loaded {
	loaded := make(map[string]upstream.Loaded, len(list))
	for _, l := range list {
		loaded[b.weights(l)] = l
	}
	return loaded
}

func (b *Book) peek(name string) Model {
	if n, ok := b.names.Peek(name); ok {
		return n.Model
	}
	return Model{Weights: name}
}

// weights returns the weights of a loaded model. b.mu must be held.
func (b *Book) weights(l upstream.Loaded) string {
	if n, ok := b.names.Peek(upstream.ModelKey(l.Name)); ok && (l.Digest == "" || n.digest == l.Digest) {
		return n.Weights
	}
	for _, n := range b.names.Values() {
		if l.Digest != "" && n.digest == l.Digest {
			return n.Weights
		}
	}
	return upstream.ModelKey(l.Name)
}

// describe reads the answer of /api/show.
func describe(name string, show *api.ShowResponse) Model {
	m := Model{Weights: weightsOf(show.Modelfile)}
	if m.Weights == "" {
		m.Weights = name
	}
	for line := range strings.Lines(show.Parameters) {
		if f := strings.Fields(line); len(f) == 2 {
			m.Defaults.Set(f[0], f[1]) // most parameters are not runner options
			setSampling(&m.Sampling, f[0], f[1])
		}
	}
	info := modelInfo(show.ModelInfo)
	m.Clock = answers.ClockOf(show.Modelfile, show.Template)
	m.Sliding, m.Values = info.number("attention.sliding_window") > 0, info.values()
	return m
}

// setSampling sets one of a Modelfile's parameters.
func setSampling(d *answers.Defaults, name, value string) {
	switch name {
	case "temperature":
		if t, err := strconv.ParseFloat(value, 64); err == nil {
			d.Temperature = &t
		}
	case "seed":
		if n, err := strconv.ParseInt(value, 10, 64); err == nil {
			d.Seed = &n
		}
	}
}

// modelInfo is what a model's file says about it, under keys that begin with its architecture.
type modelInfo map[string]any

// number returns the number under a key, or 0 if it is not a number.
func (m modelInfo) number(key string) float64 {
	for k, v := range m {
		if n, ok := v.(float64); ok && strings.HasSuffix(k, "."+key) {
			return n
		}
	}
	return 0
}

// values returns how many numbers the keys and values take per token, or 0 if that is not known.
func (m modelInfo) values() int {
	heads := m.number("attention.head_count")
	if heads == 0 {
		return 0
	}
	each := m.number("embedding_length") / heads
	both := cmp.Or(m.number("attention.key_length"), each) + cmp.Or(m.number("attention.value_length"), each)
	return int(m.number("block_count") * cmp.Or(m.number("attention.head_count_kv"), heads) * both)
}

// weightsOf returns the names of the files with which a Modelfile begins, as Ollama writes it, or
// "" if it names none.
func weightsOf(modelfile string) string {
	var files []string
	for line := range strings.Lines(modelfile) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		command, path, _ := strings.Cut(line, " ")
		switch command {
		case "FROM", "ADAPTER", "DRAFT":
		default:
			return strings.Join(files, "+") // what follows may be any text
		}
		if !strings.ContainsAny(path, `/\`) {
			return "" // a name, so the files are not known
		}
		path = strings.ReplaceAll(path, `\`, "/")
		files = append(files, filepath.Base(path))
	}
	return strings.Join(files, "+")
}
