package contextstore

import (
	"context"
	"encoding/json"
	"time"
)

// MaxChain is how many links of one chain are kept, for comparison with a model.
const MaxChain = maxChain

// What states are kept by, for comparison with a model.
const (
	HalfLife  = halfLife
	TendEvery = tendEvery
)

// ParseHeader is parseHeader.
func ParseHeader(head []byte) (int, error) { return parseHeader(head) }

// ParseSide reads a side file of this name, and returns what it says and how that is written again.
func ParseSide(name string, text []byte) (s State, again []byte, err error) {
	entry, err := parseSide(name, text)
	if err != nil {
		return State{}, nil, err
	}
	again, err = json.Marshal(entry)
	return entry.State, again, err
}

// Tend looks after the files as the store does by and by, and takes none for too new to be settled.
func (f *Files) Tend() { f.tend(context.Background(), time.Now().Add(2*tendEvery), true) }

// SetBoot has the store say that the machine was started as id.
func (f *Files) SetBoot(id string) { f.boot = id }

// Index is the states of one owner, without files.
type Index struct{ group }

// NewIndex returns the index of these states.
func NewIndex(states []State) *Index {
	x := &Index{}
	for _, s := range states {
		x.group = x.insert(&file{side: side{State: s}})
	}
	return x
}

// Best is what Files.Best does, but for looking whether the file is there.
func (x *Index) Best(links []uint64) (State, int) {
	best, depth := x.best(links, 0)
	if best == nil {
		return State{}, 0
	}
	return best.State, depth
}

// NewFull returns a store that is full of these states, of which there are no files.
func NewFull(dir string, limits FileLimits, states []State) (*Files, error) {
	f, err := OpenFiles(dir, limits, nil)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range states {
		f.add(&file{side: side{State: s, Heat: heated(s.Uses, time.Now())}})
	}
	return f, nil
}
