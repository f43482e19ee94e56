package batches

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// result is a line of the output, as package batch writes it and as OpenAI has it.
type result struct {
	ID       string          `json:"id"`
	CustomID json.RawMessage `json:"custom_id"`
	Response *response       `json:"response"`
	Error    *resultError    `json:"error"`
}

type response struct {
	Status    int             `json:"status_code"`
	RequestID string          `json:"request_id"`
	Body      json.RawMessage `json:"body"`
}

type resultError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// idPrefix is that of a result's id, before the number of its line.
const idPrefix = "batch_req_"

// spot is where a result is among those that package batch has written.
type spot struct {
	line int
	off  int64
	size int
}

// unsent says why a request of a batch that ended like this was not sent, or not answered.
var unsent = map[status]resultError{
	cancelled: {"batch_cancelled", "This request was not answered before the batch was cancelled."},
	expired: {"batch_expired", "This request could not be executed before the completion window " +
		"expired."},
	failed: {"batch_failed", "This request was not answered before the batch failed."},
}

// finalize makes the output files of a batch whose outcome is decided, in the order of its input,
// and ends it. After a crash it is called again, and makes the same files.
func (s *Service) finalize(ctx context.Context, j *job) error {
	s.mu.Lock()
	counts, outcome, began := j.RequestCounts, j.Outcome, j.InProgressAt != nil
	s.mu.Unlock()
	folder := s.path(batchesFolder, j.ID)
	var output, errs *file
	if began {
		var err error
		if output, errs, counts, err = s.divide(ctx, j, outcome, counts.Total); err != nil {
			return fmt.Errorf("writing the output files: %w", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids [2]*string
	for i, f := range []*file{output, errs} {
		if f == nil {
			continue
		}
		if err := s.addFile(f); err != nil {
			return err
		}
		ids[i] = &f.ID
	}
	if err := s.end(j, counts, ids[0], ids[1]); err != nil {
		return err
	}
	s.Log.Info("a batch has ended", "batch", j.ID, "status", j.Status, "requests", counts.Total,
		"completed", counts.Completed, "failed", counts.Failed)
	delete(s.working, j.ID)
	if err := os.RemoveAll(folder); err != nil {
		s.Log.Warn("a batch's working folder cannot be removed; the next start does",
			"batch", j.ID, "err", err)
	}
	return nil
}

// divide writes the results of a batch to its output file, and what failed to its error file.
// Either is nil if it would be empty.
func (s *Service) divide(
	ctx context.Context, j *job, outcome status, total int,
) (output, errs *file, counts requestCounts, err error) {
	d := &divider{s: s, job: j, outcome: outcome}
	defer d.close()
	d.counts.Total = total
	if err := d.index(ctx); err != nil {
		return nil, nil, counts, err
	}
	if err := d.lines(ctx); err != nil {
		return nil, nil, counts, err
	}
	if output, err = d.output.file(d, "output"); err != nil {
		return nil, nil, counts, err
	}
	errs, err = d.errors.file(d, "error")
	return output, errs, d.counts, err
}

// divider divides results.
type divider struct {
	s       *Service
	job     *job
	outcome status
	results *os.File // nil: there are none
	spots   map[int]spot
	counts  requestCounts
	output  part
	errors  part
}

// index finds the results of all lines. The last one may be torn.
func (d *divider) index(ctx context.Context) error {
	d.spots = map[int]spot{}
	f, err := os.Open(d.s.path(batchesFolder, d.job.ID, resultsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	d.results = f
	in := bufio.NewReaderSize(f, 256<<10)
	for off := int64(0); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		text, err := in.ReadBytes('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		// The id comes first.
		after, found := bytes.CutPrefix(text, []byte(`{"id":"`+idPrefix))
		number, _, ended := bytes.Cut(after, []byte(`"`))
		n, err := strconv.Atoi(string(number))
		if !found || !ended || err != nil {
			return fmt.Errorf("%s has a line that is no result at byte %d", f.Name(), off)
		}
		d.spots[n] = spot{n, off, len(text)}
		off += int64(len(text))
	}
}

// lines writes the results of all lines of the input, or, if that is gone, those that there are.
func (d *divider) lines(ctx context.Context) error {
	input, err := os.Open(d.s.path(filesFolder, d.job.InputFileID+dataSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		for _, number := range slices.Sorted(maps.Keys(d.spots)) {
			if err := d.line(number, nil); err != nil {
				return err
			}
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer input.Close()
	var failure error
	err = eachLine(ctx, input, func(number int, text []byte) {
		if failure == nil {
			failure = d.line(number, text)
		}
	})
	return cmp.Or(failure, err)
}

// line writes the result of a line of the input.
func (d *divider) line(number int, text []byte) error {
	r := result{}
	at, done := d.spots[number]
	if done {
		raw := make([]byte, at.size)
		if _, err := d.results.ReadAt(raw, at.off); err != nil {
			return err
		}
		if err := json.Unmarshal(raw, &r); err != nil {
			return fmt.Errorf("the result of line %d: %w", number, err)
		}
	} else {
		var l line
		if err := json.Unmarshal(text, &l); err != nil {
			return fmt.Errorf("line %d of the input: %w", number, err)
		}
		why := unsent[d.outcome]
		r.CustomID, r.Error = l.CustomID, &why
	}
	suffix := fmt.Sprintf("%s_%d", strings.TrimPrefix(d.job.ID, "batch_"), number)
	r.ID = idPrefix + suffix
	if r.Response != nil {
		r.Response.RequestID = "req_" + suffix
	}
	to := &d.errors
	switch {
	case r.Response != nil && r.Response.Status == http.StatusOK && r.Error == nil:
		d.counts.Completed++
		to = &d.output
	case done:
		d.counts.Failed++
	}
	if r.Response != nil {
		r.Error = nil // OpenAI has an error only where there is no answer
	}
	return to.write(d, to == &d.output, r)
}

// part is one of the two files that a divider writes.
type part struct {
	id   string
	to   *os.File
	out  *bufio.Writer
	json *json.Encoder
	n    int64
}

func (p *part) Write(b []byte) (int, error) {
	n, err := p.out.Write(b)
	p.n += int64(n)
	return n, err
}

// write writes a result, to a file that is made for the first one. The file's name follows from the
// batch's, so that it is the same after a crash.
func (p *part) write(d *divider, isOutput bool, r result) (err error) {
	if p.to == nil {
		kind := "e"
		if isOutput {
			kind = "o"
		}
		p.id = "file-" + kind + strings.TrimPrefix(d.job.ID, "batch_")
		path := d.s.path(filesFolder, p.id+dataSuffix)
		if p.to, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return err
		}
		p.out = bufio.NewWriterSize(p.to, 64<<10)
		p.json = json.NewEncoder(p)
		p.json.SetEscapeHTML(false)
	}
	return p.json.Encode(r)
}

// file completes the file and describes it; nil if there is none.
func (p *part) file(d *divider, kind string) (*file, error) {
	if p.to == nil {
		return nil, nil
	}
	if err := cmp.Or(p.out.Flush(), p.to.Sync()); err != nil {
		return nil, err
	}
	now := time.Now().Unix()
	return &file{Owner: d.job.Owner, fileObject: fileObject{
		ID: p.id, Object: "file", Bytes: p.n, CreatedAt: now, Purpose: purposeOutput, Status: "processed",
		ExpiresAt: expires(int64(d.s.TTL/time.Second), d.job.OutputKept, now),
		Filename:  fmt.Sprintf("%s_%s.jsonl", d.job.ID, kind),
	}}, nil
}

func (d *divider) close() {
	for _, f := range []*os.File{d.results, d.output.to, d.errors.to} {
		if f != nil {
			f.Close()
		}
	}
}
