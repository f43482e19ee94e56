package prefix

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/bits"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/cespare/xxhash/v2"
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
	digest xxhash.Digest
	links  []Link

	message  int32 // the message being written
	pictures int
	bytes    int  // of all text so far
	pos      int  // bytes of this message's text
	size     int  // the present block's length
	link     Link // the present block's, without its hash
	fine     uint64
	buf      [cell]byte // decoded text that is not hashed yet: of one block
	n        int

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

// add ends a link here.
func (w *writer) add(l Link) {
	l.Hash = w.digest.Sum64()
	if l.Hash == 0 {
		l.Hash = 1
	}
	l.Bytes = w.bytes
	w.links = append(w.links, l)
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

// text adds a raw JSON string to the message's text.
func (w *writer) text(raw []byte) {
	if len(raw) < 2 || raw[0] != '"' {
		return
	}
	inner := raw[1 : len(raw)-1]
	if !utf8.Valid(inner) {
		// encoding/json puts U+FFFD in the place of what is no UTF-8.
		var s string
		if json.Unmarshal(raw, &s) == nil {
			w.plain([]byte(s))
		}
		return
	}
	for len(inner) > 0 {
		run := inner[:min(len(inner), w.space())]
		slash := bytes.IndexByte(run, '\\')
		if slash >= 0 {
			run = run[:slash]
		}
		n := copy(w.buf[w.n:], run)
		w.n, w.pos = w.n+n, w.pos+n
		if inner = inner[n:]; slash < 0 {
			w.advance()
			continue
		}
		if len(inner) > 1 && inner[1] != 'u' {
			w.buf[w.n] = escaped(inner[1]) // there is space: the backslash would have had it
			w.n, w.pos = w.n+1, w.pos+1
			inner = inner[2:]
			w.advance()
			continue
		}
		r, used := unicodeEscape(inner)
		var encoded [utf8.UTFMax]byte
		w.plain(utf8.AppendRune(encoded[:0], r))
		inner = inner[used:]
	}
}

// plain adds decoded text.
func (w *writer) plain(p []byte) {
	for len(p) > 0 {
		n := copy(w.buf[w.n:w.n+w.space()], p)
		w.n, w.pos = w.n+n, w.pos+n
		p = p[n:]
		w.advance()
	}
}

// space returns how many bytes fit into the block and the buffer: never 0.
func (w *writer) space() int { return min(w.size-(w.pos-w.link.Offset), cell-w.n) }

// advance hashes what is full: the buffer, or the block, which a link ends.
func (w *writer) advance() {
	full := w.pos-w.link.Offset == w.size
	if !full && w.n < cell {
		return
	}
	w.opened(full)
	w.flush()
	if full {
		w.link.Length = int32(w.size)
		w.add(w.link)
		w.block()
	}
}

// flush hashes what is decoded, all of one block.
func (w *writer) flush() {
	text := w.buf[:w.n]
	w.digest.Write(text)
	w.bytes += w.n
	from := w.pos - w.n - w.link.Offset // within the block
	w.n = 0
	part := w.size / Fines
	if part == 16 {
		for i := 0; len(text) >= 16; i++ {
			a, b := binary.LittleEndian.Uint64(text), binary.LittleEndian.Uint64(text[8:])
			w.link.Fine[from/16+i] = byte(((a^0x9E3779B97F4A7C15)*0xC2B2AE3D27D4EB4F ^ bits.RotateLeft64(b, 29)) * 0x9E3779B97F4A7C15 >> 56)
			text = text[16:]
		}
		return
	}
	for len(text) > 0 {
		n := min(part-from%part, len(text))
		if from%part == 0 {
			w.fine = 0
		}
		w.fine = w.fine*0xC2B2AE3D27D4EB4F ^ xxhash.Sum64(text[:n])
		if from += n; from%part == 0 {
			w.link.Fine[from/part-1] = byte(w.fine >> 56)
		}
		text = text[n:]
	}
}

// opened notes how the conversation begins, where this is the first block, or all, of its first message's text.
func (w *writer) opened(over bool) {
	i := 1
	if w.system {
		i = 0
	}
	if over && w.link.Offset == 0 && w.opening[i] == 0 {
		w.opening[i] = xxhash.Sum64(w.buf[:w.n]) | 1
	}
}

// end ends the message. calls is the fingerprint of its tool calls, 0 for none; callBytes is how long those are.
func (w *writer) end(calls uint64, callBytes int) {
	w.opened(true)
	w.flush()
	w.bytes += callBytes
	w.putNumber('E', calls)
	w.link.Part, w.link.Length = Tail, int32(w.pos-w.link.Offset)
	w.add(w.link)
	w.message++
}

// escaped returns what a backslash and c stand for.
func escaped(c byte) byte {
	switch c {
	case 'b':
		return '\b'
	case 'f':
		return '\f'
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	}
	return c
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
