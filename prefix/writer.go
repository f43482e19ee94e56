package prefix

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/bits"
	"slices"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/cespare/xxhash/v2"
	"github.com/zeebo/xxh3"
)

const (
	// blockMin is the length of a block in bytes, up to blockFlat bytes into a message. From there on blocks grow with
	// their distance from the message's start, to between a 64th and a 32nd of it, so that a prompt of 64 MiB has a few
	// hundred links and not a quarter of a million.
	blockMin  = 256
	blockFlat = 16 << 10
	cell      = 4 << 10 // bytes that are decoded before they are hashed
)

// blockSize returns the length of the block that begins at offset pos of a message. Every block begins at a multiple of
// its length.
func blockSize(pos int) int { return blockMin << bits.Len(uint(pos/blockFlat)) }

// mark begins everything that is not a message's text. It never occurs in valid UTF-8, so that no text can pass for
// anything else.
const mark = 0xFF

// writer makes a chain. What it writes to the digest is a canonical form of the prompt: the same for every way to write
// the same request.
type writer struct {
	digest xxhash.Digest // of the model and the prompt
	runner uint64        // of the options that the model is loaded with
	links  []Link

	message  int32 // the message being written
	pictures int
	bytes    int  // of all text so far
	pos      int  // bytes of this message's text
	size     int  // the present block's length
	link     Link // the present block's, without its hash
	fine     uint64
	buf      *[cell]byte // text that is not hashed yet: of one block
	n        int

	leading, inserted int32 // for Chain
	spoken            bool  // a message was written that is no system message

	look *look // nil: nothing is to be seen

	opening [2]uint64 // for Chain.Conversation: of the first system and the first other message
	system  bool      // the message is a system message
}

// put writes a small piece of the canonical form.
func (w *writer) put(tag byte, parts ...[]byte) {
	var head [2]byte
	head[0], head[1] = mark, tag
	w.digest.Write(head[:])
	for _, p := range parts {
		var n [8]byte
		binary.LittleEndian.PutUint64(n[:], uint64(len(p)))
		w.digest.Write(n[:])
		w.digest.Write(p)
	}
}

func (w *writer) putNumber(tag byte, v uint64) {
	var b [10]byte
	b[0], b[1] = mark, tag
	binary.LittleEndian.PutUint64(b[2:], v)
	w.digest.Write(b[:])
}

// maxLinks bounds a chain, 64 bytes each: no more are made of a body of a million messages. What comes after is in the last
// one's fingerprint.
const maxLinks = 1 << 15

// add ends a link here.
func (w *writer) add(l Link) {
	if len(w.links) == maxLinks {
		return
	}
	l.Hash = w.sum()
	l.Bytes = w.bytes
	w.links = append(w.links, l)
}

// sum returns the fingerprint of all that was written, and of the runner options. These are not
// part of the digest, so that a chain without them costs no second one: see Chain.Contents.
func (w *writer) sum() uint64 {
	return max(w.digest.Sum64()^w.runner, 1)
}

// begin begins a message's text: its Head link has been written.
func (w *writer) begin() {
	w.pos = 0
	w.block()
}

func (w *writer) block() {
	w.size = blockSize(w.pos)
	w.link = Link{Part: Block, Message: w.message, Offset: w.pos}
}

// text adds a raw JSON string to the message's text. A long one is taken in pieces, which are searched and hashed while they
// are in the processor's cache. A space is never within an escape or a character.
func (w *writer) text(raw []byte) {
	if len(raw) < 2 || raw[0] != '"' {
		return
	}
	const piece = 32 << 10
	inner := raw[1 : len(raw)-1]
	for len(inner) > piece {
		n := bytes.LastIndexByte(inner[:piece], ' ') + 1
		if n == 0 {
			break
		}
		w.piece(inner[:n])
		inner = inner[n:]
	}
	w.piece(inner)
}

// piece adds a part of a raw JSON string, without quotes, to the message's text. Where it spells its escapes as most
// encoders do, it is not copied.
func (w *writer) piece(inner []byte) {
	if !utf8.Valid(inner) {
		// encoding/json puts U+FFFD in the place of what is no UTF-8.
		var s string
		if json.Unmarshal(slices.Concat([]byte{'"'}, inner, []byte{'"'}), &s) == nil {
			var spelled []byte
			for _, r := range s {
				spelled = appendSpelled(spelled, r)
			}
			w.plain(spelled)
		}
		return
	}
	for start := 0; ; {
		i := oddEscape(inner[start:])
		if i < 0 {
			break
		}
		if i += start; escaped(inner, i) {
			start = i + 1 // the backslash is itself what is escaped
			continue
		}
		w.plain(inner[:i])
		r, used := rune('/'), 2
		if inner[i+1] == 'u' {
			r, used = unicodeEscape(inner[i:])
		}
		var spelled [8]byte
		w.plain(appendSpelled(spelled[:0], r))
		inner, start = inner[i+used:], 0
	}
	w.plain(inner)
}

// escaped reports whether the character at i follows an odd number of backslashes.
func escaped(s []byte, i int) bool {
	n := 0
	for i-n > 0 && s[i-n-1] == '\\' {
		n++
	}
	return n%2 == 1
}

