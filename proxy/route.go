package proxy

import (
	"net/http"
	"path"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/savings"
)

// reads says what the proxy reads of a request's body before it forwards it.
type reads int

const (
	readsNothing reads = iota // passed through as it comes
	readsNative               // JSON with a model and perhaps keep_alive: Ollama's own inference endpoints
	readsForeign              // JSON with a model, of a dialect that has no keep_alive
	readsName                 // JSON with a model: only to know which upstream has it
)

// route is what a path and method mean to the proxy. Everything that it does not know passes through.
type route struct {
	label  string // bounded: for metrics
	reads  reads
	embed  bool            // asks for embeddings
	prompt prefix.Endpoint // how the body's prompt is written; None where there is none that a slot would keep
	answer savings.Dialect // how the answer to that is written
	alters bool            // may change or remove a model
	first  bool            // goes to the first upstream, since it changes something or must always go to the same one
	admins bool            // only admins may send it: see exchange.admin
	long   bool            // works for long, until it is done or its client leaves
	merged string          // the member of the answer that lists what an upstream has, if it is merged over upstreams
}

// routes lists Ollama's endpoints. The proxy reads a POST body where reads says so; every other method passes.
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

// pathAudio asks a model, too, in a form that is not read.
const pathAudio = "/v1/audio/transcriptions"

// pathModel, and a model's name after it, asks for one model.
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

// changes reports whether a request changes models, or who is signed in at an upstream.
func changes(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return false
	}
	// What stands in front of an upstream may clean a path before Ollama sees it.
	switch p := path.Clean(r.URL.Path); p {
	case "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/signout":
		return true
	default:
		return strings.HasPrefix(p, "/api/blobs/") || strings.HasPrefix(p, "/api/user/keys/")
	}
}

// infers reports whether the request asks a model for something, or has one loaded.
func (ex *exchange) infers() bool {
	return (ex.reads == readsNative || ex.reads == readsForeign) && !ex.unloads()
}

// outlives reports whether the request goes on when its client leaves, since it does so in Ollama, too. A client that has shut
// its sending side, as some do when they have sent their request, looks like one that has left, until something is
// written to it. Of what evaluates, or works for long otherwise, Ollama itself gives up both.
func (rt route) outlives() bool {
	return !rt.long && rt.reads != readsNative && rt.reads != readsForeign
}
