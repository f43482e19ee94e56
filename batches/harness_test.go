package batches

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is an Ollama that counts what it is asked. hook, if non-nil, may answer a request itself.
type fake struct {
	hook func(w http.ResponseWriter, r *http.Request, text string) (answered bool)

	absent atomic.Value // a model that is not there, beside the one called absent

	mu     sync.Mutex
	asked  map[string]int // by the text of the prompt
	owners map[string]int // of these requests
	wrong  []string
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Model    string
		Messages []struct{ Content string }
		Input    json.RawMessage
		Prompt   string
	}
	switch r.URL.Path {
	case "/api/version":
		io.WriteString(w, `{"version":"0.34.1"}`)
	case "/api/ps":
		io.WriteString(w, `{"models":[]}`)
	case "/api/show":
		json.NewDecoder(r.Body).Decode(&body)
		if body.Model == "absent" || body.Model == f.absent.Load() {
			w.WriteHeader(http.StatusNotFound)
		}
		io.WriteString(w, `{}`)
	case "/v1/chat/completions", "/v1/completions", "/v1/embeddings":
		json.NewDecoder(r.Body).Decode(&body)
		text := body.Prompt + string(body.Input)
		if len(body.Messages) > 0 {
			text = body.Messages[0].Content
		}
		f.count(r, text)
		if f.hook != nil && f.hook(w, r, text) {
			return
		}
		f.answer(w, r.URL.Path, text)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (f *fake) count(r *http.Request, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.asked == nil {
		f.asked, f.owners = map[string]int{}, map[string]int{}
	}
	f.asked[text]++
	f.owners[ownerOf(r)]++
	if r.Header.Get("X-Cacheproxy-Priority") != "batch" {
		f.wrong = append(f.wrong, "a request has not the priority batch")
	}
}

func (f *fake) answer(w http.ResponseWriter, path, text string) {
	if path == "/v1/embeddings" {
		io.WriteString(w, `{"object":"list","data":[{"object":"embedding","index":0,"embedding":[1,2]}],"model":"m","usage":{"prompt_tokens":1,"total_tokens":1}}`)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	object, choice := "chat.completion.chunk", `{"index":0,"delta":{"role":"assistant","content":%q}}`
	if path == "/v1/completions" {
		object, choice = "text_completion", `{"index":0,"text":%q}`
	}
	choice = fmt.Sprintf(choice, "answer to "+text)
	fmt.Fprintf(w, "data: {\"id\":\"x\",\"object\":%q,\"created\":1,\"model\":\"m\",\"choices\":[%s]}\n\n", object, choice)
	http.NewResponseController(w).Flush()
	io.WriteString(w, `data: {"id":"x","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}`+"\n\ndata: [DONE]\n\n")
}

// counts returns how often each prompt was asked.
func (f *fake) counts() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.asked)
}

type testOwner struct{}

func ownerOf(r *http.Request) string {
	owner, _ := r.Context().Value(testOwner{}).(string)
	return owner
}

// rig is a service, and how tests use it.
type rig struct {
	t      *testing.T
	config Config
	fake   *fake
	*Service
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	unknown map[string]bool
}

// newRig opens a service in an empty folder and runs it. Everything happens in a bubble.
func newRig(t *testing.T, change func(*Config)) *rig {
	r := &rig{t: t, fake: &fake{}, unknown: map[string]bool{}}
	r.config = Config{
		Dir: t.TempDir(), Bytes: 1 << 30, Running: 2, TTL: 720 * time.Hour,
		Log:   slog.New(slog.NewTextHandler(t.Output(), nil)),
		Owner: ownerOf,
		As: func(ctx context.Context, owner string) context.Context {
			return context.WithValue(ctx, testOwner{}, owner)
		},
		Knows: func(owner string) bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return !r.unknown[owner]
		},
	}
	if change != nil {
		change(&r.config)
	}
	r.open()
	return r
}

