package batch

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/text/encoding/charmap"
)

// Encoding is how the text of an input is encoded.
type Encoding string

const (
	UTF8        Encoding = "utf-8"
	Windows1252 Encoding = "windows-1252"
	Latin1      Encoding = "latin1"
	UTF16       Encoding = "utf-16" // little-endian unless its byte order mark says otherwise
)

var (
	utf8BOM    = []byte("\xef\xbb\xbf")
	utf16Marks = [][]byte{[]byte("\xff\xfe"), []byte("\xfe\xff")}
)

// marked returns the encoding whose byte order mark a text begins with, or "".
func marked(text []byte) Encoding {
	for _, mark := range utf16Marks {
		if bytes.HasPrefix(text, mark) {
			return UTF16
		}
	}
	if bytes.HasPrefix(text, utf8BOM) {
		return UTF8
	}
	return ""
}

// check examines the beginning of a text.
func (e Encoding) check(head []byte) error {
	if mark := marked(head); mark != "" && mark != e {
		return &lineError{1, 1, fmt.Errorf(
			"the first bytes say that it is %s, not %s: say so (--encoding %[1]s)", mark, e)}
	}
	return nil
}

// copy copies a text as UTF-8. It does not check UTF-8; for other encodings it reports invalid
// bytes, for which the decoders of x/text would write U+FFFD.
func (e Encoding) copy(to io.Writer, from io.Reader) error {
	in := bufio.NewReader(from)
	head, _ := in.Peek(len(utf8BOM)) // an error comes again
	if err := e.check(head); err != nil {
		return err
	}
	var next func(*bufio.Reader) (rune, error)
	switch e {
	case Windows1252:
		next = single(charmap.Windows1252)
	case Latin1:
		next = single(charmap.ISO8859_1)
	case UTF16:
		next = pairs(binary.LittleEndian)
		if marked(head) == UTF16 {
			if bytes.HasPrefix(head, utf16Marks[1]) {
				next = pairs(binary.BigEndian)
			}
			in.Discard(2)
		}
	default:
		_, err := io.Copy(to, in)
		return err
	}
	out := bufio.NewWriter(to)
	line, column := 1, 1
	for {
		r, err := next(in)
		if err == io.EOF {
			return out.Flush()
		}
		if _, isText := errors.AsType[badText](err); isText {
			return &lineError{line, column, err}
		}
		if err != nil {
			return err
		}
		if column++; r == '\n' {
			line, column = line+1, 1
		}
		out.WriteRune(r) // Flush returns the first error
	}
}

// badText is where and why text cannot be decoded.
type badText string

func (e badText) Error() string { return string(e) }

func single(c *charmap.Charmap) func(*bufio.Reader) (rune, error) {
	return func(in *bufio.Reader) (rune, error) {
		b, err := in.ReadByte()
		r := c.DecodeByte(b)
		if err == nil && r == utf8.RuneError {
			err = badText(fmt.Sprintf("byte 0x%02X is no character in %s", b, c))
		}
		return r, err
	}
}

func pairs(order binary.ByteOrder) func(*bufio.Reader) (rune, error) {
	return func(in *bufio.Reader) (rune, error) {
		var unit [2]byte
		if _, err := io.ReadFull(in, unit[:]); errors.Is(err, io.ErrUnexpectedEOF) {
			text := fmt.Sprintf("byte 0x%02X at the end is half a character in UTF-16", unit[0])
			return 0, badText(text)
		} else if err != nil {
			return 0, err
		}
		r := rune(order.Uint16(unit[:]))
		if !utf16.IsSurrogate(r) {
			return r, nil
		}
		if second, _ := in.Peek(2); len(second) == 2 {
			if pair := utf16.DecodeRune(r, rune(order.Uint16(second))); pair != utf8.RuneError {
				in.Discard(2)
				return pair, nil
			}
		}
		text := fmt.Sprintf("bytes 0x%02X 0x%02X are half a character in UTF-16", unit[0], unit[1])
		return 0, badText(text)
	}
}

// notUTF8 returns where a text that begins on a line is not UTF-8, or nil.
func notUTF8(text []byte, line int) *lineError {
	if utf8.Valid(text) {
		return nil
	}
	i := 0
	for {
		r, size := utf8.DecodeRune(text[i:])
		if r == utf8.RuneError && size == 1 {
			break
		}
		i += size
	}
	lines, column := position(text, i)
	return &lineError{line + lines, column, fmt.Errorf(
		"byte 0x%02X is not UTF-8: save it as UTF-8, or say what it is (--encoding windows-1252, for instance)",
		text[i])}
}

// position returns how many lines end before a byte of a text, and its column in characters.
func position(text []byte, at int) (lines, column int) {
	begin := bytes.LastIndexByte(text[:at], '\n') + 1
	return bytes.Count(text[:at], []byte("\n")), utf8.RuneCount(text[begin:at]) + 1
}
