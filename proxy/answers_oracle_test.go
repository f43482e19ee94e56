package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/openai"
)

// oracle is a server whose answers say what they were made from: the request as Ollama decodes it,
// the model's digest, and who asked. So each answer tells whether it belongs to a request.
type oracle struct {
	mu      sync.Mutex
	rnd     *rand.Rand
	models  map[string][]digestOf // by name, in the order of time
	made    []computation         // by id
	digests int                   // how many digests there were
}

// digestOf is what a name stood for, and when.
type digestOf struct {
	digest      string
	from, until time.Time // until is zero: it is still so
	told        bool      // the change at until went through the proxy
}

// computation is one that a request of a client has caused.
type computation struct {
	path, body, client string
	noStore            bool
	at                 time.Time
	broken             bool
}

func newOracle(seed uint64) *oracle {
	o := &oracle{rnd: rand.New(rand.NewPCG(seed, 1)), models: map[string][]digestOf{}}
	for _, name := range []string{"m", "n"} {
		o.change(name, false)
	}
	return o
}

// change gives a name another digest. o.mu must be held, except before it is used.
func (o *oracle) change(name string, told bool) {
	list := o.models[name]
	if n := len(list); n > 0 {
		list[n-1].until, list[n-1].told = time.Now(), told
	}
	o.digests++
	digest := fmt.Sprintf("digest%d", o.digests)
	if len(list) > 1 && o.rnd.IntN(2) == 0 {
		digest = list[len(list)-2].digest // it is again what it was
	}
	o.models[name] = append(list, digestOf{digest: digest, from: time.Now()})
}

// modelOf returns the name in its short form.
func modelOf(name string) string { return strings.TrimSuffix(strings.ToLower(name), ":latest") }

// asOllama returns a request as Ollama decodes it, without what does not belong to the answer, and
// whether it asks for a stream.
func asOllama(path string, body []byte) (model, text string, stream bool, err error) {
	var v any
	switch path {
	case "/api/chat":
		r := new(api.ChatRequest)
		err = json.Unmarshal(body, r)
		model, stream = r.Model, r.Stream == nil || *r.Stream
		r.Stream, r.KeepAlive = nil, nil
		if len(r.Tools) == 0 {
			r.Tools = nil // Ollama looks at their number
		}
		v = r
	case "/api/generate":
		r := new(api.GenerateRequest)
		err = json.Unmarshal(body, r)
		model, stream = r.Model, r.Stream == nil || *r.Stream
		r.Stream, r.KeepAlive = nil, nil
		v = r
	case "/v1/chat/completions":
		r := new(openai.ChatCompletionRequest)
		err = json.Unmarshal(body, r)
		model, stream = r.Model, r.Stream
		r.Stream, r.StreamOptions = false, nil
		if len(r.Tools) == 0 {
			r.Tools = nil // Ollama looks at their number
		}
		v = r
	}
	if err != nil {
		return "", "", false, err
	}
	plain, err := json.Marshal(v)
	sum := sha256.Sum256(append([]byte(path), plain...))
	return model, fmt.Sprintf("%x", sum[:8]), stream, err
}

func (o *oracle) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	switch r.URL.Path {
	case "/api/version":
		io.WriteString(w, `{"version":"0.34.1"}`)
	case "/api/tags":
		o.mu.Lock()
		defer o.mu.Unlock()
		var list api.ListResponse
		for name, digests := range o.models {
			now := digests[len(digests)-1]
			list.Models = append(list.Models, api.ListModelResponse{
				Name: name + ":latest", Digest: now.digest, ModifiedAt: now.from,
			})
		}
		json.NewEncoder(w).Encode(list)
	case "/api/ps":
		io.WriteString(w, `{"models":[]}`)
	case "/api/show":
		io.WriteString(w, `{"details":{},"model_info":{},"template":"{{ .Prompt }}"}`)
	case "/api/copy":
		var copied struct{ Destination string }
		json.Unmarshal(body, &copied)
		o.mu.Lock()
		defer o.mu.Unlock()
		o.change(copied.Destination, true)
	default:
		o.compute(w, r, body)
	}
}

