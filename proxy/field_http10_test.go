package proxy

import (
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
)

// TestBrokenAnswerHTTP10: only the connection's end marks the end of an answer to an HTTP/1.0
// client. A broken answer ends with a reset, a complete one with a plain close.
func TestBrokenAnswerHTTP10(t *testing.T) {
	for _, broken := range []bool{false, true} {
		f := newFake(t, nil)
		rg := newRig(t, f.URL, &Handler{})
		client := rg.dial()
		client.send("POST /api/generate HTTP/1.0\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n" + `{"model":"m"}`)
		up := f.accept()
		head := up.mustHead()
		if err := up.rest(&head); err != nil {
			t.Fatal(err)
		}
		up.send("HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
		if got := make([]byte, len("HTTP/1.0 200 OK")); true {
			if _, err := io.ReadFull(client.br, got); err != nil || string(got) != "HTTP/1.0 200 OK" {
				t.Fatalf("%q, %v", got, err)
			}
		}
		if !broken {
			up.send("0\r\n\r\n")
		}
		up.Close()
		text, err := io.ReadAll(client.br)
		if reset := errors.Is(err, syscall.ECONNRESET); reset != broken || err != nil && !reset {
			t.Errorf("broken %v: the answer ends with %v", broken, err)
		}
		if !broken && !strings.HasSuffix(string(text), "\r\n\r\n{}") {
			t.Errorf("the answer is %q", text)
		}
		want := OK
		if broken {
			want = Aborted
		}
		if ex := rg.ended(); ex.Outcome != want {
			t.Errorf("broken %v: outcome %s, want %s", broken, ex.Outcome, want)
		}
	}
}

// TestBrokenUpload: an error in the client's body is not blamed on the upstream.
func TestBrokenUpload(t *testing.T) {
	for _, path := range []string{"/api/blobs/sha256:00", "/api/chat"} {
		f := newFake(t, nil)
		rg := newRig(t, f.URL, &Handler{})
		client := rg.dial()
		client.send("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n")
		got := client.receive()
		if got.line != "HTTP/1.1 400 Bad Request" || !strings.Contains(string(got.body), "reading the request's body: ") || !strings.Contains(string(got.body), "chunk") {
			t.Errorf("%s: %s %s", path, got.line, got.body)
		}
		if ex := rg.ended(); ex.Outcome != Refused {
			t.Errorf("%s: outcome %s", path, ex.Outcome)
		}
	}
}
