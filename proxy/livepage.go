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

// The page for people. Its files have no data in them, so that they are served to anyone; what it shows
// comes from pathEvents, which asks for an API key where keys are asked for.
const (
	pathPage   = ownPrefix
	pathEvents = ownPrefix + "events"
)

// pageFile returns which of the page's files a path means, if it is one.
func pageFile(path string) (name string, ok bool) {
	name, ok = strings.CutPrefix(path, pathPage)
	return name, ok && livepage.Has(name)
}

// viewer is what a page is told of who looks.
type viewer struct {
	Admin bool   `json:"admin"` // may drain, resume, hold and unload
	Name  string `json:"name,omitempty"`
}

// pages serves the page, its files and what it shows; false where the request is for something else.
func (h *Handler) pages(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	name, isFile := pageFile(r.URL.Path)
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	switch {
	case r.URL.Path+"/" == pathPage && reads:
		ex.Endpoint, ex.Outcome, ex.Status = pathPage, Own, http.StatusPermanentRedirect
		w.Header().Set("Location", "."+pathPage) // relative: a front may serve the proxy below a path
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

// events sends a page what it shows, for as long as it is open. Pages of other origins cannot read it:
// it has no CORS headers.
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
	h.inFlight.Add(-1) // nobody waits for its end
	defer h.inFlight.Add(1)
	admin := ex.admin()
	h.live.Serve(w, r, viewer{Admin: admin, Name: ex.Name}, func() bool {
		if ex.holder == nil {
			return true // none is asked for
		}
		// As the file of the keys says now. Whose right has changed comes again, and is told of it.
		holder := h.Guard.Keys.holder(ex.holder.client())
		return holder != nil && holder.admin == admin
	})
	ex.start = time.Now() // for how long somebody has looked is no measure of the proxy
}

// ClosePages ends the pages that are open, and refuses others: when the proxy stops, they are not to be
// waited for.
func (h *Handler) ClosePages() { h.live.Close() }

// changeModel has a server hold a model in memory, or unload it.
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

// hold sets for how long a model stays in memory that is loaded, as it is loaded.
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

// hold keeps a model, which is listed as l, for so long from its next end on, as a client does that asks
// for that.
func (r *residency) hold(ctx context.Context, weights, model string, d time.Duration, l upstream.Loaded) error {
	r.mu.Lock()
	m := r.get(weights)
	stated, embed := m.stated, m.embed
	r.mu.Unlock()
	if l.ContextLength > 0 {
		// Others may have loaded it. Another context length, and none at all, would load it anew.
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

// unload has a model leave memory as soon as nothing uses it.
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
