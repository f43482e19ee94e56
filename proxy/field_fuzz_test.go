package proxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/ollama/ollama/api"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// ollamaBody has the fields that Ollama reads and keep_alive depends on.
type ollamaBody struct {
	Model     string        `json:"model"`
	KeepAlive *api.Duration `json:"keep_alive"`
}

// readAsOllama decodes a body as gin's ShouldBindJSON does: the first value, and no more.
func readAsOllama(data []byte) (ollamaBody, error) {
	var b ollamaBody
	err := json.NewDecoder(bytes.NewReader(data)).Decode(&b)
	return b, err
}

// demanded is the keep_alive that a policy requires, computed independently of the code under test.
func demanded(policy KeepAlivePolicy, client *api.Duration, operator time.Duration) time.Duration {
	switch {
	case client == nil:
		return operator
	case client.Duration == 0, policy == IfAbsent:
		return client.Duration
	case policy == AtLeast:
		return max(client.Duration, operator)
	}
	return operator
}

// FuzzKeepAlive compares the edited body with the client's, both as Ollama reads them, and byte by
// byte.
func FuzzKeepAlive(f *testing.F) {
	for _, seed := range []string{
		`{"model":"m"}`, `{"model":"m","keep_alive":"5m"}`, `{}`, ``, `null`, `{"model":"m"} junk`, `{"model":"m","keep_alive":0}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, setting := range []string{"24h", "-1"} {
			for _, policy := range []KeepAlivePolicy{IfAbsent, AtLeast, Force} {
				checkEdit(t, data, keep(t, policy, setting))
			}
		}
	})
}

// editor sends bodies through a whole handler and keeps the last edited one.
type editor struct {
	h    *Handler
	sent []byte
	told Exchange
}

func newEditor(k KeepAlive) *editor {
	e := &editor{h: &Handler{KeepAlive: k, Upstreams: []*upstream.Server{upstream.NewServer("up", &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, nil, nil)}}}
	e.h.Transport = e
	e.h.Done = func(ex Exchange) { e.told = ex }
	e.h.Init()
	return e
}

func (e *editor) RoundTrip(r *http.Request) (*http.Response, error) {
	var err error
	if e.sent, err = io.ReadAll(r.Body); err == nil {
		err = r.Body.Close()
	}
	if int64(len(e.sent)) != r.ContentLength {
		return nil, fmt.Errorf("%d bytes with Content-Length %d", len(e.sent), r.ContentLength)
	}
	return &http.Response{StatusCode: 200, Request: r, Body: http.NoBody}, err
}

func checkEdit(t *testing.T, data []byte, k KeepAlive) {
	e := newEditor(k)
	rec := httptest.NewRecorder()
	e.h.ServeHTTP(rec, httptest.NewRequest("POST", "http://localhost/api/chat", bytes.NewReader(data)))
	if rec.Code != 200 {
		t.Fatalf("%q: %d %s", data, rec.Code, rec.Body)
	}
	edited := e.sent
	before, errBefore := readAsOllama(data)
	after, errAfter := readAsOllama(edited)
	spans, isObject := keepAliveValues(data)
	same := bytes.Equal(data, edited)
	switch key := upstream.ModelKey(before.Model); {
	case !isObject:
		if !same {
			t.Errorf("%s: %q is no object, but edited to %q", k.Policy, data, edited)
		}
		return
	case errBefore != nil:
		if errAfter == nil {
			t.Errorf("%s: %q is refused by Ollama (%v), but edited to %q it is not", k.Policy, data, errBefore, edited)
		}
		return
	case key == "" || upstream.IsCloud(before.Model):
		if !same {
			t.Errorf("%s: %q names no local model, but is edited to %q", k.Policy, data, edited)
		}
		return
	case errAfter != nil:
		t.Fatalf("%s: %q edited to %q: %v", k.Policy, data, edited, errAfter)
	}
	if after.Model != before.Model || e.told.Model != before.Model {
		t.Errorf("%s: %q has model %q, edited %q, told %q", k.Policy, data, before.Model, after.Model, e.told.Model)
	}
	want := demanded(k.Policy, before.KeepAlive, k.Default.Duration)
	if after.KeepAlive == nil || after.KeepAlive.Duration != want {
		t.Errorf("%s: %q edited to %q has keep_alive %v, want %v", k.Policy, data, edited, after.KeepAlive, want)
	}
	if before.KeepAlive != nil && before.KeepAlive.Duration == want && !same {
		t.Errorf("%s: %q has the keep_alive that is wanted, but is edited to %q", k.Policy, data, edited)
	}
	if same {
		return
	}
	if len(spans) > 0 { // the last value is replaced
		head, tail := data[:spans[len(spans)-1][0]], data[spans[len(spans)-1][1]:]
		if len(edited) < len(head)+len(tail) || !bytes.HasPrefix(edited, head) || !bytes.HasSuffix(edited, tail) {
			t.Errorf("%s: %q edited to %q changes more than the last value", k.Policy, data, edited)
		}
		return
	}
	if head, tail, _ := bytes.Cut(data, []byte("{")); !bytes.HasPrefix(edited, append(bytes.Clone(head), '{')) || !bytes.HasSuffix(edited, tail) {
		t.Errorf("%s: %q edited to %q changes more than it inserts", k.Policy, data, edited)
	}
}

// keepAliveValues finds the values of keep_alive in data's first value, by encoding/json; false if that is no object.
func keepAliveValues(data []byte) (spans [][2]int64, isObject bool) {
	var raw json.RawMessage
	if json.NewDecoder(bytes.NewReader(data)).Decode(&raw) != nil || raw[0] != '{' {
		return nil, false
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.Token() // the brace
	for dec.More() {
		key, err := dec.Token()
		if err != nil || dec.Decode(&raw) != nil {
			return nil, false
		}
		if strings.EqualFold(key.(string), "keep_alive") {
			spans = append(spans, [2]int64{dec.InputOffset() - int64(len(raw)), dec.InputOffset()})
		}
	}
	return spans, true
}
