package answers

import (
	"bytes"
	"slices"
	"strconv"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/jsonscan"
)

// dateWords are what writes the current date into a prompt: two functions of Ollama's templates, and
// one of the templates in GGUF files.
var dateWords = [][]byte{[]byte("currentDate"), []byte("yesterdayDate"), []byte("strftime_now")}

// datedRenderers are Ollama's built-in renderers that write it.
var datedRenderers = []string{"glimmer"}

// IsDated reports whether a model's prompts contain the current date, so that its answers to one
// request differ from day to day: the template is Ollama's own or the one of the GGUF file
// (tokenizer.chat_template), and the renderer is the name after RENDERER in the Modelfile, or empty.
func IsDated(renderer string, templates ...string) bool {
	if slices.Contains(datedRenderers, renderer) {
		return true
	}
	return slices.ContainsFunc(templates, func(t string) bool { return datedText([]byte(t)) })
}

func datedText(template []byte) bool {
	return slices.ContainsFunc(dateWords, func(w []byte) bool { return bytes.Contains(template, w) })
}

// mentionsDate is datedText for a raw string.
func mentionsDate(raw []byte) bool {
	if raw == nil {
		return false
	}
	s, _ := jsonscan.Unquote(raw)
	return datedText([]byte(s))
}

// Day returns the part of a Key by which answers of dated prompts are told apart: the date where the
// server is. If that is not known (where is nil) it is a quarter of an hour, within which the date
// changes nowhere. An answer must be kept only if Day is the same before and after its computation.
func Day(now time.Time, where *time.Location) string {
	if where == nil {
		return strconv.FormatInt(now.Unix()/(15*60), 10)
	}
	return now.In(where).Format(time.DateOnly)
}
