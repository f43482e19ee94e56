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
	saltName = "salt" // what fingerprints of owners are made with
	saltSize = 32     // in bytes

	// tendEvery is how often the store looks after its files. What was saved is put on the disk
	// then, and has mostly been put there by the system already.
	tendEvery = time.Minute
	// writeUses is every how many times it notes on the disk how often states were of use.
	writeUses = 10
)

// Why a state is not stored.
var (
	ErrLocked = errors.New("another process keeps its contexts in this folder")
	ErrHeld   = errors.New("a state that is as good is stored already")
	ErrFull   = errors.New("there is no room, and what is stored is worth more")
	ErrNoDisk = errors.New("the disk has no room")
	ErrClosed = errors.New("the store of contexts is closed")
)

// FileLimits bound what a store of files takes.
type FileLimits struct {
	// Bytes is the size of all files together. With 0 or less nothing is stored.
	Bytes int64
	// TTL is how long a state is kept that is of no use. 0: for ever.
	TTL time.Duration
	// Free is how many bytes of the disk are left to others.
	Free int64
	// Share has states serve everybody, whoever their owners are.
	Share bool
}

// FileStats counts what a store of files holds, and what became of the rest since it was opened.
type FileStats struct {
	States int
	Bytes  int64 // without what is being written

	Refused  uint64 // by Room: ErrFull and ErrNoDisk
	Evicted  uint64 // to make room for another
	Expired  uint64 // older than the TTL
	Replaced uint64 // by a state that is of use wherever they were
	Dropped  uint64 // torn, refused by an engine, or removed by others

	Limits FileLimits
}

// Files keeps the states of engines as files in one folder, which the engines write and read
// themselves. What is kept is bounded, and survives the end of the process however that comes.
// Its methods may be called concurrently. None holds the others up by waiting for the disk.
//
// Whatever goes wrong with the folder is told once, by one line of the log; the store has less then.
type Files struct {
	dir    string
	limits FileLimits
	log    *slog.Logger
	lock   *os.File
	salt   []byte
	boot   string

	stop context.CancelFunc // ends tending
	idle chan struct{}      // closed when tending has ended

	mu      sync.Mutex                    // guards all below
	states  *simplelru.LRU[string, *file] // by ID, in the order of use
	groups  map[groupKey]group            // the same ones
	pending map[string]int64              // bytes that are being written, by temporary name
	writing int64                         // their sum
	stats   FileStats                     // States, Refused, Limits are filled in by Stats
	told    map[string]bool               // what has been logged of what does not work
	closed  bool
}

type groupKey struct {
	format string
	owner  uint64
}

// file is a state that is stored.
type file struct {
	side
	dirty   bool // the side file is not what it should be
	checked bool // its bytes were compared with its checksum, or that was made of them
}

// OpenFiles opens the store in a folder, and makes the folder if need be: for its owner only. What is
// not whole in it is removed, which one line of the log tells. ErrLocked: another process has it
// open. Close it.
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

// take makes the folder ready and takes its lock.
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

// load takes in what the folder has.
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

// OwnerOf returns a fingerprint of whatever tells one owner of states from others, such as an API
// key. It is the same for as long as the folder is, and cannot be turned back without the folder. 0
// for "".
func (f *Files) OwnerOf(secret string) uint64 {
	if secret == "" {
		return 0
	}
	mac := hmac.New(sha256.New, f.salt)
	io.WriteString(mac, secret)
	return max(binary.LittleEndian.Uint64(mac.Sum(nil)), 1)
}

// Dir returns the folder that the files are in.
func (f *Files) Dir() string { return f.dir }

func (f *Files) key(format string, owner uint64) groupKey {
	if f.limits.Share {
		owner = 0
	}
	return groupKey{format, owner}
}

// add takes a state in. f.mu must be held.
func (f *Files) add(x *file) {
	key := f.key(x.Format, x.Owner)
	f.states.Add(x.ID, x)
	f.groups[key] = f.groups[key].insert(x)
	f.stats.Bytes += x.Bytes
}

// remove forgets a state, and reports whether it was there. f.mu must be held.
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

