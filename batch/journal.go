package batch

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Order is the order of the results.
type Order string

const (
	InputOrder      Order = "input"
	CompletionOrder Order = "completion"
)

// JournalSuffix is appended to the output's name for the journal's.
const JournalSuffix = ".journal"

// compactAt is the size in bytes at which the journal drops what is in the output.
const compactAt = 16 << 20

// journal writes the output and remembers, in a file beside it, what is in it, so that a batch that
// was killed at any moment continues where it stopped. Each result is first appended to the journal
// in one write; only then is it written to the output, at once or when it is its turn. At the start
// both files are cut to what the journal knows, and continued from there.
//
// The first line is a journalHead; each other line is a journalEntry. The last one may be torn.
type journal struct {
	files  files
	perm   fs.FileMode // of new files
	path   string
	file   file
	size   int64
	limit  int64 // when to compact
	source *Source

	name    string // of the output
	out     io.Writer
	output  file      // out, if it is a file that can be continued
	failing io.Writer // where failed requests are written; nil: nowhere
	errs    file      // failing, if it is a file that can be continued
	opened  []file    // output and failing, even if they cannot be continued
	temp    string    // the folder of a temporary journal

	head   journalHead
	beyond map[int]place // done items from head.Next on
	most   int           // the largest size of beyond
}

// journalHead is the state of the output when the journal was begun or compacted.
type journalHead struct {
	Version int    `json:"batch_journal"`
	Input   string `json:"input"`         // the source's hash
	Job     string `json:"job,omitempty"` // the id of what the batch is shared through; "": it is not
	Order   Order  `json:"order"`
	Next    int    `json:"next"` // all items before it are in the output
	Output  int64  `json:"output_bytes"`
	Errors  int64  `json:"errors_bytes"`
	Counts  Counts `json:"counts"`      // of everything that is done
	Collect string `json:"errors_file"` // where failed requests are written; "": nowhere
}

// journalEntry is an item that is done.
type journalEntry struct {
	Index  int             `json:"i"`
	Line   int             `json:"line"`
	Off    int64           `json:"off"`
	Size   int             `json:"size"`
	Failed bool            `json:"failed,omitempty"`
	Bad    bool            `json:"bad,omitempty"`    // its line was invalid
	Counts *Counts         `json:"counts,omitempty"` // absent: the head has them
	Result json.RawMessage `json:"result,omitempty"` // absent: it is in the output
}

// place is where a result is in the journal.
type place struct {
	entry journalEntry // without its counts and result
	off   int64
	size  int // 0: it is in the output
}

// errChanged means that a batch cannot continue.
var errChanged = errors.New("the batch cannot go on")

// openJournal opens the output and its journal, and brings the output to the state that the journal
// knows. An output that is not a regular file is written once, from its start. job is the id of the
// job through which the batch is shared; "": none.
func openJournal(c *Config, job string, limit int64) (*journal, error) {
	j := &journal{
		files: c.files, perm: cmp.Or(c.Perm, 0o666), source: c.Source, limit: limit, beyond: map[int]place{},
	}
	if j.files == nil {
		j.files = disk{}
	}
	j.head = journalHead{Version: 1, Input: c.Source.Hash, Job: job, Order: c.Order, Collect: c.Errors}
	if err := j.open(c); err != nil {
		j.close()
		return nil, err
	}
	return j, nil
}

func (j *journal) open(c *Config) error {
	if err := c.apart(); err != nil {
		return err
	}
	var err error
	if j.name, j.out = "stdout", c.Stdout; c.Output != "-" {
		j.name = c.Output
		if j.out, j.output, err = j.openFile("the output", c.Output); err != nil {
			return err
		}
	}
	if c.Errors != "" {
		if j.failing, j.errs, err = j.openFile("the file for errors", c.Errors); err != nil {
			return err
		}
	}
	if err := c.apart(); err != nil { // on a file system that ignores case
		return err
	}
	if j.output == nil {
		dir, err := os.MkdirTemp("", "ollama-cacheproxy-batch-")
		if err != nil {
			return fmt.Errorf("making a folder for results that wait: %w", err)
		}
		j.temp, j.path = dir, filepath.Join(dir, "results"+JournalSuffix)
		return j.first(c)
	}
	j.path = c.Output + JournalSuffix
	for _, f := range []file{j.output, j.errs} {
		if f == nil {
			continue
		}
		if err := lock(f); err != nil {
			return fmt.Errorf("%s is being written by another batch: %w", f.Name(), err)
		}
	}
	j.files.Remove(j.path + ".new") // of a run that was killed before it was complete
	f, err := j.files.OpenFile(j.path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return j.first(c)
	}
	if err != nil {
		return fileError("opening the journal", j.path, err)
	}
	j.file = f
	return j.replay(c)
}

