package storetest

import (
	"fmt"
	"sync"
	"testing"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

func testRandom(t *testing.T, s contextstore.Store) {
	Drive(t, s, Costs{}, Script(1, 1000))
}

// testConcurrent has several goroutines drive one store, each with its own prompts, models and
// upstreams: none affects the others.
func testConcurrent(t *testing.T, s contextstore.Store) {
	var wg sync.WaitGroup
	for space := 1; space <= 4; space++ {
		wg.Go(func() {
			if err := drive(s, Costs{}, Script(uint64(space), 300), space); err != nil {
				t.Errorf("with others beside it, %v", err)
			}
		})
	}
	wg.Wait()
}

// testConcurrentFull has several goroutines use the same prompts in a store that is too small for
// them.
func testConcurrentFull(t *testing.T, s contextstore.Store) {
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			script := source(Script(uint64(worker), 2000))
			for len(script) > 0 {
				links := chain(script.next(5), script.next(chains))
				n, model := script.next(chainLinks), s.Model(fmt.Sprint(script.next(3)))
				switch script.next(8) {
				default:
					s.Put(links, contextstore.Sight{Upstream: uint16(worker), Model: model}, n)
				case 2:
					s.Cool(uint16(worker), model)
				case 3:
					s.Forget(model)
				case 4:
					if script.next(16) == 0 {
						s.Forget(0)
					}
				}
				if depth, rec := s.Match(links); depth > len(links) || depth > 0 && rec.Model == 0 {
					t.Errorf("Match is %d, %+v", depth, rec)
				}
				if st := s.Stats(); st.Entries > st.Limits.Entries || st.Bytes > st.Limits.Bytes || st.Bytes < 0 {
					t.Errorf("beyond its limits: %+v", st)
				}
			}
		})
	}
	wg.Wait()
	put(s, chain(9, 0), "m")
	wantDepth(t, s, chain(9, 0), chainLinks)
}
