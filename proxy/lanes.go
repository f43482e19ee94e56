package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Request headers that are for the proxy alone.
const (
	headerPriority = "X-Cacheproxy-Priority" // how urgent a request is: interactive, normal (as without it) or batch
	headerUpstream = "X-Cacheproxy-Upstream" // the name of the upstream that is to answer it; in answers, of the one that did
)

// retryAfter is what a client that finds the queue full is told, in seconds.
const retryAfter = "5"

// busyWords are Ollama's own for a full queue.
const busyWords = "server busy, please try again.  maximum pending requests exceeded"

// only reads which upstream a request is meant for, if its client names one.
func (h *Handler) only(r *http.Request, ex *exchange) *refusal {
	name := r.Header.Get(headerUpstream)
	if name == "" || ex.stranger {
		return nil
	}
	if ex.only = h.named(name); ex.only != nil {
		return nil
	}
	var names []string
	for _, b := range h.backends {
		names = append(names, b.Name)
	}
	return &refusal{http.StatusBadRequest, fmt.Sprintf("%s: there is no upstream %q: want one of %s", headerUpstream, name, strings.Join(names, ", "))}
}

// wait chooses the server for the request, and waits until it may be sent if it takes a slot of a model: until a lane is
// granted. What only loads or unloads a model, embeddings, remote models and everything without a prompt never wait.
func (h *Handler) wait(r *http.Request, ex *exchange) *refusal {
	list := h.candidates(ex)
	if b := list[0]; len(list) == 1 {
		if b.looped.Load() {
			return loops(b)
		}
		if b.draining.Load() && ex.only == nil && !ex.unloads() {
			return &refusal{http.StatusServiceUnavailable, fmt.Sprintf("upstream %s is draining and gets no new requests; POST %s%s/resume ends that", b.Name, pathUpstreams, b.Name)}
		}
	}
	return h.acquire(r, ex, list)
}

// acquire is wait, once it is known which servers can serve the request.
func (h *Handler) acquire(r *http.Request, ex *exchange, list []*backend) *refusal {
	if h.Lanes == nil || !ex.unread && (ex.chain == nil || !ex.chain.HasPrompt()) || !list[0].answers() {
		// To wait for what does not answer, one after the other, would only take longer.
		ex.up = pick(list, ex.key)
		return nil
	}
	var upstreams []uint16
	for _, b := range list {
		upstreams = append(upstreams, b.index)
	}
	began, priority := time.Now(), priorityOf(r)
	lanes, request := h.Lanes, schedule.Request{Upstreams: upstreams, Client: clientOf(r, ex.client), Priority: priority, Arrived: ex.start}
	if ex.unread {
		// What it says of its model at first need not be the last word, and its body may take long to come: it holds
		// up nobody but its like.
		lanes = lanes.Aside()
	} else {
		request.Runner, request.Links = schedule.Runner{Upstream: upstreams[0], Options: h.runner(ex, list)}, ex.chain.Links
	}
	grant, err := lanes.Acquire(r.Context(), request)
	ex.Waited, ex.Priority = ex.Waited+time.Since(began), priority.String()
	switch {
	case err == nil:
		ex.grant, ex.up = grant, h.backends[grant.Upstream]
		return nil
	case errors.Is(err, schedule.ErrFull):
		return ex.busy()
	case errors.Is(err, schedule.ErrClosed):
		ex.header.Set("Retry-After", retryAfter)
		return &refusal{http.StatusServiceUnavailable, "ollama-cacheproxy is stopping; try again when it is back"}
	}
	return givenUp(err)
}

// givenUp refuses what was given up while it waited. Who sees it has stopped the proxy; mostly the client has left.
func givenUp(err error) *refusal {
	return &refusal{http.StatusServiceUnavailable, "the request was given up while it waited: " + err.Error()}
}

// full refuses a request that would find no place in the queue, whose body is too long to be read for that.
func (h *Handler) full(r *http.Request, ex *exchange) error {
	if h.Lanes == nil || ex.prompt == prefix.None || ex.embed || !h.Lanes.Full(priorityOf(r)) {
		return nil
	}
	return ex.busy()
}

func (ex *exchange) busy() *refusal {
	ex.header.Set("Retry-After", retryAfter)
	return &refusal{http.StatusServiceUnavailable, busyWords}
}

// runner returns what the request needs loaded, as the scheduler is to tell runners apart. Servers that
// have other weights under one name are told apart by that name, as if each model had but one.
func (h *Handler) runner(ex *exchange, list []*backend) prefix.Options {
	o := list[0].wanted(ex.key, &ex.chain.Runner).Options
	for _, b := range list[1:] {
		if b.wanted(ex.key, &ex.chain.Runner).Options != o {
			return ex.chain.Runner
		}
	}
	return o
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

// free gives the lane back.
func (ex *exchange) free(a savings.Answer) {
	if ex.grant == nil {
		return
	}
	res := schedule.Result{Sent: ex.began && ex.Outcome != Unreachable, Answered: ex.Status >= 200 && ex.Status < 300 && ex.BytesOut > 0, Total: a.Total, Generated: a.Generated, Timed: a.TotalTime > 0}
	if ex.streams && ex.FirstByte > ex.sent {
		res.FirstByte = ex.FirstByte - ex.sent
	}
	if res.Timed {
		res.Prompt, res.Eval, res.Load = a.PromptEval, a.Eval, a.Load
	}
	if e := ex.Savings; e != nil {
		res.Queue, res.Loaded, res.LoadKnown = e.Queue, e.Loaded, a.Load > 0 // /v1 does not tell
		if e.Tokens != nil {
			res.Reused, res.ReusedKnown = e.Tokens.Reused, true
		}
	}
	ex.grant.Release(res)
}
