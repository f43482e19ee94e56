package contextstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// looseAge is how old a file must be that belongs to no state until Verify mentions it: until then
// it may be one that is being written.
const looseAge = 10 * time.Minute

// Problem is something in a store's folder that is not as it should be.
type Problem struct {
	ID    string `json:"id"` // the file's name
	Model string `json:"model,omitempty"`
	What  string `json:"what"`

	loose bool      // a file that belongs to no state, or not yet
	at    time.Time // when a loose file was changed
}

// ReadFiles returns the states in a folder, those that were used last first, whether or not a
// process has it open.
func ReadFiles(dir string) ([]State, error) {
	in, err := look(dir)
	if err != nil {
		return nil, err
	}
	states := make([]State, len(in.states))
	for i, s := range in.states {
		states[i] = s.State
	}
	slices.Reverse(states)
	return states, nil
}

// RemoveFiles removes states from a folder. A process that has it open notices. A state that is not
// there is none that failed.
func RemoveFiles(dir string, ids ...string) error {
	var errs []error
	for _, id := range ids {
		if !validID(id) {
			errs = append(errs, fmt.Errorf("%q is no state's name", id))
			continue
		}
		for _, name := range []string{sideName(id), id} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Verify looks at every state in a folder, and returns how many there are and what is wrong. With
// full it reads all of each file, and compares its checksum where that is known: it is a minute or
// two after the state was saved.
func Verify(ctx context.Context, dir string, full bool) (states int, problems []Problem, err error) {
	in, err := look(dir)
	if err != nil {
		return 0, nil, err
	}
	for _, p := range in.junk {
		if !p.loose || time.Since(p.at) > looseAge { // else it may be about to belong to one
			problems = append(problems, p)
		}
	}
	for i := range in.states {
		s := &in.states[i]
		err := s.verify(ctx, dir, full)
		switch {
		case ctx.Err() != nil:
			return states, problems, ctx.Err()
		case errors.Is(err, os.ErrNotExist): // removed just now
		case err != nil:
			problems = append(problems, Problem{ID: s.ID, Model: s.Model, What: err.Error()})
		}
		states++
	}
	return states, problems, nil
}

// verify returns how a state's file differs from what is said of it.
func (s *side) verify(ctx context.Context, dir string, full bool) error {
	path := filepath.Join(dir, s.ID)
	tokens, _, err := readHeader(path)
	if err != nil {
		return err
	}
	if tokens != s.Tokens {
		return fmt.Errorf("it has %d tokens instead of %d", tokens, s.Tokens)
	}
	if !full || !s.Settled {
		return nil
	}
	sum, err := hash(ctx, path, false)
	if err == nil && sum != s.Sum {
		err = errors.New("its checksum is another: some of its bytes have changed")
	}
	return err
}
