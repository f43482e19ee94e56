package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strings"
)

// The paths of Handler.Batches.
const (
	pathFiles   = "/v1/files"
	pathBatches = "/v1/batches"
)

// ownerKey is under which a request's context has the client in whose name it is sent, as owner
// returns it.
type ownerKey struct{}

// owner returns a text that stands for the key and does not change while the key does not; "" for
// nil. It is kept on disk, so it is not the digest by which keys are compared.
func (p *keyHolder) owner() string {
	if p == nil {
		return ""
	}
	sum := sha256.Sum256(append([]byte("owner of batches\x00"), p.sum[:]...))
	return hex.EncodeToString(sum[:])
}

// Owner returns the client that sent a request to Handler.Batches: a text of its API key, or "" if
// keys are not required.
func Owner(r *http.Request) string {
	owner, _ := r.Context().Value(ownerKey{}).(string)
	return owner
}

// As returns a context for requests that are sent to the Handler within this process, in the name
// of a client that Owner returned: its key's share, class and limits apply to them.
func As(ctx context.Context, owner string) context.Context {
	return context.WithValue(ctx, ownerKey{}, owner)
}

// Knows reports whether a client that Owner returned may still send requests: its key is still
// accepted, or none is required.
func (g *Guard) Knows(owner string) bool {
	return g.Keys == nil || g.Keys.ofOwner(owner) != nil
}

// ofOwner returns the current holder of the key that owner stands for, or nil.
func (k *Keys) ofOwner(owner string) *keyHolder {
	if k == nil || owner == "" {
		return nil
	}
	for _, p := range *k.holders.Load() {
		if p.owner() == owner {
			return p
		}
	}
	return nil
}

// identify finds the owner of the key that a request shows, or in whose name it is sent.
func (h *Handler) identify(r *http.Request, ex *exchange) {
	if owner, within := r.Context().Value(ownerKey{}).(string); within {
		ex.holder = h.Guard.Keys.ofOwner(owner)
		return
	}
	ex.holder, ex.spent = h.Guard.key(r)
}

// batchPath returns the label of a path that belongs to Handler.Batches.
func batchPath(path string) (label string, ok bool) {
	for _, label := range []string{pathFiles, pathBatches} {
		if path == label || strings.HasPrefix(path, label+"/") {
			return label, true
		}
	}
	return "", false
}

// ours serves what is not Ollama's, and reports whether the request was for that.
func (h *Handler) ours(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	return h.batches(w, r, ex) || h.own(w, r, ex)
}

// batches serves a request for files and batches, and reports whether it was for one.
func (h *Handler) batches(w http.ResponseWriter, r *http.Request, ex *exchange) bool {
	label, ok := batchPath(r.URL.Path)
	if !ok || h.Batches == nil {
		return false
	}
	ex.Endpoint, ex.Outcome = label, Own
	ex.takes(r) // a body must make progress
	setCORS(w.Header(), ex.origin)
	counted := &countedWriter{ResponseWriter: w, ex: ex}
	h.Batches.ServeHTTP(counted, r.WithContext(As(r.Context(), ex.holder.owner())))
	if ex.Status == 0 {
		ex.Status = http.StatusOK
	}
	return true
}

// countedWriter notes the status and the bytes of an answer.
type countedWriter struct {
	http.ResponseWriter
	ex *exchange
}

func (w *countedWriter) WriteHeader(status int) {
	w.ex.Status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countedWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.ex.BytesOut += int64(n)
	return n, err
}

// Unwrap is for http.ResponseController.
func (w *countedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
