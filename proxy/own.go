package proxy

import (
	"cmp"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
)

// own serves the proxy's own pages; false where the request is for the upstream.
func (h *Handler) own(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	switch path := r.URL.Path; {
	case path == PathMetrics && h.Metrics != nil:
		ex.Endpoint, ex.Outcome, ex.Status = PathMetrics, Own, http.StatusOK
		h.Metrics.ServeHTTP(w, r)
		return true
	case path == pathHealth:
		ex.page(w, pathHealth, http.StatusOK, map[string]any{"status": "ok"})
		return true
	case path == pathReady:
		st := h.Upstream.State()
		status, page := http.StatusOK, map[string]any{"status": "ready", "upstream": h.Upstream.Name, "version": st.Version}
		if !st.Up {
			status, page["status"] = http.StatusServiceUnavailable, "the upstream does not answer"
		}
		ex.page(w, pathReady, status, page)
		return true
	case path == pathRequests && h.Ledger != nil:
		n, err := strconv.Atoi(cmp.Or(r.URL.Query().Get("n"), strconv.Itoa(shownRequests)))
		if err != nil || n < 0 {
			ex.Endpoint = pathRequests
			h.refuse(w, r, ex, &refusal{http.StatusBadRequest, "n: want how many requests to show, such as " + pathRequests + "?n=20"})
			return true
		}
		ex.page(w, pathRequests, http.StatusOK, h.requests(n))
		return true
	case strings.HasPrefix(path, ownPrefix):
		ex.Endpoint = ownPrefix
		h.refuse(w, r, ex, &refusal{http.StatusNotFound, "ollama-cacheproxy has no page " + path})
		return true
	}
	return false
}

// page writes one of the proxy's own pages as JSON.
func (ex *exchange) page(w http.ResponseWriter, endpoint string, status int, content any) {
	ex.Endpoint, ex.Outcome, ex.Status = endpoint, Own, status
	setCORS(w.Header(), ex.origin)
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(content) // a client that is gone has nobody to tell
}
