package proxy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// alliance is a fleet of proxies.
type alliance struct {
	t     *testing.T
	proxy []*ally
}

// ally is one of the proxies.
type ally struct {
	*severalServers
	addr  string // at which peers reach it
	peers *http.Server
	gone  chan struct{} // closed when peers has ended
	stop  func()
}

// show makes a proxy listen for its peers; hide makes it vanish for them, as a crash does.
func (p *ally) show(ln net.Listener) {
	p.t.Helper()
	if ln == nil {
		var err error
		if ln, err = net.Listen("tcp", p.addr); err != nil {
			p.t.Fatal(err)
		}
	}
	p.peers = &http.Server{Handler: p.h.Fleet.Handler(p.h)}
	srv, ended := p.peers, make(chan struct{})
	p.gone = ended
	go func() { srv.Serve(ln); close(ended) }() // ends with hide
}

func (p *ally) hide() {
	p.peers.Close()
	<-p.gone
}

// addresses is a fleet.Source.
type addresses []string

func (a addresses) Watch(ctx context.Context, found func([]string)) {
	found(a)
	<-ctx.Done()
}

func (a addresses) String() string { return strings.Join(a, " ") }

const peerSecret = "of the fleet, 16+"

// newAlliance starts a proxy before each list of boxes. Proxies with the same list are the shape
// "edge"; otherwise each is beside its own boxes, the shape "sidecar".
func newAlliance(t *testing.T, lists [][]*box, change func(i int, h *Handler, c *fleet.Config)) *alliance {
	t.Helper()
	a := &alliance{t: t}
	edge := len(lists) == 1 || slices.Equal(lists[0], lists[1])
	var listeners []net.Listener
	var found addresses
	for range lists {
		ln, err := net.Listen("tcp", reserve(t))
		if err != nil {
			t.Fatal(err)
		}
		listeners, found = append(listeners, ln), append(found, ln.Addr().String())
	}
	for i, list := range lists {
		h := &Handler{
			NoTouch: true, KeepAlive: keep(t, IfAbsent, "24h"),
			Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1}),
		}
		c := fleet.Config{Name: fmt.Sprint("proxy", i), Sources: []fleet.Source{found}, Secret: []byte(peerSecret)}
		if change != nil {
			change(i, h, &c)
		}
		f := &severalServers{boxes: map[string]*box{}}
		urls := map[string]*url.URL{}
		for _, b := range list {
			if f.boxes[b.name], urls[b.name] = b, b.URL; !edge {
				c.Own = append(c.Own, b.name)
			}
		}
		h.Join(&c)
		h.Fleet = fleet.New(c)
		f.rig = newRigOf(t, h, urls)
		f.poll()
		ctx, cancel := context.WithCancel(context.Background())
		p := &ally{severalServers: f, addr: found[i]}
		p.show(listeners[i])
		var wg sync.WaitGroup
		wg.Go(func() { h.Run(ctx) })
		p.stop = sync.OnceFunc(func() {
			p.hide()
			f.srv.CloseClientConnections()
			cancel()
			h.Lanes.Close()
			wg.Wait()
		})
		t.Cleanup(p.stop)
		a.proxy = append(a.proxy, p)
	}
	a.agree()
	return a
}

// agree waits until all proxies know each other, and who owns which server.
func (a *alliance) agree() {
	a.t.Helper()
	poll(a.t, func() bool {
		names := map[string]bool{}
		owned := 0
		for _, p := range a.proxy {
			maps.Copy(names, p.names())
		}
		for _, p := range a.proxy {
			for _, x := range p.h.Fleet.Peers() {
				if !x.Up {
					return false
				}
			}
			owners := p.h.Fleet.Owners()
			if len(owners) != len(names) || len(p.h.Fleet.Peers()) != len(a.proxy)-1 {
				return false
			}
			for _, o := range owners {
				if o.Here {
					owned++
				}
				if !o.Takes || o.Models == 0 {
					return false
				}
			}
		}
		return owned == len(names)
	})
}

func (p *ally) names() map[string]bool {
	names := map[string]bool{}
	for name := range p.boxes {
		names[name] = true
	}
	return names
}

// of returns the proxy that owns a server, and one that does not.
func (a *alliance) of(server string) (owner, entry *ally) {
	a.t.Helper()
	for _, p := range a.proxy {
		if p.h.Fleet.Owns(server) {
			owner = p
		} else {
			entry = p
		}
	}
	if owner == nil || entry == nil {
		a.t.Fatalf("%s: the owner is %v, another is %v", server, owner, entry)
	}
	return owner, entry
}

// edgeOf returns n proxies before the same boxes.
func edgeOf(t *testing.T, n int, change func(i int, h *Handler, c *fleet.Config), boxes ...*box) *alliance {
	t.Helper()
	lists := make([][]*box, n)
	for i := range lists {
		lists[i] = boxes
	}
	return newAlliance(t, lists, change)
}

// sidecars returns a proxy beside each box.
func sidecars(t *testing.T, change func(i int, h *Handler, c *fleet.Config), boxes ...*box) *alliance {
	t.Helper()
	var lists [][]*box
	for _, b := range boxes {
		lists = append(lists, []*box{b})
	}
	return newAlliance(t, lists, change)
}

// rest waits until nothing is in flight: an owner learns from a request what holds its model a
// moment after the client has its answer.
func (a *alliance) rest() {
	a.t.Helper()
	poll(a.t, func() bool {
		return !slices.ContainsFunc(a.proxy, func(p *ally) bool { return p.h.InFlight() > 0 })
	})
}

// last waits for the next request that a proxy has ended, apart from its own pages.
func (p *ally) last() Exchange {
	p.t.Helper()
	for {
		if ex := p.ended(); ex.Outcome != Own {
			return ex
		}
	}
}

