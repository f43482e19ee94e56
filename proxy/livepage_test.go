package proxy

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/livepage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
)

// shown is the page's data, as a browser gets it.
type shown struct {
	Proxy     pageProxy
	Problems  []problem
	Totals    totals
	Queue     pageQueue
	Running   []drawn `json:"-"`
	Series    []binEntry
	Upstreams []pageUpstream
	Log       []drawn `json:"-"`
}

// look returns the data of a page that is opened now.
func (rg *rig) look() (s shown) {
	rg.t.Helper()
	parts := map[string]any{}
	for _, p := range (overview{rg.h}).Parts() {
		parts[p.Name] = p.Data
	}
	text, err := json.Marshal(parts)
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		rg.t.Fatal(err)
	}
	s.Running = rg.h.timeline.under()
	s.Log, _ = rg.h.timeline.since(0)
	return s
}

// kinds are the kinds of the problems on the page.
func (s shown) kinds() (kinds []string) {
	for _, p := range s.Problems {
		kinds = append(kinds, p.Kind)
	}
	return kinds
}

// TestPageShell: the page and its files are served to anyone, without any data; the data is not.
func TestPageShell(t *testing.T) {
	up := newFake(t, okAnswer)
	rg := newRig(t, up.URL, &Handler{Guard: withKeys(t, "alice "+theKey), Version: "v1.2.3"})
	for _, c := range []struct {
		method, path string
		headers      []string
		status       int
	}{
		{"GET", "/_cacheproxy", nil, 308},
		{"GET", "/_cacheproxy/", nil, 200},
		{"HEAD", "/_cacheproxy/app.js", nil, 200},
		{"GET", "/_cacheproxy/vendor/uplot.js", nil, 200},
		{"GET", "/_cacheproxy/app.js.map", nil, 401},
		{"POST", "/_cacheproxy/", nil, 401},
		{"GET", pathEvents, nil, 401},
		{"GET", pathEvents, []string{"Authorization: Bearer wrong"}, 401},
		{"GET", "/_cacheproxy/", []string{"Origin: https://elsewhere.example"}, 403},
		{"GET", pathEvents, []string{"Origin: https://elsewhere.example", "Authorization: " + bearer(theKey)[len("Authorization: "):]}, 403},
	} {
		res, text := rg.do(c.method, c.path, "", c.headers...)
		if res.StatusCode != c.status {
			t.Errorf("%s %s %v: %s", c.method, c.path, c.headers, res.Status)
		}
		if strings.Contains(text, "v1.2.3") || strings.Contains(text, up.URL.Host) {
			t.Errorf("%s %s tells a stranger something: %s", c.method, c.path, text)
		}
		if loc := res.Header.Get("Location"); c.status == 308 && loc != "./_cacheproxy/" {
			t.Errorf("Location: %q", loc)
		}
	}
	up.none()
}

// openPage opens a page with theKey. Its answer ends when the page is closed.
func (rg *rig) openPage(t *testing.T) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", rg.URL+pathEvents, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+theKey)
	res, err := rg.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// TestPageEvents: an open page is sent its data, does not count as a request in progress, and does
// not delay the proxy's stop.
func TestPageEvents(t *testing.T) {
	up := newFake(t, okAnswer)
	rg := newRig(t, up.URL, &Handler{Guard: withKeys(t, "alice "+theKey), Version: "v1.2.3"})
	res := rg.openPage(t)
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 1<<20)
	var text string
	for !strings.Contains(text, `"upstreams"`) && lines.Scan() {
		text += lines.Text()
	}
	if !strings.Contains(text, `"you":{"admin":`) || !strings.Contains(text, `"name":"alice"`) || !strings.Contains(text, `"version":"v1.2.3"`) {
		t.Errorf("%s, %s", res.Status, text)
	}
	if csp := res.Header.Get("Access-Control-Allow-Origin"); csp != "" {
		t.Errorf("other origins may read it: %s", csp)
	}
	if n := rg.h.InFlight(); n != 0 {
		t.Errorf("%d requests are under way", n)
	}
	rg.h.ClosePages()
	for lines.Scan() { // to the end of the answer
	}
	if ex := rg.ended(); ex.Outcome != Own || ex.Status != 200 || ex.Endpoint != pathEvents {
		t.Errorf("%+v", ex)
	}
	if res, _ := rg.do("GET", pathEvents, "", "Authorization: Bearer "+theKey); res.StatusCode != 503 {
		t.Errorf("after the end: %s", res.Status)
	}
	rg.ended()
	if n := rg.h.InFlight(); n != 0 {
		t.Errorf("%d requests are under way in the end", n)
	}
}

