package realollama

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// cacheEnv names the folder to use in place of the user's cache folder.
const cacheEnv = "OLLAMA_CACHEPROXY_CACHE"

// Cache has built servers and models. Each entry is a folder named by its content and by a hash of
// how it was made. It appears complete or not at all, so any number of processes may share a cache.
type Cache struct {
	dir      string
	progress io.Writer
}

// OpenCache returns the cache in the folder that OLLAMA_CACHEPROXY_CACHE names, or else in
// ollama-cacheproxy under the user's cache folder. Long steps report to progress.
func OpenCache(progress io.Writer) (*Cache, error) {
	dir := os.Getenv(cacheEnv)
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("finding the cache folder (set %s to choose one): %w", cacheEnv, err)
		}
		dir = filepath.Join(base, "ollama-cacheproxy")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("finding the cache folder: %w", err)
	}
	return &Cache{dir: dir, progress: progress}, nil
}

// Dir is the cache's folder.
func (c *Cache) Dir() string { return c.dir }

func (c *Cache) say(format string, args ...any) {
	fmt.Fprintf(c.progress, "realollama: "+format+"\n", args...)
}

// recipe says how an entry is made.
type recipe struct {
	// name begins the entry's folder name: no slashes.
	name string
	// inputs is everything that the result depends on; it is hashed into the folder's name.
	inputs []string
	// announce says what is done and how long it takes.
	announce string
	// needs are made first, so that make may ask the cache for them.
	needs []recipe
	make  func(ctx context.Context, b *build) error
}

func (r recipe) key() string {
	h := sha256.New()
	for _, input := range append([]string{runtime.GOOS, runtime.GOARCH}, r.inputs...) {
		fmt.Fprintf(h, "%d:%s", len(input), input)
	}
	return r.name + "-" + hex.EncodeToString(h.Sum(nil))[:12]
}

// path is where the recipe's entry is, or will be.
func (c *Cache) path(r recipe) string { return filepath.Join(c.dir, r.key()) }

// ensure returns the recipe's folder in the cache, and makes it if it is missing. One process makes
// it, others wait.
func (c *Cache) ensure(ctx context.Context, r recipe) (string, error) {
	key := r.key()
	dir := c.path(r)
	if exists(dir) {
		return dir, nil
	}
	for _, need := range r.needs {
		if _, err := c.ensure(ctx, need); err != nil {
			return "", err
		}
	}
	unlock, err := c.lock(ctx, key)
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(dir) {
		return dir, nil
	}
	if err := c.makeEntry(ctx, r, key, dir); err != nil {
		return "", err
	}
	return dir, nil
}

func (c *Cache) makeEntry(ctx context.Context, r recipe, key, dir string) (err error) {
	c.say("%s …", r.announce)
	start := time.Now()

	if err := c.clearUnfinished(key); err != nil {
		return err
	}
	temp := filepath.Join(c.dir, "tmp", key)
	b := &build{
		Cache:  c,
		Result: filepath.Join(temp, "result"),
		Work:   filepath.Join(temp, "work"),
	}
	logPath := filepath.Join(c.dir, "logs", key+".log")
	for _, d := range []string{b.Result, b.Work, filepath.Dir(logPath)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("making a build folder: %w", err)
		}
	}
	b.log, err = os.Create(logPath)
	if err != nil {
		return fmt.Errorf("making a build log: %w", err)
	}
	defer b.log.Close()

	stop := c.heartbeat(r.name, start, &b.tracker)
	err = r.make(ctx, b)
	stop()
	if err == nil {
		err = os.Rename(b.Result, dir)
	}
	// The work folder is large, and the log shows what failed.
	err = errors.Join(err, os.RemoveAll(temp))
	if err != nil {
		return fmt.Errorf("making %s: %w\nThe whole log: %s", r.name, err, logPath)
	}
	c.say("%s is ready after %s", r.name, time.Since(start).Round(100*time.Millisecond))
	return nil
}

// clearUnfinished removes the leftovers of killed builds: of the entry key, whose lock the caller
// holds, and of every entry that no process is making now.
func (c *Cache) clearUnfinished(key string) error {
	temp := filepath.Join(c.dir, "tmp")
	left, err := os.ReadDir(temp)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("looking for unfinished builds: %w", err)
	}
	for _, entry := range left {
		if entry.Name() != key {
			f, err := c.openLock(entry.Name())
			if err != nil {
				return err
			}
			defer f.Close()
			if ok, err := tryLock(f); err != nil || !ok {
				continue
			}
		}
		if err := os.RemoveAll(filepath.Join(temp, entry.Name())); err != nil {
			return fmt.Errorf("clearing an unfinished build: %w", err)
		}
	}
	return nil
}

// lock takes the lock of one entry, shared by all processes of this machine.
func (c *Cache) lock(ctx context.Context, key string) (unlock func(), err error) {
	f, err := c.openLock(key)
	if err != nil {
		return nil, err
	}
	told := false
	for {
		ok, err := tryLock(f)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
		}
		if ok {
			// Closing the file releases the lock; the file stays, since
			// another process may wait on it.
			return func() { f.Close() }, nil
		}
		if !told {
			c.say("waiting for another process that makes %s …", key)
			told = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for the lock %s: %w", f.Name(), ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (c *Cache) openLock(key string) (*os.File, error) {
	path := filepath.Join(c.dir, "locks", key)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the locks folder: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening a lock: %w", err)
	}
	return f, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
