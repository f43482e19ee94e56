package batch

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// endpoints are the paths that a batch may use. Answers of others have parts that differ from run
// to run deep within them.
var endpoints = map[string]prefix.Endpoint{
	"/api/chat": prefix.Chat, "/api/generate": prefix.Generate, "/api/embed": prefix.Embed,
	"/v1/chat/completions": prefix.ChatCompletions, "/v1/completions": prefix.Completions, "/v1/embeddings": prefix.Embed,
}

// request is one parsed request.
type request struct {
	path     string
	endpoint prefix.Endpoint
	model    string // as written
	body     []byte // as in the input
	customID []byte // raw JSON; nil: none
	openAI   bool   // it is in OpenAI's batch form, and so is its result
}

// streams reports whether the answer is requested as a stream, so that its beginning is visible.
func (r *request) streams() bool { return r.endpoint != prefix.Embed }

// native reports whether the answer is in Ollama's own dialect.
func (r *request) native() bool { return strings.HasPrefix(r.path, "/api/") }

// parseRequest reads a line: a body of /api/chat, /api/generate or /api/embed, recognized by its
// messages, prompt or input, or OpenAI's batch form. A body may have a custom_id too, which Ollama
// ignores and the result repeats. With an error, the request has the custom_id and the form as far
// as they can be read.
func parseRequest(text []byte) (request, error) {
	top, err := members(text)
	r := request{customID: top["custom_id"], body: bytes.TrimSpace(text), openAI: inForm(top)}
	if err != nil {
		return r, err
	}
	if r.openAI {
		if err := r.form(top, top["body"]); err != nil {
			return r, err
		}
		r.body = top["body"]
		if top, err = members(r.body); err != nil {
			return r, fmt.Errorf("body: %w", err)
		}
	} else {
		switch {
		case top["messages"] != nil:
			r.path = "/api/chat"
		case top["prompt"] != nil:
			r.path = "/api/generate"
		case top["input"] != nil:
			r.path = "/api/embed"
		default:
			return r, errors.New("neither messages (/api/chat) nor prompt (/api/generate) nor input (/api/embed) is in it")
		}
		r.endpoint = endpoints[r.path]
	}
	var ok bool
	if r.model, ok = jsonscan.Unquote(top["model"]); !ok || r.model == "" {
		return r, errors.New(`no "model" is named`)
	}
	return r, r.check(top)
}

// inForm reports whether a line is in OpenAI's batch form.
func inForm(top map[string][]byte) bool { return top["body"] != nil || top["url"] != nil }

// form reads the members of OpenAI's batch form around the body.
func (r *request) form(top map[string][]byte, body []byte) error {
	if body == nil || body[0] != '{' {
		return errors.New(`"url" but no "body" that is an object`)
	}
	method, _ := jsonscan.Unquote(top["method"])
	if top["method"] != nil && !strings.EqualFold(method, http.MethodPost) {
		return fmt.Errorf("method %s: want POST", top["method"])
	}
	address, _ := jsonscan.Unquote(top["url"])
	u, err := url.Parse(address)
	if err != nil {
		return fmt.Errorf("url: %w", err)
	}
	r.path = strings.TrimSuffix(u.Path, "/")
	var known bool
	if r.endpoint, known = endpoints[r.path]; !known {
		return fmt.Errorf("url %q: want one of /v1/chat/completions, /v1/completions, /v1/embeddings, /api/chat, /api/generate, /api/embed", address)
	}
	return nil
}

// check refuses a request that would only load a model.
func (r *request) check(top map[string][]byte) error {
	name, kinds := "prompt", `"`
	switch r.endpoint {
	case prefix.Chat, prefix.ChatCompletions:
		name, kinds = "messages", "["
	case prefix.Embed:
		name, kinds = "input", `"[`
	case prefix.Completions:
		kinds = `"[`
	}
	value := top[name]
	if value == nil || !strings.ContainsRune(kinds, rune(value[0])) {
		return fmt.Errorf("%s needs %q, a %s", r.path, name, map[byte]string{'[': "list", '"': "text"}[kinds[0]])
	}
	if string(value) == `""` || len(bytes.TrimSpace(value[1:len(value)-1])) == 0 && value[0] == '[' {
		return fmt.Errorf("%q is empty: the request would only load the model", name)
	}
	return nil
}

// members returns the raw values of a text that is one object, by the names that Ollama looks for:
// case is ignored, the last one wins, null is ignored. With an error, it returns the members before
// the error.
func members(text []byte) (map[string][]byte, error) {
	found := map[string][]byte{}
	o := jsonscan.NewObject(text)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		key, value := text[m.Key:m.KeyEnd], text[m.Value:m.ValueEnd]
		name, _ := jsonscan.Unquote(key)
		name = strings.ToLower(name)
		if value[0] != 'n' {
			found[name] = value
		} else {
			delete(found, name)
		}
	}
	err := o.Err()
	if err == nil {
		if len(bytes.TrimSpace(text[o.End():])) > 0 {
			return found, errors.New("more text after the object")
		}
		return found, nil
	}
	var whole json.RawMessage
	var syntax *json.SyntaxError
	if e := json.Unmarshal(text, &whole); errors.As(e, &syntax) {
		return found, fmt.Errorf("invalid JSON at byte %d: %w", syntax.Offset, e)
	}
	return found, err
}

