package proxy

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestBatchesOff: without Batches, /v1/files and /v1/batches are forwarded like any other path.
func TestBatchesOff(t *testing.T) {
	rg := newRig(t, newFake(t, okAnswer).URL, &Handler{})
	for _, path := range []string{"/v1/files", "/v1/batches", "/v1/batches/x/cancel"} {
		res, text := rg.post(path, "{}")
		if ex := rg.ended(); res.StatusCode != http.StatusOK || text != `{"done":true}` || ex.Endpoint != "other" || ex.Outcome != OK {
			t.Errorf("%s: %d %s %+v", path, res.StatusCode, text, ex)
		}
	}
}

// TestBatches: requests for files and batches reach Batches after Host, Origin and key were
// checked, with who asks, and are counted under their paths.
func TestBatches(t *testing.T) {
	const keys = "alice key-1\nbob key-2"
	var owners []string
	h := &Handler{Guard: withKeys(t, keys)}
	h.Batches = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		owners = append(owners, Owner(r))
		w.WriteHeader(http.StatusAccepted)
		w.Write(body)
	})
	fake := newFake(t, okAnswer)
	rg := newRig(t, fake.URL, h)
	for path, label := range map[string]string{
		"/v1/files": pathFiles, "/v1/files/x/content": pathFiles, "/v1/batches": pathBatches, "/v1/batches/x": pathBatches,
	} {
		res, text := rg.post(path, "body", "Authorization: Bearer key-1", "Origin: http://localhost:3000")
		ex := rg.ended()
		if res.StatusCode != http.StatusAccepted || text != "body" || res.Header.Get("Access-Control-Allow-Origin") == "" {
			t.Error(path, res.StatusCode, text, res.Header)
		}
		if ex.Endpoint != label || ex.Outcome != Own || ex.Status != http.StatusAccepted || ex.BytesOut != 4 || ex.Name != "alice" {
			t.Errorf("%s: %+v", path, ex)
		}
	}
	for want, headers := range map[int][]string{
		http.StatusUnauthorized: nil,
		http.StatusForbidden:    {"Authorization: Bearer key-1", "Origin: http://evil.example"},
	} {
		if res, text := rg.post("/v1/files", "x", headers...); res.StatusCode != want {
			t.Error(want, res.StatusCode, text)
		}
		rg.ended()
	}
	rg.post("/v1/batches", "x", "Authorization: Bearer key-2")
	rg.ended()
	if len(owners) != 5 || owners[0] == "" || owners[0] != owners[3] || owners[4] == owners[0] || strings.Contains(owners[0], "key") {
		t.Error(owners)
	}
	// Other paths that only begin alike are Ollama's.
	if res, _ := rg.post("/v1/filesystem", "x", "Authorization: Bearer key-1"); res.StatusCode != http.StatusOK {
		t.Error(res.StatusCode)
	}
	rg.ended()
}

// TestAs: a request within the process is sent in the name of the key that Owner stands for, for as
// long as that key is accepted, and no header of a client's can do the same.
func TestAs(t *testing.T) {
	keys := withKeys(t, "alice key-1 class=batch\nbob key-2").Keys
	h := &Handler{Guard: Guard{Keys: keys}}
	rg := newRig(t, newFake(t, okAnswer).URL, h)
	owner := (*keys.holders.Load())[0].owner()
	ask := func(owner string) int {
		req := httptest.NewRequestWithContext(As(context.Background(), owner), "POST", "http://127.0.0.1/api/chat", strings.NewReader(`{"model":"m"}`))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		return w.Code
	}
	if status := ask(owner); status != http.StatusOK {
		t.Error(status)
	}
	if ex := rg.ended(); ex.Name != "alice" {
		t.Errorf("%+v", ex)
	}
	for _, nobody := range []string{"", "x"} {
		if status := ask(nobody); status != http.StatusUnauthorized || h.Guard.Knows(nobody) {
			t.Error(nobody, status)
		}
		rg.ended()
	}
	if !h.Guard.Knows(owner) {
		t.Error("the key is not known")
	}
	if err := keys.Replace("bob key-2"); err != nil {
		t.Fatal(err)
	}
	if status := ask(owner); status != http.StatusUnauthorized || h.Guard.Knows(owner) {
		t.Error("a key that was taken away still works:", status)
	}
	rg.ended()
	if open := (&Guard{}); !open.Knows("") || !open.Knows(owner) {
		t.Error("without keys everybody may ask")
	}
}
