package integration

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// keptFigures are what the page shows about answers that were not computed.
type keptFigures struct {
	Hits, Joined, Computed, Prompt, Generated, Seconds float64
	Entries, Bytes                                     float64
	Total                                              float64 // generated tokens in the page's head
	Marks                                              []string
	Opened                                             string // the text of the request that is open
	Overflow                                           bool
}

const readKept = `(() => {
	const cell = i => { const e = document.querySelector("#answers tr[data-kind=answer] td:nth-of-type(" + i + ") data"); return e ? Number(e.value) : -1; };
	const store = [...document.querySelectorAll("#answers-store data")].map(e => Number(e.value));
	return {
		Hits: cell(1), Joined: cell(3), Computed: cell(4), Prompt: cell(7), Generated: cell(8), Seconds: cell(9),
		Entries: store.length ? store[0] : -1, Bytes: store.length > 1 ? store[1] : -1,
		Total: Number(document.querySelector("#f-generated data").value),
		Marks: [...document.querySelectorAll("#requests tr.row .mark")].map(e => e.textContent),
		Opened: (document.querySelector("#requests .detail") || {}).textContent || "",
		Overflow: document.documentElement.scrollWidth > innerWidth,
	};
})()`

// TestPageAnswers: the page shows what was not computed apart from what was, with the figures of
// /metrics, in a real browser and before a real Ollama. With PAGE_DIR set, a screenshot is saved
// there.
func TestPageAnswers(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{tiny}})
	browser, err := findBrowser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := startProxy(t, server.URL(), "--cache-answers", "deterministic")
	ctx, complaints := newTab(t, browser, func(u *url.URL) bool { return u.Host == strings.TrimPrefix(p.URL, "http://") })
	page := livePage{t, ctx}
	page.do(chromedp.Navigate(p.URL + "/_cacheproxy/"))
	page.until("that it is live", func(f pageFigures) bool { return f.Live == "live" })

	ask := func(text, more string) {
		status, _, answer := post(t, p.URL+"/api/chat", fmt.Sprintf(
			`{"model":%q,"messages":[{"role":"user","content":%q}],"options":{"num_predict":24%s}}`, tiny, text, more))
		if status != 200 {
			t.Errorf("%d %s", status, answer)
		}
	}
	hits := func() float64 { return metric(t, p, `answers_requests_total{kind="answer",result="hit"}`) }
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() { ask(words(0, 60), `,"temperature":0`) })
	}
	work.Wait()
	for i := range 3 {
		ask(words(uint64(i), 60), `,"temperature":0`)
		settles(t, func() error { // an answer is kept a moment after its end
			if n := metric(t, p, `answers_entries`); n != float64(i+1) {
				return fmt.Errorf("%v answers are kept, want %d", n, i+1)
			}
			return nil
		})
	}
	const asked = `ollama_cacheproxy_answers_requests_total{kind="answer"`
	p.counts(t, asked, 4+3)
	before := hits()
	for i := range 12 {
		ask(words(uint64(i%3), 60), `,"temperature":0`)
	}
	ask(words(9, 60), "") // not deterministic
	p.counts(t, `ollama_cacheproxy_requests_total{endpoint="/api/chat"`, 4+3+12+1)
	p.counts(t, `ollama_cacheproxy_answers_requests_total{kind="answer",result="hit"}`, before+12)

	look := func() (f keptFigures) {
		f, err := chromedp.Run(ctx, chromedp.Evaluate[keptFigures](readKept))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	var got, want keptFigures
	settles(t, func() error { // the last request's other figures are counted just after it
		want = keptFigures{
			Hits:      metric(t, p, `answers_parts_total{kind="answer",result="hit"}`),
			Joined:    metric(t, p, `answers_parts_total{kind="answer",result="joined"}`),
			Computed:  metric(t, p, `answers_parts_total{kind="answer",result="miss"}`),
			Prompt:    metric(t, p, `answers_spared_prompt_tokens_total{kind="answer"}`),
			Generated: metric(t, p, `answers_spared_generated_tokens_total{kind="answer"}`),
			Seconds:   metric(t, p, `answers_spared_seconds_total{kind="answer"}`),
			Entries:   metric(t, p, `answers_entries`), Bytes: metric(t, p, `answers_bytes`),
			Total: metric(t, p, fmt.Sprintf(`generated_tokens_total{model="%s:latest"}`, tiny)),
		}
		got = look()
		bare := got
		bare.Marks, bare.Opened = nil, ""
		if fmt.Sprint(bare) != fmt.Sprint(want) {
			return fmt.Errorf("the page shows %+v, and /metrics %+v", bare, want)
		}
		return nil
	})
	if want.Hits < 12 || want.Generated <= want.Total || want.Seconds <= 0 || want.Computed != 3 {
		t.Errorf("%+v", want)
	}
	if n := float64(strings.Count(strings.Join(got.Marks, " "), "kept")); n != want.Hits {
		t.Errorf("%v requests are marked as kept, want %v: %q", n, want.Hits, got.Marks)
	}

	page.press("Kept")
	settles(t, func() error {
		_, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`document.querySelector("#requests tr.row:not(.open) button.open")?.click() || true`))
		if err != nil {
			return err
		}
		if text := look().Opened; !strings.Contains(text, "from the store") || !strings.Contains(text, "when it was computed") {
			return fmt.Errorf("the request that was opened shows %q", text)
		}
		return nil
	})
	page.press("All")
	page.picture("answers")
	page.do(chromedp.EmulateViewport(390, 844))
	settles(t, func() error { // the drawings get their new width a moment later
		if look().Overflow {
			return errors.New("the page is wider than a phone")
		}
		return nil
	})
	if list := complaints(); len(list) > 0 {
		t.Errorf("%q", list)
	}
}

// metric returns the value of one series of /metrics; 0 if it is not there.
func metric(t *testing.T, p *proxyProcess, series string) float64 {
	t.Helper()
	_, _, text := get(t, p.URL+"/metrics")
	m := regexp.MustCompile(`(?m)^ollama_cacheproxy_` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
