package storetest

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Drive applies script to the empty store s and to a simple model of it, and fails t where they
// differ. Any bytes are a valid script. With the zero Costs, Stats are not compared, and s must be
// large enough to drop nothing.
func Drive(t testing.TB, s contextstore.Store, costs Costs, script []byte) {
	t.Helper()
	if err := drive(s, costs, script, 0); err != nil {
		t.Fatal(err)
	}
}

// Script returns bytes for Drive, enough for about n operations. The same seed gives the same
// script.
func Script(seed uint64, operations int) []byte {
	random := rand.New(rand.NewPCG(seed, 0))
	script := make([]byte, operations*5)
	for i := range script {
		script[i] = byte(random.Uint32())
	}
	return script
}

// Scripts of one store use these prompts: a tree that branches at its first four links, then
// chains.
const (
	branches   = 4
	chains     = 1 << branches
	chainLinks = 10
)

// chain returns the links of one of the prompts. Those of different spaces share nothing.
func chain(space, c int) []prefix.Link {
	links := make([]prefix.Link, chainLinks)
	for i := range links {
		shared := c & (1<<min(i, branches) - 1)
		links[i].Hash = uint64(space)<<32 | uint64(i)<<16 | uint64(shared)<<8 | 1
	}
	return links
}

// source is where a script's numbers come from. After its end there are zeros.
type source []byte

// next returns a number below n.
func (s *source) next(n int) int {
	if len(*s) == 0 {
		return 0
	}
	x := int((*s)[0])
	*s = (*s)[1:]
	return x % n
}

// drive is Drive with prompts, upstreams and models of its own space, so that several can drive one
// store at once. Only in space 0 are all models forgotten.
func drive(s contextstore.Store, costs Costs, script source, space int) error {
	model := &naive{limits: s.Stats().Limits, costs: costs, models: map[uint32]bool{}}
	number := func(i int) uint32 {
		id := s.Model(fmt.Sprintf("space %d model %d", space, i))
		model.models[id] = true
		return id
	}
	upstream := func() uint16 { return uint16(4*space + script.next(4)) }
	at := time.Unix(1_700_000_000, 123_456_789)

	for step := 0; len(script) > 0; step++ {
		var did string
		switch op := script.next(7); {
		case op < 5:
			c, n := script.next(chains), script.next(chainLinks+1)
			sight := contextstore.Sight{Upstream: upstream(), Lane: uint16(script.next(3)), At: at.Add(time.Duration(step))}
			if m := script.next(5); m < 4 {
				sight.Model = number(m) // otherwise a sight without a model
			}
			tokens := script.next(3) * (step + 1)
			s.Put(chain(space, c)[:n], sight, tokens)
			model.Put(chain(space, c)[:n], sight, tokens)
			did = fmt.Sprintf("Put chain %d[:%d] %+v tokens %d", c, n, sight, tokens)
		default:
			var id uint32
			m := script.next(5)
			if m < 4 {
				id = number(m)
			}
			if op == 5 {
				up := upstream()
				s.Cool(up, id)
				model.Cool(up, id)
				did = fmt.Sprintf("Cool upstream %d model %d", up, id)
			} else if m < 4 || space == 0 {
				s.Forget(id)
				model.Forget(id)
				did = fmt.Sprintf("Forget model %d", id)
			}
		}
		if err := compare(s, model, space); err != nil {
			return fmt.Errorf("step %d, after %s: %w", step, did, err)
		}
	}
	return nil
}

// compare returns how the store differs from its model.
func compare(s contextstore.Store, model *naive, space int) error {
	for c := range chains {
		links := chain(space, c)
		depth, rec := s.Match(links)
		wantDepth, wantRec := model.Match(links)
		if depth != wantDepth || !equal(rec, wantRec) {
			return fmt.Errorf("Match of chain %d is %d, %+v; want %d, %+v", c, depth, rec, wantDepth, wantRec)
		}
	}
	if model.costs != (Costs{}) && s.Stats() != model.Stats() {
		return fmt.Errorf("Stats are %+v; want %+v", s.Stats(), model.Stats())
	}
	return nil
}

// equal compares records, their times as instants.
func equal(a, b contextstore.Record) bool {
	at := a.At.Equal(b.At)
	a.At, b.At = time.Time{}, time.Time{}
	return at && a == b
}
