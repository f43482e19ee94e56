package contextstore_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// TestFilesNoDisk: of a disk that has no room, what is to be left free is; one line says so.
func TestFilesNoDisk(t *testing.T) {
	f, log := openFiles(t, t.TempDir(), contextstore.FileLimits{Bytes: 1 << 40, Free: 1 << 62})
	for range 3 {
		_, err := save(t, f, stateOf(chainOf("a", 5), 4000))
		if !errors.Is(err, contextstore.ErrNoDisk) {
			t.Errorf("saving: %v", err)
		}
	}
	if log.count("\n") != 1 || f.Stats().Refused != 3 {
		t.Errorf("%+v; logged: %s", f.Stats(), log)
	}
}

// TestFilesBadState: what an engine writes is looked at before it counts.
func TestFilesBadState(t *testing.T) {
	f, _ := openFiles(t, t.TempDir(), contextstore.FileLimits{Bytes: 100_000})
	for name, file := range map[string][]byte{
		"nothing":              nil,
		"an empty slot":        stateFile(0, 40),
		"something else":       []byte(strings.Repeat("x", 4000)),
		"more tokens than fit": stateFile(1000, 0)[:2000],
		"more than the limit":  stateFile(10, 100_001),
	} {
		s := stateOf(chainOf("a", 5), 4000)
		part, err := f.Room(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(f.Dir(), part), file, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := f.Commit(part, s); err == nil {
			t.Errorf("%s is stored as %+v", name, got)
		}
	}
	part, err := f.Room(stateOf(chainOf("a", 5), 4000))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Commit(part, stateOf(chainOf("a", 5), 4000)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that was never written: %v", err)
	}
	if _, err := f.Commit(part, stateOf(chainOf("a", 5), 4000)); err == nil {
		t.Error("committed twice")
	}
	if left := names(t, f.Dir()); len(left) != 0 {
		t.Errorf("left are %q", left)
	}
	for name, s := range map[string]contextstore.State{
		"no links":  {Format: "f", Bytes: 1},
		"no format": {Links: []uint64{1}, Bytes: 1},
		"counts of other links": {
			Format: "f", Links: []uint64{1}, LinkTokens: []int32{1, 2}, Bytes: 1,
		},
	} {
		if _, err := f.Room(s); err == nil {
			t.Errorf("room for a state of %s", name)
		}
	}
	// Nothing of it is left to be made room for.
	big := stateOf(chainOf("a", 5), 100_000)
	big.Uses = 1
	mustSave(t, f, big)
}

// TestFilesLargerThanSaid: the limit holds whatever an engine writes, and while it writes.
func TestFilesLargerThanSaid(t *testing.T) {
	dir := t.TempDir()
	f, _ := openFiles(t, dir, contextstore.FileLimits{Bytes: 10_000})
	mustSave(t, f, stateOf(chainOf("a", 5), 3000))
	large, small := stateOf(chainOf("b", 5), 2000), stateOf(chainOf("c", 5), 4000)
	var parts []string
	for _, s := range []contextstore.State{large, small} {
		part, err := f.Room(s)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, part)
	}
	for i, test := range []struct {
		state contextstore.State
		size  int
		left  int64
	}{{large, 9000, 9000}, {small, 4000, 4000}} {
		file := stateFile(7, test.size)
		if err := os.WriteFile(filepath.Join(dir, parts[i]), file, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := f.Commit(parts[i], test.state)
		if err != nil || s.Bytes != int64(test.size) || f.Stats().Bytes != test.left {
			t.Errorf("%+v %v; %+v", s, err, f.Stats())
		}
	}
}

// TestFilesOlderTokens: builds before about 10,800 write the tokens themselves.
func TestFilesOlderTokens(t *testing.T) {
	file := stateFile(7, 4000)
	copy(file[8:], []byte{4, 0, 0, 0, 9, 0, 0, 0})
	if n, err := contextstore.ParseHeader(file); n != 4 || err != nil {
		t.Errorf("%d tokens, %v", n, err)
	}
}

// TestFilesGone: files that others remove or change are noticed when they are wanted, and by and by.
func TestFilesGone(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f, log := openFiles(t, dir, ample)
		var ids []string
		for i := range 4 {
			s := stateOf(chainOf(fmt.Sprint(i, "x"), 5), 4000)
			ids = append(ids, mustSave(t, f, s).ID)
		}
		if _, err := contextstore.RemoveFiles(dir, ids[0]); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(dir, ids[1]), 3999); err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			ask := contextstore.Query{Format: "f", Links: chainOf(fmt.Sprint(i, "x"), 5)}
			if s, _, ok := f.Best(ask); ok {
				t.Errorf("got %+v", s)
			}
		}
		if st := f.Stats(); st.States != 2 || st.Dropped != 2 || log.count("dropped") != 2 {
			t.Errorf("%+v; logged: %s", st, log)
		}
		if _, err := contextstore.RemoveFiles(dir, ids[2]); err != nil {
			t.Fatal(err)
		}
		time.Sleep(contextstore.TendEvery)
		synctest.Wait()
		if st := f.Stats(); st.States != 1 || st.Dropped != 3 || log.count("removed by others") != 1 {
			t.Errorf("%+v; logged: %s", st, log)
		}
		f.Used(ids[2]) // which is no more
		f.Drop(ids[2], "test")
		if left := names(t, dir); len(left) != 2 {
			t.Errorf("left are %q", left)
		}
	})
}

