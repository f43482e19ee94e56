// Package contextstore keeps what the proxy knows of prompts' prefixes, and the states that engines
// have of them.
//
// A Store knows, in memory, where and when a prefix was last seen, whether it may still be warm
// there, and how many tokens it has. Files keeps, on disk, what an engine has evaluated of a
// prompt, for an engine to continue from. Both enforce their own bounds, and know how their content
// becomes outdated. They do not fingerprint prompts (see package prefix), choose upstreams, talk to
// engines or interpret figures.
package contextstore

import (
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Sight is where and when a prompt was seen.
type Sight struct {
	Upstream uint16    // index of the upstream server
	Lane     uint16    // stands for a slot; 0 while the slots are not known
	Model    uint32    // from Store.Model
	At       time.Time // to the nanosecond, without location and monotonic reading
}

// Record is what is known of one link. The zero Record means nothing is known.
type Record struct {
	Sight // where it was last seen

	// Warm means that the model's load in which the link was last seen is not known to have ended.
	Warm bool
	// Tokens is how many tokens the prompt has up to and including this link; 0 if not known.
	Tokens int
}

// Store keeps what is known of links. Its methods may be called concurrently. None of them fails,
// or waits for anything but the store itself: a store may forget anything, and every caller must
// cope with that.
//
// Links are given as prefix makes them: from a prompt's first one on, and each hash stands for all
// links before it, too. The known part of a chain is a leading run of its links. To make room,
// links are dropped from the ends of chains, beginning with those that were put longest ago. Only
// Put makes a link newer; queries change nothing.
//
// All links of a chain belong to one model, since the first one's hash includes the model's name.
// If the name comes to mean another model, the links stay the same; Forget is for that.
type Store interface {
	// Model returns the number that stands for the model with this key, never 0. The same key has
	// the same number as long as the store remembers it: at least the 1024 models that were asked
	// for last. A model that is no longer remembered is forgotten as by Forget, and its number is
	// not used again. So ask for each request, and do not keep numbers.
	Model(key string) uint32

	// Match returns how many leading links are known, and the Record of the last of those, or the
	// zero Record.
	Match(links []prefix.Link) (depth int, rec Record)

	// Put records that a prompt with these links, from the first on, was seen. tokens is the token
	// count of the whole prompt, which is stored at the last link; 0 keeps what is known. Of a
	// chain that is too long, the store keeps the links nearest to the first. What was known under
	// another model is dropped. A sight whose model the store does not remember is ignored.
	Put(links []prefix.Link, s Sight, tokens int)

	// Cool records that the upstream's load of the model has ended (reload, eviction, restart):
	// what was warm there no longer is, until it is seen again. Model 0 means all models.
	Cool(upstream uint16, model uint32)

	// Forget records that the model was deleted or replaced: nothing that is known of its prompts
	// is true any more. Its number stays valid. Model 0 means all models.
	Forget(model uint32)

	// Stats returns counts for a page or a scrape.
	Stats() Stats
}

// Limits bound a store. If one of them is 0 or less, the store keeps nothing.
type Limits struct {
	Entries int   // links
	Bytes   int64 // memory for links
}

// Stats counts the content of a store.
type Stats struct {
	// Entries and Bytes are the present size, to be compared with Limits. They include links that
	// Forget has invalidated and that are still in memory; these are dropped when the same prompt
	// is seen again or when they are the oldest.
	Entries int
	Bytes   int64
	// Evictions counts links that were dropped to make room, since the store was made, including
	// invalidated ones.
	Evictions uint64
	Limits    Limits
}