// TestPageLeft: a page that is closed stops counting at once, unlike a request that goes on without
// its client.
func TestPageLeft(t *testing.T) {
	rg := newRig(t, newFake(t, okAnswer).URL, &Handler{})
	rg.h.lingers = time.Hour
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	req, err := http.NewRequestWithContext(ctx, "GET", rg.URL+pathEvents, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := rg.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if n := rg.h.live.Pages(); n != 1 {
		t.Errorf("%d pages are open", n)
	}
	leave()
	rg.ended()
	if n := rg.h.live.Pages(); n != 0 {
		t.Errorf("%d pages are open in the end", n)
	}
}

// TestPageRevoked: an open page ends when its key is removed, or gets other rights.
func TestPageRevoked(t *testing.T) {
	for what, keys := range map[string]string{"gone": "bob other-key", "of an admin no more": "alice " + theKey} {
		guard := withKeys(t, "alice "+theKey+" admin")
		rg := newRig(t, newFake(t, okAnswer).URL, &Handler{Guard: guard})
		res := rg.openPage(t)
		if err := guard.Keys.Replace(keys); err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(text), `"admin":true`) {
			t.Errorf("%s: %v, %s", what, err, text)
		}
		res.Body.Close()
		rg.ended()
	}
}

// TestPagesLive: after a change the pages show the settings in force, and prompts that may no
// longer be shown are forgotten.
func TestPagesLive(t *testing.T) {
	rg := newRig(t, newFake(t, okAnswer).URL, &Handler{ShowPrompts: true, KeepAlive: keep(t, "", "24h")})
	rg.post("/api/chat", `{"model":"m","messages":[{"role":"user","content":"secret text"}]}`)
	rg.ended()
	shows := func() bool {
		t.Helper()
		_, text := rg.do("GET", pathRequests, "")
		rg.ended()
		return strings.Contains(text, "secret text")
	}
	if !shows() {
		t.Error("the prompt is not shown")
	}
	l := rg.h.Live()
	l.ShowPrompts, l.KeepAlive = false, keep(t, Force, "7h")
	rg.h.Change(l)
	if shows() {
		t.Error("the prompt is shown still")
	}
	l.ShowPrompts = true
	rg.h.Change(l)
	if shows() {
		t.Error("the prompt was not forgotten")
	}
	facts, _ := factsOf(t, rg, "")
	if page := rg.look(); facts.Settings.KeepAlive != "7h0m0s" || facts.Settings.KeepAlivePolicy != "force" || page.Proxy.Held != "7h0m0s" {
		t.Errorf("%+v, %+v", facts.Settings, page.Proxy)
	}
}

