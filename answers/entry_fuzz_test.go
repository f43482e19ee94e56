package answers

import (
	"bytes"
	"testing"
	"time"
)

// FuzzEntry: what is decoded is encoded to the same bytes, and no other key has it.
func FuzzEntry(f *testing.F) {
	key := Key{1, 2, 3}
	for _, data := range []string{"", "x", "a longer answer"} {
		f.Add(key[:], encodeEntry(Entry{Key: key, Kind: Text, Made: time.UnixMilli(1e12), Data: []byte(data)}))
	}
	f.Fuzz(func(t *testing.T, k, value []byte) {
		var key Key
		copy(key[:], k)
		e, ok := decodeEntry(key, value)
		if !ok {
			if !equalZero(e) {
				t.Error("something is returned")
			}
			return
		}
		if !bytes.Equal(encodeEntry(e), value) {
			t.Errorf("%q becomes %q", value, encodeEntry(e))
		}
		key[31]++
		if _, ok := decodeEntry(key, value); ok {
			t.Error("another key has it, too")
		}
	})
}

func equalZero(e Entry) bool {
	return e.Key == Key{} && e.Kind == 0 && e.Made.IsZero() && e.Data == nil
}
