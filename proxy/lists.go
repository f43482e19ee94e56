package proxy

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const (
	listTimeout = 2 * time.Second // an upstream that takes longer is left out of a merged list
	listMost    = 64 << 20        // bytes of one upstream's list
)

// listed is an entry of a list, with the fields that the proxy needs.
type listed struct {
	raw json.RawMessage

	Name     string  `json:"name"`        // /api/tags, /api/ps
	ID       string  `json:"id"`          // /v1/models
	Modified instant `json:"modified_at"` // /api/tags
	Expires  instant `json:"expires_at"`  // /api/ps
	Created  instant `json:"created"`     // /v1/models
}

// instant is a time, given as text or in seconds; anything else is the zero time.
type instant struct{ time.Time }

func (i *instant) UnmarshalJSON(text []byte) error {
	var seconds float64
	if json.Unmarshal(text, &i.Time) != nil && json.Unmarshal(text, &seconds) == nil {
		i.Time = time.Unix(int64(seconds), 0)
	}
	return nil
}

// newer orders entries as Ollama does: last modified first, or last to expire first.
func newer(a, b listed) int {
	return cmp.Or(b.Modified.Compare(a.Modified.Time), b.Expires.Compare(a.Expires.Time), b.Created.Compare(a.Created.Time))
}

// merge answers requests for lists of models if there are several upstreams: with the union of
// their lists, by name. Upstreams that do not answer within listTimeout are left out. If it returns
// false, the request has to be forwarded.
func (h *Handler) merge(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	if ex.merged == "" || ex.only != nil || ex.away != "" {
		return false
	}
	all, peers := h.backends(), h.others(ex, "")
	if len(all)+len(peers) <= 1 {
		return false
	}
	lists, names := h.gather(r, ex, all, peers)
	if names == nil {
		return false // the upstream that gets the request reports what is wrong
	}
	content := map[string]any{ex.merged: union(lists)}
	if ex.merged == "data" {
		content["object"] = "list"
	}
	text := marshal(content)
	ex.Status, ex.Outcome, ex.BytesOut = http.StatusOK, OK, int64(len(text))
	setCORS(w.Header(), ex.origin)
	w.Header().Set(headerUpstream, strings.Join(names, ", "))
	ex.timing(w.Header())
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	if _, err := w.Write(text); err != nil {
		ex.Outcome = ClientGone
	}
	return true
}

// gather gets the lists of these servers and of the peers' servers, all at once. It returns the
// names of those that have answered, too.
func (h *Handler) gather(
	r *http.Request, ex *exchange, all []*backend, peers []fleet.Place,
) (lists [][]listed, names []string) {
	ctx, cancel := context.WithTimeout(r.Context(), listTimeout)
	defer cancel()
	lists = make([][]listed, len(all)+len(peers))
	var wg sync.WaitGroup
	for i, b := range all {
		if b.answers() {
			wg.Go(func() {
				var err error
				if lists[i], err = h.list(ctx, r, ex, b); err != nil {
					h.Log.Debug("an upstream is left out of a list", "path", r.URL.Path, "upstream", b.Name, "err", err)
				}
			})
		}
	}
	for i, to := range peers {
		wg.Go(func() {
			var err error
			if lists[len(all)+i], err = h.peerList(ctx, r, ex, to); err != nil {
				h.Log.Debug("a peer is left out of a list", "path", r.URL.Path, "peer", to.Name, "err", err)
			}
		})
	}
	wg.Wait()
	if r.Context().Err() != nil {
		ex.Outcome = ClientGone
		panic(http.ErrAbortHandler)
	}
	for i, list := range lists {
		switch {
		case list == nil:
		case i < len(all):
			names = append(names, all[i].Name)
		default:
			names = append(names, peers[i-len(all)].Server)
		}
	}
	return lists, names
}

// union returns the entries of all lists in Ollama's order. Of entries with one name it keeps the
// newest.
func union(lists [][]listed) []json.RawMessage {
	var all []listed
	at := map[string]int{} // in all, by name
	for _, e := range slices.Concat(lists...) {
		key := cmp.Or(e.Name, e.ID)
		i, known := at[key]
		switch {
		case !known:
			at[key] = len(all)
			all = append(all, e)
		case newer(e, all[i]) < 0:
			all[i] = e
		}
	}
	slices.SortStableFunc(all, newer)
	entries := make([]json.RawMessage, 0, len(all))
	for _, e := range all {
		entries = append(entries, e.raw)
	}
	return entries
}

// list gets one upstream's list. Without an error, the list is not nil.
func (h *Handler) list(ctx context.Context, r *http.Request, ex *exchange, b *backend) ([]listed, error) {
	out, err := ex.listRequest(ctx, r, b.URL.JoinPath(r.URL.Path).String())
	if err != nil {
		return nil, err
	}
	out.Header.Set(upstream.InstanceHeader, b.Instance) // if the request comes back, this is a loop
	res, err := h.Transport.RoundTrip(out)
	if err != nil {
		return nil, err
	}
	return ex.readList(res)
}

// peerList gets the list of a peer's own upstreams.
func (h *Handler) peerList(
	ctx context.Context, r *http.Request, ex *exchange, to fleet.Place,
) ([]listed, error) {
	out, err := ex.listRequest(ctx, r, r.URL.Path)
	if err != nil {
		return nil, err
	}
	res, err := h.Fleet.Pass(out, to, h.about(r, ex), http.NoBody, 0)
	if err != nil {
		return nil, err
	}
	return ex.readList(res)
}

// listRequest is a client's request for a list, for one of those that are merged.
func (ex *exchange) listRequest(ctx context.Context, r *http.Request, url string) (*http.Request, error) {
	out, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	out.URL.RawQuery = r.URL.RawQuery
	out.Header = r.Header.Clone()
	ex.strip(out.Header)
	for _, name := range []string{"Accept-Encoding", "Connection", "Keep-Alive", "Te", "Trailer", "Transfer-Encoding", "Upgrade"} {
		out.Header.Del(name)
	}
	return out, nil
}

// readList reads the answer to a listRequest.
func (ex *exchange) readList(res *http.Response) ([]listed, error) {
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %s", res.Status)
	}
	var content map[string]json.RawMessage
	if err := json.NewDecoder(io.LimitReader(res.Body, listMost)).Decode(&content); err != nil {
		return nil, err
	}
	var raw []json.RawMessage
	if err := json.Unmarshal(content[ex.merged], &raw); err != nil {
		return nil, err
	}
	list := make([]listed, 0, len(raw))
	for _, text := range raw {
		e := listed{raw: text}
		if json.Unmarshal(text, &e) != nil || e.Name == "" && e.ID == "" {
			continue // not an entry of a model
		}
		list = append(list, e)
	}
	return list, nil
}
