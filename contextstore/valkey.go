package contextstore

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

const (
	// valkeyStream is the key of the stream, after the prefix of all keys, and valkeyField the only
	// field of its entries.
	valkeyStream = "seen"
	valkeyField  = "e"
	// valkeyAge is how long the stream stays after the last event, and how far back a proxy that starts
	// reads it.
	valkeyAge = 24 * time.Hour
	// valkeyBlock is how long a read waits for events at the server.
	valkeyBlock = time.Second
	// valkeyRead is how many events are read at once, and valkeyWrite how many are written.
	valkeyRead  = 256
	valkeyWrite = 256
	// valkeyRefused is how long reading and writing pause when the server answers with an error.
	valkeyRefused = time.Second
	// outboxBytes bounds what waits to be written.
	outboxBytes = 4 << 20
)

// Valkey is a Store that several proxies share through a Valkey or Redis server. Make it with
// NewValkey; it must be closed.
//
// It is a Memory that learns what the others have seen. Each call that changes it is also appended to
// a stream in the server, which all proxies read: from a day ago when they start, and as events come
// after that. Both are done in the background, so that no method ever waits for the server. While it
// is gone, the store is as good as a Memory, and the latest events wait for its return.
//
// Servers have names in the stream, since their indices differ between proxies. Events of servers that
// this proxy does not have are passed over. A model is a hash of its key there.
//
// The stream is bounded, and expires a day after the last event.
type Valkey struct {
	memory *Memory
	conn   *valkeyconn.Conn
	names  func(uint16) string
	index  func(string) (uint16, bool)
	self   uint64 // marks this process's events
	length int64  // of the stream, about

	outbox   outbox
	back     chan struct{}  // has one place: the server has returned
	unsent   *outage.Outage // the server refuses events …
	unlooked *outage.Outage // … or to show them

	received, foreign atomic.Uint64

	stop    context.CancelFunc
	running sync.WaitGroup

	mu     sync.Mutex               // guards hashes
	hashes [maxModels]numberedModel // by number modulo maxModels
}

// numberedModel is which model a number stands for.
type numberedModel struct {
	number uint32
	hash   uint64
}

// SharedStats counts what a Valkey has exchanged with other proxies.
type SharedStats struct {
	Sent     uint64 // events that are in the stream
	Received uint64 // events of other proxies
	Dropped  uint64 // events that had no room while the server was gone, or that it refused
	Foreign  uint64 // what was in the stream and is no event
	Waiting  int    // events that are not yet sent
}

// NewValkey returns a store that is empty at first. names returns the name of a server, or "" for one
// whose prompts are not shared; index is its inverse. Both may be called at any time, and must not
// call the store. The connection must outlive the store.
func NewValkey(
	conn *valkeyconn.Conn, limits Limits, names func(uint16) string, index func(string) (uint16, bool),
) *Valkey {
	var id [8]byte
	rand.Read(id[:]) // never fails
	ctx, stop := context.WithCancel(context.Background())
	v := &Valkey{
		memory: NewMemory(limits), conn: conn, names: names, index: index,
		self: binary.LittleEndian.Uint64(id[:]),
		// A prompt of a few exchanges has about 64 links.
		length:   int64(min(max(limits.Entries/64, 100), 16_384)),
		outbox:   outbox{wake: make(chan struct{}, 1)},
		back:     make(chan struct{}, 1),
		unsent:   conn.Refusal("refuses to be told which prefixes are warm", "is told again which prefixes are warm"),
		unlooked: conn.Refusal("does not tell which prefixes are warm", "tells again which prefixes are warm"),
		stop:     stop,
	}
	conn.OnReturn(func() {
		valkeyconn.Signal(v.back)
		valkeyconn.Signal(v.outbox.wake)
	})
	v.running.Go(func() { v.read(ctx) })
	v.running.Go(func() { v.write(ctx) })
	return v
}

// Close writes what waits, if the server is there. The store must not be used any more.
func (v *Valkey) Close() error {
	v.stop()
	v.running.Wait()
	return nil
}

// Model implements Store.
func (v *Valkey) Model(key string) uint32 {
	sum := sha256.Sum256([]byte(key))
	return v.model(max(binary.LittleEndian.Uint64(sum[:]), 1))
}

// model is Model for a hash. The key of a model that another proxy has seen is not known here.
func (v *Valkey) model(hash uint64) uint32 {
	var key [8]byte
	binary.LittleEndian.PutUint64(key[:], hash)
	number := v.memory.Model(string(key[:]))
	v.mu.Lock()
	defer v.mu.Unlock()
	if m := &v.hashes[number%maxModels]; m.number <= number {
		*m = numberedModel{number, hash}
	}
	return number
}

