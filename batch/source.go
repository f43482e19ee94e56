package batch

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxLine is how many bytes a line or a row may have.
const maxLine = 64 << 20

var errLongLine = fmt.Errorf("longer than %d MiB", maxLine>>20)

// Source is the input: requests, or rows that fill a template. It is read in order, and each item
// again when its request is sent, so that none of it is kept in memory.
type Source struct {
	// Hash is a fingerprint of the input and of the template.
	Hash     string
	Template *Template // nil: each line is a request

	file    *os.File
	spooled bool     // a copy, which is removed on Close
	columns []string // of a CSV file; nil: one JSON object per line
	comma   rune
	start   int64 // where the first line or row begins
	line    int   // its number
	size    int64
}

// item is one request's place in the input.
type item struct {
	index int   // from 0
	line  int   // where it begins, from 1
	off   int64 // in bytes
	size  int
	text  int   // bytes of the prompt's text, once it has been read
	bad   error // why it cannot be read; nil: it may be readable

	shared int   // links of its path that it shares with the item before it in a window
	span   *span // of a batch that is shared; nil: it is not, or not yet
}

// OpenLines opens requests, one per line. "-" is stdin, which, like a file that is not UTF-8, is
// copied to a file first.
func OpenLines(path string, stdin io.Reader, e Encoding) (*Source, error) {
	return open(path, stdin, e, nil)
}

// OpenRows opens rows for a template: a .csv or .tsv file whose first line names the columns, or
// one JSON object per line.
func OpenRows(path string, stdin io.Reader, e Encoding, t *Template) (*Source, error) {
	return open(path, stdin, e, t)
}

func open(path string, stdin io.Reader, e Encoding, t *Template) (*Source, error) {
	s := &Source{Template: t, line: 1}
	copied := stdin
	if path != "-" {
		var err error
		if s.file, err = os.Open(path); err != nil {
			return nil, fmt.Errorf("opening the input: %w", err)
		}
		if info, err := s.file.Stat(); err != nil || info.Mode().IsRegular() && e == UTF8 {
			copied = nil
		} else { // a pipe, or in another encoding
			defer s.file.Close()
			copied = s.file
		}
	}
	var err error
	if copied != nil {
		err = s.spool(copied, e)
	}
	if err == nil {
		err = s.begin(strings.ToLower(filepath.Ext(path)))
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("reading the input %s: %w", path, err)
	}
	return s, nil
}

// spool copies an input that can be read only once, or is not UTF-8.
func (s *Source) spool(r io.Reader, e Encoding) error {
	f, err := os.CreateTemp("", "ollama-cacheproxy-batch-")
	if err != nil {
		return err
	}
	s.file, s.spooled = f, true
	if err := e.copy(f, r); err != nil {
		if _, isText := errors.AsType[*lineError](err); isText {
			return err
		}
		return fmt.Errorf("copying it to %s (TMPDIR says where to): %w", f.Name(), err)
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}

// Close closes the input.
func (s *Source) Close() {
	if s.file == nil {
		return
	}
	s.file.Close()
	if s.spooled {
		os.Remove(s.file.Name())
	}
}

// begin reads what precedes the first item, and the whole input for its hash.
func (s *Source) begin(extension string) error {
	hash := sha256.New()
	n, err := io.Copy(hash, s.file)
	if err != nil {
		return err
	}
	s.size = n
	if s.Template != nil {
		for _, p := range s.Template.parts {
			fmt.Fprintf(hash, "\x00%s\x00%s\x00%v", p.text, p.field, p.whole)
		}
	}
	s.Hash = hex.EncodeToString(hash.Sum(nil))

	head := make([]byte, 3)
	got, err := s.file.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return err
	}
	if err := UTF8.check(head[:got]); err != nil {
		return err
	}
	if bytes.HasPrefix(head, utf8BOM) {
		s.start = int64(len(utf8BOM))
	}
	if s.Template == nil || extension != ".csv" && extension != ".tsv" {
		return nil
	}
	s.comma = ','
	if extension == ".tsv" {
		s.comma = '\t'
	}
	return s.readColumns()
}

