package proxy

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// box is an Ollama server whose contents a test sets. It can be killed and started again at the
// same address.
type box struct {
	t    *testing.T
	name string
	URL  *url.URL

	mu     sync.Mutex
	models map[string]string // digests by name; guarded by mu
	loaded []string          // guarded by mu
	tokens int               // what they are loaded with, as it lists them; guarded by mu
	asked  []string          // requests other than polls: method, path and body; guarded by mu
	refuse int               // answer inference with this status; guarded by mu
	words  string            // … and this error; guarded by mu
	hold   chan struct{}     // inference waits until it is closed; guarded by mu
	// play, if not nil, answers what is posted about its models; guarded by mu.
	play  func(w http.ResponseWriter, r *http.Request, text []byte)
	srv   *http.Server // nil: down
	ended chan struct{}
	came  chan struct{} // gets one for each request that is held
	news  chan struct{} // closed with the next request; guarded by mu
}

func newBox(t *testing.T, name string, models ...string) *box {
	b := &box{t: t, name: name, models: map[string]string{}, came: make(chan struct{}, 100), news: make(chan struct{})}
	for _, m := range models {
		name, digest, _ := strings.Cut(m, "@")
		b.models[name] = digest
	}
	b.start()
	t.Cleanup(b.kill)
	return b
}

func (b *box) start() {
	b.t.Helper()
	if b.URL == nil {
		b.URL = refusing(b.t)
	}
	ln, err := net.Listen("tcp", b.URL.Host)
	if err != nil {
		b.t.Fatal(err)
	}
	b.srv, b.ended = &http.Server{Handler: b}, make(chan struct{})
	go func() { b.srv.Serve(ln); close(b.ended) }() // ends with kill
}

func (b *box) kill() {
	if b.srv != nil {
		b.srv.Close()
		<-b.ended
		b.srv = nil
	}
}

func (b *box) set(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
}

// took returns the requests since the last call.
func (b *box) took() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	asked := b.asked
	b.asked = nil
	return slices.DeleteFunc(asked, func(s string) bool { return strings.HasPrefix(s, "POST /api/show") && strings.Contains(s, `"verbose"`) }) // the proxy's own
}

// wait waits for a request that begins with this text.
func (b *box) wait(prefix string) {
	for {
		b.mu.Lock()
		if slices.ContainsFunc(b.asked, func(s string) bool { return strings.HasPrefix(s, prefix) }) {
			b.mu.Unlock()
			return
		}
		news := b.news
		b.mu.Unlock()
		<-news
	}
}

func (b *box) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	b.mu.Lock()
	hold := b.hold
	own := r.Header.Get(upstream.InstanceHeader) != "" && r.Method == "GET"
	if !own {
		b.asked = append(b.asked, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+string(text)))
		close(b.news)
		b.news = make(chan struct{})
	}
	var body struct{ Model, Name string }
	json.Unmarshal(text, &body) // if there is none: ""
	body.Model = cmp.Or(body.Model, body.Name)
	_, has := b.models[body.Model]
	names := slices.Sorted(maps.Keys(b.models))
	status, refuse, words, loaded, tokens := 200, b.refuse, b.words, b.loaded, b.tokens
	digests, play := maps.Clone(b.models), b.play
	b.mu.Unlock()

	var list []map[string]any
	switch path := r.URL.Path; {
	case path == "/api/version":
		fmt.Fprint(w, `{"version":"0.34.1"}`)
		return
	case path == "/api/tags":
		for _, n := range names {
			list = append(list, map[string]any{"name": n, "model": n, "digest": digests[n], "size": 12345678901234567, "modified_at": "2026-01-0" + fmt.Sprint(1+len(n)%9) + "T00:00:00Z", "from": b.name})
		}
		json.NewEncoder(w).Encode(map[string]any{"models": list})
		return
	case path == "/api/ps":
		for _, n := range loaded {
			list = append(list, map[string]any{"name": n, "expires_at": "2030-01-01T00:00:00Z", "from": b.name, "context_length": tokens})
		}
		json.NewEncoder(w).Encode(map[string]any{"models": list})
		return
	case path == "/v1/models":
		for _, n := range names {
			list = append(list, map[string]any{"id": n, "object": "model", "created": 1, "from": b.name})
		}
		json.NewEncoder(w).Encode(map[string]any{"object": "list", "data": list})
		return
	case r.Method == "POST" && play != nil && !own && !strings.Contains(string(text), `"verbose"`):
		play(w, r, text)
		return
	case r.Method == "POST" && !has && path != "/api/pull" || strings.HasPrefix(path, "/v1/models/") && digests[path[len("/v1/models/"):]] == "":
		status, words = 404, "model not found"
	case r.Method == "POST" && refuse != 0:
		status = refuse
	case r.Method == "POST" && hold != nil:
		b.came <- struct{}{}
		<-hold
	}
	if status != 200 {
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(map[string]string{"error": words})
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"from": b.name, "model": body.Model, "done": true, "prompt_eval_count": len(text) / 4, "eval_count": 1,
		"prompt_eval_duration": len(text) / 4 * 1e6, "eval_duration": 1e6, "total_duration": len(text)/4*1e6 + 1e6, "done_reason": "stop"})
}

