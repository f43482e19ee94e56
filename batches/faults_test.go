package batches

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestPanic: a handler that panics costs its request, and not the process.
func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		r.fake.hook = func(_ http.ResponseWriter, _ *http.Request, text string) bool {
			if text == "prompt 3" {
				panic("a fault in the proxy")
			}
			return false
		}
		id := r.create("", r.upload("", chats(10)), "/v1/chat/completions", "24h")
		b := r.settled("", id, "completed")
		if got := counts(b); got != "completed 10 9 1" {
			t.Error(got)
		}
		bad := r.lines("", b, "error_file_id")
		if len(bad) != 1 || string(bad[0].CustomID) != `"c-3"` || bad[0].Error.Code != "broken" {
			t.Errorf("%+v", bad)
		}
	})
}

// endless is an input that does not end.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, strings.Repeat(chat("c", "p", "m"), 1+len(p)/100))
	e.read += n
	return n, nil
}

// TestStopReading: neither a cancellation nor a stop of the process waits for a long input.
func TestStopReading(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	from := &endless{}
	stopped := io.MultiReader(io.LimitReader(from, 1<<20), readerFunc(func([]byte) (int, error) {
		cancel(errOver)
		return 0, nil
	}), from)
	if _, err := readInput(ctx, stopped, "/v1/chat/completions"); !errors.Is(err, errOver) {
		t.Error(err)
	}
	if from.read > 2<<20 {
		t.Errorf("%d bytes were read", from.read)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) {
	n, _ := f(p)
	return n, io.EOF
}

// TestTooManyLines: lines beyond the limit are counted, and cost no memory.
func TestTooManyLines(t *testing.T) {
	var b strings.Builder
	for range 2 * MaxRequests {
		b.WriteString("{}\n")
	}
	in, err := readInput(t.Context(), strings.NewReader(b.String()), "/v1/chat/completions")
	if err != nil {
		t.Fatal(err)
	}
	if in.requests != 2*MaxRequests || len(in.errors) != maxErrors {
		t.Errorf("%d requests, %d errors", in.requests, len(in.errors))
	}
}

// TestRestsQuietly: a batch that rests for hours says so now and then, not every ten seconds.
func TestRestsQuietly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := newRig(t, func(c *Config) {
			c.Bytes, c.Log = 10_000, slog.New(slog.NewTextHandler(&log, nil))
		})
		input := r.upload("", chats(10))
		r.upload("", strings.Repeat("x", 10_000-len(chats(10))))
		r.create("", input, "/v1/chat/completions", "24h")
		time.Sleep(3*time.Hour + time.Minute)
		r.close()
		if n := strings.Count(log.String(), "a batch rests"); n != 4 {
			t.Errorf("%d lines in three hours, want one at first and one each hour:\n%.2000s", n, log.String())
		}
	})
}

// TestStored: the sum of all files is kept up, also where an output is written again, and over a
// restart.
func TestStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		sum := func() (n int64) {
			paths, err := filepath.Glob(r.path(filesFolder, "*"+dataSuffix))
			if err != nil {
				t.Fatal(err)
			}
			for _, path := range paths {
				info, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				n += info.Size()
			}
			return n
		}
		check := func(when string) {
			t.Helper()
			r.mu.Lock()
			defer r.mu.Unlock()
			if got, want := r.used(), sum(); got != want || want == 0 {
				t.Errorf("%s: %d bytes, want %d", when, got, want)
			}
		}
		input := r.upload("", chats(10))
		check("uploaded")
		b := r.settled("", r.create("", input, "/v1/chat/completions", "24h"), "completed")
		check("completed")
		r.mu.Lock()
		output := *r.files[b["output_file_id"].(string)]
		if err := r.addFile(&output); err != nil {
			t.Error(err)
		}
		r.mu.Unlock()
		check("added again")
		r.close()
		r.open()
		defer r.close()
		check("opened again")
		if status, _, raw := r.ask("", "DELETE", "/v1/files/"+input, nil, ""); status != 200 {
			t.Error(status, raw)
		}
		check("deleted")
	})
}

// TestLongForm: what a form has beside the file is bounded, too.
func TestLongForm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		const head = "--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n"
		from := io.MultiReader(strings.NewReader(head), io.LimitReader(&endless{}, 2*MaxFile))
		count := &countingReader{from: from}
		status, answer, raw := r.ask("", "POST", "/v1/files", count, "multipart/form-data; boundary=x")
		if e, ok := answer["error"].(map[string]any); status != 413 || !ok || e["code"] != "file_too_large" {
			t.Error(status, raw)
		}
		if count.n > MaxFile+2*maxForm {
			t.Errorf("%d bytes were read", count.n)
		}
	})
}

type countingReader struct {
	from io.Reader
	n    int
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.from.Read(p)
	c.n += n
	return n, err
}

// TestFolderRemoved: what comes after the folder was removed is refused, with what to do.
func TestFolderRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		defer r.close()
		input := r.upload("", chats(1))
		if err := os.RemoveAll(r.Dir); err != nil {
			t.Fatal(err)
		}
		body, kind := uploadForm(map[string]string{"purpose": "batch"}, "x")
		create := strings.NewReader(`{"input_file_id":"` + input +
			`","endpoint":"/v1/chat/completions","completion_window":"24h"}`)
		for path, send := range map[string]struct {
			body io.Reader
			kind string
		}{"/v1/files": {body, kind}, "/v1/batches": {create, ""}} {
			status, answer, raw := r.ask("", "POST", path, send.body, send.kind)
			e, ok := answer["error"].(map[string]any)
			if status != 500 || !ok || e["code"] != "storage_removed" {
				t.Error(path, status, raw)
			}
		}
		if status, _, raw := r.ask("", "GET", "/v1/files/"+input+"/content", nil, ""); status != 404 {
			t.Error(status, raw)
		}
	})
}
