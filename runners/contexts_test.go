package runners

import (
	"fmt"
	"testing"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// TestContexts: the loaded length is known from requests and from /api/ps, and the default once it
// has been seen.
func TestContexts(t *testing.T) {
	d := newDesk(t)
	none, small, large := &prefix.Options{}, stating(t, "num_ctx", "2048"), stating(t, "num_ctx", "8192")
	want := func(when string, c Contexts) {
		t.Helper()
		if got := d.Contexts(upstream.ModelKey("a"), "", nil); got != c {
			t.Errorf("%s: %+v, want %+v", when, got, c)
		}
	}
	listed := func(context int) {
		d.now = d.now.Add(time.Second)
		var list []upstream.Loaded
		if context > 0 {
			list = []upstream.Loaded{{Name: "a", ContextLength: context}}
		}
		d.Listed(list, d.now)
		d.now = d.now.Add(time.Second)
	}
	load := func(o *prefix.Options) { d.took(d.begin("a", o), 2*time.Second, time.Second) }

	want("at first", Contexts{})
	r := d.begin("a", large)
	want("while it is loaded", Contexts{Loaded: 8192})
	r.End(d.now, Outcome{Refused: true})
	want("after a refusal", Contexts{})
	load(small)
	want("after a load", Contexts{Loaded: 2048, Largest: 2048})
	load(none)
	want("by a default that is not known", Contexts{ByDefault: true, Largest: 2048})
	listed(4096)
	want("by default", Contexts{Loaded: 4096, ByDefault: true, Default: 4096, Largest: 2048})
	load(large)
	want("a larger one", Contexts{Loaded: 8192, Default: 4096, Largest: 8192})
	listed(6000) // the model was made for no more
	want("less than was asked for", Contexts{Loaded: 8192, Default: 4096, Largest: 8192})
	r = d.begin("a", none)
	want("beside one that states none", Contexts{Loaded: 8192, Default: 4096, Largest: 8192})
	d.took(r, 2*time.Second, time.Second)
	listed(0)
	want("unloaded", Contexts{Default: 4096, Largest: 8192})
	listed(1024)
	want("loaded by somebody else", Contexts{Loaded: 1024, Default: 4096, Largest: 8192})
	d.Restarted()
	want("after a restart", Contexts{Largest: 8192})
}

// TestContextsNotSeenYet: a list of /api/ps from before a request does not show what that request,
// which states no length, got.
func TestContextsNotSeenYet(t *testing.T) {
	d := newDesk(t)
	var list []upstream.Loaded
	want := func(when string, c Contexts) {
		t.Helper()
		if got := d.Contexts(upstream.ModelKey("a"), "", list); got != c {
			t.Errorf("%s: %+v, want %+v", when, got, c)
		}
	}
	listed := func(context int) {
		d.now = d.now.Add(time.Second)
		list = []upstream.Loaded{{Name: "b", ContextLength: 7}, {Name: "a", ContextLength: context}}
		d.Listed(list, d.now)
		d.now = d.now.Add(time.Second)
	}
	listed(8192)
	want("before anybody used it through the proxy", Contexts{Loaded: 8192})
	d.begin("a", &prefix.Options{}).End(d.now, Outcome{Refused: true})
	listed(32768)
	want("loaded by somebody else", Contexts{Loaded: 32768})
	d.took(d.begin("a", &prefix.Options{}), 2*time.Second, 0) // /v1 does not report the load
	want("before it is seen", Contexts{ByDefault: true})
	listed(4096)
	want("when it is seen", Contexts{Loaded: 4096})
	d.took(d.begin("a", &prefix.Options{}), 2*time.Second, 0)
	listed(4096)
	want("when it is seen to be the default", Contexts{Loaded: 4096, ByDefault: true, Default: 4096})
}

// TestContextsOfCopies: if a copy of a model states a context in its Modelfile, that is not the
// model's own default.
func TestContextsOfCopies(t *testing.T) {
	d := newDesk(t)
	d.Book = New(&shelf{models: map[string]*api.ShowResponse{
		"a":    {Modelfile: fmt.Sprintf(modelfile, "1")},
		"from": {Modelfile: fmt.Sprintf(modelfile, "1"), Parameters: "num_ctx 8192"},
	}}, nil)
	want := func(when string, name string, c Contexts) {
		t.Helper()
		if got := d.Contexts(name, name+"1", nil); got != c {
			t.Errorf("%s, %s: %+v, want %+v", when, name, got, c)
		}
	}
	r := d.Begin(d.now, d.Wanted("a", "a1", &prefix.Options{}))
	want("being loaded", "a", Contexts{ByDefault: true})
	want("being loaded", "from", Contexts{Default: 8192})
	d.took(r, 2*time.Second, time.Second)
	d.now = d.now.Add(time.Second)
	d.Listed([]upstream.Loaded{{Name: "a", Digest: "a1", ContextLength: 4096}}, d.now)
	want("by default", "a", Contexts{Loaded: 4096, ByDefault: true, Default: 4096})
	want("by default", "from", Contexts{Loaded: 4096, Default: 8192})
}
