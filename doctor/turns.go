package doctor

import (
	"slices"

	"github.com/cespare/xxhash/v2"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// turn is a message of a prompt.
type turn struct {
	hash uint64 // of its text alone, without what comes before it
	end  int    // bytes of the prompt's text up to the message's end
}

// turnsOf returns the messages of a prompt, as seen by the links of its chain: texts that differ
// only in their last few bytes look alike.
func turnsOf(c *prefix.Chain) []turn {
	turns := make([]turn, 0, min(c.Messages, maxTurns))
	last := int32(-1)
	for i := range c.Links {
		l := &c.Links[i]
		if l.Part != prefix.Block && l.Part != prefix.Tail {
			continue
		}
		if l.Message != last {
			if len(turns) == maxTurns {
				break
			}
			turns, last = append(turns, turn{}), l.Message
		}
		t := &turns[len(turns)-1]
		var d xxhash.Digest
		d.ResetWithSeed(t.hash)
		d.Write(l.Fine[:])
		t.hash, t.end = d.Sum64()^uint64(l.Length)<<32^uint64(l.Offset), l.Bytes
	}
	return turns
}

// fewestTurns is how many consecutive messages two prompts must share for the second to continue
// the first, since short ones such as "yes" look alike.
const fewestTurns = 2

// Moved is the text that a prompt shares with an earlier one, but at a later offset.
type Moved struct {
	Bytes int // of text that has moved; 0: none has
	After int // of text after it, which is new
}

// moved returns what has moved if the current messages are the previous ones without some of the
// oldest, and with more at the end. The first message of both may be a system prompt, which stays.
func moved(before, now []turn) Moved {
	same := func(a, b turn) bool { return a.hash == b.hash }
	if len(before) == 0 || len(now) == 0 {
		return Moved{}
	}
	kept, start := 0, 0
	if same(before[0], now[0]) {
		kept, start = 1, now[0].end
		if len(before) > 1 && len(now) > 1 && same(before[1], now[1]) {
			return Moved{} // nothing of the beginning is gone
		}
	}
	rest := now[kept:]
	for from := kept + 1; from+fewestTurns <= len(before); from++ {
		if n := len(before) - from; n < len(rest) && slices.EqualFunc(before[from:], rest[:n], same) {
			end := rest[n-1].end
			return Moved{Bytes: end - start, After: now[len(now)-1].end - end}
		}
	}
	return Moved{}
}