// openFile opens a file for writing. kept is the same file, or nil if it cannot be continued, such
// as a terminal or a pipe.
func (j *journal) openFile(what, name string) (f io.Writer, kept file, err error) {
	if kept, err = j.files.OpenFile(name, os.O_RDWR|os.O_CREATE, j.perm); err != nil {
		return nil, nil, fileError("opening "+what, name, err)
	}
	j.opened = append(j.opened, kept)
	info, err := kept.Stat()
	switch {
	case err != nil:
		return nil, nil, fileError("opening "+what, name, err)
	case !info.Mode().IsRegular():
		return kept, nil, nil
	}
	return kept, kept, nil
}

// first begins the journal of a new batch.
func (j *journal) first(c *Config) error {
	if unused, err := empty(j.output); err != nil {
		return err
	} else if !unused {
		return fmt.Errorf("%s exists already, and no journal (%s) tells how to go on: "+
			"choose another output, or remove it", c.Output, j.path)
	}
	if unused, err := empty(j.errs); err != nil {
		return err
	} else if !unused {
		return fmt.Errorf("%s exists already: choose another file for errors, or remove it", c.Errors)
	}
	return j.begin()
}

// empty reports whether a file is empty or missing.
func empty(f file) (bool, error) {
	if f == nil {
		return true, nil
	}
	info, err := f.Stat()
	if err != nil {
		return false, fileError("looking at", f.Name(), err)
	}
	return info.Size() == 0, nil
}

// failed says what could not be written, and what to do.
func (j *journal) failed(doing, path string, err error) error {
	err = fileError(doing, path, err)
	if j.temp != "" {
		return err // nothing of it is kept
	}
	return fmt.Errorf("%w; what is done is kept, and the same command goes on", err)
}

// begin starts a journal with everything that is known. The previous one stays until that is on the
// disk under another name: each step is taken only if the one before it has succeeded.
func (j *journal) begin() error {
	const doing = "writing the journal"
	path := j.path + ".new"
	next, err := j.files.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, j.perm)
	if err != nil {
		return j.failed(doing, j.path, err)
	}
	size, moved, err := j.copyTo(next)
	if err == nil {
		err = next.Sync()
	}
	if err == nil {
		err = j.files.Rename(path, j.path)
	}
	if err != nil {
		next.Close()
		j.files.Remove(path) // otherwise the next run does
		return j.failed(doing, j.path, err)
	}
	if j.file != nil {
		j.file.Close() // nothing more is written to it
	}
	j.file, j.size, j.beyond = next, size, moved
	j.limit = max(j.limit, 2*size)
	if err := j.files.SyncFolder(folder(j.path)); err != nil {
		return j.failed(doing, j.path, err)
	}
	return nil
}

// copyTo writes everything that is known, and returns its size and the places of the results that
// wait.
func (j *journal) copyTo(next file) (size int64, moved map[int]place, err error) {
	w := bufio.NewWriter(next)
	head, err := json.Marshal(j.head)
	if err != nil {
		panic(err) // numbers and short texts
	}
	size = int64(len(head)) + 1
	w.Write(append(head, '\n')) // Flush returns the first error
	moved = make(map[int]place, len(j.beyond))
	for index, p := range j.beyond {
		var result []byte
		if p.size > 0 {
			if result, err = j.result(p); err != nil {
				return 0, nil, err
			}
		}
		line, at := appendEntry(nil, p.entry, nil, result)
		if p.size > 0 {
			p.off = size + int64(at)
		}
		moved[index] = p
		size += int64(len(line))
		w.Write(line)
	}
	return size, moved, w.Flush()
}

// appendEntry appends a line of the journal and returns where in it the result begins.
func appendEntry(b []byte, e journalEntry, counts *Counts, result []byte) (line []byte, at int) {
	e.Counts, e.Result = counts, nil
	text, err := json.Marshal(e)
	if err != nil {
		panic(err) // numbers and short texts
	}
	b = append(b, text...)
	if result != nil { // as it is, since Marshal would escape more
		b = append(b[:len(b)-1], `,"result":`...)
		at = len(b)
		b = append(append(b, result...), '}')
	}
	return append(b, '\n'), at
}