// servers is a proxy in front of boxes. slots is schedule.Config.Lanes.
type severalServers struct {
	*rig
	boxes map[string]*box
}

func newFleet(t *testing.T, slots int, boxes ...*box) *severalServers {
	t.Helper()
	f := &severalServers{boxes: map[string]*box{}}
	urls := map[string]*url.URL{}
	for _, b := range boxes {
		f.boxes[b.name], urls[b.name] = b, b.URL
	}
	f.rig = newRigOf(t, &Handler{KeepAlive: keep(t, IfAbsent, "24h"), Lanes: schedule.NewScheduler(schedule.Config{Lanes: slots})}, urls)
	t.Cleanup(f.h.Lanes.Close)
	f.poll()
	return f
}

// poll polls all upstreams.
func (f *severalServers) poll() {
	for _, up := range f.h.Upstreams {
		up.Used()
		up.Poll(f.t.Context())
	}
}

// kill kills a box, and closes the connections to it that the proxy keeps: nobody could know
// whether a request written to one of those was read.
func (f *severalServers) kill(b *box) {
	b.kill()
	f.h.Transport.(*http.Transport).CloseIdleConnections()
}

// ask sends a request and returns which box answered it, according to its answer and to the header.
func (f *severalServers) ask(method, path, body string, headers ...string) (status int, from string) {
	f.t.Helper()
	res, text := f.do(method, path, body, headers...)
	var answer struct{ From string }
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		f.t.Errorf("%s %s: %q", method, path, text)
	}
	if name := res.Header.Get(headerUpstream); answer.From != "" && name != answer.From {
		f.t.Errorf("%s %s: %q answered, the header says %q", method, path, answer.From, name)
	}
	return res.StatusCode, answer.From
}

func chat(model, text string) string {
	return fmt.Sprintf(`{"model":%q,"stream":false,"messages":[{"role":"system","content":%q},{"role":"user","content":"hello"}]}`, model, text)
}

// passage is a text of about n words that begins differently for every id.
func passage(id, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "word%d-%d ", id, i*id%97+i)
	}
	return b.String()
}

// TestUnion: of entries with one name the newest is listed, wherever it comes from; equally new
// ones stay in the upstreams' order.
func TestUnion(t *testing.T) {
	entry := func(name, from string, hour int) listed {
		return listed{
			raw: json.RawMessage(strconv.Quote(from)), Name: name,
			Modified: instant{time.Date(2026, 1, 1, hour, 0, 0, 0, time.UTC)},
		}
	}
	got := union([][]listed{
		{entry("m", "old m", 1), entry("n", "new n", 3), entry("o", "first o", 4)},
		nil,
		{entry("m", "new m", 5), entry("n", "old n", 2), entry("o", "other o", 4), entry("p", "p", 4)},
	})
	if want := `["new m" "first o" "p" "new n"]`; fmt.Sprintf("%s", got) != want {
		t.Errorf("%s", got)
	}
}

// listing decodes a merged list: which box each name comes from, in order.
func (f *severalServers) listing(path, member string) (names []string, raw string) {
	f.t.Helper()
	res, text := f.do("GET", path, "")
	var content map[string]json.RawMessage
	var list []struct{ Name, ID, From string }
	if err := json.Unmarshal([]byte(text), &content); err != nil || res.StatusCode != 200 {
		f.t.Fatalf("GET %s: %d %s", path, res.StatusCode, text)
	}
	if err := json.Unmarshal(content[member], &list); err != nil {
		f.t.Fatalf("GET %s: %s", path, text)
	}
	for _, e := range list {
		names = append(names, e.Name+e.ID+"/"+e.From)
	}
	slices.Sort(names)
	return names, text
}