// TestPageFigures: the requests in progress, waiting and finished, and totals that match the
// exchanges reported to metrics.
func TestPageFigures(t *testing.T) {
	b := newBox(t, "a", "m:latest@1")
	f := newFleet(t, 1, b)
	ask := func(text string) func() {
		var wg sync.WaitGroup
		wg.Go(func() { f.do("POST", "/api/chat", chat("m:latest", text)) })
		return wg.Wait
	}
	if s := f.look(); len(s.Log)+len(s.Running)+len(s.Queue.Requests)+s.Totals.Requests != 0 {
		t.Errorf("before anything: %+v", s)
	}
	hold := make(chan struct{})
	b.set(func() { b.hold = hold })
	first := ask(passage(1, 200))
	<-b.came
	second := ask(passage(2, 100))
	for f.h.Waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	for len(f.look().Queue.Requests) == 0 { // it is counted before it is in the queue
		time.Sleep(time.Millisecond)
	}
	s := f.look()
	if len(s.Running) != 1 || *s.Running[0].Lane != 0 || s.Running[0].Upstream != "a" || s.Running[0].Model != "m" && s.Running[0].Model != "m:latest" ||
		s.Running[0].Group == "" || s.Running[0].Outcome != "" {
		t.Errorf("under way: %+v", s.Running)
	}
	if q := s.Queue; q.Waiting != 1 || q.Queued != 1 || q.Requests[0].Model != s.Running[0].Model || q.Requests[0].Place != 1 || q.Requests[0].Tokens < 1 {
		t.Errorf("waiting: %+v", q)
	}
	slots := s.Upstreams[0].Slots
	if len(slots) != 1 || slots[0].Busy != 1 || slots[0].Waiting != 1 || slots[0].Lanes != 1 || slots[0].Source != "given" || slots[0].Runner != s.Running[0].Runner {
		t.Errorf("slots: %+v", slots)
	}
	close(hold)
	first()
	second()
	b.set(func() { b.hold = nil })
	ask(passage(1, 200))()
	f.ask("POST", "/api/chat", chat("absent", "x"))
	b.set(func() { b.refuse = 500 })
	f.ask("POST", "/api/chat", chat("m:latest", "y"))
	f.ask("GET", "/api/tags", "") // not a request to a model

	want := newTimeline().totals
	tokens := 0
	for range 6 {
		if ex := f.ended(); ex.Endpoint == "/api/chat" {
			want.add(ex)
			if ex.Savings != nil {
				tokens += ex.Savings.Total
			}
		}
	}
	s = f.look()
	if fmt.Sprintf("%+v", s.Totals) != fmt.Sprintf("%+v", want) || want.Requests != 5 || tokens == 0 {
		t.Errorf("totals:\n%+v, want\n%+v", s.Totals, want)
	}
	if len(s.Running)+len(s.Queue.Requests) != 0 || len(s.Log) != 5 {
		t.Errorf("in the end: %d run, %d wait, %d have ended", len(s.Running), len(s.Queue.Requests), len(s.Log))
	}
	var bins [7]int64
	for _, b := range s.Series {
		for i := range b {
			bins[i] += b[i]
		}
	}
	if bins[1] != 5 || bins[2]+bins[3]+bins[4] != int64(tokens) || bins[6] != int64(want.Loads+want.EstimatedLoads) {
		t.Errorf("over time: %v; %d tokens", bins, tokens)
	}
	// Each entry matches the ledger's.
	entries := map[uint64]savings.Entry{}
	for _, e := range f.h.Ledger.Recent(100) {
		entries[e.ID] = e
	}
	told := 0
	for i, d := range s.Log {
		if d.Number != uint64(i+1) || d.Duration <= 0 || d.Sent+1e-9 < d.Waited && d.Upstream != "" && d.Sent != 0 {
			t.Errorf("entry %d: %+v", i, d)
		}
		e, ok := entries[d.Entry]
		if d.told == nil {
			continue
		}
		told++
		if !ok || e.Total != d.Total || string(e.Verdict) != string(d.Verdict) || e.Reason != d.Reason || e.Detail != d.Detail || savings.PrefixString(e.Prefix) != d.Prefix {
			t.Errorf("%+v is not the ledger's %+v", d, e)
		}
	}
	if told != len(entries) || told < 3 {
		t.Errorf("%d entries of the ledger's %d are shown", told, len(entries))
	}
	if !slices.Contains(s.kinds(), string(UpstreamError)) {
		t.Errorf("problems: %+v", s.Problems)
	}
}

// chatEnded waits for the end of a request to a model, and skips others.
func (f *severalServers) chatEnded() {
	f.t.Helper()
	for f.ended().Endpoint != "/api/chat" {
	}
}