// TestFilesChanged: a file in which a byte has changed is not attached, and one that is as it was is
// read for that once.
func TestFilesChanged(t *testing.T) {
	dir := t.TempDir()
	f, _ := openFiles(t, dir, ample)
	s := mustSave(t, f, stateOf(chainOf("a", 5), 4000))
	path := filepath.Join(dir, s.ID)
	flip := func() {
		t.Helper()
		state, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		state[3000] ^= 1
		if err := os.WriteFile(path, state, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string, want bool) {
		t.Helper()
		if err := f.Check(t.Context(), s.ID); (err == nil) != want {
			t.Errorf("%s: %v", when, err)
		}
	}
	check("not settled", true)
	for _, again := range []bool{false, true} {
		if err := f.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if again {
			flip()
		}
		f, _ = openFiles(t, dir, ample)
		check(fmt.Sprint("changed: ", again), !again)
		if !again {
			flip()
			check("changed after it was read", true)
			flip()
		}
	}
	check("dropped", false)
	if st := f.Stats(); st.States != 0 || st.Dropped != 1 || len(names(t, dir)) != 0 {
		t.Errorf("%+v, %q", st, names(t, dir))
	}
}

// TestFilesFolderGone: without its folder the store has nothing, and says so once.
func TestFilesFolderGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "contexts")
	synctest.Test(t, func(t *testing.T) {
		f, log := openFiles(t, dir, ample)
		mustSave(t, f, stateOf(chainOf("a", 5), 4000))
		part, err := f.Room(stateOf(chainOf("b", 5), 4000))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Commit(part, stateOf(chainOf("b", 5), 4000)); err == nil {
			t.Error("stored without a folder")
		}
		for range 3 {
			if _, err := f.Room(stateOf(chainOf("c", 5), 4000)); err == nil {
				t.Error("room without a folder")
			}
			time.Sleep(contextstore.TendEvery)
			synctest.Wait()
		}
		if f.Stats().States != 0 || log.count("cannot be stored") != 1 || log.count("\n") != 2 {
			t.Errorf("%+v; logged: %s", f.Stats(), log)
		}
	})
}

