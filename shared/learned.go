package shared

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

const (
	// learnedAge is how long what was learned of a server is kept.
	learnedAge = 7 * 24 * time.Hour
	// maxLearned is the length of what is kept of one server, maxName that of its name, and maxServers
	// the number of servers that are read.
	maxLearned = 64 << 10
	maxName    = 255
	maxServers = 10_000
)

// Learned keeps what proxies have learned of servers in a Valkey or Redis server, as JSON that it does
// not read, by the servers' names. Make it with NewLearned; it must be closed.
//
// It is one hash. What a server has there is kept for a week after it was last saved.
type Learned struct {
	conn    *valkeyconn.Conn
	refused *outage.Outage

	wake    chan struct{} // has one place
	stop    context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex // guards pending
	pending map[string][]byte
}

// NewLearned returns what is kept in the server. The connection must outlive it.
func NewLearned(conn *valkeyconn.Conn) *Learned {
	ctx, stop := context.WithCancel(context.Background())
	l := &Learned{
		conn: conn, stop: stop, wake: make(chan struct{}, 1), pending: map[string][]byte{},
		refused: conn.Refusal("refuses to keep what was learned of servers", "keeps what is learned of servers again"),
	}
	conn.OnReturn(func() { valkeyconn.Signal(l.wake) })
	l.running.Go(func() { l.run(ctx) })
	return l
}

// Close saves what is not saved yet, if the server is there.
func (l *Learned) Close() error {
	l.stop()
	l.running.Wait()
	return nil
}

func (l *Learned) key() string { return l.conn.Target().Prefix + "learned" }

// SaveLearned has what was learned of a server kept, instead of what was known before. It does not
// wait: if Valkey is gone, the last blob of each server is saved when it is back. A blob that is not
// JSON, or is longer than 64 KiB, is not kept.
func (l *Learned) SaveLearned(name string, blob []byte) {
	if name == "" || len(name) > maxName || len(blob) > maxLearned || !json.Valid(blob) {
		return
	}
	l.mu.Lock()
	l.pending[name] = bytes.Clone(blob)
	l.mu.Unlock()
	valkeyconn.Signal(l.wake)
}

// LoadLearned returns what is kept, by the names of servers. ctx limits how long it waits for the
// server, which is at most a few seconds.
func (l *Learned) LoadLearned(ctx context.Context) (map[string][]byte, error) {
	var found map[string]string
	err := l.conn.Call(ctx, valkeyconn.Wait, func(ctx context.Context, c valkey.Client) (err error) {
		found, err = c.Do(ctx, c.B().Hgetall().Key(l.key()).Build()).AsStrMap()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading what was learned of servers from Valkey: %w", err)
	}
	return parseLearned(found, time.Now()), nil
}

// parseLearned reads what is kept. What others have written, or is too old, is passed over.
func parseLearned(found map[string]string, now time.Time) map[string][]byte {
	learned := map[string][]byte{}
	for name, value := range found {
		if name == "" || len(name) > maxName || len(value) < 8 || len(value) > 8+maxLearned ||
			len(learned) == maxServers {
			continue
		}
		saved := time.UnixMilli(int64(binary.LittleEndian.Uint64([]byte(value))))
		// Clocks differ.
		if age := now.Sub(saved); age > learnedAge || age < -learnedAge {
			continue
		}
		if blob := []byte(value[8:]); json.Valid(blob) {
			learned[name] = blob
		}
	}
	return learned
}

// run saves what waits until ctx ends, and then for the last time.
func (l *Learned) run(ctx context.Context) {
	tick := time.NewTicker(time.Minute) // for what a slow server has left
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			l.save()
			return
		case <-l.wake:
		case <-tick.C:
		}
		l.save()
	}
}

func (l *Learned) save() {
	l.mu.Lock()
	blobs := maps.Clone(l.pending)
	l.mu.Unlock()
	if len(blobs) == 0 {
		return
	}
	now := binary.LittleEndian.AppendUint64(nil, uint64(time.Now().UnixMilli()))
	err := l.conn.Call(context.Background(), valkeyconn.Wait, func(ctx context.Context, c valkey.Client) error {
		set := c.B().Hset().Key(l.key()).FieldValue()
		for name, blob := range blobs {
			set = set.FieldValue(name, valkey.BinaryString(append(now[:8:8], blob...)))
		}
		expire := c.B().Expire().Key(l.key()).Seconds(int64(learnedAge.Seconds())).Build()
		for _, result := range c.DoMulti(ctx, set.Build(), expire) {
			if err := result.Error(); err != nil {
				return err
			}
		}
		return nil
	})
	if note(l.refused, err); err != nil {
		return // it is saved later
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, blob := range blobs {
		if bytes.Equal(l.pending[name], blob) {
			delete(l.pending, name)
		}
	}
}
