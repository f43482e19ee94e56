package main

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

// setting is one of serve's flags with its effective value and the source of that.
type setting struct {
	name   string
	group  string // a kong.Group's key
	value  any
	source string   // the flag, the variable's name, FILE:LINE, or "default"
	items  []string // for a list from the file: FILE:LINE of each item
}

// noValue is how an empty text or list is shown.
const noValue = "-"

// String returns the value in the flag's syntax.
func (s setting) String() string {
	text := fmt.Sprint(s.value)
	if list, ok := s.value.([]string); ok {
		text = strings.Join(list, ", ")
	}
	if text == "" {
		return noValue
	}
	return text
}

// BeforeResolve reads --config, before kong asks for the flags that neither the command line nor
// the environment sets.
func (s *serveCmd) BeforeResolve(ctx *kong.Context) error {
	flags := serveFlags(ctx.Model)
	i := slices.IndexFunc(flags, func(f *kong.Flag) bool { return f.Name == "config" })
	path, _ := ctx.FlagValue(flags[i]).(string)
	s.file = nil
	if path == "" {
		return nil
	}
	var err error
	if s.file, err = readConfig(path, flags); err == nil {
		ctx.AddResolver(s.file)
	}
	return err
}

// AfterApply notes the source of each setting.
func (s *serveCmd) AfterApply(ctx *kong.Context) error {
	given := map[string]bool{}
	for _, p := range ctx.Path {
		if p.Flag != nil && !p.Resolved {
			given[p.Flag.Name] = true
		}
	}
	s.inForce = nil
	for _, f := range serveFlags(ctx.Model) {
		value := reflect.Indirect(reflect.ValueOf(f.Target.Interface())).Interface()
		x := setting{name: f.Name, value: value, source: "default"}
		if f.Group != nil {
			x.group = f.Group.Key
		}
		switch env := fromEnvironment(f); {
		case given[f.Name]:
			x.source = "flag"
		case env != "":
			x.source = env
		case s.file != nil && s.file.settings[f.Name].line > 0:
			set := s.file.settings[f.Name]
			x.source = fmt.Sprintf("%s:%d", s.file.path, set.line)
			for _, v := range set.values {
				x.items = append(x.items, fmt.Sprintf("%s:%d", s.file.path, v.line))
			}
		}
		s.inForce = append(s.inForce, x)
	}
	return nil
}

// serveFlags returns the flags of the verb serve.
func serveFlags(app *kong.Application) []*kong.Flag {
	for _, node := range app.Children {
		if node.Name == "serve" {
			return node.Flags
		}
	}
	panic("there is no verb serve")
}

// at returns the place in the file of the setting that an error quotes.
func (s setting) at(err error) string {
	at, longest := s.source, ""
	list, _ := s.value.([]string)
	for i, item := range list {
		// The longest match: the error may quote a shorter item as an example.
		if i < len(s.items) && len(item) > len(longest) && strings.Contains(err.Error(), item) {
			at, longest = s.items[i], item
		}
	}
	return at
}

var flagNamed = regexp.MustCompile(`--([a-z][a-z-]*)`)

// locate adds the place in the file to an error about a setting.
func (s *serveCmd) locate(err error) error {
	for _, found := range flagNamed.FindAllStringSubmatch(err.Error(), -1) {
		for _, x := range s.inForce {
			if x.name != found[1] || s.file == nil || !strings.HasPrefix(x.source, s.file.path+":") {
				continue
			}
			return fmt.Errorf("%s: %w", x.at(err), err)
		}
	}
	return err
}

// plain removes what kong puts before an error about the file.
func plain(err error) error {
	if wrong, ok := errors.AsType[configError](err); ok {
		return wrong
	}
	return err
}
