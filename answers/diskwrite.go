package answers

import (
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"
)

// What the writer of a Disk does: each pass is one transaction, and then some tidying.

// target is how many bytes the database may have. The rest of the limit is for SQLite's log, which
// has one transaction, and for its index.
func (d *Disk) target() int64 { return d.limits.Bytes/8*7 - 32<<10 }

// pass writes what waits.
func (d *Disk) pass() {
	d.reopen()
	d.dbMu.RLock()
	batch := d.queue.take()
	opened := d.opened
	err := d.outage.Refused()
	tried := err == nil
	if tried {
		if err = d.write(batch); err != nil && !errors.Is(err, errRemoved) {
			d.outage.Failure(err)
		} else if err == nil {
			d.outage.Success()
		}
	}
	d.dbMu.RUnlock()
	if tried && err != nil {
		d.replace(opened, err)
	}
	d.queue.finish(err)
}

// reopen opens the file if that failed before, once it is time to try again.
func (d *Disk) reopen() {
	d.dbMu.RLock()
	missing := d.dbs == nil
	d.dbMu.RUnlock()
	if !missing || d.outage.Refused() != nil {
		return
	}
	d.dbMu.Lock()
	defer d.dbMu.Unlock()
	if d.dbs != nil {
		return
	}
	var err error
	if d.dbs, err = d.openOrReplace(); err != nil {
		d.outage.Failure(err)
	}
}

func (d *Disk) write(b batch) error {
	if d.dbs == nil {
		return errors.New("the file of stored answers cannot be opened")
	}
	if d.isGone(0) || d.isGone(1) {
		return errRemoved
	}
	now := time.Now()
	d.mu.Lock()
	t := &transaction{clock: d.clock, entries: d.entries, limits: d.limits, target: d.target(), now: now}
	t.prune = d.limits.Age > 0 && now.Sub(d.pruned) > time.Minute
	used := d.used
	d.used = map[Key]struct{}{}
	d.mu.Unlock()

	down, _ := d.outage.State()
	if err := t.run(d.dbs.write, b, used, down); err != nil {
		return fmt.Errorf("writing answers: %w", err)
	}
	d.mu.Lock()
	d.clock, d.entries = t.clock, t.entries
	d.evicted += t.evicted
	d.expired += t.expired
	if t.prune {
		d.pruned = now
	}
	d.mu.Unlock()
	// The log keeps a removed text until it is moved, which waits for a pass with nothing to write.
	d.unclean = d.unclean || t.removed
	if err := d.tidy(d.unclean && len(b.order) == 0); err != nil {
		return fmt.Errorf("tidying the file of answers: %w", err)
	}
	return nil
}

// transaction is one pass's. Its results count once it is committed.
type transaction struct {
	*sql.Tx
	limits  Limits
	target  int64
	now     time.Time
	prune   bool
	clock   int64
	entries int64
	evicted uint64
	expired uint64
	removed bool // anything
}

