// Package batches is OpenAI's Files and Batch API on one's own machine: an http.Handler for
// /v1/files and /v1/batches. Files and batches lie in one folder; package batch sends a batch's
// requests, and its journal is why a batch goes on where it stopped, however the process ended.
//
// Whoever asks is known by a text, the owner, which the caller finds for each request (of its API
// key, say; "" is an owner, too). Files and batches belong to their owner, and to others do not
// exist. A batch's requests are sent, in its owner's name, through a handler within this process.
package batches

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	// MaxFile is how many bytes an uploaded file may have: OpenAI's limit.
	MaxFile = 200 << 20
	// MaxRequests is how many requests a batch may have: OpenAI's limit.
	MaxRequests = 50_000
	// maxObjects is how many files, and how many batches, there may be.
	maxObjects = 100_000

	sweepEvery = time.Minute // for what is too old
)

// ErrLocked means that another process has the folder.
var ErrLocked = errors.New("another process has this folder")

// Config configures a Service. Dir, Bytes, Running, TTL, Log, Owner, As and Knows must be set.
type Config struct {
	Dir     string        // the folder; it is made if it is missing
	Bytes   int64         // that all files may have together, and the results that are being written
	Running int           // how many batches run at once; further ones wait for their turn
	TTL     time.Duration // how long a file is kept, and a batch after its end; 0: for ever
	Log     *slog.Logger

	// Owner returns who asks. As returns a context with which a request to the handler of Run is
	// sent in the owner's name. Knows reports whether the owner may still send requests.
	Owner func(*http.Request) string
	As    func(ctx context.Context, owner string) context.Context
	Knows func(owner string) bool

	pause time.Duration // before a batch that could not go on is tried again; 0: pause
}

// Service keeps files and batches, and runs the batches. Open makes one.
type Service struct {
	Config
	mux  *http.ServeMux
	lock *os.File

	mu       sync.Mutex // guards the fields below, and what the maps' values point to
	files    map[string]*file
	batches  map[string]*job
	seq      int64
	stored   int64 // bytes of files
	arriving int64 // bytes of files that are being uploaded or written
	working  map[string]int64
	running  map[string]int // of each owner
	turn     int            // how many places were given so far
	served   map[string]int // the turn at which each owner got one last
	places   int            // free ones of Running
	waiting  []*job         // for a place
	start    func(*job)     // starts the work on a batch; nil: Run has not been called, or has ended
	drained  bool
	jobs     sync.WaitGroup
}

// Open opens the folder and reads what is in it. Run goes on with batches that are not at their
// end; Close must be called last.
func Open(c Config) (*Service, error) {
	c.pause = cmp.Or(c.pause, pause)
	s := &Service{
		Config: c, files: map[string]*file{}, batches: map[string]*job{}, working: map[string]int64{},
		running: map[string]int{}, served: map[string]int{}, places: c.Running,
	}
	for _, dir := range []string{c.Dir, s.path(filesFolder), s.path(batchesFolder)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("making the folder of files and batches: %w", err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			return nil, fmt.Errorf("keeping others out of the folder of files and batches: %w", err)
		}
	}
	var err error
	if s.lock, err = os.OpenFile(s.path("lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("locking the folder of files and batches: %w", err)
	}
	if err := lockFile(s.lock); err != nil {
		s.lock.Close()
		return nil, fmt.Errorf("%w: %s (%w)", ErrLocked, c.Dir, err)
	}
	if err := s.load(); err != nil {
		s.lock.Close()
		return nil, err
	}
	s.routes()
	return s, nil
}

// Close ends the use of the folder, after Run has returned.
func (s *Service) Close() { s.lock.Close() }

// path returns a path within the folder.
func (s *Service) path(names ...string) string {
	return filepath.Join(append([]string{s.Dir}, names...)...)
}

// Run sends the requests of batches to a handler until ctx ends, and then stops: what is not done
// goes on after the next Open.
func (s *Service) Run(ctx context.Context, to http.Handler) {
	s.mu.Lock()
	s.start = func(j *job) {
		running, cancel := context.WithCancelCause(ctx)
		j.cancel, j.gate = cancel, newGate()
		s.jobs.Go(func() { // ends with ctx
			defer cancel(nil)
			s.work(ctx, running, j, to)
		})
	}
	unfinished := s.sorted(func(j *job) bool { return !j.finished() })
	for _, j := range unfinished {
		s.start(j)
	}
	s.mu.Unlock()
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		s.sweep(time.Now())
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.mu.Lock()
			s.start = nil
			s.mu.Unlock()
			s.jobs.Wait()
			return
		}
	}
}

// Drain begins no more requests of any batch, and returns when those that were begun are answered
// and recorded, or when ctx ends. The caller then ends the context of Run.
func (s *Service) Drain(ctx context.Context) {
	s.mu.Lock()
	s.drained = true
	var gates []*gate
	for _, j := range s.batches {
		if j.gate != nil && !j.finished() {
			gates = append(gates, j.gate)
		}
	}
	s.mu.Unlock()
	for _, g := range gates {
		g.close()
	}
	for _, g := range gates {
		select {
		case <-g.quiet:
		case <-ctx.Done():
			return
		}
	}
}

// sorted returns the batches that f selects, oldest first. s.mu is held.
func (s *Service) sorted(f func(*job) bool) (list []*job) {
	for _, j := range s.batches {
		if f(j) {
			list = append(list, j)
		}
	}
	slices.SortFunc(list, func(a, b *job) int { return cmp.Compare(a.Seq, b.Seq) })
	return list
}

// used returns how many bytes there are. s.mu is held.
func (s *Service) used() int64 {
	sum := s.arriving + s.stored
	for _, n := range s.working {
		sum += n
	}
	return sum
}

// room reports whether there is room for more.
func (s *Service) room() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used() < s.Bytes
}

// sweep removes what is too old.
func (s *Service) sweep(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		if f.ExpiresAt > 0 && f.ExpiresAt <= now.Unix() && s.userOf(f.ID) == nil {
			s.removeFile(f)
		}
	}
	for _, j := range s.batches {
		if s.TTL > 0 && j.finished() && j.End > 0 && now.Sub(time.Unix(j.End, 0)) >= s.TTL {
			if err := os.Remove(s.path(batchesFolder, j.ID+metaSuffix)); err != nil {
				s.Log.Warn("an old batch cannot be removed", "batch", j.ID, "err", err)
				continue
			}
			delete(s.batches, j.ID)
		}
	}
}

// userOf returns a batch that is not at its end and reads a file, or nil. s.mu is held.
func (s *Service) userOf(id string) *job {
	for _, j := range s.batches {
		if j.InputFileID == id && !j.finished() {
			return j
		}
	}
	return nil
}

// removeFile removes a file. s.mu is held.
func (s *Service) removeFile(f *file) error {
	// Without the description the data is removed at the next start at the latest.
	if err := os.Remove(s.path(filesFolder, f.ID+metaSuffix)); err != nil {
		s.Log.Warn("a file cannot be removed", "file", f.ID, "err", err)
		return err
	}
	delete(s.files, f.ID)
	s.stored -= f.Bytes
	if err := os.Remove(s.path(filesFolder, f.ID+dataSuffix)); err != nil {
		s.Log.Warn("a file's data cannot be removed", "file", f.ID, "err", err)
	}
	return nil
}
