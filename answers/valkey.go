package answers

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valkey-io/valkey-go"
)

// What a call costs at most.
const (
	// GetWait, and GetWaitEach for each key, is how long Valkey.Get waits for a slow server.
	GetWait     = 50 * time.Millisecond
	GetWaitEach = 100 * time.Microsecond
	// valkeyWait is how long the goroutines in the background wait.
	valkeyWait = 2 * time.Second
	// valkeySlow is how many calls in a row may end without an answer before the server counts as
	// gone.
	valkeySlow = 3
	// valkeyEvery is how often the secret is read again, since another proxy may have wiped.
	valkeyEvery = 5 * time.Second
	// valkeyPrefix begins all keys, unless the URL says otherwise.
	valkeyPrefix = "ollama-cacheproxy:answers:"
)

// errGone is the error of calls while the server is gone.
var errGone = errors.New("the Valkey server cannot be used at the moment; it is tried again by itself")

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
	option valkey.ClientOption
	prefix string
	own    []byte // from the secret file
	queue  *queue
	outage *outage // the server is gone
	full   *outage // the server refuses to write

	client atomic.Pointer[client] // nil: gone
	slow   atomic.Int32           // calls in a row without an answer
	warned atomic.Bool

	wake chan struct{} // has one place
	stop context.CancelFunc
	done chan struct{}

	mu     sync.Mutex // guards everything below
	shared [32]byte   // the secret in the server
}

type client struct{ valkey.Client }

