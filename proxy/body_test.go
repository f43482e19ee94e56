package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// pattern is a text in which every offset looks different.
func pattern(n int, salt byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)*31 ^ byte(i>>16)*17 ^ salt
	}
	return b
}

// readBody reads a body with a separate, unlimited memory.
func readBody(src io.Reader, length, most int64) (*body, bool, error) {
	return newMemory(0).read(context.Background(), schedule.Normal, src, length, most, func() error { return nil })
}

func TestReadBody(t *testing.T) {
	const max = bodyGrows*bodyFirst*bodyGrows + 5
	readers := map[string]func(io.Reader) io.Reader{
		"whole":      func(r io.Reader) io.Reader { return r },
		"halves":     iotest.HalfReader,
		"data + EOF": iotest.DataErrReader,
	}
	sizes := []int{0, 1, 7, bodyFirst - 1, bodyFirst, bodyFirst + 1, bodyGrows*bodyFirst - 1, bodyGrows * bodyFirst, bodyGrows*bodyFirst + 1, max - 1, max}
	for name, wrap := range readers {
		for _, n := range sizes {
			data := pattern(n, 3)
			for _, length := range []int64{int64(n), -1} {
				b, over, err := readBody(wrap(bytes.NewReader(data)), length, max)
				if err != nil || over || !bytes.Equal(b.data, data) || int64(cap(b.data)) > bufferSize(int64(n))*8/7+1 {
					t.Errorf("%s, %d bytes, length %d: read %d, over %v, %v", name, n, length, len(b.data), over, err)
				}
				b.release()
			}
		}
	}
	small := pattern(300, 5)
	b, _, err := readBody(iotest.OneByteReader(bytes.NewReader(small)), -1, max)
	if err != nil || !bytes.Equal(b.data, small) {
		t.Errorf("one byte at a time: %d bytes, %v", len(b.data), err)
	}
	b.release()
}

// TestReadBodyOver: a body longer than max is reported as over, and the part that was read and the
// part still to come make up the whole.
func TestReadBodyOver(t *testing.T) {
	for _, max := range []int64{0, 1, 10, bodyFirst - 1, bodyFirst, 200 << 10} {
		for _, more := range []int{1, 2, 70 << 10} {
			for name, wrap := range map[string]func(io.Reader) io.Reader{"whole": func(r io.Reader) io.Reader { return r }, "data + EOF": iotest.DataErrReader} {
				data := pattern(int(max)+more, 9)
				r := wrap(bytes.NewReader(data))
				b, over, err := readBody(r, -1, max)
				if err != nil || !over {
					t.Errorf("%s: %d bytes over a limit of %d: over %v, %v", name, more, max, over, err)
				}
				tail, err := io.ReadAll(r)
				if got := append(bytes.Clone(b.data), tail...); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %d over %d: %d + %d bytes, %v", name, more, max, len(b.data), len(tail), err)
				}
			}
		}
	}
}

func TestReadBodyError(t *testing.T) {
	broken := errors.New("broken")
	b, over, err := readBody(io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(broken)), -1, 100)
	if !errors.Is(err, broken) || over || string(b.data) != "abc" {
		t.Errorf("read %q, over %v, %v", b.data, over, err)
	}
}

// TestBodyEdits reads every possible edit of a small body, through every size of buffer.
func TestBodyEdits(t *testing.T) {
	const text = "0123456789"
	for at := 0; at <= len(text); at++ {
		for cut := 0; at+cut <= len(text); cut++ {
			for _, insert := range []string{"", "x", "<inserted>"} {
				e := edit{at: at, cut: cut, text: []byte(insert)}
				b := newBody([]byte(text), nil)
				want := text[:at] + insert + text[at+cut:]
				for size := 1; size <= 12; size += 5 {
					r := b.open(e)
					var got []byte
					buf := make([]byte, size)
					for {
						n, err := r.Read(buf)
						got = append(got, buf[:n]...)
						if err == io.EOF {
							break
						}
						if err != nil {
							t.Fatal(err)
						}
					}
					r.Close()
					if string(got) != want || len(got) != len(text)+grow([]edit{e}) {
						t.Errorf("%+v in buffers of %d: %q, want %q", e, size, got, want)
					}
				}
				if refs := b.refs.Load(); refs != 1 {
					t.Errorf("%d references are left", refs)
				}
			}
		}
	}
}

