package answers

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// What a call costs at most.
const (
	// GetWait, and GetWaitEach for each key, is how long Valkey.Get waits for a slow server.
	GetWait     = 50 * time.Millisecond
	GetWaitEach = 100 * time.Microsecond
	// valkeyPrefix begins all keys, unless the URL says otherwise.
	valkeyPrefix = "ollama-cacheproxy:answers:"
)

// Valkey is a Store in a Valkey or Redis server (6 or newer), which several proxies may share. Open it
// with OpenValkey; it must be closed.
//
// Put and Delete return at once, and one goroutine writes what they leave. Get waits for the server
// at most GetWait, and GetWaitEach for each key. If the server closes the connection, or leaves three
// calls in a row unanswered, it is gone: one line says so, calls fail at once, and it is tried again
// in the background, after 0.1 s at first and at most every 10 s.
//
// Limits.Bytes is not kept here, except that 0 keeps nothing: the server's maxmemory bounds it, with
// maxmemory-policy allkeys-lru (or allkeys-lfu, or a volatile one if Limits.Age is set). With
// noeviction, one line warns. Limits.Age becomes each entry's expiry.
//
// An entry is a string, at a key that begins with a prefix. The secret lies in the server, too, so
// that all proxies have the same; with a secret file, what is in the server does not suffice to find
// out whether a certain text was asked for.
type Valkey struct {
	limits Limits
	log    *slog.Logger
	target valkeyconn.Target
	conn   *valkeyconn.Conn
	queue  *queue
	full   *outage.Outage // the server refuses to write
	warned atomic.Bool

	mu     sync.Mutex // guards everything below
	shared [32]byte   // the secret in the server
}

// OpenValkey opens the store at a URL, as valkeyconn.Parse reads it. It fails if the URL is wrong or
// the server refuses it; a server that is not there is tried again. log may be nil.
func OpenValkey(target string, limits Limits, log *slog.Logger) (*Valkey, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	v := &Valkey{limits: limits, log: log, shared: newSecret()} // until the server's is known
	var err error
	if v.target, err = valkeyconn.Parse(target, valkeyPrefix); err != nil {
		return nil, err
	}
	v.full = &outage.Outage{
		Log:   log,
		Gone:  "the Valkey server keeps no new answers; those that it has are still found",
		Back:  "the Valkey server keeps new answers again",
		Args:  []any{"server", v.target.Address},
		First: time.Second,
		Most:  10 * time.Second,
	}
	v.queue = newQueue(min(max(limits.Bytes/16, 1<<20), 8<<20), time.Minute, v.pass)
	conn, err := valkeyconn.Open(v.target, valkeyconn.Options{
		Setting: "--answers-store",
		Gone:    "the Valkey server that keeps answers is gone; requests go on without",
		Back:    "the Valkey server that keeps answers is back",
		Log:     log,
		Ready: func(ctx context.Context, c valkey.Client) error {
			if err := v.readSecret(ctx, c); err != nil {
				return err
			}
			v.warn(ctx, c)
			return nil
		},
		Tend: v.readSecret, // another proxy may have wiped
	})
	if err != nil {
		v.queue.close()
		return nil, err
	}
	v.conn = conn
	conn.OnReturn(v.queue.signal) // keys may wait to be deleted
	return v, nil
}

// readSecret reads the secret that all proxies share, and puts it there if the server has none or
// has evicted it.
func (v *Valkey) readSecret(ctx context.Context, c valkey.Client) error {
	v.mu.Lock()
	mine := v.shared
	v.mu.Unlock()
	name := v.target.Prefix + "secret"
	data, err := c.Do(ctx, c.B().Get().Key(name).Build()).AsBytes()
	if valkey.IsValkeyNil(err) {
		err = c.Do(ctx, c.B().Set().Key(name).Value(valkey.BinaryString(mine[:])).Nx().Build()).Error()
		if err != nil && !valkey.IsValkeyNil(err) && !valkeyconn.IsFull(err) {
			return err
		}
		data, err = c.Do(ctx, c.B().Get().Key(name).Build()).AsBytes() // another proxy may be first
	}
	if valkey.IsValkeyNil(err) {
		return nil // full; then this process's own will do
	}
	if err != nil {
		return err
	}
	if len(data) != len(mine) {
		return fmt.Errorf("the key %s in the Valkey server is not ours (%d bytes); delete it, or choose"+
			" another ?prefix=", name, len(data))
	}
	v.mu.Lock()
	v.shared = [32]byte(data)
	v.mu.Unlock()
	return nil
}

