package proxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// factsOf reads the page.
func factsOf(t *testing.T, rg *rig, query string, headers ...string) (f doctor.Facts, text string) {
	t.Helper()
	res, text := rg.do(http.MethodGet, pathFacts+query, "", headers...)
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%d %v: %s", res.StatusCode, err, text)
	}
	rg.ended()
	return f, text
}

// TestFacts: the page shows who asked for what and the cost of that, but no prompts, addresses or
// keys.
func TestFacts(t *testing.T) {
	f := warmFake(t)
	rg := newRig(t, f.URL, &Handler{Guard: withKeys(t, "alice "+theKey)})
	system := prose(3000)
	post := func(extra, agent string) {
		t.Helper()
		res, text := rg.post("/api/chat", chatWith(system, "Who?", extra), bearer(theKey), "User-Agent: "+agent)
		if res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, text)
		}
		f.next()
		rg.ended()
	}
	for i := range 6 {
		if i%2 == 0 {
			post("", "ollama-python/0.6.1 (x86_64 linux)")
		} else {
			post(`,"options":{"num_ctx":8192},"keep_alive":"5m"`, "Ünïcode/1")
		}
	}
	facts, text := factsOf(t, rg, "", bearer(theKey))
	if facts.Requests != 6 || len(facts.Models) != 1 || len(facts.Upstreams) != 1 || facts.Settings.KeepAlivePolicy != "if-absent" {
		t.Fatalf("%s", text)
	}
	m := facts.Models[0]
	if len(m.Askers) != 2 || len(m.Loads) != 2 || m.Loads[0].Cause != doctor.CauseNumCtx || m.Loads[0].Count != 5 || m.Loads[0].Tokens == 0 {
		t.Errorf("%+v", m)
	}
	for _, a := range m.Askers {
		want := map[int]string{0: "ollama-python/0.6.1", 8192: ""}[a.NumCtx]
		own := a.OwnKeepAlive != nil && *a.OwnKeepAlive == 300
		if a.Name != "alice" || a.Agent != want || a.Requests != 3 || a.Endpoint != "/api/chat" || len(a.Client) != 16 || own != (a.NumCtx > 0) {
			t.Errorf("%+v", a)
		}
	}
	for _, secret := range []string{"Who?", system[:20], "127.0.0.1\"", theKey} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is told: %s", secret, text)
		}
	}

	if facts, _ = factsOf(t, rg, "?last=1ns", bearer(theKey)); facts.Requests != 0 {
		t.Errorf("%d requests in the last nanosecond", facts.Requests)
	}
	for query, want := range map[string]int{"?last=soon": 400, "?last=-1h": 400} {
		if res, text := rg.do(http.MethodGet, pathFacts+query, "", bearer(theKey)); res.StatusCode != want {
			t.Errorf("%s: %d %s", query, res.StatusCode, text)
		}
	}
	if res, _ := rg.do(http.MethodGet, pathFacts, ""); res.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a key: %d", res.StatusCode)
	}
}