// hash returns the hash of the model with this number, or 0 if it is not remembered.
func (v *Valkey) hash(number uint32) uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	if m := v.hashes[number%maxModels]; number != 0 && m.number == number {
		return m.hash
	}
	return 0
}

// Match implements Store.
func (v *Valkey) Match(links []prefix.Link) (depth int, rec Record) { return v.memory.Match(links) }

// Put implements Store.
func (v *Valkey) Put(links []prefix.Link, s Sight, tokens int) {
	v.memory.Put(links, s, tokens)
	e := event{kind: eventPut, model: v.hash(s.Model), upstream: v.names(s.Upstream), lane: s.Lane}
	if e.model == 0 || len(links) == 0 {
		return
	}
	if !s.At.IsZero() {
		e.at = s.At.UnixNano()
	}
	if len(links) <= maxEventLinks {
		e.tokens = uint32(min(max(tokens, 0), 1<<31-1))
	}
	e.links = make([]uint64, min(len(links), maxEventLinks))
	for i := range e.links {
		e.links[i] = links[i].Hash
	}
	v.send(e)
}

// Cool implements Store.
func (v *Valkey) Cool(upstream uint16, model uint32) {
	v.memory.Cool(upstream, model)
	if hash := v.hash(model); hash != 0 || model == 0 {
		v.send(event{kind: eventCool, model: hash, upstream: v.names(upstream)})
	}
}

// Forget implements Store.
func (v *Valkey) Forget(model uint32) {
	v.memory.Forget(model)
	if hash := v.hash(model); hash != 0 || model == 0 {
		v.send(event{kind: eventForget, model: hash})
	}
}

// Stats implements Store.
func (v *Valkey) Stats() Stats { return v.memory.Stats() }

// Shared returns what was exchanged with other proxies.
func (v *Valkey) Shared() SharedStats {
	s := v.outbox.stats()
	s.Received, s.Foreign = v.received.Load(), v.foreign.Load()
	return s
}

// send has other proxies told of an event.
func (v *Valkey) send(e event) {
	if e.kind != eventForget && (e.upstream == "" || len(e.upstream) > maxEventName) {
		return
	}
	e.proxy = v.self
	v.outbox.put(e.encode())
}

func (v *Valkey) key() string { return v.conn.Target().Prefix + valkeyStream }

// write appends what waits to the stream until ctx ends, and then for the last time.
func (v *Valkey) write(ctx context.Context) {
	tick := time.NewTicker(valkeyRefused) // for what a slow server has left
	defer tick.Stop()
	for last := false; !last; {
		select {
		case <-ctx.Done():
			last = true
		case <-v.outbox.wake:
		case <-tick.C:
		}
		for v.append() {
		}
	}
}

// append appends a batch to the stream. It returns false if there is none, or no sense in trying the
// next one now.
func (v *Valkey) append() bool {
	if v.conn.Gone() {
		return false // putting a batch back costs as much as all that waits
	}
	batch := v.outbox.take()
	if len(batch) == 0 {
		return false
	}
	sent := 0
	var refused error
	// It is not ended by Close, which lets it finish.
	err := v.conn.Call(context.Background(), valkeyconn.Wait, func(ctx context.Context, c valkey.Client) error {
		var commands valkey.Commands
		for _, b := range batch {
			commands = append(commands, c.B().Xadd().Key(v.key()).Maxlen().Almost().
				Threshold(strconv.FormatInt(v.length, 10)).Id("*").
				FieldValue().FieldValue(valkeyField, valkey.BinaryString(b)).Build())
		}
		commands = append(commands, c.B().Expire().Key(v.key()).Seconds(int64(valkeyAge.Seconds())).Build())
		for i, result := range c.DoMulti(ctx, commands...) {
			switch err := result.Error(); {
			case err == nil && i < len(batch):
				sent++
			case valkeyconn.IsAnswer(err):
				refused = err
			case err != nil:
				return err
			}
		}
		return refused
	})
	// If the server is gone, what was not answered is sent again, although it may be there already: a
	// proxy that is told twice knows no more than before.
	v.outbox.done(batch, sent, err != nil && refused == nil)
	if refused != nil {
		v.unsent.Failure(refused)
	} else if err == nil {
		v.unsent.Success()
	}
	return refused == nil && !v.conn.Gone()
}