// TestHopTransparent: through a proxy that does not own the server, Ollama gets and gives the same
// bytes as through the one that does, once, and no header of the fleet's is seen on either side.
func TestHopTransparent(t *testing.T) {
	b := newBox(t, "s", "m@1")
	var mu sync.Mutex
	var seen []string // what reaches Ollama
	b.set(func() {
		b.play = func(w http.ResponseWriter, r *http.Request, text []byte) {
			mu.Lock()
			defer mu.Unlock()
			delete(r.Header, "Date")
			head, _ := json.Marshal(r.Header)
			seen = append(seen, fmt.Sprintf("%s %s %s %s %d %v %s", r.Method, r.RequestURI, r.Host, head,
				r.ContentLength, r.TransferEncoding, text))
			w.Header()["X-Twice"] = []string{"a", "b"}
			w.Header().Set("Date", "today")
			status := http.StatusOK
			if strings.Contains(string(text), "refuse") {
				status = http.StatusTeapot
			}
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"done":true,"n":%d}`, len(text))
		}
	})
	a := edgeOf(t, 2, nil, b)
	owner, entry := a.of("s")
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("word ", 1<<18)
	for _, c := range []struct{ name, path, body, header string }{
		{"small", "/api/chat", chat("m", "s"), ""},
		{"query", "/api/chat?a=%zz&b=;c", chat("m", "s"), ""},
		{"headers", "/v1/chat/completions", chat("m", "s"), "X-Strange: ä"},
		{"refused", "/api/chat", chat("m", "refuse"), ""},
		{"1 MiB", "/api/chat", chat("m", long), ""},
		{"zstd", "/v1/chat/completions", string(encoder.EncodeAll([]byte(chat("m", "s")), nil)), "Content-Encoding: zstd"},
		{"after the value", "/api/generate", `{"model":"m","prompt":"p"} {"model":"n"}`, ""},
		{"no JSON", "/api/chat", `{"model":"m"`, ""},
		{"empty", "/api/chat", "", ""},
		{"load", "/api/generate", `{"model":"m"}`, ""},
		{"embed", "/api/embed", `{"model":"m","input":"i"}`, ""},
		{"show", "/api/show", `{"model":"m"}`, ""},
		{"responses", "/v1/responses", `{"model":"m","input":"i"}`, ""},
	} {
		headers := []string{"Content-Type: application/json", "User-Agent: u", "Idempotency-Key: k", "Accept-Encoding: x"}
		if c.header != "" {
			headers = append(headers, c.header)
		}
		var got [2]string
		for i, p := range []*ally{owner, entry} {
			mu.Lock()
			seen = nil
			mu.Unlock()
			res, text := p.do("POST", c.path, c.body, headers...)
			for _, name := range []string{"Server-Timing", headerWaited} {
				res.Header.Del(name)
			}
			head, _ := json.Marshal(res.Header)
			mu.Lock()
			got[i] = fmt.Sprintf("%s %s %d %s\n%s", res.Status, head, res.ContentLength, text, strings.Join(seen, "\n"))
			if len(seen) != 1 {
				t.Errorf("%s: sent %d times", c.name, len(seen))
			}
			mu.Unlock()
			p.last()
		}
		if got[0] != got[1] {
			t.Errorf("%s:\nthrough the owner: %.2000s\nthrough another:   %.2000s", c.name, got[0], got[1])
		}
		if strings.Contains(got[1], "X-Cacheproxy-Peer") {
			t.Errorf("%s: a header of the fleet is seen: %.1000s", c.name, got[1])
		}
	}
	if n := entry.h.Fleet.Counts().Hops; n < 9 {
		t.Errorf("%d of the requests were passed on", n)
	}
}

// TestHopOversize: a body that is longer than the proxy reads is served by the entry itself.
func TestHopOversize(t *testing.T) {
	b := newBox(t, "s", "m@1")
	a := edgeOf(t, 2, func(_ int, h *Handler, _ *fleet.Config) { h.MaxBody = 4 << 10 }, b)
	_, entry := a.of("s")
	body := chat("m", passage(1, 2000))
	if status, from := entry.ask("POST", "/api/chat", body); status != 200 || from != "s" {
		t.Errorf("%d from %q", status, from)
	}
	if got := b.took(); len(got) != 1 || got[0] != "POST /api/chat "+body {
		t.Errorf("Ollama got %.300q", got)
	}
	if c := entry.h.Fleet.Counts(); c.Hops != 0 {
		t.Errorf("%+v", c)
	}
}

// TestHopStreams: each part of an answer arrives before the next one is written, 1xx answers end at
// the entry, and a client of HTTP/1.0 sees a broken answer as such.
func TestHopStreams(t *testing.T) {
	b := newBox(t, "s", "m@1")
	steps := make(chan string)
	b.set(func() {
		b.play = func(w http.ResponseWriter, r *http.Request, _ []byte) {
			w.Header().Set("Content-Type", "application/x-ndjson")
			w.WriteHeader(http.StatusEarlyHints)
			for part := range steps {
				if part == "break" {
					panic(http.ErrAbortHandler)
				}
				if part == "end" {
					return
				}
				io.WriteString(w, part)
				http.NewResponseController(w).Flush()
			}
		}
	})
	a := edgeOf(t, 2, nil, b)
	_, entry := a.of("s")
	for _, version := range []string{"1.1", "1.0"} {
		for _, end := range []string{"end", "break"} {
			c := entry.dial()
			c.send(strings.Replace(rawPost("/api/chat", chat("m", "s")), "HTTP/1.1", "HTTP/"+version, 1))
			steps <- "one\n"
			head := c.mustHead()
			if !strings.HasPrefix(head.line, "HTTP/1.") || !strings.Contains(head.line, " 200 ") {
				t.Fatalf("HTTP/%s: %q", version, head.line)
			}
			line := func() string {
				if version == "1.1" {
					return c.mustChunk()
				}
				text, err := c.br.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				return text
			}
			if got := line(); got != "one\n" {
				t.Errorf("HTTP/%s: %q", version, got)
			}
			steps <- "two\n"
			if got := line(); got != "two\n" {
				t.Errorf("HTTP/%s: %q", version, got)
			}
			steps <- end
			var rest []byte
			var err error
			if version == "1.0" {
				rest, err = io.ReadAll(c.br)
			} else {
				var last string
				last, err = c.nextChunk()
				rest = []byte(last)
			}
			if len(rest) != 0 || (err != nil) != (end == "break") {
				t.Errorf("HTTP/%s, %s: %q, %v", version, end, rest, err)
			}
			want := map[string]Outcome{"end": OK, "break": Aborted}[end]
			if ex := entry.last(); ex.Outcome != want {
				t.Errorf("HTTP/%s: %s", version, ex.Outcome)
			}
			c.Close()
		}
	}
}

// TestHopHeadersRefused: only peers may set the headers of peers, and the paths of the fleet cannot
// be reached through it.
func TestHopHeadersRefused(t *testing.T) {
	boxes := []*box{newBox(t, "s", "m@1"), newBox(t, "r", "n@1")}
	a := sidecars(t, nil, boxes...)
	entry := a.proxy[0]
	for _, name := range []string{"", "-Secret", "-Client", "-Key", "-Age", "-Length", "-Server", "-Moves", "-Elsewhere"} {
		for _, path := range []string{"/api/chat", "/api/tags", "/peer/report", "/_cacheproxy/fleet"} {
			res, text := entry.post(path, chat("m", "s"), "x-cacheproxy-PEER"+name+": "+peerSecret)
			if res.StatusCode != http.StatusForbidden || !strings.Contains(text, "--peer-listen") {
				t.Errorf("X-Cacheproxy-Peer%s at %s: %s %s", name, path, res.Status, text)
			}
		}
	}
	for _, b := range boxes {
		if got := b.took(); len(got) != 0 {
			t.Errorf("Ollama got %q", got)
		}
	}
	// Whatever a client asks of a peer's server, it is that server that answers.
	for _, path := range []string{"/peer/report", "/peer/take"} {
		for _, method := range []string{"GET", "POST"} {
			body := ""
			if method == "POST" {
				body = `{"server":"s","model":"n"}`
			}
			status, from := entry.ask(method, path, body, headerUpstream+": r", "Content-Type: application/json")
			if got := boxes[1].took(); len(got) != 1 || !strings.HasPrefix(got[0], method+" "+path) {
				t.Errorf("%s %s at a peer's server: %d from %q; it got %q", method, path, status, from, got)
			}
		}
	}
	// Without a fleet the headers mean nothing.
	alone := newFleet(t, 1, newBox(t, "s", "m@1"))
	if res, text := alone.post("/api/chat", chat("m", "s"), fleet.HeaderPeer+": x"); res.StatusCode != 200 {
		t.Errorf("without a fleet: %s %s", res.Status, text)
	}
}

// holding makes the inference of a box wait, until the returned function is called.
func (b *box) holding() (release func()) {
	gate := make(chan struct{})
	b.set(func() { b.hold = gate })
	return sync.OnceFunc(func() {
		b.set(func() {
			if b.hold == gate {
				b.hold = nil
			}
		})
		close(gate)
	})
}

// holds waits until an inference is held.
func (b *box) holds(answer <-chan string) {
	b.t.Helper()
	select {
	case <-b.came:
	case got := <-answer:
		b.t.Fatalf("it is not held: %s", got)
	}
}

// sends sends a request in the background.
func (p *ally) sends(ctx context.Context, path, body string, headers ...string) <-chan string {
	answer := make(chan string, 1)
	req, err := http.NewRequestWithContext(ctx, "POST", p.URL+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	go func() { // ends with the answer, which the test waits for
		res, err := p.http.Do(req)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			text = fmt.Append(text, err)
		}
		if res.StatusCode == http.StatusOK && res.Header.Get("Retry-After") != "" {
			text = append(text, " and is to be sent again"...)
			res.StatusCode = 0
		}
		answer <- fmt.Sprint(res.StatusCode, " ", string(text))
	}()
	return answer
}

// TestHopOrder: requests are sent in the same order as by one proxy, at whichever they enter: an
// interactive one before batches, and a client has one share.
func TestHopOrder(t *testing.T) {
	one, three := sentInOrder(t, 1), sentInOrder(t, 3)
	if !slices.Equal(one, three) || len(one) != 9 || one[1] != "ainteractive" {
		t.Errorf("through one %q, through three %q", one, three)
	}
}

// sentInOrder sends requests of two clients through n proxies, which enter while all slots are busy,
// and returns in which order Ollama got them.
func sentInOrder(t *testing.T, n int) (order []string) {
	b := newBox(t, "s", "m@1")
	a := edgeOf(t, n, func(_ int, h *Handler, _ *fleet.Config) {
		h.Guard = withKeys(t, "alice "+theKey+"a\nbob "+theKey+"b\nops "+theKey+"c")
	}, b)
	owner, entry := a.proxy[0], a.proxy[0]
	if n > 1 {
		owner, entry = a.of("s")
	}
	release := b.holding()
	defer release()
	ctx := t.Context()
	key := func(k string) string { return "Authorization: Bearer " + theKey + k }
	answers := []<-chan string{owner.sends(ctx, "/api/chat", chat("m", passage(1, 100)), key("c"))}
	b.holds(answers[0])
	waits := 0
	send := func(p *ally, who string, priority string) {
		waits++
		answers = append(answers, p.sends(ctx, "/api/chat", chat("m", passage(waits+1, 200)+" by "+who+priority),
			key(who), headerPriority+": "+priority))
		waitingIn(t, owner.h.Lanes, waits)
	}
	// alice comes in everywhere with batch work before bob, who has one request.
	for i := range 6 {
		send(a.proxy[i%n], "a", "batch")
	}
	send(entry, "b", "batch")
	send(owner, "a", "interactive")
	release()
	for i, answer := range answers {
		if got := <-answer; !strings.HasPrefix(got, "200 ") {
			t.Errorf("%d: %s", i, got)
		}
	}
	for _, text := range b.took() {
		_, by, _ := strings.Cut(text, " by ")
		by, _, _ = strings.Cut(by, `"`)
		order = append(order, by)
	}
	return order
}

// TestHopKeys: the owner knows the key that a client showed to the entry: its name, its class, and
// how many of its requests may wait; a rate is counted once.
func TestHopKeys(t *testing.T) {
	b := newBox(t, "s", "m@1")
	a := edgeOf(t, 2, func(_ int, h *Handler, _ *fleet.Config) {
		h.Guard = withKeys(t, "alice "+theKey+" class=batch max-waiting=2 rate=5/h\nbob "+theKey+"b")
	}, b)
	owner, entry := a.of("s")
	release := b.holding()
	defer release()
	first := owner.sends(t.Context(), "/api/chat", chat("m", passage(1, 100)), bearer(theKey+"b"))
	b.holds(first)
	var waits []<-chan string
	for i := range 2 {
		waits = append(waits, entry.sends(t.Context(), "/api/chat", chat("m", passage(i, 100)), bearer(theKey)))
		waitingIn(t, owner.h.Lanes, i+1)
	}
	if got := owner.h.Lanes.Waiting(10).First; len(got) != 2 || got[0].Priority != schedule.Batch {
		t.Errorf("%+v", got)
	}
	if res, text := entry.post("/api/chat", chat("m", passage(4, 100)), bearer(theKey)); res.StatusCode != 429 {
		t.Errorf("one too many: %s %s", res.Status, text)
	}
	release()
	<-first
	for _, w := range waits {
		if got := <-w; !strings.HasPrefix(got, "200 ") {
			t.Error(got)
		}
	}
	for i := range 4 { // three were sent
		res, text := entry.post("/api/chat", chat("m", passage(i, 100)), bearer(theKey))
		if want := 200; i < 2 && res.StatusCode != want || i >= 2 && res.StatusCode != 429 {
			t.Errorf("number %d: %s %s", 4+i, res.Status, text)
		}
	}
	if res, _ := entry.post("/api/chat", chat("m", "s")); res.StatusCode != 401 {
		t.Errorf("without a key: %s", res.Status)
	}
	names := map[string]int{}
	for range 6 {
		ex := owner.last()
		names[ex.Name]++
		if ex.Name == "alice" && (!ex.Passed || ex.Priority != "batch") {
			t.Errorf("%+v", ex)
		}
	}
	if names["alice"] != 5 || names["bob"] != 1 {
		t.Errorf("%v", names)
	}
	for _, text := range b.took() {
		if strings.Contains(text, theKey) {
			t.Error("the key reached Ollama")
		}
	}
}

// TestHopKeysShared: what waits elsewhere is asked for where a request waits, each time; its rate
// counts where it enters.
func TestHopKeysShared(t *testing.T) {
	b := newBox(t, "s", "m@1")
	shared := newCounting()
	a := edgeOf(t, 2, func(_ int, h *Handler, _ *fleet.Config) {
		h.Guard, h.Limiter = withKeys(t, "alice "+theKey+" max-waiting=1 rate=4/h\nbob "+theKey+"b"), shared
	}, b)
	owner, entry := a.of("s")
	waiting := func(n int) {
		shared.mu.Lock()
		defer shared.mu.Unlock()
		shared.others = n
	}
	waiting(1)
	if res, text := owner.post("/api/chat", chat("m", passage(0, 100)), bearer(theKey)); res.StatusCode != 200 {
		t.Errorf("%s %s", res.Status, text)
	}
	waiting(0)
	release := b.holding()
	defer release()
	first := owner.sends(t.Context(), "/api/chat", chat("m", passage(1, 100)), bearer(theKey+"b"))
	b.holds(first)
	second := entry.sends(t.Context(), "/api/chat", chat("m", passage(2, 100)), bearer(theKey))
	waitingIn(t, owner.h.Lanes, 1)
	release()
	<-first
	if got := <-second; !strings.HasPrefix(got, "200 ") {
		t.Errorf("nothing waits elsewhere any more: %s", got)
	}
	for i, want := range []int{200, 200, 429} { // the third, the fourth and one too many
		if res, text := entry.post("/api/chat", chat("m", passage(3+i, 100)), bearer(theKey)); res.StatusCode != want {
			t.Errorf("%d: %s %s", i, res.Status, text)
		}
	}
}

// TestHopLeft: when a client leaves, its request ends at the owner, and at Ollama.
func TestHopLeft(t *testing.T) {
	b := newBox(t, "s", "m@1")
	began, ended := make(chan struct{}), make(chan struct{})
	b.set(func() {
		b.play = func(w http.ResponseWriter, r *http.Request, text []byte) {
			io.WriteString(w, "{}\n")
			http.NewResponseController(w).Flush()
			began <- struct{}{}
			<-r.Context().Done()
			ended <- struct{}{}
		}
	})
	a := edgeOf(t, 2, nil, b)
	owner, entry := a.of("s")
	first, leave := context.WithCancel(t.Context())
	second, leaveSecond := context.WithCancel(t.Context())
	defer leaveSecond()
	one := entry.sends(first, "/api/chat", chat("m", passage(1, 100)))
	<-began
	two := entry.sends(second, "/api/chat", chat("m", passage(2, 100)))
	waitingIn(t, owner.h.Lanes, 1)
	leaveSecond()
	<-two
	waitingIn(t, owner.h.Lanes, 0)
	for _, p := range []*ally{entry, owner} {
		if ex := p.last(); ex.Outcome != ClientGone {
			t.Errorf("left while it waited: %+v", ex)
		}
	}
	leave()
	<-one
	<-ended
	for _, p := range []*ally{entry, owner} {
		if ex := p.last(); ex.Outcome != ClientGone {
			t.Errorf("left while it was answered: %+v", ex)
		}
	}
	if got := b.took(); len(got) != 1 {
		t.Errorf("Ollama got %d requests", len(got))
	}
	if c := owner.h.Fleet.Counts(); c.Received != 2 {
		t.Errorf("%+v", c)
	}
}

// TestHopCORS: pages of other origins may read what they may read of one proxy.
func TestHopCORS(t *testing.T) {
	b := newBox(t, "s", "m@1")
	a := edgeOf(t, 2, nil, b)
	owner, entry := a.of("s")
	for _, origin := range []string{"http://localhost:3000", "https://elsewhere.example", ""} {
		var got [2]string
		for i, p := range []*ally{owner, entry} {
			var headers []string
			if origin != "" {
				headers = []string{"Origin: " + origin}
			}
			res, _ := p.post("/api/chat", chat("m", "s"), headers...)
			got[i] = fmt.Sprint(res.StatusCode, res.Header["Access-Control-Allow-Origin"], res.Header["Vary"])
		}
		if got[0] != got[1] {
			t.Errorf("%q: %s, through another %s", origin, got[0], got[1])
		}
	}
}

// TestHopNamed: a client may name a server of another proxy, for anything.
func TestHopNamed(t *testing.T) {
	x, y := newBox(t, "x", "m@1", "both@1"), newBox(t, "y", "n@1", "both@1")
	a := sidecars(t, func(_ int, h *Handler, _ *fleet.Config) { h.MaxBody = 64 << 10 }, x, y)
	entry := a.proxy[0]
	y.set(func() { y.models["far:cloud"] = "2" })
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/api/chat", chat("n", "s")},
		{"POST", "/api/chat", chat("both", "s")},
		{"POST", "/api/chat", chat("far:cloud", "s")},
		{"POST", "/api/generate", `{"model":"both","keep_alive":0}`},
		{"POST", "/api/embed", `{"model":"both","input":"i"}`},
		{"GET", "/api/tags", ""},
		{"GET", "/api/ps", ""},
		{"GET", "/v1/models", ""},
		{"GET", "/api/version", ""},
		{"HEAD", "/api/tags", ""},
		{"POST", "/api/show", `{"model":"both"}`},
		{"POST", "/api/pull", `{"model":"both"}`},
		{"POST", "/api/pull", `{"model":"far:cloud"}`},
		{"DELETE", "/api/delete", `{"model":"both"}`},
		{"GET", "/v1/models/n", ""},
	} {
		name := c.method + " " + c.path + " " + c.body
		res, text := entry.do(c.method, c.path, c.body, headerUpstream+": y")
		if got := res.Header.Get(headerUpstream); got != "y" || res.StatusCode != 200 {
			t.Errorf("%s: %s from %q: %s", name, res.Status, got, text)
		}
		if strings.Contains(text, `"from":"x"`) {
			t.Errorf("%s: %s", name, text)
		}
	}
	for _, text := range x.took() {
		t.Errorf("the other server got %q", text)
	}
	// What is too long to be held cannot be passed on, and does not go to another server.
	res, text := entry.post("/api/chat", chat("both", passage(1, 20_000)), headerUpstream+": y")
	if res.StatusCode != http.StatusRequestEntityTooLarge || !strings.Contains(text, "--max-body") {
		t.Errorf("too long: %s %s", res.Status, text)
	}
	if got := x.took(); len(got) != 0 {
		t.Errorf("the other server got %.200q", got)
	}
	res, text = entry.post("/api/chat", chat("both", "s"), headerUpstream+": nowhere")
	if res.StatusCode != 400 || !strings.Contains(text, "y") {
		t.Errorf("an unknown server: %s %s", res.Status, text)
	}
}

// TestSidecars: proxies that are beside a server each are to a client like one with all of them.
func TestSidecars(t *testing.T) {
	x, y, z := newBox(t, "x", "m@1", "both@1"), newBox(t, "y", "n@1", "both@1"), newBox(t, "z", "n@1")
	x.loaded, y.loaded, z.loaded = []string{"m"}, []string{"n"}, []string{"n"}
	a := sidecars(t, nil, x, y, z)
	for i, p := range a.proxy {
		for path, want := range map[string][]string{
			"/api/tags": {"both", "m", "n"}, "/v1/models": {"both", "m", "n"}, "/api/ps": {"m", "n"},
		} {
			member := "models"
			if path == "/v1/models" {
				member = "data"
			}
			list, _ := p.listing(path, member)
			for i := range list {
				list[i], _, _ = strings.Cut(list[i], "/")
			}
			if !slices.Equal(list, want) {
				t.Errorf("%d: GET %s: %v, want %v", i, path, list, want)
			}
		}
		for model, want := range map[string]string{"m": "x", "n": "yz"} {
			for _, c := range [][3]string{
				{"POST", "/api/show", `{"model":"` + model + `"}`}, {"GET", "/v1/models/" + model, ""},
				{"POST", "/api/chat", chat(model, "s")}, {"POST", "/v1/chat/completions", chat(model, "s")},
				{"POST", "/api/embed", `{"model":"` + model + `","input":"i"}`},
				{"POST", "/v1/embeddings", `{"model":"` + model + `","input":"i"}`},
				{"POST", "/api/generate", `{"model":"` + model + `"}`},
			} {
				if status, from := p.ask(c[0], c[1], c[2]); status != 200 || from == "" || !strings.Contains(want, from) {
					t.Errorf("%d: %s %s of %s: %d from %q", i, c[0], c[1], model, status, from)
				}
			}
		}
		if res, text := p.post("/api/chat", chat("nobody", "s")); res.StatusCode != 404 || !strings.Contains(text, "model not found") {
			t.Errorf("%d: a model that nobody has: %s %s", i, res.Status, text)
		}
		// An unload reaches every server that has the model, once, whoever gets it.
		for model, want := range map[string][]*box{"n": {y, z}, "both": {x, y}, "m": {x}} {
			for _, b := range []*box{x, y, z} {
				b.took()
			}
			body := `{"model":"` + model + `","keep_alive":0}`
			if status, _ := p.ask("POST", "/api/generate", body); status != 200 {
				t.Errorf("%d: unloading %s: %d", i, model, status)
			}
			for _, b := range []*box{x, y, z} {
				n := 0
				for _, text := range b.took() {
					if strings.HasPrefix(text, "POST /api/generate") && strings.Contains(text, `"keep_alive":0`) &&
						strings.Contains(text, `"`+model+`"`) {
						n++
					}
				}
				if wants := slices.Contains(want, b); n > 1 || wants != (n == 1) {
					t.Errorf("%d: unloading %s: %s got it %d times", i, model, b.name, n)
				}
			}
		}
	}
}

// TestHopUnload: whichever proxy is asked to unload a model, each server gets that once, from its owner,
// who knows then that nothing holds the model any more: the next request holds it again.
func TestHopUnload(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "m@1")
	boxes := []*box{x, y}
	a := edgeOf(t, 3, func(_ int, h *Handler, _ *fleet.Config) { h.NoTouch = false }, x, y)
	owner, entry := a.of("x")
	// sent returns the keep_alive of each request that a server got.
	sent := func(b *box) (list []string) {
		for _, text := range b.took() {
			if !strings.HasPrefix(text, "POST /api/generate") {
				continue
			}
			var f struct {
				KeepAlive json.RawMessage `json:"keep_alive"`
			}
			if err := json.Unmarshal([]byte(text[strings.Index(text, "{"):]), &f); err != nil {
				t.Errorf("%v: %q", err, text)
			}
			list = append(list, string(f.KeepAlive))
		}
		return list
	}
	use := func() string {
		t.Helper()
		a.rest()
		owner.post("/api/generate", `{"model":"m","prompt":"p"}`, headerUpstream+": x")
		return strings.Join(sent(x), " ")
	}
	for i, p := range a.proxy {
		first, second := use(), use()
		if first != `"24h0m0s"` || second != "" {
			t.Errorf("%d: two requests say %s and %q: want the first one to hold the model", i, first, second)
		}
		sent(y)
		if res, text := p.post("/api/generate", `{"model":"m","keep_alive":0}`); res.StatusCode != 200 {
			t.Errorf("%d: %s %s", i, res.Status, text)
		}
		for _, b := range boxes {
			if got := sent(b); !slices.Equal(got, []string{"0"}) {
				t.Errorf("%d: %s gets %q; want one request that unloads", i, b.name, got)
			}
		}
	}
	use()
	entry.post("/api/generate", `{"model":"m","keep_alive":0}`, headerUpstream+": x")
	if got, other := sent(x), sent(y); !slices.Equal(got, []string{"0"}) || len(other) > 0 {
		t.Errorf("x, which is named, gets %q, and y %q", got, other)
	}
	if got := use(); got != `"24h0m0s"` {
		t.Errorf("after that a request says %q", got)
	}
}

