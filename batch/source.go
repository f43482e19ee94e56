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

var utf8BOM = []byte("\xef\xbb\xbf")

var errLongLine = fmt.Errorf("longer than %d MiB", maxLine>>20)

// Source is the input: requests, or rows that fill a template. It is read in order, and item by item once more when a request is
// sent, so that nothing of it is held in memory.
type Source struct {
	// Hash is a fingerprint of the input and of the template.
	Hash     string
	Template *Template // nil: each line is a request

	file    *os.File
	spooled bool     // a copy, which is removed on Close
	columns []string // of a CSV file; nil: a JSON object a line
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
	bad   error // why it cannot be read; nil: it may be
}

// OpenLines opens requests, one a line. "-" is stdin, which is copied to a file first, beside no other input.
func OpenLines(path string, stdin io.Reader) (*Source, error) { return open(path, stdin, nil) }

// OpenRows opens rows for a template: a .csv or .tsv file whose first line names the columns, or else a JSON object a line.
func OpenRows(path string, stdin io.Reader, t *Template) (*Source, error) {
	return open(path, stdin, t)
}

func open(path string, stdin io.Reader, t *Template) (*Source, error) {
	s := &Source{Template: t, line: 1}
	var err error
	if path == "-" {
		err = s.spool(stdin)
	} else {
		s.file, err = os.Open(path)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("opening the input: %w", err)
	}
	if info, e := s.file.Stat(); e == nil && path != "-" && !info.Mode().IsRegular() { // a pipe
		pipe := s.file
		err = s.spool(pipe)
		pipe.Close()
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

// spool copies what can be read only once.
func (s *Source) spool(r io.Reader) error {
	f, err := os.CreateTemp("", "ollama-cacheproxy-batch-")
	if err != nil {
		return err
	}
	s.file, s.spooled = f, true
	if _, err := io.Copy(f, r); err != nil {
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

// begin reads what comes before the first item, and the whole for its hash.
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
	if head = head[:got]; bytes.HasPrefix(head, utf8BOM) {
		s.start = 3
	} else if bytes.HasPrefix(head, []byte("\xff\xfe")) || bytes.HasPrefix(head, []byte("\xfe\xff")) {
		return errors.New("it is UTF-16: save it as UTF-8")
	}
	if s.Template == nil || extension != ".csv" && extension != ".tsv" {
		return nil
	}
	s.comma = ','
	if extension == ".tsv" {
		s.comma = '\t'
	}
	limited := &limitedReader{r: s.section(s.start, s.size-s.start), left: maxLine}
	r := s.csv(limited)
	columns, err := r.Read()
	if err != nil {
		return fmt.Errorf("the line that names the columns: %w", err)
	}
	s.columns = slices.Clone(columns)
	for i, name := range s.columns {
		s.columns[i] = strings.TrimSpace(name)
		if slices.Contains(s.columns[:i], s.columns[i]) {
			return fmt.Errorf("two columns are called %q", s.columns[i])
		}
	}
	for _, field := range s.Template.Fields {
		if !slices.Contains(s.columns, field) {
			return fmt.Errorf("no column is called %q, as the template's {{%s}} wants; there are: %s", field, field, strings.Join(s.columns, ", "))
		}
	}
	head = make([]byte, r.InputOffset())
	if _, err := s.file.ReadAt(head, s.start); err != nil {
		return err
	}
	s.start += int64(len(head))
	s.line += bytes.Count(head, []byte("\n"))
	return nil
}

func (s *Source) section(off, n int64) io.Reader { return io.NewSectionReader(s.file, off, n) }

func (s *Source) csv(r io.Reader) *csv.Reader {
	c := csv.NewReader(r)
	c.Comma, c.ReuseRecord = s.comma, true
	c.FieldsPerRecord = len(s.columns)
	return c
}

// items returns the items and the text of each, which is valid until the next. An error ends them.
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

// skipLine reads a line, its end included, and tells how many bytes it has. At the end of the input err is io.EOF.
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
		_, err := r.Read()
		if err == io.EOF {
			return
		}
		var malformed *csv.ParseError
		end := s.start + r.InputOffset()
		it := next
		if err != nil && !errors.As(err, &malformed) {
			yield(item{}, fmt.Errorf("line %d: %w (is a quote not closed?)", it.line, err))
			return
		}
		if malformed != nil {
			it.line = s.line - 1 + malformed.StartLine
		} else {
			at, _ := r.FieldPos(0)
			it.line = s.line - 1 + at
		}
		it.size = int(end - it.off)
		if malformed != nil {
			it.bad = rowError(malformed.Err, s.columns)
		}
		if !yield(it, nil) {
			return
		}
		next.index++
		next.off = end
	}
}

func rowError(err error, columns []string) error {
	if errors.Is(err, csv.ErrFieldCount) {
		return fmt.Errorf("the row has not the %d columns that the first line names", len(columns))
	}
	return err
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

// raw returns an item's text as the input has it.
func (s *Source) raw(it item) ([]byte, error) {
	text := make([]byte, it.size)
	if _, err := s.file.ReadAt(text, it.off); err != nil {
		return nil, fmt.Errorf("reading line %d of the input again: %w", it.line, err)
	}
	return text, nil
}

// request returns the item's request. An error that is no *lineError says that the input could not be read.
func (s *Source) request(it item) (request, error) {
	if it.bad != nil {
		return request{}, &lineError{it.line, it.bad}
	}
	text, err := s.raw(it)
	if err != nil {
		return request{}, err
	}
	if s.Template != nil {
		row, err := s.row(text)
		if err == nil {
			text, err = s.Template.Fill(row)
		}
		if err != nil {
			return request{}, &lineError{it.line, err}
		}
	}
	r, err := parseRequest(text)
	if err != nil {
		return request{}, &lineError{it.line, err}
	}
	return r, nil
}

// lineError says what is wrong with a line.
type lineError struct {
	line int
	err  error
}

func (e *lineError) Error() string { return fmt.Sprintf("line %d: %v", e.line, e.err) }
func (e *lineError) Unwrap() error { return e.err }

// row reads the values of a row, as JSON.
func (s *Source) row(text []byte) (map[string]json.RawMessage, error) {
	row := map[string]json.RawMessage{}
	if s.columns == nil {
		if _, err := members(text); err != nil { // says where it is wrong
			return nil, err
		}
		if err := json.Unmarshal(text, &row); err != nil {
			return nil, err
		}
		return row, nil
	}
	fields, err := s.csv(bytes.NewReader(text)).Read()
	var malformed *csv.ParseError
	if errors.As(err, &malformed) {
		err = malformed.Err
	}
	if err != nil {
		return nil, err
	}
	for i, name := range s.columns {
		row[name] = quoted(fields[i])
	}
	return row, nil
}
