//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"reflect"
	"strconv"
	"testing"
	"time"
)

// answering is an engine that answers everything with a status and a text, and records the last
// request.
func answering(t *testing.T, status int, text string) (Process, *string) {
	t.Helper()
	asked := new(string)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		*asked = r.Method + " " + r.URL.String() + " " + string(body)
		w.WriteHeader(status)
		io.WriteString(w, text)
	}))
	t.Cleanup(func() { CloseIdleConnections(); server.Close() })
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	return Process{Port: port, Parallel: 2, SaveFolder: t.TempDir()}, asked
}

func TestClient(t *testing.T) {
	p, asked := answering(t, 200, `[{"id":0,"n_ctx":2048,"speculative":false,"is_processing":false},
		{"id":1,"n_ctx":2048,"is_processing":true,"id_task":12,"n_prompt_tokens":640,
		 "n_prompt_tokens_processed":8,"n_prompt_tokens_cache":632,"params":{"n_predict":4}}]`)
	want := []Slot{{ID: 0, Task: -1, Context: 2048}, {1, true, 12, 640, 8, 632, 2048}}
	if got, err := p.Slots(t.Context()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("slots %+v, %v, want %+v", got, err, want)
	}
	if *asked != "GET /slots " {
		t.Errorf("asked %q", *asked)
	}
	p, asked = answering(
		t,
		200,
		`{"id_slot":1,"filename":"a","n_saved":1255,"n_written":28936044,"timings":{"save_ms":9.673}}`,
	)
	if got, err := p.Save(t.Context(), 1, "a"); err != nil ||
		got != (Saved{1255, 28936044, 9673 * time.Microsecond}) {
		t.Errorf("saved %+v, %v", got, err)
	}
	if *asked != `POST /slots/1?action=save {"filename":"a"}` {
		t.Errorf("asked %q", *asked)
	}
	p, asked = answering(
		t,
		200,
		`{"id_slot":1,"filename":"a","n_restored":1255,"n_read":28936044,"timings":{"restore_ms":5.5}}`,
	)
	write(t, filepath.Join(p.SaveFolder, "a"), "state")
	if got, err := p.Restore(t.Context(), 1, "a", 5); err != nil ||
		got != (Restored{1255, 28936044, 5500 * time.Microsecond}) {
		t.Errorf("restored %+v, %v", got, err)
	}
	if *asked != `POST /slots/1?action=restore {"filename":"a"}` {
		t.Errorf("asked %q", *asked)
	}
	p, asked = answering(t, 200, `{"id_slot":0,"n_erased":7}`)
	if got, err := p.Erase(t.Context(), 0); err != nil || got != 7 {
		t.Errorf("erased %d, %v", got, err)
	}
	if *asked != `POST /slots/0?action=erase {}` {
		t.Errorf("asked %q", *asked)
	}
}

func TestClientErrors(t *testing.T) {
	for _, test := range []struct {
		status int
		text   string
		want   error
		says   string
	}{
		{400, `{"error":{"code":400,"message":"Invalid filename"}}`, ErrRefused,
			"having the engine save slot 0: the engine refused: Invalid filename"},
		{501, `{"error":{"message":"Start it with --slot-save-path"}}`, ErrUnsupported,
			"having the engine save slot 0: the engine does not do that: Start it with --slot-save-path"},
		{503, `{"error":{"message":"Loading model"}}`, ErrLoading,
			"having the engine save slot 0: the engine is still loading its model: Loading model"},
		{500, `{"error":{"message":"Unable to save slot"}}`, nil,
			"having the engine save slot 0: the engine answers 500: Unable to save slot"},
		{404, `no such page`, nil, "having the engine save slot 0: the engine answers 404: Not Found"},
		{200, `{`, nil,
			"having the engine save slot 0: reading the engine's answer: unexpected end of JSON input"},
	} {
		p, _ := answering(t, test.status, test.text)
		_, err := p.Save(t.Context(), 0, "a")
		if err == nil || err.Error() != test.says {
			t.Errorf("%d %s: %v", test.status, test.text, err)
		}
		for _, kind := range []error{ErrRefused, ErrUnsupported, ErrLoading, ErrGone} {
			if errors.Is(err, kind) != (kind == test.want) {
				t.Errorf("%d %s: %v is %v", test.status, test.text, err, kind)
			}
		}
		if _, err := p.Slots(t.Context()); err == nil ||
			test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("%d %s: slots: %v", test.status, test.text, err)
		}
	}
}

func TestClientGone(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		panic(http.ErrAbortHandler)
	}))
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	p := Process{}
	if _, err := fmt.Sscan(u.Port(), &p.Port); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Erase(t.Context(), 0); !errors.Is(err, ErrGone) {
		t.Errorf("it ends in mid-request: %v", err)
	}
	server.Close()
	if _, err := p.Slots(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("nobody listens: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Slots(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, ErrGone) {
		t.Errorf("the caller has given up: %v", err)
	}
}

// TestRestoreGuards: the engine is not asked for a file that is not the saved one, or for a slot
// that it lacks.
func TestRestoreGuards(t *testing.T) {
	p, asked := answering(t, 200, `{}`)
	write(t, filepath.Join(p.SaveFolder, "a"), "state")
	for _, test := range []struct {
		slot int
		name string
		size int64
	}{{0, "a", 4}, {0, "a", 6}, {0, "b", 5}, {0, ".", 4096}, {-1, "a", 5}, {2, "a", 5}} {
		_, err := p.Restore(t.Context(), test.slot, test.name, test.size)
		if !errors.Is(err, ErrRefused) {
			t.Errorf("%+v: %v", test, err)
		}
	}
	if *asked != "" {
		t.Errorf("the engine was asked %s", *asked)
	}
	other := t.TempDir()
	if p.folder = other; p.Folder() != other {
		t.Errorf("the states of a note are in %s, not in %s", p.Folder(), other)
	}
	if p.Elsewhere = true; p.Folder() != p.SaveFolder {
		t.Errorf("an engine that saves elsewhere does so in %s, not in %s",
			p.Folder(), p.SaveFolder)
	}
}
