package main

import (
	"io"
	"runtime/debug"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"github.com/muesli/roff"
)

type manCmd struct{}

func (manCmd) Run(k *kong.Kong, out *console) error {
	_, err := io.WriteString(out.stdout, manPage(k.Model, buildTime()))
	return err
}

// buildTime is the time of the commit, so that one source always gives the same page; the current
// time if the commit is not known.
func buildTime() time.Time {
	if build, ok := debug.ReadBuildInfo(); ok {
		for _, s := range build.Settings {
			if t, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil {
				return t
			}
		}
	}
	return time.Now()
}

// manPage is the manual, for man(1): the --help of every verb, on one page. The flags of the
// default verb are listed as the program's.
func manPage(app *kong.Application, date time.Time) string {
	doc := roff.NewDocument()
	short := strings.TrimSuffix(app.Help, ".")
	doc.Heading(1, app.Name, app.Name, date)
	doc.Section("Name")
	doc.Text(app.Name + " - " + short)
	doc.Section("Synopsis")
	doc.TextBold(app.Name)
	doc.Text(" [")
	doc.TextItalic("verb")
	doc.Text("] [")
	doc.TextItalic("flags")
	doc.Text("]")
	doc.Section("Description")
	manText(doc, app.DefaultCmd.Detail)
	doc.Section("Options")
	manFlags(doc, app.DefaultCmd)
	doc.Section("Verbs")
	for _, verb := range app.Leaves(true) {
		if verb == app.DefaultCmd {
			continue
		}
		doc.EndSection()
		doc.TaggedParagraph(-1)
		doc.TextBold(strings.TrimPrefix(verb.Summary(), app.Name+" "))
		doc.EndSection()
		literal(doc, verb.Help)
		doc.Indent(-1)
		manText(doc, verb.Detail)
		manFlags(doc, verb)
		doc.IndentEnd()
	}
	doc.Section("Exit status")
	doc.Text("0 for success, 1 for a failure, 2 for arguments or settings that make no sense. batch has one more: 3 if some requests failed.")
	doc.Section("Environment")
	doc.Text("Every flag has a variable, which its entry names. A repeated flag's values are separated by commas there.")
	doc.Section("Files")
	doc.Text("/etc/default/ollama-cacheproxy has the settings of the service, as variables, where a package has installed it.")
	doc.EndSection()
	return doc.String()
}

// manText writes a help text, in which examples are indented.
func manText(doc *roff.Document, text string) {
	indented := false
	for line := range strings.SplitSeq(text, "\n") {
		if line == "" {
			continue
		}
		if is := strings.HasPrefix(line, "  "); is != indented {
			if indented = is; indented {
				doc.Indent(-1)
			} else {
				doc.IndentEnd()
			}
		}
		doc.Paragraph()
		literal(doc, strings.TrimLeft(line, " "))
	}
	if indented {
		doc.IndentEnd()
	}
}

// literal writes text unchanged, which the library would take for a format.
func literal(doc *roff.Document, text string) {
	doc.Text(strings.ReplaceAll(text, "%", "%%"))
}

// placeholder is the name of a flag's value, or the possible values if they are few.
func placeholder(flag *kong.Flag) string {
	if flag.Tag.Enum != "" {
		return strings.ReplaceAll(flag.Tag.Enum, ",", "|")
	}
	return strings.Trim(flag.FormatPlaceHolder(), `"`)
}

// manFlags writes the flags of a verb, with their variables.
func manFlags(doc *roff.Document, verb *kong.Node) {
	for _, group := range verb.AllFlags(true) {
		for _, flag := range group {
			doc.EndSection()
			doc.TaggedParagraph(-1)
			if flag.Short != 0 {
				doc.TextBold("-" + string(flag.Short))
				doc.Text(", ")
			}
			name := "--" + flag.Name
			if flag.Tag.Negatable != "" {
				name = "--[no-]" + flag.Name
			}
			doc.TextBold(name)
			if !flag.IsBool() {
				doc.Text("=")
				doc.TextItalic(placeholder(flag))
			}
			doc.EndSection()
			literal(doc, flag.Help)
			for _, env := range flag.Envs {
				doc.Text(" (" + env + ")")
			}
		}
	}
}
