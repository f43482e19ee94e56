package answers

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"modernc.org/sqlite"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
)

// The names in the folder of a Disk. Nothing else there is touched.
const (
	diskFile   = "answers.db"
	diskLock   = "answers.lock"
	diskBroken = "answers.db.broken"
)

const (
	// diskMark is the application_id of the file: "OCPA".
	diskMark = 0x4f435041
	// diskVersion is its user_version.
	diskVersion = 1
	// diskEvery is how often the writer looks for what has become too old, and tries a disk that
	// was full.
	diskEvery = 5 * time.Second
	// diskSlice is how many pages are given back to the file system at a time.
	diskSlice = 1024
	// diskPage is the size of a page, in bytes. Of 16 KiB, vectors of 384 or 768 numbers waste 6 %,
	// and those of 1024 a quarter; of 4 KiB, it would be a quarter, and a tenth.
	diskPage = 16384
	// readAtOnce is how many keys one statement asks for.
	readAtOnce = 50
)

// Disk is a Store in one file of a folder, an SQLite database. docs/answer-stores.md says why SQLite.
// Open it with OpenDisk; it must be closed.
//
// Put and Delete return at once. One goroutine writes what they leave, all that has come meanwhile
// in one transaction; Get finds it from the beginning. What was written (see Flush) survives the end
// of the process, however it ends. The end of the system (a loss of power) may cost the last
// transactions, but never leaves half of one: the file is synced when SQLite moves its log into it,
// not with each transaction.
//
// Each entry has a checksum, and one that does not match is as if it were not there. A file that is
// not what it should be is set aside as answers.db.broken, one line says so, and a new file is begun.
//
// Which entries are evicted first is approximate: an entry's use is only noted if at least a
// sixteenth of the entries were put or used since it was noted last, so most hits write nothing.
//
// Get waits for the disk for a second at most, and once readers of that many requests wait as long,
// not at all. If the folder is removed, it is made again, empty.
//
// Limits.Bytes bounds the files, including the room that SQLite has not given back yet, except for
// what one transaction adds for a moment, and a file that was set aside. An entry older than
// Limits.Age is removed within a minute. Text that was removed is overwritten with zeros.
type Disk struct {
	dir    string
	limits Limits
	log    *slog.Logger
	queue  *queue
	outage *outage.Outage

	overdue atomic.Int32 // reads that nobody waits for any more

	// dbMu is held for reading by those who use the databases, and for writing by those who
	// replace them.
	dbMu   sync.RWMutex
	dbs    *databases     // nil: could not be opened
	opened int            // counts how often they were replaced
	lock   *sql.DB        // nil: the folder could not be locked again
	kept   [2]fs.FileInfo // the files as they were opened: diskFile, diskLock

	unclean bool // only of the writer: the log may have text that was removed since

	mu      sync.Mutex // guards everything below
	secret  [32]byte
	entries int64
	evicted uint64
	expired uint64
	clock   int64            // counts what is put, or noted as used
	used    map[Key]struct{} // whose use is to be noted
	pruned  time.Time        // when entries that are too old were last removed
}

// databases are two views of one file: reading does not wait for writing.
type databases struct {
	write, read       *sql.DB
	readOne, readMany *sql.Stmt
}

// OpenDisk opens the store in a folder, which it makes if there is none. Only one process may have
// it open. log may be nil.
func OpenDisk(dir string, limits Limits, log *slog.Logger) (*Disk, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	d := &Disk{
		dir:    dir,
		limits: limits,
		log:    log,
		used:   map[Key]struct{}{},
		outage: &outage.Outage{
			Log:   log,
			Gone:  "answers can no longer be written to disk; requests go on without",
			Back:  "answers are written to disk again",
			Args:  []any{"folder", dir},
			First: diskFirstWait,
			Most:  time.Minute,
		},
	}
	var err error
	if d.dbs, err = d.openOrReplace(); err != nil {
		return nil, errors.Join(err, d.unlock())
	}
	if d.limits.longest() > d.target() {
		d.limits.Entry = max(d.target(), 1)
	}
	d.queue = newQueue(min(max(limits.Bytes/16, 1<<20), 8<<20), diskEvery, d.pass)
	d.queue.signal() // the limits may be lower than they were
	return d, nil
}