// oddEscapeGeneric is oddEscape without the processor's vector instructions.
func oddEscapeGeneric(s []byte) int {
	for i := 0; ; i++ {
		slash := bytes.IndexByte(s[i:], '\\')
		if slash < 0 || i+slash+1 >= len(s) {
			return -1
		}
		if i += slash; s[i+1] == 'u' || s[i+1] == '/' {
			return i
		}
	}
}

// appendSpelled appends a character as the text of messages is hashed: as JSON, with the shortest escape, and with one
// only where there must be one.
func appendSpelled(b []byte, r rune) []byte {
	switch r {
	case '"', '\\':
		return append(b, '\\', byte(r))
	case '\b':
		return append(b, '\\', 'b')
	case '\f':
		return append(b, '\\', 'f')
	case '\n':
		return append(b, '\\', 'n')
	case '\r':
		return append(b, '\\', 'r')
	case '\t':
		return append(b, '\\', 't')
	}
	if r < 0x20 {
		const hex = "0123456789abcdef"
		return append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
	}
	return utf8.AppendRune(b, r)
}

// plain adds text that is spelled as it is hashed. It is hashed in units: a whole block, or a cell of a longer one. Only
// what does not fill one is copied.
func (w *writer) plain(p []byte) {
	for len(p) > 0 {
		unit := min(w.size, cell)
		if w.n == 0 && len(p) >= unit {
			w.hash(p[:unit])
			p = p[unit:]
			continue
		}
		n := copy(w.buf[w.n:unit], p)
		w.n += n
		p = p[n:]
		if w.n == unit {
			w.n = 0
			w.hash(w.buf[:unit])
		}
	}
}

// hash takes in a unit, or the rest of a message, and ends the block's link where that is full.
func (w *writer) hash(text []byte) {
	w.opened(text)
	w.look.see(w.message, w.pos, text)
	w.digestText(text)
	w.pos += len(text)
	w.bytes += len(text)
	if w.pos-w.link.Offset == w.size {
		w.link.Length = int32(w.size)
		w.add(w.link)
		w.block()
	}
}

// digestText writes text, which begins at w.pos, to the digest. A block of more than blockMin bytes is written as the
// hashes of its parts, since these are needed for Link.Fine as well. What Fine has of a part depends on those before it,
// so that two blocks that seem equal in one part, though they are not, differ in the next one.
func (w *writer) digestText(text []byte) {
	from, part := w.pos-w.link.Offset, w.size/Fines // from: within the block
	if w.size == blockMin {
		w.part(xxh3.Hash(text))
		fine := uint64(0)
		for i := 0; len(text) >= 16; i++ {
			a, b := binary.LittleEndian.Uint64(text), binary.LittleEndian.Uint64(text[8:])
			fine = (fine ^ (a^0x9E3779B97F4A7C15)*0xC2B2AE3D27D4EB4F ^ bits.RotateLeft64(b, 29)) * 0x9E3779B97F4A7C15
			w.link.Fine[i] = byte(fine >> 56)
			text = text[16:]
		}
		return
	}
	piece := min(part, cell)
	for len(text) > 0 {
		n := min(piece, len(text))
		h := xxh3.Hash(text[:n])
		w.part(h)
		if from == 0 {
			w.fine = 0
		}
		w.fine = w.fine*0xC2B2AE3D27D4EB4F ^ h
		if from += n; from%part == 0 {
			w.link.Fine[from/part-1] = byte(w.fine >> 56)
		}
		text = text[n:]
	}
}

// part writes the hash of a part of the text.
func (w *writer) part(hash uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], hash)
	w.digest.Write(b[:])
}

// opened notes how the conversation begins, where text is the beginning of its first system or first other message.
func (w *writer) opened(text []byte) {
	i := 1
	if w.system {
		i = 0
	}
	if w.pos == 0 && w.opening[i] == 0 {
		w.opening[i] = xxhash.Sum64(text) | 1
	}
}

// end ends the message. calls is the fingerprint of its tool calls, 0 for none; callBytes is how long those are.
func (w *writer) end(calls uint64, callBytes int) {
	w.hash(w.buf[:w.n])
	w.n = 0
	w.bytes += callBytes
	w.putNumber('E', calls)
	w.link.Part, w.link.Length = Tail, int32(w.pos-w.link.Offset)
	w.add(w.link)
	w.message++
}

// unicodeEscape decodes the \u escape, or two that make a surrogate pair, at the head of s, as encoding/json does, and
// returns how many bytes of s it is. Where it is none, it stands for U+FFFD.
func unicodeEscape(s []byte) (r rune, used int) {
	r, ok := hex4(s)
	if !ok {
		return utf8.RuneError, min(len(s), 2)
	}
	if !utf16.IsSurrogate(r) {
		return r, 6
	}
	if second, ok := hex4(s[6:]); ok {
		if r := utf16.DecodeRune(r, second); r != utf8.RuneError {
			return r, 12
		}
	}
	return utf8.RuneError, 6
}

// hex4 reads \uXXXX.
func hex4(s []byte) (rune, bool) {
	if len(s) < 6 || s[0] != '\\' || s[1] != 'u' {
		return 0, false
	}
	v, err := strconv.ParseUint(string(s[2:6]), 16, 16)
	return rune(v), err == nil
}
