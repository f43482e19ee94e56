//go:build linux

package faults

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"time"
)

// request is a request of a client. Its id is in its prompt, once.
type request struct {
	id     string
	kind   kind
	stream bool
	body   []byte
	// reference is the request of which the whole answer has the same text.
	reference []byte
}

// kind is a dialect, with an outcome that its requests have if nothing is wrong.
type kind struct {
	name    string
	path    string
	padding int  // bytes that make the body longer than proxies read
	leaves  bool // the client leaves soon
	clients int
}

var kinds = []kind{
	{name: "chat", path: "/api/chat", clients: 4},
	{name: "generate", path: "/api/generate", clients: 2},
	{name: "openai", path: "/v1/chat/completions", clients: 4},
	{name: "long", path: "/api/chat", padding: 2 * maxBody, clients: 1},
	{name: "leaver", path: "/api/chat", leaves: true, clients: 1},
}

const answerTokens = 12

func newRequest(k kind, r *rand.Rand) *request {
	q := &request{id: fmt.Sprintf("request-%016x", r.Uint64()), kind: k, stream: r.IntN(3) > 0}
	rubric := r.IntN(8)
	system := strings.Repeat(fmt.Sprintf("Rule %d of rubric %d says what counts. ", 7*rubric, rubric), 20)
	user := fmt.Sprintf("Candidate %d, %s.", r.IntN(100000), q.id)
	messages := []map[string]string{{"role": "system", "content": system}, {"role": "user", "content": user}}
	options := map[string]any{"num_predict": answerTokens, "temperature": 0, "seed": 1}
	body := map[string]any{"model": model, "stream": q.stream}
	reference := map[string]any{"model": model, "stream": false, "options": options, "messages": messages}
	switch k.path {
	case "/api/generate":
		body["system"], body["prompt"], body["options"] = system, user, options
	case "/v1/chat/completions":
		body["messages"], body["max_tokens"], body["temperature"], body["seed"] = messages, answerTokens, 0, 1
	default:
		body["messages"], body["options"] = messages, options
	}
	if k.padding > 0 {
		body["padding"] = strings.Repeat("x", k.padding)
	}
	q.body, q.reference = mustJSON(body), mustJSON(reference)
	return q
}

func mustJSON(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // it is all our own
	}
	return text
}

// outcomes of a request.
const (
	answered = "answered"
	brokeOff = "broken off"
	noAnswer = "no answer" // the connection ended before one
	failed   = "failed"    // an error within the answer
	refused  = "refused everywhere"
	left     = "left"
)

// result is how a request ended.
type result struct {
	outcome string // one of the outcomes, or a status
	entry   string
	took    time.Duration
	wrong   error  // what must not happen
	text    string // of the answer
}

// errHangs is the cause of giving up a request that has taken longer than any may.
var errHangs = errors.New("it has neither an answer nor an error")

// ask sends a request to the entries in this order: to the next one only if a connection is
// refused, as a load balancer does.
func (f *fleet) ask(ctx context.Context, q *request, entries []*process) result {
	ctx, cancel := context.WithTimeoutCause(ctx, f.bound(), errHangs)
	defer cancel()
	began := time.Now()
	res := result{outcome: refused}
	for _, entry := range entries {
		res = f.askOne(ctx, q, entry)
		if res.entry = entry.name; res.outcome != refused {
			break
		}
	}
	res.took = time.Since(began)
	if context.Cause(ctx) == errHangs {
		res.wrong = fmt.Errorf("after %v: %w", res.took.Round(time.Second), errHangs)
	}
	return res
}

