package batch

import (
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/outage"
)

// TestEndureAnswered: a call that fails while others are answered does not end the batch.
func TestEndureAnswered(t *testing.T) {
	j := &job{patience: time.Hour, away: outage.Outage{Log: slog.New(slog.DiscardHandler)}}
	const calls = 20_000
	var all sync.WaitGroup
	all.Go(func() {
		for range calls {
			j.away.Success()
		}
	})
	all.Go(func() {
		for range calls {
			if err := j.endure(&j.away, errValkeyAway, errors.New("no answer")); err != nil {
				t.Errorf("within the hour that the server is waited for: %v", err)
				return
			}
		}
	})
	all.Wait()
}

// FuzzSpan: whatever the server has, items are within the input, and what was written is read again.
func FuzzSpan(f *testing.F) {
	f.Add(`[{"i":0,"l":1,"o":0,"s":10,"t":4},{"i":2,"l":7,"o":90,"s":10,"bad":"line 7: no"}]`)
	f.Add(`[{"i":0,"l":1,"o":9223372036854775807,"s":1}]`)
	f.Add(`[{"i":-1,"l":0,"o":-1,"s":-1}]`)
	f.Add(`null`)
	f.Fuzz(func(t *testing.T, text string) {
		const total, size = 3, 100
		items, err := decodeSpan(text, total, size)
		if err != nil {
			return
		}
		for _, it := range items {
			if it.index < 0 || it.index >= total || it.line < 1 || it.off < 0 || it.size < 0 || it.off+int64(it.size) > size {
				t.Errorf("%+v", it)
			}
		}
		again, err := decodeSpan(encodeSpan(items), total, size)
		same := func(a, b item) bool {
			if (a.bad == nil) != (b.bad == nil) || a.bad != nil && a.bad.Error() != b.bad.Error() {
				return false
			}
			a.bad, b.bad = nil, nil
			return a == b
		}
		if err != nil || !slices.EqualFunc(items, again, same) {
			t.Errorf("%+v, %v; want %+v", again, err, items)
		}
	})
}

// FuzzAnswer: whatever the server has, an answer is of an item within the input, and one line.
func FuzzAnswer(f *testing.F) {
	line, _ := appendEntry(nil, item{index: 1, line: 2, off: 10, size: 5}.entry(true), &Counts{Failed: 1}, []byte(`{"line":2,"error":{}}`))
	f.Add("7-0", strings.TrimSpace(string(line)))
	f.Add("7-1", strings.TrimSpace(string(line)))
	f.Add("x", "{}")
	f.Add("1-0", `{"i":1,"line":1,"off":0,"size":1,"counts":{},"result":{"a":`+"\n"+`1}}`)
	f.Fuzz(func(t *testing.T, id, value string) {
		const total, size = 3, 100
		n, e, err := decodeAnswer(entry{id, value}, total, size)
		if err != nil {
			return
		}
		if n < 1 || !within(e.Index, e.Line, e.Off, e.Size, total, size) || !json.Valid(e.Result) || e.Counts == nil ||
			strings.Contains(string(e.Result), "\n") {
			t.Errorf("%d, %+v", n, e)
		}
	})
}

// FuzzJob: the hashes of a job are read, whatever is in them.
func FuzzJob(f *testing.F) {
	f.Add("0123456789abcdef", "input", "10000", "1", "20", "5", "1700000000000 7 1")
	f.Add("", "", "0", "-1", "x", "99999999999999999999", "")
	f.Fuzz(func(t *testing.T, id, input, window, planned, count, dropped, worker string) {
		h, err := parseJob([]string{id, input, window, planned, count, dropped})
		if err == nil && (h.id != id || h.input != input || h.window < 1 || h.planned < 0 || h.dropped < 0 || h.dropped > h.count) {
			t.Errorf("%+v", h)
		}
		s := JobStatus{Workers: map[string]time.Duration{}}
		err = s.read(map[string]string{"count": count, "dropped": dropped, "bytes": window, "dropped_bytes": planned, "begun": "1700000000"},
			map[string]string{"a": worker}, time.Unix(1700000000, 0))
		if err == nil && (s.Answered < 0 || s.Dropped < 0 || s.Held < 0 || s.Workers["a"] < 0) {
			t.Errorf("%+v", s)
		}
	})
}
