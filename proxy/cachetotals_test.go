package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// answersOf returns the content of pathAnswers.
func (lib *library) answersOf(method string, headers ...string) (page answersPage, status int, body string) {
	lib.t.Helper()
	a := lib.send(lib.t.Context(), method, pathAnswers, "", headers...)
	if a.status == http.StatusOK {
		if err := json.Unmarshal([]byte(a.body), &page); err != nil {
			lib.t.Errorf("%v: %s", err, a.body)
		}
	}
	return page, a.status, a.body
}

// TestAnswersCounted asks three times: the page's totals, the page of the answers and the log line
// tell what was not computed, and no figure of tokens counts it.
func TestAnswersCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		lib := newLibrary(t, func(h *Handler) {
			h.Log = slog.New(slog.NewTextHandler(&log, nil))
			h.AnswersBytes = 64 << 20
		})
		lib.ask("/api/chat", coldChat("a", ""))
		lib.computed()
		first := lib.h.timeline.counted()
		for range 2 {
			if got := lib.ask("/api/chat", coldChat("a", "")); !got.hit() {
				t.Errorf("not kept: %v", got.header)
			}
		}
		lib.ask("/api/chat", coldChat("b", ""), "Cache-Control: no-store")
		lib.computed()

		totals := lib.h.timeline.counted()
		c := totals.Cached[CacheText]
		if c.Requests[CacheHit] != 2 || c.Requests[CacheMiss] != 1 || c.Requests[CacheBypass] != 1 ||
			c.Hits != 2 || c.Misses != 1 || c.Generated != 2*8 || c.Prompt == 0 || c.Saved <= 0 || c.Bytes == 0 {
			t.Errorf("counted %+v", c)
		}
		if totals.Requests != 4 || totals.Generated != 2*first.Generated || first.Generated == 0 {
			t.Errorf("the hits count as computed: %+v, after the first request %+v", totals, first)
		}

		list, _ := lib.h.timeline.since(0)
		if len(list) != 4 || list[1].spared == nil || list[1].Cache != CacheHit || list[1].Kept != 1 ||
			list[1].spared.Saved <= 0 || list[1].told != nil || list[1].Upstream != "" {
			t.Errorf("the page's requests: %+v", list)
		}
		if text, err := json.Marshal(list[1]); err != nil || !strings.Contains(string(text), `"cache":"hit"`) {
			t.Errorf("%v %s", err, text)
		}

		var lines []string
		for line := range strings.Lines(log.String()) {
			if strings.Contains(line, "msg=request") && strings.Contains(line, "/api/chat") {
				lines = append(lines, line)
			}
		}
		if len(lines) != 4 || !strings.Contains(lines[0], " cache=miss") || !strings.Contains(lines[0], "upstream=sim") ||
			!strings.Contains(lines[1], " cache=hit saved_s=") || strings.Contains(lines[1], "upstream=") ||
			!strings.Contains(lines[3], " cache=bypass") {
			t.Errorf("the log: %q", lines)
		}

		page, _, body := lib.answersOf(http.MethodGet)
		if page.Store == nil || *page.Store.Entries != 1 || page.Store.Limit != 64<<20 || *page.Store.Bytes == 0 ||
			page.Kinds[CacheText].Hits != 2 || page.Modes != "deterministic" || page.Since.IsZero() || page.Wiped != nil {
			t.Errorf("%s", body)
		}
		page, status, body := lib.answersOf(http.MethodDelete)
		if status != http.StatusOK || page.Wiped == nil || *page.Wiped.Entries != 1 || *page.Store.Entries != 0 {
			t.Errorf("wiping: %d %s", status, body)
		}
		if got := lib.ask("/api/chat", coldChat("a", "")); got.hit() {
			t.Error("a wiped answer was given")
		}
		for _, c := range []struct {
			method, header string
			status         int
		}{
			{http.MethodDelete, "Origin: http://127.0.0.1", http.StatusForbidden},
			{http.MethodPost, "Accept: */*", http.StatusMethodNotAllowed},
		} {
			if _, status, body := lib.answersOf(c.method, c.header); status != c.status {
				t.Errorf("%s %s: %d %s", c.method, c.header, status, body)
			}
		}
	})
}

// TestAnswersPageRights: every key may look, an admin's alone may wipe; answers that go on without
// their clients are shown to these alone, and survive.
func TestAnswersPageRights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, func(h *Handler) {
			keys, err := ParseKeys("a ka\nops ko admin")
			if err != nil {
				t.Fatal(err)
			}
			h.Guard.Keys = keys
		})
		a, ops := "Authorization: Bearer ka", "Authorization: Bearer ko"
		if got := lib.ask("/api/chat", coldChat("x", ""), a, "Prefer: respond-async"); got.status != http.StatusAccepted {
			t.Fatalf("%d %s", got.status, got.body)
		}
		lib.computed()
		if _, status, _ := lib.answersOf(http.MethodGet); status != http.StatusUnauthorized {
			t.Errorf("without a key: %d", status)
		}
		if _, status, body := lib.answersOf(http.MethodDelete, a); status != http.StatusForbidden || !strings.Contains(body, "admin") {
			t.Errorf("wiping without the right: %d %s", status, body)
		}
		page, _, _ := lib.answersOf(http.MethodGet, a)
		if len(page.Kept) != 1 || *page.Store.Entries != 1 {
			t.Errorf("%+v", page)
		}
		if page, status, body := lib.answersOf(http.MethodDelete, ops); status != http.StatusOK || *page.Wiped.Entries != 1 || len(page.Kept) != 0 {
			t.Errorf("wiping: %d %s", status, body)
		}
		if n, bytes := lib.h.Surviving(); n != 1 || bytes == 0 {
			t.Errorf("%d answers with %d bytes survive", n, bytes)
		}
		time.Sleep(keptAge + time.Minute)
		if n, bytes := lib.h.Surviving(); n != 0 || bytes != 0 {
			t.Errorf("%d answers with %d bytes after their time", n, bytes)
		}
	})
}