// OpenValkey opens the store at a URL: valkey://[user:password@]host[:port][/database], valkeys:// with
// TLS, redis:// and rediss:// for the same. Two parameters are ours: secret-file=PATH, a file that all
// proxies have and the server has not, and prefix=TEXT, which begins all keys. It fails if the URL is
// wrong or the server refuses it; a server that is not there is tried again. log may be nil.
func OpenValkey(target string, limits Limits, log *slog.Logger) (*Valkey, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	v := &Valkey{limits: limits, log: log, wake: make(chan struct{}, 1), done: make(chan struct{})}
	if err := v.parse(target); err != nil {
		return nil, err
	}
	v.shared = newSecret() // until the server's is known
	address := v.option.InitAddress[0]
	v.outage = &outage{
		log:   log,
		gone:  "the Valkey server that keeps answers is gone; requests go on without",
		back:  "the Valkey server that keeps answers is back",
		args:  []any{"server", address},
		first: 100 * time.Millisecond,
		most:  10 * time.Second,
	}
	v.full = &outage{
		log:   log,
		gone:  "the Valkey server keeps no new answers; those that it has are still found",
		back:  "the Valkey server keeps new answers again",
		args:  []any{"server", address},
		first: time.Second,
		most:  10 * time.Second,
	}
	if err := v.connect(context.Background()); err != nil {
		if isWrong(err) {
			return nil, fmt.Errorf("the Valkey server at %s refuses to keep answers"+
				" (check the user, the password and the database in --answers-store): %w", address, err)
		}
		v.outage.failure(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	v.stop = stop
	v.queue = newQueue(min(max(limits.Bytes/16, 1<<20), 8<<20), time.Minute, v.pass)
	go v.tend(ctx)
	return v, nil
}

func (v *Valkey) parse(target string) error {
	u, err := url.Parse(target)
	if err != nil {
		// The error would quote the password.
		return errors.New("the address of the Valkey server is not a URL like valkey://host:6379")
	}
	q := u.Query()
	v.prefix = valkeyPrefix
	if q.Has("prefix") {
		v.prefix = q.Get("prefix")
	}
	if file := q.Get("secret-file"); file != "" {
		if v.own, err = os.ReadFile(file); err != nil {
			return fmt.Errorf("reading the secret of the stored answers: %w", err)
		}
		if len(strings.TrimSpace(string(v.own))) < 16 {
			return fmt.Errorf("the secret in %s is shorter than 16 characters; make one with"+
				" openssl rand -hex 32", file)
		}
	}
	q.Del("prefix")
	q.Del("secret-file")
	u.RawQuery = q.Encode()
	if v.option, err = valkey.ParseURL(u.String()); err != nil {
		return fmt.Errorf("the address of the Valkey server: %w", err)
	}
	o := &v.option
	o.ClientName = "ollama-cacheproxy"
	o.ForceSingleClient = true
	o.DisableCache = true     // a cache in this process is what Memory is for
	o.DisableRetry = true     // a call fails instead
	o.AlwaysPipelining = true // a call that ends early does not end the connection
	o.PipelineMultiplex = 1
	o.Dialer.Timeout = valkeyWait
	o.ConnWriteTimeout = valkeyWait
	return nil
}

// connect makes the server usable, if it is there.
func (v *Valkey) connect(ctx context.Context) error {
	c, err := valkey.NewClient(v.option)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, valkeyWait)
	defer cancel()
	if err := v.readSecret(ctx, c); err != nil {
		c.Close()
		return err
	}
	v.warn(ctx, c)
	v.slow.Store(0)
	v.client.Store(&client{c})
	return nil
}

// isAnswer reports whether an error is what the server said.
func isAnswer(err error) bool {
	_, ok := valkey.IsValkeyErr(err)
	return ok
}

// isWrong reports whether a server's error is one of the settings, which no time mends. Others are
// those of a server that is being loaded, has lost its replicas or cannot write its own disk.
func isWrong(err error) bool {
	refused, ok := valkey.IsValkeyErr(err)
	if !ok {
		return false
	}
	kind, rest, _ := strings.Cut(refused.Error(), " ")
	switch kind {
	case "NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE":
		return true
	case "ERR":
		return !strings.HasPrefix(rest, "max number of clients")
	}
	return false
}

// errFull is what is done about a server that is full.
var errFull = errors.New("it is full: give it more maxmemory, or let it evict what is old" +
	" (valkey-cli config set maxmemory-policy allkeys-lru)")

// readSecret reads the secret that all proxies share, and puts it there if the server has none or
// has evicted it.
func (v *Valkey) readSecret(ctx context.Context, c valkey.Client) error {
	v.mu.Lock()
	mine := v.shared
	v.mu.Unlock()
	name := v.prefix + "secret"
	data, err := c.Do(ctx, c.B().Get().Key(name).Build()).AsBytes()
	if valkey.IsValkeyNil(err) {
		err = c.Do(ctx, c.B().Set().Key(name).Value(valkey.BinaryString(mine[:])).Nx().Build()).Error()
		if err != nil && !valkey.IsValkeyNil(err) && !isFull(err) {
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
		"server", v.option.InitAddress[0])
}

// isFull reports whether the server refuses to write for lack of memory.
func isFull(err error) bool {
	refused, ok := valkey.IsValkeyErr(err)
	return ok && strings.HasPrefix(refused.Error(), "OOM")
}

// tend connects again, and reads the secret, until ctx ends.
func (v *Valkey) tend(ctx context.Context) {
	defer close(v.done)
	for {
		wait := valkeyEvery
		if v.client.Load() == nil {
			v.outage.mu.Lock()
			wait = max(time.Until(v.outage.next), time.Millisecond)
			v.outage.mu.Unlock()
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-v.wake:
			timer.Stop()
			continue // wait as long as the outage says
		case <-timer.C:
		}
		v.try(ctx)
	}
}

func (v *Valkey) try(ctx context.Context) {
	if c := v.client.Load(); c != nil {
		ctx, cancel := context.WithTimeout(ctx, valkeyWait)
		defer cancel()
		if err := v.readSecret(ctx, c); err != nil {
			v.failed(ctx, c, err)
		}
		return
	}
	if err := v.connect(ctx); err != nil {
		v.outage.failure(err)
		return
	}
	v.outage.success()
	v.queue.signal() // keys may wait to be deleted
}

// failed notes that a call failed, and whether the server is gone. ctx is the caller's.
func (v *Valkey) failed(ctx context.Context, c *client, err error) {
	if errors.Is(ctx.Err(), context.Canceled) {
		return
	}
	late := errors.Is(err, context.DeadlineExceeded)
	if isAnswer(err) || late && v.slow.Add(1) < valkeySlow {
		v.outage.note()
		return
	}
	if !v.client.CompareAndSwap(c, nil) {
		v.outage.note()
		return
	}
	v.outage.failure(err)
	go c.Close() // it waits for calls under way
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

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
	c := v.client.Load()
	if c == nil {
		return errGone
	}
	names := make([]string, len(places))
	for i, place := range places {
		names[i] = v.name(keys[place])
	}
	limited, cancel := context.WithTimeout(ctx, getWait+time.Duration(len(names))*GetWaitEach)
	defer cancel()
	values, err := c.Do(limited, c.B().Mget().Key(names...).Build()).ToArray()
	if err == nil && len(values) != len(names) {
		err = fmt.Errorf("%d values for %d keys", len(values), len(names))
	}
	if err != nil {
		v.failed(ctx, c, err)
		return fmt.Errorf("reading answers from Valkey: %w", err)
	}
	v.slow.Store(0)
	for i, value := range values {
		data, err := value.AsBytes()
		if err != nil {
			continue // nil: there is none
		}
		if e, ok := decodeEntry(keys[places[i]], data); ok {
			found[places[i]] = e
		} else {
			v.outage.note()
		}
	}
	return nil
}

func (v *Valkey) name(key Key) string { return v.prefix + string(key[:]) }

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
	if v.client.Load() == nil {
		return errGone
	}
	if err := v.full.refused(); err != nil {
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
		v.outage.note()
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
	c := v.client.Load()
	if c == nil {
		return errGone
	}
	now := time.Now()
	var commands valkey.Commands
	for _, key := range b.order {
		e := b.entries[key]
		if e.Kind == 0 {
			commands = append(commands, c.B().Unlink().Key(v.name(key)).Build())
			continue
		}
		set := c.B().Set().Key(v.name(key)).Value(valkey.BinaryString(encodeEntry(e)))
		if v.limits.Age == 0 {
			commands = append(commands, set.Build())
		} else if left := e.Made.Add(v.limits.Age).Sub(now).Milliseconds(); left > 0 {
			commands = append(commands, set.PxMilliseconds(left).Build())
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), valkeyWait)
	defer cancel()
	for _, result := range c.DoMulti(ctx, commands...) {
		err := result.Error()
		switch {
		case err == nil:
		case isFull(err):
			v.full.failure(errFull)
			return fmt.Errorf("writing answers to Valkey: %w", err)
		case isAnswer(err):
			v.full.failure(err)
			return fmt.Errorf("writing answers to Valkey: %w", err)
		default:
			v.failed(context.Background(), c, err)
			return fmt.Errorf("writing answers to Valkey: %w", err)
		}
	}
	v.slow.Store(0)
	v.full.success()
	return nil
}

// Wipe implements Store: it replaces the secret, and removes all keys that begin with the prefix,
// also those of other proxies. These have the new secret within a few seconds. It takes as long as
// the server needs to look at all of its keys.
func (v *Valkey) Wipe(ctx context.Context) error {
	c := v.client.Load()
	if c == nil {
		return errGone
	}
	v.queue.clear()
	// What is being written must not come after.
	if err := v.queue.flush(ctx); err != nil {
		v.log.Debug("writing answers before they are wiped", "err", err)
	}
	err := v.wipe(ctx, c)
	if err != nil {
		v.failed(ctx, c, err)
		return fmt.Errorf("wiping the answers in Valkey: %w", err)
	}
	return nil
}

func (v *Valkey) wipe(ctx context.Context, c *client) error {
	secret := newSecret()
	name := v.prefix + "secret"
	if err := c.Do(ctx, c.B().Set().Key(name).Value(valkey.BinaryString(secret[:])).Build()).Error(); err != nil {
		if !isFull(err) {
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
	pattern := globEscaper.Replace(v.prefix) + "*"
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
	if v.own == nil {
		return v.shared
	}
	return sha256.Sum256(append(v.shared[:len(v.shared):len(v.shared)], v.own...))
}

// Stats implements Store. How many entries the server has, and how long they are, is unknown.
func (v *Valkey) Stats() Stats {
	down, failed := v.outage.state()
	_, refused := v.full.state()
	return Stats{Entries: -1, Bytes: -1, Errors: failed + refused, Down: down}
}

// Close implements Store: it writes what waits, if the server is there.
func (v *Valkey) Close() error {
	v.queue.close()
	v.stop()
	<-v.done
	if c := v.client.Swap(nil); c != nil {
		c.Close()
	}
	v.queue.mu.Lock()
	defer v.queue.mu.Unlock()
	if v.queue.err != nil && !errors.Is(v.queue.err, errGone) {
		return v.queue.err
	}
	return nil
}

// getWait is GetWait, except in tests of what is stored, on machines that have no time for them.
var getWait = GetWait
