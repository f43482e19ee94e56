package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
)

// pageFigures are the figures that the page shows, as read from its elements.
type pageFigures struct {
	Live                                                 string
	Requests, Reused, Evaluated, Generated, Loads, Saved float64
	Worth, Cold, Waiting, Running                        float64
	Memory, Context                                      float64 // of the one model; -1: none
	Busy, Slots                                          float64 // of that model's lanes
	Problems                                             []string
	Rows                                                 []pageRow
	Prefixes                                             float64 // evaluated tokens
	Bins                                                 []float64
	Lanes                                                []float64 // requests, reused, evaluated, …
	Overflow                                             bool      // the page is wider than the window
}

// pageRow is one of the last requests.
type pageRow struct {
	Entry, Total float64
	Why          string
}

const readPage = `(() => {
	const num = s => { const e = document.querySelector(s); return e ? Number(e.value) : -1; };
	const column = (table, i) => [...document.querySelectorAll(table + " tbody tr")].reduce((n, row) => {
		const d = row.children[i] && row.children[i].querySelector("data");
		return n + (d ? Number(d.value) : 0);
	}, 0);
	const names = [...document.querySelectorAll("#models thead th")].map(e => e.textContent);
	const model = (name, i) => num("#models tbody td:nth-child(" + (names.findIndex(n => n === name) + 1) + ") data");
	return {
		Live: (document.querySelector("header [role=status]") || {}).textContent || "",
		Requests: num("#f-requests data"), Reused: num("#f-reused data"), Evaluated: num("#f-evaluated data"), Generated: num("#f-generated data"),
		Loads: num("#f-loads data"), Saved: num("#f-saved data"), Worth: num("#f-worth data"), Cold: num("#f-evaluated small data"),
		Running: num("header .state data:nth-of-type(1)"), Waiting: num("#h-wait data"),
		Memory: model("Memory"), Context: model("Context"),
		Busy: num("#upstreams .slots data:nth-of-type(1)"), Slots: num("#upstreams .slots data:nth-of-type(2)"),
		Problems: [...document.querySelectorAll(".problems li")].map(e => e.dataset.kind),
		Rows: [...document.querySelectorAll("#requests tr.row")].map(row => ({
			Entry: Number(row.dataset.entry || 0), Total: Number((row.children[3].querySelector("data") || {}).value || 0), Why: row.children[4].textContent,
		})),
		Prefixes: column("#prefixes", 3),
		Bins: [1, 2, 3, 4, 5, 6].map(i => column("section[aria-labelledby=h-tokens] table", i)),
		Lanes: [2, 4, 5, 6, 7].map(i => column("#lane-table", i)),
		Overflow: document.documentElement.scrollWidth > innerWidth,
	};
})()`

// livePage is the page in a browser.
type livePage struct {
	t   *testing.T
	ctx context.Context
}

func (p livePage) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	if err := chromedp.Do(p.ctx, actions...); err != nil {
		p.t.Fatal(err)
	}
}

func (p livePage) read() pageFigures {
	p.t.Helper()
	f, err := chromedp.Run(p.ctx, chromedp.Evaluate[pageFigures](readPage))
	if err != nil {
		p.t.Fatal(err)
	}
	return f
}

// until waits until the page shows something.
func (p livePage) until(what string, ok func(pageFigures) bool) (f pageFigures) {
	p.t.Helper()
	settles(p.t, func() error {
		if f = p.read(); !ok(f) {
			return fmt.Errorf("the page does not show %s: %+v", what, f)
		}
		return nil
	})
	return f
}

// pressTwice presses a button that asks for confirmation.
func (p livePage) pressTwice(name string) {
	p.t.Helper()
	p.press(name)
	asked := false
	settles(p.t, func() error { // a second press too soon counts as a double click
		asks, err := chromedp.Run(p.ctx, chromedp.Evaluate[bool](fmt.Sprintf(`(() => {
			const b = document.querySelector("[aria-label=" + JSON.stringify(%q) + "]");
			if (b) b.click();
			return !!b;
		})()`, name+" now?")))
		if err == nil && (asks || !asked) {
			err = fmt.Errorf("%q: whether one is sure was asked: %v, and is still: %v", name, asked, asks)
		}
		asked = asked || asks
		return err
	})
}

// press presses the button with a name, by script.
func (p livePage) press(name string) {
	p.t.Helper()
	found, err := chromedp.Run(p.ctx, chromedp.Evaluate[bool](fmt.Sprintf(`(() => {
		const b = [...document.querySelectorAll("button")].find(b => b.textContent === %[1]q || b.getAttribute("aria-label") === %[1]q);
		if (b) b.click();
		return !!b;
	})()`, name)))
	if err != nil || !found {
		p.t.Fatalf("pressing %q: %v, found %v", name, err, found)
	}
}