// warn says once that the server's memory is not bounded as a cache's should be.
func (v *Valkey) warn(ctx context.Context, c valkey.Client) {
	got, err := c.Do(ctx, c.B().ConfigGet().Parameter("maxmemory-policy").Build()).AsStrMap()
	if err != nil || got["maxmemory-policy"] != "noeviction" || v.warned.Swap(true) {
		return // it may be forbidden to ask
	}
	v.log.Warn("the Valkey server evicts nothing, so answers fill its memory: set maxmemory, and let it evict"+
		" what is old (valkey-cli config set maxmemory 1gb; valkey-cli config set maxmemory-policy allkeys-lru)",
		"server", v.target.Address)
}

// errFull is what is done about a server that is full.
var errFull = errors.New("it is full: give it more maxmemory, or let it evict what is old" +
	" (valkey-cli config set maxmemory-policy allkeys-lru)")

// Get implements Store.
func (v *Valkey) Get(ctx context.Context, keys []Key) ([]Entry, error) {
	found := make([]Entry, len(keys))
	others := v.queue.get(keys, found)
	var err error
	if len(others) > 0 {
		err = v.read(ctx, keys, found, others)
	}
	now := time.Now()
	for i := range found {
		if found[i].Kind != 0 && v.limits.old(found[i].Made, now) {
			found[i] = Entry{}
		}
	}
	return found, err
}