// TestOutsideFleet: what the proxy that owns a server does there is no sign of programs outside, also
// where this proxy owned it before, or does afterwards.
func TestOutsideFleet(t *testing.T) {
	type list struct {
		polled, expires, context int
		foreign                  bool // another proxy owns the server
	}
	for _, c := range []struct {
		name  string
		lists []list
		want  string
	}{
		{"owned here", []list{{10, 300, 4096, false}, {25, 320, 4096, false}, {40, 320, 8192, false}}, "options m:latest used m:latest"},
		{"owned elsewhere", []list{{10, 300, 4096, true}, {25, 320, 4096, true}, {40, 320, 8192, true}}, ""},
		{"… for a while", []list{{10, 300, 4096, false}, {25, 320, 8192, true}, {40, 340, 4096, false}}, ""},
		{"… and used past the proxies afterwards", []list{{10, 300, 4096, true}, {25, 320, 4096, false}, {40, 340, 4096, false}}, "used m:latest"},
	} {
		server := upstream.NewServer("up", &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, nil, nil)
		h := &Handler{Upstreams: []*upstream.Server{server}}
		h.Fleet = fleet.New(fleet.Config{Name: "here"})
		h.Init()
		b, began := h.backends()[0], time.Now()
		after := func(s int) time.Time { return began.Add(time.Duration(s) * time.Second) }
		run := b.runners.Begin(began, b.runners.Wanted(upstream.ModelKey("m"), "", &prefix.Options{}))
		use := b.residency.beginForeign(run, "m", false, &prefix.Options{})
		use.answer()
		use.end()
		run.End(began, runners.Outcome{Accepted: true})
		for _, l := range c.lists {
			b.foreign.Store(l.foreign)
			h.polledBooks(b, upstream.State{Up: true, Polled: after(l.polled), LoadedKnown: true, Loaded: []upstream.Loaded{
				{Name: "m:latest", ExpiresAt: after(l.expires), ContextLength: l.context},
			}})
		}
		var got []string
		for _, o := range h.recorder.Facts(time.Now(), time.Time{}).Outside {
			got = append(got, fmt.Sprint(o.Kind, " ", o.Model))
		}
		if slices.Sort(got); strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestOutside: which signs of programs outside the proxy a list of loaded models gives, and which
// it does not.
func TestOutside(t *testing.T) {
	started := time.Now()
	after := func(s int) time.Time { return started.Add(time.Duration(s) * time.Second) }
	type list struct {
		polled  int
		expires int // of model m; 0 if it is not loaded
		context int
	}
	for _, c := range []struct {
		name  string
		lists []list
		used  bool // m was used through the proxy, at the start
		want  string
		blind int // when an upload, sent at the start, ended; 0 if there was none
	}{
		{"nothing changes", []list{{10, 300, 4096}, {25, 300, 4096}}, true, "", 0},
		{"the clock is read in whole seconds", []list{{10, 300, 4096}, {25, 301, 4096}}, true, "", 0},
		{"its expiry moves", []list{{10, 300, 4096}, {25, 320, 4096}}, true, "used m:latest", 0},
		{"… by what came before the list", []list{{1, 300, 4096}, {25, 320, 4096}}, true, "", 0},
		{"… and it is loaded otherwise, which others tell of", []list{{10, 300, 4096}, {25, 320, 8192}}, true, "", 0},
		{"it was loaded before the proxy was started", []list{{10, 300, 4096}, {25, 300, 4096}}, false, "", 0},
		{"… and others go on to use it", []list{{10, 300, 4096}, {25, 320, 4096}}, false, "used m:latest", 0},
		{"it is loaded later", []list{{10, 0, 0}, {25, 320, 4096}, {40, 320, 4096}}, false, "loaded m:latest", 0},
		{"it is used through the proxy", []list{{10, 0, 0}, {25, 320, 4096}}, true, "", 0},
		{"an upload may have loaded it", []list{{10, 0, 0}, {25, 320, 4096}}, false, "", 20},
		{"… or used it, which is not over", []list{{10, 300, 4096}, {25, 320, 4096}}, true, "", -1},
		{"… but it ended long before", []list{{10, 0, 0}, {25, 320, 4096}}, false, "loaded m:latest", 5},
	} {
		server := upstream.NewServer("up", &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, nil, nil)
		h := &Handler{Upstreams: []*upstream.Server{server}}
		h.Init()
		b := h.backends()[0]
		if c.used {
			run := b.runners.Begin(started, b.runners.Wanted("m:latest", "", &prefix.Options{}))
			use := b.residency.beginForeign(run, "m", false, &prefix.Options{})
			use.answer()
			use.end()
		}
		if c.blind != 0 {
			ex := &exchange{Exchange: Exchange{Method: http.MethodPost}}
			h.recorder.sent(b, ex)
			if ex.up = b; c.blind > 0 {
				h.record(nil, ex)
			}
			h.recorder.blind[b.index] = blind{h.recorder.blind[b.index].inFlight, after(c.blind)}
		}
		for _, l := range c.lists {
			loaded := map[string]upstream.Loaded{}
			if l.expires > 0 {
				loaded["m:latest"] = upstream.Loaded{Name: "m:latest", Digest: "m:latest", ExpiresAt: after(l.expires), ContextLength: l.context}
			}
			h.recorder.listed(b, loaded, after(l.polled))
		}
		got := ""
		for _, o := range h.recorder.Facts(time.Now(), time.Time{}).Outside {
			got += fmt.Sprint(o.Kind, " ", o.Model)
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
