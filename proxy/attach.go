package proxy

import (
	"context"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/attach"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

const renderTimeout = 30 * time.Second

func (h *Handler) newAttacher() *attach.Attacher {
	a := &attach.Attacher{Render: h.render, ContextLength: h.contextLength, Outcome: h.Attached, Log: h.Log}
	a.Init()
	return a
}

// render has the upstream render a request to /api/generate, if its model is loaded.
func (h *Handler) render(ctx context.Context, body []byte) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, renderTimeout)
	defer cancel()
	f, err := scan(body, nil)
	if err != nil {
		return "", err
	}
	b := h.backends[0]
	list, err := b.Loaded(ctx)
	if err != nil {
		return "", attach.ErrNotLoaded // nobody knows
	}
	if _, ok := b.loaded(list, upstream.ModelKey(f.model)); !ok {
		return "", attach.ErrNotLoaded
	}
	return b.Render(ctx, body)
}

// contextLength returns with how many tokens of context the model is loaded, as of the last poll; 0 if that is not known.
func (h *Handler) contextLength(model string) int {
	l, _ := h.backends[0].loaded(h.backends[0].State().Loaded, model)
	return l.ContextLength
}

// attach replaces the body where it is sent with stored context, and ex.fields with what is in the one that is sent.
func (h *Handler) attach(ex *exchange) error {
	if h.attacher == nil || ex.prompt != prefix.Generate || !ex.runsHere() {
		return nil
	}
	if ex.plan = h.attacher.Plan(ex.key, ex.body.data); ex.plan == nil || ex.plan.Body() == nil {
		return nil
	}
	ex.body.release()
	ex.body = newBody(ex.plan.Body(), nil)
	var err error
	ex.fields, err = scan(ex.body.data, ex.members[:])
	return err
}

// attached tells how the answer to a planned request ended.
func (ex *exchange) attached(a savings.Answer) {
	switch {
	case ex.plan == nil:
	case ex.Status >= 400:
		ex.plan.Refused(ex.Status)
	case ex.Outcome == OK && a.Done:
		ex.plan.Answered(attach.Answer{
			Context: a.Context, PromptTokens: a.Total, AnswerTokens: a.Generated,
			Total: a.TotalTime, Load: a.Load, PromptEval: a.PromptEval, Eval: a.Eval,
		})
	}
}

// forgetContexts forgets what is stored for models that are others now, or that are on a server that was restarted.
func (h *Handler) forgetContexts(models []string) {
	if h.attacher == nil {
		return
	}
	for _, model := range models {
		h.attacher.Forget(upstream.ModelKey(model))
	}
}