// Each model's requests go where the model is. Lists are the union by name, and a dead upstream
// neither makes them fail nor delays them.
func TestF21(t *testing.T) {
	for _, slots := range []int{schedule.Unlimited, 1} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			a, b := newBox(t, "a", "x@1", "shared@9"), newBox(t, "b", "y@2", "z@2", "shared@9")
			a.loaded, b.loaded = []string{"x"}, []string{"z"}
			f := newFleet(t, slots, a, b)
			lists := func(wantTags, wantPS []string) {
				t.Helper()
				for path, want := range map[string][]string{"/api/tags": wantTags, "/v1/models": wantTags, "/api/ps": wantPS} {
					member := "models"
					if path == "/v1/models" {
						member = "data"
					}
					got, text := f.listing(path, member)
					if !slices.Equal(got, want) {
						t.Errorf("GET %s: %v, want %v", path, got, want)
					}
					if path == "/api/tags" && !strings.Contains(text, "12345678901234567") {
						t.Errorf("a large number was changed: %s", text)
					}
				}
			}
			lists([]string{"shared/a", "x/a", "y/b", "z/b"}, []string{"x/a", "z/b"})

			goes := func(model, want string) {
				t.Helper()
				for _, req := range [][3]string{
					{"POST", "/api/chat", chat(model, "s")}, {"POST", "/api/generate", `{"model":"` + model + `","prompt":"p"}`},
					{"POST", "/v1/chat/completions", chat(model, "s")}, {"POST", "/api/embed", `{"model":"` + model + `","input":"i"}`},
					{"POST", "/api/show", `{"model":"` + model + `"}`}, {"POST", "/api/show", `{"name":"` + model + `"}`}, {"GET", "/v1/models/" + model, ""},
					{"POST", "/api/generate", `{"model":"` + model + `"}`},
				} {
					status, from := f.ask(req[0], req[1], req[2])
					if from != want || (status != 200) != (want == "") {
						t.Errorf("%s %s for %s: %d from %q, want %q", req[0], req[1], model, status, from, want)
					}
				}
			}
			goes("x", "a")
			goes("y", "b")
			goes("z", "b")
			goes("nowhere", "")

			// An outdated list is read again on a 404, once.
			a.set(func() { delete(a.models, "x") })
			b.set(func() { b.models["x"] = "1" })
			f.h.refreshEvery = 0
			a.took()
			goes("x", "b")
			if asked := a.took(); len(asked) != 1 {
				t.Errorf("the server that has the model no more was asked %d times: %q", len(asked), asked)
			}

			// A server that is down does not matter to requests that do not need it.
			b.kill()
			lists([]string{"shared/a"}, []string{"x/a"})
			if status, from := f.ask("POST", "/api/chat", chat("shared", "s")); status != 200 || from != "a" {
				t.Errorf("with one server down: %d from %q", status, from)
			}
			f.poll()
			if status, _ := f.ask("POST", "/api/chat", chat("y", "s")); status != http.StatusBadGateway {
				t.Errorf("a model of the server that is down: %d", status)
			}
			b.start()
			f.poll()
			lists([]string{"shared/a", "x/b", "y/b", "z/b"}, []string{"x/a", "z/b"})
			goes("y", "b")
		})
	}
}

// The turns of a conversation stay on one server, whatever others ask. When that is killed, they
// move once; when it drains, it finishes its requests and gets no new ones.
func TestF22(t *testing.T) {
	for _, slots := range []int{schedule.Unlimited, 1} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1")
			a.loaded, b.loaded = []string{"m"}, []string{"m"}
			f := newFleet(t, slots, a, b)
			turn := func(client, n int) string {
				t.Helper()
				messages := []map[string]string{{"role": "system", "content": passage(client, 100)}}
				for i := range n {
					messages = append(messages, map[string]string{"role": "user", "content": passage(client*100+i, 20)}, map[string]string{"role": "assistant", "content": passage(client*100+i, 10)})
				}
				body, err := json.Marshal(map[string]any{"model": "m", "stream": false, "messages": messages[:2*n]})
				if err != nil {
					t.Fatal(err)
				}
				status, from := f.ask("POST", "/api/chat", string(body))
				if status != 200 {
					t.Fatalf("turn %d of %d: %d", n, client, status)
				}
				return from
			}
			first := map[int]string{}
			servers := map[string]int{}
			for n := 1; n <= 10; n++ {
				for client := range 12 {
					from := turn(client, n)
					switch {
					case n == 1 || n == 6:
						first[client] = from
						servers[from]++
					case from != first[client]:
						t.Errorf("turn %d of conversation %d moved from %s to %s", n, client, first[client], from)
					}
				}
				if n == 1 && (servers["a"] < 3 || servers["b"] < 3) {
					t.Errorf("new conversations all went one way: %v", servers)
				}
				if n == 5 {
					f.kill(f.boxes[first[0]])
					t.Logf("conversations: %v; %s is killed", servers, first[0])
				}
			}
		})
	}
}

