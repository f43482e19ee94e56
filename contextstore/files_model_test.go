package contextstore_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/contextstore"
)

// naiveFiles is what Files is to do, in the simplest way: it looks at everything for everything.
type naiveFiles struct {
	limits contextstore.FileLimits
	held   []*naiveState // those that were used last come last
}

type naiveState struct {
	contextstore.State
	asked []asked // when, and how often at that time
}

type asked struct {
	at   time.Time
	uses int
}

func (n *naiveFiles) bytes() (sum int64) {
	for _, x := range n.held {
		sum += x.Bytes
	}
	return sum
}

// priority is uses × cost ÷ bytes, each use counting half for each half-life that has gone by.
func (x *naiveState) priority() float64 {
	var uses float64
	for _, a := range x.asked {
		uses += float64(a.uses) * math.Exp2(-float64(time.Since(a.at))/float64(contextstore.HalfLife))
	}
	return uses * x.Cost.Seconds() / float64(x.Bytes)
}

func sharedLinks(a, b []uint64) (n int) {
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

func sameGroup(a, b contextstore.State) bool { return a.Format == b.Format && a.Owner == b.Owner }

// covers reports whether a is of use wherever b is.
func covers(a, b contextstore.State) bool {
	if !sameGroup(a, b) || a.Whole != b.Whole || a.Bytes > 2*b.Bytes {
		return false
	}
	return sharedLinks(a.Links, b.Links) == len(b.Links) &&
		(!a.Whole || len(a.Links) == len(b.Links))
}

func (n *naiveFiles) room(s contextstore.State) error {
	for _, x := range n.held {
		if covers(x.State, s) {
			return contextstore.ErrHeld
		}
	}
	over := n.bytes() + s.Bytes - n.limits.Bytes
	var least []*naiveState
	for _, x := range n.held {
		if covers(s, x.State) {
			over -= x.Bytes
		} else {
			least = append(least, x)
		}
	}
	if over <= 0 {
		return nil
	}
	slices.SortStableFunc(least, func(a, b *naiveState) int {
		return int(math.Copysign(1, a.priority()-b.priority()))
	})
	worth := (&naiveState{State: s, asked: []asked{{time.Now(), s.Uses}}}).priority()
	for i, x := range least {
		if s.Uses < 2 || 2*x.priority() > worth {
			break
		}
		if over -= x.Bytes; over <= 0 {
			n.held = slices.DeleteFunc(n.held, func(x *naiveState) bool {
				return slices.Contains(least[:i+1], x)
			})
			return nil
		}
	}
	return contextstore.ErrFull
}

func (n *naiveFiles) commit(s contextstore.State) {
	x := &naiveState{State: s, asked: []asked{{time.Now(), s.Uses}}}
	n.held = slices.DeleteFunc(n.held, func(old *naiveState) bool {
		if covers(s, old.State) {
			x.asked = append(x.asked, old.asked...)
			x.Uses = max(x.Uses, old.Uses)
			return true
		}
		return false
	})
	n.held = append(n.held, x)
}

func (n *naiveFiles) best(q contextstore.Query) (id string, depth int, bytes int64) {
	for _, x := range n.held {
		d := sharedLinks(x.Links, q.Links)
		if x.Owner != q.Owner || q.Format != "" && x.Format != q.Format || d == 0 ||
			q.Tokens > 0 && x.Tokens > q.Tokens || x.Whole && d < len(x.Links) {
			continue
		}
		if d > depth || d == depth && x.Bytes < bytes {
			id, depth, bytes = x.ID, d, x.Bytes
		}
	}
	return id, depth, bytes
}

func (n *naiveFiles) find(id string) int {
	return slices.IndexFunc(n.held, func(x *naiveState) bool { return x.ID == id })
}

func (n *naiveFiles) used(id string) {
	i := n.find(id)
	x := n.held[i]
	x.Used, x.Uses, x.asked = time.Now(), x.Uses+1, append(x.asked, asked{time.Now(), 1})
	n.held = append(slices.Delete(n.held, i, i+1), x)
}

func (n *naiveFiles) expire(now time.Time) {
	n.held = slices.DeleteFunc(n.held, func(x *naiveState) bool {
		return now.Sub(x.Used) >= n.limits.TTL
	})
}

// modelDriver does the same to a store and to its model, at random.
type modelDriver struct {
	*rand.Rand
	t     *testing.T
	files *contextstore.Files
	naive *naiveFiles
	since time.Time // when the store was opened
}

// pass lets time pass. Every so often the store looks after its files.
func (d *modelDriver) pass(some time.Duration) {
	time.Sleep(some)
	synctest.Wait()
	d.naive.expire(d.since.Add(time.Since(d.since).Truncate(contextstore.TendEvery)))
}

// chain is one of few, so that many have links in common.
func (d *modelDriver) chain() []uint64 {
	var chain []uint64
	hash := uint64(1)
	for range 1 + d.IntN(6) {
		hash = hash*31 + 1 + d.Uint64N(2)
		chain = append(chain, hash*0x9e3779b97f4a7c15)
	}
	return chain
}

func (d *modelDriver) save() {
	s := contextstore.State{
		Format: string(rune('f' + d.IntN(2))), Owner: d.Uint64N(2), Links: d.chain(),
		Whole: d.IntN(4) == 0, Uses: 1 + d.IntN(3),
		Bytes: 300 + d.Int64N(700), Cost: time.Duration(1 + d.Int64N(1e9)), // hardly two the same
	}
	s.Tokens = 7
	name, err := d.files.Room(s)
	if want := d.naive.room(s); !errors.Is(err, want) {
		d.t.Fatalf("Room is %v, want %v", err, want)
	}
	if err != nil {
		return
	}
	if d.IntN(8) == 0 {
		d.files.Abort(name)
		return
	}
	path := filepath.Join(d.files.Dir(), name)
	if err := os.WriteFile(path, stateFile(s.Tokens, int(s.Bytes)), 0o644); err != nil {
		d.t.Fatal(err)
	}
	stored, err := d.files.Commit(name, s)
	if err != nil {
		d.t.Fatal(err)
	}
	s.ID, s.Made, s.Used = stored.ID, stored.Made, stored.Used
	d.naive.commit(s)
}

func (d *modelDriver) step() {
	d.pass(time.Millisecond) // no two are used at the same time
	switch d.IntN(10) {
	default:
		d.save()
	case 0, 1, 2:
		if n := len(d.naive.held); n > 0 {
			id := d.naive.held[d.IntN(n)].ID
			d.files.Used(id)
			d.naive.used(id)
		}
	case 3:
		if n := len(d.naive.held); n > 0 && d.IntN(4) == 0 {
			i := d.IntN(n)
			d.files.Drop(d.naive.held[i].ID, "test")
			d.naive.held = slices.Delete(d.naive.held, i, i+1)
		}
	case 4: // uses grow old
		d.pass(time.Duration(d.IntN(40)) * contextstore.TendEvery)
	case 5:
		if d.IntN(8) == 0 {
			d.reopen()
		}
	}
}

func (d *modelDriver) reopen() {
	dir := d.files.Dir()
	if err := d.files.Close(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
	d.open(dir)
}

func (d *modelDriver) open(dir string) {
	d.files, _ = openFiles(d.t, dir, d.naive.limits)
	d.since = time.Now()
	d.naive.expire(d.since)
}

func (d *modelDriver) compare() {
	list := d.files.List()
	slices.Reverse(list)
	ids := func(n int, at func(int) contextstore.State) (ids []string) {
		for i := range n {
			s := at(i)
			ids = append(ids, fmt.Sprint(s.ID, " ", s.Uses, s.Used.UnixNano(), s.Bytes))
		}
		return ids
	}
	got := ids(len(list), func(i int) contextstore.State { return list[i] })
	want := ids(len(d.naive.held), func(i int) contextstore.State { return d.naive.held[i].State })
	if !slices.Equal(got, want) {
		d.t.Fatalf("held are\n%q\nwant\n%q", got, want)
	}
	st := d.files.Stats()
	if st.Bytes != d.naive.bytes() || st.Bytes > st.Limits.Bytes || st.States != len(want) {
		d.t.Fatalf("%+v, want %d bytes in %d states", st, d.naive.bytes(), len(want))
	}
	for range 10 {
		q := contextstore.Query{
			Format: []string{"f", "g", ""}[d.IntN(3)], Owner: d.Uint64N(2), Links: d.chain(),
			Tokens: d.IntN(9),
		}
		s, depth, ok := d.files.Best(q)
		_, wantDepth, wantBytes := d.naive.best(q)
		if depth != wantDepth || s.Bytes != wantBytes || ok != (wantDepth > 0) {
			d.t.Fatalf("best of %+v is %+v, %d links; want %d bytes, %d links", q, s, depth,
				wantBytes, wantDepth)
		}
	}
}

// TestFilesModel compares a store with the simplest one that does the same.
func TestFilesModel(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				limits := contextstore.FileLimits{
					Bytes: 3000 << (seed % 4), TTL: 3 * time.Hour << (seed % 3 * 3),
				}
				d := &modelDriver{
					Rand: rand.New(rand.NewPCG(seed, 0)), t: t, naive: &naiveFiles{limits: limits},
				}
				d.open(dir)
				for range 400 {
					d.step()
					d.compare()
				}
				st := d.files.Stats()
				t.Logf("%+v", st)
				if n := len(names(t, dir)); n != 2*st.States {
					t.Errorf("%d files of %d states", n, st.States)
				}
			})
		})
	}
}
