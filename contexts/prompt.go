package contexts

import "github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"

// prompt is one that was evaluated. The zero prompt is none.
type prompt struct {
	contents []uint64 // prefix.Chain.Contents
	upTo     []int32  // tokens up to and with each of them: estimates, but for the last
	owner    uint64
	model    string // its name, for people
}

// size returns how many tokens the prompt has.
func (p *prompt) size() int { return p.first(len(p.upTo)) }

// first returns how many tokens the prompt's first links have.
func (p *prompt) first(depth int) int {
	if depth == 0 {
		return 0
	}
	return int(p.upTo[depth-1])
}

// shared returns how many of the prompt's tokens are those that another one begins with.
func (p *prompt) shared(contents []uint64) int {
	return p.first(contextstore.Common(p.contents, contents))
}

// spread estimates how many of a prompt's tokens there are up to each link, by the bytes of text.
func spread(tokens int, bytes []int) []int32 {
	all := max(bytes[len(bytes)-1], 1)
	upTo := make([]int32, len(bytes))
	for i, n := range bytes {
		upTo[i] = int32(int64(tokens) * int64(n) / int64(all))
	}
	upTo[len(upTo)-1] = int32(tokens)
	return upTo
}

// stored is a state that begins like a request's prompt.
type stored struct {
	contextstore.State
	reach int  // tokens that the two have in common
	exact bool // all of the state's prompt is the beginning of the request's
}

// prompt returns whose state it is.
func (s stored) prompt() prompt {
	return prompt{s.Links, s.LinkTokens, s.Owner, s.Model}
}

// best returns the stored state that has the most in common with a request's prompt, and at most so
// many tokens; 0: any number. format "": of any format.
func (m *Manager) best(format string, most int, r Request) (stored, bool) {
	s, depth, ok := m.Files.Best(contextstore.Query{Format: format, Owner: r.Owner, Links: r.Contents, Tokens: most})
	if !ok {
		return stored{}, false
	}
	best := stored{State: s, exact: depth == len(s.Links)}
	p := best.prompt()
	best.reach = p.first(depth)
	return best, best.reach >= leastTokens
}

// usualText is how many tokens a byte of English text has, about.
const usualText = 0.25

// estimate returns how many tokens the request's prompt has, about.
func (r *Request) estimate() int { return int(float64(r.Bytes[len(r.Bytes)-1]) * usualText) }
