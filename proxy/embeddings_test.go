package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// ideal is an Ollama that embeds every text in the same way, in virtual time, and proxies for it.
type ideal struct {
	t     *testing.T
	store answers.Store
	stop  func()

	mu     sync.Mutex
	digest string
	texts  []string // that reached the model; guarded by mu
	asked  int      // requests for vectors; guarded by mu
	loaded bool
	gone   bool                                                      // it refuses connections, as it were; guarded by mu
	lists  time.Duration                                             // how long the list of models takes; guarded by mu
	change func(r *http.Request, texts []string, i int, v []float32) // of the vectors; may be nil

	h      *Handler
	up     *upstream.Server
	client *http.Client
	log    *logBuffer
	ended  []Exchange // guarded by mu
}

// embedTime is how long the ideal Ollama takes for a text.
const embedTime = 10 * time.Millisecond

// newIdeal must be called in a bubble.
func newIdeal(t *testing.T, store answers.Store, change func(*Handler)) *ideal {
	procs := runtime.GOMAXPROCS(1) // see newOffice
	t.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	d := &ideal{t: t, store: store, digest: "sha256:1", log: &logBuffer{}}
	if store == nil {
		d.store = answers.NewMemory(answers.Limits{Bytes: 64 << 20})
	}
	listeners := map[string]*ollamasim.Listener{"ideal:80": ollamasim.Listen(), "proxy:80": ollamasim.Listen()}
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		return listeners[addr].DialContext(ctx, network, addr)
	}
	transport := NewTransport()
	transport.DialContext = dial
	log := slog.New(slog.NewJSONHandler(d.log, nil))
	d.up = upstream.NewServer("ideal", &url.URL{Scheme: "http", Host: "ideal"}, transport, log)
	d.h = &Handler{
		Upstreams: []*upstream.Server{d.up}, Transport: transport, NoTouch: true, Log: log,
		Ledger:  savings.New(contextstore.NewMemory(contextstore.Limits{Entries: 1e6, Bytes: 1 << 28}), 10),
		Guard:   Guard{AllowHosts: []string{"*"}},
		Answers: d.store,
		Done: func(ex Exchange) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.ended = append(d.ended, ex)
		},
	}
	if change != nil {
		change(d.h)
	}
	d.h.Init()
	d.up.Polled = func(st upstream.State) { d.h.Polled(d.up, st) }
	ctx, cancel := context.WithCancelCause(context.Background())
	var wg sync.WaitGroup
	for name, handler := range map[string]http.Handler{"ideal:80": d, "proxy:80": d.h} {
		srv := &http.Server{Handler: handler, BaseContext: func(net.Listener) context.Context { return ctx }}
		wg.Go(func() { srv.Serve(listeners[name]) }) // ends with stop
		context.AfterFunc(ctx, func() { srv.Close() })
	}
	d.up.Poll(ctx)
	wg.Go(func() { d.up.Run(ctx) })
	wg.Go(func() { d.h.Run(ctx) })
	d.client = &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true}}
	d.stop = sync.OnceFunc(func() {
		d.client.CloseIdleConnections()
		synctest.Wait()
		cancel(ErrDrained)
		transport.CloseIdleConnections()
		wg.Wait()
	})
	t.Cleanup(d.stop)
	return d
}