// diskFirstWait is how long after a failed write the next one is tried, at first.
var diskFirstWait = time.Second

// own makes the folder, if there is none, and locks it, if it is not locked.
func (d *Disk) own() (err error) {
	if d.lock != nil {
		if !d.isGone(1) {
			return nil
		}
		d.unlock() // a file that has no name any more
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return fmt.Errorf("making the folder of stored answers: %w", err)
	}
	if d.lock, err = lockFolder(d.dir); err != nil {
		return err
	}
	d.kept[1], err = os.Stat(d.file(1))
	return err
}

func (d *Disk) unlock() error {
	lock := d.lock
	if d.lock = nil; lock == nil {
		return nil
	}
	return lock.Close()
}

// lockFolder keeps other processes out until the result is closed or the process ends.
func lockFolder(dir string) (*sql.DB, error) {
	path := filepath.Join(dir, diskLock)
	if err := touchFile(path); err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", dsn(path, "busy_timeout(0)", "journal_mode(memory)", "locking_mode(exclusive)"))
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	db.SetConnMaxIdleTime(0)
	// In this mode the lock stays when the transaction is over.
	if _, err = db.Exec(`BEGIN EXCLUSIVE; COMMIT`); err == nil {
		return db, nil
	}
	db.Close()
	if code(err) == sqliteBusy {
		return nil, fmt.Errorf("the answers stored in %s are %w: stop it,"+
			" or give each process a folder of its own (--answers-store)", dir, ErrInUse)
	}
	return nil, fmt.Errorf("locking the folder of stored answers (%s): %w", path, err)
}

func touchFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("making a file for answers: %w", err)
	}
	return errors.Join(f.Chmod(0o600), f.Close())
}

// SQLite's result codes.
const (
	sqliteError   = 1
	sqliteBusy    = 5
	sqliteCorrupt = 11
	sqliteNotADB  = 26
)

// code returns SQLite's primary result code of an error, or 0.
func code(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code() & 0xff
	}
	return 0
}

// errForeign: a database, but not one of ours.
var errForeign = errors.New("it was not written by this program, or by another version")

func broken(err error) bool {
	c := code(err)
	return c == sqliteCorrupt || c == sqliteNotADB || c == sqliteError || errors.Is(err, errForeign)
}

// openOrReplace opens the file, and if it is broken, sets it aside and begins a new one.
func (d *Disk) openOrReplace() (*databases, error) {
	if err := d.own(); err != nil {
		return nil, err
	}
	dbs, err := d.open()
	if err == nil || !broken(err) {
		return dbs, err
	}
	if err := d.setAside(err); err != nil {
		return nil, err
	}
	return d.open()
}

// setAside renames a broken file. The databases must be closed.
func (d *Disk) setAside(why error) error {
	path := filepath.Join(d.dir, diskFile)
	aside := filepath.Join(d.dir, diskBroken)
	if err := os.Rename(path, aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("setting a broken file of answers aside: %w", err)
	}
	d.log.Warn("the file of stored answers is broken; it was set aside, and a new one is begun",
		"file", aside, "err", why)
	return removeFiles(path+"-wal", path+"-shm")
}

