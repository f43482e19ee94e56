package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// Why a request was sent to another upstream, or again: the one that it was sent to cannot have begun with it.
const (
	RetryUnreachable = "unreachable" // no connection could be made
	RetryBusy        = "busy"        // it answered 503 in Ollama's own words for a full queue
	RetryAbsent      = "absent"      // it does not have the model any more
)

const (
	busyMost  = 10                     // times that one upstream is asked again when its queue is full
	busyPause = 250 * time.Millisecond // before that, doubled each time …
	busyLast  = 5 * time.Second        // … up to this
)

// attempts is the forwarder's transport. It sends a request elsewhere, once to each upstream, if the one that it was sent to
// cannot have begun with it, and if there is no other, or none answers, waits for one to come back; what may have been begun is
// never sent twice.
type attempts struct{ h *Handler }

func (a attempts) RoundTrip(out *http.Request) (*http.Response, error) {
	ex := out.Context().Value(exchangeKey{}).(*exchange)
	defer ex.letGo()          // nothing is sent again after this
	var unreachable time.Time // when it first was
	for busy := 0; ; {
		res, err := a.h.Transport.RoundTrip(out)
		why := retryReason(res, err)
		if err != nil && context.Cause(out.Context()) == errSilent {
			return nil, ex.silent(a.h)
		}
		if why == "" || ex.passing != nil { // a body that passes through cannot be sent again
			if upstream.Closed(err) && out.Context().Err() == nil {
				a.h.brokeOff(out.Context(), ex.up)
			}
			return res, err
		}
		if why == RetryUnreachable {
			ex.up.Unreachable(err)
			a.h.available(ex.up)
		}
		if !slices.Contains(ex.tried, ex.up) {
			ex.tried = append(ex.tried, ex.up)
		}
		list := a.h.elsewhere(ex, why)
		if len(list) == 0 && why == RetryUnreachable {
			if unreachable.IsZero() {
				unreachable = time.Now()
			}
			list = a.h.returning(ex, unreachable)
		}
		if len(list) == 0 {
			if why != RetryBusy || busy == busyMost || ex.grant == nil {
				return res, err
			}
			// Its queue will be shorter in a moment.
			select {
			case <-out.Context().Done():
				res.Body.Close()
				return nil, context.Cause(out.Context())
			case <-time.After(min(busyPause<<busy, busyLast)):
			}
			busy++
			list = []*backend{ex.up}
		}
		if res != nil {
			res.Body.Close()
		}
		ex.retract()
		ex.Retries = append(ex.Retries, why)
		if ref := a.h.acquire(ex.inbound, ex, list); ref != nil {
			return nil, ref
		}
		a.h.begin(ex)
		again := out.Clone(out.Context())
		u := *ex.inbound.URL
		again.URL, again.Host = &u, ""
		a.h.rewrite(&httputil.ProxyRequest{In: ex.inbound, Out: again})
		out = again
	}
}

// elsewhere returns the servers to which a request that was refused may be sent.
func (h *Handler) elsewhere(ex *exchange, why string) []*backend {
	if ex.only != nil || len(h.backends) == 1 || why != RetryUnreachable && !ex.runsHere() {
		return nil
	}
	if why == RetryAbsent {
		if h.refresh(); ex.up.State().Has(ex.key) {
			return nil // it is something else that was not found
		}
	}
	if st := ex.up.State(); ex.runsHere() && (why == RetryAbsent || st.Lists(ex.key)) {
		list, _ := h.having(ex) // one without the model would say that there is none
		return list
	}
	return h.candidates(ex)
}

// returning returns the servers for which a request waits that could not be sent to any since a time.
func (h *Handler) returning(ex *exchange, since time.Time) []*backend {
	if !ex.infers() || time.Since(since) >= ex.up.TryDuration {
		return nil
	}
	ex.tried = nil
	list := h.candidates(ex)
	if !slices.ContainsFunc(list, (*backend).answers) && !expected(list) {
		return nil
	}
	return list
}

// brokeOff is told of a request that was broken off by its server, before its lane goes to another one: if any wait, then they are
// not to be sent one by one to a server that is gone.
func (h *Handler) brokeOff(ctx context.Context, b *backend) {
	if b.BrokeOff(); h.waiting.Load() > 0 {
		b.Check(ctx)
	}
}

// errSilent is the cause with which a request is given up that was not answered for Handler.UpstreamSilence.
var errSilent = errors.New("the upstream sent nothing for too long")

// silent tells of such a request.
func (ex *exchange) silent(h *Handler) *refusal {
	return &refusal{http.StatusGatewayTimeout, fmt.Sprintf("ollama at %s sent nothing for %v, and was not waited for any longer (--upstream-silence)", ex.up.URL, h.UpstreamSilence)}
}

// retryReason says why a request may be sent elsewhere; "" if it may not.
func retryReason(res *http.Response, err error) string {
	switch {
	case err != nil:
		if upstream.NoConnection(err) {
			return RetryUnreachable
		}
	case res.StatusCode == http.StatusServiceUnavailable:
		if queueFull(res) { // of another one, such as a gateway's, nobody knows whether the request was begun
			return RetryBusy
		}
	case res.StatusCode == http.StatusNotFound:
		return RetryAbsent
	}
	return ""
}

// queueFull reports whether a 503 is Ollama's for a full queue. It leaves the answer as it was, and waits for no long one.
func queueFull(res *http.Response) bool {
	if res.ContentLength < 0 || res.ContentLength > 4096 {
		return false
	}
	text, err := peek(res, 4096)
	return err == nil && strings.Contains(string(text), busyWords)
}
