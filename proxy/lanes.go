package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// Headers that only clients and the proxy use.
const (
	// The priority of a request: interactive, normal (the default) or batch.
	headerPriority = "X-Cacheproxy-Priority"
	// In answers: how many seconds the request waited in the proxy.
	headerWaited = "X-Cacheproxy-Waited"
	// In requests: the upstream that should answer; in answers: the one that did.
	headerUpstream = "X-Cacheproxy-Upstream"
)

// retryAfter is the Retry-After, in seconds, that a client gets if the queue is full.
const retryAfter = "5"

// busyWords is Ollama's own message for a full queue.
const busyWords = "server busy, please try again.  maximum pending requests exceeded"

// only reads which upstream a client names for its request, if any.
func (h *Handler) only(r *http.Request, ex *exchange) *refusal {
	name := r.Header.Get(headerUpstream)
	if name == "" || ex.stranger {
		return nil
	}
	if ex.only = h.named(name); ex.only != nil {
		return nil
	}
	if ex.away = h.awayServer(name); ex.away != "" {
		return nil
	}
	if ex.passed != nil { // the peer knows something else: it is to choose again
		ex.away = name
		return nil
	}
	var names []string
	for _, b := range h.backends() {
		names = append(names, b.Name)
	}
	if h.Fleet != nil {
		for _, o := range h.Fleet.Owners() {
			if !slices.Contains(names, o.Server) {
				names = append(names, o.Server)
			}
		}
	}
	return &refusal{http.StatusBadRequest, fmt.Sprintf("%s: there is no upstream %q: want one of %s", headerUpstream, name, strings.Join(names, ", "))}
}

// wait chooses the server for the request, and waits until it may be sent. A request that takes a
// slot of a model waits for a lane. Requests that only load or unload a model, embeddings, remote
// models and everything without a prompt never wait.
func (h *Handler) wait(r *http.Request, ex *exchange) *refusal {
	list := h.candidates(ex)
	if len(list) == 0 {
		ex.header.Set("Retry-After", retryAfter)
		return &refusal{http.StatusServiceUnavailable, "no Ollama server has been found yet; try again soon, and look into ollama-cacheproxy's log whether what --upstream names can be looked up"}
	}
	if len(list) == 1 && list[0].looped.Load() {
		return loops(list[0])
	}
	if drains(list) && ex.only == nil && !ex.unloads() {
		if h.mayLeave(ex) && ex.infers() && (ex.passed != nil || ex.moves == 0) {
			// It was sent here before it was known that they drain: another proxy may have a server.
			ex.leaves = &schedule.Elsewhere{Moves: ex.moves + 1}
		}
		return draining(list[0].Name)
	}
	return h.acquire(r, ex, list)
}

// draining refuses a request that only servers which are draining could answer; one of them is named.
func draining(name string) *refusal {
	return &refusal{http.StatusServiceUnavailable, fmt.Sprintf(
		"upstream %s is draining and gets no new requests; POST %s%s/%s ends that",
		name, pathUpstreams, name, verbResume)}
}

// drains reports whether all of the servers are draining.
func drains(list []*backend) bool {
	return !slices.ContainsFunc(list, func(b *backend) bool { return !b.draining.Load() })
}

// promising returns the candidates if one of them may answer, now or later, and is not draining;
// otherwise none. Other servers than had, to which the request could not be sent, have to have its
// model, too.
func (h *Handler) promising(ex *exchange, had *backend) []*backend {
	list := h.candidates(ex)
	if ex.runsHere() && had.State().Lists(ex.key) {
		list = slices.DeleteFunc(slices.Clone(list), func(b *backend) bool { return !b.State().Has(ex.key) })
		if len(list) == 0 && had.leaving.Load() {
			list = []*backend{had}
		}
	}
	if !slices.ContainsFunc(list, (*backend).mayAnswer) || drains(list) && ex.only == nil {
		return nil
	}
	return list
}

// acquire is the rest of wait, once it is known which servers can serve the request. If all of them
// are away and one may come back (--try-duration), the request waits for it.
func (h *Handler) acquire(r *http.Request, ex *exchange, list []*backend) *refusal {
	if ex.infers() && !ex.cloud {
		h.prewarming.asked(ex, list)
	}
	if !ex.infers() || !slices.ContainsFunc(list, (*backend).mayAnswer) {
		// Waiting for servers that do not answer, one after the other, would only take longer.
		ex.up = pick(list, ex.key)
		return nil
	}
	h.waits(ex)
	list, err := h.queued(r, ex, list)
	switch {
	case err == nil:
		h.waited(ex)
		return nil
	case ex.leaves != nil: // which the caller looks at
		return &refusal{http.StatusMisdirectedRequest, err.Error()}
	case errors.Is(err, schedule.ErrFull):
		return ex.busy()
	case errors.Is(err, schedule.ErrMayNotWait):
		return ex.tooMany()
	case errors.Is(err, schedule.ErrAway):
		return h.gone(r, ex, list)
	case errors.Is(err, schedule.ErrClosed):
		return ex.stopping()
	}
	return givenUp(err)
}