func (v *Valkey) read(ctx context.Context, keys []Key, found []Entry, places []int) error {
	names := make([]string, len(places))
	for i, place := range places {
		names[i] = v.name(keys[place])
	}
	var values []valkey.ValkeyMessage
	limit := getWait + time.Duration(len(names))*GetWaitEach
	err := v.conn.Call(ctx, limit, func(ctx context.Context, c valkey.Client) (err error) {
		values, err = c.Do(ctx, c.B().Mget().Key(names...).Build()).ToArray()
		if err == nil && len(values) != len(names) {
			err = fmt.Errorf("%d values for %d keys", len(values), len(names))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("reading answers from Valkey: %w", err)
	}
	for i, value := range values {
		data, err := value.AsBytes()
		if err != nil {
			continue // nil: there is none
		}
		if e, ok := decodeEntry(keys[places[i]], data); ok {
			found[places[i]] = e
		} else {
			v.conn.Note()
		}
	}
	return nil
}

func (v *Valkey) name(key Key) string { return v.target.Prefix + string(key[:]) }

// entryHead is how many bytes precede Data in an entry's value: a version, the kind, when it was
// made, and the checksum.
const entryHead = 1 + 1 + 8 + 8

// encodeEntry returns the value of an entry.
func encodeEntry(e Entry) []byte {
	b := make([]byte, entryHead, entryHead+len(e.Data))
	b[0], b[1] = 1, byte(e.Kind)
	binary.LittleEndian.PutUint64(b[2:], uint64(e.Made.UnixMilli()))
	binary.LittleEndian.PutUint64(b[10:], uint64(checksum(e)))
	return append(b, e.Data...)
}

// decodeEntry returns the entry whose value this is, or false if it is not one for the key.
func decodeEntry(key Key, b []byte) (Entry, bool) {
	if len(b) < entryHead || b[0] != 1 || b[1] == 0 {
		return Entry{}, false
	}
	e := Entry{
		Key:  key,
		Kind: Kind(b[1]),
		Made: time.UnixMilli(int64(binary.LittleEndian.Uint64(b[2:]))),
		Data: b[entryHead:len(b):len(b)],
	}
	if e.Made.UnixMilli() != int64(binary.LittleEndian.Uint64(b[2:])) ||
		checksum(e) != int64(binary.LittleEndian.Uint64(b[10:])) {
		return Entry{}, false
	}
	return e, true
}

// Put implements Store. It does not wait for the server. Its error is ErrBusy, or that the server is
// gone or full.
func (v *Valkey) Put(_ context.Context, entries []Entry) error {
	if v.conn.Gone() {
		return valkeyconn.ErrGone
	}
	if err := v.full.Refused(); err != nil {
		return err
	}
	now := time.Now()
	var kept []Entry
	for _, e := range entries {
		if v.limits.kept(e, now) {
			kept = append(kept, e)
		}
	}
	err := v.queue.put(kept)
	if err != nil {
		v.conn.Note()
	}
	return err
}

// Delete implements Store. It does not wait for the server; while that is gone, the keys are
// remembered.
func (v *Valkey) Delete(_ context.Context, keys []Key) error {
	v.queue.delete(keys)
	return nil
}

// Flush returns when what was put before is in the server, or with the error of writing it.
func (v *Valkey) Flush(ctx context.Context) error { return v.queue.flush(ctx) }

// pass writes what waits.
func (v *Valkey) pass() {
	b := v.queue.take()
	v.queue.finish(v.write(b))
}

func (v *Valkey) write(b batch) error {
	if len(b.order) == 0 {
		return nil
	}
	var refused error
	err := v.conn.Call(context.Background(), valkeyconn.Wait, func(ctx context.Context, c valkey.Client) error {
		for _, result := range c.DoMulti(ctx, v.commands(c.B(), b)...) {
			if err := result.Error(); valkeyconn.IsAnswer(err) {
				refused = err
				return nil
			} else if err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case valkeyconn.IsFull(refused):
		v.full.Failure(errFull)
	case refused != nil:
		v.full.Failure(refused)
	case err == nil:
		v.full.Success()
	}
	if err = cmp.Or(err, refused); err != nil {
		return fmt.Errorf("writing answers to Valkey: %w", err)
	}
	return nil
}

// commands returns the commands that write a batch.
func (v *Valkey) commands(build valkey.Builder, b batch) (list valkey.Commands) {
	now := time.Now()
	for _, key := range b.order {
		e := b.entries[key]
		if e.Kind == 0 {
			list = append(list, build.Unlink().Key(v.name(key)).Build())
			continue
		}
		set := build.Set().Key(v.name(key)).Value(valkey.BinaryString(encodeEntry(e)))
		if v.limits.Age == 0 {
			list = append(list, set.Build())
		} else if left := e.Made.Add(v.limits.Age).Sub(now).Milliseconds(); left > 0 {
			list = append(list, set.PxMilliseconds(left).Build())
		}
	}
	return list
}

// Wipe implements Store: it replaces the secret, and removes all keys that begin with the prefix,
// also those of other proxies. These have the new secret within a few seconds. It takes as long as
// the server needs to look at all of its keys.
func (v *Valkey) Wipe(ctx context.Context) error {
	if v.conn.Gone() {
		return valkeyconn.ErrGone
	}
	v.queue.clear()
	// What is being written must not come after.
	if err := v.queue.flush(ctx); err != nil {
		v.log.Debug("writing answers before they are wiped", "err", err)
	}
	if err := v.conn.Call(ctx, 0, v.wipe); err != nil {
		return fmt.Errorf("wiping the answers in Valkey: %w", err)
	}
	return nil
}

func (v *Valkey) wipe(ctx context.Context, c valkey.Client) error {
	secret := newSecret()
	name := v.target.Prefix + "secret"
	if err := c.Do(ctx, c.B().Set().Key(name).Value(valkey.BinaryString(secret[:])).Build()).Error(); err != nil {
		if !valkeyconn.IsFull(err) {
			return err
		}
		// Once it is deleted, there is room.
		if err := c.Do(ctx, c.B().Unlink().Key(name).Build()).Error(); err != nil {
			return err
		}
	}
	v.mu.Lock()
	v.shared = secret
	v.mu.Unlock()
	pattern := globEscaper.Replace(v.target.Prefix) + "*"
	for cursor := uint64(0); ; {
		page, err := c.Do(ctx, c.B().Scan().Cursor(cursor).Match(pattern).Count(1000).Build()).AsScanEntry()
		if err != nil {
			return err
		}
		var names []string
		for _, found := range page.Elements {
			if found != name {
				names = append(names, found)
			}
		}
		if len(names) > 0 {
			if err := c.Do(ctx, c.B().Unlink().Key(names...).Build()).Error(); err != nil {
				return err
			}
		}
		if cursor = page.Cursor; cursor == 0 {
			return v.readSecret(ctx, c)
		}
	}
}

var globEscaper = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`)

// Secret implements Store. Before the server was reached for the first time it is random.
func (v *Valkey) Secret() [32]byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.target.Secret == nil {
		return v.shared
	}
	return sha256.Sum256(append(v.shared[:len(v.shared):len(v.shared)], v.target.Secret...))
}

// Stats implements Store. How many entries the server has, and how long they are, is unknown.
func (v *Valkey) Stats() Stats {
	down, failed := v.conn.State()
	_, refused := v.full.State()
	return Stats{Entries: -1, Bytes: -1, Errors: failed + refused, Down: down}
}

// Close implements Store: it writes what waits, if the server is there.
func (v *Valkey) Close() error {
	v.queue.close()
	v.conn.Close()
	v.queue.mu.Lock()
	defer v.queue.mu.Unlock()
	if v.queue.err != nil && !errors.Is(v.queue.err, valkeyconn.ErrGone) {
		return v.queue.err
	}
	return nil
}

// getWait is GetWait, except in tests of what is stored, on machines that have no time for them.
var getWait = GetWait