// TestHopLog: both proxies' lines say which server a request went to; the entry's names the proxy by
// the name that its owner gave it, and the other one says that it was passed on.
func TestHopLog(t *testing.T) {
	a := edgeOf(t, 2, nil, newBox(t, "x", "m@1"))
	owner, entry := a.of("x")
	entry.post("/api/chat", chat("m", "s"))
	owner.last()
	entry.last()
	for p, want := range map[*ally]map[string]any{
		entry: {"upstream": "x", "peer": owner.h.Fleet.Name, "passed": nil},
		owner: {"upstream": "x", "peer": nil, "passed": true},
	} {
		lines := p.log.lines(t, "request")
		for field, want := range want {
			if got := lines[len(lines)-1][field]; got != want {
				t.Errorf("%s of %s is %v, want %v", field, p.h.Fleet.Name, got, want)
			}
		}
	}
}

// TestHopAnswers: a kept answer is found through any proxy, and what many ask at once is computed
// once.
func TestHopAnswers(t *testing.T) {
	b := newBox(t, "s", "m@1")
	a := edgeOf(t, 2, func(_ int, h *Handler, _ *fleet.Config) {
		h.Answers = answers.NewMemory(answers.Limits{Bytes: 1 << 20})
		h.CacheAnswers = CacheAnswers{Default: CacheAll}
		h.CacheEmbeddings = CacheEmbeddings{}
	}, b)
	owner, entry := a.of("s")
	release := b.holding()
	defer release()
	body := chat("m", passage(1, 100))
	var all []<-chan string
	for i := range 50 {
		all = append(all, a.proxy[i%2].sends(t.Context(), "/api/chat", body))
	}
	<-b.came
	poll(t, func() bool { return owner.h.InFlight() == 50 })
	release()
	first := ""
	for _, answer := range all {
		got := <-answer
		if first == "" {
			first = got
		}
		if got != first || !strings.HasPrefix(got, "200 ") {
			t.Errorf("%s, and %s", got, first)
		}
	}
	poll(t, func() bool { return owner.h.Answers.Stats().Entries == 1 })
	for _, p := range []*ally{entry, owner} {
		res, _ := p.post("/api/chat", body)
		if got := res.Header.Get("Cache-Status"); !strings.Contains(got, "hit") {
			t.Errorf("Cache-Status: %q", got)
		}
	}
	if got := b.took(); len(got) != 1 {
		t.Errorf("Ollama got it %d times: %.300q", len(got), got)
	}
}