// TestBodyReaderClosed: the transport closes a body while it is still reading. After that the
// reader returns nothing from the buffer, which may belong to another request by then.
func TestBodyReaderClosed(t *testing.T) {
	b := newBody([]byte("secret"), nil)
	r := b.open(edit{})
	r.Read(make([]byte, 2))
	r.Close()
	r.Close() // a second Close does nothing
	if n, err := r.Read(make([]byte, 9)); n != 0 || !errors.Is(err, errBodyClosed) {
		t.Errorf("read %d bytes after Close, %v", n, err)
	}
	if refs := b.refs.Load(); refs != 1 {
		t.Errorf("%d references after two Close", refs)
	}
	if n, err := b.open(edit{}).Read(nil); n != 0 || err != nil {
		t.Errorf("an empty buffer reads %d, %v", n, err)
	}
}

// TestBodyPool: many requests borrow and return buffers at once, with readers that outlive the
// requests, as the transport's do. None sees another's bytes.
func TestBodyPool(t *testing.T) {
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 60 {
				data := pattern(1+(i*7919+g*104729)%(150<<10), byte(g*31+i))
				b, over, err := readBody(bytes.NewReader(data), -1, 1<<20)
				if err != nil || over {
					t.Error(over, err)
					return
				}
				r, again := b.open(edit{}), b.open(edit{at: len(data), text: []byte("!")})
				b.release() // the request ends before its readers
				var inner sync.WaitGroup
				inner.Go(func() {
					if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
						t.Errorf("a reader saw other bytes, %v", err)
					}
					r.Close()
				})
				if got, err := io.ReadAll(again); err != nil || !bytes.Equal(got, append(bytes.Clone(data), '!')) {
					t.Errorf("a reader saw other bytes, %v", err)
				}
				again.Close()
				inner.Wait()
			}
		})
	}
	wg.Wait()
}

// TestBodyEarlyAnswers: the upstream answers before it has read the bodies, so the transport closes
// them while it is writing, and the buffers are reused. The upstream still reads only bytes that
// were sent.
func TestBodyEarlyAnswers(t *testing.T) {
	f := newFake(t, nil)
	f.ln.SetDeadline(noDeadline)
	var wg sync.WaitGroup
	over := make(chan struct{})
	wg.Go(func() { // ends when the listener is closed
		for {
			conn, err := f.ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { <-over; conn.Close() }) // it may be a spare one without a request
			wg.Go(func() {                         // ends with the proxy's request, or with the test
				defer conn.Close()
				buf := make([]byte, 32<<10)
				n, err := io.ReadAtLeast(conn, buf, 4096)
				if err != nil {
					return
				}
				io.WriteString(conn, answer(429, "text/plain", "no"))
				_, sent, _ := bytes.Cut(buf[:n], []byte("\r\n\r\n"))
				if len(sent) > 0 && len(bytes.Trim(sent, string(sent[:1]))) > 0 {
					t.Errorf("two requests' bytes are mixed: %.80q", sent)
				}
			})
		}
	})
	rg := newRig(t, f.URL, &Handler{})
	var clients sync.WaitGroup
	for g := range 6 {
		clients.Go(func() {
			body := strings.Repeat(string(rune('a'+g)), 400<<10)
			for range 15 {
				res, err := rg.http.Post(rg.URL+"/api/chat", "application/json", strings.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				if res.StatusCode != 429 && res.StatusCode != 502 { // 502: the connection broke before the answer was read
					t.Error(fmt.Sprint(res.Status))
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
		})
	}
	clients.Wait()
	f.ln.Close()
	close(over)
	wg.Wait()
}
