// Package prefix turns the body of a request into a chain of cumulative fingerprints of the prompt
// that Ollama will render from it: first the runner, then the settings of the whole prompt, then
// message by message, and within a message block by block. Two requests have as many leading links
// in common as their prompts share text, to within one block.
//
// The package is pure: it knows no server and no template, keeps no text, and does no I/O. So some
// prompts share less than their chains, because of their template: it may write tools or the system
// prompt into the last user message (Mistral, Llama 3.1), move later system messages to the front
// (Qwen, Gemma 3, Command R), or leave out the thinking of earlier turns (Qwen 3). Other prompts
// share more than their chains, because think, a suffix or an image is rendered late.
package prefix

// Part is the kind of a link.
type Part uint8

const (
	Runner   Part = iota // the model and its runner options: one link, always the first
	Settings             // template, think, raw, suffix, context: one link, always the second
	Tools                // a tool, after the leading system messages
	Head                 // a message's role and what is rendered before its text: images, names, thinking
	Block                // a full block of a message's text
	Tail                 // the rest of a message's text, its tool calls and its end
)

// String names the part as logs and pages show it.
func (p Part) String() string {
	return [...]string{"options", "settings", "tools", "message", "text", "text"}[p]
}

// Fines is how many parts of equal length the block of a link is divided into for Link.Fine.
const Fines = 16

// Link is one cumulative fingerprint: links with equal Hashes mean equal prompts up to there.
type Link struct {
	Hash uint64 // never 0

	// Bytes is the length of all messages' text up to and including this link (without the
	// template's text and images), to estimate tokens. Here and below, text is measured as JSON
	// with the fewest escapes.
	Bytes int
	// Offset is where this link's text begins in the message's text, in bytes; 0 except for Block
	// and Tail.
	Offset int
	// Length is the length of this link's text, in bytes.
	Length int32
	// Message is the message's index, counted as Ollama does when it renders: a system prompt
	// outside the messages is message 0. It is -1 for Runner and Settings, and the next message's
	// index for Tools.
	Message int32
	Part    Part
	// Fine has eight bits of a hash for each sixteenth of the block that begins at Offset, over the
	// block up to there. (A Tail's sixteenths are as long as those of a full block there; the bits
	// past its end are 0.) They show in which sixteenth two blocks diverge.
	Fine [Fines]uint8
}

// Chain is the list of a request's links, beginning with the runner.
type Chain struct {
	Links []Link
	// Runner are the options of the first link.
	Runner Options
	// Messages and Images are the numbers of messages and images in the prompt.
	Messages, Images int
	// Leading is the number of system messages at the start of the prompt. Inserted is the index of
	// the last one that comes after another message, or 0: most templates render those at the start
	// of the prompt.
	Leading, Inserted int
	// Conversation is a fingerprint of the model and of the start of the conversation (the heads of
	// its first system message and of its first other message), without the tools and the options.
	// All requests of a conversation have the same one.
	Conversation uint64
	// Opening is the same for the first of these heads only: prompts that begin with the same text
	// have the same one.
	Opening uint64
}

// HasPrompt reports whether there is more than a runner and settings. A request without a prompt
// only loads its model, or is for embeddings.
func (c *Chain) HasPrompt() bool { return len(c.Links) > 2 }

// Leaf returns the last link's hash: the fingerprint of the whole prompt. 0 for an empty chain.
func (c *Chain) Leaf() uint64 {
	if len(c.Links) == 0 {
		return 0
	}
	return c.Links[len(c.Links)-1].Hash
}

// Contents returns the fingerprints that the links would have if the request stated no runner
// options. Prompts can be compared by them whatever context length and other options each request
// needs. Like Hash, none of them is 0.
func (c *Chain) Contents() []uint64 {
	runner := c.Runner.hash()
	contents := make([]uint64, len(c.Links))
	for i, l := range c.Links {
		contents[i] = max(l.Hash^runner, 1)
	}
	return contents
}

// Restate changes the chain to that of the same prompt for a runner with other options, of the same
// model.
func (c *Chain) Restate(o Options) {
	o.Model = c.Runner.Model
	change := c.Runner.hash() ^ o.hash()
	for i := range c.Links {
		c.Links[i].Hash = max(c.Links[i].Hash^change, 1)
	}
	c.Runner = o
}

// Bytes returns the length of the prompt's text.
func (c *Chain) Bytes() int {
	if len(c.Links) == 0 {
		return 0
	}
	return c.Links[len(c.Links)-1].Bytes
}