func (f *fleet) askOne(ctx context.Context, q *request, entry *process) result {
	if q.kind.leaves {
		var leave context.CancelFunc
		ctx, leave = context.WithTimeout(ctx, f.patience(q))
		defer leave()
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, f.url(entry)+q.kind.path, bytes.NewReader(q.body))
	if err != nil {
		return result{outcome: noAnswer, wrong: err}
	}
	r.Header.Set("Content-Type", "application/json")
	res, err := f.client.Do(r)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return result{outcome: refused}
	case err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && q.kind.leaves:
		return result{outcome: left}
	case err != nil:
		return result{outcome: noAnswer}
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	switch {
	case err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && q.kind.leaves:
		return result{outcome: left}
	case err != nil:
		return result{outcome: brokeOff}
	case res.StatusCode >= 500:
		if !json.Valid(text) {
			return result{outcome: "error", wrong: fmt.Errorf("status %d, and no JSON: %.200q", res.StatusCode, text)}
		}
		return result{outcome: fmt.Sprint(res.StatusCode)}
	case res.StatusCode != http.StatusOK:
		return result{outcome: "error", wrong: fmt.Errorf("status %d: %.200q", res.StatusCode, text)}
	}
	return f.judge(q, res.Header.Get("Content-Type"), text)
}

// patience is how long a client waits that leaves: long enough that some of its requests have begun.
func (f *fleet) patience(q *request) time.Duration {
	return time.Duration(q.id[len(q.id)-1]) * 2 * time.Millisecond
}

// judge compares an answer that ended normally with what it should be.
func (f *fleet) judge(q *request, contentType string, text []byte) result {
	got, err := readAnswer(contentType, text)
	var inAnswer errorInAnswer
	if errors.As(err, &inAnswer) {
		return result{outcome: failed}
	}
	if err != nil {
		return result{outcome: "incomplete", wrong: fmt.Errorf("an answer with status 200 that is not whole: %w: %.300q", err, text)}
	}
	if want := f.expected(q); want != "" && got != want {
		return result{outcome: "different", wrong: fmt.Errorf("another answer: %.200q, want %.200q", got, want)}
	}
	return result{outcome: answered, text: got}
}

type errorInAnswer string

func (e errorInAnswer) Error() string { return string(e) }

// piece is a line of an answer in any of the dialects, or all of one.
type piece struct {
	Error    any
	Done     bool
	Response string
	Message  struct{ Content string }
	Choices  []struct {
		Delta, Message struct{ Content string }
		FinishReason   string `json:"finish_reason"`
	}
}

// readAnswer returns the text of an answer, and an error if it is not whole.
func readAnswer(contentType string, body []byte) (string, error) {
	events := strings.HasPrefix(contentType, "text/event-stream")
	var text strings.Builder
	over := false
	for lines := bufio.NewScanner(bytes.NewReader(body)); lines.Scan(); {
		line := lines.Bytes()
		if events {
			var data bool
			if line, data = bytes.CutPrefix(line, []byte("data: ")); !data { // a comment, or nothing
				continue
			}
			if string(line) == "[DONE]" {
				over = true
				continue
			}
		}
		if over {
			return "", errors.New("it goes on after its end")
		}
		var p piece
		if err := json.Unmarshal(line, &p); err != nil {
			return "", err
		}
		if p.Error != nil {
			return "", errorInAnswer(fmt.Sprint(p.Error))
		}
		text.WriteString(p.Response + p.Message.Content)
		for _, c := range p.Choices {
			text.WriteString(c.Delta.Content + c.Message.Content)
			over = over || !events && c.FinishReason != ""
		}
		over = over || p.Done
	}
	if !over {
		return "", errors.New("it has no end")
	}
	return text.String(), nil
}

// direct returns the answer that a real server gives to the request.
func (f *fleet) direct(ctx context.Context, q *request) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, f.servers[0].real.URL()+"/api/chat", bytes.NewReader(q.reference))
	if err != nil {
		return "", err
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return "", err
	}
	return readAnswer(res.Header.Get("Content-Type"), text)
}

// expected returns the text of the answer to a request of a simulated server; "" for real ones,
// whose answers are compared in the end.
func (f *fleet) expected(q *request) string {
	if f.reference == nil {
		return ""
	}
	w := httptest.NewRecorder()
	f.reference.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/api/chat", bytes.NewReader(q.reference)))
	text, err := readAnswer(w.Header().Get("Content-Type"), w.Body.Bytes())
	if err != nil {
		panic(err) // it is all our own
	}
	return text
}