// picture saves a screenshot of the page in the folder of the variable PAGE_DIR, if that is set.
func (p livePage) picture(name string) {
	p.t.Helper()
	text, err := chromedp.Run(p.ctx, chromedp.FullScreenshot(100))
	if err != nil {
		p.t.Fatal(err)
	}
	if dir := os.Getenv("PAGE_DIR"); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, name+".png"), text, 0o666); err != nil {
			p.t.Fatal(err)
		}
	}
}

// pageFleet is what the page shows of a fleet.
type pageFleet struct {
	Section  bool
	Peers    [][]string // the cells' texts, by row
	Owners   [][]string
	Problems []string
	Overflow bool
}

const readFleet = `(() => {
	const rows = table => [...document.querySelectorAll(table + " tbody tr")].map(r => [...r.children].map(c => c.textContent));
	return {
		Section: !!document.querySelector("#h-fleet"), Peers: rows("#peers"), Owners: rows("#owners"),
		Problems: [...document.querySelectorAll(".problems li")].map(e => e.dataset.kind),
		Overflow: document.documentElement.scrollWidth > innerWidth,
	};
})()`

// TestPageFleet: the page shows the other proxies and who schedules which server, and which proxy is
// away, in a real browser.
func TestPageFleet(t *testing.T) {
	sim, err := ollamasim.New(ollamasim.Config{Parallel: 2, Models: []ollamasim.Model{{Name: "m", LoadTime: time.Millisecond}}})
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(sim)
	t.Cleanup(front.Close)
	browser, err := findBrowser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	proxies := startFleet(t, [][]string{
		{"--upstream", "one=" + front.URL, "--own", "one", "--peer-name", "first"},
		{"--upstream", "two=" + front.URL, "--own", "two", "--peer-name", "second"},
	})
	ctx, complaints := newTab(t, browser, func(u *url.URL) bool { return "http://"+u.Host == proxies[0].URL })
	page := livePage{t, ctx}
	page.do(chromedp.Navigate(proxies[0].URL + "/_cacheproxy/"))
	until := func(what string, ok func(f pageFleet) bool) {
		t.Helper()
		settles(t, func() error {
			f, err := chromedp.Run(ctx, chromedp.Evaluate[pageFleet](readFleet))
			if err == nil && !ok(f) {
				err = fmt.Errorf("the page does not show %s: %+v", what, f)
			}
			return err
		})
	}
	until("both proxies", func(f pageFleet) bool {
		return f.Section && len(f.Peers) == 1 && strings.HasPrefix(f.Peers[0][0], "second") && f.Peers[0][1] == "up" &&
			len(f.Owners) == 2 && f.Owners[0][0] == "one" && f.Owners[0][1] == "first this one" &&
			f.Owners[1][0] == "two" && f.Owners[1][1] == "second" && f.Owners[1][5] == "1" && !f.Overflow &&
			!slices.Contains(f.Problems, "peer")
	})
	page.picture("fleet")
	proxies[1].Kill()
	until("that one is away", func(f pageFleet) bool {
		return len(f.Peers) == 1 && strings.HasPrefix(f.Peers[0][0], "second") && strings.HasPrefix(f.Peers[0][1], "away") && len(f.Owners) == 2 &&
			strings.Contains(f.Owners[1][0], "its proxy is away") && slices.Contains(f.Problems, "peer") && !f.Overflow
	})
	page.picture("fleet-away")
	for _, c := range complaints() {
		t.Error(c)
	}
}