// TestRetryElsewhere: a request that cannot have begun is sent to another server, once; one that
// may have begun is not.
func TestRetryElsewhere(t *testing.T) {
	for _, slots := range []int{schedule.Unlimited, 1} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1")
			f := newFleet(t, slots, a, b)
			home := func() (*box, *box) {
				_, from := f.ask("POST", "/api/chat", chat("m", passage(1, 100)))
				f.ended()
				if from == "a" {
					return a, b
				}
				return b, a
			}
			near, far := home()
			chatOnce := func(want string, retries ...string) {
				t.Helper()
				near.took()
				far.took()
				status, from := f.ask("POST", "/api/chat", chat("m", passage(1, 100)))
				ex := f.ended()
				if status != 200 || from != want || ex.Upstream != want || !slices.Equal(ex.Retries, retries) {
					t.Errorf("%d from %q, retries %q (told: %s), want %q, %q", status, from, ex.Retries, ex.Upstream, want, retries)
				}
				if n := len(near.took()) + len(far.took()); n != 1+len(retries) && !slices.Contains(retries, RetryUnreachable) {
					t.Errorf("the servers were asked %d times", n)
				}
			}
			near.set(func() { near.refuse, near.words = 503, busyWords })
			chatOnce(far.name, RetryBusy)
			near.set(func() { near.refuse = 500 })
			far.set(func() { far.refuse = 500 })
			if status, _ := f.ask("POST", "/api/chat", chat("m", passage(1, 100))); status != 500 {
				t.Errorf("an error of the upstream: %d", status)
			}
			f.ended()
			near.set(func() { near.refuse = 0 })
			far.set(func() { far.refuse = 0 })

			near, far = home()
			f.kill(near)
			chatOnce(far.name, RetryUnreachable)
			chatOnce(far.name) // the server counts as down at once
			near.start()
			f.poll()
			if st := f.h.named(near.name).State(); !st.Up || !st.Restarted {
				t.Errorf("found again: %+v", st)
			}

			// A request whose connection breaks off may have begun.
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			broken := &box{t: t, name: "broken", URL: &url.URL{Scheme: "http", Host: ln.Addr().String()}}
			accepted := make(chan int)
			go func() { // ends with ln.Close
				n := 0
				for {
					conn, err := ln.Accept()
					if err != nil {
						accepted <- n
						return
					}
					n++
					io.ReadFull(conn, make([]byte, 100))
					conn.Close()
				}
			}()
			f2 := newFleet(t, slots, a, broken)
			a.took()
			status, _ := f2.ask("POST", "/api/chat", chat("m", "s"), "X-Cacheproxy-Upstream: broken")
			if ex := f2.ended(); status != http.StatusBadGateway || ex.Outcome != Unreachable || ex.Retries != nil || len(a.took()) != 0 {
				t.Errorf("an upstream that broke off: %d, %+v", status, ex)
			}
			ln.Close()
			<-accepted
		})
	}
}