// TestHopSurvives: an answer that goes on without its client is kept where the client asked for it.
func TestHopSurvives(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "m@1", "n@1")
	a := sidecars(t, nil, x, y)
	entry := a.proxy[0]
	for name, headers := range map[string][]string{
		"by the model": nil, "by the server's name": {headerUpstream + ": y"},
	} {
		release := y.holding()
		res, text := entry.post("/api/chat", chat("n", name), append(headers, "Prefer: "+respondAsync)...)
		if res.StatusCode != http.StatusAccepted {
			t.Fatalf("%s: %s %s", name, res.Status, text)
		}
		<-y.came
		release()
		if status, from := entry.ask("GET", res.Header.Get("Location"), ""); status != 200 || from != "y" {
			t.Errorf("%s: %d from %q", name, status, from)
		}
	}
	release := y.holding()
	ctx, leave := context.WithCancel(t.Context())
	left := entry.sends(ctx, "/api/chat", chat("n", "left"), headerSurvive+": true")
	<-y.came
	leave()
	<-left
	release()
	var page answersPage
	poll(t, func() bool {
		_, text := entry.do("GET", pathAnswers, "")
		if err := json.Unmarshal([]byte(text), &page); err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(page.Kept, func(e keptEntry) bool { return e.Ended == nil })
	})
	if len(page.Kept) != 3 || slices.ContainsFunc(page.Kept, func(e keptEntry) bool { return e.Error != "" }) {
		t.Errorf("%+v", page)
	}
}