// sent returns the body to send: unchanged except for "stream", which is absent or true for
// Ollama's own endpoints and true for OpenAI's, where the counts are requested as well.
func (r *request) sent() []byte {
	if !r.streams() {
		return r.body
	}
	out := make([]byte, 0, len(r.body)+64)
	from, stream, options := 0, false, false
	o := jsonscan.NewObject(r.body)
	for m, ok := o.Next(); ok; m, ok = o.Next() {
		key := r.body[m.Key:m.KeyEnd]
		value := ""
		switch {
		case jsonscan.KeyIs(key, []byte("stream")):
			value, stream = "true", true
		case jsonscan.KeyIs(key, []byte("stream_options")) && !r.native():
			value, options = `{"include_usage":true}`, true
		default:
			continue
		}
		out = append(append(out, r.body[from:m.Value]...), value...)
		from = m.ValueEnd
	}
	out = append(out, r.body[from:]...)
	var more string
	if !stream && !r.native() {
		more = `"stream":true,`
	}
	if !options && !r.native() {
		more += `"stream_options":{"include_usage":true},`
	}
	return slices.Insert(out, o.Open(), []byte(more)...)
}

// runner is what a chain is read for: the model, to which most spellings of its name reduce.
func (r *request) runner() string {
	name := strings.ToLower(r.model)
	name = strings.TrimPrefix(strings.TrimPrefix(name, "registry.ollama.ai/"), "library/")
	if i := strings.LastIndexByte(name, '/'); !strings.Contains(name[i+1:], ":") {
		name += ":latest"
	}
	return name
}

// quoted returns text as JSON, with the fewest escapes.
func quoted(text string) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(text); err != nil {
		panic(err) // any text can be encoded
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// failure is why a request was not answered.
type failure struct {
	Status  int             // of the answer; 0: there was none
	Code    string          // one word
	Message string          // for display
	Body    json.RawMessage // of the answer, if it is JSON
}

// Codes of failures.
const (
	codeInvalid = "invalid_request" // the line is invalid
	codeRefused = "refused"         // by the server's status
	codeTimeout = "timeout"         // --request-timeout
	codeBroken  = "broken"          // no answer, or it broke off
)

// result returns the output line for a request. It does not depend on when or how often the request
// was sent.
func (r *request) result(line int, answer []byte, f *failure) []byte {
	var b []byte
	if !r.openAI {
		b = fmt.Appendf(b, `{"line":%d`, line)
		if r.customID != nil {
			b = fmt.Appendf(b, `,"custom_id":%s`, compacted(r.customID))
		}
		if f == nil {
			return fmt.Appendf(b, `,"response":%s}`, answer)
		}
		b = fmt.Appendf(b, `,"error":{"code":%q`, f.Code)
		if f.Status != 0 {
			b = fmt.Appendf(b, `,"status":%d`, f.Status)
		}
		return fmt.Appendf(b, `,"message":%s}}`, quoted(f.Message))
	}
	id := cmp.Or(string(compacted(r.customID)), "null")
	b = fmt.Appendf(b, `{"id":"batch_req_%d","custom_id":%s,"response":`, line, id)
	if f == nil {
		return fmt.Appendf(b, `{"status_code":200,"request_id":"req_%d","body":%s},"error":null}`, line, answer)
	}
	if f.Status == 0 {
		b = append(b, "null"...)
	} else {
		b = fmt.Appendf(b, `{"status_code":%d,"request_id":"req_%d","body":%s}`, f.Status, line, cmp.Or(string(compacted(f.Body)), "null"))
	}
	return fmt.Appendf(b, `,"error":{"code":%q,"message":%s}}`, f.Code, quoted(f.Message))
}

// again returns the line for the errors file, with which the request can be sent again. The line
// number becomes the custom_id of one that has none.
func (r *request) again(line int) []byte {
	if r.openAI || r.customID != nil {
		return nil // as in the input
	}
	body := compacted(r.body)
	o := jsonscan.NewObject(body)
	return slices.Insert(body, o.Open(), fmt.Appendf(nil, `"custom_id":"line %d",`, line)...)
}

// compacted returns a JSON text without white space between its tokens, or nil for none.
func compacted(text []byte) []byte {
	if text == nil {
		return nil
	}
	var b bytes.Buffer
	if err := json.Compact(&b, text); err != nil {
		return text // returned as it is; the input was checked
	}
	return b.Bytes()
}