// TestDrain: a draining server finishes its streams and gets nothing new; its backlog moves
// elsewhere.
func TestDrain(t *testing.T) {
	for _, slots := range []int{schedule.Unlimited, 1} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			a, b := newBox(t, "a", "m@1", "only-a@3"), newBox(t, "b", "m@1")
			f := newFleet(t, slots, a, b)
			held := make(chan struct{})
			a.set(func() { a.hold = held })
			done := make(chan int)
			go func() { // ends with the answer
				res, _ := f.post("/api/chat", chat("m", passage(1, 100)), "X-Cacheproxy-Upstream: a")
				done <- res.StatusCode
			}()
			<-a.came // it is under way
			res, text := f.do("POST", "/_cacheproxy/upstreams/a/drain", "")
			var page upstreamEntry
			if err := json.Unmarshal([]byte(text), &page); err != nil || res.StatusCode != 200 || !page.Draining || page.InFlight != 1 || page.Name != "a" {
				t.Fatalf("drain: %d %s", res.StatusCode, text)
			}
			for i := range 6 {
				if status, from := f.ask("POST", "/api/chat", chat("m", passage(i, 100))); status != 200 || from != "b" {
					t.Errorf("while a drains: %d from %q", status, from)
				}
			}
			if res, text := f.post("/api/chat", chat("only-a", "s")); res.StatusCode != 503 || !strings.Contains(text, "draining") {
				t.Errorf("a model of the one that drains alone: %d %s", res.StatusCode, text)
			}
			if st := f.h.named("a").State(); !st.Up {
				t.Errorf("draining counts as a failure: %+v", st)
			}
			a.set(func() { a.hold = nil })
			close(held)
			if status := <-done; status != 200 {
				t.Errorf("what was under way: %d", status)
			}
			f.do("POST", "/_cacheproxy/upstreams/a/resume", "")
			if status, from := f.ask("POST", "/api/chat", chat("only-a", "s")); status != 200 || from != "a" {
				t.Errorf("after resume: %d from %q", status, from)
			}
			for req, want := range map[string]int{
				"GET /_cacheproxy/upstreams": 200, "POST /_cacheproxy/upstreams/c/drain": 404, "GET /_cacheproxy/upstreams/a/drain": 405,
				"POST /_cacheproxy/upstreams/a/stop": 405,
			} {
				method, path, _ := strings.Cut(req, " ")
				if res, text := f.do(method, path, ""); res.StatusCode != want {
					t.Errorf("%s: %d %s", req, res.StatusCode, text)
				}
			}
		})
	}
}

// TestOneTarget: requests that change models go to the first upstream, or to the named one.
func TestOneTarget(t *testing.T) {
	a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1")
	f := newFleet(t, schedule.Unlimited, a, b)
	for _, req := range []string{"POST /api/pull", "POST /api/create", "POST /api/copy", "DELETE /api/delete", "POST /api/push", "HEAD /api/blobs/sha256:1", "POST /api/blobs/sha256:1"} {
		method, path, _ := strings.Cut(req, " ")
		for _, to := range []string{"", "a", "b"} {
			a.took()
			b.took()
			res, _ := f.do(method, path, `{"model":"m"}`, "X-Cacheproxy-Upstream: "+to)
			want := to
			if to == "" {
				want = "a"
			}
			if got := res.Header.Get(headerUpstream); got != want || len(f.boxes[want].took()) != 1 {
				t.Errorf("%s to %q went to %q", req, to, got)
			}
		}
	}
	if res, text := f.post("/api/chat", chat("m", "s"), "X-Cacheproxy-Upstream: c"); res.StatusCode != 400 || !strings.Contains(text, "one of a, b") {
		t.Errorf("an upstream that is not there: %d %s", res.StatusCode, text)
	}
	if names, _ := f.listing("/api/tags", "models"); !slices.Equal(names, []string{"m/a"}) {
		t.Errorf("one model on two servers: %v", names)
	}
	if res, text := f.do("GET", "/api/tags", "", "X-Cacheproxy-Upstream: b"); res.Header.Get(headerUpstream) != "b" || !strings.Contains(text, `"from":"b"`) {
		t.Errorf("one server's list: %s", text)
	}
}

// An unload is sent at once to every upstream that may hold the model, and the client gets one
// answer.
func TestF04Everywhere(t *testing.T) {
	for _, body := range []string{`{"model":"m","keep_alive":0}`, `{"model":"m","keep_alive":"0s"}`} {
		a, b, c := newBox(t, "a", "m@1"), newBox(t, "b", "m@1"), newBox(t, "c", "other@1")
		b.loaded = []string{"m"}
		f := newFleet(t, 1, a, b, c)
		status, from := f.ask("POST", "/api/generate", body)
		if status != 200 || from != "b" {
			t.Errorf("%s: %d from %q, want the one that holds it", body, status, from)
		}
		if got := b.took(); len(got) != 1 || got[0] != "POST /api/generate "+body {
			t.Errorf("b was asked %q", got)
		}
		if got := a.took(); len(got) != 1 || !strings.Contains(got[0], `"keep_alive":"0s"`) {
			t.Errorf("a was asked %q", got)
		}
		if got := c.took(); got != nil {
			t.Errorf("c, which does not have it, was asked %q", got)
		}
	}
}