// TestHopAnswersLeft: those who wait for what another client has asked for get it when that client
// leaves.
func TestHopAnswersLeft(t *testing.T) {
	b := newBox(t, "s", "m@1")
	a := edgeOf(t, 2, func(_ int, h *Handler, _ *fleet.Config) {
		h.Answers = answers.NewMemory(answers.Limits{Bytes: 1 << 20})
		h.CacheAnswers = CacheAnswers{Default: CacheAll}
	}, b)
	owner, entry := a.of("s")
	release := b.holding()
	defer release()
	first := owner.sends(t.Context(), "/api/chat", chat("m", passage(1, 100)))
	<-b.came
	ctx, leave := context.WithCancel(t.Context())
	leads := entry.sends(ctx, "/api/chat", chat("m", passage(2, 100)))
	waitingIn(t, owner.h.Lanes, 1)
	joins := owner.sends(t.Context(), "/api/chat", chat("m", passage(2, 100)))
	poll(t, func() bool { return owner.h.InFlight() == 3 })
	leave()
	<-leads
	poll(t, func() bool { return owner.h.InFlight() <= 3 && entry.h.InFlight() == 0 })
	release()
	for _, answer := range []<-chan string{first, joins} {
		if got := <-answer; !strings.HasPrefix(got, "200 ") {
			t.Error(got)
		}
	}
}

