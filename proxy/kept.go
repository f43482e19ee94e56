package proxy

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// Headers and paths of answers that go on without their client.
const (
	// In requests: "true" lets the answer go on if the connection is lost.
	headerSurvive = "X-Cacheproxy-Survive"
	// In answers: the ID under which such an answer can be fetched.
	headerAnswer = "X-Cacheproxy-Answer"
	pathAnswers  = ownPrefix + "answers"
	// respondAsync in the header Prefer (RFC 7240) has the proxy answer 202 at once.
	respondAsync = "respond-async"
)

// Bounds of the answers that go on without their client.
const (
	keptMost  = 256       // answers, of all clients together
	keptBytes = 64 << 20  // of all of them together
	keptAge   = time.Hour // after the end
)

// keptAnswers are answers that go on when their client leaves. They are in memory alone.
type keptAnswers struct {
	mu   sync.Mutex
	list []*keptAnswer // in the order of their beginning
}

// keptAnswer is one of them.
type keptAnswer struct {
	id     string
	owner  string // what the client had to show: see credentials
	path   string
	model  string
	began  time.Time
	flight *flight
	ended  time.Time // zero: it is under way
}

// keptEntry is an answer in the content of pathAnswers.
type keptEntry struct {
	ID       string     `json:"id"`
	Path     string     `json:"path"`
	Model    string     `json:"model"`
	Began    time.Time  `json:"began"`
	Ended    *time.Time `json:"ended,omitempty"`
	Bytes    int        `json:"bytes"`
	Error    string     `json:"error,omitempty"`
	Location string     `json:"location"`
}

// survives reports whether the client wants the answer to go on without it, and whether it wants no
// answer but the place where to fetch it.
func survives(r *http.Request, ex *exchange) (survives, async bool) {
	if ex.prompt == prefix.None || ex.embed || ex.body == nil || ex.unread || ex.stranger || ex.warming != nil {
		return false, false
	}
	for _, value := range r.Header.Values("Prefer") {
		for one := range strings.SplitSeq(value, ",") {
			name, _, _ := strings.Cut(one, ";")
			async = async || strings.EqualFold(strings.TrimSpace(name), respondAsync)
		}
	}
	on, err := strconv.ParseBool(r.Header.Get(headerSurvive))
	return async || on && err == nil, async
}

// surviving reports whether the client wants the answer to go on without it.
func surviving(r *http.Request, ex *exchange) bool {
	on, _ := survives(r, ex)
	return on
}

// add makes an answer go on without its client, and returns its ID. It returns false if there are
// too many of them.
func (k *keptAnswers) add(a *keptAnswer) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.trim(time.Now())
	if len(k.list) >= keptMost {
		i := slices.IndexFunc(k.list, func(a *keptAnswer) bool { return !a.ended.IsZero() })
		if i < 0 {
			return false
		}
		k.list = slices.Delete(k.list, i, i+1)
	}
	a.flight.Keep()
	a.id, a.began = rand.Text(), time.Now()
	k.list = append(k.list, a)
	return true
}

// trim forgets what is too old, and the oldest of what is too much. k.mu must be held.
func (k *keptAnswers) trim(now time.Time) {
	total := 0
	for _, a := range k.list {
		n, ended, _ := a.flight.Progress()
		if ended && a.ended.IsZero() {
			a.ended = now
		}
		total += n
	}
	k.list = slices.DeleteFunc(k.list, func(a *keptAnswer) bool {
		if a.ended.IsZero() || now.Sub(a.ended) <= keptAge && total <= keptBytes {
			return false
		}
		n, _, _ := a.flight.Progress()
		total -= n
		return true
	})
}

// of returns a client's answers.
func (k *keptAnswers) of(owner string) (list []keptAnswer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.trim(time.Now())
	for _, a := range k.list {
		if a.owner == owner {
			list = append(list, *a)
		}
	}
	return list
}

// remove forgets an answer, and ends it if it is under way and nobody else waits for it: another
// client may have joined it.
func (k *keptAnswers) remove(a keptAnswer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.list = slices.DeleteFunc(k.list, func(b *keptAnswer) bool { return b.id == a.id })
	if !slices.ContainsFunc(k.list, func(b *keptAnswer) bool { return b.flight == a.flight }) {
		a.flight.Release()
	}
}

func (a keptAnswer) entry() keptEntry {
	n, _, err := a.flight.Progress()
	e := keptEntry{
		ID: a.id, Path: a.path, Model: a.model, Began: a.began, Bytes: n,
		Location: pathAnswers + "/" + a.id,
	}
	if !a.ended.IsZero() {
		e.Ended = &a.ended
	}
	if err != nil {
		e.Error = "the answer broke off"
	}
	return e
}

// answersPage is the content of pathAnswers.
type answersPage struct {
	Store   *storeEntry `json:"store,omitempty"`
	Modes   string      `json:"cache_answers"`    // the text of --cache-answers
	Vectors string      `json:"cache_embeddings"` // … and of --cache-embeddings
	// Kinds tell, by kind, what was looked for since Since, and what that saved. It is of all
	// clients together.
	Since time.Time   `json:"since"`
	Kinds cached      `json:"kinds"`
	Kept  []keptEntry `json:"surviving"` // this client's alone
	// Wiped is what was in the store before a DELETE.
	Wiped *storeEntry `json:"wiped,omitempty"`
	// Embeddings tell which models were seen to give the same vectors again.
	Embeddings []verdictEntry `json:"embeddings"`
}

