package proxy

import (
	"crypto/sha256"
	"errors"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// headerPriority says how urgent a request is: interactive, normal (as without it) or batch. It is for the proxy alone.
const headerPriority = "X-Cacheproxy-Priority"

// retryAfter is what a client that finds the queue full is told, in seconds.
const retryAfter = "5"

// wait waits until the request may be sent, if it takes a slot of a model: until a lane is granted. What only loads or
// unloads a model, embeddings, remote models and everything without a prompt never wait.
func (h *Handler) wait(r *http.Request, ex *exchange) *refusal {
	priority := priorityOf(r)
	if h.Lanes == nil || ex.chain == nil || len(ex.chain.Links) <= 2 || ex.use.unloads() {
		return nil
	}
	if st := h.Upstream.State(); !st.Polled.IsZero() && !st.Up {
		return nil // to wait for what does not answer, one after the other, would only take longer
	}
	began := time.Now()
	grant, err := h.Lanes.Acquire(r.Context(), schedule.Request{
		Runner: schedule.Runner{Upstream: h.ledgerUpstream.Load().Index, Options: ex.chain.Runner},
		Links:  ex.chain.Links, Client: h.clientOf(r), Priority: priority,
	})
	ex.Waited, ex.Priority = time.Since(began), priority.String()
	switch {
	case err == nil:
		ex.grant = grant
		return nil
	case errors.Is(err, schedule.ErrFull):
		ex.header.Set("Retry-After", retryAfter)
		return &refusal{http.StatusServiceUnavailable, "server busy, please try again.  maximum pending requests exceeded"} // Ollama's own words
	case errors.Is(err, schedule.ErrClosed):
		ex.header.Set("Retry-After", retryAfter)
		return &refusal{http.StatusServiceUnavailable, "ollama-cacheproxy is stopping; try again when it is back"}
	}
	return &refusal{http.StatusServiceUnavailable, "the request was given up while it waited: " + err.Error()} // the client has left
}

func priorityOf(r *http.Request) schedule.Priority {
	switch strings.ToLower(r.Header.Get(headerPriority)) {
	case "interactive":
		return schedule.Interactive
	case "batch":
		return schedule.Batch
	}
	return schedule.Normal
}

// clientOf says to whom the scheduler is to be fair: one who shows a key that was checked, else an address.
func (h *Handler) clientOf(r *http.Request) string {
	if h.Guard.Keys != nil {
		sum := sha256.Sum256([]byte(r.Header.Get("Authorization") + r.Header.Get("X-Api-Key"))) // nobody needs the key itself
		return string(sum[:])
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// free gives the lane back.
func (ex *exchange) free(a savings.Answer) {
	if ex.grant == nil {
		return
	}
	res := schedule.Result{Sent: ex.spend != nil && ex.Outcome != Unreachable, Answered: ex.Status >= 200 && ex.Status < 300 && ex.BytesOut > 0, Total: a.Total, Generated: a.Generated, Timed: a.TotalTime > 0}
	if ex.streams && ex.FirstByte > ex.sent {
		res.FirstByte = ex.FirstByte - ex.sent
	}
	if res.Timed {
		res.Prompt, res.Eval, res.Load = a.PromptEval, a.Eval, a.Load
	}
	if e := ex.Savings; e != nil {
		res.Queue, res.Loaded, res.LoadKnown = e.Queue, e.Loaded, true
		if e.Tokens != nil {
			res.Reused, res.ReusedKnown = e.Tokens.Reused, true
		}
	}
	ex.grant.Release(res)
}