// queued waits for one of the servers, or for a lane of one. It returns the servers that it waited
// for. Without an error it has set ex.up.
func (h *Handler) queued(r *http.Request, ex *exchange, list []*backend) ([]*backend, error) {
	began := time.Now()
	counted := false // as one of its client's waiting requests
	mayWait := func() bool {
		if ex.holder == nil || ex.part { // what it is a part of is one request
			return true
		}
		counted = true
		return ex.holder.mayWait(ex.Waited > 0 || ex.moves > 0 || len(ex.tried) > 0, h.Limiter)
	}
	ex.beat.wait()
	var err error
	if h.Lanes == nil || !ex.unread && (ex.chain == nil || !ex.chain.HasPrompt()) {
		if list, err = h.await(r.Context(), ex, list, mayWait); err == nil {
			ex.up = pick(list, ex.key)
		}
	} else {
		err = h.lane(r, ex, list, mayWait)
	}
	ex.beat.waited()
	if counted {
		ex.holder.waited(h.Limiter)
	}
	ex.Waited += time.Since(began)
	return list, err
}

// gone answers a request whose servers have been away for too long.
func (h *Handler) gone(r *http.Request, ex *exchange, list []*backend) *refusal {
	// Another server may have appeared that was not known to have the model.
	if all := h.backends(); ex.only == nil && (len(all) > 1 || !slices.Equal(all, list)) {
		if again := h.promising(ex, list[0]); len(again) > 0 {
			return h.acquire(r, ex, again)
		}
	}
	ex.header.Set("Retry-After", retryAfter)
	var urls []string
	for _, b := range list {
		urls = append(urls, b.URL.String())
	}
	return &refusal{http.StatusServiceUnavailable, fmt.Sprintf(
		"ollama at %s has been away for longer than %v (--try-duration); start it there and try again",
		strings.Join(urls, " and "), list[0].TryDuration)}
}

// stopping refuses a request that would have to wait while the proxy stops.
func (ex *exchange) stopping() *refusal {
	ex.stops = true
	ex.header.Set("Retry-After", retryAfter)
	return &refusal{http.StatusServiceUnavailable, "ollama-cacheproxy is stopping; try again when it is back"}
}

// waits begins the request's wait, unless it waits already.
func (h *Handler) waits(ex *exchange) {
	if !ex.waiting {
		ex.waiting = true
		h.waiting.Add(1)
	}
}

// waited ends the request's wait.
func (h *Handler) waited(ex *exchange) {
	if ex.waiting {
		ex.waiting = false
		h.waiting.Add(-1)
	}
}

// lane waits for a lane of one of the servers, or of one that is away now but comes back meanwhile.
func (h *Handler) lane(r *http.Request, ex *exchange, list []*backend, mayWait func() bool) error {
	priority := ex.holder.priority(r)
	lanes := h.Lanes
	request := schedule.Request{
		Client: h.client(r, ex), Priority: priority, Arrived: ex.start, MayWait: mayWait,
		Streams: ex.asksForStream(), Movable: h.mayLeave(ex), Moves: ex.moves,
	}
	if ex.holder != nil {
		request.Weight = ex.holder.share
	}
	for _, b := range list {
		request.Upstreams = append(request.Upstreams, b.index)
	}
	if ex.only == nil && ex.runsHere() {
		for _, b := range h.backends() {
			if st := b.State(); st.Away && st.Lists(ex.key) && !b.draining.Load() && !b.foreign.Load() && !slices.Contains(list, b) {
				request.Upstreams = append(request.Upstreams, b.index)
			}
		}
	}
	if ex.unread {
		// The model that its first bytes name need not be the final one, and its body may take long
		// to arrive. So it waits only for other unread bodies, and holds up no others.
		lanes = lanes.Aside()
	} else {
		request.Program, request.Flow = programOf(r, ex), flowOf(r, ex)
		request.Runner, request.Links = schedule.Runner{Upstream: list[0].index, Options: h.runner(ex, list)}, ex.chain.Links
	}
	grant, err := lanes.Acquire(r.Context(), request)
	if e, ok := errors.AsType[schedule.Elsewhere](err); ok {
		ex.leaves = &e
	}
	if ex.Priority = priority.String(); err == nil {
		ex.grant, ex.up = grant, h.at(grant.Upstream)
	}
	return err
}

// mayAnswer reports whether the server is reachable, or may still come back.
func (b *backend) mayAnswer() bool {
	st := b.State()
	return !b.looped.Load() && (!st.Away || time.Now().Before(st.Until))
}

