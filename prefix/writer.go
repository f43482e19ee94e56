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
	// blockMin is the length of a block in bytes, up to blockFlat bytes into a message. After that,
	// blocks grow with their distance from the message's start, to between a 64th and a 32nd of it,
	// so that a prompt of 64 MiB has a few hundred links instead of a quarter of a million.
	blockMin  = 256
	blockFlat = 16 << 10
	cell      = 4 << 10 // bytes that are decoded before they are hashed
)

// blockSize returns the length of the block that begins at offset pos of a message. Every block
// begins at a multiple of its length.
func blockSize(pos int) int { return blockMin << bits.Len(uint(pos/blockFlat)) }

// mark begins everything except a message's text. It never occurs in valid UTF-8, so no text can be
// mistaken for something else.
const mark = 0xFF

// writer builds a chain. It writes a canonical form of the prompt to the digest, which is the same
// for every spelling of a request.
type writer struct {
	digest xxhash.Digest // of the model and the prompt
	runner uint64        // of the options that the model is loaded with
	links  []Link

	message  int32 // the message being written
	pictures int
	bytes    int  // of all text so far
	pos      int  // bytes of this message's text
	size     int  // the current block's length
	link     Link // the current block's, without its hash
	fine     uint64
	buf      *[cell]byte // text of one block that is not hashed yet
	n        int

	leading, inserted int32 // for Chain
	spoken            bool  // a message other than a system message was written

	look *look // nil if no text is wanted

	opening [2]uint64 // for Chain.Conversation: of the first system message and the first other one
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

// maxLinks limits a chain, at 64 bytes per link, for bodies with a million messages. The last
// link's fingerprint covers the rest.
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

// sum returns the fingerprint of everything written so far and of the runner options. The digest
// excludes the options, so that a chain without them needs no second digest: see Chain.Contents.
func (w *writer) sum() uint64 {
	return max(w.digest.Sum64()^w.runner, 1)
}

// begin begins a message's text, after its Head link.
func (w *writer) begin() {
	w.pos = 0
	w.block()
}

func (w *writer) block() {
	w.size = blockSize(w.pos)
	w.link = Link{Part: Block, Message: w.message, Offset: w.pos}
}

// text adds a raw JSON string to the message's text. It handles a long one in pieces, so that each
// is searched and hashed while it is in the processor's cache. A space is never inside an escape or
// a character.
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

// piece adds a part of a raw JSON string, without quotes, to the message's text. It copies nothing
// if the escapes are spelled as by most encoders.
func (w *writer) piece(inner []byte) {
	if !utf8.Valid(inner) {
		// encoding/json replaces invalid UTF-8 with U+FFFD.
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
			start = i + 1 // the backslash itself is escaped
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

// oddEscapeGeneric is oddEscape without vector instructions.
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

// appendSpelled appends a character in the form in which text is hashed: as JSON, with the shortest
// escape, and only where an escape is required.
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

// plain adds text that is spelled as it is hashed. The unit of hashing is a block, or a cell of a
// longer block. Only an incomplete unit is copied.
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

// hash processes a unit, or the rest of a message, and ends the block's link if the block is full.
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

// digestText writes text that begins at w.pos to the digest. A block longer than blockMin bytes is
// written as the hashes of its parts, which Link.Fine needs as well. Each part's bits in Fine
// depend on the parts before it, so if two different blocks seem equal in one part, the next one
// shows the difference.
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

// opened records the start of the conversation if text begins its first system message or its first
// other message.
func (w *writer) opened(text []byte) {
	i := 1
	if w.system {
		i = 0
	}
	if w.pos == 0 && w.opening[i] == 0 {
		w.opening[i] = xxhash.Sum64(text) | 1
	}
}

// end ends the message. calls is the fingerprint of its tool calls, 0 for none; callBytes is their
// length.
func (w *writer) end(calls uint64, callBytes int) {
	w.hash(w.buf[:w.n])
	w.n = 0
	w.bytes += callBytes
	w.putNumber('E', calls)
	w.link.Part, w.link.Length = Tail, int32(w.pos-w.link.Offset)
	w.add(w.link)
	w.message++
}

// unicodeEscape decodes the \u escape at the head of s, or two that form a surrogate pair, as
// encoding/json does. It returns the number of bytes used. An invalid escape counts as U+FFFD.
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

// hex4 parses \uXXXX.
func hex4(s []byte) (rune, bool) {
	if len(s) < 6 || s[0] != '\\' || s[1] != 'u' {
		return 0, false
	}
	v, err := strconv.ParseUint(string(s[2:6]), 16, 16)
	return rune(v), err == nil
}
