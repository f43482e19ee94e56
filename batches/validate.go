package batches

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/batch"
)

const (
	maxErrors = 100      // of an input that are shown
	maxLine   = 64 << 20 // bytes of a line: package batch reads no longer one
	maxModels = 100      // that one batch may name
)

// Codes of what is wrong with a batch.
const (
	codeLine    = "invalid_json_line"
	codeMissing = "missing_required_parameter"
	codeTwice   = "duplicate_custom_id"
	codeURL     = "invalid_url"
	codeMethod  = "invalid_method"
	codeModel   = "model_not_found"
	codeEmpty   = "empty_file"
	codeMany    = "too_many_requests"
	codeModels  = "too_many_models"
	codeKey     = "invalid_api_key"
	codeLost    = "input_file_missing"
)

var utf8Mark = []byte("\xef\xbb\xbf")

// input is what a check of a batch's file found.
type input struct {
	endpoint string
	requests int
	ids      map[string]struct{}
	models   map[string]int // the first line of each
	errors   []batchError
}

// line is a line of a batch's file.
type line struct {
	CustomID json.RawMessage `json:"custom_id"`
	Method   string          `json:"method"`
	URL      string          `json:"url"`
	Body     json.RawMessage `json:"body"`
}

func lineError(number int, code, param, message string) batchError {
	e := batchError{Code: code, Message: message, Line: &number}
	if param != "" {
		e.Param = &param
	}
	return e
}

func missing(number int, param string) batchError {
	return lineError(number, codeMissing, param,
		fmt.Sprintf("Missing required parameter: '%s'.", param))
}

func noModel(model string, number int) batchError {
	said := fmt.Sprintf("model '%s' is not on the server: pull it (ollama pull %[1]s)", model)
	return lineError(number, codeModel, "body.model", said)
}

// validate reads a batch's file, asks for its models, and notes that it may begin.
func (s *Service) validate(ctx context.Context, j *job, sender *sender) error {
	f, err := os.Open(s.path(filesFolder, j.InputFileID+dataSuffix))
	if err != nil {
		return lost(err)
	}
	defer f.Close()
	in, err := readInput(ctx, f, j.Endpoint)
	if err != nil {
		return fmt.Errorf("reading the input: %w", err)
	}
	if len(in.errors) == 0 {
		if err := s.lookFor(ctx, j, sender, in); err != nil {
			return err
		}
	}
	if len(in.errors) > 0 {
		return &badInput{in.errors}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.Outcome != "" {
		return errOver
	}
	return s.set(j, func() {
		now := time.Now().Unix()
		j.Status, j.InProgressAt, j.Errors = inProgress, &now, nil
		j.RequestCounts.Total = in.requests
		if len(in.models) == 1 {
			for j.Model = range in.models {
			}
		}
	})
}

// lost tells an input that is gone, which no pause brings back, from another error.
func lost(err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return &badInput{[]batchError{{
		Code: codeLost, Message: "The input file is gone from the folder of the proxy.",
	}}}
}

// lookFor finds the models that the server lacks.
func (s *Service) lookFor(ctx context.Context, j *job, sender *sender, in *input) error {
	survey := &batch.Survey{Models: in.models} // only the names count
	config := s.config(j, sender)
	config.Log = slog.New(slog.DiscardHandler)
	absent, err := config.AbsentModels(ctx, survey)
	if err != nil {
		return err
	}
	for _, model := range absent {
		in.add(noModel(model, in.models[model]))
	}
	return nil
}

// readInput checks each line of a batch's file. An error is one of reading.
func readInput(ctx context.Context, r io.Reader, endpoint string) (*input, error) {
	in := &input{endpoint: endpoint, ids: map[string]struct{}{}, models: map[string]int{}}
	number := 0
	err := eachLine(ctx, r, func(n int, text []byte) {
		number = n
		in.read(n, text)
	})
	switch {
	case errors.Is(err, bufio.ErrTooLong):
		in.add(lineError(number+1, codeLine, "",
			fmt.Sprintf("This line is longer than %d MiB.", maxLine>>20)))
	case err != nil:
		return nil, err
	case in.requests == 0:
		in.add(batchError{Code: codeEmpty, Message: "The provided batch file is empty."})
	case in.requests > MaxRequests:
		in.add(batchError{Code: codeMany, Message: fmt.Sprintf(
			"The file has %d requests, and may have %d: divide it.", in.requests, MaxRequests)})
	}
	if len(in.models) > maxModels {
		in.add(batchError{Code: codeModels, Message: fmt.Sprintf(
			"The file names %d models, and may name %d: divide it.", len(in.models), maxModels)})
	}
	return in, nil
}

// eachLine calls f for each line that is not blank, with its number, until ctx ends.
func eachLine(ctx context.Context, r io.Reader, f func(number int, text []byte)) error {
	scanner := bufio.NewScanner(r)
	scanner.Buffer(make([]byte, 64<<10), maxLine)
	for number := 1; scanner.Scan(); number++ {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		text := scanner.Bytes()
		if number == 1 {
			text = bytes.TrimPrefix(text, utf8Mark)
		}
		if text = bytes.TrimSpace(text); len(text) > 0 {
			f(number, text)
		}
	}
	return scanner.Err()
}

func (in *input) add(e batchError) {
	if len(in.errors) < maxErrors {
		in.errors = append(in.errors, e)
	}
}

// read checks one line.
func (in *input) read(number int, text []byte) {
	if in.requests++; in.requests > MaxRequests {
		return // they are only counted
	}
	var l line
	if text[0] != '{' || !utf8.Valid(text) || json.Unmarshal(text, &l) != nil {
		in.add(lineError(number, codeLine, "", "This line is not parseable as valid JSON."))
		return
	}
	if e, wrong := l.wrong(number, in.endpoint); wrong {
		in.add(e)
		return
	}
	id, _ := textOf(l.CustomID)
	if _, twice := in.ids[id]; twice {
		in.add(lineError(number, codeTwice, "custom_id",
			"The custom_id for this request is a duplicate of another request. "+
				"The custom_id parameter must be unique for each request in a batch."))
		return
	}
	in.ids[id] = struct{}{}
	var body struct{ Model string }
	switch {
	case len(l.Body) == 0 || l.Body[0] != '{':
		in.add(missing(number, "body"))
	case json.Unmarshal(l.Body, &body) != nil || body.Model == "":
		in.add(missing(number, "body.model"))
	case in.models[body.Model] == 0:
		in.models[body.Model] = number
	}
}

// textOf returns the text that a JSON text is.
func textOf(raw json.RawMessage) (text string, ok bool) {
	ok = json.Unmarshal(raw, &text) == nil && text != ""
	return text, ok
}

// wrong returns what is wrong with the members around a line's body.
func (l *line) wrong(number int, endpoint string) (batchError, bool) {
	_, named := textOf(l.CustomID)
	switch {
	case !named:
		return missing(number, "custom_id"), true
	case l.Method == "":
		return missing(number, "method"), true
	case !strings.EqualFold(l.Method, "POST"):
		return lineError(number, codeMethod, "method", "The method must be POST."), true
	case l.URL == "":
		return missing(number, "url"), true
	case l.URL != endpoint:
		return lineError(number, codeURL, "url", fmt.Sprintf(
			"The URL provided for this request does not match the batch endpoint, %s.", endpoint)), true
	}
	return batchError{}, false
}