func (r *rig) open() {
	r.t.Helper()
	s, err := Open(r.config)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.Service, r.cancel, r.done = s, cancel, make(chan struct{})
	go func() { // ends with close
		defer close(r.done)
		s.Run(ctx, r.fake)
	}()
	synctest.Wait()
}

// close ends the service, as a stop without a drain does.
func (r *rig) close() {
	r.cancel()
	<-r.done
	r.Service.Close()
	if len(r.fake.wrong) > 0 {
		r.t.Error(r.fake.wrong)
	}
}

// ask sends a request of an owner, and decodes the answer.
func (r *rig) ask(owner, method, path string, body io.Reader, kind string) (status int, answer map[string]any, raw string) {
	r.t.Helper()
	req := httptest.NewRequest(method, path, body)
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	w := httptest.NewRecorder()
	r.ServeHTTP(w, req.WithContext(context.WithValue(req.Context(), testOwner{}, owner)))
	raw = w.Body.String()
	json.Unmarshal([]byte(raw), &answer) // a file's content is no JSON
	return w.Code, answer, raw
}

// uploadForm returns an upload.
func uploadForm(fields map[string]string, content string) (io.Reader, string) {
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	for name, value := range fields {
		m.WriteField(name, value)
	}
	if f, err := m.CreateFormFile("file", "in.jsonl"); err == nil {
		io.WriteString(f, content)
	}
	m.Close()
	return &b, m.FormDataContentType()
}

func (r *rig) upload(owner, content string) string {
	r.t.Helper()
	body, kind := uploadForm(map[string]string{"purpose": "batch"}, content)
	status, answer, raw := r.ask(owner, "POST", "/v1/files", body, kind)
	if status != http.StatusOK {
		r.t.Fatalf("upload: %d %s", status, raw)
	}
	return answer["id"].(string)
}

func (r *rig) create(owner, file, endpoint, window string) string {
	r.t.Helper()
	status, answer, raw := r.ask(owner, "POST", "/v1/batches", strings.NewReader(fmt.Sprintf(
		`{"input_file_id":%q,"endpoint":%q,"completion_window":%q,"metadata":{"a":"b"}}`, file, endpoint, window)), "")
	if status != http.StatusOK || answer["status"] != "validating" {
		r.t.Fatalf("create: %d %s", status, raw)
	}
	return answer["id"].(string)
}

// chats returns a file of so many chats.
func chats(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(chat(fmt.Sprint("c-", i), fmt.Sprint("prompt ", i), "m"))
	}
	return b.String()
}

func chat(id, prompt, model string) string {
	return fmt.Sprintf(`{"custom_id":%q,"method":"POST","url":"/v1/chat/completions","body":{"model":%q,"messages":[{"role":"user","content":%q}]}}`+"\n", id, model, prompt)
}

func (r *rig) batch(owner, id string) map[string]any {
	r.t.Helper()
	status, answer, raw := r.ask(owner, "GET", "/v1/batches/"+id, nil, "")
	if status != http.StatusOK {
		r.t.Fatalf("batch: %d %s", status, raw)
	}
	return answer
}

// lines returns the lines of a file that a member of a batch names.
func (r *rig) lines(owner string, batch map[string]any, member string) (list []result) {
	r.t.Helper()
	id, ok := batch[member].(string)
	if !ok {
		return nil
	}
	status, _, raw := r.ask(owner, "GET", "/v1/files/"+id+"/content", nil, "")
	if status != http.StatusOK {
		r.t.Fatalf("content: %d %s", status, raw)
	}
	for text := range strings.Lines(raw) {
		var one result
		if err := json.Unmarshal([]byte(text), &one); err != nil {
			r.t.Fatalf("%s: %v", text, err)
		}
		list = append(list, one)
	}
	return list
}

func counts(batch map[string]any) string {
	c := batch["request_counts"].(map[string]any)
	return fmt.Sprint(batch["status"], " ", c["total"], " ", c["completed"], " ", c["failed"])
}

// limited breaks off after so many bytes.
type limited struct {
	from io.Reader
	left int
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := l.from.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}