// replay reads the journal of an earlier run.
func (j *journal) replay(c *Config) error {
	in := bufio.NewReaderSize(j.file, 256<<10)
	want := j.head
	line, err := in.ReadBytes('\n')
	if err != nil && err != io.EOF {
		return j.failed("reading the journal", j.path, err)
	}
	if err != nil || json.Unmarshal(line, &j.head) != nil || j.head.Version != want.Version {
		return fmt.Errorf("%w: %s is no journal of a batch; remove it and the output to start over", errChanged, j.path)
	}
	if _, err := in.Peek(1); err == io.EOF && j.head.Next == 0 && j.head != want { // nothing was done: the batch has not begun
		unused, err := empty(j.output)
		if err != nil {
			return err
		}
		if unused {
			j.head = want
			return j.first(c)
		}
	}
	if err := j.head.goesOn(want, c.Output, j.path); err != nil {
		return err
	}
	if err := j.cut(j.output, j.head.Output); err != nil {
		return err
	}
	if err := j.cut(j.errs, j.head.Errors); err != nil {
		return err
	}
	j.size = int64(len(line))
	return j.replayEntries(in)
}

// goesOn refuses to continue a batch that was begun with other inputs or options.
func (h *journalHead) goesOn(want journalHead, output, journal string) error {
	switch {
	case h.Input != want.Input:
		return fmt.Errorf("%w: the input or its template is not what it was when %s was begun "+
			"(sha256 %.12s… then, %.12s… now); choose another output, or remove %s and %s to start over",
			errChanged, output, h.Input, want.Input, output, journal)
	case h.Job != want.Job && want.Job != "": // without, an output that was shared is finished alone
		return fmt.Errorf("%w: %s was begun without --workers, or with a job that the Valkey server no longer has. "+
			"Without --workers, the same command finishes it alone; to start over with all workers, remove %s and %s",
			errChanged, output, output, journal)
	case h.Order != want.Order:
		return fmt.Errorf("%w: %s was begun with --order %s", errChanged, output, h.Order)
	case h.Collect != want.Collect:
		return fmt.Errorf("%w: %s was begun with --errors %q", errChanged, output, h.Collect)
	}
	return nil
}

// replayEntries reads what follows the head, and makes the journal continue where that ends.
func (j *journal) replayEntries(in *bufio.Reader) error {
	for {
		line, err := in.ReadBytes('\n')
		if err != nil && err != io.EOF {
			return j.failed("reading the journal", j.path, err)
		}
		var e journalEntry
		if err == io.EOF || json.Unmarshal(line, &e) != nil {
			break // the last line was torn
		}
		p := place{entry: e}
		if e.Counts != nil {
			j.head.Counts.add(*e.Counts)
		}
		if p.size = len(e.Result); p.size > 0 {
			p.off = j.size + int64(len(line)-2-p.size)
		}
		p.entry.Counts, p.entry.Result = nil, nil
		if err := j.settle(p, e.Result); err != nil {
			return err
		}
		j.size += int64(len(line))
	}
	if err := j.file.Truncate(j.size); err != nil {
		return j.failed("cutting the journal", j.path, err)
	}
	if _, err := j.file.Seek(j.size, io.SeekStart); err != nil {
		return j.failed("going on with the journal", j.path, err)
	}
	return nil
}

// cut shortens a file, if it exists, to what is known of it.
func (j *journal) cut(f file, size int64) error {
	if f == nil {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return j.failed("going on with", f.Name(), err)
	}
	if info.Size() < size {
		return fmt.Errorf("%w: %s is shorter than what was written to it; remove it and its journal to start over", errChanged, f.Name())
	}
	if err := f.Truncate(size); err != nil {
		return j.failed("going on with", f.Name(), err)
	}
	if _, err := f.Seek(size, io.SeekStart); err != nil {
		return j.failed("going on with", f.Name(), err)
	}
	return nil
}

// entry returns an item that is done as an entry, without its counts and result.
func (it item) entry(failed bool) journalEntry {
	return journalEntry{Index: it.index, Line: it.line, Off: it.off, Size: it.size, Failed: failed, Bad: it.bad != nil}
}

// add records that an item is done.
func (j *journal) add(it item, failed bool, counts Counts, result []byte) error {
	return j.record(it.entry(failed), counts, result)
}

// record adds an entry, which has neither counts nor a result.
func (j *journal) record(e journalEntry, counts Counts, result []byte) error {
	line, at := appendEntry(nil, e, &counts, result)
	if _, err := j.file.Write(line); err != nil {
		return j.failed("writing the journal", j.path, err)
	}
	p := place{entry: e, off: j.size + int64(at), size: len(result)}
	j.size += int64(len(line))
	j.head.Counts.add(counts)
	if err := j.settle(p, result); err != nil {
		return err
	}
	if j.size > j.limit {
		return j.compact()
	}
	return nil
}