// answersPages serves pathAnswers and what is below it.
func (h *Handler) answersPages(w http.ResponseWriter, r *http.Request, ex *exchange) {
	id := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, pathAnswers), "/")
	ex.Endpoint = pathAnswers
	list := h.kept.of(string(credentials(r, ex)))
	if id == "" {
		h.answersPage(w, r, ex, list)
		return
	}
	i := slices.IndexFunc(list, func(a keptAnswer) bool { return a.id == id })
	switch {
	case i < 0:
		h.refuse(w, r, ex, &refusal{http.StatusNotFound, fmt.Sprintf(
			"there is no answer %q of this client: they are kept for %v after their end, at most %d of all clients", id, keptAge, keptMost)})
	case r.Method == http.MethodDelete && ex.origin == "":
		h.kept.remove(list[i])
		ex.page(w, pathAnswers, http.StatusOK, list[i].entry())
	case r.Method == http.MethodGet:
		h.fetch(w, r, ex, list[i])
	default:
		h.refuse(w, r, ex, &refusal{http.StatusMethodNotAllowed, "want GET or DELETE " + pathAnswers + "/" + id})
	}
}

// answersPage tells what is kept, or forgets all of it.
func (h *Handler) answersPage(w http.ResponseWriter, r *http.Request, ex *exchange, list []keptAnswer) {
	page := answersPage{
		Modes: h.CacheAnswers.String(), Vectors: h.CacheEmbeddings.String(), Embeddings: h.vectors.verdicts(),
		Since: h.timeline.began,
		Kinds: h.timeline.counted().Cached, Kept: []keptEntry{},
	}
	if r.Method == http.MethodDelete {
		var ref *refusal
		if page.Wiped, ref = h.wipe(r, ex); ref != nil {
			h.refuse(w, r, ex, ref)
			return
		}
	} else if r.Method != http.MethodGet {
		h.refuse(w, r, ex, &refusal{
			http.StatusMethodNotAllowed, "want GET, or DELETE to forget all kept answers: " + pathAnswers,
		})
		return
	}
	page.Store = h.storeEntry()
	for _, a := range list {
		page.Kept = append(page.Kept, a.entry())
	}
	ex.page(w, pathAnswers, http.StatusOK, page)
}

// wipe forgets all kept answers and vectors, and returns what the store had. It leaves the answers
// that go on without their clients, which belong to these.
func (h *Handler) wipe(r *http.Request, ex *exchange) (was *storeEntry, ref *refusal) {
	switch {
	case ex.origin != "":
		return nil, &refusal{
			http.StatusForbidden, "this is not for web pages of another origin; send it without Origin",
		}
	case !ex.admin():
		return nil, ex.notAdmin()
	case h.Answers == nil:
		return nil, &refusal{http.StatusNotFound, "this proxy keeps no answers"}
	}
	was = h.storeEntry()
	if err := h.Answers.Wipe(r.Context()); err != nil {
		return nil, &refusal{
			http.StatusInternalServerError,
			fmt.Sprintf("the store could not be emptied: %v; try again when it can be used", err),
		}
	}
	h.Log.Info("kept answers wiped", "key_name", ex.Name)
	return was, nil
}

// accept answers 202 to a client that will fetch its answer.
func (ex *exchange) accept(w http.ResponseWriter, a keptAnswer) {
	w.Header().Set("Location", pathAnswers+"/"+a.id)
	w.Header().Set("Preference-Applied", respondAsync)
	w.Header().Set(headerAnswer, a.id)
	ex.page(w, ex.Endpoint, http.StatusAccepted, a.entry())
}

// fetch answers with a kept answer, from its beginning or from a line on, until its end.
func (h *Handler) fetch(w http.ResponseWriter, r *http.Request, ex *exchange, a keptAnswer) {
	from := 0
	if text := r.URL.Query().Get("from"); text != "" {
		var err error
		if from, err = strconv.Atoi(text); err != nil || from < 0 {
			h.refuse(w, r, ex, &refusal{http.StatusBadRequest, "from: want the number of the first line, or event, to send, such as ?from=20; the first one is 0"})
			return
		}
	}
	l := a.flight.Listen()
	if l == nil {
		h.refuse(w, r, ex, &refusal{http.StatusGone, "this answer has become longer than may be kept"})
		return
	}
	w.Header().Set(headerAnswer, a.id)
	h.listen(skip(w, from), r, ex, a.flight, l, nil)
}

// skipping is a writer that leaves out the first lines of a stream.
type skipping struct {
	http.ResponseWriter
	left int
	end  []byte // of a line, or of an event
	held []byte // the beginning of an end
}

// skip returns a writer that leaves out this many lines of NDJSON, or events.
func skip(w http.ResponseWriter, lines int) http.ResponseWriter {
	if lines == 0 {
		return w
	}
	return &skipping{ResponseWriter: w, left: lines}
}

func (s *skipping) WriteHeader(status int) {
	s.end = []byte("\n")
	if strings.HasPrefix(s.Header().Get("Content-Type"), "text/event-stream") {
		s.end = []byte("\n\n")
	}
	s.Header().Del("Content-Length")
	s.ResponseWriter.WriteHeader(status)
}

func (s *skipping) Write(p []byte) (int, error) {
	text := p
	if s.left > 0 {
		text = append(s.held, p...)
	}
	for s.left > 0 {
		i := bytes.Index(text, s.end)
		if i < 0 {
			s.held = slices.Clone(text[max(0, len(text)-len(s.end)+1):])
			return len(p), nil
		}
		text = text[i+len(s.end):]
		s.left--
	}
	if _, err := s.ResponseWriter.Write(text); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (s *skipping) Flush() {
	http.NewResponseController(s.ResponseWriter).Flush()
}

// Unwrap serves http.ResponseController.
func (s *skipping) Unwrap() http.ResponseWriter { return s.ResponseWriter }

var _ io.Writer = (*skipping)(nil)
