// Package contextstore keeps what the proxy knows of prompts' prefixes, and the states that engines
// have of them.
//
// A Store has, in memory, where a prefix was last seen and when, whether it may still be warm there,
// and how many tokens it has. Files has, on disk, what an engine had evaluated of a prompt, for an
// engine to go on from. Both own their bounds and the ways in which what they have stops being true.
// They do not fingerprint prompts (see package prefix), choose upstreams, talk to engines or judge
// what a figure means.
package contextstore

import (
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Sight says where and when a prompt was seen.
type Sight struct {
	Upstream uint16    // index of the upstream server
	Lane     uint16    // stand-in for a slot; 0 while nothing is known of slots
	Model    uint32    // from Store.Model
	At       time.Time // kept to the nanosecond, without location and monotonic reading
}

// Record is what is known of one link. The zero Record: nothing.
type Record struct {
	Sight // where it was last seen

	// Warm: nothing is known to have ended the load of the model in which the link was last seen.
	Warm bool
	// Tokens is how many tokens the prompt has up to and with this link. 0: not known.
	Tokens int
}

// Store keeps what is known of links. Its methods may be called concurrently. None of them fails, or waits for anything but
// the store itself: what a store cannot keep, it does not know, and every caller must do without.
//
// Links are given as prefix makes them: from a prompt's first on, and each hash stands for all links before it, too. What is
// known of a chain is a leading run of its links. Links are dropped to make room from the ends of chains, those first that
// were put longest ago. Only Put makes a link newer; to ask changes nothing.
//
// The links of a chain are all of one model, since the first one's hash has the model's name in it. When the name comes to
// mean another model the links stay the same: Forget is for that.
type Store interface {
	// Model returns the number that stands for the model with this key, never 0. The same key has the same number for as
	// long as the store remembers it: at least 1024 models, those that were asked for last. A model that it no longer
	// remembers is forgotten as by Forget, and its number is not used again. So ask for each request, and keep no number.
	Model(key string) uint32

	// Match returns how many leading links are known, and what is known of the last of those. The zero Record if none is.
	Match(links []prefix.Link) (depth int, rec Record)

	// Put notes that a prompt with these links, from the first on, was seen. tokens is the token count of the whole prompt,
	// which is stored at the last link; 0 leaves what is known. Of a chain that is too long, the store keeps the links
	// nearest to the first. What was known under another model is dropped. A sight whose model the store does not
	// remember is not noted.
	Put(links []prefix.Link, s Sight, tokens int)

	// Cool says that the upstream's load of the model has ended (reload, eviction, restart): what was warm there is not
	// any more, until it is seen again. Model 0 means all models.
	Cool(upstream uint16, model uint32)

	// Forget says that the model was deleted or re-created: nothing that is known of its prompts is true any more. Its
	// number stays valid. Model 0 means all models.
	Forget(model uint32)

	// Stats returns counts for a page or a scrape.
	Stats() Stats
}

// Limits bound a store. With one of them 0 or less it keeps nothing.
type Limits struct {
	Entries int   // links
	Bytes   int64 // memory for links
}

// Stats counts what a store holds.
type Stats struct {
	// Entries and Bytes are what is held, against Limits. They include links that Forget made unknown and that are still
	// in memory: these go when the same prompt is seen again or when they are the oldest.
	Entries int
	Bytes   int64
	// Evictions counts links that were dropped to make room, since the store was made: unknown ones, too.
	Evictions uint64
	Limits    Limits
}
