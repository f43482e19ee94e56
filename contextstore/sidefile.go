package contextstore

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Beside each state's file is a small side file that describes it. There is no index: the folder is
// the truth, so that a crash at any moment loses at most one state, and removing a state means
// removing its two files.
const (
	stateExt = ".bin"  // a state, as an engine wrote it
	sideExt  = ".json" // its description
	partExt  = ".part" // a state that an engine is writing
	asideExt = ".new"  // a side file that is being written
)

// sideVersion is the version of side files. Other versions are not read.
const sideVersion = 1

// maxSide is the largest side file in bytes: four times that of the longest chain.
const maxSide = 4 << 20

// side is the content of a side file.
type side struct {
	Version int `json:"version"`
	State
	// Heat is how often the state was of use lately: see heat.
	Heat heat `json:"heat"`
	// Settled means that the file's bytes are synced to the disk, and Sum is their xxh3. A file
	// that is not settled is trusted only until the machine is restarted; Boot says since when it
	// runs.
	Settled bool   `json:"settled"`
	Sum     uint64 `json:"xxh3,omitempty"`
	Boot    string `json:"boot,omitempty"`
}

// Chain is the fingerprints of a prompt's links. As text it is base64 of their bytes, lowest first.
type Chain []uint64

// MarshalText implements encoding.TextMarshaler.
func (c Chain) MarshalText() ([]byte, error) {
	raw := make([]byte, 0, 8*len(c))
	for _, link := range c {
		raw = binary.LittleEndian.AppendUint64(raw, link)
	}
	return base64.StdEncoding.AppendEncode(nil, raw), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Chain) UnmarshalText(text []byte) error {
	raw, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil || len(raw)%8 != 0 {
		return errors.New("no chain of links")
	}
	*c = make(Chain, len(raw)/8)
	for i := range *c {
		(*c)[i] = binary.LittleEndian.Uint64(raw[8*i:])
	}
	return nil
}

// Counts are numbers of tokens. As text they are base64 of 32 bits each, lowest byte first.
type Counts []int32

// MarshalText implements encoding.TextMarshaler.
func (c Counts) MarshalText() ([]byte, error) {
	raw := make([]byte, 0, 4*len(c))
	for _, n := range c {
		raw = binary.LittleEndian.AppendUint32(raw, uint32(n))
	}
	return base64.StdEncoding.AppendEncode(nil, raw), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Counts) UnmarshalText(text []byte) error {
	raw, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil || len(raw)%4 != 0 {
		return errors.New("no list of token counts")
	}
	*c = make(Counts, len(raw)/4)
	for i := range *c {
		(*c)[i] = int32(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return nil
}

// parseSide reads the text of a side file; name is the file's name without its folder.
func parseSide(name string, text []byte) (side, error) {
	var s side
	if err := json.Unmarshal(text, &s); err != nil {
		return side{}, fmt.Errorf("it is torn, or no entry: %w", err)
	}
	switch stem, ok := strings.CutSuffix(name, sideExt); {
	case s.Version != sideVersion:
		return side{}, fmt.Errorf("it has version %d instead of %d", s.Version, sideVersion)
	case !ok || s.ID != stem+stateExt || !validID(s.ID):
		return side{}, fmt.Errorf("it says that it is that of %q", s.ID)
	case s.Format == "":
		return side{}, errors.New("it does not say which engines can read the state")
	}
	if err := s.State.check(); err != nil {
		return side{}, err
	}
	if math.Abs(float64(s.Heat)) > maxHeat {
		return side{}, fmt.Errorf("it has a heat of %v", s.Heat)
	}
	if s.Bytes <= 0 {
		return side{}, fmt.Errorf("it says that the state has %d bytes", s.Bytes)
	}
	return s, nil
}

// check returns what is wrong with a state, apart from its ID and size.
func (s *State) check() error {
	switch {
	case len(s.Links) == 0:
		return errors.New("a state of no prompt")
	case len(s.LinkTokens) != 0 && len(s.LinkTokens) != len(s.Links):
		return fmt.Errorf("%d links have %d token counts", len(s.Links), len(s.LinkTokens))
	case s.Tokens < 0 || s.Tokens > math.MaxInt32 || s.Uses < 0 || s.Cost < 0:
		return fmt.Errorf("%d tokens, %d uses, %v to evaluate again", s.Tokens, s.Uses, s.Cost)
	}
	return nil
}

// validID reports whether the name is one that the store makes, so that no name from a file leads
// out of the folder.
func validID(id string) bool {
	stem, ok := strings.CutSuffix(id, stateExt)
	return ok && len(stem) == 2*idBytes && strings.Trim(stem, "0123456789abcdef") == ""
}

// sideName returns the name of a state's side file.
func sideName(id string) string { return strings.TrimSuffix(id, stateExt) + sideExt }

// readSide reads a side file.
func readSide(dir, name string) (side, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return side{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSide))
	if err != nil {
		return side{}, err
	}
	return parseSide(name, text)
}

// writeSide writes a side file under another name and renames it. With sync, it is on the disk
// afterwards.
func writeSide(dir string, s side, sync bool) (err error) {
	s.Version = sideVersion
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, sideName(s.ID))
	f, err := os.OpenFile(path+asideExt, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err == nil && sync {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(path+asideExt, path)
	}
	if err != nil {
		os.Remove(path + asideExt)
		return err
	}
	return nil
}

// The beginning of a state's file, from llama.cpp's llama_context::state_seq_save_file and
// server_tokens::serialize: magic, version, and the number of 32-bit words before the state itself.
// These words are the tokens; or, since about build 10,800, a marker, a separate version, the
// number of tokens, the tokens, and images.
const (
	stateMagic  = 0x67677371 // "ggsq"
	tokenMarker = math.MaxUint32
	headerBytes = 24
)

// errNoState is why a file is not accepted as a state.
var errNoState = errors.New("it does not begin as a state does")

// parseHeader returns how many tokens a state's file has, from its first bytes.
func parseHeader(head []byte) (tokens int, err error) {
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(head[4*i:]) }
	if len(head) < headerBytes || word(0) != stateMagic {
		return 0, errNoState
	}
	n := word(2)
	if n >= 3 && word(3) == tokenMarker {
		if n = word(5); n > word(2)-3 {
			return 0, errNoState
		}
	}
	if n > math.MaxInt32 {
		return 0, errNoState
	}
	return int(n), nil
}

