package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/fleet"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Why a request was sent to another upstream, or again. In each case the first one cannot have
// begun to process it.
const (
	RetryUnreachable = "unreachable" // no connection could be made
	RetryBusy        = "busy"        // it answered 503 in Ollama's own words for a full queue
	RetryAbsent      = "absent"      // it does not have the model any more
)

const (
	busyMost  = 10                     // retries at one upstream whose queue is full
	busyPause = 250 * time.Millisecond // before the first retry, doubled each time …
	busyLast  = 5 * time.Second        // … up to this
)

// goneMost limits how often a request is sent again to servers that answer polls but accept no
// connection for it: for about a minute.
const goneMost = 16

// attempts is the forwarder's transport. If a request cannot have begun at its server, attempts
// sends it elsewhere, once to each upstream; if there is no other, or none answers, it waits for
// one to come back. A request that may have begun is never sent twice.
type attempts struct{ h *Handler }

func (a attempts) RoundTrip(out *http.Request) (*http.Response, error) {
	h, ex := a.h, out.Context().Value(exchangeKey{}).(*exchange)
	defer ex.letGo() // nothing is sent again after this
	if err := ex.mayBegin(out.Context()); err != nil {
		return nil, err
	}
	var past repeats
	for {
		res, err := h.Transport.RoundTrip(out)
		if err != nil && context.Cause(out.Context()) == errSilent {
			return nil, ex.silent()
		}
		why := retryReason(res, err)
		ex.gateway = why == "" && err == nil && byGateway(res.StatusCode)
		h.noticed(out.Context(), ex, why, err)
		if why == "" || ex.passing.wasBegun() { // the part of its body that was read is gone
			return res, err
		}
		ex.silence.stop()
		ex.tried = append(ex.tried, ex.up)
		list, pause := h.next(ex, why, &past)
		if len(list) == 0 {
			return res, err
		}
		if res != nil {
			res.Body.Close()
		}
		if out, err = h.again(out, ex, why, list, pause); err != nil {
			return nil, err
		}
	}
}

// mayBegin asks the proxy that passed the request on, if one has, whether it may be sent to a server.
// If that proxy has given it up, but others wait for the same answer, they are asked.
func (ex *exchange) mayBegin(ctx context.Context) error {
	err := fleet.PassedOf(ctx).Begin(ctx)
	for err != nil && ex.flight != nil && ctx.Err() == nil {
		p, ok := ex.flight.other()
		if !ok {
			return err
		}
		err = p.Begin(ctx)
	}
	return err
}

// noticed passes on what an attempt has shown about its server.
func (h *Handler) noticed(ctx context.Context, ex *exchange, why string, err error) {
	switch {
	case why == RetryUnreachable:
		ex.up.Unreachable(err)
		h.available(ex.up)
	case (ex.gateway || upstream.Closed(err)) && ctx.Err() == nil:
		h.brokeOff(ctx, ex.up)
	}
}

// again prepares a refused request for one of these servers, after pausing and waiting.
func (h *Handler) again(
	out *http.Request, ex *exchange, why string, list []*backend, pause time.Duration,
) (*http.Request, error) {
	if err := h.pause(out.Context(), ex, pause); err != nil {
		return nil, err
	}
	h.retract(ex)
	ex.Retries = append(ex.Retries, why)
	if ref := h.acquire(ex.inbound, ex, list); ref != nil {
		return nil, ref
	}
	h.prepare(out.Context(), ex)
	h.begin(ex)
	again := out.Clone(out.Context())
	u := *ex.inbound.URL
	again.URL, again.Host = &u, ""
	h.rewrite(&httputil.ProxyRequest{In: ex.inbound, Out: again})
	if ex.passing != nil {
		again.Body = ex.passing // ReverseProxy's own reader of it is closed
	}
	return again, nil
}

// repeats counts how often a request was sent again to servers that had refused it once.
type repeats struct{ busy, gone int }