// streamOf answers as Ollama does a streamed chat of /v1, when it may.
func streamOf(gate <-chan struct{}, status int) func(http.ResponseWriter, *http.Request, []byte) {
	return func(w http.ResponseWriter, r *http.Request, _ []byte) {
		select {
		case <-gate:
		case <-r.Context().Done():
			return
		}
		if status != http.StatusOK {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			io.WriteString(w, `{"error":{"message":"no luck"}}`)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, streamText)
	}
}

// TestHopHeartbeat: while a request waits at its owner, the entry sends heartbeats; what follows is
// the answer, or an event with the error. It is so, too, if the owner goes away and the entry takes
// its place.
func TestHopHeartbeat(t *testing.T) {
	for _, c := range []struct {
		name   string
		status int
		dies   bool
	}{{"answered", 200, false}, {"refused", 500, false}, {"owner dies", 200, true}} {
		t.Run(c.name, func(t *testing.T) {
			b := newBox(t, "s", "m@1")
			gate := make(chan struct{})
			open := sync.OnceFunc(func() { close(gate) })
			defer open()
			b.set(func() { b.play = streamOf(gate, c.status) })
			a := edgeOf(t, 2, func(_ int, h *Handler, _ *fleet.Config) {
				h.Heartbeat = 10 * time.Millisecond
				h.Answers = answers.NewMemory(answers.Limits{Bytes: 1 << 20})
				h.CacheAnswers = CacheAnswers{Default: CacheAll}
			}, b)
			owner, entry := a.of("s")
			ctx, leave := context.WithCancel(t.Context())
			first := owner.sends(ctx, "/v1/chat/completions", streamedChat(passage(1, 100)))
			b.wait("POST /v1/chat")
			client := entry.dial()
			client.send(rawPost("/v1/chat/completions", streamedChat(passage(2, 100))))
			if head := client.mustHead(); !strings.Contains(head.line, "200") {
				t.Fatalf("%q", head.line)
			}
			text := client.mustChunk()
			if c.dies {
				waitingIn(t, owner.h.Lanes, 1)
				owner.hide()
				poll(t, func() bool { return entry.h.Fleet.Owns("s") })
			}
			open()
			for {
				part, err := client.nextChunk()
				if err != nil {
					t.Fatalf("after %q: %v", text, err)
				}
				if part == "" {
					break
				}
				text += part
			}
			leave()
			<-first
			rest := strings.ReplaceAll(text, beatText, "")
			switch {
			case !strings.HasPrefix(text, beatText):
				t.Errorf("no heartbeat: %q", text)
			case c.status == 200 && rest != streamText:
				t.Errorf("%q", text)
			case c.status != 200 && !strings.Contains(rest, "no luck"):
				t.Errorf("%q", text)
			}
			if got := b.took(); len(got) != 2 {
				t.Errorf("Ollama got %d requests", len(got))
			}
		})
	}
}