// compute answers with a text, in three parts, with pauses.
func (o *oracle) compute(w http.ResponseWriter, r *http.Request, body []byte) {
	model, sum, stream, err := asOllama(r.URL.Path, body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	o.mu.Lock()
	digests := o.models[modelOf(model)]
	id, broken := len(o.made), o.rnd.IntN(8) == 0
	text := fmt.Sprintf("id=%d h=%s d=%s.", id, sum, digests[len(digests)-1].digest)
	pause := time.Duration(o.rnd.IntN(900)) * time.Millisecond
	o.made = append(o.made, computation{
		r.URL.Path, string(body), r.Header.Get("X-Test-Client"),
		strings.Contains(r.Header.Get("Cache-Control"), "no-store"), time.Now(), broken,
	})
	o.mu.Unlock()
	parts := []string{text[:5], text[5:20], text[20:], ""}
	if !stream {
		parts = []string{text}
	}
	events := strings.HasPrefix(r.URL.Path, "/v1")
	w.Header().Set("Content-Type", map[bool]string{true: "application/x-ndjson", false: "application/json; charset=utf-8"}[stream])
	if stream && events {
		w.Header().Set("Content-Type", "text/event-stream")
	}
	for i, part := range parts {
		select {
		case <-time.After(pause):
		case <-r.Context().Done():
			return
		}
		last := i == len(parts)-1
		if last && broken {
			panic(http.ErrAbortHandler)
		}
		io.WriteString(w, o.part(r.URL.Path, model, part, stream, last))
		http.NewResponseController(w).Flush()
	}
}

// part writes a part of an answer as Ollama does.
func (o *oracle) part(path, model, text string, stream, last bool) string {
	const usage = `{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6}`
	head := fmt.Sprintf(`{"model":%q,"created_at":"2026-01-01T00:00:00Z",`, model)
	end := "\n"
	if !stream {
		end = ""
	}
	done := `,"done":false}` + end
	if last {
		done = `,"done":true,"done_reason":"stop","total_duration":1,"load_duration":1,"prompt_eval_count":3,"prompt_eval_duration":1,"eval_count":3,"eval_duration":1}` + end
	}
	switch {
	case path == "/api/chat":
		return head + fmt.Sprintf(`"message":{"role":"assistant","content":%q}`, text) + done
	case path == "/api/generate":
		return head + fmt.Sprintf(`"response":%q`, text) + done
	case !stream:
		return fmt.Sprintf(`{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":%q,"system_fingerprint":"fp_ollama",`+
			`"choices":[{"index":0,"message":{"role":"assistant","content":%q},"finish_reason":"stop"}],"usage":%s}`, model, text, usage)
	}
	reason := "null"
	if last {
		reason = `"stop"`
	}
	event := fmt.Sprintf(`data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":%q,"system_fingerprint":"fp_ollama",`+
		`"choices":[{"index":0,"delta":{"role":"assistant","content":%q},"finish_reason":%s}]}`, model, text, reason)
	if last {
		return event + "\n\ndata: [DONE]\n\n"
	}
	return event + "\n\n"
}

// wish is a request of one of the clients.
type wish struct {
	path, body, key, control string
	determined               bool
}

// wishes makes a request: what it asks comes from one source of chance, and how it is spelled from
// another.
func wishes(what, rnd *rand.Rand) wish {
	pick := func(list ...string) string { return list[rnd.IntN(len(list))] }
	ask := func(list ...string) string { return list[what.IntN(len(list))] }
	w := wish{
		path: ask("/api/chat", "/api/chat", "/api/generate", "/v1/chat/completions"), key: pick("ka", "kb"),
		control: pick("", "", "", "", "", "no-store", "no-cache", "max-age=3", "only-if-cached"),
	}
	temperature, seed := ask("0", "0", "0", "0.5", ""), ask("", "", "1", "2")
	w.determined = strings.HasPrefix(temperature, "0") && temperature != "0.5" || seed != ""
	if temperature == "0" {
		temperature = pick("0", "0.0")
	}
	text := ask(`"a"`, `"b"`, `"A"`)
	if text == `"a"` {
		text = pick(text, `"\u0061"`)
	}
	var members, options []string
	add := func(to *[]string, name, value string) {
		if value != "" {
			*to = append(*to, fmt.Sprintf(pick(`%q:%s`, `%q: %s`, "%q :\n%s"), name, value))
		}
	}
	add(&members, pick("model", "model", "Model"), ask(`"m"`, `"m"`, `"m:latest"`, `"n"`))
	limit := ask("", "3", "4")
	if w.path == "/v1/chat/completions" {
		add(&members, "temperature", temperature)
		add(&members, "seed", seed)
		add(&members, "max_tokens", limit)
		add(&members, "stream_options", pick("", "", "null", `{"include_usage":false}`))
	} else {
		add(&options, "temperature", temperature)
		add(&options, "seed", seed)
		add(&options, "num_predict", limit)
		rnd.Shuffle(len(options), func(i, j int) { options[i], options[j] = options[j], options[i] })
		add(&members, "options", "{"+strings.Join(options, ",")+"}")
		add(&members, "keep_alive", pick("", `"5m"`, "-1"))
		add(&members, "format", ask("", "", "", `"json"`))
	}
	if w.path == "/api/generate" {
		add(&members, pick("prompt", "PROMPT"), text)
		add(&members, "system", ask("", "", `"s"`))
	} else {
		add(&members, pick("messages", "Messages"), `[{"role":"`+ask("user", "user", "system")+`","content":`+text+`}]`)
		add(&members, "tools", pick("", "", "", "[]"))
	}
	add(&members, "stream", pick("", "true", "false"))
	rnd.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
	w.body = "{" + strings.Join(members, ",") + "}"
	return w
}

var (
	saidText = regexp.MustCompile(`"(?:content|response)":"([^"]*)"`)
	saidMade = regexp.MustCompile(`^id=(\d+) h=([0-9a-f]+) d=(\w+)\.$`)
)

// judge compares an answer with what the request may be answered with.
func (o *oracle) judge(t *testing.T, shared bool, w wish, asked time.Time, own string, a got) {
	fail := func(why string, args ...any) {
		t.Errorf("%s\n%s %s %s %q, asked at %v: %d %v %q %v", fmt.Sprintf(why, args...), w.key, w.path, w.body, w.control, asked, a.status, a.header, a.body, a.err)
	}
	if a.err != nil || a.status == http.StatusBadGateway {
		return // it broke off, as the client has seen
	}
	if a.status == http.StatusGatewayTimeout && w.control == "only-if-cached" {
		return
	}
	var text strings.Builder
	for _, m := range saidText.FindAllStringSubmatch(a.body, -1) {
		text.WriteString(m[1])
	}
	m := saidMade.FindStringSubmatch(text.String())
	if a.status != http.StatusOK || m == nil {
		fail("no whole answer: %q", text.String())
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	id, _ := strconv.Atoi(m[1])
	c := o.made[id]
	model, sum, stream, err := asOllama(w.path, []byte(w.body))
	if err != nil {
		t.Fatal(err)
	}
	if m[2] != sum {
		fail("the answer to another request: %s", c.body)
	}
	if streams := strings.Contains(a.body, "\n"); streams != stream {
		fail("in another form")
	}
	made, _, _, _ := asOllama(c.path, []byte(c.body))
	if made != model || !strings.Contains(a.body, fmt.Sprintf(`"model":%q`, model)) {
		fail("another name: %s", made)
	}
	may := func(d digestOf) bool {
		slack := listedMost + listedWait
		if d.told {
			slack = 0
		}
		return d.digest == m[3] && (d.until.IsZero() || !d.until.Add(slack).Before(asked))
	}
	if digests := o.models[modelOf(model)]; !slices.ContainsFunc(digests, may) {
		fail("the model is another one: %v", digests)
	}
	client, _, _ := strings.Cut(c.client, " ")
	switch {
	case c.broken:
		fail("made of a broken answer")
	case client != w.key && !shared:
		fail("of %s", c.client)
	case c.noStore && c.client != own:
		fail("it was not to be stored")
	case c.client == own:
	case !w.determined || w.control == "no-store":
		fail("not computed: of %s", c.client)
	case w.control == "no-cache" && c.at.Before(asked):
		fail("computed before it was asked for, at %v", c.at)
	case w.control == "max-age=3" && c.at.Before(asked.Add(-10*time.Second)): // a computation takes 4 s
		fail("too old, of %v", c.at)
	}
}

// FuzzAnswers has clients ask at random, while models change, answers break off and clients leave.
// Each answer must be what its request may get.
func FuzzAnswers(f *testing.F) {
	for seed := range uint64(6) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		synctest.Test(t, func(t *testing.T) { askAll(t, seed) })
	})
}