func (t *transaction) run(db *sql.DB, b batch, used map[Key]struct{}, down bool) (err error) {
	if t.Tx, err = db.Begin(); err != nil {
		return err
	}
	defer t.Rollback()
	if down {
		if err := ping(t.Tx); err != nil {
			return err
		}
	}
	for _, step := range []func() error{
		func() error { return t.touch(used) },
		func() error { return t.removeOld() },
		func() error { return t.remove(b.order) },
		func() error { return t.evict(b.bytes + int64(len(b.order))*64) },
		func() error { return t.insert(b) },
		func() error { return t.evict(0) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return t.Commit()
}

// touch notes that the keys were used.
func (t *transaction) touch(used map[Key]struct{}) error {
	if len(used) == 0 {
		return nil
	}
	stmt, err := t.Prepare(`UPDATE entries SET used = ? WHERE key = ?`)
	if err != nil {
		return err
	}
	defer stmt.Close()
	for key := range used {
		t.clock++
		if _, err := stmt.Exec(t.clock, key[:]); err != nil {
			return err
		}
	}
	return nil
}

// removeOld removes what is older than the limit.
func (t *transaction) removeOld() error {
	if !t.prune {
		return nil
	}
	before := t.now.Add(-t.limits.Age).UnixMilli()
	if _, err := t.Exec(`DELETE FROM data WHERE id IN (SELECT id FROM entries WHERE made < ?)`, before); err != nil {
		return err
	}
	n, err := affected(t.Exec(`DELETE FROM entries WHERE made < ?`, before))
	t.expired += uint64(n)
	t.entries -= n
	t.removed = t.removed || n > 0
	return err
}

func affected(result sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// remove removes the entries of the keys, those that are deleted as well as those that are replaced.
func (t *transaction) remove(keys []Key) error {
	if len(keys) == 0 {
		return nil
	}
	entry, err := t.Prepare(`DELETE FROM entries WHERE key = ? RETURNING id`)
	if err != nil {
		return err
	}
	defer entry.Close()
	for _, key := range keys {
		var id int64
		err := entry.QueryRow(key[:]).Scan(&id)
		if errors.Is(err, sql.ErrNoRows) {
			continue
		}
		if err != nil {
			return err
		}
		if _, err := t.Exec(`DELETE FROM data WHERE id = ?`, id); err != nil {
			return err
		}
		t.entries--
		t.removed = true
	}
	return nil
}

func (t *transaction) insert(b batch) error {
	if len(b.order) == 0 {
		return nil
	}
	data, err := t.Prepare(`INSERT INTO data VALUES (?, ?)`)
	if err != nil {
		return err
	}
	defer data.Close()
	entry, err := t.Prepare(`INSERT INTO entries (key, kind, made, used, sum, id) VALUES (?, ?, ?, ?, ?, ?)`)
	if err != nil {
		return err
	}
	defer entry.Close()
	for _, key := range b.order {
		e := b.entries[key]
		if e.Kind == 0 {
			continue
		}
		if e.Data == nil {
			e.Data = []byte{} // nil would be NULL
		}
		t.clock++
		if _, err := data.Exec(t.clock, e.Data); err != nil {
			return err
		}
		_, err := entry.Exec(e.Key[:], int64(e.Kind), e.Made.UnixMilli(), t.clock, checksum(e), t.clock)
		if err != nil {
			return err
		}
		t.entries++
	}
	return nil
}

// evict removes what was not used for the longest time until there is room for more bytes.
func (t *transaction) evict(more int64) error {
	for {
		pages, free, err := pageCounts(t.Tx)
		if err != nil {
			return err
		}
		inUse := (pages - free) * diskPage
		excess := inUse + more - t.target
		if excess <= 0 || t.entries <= 0 {
			return nil
		}
		// About as many as have that many bytes, and in small steps at the end.
		n := max(1, t.entries*excess/max(inUse, 1)*3/4)
		if _, err := t.Exec(`DELETE FROM data WHERE id IN
			(SELECT id FROM entries ORDER BY used, id LIMIT ?)`, n); err != nil {
			return err
		}
		n, err = affected(t.Exec(`DELETE FROM entries WHERE key IN
			(SELECT key FROM entries ORDER BY used, id LIMIT ?)`, n))
		if err != nil {
			return err
		}
		if n == 0 {
			return errForeign // the count is wrong
		}
		t.removed = true
		t.evicted += uint64(n)
		t.entries -= n
	}
}

type querier interface {
	QueryRow(query string, args ...any) *sql.Row
}

// pageCounts returns how many pages the database has, and how many of them are free.
func pageCounts(db querier) (pages, free int64, err error) {
	if err := db.QueryRow(`PRAGMA page_count`).Scan(&pages); err != nil {
		return 0, 0, err
	}
	err = db.QueryRow(`PRAGMA freelist_count`).Scan(&free)
	return pages, free, err
}

// tidy gives room back to the file system: what is beyond the limit, and what is free if that is
// much. It moves SQLite's log into the file once it is long, or if it is to be moved.
func (d *Disk) tidy(move bool) error {
	db := d.dbs.write
	for {
		pages, free, err := pageCounts(db)
		if err != nil {
			return err
		}
		beyond := pages - max(d.target(), 0)/diskPage
		if free > max(pages/4, 16) {
			beyond = max(beyond, free-pages/8)
		}
		beyond = min(beyond, free, diskSlice)
		if beyond > 0 {
			if _, err := db.Exec(fmt.Sprintf(`PRAGMA incremental_vacuum(%d)`, beyond)); err != nil {
				return err
			}
		}
		if fileSize(filepath.Join(d.dir, diskFile+"-wal")) > min(d.limits.Bytes/16, 8<<20) || beyond > 0 || move {
			var busy, log, moved int64
			err := db.QueryRow(`PRAGMA wal_checkpoint(TRUNCATE)`).Scan(&busy, &log, &moved)
			if err != nil {
				return err
			}
			d.unclean = d.unclean && busy != 0
		}
		if beyond < diskSlice {
			return nil
		}
	}
}

// places returns "(?, ?, …)" with n question marks.
func places(n int) string { return "(" + strings.Repeat("?, ", n-1) + "?)" }

// fileURI is a path as SQLite's URI.
type fileURI struct{ path string }

func (f *fileURI) String() string {
	path := filepath.ToSlash(f.path)
	if abs, err := filepath.Abs(f.path); err == nil {
		path = filepath.ToSlash(abs)
	}
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // C:/…
	}
	return (&url.URL{Scheme: "file", Path: path}).String()
}
