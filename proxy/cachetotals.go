package proxy

import (
	"log/slog"
	"maps"
	"strconv"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
)

// cacheTotals count what became of one kind of CacheUse since the proxy started, as /metrics does.
// What was not computed is counted here alone, and never as reused tokens.
type cacheTotals struct {
	Requests map[string]int `json:"requests"` // by result
	// Parts are inputs of embeddings, and whole answers.
	Hits      int   `json:"hits"`   // that were kept
	Misses    int   `json:"misses"` // that were computed
	Joined    int   `json:"joined"` // that another request was computing
	Bytes     int64 `json:"bytes"`  // of the kept parts, as they are stored
	Prompt    int   `json:"prompt_tokens"`
	Generated int   `json:"generated_tokens"`
	// Saved is how long the kept parts took when they were computed.
	Saved float64 `json:"seconds"`
}

// add counts a request.
func (t *cacheTotals) add(c *CacheUse) {
	if t.Requests == nil {
		t.Requests = map[string]int{}
	}
	t.Requests[c.Result]++
	t.Hits += c.Hits
	t.Misses += c.Misses
	t.Joined += c.Joined
	t.Bytes += c.Bytes
	t.Prompt += c.Prompt
	t.Generated += c.Generated
	t.Saved += c.Saved.Seconds()
}

// cached counts what was looked for, by kind: see CacheUse.
type cached map[string]cacheTotals

func (k cached) add(c *CacheUse) {
	if c != nil {
		t := k[c.Kind]
		t.add(c)
		k[c.Kind] = t
	}
}

// clone returns a copy that shares nothing, and has both kinds.
func (k cached) clone() cached {
	c := cached{CacheText: {}, CacheVectors: {}}
	maps.Copy(c, k)
	for kind, t := range c {
		t.Requests = map[string]int{
			CacheHit: 0, CachePartial: 0, CacheMiss: 0, CacheJoined: 0, CacheBypass: 0,
		}
		maps.Copy(t.Requests, k[kind].Requests)
		c[kind] = t
	}
	return c
}

// spared is the part of a request that was kept.
type spared struct {
	Cache     string  `json:"cache"` // CacheUse.Result
	Parts     int     `json:"parts,omitempty"`
	Kept      int     `json:"kept,omitempty"` // … of these, not computed
	Prompt    int     `json:"kept_prompt,omitempty"`
	Generated int     `json:"kept_generated,omitempty"`
	Saved     float64 `json:"saved,omitempty"` // ms
}

func sparedOf(c *CacheUse) *spared {
	if c == nil {
		return nil
	}
	return &spared{
		Cache: c.Result, Parts: c.Hits + c.Misses + c.Joined, Kept: c.Hits + c.Joined,
		Prompt: c.Prompt, Generated: c.Generated, Saved: ms(c.Saved),
	}
}

// attrs returns what the log line says: the result, how many of an embedding's inputs were kept or
// waited for, and how long what was kept had taken.
func (c *CacheUse) attrs(attrs []slog.Attr) []slog.Attr {
	if c == nil {
		return attrs
	}
	attrs = append(attrs, slog.String("cache", c.Result))
	if all := c.Hits + c.Misses + c.Joined; c.Kind == CacheVectors && all > 0 {
		text := strconv.Itoa(c.Hits+c.Joined) + "/" + strconv.Itoa(all)
		attrs = append(attrs, slog.String("cache_parts", text))
	}
	if c.Saved > 0 {
		attrs = append(attrs, slog.Float64("saved_s", c.Saved.Round(time.Millisecond).Seconds()))
	}
	return attrs
}

// storeEntry is the store of kept answers, in the content of pathAnswers and on the page.
type storeEntry struct {
	Entries *int64 `json:"entries"` // null: unknown
	Bytes   *int64 `json:"bytes"`   // null: unknown
	Limit   int64  `json:"limit_bytes"`
	Evicted uint64 `json:"evicted"`
	Expired uint64 `json:"expired"`
	Errors  uint64 `json:"errors"`
	Down    bool   `json:"down"` // it cannot be used at the moment
}

func (h *Handler) storeEntry() *storeEntry {
	if h.Answers == nil {
		return nil
	}
	return entryOf(h.Answers.Stats(), h.AnswersBytes)
}

func entryOf(s answers.Stats, limit int64) *storeEntry {
	known := func(n int64) *int64 {
		if n < 0 {
			return nil
		}
		return &n
	}
	return &storeEntry{
		Entries: known(s.Entries), Bytes: known(s.Bytes), Limit: limit,
		Evicted: s.Evicted, Expired: s.Expired, Errors: s.Errors, Down: s.Down,
	}
}

// pageAnswers is the page's data about what is kept; nil if nothing is.
type pageAnswers struct {
	Store     *storeEntry `json:"store"`
	Answers   string      `json:"answers"`    // the text of --cache-answers
	Vectors   string      `json:"embeddings"` // … and of --cache-embeddings
	Surviving int         `json:"surviving"`
	Survived  int64       `json:"surviving_bytes"`
}

func (h *Handler) pageAnswers() *pageAnswers {
	p := &pageAnswers{
		Store: h.storeEntry(), Answers: h.CacheAnswers.String(), Vectors: h.CacheEmbeddings.String(),
	}
	p.Surviving, p.Survived = h.Surviving()
	return p
}

// Surviving returns how many answers are kept, or under way, that go on without their clients, and
// how many bytes they have.
func (h *Handler) Surviving() (n int, bytes int64) {
	k := &h.kept
	k.mu.Lock()
	defer k.mu.Unlock()
	k.trim(time.Now())
	for _, a := range k.list {
		written, _, _ := a.flight.Progress()
		bytes += int64(written)
	}
	return len(k.list), bytes
}