// TestPageProblems: each problem that can be provoked here is shown, and disappears when it is
// over.
func TestPageProblems(t *testing.T) {
	a, b := newBox(t, "a", "m:latest@1"), newBox(t, "b", "m:latest@1")
	f := newFleet(t, 1, a, b)
	want := func(when string, kinds ...string) {
		t.Helper()
		if got := f.look().kinds(); !slices.Equal(got, kinds) {
			t.Errorf("%s: %v, want %v", when, got, kinds)
		}
	}
	want("at first")
	f.do("POST", pathUpstreams+"b/drain", "")
	want("b drains", "draining")
	f.do("POST", pathUpstreams+"b/resume", "")
	want("b resumed")
	f.kill(b)
	for range 3 {
		f.poll()
	}
	want("b is away", "away")
	b.start()
	f.poll()
	want("b is back")
	a.set(func() { a.refuse = 500 })
	b.set(func() { b.refuse = 500 })
	f.ask("POST", "/api/chat", chat("m:latest", "x"))
	f.chatEnded()
	want("Ollama fails", string(UpstreamError))
	f.h.timeline.mu.Lock()
	for i := range f.h.timeline.ring {
		f.h.timeline.ring[i].At -= lately.Milliseconds() + 20000
	}
	for i := range f.h.timeline.bins {
		f.h.timeline.bins[i].at -= int64((lately + 20*time.Second) / binWidth)
	}
	f.h.timeline.mu.Unlock()
	want("five minutes later")
	f.do("POST", "/api/chat", chat("m:latest", "x"), headerUpstream+": nowhere")
	f.chatEnded()
	s := f.look()
	if !slices.Equal(s.kinds(), []string{string(Refused)}) || !strings.Contains(s.Problems[0].What, `there is no upstream "nowhere"`) {
		t.Errorf("refused: %+v", s.Problems)
	}
}

// TestPageChanges: a model can be held and unloaded, but only with the right to, and not by pages
// of other origins.
func TestPageChanges(t *testing.T) {
	b := newBox(t, "a", "m:latest@1", "other:latest@2")
	b.set(func() { b.loaded, b.tokens = []string{"m:latest"}, 2048 }) // as others loaded it
	f := newFleet(t, 1, b)
	f.ask("POST", "/api/chat", chat("m:latest", "x"))
	b.took()
	for _, c := range []struct {
		method, path string
		headers      []string
		status       int
	}{
		{"GET", "a/unload?model=m", nil, 405},
		{"POST", "a/unload?model=m", []string{"Origin: http://localhost:3000"}, 403},
		{"POST", "a/hold?model=m&for=24h", []string{"Origin: null"}, 403},
		{"POST", "b/unload?model=m", nil, 404},
		{"POST", "a/unload?model=absent", nil, 404},
		{"POST", "a/unload", nil, 404},
		{"POST", "a/hold?model=m", nil, 400},
		{"POST", "a/hold?model=m&for=0", nil, 400},
		{"POST", "a/hold?model=m&for=off", nil, 400},
		{"POST", "a/hold?model=other&for=1h", nil, 502}, // it is not loaded
	} {
		if res, text := f.do(c.method, pathUpstreams+c.path, "", c.headers...); res.StatusCode != c.status {
			t.Errorf("%s %s %v: %s, %s", c.method, c.path, c.headers, res.Status, text)
		}
	}
	if got := b.took(); len(got) != 0 {
		t.Errorf("the server was asked %q", got)
	}
	if res, text := f.do("POST", pathUpstreams+"a/hold?model=m:latest&for=36h", ""); res.StatusCode != 200 {
		t.Errorf("hold: %s, %s", res.Status, text)
	}
	if got := b.took(); len(got) != 1 || !strings.Contains(got[0], `"keep_alive":"36h0m0s"`) || !strings.Contains(got[0], `"prompt":""`) ||
		!strings.Contains(got[0], `"num_ctx":2048`) {
		t.Errorf("to hold it the server was asked %q", got)
	}
	loads := f.look().Upstreams[0].Loads
	if len(loads) != 1 || loads[0].Holder != holderClient || loads[0].For != "36h0m0s" {
		t.Errorf("held: %+v", loads)
	}
	if res, text := f.do("POST", pathUpstreams+"a/unload?model=m:latest", ""); res.StatusCode != 200 {
		t.Errorf("unload: %s, %s", res.Status, text)
	}
	rows := f.h.recorder.Facts(time.Now(), time.Time{}).Models
	if n := len(rows); n != 1 || rows[0].Name != "m:latest" || !slices.ContainsFunc(rows[0].Askers, func(a doctor.Asked) bool {
		return a.Endpoint == pathUpstreams && a.Requests == 2 && a.OwnKeepAlive != nil && *a.OwnKeepAlive == 0
	}) {
		t.Errorf("doctor is told %+v", rows)
	}
	if got := b.took(); len(got) != 1 || !strings.Contains(got[0], `"keep_alive":"0s"`) && !strings.Contains(got[0], `"keep_alive":0`) {
		t.Errorf("to unload it the server was asked %q", got)
	}
}

