package answers

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// readAll reads what a listener gets until its end.
func readAll(ctx context.Context, l *Listener) (string, error) {
	var text strings.Builder
	for {
		part, err := l.Next(ctx)
		if err != nil {
			return text.String(), err
		}
		text.Write(part)
	}
}

// TestFlight has listeners that come at different times; each reads the whole answer.
func TestFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := NewFlight(0, func(error) { t.Error("it was cancelled") })
		var wg sync.WaitGroup
		listen := func() {
			l := f.Listen()
			wg.Go(func() {
				defer l.Close(nil)
				status, header, err := l.Header(t.Context())
				if status != http.StatusTeapot || header.Get("Content-Type") != "text/x" || err != nil {
					t.Errorf("header: %d %v %v", status, header, err)
				}
				if text, err := readAll(t.Context(), l); text != "one two three" || err != io.EOF {
					t.Errorf("got %q, %v", text, err)
				}
			})
		}
		listen()
		synctest.Wait()
		f.Header().Set("Content-Type", "text/x")
		f.WriteHeader(http.StatusEarlyHints) // not passed on
		f.WriteHeader(http.StatusTeapot)
		f.Header().Set("Content-Type", "too late")
		for _, part := range []string{"one ", "two ", "three"} {
			time.Sleep(time.Second)
			io.WriteString(f, part)
			listen()
			synctest.Wait()
		}
		f.End(nil)
		f.End(errors.New("too late"))
		listen()
		wg.Wait()
		status, body, marks, whole := f.Recorded()
		if status != http.StatusTeapot || string(body) != "one two three" || !whole {
			t.Errorf("recorded: %d %q %v", status, body, whole)
		}
		want := []Mark{{4, time.Second}, {8, 2 * time.Second}, {13, 3 * time.Second}}
		for i, m := range marks {
			if m != want[i] {
				t.Errorf("mark %d is %v, want %v", i, m, want[i])
			}
		}
	})
}

// TestFlightLeft has two listeners leave: only the last one ends the computation.
func TestFlightLeft(t *testing.T) {
	var causes []error
	f := NewFlight(0, func(err error) { causes = append(causes, err) })
	one, two := f.Listen(), f.Listen()
	one.Close(nil)
	one.Close(nil)
	if causes != nil {
		t.Fatalf("cancelled by the first that left: %v", causes)
	}
	mine := errors.New("drained")
	two.Close(mine)
	if len(causes) != 1 || causes[0] != mine {
		t.Errorf("cancelled with %v, want %v", causes, mine)
	}
	if f.Listen() != nil {
		t.Error("one can listen to a computation that was cancelled")
	}
	f.Write([]byte("the rest")) // does not block

	kept := NewFlight(0, func(err error) { t.Errorf("what is kept was cancelled: %v", err) })
	kept.Keep()
	kept.Listen().Close(nil)
	kept.Write([]byte("text"))
	kept.End(nil)
	if text, err := readAll(t.Context(), kept.Listen()); text != "text" || err != io.EOF {
		t.Errorf("got %q, %v", text, err)
	}
}

// TestFlightBroken ends an answer in its middle, and one before it began.
func TestFlightBroken(t *testing.T) {
	broken := errors.New("broken")
	f := NewFlight(0, func(error) {})
	l := f.Listen()
	defer l.Close(nil)
	f.Write([]byte("half"))
	f.End(broken)
	if text, err := readAll(t.Context(), l); text != "half" || err != broken {
		t.Errorf("got %q, %v", text, err)
	}
	if _, _, _, whole := f.Recorded(); whole {
		t.Error("a broken answer was recorded")
	}
	for _, end := range []struct{ with, want error }{{broken, broken}, {nil, io.ErrUnexpectedEOF}} {
		f = NewFlight(0, func(error) {})
		l := f.Listen()
		f.End(end.with)
		if _, _, err := l.Header(t.Context()); err != end.want {
			t.Errorf("header: %v, want %v", err, end.want)
		}
		l.Close(nil)
	}
	// A client that leaves waits for nothing.
	f = NewFlight(0, func(error) {})
	l = f.Listen()
	defer l.Close(nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(broken)
	if _, _, err := l.Header(ctx); err != broken {
		t.Errorf("header: %v", err)
	}
	if _, err := l.Next(ctx); err != broken {
		t.Errorf("next: %v", err)
	}
}

// TestFlightBeats passes heartbeats to those who wait, and records none.
func TestFlightBeats(t *testing.T) {
	f := NewFlight(0, func(error) {})
	l := f.Listen()
	defer l.Close(nil)
	f.WriteHeader(http.StatusOK)
	f.Beat(": waiting\n\n")
	if part, _ := l.Next(t.Context()); string(part) != ": waiting\n\n" {
		t.Errorf("got %q instead of a heartbeat", part)
	}
	f.Beat(": again\n\n")
	f.Write([]byte("text"))
	f.End(nil)
	if text, err := readAll(t.Context(), l); text != "text" || err != io.EOF {
		t.Errorf("got %q, %v", text, err)
	}
	if _, body, _, _ := f.Recorded(); string(body) != "text" {
		t.Errorf("recorded %q", body)
	}
}

// TestFlightLong has an answer that is longer than the limit: one listener makes the computation
// wait, of two the one that reads nothing is ended.
func TestFlightLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const part, parts = 10, 20
		for _, lazy := range []bool{false, true} {
			f := NewFlight(3*part, func(error) { t.Error("cancelled") })
			fast := f.Listen()
			var slow *Listener
			if lazy {
				slow = f.Listen()
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				for range parts {
					f.Write([]byte(strings.Repeat("x", part)))
				}
				f.End(nil)
			})
			synctest.Wait()
			if n, ended, _ := f.Progress(); n > 4*part || ended {
				t.Errorf("%d bytes were written before anyone read", n)
			}
			if text, err := readAll(t.Context(), fast); len(text) != part*parts || err != io.EOF {
				t.Errorf("got %d bytes, %v", len(text), err)
			}
			wg.Wait()
			fast.Close(nil)
			if lazy {
				if text, err := readAll(t.Context(), slow); err != ErrLagged {
					t.Errorf("who read nothing got %d bytes, %v", len(text), err)
				}
				slow.Close(nil)
			}
			if _, _, _, whole := f.Recorded(); whole || f.Listen() != nil {
				t.Error("an answer beyond the limit was recorded")
			}
		}
	})
	var cause error
	f := NewFlight(5, func(err error) { cause = err })
	f.Keep()
	f.Write([]byte("longer"))
	if cause != ErrTooLong {
		t.Errorf("an answer that nobody reads went on beyond the limit: %v", cause)
	}
}
