package doctor

import (
	"slices"

	"github.com/cespare/xxhash/v2"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// turnsOf returns a hash of each message's text by itself, whatever comes before it, as far as the
// links of the chain tell: texts that differ in their last few bytes alone may have the same. The
// leading message is left out where it is the only one that all turns have in common, the system
// prompt; whoever drops turns keeps that.
func turnsOf(c *prefix.Chain) []uint64 {
	var turns []uint64
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
			turns, last = append(turns, 0), l.Message
		}
		var d xxhash.Digest
		d.ResetWithSeed(turns[len(turns)-1])
		d.Write(l.Fine[:])
		turns[len(turns)-1] = d.Sum64() ^ uint64(l.Length)<<32 ^ uint64(l.Offset)
	}
	return turns
}

// fewestTurns is how many messages two prompts must have in common, one after the other, for the
// second to go on where the first was: short ones such as "yes" look alike.
const fewestTurns = 2

// drops reports whether the messages now are those before without some of the oldest, and with more
// at the end. The first message of both may be a system prompt, which stays.
func drops(before, now []uint64) bool {
	if len(before) == 0 || len(now) == 0 {
		return false
	}
	kept := 0
	if before[0] == now[0] {
		kept = 1
		if len(before) > 1 && len(now) > 1 && before[1] == now[1] {
			return false // nothing of the beginning is gone
		}
	}
	rest := now[kept:]
	for from := kept + 1; from+fewestTurns <= len(before); from++ {
		if n := len(before) - from; n < len(rest) && slices.Equal(before[from:], rest[:n]) {
			return true
		}
	}
	return false
}
