package batches

import (
	"encoding/json"
	"net/http"
	"slices"
)

// file is OpenAI's FileObject, and what else is kept of a file.
type file struct {
	fileObject
	Owner string `json:"owner"`
	Seq   int64  `json:"seq"` // the order of making
}

// fileObject is OpenAI's FileObject.
type fileObject struct {
	ID        string `json:"id"`
	Object    string `json:"object"`
	Bytes     int64  `json:"bytes"`
	CreatedAt int64  `json:"created_at"`
	ExpiresAt int64  `json:"expires_at,omitempty"`
	Filename  string `json:"filename"`
	Purpose   string `json:"purpose"`
	Status    string `json:"status"`
}

const (
	purposeBatch  = "batch"
	purposeOutput = "batch_output"
)

// status is the state of a batch, as OpenAI has it.
type status string

const (
	validating status = "validating"
	inProgress status = "in_progress"
	finalizing status = "finalizing"
	completed  status = "completed"
	failed     status = "failed"
	cancelling status = "cancelling"
	cancelled  status = "cancelled"
	expired    status = "expired"
)

// batchObject is OpenAI's Batch.
type batchObject struct {
	ID               string            `json:"id"`
	Object           string            `json:"object"`
	Endpoint         string            `json:"endpoint"`
	Model            string            `json:"model,omitempty"` // if all requests name the same one
	Errors           *errorList        `json:"errors"`
	InputFileID      string            `json:"input_file_id"`
	CompletionWindow string            `json:"completion_window"`
	Status           status            `json:"status"`
	OutputFileID     *string           `json:"output_file_id"`
	ErrorFileID      *string           `json:"error_file_id"`
	CreatedAt        int64             `json:"created_at"`
	InProgressAt     *int64            `json:"in_progress_at"`
	ExpiresAt        *int64            `json:"expires_at"`
	FinalizingAt     *int64            `json:"finalizing_at"`
	CompletedAt      *int64            `json:"completed_at"`
	FailedAt         *int64            `json:"failed_at"`
	ExpiredAt        *int64            `json:"expired_at"`
	CancellingAt     *int64            `json:"cancelling_at"`
	CancelledAt      *int64            `json:"cancelled_at"`
	RequestCounts    requestCounts     `json:"request_counts"`
	Usage            *usage            `json:"usage,omitempty"`
	Metadata         map[string]string `json:"metadata"`
}

type requestCounts struct {
	Total     int `json:"total"`
	Completed int `json:"completed"`
	Failed    int `json:"failed"`
}

// usage is in tokens.
type usage struct {
	Input        int `json:"input_tokens"`
	InputDetails struct {
		Cached int `json:"cached_tokens"`
	} `json:"input_tokens_details"`
	Output        int `json:"output_tokens"`
	OutputDetails struct {
		Reasoning int `json:"reasoning_tokens"` // always 0: Ollama does not count them apart
	} `json:"output_tokens_details"`
	Total int `json:"total_tokens"`
}

type errorList struct {
	Object string       `json:"object"`
	Data   []batchError `json:"data"`
}

// batchError is what is wrong with a batch, or with a line of its input.
type batchError struct {
	Code    string  `json:"code"`
	Message string  `json:"message"`
	Param   *string `json:"param"`
	Line    *int    `json:"line"`
}

func listErrors(list ...batchError) *errorList { return &errorList{"list", list} }

// apiError is an answer that is an error, in OpenAI's shape.
type apiError struct {
	status  int
	code    string // "": null
	param   string // "": null
	message string
}

func (e *apiError) Error() string { return e.message }

func (e *apiError) write(w http.ResponseWriter) {
	kind := "invalid_request_error"
	if e.status >= 500 {
		kind = "server_error"
	}
	own := map[string]any{"message": e.message, "type": kind, "param": nil, "code": nil}
	if e.code != "" {
		own["code"] = e.code
	}
	if e.param != "" {
		own["param"] = e.param
	}
	writeJSON(w, e.status, map[string]any{"error": own})
}

func writeJSON(w http.ResponseWriter, status int, content any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(content) // an error means that the client is gone
}

// page is a part of a list, in OpenAI's shape.
type page struct {
	Object  string `json:"object"`
	Data    []any  `json:"data"`
	FirstID any    `json:"first_id"`
	LastID  any    `json:"last_id"`
	HasMore bool   `json:"has_more"`
}

// pageOf returns the entries that follow the one with the id after; "" is before the first.
func pageOf[T any](
	list []T, id func(T) string, after string, limit int, show func(T) any,
) (page, bool) {
	p := page{Object: "list", Data: []any{}}
	from := 0
	if after != "" {
		i := slices.IndexFunc(list, func(e T) bool { return id(e) == after })
		if i < 0 {
			return p, false
		}
		from = i + 1
	}
	to := min(len(list), from+limit)
	for _, e := range list[from:to] {
		p.Data = append(p.Data, show(e))
	}
	if from < to {
		p.FirstID, p.LastID = id(list[from]), id(list[to-1])
	}
	p.HasMore = to < len(list)
	return p, true
}
