package answers

import (
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// rule is what is known about a member of a request.
type rule struct {
	// ignored reports whether a value changes no word of the answer. With one that Ollama refuses
	// the answer is the refusal.
	ignored func(value []byte) bool
	options bool // it is decoded into a map
	float   bool // it is decoded into floating point
	raw     bool // Ollama passes it on as JSON, where escapes stay as they are written
	copied  bool // of its JSON the length counts as well, spaces included

	// same are the values that Ollama decodes into what it has if the member is absent, or that it
	// treats alike everywhere.
	same []string
}

// absent reports whether the value states what Ollama takes anyway.
func (r rule) absent(value []byte) bool {
	for _, s := range r.same {
		if string(value) == s || s == "[]" && value[0] == '[' && empty(value) {
			return true
		}
	}
	return false
}

var (
	null  = rule{same: []string{"null"}}
	off   = rule{same: []string{"null", "false"}}
	zero  = rule{same: []string{"null", "0"}}
	blank = rule{same: []string{"null", `""`}}
	none  = rule{same: []string{"null", "[]"}}
	raw   = rule{raw: true}
	float = rule{same: []string{"null"}, float: true}
)

// boolean, streamOptions and duration report whether Ollama takes the value for stream,
// stream_options and keep_alive.
func boolean(value []byte) bool { return value[0] == 't' || value[0] == 'f' || value[0] == 'n' }

func streamOptions(value []byte) bool {
	if value[0] != '{' {
		return value[0] == 'n'
	}
	c := jsonscan.NewCursor(value, 0)
	for c.Enter(); c.More(); {
		if key, v := c.Key(), c.Value(); jsonscan.KeyIs(key, []byte("include_usage")) && !boolean(v) {
			return false
		}
	}
	return true
}

func duration(value []byte) bool {
	if s, ok := jsonscan.Unquote(value); ok {
		_, err := time.ParseDuration(s)
		return err == nil
	}
	_, ok := number(value)
	return ok || value[0] == 'n'
}

// rules are what is known about each endpoint's members. They were read from the types and handlers
// of Ollama 0.24 to 0.34. A member that is not listed has no default that is known: null, for one,
// is not nothing for format and input. An empty list of tools is not one for templates, which can
// write it.
var rules = map[prefix.Endpoint]map[string]rule{
	prefix.Chat: {
		"stream": {ignored: boolean}, "keep_alive": {ignored: duration},
		"tools": null, "format": raw, "think": null, "truncate": null, "shift": null,
		"options":            {same: []string{"null", "{}"}, options: true},
		"_debug_render_only": off, "logprobs": off, "top_logprobs": zero,
	},
	prefix.Generate: {
		"stream": {ignored: boolean}, "keep_alive": {ignored: duration},
		"format": raw, "think": null, "truncate": null, "shift": null,
		"options":            {same: []string{"null", "{}"}, options: true},
		"_debug_render_only": off, "logprobs": off, "top_logprobs": zero,
		"suffix": blank, "system": blank, "template": blank, "context": null, "raw": off, "images": none,
	},
	prefix.ChatCompletions: {
		"stream": {ignored: boolean}, "stream_options": {ignored: streamOptions}, "keep_alive": {ignored: duration},
		"max_tokens": null, "seed": null,
		"stop": null, "temperature": float, "frequency_penalty": float, "presence_penalty": float, "top_p": float,
		"response_format": {same: null.same, raw: true}, "tools": none, "reasoning": null, "reasoning_effort": blank, "logprobs": off,
		"top_logprobs": zero, "_debug_render_only": off,
	},
	prefix.Completions: {
		"stream": {ignored: boolean}, "stream_options": {ignored: streamOptions}, "keep_alive": {ignored: duration},
		"max_tokens": null, "seed": null,
		"stop": null, "temperature": float, "frequency_penalty": float, "presence_penalty": float, "top_p": float,
		"suffix": blank, "logprobs": zero, "_debug_render_only": off,
	},
	prefix.Messages: {
		"stream": {ignored: boolean}, "stream_options": {ignored: streamOptions}, "keep_alive": {ignored: duration},
		"system": null, "temperature": float,
		"top_p": float, "top_k": null, "stop_sequences": none,
		"tools": {same: none.same, copied: true}, "tool_choice": null, "thinking": null,
		"metadata": null, "output_config": null,
	},
	prefix.Responses: {
		"stream": {ignored: boolean}, "stream_options": {ignored: streamOptions}, "keep_alive": {ignored: duration},
		"instructions":      blank,
		"max_output_tokens": null, "temperature": float, "text": {same: null.same, raw: true}, "input": raw, "top_p": float, "truncation": null,
		"tools": null, "think": null, "include": null, "background": off, "reasoning": null,
	},
}

// known returns what is known about the endpoint's members, or nil if it has no generated text.
func known(e prefix.Endpoint) map[string]rule { return rules[e] }