func askAll(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 2))
	shared := rnd.IntN(2) == 0
	o := newOracle(seed)
	lib := newLibraryOf(t, o, func(h *Handler) {
		keys, err := ParseKeys("a ka\nb kb")
		if err != nil {
			t.Fatal(err)
		}
		h.Guard.Keys, h.AnswersShared, h.ReplayPaced = keys, shared, rnd.IntN(4) == 0
	})
	var wg sync.WaitGroup
	var mu sync.Mutex
	hits, joined := 0, 0
	for n := range 300 {
		time.Sleep(time.Duration(rnd.IntN(500)) * time.Millisecond)
		switch rnd.IntN(30) {
		case 0:
			o.mu.Lock()
			o.change("m", false)
			o.mu.Unlock()
			continue
		case 1:
			lib.ask("/api/copy", `{"source":"n","destination":"m"}`, "Authorization: Bearer ka")
			continue
		}
		w := wishes(rand.New(rand.NewPCG(seed, rnd.Uint64N(8))), rnd)
		ctx, leave := t.Context(), func() {}
		if rnd.IntN(10) == 0 {
			ctx, leave = context.WithTimeout(ctx, time.Duration(rnd.IntN(2000))*time.Millisecond)
		}
		wg.Go(func() {
			defer leave()
			own := fmt.Sprintf("%s %d", w.key, n)
			headers := []string{"Authorization: Bearer " + w.key, "X-Test-Client: " + own}
			if w.control != "" {
				headers = append(headers, "Cache-Control: "+w.control)
			}
			asked := time.Now()
			a := lib.send(ctx, http.MethodPost, w.path, w.body, headers...)
			o.judge(t, shared, w, asked, own, a)
			mu.Lock()
			defer mu.Unlock()
			if a.hit() {
				hits++
			}
			if strings.Contains(a.header.Get("Cache-Status"), "collapsed") {
				joined++
			}
		})
	}
	wg.Wait()
	synctest.Wait()
	t.Logf("%d computations, %d hits, %d joined", len(o.made), hits, joined)
	if hits == 0 && seed < 6 {
		t.Error("nothing was answered from the store, so that nothing is shown")
	}
}

var _ http.Handler = (*oracle)(nil)
