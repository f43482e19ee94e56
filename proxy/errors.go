package proxy

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
)

// refusal is an answer of the proxy itself, in the dialect of the requested path.
type refusal struct {
	status  int
	message string // lower case: what happened, and what to do next
}

// Error makes refusal an error, for functions that return one.
func (e *refusal) Error() string { return e.message }

// write sends the refusal: {"error": "…"} as Ollama does, {"error": {"message": …}} under /v1, Anthropic's shape under
// /v1/messages. It returns the body's length in bytes.
func (e *refusal) write(w http.ResponseWriter, path string) int {
	text := marshal(e.body(path))
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(e.status)
	w.Write(text) // if the client is gone, there is nobody to report an error to
	return len(text)
}

func (e *refusal) body(path string) map[string]any {
	switch {
	case isAnthropic(path):
		own := map[string]any{"type": anthropicType(e.status), "message": e.message}
		return map[string]any{"type": "error", "error": own}
	case strings.HasPrefix(path, "/v1/"):
		return map[string]any{"error": map[string]any{
			"message": e.message, "type": openAIType(e.status), "param": nil, "code": nil,
		}}
	}
	return map[string]any{"error": e.message}
}

// event writes the refusal as the last event of a stream, in the dialect of the path. told is the
// error as the upstream wrote it; if that is not an object, the refusal's own message is used.
func (e *refusal) event(path string, told json.RawMessage) string {
	body := e.body(path)
	if fields := map[string]any(nil); json.Unmarshal(told, &fields) == nil && fields != nil {
		body["error"] = fields
	}
	switch {
	case isAnthropic(path):
	case path == "/v1/responses":
		own := body["error"].(map[string]any)
		body["type"] = "error"
		for _, field := range []string{"message", "code", "param"} {
			body[field] = own[field]
		}
	default:
		return "data: " + string(marshal(body)) + "\n\n"
	}
	return "event: error\ndata: " + string(marshal(body)) + "\n\n"
}

// marshal writes a value that is known to be valid JSON.
func marshal(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps, strings and parsed JSON always marshal
	}
	return text
}

// isAnthropic reports whether a path uses Anthropic's dialect.
func isAnthropic(path string) bool {
	return path == "/v1/messages" || strings.HasPrefix(path, "/v1/messages/")
}

func openAIType(status int) string {
	switch status {
	case http.StatusBadRequest:
		return "invalid_request_error"
	case http.StatusUnauthorized:
		return "authentication_error"
	case http.StatusForbidden:
		return "permission_error"
	case http.StatusTooManyRequests:
		return "rate_limit_error"
	}
	return "api_error"
}

func anthropicType(status int) string {
	if status == http.StatusServiceUnavailable {
		return "overloaded_error"
	}
	return openAIType(status)
}
