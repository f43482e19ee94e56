// Package answers keeps what need not be computed twice: the vectors of embedded inputs, and the
// answers of chats and generations. It decides what two requests must have in common to have one
// answer (Identify), keeps answers in a Store, and lets several clients read one computation
// (Flight). Package forms turns a stream into a whole answer and back.
//
// It forwards no request, and it never changes an answer: what it cannot tell exactly is computed.
package answers

import (
	"context"
	"crypto/rand"
	"time"
)

// Key identifies an entry. It is a keyed hash (HMAC-SHA256 with Store.Secret), so that an entry
// without its secret does not reveal whether a certain text was asked for.
type Key [32]byte

// Kind is the kind of an entry.
type Kind byte

// The kinds of entries. Vectors hold no text.
const (
	Vector  Kind = 1 + iota // the vector of one embedded input
	Text                    // the answer of a chat or a generation
	Verdict                 // what was found out about a model, such as whether its vectors repeat
)

// Entry is what a store keeps. The zero Entry means that there is none.
type Entry struct {
	Key  Key
	Kind Kind
	Made time.Time // when it was computed, to the millisecond
	Data []byte    // not to be changed by anyone
}

// Store keeps entries. Its methods may be called concurrently. Whoever calls them treats an error as
// a miss: a store that fails never fails a request.
type Store interface {
	// Get returns the entries of the keys, in the same order; where there is none, or one older than
	// Limits.Age or not as it was written, the zero Entry (whose Kind is 0, which no entry has). With
	// an error, too, it returns one Entry for each key; all of them may be zero. The Data that it
	// returns stays as it is whatever becomes of the store.
	Get(ctx context.Context, keys []Key) ([]Entry, error)
	// Put keeps the entries, and evicts others if there is no room: first those that were not used
	// for the longest time, where a store can know. It copies Data. Entries longer than
	// Limits.Entry, or already older than Limits.Age, are not kept, which is no error.
	Put(ctx context.Context, entries []Entry) error
	// Delete removes entries; absent ones are no error.
	Delete(ctx context.Context, keys []Key) error
	// Wipe removes everything, and replaces the secret.
	Wipe(ctx context.Context) error
	// Secret is the key of the keyed hash. It lives as long as what is stored.
	Secret() [32]byte
	Stats() Stats
	// Close writes what is not yet written. The store must not be used afterwards.
	Close() error
}

// Limits bound a store.
type Limits struct {
	Bytes int64         // of all entries together, including what the store needs for each; 0: none is kept
	Age   time.Duration // after which an entry is no longer returned; 0: never
	Entry int64         // the longest Data, in bytes; 0: an eighth of Bytes
}

// Stats describe a store at one moment, and count since it was opened.
type Stats struct {
	Entries int64  // -1: unknown
	Bytes   int64  // which Limits.Bytes bounds; -1: unknown
	Evicted uint64 // for room
	Expired uint64 // for age
	Errors  uint64 // failed calls
	Down    bool   // the store cannot be used at the moment; it is tried again by itself
}

// longest returns the longest Data that is kept, in bytes.
func (l Limits) longest() int64 {
	if l.Entry > 0 {
		return min(l.Entry, l.Bytes)
	}
	return l.Bytes / 8
}

// old reports whether an entry that was made then is no longer returned now.
func (l Limits) old(made, now time.Time) bool { return l.Age > 0 && now.Sub(made) > l.Age }

// kept reports whether Put keeps the entry.
func (l Limits) kept(e Entry, now time.Time) bool {
	return l.Bytes > 0 && int64(len(e.Data)) <= l.longest() && !l.old(e.Made, now)
}

// newSecret returns a random secret.
func newSecret() (secret [32]byte) {
	rand.Read(secret[:]) // never fails
	return secret
}
