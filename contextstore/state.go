package contextstore

import "time"

// State describes one file with the state (the keys and values) that an engine has after evaluating
// a prompt. States are handed out by value; their slices are shared and must not be modified.
type State struct {
	// ID is the name of the file in the store's folder: random, never chosen by a caller.
	ID string `json:"id"`
	// Format says which engines can read the file: those with the same Format. Never empty.
	Format string `json:"format"`
	// Model is the model's name, for display only.
	Model string `json:"model,omitempty"`
	// Owner is who may have it attached, from Files.OwnerOf. 0: nobody in particular.
	Owner uint64 `json:"owner,omitempty"`

	// Links are the fingerprints of the prompt's links, from the first on, without the options that
	// the model was loaded with (prefix.Chain.Contents). Each stands for all before it, too. Never
	// empty.
	Links Chain `json:"links"`
	// LinkTokens is the estimated number of tokens up to and including each link. It is as long as
	// Links, or empty if not known.
	LinkTokens Counts `json:"link_tokens,omitempty"`
	// Tokens is how many tokens the file has: the prompt's, and those generated after it.
	Tokens int `json:"tokens"`
	// Whole means that the state is of use only to a prompt that has all of its links: what the
	// engine keeps of a sliding window, or of a recurrent model, cannot be cut back.
	Whole bool `json:"whole,omitempty"`

	// Bytes is the size of the file.
	Bytes int64 `json:"bytes"`
	// Cost is how long evaluating all of it again would take.
	Cost time.Duration `json:"cost_ns"`

	Made time.Time `json:"made"`
	Used time.Time `json:"used"` // when it was last of use; at first Made
	Uses int       `json:"uses"` // how often it was asked for, including when it was saved
}

// covers reports whether s is of use for everything that o is of use for, at no more than twice the
// bytes to read. The state of a whole conversation does not cover that of its system prompt: other
// conversations begin with it, too, and should not have to read all of this one. shared is how many
// leading links the two share.
func (s *State) covers(o *State, shared int) bool {
	if s.Whole != o.Whole || s.Whole && len(s.Links) != len(o.Links) {
		return false
	}
	return shared == len(o.Links) && s.Bytes <= 2*o.Bytes
}