// told returns the figures of /metrics for what the page shows.
func told(t *testing.T, p *proxyProcess) (f pageFigures) {
	t.Helper()
	_, _, text := get(t, p.URL+"/metrics")
	sum := func(series string) (sum float64) {
		for _, m := range regexp.MustCompile(`(?m)^ollama_cacheproxy_`+series+` (\S+)$`).FindAllStringSubmatch(text, -1) {
			n, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
		return sum
	}
	f.Requests = sum(`requests_total{endpoint="/(?:api|v1)/chat[^}]*}`)
	f.Reused = sum(`(?:estimated_)?prompt_tokens_total{kind="reused"[^}]*}`)
	f.Evaluated = sum(`(?:estimated_)?prompt_tokens_total{kind="evaluated"[^}]*}`)
	f.Loads = sum(`(?:estimated_)?model_loads_total{[^}]*}`)
	f.Saved = sum(`estimated_saved_seconds_total{[^}]*}`)
	f.Cold = sum(`(?:estimated_)?prompts_total{[^}]*verdict="cold"}`)
	f.Generated = sum(`key_tokens_total{kind="generated"[^}]*}`)
	f.Waiting = sum(`waiting_requests`)
	f.Memory = sum(`upstream_loaded_bytes{[^}]*}`)
	f.Busy = sum(`lanes{[^}]*state="busy"[^}]*}`)
	f.Slots = f.Busy + sum(`lanes{[^}]*state="(?:idle|held)"[^}]*}`)
	return f
}

// tells waits until /metrics have at least what the page shows, and returns that.
func (p *proxyProcess) tells(t *testing.T, shown pageFigures) (f pageFigures) {
	t.Helper()
	settles(t, func() error {
		if f = told(t, p); !atLeast(f.grown(), shown.grown()) {
			return fmt.Errorf("the page shows %v, /metrics tell %v", shown.grown(), f.grown())
		}
		return nil
	})
	return f
}

// grown returns the figures that only grow.
func (f pageFigures) grown() []float64 {
	return []float64{f.Requests, f.Reused, f.Evaluated, f.Loads, f.Saved, f.Cold, f.Generated}
}

func atLeast(a, b []float64) bool {
	for i := range a {
		if a[i] < b[i]-1e-6 {
			return false
		}
	}
	return true
}

// TestPage: the live page in a real browser, while a real Ollama works. Each figure is that of
// /metrics and of the ledger, a problem is shown and disappears with its cause, and the buttons
// work. With PAGE_DIR set, screenshots are saved in that folder.
func TestPage(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{tiny}})
	browser, err := findBrowser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const key = "a-key-for-the-page"
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keys, []byte("operator "+key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := startProxy(t, server.URL(), "--price", "2.5")
	gated := startProxy(t, server.URL(), "--api-keys-file", keys)
	ctx, complaints := newTab(t, browser, func(u *url.URL) bool {
		return u.Host == strings.TrimPrefix(p.URL, "http://") || u.Host == strings.TrimPrefix(gated.URL, "http://")
	})
	page := livePage{t, ctx}

	page.do(chromedp.Navigate(p.URL + "/_cacheproxy"))
	f := page.until("that it is live", func(f pageFigures) bool { return f.Live == "live" && f.Requests == 0 })
	if len(f.Problems)+len(f.Rows) != 0 || f.Reused+f.Evaluated+f.Loads != 0 || f.Memory != -1 {
		t.Errorf("before anything: %+v", f)
	}
	page.picture("empty")

	ask := func(system, user string, output int, more string) {
		text, err := json.Marshal([]map[string]string{{"role": "system", "content": system}, {"role": "user", "content": user}})
		if err != nil {
			t.Error(err)
		}
		status, _, answer := post(t, p.URL+"/api/chat", fmt.Sprintf(`{"model":%q,"stream":false,"messages":%s,"options":{"num_predict":%d%s}}`, tiny, text, output, more))
		if status != 200 {
			t.Errorf("%d %s", status, answer)
		}
	}
	var work sync.WaitGroup
	for script := range 4 {
		work.Go(func() {
			for i := range 20 {
				ask(words(uint64(script/2), 150), words(uint64(100*script+i), 10), 32, "")
			}
		})
	}
	done := make(chan struct{})
	go func() { work.Wait(); close(done) }()

	// While that works, the page shows at least what /metrics had before, and at most what it has
	// after.
	looks := 0
	for busy := true; busy; looks++ {
		select {
		case <-done:
			busy = false
		default:
		}
		before := told(t, p)
		f := page.until("what /metrics told", func(f pageFigures) bool {
			f.Generated = 0 // without keys /metrics does not have it
			return atLeast(f.grown(), before.grown())
		})
		f.Generated = 0
		p.tells(t, f) // a moment later: a request is on the page before it is counted
		if looks == 4 {
			page.picture("busy")
		}
	}
	if looks < 3 {
		t.Errorf("it was looked at %d times while it worked", looks)
	}

	f = page.until("all 80 requests", func(f pageFigures) bool {
		return f.Requests == 80 && f.Waiting == 0 && f.Running == 0 && f.Busy == 0 && f.Memory > 0
	})
	last := f
	last.Generated = 0
	want := p.tells(t, last)
	same := func(what string, got, want float64) {
		t.Helper()
		if diff := got - want; diff > 1e-6 || diff < -1e-6 {
			t.Errorf("%s: the page shows %v, want %v", what, got, want)
		}
	}
	same("requests", f.Requests, want.Requests)
	same("reused", f.Reused, want.Reused)
	same("evaluated", f.Evaluated, want.Evaluated)
	same("loads", f.Loads, want.Loads)
	same("saved", f.Saved, want.Saved)
	same("cold", f.Cold, want.Cold)
	same("waiting", f.Waiting, want.Waiting)
	same("memory", f.Memory, want.Memory)
	same("busy lanes", f.Busy, want.Busy)
	same("lanes", f.Slots, want.Slots)
	same("worth", f.Worth, want.Reused*2.5/1e6)
	same("evaluated, by prefix", f.Prefixes, want.Evaluated)
	same("requests, over time", f.Bins[0], want.Requests)
	same("reused, over time", f.Bins[1], want.Reused)
	same("evaluated, over time", f.Bins[2], want.Evaluated)
	same("loads, over time", f.Bins[5], want.Loads)
	same("requests, by lane", f.Lanes[0], want.Requests)
	same("reused, by lane", f.Lanes[1], want.Reused)
	same("evaluated, by lane", f.Lanes[2], want.Evaluated)
	same("loads, by lane", f.Lanes[4], want.Loads)

	// The ledger's entries, one by one.
	page.press("Show more")
	var ledger struct {
		Requests []struct {
			ID     uint64
			Tokens struct {
				Total, Reused, Evaluated int
			}
			Reason    string
			Generated int `json:"generated_tokens"`
		}
	}
	if _, _, text := get(t, p.URL+"/_cacheproxy/requests"); json.Unmarshal([]byte(text), &ledger) != nil || len(ledger.Requests) != 80 {
		t.Fatalf("the ledger: %s", text)
	}
	f = page.until("80 rows", func(f pageFigures) bool { return len(f.Rows) == 80 })
	rows := map[uint64]pageRow{}
	for _, r := range f.Rows {
		rows[uint64(r.Entry)] = r
	}
	generated := 0
	for _, e := range ledger.Requests {
		generated += e.Generated
		if r, ok := rows[e.ID]; !ok || int(r.Total) != e.Tokens.Total || (r.Why == "") != (e.Reason == "") {
			t.Errorf("entry %d of the ledger: %+v, on the page %+v (%v)", e.ID, e, r, ok)
		}
	}
	same("generated", f.Generated, float64(generated))

	// A request's time line can be opened with the keyboard.
	opened, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`document.querySelector("#requests button.open").focus() || true`))
	if err != nil || !opened {
		t.Fatal(err)
	}
	page.do(chromedp.KeyEvent("\r"))
	settles(t, func() error {
		text, err := chromedp.Run(ctx, chromedp.Evaluate[string](`(document.querySelector("#requests .detail") || {}).textContent || ""`))
		if err == nil && !(strings.Contains(text, "answer ") && strings.Contains(text, "Fingerprint")) {
			err = fmt.Errorf("the request that was opened shows %q", text)
		}
		return err
	})
	page.picture("opened")

	// Every control has a name, and every chart has a text and a table beside it.
	bare, err := chromedp.Run(ctx, chromedp.Evaluate[[]string](`[
		...[...document.querySelectorAll("button, a, input")].filter(e => !(e.textContent.trim() || e.getAttribute("aria-label"))).map(e => e.outerHTML),
		...[...document.querySelectorAll("canvas")].filter(e => !e.closest("[role=img][aria-label]")).map(e => "a picture without text in " + e.parentElement.className),
		...[...document.querySelectorAll("section")].filter(e => !document.getElementById(e.getAttribute("aria-labelledby"))).map(e => "a section without a heading"),
		...[...document.querySelectorAll("section canvas")].filter(e => !e.closest("section").querySelector("details table")).map(() => "a picture without a table"),
		...["main", "header", "footer", "[role=status]", "h1"].filter(s => !document.querySelector(s)),
	]`))
	if err != nil || len(bare) > 0 {
		t.Errorf("%v: %q", err, bare)
	}

	// Nothing is wider than a phone; and dark mode is dark.
	page.do(prefers("prefers-color-scheme", "dark"), chromedp.EmulateViewport(390, 844))
	settles(t, func() error { // the drawings get their new width a moment later
		paper, err := chromedp.Run(ctx, chromedp.Evaluate[string](`getComputedStyle(document.body).backgroundColor`))
		if f = page.read(); err != nil || f.Overflow || paper != "rgb(18, 20, 22)" {
			return fmt.Errorf("on a phone in the dark: %v, wider than the window: %v, paper %s", err, f.Overflow, paper)
		}
		return nil
	})
	page.picture("phone")
	page.do(chromedp.EmulateViewport(1200, 900))
	page.picture("dark")
	page.do(prefers("prefers-color-scheme", "light"))

	// A paused page does not change, even if something is chosen on it.
	page.press("Pause")
	for i := range 4 {
		ask(words(1, 50), "hello", 8, fmt.Sprintf(`,"num_ctx":%d`, 2048+512*(i%2)))
	}
	ended := time.Now().UnixMilli()
	settles(t, func() error {
		at, err := chromedp.Run(ctx, chromedp.Evaluate[int64](`Number(document.documentElement.dataset.at)`))
		if err == nil && at < ended {
			err = fmt.Errorf("the page was told nothing since %d: %d", ended, at)
		}
		return err
	})
	page.press("1 h")
	settles(t, func() error {
		drawn, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`[...document.querySelectorAll("button")].some(b => b.textContent === "1 h" && b.ariaPressed === "true")`))
		if err == nil && !drawn {
			err = errors.New("an hour was chosen, and is not shown")
		}
		return err
	})
	if f = page.read(); f.Requests != 80 || f.Live != "paused" {
		t.Errorf("paused: %+v", f)
	}
	page.press("Go on")

	// Clients that disagree on num_ctx are reported.
	page.until("that clients disagree on num_ctx", func(f pageFigures) bool { return strings.Join(f.Problems, " ") == "reloaded" })

	// The buttons. Harmful ones ask for confirmation.
	page.until("the model", func(f pageFigures) bool { return f.Memory > 0 })
	page.press("Hold " + tiny + ":latest for 24 hours")
	page.until("who holds the model", func(pageFigures) bool {
		text, err := chromedp.Run(ctx, chromedp.Evaluate[string](`(document.querySelector("#models tbody") || {}).textContent || ""`))
		return err == nil && strings.Contains(text, "a client for 24h")
	})
	page.pressTwice("Unload " + tiny + ":latest")
	page.until("that no model is loaded", func(f pageFigures) bool { return f.Memory == -1 })
	if _, _, text := get(t, server.URL()+"/api/ps"); text != `{"models":[]}` {
		t.Errorf("Ollama has loaded %s", text)
	}
	page.pressTwice("Drain upstream")
	page.until("that the server drains", func(f pageFigures) bool { return strings.Contains(strings.Join(f.Problems, " "), "draining") })
	page.press("Resume upstream")
	page.until("that it does not", func(f pageFigures) bool { return !strings.Contains(strings.Join(f.Problems, " "), "draining") })

	// The page asks for an API key if it needs one, once.
	page.do(chromedp.Navigate(gated.URL+"/_cacheproxy/"), chromedp.WaitVisible("#key"))
	page.do(chromedp.SendKeys("#key", "wrong\r"))
	settles(t, func() error {
		text, err := chromedp.Run(ctx, chromedp.Evaluate[string](`(document.querySelector("[role=alert]") || {}).textContent || ""`))
		if err == nil && !strings.Contains(text, "does not know this key") {
			err = fmt.Errorf("a wrong key: %q", text)
		}
		return err
	})
	page.do(chromedp.SetValue("#key", key), chromedp.SendKeys("#key", "\r"))
	page.until("that it is live", func(f pageFigures) bool { return f.Live == "live" })
	buttons, err := chromedp.Run(ctx, chromedp.Evaluate[int](`document.querySelectorAll("#upstreams button, #models button").length`))
	if err != nil || buttons != 0 {
		t.Errorf("a key that may change nothing is offered %d buttons (%v)", buttons, err)
	}
	page.do(chromedp.Reload())
	page.until("that it is live again", func(f pageFigures) bool { return f.Live == "live" })

	// An Ollama that is gone.
	page.do(chromedp.Navigate(p.URL + "/_cacheproxy/"))
	server.Kill()
	get(t, p.URL+"/api/version") // this request finds that out before the next poll
	page.until("that Ollama is away", func(f pageFigures) bool { return len(f.Problems) > 0 && f.Problems[0] == "away" })
	page.picture("failing")

	// The proxy stops without waiting for an open page, and the page says that the proxy is gone.
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if text := p.Log(); strings.Contains(text, "drain limit") || !strings.Contains(text, `"stopped"`) {
		t.Errorf("the proxy has waited for the page:\n%s", tail(text, 10))
	}
	page.until("that the proxy is gone", func(f pageFigures) bool { return f.Live == "not connected" && f.Problems[0] == "link" })
	for _, c := range complaints() {
		// The browser logs each request that was refused or failed.
		if !strings.Contains(c, "401 (Unauthorized)") && !strings.Contains(c, "ERR_CONNECTION_REFUSED") && !strings.Contains(c, "ERR_INCOMPLETE_CHUNKED_ENCODING") {
			t.Error(c)
		}
	}
}
