package batches

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime/multipart"
	"net/http"
	"os"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

const (
	maxField    = 1 << 10 // bytes of a form's field other than the file
	maxFilename = 512     // bytes
	maxCreate   = 64 << 10
	maxForm     = 1 << 20 // bytes of a form around the file
	maxMetadata = 16      // OpenAI's limits, for entries, and characters of keys and values
	maxKey      = 64
	maxValue    = 512

	// OpenAI's limits for expires_after, in seconds.
	leastKept = 3600
	mostKept  = 2592000

	shortestWindow = time.Second
	longestWindow  = 30 * 24 * time.Hour
)

// endpoints are the paths that a batch may be for.
var endpoints = []string{"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}

func (s *Service) routes() {
	s.mux = http.NewServeMux()
	for pattern, serve := range map[string]func(http.ResponseWriter, *http.Request, string) error{
		"POST /v1/files":               s.upload,
		"GET /v1/files":                s.listFiles,
		"GET /v1/files/{id}":           s.showFile,
		"GET /v1/files/{id}/content":   s.content,
		"DELETE /v1/files/{id}":        s.deleteFile,
		"POST /v1/batches":             s.create,
		"GET /v1/batches":              s.listBatches,
		"GET /v1/batches/{id}":         s.showBatch,
		"POST /v1/batches/{id}/cancel": s.cancelBatch,
	} {
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			err := serve(w, r, s.Owner(r))
			if err == nil {
				return
			}
			refused, ok := errors.AsType[*apiError](err)
			if !ok {
				refused = s.broken(err)
			}
			refused.write(w)
		})
	}
}

// ServeHTTP serves /v1/files and /v1/batches.
func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, pattern := s.mux.Handler(r)
	if pattern == "" {
		(&apiError{
			status: http.StatusNotFound, code: "unknown_url",
			message: fmt.Sprintf("unknown request: %s %s", r.Method, r.URL.Path),
		}).write(w)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// broken is the answer when the folder cannot be used.
func (s *Service) broken(err error) *apiError {
	s.Log.Warn("a request for files or batches has failed", "err", err)
	if noSpace(err) {
		return &apiError{
			status: http.StatusInsufficientStorage, code: "disk_full",
			message: "the disk of the proxy is full: nothing of this was kept; " +
				"send it again when there is room",
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return &apiError{
			status: http.StatusInternalServerError, code: "storage_removed",
			message: "the proxy's folder of files and batches was removed while it ran: start the proxy " +
				"again, and send this again",
		}
	}
	return &apiError{
		status: http.StatusInternalServerError, code: "storage_failed",
		message: "the proxy could not use its folder of files and batches; its log says why",
	}
}

func noFile(id string) *apiError {
	return &apiError{http.StatusNotFound, "", "id", fmt.Sprintf("No such File object: %s", id)}
}

func noBatch(id string) *apiError {
	return &apiError{http.StatusNotFound, "", "id", fmt.Sprintf("No batch found with id '%s'.", id)}
}

func invalid(param, format string, args ...any) *apiError {
	return &apiError{http.StatusBadRequest, "invalid_value", param, fmt.Sprintf(format, args...)}
}

// form is what an upload states.
type form struct {
	purpose, filename string
	anchor, seconds   string // of expires_after
	bytes             int64
	file              bool
}

// upload is POST /v1/files.
func (s *Service) upload(w http.ResponseWriter, r *http.Request, owner string) (err error) {
	r.Body = http.MaxBytesReader(w, r.Body, MaxFile+maxForm)
	parts, err := r.MultipartReader()
	if err != nil {
		return invalid("", "want a form (multipart/form-data) with purpose and file: %v", err)
	}
	f := &file{
		fileObject: fileObject{ID: newID("file-"), Object: "file", Status: "processed"}, Owner: owner,
	}
	var told form
	data := s.path(filesFolder, f.ID+dataSuffix)
	defer func() {
		if err != nil {
			os.Remove(data) // it may not exist
		}
	}()
	for {
		part, err := parts.NextPart()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = s.part(part, &told, data)
		}
		if err != nil {
			return readError(err)
		}
	}
	f.Filename, f.Bytes, f.Purpose = told.filename, told.bytes, told.purpose
	f.CreatedAt = time.Now().Unix()
	if f.ExpiresAt, err = s.expiry(told, f.CreatedAt); err != nil {
		return err
	}
	switch {
	case !told.file:
		return invalid("file", "Missing required parameter: 'file'.")
	case told.purpose == "":
		return invalid("purpose", "Missing required parameter: 'purpose'.")
	case told.purpose != purposeBatch:
		return invalid("purpose",
			"purpose %q: this proxy keeps files for batches only: want batch", told.purpose)
	case f.Bytes == 0:
		return invalid("file", "the file is empty")
	}
	if err := s.keep(f); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, f.fileObject)
	return nil
}