// next returns the servers to which a refused request may be sent now, and how long to pause first.
// If there are none, the refusal is final.
func (h *Handler) next(
	ex *exchange, why string, past *repeats,
) (list []*backend, pause time.Duration) {
	if list = h.elsewhere(ex, why); len(list) > 0 {
		return list, 0
	}
	switch {
	case why == RetryUnreachable && past.gone < goneMost:
		list = h.returning(ex)
		if past.gone > 0 {
			pause = min(busyPause<<past.gone, busyLast)
		}
		past.gone++
	case why == RetryBusy && past.busy < busyMost && ex.grant != nil:
		list = []*backend{ex.up} // its queue will soon be shorter
		pause = min(busyPause<<past.busy, busyLast)
		past.busy++
	}
	return list, pause
}

// pause waits before a request is sent again.
func (h *Handler) pause(ctx context.Context, ex *exchange, d time.Duration) error {
	if d == 0 {
		return nil
	}
	began := time.Now()
	ex.beat.wait()
	stops := false
	select {
	case <-ctx.Done():
	case <-h.closing:
		stops = true
	case <-time.After(d):
	}
	ex.beat.waited()
	ex.paused += time.Since(began)
	if stops {
		return ex.stopping()
	}
	return context.Cause(ctx)
}

// byGateway reports whether a gateway may have answered in place of a server that is down. For 503
// that is so unless the body has Ollama's own words.
func byGateway(status int) bool {
	return status == http.StatusBadGateway || status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout
}

// elsewhere returns the other servers to which a refused request may be sent.
func (h *Handler) elsewhere(ex *exchange, why string) []*backend {
	if all := h.backends(); len(all) == 1 && all[0] == ex.up {
		return nil
	}
	if ex.only != nil || why != RetryUnreachable && !ex.runsHere() {
		return nil
	}
	if why == RetryAbsent {
		if h.refresh(); ex.up.State().Has(ex.key) {
			return nil // something else was not found
		}
	}
	if st := ex.up.State(); ex.runsHere() && (why == RetryAbsent || st.Lists(ex.key)) {
		list, _ := h.having(ex) // one without the model would answer that it does not exist
		return list
	}
	return h.candidates(ex)
}

// returning returns the servers that a request waits for if it could not be sent to any.
func (h *Handler) returning(ex *exchange) []*backend {
	if !ex.infers() || ex.up.TryDuration == 0 {
		return nil
	}
	ex.tried = nil
	return h.promising(ex, ex.up)
}

// brokeOff is called before the lane of a request is released whose server broke off, or was
// replaced by a gateway's answer. If other requests wait, it polls the server at once, so that they
// are not sent one by one to a server that is gone.
func (h *Handler) brokeOff(ctx context.Context, b *backend) {
	if b.BrokeOff(); h.waiting.Load() > 0 {
		b.Check(ctx)
	}
}

// errSilent is the cause of cancelling a request that got no byte for Handler.UpstreamSilence.
var errSilent = errors.New("the upstream sent nothing for too long")

// silence cancels a request when its upstream has sent nothing for too long while the proxy waits
// for it. A nil *silence never does.
type silence struct {
	timer *time.Timer
	limit time.Duration
}

func (s *silence) wait() {
	if s != nil {
		s.timer.Reset(s.limit)
	}
}

func (s *silence) stop() {
	if s != nil {
		s.timer.Stop()
	}
}

// silent returns the answer to such a request.
func (ex *exchange) silent() *refusal {
	return &refusal{http.StatusGatewayTimeout, fmt.Sprintf(
		"ollama at %s sent nothing for %v, and was not waited for any longer (--upstream-silence)",
		ex.up.URL, ex.silence.limit)}
}

// retryReason returns why a request may be sent elsewhere; "" if it may not.
func retryReason(res *http.Response, err error) string {
	switch {
	case err != nil:
		if upstream.NoConnection(err) {
			return RetryUnreachable
		}
	case res.StatusCode == http.StatusServiceUnavailable:
		// For another 503, such as a gateway's, nobody knows whether the request was begun.
		if queueFull(res) {
			return RetryBusy
		}
	case res.StatusCode == http.StatusNotFound:
		return RetryAbsent
	}
	return ""
}

// queueFull reports whether a 503 is Ollama's for a full queue. It leaves the answer unchanged, and
// does not wait for a long body.
func queueFull(res *http.Response) bool {
	if res.ContentLength < 0 || res.ContentLength > 4096 {
		return false
	}
	text, err := peek(res, 4096)
	return err == nil && strings.Contains(string(text), busyWords)
}
