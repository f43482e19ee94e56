package answers

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
)

// MakeKey returns the key of an entry: the HMAC-SHA256 of its kind and parts with a store's secret.
// Each part is preceded by its length, so that no two lists of parts have one key. Parts that do not
// apply are to be empty, not left out.
//
// For the answer of a request these are, in this order: Identity.Sum, the path, the model's name as it
// is written, its digest, Ollama's version, the scope of the API key, the form, and the Day if the
// prompt has a DateClock.
func MakeKey[Part ~string | ~[]byte](secret [32]byte, kind Kind, parts ...Part) Key {
	h := hmac.New(sha256.New, secret[:])
	var n [8]byte
	h.Write([]byte{byte(kind)})
	for _, p := range parts {
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	var k Key
	h.Sum(k[:0])
	return k
}