// keep makes an uploaded file known.
func (s *Service) keep(f *file) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.files) >= maxObjects {
		return &apiError{
			http.StatusForbidden, "too_many_files", "", "there are too many files; delete some",
		}
	}
	return s.addFile(f)
}

// addFile makes a file known whose data has been written. s.mu is held.
func (s *Service) addFile(f *file) error {
	s.seq++
	f.Seq = s.seq
	if err := s.writeMeta(filesFolder, f.ID, f); err != nil {
		return err
	}
	if old := s.files[f.ID]; old != nil { // an output that was written again
		s.stored -= old.Bytes
	}
	s.files[f.ID] = f
	s.stored += f.Bytes
	return nil
}

// readError tells what the client sent wrong from what is wrong here.
func readError(err error) error {
	_, refused := errors.AsType[*apiError](err)
	_, path := errors.AsType[*os.PathError](err)
	if refused || path {
		return err
	}
	if _, long := errors.AsType[*http.MaxBytesError](err); long {
		return tooLarge()
	}
	return &apiError{
		status: http.StatusBadRequest, code: "invalid_form",
		message: fmt.Sprintf("reading the form: %v; send it again", err),
	}
}

// part reads one part of an upload's form.
func (s *Service) part(part *multipart.Part, told *form, data string) error {
	defer part.Close()
	fields := map[string]*string{
		"purpose": &told.purpose, "expires_after[anchor]": &told.anchor,
		"expires_after[seconds]": &told.seconds,
	}
	name := part.FormName()
	if name != "file" {
		text, err := io.ReadAll(io.LimitReader(part, maxField+1))
		if err != nil {
			return err
		}
		if to := fields[name]; to != nil {
			if len(text) > maxField {
				return invalid(name, "the field is longer than %d bytes", maxField)
			}
			*to = string(text)
		}
		return nil
	}
	if told.file {
		return invalid("file", "the form has two files: send one")
	}
	told.file, told.filename = true, part.FileName()
	if len(told.filename) > maxFilename || !utf8.ValidString(told.filename) {
		return invalid("file", "the file's name is longer than %d bytes, or no UTF-8", maxFilename)
	}
	var err error
	told.bytes, err = s.save(data, part)
	return err
}

// save writes the data of an upload, and counts it on the way.
func (s *Service) save(path string, from io.Reader) (n int64, err error) {
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	c := &counted{s: s, to: to}
	defer c.end()
	n, err = io.Copy(c, io.LimitReader(from, MaxFile+1))
	if err == nil && n > MaxFile {
		err = tooLarge()
	}
	if err == nil {
		err = to.Sync()
	}
	if closed := to.Close(); err == nil {
		err = closed
	}
	return n, err
}

func tooLarge() error {
	return &apiError{
		http.StatusRequestEntityTooLarge, "file_too_large", "file",
		fmt.Sprintf("the file is larger than %d bytes (%d MiB); divide it", MaxFile, MaxFile>>20),
	}
}

// counted counts what is written to a file while it is not yet known.
type counted struct {
	s  *Service
	to io.Writer
	n  int64
}

func (c *counted) Write(p []byte) (int, error) {
	c.s.mu.Lock()
	full := c.s.used()+int64(len(p)) > c.s.Bytes
	if !full {
		c.s.arriving += int64(len(p))
		c.n += int64(len(p))
	}
	c.s.mu.Unlock()
	if full {
		return 0, &apiError{
			http.StatusRequestEntityTooLarge, "storage_full", "file",
			fmt.Sprintf("all files together would have more than the %d bytes that they may have "+
				"(--batches-bytes); delete some", c.s.Bytes),
		}
	}
	return c.to.Write(p)
}

// end ends the counting: the file is known by now, or there is none.
func (c *counted) end() {
	c.s.mu.Lock()
	c.s.arriving -= c.n
	c.s.mu.Unlock()
}

// expiry returns when a file expires; 0: never.
func (s *Service) expiry(told form, created int64) (int64, error) {
	kept := int64(s.TTL / time.Second)
	if told.anchor == "" && told.seconds == "" {
		return expires(kept, 0, created), nil
	}
	n, err := strconv.ParseInt(told.seconds, 10, 64)
	if err != nil || told.anchor != "created_at" || n < leastKept || n > mostKept {
		return 0, invalid("expires_after",
			"expires_after: want anchor created_at, and seconds from %d to %d", leastKept, mostKept)
	}
	return expires(kept, n, created), nil
}

// expires returns when what is kept for so many seconds expires, of which the shorter time counts;
// 0 is for ever.
func expires(kept, asked, created int64) int64 {
	if asked > 0 && (kept == 0 || asked < kept) {
		kept = asked
	}
	if kept == 0 {
		return 0
	}
	return created + kept
}