// TestNeverSeen: a server that has not answered since the start is not assumed to have models that
// no other server has.
func TestNeverSeen(t *testing.T) {
	a, dead := newBox(t, "a", "m@1"), newBox(t, "b")
	dead.kill()
	f := newFleet(t, schedule.Unlimited, a, dead)
	f.h.refreshEvery = 0
	for _, req := range [][2]string{{"/api/chat", chat("typo", "s")}, {"/api/chat", chat("far:120b-cloud", "s")}, {"/api/show", `{"model":"typo"}`}} {
		if status, _ := f.ask("POST", req[0], req[1]); status != 404 || len(a.took()) != 1 {
			t.Errorf("%s: %d", req[1], status)
		}
	}
	a.set(func() { a.models["new"] = "2" })
	if status, from := f.ask("POST", "/api/chat", chat("new", "s")); status != 200 || from != "a" {
		t.Errorf("a model that was pulled by hand: %d from %q", status, from)
	}
	// A server that is down and had the model is used only if no other has it by now.
	b := newBox(t, "c", "only@1")
	g := newFleet(t, schedule.Unlimited, a, b)
	g.h.refreshEvery = 0
	g.kill(b)
	g.poll()
	a.set(func() { a.models["only"] = "1" })
	if status, from := g.ask("POST", "/api/chat", chat("only", "s")); status != 200 || from != "a" {
		t.Errorf("a model that came to another server: %d from %q", status, from)
	}
}

// TestLoopAmongOthers: an upstream that leads back to the proxy gets nothing, and requests that
// only it could answer are refused.
func TestLoopAmongOthers(t *testing.T) {
	b := newBox(t, "b", "m@1")
	var rg *rig
	depth := 0
	back := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if depth++; depth > 50 {
			t.Error("requests go round and round")
			w.WriteHeader(500)
			return
		}
		rg.h.ServeHTTP(w, r)
	}))
	defer back.Close()
	u, err := url.Parse(back.URL)
	if err != nil {
		t.Fatal(err)
	}
	f := &severalServers{boxes: map[string]*box{"b": b}}
	f.rig = newRigOf(t, &Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: schedule.Unlimited})}, map[string]*url.URL{"a": u, "b": b.URL})
	rg = f.rig
	if names, _ := f.listing("/api/tags", "models"); !slices.Equal(names, []string{"m/b"}) { // before the first poll
		t.Errorf("/api/tags: %v", names)
	}
	f.poll()
	if status, from := f.ask("POST", "/api/chat", chat("m", "s")); status != 200 || from != "b" {
		t.Errorf("a chat: %d from %q", status, from)
	}
	if status, _ := f.ask("POST", "/api/pull", `{"model":"x"}`); status != http.StatusLoopDetected {
		t.Errorf("a pull, which is for the first upstream: %d", status)
	}
}

// TestCloudBesideLocal: a remote service's model and a local model of the same name are different
// models.
func TestCloudBesideLocal(t *testing.T) {
	a, b := newBox(t, "a", "m@1", "gpt:120b-cloud@2"), newBox(t, "b", "m@1", "gpt:120b@3")
	b.loaded = []string{"gpt:120b"}
	f := newFleet(t, schedule.Unlimited, a, b)
	for model, want := range map[string]string{"gpt:120b-cloud": "a", "gpt:120b": "b"} {
		for range 3 {
			if status, from := f.ask("POST", "/api/chat", chat(model, "s")); status != 200 || from != want {
				t.Errorf("%s: %d from %q, want %s", model, status, from, want)
			}
		}
	}
}

// TestUnloadWaitsForNone: the server that holds the model unloads it at once, whatever others do.
func TestUnloadWaitsForNone(t *testing.T) {
	a, b := newBox(t, "a", "m@1"), newBox(t, "b", "m@1")
	b.loaded = []string{"m"}
	f := newFleet(t, 1, a, b)
	held := make(chan struct{})
	a.set(func() { a.hold = held })
	done := make(chan string)
	go func() { // ends with the answer
		_, text := f.post("/api/generate", `{"model":"m","keep_alive":0}`)
		done <- text
	}()
	<-a.came
	b.wait("POST /api/generate")
	a.set(func() { a.hold = nil })
	close(held)
	if text := <-done; !strings.Contains(text, `"from":"b"`) {
		t.Error(text)
	}
	f.h.drain(f.h.backends()[1], true)
	f.h.drain(f.h.backends()[0], true)
	if res, text := f.post("/api/generate", `{"model":"m","keep_alive":0}`); res.StatusCode != 200 {
		t.Errorf("an unload while the servers drain: %d %s", res.StatusCode, text)
	}
}

