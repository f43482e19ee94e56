package proxy

import (
	"net/http"
	"path"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
)

// reads is how much of a request's body the proxy reads before it forwards the request.
type reads int

const (
	readsNothing reads = iota // the body passes through as it arrives
	readsNative               // JSON with a model and perhaps keep_alive: Ollama's own inference endpoints
	readsForeign              // JSON with a model, in a dialect without keep_alive
	readsName                 // JSON with a model, read only to find the upstream that has it
)

// route is the meaning of a path and method. Requests that the proxy does not know pass through.
type route struct {
	label  string // from a bounded set, for metrics
	reads  reads
	embed  bool            // asks for embeddings
	prompt prefix.Endpoint // the form of the body's prompt; None if no slot would keep it
	answer savings.Dialect // the form of the answer to the prompt
	alters bool            // may change or remove a model
	first  bool            // goes to the first upstream, because it must always reach the same one
	admins bool            // needs the admin right: see exchange.admin
	long   bool            // may take long; Ollama stops it when the client leaves
	merged string          // the answer's list of an upstream's models, if lists are merged
}

// routes lists Ollama's endpoints. Only POST bodies are read, as reads says; all others pass
// through.
var routes = map[string]route{
	"/":                        {label: "/"},
	"/api/version":             {label: "/api/version"},
	"/api/status":              {label: "/api/status"},
	"/api/pull":                {label: "/api/pull", alters: true, long: true, first: true},
	"/api/push":                {label: "/api/push", long: true, first: true},
	"/api/tags":                {label: "/api/tags", merged: "models"},
	"/api/show":                {label: "/api/show", reads: readsName},
	"/api/delete":              {label: "/api/delete", alters: true, first: true},
	"/api/me":                  {label: "/api/me", first: true},
	"/api/signout":             {label: "/api/signout", first: true},
	"/api/create":              {label: "/api/create", alters: true, long: true, first: true},
	"/api/copy":                {label: "/api/copy", alters: true, first: true},
	"/api/ps":                  {label: "/api/ps", merged: "models"},
	"/api/generate":            {label: "/api/generate", reads: readsNative, prompt: prefix.Generate},
	"/api/chat":                {label: "/api/chat", reads: readsNative, prompt: prefix.Chat},
	"/api/embed":               {label: "/api/embed", reads: readsNative, embed: true, prompt: prefix.Embed},
	"/api/embeddings":          {label: "/api/embeddings", reads: readsNative, embed: true, prompt: prefix.Embed},
	"/v1/chat/completions":     {label: "/v1/chat/completions", reads: readsForeign, prompt: prefix.ChatCompletions, answer: savings.OpenAI},
	"/v1/completions":          {label: "/v1/completions", reads: readsForeign, prompt: prefix.Completions, answer: savings.OpenAI},
	"/v1/embeddings":           {label: "/v1/embeddings", reads: readsForeign, embed: true},
	"/v1/models":               {label: "/v1/models", merged: "data"},
	"/v1/responses":            {label: "/v1/responses", reads: readsForeign, prompt: prefix.Responses, answer: savings.Responses},
	"/v1/responses/compact":    {label: "/v1/responses/compact", reads: readsForeign},
	"/v1/messages":             {label: "/v1/messages", reads: readsForeign, prompt: prefix.Messages, answer: savings.Anthropic},
	"/v1/audio/transcriptions": {label: "/v1/audio/transcriptions", long: true},
}

// pathAudio also asks a model, but the proxy does not parse its form.
const pathAudio = "/v1/audio/transcriptions"

// pathModel with a model's name after it asks about one model.
const pathModel = "/v1/models/"

func routeOf(r *http.Request) route {
	rt, ok := routes[r.URL.Path]
	body := r.Body != nil && r.Body != http.NoBody
	switch {
	case r.URL.Path == pathEvents:
		rt.label, rt.long = pathEvents, true
	case !ok && strings.HasPrefix(r.URL.Path, "/api/blobs/"):
		rt.label, rt.first, rt.long = "/api/blobs/{digest}", true, body
	case !ok && strings.HasPrefix(r.URL.Path, pathModel):
		rt.label = "/v1/models/{model}"
	case !ok:
		rt.label, rt.long = "other", body
	}
	rt.admins = changes(r)
	if r.Method != http.MethodPost {
		rt.reads = readsNothing
	}
	if r.Method != http.MethodGet {
		rt.merged = ""
	}
	return rt
}

// changes reports whether a request changes models, or the account that an upstream is signed in
// to.
func changes(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return false
	}
	// A gateway in front of an upstream may clean a path before Ollama sees it.
	switch p := path.Clean(r.URL.Path); p {
	case "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/signout":
		return true
	default:
		return strings.HasPrefix(p, "/api/blobs/") || strings.HasPrefix(p, "/api/user/keys/")
	}
}

// infers reports whether the request uses or loads a model.
func (ex *exchange) infers() bool {
	return (ex.reads == readsNative || ex.reads == readsForeign) && !ex.unloads()
}

// outlives reports whether the request goes on after its client leaves, as it does in Ollama. A
// client that shuts down its sending side after the request, as some do, looks like one that has
// left until something is written to it. Ollama itself gives up evaluations and other long work in
// both cases.
func (rt route) outlives() bool {
	return !rt.long && rt.reads != readsNative && rt.reads != readsForeign
}
