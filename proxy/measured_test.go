package proxy

import (
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// TestMeasured: the metrics of lanes name models, although lanes belong to weights, and draining
// upstreams are reported.
func TestMeasured(t *testing.T) {
	var listed atomic.Value
	listed.Store("")
	f := newFake(t, func(r received) string {
		switch {
		case strings.Contains(r.line, "/api/show"):
			return answer(200, "application/json", `{"modelfile":"FROM /blobs/sha256-0123\n"}`)
		case strings.Contains(r.line, "/api/version"):
			return answer(200, "application/json", `{"version":"0.34.1"}`)
		case strings.Contains(r.line, "/api/tags"):
			return answer(200, "application/json", `{"models":[{"name":"m:latest","digest":"d"},{"name":"copy:latest","digest":"e"}]}`)
		case strings.Contains(r.line, "/api/ps"):
			return answer(200, "application/json", `{"models":[`+listed.Load().(string)+`]}`)
		}
		return answer(200, "application/json", `{"done":true,"prompt_eval_count":9,"eval_count":1}`)
	})
	rg := newRig(t, f.URL, &Handler{Lanes: schedule.NewScheduler(schedule.Config{Lanes: 1, Limit: 100})})
	up := rg.h.Upstreams[0]
	poll := func() { rg.h.Polled(up, up.Poll(t.Context())) }
	poll()
	names := func() (all []string) {
		for _, r := range rg.h.LaneStats().Runners {
			all = append(all, upstream.ModelKey(r.Runner.Options.Model))
		}
		return all
	}
	rg.post("/api/chat", chatWith(prose(500), "a", ""))
	rg.ended()
	if got := names(); len(got) != 1 || got[0] != upstream.ModelKey("m") {
		t.Errorf("a model that was asked for as m has lanes of %q", got)
	}
	// Another name of the same weights shares the lanes: the listed name is reported, whichever
	// name requests use.
	listed.Store(`{"name":"copy:latest","digest":"e","size":1}`)
	rg.post("/api/chat", strings.Replace(chatWith(prose(500), "b", ""), `"m"`, `"copy"`, 1))
	rg.ended()
	poll()
	rg.post("/api/chat", chatWith(prose(500), "c", ""))
	rg.ended()
	if got := names(); len(got) != 1 || got[0] != upstream.ModelKey("copy") {
		t.Errorf("a model that is listed as copy has lanes of %q", got)
	}

	if got := rg.h.Draining(); len(got) != 1 || got[up.Name] {
		t.Errorf("draining: %v", got)
	}
	rg.h.drain(rg.h.backends()[0], true)
	if got := rg.h.Draining(); !got[up.Name] {
		t.Errorf("draining: %v", got)
	}
}
