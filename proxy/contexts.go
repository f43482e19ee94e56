package proxy

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contexts"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/runners"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// localPort returns the port on which a server listens on this machine; 0 if it is on another one.
func localPort(s *upstream.Server) int {
	if s.URL.Scheme != "http" || !upstream.Here(s.URL) {
		return 0
	}
	port, err := strconv.Atoi(s.URL.Port())
	if err != nil {
		return 80
	}
	return port
}

// engineFound processes what an engine reports about itself. If each API key has its own contexts,
// a slot cannot get what another slot evaluated: the request that waits for it may have another
// key.
func (h *Handler) engineFound(e contexts.Running, attaches bool) {
	copied := attaches && (h.Guard.Keys == nil || h.Contexts.Shared())
	for _, b := range h.backends() {
		if b.port == e.Port && h.Lanes != nil {
			h.Log.Debug("engine found", "upstream", b.Name, "files", e.Files, "slots", e.Slots, "context", e.Context, "attaches", attaches)
			h.Lanes.SetSlots(b.index, strings.Join(e.Files, "+"), schedule.Slots{Count: e.Slots, Copied: copied})
		}
	}
}

// prepare attaches stored context before the request is sent, and stores what the request is about
// to have unloaded.
func (h *Handler) prepare(ctx context.Context, ex *exchange) {
	b := ex.up
	if h.Contexts == nil || b.port == 0 || !ex.runsHere() {
		return
	}
	if ex.unloads() {
		h.Contexts.Leave(ctx, b.port)
		return
	}
	if ex.grant == nil || ex.chain == nil || !ex.chain.HasPrompt() {
		return
	}
	wanted := b.wanted(ex.key, ex.options())
	sizes := make([]int, len(ex.chain.Links))
	for i, l := range ex.chain.Links {
		sizes[i] = l.Bytes
	}
	ex.context = h.Contexts.Before(ctx, contexts.Request{
		Port: b.port, Weights: wanted.Options.Model, Model: upstream.DisplayName(ex.key),
		Owner: h.Contexts.Owner(ex.holder.secret()), Contents: ex.chain.Contents(), Bytes: sizes,
		Sliding: wanted.Sliding, Values: wanted.Values,
		Loaded: b.runners.Loaded(wanted),
		Load: func(ctx context.Context) (time.Duration, error) {
			return ex.load(ctx, wanted)
		},
	})
}

// load loads the model as the request needs it, by a request without a prompt.
func (ex *exchange) load(ctx context.Context, wanted runners.Wanted) (time.Duration, error) {
	options, shift := ex.chain.Runner.Request()
	began := time.Now()
	run := ex.up.runners.Begin(began, wanted)
	if err := ex.up.Load(ctx, ex.fields.model, options, shift); err != nil {
		run.End(time.Now(), runners.Outcome{Refused: upstream.StatusCode(err) != 0})
		return 0, err
	}
	took := time.Since(began) // the server does not report it, since it evaluates nothing
	ex.loaded = run.End(time.Now(), runners.Outcome{Accepted: true, Load: took})
	return took, nil
}

// loadedBefore adds to an answer's times the load that loadFirst or prepare caused for it.
func (ex *exchange) loadedBefore(o *savings.Outcome) {
	took := ex.loadedFirst + ex.context.Loading()
	if took == 0 || !ex.loaded.Loaded {
		return
	}
	o.Ending = ex.loaded
	if o.TotalTime > 0 {
		o.Load += took
		o.TotalTime += took
	}
}

// count takes the reused tokens from the engine if its server does not report them.
func (ex *exchange) count(a *savings.Answer) {
	if a.Done && a.Total > 0 && !a.CachedKnown {
		a.Cached, a.CachedKnown = ex.context.Cached(a.Total)
	}
}

// release gives the lane back as soon as no stored context is being made of what its slot holds.
func (h *Handler) release(ex *exchange, res schedule.Result, a savings.Answer) {
	answer := contexts.Answer{
		Unsent: !ex.began, Total: a.Total, Cached: -1, CachedKnown: a.CachedKnown, Generated: a.Generated,
		Prompt: a.PromptEval, Awaited: h.waiting.Load() > 0, Unloads: ex.use.unloads(),
	}
	if e := ex.Savings; e != nil && e.Tokens != nil {
		answer.Cached = e.Tokens.Reused
	}
	if evaluated := a.Total - max(answer.Cached, 0); answer.Prompt == 0 && evaluated > 0 {
		// No time in /v1. A token of an answer takes about four times as long as one of a prompt.
		answer.Prompt = (ex.Duration - ex.sent) * time.Duration(evaluated) / time.Duration(evaluated+4*a.Generated)
		if ex.streams && ex.FirstByte > ex.sent {
			answer.Prompt = ex.FirstByte - ex.sent
		}
	}
	grant := ex.grant
	ex.context.After(answer, func() {
		grant.Release(res)
		if h.Fleet != nil {
			h.Fleet.Idle()
		}
	})
}
