package batch

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ollama/ollama/api"
	"golang.org/x/sync/singleflight"
)

// client sends requests to the server.
type client struct {
	url       *url.URL
	transport http.RoundTripper
	key       string
	retries   int
	timeout   time.Duration // from an answer's first byte; 0: none
	wait      time.Duration // before the first retry
	patience  time.Duration // how long to wait for a server that does not answer
	log       *slog.Logger
	lookout   singleflight.Group // all requests share one wait for the server
	away      atomic.Bool        // it is being waited for
}

const (
	maxWait       = 30 * time.Second
	maxRetryAfter = 2 * time.Minute
	askTimeout    = 10 * time.Second // for everything but inference

	lookEvery = time.Second      // for a server that is away
	tellEvery = 30 * time.Second // between log lines about it
)

// ErrUnreachable ends a batch whose server no longer answers.
var ErrUnreachable = errors.New("the server does not answer")

var errRequestTimeout = errors.New("the answer took too long")

func (c *client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url.JoinPath(path).String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Cacheproxy-Priority", "batch")
	if c.key != "" {
		req.Header.Set("Authorization", "Bearer "+c.key)
	}
	return c.transport.RoundTrip(req)
}

// simulatedHeader is on every answer of a simulated server.
const simulatedHeader = "X-Cacheproxy-Simulated"

// tried is the result of one attempt.
type tried struct {
	answer     []byte
	counts     Counts
	failure    *failure
	again      bool          // it may be retried
	after      time.Duration // the server's minimum pause; 0: none
	overloaded bool
	gone       bool // the server may be gone
	begun      bool // it may have begun this request when it went away
}

func broken(err error) tried {
	var dial *net.OpError
	return tried{
		failure: &failure{Code: codeBroken, Message: err.Error()}, again: true,
		gone: true, begun: !errors.As(err, &dial) || dial.Op != "dial",
	}
}

// noServer reports whether a status is that of a proxy or a gateway whose server is, or may be,
// away.
func noServer(status int) bool {
	return status == http.StatusBadGateway || status == http.StatusServiceUnavailable ||
		status == http.StatusGatewayTimeout
}

func (c *client) try(ctx context.Context, r *request, line int) tried {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	begun := func() {
		if c.timeout > 0 {
			timer := time.AfterFunc(c.timeout, func() { cancel(errRequestTimeout) })
			context.AfterFunc(ctx, func() { timer.Stop() })
		}
	}
	if !r.streams() {
		begun()
	}
	res, err := c.do(ctx, http.MethodPost, r.path, r.sent())
	var t tried
	if err == nil {
		defer res.Body.Close()
		if res.StatusCode == http.StatusOK {
			contentType := res.Header.Get("Content-Type")
			t.answer, t.counts, err = readAnswer(res.Body, r, contentType, line, begun)
		}
	}
	var server *serverError
	switch {
	case err == nil && res.StatusCode == http.StatusOK:
		if res.Header[simulatedHeader] != nil {
			t.counts.Simulated = 1
		}
		return t
	case context.Cause(ctx) == errRequestTimeout:
		return tried{failure: &failure{Code: codeTimeout, Message: fmt.Sprintf("the answer was not complete %v after it began (--request-timeout); it was cancelled", c.timeout)}}
	case errors.As(err, &server):
		return tried{failure: &failure{Code: codeRefused, Message: server.text}, again: true, overloaded: overloaded(0, server.text)}
	case errors.Is(err, errLong):
		return tried{failure: &failure{Code: codeBroken, Message: err.Error()}}
	case err != nil:
		return broken(err)
	}
	return refused(res)
}

// refused reads an answer with a status other than 200.
func refused(res *http.Response) tried {
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return broken(err)
	}
	said := cmp.Or(message(text), res.Status)
	f := &failure{Status: res.StatusCode, Code: codeRefused, Message: said}
	if json := bytes.TrimSpace(text); len(json) > 0 && json[0] == '{' {
		if _, err := members(json); err == nil {
			f.Body = json
		}
	}
	t := tried{
		failure: f, overloaded: overloaded(f.Status, f.Message),
		gone: noServer(f.Status), begun: f.Status != http.StatusServiceUnavailable,
	}
	t.again = t.overloaded || f.Status >= 500
	if seconds, err := strconv.Atoi(res.Header.Get("Retry-After")); err == nil && seconds > 0 {
		t.after = min(time.Duration(seconds)*time.Second, maxRetryAfter)
	}
	return t
}