// TestBusyAlone: after a queue-full 503 the only upstream is tried again, after a pause in which
// the client may leave.
func TestBusyAlone(t *testing.T) {
	a := newBox(t, "a", "m@1")
	f := newFleet(t, 1, a)
	a.set(func() { a.refuse, a.words = 503, busyWords })
	go func() { // ends when the second one has come
		a.wait("POST /api/chat")
		a.set(func() { a.refuse = 0 })
	}()
	if status, _ := f.ask("POST", "/api/chat", chat("m", "s")); status != 200 {
		t.Errorf("asked again: %d", status)
	}
	if ex := f.ended(); !slices.Equal(ex.Retries, []string{RetryBusy}) {
		t.Errorf("%+v", ex)
	}
	a.set(func() { a.refuse = 503 })
	a.took()
	client := f.dial()
	client.send(rawPost("/api/chat", chat("m", "s")))
	a.wait("POST /api/chat")
	client.Close()
	if ex := f.ended(); ex.Outcome != ClientGone || ex.Status != 0 {
		t.Errorf("a client that leaves in the pause: %+v", ex)
	}
	a.set(func() { a.words = "another reason" })
	if status, _ := f.ask("POST", "/api/chat", chat("m", "s")); status != 503 {
		t.Errorf("another 503: %d", status)
	}
	if ex := f.ended(); ex.Retries != nil {
		t.Errorf("%+v", ex)
	}
}

func TestRetryReason(t *testing.T) {
	dial := func(err error) error { return &net.OpError{Op: "dial", Err: err} }
	for _, tc := range []struct {
		status int
		text   string
		err    error
		want   string
	}{
		{err: dial(syscall.ECONNREFUSED), want: RetryUnreachable}, {err: dial(syscall.EHOSTUNREACH), want: RetryUnreachable}, {err: dial(context.DeadlineExceeded), want: RetryUnreachable},
		{err: dial(syscall.EMFILE)}, {err: dial(syscall.EADDRNOTAVAIL)}, {err: dial(context.Canceled)}, {err: io.EOF}, {err: &net.OpError{Op: "read", Err: syscall.ECONNRESET}},
		{status: 503, text: `{"error":"` + busyWords + `"}`, want: RetryBusy}, {status: 503, text: "<html>no server is available</html>"}, {status: 503}, {status: 404, want: RetryAbsent}, {status: 500}, {status: 429}, {status: 200},
	} {
		var res *http.Response
		if tc.err == nil {
			res = &http.Response{StatusCode: tc.status, ContentLength: int64(len(tc.text)), Body: io.NopCloser(strings.NewReader(tc.text))}
		}
		if got := retryReason(res, tc.err); got != tc.want {
			t.Errorf("%d %v: %q, want %q", tc.status, tc.err, got, tc.want)
		}
	}
}

// TestOddLists: entries that cannot be parsed do not affect the others.
func TestOddLists(t *testing.T) {
	odd := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/tags":
			fmt.Fprint(w, `{"models":[{"name":"x","modified_at":""},{"name":5},{"name":"y","modified_at":"yesterday"},7,{"name":"z","modified_at":"2026-01-01T00:00:00Z"}]}`)
		case "/v1/models":
			fmt.Fprint(w, `{"data":[{"id":"x","created":1.5},{"id":"y"}]}`)
		default:
			fmt.Fprint(w, `{"version":"0.34.1"}`)
		}
	}))
	defer odd.Close()
	u, err := url.Parse(odd.URL)
	if err != nil {
		t.Fatal(err)
	}
	b := newBox(t, "b", "m@1")
	f := &severalServers{rig: newRigOf(t, &Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: schedule.Unlimited})}, map[string]*url.URL{"a": u, "b": b.URL})}
	for path, want := range map[string][]string{"/api/tags": {"m/b", "x/", "y/", "z/"}, "/v1/models": {"m/b", "x/", "y/"}} {
		member := map[string]string{"/api/tags": "models", "/v1/models": "data"}[path]
		if got, _ := f.listing(path, member); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
}
