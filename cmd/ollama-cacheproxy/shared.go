package main

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/doctor"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/metrics"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/shared"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// sharedPrefix begins all keys of --shared, unless its URL says otherwise.
const sharedPrefix = "ollama-cacheproxy:shared:"

// together is what this proxy knows, and what it shares with others through --shared.
type together struct {
	seen contextstore.Store

	// Without --shared these are nil.
	conn     *valkeyconn.Conn
	prefixes *contextstore.Valkey // the same as seen
	limits   *shared.Limits
	learned  *shared.Learned

	handler atomic.Pointer[proxy.Handler] // knows the upstreams; nil until it is made
	known   chan struct{}                 // closed once it is made, or never will be
	settle  sync.Once                     // closes known
}

// knows notes which handler knows the upstreams.
func (t *together) knows(h *proxy.Handler) {
	t.handler.Store(h)
	t.settled()
}

func (t *together) settled() {
	t.settle.Do(func() {
		if t.known != nil {
			close(t.known)
		}
	})
}

// openShared opens what is shared.
func (s *serveCmd) openShared(log *slog.Logger) (*together, error) {
	limits := contextstore.Limits{Entries: s.StoreEntries, Bytes: s.StoreBytes}
	if s.Shared == "" {
		return &together{seen: contextstore.NewMemory(limits)}, nil
	}
	target, err := valkeyconn.Parse(s.Shared, sharedPrefix)
	if err != nil {
		return nil, valkeyconn.Wrong("--shared", s.Shared, err)
	}
	conn, err := valkeyconn.Open(target, valkeyconn.Options{
		Setting: "--shared",
		Gone:    "the Valkey server of --shared is gone; this proxy goes on with what it knows itself",
		Back:    "the Valkey server of --shared is back",
		Log:     log,
	})
	if err != nil {
		return nil, valkeyconn.Wrong("--shared", s.Shared, err)
	}
	t := &together{
		conn: conn, limits: shared.NewLimits(conn), learned: shared.NewLearned(conn), known: make(chan struct{}),
	}
	t.prefixes = contextstore.NewValkey(conn, limits, t.upstreamName, t.upstreamIndex)
	t.seen = t.prefixes
	return t, nil
}

// upstreamName returns the name of an upstream, by which other proxies know it, or "" if there is
// none with this index.
func (t *together) upstreamName(index uint16) string {
	if h := t.handler.Load(); h != nil {
		return h.UpstreamName(index)
	}
	return ""
}

// upstreamIndex is the inverse of upstreamName. It waits until the upstreams are known: what the stream
// has when this proxy starts would be passed over otherwise.
func (t *together) upstreamIndex(name string) (uint16, bool) {
	<-t.known
	if h := t.handler.Load(); h != nil {
		return h.UpstreamIndex(name)
	}
	return 0, false
}

// close tells the others what they do not know yet, if the server is there.
func (t *together) close() {
	if t.conn != nil {
		t.settled()
		t.limits.Close()
		t.learned.Close()
		t.prefixes.Close()
		t.conn.Close()
	}
}

// learnedEvery is how often what was learned of servers is written.
const learnedEvery = 30 * time.Second

// keepLearned begins with what was learned of the servers before, and keeps what is learned, until
// ctx ends.
func (t *together) keepLearned(ctx context.Context, h *proxy.Handler) {
	if t.learned == nil {
		return
	}
	if all, err := t.learned.LoadLearned(ctx); err == nil { // otherwise it is learned anew
		h.Learn(all)
	}
	written := map[string]string{}
	for ended := false; !ended; {
		select {
		case <-ctx.Done():
			ended = true
		case <-time.After(learnedEvery):
		}
		for name, text := range h.Learned() {
			if written[name] != string(text) {
				written[name] = string(text)
				t.learned.SaveLearned(name, text)
			}
		}
	}
}

// stats is for metrics.
func (t *together) stats() metrics.SharedStats {
	down, failed := t.conn.State()
	return metrics.SharedStats{
		Down: down, Errors: failed, Seen: t.prefixes.Shared(), Limits: t.limits.Stats(),
	}
}

// facts is for the verb doctor.
func (t *together) facts() (f doctor.Shared) {
	var err error
	if f.Since, err = t.conn.Why(); err != nil {
		f.Down, f.Error = true, err.Error()
	}
	limits := t.limits.Stats()
	f.Limited, f.Alone = limits.Asked, limits.Unanswered
	return f
}

// checkShared checks the URL.
func (s *serveCmd) checkShared() error {
	if s.Shared == "" {
		return nil
	}
	if _, err := valkeyconn.Parse(s.Shared, sharedPrefix); err != nil {
		return valkeyconn.Wrong("--shared", s.Shared, err)
	}
	return nil
}