// ask sends a request until it is answered or given up. An error ends the batch. overload is called
// whenever the server is overloaded. While the server is away nothing counts as a retry, and when
// it is back retries are counted anew. That it went away at this request may be the request's
// fault, which is tolerated as often as the request may be sent again.
func (c *client) ask(ctx context.Context, r *request, line int, overload func(sent time.Time, why string)) (tried, error) {
	deaths := 0
	for attempt := 0; ; attempt++ {
		sent := time.Now()
		t := c.try(ctx, r, line)
		if t.failure == nil {
			return t, nil
		}
		if ctx.Err() != nil {
			return t, context.Cause(ctx)
		}
		if t.gone {
			away, err := c.await(ctx)
			if err != nil {
				return t, err
			}
			if away {
				if t.begun {
					deaths++
				}
				if deaths > c.retries {
					t.failure.Message = fmt.Sprintf("the server went away each time that it was at this, %d times: %s",
						deaths, t.failure.Message)
					return t, nil
				}
				attempt = -1
				continue
			}
		}
		if t.overloaded {
			overload(sent, t.failure.Message)
		}
		if !t.again || attempt >= c.retries {
			return t, nil
		}
		wait := min(c.wait<<min(attempt, 16), maxWait)
		wait = max(t.after, wait/2+rand.N(wait/2+1)) // so that those that failed together do not come back together
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return t, context.Cause(ctx)
		}
	}
}

// await waits until the server answers, and reports whether it was away. The error is
// ErrUnreachable if it has been away for too long.
func (c *client) await(ctx context.Context) (away bool, err error) {
	for {
		v, err, _ := c.lookout.Do("", func() (any, error) { return c.look(ctx) })
		if !errors.Is(err, errTakenOver) || ctx.Err() != nil {
			return v.(bool), err
		}
		// That was the cause for which another request no longer waits.
	}
}

func (c *client) look(ctx context.Context) (away bool, err error) {
	since := time.Now()
	told := since
	defer c.away.Store(false)
	for {
		_, err := c.get(ctx, "/api/version")
		var status api.StatusError
		if errors.As(err, &status) && !noServer(status.StatusCode) {
			err = nil // it has answered, even if with an error
		}
		if ctx.Err() != nil {
			return away, context.Cause(ctx)
		}
		now := time.Now()
		waited := now.Sub(since).Round(time.Second)
		switch {
		case err == nil:
			if away {
				c.log.Info("the server answers again",
					"server", c.url.String(), "waited", waited.String())
			}
			return away, nil
		case now.Sub(since) >= c.patience:
			return true, fmt.Errorf("%w at %s: %w (waited %v: --wait-for-server)",
				ErrUnreachable, c.url, err, waited)
		case !away:
			c.log.Warn("the server does not answer; waiting for it",
				"server", c.url.String(), "up_to", c.patience.String(), "err", err)
			away = true
			c.away.Store(true)
		case now.Sub(told) >= tellEvery:
			c.log.Warn("still waiting for the server", "server", c.url.String(),
				"waited", waited.String(), "up_to", c.patience.String(), "err", err)
			told = now
		}
		select {
		case <-time.After(min(lookEvery, c.patience-now.Sub(since))):
		case <-ctx.Done():
			return away, context.Cause(ctx)
		}
	}
}

// get reads a page of at most 16 MiB.
func (c *client) get(ctx context.Context, path string) ([]byte, error) {
	return c.call(ctx, http.MethodGet, path, nil)
}

func (c *client) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	res, err := c.do(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, api.StatusError{StatusCode: res.StatusCode, Status: res.Status, ErrorMessage: message(text)}
	}
	return text, nil
}

// lanes returns how many lanes a proxy has for loaded models, or 0 if it does not schedule or is
// not one.
func lanes(metrics []byte) int { return int(sum(metrics, "ollama_cacheproxy_lanes{", "")) }

// sum adds up the series whose lines begin with prefix and contain part.
func sum(metrics []byte, prefix, part string) float64 {
	total := 0.0
	for line := range strings.Lines(string(metrics)) {
		if !strings.HasPrefix(line, prefix) || !strings.Contains(line, part) {
			continue
		}
		line = strings.TrimSpace(line)
		if v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64); err == nil {
			total += v
		}
	}
	return total
}
