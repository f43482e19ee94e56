package ollamasim

import "slices"

// Which slot a request is given, and what it can reuse there.

// hostCache is llama-server's prompt cache in host memory.
type hostCache struct {
	entries []kept // oldest first
	bytes   int64
}

// checkpoint is a copy of what the layers with a sliding window had after so many tokens. low is
// where llama-server believes it to begin, though only the window before its end is in it.
type checkpoint struct{ low, tokens int }

const (
	maxCheckpoints = 32  // per slot; beyond that the oldest is dropped (llama-server first thins out those that are close together)
	similarity     = 0.1 // the part of a prompt that a slot must exceed to be chosen for it
)

// place gives a request a free slot, of which there must be one.
func (r *runner) place(q *request) {
	l, save := r.choose(q.prompt)
	if save && r.caches() && !q.embed {
		r.host.save(r, l.kept)
		if k, ok := r.host.load(r, l.kept, q.prompt); ok {
			l.kept = k
			if window := r.model.Window; window > 0 {
				l.low = max(l.low, len(l.tokens)-window)
			}
			r.server.stats.Restored++
		}
	}
	l.request, q.slot, l.since, l.plan = q, l, r.server.clock.Now(), 0
	if r.caches() && !q.embed {
		// --cache-idle-slots, which is on by default: the content of the other slots is copied.
		for _, other := range r.slots {
			if other.request == nil {
				r.host.save(r, other.kept)
			}
		}
	}
	n := 0
	if !q.embed {
		n = r.reusable(l, q.prompt)
	}
	l.tokens = l.tokens[:n:n]
	if n == 0 {
		l.kept = kept{}
	}
	q.reused, q.done = n, n
	r.server.stats.Reused += int64(n)
}

// choose returns the slot for a prompt, and whether its content is to be saved.
func (r *runner) choose(prompt []token) (l *slot, save bool) {
	most := 0
	for _, x := range r.slots {
		if x.request != nil {
			continue
		}
		n := common(x.tokens, prompt)
		if r.server.era == eraA { // the longest match, even if empty; the first of equal ones
			if l == nil || n > most {
				l, most = x, n
			}
		} else if n > most && float64(n) > similarity*float64(len(prompt)) {
			l, most = x, n
		}
	}
	if l != nil {
		return l, 2*most < len(l.tokens)
	}
	for _, x := range r.slots { // the least recently used; of those never used the last
		if x.request == nil && (l == nil || x.used <= l.used) {
			l = x
		}
	}
	return l, true
}

// caches reports whether there is a host cache.
func (r *runner) caches() bool {
	ram := r.server.config.CacheRAMMiB
	return r.server.era != eraA && (ram == nil || *ram != 0)
}

// limit is the host cache's size in bytes; 0: none.
func (s *Server) limit() int64 {
	if ram := s.config.CacheRAMMiB; ram != nil {
		return int64(max(*ram, 0)) << 20
	}
	return 8192 << 20
}

// bytes is the size in the host cache. Of the layers with a window only the window is copied.
func (r *runner) bytes(k kept) int64 {
	window := min(len(k.tokens), r.model.Window)
	for _, c := range k.checkpoints {
		window += min(c.tokens, r.model.Window)
	}
	return int64(len(k.tokens))*int64(r.model.TokenBytes) + int64(window)*int64(r.model.WindowTokenBytes)
}

// save adds a copy of a slot's content, unless an entry has it already. Entries that are a part of
// it are dropped, and the oldest ones if there is no room; content larger than the limit is not
// kept. If the memory is unlimited, there is a limit of tokens: the context of all slots.
func (h *hostCache) save(r *runner, k kept) {
	size, limit := r.bytes(k), r.server.limit()
	if len(k.tokens) == 0 || limit > 0 && size > limit {
		return
	}
	for _, e := range h.entries {
		if common(e.tokens, k.tokens) == len(k.tokens) {
			return
		}
	}
	h.entries = slices.DeleteFunc(h.entries, func(e kept) bool {
		part := common(e.tokens, k.tokens) == len(e.tokens)
		if part {
			h.bytes -= r.bytes(e)
		}
		return part
	})
	k.checkpoints = slices.Clone(k.checkpoints)
	h.entries = append(h.entries, k)
	h.bytes += size
	tokens := 0
	if limit == 0 {
		for _, e := range h.entries {
			tokens += len(e.tokens)
		}
	}
	for limit > 0 && h.bytes > limit || limit == 0 && len(h.entries) > 0 && tokens > r.options.numCtx*len(r.slots) {
		tokens -= len(h.entries[0].tokens)
		h.bytes -= r.bytes(h.entries[0])
		h.entries = slices.Delete(h.entries, 0, 1)
	}
}