// TestFilesTTL: what is of no use for so long goes, also while nobody looks.
func TestFilesTTL(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		limits := contextstore.FileLimits{Bytes: 1 << 40, TTL: time.Hour}
		f, _ := openFiles(t, dir, limits)
		used := mustSave(t, f, stateOf(chainOf("a", 5), 4000))
		mustSave(t, f, stateOf(chainOf("b", 5), 4000))
		pass := func(d time.Duration, want int) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if n := f.Stats().States; n != want || len(names(t, dir)) != 2*want {
				t.Errorf("%d states, want %d; files are %q", n, want, names(t, dir))
			}
		}
		pass(59*time.Minute, 2)
		f.Used(used.ID)
		pass(time.Minute, 1)
		pass(58*time.Minute, 1)
		pass(time.Minute, 0)
		if f.Stats().Expired != 2 {
			t.Errorf("%+v", f.Stats())
		}

		mustSave(t, f, stateOf(chainOf("a", 5), 4000))
		f.Close(t.Context())
		time.Sleep(time.Hour)
		f, log := openFiles(t, dir, limits)
		if n := f.Stats().States; n != 0 || len(names(t, dir)) != 0 || log.count("\n") != 0 {
			t.Errorf("%d states are back; logged: %s", n, log)
		}
	})
}

// TestFilesSmaller: a store that is opened with less room keeps what is worth most.
func TestFilesSmaller(t *testing.T) {
	dir := t.TempDir()
	f, _ := openFiles(t, dir, ample)
	for i := range 10 {
		s := stateOf(chainOf(fmt.Sprint(i, "x"), 5), 1000)
		s.Cost = time.Duration(1+i*7%10) * time.Second
		mustSave(t, f, s)
	}
	if err := f.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, _ = openFiles(t, dir, contextstore.FileLimits{Bytes: 3500})
	var least time.Duration = 1 << 60
	for _, s := range f.List() {
		least = min(least, s.Cost)
	}
	if st := f.Stats(); st.States != 3 || least != 8*time.Second || len(names(t, dir)) != 6 {
		t.Errorf("%+v, the least costs %v", st, least)
	}
}

// TestFilesInTurn has prompts come in turn for which there is room for half: that is the order in
// which what is least recently used is always what is wanted next. They do not push each other out
// for ever; what is worth more comes in all the same, and so does what is asked for when those are
// no more.
func TestFilesInTurn(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f, _ := openFiles(t, dir, contextstore.FileLimits{Bytes: 10_000})
		written := 0
		ask := func(name string, uses int, cost time.Duration) bool {
			links := chainOf(name+"x", 5)
			if s, depth, ok := f.Best(contextstore.Query{Format: "f", Links: links}); ok && depth == 5 {
				f.Used(s.ID)
				return true
			}
			s := stateOf(links, 1000)
			s.Uses, s.Cost = uses, cost
			if _, err := save(t, f, s); err == nil {
				written++
			}
			return false
		}
		hits := 0
		for round := range 50 {
			for i := range 20 {
				if ask(fmt.Sprint(i, "-"), round+1, time.Second) {
					hits++
				}
				time.Sleep(time.Minute)
			}
		}
		t.Logf("%d files written, %d hits of 1000", written, hits)
		if written > 40 || hits < 450 {
			t.Errorf("%d files written, %d hits", written, hits)
		}
		ask("costly", 2, time.Hour)
		if !ask("costly", 3, time.Hour) {
			t.Error("what is worth much does not come in")
		}
		time.Sleep(48 * time.Hour)
		for round := range 4 {
			for i := range 9 {
				ask(fmt.Sprint(i, "new"), round+1, time.Second)
			}
		}
		for i := range 9 {
			if !ask(fmt.Sprint(i, "new"), 5, time.Second) {
				t.Errorf("new %d does not come in after two days", i)
			}
		}
	})
}