// TestHopAway: when an owner goes away, its servers' requests are served by another proxy that
// reaches them, those that waited, too, and each is sent once.
func TestHopAway(t *testing.T) {
	b := newBox(t, "s", "m@1")
	release := b.holding()
	defer release()
	a := edgeOf(t, 3, nil, b)
	owner, entry := a.of("s")
	first := owner.sends(t.Context(), "/api/chat", chat("m", passage(0, 100)))
	b.holds(first)
	var waits []<-chan string
	for i := range 4 {
		waits = append(waits, entry.sends(t.Context(), "/api/chat", chat("m", passage(i+1, 100))))
		waitingIn(t, owner.h.Lanes, i+1)
	}
	owner.hide()
	poll(t, func() bool { return len(b.came) > 0 }) // its successor sends the next one
	release()
	for i, answer := range append(waits, first) {
		if got := <-answer; !strings.HasPrefix(got, "200 ") {
			t.Errorf("%d: %s", i, got)
		}
	}
	if status, _ := entry.ask("POST", "/api/chat", chat("m", "later")); status != 200 {
		t.Errorf("later: %d", status)
	}
	sent := map[string]int{}
	for _, text := range b.took() {
		sent[text]++
	}
	for text, n := range sent {
		if n != 1 {
			t.Errorf("sent %d times: %.200q", n, text)
		}
	}
	if len(sent) != 6 {
		t.Errorf("%d were sent", len(sent))
	}
}

// TestSidecarAway: a model that only an absent proxy has is waited for, for a while.
func TestSidecarAway(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "n@1")
	a := sidecars(t, func(i int, h *Handler, _ *fleet.Config) {
		h.Queue = 2
		if h.TryDuration = patience; i == 2 {
			h.TryDuration = time.Millisecond
		}
	}, x, y, newBox(t, "z", "o@1"))
	entry, other, hasty := a.proxy[0], a.proxy[1], a.proxy[2]
	away := func(p *ally) bool {
		return slices.ContainsFunc(p.h.Fleet.Owners(), func(o fleet.Owner) bool { return o.Server == "y" && o.Away })
	}
	other.hide()
	poll(t, func() bool { return away(entry) && away(hasty) })
	res, text := hasty.post("/api/chat", chat("n", "s"))
	if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !strings.Contains(text, pathFleet) {
		t.Errorf("%s %s", res.Status, text)
	}
	if ex := hasty.last(); ex.Outcome != Refused {
		t.Errorf("%+v", ex)
	}
	var waits []<-chan string
	for i := range 2 {
		waits = append(waits, entry.sends(t.Context(), "/v1/chat/completions", chat("n", fmt.Sprint(i))))
	}
	poll(t, func() bool { return entry.h.Waiting() == 2 })
	if res, text := entry.post("/api/chat", chat("n", "s")); res.StatusCode != 503 || !strings.Contains(text, "busy") {
		t.Errorf("one more than may wait: %s %s", res.Status, text)
	}
	if status, from := entry.ask("POST", "/api/chat", chat("m", "s")); status != 200 || from != "x" {
		t.Errorf("meanwhile: %d from %q", status, from)
	}
	other.show(nil)
	for _, answer := range waits {
		if got := <-answer; !strings.HasPrefix(got, "200 ") || !strings.Contains(got, `"from":"y"`) {
			t.Error(got)
		}
	}
	if n := entry.h.Waiting(); n != 0 {
		t.Errorf("%d wait", n)
	}
}

// TestSidecarAwayMeanwhile: a request that waits at the only proxy with its model, or with the server
// that its client wants, when that goes away, waits for it, and goes to no other server. It is sent
// once, whether the proxy is back before its server is idle, or after.
func TestSidecarAwayMeanwhile(t *testing.T) {
	for _, back := range []string{"before", "after"} {
		t.Run(back, func(t *testing.T) {
			x, y := newBox(t, "x", "m@1"), newBox(t, "y", "m@1", "n@1")
			a := sidecars(t, func(_ int, h *Handler, _ *fleet.Config) { h.TryDuration = patience }, x, y)
			entry, other := a.proxy[0], a.proxy[1]
			release := y.holding()
			defer release()
			first := other.sends(t.Context(), "/api/chat", chat("n", passage(0, 100)))
			y.holds(first)
			waits := []<-chan string{
				entry.sends(t.Context(), "/api/chat", chat("n", passage(1, 100))),
				entry.sends(t.Context(), "/api/chat", chat("m", passage(2, 100)), headerUpstream+": y"),
			}
			waitingIn(t, other.h.Lanes, 2)
			other.hide()
			waitingIn(t, other.h.Lanes, 0)
			poll(t, func() bool {
				away := slices.ContainsFunc(entry.h.Fleet.Owners(), func(o fleet.Owner) bool { return o.Server == "y" && o.Away })
				return away && entry.h.Waiting() == 2 && entry.h.Fleet.Counts().Again >= 2
			})
			if back == "after" {
				release()
			}
			other.show(nil)
			release()
			for i, answer := range append(waits, first) {
				if got := <-answer; !strings.HasPrefix(got, "200 ") || !strings.Contains(got, `"from":"y"`) {
					t.Errorf("%d: %s", i, got)
				}
			}
			if n := len(y.took()); n != 3 {
				t.Errorf("the server got %d requests", n)
			}
			if got := x.took(); len(got) != 0 {
				t.Errorf("the other server got %q", got)
			}
		})
	}
}

