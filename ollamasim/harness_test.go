package ollamasim

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
)

func start(t testing.TB, c Config) *Server {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// post sends a request without a network. An interrupted answer has status 0.
func post(ctx context.Context, s *Server, path, body string) (status int, answer string) {
	w := httptest.NewRecorder()
	broken := func() (broken bool) {
		defer func() { broken = recover() != nil }()
		s.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodPost, path, strings.NewReader(body)))
		return
	}()
	if broken {
		return 0, w.Body.String()
	}
	return w.Code, w.Body.String()
}

// ask asks for an answer in one piece.
func ask(t testing.TB, s *Server, path, body string) api.GenerateResponse {
	t.Helper()
	status, text := post(t.Context(), s, path, body)
	if status != http.StatusOK {
		t.Fatalf("%s %s: %d %s", path, body, status, text)
	}
	var r api.GenerateResponse
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// words returns text of n tokens, different for each id.
func words(id, n int) string {
	var b bytes.Buffer
	for i := range n {
		b.WriteByte(' ')
		for h, k := mix(uint64(id)+1, uint64(i)+1), 0; k < 5; h, k = h/26, k+1 {
			b.WriteByte(byte('a' + h%26))
		}
	}
	return b.String()
}

// raw returns a request for gen tokens with a raw prompt.
func raw(prompt string, gen int, more string) string {
	text, _ := json.Marshal(prompt)
	options, _ := json.Marshal(map[string]any{"num_predict": gen})
	if more != "" {
		more = "," + more
	}
	return `{"model":"m","raw":true,"stream":false,"prompt":` + string(text) + `,"options":` + string(options) + more + `}`
}

// closed sends the requests from a number of clients, each of which sends the next one when its
// last is answered.
func closed(t *testing.T, s *Server, clients int, bodies []string) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	next := 0
	for c := range clients {
		time.Sleep(time.Millisecond) // the first ones arrive in the order of the bodies
		wg.Go(func() {
			for {
				// After answers that end at the same time, the clients continue in their order, not
				// by chance.
				time.Sleep(time.Duration(c) * time.Microsecond)
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= len(bodies) {
					return
				}
				if status, text := post(t.Context(), s, "/api/generate", bodies[i]); status != http.StatusOK {
					t.Errorf("client %d: %d %s", c, status, text)
					return
				}
			}
		})
	}
	wg.Wait()
}
