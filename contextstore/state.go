package contextstore

import "time"

// State is what is known of one file with the state (the keys and values) that an engine has after
// it has evaluated a prompt. States are handed out by value; their slices are shared and not to be
// modified.
type State struct {
	// ID is the name of the file in the store's folder: random, never chosen by a caller.
	ID string `json:"id"`
	// Format says which engines can read the file: those with the very same one. Never empty.
	Format string `json:"format"`
	// Model is the model's name, for people only.
	Model string `json:"model,omitempty"`
	// Owner is who may have it attached, from Files.OwnerOf. 0: nobody in particular.
	Owner uint64 `json:"owner,omitempty"`

	// Links are the fingerprints of the prompt's links, from the first on, without what the model
	// was loaded with (prefix.Chain.Contents). Each stands for all before it, too. Never empty.
	Links Chain `json:"links"`
	// LinkTokens is how many tokens the prompt has up to and with each link, estimated. Empty: not
	// known; else as long as Links.
	LinkTokens Counts `json:"link_tokens,omitempty"`
	// Tokens is how many tokens the file has: those of the prompt, and those generated after it.
	Tokens int `json:"tokens"`
	// Whole says that the state is of use only to a prompt that has all of its links: what the
	// engine keeps of a sliding window, or of a recurrent model, cannot be cut back.
	Whole bool `json:"whole,omitempty"`

	// Bytes is the size of the file.
	Bytes int64 `json:"bytes"`
	// Cost is how long it would take to evaluate all of it again.
	Cost time.Duration `json:"cost_ns"`

	Made time.Time `json:"made"`
	Used time.Time `json:"used"` // when it was last of use; from the beginning Made
	Uses int       `json:"uses"` // how often it was asked for, the time when it was saved included
}

// covers reports whether whatever o is of use for, s is of use for, too, at no more than twice the
// bytes to read. A state of a whole conversation does not make that of its system prompt superfluous:
// others begin with that as well, and are not to read all of the conversation for it. shared is how
// many leading links the two have in common.
func (s *State) covers(o *State, shared int) bool {
	if s.Whole != o.Whole || s.Whole && len(s.Links) != len(o.Links) {
		return false
	}
	return shared == len(o.Links) && s.Bytes <= 2*o.Bytes
}
