package contexts

import "github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"

// prompt is an evaluated prompt. The zero prompt is none.
type prompt struct {
	contents []uint64 // prefix.Chain.Contents
	upTo     []int32  // tokens up to and including each of them: estimates, except for the last
	owner    uint64
	model    string // its name, for display
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

// shared returns how many of the prompt's tokens another one begins with.
func (p *prompt) shared(contents []uint64) int {
	return p.first(contextstore.Common(p.contents, contents))
}

// spread estimates how many tokens a prompt has up to each link, from the bytes of text.
func spread(tokens int, bytes []int) []int32 {
	all := max(bytes[len(bytes)-1], 1)
	upTo := make([]int32, len(bytes))
	for i, n := range bytes {
		upTo[i] = int32(int64(tokens) * int64(n) / int64(all))
	}
	upTo[len(upTo)-1] = int32(tokens)
	return upTo
}

// stored is a state that shares its beginning with a request's prompt.
type stored struct {
	contextstore.State
	reach int  // tokens that the two share
	exact bool // the state's whole prompt is the beginning of the request's
}

// prompt returns the prompt of the state.
func (s stored) prompt() prompt {
	return prompt{s.Links, s.LinkTokens, s.Owner, s.Model}
}

// best returns the stored state that shares most with a request's prompt and has at most so many
// tokens (0: any number). format "" means any format.
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

// usualText is how many tokens a byte of English text has, roughly.
const usualText = 0.25

// estimate estimates how many tokens the request's prompt has.
func (r *Request) estimate() int { return int(float64(r.Bytes[len(r.Bytes)-1]) * usualText) }
