// Package prefix turns the body of a request into a chain of cumulative fingerprints of the prompt that Ollama will render
// from it: the runner, what changes the whole prompt, then message by message, and within a message block by block. Two
// requests have as many leading links in common as their prompts share text, to within one block.
//
// It is pure: it knows no server and no template, keeps no text, and does no I/O. So there are templates by which prompts
// share less than their chains: those that write tools or the system prompt into the last user message (Mistral, Llama
// 3.1), that gather later system messages at the front (Qwen, Gemma 3, Command R), or that leave out the thinking of
// earlier turns (Qwen 3). And prompts share more than their chains where think, a suffix or an image is rendered late.
package prefix

// Part says what a link stands for.
type Part uint8

const (
	Runner   Part = iota // the model and the options that a loaded model has: one link, always the first
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

// Link is one cumulative fingerprint: two links with the same Hash stand for the same prompt up to there.
type Link struct {
	Hash uint64 // never 0

	// Bytes is how many bytes of text all messages have up to and with this link (without what templates add, without
	// images), so that tokens can be estimated. Here and below text counts as JSON spells it, with the fewest escapes.
	Bytes int
	// Offset is where in the message's text this link's own text begins, in bytes; 0 for other parts than Block and Tail.
	Offset int
	// Length is how many bytes of the message's text are this link's own.
	Length int32
	// Message is the message's index, as Ollama counts them when it renders: a system prompt beside the messages counts as
	// message 0. -1 for Runner and Settings, and the next message's index for Tools.
	Message int32
	Part    Part
	// Fine has, for each sixteenth of the block that begins at Offset, eight bits of a hash of the block up to there (a
	// Tail's sixteenths are as long as those of a full block there; the bits past its end are 0). They tell within which
	// sixteenth two blocks differ.
	Fine [Fines]uint8
}

// Chain is a request's links, from the runner on.
type Chain struct {
	Links []Link
	// Runner is what the first link stands for.
	Runner Options
	// Messages is how many messages the prompt has; Images is how many images.
	Messages, Images int
	// Leading is how many system messages the prompt begins with; Inserted is the index of the last
	// one that comes after another message, 0 if there is none: most templates render such ones at
	// the prompt's start.
	Leading, Inserted int
	// Conversation is a fingerprint of the model and of how the conversation begins (the heads of its first system and first
	// other message), whatever the tools and the options: requests of one conversation have the same.
	Conversation uint64
	// Opening is the same for the first of these heads alone: prompts that begin with the same text have the same.
	Opening uint64
}

// HasPrompt reports whether there is more than a runner and settings: a request without only loads its model, or is for embeddings.
func (c *Chain) HasPrompt() bool { return len(c.Links) > 2 }

// Leaf returns the last link's hash: the fingerprint of the whole prompt. 0 for an empty chain.
func (c *Chain) Leaf() uint64 {
	if len(c.Links) == 0 {
		return 0
	}
	return c.Links[len(c.Links)-1].Hash
}

// Contents returns the fingerprints of the links as they would be if the request stated no runner
// options: what the prompts of two requests have in common whatever context length and the like the
// model is loaded with for each. Like Hash, none of them is 0.
func (c *Chain) Contents() []uint64 {
	runner := c.Runner.hash()
	contents := make([]uint64, len(c.Links))
	for i, l := range c.Links {
		contents[i] = max(l.Hash^runner, 1)
	}
	return contents
}

// Restate makes it the chain of the same prompt for a runner with other options, of the same model.
func (c *Chain) Restate(o Options) {
	o.Model = c.Runner.Model
	change := c.Runner.hash() ^ o.hash()
	for i := range c.Links {
		c.Links[i].Hash = max(c.Links[i].Hash^change, 1)
	}
	c.Runner = o
}

// Bytes returns how many bytes of text the prompt has.
func (c *Chain) Bytes() int {
	if len(c.Links) == 0 {
		return 0
	}
	return c.Links[len(c.Links)-1].Bytes
}