// deadStore is a store that fails.
type deadStore struct{ answers.Store }

var errDead = errors.New("the store is gone")

func (deadStore) Get(_ context.Context, keys []answers.Key) ([]answers.Entry, error) {
	return make([]answers.Entry, len(keys)), errDead
}
func (deadStore) Put(context.Context, []answers.Entry) error { return errDead }
func (deadStore) Wipe(context.Context) error                 { return errDead }
func (deadStore) Stats() answers.Stats {
	return answers.Stats{Entries: -1, Bytes: -1, Errors: 7, Down: true}
}

// TestAnswersStoreDown: a store that fails costs a computation; the page says so, and what is not
// known is not shown as 0.
func TestAnswersStoreDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lib := newLibrary(t, func(h *Handler) { h.Answers = deadStore{h.Answers} })
		for range 2 {
			if got := lib.ask("/api/chat", coldChat("a", "")); got.status != 200 || lib.computed() != 1 {
				t.Errorf("%d %s", got.status, got.body)
			}
		}
		page, _, body := lib.answersOf(http.MethodGet)
		if page.Store == nil || page.Store.Entries != nil || page.Store.Bytes != nil || !page.Store.Down || page.Store.Errors != 7 {
			t.Errorf("%s", body)
		}
		if _, status, body := lib.answersOf(http.MethodDelete); status != http.StatusInternalServerError || !strings.Contains(body, "try again") {
			t.Errorf("wiping: %d %s", status, body)
		}
		found := false
		for _, part := range (overview{lib.h}).Parts() {
			if list, ok := part.Data.([]problem); ok {
				for _, p := range list {
					found = found || p.Kind == "answers"
				}
			}
		}
		if !found {
			t.Error("the page shows no problem")
		}
		if a := lib.send(t.Context(), http.MethodGet, pathFacts, ""); !strings.Contains(a.body, `"answers":{"down":true,"errors":7}`) {
			t.Errorf("the facts for doctor: %s", a.body)
		}
	})
}

// TestCacheUseAttrs: the log line says how many inputs of an embedding were not computed.
func TestCacheUseAttrs(t *testing.T) {
	for want, c := range map[string]*CacheUse{
		"[]": nil,
		"[cache=partial cache_parts=991/1000 saved_s=1.234]": {
			Kind: CacheVectors, Result: CachePartial, Hits: 990, Joined: 1, Misses: 9, Saved: 1234 * time.Millisecond,
		},
		"[cache=bypass]": {Kind: CacheVectors, Result: CacheBypass},
		"[cache=joined]": {Kind: CacheText, Result: CacheJoined, Joined: 1},
	} {
		var text []string
		for _, a := range c.attrs(nil) {
			text = append(text, a.String())
		}
		if got := "[" + strings.Join(text, " ") + "]"; got != want {
			t.Errorf("%+v: %s, want %s", c, got, want)
		}
	}
}

// TestParseCacheAnswers: the setting, how it is shown, and what a wrong one is told.
func TestParseCacheAnswers(t *testing.T) {
	for _, c := range []struct {
		settings []string
		want     string
	}{
		{nil, "off"},
		{[]string{"deterministic"}, "deterministic"},
		{[]string{"all", "llama3=off", "Qwen3:8B=deterministic"}, "all, llama3:latest=off, Qwen3:8B=deterministic"},
	} {
		got, err := ParseCacheAnswers(c.settings)
		if err != nil || !strings.EqualFold(got.String(), c.want) {
			t.Errorf("%q: %v, %v, want %s", c.settings, got, err, c.want)
		}
	}
	for setting, want := range map[string]string{
		"on":           "want off, deterministic or all",
		"llama3=maybe": "want off, deterministic or all",
		"a b=all":      "is not a model name",
	} {
		if _, err := ParseCacheAnswers([]string{setting}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", setting, err, want)
		}
	}
}

// TestEmbeddingsCounted: on the page, a request for vectors is one, however many of its inputs were
// sent to Ollama as requests of their own.
func TestEmbeddingsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newIdeal(t, nil, nil)
		d.ask("/api/embed", embedBody([]string{"a", "b", "c"}, ""))
		time.Sleep(time.Minute) // the model is tried meanwhile, and the vectors are kept
		before := d.h.timeline.counted()
		d.ask("/api/embed", embedBody([]string{"a", "b", "c", "d"}, ""))
		totals := d.h.timeline.counted()
		if n := totals.Requests - before.Requests; n != 1 || before.Requests != 1 {
			t.Errorf("%d requests were counted for one: %+v", n, totals)
		}
		c := totals.Cached[CacheVectors]
		if c.Hits != 3 || c.Misses != 4 || c.Requests[CachePartial] != 1 || c.Requests[CacheMiss] != 1 || c.Saved <= 0 {
			t.Errorf("counted %+v", c)
		}
		list, _ := d.h.timeline.since(0)
		last := list[len(list)-1]
		if last.spared == nil || last.Cache != CachePartial || last.Parts != 4 || last.Kept != 3 || len(list) != totals.Requests {
			t.Errorf("the page's requests: %+v", list)
		}
		if n := len(d.h.timeline.under()); n != 0 {
			t.Errorf("%d requests are under way still", n)
		}
	})
}