// TestFilesShare: with Share whoever asks is served, without it only the owner.
func TestFilesShare(t *testing.T) {
	dir := t.TempDir()
	for _, share := range []bool{false, true, false} {
		f, _ := openFiles(t, dir, contextstore.FileLimits{Bytes: 1 << 40, Share: share})
		s := stateOf(chainOf("a", 5), 4000)
		s.Owner = f.OwnerOf("mine")
		if _, err := save(t, f, s); err != nil && !errors.Is(err, contextstore.ErrHeld) {
			t.Fatal(err)
		}
		for owner, want := range map[string]bool{"mine": true, "other": share, "": share} {
			q := contextstore.Query{Format: "f", Owner: f.OwnerOf(owner), Links: s.Links}
			if _, _, ok := f.Best(q); ok != want {
				t.Errorf("share %v: %q is served: %v", share, owner, ok)
			}
		}
		if err := f.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFilesNoText: neither names nor what the store writes beside a state tell its owner.
func TestFilesNoText(t *testing.T) {
	dir := t.TempDir()
	f, _ := openFiles(t, dir, ample)
	s := stateOf(chainOf("a", 5), 4000)
	s.Owner = f.OwnerOf("secret key")
	mustSave(t, f, s)
	for _, name := range append(names(t, dir), "salt") {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || strings.Contains(name+string(text), "secret") {
			t.Errorf("%s: %q %v", name, text, err)
		}
	}
	other, _ := openFiles(t, t.TempDir(), ample)
	if other.OwnerOf("secret key") == s.Owner {
		t.Error("an owner is the same in two folders")
	}
}

// TestFilesClosed: nothing is stored or found in a store that is closed.
func TestFilesClosed(t *testing.T) {
	f, _ := openFiles(t, t.TempDir(), ample)
	s := stateOf(chainOf("a", 5), 4000)
	mustSave(t, f, s)
	for range 2 {
		if err := f.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := f.Room(stateOf(chainOf("b", 5), 4000)); !errors.Is(err, contextstore.ErrClosed) {
		t.Errorf("Room: %v", err)
	}
	if s, _, ok := f.Best(contextstore.Query{Format: "f", Links: s.Links}); ok {
		t.Errorf("Best: %+v", s)
	}
}

// TestFilesConcurrent has many use a store that is too small for them, while its files vanish.
func TestFilesConcurrent(t *testing.T) {
	dir := t.TempDir()
	limits := contextstore.FileLimits{Bytes: 20_000, TTL: time.Hour}
	f, _ := openFiles(t, dir, limits)
	var wg sync.WaitGroup
	for worker := range uint64(4) {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(worker, 0))
			for range 300 {
				links := chainOf(string(rune('a'+random.IntN(3))), 1+random.IntN(9))
				s := stateOf(links, 500+random.Int64N(1000))
				s.Cost, s.Uses = time.Duration(random.Int64N(1e9)), 1+random.IntN(5)
				best, _, ok := f.Best(contextstore.Query{Format: "f", Links: links})
				switch random.IntN(6) {
				default:
					part, err := f.Room(s)
					if err != nil {
						break
					}
					size := s.Bytes + random.Int64N(200) - 100
					os.WriteFile(filepath.Join(dir, part), stateFile(7, int(size)), 0o600)
					if _, err := f.Commit(part, s); err != nil {
						t.Error(err)
					}
				case 0:
					if part, err := f.Room(s); err == nil {
						f.Abort(part)
					}
				case 1:
					if ok {
						f.Used(best.ID)
					}
				case 2:
					if ok && random.IntN(8) == 0 {
						contextstore.RemoveFiles(dir, best.ID)
					}
				case 3:
					f.List()
				}
				if st := f.Stats(); st.Bytes < 0 || st.Bytes > limits.Bytes {
					t.Errorf("%+v", st)
				}
			}
		})
	}
	saved := make(chan struct{})
	tended := make(chan struct{})
	go func() {
		defer close(tended)
		for {
			select {
			case <-saved:
				return
			default:
				f.Tend()
			}
		}
	}()
	wg.Wait()
	close(saved)
	<-tended
	f.Tend()
	if n := f.Stats().States; len(names(t, dir)) != 2*n {
		t.Errorf("%d states, but %q", n, names(t, dir))
	}
	if err := f.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, _ = openFiles(t, dir, limits)
	var bytes int64
	for _, s := range f.List() {
		info, err := os.Stat(filepath.Join(dir, s.ID))
		if err != nil || info.Size() != s.Bytes {
			t.Errorf("%+v: %v", s, err)
		}
		bytes += s.Bytes
	}
	if st := f.Stats(); st.Bytes != bytes || len(names(t, dir)) != 2*st.States || st.States == 0 {
		t.Errorf("%+v, but %d bytes in %q", st, bytes, names(t, dir))
	}
}