// TestTimelineBounds: the page remembers a fixed number of requests, and an hour, under any load.
func TestTimelineBounds(t *testing.T) {
	tl := newTimeline()
	ask := func() {
		ex := &exchange{start: time.Now(), route: routes["/api/chat"]}
		ex.Outcome = OK
		tl.sent(ex)
		tl.ended(ex)
	}
	for range timelineMost + 10 {
		ask()
	}
	// A flood of requests with the same failure does not displace the others.
	for range 10 * timelineMost {
		ex := &exchange{start: time.Now(), route: routes["/api/chat"]}
		ex.Outcome = Unreachable
		tl.ended(ex)
	}
	// A bin may have ended meanwhile.
	if tl.next > timelineMost+10+3*alikeMost || tl.totals.Outcomes[string(Unreachable)] != 10*timelineMost {
		t.Errorf("of a flood %d are shown, %d were counted", tl.next-timelineMost-10, tl.totals.Outcomes[string(Unreachable)])
	}
	tl = newTimeline()
	for range timelineMost + 10 {
		ask()
	}
	list, next := tl.since(0)
	if len(list) != timelineMost || next != timelineMost+10 || list[0].Number != 11 || list[len(list)-1].Number != next {
		t.Errorf("%d entries, from %d on; the next is %d", len(list), list[0].Number, next)
	}
	if list, _ := tl.since(next - 2); len(list) != 2 || list[1].Number != next {
		t.Errorf("the last two: %+v", list)
	}
	if list, _ := tl.since(next); len(list) != 0 || len(tl.under()) != 0 {
		t.Errorf("after the last one: %+v", list)
	}
	now := time.Now()
	tl.bin(now.Add(-binWidth)).add(Exchange{})
	if got := len(tl.series(now.Add(binMost * binWidth * 2))); got != 0 {
		t.Errorf("hours later %d bins are shown", got)
	}
	for i := range 3 * binMost {
		tl.bin(now.Add(time.Duration(i) * binWidth)).add(Exchange{})
	}
	series := tl.series(now.Add((3*binMost - 1) * binWidth))
	if len(series) != binMost || !slices.IsSortedFunc(series, func(a, b binEntry) int { return int(a[0] - b[0]) }) {
		t.Errorf("%d bins", len(series))
	}
	for range 2 * runningMost {
		tl.sent(&exchange{start: now, route: routes["/api/chat"]})
	}
	if n := len(tl.under()); n != runningMost {
		t.Errorf("%d are shown to be under way", n)
	}
	var _ livepage.Source = overview{}
}

// TestPageContexts: the stored contexts are shown as the store has them; without a store there are
// none.
func TestPageContexts(t *testing.T) {
	up := newFake(t, okAnswer)
	if p := newRig(t, up.URL, &Handler{}).h.pageStored(); p != nil {
		t.Errorf("without contexts: %+v", p)
	}
	files, err := contextstore.OpenFiles(t.TempDir(), contextstore.FileLimits{Bytes: 1 << 20}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close(t.Context())
	for i := range pageContexts + 2 {
		text := make([]byte, 4096)
		for at, word := range []uint32{0x67677371, 3, uint32(100 + i)} { // llama.cpp's header
			binary.LittleEndian.PutUint32(text[4*at:], word)
		}
		s := contextstore.State{Format: "f", Model: "m", Links: contextstore.Chain{uint64(i + 1)}, Tokens: 100 + i, Bytes: int64(len(text)), Cost: time.Second}
		name, err := files.Room(s)
		if err == nil {
			err = os.WriteFile(filepath.Join(files.Dir(), name), text, 0o600)
		}
		if err == nil {
			_, err = files.Commit(name, s)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	manager := contexts.New(contexts.Config{Running: func() []contexts.Running { return nil }, Files: files, Log: slog.New(slog.DiscardHandler)})
	h := newRig(t, up.URL, &Handler{Contexts: manager}).h
	p := h.pageStored()
	st := files.Stats()
	if p.States != st.States || p.States != pageContexts+2 || p.Bytes != st.Bytes || p.Limit != 1<<20 || len(p.Contexts) != pageContexts || p.NotListed != 2 {
		t.Errorf("%+v, the store has %+v", p, st)
	}
	if c := p.Contexts[0]; c.Tokens != 100+pageContexts+1 || c.Model != "m" || c.Cost != 1 {
		t.Errorf("the one that was used last: %+v", c)
	}
}