// readColumns reads the line that names the columns; the items follow it.
func (s *Source) readColumns() error {
	limited := &limitedReader{r: s.section(s.start, s.size-s.start), left: maxLine}
	r := s.csv(limited)
	columns, readErr := r.Read()
	head := make([]byte, r.InputOffset())
	if _, err := s.file.ReadAt(head, s.start); err != nil && err != io.EOF {
		return err
	}
	if err := s.nameColumns(columns, head, readErr); err != nil {
		return fmt.Errorf("the line that names the columns: %w", err)
	}
	for _, field := range s.Template.Fields {
		if !slices.Contains(s.columns, field) {
			return fmt.Errorf("no column is called %q, as the template's {{%s}} wants; there are: %s", field, field, strings.Join(s.columns, ", "))
		}
	}
	s.start += int64(len(head))
	s.line += bytes.Count(head, []byte("\n"))
	return nil
}

// nameColumns sets the names, which were read from a text. Spreadsheets append columns without a
// name, which are ignored.
func (s *Source) nameColumns(names []string, text []byte, readErr error) error {
	if malformed, ok := errors.AsType[*csv.ParseError](readErr); ok {
		return rowError(malformed, text, s.line)
	}
	if readErr != nil {
		return readErr
	}
	if err := notUTF8(text, s.line); err != nil {
		return err
	}
	for _, name := range names {
		name = strings.TrimSpace(name)
		if name != "" && slices.Contains(s.columns, name) {
			return fmt.Errorf("two columns are called %q", name)
		}
		s.columns = append(s.columns, name)
	}
	for len(s.columns) > 0 && s.columns[len(s.columns)-1] == "" {
		s.columns = s.columns[:len(s.columns)-1]
	}
	if len(s.columns) == 0 {
		return errors.New("no column has a name")
	}
	return nil
}

func (s *Source) section(off, n int64) io.Reader { return io.NewSectionReader(s.file, off, n) }

func (s *Source) csv(r io.Reader) *csv.Reader {
	c := csv.NewReader(r)
	c.Comma, c.ReuseRecord = s.comma, true
	c.FieldsPerRecord = -1 // fit checks that
	return c
}

// fit refuses a row without the columns that the first line names. Empty fields beyond them are
// ignored.
func (s *Source) fit(fields []string) error {
	n := len(s.columns)
	said := func(field string) bool { return strings.TrimSpace(field) != "" }
	if len(fields) < n || slices.ContainsFunc(fields[n:], said) {
		return fmt.Errorf("the row has not the %d columns that the first line names", n)
	}
	return nil
}

// items returns the items and the text of each, which is valid until the next one. An error ends
// them.
func (s *Source) items() iter.Seq2[item, error] {
	if s.columns != nil {
		return s.rows
	}
	return s.lines
}

func (s *Source) lines(yield func(item, error) bool) {
	in := bufio.NewReaderSize(s.section(s.start, s.size-s.start), 256<<10)
	next := item{line: s.line, off: s.start}
	for {
		size, blank, err := skipLine(in)
		if err != nil && err != io.EOF {
			yield(item{}, err)
			return
		}
		it := next
		if it.size = int(min(size, maxLine)); size > maxLine {
			it.bad = errLongLine
		}
		if !blank {
			if !yield(it, nil) {
				return
			}
			next.index++
		}
		if err == io.EOF {
			return
		}
		next.line++
		next.off += size
	}
}

// skipLine reads a line, including its end, and returns how many bytes it has. At the end of the
// input err is io.EOF.
func skipLine(in *bufio.Reader) (size int64, blank bool, err error) {
	blank = true
	for {
		text, err := in.ReadSlice('\n')
		size += int64(len(text))
		blank = blank && len(bytes.TrimSpace(text)) == 0
		if err != bufio.ErrBufferFull {
			return size, blank, err
		}
	}
}

func (s *Source) rows(yield func(item, error) bool) {
	limited := &limitedReader{r: s.section(s.start, s.size-s.start)}
	r := s.csv(limited)
	next := item{line: s.line, off: s.start}
	for {
		limited.left = maxLine
		fields, err := r.Read()
		if err == io.EOF {
			return
		}
		malformed, isMalformed := errors.AsType[*csv.ParseError](err)
		if err != nil && !isMalformed {
			yield(item{}, s.endless(next.off, err))
			return
		}
		it := next
		it.size = int(s.start + r.InputOffset() - it.off)
		if isMalformed {
			it.line = s.line - 1 + malformed.StartLine
			text, err := s.raw(it)
			if err != nil {
				yield(item{}, err)
				return
			}
			it.bad = rowError(malformed, text, it.line)
		} else {
			at, _ := r.FieldPos(0)
			it.line = s.line - 1 + at
			it.bad = s.fit(fields)
		}
		if !yield(it, nil) {
			return
		}
		next.index++
		next.off += int64(it.size)
	}
}

