package proxy

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// own serves the proxy's own pages, and reports whether the request was for one.
func (h *Handler) own(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	switch path := r.URL.Path; {
	case h.pages(w, r, ex):
	case path == PathMetrics && h.Metrics != nil:
		ex.Endpoint, ex.Outcome, ex.Status = PathMetrics, Own, http.StatusOK
		h.Metrics.ServeHTTP(w, r)
	case !strings.HasPrefix(path, ownPrefix):
		return false
	case path == pathHealth:
		ex.page(w, pathHealth, http.StatusOK, map[string]any{"status": "ok"})
	case path == pathReady:
		h.ready(w, ex)
	case path+"/" == pathUpstreams:
		ex.page(w, pathUpstreams, http.StatusOK, map[string]any{"upstreams": h.upstreams()})
	case strings.HasPrefix(path, pathUpstreams):
		h.changeUpstream(w, r, ex)
	case strings.HasPrefix(path+"/", pathAnswers+"/"):
		h.answersPages(w, r, ex)
	case path == pathFleet && h.Fleet != nil:
		ex.page(w, pathFleet, http.StatusOK, h.fleetPage())
	case path == pathFacts:
		h.facts(w, r, ex)
	default:
		h.ownList(w, r, ex)
	}
	return true
}

// ownList serves the pages that list requests.
func (h *Handler) ownList(w http.ResponseWriter, r *http.Request, ex *exchange) {
	switch path := r.URL.Path; {
	case path == pathQueue:
		if limit, ok := h.shown(w, r, ex, pathQueue, "limit", shownQueue, queueMost); ok {
			ex.page(w, pathQueue, http.StatusOK, h.queue(limit))
		}
	case path == pathRequests && h.Ledger != nil:
		if n, ok := h.shown(w, r, ex, pathRequests, "n", shownRequests, math.MaxInt); ok {
			ex.page(w, pathRequests, http.StatusOK, h.requests(n))
		}
	default:
		ex.Endpoint = ownPrefix
		h.refuse(w, r, ex, &refusal{http.StatusNotFound, "ollama-cacheproxy has no page " + path})
	}
}

// ready serves pathReady. Anyone may see this page, but if API keys are required, names and
// versions are only for clients that show one.
func (h *Handler) ready(w http.ResponseWriter, ex *exchange) {
	versions := map[string]string{}
	status, page := http.StatusServiceUnavailable, map[string]any{"status": "no upstream answers"}
	if !ex.stranger {
		page["upstreams"] = versions
	}
	for _, b := range h.backends() {
		if st := b.State(); st.Up {
			versions[b.Name] = st.Version
			status, page["status"] = http.StatusOK, "ready"
		}
	}
	if h.Fleet != nil && h.Fleet.Takes() { // another proxy has one that answers
		status, page["status"] = http.StatusOK, "ready"
	}
	if h.leaving.Load() {
		status, page["status"] = http.StatusServiceUnavailable, "stopping"
	}
	ex.page(w, pathReady, status, page)
}

// Leave says that the proxy is about to stop: it is not ready any more, and each connection is
// closed after its next answer, so that clients make new ones, elsewhere. Requests are served as
// before, by this proxy, or by others of its fleet.
func (h *Handler) Leave() {
	h.leaving.Store(true)
	if h.Fleet != nil {
		h.Fleet.Drain()
	}
}

// Finish says that the proxy only finishes what it has: others of its fleet send nothing more, even
// if nobody else has the model; such requests wait there for the proxy to be back.
func (h *Handler) Finish() { h.finishing.Store(true) }

// Leaving reports whether Leave was called.
func (h *Handler) Leaving() bool { return h.leaving.Load() }

// The actions on an upstream.
const (
	verbDrain  = "drain"  // finish its requests and send it no new ones
	verbResume = "resume" // undo that
	verbHold   = "hold"   // keep a model in memory
	verbUnload = "unload" // remove it from memory
)

var verbs = []string{verbDrain, verbResume, verbHold, verbUnload}

// changeUpstream drains or resumes an upstream, or holds or unloads a model on it.
func (h *Handler) changeUpstream(w http.ResponseWriter, r *http.Request, ex *exchange) {
	ex.Endpoint = pathUpstreams
	name, verb, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, pathUpstreams), "/")
	b := h.named(name)
	order := verb == verbDrain || verb == verbResume
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead && ex.origin != "":
		// A page of another origin may read this path if it may read Ollama's answers, but it may
		// not change anything here.
		h.refuse(w, r, ex, &refusal{
			http.StatusForbidden,
			"this is not for web pages of another origin; send it without Origin",
		})
	case b == nil && !(order && h.Fleet != nil && h.Fleet.HasServer(name)):
		h.refuse(w, r, ex, noUpstream(name))
	case !slices.Contains(verbs, verb) || r.Method != http.MethodPost:
		h.refuse(w, r, ex, &refusal{
			http.StatusMethodNotAllowed,
			"want POST " + pathUpstreams + name + "/drain, …/resume, …/hold?model=M&for=24h " +
				"or …/unload?model=M",
		})
	case !ex.admin():
		h.refuse(w, r, ex, ex.notAdmin())
	case verb == verbHold || verb == verbUnload:
		h.changeModel(w, r, ex, b, verb)
	default:
		h.order(w, r, ex, b, name, verb == verbDrain)
	}
}