func removeFiles(paths ...string) error {
	var errs []error
	for _, path := range paths {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// open opens the file, or makes it, and reads what is kept in memory. d.dbMu must be held for
// writing, or d be new.
func (d *Disk) open() (_ *databases, err error) {
	path := filepath.Join(d.dir, diskFile)
	if err := touchFile(path); err != nil {
		return nil, err
	}
	dbs := &databases{}
	defer func() {
		if err != nil {
			dbs.close()
		}
	}()
	// The driver sorts pragmas, but these three must come in this order.
	layout := fmt.Sprintf("page_size(%d);pragma auto_vacuum(incremental);pragma journal_mode(wal)", diskPage)
	dbs.write, err = sql.Open("sqlite", dsn(path, "busy_timeout(2000)", layout,
		"secure_delete(on)", "synchronous(normal)", "wal_autocheckpoint(0)", "cache_size(-4000)"))
	if err != nil {
		return nil, err
	}
	dbs.write.SetMaxOpenConns(1)
	if err := d.load(dbs.write); err != nil {
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	dbs.read, err = sql.Open("sqlite", dsn(path, "busy_timeout(2000)", "query_only(1)"))
	if err != nil {
		return nil, err
	}
	dbs.read.SetMaxOpenConns(4)
	dbs.read.SetMaxIdleConns(4)
	const query = `SELECT e.key, e.kind, e.made, e.used, e.sum, d.data
		FROM entries e JOIN data d ON d.id = e.id WHERE e.key IN `
	if dbs.readOne, err = dbs.read.Prepare(query + "(?)"); err != nil {
		return nil, err
	}
	if dbs.readMany, err = dbs.read.Prepare(query + places(readAtOnce)); err != nil {
		return nil, err
	}
	d.kept[0], err = os.Stat(d.file(0))
	return dbs, err
}

// file is the path of one of the two files in d.kept.
func (d *Disk) file(i int) string {
	return filepath.Join(d.dir, [...]string{diskFile, diskLock}[i])
}

// errRemoved: SQLite would go on with files that have no name any more, and no bound.
var errRemoved = errors.New("the files of stored answers were removed")

// isGone reports whether one of these is not in the folder any more. Another error is SQLite's to
// find.
func (d *Disk) isGone(i int) bool {
	now, err := os.Stat(d.file(i))
	return errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(d.kept[i], now)
}

func dsn(path string, pragmas ...string) string {
	uri := (&fileURI{path: path}).String() + "?_txlock=immediate"
	for _, p := range pragmas {
		uri += "&_pragma=" + url.QueryEscape(p)
	}
	return uri
}

func (s *databases) close() error {
	var errs []error
	for _, db := range []*sql.DB{s.read, s.write} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

// load makes the tables of a new file, and reads the secret and the counts.
//
// The data of an entry lies in a table of its own, in the order in which it was put, so that what is
// evicted together lies together, and noting a use writes only a short row.
func (d *Disk) load(db *sql.DB) error {
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	var mark, version, tables, page int64
	err = cmp.Or(
		tx.QueryRow(`PRAGMA application_id`).Scan(&mark),
		tx.QueryRow(`PRAGMA user_version`).Scan(&version),
		tx.QueryRow(`SELECT count(*) FROM sqlite_schema`).Scan(&tables),
		tx.QueryRow(`PRAGMA page_size`).Scan(&page),
	)
	switch {
	case err != nil:
		return err
	case tables > 0 && (mark != diskMark || version != diskVersion) || page != diskPage:
		return errForeign
	case tables == 0:
		secret := newSecret()
		_, err := tx.Exec(fmt.Sprintf(`PRAGMA application_id = %d; PRAGMA user_version = %d;
			CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
			CREATE TABLE data (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
			CREATE TABLE entries (key BLOB PRIMARY KEY, kind INTEGER NOT NULL, made INTEGER NOT NULL,
				used INTEGER NOT NULL, sum INTEGER NOT NULL, id INTEGER NOT NULL) WITHOUT ROWID;
			CREATE INDEX by_use ON entries (used, id);
			CREATE INDEX by_age ON entries (made)`, diskMark, diskVersion))
		if err != nil {
			return err
		}
		if _, err := tx.Exec(`INSERT INTO meta VALUES ('secret', ?)`, secret[:]); err != nil {
			return err
		}
	}
	if err := d.readState(tx); err != nil {
		return err
	}
	return tx.Commit()
}

func (d *Disk) readState(tx *sql.Tx) error {
	var secret []byte
	var entries, used, id int64
	err := cmp.Or(
		tx.QueryRow(`SELECT value FROM meta WHERE name = 'secret'`).Scan(&secret),
		tx.QueryRow(`SELECT count(*) FROM entries`).Scan(&entries),
		tx.QueryRow(`SELECT ifnull(max(used), 0) FROM entries`).Scan(&used),
		tx.QueryRow(`SELECT ifnull(max(id), 0) FROM data`).Scan(&id),
	)
	if errors.Is(err, sql.ErrNoRows) || err == nil && len(secret) != 32 {
		return errForeign
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.secret[:], secret)
	d.entries, d.clock = entries, max(used, id)
	return nil
}

// Get implements Store.
func (d *Disk) Get(ctx context.Context, keys []Key) ([]Entry, error) {
	found := make([]Entry, len(keys))
	others := d.queue.get(keys, found)
	var err error
	if len(others) > 0 {
		err = d.read(ctx, keys, found, others)
	}
	now := time.Now()
	for i := range found {
		if found[i].Kind != 0 && d.limits.old(found[i].Made, now) {
			found[i] = Entry{}
		}
	}
	return found, err
}

// DiskWait is how long Disk.Get waits for the disk.
const DiskWait = time.Second

// diskWait is DiskWait, except in tests of what is stored, on machines that have no time for them.
var diskWait = DiskWait

// mostOverdue is how many reads may be late before no other one is begun: as many as there are
// connections.
const mostOverdue = 4

var errSlow = errors.New("the disk with the stored answers does not answer in time")

// read fills the places of found with what the file has. It waits for DiskWait at most: a disk, one
// in a network above all, may hang.
func (d *Disk) read(ctx context.Context, keys []Key, found []Entry, places []int) error {
	if d.overdue.Load() >= mostOverdue {
		d.outage.Note()
		return errSlow
	}
	keys = slices.Clone(keys)
	got := make([]Entry, len(keys))
	done := make(chan error, 1)
	var settled atomic.Bool // the read is over, or nobody waits for it
	go func() {             // ends with the read
		done <- d.readNow(ctx, keys, got, places)
		if settled.Swap(true) {
			d.overdue.Add(-1)
		}
	}()
	timer := time.NewTimer(diskWait)
	defer timer.Stop()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
		d.leave(&settled)
		return err
	case <-timer.C:
		d.leave(&settled)
		d.outage.Note()
		return errSlow
	}
	for _, i := range places {
		found[i] = got[i]
	}
	return err
}

// leave notes that nobody waits for a read any more.
func (d *Disk) leave(settled *atomic.Bool) {
	d.overdue.Add(1)
	if settled.Swap(true) {
		d.overdue.Add(-1)
	}
}

func (d *Disk) readNow(ctx context.Context, keys []Key, found []Entry, places []int) error {
	d.dbMu.RLock()
	opened, dbs := d.opened, d.dbs
	if dbs == nil {
		d.dbMu.RUnlock()
		return errors.New("the stored answers cannot be read")
	}
	err := d.readFrom(ctx, dbs, keys, found, places)
	d.dbMu.RUnlock()
	if err != nil && ctx.Err() == nil {
		d.outage.Note()
		d.replace(opened, err)
	}
	return err
}

func (d *Disk) readFrom(ctx context.Context, dbs *databases, keys []Key, found []Entry, places []int) error {
	at := make(map[Key]int, len(places)) // the last place of a key
	var asked []any
	for _, i := range places {
		if _, twice := at[keys[i]]; !twice {
			asked = append(asked, keys[i][:])
		}
		at[keys[i]] = i
	}
	for len(asked) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		stmt, n := dbs.readOne, 1
		if len(asked) >= readAtOnce {
			stmt, n = dbs.readMany, readAtOnce
		}
		if err := d.readSome(stmt, asked[:n], found, at); err != nil {
			return fmt.Errorf("reading stored answers: %w", err)
		}
		asked = asked[n:]
	}
	for _, i := range places {
		found[i] = found[at[keys[i]]]
	}
	return nil
}

// readSome reads without the request's context, for which each statement would need a goroutine.
func (d *Disk) readSome(stmt *sql.Stmt, asked []any, found []Entry, at map[Key]int) error {
	rows, err := stmt.Query(asked...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var key, data []byte
		var kind, made, used, sum int64
		if err := rows.Scan(&key, &kind, &made, &used, &sum, &data); err != nil {
			return err
		}
		if len(key) != 32 {
			continue
		}
		e := Entry{Key: Key(key), Kind: Kind(kind), Made: time.UnixMilli(made), Data: data}
		if sum != checksum(e) {
			d.outage.Note()
			d.queue.delete([]Key{e.Key})
			continue
		}
		found[at[e.Key]] = e
		d.note(e.Key, used)
	}
	return rows.Err()
}

// note has a use written if it makes enough of a difference.
func (d *Disk) note(key Key, used int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.clock-used > d.entries/16 && len(d.used) < maxDeletions {
		d.used[key] = struct{}{}
	}
}

// checksum is of everything in the entry.
func checksum(e Entry) int64 {
	var head [32 + 1 + 8]byte
	copy(head[:], e.Key[:])
	head[32] = byte(e.Kind)
	binary.LittleEndian.PutUint64(head[33:], uint64(e.Made.UnixMilli()))
	return int64(xxh3.HashSeed(e.Data, xxh3.Hash(head[:])))
}

// replace begins a new file if the error says that the present one is broken, unless that was done
// since.
func (d *Disk) replace(opened int, why error) {
	removed := errors.Is(why, errRemoved)
	if !removed && !broken(why) {
		return
	}
	d.dbMu.Lock()
	defer d.dbMu.Unlock()
	if d.opened != opened {
		return
	}
	d.opened++
	if d.dbs != nil {
		d.dbs.close()
		d.dbs = nil
	}
	var err error
	if removed {
		d.log.Warn("the folder of stored answers was removed; a new one is begun", "folder", d.dir)
	} else {
		err = d.setAside(why)
	}
	if err == nil {
		d.dbs, err = d.openOrReplace()
	}
	if err != nil {
		d.outage.Failure(err)
	}
}

// Put implements Store. It does not wait for the disk. Its error is ErrBusy, or why nothing can be
// written at the moment.
func (d *Disk) Put(_ context.Context, entries []Entry) error {
	if err := d.outage.Refused(); err != nil {
		return err
	}
	now := time.Now()
	var kept []Entry
	for _, e := range entries {
		if d.limits.kept(e, now) {
			kept = append(kept, e)
		}
	}
	err := d.queue.put(kept)
	if err != nil {
		d.outage.Note()
	}
	return err
}

// Delete implements Store. It does not wait for the disk; while nothing can be written, the keys are
// remembered.
func (d *Disk) Delete(_ context.Context, keys []Key) error {
	d.queue.delete(keys)
	return nil
}

// Flush returns when what was put before is in the file, or with the error of writing it.
func (d *Disk) Flush(ctx context.Context) error { return d.queue.flush(ctx) }

// Wipe implements Store: it removes the files, also one that was set aside, and begins a new one.
func (d *Disk) Wipe(context.Context) error {
	d.dbMu.Lock()
	defer d.dbMu.Unlock()
	d.queue.clear()
	d.opened++
	if d.dbs != nil {
		d.dbs.close()
		d.dbs = nil
	}
	path := filepath.Join(d.dir, diskFile)
	err := removeFiles(path, path+"-wal", path+"-shm", filepath.Join(d.dir, diskBroken))
	if err == nil {
		d.dbs, err = d.openOrReplace()
	}
	if err != nil {
		d.outage.Failure(err)
		return fmt.Errorf("removing the stored answers: %w", err)
	}
	return nil
}

// Secret implements Store.
func (d *Disk) Secret() [32]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.secret
}

// Stats implements Store. Bytes are those of the files.
func (d *Disk) Stats() Stats {
	down, failed := d.outage.State()
	path := filepath.Join(d.dir, diskFile)
	bytes := fileSize(path) + fileSize(path+"-wal") + fileSize(path+"-shm")
	d.mu.Lock()
	defer d.mu.Unlock()
	return Stats{
		Entries: d.entries,
		Bytes:   bytes,
		Evicted: d.evicted,
		Expired: d.expired,
		Errors:  failed,
		Down:    down,
	}
}

func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// Close implements Store: it writes what waits, and leaves one file and the lock's.
func (d *Disk) Close() error {
	d.queue.close()
	d.dbMu.Lock()
	defer d.dbMu.Unlock()
	err := d.queue.err
	if d.dbs != nil {
		err = errors.Join(err, d.dbs.close()) // which moves SQLite's log into the file
		d.dbs = nil
	}
	return errors.Join(err, d.unlock())
}

// ping writes a page, to see whether there is room again.
func ping(tx *sql.Tx) error {
	page := make([]byte, 2*diskPage)
	rand.Read(page)
	if _, err := tx.Exec(`INSERT OR REPLACE INTO meta VALUES ('ping', ?)`, page); err != nil {
		return err
	}
	_, err := tx.Exec(`DELETE FROM meta WHERE name = 'ping'`)
	return err
}