// settle processes an item that the journal has: it writes what can be written.
func (j *journal) settle(p place, result []byte) error {
	if j.head.Order == CompletionOrder && p.size > 0 {
		if err := j.write(p, result); err != nil {
			return err
		}
		p.size = 0
	}
	j.beyond[p.entry.Index] = p
	j.most = max(j.most, len(j.beyond))
	for now := p.entry.Index; ; {
		p, ok := j.beyond[j.head.Next]
		if !ok {
			return nil
		}
		if p.size > 0 {
			if p.entry.Index != now {
				var err error
				if result, err = j.result(p); err != nil {
					return err
				}
			}
			if err := j.write(p, result); err != nil {
				return err
			}
		}
		delete(j.beyond, j.head.Next)
		j.head.Next++
	}
}

func (j *journal) result(p place) ([]byte, error) {
	text := make([]byte, p.size)
	if _, err := j.file.ReadAt(text, p.off); err != nil {
		return nil, j.failed("reading the journal", j.path, err)
	}
	return text, nil
}

// write writes a result to the output, and the request of a failed one to the file for errors.
func (j *journal) write(p place, result []byte) error {
	n, err := j.out.Write(append(bytes.Clone(result), '\n'))
	if err != nil {
		return j.failed("writing the output", j.name, err)
	}
	j.head.Output += int64(n)
	if !p.entry.Failed || j.failing == nil {
		return nil
	}
	text, err := j.again(p.entry)
	if err != nil {
		return err
	}
	n, err = j.failing.Write(append(text, '\n'))
	if err != nil {
		return j.failed("writing the file for errors", j.head.Collect, err)
	}
	j.head.Errors += int64(n)
	return nil
}

// again returns the line with which an item can be sent again: an invalid line is returned as it
// is.
func (j *journal) again(e journalEntry) ([]byte, error) {
	it := item{index: e.Index, line: e.Line, off: e.Off, size: e.Size}
	text, err := j.source.raw(it)
	if err != nil {
		return nil, err
	}
	if e.Bad {
		return bytes.TrimSpace(text), nil
	}
	r, err := j.source.request(it)
	if err != nil {
		return bytes.TrimSpace(text), nil
	}
	if line := r.again(e.Line); line != nil {
		return line, nil
	}
	if j.source.Template == nil {
		return bytes.TrimSpace(text), nil
	}
	row, err := j.source.row(text)
	if err != nil {
		return nil, err
	}
	return j.source.Template.Fill(row)
}

// done reports whether an item is done.
func (j *journal) done(index int) bool {
	_, beyond := j.beyond[index]
	return beyond || index < j.head.Next
}

// compact begins the journal anew, without what is in the output.
func (j *journal) compact() error {
	for _, f := range []file{j.output, j.errs} {
		if f == nil {
			continue
		}
		// Before the journal says that it is there.
		if err := f.Sync(); err != nil {
			return j.failed("writing", f.Name(), err)
		}
		if err := j.files.SyncFolder(folder(f.Name())); err != nil {
			return j.failed("writing the folder of", f.Name(), err)
		}
	}
	return j.begin()
}

// close closes the files: what is worth keeping was synced. The journal of an output that cannot be
// continued is removed.
func (j *journal) close() {
	for _, f := range append(j.opened, j.file) {
		if f != nil {
			f.Close()
		}
	}
	if j.temp != "" {
		os.RemoveAll(j.temp)
	}
}

// Counts are sums over requests. The zero value counts none.
type Counts struct {
	Answers   int `json:"answers,omitempty"`
	Failed    int `json:"failed,omitempty"`
	Prompt    int `json:"prompt,omitempty"`    // tokens of prompts
	ReusedOf  int `json:"reused_of,omitempty"` // of these, tokens in answers that report the reuse
	Reused    int `json:"reused,omitempty"`    // of these, reused tokens
	Generated int `json:"generated,omitempty"` // tokens of answers
	Text      int `json:"text,omitempty"`      // bytes of text of answered prompts
	Truncated int `json:"truncated,omitempty"` // prompts that were probably cut
	Loads     int `json:"loads,omitempty"`     // of models that requests waited for
	Simulated int `json:"simulated,omitempty"` // answers of a simulated server

	// Times as Ollama's own endpoints report them.
	Total      time.Duration `json:"total,omitempty"`
	Load       time.Duration `json:"load,omitempty"`
	PromptEval time.Duration `json:"prompt_eval,omitempty"`
	Eval       time.Duration `json:"eval,omitempty"`
}

func (c *Counts) add(d Counts) {
	c.Answers += d.Answers
	c.Failed += d.Failed
	c.Prompt += d.Prompt
	c.ReusedOf += d.ReusedOf
	c.Reused += d.Reused
	c.Generated += d.Generated
	c.Text += d.Text
	c.Simulated += d.Simulated
	c.Truncated += d.Truncated
	c.Loads += d.Loads
	c.Total += d.Total
	c.Load += d.Load
	c.PromptEval += d.PromptEval
	c.Eval += d.Eval
}