// order drains or resumes an upstream, at all proxies of a fleet. b is nil if only others have it.
func (h *Handler) order(
	w http.ResponseWriter, r *http.Request, ex *exchange, b *backend, name string, drain bool,
) {
	var unheard []string
	known := false
	if h.Fleet != nil {
		unheard, known = h.Fleet.Order(r.Context(), name, drain)
	}
	if b == nil && !known { // it has gone meanwhile
		h.refuse(w, r, ex, noUpstream(name))
		return
	}
	var e upstreamEntry
	if b == nil {
		e = upstreamEntry{
			Name: name, Draining: drain, InFlight: h.Fleet.InFlight(name),
			Models: []string{}, Loaded: []string{},
		}
	} else {
		if !known { // there is no fleet
			h.drain(b, drain)
		}
		e = h.upstream(b)
	}
	e.Unheard = unheard
	ex.page(w, pathUpstreams, http.StatusOK, e)
}

func noUpstream(name string) *refusal {
	return &refusal{http.StatusNotFound, fmt.Sprintf("there is no upstream %q; GET %s lists them",
		name, strings.TrimSuffix(pathUpstreams, "/"))}
}

// shown parses how many entries a page should have, and refuses anything but a valid number.
func (h *Handler) shown(
	w http.ResponseWriter, r *http.Request, ex *exchange, path, name string, unless, most int,
) (int, bool) {
	n, err := strconv.Atoi(cmp.Or(r.URL.Query().Get(name), strconv.Itoa(unless)))
	if err == nil && n >= 0 && n <= most {
		return n, true
	}
	bound := ""
	if most < math.MaxInt {
		bound = fmt.Sprintf(", up to %d", most)
	}
	ex.Endpoint = path
	h.refuse(w, r, ex, &refusal{
		http.StatusBadRequest,
		fmt.Sprintf(
			"%s: want how many requests to show%s, such as %s?%s=20",
			name,
			bound,
			path,
			name,
		),
	})
	return 0, false
}

// page writes one of the proxy's own pages as JSON.
func (ex *exchange) page(w http.ResponseWriter, endpoint string, status int, content any) {
	ex.Endpoint, ex.Outcome, ex.Status = endpoint, Own, status
	setCORS(w.Header(), ex.origin)
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(content) // an error means that the client is gone
}

// upstreamEntry is an upstream in the content of pathUpstreams.
type upstreamEntry struct {
	Name     string `json:"name"`
	URL      string `json:"url"`
	Up       bool   `json:"up"`
	Error    string `json:"error,omitempty"`
	Draining bool   `json:"draining"`
	// InFlight are requests that were sent to it and have not ended; while it is draining, by any
	// proxy of a fleet.
	InFlight int64 `json:"in_flight"`
	// Unheard are the proxies of a fleet that have not said that they drain it, too, or resume it.
	Unheard []string `json:"unheard,omitempty"`
	Version string   `json:"version,omitempty"`

	Simulated bool `json:"simulated,omitempty"` // answers and figures are made up

	Models []string `json:"models"` // all models that it has
	Loaded []string `json:"loaded"` // at the last poll that listed them
}

func (h *Handler) upstreams() []upstreamEntry {
	all := h.present()
	list := make([]upstreamEntry, 0, len(all))
	for _, b := range all {
		list = append(list, h.upstream(b))
	}
	return list
}

func (h *Handler) upstream(b *backend) upstreamEntry {
	st := b.State()
	e := upstreamEntry{
		Name:      b.Name,
		URL:       b.URL.String(),
		Up:        st.Up,
		Draining:  b.draining.Load() || b.leaving.Load(),
		InFlight:  b.inFlight.Load(),
		Version:   st.Version,
		Simulated: st.Simulated,
		Models:    []string{},
		Loaded:    []string{},
	}
	if st.Err != nil {
		e.Error = st.Err.Error()
	}
	if h.Fleet != nil && e.Draining {
		e.InFlight += h.Fleet.InFlight(b.Name)
	}
	e.Models = append(e.Models, st.Models...)
	for _, l := range st.Loaded {
		e.Loaded = append(e.Loaded, l.Name)
	}
	return e
}