// query reads the parameters of a list.
func query(
	r *http.Request, unless, most int,
) (after string, limit int, descending bool, err error) {
	q := r.URL.Query()
	limit, err = strconv.Atoi(cmp.Or(q.Get("limit"), strconv.Itoa(unless)))
	if err != nil || limit < 1 || limit > most {
		return "", 0, false,
			invalid("limit", "limit %q: want a number from 1 to %d", q.Get("limit"), most)
	}
	switch order := cmp.Or(q.Get("order"), "desc"); order {
	case "asc", "desc":
		return q.Get("after"), limit, order == "desc", nil
	default:
		return "", 0, false, invalid("order", "order %q: want asc or desc", order)
	}
}

// listFiles is GET /v1/files.
func (s *Service) listFiles(w http.ResponseWriter, r *http.Request, owner string) error {
	after, limit, descending, err := query(r, 10_000, 10_000)
	if err != nil {
		return err
	}
	purpose := r.URL.Query().Get("purpose")
	s.mu.Lock()
	var list []*file
	for _, f := range s.files {
		if f.Owner == owner && (purpose == "" || f.Purpose == purpose) {
			list = append(list, f)
		}
	}
	s.mu.Unlock() // a file does not change once it is known
	slices.SortFunc(list, func(a, b *file) int { return cmp.Compare(a.Seq, b.Seq) })
	if descending {
		slices.Reverse(list)
	}
	show := func(f *file) any { return f.fileObject }
	p, ok := pageOf(list, func(f *file) string { return f.ID }, after, limit, show)
	if !ok {
		return invalid("after", "after: there is no file %q in this list", after)
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

// fileOf returns an owner's file.
func (s *Service) fileOf(r *http.Request, owner string) (*file, error) {
	id := r.PathValue("id")
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[id]; f != nil && f.Owner == owner {
		return f, nil
	}
	return nil, noFile(id)
}

// showFile is GET /v1/files/{id}.
func (s *Service) showFile(w http.ResponseWriter, r *http.Request, owner string) error {
	f, err := s.fileOf(r, owner)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, f.fileObject)
	return nil
}

// content is GET /v1/files/{id}/content.
func (s *Service) content(w http.ResponseWriter, r *http.Request, owner string) error {
	f, err := s.fileOf(r, owner)
	if err != nil {
		return err
	}
	data, err := os.Open(s.path(filesFolder, f.ID+dataSuffix))
	if errors.Is(err, os.ErrNotExist) {
		return noFile(f.ID) // deleted in between
	}
	if err != nil {
		return err
	}
	defer data.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	http.ServeContent(w, r, "", time.Time{}, data)
	return nil
}

// deleteFile is DELETE /v1/files/{id}.
func (s *Service) deleteFile(w http.ResponseWriter, r *http.Request, owner string) error {
	f, err := s.fileOf(r, owner)
	if err != nil {
		return err
	}
	if err := s.forget(f); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]any{"id": f.ID, "object": "file", "deleted": true})
	return nil
}

// forget removes a file that no batch reads.
func (s *Service) forget(f *file) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[f.ID] == nil {
		return noFile(f.ID)
	}
	if j := s.userOf(f.ID); j != nil {
		return &apiError{
			http.StatusBadRequest, "file_in_use", "id",
			fmt.Sprintf("batch %s reads this file: cancel it, or wait for its end", j.ID),
		}
	}
	return s.removeFile(f)
}

// createRequest is the body of POST /v1/batches.
type createRequest struct {
	InputFileID      string            `json:"input_file_id"`
	Endpoint         string            `json:"endpoint"`
	CompletionWindow string            `json:"completion_window"`
	Metadata         map[string]string `json:"metadata"`
	Output           *struct {
		Anchor  string `json:"anchor"`
		Seconds int64  `json:"seconds"`
	} `json:"output_expires_after"`
}

// check returns the completion window.
func (c *createRequest) check() (time.Duration, error) {
	for name, value := range map[string]string{
		"input_file_id": c.InputFileID, "endpoint": c.Endpoint, "completion_window": c.CompletionWindow,
	} {
		if value == "" {
			return 0, &apiError{
				http.StatusBadRequest, "missing_required_parameter", name,
				fmt.Sprintf("Missing required parameter: '%s'.", name),
			}
		}
	}
	if !slices.Contains(endpoints, c.Endpoint) {
		return 0, invalid("endpoint", "endpoint %q: want one of %v", c.Endpoint, endpoints)
	}
	window, err := time.ParseDuration(c.CompletionWindow)
	if err != nil || window < shortestWindow || window > longestWindow {
		return 0, invalid("completion_window",
			"completion_window %q: want 24h, or another time from %v to %v",
			c.CompletionWindow, shortestWindow, longestWindow)
	}
	o := c.Output
	if o != nil && (o.Anchor != "created_at" || o.Seconds < leastKept || o.Seconds > mostKept) {
		return 0, invalid("output_expires_after",
			"output_expires_after: want anchor created_at, and seconds from %d to %d", leastKept, mostKept)
	}
	return window, checkMetadata(c.Metadata)
}