// load takes out the entry that has more of the prompt than the slot, and of which more is kept: at
// least a quarter of its own tokens, and a larger share than of the slot's.
func (h *hostCache) load(r *runner, k kept, prompt []token) (kept, bool) {
	most := common(k.tokens, prompt)
	share := -1.0
	if len(k.tokens) > 0 {
		share = float64(most) / float64(len(k.tokens))
	}
	best := -1
	for i, e := range h.entries {
		n := common(e.tokens, prompt)
		if s := float64(n) / float64(len(e.tokens)); s >= 0.25 && s > share && n > most {
			best, most, share = i, n, s
		}
	}
	if best < 0 {
		return k, false
	}
	k = h.entries[best]
	h.bytes -= r.bytes(k)
	h.entries = slices.Delete(h.entries, best, best+1)
	return k, true
}

// reusable returns how many of the prompt's tokens the slot has, and prepares the slot for the
// rest. At least one token is always evaluated.
func (r *runner) reusable(l *slot, prompt []token) int {
	n, window := common(l.tokens, prompt), r.model.Window
	switch {
	case r.server.era == eraA:
		n = min(n, len(prompt)-1)
		// Ollama's own cache must have the whole window before the place to continue from.
		if window > 0 && window < r.options.numCtx && max(0, n-window) < l.low {
			return 0
		}
	case window > 0 && n > 0:
		n = l.goBack(n, window, n == len(prompt))
	}
	return max(min(n, len(prompt)-1), 0)
}

// goBack makes a slot of llama-server go back to its first n tokens, whether or not that is the
// whole prompt, and returns to how many it can: the layers with a window have lost what came
// before, and a checkpoint must replace it.
func (l *slot) goBack(n, window int, all bool) int {
	threshold := n - window
	if all {
		threshold--
	}
	if threshold = max(threshold, 0); l.low >= threshold {
		i := len(l.checkpoints) - 1
		for ; i >= 0; i-- {
			if c := l.checkpoints[i]; c.tokens-1 <= n && (c.low < threshold || c.low == 0) {
				break
			}
		}
		if i < 0 {
			return 0
		}
		c := l.checkpoints[i]
		l.low, n = max(c.low, c.tokens-window), min(n, max(c.low+1, c.tokens-1))
	}
	beyond := func(c checkpoint) bool { return c.tokens-1 > n }
	l.checkpoints = slices.DeleteFunc(slices.Clone(l.checkpoints), beyond)
	return n
}

// checkpoint makes a checkpoint before a batch with n tokens of the prompt, where llama-server
// does, and returns how many tokens of it the batch may have: batches end where the next checkpoint
// belongs, at 4 tokens and at 4 and a batch before the prompt's end.
func (l *slot) checkpoint(q *request, n, batch, window int) int {
	all, at := len(q.prompt), q.done
	for _, before := range []int{4 + batch, 4} {
		if end := all - min(batch, before); at < end && end < at+n {
			n = end - at
		}
	}
	if l.low = max(l.low, at-ring(window, batch)); at == 0 || all >= at+n+batch {
		return n
	}
	l.checkpoints = slices.DeleteFunc(l.checkpoints, func(c checkpoint) bool { return c.tokens == at })
	if l.checkpoints = append(l.checkpoints, checkpoint{l.low, at}); len(l.checkpoints) > maxCheckpoints {
		l.checkpoints = slices.Delete(l.checkpoints, 0, 1)
	}
	return n
}

// ring is how many tokens the layers with a window have room for in llama-server.
func ring(window, batch int) int { return (window + batch + 255) / 256 * 256 }

// lower records what the layers with a window have lost after all tokens were computed.
func (l *slot) lower(r *runner) {
	window := r.model.Window
	switch {
	case window == 0 || window >= r.options.numCtx:
	case r.server.era != eraA:
		l.low = max(l.low, len(l.tokens)-ring(window, max(r.options.numBatch, 1)))
	default:
		if len(r.slots) > 1 {
			window++
		}
		l.low = max(l.low, len(l.tokens)-1-window)
	}
}
