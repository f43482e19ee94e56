package contextstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// looseAge is how old a file that belongs to no state must be to count as a problem: until then it
// may be one that is being written.
const looseAge = 10 * time.Minute

// Problem is something wrong in a store's folder.
type Problem struct {
	ID    string `json:"id"` // the file's name
	Model string `json:"model,omitempty"`
	What  string `json:"what"`

	loose bool      // it belongs to no state, or not yet
	at    time.Time // when a loose file was changed
}

// Verified counts what Verify has examined.
type Verified struct {
	States int   // that are, or should be, in the folder
	Bytes  int64 // of the complete ones
	Hashed int   // whose checksum was compared
}

// ReadFiles returns the states in a folder, most recently used first, and what is wrong there,
// whether or not a process has the folder open.
func ReadFiles(dir string) ([]State, []Problem, error) {
	in, err := look(dir)
	if err != nil {
		return nil, nil, err
	}
	states := make([]State, len(in.states))
	for i, s := range in.states {
		states[i] = s.State
	}
	slices.Reverse(states)
	return states, in.problems(), nil
}

// RemoveFiles removes states from a folder, and what is left of torn ones, and returns how many
// bytes that were. A process that has the folder open notices. A missing state is no error.
func RemoveFiles(dir string, ids ...string) (bytes int64, err error) {
	var errs []error
	for _, id := range ids {
		stem, _, _ := strings.Cut(id, ".")
		if !validID(stem + stateExt) {
			errs = append(errs, fmt.Errorf("%q is no state's name", id))
			continue
		}
		// The side file goes first: see Files.unlink.
		for _, ext := range []string{sideExt, sideExt + asideExt, stateExt, partExt} {
			path := filepath.Join(dir, stem+ext)
			info, err := os.Lstat(path)
			if err == nil {
				err = os.Remove(path)
			}
			switch {
			case err == nil:
				bytes += info.Size()
			case !errors.Is(err, os.ErrNotExist):
				errs = append(errs, err)
			}
		}
	}
	return bytes, errors.Join(errs...)
}

// Verify examines every state in a folder and returns what is wrong. With full, it reads all of
// each file, and compares its checksum where that is known: a minute or two after the state was
// saved, or after the store was closed.
func Verify(ctx context.Context, dir string, full bool) (Verified, []Problem, error) {
	in, err := look(dir)
	if err != nil {
		return Verified{}, nil, err
	}
	problems := in.problems()
	v := Verified{States: len(problems)}
	for i := range in.states {
		s := &in.states[i]
		err := s.verify(ctx, dir, full)
		switch {
		case ctx.Err() != nil:
			return v, problems, ctx.Err()
		case errors.Is(err, os.ErrNotExist): // removed just now
			continue
		case err != nil:
			problems = append(problems, Problem{ID: s.ID, Model: s.Model, What: err.Error()})
		default:
			v.Bytes += s.Bytes
			if full && s.Settled {
				v.Hashed++
			}
		}
		v.States++
	}
	return v, problems, nil
}

// problems returns what is wrong, except for files that may soon belong to a state.
func (in *found) problems() (problems []Problem) {
	for _, p := range in.junk {
		if !p.loose || time.Since(p.at) > looseAge {
			problems = append(problems, p)
		}
	}
	return problems
}

// errChanged means that a file's checksum does not match.
var errChanged = errors.New("its checksum is another: some of its bytes have changed")

// verify returns how a state's file differs from its description.
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
		err = errChanged
	}
	return err
}