// TestHopElsewhere: requests that wait for one proxy's server are taken over by another's that is
// idle, and sent once.
func TestHopElsewhere(t *testing.T) {
	s, r := newBox(t, "s", "m@1"), newBox(t, "r", "m@1")
	s.loaded = []string{"m"}
	release := s.holding()
	defer release()
	a := edgeOf(t, 2, func(i int, _ *Handler, c *fleet.Config) { c.Own = []string{[]string{"s", "r"}[i]} }, s, r)
	owner, idle := a.proxy[0], a.proxy[1]
	first := owner.sends(t.Context(), "/api/chat", chat("m", passage(0, 100)))
	s.holds(first)
	var waits []<-chan string
	for i := range 8 {
		waits = append(waits, a.proxy[i%2].sends(t.Context(), "/api/chat", chat("m", passage(i+1, 100))))
		waitingIn(t, owner.h.Lanes, i+1)
	}
	r.set(func() { r.loaded = []string{"m"} })
	idle.poll()
	poll(t, func() bool { return len(r.took()) > 0 })
	release()
	moved := 0
	for i, answer := range waits {
		got := <-answer
		if !strings.HasPrefix(got, "200 ") {
			t.Errorf("%d: %s", i, got)
		}
		if strings.Contains(got, `"from":"r"`) {
			moved++
		}
	}
	<-first
	if c := owner.h.Fleet.Counts(); moved == 0 || int(c.Given) != moved {
		t.Errorf("%d were moved, %+v", moved, c)
	}
	if n := len(s.took()); n+moved != 9 {
		t.Errorf("%d were sent to the one, %d to the other", n, moved)
	}
	counted := map[Outcome]int{}
	poll(t, func() bool { // the end is counted when its client has the answer
		for _, p := range a.proxy {
			for len(p.done) > 0 {
				if ex := p.last(); !ex.Passed {
					counted[ex.Outcome]++
				}
			}
		}
		return counted[OK] == 9
	})
	if len(counted) != 1 {
		t.Errorf("clients' requests: %v", counted)
	}
}

// TestHopDrain: when an owner is about to stop, what waits there goes to the next owner, and nothing
// fails.
func TestHopDrain(t *testing.T) {
	b := newBox(t, "s", "m@1")
	release := b.holding()
	defer release()
	a := edgeOf(t, 3, nil, b)
	owner, entry := a.of("s")
	first := owner.sends(t.Context(), "/api/chat", chat("m", passage(0, 100)))
	b.holds(first)
	var waits []<-chan string
	for i := range 6 {
		waits = append(waits, []*ally{owner, entry}[i%2].sends(t.Context(), "/api/chat", chat("m", passage(i+1, 100))))
		waitingIn(t, owner.h.Lanes, i+1)
	}
	owner.h.Leave()
	waitingIn(t, owner.h.Lanes, 0)
	if res, text := owner.do("GET", pathReady, ""); res.StatusCode != 503 {
		t.Errorf("%s: %s", res.Status, text)
	}
	release()
	for i, answer := range append(waits, first) {
		if got := <-answer; !strings.HasPrefix(got, "200 ") {
			t.Errorf("%d: %s", i, got)
		}
	}
	if status, _ := owner.ask("POST", "/api/chat", chat("m", "late")); status != 200 {
		t.Errorf("late: %d", status)
	}
	if got := b.took(); len(got) != 8 {
		t.Errorf("Ollama got %d requests", len(got))
	}
}

// TestSidecarFinishes: a proxy that finishes what it has gets nothing more, though nobody else has the
// model; that waits until it is back.
func TestSidecarFinishes(t *testing.T) {
	x, y := newBox(t, "x", "m@1"), newBox(t, "y", "n@1")
	a := sidecars(t, func(_ int, h *Handler, _ *fleet.Config) { h.TryDuration = patience }, x, y)
	entry, other := a.proxy[0], a.proxy[1]
	other.h.Leave()
	if status, from := entry.ask("POST", "/api/chat", chat("n", "s")); status != 200 || from != "y" {
		t.Errorf("about to stop: %d from %q", status, from)
	}
	other.h.Finish()
	poll(t, func() bool { return !entry.h.Fleet.Takes() })
	waits := entry.sends(t.Context(), "/api/chat", chat("n", "t"))
	poll(t, func() bool { return entry.h.awaiting.Load() == 1 })
	if got := y.took(); len(got) != 1 {
		t.Errorf("the server got %q", got)
	}
	if status, from := other.ask("POST", "/api/chat", chat("n", "u")); status != 200 || from != "y" {
		t.Errorf("its own client's: %d from %q", status, from)
	}
	other.h.finishing.Store(false)
	if got := <-waits; !strings.HasPrefix(got, "200 ") {
		t.Errorf("when it is back: %s", got)
	}
}

// TestHopOwnerReadsLess: an owner that reads no more than the beginning of a body lets it through,
// and what it refuses counts as refused at the entry.
func TestHopOwnerReadsLess(t *testing.T) {
	b := newBox(t, "s", "m@1")
	a := edgeOf(t, 2, func(i int, h *Handler, c *fleet.Config) {
		if i == 0 {
			c.Own, h.MaxBody = []string{"s"}, 4<<10
		}
	}, b)
	owner, entry := a.proxy[0], a.proxy[1]
	body := chat("m", passage(1, 20_000))
	if status, from := entry.ask("POST", "/api/chat", body); status != 200 || from != "s" {
		t.Errorf("%d from %q", status, from)
	}
	if got := b.took(); len(got) != 1 || got[0] != "POST /api/chat "+body {
		t.Errorf("Ollama got %d requests", len(got))
	}
	entry.last()
	owner.h.Lanes.Close() // it refuses what would have to wait
	release := b.holding()
	res, text := entry.post("/api/chat", chat("m", "s"))
	release()
	if ex := entry.last(); res.StatusCode != 503 || ex.Outcome != Refused || res.Header.Get("Retry-After") == "" ||
		res.Header.Get(fleet.HeaderOutcome) != "" {
		t.Errorf("%s %s: %+v", res.Status, text, ex)
	}
}

// TestHopMemory: two proxies whose memory is full of what they pass on to each other do not wait for
// each other for ever.
func TestHopMemory(t *testing.T) {
	s, r := newBox(t, "s", "m@1"), newBox(t, "r", "n@1")
	a := sidecars(t, func(_ int, h *Handler, _ *fleet.Config) { h.Memory = MemoryLeast }, s, r)
	var clients []*fakeConn
	for i, p := range a.proxy {
		body := chat([]string{"n", "m"}[i], strings.Repeat("x", MemoryLeast/2))
		c := p.dial()
		text := rawPost("/api/chat", body)
		c.send(text[:len(text)-1])
		clients = append(clients, c)
		poll(t, func() bool { return p.h.Held() > MemoryLeast/2-bodyFirst })
	}
	for _, c := range clients { // both bodies end when each fills its entry's memory
		c.send("}")
	}
	for i, c := range clients {
		if got := c.receive(); !strings.Contains(got.line, " 200 ") {
			t.Errorf("%d: %s %.300s", i, got.line, got.body)
		}
	}
}