// read follows the stream until ctx ends.
func (v *Valkey) read(ctx context.Context) {
	from := strconv.FormatInt(time.Now().Add(-valkeyAge).UnixMilli(), 10)
	for ctx.Err() == nil {
		entries, err := v.next(ctx, from)
		if err != nil {
			refused := valkeyconn.IsAnswer(err)
			if refused {
				v.unlooked.Failure(err)
			}
			if refused || v.conn.Gone() {
				v.pause(ctx)
			}
			continue
		}
		v.unlooked.Success()
		for _, entry := range entries {
			from = entry.ID
			if e, err := decodeEvent([]byte(entry.FieldValues[valkeyField])); err != nil {
				v.foreign.Add(1)
			} else if e.proxy != v.self {
				v.received.Add(1)
				v.apply(e)
			}
		}
	}
}

// next returns the next entries after the one with this ID, or none if there are none for a while.
func (v *Valkey) next(ctx context.Context, after string) (entries []valkey.XRangeEntry, err error) {
	err = v.conn.Call(ctx, valkeyBlock+valkeyconn.Wait, func(ctx context.Context, c valkey.Client) error {
		got, err := c.Do(ctx, c.B().Xread().Count(valkeyRead).Block(valkeyBlock.Milliseconds()).
			Streams().Key(v.key()).Id(after).Build()).AsXRead()
		if valkey.IsValkeyNil(err) {
			return nil
		}
		entries = got[v.key()]
		return err
	})
	return entries, err
}

// pause waits until the server is back, or for a while if it is there and refuses.
func (v *Valkey) pause(ctx context.Context) {
	timer := time.NewTimer(valkeyRefused)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-v.back:
	case <-timer.C:
	}
}

// apply does what another proxy has done.
func (v *Valkey) apply(e event) {
	upstream, ok := v.index(e.upstream)
	if !ok && e.kind != eventForget {
		return
	}
	model := uint32(0)
	if e.model != 0 {
		model = v.model(e.model)
	}
	switch e.kind {
	case eventPut:
		v.memory.Put(e.seen(upstream, model))
	case eventCool:
		v.memory.Cool(upstream, model)
	case eventForget:
		v.memory.Forget(model)
	}
}

// seen returns the arguments of a Put.
func (e event) seen(upstream uint16, model uint32) ([]prefix.Link, Sight, int) {
	links := make([]prefix.Link, len(e.links))
	for i, hash := range e.links {
		links[i].Hash = hash
	}
	s := Sight{Upstream: upstream, Lane: e.lane, Model: model}
	if e.at != 0 {
		// Clocks differ, and nothing was seen in the future.
		s.At = time.Unix(0, min(e.at, time.Now().UnixNano()))
	}
	return links, s, int(e.tokens)
}

// outbox holds events that are not yet in the stream. If there are too many, it drops the oldest.
type outbox struct {
	wake chan struct{} // has one place

	mu            sync.Mutex // guards everything below
	events        [][]byte
	bytes         int
	sent, dropped uint64
}

func (o *outbox) put(b []byte) {
	o.mu.Lock()
	o.events = append(o.events, b)
	o.bytes += len(b)
	o.trim()
	o.mu.Unlock()
	valkeyconn.Signal(o.wake)
}

// trim drops the oldest events until the others have room. o.mu must be held.
func (o *outbox) trim() {
	for o.bytes > outboxBytes {
		o.bytes -= len(o.events[0])
		o.events[0] = nil
		o.events = o.events[1:]
		o.dropped++
	}
}

// take returns the oldest events, as many as are sent at once.
func (o *outbox) take() (batch [][]byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := min(len(o.events), valkeyWrite)
	batch, o.events = o.events[:n:n], o.events[n:]
	for _, b := range batch {
		o.bytes -= len(b)
	}
	return batch
}

// done notes how many events of a batch were sent. The others wait again, or are dropped.
func (o *outbox) done(batch [][]byte, sent int, again bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sent += uint64(sent)
	if !again {
		o.dropped += uint64(len(batch) - sent)
		return
	}
	o.events = append(batch[sent:len(batch):len(batch)], o.events...)
	for _, b := range batch[sent:] {
		o.bytes += len(b)
	}
	o.trim()
}

func (o *outbox) stats() SharedStats {
	o.mu.Lock()
	defer o.mu.Unlock()
	return SharedStats{Sent: o.sent, Dropped: o.dropped, Waiting: len(o.events)}
}
