package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/livepage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// The page for people. Its files contain no data, so they are served to anyone. The data comes from
// pathEvents, which requires an API key if keys are required at all.
const (
	pathPage   = ownPrefix
	pathEvents = ownPrefix + "events"
)

// pageFile returns the file of the page that a path names, if any.
func pageFile(path string) (name string, ok bool) {
	name, ok = strings.CutPrefix(path, pathPage)
	return name, ok && livepage.Has(name)
}

// viewer informs a page of its user's rights.
type viewer struct {
	Admin bool   `json:"admin"` // may drain, resume, hold and unload
	Name  string `json:"name,omitempty"`
}

// pages serves the page, its files and its data, and reports whether the request was for one of
// them.
func (h *Handler) pages(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	name, isFile := pageFile(r.URL.Path)
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	switch {
	case r.URL.Path+"/" == pathPage && reads:
		ex.Endpoint, ex.Outcome, ex.Status = pathPage, Own, http.StatusPermanentRedirect
		w.Header().Set("Location", "."+pathPage) // relative: it may be served below a path
		w.WriteHeader(ex.Status)
	case isFile && reads:
		ex.Endpoint, ex.Outcome, ex.Status = pathPage, Own, http.StatusOK
		livepage.ServeFile(w, r, name)
	case r.URL.Path == pathEvents && r.Method == http.MethodGet:
		h.events(w, r, ex)
	default:
		return false
	}
	return true
}

// events sends a page its data for as long as the page is open. Pages of other origins cannot read
// it: the answer has no CORS headers.
func (h *Handler) events(w http.ResponseWriter, r *http.Request, ex *exchange) {
	ex.Endpoint = pathEvents
	err := h.live.Open()
	if err == nil && r.Context().Value(scarceKey{}) != nil {
		h.live.Leave()
		err = livepage.ErrMany
	}
	if err != nil {
		w.Header().Set("Retry-After", retryAfter)
		h.refuse(w, r, ex, &refusal{http.StatusServiceUnavailable, fmt.Sprintf("%v; close some, or try again later", err)})
		return
	}
	ex.Outcome, ex.Status = Own, http.StatusOK
	h.inFlight.Add(-1) // a stop of the proxy need not wait for it
	defer h.inFlight.Add(1)
	admin := ex.admin()
	h.live.Serve(w, r, viewer{Admin: admin, Name: ex.Name}, func() bool {
		if ex.holder == nil {
			return true // no keys are required
		}
		// The rights in the current key file. A page whose rights have changed reconnects, and
		// learns its new ones.
		holder := h.Guard.Keys.holder(ex.holder.client())
		return holder != nil && holder.admin == admin
	})
	ex.start = time.Now() // how long somebody has watched says nothing about the proxy's speed
}

// ClosePages ends all open pages and refuses new ones, so that a stopping proxy need not wait for
// them.
func (h *Handler) ClosePages() { h.live.Close() }

// changeModel makes a server hold a model in memory, or unload it.
func (h *Handler) changeModel(w http.ResponseWriter, r *http.Request, ex *exchange, b *backend, verb string) {
	model, key := r.URL.Query().Get("model"), upstream.ModelKey(r.URL.Query().Get("model"))
	st := b.State()
	var hold Hold
	var err error
	if verb == verbHold {
		hold, err = parseHold(r.URL.Query().Get("for"))
		if err == nil && hold == (Hold{}) {
			err = errors.New("want for how long to hold it")
		}
	}
	switch {
	case err != nil:
		h.refuse(w, r, ex, &refusal{http.StatusBadRequest, fmt.Sprintf("for=%s: %v", r.URL.Query().Get("for"), err)})
		return
	case key == "" || !st.Has(key):
		h.refuse(w, r, ex, &refusal{http.StatusNotFound, fmt.Sprintf("upstream %s has no model %q", b.Name, model)})
		return
	}
	if verb == verbHold {
		err = h.hold(r.Context(), b, model, key, hold)
	} else {
		err = h.unload(r.Context(), b, model, key)
	}
	b.Changed()
	if err != nil {
		h.refuse(w, r, ex, &refusal{http.StatusBadGateway, fmt.Sprintf("%s: %v", verb, err)})
		return
	}
	h.recordChange(r, ex, b, key, hold.Duration)
	h.Log.Info("model "+verb, "upstream", b.Name, "model", model, "for", hold.JSON, "key_name", ex.Name)
	b.Refresh(r.Context())
	ex.page(w, pathUpstreams, http.StatusOK, h.upstream(b))
}

// hold sets how long a loaded model stays in memory, without changing how it is loaded.
func (h *Handler) hold(ctx context.Context, b *backend, model, key string, hold Hold) error {
	list, err := b.Loaded(ctx)
	if err != nil {
		return err
	}
	l, ok := b.loaded(list, key)
	if !ok {
		return errors.New("it is not loaded; a request to it loads it")
	}
	return b.residency.hold(ctx, b.runners.Weights(key), model, hold.Duration, l)
}

// hold keeps a model, which is listed as l, in memory for d after its last use, as an empty request
// of a client would.
func (r *residency) hold(ctx context.Context, weights, model string, d time.Duration, l upstream.Loaded) error {
	r.mu.Lock()
	m := r.get(weights)
	stated, embed := m.stated, m.embed
	r.mu.Unlock()
	if l.ContextLength > 0 {
		// Another program may have loaded it. A different context length, or none, would make
		// Ollama load it again.
		stated = stated.WithContext(l.ContextLength)
	}
	began := time.Now()
	if err := r.touch(ctx, model, d, embed, stated); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m = r.get(weights)
	m.longest, m.keptAt, m.keptFor, m.unloaded = d, began, d, false
	m.options = prefix.Options{}
	return nil
}

// unload makes a model leave memory as soon as no request uses it.
func (h *Handler) unload(ctx context.Context, b *backend, model, key string) error {
	if b.port != 0 {
		h.Contexts.Leave(ctx, b.port)
	}
	run := b.runners.Begin(time.Now(), b.wanted(key, nil))
	u, _, _ := b.residency.beginNative(run, model, false, nil, fields{model: model, keepAlive: keepAliveSet})
	defer u.end()
	b.Used()
	if err := b.residency.touch(ctx, model, 0, false, prefix.Options{}); err != nil {
		run.End(time.Now(), runners.Outcome{Refused: true})
		return err
	}
	u.answer()
	run.End(time.Now(), runners.Outcome{Accepted: true, Unload: true})
	return nil
}
