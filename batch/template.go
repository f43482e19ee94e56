package batch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Template is a request with fields: a {{name}} within its texts stands for a row's value. A text
// that consists of one field becomes the value itself if that is a number, an object, …; within a
// longer text the value is written out. {{{{ stands for {{, and what begins with a dot ({{ .Prompt
// }}, as in Ollama's own templates) is left alone.
type Template struct {
	parts  []part
	Fields []string // each once, in the order of the request
	openAI bool     // it is in OpenAI's batch form
}

// part is some of the template's text, and the field that follows it.
type part struct {
	text  []byte
	field string // "": none, at the end
	whole bool   // the field is all of its text
}

// ParseTemplate reads a template.
func ParseTemplate(text []byte) (*Template, error) {
	text = bytes.TrimPrefix(text, utf8BOM)
	if err := notUTF8(text, 1); err != nil {
		return nil, fmt.Errorf("template: %w", err)
	}
	top, err := members(text)
	if err != nil {
		return nil, fmt.Errorf("template: %w", err)
	}
	text = compacted(text)
	t := &Template{openAI: inForm(top)}
	// Two braces in a row begin a field only within a text: elsewhere {{ is no JSON.
	var literal []byte
	for {
		before, rest, found := bytes.Cut(text, []byte("{{"))
		literal = append(literal, before...)
		if !found {
			break
		}
		if bytes.HasPrefix(rest, []byte("{{")) {
			literal, text = append(literal, "{{"...), rest[2:]
			continue
		}
		inner, after, closed := bytes.Cut(rest, []byte("}}"))
		if !closed || bytes.Contains(inner, []byte(`"`)) {
			return nil, fmt.Errorf("template: %q has no }} (write {{{{ for two braces)",
				"{{"+string(rest[:min(len(rest), 20)]))
		}
		text = after
		name := strings.TrimSpace(string(inner))
		switch {
		case name == "":
			return nil, errors.New("template: {{}} names no field (write {{{{ for two braces)")
		case name[0] == '.' || strings.Contains(name, `\`):
			literal = fmt.Appendf(literal, "{{%s}}", inner)
			continue
		}
		p := part{text: literal, field: name, whole: opensText(literal) && closesText(text)}
		if p.whole { // its quotes belong to the value
			p.text, text = literal[:len(literal)-1], text[1:]
		}
		t.parts, literal = append(t.parts, p), nil
		if !slices.Contains(t.Fields, name) {
			t.Fields = append(t.Fields, name)
		}
	}
	t.parts = append(t.parts, part{text: literal})
	if len(t.Fields) == 0 {
		return nil, errors.New("template: no field is in it: write {{name}} where a row's value belongs")
	}
	return t, nil
}

// opensText reports whether the JSON text ends with an unescaped quote, which begins a text.
func opensText(text []byte) bool {
	quoteless, quoted := bytes.CutSuffix(text, []byte(`"`))
	return quoted && (len(quoteless)-len(bytes.TrimRight(quoteless, `\`)))%2 == 0
}

// closesText reports whether the JSON text begins with the quote that ends a text, and not a key.
func closesText(text []byte) bool {
	return bytes.HasPrefix(text, []byte(`"`)) && !bytes.HasPrefix(text, []byte(`":`))
}

// Fill returns the request for a row, of raw JSON values.
func (t *Template) Fill(row map[string]json.RawMessage) ([]byte, error) {
	var b []byte
	for _, p := range t.parts {
		b = append(b, p.text...)
		if p.field == "" {
			continue
		}
		raw, ok := row[p.field]
		switch {
		case !ok:
			return nil, fmt.Errorf("the template's field {{%s}} is not in the row", p.field)
		case p.whole:
			b = append(b, raw...)
		case raw[0] == '"':
			b = append(b, raw[1:len(raw)-1]...)
		case string(raw) != "null":
			inText := quoted(string(raw))
			b = append(b, inText[1:len(inText)-1]...)
		}
	}
	return b, nil
}

// customID returns the custom_id of a row with missing fields, unless it needs one of those.
func (t *Template) customID(row map[string]json.RawMessage) []byte {
	const absent = `"\u0001"`
	for _, name := range t.Fields {
		if row[name] == nil {
			row[name] = json.RawMessage(absent)
		}
	}
	text, _ := t.Fill(row) // all fields are there
	r, _ := parseRequest(text)
	if bytes.Contains(r.customID, []byte(absent[1:len(absent)-1])) {
		return nil
	}
	return r.customID
}
