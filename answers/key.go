package answers

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
)

// MakeKey returns the key of an entry: the HMAC-SHA256 of its kind and parts with a store's secret.
// Each part is preceded by its length, so that no two lists of parts have one key. Parts that do
// not apply are to be empty, not left out.
//
// For the answer of a request these are, in this order: Identity.Sum, the path, the model's name as
// it is written, its digest, Ollama's version, the scope of the API key, the form, and the Day if
// the prompt has a DateClock.
func MakeKey[Part ~string | ~[]byte](secret [32]byte, kind Kind, parts ...Part) Key {
	n := 1
	for _, p := range parts {
		n += 8 + len(p)
	}
	b := append(make([]byte, 0, n), byte(kind))
	for _, p := range parts {
		b = binary.BigEndian.AppendUint64(b, uint64(len(p)))
		b = append(b, p...)
	}
	h := hmac.New(sha256.New, secret[:])
	h.Write(b)
	var k Key
	h.Sum(k[:0])
	return k
}