// Room asks whether a state is to be stored, and makes room for it. Of s it takes into account
// Format, Owner, Links, Whole, Cost, Bytes (how large it will be, about) and Uses (how often a
// prompt that begins so was asked for, this time included). While there is room, everything is
// taken. Then only what was asked for twice at least, and is worth twice what must go for it: so
// prompts that never come back are written once, up to the limit, and no more.
//
// name is that of the file for the engine to write in the folder; Commit or Abort it. The errors are
// ErrHeld, ErrFull, ErrNoDisk, ErrClosed, and whatever else keeps the store from storing.
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

// room makes room for a state, with so many bytes free on the disk, and returns what went for it.
// f.mu must be held.
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
		over -= x.Bytes // they go when it has come, and are no loss
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

// least returns those that are worth least and have so many bytes together: of those that are worth
// no more than most and are not spared. nil if these have less. f.mu must be held.
func (f *Files) least(bytes int64, most float64, spared []*file) (least []*file) {
	if bytes <= 0 {
		return nil
	}
	type worth struct {
		*file
		priority float64
	}
	var all []worth
	for _, x := range f.states.Values() { // those of longest ago first
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

// overfull returns what must go for the limit to hold, but for one that stays. What is being written
// has its room, too, unless that would take more than there is: an engine may write more than was
// said. f.mu must be held.
func (f *Files) overfull(stays *file) []*file {
	over, spared := f.stats.Bytes-max(f.limits.Bytes, 0), []*file{stays}
	if victims := f.least(over+f.writing, math.Inf(1), spared); victims != nil {
		return victims
	}
	return f.least(over, math.Inf(1), spared)
}

// evict forgets states to make room. f.mu must be held.
func (f *Files) evict(victims []*file) []*file {
	for _, x := range victims {
		f.remove(x)
		f.stats.Evicted++
	}
	return victims
}

// Commit stores a state whose file the engine has written under the name that Room gave, and returns
// it with its ID, and its Tokens and Bytes as they are. States that it makes superfluous go. An
// error: it is not stored, and the file is removed.
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
	if f.closed { // the file stays: the next that opens the store has it
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

// prepare looks at what the engine has written.
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

// place gives a file its name and says what it is.
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

// release ends what Room began. f.mu must be held.
func (f *Files) release(name string) {
	f.writing -= f.pending[name]
	delete(f.pending, name)
}

// Abort ends what Room began: the state has not been written, or is not wanted.
func (f *Files) Abort(name string) {
	f.mu.Lock()
	_, ok := f.pending[name]
	f.release(name)
	f.mu.Unlock()
	if ok {
		os.Remove(filepath.Join(f.dir, name))
	}
}

// Query says what a state is to be of use for.
type Query struct {
	Format string   // of the engine; "": of any
	Owner  uint64   // who asks; see OwnerOf
	Links  []uint64 // of the prompt; see State.Links
	// Tokens is how many the engine's slot takes: it refuses longer states. 0: any number.
	Tokens int
}

// Best returns the state that has most leading links in common with a prompt, of several the
// smallest, and how many they are. Its file was there just now.
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

// best is Best, but for whether the file is there. f.mu must be held.
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

// Check compares a state with its checksum, if that has not been done since the store was opened. An
// engine takes a file in which bytes have changed, and answers wrongly then; so this is for before a
// state is attached. It reads the file, which the engine is about to do as well, and so finds it in
// memory. An error: the state is dropped, and not to be attached.
func (f *Files) Check(ctx context.Context, id string) error {
	f.mu.Lock()
	x, ok := f.states.Peek(id)
	var sum uint64
	todo := ok && x.Settled && !x.checked // what is not settled is what was written a moment ago
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

// Used notes that a state was of use.
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

// Drop removes a state that is of no use, and tells why.
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

// List returns all states, those that were used last first.
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

// unlink removes a state's two files, or one that belongs to none. First goes what says what it is:
// what is left if the process ends between the two is found when the store is opened.
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

// tell logs what does not work: once, until something has been stored.
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

// newStem returns a name that no state has.
func newStem() string {
	var name [idBytes]byte
	rand.Read(name[:]) // never fails
	return hex.EncodeToString(name[:])
}
