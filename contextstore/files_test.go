package contextstore_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// logged is a log that can be read while it is written.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// openFiles opens a store, which the test's end closes.
func openFiles(
	t testing.TB, dir string, limits contextstore.FileLimits,
) (*contextstore.Files, *logged) {
	t.Helper()
	log := &logged{}
	f, err := contextstore.OpenFiles(dir, limits, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(t.Context()) })
	return f, log
}

// ample are limits that nothing comes near to.
var ample = contextstore.FileLimits{Bytes: 1 << 40}

// stateFile is a state's file as llama.cpp writes it, of so many bytes.
func stateFile(tokens, size int) []byte {
	head := []uint32{0x67677371, 3, uint32(tokens) + 3, 0xffffffff, 1, uint32(tokens)}
	var file []byte
	for _, word := range head {
		file = binary.LittleEndian.AppendUint32(file, word)
	}
	for i := range tokens {
		file = binary.LittleEndian.AppendUint32(file, uint32(i))
	}
	return append(file, make([]byte, max(size-len(file), 0))...)
}

// chainOf returns n fingerprints of links, made of the letters as those of Store's tests are.
func chainOf(name string, n int) []uint64 {
	var chain []uint64
	var hash uint64 = 1
	for i := range n {
		hash = (hash ^ uint64(name[min(i, len(name)-1)])) * 0x9e3779b97f4a7c15
		chain = append(chain, hash|1)
	}
	return chain
}

// stateOf is a state of a prompt; it is asked for often enough to be kept.
func stateOf(links []uint64, bytes int64) contextstore.State {
	return contextstore.State{
		Format: "f", Model: "m", Links: links, Bytes: bytes, Cost: time.Second, Uses: 2,
	}
}

// save saves a state of its Bytes, or returns why not.
func save(
	t testing.TB, f *contextstore.Files, s contextstore.State,
) (contextstore.State, error) {
	t.Helper()
	name, err := f.Room(s)
	if err != nil {
		return contextstore.State{}, err
	}
	file := stateFile(7, int(s.Bytes))
	if err := os.WriteFile(filepath.Join(f.Dir(), name), file, 0o644); err != nil {
		t.Fatal(err)
	}
	return f.Commit(name, s)
}

func mustSave(
	t testing.TB, f *contextstore.Files, s contextstore.State,
) contextstore.State {
	t.Helper()
	stored, err := save(t, f, s)
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// names are the names in a folder, but for those that are always there.
func names(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "lock" && e.Name() != "salt" {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestFilesKeepAcrossRestarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "contexts")
	f, _ := openFiles(t, dir, ample)
	owner := f.OwnerOf("key")
	if owner == 0 || f.OwnerOf("other") == owner || f.OwnerOf("") != 0 {
		t.Error("owners cannot be told apart")
	}
	want := stateOf(chainOf("a", 5), 4000)
	want.LinkTokens = []int32{1, 2, 3, 4, 5}
	want.Owner = owner
	want = mustSave(t, f, want)
	f.Used(want.ID)
	if want.Tokens != 7 || want.Bytes != 4000 {
		t.Errorf("stored as %+v", want)
	}
	ask := contextstore.Query{Format: "f", Owner: owner, Links: chainOf("aaab", 9)}
	for _, again := range []string{"at once", "opened again", "and again"} {
		s, depth, ok := f.Best(ask)
		if !ok || depth != 3 || s.ID != want.ID || s.Uses != 3 ||
			!slices.Equal(s.Links, want.Links) || !slices.Equal(s.LinkTokens, want.LinkTokens) {
			t.Fatalf("%s: %v, %d links, %+v", again, ok, depth, s)
		}
		if f.OwnerOf("key") != owner {
			t.Errorf("%s: owners are others", again)
		}
		if err := f.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		f, _ = openFiles(t, dir, ample)
	}
	for _, other := range []contextstore.Query{
		{Format: "g", Owner: owner, Links: ask.Links},
		{Format: "f", Owner: 0, Links: ask.Links},
		{Format: "f", Owner: owner, Links: chainOf("b", 9)},
		{Format: "f", Owner: owner, Links: ask.Links, Tokens: 6},
	} {
		if s, depth, ok := f.Best(other); ok {
			t.Errorf("%+v finds %+v, %d links", other, s, depth)
		}
	}
}

func TestFilesModes(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f, _ := openFiles(t, dir, ample)
	mustSave(t, f, stateOf(chainOf("a", 5), 4000))
	for path, want := range map[string]os.FileMode{dir: 0o700} {
		for _, name := range append(names(t, dir), "lock", "salt") {
			info, err := os.Stat(filepath.Join(dir, name))
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v %v", name, info.Mode(), err)
			}
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v %v", path, info.Mode(), err)
		}
	}
}

func TestFilesLock(t *testing.T) {
	dir := t.TempDir()
	f, _ := openFiles(t, dir, ample)
	if _, err := contextstore.OpenFiles(dir, ample, nil); !errors.Is(err, contextstore.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	if err := f.Close(t.Context()); err != nil {
		t.Error(err)
	}
	openFiles(t, dir, ample)
}

// TestFilesReplace: a conversation has one state, not one of each turn; that of a system prompt
// which is much shorter stays.
func TestFilesReplace(t *testing.T) {
	f, _ := openFiles(t, t.TempDir(), ample)
	system := mustSave(t, f, stateOf(chainOf("s", 3), 1000))
	for turn := range 5 {
		chain := append(chainOf("s", 3), chainOf("t", 2+turn)...)
		mustSave(t, f, stateOf(chain, int64(5000+1000*turn)))
	}
	list := f.List()
	if len(list) != 2 || !slices.ContainsFunc(list, func(s contextstore.State) bool {
		return s.ID == system.ID
	}) || f.Stats().Replaced != 4 {
		t.Errorf("%d states, %+v", len(list), f.Stats())
	}
	// What is asked for with the system prompt alone gets the smaller one.
	ask := contextstore.Query{Format: "f", Links: append(chainOf("s", 3), chainOf("x", 2)...)}
	if s, depth, _ := f.Best(ask); s.ID != system.ID || depth != 3 {
		t.Errorf("got %+v, %d links", s, depth)
	}
	if _, err := save(t, f, stateOf(chainOf("s", 2), 900)); !errors.Is(err, contextstore.ErrHeld) {
		t.Errorf("what is held already is saved again: %v", err)
	}
	if n := len(names(t, f.Dir())); n != 4 {
		t.Errorf("%d files are left", n)
	}
}

// TestFilesNeverAskedAgain: prompts that never come back are written until there is no room.
func TestFilesNeverAskedAgain(t *testing.T) {
	f, _ := openFiles(t, t.TempDir(), contextstore.FileLimits{Bytes: 10_000})
	for i := range 100 {
		s := stateOf(chainOf(fmt.Sprint(i, "x"), 5), 1000)
		s.Uses = 1
		if _, err := save(t, f, s); (err == nil) != (i < 10) {
			t.Fatalf("state %d: %v", i, err)
		}
	}
	if st := f.Stats(); st.States != 10 || st.Refused != 90 || st.Evicted != 0 {
		t.Errorf("%+v", st)
	}
}