// endless reports where the row begins whose end was not found.
func (s *Source) endless(off int64, err error) error {
	if !errors.Is(err, errLongLine) {
		return err
	}
	line := s.line
	in := bufio.NewReader(s.section(s.start, off-s.start))
	for {
		if _, _, err := skipLine(in); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		line++
	}
	return &lineError{line, 0, fmt.Errorf("the row that begins there is %w: is a quote not closed?", err)}
}

// rowError says what is wrong with a row whose text begins on a line, and where its quotes are.
func rowError(e *csv.ParseError, text []byte, line int) error {
	if !errors.Is(e.Err, csv.ErrQuote) {
		return e.Err
	}
	text = bytes.TrimLeft(text, "\r\n") // blank lines before it
	at := 0                             // where the error was found
	for range e.Line - e.StartLine {
		at += bytes.IndexByte(text[at:], '\n') + 1
	}
	at = min(at+e.Column-1, len(text))
	closed := at < len(text) && text[at] == '"'
	opens, before, inside := 0, -2, false // two quotes in a row are one within the text
	for i, c := range text[:at] {
		if c != '"' {
			continue
		}
		if inside = !inside; !inside {
			before = i
		} else if before != i-1 {
			opens = i
		}
	}
	lines, column := position(text, opens)
	from := fmt.Sprintf("the quote that opens on line %d, column %d", line+lines, column)
	if !closed {
		lines, _ = position(text, len(bytes.TrimRight(text, "\r\n")))
		return fmt.Errorf("%s, is not closed by the end of the file, line %d", from, line+lines)
	}
	lines, column = position(text, at)
	return fmt.Errorf(
		"%s, ends on line %d, column %d, in the middle of a field: is one missing before, or is it to be doubled?",
		from, line+lines, column)
}

// limitedReader fails after so many bytes, which are granted for one row at a time.
type limitedReader struct {
	r    io.Reader
	left int64
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, errLongLine
	}
	n, err := l.r.Read(p)
	l.left -= int64(n)
	return n, err
}

// raw returns an item's text as it is in the input.
func (s *Source) raw(it item) ([]byte, error) {
	text := make([]byte, it.size)
	if _, err := s.file.ReadAt(text, it.off); err != nil {
		return nil, fmt.Errorf("reading line %d of the input again: %w", it.line, err)
	}
	return text, nil
}

// request returns the item's request. An error that is not a *lineError means that the input could
// not be read. With a *lineError, the request has the custom_id and the form of the line as far as
// they can be read.
func (s *Source) request(it item) (request, error) {
	r := request{openAI: s.Template != nil && s.Template.openAI}
	if it.bad != nil && s.Template != nil {
		return r, &lineError{it.line, 0, it.bad}
	}
	text, err := s.raw(it)
	if err != nil {
		return r, err
	}
	bad := notUTF8(text, it.line)
	if s.Template != nil {
		var row map[string]json.RawMessage
		if row, err = s.row(text); err == nil {
			if text, err = s.Template.Fill(row); err != nil {
				r.customID = s.Template.customID(row)
			}
		}
	}
	if err == nil {
		r, err = parseRequest(text)
	}
	switch {
	case bad != nil:
		r.customID = bytes.ToValidUTF8(r.customID, []byte("\uFFFD"))
	case it.bad != nil:
		bad = &lineError{it.line, 0, it.bad}
	case err != nil:
		bad = &lineError{it.line, 0, err}
	default:
		return r, nil
	}
	return r, bad
}

// lineError is what is wrong with a line.
type lineError struct {
	line, column int // column 0: the whole line
	err          error
}

func (e *lineError) Error() string {
	if e.column > 0 {
		return fmt.Sprintf("line %d, column %d: %v", e.line, e.column, e.err)
	}
	return fmt.Sprintf("line %d: %v", e.line, e.err)
}

func (e *lineError) Unwrap() error { return e.err }

// row reads the values of a row, as JSON.
func (s *Source) row(text []byte) (map[string]json.RawMessage, error) {
	row := map[string]json.RawMessage{}
	if s.columns == nil {
		if _, err := members(text); err != nil { // it says where the error is
			return nil, err
		}
		if err := json.Unmarshal(text, &row); err != nil {
			return nil, err
		}
		return row, nil
	}
	fields, err := s.csv(bytes.NewReader(text)).Read()
	if err == nil {
		err = s.fit(fields)
	}
	if err != nil {
		return nil, err
	}
	for i, name := range s.columns {
		row[name] = quoted(fields[i])
	}
	return row, nil
}
