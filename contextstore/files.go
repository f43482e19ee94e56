package contextstore

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

const (
	idBytes  = 16     // of a state's name
	lockName = "lock" // held by the one store that works in a folder
	saltName = "salt" // the secret for fingerprints of owners
	saltSize = 32     // in bytes

	// tendEvery is how often the store maintains its files. It syncs what was saved since; by then
	// the system has mostly written it already.
	tendEvery = time.Minute
	// writeUses is after how many rounds of maintenance use counts are written to the disk.
	writeUses = 10
)

// The reasons why a state is not stored.
var (
	ErrLocked = errors.New("another process keeps its contexts in this folder")
	ErrHeld   = errors.New("a state that is as good is stored already")
	ErrFull   = errors.New("there is no room, and what is stored is worth more")
	ErrNoDisk = errors.New("the disk has no room")
	ErrClosed = errors.New("the store of contexts is closed")
)

// FileLimits bound a store of files.
type FileLimits struct {
	// Bytes is the size of all files together. If it is 0 or less, nothing is stored.
	Bytes int64
	// TTL is how long an unused state is kept; 0 means for ever.
	TTL time.Duration
	// Free is how many bytes of the disk must stay free.
	Free int64
	// Share lets states serve everybody, whoever their owners are.
	Share bool
}

// FileStats counts the content of a store of files, and why other states are not in it, since it
// was opened.
type FileStats struct {
	States int
	Bytes  int64 // without files that are being written

	Refused  uint64 // by Room: ErrFull and ErrNoDisk
	Evicted  uint64 // to make room for another
	Expired  uint64 // older than the TTL
	Replaced uint64 // by a state that covers them
	Dropped  uint64 // torn, refused by an engine, or removed by somebody else

	Limits FileLimits
}

// Files keeps the states of engines as files in one folder, which the engines write and read
// themselves. Its size is bounded, and it survives any end of the process. Its methods may be
// called concurrently, and none blocks the others while it waits for the disk.
//
// A problem with the folder is logged once; the store has fewer states then.
type Files struct {
	dir    string
	limits FileLimits
	log    *slog.Logger
	lock   *os.File
	salt   []byte
	boot   string

	stop context.CancelFunc // ends maintenance
	idle chan struct{}      // closed when maintenance has ended

	mu      sync.Mutex                    // guards everything below
	states  *simplelru.LRU[string, *file] // by ID, in order of use
	groups  map[groupKey]group            // the same ones
	pending map[string]int64              // reserved bytes of files that are being written, by temporary name
	writing int64                         // their sum
	stats   FileStats                     // Stats fills in States, Refused and Limits
	told    map[string]bool               // problems that were logged
	closed  bool
}

type groupKey struct {
	format string
	owner  uint64
}

// file is a stored state.
type file struct {
	side
	dirty   bool // the side file is outdated
	checked bool // its checksum was compared or computed
}

