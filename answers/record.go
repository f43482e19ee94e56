package answers

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/http"
	"time"
)

// Record is a kept answer, as it was sent.
type Record struct {
	Head
	// Marks are where the parts of a stream ended, and when; empty for a whole answer.
	Marks []Mark
	Body  []byte
}

// Head is what a Record says about its answer.
type Head struct {
	Status int         `json:"s"`
	Header http.Header `json:"h,omitempty"`
	Sized  bool        `json:"z,omitempty"` // it had a Content-Length

	Cost      time.Duration `json:"c,omitempty"` // from when it was sent to Ollama until its end
	Prompt    int           `json:"p,omitempty"` // tokens of the prompt; 0: unknown
	Evaluated int           `json:"e,omitempty"` // … of these, evaluated rather than reused
	Generated int           `json:"g,omitempty"` // tokens
}

// recordVersion begins the encoding of a Record. Another first byte is another encoding.
const recordVersion = 1

var errRecord = errors.New("the entry is no recorded answer, or is torn")

// Encode returns the record as bytes: its version, its head as JSON, its marks and its body, with
// lengths before each as varints.
func (r *Record) Encode() []byte {
	head, err := json.Marshal(r.Head)
	if err != nil {
		panic(err) // a head always marshals
	}
	text := make([]byte, 0, 1+len(head)+len(r.Body)+4*len(r.Marks)+4*binary.MaxVarintLen64)
	text = append(text, recordVersion)
	text = binary.AppendUvarint(text, uint64(len(head)))
	text = append(text, head...)
	text = binary.AppendUvarint(text, uint64(len(r.Marks)))
	last := Mark{}
	for _, m := range r.Marks {
		text = binary.AppendUvarint(text, uint64(m.End-last.End))
		text = binary.AppendUvarint(text, uint64((m.At-last.At)/time.Microsecond))
		last = Mark{m.End, last.At + (m.At-last.At)/time.Microsecond*time.Microsecond}
	}
	text = binary.AppendUvarint(text, uint64(len(r.Body)))
	return append(text, r.Body...)
}

// DecodeRecord reads what Encode wrote. The record's body is part of data.
func DecodeRecord(data []byte) (Record, error) {
	var r Record
	if len(data) == 0 || data[0] != recordVersion {
		return r, errRecord
	}
	d := decoder{data[1:], true}
	if err := json.Unmarshal(d.bytes(), &r.Head); err != nil {
		return r, errRecord
	}
	n := d.number()
	if n > uint64(len(d.left)) { // a mark has two bytes at least
		return r, errRecord
	}
	if n > 0 {
		r.Marks = make([]Mark, 0, n)
	}
	last := Mark{}
	for range n {
		last.End += int(d.number())
		last.At += time.Duration(d.number()) * time.Microsecond
		r.Marks = append(r.Marks, last)
	}
	r.Body = d.bytes()
	for i, m := range r.Marks {
		if m.End < 0 || m.End > len(r.Body) || m.At < 0 || i > 0 && m.End < r.Marks[i-1].End {
			return r, errRecord
		}
	}
	if !d.ok || len(d.left) > 0 {
		return r, errRecord
	}
	return r, nil
}

// decoder reads varints and strings with their lengths.
type decoder struct {
	left []byte
	ok   bool
}

func (d *decoder) number() uint64 {
	n, size := binary.Uvarint(d.left)
	if size <= 0 {
		d.left, d.ok = nil, false
		return 0
	}
	d.left = d.left[size:]
	return n
}

func (d *decoder) bytes() []byte {
	n := d.number()
	if n > uint64(len(d.left)) {
		d.left, d.ok = nil, false
		return nil
	}
	text := d.left[:n:n]
	d.left = d.left[n:]
	return text
}