// await waits until one of the servers is no longer away, and returns those that are not. At most
// Handler.Queue requests wait.
func (h *Handler) await(
	ctx context.Context, ex *exchange, list []*backend, mayWait func() bool,
) ([]*backend, error) {
	for waits := false; ; {
		news := h.news.Load()
		back, left := h.back(ex, list)
		switch {
		case len(back) > 0:
			return back, nil
		case left == 0:
			return list, schedule.ErrAway
		case !waits:
			waits = true
			defer h.awaiting.Add(-1)
			if h.awaiting.Add(1) > int64(h.Queue) {
				return list, schedule.ErrFull
			}
			if !mayWait() {
				return list, schedule.ErrMayNotWait
			}
		}
		select {
		case <-*news:
		case <-time.After(left):
		case <-h.closing:
			return list, schedule.ErrClosed
		case <-ctx.Done():
			return list, ctx.Err()
		}
	}
}

// back returns the servers that are not away. If there is none, left is how long to wait for one.
func (h *Handler) back(ex *exchange, list []*backend) (back []*backend, left time.Duration) {
	for _, b := range list {
		if st := b.State(); !st.Away {
			back = append(back, b)
		} else {
			left = max(left, time.Until(st.Until))
		}
	}
	if len(back) == 0 && ex.only == nil && ex.runsHere() {
		back, _ = h.having(ex)
	}
	return back, left
}

// Close refuses requests that wait for a lane or for a server that is away, and later ones that
// would have to wait.
func (h *Handler) Close() {
	h.closeOnce.Do(func() { close(h.closing) })
	if h.Lanes != nil {
		h.Lanes.Close()
	}
}

// Waiting returns how many requests wait for a lane, for memory or for a server that is away. It
// includes refused ones until their answers are written.
func (h *Handler) Waiting() int64 { return h.waiting.Load() }

// givenUp refuses a request that was cancelled while it waited. Only if the proxy stops does
// somebody see this answer; usually the client has left.
func givenUp(err error) *refusal {
	return &refusal{http.StatusServiceUnavailable, "the request was given up while it waited: " + err.Error()}
}

// full refuses a request for which the queue has no room, before its body, which is too long to be
// read for this check, is received.
func (h *Handler) full(r *http.Request, ex *exchange) error {
	switch {
	case h.Lanes == nil || ex.prompt == prefix.None || ex.embed:
		return nil
	case ex.holder.waits():
		return ex.tooMany()
	case h.Fleet != nil && ex.passed == nil: // the owner's queue counts, which may be another proxy's
		return nil
	case h.Lanes.Full(ex.holder.priority(r), h.client(r, ex)):
		return ex.busy()
	}
	return nil
}

func (ex *exchange) busy() *refusal {
	ex.header.Set("Retry-After", retryAfter)
	return &refusal{http.StatusServiceUnavailable, busyWords}
}

// runner returns what the request needs to have loaded, in the scheduler's terms. If servers have
// different weights under one name, the name identifies the model, as if all had the same weights.
func (h *Handler) runner(ex *exchange, list []*backend) prefix.Options {
	o := list[0].wanted(ex.key, &ex.chain.Runner).Options
	for _, b := range list[1:] {
		if b.wanted(ex.key, &ex.chain.Runner).Options != o {
			return ex.chain.Runner
		}
	}
	return o
}

// asksForStream reports whether the answer is streamed. Ollama's own endpoints stream unless the
// request says otherwise.
func (ex *exchange) asksForStream() bool {
	if ex.fields.stream == 0 {
		return ex.dialect == savings.Native
	}
	return ex.fields.stream == 't'
}

// begins notes that the answer has begun. The beginning of a stream shows that the request has a
// slot.
func (ex *exchange) begins() {
	if ex.Status < 300 && ex.asksForStream() {
		ex.grant.Began()
		ex.context.Began(ex.up.books.Load().TellsCached)
	}
}

// free gives the lane back.
func (h *Handler) free(ex *exchange, a savings.Answer) {
	if ex.grant == nil {
		return
	}
	res := schedule.Result{Sent: ex.began && ex.Outcome != Unreachable, Answered: ex.Status >= 200 && ex.Status < 300 && ex.BytesOut > 0, Total: a.Total, Generated: a.Generated, Timed: a.TotalTime > 0}
	if res.Timed {
		res.Prompt, res.Eval, res.Load = a.PromptEval, a.Eval, a.Load
	}
	if e := ex.Savings; e != nil {
		res.Queue, res.Loaded, res.LoadKnown = e.Queue, e.Loaded, a.Load > 0 // not in /v1
		if e.Tokens != nil {
			res.Reused, res.ReusedKnown = e.Tokens.Reused, true
		}
	}
	h.release(ex, res, a)
}