func checkMetadata(m map[string]string) error {
	if len(m) > maxMetadata {
		return invalid("metadata", "metadata: want at most %d entries", maxMetadata)
	}
	for key, value := range m {
		if utf8.RuneCountInString(key) > maxKey || utf8.RuneCountInString(value) > maxValue {
			return invalid("metadata",
				"metadata: want keys of at most %d characters, and values of at most %d", maxKey, maxValue)
		}
	}
	return nil
}

// create is POST /v1/batches.
func (s *Service) create(w http.ResponseWriter, r *http.Request, owner string) error {
	var c createRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxCreate)).Decode(&c); err != nil {
		return invalid("", "the body is not what a batch is made of: %v", err)
	}
	window, err := c.check()
	if err != nil {
		return err
	}
	now := time.Now()
	expiresAt := now.Add(window).Unix()
	j := &job{
		batchObject: batchObject{
			ID: newID("batch_"), Object: "batch", Endpoint: c.Endpoint, InputFileID: c.InputFileID,
			CompletionWindow: c.CompletionWindow, Status: validating, CreatedAt: now.Unix(),
			ExpiresAt: &expiresAt, Metadata: c.Metadata,
		},
		Owner: owner,
	}
	if c.Output != nil {
		j.OutputKept = c.Output.Seconds
	}
	shown, err := s.add(j)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, shown)
	return nil
}

// add makes a batch known, and begins with it.
func (s *Service) add(j *job) (batchObject, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[j.InputFileID]
	switch {
	case f == nil || f.Owner != j.Owner:
		return batchObject{}, invalid("input_file_id", "there is no file %q", j.InputFileID)
	case f.Purpose != purposeBatch:
		return batchObject{},
			invalid("input_file_id", "file %q has the purpose %s: want batch", f.ID, f.Purpose)
	case len(s.batches) >= maxObjects:
		return batchObject{}, &apiError{
			http.StatusForbidden, "too_many_batches", "", "there are too many batches",
		}
	}
	s.seq++
	j.Seq = s.seq
	if err := s.writeMeta(batchesFolder, j.ID, j); err != nil {
		return batchObject{}, err
	}
	s.batches[j.ID] = j
	if s.start != nil && !s.drained { // otherwise it begins with the next start
		s.start(j)
	}
	return j.shown(), nil
}

// listBatches is GET /v1/batches.
func (s *Service) listBatches(w http.ResponseWriter, r *http.Request, owner string) error {
	after, limit, descending, err := query(r, 20, 100)
	if err != nil {
		return err
	}
	s.mu.Lock()
	list := s.sorted(func(j *job) bool { return j.Owner == owner })
	if descending {
		slices.Reverse(list)
	}
	show := func(j *job) any { return j.shown() }
	p, ok := pageOf(list, func(j *job) string { return j.ID }, after, limit, show)
	s.mu.Unlock()
	if !ok {
		return invalid("after", "after: there is no batch %q in this list", after)
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

// showBatch is GET /v1/batches/{id}.
func (s *Service) showBatch(w http.ResponseWriter, r *http.Request, owner string) error {
	id := r.PathValue("id")
	s.mu.Lock()
	j := s.batches[id]
	if j == nil || j.Owner != owner {
		s.mu.Unlock()
		return noBatch(id)
	}
	shown := j.shown()
	s.mu.Unlock()
	writeJSON(w, http.StatusOK, shown)
	return nil
}

// cancelBatch is POST /v1/batches/{id}/cancel.
func (s *Service) cancelBatch(w http.ResponseWriter, r *http.Request, owner string) error {
	shown, err := s.cancel(r.PathValue("id"), owner)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, shown)
	return nil
}

func (s *Service) cancel(id, owner string) (batchObject, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.batches[id]
	switch {
	case j == nil || j.Owner != owner:
		return batchObject{}, noBatch(id)
	case j.Status == cancelling || j.Status == cancelled:
		return j.shown(), nil
	case j.Status != validating && j.Status != inProgress:
		return batchObject{}, &apiError{
			http.StatusBadRequest, "invalid_status", "",
			fmt.Sprintf("Cannot cancel a batch with status '%s'.", j.Status),
		}
	}
	if err := s.decide(j, cancelled); err != nil {
		return batchObject{}, err
	}
	if j.cancel != nil {
		j.cancel(errOver)
	}
	return j.shown(), nil
}