// readHeader returns how many tokens a state's file has, and its size in bytes.
func readHeader(path string) (tokens int, bytes int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	head := make([]byte, headerBytes)
	if _, err := io.ReadFull(f, head); err != nil {
		return 0, info.Size(), errNoState
	}
	tokens, err = parseHeader(head)
	if err == nil && int64(tokens) > info.Size()/4 {
		err = errNoState
	}
	return tokens, info.Size(), err
}

// found is the content of a folder.
type found struct {
	states []side
	junk   []Problem // entries without a state, states without an entry, unfinished files
}

// look reads a folder. States are sorted by their last use, the oldest first.
func look(dir string) (found, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return found{}, err
	}
	var in found
	known := map[string]bool{}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), sideExt)
		if id += stateExt; !ok || !validID(id) {
			continue
		}
		s, err := readSide(dir, e.Name())
		if err == nil {
			err = s.compare(dir)
		} else if errors.Is(err, os.ErrNotExist) {
			continue // it has just been removed
		}
		known[id] = true
		if err != nil {
			in.junk = append(in.junk, Problem{ID: id, Model: s.Model, What: err.Error()})
			continue
		}
		in.states = append(in.states, s)
	}
	for _, e := range entries {
		name := e.Name()
		stem, ext, _ := strings.Cut(name, ".")
		p := Problem{ID: name, What: "it was not finished", loose: true}
		switch {
		case !validID(stem + stateExt): // not one of our files
			continue
		case "."+ext == stateExt && !known[name]:
			p.What = "nothing says what it is"
		case "."+ext != partExt && "."+ext != sideExt+asideExt:
			continue
		}
		if info, err := e.Info(); err == nil {
			p.at = info.ModTime()
			in.junk = append(in.junk, p)
		}
	}
	slices.SortFunc(in.states, func(a, b side) int { return a.Used.Compare(b.Used) })
	return in, nil
}

// compare returns how a state's file differs from its side file, as far as that shows without
// reading the file.
func (s *side) compare(dir string) error {
	info, err := os.Lstat(filepath.Join(dir, s.ID))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("its file is gone: %w", os.ErrNotExist)
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return errors.New("it is no file")
	case info.Size() != s.Bytes:
		return fmt.Errorf("it has %d bytes instead of %d: it is torn", info.Size(), s.Bytes)
	}
	return nil
}