func (d *ideal) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	digest, loaded, gone, lists := d.digest, d.loaded, d.gone, d.lists
	d.mu.Unlock()
	if gone {
		panic(http.ErrAbortHandler)
	}
	write := func(v any) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		text, _ := json.Marshal(v)
		w.Write(text)
	}
	model := map[string]any{"name": "m:latest", "model": "m:latest", "digest": digest, "context_length": 4096, "expires_at": time.Now().Add(time.Hour)}
	switch r.URL.Path {
	case "/api/version":
		write(map[string]any{"version": "0.34.1"})
	case "/api/tags":
		select {
		case <-time.After(lists):
		case <-r.Context().Done():
		}
		write(map[string]any{"models": []any{model}})
	case "/api/ps":
		list := []any{}
		if loaded {
			list = append(list, model)
		}
		write(map[string]any{"models": list})
	case "/api/show":
		write(map[string]any{"modelfile": "FROM /blobs/sha256-" + digest[7:]})
	case "/api/embed", "/v1/embeddings", "/api/embeddings":
		d.embed(w, r)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// embed answers as Ollama does.
func (d *ideal) embed(w http.ResponseWriter, r *http.Request) {
	var q struct {
		Model, Prompt string
		Input         any
		Dimensions    int
		Format        string `json:"encoding_format"`
		Options       map[string]any
		KeepAlive     *api.Duration `json:"keep_alive"`
	}
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	texts := []string{}
	switch v := q.Input.(type) {
	case string:
		texts = append(texts, v)
	case []any:
		for _, text := range v {
			texts = append(texts, text.(string))
		}
	default:
		texts = append(texts, q.Prompt)
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	d.mu.Lock()
	d.asked++
	d.texts = append(d.texts, texts...)
	d.loaded = q.KeepAlive == nil || q.KeepAlive.Duration != 0
	digest, change := d.digest, d.change
	d.mu.Unlock()
	answer := api.EmbedResponse{Model: q.Model, Embeddings: [][]float32{}, TotalDuration: time.Millisecond, LoadDuration: time.Microsecond}
	for i, text := range texts {
		select {
		case <-time.After(embedTime):
		case <-r.Context().Done():
			return
		}
		if strings.Contains(text, "bad") {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"error":"input %d of %d is bad"}`, i, len(texts))
			return
		}
		v := idealVector(fmt.Sprint(digest, text, q.Options, q.Dimensions, r.URL.Path == "/api/embeddings"), q.Dimensions)
		if change != nil {
			change(r, texts, i, v)
		}
		answer.Embeddings = append(answer.Embeddings, v)
		answer.PromptEvalCount += len(strings.Fields(text))
	}
	switch r.URL.Path {
	case "/api/embeddings":
		old := api.EmbeddingResponse{}
		for _, v := range answer.Embeddings[0] {
			old.Embedding = append(old.Embedding, float64(v))
		}
		text, _ := json.Marshal(old)
		w.Write(text)
	case "/v1/embeddings":
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(openai.ToEmbeddingList(q.Model, answer, q.Format))
	default:
		text, _ := json.Marshal(answer)
		w.Write(text)
	}
}

func idealVector(text string, dimensions int) []float32 {
	hash := fnv.New64a()
	hash.Write([]byte(text))
	random := rand.New(rand.NewPCG(hash.Sum64(), 1))
	if dimensions <= 0 || dimensions > 24 {
		dimensions = 24
	}
	v := make([]float32, dimensions)
	for i := range v {
		v[i] = float32(random.NormFloat64()) * float32(1e-8*float64(int(1)<<random.IntN(27)))
	}
	return v
}

func (d *ideal) send(ctx context.Context, base, path, body string, headers ...string) got {
	lib := library{t: d.t, client: d.client}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, base+path, strings.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		r.Header.Add(name, value)
	}
	return lib.sent(r)
}

// ask sends a request to the proxy.
func (d *ideal) ask(path string, body string, headers ...string) got {
	d.t.Helper()
	a := d.send(d.t.Context(), "http://proxy", path, body, headers...)
	if a.err != nil {
		d.t.Errorf("%s %s: %v", path, body, a.err)
	}
	return a
}

// direct asks the ideal Ollama itself, and leaves no trace.
func (d *ideal) direct(path, body string) (status int, text string) {
	d.mu.Lock()
	other := &ideal{t: d.t, digest: d.digest, change: d.change}
	d.mu.Unlock()
	w := httptest.NewRecorder()
	other.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)))
	return w.Code, w.Body.String()
}

// reached waits until nothing happens any more, and returns which texts have reached the server since
// the last call, without those of trials.
func (d *ideal) reached() (list []string) {
	time.Sleep(3 * time.Second) // of virtual time: vectors are kept once the models were listed
	synctest.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, text := range d.texts {
		if !slices.Contains(probeTexts[:], text) {
			list = append(list, text)
		}
	}
	d.texts, d.asked = nil, 0
	slices.Sort(list)
	return list
}

func embedBody(input any, more string) string {
	text, _ := json.Marshal(input)
	return fmt.Sprintf(`{"model":"m","input":%s%s}`, text, more)
}

var durations = regexp.MustCompile(`,"(total|load)_duration":\d+`)

// TestEmbeddings asks for arrays of which some, all or none of the inputs are known.
func TestEmbeddings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		for _, step := range []struct {
			path, body string
			reach      []string // the model
			status     string
		}{
			{"/api/embed", embedBody([]string{"a", "b", "a"}, ""), []string{"a", "b"}, "ollama-cacheproxy; fwd=uri-miss"},
			{"/api/embed", embedBody([]string{"a", "b", "a"}, ""), nil, "ollama-cacheproxy; hit; ttl="},
			{"/api/embed", embedBody([]string{"c", "b", "d d", "a"}, ""), []string{"c", "d d"}, `ollama-cacheproxy; fwd=partial; detail="2/4"`},
			{"/v1/embeddings", embedBody([]string{"d d", "e"}, ""), []string{"e"}, `ollama-cacheproxy; fwd=partial; detail="1/2"`},
			{"/v1/embeddings", embedBody("e", `,"encoding_format":"base64"`), nil, "ollama-cacheproxy; hit"},
			{"/api/embed", embedBody("e", `,"dimensions":4`), []string{"e"}, "ollama-cacheproxy; fwd=uri-miss"},
			{"/api/embed", embedBody("e", `,"options":{"num_ctx":100}`), []string{"e"}, "ollama-cacheproxy; fwd=uri-miss"},
			{"/api/embed", embedBody("e", `,"options":{"num_ctx":1e2}`), nil, "ollama-cacheproxy; hit"},
			{"/api/embed", embedBody("e", `,"truncate":false`), []string{"e"}, "ollama-cacheproxy; fwd=uri-miss"},
			{"/api/embed", embedBody("e", `,"keep_alive":0`), []string{"e"}, ""},
			{"/api/embed", `{"model":"M:latest","input":"e"}`, []string{"e"}, "ollama-cacheproxy; fwd=uri-miss"},
			{"/api/embeddings", `{"model":"m","prompt":"e"}`, []string{"e"}, "ollama-cacheproxy; fwd=uri-miss"},
			{"/api/embeddings", `{"model":"m","prompt":"e","keep_alive":60}`, nil, "ollama-cacheproxy; hit"},
		} {
			a := d.ask(step.path, step.body)
			if got := d.reached(); !slices.Equal(got, step.reach) {
				t.Errorf("%s %s: the model got %q, want %q", step.path, step.body, got, step.reach)
			}
			if got := a.header.Get("Cache-Status"); got != strings.TrimSuffix(step.status, "; ttl=") {
				t.Errorf("%s %s: Cache-Status %q, want %q", step.path, step.body, got, step.status)
			}
			_, want := d.direct(step.path, step.body)
			if got := durations.ReplaceAllString(a.body, ""); a.status != 200 || got != durations.ReplaceAllString(want, "") {
				t.Errorf("%s %s: %d %s\nwithout the proxy %s", step.path, step.body, a.status, got, want)
			}
			if strings.Contains(step.status, "hit") != (a.header.Get("Age") != "") && !strings.Contains(step.status, "partial") {
				t.Errorf("%s %s: Age %q", step.path, step.body, a.header.Get("Age"))
			}
		}
		if n := d.h.recorder.Facts(time.Now(), time.Time{}).Requests; n != 9 {
			t.Errorf("doctor sees %d requests, want the 9 that reached Ollama, whatever their inputs", n)
		}
	})
}

// TestEmbeddingsEqual: an answer is the same whether it is computed or kept, to the byte, and each
// client's request is one: in the log, and for who counts.
func TestEmbeddingsEqual(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		var texts []string
		for i := range 100 {
			texts = append(texts, fmt.Sprint("chunk ", i))
		}
		body := embedBody(texts, "")
		first := d.ask("/api/embed", body)
		second := d.ask("/api/embed", body) // it waits until the model was tried
		if first.body != second.body || !second.hit() {
			t.Errorf("the first answer\n%s\nthe second, %s\n%s", first.body, second.header, second.body)
		}
		var total struct {
			Total time.Duration `json:"total_duration"`
		}
		if err := json.Unmarshal([]byte(first.body), &total); err != nil || total.Total < 6*embedTime || total.Total > 8*embedTime {
			t.Errorf("100 texts in 7 turns of %v: total_duration %v, %v", embedTime, total.Total, err)
		}
		synctest.Wait()
		if n := strings.Count(d.log.String(), `"msg":"request"`); n != 2 || !strings.Contains(d.log.String(), `"cache":"hit","cache_parts":"100/100"`) {
			t.Errorf("%d lines about 2 requests:\n%s", n, d.log.String())
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if len(d.ended) != 2 || d.ended[0].Cache.Misses != 100 || d.ended[1].Cache.Hits != 100 || d.ended[1].Cache.Saved == 0 || d.ended[1].Cache.Prompt != 200 {
			t.Errorf("exchanges: %+v %+v", d.ended[0].Cache, d.ended[len(d.ended)-1].Cache)
		}
	})
}

// TestEmbeddingsAgainstOracle sends random requests with random parts known; each answer is what the
// server itself says.
func TestEmbeddingsAgainstOracle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		random := rand.New(rand.NewPCG(1, 2))
		for n := range 400 {
			var texts []string
			for range 1 + random.IntN(8) {
				text := strings.Repeat(fmt.Sprintf("t<%d> ", random.IntN(40)), 1+random.IntN(2))
				if random.IntN(150) == 0 {
					text = "bad " + text
				}
				texts = append(texts, text)
			}
			more := []string{"", `,"dimensions":4`, `,"dimensions":99`, `,"options":{"num_ctx":64}`, `,"truncate":false`}[random.IntN(5)]
			path, body := "/api/embed", embedBody(texts, more)
			switch random.IntN(4) {
			case 0:
				path, body = "/v1/embeddings", embedBody(texts, []string{"", `,"encoding_format":"base64"`, `,"dimensions":4`}[random.IntN(3)])
			case 1:
				path, body = "/api/embeddings", fmt.Sprintf(`{"model":"m","prompt":%q}`, texts[0])
			case 2:
				body = embedBody(texts[0], more)
			}
			if n%100 == 99 { // pulled, and not through the proxy
				d.mu.Lock()
				d.digest = fmt.Sprint("sha256:", n)
				d.mu.Unlock()
				time.Sleep(listedMost + time.Second)
			}
			a := d.ask(path, body)
			status, want := d.direct(path, body)
			if a.status != status || durations.ReplaceAllString(a.body, "") != durations.ReplaceAllString(want, "") {
				t.Fatalf("request %d, %s %s (%s): %d %s\nthe server: %d %s", n, path, body, a.header.Get("Cache-Status"), a.status, a.body, status, want)
			}
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		hits := 0
		for _, ex := range d.ended {
			if ex.Cache != nil {
				hits += ex.Cache.Hits
			}
		}
		if hits < 300 {
			t.Errorf("only %d inputs were known", hits)
		}
	})
}

// TestEmbeddingsTogether: what two requests need is computed once, and by the other if one leaves.
func TestEmbeddingsTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		var texts []string
		for i := range 64 {
			texts = append(texts, fmt.Sprint("chunk ", i))
		}
		var wg sync.WaitGroup
		var replies [4]got
		for i := range replies {
			wg.Go(func() { replies[i] = d.ask("/api/embed", embedBody(texts, "")) })
		}
		wg.Wait()
		if reached := d.reached(); len(reached) != len(texts) {
			t.Errorf("%d texts reached the model, want each of %d once: %q", len(reached), len(texts), reached)
		}
		for _, a := range replies[1:] {
			if a.body != replies[0].body {
				t.Errorf("answers differ: %s\n%s", a.body, replies[0].body)
			}
		}

		for i := range texts {
			texts[i] = fmt.Sprint("other ", i)
		}
		ctx, leave := context.WithCancel(t.Context())
		wg.Go(func() { d.send(ctx, "http://proxy", "/api/embed", embedBody(texts, "")) })
		synctest.Wait()
		wg.Go(func() { replies[0] = d.ask("/api/embed", embedBody(texts, "")) })
		time.Sleep(embedTime / 2)
		leave()
		wg.Wait()
		_, want := d.direct("/api/embed", embedBody(texts, ""))
		if durations.ReplaceAllString(replies[0].body, "") != durations.ReplaceAllString(want, "") {
			t.Errorf("after the other client has left: %d %s", replies[0].status, replies[0].body)
		}
		if n := len(d.reached()); n > len(texts)+partsAtOnce {
			t.Errorf("%d texts reached the model", n)
		}

		ctx, leave = context.WithCancel(t.Context())
		wg.Go(func() {
			d.send(ctx, "http://proxy", "/api/embed", embedBody(append(texts[:0:0], "x1", "x2", "x3"), ""))
		})
		time.Sleep(embedTime / 2)
		leave()
		wg.Wait()
		d.reached()
		if n := d.h.InFlight(); n != 0 {
			t.Errorf("%d requests are left", n)
		}
		d.h.vectors.mu.Lock()
		defer d.h.vectors.mu.Unlock()
		for model, slots := range d.h.vectors.slots {
			if len(slots) != 0 {
				t.Errorf("%s: %d slots are left", model, len(slots))
			}
		}
		if len(d.h.vectors.parts) != 0 {
			t.Errorf("%d parts are left", len(d.h.vectors.parts))
		}
	})
}

// TestEmbeddingsRefused: an error is Ollama's own, of the whole request, and spoils nothing.
func TestEmbeddingsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		for _, path := range []string{"/api/embed", "/v1/embeddings"} {
			body := embedBody([]string{"a", "b", "bad"}, "")
			a := d.ask(path, body)
			if status, want := d.direct(path, body); a.status != status || a.body != want {
				t.Errorf("%s: %d %s, want %d %s", path, a.status, a.body, status, want)
			}
		}
		d.reached()
		for _, body := range []string{`{"model":"m","input":[]}`, `{"model":"m","input":"a","more":1}`, `{"model":"m","input":"a","input":"b"}`} {
			if a := d.ask("/api/embed", body); a.header.Get("Cache-Status") != "" {
				t.Errorf("%s: %v", body, a.header)
			}
		}
	})
}

// TestNotReproducible: vectors that differ from one time to the next are not served; small differences
// between arrays are.
func TestNotReproducible(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*http.Request, []string, int, []float32)
		served bool
	}{
		{"each time", func() func(*http.Request, []string, int, []float32) {
			var n atomic.Int64
			return func(_ *http.Request, _ []string, _ int, v []float32) { v[0] += float32(n.Add(1)) }
		}(), false},
		{"a little between arrays", func(_ *http.Request, texts []string, _ int, v []float32) {
			if len(texts) > 1 {
				v[0] *= 1.000001
			}
		}, true},
		{"much between arrays", func(_ *http.Request, texts []string, i int, v []float32) { v[0] += float32(i) }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newIdeal(t, nil, nil)
				d.change = tc.change
				body := embedBody([]string{"a", "b"}, "")
				for range 4 {
					d.ask("/api/embed", body)
				}
				a := d.ask("/api/embed", body)
				if a.hit() != tc.served {
					t.Errorf("Cache-Status %q", a.header.Get("Cache-Status"))
				}
				synctest.Wait()
				if n := strings.Count(d.log.String(), "vectors of this model"); n != 1 {
					t.Errorf("%d lines about the model:\n%s", n, d.log.String())
				}
				if list := d.h.vectors.verdicts(); len(list) != 1 || list[0].Serves != tc.served || list[0].Same != tc.served || list[0].Batches {
					if tc.name != "much between arrays" || list[0].Serves {
						t.Errorf("the page: %+v", list)
					}
				}
				d.reached()
				d.stop()
				again := newIdeal(t, d.store, nil) // after a restart nothing is tried again
				again.change = tc.change
				if a := again.ask("/api/embed", body); a.hit() != tc.served {
					t.Errorf("after a restart: Cache-Status %q", a.header.Get("Cache-Status"))
				}
				synctest.Wait()
				if strings.Contains(again.log.String(), "vectors of this model") {
					t.Error("the model was tried again after a restart")
				}
			})
		})
	}
}

// TestEmbeddingsApart: keys do not share vectors unless they may, and a request's own Cache-Control
// holds.
func TestEmbeddingsApart(t *testing.T) {
	for _, shared := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d := newIdeal(t, nil, func(h *Handler) {
				h.Guard.Keys, _ = ParseKeys("alice sk-1 rate=3/h\nbob sk-2")
				h.AnswersShared = shared
			})
			texts := make([]string, 50)
			for i := range texts {
				texts[i] = fmt.Sprint("text ", i)
			}
			body := embedBody(texts, "")
			d.ask("/api/embed", body, "Authorization: Bearer sk-1")
			if n := len(d.reached()); n != 50 {
				t.Errorf("%d texts reached the model", n)
			}
			if a := d.ask("/api/embed", body, "Authorization: Bearer sk-1"); !a.hit() {
				t.Errorf("again: %v", a.header)
			}
			if a := d.ask("/api/embed", body, "Authorization: Bearer sk-2"); a.hit() != shared || a.status != 200 {
				t.Errorf("another key, shared %v: %v", shared, a.header)
			}
			d.reached()
			if a := d.ask("/api/embed", body); a.status != http.StatusUnauthorized {
				t.Errorf("without a key: %d", a.status)
			}
			for _, c := range []struct {
				control string
				reach   int
				status  int
			}{{"no-store", 50, 200}, {"no-cache", 50, 200}, {"only-if-cached", 0, 200}, {"max-age=100000", 0, 200}} {
				if a := d.ask("/api/embed", body, "Authorization: Bearer sk-2", "Cache-Control: "+c.control); a.status != c.status {
					t.Errorf("%s: %d", c.control, a.status)
				}
				if n := len(d.reached()); n != c.reach {
					t.Errorf("%s: %d texts reached the model, want %d", c.control, n, c.reach)
				}
			}
			if a := d.ask("/api/embed", embedBody("new", ""), "Authorization: Bearer sk-2", "Cache-Control: only-if-cached"); a.status != http.StatusGatewayTimeout {
				t.Errorf("only-if-cached without a kept vector: %d", a.status)
			}
			if a := d.ask("/api/embed", body, "Authorization: Bearer sk-1"); a.status != 200 {
				t.Errorf("the third request of three in an hour: %d", a.status)
			}
			if a := d.ask("/api/embed", body, "Authorization: Bearer sk-1"); a.status != http.StatusTooManyRequests {
				t.Errorf("the fourth request of three in an hour: %d", a.status)
			}
		})
	}
}

// TestEmbeddingsOff: nothing is split, kept or tried; nor is a model tried that is unloaded at once.
func TestEmbeddingsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, func(h *Handler) {
			h.CacheEmbeddings, _ = ParseCacheEmbeddings([]string{"m=off"})
		})
		a := d.ask("/api/embed", embedBody([]string{"a", "b"}, ""))
		if a.header.Get("Cache-Status") != "" || d.asked != 1 {
			t.Errorf("%d requests, %v", d.asked, a.header)
		}
		if s := d.store.Stats(); s.Entries != 0 {
			t.Errorf("%d entries", s.Entries)
		}
		d.stop()
		d = newIdeal(t, nil, nil)
		for range 3 {
			a := d.ask("/api/embed", embedBody([]string{"a", "b"}, `,"keep_alive":0`))
			if a.hit() {
				t.Error("served although the model was not tried")
			}
			if got := d.reached(); len(got) != 2 {
				t.Errorf("the model got %q", got)
			}
		}
		if bytes.Contains([]byte(d.log.String()), []byte("vectors of this model")) {
			t.Error("a model was tried that was unloaded at once")
		}
	})
}