// OpenFiles opens the store in a folder, which it creates if necessary, accessible to its owner
// only. It removes incomplete files, and logs that in one line. The error is ErrLocked if another
// process has the folder open. The caller must Close it.
func OpenFiles(dir string, limits FileLimits, log *slog.Logger) (*Files, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	states, err := simplelru.NewLRU[string, *file](math.MaxInt, nil)
	if err != nil {
		return nil, err
	}
	f := &Files{
		dir: dir, limits: limits, log: log, boot: bootID(), states: states,
		groups: map[groupKey]group{}, pending: map[string]int64{}, told: map[string]bool{},
		idle: make(chan struct{}),
	}
	if err := f.take(); err != nil {
		return nil, fmt.Errorf("contexts in %s: %w", dir, err)
	}
	if err := f.load(); err != nil {
		f.lock.Close()
		return nil, fmt.Errorf("contexts in %s: %w", dir, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	f.stop = stop
	go f.tendUntil(ctx)
	return f, nil
}

// take prepares the folder and takes its lock.
func (f *Files) take() (err error) {
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(f.dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := os.Chmod(f.dir, 0o700); err != nil {
			return err
		}
	}
	f.lock, err = os.OpenFile(filepath.Join(f.dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.lock.Close()
		}
	}()
	if err := lock(f.lock); err != nil {
		return err
	}
	path := filepath.Join(f.dir, saltName)
	f.salt, err = os.ReadFile(path)
	if err == nil && len(f.salt) == saltSize || err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f.salt = make([]byte, saltSize)
	rand.Read(f.salt) // never fails
	return os.WriteFile(path, f.salt, 0o600)
}

// load reads the content of the folder.
func (f *Files) load() error {
	in, err := look(f.dir)
	if err != nil {
		return err
	}
	var whole []side
	for _, s := range in.states {
		if s.Settled || s.Boot != "" && s.Boot == f.boot {
			whole = append(whole, s)
			continue
		}
		in.junk = append(in.junk, Problem{ID: s.ID, Model: s.Model,
			What: "the machine stopped before it was on the disk"})
	}
	for _, p := range in.junk {
		f.unlink(p.ID)
	}
	if n := len(in.junk); n > 0 {
		f.stats.Dropped += uint64(n)
		f.log.Warn("stored contexts that are not whole were removed", "files", n,
			"first", in.junk[0].ID, "why", in.junk[0].What)
	}
	f.mu.Lock()
	for _, s := range whole {
		f.add(&file{side: s})
	}
	gone := f.expire(time.Now())
	gone = append(gone, f.evict(f.overfull(nil))...)
	f.mu.Unlock()
	f.unlinkAll(gone)
	return nil
}

// OwnerOf returns a fingerprint of something that identifies an owner of states, such as an API
// key. It stays the same for the life of the folder, and cannot be inverted without the folder. It
// is 0 for "".
func (f *Files) OwnerOf(secret string) uint64 {
	if secret == "" {
		return 0
	}
	mac := hmac.New(sha256.New, f.salt)
	io.WriteString(mac, secret)
	return max(binary.LittleEndian.Uint64(mac.Sum(nil)), 1)
}

// Dir returns the folder of the files.
func (f *Files) Dir() string { return f.dir }

func (f *Files) key(format string, owner uint64) groupKey {
	if f.limits.Share {
		owner = 0
	}
	return groupKey{format, owner}
}

// add adds a state. f.mu must be held.
func (f *Files) add(x *file) {
	key := f.key(x.Format, x.Owner)
	f.states.Add(x.ID, x)
	f.groups[key] = f.groups[key].insert(x)
	f.stats.Bytes += x.Bytes
}

// remove removes a state, and reports whether it was there. f.mu must be held.
func (f *Files) remove(x *file) bool {
	if held, ok := f.states.Peek(x.ID); !ok || held != x {
		return false
	}
	f.states.Remove(x.ID)
	key := f.key(x.Format, x.Owner)
	if f.groups[key] = f.groups[key].remove(x); len(f.groups[key]) == 0 {
		delete(f.groups, key)
	}
	f.stats.Bytes -= x.Bytes
	return true
}

// Room decides whether a state is to be stored, and makes room for it. It considers of s: Format,
// Owner, Links, Whole, Cost, Bytes (the expected size) and Uses (how often a prompt with this
// beginning was asked for, including this time). While there is room, it admits everything. After
// that, it admits only states that were asked for at least twice and are worth twice what must be
// evicted for them: so prompts that never come back are written once, up to the limit, and no more.
//
// name is the file that the engine is to write in the folder; Commit or Abort it. The error is
// ErrHeld, ErrFull, ErrNoDisk, ErrClosed, or whatever else prevents storing.
func (f *Files) Room(s State) (name string, err error) {
	if err := s.check(); err != nil || s.Format == "" {
		return "", cmp.Or(err, errors.New("a state of no format"))
	}
	if f.limits.Bytes <= 0 {
		return "", ErrFull
	}
	free, err := diskFree(f.dir)
	if err != nil {
		f.tell(err)
		return "", err
	}
	s.Bytes = max(s.Bytes, 1)

	f.mu.Lock()
	gone, err := f.room(&s, free)
	if err == nil {
		name = newStem() + partExt
		f.pending[name] = s.Bytes
		f.writing += s.Bytes
	} else if err != ErrHeld {
		f.stats.Refused++
	}
	f.mu.Unlock()
	if err == ErrNoDisk {
		f.tell(err)
	}
	f.unlinkAll(gone)
	return name, err
}

// room makes room for a state, given how many bytes of the disk are free, and returns the evicted
// states. f.mu must be held.
func (f *Files) room(s *State, free int64) (gone []*file, err error) {
	if f.closed {
		return nil, ErrClosed
	}
	g := f.groups[f.key(s.Format, s.Owner)]
	if g.covers(s) {
		return nil, ErrHeld
	}
	replaced := g.coveredBy(s)
	over := f.stats.Bytes + f.writing + s.Bytes - f.limits.Bytes
	for _, x := range replaced {
		over -= x.Bytes // the new state replaces them, so they are no loss
	}
	onDisk := f.limits.Free + f.writing + s.Bytes - free
	refused := ErrFull
	if onDisk > over {
		refused = ErrNoDisk
	}
	need := max(over, onDisk)
	if need <= 0 {
		return nil, nil
	}
	if s.Uses < 2 {
		return nil, refused
	}
	worth := priority(heated(s.Uses, time.Now()), s) - replaceMargin
	victims := f.least(need, worth, replaced)
	if victims == nil {
		return nil, refused
	}
	return f.evict(victims), nil
}

// least returns the least valuable states that together have so many bytes, out of those worth no
// more than most and not spared; nil if there are not enough. f.mu must be held.
func (f *Files) least(bytes int64, most float64, spared []*file) (least []*file) {
	if bytes <= 0 {
		return nil
	}
	type worth struct {
		*file
		priority float64
	}
	var all []worth
	for _, x := range f.states.Values() { // least recently used first
		if p := priority(x.Heat, &x.State); p <= most && !slices.Contains(spared, x) {
			all = append(all, worth{x, p})
		}
	}
	slices.SortStableFunc(all, func(a, b worth) int { return cmp.Compare(a.priority, b.priority) })
	for _, x := range all {
		if bytes <= 0 {
			break
		}
		least = append(least, x.file)
		bytes -= x.Bytes
	}
	if bytes > 0 {
		return nil
	}
	return least
}

// overfull returns the states that must be evicted to keep the limit, other than stay. Files that
// are being written keep their room, unless that would exceed the limit: an engine may write more
// than was expected. f.mu must be held.
func (f *Files) overfull(stays *file) []*file {
	over, spared := f.stats.Bytes-max(f.limits.Bytes, 0), []*file{stays}
	if victims := f.least(over+f.writing, math.Inf(1), spared); victims != nil {
		return victims
	}
	return f.least(over, math.Inf(1), spared)
}

// evict removes states to make room. f.mu must be held.
func (f *Files) evict(victims []*file) []*file {
	for _, x := range victims {
		f.remove(x)
		f.stats.Evicted++
	}
	return victims
}

// Commit stores a state whose file the engine has written under the name from Room, and returns it
// with its ID and its actual Tokens and Bytes. States that it covers are removed. On an error it is
// not stored, and the file is removed.
func (f *Files) Commit(name string, s State) (State, error) {
	stored, err := f.commit(name, s)
	if err != nil {
		f.Abort(name)
		return State{}, fmt.Errorf("storing a context: %w", err)
	}
	return stored, nil
}

func (f *Files) commit(name string, s State) (State, error) {
	x, err := f.prepare(name, s)
	if err != nil {
		return State{}, err
	}
	if err := f.place(name, x.side); err != nil {
		f.unlink(x.ID)
		f.tell(err)
		return State{}, err
	}
	stored := x.State // from here on others may change it
	f.mu.Lock()
	if f.closed { // the file stays, and is found when the store is opened next
		f.mu.Unlock()
		return stored, nil
	}
	f.release(name)
	clear(f.told)
	gone := f.groups[f.key(x.Format, x.Owner)].coveredBy(&x.State)
	for _, old := range gone {
		f.remove(old)
		f.stats.Replaced++
	}
	f.add(x)
	gone = append(gone, f.evict(f.overfull(x))...)
	f.mu.Unlock()
	f.unlinkAll(gone)
	return stored, nil
}

// prepare examines what the engine has written.
func (f *Files) prepare(name string, s State) (*file, error) {
	f.mu.Lock()
	_, ok := f.pending[name]
	f.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("there is no room for %s", name)
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	var err error
	s.Tokens, s.Bytes, err = readHeader(filepath.Join(f.dir, name))
	switch {
	case err != nil:
		return nil, err
	case s.Tokens == 0:
		return nil, errors.New("the engine had nothing to save")
	case s.Bytes > f.limits.Bytes:
		return nil, ErrFull
	}
	now := time.Now()
	s.ID = strings.TrimSuffix(name, partExt) + stateExt
	s.Made, s.Used, s.Uses = now, now, max(s.Uses, 1)
	x := &file{side: side{State: s, Heat: heated(s.Uses, now), Boot: f.boot}}
	f.mu.Lock()
	for _, old := range f.groups[f.key(s.Format, s.Owner)].coveredBy(&s) {
		x.Heat = x.Heat.plus(old.Heat)
		x.Uses = max(x.Uses, old.Uses)
	}
	f.mu.Unlock()
	return x, nil
}

// place gives a file its final name and writes its side file.
func (f *Files) place(name string, s side) error {
	part, path := filepath.Join(f.dir, name), filepath.Join(f.dir, s.ID)
	if err := os.Chmod(part, 0o600); err != nil {
		return err
	}
	if err := os.Rename(part, path); err != nil {
		return err
	}
	return writeSide(f.dir, s, false)
}

// release returns what Room reserved. f.mu must be held.
func (f *Files) release(name string) {
	f.writing -= f.pending[name]
	delete(f.pending, name)
}

// Abort returns what Room reserved: the state was not written, or is not wanted.
func (f *Files) Abort(name string) {
	f.mu.Lock()
	_, ok := f.pending[name]
	f.release(name)
	f.mu.Unlock()
	if ok {
		os.Remove(filepath.Join(f.dir, name))
	}
}

// Query describes the prompt that a state is wanted for.
type Query struct {
	Format string   // of the engine; "": any
	Owner  uint64   // who asks; see OwnerOf
	Links  []uint64 // of the prompt; see State.Links
	// Tokens is the size of the engine's slot, which refuses longer states; 0: any number.
	Tokens int
}

// Best returns the state that shares the most leading links with a prompt, the smallest of several,
// and how many links these are. Its file has just been seen to exist.
func (f *Files) Best(q Query) (s State, depth int, ok bool) {
	for {
		f.mu.Lock()
		x, depth := f.best(q)
		if x == nil || f.closed {
			f.mu.Unlock()
			return State{}, 0, false
		}
		s, look := x.State, x.side
		f.mu.Unlock()
		err := look.compare(f.dir)
		if err == nil {
			return s, depth, true
		}
		f.Drop(s.ID, err.Error())
	}
}

// best is Best without looking for the file. f.mu must be held.
func (f *Files) best(q Query) (best *file, depth int) {
	key := f.key(q.Format, q.Owner)
	if q.Format != "" {
		return f.groups[key].best(q.Links, q.Tokens)
	}
	for k, g := range f.groups {
		if k.owner != key.owner {
			continue
		}
		if x, n := g.best(q.Links, q.Tokens); n > depth || n > 0 && n == depth && x.Bytes < best.Bytes {
			best, depth = x, n
		}
	}
	return best, depth
}

// Check compares a state with its checksum, if that has not been done since the store was opened.
// An engine accepts a file with changed bytes, and then answers wrongly; so call this before a
// state is attached. It reads the file, which the engine is about to do as well, and which then is
// in memory. On an error the state is dropped, and must not be attached.
func (f *Files) Check(ctx context.Context, id string) error {
	f.mu.Lock()
	x, ok := f.states.Peek(id)
	var sum uint64
	todo := ok && x.Settled && !x.checked // what is not settled was written a moment ago
	if todo {
		sum = x.Sum
	}
	f.mu.Unlock()
	if !ok {
		return fmt.Errorf("context %s: %w", id, os.ErrNotExist)
	}
	if !todo {
		return nil
	}
	now, err := hash(ctx, filepath.Join(f.dir, id), false)
	if err == nil && now != sum {
		err = errChanged
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		f.Drop(id, err.Error())
		return err
	}
	f.mu.Lock()
	x.checked = true
	f.mu.Unlock()
	return nil
}

// Used records that a state was of use.
func (f *Files) Used(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if x, ok := f.states.Get(id); ok {
		x.Used = time.Now()
		x.Uses++
		x.Heat = x.Heat.plus(heated(1, x.Used))
		x.dirty = true
	}
}

// Drop removes a useless state, and logs the reason.
func (f *Files) Drop(id, why string) {
	f.mu.Lock()
	x, ok := f.states.Peek(id)
	if ok {
		f.remove(x)
		f.stats.Dropped++
	}
	f.mu.Unlock()
	if ok {
		f.unlink(id)
		f.log.Warn("a stored context was dropped", "id", id, "model", x.Model, "why", why)
	}
}

// List returns all states, most recently used first.
func (f *Files) List() []State {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []State
	for _, x := range f.states.Values() {
		list = append(list, x.State)
	}
	slices.Reverse(list)
	return list
}

// Stats returns counts for a page or a scrape.
func (f *Files) Stats() FileStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.stats
	st.States, st.Limits = f.states.Len(), f.limits
	return st
}

// unlink removes a state's two files, or a file that belongs to none. The side file goes first:
// what is left if the process ends in between is found when the store is opened.
func (f *Files) unlink(id string) {
	for _, name := range []string{sideName(id), id} {
		if err := os.Remove(filepath.Join(f.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			f.tell(err)
		}
	}
}

func (f *Files) unlinkAll(gone []*file) {
	for _, x := range gone {
		f.unlink(x.ID)
	}
}

// tell logs a problem once, until something has been stored again.
func (f *Files) tell(err error) {
	key := err.Error()
	if path, ok := errors.AsType[*os.PathError](err); ok {
		key = path.Err.Error() // whatever the file
	} else if link, ok := errors.AsType[*os.LinkError](err); ok {
		key = link.Err.Error()
	}
	f.mu.Lock()
	told := f.told[key]
	f.told[key] = true
	f.mu.Unlock()
	if !told {
		f.log.Warn("contexts cannot be stored as they should be", "folder", f.dir, "err", err)
	}
}

// newStem returns an unused name.
func newStem() string {
	var name [idBytes]byte
	rand.Read(name[:]) // never fails
	return hex.EncodeToString(name[:])
}
