package answers

import (
	"slices"
	"strconv"
	"strings"
	"time"
)

// Clock is what a prompt says about the time at which it was made.
type Clock uint8

// What a prompt can say.
const (
	NoClock   Clock = iota // nothing
	DateClock              // the date: its answer is another one tomorrow
	TimeClock              // the time of day: its answer is not to be kept
)

// ClockOf returns what a model's prompts say about the time, from the Modelfile and the template
// that /api/show returns; the template is the one in use, Ollama's own or that of the GGUF file.
// The Modelfile names the renderer, which /api/show tells nowhere else.
//
// With Ollama 0.24 to 0.34 these write the date: templates of Ollama that call currentDate or
// yesterdayDate; the renderer glimmer (from 0.33 on); and, where 0.33 and later leave the rendering
// to the engine, GGUF templates with strftime_now, date_string or datetime. Of those that llama.cpp
// comes with they are Llama 3.1, 3.2 and 3.3, gpt-oss, Granite 3.3, Mistral Small 3.2, Apertus,
// Solar Open, Firefunction 2 and Glimmer. A template that only tests for one of the words counts as
// well.
func ClockOf(modelfile, template string) Clock {
	switch {
	case tellsTime(template):
		return TimeClock
	case slices.ContainsFunc(datedRenderers, func(r string) bool { return renders(modelfile, r) }),
		slices.ContainsFunc(dateWords, func(w string) bool { return strings.Contains(template, w) }):
		return DateClock
	}
	return NoClock
}

// dateWords are what writes the current date into a prompt: functions of Ollama's templates, and a
// function and variables of those in GGUF files.
var dateWords = []string{"currentDate", "yesterdayDate", "strftime_now", "date_string", "datetime"}

// datedRenderers are Ollama's built-in renderers that write it.
var datedRenderers = []string{"glimmer"}

// renders reports whether the Modelfile has the line RENDERER with that name.
func renders(modelfile, renderer string) bool {
	for line := range strings.Lines(modelfile) {
		words := strings.Fields(line)
		if len(words) == 2 && strings.EqualFold(words[0], "renderer") && strings.Trim(words[1], `"`) == renderer {
			return true
		}
	}
	return false
}

// tellsTime reports whether a call of strftime_now may write more than a date.
func tellsTime(template string) bool {
	for {
		_, after, found := strings.Cut(template, "strftime_now")
		if !found {
			return false
		}
		template = after
		if !strings.HasPrefix(after, "(") {
			continue // such as: if strftime_now is defined
		}
		format := strings.TrimLeft(after[1:], " ")
		if format == "" || format[0] != '"' && format[0] != '\'' {
			return true // computed
		}
		end := strings.IndexByte(format[1:], format[0])
		if end < 0 || !onlyDate(format[1:1+end]) {
			return true
		}
	}
}

// onlyDate reports whether a format of strftime tells nothing that changes within a day.
func onlyDate(format string) bool {
	for {
		_, after, found := strings.Cut(format, "%")
		if !found {
			return true
		}
		after = strings.TrimLeft(after, "-_0^#EO")
		if after == "" || !strings.Contains("aAbBCdDeFgGhjmnuUtVwWxyY%", after[:1]) {
			return false
		}
		format = after[1:]
	}
}

// Day returns the part of a Key by which the answers of prompts with a DateClock are told apart:
// the date where the server is. If that is not known (where is nil) it is a quarter of an hour,
// within which the date changes nowhere. An answer must be kept only if Day is the same before and
// after its computation.
func Day(now time.Time, where *time.Location) string {
	if where == nil {
		return strconv.FormatInt(now.Unix()/(15*60), 10)
	}
	return now.In(where).Format(time.DateOnly)
}
